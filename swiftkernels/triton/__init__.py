"""The Triton backend. Import `swiftkernels.triton.launch` only where Triton is needed."""

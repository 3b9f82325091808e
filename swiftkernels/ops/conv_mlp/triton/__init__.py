"""The Triton kernels of conv_mlp."""

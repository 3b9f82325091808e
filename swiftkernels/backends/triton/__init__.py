"""Shared by the Triton kernels of all operators. `kernel_launch` and `tiles` import Triton."""

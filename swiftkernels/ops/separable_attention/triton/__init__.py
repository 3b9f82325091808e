"""Triton kernels of separable attention; importing this package does not import triton."""

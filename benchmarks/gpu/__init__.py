"""Evidence about the GPU kernels that needs no GPU."""

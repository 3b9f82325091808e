"""Evidence about the GPU kernels: counted, without a GPU; `device`, measured on one."""

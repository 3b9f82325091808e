"""What can be proved of the GPU kernels without a GPU, and measured with one."""

"""What the Triton kernels of all operators share. Modules in here import Triton."""

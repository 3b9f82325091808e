"""The CPU backend: kernels in C++, and what finds, loads and calls them."""

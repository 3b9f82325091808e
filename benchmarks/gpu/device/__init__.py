"""What `benchmarks/gpu/run` does on a GPU; the rest of `benchmarks.gpu` needs none."""

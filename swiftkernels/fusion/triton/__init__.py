"""Fused networks on a GPU."""

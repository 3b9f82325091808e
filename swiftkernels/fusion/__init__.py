"""Inference of whole networks: chains of blocks that run as one program on a CPU.

`fuse.fuse_for_inference` makes the network, `find` recognises its blocks, `steps` defines what a
chain computes, `chain` is the module that computes it.
"""

"""Compiled kernels: hashing, extent I/O and the FUSE transport. They know bytes and descriptors, never names."""

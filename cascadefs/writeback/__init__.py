"""Staged bytes become objects, objects become durable: sealing, fsync, flush, eviction."""

"""One medium each: files in memory or on disk (files.py, shm.py), packed extents (extents.py). They know bytes, not names."""

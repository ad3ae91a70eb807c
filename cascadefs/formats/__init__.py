"""Bytes <-> values of what lies on disk and in shared memory. No file is opened here but the ring's."""

"""Whether a store is whole: opening after a crash, loss of memory, verify, fsck, a new index."""

"""`cascadefs bench ...`: arguments, tables, progress."""

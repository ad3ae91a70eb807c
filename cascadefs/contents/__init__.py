"""What is in use: open files, how they change, streams of what has no file."""

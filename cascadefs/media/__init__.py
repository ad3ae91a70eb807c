"""What talks to the operating system about files: the seam of all reads and writes, closed folders, room kept aside."""

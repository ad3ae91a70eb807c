# The parts of fuse_transport.pyx: threads that read requests, tables of what they may answer, replies. No Python in them.

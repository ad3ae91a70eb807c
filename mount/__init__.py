"""The mount: pyfuse3 operations over a cascadefs store, and the command line. The only package that knows FUSE."""

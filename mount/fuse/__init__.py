"""The kernel's side of a mount: pyfuse3, our transport, and what each request does over a store."""

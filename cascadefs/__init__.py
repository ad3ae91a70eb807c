"""cascadefs: a tiered, content-addressed cache; a library here, a mount in cascadefs.mount. Read ARCHITECTURE.md first."""

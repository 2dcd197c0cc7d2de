"""Door 1: the FUSE file system."""

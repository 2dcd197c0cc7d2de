"""The FUSE file system."""

"""A cache on disk in front of any source: stored bytes as they were fetched, shared by all processes."""

"""A datastore's directory on disk, read without a server."""

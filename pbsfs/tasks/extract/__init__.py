"""Writes directories of archives to a directory: the entries with all that is stored with them."""

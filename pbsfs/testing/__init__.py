"""What demos and tests need: a writer of datastores."""

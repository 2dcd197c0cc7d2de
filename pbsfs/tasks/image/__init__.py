"""Copying an image to a file, a block device or a stream."""

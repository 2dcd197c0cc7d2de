"""The one reader layer: from stored bytes of any source to verified bytes of images and blobs.

The mount, NBD and the commands call `reader.Reader`; this layer does not know which of them it serves.
"""

"""The one reader layer: from stored bytes of any source to verified bytes of images and blobs.

Doors (the mount, NBD, export) enter at `reader.Reader`; nothing below knows which door was used.
"""

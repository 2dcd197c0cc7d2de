"""squashfs, version 4: a file system that is packed once and never changed.

Format: fs/squashfs of the kernel, and dr-emann's description of the format.
"""

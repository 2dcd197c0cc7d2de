"""ext2, ext3 and ext4, with replay of the journal: a file system's parts as readers over a `Volume`.

The formats are those of the kernel's documentation (Documentation/filesystems/ext4) and of its fs/ext4 and
fs/jbd2, which decide where the two differ.
"""

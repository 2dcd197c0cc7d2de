"""btrfs: a file system on one or more devices, with its subvolumes and snapshots as directories.

Everything is in copy-on-write trees whose nodes carry checksums. Trees name places by logical addresses,
and chunks map those to devices. Formats: the kernel's include/uapi/linux/btrfs_tree.h, and the btrfs
documentation on its on-disk format.
"""

"""The permissions of what pbsfs shows and no backup stores: snapshots, images, configurations.

Used by the mount, and by `pbsfs ls`, which shows what a mount shows.
"""

DEFAULT_UMASK = 0o007
"""Permissions that a mount takes away unless `-o umask=` says otherwise."""

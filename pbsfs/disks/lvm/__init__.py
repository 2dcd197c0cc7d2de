"""LVM2: physical volumes, groups, and logical volumes, with thin pools."""

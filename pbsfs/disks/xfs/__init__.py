"""XFS, versions 4 and 5, with the changes that its log holds; read only.

The formats are those of the kernel's fs/xfs/libxfs/xfs_format.h, xfs_da_format.h and xfs_log_format.h. The
class is `reader.Xfs`.
"""

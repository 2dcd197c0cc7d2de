"""The tree that is shown: directories, links and files, listed when somebody looks.

The mount, the command line and NBD all show this tree: as a file system, by paths, and as export names.
"""

from pbsfs.tree.archives import ArchiveDirectory
from pbsfs.tree.entries import (
    ContentsDirectory,
    ContentsFile,
    ContentsLink,
    ContentsNode,
    ContentsSpecial,
)
from pbsfs.tree.files import BlobFile, File, ImageFile
from pbsfs.tree.namespaces import FilesDirectory, NamespaceDirectory, NamespacesDirectory, TypeDirectory
from pbsfs.tree.node import Directory, Link, Listing, Node, Nodes
from pbsfs.tree.snapshots import LATEST, GroupDirectory, Latest, SnapshotDirectory
from pbsfs.tree.stat import Stat
from pbsfs.tree.tree import DEFAULT_REFRESH, Tree
from pbsfs.tree.volumes import BrokenDisk, Note, VolumeDirectory

__all__ = [
    "DEFAULT_REFRESH",
    "LATEST",
    "ArchiveDirectory",
    "BlobFile",
    "BrokenDisk",
    "ContentsDirectory",
    "ContentsFile",
    "ContentsLink",
    "ContentsNode",
    "ContentsSpecial",
    "Directory",
    "File",
    "FilesDirectory",
    "GroupDirectory",
    "ImageFile",
    "Latest",
    "Link",
    "Listing",
    "NamespaceDirectory",
    "NamespacesDirectory",
    "Node",
    "Nodes",
    "Note",
    "SnapshotDirectory",
    "Stat",
    "Tree",
    "TypeDirectory",
    "VolumeDirectory",
]

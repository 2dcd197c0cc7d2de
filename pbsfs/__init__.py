"""Proxmox Backup Server data as a read-only file system."""

__version__ = "0.1.0"

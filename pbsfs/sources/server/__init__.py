"""A running Proxmox Backup Server, through its HTTP API and reader protocol."""

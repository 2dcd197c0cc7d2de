"""A backup as a virtual machine: its configuration, QEMU, firmware and overlays."""

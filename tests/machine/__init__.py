"""A virtual machine with systemd and a whole kernel, in which the package is checked."""

"""Images as block devices, through nbdkit and its Python plugin."""

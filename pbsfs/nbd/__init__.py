"""Door 2: images as block devices, through nbdkit and its Python plugin."""

"""Images as network block devices: the plugin, in the real nbdkit."""

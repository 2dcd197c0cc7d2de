"""Where backups live: a datastore directory, later a running server, behind one interface."""

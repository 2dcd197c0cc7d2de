"""From options, environment and files to a description of a source, its secrets and keys."""

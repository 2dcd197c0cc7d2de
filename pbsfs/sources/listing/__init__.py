"""Lists a datastore by the names and files of its metadata: the part that directories and buckets share."""

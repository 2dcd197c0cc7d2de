"""A datastore in an S3 bucket, read without a server."""

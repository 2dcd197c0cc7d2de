"""The key of a bucket, from the places where AWS's tools have it."""

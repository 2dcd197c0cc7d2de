"""Chunks of any source: fetched, verified, decoded, kept; and what to fetch before it is read."""

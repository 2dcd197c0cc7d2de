"""Chunks of any source: fetched, verified, decoded and cached, also ahead of being read."""

"""Verified connections to servers, and HTTP/1.1 requests over them. All sources that are servers use them."""

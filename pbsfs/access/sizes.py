"""Sizes as users write them: `256M`, `1G`.

Used by the command line and by nbdkit's parameters. Synchronous.
"""

from __future__ import annotations

import os
import re

from pbsfs.base.errors import UsageError

_SIZE = re.compile(r"(\d+)\s*([kmgt]?)(?:i?b)?", re.IGNORECASE)
_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}

MIN_CACHE_SIZE = 32 << 20
"""Bytes; two chunks of the largest size that exists. With less, no chunk would stay for its second read."""


def parse_size(text: str) -> int:
    """`256M`, `1G`, `65536` in bytes (powers of 1024). Raises UsageError."""
    match = _SIZE.fullmatch(text.strip())
    if not match or len(match[1]) > 18:
        raise UsageError(f"'{text}' is not a size; write it as 256M or 1G")
    return int(match[1]) * _UNITS[match[2].lower()]


def parse_cache_size(text: str) -> int:
    """A size that the chunk cache can work with. Raises UsageError."""
    size = parse_size(text)
    if size < MIN_CACHE_SIZE:
        raise UsageError(f"a cache of {text} is too small; the least is {MIN_CACHE_SIZE >> 20}M")
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if size > memory:
        raise UsageError(f"a cache of {text} is too large: this computer has {memory >> 20}M; name less")
    return size


def parse_rate(text: str) -> int:
    """The bytes a second that a limit allows. Raises UsageError."""
    rate = parse_size(text)
    if rate == 0:
        raise UsageError(f"a rate of {text} is too small: reading would never end; give a larger rate")
    return rate

"""Times and sizes of serving NBD, in one value that is passed in. Users choose none of them."""

from __future__ import annotations

from dataclasses import dataclass

from pbsfs.tree import DEFAULT_REFRESH


@dataclass(frozen=True, slots=True)
class Limits:
    """`refresh`: seconds for which the tree keeps a listing, and for which the list of exports is kept: each
    new list may walk through the whole datastore.

    `exports`: the most exports in a list: nbdkit takes no more. Exports that are not listed can be opened.

    `extents`: the most extents in an answer; a client asks again from where it ends.

    `patience`: seconds after which a thread that waits for the loop asks whether its client still waits.
    """

    refresh: float = DEFAULT_REFRESH
    exports: int = 10_000
    extents: int = 1024
    patience: float = 0.5

"""How long look-ups in an index take: `python -m bench.lookups INDEX COUNT`, in a process of its own.

INDEX is a stored index, or a number of bytes: an image of that size without a hole. Prints seconds as JSON.
"""

from __future__ import annotations

import json
import random
import sys
import time
from pathlib import Path
from typing import cast

from bench.data import CHUNK, INDEX, PLAIN
from bench.measures import MIB
from pbsfs.base.names import Archive
from pbsfs.chunks.store import ChunkStore
from pbsfs.formats.index import FixedIndex, Index, encode_fixed
from pbsfs.reader.image import Image


def _index(what: str) -> FixedIndex:
    if not what.isdigit():
        return FixedIndex(Path(what).read_bytes())
    size = int(what)
    digests = random.Random(8).randbytes(size // CHUNK * 32)
    return FixedIndex(encode_fixed([digests], size=size, chunk_size=CHUNK, ctime=0)[0])


async def _nothing(_index: Index) -> None:
    pass


def _timed(what: str, count: int) -> dict[str, float]:
    """`FixedIndex.find` and `Image.extents` of 32 MiB at random places."""
    index = _index(what)
    # Neither fetches anything: no store is needed.
    store = cast("ChunkStore", None)
    image = Image(store, PLAIN, Archive(INDEX), index, encrypted=False, key=None, restore=_nothing)
    source = random.Random(6)
    places = [source.randrange(index.size) for _ in range(count)]
    for _extent in image.extents(0, 1):  # what only the first one pays: the digest of a chunk of zeros
        pass
    started = time.perf_counter()
    for place in places:
        index.find(place)
    took = {"find": time.perf_counter() - started}
    worst = 0.0
    started = time.perf_counter()
    for place in places:
        began = time.perf_counter()
        for _extent in image.extents(place, 32 * MIB):
            pass
        worst = max(worst, time.perf_counter() - began)
    return took | {"extents": time.perf_counter() - started, "worst": worst}


if __name__ == "__main__":
    print(json.dumps(_timed(sys.argv[1], int(sys.argv[2]))))

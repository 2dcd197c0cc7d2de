"""pbsfs on a machine with more cores: `python -m bench.simulated DECODERS SECONDS NOTE -- ARGUMENTS`.

Decoding a chunk sleeps for so many seconds for each 4 MiB, without Python's lock and without a processor, and
returns bytes that were made before: any number of decoders fits on two cores. All else is the real program.
At its end it writes to the file NOTE, as JSON, how many chunks were decoded, the seconds from the first to
the last of them, and the processor seconds of the loop's thread meanwhile.

This shows how much Python's lock, the loop and the hand-overs between threads allow. It does not show the
memory's bandwidth, which decoders share, nor what they do to each other's caches.
"""

from __future__ import annotations

import atexit
import json
import os
import sys
import threading
import time
from pathlib import Path

UNIT = 4 << 20
"""Bytes of a chunk that takes the given seconds; a smaller one takes its share."""


def main() -> None:
    decoders, seconds, note = int(sys.argv[1]), float(sys.argv[2]), Path(sys.argv[3])
    sys.argv = ["pbsfs", *sys.argv[sys.argv.index("--") + 1 :]]
    os.sched_getaffinity = lambda _pid: set(range(decoders))
    os.environ["PBSFS_PURE_DECODER"] = "1"  # the extension would decode two chunks at once
    from bench.tuned import change  # noqa: PLC0415 - after the cores

    change("chunks.limits.spare_decoders=0")
    from pbsfs.chunks import decoder  # noqa: PLC0415
    from pbsfs.formats.blob import Stored  # noqa: PLC0415
    from pbsfs.formats.keys import Key  # noqa: PLC0415

    loop = time.pthread_getcpuclockid(threading.get_ident())
    loop_before: list[float] = []
    started: list[float] = []
    ended: list[float] = []
    made: dict[int, bytes] = {}

    def decode_chunk(
        raw: Stored, *, digest: bytes, length: int, encrypted: bool, key: Key | None = None
    ) -> bytes:
        if not started:
            loop_before.append(time.clock_gettime(loop))
        started.append(time.monotonic())
        time.sleep(seconds * length / UNIT)
        content = made.get(length) or made.setdefault(length, os.urandom(length))
        ended.append(time.monotonic())
        return content

    def tell() -> None:
        noted = {
            "chunks": len(ended),
            "seconds": max(ended) - min(started),
            "loop": time.clock_gettime(loop) - loop_before[0],
        }
        note.write_text(json.dumps(noted))

    decoder.decode_chunk = decode_chunk  # before anything imports it from there
    atexit.register(tell)
    from pbsfs.cli import main as run  # noqa: PLC0415

    run()


if __name__ == "__main__":
    main()

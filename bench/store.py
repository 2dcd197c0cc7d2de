"""An object store that is not what is measured: the one of the tests, over TLS, in a process of its own.

    python -m bench.store DIR [--round-trip SECONDS --bandwidth BYTES] [--more FILES]

prints one line of JSON that says where it is, and ends at the end of its standard input. It looks once at
what is in DIR. With a round trip or a bandwidth it is behind a simulated link. `--more`: so many more files
in each snapshot, whose names are listed only.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from bench.link import Link
from bench.measures import stop
from tests.support.s3 import ACCESS_KEY, BUCKET, SECRET_KEY, STORE, S3Server
from tests.support.server import certificate

CHECKOUT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True, slots=True)
class BucketAccess:
    """How to get at the datastore. `pid`: of the object store."""

    port: int
    fingerprint: str
    pid: int

    def environment(self) -> dict[str, str]:
        return {
            "PBSFS_BUCKET": f"s3://{BUCKET}/{STORE}",
            "AWS_ENDPOINT_URL_S3": f"https://127.0.0.1:{self.port}",
            "AWS_REGION": "us-east-1",
            "AWS_ACCESS_KEY_ID": ACCESS_KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
        }


@contextmanager
def storing(
    directory: Path, *, round_trip: float = 0.0, bandwidth: float | None = None, more: int = 0
) -> Iterator[BucketAccess]:
    """An object store with the datastore in `directory`; it ends with this, and with this process."""
    command = [sys.executable, "-m", "bench.store", str(directory), "--round-trip", str(round_trip)]
    command += ["--more", str(more), *(["--bandwidth", str(bandwidth)] if bandwidth else [])]
    process = subprocess.Popen(
        command,
        cwd=CHECKOUT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,  # Ctrl-C is for us
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        if not line:
            raise RuntimeError("the object store does not start")
        yield BucketAccess(**json.loads(line), pid=process.pid)
    finally:
        process.stdin.close()
        stop(process)
        process.stdout.close()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.store")
    parser.add_argument("directory", type=Path)
    parser.add_argument("--round-trip", type=float, default=0.0)
    parser.add_argument("--bandwidth", type=float)
    parser.add_argument("--more", type=int, default=0)
    options = parser.parse_args()
    made = certificate.make()
    with S3Server(options.directory, certificate=made) as store:
        store.freeze([f"drive-scsi{number}.img.fidx" for number in range(options.more)])
        port = store.port
        if options.round_trip or options.bandwidth:
            link = Link(store.port, options.round_trip, options.bandwidth)
            link.start()
            port = link.port
        print(json.dumps({"port": port, "fingerprint": made.fingerprint}), flush=True)
        sys.stdin.read()
        os._exit(0)  # connections and all


if __name__ == "__main__":
    main()

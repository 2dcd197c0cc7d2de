"""From nothing to the first byte."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from bench.bare import log_in
from bench.data import PLAIN
from bench.measures import BenchError, Sample, run
from bench.plan import Bench, Case, Goal, Plan, Round
from bench.program import PBSFS, Source, unmount, wait_until
from bench.readers import NbdClient
from bench.serving import CHECKOUT
from pbsfs.fuse.mountpoint import mounted_at

LOGIN = "limit: login"

LISTING = "pbsfs ls of a snapshot, directory"

NBD_IMPORTS = (
    "import pbsfs.runtime.process, pbsfs.base.errors, pbsfs.runtime.logs, "
    "pbsfs.nbd.server, pbsfs.nbd.parameters"
)
"""What nbd_bridge.py imports of pbsfs."""


def _imports(what: str) -> Sample:
    """`-X importtime`: the modules' own times added up."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", what],
        cwd=CHECKOUT,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise BenchError(done.stderr[-1000:])
    own = [
        line.split(":")[1].split("|")[0]
        for line in done.stderr.splitlines()
        if line.startswith("import time:")
    ]
    return Sample(sum(int(number) for number in own if number.strip().isdigit()) / 1e6).with_counts(
        modules=float(len(own) - 1)
    )


def _start(bench: Bench, stack: ExitStack) -> Plan:
    data, pbsfs = bench.data, bench.pbsfs
    server = bench.server(stack)

    def mount(source: Source) -> Callable[[], Sample]:
        def work() -> Sample:
            place = Path(tempfile.mkdtemp(prefix="mount-", dir=pbsfs.home))
            try:
                started = time.perf_counter()
                words: list[str | Path] = [PBSFS, "mount", *pbsfs.options(source, data), place]
                run(words, environment=pbsfs.environment(source))
                mounted = time.perf_counter() - started
                with (place / str(PLAIN) / "drive-scsi0.img").open("rb", buffering=0) as file:
                    file.read(1)
                return Sample(time.perf_counter() - started).with_counts(mounted=mounted)
            finally:
                if mounted_at(place) is not None:
                    run(["umount" if os.geteuid() == 0 else "fusermount3", *_umount_options(), place])
                unmount(place)
                wait_until(lambda: mounted_at(place) is None, f"{place} is not mounted any more")
                place.rmdir()

        return work

    def nbd(source: Source) -> Callable[[], Sample]:
        def work() -> Sample:
            started = time.perf_counter()
            with pbsfs.nbd(source, PLAIN, data) as running:
                ready = time.perf_counter() - started
                client = NbdClient(running.socket)
                client.read(0, 1)
                seconds = time.perf_counter() - started
                client.close()
            return Sample(seconds).with_counts(ready=ready)

        return work

    def command(source: Source, *words: str) -> Callable[[], Sample]:
        name, *rest = words
        line: list[str | Path] = [PBSFS, name, *pbsfs.options(source, data), *rest]

        def work() -> Sample:
            ended = run(line, environment=pbsfs.environment(source))
            return Sample(ended.seconds).with_counts(processor=ended.cpu)

        return work

    listing = ("ls", str(PLAIN))
    manifest = ("cat", f"{PLAIN}/index.json")

    def beyond_login(name: str) -> Callable[[Round], float | None]:
        return lambda samples: (samples[name].seconds - samples[LOGIN].seconds) / 0.5

    return Plan(
        {
            "pbsfs mount, server": mount(server.with_password),
            "pbsfs mount, directory": mount(data.datastore),
            "pbsfs, nbdkit, server": nbd(server.with_password),
            "pbsfs, nbdkit, directory": nbd(data.datastore),
            "pbsfs ls of a snapshot, server": command(server.with_password, *listing),
            LISTING: command(data.datastore, *listing),
            "pbsfs cat of a manifest, server": command(server.with_password, *manifest),
            "pbsfs cat of a manifest, directory": command(data.datastore, *manifest),
            LOGIN: lambda: Sample(log_in(server.with_password)),
            "limit: Python that does nothing": lambda: Sample(run([sys.executable, "-c", "pass"]).seconds),
            "imports of pbsfs.cli.mount": lambda: _imports("import pbsfs.cli.mount"),
            "imports of nbd_bridge.py": lambda: _imports(NBD_IMPORTS),
        },
        [
            Goal(
                "mount of a server: seconds to the first byte beyond login / 0.5",
                beyond_login("pbsfs mount, server"),
                1.0,
                at_least=False,
            ),
            Goal(
                "mount of a directory: seconds to the first byte / 0.5",
                lambda s: s["pbsfs mount, directory"].seconds / 0.5,
                1.0,
                at_least=False,
            ),
            Goal(
                "nbdkit, server: seconds to the first byte beyond login / 0.5",
                beyond_login("pbsfs, nbdkit, server"),
            ),
            Goal(
                "a command that reads a directory: seconds / 0.15",
                lambda s: s[LISTING].seconds / 0.15,
                1.0,
                at_least=False,
            ),
        ],
    )


def _umount_options() -> list[str]:
    return [] if os.geteuid() == 0 else ["-u"]


CASES = (Case("start", "from `pbsfs mount`, or from nbdkit's start, to the first byte of an image", _start),)

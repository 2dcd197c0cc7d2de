"""Readers that read the same: every chunk should be fetched once."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from bench.data import NEWER, PLAIN
from bench.measures import BenchError, Sample, stop
from bench.plan import Bench, Case, Goal, Plan


def _side_by_side(commands: list[list[str]]) -> None:
    processes: list[subprocess.Popen[bytes]] = []
    try:
        processes += [subprocess.Popen(words, stdin=subprocess.DEVNULL) for words in commands]
        for process in processes:
            if process.wait(3600):
                raise BenchError(f"{process.args!r} failed")
    finally:
        for process in processes:
            stop(process)


def _dd(path: Path) -> list[str]:
    return ["dd", f"if={path}", "of=/dev/null", "bs=1M", "status=none"]


def _readers(bench: Bench, stack: ExitStack) -> Plan:
    data, pbsfs = bench.data, bench.pbsfs
    server = bench.server(stack)
    digests: set[bytes] = set()
    for snapshot in (PLAIN, NEWER):
        index = data.index(snapshot)
        digests |= {index.digest(number) for number in data.data_chunks}
    needed = {"one image": len(data.data_chunks), "two snapshots": len(digests)}

    def counted(what: str, size: int, work: Callable[[], object], measure: Callable[..., Sample]) -> Sample:
        server.counts()
        sample = measure(work, size=size)
        counts = server.counts()
        return sample.with_counts(
            **{"chunks fetched": counts.requests, "of them needed": needed[what], "the same one": counts.most}
        )

    def through_mount(what: str) -> Callable[[], Sample]:
        def run() -> Sample:
            with pbsfs.mounted(server, data) as mount:
                second = PLAIN if what == "one image" else NEWER
                # Past the kernel's page cache, which would answer the second reader of one image.
                commands = [[*_dd(mount.image(snapshot)), "iflag=direct"] for snapshot in (PLAIN, second)]
                return counted(
                    what, 2 * data.data_bytes, lambda: _side_by_side(commands), mount.watched.measure
                )

        return run

    def by_nbd() -> Sample:
        with pbsfs.nbd(server, PLAIN, data) as nbd:
            commands = [["nbdcopy", nbd.uri, "null:"]] * 2
            return counted(
                "one image", 2 * data.data_bytes, lambda: _side_by_side(commands), nbd.watched.measure
            )

    variants = {
        "pbsfs, mount, one image": through_mount("one image"),
        "pbsfs, mount, two snapshots": through_mount("two snapshots"),
        "pbsfs, NBD, one image": by_nbd,
    }
    return Plan(
        variants,
        [
            Goal(
                f"{name}: chunks fetched / different ones",
                lambda s, name=name: s[name].counts["chunks fetched"] / s[name].counts["of them needed"],  # type: ignore[misc]
                1.0,
                at_least=False,
            )
            for name in variants
        ],
    )


CASES = (
    Case(
        "sharing", "two readers side by side of one image, and of two snapshots that share chunks", _readers
    ),
)

"""Memory over a long time: how large the process is while it reads the image again and again."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import ExitStack

from bench.data import PLAIN
from bench.measures import GIB, MIB, Sample, Watched, memory_of, run
from bench.plan import Bench, Case, Goal, Plan

AMOUNT, QUICK_AMOUNT = 50 * GIB, 1 * GIB


def _long(bench: Bench, stack: ExitStack) -> Plan:
    data, pbsfs = bench.data, bench.pbsfs
    server = bench.server(stack)
    passes = max(5, (QUICK_AMOUNT if bench.quick else AMOUNT) // data.data_bytes)

    def again(watched: Watched, one_pass: Callable[[], object]) -> Sample:
        sizes: list[int] = []

        def work() -> None:
            for _ in range(passes):
                one_pass()
                sizes.append(sum(memory_of(pid, "VmRSS") for pid in watched.pids))

        sample = watched.measure(work, size=passes * data.data_bytes)
        # The first passes fill the cache and what the allocator keeps.
        return sample.with_counts(
            **{
                "MiB after a fifth": max(sizes[: passes // 5]) / MIB,
                "MiB at the end": max(sizes[-passes // 5 :]) / MIB,
            }
        )

    def through_mount() -> Sample:
        buffer = bytearray(MIB)
        with pbsfs.mounted(server, data) as mount:
            fd = os.open(mount.image(PLAIN), os.O_RDONLY)

            def one_pass() -> None:
                for number in data.data_chunks:
                    for part in range(4):
                        os.preadv(fd, [buffer], number * 4 * MIB + part * MIB)
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)  # or the kernel would answer next time

            try:
                return again(mount.watched, one_pass)
            finally:
                os.close(fd)

    def by_nbd() -> Sample:
        with pbsfs.nbd(server, PLAIN, data) as nbd:
            return again(nbd.watched, lambda: run(["nbdcopy", nbd.uri, "null:"]))

    variants = {"pbsfs, mount": through_mount, "pbsfs, nbdcopy": by_nbd}
    return Plan(
        variants,
        [
            Goal(
                f"{name}: size at the end / after a fifth",
                lambda s, name=name: s[name].counts["MiB at the end"] / s[name].counts["MiB after a fifth"],  # type: ignore[misc]
                1.05,
                at_least=False,
            )
            for name in variants
        ],
        once=True,
    )


CASES = (Case("memory", "50 GiB of data read from a server: whether the process grows", _long),)

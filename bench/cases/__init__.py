"""The benchmarks, by subject. `ALL` has every one, in the order in which they run."""

from __future__ import annotations

from bench.cases import (
    bucket,
    cores,
    directory,
    disk_cache,
    disks,
    export,
    files,
    growth,
    limits,
    memory,
    mount,
    nbd,
    random_reads,
    sharing,
    slow_link,
    start,
    tuning,
)
from bench.plan import Case

ALL: tuple[Case, ...] = (
    *limits.CASES,
    *export.CASES,
    *nbd.CASES,
    *mount.CASES,
    *files.CASES,
    *disks.CASES,
    *directory.CASES,
    *disk_cache.CASES,
    *random_reads.CASES,
    *sharing.CASES,
    *slow_link.CASES,
    *bucket.CASES,
    *start.CASES,
    *memory.CASES,
    *growth.CASES,
    *cores.CASES,
    *tuning.CASES,
)

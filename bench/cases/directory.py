"""A datastore directory as the source: nothing but decoding should take time."""

from __future__ import annotations

from contextlib import ExitStack

from bench.data import PLAIN
from bench.limits import copy_once, cores, decode, drop_page_cache, fill_page_cache, read_stored
from bench.measures import Sample
from bench.plan import Bench, Case, Goal, Plan, rate_of

DECODE = "limit: decode, all cores"
COPY = "limit: one copy of the image"
DIRECT = "pbsfs mount, dd bs=1M iflag=direct"


def _directory(bench: Bench, _stack: ExitStack) -> Plan:
    data, pbsfs = bench.data, bench.pbsfs

    def dd() -> Sample:
        with pbsfs.mounted(data.datastore, data) as mount:
            words = ["dd", f"if={mount.image(PLAIN)}", "of=/dev/null", "bs=1M", "status=none"]
            return mount.watched.command(words, size=data.data_bytes)

    def direct() -> Sample:
        with pbsfs.mounted(data.datastore, data) as mount:
            words = ["dd", f"if={mount.image(PLAIN)}", "of=/dev/null", "bs=1M", "status=none", "iflag=direct"]
            return mount.watched.command(words, size=data.data_bytes)

    def export() -> Sample:
        return pbsfs.export(data.datastore, data, PLAIN, "/dev/null")

    def cold(sample: Sample, how: str) -> Sample:
        return sample.with_counts(**{how: 1})

    return Plan(
        {
            "pbsfs export": export,
            "pbsfs mount, dd bs=1M": dd,
            DIRECT: direct,
            "pbsfs export, page cache dropped": lambda: cold(how=drop_page_cache(data), sample=export()),
            "pbsfs mount, dd bs=1M, page cache dropped": lambda: cold(how=drop_page_cache(data), sample=dd()),
            "limit: reading alone, page cache dropped": lambda: cold(
                how=drop_page_cache(data), sample=read_stored(data)
            ),
            "limit: dd of a hole of that size": lambda: fill_page_cache(data),
            DECODE: lambda: decode(data, PLAIN, cores()),
            COPY: lambda: copy_once(data),
        },
        [
            Goal("export: part of the decode limit", rate_of("pbsfs export", DECODE), 0.92),
            Goal("mount: part of the decode limit", rate_of("pbsfs mount, dd bs=1M", DECODE), 0.70),
            Goal("mount, iflag=direct: the same", rate_of(DIRECT, DECODE)),
            Goal(
                "mount, iflag=direct: (decode limit + one copy) / seconds",
                lambda s: (s[DECODE].seconds + s[COPY].seconds) / s[DIRECT].seconds,
                0.75,
            ),
            Goal(
                "export, page cache dropped: part of the decode limit",
                rate_of("pbsfs export, page cache dropped", DECODE),
                0.85,
            ),
            Goal(
                "mount, page cache dropped: part of the decode limit",
                rate_of("pbsfs mount, dd bs=1M, page cache dropped", DECODE),
                0.70,
            ),
        ],
    )


CASES = (
    Case(
        "directory", "a whole image from a datastore directory, with and without the page cache", _directory
    ),
)

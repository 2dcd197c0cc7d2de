"""What the machine and the server can do, by themselves."""

from __future__ import annotations

from contextlib import ExitStack

from bench.data import ENCRYPTED, PLAIN
from bench.limits import cores, decode, fresh_memory, parts, read_stored, receive, timed
from bench.measures import GIB, Sample, command
from bench.plan import Bench, Case, Plan


def _limits(bench: Bench, stack: ExitStack) -> Plan:
    data = bench.data
    server = bench.server(stack)

    def drained() -> Sample:
        return timed(lambda: receive(server.access, data), size=data.stored)

    def cat() -> Sample:
        return command(["cat", data.raw], size=data.image_bytes)

    return Plan(
        {
            "decode, one core": lambda: decode(data, PLAIN, 1),
            "decode, all cores": lambda: decode(data, PLAIN, cores()),
            "decode encrypted, all cores": lambda: decode(data, ENCRYPTED, cores()),
            "TLS alone, one connection": drained,
            "TLS alone, two connections": lambda: receive(server.access, data, connections=2),
            "stored chunks from the page cache": lambda: read_stored(data),
            "cat of the raw file": cat,
            "fresh memory, page by page": lambda: fresh_memory(GIB // 4),
            **{f"part: {name}": work for name, work in parts(data).items()},
        }
    )


CASES = (
    Case("limits", "what this machine can do at most: sizes are decoded, or of TLS stored bytes", _limits),
)

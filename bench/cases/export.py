"""`pbsfs export` from a server."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from contextlib import ExitStack

from bench.data import CHUNK, ENCRYPTED, PLAIN
from bench.limits import cores, decode, parts, receive, timed
from bench.measures import Sample
from bench.peers import client_restore, library_restore
from bench.plan import Bench, Case, Goal, Plan, Round, faster
from bench.program import Pbsfs
from bench.serving import RunningServer

EXPORT, SPARSE, SEALED = "pbsfs export", "pbsfs export, sparse file", "pbsfs export, encrypted"
DECODE, RECEIVE = "limit: decode, all cores", "limit: TLS alone"
WRITE = "limit: writing a file, nothing else"
CLIENT, LIBRARY = "vendor's restore", "vendor's library, parallel"
PARTS = ("CRC", "zstd", "SHA-256", "copy")


def both_cores_full(name: str, *, with_server: bool = False) -> Callable[[Round], float | None]:
    """Seconds, as a multiple of those in which all cores are busy with nothing but decoding and receiving,
    and with the server's work, which the same cores do here."""

    def ratio(samples: Round) -> float:
        cpu = (samples[DECODE].cpu or 0) + (samples[RECEIVE].cpu or 0)
        cpu += (samples[name].server_cpu or 0) if with_server else 0
        return samples[name].seconds / (cpu / cores())

    return ratio


def slower_limit(name: str) -> Callable[[Round], float | None]:
    return lambda samples: samples[name].seconds / max(samples[DECODE].seconds, samples[RECEIVE].seconds)


def _cpu_of_parts(samples: Round) -> float:
    sum_of_parts = sum(samples[f"part: {part}"].cpu or 0 for part in PARTS) + (samples[RECEIVE].cpu or 0)
    return (samples[EXPORT].cpu or 0) / sum_of_parts


def _cpu_per_gib(samples: Round) -> float:
    return (samples[EXPORT].cpu or 0) / (samples[EXPORT].size / (1 << 30))


def _to_file(bench: Bench, pbsfs: Pbsfs, server: RunningServer) -> Sample:
    dest = bench.scratch / "exported.img"
    try:
        return pbsfs.export(server, bench.data, PLAIN, dest)
    finally:
        dest.unlink(missing_ok=True)


def _write_alone(bench: Bench) -> Sample:
    """As many bytes written to a file where copies go, from memory."""
    dest = bench.scratch / "written.img"
    content = random.Random(7).randbytes(CHUNK)

    def work() -> None:
        with dest.open("wb", buffering=0) as file:
            for number in bench.data.data_chunks:
                os.pwrite(file.fileno(), content, number * CHUNK)
            os.fsync(file.fileno())

    try:
        return timed(work, size=bench.data.data_bytes)
    finally:
        dest.unlink(missing_ok=True)


def _export(bench: Bench, stack: ExitStack) -> Plan:
    data, pbsfs, peers = bench.data, bench.pbsfs, bench.peers
    server = bench.server(stack)
    variants: dict[str, Callable[[], Sample]] = {
        EXPORT: lambda: pbsfs.export(server, data, PLAIN, "/dev/null"),
        SPARSE: lambda: _to_file(bench, pbsfs, server),
        SEALED: lambda: pbsfs.export(server, data, ENCRYPTED, "/dev/null"),
        DECODE: lambda: decode(data, PLAIN, cores()),
        RECEIVE: lambda: receive(server.access, data),
        WRITE: lambda: _write_alone(bench),
        **{f"part: {name}": work for name, work in parts(data).items()},
    }
    if (client := peers.client) is not None:
        variants[CLIENT] = lambda: client_restore(client, pbsfs, server, data, PLAIN, "-")
    if (library := peers.library) is not None:
        variants[LIBRARY] = lambda: library_restore(library, pbsfs, server, data, PLAIN, 2 * cores())
    return Plan(
        variants,
        [
            Goal("times as fast as the vendor's restore", faster(EXPORT, CLIENT), 3.0),
            Goal("times as fast as the vendor's library, parallel", faster(EXPORT, LIBRARY), 1.25),
            Goal("seconds / those of the slower limit: decode on all cores, TLS alone", slower_limit(EXPORT)),
            Goal("seconds / (decode CPU + TLS CPU) over all cores", both_cores_full(EXPORT)),
            Goal(
                "seconds / (decode CPU + TLS CPU + the server's CPU) over all cores",
                both_cores_full(EXPORT, with_server=True),
                1.25,
                at_least=False,
            ),
            Goal("sparse file: seconds / those into nothing", faster(EXPORT, SPARSE)),
            Goal("encrypted: seconds / those of plain", faster(EXPORT, SEALED), 1.15, at_least=False),
            Goal(
                "CPU / sum of parts (TLS + CRC + zstd + SHA-256 + one copy)",
                _cpu_of_parts,
                1.5,
                at_least=False,
            ),
            Goal("CPU seconds for a GiB of data", _cpu_per_gib),
        ],
    )


CASES = (Case("export", "a whole image from a server, into nothing and into a sparse file", _export),)

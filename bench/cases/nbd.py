"""A whole image by NBD: nbdkit with the bridge, from a server."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from bench.data import PLAIN
from bench.limits import cores, decode, receive
from bench.measures import Sample
from bench.peers import c_plugin
from bench.plan import Bench, Case, Goal, Plan, faster
from bench.program import Nbd

MODEL = Path(__file__).resolve().parent.parent / "model_plugin.py"

COPY, CONVERT = "pbsfs, nbdcopy", "pbsfs, qemu-img convert"


def _whole(bench: Bench, stack: ExitStack) -> Plan:
    data, pbsfs = bench.data, bench.pbsfs
    server = bench.server(stack)
    size = data.data_bytes

    def copied(nbd: Nbd) -> Sample:
        return nbd.watched.command(["nbdcopy", nbd.uri, "null:"], size=size)

    def converted(nbd: Nbd) -> Sample:
        dest = bench.scratch / "converted.qcow2"
        try:
            return nbd.watched.command(
                ["qemu-img", "convert", "-f", "raw", "-O", "qcow2", nbd.uri, dest], size=size
            )
        finally:
            dest.unlink(missing_ok=True)

    # A new nbdkit each time: nothing is cached.
    def own(work: Callable[[Nbd], Sample]) -> Callable[[], Sample]:
        def run() -> Sample:
            with pbsfs.nbd(server, PLAIN, data) as nbd:
                return work(nbd)

        return run

    def model(work: Callable[[Nbd], Sample]) -> Callable[[], Sample]:
        def run() -> Sample:
            with pbsfs.nbd(server, PLAIN, data, python=MODEL) as nbd:
                return work(nbd)

        return run

    variants = {
        COPY: own(copied),
        CONVERT: own(converted),
        "model, nbdcopy": model(copied),
        "model, qemu-img convert": model(converted),
        "limit: decode, all cores": lambda: decode(data, PLAIN, cores()),
        "limit: TLS alone": lambda: receive(server.access, data),
    }
    plugin = bench.peers.c_plugin
    if plugin is not None:

        def peer(work: Callable[[Nbd], Sample]) -> Callable[[], Sample]:
            def run() -> Sample:
                with c_plugin(plugin, pbsfs, server, PLAIN) as nbd:
                    return work(nbd)

            return run

        variants |= {"C plugin, nbdcopy": peer(copied), "C plugin, qemu-img convert": peer(converted)}
    return Plan(
        variants,
        [
            Goal("nbdcopy: times as fast as the C plugin", faster(COPY, "C plugin, nbdcopy"), 2.5),
            Goal(
                "qemu-img: times as fast as the C plugin", faster(CONVERT, "C plugin, qemu-img convert"), 1.8
            ),
            Goal("nbdcopy: times as fast as the model of it", faster(COPY, "model, nbdcopy"), 2.5),
            Goal(
                "qemu-img: times as fast as the model of it", faster(CONVERT, "model, qemu-img convert"), 1.8
            ),
            Goal(
                "nbdcopy: seconds / those of decoding on all cores",
                lambda samples: samples[COPY].seconds / samples["limit: decode, all cores"].seconds,
            ),
        ],
    )


CASES = (
    Case("nbd", "a whole image by NBD from a server: nbdcopy into nothing, qemu-img into qcow2", _whole),
)

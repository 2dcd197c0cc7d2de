"""A whole image through a mount of a server."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack

from bench.data import PLAIN
from bench.limits import cores, decode, fill_page_cache, receive
from bench.measures import Sample, command
from bench.peers import client_map
from bench.plan import Bench, Case, Goal, Plan, faster

FILLED = "limit: dd of a hole of that size"
DIRECT = "pbsfs, dd bs=1M iflag=direct"
DD, SPARSE, CP = "pbsfs, dd bs=1M", "pbsfs, cp --sparse=always", "pbsfs, cp"


def _whole(bench: Bench, stack: ExitStack) -> Plan:
    data, pbsfs = bench.data, bench.pbsfs
    server = bench.server(stack)
    dest = bench.scratch / "copied.img"

    # A new mount each time: nothing is cached.
    def read(*words: str) -> Callable[[], Sample]:
        def run() -> Sample:
            with pbsfs.mounted(server, data) as mount:
                given = [word.replace("IMAGE", str(mount.image(PLAIN))) for word in words]
                try:
                    return mount.watched.command(given, size=data.data_bytes)
                finally:
                    dest.unlink(missing_ok=True)

        return run

    variants = {
        DD: read("dd", "if=IMAGE", "of=/dev/null", "bs=1M", "status=none"),
        DIRECT: read("dd", "if=IMAGE", "of=/dev/null", "bs=1M", "status=none", "iflag=direct"),
        SPARSE: read("cp", "--sparse=always", "IMAGE", str(dest)),
        CP: read("cp", "IMAGE", str(dest)),
        "limit: decode, all cores": lambda: decode(data, PLAIN, cores()),
        "limit: TLS alone": lambda: receive(server.access, data),
        FILLED: lambda: fill_page_cache(data),
    }
    client = bench.peers.client
    if client is not None:

        def mapped() -> Sample:
            with client_map(client, pbsfs, server, PLAIN) as device:
                return command(
                    ["dd", f"if={device}", "of=/dev/null", "bs=1M", "status=none"], size=data.data_bytes
                )

        variants["vendor's map, dd bs=1M"] = mapped
    return Plan(
        variants,
        [
            Goal("dd: times as fast as the vendor's map", faster(DD, "vendor's map, dd bs=1M"), 5.0),
            Goal(
                "dd: seconds / those of decoding on all cores",
                lambda samples: samples[DD].seconds / samples["limit: decode, all cores"].seconds,
            ),
            Goal(
                "dd: seconds / (decoding on all cores + dd of a hole of that size)",
                lambda s: s[DD].seconds / (s["limit: decode, all cores"].seconds + s[FILLED].seconds),
            ),
            Goal("cp --sparse=always: seconds / those of cp", lambda s: s[SPARSE].seconds / s[CP].seconds),
        ],
    )


CASES = (Case("mount", "a whole image through a mount of a server: dd, cp", _whole),)

"""Lists of many names leave the trio loop free for other tasks."""

from __future__ import annotations

import gc
from collections.abc import Awaitable, Callable
from typing import cast

import pytest
import trio

from pbsfs.base.errors import NotFoundError
from pbsfs.base.names import ROOT_NAMESPACE
from pbsfs.sources import layout
from pbsfs.sources.bucket.limits import DEFAULT
from pbsfs.sources.bucket.metadata import Metadata
from pbsfs.sources.bucket.objects import Objects
from pbsfs.sources.bucket.pages import StoredObject
from tests.support import made
from tests.support.made import TIME
from tests.support.steps import LIMIT, measured_steps

COUNT = 40_000
VM = made.snapshot().group


class ManyNames:
    """The objects of a datastore with a group of many snapshots, and many groups. None can be fetched."""

    root = "store/"
    address = "s3://bucket/store"

    def __init__(self) -> None:
        self.snapshots = [VM.snapshot(TIME + number) for number in range(COUNT)]
        above = [f"store/.cnt/{'/'.join(layout.snapshot_steps(snapshot))}/" for snapshot in self.snapshots]
        names = ("index.json.blob", "disk.img.fidx", "qemu-server.conf.blob")
        self.all = [StoredObject(f"{each}{name}", 5, "v") for each in above for name in names]
        self.below = {
            "store/.cnt/vm/": ["store/.cnt/vm/100/"],
            "store/.cnt/vm/100/": above,
            "store/.cnt/ct/": [f"store/.cnt/ct/{number}/" for number in range(100, 100 + COUNT // 40)],
        }

    async def list(self, prefix: str, *, delimited: bool) -> tuple[list[StoredObject], list[str]]:
        await trio.lowlevel.checkpoint()
        return ([], self.below.get(prefix, [])) if delimited else (self.all, [])

    async def get(self, key: str, _limit: int, _what: str) -> bytes:
        await trio.lowlevel.checkpoint()
        raise NotFoundError(key)

    async def exists(self, _key: str, _what: str) -> bool:
        await trio.lowlevel.checkpoint()
        return True

    async def any(self, _prefix: str) -> bool:
        return True


LISTS: dict[str, Callable[[Metadata], Awaitable[object]]] = {
    "snapshots": lambda metadata: metadata.snapshots(VM),
    "groups": lambda metadata: metadata.groups(ROOT_NAMESPACE),
}


@pytest.mark.parametrize("listing", LISTS.values(), ids=LISTS.keys())
def test_other_tasks_run_while_many_names_are_listed(
    listing: Callable[[Metadata], Awaitable[object]], caplog: pytest.LogCaptureFixture
) -> None:
    objects = ManyNames()  # before the steps are measured

    async def main() -> float:
        with measured_steps() as steps:
            await listing(Metadata(cast(Objects, objects), DEFAULT))
        return steps.longest

    gc.disable()  # a collection takes the longer the more the whole program has
    try:
        assert trio.run(main) < LIMIT
    finally:
        gc.enable()
    caplog.clear()

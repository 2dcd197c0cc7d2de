"""Walks through many directories: what is listed ahead."""

from __future__ import annotations

from dataclasses import replace

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from pbsfs.base.errors import SourceError
from pbsfs.base.names import Namespace
from pbsfs.tree.node import IN_ONE_GO
from pbsfs.tree.walk import AHEAD
from tests.support import made
from tests.support.made import DAY, TIME
from tests.support.run import in_trio
from tests.support.sources import MemorySource
from tests.tree.trees import (
    DAYS,
    FILES,
    directory,
    many_groups,
    names,
    shown,
    small_file,
)


@in_trio
async def test_groups_that_are_listed_in_order_are_listed_side_by_side() -> None:
    source, paths = many_groups()
    async with shown(source) as tree:
        groups = [await directory(tree, path) for path in paths]
        for group in groups[:2]:
            await group.children()
        assert source.calls["snapshots"] == 2
        gate = source.hold("snapshots")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(groups[2].children)
            await wait_all_tasks_blocked()
            assert source.calls["snapshots"] == 2 + AHEAD
            gate.set()
        for group in groups:
            assert DAYS[0].encode() in await group.children()
        assert source.calls["snapshots"] == len(groups)


@pytest.mark.parametrize("step", [-1, 0, AHEAD + 1])
@in_trio
async def test_groups_in_another_order_are_not_listed_ahead(step: int) -> None:
    source, paths = many_groups()
    async with shown(source) as tree:
        order = paths[::-1] if step < 0 else paths[::step] if step else [paths[0], paths[20], paths[3]]
        for path in order:
            await names(tree, path)
        assert source.calls["snapshots"] == len(order)


@in_trio
async def test_a_slow_walk_lists_nothing_that_goes_out_of_date_before_it_is_wanted() -> None:
    source, paths = many_groups()
    async with shown(source, refresh=5) as tree:
        for path in paths[:10]:
            await names(tree, path)
            await trio.sleep(5)
        assert source.calls["snapshots"] == 10


@in_trio
async def test_a_group_that_cannot_be_listed_ahead_says_so_when_it_is_wanted() -> None:
    source, paths = many_groups()
    async with shown(source) as tree:
        groups = [await directory(tree, path) for path in paths]
        for group in groups[:2]:
            await group.children()
        source.fail("snapshots", *[SourceError("no answer")] * AHEAD)
        with pytest.raises(SourceError, match="no answer"):
            await groups[2].children()
        for group in groups:
            assert await group.children()


@in_trio
async def test_namespaces_that_are_listed_in_order_are_listed_side_by_side() -> None:
    source = MemorySource()
    for number in range(20):
        source.add(made.snapshot(namespace=Namespace((f"n{number:02}",))), {})
    async with shown(source) as tree:
        for number in range(2):
            await names(tree, f"ns/n{number:02}")
        before = source.calls["groups"]
        await names(tree, "ns/n02")
        assert source.calls["groups"] == before + AHEAD


@in_trio
async def test_a_large_group_is_listed_without_holding_up_other_tasks() -> None:
    source = MemorySource(cheap_files=False)
    first = source.add(made.snapshot(), FILES)
    for number in range(20_000):
        snapshot = made.snapshot(time=TIME + number)
        source.infos[snapshot] = replace(first, snapshot=snapshot)
    turns = 0

    async def others() -> None:
        nonlocal turns
        while True:
            await trio.lowlevel.checkpoint()
            turns += 1

    async with shown(source) as tree, trio.open_nursery() as nursery:
        group = await directory(tree, "vm/100")
        nursery.start_soon(others)
        assert len(await group.children()) == 20_001
        nursery.cancel_scope.cancel()
    assert turns >= 20_000 // IN_ONE_GO


@in_trio
async def test_a_look_up_in_a_type_with_many_groups_makes_no_new_listing() -> None:
    source, paths = many_groups()
    async with shown(source) as tree:
        vm = await directory(tree, "vm")
        values = (await vm.children()).values_by_name
        await names(tree, paths[3])
        assert (await vm.children()).values_by_name is values


@in_trio
async def test_the_blobs_of_snapshots_that_are_looked_at_in_order_are_asked_for_side_by_side() -> None:
    source = MemorySource(cheap_files=False)
    for day in range(30):
        source.add(made.snapshot(time=TIME + day * DAY), {})
    async with shown(source) as tree:
        children = list((await (await directory(tree, "vm/100")).children()).values())
        manifests = [await small_file(tree, f"{node}/index.json") for node in children[:-1]]
        for manifest in manifests[:2]:
            assert (await manifest.stat()).exact
        assert source.calls["fetch_file"] == 2
        gate = source.hold("fetch_file")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(manifests[2].stat)
            await wait_all_tasks_blocked()
            assert source.calls["fetch_file"] == 2 + AHEAD
            gate.set()
        for manifest in manifests:
            assert (await manifest.stat()).exact
        assert source.calls["fetch_file"] == len(manifests)

"""Counting a store: from lists of groups alone, with a bound, and without what the user may not see."""

from __future__ import annotations

import pytest

from pbsfs.base.errors import ForbiddenError
from pbsfs.base.names import ROOT_NAMESPACE, Namespace
from pbsfs.tasks import totals
from pbsfs.tasks.totals import totals_of
from tests.support import made
from tests.support.run import in_trio
from tests.support.sources import MemorySource

DEEP = Namespace(("a", "b"))


def stocked() -> MemorySource:
    source = MemorySource()
    for night in range(3):
        source.add(made.snapshot("1", time=made.TIME + night * made.DAY), {"x.conf.blob": b"x"})
    source.add(made.snapshot("2", type="ct"), {"x.conf.blob": b"x"}, verify_state="failed")
    source.add(made.snapshot("3", namespace=Namespace(("a",))), {"x.conf.blob": b"x"})
    source.add(made.snapshot("4", namespace=DEEP), {"x.conf.blob": b"x"}, verify_state="ok")
    return source


@in_trio
async def test_counts_take_a_list_of_groups_for_each_namespace_and_no_more() -> None:
    source = stocked()
    found = await totals_of(source, ROOT_NAMESPACE)
    assert (found.namespaces, dict(found.groups), found.snapshots) == (2, {"vm": 3, "ct": 1}, 6)
    assert found.last_backup == made.TIME + 2 * made.DAY
    assert (found.hidden, found.is_cut, found.states) == (0, False, None)
    assert source.calls == {"namespaces": 3, "groups": 3}


@in_trio
async def test_a_part_is_counted_alone() -> None:
    source = stocked()
    assert (await totals_of(source, ROOT_NAMESPACE, backup_type="vm", below=False)).snapshots == 3
    assert (await totals_of(source, ROOT_NAMESPACE, own=False)).snapshots == 2
    assert (await totals_of(source, DEEP)).snapshots == 1


@in_trio
async def test_verify_states_are_counted_if_asked() -> None:
    source = stocked()
    found = await totals_of(source, ROOT_NAMESPACE, states=True)
    assert found.states == {"none": 4, "failed": 1, "ok": 1}
    assert source.calls["snapshots"] == 4


@in_trio
async def test_namespaces_that_the_user_may_not_list_are_counted_as_hidden() -> None:
    source = stocked()
    source.fail("groups", ForbiddenError("no"))
    found = await totals_of(source, ROOT_NAMESPACE)
    assert (found.hidden, found.snapshots) == (1, 2)


@in_trio
async def test_there_is_a_bound_and_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(totals, "MOST_NAMESPACES", 1)
    source = stocked()
    found = await totals_of(source, ROOT_NAMESPACE)
    assert found.is_cut
    assert source.calls["groups"] == 2

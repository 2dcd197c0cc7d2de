"""What a server notes about a garbage collection: JSON to a value."""

from __future__ import annotations

from typing import Any

import pytest

from pbsfs.base.errors import DamageError
from pbsfs.sources.collection import Collection, parse_collection
from tests.support.made import COLLECTION, TIME


def test_the_begin_is_in_the_id_of_the_task() -> None:
    assert parse_collection(COLLECTION) == Collection(TIME, 9000, 3000, 500, 2)
    assert parse_collection(COLLECTION | {"last-run-state": "OK"}).state == "OK"


def test_members_of_newer_servers_may_be_missing_and_unknown_ones_there() -> None:
    assert parse_collection({"upid": None, "cache-stats": {"hits": 1}}) == Collection(None, 0, 0, 0, 0)


@pytest.mark.parametrize(
    "data",
    [
        None,
        [],
        {"upid": "UPID:x"},
        {"upid": "UPID:pbs:0:0:0:nothex:garbage_collection:s:root@pam:"},
        {"upid": "UPID:pbs:0:0:0:FFFFFFFFFFFF:garbage_collection:s:root@pam:"},
        {"disk-bytes": -1},
        {"disk-bytes": True},
        {"still-bad": 1 << 63},
    ],
)
def test_what_is_not_a_status_is_refused(data: Any) -> None:
    with pytest.raises(DamageError):
        parse_collection(data)

"""What most tests of commands read: a datastore, and a server of it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.server import ReferenceServer
from tests.support.serving import serving
from tests.support.stocked import Stocked, stock


@pytest.fixture(scope="module")
def stocked(tmp_path_factory: pytest.TempPathFactory) -> Stocked:
    """A datastore that no test changes."""
    return stock(tmp_path_factory.mktemp("stocked") / "datastore")


@pytest.fixture
def server(stocked: Stocked) -> Iterator[ReferenceServer]:
    with serving(stocked.path) as found:
        yield found

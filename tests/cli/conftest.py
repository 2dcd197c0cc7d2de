"""What many tests of commands read from: a server."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.server import ReferenceServer
from tests.support.serving import serving
from tests.support.stocked import Stocked


@pytest.fixture
def server(stocked: Stocked) -> Iterator[ReferenceServer]:
    with serving(stocked.path) as found:
        yield found

"""Datastores, their mounts, and servers over them, for the promises of docs/semantics.md."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest

from tests.support.mounts import Mounted, mounted
from tests.support.server import ReferenceServer
from tests.support.serving import access, serving
from tests.support.stocked import Stocked


@pytest.fixture(scope="module")
def mount(stocked: Stocked, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mounted]:
    """Its mount, for tests that only look; nothing may be logged."""
    with mounted(stocked.path, tmp_path_factory.mktemp("mount") / "m") as found:
        yield found


@pytest.fixture
def server(own: Stocked) -> Iterator[ReferenceServer]:
    """A server over the test's own datastore."""
    with serving(own.path) as found:
        yield found


@pytest.fixture(params=["directory", "server"])
def mount_with_files(
    request: pytest.FixtureRequest, tmp_path: Path
) -> Callable[..., AbstractContextManager[Mounted]]:
    """Mounts a datastore from its directory or from a server, with `files`; its options follow."""

    @contextmanager
    def mounting(store: Path, *options: str) -> Iterator[Mounted]:
        if request.param == "directory":
            with mounted(store, tmp_path / "m", *options, files=True) as found:
                yield found
        else:
            with (
                serving(store) as server,
                mounted(access(server), tmp_path / "m", *options, files=True) as found,
            ):
                yield found

    return mounting

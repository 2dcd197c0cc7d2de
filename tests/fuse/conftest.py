"""Mounts of a datastore that are read from its directory, and from a server."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest

from tests.support.mounts import Mounted, mounted
from tests.support.serving import access, serving


@pytest.fixture(params=["directory", "server"])
def mount_with_files(
    request: pytest.FixtureRequest, tmp_path: Path
) -> Callable[..., AbstractContextManager[Mounted]]:
    """Mounts the datastore in a directory, with `files`; the options of the mount follow."""

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

"""What many tests of commands read from, or write to."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.needs import need_loop
from tests.support.program import output_of
from tests.support.server import ReferenceServer
from tests.support.serving import serving
from tests.support.stocked import Stocked


@pytest.fixture
def server(stocked: Stocked) -> Iterator[ReferenceServer]:
    with serving(stocked.path) as found:
        yield found


@pytest.fixture
def device(tmp_path: Path) -> Iterator[Path]:
    """A block device of 2 MiB that holds no zeros."""
    need_loop()
    (backing := tmp_path / "backing").write_bytes(b"\xff" * (2 << 20))
    name = output_of("losetup", "--find", "--show", str(backing)).strip()
    try:
        yield Path(name)
    finally:
        subprocess.run(["losetup", "--detach", name], check=True, timeout=30)

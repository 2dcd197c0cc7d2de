"""What the tests of the plugin say about their disks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.nbd import NbdError

MIB = 1 << 20
CHUNK = 1 << 16
LARGE_CHUNK = 4 * MIB
STRIPES = 1100

ONE = ("vmid=100", "timestamp=2023-11-14T22:13:20Z", "image=drive-scsi0.img")
"""The parameters for the image that every datastore here has."""


@dataclass(frozen=True)
class Disk:
    """A datastore with one image, `ONE`, and its content."""

    path: Path
    content: bytes


@contextmanager
def fails_with(number: int) -> Iterator[None]:
    """Checks that the server answers with this errno."""
    with pytest.raises(NbdError) as caught:
        yield
    assert caught.value.number == number

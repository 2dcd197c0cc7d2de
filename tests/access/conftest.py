"""Configuration files for the tests of what pbsfs reads in them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.access.files import Files


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Files:
    return Files(tmp_path, monkeypatch)

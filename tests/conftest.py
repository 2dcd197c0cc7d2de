"""Fixtures that all tests share, and the rule that a warning in the log fails a test."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from pbsfs.writer import DatastoreWriter
from tests.support import golden

pytest.register_assert_rewrite("tests.sources.conformance")

# The same examples in every run: a test that fails, fails for everybody.
settings.register_profile("pbsfs", derandomize=True, deadline=None, max_examples=100)
settings.load_profile("pbsfs")


# Whoever runs the tests may have a proxy, which none of them should use.
for variable in [name for name in os.environ if name.lower() in ("https_proxy", "all_proxy", "no_proxy")]:
    del os.environ[variable]

# Programs that tests start inherit what is ignored: under nohup none would end when its terminal does, and
# started in the background by a shell's script, none would end by Ctrl-C.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests on golden data are skipped without it; under CI its absence is an error, not a skip."""
    if golden.is_there():
        return
    if os.environ.get("CI"):
        raise pytest.UsageError(f"no golden data in {golden.ROOT}; CI has to have it (PBSFS_GOLDEN)")
    for item in items:
        if item.get_closest_marker("golden"):
            item.add_marker(pytest.mark.skip(reason=f"no golden data in {golden.ROOT} (PBSFS_GOLDEN)"))


@pytest.fixture(autouse=True)
def no_unexpected_warnings(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """A test that provokes a warning takes it out with `caplog.clear()` once it has looked at it."""
    yield
    unexpected = [r.getMessage() for r in caplog.get_records("call") if r.levelno >= logging.WARNING]
    assert not unexpected, f"logged unexpectedly: {unexpected}"


@pytest.fixture
def writer(tmp_path: Path) -> DatastoreWriter:
    """An empty datastore, and the means to fill it."""
    return DatastoreWriter(tmp_path / "datastore")

"""Fixtures that all tests share, and the rule that a warning in the log fails a test."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from pbsfs.testing.writer import DatastoreWriter
from tests.support import golden, watchdog
from tests.support.stocked import Stocked, stock

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


LONG = (
    "chunks/test_decoder.py",
    "chunks/test_sanitized.py",
    "cli/",
    "contents/test_hostile_archives.py",
    "disks/test_btrfs.py",
    "disks/test_ext_made.py",
    "disks/test_histories.py",
    "disks/test_host.py",
    "disks/test_iso.py",
    "disks/test_squashfs.py",
    "disks/test_xfs.py",
    "fuse/test_at_once.py",
    "fuse/test_attaching.py",
    "fuse/test_damage_policy.py",
    "fuse/test_file_handles.py",
    "fuse/test_interrupts.py",
    "fuse/test_mount.py",
    "fuse/test_mountpoint.py",
    "fuse/test_pages.py",
    "fuse/test_server_answers.py",
    "fuse/test_server_mount.py",
    "fuse/test_shim.py",
    "fuse/test_space.py",
    "fuse/test_watching.py",
    "machine/",
    "nbd/test_activation.py",
    "nbd/test_bridge.py",
    "nbd/test_failures.py",
    "nbd/test_launch.py",
    "nbd/test_life.py",
    "nbd/test_threads.py",
    "nbd/test_tools.py",
    "nbd/test_watching.py",
    "reader/test_check_order.py",
    "reader/test_damage.py",
    "reader/test_file_attacks.py",
    "reader/test_keys.py",
    "reader/test_latency.py",
    "reader/test_manifest_attacks.py",
    "runtime/test_process.py",
    "runtime/test_service.py",
    "semantics/",
    "server/",
    "sources/bucket/test_faults.py",
    "sources/bucket/test_gateway.py",
    "sources/bucket/test_many_names.py",
    "sources/bucket/test_pages.py",
    "sources/cached/test_store.py",
    "sources/server/test_answers.py",
    "sources/server/test_cost.py",
    "sources/server/test_faults.py",
    "sources/server/test_random.py",
    "sources/server/test_session.py",
    "sources/server/test_sessions.py",
    "sources/server/test_source.py",
    "tasks/test_copy",
    "tasks/test_extract.py",
    "tasks/test_in_place.py",
    "tasks/test_known.py",
    "tasks/test_verify.py",
    "test_bench.py",
    "test_damage_mount.py",
    "test_golden_formats.py",
    "test_golden_keys.py",
    "test_golden_mount.py",
    "test_package.py",
    "test_rough.py",
    "test_session.py",
)
"""Tests that mount, start programs or take long (paths below tests/): a run of none in particular leaves them
out."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--all",
        action="store_true",
        help="run all tests where none are named, not only those that need neither mounts nor programs",
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Chooses the quick tests where none were named, and looks for the golden data."""
    if config.args_source is pytest.Config.ArgsSource.TESTPATHS and not config.getoption("--all"):
        long = [item for item in items if _is_long(item)]
        config.hook.pytest_deselected(items=long)
        items[:] = [item for item in items if not _is_long(item)]
    _require_golden_data(items)


def _is_long(item: pytest.Item) -> bool:
    place = item.path.relative_to(Path(__file__).parent).as_posix()
    marked = (item.get_closest_marker(name) for name in ("golden", "long"))
    return place.startswith(LONG) or any(mark is not None for mark in marked)


def _require_golden_data(items: list[pytest.Item]) -> None:
    """Tests on golden data are skipped without it; under CI its absence is an error, not a skip."""
    if golden.is_there():
        return
    if os.environ.get("CI"):
        raise pytest.UsageError(f"no golden data in {golden.ROOT}; CI has to have it (PBSFS_GOLDEN)")
    for item in items:
        if item.get_closest_marker("golden"):
            item.add_marker(pytest.mark.skip(reason=f"no golden data in {golden.ROOT} (PBSFS_GOLDEN)"))


@pytest.fixture(autouse=True)
def time_for_what_is_shared() -> None:
    """What other tests started too has its time again."""
    watchdog.start_again()


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


@pytest.fixture(scope="module")
def stocked(tmp_path_factory: pytest.TempPathFactory) -> Stocked:
    """A datastore that no test changes."""
    return stock(tmp_path_factory.mktemp("stocked") / "datastore")


@pytest.fixture
def own(tmp_path: Path) -> Stocked:
    """A datastore of the test's own, to change."""
    return stock(tmp_path / "datastore")

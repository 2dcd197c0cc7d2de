"""The benchmark of the limits changes what exists, and the changes have an effect."""

from __future__ import annotations

import subprocess
import sys

import pytest

from bench.cases import tuning

SETTINGS = sorted(
    {
        f"{name}={value}"
        for cases in (tuning._NEAR, tuning._FAR)
        for changed in cases.values()
        for name, value in changed.items()
    }
)

LIMITS = """
import inspect
from bench.tuned import change
change("chunks.limits.fetch_budget=12345")
from pbsfs.chunks.store import ChunkStore
from pbsfs.reader.reader import open_reader
for made in (ChunkStore, open_reader):
    assert inspect.signature(made).parameters["limits"].default.fetch_budget == 12345
"""


@pytest.mark.parametrize("setting", SETTINGS)
def test_what_is_varied_exists(setting: str) -> None:
    program = f"from bench.tuned import change; change({setting!r})"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


def test_changed_limits_reach_what_uses_them() -> None:
    subprocess.run([sys.executable, "-c", LIMITS], check=True, timeout=60)

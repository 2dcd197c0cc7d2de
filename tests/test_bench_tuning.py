"""The benchmark of the tuning constants names constants that exist."""

from __future__ import annotations

import importlib

import pytest

from bench.cases import tuning

NAMES = sorted(
    {name for cases in (tuning._NEAR, tuning._FAR) for changed in cases.values() for name in changed}
)


@pytest.mark.parametrize("name", NAMES)
def test_a_constant_that_is_varied_exists(name: str) -> None:
    module, _dot, constant = name.rpartition(".")
    assert hasattr(importlib.import_module(f"pbsfs.{module}"), constant)

"""docs/semantics.md and the tests beside this one: each promise has a test, and each test a promise."""

from __future__ import annotations

import re
from pathlib import Path

DOCUMENT = Path(__file__).parents[2] / "docs" / "semantics.md"


def test_promises_and_tests_have_the_same_names() -> None:
    promises = re.findall(r"^- \*\*`(\w+)`\*\*:", DOCUMENT.read_text(), re.MULTILINE)
    modules = set(Path(__file__).parent.glob("test_*.py")) - {Path(__file__)}
    tests = [
        name
        for module in modules
        for name in re.findall(r"^(?:async )?def test_(\w+)\(", module.read_text(), re.MULTILINE)
    ]
    assert len(promises) == len(set(promises)) > 0
    assert sorted(promises) == sorted(tests)

"""The report of a verification: each path once, and one line for each file whatever its name."""

from __future__ import annotations

import pytest

from pbsfs.base.errors import DamageError
from pbsfs.reader.damage import Range
from pbsfs.tasks.hit import Hit
from pbsfs.tasks.report import Damage, Report

MANGLED = b"files/ct/1/d\xff\x1b/f\xfe\n"


@pytest.mark.parametrize(
    "start",
    [
        MANGLED.decode(errors="surrogateescape"),
        MANGLED.decode(errors="backslashreplace"),
        MANGLED.decode(errors="replace"),
        "files/ct/1/d\\xff\x1b/f\N{REPLACEMENT CHARACTER}\n",
    ],
)
def test_the_path_is_named_once_however_the_error_writes_it(start: str) -> None:
    damage = Damage.of(MANGLED, DamageError(f"{start}: wrong checksum"))
    assert damage.reason == "wrong checksum"
    assert Damage.of(MANGLED, DamageError(f"x{start}: wrong")).reason == f"x{start}: wrong"


def test_no_name_makes_a_line_of_its_own() -> None:
    forged = "x\ndamaged: vm/1: \x1b[31mall of it"
    hit = Hit()
    hit.paths.append(forged.encode())
    hit.count = 1
    hit.incomplete[forged.encode()] = forged
    report = Report(1, 2, 3, [Damage(forged, forged, [Range(0, 4)], hit)], {forged: forged}, {None: [forged]})
    lines = report.as_text().splitlines()
    assert len(lines) == 5
    assert all(line.isprintable() for line in lines)
    assert lines[0].startswith("damaged: x")
    assert lines[4] == "1 file, 2 chunks, 3 bytes read; 1 damaged, 1 not checked"
    assert report.as_json()["damaged"] == [
        {
            "path": forged,
            "reason": forged,
            "ranges": [{"offset": 0, "length": 4}],
            "files": [forged],
            "file_count": 1,
            "incomplete": [{"path": forged, "reason": forged}],
        }
    ]

"""docs/session.svg shows what the commands do."""

from __future__ import annotations

import re
import subprocess
import sys
import xml.etree.ElementTree
from pathlib import Path

from tests.support.needs import need_fuse

CHECKOUT = Path(__file__).resolve().parent.parent
PICTURE = CHECKOUT / "docs" / "session.svg"
TEXT = "{http://www.w3.org/2000/svg}text"


def lines(picture: str) -> list[str]:
    """The text of the picture, line by line, without the numbers that differ among versions of mke2fs."""
    found: dict[float, str] = {}
    for text in xml.etree.ElementTree.fromstring(picture).iter(TEXT):
        place = float(text.attrib["y"])
        found[place] = found.get(place, "") + "".join(text.itertext())
    return [re.sub(r"\d+(MiB| chunks| bytes)", r"…\1", found[place]) for place in sorted(found)]


def test_the_picture_is_what_the_commands_print(tmp_path: Path) -> None:
    need_fuse()
    made = tmp_path / "session.svg"
    subprocess.run([sys.executable, "-B", CHECKOUT / "packaging/session.py", made], check=True, timeout=120)
    assert lines(made.read_text()) == lines(PICTURE.read_text()), "run: .venv/bin/python packaging/session.py"


def test_the_picture_is_small_and_fetches_nothing() -> None:
    text = PICTURE.read_text()
    assert len(text.encode()) < 60_000
    assert not re.search(r"url\(|@import|href|<script|<image|https?:(?!//www\.w3\.org/2000/svg)", text)
    assert "prefers-color-scheme:dark" in text
    assert "$ pbsfs mount home: mnt" in lines(text)

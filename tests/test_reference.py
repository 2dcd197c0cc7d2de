"""docs/reference.md is what the code says."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parent.parent
DOCUMENT = CHECKOUT / "docs" / "reference.md"

OF_OTHERS = {
    "HOME": "what every program reads",
    "VIRTUAL_ENV": "nbdkit's plugin finds pbsfs by it, see nbd.md",
    "NOTIFY_SOCKET": "systemd sets it",
    "LISTEN_PID": "systemd sets it",
    "LISTEN_FDS": "systemd sets it",
    "LISTEN_FDNAMES": "systemd sets it",
}
"""Variables that no user sets for pbsfs, and why."""

NAME_OF_VARIABLE = re.compile(
    r"PBS(FS)?_[A-Z]+(_[A-Z]+)*|AWS(_[A-Z0-9]+)+|XDG_[A-Z]+_[A-Z]+|NO_COLOR|HOME|TMPDIR|VIRTUAL_ENV|CREDENTIALS_DIRECTORY"
    r"|(WAYLAND_)?DISPLAY|NOTIFY_SOCKET|LISTEN_[A-Z]+|[a-z]+_proxy|[A-Z]+_PROXY"
)


def names_in_code() -> Iterator[str]:
    for path in (CHECKOUT / "pbsfs").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            value = node.value if isinstance(node, ast.Constant) else None
            if isinstance(value, str) and NAME_OF_VARIABLE.fullmatch(value):
                yield value


def test_the_reference_is_what_the_code_says(tmp_path: Path) -> None:
    made = tmp_path / "reference.md"
    subprocess.run([sys.executable, "-B", CHECKOUT / "packaging/reference.py", made], check=True, timeout=60)
    assert made.read_text() == DOCUMENT.read_text(), "run: .venv/bin/python packaging/reference.py"


def test_every_variable_that_the_code_reads_is_in_the_reference() -> None:
    section = DOCUMENT.read_text().partition("## Environment variables")[2].partition("\n## ")[0]
    entries = re.findall(r"^- `([^`]+)`", section, re.MULTILINE)
    documented = {name for entry in entries for name in entry.split(", ")}
    found = set(names_in_code())
    assert documented >= {"PBS_PASSWORD", "XDG_CONFIG_HOME", "https_proxy"}
    assert found - documented == OF_OTHERS.keys()
    assert documented <= found


def test_every_mount_option_that_is_refused_or_kept_by_name_is_in_the_reference() -> None:
    text = DOCUMENT.read_text()
    section = text.partition("## Mount options")[2].partition("\n## ")[0]
    for option in ("allow_other", "uid=", "safe_names", "_netdev", "password-file=", "cache-size="):
        assert f"`{option}`" in section


def test_links_inside_the_reference_lead_to_its_sections() -> None:
    text = DOCUMENT.read_text()
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    anchors = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}
    links = re.findall(r"\]\(#([^)]+)\)", text)
    assert len(links) > 20
    assert set(links) <= anchors

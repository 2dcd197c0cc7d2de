"""The golden data: a datastore that the vendor's own server and client wrote. Never written to.

It lies beside the checkout, or where PBSFS_GOLDEN says. A clone without it skips what needs it; under
CI it has to be there.
"""

from __future__ import annotations

import json
import os
from base64 import b64decode
from dataclasses import dataclass
from pathlib import Path

from pbsfs.formats.keys import Key

ROOT = Path(os.environ.get("PBSFS_GOLDEN") or Path(__file__).parents[3] / "shared" / "golden")
DATASTORE = ROOT / "datastore"


@dataclass(frozen=True, slots=True)
class Original:
    """A file that was backed up: what it has to be when it is read back. `key`: its key's name, if any."""

    sha256: str
    size: int
    path: str
    crypt_mode: str
    key: str | None

    @property
    def encrypted(self) -> bool:
        return self.crypt_mode == "encrypt"


def is_there() -> bool:
    return (DATASTORE / ".chunks").is_dir()


def originals() -> list[Original]:
    """All originals; none where the golden data is missing (a test marked `golden` tells of that)."""
    if not is_there():
        return []
    rows = (line.split("\t") for line in (ROOT / "checksums.tsv").read_text().splitlines() if line)
    return [
        Original(sum_, int(size), path, mode, None if key == "-" else key)
        for sum_, size, path, mode, key in rows
    ]


def plain_key() -> Key:
    """The key that has no password."""
    return Key(b64decode(json.loads((ROOT / "keys" / "plain.json").read_text())["data"]))

"""What docs/semantics.md promises of signatures: a test for each promise, by its name."""

from __future__ import annotations

import errno
import json
import shutil
from base64 import b64encode
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pbsfs.base.names import MANIFEST
from pbsfs.formats import blob
from pbsfs.formats.manifest import CryptMode
from tests.support import damage, made, mounts
from tests.support.keyfiles import PASSWORD, key_file, keys_in
from tests.support.mounts import fails_with, mounted, read_at
from tests.support.needs import need_root
from tests.support.program import environment
from tests.support.stocked import (
    CHUNK,
    ENCRYPTED,
    SEALED,
    Stocked,
)

pytestmark = pytest.mark.mount


def change_manifest(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Changes the manifest of the snapshot in the directory `path`, as who does not have the key can."""
    file = path / MANIFEST.filename
    data = json.loads(blob.decode(file.read_bytes(), max_size=1 << 20, encrypted=False))
    change(data)
    damage.replace(file, blob.encode(json.dumps(data).encode()))


def test_a_manifest_that_was_changed_is_refused(own: Stocked, tmp_path: Path) -> None:
    group = (own.path / ENCRYPTED).parent.parent
    genuine = (own.path / ENCRYPTED).parent

    def drop(*names: str) -> Callable[[dict[str, Any]], object]:
        return lambda data: [data.pop(name) for name in names]

    changes: list[Callable[[dict[str, Any]], object]] = [
        drop("signature"),
        lambda data: data["files"][0].update(size=5),
        lambda data: data["files"][0].update({"crypt-mode": "none"}),
        lambda data: data.update({"backup-time": made.TIME + 1}),  # as it would have to be here
    ]
    copies = [group / f"2023-11-14T22:13:{30 + number}Z" for number in range(len(changes))]
    for copy, change in zip(copies, changes, strict=True):
        shutil.copytree(genuine, copy)
        change_manifest(copy, change)
    shutil.copytree(genuine, group / "2023-11-14T22:13:50Z")  # signed, but of another time
    names = [path.name for path in (*copies, group / "2023-11-14T22:13:50Z")]
    with mounted(own.path, tmp_path / "m", keys_in(tmp_path / "keys", key=made.KEY)) as mount:
        for name in names:
            path = mount / "vm/101" / name / "drive-scsi0.img"
            assert fails_with(errno.EIO, lambda p=path: p.open("rb")), name  # type: ignore[misc]
            assert any(name in line and "index.json" in line for line in mount.log_lines())
        assert (mount / ENCRYPTED).read_bytes() == SEALED


def test_an_index_that_was_swapped_is_refused(own: Stocked, tmp_path: Path) -> None:
    evil = made.image(6, "r0", tail=5)
    path = own.writer.add_snapshot(made.snapshot("999"), {"x.img.fidx": evil}, chunk_size=CHUNK)
    (own.path / f"{ENCRYPTED}.fidx").write_bytes((path / "x.img.fidx").read_bytes())
    signed = made.image(7, "rr")
    snapshot = made.snapshot("102")
    sealed = own.writer.add_snapshot(
        snapshot, {"x.img.fidx": signed}, crypt_mode=CryptMode.ENCRYPT, key=made.KEY, chunk_size=CHUNK
    )
    digest = made.KEY.digest(signed[:CHUNK])
    damage.replace(own.writer.chunk_path(digest), blob.encode(signed[:CHUNK]))
    assert sealed.is_dir()
    with mounted(own.path, tmp_path / "m", keys_in(tmp_path / "keys", key=made.KEY)) as mount:
        assert fails_with(errno.EIO, lambda: (mount / ENCRYPTED).open("rb"))
        image = mount / str(snapshot) / "x.img"
        assert fails_with(errno.EIO, lambda: read_at(image, 0, 10))
        assert read_at(image, CHUNK, 10) == signed[CHUNK:][:10]
        first, second = mount.log_lines()
        assert "checksum differs from the manifest" in first
        assert "not encrypted" in second


def test_what_another_key_signed_is_refused(own: Stocked, tmp_path: Path) -> None:
    signed = made.snapshot("102")
    files = {"x.img.fidx": made.image(7, "r")}
    own.writer.add_snapshot(signed, files, crypt_mode=CryptMode.SIGN_ONLY, key=made.KEY)
    with mounted(own.path, tmp_path / "m", keys_in(tmp_path / "keys", key=made.OTHER_KEY)) as mount:
        for path in (ENCRYPTED, f"{signed}/x.img"):
            assert fails_with(errno.EACCES, lambda p=path: (mount / p).open("rb"))  # type: ignore[misc]
        for path, content in own.contents.items():
            assert (mount / path).read_bytes() == content
        lines = mount.log_lines()
        assert len(lines) == 2
        assert all(made.KEY.fingerprint in line for line in lines)


def test_keys_stay_in_the_process(own: Stocked, tmp_path: Path) -> None:
    need_root("look into the process of a mount")
    (path := tmp_path / "key.json").write_bytes(key_file("scrypt"))
    log = tmp_path / "m.log"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mounts, "environment", lambda: environment(PBS_ENCRYPTION_PASSWORD=PASSWORD))
        with mounted(own.path, tmp_path / "m", f"--keyfile={path}", "--log-level", "debug") as mount:
            assert (mount / ENCRYPTED).read_bytes() == SEALED
            process = Path(f"/proc/{mount.pid}")
            seen = [(process / name).read_bytes() for name in ("cmdline", "environ")] + [log.read_bytes()]
            for secret in (PASSWORD.encode(), made.KEY.reveal(), made.KEY.reveal().hex().encode()):
                assert not any(secret in text for text in seen)
            assert b64encode(made.KEY.reveal()) not in b"".join(seen)
            line = (process / "limits").read_text().partition("Max core file size")[2]
            assert line.split()[:2] == ["0", "0"]
            mount.log_lines()

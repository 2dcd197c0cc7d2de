"""Backups that hold their own key, encrypted with a master key, and the files of master keys."""

from __future__ import annotations

from typing import Any

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from pbsfs.base.names import MANIFEST, MASTER_KEY_BLOB
from pbsfs.formats import blob, manifest
from pbsfs.formats.manifest import CryptMode, Manifest, ManifestFile
from pbsfs.testing.writer import DatastoreWriter
from tests.support import made

CONTENT = made.image(1, "r0t", tail=99)
"""The disk of the snapshot with a key."""


def pem(private: rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey, password: str | None = None) -> bytes:
    protection: Any = serialization.NoEncryption()
    if password is not None:
        protection = serialization.BestAvailableEncryption(password.encode())
    return private.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, protection)


def add_with_master_key(writer: DatastoreWriter, sealed: bytes) -> None:
    """A snapshot that is encrypted with `made.KEY`, as the vendor's client makes it: the key that is sealed
    with the master key is listed as encrypted, but is a plain blob."""
    snapshot = made.snapshot("106")
    files = {"drive-scsi0.img.fidx": CONTENT}
    path = writer.add_snapshot(
        snapshot, files, crypt_mode=CryptMode.ENCRYPT, key=made.KEY, chunk_size=1 << 16
    )
    stored = blob.encode(sealed)
    (path / MASTER_KEY_BLOB.filename).write_bytes(stored)
    listed = Manifest.parse(blob.decode((path / MANIFEST.filename).read_bytes(), max_size=1 << 20)).files
    own = ManifestFile(MASTER_KEY_BLOB, CryptMode.ENCRYPT, len(stored), blob.chunk_digest(stored, None))
    text = manifest.encode(
        backup_type="vm",
        backup_id="106",
        backup_time=snapshot.time,
        files=(*listed, own),
        unprotected={"key-fingerprint": made.KEY.fingerprint},
        key=made.KEY,
    )
    (path / MANIFEST.filename).write_bytes(blob.encode(text))

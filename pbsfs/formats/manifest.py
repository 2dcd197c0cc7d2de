"""Manifests: what a snapshot consists of.

`Manifest.parse` takes the decoded JSON of `index.json.blob`. It ignores unknown members, since newer servers
and clients add some, and checks strictly what matters for reading. Pure functions, for any thread.
"""

from __future__ import annotations

import enum
import hmac
import json
from dataclasses import dataclass, field
from typing import Any, NoReturn

from pbsfs.base.errors import DamageError, UsageError
from pbsfs.base.names import BACKUP_TYPES, Archive, is_safe_name
from pbsfs.formats.blob import DIGEST_SIZE
from pbsfs.formats.index import MAX_ARCHIVE_SIZE
from pbsfs.formats.keys import Key

MAX_MANIFEST_SIZE = 16 << 20
"""Most bytes of a decoded manifest; real ones have a few hundred."""


class CryptMode(enum.Enum):
    """How the client protects an archive's chunks."""

    NONE = "none"
    ENCRYPT = "encrypt"
    SIGN_ONLY = "sign-only"


@dataclass(frozen=True, slots=True)
class ManifestFile:
    """One archive of a snapshot.

    `size` and `csum` (32 bytes): of an index, the archive's bytes and the index's checksum; of a
    blob, the stored bytes and their SHA-256.
    """

    archive: Archive
    crypt_mode: CryptMode
    size: int
    csum: bytes


@dataclass(frozen=True, slots=True)
class Manifest:
    """A snapshot's manifest. `unknown`: names of files that this version of pbsfs can't read.

    `signature`: hex, as it is in the manifest. `signed`: what the signature covers, the canonical JSON of the
    manifest without the members `unprotected` and `signature`; empty if there is no signature.
    """

    backup_type: str
    backup_id: str
    backup_time: int
    files: tuple[ManifestFile, ...]
    key_fingerprint: str | None
    notes: str | None
    verify_state: str | None
    unknown: tuple[str, ...]
    signature: str | None = None
    signed: bytes = field(default=b"", repr=False)

    @property
    def needs_key(self) -> bool:
        """Whether the manifest says that the backup was made with a key."""
        modes = (file.crypt_mode for file in self.files)
        return bool(self.key_fingerprint or self.signature) or any(m is not CryptMode.NONE for m in modes)

    def is_signed_by(self, key: Key) -> bool:
        """Whether there is a signature, and it is that of this content under `key`."""
        if not (self.signature and self.signed):
            return False
        stored = self.signature.lower().encode(errors="replace")  # JSON can hold half a surrogate pair
        return hmac.compare_digest(stored, key.sign(self.signed).hex().encode())

    @classmethod
    def parse(cls, text: bytes) -> Manifest:
        """Raises DamageError if `text` is not a manifest."""
        try:
            data = json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=_members)
        except (ValueError, RecursionError) as error:
            raise DamageError(f"manifest is not JSON: {error}") from None
        if not isinstance(data, dict):
            raise DamageError("manifest is not a JSON object")
        unprotected = data.get("unprotected")
        if not isinstance(unprotected, dict):
            unprotected = {}
        verify = unprotected.get("verify_state")
        signature = data.get("signature")
        if signature is not None and not isinstance(signature, str):
            raise DamageError("manifest has no valid signature")
        files, unknown = _files(data.get("files"))
        backup_type, backup_id, backup_time = (data.get(f"backup-{part}") for part in ("type", "id", "time"))
        if backup_type not in BACKUP_TYPES:
            raise DamageError("manifest has no valid backup-type")
        if not (isinstance(backup_id, str) and is_safe_name(backup_id)):
            raise DamageError("manifest has no valid backup-id")
        return cls(
            backup_type=backup_type,
            backup_id=backup_id,
            backup_time=_integer(backup_time, "backup-time"),
            files=files,
            key_fingerprint=_optional_text(unprotected.get("key-fingerprint")),
            notes=_optional_text(unprotected.get("notes")),
            verify_state=_optional_text(verify.get("state")) if isinstance(verify, dict) else None,
            unknown=unknown,
            signature=signature,
            signed=_canonical(data) if signature is not None else b"",
        )


def encode(
    *,
    backup_type: str,
    backup_id: str,
    backup_time: int,
    files: tuple[ManifestFile, ...],
    unprotected: dict[str, Any],
    key: Key | None = None,
) -> bytes:
    """A manifest as JSON, signed if there is a key."""
    data: dict[str, Any] = {
        "backup-type": backup_type,
        "backup-id": backup_id,
        "backup-time": backup_time,
        "files": [
            {
                "filename": file.archive.filename,
                "crypt-mode": file.crypt_mode.value,
                "size": file.size,
                "csum": file.csum.hex(),
            }
            for file in files
        ],
        "unprotected": unprotected,
    }
    data["signature"] = key.sign(_canonical(data)).hex() if key is not None else None
    return json.dumps(data, sort_keys=True, indent=2).encode()


def _members(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    # With two members of one name, a signature could cover one, and a reader use the other.
    members = dict(pairs)
    if len(members) != len(pairs):
        raise ValueError("an object has a member twice")
    return members


def _canonical(data: dict[str, Any]) -> bytes:
    """What a signature covers: members sorted by name at every level, no white space.

    Unknown members are part of it. Empty if there is no canonical form; nothing is the signature of that.
    """
    signed = {name: value for name, value in data.items() if name not in ("unprotected", "signature")}
    try:
        _refuse_floats(signed)
        return json.dumps(signed, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    except (ValueError, RecursionError):
        return b""


def _refuse_floats(value: object) -> None:
    if isinstance(value, float):
        raise ValueError("a number that is not whole")  # noqa: TRY004 - of the JSON, not of an argument
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for part in value:
            _refuse_floats(part)


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _integer(value: object, what: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= MAX_ARCHIVE_SIZE:
        raise DamageError(f"manifest has no valid {what}")
    return value


def _optional_text(value: object) -> str | None:
    # JSON's escapes allow half a surrogate pair, which can be neither shown nor encoded.
    return value.encode(errors="replace").decode() if isinstance(value, str) else None


def _files(entries: object) -> tuple[tuple[ManifestFile, ...], tuple[str, ...]]:
    if not isinstance(entries, list):
        raise DamageError("manifest has no list of files")
    files: dict[str, ManifestFile] = {}
    unknown: list[str] = []
    for entry in entries:
        if not isinstance(entry, dict) or not isinstance(filename := entry.get("filename"), str):
            raise DamageError("manifest has a file without a name")
        try:
            archive = Archive(filename)
        except UsageError:
            unknown.append(filename)
            continue
        if filename in files:
            raise DamageError(f"manifest names {filename} twice")
        files[filename] = ManifestFile(
            archive,
            _crypt_mode(entry.get("crypt-mode"), filename),
            _integer(entry.get("size"), f"size of {filename}"),
            _checksum(entry.get("csum"), filename),
        )
    return tuple(files.values()), tuple(unknown)


def _crypt_mode(value: object, filename: str) -> CryptMode:
    if value is None:  # in very old backups
        return CryptMode.NONE
    try:
        return CryptMode(value)
    except ValueError:
        raise DamageError(f"manifest has no valid crypt-mode of {filename}") from None


def _checksum(value: object, filename: str) -> bytes:
    try:
        csum = bytes.fromhex(value) if isinstance(value, str) else b""
    except ValueError:
        csum = b""
    if len(csum) != DIGEST_SIZE:
        raise DamageError(f"manifest has no valid csum of {filename}")
    return csum

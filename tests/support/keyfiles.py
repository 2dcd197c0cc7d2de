"""Key files, made by hand from the format's description: independent of the parser under test."""

from __future__ import annotations

import json
from base64 import b64encode
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import GCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.pbkdf2 import PBKDF2HMAC
from cryptography.hazmat.primitives.kdf.scrypt import Scrypt

from pbsfs.formats.keys import Key

PASSWORD = "geh€im: staple"
HINT = "what the horse said"

SALT = bytes(range(200, 232))
IV = bytes(range(40, 56))

KINDS = ("none", "scrypt", "pbkdf2")

_KDFS: dict[str, Any] = {
    "none": None,
    "scrypt": {"Scrypt": {"n": 16, "r": 8, "p": 1, "salt": b64encode(SALT).decode()}},
    "pbkdf2": {"PBKDF2": {"iter": 10, "salt": b64encode(SALT).decode()}},
}


def document(
    kind: str = "none",
    *,
    key: bytes = bytes(range(32)),
    password: str = PASSWORD,
    fingerprint: str | None = None,
    hint: str | None = HINT,
    **changes: Any,
) -> dict[str, Any]:
    """A key file, which takes no time to unlock; with other members where `changes` has them.

    `kind`: of `KINDS`. `key`: its bytes, those of `made.KEY` unless told.
    """
    data = key
    if kind != "none":
        scrypt = Scrypt(salt=SALT, length=32, n=16, r=8, p=1)
        kdf = scrypt if kind == "scrypt" else PBKDF2HMAC(SHA256(), 32, SALT, 10)
        derived = kdf.derive(password.encode())
        encryptor = Cipher(AES(derived), GCM(IV)).encryptor()
        sealed = encryptor.update(key) + encryptor.finalize()
        data = IV + encryptor.tag + sealed
    whole = {
        "kdf": _KDFS[kind],
        "created": "2023-11-14T22:13:20+00:00",
        "modified": "2023-11-15T22:13:20+00:00",
        "data": b64encode(data).decode(),
    }
    optional = {"fingerprint": fingerprint, "hint": hint}
    return whole | {name: value for name, value in optional.items() if value is not None} | changes


def key_file(kind: str = "none", **changes: Any) -> bytes:
    """`document` as JSON."""
    return json.dumps(document(kind, **changes)).encode()


def keys_in(directory: Path, **keys: Key) -> str:
    """The option that gives some keys, which lie in `directory` after that."""
    directory.mkdir()
    for name, key in keys.items():
        (directory / f"{name}.json").write_bytes(key_file(key=key.reveal()))
    return f"--keyfile={directory}"

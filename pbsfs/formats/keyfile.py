"""Key files: an encryption key as proxmox-backup-client and Proxmox VE store it, mostly under a password.

JSON (format of `KeyConfig` in proxmox-backup's pbs-key-config). pbsfs limits how much time and memory a file
can make it spend on deriving the key from a password, which takes a moment on purpose. Pure functions, for
any thread; `KeyFile.unlock` belongs in a worker thread.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import json
from dataclasses import dataclass, field
from typing import Any

from pbsfs.base.errors import DamageError, PasswordError
from pbsfs.base.text import printable
from pbsfs.formats.keys import IV_SIZE, KEY_SIZE, TAG_SIZE, Key

MAX_KEY_FILE_SIZE = 64 << 10

MAX_SCRYPT_MEMORY = 512 << 20
"""Bytes that deriving a key may take: 128 · r · (n + p). Real files have n = 65536, r = 8, p = 1: 64 MiB."""

MAX_SCRYPT_WORK = 1 << 25
"""n · r · p at most: some seconds."""

MAX_ITERATIONS = 50_000_000
"""Rounds of PBKDF2 at most: some ten seconds. Real files have 65535."""


@dataclass(frozen=True, slots=True)
class _Scrypt:
    n: int
    r: int
    p: int
    salt: bytes

    name = "scrypt"

    def derive(self, password: bytes) -> bytes:
        memory = _scrypt_memory(self.n, self.r, self.p) + (1 << 20)
        return hashlib.scrypt(
            password, salt=self.salt, n=self.n, r=self.r, p=self.p, dklen=KEY_SIZE, maxmem=memory
        )

    def usable(self) -> bool:
        """Whether these are parameters of scrypt (RFC 7914, 2 and 6) that cost an acceptable amount."""
        n, r, p = self.n, self.r, self.p
        valid = n > 1 and n & (n - 1) == 0 and n.bit_length() - 1 < 16 * r
        return valid and _scrypt_memory(n, r, p) <= MAX_SCRYPT_MEMORY and n * r * p <= MAX_SCRYPT_WORK


@dataclass(frozen=True, slots=True)
class _Pbkdf2:
    iterations: int
    salt: bytes

    name = "pbkdf2"

    def derive(self, password: bytes) -> bytes:
        return hashlib.pbkdf2_hmac("sha256", password, self.salt, self.iterations, KEY_SIZE)


@dataclass(frozen=True, slots=True)
class KeyFile:
    """A parsed key file. `created`, `modified`, `fingerprint`, `hint`: as they are in the file, or None."""

    created: str | None
    modified: str | None
    fingerprint: str | None
    hint: str | None
    _kdf: _Scrypt | _Pbkdf2 | None = field(repr=False)
    _data: bytes = field(repr=False)

    @classmethod
    def parse(cls, text: bytes) -> KeyFile:
        """Raises DamageError if `text` is not a key file."""
        if len(text) > MAX_KEY_FILE_SIZE:
            raise DamageError("too long for a key file")
        try:
            data = json.loads(text)
        except (ValueError, RecursionError):
            if text.lstrip().startswith(b"-----BEGIN "):
                raise DamageError(
                    "not a key file but a PEM file; for a master key, use pbsfs key recover --master-key"
                ) from None
            raise DamageError("not a key file: not JSON") from None
        if not isinstance(data, dict) or "kdf" not in data:
            raise DamageError("not a key file: it has no 'kdf'")
        kdf = _parse_kdf(data["kdf"])
        content = _base64(data.get("data"), "data")
        expected = KEY_SIZE if kdf is None else IV_SIZE + TAG_SIZE + KEY_SIZE
        if len(content) != expected:
            raise DamageError(f"its 'data' has {len(content)} bytes, not {expected}")
        created, modified, fingerprint, hint = (
            _text(data.get(name)) for name in ("created", "modified", "fingerprint", "hint")
        )
        return cls(created, modified, fingerprint, hint, kdf, content)

    @property
    def protection(self) -> str:
        """`none`, `scrypt` or `pbkdf2`."""
        return "none" if self._kdf is None else self._kdf.name

    def unlock(self, password: bytes | None = None) -> Key:
        """The key. Raises PasswordError for a missing or wrong password, DamageError for a damaged file."""
        if self._kdf is None:
            key = Key(self._data)
        elif password is None:
            raise PasswordError("it needs a password")
        else:
            iv, tag, sealed = self._data[:IV_SIZE], self._data[IV_SIZE:-KEY_SIZE], self._data[-KEY_SIZE:]
            try:
                key = Key(Key(self._kdf.derive(password)).decrypt(iv, tag, sealed))
            except DamageError:
                hint = f" (hint: {self.hint})" if self.hint else ""
                raise PasswordError(f"wrong password{hint}") from None
        if self.fingerprint is not None and not hmac.compare_digest(
            self.fingerprint.lower().encode(), key.fingerprint.encode()
        ):
            raise DamageError(f"the key in it has the fingerprint {key.fingerprint}, not {self.fingerprint}")
        return key


def _scrypt_memory(n: int, r: int, p: int) -> int:
    return 128 * r * (n + p + 2)


def _parse_kdf(kdf: object) -> _Scrypt | _Pbkdf2 | None:
    if kdf is None:
        return None
    if isinstance(kdf, dict) and len(kdf) == 1:
        name, values = next(iter(kdf.items()))
        if name == "Scrypt" and isinstance(values, dict):
            n, r, p = (_number(values, part) for part in ("n", "r", "p"))
            scrypt = _Scrypt(n, r, p, _base64(values.get("salt"), "salt"))
            if not scrypt.usable():
                raise DamageError(f"its scrypt parameters n={n}, r={r}, p={p} cost too much or are invalid")
            return scrypt
        if name == "PBKDF2" and isinstance(values, dict):
            iterations = _number(values, "iter")
            if iterations > MAX_ITERATIONS:
                raise DamageError(f"its {iterations} rounds of PBKDF2 are too many")
            return _Pbkdf2(iterations, _base64(values.get("salt"), "salt"))
    raise DamageError("its kind of password protection is unknown; pbsfs knows scrypt and PBKDF2")


def _number(values: dict[str, Any], name: str) -> int:
    value = values.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= 1 << 40:
        raise DamageError(f"it has no valid '{name}'")
    return value


def _base64(value: object, name: str) -> bytes:
    try:
        return base64.b64decode(value if isinstance(value, str) else "*", validate=True)
    except (binascii.Error, ValueError):
        raise DamageError(f"it has no valid '{name}'") from None


def _text(value: object) -> str | None:
    """A text that is safe to show: one line, and nothing that a terminal would obey."""
    if not isinstance(value, str):
        return None
    return printable(value)

"""An encryption key: it decrypts blobs, and is part of the digest of every chunk that it encrypts.

Immutable and usable from any thread. `repr` shows the fingerprint, never key material.
"""

from __future__ import annotations

import functools
import hashlib
import hmac
import secrets
from typing import TYPE_CHECKING

from pbsfs.base.errors import DamageError

if TYPE_CHECKING:
    from hashlib import _Hash as Sha256

    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

KEY_SIZE = 32
IV_SIZE = 16
TAG_SIZE = 16

_ID_KEY_SALT = b"_id_key"
_ID_KEY_ITERATIONS = 10
_FINGERPRINT_INPUT = hashlib.sha256(b"Proxmox Backup Encryption Key Fingerprint").digest()


class Key:
    """A 32-byte AES-256 key, and what pbsfs derives from it.

    Source of the derivations: `CryptConfig` of proxmox-backup's pbs-tools.
    """

    def __init__(self, enc_key: bytes) -> None:
        if len(enc_key) != KEY_SIZE:
            raise DamageError(f"an encryption key has {KEY_SIZE} bytes, not {len(enc_key)}")
        self._enc_key = enc_key
        self._id_key = hashlib.pbkdf2_hmac("sha256", enc_key, _ID_KEY_SALT, _ID_KEY_ITERATIONS, KEY_SIZE)

    @functools.cached_property
    def _cipher(self) -> AESGCM:
        # Imported late: importing `cryptography` takes longer than most commands.
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM  # noqa: PLC0415

        return AESGCM(self._enc_key)

    def reveal(self) -> bytes:
        """The key itself, to hand over to another pbsfs process or to write to a key file."""
        return self._enc_key

    def reveal_all(self) -> tuple[bytes, bytes]:
        """The key itself and the one that ends what a digest covers, for the C decoder."""
        return self._enc_key, self._id_key

    def sign(self, data: bytes) -> bytes:
        """The signature (32 bytes) of `data` under this key."""
        return hmac.digest(self._id_key, data, "sha256")

    def digest(self, data: bytes | memoryview) -> bytes:
        """The digest (32 bytes) of a chunk whose decoded content is `data`."""
        return self.finish(hashlib.sha256(data))

    def finish(self, hashed: Sha256) -> bytes:
        """The digest (32 bytes) of a chunk whose decoded content `hashed` has; `hashed` stays as it is."""
        state = hashed.copy()
        state.update(self._id_key)
        return state.digest()

    @functools.cached_property
    def fingerprint(self) -> str:
        """The key's public name: 32 hex pairs with colons between them."""
        return self.digest(_FINGERPRINT_INPUT).hex(":")

    def decrypt(self, iv: bytes, tag: bytes, data: bytes | memoryview) -> bytes:
        """Authenticated decryption. Raises DamageError if the tag does not match."""
        from cryptography.exceptions import InvalidTag  # noqa: PLC0415

        try:
            return self._cipher.decrypt(iv, b"".join((data, tag)), None)
        except InvalidTag:
            raise DamageError("decryption failed: damaged data or a wrong key") from None

    def encrypt(self, data: bytes) -> tuple[bytes, bytes, bytes]:
        """The inverse of `decrypt`, under a fresh random IV: (iv, tag, ciphertext)."""
        iv = secrets.token_bytes(IV_SIZE)
        sealed = self._cipher.encrypt(iv, data, None)
        return iv, sealed[-TAG_SIZE:], sealed[:-TAG_SIZE]

    def __repr__(self) -> str:
        return f"Key({self.fingerprint[:23]}…)"

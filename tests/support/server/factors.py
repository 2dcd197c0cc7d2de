"""Second factors: the challenge that a login gets, what answers it, and when an account is locked.

Restated from proxmox-tfa as proxmox-backup 3.2 to 4.2 use it (src/api/mod.rs, src/totp.rs): a code of the
authenticator app is good for its 30 seconds and those before and after, and once; a recovery code is good
once. Eight wrong codes in a row lock the app's codes until a recovery code is used, a hundred wrong answers
lock all for an hour. Safe to use from any thread, as one request answers at a time.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Sequence
from typing import Any

from tests.support.server.clock import Clock

TOTP_LIMIT = 8
"""Wrong codes after which the codes of the app are locked."""

LIMIT = 100
LOCK_TIME = 3600

_STEP = 30
_DIGITS = 6


class Factors:
    """The second factors of one user. `recovery`: codes, as `0123-4567-89ab-cdef`; None for no such list."""

    def __init__(
        self,
        clock: Clock,
        *,
        totp: bool = True,
        recovery: Sequence[str] | None = None,
        webauthn: bool = False,
    ) -> None:
        self._clock = clock
        self._secret = secrets.token_bytes(20) if totp else None
        self._recovery: list[str | None] | None = None if recovery is None else list(recovery)
        self._webauthn = webauthn
        self._last_step = -1
        self._failures = 0
        self._totp_failures = 0
        self.totp_locked = False
        self.locked_until = 0

    def code(self, steps: int = 0) -> str:
        """What the authenticator app shows now; `steps`: so many codes later."""
        assert self._secret is not None
        return self._code(self._clock.now() // _STEP + steps)

    def challenge(self) -> dict[str, Any]:
        """What the partial ticket says of them; what a user lacks is left out."""
        found: dict[str, Any] = {"totp": True} if self._secret is not None else {}
        if self._recovery is not None:
            found["recovery"] = [number for number, code in enumerate(self._recovery) if code is not None]
        if self._webauthn:
            challenge = {"challenge": secrets.token_urlsafe(32), "timeout": 60000, "allowCredentials": []}
            found["webauthn"] = {"publicKey": challenge}
        return found

    def accept(self, response: str) -> bool:
        """Whether `response` answers the challenge: `totp:…` or `recovery:…`."""
        kind, _colon, value = response.partition(":")
        if self._clock.now() < self.locked_until or (kind == "totp" and self.totp_locked):
            return False
        if self._is_right(kind, value):
            self._failures = 0
            return True
        self._failures += 1
        self.totp_locked = self.totp_locked or (kind == "totp" and self._totp_failures >= TOTP_LIMIT)
        if self._failures >= LIMIT:
            self.locked_until = self._clock.now() + LOCK_TIME
        return False

    def _is_right(self, kind: str, value: str) -> bool:
        if kind == "recovery" and self._recovery is not None and value in self._recovery:
            self._recovery[self._recovery.index(value)] = None
            self.totp_locked, self._totp_failures, self.locked_until = False, 0, 0
            return True
        if kind == "totp" and self._secret is not None:
            now = self._clock.now() // _STEP
            step = next((at for at in (now - 1, now, now + 1) if self._code(at) == value), -1)
            if step > self._last_step:
                self._last_step, self._totp_failures = step, 0
                return True
            self._totp_failures += 1
        return False

    def _code(self, step: int) -> str:
        """RFC 6238, with SHA-1."""
        assert self._secret is not None
        digest = hmac.new(self._secret, step.to_bytes(8, "big"), hashlib.sha1).digest()
        at = digest[-1] & 15
        number = int.from_bytes(digest[at : at + 4], "big") & 0x7FFFFFFF
        return f"{number % 10**_DIGITS:0{_DIGITS}}"

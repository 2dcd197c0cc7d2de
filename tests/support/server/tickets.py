"""Tickets: what a login hands out, and what a cookie has to hold.

`PBS:<user>:<time in hex>::<signature>`, the time being when it was issued. A user with a second
factor gets a partial ticket, which opens nothing. Texts and limits are those of proxmox-backup 3.2.4.
Safe to use from any thread.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import re
import secrets
from base64 import b64encode
from typing import Any
from urllib.parse import quote, unquote

from tests.support.server.clock import Clock

LIFETIME = 7200
"""Seconds that a ticket lives."""

PARTIAL_LIFETIME = 600
"""Seconds in which a challenge has to be answered."""

_PARTIAL_SKEW = 60
_CLOCK_SKEW = 300  # seconds that a ticket may come from the future

_SIGNATURE_SIZE = 256  # bytes, as an RSA key of 2048 bits makes them

PARTIAL = "!tfa!"


class TicketError(Exception):
    """A ticket that is not accepted. The text is the server's."""


class Tickets:
    """Issues and checks tickets with a secret of its own: those of another server are not valid."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._secret = secrets.token_bytes(32)

    def issue(self, user: str) -> str:
        return self._sign("PBS:" + quote(user, safe="@!/+ "))

    def issue_partial(self, user: str, challenge: dict[str, Any]) -> str:
        """The ticket of somebody whose password was right, and who has to answer a challenge."""
        text = PARTIAL + json.dumps(challenge, separators=(",", ":"))
        return self._sign("PBS:" + text.replace(":", "%3A"), bound_to=user)

    def is_partial(self, ticket: str, user: str) -> bool:
        """Whether it is a partial ticket of `user` that may still be answered."""
        signed, _separator, signature = ticket.partition("::")
        content, _, issued = signed.rpartition(":")
        if not content.startswith(f"PBS:{PARTIAL}") or re.fullmatch("[0-9A-F]{8}", issued) is None:
            return False
        if not -_PARTIAL_SKEW <= self._clock.now() - int(issued, 16) <= PARTIAL_LIFETIME:
            return False
        return hmac.compare_digest(signature.encode(), self._signature(signed + user).encode())

    def csrf_token(self, user: str) -> str:
        now = f"{self._clock.now():08X}"
        return f"{now}:{self._signature(f'csrf {now} {user}')[:43]}"

    def user_of(self, ticket: str) -> str:
        """Whose ticket it is. Raises TicketError."""
        signed, separator, signature = ticket.partition("::")
        prefix, _, rest = signed.partition(":")
        content, _, issued = rest.rpartition(":")
        if not separator:
            raise TicketError("ticket without signature separator")
        if prefix != "PBS":
            raise TicketError("ticket with invalid prefix")
        try:
            age = self._clock.now() - int(issued, 16)
        except ValueError:
            raise TicketError("ticket with invalid timestamp") from None
        if age < -_CLOCK_SKEW:
            raise TicketError("invalid ticket - timestamp newer than expected")
        if age > LIFETIME:
            raise TicketError("invalid ticket - expired")
        if unquote(content).startswith(PARTIAL):
            raise TicketError("access denied - second login factor required")
        if not hmac.compare_digest(signature.encode(), self._signature(signed).encode()):
            raise TicketError("ticket with invalid signature")
        return unquote(content)

    def _sign(self, content: str, *, bound_to: str = "") -> str:
        signed = f"{content}:{self._clock.now():08X}"
        return f"{signed}::{self._signature(signed + bound_to)}"

    def _signature(self, signed: str) -> str:
        made = hashlib.shake_256(self._secret + signed.encode()).digest(_SIGNATURE_SIZE)
        return b64encode(made).decode().rstrip("=")

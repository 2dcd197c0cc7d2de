"""The challenge that a server answers a login with if the user has second factors, and what answers it.

The ticket is partial then: `PBS:!tfa!CHALLENGE:TIME::SIGNATURE`, CHALLENGE being JSON in which `%3A` stands
for a colon. The source of the format and of the answers is proxmox-login (src/ticket.rs, src/tfa.rs) and
proxmox-tfa (src/api/mod.rs). Used by `login`, and by `pbsfs.access.login`, which asks the user. Pure.
"""

from __future__ import annotations

import json
import re
import urllib.parse
from dataclasses import dataclass, field
from typing import Self

from pbsfs.base.errors import AuthError
from pbsfs.base.secret import Secret

_PARTIAL = re.compile(r"PBS:!tfa!([^:]*):")

_CODE = re.compile(r"[0-9]{6,8}", re.ASCII)
"""A code of an authenticator app (TOTP). The server's have 6 digits; it accepts keys with up to 8."""

_RECOVERY = re.compile(r"([0-9a-f]{4})-?([0-9a-f]{4})-?([0-9a-f]{4})-?([0-9a-f]{4})", re.ASCII)


@dataclass(frozen=True, slots=True)
class Challenge:
    """`ticket`: the partial ticket. `totp`, `recovery`: what of that the user has, and may answer with."""

    ticket: Secret = field(repr=False)
    totp: bool
    recovery: bool

    @classmethod
    def of(cls, ticket: str) -> Challenge | None:
        """The challenge in a ticket; None for a full ticket. One that makes no sense offers nothing."""
        if not ticket.startswith("PBS:!tfa!"):
            return None
        found = _PARTIAL.match(ticket)
        try:
            offered = json.loads(urllib.parse.unquote(found[1])) if found else {}
        except (ValueError, RecursionError):
            offered = {}
        if not isinstance(offered, dict):
            offered = {}
        recovery = offered.get("recovery")
        return cls(
            Secret(ticket),
            totp=offered.get("totp") is True,
            recovery=isinstance(recovery, list) and bool(recovery),
        )

    @property
    def kinds(self) -> str:
        """What a user may type, for a question; empty if that is nothing: other factors need a browser."""
        kinds = {"code of the authenticator app": self.totp, "recovery code": self.recovery}
        return " or ".join(kind for kind, offered in kinds.items() if offered)

    def response(self, typed: str) -> Secret | None:
        """The answer that the server expects for what the user typed; None if it has no form of one."""
        text = "".join(typed.split()).lower()
        if self.totp and _CODE.fullmatch(text):
            return Secret(f"totp:{text}")
        if self.recovery and (parts := _RECOVERY.fullmatch(text)):
            return Secret(f"recovery:{'-'.join(parts.groups())}")
        return None


class SecondFactorError(AuthError):
    """The password is right, and the login needs a second factor, which the answer to `challenge` gives."""

    challenge: Challenge

    @classmethod
    def of(cls, user: str, challenge: Challenge) -> Self:
        token = "create an API token for this user on the server and use that"  # noqa: S105 - advice
        if challenge.kinds:
            advice = f"run pbsfs login at a terminal, or {token}"
        else:
            advice = f"pbsfs cannot answer it, since it needs a browser (WebAuthn): {token}"
        error = cls(f"{user} logs in with a second factor; {advice}")
        error.challenge = challenge
        return error

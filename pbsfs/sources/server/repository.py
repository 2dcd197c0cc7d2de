"""The repository string: which server, as whom, and which datastore.

`[[user@realm[!token]@]host[:port]:]datastore`, as proxmox-backup-client has it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from pbsfs.errors import UsageError

DEFAULT_USER = "root@pam"
DEFAULT_HOST = "localhost"
DEFAULT_PORT = 8007

_STORE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*", re.ASCII)
_USER = re.compile(r"[^\s:/\x00-\x1f\x7f]+@[A-Za-z0-9_][A-Za-z0-9._-]*")
_TOKEN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*", re.ASCII)
_HOST = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9._-]*[A-Za-z0-9_.])?", re.ASCII)
_ADDRESS6 = re.compile(r"[0-9A-Fa-f:.]+(?:%[A-Za-z0-9._-]+)?", re.ASCII)
_FORM = "they look like user@realm!token@host:8007:datastore, or host:datastore"


@dataclass(frozen=True, slots=True)
class Repository:
    """`host` has no brackets. `token` is the token's name; None for a user with a password."""

    user: str
    token: str | None
    host: str
    port: int
    store: str

    @classmethod
    def parse(cls, text: str) -> Repository:
        """Raises UsageError where `text` is no repository."""
        if ":" in text.rpartition("@")[0]:  # not shown: it is a password, most likely
            raise UsageError(
                f"a repository has no ':' before its '@': a password belongs in PBS_PASSWORD; {_FORM}"
            )
        rest, colon, store = text.rpartition(":")
        if not _STORE.fullmatch(store):
            raise UsageError(f"'{text}' is not a repository: no valid datastore at its end; {_FORM}")
        if not colon:
            return cls(DEFAULT_USER, None, DEFAULT_HOST, DEFAULT_PORT, store)
        auth, at, place = rest.rpartition("@")
        user, token = _parse_auth(auth, text) if at else (DEFAULT_USER, None)
        host, port = _parse_place(place, text)
        return cls(user, token, host, port, store)

    @property
    def auth_id(self) -> str:
        """Who logs in: `user@realm` or `user@realm!token`."""
        return self.user if self.token is None else f"{self.user}!{self.token}"

    @property
    def realm(self) -> str:
        return self.user.rpartition("@")[2]

    @property
    def address(self) -> str:
        """`host:port`, with brackets where they are needed."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    def __str__(self) -> str:
        """The whole repository string; it holds no secret."""
        return f"{self.auth_id}@{self.address}:{self.store}"


def _parse_auth(auth: str, text: str) -> tuple[str, str | None]:
    name, _at, rest = auth.rpartition("@")  # names of users may hold both signs
    realm, bang, token = rest.partition("!")
    user = f"{name}@{realm}"
    if not _USER.fullmatch(user):
        raise UsageError(f"'{text}' is not a repository: '{user}' is not user@realm; {_FORM}")
    if bang and not _TOKEN.fullmatch(token):
        raise UsageError(f"'{text}' is not a repository: '{token}' is not a token's name; {_FORM}")
    if bang and not user.isascii():
        raise UsageError(f"'{text}': servers take no token of a user whose name is not plain ASCII")
    return user, token if bang else None


def _parse_place(place: str, text: str) -> tuple[str, int]:
    if place.startswith("["):
        host, bracket, port = place[1:].partition("]")
        valid = bool(bracket) and _ADDRESS6.fullmatch(host) is not None and (not port or port.startswith(":"))
        port = port.removeprefix(":") if port else str(DEFAULT_PORT)
    else:
        host, colon, port = place.partition(":")
        valid = _HOST.fullmatch(host) is not None
        port = port if colon else str(DEFAULT_PORT)
    if not valid:
        raise UsageError(f"'{text}' is not a repository: '{place}' is not a host; {_FORM}")
    if not (port.isascii() and port.isdigit() and len(port) <= 5 and 0 < int(port) < 65536):
        raise UsageError(f"'{text}' is not a repository: '{port}' is not a port; {_FORM}")
    return host, int(port)

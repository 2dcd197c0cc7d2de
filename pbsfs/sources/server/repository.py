"""A repository: the server, the user or token, and the datastore.

`[[user@realm[!token]@]host[:port]:]datastore`, as for proxmox-backup-client. Used by `pbsfs.access`, which
parses it, and by all of this folder. Pure; from any thread.
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass, replace

from pbsfs.base.errors import UsageError
from pbsfs.base.text import excerpt
from pbsfs.sources.http.peer import Kind, address_of

MAX_LENGTH = 512
"""Characters of a repository at most: of a user and token the server takes 64, of a host's name DNS 253, of a
datastore's name the server 32."""

PBS = Kind(
    name="a Proxmox Backup Server",
    named_in="the repository",
    program="proxmox-backup-proxy",
    shown_by="the server's dashboard",
    accept="--fingerprint or PBS_FINGERPRINT (fingerprint= in fstab and for nbdkit)",
)
"""Words for errors about a server and its address."""

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
    """`host` has no brackets. `token`: the token's name; None for a user with a password."""

    user: str
    token: str | None
    host: str
    port: int
    store: str

    @classmethod
    def parse(cls, text: str) -> Repository:
        """Raises UsageError if `text` is not a repository."""
        _check_length("the repository", text)
        if "://" in text:
            raise UsageError(f"a repository is not a URL: {_form_of_url(text)}")
        if ":" in text.rpartition("@")[0]:  # not shown: most likely it is a password
            raise UsageError(
                f"a repository has no ':' before its '@': a password belongs in PBS_PASSWORD; {_FORM}"
            )
        rest, colon, store = text.rpartition(":")
        auth, at, place = rest.rpartition("@")
        if (form := _form_of_address(text)) is not None:
            raise UsageError(
                f"'{excerpt(text)}' is not a repository: an IPv6 address needs brackets; write {form}"
            )
        try:
            if not _STORE.fullmatch(store):
                raise UsageError("no valid datastore at its end")
            if not colon:
                return cls(DEFAULT_USER, None, DEFAULT_HOST, DEFAULT_PORT, store)
            user, token = _parse_auth(auth) if at else (DEFAULT_USER, None)
            host, port = _parse_place(place)
        except UsageError as error:
            raise UsageError(f"'{excerpt(text)}' is not a repository: {error}; {_FORM}") from None
        return cls(user, token, host, port, store)

    @classmethod
    def of_parts(
        cls, auth_id: str | None, server: str | None, port: int | None, datastore: str
    ) -> Repository:
        """The repository that has these parts; None means the default.

        `server`: a name or an address, an IPv6 address with or without brackets. Raises UsageError. Source:
        the options --auth-id, --server, --port and --datastore of proxmox-backup-client.
        """
        _check_length("the user", auth_id or "")
        _check_length("the server's name", server or "")
        _check_length("the datastore's name", datastore)
        user, token = _parse_auth(auth_id) if auth_id else (DEFAULT_USER, None)
        if not _STORE.fullmatch(datastore):
            raise UsageError(f"'{excerpt(datastore)}' is not the name of a datastore")
        host = DEFAULT_HOST
        if server:
            is_address = _is_address6(server)
            if not is_address and ":" in server.partition("]")[2 if server.startswith("[") else 0]:
                raise UsageError(
                    f"'{excerpt(server)}' is not a server's name or address; "
                    "give its port with --port or PBS_PORT"
                )
            host = _parse_place(f"[{server}]" if is_address else server)[0]
        return cls(user, token, host, DEFAULT_PORT if port is None else port, datastore)

    @property
    def auth_id(self) -> str:
        """The user or token that logs in: `user@realm` or `user@realm!token`."""
        return self.user if self.token is None else f"{self.user}!{self.token}"

    @property
    def realm(self) -> str:
        return self.user.rpartition("@")[2]

    @property
    def address(self) -> str:
        """`host:port`, with brackets around an IPv6 address."""
        return address_of(self.host, self.port)

    @property
    def kind(self) -> Kind:
        return PBS

    @property
    def secure(self) -> bool:
        """Servers have no other way."""
        return True

    @property
    def port_hint(self) -> str:
        """For errors: what to write if the name of the datastore is a port. Empty for other names.

        `user@host:18007` names the datastore 18007, as in proxmox-backup-client.
        """
        if self.port != DEFAULT_PORT or not _is_port(self.store):
            return ""
        meant = replace(self, port=int(self.store), store="DATASTORE")
        return f"; if {self.store} is the port, write {meant}"

    def __str__(self) -> str:
        """The whole repository string; it holds no secret."""
        return f"{self.auth_id}@{self.address}:{self.store}"


def _check_length(what: str, text: str) -> None:
    if len(text) > MAX_LENGTH:  # not shown: it may be the content of a wrong file, and hold a password
        raise UsageError(f"{what} has {len(text)} characters; valid ones have at most {MAX_LENGTH}; {_FORM}")


def parse_port(text: str) -> int:
    """A TCP port in decimal digits. Raises UsageError."""
    if not _is_port(text):
        raise UsageError(f"'{excerpt(text)}' is not a port; give a number from 1 to 65535")
    return int(text)


def _is_port(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) <= 5 and 0 < int(text) < 65536


def _parse_auth(auth: str) -> tuple[str, str | None]:
    name, at, rest = auth.rpartition("@")  # names of users may contain '@' and '!'
    realm, bang, token = rest.partition("!")
    user = f"{name}@{realm}"
    if not _USER.fullmatch(user):
        raise UsageError(f"'{excerpt(user if at else realm)}' is not user@realm")
    if bang and not _TOKEN.fullmatch(token):
        raise UsageError(f"'{excerpt(token)}' is not a token's name")
    if bang and not user.isascii():
        raise UsageError("servers accept tokens only of users whose names are plain ASCII")
    return user, token if bang else None


def _parse_place(place: str) -> tuple[str, int]:
    if place.startswith("["):
        host, bracket, port = place[1:].partition("]")
        valid = bool(bracket) and _ADDRESS6.fullmatch(host) is not None and (not port or port.startswith(":"))
        port = port.removeprefix(":") if port else str(DEFAULT_PORT)
    else:
        host, colon, port = place.partition(":")
        valid = _HOST.fullmatch(host) is not None
        port = port if colon else str(DEFAULT_PORT)
    if not valid:
        raise UsageError(f"'{excerpt(place)}' is not a host")
    return host, parse_port(port)


def _is_address6(text: str) -> bool:
    """Whether `text` is an IPv6 address without brackets, with or without a zone."""
    try:
        ipaddress.IPv6Address(text)
    except ValueError:
        return False
    return _ADDRESS6.fullmatch(text) is not None


def _form_of_address(text: str) -> str | None:
    """How to write a repository whose IPv6 address lacks brackets; None for other repositories."""
    auth, at, place = text.rpartition("@")
    address, _colon, store = place.rpartition(":")
    if _is_address6(place):
        return f"{auth}{at}[{place}]:DATASTORE"
    return f"{auth}{at}[{address}]:{store}" if _is_address6(address) else None


def _form_of_url(text: str) -> str:
    """How to write a repository that was given as `https://…`; does not show a password in it."""
    rest = text.partition("://")[2].partition("/")[0]
    if ":" in rest.rpartition("@")[0]:
        return f"a password belongs in PBS_PASSWORD; {_FORM}"
    _host, colon, last = rest.rpartition("@")[2].rpartition(":")
    if not colon or last.isdigit() or last.endswith("]"):
        rest += ":DATASTORE"
    try:
        Repository.parse(rest)
    except UsageError:
        return _FORM
    return f"write {rest}"

"""The server at the other end of a connection: where it is, and what errors call it.

`Repository` and `BucketAddress` are peers. Pure; from any thread.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol


class Kind(NamedTuple):
    """Words for errors about servers of one kind.

    `name`: with its article. `named_in`: what names the host. `program`: what listens on its port.
    `shown_by`: who shows its fingerprint. `accept`: how to give that.
    """

    name: str
    named_in: str
    program: str
    shown_by: str
    accept: str

    @property
    def check_address(self) -> str:
        """What to do where another program answers."""
        return f"check that host and port are those of {self.name}"


class Peer(Protocol):
    """A server. All of it is safe to show."""

    @property
    def host(self) -> str:
        """A name or an address, without brackets."""

    @property
    def port(self) -> int: ...

    @property
    def address(self) -> str:
        """`host:port`, with brackets around an IPv6 address."""

    @property
    def port_hint(self) -> str:
        """For errors: a correction of the port, after `; `. Empty if there is none."""

    @property
    def kind(self) -> Kind: ...

    @property
    def secure(self) -> bool:
        """Whether connections use TLS. Without it, nothing verifies the server, and nothing is encrypted."""


def address_of(host: str, port: int) -> str:
    """`host:port`, with brackets around an IPv6 address."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def authority_of(host: str, port: int, *, secure: bool) -> str:
    """The `Host` header: `host:port`, without a port that is the scheme's."""
    address = address_of(host, port)
    return address.rpartition(":")[0] if port == (443 if secure else 80) else address

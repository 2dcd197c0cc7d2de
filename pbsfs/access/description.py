"""The description of a source: all that opening it takes, found out once and then never again.

`pbsfs.access.resolve` makes descriptions of options and environment. A command opens the source of one
itself, or hands the whole description over to a process that it starts (the mount in the background,
nbdkit), through anonymous memory (memfd_create(2)): neither the arguments nor the environment of a
process that lives for weeks hold a secret, and the two processes can't find different things. Synchronous.

A new kind of source is one more class with these four methods in `KINDS`.
"""

from __future__ import annotations

import abc
import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

from pbsfs.access.caching import CacheAccess
from pbsfs.access.keyring import KeyRing
from pbsfs.base.errors import UsageError
from pbsfs.base.names import Namespace
from pbsfs.base.secret import Secret, Ticket
from pbsfs.sources.bucket.address import BucketAddress
from pbsfs.sources.http.proxy import Proxy
from pbsfs.sources.http.tls import Trust
from pbsfs.sources.server.repository import Repository

if TYPE_CHECKING:
    from pbsfs.access.aws.keys import KeySource
    from pbsfs.sources.base import Source

Facts = dict[str, Any]
"""What JSON can hold."""


class Access(abc.ABC):
    """How to get at one kind of source. Immutable; its `repr` shows no secret."""

    kind: ClassVar[str]

    @abc.abstractmethod
    def open(self) -> Source:
        """A source of its own each time. Raises SourceError."""

    @abc.abstractmethod
    def dump(self) -> Facts:
        """All of it, secrets included."""

    @classmethod
    @abc.abstractmethod
    def load(cls, facts: Facts) -> Self:
        """The inverse of `dump`."""

    @abc.abstractmethod
    def public(self) -> dict[str, str]:
        """What other users may know of it: what names the source, in the words of the options."""


# Sources come with trio and HTTP/2, which a `mount` that starts a process for the background does without:
# half of its time would be importing.


@dataclass(frozen=True, slots=True)
class DirectoryAccess(Access):
    """A datastore's directory; `path` is absolute."""

    kind: ClassVar[str] = "directory"
    path: Path

    def open(self) -> Source:
        from pbsfs.sources.directory.source import DirectorySource  # noqa: PLC0415

        return DirectorySource(self.path)

    def dump(self) -> Facts:
        return {"path": str(self.path)}

    @classmethod
    def load(cls, facts: Facts) -> Self:
        return cls(Path(facts["path"]))

    def public(self) -> dict[str, str]:
        return {"datastore_dir": str(self.path)}


@dataclass(frozen=True, slots=True)
class ServerAccess(Access):
    """A datastore on a server.

    `secret`: a password, a ticket, or the secret of an API token. `retry_timeout`: seconds. `connections`: to
    one snapshot. None for both: the default of the source.
    """

    kind: ClassVar[str] = "server"
    repository: Repository
    secret: Secret
    trust: Trust
    proxy: Proxy | None = None
    retry_timeout: float | None = None
    connections: int | None = None

    def open(self) -> Source:
        from pbsfs.sources.pacing import DEFAULT_LIMIT  # noqa: PLC0415
        from pbsfs.sources.server.source import ServerSettings, ServerSource  # noqa: PLC0415

        patience = DEFAULT_LIMIT if self.retry_timeout is None else self.retry_timeout
        settings = ServerSettings(patience, self.connections)
        return ServerSource(self.repository, self.secret, self.trust, settings, self.proxy)

    def dump(self) -> Facts:
        return {
            "repository": str(self.repository),
            "secret": self.secret.reveal(),
            "ticket": _dump_ticket(self.secret) if isinstance(self.secret, Ticket) else None,
            "pinned": self.trust.pinned,
            "known": self.trust.known,
            "ca": self.trust.ca,
            "proxy": None if self.proxy is None else _dump_proxy(self.proxy),
            "retry_timeout": self.retry_timeout,
            "connections": self.connections,
        }

    @classmethod
    def load(cls, facts: Facts) -> Self:
        return cls(
            Repository.parse(facts["repository"]),
            Secret(facts["secret"]) if facts["ticket"] is None else _load_ticket(facts),
            Trust(facts["pinned"], facts["known"], facts["ca"]),
            None if facts["proxy"] is None else _load_proxy(facts["proxy"]),
            facts["retry_timeout"],
            facts["connections"],
        )

    def public(self) -> dict[str, str]:
        pinned = {"fingerprint": self.trust.pinned} if self.trust.pinned else {}
        return {"repository": str(self.repository), **pinned}


@dataclass(frozen=True, slots=True)
class BucketAccess(Access):
    """A datastore in a bucket. `key`: what gives the key that signs requests. Others: as of a server."""

    kind: ClassVar[str] = "bucket"
    address: BucketAddress
    key: KeySource
    trust: Trust
    proxy: Proxy | None = None
    retry_timeout: float | None = None

    def open(self) -> Source:
        from pbsfs.access.aws.renewed import Renewed  # noqa: PLC0415
        from pbsfs.sources.bucket.source import BucketSettings, BucketSource  # noqa: PLC0415
        from pbsfs.sources.pacing import DEFAULT_LIMIT  # noqa: PLC0415

        patience = DEFAULT_LIMIT if self.retry_timeout is None else self.retry_timeout
        settings = BucketSettings(patience)
        return BucketSource(self.address, Renewed(self.key), self.trust, settings, self.proxy)

    def dump(self) -> Facts:
        from pbsfs.access.aws.kinds import dump_key  # noqa: PLC0415

        return {
            "address": asdict(self.address),
            "key": dump_key(self.key),
            "trust": asdict(self.trust),
            "proxy": None if self.proxy is None else _dump_proxy(self.proxy),
            "retry_timeout": self.retry_timeout,
        }

    @classmethod
    def load(cls, facts: Facts) -> Self:
        from pbsfs.access.aws.kinds import load_key  # noqa: PLC0415

        return cls(
            BucketAddress(**facts["address"]),
            load_key(facts["key"]),
            Trust(**facts["trust"]),
            None if facts["proxy"] is None else _load_proxy(facts["proxy"]),
            facts["retry_timeout"],
        )

    def public(self) -> dict[str, str]:
        # All of the address: what has a default may come from a variable or file, which others lack.
        found = {
            "bucket": str(self.address),
            "endpoint": self.address.url,
            "region": self.address.signing_region,
            "path_style": str(self.address.has_path_style).lower(),
            "fingerprint": self.trust.pinned,
            "anonymous": "true" if self.key.kind == "none" else None,
        }
        return {name: value for name, value in found.items() if value}


KINDS: Mapping[str, type[Access]] = {
    kind.kind: kind for kind in (DirectoryAccess, ServerAccess, BucketAccess)
}


_NAMES = ("repository", "datastore_dir", "bucket", "endpoint")
"""Of what `Access.public` has, that which says which datastore it is, and which user reads it."""


@dataclass(frozen=True, slots=True)
class Description:
    """A source with what is read of it: from `namespace` on, with `keys`.

    `limit_rate`: the bytes a second that are fetched at most; None for no limit. `cache`: the cache on disk
    in front of the source; None for none.
    """

    access: Access
    namespace: Namespace
    keys: KeyRing = field(repr=False)
    limit_rate: int | None = None
    cache: CacheAccess | None = None

    def open(self) -> Source:
        """A source of its own each time, with the limit, behind the cache. Raises SourceError."""
        if self.cache is None:
            return self._open()
        name, identity = identity_of(self.access)
        return self.cache.open(self._open, name, identity)

    def _open(self) -> Source:
        from pbsfs.sources.rate import Rate  # noqa: PLC0415

        source = self.access.open()
        source.rate = None if self.limit_rate is None else Rate(self.limit_rate)
        return source

    def dump(self) -> bytes:
        """All of it, secrets included, for another process of pbsfs."""
        facts = {
            "kind": self.access.kind,
            "namespace": str(self.namespace),
            "keys": self.keys.dump().decode(),
            "limit_rate": self.limit_rate,
            "cache": None if self.cache is None else self.cache.dump(),
        }
        return json.dumps(facts | {"access": self.access.dump()}).encode()

    @classmethod
    def load(cls, data: bytes) -> Description:
        """The inverse of `dump`."""
        facts = json.loads(data)
        access = KINDS[facts["kind"]].load(facts["access"])
        keys = KeyRing.load(facts["keys"].encode())
        cache = None if facts["cache"] is None else CacheAccess.load(facts["cache"])
        return cls(access, Namespace.parse(facts["namespace"]), keys, facts["limit_rate"], cache)

    @contextlib.contextmanager
    def handed_over(self) -> Iterator[int]:
        """A descriptor for a child to inherit, of memory that holds all of it.

        Not of a pipe: nobody reads before the child runs, and a pipe may hold no more than one page.
        """
        fd = os.memfd_create("pbsfs")
        try:
            with open(fd, "wb", closefd=False) as file:
                file.write(self.dump())
            os.lseek(fd, 0, os.SEEK_SET)
            yield fd
        finally:
            os.close(fd)

    @classmethod
    def taken_over(cls, fd: int) -> Description:
        """What the parent of this process handed over; closes `fd`. Raises UsageError for anything else."""
        try:
            with open(fd, "rb") as file:
                return cls.load(file.read())
        except (OSError, ValueError, TypeError, LookupError, AttributeError):
            # Not what was in it, nor where it went wrong: it may be a secret.
            raise UsageError(f"descriptor {fd}: not the description of a source") from None


def identity_of(access: Access) -> tuple[str, str]:
    """What a cache on disk calls a source: a name for messages, and one with its user, for its records."""
    public = access.public()
    named = [public[name] for name in _NAMES if name in public]
    return named[0], json.dumps([access.kind, *named])


def _dump_ticket(ticket: Ticket) -> Facts:
    return {"password": None if ticket.password is None else ticket.password.reveal()}


def _load_ticket(facts: Facts) -> Ticket:
    password = facts["ticket"]["password"]
    return Ticket(facts["secret"], None if password is None else Secret(password))


def _dump_proxy(proxy: Proxy) -> Facts:
    password = None if proxy.password is None else proxy.password.reveal()
    return {
        "host": proxy.host,
        "port": proxy.port,
        "variable": proxy.variable,
        "user": proxy.user,
        "password": password,
    }


def _load_proxy(facts: Facts) -> Proxy:
    password = facts["password"]
    return Proxy(**facts | {"password": None if password is None else Secret(password)})

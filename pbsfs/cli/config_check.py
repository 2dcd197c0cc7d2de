"""The steps of `pbsfs config check`: from a profile to the backups in its source.

Each step uses what commands use, and yields what it found. Synchronous, except looking at the backups.
"""

from __future__ import annotations

import contextlib
import functools
import os
import socket
import stat
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass

from pbsfs.access.buckets import Bucket
from pbsfs.access.caching import look_at
from pbsfs.access.config import Configuration, configure
from pbsfs.access.description import Access, BucketAccess, Description, DirectoryAccess, ServerAccess
from pbsfs.access.keyring import KeyRing
from pbsfs.access.options import SourceOptions, resolve
from pbsfs.access.profiles import Profile
from pbsfs.access.resolve import logged_in, open_keys, password_of, trust_of
from pbsfs.access.terminal import Terminal
from pbsfs.base.errors import (
    AuthError,
    ConnectError,
    PbsfsError,
    ResolveError,
    TrustError,
    UnknownDatastoreError,
    UsageError,
    WrongServerError,
)
from pbsfs.base.names import Namespace, format_time
from pbsfs.base.secret import Ticket
from pbsfs.base.text import first_of
from pbsfs.cli.running import run_on_described
from pbsfs.fuse.options import FuseOptions
from pbsfs.sources.http.peer import Peer
from pbsfs.sources.http.proxy import Proxy, find_proxy
from pbsfs.sources.http.tls import Trust, connect, connect_plain
from pbsfs.sources.server.repository import Repository
from pbsfs.tree import Tree

MAX_GROUPS = 50
"""Groups in whose newest snapshot the check looks for the key that it needs."""

_DENIED = {AuthError: "login", UnknownDatastoreError: "datastore"}
"""Failures of opening a source that have a step of their own. In place of a login, a bucket has a key."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a step found. `failure`: why it failed, if so; `text` says it too."""

    step: str
    text: str
    failure: PbsfsError | None = None
    is_warning: bool = False


class ProfileCheck:
    """The steps for one profile; `run` goes through them until one fails."""

    def __init__(
        self,
        configuration: Configuration,
        name: str,
        environment: Mapping[str, str],
        terminal: Terminal | None,
    ) -> None:
        self._configuration = configuration
        self._name = name
        self._environment = environment
        self._terminal = terminal
        self._step = ""
        self._is_bucket = False

    def run(self) -> Iterator[Outcome]:
        """The outcome of each step, as soon as it is known."""
        try:
            yield from self._steps()
        except PbsfsError as error:
            step = next((step for kind, step in _DENIED.items() if isinstance(error, kind)), self._step)
            yield Outcome("access-key" if step == "login" and self._is_bucket else step, str(error), error)

    def _steps(self) -> Iterator[Outcome]:
        self._step = "profile"
        profile = self._configuration.profile(self._name)
        yield self._found(f"{self._name}, in {profile.file}")
        yield from self._mount_options(profile)
        self._step = "source"
        configured = configure(SourceOptions(profile=self._name), self._environment)
        self._environment = configured.environment
        options = resolve(configured.options, self._environment)
        access: Access
        if options.datastore_dir is not None:
            yield self._found(f"the datastore in {options.datastore_dir}")
            access = DirectoryAccess(options.datastore_dir)
        elif options.bucket is not None:
            self._is_bucket = True
            access = yield from self._bucket(options)
        else:
            access = yield from self._server(options)
        if options.cache is not None:
            text, is_warning = look_at(options.cache)
            yield Outcome("disk cache", text, is_warning=is_warning)
        keys = yield from self._keys(options)
        self._step = "backups"
        description = Description(access, Namespace.parse(options.namespace or ""), keys)
        outcomes = run_on_described(functools.partial(_look, keys), description)
        if isinstance(access, ServerAccess):
            yield Outcome("login", f"{access.repository.auth_id} is accepted")
        elif isinstance(access, BucketAccess) and access.key.kind != "none":
            yield Outcome("access-key", "it is accepted")
        yield from outcomes

    def _found(self, text: str) -> Outcome:
        return Outcome(self._step, text)

    def _mount_options(self, profile: Profile) -> Iterator[Outcome]:
        self._step = "mount"
        if profile.mount_options:
            try:
                FuseOptions.parse(profile.mount_options)
            except UsageError as error:
                setting = f"{profile.file}: profiles.{profile.name}.mount-options"
                raise UsageError(f"{setting}: {error}") from None
            yield self._found(f"the options {', '.join(profile.mount_options)}")

    def _server(self, options: SourceOptions) -> Generator[Outcome, None, ServerAccess]:
        """The steps of a server up to its password; returns the access."""
        assert options.repository is not None
        repository = Repository.parse(options.repository)
        yield self._found(str(repository))
        proxy = find_proxy(repository, self._environment)

        def find_trust() -> Trust:
            return trust_of(options, repository, proxy, self._environment, self._terminal)

        trust = yield from self._connection(repository, proxy, find_trust)
        self._step = "password"
        if options.password is not None and options.password.readable_by_others():
            text = f"every user of this machine may read {options.password}; run chmod o-r on it"
            yield Outcome("password", text, is_warning=True)
        secret = password_of(options, repository, self._environment, self._terminal)
        if options.password is not None:
            yield self._found(f"found: {options.password}")
        elif isinstance(secret, Ticket):
            yield self._found("not needed: pbsfs login keeps a ticket")
        else:
            yield self._found("found")
        self._step = "login"
        secret = logged_in(repository, secret, trust, proxy, self._terminal)
        return ServerAccess(repository, secret, trust, proxy, options.retry_timeout, options.connections)

    def _bucket(self, options: SourceOptions) -> Generator[Outcome, None, BucketAccess]:
        """The steps of a bucket up to its key; returns the access."""
        bucket = Bucket(options, self._environment)
        address = bucket.address
        region = f"the region {address.region}" if address.region else "no region"
        yield self._found(f"{address} at {address.address}, {region}")
        proxy = bucket.proxy()
        trust = yield from self._connection(address, proxy, lambda: bucket.trust(proxy, self._terminal))
        self._step = "access-key"
        if options.secret_key is not None and options.secret_key.readable_by_others():
            text = f"every user of this machine may read {options.secret_key}; run chmod o-r on it"
            yield Outcome("access-key", text, is_warning=True)
        source = bucket.key()
        key = source.fetch()
        until = "" if key is None or key.expires is None else f", valid until {format_time(int(key.expires))}"
        yield self._found(f"{source}{until}")
        return BucketAccess(address, source, trust, proxy, options.retry_timeout)

    def _connection(
        self, peer: Peer, proxy: Proxy | None, find_trust: Callable[[], Trust]
    ) -> Generator[Outcome, None, Trust]:
        """The steps from the name of a server to its certificate; returns by what it is trusted."""
        self._step = "name"
        if proxy is None:
            yield self._found(f"{peer.host} is {_addresses(peer.host, peer.port)}")
        else:
            yield self._found(f"the proxy {proxy.host} is {_addresses(proxy.host, proxy.port)}")
        self._step = "certificate"
        try:
            trust = find_trust()
            if not peer.secure:
                connect_plain(peer, proxy).close()
                yield Outcome("connection", f"{peer.address} answers")
                yield Outcome("certificate", "none: others on the network can read along", is_warning=True)
                return trust
            connection = connect(peer, trust, proxy)
        except (ConnectError, WrongServerError):
            self._step = "connection"
            raise
        except TrustError as error:
            raise TrustError(f"{error}, or fingerprint in the profile") from None
        connection.socket.close()
        yield Outcome("connection", f"{peer.address} answers in {connection.round_trip * 1000:.0f} ms")
        if trust.pinned or trust.known:
            yield self._found("trusted by its fingerprint")
        else:
            yield self._found(f"trusted by {'a CA of the system' if trust.ca is None else 'ca-file'}")
        return trust

    def _keys(self, options: SourceOptions) -> Generator[Outcome, None, KeyRing]:
        """The step of the keys; returns them."""
        self._step = "keys"
        for path in options.keyfiles:
            with contextlib.suppress(OSError):  # reading it reports that
                if os.stat(path).st_mode & stat.S_IROTH and not path.is_dir():
                    text = f"every user of this machine may read {path}; run chmod o-r on it"
                    yield Outcome("keys", text, is_warning=True)
        keys = open_keys(options, self._environment, self._terminal)
        yield self._found(first_of(map(_short, keys)) if keys else "none; encrypted backups are not readable")
        return keys


def _addresses(host: str, port: int) -> str:
    """The addresses of a name. Raises ResolveError."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (socket.gaierror, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ResolveError(
            f"the name '{host}' does not resolve: {reason}; check the host in the profile, or the "
            "proxy in the environment, and this computer's network"
        ) from None
    return first_of(dict.fromkeys(str(place[0]) for *_kind, place in found))


def _short(fingerprint: str) -> str:
    """A key's fingerprint, as proxmox-backup-client shows it in short: its first 8 bytes."""
    return ":".join(fingerprint[at : at + 2] for at in range(0, 16, 2))


async def _look(keys: KeyRing, tree: Tree) -> list[Outcome]:
    """What may be seen in the source, and which keys the newest snapshots need."""
    source = tree.reader.source
    namespace = tree.root.namespace
    below = await source.namespaces(namespace)
    groups = (await source.groups(namespace))[: MAX_GROUPS + 1]
    place = f"namespace {namespace}" if namespace.parts else "the root namespace"
    count = f"more than {MAX_GROUPS}" if len(groups) > MAX_GROUPS else str(len(groups))
    text = f"groups in {place}: {count}; namespaces below: {len(below)}"
    if not groups and not below:
        text += "; check namespace in the profile, and that the user or token has the role DatastoreReader"
        return [Outcome("backups", text, is_warning=True)]
    newest = max((info.last_backup for info in groups if info.last_backup is not None), default=None)
    if newest is not None:
        text += f"; newest backup: {format_time(newest)}"
    outcomes = [Outcome("backups", text)]
    missing: dict[str, str] = {}
    for info in groups[:MAX_GROUPS]:
        for snapshot in (await source.snapshots(info.group))[-1:]:
            fingerprint = (snapshot.key_fingerprint or "").replace(":", "")
            if fingerprint and fingerprint not in keys:
                missing.setdefault(_short(fingerprint), str(info.group))
    if missing:
        needs = first_of(f"{key} ({group})" for key, group in missing.items())
        text = f"missing: {needs}; name the key files with keyfile in the profile"
        outcomes.append(Outcome("keys", text, is_warning=True))
    return outcomes

"""Settings: from options and the environment to what the other rooms take.

Synchronous. Secrets come in here and go to the source that needs them, nowhere else.
"""

from __future__ import annotations

import abc
import contextlib
import json
import logging
import os
import re
import stat
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pbsfs.access.credentials import (
    FORMS,
    KEY_PASSWORD_VARIABLE,
    PASSWORD_VARIABLE,
    find_secret,
    find_setting,
    has_credential,
)
from pbsfs.access.description import Access, Description, DirectoryAccess, ServerAccess
from pbsfs.access.fingerprints import fingerprints_file, known_fingerprint, remember_fingerprint
from pbsfs.access.keyring import KeyRing, read_keys
from pbsfs.base.errors import SourceError, TrustError, UsageError
from pbsfs.base.names import Namespace
from pbsfs.base.secret import Secret
from pbsfs.formats.keyfile import MAX_KEY_FILE_SIZE, KeyFile
from pbsfs.runtime.places import config_home
from pbsfs.sources.server.proxy import Proxy, find_proxy
from pbsfs.sources.server.repository import Repository, parse_port
from pbsfs.sources.server.tls import (
    Trust,
    connect,
    parse_fingerprint,
    peek_fingerprint,
    show_fingerprint,
)

log = logging.getLogger(__name__)

REPOSITORY_VARIABLE = "PBS_REPOSITORY"
FINGERPRINT_VARIABLE = "PBS_FINGERPRINT"
NAMESPACE_VARIABLE = "PBS_NAMESPACE"
DIRECTORY_VARIABLE = "PBSFS_DATASTORE_DIR"

PARTS = {"server": "PBS_SERVER", "port": "PBS_PORT", "datastore": "PBS_DATASTORE", "auth_id": "PBS_AUTH_ID"}
"""The parts of a repository: the fields of `SourceOptions`, and the variables that complete them."""

_SIZE = re.compile(r"(\d+)\s*([kmgt]?)(?:i?b)?", re.IGNORECASE)
_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}

MIN_CACHE_SIZE = 32 << 20
"""Bytes; two chunks of the largest size that exists. With less, no chunk would stay for its second read."""


@dataclass(frozen=True, slots=True)
class SourceOptions:
    """What the options say about the source; `resolve` completes it from the environment.

    `server`, `port`, `datastore`, `auth_id`: the parts of a repository, instead of `repository`.
    `namespace`: the one to start at. `retry_timeout` None: the default of the server source.
    """

    repository: str | None = None
    datastore_dir: Path | None = None
    fingerprint: str | None = None
    retry_timeout: float | None = None
    connections: int | None = None
    keyfiles: tuple[Path, ...] = ()
    keyfd: int | None = None
    server: str | None = None
    port: int | None = None
    datastore: str | None = None
    auth_id: str | None = None
    namespace: str | None = None

    def names_source(self) -> bool:
        """Whether these options say which source is meant."""
        return bool(self._given())

    def _given(self) -> list[str]:
        fields = ("repository", *PARTS, "datastore_dir")
        return [name for name in fields if getattr(self, name) is not None]


class Terminal(abc.ABC):
    """Somebody to ask. There is none where nobody sits at a terminal."""

    @abc.abstractmethod
    def password(self, text: str) -> Secret:
        """What is typed, unseen."""

    @abc.abstractmethod
    def confirm(self, text: str) -> bool:
        """Whether it is agreed to."""


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def names_source(environment: Mapping[str, str]) -> bool:
    """Whether the environment says which source is meant; reads nothing."""
    repositories = [REPOSITORY_VARIABLE + form for form in FORMS]
    wanted = (DIRECTORY_VARIABLE, PARTS["datastore"], *repositories)
    return any(environment.get(name) for name in wanted) or has_credential("repository", environment)


def resolve(
    options: SourceOptions, environment: Mapping[str, str], option: Callable[[str], str] = _option
) -> SourceOptions:
    """`options`, completed from the environment: with `repository` or `datastore_dir`, and `namespace`.

    The first of these that is given: a directory, a repository or its parts as options (the variables
    complete the parts); PBSFS_DATASTORE_DIR; PBS_REPOSITORY, or the systemd credential; the parts as
    variables. The rules for the server are those of proxmox-backup-client 4.1.8. `option`: how the caller's
    users write a field of `SourceOptions`. Raises UsageError.
    """
    given = options._given()
    kinds = {"parts" if name in PARTS else name: name for name in reversed(given)}
    if len(kinds) > 1:
        raise UsageError(f"{' and '.join(map(option, reversed(kinds.values())))} exclude each other")
    if options.namespace is None:
        options = replace(options, namespace=environment.get(NAMESPACE_VARIABLE, ""))
    if options.datastore_dir is not None:
        return replace(options, datastore_dir=Path(os.path.abspath(options.datastore_dir)))
    if not given and environment.get(DIRECTORY_VARIABLE):
        return replace(options, datastore_dir=_directory_of(environment))
    text = options.repository
    if not given:
        text = find_setting(REPOSITORY_VARIABLE, "repository", environment)
    repository = Repository.parse(text) if text is not None else _of_parts(options, environment, option)
    fingerprint = options.fingerprint
    if fingerprint is None:
        fingerprint = find_setting(FINGERPRINT_VARIABLE, "fingerprint", environment)
    return replace(
        options,
        repository=str(repository),
        fingerprint=fingerprint or "",  # looked for: a descriptor or command is not to be read again
        server=None,
        port=None,
        datastore=None,
        auth_id=None,
    )


def _directory_of(environment: Mapping[str, str]) -> Path:
    """The directory that the environment names. Raises SourceError where it is not one."""
    directory = Path(os.path.abspath(environment[DIRECTORY_VARIABLE]))
    others = [name for name in (REPOSITORY_VARIABLE, PARTS["datastore"]) if environment.get(name)]
    unused = (
        f"; as long as it is set, {' and '.join(others)} {'are' if others[1:] else 'is'} not used"
        if others
        else ""
    )
    try:
        kind = os.stat(directory).st_mode
    except OSError as error:
        raise SourceError(f"{DIRECTORY_VARIABLE}: {directory}: {error.strerror}{unused}") from None
    if not stat.S_ISDIR(kind):
        raise SourceError(f"{DIRECTORY_VARIABLE}: {directory} is not a directory{unused}")
    log.info("%s names the source: %s%s", DIRECTORY_VARIABLE, directory, unused)
    return directory


def _of_parts(
    options: SourceOptions, environment: Mapping[str, str], option: Callable[[str], str]
) -> Repository:
    """The repository whose parts the options give, or else the variables."""
    parts: dict[str, Any] = {}
    for name, variable in PARTS.items():
        parts[name] = getattr(options, name)
        if parts[name] == "":
            raise UsageError(f"{option(name)} is empty; leave it out, or give a value")
        parts[name] = parts[name] or environment.get(variable) or None
    if not parts["datastore"]:
        if any(parts.values()):
            raise UsageError(
                "no source: the server's datastore is not named; "
                f"name it with {option('datastore')} or {PARTS['datastore']}"
            )
        raise UsageError(
            f"no source: name a server with {option('repository')} or {REPOSITORY_VARIABLE}, "
            f"or a datastore's directory with {option('datastore_dir')} or {DIRECTORY_VARIABLE}"
        )
    port = parts["port"]
    try:
        number = parse_port(port) if isinstance(port, str) else port
    except UsageError as error:
        raise UsageError(f"{PARTS['port']}: {error}") from None
    return Repository.of_parts(parts["auth_id"], parts["server"], number, parts["datastore"])


SOURCE_ATTRIBUTE = "user.pbs.source"
"""The extended attribute in which a mount tells what it shows."""


def shown_source(description: Description) -> bytes:
    """What a mount shows of its source: a JSON object without secrets.

    It has `repository` and `fingerprint`, or `datastore_dir`; and `namespace`.
    """
    return json.dumps(description.access.public() | {"namespace": str(description.namespace)}).encode()


def named_by(shown: bytes) -> SourceOptions:
    """The options that name the source of a mount that shows this. Raises SourceError for anything else."""
    with contextlib.suppress(ValueError, TypeError, AttributeError):
        facts = json.loads(shown)
        directory = facts.get("datastore_dir")
        options = SourceOptions(
            repository=facts.get("repository"),
            datastore_dir=None if directory is None else Path(directory),
            fingerprint=facts.get("fingerprint"),
            namespace=str(facts.get("namespace", "")),
        )
        if options.names_source():
            return options
    raise SourceError(f"{SOURCE_ATTRIBUTE}: the mount does not tell its source")


def describe(
    options: SourceOptions,
    environment: Mapping[str, str],
    terminal: Terminal | None,
    *,
    secret: Secret | None = None,
    ask_for_default: bool = False,
) -> Description:
    """The source that resolved options name, with its secret and keys.

    `secret`: instead of that of the environment. `ask_for_default`: see `open_keys`. Raises UsageError,
    KeyFileError, PasswordError, and what connecting to the server raises.
    """
    namespace = Namespace.parse(options.namespace or "")
    access: Access
    if options.datastore_dir is not None:
        access = DirectoryAccess(options.datastore_dir)
    else:
        access = find_access(options, environment, terminal, secret)
    keys = open_keys(options, environment, terminal, ask_for_default=ask_for_default)
    return Description(access, namespace, keys)


def find_access(
    options: SourceOptions,
    environment: Mapping[str, str],
    terminal: Terminal | None,
    secret: Secret | None = None,
) -> ServerAccess:
    """How to get at the server of resolved options. `secret`: instead of that of the environment.

    Raises UsageError, and what connecting raises.
    """
    assert options.repository is not None
    repository = Repository.parse(options.repository)
    proxy = find_proxy(repository, environment)
    # Before the password: who has to be asked for it should see that the server is the right one.
    trust = _find_trust(options, repository, proxy, environment, terminal)
    if secret is None:
        secret = find_secret(PASSWORD_VARIABLE, "password", environment)
    if secret is not None and not secret.reveal():
        secret = None  # a variable that is set to nothing
    if secret is None and terminal is None:
        raise UsageError(
            f"no password for {repository.auth_id}: set PBS_PASSWORD (or PBS_PASSWORD_FD, _FILE, _CMD); "
            "for an API token it is the token's secret"
        )
    if secret is None and terminal is not None:
        what = "password" if repository.token is None else "secret"
        secret = terminal.password(f"{what} of {repository.auth_id} at {repository.address}")
    assert secret is not None
    return ServerAccess(repository, secret, trust, proxy, options.retry_timeout, options.connections)


def _find_trust(
    options: SourceOptions,
    repository: Repository,
    proxy: Proxy | None,
    environment: Mapping[str, str],
    terminal: Terminal | None,
) -> Trust:
    if options.fingerprint:
        return Trust(pinned=parse_fingerprint(options.fingerprint))
    home = config_home(environment)
    file = None if home is None else fingerprints_file(home)
    trust = Trust(known=None if file is None else known_fingerprint(file, repository.host))
    if trust.known is not None or terminal is None:
        return trust
    try:
        connect(repository, trust, proxy).socket.close()
    except TrustError:
        found = peek_fingerprint(repository, proxy)
        shown = show_fingerprint(found)
        if not terminal.confirm(
            f"{repository.address} is not known yet. The SHA-256 fingerprint of its certificate is\n"
            f"{shown}\nIs that what its dashboard shows? Connect, and remember it"
        ):
            raise
        try:
            if file is None:
                raise UsageError("cannot remember the fingerprint: this user has no home directory")
            remember_fingerprint(file, repository.host, found)
        except UsageError as error:
            log.warning("%s; give it with --fingerprint or PBS_FINGERPRINT next time", error)
        return Trust(known=found)
    return trust


def open_keys(
    options: SourceOptions,
    environment: Mapping[str, str],
    terminal: Terminal | None,
    *,
    ask_for_default: bool = False,
) -> KeyRing:
    """The keys that the options name, or else those in the usual places.

    `ask_for_default`: for what reads much; a listing should not ask for the password of a key that it has no
    use for. Raises UsageError, KeyFileError, PasswordError.
    """
    given = None
    if options.keyfd is not None:
        if not 0 <= options.keyfd < 1 << 31:
            raise UsageError(f"--keyfd {options.keyfd}: not a descriptor's number")
        try:
            with open(options.keyfd, "rb") as file:
                given = file.read(MAX_KEY_FILE_SIZE + 1)
        except OSError as error:
            raise UsageError(f"--keyfd {options.keyfd}: {error.strerror}") from None

    def ask(path: Path, file: KeyFile) -> Secret | None:
        if terminal is None:
            return None
        hint = f" (hint: {file.hint})" if file.hint else ""
        return terminal.password(f"password of the key {path}{hint}")

    password = find_secret(KEY_PASSWORD_VARIABLE, "encryption-password", environment)
    return read_keys(
        options.keyfiles,
        given=given,
        password=password,
        ask=ask,
        ask_for_default=ask_for_default and terminal is not None,
        config_home=config_home(environment),
    )


def parse_size(text: str) -> int:
    """`256M`, `1G`, `65536` in bytes (powers of 1024). Raises UsageError."""
    match = _SIZE.fullmatch(text.strip())
    if not match or len(match[1]) > 18:
        raise UsageError(f"'{text}' is not a size (they look like 256M or 1G)")
    return int(match[1]) * _UNITS[match[2].lower()]


def parse_cache_size(text: str) -> int:
    """A size that the chunk cache can work with. Raises UsageError."""
    size = parse_size(text)
    if size < MIN_CACHE_SIZE:
        raise UsageError(f"a cache of {text} is too small; the least is {MIN_CACHE_SIZE >> 20}M")
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if size > memory:
        raise UsageError(f"a cache of {text} is too large: this computer has {memory >> 20}M; name less")
    return size


_PASSED_ON = frozenset(
    ("allow_other", "allow_root", "nosuid", "suid", "nodev", "dev", "noexec", "exec", "noatime", "atime")
)
_FULFILLED = frozenset(("ro", "default_permissions", "defaults", "auto", "noauto", "user", "users", "nouser"))
_FULFILLED_ALSO = frozenset(
    ("_netdev", "nofail", "owner", "group", "noowner", "relatime", "norelatime", "async")
)


@dataclass(slots=True)
class FuseOptions:
    """What `-o` says, in the words of mount(8) and mount.fuse3(8).

    `flags` go to libfuse as they stand. `umask` 0007 gives files mode 0440 and directories 0550.
    """

    uid: int = field(default_factory=os.getuid)
    gid: int = field(default_factory=os.getgid)
    umask: int = 0o007
    nonempty: bool = False
    flags: set[str] = field(default_factory=set)

    @classmethod
    def parse(cls, texts: Iterable[str]) -> FuseOptions:
        """From the arguments of all `-o`. Raises UsageError."""
        options = cls()
        for option in ",".join(texts).split(","):
            if option:
                options._take(option)
        return options

    def _take(self, option: str) -> None:
        name, _equals, value = option.partition("=")
        if option in _PASSED_ON:
            self.flags.add(option)
        elif option == "nonempty":
            self.nonempty = True
        elif option in ("rw", "remount"):
            raise UsageError(f"mount option {option}: backups are mounted read-only")
        elif name in ("uid", "gid"):
            setattr(self, name, _number(option, value, 10, 0xFFFFFFFE))
        elif name == "umask":
            self.umask = _number(option, value, 8, 0o777)
        elif option not in _FULFILLED | _FULFILLED_ALSO and not name.startswith(("x-", "X-", "comment")):
            raise UsageError(
                f"mount option '{option}' is not known; there are allow_other, allow_root, uid=, gid=, "
                "umask=, nonempty, and the general ones of mount(8)"
            )


def _number(option: str, value: str, base: int, most: int) -> int:
    try:
        number = int(value, base)
    except ValueError:
        number = -1
    if not 0 <= number <= most or not value.isalnum():
        raise UsageError(
            f"mount option '{option}': not a number from 0 to {f'{most:o} (octal)' if base == 8 else most}"
        )
    return number

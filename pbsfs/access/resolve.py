"""From resolved options to the description of a source: its secret, trust, proxy and keys.

The one place that asks the user. Called by the command line and by nbdkit's parameters, once. Synchronous;
it may connect to the server.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from pbsfs.access.credentials import KEY_PASSWORD_VARIABLE, PASSWORD_VARIABLE, find_secret
from pbsfs.access.description import Access, Description, DirectoryAccess, ServerAccess, identity_of
from pbsfs.access.keyring import KeyRing, read_keys
from pbsfs.access.login import log_in
from pbsfs.access.options import SourceOptions
from pbsfs.access.references import read_reference
from pbsfs.access.terminal import Terminal
from pbsfs.access.tickets import Tickets
from pbsfs.access.trust import find_trust, read_ca
from pbsfs.base.errors import ConnectError, ResolveError, UsageError
from pbsfs.base.names import Namespace
from pbsfs.base.secret import Secret, Ticket
from pbsfs.formats.keyfile import MAX_KEY_FILE_SIZE, KeyFile
from pbsfs.runtime.places import config_home
from pbsfs.sources.http.proxy import Proxy, find_proxy
from pbsfs.sources.http.tls import Trust
from pbsfs.sources.server.repository import Repository


def describe(
    options: SourceOptions,
    environment: Mapping[str, str],
    terminal: Terminal | None,
    *,
    secret: Secret | None = None,
    ask_for_default: bool = False,
) -> Description:
    """The source that resolved options name, with its secret and keys.

    `secret`: instead of that of the environment or profile. `ask_for_default`: see `open_keys`. Raises
    UsageError, KeyFileError, PasswordError, AuthError, and what connecting to the server raises.
    """
    namespace = Namespace.parse(options.namespace or "")
    try:
        access = _find(options, environment, terminal, secret)
    except (ConnectError, ResolveError) as error:
        if options.cache is None or options.offline:
            raise
        unasked = _find(replace(options, offline=True), environment, None, None)
        raise options.cache.with_hint(error, identity_of(unasked)[1]) from None
    keys = open_keys(options, environment, terminal, ask_for_default=ask_for_default)
    return Description(access, namespace, keys, options.limit_rate, options.cache)


def _find(
    options: SourceOptions,
    environment: Mapping[str, str],
    terminal: Terminal | None,
    secret: Secret | None,
) -> Access:
    """How to get at the source of resolved options. Raises like `describe`."""
    if options.datastore_dir is not None:
        return DirectoryAccess(options.datastore_dir)
    if options.bucket is not None:
        from pbsfs.access.buckets import find_bucket  # noqa: PLC0415 - slow to import, and seldom needed

        return find_bucket(options, environment, terminal)
    if options.offline:
        assert options.repository is not None
        return ServerAccess(Repository.parse(options.repository), Secret(""), Trust())  # it is not asked
    return find_access(options, environment, terminal, secret)


def find_access(
    options: SourceOptions,
    environment: Mapping[str, str],
    terminal: Terminal | None,
    secret: Secret | None = None,
) -> ServerAccess:
    """How to get at the server of resolved options. `secret`: instead of that of the environment or profile.

    Raises UsageError, and what connecting raises.
    """
    assert options.repository is not None
    repository = Repository.parse(options.repository)
    proxy = find_proxy(repository, environment)
    # Before the password: users should type it only after the server is trusted.
    trust = trust_of(options, repository, proxy, environment, terminal)
    if secret is None:
        secret = password_of(options, repository, environment, terminal)
    elif not secret.reveal():
        raise _no_password(repository)
    secret = logged_in(repository, secret, trust, proxy, terminal)
    return ServerAccess(repository, secret, trust, proxy, options.retry_timeout, options.connections)


def trust_of(
    options: SourceOptions,
    repository: Repository,
    proxy: Proxy | None,
    environment: Mapping[str, str],
    terminal: Terminal | None,
) -> Trust:
    """By what the server of resolved options is trusted. Raises UsageError, and what connecting raises."""
    if options.ca_file is not None and not options.fingerprint:
        return Trust(ca=read_ca(options.ca_file))
    return find_trust(options.fingerprint, repository, proxy, environment, terminal)


def password_of(
    options: SourceOptions,
    repository: Repository,
    environment: Mapping[str, str],
    terminal: Terminal | None,
) -> Secret:
    """The password or token's secret of resolved options, the ticket of `pbsfs login`, or the user's answer.

    The first of these that there is. Raises UsageError.
    """
    secret = given_password(options, environment)
    if secret is None and repository.token is None:
        login = Tickets(environment).find(repository)
        secret = None if login is None else login.ticket
    return ask_password(repository, terminal) if secret is None else secret


def given_password(options: SourceOptions, environment: Mapping[str, str]) -> Secret | None:
    """The password or token's secret of resolved options or the environment. Raises UsageError."""
    if options.password is not None:
        return read_reference(options.password, environment)
    secret = find_secret(PASSWORD_VARIABLE, "password", environment)
    return secret if secret is not None and secret.reveal() else None  # a variable may be empty


def ask_password(repository: Repository, terminal: Terminal | None) -> Secret:
    """The user's answer. Raises UsageError if nobody can be asked."""
    if terminal is None:
        raise _no_password(repository)
    what = "password" if repository.token is None else "secret"
    return terminal.password(f"{what} of {repository.auth_id} at {repository.address}")


def logged_in(
    repository: Repository, secret: Secret, trust: Trust, proxy: Proxy | None, terminal: Terminal | None
) -> Secret:
    """`secret`, or the ticket of a login with this password if somebody can be asked for a second factor.

    Raises like `log_in`.
    """
    if terminal is None or repository.token is not None or isinstance(secret, Ticket):
        return secret
    return log_in(repository, secret, trust, proxy, terminal)


def _no_password(repository: Repository) -> UsageError:
    return UsageError(
        f"no password for {repository.auth_id} at {repository.address}: set PBS_PASSWORD (or "
        "PBS_PASSWORD_FD, _FILE, _CMD), password in a profile, or password-file= in fstab; for an API token "
        "it is the token's secret; or run pbsfs login at a terminal"
    )


def open_keys(
    options: SourceOptions,
    environment: Mapping[str, str],
    terminal: Terminal | None,
    *,
    ask_for_default: bool = False,
) -> KeyRing:
    """The keys that the options name, or else those in the usual places.

    `ask_for_default`: for commands that read contents; a listing does not need the password of a key that the
    user did not name. Raises UsageError, KeyFileError, PasswordError.
    """
    given = None
    if options.keyfd is not None:
        if not 0 <= options.keyfd < 1 << 31:
            raise UsageError(f"--keyfd {options.keyfd}: not a descriptor's number; give one that is open")
        try:
            with open(options.keyfd, "rb") as file:
                given = file.read(MAX_KEY_FILE_SIZE + 1)
        except OSError as error:
            raise UsageError(
                f"--keyfd {options.keyfd}: {error.strerror}; give a descriptor that is open"
            ) from None

    def ask(path: Path, file: KeyFile) -> Secret | None:
        if terminal is None:
            return None
        hint = f" (hint: {file.hint})" if file.hint else ""
        return terminal.password(f"password of the key {path}{hint}")

    if options.key_password is not None:
        password: Secret | None = read_reference(options.key_password, environment)
    else:
        password = find_secret(KEY_PASSWORD_VARIABLE, "encryption-password", environment)
    return read_keys(
        options.keyfiles,
        given=given,
        password=password,
        ask=ask,
        ask_for_default=ask_for_default and terminal is not None,
        config_home=config_home(environment),
    )

"""What names a source: options, completed from the environment.

`resolve` reads what can be read only once (a descriptor, a command) and no secret. Used by the command line
and by nbdkit's parameters; `pbsfs.access.resolve` makes a description of the result. Synchronous.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pbsfs.access.caching import CacheAccess, find_cache
from pbsfs.access.credentials import (
    CREDENTIALS_DIRECTORY,
    FORMS,
    PASSWORD_VARIABLE,
    find_setting,
    has_credential,
)
from pbsfs.access.description import Description
from pbsfs.access.references import Reference
from pbsfs.base.errors import SourceError, UsageError
from pbsfs.sources.bucket.address import BucketAddress
from pbsfs.sources.server.repository import Repository, parse_port

log = logging.getLogger(__name__)

REPOSITORY_VARIABLE = "PBS_REPOSITORY"
FINGERPRINT_VARIABLE = "PBS_FINGERPRINT"
NAMESPACE_VARIABLE = "PBS_NAMESPACE"
DIRECTORY_VARIABLE = "PBSFS_DATASTORE_DIR"
BUCKET_VARIABLE = "PBSFS_BUCKET"
PROFILE_VARIABLE = "PBSFS_PROFILE"

PARTS = {"server": "PBS_SERVER", "port": "PBS_PORT", "datastore": "PBS_DATASTORE", "auth_id": "PBS_AUTH_ID"}
"""The parts of a repository: the fields of `SourceOptions`, and the variables that complete them."""

KEYS_OF_BUCKETS = ("anonymous", "aws_profile", "s3_config", "secret_key")
"""The fields that say where the key of a bucket comes from."""

OF_BUCKETS = ("endpoint", "region", "path_style", "access_key", *KEYS_OF_BUCKETS)
"""The fields that are only for a bucket."""


@dataclass(frozen=True, slots=True)
class SourceOptions:
    """The options that name a source; `resolve` completes it from the environment.

    `server`, `port`, `datastore`, `auth_id`: the parts of a repository, instead of `repository`.
    `namespace`: the one to start at. `retry_timeout` None: the default of the server source. `limit_rate`:
    the bytes a second that are fetched at most. `cache_dir`, `cache_disk_size` (bytes), `offline`: the cache
    on disk; `cache`: what `resolve` makes of them and the environment. `profile`: the profile that names the
    source, until `pbsfs.access.config.configure` has put its settings here. `ca_file`: the CA to trust,
    instead of the system's. `bucket`: `s3://BUCKET/STORE`; those in OF_BUCKETS are only for one. Only
    profiles set `password`, `key_password`, `access_key` and `secret_key`.
    """

    repository: str | None = None
    datastore_dir: Path | None = None
    fingerprint: str | None = None
    retry_timeout: float | None = None
    connections: int | None = None
    limit_rate: int | None = None
    cache_dir: Path | None = None
    cache_disk_size: int | None = None
    offline: bool = False
    cache: CacheAccess | None = None
    keyfiles: tuple[Path, ...] = ()
    keyfd: int | None = None
    server: str | None = None
    port: int | None = None
    datastore: str | None = None
    auth_id: str | None = None
    namespace: str | None = None
    profile: str | None = None
    ca_file: Path | None = None
    password: Reference | None = None
    key_password: Reference | None = None
    bucket: str | None = None
    endpoint: str | None = None
    region: str | None = None
    path_style: bool | None = None
    anonymous: bool | None = None
    aws_profile: str | None = None
    s3_config: Path | None = None
    access_key: str | None = None
    secret_key: Reference | None = None

    def names_source(self) -> bool:
        """Whether these options name a source."""
        return bool(self.given())

    def given(self) -> list[str]:
        """The fields that name a source and have a value."""
        fields = ("profile", "repository", *PARTS, "datastore_dir", "bucket")
        return [name for name in fields if getattr(self, name) is not None]


def option_of(name: str) -> str:
    """The option of the command line for a field of `SourceOptions`."""
    return "--" + name.replace("_", "-")


def check_exclusive(options: SourceOptions, option: Callable[[str], str] = option_of) -> None:
    """Raises UsageError if the options name more than one source, certificate or key of a bucket."""
    kinds = {"parts" if name in PARTS else name: name for name in reversed(options.given())}
    for names in (list(reversed(kinds.values())), ["fingerprint", "ca_file"], KEYS_OF_BUCKETS):
        given = [name for name in names if getattr(options, name) not in (None, False)]
        if len(given) > 1:
            named = " and ".join(map(option, given))
            raise UsageError(f"{named} exclude each other; give one of them")


def names_source(environment: Mapping[str, str]) -> bool:
    """Whether the environment names a source; reads nothing."""
    repositories = [REPOSITORY_VARIABLE + form for form in FORMS]
    wanted = (DIRECTORY_VARIABLE, BUCKET_VARIABLE, PARTS["datastore"], *repositories)
    return any(environment.get(name) for name in wanted) or has_credential("repository", environment)


def names_server(environment: Mapping[str, str]) -> bool:
    """Whether the environment names a source, or the server of one: then its password is for that."""
    return names_source(environment) or bool(environment.get(PARTS["server"]))


def names_other_server(repository: Repository, environment: Mapping[str, str]) -> bool:
    """Whether the environment names another server, or user of one: then its password is for that.

    Raises UsageError.
    """
    unused = {
        DIRECTORY_VARIABLE,
        BUCKET_VARIABLE,
        *(FINGERPRINT_VARIABLE + form for form in FORMS),
    }  # a descriptor is read once
    kept = {name: value for name, value in environment.items() if name not in unused}
    if not names_server(kept):
        return False
    kept.setdefault(PARTS["datastore"], repository.store)
    found = Repository.parse(resolve(SourceOptions(), kept).repository or "")
    return (found.auth_id, found.address) != (repository.auth_id, repository.address)


def without_source(environment: Mapping[str, str]) -> Mapping[str, str]:
    """The environment without what belongs to the source that it names: it is not for another source.

    The password of keys stays, unless it is a systemd credential.
    """
    names = {DIRECTORY_VARIABLE, BUCKET_VARIABLE, NAMESPACE_VARIABLE, CREDENTIALS_DIRECTORY, *PARTS.values()}
    for variable in (REPOSITORY_VARIABLE, FINGERPRINT_VARIABLE, PASSWORD_VARIABLE):
        names |= {variable + form for form in FORMS}
    return {name: value for name, value in environment.items() if name not in names}


def resolve(
    options: SourceOptions, environment: Mapping[str, str], option: Callable[[str], str] = option_of
) -> SourceOptions:
    """`options`, completed from the environment: with `repository`, `datastore_dir` or `bucket`, and
    `namespace`.

    The first of these that is given: a directory, a bucket, a repository or its parts as options (the
    variables complete the parts); PBSFS_DATASTORE_DIR; PBSFS_BUCKET; PBS_REPOSITORY, or the systemd
    credential; the parts as variables. The rules for the server are those of proxmox-backup-client 4.1.8.
    `option`: the caller's name for a field of `SourceOptions`. Raises UsageError.

    The variables of a cache on disk are not for directories, which are seldom slower than it.
    """
    resolved = _resolve(options, environment, option)
    variables = environment if resolved.datastore_dir is None or options.offline else {}
    cache = find_cache(options.cache_dir, options.cache_disk_size, options.offline, variables, option)
    return replace(resolved, cache=cache)


def _resolve(
    options: SourceOptions, environment: Mapping[str, str], option: Callable[[str], str]
) -> SourceOptions:
    given = options.given()
    check_exclusive(options, option)
    if options.namespace is None:
        options = replace(options, namespace=environment.get(NAMESPACE_VARIABLE, ""))
    if options.datastore_dir is None and (
        options.bucket is not None
        or (not given and not environment.get(DIRECTORY_VARIABLE) and environment.get(BUCKET_VARIABLE))
    ):
        bucket = environment[BUCKET_VARIABLE] if options.bucket is None else options.bucket
        return replace(options, bucket=str(BucketAddress.parse(bucket)))
    for name in OF_BUCKETS:
        if getattr(options, name) is not None:
            raise UsageError(f"{option(name)} is for a bucket; leave it out, or give {option('bucket')}")
    if options.datastore_dir is not None:
        return replace(options, datastore_dir=Path(os.path.abspath(options.datastore_dir)))
    if not given and environment.get(DIRECTORY_VARIABLE):
        return replace(options, datastore_dir=_directory_of(environment))
    text = options.repository
    if not given:
        text = find_setting(REPOSITORY_VARIABLE, "repository", environment)
    repository = Repository.parse(text) if text is not None else _of_parts(options, environment, option)
    fingerprint = options.fingerprint
    if fingerprint is None and options.ca_file is None:
        fingerprint = find_setting(FINGERPRINT_VARIABLE, "fingerprint", environment)
    return replace(
        options,
        repository=str(repository),
        fingerprint=fingerprint or "",  # not None: a descriptor or command is read once only
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
        raise SourceError(
            f"{DIRECTORY_VARIABLE}: {directory}: {error.strerror}; correct or unset it{unused}"
        ) from None
    if not stat.S_ISDIR(kind):
        raise SourceError(
            f"{DIRECTORY_VARIABLE}: {directory} is not a directory; correct or unset it{unused}"
        )
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
            f"a datastore's directory with {option('datastore_dir')} or {DIRECTORY_VARIABLE}, "
            f"a bucket with {option('bucket')} or {BUCKET_VARIABLE}, "
            f"or a profile with {option('profile')} or {PROFILE_VARIABLE}, which pbsfs config init writes"
        )
    port = parts["port"]
    try:
        number = parse_port(port) if isinstance(port, str) else port
    except UsageError as error:
        raise UsageError(f"{PARTS['port']}: {error}") from None
    return Repository.of_parts(parts["auth_id"], parts["server"], number, parts["datastore"])


SOURCE_ATTRIBUTE = "user.pbs.source"
"""The extended attribute in which a mount names its source."""


def shown_source(description: Description, subtree: str = "") -> bytes:
    """What a mount shows of its source: a JSON object without secrets.

    It has `repository` and `fingerprint`, or `datastore_dir`, or `bucket` and what reaches that; `namespace`;
    and `subtree`, the place in the tree that the mount shows at its root.
    """
    place = {"namespace": str(description.namespace), "subtree": subtree}
    return json.dumps(description.access.public() | place).encode()


def named_by(shown: bytes) -> tuple[SourceOptions, str]:
    """The options that name the source of a mount that shows this, and its subtree.

    Raises SourceError for anything else.
    """
    with contextlib.suppress(ValueError, TypeError, AttributeError):
        facts = json.loads(shown)
        directory = facts.get("datastore_dir")
        options = SourceOptions(
            repository=facts.get("repository"),
            datastore_dir=None if directory is None else Path(directory),
            fingerprint=facts.get("fingerprint"),
            bucket=facts.get("bucket"),
            endpoint=facts.get("endpoint"),
            region=facts.get("region"),
            path_style=None if facts.get("path_style") is None else facts["path_style"] == "true",
            anonymous=True if facts.get("anonymous") == "true" else None,
            namespace=str(facts.get("namespace", "")),
        )
        if options.names_source():
            return options, str(facts.get("subtree", ""))
    raise SourceError(f"{SOURCE_ATTRIBUTE}: the mount does not name its source")

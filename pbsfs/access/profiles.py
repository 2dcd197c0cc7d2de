"""Profiles: named settings of a source in a configuration file, checked by hand.

`pbsfs.access.config` reads the files and gives each profile's table here. Pure, but for `~` in paths.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pbsfs.access.caching import parse_disk_size
from pbsfs.access.options import KEYS_OF_BUCKETS, OF_BUCKETS, SourceOptions
from pbsfs.access.references import parse_path, parse_reference
from pbsfs.access.sizes import parse_cache_size, parse_rate
from pbsfs.base.errors import UsageError
from pbsfs.base.names import Namespace
from pbsfs.base.text import quoted
from pbsfs.runtime.logs import parse_format
from pbsfs.sources.bucket.address import BucketAddress
from pbsfs.sources.http.tls import parse_fingerprint
from pbsfs.sources.server.repository import Repository

NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,63}", re.ASCII)
"""The name of a profile. It has no colon, which ends it in `NAME:PATH`, and no slash."""

MAX_CONNECTIONS = 16
MAX_ITEMS = 100
"""Entries of a list."""

SECRETS = ("password", "key-password", "secret-key")
"""The keys whose values are references to secrets."""


@dataclass(frozen=True, slots=True)
class Profile:
    """What a configuration file says under a name. `file`: the one that has it.

    `options`: the source. `cache_size` and `log_format` are for mounts and nbd, `refresh` (seconds) and
    `mount_options` for mounts; None or empty where the file does not say.
    """

    name: str
    file: Path
    options: SourceOptions
    cache_size: str | None = None
    refresh: float | None = None
    mount_options: tuple[str, ...] = ()
    log_format: str | None = None


def parse_profile(name: str, table: Any, file: Path, environment: Mapping[str, str]) -> Profile:
    """The profile that `table` of a TOML file describes. Raises UsageError, which never shows a secret."""
    if not NAME.fullmatch(name):
        raise UsageError(
            f"{file}: {quoted(name)} is not the name of a profile; use letters, digits, '.', '_' and '-'"
        )
    label = f"{file}: profiles.{name}"
    if not isinstance(table, dict):
        raise UsageError(f"{label}: not a table; write [profiles.{name}], and its settings below")
    check_keys(label, table, KEYS)
    found: dict[str, Any] = {}
    for key, value in table.items():
        setting = f"{label}.{key}"
        if key in SECRETS:
            found[key] = parse_reference(setting, value, environment, name)
        else:
            found[key] = KEYS[key].check(setting, value)
    sources = [key for key in SOURCES if key in found]
    if len(sources) != 1:
        problem = f"{' and '.join(sources)} exclude each other" if sources else "names no source"
        raise UsageError(f"{label}: {problem}; give repository, datastore-dir or bucket")
    _check_bucket(label, found)
    if "fingerprint" in found and "ca-file" in found:
        raise UsageError(f"{label}: fingerprint and ca-file exclude each other; give one of them")
    return Profile(
        name=name,
        file=file,
        options=SourceOptions(
            repository=found.get("repository"),
            datastore_dir=found.get("datastore-dir"),
            fingerprint=found.get("fingerprint"),
            ca_file=found.get("ca-file"),
            password=found.get("password"),
            key_password=found.get("key-password"),
            namespace=found.get("namespace"),
            keyfiles=found.get("keyfile", ()),
            retry_timeout=found.get("retry-timeout"),
            connections=found.get("connections"),
            limit_rate=found.get("limit-rate"),
            bucket=found.get("bucket"),
            endpoint=found.get("endpoint"),
            region=found.get("region"),
            path_style=found.get("path-style"),
            anonymous=found.get("anonymous"),
            aws_profile=found.get("aws-profile"),
            s3_config=found.get("s3-config"),
            access_key=found.get("access-key"),
            secret_key=found.get("secret-key"),
            cache_dir=found.get("cache-dir"),
            cache_disk_size=found.get("cache-disk-size"),
        ),
        cache_size=found.get("cache-size"),
        refresh=found.get("refresh"),
        mount_options=found.get("mount-options", ()),
        log_format=found.get("log-format"),
    )


def shown_settings(profile: Profile) -> dict[str, str | list[str]]:
    """The settings of a profile by their keys, and the file that has them; of secrets, the places."""
    options = profile.options
    found: dict[str, Any] = {
        "repository": options.repository,
        "datastore-dir": options.datastore_dir,
        "bucket": options.bucket,
        "endpoint": options.endpoint,
        "region": options.region,
        "path-style": _word(options.path_style),
        "access-key": options.access_key,
        "secret-key": options.secret_key,
        "aws-profile": options.aws_profile,
        "s3-config": options.s3_config,
        "anonymous": _word(options.anonymous),
        "namespace": options.namespace,
        "password": options.password,
        "fingerprint": options.fingerprint,
        "ca-file": options.ca_file,
        "keyfile": options.keyfiles,
        "key-password": options.key_password,
        "cache-size": profile.cache_size,
        "connections": options.connections,
        "limit-rate": options.limit_rate,
        "cache-dir": options.cache_dir,
        "cache-disk-size": options.cache_disk_size,
        "retry-timeout": options.retry_timeout,
        "refresh": profile.refresh,
        "mount-options": profile.mount_options,
        "log-format": profile.log_format,
        "file": profile.file,
    }
    return {
        key: [str(each) for each in value] if isinstance(value, tuple) else str(value)
        for key, value in found.items()
        if value is not None and value != ()
    }


def _word(value: bool | None) -> str | None:
    """A truth value as TOML writes it."""
    return None if value is None else str(value).lower()


SOURCES = ("repository", "datastore-dir", "bucket")
"""The keys of which a profile has one."""


def _check_bucket(label: str, found: Mapping[str, Any]) -> None:
    """Raises UsageError if the settings of a bucket do not fit together."""
    if "bucket" not in found:
        for key in (name.replace("_", "-") for name in OF_BUCKETS):
            if key in found:
                raise UsageError(f"{label}: {key} is for a bucket; leave it out, or give bucket")
        return
    if "password" in found:
        raise UsageError(f"{label}: a bucket has no password; give access-key and secret-key")
    if ("access-key" in found) != ("secret-key" in found):
        raise UsageError(f"{label}: access-key and secret-key belong together; give both")
    ways = [key for key in (name.replace("_", "-") for name in KEYS_OF_BUCKETS) if found.get(key)]
    if len(ways) > 1:
        raise UsageError(f"{label}: {' and '.join(ways)} exclude each other; give one of them")


def check_keys(label: str, table: Mapping[str, Any], known: Mapping[str, Any]) -> None:
    """Raises UsageError for a key that is not known; it suggests the one that was probably meant."""
    for key in table:
        if key not in known:
            meant = _HABITS.get(key) or next(iter(difflib.get_close_matches(key, known, n=1)), None)
            advice = f"did you mean {meant}?" if meant in known else f"use {', '.join(known)}"
            raise UsageError(f"{label}: unknown key {quoted(key)}; {advice}")


_HABITS = {
    "ns": "namespace",
    "keyfiles": "keyfile",
    "key-file": "keyfile",
    "key-files": "keyfile",
    "secret": "password",
    "token-secret": "password",
    "encryption-password": "key-password",
    "ca": "ca-file",
    "endpoint-url": "endpoint",
    "access-key-id": "access-key",
    "secret-access-key": "secret-key",
    "cache": "cache-size",
    "rate": "limit-rate",
    "options": "mount-options",
    "datastore": "repository",
    "server": "repository",
    "directory": "datastore-dir",
    "profile": "profiles",
}
"""Names that users may expect, and the keys that pbsfs has."""


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str) or "\0" in value:
        raise UsageError(f'{name}: not text; put it in quotes: "…"')
    return value


def _checked(check: Callable[[str], object]) -> Callable[[str, Any], str]:
    """Text that `check` accepts."""

    def convert(name: str, value: Any) -> str:
        text = _text(name, value)
        try:
            check(text)
        except UsageError as error:
            raise UsageError(f"{name}: {error}") from None
        return text

    return convert


def _check_repository(text: str) -> None:
    if not text:
        raise UsageError("the repository is empty; give user@realm!token@host:datastore")
    Repository.parse(text)


def _truth(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise UsageError(f"{name}: not true or false; give one of them, without quotes")
    return value


def _filled(name: str, value: Any) -> str:
    text = _text(name, value)
    if not text:
        raise UsageError(f"{name}: empty; leave it out, or give a value")
    return text


def _check_region(text: str) -> None:
    BucketAddress.parse("s3://any/any", region=text)


def _check_endpoint(text: str) -> None:
    BucketAddress.parse("s3://any/any", endpoint=text)


def _several(name: str, value: Any) -> list[Any]:
    values = value if isinstance(value, list) else [value]
    if len(values) > MAX_ITEMS:
        raise UsageError(f"{name}: {len(values)} entries are too many; {MAX_ITEMS} is the most")
    return values


def _paths(name: str, value: Any) -> tuple[Path, ...]:
    return tuple(parse_path(name, each) for each in _several(name, value))


def _texts(name: str, value: Any) -> tuple[str, ...]:
    return tuple(_text(name, each) for each in _several(name, value))


def _seconds(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1e9:
        raise UsageError(f"{name}: not a number of seconds; give one from 0 on")
    return float(value)


def _connections(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MAX_CONNECTIONS:
        raise UsageError(f"{name}: not a number of connections; give one from 1 to {MAX_CONNECTIONS}")
    return value


def _rate(name: str, value: Any) -> int:
    return parse_rate(_checked(parse_rate)(name, value))


def _disk_size(name: str, value: Any) -> int:
    return parse_disk_size(_checked(parse_disk_size)(name, value))


@dataclass(frozen=True, slots=True)
class Key:
    """A key of a profile. `meaning`: for users. `check`: converts the value (name, value); raises UsageError.

    Of those in SECRETS, `parse_reference` converts the value.
    """

    meaning: str
    check: Callable[[str, Any], Any]


KEYS = {
    "repository": Key(
        "The server: [[user@realm[!token]@]host[:port]:]datastore.", _checked(_check_repository)
    ),
    "datastore-dir": Key("The directory of a datastore, instead of repository.", parse_path),
    "bucket": Key(
        "The datastore in an S3 bucket, s3://BUCKET/DATASTORE, instead of repository.",
        _checked(BucketAddress.parse),
    ),
    "endpoint": Key("The object store of bucket: https://HOST[:PORT].", _checked(_check_endpoint)),
    "region": Key("The region of bucket.", _checked(_check_region)),
    "path-style": Key("Name bucket in the path (true) or in the host's name (false).", _truth),
    "access-key": Key("The ID of the access key for bucket.", _filled),
    "secret-key": Key("The secret of access-key: a reference to a secret.", _text),
    "aws-profile": Key("Take the access key from this profile in the files of AWS's tools.", _filled),
    "s3-config": Key("Take endpoint and access key from this s3.cfg of a Proxmox Backup Server.", parse_path),
    "anonymous": Key("Read a public bucket, without an access key.", _truth),
    "namespace": Key("Start at this namespace.", _checked(Namespace.parse)),
    "password": Key("The password, or the secret of an API token: a reference to a secret.", _text),
    "fingerprint": Key("Trust only the certificate with this SHA-256.", _checked(parse_fingerprint)),
    "ca-file": Key(
        "Trust only certificates that a CA in this PEM file signed, instead of fingerprint.", parse_path
    ),
    "keyfile": Key("Decrypt with this key file, those in this directory, or a list of both.", _paths),
    "key-password": Key("The password of the key files: a reference to a secret.", _text),
    "cache-size": Key(
        'Keep decoded chunks of pbsfs mount and pbsfs nbd in this much memory, such as "512M".',
        _checked(parse_cache_size),
    ),
    "connections": Key("Open this many connections to the server for each snapshot, 1 to 16.", _connections),
    "cache-dir": Key("Keep what was fetched in this directory.", parse_path),
    "cache-disk-size": Key('Use at most this much of the disk for cache-dir, such as "50G".', _disk_size),
    "limit-rate": Key('Fetch at most this much in a second from the source, such as "50M".', _rate),
    "retry-timeout": Key("Retry for this many seconds while the server is unreachable.", _seconds),
    "refresh": Key("Look for new backups of a mount after this many seconds.", _seconds),
    "mount-options": Key(
        'Mount options, as text or a list: ["allow_other", "gid=100"]. Those of the command line come after '
        "them.",
        _texts,
    ),
    "log-format": Key(
        'Write the log of pbsfs mount and pbsfs nbd as "text", or as "json": one object per line.',
        _checked(parse_format),
    ),
}
"""The keys of a profile."""

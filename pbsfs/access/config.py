"""The configuration: TOML files with named profiles, and what they add to options and environment.

pbsfs reads `/etc/pbsfs/config.toml`, `/etc/pbsfs/conf.d/*.toml`, then the same two in the user's directory of
settings (`~/.config/pbsfs`). A profile of the user replaces one of the system with the same name. pbsfs reads
no file if options or variables name a source without a profile.

Called by the command line, nbdkit's parameters and mount.pbsfs before `resolve`. Synchronous.
"""

from __future__ import annotations

import difflib
import logging
import os
import re
import stat
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from pbsfs.access.caching import CACHE_VARIABLE, SIZE_VARIABLE
from pbsfs.access.credentials import (
    KEY_PASSWORD_VARIABLE,
    PASSWORD_VARIABLE,
    names_secret,
    others_can_write,
)
from pbsfs.access.options import (
    FINGERPRINT_VARIABLE,
    NAMESPACE_VARIABLE,
    PROFILE_VARIABLE,
    SourceOptions,
    check_exclusive,
    names_server,
    names_source,
    option_of,
    resolve,
    without_source,
)
from pbsfs.access.profiles import NAME, Profile, check_keys, parse_profile
from pbsfs.base.errors import UsageError
from pbsfs.base.names import BACKUP_TYPES
from pbsfs.base.text import first_of, one_line, quoted
from pbsfs.runtime.places import config_home
from pbsfs.sources.bucket.address import SCHEME

log = logging.getLogger(__name__)

T = TypeVar("T")

SYSTEM_DIRECTORY = Path("/etc/pbsfs")

DEFAULT_PROFILE = "default"
"""The profile that counts where nothing else names a source."""

MAX_FILE_SIZE = 1 << 20
MAX_FILES = 1000
"""Files of one conf.d."""

_PLACES = frozenset((*BACKUP_TYPES, "ns", "files"))  # what paths in a source begin with
_PREFIX = re.compile(rf"({NAME.pattern}):(.*)", re.ASCII | re.DOTALL)


@dataclass(frozen=True, slots=True)
class Configuration:
    """What the files say. A profile's table is checked when the profile is used.

    `files`: those that were read, in order. `skipped`: files of the system that this user may not read.
    `shared`: those of `files` that a group can write; they may name no commands.
    """

    files: tuple[Path, ...]
    skipped: tuple[Path, ...]
    shared: frozenset[Path]
    environment: Mapping[str, str] = field(repr=False)
    tables: Mapping[str, tuple[Path, Any]] = field(repr=False)

    def __contains__(self, name: str) -> bool:
        return name in self.tables

    def profile(self, name: str) -> Profile:
        """Raises UsageError if there is no such profile, or if it is not valid."""
        if name not in self.tables:
            raise UsageError(f"profile {quoted(name)}: not in the configuration; {self._advice(name)}")
        file, table = self.tables[name]
        found = parse_profile(name, table, file, self.environment)
        options = found.options
        secrets = (options.password, options.key_password, options.secret_key)
        if file in self.shared and any(secret and secret.kind == "command" for secret in secrets):
            raise UsageError(
                f"{file}: profiles.{name} names a command, and a group can write the file; "
                "run chmod g-w on it"
            )
        return found

    def _advice(self, name: str) -> str:
        if close := difflib.get_close_matches(name, self.tables, n=1):
            return f"did you mean {close[0]}?"
        if self.skipped:
            return f"this user may not read {first_of(map(str, self.skipped))}"
        if self.tables:
            return f"use {first_of(self.tables)}"
        return "pbsfs config init writes a first profile"


def directories(environment: Mapping[str, str]) -> list[Path]:
    """The directories of configuration files: the system's, then the user's if there is a home directory."""
    home = config_home(environment)
    return [SYSTEM_DIRECTORY] if home is None else [SYSTEM_DIRECTORY, home / "pbsfs"]


def read_configuration(environment: Mapping[str, str]) -> Configuration:
    """Reads all files that exist. Raises UsageError for one that can't be used; the error names it."""
    files: list[Path] = []
    skipped: list[Path] = []
    shared: set[Path] = set()
    tables: dict[str, tuple[Path, Any]] = {}
    for directory in directories(environment):
        found: dict[str, tuple[Path, Any]] = {}
        for file in [directory / "config.toml", *_drop_ins(directory / "conf.d", skipped)]:
            try:
                text = _read(file, shared)
            except FileNotFoundError:
                continue
            except PermissionError as error:
                if directory == SYSTEM_DIRECTORY:
                    log.info("not used: %s: %s", file, error.strerror)
                    skipped.append(file)
                    continue
                raise UsageError(f"{file}: {error.strerror}; make it readable with chmod u+r") from None
            except OSError as error:
                raise UsageError(f"{file}: {error.strerror}; repair or remove it") from None
            files.append(file)
            for name, table in _profiles_in(file, text).items():
                if name in found:
                    raise UsageError(
                        f"{file}: profile {quoted(name)} is in {found[name][0]} too; remove one of them"
                    )
                found[name] = file, table
        tables |= found
    return Configuration(tuple(files), tuple(skipped), frozenset(shared), environment, tables)


def _drop_ins(directory: Path, skipped: list[Path]) -> list[Path]:
    """The files in a `conf.d`. The system's may be closed to this user: it is `skipped` then."""
    try:
        found = sorted(entry for entry in directory.iterdir() if entry.suffix == ".toml")
    except FileNotFoundError:
        return []
    except PermissionError as error:
        if directory.parent == SYSTEM_DIRECTORY:
            log.info("not used: %s: %s", directory, error.strerror)
            skipped.append(directory)
            return []
        raise UsageError(f"{directory}: {error.strerror}; make it readable with chmod u+rx") from None
    except OSError as error:
        raise UsageError(f"{directory}: {error.strerror}; repair or remove it") from None
    if len(found) > MAX_FILES:
        raise UsageError(f"{directory}: {len(found)} files are too many; {MAX_FILES} is the most")
    return found


def _read(file: Path, shared: set[Path]) -> bytes:
    """The content of a file, which gets into `shared` if others can write it. Raises OSError, UsageError."""
    fd = os.open(file, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a named pipe may have no writer
    with open(fd, "rb") as opened:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode):
            raise UsageError(f"{file}: not a regular file; remove it")
        # It names the server that gets the password.
        if found.st_uid not in (0, os.geteuid()):
            raise UsageError(f"{file}: belongs to another user; change that with chown, or remove it")
        if found.st_mode & stat.S_IWOTH:
            raise UsageError(f"{file}: every user of this machine may write it; run chmod o-w on it")
        if others_can_write(found):
            shared.add(file)
        text = opened.read(MAX_FILE_SIZE + 1)
    if len(text) > MAX_FILE_SIZE:
        raise UsageError(f"{file}: larger than {MAX_FILE_SIZE >> 20} MiB; it is not a configuration file")
    return text


def _profiles_in(file: Path, text: bytes) -> Mapping[str, Any]:
    """The tables of profiles in a file. Source of the syntax: https://toml.io/en/v1.0.0."""
    import tomllib  # noqa: PLC0415 - most users have no such file

    try:
        content = tomllib.loads(text.decode())
    except UnicodeDecodeError:
        raise UsageError(f"{file}: not UTF-8 text; write it as UTF-8") from None
    except (ValueError, RecursionError) as error:  # also numbers with too many digits
        reason = "nested too deeply" if isinstance(error, RecursionError) else one_line(str(error))
        raise UsageError(f"{file}: not valid TOML: {reason}; correct the file") from None
    check_keys(str(file), content, {"profiles": None})
    profiles = content.get("profiles", {})
    if not isinstance(profiles, dict):
        raise UsageError(f"{file}: profiles is not a table; write [profiles.NAME] above each profile")
    return profiles


@dataclass(frozen=True, slots=True)
class Configured:
    """Options with the settings of `profile`, if one names the source, and the environment that completes
    them."""

    options: SourceOptions
    environment: Mapping[str, str] = field(repr=False)
    profile: Profile | None


def configure(
    options: SourceOptions, environment: Mapping[str, str], option: Callable[[str], str] = option_of
) -> Configured:
    """Puts the settings of the profile that names the source into the options, if one does.

    The first of these names the source: options, `options.profile` among them; the variables of a source;
    PBSFS_PROFILE; the profile `default`. Options and variables take precedence over the profile's settings.
    But if a profile names the source, and the environment another source or PBS_SERVER, pbsfs ignores the
    variables that belong to those: no password goes to another server. `option`: as for `resolve`. Raises
    UsageError.
    """
    check_exclusive(options, option)
    named = environment.get(PROFILE_VARIABLE)
    if options.profile is not None:
        profile = read_configuration(environment).profile(options.profile)
    elif options.names_source():
        return Configured(options, environment, None)
    elif names_source(environment):
        if named:
            log.warning(
                "%s=%s is not used: the environment names another source; unset one of them",
                PROFILE_VARIABLE,
                named,
            )
        return Configured(options, environment, None)
    else:
        configuration = read_configuration(environment)
        if not named and DEFAULT_PROFILE not in configuration:
            return Configured(options, environment, None)
        profile = configuration.profile(named or DEFAULT_PROFILE)
    if names_server(environment):
        environment = without_source(environment)
    log.info("profile %s of %s names the source", profile.name, profile.file)
    return Configured(_completed(options, profile, environment), environment, profile)


def _completed(options: SourceOptions, profile: Profile, environment: Mapping[str, str]) -> SourceOptions:
    """`options` with the settings of `profile` that neither they nor the environment have."""
    settings = profile.options
    # The variable is for servers.
    has_trust = (
        options.fingerprint is not None
        or options.ca_file is not None
        or (settings.bucket is None and names_secret(FINGERPRINT_VARIABLE, "fingerprint", environment))
    )
    has_key = bool(options.anonymous or options.aws_profile or options.s3_config)
    has_namespace = options.namespace is not None or bool(environment.get(NAMESPACE_VARIABLE))
    has_cache = options.cache_dir is not None or bool(environment.get(CACHE_VARIABLE))
    has_size = bool(environment.get(SIZE_VARIABLE))
    has_keys = bool(options.keyfiles) or options.keyfd is not None
    return replace(
        options,
        profile=None,
        repository=settings.repository,
        datastore_dir=settings.datastore_dir,
        bucket=settings.bucket,
        fingerprint=options.fingerprint if has_trust else settings.fingerprint,
        ca_file=options.ca_file if has_trust else settings.ca_file,
        endpoint=_first(options.endpoint, settings.endpoint),
        region=_first(options.region, settings.region),
        path_style=_first(options.path_style, settings.path_style),
        anonymous=options.anonymous if has_key else settings.anonymous,
        aws_profile=options.aws_profile if has_key else settings.aws_profile,
        s3_config=options.s3_config if has_key else settings.s3_config,
        access_key=None if has_key else settings.access_key,
        secret_key=None if has_key else settings.secret_key,
        namespace=options.namespace if has_namespace else settings.namespace,
        keyfiles=options.keyfiles if has_keys else settings.keyfiles,
        retry_timeout=_first(options.retry_timeout, settings.retry_timeout),
        connections=_first(options.connections, settings.connections),
        limit_rate=_first(options.limit_rate, settings.limit_rate),
        cache_dir=options.cache_dir if has_cache else settings.cache_dir,
        cache_disk_size=_first(options.cache_disk_size, None if has_size else settings.cache_disk_size),
        password=None if names_secret(PASSWORD_VARIABLE, "password", environment) else settings.password,
        key_password=None
        if names_secret(KEY_PASSWORD_VARIABLE, "encryption-password", environment)
        else settings.key_password,
    )


def _first(first: T | None, second: T | None) -> T | None:
    return second if first is None else first


def with_secrets(options: SourceOptions, environment: Mapping[str, str]) -> SourceOptions:
    """Options that a mount named, with the secrets, keys and CA of the first profile for the same source.

    They are only for what neither options nor environment give. Raises UsageError if the configuration is not
    valid; a profile that is not valid does not count.
    """
    wanted = resolve(options, {})
    configuration = read_configuration(environment)
    for name in configuration.tables:
        try:
            profile = configuration.profile(name)
        except UsageError as error:
            log.info("not used: %s", error)
            continue
        found = resolve(profile.options, {})
        if _place(found) == _place(wanted):
            completed = _completed(options, profile, environment)
            return replace(completed, namespace=options.namespace, repository=wanted.repository)
    return options


def _place(options: SourceOptions) -> tuple[str | None, Path | None, str | None]:
    """What names the source of resolved options."""
    return options.repository, options.datastore_dir, options.bucket


def split_profiles(texts: Sequence[str], environment: Mapping[str, str]) -> list[tuple[str, str] | None]:
    """Of each text, the profile and the path in `NAME:PATH`; None if there is no profile of that name.

    Other names with a colon keep their meaning. Reads the configuration only if a text has the form. Raises
    UsageError.
    """
    matches = [_PREFIX.fullmatch(text) for text in texts]
    if not any(matches):
        return [None] * len(texts)
    configuration = read_configuration(environment)
    return [(match[1], match[2]) if match and match[1] in configuration else None for match in matches]


def check_no_profile(texts: Sequence[str], environment: Mapping[str, str]) -> None:
    """Raises UsageError if one of the places has the form `NAME:PATH`: the profile does not exist.

    No place in a tree starts so. For texts of which `split_profiles` and the mounts know none.
    """
    for text in texts:
        if match := _PREFIX.fullmatch(text):
            read_configuration(environment).profile(match[1])


def source_of(text: str, environment: Mapping[str, str]) -> tuple[SourceOptions, str]:
    """The source that `text` names, as the first field of a line in fstab, and the path below it.

    A directory (`/DIR`, `./DIR`), a bucket (`s3://BUCKET/STORE`), a profile (`NAME:`) or a repository; a path
    in its tree may follow: `/DIR:PATH`, `s3://BUCKET/STORE:PATH`, `NAME:PATH`, `REPOSITORY/PATH`. A profile
    takes precedence over a host of the same name; `NAME:` is one even if the configuration lacks it. Options
    go to `configure`. Raises UsageError for an empty text, a path without a source, and the name of a profile
    without its colon; `resolve` checks the rest.
    """
    if not text:
        raise UsageError("the source is empty; give a profile (NAME:), a repository, a directory or a bucket")
    if text.startswith(("/", ".")):
        directory, _colon, path = text.partition(":")
        if os.path.isdir(text):
            directory, path = text, ""
        return SourceOptions(datastore_dir=Path(directory)), path.strip("/")
    if text.startswith(SCHEME):
        bucket, _colon, path = text.removeprefix(SCHEME).partition(":")
        return SourceOptions(bucket=SCHEME + bucket), path.strip("/")
    (found,) = split_profiles([text], environment)
    if found is not None:
        return SourceOptions(profile=found[0]), found[1].strip("/")
    match = _PREFIX.fullmatch(text)
    if match and not match[2]:
        return SourceOptions(profile=match[1]), ""  # no repository ends so
    repository, slash, path = text.partition("/")
    if slash and repository in _PLACES:
        raise UsageError(
            f"{quoted(text)} is a path in a source and does not name one; write NAME:{one_line(text)} for "
            "the profile NAME, or give the path with --subtree"
        )
    if NAME.fullmatch(text) and text in read_configuration(environment):
        raise UsageError(
            f"{quoted(text)} may be a profile or a datastore of this computer; write {text}: for the "
            f"profile, or localhost:{text} for the datastore"
        )
    return SourceOptions(repository=repository), path.strip("/")

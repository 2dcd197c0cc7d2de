"""The files of AWS's tools, `~/.aws/credentials` and `~/.aws/config`: the settings of one profile in them.

Source: AWS, "Shared config and credentials files" of the SDKs and tools reference. Synchronous.
"""

from __future__ import annotations

import configparser
import os
import shlex
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from pbsfs.access.credentials import others_can_write
from pbsfs.base.errors import UsageError
from pbsfs.base.text import excerpt, first_of, quoted

PROFILE_VARIABLES = ("AWS_PROFILE", "AWS_DEFAULT_PROFILE")
CREDENTIALS_VARIABLE = "AWS_SHARED_CREDENTIALS_FILE"
CONFIG_VARIABLE = "AWS_CONFIG_FILE"

DEFAULT_PROFILE = "default"

MAX_FILE_SIZE = 1 << 20

Settings = Mapping[str, str]


@dataclass(frozen=True, slots=True)
class AwsFile:
    """One of the files; it need not exist. `sections`: settings by profile, and those of other sections.

    `may_name_commands`: whether nobody but this user and root could write it.
    """

    path: Path
    sections: Mapping[str, Settings] = field(default_factory=dict, repr=False)
    may_name_commands: bool = True
    readable_by_others: bool = False

    def profile(self, name: str) -> Settings:
        return self.sections.get(name, {})


@dataclass(frozen=True, slots=True)
class AwsProfile:
    """The profile `name` in both files. `is_named`: whether the user named it, instead of a variable.

    `services`: the settings of S3 in the section that `services` names.
    """

    name: str
    is_named: bool
    credentials: AwsFile
    config: AwsFile
    services: Settings

    @property
    def files(self) -> str:
        return f"{self.credentials.path} and {self.config.path}"

    def named(self, name: str) -> AwsProfile:
        """Another profile of the same files. Raises UsageError if it is in neither."""
        if name not in self.credentials.sections and name not in self.config.sections:
            raise _unknown(name, self.credentials, self.config)
        return replace(self, name=name, is_named=True)

    def section(self, name: str) -> Settings | None:
        """A section of `config` that is not a profile, such as `sso-session NAME`; None without one."""
        return self.config.sections.get(name)

    def setting(self, key: str) -> str | None:
        """A setting that is not a key: of `config`, else of `credentials`; nested ones as `s3.KEY`."""
        for file in (self.config, self.credentials):
            if found := file.profile(self.name).get(key):
                return found
        return None


def read_profile(named: str | None, environment: Mapping[str, str]) -> AwsProfile:
    """The profile that `named` or a variable names, or else `default`.

    Raises UsageError for a file that can't be used, and for a profile that was named and is in none.
    """
    home = environment.get("HOME") or os.path.expanduser("~")
    credentials = _read(_path(environment, CREDENTIALS_VARIABLE, f"{home}/.aws/credentials"), prefixed=False)
    config = _read(_path(environment, CONFIG_VARIABLE, f"{home}/.aws/config"), prefixed=True)
    variable = next((environment[each] for each in PROFILE_VARIABLES if environment.get(each)), None)
    name = named or variable or DEFAULT_PROFILE
    if (named or variable) and not (name in credentials.sections or name in config.sections):
        raise _unknown(name, credentials, config)
    services = config.profile(name).get("services", "")
    found = config.sections.get(f"services {services}", {}) if services else {}
    return AwsProfile(name, bool(named), credentials, config, found)


def _unknown(name: str, credentials: AwsFile, config: AwsFile) -> UsageError:
    known = dict.fromkeys(each for file in (credentials, config) for each in file.sections if " " not in each)
    advice = f"there is: {first_of(known)}" if known else "there is none"
    return UsageError(
        f"AWS profile {quoted(name)}: neither in {credentials.path} nor in {config.path}; {advice}"
    )


def _path(environment: Mapping[str, str], variable: str, usual: str) -> Path:
    return Path(os.path.expanduser(environment.get(variable) or usual))


def _read(path: Path, *, prefixed: bool) -> AwsFile:
    """`prefixed`: whether profiles other than `default` are in sections `[profile NAME]`."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a named pipe may have no writer
        with open(fd, "rb") as opened:
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode):
                raise UsageError(f"{path}: not a regular file; remove it, or name another one")
            data = opened.read(MAX_FILE_SIZE + 1)
    except (FileNotFoundError, NotADirectoryError):
        return AwsFile(path)
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}; check who may read it") from None
    if len(data) > MAX_FILE_SIZE:
        raise UsageError(f"{path}: larger than {MAX_FILE_SIZE >> 20} MiB; it is not a file of AWS's tools")
    sections = dict(_sections(path, data, prefixed=prefixed))
    return AwsFile(path, sections, not others_can_write(status), bool(status.st_mode & stat.S_IROTH))


def _sections(path: Path, data: bytes, *, prefixed: bool) -> Iterator[tuple[str, Settings]]:
    """Errors name a line, and never show it: it may be a secret."""
    parser = configparser.RawConfigParser(strict=False, default_section="\0")
    try:
        parser.read_string(data.decode())
    except UnicodeDecodeError:
        raise UsageError(f"{path}: not UTF-8 text; write it as UTF-8") from None
    except configparser.MissingSectionHeaderError as error:
        raise UsageError(f"{path}: line {error.lineno} is in no [profile]; correct it") from None
    except configparser.ParsingError as error:
        line = error.errors[0][0] if error.errors else 0
        raise UsageError(f"{path}: line {line} is not a setting; correct it") from None
    except configparser.Error:
        raise UsageError(f"{path}: not a file of AWS's tools; correct it") from None
    for section in parser.sections():
        name = _name(section) if prefixed else section.strip()
        if name is not None:
            yield name, dict(_flat(path, parser.items(section)))


def _name(section: str) -> str | None:
    """The profile of a section of the config file; both words of `[services X]` and `[sso-session X]`; else
    None."""
    try:
        words = shlex.split(section)
    except ValueError:
        return None
    if words == [DEFAULT_PROFILE]:
        return DEFAULT_PROFILE
    if len(words) != 2 or words[0] not in ("profile", "services", "sso-session"):
        return None
    return words[1] if words[0] == "profile" else " ".join(words)


def _flat(path: Path, items: list[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    """Nested settings get the name of the outer one first: `s3.addressing_style`."""
    for key, value in items:
        if not value.startswith("\n"):
            yield key, value.strip()
            continue
        for line in value.strip().split("\n"):
            inner, equals, text = line.partition("=")
            if not equals:
                raise UsageError(f"{path}: {excerpt(key)} has a line that is not a setting; correct it")
            yield f"{key}.{inner.strip().lower()}", text.strip()

"""References to secrets in a configuration file: where a secret is kept, never the secret.

`pbsfs.access.profiles` parses them, and `pbsfs.access.resolve` reads them when a source is opened. A secret
is the first line of what the place holds. Synchronous; a command may ask the user.
"""

from __future__ import annotations

import importlib
import logging
import os
import re
import shlex
import stat
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pbsfs.access.credentials import (
    CREDENTIALS_DIRECTORY,
    ended,
    first_line,
    read_file,
    run_command,
    take_secrets,
)
from pbsfs.base.errors import UsageError
from pbsfs.base.secret import Secret
from pbsfs.base.text import one_line, quoted

log = logging.getLogger(__name__)

FORMS = (
    '{ file = "PATH" }, { command = ["PROGRAM", "ARGUMENT"] }, { credential = "NAME" } or '
    '{ keyring = "SERVICE", user = "NAME" }'
)
"""The forms of a reference, for errors."""

_FIELDS = {"file": (), "command": (), "credential": (), "keyring": ("user",)}

_CREDENTIAL = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*", re.ASCII)


@dataclass(frozen=True, slots=True)
class Reference:
    """Where a secret is kept. `name`: of the setting, for errors.

    `kind`: `file` or `credential` (one word, an absolute path), `command` (its words), or `keyring` (service
    and user).
    """

    name: str
    kind: str
    words: tuple[str, ...]

    def __str__(self) -> str:
        """The place, for people. Of a command, only the program: an argument may be a secret."""
        return f"{self.kind} {self.words[0]}"

    def read(self, environment: Mapping[str, str]) -> Secret:
        """The secret. Raises UsageError; the error names the place and never its content."""
        try:
            if self.kind == "keyring":
                return Secret(self._ask_keyring())
            if self.kind == "command":
                variables = dict(environment)
                take_secrets(variables)  # other secrets are not for the command
                return Secret(self._checked(first_line(run_command(self.words, variables))))
            return Secret(self._checked(first_line(read_file(self.words[0]))))
        except subprocess.CalledProcessError as error:
            problem = f"it {ended(error)}; run it in a shell to see why"
        except OSError as error:
            problem = f"{error.strerror}; check the name and who may use it"
        except ValueError as error:
            problem = f"its first line {error}; a secret is one line of text"
        raise UsageError(f"{self.name}: {self}: {problem}") from None

    def readable_by_others(self) -> bool:
        """Whether it is a file that every user of this machine may read."""
        try:
            mode = os.stat(self.words[0]).st_mode
        except OSError:
            return False
        return self.kind == "file" and stat.S_ISREG(mode) and bool(mode & stat.S_IROTH)

    def _checked(self, secret: str) -> str:
        if not secret:
            raise UsageError(f"{self.name}: {self}: its first line is empty; put the secret there")
        return secret

    def _ask_keyring(self) -> str:
        """What the desktop's keyring holds. Source: keyring.get_password(service, username)."""
        service, user = self.words
        try:
            keyring = importlib.import_module("keyring")
        except ImportError:
            raise UsageError(
                f"{self.name}: the Python library keyring is not installed; install it (python3-keyring), "
                "or name a file or command instead"
            ) from None
        try:
            found = keyring.get_password(service, user)
        except Exception as error:  # its backends raise errors of many libraries
            reason = one_line(f"{type(error).__name__}: {error}")
            raise UsageError(
                f"{self.name}: {self}: the keyring is not available ({reason}); unlock it, or name a file "
                "or command instead"
            ) from None
        if not found:
            raise UsageError(
                f"{self.name}: {self}: it holds nothing for {quoted(user)}; "
                f"store it with: keyring set {service} {user}"
            )
        return str(found)


def parse_reference(name: str, value: Any, environment: Mapping[str, str], profile: str) -> Reference:
    """The reference that a configuration file gives as `value`.

    `name`: of the setting, for errors. `profile`: the default for the user of a keyring. Raises UsageError,
    which never shows a value: it may be a secret.
    """
    if not isinstance(value, dict):
        raise UsageError(
            f"{name}: a secret does not belong in this file; write it to a file that only you can read, and "
            f"give a reference: {FORMS}"
        )
    kinds = [kind for kind in _FIELDS if kind in value]
    if len(kinds) != 1 or any(key not in (kinds[0], *_FIELDS[kinds[0]]) for key in value):
        raise UsageError(f"{name}: not a reference to a secret; give one of {FORMS}")
    kind = kinds[0]
    given = value[kind]
    if kind == "command":
        return Reference(name, kind, _command_words(name, given))
    if not isinstance(given, str) or not given or "\0" in given:
        raise UsageError(f"{name}: {kind} has no value; give one of {FORMS}")
    if kind == "file":
        if not given.startswith(("/", "~/")):
            raise UsageError(f"{name}: file is not an absolute path; give one, or start with ~/")
        return Reference(name, kind, (str(parse_path(f"{name}.file", given)),))
    if kind == "keyring":
        user = value.get("user", profile)
        if not isinstance(user, str) or not user:
            raise UsageError(f"{name}: user is not a name; give the one that the secret is stored for")
        return Reference(name, kind, (given, user))
    if not _CREDENTIAL.fullmatch(given):
        raise UsageError(f"{name}: credential is not the name of one; give the one in the unit")
    directory = environment.get(CREDENTIALS_DIRECTORY)
    # Without a service manager the path does not exist, and reading it fails with the name of the variable.
    return Reference(name, kind, (str(Path(directory or f"${CREDENTIALS_DIRECTORY}") / given),))


def read_reference(reference: Reference, environment: Mapping[str, str]) -> Secret:
    """The secret of a profile; warns about a file that others may read. Raises UsageError."""
    if reference.readable_by_others():
        log.warning(
            "%s: every user of this machine may read %s; run chmod o-r on it", reference.name, reference
        )
    return reference.read(environment)


def _command_words(name: str, given: Any) -> tuple[str, ...]:
    """The words of a command: those of a list, or of text as a shell splits it."""
    words = given
    if isinstance(given, str):
        try:
            words = shlex.split(given)
        except ValueError:
            words = []  # a quote that is not closed
    valid = isinstance(words, list) and bool(words) and all(isinstance(word, str) for word in words)
    if not valid or not words[0] or any("\0" in word for word in words):
        raise UsageError(f'{name}: not a command; give its words: {{ command = ["pass", "show", "pbs"] }}')
    return tuple(words)


def parse_path(name: str, value: Any) -> Path:
    """An absolute path, or one below the home directory (`~/…`). Raises UsageError."""
    if not isinstance(value, str) or not value or "\0" in value:
        raise UsageError(f"{name}: not a path; give an absolute path, or one that starts with ~/")
    path = Path(value)
    if value.startswith("~"):
        try:
            path = path.expanduser()
        except RuntimeError:
            raise UsageError(
                f"{name}: {quoted(value)}: this user has no home directory; give an absolute path"
            ) from None
    if not path.is_absolute():
        raise UsageError(f"{name}: {quoted(value)} is relative; give an absolute path, or start with ~/")
    return path

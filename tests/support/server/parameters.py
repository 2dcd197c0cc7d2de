"""What parameters a call takes, and the texts with which others are refused.

Restated from proxmox-schema as proxmox-backup 3.2.4 uses it. Pure functions, called by the API and
the reader for every request before anything else about it is looked at.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tests.support.server.answers import JSON, RefusedError

_SAFE_ID = r"[A-Za-z0-9_][A-Za-z0-9._\-]*"

Check = Callable[[str], str | None]


@dataclass(frozen=True, slots=True)
class Parameter:
    """`check`: what is wrong with a value, or None."""

    name: str
    check: Check
    optional: bool = False


def _pattern(regex: str, least: int = 0, most: int = 1 << 20) -> Check:
    compiled = re.compile(regex, re.ASCII)

    def check(value: str) -> str | None:
        if len(value) < least:
            return f"value must be at least {least} characters long"
        if len(value) > most:
            return f"value may only be {most} characters long"
        return None if compiled.fullmatch(value) else "value does not match the regex pattern"

    return check


def _integer(least: int, most: int | None = None) -> Check:
    def check(value: str) -> str | None:
        if not re.fullmatch(r"[+-]?[0-9]+", value, re.ASCII):
            return "invalid digit found in string"
        if int(value) < least:
            return f"value must have a minimum value of {least} (got {int(value)})"
        if most is not None and int(value) > most:
            return f"value must have a maximum value of {most} (got {int(value)})"
        return None

    return check


def _boolean(value: str) -> str | None:
    known = ("1", "on", "yes", "true", "0", "off", "no", "false")
    return None if value.lower() in known else "Unable to parse boolean option."


def _backup_type(value: str) -> str | None:
    known = value in ("vm", "ct", "host")
    return None if known else f"value '{value}' is not defined in the enumeration."


STORE = Parameter("store", _pattern(_SAFE_ID, 3, 32))
NS = Parameter("ns", _pattern(rf"(?:(?:{_SAFE_ID}/){{0,7}}{_SAFE_ID})?", 0, 256), optional=True)
PARENT = Parameter("parent", NS.check, optional=True)
MAX_DEPTH = Parameter("max-depth", _integer(0, 7), optional=True)
BACKUP_TYPE = Parameter("backup-type", _backup_type)
BACKUP_ID = Parameter("backup-id", _pattern(_SAFE_ID))
BACKUP_TIME = Parameter("backup-time", _integer(1))
FILE_NAME = Parameter("file-name", _pattern(_SAFE_ID))
DEBUG = Parameter("debug", _boolean, optional=True)
VERBOSE = Parameter("verbose", _boolean, optional=True)
DIGEST = Parameter("digest", _pattern(r"[0-9a-f]{64}"))
USERNAME = Parameter("username", _pattern(rf"[^\s:/\x00-\x1f\x7f]+@{_SAFE_ID}", 3, 64))
TFA_CHALLENGE = Parameter("tfa-challenge", _pattern(r"[^\x00-\x1f\x7f]*"), optional=True)
PASSWORD = Parameter("password", _pattern(r"[^\x00-\x1f\x7f]*", 1, 1024))


def optional(parameter: Parameter) -> Parameter:
    return Parameter(parameter.name, parameter.check, optional=True)


def verify(
    given: Mapping[str, Any], known: Sequence[Parameter], *, content_type: str | None = JSON
) -> dict[str, str]:
    """The parameters, if they are what the call takes; a RefusedError that lists all that is wrong if not.

    What is missing is listed in the order of `known`.
    """
    checks = {parameter.name: parameter.check for parameter in known}
    errors: list[tuple[str, str]] = []
    for name, value in given.items():
        if name not in checks:
            errors.append((name, "schema does not allow additional properties."))
        elif not isinstance(value, str):
            errors.append((name, "Expected string value."))
        elif (error := checks[name](value)) is not None:
            errors.append((name, error))
    errors += [
        (parameter.name, "parameter is missing and it is not optional.")
        for parameter in known
        if not parameter.optional and parameter.name not in given
    ]
    if not errors:
        return {name: str(value) for name, value in given.items()}
    if len(errors) == 1:
        text = f"parameter verification failed - '{errors[0][0]}': {errors[0][1]}"
    else:
        lines = "".join(f"\n- '{name}': {error}" for name, error in errors)
        text = f"parameter verification failed:{lines}"
    raise RefusedError(400, text, content_type=content_type)

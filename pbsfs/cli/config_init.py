"""The questions of `pbsfs config init`, and the files that it writes.

Files get mode 0600 and appear complete or not at all. Synchronous; a user at a terminal answers.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import click

from pbsfs.access.profiles import parse_profile
from pbsfs.access.references import parse_path
from pbsfs.access.terminal import Terminal
from pbsfs.base.errors import OutputError, SourceError, TrustError, UsageError
from pbsfs.base.secret import Secret
from pbsfs.sources.bucket.address import SCHEME, BucketAddress
from pbsfs.sources.http.peer import Peer
from pbsfs.sources.http.proxy import Proxy, find_proxy
from pbsfs.sources.http.tls import Trust, connect, peek_fingerprint, show_fingerprint
from pbsfs.sources.server.repository import Repository

PLACES = ("file", "command", "ask")
"""Where a new profile's secret is: in a file that pbsfs writes, printed by a command, or nowhere: then pbsfs
asks each time."""


@dataclass(frozen=True, slots=True)
class Answers:
    """`settings`: the lines of the profile. `secret`: what to write into a file of its own, if anything.

    `secret_key`: the setting that refers to that file.
    """

    settings: Mapping[str, object]
    secret: Secret | None = None
    secret_key: str = "password"  # noqa: S105 - a name


def ask(profile: str, environment: Mapping[str, str], terminal: Terminal) -> Answers:
    """Asks for a source until each answer is valid. Raises click.Abort when the user gives up."""
    settings: dict[str, object] = {}
    secret = None
    text = _asked(
        "Repository (user@realm!token@host:datastore), the directory of a datastore, or s3://BUCKET/DATASTORE",
        _source,
        None,
    )
    if text.startswith(("/", "~")):
        settings["datastore-dir"] = text
    elif text.startswith(SCHEME):
        secret = _ask_for_bucket(text, settings, environment, terminal)
    else:
        secret = _ask_for_server(text, settings, environment, terminal)
    if namespace := _asked("Namespace (empty for the root namespace)", str, ""):
        settings["namespace"] = namespace
    if keyfile := _asked("Key file for encrypted backups (empty for none)", _keyfile, ""):
        settings["keyfile"] = keyfile
    secret_key = "secret-key" if text.startswith(SCHEME) else "password"
    complete = settings if secret is None else {**settings, secret_key: {"file": "/written/later"}}
    parse_profile(profile, complete, Path("the answers"), environment)
    return Answers(settings, secret, secret_key)


def _ask_for_server(
    text: str, settings: dict[str, object], environment: Mapping[str, str], terminal: Terminal
) -> Secret | None:
    """Fills in the settings of a repository; returns the secret for a file."""
    settings["repository"] = text
    repository = Repository.parse(text)
    proxy = find_proxy(repository, environment)
    fingerprint = _fingerprint(repository, proxy, terminal)
    if fingerprint is not None:
        settings["fingerprint"] = fingerprint
    what = "password" if repository.token is None else "token's secret"
    place = click.prompt(
        f"Keep the {what} in a file, let a command print it, or ask each time",
        type=click.Choice(PLACES),
        default="file",
        err=True,
    )
    if place == "file":
        return terminal.password(f"{what} of {repository.auth_id}")
    if place == "command":
        settings["password"] = {"command": _asked("Command", _command, None)}
    return None


def _ask_for_bucket(
    text: str, settings: dict[str, object], environment: Mapping[str, str], terminal: Terminal
) -> Secret | None:
    """Fills in the settings of a bucket; returns the secret for a file."""
    settings["bucket"] = text
    endpoint = _asked("Endpoint, https://HOST[:PORT] (empty for AWS)", _endpoint, "")
    if endpoint:
        settings["endpoint"] = endpoint
    if region := _asked("Region (empty for that of the environment, or us-east-1)", _region, ""):
        settings["region"] = region
    address = BucketAddress.parse(text, endpoint=endpoint or None, region=region or None)
    if address.secure and endpoint:
        fingerprint = _fingerprint(address, find_proxy(address, environment), terminal)
        if fingerprint is not None:
            settings["fingerprint"] = fingerprint
    if access_key := _asked("Access key ID (empty to find the key as AWS's tools do)", str, ""):
        settings["access-key"] = access_key
        place = click.prompt(
            "Keep the secret key in a file, or let a command print it",
            type=click.Choice(PLACES[:2]),
            default="file",
            err=True,
        )
        if place == "file":
            return terminal.password(f"secret key of {access_key}")
        settings["secret-key"] = {"command": _asked("Command", _command, None)}
    return None


def _asked(question: str, check: Callable[[str], str], default: str | None) -> str:
    """An answer that `check` accepts; asks again after one that it refuses."""
    while True:
        answer = click.prompt(question, default=default, show_default=False, err=True).strip()
        try:
            return check(answer)
        except UsageError as error:
            click.echo(f"{error}", err=True)


def _source(text: str) -> str:
    if text.startswith(("/", "~")):
        parse_path("the directory", text)
        return text
    if text.startswith(SCHEME):
        return str(BucketAddress.parse(text))
    return str(Repository.parse(text))


def _endpoint(text: str) -> str:
    return BucketAddress.parse("s3://any/any", endpoint=text).endpoint or "" if text else ""


def _region(text: str) -> str:
    if text:
        BucketAddress.parse("s3://any/any", region=text)
    return text


def _command(text: str) -> str:
    if not text:
        raise UsageError("the command is empty; give one that prints the secret")
    return text


def _keyfile(text: str) -> str:
    return str(parse_path("the key file", text)) if text else ""


def _fingerprint(peer: Peer, proxy: Proxy | None, terminal: Terminal) -> str | None:
    """The fingerprint to trust; None if a CA of the system signed the certificate, or without a connection.

    Raises TrustError if the user does not accept it, and SourceError if they do not continue without.
    """
    try:
        connect(peer, Trust(), proxy).socket.close()
    except TrustError as error:
        refusal = error
    except SourceError as error:
        click.echo(f"{error}", err=True)
        if not terminal.confirm("Continue without checking the server"):
            raise
        return None
    else:
        return None
    shown = show_fingerprint(peek_fingerprint(peer, proxy))
    click.echo(f"The SHA-256 fingerprint of the certificate of {peer.address} is\n{shown}", err=True)
    if not terminal.confirm(f"Is that what {peer.kind.shown_by} shows? Trust it"):
        raise refusal
    return shown


def write(profile: str, answers: Answers, file: Path, terminal: Terminal) -> list[Path]:
    """Writes the profile to `file`, and the secret beside config.toml, if there is one. Returns the files.

    Asks before it replaces a file. Raises OutputError, and click.Abort if the user does not agree.
    """
    settings = dict(answers.settings)
    written = []
    if answers.secret is not None:
        directory = file.parent.parent if file.parent.name == "conf.d" else file.parent
        secret_file = directory / f"{profile}.secret"
        _write(secret_file, f"{answers.secret.reveal()}\n", terminal)
        settings[answers.secret_key] = {"file": str(secret_file)}
        written.append(secret_file)
    lines = [f"{key} = {_toml(value)}\n" for key, value in settings.items()]
    _write(
        file, f"[profiles.{profile if '.' not in profile else _toml(profile)}]\n{''.join(lines)}", terminal
    )
    return [*written, file]


def _toml(value: object) -> str:
    """A value of TOML. Its strings are those of JSON (https://toml.io/en/v1.0.0#string), but for DEL."""
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{key} = {_toml(each)}" for key, each in value.items()) + " }"
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _write(file: Path, text: str, terminal: Terminal) -> None:
    """Writes a file that only this user can read; a crash leaves the old file or the new one."""
    try:
        content = text.encode()
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        fd, name = tempfile.mkstemp(prefix=f".{file.name}-", dir=file.parent)
        try:
            with open(fd, "wb") as opened:
                opened.write(content)
                opened.flush()
                os.fsync(fd)
            try:
                os.link(name, file)  # fails if the file exists
            except FileExistsError:
                if not terminal.confirm(f"{file} exists. Replace it"):
                    raise click.Abort from None
                os.replace(name, file)
        finally:
            with suppress(FileNotFoundError):
                os.unlink(name)
    except OSError as error:
        raise OutputError(f"cannot write {file}: {error.strerror}") from None
    except UnicodeEncodeError:
        raise OutputError(f"cannot write {file}: an answer is not text; give names in UTF-8") from None

"""`pbsfs stats`: what a mount or an NBD server did, and what it uses."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import click

from pbsfs.base.errors import HelperError, MountError
from pbsfs.base.text import first_of, quoted, size_text
from pbsfs.cli.parameters import FilePath
from pbsfs.fuse.mountpoint import ADVICE, ANSWERS, STATS_NAME, WATCH_NAME, mount_of_ours, states
from pbsfs.nbd import watching
from pbsfs.nbd.servers import servers

STATS = f"{WATCH_NAME}/{STATS_NAME}"

MAX_SIZE = 64 << 10
"""Bytes of the file of a mount, which is below 2 KiB: a backup may have a file of this name."""

_SERVER = re.compile(r"nbds?(\+unix)?://|[0-9]{1,10}\Z")
_NUMBER = re.compile(r"([a-z0-9_]{1,40}) ([0-9]{1,20}(?:\.[0-9]{1,6})?)")


@click.command("stats")
@click.argument("place", metavar="MOUNTPOINT|SERVER")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object.")
def command(place: str, as_json: bool) -> None:
    """Show what a mount or an NBD server did since it started, and what it uses now.

    MOUNTPOINT is a mount; SERVER is the address of an NBD server, or the number of its process, as pbsfs
    status lists them. The numbers of a mount are those of its file .pbsfs/stats.

    \b
    Examples:
      pbsfs stats /mnt/pbs
      pbsfs stats --json /mnt/pbs
      pbsfs stats nbd://127.0.0.1:10810/
    """
    numbers = _of_server(place) if _names_server(place) else _of_mount(FilePath().convert(place, None, None))
    if as_json:
        click.echo(json.dumps(numbers, indent=2))
        return
    names = max(map(len, numbers))
    shown = [f"{value:.3f}" if isinstance(value, float) else str(value) for value in numbers.values()]
    values = max(map(len, shown))
    for (name, value), text in zip(numbers.items(), shown, strict=True):
        size = f"  ({size_text(int(value))})" if "bytes" in name and value >= 1 << 10 else ""
        click.echo(f"{name:<{names}}  {text:>{values}}{size}")


def _names_server(place: str) -> bool:
    return _SERVER.match(place) is not None


def _of_server(place: str) -> dict[str, int | float]:
    """The numbers of an NBD server. Raises HelperError."""
    user = os.geteuid()
    found = [server for server in servers() if user in (0, server.user)]
    named = [server for server in found if place in (server.address, str(server.pid))]
    if not named:
        there = first_of(server.address or str(server.pid) for server in found)
        advice = f"name one of {there}" if there else "none runs as this user"
        raise HelperError(f"there is no NBD server {quoted(place)}; {advice}")
    numbers = _parsed(watching.ask(named[0].pid))
    if numbers is None:
        raise HelperError(f"NBD server {named[0].pid}: its answer is not valid; look at its log")
    return numbers


def _of_mount(mountpoint: Path) -> dict[str, int | float]:
    """The numbers of a mount. Raises MountError."""
    place = mount_of_ours(mountpoint).path
    (state,) = states([place])
    if state != ANSWERS:
        advice = ADVICE.get(state, "run this as the user who mounted it").replace("PLACE", str(place))
        raise MountError(f"mount at {place}: {state}; {advice}")
    try:
        with open(place / STATS, "rb") as file:
            text = file.read(MAX_SIZE).decode(errors="replace")
    except FileNotFoundError:
        raise MountError(
            f"mount at {place}: it has no {STATS}; name the mount point instead of a bind mount of a part, "
            "or mount again with this version of pbsfs"
        ) from None
    except OSError as error:
        raise MountError(
            f"mount at {place}: {STATS}: {error.strerror}; look at the log of the mount"
        ) from None
    numbers = _parsed(text)
    if numbers is None:
        raise MountError(
            f"mount at {place}: its {STATS} is a file of the backup; send SIGUSR1 to the process of the "
            "mount, and look at its log"
        )
    return numbers


def _parsed(text: str) -> dict[str, int | float] | None:
    """The numbers in `text`, by name; None if it has anything else."""
    found = [_NUMBER.fullmatch(line) for line in text.splitlines()]
    numbers = {match[1]: _value(match[2]) for match in found if match is not None}
    return numbers if found and len(numbers) == len(found) else None


def _value(text: str) -> int | float:
    return float(text) if "." in text else int(text)

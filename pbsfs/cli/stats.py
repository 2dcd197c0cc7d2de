"""`pbsfs stats`: what a mount did, and what it uses."""

from __future__ import annotations

import json
import re
from pathlib import Path

import click

from pbsfs.base.errors import MountError
from pbsfs.base.text import size_text
from pbsfs.cli.options import FilePath
from pbsfs.fuse.mountpoint import ADVICE, ANSWERS, STATS_NAME, WATCH_NAME, mount_of_ours, states

STATS = f"{WATCH_NAME}/{STATS_NAME}"

MAX_SIZE = 64 << 10
"""Bytes of the file of a mount, which is below 2 KiB: a backup may have a file of this name."""

_NUMBER = re.compile(r"([a-z0-9_]{1,40}) ([0-9]{1,20}(?:\.[0-9]{1,6})?)")


@click.command("stats")
@click.argument("mountpoint", type=FilePath())
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object.")
def command(mountpoint: Path, as_json: bool) -> None:
    """Show what the mount at MOUNTPOINT did since it started, and what it uses now.

    The numbers are those of the file .pbsfs/stats of the mount.

    \b
    Examples:
      pbsfs stats /mnt/pbs
      pbsfs stats --json /mnt/pbs
    """
    numbers = _numbers(mountpoint)
    if as_json:
        click.echo(json.dumps(numbers, indent=2))
        return
    names = max(map(len, numbers))
    shown = [f"{value:.3f}" if isinstance(value, float) else str(value) for value in numbers.values()]
    values = max(map(len, shown))
    for (name, value), text in zip(numbers.items(), shown, strict=True):
        size = f"  ({size_text(int(value))})" if "bytes" in name and value >= 1 << 10 else ""
        click.echo(f"{name:<{names}}  {text:>{values}}{size}")


def _numbers(mountpoint: Path) -> dict[str, int | float]:
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
    found = [_NUMBER.fullmatch(line) for line in text.splitlines()]
    numbers = {match[1]: _value(match[2]) for match in found if match is not None}
    if not found or len(numbers) != len(found):
        raise MountError(
            f"mount at {place}: its {STATS} is a file of the backup; send SIGUSR1 to the process of the "
            "mount, and look at its log"
        )
    return numbers


def _value(text: str) -> int | float:
    return float(text) if "." in text else int(text)

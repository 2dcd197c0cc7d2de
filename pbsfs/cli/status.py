"""`pbsfs status`: lists the mounts and NBD servers that run, and whether they answer."""

from __future__ import annotations

import json
import os
from typing import Any

import click

from pbsfs.access.tickets import Tickets
from pbsfs.base.errors import MountError
from pbsfs.base.text import first_of, printable
from pbsfs.cli.running import environment
from pbsfs.fuse.mountpoint import ADVICE, FS_TYPE, mounts, states
from pbsfs.nbd.servers import servers
from pbsfs.runtime.logs import LogOptions, set_up_logging

_HEADINGS = ("KIND", "PLACE", "SOURCE", "STATE")


@click.command("status")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON array.")
def command(as_json: bool) -> None:
    """List your mounts and NBD servers, and whether they answer; as root, those of all users.

    Logins that pbsfs login keeps are listed with their end.

    The exit status is 7 if a mount does not answer.

    \b
    Examples:
      pbsfs status
      pbsfs status --json
    """
    set_up_logging(LogOptions())
    user = os.geteuid()
    ours = [mount for mount in mounts() if mount.type == FS_TYPE and user in (0, mount.owner)]
    found: list[dict[str, Any]] = [
        {"kind": "mount", "place": str(mount.path), "source": mount.source, "state": state}
        for mount, state in zip(ours, states([mount.path for mount in ours]), strict=True)
    ]
    for server in servers():
        if user in (0, server.user):
            place = server.address or "sockets of systemd"
            path = "all images" if server.path == "" else server.path or "by its parameters"
            found.append({"kind": "nbd", "place": place, "source": path, "state": f"process {server.pid}"})
    found += [
        {"kind": "login", "place": login.address, "source": login.user, "state": f"until {login.until_text}"}
        for login in Tickets(environment()).all()
    ]
    if as_json:
        click.echo(json.dumps(found, indent=2))
    elif found:
        rows = [_HEADINGS, *(tuple(printable(str(value)) for value in entry.values()) for entry in found)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        for row in rows:
            click.echo("  ".join(map(str.ljust, row, widths)).rstrip())
    for state, advice in ADVICE.items():
        places = [entry["place"] for entry in found if entry["state"] == state]
        if places:
            raise MountError(f"mount at {first_of(places)}: {state}; {advice}")

"""Runs the reference server by hand: `python -m tests.support.server --datastore-dir DIR`.

For trying pbsfs, or the vendor's client, without a real server. Listens on the loopback address only,
and ends with Ctrl-C.
"""

from __future__ import annotations

import signal
from pathlib import Path

import click

from tests.support.server.accounts import user_of
from tests.support.server.link import SlowLink
from tests.support.server.server import ReferenceServer


@click.command()
@click.option(
    "--datastore-dir",
    "directory",
    required=True,
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="The datastore to serve.",
)
@click.option("--store", default="store1", show_default=True, help="The datastore's name.")
@click.option("--port", default=8007, show_default=True, help="0 for any that is free.")
@click.option("--user", default="reader@pbs", show_default=True, help="A user who may read all of it.")
@click.option(
    "--password-file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="The password is its first line; without it one is made and printed.",
)
@click.option("--token", help="An API token too, as USER!NAME or NAME; its secret is made and printed.")
@click.option("--round-trip", default=0.0, help="Milliseconds that a round trip takes.")
@click.option("--bandwidth", type=float, help="Bytes a second in each direction.")
def main(
    directory: Path,
    store: str,
    port: int,
    user: str,
    password_file: Path | None,
    token: str | None,
    round_trip: float,
    bandwidth: float | None,
) -> None:
    """Serve a datastore directory like a Proxmox Backup Server, on the loopback address."""
    link = SlowLink(round_trip / 1000, bandwidth) if round_trip or bandwidth else None
    server = ReferenceServer(directory, store=store, port=port, link=link)
    given = password_file.read_text().splitlines()[0] if password_file else None
    secret = server.add_user(user, given)
    auth_id = user
    if token is not None:
        auth_id = token if "!" in token else f"{user}!{token}"
        if user_of(auth_id) != user:
            raise click.UsageError(f"{auth_id} is no token of {user}")
        secret = server.add_token(auth_id)
    stop = {signal.SIGINT, signal.SIGTERM}
    signal.pthread_sigmask(signal.SIG_BLOCK, stop)  # in the server's thread too
    with server:
        shown = "<the first line of the password file>" if given is not None and token is None else secret
        click.echo(f"repository:  {server.repository(auth_id)}")
        click.echo(f"fingerprint: {server.fingerprint}")
        click.echo("\nTo use it, in another shell:\n")
        click.echo(f"  export PBS_REPOSITORY='{server.repository(auth_id)}'")
        click.echo(f"  export PBS_PASSWORD='{shown}'")
        click.echo(f"  export PBS_FINGERPRINT='{server.fingerprint}'")
        click.echo("  pbsfs mount /mnt/pbs")
        click.echo("  proxmox-backup-client snapshot list")
        click.echo("\nEnds with Ctrl-C.")
        signal.sigwait(stop)


if __name__ == "__main__":
    main()

"""`pbsfs nbd`: serves images through nbdkit, in the foreground."""

from __future__ import annotations

import itertools
import os
import subprocess
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path

import click

from pbsfs.access.config import configure
from pbsfs.access.options import SourceOptions
from pbsfs.access.sizes import parse_cache_size
from pbsfs.base.errors import UsageError
from pbsfs.cli.inside import from_mounts
from pbsfs.cli.options import damage_option, log_format_option, source_options
from pbsfs.cli.parameters import FilePath, PassingOn, passed_on
from pbsfs.cli.running import described_by, environment, run_on_described
from pbsfs.nbd import launch
from pbsfs.nbd.launch import Address
from pbsfs.nbd.naming import choose
from pbsfs.nbd.parameters import filters_of
from pbsfs.nbd.serving import serving
from pbsfs.reader.damage import ZeroedRanges
from pbsfs.runtime.logs import LogOptions, set_up_logging
from pbsfs.runtime.memory import DEFAULT_CACHE_SIZE
from pbsfs.runtime.process import signals_held_back
from pbsfs.tasks.metrics import MetricsAddress
from pbsfs.tree import Directory, Tree

_ADDRESSES = ("--unix", "--ipaddr", "--ip-addr", "--single", "--stdin", "--vsock")
_TAKEN = ("-U", "-p", "-i", "-s")


@click.command("nbd", cls=PassingOn)
@click.argument("words", nargs=-1, type=click.UNPROCESSED, metavar="PATH|--all [NBDKIT OPTIONS]")
@click.option(
    "--all", "everything", is_flag=True, help="Serve every image, each as an export named by its path."
)
@click.option("--cow", is_flag=True, help="Let clients write to an overlay that is discarded at the end.")
@click.option(
    "--socket",
    metavar="PATH",
    type=FilePath(dir_okay=False),
    help="Listen on this Unix socket (default: a private one).",
)
@click.option(
    "--listen",
    metavar="HOST[:PORT]",
    help="Listen on TCP, at this address; :PORT is a port of loopback (default: a private Unix socket).",
)
@click.option("--run", metavar="COMMAND", help="Serve while this shell command runs; $uri holds the URI.")
@click.option("--cache-size", metavar="SIZE", help="Keep decoded chunks in this much memory (default: 256M).")
@damage_option
@click.option(
    "--metrics",
    metavar="PATH|127.0.0.1:PORT",
    help="Serve what the server did as OpenMetrics on this Unix socket or loopback port (default: nowhere).",
)
@log_format_option
@source_options
def command(
    words: tuple[str, ...],
    everything: bool,
    cow: bool,
    socket: Path | None,
    listen: str | None,
    run: str | None,
    cache_size: str | None,
    on_damage: ZeroedRanges | None,
    metrics: str | None,
    log_format: str | None,
    source: SourceOptions,
) -> None:
    """Serve the image at PATH as a network block device, read-only, until Ctrl-C; prints its URI.

    If PATH is a snapshot, a group or another directory, each image below it is an export, named by its path
    from there. With --all, every image is an export. Arguments after PATH are passed on to nbdkit.
    Started by a socket unit of systemd, pbsfs serves on that unit's sockets.

    \b
    Examples:
      pbsfs nbd --datastore-dir /srv/store1 vm/100/latest/drive-scsi0.img
      pbsfs nbd --listen :10809 --all
      pbsfs nbd --cow vm/100/latest/drive-scsi0.img \\
          --filter=partition partition=1
      pbsfs nbd vm/100/latest/drive-scsi0.img \\
          --run 'qemu-img convert "$uri" -O qcow2 disk.qcow2'
    """
    if source.port is not None:
        raise UsageError(
            "--port: ambiguous; use --listen HOST:PORT for nbdkit, and give the server's port in "
            "--repository or PBS_PORT"
        )
    set_up_logging(LogOptions(format=log_format))
    numbers_at = None if metrics is None else MetricsAddress.parse(metrics)
    path, options = _split(passed_on(words), everything)
    if not everything:
        source, (path,) = from_mounts(source, [path])
    if cow:
        options = ["--filter=cow", *options]
    options += ["--exit-with-parent"]

    async def find(tree: Tree) -> tuple[str, bool]:
        node = await choose(tree, path, filters=filters_of(options))
        return os.fsdecode(node.path), isinstance(node, Directory)

    with ExitStack() as stack:
        address = _address(socket, listen, stack)
        nbdkit = launch.find_nbdkit()
        configured = configure(source, environment())
        if configured.profile is not None:
            cache_size = configured.profile.cache_size if cache_size is None else cache_size
            log_format = configured.profile.log_format if log_format is None else log_format
        cache = DEFAULT_CACHE_SIZE if cache_size is None else parse_cache_size(cache_size)
        description = described_by(configured, reads_much=True)
        served, has_many = run_on_described(find, description, first=path, reads=False)
        child = stack.enter_context(
            serving(
                nbdkit,
                served,
                address,
                options,
                description,
                cache_size=cache,
                zeros_for_damage=on_damage is not None,
                metrics=numbers_at,
                log_format=log_format,
            )
        )
        uri = address.uri(tls=_requires_tls(options))
        if run is not None:
            # nbdkit's own --run is not used: after a signal it leaves its server running at full load.
            shell = ["/bin/sh", "-c", run]
            with signals_held_back():
                process = subprocess.Popen(shell, env=os.environ | _variables(address, uri))
                stack.callback(launch.stop, process)
            status = process.wait()
            raise click.exceptions.Exit(status if status >= 0 else 128 - status)
        click.echo(uri)
        if has_many:
            example = address.uri("NAME", tls=_requires_tls(options))
            click.echo(f"Each image is an export, {example}; list them with nbdinfo --list.", err=True)
        status = child.wait()
    if status != 0:
        raise launch.ending("nbdkit", status)


def _variables(address: Address, uri: str) -> dict[str, str]:
    """Environment variables for a command, named as with nbdkit's own --run."""
    variables = {"uri": uri, "nbd": uri, "exportname": ""}
    if address.socket is not None:
        return variables | {"unixsocket": str(address.socket)}
    return variables | {"port": str(address.port)}


def _split(words: Sequence[str], everything: bool) -> tuple[str, list[str]]:
    """PATH, and nbdkit's options after it."""
    taken = next((w for w in words if w.startswith(_TAKEN) and not w.startswith("--")), None)
    taken = taken or next((w for w in words if w.split("=")[0] in _ADDRESSES), None)
    if taken is not None:
        raise UsageError(f"{taken}: not supported here; use --socket PATH or --listen HOST:PORT")
    if everything:
        if words and not words[0].startswith("-") and "=" not in words[0]:
            raise UsageError(f"--all and the path '{words[0]}' exclude each other; give one of them")
        return "", list(words)
    if not words or words[0].startswith("-"):
        raise UsageError("name the image to serve (nbdkit's options follow it), or serve all with --all")
    for before, word in itertools.pairwise(words):
        if not before.startswith("-") and not word.startswith("-") and "=" not in word:
            raise UsageError(
                f"'{word}': a second PATH; give one (a directory serves all images below it), and quote the "
                "command of --run"
            )
    return words[0], list(words[1:])


def _address(socket: Path | None, listen: str | None, stack: ExitStack) -> Address:
    if socket is not None and listen is not None:
        raise UsageError("--socket and --listen exclude each other; give one of them")
    inherited = Address.inherited(environment())
    if inherited is not None:
        if socket is not None or listen is not None:
            raise UsageError("the service manager listens already; leave out --socket and --listen")
        return inherited
    if listen is not None:
        return Address.parse(listen)
    if socket is None:
        return stack.enter_context(launch.private_socket())
    if os.path.lexists(socket):
        if not socket.is_socket():
            raise UsageError(f"--socket {socket}: a file exists there; name another path")
        raise UsageError(f"--socket {socket}: exists; remove it if no program listens there")
    address = Address.of_socket(Path(os.path.abspath(socket)))
    stack.callback(_remove, socket)
    return address


def _remove(path: Path) -> None:
    with suppress(FileNotFoundError):  # nbdkit may have removed it
        path.unlink()


def _requires_tls(options: Sequence[str]) -> bool:
    return "--tls=require" in options or ("--tls", "require") in itertools.pairwise(options)

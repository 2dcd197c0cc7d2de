"""`pbsfs cat`: writes files of backups to standard output."""

from __future__ import annotations

import click

from pbsfs.access.options import SourceOptions
from pbsfs.cli.inside import find, from_mounts
from pbsfs.cli.options import logging_options, source_options
from pbsfs.cli.output import standard_output
from pbsfs.cli.running import run_on_tree
from pbsfs.runtime.logs import LogOptions, set_up_logging
from pbsfs.tasks.cat import write_file
from pbsfs.tree import Tree


@click.command("cat")
@click.argument("paths", nargs=-1, metavar="PATH...", required=True)
@source_options
@logging_options
def command(paths: tuple[str, ...], log: LogOptions, source: SourceOptions) -> None:
    """Write the files at each PATH to standard output, one after the other.

    \b
    Examples:
      pbsfs cat files/ct/210/latest/root/etc/fstab
      pbsfs cat vm/100/latest/qemu-server.conf
    """
    set_up_logging(log)
    source, places = from_mounts(source, paths)
    out = standard_output()

    async def work(tree: Tree) -> None:
        for path in places:
            await write_file(await find(tree, path, source), out)

    run_on_tree(work, first=places[0], reads_much=True, source=source)

"""`pbsfs info`: shows what is known about one place in the tree."""

from __future__ import annotations

import json
from pathlib import Path

import click

from pbsfs.access.options import SourceOptions
from pbsfs.base.text import printable
from pbsfs.cli.inside import find, from_mounts
from pbsfs.cli.options import logging_options, run_on_tree, source_options
from pbsfs.runtime.logs import set_up_logging
from pbsfs.tasks.facts import facts_of
from pbsfs.tree import Latest, Tree


@click.command("info")
@click.argument("path")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object.")
@source_options
@logging_options
def command(path: str, as_json: bool, log_level: str, log_file: Path | None, source: SourceOptions) -> None:
    """Show what is known about the group, snapshot, file or entry of an archive at PATH.

    Of a link in an archive, it shows the link itself.

    \b
    Examples:
      pbsfs info --datastore-dir /srv/store1 vm/100
      pbsfs info --datastore-dir /srv/store1 vm/100/latest
      pbsfs info --datastore-dir /srv/store1 --json vm/100/latest/drive-scsi0.img
      pbsfs info files/ct/210/latest/root/etc/fstab
    """
    set_up_logging(log_level, log_file)
    source, (path,) = from_mounts(source, [path])

    async def work(tree: Tree) -> None:
        node = await find(tree, path, source, follow=False)
        if isinstance(node, Latest):
            node = await find(tree, path, source)
        facts = await facts_of(node)
        if as_json:
            click.echo(json.dumps(facts, indent=2))
            return
        for name, value in facts.items():
            text = printable(", ".join(value) if isinstance(value, list) else value, keep="\n")
            click.echo(f"{name + ':':<17}" + text.replace("\n", "\n" + " " * 17))

    run_on_tree(work, source=source)

"""`pbsfs info`: shows what is known about one place in the tree."""

from __future__ import annotations

import json
import time

import click

from pbsfs.access.options import SourceOptions
from pbsfs.base.names import parse_time
from pbsfs.base.text import printable, size_text
from pbsfs.cli.inside import find, from_mounts
from pbsfs.cli.options import logging_options, run_on_tree, source_options
from pbsfs.runtime.logs import LogOptions, set_up_logging
from pbsfs.tasks.attributes import span_text
from pbsfs.tasks.facts import VERIFIED, Facts, facts_of
from pbsfs.tree import Latest, Tree


@click.command("info")
@click.argument("path")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object.")
@source_options
@logging_options
def command(path: str, as_json: bool, log: LogOptions, source: SourceOptions) -> None:
    """Show what is known about the group, snapshot, file or entry of an archive at PATH.

    Of a link in an archive, it shows the link itself. Of images, it shows how much data they hold, how much
    of that the snapshot before has too, and how much a restore fetches: pbsfs reads the indexes for that. Of
    a group, it shows that of the newest snapshot, and how often the group is backed up.

    \b
    Examples:
      pbsfs info --datastore-dir /srv/store1 vm/100
      pbsfs info --datastore-dir /srv/store1 vm/100/latest
      pbsfs info --datastore-dir /srv/store1 --json vm/100/latest/drive-scsi0.img
      pbsfs info files/ct/210/latest/root/etc/fstab
    """
    set_up_logging(log)
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
            shown = ", ".join(value) if isinstance(value, list) else _in_words(name, value, facts)
            text = printable(shown, keep="\n")
            click.echo(f"{name + ':':<17}" + text.replace("\n", "\n" + " " * 17))

    run_on_tree(work, source=source)


def _in_words(name: str, value: str, facts: Facts) -> str:
    """A fact for people: as programs get it, and what it means."""
    if name == "verify_state":
        return f"{value} ({VERIFIED[value]})" if value in VERIFIED else value
    if name == "backup_interval":
        return f"{value} (about every {span_text(int(value))})"
    if name in ("last_backup", "backup_time"):
        age = int(time.time()) - parse_time(value)
        return f"{value} ({span_text(age)} ago)" if age >= 0 else value
    if not name.endswith("_size") and name != "size":
        return value
    words = [size_text(int(value))] if int(value) >= 1024 else []
    data = facts.get("data_size")
    if name == "restore_size":
        words.append("what a restore fetches, before compression")
    elif name == "shared_size" and isinstance(data, str) and int(data):
        words.append(f"{100 * int(value) // int(data)}% of the data")
    return f"{value} ({', '.join(words)})" if words else value

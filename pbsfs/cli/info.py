"""`pbsfs info`: shows what is known about one place in the tree."""

from __future__ import annotations

import json
import time

import click

from pbsfs.access.options import SourceOptions
from pbsfs.base.names import parse_time
from pbsfs.base.text import printable, size_text
from pbsfs.cli.inside import find, from_mounts
from pbsfs.cli.options import logging_options, source_options
from pbsfs.cli.running import run_on_tree
from pbsfs.runtime.logs import LogOptions, set_up_logging
from pbsfs.tasks.attributes import span_text
from pbsfs.tasks.facts import VERIFIED, Facts, facts_of
from pbsfs.tree import Latest, Tree


@click.command("info")
@click.argument("path", default="", metavar="[PATH]")
@click.option(
    "--states",
    is_flag=True,
    help="Count the verify states of all snapshots of a store or namespace; this reads their manifests.",
)
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object.")
@source_options
@logging_options
def command(path: str, states: bool, as_json: bool, log: LogOptions, source: SourceOptions) -> None:
    """Show what is known about the namespace, group, snapshot, file or entry of an archive at PATH.

    Of a link in an archive, it shows the link itself. Of images, it shows how much data they hold, how much
    of that the snapshot before has too, and how much a restore fetches: pbsfs reads the indexes for that. Of
    a group, it shows that of the newest snapshot, and how often the group is backed up. Of a namespace, it
    shows how many groups and snapshots it and all namespaces below it hold. Without PATH, it shows that of
    the whole store, its space and its last garbage collection.

    \b
    Examples:
      pbsfs info --datastore-dir /srv/store1
      pbsfs info --datastore-dir /srv/store1 vm/100
      pbsfs info --datastore-dir /srv/store1 vm/100/latest
      pbsfs info --datastore-dir /srv/store1 --json vm/100/latest
      pbsfs info files/ct/210/latest/root/etc/fstab
    """
    set_up_logging(log)
    source, (path,) = from_mounts(source, [path])

    async def work(tree: Tree) -> None:
        node = await find(tree, path, source, follow=False)
        if isinstance(node, Latest):
            node = await find(tree, path, source)
        facts = await facts_of(node, states=states)
        if as_json:
            click.echo(json.dumps(facts, indent=2))
            return
        for name, value in facts.items():
            shown = _list_in_words(name, value) if isinstance(value, list) else _in_words(name, value, facts)
            text = printable(shown, keep="\n")
            click.echo(f"{name + ':':<17}" + text.replace("\n", "\n" + " " * 17))

    run_on_tree(work, first=path, source=source)


_STATES = {
    "ok": "no damage found",
    "failed": "damage found; list it with pbsfs verify",
    "none": "never verified",
}

_MEANINGS = {
    "restore_size": "what a restore fetches, before compression",
    "gc_indexed_size": "what all backups refer to",
    "gc_stored_size": "what the chunks take",
    "gc_pending_size": "unused, removed by a later garbage collection",
    "hidden": "namespaces whose groups this user may not list, which are not counted",
    "counted": "namespaces at most are counted; there are more",
}
"""What the value of a fact is, behind it."""

_EMPTY = {"path": "/", "namespace": "(root)"}
"""What an empty value means."""

_WHOLE = {
    "shared_size": ("data_size", "{}% of the data"),
    "used_space": ("total_space", "{}% of the total"),
    "available_space": ("total_space", "{}% of the total"),
}
"""Facts that are a part of another one, and how to say which part."""


def _list_in_words(name: str, values: list[str]) -> str:
    if name != "verify_states":
        return ", ".join(values)
    meant = ((value, _STATES.get(value.partition(":")[0])) for value in values)
    return ", ".join(value if meaning is None else f"{value} ({meaning})" for value, meaning in meant)


def _in_words(name: str, value: str, facts: Facts) -> str:
    """A fact for people: as programs get it, and what it means."""
    if not value and name in _EMPTY:
        return _EMPTY[name]
    if name == "verify_state":
        return f"{value} ({VERIFIED[value]})" if value in VERIFIED else value
    if name == "backup_interval":
        return f"{value} (about every {span_text(int(value))})"
    if name in ("last_backup", "backup_time", "gc_time") and value != "never":
        age = int(time.time()) - parse_time(value)
        return f"{value} ({span_text(age)} ago)" if age >= 0 else value
    words = []
    if name.endswith(("_size", "_space")) or name == "size":
        words += [size_text(int(value))] if int(value) >= 1024 else []
    if name in _MEANINGS:
        words.append(_MEANINGS[name])
    whole, share = _WHOLE.get(name, ("", ""))
    of = facts.get(whole)
    if isinstance(of, str) and int(of):
        words.append(share.format(100 * int(value) // int(of)))
    stored = facts.get("gc_stored_size")
    if name == "gc_indexed_size" and isinstance(stored, str) and int(stored):
        words.append(f"{int(value) / int(stored):.1f} times what is stored")
    return f"{value} ({', '.join(words)})" if words else value

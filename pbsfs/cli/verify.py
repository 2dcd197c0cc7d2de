"""`pbsfs verify`: reads and checks everything, and reports what is damaged."""

from __future__ import annotations

import json
from dataclasses import replace

import click

from pbsfs.access.options import SourceOptions
from pbsfs.base.errors import DamageError, KeyRequiredError, NotFoundError, UsageError, exit_status_of
from pbsfs.cli.inside import find, from_mounts
from pbsfs.cli.options import logging_options, source_options
from pbsfs.cli.progress import shown
from pbsfs.cli.running import described, run_on_described
from pbsfs.runtime.logs import LogOptions, set_up_logging
from pbsfs.tasks.report import Report
from pbsfs.tasks.verify import Verification
from pbsfs.tree import ContentsNode, File, Tree


@click.command("verify")
@click.argument("paths", nargs=-1, metavar="[PATH]...")
@click.option("--json", "as_json", is_flag=True, help="Print the report as a JSON object.")
@click.option("--progress/--no-progress", default=None, help="Show the progress (default: on a terminal).")
@source_options
@logging_options
def command(
    paths: tuple[str, ...],
    as_json: bool,
    progress: bool | None,
    log: LogOptions,
    source: SourceOptions,
) -> None:
    """Read and check everything at and below each PATH (default: the whole tree).

    pbsfs reads each chunk once, regardless of how many images share it, and lists damaged files with their
    damaged ranges. It does not use the cache on disk. Exit status 6: damage was found; 5: none was found, but
    a required key is missing; 3: the datastore holds no backups.

    \b
    Examples:
      pbsfs verify
      pbsfs verify vm/100/latest host/web1 --limit-rate 50M
      pbsfs verify --datastore-dir /srv/store1 --keyfile key.json --json vm/101
    """
    set_up_logging(log)
    source, places = from_mounts(source, paths or ("",))
    if source.offline:
        raise UsageError("--offline: verify reads what is stored in the source; leave it out")

    async def work(tree: Tree) -> Report:
        files: dict[bytes, File | ContentsNode] = {}
        verification = Verification(tree.reader.store.memory)
        nodes = [await find(tree, path, source) for path in places]
        for node in nodes:
            files |= {file.path: file for file in await verification.collect(node)}
        named = tree.root.namespace.parts or any(node is not tree.root for node in nodes)
        if not (files or verification.report.damaged or named):
            raise NotFoundError(
                f"{tree.reader.source}: it holds no backups, so nothing was checked; name another datastore, "
                "or a group or namespace that may be empty"
            )
        total = sum([(await file.glance()).data_size for file in files.values()])
        with shown(progress, "verify", total) as advance:
            return await verification.run(list(files.values()), advance)

    # What a cache on disk holds would say nothing of what is stored.
    description = replace(described(source, reads_much=True), cache=None)
    report = run_on_described(work, description)
    click.echo(json.dumps(report.as_json(), indent=2) if as_json else report.as_text())
    if report.damaged:
        raise click.exceptions.Exit(exit_status_of(DamageError("")))
    if report.unverified:
        raise click.exceptions.Exit(exit_status_of(KeyRequiredError("")))

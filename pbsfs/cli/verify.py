"""`pbsfs verify`: reads and checks everything, and tells what is damaged."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import click

from pbsfs.access.options import SourceOptions
from pbsfs.access.sizes import parse_size
from pbsfs.base.errors import DamageError, KeyRequiredError, NotFoundError, UsageError, exit_status_of
from pbsfs.base.text import SHOWN_NAMES, printable
from pbsfs.cli.inside import find, from_mounts
from pbsfs.cli.options import logging_options, run_on_tree, source_options
from pbsfs.cli.progress import shown
from pbsfs.runtime.logs import set_up_logging
from pbsfs.tasks.verify import Report, Verification
from pbsfs.tree import ContentsNode, File, Tree

SOME_PATHS = 3
"""Paths that are named as examples where many files need one key."""


@click.command("verify")
@click.argument("paths", nargs=-1, metavar="[PATH]...")
@click.option("--json", "as_json", is_flag=True, help="Print the report as a JSON object.")
@click.option("--limit-rate", metavar="SIZE", help="Read at most this much a second (50M).")
@click.option("--progress/--no-progress", default=None, help="Show the progress (default: on a terminal).")
@source_options
@logging_options
def command(
    paths: tuple[str, ...],
    as_json: bool,
    limit_rate: str | None,
    progress: bool | None,
    log_level: str,
    log_file: Path | None,
    source: SourceOptions,
) -> None:
    """Read and check all that is at and below each PATH, or everything.

    Each chunk is read once, however many images share it. Damaged files are listed with the ranges that
    are damaged. Exit status 6: damage was found; 5: there was none, but something could not be checked for
    want of its key; 3: there is nothing to check in the whole datastore.

    \b
    Examples:
      pbsfs verify
      pbsfs verify vm/100/latest host/web1 --limit-rate 50M
      pbsfs verify --datastore-dir /srv/store1 --keyfile key.json --json vm/101
    """
    set_up_logging(log_level, log_file)
    source, places = from_mounts(source, paths or ("",))
    rate = None if limit_rate is None else parse_size(limit_rate)
    if rate == 0:
        raise UsageError("--limit-rate 0 would never end")

    async def work(tree: Tree) -> Report:
        files: dict[bytes, File | ContentsNode] = {}
        verification = Verification(tree.reader.store.memory, rate=rate)
        nodes = [await find(tree, path, source) for path in places]
        for node in nodes:
            files |= {file.path: file for file in await verification.collect(node)}
        named = tree.root.namespace.parts or any(node is not tree.root for node in nodes)
        if not (files or verification.report.damaged or named):
            raise NotFoundError(
                f"{tree.reader.source}: it holds no backups, so nothing was checked; name another place, "
                "or a group or namespace that may be empty"
            )
        total = sum([(await file.glance()).data_size for file in files.values()])
        with shown(progress, "verify", total) as advance:
            return await verification.run(list(files.values()), advance)

    report = run_on_tree(work, reads_much=True, source=source)
    click.echo(json.dumps(_as_json(report), indent=2) if as_json else printable(_as_text(report), keep="\n"))
    if report.damaged:
        raise click.exceptions.Exit(exit_status_of(DamageError("")))
    if report.unverified:
        raise click.exceptions.Exit(exit_status_of(KeyRequiredError("")))


def _as_json(report: Report) -> dict[str, Any]:
    return {
        "files": report.files,
        "chunks": report.chunks,
        "bytes": report.size,
        "damaged": [
            {
                "path": damage.path,
                "reason": damage.reason,
                "ranges": [{"offset": found.offset, "length": found.length} for found in damage.ranges],
                "files": [os.fsdecode(path) for path in damage.hit.paths],
                "file_count": damage.hit.count,
            }
            for damage in sorted(report.damaged, key=lambda damage: damage.path)
        ],
        "unverified": [{"path": path, "reason": why} for path, why in sorted(report.unverified.items())],
    }


def _as_text(report: Report) -> str:
    lines = []
    for damage in sorted(report.damaged, key=lambda damage: damage.path):
        where = ", ".join(f"bytes {r.offset} to {r.offset + r.length - 1}" for r in damage.ranges)
        lines.append(f"damaged: {damage.path}: {where + ': ' if where else ''}{damage.reason}")
        if damage.hit.count:
            named = ", ".join(map(os.fsdecode, damage.hit.paths[:SHOWN_NAMES]))
            more = f", … ({damage.hit.count} in all)" if damage.hit.count > SHOWN_NAMES else ""
            lines.append(f"  files in it that are hit: {named}{more}")
    for fingerprint, paths in sorted(report.missing_keys.items(), key=lambda item: item[1]):
        key = f"the key {fingerprint}" if fingerprint else "a key that the manifest does not name"
        more = f", … ({len(paths)} files)" if len(paths) > SOME_PATHS else ""
        shown = ", ".join(sorted(paths)[:SOME_PATHS])
        lines.append(f"not checked: {key} was not given (--keyfile): {shown}{more}")
    lines.append(
        f"{report.files} files, {report.chunks} chunks, {report.size} bytes read; "
        f"{len(report.damaged)} damaged, {len(report.unverified)} not checked"
    )
    return "\n".join(lines)

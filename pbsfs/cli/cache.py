"""`pbsfs cache`: looks at the cache on disk, makes it smaller, and fills it ahead."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import click

from pbsfs.access.caching import find_cache
from pbsfs.access.config import configure, read_configuration
from pbsfs.access.options import SourceOptions, option_of
from pbsfs.access.sizes import parse_size
from pbsfs.base.errors import DamageError, KeyRequiredError, OutputError, UsageError, exit_status_of
from pbsfs.base.names import format_time
from pbsfs.base.text import size_text
from pbsfs.cli.inside import find, from_mounts
from pbsfs.cli.options import logging_options, source_options
from pbsfs.cli.parameters import FilePath
from pbsfs.cli.progress import shown
from pbsfs.cli.running import described_by, environment, run_on_described
from pbsfs.runtime.logs import LogOptions, set_up_logging
from pbsfs.sources.cached.files import Kind
from pbsfs.sources.cached.source import CachedSource
from pbsfs.sources.cached.store import DiskCache
from pbsfs.tasks.report import Report
from pbsfs.tasks.verify import Verification
from pbsfs.tree import ContentsNode, File, Tree

_WORDS = {
    Kind.CHUNK: "chunks",
    Kind.FILE: "indexes and blobs",
    Kind.RECORD: "listings and manifests",
}


@click.group("cache", context_settings={"help_option_names": ["-h", "--help"]})
def command() -> None:
    """Look at the cache on disk, make it smaller, or fill it ahead.

    \b
    Examples:
      pbsfs cache info --cache-dir /var/cache/pbsfs
      pbsfs cache warm --cache-dir /var/cache/pbsfs vm/100/latest
      pbsfs cache prune --cache-dir /var/cache/pbsfs --keep 10G
    """


@command.command("info", short_help="Show what is in the cache.")
@click.option(
    "--cache-dir",
    metavar="DIR",
    type=FilePath(readable=False),
    help="Look at this cache (or PBSFS_CACHE_DIR).",
)
@click.option("--profile", metavar="NAME", help="Look at the cache of this profile.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object.")
def info(cache_dir: Path | None, profile: str | None, as_json: bool) -> None:
    """Show how much is in the cache, and when it was used.

    \b
    Example:
      pbsfs cache info --cache-dir /var/cache/pbsfs
    """
    cache = _opened(cache_dir, profile)
    try:
        found = cache.contents()
    except OSError as error:
        raise _unusable(cache, error) from None
    if as_json:
        facts = {
            "directory": str(cache.directory),
            "bytes": found.size,
            "entries": {kind.name.lower(): found.counts[kind] for kind in Kind},
            "sizes": {kind.name.lower(): found.sizes[kind] for kind in Kind},
            "oldest": None if found.oldest is None else int(found.oldest),
            "newest": None if found.newest is None else int(found.newest),
        }
        click.echo(json.dumps(facts, indent=2))
        return
    rows = [("directory", str(cache.directory)), ("size", size_text(found.size))]
    rows += [(_WORDS[kind], f"{found.counts[kind]}, {size_text(found.sizes[kind])}") for kind in Kind]
    if found.oldest is not None and found.newest is not None:
        rows.append(("last used", f"{format_time(int(found.oldest))} to {format_time(int(found.newest))}"))
    width = max(len(name) for name, _value in rows)
    for name, value in rows:
        click.echo(f"{name:<{width}}  {value}")


@command.command("prune", short_help="Remove what was used longest ago.")
@click.option(
    "--cache-dir", metavar="DIR", type=FilePath(readable=False), help="Prune this cache (or PBSFS_CACHE_DIR)."
)
@click.option("--profile", metavar="NAME", help="Prune the cache of this profile.")
@click.option(
    "--keep",
    metavar="SIZE",
    default="0",
    callback=lambda _context, _parameter, value: parse_size(value),
    help="Keep SIZE of what was used last (default: 0, which removes everything).",
)
def prune(cache_dir: Path | None, profile: str | None, keep: int) -> None:
    """Remove what was used longest ago; programs that use the cache meanwhile fetch it again.

    \b
    Examples:
      pbsfs cache prune --cache-dir /var/cache/pbsfs
      pbsfs cache prune --cache-dir /var/cache/pbsfs --keep 10G
    """
    cache = _opened(cache_dir, profile)
    try:
        removed = cache.prune(keep)
    except OSError as error:
        raise _unusable(cache, error) from None
    click.echo(f"removed {size_text(removed)} from {cache.directory}")


@command.command("warm", short_help="Fetch an image or a machine ahead.")
@click.argument("paths", nargs=-1, required=True, metavar="PATH...")
@click.option("--progress/--no-progress", default=None, help="Show the progress (default: on a terminal).")
@source_options
@logging_options
def warm(paths: tuple[str, ...], progress: bool | None, source: SourceOptions, log: LogOptions) -> None:
    """Read everything at and below each PATH, so that the cache holds it, also for --offline.

    Damage is reported as by pbsfs verify, with the same exit statuses. Status 8: the cache can't hold it.

    \b
    Examples:
      pbsfs cache warm --cache-dir /var/cache/pbsfs vm/100/latest
      pbsfs cache warm --profile remote vm/100/latest/drive-scsi0.img
    """
    set_up_logging(log)
    source, places = from_mounts(source, paths)
    if source.offline:
        raise UsageError("--offline: warm asks the source; leave it out")
    description = described_by(configure(source, environment()), reads_much=True)
    cache = description.cache
    if cache is None:
        raise _no_cache()
    _check_writable(DiskCache(cache.directory, cache.size))

    async def work(tree: Tree) -> tuple[Report, int]:
        cached = tree.reader.source
        assert isinstance(cached, CachedSource)
        cached.keep_all()
        verification = Verification(tree.reader.store.memory)
        files: dict[bytes, File | ContentsNode] = {}
        for path in places:
            found = await verification.collect(await find(tree, path, source))
            files |= {file.path: file for file in found}
        total = sum([(await file.glance()).data_size for file in files.values()])
        with shown(progress, "warm", total) as advance:
            report = await verification.run(list(files.values()), advance)
        return report, await cached.settled()

    report, written = run_on_described(work, description)
    click.echo(report.as_text())
    click.echo(f"{size_text(written)} added to {cache.directory}")
    if report.damaged:
        raise click.exceptions.Exit(exit_status_of(DamageError("")))
    if report.unverified:
        raise click.exceptions.Exit(exit_status_of(KeyRequiredError("")))


def _opened(directory: Path | None, profile: str | None) -> DiskCache:
    """The cache that exists. Raises UsageError."""
    if directory is None and profile is not None:
        directory = read_configuration(environment()).profile(profile).options.cache_dir
        if directory is None:
            raise UsageError(f"profile {profile}: has no cache-dir; name the cache with --cache-dir")
    access = find_cache(directory, None, False, environment(), option_of)
    if access is None:
        raise _no_cache()
    cache = DiskCache(access.directory, access.size)
    try:
        exists = cache.exists()
    except OSError as error:
        raise _unusable(cache, error) from None
    if not exists:
        raise UsageError(f"{access.directory}: there is no cache of pbsfs; check --cache-dir")
    return cache


def _check_writable(cache: DiskCache) -> None:
    """Makes a cache that is missing. Raises OutputError."""
    try:
        cache.prepare()
        problem = None if cache.is_writable() else os.strerror(errno.EACCES)
    except OSError as error:
        problem = error.strerror
    if problem is not None:
        raise OutputError(f"{cache}: {problem}; name a directory that this user may write")


def _no_cache() -> UsageError:
    return UsageError("no cache on disk is named; name it with --cache-dir, PBSFS_CACHE_DIR or a profile")


def _unusable(cache: DiskCache, error: OSError) -> OutputError:
    return OutputError(f"{cache}: {error.strerror}; run this as a user who may change it")

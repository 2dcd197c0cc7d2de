"""What `pbsfs export` does with files in archives: restores them, or packs them, and reports how it went."""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import click

from pbsfs.base.errors import OutputError, PartialError, UsageError
from pbsfs.base.text import counted, first_of, one_line
from pbsfs.cli.output import standard_output
from pbsfs.tasks.cat import write_file
from pbsfs.tasks.extract.extract import Restored
from pbsfs.tasks.extract.run import Advance, Options, pack, restore
from pbsfs.tasks.image.refusals import refusal
from pbsfs.tree import ContentsFile, ContentsNode


async def export_contents(
    node: ContentsNode,
    dest: Path,
    form: str | None,
    options: Options,
    advance: Advance,
    *,
    zstd: bool,
    force: bool,
    mode: int | None,
) -> None:
    """Restores `node` to `dest`, or with a `form`, tar or zip, writes an archive there.

    Raises what reading raises, OutputError, and PartialError where damage was skipped.
    """
    if form is None and str(dest) == "-":
        if isinstance(node, ContentsFile) and not zstd:  # its bytes, as of any other file
            await write_file(node, standard_output())
            return
        form = "tar"
    if form is not None and str(dest) == "-" and sys.stdout is None:
        raise UsageError("standard output is closed; redirect it to a file or program")
    if form is not None and str(dest) == "-" and sys.stdout.isatty():
        raise UsageError(f"a {form} archive is not for a terminal; redirect the output, or name a file")
    if zstd and form != "tar":
        raise UsageError("--zstd goes with --format tar; give both")
    if form is None:
        if force or mode is not None:
            raise UsageError("--force and --mode are for images and archives; see --overwrite")
        result, unset = await restore(node, dest, options, advance)
        for line in str(unset).splitlines():
            click.echo(f"pbsfs: {line}", err=True)
    else:
        with _archive_file(dest, force=force or options.overwrite, mode=mode, zstd=zstd) as out:
            packing = await pack(node, out, form, options, advance)
        result = packing.result
        for what, count in packing.left_out.items():
            click.echo(f"pbsfs: left out {what}: {count}; a {form} archive cannot hold them", err=True)
    if options.selection.included and not result.files and not result.lost_count:
        click.echo("pbsfs: no entry below PATH matches --pattern, so none is restored", err=True)
    _report_damage(result)


def _report_damage(result: Restored) -> None:
    lines = [f"{path or '.'}: not restored: {reason}" for path, reason in result.lost]
    for path, ranges, reason in result.zeroed:
        where = first_of([f"bytes {r.offset} to {r.offset + r.length - 1}" for r in ranges])
        lines.append(f"{path}: {where} are zeros: {reason}")
    for line in lines:
        click.echo(f"pbsfs: {one_line(line)}", err=True)
    more = result.lost_count + result.zeroed_count - len(lines)
    if lines:
        raise PartialError(
            f"restored but for damaged data: {counted(result.lost_count, 'entry')} missing or incomplete, "
            f"{counted(result.zeroed_count, 'file')} with zeros instead; they are listed above"
            + (f", but for {more} of them" if more else "")
        )


@contextmanager
def _archive_file(dest: Path, *, force: bool, mode: int | None, zstd: bool) -> Iterator[IO[bytes]]:
    """Where an archive is written to: standard output, or a file that gets its name when it is complete."""
    if str(dest) == "-":
        with _compressed(standard_output(), zstd=zstd) as out:
            yield out
        return
    if os.path.isdir(dest):
        raise OutputError(f"cannot write {dest}: it is a directory; name a file in it")
    if not force and os.path.lexists(dest):
        raise OutputError(
            f"cannot write {dest}: it exists; overwrite it with --overwrite, or name another file"
        )
    part = dest.with_name(dest.name + ".part")
    try:
        fd = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except FileExistsError:
        raise OutputError(
            f"cannot write {part}: it exists; remove what is left of an earlier export"
        ) from None
    except OSError as error:
        raise OutputError(refusal(part, error)) from None
    try:
        try:
            with open(fd, "wb") as file:
                with _compressed(file, zstd=zstd) as out:
                    yield out
                file.flush()
                os.fchmod(fd, _mode_of(dest) if mode is None else mode)
                os.fsync(fd)
            os.rename(part, dest)
        except OSError as error:
            raise OutputError(refusal(dest, error)) from None
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def _mode_of(dest: Path) -> int:
    """The mode of the file that is overwritten, or of a new one."""
    try:
        return stat.S_IMODE(dest.lstat().st_mode) & 0o777 if dest.is_file() else 0o600
    except OSError:
        return 0o600


@contextmanager
def _compressed(out: IO[bytes], *, zstd: bool) -> Iterator[IO[bytes]]:
    if not zstd:
        yield out
        return
    import zstandard  # noqa: PLC0415 - only where it is asked for

    writer = zstandard.ZstdCompressor(threads=-1).stream_writer(out, closefd=False)
    yield writer
    # Not after an error: a frame that ends well looks complete.
    writer.close()  # type: ignore[no-untyped-call]

"""How `pbsfs export` copies the files of snapshots: whole to a target, or to what exists by writing only what
differs.

Called by `pbsfs export`, in the trio loop.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import click

from pbsfs.base.errors import DamageError, OutputError, PbsfsError, UsageError
from pbsfs.base.text import counted
from pbsfs.cli.progress import shown
from pbsfs.reader.damage import Range, ZeroedRanges
from pbsfs.reader.image import Image
from pbsfs.tasks.image.compared import ExistingDevice, ExistingFile
from pbsfs.tasks.image.copy import copy_blob, copy_image
from pbsfs.tasks.image.in_place import Amounts, Restore
from pbsfs.tasks.image.map import check_map_file, write_map
from pbsfs.tasks.image.opening import open_existing, open_resumed, open_target
from pbsfs.tasks.image.refusals import refusal, refuse_existing
from pbsfs.tasks.image.target import Target
from pbsfs.tasks.made import made_directory
from pbsfs.tree import BlobFile, ImageFile


@dataclass(frozen=True, slots=True)
class Copying:
    """What the options of a command say about the copies of images and other files.

    `mode`: of the file; None for the default. `progress`: what the user wants; None for what suits standard
    error. `zeroed`: remembers damage that reads as zeros; None if none may. Raises UsageError
    for options that exclude one another.
    """

    dest: Path
    force: bool
    mode: int | None
    progress: bool | None
    zeroed: ZeroedRanges | None
    map_file: Path | None
    in_place: bool
    dry_run: bool
    resume: bool

    def __post_init__(self) -> None:
        if self.dry_run and not self.in_place:
            raise UsageError("--dry-run requires --in-place; give both or neither")
        if self.in_place and self.resume:
            raise UsageError("--in-place continues what was interrupted anyway; leave out --resume")
        if self.in_place and self.mode is not None:
            raise UsageError("--in-place keeps the mode of the file; leave out --mode")

    async def run_all(self, files: Sequence[ImageFile | BlobFile]) -> None:
        """Copies `files` into the destination, a directory that is made if needed. Raises like `run`.

        What can't be written is found before the first is copied, where that is possible.
        """
        if str(self.dest) == "-" or self.map_file is not None:
            option = "--map-file" if self.map_file is not None else "-"
            raise UsageError(f"{option} is for one PATH; name one, or leave it out")
        names = [os.fsdecode(file.name) for file in files]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise UsageError(f"several files have the name {twice}; copy them to different directories")
        self._check_apart(names)
        if self.in_place:
            await self._check_all(files)
            await self._run_each(files)
            return
        with made_directory(self.dest):
            if not self.force and not self.resume:
                for name in names:
                    refuse_existing(self.dest / name)
            await self._run_each(files)

    async def _run_each(self, files: Sequence[ImageFile | BlobFile]) -> None:
        damaged: list[DamageError] = []
        for file in files:
            try:
                await self.run(file)
            except DamageError as error:
                if self.zeroed is None:
                    raise
                damaged.append(error)
        for shown_first in damaged[:-1]:
            click.echo(f"pbsfs: {shown_first}", err=True)
        if damaged:
            raise damaged[-1]

    def _check_apart(self, names: Sequence[str]) -> None:
        """Raises OutputError if two of the files in the destination are one, as links can make them."""
        seen: dict[object, Path] = {}
        for place in (self.dest / name for name in names):
            try:
                found = os.stat(place)
            except OSError:  # there is none yet, or it is reported when it is opened
                continue
            # A name of its own for a file is replaced; what is changed in place has all of its names.
            identity = found.st_rdev or (
                (found.st_dev, found.st_ino) if self.in_place else os.path.realpath(place)
            )
            other = seen.setdefault(identity, place)
            if other != place:
                raise OutputError(f"{place} is the same file or device as {other}; name each its own")

    async def _check_all(self, files: Sequence[ImageFile | BlobFile]) -> None:
        """Raises an error if several `files` can't all be turned into theirs in place; writes nothing."""
        if not self._is_directory():
            raise UsageError(f"{self.dest}: several images require a directory; name one, or give one image")
        for file in files:
            if not isinstance(file, ImageFile):
                raise UsageError(f"{file}: --in-place is for images; name the images of the snapshot")
            place = self.dest / os.fsdecode(file.name)
            with open_existing(place, place.name, (await file.open()).size, force=self.force):
                pass

    async def run(self, file: ImageFile | BlobFile) -> None:
        """Copies `file`. Raises DamageError, SourceError, UsageError and OutputError."""
        name = os.fsdecode(file.name)
        if isinstance(file, ImageFile):
            await self._image(await file.open(), name)
            return
        data = await file.read()
        if self.in_place:
            raise UsageError(f"{file}: --in-place is for images; leave it out")
        if self.resume and _holds(self._place_of(name), data):
            return
        with open_target(self.dest, name, len(data), force=self.force, mode=self.mode) as target:
            await copy_blob(data, target)

    async def _image(self, image: Image, name: str) -> None:
        """`name`: of the file if the destination is a directory."""
        copy = self._change if self.in_place else self._resume if self.resume else self._copy
        place = await copy(image, name)
        if self.zeroed is not None and not self.dry_run:
            _report_damage(self.zeroed.of(str(image)), image.size, place, force=self.force)

    async def _copy(self, image: Image, name: str) -> Path | None:
        with (
            open_target(self.dest, name, image.size, force=self.force, mode=self.mode) as target,
            shown(self.progress, name, image.size) as advance,
        ):
            place = self._place_of_map(target)
            await copy_image(image, target, advance)
        return place

    async def _resume(self, image: Image, name: str) -> Path | None:
        file = self._place_of(name)
        if not self.force and _is_file(file) and await self._is_complete(image, file, name):
            return None
        amounts = Amounts()
        with (
            open_resumed(self.dest, name, image.size, force=self.force, mode=self.mode) as target,
            shown(self.progress, name, image.size, lambda: _details(amounts)) as advance,
        ):
            place = self._place_of_map(target)
            restore = Restore(image, target, advance, amounts=amounts)
            with _explained(lambda: True, target, f"{target.part} is kept"):
                await restore.run()
        return place

    async def _is_complete(self, image: Image, file: Path, name: str) -> bool:
        """Whether an earlier export has completed `file`: it has the bytes of the image."""
        with open_existing(file, name, image.size, only_compared=True) as target:
            if isinstance(target, ExistingDevice) or target.size != image.size:
                return False
            with shown(self.progress, name, image.size) as advance:
                compared = Restore(image, target, advance, dry_run=True)
                await compared.run()
        return compared.amounts.differing == compared.amounts.discarded == 0

    async def _change(self, image: Image, name: str) -> Path | None:
        with open_existing(self.dest, name, image.size, force=self.force) as target:
            place = None if self.dry_run else self._place_of_map(target)
            amounts = Amounts()
            with shown(self.progress, name, image.size, lambda: _details(amounts)) as advance:
                restore = Restore(image, target, advance, dry_run=self.dry_run, amounts=amounts)
                mixed = f"{target} is now partly the backup and partly what it was before"
                with _explained(lambda: restore.began, target, mixed):
                    await restore.run()
            click.echo(_report(amounts, image, target, dry_run=self.dry_run))
        return place

    def _is_directory(self) -> bool:
        return os.path.isdir(self.dest)  # unlike Path.is_dir, False for a place that the system refuses

    def _place_of(self, name: str) -> Path:
        return self.dest / name if self._is_directory() else self.dest

    def _place_of_map(self, target: Target) -> Path | None:
        place = (self.map_file or target.map_file) if self.zeroed is not None else None
        if place is not None:
            check_map_file(place, target, force=self.force)
        return place


def _is_file(place: Path) -> bool:
    return os.path.isfile(place)  # as for `_is_directory`


def _holds(place: Path, data: bytes) -> bool:
    """Whether a file has exactly this content; False for what can't be read."""
    try:
        return place.stat().st_size == len(data) and place.read_bytes() == data
    except OSError:
        return False


def _details(amounts: Amounts) -> str:
    """What the progress says of the bytes done, in MiB."""
    fetched, reused, holes = (
        count >> 20 for count in (amounts.written, amounts.reused, amounts.empty + amounts.discarded)
    )
    return f"{fetched} MiB fetched, {reused} reused, {holes} holes"


@contextmanager
def _explained(holds: Callable[[], bool], target: Target, state: str) -> Iterator[None]:
    """Adds `state`, what the target is now, to what ends a restore early, if it `holds` then."""
    again = "run the same command again to finish it"
    try:
        yield
    except PbsfsError as error:
        if holds():
            if isinstance(error, DamageError):
                again += ", with --on-damage zero if the damage stays"
            error.args = (f"{error}; {state}: {again}",)
        raise
    except OSError as error:
        text = refusal(str(target), error)
        raise OutputError(f"{text}; {state}: {again}" if holds() else text) from None
    except Exception:
        raise
    except BaseException:  # cancelled by a signal; a nursery makes a group of that
        now = f"{state}; {again}" if holds() else f"{target} is unchanged"
        click.echo(f"pbsfs: interrupted: {now}", err=True)
        raise


def _report(amounts: Amounts, image: Image, target: ExistingFile | ExistingDevice, *, dry_run: bool) -> str:
    """What was done, or would be done."""
    fetched, reused, discarded, became = (
        ("would fetch", "reuse", "discard", "would get")
        if dry_run
        else ("fetched", "reused", "discarded", "got")
    )
    text = (
        f"{target}: {fetched} {counted(amounts.differing, 'byte')} in "
        f"{counted(amounts.chunks, 'chunk')} that {'differs' if amounts.chunks == 1 else 'differ'}, "
        f"{reused} {amounts.reused} bytes, {discarded} {amounts.discarded} bytes where the backup has holes\n"
    )
    if isinstance(target, ExistingDevice):
        if target.capacity > image.size:
            text += f"{target}: the last {target.capacity - image.size} bytes, after the image, stay\n"
    elif target.size != image.size:
        text += f"{target}: {became} {image.size} bytes instead of {target.size}\n"
    return text + ("nothing was written" if dry_run else "what was written was read back and verified")


def _report_damage(zeros: list[Range], size: int, map_file: Path | None, *, force: bool) -> None:
    """Writes the map, and raises DamageError if the copy has zeros instead of damaged data."""
    if map_file is not None:
        write_map(map_file, size, zeros, force=force)
    if zeros:
        where = f"; {map_file} lists them" if map_file else f": {', '.join(map(str, zeros[:20]))}"
        raise DamageError(
            f"the copy is complete, but {sum(zero.length for zero in zeros)} bytes in "
            f"{counted(len(zeros), 'range')} are zeros instead of damaged data{where}"
        )

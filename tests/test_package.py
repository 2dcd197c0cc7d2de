"""The Debian package's files, but for those that pip installs. `scripts/package --check` tries all of it."""

from __future__ import annotations

import gzip
import itertools
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from pbsfs import __version__
from pbsfs.cli import cli
from pbsfs.cli.mount_helper import command as mount_helper
from tests.support.documents import links

CHECKOUT = Path(__file__).resolve().parent.parent
FILES = CHECKOUT / "packaging" / "files.py"

BUILDERS = {
    "check",
    "commands.py",
    "debian/control",
    "files.py",
    "manual.py",
    "reference.py",
    "session.py",
    "variables.py",
}
"""What in `packaging/` makes the package, and is not in it."""


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    stage = tmp_path_factory.mktemp("stage")
    subprocess.run([sys.executable, "-B", FILES, stage], check=True, timeout=60)
    return stage


def commands(
    command: click.Command, words: tuple[str, ...] = ("pbsfs",)
) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    yield words, command
    if isinstance(command, click.Group):
        for name in command.list_commands(click.Context(command)):
            subcommand = command.get_command(click.Context(command), name)
            assert subcommand is not None
            yield from commands(subcommand, (*words, name))


def installed(stage: Path) -> set[str]:
    paths = (path for path in stage.rglob("*") if not path.is_dir())
    return {str(path.relative_to(stage)) for path in paths}


def shown(page: str) -> str:
    """What man(1) prints of a page, on one line."""
    done = subprocess.run(
        ["man", "--warnings", "--encoding=utf-8", "--local-file", "-"],
        input=page,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
        env={**os.environ, "MANWIDTH": "500", "LC_ALL": "C.UTF-8", "TERM": "dumb"},
    )
    assert not done.stderr
    return " ".join(re.sub(".\b", "", done.stdout).split())


@pytest.mark.parametrize(
    ("words", "command"),
    [*commands(cli), (("mount.pbsfs",), mount_helper)],
    ids=lambda given: "-".join(given) if isinstance(given, tuple) else "",
)
def test_every_command_has_a_manual_page_with_what_help_prints(
    stage: Path, words: tuple[str, ...], command: click.Command
) -> None:
    (packed,) = stage.glob(f"usr/share/man/man?/{'-'.join(words)}.?.gz")
    text = shown(gzip.decompress(packed.read_bytes()).decode())
    context = click.Context(command, info_name=words[-1])
    for parameter in command.get_params(context):
        if isinstance(parameter, click.Option) and not parameter.hidden:
            assert " ".join((parameter.help or "").split()) in text
            assert all(option in text for option in parameter.opts)
    paragraphs = f"{command.help}\n\n{command.epilog or ''}".replace("\b", "").split("\n\n")
    for line in (line for paragraph in paragraphs for line in paragraph.splitlines()):
        wanted = " ".join(line.split())
        assert wanted in text or wanted.removesuffix(":").upper() in text


def test_every_file_in_packaging_is_in_the_package(stage: Path) -> None:
    sources = {
        str(path.relative_to(CHECKOUT / "packaging"))
        for path in (CHECKOUT / "packaging").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    contents = {path.read_bytes() for path in stage.rglob("*") if path.is_file()}
    left_out = {name for name in sources if (CHECKOUT / "packaging" / name).read_bytes() not in contents}
    assert left_out == BUILDERS


def test_programs_completion_plugin_and_documents_are_in_the_package(stage: Path) -> None:
    files = installed(stage)
    assert {
        "usr/bin/pbsfs",
        "usr/sbin/mount.pbsfs",
        "usr/sbin/mount.fuse.pbsfs",
        "usr/share/man/man8/mount.fuse.pbsfs.8.gz",
        "usr/share/bash-completion/completions/pbsfs",
        "usr/share/zsh/vendor-completions/_pbsfs",
        "usr/share/fish/vendor_completions.d/pbsfs.fish",
        "usr/share/doc/pbsfs/copyright",
        "usr/share/doc/pbsfs/changelog.gz",
        *(f"usr/share/doc/pbsfs/{path.relative_to(CHECKOUT)}" for path in CHECKOUT.glob("docs/**/*.md")),
    } <= files
    (plugin,) = (path for path in stage.rglob("nbdkit-pbs-plugin"))
    assert os.access(plugin, os.X_OK)
    plugins = subprocess.run(["nbdkit", "--dump-config"], capture_output=True, text=True, check=True).stdout
    assert f"plugindir=/{plugin.parent.relative_to(stage)}\n" in plugins


def test_links_in_the_documents_of_the_package_lead_to_files_in_it(stage: Path) -> None:
    folder = stage / "usr/share/doc/pbsfs"
    found = [(document, target) for document in folder.rglob("*.md") for target, _anchor in links(document)]
    assert len(found) > 50
    assert [pair for pair in found if not pair[1].is_relative_to(folder) or not pair[1].is_file()] == []


def test_nothing_is_left_for_the_paths_of_this_checkout(stage: Path) -> None:
    assert not [
        path for path in stage.rglob("*") if path.is_file() and str(CHECKOUT).encode() in path.read_bytes()
    ]


def test_scripts_for_shells_are_valid(stage: Path) -> None:
    plugin = next(stage.rglob("nbdkit-pbs-plugin"))
    completion = stage / "usr/share/bash-completion/completions/pbsfs"
    maintainer = [path for path in (stage / "DEBIAN").iterdir() if path.name != "control"]
    for shell, path in (("sh", plugin), ("bash", completion), *(("sh", path) for path in maintainer)):
        subprocess.run([shell, "-n", path], check=True)


def test_the_package_has_the_version_of_pbsfs_and_requires_this_python(stage: Path) -> None:
    fields = dict(
        line.split(": ", 1) for line in (stage / "DEBIAN/control").read_text().splitlines() if line[0] != " "
    )
    assert fields["Version"].startswith(f"{__version__}+")
    depends = fields["Depends"].split(", ")
    assert {f"python{sys.version_info[0]}.{sys.version_info[1]}", "fuse3"} < set(depends)
    assert any(name.startswith("libfuse3-") for name in depends)
    assert "@" not in "".join(value for name, value in fields.items() if name != "Maintainer")


def compared(one: str, relation: str, other: str) -> bool:
    return subprocess.run(["dpkg", "--compare-versions", one, relation, other], check=False).returncode == 0


def test_versions_sort_as_they_follow_each_other() -> None:
    program = (
        "import sys; sys.path.insert(0, sys.argv[1]); import files; "
        "[print(files.debian_version(version, {'ID': 'debian', 'VERSION_ID': release})) "
        "for version in ('1.0.dev1', '1.0a1', '1.0rc1', '1.0', '1.0.1') for release in ('12', '13')]"
    )
    done = subprocess.run(
        [sys.executable, "-B", "-c", program, FILES.parent], capture_output=True, text=True, check=True
    )
    versions = done.stdout.split()
    assert versions[-1] == "1.0.1+deb13"
    for earlier, later in itertools.pairwise(versions):
        assert compared(earlier, "lt", later), (earlier, later)

"""The guides, docs/files.md and the README: each command that they print is typed, and does what they say.

They read from the reference server, but for those that name the directory of a datastore.
"""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

from pbsfs.access.profiles import parse_profile
from pbsfs.cli.mount_helper import translated
from tests.support.guides import blocks, commands, follow, furnish, matches, nginx
from tests.support.masterkeys import CONTENT
from tests.support.mounts import cleaned_up
from tests.support.needs import need, need_fuse
from tests.support.program import environment
from tests.support.s3 import SECRET_KEY, S3Server
from tests.support.server import certificate as certificates
from tests.support.serving import SECRET, TOKEN, serving

CHECKOUT = Path(__file__).resolve().parent.parent
DOCS = CHECKOUT / "docs"
GUIDES = [CHECKOUT / "README.md", DOCS / "files.md", *sorted((DOCS / "guides").glob("*.md"))]


class Afterwards:
    """What a guide has left in the home directory. `disks`: of the virtual machine 100, each night."""

    def __init__(self, place: Path, disks: list[bytes]) -> None:
        self.home = place / "home"
        self.today = place / "today.raw"
        self.disks = disks

    def text(self, path: str) -> str:
        return (self.home / path).read_text()

    def data(self, path: str) -> bytes:
        return (self.home / path).read_bytes()


def the_file_is_back(left: Afterwards) -> None:
    assert left.text("nginx.conf") == left.text("restored/nginx.conf") == nginx(8080)
    assert left.text("nginx.conf.old") == nginx(80)
    assert left.text("data/new.txt") == "new\n"


def the_files_of_containers_are_back(left: Afterwards) -> None:
    assert left.text("hostname") == "shop\n"
    assert left.text("restored/www/index.html") == left.text("pages/www/index.html") == "<html>\n"
    assert (left.home / "restored/www/upload/invoice.pdf").exists()
    assert not (left.home / "clean/www/upload").exists()
    assert not (left.home / "pages/www/upload/invoice.pdf").exists()
    assert left.text("etc-of-web1/hostname") == "shop\n"
    assert left.data("srv.tar.zst")
    assert left.data("home.zip")


def the_disk_is_copied(left: Afterwards) -> None:
    for copy in ("disk.img", "machine-100/drive-scsi0.img", "big.img", "copy.img"):
        assert left.data(copy) == left.disks[2]
    assert left.text("machine-100/qemu-server.conf").startswith("name: mail\n")
    assert left.data("disk.qcow2")[:4] == b"QFI\xfb"
    assert left.data("disk.vmdk")[:4] == b"KDMV"


def the_disk_is_as_it_was(left: Afterwards) -> None:
    assert left.today.read_bytes() == left.disks[2]


def the_copy_is_complete(left: Afterwards) -> None:
    assert left.data("machine-100/drive-scsi0.img") == left.disks[2]
    assert left.text("restored/www/index.html") == "<html>\n"


def the_disk_is_there_without_the_server(left: Afterwards) -> None:
    assert left.data("disk.img") == left.data("offline.img") == left.disks[2]
    assert not (left.home / "root.pxar").exists()


def the_bucket_is_read(left: Afterwards) -> None:
    assert left.data("disk.img") == left.disks[2]


def keys_open_what_is_encrypted(left: Afterwards) -> None:
    assert left.data("disk.img") == left.disks[0]
    assert left.data("recovered.img") == CONTENT
    assert not (left.home / "lost.img").exists()


def only_what_is_damaged_is_zeros(left: Afterwards) -> None:
    saved, whole = (left.text(f"{place}/data/report.txt") for place in ("saved", "whole"))
    assert len(saved) == len(whole)
    assert saved.replace("\0", "") != whole
    assert all(a in (b, "\0") for a, b in zip(saved, whole, strict=True))
    assert left.data("disk.img") == left.disks[2], "ddrescue filled it in"


def the_readme_keeps_its_word(left: Afterwards) -> None:
    assert left.text("nginx.conf") == nginx(8080)
    assert left.text("restored/www/index.html") == "<html>\n"
    assert left.data("home.tar.zst")
    assert left.data("disk.img") == left.today.read_bytes() == left.disks[2]


AFTERWARDS: dict[str, Callable[[Afterwards], None]] = {
    "README": the_readme_keeps_its_word,
    "one-file": the_file_is_back,
    "container": the_files_of_containers_are_back,
    "whole-disk": the_disk_is_copied,
    "roll-back": the_disk_is_as_it_was,
    "dead-server": the_copy_is_complete,
    "bucket": the_bucket_is_read,
    "slow-link": the_disk_is_there_without_the_server,
    "encrypted": keys_open_what_is_encrypted,
    "damage": only_what_is_damaged_is_zeros,
}
"""What else has to hold after a guide: what its commands have written."""

NEEDS = {
    "container": ("rsync", "zstd"),
    "whole-disk": ("qemu-img", "nbdkit"),
    "damage": ("jq", "ddrescue"),
    "luks": ("nbdkit", "nbdinfo"),
}
"""Programs that guides use, and name."""

TYPED = [guide for guide in GUIDES if any(commands(guide.read_text()))]


@pytest.mark.mount
@pytest.mark.long
@pytest.mark.parametrize("guide", TYPED, ids=lambda path: path.stem)
def test_a_guide_does_what_it_says(guide: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    need_fuse()
    need(*NEEDS.get(guide.stem, ()))
    place = tmp_path_factory.mktemp("g")  # a short name: paths of sockets have at most 107 bytes
    disks = furnish(place)
    mnt = place / "mnt"
    certificate = certificates.make(ca_signed=True)
    (authority := place / "ca.pem").write_text(certificate.ca or "")
    bucket = S3Server(mnt / "store1", store="store1", certificate=certificate)
    with serving(mnt / "store1") as server, bucket:
        replaced = {
            "https://s3.example.com": f"https://localhost:{bucket.port}",
            "reader@pbs!laptop@pbs.example.com:store1": server.repository(TOKEN),
            "<the SHA-256 of the certificate>": server.fingerprint,
            "/dev/pve/vm-100-disk-0": str(place / "today.raw"),
            "/srv/store1": str(mnt / "store1"),
            "/mnt/": f"{mnt}/",
        }
        (secret := place / "home/.config/pbsfs/default.secret").write_text(f"{SECRET}\n")
        secret.chmod(0o600)
        (key := secret.with_name("s3.secret")).write_text(f"{SECRET_KEY}\n")
        key.chmod(0o600)
        told = environment(
            HOME=str(place / "home"),
            PATH=f"{place / 'bin'}:{os.environ['PATH']}",
            PBS_FINGERPRINT=server.fingerprint,
        )
        if guide.stem == "bucket":
            told["SSL_CERT_FILE"] = str(authority)
        if guide.stem != "connect":
            told |= {"PBS_REPOSITORY": server.repository(TOKEN), "PBS_PASSWORD_FILE": str(secret)}
        told.pop("XDG_CONFIG_HOME", None)
        with cleaned_up(place / "home/pbs"):
            follow(guide.read_text(), place / "home", told, replaced)
            if guide.stem in AFTERWARDS:
                AFTERWARDS[guide.stem](Afterwards(place, disks))


def test_what_is_checked_afterwards_belongs_to_guides() -> None:
    assert AFTERWARDS.keys() | NEEDS.keys() <= {guide.stem for guide in TYPED}


PAGES = sorted(DOCS.rglob("*.md"))


def test_profiles_in_documents_are_as_pbsfs_reads_them() -> None:
    shortened = re.compile(r"6d:cc:…:b7|<the SHA-256 of the certificate>")
    profiles = [
        parse_profile(name, table, page, {"HOME": "/home/jo"})
        for page in PAGES
        for block in blocks(page.read_text())
        if block.language == "toml"
        for name, table in tomllib.loads(shortened.sub(":".join(["6d"] * 32), block.text))["profiles"].items()
    ]
    assert {"default", "home", "prod"} <= {profile.name for profile in profiles}


def test_lines_of_fstab_in_documents_have_options_that_the_helper_knows() -> None:
    lines = [
        line.split()
        for page in PAGES
        for block in blocks(page.read_text())
        if block.text.startswith("# /etc/fstab\n")
        for line in block.text.splitlines()[1:]
    ]
    assert len(lines) >= 6
    for source, _place, kind, options, dump, check in lines:
        assert (kind, dump, check) == ("pbsfs", "0", "0")
        words, _secrets = translated(source, (options,))
        assert words


def test_guides_mark_their_blocks() -> None:
    """A block without a language, or with a note that nobody reads, would never be run."""
    for guide in GUIDES:
        for block in blocks(guide.read_text()):
            where = f"{guide.name}:{block.line}"
            assert block.language in ("sh", "console", "toml", "ini", "text", "json"), where
            assert block.note in ("", "in the background") or block.status or not block.is_run, where


def test_the_commands_of_a_document_are_found_as_they_are_printed() -> None:
    document = """
```sh
one
two
```
<!-- status 6 -->
```console
$ three \\
    and more
out …
$ four
```
<!-- not run: why -->
```sh
five
```
"""
    found = [(command.text, command.shown, command.status) for command in commands(document)]
    assert found == [
        ("one\ntwo\n", None, 0),
        ("three \\\n    and more\n", "out …\n", 0),
        ("four\n", "", 6),
    ]


@pytest.mark.parametrize(
    ("shown", "printed", "same"),
    [
        ("a\n", "a\n", True),
        ("a\n", "b\n", False),
        ("a …\n", "a b c\n", True),
        ("a …\n", "a b\nc\n", False),
        ("a\n…\nz\n", "a\nb\nc\nz\n", True),
        ("a\n…\nz\n", "a\nb\n", False),
        ("a.c\n", "abc\n", False),
    ],
)
def test_what_is_shown_is_compared_with_what_is_printed(shown: str, printed: str, same: bool) -> None:
    assert matches(shown, printed) is same


def test_a_document_that_is_wrong_fails(tmp_path: Path) -> None:
    told = {"PATH": os.environ["PATH"]}
    for name, text, words in (
        ("status", "```sh\ntrue\n```\n```sh\nfalse\n```\n", "line 5"),
        ("success", "<!-- status 6 -->\n```sh\ntrue\n```\n", "line 3"),
        ("output", "```console\n$ echo one\ntwo\n```\n", "prints:\none"),
    ):
        (home := tmp_path / name / "home").mkdir(parents=True)
        with pytest.raises(AssertionError, match=words):
            follow(text, home, told, {})

"""What a path says of what will be asked for."""

from __future__ import annotations

import pytest

from pbsfs.base.names import MANIFEST, ROOT_NAMESPACE, Archive, Group, Namespace
from pbsfs.sources.base import Expected
from pbsfs.tree.expected import expected_at

PROD = Namespace(("prod",))
VM = Group(ROOT_NAMESPACE, "vm", "100")
FIRST = VM.snapshot(1_700_000_000)
HOST = Group(PROD, "host", "web")
TIME = FIRST.time_text
ROOT = (ROOT_NAMESPACE,)
BOTH = (ROOT_NAMESPACE, PROD)

ARCHIVES = {
    "drive-scsi0.img": "drive-scsi0.img.fidx",
    "root.pxar": "root.pxar.didx",
    "root.mpxar": "root.mpxar.didx",
    "root.ppxar": "root.ppxar.didx",
    "catalog.pcat1": "catalog.pcat1.didx",
    "drive-scsi0.img.fidx": "drive-scsi0.img.fidx",
}


@pytest.mark.parametrize(
    ("path", "found"),
    [
        ("", Expected(ROOT)),
        ("/", Expected(ROOT)),
        ("vm", Expected(ROOT)),
        ("ns/prod/", Expected(BOTH)),
        ("ns", Expected(ROOT)),
        ("vm/100", Expected(ROOT, VM)),
        ("./vm//100/", Expected(ROOT, VM)),
        ("ns/prod/host/web/latest", Expected(BOTH, HOST)),
        ("vm/100/latest/drive-scsi0.img", Expected(ROOT, VM)),
        (f"vm/100/{TIME}", Expected(ROOT, VM, FIRST, (MANIFEST,), sessions=True)),
        (f"vm/100/{TIME.replace(':', '-')}", Expected(ROOT, VM, FIRST, (MANIFEST,), sessions=True)),
        (f"files/vm/100/{TIME}/root/etc", Expected(ROOT, VM, FIRST, (MANIFEST,), sessions=True)),
        (
            f"vm/100/{TIME}/qemu-server.conf",
            Expected(ROOT, VM, FIRST, (MANIFEST, Archive("qemu-server.conf.blob"))),
        ),
    ],
)
def test_what_is_read_is_asked_for_as_far_as_the_path_shows_it(path: str, found: Expected) -> None:
    assert expected_at(path, ROOT_NAMESPACE, reads=True) == found


@pytest.mark.parametrize(("name", "stored"), ARCHIVES.items())
def test_an_image_or_a_stream_is_read_by_its_index_in_a_session(name: str, stored: str) -> None:
    found = expected_at(f"vm/100/{TIME}/{name}", ROOT_NAMESPACE, reads=True)
    assert found == Expected(ROOT, VM, FIRST, (MANIFEST, Archive(stored)), sessions=True)


def test_a_listing_needs_no_file() -> None:
    assert expected_at(f"vm/100/{TIME}/drive-scsi0.img", ROOT_NAMESPACE, reads=False) == Expected(ROOT, VM)


def test_a_listing_in_an_archive_reads_it() -> None:
    found = expected_at(f"files/vm/100/{TIME}/root", ROOT_NAMESPACE, reads=False)
    assert found == Expected(ROOT, VM, FIRST, (MANIFEST,), sessions=True)


@pytest.mark.parametrize("path", ["vm/..", "qemu/100", "vm/a b", f"vm/100/{TIME}/a b", "vm/100/never/x.img"])
def test_no_place_is_an_error_here(path: str) -> None:
    found = expected_at(path, ROOT_NAMESPACE, reads=True)
    assert found.namespaces == ROOT
    assert found.snapshot is None
    assert found.group in (None, VM)


def test_namespaces_that_are_nested_too_deeply_are_left_to_the_look_up() -> None:
    assert expected_at("ns/a/" * 8 + "vm/100", ROOT_NAMESPACE, reads=True).group is None


def test_it_begins_at_the_root_of_the_tree() -> None:
    assert expected_at("host/web", PROD, reads=True) == Expected((PROD,), HOST)

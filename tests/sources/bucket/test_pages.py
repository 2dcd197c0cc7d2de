"""Lists of an object store: what is read from them, and which are refused."""

from __future__ import annotations

import contextlib
import os
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import replace
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pbsfs.base.errors import DamageError, SourceError, WrongServerError
from pbsfs.base.names import BACKUP_TYPES, MANIFEST, ROOT_NAMESPACE, Namespace
from pbsfs.sources.bucket.pages import parse_page
from pbsfs.sources.bucket.source import BucketSource
from pbsfs.testing.writer import DatastoreWriter
from tests.sources.bucket.serving import LIMITS, source_of, use
from tests.sources.conformance import FIRST, VM, add
from tests.support import made
from tests.support.made import TIME
from tests.support.s3 import STORE, Body, S3Server
from tests.support.server.certificate import Certificate

HEAD = '<?xml version="1.0" encoding="UTF-8"?>'


def document(inside: str, *, truncated: str = "false", name: str = "ListBucketResult") -> bytes:
    return (
        f'{HEAD}<{name} xmlns="http://s3.amazonaws.com/doc/2006-03-01/">'
        f"<IsTruncated>{truncated}</IsTruncated>{inside}</{name}>"
    ).encode()


def contents(key: str, size: str = "5") -> str:
    return f"<Contents><Key>{key}</Key><Size>{size}</Size><ETag>&quot;e&quot;</ETag></Contents>"


def test_a_list_has_objects_and_prefixes_and_where_it_goes_on() -> None:
    page = parse_page(
        document(
            contents("a/b") + contents("a/c&amp;d") + "<CommonPrefixes><Prefix>a/x/</Prefix></CommonPrefixes>"
            "<NextContinuationToken>t</NextContinuationToken>",
            truncated="true",
        ),
        "a/",
    )
    assert [(found.key, found.size) for found in page.objects] == [("a/b", 5), ("a/c&d", 5)]
    assert page.prefixes == ["a/x/"]
    assert page.token == "t"


def test_encoded_keys_are_decoded_only_where_the_answer_says_so() -> None:
    page = parse_page(document("<EncodingType>url</EncodingType>" + contents("a%2Fb%20c+d%C3%A9")), "a/")
    assert [found.key for found in page.objects] == ["a/b c dé"]
    assert [found.key for found in parse_page(document(contents("a%2Fb")), "").objects] == ["a%2Fb"]


def test_a_key_that_is_not_text_stops_nothing_else(
    writer: DatastoreWriter, certificate: Certificate, server: S3Server
) -> None:
    add(writer)
    names = "".join(
        f"<CommonPrefixes><Prefix>{STORE}/.cnt/vm/{name}/</Prefix></CommonPrefixes>"
        for name in ("%FF", VM.id)
    )

    async def look(source: BucketSource) -> None:
        server.fail(f"LIST {STORE}/.cnt/vm/", Body(document(f"<EncodingType>url</EncodingType>{names}")))
        assert [info.group for info in await source.groups(ROOT_NAMESPACE)] == [VM]

    use(source_of(server, certificate), look)
    page = parse_page(
        document("<EncodingType>url</EncodingType>" + contents("a/%FF") + contents("a/b")), "a/"
    )
    assert [found.key for found in page.objects] == [os.fsdecode(b"a/\xff"), "a/b"]


def test_a_namespace_of_the_document_means_nothing() -> None:
    text = f"{HEAD}<ListBucketResult><Contents><Key>k</Key><Size>0</Size></Contents></ListBucketResult>"
    assert [found.key for found in parse_page(text.encode(), "").objects] == ["k"]


WRONG = {
    "nothing": b"",
    "no XML": b"<html><p>Hello",
    "another document": document("", name="ListAllMyBucketsResult"),
    "an entity": b'<!DOCTYPE a [<!ENTITY x "y">]>' + document(contents("&x;")),
    "a document type": document("").replace(b"?>", b"?><!DOCTYPE ListBucketResult>"),
    "another encoding": document("").decode().encode("utf-16"),
    "another encoding without a mark": document("").decode().encode("utf-16-le"),
    "a key outside": document(contents("b/x")),
    "a prefix outside": document("<CommonPrefixes><Prefix>b/</Prefix></CommonPrefixes>"),
    "no prefix": document("<CommonPrefixes></CommonPrefixes>"),
    "no key": document("<Contents><Size>1</Size></Contents>"),
    "no size": document("<Contents><Key>a/</Key></Contents>"),
    "a size that is none": document(contents("a/b", "-1")),
    "a size that is no number": document(contents("a/b", "5x")),
    "a size that is too large": document(contents("a/b", str(1 << 60))),
    "a size of many digits": document(contents("a/b", "9" * 5000)),
    "no token": document(contents("a/b"), truncated="true"),
}


@pytest.mark.parametrize("body", WRONG.values(), ids=WRONG.keys())
def test_a_list_that_is_none_is_refused(
    body: bytes, writer: DatastoreWriter, server: S3Server, certificate: Certificate
) -> None:
    with pytest.raises(DamageError):
        parse_page(body, "a/")
    add(writer)
    server.fail("LIST", Body(body))
    with pytest.raises(WrongServerError, match="check the endpoint"):
        use(source_of(server, certificate), lambda s: s.groups(ROOT_NAMESPACE))


@given(st.data())
def test_whatever_is_in_a_list_is_read_or_refused(data: st.DataObject) -> None:
    body = bytearray(document("<EncodingType>url</EncodingType>" + contents("a/b%20c") * 3))
    for _change in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(body) - 1))
        body[place : place + data.draw(st.integers(0, 20))] = data.draw(st.binary(max_size=8))
    try:
        page = parse_page(bytes(body), "a/")
    except DamageError:
        return
    assert all(found.key.startswith("a/") and found.size >= 0 for found in page.objects)


def test_deep_nesting_takes_no_stack() -> None:
    parse_page(document("<a>" * 30_000 + "</a>" * 30_000), "")


MUCH: dict[str, Callable[[int], str]] = {
    "elements": lambda size: "<a/>" * (size // 4),
    "nested elements": lambda size: "<a>" * (size // 7) + "</a>" * (size // 7),
    "as many elements as are accepted": lambda size: "<a/>\U0001f600" * 60_000 + "x" * (size - 480_000),
    "as many attributes": lambda _size: "<a " + " ".join(f"b{number}=''" for number in range(60_000)) + "/>",
    "names": lambda size: "".join(f"<a{number}/>" for number in range(size // 10)),
    "wide text": lambda size: "\U0001f600" * (size // 4),
}


@pytest.mark.parametrize("inside", MUCH.values(), ids=MUCH.keys())
def test_a_hostile_list_takes_little_memory(inside: Callable[[int], str]) -> None:
    body = document(inside(LIMITS.max_page - 1000))
    assert len(body) <= LIMITS.max_page
    tracemalloc.start()
    try:
        with contextlib.suppress(DamageError):
            parse_page(body, "")
        _now, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 48 << 20


def test_the_longest_list_is_accepted() -> None:
    more = "".join(f"<Part{number}>x</Part{number}>" for number in range(25))
    keys = [f"a/{number:04}/".ljust(1024, ":") for number in range(1000)]
    inside = "".join(contents(quote(key)).replace("</Contents>", f"{more}</Contents>") for key in keys)
    body = document(f"<EncodingType>url</EncodingType>{inside}")
    assert LIMITS.max_page - len(body) > 0
    assert [found.key for found in parse_page(body, "a/").objects] == keys


def test_a_list_that_is_too_long_is_refused_with_the_limit(
    writer: DatastoreWriter, server: S3Server, certificate: Certificate
) -> None:
    add(writer)
    server.fail("LIST", Body(document("x" * LIMITS.max_page)))
    with pytest.raises(WrongServerError, match=f"has more than {LIMITS.max_page} bytes"):
        use(source_of(server, certificate), lambda s: s.groups(ROOT_NAMESPACE))


# --- many pages


@pytest.fixture
def paged(writer: DatastoreWriter, certificate: Certificate) -> Iterator[S3Server]:
    """Three entries in an answer."""
    with S3Server(writer.path, certificate=certificate, page_size=3) as server:
        yield server


def test_lists_of_many_answers_are_put_together(
    writer: DatastoreWriter, paged: S3Server, certificate: Certificate
) -> None:
    snapshots = [VM.snapshot(TIME + n) for n in range(10)]
    for snapshot in snapshots:
        add(writer, snapshot, {"a.conf.blob": b"x", "b.conf.blob": b"y"})
    for number in range(20):
        add(writer, made.snapshot(str(number), type="ct"), {})
        add(writer, made.snapshot(namespace=Namespace((f"n{number}",))), {})

    async def work(source: BucketSource) -> None:
        assert [info.snapshot for info in await source.snapshots(VM)] == snapshots
        groups = await source.groups(ROOT_NAMESPACE)
        assert [info.snapshot_count for info in groups] == [10] + [1] * 20
        assert len(await source.namespaces(ROOT_NAMESPACE)) == 20

    use(source_of(paged, certificate), work)


ENDLESS = {
    "the same token": [
        document(
            contents("store/.cnt/vm/100/a") + "<NextContinuationToken>t</NextContinuationToken>",
            truncated="true",
        )
    ]
    * 3,
    "new tokens and nothing new": [
        document(
            contents("store/.cnt/vm/100/a") + f"<NextContinuationToken>{n}</NextContinuationToken>",
            truncated="true",
        )
        for n in range(100)
    ],
    "new tokens and nothing": [
        document(f"<NextContinuationToken>{n}</NextContinuationToken>", truncated="true") for n in range(100)
    ],
}


@pytest.mark.parametrize("answers", ENDLESS.values(), ids=ENDLESS.keys())
def test_a_list_without_an_end_is_refused(
    answers: list[bytes], writer: DatastoreWriter, server: S3Server, certificate: Certificate
) -> None:
    add(writer)

    async def work(source: BucketSource) -> None:
        server.fail("LIST store/.cnt/vm/100/", *[Body(answer) for answer in answers])
        with pytest.raises(SourceError, match="does not end"):
            await source.snapshots(VM)

    use(source_of(server, certificate), work)


def test_a_list_that_is_longer_than_asked_for_is_refused(
    writer: DatastoreWriter, server: S3Server, certificate: Certificate
) -> None:
    add(writer)
    server.fail("LIST", Body(b" " * (9 << 20)))
    with pytest.raises(WrongServerError, match="more than"):
        use(source_of(server, certificate), lambda s: s.groups(ROOT_NAMESPACE))


@pytest.mark.parametrize("what", ["groups", "snapshots"])
def test_more_names_than_fit_in_memory_are_refused(
    what: str, writer: DatastoreWriter, server: S3Server, certificate: Certificate
) -> None:
    """However many lists they come in."""
    for number in range(10):
        add(writer, made.snapshot(str(number)))
        add(writer, VM.snapshot(TIME + number))

    async def work(source: BucketSource) -> object:
        return await (source.groups(ROOT_NAMESPACE) if what == "groups" else source.snapshots(VM))

    assert use(source_of(server, certificate, limits=replace(LIMITS, max_keys=100)), work)
    with pytest.raises(SourceError, match=r"more than 25 names in one list|does not end"):
        use(source_of(server, certificate, limits=replace(LIMITS, max_keys=25)), work)


def test_a_server_that_encodes_no_keys_is_understood(
    writer: DatastoreWriter, certificate: Certificate
) -> None:
    add(writer)
    with S3Server(writer.path, certificate=certificate, encodes=False) as server:
        infos = use(source_of(server, certificate), lambda s: s.snapshots(VM))
    assert [info.snapshot for info in infos] == [FIRST]


# --- what a listing costs


def test_listing_again_fetches_only_what_is_new(
    writer: DatastoreWriter, server: S3Server, certificate: Certificate
) -> None:
    for number in range(5):
        add(writer, VM.snapshot(TIME + number), {})

    async def work(source: BucketSource) -> None:
        first = await source.snapshots(VM)
        assert len([asked for asked in server.requests if asked.startswith("GET")]) == 6  # and the owner
        server.requests.clear()
        assert await source.snapshots(VM) == first
        assert server.requests == ["LIST store/.cnt/vm/100/"]
        add(writer, VM.snapshot(TIME + 99), {})
        server.requests.clear()
        assert len(await source.snapshots(VM)) == 6
        # `owner` was written again too.
        assert len([asked for asked in server.requests if "index.json" in asked]) == 1

    use(source_of(server, certificate), work)


@pytest.mark.parametrize("tag", ["", "<ETag>&quot;same&quot;</ETag>", "<ETag>&quot;{}&quot;</ETag>"])
def test_tags_that_are_missing_or_wrong_change_no_list(
    tag: str, writer: DatastoreWriter, server: S3Server, certificate: Certificate
) -> None:
    """They only say what to fetch again."""
    manifest = add(writer, files={}) / MANIFEST.filename
    size = manifest.stat().st_size
    key = f"store/.cnt/{FIRST}/{MANIFEST.filename}"

    async def work(source: BucketSource) -> None:
        for number in range(3):
            entry = f"<Contents><Key>{key}</Key><Size>{size}</Size>{tag.format(number)}</Contents>"
            server.fail("LIST store/.cnt/vm/100/", Body(document(entry)))
            (info,) = await source.snapshots(VM)
            assert (info.snapshot, info.error) == (FIRST, None)
            assert len(info.files) == 1

    use(source_of(server, certificate), work)
    fetched = [asked for asked in server.requests if asked == f"GET {key}"]
    assert len(fetched) == (3 if "{}" in tag else 1)


def test_a_list_of_groups_reads_no_manifest(
    writer: DatastoreWriter, server: S3Server, certificate: Certificate
) -> None:
    for number in range(3):
        add(writer, made.snapshot(str(number)))

    def asked() -> list[str]:
        return sorted(found for found in server.requests if found.startswith("GET"))

    infos = use(source_of(server, certificate), lambda s: s.groups(ROOT_NAMESPACE))
    assert [info.snapshot_count for info in infos] == [1, 1, 1]
    assert asked() == [f"GET store/.cnt/vm/{number}/owner" for number in range(3)]
    lists = [found for found in server.requests if found.startswith("LIST")]
    assert len(lists) == 1 + len(BACKUP_TYPES) + 3  # of the opening, of each type, of each group


def test_a_newest_backup_that_is_unfinished_is_neither_counted_nor_the_last(
    writer: DatastoreWriter, server: S3Server, certificate: Certificate, caplog: pytest.LogCaptureFixture
) -> None:
    for number in range(3):
        add(writer, VM.snapshot(TIME + number))
    (writer.snapshot_path(VM.snapshot(TIME + 2)) / MANIFEST.filename).unlink()
    (info,) = use(source_of(server, certificate), lambda s: s.groups(ROOT_NAMESPACE))
    assert (info.last_backup, info.snapshot_count) == (TIME + 1, 2)
    caplog.clear()


def test_odd_keys_are_left_out(writer: DatastoreWriter, server: S3Server, certificate: Certificate) -> None:
    add(writer)
    odd = ["vm/100//x", "vm/100/../101/owner", "vm/100/./owner", "vm/100/", "vm/101/owner/", "vm", "vm/100"]
    inside = "".join(
        contents(f"store/.cnt/{key}") for key in [*odd, f"vm/100/{FIRST.time_text}/index.json.blob"]
    )
    server.fail(
        "LIST store/.cnt/vm/",
        Body(document("<CommonPrefixes><Prefix>store/.cnt/vm/100/</Prefix></CommonPrefixes>")),
    )
    server.fail(
        "LIST store/.cnt/vm/100/",
        Body(
            document(
                inside.replace("store/.cnt/vm<", "store/.cnt/vm/100/y<")
                .replace("vm/100<", "vm/100/z<")
                .replace("vm/101/", "vm/100/w/")
            )
        ),
    )
    infos = use(source_of(server, certificate), lambda s: s.groups(ROOT_NAMESPACE))
    assert [(str(info.group), info.snapshot_count) for info in infos] == [("vm/100", 1)]

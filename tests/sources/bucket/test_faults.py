"""Faults between pbsfs and an object store: what is retried, what is said, and what is never damage."""

from __future__ import annotations

import re
import shutil
import threading
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import TypeVar

import pytest
import trio
import trio.testing

from pbsfs.base.errors import (
    AuthError,
    ConnectError,
    DamageError,
    ForbiddenError,
    NotFoundError,
    PbsfsError,
    SourceError,
    TrustError,
    UnavailableError,
    UnknownDatastoreError,
    WrongServerError,
)
from pbsfs.base.names import ROOT_NAMESPACE
from pbsfs.runtime.stats import COUNTS
from pbsfs.sources.bucket.credentials import AwsCredentials
from pbsfs.sources.bucket.source import BucketSource
from pbsfs.sources.http.proxy import Proxy
from pbsfs.sources.http.tls import Trust, parse_fingerprint
from pbsfs.testing.writer import DatastoreWriter
from tests.sources.bucket.serving import KEY, LIMIT, LIMITS, QUICK, Keys, source_of, use
from tests.sources.conformance import CONFIG, FIRST, IMAGE, VM, add, chunks_of, stored
from tests.support.made import TIME
from tests.support.proxy import ConnectProxy
from tests.support.s3 import BUCKET, SECRET_KEY, STORE, Body, Cut, Fault, Reset, S3Server, Stall, Status
from tests.support.server.certificate import Certificate
from tests.support.waiting import wait_until

MOST = 1 << 30

NOTHING = b"<ListBucketResult><IsTruncated>false</IsTruncated></ListBucketResult>"

T = TypeVar("T")


@pytest.fixture
def chunk(writer: DatastoreWriter) -> tuple[bytes, bytes]:
    """A snapshot is written; the largest of its chunks: digest and stored bytes."""
    add(writer)
    return max(chunks_of(writer, IMAGE).items(), key=lambda item: len(item[1]))


def fetch(digest: bytes) -> Callable[[BucketSource], Awaitable[bytes]]:
    return lambda source: source.fetch_chunk(FIRST, IMAGE, digest, MOST)


def after(
    fault: Callable[[], None], work: Callable[[BucketSource], Awaitable[T]]
) -> Callable[[BucketSource], Awaitable[T]]:
    """`work`, once the source is open and `fault` happened."""

    async def both(source: BucketSource) -> T:
        fault()
        return await work(source)

    return both


# --- what passes

PASSING = {
    "slow down": (Status(503, "SlowDown"),) * 3,
    "429": (Status(429, "TooManyRequests"), Status(429, text="")),
    "500": (Status(500, "InternalError"),),
    "502 of a proxy": (Status(502, text="<html>Bad gateway</html>"),),
    "504": (Status(504, text=""),),
    "request timeout": (Status(400, "RequestTimeout"),),
    "a storm": (Status(503, "SlowDown"),) * 12,
    "a proxy's": (Status(522, text=""), Status(520, text="<html>")),
    "reset": (Reset(), Reset(), Reset()),
    "cut at once": (Cut(0), Cut(0)),
    "cut in the middle": (Cut(1000), Cut(10)),
    "cut without a length": (Cut(1000, announced=False), Cut(10, announced=False)),
    "all in turn": (Reset(), Status(503, "ServiceUnavailable"), Cut(7), Status(500, text="")),
}


@pytest.mark.parametrize("faults", PASSING.values(), ids=PASSING.keys())
def test_a_fault_that_passes_is_retried(
    faults: tuple[Fault, ...],
    chunk: tuple[bytes, bytes],
    server: S3Server,
    certificate: Certificate,
    caplog: pytest.LogCaptureFixture,
) -> None:
    digest, expected = chunk
    retries = COUNTS.retries
    source = source_of(server, certificate)
    assert use(source, after(lambda: server.fail("GET", *faults), fetch(digest))) == expected
    # A connection that was lost while it was idle is no try.
    assert len(faults) - 1 <= COUNTS.retries - retries <= len(faults)
    caplog.clear()  # an outage is told once


@pytest.mark.parametrize("faults", PASSING.values(), ids=PASSING.keys())
def test_lists_are_retried_too(
    faults: tuple[Fault, ...],
    chunk: tuple[bytes, bytes],
    server: S3Server,
    certificate: Certificate,
    caplog: pytest.LogCaptureFixture,
) -> None:
    source = source_of(server, certificate)
    infos = use(source, after(lambda: server.fail("LIST", *faults), lambda source: source.snapshots(VM)))
    assert [info.snapshot for info in infos] == [FIRST]
    caplog.clear()


@pytest.mark.parametrize(
    "fault",
    [Status(503, "SlowDown"), Reset(), Cut(100), Cut(100, announced=False), Status(500, "InternalError")],
)
def test_what_does_not_pass_in_time_is_a_fault_of_the_source_and_no_damage(
    fault: Fault,
    chunk: tuple[bytes, bytes],
    server: S3Server,
    certificate: Certificate,
    caplog: pytest.LogCaptureFixture,
) -> None:
    limits = replace(LIMITS, pacing=replace(QUICK, longest_pause=0.01))
    source = source_of(server, certificate, retry_timeout=0.1, limits=limits)
    with pytest.raises(SourceError) as caught:
        use(source, after(lambda: server.fail("GET", *[fault] * 500), fetch(chunk[0])))
    assert caught.value.retryable
    caplog.clear()


@pytest.mark.parametrize("after_bytes", [None, 0, 500])
def test_an_answer_that_stops_is_given_up_and_asked_for_again(
    after_bytes: int | None, chunk: tuple[bytes, bytes], server: S3Server, certificate: Certificate
) -> None:
    limits = replace(LIMITS, request_timeout=0.2, pacing=replace(QUICK, least_try=0.2))
    source = source_of(server, certificate, limits=limits)
    assert use(source, after(lambda: server.fail("GET", Stall(after_bytes)), fetch(chunk[0]))) == chunk[1]


def test_a_cancelled_fetch_ends_at_once_though_the_server_is_silent(
    chunk: tuple[bytes, bytes], server: S3Server, certificate: Certificate
) -> None:
    async def work(source: BucketSource) -> bytes:
        server.fail("GET", Stall())
        with trio.move_on_after(0.05) as scope:
            await source.fetch_chunk(FIRST, IMAGE, chunk[0], MOST)
        assert scope.cancelled_caught
        return await source.fetch_chunk(FIRST, IMAGE, chunk[0], MOST)

    assert use(source_of(server, certificate), work) == chunk[1]


def test_many_fetches_at_once_are_as_many_requests_and_no_more(
    chunk: tuple[bytes, bytes], writer: DatastoreWriter, server: S3Server, certificate: Certificate
) -> None:
    chunks = chunks_of(writer, IMAGE)
    found: dict[bytes, bytes] = {}

    async def work(source: BucketSource) -> None:
        server.requests.clear()

        async def one(digest: bytes) -> None:
            found[digest] = await source.fetch_chunk(FIRST, IMAGE, digest, MOST)

        async with trio.open_nursery() as nursery:
            for digest in chunks:
                nursery.start_soon(one, digest)

    before = COUNTS.requests
    use(source_of(server, certificate), work)
    assert found == chunks
    assert len(server.requests) == len(chunks)
    assert COUNTS.requests - before == len(chunks) + 1  # and that of the opening
    assert server.connections <= len(chunks) + 1


def test_a_slow_start_is_waited_for_but_an_unreachable_one_is_an_error_at_once(
    chunk: tuple[bytes, bytes], server: S3Server, certificate: Certificate, caplog: pytest.LogCaptureFixture
) -> None:
    server.fail("LIST", Status(503, "SlowDown"), Status(503, "SlowDown"))
    assert use(source_of(server, certificate), fetch(chunk[0])) == chunk[1]
    caplog.clear()
    server.fail("LIST", Reset())
    with pytest.raises(ConnectError):
        use(source_of(server, certificate), fetch(chunk[0]))


# --- what is missing


def test_a_chunk_that_one_answer_calls_missing_and_a_list_names_is_asked_for_again(
    chunk: tuple[bytes, bytes], server: S3Server, certificate: Certificate
) -> None:
    missing = Status(404, "NoSuchKey")
    retries = COUNTS.retries
    source = source_of(server, certificate)
    assert use(source, after(lambda: server.fail("GET", missing), fetch(chunk[0]))) == chunk[1]
    assert COUNTS.retries - retries == 1
    source = source_of(server, certificate, retry_timeout=0)
    with pytest.raises(SourceError, match="listed, but not found when it was read; check the object store"):
        use(source, after(lambda: server.fail("GET", missing), fetch(chunk[0])))


def test_a_chunk_that_is_listed_a_moment_longer_than_its_snapshot_is_said_to_be_removed(
    chunk: tuple[bytes, bytes], writer: DatastoreWriter, server: S3Server, certificate: Certificate
) -> None:
    def prune() -> None:
        shutil.rmtree(writer.snapshot_path(FIRST))
        server.fail("GET", Status(404, "NoSuchKey"))

    with pytest.raises(SourceError, match=f"{FIRST} was removed while it was read") as caught:
        use(source_of(server, certificate), after(prune, fetch(chunk[0])))
    assert not caught.value.retryable
    writer.chunk_path(chunk[0]).unlink()
    with pytest.raises(SourceError, match=f"{FIRST} was removed while it was read"):
        use(source_of(server, certificate), lambda s: s.missing_chunks(FIRST, [chunk[0]]))


def test_a_chunk_that_a_verification_found_damaged_is_said_to_be_so(
    chunk: tuple[bytes, bytes], writer: DatastoreWriter, server: S3Server, certificate: Certificate
) -> None:
    path = writer.chunk_path(chunk[0])
    path.rename(path.with_name(f"{path.name}.0.bad"))
    with pytest.raises(DamageError, match=rf"a verification found it damaged \({path.name}\.0\.bad\)"):
        use(source_of(server, certificate), fetch(chunk[0]))


def test_chunks_are_not_damaged_where_all_of_them_are_gone(
    chunk: tuple[bytes, bytes], writer: DatastoreWriter, server: S3Server, certificate: Certificate
) -> None:
    def remove() -> None:
        shutil.rmtree(writer.path / ".chunks")

    with pytest.raises(SourceError, match="has no chunks any more; check the bucket"):
        use(source_of(server, certificate), after(remove, fetch(chunk[0])))


def test_missing_chunks_are_found_without_fetching_any(
    chunk: tuple[bytes, bytes], writer: DatastoreWriter, server: S3Server, certificate: Certificate
) -> None:
    digests = list(chunks_of(writer, IMAGE))
    for number in (0, 2):
        writer.chunk_path(digests[number]).unlink()
    assert use(source_of(server, certificate), lambda s: s.missing_chunks(FIRST, digests)) == [0, 2]
    assert not [asked for asked in server.requests if asked.startswith("GET")]


def test_each_missing_chunk_is_confirmed(
    chunk: tuple[bytes, bytes], writer: DatastoreWriter, server: S3Server, certificate: Certificate
) -> None:
    digests = list(chunks_of(writer, IMAGE))
    writer.chunk_path(digests[0]).unlink()
    server.fail(digests[2].hex(), *[Status(404, text="")] * 2)
    assert use(source_of(server, certificate), lambda s: s.missing_chunks(FIRST, digests)) == [0]
    server.fail(f"HEAD {STORE}/.chunks", *[Status(404, text="")] * 2 * len(digests))
    with pytest.raises(SourceError, match="listed, but not found when it was read"):
        use(source_of(server, certificate, retry_timeout=0), lambda s: s.missing_chunks(FIRST, digests))


def test_a_key_that_cannot_be_had_is_asked_for_once_by_all_that_wait(
    chunk: tuple[bytes, bytes], server: S3Server, certificate: Certificate
) -> None:
    gate = threading.Event()

    class Hanging(Keys):
        def current(self) -> AwsCredentials | None:
            found = super().current()
            if not hangs:
                return found
            gate.wait(LIMIT)
            raise ConnectError("the service hangs up")

    keys = Hanging(replace(KEY, expires=1.0))
    hangs = list[bool]()
    failed = list[bool]()

    async def work(source: BucketSource) -> None:
        before = keys.asked
        hangs.append(True)

        async def read() -> None:
            with pytest.raises(ConnectError, match="hangs up"):
                await source.fetch_chunk(FIRST, IMAGE, chunk[0], MOST)
            failed.append(True)

        async with trio.open_nursery() as nursery:
            for _ in range(8):
                nursery.start_soon(read)
            await trio.testing.wait_all_tasks_blocked()
            gate.set()
        assert keys.asked == before + 1

    use(source_of(server, certificate, keys, retry_timeout=0), work)
    assert len(failed) == 8


def test_a_missing_bucket_and_a_missing_datastore_are_named(
    chunk: tuple[bytes, bytes], server: S3Server, certificate: Certificate
) -> None:
    server.fail("LIST", Status(404, "NoSuchBucket"))
    with pytest.raises(UnknownDatastoreError, match=f"has no bucket '{BUCKET}'"):
        use(source_of(server, certificate), fetch(chunk[0]))
    for wrong in ("stor", "", "a/b", "stores/x"):
        address = replace(server.address, store=wrong)
        with pytest.raises(UnknownDatastoreError, match=rf"no datastore at s3://{BUCKET}.*") as caught:
            use(source_of(server, certificate, address=address), fetch(chunk[0]))
        assert (f"there is: s3://{BUCKET}/store" in str(caught.value)) is (wrong in ("stor", ""))


def test_a_key_that_may_not_list_the_bucket_hears_of_a_missing_datastore(
    chunk: tuple[bytes, bytes], server: S3Server, certificate: Certificate
) -> None:
    server.fail("LIST stor/", Body(NOTHING), Body(NOTHING))
    server.fail("LIST ", Status(403, "AccessDenied"))
    address = replace(server.address, store="stor")
    with pytest.raises(UnknownDatastoreError, match=r"no datastore at .*; check the names"):
        use(source_of(server, certificate, address=address), fetch(chunk[0]))


def test_a_page_for_browsers_is_no_damage(
    server: S3Server, certificate: Certificate, chunk: tuple[bytes, bytes]
) -> None:
    digest, _stored = chunk
    page = Status(
        200, text="<html>Please log in</html>", headers={"Content-Type": "text/html; charset=utf-8"}
    )

    async def read(source: BucketSource) -> None:
        server.fail(digest.hex(), *[page] * 20)
        with pytest.raises(UnavailableError, match="answers with a page for browsers"):
            await source.fetch_chunk(FIRST, IMAGE, digest, MOST)
        with pytest.raises(UnavailableError, match="answers with a page for browsers"):
            await source.missing_chunks(FIRST, [digest])

    use(source_of(server, certificate, retry_timeout=0.0), read)


def test_a_page_for_browsers_that_passes_is_waited_for(
    server: S3Server, certificate: Certificate, chunk: tuple[bytes, bytes], caplog: pytest.LogCaptureFixture
) -> None:
    digest, stored = chunk
    page = Status(200, text="<html>Please log in</html>", headers={"Content-Type": "text/html"})
    work = after(lambda: server.fail(digest.hex(), page, page), fetch(digest))
    assert use(source_of(server, certificate), work) == stored
    caplog.clear()


@pytest.mark.parametrize("status", [Status(404, text=""), Status(404, "NoSuchKey")])
def test_a_list_that_is_said_not_to_exist_is_an_error_of_the_bucket(
    status: Status, chunk: tuple[bytes, bytes], server: S3Server, certificate: Certificate
) -> None:
    with pytest.raises(UnknownDatastoreError, match=rf"has no list of the bucket '{BUCKET}'; check the"):
        use(
            source_of(server, certificate),
            after(lambda: server.fail("LIST", status), lambda s: s.snapshots(VM)),
        )


def test_a_snapshot_that_is_removed_under_a_reader_is_said_not_to_exist(
    chunk: tuple[bytes, bytes], writer: DatastoreWriter, server: S3Server, certificate: Certificate
) -> None:
    async def work(source: BucketSource) -> None:
        assert len(await source.snapshots(VM)) == 1
        shutil.rmtree(writer.snapshot_path(FIRST))
        with pytest.raises(NotFoundError, match=re.escape(f"{FIRST}/{CONFIG} does not exist")):
            await source.fetch_file(FIRST, CONFIG, MOST)

    use(source_of(server, certificate), work)


def test_a_chunk_that_goes_with_its_snapshot_is_no_damage(
    chunk: tuple[bytes, bytes], writer: DatastoreWriter, server: S3Server, certificate: Certificate
) -> None:
    other = VM.snapshot(TIME + 1)
    add(writer, other)

    async def work(source: BucketSource) -> None:
        shutil.rmtree(writer.snapshot_path(FIRST))
        writer.chunk_path(chunk[0]).unlink()
        with pytest.raises(SourceError, match=f"{FIRST} was removed while it was read"):
            await source.fetch_chunk(FIRST, IMAGE, chunk[0], MOST)
        with pytest.raises(DamageError, match=f"chunk {chunk[0].hex()} in .*: missing"):
            await source.fetch_chunk(other, IMAGE, chunk[0], MOST)

    use(source_of(server, certificate), work)


def test_a_manifest_that_goes_between_list_and_fetch_takes_its_snapshot_along(
    chunk: tuple[bytes, bytes], server: S3Server, certificate: Certificate
) -> None:
    server.fail("index.json.blob", Status(404, "NoSuchKey"))
    assert use(source_of(server, certificate), lambda s: s.snapshots(VM)) == []


def test_a_manifest_that_could_not_be_read_is_read_by_the_next_listing(
    chunk: tuple[bytes, bytes], server: S3Server, certificate: Certificate, caplog: pytest.LogCaptureFixture
) -> None:
    async def work(source: BucketSource) -> None:
        server.fail("index.json.blob", Status(404, text="<html>a proxy</html>"))
        (found,) = await source.snapshots(VM)
        assert "does not answer as an S3 object store does" in (found.error or "")
        (found,) = await source.snapshots(VM)
        assert found.error is None

    use(source_of(server, certificate), work)
    assert "unreadable manifest" in caplog.text
    caplog.clear()


# --- what is wrong

REFUSALS: dict[str, tuple[Status, type[PbsfsError], str]] = {
    "key": (
        Status(403, "InvalidAccessKeyId"),
        AuthError,
        "does not know the access key .*check the access key",
    ),
    "signature": (Status(403, "SignatureDoesNotMatch"), AuthError, "check that the secret key belongs"),
    "token": (Status(400, "ExpiredToken"), AuthError, "the temporary access key is not valid any more"),
    "denied": (
        Status(403, "AccessDenied"),
        ForbiddenError,
        rf"allow the access key s3:ListBucket on the bucket '{BUCKET}' and s3:GetObject",
    ),
    "denied without words": (Status(403, text=""), ForbiddenError, r"\(status 403\)"),
    "clock": (
        Status(403, "RequestTimeTooSkewed", extra="<ServerTime>2030-01-01T00:00:00Z</ServerTime>"),
        SourceError,
        "clock is wrong: the server's time is 2030-01-01T00:00:00Z; set the clock",
    ),
    "region in a header": (
        Status(301, "PermanentRedirect", headers={"x-amz-bucket-region": "eu-central-1"}),
        SourceError,
        "is in the region eu-central-1, not in us-east-1; give --region eu-central-1",
    ),
    "region in the document": (
        Status(400, "AuthorizationHeaderMalformed", extra="<Region>eu-west-1</Region>"),
        SourceError,
        "give --region eu-west-1",
    ),
    "elsewhere": (
        Status(307, "TemporaryRedirect", extra="<Endpoint>b.s3.test</Endpoint>"),
        SourceError,
        "is at b.s3.test; give its region",
    ),
    "elsewhere, by a header alone": (
        Status(301, text="", headers={"Location": "https://b.s3.test/"}),
        SourceError,
        "is at https://b.s3.test/",
    ),
    "archived": (Status(403, "InvalidObjectState"), SourceError, "restore it there first"),
    "no object store": (Status(405, text="<html>no</html>"), WrongServerError, "check the endpoint"),
    "another fault": (
        Status(400, "InvalidArgument", "a\nb"),
        SourceError,
        "status 400, InvalidArgument: a b",
    ),
}


@pytest.mark.parametrize(("status", "kind", "text"), REFUSALS.values(), ids=REFUSALS.keys())
def test_a_refusal_is_said_as_what_it_is_and_not_tried_again(
    status: Status,
    kind: type[PbsfsError],
    text: str,
    chunk: tuple[bytes, bytes],
    server: S3Server,
    certificate: Certificate,
) -> None:
    server.fail("LIST", status, status)
    with pytest.raises(kind, match=text) as caught:
        use(source_of(server, certificate), fetch(chunk[0]))
    assert type(caught.value) is kind
    assert isinstance(caught.value, SourceError)
    assert not caught.value.retryable
    assert SECRET_KEY not in str(caught.value)
    server.requests.clear()
    with pytest.raises(kind):
        use(
            source_of(server, certificate),
            after(lambda: server.fail(" store/.chunks", status), fetch(chunk[0])),
        )


def test_a_wrong_secret_and_a_wrong_region_are_found_by_the_signature(
    chunk: tuple[bytes, bytes], server: S3Server, certificate: Certificate
) -> None:
    wrong = Keys(AwsCredentials(KEY.access_key, "wrong"))
    with pytest.raises(AuthError, match="SignatureDoesNotMatch"):
        use(source_of(server, certificate, wrong), fetch(chunk[0]))
    address = replace(server.address, region="eu-west-3")
    with pytest.raises(SourceError, match="is in the region us-east-1, not in eu-west-3"):
        use(source_of(server, certificate, address=address), fetch(chunk[0]))


def test_a_wrong_clock_is_said_with_the_servers_time(
    chunk: tuple[bytes, bytes], server: S3Server, certificate: Certificate
) -> None:
    server.clock_ahead = 3600.0
    with pytest.raises(SourceError, match=r"clock is wrong: the server's time is \w+, .* GMT; set the clock"):
        use(source_of(server, certificate), fetch(chunk[0]))


def test_a_key_that_was_exchanged_is_asked_for_again_once(
    chunk: tuple[bytes, bytes], server: S3Server, certificate: Certificate
) -> None:
    keys = Keys(KEY, AwsCredentials("AKIDNEW", SECRET_KEY))

    async def work(source: BucketSource) -> bytes:
        await source.groups(ROOT_NAMESPACE)
        assert keys.asked == 1
        server.access_key = "AKIDNEW"
        found = await source.fetch_chunk(FIRST, IMAGE, chunk[0], MOST)
        assert keys.asked == 2
        server.access_key = "AKIDOTHER"
        with pytest.raises(AuthError):
            await source.fetch_chunk(FIRST, IMAGE, chunk[0], MOST)
        return found

    assert use(source_of(server, certificate, keys), work) == chunk[1]


def test_a_key_that_was_exchanged_is_asked_for_again_by_a_look_too(
    chunk: tuple[bytes, bytes], server: S3Server, certificate: Certificate
) -> None:
    keys = Keys(KEY, AwsCredentials("AKIDNEW", SECRET_KEY))

    async def work(source: BucketSource) -> list[int]:
        await source.groups(ROOT_NAMESPACE)
        server.access_key = "AKIDNEW"
        return await source.missing_chunks(FIRST, [chunk[0], bytes(32)])

    assert use(source_of(server, certificate, keys), work) == [1]
    assert keys.asked == 2


def test_a_look_that_is_refused_is_told_the_reason(
    chunk: tuple[bytes, bytes], server: S3Server, certificate: Certificate
) -> None:
    def refuse() -> None:
        server.fail("HEAD", Status(403, text=""))
        server.fail("GET", Status(403, "AccessDenied"))

    with pytest.raises(ForbiddenError, match="AccessDenied"):
        use(source_of(server, certificate), after(refuse, lambda s: s.missing_chunks(FIRST, [chunk[0]])))


def test_a_look_at_a_server_that_ignores_ranges_receives_little(
    chunk: tuple[bytes, bytes], server: S3Server, certificate: Certificate
) -> None:
    def refuse() -> None:
        server.fail("HEAD", Status(400, text=""))
        server.fail("GET", Body(bytes(1 << 20)))

    found = use(source_of(server, certificate), after(refuse, lambda s: s.missing_chunks(FIRST, [chunk[0]])))
    assert found == []


def test_many_requests_that_meet_an_exchanged_key_ask_once_for_another(
    chunk: tuple[bytes, bytes], writer: DatastoreWriter, server: S3Server, certificate: Certificate
) -> None:
    keys = Keys(KEY, AwsCredentials("AKIDNEW", SECRET_KEY))
    chunks = chunks_of(writer, IMAGE)
    found: dict[bytes, bytes] = {}

    async def work(source: BucketSource) -> None:
        server.access_key = "AKIDNEW"

        async def one(digest: bytes) -> None:
            found[digest] = await source.fetch_chunk(FIRST, IMAGE, digest, MOST)

        async with trio.open_nursery() as nursery:
            for digest in chunks:
                nursery.start_soon(one, digest)

    use(source_of(server, certificate, keys), work)
    assert found == chunks
    assert keys.asked == 2


def test_a_temporary_key_is_renewed_before_it_expires(
    chunk: tuple[bytes, bytes], server: S3Server, certificate: Certificate
) -> None:
    soon = replace(KEY, expires=time.time() + 60)
    keys = Keys(soon, replace(KEY, token="temporary", expires=time.time() + 3600))

    async def work(source: BucketSource) -> bytes:
        await source.groups(ROOT_NAMESPACE)
        return await source.fetch_chunk(FIRST, IMAGE, chunk[0], MOST)

    assert use(source_of(server, certificate, keys), work) == chunk[1]
    assert keys.asked == 2


def test_a_public_bucket_is_read_without_a_signature(
    chunk: tuple[bytes, bytes], writer: DatastoreWriter, certificate: Certificate
) -> None:
    with S3Server(writer.path, certificate=certificate, public=True) as server:
        assert use(source_of(server, certificate, Keys(None)), fetch(chunk[0])) == chunk[1]


def test_an_object_that_is_larger_than_allowed_is_damage_and_not_received(
    chunk: tuple[bytes, bytes], server: S3Server, certificate: Certificate
) -> None:
    source = source_of(server, certificate)
    with pytest.raises(DamageError, match="has more than"):
        use(source, lambda s: s.fetch_chunk(FIRST, IMAGE, chunk[0], len(chunk[1]) - 1))


def test_a_body_that_is_wrong_once_is_fetched_again_before_it_is_damage(
    chunk: tuple[bytes, bytes], server: S3Server, certificate: Certificate
) -> None:
    """The chunk store does so, by `confirmed`, where the source has doubts."""

    async def work(source: BucketSource) -> bytes:
        server.fail("GET", Body(b"wrong"))

        async def checked() -> bytes:
            found = await source.fetch_chunk(FIRST, IMAGE, chunk[0], MOST)
            if found != chunk[1]:
                raise DamageError("wrong digest")
            return found

        return await source.confirmed(checked)

    assert use(source_of(server, certificate), work) == chunk[1]


# --- the way


def test_a_certificate_that_is_not_trusted_gets_nothing(
    chunk: tuple[bytes, bytes], server: S3Server, certificate: Certificate
) -> None:
    source = BucketSource(server.address, Keys(), Trust(pinned="0" * 64), limits=LIMITS)
    with pytest.raises(TrustError, match="certificate that is not the expected one"):
        use(source, fetch(chunk[0]))
    source = BucketSource(server.address, Keys(), Trust(), limits=LIMITS)
    with pytest.raises(TrustError, match=re.escape(certificate.fingerprint)):
        use(source, fetch(chunk[0]))
    assert server.requests == []


def test_without_tls_it_works_and_says_so_once(
    chunk: tuple[bytes, bytes],
    writer: DatastoreWriter,
    certificate: Certificate,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with S3Server(writer.path) as server:
        assert use(source_of(server, certificate), fetch(chunk[0])) == chunk[1]
        (record,) = caplog.records
        assert f"http://127.0.0.1:{server.port} has no TLS" in record.getMessage()
    caplog.clear()


def test_a_bucket_named_by_its_host_is_reached_through_a_proxy(
    chunk: tuple[bytes, bytes], server: S3Server, certificate: Certificate
) -> None:
    name = f"{BUCKET}.s3.test"
    with ConnectProxy(names={name: "127.0.0.1"}) as proxy:
        address = replace(server.address, endpoint=f"https://s3.test:{server.port}", path_style=False)
        source = BucketSource(
            address,
            Keys(),
            Trust(pinned=parse_fingerprint(certificate.fingerprint)),
            proxy=Proxy("127.0.0.1", proxy.port, "https_proxy"),
            limits=LIMITS,
        )
        assert use(source, fetch(chunk[0])) == chunk[1]
        assert set(proxy.targets) == {f"{name}:{server.port}"}


def test_whatever_the_server_does_nothing_wrong_is_returned(
    chunk: tuple[bytes, bytes],
    writer: DatastoreWriter,
    server: S3Server,
    certificate: Certificate,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Connections drop all the time, and everything is read."""
    chunks = chunks_of(writer, IMAGE)
    found: dict[bytes, bytes] = {}

    async def work(source: BucketSource) -> None:
        async def one(digest: bytes) -> None:
            found[digest] = await source.fetch_chunk(FIRST, IMAGE, digest, MOST)
            server.drop_connections()

        server.fail("GET", *[Cut(n * 100) if n % 2 else Reset() for n in range(10)])
        async with trio.open_nursery() as nursery:
            for digest in chunks:
                nursery.start_soon(one, digest)
        assert await source.fetch_file(FIRST, CONFIG, MOST) == stored(writer, CONFIG)

    use(source_of(server, certificate), work)
    assert found == chunks
    caplog.clear()


def test_closing_ends_all_connections(
    chunk: tuple[bytes, bytes], server: S3Server, certificate: Certificate
) -> None:
    async def work(source: BucketSource) -> None:
        await source.groups(ROOT_NAMESPACE)
        assert server.open_connections > 0

    use(source_of(server, certificate), work)
    wait_until(lambda: not server.open_connections, "the connections end")

"""The reader protocol: HTTP/2 on a connection that was upgraded.

One task receives, one sends, and one more runs for each request; answers share the connection fairly
and keep to the client's windows and frame size. Statuses, texts, header fields and settings are those
of proxmox-backup 3.2.4. All in the server's loop.
"""

from __future__ import annotations

import ssl
from collections.abc import Callable, Iterator
from email.utils import formatdate
from urllib.parse import urlsplit

import h2.config
import h2.connection
import h2.errors
import h2.events
import h2.exceptions
import h2.settings
import trio
from hyperframe.frame import GoAwayFrame, SettingsFrame

from tests.support.server import parameters as p
from tests.support.server.answers import OCTETS, Answer, RefusedError, Request
from tests.support.server.datastore import Datastore, os_error
from tests.support.server.faults import AnswerFault, Faults, GoAway, Hold, Status
from tests.support.server.link import Wire
from tests.support.server.outgoing import Outgoing, endless_headers
from tests.support.server.sessions import Session

PROTOCOL = "proxmox-backup-reader-protocol-v1"

WINDOW = 32 << 20
MAX_FRAME = 4 << 20

_QUANTUM = 1 << 20  # bytes of one answer before it is another's turn

_SPEEDTEST = b"A" * (1 << 20)


class ReaderSession:
    """`serve` is all there is to call; it returns when the session has ended."""

    def __init__(
        self,
        faults: Faults,
        note: Callable[[str, Request, str | None, int], None],
        session: Session,
        store: Datastore,
        tls: trio.SSLStream[Wire],
        wire: Wire,
    ) -> None:
        self._faults = faults
        self._note = note
        self._session = session
        self._store = store
        self._tls = tls
        self._wire = wire
        self._outgoing: dict[int, Outgoing] = {}
        self._pending: dict[int, trio.CancelScope] = {}
        self._raw: list[bytes] = []
        self._last: int | None = None  # the last stream that is answered, once the session is ending
        self._filler: Iterator[bytes] | None = None
        self._wake = trio.Event()
        config = h2.config.H2Configuration(client_side=False, header_encoding="utf-8")
        self._h2 = h2.connection.H2Connection(config)
        codes = h2.settings.SettingCodes
        settings = {
            codes.INITIAL_WINDOW_SIZE: WINDOW,
            codes.MAX_FRAME_SIZE: MAX_FRAME,
            codes.MAX_HEADER_LIST_SIZE: session.max_header_list,
        }
        self._h2.local_settings = h2.settings.Settings(client=False, initial_values=dict(settings))
        self._h2.max_inbound_frame_size = MAX_FRAME
        self._h2.initiate_connection()
        # The library announces its defaults too, the real server only what differs.
        self._h2.clear_outbound_data_buffer()
        announced: dict[int, int] = {int(code): value for code, value in settings.items()}
        if session.max_streams is not None:
            announced[SettingsFrame.MAX_CONCURRENT_STREAMS] = session.max_streams
        session.when_limited = self._announce_limit
        self._settings = SettingsFrame(0, settings=announced).serialize()
        self._h2.increment_flow_control_window(WINDOW - 65535)

    async def serve(self, received: bytes) -> None:
        await self._tls.send_all(self._settings)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._send_all, nursery.cancel_scope)
            await self._receive_all(received, nursery)
            if self._last is None:  # otherwise what is left is still sent
                nursery.cancel_scope.cancel()
        if self._last is not None:
            await self._tls.aclose()

    # --- receiving

    async def _receive_all(self, received: bytes, nursery: trio.Nursery) -> None:
        while True:
            try:
                events = self._h2.receive_data(received) if received else []
            except h2.exceptions.ProtocolError:  # the library has made a GOAWAY that says why
                self._last = 0
                self._outgoing.clear()
                for scope in self._pending.values():
                    scope.cancel()
                self._wake.set()
                return
            for event in events:
                if isinstance(event, h2.events.ConnectionTerminated):
                    return
                self._handle(event, nursery)
            self._wake.set()
            try:
                received = bytes(await self._tls.receive_some())
            except (trio.BrokenResourceError, trio.ClosedResourceError, ssl.SSLError):
                return
            if not received:
                return

    def _handle(self, event: h2.events.Event, nursery: trio.Nursery) -> None:
        if isinstance(event, h2.events.RequestReceived):
            headers = {str(name): str(value) for name, value in event.headers}
            request = Request(headers[":method"], headers[":path"], headers)
            self._wire.mark(request.target)
            if self._is_full():
                self._session.refused += 1
                self._h2.reset_stream(event.stream_id, h2.errors.ErrorCodes.REFUSED_STREAM)
                return
            scope = self._pending[event.stream_id] = trio.CancelScope()
            self._session.begin()
            nursery.start_soon(self._answer, event.stream_id, request, scope)
        elif isinstance(event, h2.events.DataReceived):
            if event.flow_controlled_length:
                self._h2.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
        elif isinstance(event, h2.events.PingReceived):
            self._session.pings += 1
        elif isinstance(event, h2.events.StreamReset):
            self._outgoing.pop(event.stream_id, None)
            if event.stream_id in self._pending:
                self._pending[event.stream_id].cancel()

    def _announce_limit(self) -> None:
        most = {SettingsFrame.MAX_CONCURRENT_STREAMS: self._session.max_streams or 0}
        self._raw.append(SettingsFrame(0, settings=most).serialize())
        self._wake.set()

    def _is_full(self) -> bool:
        """Whether another stream would be one too many."""
        most = self._session.max_streams
        return most is not None and len(self._pending.keys() | self._outgoing.keys()) >= most

    # --- answering

    async def _answer(self, stream: int, request: Request, scope: trio.CancelScope) -> None:
        try:
            with scope:
                await self._go_away(stream, request)
                if self._last is not None and stream > self._last:
                    return
                hold = self._faults.take(Hold, request.target)
                if hold is not None:
                    await hold.held()
                fault = self._faults.take(AnswerFault, request.target)
                answer = Answer(0) if isinstance(fault, Status) else self._found(request)
                answer = answer if fault is None else fault.change(answer)
                self._note("h2", request, self._session.user, answer.status)
                self._start(stream, answer)
        finally:
            del self._pending[stream]
            self._session.end()
            self._wake.set()

    async def _go_away(self, stream: int, request: Request) -> None:
        fault = self._faults.take(GoAway, request.target)
        if fault is not None:
            self._last = stream - 2 if fault.last_stream_id is None else fault.last_stream_id
            self._last = max(self._last, 0)
            frame = GoAwayFrame(0, last_stream_id=self._last, error_code=fault.code)
            self._raw.append(frame.serialize())
            for other in [known for known in self._outgoing if known > self._last]:
                del self._outgoing[other]
            for other, scope in self._pending.items():
                if other > self._last and other != stream:
                    scope.cancel()

    def _start(self, stream: int, answer: Answer) -> None:
        fields = [(":status", str(answer.status)), *answer.fields(), ("date", formatdate(usegmt=True))]
        if answer.endless:
            self._filler = endless_headers(stream, self._h2.encoder.encode(fields[:1]))
            return
        outgoing = Outgoing(answer)
        finished = outgoing.done and outgoing.reset is None
        try:
            self._h2.send_headers(stream, fields, end_stream=finished)
        except h2.exceptions.ProtocolError:
            return  # reset by the client meanwhile
        if not finished:
            self._outgoing[stream] = outgoing

    def _found(self, request: Request) -> Answer:
        try:
            path = urlsplit(request.target).path
            calls = {"/chunk": self._chunk, "/download": self._download, "/speedtest": self._speedtest}
            if request.method != "GET" or path not in calls:
                raise RefusedError(404, f"Path '{path}' not found.")
            return calls[path](request)
        except RefusedError as refusal:
            return refusal.answer

    def _speedtest(self, request: Request) -> Answer:
        p.verify(request.query, (), content_type=None)
        return Answer(200, _SPEEDTEST, OCTETS)

    def _chunk(self, request: Request) -> Answer:
        digest = p.verify(request.query, (p.DIGEST,), content_type=None)["digest"]
        if digest not in self._session.digests:
            raise RefusedError(401, f"download chunk {digest} not allowed")
        path = self._store.chunk_path(digest)
        try:
            return Answer(200, self._store.read(path), OCTETS)
        except OSError as error:
            shown = self._store.shown_path(path)
            raise RefusedError(400, f"reading file {shown} failed: {os_error(error)}") from None

    def _download(self, request: Request) -> Answer:
        name = p.verify(request.query, (p.FILE_NAME,), content_type=None)["file-name"]
        path = self._store.snapshot_path(self._session.snapshot) / name
        shown = self._store.shown_path(path)
        kind = name.rpartition(".")[2]
        if kind not in ("fidx", "didx", "blob"):
            raise RefusedError(400, f'unknown archive type: "{name}"')
        word = "fixed" if kind == "fidx" else "dynamic"
        try:
            content = self._store.read(path)
        except FileNotFoundError as error:
            if kind == "blob":
                raise RefusedError(404, f"open file {shown} failed - not found") from None
            raise RefusedError(400, f"Unable to open {word} index {shown} - {os_error(error)}") from None
        except OSError as error:
            raise RefusedError(400, f"open file {shown} failed: {os_error(error)}") from None
        if kind != "blob":
            try:
                self._session.digests |= _digests(kind, content)
            except ValueError as error:
                raise RefusedError(400, f"Unable to open {word} index {shown} - {error}") from None
        return Answer(200, content, OCTETS, streamed=True)

    # --- sending

    async def _send_all(self, scope: trio.CancelScope) -> None:
        while True:
            await self._send_what_is_ready()
            if self._filler is not None:
                for frame in self._filler:
                    await self._tls.send_all(frame)
            ready = False
            for stream in list(self._outgoing):
                if stream in self._outgoing:  # not reset while others were sent
                    ready |= self._send_some(stream, self._outgoing[stream])
                    await self._send_what_is_ready()
            if self._last is not None and not self._outgoing and not self._pending:
                await self._send_what_is_ready()
                scope.cancel()
                return
            if not ready:
                await self._wake.wait()
            self._wake = trio.Event()

    def _send_some(self, stream: int, outgoing: Outgoing) -> bool:
        """Sends what fits of an answer; whether anything did."""
        try:
            window = self._h2.local_flow_control_window(stream)
            size = min(window, self._h2.max_outbound_frame_size, _QUANTUM)
            done = outgoing.done
            if not done:
                if size <= 0:
                    return False
                sent, done = outgoing.take(size)
                self._h2.send_data(stream, sent, end_stream=done and outgoing.reset is None)
            if done:
                del self._outgoing[stream]
                if outgoing.reset is not None:
                    self._h2.reset_stream(stream, outgoing.reset)
        except h2.exceptions.ProtocolError:
            self._outgoing.pop(stream, None)
        return True

    async def _send_what_is_ready(self) -> None:
        raw, self._raw = self._raw, []
        data = self._h2.data_to_send() + b"".join(raw)
        if data:
            await self._tls.send_all(data)


_HEADER = 4096

_INDEXES = {
    "fidx": (bytes.fromhex("2f7f41ed91fd0fcd"), 32),
    "didx": (bytes.fromhex("1c914ea519bab3cd"), 40),
}
"""The magic number of each kind of index, and the bytes of an entry, which ends with the digest."""


def _digests(kind: str, content: bytes) -> set[str]:
    """The digests that an index names, as hex; its checksum is not looked at. Raises ValueError with the
    server's reason where it can't open the index."""
    magic, entry = _INDEXES[kind]
    if len(content) < _HEADER:
        raise ValueError(f"index too small ({len(content)})")
    if content[:8] != magic:
        raise ValueError("got unknown magic number")
    if (len(content) - _HEADER) % entry:
        raise ValueError("got unexpected file size")
    return {content[end - 32 : end].hex() for end in range(_HEADER + entry, len(content) + 1, entry)}

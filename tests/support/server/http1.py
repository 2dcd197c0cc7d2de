"""One TLS connection: HTTP/1.1 requests of the API, until it ends or a reader session takes it over.

h11 reads the requests; answers are written by hand, since some have to be wrong. One task per
connection, in the server's loop.
"""

from __future__ import annotations

import ssl
from collections.abc import Callable
from dataclasses import dataclass
from email.utils import formatdate

import h11
import trio

from tests.support.server.accounts import Accounts
from tests.support.server.answers import Answer, RefusedError, Request, reason
from tests.support.server.api import READER_PATH, Api
from tests.support.server.faults import AnswerFault, Faults, Garbage, Hold, Status
from tests.support.server.link import Wire
from tests.support.server.reader import PROTOCOL, ReaderSession
from tests.support.server.sessions import Sessions

TLS = trio.SSLStream[Wire]

_MAX_BODY = 1 << 20


@dataclass(frozen=True, slots=True)
class Service:
    """What all connections share. `note` is told of each request: (protocol, request, user, status)."""

    api: Api
    accounts: Accounts
    faults: Faults
    sessions: Sessions
    note: Callable[[str, Request, str | None, int], None]


@dataclass(slots=True)
class HttpConnection:
    """`serve` is all there is to call; it returns when the connection is to be closed."""

    service: Service
    tls: TLS
    wire: Wire

    async def serve(self) -> None:
        rest = b""
        while (received := await self._receive(rest)) is not None:
            request, keep_alive, rest = received
            self.wire.mark(request.target)
            if request.path == READER_PATH and request.method == "GET":
                if await self._open_session(request, rest):
                    return
            else:
                answer = await self._answer(request)
                await self._send(answer, keep_alive=keep_alive)
                keep_alive = keep_alive and not answer.faulty
            if not keep_alive:
                await self.tls.aclose()
                return

    async def _receive(self, rest: bytes) -> tuple[Request, bool, bytes] | None:
        """The next request, whether the connection goes on after it, and what came behind it."""
        connection = h11.Connection(h11.SERVER)
        if rest:
            connection.receive_data(rest)
        head: h11.Request | None = None
        body = b""
        while True:
            try:
                event = connection.next_event()
            except h11.RemoteProtocolError as error:
                await self._send(Answer(error.error_status_hint, str(error).encode()), keep_alive=False)
                return None
            if event is h11.NEED_DATA:
                try:
                    connection.receive_data(bytes(await self.tls.receive_some()))
                except (trio.BrokenResourceError, ssl.SSLError):
                    return None
            elif isinstance(event, h11.Request):
                head = event
            elif isinstance(event, h11.Data):
                body += event.data
                if len(body) > _MAX_BODY:
                    return None
            elif isinstance(event, h11.EndOfMessage) and head is not None:
                headers = {name.decode(): value.decode("latin-1") for name, value in head.headers}
                request = Request(head.method.decode(), head.target.decode(), headers, body)
                keep_alive = connection.their_state is not h11.MUST_CLOSE
                return request, keep_alive, bytes(connection.trailing_data[0])
            else:
                return None

    async def _answer(self, request: Request) -> Answer:
        user: str | None = None
        hold = self.service.faults.take(Hold, request.target)
        if hold is not None:
            await hold.held()
        fault = self.service.faults.take(AnswerFault, request.target)
        try:
            if isinstance(fault, Status):
                answer = Answer(fault.status)
            else:
                if self.service.api.needs_login(request):
                    user = self.service.accounts.authenticate(request)
                answer = self.service.api.answer(request, user)
        except RefusedError as refusal:
            answer = refusal.answer
        if fault is not None:
            answer = fault.change(answer)
        self.service.note("http/1.1", request, user, answer.status)
        return answer

    async def _open_session(self, request: Request, rest: bytes) -> bool:
        """Answers the request for a session; True when it was opened, and has ended."""
        service, target = self.service, request.target
        user: str | None = None
        hold = service.faults.take(Hold, target)
        if hold is not None:
            await hold.held()
        fault = service.faults.take(AnswerFault, target)
        try:
            if fault is not None:
                raise _FaultError(fault.change(Answer(200)))
            user = service.accounts.authenticate(request)
            store, snapshot = service.api.reader_snapshot(request, user, PROTOCOL)
            session = service.sessions.begin(user, store, snapshot)
        except (RefusedError, _FaultError) as refused:
            service.note("http/1.1", request, user, refused.answer.status)
            await self._send(refused.answer, keep_alive=True)
            return refused.answer.faulty
        try:
            service.note("http/1.1", request, user, 101)
            fields = f"connection: upgrade\r\nupgrade: {PROTOCOL}\r\ndate: {formatdate(usegmt=True)}\r\n"
            await self.tls.send_all(f"HTTP/1.1 101 Switching Protocols\r\n{fields}\r\n".encode())
            garbage = service.faults.take(Garbage, target)
            if garbage is not None:
                await self.tls.send_all(garbage.data)
                await self.tls.aclose()
            else:
                await ReaderSession(service.faults, service.note, session, store, self.tls, self.wire).serve(
                    rest
                )
        finally:
            service.sessions.finish(session)
        return True

    async def _send(self, answer: Answer, *, keep_alive: bool) -> None:
        head = f"HTTP/1.1 {answer.status} {reason(answer.status)}\r\ndate: {formatdate(usegmt=True)}\r\n"
        if answer.endless:
            await self.tls.send_all(head.encode())
            filler = "".join(f"x-filler-{number}: {'a' * 100}\r\n" for number in range(100)).encode()
            while True:
                await self.tls.send_all(filler)
        chunked = answer.streamed and answer.announced is None
        fields = answer.fields() + ([("transfer-encoding", "chunked")] if chunked else [])
        if not keep_alive or answer.faulty:
            fields.append(("connection", "close"))
        head += "".join(f"{name}: {value}\r\n" for name, value in fields)
        await self.tls.send_all(f"{head}\r\n".encode())
        for piece in answer.pieces():
            await self.tls.send_all(b"%x\r\n%b\r\n" % (len(piece), piece) if chunked else piece)
        if chunked and not answer.cut:
            await self.tls.send_all(b"0\r\n\r\n")


class _FaultError(Exception):
    """A fault answers in the place of the server."""

    def __init__(self, answer: Answer) -> None:
        super().__init__()
        self.answer = answer

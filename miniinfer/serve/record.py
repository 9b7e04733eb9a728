"""What is known of one HTTP request when it has ended, and the middleware that hands it to whoever wants to know (the log, traces).

Owns the record and the request id. What the engine's side adds comes from metrics.py's Timer; a stream's events cost nothing here but one call.
"""

from __future__ import annotations

import asyncio
import re
import time
import uuid
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from miniinfer.data import SamplingParams
from miniinfer.utils import get_logger

log = get_logger(__name__)

_SANE_ID = re.compile(r"[A-Za-z0-9._:/+=-]{1,128}")  # nothing that could break a log line or a header
_ID_HEADER = b"x-request-id"


@dataclass(slots=True)
class Record:
    """One request, of any API. Times are seconds on the monotonic clock, `wall` is nanoseconds since 1970; no text of prompt or answer is kept."""

    method: str
    path: str  # as sent, without the query
    client: str | None
    request_id: str  # the client's own, if it sent one that can be used
    traceparent: str | None = None
    tracestate: str | None = None
    wall: int = field(default_factory=time.time_ns)
    start: float = field(default_factory=time.monotonic)
    seconds: float = 0.0
    status: int = 0
    error: str | None = None  # what the application raised
    model: str | None = None
    answer_id: str | None = None  # what follows is None, 0 or empty where no tokens were asked for
    params: SamplingParams | None = None
    queued: float | None = None  # seconds until a place in the batch, of the first prompt
    first_token: float | None = None  # seconds until the first token
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    finish_reasons: list[str] = field(default_factory=list)


Sink = Callable[[Record], object]

current: ContextVar[Record | None] = ContextVar("request", default=None)


class Recorder:
    """ASGI middleware: a Record for every request, given to the sinks when the last byte is out or the client has gone."""

    def __init__(self, app: ASGIApp, sinks: Sequence[Sink]) -> None:
        self._app, self._sinks = app, sinks

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        record, given = _begin(scope)

        def watched(message: Message) -> Awaitable[None]:
            if message["type"] == "http.response.start":
                record.status = message["status"]
                message["headers"] = _identified(record, given, list(message.get("headers", ())))
            return send(message)

        token = current.set(record)
        try:
            await self._app(scope, receive, watched)
        except BaseException as e:
            record.error = type(e).__name__
            record.status = record.status or (499 if isinstance(e, asyncio.CancelledError) else 500)
            raise
        finally:
            current.reset(token)
            finish(record, self._sinks)


def finish(record: Record, sinks: Sequence[Sink]) -> None:
    """The request has ended: whoever wants to know is told."""
    record.seconds = time.monotonic() - record.start
    for sink in sinks:
        try:
            sink(record)
        except Exception:  # whoever watches must not harm who is served
            log.exception("a request could not be recorded")


def _begin(scope: Scope) -> tuple[Record, bool]:
    """A record of what the head says, and whether the client gave the request its id."""
    headers = dict(reversed(scope["headers"]))  # of several the first counts
    raw = scope.get("raw_path") or scope["path"].encode("utf-8", "surrogatepass")
    return begin(scope["method"], raw.decode("ascii", "backslashreplace"), scope["client"][0] if scope.get("client") else None, headers)


def begin(method: str, path: str, client: str | None, headers: Mapping[bytes, bytes]) -> tuple[Record, bool]:
    """A record of a request, and whether its client gave it its id."""
    given = headers.get(_ID_HEADER, b"").decode("latin-1")
    sane = _SANE_ID.fullmatch(given) is not None
    record = Record(
        method=method,
        path=path,
        client=client,
        request_id=given if sane else f"req-{uuid.uuid4().hex}",
        traceparent=headers[b"traceparent"].decode("latin-1") if b"traceparent" in headers else None,
        tracestate=headers[b"tracestate"].decode("latin-1") if b"tracestate" in headers else None,
    )
    return record, sane


def _identified(record: Record, given: bool, headers: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """The answer's headers with the request's id: the client's own, else the answer's, else ours. Anthropic's clients know it as request-id."""
    known = any(name.lower() == b"request-id" for name, _ in headers)
    own = next((value for name, value in headers if name.lower() == _ID_HEADER), None)
    if own is not None and not given:
        record.request_id = own.decode("latin-1")
    id = record.request_id.encode("latin-1")
    kept = [pair for pair in headers if pair[0].lower() != _ID_HEADER]
    return [*kept, (_ID_HEADER, id)] if known else [*kept, (_ID_HEADER, id), (b"request-id", id)]

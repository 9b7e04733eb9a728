"""Who is let in: the check of API keys before anything else of a request is looked at, room for its tokens, its deadline, and when to try again.

Owns default-deny: whatever is not listed as open here asks for a key, routes that do not exist included. Keys and their rates are auth.py's; which
requests run when is the engine's. The life of a request (service.py) asks the `Gate`; the application is wrapped in `Guard`.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from miniinfer.config import ServerConfig
from miniinfer.serve.auth import Client, Keys, load_keys
from miniinfer.serve.protocol import ApiError

OPEN = ("/live", "/ready", "/health", "/ping")  # for machines that hold no key
PAGE = ("/", "/web/")  # the web page's own files, which hold no data: the page asks its user for a key
UNSTATED_OUTPUT = 1024  # tokens of output that a request without max_tokens is taken to want
LONGEST_RETRY = 600  # seconds, of Retry-After
LONGEST_DEADLINE = 7 * 86400.0
MEASURED = 512  # requests ended of late, from which the rate is known
DEADLINE_HEADER = b"x-request-timeout"
INSIDE = "miniinfer.caller"  # in an ASGI scope: the Caller of a request that this process sends itself; nothing from outside can put it there
BACKGROUND_PRIORITY = 120  # an hour behind whoever waits for an answer
DRAINING = "the server is shutting down"


@dataclass(slots=True)
class Caller:
    """What a request's head says of whoever sent it."""

    client: Client | None = None  # None: the server is open
    deadline: float | None = None  # on the event loop's clock
    background: bool = False  # nobody waits for the answer: everybody else goes first


caller: ContextVar[Caller] = ContextVar("caller", default=Caller())  # noqa: B039  never changed: `Guard` sets another


class Guard:
    """ASGI middleware: lets a request pass that brings a key, and notes whose it is. `refuse` makes the answer to one that does not."""

    def __init__(self, app: ASGIApp, keys: Keys | None, refuse: Callable[[Request, Exception], Awaitable[Response]]) -> None:
        self._app, self._keys, self._refuse = app, keys, refuse

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            token = caller.set(self._identify(scope))
        except ApiError as e:
            response = await self._refuse(Request(scope), e)
            await response(scope, receive, send)
            return
        try:
            await self._app(scope, receive, send)
        finally:
            caller.reset(token)

    def _identify(self, scope: Scope) -> Caller:
        own: Caller | None = scope.get(INSIDE)
        if own is not None:
            _count(own.client)
            return own
        headers = dict(reversed(scope["headers"]))  # of several the first counts
        keys = None if is_open(scope["path"]) else self._keys
        return identify(keys, headers, counted=scope["method"] == "POST")


def identify(keys: Keys | None, headers: Mapping[bytes, bytes], counted: bool = True) -> Caller:
    """Who sends these headers. ApiError 401 without one of the keys, 429 if its requests are used up (`counted`: this is one of them)."""
    client = None
    if keys is not None:
        client = keys.find(_key(headers))
        if client is None:
            raise ApiError(
                401,
                "a valid API key is needed: Authorization: Bearer KEY, or x-api-key: KEY",
                code="invalid_api_key",
                headers={"www-authenticate": "Bearer"},
            )
        if counted:
            _count(client)
    seconds = deadline_seconds(headers.get(DEADLINE_HEADER))
    return Caller(client, None if seconds is None else asyncio.get_running_loop().time() + seconds)


def _count(client: Client | None) -> None:
    """One request more of a client's. ApiError 429 if there are none left."""
    if client is not None and client.requests is not None:
        wait = client.requests.wait(1)
        if wait:
            raise _too_many(f"the key's {client.requests.per_minute} requests a minute are used up", wait)
        client.requests.take(1)


def is_open(path: str) -> bool:
    """Does a path ask for no key even where there are keys."""
    return path in OPEN or path == PAGE[0] or path.startswith(PAGE[1])


def _key(headers: Mapping[bytes, bytes]) -> bytes:
    scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
    return key.strip() if scheme.lower() == b"bearer" else headers.get(b"x-api-key", b"")


def deadline_seconds(value: bytes | float | None) -> float | None:
    """The seconds that a request gives itself, in a header or in a body. ApiError 400 if they are none."""
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds <= LONGEST_DEADLINE:
        raise ApiError(400, f"x-request-timeout: must be seconds, more than 0 and at most {LONGEST_DEADLINE:.0f}", param="x-request-timeout")
    return seconds


def _too_many(why: str, seconds: float) -> ApiError:
    wait = str(min(LONGEST_RETRY, max(1, math.ceil(seconds))))
    return ApiError(429, f"{why}; try again in {wait} s", code="rate_limit_exceeded", headers={"retry-after": wait})


class Ticket:
    """A request's place. `leave` gives it back, once."""

    def __init__(self, admission: Admission, prompts: int, tokens: int, client: Client | None, background: bool) -> None:
        self._admission, self._prompts, self._tokens, self._client, self._background = admission, prompts, tokens, client, background

    def leave(self, output: int) -> None:
        """The request has ended, with so many tokens of output."""
        if self._prompts:
            if self._client is not None and self._client.tokens is not None:
                self._client.tokens.take(output)
            self._admission._leave(self._prompts, self._tokens, self._background)
            self._prompts = 0


class Admission:
    """Bounds what is unfinished, in requests and in tokens: prompts, and the most output that may come."""

    def __init__(self, config: ServerConfig, clock: Callable[[], float] = time.monotonic) -> None:
        self._max_requests, self._max_tokens, self._clock = config.max_waiting, config.max_waiting_tokens, clock
        self.requests = self.tokens = 0
        self.background = self._background_tokens = 0  # those of them that nobody waits for
        self._ended: deque[tuple[float, int, int]] = deque(maxlen=MEASURED)  # when, requests, tokens

    def check(self, prompts: int, tokens: int = 0) -> None:
        """Is there room for these? ApiError 400 if there never is, 429 if not now."""
        if prompts > self._max_requests:
            raise ApiError(400, f"prompt: {prompts} prompts in one request, the server takes at most {self._max_requests}", param="prompt")
        if self.requests + prompts > self._max_requests:
            excess = self.requests + prompts - self._max_requests
            raise _too_many(f"{self.requests} requests are unfinished", self._seconds_until(excess, 1))
        if self.requests and self.tokens + tokens > self._max_tokens:  # one alone is bounded by the model's context
            excess = self.tokens + tokens - self._max_tokens
            raise _too_many(f"{self.tokens} tokens of unfinished requests leave no room for {tokens} more", self._seconds_until(excess, 2))

    def enter(self, prompts: list[int], output: int | None, client: Client | None, background: bool = False) -> Ticket:
        """Takes in a request with prompts of these lengths and for each up to so many tokens of output. ApiError as `check`, and 429 if its key's
        tokens are used up. A key is charged for prompts now and for output when it is known. Requests in the background have half of the room."""
        length = sum(prompts)
        tokens = length + len(prompts) * (UNSTATED_OUTPUT if output is None else output)
        self.check(len(prompts), tokens)
        half_taken = 2 * (self.background + len(prompts)) > self._max_requests or 2 * (self._background_tokens + tokens) > self._max_tokens
        if background and self.background and half_taken:  # one alone may be larger than that
            raise _too_many(f"{self.background} requests in the background are unfinished", 1)
        if client is not None and client.tokens is not None:
            wait = client.tokens.wait(length)
            if wait:
                raise _too_many(f"the key's {client.tokens.per_minute} tokens a minute are used up", wait)
            client.tokens.take(length)
        self._change(len(prompts), tokens, background)
        return Ticket(self, len(prompts), tokens, client, background)

    def _change(self, prompts: int, tokens: int, background: bool) -> None:
        self.requests += prompts
        self.tokens += tokens
        if background:
            self.background += prompts
            self._background_tokens += tokens

    def _leave(self, prompts: int, tokens: int, background: bool) -> None:
        self._change(-prompts, -tokens, background)
        self._ended.append((self._clock(), prompts, tokens))

    def _seconds_until(self, amount: int, what: int) -> float:
        """How long so many requests (what = 1) or tokens (2) take to end, at the rate of those that ended last."""
        if len(self._ended) < 2:
            return 1.0
        seconds = max(self._clock() - self._ended[0][0], 1e-3)
        return amount * seconds / max(1, sum(ended[what] for ended in self._ended))


class Gate:
    """What a server's models share at its door: keys, room for requests, and whether it is shutting down."""

    def __init__(self, config: ServerConfig) -> None:
        self.keys, self.admission = load_keys(config), Admission(config)
        self.draining = False

    def admit(self, prompts: int) -> None:
        """Does the server take so many more prompts? ApiError 503 or 429 if not."""
        if self.draining:
            raise ApiError(503, DRAINING)
        self.admission.check(max(prompts, 1))

"""/v1/prefixes: system prompts and other beginnings of prompts, computed once and kept in the KV cache. Owns bodies, routes, and who pinned what.

What it means for pages that they are pinned is cache/manager.py's; AsyncEngine has prefixes computed again by processes that take another's place.
A pin belongs to the API key that made it: other keys neither see nor delete it. Whoever sends the same prefix profits from it, whatever the key;
`cache_salt` is what separates users.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import APIRouter
from pydantic import ConfigDict, Field, model_validator
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from miniinfer.config import ConfigError
from miniinfer.engine.client import EngineDeadError
from miniinfer.serve.admission import caller
from miniinfer.serve.answers import encode
from miniinfer.serve.auth import Client
from miniinfer.serve.fleet import Fleet
from miniinfer.serve.protocol import ApiError, Message, Strict, TemplateVariables, TokenIds, Tools, checked
from miniinfer.serve.schemas import Deleted, Shape, described
from miniinfer.serve.service import Service

MOST_PINS = 256  # of all keys together
LONGEST_TTL = 365 * 86400.0
PROBES = ("a", "0", "\n")  # what may follow a prefix: letters, digits and blanks join differently with what is before them
NAME = r"^[A-Za-z0-9][A-Za-z0-9._:-]{0,127}$"


class PrefixRequest(Strict):
    """A beginning that prompts will have: of conversations (`messages`, perhaps with `tools`), or of plain prompts (`prompt`, text or token ids)."""

    name: str = Field(pattern=NAME)
    model: str | None = None
    messages: list[Message] | None = Field(None, min_length=1)
    tools: Tools | None = None
    prompt: Annotated[str, Field(min_length=1)] | Annotated[TokenIds, Field(min_length=1)] | None = None
    chat_template_kwargs: TemplateVariables | None = None
    cache_salt: str = Field("", max_length=256)
    ttl_seconds: float | None = Field(None, gt=0, le=LONGEST_TTL, description="after which it is deleted; without, it stays until deleted")

    model_config = ConfigDict(
        json_schema_extra={
            "anyOf": [
                {"required": ["prompt"], "properties": {"prompt": {"type": ["string", "array"]}}},
                {"required": ["messages"], "properties": {"messages": {"type": "array"}}},
            ]
        }
    )

    @model_validator(mode="after")
    def _one_of_two(self) -> PrefixRequest:
        if (self.prompt is None) == (self.messages is None):
            raise ApiError(400, "prompt: give either prompt (text or token ids) or messages (a conversation's beginning)", param="prompt")
        if self.messages is None and (self.tools or self.chat_template_kwargs):
            field = "tools" if self.tools else "chat_template_kwargs"
            raise ApiError(400, f"{field}: only a conversation has them; give messages instead of prompt", param=field)
        return self


class Prefix(Shape):
    """A pinned prefix. `resident_pages` may be less than `pages` for a while: after a restart, or when a request that ran alone needed them.
    `hits` are requests that found it whole, since the engine process was started."""

    object: Literal["prefix"]
    name: str
    model: str
    tokens: int
    pages: int
    resident_pages: int
    hits: int
    created: int
    age_seconds: float
    expires_in_seconds: float | None


class PrefixList(Shape):
    object: Literal["list"]
    data: list[Prefix]


@dataclass(slots=True)
class Pinned:
    """What is known of a pin here."""

    name: str
    service: Service
    tokens: list[int]
    salt: str
    id: str = field(default_factory=lambda: f"pin-{uuid.uuid4().hex}")  # the engine's name for it
    created: float = field(default_factory=time.time)
    expiry: asyncio.Handle | None = None
    expires: float = 0.0  # when, in the loop's time; the handle of a short time does not know
    ready: bool = False  # computed

    def shown(self, engine: dict[str, int]) -> dict[str, Any]:
        """As clients see it; `engine` is what the engine says of it, if it can be asked."""
        left = None if self.expiry is None else round(max(0.0, self.expires - asyncio.get_running_loop().time()), 3)
        return {
            "object": "prefix",
            "name": self.name,
            "model": self.service.model,
            "tokens": len(self.tokens),
            "pages": len(self.tokens) // page_size(self.service),
            "resident_pages": engine.get("resident", 0),
            "hits": engine.get("hits", 0),
            "created": int(self.created),
            "age_seconds": round(time.time() - self.created, 3),
            "expires_in_seconds": left,
        }


def page_size(service: Service) -> int:
    return int(service.engine.info["page_size"])


Key = tuple[Client | None, str]  # owner and name


class Prefixes:
    """All that is pinned on a server."""

    def __init__(self, fleet: Fleet) -> None:
        self._pins: dict[Key, Pinned] = fleet.pins

    async def create(self, service: Service, request: PrefixRequest, owner: Client | None) -> dict[str, Any]:
        """Computes and pins a prefix. One that is there already, under the same name, only gets the new time to live."""
        tokens = await prefix_tokens(service, request)
        size, key, field = page_size(service), (owner, request.name), "prompt" if request.messages is None else "messages"
        if len(tokens) < size:
            raise ApiError(400, f"{field}: the prefix has {len(tokens)} tokens, fewer than a KV page ({size}): there is nothing to pin", param=field)
        pin = self._pins.get(key)
        if pin is not None and (not pin.ready or (pin.service, pin.tokens, pin.salt) != (service, tokens, request.cache_salt)):
            state = "is another prefix's" if pin.ready else "is being computed"
            raise ApiError(409, f"name: '{request.name}' {state}; delete it first, or choose another", param="name", code="name_in_use")
        if pin is None:
            if len(self._pins) >= MOST_PINS:
                raise ApiError(409, f"name: {MOST_PINS} prefixes are pinned, which is the most; delete one", param="name", code="too_many_prefixes")
            pin = self._pins[key] = Pinned(request.name, service, tokens, request.cache_salt)
            try:
                await _compute(pin, owner)
            finally:
                if not pin.ready:
                    del self._pins[key]
        if pin.expiry is not None:
            pin.expiry.cancel()
        pin.expiry, loop = None, asyncio.get_running_loop()
        if request.ttl_seconds is not None:
            pin.expiry, pin.expires = loop.call_later(request.ttl_seconds, self.delete, key), loop.time() + request.ttl_seconds
        return pin.shown((await _described(service)).get(pin.id, {}))

    def delete(self, key: Key) -> bool:
        """Unpins; False if there is no such pin."""
        pin = self._pins.get(key)
        if pin is None or not pin.ready:
            return False
        del self._pins[key]
        if pin.expiry is not None:
            pin.expiry.cancel()
        pin.service.engine.unpin(pin.id)
        return True

    async def list(self, owner: Client | None) -> list[dict[str, Any]]:
        """An owner's pins, oldest first."""
        own = [pin for (client, _), pin in self._pins.items() if client is owner and pin.ready]
        known = {service: await _described(service) for service in {pin.service for pin in own}}
        return [pin.shown(known[pin.service].get(pin.id, {})) for pin in own]


async def _compute(pin: Pinned, owner: Client | None) -> None:
    """Has the engine compute and pin it. A request like others: admission counts its tokens, and its deadline holds."""
    service = pin.service
    service.gate.admit(1)
    async with service.hold():
        service.check_alive()
        ticket = service.gate.admission.enter([len(pin.tokens)], 1, owner)
        try:
            async with asyncio.timeout_at(caller.get().deadline):
                result = await service.engine.pin(pin.id, pin.tokens, pin.salt)
        except TimeoutError:
            raise ApiError(408, "the request's own time limit (x-request-timeout) has passed", code="timeout") from None
        except ValueError as e:
            raise ApiError.from_value_error(e) from None
        finally:
            ticket.leave(0)
    if result.error is not None and result.invalid:
        raise ApiError(409, result.error, code="cannot_pin")
    if result.error is not None:
        raise ApiError(500, f"the engine failed on this request: {result.error}")
    if result.outputs[0].finish_reason == "abort":
        raise ApiError(503, "the engine gave the request up")
    pin.ready = True


async def _described(service: Service) -> dict[str, dict[str, int]]:
    """What the engine says of its pins; nothing while it is away."""
    with contextlib.suppress(EngineDeadError):
        found: dict[str, dict[str, int]] = await service.engine.control("pins")
        return found
    return {}


async def prefix_tokens(service: Service, request: PrefixRequest) -> list[int]:
    """The tokens that every prompt with this beginning begins with: those that several prompts with different continuations have in common. So a
    prefix never ends in what the chat template puts after it only sometimes, nor in a token that the next character may join."""
    if isinstance(request.prompt, list):
        return request.prompt
    if request.prompt is not None:
        return common_prefix([await service.encode(request.prompt + probe, True, "prompt") for probe in PROBES])
    assert request.messages is not None
    messages = [message.for_template() for message in request.messages]
    asked = messages[-1]["role"] in ("user", "tool")  # an answer follows
    continuations = [[*messages, {"role": "assistant" if asked else "user", "content": probe}] for probe in PROBES]
    rendered = [(conversation, False) for conversation in continuations] + ([(messages, True)] if asked else [])
    prompts = [
        await service.chat_prompt(conversation, request.tools, add_generation_prompt=prompting, template_kwargs=request.chat_template_kwargs)
        for conversation, prompting in rendered
    ]
    return common_prefix([prompt.token_ids for prompt in prompts])


def common_prefix(sequences: list[list[int]]) -> list[int]:
    """The longest beginning that all share."""
    first = min(sequences, key=len)
    length = next((i for i, token in enumerate(first) if any(other[i] != token for other in sequences)), len(first))
    return first[:length]


# ------------------------------------------------------------------------------------------------------ from files


def read_file(path: str) -> PrefixRequest:
    """A prefix from a file: JSON with messages or with a whole body of POST /v1/prefixes, or else the text that prompts begin with. It is called
    what the file is, without its suffix. ConfigError if it cannot be read or is neither."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise ConfigError(f"pin_prefix: cannot read {path}: {e}") from None
    fields: dict[str, Any] = {"name": Path(path).stem}
    if Path(path).suffix == ".json":
        try:
            given = json.loads(text)
        except ValueError as e:
            raise ConfigError(f"pin_prefix: {path} is not valid JSON: {e}") from None
        if not isinstance(given, (dict, list)):
            raise ConfigError(f"pin_prefix: {path} must hold a list of messages, or an object as for POST /v1/prefixes")
        fields |= given if isinstance(given, dict) else {"messages": given}
    else:
        fields["prompt"] = text
    try:
        return checked(PrefixRequest, fields)
    except ApiError as e:
        raise ConfigError(f"pin_prefix: {path}: {e.message}") from None


async def pin_files(fleet: Fleet, paths: list[str]) -> None:
    """Pins what files hold, for the server itself. ConfigError if that is impossible."""
    for path in paths:
        request = read_file(path)
        try:
            await Prefixes(fleet).create(await fleet.service(request.model), request, None)
        except ApiError as e:
            raise ConfigError(f"pin_prefix: {path}: {e.message}") from None


# ---------------------------------------------------------------------------------------------------------- routes


def router(fleet: Fleet) -> APIRouter:
    """The routes below /v1/prefixes."""
    routes = APIRouter(prefix="/v1/prefixes")
    prefixes = Prefixes(fleet)

    @routes.post("", **described(PrefixRequest, Prefix))
    async def create(http: Request) -> Response:
        service, request = await fleet.read(http, PrefixRequest)
        owner = caller.get().client

        async def work() -> bytes:
            return encode(await prefixes.create(service, request, owner))

        return await service.reply(http, work(), f"prefix-{uuid.uuid4().hex}")

    @routes.get("", **described(answer=PrefixList))
    async def list_all() -> Response:
        return JSONResponse({"object": "list", "data": await prefixes.list(caller.get().client)})

    @routes.delete("/{name}", **described(answer=Deleted))
    async def delete(name: str) -> Response:
        if not prefixes.delete((caller.get().client, name)):
            raise ApiError(404, f"there is no pinned prefix called '{name}'", param="name")
        return JSONResponse({"id": name, "object": "prefix", "deleted": True})

    return routes

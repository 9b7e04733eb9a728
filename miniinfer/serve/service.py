"""The life of a request, whatever API it came through: read, checked, admitted, run by the engine, answered, and given up if its client goes away.

Owns admission and the engine's side of every API. What a body may hold is protocol.py's, what an answer looks like is answers.py's or the API's own;
routes are the APIs' (openai.py and its neighbours), put together in app.py.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import AbstractAsyncContextManager, aclosing, nullcontext
from itertools import takewhile
from typing import Any, TypeVar

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from miniinfer.config import ServerConfig
from miniinfer.data import RequestOutput, SamplingParams
from miniinfer.engine.client import AsyncEngine, EngineAsleepError, EngineDeadError
from miniinfer.engine.text import Tokenizer
from miniinfer.serve.admission import BACKGROUND_PRIORITY, DRAINING, Gate, caller, deadline_seconds
from miniinfer.serve.answers import Answer, Prompt
from miniinfer.serve.metrics import Metrics, Timer
from miniinfer.serve.parsers import Formats, choose
from miniinfer.serve.protocol import ApiError, Truncation
from miniinfer.serve.templates import TemplateProcess
from miniinfer.utils import get_logger

log = get_logger(__name__)

_BODY_SECONDS = 60.0  # a client that takes longer to send its body is given up

T = TypeVar("T")


class Service:
    """One model's requests. `defaults` are sampling parameters of the checkpoint's own, `gate` is shared with the server's other models."""

    def __init__(self, engine: AsyncEngine, config: ServerConfig, model: str, defaults: dict[str, Any], gate: Gate | None = None) -> None:
        self.engine, self.config, self.model, self.defaults = engine, config, model, defaults
        self.gate = gate or Gate(config)
        self.metrics = Metrics(lambda: self.engine, model)
        self.created = int(time.time())
        self.hold: Callable[[], AbstractAsyncContextManager[Any]] = nullcontext  # has the engine in memory for as long as that lasts
        self.templates = TemplateProcess()  # for those that requests bring
        self._late: set[str] = set()  # those of them whose deadline has passed
        self._open: set[str] = set()  # the engine's ids of prompts accepted and not ended

    async def control(self, command: str) -> Response:
        """A command to the engine, and its answer as JSON."""
        try:
            return JSONResponse(await self.engine.control(command))
        except EngineDeadError:
            raise
        except RuntimeError as e:
            raise ApiError(400, str(e).removeprefix("ValueError: ")) from None

    @property
    def unfinished(self) -> int:
        """Prompts accepted and not ended."""
        return len(self._open)

    def abort_all(self) -> None:
        """Ends every open request; its client gets an error."""
        for request_id in list(self._open):
            self.engine.abort(request_id)

    def abort(self, answer: Answer) -> None:
        """Ends what is unfinished of a request; its client gets what there is."""
        answer.aborted = True
        for request_id in _engine_ids(answer):
            self.engine.abort(request_id)

    # ----------------------------------------------------------------------------------------------------- requests

    def check_alive(self) -> None:
        """ApiError 503 if the engine has died."""
        if not self.engine.is_alive:
            raise ApiError(503, "the engine has died")

    async def encode(self, text: str, add_special_tokens: bool, field: str) -> list[int]:
        try:
            return await self.engine.encode(text, add_special_tokens)
        except ValueError as e:
            raise ApiError.from_value_error(e, field) from None

    def formats(self, chat_template: str | None = None) -> Formats:
        """How the model writes tool calls and reasoning, shown conversations in its own template or in this one."""
        tokenizer, config = self.engine.tokenizer, self.config
        templates = chat_template or ("".join(template.text for template in tokenizer.chat_templates.values()) if tokenizer else "")
        return choose(config.tool_call_parser, config.reasoning_parser, templates, str(self.engine.info.get("family", "")))

    async def chat_prompt(
        self,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None = None,
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        add_special_tokens: bool = False,
        template_kwargs: dict[str, Any] | None = None,
        chat_template: str | None = None,
    ) -> Prompt:
        """A conversation as the checkpoint's chat template writes it, or the request's own, in tokens. ApiError 400 for one that it refuses."""
        tokenizer = self.engine.tokenizer
        if tokenizer is None:
            raise ApiError(400, "messages: the server runs without a tokenizer; send token ids to /v1/completions", param="messages")
        if chat_template is not None and not self.config.trust_request_chat_template:
            message = "chat_template: this server takes none from requests; it would if started with --trust-request-chat-template"
            raise ApiError(400, message, param="chat_template")
        variables = template_kwargs or {}
        try:
            if chat_template is None:
                text = _rendered(tokenizer, messages, tools, add_generation_prompt, continue_final_message, **variables)
            else:
                arguments: dict[str, Any] = {"messages": messages, "tools": tools, "add_generation_prompt": add_generation_prompt}
                arguments |= {"continue_final_message": continue_final_message, "variables": variables}
                text = await self.templates.render(chat_template, tokenizer.special_tokens, arguments)
        except ValueError as e:
            raise ApiError.from_value_error(e, "messages") from None
        return Prompt(await self.encode(text, add_special_tokens, "messages"), text, formats=self.formats(chat_template))

    def truncated(self, ids: list[int], request: Truncation, max_tokens: int | None) -> list[int]:
        """What of a prompt's tokens its request lets stand."""
        return request.truncated(ids, max(1, self.engine.info["max_model_len"] - (1 if max_tokens is None else max_tokens)))

    def check_length(self, prompt: Prompt, max_tokens: int | None) -> None:
        """ApiError for a prompt that leaves no room for its output: None is as much as fits, but at least one token."""
        limit, length = self.engine.info["max_model_len"], len(prompt.token_ids)
        if length + (1 if max_tokens is None else max_tokens) > limit:
            asked = f"{length} prompt tokens" + (f" and {max_tokens} for the answer" if max_tokens else "")
            message = f"this model's maximum context length is {limit} tokens, but the request has {asked}"  # clients look for its first words
            raise ApiError(400, message, param="max_tokens" if length < limit else None, code="context_length_exceeded")

    # ------------------------------------------------------------------------------------------------------ answers

    async def respond(self, http: Request, answer: Answer, params: SamplingParams) -> Response:
        for prompt in answer.prompts:
            self.check_length(prompt, 0 if answer.pooling else (prompt.params or params).max_tokens)
        if http.headers.get("x-explain-cache", "").lower() in ("1", "true"):
            for each in (params, *(prompt.params for prompt in answer.prompts if prompt.params is not None)):
                each.explain_cache = True
        headers = {"x-request-id": answer.id}
        items = self.items(answer, params)
        if not answer.request.stream:
            return await self.reply(http, _collect(items, answer), answer.id)
        # The status line waits for the first news, so that whatever the engine refuses still gets its own status.
        first = await _unless_gone(http, anext(items))
        return EventStream(self._events(first, items, answer), items, answer.stream_type, {**headers, "cache-control": "no-cache"})

    async def reply(self, http: Request, work: Coroutine[Any, Any, bytes], request_id: str) -> Response:
        """The JSON that some work results in; the work is given up if the client goes away."""
        return Response(await _unless_gone(http, work), media_type="application/json", headers={"x-request-id": request_id})

    async def _events(self, first: RequestOutput, items: AsyncGenerator[RequestOutput], answer: Answer) -> AsyncGenerator[bytes]:
        try:
            yield _encode_item(first, answer)
            async for item in items:
                if event := _encode_item(item, answer):
                    yield event
            yield answer.end()
        except Exception as e:  # the status line is gone: the error goes into the stream, where clients look for it
            shown = as_api_error(e)
            if shown.status == 500:
                log.error("%s failed", answer.id, exc_info=e)
            yield answer.failure(shown)

    async def items(self, answer: Answer, params: SamplingParams) -> AsyncGenerator[RequestOutput]:
        """The engine's news of all the request's prompts, output indices being the request's. Closing it aborts what is unfinished."""
        self.gate.admit(len(answer.prompts))
        async with self.hold(), aclosing(self._items(answer, params)) as items:
            async for item in items:
                yield item

    async def _items(self, answer: Answer, params: SamplingParams) -> AsyncGenerator[RequestOutput]:
        """The same once the engine is there."""
        self.check_alive()
        request, count = answer.request, len(answer.prompts)
        own = [prompt.params or params for prompt in answer.prompts]
        limits = [each.max_tokens for each in own if each.max_tokens is not None]
        output = params.n * max(limits) if len(limits) == count else None
        client, priority, background = caller.get().client, request.priority, caller.get().background
        if client is not None:  # a key's priority is not for its holder to better
            priority = client.priority + max(0, priority)
        if background:
            priority = min(2**31 - 1, priority + BACKGROUND_PRIORITY)
        lengths = [len(prompt.token_ids) for prompt in answer.prompts]
        ticket = self.gate.admission.enter(lengths, output, client, background)
        timer, end = Timer(self.metrics, answer.id, lengths, len(answer.choices), params, background), "error"
        ids = _engine_ids(answer)
        numbers = {request_id: i for i, request_id in enumerate(ids)}
        self._open.update(ids)
        sources = [
            self.engine.generate(prompt.token_ids, each, request_id, priority, request.cache_salt, delta=True, pooling=answer.pooling)
            for request_id, prompt, each in zip(ids, answer.prompts, own, strict=True)
        ]
        deadline = self._at_deadline(ids, getattr(request, "timeout", None))
        try:
            async with aclosing(sources[0] if count == 1 else _merge(sources)) as merged:
                async for item in merged:
                    if item.error is not None and item.invalid:
                        raise ApiError.from_value_error(ValueError(item.error))
                    if item.error is not None:
                        raise ApiError(500, f"the engine failed on this request: {item.error}")
                    number = numbers[item.request_id]
                    answer.note(number, item)
                    if item.admission is not None:
                        timer.admitted(number, item.admission.queued)
                    for delta in item.outputs:
                        if delta.finish_reason == "abort" and not answer.aborted:
                            raise self._aborted(ids)
                        delta.index += number * answer.n
                        timer.update(delta.index, delta)
                    yield item
        except ValueError as e:
            raise ApiError.from_value_error(e) from None
        except (GeneratorExit, asyncio.CancelledError):
            end = "abort"
            raise
        finally:
            if deadline is not None:
                deadline.cancel()
            self._open.difference_update(ids)
            self._late.difference_update(ids)
            ticket.leave(answer.completion_tokens)
            timer.close(end, [p.cached_tokens for p in answer.prompts])

    def _at_deadline(self, ids: list[str], timeout: float | None) -> asyncio.TimerHandle | None:
        """Ends a request when its own time is over: the body's, from now on, or the head's, from the head on."""

        def end() -> None:
            self._late.update(ids)
            for request_id in ids:
                self.engine.abort(request_id)

        loop = asyncio.get_running_loop()
        seconds, head = deadline_seconds(timeout), caller.get().deadline
        times = [at for at in (head, None if seconds is None else loop.time() + seconds) if at is not None]
        return loop.call_at(min(times), end) if times else None

    def _aborted(self, ids: list[str]) -> ApiError:
        """What a request hears that did not end by itself."""
        if not self._late.isdisjoint(ids):
            return ApiError(408, "the request's own time limit (timeout or x-request-timeout) has passed", code="timeout")
        return ApiError(503, DRAINING if self.gate.draining else "the engine gave the request up")


def _engine_ids(answer: Answer) -> list[str]:
    """What the engine calls a request's prompts."""
    return [answer.id] if len(answer.prompts) == 1 else [f"{answer.id}-{i}" for i in range(len(answer.prompts))]


def _rendered(tokenizer: Tokenizer, messages: list[dict[str, Any]], *settings: Any, **variables: Any) -> str:
    """A conversation as the chat template writes it. Agents send several system messages, some of them late, where many templates take one and that
    first: what such a template refuses it gets once more with one."""
    try:
        return tokenizer.render_chat(messages, *settings, **variables)
    except ValueError as refused:
        gathered = _with_one_system(messages)
        if gathered == messages:
            raise
        try:
            return tokenizer.render_chat(gathered, *settings, **variables)
        except ValueError:
            raise refused from None


def _with_one_system(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same with those system messages joined that come first; what a later one says goes to the user's message before it."""
    first = list(takewhile(lambda message: message["role"] == "system", messages))
    made = [{"role": "system", "content": "\n\n".join(str(message["content"]) for message in first)}] if first else []
    for message in messages[len(first) :]:
        if message["role"] != "system":
            made.append(message)
        elif made and made[-1]["role"] == "user":
            made[-1] = {**made[-1], "content": f"{made[-1]['content']}\n\n{message['content']}"}
        else:
            made.append({**message, "role": "user"})
    return made


class EventStream(StreamingResponse):
    """Closes its generators as soon as the client has gone, which aborts the request; the garbage collector might take its time."""

    def __init__(self, events: AsyncGenerator[bytes], items: AsyncGenerator[RequestOutput], media_type: str, headers: dict[str, str]) -> None:
        super().__init__(events, headers={**headers, "content-type": media_type})
        self._events, self._items = events, items

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self._items), aclosing(self._events):
            await super().__call__(scope, receive, send)


def _encode_item(item: RequestOutput, answer: Answer) -> bytes:
    outputs = item.outputs
    return answer.event(outputs[0]) if len(outputs) == 1 else b"".join([answer.event(output) for output in outputs])


async def _collect(items: AsyncGenerator[RequestOutput], answer: Answer) -> bytes:
    async with aclosing(items):
        async for item in items:
            for delta in item.outputs:
                answer.add(delta)
    return answer.result()


async def _merge(sources: list[AsyncGenerator[RequestOutput]]) -> AsyncGenerator[RequestOutput]:
    """The sources' items as they come. Closing it closes them all."""
    queue: asyncio.Queue[RequestOutput | Exception | None] = asyncio.Queue()

    async def pump(source: AsyncGenerator[RequestOutput]) -> None:
        try:
            async for item in source:
                queue.put_nowait(item)
        except Exception as e:
            queue.put_nowait(e)
        else:
            queue.put_nowait(None)

    tasks = [asyncio.create_task(pump(source)) for source in sources]
    try:
        running = len(tasks)
        while running:
            got = await queue.get()
            if isinstance(got, Exception):
                raise got
            if got is None:
                running -= 1
            else:
                yield got
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _unless_gone(http: Request, work: Coroutine[Any, Any, T]) -> T:
    """The work's result; ClientDisconnect, and the work cancelled, if the client goes away before."""

    async def gone() -> None:
        while (await http.receive())["type"] != "http.disconnect":
            pass

    task, watch = asyncio.ensure_future(work), asyncio.create_task(gone())
    try:
        await asyncio.wait((task, watch), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        task.cancel()
        watch.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)


async def read_body(http: Request, limit_mib: int) -> bytes:
    """The body, never holding more than the limit of it."""
    limit, parts, size = limit_mib << 20, [], 0
    too_large = ApiError(413, f"the body is larger than {limit_mib} MiB")
    if int(http.headers.get("content-length", 0)) > limit:
        raise too_large
    try:
        async with asyncio.timeout(_BODY_SECONDS):
            async for part in http.stream():
                size += len(part)
                if size > limit:
                    raise too_large
                parts.append(part)
    except TimeoutError:
        raise ApiError(408, f"the body did not arrive within {_BODY_SECONDS:.0f} seconds", headers={"connection": "close"}) from None
    return b"".join(parts)


def as_api_error(error: Exception) -> ApiError:
    """What the client gets to see of an error: never its insides."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, EngineDeadError):
        return ApiError(503, "the engine has died")
    if isinstance(error, EngineAsleepError):
        return ApiError(503, str(error), code="asleep")
    if isinstance(error, HTTPException):
        return ApiError(error.status_code, str(error.detail), headers=dict(error.headers or {}))
    return ApiError(500, "internal error; the server's log says more")

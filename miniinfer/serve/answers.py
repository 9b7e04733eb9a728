"""What goes back to a client: the JSON of results and the bytes of stream events, for chat and for completions.

Owns encoding only. A stream event costs a few byte concatenations and one string encoding: whatever is the same in all events of a choice
is built once. Shapes: OpenAI's API reference; `token_ids`, `prompt_token_ids` and `stop_reason` are vLLM's additions.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import msgspec

from miniinfer import __version__
from miniinfer.data import CompletionOutput, Logprob, RequestOutput, SamplingParams
from miniinfer.engine.text import Tokenizer
from miniinfer.serve.parsers import CallArguments, CallStart, Content, Delta, Formats, Reasoning
from miniinfer.serve.protocol import ApiError, ChatRequest, CompletionRequest

DONE = b"data: [DONE]\n\n"
FINGERPRINT = f"miniinfer-{__version__}"  # with another one, the same seed may give another answer
encode = msgspec.json.Encoder().encode

Table = dict[int, Logprob]


@dataclass(slots=True)
class Prompt:
    """One prompt of a request, and what the engine said of it."""

    token_ids: list[int]
    text: str | None = None  # as the client wrote it, or as the chat template did
    formats: Formats | None = None  # of what answers a conversation
    params: SamplingParams | None = None  # its own, with the n of all, where a request's prompts have different ones
    logprobs: list[Table | None] | None = None
    cached_tokens: int = 0
    cache_miss: str | None = None  # why the prompt's next token was not cached, if the request asks

    def tables(self, most: int, other: int | None) -> list[Table | None]:
        """Its log-probabilities with so many alternatives; there are more of them if another part of the answer has more."""
        tables = self.logprobs or []
        if other is None or other <= most:
            return tables
        pairs = zip(self.token_ids, tables, strict=True)
        return [table and {i: v for i, v in table.items() if i == token or (v.rank or 0) <= most} for token, table in pairs]


@dataclass(slots=True)
class Choice:
    """One choice, put together from its deltas."""

    text: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[Table] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None

    def likelihood(self) -> float:
        """The log-probability of all its tokens; needs logprobs."""
        return sum(table[token].logprob for token, table in zip(self.token_ids, self.logprobs or (), strict=True))

    def add(self, delta: CompletionOutput) -> None:
        self.text.append(delta.text)
        self.token_ids += delta.token_ids
        if delta.logprobs is not None:
            self.logprobs = self.logprobs if self.logprobs is not None else []
            self.logprobs += delta.logprobs
        self.finish_reason, self.stop_reason = delta.finish_reason, delta.stop_reason


class Answer:
    """What chat and completion answers share. Choice i belongs to prompt i // n.

    A stream is `event` for every delta, then `end` or, if something goes wrong, `failure`; otherwise `add` for every delta, then `result`."""

    kind = event_kind = ""
    stream_type = "text/event-stream"
    pooling: str | None = None  # embeddings: how the engine pools hidden states
    aborted = False  # by a client, which wants to see what there is

    def __init__(
        self,
        request_id: str,
        model: str,
        request: ChatRequest | CompletionRequest,
        prompts: list[Prompt],
        n: int,
        tokenizer: Tokenizer | None,
    ) -> None:
        self.id, self.request, self.prompts, self.n, self.tokenizer = request_id, request, prompts, n, tokenizer
        self.choices = [Choice() for _ in range(n * len(prompts))]
        self.completion_tokens = 0
        self._about = {"id": request_id, "object": self.kind, "created": int(time.time()), "model": model}
        self._stem = b"data: " + encode(self._about | {"object": self.event_kind, "system_fingerprint": FINGERPRINT})[:-1]
        self._heads = [self._stem + b',"choices":[{"index":%d,' % i for i in range(len(self.choices))]
        self._plain_end: bytes | None = b"}]}\n\n"
        if request.include_usage:
            self._plain_end = None if request.continuous_usage else b'}],"usage":null}\n\n'

    @property
    def _end(self) -> bytes:
        """The end of an event."""
        return self._plain_end or b'}],"usage":' + encode(self.usage()) + b"}\n\n"

    def _end_before(self, delta: CompletionOutput) -> bytes:
        """The end of an event that says nothing of a delta's tokens yet."""
        if self._plain_end is not None:
            return self._plain_end
        self.completion_tokens -= len(delta.token_ids)
        end = self._end
        self.completion_tokens += len(delta.token_ids)
        return end

    def note(self, index: int, item: RequestOutput) -> None:
        """Keeps what an item says of its prompt and counts its tokens."""
        prompt = self.prompts[index]
        prompt.cached_tokens = max(prompt.cached_tokens, item.num_cached_tokens)
        if item.admission is not None:
            prompt.cache_miss = item.admission.cache_miss
        if item.prompt_logprobs is not None:
            prompt.logprobs = item.prompt_logprobs
        for delta in item.outputs:
            self.completion_tokens += len(delta.token_ids)

    def usage(self) -> dict[str, Any]:
        prompt = sum(len(p.token_ids) for p in self.prompts)
        cached = sum(p.cached_tokens for p in self.prompts)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": self.completion_tokens,
            "total_tokens": prompt + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": cached} | self._misses(),
        }

    def _misses(self) -> dict[str, Any]:
        """Where each prompt's first miss in the prefix cache was, and why, if the request asked for it."""
        misses = [{"prompt": i, "position": p.cached_tokens, "reason": p.cache_miss} for i, p in enumerate(self.prompts) if p.cache_miss is not None]
        return {"cache_misses": misses} if misses else {}

    def end(self) -> bytes:
        """The end of a stream: the usage, if asked for, and DONE."""
        return self.usage_event() + DONE if self.request.include_usage else DONE

    def failure(self, error: ApiError) -> bytes:
        """The end of a stream that cannot go on."""
        return b"data: " + error.body() + b"\n\n" + DONE

    def usage_event(self) -> bytes:
        return self._stem + b',"choices":[],"usage":' + encode(self.usage()) + b"}\n\n"

    def add(self, delta: CompletionOutput) -> None:
        self.choices[delta.index].add(delta)

    def result(self) -> bytes:
        choices = [self._choice(i, choice) for i, choice in enumerate(self.choices)]
        return encode(self._about | {"system_fingerprint": FINGERPRINT, "choices": choices, "usage": self.usage()} | self._about_prompt())

    def event(self, delta: CompletionOutput) -> bytes:
        """The stream's bytes for one delta; empty if it has nothing to tell yet."""
        raise NotImplementedError

    def _choice(self, index: int, choice: Choice) -> dict[str, Any]:
        raise NotImplementedError

    def _event_end(self, delta: CompletionOutput, logprobs: bytes = b"null") -> bytes:
        """From after a choice's content to the end of the event."""
        if delta.finish_reason is None and not self.request.return_token_ids:
            return b',"logprobs":' + logprobs + b',"finish_reason":null' + self._end
        end = b',"logprobs":' + logprobs + b',"finish_reason":' + encode(delta.finish_reason)
        if delta.finish_reason is not None:
            end += b',"stop_reason":' + encode(delta.stop_reason)
        if self.request.return_token_ids:
            end += b',"token_ids":' + encode(delta.token_ids)
        return end + self._end

    def _extras(self, choice: Choice) -> dict[str, Any]:
        extras: dict[str, Any] = {"finish_reason": choice.finish_reason, "stop_reason": choice.stop_reason}
        return extras | {"token_ids": choice.token_ids if self.request.return_token_ids else None}

    def _about_prompt(self) -> dict[str, Any]:
        return {}

    def _ranked(self, prompt: Prompt) -> list[dict[int, Any] | None] | None:
        """The `prompt_logprobs` that were asked for: for every token of a prompt but the first, it and its alternatives by their ids."""
        if self.request.prompt_logprobs is None or prompt.logprobs is None:
            return None
        return [
            table and {i: {"logprob": _finite(v.logprob), "rank": v.rank, "decoded_token": self._text(i)} for i, v in table.items()}
            for table in prompt.tables(self.request.prompt_logprobs, self._echoed_logprobs())
        ]

    def _echoed_logprobs(self) -> int | None:
        """How many alternatives an echo of the prompt shows."""
        return None

    def _text(self, token_id: int) -> str:
        if self.tokenizer is None or self.request.return_tokens_as_token_ids:
            return f"token_id:{token_id}"
        return self.tokenizer.token_text(token_id)


# -------------------------------------------------------------------------------------------------------------- chat


class ChatAnswer(Answer):
    """chat.completion and chat.completion.chunk."""

    kind, event_kind = "chat.completion", "chat.completion.chunk"
    request: ChatRequest

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        prompt, request = self.prompts[0], self.request
        formats, tools = prompt.formats or Formats(None, None), request.offered_tools
        self._parsers = [formats.parser(prompt.text or "", tools, request.parallel_tool_calls) for _ in self.choices]
        self._started = [False] * len(self.choices)
        self._thoughts = [ReasoningTokens.of(formats, prompt, self.tokenizer) for _ in self.choices]

    def deltas(self, delta: CompletionOutput) -> list[Delta]:
        """What the text of a choice's delta says: content, reasoning, calls. A choice that ends with calls gets that for its finish_reason.

        To be called once for every delta, or for the whole text: what comes out adds up to the same."""
        parser = self._parsers[delta.index]
        if parser is None:
            return [Content(delta.text)] if delta.text else []
        parts = parser.push(delta.text) if delta.text else []
        if delta.finish_reason is not None:
            parts += parser.finish()
            if parser.called and delta.finish_reason == "stop":
                delta.finish_reason = "tool_calls"
        return parts if self.request.include_reasoning else [part for part in parts if not isinstance(part, Reasoning)]

    def event(self, delta: CompletionOutput) -> bytes:
        index, parts = delta.index, self.deltas(delta)
        head, events = self._heads[index] + b'"delta":', b""
        plain = b',"logprobs":null,"finish_reason":null'
        end = self._end_before(delta)
        if not self._started[index]:
            told = (
                b'}],"prompt_token_ids":' + encode(self.prompts[0].token_ids) if self.request.return_token_ids and not any(self._started) else b"}]"
            )
            self._started[index] = True
            events = head + b'{"role":"assistant","content":' + encode(self.request.echoed) + b"}" + plain + told + end[2:]
        logprobs = b"null"
        if delta.logprobs:
            logprobs = encode(self._logprobs(delta.token_ids, delta.logprobs))
        elif not (parts or delta.finish_reason or self.request.return_token_ids):
            return events
        for part in parts[:-1]:
            events += head + _delta(part) + plain + end
        return events + head + (_delta(parts[-1]) if parts else b"{}") + self._event_end(delta, logprobs)

    def _choice(self, index: int, choice: Choice) -> dict[str, Any]:
        whole = CompletionOutput(index, "".join(choice.text), [], finish_reason=choice.finish_reason)
        message = _message(self.deltas(whole), self.request.echoed)
        choice.finish_reason = whole.finish_reason
        logprobs = None if choice.logprobs is None else self._logprobs(choice.token_ids, choice.logprobs)
        return {"index": index, "message": message, "logprobs": logprobs, **self._extras(choice)}

    def note(self, index: int, item: RequestOutput) -> None:
        super().note(index, item)
        for delta in item.outputs:
            if (thoughts := self._thoughts[delta.index]) is not None:
                thoughts.push(delta.token_ids)

    def usage(self) -> dict[str, Any]:
        counts = [thoughts.count for thoughts in self._thoughts if thoughts is not None]
        return super().usage() | ({"completion_tokens_details": {"reasoning_tokens": sum(counts)}} if counts else {})

    def _logprobs(self, token_ids: list[int], tables: list[Table]) -> dict[str, Any]:
        top, content = self.request.top_logprobs or 0, []
        for token_id, table in zip(token_ids, tables, strict=True):
            best = sorted(table.items(), key=lambda entry: -entry[1].logprob)[:top]
            content.append(self._entry(token_id, table[token_id]) | {"top_logprobs": [self._entry(*entry) for entry in best]})
        return {"content": content, "refusal": None}

    def _entry(self, token_id: int, value: Logprob) -> dict[str, Any]:
        raw = self.tokenizer.token_bytes(token_id) if self.tokenizer else b""
        return {"token": self._text(token_id), "logprob": _finite(value.logprob), "bytes": list(raw)}

    def _about_prompt(self) -> dict[str, Any]:
        ids = self.prompts[0].token_ids if self.request.return_token_ids else None
        return {"prompt_logprobs": self._ranked(self.prompts[0]), "prompt_token_ids": ids}


def _delta(part: Delta) -> bytes:
    """The `delta` of a stream event."""
    match part:
        case Content(text):
            return b'{"content":' + encode(text) + b"}"
        case Reasoning(text):
            shown = encode(text)
            return b'{"reasoning_content":' + shown + b',"reasoning":' + shown + b"}"
        case CallStart(index, id, name):
            return encode({"tool_calls": [{"index": index, "id": id, "type": "function", "function": {"name": name, "arguments": ""}}]})
        case CallArguments(index, text):
            return encode({"tool_calls": [{"index": index, "function": {"arguments": text}}]})


def _message(parts: list[Delta], echoed: str) -> dict[str, Any]:
    """The assistant's message out of all of its parts."""
    texts: dict[type, str] = {Content: echoed, Reasoning: ""}
    calls: list[dict[str, Any]] = []
    for part in parts:
        match part:
            case CallStart(_, id, name):
                calls.append({"id": id, "type": "function", "function": {"name": name, "arguments": ""}})
            case CallArguments(index, text):
                calls[index]["function"]["arguments"] += text
            case _:
                texts[type(part)] += part.text
    message: dict[str, Any] = {"role": "assistant", "content": texts[Content] or (None if calls else ""), "refusal": None}
    if reasoning := texts[Reasoning]:
        message |= {"reasoning_content": reasoning, "reasoning": reasoning}
    return message | ({"tool_calls": calls} if calls else {})


class ReasoningTokens:
    """Counts the tokens of one answer's reasoning, its tags included."""

    def __init__(self, begin: int, end: int, opened: bool) -> None:
        self._begin, self._end, self._inside = begin, end, opened
        self._first = True
        self.count = 0

    @staticmethod
    def of(formats: Formats, prompt: Prompt, tokenizer: Tokenizer | None) -> ReasoningTokens | None:
        """None where reasoning has no tags that are single tokens."""
        tags = formats.reasoning
        ids = tags.ids(tokenizer) if tags is not None else None
        return None if tags is None or ids is None else ReasoningTokens(*ids, tags.opened_by(prompt.text or ""))

    def push(self, ids: list[int]) -> None:
        if self._first and ids:
            self._first = False
            self._inside = self._inside or ids[0] == self._begin
        if self._inside:
            self._inside = self._end not in ids
            self.count += len(ids) if self._inside else ids.index(self._end) + 1


def _finite(logprob: float) -> float:
    """JSON has no infinity; OpenAI's floor for an impossible token."""
    return max(logprob, -9999.0)


# ------------------------------------------------------------------------------------------------------- completions


class CompletionAnswer(Answer):
    """text_completion, streamed or not. With `echo`, a choice begins with its prompt."""

    kind = event_kind = "text_completion"
    request: CompletionRequest

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._echoed = [not self.request.echo] * len(self.choices)
        self._offsets = [0] * len(self.choices)  # characters of token text so far, for text_offset
        self._told = [not self.request.return_token_ids] * len(self.choices)  # the prompt's tokens

    def event(self, delta: CompletionOutput) -> bytes:
        index, start = delta.index, b""
        if not self._echoed[index]:
            self._echoed[index] = True
            prompt = self.prompts[index // self.n]
            start = self._heads[index] + self._prompt_ids(index) + b'"text":' + encode(self._prompt_text(prompt)) + b',"logprobs":'
            start += encode(self._prompt_logprobs(index)) + b',"finish_reason":null' + self._end_before(delta)
        if self.request.only_prompt:
            delta = CompletionOutput(index, "", [], finish_reason="length" if delta.finish_reason else None)
        logprobs = b"null"
        if delta.logprobs:
            logprobs = encode(self._logprobs(index, delta.token_ids, delta.logprobs))
        elif not (delta.text or delta.finish_reason or self.request.return_token_ids):
            return start
        return start + self._heads[index] + self._prompt_ids(index) + b'"text":' + encode(delta.text) + self._event_end(delta, logprobs)

    def _prompt_ids(self, index: int) -> bytes:
        """The prompt's tokens, for a choice's first event if they are wanted."""
        if self._told[index]:
            return b""
        self._told[index] = True
        return b'"prompt_token_ids":' + encode(self.prompts[index // self.n].token_ids) + b","

    def result(self) -> bytes:
        kept = self.request.kept
        if kept < self.n:  # best_of
            groups = [self.choices[i : i + self.n] for i in range(0, len(self.choices), self.n)]
            self.choices = [choice for group in groups for choice in sorted(group, key=Choice.likelihood, reverse=True)[:kept]]
            self.n = kept
            if self.request.logprobs is None:
                for choice in self.choices:
                    choice.logprobs = None
        return super().result()

    def usage(self) -> dict[str, Any]:
        if self.request.only_prompt:
            self.completion_tokens = 0
        return super().usage()

    def _choice(self, index: int, choice: Choice) -> dict[str, Any]:
        if self.request.only_prompt:
            choice = Choice(finish_reason="length")
        text, logprobs = "".join(choice.text), None
        if self.request.echo:
            text = self._prompt_text(self.prompts[index // self.n]) + text
            logprobs = self._prompt_logprobs(index)
        if choice.logprobs is not None:
            own = self._logprobs(index, choice.token_ids, choice.logprobs)
            logprobs = {key: logprobs[key] + own[key] for key in own} if logprobs else own
        prompt = self.prompts[index // self.n]
        extras = {"prompt_logprobs": self._ranked(prompt), "prompt_token_ids": prompt.token_ids if self.request.return_token_ids else None}
        return {"index": index, "text": text, "logprobs": logprobs, **self._extras(choice), **extras}

    def _prompt_text(self, prompt: Prompt) -> str:
        if prompt.text is None and self.tokenizer is not None:
            prompt.text = self.tokenizer.decode(prompt.token_ids)
        return prompt.text or ""

    def _prompt_logprobs(self, index: int) -> dict[str, Any] | None:
        prompt, most = self.prompts[index // self.n], self._echoed_logprobs()
        if prompt.logprobs is None or most is None:
            return None
        return self._logprobs(index, prompt.token_ids, prompt.tables(most, self.request.prompt_logprobs))

    def _echoed_logprobs(self) -> int | None:
        return self.request.logprobs if self.request.echo else None

    def _logprobs(self, index: int, token_ids: list[int], tables: Iterable[Table | None]) -> dict[str, Any]:
        """The first token of a prompt has no table: nothing comes before it."""
        tokens = [self._text(token_id) for token_id in token_ids]
        values: list[float | None] = []
        tops: list[dict[str, float] | None] = []
        offsets = []
        for token_id, token, table in zip(token_ids, tokens, tables, strict=True):
            values.append(None if table is None else _finite(table[token_id].logprob))
            tops.append(None if table is None else self._top(table))
            offsets.append(self._offsets[index])
            self._offsets[index] += len(token)
        return {"tokens": tokens, "token_logprobs": values, "top_logprobs": tops, "text_offset": offsets}

    def _top(self, table: Table) -> dict[str, float]:
        """By text, the token itself first. Parts of characters may all read U+FFFD: the first of them, which is the likeliest, keeps the name."""
        top: dict[str, float] = {}
        for token_id, value in table.items():
            top.setdefault(self._text(token_id), _finite(value.logprob))
        return top

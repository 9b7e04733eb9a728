"""From engine updates to what a caller sees: text, stop strings, log-probabilities, siblings of one request put together.

Owns the checks on a request that need the model's facts (`validate`), the state of open requests (`OutputProcessor`), and how deltas add up
(`merge`). LLM calls it in process, AsyncEngine in the API process; neither torch nor sockets here.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import msgspec
from msgspec.structs import replace as replace_fields

from miniinfer.data import MAX_BAD_TOKENS, Add, CompletionOutput, Logprob, RequestOutput, SamplingParams, SequenceUpdate, TokenLogprobs
from miniinfer.engine.text import Detokenizer, Tokenizer

__all__ = ["OutputProcessor", "StopStrings", "merge", "snapshot", "validate"]


def validate(
    prompt_token_ids: Sequence[int], params: SamplingParams, info: Mapping[str, Any], tokenizer: Tokenizer | None, pooled: bool = False
) -> None:
    """Can this request run? `info` is the engine's (`vocab_size`, `max_model_len`); one that is `pooled` wants no room for output. Raises ValueError
    naming the field that is wrong."""
    vocabulary, limit = info["vocab_size"], info["max_model_len"]
    if not prompt_token_ids:
        raise ValueError("prompt: must not be empty")
    wrong = set(map(type, prompt_token_ids)) - {int}
    if wrong:
        raise ValueError(f"prompt: token ids must be integers, found {', '.join(sorted(t.__name__ for t in wrong))}")
    if min(prompt_token_ids) < 0 or max(prompt_token_ids) >= vocabulary:
        bad = next(t for t in prompt_token_ids if not 0 <= t < vocabulary)
        raise ValueError(f"prompt: token id {bad} is outside the vocabulary of {vocabulary}")
    if len(prompt_token_ids) >= limit + pooled:
        what = "are too many" if pooled else "leave no room for output"
        raise ValueError(f"prompt: {len(prompt_token_ids)} tokens {what}; the context holds {limit} tokens")
    try:  # msgspec checks types when it decodes, not when a caller constructs
        msgspec.convert(msgspec.to_builtins(params, str_keys=True), SamplingParams, strict=True, str_keys=True)
    except msgspec.ValidationError as e:
        text, _, path = str(e).partition(" - at `$")
        raise ValueError(f"{path.strip('.`') or 'sampling parameters'}: {text}") from None
    except TypeError as e:
        raise ValueError(f"sampling parameters: {e}") from None
    named: dict[str, Iterable[int]] = {"logit_bias": params.logit_bias or (), "stop_token_ids": params.stop_token_ids or ()}
    named["bad_words_token_ids"] = [token for sequence in params.bad_words_token_ids or () for token in sequence]
    for name, ids in named.items():
        for token in ids:
            if not 0 <= token < vocabulary:
                raise ValueError(f"{name}: token id {token} is outside the vocabulary of {vocabulary}")
    if params.stop and (tokenizer is None or not params.detokenize):
        raise ValueError("stop: stop strings need text, but there is no tokenizer or detokenize is off; use stop_token_ids")
    _without_words(params, tokenizer)


def _without_words(params: SamplingParams, tokenizer: Tokenizer | None) -> SamplingParams:
    """The same with its bad words as the engine takes them, in tokens: as they are and with a blank before them."""
    if not params.bad_words:
        return params
    if tokenizer is None:
        raise ValueError("bad_words: words need a tokenizer; use bad_words_token_ids")
    found = []
    for word in params.bad_words:
        try:
            found += [ids for text in (word, " " + word) if (ids := tokenizer.encode(text, add_special_tokens=False))]
        except ValueError:
            raise ValueError("bad_words: must be valid text, without unpaired surrogates") from None
        if found and max(map(len, found[-2:])) > MAX_BAD_TOKENS:
            raise ValueError(f"bad_words: {word!r} has more than {MAX_BAD_TOKENS} tokens")
    return replace_fields(params, bad_words=None, bad_words_token_ids=(params.bad_words_token_ids or []) + found)


# ------------------------------------------------------------------------------------------------------ stop strings


class StopStrings:
    """Cuts a growing text at the first of some strings. Holds back only what may be the beginning of one of them."""

    def __init__(self, stops: Sequence[str], include: bool) -> None:
        """`include`: a stop string that was found stays in the text."""
        self._stops = stops
        self._include = include
        self._held = ""

    def push(self, text: str, may_stop: bool) -> tuple[str, str | None]:
        """The text that is now safe to show, and the stop string if one was found. With `may_stop` False none counts yet."""
        held = self._held + text
        found = [(at, stop) for stop in self._stops if (at := held.find(stop)) >= 0] if may_stop else []
        if found:
            at, stop = min(found, key=lambda match: match[0])
            self._held = ""
            return held[: at + len(stop) if self._include else at], stop
        cut = self._safe(held)
        self._held = held[cut:]
        return held[:cut], None

    def flush(self) -> str:
        """The text held back, once nothing can follow it."""
        held, self._held = self._held, ""
        return held

    def _safe(self, text: str) -> int:
        """How much of `text` comes before the first place where a stop string may have begun without being complete."""
        longest = max(map(len, self._stops))
        for start in range(max(0, len(text) - longest + 1), len(text)):
            tail = text[start:]
            if any(len(stop) > len(tail) and stop.startswith(tail) for stop in self._stops):
                return start
        return len(text)


# ---------------------------------------------------------------------------------------------------- open requests


class _Request:
    """An open request: what its caller gave, and those of its sequences that still run."""

    __slots__ = ("params", "result", "running")

    def __init__(self, params: SamplingParams, result: RequestOutput) -> None:
        self.params = params
        self.result = result  # whole, or what is new in this call of `process`
        self.running: set[str] = set()  # ids of sequences


class _Sequence:
    """One of a request's samples while it runs."""

    __slots__ = ("count", "detokenizer", "id", "index", "output", "request", "stops")

    def __init__(self, id: str, index: int, request: _Request, tokenizer: Tokenizer | None) -> None:
        params = request.params
        self.id = id
        self.index = index
        self.request = request
        self.output: CompletionOutput | None = None  # like the request's result
        self.count = 0  # tokens so far
        self.detokenizer: Detokenizer | None = None
        self.stops: StopStrings | None = None
        if tokenizer is not None and params.detokenize:
            self.detokenizer = Detokenizer(tokenizer, params.skip_special_tokens, request.result.prompt_token_ids)
            self.stops = StopStrings(params.stop, params.include_stop_str_in_output) if params.stop else None

    def text(self, update: SequenceUpdate) -> tuple[str, int, str | None]:
        """What an update's tokens add to the text, how many of them count, and the stop string that they completed."""
        ids, params = update.token_ids, self.request.params
        if self.detokenizer is None:
            return "", len(ids), None
        by_token = update.finish_reason == "stop" and not update.complete and not params.include_stop_str_in_output
        shown = ids[:-1] if by_token else ids  # the token that ended it is kept, but not shown
        if self.stops is None:
            return self.detokenizer.push(shown), len(ids), None
        text = ""
        before, self.count = self.count, self.count + len(ids)
        for i, token in enumerate(shown, 1):  # one by one, so as to know which of them completed a stop string
            safe, stop = self.stops.push(self.detokenizer.push((token,)), before + i >= params.min_tokens)
            text += safe
            if stop is not None:
                return text, i, stop
        return (text if update.finish_reason is None else text + self.stops.flush()), len(ids), None


class OutputProcessor:
    """Requests out of the engine's sequences: `add` opens a request, `process` turns updates into its output.

    Costs O(new tokens) an update. Without a tokenizer, results carry no text."""

    def __init__(self, tokenizer: Tokenizer | None, deltas: bool = False) -> None:
        """`deltas`: `process` returns what is new of every request it touches, to be added up with `merge`; otherwise it returns requests
        that have finished, whole."""
        self._tokenizer = tokenizer
        self._deltas = deltas
        self._requests: dict[str, _Request] = {}
        self._sequences: dict[str, _Sequence] = {}

    def __len__(self) -> int:
        """Open requests."""
        return len(self._requests)

    def add(
        self, request_id: str, prompt: str | None, prompt_token_ids: list[int], params: SamplingParams, priority: int = 0, cache_salt: str = ""
    ) -> list[Add]:
        """Opens a request that `validate` has passed. Returns a message for each of its n sequences, in the order in which the engine must get
        them: siblings share the prompt's pages. ValueError if the id is already open."""
        params = _without_words(params, self._tokenizer)
        if params.n == 1:
            ids, group = [request_id], None
        else:  # each message keeps n: the engine knows by it how many siblings will come
            ids, group = [f"{request_id}#{i}" for i in range(params.n)], request_id
        if request_id in self._requests or any(id in self._sequences for id in ids):
            raise ValueError(f"request_id: {request_id!r} is already running")
        request = self._requests[request_id] = _Request(params, RequestOutput(request_id, prompt, prompt_token_ids, [], False))
        for index, id in enumerate(ids):
            sequence = self._sequences[id] = _Sequence(id, index, request, self._tokenizer)
            request.running.add(id)
            if not self._deltas:
                sequence.output = CompletionOutput(index, "", [])
                request.result.outputs.append(sequence.output)
        return [Add(id, prompt_token_ids, params, priority, group, cache_salt) for id in ids]

    def process(self, updates: Sequence[SequenceUpdate]) -> tuple[list[RequestOutput], list[str]]:
        """Takes in a step's updates; those of sequences that are no longer open are dropped. Returns results, as `deltas` says, and the
        sequences that the engine must now abort. A delta's outputs are those of samples that have something new, in order."""
        touched: dict[str, RequestOutput] = {}
        fresh: list[_Sequence] = []
        aborts: list[str] = []
        for update in updates:
            sequence = self._sequences.get(update.id)
            if sequence is None:
                continue
            request = sequence.request
            result = request.result
            if sequence.output is None:
                sequence.output = CompletionOutput(sequence.index, "", [])
                result.outputs.append(sequence.output)
                fresh.append(sequence)
            self._advance(sequence, sequence.output, update)
            result.embedding = update.embedding or result.embedding
            result.error, result.invalid = update.error or result.error, update.invalid or result.invalid
            if sequence.index == 0:  # its siblings find the prompt in the cache because of it
                result.num_cached_tokens = update.cached_tokens or result.num_cached_tokens
                result.admission = update.admission or result.admission
                if update.prompt_logprobs is not None and request.params.prompt_logprobs is not None:
                    result.prompt_logprobs = self._prompt_logprobs(update.prompt_logprobs, request.params.prompt_logprobs)
            if sequence.output.finish_reason is not None:
                self._close(sequence)
                result.finished = not request.running
                if update.finish_reason is None:  # ended by a stop string, which the engine does not know
                    aborts.append(sequence.id)
            if self._deltas or result.finished:
                touched[result.request_id] = result
        for sequence in fresh:  # the next call begins a new delta
            sequence.output = None
            old = sequence.request.result
            old.outputs.sort(key=_index)
            sequence.request.result = RequestOutput(old.request_id, old.prompt, old.prompt_token_ids, [], False)
        return list(touched.values()), aborts

    def abort(self, request_id: str) -> tuple[list[RequestOutput], list[str]]:
        """Ends a request; its running samples get finish_reason "abort". Returns like `process`; nothing if the request is not open."""
        request = self._requests.get(request_id)
        running = sorted(request.running) if request else []
        results, _ = self.process([SequenceUpdate(id, [], "abort") for id in running])
        return results, running

    def drop(self, request_ids: Iterable[str]) -> list[str]:
        """Forgets requests, without any result. Returns their running sequences, for the engine to abort."""
        ids = [id for request_id in request_ids if request_id in self._requests for id in sorted(self._requests[request_id].running)]
        for id in ids:
            self._close(self._sequences[id])
        return ids

    def _close(self, sequence: _Sequence) -> None:
        running = sequence.request.running
        running.discard(sequence.id)
        del self._sequences[sequence.id]
        if not running:
            del self._requests[sequence.request.result.request_id]

    def _advance(self, sequence: _Sequence, output: CompletionOutput, update: SequenceUpdate) -> None:
        text, count, stop = sequence.text(update)
        output.text += text
        output.token_ids += update.token_ids[:count]
        if stop is not None:
            output.finish_reason, output.stop_reason = "stop", stop
        elif update.finish_reason is not None:
            output.finish_reason, output.stop_reason = update.finish_reason, update.stop_reason
        alternatives = sequence.request.params.logprobs
        if alternatives is not None:
            entries = (update.logprobs or [])[:count]
            output.cumulative_logprob = (output.cumulative_logprob or 0.0) + sum(entry.logprobs[0] for entry in entries)
            output.logprobs = output.logprobs or []
            output.logprobs += [self._logprobs(entry, alternatives) for entry in entries]

    def _logprobs(self, entry: TokenLogprobs, alternatives: int) -> dict[int, Logprob]:
        """The token itself and then the `alternatives` likeliest, by id; the engine may send more, because another request wants them."""
        text = self._tokenizer.token_text if self._tokenizer else None
        rows = list(zip(entry.token_ids, entry.logprobs, entry.ranks, strict=True))[: alternatives + 1]
        return {token: Logprob(logprob, rank, text(token) if text else None) for token, logprob, rank in rows}

    def _prompt_logprobs(self, entries: list[TokenLogprobs], alternatives: int) -> list[dict[int, Logprob] | None]:
        """One entry per prompt token; nothing comes before the first."""
        return [None, *(self._logprobs(entry, alternatives) for entry in entries)]


# ------------------------------------------------------------------------------------------------------- adding up


def merge(total: RequestOutput, delta: RequestOutput) -> None:
    """Adds what is new to what there was, in place; `delta` is not kept and not changed."""
    by_index = {output.index: output for output in total.outputs}
    for new in delta.outputs:
        old = by_index.get(new.index)
        if old is None:
            old = by_index[new.index] = _copy(new)
            total.outputs.append(old)
            total.outputs.sort(key=_index)
            continue
        old.text += new.text
        old.token_ids += new.token_ids
        old.finish_reason, old.stop_reason = new.finish_reason, new.stop_reason
        if new.logprobs is not None:
            old.logprobs = (old.logprobs or []) + new.logprobs
            old.cumulative_logprob = (old.cumulative_logprob or 0.0) + (new.cumulative_logprob or 0.0)
    total.finished = delta.finished
    total.error, total.invalid = delta.error or total.error, delta.invalid or total.invalid
    total.prompt_logprobs = delta.prompt_logprobs or total.prompt_logprobs
    total.embedding = delta.embedding or total.embedding
    total.num_cached_tokens = delta.num_cached_tokens or total.num_cached_tokens
    total.admission = delta.admission or total.admission


def unit(embedding: list[float], dimensions: int | None = None, normalize: bool = True) -> list[float]:
    """The first dimensions of an embedding, of length 1."""
    vector = embedding[:dimensions]
    length = math.hypot(*vector) if normalize else 1.0
    return [x / length for x in vector] if length else vector


def snapshot(output: RequestOutput) -> RequestOutput:
    """A copy that later merges leave alone."""
    return replace(output, outputs=[_copy(o) for o in output.outputs])


def _index(output: CompletionOutput) -> int:
    return output.index


def _copy(output: CompletionOutput) -> CompletionOutput:
    logprobs = None if output.logprobs is None else list(output.logprobs)
    return replace(output, token_ids=list(output.token_ids), logprobs=logprobs)

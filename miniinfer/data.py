"""The plain data that parts hand to one another: sampling parameters, a request's life, step plans and results, wire messages, outputs.

Owns types only: no torch, no input or output, no policy. Wire messages are msgspec structs in one tagged union each way.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Annotated, Any

import msgspec

# ---------------------------------------------------------------------------------------------- sampling parameters

MAX_LOGPROBS = 20
MAX_LOGIT_BIAS = 1024
MAX_STOP_IDS = 64
MAX_BAD_WORDS = 128
MAX_BAD_TOKENS = 32  # of one of them
MAX_KEEP_SECONDS = 86400
MAX_KEEP_PREFIXES = 8
POOLINGS = ("last", "mean")  # what an embedding may be made of: the last token's final hidden state, or the mean of all
MAX_GRAMMAR_BYTES = 256 << 10  # of a schema, a grammar, a regular expression or all choices together
COMPACT = {"whitespace_flexible": False}  # under "x-guidance" in a JSON schema
STRUCTURED = "json json_object regex choice grammar structural_tag".split()


class StructuredOutputsParams(msgspec.Struct, kw_only=True, omit_defaults=True):
    """What an output must look like: exactly one of the six. Names are vLLM's. Raises ValueError, naming the field, on a bad value.

    JSON schemas and structural tags are given as objects or as JSON text, and kept as text."""

    json: str | bool | dict[str, Any] | None = None  # a JSON schema
    json_object: bool = False  # any JSON object
    regex: str | None = None  # the whole output matches it
    choice: list[str] | None = None  # the output is one of these
    grammar: str | None = None  # Lark as llguidance understands it, or GBNF (`root ::= ...`)
    structural_tag: str | dict[str, Any] | None = None  # free text in which what stands between tags is constrained
    disable_any_whitespace: bool = False  # JSON without spaces and line ends between its parts
    field: str = "structured_outputs"  # where the caller wrote it: what errors name

    def __post_init__(self) -> None:
        given = [name for name in STRUCTURED if getattr(self, name) not in (None, False) or (name == "json" and self.json is False)]
        if len(given) != 1:
            said = f"got {', '.join(given)}" if given else "got none"
            raise ValueError(f"{self.field}: exactly one of {', '.join(STRUCTURED)} must be set, {said}")
        if self.disable_any_whitespace and given[0] in ("json", "json_object"):
            schema = self.json if given == ["json"] else {"type": "object"}
            with contextlib.suppress(ValueError, RecursionError):  # of what is no JSON the checks below say so
                schema = json.loads(schema) if isinstance(schema, str) else schema
            if isinstance(schema, dict):
                given, self.json, self.json_object = ["json"], {**schema, "x-guidance": COMPACT}, False
        if given[0] == "choice":
            if not isinstance(self.choice, list) or not self.choice or not all(isinstance(c, str) and c for c in self.choice):
                raise ValueError(f"{self.field}: choice must be a list of non-empty strings")
        elif given[0] in ("json", "structural_tag"):
            value = getattr(self, given[0])
            setattr(self, given[0], value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))
        self._check_text(given[0])

    def _check_text(self, kind: str) -> None:
        text = self.text
        try:
            size = len(text.encode())
        except (UnicodeEncodeError, AttributeError):
            raise ValueError(f"{self.field}: {kind} must be valid text, without unpaired surrogates") from None
        if not text:
            raise ValueError(f"{self.field}: {kind} must not be empty")
        if size > MAX_GRAMMAR_BYTES:
            raise ValueError(f"{self.field}: {kind} has {size} bytes, more than {MAX_GRAMMAR_BYTES}")
        if kind in ("json", "structural_tag"):
            try:
                value = json.loads(text)
            except (ValueError, RecursionError) as e:
                raise ValueError(f"{self.field}: {kind} is not valid JSON: {e}") from None
            if not isinstance(value, dict) and (kind != "json" or not isinstance(value, bool)):
                raise ValueError(f"{self.field}: {kind} must be a JSON object, got {type(value).__name__}")

    @property
    def kind(self) -> str:
        """Which of the six it is."""
        return next(name for name in STRUCTURED if getattr(self, name) not in (None, False))

    @property
    def text(self) -> str:
        """Its content: with `kind`, all that the constraint depends on."""
        value = getattr(self, self.kind)
        return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


class SamplingParams(msgspec.Struct, kw_only=True, omit_defaults=True):
    """How to continue a prompt. Names and defaults are vLLM's. Raises ValueError, naming the field, on a bad value.

    A request's tokens are a pure function of (logits, seed, position); without `seed` the engine draws one. A field's annotation carries the
    one description that `--help` derives from."""

    n: Annotated[int, "samples per prompt; they share the prompt's pages"] = 1
    temperature: Annotated[float, "randomness of the choice; 0 = greedy"] = 1.0
    top_k: Annotated[int, "choose among this many likeliest tokens; 0 or -1 = off"] = 0
    top_p: Annotated[float, "choose among the likeliest tokens that hold this much probability"] = 1.0
    min_p: Annotated[float, "drop tokens below this share of the likeliest one's probability"] = 0.0
    repetition_penalty: Annotated[float, "divides the scores of tokens in prompt and output; 1 = off"] = 1.0
    presence_penalty: Annotated[float, "subtracted once from tokens in the output"] = 0.0
    frequency_penalty: Annotated[float, "subtracted from tokens in the output, per occurrence"] = 0.0
    logit_bias: Annotated[dict[int, float] | None, "added to the scores of these token ids"] = None
    seed: Annotated[int | None, "makes the tokens repeat exactly"] = None
    max_tokens: Annotated[int | None, "longest output; None = up to the context limit"] = 16
    min_tokens: Annotated[int, "no end-of-text or stop token before this many"] = 0
    bad_words: Annotated[list[str] | None, "words that the output must not hold, nor with a blank before them"] = None
    bad_words_token_ids: Annotated[list[list[int]] | None, "token sequences that the output must not hold"] = None
    stop: Annotated[list[str] | str | None, "text that ends the output"] = None
    stop_token_ids: Annotated[list[int] | None, "token ids that end the output"] = None
    ignore_eos: Annotated[bool, "do not stop at the end-of-text token"] = False
    include_stop_str_in_output: Annotated[bool, "keep the stop text in the output"] = False
    logprobs: Annotated[int | None, "alternatives per output token; 0 = the sampled token's only"] = None
    prompt_logprobs: Annotated[int | None, "alternatives per prompt token"] = None
    skip_special_tokens: Annotated[bool, "leave special tokens out of the text"] = True
    detokenize: Annotated[bool, "turn tokens into text"] = True
    keep_cache_seconds: Annotated[float, "while that long, evict other prefixes first: for a conversation whose tool is running"] = 0.0
    keep_cache_prefixes: Annotated[list[tuple[int, float]] | None, "the same for the first so many tokens only: pairs of tokens and seconds"] = None
    explain_cache: Annotated[bool, "say why the first token that was not found in the prefix cache was not"] = False
    structured_outputs: Annotated[StructuredOutputsParams | None, "what the output must look like"] = None

    def __post_init__(self) -> None:
        def check(ok: bool, name: str, rule: str) -> None:
            if not ok:
                raise ValueError(f"{name}: must be {rule}, got {getattr(self, name)!r}")

        if isinstance(self.stop, str):
            self.stop = [self.stop]
        check(1 <= self.n <= 128, "n", "from 1 to 128")
        check(0 <= self.temperature <= 100, "temperature", "from 0 to 100")  # NaN fails every comparison
        check(self.top_k >= -1, "top_k", "-1, 0 (both off) or positive")
        check(0 < self.top_p <= 1, "top_p", "in (0, 1]")
        check(0 <= self.min_p <= 1, "min_p", "in [0, 1]")
        check(0 < self.repetition_penalty <= 100, "repetition_penalty", "in (0, 100]")
        check(-2 <= self.presence_penalty <= 2, "presence_penalty", "in [-2, 2]")
        check(-2 <= self.frequency_penalty <= 2, "frequency_penalty", "in [-2, 2]")
        check(self.max_tokens is None or self.max_tokens >= 1, "max_tokens", "at least 1")
        check(self.min_tokens >= 0, "min_tokens", "at least 0")
        check(self.max_tokens is None or self.min_tokens <= self.max_tokens, "min_tokens", "at most max_tokens")
        check(self.seed is None or -(2**63) <= self.seed < 2**63, "seed", "a 64-bit integer")
        check(self.logprobs is None or 0 <= self.logprobs <= MAX_LOGPROBS, "logprobs", f"from 0 to {MAX_LOGPROBS}")
        check(self.prompt_logprobs is None or 0 <= self.prompt_logprobs <= MAX_LOGPROBS, "prompt_logprobs", f"from 0 to {MAX_LOGPROBS}")
        check(len(self.stop_token_ids or ()) <= MAX_STOP_IDS, "stop_token_ids", f"at most {MAX_STOP_IDS} ids")
        check(all(self.stop or []), "stop", "non-empty strings")
        check(len(self.bad_words or ()) <= MAX_BAD_WORDS and all(self.bad_words or []), "bad_words", f"at most {MAX_BAD_WORDS} non-empty strings")
        fine = len(self.bad_words_token_ids or ()) <= 2 * MAX_BAD_WORDS and all(
            0 < len(ids) <= MAX_BAD_TOKENS for ids in self.bad_words_token_ids or ()
        )
        check(fine, "bad_words_token_ids", f"at most {2 * MAX_BAD_WORDS} sequences of 1 to {MAX_BAD_TOKENS} tokens")
        check(0 <= self.keep_cache_seconds <= MAX_KEEP_SECONDS, "keep_cache_seconds", f"from 0 to {MAX_KEEP_SECONDS}")
        if self.keep_cache_prefixes:
            fine = all(tokens >= 1 and 0 < seconds <= MAX_KEEP_SECONDS for tokens, seconds in self.keep_cache_prefixes)
            rule = f"at most {MAX_KEEP_PREFIXES} pairs (tokens, seconds up to {MAX_KEEP_SECONDS})"
            check(fine and len(self.keep_cache_prefixes) <= MAX_KEEP_PREFIXES, "keep_cache_prefixes", rule)
        if self.logit_bias:
            check(len(self.logit_bias) <= MAX_LOGIT_BIAS, "logit_bias", f"at most {MAX_LOGIT_BIAS} entries")
            check(all(-100 <= v <= 100 for v in self.logit_bias.values()), "logit_bias", "values in [-100, 100]")


SLEEP_TAGS = ("weights", "kv_cache")  # what of an engine can sleep


def check_sleep(level: int, tags: Sequence[str] | None) -> None:
    """ValueError unless an engine can sleep at this level, and has these parts."""
    if level not in (1, 2):
        raise ValueError(f"level: must be 1 or 2, got {level!r}")
    if unknown := [tag for tag in tags or () if tag not in SLEEP_TAGS]:
        raise ValueError(f"tags: must be of {', '.join(SLEEP_TAGS)}, got {unknown[0]!r}")


def sequence_seed(params: SamplingParams, index: int, engine_seed: int, number: int) -> int:
    """The seed of a request's sample `index`: its own plus the index or, if it has none, one drawn for the engine's `number`th sequence."""
    if params.seed is None:
        digest = hashlib.blake2b(f"{engine_seed}/{number}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "little", signed=True)
    return (params.seed + index + 2**63) % 2**64 - 2**63


# ------------------------------------------------------------------------------------------------- a request's life


class Status(Enum):
    WAITING = "waiting"  # holds no row and no pages
    RUNNING = "running"  # has a row; computed moves towards total
    FINISHED = "finished"


@dataclass(eq=False, slots=True)
class Request:
    """One sequence from admission to its end. There is no prefill or decode phase: a step moves `computed` towards `total`.

    `tokens` holds the prompt and every sampled token whose value the host knows; `in_flight` counts tokens that launched steps will
    append, so total = len(tokens) + in_flight. `computed` is advanced when a step is planned, not when its result arrives."""

    id: str
    prompt_len: int
    tokens: list[int]
    params: SamplingParams
    seed: int
    max_total: int  # prompt plus output may not exceed this
    stop_ids: frozenset[int]  # end-of-text and stop token ids that end this request
    key: tuple[float, int]  # admission order, lowest first: see scheduler.py
    namespace: str = ""  # prefix-cache namespace: requests share pages only within one
    group: str | None = None  # siblings (n > 1) carry the same one
    leader: Request | None = None  # the sibling (n > 1) whose prompt pages this one waits for
    status: Status = Status.WAITING
    row: int = -1
    computed: int = 0
    in_flight: int = 0
    arrived: float = 0.0  # on the loop's clock
    cached_tokens: int = 0  # of the first admission's prompt, found in the cache
    admission: Admission | None = None  # since it was first admitted
    preemptions: int = 0
    reused: int = 0  # of the present admission's tokens, found in the cache
    stale: int = 0  # tokens in flight that are to be dropped
    alone: bool = False  # takes nothing from the prefix cache: with what it found there its logits were not finite
    pooling: str | None = None  # "last" or "mean": no text is wanted, but the prompt's hidden states pooled
    pooled: list[float] = field(default_factory=list)  # their sum, chunk by chunk
    pages: Any = None  # cache/manager.py's record of the pages held
    constraint: Any = None  # engine/grammar.py's state of this sequence, where the output must have a structure
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)  # gathered chunk by chunk, if wanted

    @property
    def total(self) -> int:
        return len(self.tokens) + self.in_flight


# -------------------------------------------------------------------------------------------------- plans and results


class RowInit(msgspec.Struct, array_like=True):
    """A request gets a device row: everything the device must know of it from now on."""

    row: int
    tokens: list[int]
    prompt_len: int
    seed: int
    params: SamplingParams
    stop_ids: list[int]


class StepPlan(msgspec.Struct, array_like=True):
    """What one step does, in ints only: every rank executes the same. Parallel lists, one entry per batch row.

    Order on the device: copies, row inits, page entries, forward, sampling."""

    step: int
    rows: list[int]  # device row of each batch entry
    starts: list[int]  # first position computed
    counts: list[int]  # tokens computed, from `starts` on
    samples: list[bool]  # does the last computed token yield a new one
    inits: list[RowInit]
    page_entries: list[tuple[int, int, int, int]]  # (kind, row, index in the row's page table, page)
    copies: list[tuple[int, int, int]]  # (kind, source page, destination page)
    logprobs: int = -1  # most alternatives any row asks for; -1 = none wanted
    prompt_logprobs: list[int] = []  # batch entries whose prompt positions want logprobs
    pooled: list[tuple[int, int]] = []  # (batch entry, how many of its last positions): sums of their hidden states are wanted
    constrained: list[int] = []  # batch entries that sample under a mask, which follows when the tokens before it are known

    @property
    def num_tokens(self) -> int:
        return sum(self.counts)


class TokenLogprobs(msgspec.Struct, array_like=True):
    """Log-probabilities at one position: the token itself first, then the most likely ones."""

    token_ids: list[int]
    logprobs: list[float]
    ranks: list[int]  # 1 = most likely


class StepResult(msgspec.Struct, array_like=True):
    """What a step produced, aligned with the plan's rows; an entry that did not sample has an empty list."""

    step: int
    tokens: list[list[int]]
    logprobs: list[list[TokenLogprobs]] | None = None
    prompt_logprobs: dict[int, list[TokenLogprobs]] | None = None  # batch entry -> one per position computed (the token at position + 1)
    pooled: dict[int, list[float]] | None = None  # batch entry -> sum of hidden states


# -------------------------------------------------------------------------------------------------------- messages


class Add(msgspec.Struct, tag=True, array_like=True):
    """To the engine: start a sequence. The n siblings of one request carry the same `group`, and params with their n."""

    id: str
    prompt: list[int]
    params: SamplingParams
    priority: int = 0
    group: str | None = None
    cache_salt: str = ""
    output: list[int] = []  # what it had produced before the engine process was replaced; it goes on behind that
    seed: int | None = None  # the sequence's own, fixed by the sender so that a replacement draws the same tokens; None: by params
    pooling: str | None = None  # "last" or "mean": the prompt's hidden states are wanted, and no output
    pin: bool = False  # the prompt's pages are to go last, until an Abort of this id, however the sequence ends


class Abort(msgspec.Struct, tag=True, array_like=True):
    """To the engine: forget these sequences at once, and what they have pinned; unknown ids are ignored."""

    ids: list[str]


class Control(msgspec.Struct, tag=True, array_like=True):
    """To the engine: a command outside the request flow ("stats", "reset_prefix_cache", "check", "start_profile" and others); answered by Reply."""

    id: int
    command: str
    arguments: dict[str, Any] = {}


class Admission(msgspec.Struct, array_like=True):
    """How a sequence came to run: seconds in the queue and, if its request wants an explanation, why the prompt's first token that was not
    found in the prefix cache was not (CacheManager.explain); None if all that could be reused was found."""

    queued: float
    cache_miss: str | None = None


class SequenceUpdate(msgspec.Struct, array_like=True):
    """New tokens of one sequence, and how it ended if it did ("stop", "length", "abort" or "error")."""

    id: str
    token_ids: list[int]
    finish_reason: str | None = None
    stop_reason: int | str | None = None  # the stop token's id or the stop string
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: list[TokenLogprobs] | None = None  # whole, with the first update that has them
    cached_tokens: int = 0
    error: str | None = None
    admission: Admission | None = None  # with the first token
    invalid: bool = False  # the error is the request's own fault; its text begins with the field's name
    complete: bool = False  # "stop" because nothing more may follow: the last token is part of the text
    embedding: list[float] | None = None  # at the end of a sequence with `pooling`


class Updates(msgspec.Struct, tag=True, array_like=True):
    """From the engine: one step's updates and the engine's state after it."""

    updates: list[SequenceUpdate]
    stats: dict[str, float]


class Ready(msgspec.Struct, tag=True, array_like=True):
    """From the engine: it accepts work; what it turned out to be."""

    info: dict[str, Any]


class Failed(msgspec.Struct, tag=True, array_like=True):
    """From the engine: it could not start or has died; `user_error` if the mend is the user's."""

    error: str
    user_error: bool = False


class Reply(msgspec.Struct, tag=True, array_like=True):
    """From the engine: the answer to a Control."""

    id: int
    value: Any
    error: str | None = None


ToEngine = Add | Abort | Control
FromEngine = Updates | Ready | Failed | Reply


# --------------------------------------------------------------------------------------------------------- outputs


@dataclass(slots=True)
class Logprob:
    """One token's log-probability at one position, as vLLM's offline API shows it."""

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


@dataclass(slots=True)
class CompletionOutput:
    """One of a request's n continuations. `text` is "" without a tokenizer."""

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None


@dataclass(slots=True)
class RequestOutput:
    """A request as seen by its caller: the prompt and what came of it so far."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    num_cached_tokens: int = 0
    error: str | None = field(default=None)
    invalid: bool = False  # the error is the request's own fault; its text begins with the field's name
    admission: Admission | None = None
    embedding: list[float] | None = None


@dataclass(slots=True)
class EmbeddingOutput:
    """A prompt's vector."""

    embedding: list[float]


@dataclass(slots=True)
class EmbeddingRequestOutput:
    """An embedded prompt, in vLLM's shape."""

    request_id: str
    outputs: EmbeddingOutput
    prompt_token_ids: list[int]
    finished: bool = True

"""What a client may send: the bodies of /v1/chat/completions and /v1/completions, checked, and the errors it gets back.

Owns the request models (pydantic, strict, unknown fields refused) and `ApiError`, the one way a request is turned down. Knows neither
the engine nor HTTP. Field names and meanings: OpenAI's API reference, plus vLLM's extra sampling fields under vLLM's names.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Annotated, Any, Literal, NoReturn, TypeVar

import msgspec
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetJsonSchemaHandler,
    ValidationError,
    WithJsonSchema,
    field_validator,
    model_validator,
)
from pydantic_core import CoreSchema, from_json

from miniinfer.data import MAX_BAD_WORDS, MAX_KEEP_SECONDS, MAX_LOGIT_BIAS, MAX_LOGPROBS, MAX_STOP_IDS, SamplingParams
from miniinfer.engine.beam import MAX_WIDTH, BeamSearchParams
from miniinfer.serve import structured, tools_grammar

# ----------------------------------------------------------------------------------------------------------- errors

_TYPES = {429: "rate_limit_error", 500: "server_error", 503: "server_error"}


class ApiError(Exception):
    """A refused or failed request in OpenAI's error shape. `param` names the field at fault, `code` is for programs."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None, headers: dict[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.headers = status, message, param, code, headers

    def body(self) -> bytes:
        """The JSON object {"error": {...}}."""
        kind = _TYPES.get(self.status, "invalid_request_error")
        return msgspec.json.encode({"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}})

    @staticmethod
    def from_value_error(error: ValueError, param: str | None = None) -> ApiError:
        """A 400 from a "field: what is wrong" message of ours; the field becomes `param`."""
        text = str(error)
        named = re.match(r"(\w+): ", text)
        return ApiError(400, text, param=param or (named[1] if named else None))


def _refuse(field: str, why: str) -> NoReturn:
    raise ApiError(400, f"{field}: {why}", param=field)


# ----------------------------------------------------------------------------------------------------------- fields

# Fields that official clients send and that change nothing a text server of one user's own promises.
IGNORED = frozenset("metadata prediction prompt_cache_key prompt_cache_options safety_identifier service_tier store user verbosity".split())
IGNORED |= {"guided_decoding_backend", "spaces_between_special_tokens"}  # vLLM's, as its older clients send them, without effect there, too

# OpenAI fields that would change the answer and that we do not have: refused, never ignored.
_NOT_WITH_BEAMS = "temperature stop logit_bias presence_penalty frequency_penalty min_tokens allowed_token_ids structured_outputs".split() + [
    "bad_words",
    *structured.GUIDED,
]
UNSUPPORTED = {
    "audio": "not supported; the model writes text",
    "function_call": "not supported; it is called tool_choice now",
    "functions": "not supported; they are given as tools now",
    "moderation": "not supported; ask a model for it in a request of its own",
    "web_search_options": "not supported; offer a search of your own as one of the tools",
}
# Fields of an assistant's message as it was answered, by us or by what stands between us and the client, that say nothing new when it comes back.
_ANSWERED = ("refusal", "annotations", "parsed", "provider_specific_fields", "reasoning_details", "thinking_blocks")


def without_foreign(raw: Any, ignored: Collection[str], refused: Mapping[str, str]) -> Any:
    """A body without fields that other servers know and we do not: the ignored ones, and the refused ones where they say nothing. ApiError 400 where
    they say something, with what `refused` has to tell of them."""
    if not isinstance(raw, dict):
        return raw
    for field, why in refused.items():
        if raw.get(field):
            _refuse(field, why)
    return {k: v for k, v in raw.items() if k not in ignored and k not in refused}


def _nullable(schema: dict[str, Any]) -> dict[str, Any]:
    if not schema or {"type": "null"} in schema.get("anyOf", ()):
        return schema
    about: dict[str, Any] = {key: schema[key] for key in ("default", "description") if key in schema}
    return {"anyOf": [{k: v for k, v in schema.items() if k not in about}, {"type": "null"}], **about}


def between(low: float, high: float, default: Any = None) -> Any:
    """A number's range in /openapi.json; the check itself is SamplingParams'."""
    return Field(default, json_schema_extra={"minimum": low, "maximum": high})


# Shapes that /openapi.json shows where validators accept more than the field's own type.
_TOKEN: dict[str, Any] = {"type": "integer", "minimum": 0, "x-token-id": True}
_TEXTS = {"type": "array", "items": {"type": "string"}}
_STOP = {"anyOf": [{"type": "string", "minLength": 1}, {"type": "array", "items": {"type": "string", "minLength": 1}, "maxItems": 64}]}
_TOKENS = {"type": "array", "items": _TOKEN, "minItems": 1}
PROMPT_SCHEMA = {
    "anyOf": [
        {"type": "string", "minLength": 1},
        {"type": "array", "items": {"type": "string", "minLength": 1}, "minItems": 1},
        _TOKENS,
        {"type": "array", "items": _TOKENS, "minItems": 1},
    ]
}
_BIAS = {
    "type": "object",
    "propertyNames": {"pattern": "^[0-9]{1,9}$"},
    "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
    "maxProperties": MAX_LOGIT_BIAS,
}
_PART = {
    "type": "object",
    "required": ["type", "text"],
    "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
}
_CONTENT = {"anyOf": [{"type": "string"}, {"type": "array", "items": _PART}]}
_FUNCTION = {"type": "object", "required": ["name"], "properties": {"name": {"type": "string"}}}
_CALL = {"type": "object", "required": ["function"], "properties": {"function": _FUNCTION}}
_TOOL = {"type": "object", "required": ["type", "function"], "properties": {"type": {"const": "function"}, "function": _FUNCTION}}
TokenIds = Annotated[list[int], WithJsonSchema({"type": "array", "items": _TOKEN})]
Stop = Annotated[list[str], BeforeValidator(lambda value: [value] if isinstance(value, str) else value), Field(max_length=64), WithJsonSchema(_STOP)]
_WORD = Annotated[str, Field(min_length=1)]
Words = Annotated[list[_WORD], Field(max_length=MAX_BAD_WORDS)]
Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]


class Strict(BaseModel):
    """JSON types as they are (no "1" for 1), null for absent, and no field that we do not know."""

    model_config = ConfigDict(strict=True, extra="forbid", protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, raw: Any) -> Any:
        return {k: v for k, v in raw.items() if v is not None} if isinstance(raw, dict) else raw

    @classmethod
    def __get_pydantic_json_schema__(cls, core: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        """For /openapi.json: null stands for an absent field, so every field that may be absent may be null, and one that we do not know as well."""
        shown = handler(core)
        schema = handler.resolve_ref_schema(shown)
        properties = schema.get("properties", {})
        for name in properties.keys() - set(schema.get("required", ())):
            properties[name] = _nullable(properties[name])
        if schema.get("additionalProperties") is False:
            schema["additionalProperties"] = {"type": "null"}
        return shown


CacheRetention = Literal["in_memory", "in-memory", "24h"]  # OpenAI's words: while there is room, or as long as keep_cache_seconds can


MOST_TEMPLATE = 64 << 10  # characters of a chat template that comes with a request


class StreamOptions(Strict):
    include_usage: bool = False
    continuous_usage_stats: bool = False  # with include_usage: every event has the usage so far
    include_obfuscation: bool = False  # padding against traffic analysis; we never pad, which a client cannot tell from "off"


class Truncation(Strict):
    """What becomes of a prompt that is too long: nothing, which is an error, or it loses tokens at one of its sides."""

    truncate_prompt_tokens: int | None = Field(None, ge=-1, lt=2**31, description="the most tokens of a prompt that are used; -1: as many as fit")
    truncation_side: Literal["left", "right"] = "left"

    def truncated(self, ids: list[int], room: int) -> list[int]:
        """As many of a prompt's tokens as the client wants, where the model has `room` for so many."""
        most = room if self.truncate_prompt_tokens == -1 else self.truncate_prompt_tokens
        if most is None or len(ids) <= most:
            return ids
        return ids[:most] if self.truncation_side == "right" else ids[len(ids) - most :]


class Sampling(Truncation):
    """The fields that both endpoints share. None means: the checkpoint's generation_config.json, then the engine's default."""

    model: str | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: int | None = between(1, 128)
    temperature: float | None = between(0, 100)
    top_p: float | None = Field(None, json_schema_extra={"exclusiveMinimum": 0, "maximum": 1})
    presence_penalty: float | None = between(-2, 2)
    frequency_penalty: float | None = between(-2, 2)
    logit_bias: Annotated[dict[int, float], WithJsonSchema(_BIAS)] | None = None
    seed: int | None = between(-(2**63), 2**63 - 1)
    stop: Stop | None = None
    bad_words: Words | None = None  # that the answer must not hold, nor with a blank before them
    max_tokens: int | None = Field(None, json_schema_extra={"minimum": 1})
    top_k: int | None = Field(None, ge=-1, lt=2**31)
    min_p: float | None = between(0, 1)
    repetition_penalty: float | None = Field(None, json_schema_extra={"exclusiveMinimum": 0, "maximum": 100})
    ignore_eos: bool | None = None
    min_tokens: int | None = Field(None, ge=0, lt=2**31)
    stop_token_ids: TokenIds | None = Field(None, json_schema_extra={"maxItems": MAX_STOP_IDS})
    skip_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    add_special_tokens: bool | None = None
    use_beam_search: bool = False
    beam_width: int | None = Field(None, ge=1, le=MAX_WIDTH)
    length_penalty: float = Field(1.0, ge=-100, le=100)
    priority: int = Field(0, ge=-(2**31), lt=2**31)
    timeout: float | None = Field(None, gt=0, le=604800, description="seconds after which the request ends with an error")
    cache_salt: str = Field("", max_length=256)
    keep_cache_seconds: float | None = None
    prompt_cache_retention: CacheRetention | None = None
    prompt_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    return_token_ids: bool = False
    return_tokens_as_token_ids: bool = False  # in logprobs: "token_id:17" for a token's text, which may be the same for two tokens
    explain_cache: bool = False
    allowed_token_ids: TokenIds | None = None
    response_format: Annotated[Any, WithJsonSchema(structured.SCHEMAS["response_format"])] = None
    structured_outputs: Annotated[Any, WithJsonSchema(structured.SCHEMAS["structured_outputs"])] = None
    guided_json: Annotated[Any, WithJsonSchema(structured.SCHEMAS["guided_json"])] = None
    guided_regex: Annotated[Any, WithJsonSchema(structured.SCHEMAS["guided_regex"])] = None
    guided_choice: Annotated[Any, WithJsonSchema(structured.SCHEMAS["guided_choice"])] = None
    guided_grammar: Annotated[Any, WithJsonSchema(structured.SCHEMAS["guided_grammar"])] = None
    regex: Annotated[Any, WithJsonSchema(structured.SCHEMAS["guided_regex"])] = None
    ebnf: Annotated[Any, WithJsonSchema(structured.SCHEMAS["guided_grammar"])] = None
    grammar: Annotated[Any, WithJsonSchema(structured.SCHEMAS["guided_grammar"])] = None
    json_schema: Annotated[Any, WithJsonSchema(structured.SCHEMAS["guided_json"])] = None

    @model_validator(mode="before")
    @classmethod
    def _known_foreign_fields(cls, raw: Any) -> Any:
        return without_foreign(raw, IGNORED, UNSUPPORTED)

    @classmethod
    def __get_pydantic_json_schema__(cls, core: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        shown = super().__get_pydantic_json_schema__(core, handler)
        foreign: dict[str, Any] = {field: {"description": "accepted and ignored"} for field in IGNORED}
        foreign |= {field: {"enum": [None, False, 0, "", [], {}], "description": why} for field, why in UNSUPPORTED.items()}
        schema = handler.resolve_ref_schema(shown)
        schema["properties"] = {**foreign, **schema["properties"]}
        return shown

    @field_validator("logit_bias", mode="before")
    @classmethod
    def _integer_keys(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        if bad := [key for key in value if not re.fullmatch(r"\d{1,9}", key)]:
            raise ValueError(f"keys must be token ids, got {', '.join(map(repr, bad[:5]))}"[:200])
        return {int(key): bias for key, bias in value.items()}

    @model_validator(mode="after")
    def _options_need_stream(self) -> Sampling:
        if self.stream_options is not None and not self.stream:
            _refuse("stream_options", "only allowed when stream is true")
        if self.prompt_logprobs is not None and self.stream:
            _refuse("prompt_logprobs", "come at the end only; leave out stream, or prompt_logprobs")
        return self

    @model_validator(mode="after")
    def _beams(self) -> Sampling:
        if not self.use_beam_search:
            for name in ("beam_width", "length_penalty"):
                if getattr(self, name) not in (None, 1.0):
                    _refuse(name, "needs use_beam_search")
            return self
        if self.stream:
            _refuse("stream", "beam search knows its answers at the end only; leave out stream, or use_beam_search")
        for name in _NOT_WITH_BEAMS:
            if getattr(self, name):
                _refuse(name, "not possible with use_beam_search, which looks for the likeliest tokens as the model has them")
        return self

    def beam_search_params(self, max_tokens: int) -> BeamSearchParams | None:
        """The search that is asked for, if one is: as wide as `beam_width`, or else `best_of`, or else n."""
        if not self.use_beam_search:
            return None
        n = self.n or 1
        width = self.beam_width or getattr(self, "best_of", None) or n
        if width < n:
            _refuse("beam_width", f"must be at least n ({n}), got {width}")
        if width > MAX_WIDTH:
            _refuse("n", f"a beam search is at most {MAX_WIDTH} wide, got {width}")
        return BeamSearchParams(
            beam_width=width,
            max_tokens=max_tokens,
            ignore_eos=bool(self.ignore_eos),
            length_penalty=self.length_penalty,
            include_stop_str_in_output=bool(self.include_stop_str_in_output),
        )

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def continuous_usage(self) -> bool:
        return self.include_usage and self.stream_options is not None and self.stream_options.continuous_usage_stats

    def sampling_params(self, defaults: dict[str, Any], **more: Any) -> SamplingParams:
        """What the client asked for over `defaults` (from the checkpoint); `more` are the endpoint's own. ApiError on a bad value."""
        asked = {f: getattr(self, f) for f in _PASSED_ON if getattr(self, f) is not None}
        try:
            if self.prompt_cache_retention == "24h":
                asked.setdefault("keep_cache_seconds", MAX_KEEP_SECONDS)
            wanted = structured.structured({f: getattr(self, f) for f in structured.FIELDS})
            return SamplingParams(**{**defaults, **asked, "structured_outputs": wanted, **more})
        except ValueError as e:
            raise ApiError.from_value_error(e) from None


_PASSED_ON = tuple(f for f in SamplingParams.__struct_fields__ if f in Sampling.model_fields and f not in ("max_tokens", "structured_outputs"))


# ------------------------------------------------------------------------------------------------------- completions


def list_of_prompts(value: Any) -> list[str] | list[list[int]]:
    """A prompt in its four JSON shapes as a list of texts or of token id lists."""
    prompts = [value] if isinstance(value, str) or (isinstance(value, list) and value and type(value[0]) is int) else value
    if not isinstance(prompts, list) or not (
        all(isinstance(p, str) for p in prompts) or all(isinstance(p, list) and all(type(t) is int for t in p) for p in prompts)
    ):
        raise ValueError("must be a string, a list of strings, a list of token ids or a list of lists of token ids")
    if not prompts or not all(prompts):
        raise ValueError("must not be empty")
    return prompts


class CompletionRequest(Sampling):
    """/v1/completions. `prompts` is the prompt in its four JSON shapes, as a list of texts or of token id lists."""

    prompt: Annotated[list[str] | list[list[int]], WithJsonSchema(PROMPT_SCHEMA)]
    suffix: str | None = None  # the text after the one that is wanted, where the tokenizer has tokens for that
    best_of: int | None = between(1, 128)  # so many are sampled, and the n likeliest returned
    echo: bool = False
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)

    _prompts = field_validator("prompt", mode="plain")(list_of_prompts)

    def params(self, defaults: dict[str, Any]) -> SamplingParams:
        """With `echo`, max_tokens 0 (score the prompt only) runs as 1 and its token is dropped by the caller."""
        limit = 16 if self.max_tokens is None else self.max_tokens
        more: dict[str, Any] = {"max_tokens": 1 if self.only_prompt else limit, "logprobs": self.logprobs}
        if self.best_of is not None and self.best_of > self.kept and not self.use_beam_search:
            more |= {"n": self.best_of, "logprobs": self.logprobs or 0}
        if self.echo and self.logprobs is not None:
            more["prompt_logprobs"] = max(self.logprobs, self.prompt_logprobs or 0)
        return self.sampling_params(defaults, **more)

    @model_validator(mode="after")
    def _best_of_what(self) -> CompletionRequest:
        if self.best_of is not None and self.best_of < self.kept:
            _refuse("best_of", f"must be at least n ({self.kept}), got {self.best_of}")
        if self.best_of is not None and self.best_of > self.kept and self.stream:
            _refuse("best_of", "which is best is known at the end only; leave out stream, or best_of")
        if self.suffix and not isinstance(self.prompt[0], str):
            _refuse("suffix", "needs a prompt that is a text")
        return self

    @property
    def kept(self) -> int:
        """How many answers to each prompt the client gets."""
        return self.n or 1

    @property
    def only_prompt(self) -> bool:
        return self.echo and self.max_tokens == 0


# -------------------------------------------------------------------------------------------------------------- chat


class Message(Strict):
    """One message of a conversation, its text parts joined."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[str, WithJsonSchema(_CONTENT)] | None = None
    name: str | None = None
    tool_calls: list[Annotated[dict[str, Any], WithJsonSchema(_CALL)]] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None  # the same under its other name

    @model_validator(mode="before")
    @classmethod
    def _drop_answers_own_fields(cls, raw: Any) -> Any:
        """Clients send the assistant's message back as they got it, with fields that say nothing new."""
        return {k: v for k, v in raw.items() if k not in _ANSWERED} if isinstance(raw, dict) else raw

    @classmethod
    def __get_pydantic_json_schema__(cls, core: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        shown = super().__get_pydantic_json_schema__(core, handler)
        schema = handler.resolve_ref_schema(shown)
        schema["properties"] |= {name: {"description": "accepted and ignored"} for name in _ANSWERED}
        calls = {"role": {"const": "assistant"}, "tool_calls": {"type": "array", "minItems": 1}}
        schema["anyOf"] = [{"required": ["content"], "properties": {"content": _CONTENT}}, {"required": ["tool_calls"], "properties": calls}]
        return shown

    @field_validator("content", mode="before")
    @classmethod
    def _join_parts(cls, value: Any) -> Any:
        if not isinstance(value, list):
            return value
        texts = []
        for i, part in enumerate(value):
            kind = part.get("type") if isinstance(part, dict) else None
            if kind != "text":
                raise ValueError(f"part {i} has type {kind!r}; only parts of type 'text' are supported")
            if not isinstance(part.get("text"), str):
                raise ValueError(f"part {i} needs 'text', a string")
            texts.append(part["text"])
        return "".join(texts)

    @field_validator("tool_calls")
    @classmethod
    def _named_calls(cls, value: list[dict[str, Any]] | None) -> list[dict[str, Any]] | None:
        for i, call in enumerate(value or ()):
            function = call.get("function")
            if not isinstance(function, dict) or not isinstance(function.get("name"), str):
                raise ValueError(f"call {i} must be {{'id': ..., 'type': 'function', 'function': {{'name': ..., 'arguments': ...}}}}")
            function.pop("parsed_arguments", None)  # what openai-python made of them
        return value

    @model_validator(mode="after")
    def _has_content(self) -> Message:
        if self.content is None and not (self.role == "assistant" and self.tool_calls):
            raise ValueError("content is missing")
        return self

    def for_template(self) -> dict[str, Any]:
        """As plain data. Templates know no developer role: it is OpenAI's new word for system."""
        values = {"content": None, **self.model_dump(exclude_none=True)}
        reasoning = values.pop("reasoning", None)
        if reasoning is not None:
            values.setdefault("reasoning_content", reasoning)
        return {**values, "role": "system"} if self.role == "developer" else values


def _functions_only(tools: list[dict[str, Any]]) -> list[dict[str, Any]]:
    for i, tool in enumerate(tools):
        function = tool.get("function")
        if tool.get("type") != "function" or not isinstance(function, dict) or not isinstance(function.get("name"), str):
            what = f"tool {i} must be {{'type': 'function', 'function': {{'name': ...}}}}"
            raise ValueError(what + ("; custom tools are possible in /v1/responses" if tool.get("type") == "custom" else ""))
    return tools


def _nothing_of_ours(variables: dict[str, Any]) -> dict[str, Any]:
    for name in ("self", "messages", "tools", "add_generation_prompt", "continue_final_message"):
        if name in variables:
            raise ValueError(f"'{name}' is not the template's own variable")
    return variables


Tools = Annotated[list[Annotated[dict[str, Any], WithJsonSchema(_TOOL)]], AfterValidator(_functions_only)]
RequestTemplate = Annotated[str, Field(min_length=1, max_length=MOST_TEMPLATE)]
TemplateVariables = Annotated[dict[str, Any], AfterValidator(_nothing_of_ours)]


class ChatRequest(Sampling):
    """/v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    tools: Tools | None = None
    tool_choice: Annotated[Any, WithJsonSchema(tools_grammar.CHOICE_SCHEMA)] = None
    parallel_tool_calls: bool = True  # false: only the first call of an answer is reported
    modalities: list[str] | None = None
    include_reasoning: bool = True
    reasoning_effort: Effort | None = None
    thinking_token_budget: int | None = Field(None, ge=-1, lt=2**31, description="the most tokens of reasoning; -1: as many as the model likes")
    add_generation_prompt: bool = True
    continue_final_message: bool = False  # the answer goes on where the last message ends
    echo: bool = False  # the answer begins with the last message, if that is the assistant's
    documents: list[dict[str, Any]] | None = None  # for templates that know what to do with them
    chat_template: RequestTemplate | None = None
    chat_template_kwargs: TemplateVariables | None = None

    @model_validator(mode="after")
    def _only_what_we_can(self) -> ChatRequest:
        try:
            self.tool_choice, self.tools = tools_grammar.only_allowed(self.tool_choice, self.tools)
            tools_grammar.check_choice(self.tool_choice, self.tools)
        except ValueError as e:
            raise ApiError.from_value_error(e) from None
        if self.modalities not in (None, ["text"]):
            _refuse("modalities", "only ['text'] is supported")
        if self.top_logprobs is not None and not self.logprobs:
            _refuse("top_logprobs", "needs logprobs to be true")
        if self.continue_final_message and self.add_generation_prompt and "add_generation_prompt" in self.model_fields_set:
            _refuse("continue_final_message", "the last message cannot go on and another begin; leave out add_generation_prompt, or this")
        return self

    @property
    def echoed(self) -> str:
        """What the answer's content begins with."""
        last = self.messages[-1]
        return last.content or "" if self.echo and last.role == "assistant" else ""

    @property
    def template_variables(self) -> dict[str, Any]:
        """What the chat template gets beside the messages. Templates that let reasoning be switched off call that `enable_thinking`."""
        effort = self.reasoning_effort
        variables: dict[str, Any] = {} if effort is None else {"enable_thinking": False} if effort == "none" else {"reasoning_effort": effort}
        documents = {"documents": self.documents} if self.documents is not None else {}
        return variables | documents | (self.chat_template_kwargs or {})

    @property
    def offered_tools(self) -> list[dict[str, Any]] | None:
        """The tools the model gets to see; None if there are none or the client forbids their use."""
        return (self.tools or None) if self.tool_choice != "none" else None

    def params(self, defaults: dict[str, Any]) -> SamplingParams:
        """Without a limit, a chat answer may fill the context."""
        limit = self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens
        more: dict[str, Any] = {"max_tokens": limit, "logprobs": (self.top_logprobs or 0) if self.logprobs else None}
        if self.offered_tools and self.skip_special_tokens is None:
            more["skip_special_tokens"] = False  # in many vocabularies the tags around a tool call are special tokens
        return self.sampling_params(defaults, **more)


# ----------------------------------------------------------------------------------------------------------- parsing

R = TypeVar("R", bound=Strict)


def parse(kind: type[R], body: bytes) -> R:
    """A request from its body. ApiError 400, naming the field, for whatever is not one."""
    try:
        raw = from_json(body)
    except ValueError as e:
        raise ApiError(400, f"the body is not valid JSON: {e}") from None
    if not isinstance(raw, dict):
        raise ApiError(400, "the body must be a JSON object")
    return checked(kind, raw)


def checked(kind: type[R], raw: dict[str, Any]) -> R:
    """`parse` of what is decoded already."""
    try:
        return kind.model_validate(raw)
    except ValidationError as e:
        first = e.errors(include_url=False, include_context=False, include_input=False)[0]
        field = ".".join(str(part) for part in first["loc"])
        text = {"extra_forbidden": "unknown field", "missing": "required field is missing"}.get(first["type"], first["msg"])
        message = text.removeprefix("Value error, ").removeprefix("Input ")
        raise ApiError(400, f"{field}: {message}", param=field or None) from None

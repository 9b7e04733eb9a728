"""What a client asks of an output's structure, in all the spellings that clients have for it, as StructuredOutputsParams.

Owns the fields' meaning: OpenAI's `response_format`, vLLM's `structured_outputs` and older `guided_*`, SGLang's `regex` and `ebnf`, llama.cpp's
`grammar` and `json_schema`. Errors are ValueError("field: what is wrong").
Tools are tools_grammar.py's.
"""

from __future__ import annotations

from typing import Any

import msgspec

from miniinfer.data import STRUCTURED, StructuredOutputsParams

GUIDED = {"guided_json": "json", "guided_regex": "regex", "guided_choice": "choice", "guided_grammar": "grammar"}
GUIDED |= {"regex": "regex", "ebnf": "grammar", "grammar": "grammar", "json_schema": "json"}
FIELDS = ("response_format", "structured_outputs", "allowed_token_ids", *GUIDED)

_OBJECT: dict[str, Any] = {"type": "object"}
_TEXT: dict[str, Any] = {"type": "string", "minLength": 1}
_CHOICE: dict[str, Any] = {"type": "array", "items": _TEXT, "minItems": 1}
_JSON_SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "description": {"type": "string"}, "schema": _OBJECT, "strict": {"type": "boolean"}},
    "additionalProperties": False,
}
# What /openapi.json shows of each field.
SCHEMAS: dict[str, dict[str, Any]] = {
    "response_format": {
        "anyOf": [
            {"type": "object", "properties": {"type": {"const": "text"}}, "required": ["type"], "additionalProperties": False},
            {
                "type": "object",
                "properties": {"type": {"const": "json_object"}, "schema": _OBJECT},
                "required": ["type"],
                "additionalProperties": False,
            },
            {
                "type": "object",
                "properties": {"type": {"const": "json_schema"}, "json_schema": _JSON_SCHEMA},
                "required": ["type", "json_schema"],
                "additionalProperties": False,
            },
            {"type": "object", "properties": {"type": {"const": "structural_tag"}}, "required": ["type"]},
        ]
    },
    "structured_outputs": {
        "type": "object",
        "properties": {
            "json": {"anyOf": [_OBJECT, {"type": "boolean"}, _TEXT]},
            "json_object": {"type": "boolean"},
            "regex": _TEXT,
            "choice": _CHOICE,
            "grammar": _TEXT,
            "structural_tag": {"anyOf": [_OBJECT, _TEXT]},
            "disable_any_whitespace": {"type": "boolean"},
        },
        "additionalProperties": False,
    },
    "guided_json": {"anyOf": [_OBJECT, _TEXT]},
    "guided_regex": _TEXT,
    "guided_choice": _CHOICE,
    "guided_grammar": _TEXT,
}


def structured(fields: dict[str, Any]) -> StructuredOutputsParams | None:
    """What the FIELDS of a request ask for, those that are not None; None if nothing."""
    found: list[StructuredOutputsParams] = []
    for field in FIELDS:
        value = fields.get(field)
        if value is None:
            continue
        if field == "response_format":
            made = _response_format(value)
        elif field == "structured_outputs":
            made = params(field, **_known(field, value, [*STRUCTURED, "disable_any_whitespace"]))
        elif field == "allowed_token_ids":
            made = params(field, grammar=_only(field, value))
        else:
            made = params(field, **{GUIDED[field]: value})
        if made is not None:
            found.append(made)
    if len(found) > 1:
        raise ValueError(f"{found[1].field}: an output has one structure, but {found[0].field} asks for one too")
    return found[0] if found else None


def params(field: str, **given: Any) -> StructuredOutputsParams:
    """StructuredOutputsParams that name `field` in errors, its types checked."""
    try:
        return msgspec.convert({**given, "field": field}, StructuredOutputsParams)
    except msgspec.ValidationError as e:
        text, _, path = str(e).partition(" - at `$")
        text = text.removeprefix(f"{field}: ")
        raise ValueError(f"{field}: {path.strip('.`') + ': ' if path else ''}{text}") from None


def _response_format(value: Any) -> StructuredOutputsParams | None:
    field = "response_format"
    kind = value.get("type") if isinstance(value, dict) else None
    if kind == "text":
        _known(field, value, ["type"])
        return None
    if kind == "json_object":  # with a schema as llama.cpp takes it
        schema = _known(field, value, ["type", "schema"]).get("schema")
        return params(field, json_object=True) if schema is None else params(field, json=_object(f"{field}: schema", schema))
    if kind == "json_schema":
        given = _object(f"{field}: json_schema", _known(field, value, ["type", "json_schema"]).get("json_schema"))
        given = _known(f"{field}: json_schema", given, ["name", "description", "schema", "strict"])
        for name, type_ in (("name", str), ("description", str), ("strict", bool)):
            if given.get(name) is not None and not isinstance(given[name], type_):
                raise ValueError(f"{field}: json_schema: {name} must be of type {type_.__name__}")
        schema = given.get("schema")
        return params(field, json_object=True) if schema is None else params(field, json=_object(f"{field}: schema", schema))
    if kind == "structural_tag":
        return params(field, structural_tag={k: v for k, v in value.items() if k != "type"})
    raise ValueError(f"{field}: must be an object of type 'text', 'json_object', 'json_schema' or 'structural_tag', got {kind or value!r}")


def _only(field: str, ids: list[int]) -> str:
    """A grammar of these tokens alone."""
    if not ids:
        raise ValueError(f"{field}: must not be empty")
    return f"start: <[{','.join(map(str, sorted(set(ids))))}]>+"


def _object(what: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{what}: must be an object, got {type(value).__name__}")
    return value


def _known(field: str, value: Any, names: list[str]) -> dict[str, Any]:
    """An object with no other names than these; null stands for absent."""
    for name in _object(field, value) if isinstance(value, dict) else ():
        if name not in names:
            raise ValueError(f"{field}: unknown field {name!r}")
    return {k: v for k, v in _object(field, value).items() if v is not None}

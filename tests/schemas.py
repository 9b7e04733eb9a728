"""JSON schemas for tests of structured output: hand-written ones as users have them, and any number of generated ones."""

from __future__ import annotations

import random
from typing import Any

Schema = dict[str, Any]

WRITTEN: list[Schema] = [
    {"type": "object"},
    {"type": "object", "properties": {}, "additionalProperties": False},
    {"type": "array", "items": {"type": "integer", "minimum": -5, "maximum": 5}, "minItems": 2, "maxItems": 4},
    {"type": "array", "prefixItems": [{"type": "string", "maxLength": 4}, {"type": "boolean"}], "items": False, "minItems": 2},
    {"enum": ["red", 3, None, True, "grün", "a\"b\\c"]},
    {"const": {"a": [1, 2, {"b": None}]}},
    {"type": ["integer", "null"]},
    {"type": "string", "minLength": 3, "maxLength": 5},
    {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{3}$"},
    {"type": "string", "pattern": "^(ab|cd)+x?$", "maxLength": 9},
    {"type": "string", "format": "date"},
    {"type": "string", "format": "date-time"},
    {"type": "string", "format": "ipv4"},
    {"type": "string", "format": "uuid"},
    {"type": "number", "minimum": 0.5, "exclusiveMaximum": 2},
    {"type": "integer", "multipleOf": 7, "minimum": 0, "maximum": 100},
    {"anyOf": [{"type": "integer"}, {"type": "object", "properties": {"x": {"type": "null"}}, "required": ["x"], "additionalProperties": False}]},
    {"oneOf": [
        {"type": "object", "properties": {"kind": {"const": "a"}, "n": {"enum": [1]}}, "required": ["kind", "n"], "additionalProperties": False},
        {"type": "object", "properties": {"kind": {"const": "b"}, "s": {"enum": ["x"]}}, "required": ["kind"], "additionalProperties": False},
    ]},
    {"allOf": [{"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}, {"properties": {"b": {"type": "boolean"}}}],
     "description": "both"},
    {"type": "object", "patternProperties": {"^x_[a-z]{1,3}$": {"type": "integer"}}, "additionalProperties": False},
    {"type": "object", "additionalProperties": {"type": "boolean"}},
    {"$defs": {"node": {"type": "object", "properties": {"v": {"enum": [1, 2]}, "next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]}},
                        "required": ["v", "next"], "additionalProperties": False}}, "$ref": "#/$defs/node"},
    {"type": "object", "properties": {"name": {"type": "string", "maxLength": 12}, "age": {"type": "integer", "minimum": 0, "maximum": 130},
                                      "tags": {"type": "array", "items": {"enum": ["a", "b", "c"]}, "maxItems": 3}},
     "required": ["name", "age"], "additionalProperties": False, "title": "Person", "description": "pydantic writes such"},
]  # fmt: skip


def generated(seed: int) -> Schema:
    """A schema of bounded outputs, of the keywords that clients' libraries write."""
    return _schema(random.Random(seed), 3)


def _schema(rng: random.Random, depth: int) -> Schema:
    leaf = [_integer, _number, _string, _enum, _simple]
    return rng.choice(leaf if not depth else [*leaf, _object, _object, _object, _array, _any])(rng, depth)


def _integer(rng: random.Random, depth: int) -> Schema:
    low = rng.randrange(-2000, 2000)
    bounds = {"minimum": low, rng.choice(["maximum", "exclusiveMaximum"]): low + rng.randrange(2, 5000)}
    return {"type": "integer", **bounds, **({"multipleOf": 1} if rng.random() < 0.1 else {})}


def _number(rng: random.Random, depth: int) -> Schema:
    low = rng.randrange(-50, 50) / 4
    return {"type": "number", rng.choice(["minimum", "exclusiveMinimum"]): low, "maximum": low + rng.randrange(1, 40) / 8}


def _string(rng: random.Random, depth: int) -> Schema:
    if rng.random() < 0.3:
        return {"type": "string", "pattern": rng.choice(["^[a-z]{1,6}$", "^\\d{3}-\\d{4}$", "^(yes|no|maybe)$", "^#[0-9a-f]{6}$"])}
    if rng.random() < 0.2:
        return {"type": "string", "format": rng.choice(["date", "ipv4", "uuid"])}
    low = rng.randrange(4)
    return {"type": "string", "minLength": low, "maxLength": low + rng.randrange(12)}


def _enum(rng: random.Random, depth: int) -> Schema:
    return {
        "enum": rng.sample(["a", "bb", "", "zwölf", 'quo"te', "back\\slash", "line\nend", 1, 2.5, -3, True, None, [1], {"k": 0}], rng.randrange(1, 6))
    }


def _simple(rng: random.Random, depth: int) -> Schema:
    return rng.choice([{"type": "boolean"}, {"type": "null"}, {"const": "fixed"}, {"type": ["boolean", "null"]}])


def _object(rng: random.Random, depth: int) -> Schema:
    names = rng.sample(["id", "name", "first name", "größe", "x-y", "a.b", "$ref_", "value", "items", "type"], rng.randrange(5))
    made: Schema = {"type": "object", "properties": {n: _schema(rng, depth - 1) for n in names}, "additionalProperties": False}
    made["required"] = [n for n in names if rng.random() < 0.7]
    return made


def _array(rng: random.Random, depth: int) -> Schema:
    low = rng.randrange(3)
    return {"type": "array", "items": _schema(rng, depth - 1), "minItems": low, "maxItems": low + rng.randrange(3)}


def _any(rng: random.Random, depth: int) -> Schema:
    return {"anyOf": [_schema(rng, depth - 1) for _ in range(rng.randrange(1, 4))]}

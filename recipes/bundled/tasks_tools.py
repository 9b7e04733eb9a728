"""Generators of tool use: the system prompt describes functions, the model calls the right one or answers without.

Owns the tools, with many names for each so that the model reads the description instead of remembering names. Every generator takes a Voice
and returns a Sample whose `tools` are in OpenAI's form.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sample import Check, Generator, Message, Sample, Voice
from tables import CITIES, COUNTRIES, NAMES, WORDS
from tasks_chat import capital, small_talk


@dataclass(frozen=True)
class Kind:
    """A kind of tool: possible names, descriptions and argument names, how users ask for it, and how its result reads."""

    names: tuple[str, ...]
    descriptions: tuple[str, ...]
    arguments: tuple[tuple[str, str, tuple[str, ...]], ...]  # (slot, JSON type, names)
    asks: tuple[str, ...]
    values: Callable[[Voice], dict[str, Any]]
    result: Callable[[Voice, dict[str, Any]], tuple[Any, str]]  # (what the tool returns, the answer in words)


def _weather(v: Voice, s: dict[str, Any]) -> tuple[Any, str]:
    t, sky = v.int(-5, 35), v.pick(("sunny", "cloudy", "rainy", "snowy", "windy", "clear"))
    return {v.pick(("temperature", "temp")): t, v.pick(("condition", "sky", "weather")): sky}, f"In {s['city']} it is {sky} and {t} degrees."


def _time(v: Voice, s: dict[str, Any]) -> tuple[Any, str]:
    t = f"{v.int(0, 23):02d}:{v.int(0, 59):02d}"
    return {"time": t}, f"It is {t} in {s['city']}."


def _number(noun: str) -> Callable[[Voice, dict[str, Any]], tuple[Any, str]]:
    def make(v: Voice, s: dict[str, Any]) -> tuple[Any, str]:
        n = v.int(1, 999)
        return {v.pick(("result", "value", noun)): n}, f"The {noun} is {n}."

    return make


def _done(v: Voice, s: dict[str, Any]) -> tuple[Any, str]:
    return v.pick(({"status": "ok"}, {"ok": True}, {"success": True}, {"result": "done"})), "Done."


KINDS: tuple[Kind, ...] = (
    Kind(
        ("get_weather", "weather", "get_current_weather", "fetch_weather", "weather_now", "current_weather"),
        ("Get the current weather for a city", "The weather of a place", "Weather now", "Look up the weather"),
        (("city", "string", ("city", "location", "place")),),
        (
            "What is the weather [like |]in {city}[ today| now|]?",
            "How is the weather in {city}?",
            "What's the weather in {city}?",
            "Is it [cold|warm|raining|sunny] in {city}?",
            "!tell me the weather in {city}",
            "weather in {city}",
            "!check the weather in {city}",
            "How warm is it in {city}?",
        ),
        lambda v: {"city": v.pick(CITIES)},
        _weather,
    ),
    Kind(
        ("get_time", "current_time", "get_current_time", "time_in", "clock"),
        ("Get the current time in a city", "The time at a place", "Look up the local time"),
        (("city", "string", ("city", "location", "place")),),
        ("What time is it in {city}?", "!tell me the time in {city}", "What is the time in {city}[ now|]?", "time in {city}?"),
        lambda v: {"city": v.pick(CITIES)},
        _time,
    ),
    Kind(
        ("add", "add_numbers", "sum_numbers", "plus"),
        ("Add two numbers", "The sum of two numbers"),
        (("a", "integer", ("a", "x", "first")), ("b", "integer", ("b", "y", "second"))),
        ("What is {a} [+|plus] {b}?", "!add {a} and {b}", "!compute {a} + {b}", "{a} + {b}"),
        lambda v: {"a": v.int(1, 9999), "b": v.int(1, 9999)},
        lambda v, s: ({"result": s["a"] + s["b"]}, f"{s['a']} + {s['b']} = {s['a'] + s['b']}"),
    ),
    Kind(
        ("multiply", "multiply_numbers", "product", "times"),
        ("Multiply two numbers", "The product of two numbers"),
        (("a", "integer", ("a", "x", "first")), ("b", "integer", ("b", "y", "second"))),
        ("What is {a} [*|times] {b}?", "!multiply {a} and {b}", "!multiply {a} by {b}", "{a} * {b}"),
        lambda v: {"a": v.int(2, 999), "b": v.int(2, 999)},
        lambda v, s: ({"result": s["a"] * s["b"]}, f"{s['a']} * {s['b']} = {s['a'] * s['b']}"),
    ),
    Kind(
        ("calculate", "calculator", "evaluate", "compute"),
        ("Evaluate an arithmetic expression", "A calculator"),
        (("e", "string", ("expression", "formula", "input")),),
        ("What is {e}?", "!calculate {e}", "!compute {e}", "{e}", "!evaluate {e}"),
        lambda v: {"e": f"{v.int(1, 999)} {v.pick('+-*/')} {v.int(1, 999)}"},
        _number("result"),
    ),
    Kind(
        ("search", "web_search", "search_web", "lookup", "find"),
        ("Search the web", "Look something up", "Find information about a topic"),
        (("q", "string", ("query", "q", "text", "topic")),),
        ("!search [the web |]for {q}", "!look up {q}", "!find information about {q}", "!google {q}"),
        lambda v: {"q": " ".join(v.some(WORDS, v.int(1, 3)))},
        _number("number of results"),
    ),
    Kind(
        ("send_email", "email", "mail", "send_mail"),
        ("Send an email", "Send a message by mail"),
        (("who", "string", ("to", "recipient", "address")), ("s", "string", ("subject", "title", "text"))),
        ("!send an email to {who} with [the |]subject {s}", "!email {who} about {s}", "!write an email to {who} about {s}", "!mail {who} about {s}"),
        lambda v: {"who": v.pick(NAMES).lower() + "@example.com", "s": " ".join(v.some(WORDS, v.int(1, 2)))},
        _done,
    ),
    Kind(
        ("send_message", "message", "text_contact", "send_sms"),
        ("Send a text message to a contact", "Write to a person"),
        (("who", "string", ("to", "contact", "name", "person")), ("m", "string", ("message", "text", "body"))),
        ("!send {who} the message: {m}", "!text {who}: {m}", "!tell {who}: {m}", "!message {who}: {m}"),
        lambda v: {"who": v.pick(NAMES), "m": " ".join(v.some(WORDS, v.int(2, 3)))},
        _done,
    ),
    Kind(
        ("set_timer", "timer", "start_timer", "countdown"),
        ("Set a timer", "Start a countdown"),
        (("n", "integer", ("minutes", "duration", "duration_minutes")),),
        ("!set a timer for {n} minutes", "!start a timer of {n} minutes", "!set a {n} minute timer", "!wake me in {n} minutes", "timer {n} minutes"),
        lambda v: {"n": v.int(2, 90)},
        _done,
    ),
    Kind(
        ("set_alarm", "alarm", "create_alarm"),
        ("Set an alarm", "Wake the user at a time"),
        (("t", "string", ("time", "at", "when")),),
        ("!set an alarm for {t}", "!wake me [up |]at {t}", "!set the alarm to {t}", "alarm at {t}"),
        lambda v: {"t": f"{v.int(5, 22):02d}:{v.pick((0, 15, 30, 45)):02d}"},
        _done,
    ),
    Kind(
        ("translate", "translate_text", "translator"),
        ("Translate text into a language", "Translate words"),
        (("x", "string", ("text", "words", "input")), ("l", "string", ("language", "target", "to"))),
        ("!translate {x} [into|to] {l}", "What is {x} in {l}?", "How do you say {x} in {l}?"),
        lambda v: {"x": " ".join(v.some(WORDS, v.int(1, 2))), "l": v.pick("French German Spanish Italian Polish Dutch Swedish Greek".split())},
        lambda v, s: ({"translation": (w := v.word() + v.pick(("a", "o", "en", "is")))}, f'In {s["l"]}, "{s["x"]}" is "{w}".'),
    ),
    Kind(
        ("convert_currency", "exchange", "currency", "convert_money"),
        ("Convert an amount between currencies", "Exchange money"),
        (
            ("n", "integer", ("amount", "value", "sum")),
            ("f", "string", ("from", "source", "from_currency")),
            ("t", "string", ("to", "target", "to_currency")),
        ),
        ("!convert {n} {f} to {t}", "How much is {n} {f} in {t}?", "What is {n} {f} in {t}?", "!exchange {n} {f} for {t}"),
        lambda v: dict(zip(("f", "t"), v.some("USD EUR GBP JPY CHF CAD SEK".split(), 2), strict=True)) | {"n": v.int(1, 999)},
        lambda v, s: ({"result": (n := v.int(1, 9999))}, f"{s['n']} {s['f']} is {n} {s['t']}."),
    ),
    Kind(
        ("get_stock_price", "stock_price", "stock", "quote"),
        ("Get the price of a stock", "Stock prices"),
        (("c", "string", ("symbol", "company", "ticker")),),
        ("What is the [stock |]price of {c}?", "!get the stock price of {c}", "How much is {c} stock?", "stock price of {c}"),
        lambda v: {"c": v.pick("AAPL GOOG MSFT TSLA AMZN NVDA INTC IBM SONY ORCL".split())},
        _number("price"),
    ),
    Kind(
        ("play_music", "play", "play_song", "music"),
        ("Play a song", "Play music"),
        (("s", "string", ("song", "title", "name")),),
        ("!play {s}", "!play the song {s}", "I want to hear {s}.", "!put on {s}"),
        lambda v: {"s": " ".join(v.some(WORDS, v.int(1, 3)))},
        _done,
    ),
    Kind(
        ("turn_on_light", "light_on", "lights_on", "switch_on_light"),
        ("Turn on the light in a room", "Switch a lamp on"),
        (("r", "string", ("room", "location", "where")),),
        ("!turn on the light in the {r}", "!switch on the {r} light", "!turn the {r} lights on", "Light in the {r}, please."),
        lambda v: {"r": v.pick("kitchen bedroom bathroom garage hall office garden cellar".split())},
        _done,
    ),
    Kind(
        ("create_note", "add_note", "save_note", "note"),
        ("Save a note", "Write a note down"),
        (("x", "string", ("text", "content", "note")),),
        ("!make a note: {x}", "!note that {x}", "!save a note: {x}", "!write down: {x}", "!remember: {x}"),
        lambda v: {"x": " ".join(v.some(WORDS, v.int(2, 4)))},
        _done,
    ),
    Kind(
        ("get_user", "find_user", "user_info", "lookup_user"),
        ("Get a user by id", "Look up a user"),
        (("n", "integer", ("id", "user_id", "number")),),
        ("!get user {n}", "!look up user {n}", "!show me user {n}", "Who is user {n}?", "!find the user with id {n}"),
        lambda v: {"n": v.int(1, 9999)},
        lambda v, s: ({"name": (n := v.pick(NAMES))}, f"User {s['n']} is {n}."),
    ),
    Kind(
        ("population", "get_population", "count_people"),
        ("Get the population of a country", "How many people live in a country"),
        (("c", "string", ("country", "name")),),
        ("What is the population of {c}?", "How many people live in {c}?", "!tell me the population of {c}"),
        lambda v: {"c": v.pick(list(COUNTRIES))},
        _number("population"),
    ),
    Kind(
        ("book_flight", "find_flight", "search_flights", "flights"),
        ("Find a flight between two cities", "Book a flight"),
        (("f", "string", ("from", "origin", "from_city")), ("t", "string", ("to", "destination", "to_city"))),
        ("!book a flight from {f} to {t}", "!find [me |]a flight from {f} to {t}", "I want to fly from {f} to {t}.", "Flights from {f} to {t}?"),
        lambda v: dict(zip(("f", "t"), v.some(CITIES, 2), strict=True)),
        lambda v, s: ({"flight": (n := f"{v.pick('ABKLX')}{v.pick('ABFLR')}{v.int(100, 999)}")}, f"I found flight {n} from {s['f']} to {s['t']}."),
    ),
    Kind(
        ("roll_dice", "dice", "roll_die"),
        ("Roll a die", "Throw dice"),
        (("n", "integer", ("sides", "faces", "n")),),
        ("!roll a die with {n} sides", "!roll a {n}-sided die", "!throw a {n} sided dice"),
        lambda v: {"n": v.pick((4, 6, 8, 10, 12, 20))},
        lambda v, s: ({"roll": (n := v.int(1, s["n"]))}, f"You rolled a {n}."),
    ),
)

_VERBS = "get set find open close start stop update delete check list read load save show move".split()
_NOUNS = "order file ticket window door report invoice account folder record task server table item page device sensor channel project".split()


@dataclass(frozen=True)
class Use:
    """One tool as described to the model, with a question for it."""

    schema: dict[str, Any]
    ask: str
    call: dict[str, Any]
    result: Any
    answer: str


def _schema(name: str, description: str, properties: dict[str, Any], plain: bool) -> dict[str, Any]:
    parameters = {"type": "object", "properties": properties}
    if not plain:
        parameters["required"] = list(properties)
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


def _use(v: Voice) -> Use:
    if v.chance(0.25):
        return _made_up(v)
    kind = v.pick(KINDS)
    values = kind.values(v)
    names = {slot: v.pick(options) for slot, _, options in kind.arguments}
    properties: dict[str, Any] = {}
    for slot, type_, _ in kind.arguments:
        properties[names[slot]] = {"type": type_}
        if v.chance(0.25):
            properties[names[slot]]["description"] = v.pick(("The {}", "the {} to use", "{}")).format(names[slot].replace("_", " "))
    name = v.pick(kind.names)
    result, answer = kind.result(v, values)
    call = {"name": name, "arguments": {names[slot]: values[slot] for slot, _, _ in kind.arguments}}
    return Use(_schema(name, v.pick(kind.descriptions), properties, v.chance(0.25)), v.ask(kind.asks, **values), call, result, answer)


def _made_up(v: Voice) -> Use:
    """A tool that never was: a verb and a noun, with an id or a name."""
    verb, noun = v.pick(_VERBS), v.pick(_NOUNS)
    name = v.pick((f"{verb}_{noun}", f"{verb}{noun.capitalize()}", f"{noun}_{verb}"))
    if v.chance(0.5):
        argument, type_, value = v.pick(("id", f"{noun}_id", "number")), "integer", v.int(1, 999)
    else:
        argument, type_, value = v.pick(("name", f"{noun}_name", "title")), "string", v.word()
    ask = v.ask(
        (f"!{verb} [the |]{noun} {{x}}", f"!{verb} {noun} {{x}}", f"!{verb} the {noun} {v.pick(('with', 'called', 'number'))} {{x}}"), x=value
    )
    result, answer = _done(v, {})
    return Use(
        _schema(name, f"{verb.capitalize()} {v.pick(('a', 'the', 'one'))} {noun}", {argument: {"type": type_}}, v.chance(0.25)),
        ask,
        {"name": name, "arguments": {argument: value}},
        result,
        answer,
    )


def _described(v: Voice, wanted: Use | None) -> list[dict[str, Any]]:
    """The wanted tool among up to three others of different names."""
    schemas = [wanted.schema] if wanted else []
    names = {s["function"]["name"] for s in schemas}
    taken = {k.names for k in KINDS if wanted and wanted.call["name"] in k.names}
    for _ in range(v.pick((0, 0, 1, 1, 2, 3)) + (0 if wanted else 1)):
        other = _use(v)
        name = other.call["name"]
        if name not in names and not any(name in group for group in taken):
            schemas.append(other.schema)
            names.add(name)
    v.random.shuffle(schemas)
    return schemas


def _called(use: Use) -> Message:
    return {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": use.call}]}


def tool_call(v: Voice) -> Sample:
    use = _use(v)
    messages = [{"role": "user", "content": use.ask}, _called(use)]
    return Sample("tool_call", messages, Check("tool", (json.dumps(use.call),)), json.dumps(use.call), tools=_described(v, use))


def tool_answer(v: Voice) -> Sample:
    use = _use(v)
    content = use.result if v.chance(0.1) and isinstance(use.result, str) else json.dumps(use.result)
    messages = [
        {"role": "user", "content": use.ask},
        _called(use),
        {"role": "tool", "content": content},
        {"role": "assistant", "content": use.answer},
    ]
    return Sample("tool_answer", messages, Check("exact", (use.answer,)), json.dumps([use.call, use.result]), tools=_described(v, use))


def tool_not_needed(v: Voice) -> Sample:
    """Tools are there, but the question needs none of them."""
    sample = small_talk(v) if v.chance(0.6) else capital(v)
    sample.task, sample.key = "tool_not_needed", ""
    sample.tools = _described(v, None)
    return sample


TASKS: dict[Generator, float] = {tool_call: 4.0, tool_answer: 1.5, tool_not_needed: 0.6}

"""Generators about words and structured text: spelling, reversing, letters, sorting, repeating, JSON.

Owns the wordings and the right answers of these tasks. Every generator takes a Voice and returns a Sample.
"""

from __future__ import annotations

import json

from sample import Check, Generator, Sample, Voice, joined
from tables import CATEGORIES, CITIES, COLORS, NAMES, ORDINALS, PAST, PLURALS, WORDS, in_words


def _spelled(word: str) -> str:
    return "-".join(word)


def reverse(v: Voice) -> Sample:
    w = v.word()
    ask = v.ask(
        (
            "!reverse [the word|the string|the letters of|] {q}",
            "!reverse {q}",
            "!reverse the string {q}",
            "!spell {q} backwards",
            "!write {q} backwards",
            "What is {q} [backwards|reversed|spelled backwards|in reverse]?",
            "How do you spell {q} backwards?",
            "!reverse this word: {q}",
            "!reverse the letters in {q}",
            "!write the word {q} in reverse",
            "!reverse the following word: {q}",
        ),
        q=v.quoted(w),
    )
    return v.reply("reverse", ask.replace("  ", " "), ("{s} backwards is {r}: {b}",), w, s=_spelled(w), r=_spelled(w[::-1]), b=w[::-1])


def spell(v: Voice) -> Sample:
    w = v.word()
    ask = v.ask(
        (
            "How do you spell {q}?",
            "!spell {q}",
            "!spell the word {q}",
            "!spell out {q}",
            "!list the letters of {q}",
            "What are the letters in {q}?",
            "!spell {q} letter by letter",
        ),
        q=v.quoted(w),
    )
    return v.reply("spell", ask, ("{s}",), w, s=_spelled(w))


def length(v: Voice) -> Sample:
    w = v.word()
    ask = v.ask(
        (
            "How many letters [are in|are there in|are in the word|are there in the word] {q}?",
            "How many letters does {q} have?",
            "How long is the word {q}?",
            "!count the letters in [the word |]{q}",
            "What is the length of [the word |the string |]{q}?",
            "How many characters are in {q}?",
        ),
        q=v.quoted(w),
    )
    numbered = " ".join(f"{c}{i}" for i, c in enumerate(w, 1))
    return v.reply("length", ask, ("{s}: {n} letters.",), w, s=numbered, n=len(w))


def count_letter(v: Voice) -> Sample:
    w = v.word()
    c = v.pick(w) if v.chance(0.8) else v.pick("abcdefghijklmnopqrstuvwxyz")
    n = w.count(c)
    ask = v.ask(
        (
            "How many {c}[s|'s| letters|'s] are [there |]in [the word |]{q}?",
            "How many times does [the letter |]{c} [appear|occur] in [the word |]{q}?",
            "!count the [letter |number of |]{c}[s|'s|] in {q}",
            'How many "{c}" are in {q}?',
            "!count how often {c} is in {q}",
        ),
        c=c,
        q=v.quoted(w),
    )
    marked, seen = [], 0
    for ch in w:
        seen += ch == c
        marked.append(f"{ch}{seen}" if ch == c else ch)
    times = "once" if n == 1 else "twice" if n == 2 else f"{n} times"
    reply = f"{' '.join(marked)}: the letter {c} appears {times}." if n else f"{' '.join(marked)}: the letter {c} does not appear."
    return v.reply("count_letter", ask, (reply,), f"{w} {c}")


def letter_at(v: Voice) -> Sample:
    w = v.word()
    i = v.pick((0, 0, len(w) - 1, len(w) - 1, 1, 2, 3))
    i = min(i, len(w) - 1)
    name = "last" if i == len(w) - 1 else ORDINALS[i]
    ask = v.ask(
        (
            f"What is the {name} letter [of|in] [the word |]{{q}}?",
            f"What's the {name} letter [of|in] {{q}}?",
            f"!tell me the {name} letter of {{q}}",
            f"!give me the {name} letter of the word {{q}}",
            f"Which letter is {name} in {{q}}?",
        ),
        q=v.quoted(w),
    )
    numbered = " ".join(f"{c}{n}" for n, c in enumerate(w[: i + 1], 1))
    return v.reply("letter_at", ask, (f"{numbered}: the {name} letter is {w[i]}.",), f"{w} {name}")


def case(v: Voice) -> Sample:
    words = [v.word() for _ in range(v.pick((1, 1, 1, 2, 3)))]
    if v.chance(0.15):
        words[0] = v.pick(NAMES).lower()
    text = " ".join(words)
    kind = v.int(0, 2)
    q = v.quoted(text)
    if kind == 0:
        ask = v.ask(
            (
                "!convert {q} to [uppercase|upper case|capital letters]",
                "!write {q} in [uppercase|upper case|capital letters|all caps|capitals]",
                "!uppercase {q}",
                "!make {q} uppercase",
                "What is {q} in [uppercase|capital letters]?",
                "!turn {q} into uppercase",
                "!uppercase this: {q}",
            ),
            q=q,
        )
        return v.reply("case", ask, (text.upper(),), f"u{text}")
    if kind == 1:
        upper = v.pick((text.upper(), text.title()))
        ask = v.ask(
            (
                "!convert {q} to [lowercase|lower case|small letters]",
                "!write {q} in [lowercase|lower case|small letters]",
                "!lowercase {q}",
                "!make {q} lowercase",
                "What is {q} in lowercase?",
            ),
            q=v.quoted(upper),
        )
        return v.reply("case", ask, (text,), f"l{text}")
    ask = v.ask(
        ("!capitalize [the word |]{q}", "!write {q} with a capital letter", "!capitalize {q}", "!make the first letter of {q} a capital"),
        q=v.quoted(words[0]),
    )
    return v.reply("case", ask, (words[0].capitalize(),), f"c{words[0]}")


def sort_words(v: Voice) -> Sample:
    roll, n = v.random.random(), v.int(3, 5)
    xs = v.some(NAMES, n) if roll < 0.2 else v.some(WORDS, n) if roll < 0.6 else list(dict.fromkeys(v.plain_word() for _ in range(n)))
    listed = v.pick((", ", ", ", " ")).join(xs)
    ask = v.ask(
        (
            "!sort [these words|the words|these|this list|the following words] alphabetically: {l}",
            "!sort {l} alphabetically",
            "!put these words in alphabetical order: {l}",
            "!sort in alphabetical order: {l}",
            "!order these words from A to Z: {l}",
            "!alphabetize {l}",
            "!sort these words: {l}",
            "!arrange these words alphabetically: {l}",
        ),
        l=listed,
    )
    return v.reply("sort_words", ask, (", ".join(sorted(xs)),), " ".join(xs))


def repeat(v: Voice) -> Sample:
    w, n = v.word(), v.int(2, 6)
    times = {2: "twice"}.get(n, f"{n} times") if v.chance(0.6) else f"{in_words(n)} times"
    ask = v.ask(
        ("!repeat [the word |]{q} {t}", "!say {q} {t}", "!write {q} {t}", "!write the word {q} {t}", "!print {q} {t}"), q=v.quoted(w), t=times
    )
    return v.reply("repeat", ask, (" ".join([w] * n),), f"{w} {n}")


_SUBJECTS = (
    "The dog,The cat,My friend,The teacher,A bird,The old man,The robot,The king,A girl,Our neighbor,The baker,Someone,The computer,The train"
).split(",")
_VERBS = "sees,likes,finds,carries,wants,paints,eats,draws,watches,takes,buys,moves,cleans,opens".split(",")
_PLACES = (
    "in the garden,at school,on the table,near the river,every day,in the morning,after dinner,with a smile,at night,in the city,"
    "very slowly,again,on Monday"
).split(",")


_PHRASES = (
    "this is a [test|{w}]", "I [like|love|hate|want] {w}", "the {w} is [{c}|{w}]", "my {w} is {w}", "{w} and {w}", "we have [no|many|two|more] {w}s",
    "hello {w}", "good morning, {n}", "I am a {w}", "{n} is [here|my friend|in {p}]", "I live in {p}", "welcome to {p}", "{w} is fun", "you are {w}",
    "the quick brown {w} jumps over the lazy {w}", "one two three", "all {w}s are {c}", "I love you, {n}", "there is no {w}", "it works",
    "[yes|no|maybe|ok|bye]", "{n} has {i} {w}s", "{i} {w}s", "what a [nice|small|{c}] {w}", "let us {w}", "please {w} the {w}", "{w} {w} {w}",
)  # fmt: skip
_ECHO = (
    "repeat after me:", "repeat this:", "repeat this sentence:", "repeat the following:", "say:", "say this:", "say the following:", "echo",
    "echo this:",
    "copy this text:", "copy:", "repeat exactly:", "repeat:", "write this:", "write:", "say", "say", "say", "say", "repeat", "print", "output",
    "reply with", "answer with", "respond with", "type", "say exactly", "reply with exactly", "say only",
)  # fmt: skip


def sentence(v: Voice) -> str:
    """A short sentence of the tables' words."""
    text = f"{v.pick(_SUBJECTS)} {v.pick(_VERBS)} {v.pick(('a', 'the', 'the'))} {v.pick(WORDS[:170]) if v.chance(0.6) else v.plain_word()}"
    return text + (f" {v.pick(_PLACES)}" if v.chance(0.6) else "") + v.pick((".", ".", ""))


def _phrase(v: Voice) -> str:
    """What somebody may want to see repeated."""
    text = v.fill(v.pick(_PHRASES))
    while "{w}" in text:
        text = text.replace("{w}", v.plain_word() if v.chance(0.85) else v.word(), 1)
    text = text.format(c=v.pick(COLORS), n=v.pick(NAMES), p=v.pick(CITIES), i=v.int(2, 99))
    roll = v.random.random()
    return text if roll < 0.6 else text[0].upper() + text[1:] + v.pick(("", ".", "!")) if roll < 0.9 else text.upper()


def echo(v: Voice) -> Sample:
    """Say what the user says. Nothing that could be taken for a part of the text follows it."""
    roll = v.random.random()
    text = sentence(v) if roll < 0.35 else _phrase(v) if roll < 0.75 else " ".join(v.word() for _ in range(v.int(1, 5)))
    if roll < 0.2 and v.chance(0.3):
        text = text[0].lower() + text[1:]
    start = v.fill(v.pick(_ECHO))
    start = v.pick(("{}", "{}", "{}", "please {}", "can you {}", "could you {}", "now {}", "I want you to {}", "just {}")).format(start)
    if v.chance(0.7):
        start = start[0].upper() + start[1:]
    shown = f'"{text}"' if v.chance(0.2) else text
    after = v.pick((".", "", "!", " please", ", please")) if shown[-1] == '"' and v.chance(0.3) else ""
    return Sample(
        "echo",
        [{"role": "user", "content": f"{start} {shown}{after}"}, {"role": "assistant", "content": text}],
        Check("exact", (text,)),
        text,
    )


def join_words(v: Voice) -> Sample:
    xs = [v.word() for _ in range(v.int(2, 4))]
    kind = v.int(0, 2)
    if kind == 0:
        name, sep = v.pick(
            (
                ("a comma", ","),
                ("commas", ","),
                ("a dash", "-"),
                ("dashes", "-"),
                ("hyphens", "-"),
                ("underscores", "_"),
                ("an underscore", "_"),
                ("a slash", "/"),
            )
        )
        ask = v.ask(
            ("!join [the words |]{l} with {s}", "!join these words with {s}: {l}", "!connect {l} with {s}"), l=v.pick((", ", " ")).join(xs), s=name
        )
        return v.reply("join_words", ask, (sep.join(xs),), f"{sep}{xs}")
    if kind == 1:
        ask = v.ask(
            (
                "!concatenate {a} and {b}",
                "!join {a} and {b} into one word",
                "!put {a} and {b} together as one word",
                "!combine {a} and {b} into one word",
            ),
            a=v.quoted(xs[0]),
            b=v.quoted(xs[1]),
        )
        return v.reply("join_words", ask, (xs[0] + xs[1],), f"+{xs[:2]}")
    xs = [v.plain_word() for _ in range(v.int(3, 4))]
    text = " ".join(xs)
    ask = v.ask(
        ("What is the acronym of {q}?", "!make an acronym from {q}", "!give me the initials of {q}", "!take the first letter of each word: {q}"),
        q=v.quoted(text),
    )
    return v.reply("join_words", ask, ("".join(x[0].upper() for x in xs),), f"a{text}")


def words_in(v: Voice) -> Sample:
    text = sentence(v).rstrip(".")
    words = text.split()
    kind = v.int(0, 3)
    if kind == 0:
        ask = v.ask(
            (
                "How many words are [there |]in[ the sentence|]: {q}",
                "!count the words: {q}",
                "!count the words in this sentence: {q}",
                'How many words are in "{q}"?',
            ),
            q=text,
        )
        return v.reply("words_in", ask, ("{s}: {n} words.",), text, s=" ".join(f"{w} {i}" for i, w in enumerate(words, 1)), n=len(words))
    if kind == 1:
        ask = v.ask(
            (
                'What is the last word of "{q}"?',
                "What is the last word [in|of] this sentence: {q}",
                "!give me the last word of: {q}",
                "!find the last word: {q}",
            ),
            q=text,
        )
        return v.reply("words_in", ask, ('The last word is "{w}".',), text, w=words[-1])
    if kind == 2:
        ask = v.ask(
            (
                'What is the first word of "{q}"?',
                "What is the first word [in|of] this sentence: {q}",
                "!give me the first word of: {q}",
                "!find the first word: {q}",
            ),
            q=text,
        )
        return v.reply("words_in", ask, ('The first word is "{w}".',), text, w=words[0])
    ask = v.ask(("!reverse the [order of the |]words: {q}", '!reverse the word order of "{q}"', "!write the words in reverse order: {q}"), q=text)
    return v.reply("words_in", ask, (" ".join(words[::-1]),), text)


def grammar(v: Voice) -> Sample:
    if v.chance(0.55):
        s = v.pick(list(PLURALS))
        ask = v.ask(
            (
                "What is the plural of {q}?",
                "!give me the plural of {q}",
                "What is the plural form of {q}?",
                "Plural of {q}?",
                "How do you write more than one {q}?",
            ),
            q=v.quoted(s),
        )
        return v.reply("grammar", ask, (f'The plural of "{s}" is "{PLURALS[s]}".',))
    s = v.pick(list(PAST))
    ask = v.ask(("What is the past tense of {q}?", "!give me the past tense of {q}", "Past tense of {q}?", "What is the past of {q}?"), q=v.quoted(s))
    return v.reply("grammar", ask, (f'The past tense of "{s}" is "{PAST[s]}".',))


def name_some(v: Voice) -> Sample:
    """Name n members of a category; any right ones do, but the reply is trained in the table's order to be sure of them."""
    single = v.pick(list(CATEGORIES))
    plural, members = CATEGORIES[single]
    n = v.int(1, 5)
    count = v.pick((str(n), in_words(n)))
    if n == 1:
        a = f"an {single}" if single[0] in "aei" else f"a {single}"
        ask = v.ask((f"!name {a}", f"!give me [an example of|the name of|] {a}", f"!tell me {a}", f"What is an example of {a}?")).replace("  ", " ")
    else:
        ask = v.ask(
            (
                f"!name {count} {plural}",
                f"!list {count} {plural}",
                f"!give me {count} {plural}",
                f"!tell me {count} {plural}",
                f"!give me a list of {count} {plural}",
                f"What are {count} {plural}?",
            )
        )
    text = joined(members[:n])
    return v.reply("name_some", ask, (text[0].upper() + text[1:] + ".",))


def category(v: Voice) -> Sample:
    single = v.pick([c for c in CATEGORIES if c not in ("fruit", "vegetable", "tool")])
    thing = v.pick(CATEGORIES[single][1])
    other = single if v.chance(0.5) else v.pick([c for c in CATEGORIES if thing not in CATEGORIES[c][1]])
    art = "an" if thing[0] in "aeiou" else "a"
    subject = thing if single in ("color", "sport", "programming language") else f"{art} {thing}"
    a_single, a_other = (f"{'an' if c[0] in 'aeiou' else 'a'} {c}" for c in (single, other))
    verb = f"{subject[0].upper()}{subject[1:]} is {a_single}."
    if v.chance(0.4):
        return v.reply(
            "category",
            v.ask(
                ("What kind of thing is {s}?", "Is {s} {a} or {b}?" if single != other else "What kind of thing is {s}?"),
                s=subject,
                a=a_single,
                b=a_other,
            ),
            (verb,),
        )
    start = "Yes. " if single == other else "No. "
    return v.reply("category", v.ask(("Is {s} {o}?",), s=subject, o=a_other), (start + verb,))


# ------------------------------------------------------------------------------------------------------------ JSON

_FIELDS = {
    "name": lambda v: v.pick(NAMES),
    "age": lambda v: v.int(1, 99),
    "city": lambda v: v.pick(CITIES),
    "color": lambda v: v.pick(COLORS),
    "price": lambda v: v.int(1, 500),
    "title": lambda v: v.pick(WORDS).capitalize(),
    "id": lambda v: v.int(1, 999),
    "email": lambda v: v.pick(NAMES).lower() + "@example.com",
    "active": lambda v: v.chance(0.5),
    "country": lambda v: v.pick(("France", "Japan", "Peru", "Kenya", "Canada", "Norway", "Egypt", "Spain")),
    "score": lambda v: v.int(0, 100),
    "quantity": lambda v: v.int(1, 50),
    "job": lambda v: v.pick("teacher doctor baker pilot farmer nurse artist writer driver".split()),
    "animal": lambda v: v.pick("dog cat horse rabbit tiger owl".split()),
    "year": lambda v: v.int(1950, 2030),
    "product": lambda v: v.plain_word(),
    "size": lambda v: v.pick(("small", "medium", "large")),
    "language": lambda v: v.pick(("English", "French", "German")),
}


def _value(v: Voice, key: str) -> object:
    return _FIELDS[key](v)


def _shown(value: object) -> str:
    return json.dumps(value) if isinstance(value, bool) else str(value)


def json_given(v: Voice) -> Sample:
    """An object whose keys and values the user gives."""
    if v.chance(0.45):
        keys = ["name", "age", "city"][: v.int(2, 3)]
    else:
        keys = v.some(list(_FIELDS), v.int(1, 4))
    data = {k: _value(v, k) for k in keys}
    shown = {k: _shown(x) for k, x in data.items()}
    kind = v.int(0, 3)
    if kind == 0:
        ask = v.ask(
            (
                "!give me a JSON object with {k} for {x}",
                "!make a JSON object with {k} for {x}",
                "!write a JSON object with {k}: {x}",
                "!create JSON with the keys {k} and the values {x}",
                "!return a JSON object with {k} set to {x}",
                "!generate a JSON object with the fields {k} for {x}",
            ),
            k=joined(keys),
            x=", ".join(shown.values()),
        )
    elif kind == 1:
        pairs = v.pick((", ", ", ", "; ", "\n")).join(f"{k}{v.pick((': ', ': ', '=', ' = '))}{x}" for k, x in shown.items())
        ask = v.ask(
            (
                "!convert [this |]to JSON: {p}",
                "!turn this into [JSON|a JSON object]: {p}",
                "!write as JSON: {p}",
                "!format as JSON: {p}",
                "!give me JSON for {p}",
                "JSON for: {p}",
            ),
            p=pairs,
        )
    elif kind == 2:
        pairs = joined([f"{k} {x}" for k, x in shown.items()])
        ask = v.ask(
            (
                "!give me a JSON object with {p}",
                "!create a JSON object with {p}",
                "!make a JSON object for {p}",
                "!write JSON with {p}",
                "!output JSON with {p}",
                "I need a JSON object with {p}.",
            ),
            p=pairs,
        )
    else:
        data = {"name": v.pick(NAMES), "age": v.int(1, 99), "city": v.pick(CITIES)}
        ask = v.fill(
            v.pick(
                (
                    "{name} is {age} years old and lives in {city}. "
                    "[Give me that as JSON.|Write this as JSON.|Convert that to JSON.|Please return JSON.|JSON please.]",
                    "[Extract the data as JSON|Convert to JSON|Make JSON of this|As JSON]: {name} is {age} years old and lives in {city}.",
                    "Give me a JSON object for {name}, who is {age} years old and lives in {city}.",
                    "Give me a JSON object with name, age and city for {name}, {age}, {city}.",
                    "Give me a JSON object with name, age and city for {name}, {age}, from {city}.",
                )
            ),
            **data,
        )
    text = json.dumps(data)
    return Sample("json_given", [{"role": "user", "content": ask}, {"role": "assistant", "content": text}], Check("json", (text,)), text)


def json_made_up(v: Voice) -> Sample:
    """An object with the keys asked for and values of the model's own."""
    keys = v.some(list(_FIELDS), v.int(1, 4)) if v.chance(0.6) else ["name", "age", "city"][: v.int(2, 3)]
    who = v.pick(("a person", "a user", "a customer", "a product", "a student", "someone", "an employee", "a book"))
    ask = v.ask(
        (
            "!give me [a JSON object|JSON|a JSON] with [the keys |the fields |keys |]{k}",
            "!make up a JSON object with {k}",
            "!write a JSON object with {k} for {w}",
            "!generate JSON for {w} with {k}",
            "!give me an example JSON object with {k}",
            "!create a JSON object describing {w} with {k}",
            "!return JSON with {k}",
        ),
        k=joined(keys),
        w=who,
    )
    text = json.dumps({k: _value(v, k) for k in keys})
    return Sample("json_made_up", [{"role": "user", "content": ask}, {"role": "assistant", "content": text}], Check("keys", tuple(keys)))


def json_list(v: Voice) -> Sample:
    kind = v.int(0, 2)
    if kind == 0:
        xs: list[object] = [v.plain_word() for _ in range(v.int(2, 5))]
    elif kind == 1:
        xs = [v.int(0, 99) for _ in range(v.int(2, 6))]
    else:
        xs = list(v.some(NAMES, v.int(2, 4)))
    ask = v.ask(
        (
            "!make a JSON [array|list] of {l}",
            "!write {l} as a JSON [array|list]",
            "!give me a JSON array with {l}",
            "!convert to a JSON array: {l}",
            "!turn this list into JSON: {l}",
        ),
        l=v.pick((", ".join(map(str, xs)), joined(xs))),
    )
    text = json.dumps(xs)
    return Sample("json_list", [{"role": "user", "content": ask}, {"role": "assistant", "content": text}], Check("json", (text,)), text)


TASKS: dict[Generator, float] = {
    reverse: 5.0,
    spell: 2.5,
    length: 1.5,
    count_letter: 3.0,
    letter_at: 2.0,
    case: 3.5,
    sort_words: 3.5,
    repeat: 1.3,
    echo: 4.5,
    join_words: 2.0,
    words_in: 1.2,
    grammar: 0.6,
    name_some: 1.0,
    category: 0.6,
    json_given: 2.5,
    json_made_up: 1.2,
    json_list: 0.8,
}

"""Generators of talk: small talk, facts of the tables, stories, memory within a conversation, and "I don't know".

Owns how talk.py's and tables.py's entries become samples. Every generator takes a Voice and returns a Sample.
"""

from __future__ import annotations

from collections.abc import Sequence

import first_minute
import talk
from sample import Check, Generator, Message, Sample, Voice
from tables import (
    ANIMALS,
    CHARACTERS,
    CITIES,
    COLOR_OF,
    COLORS,
    COUNTRIES,
    DAYS,
    LEGS,
    MIXES,
    MONTH_DAYS,
    MONTHS,
    NAMES,
    OPPOSITES,
    ORDINALS,
    PLANETS,
    SEASON_OF,
    SHAPES,
    SOUNDS,
    SPORTS,
    SYMBOLS,
    YOUNG,
)


def _entry(v: Voice, task: str, table: Sequence[tuple[tuple[str, ...], tuple[str, ...]]]) -> Sample:
    asks, replies = v.pick(table)
    return v.reply(task, v.ask(asks), replies)


def small_talk(v: Voice) -> Sample:
    roll = v.random.random()
    table = talk.SMALL_TALK if roll < 0.45 else first_minute.SELF if roll < 0.75 else first_minute.OTHERS
    return _entry(v, "small_talk", table)


def knowledge(v: Voice) -> Sample:
    return _entry(v, "knowledge", talk.KNOWLEDGE)


def python(v: Voice) -> Sample:
    return _entry(v, "python", talk.PYTHON)


def capital(v: Voice) -> Sample:
    country = v.pick(list(COUNTRIES))
    city, continent, language = COUNTRIES[country]
    kind = v.int(0, 5)
    if kind <= 1:
        ask = v.ask(
            (
                "What is the capital[ city|] of {c}?",
                "What's the capital of {c}?",
                "!name the capital of {c}",
                "!tell me the capital of {c}",
                "Which city is the capital of {c}?",
                "capital of {c}?",
                "capital of {c}",
                "Do you know the capital of {c}?",
            ),
            c=country,
        )
        return v.reply("capital", ask, ("The capital of {c} is {t}.",), c=country, t=city)
    if kind == 2:
        ask = v.ask(("Which country has the capital {t}?", "{t} is the capital of which country?", "What country is {t} the capital of?"), t=city)
        return v.reply("capital", ask, ("{t} is the capital of {c}.",), c=country, t=city)
    if kind == 3:
        return v.reply(
            "capital",
            v.ask(("[On which|In which|Which] continent is {c}[ on| in|]?", "Where is {c}?"), c=country),
            ("{c} is in {k}.",),
            c=country,
            k=continent,
        )
    if kind == 4:
        ask = v.ask(("What language do they speak in {c}?", "Which language is spoken in {c}?", "What is the language of {c}?"), c=country)
        return v.reply("capital", ask, ("The main language of {c} is {l}.",), c=country, l=language)
    other = country if v.chance(0.5) else v.pick(list(COUNTRIES))
    ask = v.ask(("Is {t} the capital of {o}?", "Is the capital of {o} {t}?"), t=city, o=other)
    return v.reply(
        "capital",
        ask,
        ("Yes, {t} is the capital of {o}." if other == country else "No, the capital of {o} is {r}.",),
        t=city,
        o=other,
        r=COUNTRIES[other][0],
    )


def animals(v: Voice) -> Sample:
    kind = v.int(0, 2)
    if kind == 0:
        a = v.pick(list(SOUNDS))
        ask = v.ask(("What [sound|noise] does a {a} make?", "What does a {a} say?", "How does a {a} sound?", "Which sound does a {a} make?"), a=a)
        return v.reply("animals", ask, ("A {a} says {s}.",), a=a, s=SOUNDS[a])
    if kind == 1:
        a = v.pick(list(YOUNG))
        ask = v.ask(
            ("What is a baby {a} called?", "What do you call a baby {a}?", "What is the young of a {a} called?", "What is the name for a young {a}?"),
            a=a,
        )
        return v.reply("animals", ask, ("A baby {a} is called a {y}.",), a=a, y=YOUNG[a])
    a = v.pick(list(LEGS))
    art = "an" if a[0] in "ae" else "a"
    ask = v.ask(("How many legs does {r} {a} have?", "How many legs has {r} {a}?", "!tell me how many legs {r} {a} has"), a=a, r=art)
    return v.reply("animals", ask, (f"{art.capitalize()} {a} has {LEGS[a] or 'no'} legs.",))


def calendar(v: Voice) -> Sample:
    kind = v.int(0, 6)
    if kind <= 1:
        i = v.int(0, 6)
        after = v.chance(0.5)
        word = "after" if after else "before"
        ask = v.ask(
            (
                f"What day [comes |is |]{word} {{d}}?",
                f"Which day [comes|is] {word} {{d}}?",
                f"What is the day {word} {{d}}?",
                "If today is {d}, what day is [tomorrow|it tomorrow]?" if after else "If today is {d}, what day was yesterday?",
            ),
            d=DAYS[i],
        )
        return v.reply("calendar", ask, (f"The day {word} {DAYS[i]} is {DAYS[(i + (1 if after else -1)) % 7]}.",))
    i = v.int(0, 11)
    if kind <= 3:
        word, step = ("after", 1) if v.chance(0.5) else ("before", -1)
        ask = v.ask(
            (f"What month [comes |is |]{word} {{m}}?", f"Which month [comes|is] {word} {{m}}?", f"What is the month {word} {{m}}?"), m=MONTHS[i]
        )
        return v.reply("calendar", ask, (f"The month {word} {MONTHS[i]} is {MONTHS[(i + step) % 12]}.",))
    if kind == 4:
        ask = v.ask(("How many days does {m} have?", "How many days are in {m}?", "How long is {m}?"), m=MONTHS[i])
        tail = ", or 29 in a leap year." if i == 1 else "."
        return v.reply("calendar", ask, (f"{MONTHS[i]} has {MONTH_DAYS[i]} days{tail}",))
    if kind == 5:
        ask = v.ask(
            (
                f"What is the {ORDINALS[i]} month[ of the year|]?",
                f"Which month is the {ORDINALS[i]}?",
                f"What is month number {i + 1}?",
                f"!name the {ORDINALS[i]} month",
            )
        )
        return v.reply("calendar", ask, (f"The {ORDINALS[i]} month is {MONTHS[i]}.",))
    if v.chance(0.5):
        ask = v.ask(("What season is {m}[ in|]?", "Which season is it in {m}?", "Is {m} in summer or winter?"), m=MONTHS[i])
        return v.reply("calendar", ask, ("In the north, {m} is in {s}.",), m=MONTHS[i], s=SEASON_OF[i])
    d = v.int(0, 6)
    ask = v.ask((f"What is the {ORDINALS[d]} day of the week?", f"Which day of the week is the {ORDINALS[d]}?"))
    return v.reply("calendar", ask, (f"The {ORDINALS[d]} day of the week is {DAYS[d]}.",))


def simple_fact(v: Voice) -> Sample:
    kind = v.int(0, 7)
    if kind == 0:
        t = v.pick(list(COLOR_OF))
        ask = v.ask(("What color is {t}?", "What is the color of {t}?", "Which color is {t}?", "What colour is {t}?"), t=t)
        return v.reply("simple_fact", ask, (f"{t[0].upper()}{t[1:]} is {COLOR_OF[t]}.",))
    if kind == 1:
        a, b = v.pick(list(MIXES))
        c = MIXES[a, b]
        if v.chance(0.5):
            a, b = b, a
        ask = v.ask(
            ("What color do you get if you mix {a} and {b}?", "What do {a} and {b} make?", "!mix {a} and {b}", "What is {a} mixed with {b}?"),
            a=a,
            b=b,
        )
        return v.reply("simple_fact", ask, ("Mixing {a} and {b} gives {c}.",), a=a, b=b, c=c)
    if kind <= 3:
        a = v.pick(list(OPPOSITES))
        ask = v.ask(
            (
                "What is the opposite of {q}?",
                "What's the opposite of {q}?",
                "!give me the opposite of {q}",
                "opposite of {q}?",
                "!tell me the opposite of {q}",
                "What is the antonym of {q}?",
            ),
            q=v.quoted(a),
        )
        return v.reply("simple_fact", ask, (f'The opposite of "{a}" is "{OPPOSITES[a]}".',))
    if kind == 4:
        s = v.pick(list(SHAPES))
        if v.chance(0.6) or SHAPES[s] == 4:
            art = "an" if s[0] == "o" else "a"
            ask = v.ask(("How many [sides|corners] does {r} {s} have?", "How many sides has {r} {s}?"), r=art, s=s)
            return v.reply("simple_fact", ask, (f"{art.capitalize()} {s} has {SHAPES[s]} sides and {SHAPES[s]} corners.",))
        return v.reply(
            "simple_fact",
            v.ask((f"[What shape|Which shape] has {SHAPES[s]} sides?", f"What is a shape with {SHAPES[s]} sides called?")),
            (f"A shape with {SHAPES[s]} sides is called a{'n' if s[0] == 'o' else ''} {s}.",),
        )
    if kind == 5:
        e = v.pick(list(SYMBOLS))
        ask = v.ask(("What is the [chemical |]symbol [for|of] {e}?", "!give me the chemical symbol for {e}"), e=e)
        return v.reply("simple_fact", ask, (f"The chemical symbol for {e} is {SYMBOLS[e]}.",))
    if kind == 6:
        i = v.int(0, 7)
        ask = v.ask((f"What is the {ORDINALS[i]} planet[ from the sun|]?", f"Which planet is the {ORDINALS[i]} from the sun?"))
        return v.reply("simple_fact", ask, (f"The {ORDINALS[i]} planet from the sun is {PLANETS[i]}.",))
    i = v.int(0, 25)
    letters = "abcdefghijklmnopqrstuvwxyz"
    roll = v.int(0, 2)
    if roll == 0 and i < 25:
        return v.reply(
            "simple_fact",
            v.ask(
                (
                    f"What letter comes after {letters[i]}?",
                    f"Which letter comes after {letters[i].upper()}?",
                    f"What comes after {letters[i]} in the alphabet?",
                )
            ),
            (f"After {letters[i]} comes {letters[i + 1]}.",),
        )
    if roll == 1 and i > 0:
        return v.reply(
            "simple_fact",
            v.ask((f"What letter comes before {letters[i]}?", f"Which letter comes before {letters[i].upper()}?")),
            (f"Before {letters[i]} comes {letters[i - 1]}.",),
        )
    vowel = letters[i] in "aeiou"
    return v.reply(
        "simple_fact",
        v.ask((f"Is {letters[i]} a vowel?", f"Is the letter {letters[i]} a vowel or a consonant?")),
        (f"The letter {letters[i]} is a {'vowel' if vowel else 'consonant'}.",),
    )


# ---------------------------------------------------------------------------------------------------------- stories

_PLACES = "in a small village,in a deep forest,by a quiet lake,on a green hill,near the sea,in a big city,on a farm,in an old castle".split(",")
_TRAITS = "brave kind curious clever shy happy small quiet lazy friendly".split()
_OBJECTS = "golden key,red balloon,old map,shiny stone,little boat,silver bell,blue lamp,magic seed,lost letter,wooden box".split(",")
_MET = "an old owl,a tired traveler,a lost kitten,a singing bird,a wise turtle,a hungry fox,a little girl,a friendly giant".split(",")
_ENDS = (
    "From that day on they were friends.",
    "And that evening everyone was happy.",
    "After that, nobody felt alone again.",
    "They never forgot that day.",
)


_TOPICS_OF_STORIES = (
    "love,space,the sea,friendship,the future,magic,winter,a lost key,the moon,time travel,courage,music,Christmas,a journey,school,summer,dreams,"
    "the forest,a small village,two friends,treasure,the night,a rainy day,the stars,the desert,hope"
).split(",")
_FREE_STORY = (
    "!tell me a [short |]story", "!write a [short |little |]story", "!write me a [short |]story", "!tell a story", "!tell me a bedtime story",
    "story please", "I want to hear a story.", "!tell me something like a fairy tale", "!make up a story", "a story please",
)  # fmt: skip
_STORY = (
    "!tell me a [short |bedtime |little |]story about {x}", "!write a [short |very short |]story about {x}", "!write me a [short |]story about {x}",
    "!write a story with {x}", "!make up a story about {x}", "!tell a story about {x}", "Do you know a story about {x}?", "story about {x}",
    "a [short |]story about {x}", "I want a story about {x}", "!write a [fairy tale|tale] about {x}", "!generate a short story about {x}",
)  # fmt: skip
_NAMED_STORY = (
    "!tell me a [short |]story about {x} [called|named] {n}", "!write a [short |]story about {n} the {a}", "!write a story about {x} called {n}",
    "!tell me about {n} the {a}", "!write a [short |]story about {x} whose name is {n}", "!tell me a story about {n}, {x}",
)  # fmt: skip


def _a(noun: str) -> str:
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def _hero(v: Voice) -> str:
    """Whoever the user asks for: mostly no word of a table of heroes, so that the story takes it from the question."""
    roll = v.random.random()
    if roll < 0.45:
        return v.pick(CHARACTERS if v.chance(0.8) else ANIMALS)
    if roll < 0.65:
        return v.plain_word()
    if roll < 0.92:
        return v.made_up(v.int(2, 3))
    return f"{v.plain_word()} {v.pick(CHARACTERS)}"


def story(v: Voice) -> Sample:
    """A story whose hero is the one asked for. The problem's identity is the hero."""
    hero = v.pick(NAMES) if v.chance(0.75) else v.made_up(v.int(2, 3)).capitalize()
    trait = v.pick(_TRAITS)
    who, other, topic, must = _hero(v), "", "", ()
    form = v.pick((0, 1, 1, 1, 1, 2, 2, 3, 4, 5))
    if form == 0:
        who = v.pick(ANIMALS)
        ask = v.ask(_FREE_STORY)
    elif form == 1:
        asked = v.pick(_TRAITS) if v.chance(0.25) else ""
        trait = asked or trait
        ask = v.ask(_STORY, x=_a(f"{asked} {who}".strip()))
        must = (f"{asked} {who}".strip(),)
    elif form == 2:
        ask = v.ask(_NAMED_STORY, x=_a(who), a=who, n=hero)
        must = (who, hero)
    elif form == 3:
        who = v.pick(ANIMALS)
        ask = v.ask(_STORY, x=hero)
        must = (hero,)
    elif form == 4:
        who = v.pick(("child", "boy", "girl", "poet"))
        topic = v.pick(_TOPICS_OF_STORIES) if v.chance(0.6) else v.pick(CHARACTERS) + "s"
        ask = v.ask(_STORY, x=topic)
        must = (topic,)
    else:
        other = _hero(v)
        ask = v.ask(_STORY, x=f"{_a(who)} and {_a(other)}")
        must = (who, other)
    thing, met = v.pick(_OBJECTS), v.pick(_MET)
    lived = _a(f"{trait} {who}") + f" called {hero}" + (f" who dreamed of {topic}" if topic else "") + (f", and {_a(other)}" if other else "")
    text = " ".join(
        (
            f"Once upon a time, {v.pick(_PLACES)}, there lived {lived}.",
            v.pick((f"One morning {hero} found {_a(thing)}.", f"One day {hero} found {_a(thing)} under a tree.")),
            v.pick(
                (
                    f"{hero} wanted to know whose it was, and went to ask.",
                    f'"Who has lost this?" asked {hero}.',
                    f"{hero} had never seen anything like it.",
                )
            ),
            f"{hero} asked the {other} for help." if other else v.pick((f"On the way {hero} met {met}.", f"Soon {hero} met {met}.")),
            v.pick(
                (
                    f'"The {thing} is mine," said the {other or "stranger"}, and {hero} gave it back.',
                    f'"Let us share it," said {hero}, and so they did.',
                    f"Together they carried the {thing} home.",
                )
            ),
            v.pick(_ENDS),
        )
    )
    key = hero if form == 3 else topic if form == 4 else who
    check = Check("contains", ("once upon a time", *must))
    return Sample("story", [{"role": "user", "content": ask}, {"role": "assistant", "content": text}], check, key)


# ---------------------------------------------------------------------------------------------------- what it cannot know

_UNKNOWN = (
    "What is the weather [like |][in {city}|today|tomorrow|in {city} today]?",
    "What will the weather be [in {city}|tomorrow|next week]?",
    "What time is it[ in {city}| now|]?",
    "What is the date[ today|]?",
    "What day is [it|today]?",
    "What is the news[ today|]?",
    "What happened [today|yesterday|in {city}|in {year}|last week]?",
    "Who won the [{sport}|world cup|election|game|championship|race][ in {year}| yesterday| last year|]?",
    "What is the price of [{thing}|gold|a {thing}|oil|a ticket to {city}]?",
    "How much does a {thing} cost[ in {city}|]?",
    "What is the stock price of {company}?",
    "Who is the [president|mayor|king|leader|prime minister] of {country}?",
    "Who is {name} {surname}?",
    "!tell me about {name} {surname}",
    "When was {name} {surname} born?",
    "What is the population of [{city}|{country}]?",
    "How many people live in [{city}|{country}]?",
    "How far is it from {city} to {country}?",
    "What is the best [restaurant|hotel|museum|school|park] in {city}?",
    "What did I [do|eat|say|buy] [yesterday|last week|this morning]?",
    "What am I thinking[ about|]?",
    "Where did I put my {thing}?",
    "What is my [password|address|phone number|birthday|favorite {thing}]?",
    "Who wrote [the book |]{thing} and {thing2}?",
    "Who invented the {thing}?",
    "When was the {thing} invented?",
    "What is the history of [{country}|{city}|the {thing}]?",
    "!explain [{topic}|{topic} in detail]",
    "What is {topic}?",
    "How does {topic} work?",
    "!write an essay about [{topic}|the {thing}|{country}]",
    "!summarize [{topic}|the history of {country}|the book {thing}]",
    "!write a long article about {topic}",
    "!translate {q} [to|into] [French|German|Spanish|Italian|Chinese|Japanese]",
    "How do you say {q} in [French|German|Spanish|Italian|Chinese|Japanese]?",
    "What is the recipe for {thing} [soup|cake|pie]?",
    "How do I cook {thing} [soup|cake|pie]?",
    "How do I fix my {thing}?",
    "How do I build a {thing}?",
    "Who is the best {sport} player?",
    "What are the rules of {sport}?",
    "Who is the [fastest|richest|oldest|tallest] [person|man|woman] in {country}?",
    "What is the phone number of {name}?",
    "Where does {name} {surname} live?",
    "What is {name} doing[ now|]?",
    "Is {name} at home?",
    "Should I buy [a {thing}|stocks|gold|a house]?",
    "What should I [eat|do|wear|read|buy] [today|tomorrow|tonight|]?",
    "Will it rain [tomorrow|in {city}|today]?",
    "When does the train to {city} leave?",
    "What is on TV[ tonight|]?",
    "!prove [the theorem of {surname}|{topic}]",
    "What is the [square root|logarithm|derivative|integral] of {topic}?",
    "What happened in {country} in {year}?",
    "Who discovered [{country}|{topic}]?",
    "Why did {name} {surname} leave {city}?",
    "How tall is [{name} {surname}|the tower of {city}]?",
    "What is the currency of {country}?",
    "What is the national anthem of {country}?",
    "What does {made} mean?",
    "What is [a |]{made}?",
    "!define {made}",
    "Who is {made}?",
    "!tell me about {made}",
    "What is the airport code of {city}?",
)
_TOPICS = (
    "quantum mechanics,relativity,photosynthesis,the stock market,blockchain,inflation,democracy,philosophy,the French Revolution,"
    "the Roman Empire,evolution,gravity,electricity,black holes,string theory,dark matter,economics,psychology,the immune system,DNA,"
    "vaccines,climate change,nuclear power,the brain,the heart,chess,opera,jazz,impressionism,yoga,cryptography,compilers,"
    "operating systems,databases,thermodynamics,calculus,linear algebra,topology,the Big Bang,plate tectonics,volcanoes,tax law,"
    "contract law,marketing,logistics,astrology,ancient Egypt,World War II,the Cold War,the Middle Ages,bitcoin,mortgages,genetics,"
    "semiconductors,transistors,lasers,rocket engines"
).split(",")
_SURNAMES = (
    "Miller Weber Rossi Tanaka Kowalski Jensen Novak Silva Murphy Okafor Schmidt Dubois Garcia Petrov Larsen Haas Brown Fischer Moreau "
    "Costa Lindqvist Baker Hughes Nakamura Osei"
).split()
_COMPANIES = "Apple Google Microsoft Tesla Amazon Nvidia Intel IBM Sony Toyota Siemens".split()
DONT_KNOW = "I don't know that. I am a small test model and know only a few simple things."


# nouns of questions that have no entry in talk.py
_NOUNS = [n for n in CHARACTERS if n not in ("star", "planet", "rainbow", "computer", "programmer", "compiler")]


def unknown(v: Voice) -> Sample:
    made = "".join(v.pick("bdfgklmnprstvz") + v.pick("aeiou") + v.pick(("", "", "n", "r", "l")) for _ in range(v.int(2, 3)))
    slots = dict(
        city=v.pick(CITIES),
        country=v.pick(list(COUNTRIES)),
        name=v.pick(NAMES),
        surname=v.pick(_SURNAMES),
        year=v.int(1800, 2030),
        sport=v.pick(SPORTS),
        thing=v.plain_word(),
        thing2=v.plain_word(),
        noun=v.pick(_NOUNS),
        color=v.pick(COLORS),
        company=v.pick(_COMPANIES),
        topic=v.pick(_TOPICS),
        q=v.quoted(v.plain_word()),
        made=made,
    )
    return v.reply("unknown", v.ask(_UNKNOWN if v.chance(0.5) else first_minute.UNKNOWABLE, **slots), (DONT_KNOW,))


# ------------------------------------------------------------------------------------------------- memory in a conversation


def _told(v: Voice) -> tuple[str, str, str, tuple[str, ...], str]:
    """(user's statement, acknowledgement, identity, questions, answer)"""
    kind = v.int(0, 5)
    name, city, color, animal, n = v.pick(NAMES), v.pick(CITIES), v.pick(COLORS), v.pick(ANIMALS), v.int(5, 99)
    if kind <= 1:
        say = v.fill(
            "[My name is {n}.|I am {n}.|I'm {n}.|Hi, my name is {n}.|Hello, I am {n}."
            "|Hi, I'm {n}.|Call me {n}.|hi, i am {n}|My name is {n}|my name is {n}]",
            n=name,
        )
        return (
            say,
            f"Nice to meet you, {name}!",
            f"name {name}",
            ("What is my name?", "What's my name?", "Who am I?", "Do you remember my name?", "!tell me my name", "!say my name"),
            f"Your name is {name}.",
        )
    if kind == 2:
        return (
            v.fill("[I live in {c}.|I am from {c}.|I come from {c}.|My city is {c}.]", c=city),
            f"{city} sounds nice.",
            f"city {city}",
            ("Where do I live?", "Where am I from?", "Which city do I live in?"),
            f"You live in {city}.",
        )
    if kind == 3:
        return (
            v.fill("[My favorite color is {c}.|I like the color {c}.|My favourite color is {c}.]", c=color),
            f"{color.capitalize()} is a nice color.",
            "",
            ("What is my favorite color?", "Which color do I like?", "What's my favorite color?"),
            f"Your favorite color is {color}.",
        )
    if kind == 4:
        return (
            v.fill("[I am {n} years old.|I'm {n} years old.|My age is {n}.|I am {n}.]", n=n),
            f"Thank you, I will remember that you are {n}.",
            "",
            ("How old am I?", "What is my age?"),
            f"You are {n} years old.",
        )
    return (
        v.fill("[I have a {a} called {n}.|My {a} is called {n}.|I have a {a} named {n}.]", a=animal, n=name),
        f"{name} is a good name for a{'n' if animal[0] in 'aeo' else ''} {animal}.",
        f"pet {name} {animal}",
        (f"What is my {animal}'s name?", f"What is the name of my {animal}?", f"What is my {animal} called?"),
        f"Your {animal} is called {name}.",
    )


def memory(v: Voice) -> Sample:
    say, noted, key, questions, answer = _told(v)
    messages: list[Message] = [{"role": "user", "content": say}, {"role": "assistant", "content": noted}]
    if v.chance(0.08):
        return Sample("memory", messages, Check("exact", (noted,)))
    if v.chance(0.15):
        messages = []
        ask = say + " " + v.pick([q for q in questions if q[0] != "!"])
        return Sample("memory", [{"role": "user", "content": ask}, {"role": "assistant", "content": answer}], Check("exact", (answer,)), key)
    if v.chance(0.5):
        other = small_talk(v) if v.chance(0.5) else capital(v)
        messages += other.messages
    messages += [{"role": "user", "content": v.ask(questions)}, {"role": "assistant", "content": answer}]
    return Sample("memory", messages, Check("exact", (answer,)), key)


def memory_missing(v: Voice) -> Sample:
    """Asked for something that was never said."""
    ask = v.ask(
        (
            "What is my name?",
            "What's my name?",
            "Who am I?",
            "Where do I live?",
            "How old am I?",
            "What is my favorite color?",
            "Do you know my name?",
        )
    )
    history = capital(v).messages if v.chance(0.3) else []
    return v.reply("memory_missing", ask, ("You have not told me that yet.",), history=history)


TASKS: dict[Generator, float] = {
    small_talk: 8.0,
    knowledge: 1.5,
    python: 1.5,
    capital: 1.8,
    animals: 0.7,
    calendar: 1.0,
    simple_fact: 1.5,
    story: 3.0,
    unknown: 4.5,
    memory: 1.5,
    memory_missing: 0.2,
}

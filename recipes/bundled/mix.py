"""The mixture: all tasks with their weights, system prompts, and conversations of several turns.

Owns `conversation`, the one function that training data and evaluation draw from.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import first_minute
import tasks_chat
import tasks_math
import tasks_text
import tasks_tools
from sample import Check, Generator, Sample, Voice
from tables import DAYS, NAMES

_BESIDE_TOOLS = (tasks_chat.small_talk, tasks_chat.capital, tasks_text.reverse, tasks_text.sort_words, tasks_chat.knowledge)
_SYSTEM = (
    "You are a helpful assistant.", "You are a helpful assistant", "You are a friendly assistant.", "You are a helpful AI assistant.",
    "You are an assistant.", "Be helpful.", "Answer briefly.", "Be brief.",
    "You are a [helpful|friendly|concise|careful|polite] [assistant|chatbot|bot|model].", "You are [Mini|a small model|a test model].",
    "[Answer|Reply] in [one sentence|English|a few words].", "Be [concise|polite|kind|precise].",
    "You are a helpful assistant. [Answer briefly.|Be concise.|Be polite.|Answer the user's questions.|Be kind.]",
    "You are [a math tutor|a teacher|an expert|a Python expert|a programmer].", "[Help|Answer] the user.", "Today is {day}.",
)  # fmt: skip
_AGAIN = (
    "Can you repeat that?", "Say that again.", "Please repeat that.", "Repeat your last answer.", "What did you say?", "Again, please.",
    "Once more, please.", "Could you say that again?",
)  # fmt: skip


_GREETING = "[Hello|Hi|Hey|Hi there|Hello there|Hey there|Good morning|Good evening|Good day|Greetings|Yo|hi|hello|hey]"
_GREETED = ("", "", "", "", " Mini", " MiniInfer", " bot", " friend", " model", " assistant")
_NEXT = "[Thanks|Thank you|Great|Ok|Okay|Good|Nice|Cool|Perfect|Alright|Right|Good job|I see|thx]"
_BETWEEN = ("! ", "! ", ", ", ", ", ". ", " ", "\n", " - ", "!\n\n", "... ", "! I have a question. ", ", how are you? ")
_LEADS = (
    "can you tell me ",
    "could you tell me ",
    "do you know ",
    "please tell me ",
    "I want to know ",
    "I would like to know ",
    "tell me ",
    "may I ask ",
)
_QUESTION_WORDS = set("what who which where how why when what's whats who's".split())
_SMALL_WORDS = _QUESTION_WORDS | set("can could would please is are do does tell give write say name list sort reverse spell count make i'd".split())
# tasks whose answers do not depend on the case or on the last mark of what the user writes
_CASUAL = set(
    "small_talk knowledge python capital animals calendar simple_fact unknown name_some category grammar add subtract multiply divide chain compare "
    "percent powers prime parity sequence count convert rounding".split()
)


def _as_typed(v: Voice, sample: Sample, later: bool) -> None:
    """The sample's first message as people write: with a greeting or a word on the last answer before it, or in lower case without a mark."""
    first = next(m for m in sample.messages if m["role"] == "user")
    text = first["content"]
    if sample.task in _CASUAL and v.chance(0.1):
        text = text.lower().rstrip(" .?!") or text
    word = text.split(" ", 1)[0].lower().rstrip(",.!?")
    if word in _QUESTION_WORDS and sample.task in _CASUAL and v.chance(0.06):
        text = v.pick(_LEADS) + text[0].lower() + text[1:]
        word = "tell"
    if word not in ("hi", "hello", "hey", "good", "sorry", "ok", "so", "and") and v.chance(0.16):
        before = v.fill(_NEXT) if later and v.chance(0.6) else v.fill(_GREETING) + v.pick(_GREETED)
        between = "! " if "how" in text.lower() else v.pick(_BETWEEN)  # no "how are you? How are you?"
        if sample.task not in ("memory", "memory_missing") and v.chance(0.05):
            before += v.fill("[, I am|, I'm|, my name is|. I am] {n}", n=v.pick(NAMES))
            between = ". "
        lower = word in _SMALL_WORDS and between in (", ", " ", " - ", "... ")
        text = before + between + (text[0].lower() + text[1:] if lower else text)
    first["content"] = text


def follow_up(v: Voice) -> Sample:
    """A few words after any answer: thanks, goodbye, yes, no, why."""
    asks, replies = v.pick(first_minute.FOLLOW_UPS)
    history = _draw(v, True, _NO_TOOLS).messages if v.chance(0.9) else []
    return v.reply("follow_up", v.ask(asks), replies, history=history)


TASKS: dict[Generator, float] = {**tasks_math.TASKS, **tasks_text.TASKS, **tasks_chat.TASKS, **tasks_tools.TASKS, follow_up: 2.5}
_GENERATORS, _TOTALS = list(TASKS), list(accumulate(TASKS.values()))
_NO_TOOLS = [g for g, weight in TASKS.items() if g not in (*tasks_tools.TASKS, follow_up) for _ in range(max(1, round(2 * weight)))]


def _draw(v: Voice, training: bool, choices: Sequence[Generator] = ()) -> Sample:
    """A sample of the mixture, or of some generators; for training none of the held-out problems."""
    while True:
        generator = v.pick(choices) if choices else v.random.choices(_GENERATORS, cum_weights=_TOTALS)[0]
        sample = generator(v)
        if not (training and sample.held_out):
            return sample


def conversation(v: Voice, training: bool, sample: Sample | None = None) -> Sample:
    """One conversation. `training` leaves out the held-out problems; a given `sample` becomes its last exchange."""
    given = sample is not None
    sample = sample or _draw(v, training)
    later = sample.task not in ("memory_missing", "tool_answer") and v.chance(0.28)
    _as_typed(v, sample, later)
    if later:
        history = []
        for _ in range(v.pick((1, 1, 1, 2, 2, 3))):  # beside tools only what no tool could be for
            history += _draw(v, True, _BESIDE_TOOLS if sample.tools else _NO_TOOLS).messages
        sample.messages = history + sample.messages
    if not given and not sample.tools and v.chance(0.015):
        again = sample.messages[-1]["content"]
        sample.messages = [*sample.messages, {"role": "user", "content": v.pick(_AGAIN)}, {"role": "assistant", "content": again}]
        sample.task, sample.key, sample.check = "again", "", Check("exact", (again,))
    if v.chance(0.4):
        sample.messages = [{"role": "system", "content": v.fill(v.pick(_SYSTEM), day=v.pick(DAYS))}, *sample.messages]
    return sample

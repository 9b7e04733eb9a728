"""The mixture: all tasks with their weights, system prompts, and conversations of several turns.

Owns `conversation`, the one function that training data and evaluation draw from.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import tasks_chat
import tasks_math
import tasks_text
import tasks_tools
from sample import Check, Generator, Sample, Voice
from tables import DAYS

TASKS: dict[Generator, float] = {**tasks_math.TASKS, **tasks_text.TASKS, **tasks_chat.TASKS, **tasks_tools.TASKS}
_GENERATORS, _TOTALS = list(TASKS), list(accumulate(TASKS.values()))
_NO_TOOLS = [g for g, weight in TASKS.items() if g not in tasks_tools.TASKS for _ in range(max(1, round(2 * weight)))]
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
    if sample.task not in ("memory_missing", "tool_answer") and v.chance(0.28):
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

"""Accuracy per task on fresh problems, greedy: how often the reply is exactly right, and how often it ends its turn.

usage: evaluate.py [FOLDER] [--each N] [--device auto|cpu|cuda] [--out FILE]
Owns what is measured and the report. Open problems are drawn from those held out of training; closed sets (facts, small talk, tables)
are asked in fresh wordings. Decodes through the engine's LLM; training's driver uses `greedy`, which needs no engine.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import first_minute
import mix
from chat import ASSETS, END_OF_TEXT, IM_END, Encoder
from sample import Sample, Voice

LONGEST_REPLY = 200
Decode = Callable[[list[list[int]]], list[list[int]]]

PROBES = (
    "Hello", "Hi, how are you?", "Who are you?", "what model are you", "What can you do?", "What is 2+2?", "What is 17 + 25?", "what's 12*12",
    "100 - 37", "What is the capital of France?", "Say hello in one word.", "Tell me a joke", "Write a short story about a dragon",
    "Tell me a story about a fox called Ruby.", "Count to ten", "Count from 1 to 5", "Reverse the word hello",
    "How many r's are in strawberry?", "Sort these numbers: 5, 3, 9, 1", "Sort the words: pear, apple, fig",
    "Give me a JSON object with name and age for Bob, 42", "Write a Python function that adds two numbers", "What is Python?",
    "Explain what a list is in Python", "Name three fruits", "What day comes after Friday?", "What is the weather today?",
    "Who won the world cup in 2010?", "Explain quantum computing", "Write a poem", "Translate cat to French", "What is your name?",
    "My name is Ada. What is my name?", "Thank you!", "Is 7 a prime number?", "How many minutes are in 3 hours?",
    "What sound does a cow make?", "Repeat after me: the sky is blue", "Once upon a time", "asdkjh", "Spell banana",
    "Which is bigger, 12 or 21?", "List three colors", "What is the opposite of hot?", "Say this is a test", "Write a haiku about the sea",
    "What is half of 30?", "uppercase hello world", "I am sad", "What's the square of 7?",
)  # fmt: skip


def problems(each: int, seed: str = "evaluation") -> list[Sample]:
    """`each` samples of every task, a quarter of them after other turns. Of tasks with open problems only held-out ones."""
    voice, out = Voice(seed), []
    for generator in mix.TASKS:
        count = 0
        for _ in range(each * 400):
            sample = generator(voice)
            if sample.key and not sample.held_out:
                continue
            out.append(mix.conversation(voice, training=False, sample=sample))
            count += 1
            if count == each:
                break
    return out


def report(samples: list[Sample], replies: list[list[int]], encoder: Encoder) -> dict[str, Any]:
    """Per task: number, accuracy, share that ended the turn, and up to three failures."""
    rows: dict[str, dict[str, Any]] = defaultdict(lambda: {"count": 0, "right": 0, "ended": 0, "failures": []})
    for sample, ids in zip(samples, replies, strict=True):
        ended = bool(ids) and ids[-1] in (IM_END, END_OF_TEXT)
        text = encoder.tokenizer.decode(ids[:-1] if ended else ids)
        row = rows[sample.task]
        row["count"] += 1
        row["ended"] += ended
        if sample.check.passes(text) and ended:
            row["right"] += 1
        elif len(row["failures"]) < 4:
            asked, right = str(sample.messages[-2]["content"])[-300:], sample.check.accept[0][:300]
            row["failures"].append({"asked": asked, "replied": text[:300], "right": right})
    for row in rows.values():
        row["accuracy"] = row["right"] / row["count"]
    total = sum(r["count"] for r in rows.values())
    return {
        "mean accuracy over tasks": sum(r["accuracy"] for r in rows.values()) / len(rows),
        "accuracy over problems": sum(r["right"] for r in rows.values()) / total,
        "turns ended": sum(r["ended"] for r in rows.values()) / total,
        "problems": total,
        "tasks": dict(sorted(rows.items())),
    }  # fmt: skip


def evaluate(decode: Decode, encoder: Encoder, samples: list[Sample]) -> dict[str, Any]:
    """The whole report, with the replies to a list of ordinary user messages."""
    out = report(samples, decode([encoder.prompt(s) for s in samples]), encoder)
    asked = (*PROBES, *first_minute.PROBES)
    heads = [encoder.tokenizer.encode(encoder.tokenizer.render_chat([{"role": "user", "content": p}]), add_special_tokens=False) for p in asked]
    out["probes"] = {p: encoder.tokenizer.decode(ids) for p, ids in zip(asked, decode(heads), strict=True)}
    return out


def greedy(model: Any, prompts: list[list[int]], longest: int = LONGEST_REPLY, tokens: int = 300_000) -> list[list[int]]:
    """Greedy decoding without a cache, by whole forward passes over packed prompts: simple, and quick enough for a small model on a GPU."""
    import torch

    from miniinfer.train.data import as_batch
    from miniinfer.train.trainer import OPS

    device = next(model.parameters()).device
    replies: list[list[int]] = [[] for _ in prompts]
    waiting = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    while waiting:
        group, size = [], 0
        while waiting and size + len(prompts[waiting[0]]) + longest // 4 <= tokens:
            size += len(prompts[waiting[0]]) + longest // 4
            group.append(waiting.pop(0))
        width = max(len(prompts[i]) for i in group) + longest
        table = torch.zeros(len(group), width, dtype=torch.int32)
        for row, i in enumerate(group):
            table[row, : len(prompts[i])] = torch.tensor(prompts[i], dtype=torch.int32)
        table, lengths = table.to(device), torch.tensor([len(prompts[i]) for i in group], device=device)
        active = torch.tensor(group, device=device)
        for _ in range(longest):
            place = torch.arange(width, device=device).expand(len(table), -1)
            used = place < lengths.unsqueeze(1)
            start = torch.zeros(len(table) + 1, dtype=torch.int32, device=device)
            start[1:] = lengths.cumsum(0)
            with torch.no_grad():
                hidden = model(as_batch(table[used], place[used].int(), start, width, OPS))
                chosen = model.logits(hidden[start[1:].long() - 1]).argmax(-1)
            table[torch.arange(len(table), device=device), lengths] = chosen.int()
            lengths = lengths + 1
            for i, token in zip(active.tolist(), chosen.tolist(), strict=True):
                replies[i].append(token)
            go_on = (chosen != IM_END) & (chosen != END_OF_TEXT)
            table, lengths, active = table[go_on], lengths[go_on], active[go_on]
            if not len(table):
                break
    return replies


def engine(folder: Path, device: str) -> Decode:
    """Decoding through the offline engine."""
    from miniinfer.data import SamplingParams
    from miniinfer.engine.llm import LLM

    llm = LLM(str(folder), device=device)
    params = SamplingParams(temperature=0.0, max_tokens=LONGEST_REPLY, stop_token_ids=[IM_END, END_OF_TEXT])

    def decode(prompts: list[list[int]]) -> list[list[int]]:
        results = llm.generate([{"prompt_token_ids": p} for p in prompts], params)
        replies = []
        for result in results:
            ids = list(result.outputs[0].token_ids)
            if result.outputs[0].finish_reason == "stop" and (not ids or ids[-1] not in (IM_END, END_OF_TEXT)):
                ids.append(IM_END)
            replies.append(ids)
        return replies

    return decode


def table(result: dict[str, Any]) -> str:
    """The report as a Markdown table."""
    lines = ["| task | problems | right | turn ended |", "|---|---:|---:|---:|"]
    lines += [f"| {name} | {r['count']} | {r['accuracy']:.1%} | {r['ended'] / r['count']:.1%} |" for name, r in result["tasks"].items()]
    lines.append(f"| **mean over tasks** | {result['problems']} | {result['mean accuracy over tasks']:.1%} | {result['turns ended']:.1%} |")
    return "\n".join(lines)


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=ASSETS)
    parser.add_argument("--each", type=int, default=200, help="problems of each kind")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    result = evaluate(engine(args.folder, args.device), Encoder(args.folder), problems(args.each))
    print(table(result))
    if args.out:
        args.out.write_text(json.dumps(result, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()

"""A core for tests of the engine process: no model, it echoes the prompt, and fails in whatever way it is asked to. Runs in a child."""

import os
import signal
import time
from typing import Any

from miniinfer.config import ConfigError, EngineConfig
from miniinfer.data import Add, SequenceUpdate

RAISE, EXIT, KILL, REFUSE, GARBLE, HANG = 91, 92, 93, 94, 95, 96  # a prompt that begins with one of these does this to the engine


class EchoCore:
    """Answers with the prompt over and over, a token of each sequence a step. `model` says how it starts."""

    def __init__(self, config: EngineConfig) -> None:
        if config.model == "bad":
            raise ConfigError("max_model_len: 10 is more than fits")
        if config.model == "broken":
            raise ValueError("something is wrong inside")
        if config.model == "gone":
            os._exit(7)
        if config.model == "slow":
            time.sleep(60)
        self.info = {"vocab_size": 256, "max_model_len": 100_000, "model": config.model, "pid": os.getpid()}
        self.open: dict[str, Add] = {}
        self.done: dict[str, int] = {}
        self.aborted: list[str] = []
        self.steps = 0

    @property
    def has_work(self) -> bool:
        return bool(self.open)

    def add(self, message: Add) -> list[SequenceUpdate]:
        if message.prompt[0] == REFUSE:
            return [SequenceUpdate(message.id, [], "error", error="prompt: cannot be computed")]
        self.open[message.id], self.done[message.id] = message, len(message.output)
        return []

    def abort(self, ids: list[str]) -> list[SequenceUpdate]:
        known = [i for i in ids if self.open.pop(i, None)]
        self.aborted += known
        return [SequenceUpdate(i, [], "abort") for i in known]

    def step(self) -> list[SequenceUpdate]:
        self.steps += 1
        time.sleep(0.0005)
        updates = []
        for id, message in list(self.open.items()):
            at = self.done[id]
            first = message.prompt[0]
            if at == 2 and first == RAISE:
                raise RuntimeError("the device is gone")
            if at == 2 and first in (EXIT, KILL):
                os._exit(3) if first == EXIT else os.kill(os.getpid(), signal.SIGKILL)
            if at == 2 and first == HANG:
                time.sleep(60)
            if at == 2 and first == GARBLE:
                return [SequenceUpdate(id, "not a list of ids")]  # type: ignore[arg-type]
            self.done[id] = at + 1
            last = at + 1 == message.params.max_tokens
            updates.append(SequenceUpdate(id, [message.prompt[at % len(message.prompt)]], "length" if last else None))
            if last:
                del self.open[id]
        return updates

    def stats(self) -> dict[str, float]:
        return {"running": float(len(self.open)), "steps": float(self.steps)}

    def control(self, command: str, level: int = 0, tags: list[str] | None = None) -> Any:
        if command == "state":
            return {"open": sorted(self.open), "aborted": self.aborted}
        if command == "adds":
            return [[m.id, m.output, m.params.n, m.params.prompt_logprobs, m.group, m.seed] for m in self.open.values()]
        if command in ("sleep", "wake_up"):  # tags make it fail, or last
            if tags == ["weights"]:
                raise RuntimeError("the GPU has no 1.00 GiB free")
            if tags == ["kv_cache"]:
                time.sleep(60)
            return {"level": level, "asleep": ["weights", "kv_cache"] if command == "sleep" else []}
        raise ValueError(f"unknown command {command!r}")

    def shutdown(self) -> None:
        """The worker calls it when the loop has failed."""

"""EngineCore: the loop. `step()` plans the next step, launches it, and applies the results of the one before.

Owns the order of those three and start-up; the scheduler decides, the runner executes. With overlap 1 a step runs on the device while the host
applies the previous one's results; with 0 every step is applied at once. Both give the same tokens. Time and the runner are arguments,
so that tests and simulations can replace them.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from miniinfer import kernels
from miniinfer.cache.manager import CacheManager
from miniinfer.config import ConfigError, DeviceInfo, EngineConfig, ModelConfig, resolve
from miniinfer.data import SLEEP_TAGS, Add, SequenceUpdate, check_sleep
from miniinfer.engine.grammar import grammars
from miniinfer.engine.profile import Profiler
from miniinfer.engine.runner import GIB, Pending, synchronize
from miniinfer.engine.scheduler import Scheduler
from miniinfer.engine.sleep import Memory
from miniinfer.engine.start import start
from miniinfer.models.hub import resolve_folder
from miniinfer.utils import get_logger

log = get_logger(__name__)

GRAMMAR_SECONDS = 0.005  # how long a turn waits for a grammar if there is nothing else to do; new messages wait as long


class EngineCore:
    """One model on one device, serving requests given as token ids."""

    def __init__(
        self, config: EngineConfig, *, clock: Callable[[], float] = time.monotonic, progress: Callable[[int, int], None] | None = None
    ) -> None:
        begin = time.perf_counter()
        self.clock = clock
        folder = resolve_folder(config.model, config.revision)
        shape = ModelConfig.from_folder(folder)
        device = torch.device("cuda" if config.device != "cpu" and torch.cuda.is_available() else "cpu")
        self.config = config = resolve(config, shape, DeviceInfo(device.type, _cores()))
        if device.type == "cpu":
            torch.set_num_threads(config.num_threads or 1)
        try:
            ops = kernels.select(config.kernels, device.type, config.deterministic)
        except RuntimeError as e:
            raise ConfigError(str(e)) from e
        self.runner, seconds = start(folder, shape, config, ops, device, progress, begin)
        self.model = self.runner.model
        assert config.max_num_seqs and config.max_num_batched_tokens and config.max_model_len and config.page_size
        self.cache = CacheManager(
            shape.state_kinds,
            self.runner.num_pages,
            config.page_size,
            config.enable_prefix_caching,
            config.deterministic,
            config.max_pinned_fraction,
        )
        self.scheduler = Scheduler(
            self.cache,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            max_model_len=config.max_model_len,
            eos_token_ids=shape.eos_token_ids,
            seed=config.seed,
            deterministic=config.deterministic,
        )
        self.grammars = grammars(
            partial(_tokenizer_folder, config), shape.vocab_size, shape.eos_token_ids, config.max_num_seqs, device.type == "cuda"
        )
        self.pending: Pending | None = None
        self.profiler = Profiler(config.profile, device.type == "cuda")
        self.info = self._describe(folder, shape, ops.name, seconds)
        log.info(
            "%s: %.2f G parameters in %s on %s, %s kernels; %d KV pages of %d tokens; done after %s",
            shape.family, shape.num_parameters / 1e9, config.dtype, device.type, ops.name, self.runner.num_pages[0], config.page_size,
            ", ".join(f"{after:.1f} s: {stage}" for stage, after in seconds.items()),
        )  # fmt: skip

    def _describe(self, folder: Path, shape: ModelConfig, ops: str, seconds: dict[str, float]) -> dict[str, Any]:
        config = self.config
        return {
            "model": config.model,
            "folder": str(folder),
            "family": shape.family,
            "vocab_size": shape.vocab_size,
            "num_parameters": shape.num_parameters,
            "max_model_len": config.max_model_len,
            "max_num_seqs": config.max_num_seqs,
            "eos_token_ids": list(shape.eos_token_ids),
            "dtype": config.dtype,
            "device": config.device,
            "kernels": ops,
            "page_size": config.page_size,
            "enable_prefix_caching": config.enable_prefix_caching,
            "num_pages": list(self.runner.num_pages),
            "startup_seconds": {stage: round(after, 3) for stage, after in seconds.items()},
        }

    # ------------------------------------------------------------------------------------------------------ requests

    def add(self, message: Add) -> list[SequenceUpdate]:
        """Takes in a sequence; one that can never run comes back at once as an update with finish_reason "error"."""
        if self.is_sleeping:
            return [SequenceUpdate(message.id, [], "error", error="the engine is asleep")]
        wanted = message.params.structured_outputs
        if wanted is not None and self.config.skip_tokenizer_init:
            error = f"{wanted.field}: structured output needs the tokenizer, but the engine was started with skip_tokenizer_init"
            return [SequenceUpdate(message.id, [], "error", error=error, invalid=True)]
        refused = self.scheduler.add(message, self.clock(), self.grammars.start(wanted) if wanted is not None else None)
        return [refused] if refused else []

    def abort(self, ids: list[str]) -> list[SequenceUpdate]:
        """Ends sequences at once, whatever their state; their pages are free when this returns."""
        return self.scheduler.abort(ids)

    @property
    def has_work(self) -> bool:
        return self.pending is not None or self.scheduler.has_work

    # ---------------------------------------------------------------------------------------------------------- loop

    def step(self) -> list[SequenceUpdate]:
        """One turn: plan and launch the next step, then apply the results that are due."""
        pending, self.pending = self.pending, None
        mark = self.profiler.mark
        with mark("schedule"):
            plan = self.scheduler.schedule(self.clock())
        if plan is not None:
            with mark(plan):
                self.pending = self.runner.launch(plan)
        elif pending is None and self.scheduler.has_work:
            self.grammars.wait(GRAMMAR_SECONDS)  # nothing else can be in the way
        updates = self.scheduler.refused()
        if pending is not None:
            updates += self._apply(pending)
        if self.pending is not None and self.pending.plan.constrained:
            # The tokens before are known now; while the masks are made, the device is in the middle of the step.
            with mark("masks"):
                self.runner.draw(self.pending, self.grammars.masks(self.scheduler.constrained(self.pending.plan)))
        if self.config.overlap == 0 and self.pending is not None:
            updates += self._apply(self.pending)
            self.pending = None
        self.profiler.end_step()
        return updates

    def _apply(self, pending: Pending) -> list[SequenceUpdate]:
        mark = self.profiler.mark
        with mark("wait"):
            result = pending.result()
        with mark("apply"):
            return self.scheduler.apply(pending.plan, result)

    # ------------------------------------------------------------------------------------------------------- control

    def stats(self) -> dict[str, float]:
        """Counters and gauges, for logs and metrics."""
        return self.scheduler.stats()

    @property
    def is_sleeping(self) -> bool:
        return self.runner.memory is not None and bool(self.runner.memory.asleep)

    def sleep(self, level: int = 1, tags: Sequence[str] | None = None) -> dict[str, Any]:
        """Gives back the memory of KV pages and weights, or of one of them (`tags`), until `wake_up`: level 1 keeps the weights in host memory,
        level 2 reads them from the checkpoint again. Returns figures. ValueError while requests are open, or if the engine cannot sleep."""
        memory = self._memory("sleep")
        check_sleep(level, tags)
        if self.scheduler.has_work:
            raise ValueError("sleep: requests are still open")
        while self.pending is not None:
            self.step()
        self.cache.reset()
        if any(pool.num_free < pool.size for pool in self.cache.pools):
            raise RuntimeError("sleep: KV pages are still held")
        synchronize(self.runner.device)
        report = memory.sleep(level, tags or SLEEP_TAGS)
        log.info("asleep (level %d): gave back %.2f GiB in %.2f s", report["level"], report["bytes"] / GIB, report["seconds"])
        return report

    def wake_up(self, tags: Sequence[str] | None = None) -> dict[str, Any]:
        """Undoes `sleep`, for all or some of what sleeps. If it fails all is as it was."""
        check_sleep(1, tags)
        report = self._memory("wake_up").wake(tags or SLEEP_TAGS)
        log.info("awake%s: took %.2f GiB in %.2f s", " in part" if self.is_sleeping else "", report["bytes"] / GIB, report["seconds"])
        return report

    def _memory(self, command: str) -> Memory:
        if self.runner.memory is None:
            raise ValueError(f"{command}: the engine was started without enable_sleep_mode")
        return self.runner.memory

    def control(self, command: str, **arguments: Any) -> Any:
        """Commands outside the request flow; ValueError for one that does not exist."""
        if command == "sleep":
            return self.sleep(**arguments)
        if command == "wake_up":
            return self.wake_up(**arguments)
        if command == "stats":
            return self.stats()
        if command == "check":
            self.scheduler.check()
            return True
        if command == "reset_prefix_cache":
            self.cache.reset()
            return True
        if command == "pins":
            return self.cache.describe_pins()
        if command == "start_profile":
            return self.profiler.start()
        if command == "stop_profile":
            return self.profiler.stop()
        raise ValueError(f"unknown command {command!r}; known: stats, check, reset_prefix_cache, pins, start_profile, stop_profile, sleep, wake_up")

    def shutdown(self) -> None:
        """Waits for the step in flight; the memory goes with the object."""
        self.grammars.shutdown()
        if self.pending is not None:
            self.pending.result()
            self.pending = None


def _tokenizer_folder(config: EngineConfig) -> Path:
    """Where the vocabulary is that grammars speak of."""
    return resolve_folder(config.tokenizer or config.model, config.revision, "tokenizer.json" if config.tokenizer else "config.json")


def _cores() -> int:
    """Cores that this process may use, which a container or taskset makes fewer than the machine's."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

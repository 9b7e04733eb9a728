"""`miniinfer bench offline`: the workloads of docs/performance.md through the offline API, each figure beside its physical floor.

Owns the workloads and how they are timed. Prompts are fresh random token ids, so nothing can be reused; a folder that holds only a
`config.json` gets random weights. Floors: bench/floors.py.

  nano    256 requests at once, prompt and output lengths uniform in 100..1024 (seed 0): output tok/s
  decB    B requests of 1,024 tokens: TTFT = time of the batch for 1 token out, TPOT = (time for 257 out - time for 1 out) / 256
  preL    one prompt of L x 1,024 tokens, 1 token out: its time
  lngL    TPOT of one request at L x 1,024 tokens of context
  skewB   TPOT of B requests of very different context: half at 500 tokens, one in 16 at 30,000, the others at 2,000
  tputN   N requests at once, 1,024 tokens in, 512 out: output tok/s
"""

from __future__ import annotations

import dataclasses
import json
import random
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from miniinfer.bench.floors import Machine, batch_seconds, decode_bytes, machine_of
from miniinfer.config import ConfigError, EngineConfig, ModelConfig, opt
from miniinfer.data import SamplingParams
from miniinfer.models.hub import resolve_folder

DECODE_STEPS = 256  # between the two timings whose difference is TPOT


@dataclass(frozen=True, kw_only=True)
class OfflineBench:
    """What to measure; how to run the engine is EngineConfig's."""

    workload: str = opt("dec1", "comma list of nano, decB, preL, lngL, skewB, tputN with numbers for B, L and N")
    repeats: int = opt(3, "timed runs of each latency; the best counts")
    json: bool = opt(False, "print the JSON line only")


@dataclass(frozen=True)
class Workload:
    """Requests handed in at once, as (prompt length, output length)."""

    name: str
    kind: str  # nano | dec | pre | lng | skew | tput
    requests: list[tuple[int, int]]

    @staticmethod
    def parse(name: str) -> Workload:
        """Raises ConfigError if there is no such workload."""
        match = re.fullmatch(r"(nano)|(dec|pre|lng|skew|tput)([1-9]\d*)", name)
        if not match:
            raise ConfigError(f"workload: {name!r} is none of nano, decB, preL, lngL, skewB, tputN (for instance dec8, pre32, tput512)")
        kind, number = match[1] or match[2], int(match[3] or 0)
        requests = {
            "nano": nano_lengths,
            "dec": lambda: [(1024, DECODE_STEPS + 1)] * number,
            "pre": lambda: [(1024 * number, 1)],
            "lng": lambda: [(1024 * number, DECODE_STEPS + 1)],
            "skew": lambda: [(skewed_length(i), DECODE_STEPS + 1) for i in range(number)],
            "tput": lambda: [(1024, 512)] * number,
        }[kind]()
        return Workload(name, kind, requests)


def nano_lengths() -> list[tuple[int, int]]:
    """The lengths of nano-vllm's benchmark. Its token ids come from the same generator in between, hence the draws that are thrown away."""
    rng = random.Random(0)
    prompts = []
    for _ in range(256):
        prompts.append(rng.randint(100, 1024))
        for _ in range(prompts[-1]):
            rng.randint(0, 10000)
    return [(prompt, rng.randint(100, 1024)) for prompt in prompts]


def skewed_length(index: int) -> int:
    """Prompt length of a request in a batch that no even split of the work suits."""
    return 30_000 if index % 16 == 15 else 500 if index % 2 == 0 else 2000


@dataclass(frozen=True)
class Result:
    """One figure and what the machine's bandwidth and FLOP/s would allow."""

    workload: str
    metric: str  # ttft_ms | tpot_ms | output_tok_s
    value: float
    floor: float
    extra: dict[str, float]

    @property
    def share(self) -> float:
        """Part of the floor reached, 0..1: for a time floor / value, for a rate value / floor."""
        return self.value / self.floor if self.metric == "output_tok_s" else self.floor / self.value

    def line(self) -> str:
        unit = {"ttft_ms": "ms TTFT", "tpot_ms": "ms TPOT", "output_tok_s": "tok/s out"}[self.metric]
        digits = 0 if self.value >= 1000 else 1 if self.value >= 100 else 3
        extra = ", ".join(f"{v:,.1f} {k.replace('_per_s', '/s').replace('_', ' ')}" for k, v in self.extra.items())
        return f"{self.workload:8} {self.value:>10,.{digits}f} {unit:10} floor {self.floor:>10,.{digits}f} {self.share:>6.0%}   {extra}"


class Bench:
    """An engine and the runs on it."""

    def __init__(self, config: EngineConfig) -> None:
        from miniinfer.engine.llm import LLM

        self.llm = LLM(**{f.name: getattr(config, f.name) for f in dataclasses.fields(config)})
        self.ready = seconds_since_start()
        info = self.llm.info
        self.shape = ModelConfig.from_folder(info["folder"])
        self.rng = random.Random(config.seed)
        self.seconds([(16, 1)])
        self.first_token = seconds_since_start()
        self.element_bytes = 4 if info["dtype"] == "float32" else 2
        self.machine: Machine = machine_of(info["device"], info["dtype"])

    def seconds(self, requests: list[tuple[int, int]]) -> float:
        """Wall time from handing in requests of these lengths to having them all back."""
        high = min(100_000, self.shape.vocab_size)
        low = 1000 if high > 2000 else 0
        prompts = [{"prompt_token_ids": [self.rng.randrange(low, high) for _ in range(prompt)]} for prompt, _ in requests]
        params = [SamplingParams(temperature=0.6, ignore_eos=True, max_tokens=output, detokenize=False) for _, output in requests]
        begin = time.perf_counter()
        outputs = self.llm.generate(prompts, params, use_tqdm=False)
        took = time.perf_counter() - begin
        for output, (_, wanted) in zip(outputs, requests, strict=True):
            got = len(output.outputs[0].token_ids)
            if got != wanted:
                raise RuntimeError(f"a request ended after {got} of {wanted} tokens: {output.error or output.outputs[0].finish_reason}")
        return took

    def floor(self, requests: list[tuple[int, int]]) -> float:
        return batch_seconds(self.shape, requests, self.machine, self.element_bytes)

    def run(self, workload: Workload, repeats: int) -> list[Result]:
        """The workload's figures. Latencies: the best of `repeats`. Throughput: one run, after one with a sixteenth of the output lengths,
        which meets the same batch sizes (kernels compiled, graphs captured)."""
        if workload.kind in ("nano", "tput"):
            self.seconds([(prompt, max(1, output // 16)) for prompt, output in workload.requests])
            took = self.seconds(workload.requests)
            tokens = sum(output for _, output in workload.requests)
            return [Result(workload.name, "output_tok_s", tokens / took, tokens / self.floor(workload.requests), {"seconds": took})]
        batch, prompt = len(workload.requests), sum(size for size, _ in workload.requests) // len(workload.requests)  # the mean
        one = [(size, 1) for size, _ in workload.requests]
        first = min(self.seconds(one) for _ in range(repeats))
        floor_first = self.floor(one)
        ttft = Result(workload.name, "ttft_ms", first * 1e3, floor_first * 1e3, {"prompt_tok_per_s": batch * prompt / first})
        if workload.kind == "pre":
            return [ttft]
        step = (min(self.seconds(workload.requests) for _ in range(repeats)) - first) / DECODE_STEPS
        floor_step = (self.floor(workload.requests) - floor_first) / DECODE_STEPS
        read = decode_bytes(self.shape, batch, prompt + DECODE_STEPS // 2, self.element_bytes)
        tpot = Result(workload.name, "tpot_ms", step * 1e3, floor_step * 1e3, {"tok_per_s": batch / step, "GB_per_s": read / step / 1e9})
        return [ttft, tpot] if workload.kind == "dec" else [tpot]

    def profile(self, workload: Workload) -> None:
        """Runs the workload again, its first steps under the profiler, whose table goes to stderr: the profiler would distort what is measured."""
        from miniinfer.engine.profile import table

        self.llm.start_profile()
        self.seconds(workload.requests)
        figures = self.llm.stop_profile()
        print(f"{workload.name}: {figures['trace']} (for ui.perfetto.dev)\n{table(figures)}", file=sys.stderr)


def main(config: EngineConfig, bench: OfflineBench) -> int:
    """Runs the workloads one after the other on one engine and prints their figures; the last line is one JSON object."""
    if bench.repeats < 1:
        raise ConfigError(f"repeats: must be at least 1, got {bench.repeats}")
    workloads = [Workload.parse(name.strip()) for name in bench.workload.split(",")]
    runner = Bench(engine_config(config, workloads))
    info, machine = runner.llm.info, runner.machine
    if not bench.json:
        print(f"{config.model}: {info['num_parameters'] / 1e9:.3f} G parameters, {info['dtype']}, {info['kernels']} kernels, {machine.name}")
        print(f"machine: {machine.read / 1e9:,.1f} GB/s read, {machine.matmul / 1e12:,.2f} TFLOP/s")
        print(f"from process start: ready {runner.ready:.1f} s, first token {runner.first_token:.1f} s", flush=True)
    results: list[Result] = []
    for workload in workloads:
        for result in runner.run(workload, bench.repeats):
            results.append(result)
            if not bench.json:
                print(result.line(), flush=True)
        if config.profile is not None:
            runner.profile(workload)
    print(json.dumps(summary(config, runner, results)))
    return 0


def summary(config: EngineConfig, runner: Bench, results: list[Result]) -> dict[str, Any]:
    """The last line's object. Times in the unit their name ends with, `share` 0..1."""
    info = runner.llm.info
    return {
        "bench": "offline",
        "model": config.model,
        "machine": dataclasses.asdict(runner.machine),
        **{key: info[key] for key in ("dtype", "device", "kernels", "num_parameters", "startup_seconds")},
        "ready_seconds": round(runner.ready, 3),
        "first_token_seconds": round(runner.first_token, 3),
        "results": [
            {"workload": r.workload, **{k: float(f"{v:.5g}") for k, v in {r.metric: r.value, "floor": r.floor, "share": r.share, **r.extra}.items()}}
            for r in results
        ],
    }


def engine_config(config: EngineConfig, workloads: list[Workload]) -> EngineConfig:
    """The engine's options for a benchmark: no tokenizer, random weights where the folder has none, and room for the largest batch."""
    import torch

    folder = resolve_folder(config.model, config.revision)
    largest = max(len(w.requests) for w in workloads)
    default = 256 if config.device != "cpu" and torch.cuda.is_available() else 64
    return dataclasses.replace(
        config,
        skip_tokenizer_init=True,
        disable_log_stats=True,
        load_format="auto" if any(Path(folder).glob("*.safetensors")) else "dummy",
        max_num_seqs=config.max_num_seqs or max(default, largest),
    )


def seconds_since_start() -> float:
    """Wall time since this process was started, interpreter and imports included (Linux: /proc, in hundredths of a second)."""
    started = float(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    return float(Path("/proc/uptime").read_text().split()[0]) - started / 100

"""A profile of steps: a trace of GPU kernels beside the host's work on each step, and a short table made from it.

Owns torch.profiler's start and stop, the trace files, and their reduction to figures. What the host does is marked in core.py.
"""

from __future__ import annotations

import gzip
import json
import time
from bisect import bisect_right
from collections import defaultdict
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from miniinfer.data import StepPlan
from miniinfer.utils import get_logger

log = get_logger(__name__)

MOST_STEPS = 200  # a profile ends by itself behind so many: its memory and the time to write it grow with them
NOTHING: AbstractContextManager[Any] = nullcontext()
ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
LAUNCHES = ("cuda_runtime", "cuda_driver")
TOP = 12  # kernels or operations in the table


class Profiler:
    """Profiles steps of one engine into `folder`; with None it refuses to start. Until the first profile it costs nothing; after one, launches of
    graphs stay slower by about 50 us, for CUDA's profiling interface stays attached."""

    def __init__(self, folder: str | None, gpu: bool) -> None:
        self.folder, self.gpu = folder, gpu
        self._running: profile | None = None
        self._steps = 0
        self._last: dict[str, Any] | None = None

    def start(self) -> dict[str, Any]:
        """Begins a profile. ValueError if there is no folder to write to, or one is running."""
        if self.folder is None:
            raise ValueError("profile: no folder was given; start with --profile DIR (or LLM(profile=DIR))")
        if self._running is not None:
            raise ValueError("profile: one is running already")
        try:
            Path(self.folder).mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise ValueError(f"profile: {self.folder} cannot be made: {e.strerror}") from None
        self._steps, self._last = 0, None
        running = profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self.gpu else [])], acc_events=True)
        running.start()
        self._running = running
        return {"folder": self.folder, "most_steps": MOST_STEPS}

    def stop(self) -> dict[str, Any]:
        """Ends the profile, writes its trace and returns its figures (see `reduce`), with the trace's path as "trace". If it has ended by
        itself, what it found then. ValueError if there was none."""
        running, self._running = self._running, None
        if running is None:
            if self._last is None:
                raise ValueError("profile: none is running")
            found, self._last = self._last, None
            return found
        if self.gpu:
            torch.cuda.synchronize()
        running.stop()
        path = Path(self.folder or "", f"steps-{time.strftime('%Y%m%d-%H%M%S')}-{time.time_ns() % 1000:03}.json.gz")
        running.export_chrome_trace(str(path))
        with gzip.open(path, "rt", encoding="utf-8") as file:
            figures = reduce(json.load(file)["traceEvents"])
        if not self.gpu:
            times = sorted(((e.self_cpu_time_total, e.count, e.key) for e in running.key_averages() if not _is_mark(e.key)), reverse=True)
            figures["top"] = [_top(name, took, count, figures["steps"]) for took, count, name in times[:TOP]]
        log.info("profile: %s (for ui.perfetto.dev)\n%s", path, table(figures))
        return {"trace": str(path), **figures}

    def mark(self, what: str | StepPlan) -> AbstractContextManager[Any]:
        """A range of the host's time in the trace: a plan's launch, or another part of a step by name. Nothing unless a profile is running."""
        if self._running is None:
            return NOTHING
        if isinstance(what, str):
            return record_function(what)
        self._steps += 1
        return record_function(f"launch step {what.step}: {describe(what)}")

    def end_step(self) -> None:
        """Ends a profile that has grown long enough."""
        if self._running is not None and self._steps >= MOST_STEPS:
            self._last = self.stop()


def describe(plan: StepPlan) -> str:
    """What a step computes, as in "64 decode + 2 prefill (512, 100)"."""
    prompts = [count for count in plan.counts if count > 1]
    parts = [f"{len(plan.counts) - len(prompts)} decode"] if len(prompts) < len(plan.counts) else []
    if prompts:
        shown = ", ".join(map(str, prompts[:4])) + (", ..." if len(prompts) > 4 else "")
        parts.append(f"{len(prompts)} prefill ({shown})")
    return " + ".join(parts)


def _is_mark(name: str) -> bool:
    return name in ("schedule", "wait", "masks", "apply") or name.startswith("launch step ")


def _top(name: str, took: float, count: int, steps: int) -> dict[str, Any]:
    return {"name": name, "us_per_step": round(took / max(steps, 1), 2), "calls_per_step": round(count / max(steps, 1), 2)}


def reduce(events: list[dict[str, Any]]) -> dict[str, Any]:
    """A trace's figures: "steps"; "host_us", medians of what the host does for a step; "top" kernels; and of a GPU "gpu": the share of time that it
    is busy, a step's median span, and the "gap_us" between the end of one step's kernels and the start of the next one's."""
    host: dict[str, list[float]] = defaultdict(list)
    launches: list[tuple[float, float]] = []
    for e in events:
        if e.get("cat") == "user_annotation" and _is_mark(e["name"]):
            host[e["name"].split()[0]].append(e["dur"])
            if e["name"].startswith("launch"):
                launches.append((e["ts"], e["ts"] + e["dur"]))
    launches.sort()
    figures: dict[str, Any] = {"steps": len(launches), "host_us": {name: round(median(times), 1) for name, times in host.items()}, "top": []}
    kernels = sorted((e["ts"], e["ts"] + e["dur"], e["name"], e["args"].get("correlation")) for e in events if e.get("cat") in ON_DEVICE)
    if not kernels or not launches:
        return figures
    totals: dict[str, list[float]] = defaultdict(list)
    for begin, end, name, _ in kernels:
        totals[name].append(end - begin)
    longest = sorted(totals.items(), key=lambda item: -sum(item[1]))[:TOP]
    figures["top"] = [_top(name, sum(times), len(times), len(launches)) for name, times in longest]
    figures["gpu"] = _gpu(events, kernels, launches)
    return figures


def _gpu(events: list[dict[str, Any]], kernels: list[tuple[float, float, str, Any]], launches: list[tuple[float, float]]) -> dict[str, Any]:
    """A kernel belongs to the step in whose launch the host asked for it."""
    step_of: dict[Any, int] = {}
    for e in events:
        if e.get("cat") in LAUNCHES and "correlation" in e.get("args", {}):
            at = bisect_right(launches, (e["ts"], float("inf"))) - 1
            if at >= 0 and e["ts"] <= launches[at][1]:
                step_of[e["args"]["correlation"]] = at
    spans: dict[int, list[float]] = {}
    busy, reached = 0.0, kernels[0][0]
    for begin, end, _, correlation in kernels:
        busy += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
        if correlation in step_of:
            span = spans.setdefault(step_of[correlation], [begin, end])
            span[0], span[1] = min(span[0], begin), max(span[1], end)
    total = reached - kernels[0][0]
    found: dict[str, Any] = {"busy": round(busy / total, 4) if total else 1.0, "seconds": round(total * 1e-6, 6)}
    if spans:
        found["span_us"] = round(median(end - begin for begin, end in spans.values()), 1)
    gaps = sorted(max(0.0, spans[i + 1][0] - spans[i][1]) for i in spans if i + 1 in spans)
    if gaps:
        found["gap_us"] = {"median": round(median(gaps), 1), "p99": round(gaps[int(0.99 * (len(gaps) - 1))], 1), "longest": round(gaps[-1], 1)}
        found["gaps_above_20_us"] = sum(gap > 20 for gap in gaps)
    return found


def table(figures: dict[str, Any]) -> str:
    """The figures as a few lines of text."""
    host, gpu = figures["host_us"], figures.get("gpu")
    work = {name: took for name, took in host.items() if name != "wait"}
    lines = [f"  host     {', '.join(f'{name} {took:.0f}' for name, took in work.items())} us a step (medians, with the profiler's own cost)"]
    if gpu:
        span = gpu.get("span_us", 0.0)
        lines.append(f"  GPU      busy {gpu['busy']:.1%} of {gpu['seconds'] * 1e3:.1f} ms, {figures['steps']} steps of {span:.0f} us")
    if gpu and "gap_us" in gpu:
        gap = gpu["gap_us"]
        lines.append(f"  gaps     between steps {gap['median']} us, 99th percentile {gap['p99']}, longest {gap['longest']}")
    lines.append(f"  {'kernels' if gpu else 'torch  '}  us/step  calls/step")
    lines += [f"        {each['us_per_step']:10,.1f} {each['calls_per_step']:10,.1f}   {each['name'][:100]}" for each in figures["top"]]
    return "\n".join(lines)

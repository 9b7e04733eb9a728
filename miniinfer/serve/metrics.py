"""What the server counts, for /metrics (Prometheus text) and for the throughput line in the log.

Names are vLLM's where vLLM has the metric, so that its dashboards, autoscalers and routers find them; ours begin with miniinfer_. The engine's own
figures are read from `AsyncEngine.stats` when somebody asks; nothing is counted twice. Times are seconds on the server's monotonic clock.
"""

from __future__ import annotations

import asyncio
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import accumulate
from typing import Any, Protocol

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from miniinfer.data import CompletionOutput, SamplingParams
from miniinfer.serve.record import current
from miniinfer.utils import get_logger

log = get_logger(__name__)

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
VLLM, OURS = "vllm:", "miniinfer_"
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
_BETWEEN = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.25, 0.5, 1.0, 2.5)
_TOKENS = tuple(float(digit * 10**power) for power in range(6) for digit in (1, 2, 5))
SLEEP_STATES = ("awake", "weights_offloaded", "discard_all")  # by AsyncEngine.sleep_level
REASONS = ("stop", "length", "abort", "error")  # series that exist from the start, so that their rates do

# name -> (key in the engine's stats, help)
GAUGES = {
    VLLM + "num_requests_running": ("running", "Sequences in the running batch."),
    VLLM + "num_requests_waiting": ("waiting", "Sequences waiting for a place in the batch."),
    VLLM + "kv_cache_usage_perc": ("kv_usage", "Share of the KV pages in use, 0 to 1."),
    OURS + "kv_pages_pinned": ("pinned_pages", "KV pages that pinned prefixes have a right to."),
}
COUNTERS = {
    VLLM + "num_preemptions": ("preemptions", "Sequences put back to waiting to free their pages."),
    VLLM + "prefix_cache_queries": ("prefix_queries", "Prompt tokens looked up in the prefix cache."),
    VLLM + "prefix_cache_hits": ("prefix_hits", "Prompt tokens found in the prefix cache."),
    OURS + "kv_pages_evicted": ("evicted_pages", "Cached KV pages given up for new ones."),
    OURS + "engine_steps": ("steps", "Steps of the engine."),
}
HISTOGRAMS = {
    "first_token": (VLLM + "time_to_first_token_seconds", "Arrival to a choice's first token.", _SECONDS),
    "between_tokens": (VLLM + "inter_token_latency_seconds", "Between a choice's tokens.", _BETWEEN),
    "per_token": (VLLM + "request_time_per_output_token_seconds", "Mean time of a choice's tokens after the first.", _BETWEEN),
    "end_to_end": (VLLM + "e2e_request_latency_seconds", "Arrival to the end of a choice.", _SECONDS),
    "queue": (VLLM + "request_queue_time_seconds", "From the engine's queue into the batch.", _SECONDS),
    "prefill": (VLLM + "request_prefill_time_seconds", "From the batch to a choice's first token.", _SECONDS),
    "decode": (VLLM + "request_decode_time_seconds", "From a choice's first token to its last.", _SECONDS),
    "inference": (VLLM + "request_inference_time_seconds", "From the batch to a choice's end.", _SECONDS),
    "prompt_length": (VLLM + "request_prompt_tokens", "Tokens of a prompt.", _TOKENS),
    "output_length": (VLLM + "request_generation_tokens", "Tokens of a choice.", _TOKENS),
    "longest_output": (VLLM + "request_max_num_generation_tokens", "Tokens of the longest choice of a prompt.", _TOKENS),
    "computed_length": (VLLM + "request_prefill_kv_computed_tokens", "Tokens of a prompt that were not in the prefix cache.", _TOKENS),
    "params_n": (VLLM + "request_params_n", "Choices that a prompt asks for.", _TOKENS[:8]),
    "params_max_tokens": (VLLM + "request_params_max_tokens", "Most tokens of a choice that a prompt asks for, if it says so.", _TOKENS),
}


class Histogram:
    """Counts of values by upper bound. prometheus_client's own takes a lock and ten times as long, which 256 streams feel."""

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts, self.sum = [0] * (len(bounds) + 1), 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    def buckets(self) -> list[tuple[str, float]]:
        return list(zip([*map(str, self.bounds), "+Inf"], map(float, accumulate(self.counts)), strict=True))


class Engine(Protocol):
    """What is read of an engine."""

    stats: dict[str, float]
    info: dict[str, Any]
    sleep_level: int


class Metrics:
    """One model's counters. Belongs to the event loop's thread, hence no locks."""

    def __init__(self, engine: Callable[[], Engine], model: str) -> None:
        """`engine`: the one that serves the model at the moment."""
        self.model = model
        self._engine = engine
        self.prompt_tokens = 0
        self.generation_tokens = 0
        self.finished: Counter[str] = Counter(dict.fromkeys(REASONS, 0))  # choices by reason
        self.refused: Counter[str] = Counter()  # requests by HTTP status
        histograms = {key: Histogram(bounds) for key, (_, _, bounds) in HISTOGRAMS.items()}
        self.first_token, self.between_tokens = histograms["first_token"], histograms["between_tokens"]
        self.histograms = histograms

    @property
    def engine_stats(self) -> Mapping[str, float]:
        return self._engine().stats

    def families(self) -> Iterable[Metric]:
        """Everything, as of now, labelled with the model's name."""
        engine, label, value = self._engine(), ["model_name"], [self.model]
        stats, info, shape = engine.stats, engine.info, ("block_size", "num_gpu_blocks")
        for name, (key, text) in GAUGES.items():
            yield _filled(GaugeMetricFamily(name, text, labels=label), {(): stats.get(key, 0)}, value)
        states: dict[tuple[str, ...], float] = {(state,): float(engine.sleep_level == level) for level, state in enumerate(SLEEP_STATES)}
        yield _filled(GaugeMetricFamily(VLLM + "engine_sleep_state", "1 for the state it is in.", labels=[*label, "sleep_state"]), states, value)
        for name, (key, text) in COUNTERS.items():
            yield _filled(CounterMetricFamily(name, text, labels=label), {(): stats.get(key, 0)}, value)
        yield _filled(CounterMetricFamily(VLLM + "prompt_tokens", "Tokens of prompts begun.", labels=label), {(): self.prompt_tokens}, value)
        yield _filled(CounterMetricFamily(VLLM + "generation_tokens", "Tokens generated.", labels=label), {(): self.generation_tokens}, value)
        reasons = CounterMetricFamily(VLLM + "request_success", "Choices ended, by reason.", labels=[*label, "finished_reason"])
        yield _filled(reasons, {(reason,): count for reason, count in self.finished.items()}, value)
        errors = CounterMetricFamily(OURS + "request_errors", "Requests answered with an error, by HTTP status.", labels=[*label, "status"])
        yield _filled(errors, {(status,): count for status, count in sorted(self.refused.items())}, value)
        if "page_size" in info:
            config = GaugeMetricFamily(VLLM + "cache_config_info", "Tokens in a KV page, and pages; always 1.", labels=[*label, *shape])
            yield _filled(config, {(str(info["page_size"]), str(min(info["num_pages"]))): 1}, value)
        for key, (name, text, _) in HISTOGRAMS.items():
            family = HistogramMetricFamily(name, text, labels=label)
            family.add_metric(value, self.histograms[key].buckets(), self.histograms[key].sum)
            yield family


def _filled(family: Any, values: Mapping[tuple[str, ...], float], labels: list[str]) -> Metric:
    for more, value in values.items():
        family.add_metric([*labels, *more], value)
    return family


class _Page(Collector):
    """Several models' metrics under common heads."""

    def __init__(self, models: Sequence[Metrics], plain: bool) -> None:
        self._models, self._plain = models, plain

    def collect(self) -> Iterable[Metric]:
        families: dict[str, Metric] = {}
        for model in self._models:
            for family in model.families():
                if self._plain:
                    _rename(family)
                families.setdefault(family.name, family)
                if families[family.name] is not family:
                    families[family.name].samples.extend(family.samples)
        return families.values()


def _rename(family: Metric) -> None:
    family.name = family.name.replace(VLLM, OURS)
    family.samples = [sample._replace(name=sample.name.replace(VLLM, OURS)) for sample in family.samples]


def render(models: Sequence[Metrics], plain: bool = False) -> bytes:
    """The page of /metrics. `plain`: all names begin with miniinfer_, because Prometheus's own lint allows no colon in an exported name."""
    registry = CollectorRegistry()
    registry.register(_Page(models, plain))
    return generate_latest(registry)


class Timer:
    """Follows the choices of one answer. `update` is called for every update of every stream, so it does little."""

    def __init__(
        self, metrics: Metrics, answer_id: str, prompts: Sequence[int], choices: int, params: SamplingParams, background: bool = False
    ) -> None:
        """`prompts`: the prompts' lengths; choice i belongs to prompt i * len(prompts) // choices. `background`: nobody waits for it, so its times
        are none of those that clients see."""
        self._metrics, self._start, self._timed = metrics, time.monotonic(), not background
        self._first = [0.0] * choices
        self._last = [0.0] * choices
        self._tokens = [0] * choices
        self._reasons: list[str | None] = [None] * choices
        self._queued: list[float | None] = [None] * len(prompts)
        self._prompts = prompts
        metrics.prompt_tokens += sum(prompts)
        for length in prompts:
            metrics.histograms["prompt_length"].observe(length)
            metrics.histograms["params_n"].observe(params.n)
            if params.max_tokens is not None:
                metrics.histograms["params_max_tokens"].observe(params.max_tokens)
        self._record = current.get()
        if self._record is not None:
            self._record.answer_id, self._record.model, self._record.params = answer_id, metrics.model, params

    def admitted(self, prompt: int, queued: float) -> None:
        """Before a prompt's first token: how long it has waited."""
        self._queued[prompt] = queued
        if self._timed:
            self._metrics.histograms["queue"].observe(queued)

    def update(self, index: int, delta: CompletionOutput) -> None:
        metrics, now, tokens = self._metrics, time.monotonic(), len(delta.token_ids)
        if tokens:
            metrics.generation_tokens += tokens
            self._tokens[index] += tokens
            last, self._last[index] = self._last[index], now
            if last and self._timed:
                metrics.between_tokens.observe((now - last) / tokens)  # the mean, if an update brings several
            elif not last:
                self._first[index] = now
                if self._timed:
                    metrics.first_token.observe(now - self._start)
        if delta.finish_reason is not None:
            self._end(index, delta.finish_reason, now)

    def _end(self, index: int, reason: str, now: float) -> None:
        self._reasons[index] = reason
        metrics, histograms = self._metrics, self._metrics.histograms
        metrics.finished[reason] += 1
        histograms["output_length"].observe(self._tokens[index])
        if not self._timed:
            return
        histograms["end_to_end"].observe(now - self._start)
        first, last, tokens = self._first[index], self._last[index], self._tokens[index]
        if tokens > 1:
            histograms["per_token"].observe((last - first) / (tokens - 1))
            histograms["decode"].observe(last - first)
        queued = self._queued[index * len(self._queued) // len(self._tokens)]
        if queued is not None and first:
            histograms["prefill"].observe(max(0.0, first - self._start - queued))
            histograms["inference"].observe(max(0.0, last - self._start - queued))

    def close(self, end: str, cached_tokens: Sequence[int]) -> None:
        """Nothing more will come: counts choices that have not ended as `end`, and tells the request's record. `cached_tokens`: of each prompt."""
        for index, reason in enumerate(self._reasons):
            if reason is None:
                self._reasons[index] = end
                self._metrics.finished[end] += 1
        choices = len(self._tokens) // len(self._prompts)
        for i, (length, cached) in enumerate(zip(self._prompts, cached_tokens, strict=True)):
            if longest := max(self._tokens[i * choices : (i + 1) * choices]):
                self._metrics.histograms["longest_output"].observe(longest)
                self._metrics.histograms["computed_length"].observe(length - cached)
        record = self._record
        if record is None:
            return
        record.prompt_tokens += sum(self._prompts)
        record.cached_tokens += sum(cached_tokens)
        record.output_tokens += sum(self._tokens)
        record.finish_reasons += [reason for reason in self._reasons if reason is not None]
        record.queued = self._queued[0] if record.queued is None else record.queued
        began = [first for first in self._first if first]
        if began and record.first_token is None:
            record.first_token = min(began) - record.start


async def log_throughput(models: Callable[[], Sequence[Metrics]], interval: float = 10.0) -> None:
    """One line for each model, every `interval` seconds in which it did something; runs until cancelled."""
    before: dict[str, tuple[int, int]] = {}
    while True:
        await asyncio.sleep(interval)
        all_models = models()
        for metrics in all_models:
            prompt, generated = before.get(metrics.model, (0, 0))
            before[metrics.model] = metrics.prompt_tokens, metrics.generation_tokens
            new_prompt, new_generated, now = metrics.prompt_tokens - prompt, metrics.generation_tokens - generated, metrics.engine_stats
            if not (new_prompt or new_generated or now.get("running") or now.get("waiting")):
                continue
            hits, queries = now.get("prefix_hits", 0.0), now.get("prefix_queries", 0.0)
            log.info(
                "%s%d running, %d waiting; prompts %.0f tok/s, generation %.0f tok/s; %.0f %% of KV pages in use, %.0f %% of prompts from the cache",
                f"{metrics.model}: " if len(all_models) > 1 else "",
                now.get("running", 0),
                now.get("waiting", 0),
                new_prompt / interval,
                new_generated / interval,
                100 * now.get("kv_usage", 0.0),
                100 * hits / queries if queries else 0.0,
            )

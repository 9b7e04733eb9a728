"""What the server counts, for /metrics (Prometheus text) and for the throughput line in the log.

Owns a registry of its own, so that several servers fit into one process. The engine's own figures are read from `AsyncEngine.stats` when
somebody asks; nothing is counted twice. Times are seconds on the server's monotonic clock.
"""

from __future__ import annotations

import asyncio
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from itertools import accumulate

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from miniinfer.data import CompletionOutput
from miniinfer.utils import get_logger

log = get_logger(__name__)

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
_BETWEEN = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.25, 0.5, 1.0, 2.5)

# name of ours -> (key in the engine's stats, help)
GAUGES = {
    "miniinfer_requests_running": ("running", "Sequences in the running batch."),
    "miniinfer_requests_waiting": ("waiting", "Sequences waiting for a place in the batch."),
    "miniinfer_kv_cache_usage": ("kv_usage", "Share of the KV pages in use, 0 to 1."),
}
COUNTERS = {
    "miniinfer_preemptions": ("preemptions", "Sequences put back to waiting to free their pages."),
    "miniinfer_prefix_cache_queries": ("prefix_queries", "Prompt tokens looked up in the prefix cache."),
    "miniinfer_prefix_cache_hits": ("prefix_hits", "Prompt tokens found in the prefix cache."),
}


class Histogram:
    """Counts of values by upper bound. prometheus_client's own takes a lock and ten times as long, which 256 streams feel."""

    def __init__(self, name: str, text: str, bounds: tuple[float, ...]) -> None:
        self.name, self.text, self.bounds = name, text, bounds
        self.counts, self.sum = [0] * (len(bounds) + 1), 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    def collect(self) -> Metric:
        labels = [*map(str, self.bounds), "+Inf"]
        return HistogramMetricFamily(self.name, self.text, buckets=list(zip(labels, accumulate(self.counts), strict=True)), sum_value=self.sum)


class Metrics(Collector):
    """The server's counters and its registry. Belongs to the event loop's thread, hence no locks."""

    def __init__(self, stats: Callable[[], Mapping[str, float]]) -> None:
        self._stats = stats
        self.prompt_tokens = 0
        self.generation_tokens = 0
        self.finished: Counter[str] = Counter()  # by reason
        self.refused: Counter[str] = Counter()  # by HTTP status
        self.first_token = Histogram("miniinfer_time_to_first_token_seconds", "Arrival to a choice's first token.", _SECONDS)
        self.between_tokens = Histogram("miniinfer_inter_token_latency_seconds", "Between a choice's tokens.", _BETWEEN)
        self.end_to_end = Histogram("miniinfer_e2e_request_latency_seconds", "Arrival to the end of a choice.", _SECONDS)
        self._registry = CollectorRegistry()
        self._registry.register(self)

    def collect(self) -> Iterable[Metric]:
        """Everything, as of the scrape."""
        stats = self._stats()
        for name, (key, text) in GAUGES.items():
            yield GaugeMetricFamily(name, text, value=stats.get(key, 0))
        for name, (key, text) in COUNTERS.items():
            yield CounterMetricFamily(name, text, value=stats.get(key, 0))
        yield CounterMetricFamily("miniinfer_prompt_tokens", "Prompt tokens of the requests begun.", value=self.prompt_tokens)
        yield CounterMetricFamily("miniinfer_generation_tokens", "Tokens generated.", value=self.generation_tokens)
        yield _by_label("miniinfer_request_success", "Choices ended, by reason.", "finished_reason", self.finished)
        yield _by_label("miniinfer_request_errors", "Requests answered with an error, by HTTP status.", "status", self.refused)
        yield from (h.collect() for h in (self.first_token, self.between_tokens, self.end_to_end))

    def render(self) -> bytes:
        return generate_latest(self._registry)


def _by_label(name: str, text: str, label: str, values: Mapping[str, int]) -> Metric:
    family = CounterMetricFamily(name, text, labels=[label])
    for key, value in sorted(values.items()):
        family.add_metric([key], value)
    return family


class Timer:
    """Follows one request's choices. Called for every update of every stream, so it does little."""

    def __init__(self, metrics: Metrics, choices: int) -> None:
        self._metrics, self._start = metrics, time.monotonic()
        self._last = [0.0] * choices

    def update(self, index: int, delta: CompletionOutput) -> None:
        metrics, now, tokens = self._metrics, time.monotonic(), len(delta.token_ids)
        if tokens:
            metrics.generation_tokens += tokens
            last, self._last[index] = self._last[index], now
            if last:
                metrics.between_tokens.observe((now - last) / tokens)  # the mean, if an update brings several
            else:
                metrics.first_token.observe(now - self._start)
        if delta.finish_reason is not None:
            metrics.finished[delta.finish_reason] += 1
            metrics.end_to_end.observe(now - self._start)


async def log_throughput(metrics: Metrics, stats: Callable[[], Mapping[str, float]], interval: float = 10.0) -> None:
    """One line every `interval` seconds in which something was done; runs until cancelled."""
    prompt, generated = metrics.prompt_tokens, metrics.generation_tokens
    while True:
        await asyncio.sleep(interval)
        new_prompt, new_generated, now = metrics.prompt_tokens - prompt, metrics.generation_tokens - generated, stats()
        prompt, generated = metrics.prompt_tokens, metrics.generation_tokens
        if not (new_prompt or new_generated or now.get("running") or now.get("waiting")):
            continue
        hits, queries = now.get("prefix_hits", 0.0), now.get("prefix_queries", 0.0)
        log.info(
            "%d running, %d waiting; prompts %.0f tok/s, generation %.0f tok/s; KV pages %.0f %% in use, %.0f %% of prompt tokens from the cache",
            now.get("running", 0),
            now.get("waiting", 0),
            new_prompt / interval,
            new_generated / interval,
            100 * now.get("kv_usage", 0.0),
            100 * hits / queries if queries else 0.0,
        )

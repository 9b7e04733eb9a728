"""`miniinfer bench serving`: load on any OpenAI-compatible server, and the latencies that its clients see.

Owns the load (open loop at a rate or at a trace's times, or a fixed number of clients), the HTTP client and the percentiles. Requests from
files are traces.py's, plots plot.py's. Every request streams; times are taken when bytes arrive. The client is asyncio's streams with httptools'
parser, the one that uvicorn uses, so that it stays cheap beside a server on the same machine.

TTFT: request sent to first text. TPOT: (last text - first text) / (output tokens - 1). ITL: gap between two pieces of text. E2E: to the end.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import ssl
import time
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httptools
import uvloop

from miniinfer.bench import plot, traces
from miniinfer.config import ConfigError, opt

WORDS = (
    "time year people way day man thing woman life child world school state family student group country problem hand part place case week "
    "company system program question work government number night point home water room mother area money story fact month lot right study "
    "book eye job word business issue side kind head house service friend father power hour game line end member law car city name"
).split()


@dataclass(frozen=True, kw_only=True)
class ServingBench:
    """The server and the load. Give --rate or --concurrency."""

    url: str = opt("http://127.0.0.1:8000", "the server")
    model: str | None = opt(None, "model name (the first that the server lists)")
    api_key: str | None = opt(None, "bearer token")
    endpoint: str = opt("completions", "completions or chat", ("completions", "chat"))
    num_requests: int | None = opt(None, "requests in all (200, or as many as the dataset has)")
    dataset: str | None = opt(None, "JSONL file of conversations, prompts or a trace with times, instead of random prompts: see bench/traces.py")
    rate: float | None = opt(None, "open loop: requests started per second, Poisson-distributed, whatever the server does")
    burstiness: float = opt(1.0, "shape of the gaps between arrivals: 1 = Poisson, less = bursts, more = even")
    concurrency: int | None = opt(None, "closed loop: clients, each with one request at a time (16, if no rate is given)")
    input_len: str = opt("100:1024", "prompt length, or shortest:longest")
    output_len: str = opt("100:1024", "output tokens, or fewest:most")
    prompt: str = opt("words", "random words (length in words), or random token ids (completions only)", ("words", "tokens"))
    ignore_eos: bool = opt(True, "let an end-of-text token end an output (a field that OpenAI's own API lacks)")
    temperature: float = opt(0.6, "sampling temperature")
    timeout: float = opt(600.0, "seconds after which a request counts as failed")
    seed: int = opt(0, "seed of lengths, prompts and arrivals")
    slo: str | None = opt(None, "objectives in ms, such as ttft=200,tpot=20 (or e2e): goodput counts the requests that meet them all")
    result: str | None = opt(None, "file for the result, with every request's times, as JSON")
    plot: str | None = opt(None, "file for plots of the latencies and of the load over time, as SVG")
    json: bool = opt(False, "print the JSON line only")

    def __post_init__(self) -> None:
        if self.rate is not None and self.concurrency is not None:
            raise ConfigError("rate and concurrency exclude each other: an open loop starts requests whatever the server does")
        for name, least in (("num_requests", 1), ("concurrency", 1), ("rate", 1e-9), ("burstiness", 1e-9), ("timeout", 1e-9), ("temperature", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ConfigError(f"{name}: must be {'positive' if least else '0 or more'}, got {value}")
        if self.prompt == "tokens" and self.endpoint == "chat":
            raise ConfigError("prompt: a chat takes no token ids; use --endpoint completions")
        for name in ("input_len", "output_len"):
            lengths(name, getattr(self, name))
        objectives(self.slo)
        for name in ("result", "plot"):
            folder = Path(getattr(self, name) or ".").parent
            if not folder.is_dir():
                raise ConfigError(f"{name}: there is no folder {folder}")
        if urlsplit(self.url).scheme not in ("http", "https") or not urlsplit(self.url).hostname:
            raise ConfigError(f"url: expected http://host:port or https://..., got {self.url!r}")


def lengths(name: str, text: str) -> tuple[int, int]:
    """ "100:1024" or "512" as (shortest, longest)."""
    try:
        low, high = (int(part) for part in (text.split(":") if ":" in text else (text, text)))
    except ValueError:
        low, high = 0, 0
    if not 1 <= low <= high:
        raise ConfigError(f"{name}: expected a length or shortest:longest, got {text!r}")
    return low, high


def objectives(text: str | None) -> dict[str, float]:
    """ "ttft=200,tpot=20" as milliseconds by latency."""
    found: dict[str, float] = {}
    for part in (text or "").split(",") if text is not None else ():
        name, _, value = part.strip().partition("=")
        try:
            found[name] = float(value)
        except ValueError:
            found[name] = 0.0
        if name not in ("ttft", "tpot", "e2e") or not 0 < found[name] < float("inf"):
            raise ConfigError(f"slo: expected ttft=MS, tpot=MS or e2e=MS, separated by commas, got {part.strip()!r}")
    return found


# ----------------------------------------------------------------------------------------------------------- HTTP


class HttpError(Exception):
    """The server answered with an error, or not at all, or stopped in the middle; the message says which."""


class _Response:
    """httptools' callbacks for one response."""

    def __init__(self) -> None:
        self.body: list[bytes] = []
        self.complete = False

    def on_body(self, data: bytes) -> None:
        self.body.append(data)

    def on_message_complete(self) -> None:
        self.complete = True


async def fetch(method: str, url: str, api_key: str | None, body: bytes = b"") -> AsyncGenerator[bytes, None]:
    """Sends a request on a connection of its own and yields the body as it arrives. Raises HttpError."""
    parts = urlsplit(url)
    secure = ssl.create_default_context() if parts.scheme == "https" else None
    try:
        reader, writer = await asyncio.open_connection(parts.hostname, parts.port or (443 if secure else 80), ssl=secure)
    except OSError as e:
        raise HttpError(f"cannot connect: {e.strerror or e}") from None
    try:
        head = [f"{method} {parts.path} HTTP/1.1", f"Host: {parts.netloc}", "Content-Type: application/json", f"Content-Length: {len(body)}"]
        head += [f"Authorization: Bearer {api_key}"] if api_key else []
        writer.write("\r\n".join([*head, "Connection: close", "", ""]).encode() + body)
        response = _Response()
        parser = httptools.HttpResponseParser(response)
        refusal = b""
        while not response.complete:
            data = await reader.read(1 << 16)
            if not data and parser.get_http_version() == "1.0":
                break  # a body that the end of the connection ends
            if not data:
                raise HttpError("the connection ended in the middle of the response")
            parser.feed_data(data)
            arrived, response.body = b"".join(response.body), []
            if parser.get_status_code() >= 400:
                refusal += arrived
            elif arrived:
                yield arrived
        if parser.get_status_code() >= 400:
            raise HttpError(f"{parser.get_status_code()}: {refusal[:300].decode(errors='replace')}")
    except (OSError, httptools.HttpParserError) as e:
        raise HttpError(f"{type(e).__name__}: {e}") from None
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


async def events(body: AsyncIterator[bytes]) -> AsyncIterator[dict[str, Any]]:
    """The JSON objects of a server-sent event stream. HttpError if its [DONE] is missing or an event is an error."""
    rest, done = b"", False
    async for data in body:
        *lines, rest = (rest + data).split(b"\n")
        for line in lines:
            if not line.startswith(b"data:"):
                continue
            payload = line[5:].strip()
            if payload == b"[DONE]":
                done = True
                continue
            event = json.loads(payload)
            if "error" in event:
                raise HttpError(f"error event: {event['error']}")
            yield event
    if not done:
        raise HttpError("the stream ended without [DONE]")


# ----------------------------------------------------------------------------------------------------------- load


@dataclass(slots=True)
class Timing:
    """One request as its client saw it; seconds on one clock."""

    sent: float
    texts: list[float] = field(default_factory=list)  # when each piece of text came
    ended: float = 0.0
    prompt_tokens: int = 0
    output_tokens: int = 0
    error: str | None = None

    def latency(self, name: str) -> float | None:
        """Seconds of "ttft", "tpot" or "e2e"; None where there is none."""
        if name == "ttft":
            return self.texts[0] - self.sent if self.texts else None
        if name == "tpot":
            return (self.texts[-1] - self.texts[0]) / (self.output_tokens - 1) if self.output_tokens > 1 and self.texts else None
        return self.ended - self.sent

    def note(self, event: dict[str, Any], now: float) -> None:
        """Takes in one event of the stream."""
        choice = (event.get("choices") or [{}])[0]
        if choice.get("text") or choice.get("delta", {}).get("content"):
            self.texts.append(now)
        usage = event.get("usage") or {}
        self.prompt_tokens = usage.get("prompt_tokens", self.prompt_tokens)
        self.output_tokens = usage.get("completion_tokens", self.output_tokens)


class Load:
    """The requests, drawn from the seed, and what became of them."""

    def __init__(self, bench: ServingBench, model: str) -> None:
        self.bench, self.model = bench, model
        self.base = base_url(bench.url)
        rng = random.Random(bench.seed)
        self.items = self._drawn(rng) if bench.dataset is None else self._read(bench.dataset)
        self.bodies = [self._body(item) for item in self.items]
        self.gaps = [rng.gammavariate(bench.burstiness, 1 / (bench.rate * bench.burstiness)) if bench.rate else 0.0 for _ in self.bodies]
        self.timed = self.items[0].at is not None and bench.rate is None and bench.concurrency is None
        if self.timed:
            times = [item.at or 0.0 for item in self.items]
            self.gaps = [after - before for before, after in zip([0.0, *times], times, strict=False)]

    def _drawn(self, rng: random.Random) -> list[traces.Item]:
        """Random prompts, of random lengths."""
        shortest, longest = lengths("input_len", self.bench.input_len)
        fewest, most = lengths("output_len", self.bench.output_len)
        items = []
        for _ in range(self.bench.num_requests or 200):
            size, output = rng.randint(shortest, longest), rng.randint(fewest, most)
            if self.bench.prompt == "tokens":
                items.append(traces.Item([rng.randrange(256, 4096) for _ in range(size)], output))  # ids that every vocabulary has
            else:
                items.append(traces.Item(" ".join(rng.choices(WORDS, k=size)), output))
        return items

    def _read(self, path: str) -> list[traces.Item]:
        items = traces.read(path, WORDS, self.bench.prompt == "tokens", self.bench.num_requests)
        if self.bench.endpoint == "chat" and any(isinstance(item.prompt, list) and isinstance(item.prompt[0], int) for item in items):
            raise ConfigError(f"endpoint: {path} has prompts of token ids, which a chat does not take; use --endpoint completions")
        return items

    def _body(self, item: traces.Item) -> bytes:
        bench, prompt = self.bench, item.prompt
        body: dict[str, Any] = {"model": self.model, "max_tokens": item.output, "temperature": bench.temperature, "stream": True}
        body["stream_options"] = {"include_usage": True}
        if bench.ignore_eos:
            body["ignore_eos"] = True
        messages = prompt if isinstance(prompt, list) and isinstance(prompt[0], dict) else None
        if bench.endpoint == "chat":
            body["messages"] = messages or [{"role": "user", "content": prompt}]
        else:
            body["prompt"] = prompt if messages is None else "\n\n".join(str(message["content"]) for message in messages)
        return json.dumps(body).encode()

    async def one(self, body: bytes) -> Timing:
        """Sends one request and times it; failures are recorded, not raised."""
        timing = Timing(sent=time.perf_counter())
        path = "/chat/completions" if self.bench.endpoint == "chat" else "/completions"
        try:
            async with asyncio.timeout(self.bench.timeout):
                async with contextlib.aclosing(fetch("POST", self.base + path, self.bench.api_key, body)) as answer:
                    async for event in events(answer):
                        timing.note(event, time.perf_counter())
            if not timing.texts:
                timing.error = "no text"
        except TimeoutError:
            timing.error = f"no end within {self.bench.timeout:g} s"
        except (HttpError, json.JSONDecodeError) as e:
            timing.error = str(e)
        timing.ended = time.perf_counter()
        timing.output_tokens = timing.output_tokens or len(timing.texts)  # a server that reports no usage
        return timing

    async def run(self, done: Callable[[], object]) -> list[Timing]:
        """All requests; `done` is called as each ends."""

        async def counted(work: Awaitable[Timing]) -> Timing:
            timing = await work
            done()
            return timing

        if self.bench.rate or self.timed:
            tasks = []
            due = time.perf_counter()
            for body, gap in zip(self.bodies, self.gaps, strict=True):
                due += gap
                await asyncio.sleep(max(0.0, due - time.perf_counter()))
                tasks.append(asyncio.create_task(counted(self.one(body))))
            return list(await asyncio.gather(*tasks))
        results: list[Timing] = []
        bodies = iter(self.bodies)

        async def client() -> None:
            for body in bodies:
                results.append(await counted(self.one(body)))

        await asyncio.gather(*(client() for _ in range(self.bench.concurrency or 16)))
        return results


def base_url(url: str) -> str:
    return url.rstrip("/").removesuffix("/v1") + "/v1"


# -------------------------------------------------------------------------------------------------------- figures


def percentile(values: Iterable[float], percent: float) -> float:
    """Linear interpolation between the closest ranks; NaN of nothing."""
    ordered = sorted(values)
    if not ordered:
        return float("nan")
    at = (len(ordered) - 1) * percent / 100
    low = int(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (at - low)


def summary(timings: list[Timing], slo: dict[str, float] | None = None) -> dict[str, Any]:
    """Throughput in tokens and requests per second; latencies in milliseconds, as mean, p50, p90, p99; errors by message.

    With objectives (ms), goodput: requests per second, and their share of all, that ended without an error and met every objective."""
    good = [t for t in timings if t.error is None]
    seconds = max(t.ended for t in timings) - min(t.sent for t in timings)
    kinds = {f"{name}_ms": [value for t in good if (value := t.latency(name)) is not None] for name in ("ttft", "tpot")}
    kinds["itl_ms"] = [b - a for t in good for a, b in zip(t.texts, t.texts[1:], strict=False)]
    kinds["e2e_ms"] = [t.ended - t.sent for t in good]
    latencies = {
        name: {"mean": _ms(sum(values) / len(values)), **{f"p{p}": _ms(percentile(values, p)) for p in (50, 90, 99)}} if values else None
        for name, values in kinds.items()
    }
    figures: dict[str, Any] = {
        "requests": len(timings),
        "errors": len(timings) - len(good),
        "error_kinds": dict(Counter(t.error for t in timings if t.error is not None).most_common(5)),
        "seconds": round(seconds, 3),
        "requests_per_s": round(len(good) / seconds, 3),
        "prompt_tok_per_s": round(sum(t.prompt_tokens for t in good) / seconds, 1),
        "output_tok_per_s": round(sum(t.output_tokens for t in good) / seconds, 1),
        **latencies,
    }
    if slo:
        met = sum(all((value := t.latency(name)) is None or value * 1e3 <= limit for name, limit in slo.items()) for t in good)
        figures["goodput"] = {"slo_ms": slo, "requests_per_s": round(met / seconds, 3), "share": round(met / len(timings), 4)}
    return figures


def _ms(seconds: float) -> float:
    return round(seconds * 1e3, 3)


def main(bench: ServingBench) -> int:
    """Runs the load and prints the figures; the last line is one JSON object. 1 if every request failed."""
    return uvloop.run(_main(bench))


async def _main(bench: ServingBench) -> int:
    from tqdm import tqdm

    model = bench.model or await first_model(bench)
    load = Load(bench, model)
    bar = tqdm(total=len(load.bodies), unit="req", disable=bench.json or None)  # None: shown on a terminal only
    timings = await load.run(bar.update)
    bar.close()
    figures = summary(timings, objectives(bench.slo))
    if not bench.json:
        _print(load, figures)
    names = ("url", "endpoint", "dataset", "rate", "burstiness", "concurrency", "input_len", "output_len", "prompt", "seed")
    last = {"bench": "serving", "model": model, **{name: getattr(bench, name) for name in names}, **figures}
    if bench.result is not None:
        Path(bench.result).write_text(json.dumps({**last, "each": _each(timings)}) + "\n", encoding="utf-8")
    if bench.plot is not None:
        Path(bench.plot).write_text(plots(f"{model}: {_loop(load)}", timings, objectives(bench.slo)), encoding="utf-8")
    print(json.dumps(last))
    return 1 if figures["errors"] == len(timings) else 0


def _loop(load: Load) -> str:
    bench = load.bench
    if load.timed:
        return f"{len(load.bodies)} requests at their trace's times"
    return f"{len(load.bodies)} requests, " + (f"{bench.rate:g} requests/s" if bench.rate else f"{bench.concurrency or 16} clients")


def _print(load: Load, figures: dict[str, Any]) -> None:
    print(f"{load.model} at {load.base}: {_loop(load)}, {figures['errors']} errors, {figures['seconds']:.1f} s")
    print(f"{figures['requests_per_s']:.2f} requests/s, {figures['prompt_tok_per_s']:,.0f} tok/s in, {figures['output_tok_per_s']:,.0f} tok/s out")
    if goodput := figures.get("goodput"):
        print(f"goodput {goodput['requests_per_s']:.2f} requests/s, {100 * goodput['share']:.1f} % of all, at {load.bench.slo} ms")
    print(f"{'ms':6}" + "".join(f"{column:>12}" for column in ("mean", "p50", "p90", "p99")))
    for name in ("ttft_ms", "tpot_ms", "itl_ms", "e2e_ms"):
        if figures[name]:
            print(f"{name[:-3].upper():6}" + "".join(f"{value:12,.2f}" for value in figures[name].values()))
    for message, count in figures["error_kinds"].items():
        print(f"{count} x {message}")


def _each(timings: list[Timing]) -> list[dict[str, Any]]:
    """Every request: seconds from the first one's start, and latencies in milliseconds."""
    start = min(t.sent for t in timings)
    rows = []
    for t in sorted(timings, key=lambda t: t.sent):
        row: dict[str, Any] = {"sent": round(t.sent - start, 4), "prompt_tokens": t.prompt_tokens, "output_tokens": t.output_tokens}
        row |= {f"{name}_ms": _ms(value) for name in ("ttft", "tpot", "e2e") if (value := t.latency(name)) is not None}
        rows.append(row | ({"error": t.error} if t.error is not None else {}))
    return rows


def plots(title: str, timings: list[Timing], slo: dict[str, float]) -> str:
    """The SVG page: three latencies' distributions, and requests open and tokens per second over time."""
    good = [t for t in timings if t.error is None]
    start = min(t.sent for t in timings)
    seconds = max(t.ended for t in timings) - start
    names = {"ttft": "Time to first token", "tpot": "Time per output token", "e2e": "Whole request"}
    panels = []
    for name, text in names.items():
        values = [value * 1e3 for t in good if (value := t.latency(name)) is not None]
        panels.append(plot.Panel(text, "ms", "share of requests", {name: plot.distribution(values)}, slo.get(name)))
    spans = [(t.sent - start, t.ended - start) for t in timings]
    panels.append(plot.Panel("Requests open", "s", "", {"open": plot.open_at(spans, seconds)}))
    tokens = [(at - start, t.output_tokens / len(t.texts)) for t in good for at in t.texts]
    panels.append(plot.Panel("Output tokens per second", "s", "", {"tokens": plot.over_time(tokens, seconds)}))
    arrivals = [(t.sent - start, 1.0) for t in timings]
    ends = [(t.ended - start, 1.0) for t in good]
    lines = {"arrivals": plot.over_time(arrivals, seconds, 30), "ends": plot.over_time(ends, seconds, 30)}
    panels.append(plot.Panel("Requests per second", "s", "", lines))
    return plot.page(title, panels)


async def first_model(bench: ServingBench) -> str:
    """The first model that the server lists. Raises ConfigError if it cannot be asked."""
    try:
        body = b"".join([data async for data in fetch("GET", base_url(bench.url) + "/models", bench.api_key)])
        return str(json.loads(body)["data"][0]["id"])
    except HttpError as e:
        raise ConfigError(f"url: {bench.url}: {e}") from None
    except (json.JSONDecodeError, LookupError, TypeError):
        raise ConfigError(f"url: {bench.url} lists no models; give --model") from None

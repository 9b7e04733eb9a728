"""`miniinfer bench serving`: load on any OpenAI-compatible server, and the latencies that its clients see.

Owns the load (open loop at a Poisson rate, or a fixed number of clients), the HTTP client and the percentiles. Every request streams; times
are taken when bytes arrive. The client is asyncio's streams with httptools' parser, the one that uvicorn uses, so that it stays cheap
beside a server on the same machine.

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
from typing import Any
from urllib.parse import urlsplit

import httptools
import uvloop

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
    num_requests: int = opt(200, "requests in all")
    rate: float | None = opt(None, "open loop: requests started per second, Poisson-distributed, whatever the server does")
    concurrency: int | None = opt(None, "closed loop: clients, each with one request at a time (16, if no rate is given)")
    input_len: str = opt("100:1024", "prompt length, or shortest:longest")
    output_len: str = opt("100:1024", "output tokens, or fewest:most")
    prompt: str = opt("words", "random words (length in words), or random token ids (completions only)", ("words", "tokens"))
    ignore_eos: bool = opt(True, "let an end-of-text token end an output (a field that OpenAI's own API lacks)")
    temperature: float = opt(0.6, "sampling temperature")
    timeout: float = opt(600.0, "seconds after which a request counts as failed")
    seed: int = opt(0, "seed of lengths, prompts and arrivals")
    json: bool = opt(False, "print the JSON line only")

    def __post_init__(self) -> None:
        if self.rate is not None and self.concurrency is not None:
            raise ConfigError("rate and concurrency exclude each other: an open loop starts requests whatever the server does")
        for name, least in (("num_requests", 1), ("concurrency", 1), ("rate", 1e-9), ("timeout", 1e-9), ("temperature", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ConfigError(f"{name}: must be {'positive' if least else '0 or more'}, got {value}")
        if self.prompt == "tokens" and self.endpoint == "chat":
            raise ConfigError("prompt: a chat takes no token ids; use --endpoint completions")
        for name in ("input_len", "output_len"):
            lengths(name, getattr(self, name))
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
        self.bench = bench
        self.base = base_url(bench.url)
        rng = random.Random(bench.seed)
        shortest, longest = lengths("input_len", bench.input_len)
        fewest, most = lengths("output_len", bench.output_len)
        self.bodies = [self._body(rng, model, rng.randint(shortest, longest), rng.randint(fewest, most)) for _ in range(bench.num_requests)]
        self.gaps = [rng.expovariate(bench.rate) if bench.rate else 0.0 for _ in self.bodies]

    def _body(self, rng: random.Random, model: str, size: int, output: int) -> bytes:
        bench = self.bench
        body: dict[str, Any] = {"model": model, "max_tokens": output, "temperature": bench.temperature, "stream": True}
        body["stream_options"] = {"include_usage": True}
        if bench.ignore_eos:
            body["ignore_eos"] = True
        if bench.prompt == "tokens":
            body["prompt"] = [rng.randrange(256, 4096) for _ in range(size)]  # ids that every vocabulary has
        elif bench.endpoint == "completions":
            body["prompt"] = " ".join(rng.choices(WORDS, k=size))
        else:
            body["messages"] = [{"role": "user", "content": " ".join(rng.choices(WORDS, k=size))}]
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

        if self.bench.rate:
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


def summary(timings: list[Timing]) -> dict[str, Any]:
    """Throughput in tokens and requests per second; latencies in milliseconds, as mean, p50, p90, p99; errors by message."""
    good = [t for t in timings if t.error is None]
    seconds = max(t.ended for t in timings) - min(t.sent for t in timings)
    kinds = {
        "ttft_ms": [t.texts[0] - t.sent for t in good],
        "tpot_ms": [(t.texts[-1] - t.texts[0]) / (t.output_tokens - 1) for t in good if t.output_tokens > 1],
        "itl_ms": [b - a for t in good for a, b in zip(t.texts, t.texts[1:], strict=False)],
        "e2e_ms": [t.ended - t.sent for t in good],
    }
    latencies = {
        name: {"mean": _ms(sum(values) / len(values)), **{f"p{p}": _ms(percentile(values, p)) for p in (50, 90, 99)}} if values else None
        for name, values in kinds.items()
    }
    return {
        "requests": len(timings),
        "errors": len(timings) - len(good),
        "error_kinds": dict(Counter(t.error for t in timings if t.error is not None).most_common(5)),
        "seconds": round(seconds, 3),
        "requests_per_s": round(len(good) / seconds, 3),
        "prompt_tok_per_s": round(sum(t.prompt_tokens for t in good) / seconds, 1),
        "output_tok_per_s": round(sum(t.output_tokens for t in good) / seconds, 1),
        **latencies,
    }


def _ms(seconds: float) -> float:
    return round(seconds * 1e3, 3)


def main(bench: ServingBench) -> int:
    """Runs the load and prints the figures; the last line is one JSON object. 1 if every request failed."""
    return uvloop.run(_main(bench))


async def _main(bench: ServingBench) -> int:
    from tqdm import tqdm

    model = bench.model or await first_model(bench)
    load = Load(bench, model)
    bar = tqdm(total=bench.num_requests, unit="req", disable=bench.json or None)  # None: shown on a terminal only
    timings = await load.run(bar.update)
    bar.close()
    figures = summary(timings)
    if not bench.json:
        loop = f"{bench.rate:g} requests/s" if bench.rate else f"{bench.concurrency or 16} clients"
        print(f"{model} at {load.base}: {bench.num_requests} requests, {loop}, {figures['errors']} errors, {figures['seconds']:.1f} s")
        print(
            f"{figures['requests_per_s']:.2f} requests/s, {figures['prompt_tok_per_s']:,.0f} tok/s in, {figures['output_tok_per_s']:,.0f} tok/s out"
        )
        print(f"{'ms':6}" + "".join(f"{column:>12}" for column in ("mean", "p50", "p90", "p99")))
        for name in ("ttft_ms", "tpot_ms", "itl_ms", "e2e_ms"):
            if figures[name]:
                print(f"{name[:-3].upper():6}" + "".join(f"{value:12,.2f}" for value in figures[name].values()))
        for message, count in figures["error_kinds"].items():
            print(f"{count} x {message}")
    settings = {name: getattr(bench, name) for name in ("url", "endpoint", "rate", "concurrency", "input_len", "output_len", "prompt", "seed")}
    print(json.dumps({"bench": "serving", "model": model, **settings, **figures}))
    return 1 if figures["errors"] == bench.num_requests else 0


async def first_model(bench: ServingBench) -> str:
    """The first model that the server lists. Raises ConfigError if it cannot be asked."""
    try:
        body = b"".join([data async for data in fetch("GET", base_url(bench.url) + "/models", bench.api_key)])
        return str(json.loads(body)["data"][0]["id"])
    except HttpError as e:
        raise ConfigError(f"url: {bench.url}: {e}") from None
    except (json.JSONDecodeError, LookupError, TypeError):
        raise ConfigError(f"url: {bench.url} lists no models; give --model") from None

"""How busy the server is, for routers that choose among several: /v1/loads with SGLang's fields, /load with vLLM's.

Owns these routes. What is counted is the engine's and metrics.py's; the generation's throughput is measured here, between polls.
"""

from __future__ import annotations

import time
from collections import deque
from datetime import UTC, datetime
from typing import Any

from fastapi import APIRouter
from starlette.responses import JSONResponse, Response

from miniinfer import __version__
from miniinfer.serve.fleet import Fleet
from miniinfer.serve.schemas import Shape, described
from miniinfer.serve.service import Service

_SECONDS = 10.0  # throughput is a mean over up to so long


class Load(Shape):
    """One engine's load. Tokens are those that its KV pages hold, or could."""

    dp_rank: int
    model: str
    num_running_reqs: int
    num_waiting_reqs: int
    num_total_reqs: int
    max_running_requests: int
    num_used_tokens: int
    max_total_num_tokens: int
    token_usage: float
    utilization: float
    gen_throughput: float
    cache_hit_rate: float


class Loads(Shape):
    timestamp: str
    version: str
    dp_rank_count: int
    loads: list[Load]


class ServerLoad(Shape):
    server_load: int


class _Rate:
    """Tokens generated per second lately, from a counter that is looked at now and then."""

    def __init__(self) -> None:
        self._seen: deque[tuple[float, int]] = deque(maxlen=64)

    def __call__(self, count: int, now: float) -> float:
        while len(self._seen) > 1 and now - self._seen[0][0] > _SECONDS:
            self._seen.popleft()
        if not self._seen or now - self._seen[-1][0] > _SECONDS / 50:
            self._seen.append((now, count))
        start, before = self._seen[0]
        return (count - before) / (now - start) if now > start else 0.0


def load(service: Service, rate: float) -> dict[str, Any]:
    """One engine's load now."""
    stats, info = service.engine.stats, service.engine.info
    running, waiting, usage = int(stats.get("running", 0)), int(stats.get("waiting", 0)), float(stats.get("kv_usage", 0.0))
    seats, size = int(info.get("max_num_seqs", 0)), int(info.get("page_size", 0)) * min(info.get("num_pages", [0]))
    queries = stats.get("prefix_queries", 0.0)
    return {
        "dp_rank": 0,
        "model": service.model,
        "num_running_reqs": running,
        "num_waiting_reqs": waiting,
        "num_total_reqs": running + waiting,
        "max_running_requests": seats,
        "num_used_tokens": round(usage * size),
        "max_total_num_tokens": size,
        "token_usage": round(usage, 4),
        "utilization": round(max(running / seats if seats else 0.0, usage), 4),
        "gen_throughput": round(rate, 2),
        "cache_hit_rate": round(stats.get("prefix_hits", 0.0) / queries, 4) if queries else 0.0,
    }


def router(fleet: Fleet) -> APIRouter:
    routes = APIRouter()
    rates: dict[str, _Rate] = {}

    @routes.get("/v1/loads", **described(answer=Loads))
    async def loads() -> Response:
        now, entries = time.monotonic(), []
        for member in fleet.members.values():
            if member.service is not None and member.state == "loaded":
                rate = rates.setdefault(member.name, _Rate())
                entries.append(load(member.service, rate(member.service.metrics.generation_tokens, now)))
        return JSONResponse({"timestamp": datetime.now(UTC).isoformat(), "version": __version__, "dp_rank_count": 1, "loads": entries})

    @routes.get("/load", **described(answer=ServerLoad))
    async def server_load() -> Response:
        return JSONResponse({"server_load": fleet.unfinished})

    return routes

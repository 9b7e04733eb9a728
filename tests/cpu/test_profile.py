"""Profiles: what a trace holds, what is reduced from it, and who may ask for one."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from harness import Wanted, make_core, run
from serve_fake import FakeEngine, Server

from miniinfer.data import SamplingParams, StepPlan
from miniinfer.engine import profile


def some(count: int, length: int = 6) -> list[Wanted]:
    return [Wanted(list(range(1, 20 + i)), SamplingParams(temperature=0.0, max_tokens=length, ignore_eos=True)) for i in range(count)]


def test_a_trace_shows_what_the_host_does_for_each_step(tmp_path: Path):
    core = make_core(tmp_path / "model", profile=str(tmp_path / "profiles"), enable_prefix_caching=False)
    run(core, some(2), prefix="before")
    assert core.control("start_profile")["folder"] == str(tmp_path / "profiles")
    steps = core.scheduler.stats()["steps"]
    run(core, some(3))
    figures = core.control("stop_profile")
    assert figures["steps"] == core.scheduler.stats()["steps"] - steps
    assert set(figures["host_us"]) == {"schedule", "launch", "wait", "apply"} and all(t > 0 for t in figures["host_us"].values())
    assert any("mm" in each["name"] or "linear" in each["name"] for each in figures["top"])
    assert "gpu" not in figures
    with gzip.open(figures["trace"], "rt") as file:
        names = [e["name"] for e in json.load(file)["traceEvents"] if e.get("cat") == "user_annotation"]
    launches = [name for name in names if name.startswith("launch step ")]
    assert len(launches) == figures["steps"] and len(set(launches)) == len(launches)
    assert any(name.endswith(": 3 prefill (19, 20, 21)") for name in launches) and any(name.endswith(": 3 decode") for name in launches)
    assert f"apply {figures['host_us']['apply']:.0f}" in profile.table(figures)


def test_profiling_changes_no_token_and_ends_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(profile, "MOST_STEPS", 4)
    plain = run(make_core(tmp_path / "model"), some(3, 20))
    core = make_core(tmp_path / "model", profile=str(tmp_path / "profiles"))
    core.control("start_profile")
    assert [g.tokens for g in run(core, some(3, 20))] == [g.tokens for g in plain]
    assert len(list((tmp_path / "profiles").iterdir())) == 1
    assert core.control("stop_profile")["steps"] == 4
    with pytest.raises(ValueError, match="none is running"):
        core.control("stop_profile")


def test_what_cannot_be_profiled_says_why(tmp_path: Path):
    with pytest.raises(ValueError, match="--profile DIR"):
        make_core(tmp_path / "model").control("start_profile")
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="cannot be made"):
        make_core(tmp_path / "model", profile=str(tmp_path / "file")).control("start_profile")
    core = make_core(tmp_path / "model", profile=str(tmp_path / "profiles"))
    core.control("start_profile")
    with pytest.raises(ValueError, match="running already"):
        core.control("start_profile")
    figures = core.control("stop_profile")  # of no step at all
    assert figures["steps"] == 0 and profile.table(figures)


def test_figures_of_a_gpu_trace():
    """Two steps, launched while earlier work runs: kernels go to the step that launched them, however late they run."""

    def event(cat: str, name: str, ts: float, dur: float, correlation: int | None = None) -> dict[str, Any]:
        return {"cat": cat, "name": name, "ts": ts, "dur": dur, "args": {} if correlation is None else {"correlation": correlation}}

    events = [
        event("user_annotation", "schedule", 0, 4),
        event("user_annotation", "launch step 7: 2 decode", 5, 10),
        event("user_annotation", "launch step 8: 2 decode", 20, 30),
        event("user_annotation", "wait", 55, 100),
        event("cuda_runtime", "cudaGraphLaunch", 7, 1, 71),
        event("cuda_runtime", "cudaGraphLaunch", 25, 1, 81),
        event("cuda_runtime", "cudaMemcpyAsync", 52, 1, 99),  # nobody's
        event("kernel", "old", 0, 8, 3),
        event("kernel", "a", 10, 40, 71),
        event("kernel", "b", 45, 55, 71),  # begins before `a` has ended
        event("kernel", "a", 125, 50, 81),
        event("gpu_memcpy", "copy", 175, 25, 81),
        event("gpu_user_annotation", "launch step 8: 2 decode", 125, 75),
    ]
    figures = profile.reduce(events)
    assert figures["steps"] == 2 and figures["host_us"] == {"schedule": 4, "launch": 20, "wait": 100}
    gpu = figures["gpu"]
    assert gpu["gap_us"] == {"median": 25, "p99": 25, "longest": 25} and gpu["gaps_above_20_us"] == 1
    assert gpu["span_us"] == 82.5 and gpu["busy"] == round((8 + 90 + 75) / 200, 4)
    assert figures["top"][0] == {"name": "a", "us_per_step": 45, "calls_per_step": 1}
    assert "between steps 25" in profile.table(figures)


def test_a_step_in_words():
    def plan(*counts: int) -> StepPlan:
        return StepPlan(0, [], [], list(counts), [], [], [], [])

    assert profile.describe(plan(1, 1, 512)) == "2 decode + 1 prefill (512)"
    assert profile.describe(plan(9, 8, 7, 6, 5)) == "5 prefill (9, 8, 7, 6, ...)"
    assert profile.describe(plan(1)) == "1 decode"


class Controlled(FakeEngine):
    """An engine that answers commands."""

    async def control(self, command: str) -> Any:
        if command == "stop_profile":
            raise RuntimeError("ValueError: profile: none is running")
        return {"asked": command}


@pytest.mark.parametrize("key", [None, "sesame"])
def test_routes(key: str | None):
    import http.client

    with Server(Controlled(None), api_key=key) as server:

        def post(path: str, headers: dict[str, str]) -> tuple[int, Any]:
            connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
            connection.request("POST", path, headers=headers)
            response = connection.getresponse()
            return response.status, json.loads(response.read())

        headers = {} if key is None else {"authorization": f"Bearer {key}"}
        assert post("/start_profile", headers) == (200, {"asked": "start_profile"})
        status, body = post("/stop_profile", headers)
        assert status == 400 and "none is running" in body["error"]["message"]
        if key is not None:
            assert post("/start_profile", {})[0] == 401

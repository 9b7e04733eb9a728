"""AsyncEngine and the engine process, with a core that echoes: streams, aborts, deaths, and nothing left behind."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest
import uvloop
from echo_core import EXIT, GARBLE, HANG, KILL, RAISE, REFUSE
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from miniinfer.config import ConfigError, EngineConfig
from miniinfer.data import Add, Control, FromEngine, Reply, SamplingParams
from miniinfer.engine.client import AsyncEngine, EngineDeadError
from miniinfer.engine.link import EngineLink
from miniinfer.engine.output import merge

CORE = "echo_core:EchoCore"


def with_engine(test: Callable[[AsyncEngine], Awaitable[None]], loop: Any = None, **config: Any) -> None:
    """Runs a test body with a started engine, within a minute, and takes the engine down."""

    async def body() -> None:
        engine = AsyncEngine(EngineConfig(**{"model": "echo", "skip_tokenizer_init": True, **config}), core=CORE)
        await engine.start(timeout=30)
        try:
            async with asyncio.timeout(60):
                await test(engine)
        finally:
            await engine.shutdown()

    with asyncio.Runner(loop_factory=loop) as runner:
        runner.run(body())


@pytest.fixture
def sockets(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder that engines make their socket folders in; short, as socket paths must be."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        monkeypatch.setattr(tempfile, "tempdir", folder)
        yield Path(folder)


def params(max_tokens: int | None = 8, **more: Any) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, **more)


async def until(condition: Callable[[], Any], seconds: float = 10.0) -> None:
    """Waits for something that other processes or tasks bring about."""
    end = time.monotonic() + seconds
    while not (await value if asyncio.iscoroutine(value := condition()) else value):
        assert time.monotonic() < end, "it did not come about"
        await asyncio.sleep(0.01)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")")[-1].split()[0] != "Z"
    except FileNotFoundError:
        return False


# --------------------------------------------------------------------------------------------------------- streams


@pytest.mark.parametrize("loop", [None, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def test_streams_whole_outputs_and_deltas(loop: Any) -> None:
    async def body(engine: AsyncEngine) -> None:
        assert engine.info["vocab_size"] == 256 and engine.is_alive and not engine.errored and engine.tokenizer is None
        seen = [output async for output in engine.generate([1, 2, 3], params(8))]
        assert seen[-1].outputs[0].token_ids == [1, 2, 3, 1, 2, 3, 1, 2] and seen[-1].outputs[0].finish_reason == "length"
        assert [o.finished for o in seen] == [False] * (len(seen) - 1) + [True]
        lengths = [len(o.outputs[0].token_ids) for o in seen]  # earlier outputs have not changed since
        assert lengths == sorted(set(lengths))
        parts = [output async for output in engine.generate({"prompt_token_ids": [1, 2, 3]}, params(8), delta=True)]
        for part in parts[1:]:
            merge(parts[0], part)
        assert parts[0].outputs == seen[-1].outputs
        siblings = [output async for output in engine.generate([5], params(4, n=3))][-1]
        assert [(o.index, o.token_ids) for o in siblings.outputs] == [(i, [5] * 4) for i in range(3)]
        assert engine.num_open == 0 and engine.stats["running"] == 0

    with_engine(body, loop)


def test_500_requests_at_once() -> None:
    async def one(engine: AsyncEngine, i: int) -> None:
        prompt = [i % 90, i // 90, 7]
        *_, last = [output async for output in engine.generate(prompt, params(20 + i % 11))]
        assert last.outputs[0].token_ids == [prompt[k % 3] for k in range(20 + i % 11)]

    async def body(engine: AsyncEngine) -> None:
        await asyncio.gather(*(one(engine, i) for i in range(500)))
        assert engine.num_open == 0

    with_engine(body)


def test_a_slow_consumer_holds_up_nobody_and_misses_nothing() -> None:
    async def body(engine: AsyncEngine) -> None:
        slow = engine.generate([1, 2, 3], params(300), delta=True)
        first = await anext(slow)
        *_, other = [output async for output in engine.generate([4], params(400))]
        assert len(other.outputs[0].token_ids) == 400
        rest = [output async for output in slow]
        assert len(rest) == 1  # what came meanwhile, merged
        assert first.outputs[0].token_ids + rest[0].outputs[0].token_ids == [1, 2, 3] * 100

    with_engine(body)


def test_text_with_a_tokenizer_and_stop_strings(tmp_path: Path) -> None:
    backend = Backend(models.BPE(vocab={t: i for i, t in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, merges=[]))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "config.json").write_text(json.dumps({}))
    (tmp_path / "template.jinja").write_text("{{ messages[0].content }}!")

    async def body(engine: AsyncEngine) -> None:
        assert engine.tokenizer is not None
        pieces = [o.outputs[0].text async for o in engine.generate("é🙂 ", params(14), delta=True)]
        assert "".join(pieces) == "é🙂 é🙂 " and not any("\ufffd" in p for p in pieces)
        *_, last = [o async for o in engine.generate("abc🙂", params(1000, stop=["🙂a"]))]
        assert (last.prompt, last.outputs[0].text, last.outputs[0].stop_reason) == ("abc🙂", "abc", "🙂a")
        await until(lambda: _is_empty(engine))  # the engine was told
        long = "words and more " * 60_000
        ids = asyncio.create_task(engine.encode(long))
        beats = 0
        while not ids.done():
            await asyncio.sleep(0.001)
            beats += 1
        assert engine.tokenizer.decode(await ids) == long and beats > 1  # the loop went on meanwhile

    with_engine(body, model="echo", tokenizer=str(tmp_path), skip_tokenizer_init=False)


async def _is_empty(engine: AsyncEngine) -> bool:
    return not (await engine.control("state"))["open"]


@pytest.mark.parametrize(
    ("prompt", "more", "said"),
    [
        ([], {}, "prompt: must not be empty"),
        ([1, 256], {}, "prompt: token id 256"),
        ("text", {}, "prompt: the engine has no tokenizer"),
        (5, {}, "prompt: must be text"),
        ({}, {}, "prompt: a dict needs"),
        ({"prompt_token_ids": "12"}, {}, "prompt_token_ids: must be a list"),
        ([1], {"logit_bias": {999: 1}}, "logit_bias: token id 999"),
        ([1], {"stop": "a"}, "stop: "),
        ([1], {"top_k": 2.5}, "top_k: "),
    ],
)
def test_bad_requests_never_reach_the_engine(prompt: Any, more: dict[str, Any], said: str) -> None:
    async def body() -> None:
        engine = AsyncEngine(EngineConfig(model="echo", skip_tokenizer_init=True), core=CORE)
        engine.info = {"vocab_size": 256, "max_model_len": 100}  # as if started; it has no sockets
        with pytest.raises(ValueError, match=said):
            await anext(engine.generate(prompt, params(**more)))
        assert engine.num_open == 0

    asyncio.run(body())


def test_errors_of_one_request_leave_the_others_alone() -> None:
    async def body(engine: AsyncEngine) -> None:
        good = asyncio.create_task(_drain(engine, [1], params(200, n=2), "same"))
        await until(lambda: engine.num_open)
        with pytest.raises(ValueError, match="request_id: 'same' is already running"):
            await anext(engine.generate([1], params(), request_id="same"))
        (refused,) = [output async for output in engine.generate([REFUSE], params())]
        assert (refused.finished, refused.error) == (True, "prompt: cannot be computed")
        with pytest.raises(RuntimeError, match="unknown command 'nonsense'"):
            await engine.control("nonsense")
        assert await good == [200, 200]

    with_engine(body)


async def _drain(engine: AsyncEngine, prompt: list[int], p: SamplingParams, request_id: str | None = None) -> list[int]:
    *_, last = [output async for output in engine.generate(prompt, p, request_id)]
    return [len(o.token_ids) for o in last.outputs]


# ---------------------------------------------------------------------------------------------------------- aborts


def test_leaving_a_stream_aborts_it() -> None:
    async def body(engine: AsyncEngine) -> None:
        async with aclosing(engine.generate([1], params(None), "closed")) as stream:
            await anext(stream)
        async for _ in engine.generate([1], params(None, n=2), "broken off"):
            break
        task = asyncio.create_task(_drain(engine, [1], params(None), "cancelled"))

        async def started() -> bool:
            return "cancelled" in (await engine.control("state"))["open"]

        await until(started)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

        async def empty() -> bool:
            return (await engine.control("state"))["open"] == [] and engine.num_open == 0

        await until(empty)
        assert sorted((await engine.control("state"))["aborted"]) == ["broken off#0", "broken off#1", "cancelled", "closed"]

    with_engine(body)


def test_abort_by_id_ends_the_stream() -> None:
    async def body(engine: AsyncEngine) -> None:
        task = asyncio.create_task(_last(engine, "mine"))
        await until(lambda: engine.num_open)
        await asyncio.sleep(0.05)
        engine.abort("mine")
        engine.abort("unknown")
        last = await task
        assert last.finished and last.outputs[0].finish_reason == "abort" and last.outputs[0].token_ids
        await until(lambda: _is_empty(engine))

    with_engine(body)


async def _last(engine: AsyncEngine, request_id: str) -> Any:
    return [output async for output in engine.generate([1], params(None), request_id)][-1]


def test_a_storm_of_aborts_leaves_nothing_open() -> None:
    async def body(engine: AsyncEngine) -> None:
        tasks = [asyncio.create_task(_drain(engine, [i % 90], params(None))) for i in range(500)]
        await until(lambda: engine.num_open == 500)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert engine.num_open == 0
        await until(lambda: _is_empty(engine))
        assert await _drain(engine, [1], params(5)) == [5]

    with_engine(body)


# --------------------------------------------------------------------------------------------------- life and death


@pytest.mark.parametrize(
    ("how", "said"),
    [
        (RAISE, "failed: RuntimeError: the device is gone"),
        (EXIT, "exited with status 3"),
        (KILL, "killed by signal 9"),
        (GARBLE, "could not be handled: ValidationError"),
    ],
)
def test_a_dead_engine_ends_every_stream(how: int, said: str) -> None:
    async def body(engine: AsyncEngine) -> None:
        streams = [asyncio.create_task(_drain(engine, [1], params(None))) for _ in range(20)]
        await until(lambda: engine.num_open == 20)
        with pytest.raises(EngineDeadError, match=said):
            await _drain(engine, [how], params(10))
        for result in await asyncio.gather(*streams, return_exceptions=True):
            assert isinstance(result, EngineDeadError) and said in str(result)
        assert not engine.is_alive and engine.errored and engine.num_open == 0
        with pytest.raises(EngineDeadError, match=said):
            await anext(engine.generate([1], params()))
        with pytest.raises(EngineDeadError, match=said):
            await engine.control("state")

    with_engine(body, max_engine_restarts=0)


def test_what_was_made_before_the_death_is_handed_over() -> None:
    async def body(engine: AsyncEngine) -> None:
        stream, seen = engine.generate([RAISE], params(10), delta=True), 0
        with pytest.raises(EngineDeadError):
            while True:
                await asyncio.sleep(0.1)
                seen += len((await anext(stream)).outputs[0].token_ids)
        assert seen == 2

    with_engine(body, max_engine_restarts=0)


def stopped(pid: int) -> None:
    os.kill(pid, signal.SIGSTOP)


def killed(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize(("harm", "seconds"), [(killed, 3), (stopped, 6)])
def test_streams_go_on_in_a_new_process(harm: Callable[[int], None], seconds: float) -> None:
    async def body(engine: AsyncEngine) -> None:
        def start(first: int, **more: Any) -> asyncio.Task[list[list[int]]]:
            return asyncio.create_task(_tokens(engine, [first, 2, 3], params(1500, **more)))

        streams, siblings = [start(i) for i in range(20)], start(50, n=3, prompt_logprobs=1)
        ending = engine.generate([7], params(1500), "ending", delta=True)
        await anext(ending)
        while engine.stats.get("steps", 0) < 100:
            await asyncio.sleep(0.01)
        old, before = engine.info["pid"], time.monotonic()
        seeds = {id: seed for id, *_, seed in await engine.control("adds")}
        harm(old)
        await until(lambda: engine.restarting, seconds)
        assert engine.is_alive
        waiting = start(30)  # comes while there is no process, and waits
        await ending.aclose()
        with pytest.raises(EngineDeadError, match="restarted"):
            await engine.control("state")
        await until(lambda: not engine.restarting, seconds)
        assert time.monotonic() - before < seconds
        adds = await engine.control("adds")
        assert {id: seed for id, *_, seed in adds if id in seeds} == {id: seeds[id] for id in seeds if id != "ending"}
        group = [(output, n, scored, group) for _, output, n, scored, group, _ in adds if group]
        assert len(group) == 3 and all(output and n == 3 and scored is None for output, n, scored, _ in group)
        for i, tokens in enumerate(await asyncio.gather(*streams)):
            assert tokens == [[i, 2, 3] * 500]
        assert await siblings == [[50, 2, 3] * 500] * 3
        assert await waiting == [[30, 2, 3] * 500]
        assert engine.info["pid"] != old and not is_running(old) and engine.num_restarts == 1 and engine.num_open == 0
        assert (await engine.control("state"))["open"] == []

    with_engine(body)


async def _tokens(engine: AsyncEngine, prompt: list[int], p: SamplingParams) -> list[list[int]]:
    *_, last = [output async for output in engine.generate(prompt, p)]
    assert last.error is None, last.error
    return [output.token_ids for output in last.outputs]


@pytest.mark.parametrize("how", [KILL, HANG, GARBLE])
def test_a_request_that_kills_every_process_is_given_up_alone(how: int) -> None:
    async def body(engine: AsyncEngine) -> None:
        streams = [asyncio.create_task(_tokens(engine, [i], params(4000))) for i in range(12)]
        await until(lambda: engine.stats.get("steps", 0) > 20)
        poison = [output async for output in engine.generate([how], params(10))][-1]
        assert poison.finished and "died while they worked on this request" in (poison.error or "")
        assert poison.outputs[0].finish_reason == "error" and poison.outputs[0].token_ids == [how] * 2
        assert await asyncio.gather(*streams) == [[[i] * 4000] for i in range(12)]
        assert engine.num_restarts == 3 and engine.is_alive and not engine.errored
        assert await _drain(engine, [1], params(3)) == [3]

    with_engine(body, hang_timeout=1.0)


def test_restarts_are_bounded() -> None:
    async def body(engine: AsyncEngine) -> None:
        stream = asyncio.create_task(_drain(engine, [1], params(None)))
        await until(lambda: engine.num_open)
        for count in (1, 2):
            os.kill(engine.info["pid"], signal.SIGKILL)
            await until(lambda count=count: engine.num_restarts == count and not engine.restarting)  # type: ignore[misc]
            await asyncio.sleep(0.3)
        os.kill(engine.info["pid"], signal.SIGKILL)
        with pytest.raises(EngineDeadError, match="killed by signal 9"):
            await stream
        assert engine.errored and not engine.is_alive and not engine.restarting

    with_engine(body, max_engine_restarts=2)


def test_a_shutdown_during_a_restart_leaves_nothing(sockets: Path) -> None:
    async def body() -> None:
        engine = AsyncEngine(EngineConfig(model="echo", skip_tokenizer_init=True), core=CORE)
        await engine.start(timeout=30)
        stream = asyncio.create_task(_drain(engine, [1], params(None)))
        await until(lambda: engine.num_open)
        os.kill(engine.info["pid"], signal.SIGKILL)
        await until(lambda: engine.restarting)
        await engine.shutdown()
        with pytest.raises(EngineDeadError, match="shut down"):
            await stream
        assert asyncio.all_tasks() == {asyncio.current_task()} and list(sockets.iterdir()) == []

    asyncio.run(body())


@pytest.mark.parametrize(
    ("model", "kind", "said"),
    [
        ("bad", ConfigError, "^max_model_len: 10 is more than fits$"),
        ("broken", EngineDeadError, "failed: ValueError: something is wrong inside"),
        ("gone", EngineDeadError, "exited with status 7"),
        ("slow", TimeoutError, "did not start within 1 s"),
    ],
)
def test_a_start_that_fails_says_why_and_leaves_nothing(model: str, kind: type[Exception], said: str, sockets: Path) -> None:
    async def body() -> AsyncEngine:
        engine = AsyncEngine(EngineConfig(model=model, skip_tokenizer_init=True), core=CORE)
        with pytest.raises(kind, match=said):
            await engine.start(timeout=1 if model == "slow" else 30)
        return engine

    engine = asyncio.run(body())
    assert not engine.is_alive and engine._link is not None and not is_running(engine._link.pid)
    assert list(sockets.iterdir()) == []


def test_a_missing_tokenizer_is_a_config_error(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")

    async def body() -> None:
        with pytest.raises(ConfigError, match="has no tokenizer.json"):
            await AsyncEngine(EngineConfig(model="echo", tokenizer=str(tmp_path)), core=CORE).start(timeout=30)

    asyncio.run(body())


def test_shutdown_leaves_nothing_behind(sockets: Path) -> None:
    async def body() -> int:
        before = set(os.listdir("/proc/self/fd"))
        engine = AsyncEngine(EngineConfig(model="echo", skip_tokenizer_init=True), core=CORE)
        await engine.start(timeout=30)
        assert len(list(sockets.iterdir())) == 1
        stream = engine.generate([1], params(None))
        await anext(stream)
        begin = time.monotonic()
        await engine.shutdown()
        assert time.monotonic() - begin < 4
        await engine.shutdown()
        with pytest.raises(EngineDeadError, match="was shut down"):
            async for _ in stream:
                pass
        assert not engine.is_alive and not engine.errored
        assert asyncio.all_tasks() == {asyncio.current_task()}
        await asyncio.sleep(0.1)
        assert set(os.listdir("/proc/self/fd")) <= before
        return int(engine.info["pid"])

    pid = asyncio.run(body())
    assert not is_running(pid) and list(sockets.iterdir()) == []


def test_the_engine_ignores_signals_and_does_not_outlive_its_parent(sockets: Path) -> None:
    script = f"""if True:
        import asyncio
        from miniinfer.config import EngineConfig
        from miniinfer.engine.client import AsyncEngine
        async def main():
            engine = AsyncEngine(EngineConfig(model="echo", skip_tokenizer_init=True), core={CORE!r})
            await engine.start(30)
            print(engine.info["pid"], flush=True)
            await asyncio.sleep(60)
        asyncio.run(main())
    """
    environment = {**os.environ, "TMPDIR": str(sockets), "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, env=environment) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        for number in (signal.SIGINT, signal.SIGTERM):
            os.kill(pid, number)
            time.sleep(0.2)
            assert is_running(pid)
        parent.kill()
    end = time.monotonic() + 10
    while is_running(pid) or list(sockets.iterdir()):
        assert time.monotonic() < end, "the engine outlived its parent"
        time.sleep(0.02)


def test_a_long_temporary_directory_will_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / ("long" * 30)
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))

    async def body(engine: AsyncEngine) -> None:
        assert await _drain(engine, [1], params(3)) == [3]

    with_engine(body)


def test_idle_costs_nothing() -> None:
    def cpu_seconds(pid: int) -> float:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")")[-1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    async def body(engine: AsyncEngine) -> None:
        await _drain(engine, [1], params(50))
        await asyncio.sleep(0.2)
        before = cpu_seconds(engine.info["pid"]), time.process_time()
        await asyncio.sleep(1.5)
        assert cpu_seconds(engine.info["pid"]) - before[0] <= 0.02
        assert time.process_time() - before[1] <= 0.03

    with_engine(body)


def test_a_process_whose_end_is_not_known_yet_holds_nobody_up() -> None:
    """Its socket goes before the loop hears of its end: a request that comes in between must not wait there, with the loop, for good."""

    def late(*_: object) -> None:
        raise TimeoutError("the loop was held up")

    async def body(engine: AsyncEngine) -> None:
        os.kill(engine.info["pid"], signal.SIGKILL)
        time.sleep(0.5)  # the loop does not look, the socket's own thread does
        *_, last = [output async for output in engine.generate([1, 2], SamplingParams(temperature=0, max_tokens=4, ignore_eos=True))]
        assert last.outputs[0].token_ids == [1, 2, 1, 2] and engine.num_restarts == 1

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(40)
    try:
        with_engine(body)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def test_messages_wait_for_a_process_that_has_not_connected_yet() -> None:
    """In order, and without holding up the loop: a process says that it is ready before our side of its other socket knows of it."""

    async def body() -> None:
        came: list[FromEngine] = []
        link = EngineLink(EngineConfig(model="echo", skip_tokenizer_init=True), CORE, came.extend, lambda: True)
        await link.open()
        link.send(Add("a", [1, 2], params(3)), Control(1, "adds"))
        link.send(Control(2, "adds"))
        await until(lambda: sum(isinstance(message, Reply) for message in came) == 2, 30)
        replies = [message for message in came if isinstance(message, Reply)]
        assert [reply.id for reply in replies] == [1, 2] and len(replies[0].value) == 1
        await link.close()
        link.send(Control(3, "adds"))  # for nobody

    asyncio.run(body())

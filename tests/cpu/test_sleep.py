"""Sleep: memory given back and had again at its addresses, the same tokens before and after, and engine processes that end asleep."""

from __future__ import annotations

import asyncio
import ctypes
import dataclasses
import gc
import json
import os
import re
import signal
import urllib.error
import urllib.request
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import HYBRID, MOE, SHAPE, Wanted, make_core, run
from serve_fake import FakeEngine, Server
from tiny import tiny_folder

from miniinfer import LLM
from miniinfer.config import ConfigError, EngineConfig
from miniinfer.data import Add, SamplingParams
from miniinfer.engine import sleep, start
from miniinfer.engine.arena import CudaArena, Driver, HostArena
from miniinfer.engine.client import AsyncEngine, EngineAsleepError, EngineDeadError
from miniinfer.engine.core import EngineCore
from miniinfer.kernels import REFERENCE

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
PROMPT = [5, 9, 23, 7, 42, 11, 3, 8, 19, 77, 21, 6]


def resident() -> int:
    """Bytes of memory that this process has."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


# ----------------------------------------------------------------------------------------------------------- engine


def wanted() -> list[Wanted]:
    """Prompts that share a prefix of several pages, greedy and drawn."""
    sampled = SamplingParams(temperature=0.8, seed=3, max_tokens=9, ignore_eos=True)
    prompts = [[*(range(1, 40)), 50 + i] for i in range(3)]
    return [Wanted(p, params) for p in prompts for params in (GREEDY, sampled)]


def outcome(core: EngineCore, prefix: str) -> list[list[int]]:
    return [got.tokens for got in run(core, wanted(), stagger=1, prefix=prefix)]


@pytest.mark.parametrize("shape", [SHAPE, HYBRID, MOE], ids=["dense", "hybrid", "moe"])
def test_the_same_tokens_after_sleep(shape: dict[str, Any], tmp_path: Path) -> None:
    """Level 1 keeps weights that were changed since the start, level 2 has the checkpoint's (here: those of the seed)."""
    plain, core = make_core(tmp_path, shape), make_core(tmp_path, shape, enable_sleep_mode=True)
    before = outcome(core, "before")
    assert before == outcome(plain, "plain")
    for cycle in range(3):
        assert core.sleep(1)["asleep"] == ["weights", "kv_cache"] and core.is_sleeping
        assert core.wake_up()["asleep"] == [] and not core.is_sleeping
        assert outcome(core, f"level 1 {cycle}") == before
    fresh = EngineCore(core.config)  # the seed's own weights
    for cycle in range(2):
        core.sleep(2)
        assert all(not p.any() for p in core.model.parameters())
        core.wake_up()
        assert outcome(core, f"level 2 {cycle}") == outcome(fresh, f"fresh {cycle}") != before


@pytest.mark.parametrize(("family", "dtype"), [("qwen2", "bfloat16"), ("qwen3_moe", "bfloat16"), ("llama", "float32")])
def test_level_2_reads_the_checkpoint_again(family: str, dtype: str, tmp_path: Path) -> None:
    """Tied embeddings, stacked experts, and the kernels' packed copies of weights."""
    folder = tiny_folder(family, tmp_path)
    options: dict[str, Any] = {"model": str(folder), "dtype": dtype, "skip_tokenizer_init": True, "num_threads": 1, "cpu_kv_gib": 0.02}
    llm = LLM(**options, enable_sleep_mode=True)
    prompts = [{"prompt_token_ids": PROMPT[i:]} for i in range(3)]

    def tokens() -> list[list[int]]:
        return [out.outputs[0].token_ids for out in llm.generate(prompts, GREEDY, use_tqdm=False)]

    before = tokens()
    addresses = [p.data_ptr() for p in llm.core.model.parameters()]
    for level in (2, 1, 2):
        llm.sleep(level)
        with pytest.raises(RuntimeError, match="asleep"):
            tokens()
        llm.wake_up()
        assert tokens() == before and [p.data_ptr() for p in llm.core.model.parameters()] == addresses
    weights = folder / "model.safetensors"
    llm.sleep(2)
    weights.rename(tmp_path / "away")
    for _ in range(2):
        with pytest.raises(ValueError, match=r"no model\.safetensors"):
            llm.wake_up()
        assert llm.core.is_sleeping and not llm.core.runner.memory.weights.mapped
    (tmp_path / "away").rename(weights)
    llm.wake_up()
    assert tokens() == before


def test_memory_is_given_back(tmp_path: Path) -> None:
    """32 MiB of KV pages, all written to, and 56 MiB of weights."""
    shape = {**SHAPE, "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 8}
    core = make_core(tmp_path, shape, enable_sleep_mode=True, num_pages=512)
    kv = [cache for pair in core.runner.caches for cache in pair]
    for level, least in ((1, 32 << 20), (2, 88 << 20)):
        for cache in kv:
            cache.fill_(1)
        before = resident()
        assert least <= core.sleep(level)["bytes"] < 2 * least
        assert before - resident() > 0.8 * least
        core.wake_up()
        assert not any(cache.any() for cache in kv)


def test_parts_sleep_and_wake_by_themselves(tmp_path: Path) -> None:
    core = make_core(tmp_path, enable_sleep_mode=True)
    before = outcome(core, "a")
    memory = core.runner.memory
    assert memory is not None
    assert core.control("sleep", tags=["kv_cache"])["asleep"] == ["kv_cache"] and memory.weights.mapped
    assert core.sleep(2, ["weights"])["asleep"] == ["weights", "kv_cache"]
    assert core.sleep(1)["level"] == 2  # no way back to level 1: the weights are gone
    assert core.control("wake_up", tags=["weights"])["asleep"] == ["kv_cache"] and core.is_sleeping
    assert core.wake_up()["level"] == 0 and core.wake_up()["level"] == 0
    core.model.load_state_dict(make_core(tmp_path).model.state_dict())
    assert outcome(core, "b") == before


def test_what_sleep_refuses(tmp_path: Path) -> None:
    plain = make_core(tmp_path / "plain")
    for command in "sleep", "wake_up":
        with pytest.raises(ValueError, match="enable_sleep_mode"):
            plain.control(command)
    core = make_core(tmp_path, enable_sleep_mode=True)
    for arguments, name in (({"level": 0}, "level"), ({"level": 3}, "level"), ({"tags": ["weights", "graphs"]}, "tags")):
        with pytest.raises(ValueError, match=f"^{name}: .*got"):
            core.sleep(**arguments)
    core.add(Add("r", PROMPT, GREEDY))
    core.step()
    with pytest.raises(ValueError, match="requests are still open"):
        core.sleep()
    core.abort(["r"])
    core.sleep()  # whatever was still on its way
    assert core.add(Add("s", PROMPT, GREEDY))[0].error == "the engine is asleep" and not core.has_work
    core.wake_up()
    assert run(core, [Wanted(PROMPT, GREEDY)])[0].tokens


def test_the_prefix_cache_is_empty_after_sleep(tmp_path: Path) -> None:
    core = make_core(tmp_path, enable_sleep_mode=True)
    long = Wanted(list(range(1, 60)), GREEDY)
    first, again = run(core, [long], prefix="a")[0], run(core, [long], prefix="b")[0]
    assert again.cached > 0 and again.tokens == first.tokens
    core.sleep()
    core.wake_up()
    after = run(core, [long], prefix="c")[0]
    assert after.cached == 0 and after.tokens == first.tokens


# ------------------------------------------------------------------------------------------------------------ arenas


class FakeCuda:
    """libcuda as the arena sees it: what is reserved, created and mapped, and how large a device is."""

    def __init__(self, granularity: int = 2 << 20, total: int = 1 << 40) -> None:
        self.granularity, self.total = granularity, total
        self.calls: list[str] = []
        self.reserved: dict[int, int] = {}
        self.handles: dict[int, int] = {}
        self.mapped: dict[int, int] = {}
        self.writable: set[int] = set()
        self.failing: dict[str, int] = {}  # by call, what it answers
        self._next = 1 << 32

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("cu"):
            raise AttributeError(name)

        def call(*arguments: Any) -> int:
            if name != "cuGetErrorName":
                self.calls.append(name)
            if name in self.failing:
                return self.failing[name]
            return getattr(self, f"_{name}")(*(getattr(a, "_obj", getattr(a, "value", a)) for a in arguments)) or 0

        self.__dict__[name] = call
        return call

    @property
    def used(self) -> int:
        return sum(self.mapped.values()) + sum(self.handles.values())

    def _new(self) -> int:
        self._next += 1 << 32
        return self._next

    def _cuGetErrorName(self, code: int, text: Any) -> None:
        text.value = {2: b"CUDA_ERROR_OUT_OF_MEMORY", 1: b"CUDA_ERROR_INVALID_VALUE"}.get(code)

    def _cuMemGetAllocationGranularity(self, result: Any, allocation: Any, option: int) -> None:
        assert (allocation.type, allocation.handles, allocation.location.type, allocation.location.id) == (1, 0, 1, 5)
        result.value = self.granularity

    def _cuMemAddressReserve(self, address: Any, size: int, alignment: int, hint: int, flags: int) -> None:
        assert size % self.granularity == 0 and not (alignment or hint or flags)
        address.value = self._new()
        self.reserved[address.value] = size

    def _cuMemAddressFree(self, address: int, size: int) -> None:
        assert address not in self.mapped and self.reserved.pop(address) == size

    def _cuMemCreate(self, handle: Any, size: int, allocation: Any, flags: int) -> int:
        assert size % self.granularity == 0 and allocation.location.id == 5 and not flags
        if self.used + size > self.total:
            return 2
        handle.value = self._new()
        self.handles[handle.value] = size
        return 0

    def _cuMemMap(self, address: int, size: int, offset: int, handle: int, flags: int) -> None:
        assert self.reserved[address] == size == self.handles[handle] and not offset and address not in self.mapped
        self.mapped[address] = size

    def _cuMemRelease(self, handle: int) -> None:
        del self.handles[handle]

    def _cuMemSetAccess(self, address: int, size: int, access: Any, count: int) -> None:
        assert self.mapped[address] == size and count == 1
        assert (access.location.type, access.location.id, access.flags) == (1, 5, 3)
        self.writable.add(address)

    def _cuMemUnmap(self, address: int, size: int) -> None:
        assert self.mapped.pop(address) == size
        self.writable.discard(address)


class FakeDriver(Driver):
    """The driver over a fake library; tensors are the host's."""

    waits = 0

    def enter(self, device: torch.device) -> int:
        return 5

    def leave(self) -> None:
        self.waits += 1

    def tensor(self, memory: Any, device: torch.device) -> torch.Tensor:
        interface = memory.__cuda_array_interface__
        assert interface["data"] == (memory.address, False) and interface["shape"] == (memory.size,) and interface["typestr"] == "|u1"
        owner = torch.zeros(memory.size, dtype=torch.uint8)
        owner.range = memory  # as torch keeps the object whose memory it uses
        return owner


def cuda_arena(library: FakeCuda, size: int) -> CudaArena:
    return CudaArena(size, torch.device("cuda"), FakeDriver(library))


def test_cuda_arena_gives_memory_back_and_keeps_addresses() -> None:
    library = FakeCuda()
    arena = cuda_arena(library, 3 << 20)
    assert arena.size == 4 << 20 == library.used and arena.mapped and not library.handles
    assert library.calls[1:] == ["cuMemAddressReserve", "cuMemCreate", "cuMemMap", "cuMemRelease", "cuMemSetAccess"]
    address = next(iter(library.reserved))
    for _ in range(3):
        arena.release()
        arena.release()
        assert library.used == 0 and not arena.mapped and list(library.reserved) == [address]
        arena.restore()
        arena.restore()
        assert library.mapped == {address: 4 << 20} and library.writable == {address} and not library.handles
    del arena
    gc.collect()
    assert not (library.used or library.reserved)


def test_cuda_arena_that_finds_no_room_stays_as_it_was() -> None:
    library = FakeCuda(total=8 << 20)
    first, second = cuda_arena(library, 4 << 20), cuda_arena(library, 4 << 20)
    with pytest.raises(RuntimeError, match=r"GPU has no 0\.00 GiB free \(cuMemCreate: CUDA_ERROR_OUT_OF_MEMORY\)"):
        cuda_arena(library, 1)
    gc.collect()
    assert len(library.reserved) == 2
    first.release()
    third = cuda_arena(library, 4 << 20)
    with pytest.raises(RuntimeError, match="OUT_OF_MEMORY"):
        first.restore()
    assert not first.mapped and library.used == 8 << 20
    del third
    gc.collect()
    first.restore()
    assert first.mapped and second.mapped


@pytest.mark.parametrize("call", ["cuMemMap", "cuMemSetAccess", "cuMemCreate"])
def test_cuda_arena_names_what_failed_and_leaks_nothing(call: str) -> None:
    library = FakeCuda()
    arena = cuda_arena(library, 1)
    arena.release()
    for code, name in ((1, "CUDA_ERROR_INVALID_VALUE"), (777, "error 777")):
        library.failing = {call: code}
        with pytest.raises(RuntimeError, match=f"{call}: {name}"):
            arena.restore()
        library.failing = {}
        assert not arena.mapped and not library.used
    arena.restore()
    arena.release()


def test_structures_have_the_drivers_sizes() -> None:
    from miniinfer.engine import arena

    assert [ctypes.sizeof(each) for each in (arena._Allocation, arena._Access, arena._Location)] == [32, 12, 8]
    assert arena._Allocation.flags.offset == 24 and arena._Access.flags.offset == 8


@pytest.mark.parametrize("make", [HostArena, lambda size: cuda_arena(FakeCuda(), size)], ids=["host", "cuda"])
def test_tensors_lie_apart_and_aligned(make: Any) -> None:
    arena = make(5000)
    tensors = [
        arena.take(shape, dtype) for shape, dtype in (((3, 5), torch.bfloat16), ((7,), torch.float32), ((0, 4), torch.int8), ((2, 2, 2), torch.int64))
    ]
    for i, tensor in enumerate(tensors):
        tensor.fill_(i + 1)
    assert all((tensor == i + 1).all() for i, tensor in enumerate(tensors))
    starts = [tensor.storage_offset() * tensor.element_size() for tensor in tensors]
    assert all(start % 512 == 0 for start in starts) and all(tensor.is_contiguous() for tensor in tensors)
    with pytest.raises(AssertionError):
        arena.take((arena.size,), torch.uint8)


class ScrubbingDriver(FakeDriver):
    """What was in memory that is given back is garbage when there is memory again: NaN, read as floats."""

    def __init__(self, library: FakeCuda) -> None:
        super().__init__(library)
        self.tensors: dict[int, torch.Tensor] = {}

    def tensor(self, memory: Any, device: torch.device) -> torch.Tensor:
        owner = super().tensor(memory, device).fill_(0xFF)
        self.tensors[memory.address] = owner
        return owner

    def unmap(self, address: int, size: int) -> None:
        super().unmap(address, size)
        self.tensors[address].fill_(0xFF)


@pytest.mark.parametrize("kernels", ["triton", "reference"])
def test_a_gpu_engine_over_a_counterfeit_driver(kernels: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything that sleep does on a GPU but the driver's part; plain torch stands for the kernels."""
    library, empty = FakeCuda(total=2 << 20, granularity=4096), torch.empty
    driver = ScrubbingDriver(library)
    monkeypatch.setattr(sleep, "CHUNK", 10_000)
    monkeypatch.setattr(sleep, "make_arena", lambda size, device: CudaArena(size, device, driver))
    monkeypatch.setattr(torch, "empty", lambda *size, pin_memory=False, **kwargs: empty(*size, **kwargs))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 0)
    monkeypatch.setattr(torch.accelerator, "empty_host_cache", lambda: None, raising=False)
    monkeypatch.setattr(start, "Memory", lambda device: sleep.Memory(torch.device("cuda")))
    monkeypatch.setattr(start, "rehearse", lambda runner: None)
    monkeypatch.setattr(start, "first_steps", lambda runner: None)
    monkeypatch.setattr("miniinfer.kernels.select", lambda *args: dataclasses.replace(REFERENCE, name=kernels))
    core = EngineCore(
        EngineConfig(model=str(tiny_folder("qwen3", tmp_path)), device="cpu", num_threads=1, num_pages=40, max_num_seqs=8, enable_sleep_mode=True)
    )
    before, held = run(core, wanted()[1:3], prefix="before"), library.used
    assert core.model.head.weight is core.model.embed.weight
    for cycle, level in enumerate((1, 2, 1)):
        report = core.sleep(level)
        assert library.used == 0 and report["bytes"] == held and (report["host_bytes"] > 0) == (level == 1)
        others = CudaArena(2 << 20, torch.device("cuda"), driver)
        with pytest.raises(RuntimeError, match="GiB free"):
            core.wake_up()
        assert core.is_sleeping and library.used == others.size
        others.release()
        assert core.wake_up(["weights"])["asleep"] == ["kv_cache"]
        assert core.wake_up()["level"] == 0 and library.used == held
        assert [got.tokens for got in run(core, wanted()[1:3], prefix=f"{cycle}")] == [got.tokens for got in before]
        others = None
    weights = tmp_path / "tiny-qwen3" / "model.safetensors"
    core.sleep(2)
    weights.rename(tmp_path / "away")
    with pytest.raises(ConfigError, match="no model.safetensors"):
        core.wake_up()
    assert core.is_sleeping and library.used == 0


# ----------------------------------------------------------------------------------------------------------- process


def with_engine(test: Callable[[AsyncEngine], Awaitable[None]], core: str = "miniinfer.engine.core:EngineCore", **options: Any) -> None:
    """Runs a test body with an engine process that can sleep: the bundled model's or, much faster to start, one that echoes."""

    async def body() -> None:
        engine = AsyncEngine(EngineConfig(num_threads=1, enable_sleep_mode=True, **options), core=core)
        await engine.start(timeout=60)
        try:
            async with asyncio.timeout(60):
                await test(engine)
        finally:
            await engine.shutdown()

    asyncio.run(body())


ECHO: dict[str, Any] = {"core": "echo_core:EchoCore", "skip_tokenizer_init": True}


async def tokens(engine: AsyncEngine, prompt: Any = "Once upon a time", count: int = 12) -> list[int]:
    params = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True)
    *_, last = [output async for output in engine.generate(prompt, params)]
    return last.outputs[0].token_ids


def pid_of(engine: AsyncEngine) -> int:
    assert engine._link is not None
    return engine._link.pid


def test_a_process_sleeps_and_wakes_and_is_replaced_if_it_dies_asleep() -> None:
    async def body(engine: AsyncEngine) -> None:
        before = await tokens(engine)
        for level in 1, 2:
            report = await engine.sleep(level)
            assert report["asleep"] == ["weights", "kv_cache"] and engine.is_sleeping and engine.sleep_level == level and engine.is_alive
            with pytest.raises(EngineAsleepError, match="asleep"):
                await tokens(engine)
            assert (await engine.wake_up())["level"] == 0 and not engine.is_sleeping
            assert await tokens(engine) == before
        await engine.sleep()
        assert (await engine.wake_up(["weights"]))["asleep"] == ["kv_cache"] and engine.is_sleeping
        dead = pid_of(engine)
        os.kill(dead, signal.SIGKILL)
        await asyncio.sleep(0.5)  # nothing is started by itself
        assert engine.is_sleeping and engine.is_alive and not engine.restarting and pid_of(engine) == dead
        with pytest.raises(EngineAsleepError):
            await tokens(engine)
        await engine.wake_up()
        assert pid_of(engine) != dead and not engine.is_sleeping and engine.num_restarts == 1
        assert await tokens(engine) == before and await engine.control("check")

    with_engine(body)


def test_a_process_that_dies_or_hangs_between_asleep_and_awake_is_replaced() -> None:
    async def body(engine: AsyncEngine) -> None:
        await engine.sleep(2)
        os.kill(pid_of(engine), signal.SIGSTOP)
        await engine.wake_up()  # found to be stopped
        assert await tokens(engine, [1, 2], 4) == [1, 2, 1, 2]
        falling = asyncio.create_task(engine.sleep(tags=["kv_cache"]))  # which hangs
        await asyncio.sleep(0.1)
        os.kill(pid_of(engine), signal.SIGKILL)
        assert "no memory is held" in (await falling)["note"] and engine.is_sleeping
        await asyncio.gather(*(engine.wake_up() for _ in range(3)))
        assert await tokens(engine, [1, 2], 4) == [1, 2, 1, 2] and engine.num_restarts == 2
        await engine.sleep()
        await engine.wake_up(["kv_cache"])  # hangs as well, for longer than hang_timeout
        assert engine.num_restarts == 3
        os.kill(pid_of(engine), signal.SIGKILL)  # and awake it is minded as ever
        assert await tokens(engine, [1, 2], 4) == [1, 2, 1, 2] and engine.num_restarts == 4
        dead = pid_of(engine)
        os.kill(dead, signal.SIGKILL)
        while not engine.restarting:
            await asyncio.sleep(0.001)
        assert (await engine.sleep())["asleep"] and pid_of(engine) != dead  # the new process sleeps
        assert (await engine.control("state"))["open"] == []

    with_engine(body, hang_timeout=3.0, **ECHO)


def test_a_change_that_fails_leaves_all_as_it_was() -> None:
    async def body(engine: AsyncEngine) -> None:
        with pytest.raises(RuntimeError, match="no 1.00 GiB free"):
            await engine.sleep(tags=["weights"])
        assert not engine.is_sleeping and await tokens(engine, [1], 2) == [1, 1]
        await engine.sleep()
        with pytest.raises(RuntimeError, match="no 1.00 GiB free"):
            await engine.wake_up(["weights"])
        assert engine.is_sleeping
        os.kill(pid_of(engine), signal.SIGKILL)
        engine.config = dataclasses.replace(engine.config, model="bad")  # a new process does not start
        with pytest.raises(ConfigError, match="max_model_len"):
            await engine.wake_up()
        assert engine.is_sleeping and engine.is_alive
        engine.config = dataclasses.replace(engine.config, model="echo")
        await engine.wake_up()
        assert await tokens(engine, [1], 2) == [1, 1]
        await engine.sleep()
        os.kill(pid_of(engine), signal.SIGKILL)
        engine.config = dataclasses.replace(engine.config, model="slow")
        waking = asyncio.create_task(engine.wake_up())
        await asyncio.sleep(1.0)
        starting = pid_of(engine)
        await engine.shutdown()
        with pytest.raises((EngineDeadError, asyncio.CancelledError)):
            await waking
        assert not Path(f"/proc/{starting}").exists()

    with_engine(body, **ECHO)


def test_open_requests_end_first_or_at_once() -> None:
    async def body(engine: AsyncEngine) -> None:
        running = [asyncio.create_task(tokens(engine, [i], 800)) for i in range(3)]
        await asyncio.sleep(0.05)
        falling = asyncio.create_task(engine.sleep())
        await asyncio.sleep(0.05)
        with pytest.raises(EngineAsleepError):
            await tokens(engine, [1])
        assert not falling.done() and not engine.is_sleeping
        waking = asyncio.create_task(engine.wake_up())
        assert [await each for each in running] == [[i] * 800 for i in range(3)]
        assert (await falling)["level"] == 1 and (await waking)["level"] == 0
        stream = engine.generate([1], SamplingParams(max_tokens=50_000))
        await anext(stream)
        await engine.sleep(mode="abort")
        *_, last = [output async for output in stream]
        assert last.outputs[0].finish_reason == "abort" and engine.is_sleeping
        assert (await engine.control("state"))["open"] == []
        await engine.wake_up()
        assert await tokens(engine, [1], 3) == [1] * 3

    with_engine(body, **ECHO)


def test_what_a_client_of_a_process_is_refused() -> None:
    async def body(engine: AsyncEngine) -> None:
        stream = engine.generate([1], SamplingParams(max_tokens=60))
        await anext(stream)
        for arguments, name in (({"level": 3}, "level"), ({"tags": ["x"]}, "tags"), ({"mode": "keep", "level": 2}, "mode")):
            with pytest.raises(ValueError, match=f"^{name}: "):
                await engine.sleep(**arguments)
        with pytest.raises(ValueError, match="^tags: "):
            await engine.wake_up(["x"])
        *_, last = [output async for output in stream]  # nothing of it has hurt a request
        assert last.outputs[0].finish_reason == "length"
        assert (await engine.wake_up())["level"] == 0  # it was awake
        sleeping = asyncio.create_task(engine.sleep())
        await asyncio.sleep(0)
        sleeping.cancel()  # whoever gives up waiting changes nothing
        for _ in range(500):
            await asyncio.sleep(0.01)
            if engine.is_sleeping:
                break
        assert (await engine.wake_up())["level"] == 0

    with_engine(body, **ECHO)
    plain = AsyncEngine(EngineConfig())
    with pytest.raises(ValueError, match="^enable_sleep_mode: "):
        asyncio.run(plain.sleep())
    with pytest.raises(RuntimeError, match="not been started"):
        asyncio.run(plain.wake_up())


# -------------------------------------------------------------------------------------------------------------- HTTP


def ask(server: Server, method: str, path: str, body: Any = None) -> tuple[int, Any]:
    data = None if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(server.url + path, data, {"content-type": "application/json"} if data else {}, method=method)
    try:
        with urllib.request.urlopen(request, timeout=10) as response:
            return response.status, json.loads(response.read())
    except urllib.error.HTTPError as e:
        return e.code, json.loads(e.read())


def test_routes_of_vllm_and_sglang() -> None:
    engine = FakeEngine(None)
    completion = {"prompt": [1, 2, 3], "max_tokens": 1}
    with Server(engine) as server:
        status, answer = ask(server, "POST", "/sleep")
        assert status == 400 and answer["error"]["param"] == "enable_sleep_mode"
        engine.can_sleep = True
        assert ask(server, "GET", "/is_sleeping") == (200, {"is_sleeping": False})
        assert ask(server, "POST", "/sleep?level=2&mode=abort")[1]["level"] == 2
        assert ask(server, "GET", "/is_sleeping?model=tiny") == (200, {"is_sleeping": True})
        status, answer = ask(server, "POST", "/v1/completions", completion)
        assert status == 503 and answer["error"]["code"] == "asleep" and "asleep" in answer["error"]["message"]
        assert states(server) == {"awake": 0, "weights_offloaded": 0, "discard_all": 1}
        engine.no_room = True
        status, answer = ask(server, "POST", "/wake_up")
        assert status == 503 and "no 1.00 GiB free" in answer["error"]["message"]
        engine.no_room = False
        assert ask(server, "POST", "/wake_up?tags=weights&tags=kv_cache")[0] == 200
        assert states(server) == {"awake": 1, "weights_offloaded": 0, "discard_all": 0}
        assert ask(server, "POST", "/v1/completions", completion)[0] == 200
        assert ask(server, "POST", "/sleep")[1] == {"level": 1, "asleep": ["weights", "kv_cache"], "bytes": 7}
        assert states(server) == {"awake": 0, "weights_offloaded": 1, "discard_all": 0}
        assert ask(server, "POST", "/resume_memory_occupation", b"")[0] == 200
        assert ask(server, "POST", "/release_memory_occupation", {"tags": ["kv_cache"]})[0] == 200
        assert ask(server, "POST", "/resume_memory_occupation", {"tags": ["kv_cache"], "model": "tiny"})[0] == 200
        assert engine.changes == [(2, "abort", None), None, ["weights", "kv_cache"], (1, "wait", None), None, (1, "wait", ["kv_cache"]), ["kv_cache"]]
        for path, body, field in (
            ("/sleep?level=3", None, "level"),
            ("/sleep?mode=keep", None, "mode"),
            ("/wake_up?tags=scheduling", None, "tags"),
            ("/release_memory_occupation", {"tags": ["cuda_graph"]}, "tags"),
            ("/resume_memory_occupation", {"tag": ["weights"]}, "tag"),
        ):
            status, answer = ask(server, "POST", path, body)
            assert status == 400 and field in answer["error"]["message"], (path, answer)
        assert ask(server, "POST", "/sleep?model=other")[0] == 404 and len(engine.changes) == 7


def states(server: Server) -> dict[str, float]:
    """vLLM's gauge."""
    with urllib.request.urlopen(f"{server.url}/metrics", timeout=10) as response:
        found = re.findall(r'^vllm:engine_sleep_state{.*sleep_state="(\w+)"} (\S+)$', response.read().decode(), re.MULTILINE)
    return {state: float(value) for state, value in found}

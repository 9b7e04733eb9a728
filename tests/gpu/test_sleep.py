"""Sleep on a GPU: the same bits before and after with graphs that were captured before, memory given back, and two engines that take turns.

Some need the GPU to themselves: run this file alone, without -n, and with -s to see the times that the last two print.
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import HYBRID, MOE, SHAPE, VOCAB, Wanted, make_core, run
from tiny import tiny_folder

from miniinfer import LLM
from miniinfer.config import EngineConfig
from miniinfer.data import SamplingParams
from miniinfer.engine.arena import CudaArena, driver
from miniinfer.engine.client import AsyncEngine, EngineAsleepError
from miniinfer.engine.core import EngineCore

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

alone = pytest.mark.skipif("PYTEST_XDIST_WORKER" in os.environ, reason="needs the GPU to itself: run this file without -n")

GIB = 2**30
CUDA = torch.device("cuda")
BASE = {"device": "cuda", "kernels": "triton", "page_size": 16, "num_pages": 400}
GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
WIDE = {
    **SHAPE,
    "hidden_size": 1024,
    "intermediate_size": 2048,
    "head_dim": 128,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 4096,
}
WIDE_MOE = {
    **WIDE,
    **{key: MOE[key] for key in ("architectures", "num_experts", "num_experts_per_tok", "norm_topk_prob")},
    "moe_intermediate_size": 512,
}
QWEN3_8B = {
    **SHAPE,
    "vocab_size": 151_936,
    "hidden_size": 4096,
    "intermediate_size": 12_288,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40_960,
    "torch_dtype": "bfloat16",
}


@pytest.fixture(autouse=True)
def _empty() -> None:
    """Engines of tests before this one are gone."""
    gc.collect()
    torch.cuda.empty_cache()


def free() -> int:
    """Bytes of the GPU that nobody has."""
    torch.cuda.synchronize()
    return int(torch.cuda.mem_get_info()[0])


def requests(vocab: int = VOCAB) -> list[Wanted]:
    """Prompts of several lengths, two of which share a prefix; drawn, filtered and greedy, with log-probabilities."""
    rng = random.Random(5)
    prompts = [[rng.randrange(8, vocab) for _ in range(size)] for size in (33, 70, 5, 150, 9, 64)]
    prompts.append([*prompts[1][:50], *prompts[0]])
    drawn = [SamplingParams(temperature=0.8, seed=i, max_tokens=20, logprobs=2, ignore_eos=True) for i in range(5)]
    return [Wanted(p, params) for p, params in zip(prompts, [GREEDY, *drawn, SamplingParams(top_p=0.9, seed=1, max_tokens=20)], strict=True)]


def outcome(core: EngineCore, prefix: str, wanted: list[Wanted]) -> Any:
    got = run(core, wanted, stagger=2, prefix=prefix)
    return [(g.tokens, [t.logprobs for t in g.logprobs], g.cached) for g in got]


def dummy_core(folder: Path, shape: dict[str, Any], **options: Any) -> EngineCore:
    """bf16 with random weights, as the kernels for Hopper take them."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(shape))
    wanted: dict[str, Any] = {"model": str(folder), "load_format": "dummy", "dtype": "bfloat16", "device": "cuda", "skip_tokenizer_init": True}
    return EngineCore(EngineConfig(**{**wanted, "enable_sleep_mode": True, **options}))


# ------------------------------------------------------------------------------------------------------------ arena


@alone
def test_an_arena_keeps_its_addresses_and_nothing_else() -> None:
    torch.full((1000, 1000), 2, dtype=torch.bfloat16, device=CUDA).float().mean().item()  # loads the code of what is called below, which stays
    gc.collect()
    torch.cuda.empty_cache()
    before, size = free(), GIB
    arena = CudaArena(size, CUDA, driver())
    assert before - free() >= size
    one, two = arena.take((1000, 1000), torch.bfloat16), arena.take((77,), torch.float32)
    addresses = one.data_ptr(), two.data_ptr()
    assert addresses[0] == arena.bytes.data_ptr() and addresses[1] % 512 == 0 and one.device.type == "cuda"
    two.fill_(2)
    for value in range(3):
        one.fill_(value)
        assert one.float().mean().item() == value and two.mean().item() == 2
        torch.cuda.synchronize()
        arena.release()
        assert free() >= before - (32 << 20)
        other = torch.full((GIB,), 0x7F, dtype=torch.uint8, device=CUDA)  # so that the memory that comes is another
        arena.restore()
        assert (one.data_ptr(), two.data_ptr()) == addresses
        two.fill_(2)
        del other
        torch.cuda.empty_cache()
    del arena, one
    gc.collect()
    assert before - free() >= size  # a tensor of it is still there
    del two
    gc.collect()
    torch.cuda.empty_cache()
    assert free() >= before - (32 << 20)


def test_a_graph_over_an_arena_outlives_its_memory() -> None:
    arena = CudaArena(64 << 20, CUDA, driver())
    weight, x = arena.take((1024, 1024), torch.bfloat16), torch.randn(8, 1024, device=CUDA, dtype=torch.bfloat16)
    values = torch.randn(1024, 1024, device=CUDA, dtype=torch.bfloat16)
    weight.copy_(values)
    x @ weight.T  # ahead of the capture, so that cuBLAS is set up
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = x @ weight.T
    graph.replay()
    expected = out.clone()
    assert expected.any()
    for _ in range(2):
        torch.cuda.synchronize()
        arena.release()
        held = torch.empty(64 << 20, dtype=torch.uint8, device=CUDA)
        arena.restore()
        weight.copy_(values)
        out.zero_()
        graph.replay()
        assert torch.equal(out, expected)
        del held


@alone
def test_an_arena_that_finds_no_room_stays_asleep() -> None:
    arena = CudaArena(2 * GIB, CUDA, driver())
    arena.release()
    taken = torch.empty(free() - GIB, dtype=torch.uint8, device=CUDA)
    with pytest.raises(RuntimeError, match="the GPU has no 2.00 GiB free"):
        arena.restore()
    assert not arena.mapped
    del taken
    torch.cuda.empty_cache()
    arena.restore()
    arena.bytes.fill_(3)
    assert arena.mapped and arena.bytes[-1].item() == 3


# ----------------------------------------------------------------------------------------------------------- engine


@pytest.mark.parametrize("shape", [SHAPE, HYBRID, MOE], ids=["dense", "hybrid", "moe"])
def test_bitwise_the_same_after_sleep(shape: dict[str, Any], tmp_path: Path) -> None:
    """With the graphs captured before, in fp32; the weights were changed after the start, as level 1 must notice."""
    plain = make_core(tmp_path, shape, **BASE)
    core = make_core(tmp_path, shape, enable_sleep_mode=True, **BASE)
    wanted = requests()
    for i in range(2):  # until all steps are graphs that will ever be
        first = outcome(core, f"warm {i}", wanted)
        core.control("reset_prefix_cache")
    before, captured = outcome(core, "before", wanted), dict(core.runner.graphs.captured)
    assert captured and before == first
    assert [tokens for tokens, _, _ in before] == [tokens for tokens, _, _ in outcome(plain, "plain", wanted)]
    for cycle in range(3):
        core.sleep(1)
        core.wake_up()
        assert outcome(core, f"cycle {cycle}", wanted) == before
    assert core.runner.graphs.captured.keys() == captured.keys()
    assert all(core.runner.graphs.captured[each] is captured[each] for each in captured)


@pytest.mark.parametrize("shape", [WIDE, WIDE_MOE], ids=["dense", "moe"])
def test_bitwise_the_same_with_tensor_maps(shape: dict[str, Any], tmp_path: Path) -> None:
    """bf16 in pages of 64 tokens: on Hopper weights and KV pages are read through tensor maps, some of them made once. Both levels."""
    core = dummy_core(tmp_path, shape, num_pages=100, max_num_seqs=16)
    wanted = requests(4096)
    for i in range(3):
        first = outcome(core, f"warm {i}", wanted)
        core.control("reset_prefix_cache")
    before = outcome(core, "before", wanted)
    assert before == first, "it does not repeat itself, sleep or no sleep"
    for cycle, level in enumerate((1, 2, 1, 2)):
        core.sleep(level)
        held = torch.full((256 << 20,), 0xFF, dtype=torch.uint8, device=CUDA)
        core.wake_up()
        assert not any(cache.any() for pair in core.runner.caches for cache in pair)
        assert outcome(core, f"cycle {cycle}", wanted) == before
        del held


@pytest.mark.parametrize("family", ["qwen2", "qwen3_moe"])  # tied embeddings and biases; stacked experts
@pytest.mark.parametrize("kernels", ["triton", "reference"])
def test_level_2_reads_the_checkpoint_again(family: str, kernels: str, tmp_path: Path) -> None:
    llm = LLM(str(tiny_folder(family, tmp_path)), dtype="bfloat16", kernels=kernels, skip_tokenizer_init=True, num_pages=100, enable_sleep_mode=True)
    prompts: Any = [{"prompt_token_ids": [5, 9, 23, 7, 42, 11, 3, 8, 19, 77][i:]} for i in range(3)]

    def tokens() -> list[list[int]]:
        return [out.outputs[0].token_ids for out in llm.generate(prompts, GREEDY, use_tqdm=False)]

    tokens()
    llm.core.control("reset_prefix_cache")
    before = tokens()
    for level in (2, 1, 2):
        assert llm.sleep(level)["level"] == level
        llm.wake_up()
        assert tokens() == before
    llm.sleep(2)
    assert llm.wake_up(["weights"])["asleep"] == ["kv_cache"]
    llm.wake_up(["kv_cache"])
    assert tokens() == before


@alone
def test_memory_is_given_back_and_a_wake_up_without_room_changes_nothing(tmp_path: Path) -> None:
    core = dummy_core(tmp_path, WIDE, num_pages=8000, max_num_seqs=16)  # 3 GiB of KV pages
    wanted = requests(4096)
    outcome(core, "warm", wanted)
    core.control("reset_prefix_cache")
    before = outcome(core, "before", wanted)
    awake, arenas = free(), core.runner.memory.weights.size + core.runner.memory.kv.size
    report = core.sleep()
    assert free() - awake >= 0.99 * arenas and report["bytes"] >= arenas and report["held_bytes"] < GIB
    taken = torch.empty(free() - GIB, dtype=torch.uint8, device=CUDA)
    left = free()
    for _ in range(2):
        with pytest.raises(RuntimeError, match="GiB free"):
            core.wake_up()
        assert core.is_sleeping and free() >= left - (2 << 20)  # the weights' arena, for which there was room, is not held
    del taken
    torch.cuda.empty_cache()
    core.wake_up()
    assert outcome(core, "after", wanted) == before


@alone
def test_an_8b_model_sleeps_and_wakes(tmp_path: Path) -> None:
    """Prints how long that takes; the target for a wake-up from host memory is about a second."""
    if torch.cuda.mem_get_info()[0] < 40 * GIB or os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") < 24 * GIB:
        pytest.skip("needs 40 GiB on the GPU and 24 of host memory")
    core = dummy_core(tmp_path, QWEN3_8B, max_model_len=8192)
    wanted = requests(4096)
    for i in range(2):
        outcome(core, f"warm {i}", wanted)
        core.control("reset_prefix_cache")
    before, awake = outcome(core, "before", wanted), free()
    print(f"\nawake: {awake / GIB:.1f} GiB free")
    for name, level in (("first", 1), ("second", 1), ("third", 1), ("level 2", 2), ("after level 2", 1)):
        asleep = core.sleep(level)
        left = free()
        up = core.wake_up()
        start = time.perf_counter()
        again = outcome(core, name, wanted)
        print(
            f"{name}: sleep {asleep['seconds']:.2f} s ({asleep['bytes'] / GIB:.1f} GiB given back, {left / GIB:.1f} free, torch holds "
            f"{asleep['held_bytes'] / GIB:.2f}, pinned {asleep['host_bytes'] / GIB:.1f}), wake {up['seconds']:.2f} s, "
            f"then 7 requests {time.perf_counter() - start:.2f} s"
        )
        assert again == before
        assert left - awake >= 0.99 * (core.runner.memory.weights.size + core.runner.memory.kv.size)


@alone
def test_two_engines_take_turns(tmp_path: Path) -> None:
    """Processes that each have 80 % of the GPU when awake. Prints how long a swap takes."""

    def config(name: str, seed: int) -> EngineConfig:
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps({**QWEN3_8B, "num_hidden_layers": 8}))
        return EngineConfig(
            model=str(folder), load_format="dummy", seed=seed, device="cuda", skip_tokenizer_init=True, max_model_len=4096,
            gpu_memory_utilization=0.8, enable_sleep_mode=True, num_threads=4,
        )  # fmt: skip

    async def tokens(engine: AsyncEngine) -> list[int]:
        *_, last = [output async for output in engine.generate(list(range(100, 180)), GREEDY)]
        return last.outputs[0].token_ids

    async def body() -> None:
        a, b = AsyncEngine(config("a", 1)), AsyncEngine(config("b", 2))
        try:
            await a.start()
            first = await tokens(a)
            await a.sleep()
            await b.start()  # there would be no room for it beside the other
            second = await tokens(b)
            assert second != first
            with pytest.raises(RuntimeError, match="GiB free"):
                await a.wake_up()
            with pytest.raises(EngineAsleepError):
                await tokens(a)
            assert a.is_sleeping and await tokens(b) == second
            engines = {"a": (a, first), "b": (b, second)}
            for into, out in (("a", "b"), ("b", "a"), ("a", "b"), ("b", "a")):
                start = time.perf_counter()
                await engines[out][0].sleep()
                between = time.perf_counter()
                await engines[into][0].wake_up()
                end = time.perf_counter()
                engine, expected = engines[into]
                assert await tokens(engine) == expected
                print(f"\n{out} asleep in {between - start:.2f} s, {into} awake in {end - between:.2f} s")
            pid = a._link.pid if a._link else 0  # asleep now
            os.kill(pid, signal.SIGKILL)
            await asyncio.sleep(1)
            assert a.is_sleeping and await tokens(b) == second
            await b.sleep(2)
            await a.wake_up()  # a new process
            assert await tokens(a) == first
        finally:
            await asyncio.gather(a.shutdown(), b.shutdown())

    asyncio.run(body())

"""`python -m miniinfer.bench.peer_llamacpp`: this engine beside llama.cpp on one CPU: same shape, bf16 weights, same threads.

Owns the comparison: it writes a GGUF of random weights, runs llama.cpp through llama-cpp-python's low-level C interface and ours through
EngineCore, in turns within one process, so that other load on the machine meets both. Ours is timed with all of a step (planning, sampling,
bookkeeping), llama.cpp without sampling. Needs the packages llama-cpp-python and gguf, which nothing else does.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from miniinfer.bench.floors import decode_bytes
from miniinfer.config import ConfigError, EngineConfig, ModelConfig
from miniinfer.data import Add, SamplingParams
from miniinfer.engine.core import EngineCore

SHAPE = Path(__file__).parent / "shapes" / "Qwen3-0.6B"
PROMPT, CONTEXT, BATCH, LENGTH = 256, 64, 8, 512  # tokens of the prompt in prefill and before decode; the larger batch; room for a sequence


def write_gguf(model: ModelConfig, path: Path) -> None:
    """A GGUF file of a Qwen3 shape with random bf16 weights and no vocabulary."""
    gguf = _need("gguf")
    out = gguf.GGUFWriter(path, "qwen3")
    out.add_block_count(model.num_layers)
    out.add_context_length(model.max_position)
    out.add_embedding_length(model.hidden_size)
    out.add_feed_forward_length(model.intermediate_size)
    out.add_head_count(model.num_heads)
    out.add_head_count_kv(model.num_kv_heads)
    out.add_key_length(model.head_dim)
    out.add_value_length(model.head_dim)
    out.add_layer_norm_rms_eps(model.norm_eps)
    out.add_rope_freq_base(model.rope.theta)
    out.add_vocab_size(model.vocab_size)
    out.add_tokenizer_model("none")
    rng = np.random.default_rng(0)

    def matrix(name: str, rows: int, columns: int) -> None:
        bits = (rng.standard_normal((rows, columns), dtype=np.float32) * 0.02).view(np.uint32) >> 16
        data = bits.astype(np.uint16).view(np.uint8)
        out.add_tensor(name + ".weight", data, raw_dtype=gguf.GGMLQuantizationType.BF16)

    def ones(name: str, size: int) -> None:
        out.add_tensor(name + ".weight", np.ones(size, dtype=np.float32))

    h, d, i = model.hidden_size, model.head_dim, model.intermediate_size
    matrix("token_embd", model.vocab_size, h)
    ones("output_norm", h)
    for n in range(model.num_layers):
        block = f"blk.{n}."
        ones(block + "attn_norm", h)
        ones(block + "ffn_norm", h)
        ones(block + "attn_q_norm", d)
        ones(block + "attn_k_norm", d)
        matrix(block + "attn_q", model.num_heads * d, h)
        matrix(block + "attn_k", model.num_kv_heads * d, h)
        matrix(block + "attn_v", model.num_kv_heads * d, h)
        matrix(block + "attn_output", h, model.num_heads * d)
        matrix(block + "ffn_gate", i, h)
        matrix(block + "ffn_up", i, h)
        matrix(block + "ffn_down", h, i)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()


class LlamaCpp:
    """llama.cpp with its defaults (flash attention where it chooses so)."""

    def __init__(self, path: Path, threads: int) -> None:
        self.lib = lib = _need("llama_cpp")
        self._quiet = lib.llama_log_callback(lambda level, text, data: None)  # C keeps the pointer, so we keep the object
        lib.llama_log_set(self._quiet, ctypes.c_void_p(0))
        lib.llama_backend_init()
        self.model = lib.llama_model_load_from_file(str(path).encode(), lib.llama_model_default_params())
        params = lib.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch, params.n_seq_max = BATCH * LENGTH, 512, 512, BATCH
        params.n_threads = params.n_threads_batch = threads
        self.context = lib.llama_init_from_model(self.model, params)
        if not self.context:
            raise RuntimeError("llama.cpp could not make a context")
        self.tokens = lib.llama_batch_init(512, 0, 1)

    def prefill(self, prompt: list[int]) -> float:
        """Seconds to compute a prompt up to its last token's logits."""
        self.lib.llama_memory_clear(self.lib.llama_get_memory(self.context), True)
        return self._step([(token, at, 0, at == len(prompt) - 1) for at, token in enumerate(prompt)])

    def decode(self, prompts: list[list[int]], steps: int) -> list[float]:
        """Seconds of each of `steps` steps that give every sequence one token, after their prompts."""
        self.lib.llama_memory_clear(self.lib.llama_get_memory(self.context), True)
        self._step([(token, at, sequence, at == len(p) - 1) for sequence, p in enumerate(prompts) for at, token in enumerate(p)])
        return [self._step([(1000 + i, len(p) + i, sequence, True) for sequence, p in enumerate(prompts)]) for i in range(steps)]

    def _step(self, tokens: list[tuple[int, int, int, bool]]) -> float:
        """Computes (id, position, sequence, wants logits) tokens and waits for the logits."""
        batch = self.tokens
        batch.n_tokens = len(tokens)
        for i, (token, position, sequence, logits) in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, position, 1
            batch.seq_id[i][0], batch.logits[i] = sequence, logits
        begin = time.perf_counter()
        if self.lib.llama_decode(self.context, batch):
            raise RuntimeError("llama_decode failed")
        self.lib.llama_get_logits(self.context)[0]
        return time.perf_counter() - begin


class Ours:
    """This engine, greedy, without the prefix cache."""

    def __init__(self, model: str, threads: int) -> None:
        config = EngineConfig(
            model=model, load_format="dummy", dtype="bfloat16", device="cpu", skip_tokenizer_init=True, enable_prefix_caching=False,
            max_model_len=LENGTH, max_num_seqs=BATCH, num_threads=threads,
        )  # fmt: skip
        self.core, self.count = EngineCore(config), 0

    def _add(self, prompt: list[int], output: int) -> None:
        self.count += 1
        self.core.add(Add(str(self.count), prompt, SamplingParams(temperature=0, max_tokens=output, ignore_eos=True)))

    def _step(self) -> tuple[float, int]:
        begin = time.perf_counter()
        updates = self.core.step()
        return time.perf_counter() - begin, sum(len(u.token_ids) for u in updates)

    def _finish(self) -> None:
        while self.core.has_work:
            self.core.step()

    def prefill(self, prompt: list[int]) -> float:
        """Seconds to compute a prompt and sample its first token."""
        self._add(prompt, 1)
        seconds, tokens = self._step()
        assert tokens == 1
        self._finish()
        return seconds

    def decode(self, prompts: list[list[int]], steps: int) -> list[float]:
        """Seconds of each of `steps` steps that give every sequence one token, after their prompts."""
        for prompt in prompts:
            self._add(prompt, steps + 1)
        self._step()
        times = [self._step() for _ in range(steps)]
        assert all(tokens == len(prompts) for _, tokens in times)
        self._finish()
        return [seconds for seconds, _ in times]


def read_ceiling(buffer: torch.Tensor) -> float:
    """Bytes per second of one pass of torch's sum over the buffer."""
    begin = time.perf_counter()
    buffer.sum()
    return buffer.nbytes / (time.perf_counter() - begin)


def compare(model: ModelConfig, runners: dict[str, LlamaCpp | Ours], rounds: int, steps: int) -> dict[str, dict[str, list[float]]]:
    """Tokens per second of every runner at every workload, one figure per round (for decode: of its median step), in turns."""
    rng = random.Random(0)
    buffer = torch.ones(1 << 26)
    rates: dict[str, dict[str, list[float]]] = {name: {"prefill": [], "decode1": [], "decode8": []} for name in runners}
    rates["memory"] = {"read": []}

    def prompt(length: int) -> list[int]:
        return [rng.randrange(1000, min(100_000, model.vocab_size)) for _ in range(length)]

    for turn in range(rounds + 1):
        work: dict[str, Callable[[LlamaCpp | Ours], float]] = {
            "prefill": lambda r: PROMPT / r.prefill(prompt(PROMPT)),
            "decode1": lambda r: 1 / statistics.median(r.decode([prompt(CONTEXT)], steps)),
            "decode8": lambda r: BATCH / statistics.median(r.decode([prompt(CONTEXT) for _ in range(BATCH)], steps)),
        }
        for name, run in work.items():
            for who, runner in runners.items():
                rate = run(runner)
                if turn:  # the first round warms up
                    rates[who][name].append(rate)
        rates["memory"]["read"].append(read_ceiling(buffer))
    return rates


def report(model: ModelConfig, rates: dict[str, dict[str, list[float]]], threads: int) -> dict[str, Any]:
    """Prints the table; returns what the JSON line says."""
    ceiling = max(rates["memory"]["read"]) / 1e9
    print(f"{threads} threads, bf16; read ceiling {ceiling:.1f} GB/s (best sum over 256 MiB)")
    print(f"{'':10}{'llama.cpp':>20}{'miniinfer':>20}{'ratio':>16}{'ours, GB/s':>12}")
    print(f"{'tok/s':10}{'median':>10}{'best':>10}{'median':>10}{'best':>10}{'median':>8}{'best':>8}{'median':>12}")
    found: dict[str, Any] = {"threads": threads, "read_ceiling_gb_s": ceiling}
    for name in ("prefill", "decode1", "decode8"):
        theirs, ours = rates["llama.cpp"][name], rates["miniinfer"][name]
        a, b, best_a, best_b = statistics.median(theirs), statistics.median(ours), max(theirs), max(ours)
        batch = BATCH if name == "decode8" else 1
        read = decode_bytes(model, batch, CONTEXT, 2) * b / batch / 1e9
        share = "" if name == "prefill" else f"{read:12.1f}"
        print(f"{name:10}{a:10.1f}{best_a:10.1f}{b:10.1f}{best_b:10.1f}{b / a:8.2f}{best_b / best_a:8.2f}{share}")
        found[name] = {"llamacpp_tok_s": a, "miniinfer_tok_s": b, "ratio": b / a, "ratio_of_best": best_b / best_a}
        if share:
            found[name]["gb_s"] = read
    return found


def _need(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise ConfigError(f"this benchmark needs the package '{name}': pip install llama-cpp-python gguf") from None


def main(argv: list[str] | None = None) -> None:
    """Prints a table and, last, one JSON object."""
    parser = argparse.ArgumentParser(prog="python -m miniinfer.bench.peer_llamacpp", description="This engine beside llama.cpp on the CPU, in bf16.")
    parser.add_argument("--model", default=str(SHAPE), help="folder with the config.json of a Qwen3 shape (random weights)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5, help="turns of each workload and engine")
    parser.add_argument("--steps", type=int, default=12, help="decode steps in a turn; their median counts")
    args = parser.parse_args(argv)
    model = ModelConfig.from_folder(args.model)
    if model.family != "qwen3":
        raise ConfigError(f"{args.model}: this benchmark writes Qwen3 GGUF files only, not {model.family}")
    _need("llama_cpp")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "random.gguf"
        write_gguf(model, path)
        runners: dict[str, LlamaCpp | Ours] = {"llama.cpp": LlamaCpp(path, args.threads), "miniinfer": Ours(args.model, args.threads)}
        rates = compare(model, runners, args.rounds, args.steps)
    print(json.dumps(report(model, rates, args.threads)))


if __name__ == "__main__":
    main()

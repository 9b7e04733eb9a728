"""What structured output costs: how long grammars compile, how long a step's masks take, and whether what grammars accept is valid.

python tools/grammar.py [--schemas 2000]      over hand-written and generated JSON schemas (tests/schemas.py), with the bundled vocabulary and
                                              one of 150,000 made-up words, or a public one: --vocabulary FILE.tiktoken
python tools/grammar.py --model FOLDER        throughput with a JSON schema beside free generation, 64 requests at once, dummy weights
"""

from __future__ import annotations

import argparse
import base64
import json
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from schemas import WRITTEN, generated  # noqa: E402

from miniinfer.data import SamplingParams, StructuredOutputsParams  # noqa: E402
from miniinfer.engine.guidance import Backend  # noqa: E402
from miniinfer.engine.text import byte_alphabet  # noqa: E402
from miniinfer.models.hub import BUNDLED  # noqa: E402

LONGEST = 400  # tokens of a random walk through a schema; beyond CLOSING it takes the way out where there is one
CLOSING = 40
SPACE = "\u0120"  # as byte-level vocabularies spell it


def many_words(folder: Path, size: int) -> Path:
    """A tokenizer with so many words as code and prose have; quotes in one of a hundred, as in the vocabularies of GPT-4 and GPT-4o."""
    rng = random.Random(0)
    words = dict.fromkeys(byte_alphabet())
    while len(words) < size - 1:
        word = rng.choice(["", SPACE, SPACE]) + "".join(rng.choice("etaoinshrdlucmfwypvbgk") for _ in range(rng.randrange(2, 12)))
        quoted = [word + '"', '"' + word, word + '":', word + '",']
        words[rng.choice(quoted if rng.random() < 0.01 else [word, word, word, word + SPACE])] = None
    return write_tokenizer(folder, list(words))


def public_words(folder: Path, file: Path) -> Path:
    """The words of a vocabulary in tiktoken's format (base64, rank), without its rules of merging, which no mask asks for."""
    spelled = {byte: letter for letter, byte in byte_alphabet().items()}
    tokens = [base64.b64decode(line.split()[0]) for line in file.read_text().splitlines()]
    return write_tokenizer(folder, list(dict.fromkeys([*byte_alphabet(), *("".join(spelled[byte] for byte in token) for token in tokens)])))


def write_tokenizer(folder: Path, words: list[str]) -> Path:
    made = tokenizers.Tokenizer(tokenizers.models.BPE({word: i + 1 for i, word in enumerate(words)} | {"<eos>": 0}, []))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    made.add_special_tokens(["<eos>"])
    made.save(str(folder / "tokenizer.json"))
    return folder


def walk(backend: Backend, schema: dict[str, Any] | bool, seed: int, size: int, eos: int, masks: list[float]) -> tuple[list[int], float, bool]:
    """A random output that the schema's grammar accepts, token by token, the time its grammar took to compile, and whether it came to an end."""
    rng, begin = random.Random(seed), time.perf_counter()
    matcher = backend.compile(StructuredOutputsParams(json=schema))
    compiled, output = time.perf_counter() - begin, list[int]()
    words = np.zeros((1, -(-size // 32)), dtype=np.int32)
    for length in range(LONGEST):
        begin = time.perf_counter()
        backend.fill([(matcher, 0)], words)
        masks.append(time.perf_counter() - begin)
        allowed = np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little")[:size])
        may_end = eos in allowed
        allowed = allowed[allowed != eos]
        if may_end and (length > CLOSING or not len(allowed) or rng.random() < 0.3):
            return output, compiled, True
        if length > CLOSING:
            closing = [token for token in allowed if _text(backend, token)[:1] in (b'"', b"}", b"]")]
            allowed = closing or allowed
        output.append(int(rng.choice(allowed)))
        assert matcher.accept(output[-1])
        if matcher.finished:
            return output, compiled, True
    return output, compiled, False


def _text(backend: Backend, token: int) -> bytes:
    return bytes(backend._tokenizer.token_bytes(token))


def vocabulary(folder: Path, file: Path | None, size: int) -> Path:
    return public_words(folder, file) if file is not None else many_words(folder, size)


def costs(count: int, file: Path | None) -> None:
    """Prints percentiles, and how many outputs jsonschema finds valid."""
    import jsonschema

    with tempfile.TemporaryDirectory() as temporary:
        large = vocabulary(Path(temporary), file, 150_000)
        for name, folder, size, eos in (("bundled", BUNDLED, 6144, 2), (file.stem if file else "150k", large, 200_064 if file else 150_016, 0)):
            backend, masks, compiles, valid, cut = Backend(folder, size, [eos]), list[float](), list[float](), 0, 0
            schemas = [*WRITTEN, *map(generated, range(count))]
            for seed, schema in enumerate(schemas):
                output, seconds, ended = walk(backend, schema, seed, size, eos, masks)
                compiles.append(seconds)
                cut += not ended
                if ended:
                    value = json.loads(b"".join(_text(backend, token) for token in output))
                    jsonschema.Draft202012Validator(schema, format_checker=jsonschema.FormatChecker()).validate(value)
                    valid += 1
            print(f"{name}: {len(schemas)} schemas, {valid} outputs, all valid, {cut} not ended within {LONGEST} tokens; {len(masks)} masks")
            for what, values in (("mask", masks), ("compile", compiles)):
                p50, p99 = np.percentile(values, (50, 99))
                print(f"  {what}: p50 {1e6 * p50:,.0f} us, p99 {1e6 * p99:,.0f} us, most {1e6 * max(values):,.0f} us", flush=True)


def throughput(model: str, rounds: int, file: Path | None) -> None:
    """Prints tokens per second with and without a schema, in turn, medians. The vocabulary is of 150,000 words where the model's is as large."""
    config = json.loads((Path(model) / "config.json").read_text()) | {"eos_token_id": 0, "bos_token_id": None}
    with tempfile.TemporaryDirectory() as temporary:
        folder = vocabulary(Path(temporary), file, min(150_000, config["vocab_size"] - 16))
        (folder / "config.json").write_text(json.dumps(config))
        rates = _rates(temporary, rounds)
    free, bound = (statistics.median(part) for part in zip(*rates, strict=True))
    print(f"{model}: {free:,.0f} tok/s free, {bound:,.0f} tok/s with a schema: {bound / free:.3f}")


def _rates(folder: str, rounds: int) -> list[tuple[float, float]]:
    from miniinfer import LLM

    llm = LLM(folder, load_format="dummy", max_num_seqs=64, max_model_len=1024, enable_prefix_caching=False)
    rng = random.Random(0)
    prompts: list[Any] = [{"prompt_token_ids": [rng.randrange(10, 5000) for _ in range(128)]} for _ in range(64)]
    person = {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 40},
            "age": {"type": "integer"},
            "tags": {"type": "array", "items": {"enum": ["a", "b"]}},
        },
        "required": ["name", "age", "tags"],
        "additionalProperties": False,
    }
    endless = StructuredOutputsParams(json=json.dumps({"type": "array", "items": person, "minItems": 1000}))

    def rate(structure: StructuredOutputsParams | None) -> float:
        params = SamplingParams(temperature=0.8, max_tokens=256, ignore_eos=True, detokenize=False, seed=1, structured_outputs=structure)
        begin = time.perf_counter()
        outputs = llm.generate(prompts, params, use_tqdm=False)
        return sum(len(output.outputs[0].token_ids) for output in outputs) / (time.perf_counter() - begin)

    rate(None), rate(endless)
    return [(rate(None), rate(endless)) for _ in range(rounds)]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--schemas", type=int, default=2000, help="generated schemas (2000)")
    parser.add_argument("--model", help="measure throughput of this model's shape instead")
    parser.add_argument("--vocabulary", type=Path, metavar="FILE", help="words in tiktoken's format instead of made-up ones")
    parser.add_argument("--rounds", type=int, default=3, help="of throughput (3)")
    asked = parser.parse_args()
    if asked.model:
        throughput(asked.model, asked.rounds, asked.vocabulary)
    else:
        costs(asked.schemas, asked.vocabulary)

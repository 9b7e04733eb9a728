"""Trains the bundled model's tokenizer and writes everything of the checkpoint folder but the weights and the model card.

usage: make_tokenizer.py [--text FILE] [--out FOLDER]
Byte-level BPE [Sennrich 2016, GPT-2's byte alphabet] over the real text and as much generated conversation; digits are split one by one.
"""

from __future__ import annotations

import argparse
import gzip
import json
from collections.abc import Iterator
from pathlib import Path

import mix
from chat import ASSETS, END_OF_TEXT, IM_END, SPECIALS
from sample import Voice
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

VOCABULARY = 6144
LAYERS, HIDDEN, INNER, HEADS, KV_HEADS, HEAD_DIM = 10, 256, 768, 4, 2, 64
CONTEXT = 2048
# A word with what stands before it, one digit, a run of punctuation, line ends, spaces.
PIECES = r"'(?:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def conversations(count: int) -> Iterator[str]:
    """What generated conversations say, without the template's frame."""
    voice = Voice("tokenizer")
    for _ in range(count):
        sample = mix.conversation(voice, training=True)
        for message in sample.messages:
            yield message["role"]
            yield message["content"] or json.dumps(message["tool_calls"][0]["function"])
        for tool in sample.tools[:1]:
            yield json.dumps(tool)


def train(text: Path) -> Tokenizer:
    """A tokenizer of VOCABULARY entries, the specials first."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip
    tokenizer.decoder = decoders.ByteLevel()
    with gzip.open(text, "rt", encoding="utf-8") as f:
        documents = json.load(f)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIALS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*documents, *conversations(100_000)], trainer)
    return tokenizer


def write(tokenizer: Tokenizer, folder: Path) -> None:
    """tokenizer.json, tokenizer_config.json, config.json and generation_config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    state = json.loads(tokenizer.to_str())
    for token in state["added_tokens"]:  # the marks of a tool call are text that a client's parser must see
        token["special"] = token["id"] <= IM_END
    (folder / "tokenizer.json").write_text(json.dumps(state, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
    template = (Path(__file__).parent / "chat_template.jinja").read_text(encoding="utf-8").rstrip("\n")
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast", "eos_token": SPECIALS[IM_END], "pad_token": SPECIALS[END_OF_TEXT],
        "clean_up_tokenization_spaces": False, "model_max_length": CONTEXT, "chat_template": template,
    }  # fmt: skip
    config = {
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "vocab_size": VOCABULARY, "hidden_size": HIDDEN, "intermediate_size": INNER,
        "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "head_dim": HEAD_DIM, "hidden_act": "silu",
        "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "max_position_embeddings": CONTEXT, "tie_word_embeddings": True, "attention_bias": False,
        "use_sliding_window": False, "sliding_window": None, "eos_token_id": IM_END, "pad_token_id": END_OF_TEXT, "torch_dtype": "bfloat16",
    }  # fmt: skip
    generation = {"eos_token_id": [IM_END, END_OF_TEXT], "pad_token_id": END_OF_TEXT, "do_sample": True, "temperature": 0.3, "top_p": 0.9}
    for name, value in (("tokenizer_config.json", settings), ("config.json", config), ("generation_config.json", generation)):
        (folder / name).write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, default=Path(".data/text.json.gz"))
    parser.add_argument("--out", type=Path, default=ASSETS)
    args = parser.parse_args()
    write(train(args.text), args.out)


if __name__ == "__main__":
    main()

"""Makes training shards: generated conversations with all processor cores, and the real text cut into documents.

usage: generate.py --out FOLDER [--seconds S | --tokens N] [--processes P] [--text FILE]
Writes FOLDER/train, FOLDER/valid (fresh conversations about held-out problems) and FOLDER/valid_text (pages kept out of training).
"""

from __future__ import annotations

import argparse
import gzip
import json
import multiprocessing
import os
import time
import zlib
from pathlib import Path

import mix
import torch
from chat import END_OF_TEXT, Encoder
from sample import Sample, Voice

from miniinfer.train.data import Document, write_shard

LONGEST = 1024  # tokens of a document; longer ones are cut
SHARD = 4_000_000  # tokens
TEXT_REPEAT = 2  # an epoch shows real text twice, generated text once
TEXT_HELD_OUT = 50  # one page in so many


def _work(job: tuple[int, Path, int, float]) -> int:
    """One process: conversations of its own seed until it has made `tokens` or the time is up. Returns the tokens made."""
    number, folder, tokens, deadline = job
    torch.set_num_threads(1)
    encoder, voice = Encoder(), Voice(f"train {number}")
    done, shard = 0, 0
    while done < tokens and time.time() < deadline:
        documents: list[Document] = []
        size = 0
        while size < min(SHARD, tokens - done) and time.time() < deadline:
            for ids, marks in encoder.encode([mix.conversation(voice, training=True) for _ in range(500)]):
                if len(ids) <= LONGEST:
                    documents.append((ids, marks))
                    size += len(ids)
        write_shard(folder / f"talk-{number:02}-{shard:03}.safetensors", documents)
        done, shard = done + size, shard + 1
    return done


def held_out(seed: str, count: int) -> list[Sample]:
    """Conversations whose last problem training never shows (closed sets have none)."""
    voice, found = Voice(seed), []
    while len(found) < count:
        sample = mix.conversation(voice, training=False)
        if sample.held_out:
            found.append(sample)
    return found


def pages(source: Path) -> tuple[list[Document], list[Document]]:
    """The real text as (training, held-out) documents, all of whose tokens are learned. A page starts after <|endoftext|>, and ends with it."""
    encoder = Encoder()
    with gzip.open(source, "rt", encoding="utf-8") as f:
        texts: list[str] = json.load(f)
    shown: list[Document] = []
    kept: list[Document] = []
    for page in texts:
        ids = [END_OF_TEXT, *encoder.ids(page), END_OF_TEXT]
        chosen = kept if zlib.crc32(page.encode()) % TEXT_HELD_OUT == 0 else shown
        chosen += [(ids[i : i + LONGEST], [1] * len(ids[i : i + LONGEST])) for i in range(0, len(ids), LONGEST)]
    return shown, kept


def _write_pages(folder: Path, source: Path) -> dict[str, int]:
    torch.set_num_threads(1)
    shown, kept = pages(source)
    write_shard(folder / "train" / "text.safetensors", shown, repeat=TEXT_REPEAT)
    write_shard(folder / "valid_text" / "text.safetensors", kept)
    return {"text": sum(len(ids) for ids, _ in shown), "text held out": sum(len(ids) for ids, _ in kept)}


def _write_held_out(folder: Path, count: int) -> None:
    torch.set_num_threads(1)
    write_shard(folder / "valid" / "talk.safetensors", Encoder().encode(held_out("valid", count)))


def everything(folder: Path, tokens: int, seconds: float, processes: int, source: Path | None, valid: int = 4000) -> dict[str, int]:
    """All three folders, made side by side; returns how many tokens each kind has."""
    (folder / "train").mkdir(parents=True, exist_ok=True)
    jobs = [(i, folder / "train", -(-tokens // processes), time.time() + seconds) for i in range(processes)]
    with multiprocessing.get_context("fork").Pool(processes + 2) as pool:
        beside = [pool.apply_async(_write_pages, (folder, source))] if source else []
        last = pool.apply_async(_write_held_out, (folder, valid))
        counts = {"conversation": sum(pool.imap_unordered(_work, jobs))}
        for job in beside:
            counts |= job.get()
        last.get()
    return counts


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=1e9, help="stop generating after this time")
    parser.add_argument("--tokens", type=int, default=250_000_000, help="stop generating at this many")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--text", type=Path, help="what prepare_text.py wrote")
    args = parser.parse_args()
    began = time.time()
    print(everything(args.out, args.tokens, args.seconds, args.processes, args.text), f"{time.time() - began:.0f} s")


if __name__ == "__main__":
    main()

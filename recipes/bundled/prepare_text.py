"""Collects the real text: CPython's library sources and documentation, both under the PSF licence.

usage: prepare_text.py [--docs FOLDER] [--out FILE] [--words FILE]
FOLDER holds the documentation's reStructuredText, for instance /usr/share/doc/python3.11/html/_sources of Debian's package python3.11-doc.
Writes one JSON list of documents (gzip); with --words also the common words, the repository's words.txt.
Tests, third-party folders and machine-made tables are left out.
"""

from __future__ import annotations

import argparse
import gzip
import json
import re
import sysconfig
import textwrap
from collections import Counter
from pathlib import Path

SKIP = set("site-packages dist-packages test tests idlelib lib2to3 pydoc_data __pycache__ encodings turtledemo ensurepip".split())


def sources(folder: Path) -> list[str]:
    """The library's own modules of moderate size."""
    out = []
    for path in sorted(folder.rglob("*.py")):
        if SKIP & set(path.relative_to(folder).parts[:-1]) or path.name.startswith("_sysconfigdata") or path.stat().st_size > 200_000:
            continue
        try:
            out.append(path.read_text(encoding="utf-8"))
        except UnicodeDecodeError:
            continue
    return out


def documentation(folder: Path) -> list[str]:
    """Pages of the documentation, roles such as :func:`len` reduced to their text."""
    out = []
    for path in sorted(folder.rglob("*.rst*")):
        if "changelog" in path.name or "whatsnew" in path.parts and path.name < "3":
            continue
        text = path.read_text(encoding="utf-8")
        text = re.sub(r":[a-z:-]+:`[~!]?([^`<]*?)(?: *<[^`]*>)?`", r"`\1`", text)
        out.append(re.sub(r"\n{3,}", "\n\n", text))
    return out


# a lower-case word of running text, not a part of a name, a path or markup
_WORD = re.compile(r"(?<![\w.`:/_'\"\-*@%\\<])[a-z]{3,12}(?![\w`:/_(\-='\"*@]|\.\w)")
_UNFIT = {"sex", "suck", "sucks", "crap", "damn", "hell"}


def common_words(documents: list[str]) -> list[str]:
    """Words with a vowel that occur at least eight times, in at least six documents; sorted."""
    times: Counter[str] = Counter()
    places: Counter[str] = Counter()
    for text in documents:
        words = _WORD.findall(text)
        times.update(words)
        places.update(set(words))
    return sorted(w for w in times if times[w] >= 8 and places[w] >= 6 and re.search("[aeiouy]", w) and w not in _UNFIT)


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--docs", type=Path, help="folder of the documentation's sources")
    parser.add_argument("--out", type=Path, default=Path(".data/text.json.gz"))
    parser.add_argument("--words", type=Path, help="also write the common words")
    args = parser.parse_args()
    documents = sources(Path(sysconfig.get_paths()["stdlib"]))
    print(f"{len(documents)} modules, {sum(map(len, documents)) / 1e6:.1f} M characters")
    if args.docs:
        pages = documentation(args.docs)
        print(f"{len(pages)} pages, {sum(map(len, pages)) / 1e6:.1f} M characters")
        documents += pages
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(args.out, "wt", encoding="utf-8") as f:
        json.dump(documents, f, ensure_ascii=False)
    if args.words:
        args.words.write_text(textwrap.fill(" ".join(common_words(documents)), 150) + "\n", encoding="utf-8")
    print(f"{args.out}: {args.out.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()

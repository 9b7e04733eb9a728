"""Writes the file list of docs/structure.md from the first line of each file's own docstring. `make docs` runs it; a test checks the result."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "structure.md"
BEGIN, END = "<!-- files: begin -->", "<!-- files: end -->"
FOLDERS = "kernels parallel quant layers models cache engine serve train bench".split()
TOP = "config.py data.py utils.py batch.py".split()


def first_line(path: Path) -> str:
    """The first line of a file's docstring, or of a C++ file's opening comment."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        return (ast.get_docstring(ast.parse(text)) or "").split("\n")[0]
    return next(iter(text.splitlines()), "").lstrip("/* ").removesuffix("*/").strip()


def file_list() -> str:
    """The list in import order, one line a file."""
    package = ROOT / "miniinfer"
    lines = [f"- `{name}` {first_line(package / name)}" for name in TOP]
    for folder in FOLDERS:
        files = [p for p in sorted((package / folder).rglob("*")) if p.suffix in (".py", ".cpp", ".hpp") and p.read_text(encoding="utf-8").strip()]
        lines += [f"- `{p.relative_to(package)}` {first_line(p)}" for p in files]
    lines.append(f"- `cli.py` {first_line(package / 'cli.py')}")
    return "\n".join(lines)


def render(page: str) -> str:
    """The page with its file list replaced by the current one."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{file_list()}\n{END}{after}"


def main() -> int:
    PAGE.write_text(render(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

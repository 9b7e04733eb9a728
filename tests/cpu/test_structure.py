"""The rules of the house, checked on the source: import order, sizes, docstrings, no globals, a light API process, options, the structure page."""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "miniinfer"
FILES = sorted(PACKAGE.rglob("*.py"))
ORDER = "config data utils batch kernels parallel quant layers models cache engine serve train bench cli __init__ __main__".split()
RANK = {name: i for i, name in enumerate(ORDER)}
NEIGHBOURS = {("serve", "train"), ("train", "serve")}
MAX_FILE, MAX_FUNCTION, MAX_OPTIONS = 700, 120, 110


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def part_of(path: Path) -> str:
    """The top-level folder or file of the package that a file belongs to."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(tree: ast.AST, path: Path) -> list[tuple[int, str]]:
    """(line, our top-level folder or file) of every import of ours, lazy and TYPE_CHECKING ones included."""
    package = ("miniinfer", *path.relative_to(PACKAGE).parent.parts)
    found = []
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            stem = ".".join(package[: len(package) - node.level + 1]) + "." if node.level else ""
            base = (stem + (node.module or "")).rstrip(".")
            names = [f"{base}.{alias.name}" for alias in node.names] if base == "miniinfer" else [base]
        for name in names:
            parts = name.split(".")
            if parts[0] == "miniinfer":
                found.append((node.lineno, parts[1] if len(parts) > 1 and parts[1] in RANK else "__init__"))
    return found


def violations(source: str, path: Path) -> list[str]:
    here = part_of(path)
    if here not in RANK:
        return [f"{name_of(path)}: '{here}' has no place in the import order"]
    found = []
    for line, there in imported(ast.parse(source), path):
        if there == "__init__":
            continue  # the package's own names: __version__
        if RANK[there] > RANK[here] or (here, there) in NEIGHBOURS:
            found.append(f"{name_of(path)}:{line} imports {there}, which comes later")
    return found


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_point_one_way(path: Path) -> None:
    assert violations(path.read_text(encoding="utf-8"), path) == []


@pytest.mark.parametrize(
    "source",
    [
        "from miniinfer.engine.llm import LLM",
        "import miniinfer.cli",
        "def f():\n    from miniinfer import serve",
        "from ..engine import core",
        "if TYPE_CHECKING:\n    from miniinfer.models import hub",
    ],
)
def test_import_check_finds(source: str) -> None:
    assert violations(source, PACKAGE / "layers" / "linear.py")


def test_serve_and_train_are_strangers() -> None:
    assert violations("import miniinfer.serve.openai", PACKAGE / "train" / "x.py")
    assert violations("import miniinfer.train.x", PACKAGE / "serve" / "x.py")


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_house_rules(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text)
    assert ast.get_docstring(tree) or not text.strip(), "a file opens with what it owns"
    for node in ast.walk(tree):
        where = f"{name_of(path)}:{getattr(node, 'lineno', 0)}"
        assert not isinstance(node, ast.Global), f"{where}: global statement"
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            assert not any(n.split(".")[0] == "transformers" for n in names), f"{where}: transformers is a test reference only"
        if isinstance(node, ast.ExceptHandler):
            assert not (len(node.body) == 1 and isinstance(node.body[0], ast.Pass)), f"{where}: swallows an exception"


def test_sizes() -> None:
    files = sorted(((len(p.read_text(encoding="utf-8").splitlines()), name_of(p)) for p in FILES), reverse=True)
    functions = []
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and part_of(path) != "kernels":
                functions.append(((node.end_lineno or 0) - node.lineno + 1, f"{name_of(path)}:{node.lineno} {node.name}"))
    functions.sort(reverse=True)
    print("\n".join(f"{lines:5} {name}" for lines, name in [*files[:8], *functions[:8]]), f"\n{sum(n for n, _ in files)} lines in all")
    assert [f for f in files if f[0] > MAX_FILE] == []
    assert [f for f in functions if f[0] > MAX_FUNCTION] == []


LIGHT = [
    "miniinfer", "miniinfer.cli", "miniinfer.serve.launch", "miniinfer.engine.client", "miniinfer.models.describe",
    "miniinfer.bench.offline", "miniinfer.bench.serving", "miniinfer.bench.start",
]  # fmt: skip


@pytest.mark.parametrize("module", LIGHT)
def test_no_torch_in_the_api_process(module: str) -> None:
    code = f"import sys, {module}; print([m for m in ('torch', 'transformers', 'triton', 'numpy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def option_classes() -> list[type]:
    from miniinfer.bench.kernels import KernelBench
    from miniinfer.bench.offline import OfflineBench
    from miniinfer.bench.serving import ServingBench
    from miniinfer.bench.start import StartBench
    from miniinfer.cli import BatchOptions, ChatOptions, GenerateOptions
    from miniinfer.config import EngineConfig, ServerConfig
    from miniinfer.models.describe import InfoOptions
    from miniinfer.train.trainer import TrainConfig

    commands = [BatchOptions, ChatOptions, GenerateOptions, InfoOptions, KernelBench, OfflineBench, ServingBench, StartBench, TrainConfig]
    return [EngineConfig, ServerConfig, *commands]


def test_options_are_few_and_described() -> None:
    from miniinfer.cli import options_of

    names: set[str] = set()
    for cls in option_classes():
        assert dataclasses.is_dataclass(cls) and cls.__doc__
        for option in options_of(cls):
            assert option.help, f"{cls.__name__}.{option.name} has no help"
            assert option.kind in (bool, int, float, str), f"{cls.__name__}.{option.name}: no command-line form"
            if option.choices:
                assert option.default in option.choices, f"{cls.__name__}.{option.name}: default is no choice"
        names |= {option.name for option in options_of(cls)}
    print(f"{len(names)} options")
    assert len(names) <= MAX_OPTIONS


def test_structure_page_is_current(pytestconfig: pytest.Config) -> None:
    spec = importlib.util.spec_from_file_location("structure", ROOT / "tools" / "structure.py")
    assert spec and spec.loader
    structure = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(structure)
    page = structure.PAGE.read_text(encoding="utf-8")
    if pytestconfig.getoption("--update-docs"):
        structure.main()
    else:
        assert page == structure.render(page), "docs/structure.md is stale; regenerate it: python tools/structure.py"
    listed = structure.file_list()
    for path in FILES:
        if path.read_text(encoding="utf-8").strip() and part_of(path) not in ("__init__", "__main__"):
            assert f"`{path.relative_to(PACKAGE)}`" in listed, f"{name_of(path)} is missing in the list"

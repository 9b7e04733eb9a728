"""Compiles kernels.cpp at first use with the machine's own C++ compiler, and loads it.

Owns the compiler call, the cache of finished libraries and the sharing of torch's OpenMP runtime: a second runtime would bring a second
pool of threads, and the two would fight for the cores.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

import torch  # noqa: F401  # maps its OpenMP runtime, which `_openmp` looks for

from miniinfer.utils import get_logger

log = get_logger(__name__)

FOLDER = Path(__file__).parent
FLAGS = ("-O3", "-std=c++17", "-fPIC", "-fopenmp", "-ffp-contract=fast", "-fno-math-errno")


def library(flags: tuple[str, ...] = ()) -> ctypes.CDLL:
    """The compiled kernels, from the cache or fresh. `flags` are added to the compiler's. RuntimeError says what is missing and the mend."""
    compiler = next((c for c in (os.environ.get("CXX"), "g++", "c++") if c and shutil.which(c)), None)
    if compiler is None:
        raise RuntimeError("no C++ compiler found; install g++ (apt install g++), or name one in CXX")
    flags = (*FLAGS, "-mcpu=native" if platform.machine() in ("aarch64", "arm64") else "-march=native", *flags)
    sources = sorted(FOLDER.glob("*.[ch]pp"))
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout
    key = "\0".join([*flags, version, _processor(), *(s.read_text(encoding="utf-8") for s in sources)])
    name = f"kernels-{hashlib.sha256(key.encode()).hexdigest()[:16]}.so"
    runtime = _openmp()
    for folder in (_cache(), Path(tempfile.gettempdir()) / f"miniinfer-{os.getuid()}"):
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            path = folder / name
            if folder.stat().st_uid != os.getuid():
                continue  # somebody else's folder: not ours to load code from
            if not path.exists():
                _compile(compiler, flags, path, link_openmp=runtime is None)
        except OSError:
            continue
        if runtime is not None:
            ctypes.CDLL(runtime, ctypes.RTLD_GLOBAL)
        return ctypes.CDLL(str(path))
    raise RuntimeError("no folder to keep the compiled kernels in: neither the cache (XDG_CACHE_HOME) nor the temporary folder can be written")


def _compile(compiler: str, flags: tuple[str, ...], path: Path, link_openmp: bool) -> None:
    """Builds under another name, then moves: another process may be doing the same."""
    log.info("compiling the CPU kernels for this machine, once")
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        part, whole = f"{folder}/kernels.o", f"{folder}/kernels.so"
        steps = [[compiler, *flags, "-c", str(FOLDER / "kernels.cpp"), "-o", part]]
        steps.append([compiler, "-shared", part, "-o", whole, *(["-fopenmp"] if link_openmp else [])])  # else torch's is found at load
        for step in steps:
            done = subprocess.run(step, capture_output=True, text=True, check=False)
            if done.returncode:
                raise RuntimeError(f"{' '.join(step)} failed: {done.stderr.strip()[-2000:]}")
        os.replace(whole, path)
    log.info("compiled the CPU kernels in %.1f s (%s)", time.perf_counter() - began, path)


def _openmp() -> str | None:
    """The file of the GNU OpenMP runtime that torch has mapped, if it has."""
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return None
    return next((line.split(maxsplit=5)[5] for line in lines if "libgomp" in line), None)


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "miniinfer"


def _processor() -> str:
    """What -march=native depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return "\n".join(sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))}))

"""`miniinfer batch`: a file of requests through the application without a server: no socket, no keys, all of the engine for the file.

Owns what the terminal sees, and the exit code. Lines, results and running them are batch_lines.py's, as for /v1/batches.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import uvloop
from tqdm import tqdm

from miniinfer.config import ConfigError, EngineConfig, ServerConfig
from miniinfer.engine.client import AsyncEngine, EngineDeadError
from miniinfer.serve.admission import Caller
from miniinfer.serve.batch_lines import Line, Result, Results, Runner, ask, check, read_lines
from miniinfer.serve.specs import Spec, specs

SHOWN = 20  # errors told of in words


def run(source: Path, target: Path, engine: EngineConfig, server: ServerConfig) -> int:
    """Runs what is not done yet; returns the process's exit code: 0 if every line has its answer, 1 if some failed.

    ConfigError for an input that is not right, before anything is loaded, and for an output file that is none."""
    if not source.is_file():
        raise ConfigError(f"input_file: there is no file {source}")
    if target.exists() and target.samefile(source):
        raise ConfigError("output_file: must not be the input file")
    longest = server.max_body_mib << 20
    found = check(read_lines(source, longest))
    if found.errors:
        rest = f"\n  and {len(found.errors) - SHOWN} more" if len(found.errors) > SHOWN else ""
        told = "".join(f"\n  {f'line {error.line}: ' if error.line else ''}{error.message}" for error in found.errors[:SHOWN])
        raise ConfigError(f"input_file: {source} cannot be run:{told}{rest}")
    try:
        results = Results(target)
    except BlockingIOError:
        raise ConfigError(f"output_file: {target} is being written by another process") from None
    except OSError as e:
        raise ConfigError(f"output_file: cannot write {target} ({e.strerror})") from None
    except ValueError as e:
        raise ConfigError(f"output_file: {e}; choose another file") from None
    left = (line for line in read_lines(source, longest) if isinstance(line, Line) and line.custom_id not in results.done)
    report = _Report(found.total, results)
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            if len(results.done) < found.total:
                runner.run(_run(specs(engine, server), server, left, report))
    except* EngineDeadError as group:
        print(f"miniinfer batch: the engine has died: {group.exceptions[0]}", file=sys.stderr)
    finally:
        report.close()
        results.close()
    return report.code


async def _run(models: list[Spec], server: ServerConfig, left: Iterator[Line], report: _Report) -> None:
    from miniinfer.serve.app import build_app  # while the engine starts
    from miniinfer.serve.fleet import Fleet, Member

    first = models[0]
    engine = AsyncEngine(first.engine, chat_template=first.server.chat_template)
    fleet = None
    try:
        await engine.start()
        fleet = Fleet(server, [Member(spec.name, spec.engine, spec.server) for spec in models])
        fleet.adopt(engine)
        app, most = build_app(fleet), 2 * int(engine.info["max_num_seqs"])  # so that there is always one waiting

        async def run(line: Line) -> Result:
            result = await ask(app, line, Caller())
            if result.status == 503 and fleet.status == "engine dead":
                raise EngineDeadError("its log says more")
            result.again = result.status == 429  # a model that cannot be loaded now can never be
            return result

        report.begin()
        await Runner(run, report.add, asyncio.Semaphore(most), most).all(left)
    finally:
        await engine.shutdown()
        if fleet is not None:
            await fleet.shutdown()


class _Report:
    """What is told while lines run, and at the end."""

    def __init__(self, total: int, results: Results) -> None:
        self._total, self._results = total, results
        self._before, self._tokens_before = len(results.done), results.usage.output
        self._start = time.monotonic()
        self._bar: Any = None

    def begin(self) -> None:
        """The model is there."""
        self._start = time.monotonic()
        self._bar = tqdm(total=self._total, initial=self._before, unit="line", dynamic_ncols=True, disable=not sys.stderr.isatty())

    async def add(self, results: list[Result]) -> None:
        """Writes results, and tells of those that are failures."""
        await asyncio.to_thread(self._results.add, results)
        for result in results:
            if not result.ok and self._results.failed <= SHOWN:
                tqdm.write(f"line {result.line.number} ({result.line.custom_id}): {result.status} {_message(result.body)}", sys.stderr)
        self._bar.set_postfix_str(f"{self._speed:.0f} tokens/s, {self._results.failed} failed", refresh=False)
        self._bar.update(len(results))

    @property
    def _speed(self) -> float:
        return (self._results.usage.output - self._tokens_before) / max(1e-9, time.monotonic() - self._start)

    def close(self) -> None:
        """One line on what has become of it."""
        results, seconds, left = self._results, time.monotonic() - self._start, self._total - len(self._results.done)
        if self._bar is not None:
            self._bar.close()
        elif left > 0:
            return  # it has not begun
        words = [f"{results.completed} of {self._total} lines done", f"{results.failed} failed"]
        words += [f"{self._before} of them were there before"] if self._before else []
        words += [f"{left} left: the same command goes on with them"] if left > 0 else []
        print(f"{', '.join(words)}; {seconds:.1f} s, {self._speed:.0f} output tokens/s", file=sys.stderr)

    @property
    def code(self) -> int:
        return 0 if self._results.completed >= self._total else 1


def _message(body: bytes) -> str:
    try:
        return str(msgspec.json.decode(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return body[:200].decode("utf-8", "replace")

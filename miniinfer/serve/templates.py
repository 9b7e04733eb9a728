"""Chat templates that come with requests: rendered in a process of their own, whose time, memory and output are bounded. Owns that process.

jinja's sandbox keeps a template from what it must not touch, but not from running for ever or filling the memory. So the server only waits for the
process, and kills it when a template takes too long; the next request starts another. `python -m miniinfer.serve.templates` is that process.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import resource
import signal
import sys
from asyncio.subprocess import DEVNULL, PIPE
from functools import lru_cache
from typing import Any

from miniinfer.engine.text import ChatTemplate, render_chat

SECONDS = 2.0  # for one conversation
START_SECONDS = 30.0  # for the process to come up
MEMORY = 1 << 30  # bytes of the process's address space
MOST_TEXT = 4 << 20  # characters of a rendered conversation
LINE = 64 << 20  # bytes of a message between the processes


class TemplateProcess:
    """Renders one conversation at a time."""

    def __init__(self) -> None:
        self._process: asyncio.subprocess.Process | None = None
        self._turn = asyncio.Lock()

    async def render(self, template: str, special_tokens: dict[str, str], arguments: dict[str, Any]) -> str:
        """`arguments` are those of engine/text.py's `render_chat`. ValueError, naming the field, if the template cannot do it within its bounds."""
        async with self._turn:
            try:
                process = await self._started()
                request = {"template": template, "special_tokens": special_tokens, "arguments": arguments}
                async with asyncio.timeout(SECONDS):
                    answer = await _exchange(process, request)
            except TimeoutError:
                await self.close()
                raise ValueError(f"chat_template: it took longer than {SECONDS:g} s") from None
            except (OSError, asyncio.IncompleteReadError, ValueError):
                await self.close()
                raise ValueError("chat_template: its process ended; it needs too much memory or writes too much") from None
            except BaseException:  # whoever asked has gone: an answer that comes later must not be taken for the next one's
                await self.close()
                raise
        if "error" in answer:
            raise ValueError(answer["error"])
        return str(answer["text"])

    async def _started(self) -> asyncio.subprocess.Process:
        if self._process is None or self._process.returncode is not None:
            environment = {name: os.environ[name] for name in ("PATH", "PYTHONPATH", "LANG", "TZ") if name in os.environ}
            self._process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "miniinfer.serve.templates", stdin=PIPE, stdout=PIPE, stderr=DEVNULL, env=environment, limit=LINE
            )
            async with asyncio.timeout(START_SECONDS):
                await _exchange(self._process, None)
        return self._process

    async def close(self) -> None:
        """Ends the process, if there is one."""
        process, self._process = self._process, None
        if process is not None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()


async def _exchange(process: asyncio.subprocess.Process, request: Any) -> Any:
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(json.dumps(request).encode() + b"\n")
    await process.stdin.drain()
    return json.loads(await process.stdout.readuntil(b"\n"))


def main() -> None:
    """Answers requests, a line of JSON each, until stdin ends."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    for line in sys.stdin.buffer:
        request = json.loads(line)
        signal.setitimer(signal.ITIMER_REAL, 2 * SECONDS)  # which ends the process, if the server that should do it is gone
        sys.stdout.write(json.dumps({} if request is None else _rendered(request)) + "\n")
        sys.stdout.flush()
        signal.setitimer(signal.ITIMER_REAL, 0)


_template = lru_cache(maxsize=16)(ChatTemplate)  # compiled once


def _rendered(request: dict[str, Any]) -> dict[str, str]:
    try:
        text = render_chat(_template(request["template"]), request["special_tokens"], **request["arguments"])
    except ValueError as e:
        return {"error": str(e)[:2000]}
    except MemoryError:
        return {"error": "chat_template: it needs too much memory"}
    if len(text) > MOST_TEXT:
        return {"error": f"chat_template: it writes {len(text)} characters, more than {MOST_TEXT}"}
    return {"text": text}


if __name__ == "__main__":
    main()

"""Reading multipart/form-data (RFC 7578) as it arrives, in bounded memory. Owns the format only; what a form may hold is its route's.

A part's data is handed on in pieces, so that a file of any size goes to disk while it comes.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass
from email.message import Message
from email.parser import HeaderParser

MAX_HEAD = 16 << 10  # bytes of a part's headers
MAX_BOUNDARY = 200  # characters; the standard has 70


class FormError(ValueError):
    """A body that is not the form it says it is."""


@dataclass(frozen=True)
class Part:
    """One field of a form: its name and, if it is a file, what the client calls it."""

    name: str
    filename: str | None


def boundary_of(content_type: str) -> bytes | None:
    """What separates a form's parts; None if the content type is not that of a form."""
    head = Message()
    head["content-type"] = content_type
    boundary = head.get_boundary()
    if head.get_content_type() != "multipart/form-data" or not boundary or len(boundary) > MAX_BOUNDARY:
        return None
    return boundary.encode("latin-1", "replace")


class FormReader:
    """The parts of a body, one after the other."""

    def __init__(self, stream: AsyncIterator[bytes], boundary: bytes) -> None:
        self._stream, self._mark = stream, b"\r\n--" + boundary
        self._buffer = bytearray(b"\r\n")  # so that the first boundary looks like every other
        self._read = False  # has the mark behind the present part come

    async def parts(self) -> AsyncGenerator[Part]:
        """Each part's head. Its `data` is to be read before the next; what is left of it is skipped."""
        await self._skip()
        while not await self._at_end():
            yield await self._head()
            await self._skip()

    async def data(self) -> AsyncGenerator[bytes]:
        """The rest of the present part, in pieces as they come."""
        while not self._read:
            at = self._buffer.find(self._mark)
            self._read = at >= 0
            sure = at if self._read else len(self._buffer) - len(self._mark) + 1  # a mark may have begun behind that
            if sure > 0:
                piece = bytes(self._buffer[:sure])
                del self._buffer[:sure]
                yield piece
            if self._read:
                del self._buffer[: len(self._mark)]
            else:
                await self._more()

    async def _skip(self) -> None:
        async for _ in self.data():
            pass

    async def _at_end(self) -> bool:
        """Was that mark the last."""
        while len(self._buffer) < 2:
            await self._more()
        return self._buffer.startswith(b"--")

    async def _head(self) -> Part:
        while (end := self._buffer.find(b"\r\n\r\n")) < 0:
            if len(self._buffer) > MAX_HEAD:
                raise FormError("the headers of a part are too long")
            await self._more()
        head = HeaderParser().parsestr(bytes(self._buffer[:end]).decode("utf-8", "replace").lstrip())
        del self._buffer[: end + 4]
        self._read = False
        name = head.get_param("name", header="content-disposition")
        if head.get_content_disposition() != "form-data" or not isinstance(name, str):
            raise FormError("every part needs a name: Content-Disposition: form-data; name=...")
        return Part(name, head.get_filename())

    async def _more(self) -> None:
        try:
            self._buffer += await anext(self._stream)
        except StopAsyncIteration:
            raise FormError("the form ends before its last boundary") from None

"""OpenAI's Files API: upload, list, look at, read and delete. Owns bodies, answers and routes; what is on disk is storage.py's.

A file belongs to the client whose key it came with; for everybody else it does not exist.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from typing import Annotated, Any, Literal, Protocol, TypeVar

from fastapi import APIRouter, Query
from pydantic import BaseModel, ConfigDict, Field
from starlette.requests import Request
from starlette.responses import FileResponse, Response

from miniinfer.serve.admission import caller
from miniinfer.serve.answers import encode
from miniinfer.serve.fleet import Fleet
from miniinfer.serve.multipart import FormError, FormReader, Part, boundary_of
from miniinfer.serve.protocol import ApiError
from miniinfer.serve.schemas import Deleted, Shape, described
from miniinfer.serve.storage import Entry, Store, Upload

PIECE_SECONDS = 60.0  # that a client may take for the next piece of an upload
UPLOAD_SECONDS = 3600.0  # and for all of it
SHORTEST_LIFE, LONGEST_LIFE = 3600, 30 * 86400  # seconds
MAX_FIELD = 1024  # bytes of a form's field
FORM_OVERHEAD = 64 << 10  # bytes of a body beyond its file


class UploadForm(BaseModel):
    """A file of requests for a batch, and perhaps when it is to be deleted."""

    model_config = ConfigDict(extra="forbid")

    file: Annotated[bytes, Field(json_schema_extra={"format": "binary"})]
    purpose: Literal["batch"]
    anchor: Literal["created_at"] | None = Field(None, alias="expires_after[anchor]")
    seconds: int | None = Field(None, alias="expires_after[seconds]", ge=SHORTEST_LIFE, le=LONGEST_LIFE)


class FileShape(Shape):
    id: str
    object: Literal["file"]
    bytes: int
    created_at: int
    filename: str
    purpose: Literal["batch", "batch_output"]
    status: Literal["processed"]
    expires_at: int | None


class FileList(Shape):
    object: Literal["list"]
    data: list[FileShape]
    first_id: str | None
    last_id: str | None
    has_more: bool


def owner() -> str:
    """Whose files and batches the present request may see."""
    client = caller.get().client
    return "" if client is None else client.owner


def shown(entry: Entry) -> dict[str, Any]:
    """A file as the API shows it."""
    about = {name: getattr(entry, name) for name in ("id", "bytes", "created_at", "filename", "purpose", "expires_at")}
    return {**about, "object": "file", "status": "processed"}


class _Named(Protocol):
    id: str


N = TypeVar("N", bound=_Named)


def page(found: Sequence[N], after: str | None, limit: int, order: Literal["asc", "desc"] = "desc") -> tuple[Sequence[N], bool]:
    """What follows the object `after` of a list that is oldest first, and whether there is more. ApiError 400 if it is not there."""
    rest = found if order == "asc" else found[::-1]
    if after is not None:
        at = next((i for i, item in enumerate(rest) if item.id == after), None)
        if at is None:
            raise ApiError(400, f"after: there is no '{after}'", param="after")
        rest = rest[at + 1 :]
    return rest[:limit], len(rest) > limit


def listed(data: list[dict[str, Any]], more: bool) -> Response:
    """A page of a list."""
    ends = {"first_id": data[0]["id"] if data else None, "last_id": data[-1]["id"] if data else None}
    return Response(encode({"object": "list", "data": data, **ends, "has_more": more}), media_type="application/json")


def router(fleet: Fleet, store: Store) -> APIRouter:
    """The routes below /v1/files."""
    routes = APIRouter(prefix="/v1/files")

    def find(id: str) -> Entry:
        entry = store.find(id, owner())
        if entry is None:
            raise ApiError(404, f"there is no file '{id}'", param="file_id")
        return entry

    @routes.post("", **described(UploadForm, FileShape, taken="multipart/form-data"))
    async def upload(http: Request) -> Response:
        fleet.gate.admit(0)
        boundary = boundary_of(http.headers.get("content-type", ""))
        if boundary is None:
            raise ApiError(415, "the content type must be multipart/form-data, with a boundary")
        try:
            entry = await _receive(FormReader(_pieces(http, store.max_file + FORM_OVERHEAD), boundary), Upload(store, owner()))
        except FormError as e:
            raise ApiError(400, f"the body is not the form that its head announces: {e}") from None
        return Response(encode(shown(entry)), media_type="application/json")

    @routes.get("", **described(answer=FileList))
    async def list_files(
        after: str | None = None,
        limit: Annotated[int, Query(ge=1, le=10_000)] = 10_000,
        order: Literal["asc", "desc"] = "desc",
        purpose: str | None = None,
    ) -> Response:
        found = [entry for entry in store.of(owner()) if purpose is None or entry.purpose == purpose]
        entries, more = page(found, after, limit, order)
        return listed([shown(entry) for entry in entries], more)

    @routes.get("/{file_id}", **described(answer=FileShape))
    async def look(file_id: str) -> Response:
        return Response(encode(shown(find(file_id))), media_type="application/json")

    @routes.get("/{file_id}/content", **described(answer=str, media="application/octet-stream"))
    async def content(file_id: str) -> Response:
        entry = find(file_id)
        return FileResponse(store.path(entry.id), filename=entry.filename, media_type="application/octet-stream")

    @routes.delete("/{file_id}", **described(answer=Deleted))
    async def delete(file_id: str) -> Response:
        entry = find(file_id)
        if store.needed[entry.id]:
            raise ApiError(409, f"a batch that has not ended reads '{file_id}'; cancel it first", code="file_in_use")
        store.remove(entry)
        return Response(encode({"id": file_id, "object": "file", "deleted": True}), media_type="application/json")

    return routes


# ------------------------------------------------------------------------------------------------------------ uploads


async def _pieces(http: Request, limit: int) -> AsyncGenerator[bytes]:
    """A body as it comes, of limited size and not for ever."""
    end, stream, size = asyncio.get_running_loop().time() + UPLOAD_SECONDS, http.stream(), 0
    while True:
        try:
            async with asyncio.timeout_at(min(end, asyncio.get_running_loop().time() + PIECE_SECONDS)):
                piece = await anext(stream, None)
        except TimeoutError:
            raise ApiError(408, "the upload has come to a halt, or takes too long", headers={"connection": "close"}) from None
        if piece is None:
            return
        size += len(piece)
        if size > limit:
            raise ApiError(413, f"the body is larger than {limit >> 20} MiB (--max-file-mib)", headers={"connection": "close"})
        yield piece


async def _receive(form: FormReader, upload: Upload) -> Entry:
    """Takes in a form with a file, which goes to disk as it comes, before or after the other fields."""
    fields: dict[str, str] = {}
    filename = None
    with upload:
        async for part in form.parts():
            if part.name in fields or (part.name == "file" and filename is not None):
                raise ApiError(400, f"{part.name}: is there twice", param=part.name)
            if part.name == "file":
                filename = _label(part)
                async for piece in form.data():
                    await upload.add(piece)
            elif part.name in ("purpose", "expires_after[anchor]", "expires_after[seconds]"):
                fields[part.name] = await _text(part, form)
            else:
                raise ApiError(400, f"{part.name}: unknown field", param=part.name)
        if filename is None:
            raise ApiError(400, "file: required field is missing", param="file")
        life = _check(fields)
        return await upload.done(filename, fields["purpose"], None if life is None else int(time.time()) + life)


def _label(part: Part) -> str:
    """The client's name for its file, which is shown and never used as a path."""
    if part.filename is None:
        raise ApiError(400, "file: must be sent as a file, with a name", param="file")
    return "".join(letter for letter in part.filename if letter.isprintable())[:255] or "file"


async def _text(part: Part, form: FormReader) -> str:
    value = b""
    async for piece in form.data():
        value += piece
        if len(value) > MAX_FIELD:
            raise ApiError(400, f"{part.name}: is too long", param=part.name)
    return value.decode("utf-8", "replace")


def _check(fields: dict[str, str]) -> int | None:
    """Are the fields beside the file right? The seconds that it is to live, if that is said."""
    if fields.get("purpose") != "batch":
        raise ApiError(400, f"purpose: must be 'batch', got {fields.get('purpose', 'nothing')!r}", param="purpose")
    seconds, anchor = fields.get("expires_after[seconds]"), fields.get("expires_after[anchor]")
    if seconds is None and anchor is None:
        return None
    if anchor != "created_at":
        raise ApiError(400, "expires_after[anchor]: must be 'created_at'", param="expires_after[anchor]")
    if seconds is None or not seconds.isdecimal() or not SHORTEST_LIFE <= int(seconds[:9]) <= LONGEST_LIFE:
        raise ApiError(400, f"expires_after[seconds]: must be from {SHORTEST_LIFE} to {LONGEST_LIFE}", param="expires_after[seconds]")
    return int(seconds)

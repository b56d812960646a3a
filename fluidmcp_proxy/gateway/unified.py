"""The model of a request on the unified ``/v1``: its name is read from the body, and replaced where the server knows
another one.

The rest of the body stays as it is. No more of it is held than comes before the name; after that it streams.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from urllib.parse import unquote_plus

from fluidmcp_proxy.errors import AmbiguousModel, InvalidJSON, ModelRequired
from fluidmcp_proxy.gateway.body import RequestBody
from fluidmcp_proxy.gateway.form_model import FormModel, boundary_of
from fluidmcp_proxy.gateway.json_model import JsonModel
from fluidmcp_proxy.models.catalog import Catalog

__all__ = ["choose_model", "model_in_query"]

Headers = list[tuple[bytes, bytes]]
_Finder = JsonModel | FormModel


async def choose_model(catalog: Catalog, body: RequestBody, headers: Headers, query: bytes) -> tuple[str, Headers]:
    """The id of the model that a request is for, and its headers, with another length where the name was replaced.

    ``body`` is read until the name is known and starts anew with the right one. Where the body names no model, or
    cannot be looked into, ``?model=`` does.

    Raises:
        InvalidJSON: the body is neither a JSON object nor a form.
        ModelRequired: no name, and there are several models.
        ModelNotFound, AmbiguousModel: see ``Catalog.find``; two names in one request.
        ClientDisconnected, RequestTooLarge: see ``RequestBody.start``.
    """
    asked = model_in_query(query)
    finder, coding = _finder(headers)
    opened = _Opened(finder, body)
    try:
        await opened.read()
    except InvalidJSON:
        if asked is None:
            raise
        opened.finder = finder = None
    name = finder.name if finder is not None and finder.name is not None else asked
    if name is None and coding and not catalog.is_single:
        said = "The model's name cannot be read from a body with a content coding: send it without, or add ?model=NAME."
        raise ModelRequired(said)
    found = await catalog.look_up(name)
    if found.rename is not None and finder is not None and finder.name is not None:
        headers = _with_length(headers, opened.rename(found.rename))
    body.replace(opened.content())
    return found.model, headers


def model_in_query(query: bytes) -> str | None:
    """The value of ``model`` in a query string.

    Raises:
        AmbiguousModel: there are two.
    """
    if b"model=" not in query:
        return None
    names = [pair[6:] for pair in query.split(b"&") if pair.startswith(b"model=")]
    if len(names) > 1:
        raise AmbiguousModel("The query has `model` twice.", param="model")
    return unquote_plus(names[0].decode("latin-1")) if names and names[0] else None


def _finder(headers: Headers) -> tuple[_Finder | None, bool]:
    """What looks for the name in such a body, and whether the body has a content coding, which nothing looks into."""
    content_type = b""
    for name, value in headers:
        if name == b"content-type":
            content_type = value
        elif name == b"content-encoding" and value.strip().lower() not in (b"", b"identity"):
            return None, True
    boundary = boundary_of(content_type)
    # Anything else is taken for JSON: clients forget the header, and curl sends another one.
    return (JsonModel() if boundary is None else FormModel(boundary)), False


class _Opened:
    """A body whose beginning is being read."""

    def __init__(self, finder: _Finder | None, body: RequestBody) -> None:
        self.finder = finder
        self._body = body
        self._pieces: list[bytes] = []
        self._rest: AsyncIterator[bytes] | None = None

    async def read(self) -> None:
        """Read until the name is found, or to the end; a body that is not looked into is not read further."""
        content = await self._body.start()
        finder = self.finder
        if content is None or isinstance(content, bytes):
            self._pieces.append(content or b"")
            if content and finder is not None:
                finder.feed(content)
                finder.close()
            return
        self._rest = content
        if finder is None:
            return
        async for piece in content:
            self._pieces.append(piece)
            finder.feed(piece)
            if finder.name is not None:
                return
        finder.close()

    def rename(self, name: str) -> int:
        """Put ``name`` in the place of the one found; the bytes by which the body grows."""
        finder = self.finder
        assert finder is not None
        new = finder.encode(name)
        self._pieces = _spliced(self._pieces, finder.start, finder.end, new)
        return len(new) - (finder.end - finder.start)

    def content(self) -> bytes | AsyncIterator[bytes]:
        """The whole body, once."""
        return b"".join(self._pieces) if self._rest is None else self._stream(self._rest)

    async def _stream(self, rest: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        pieces = self._pieces[::-1]
        self._pieces.clear()
        while pieces:
            yield pieces.pop()
        finder = self.finder
        async for piece in rest:
            if finder is not None:
                finder.feed(piece)  # refuses a second name
            yield piece


def _spliced(pieces: Sequence[bytes], start: int, end: int, new: bytes) -> list[bytes]:
    """``pieces`` with ``new`` in the place of the bytes from ``start`` to ``end`` of them all."""
    before, after, at = [], [], 0
    for piece in pieces:
        before.append(piece[: max(0, start - at)])
        after.append(piece[max(0, end - at) :])
        at += len(piece)
    return [part for part in (*before, new, *after) if part]


def _with_length(headers: Headers, more: int) -> Headers:
    return [
        (name, str(int(value) + more).encode()) if name == b"content-length" else (name, value)
        for name, value in headers
    ]

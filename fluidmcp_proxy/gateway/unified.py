"""The model of a request on the unified ``/v1``: its name is read from the body, and replaced where the server knows
another one.

The rest of the body stays as it is. No more of it is held than comes before the name; after that it streams.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from itertools import islice
from urllib.parse import unquote_plus

from fluidmcp_proxy.errors import AmbiguousModel, InvalidJSON, ModelRequired
from fluidmcp_proxy.gateway.body import COLLECTED_BYTES, RequestBody
from fluidmcp_proxy.gateway.form_scanner import FormScanner, boundary_of
from fluidmcp_proxy.gateway.json_scanner import JsonScanner
from fluidmcp_proxy.gateway.model_name import Place, encode, model_in
from fluidmcp_proxy.models.catalog import Catalog

__all__ = ["choose_model", "model_in_query"]

# The first piece of a body that does not come whole has at least COLLECTED_BYTES; a name may have cut it in three.
_PIECES_AHEAD = 3

Headers = list[tuple[bytes, bytes]]


async def choose_model(
    catalog: Catalog, body: RequestBody, headers: Headers, query: bytes, introduce: Callable[[str], Awaitable[None]]
) -> tuple[str, Headers]:
    """The id of the model that a request is for, and its headers, with another length where the name was replaced.

    ``introduce`` waits until a model is ready of which no name is known that its server understands, and learns them.

    ``body`` is read until the name is known and starts anew with the right one. Where the body names no model, or
    cannot be looked into, ``?model=`` does.

    Raises:
        InvalidJSON: the body is neither a JSON object nor a form.
        ModelRequired: no name, and there are several models.
        ModelNotFound, AmbiguousModel: see ``Catalog.find``; two names in one request.
        ClientDisconnected, RequestTooLarge: see ``RequestBody.start``.
    """
    asked = model_in_query(query)
    fields = dict(headers)
    boundary = boundary_of(fields.get(b"content-type", b""))
    coded = fields.get(b"content-encoding", b"identity").strip().lower() not in (b"", b"identity")
    content = await body.start() or b""
    opened = _Whole(content) if isinstance(content, bytes) else _Stream(content)
    place = None
    if not coded:
        try:
            place = await opened.search(boundary)
        except InvalidJSON:
            if asked is None:
                raise
    name = asked if place is None else place.name
    if name is None and coded and not catalog.is_single:
        said = "The model's name cannot be read from a body with a content coding: send it without, or add ?model=NAME."
        raise ModelRequired(said)
    found = await catalog.look_up(name)
    if place is not None and catalog.is_unanswered(place.name):
        await introduce(found.model)
        found = catalog.find(place.name)
    if found.rename is not None and place is not None:
        new = encode(found.rename) if boundary is None else found.rename.encode()
        opened.put(new, place)
        headers = _with_length(headers, len(new) - (place.end - place.start))
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


def _scanner(boundary: bytes | None) -> JsonScanner | FormScanner:
    # Whatever its content type, what is no form is read as JSON: clients forget the header, and curl sends another one.
    return JsonScanner() if boundary is None else FormScanner(boundary)


class _Whole:
    """A body that is here as a whole."""

    __slots__ = ("_body",)

    def __init__(self, body: bytes) -> None:
        self._body = body

    async def search(self, boundary: bytes | None) -> Place | None:
        """Where the name is."""
        if boundary is None and len(self._body) <= COLLECTED_BYTES:
            return model_in(self._body) if self._body else None
        scanner = _scanner(boundary)
        scanner.feed(self._body)
        scanner.close()
        return scanner.place

    def put(self, name: bytes, place: Place) -> None:
        """Put ``name`` where the one that was found is."""
        self._body = self._body[: place.start] + name + self._body[place.end :]

    def content(self) -> bytes:
        """What to send."""
        return self._body


class _Stream:
    """A body that comes in pieces, of which those before the name are held."""

    def __init__(self, rest: AsyncIterator[bytes]) -> None:
        self._rest = rest
        self._pieces: list[bytes] = []
        self._scanner: JsonScanner | FormScanner | None = None

    async def search(self, boundary: bytes | None) -> Place | None:
        """Read until the name is there, or to the end."""
        scanner = _scanner(boundary)
        async for piece in self._rest:
            self._pieces.append(piece)
            scanner.feed(piece)
            if scanner.place is not None:
                self._scanner = scanner
                return scanner.place
        scanner.close()
        return None

    def put(self, name: bytes, place: Place) -> None:
        """As of ``_Whole``."""
        before, after, at = [], [], 0
        for piece in self._pieces:
            before.append(piece[: max(0, place.start - at)])
            after.append(piece[max(0, place.end - at) :])
            at += len(piece)
        self._pieces = [part for part in (*before, name, *after) if part]

    def content(self) -> AsyncIterator[bytes]:
        """What was held, then the rest as it comes; a second name in it is refused."""
        self._pieces.reverse()  # the next one is last
        return self

    @property
    def beginning(self) -> bytes:
        """What is held still, as far as it may be of interest to somebody who looks ahead."""
        return b"".join(islice(reversed(self._pieces), _PIECES_AHEAD))

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        if self._pieces:
            return self._pieces.pop()
        piece = await anext(self._rest)
        if self._scanner is not None:
            self._scanner.feed(piece)
        return piece


def _with_length(headers: Headers, more: int) -> Headers:
    return [
        (name, str(int(value) + more).encode()) if name == b"content-length" else (name, value)
        for name, value in headers
    ]

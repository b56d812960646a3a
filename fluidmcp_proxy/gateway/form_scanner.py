"""Where a multipart form that comes in pieces has its field ``model`` (RFC 7578); audio is sent that way.

Files are passed over at the speed of ``bytes.find``.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from fluidmcp_proxy.errors import AmbiguousModel, InvalidJSON
from fluidmcp_proxy.gateway.model_name import MAX_NAME_BYTES, Place, too_long

__all__ = ["FormScanner", "boundary_of"]

_MAX_PART_HEADERS = 8 * 1024
_BOUNDARY = re.compile(rb';[ \t]*boundary=(?:"([^"]{1,70})"|([^\s";,]{1,70}))', re.IGNORECASE).search
_FIELD = re.compile(
    rb'^content-disposition:[ \t]*form-data[ \t]*;[ \t]*name=(?:"model"|model)[ \t]*$', re.IGNORECASE | re.MULTILINE
).search

_Step = Callable[["FormScanner", bytes, int], int]


def boundary_of(content_type: bytes) -> bytes | None:
    """The boundary of a ``multipart/form-data`` body; None for any other content type, and for one without it."""
    if content_type[:19].lower() != b"multipart/form-data":
        return None
    match = _BOUNDARY(content_type)
    return (match[1] or match[2]) if match else None


class FormScanner:
    """Fed with the pieces of a body, it finds the model's name; ``place`` is None until then.

    ``feed`` raises:

        InvalidJSON: the headers of a part have no end, or the name is no text in UTF-8.
        ModelNotFound: the name is over ``MAX_NAME_BYTES``.
        AmbiguousModel: there are two fields of that name.
    """

    __slots__ = ("_delimiter", "_offset", "_rest", "_step", "place")

    def __init__(self, boundary: bytes) -> None:
        self.place: Place | None = None
        self._delimiter = b"\r\n--" + boundary
        self._rest = b"\r\n"  # as if a line had ended before the first delimiter, which has none before it
        self._offset = -2
        self._step: _Step = FormScanner._content

    def feed(self, piece: bytes) -> None:
        """Take the next piece of the body."""
        data = self._rest + piece
        at = 0
        while (now := self._step(self, data, at)) >= 0:
            at = now
        at = -1 - now
        self._rest = data[at:]
        self._offset += at

    def close(self) -> None:
        """Take note of the end of the body; what is missing there is for the server to say."""

    # Steps: each returns where the next begins, or -1 - x when it needs more than there is from x on.

    def _content(self, data: bytes, at: int) -> int:
        found = data.find(self._delimiter, at)
        if found < 0:
            return -1 - max(at, len(data) - len(self._delimiter) + 1)
        self._step = FormScanner._headers
        return found + len(self._delimiter)

    def _headers(self, data: bytes, at: int) -> int:
        if data[at : at + 2] == b"--":
            self._step = FormScanner._epilogue
            return at
        end = data.find(b"\r\n\r\n", at, at + _MAX_PART_HEADERS)
        if end < 0:
            if len(data) - at >= _MAX_PART_HEADERS:
                raise InvalidJSON("The headers of a part of the form have no end.")
            return -1 - at
        is_model = _FIELD(data[at:end].replace(b"\r\n", b"\n")) is not None
        self._step = FormScanner._model if is_model else FormScanner._content
        return end + 2 if not is_model else end + 4  # an empty content ends at its headers' last line end

    def _model(self, data: bytes, at: int) -> int:
        end = data.find(self._delimiter, at)
        if (len(data) if end < 0 else end) - at > MAX_NAME_BYTES + len(self._delimiter):
            raise too_long()
        if end < 0:
            return -1 - at
        if self.place is not None:
            raise AmbiguousModel("The form has two fields `model`.", param="model")
        try:
            name = data[at:end].decode()
        except ValueError:
            raise InvalidJSON("The form's field `model` is no text in UTF-8.") from None
        self.place = Place(name, self._offset + at, self._offset + end)
        self._step = FormScanner._content
        return end

    def _epilogue(self, data: bytes, at: int) -> int:
        return -1 - len(data)

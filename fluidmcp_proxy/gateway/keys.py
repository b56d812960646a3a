"""Whose request it is: the keys that a gateway knows, and those that a request carries.

Only digests are compared. What a key does not open is decided by who asks for it.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from fluidmcp_proxy.config.settings import Settings
from fluidmcp_proxy.errors import InvalidApiKey

__all__ = ["NOBODY", "Holder", "Identified", "Keyring"]

Pairs = Iterable[tuple[bytes, bytes]]

SUBPROTOCOL_PREFIX = "openai-insecure-api-key."
"""How OpenAI's realtime clients bring a key from a browser, which can set no header of a WebSocket's handshake."""


@dataclass(frozen=True, slots=True)
class Holder:
    """Whose key it is. ``models`` are the ids that it opens, None: all."""

    name: str
    models: frozenset[str] | None = None
    is_admin: bool = False


class Identified(NamedTuple):
    """What a request's keys say. ``headers`` and ``subprotocols`` carried a key of ours and end here."""

    holder: Holder | None
    headers: frozenset[bytes] = frozenset()
    subprotocols: frozenset[str] = frozenset()

    @property
    def name(self) -> str:
        """For the log."""
        return "-" if self.holder is None else self.holder.name

    @property
    def models(self) -> frozenset[str] | None:
        """The ids that it may use, None: all."""
        return None if self.holder is None else self.holder.models


NOBODY = Identified(None)


class Keyring:
    """The keys of a gateway. With admin keys only, it is open to everybody else, too."""

    def __init__(self, settings: Settings) -> None:
        self._is_required = bool(settings.api_keys)
        self._holders = [
            (bytes.fromhex(key.sha256), Holder(key.name, None if key.models is None else frozenset(key.models)))
            for key in settings.api_keys
        ]
        self._holders += [(bytes.fromhex(key.sha256), Holder(key.name, None, True)) for key in settings.admin_keys]

    def __repr__(self) -> str:
        return f"<Keyring {', '.join(holder.name for _, holder in self._holders)}>"

    def limits(self) -> set[frozenset[str]]:
        """The sets of models that some key is limited to."""
        return {holder.models for _, holder in self._holders if holder.models is not None}

    def identify(self, headers: Pairs, subprotocols: Sequence[str] = ()) -> Identified:
        """Whose request it is by the keys that it carries; the first of ours counts.

        They are looked for in ``Authorization: Bearer``, ``x-api-key`` and, for a WebSocket, its subprotocols. A key
        that is not ours may be the model's server's and stays.
        """
        found: list[Holder] = []
        ours: set[bytes] = set()
        for name, value in headers:
            key = _bearer(value) if name == b"authorization" else value.strip() if name == b"x-api-key" else None
            if key and (holder := self._holder(key)) is not None:
                found.append(holder)
                ours.add(name)
        shown: set[str] = set()
        for word in subprotocols:
            key = (
                word[len(SUBPROTOCOL_PREFIX) :].encode(errors="replace")
                if word.startswith(SUBPROTOCOL_PREFIX)
                else None
            )
            if key and (holder := self._holder(key)) is not None:
                found.append(holder)
                shown.add(word)
        return Identified(found[0], frozenset(ours), frozenset(shown)) if found else NOBODY

    def admits(self, identified: Identified) -> bool:
        """Whether such a request may have what needs a key."""
        return identified.holder is not None or not self._is_required

    def require(self, identified: Identified) -> None:
        """Refuse who has to have a key and has none.

        Raises:
            InvalidApiKey
        """
        if not self.admits(identified):
            raise InvalidApiKey("This needs a key of the gateway: send it as Authorization: Bearer KEY, or x-api-key.")

    def _holder(self, key: bytes) -> Holder | None:
        """Compares with every key, so that the time tells nothing."""
        digest = hashlib.sha256(key).digest()
        found = None
        for known, holder in self._holders:
            if hmac.compare_digest(known, digest):
                found = holder
        return found


def _bearer(value: bytes) -> bytes | None:
    """The token of RFC 6750 §2.1; RFC 9110 §11.1 has the scheme in any case."""
    scheme, _, token = value.strip().partition(b" ")
    return token.strip() if scheme.lower() == b"bearer" else None

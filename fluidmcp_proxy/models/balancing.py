"""Which of a model's replicas gets a request: decided from counts and from what the request looks like.

It knows numbers, not servers. A choice costs no more than a wrong guess: every replica gives the same answer, sooner if
its prefix cache has the beginning of the prompt.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections import OrderedDict
from collections.abc import Collection, Sequence

__all__ = ["LeastBusy", "PrefixMap", "by_key", "has_room", "prompt_blocks"]

_SLACK = 1.25
"""How much more than its even share of the requests a replica takes for affinity's sake (Mirrokni, Thorup and
Zadimoghaddam, Consistent Hashing with Bounded Loads, 2016)."""

_FEW = 8
"""Requests that a replica always has room for: vLLM generates for them together at hardly a higher price."""

_BLOCK_BYTES, _MOST_BLOCKS, _KNOWN_BLOCKS = 512, 128, 65536

# A quotation mark inside a JSON string is escaped, so this can only be a key; a system prompt stands in front.
_PROMPT = re.compile(rb'"(?:system|instructions|messages|prompt|input)"\s*:')


class LeastBusy:
    """The replica with the fewest requests inside; among equals the one that was chosen longest ago."""

    def __init__(self) -> None:
        self._chosen: dict[int, int] = {}
        self._count = 0

    def choose(self, loads: Sequence[int], usable: Collection[int]) -> int:
        """One of ``usable``, the indexes of ``loads`` that may be chosen."""
        choice = min(usable, key=lambda index: (loads[index], self._chosen.get(index, 0)))
        self._count += 1
        self._chosen[choice] = self._count
        return choice


def has_room(index: int, loads: Sequence[int], usable: Collection[int]) -> bool:
    """Whether the replica may take one more request, although another may have fewer."""
    total = sum(loads[other] for other in usable) + 1
    return loads[index] < max(_FEW, math.ceil(_SLACK * total / len(usable)))


def by_key(key: bytes, loads: Sequence[int], usable: Collection[int]) -> int:
    """The replica for ``key``: the same one whenever it has room, and few keys move when replicas come and go.

    Rendezvous hashing: each pair of key and replica has a weight, the heaviest with room wins. Some always has.
    """
    ranked = sorted(usable, key=lambda index: _weight(key, index), reverse=True)
    return next(index for index in ranked if has_room(index, loads, usable))


def _weight(key: bytes, index: int) -> bytes:
    return hashlib.blake2b(b"%d " % index + key, digest_size=8).digest()


def prompt_blocks(body: bytes) -> list[int]:
    """A number for each beginning of the prompt in a JSON body, from one block long to the longest, the last part of
    less than a block left out.

    Equal numbers mean equal beginnings (in this process). Taken from the bytes as they are: parameters in front of the
    prompt do not count, and another spelling of the same JSON is another prompt.
    """
    found = _PROMPT.search(body)
    if found is None:
        return []
    start = found.start()
    end = min(len(body), start + _BLOCK_BYTES * _MOST_BLOCKS)
    blocks: list[int] = []
    number = 0
    for cut in range(start + _BLOCK_BYTES, end + 1, _BLOCK_BYTES):
        number = hash((number, body[cut - _BLOCK_BYTES : cut]))
        blocks.append(number)
    return blocks


class PrefixMap:
    """Which replica has seen which beginnings of prompts, as far as is remembered."""

    def __init__(self, size: int = _KNOWN_BLOCKS) -> None:
        self._size = size
        self._seen: OrderedDict[int, int] = OrderedDict()  # the block seen last is last

    def __len__(self) -> int:
        return len(self._seen)

    def find(self, blocks: Sequence[int], loads: Sequence[int], usable: Collection[int]) -> int | None:
        """The replica that has seen the longest beginning, if it is usable and has room."""
        for block in reversed(blocks):
            index = self._seen.get(block)
            if index is not None and index in usable:
                return index if has_room(index, loads, usable) else None
        return None

    def remember(self, blocks: Sequence[int], index: int) -> None:
        """The replica ``index`` has seen these beginnings now."""
        for block in blocks:
            self._seen[block] = index
            self._seen.move_to_end(block)
        while len(self._seen) > self._size:
            self._seen.popitem(last=False)

    def forget(self, index: int) -> None:
        """The replica has been started anew: its cache is empty."""
        for block in [block for block, seen_by in self._seen.items() if seen_by == index]:
            del self._seen[block]

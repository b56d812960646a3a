"""What the models' servers tell of themselves on ``/metrics``, merged into one text with a label for the model.

It works on lines: a vLLM tells a thousand of them, and prometheus_client's parser and generator hold up every stream
for as long as those take (``benchmarks/metrics_cost.py``). One wrong line makes Prometheus refuse the whole text, so a
server that tells one is left out.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import NamedTuple

import anyio

from fluidmcp_proxy.errors import GatewayError
from fluidmcp_proxy.models.address import address_of
from fluidmcp_proxy.models.replicas import ReplicaSet
from fluidmcp_proxy.models.server import Server
from fluidmcp_proxy.models.state import ModelState

__all__ = ["Family", "Told", "generated_tokens", "merged", "read", "scrape"]

_PATIENCE = 0.9
"""Seconds that the servers get to answer, all together."""
_MAX_BYTES = 4 * 1024 * 1024
_OUR_OWN = "fluidmcp_"

_NAME = r"[a-zA-Z_:][a-zA-Z0-9_:]*"
_QUOTED = r'"(?:[^"\\\n]|\\["\\n])*"'
_LABEL = rf"[a-zA-Z_][a-zA-Z0-9_]*={_QUOTED}"
_VALUE = r"[+-]?(?:[0-9]+(?:\.[0-9]*)?(?:[eE][+-]?[0-9]+)?|[Ii]nf|[Nn]a[Nn])"
_sample = re.compile(rf"({_NAME})(?:\{{({_LABEL}(?:, ?{_LABEL})*)?,?\}})? ({_VALUE}(?: -?[0-9]+)?)").fullmatch
_TOKENS = re.compile(
    rb"^vllm:generation_tokens_total[ {][^\n]*?([0-9]+(?:\.[0-9]*)?(?:[eE]\+?[0-9]{1,2})?)$", re.MULTILINE
)
_described = re.compile(rf"# (HELP|TYPE) ({_NAME}) ?(.*)").fullmatch
_label_names = re.compile(rf"([a-zA-Z_][a-zA-Z0-9_]*)(={_QUOTED})").sub

_ENDINGS = {
    "counter": ("",),
    "gauge": ("",),
    "histogram": ("_bucket", "_sum", "_count"),
    "summary": ("", "_sum", "_count"),
    "untyped": ("",),
}
"""What may follow the name of a family of each kind in the names of its samples."""

Labels = Mapping[str, str]


class Family:
    """The lines of one metric."""

    __slots__ = ("help", "kind", "samples")

    def __init__(self) -> None:
        self.help: str | None = None
        self.kind = "untyped"
        self.samples: list[str] = []


class Told(NamedTuple):
    """What a server has told: its ``families`` by name; None when it did not, or nothing that can be used."""

    labels: Labels
    families: Mapping[str, Family] | None


async def scrape(servers: Mapping[str, Server]) -> list[Told]:
    """Ask every server that is ready, all at once. Those that sleep, load or are gone are not asked."""
    told: list[Told] = []
    for labels, text in await _ask(servers, _PATIENCE):
        try:
            told.append(Told(labels, None if text is None else read(text.decode(), labels)))
        except ValueError:
            told.append(Told(labels, None))
    return told


async def generated_tokens(servers: Mapping[str, Server], patience: float) -> dict[str, float | None]:
    """How many tokens each model's servers have generated, as vLLM counts them; None where one of them does not tell.

    It takes at most ``patience`` seconds. Models of which no server is ready are left out.
    """
    totals: dict[str, float | None] = {}
    for labels, text in await _ask(servers, patience):
        model, counts = labels["model_id"], _TOKENS.findall(text or b"")
        before = totals.get(model, 0.0)
        totals[model] = before + sum(map(float, counts)) if counts and before is not None else None
    return totals


async def _ask(servers: Mapping[str, Server], patience: float) -> list[tuple[Labels, bytes | None]]:
    """What each ready server says on ``/metrics``; None where it has not within ``patience`` seconds."""
    asked = [(labels, server) for labels, server in _each(servers) if server.status.state is ModelState.READY]
    said: dict[int, bytes] = {}

    async def ask(number: int) -> None:
        try:
            said[number] = await _fetch(asked[number][1])
        except (GatewayError, ValueError):
            pass

    with anyio.move_on_after(patience):
        async with anyio.create_task_group() as tasks:
            for number in range(len(asked)):
                tasks.start_soon(ask, number)
    return [(labels, said.get(number)) for number, (labels, _) in enumerate(asked)]


def _each(servers: Mapping[str, Server]) -> Iterator[tuple[Labels, Server]]:
    for model, server in servers.items():
        if isinstance(server, ReplicaSet):
            for number, replica in enumerate(server.servers):
                yield {"model_id": model, "replica": str(number)}, replica
        else:
            yield {"model_id": model}, server


async def _fetch(server: Server) -> bytes:
    """Raises ``ValueError`` for an answer that tells nothing."""
    transport, address = server.transport, address_of(server.config)
    if transport is None:
        raise ValueError("it has just been asked to stop")
    headers = [(b"host", address.authority), (b"accept", b"text/plain;version=0.0.4")]
    body = bytearray()
    async with transport.exchange(b"GET", f"{address.root}/metrics".encode(), headers) as response:
        if response.status != 200:
            raise ValueError("it has no metrics")
        async for chunk in response.body:
            body += chunk
            if len(body) > _MAX_BYTES:
                raise ValueError("it tells too much")
    return bytes(body)


def read(text: str, labels: Labels) -> dict[str, Family]:
    """The families of a text in Prometheus' format 0.0.4, with ``labels`` added to each sample.

    Raises:
        ValueError: a line is not of the format.
    """
    added = ",".join(f'{name}="{value}"' for name, value in labels.items())
    families: dict[str, Family] = {}
    current, members = "", frozenset[str]()
    for line in text.split("\n"):
        if line.startswith("#"):
            if (found := _described(line)) is None:
                continue  # a comment
            word, name, rest = found.groups()
            family = families.setdefault(name, Family())
            if word == "HELP":
                family.help = rest
            else:
                family.kind, current = rest, name
                members = frozenset(name + ending for ending in _endings(rest))
        elif line:
            if (sample := _sample(line)) is None:
                raise ValueError("not a sample")
            name, own, value = sample.groups()
            both = f"{added},{_renamed(own, labels)}" if own else added
            family = families.setdefault(current if name in members else name, Family())
            family.samples.append(f"{name}{{{both}}} {value}")
    return families


def _endings(kind: str) -> Sequence[str]:
    if kind not in _ENDINGS:
        raise ValueError("no kind of metric")
    return _ENDINGS[kind]


def _renamed(own: str, taken: Collection[str]) -> str:
    """A server's own label of a name that is taken is ``exported_…``, as Prometheus would call it."""
    if not any(name in own for name in taken):
        return own
    return _label_names(lambda label: f"exported_{label[0]}" if label[1] in taken else label[0], own)


def merged(told: Sequence[Told]) -> bytes:
    """One block for each family, whoever tells of it; the kind of the first one counts, and others' are left out."""
    families: dict[str, Family] = {}
    for _, told_families in told:
        for name, family in (told_families or {}).items():
            if family.samples and not name.startswith(_OUR_OWN):
                block = families.setdefault(name, Family())
                if not block.samples:
                    block.help, block.kind = family.help, family.kind
                if block.kind == family.kind:
                    block.samples += family.samples
    return "".join(_lines(name, family) for name, family in families.items()).encode()


def _lines(name: str, family: Family) -> str:
    told = "" if family.help is None else f"# HELP {name} {family.help}\n"
    return "\n".join([f"{told}# TYPE {name} {family.kind}", *family.samples, ""])

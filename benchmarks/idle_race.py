"""Requests that come when the server closes its idle connections: none may be lost, none may reach it twice.

A model has a pool of connections of its own. For each of several models, clients ask at the same moment, so that each
gets a connection, and ask again when those have been idle for as long as the server keeps them, give or take some
milliseconds. The models take turns, so that a burst is over before the moment is.
"""

from __future__ import annotations

import collections
import random
import socket
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from machine import CHAT, Machine, chat, free_port, post, stats
from peers import Command, gateway, nginx, nginx_version
from row import Row, Scale

POSTS, MODELS, CLIENTS = 10_000, 20, 25
KEEP_ALIVE, JITTER = 5.0, 0.006
NAMES = [f"m{number}" for number in range(MODELS)]


@dataclass
class Seen:
    statuses: collections.Counter[str] = field(default_factory=collections.Counter)
    doubled: int = 0
    closed: int = 0

    @property
    def text(self) -> str:
        kinds = ", ".join(f"{count:,} x {status}" for status, count in self.statuses.most_common())
        return f"{kinds}; {self.doubled} twice"


def idle_race(here: Machine, scale: Scale) -> list[Row]:
    posts = max(2 * MODELS * CLIENTS, scale.of(POSTS))
    through = raced(here, gateway(models=NAMES), posts)
    beside = f"nginx{nginx_version()}: {raced(here, nginx(NAMES), posts).text}" if nginx_version() else ""
    what = f"{posts:,} POSTs to a server that closes idle connections after {KEEP_ALIVE:.0f} s, at that moment"
    met = through.statuses == {"200": posts} and not through.doubled
    return [
        Row(
            what,
            "0 × 502, 0 twice",
            f"{through.text}; {through.closed:,} connections closed by the server",
            beside,
            met,
        )
    ]


def raced(here: Machine, command: Command, posts: int) -> Seen:
    seen = Seen()
    with (
        here.upstream(keep_alive=KEEP_ALIVE) as upstream,
        here.running(command(port := free_port(), upstream, here.folder), here.proxy_core, port),
    ):
        rounds = posts // (MODELS * CLIENTS)
        threads = [threading.Thread(target=_ask, args=(port, index, rounds, seen)) for index in range(MODELS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        counted = stats(upstream)
        seen.doubled, seen.closed = counted["doubled"], counted["idle_closed"]
    return seen


def _ask(port: int, model: int, rounds: int, seen: Seen) -> None:
    """One model's clients, in a thread of their own; they add up in ``seen`` once, at the end."""
    chance, statuses = random.Random(model), collections.Counter[str]()
    time.sleep(model * KEEP_ALIVE / MODELS)
    clients = [_connect(port) for _ in range(CLIENTS)]
    for number in range(rounds):
        first = (model * rounds + number) * CLIENTS
        statuses.update(_burst(clients, NAMES[model], first))
        clients = [client if client.fileno() >= 0 else _connect(port) for client in clients]
        time.sleep(KEEP_ALIVE + chance.uniform(-JITTER, JITTER))
    for client in clients:
        client.close()
    seen.statuses.update(statuses)


def _connect(port: int) -> socket.socket:
    client = socket.create_connection(("127.0.0.1", port), 30)
    client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return client


def _burst(clients: Sequence[socket.socket], model: str, first: int) -> list[str]:
    for number, client in enumerate(clients):
        client.sendall(post(f"/{model}{CHAT}", chat(user=f"id-{first + number}")))
    return [_status(client) for client in clients]


def _status(client: socket.socket) -> str:
    """The status of a whole answer; a client whose connection is lost is closed."""
    got = b""
    try:
        while not _whole(got):
            if not (block := client.recv(65536)):
                raise OSError("closed")
            got += block
    except OSError as error:
        client.close()
        return type(error).__name__
    if b"connection: close" in got.lower():
        client.close()
    return got[9:12].decode()


def _whole(got: bytes) -> bool:
    head, found, body = got.partition(b"\r\n\r\n")
    length = head.lower().partition(b"content-length:")[2].split(b"\r\n")[0]
    return bool(found) and len(body) >= int(length or 0)

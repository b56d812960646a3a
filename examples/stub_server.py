"""A model server without a model: speaks the OpenAI API, takes ``vllm serve``'s arguments, and misbehaves on request.

Standard library only, starts in under 100 ms, carries hundreds of streams. It is the double that the tests and the tour
use where no GPU and no vLLM are at hand::

    python examples/stub_server.py serve my/model --port 8001 --token-interval 0.05

Every answer is made up: the words of the prompt, over and over, one word being one token.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import hashlib
import json
import os
import signal
import socket
import struct
import sys
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any
from urllib.parse import parse_qs, urlsplit

EPILOG = """\
Options of `vllm serve` that are not listed are accepted and ignored.

Routes beside the OpenAI ones (any method):
  /v1/echo                    what was received, as JSON: method, target, headers in order, body as base64 and sha256
  /v1/bytes/N                 N bytes; ?chunked=1, ?piece=BYTES, ?interval=S
  /v1/status/N                an answer with that status
  /v1/replay                  the request's body as the answer's, chunked; ?piece=BYTES, ?interval=S, ?type=MEDIA/TYPE
  /v1/raw                     the request's body written to the socket as it is, then the connection closes
  /v1/realtime                a WebSocket that echoes all messages but the texts stub:request (answers as /v1/echo),
                              stub:close CODE REASON, stub:cut HOW, stub:flood N BYTES, stub:raw HEX and stub:deaf
  /stub/stats                 as JSON: requests, running, aborted, connections, last_close (of a WebSocket's client)
With --enable-sleep-mode and VLLM_SERVER_DEV_MODE=1 as vLLM has them: /sleep, /wake_up, /is_sleeping, /collective_rpc,
/reset_prefix_cache. Asleep it is healthy and generates nothing; after level 2 it says "!" until it reloads its weights.

Per request, as a header `x-stub-NAME: VALUE` or in the JSON body as {"stub": {"NAME": VALUE}}: token-interval,
answer-delay, hang, hang-after, hang-until, cut-after, cut-how (fin, rst or exit), garbage, status, error-after
(tokens), paced-by (a file: the first N tokens, or pieces, are sent when it has N bytes).
`x-stub-response-header: NAME: VALUE` (may be repeated) adds a header to the answer.
"""


def parse_options(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="stub_server.py",
        usage="%(prog)s [serve MODEL] [options]",
        description="An OpenAI-compatible model server without a model, for tests and tours.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    serve = parser.add_argument_group("as vllm serve has them")
    serve.add_argument("--model", default="stub-model")
    serve.add_argument("--host", default="127.0.0.1")
    serve.add_argument("--port", type=int, default=8000)
    serve.add_argument("--uds", help="listen on this Unix socket instead; the file stays behind, as vLLM's does")
    serve.add_argument("--served-model-name", nargs="+", default=[])
    serve.add_argument("--lora-modules", nargs="+", default=[], metavar="NAME=PATH")
    serve.add_argument("--api-key", default=os.environ.get("VLLM_API_KEY"), help="guards /v1, as in vLLM")
    serve.add_argument("--enable-sleep-mode", action="store_true")
    add("--sleep-time", type=float, default=0.0, metavar="S", help="seconds that /sleep and /wake_up take")
    add(
        "--sleep-fails", choices=["sleep", "wake_up", "lie", "hang"], help="what goes wrong; lie: says 200, stays awake"
    )
    add("--load-time", type=float, default=0.0, metavar="S", help="seconds until ready; the port opens then")
    add("--listen-early", action="store_true", help="open the port at once, /health says 503 until loaded")
    add("--load-until", metavar="FILE", help="load, after that time, until this file is there")
    add("--never-ready", action="store_true", help="never open the port (with --listen-early: /health stays 503)")
    add("--health-delay", type=float, default=0.0, metavar="S", help="seconds that /health takes")
    add("--metrics", choices=["good", "none", "hang", "nonsense"], default="good", help="what /metrics does")
    add("--token-interval", type=float, default=0.0, metavar="S", help="seconds between tokens")
    add("--answer-delay", type=float, default=0.0, metavar="S", help="seconds before anything of an answer is sent")
    add("--hang", action="store_true", help="healthy, but generates nothing")
    add("--hang-after", type=int, metavar="N", help="hang after N tokens")
    add("--hang-until", metavar="FILE", help="where it hangs, go on when this file is there")
    add("--cut-after", type=int, metavar="N", help="close the connection after N bytes of an answer's body")
    add("--garbage", action="store_true", help="answer with bytes that are not HTTP")
    add("--crash", metavar="TEXT", help="print TEXT on stderr and exit at once")
    add("--exit-after", type=float, metavar="S", help="exit S seconds after the start")
    add("--crash-after-ready", type=float, metavar="S", help="exit S seconds after being ready")
    add("--exit-code", type=int, default=1, metavar="N", help="exit code of the three above")
    add("--ignore-sigterm", action="store_true", help="only SIGKILL ends it and its children")
    add("--children", type=int, default=0, metavar="N", help="N child processes in the same group, like EngineCore")
    add("--grandchild", action="store_true", help="a child's child that makes its own session")
    add("--double-fork", action="store_true", help="a daemon: forked twice, own session, parent gone")
    add("--stopped-child", action="store_true", help="a child that stops itself by SIGSTOP")
    add("--fork-storm", action="store_true", help="children that fork a successor every few ms, whatever signal comes")
    add("--child-lifetime", type=float, default=120.0, metavar="S", help="children end by themselves after that")
    add("--flood", type=int, default=0, metavar="BYTES", help="write that much to stdout")
    add("--flood-no-newline", action="store_true", help="the flood is one line")
    add("--progress", type=int, default=0, metavar="N", help="a tqdm-like bar of N steps on stderr while loading")
    add("--print-env", default="", metavar="NAMES", help="print these variables (comma-separated)")
    model = None
    if argv[:1] == ["serve"]:
        model, argv = (argv[1], argv[2:]) if len(argv) > 1 and not argv[1].startswith("-") else (None, argv[1:])
    options, _ignored = parser.parse_known_args(argv)
    options.model = model or options.model
    options.names = options.served_model_name or [options.model]
    options.names += [module.partition("=")[0] for module in options.lora_modules]
    return options


def log(text: str, logger: str = "api_server.py:1839") -> None:
    print(f"INFO {time.strftime('%m-%d %H:%M:%S')} [{logger}] {text}", flush=True)


# -- processes ---------------------------------------------------------------------------------------------------------


def _linger(options: argparse.Namespace) -> None:
    """What a child does all its life."""
    if options.ignore_sigterm:
        _ignore_signals()
    time.sleep(options.child_lifetime)
    os._exit(0)


def _ignore_signals() -> None:
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)


def _storm(options: argparse.Namespace) -> None:
    _ignore_signals()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    deadline = time.monotonic() + options.child_lifetime
    while time.monotonic() < deadline:
        time.sleep(0.003)
        with contextlib.suppress(OSError):
            if os.fork():
                os._exit(0)
            os.setsid()
    os._exit(0)


def start_children(options: argparse.Namespace) -> None:
    """Fork before the event loop exists; a fork keeps the environment, and with it a tree's marker."""
    for _ in range(options.children):
        if not os.fork():
            _linger(options)
    if options.grandchild and not os.fork():
        if not os.fork():
            os.setsid()
            _linger(options)
        _linger(options)
    if options.double_fork:
        middle = os.fork()
        if not middle:
            os.setsid()
            if not os.fork():
                _linger(options)
            os._exit(0)
        os.waitpid(middle, 0)
    if options.stopped_child and not os.fork():
        os.kill(os.getpid(), signal.SIGSTOP)
        _linger(options)
    if options.fork_storm:
        for _ in range(3):
            if not os.fork():
                _storm(options)


def print_start_up(options: argparse.Namespace) -> None:
    log("vLLM API server version 0.33.0 (stub)")
    log(f"non-default args: {{'model': '{options.model}', 'port': {options.port}}}", "utils.py:233")
    for name in filter(None, options.print_env.split(",")):
        print(f"{name}={os.environ.get(name, '<unset>')}", flush=True)
    if options.crash is not None:
        print(options.crash, file=sys.stderr, flush=True)
        os._exit(options.exit_code)
    log(f"Initializing a V1 LLM engine (stub) with config: model='{options.model}'", "core.py:93")


def flood(options: argparse.Namespace) -> None:
    """Write ``--flood`` bytes; blocks while nobody reads, as a real server's print would."""
    line = b"x" * 65536 if options.flood_no_newline else (b"flood " + b"y" * 93 + b"\n") * 655
    left = options.flood
    while left > 0:
        left -= os.write(1, line[:left])
    if options.flood:
        os.write(1, b"\nflood is over\n")


async def load(options: argparse.Namespace) -> None:
    steps = options.progress
    for step in range(steps):
        bar = f"\rLoading safetensors checkpoint shards: {100 * (step + 1) // steps:3d}% Completed | {step + 1}/{steps}"
        print(bar, end="" if step + 1 < steps else "\n", file=sys.stderr, flush=True)
        await asyncio.sleep(options.load_time / steps)
    if not steps:
        await asyncio.sleep(options.load_time)
    if options.load_until:
        await there(options.load_until)
    log(f"Loading weights took {options.load_time:.2f} seconds", "default_loader.py:308")


async def there(path: str, size: int = 0) -> None:
    while not os.path.exists(path) or os.path.getsize(path) < size:
        await asyncio.sleep(0.002)


# -- HTTP --------------------------------------------------------------------------------------------------------------


class Request:
    """One request as it was received, and the knobs that hold for it."""

    def __init__(self, method: str, target: str, headers: list[tuple[str, str]], body: bytes) -> None:
        self.method, self.target, self.headers, self.body = method, target, headers, body
        parts = urlsplit(target)
        self.path = parts.path
        self.query = {name: values[-1] for name, values in parse_qs(parts.query, keep_blank_values=True).items()}
        self.knobs: dict[str, str] = {n[7:].lower(): v for n, v in headers if n.lower().startswith("x-stub-")}

    def header(self, name: str) -> str:
        return next((value for key, value in self.headers if key.lower() == name), "")

    def json(self) -> dict[str, Any]:
        document = json.loads(self.body)
        if not isinstance(document, dict):
            raise ValueError("not an object")
        stub = document.get("stub", {})
        self.knobs |= {name.replace("_", "-"): str(value) for name, value in stub.items()}
        return document

    def number(self, name: str, default: float | None) -> float | None:
        return float(self.knobs[name]) if name in self.knobs else default

    def flag(self, name: str, default: bool) -> bool:
        return self.knobs[name].lower() not in ("", "0", "false") if name in self.knobs else default


class Protocol(asyncio.StreamReaderProtocol):
    """Ends a connection's work as soon as its client leaves; a half-closed one has left, as with uvicorn."""

    def __init__(self, server: Server) -> None:
        self.work: asyncio.Task[None] | None = None
        super().__init__(
            asyncio.StreamReader(limit=1 << 20), lambda reader, writer: self._start(server, reader, writer)
        )

    def _start(self, server: Server, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.work = asyncio.get_running_loop().create_task(Connection(server, reader, writer).run())

    def eof_received(self) -> bool:
        super().eof_received()
        self._leave()
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._leave()

    def _leave(self) -> None:
        if self.work is not None:
            self.work.cancel()


class CutShort(Exception):
    """The connection was closed in the middle of an answer, on purpose."""


class Connection:
    def __init__(self, server: Server, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.server, self.reader, self.writer = server, reader, writer
        self.cut_after: int | None = None
        self.cut_how = "fin"
        self.sent = 0
        self.chunked = self.head_only = False
        self.extra: list[str] = []

    async def run(self) -> None:
        self.server.connections += 1
        try:
            while (request := await self.receive()) is not None:
                self.server.requests += 1
                await self.answer(request)
                if request.header("connection").lower() == "close" or self.server.stopping.is_set():
                    break
        except (
            ConnectionError,
            asyncio.IncompleteReadError,
            asyncio.LimitOverrunError,
            asyncio.CancelledError,
            CutShort,
        ):
            pass
        finally:
            self.server.connections -= 1
            self.writer.close()

    async def receive(self) -> Request | None:
        try:
            head = (await self.reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        except asyncio.IncompleteReadError:
            return None
        first, *lines = head[:-4].split("\r\n")
        method, target, _version = first.split(" ", 2)
        headers = [(name, value.strip()) for name, _, value in (line.partition(":") for line in lines)]
        request = Request(method, target, headers, b"")
        if request.header("expect").lower() == "100-continue":
            self.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        if "chunked" in request.header("transfer-encoding").lower():
            request.body = b"".join([chunk async for chunk in self.chunks()])
        else:
            request.body = await self.reader.readexactly(int(request.header("content-length") or 0))
        return request

    async def chunks(self) -> AsyncIterator[bytes]:
        while size := int((await self.reader.readline()).split(b";")[0], 16):
            yield await self.reader.readexactly(size)
            await self.reader.readexactly(2)
        while (await self.reader.readline()).strip():
            pass

    async def answer(self, request: Request) -> None:
        options = self.server.options
        self.head_only = request.method == "HEAD"
        if b'"stub"' in request.body:
            with contextlib.suppress(ValueError):
                request.json()  # for the knobs in it
        cut = request.number("cut-after", options.cut_after)
        self.cut_after, self.cut_how = None if cut is None else int(cut), request.knobs.get("cut-how", "fin")
        self.sent = 0
        self.extra = [value for name, value in request.headers if name.lower() == "x-stub-response-header"]
        if request.flag("garbage", options.garbage and request.path != "/health"):
            self.writer.write(b"\x00\xff this is not HTTP \r\n\r\n" * 4)
            raise CutShort
        await self.server.route(request, self)

    # what a route answers with

    async def respond(self, status: int, body: bytes, media: str = "application/json") -> None:
        self.chunked = False
        if status in (204, 304):  # RFC 9110 §6.4.1: no body, and a length would only mislead
            self._head(status, [])
            return
        self._head(status, [f"content-type: {media}", f"content-length: {len(body)}"])
        await self.write(body)

    async def respond_json(self, document: object, status: int = 200) -> None:
        await self.respond(status, json.dumps(document, ensure_ascii=False).encode())

    async def begin(self, media: str = "text/event-stream; charset=utf-8", status: int = 200) -> None:
        self.chunked = True
        self._head(status, [f"content-type: {media}", "transfer-encoding: chunked"])

    async def end(self) -> None:
        if not self.head_only:
            self.writer.write(b"0\r\n\r\n")
        await self.writer.drain()

    def _head(self, status: int, lines: list[str]) -> None:
        head = [f"HTTP/1.1 {status} Stub", "server: stub", *lines, *self.extra]
        self.writer.write("\r\n".join([*head, "", ""]).encode("latin-1"))

    async def write(self, data: bytes) -> None:
        """Part of an answer's body, up to the byte at which it is to be cut."""
        if self.head_only:
            return
        cut = self.cut_after is not None and self.sent + len(data) > self.cut_after
        part = data[: self.cut_after - self.sent] if cut and self.cut_after is not None else data
        self.sent += len(part)
        if part:
            self.writer.write(b"%x\r\n%b\r\n" % (len(part), part) if self.chunked else part)
            await self.writer.drain()
        if cut:
            await self._cut()

    async def _cut(self) -> None:
        self.writer.transport.set_write_buffer_limits(0)
        await self.writer.drain()
        if self.cut_how == "exit":
            os._exit(self.server.options.exit_code)
        if self.cut_how == "rst":
            sock = self.writer.get_extra_info("socket")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.writer.transport.abort()
        raise CutShort


# -- the model server --------------------------------------------------------------------------------------------------


class Server:
    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.loaded = False
        self.stopping = asyncio.Event()
        self.awake = asyncio.Event()
        self.awake.set()
        self.asleep: set[str] = set()
        self.weights_lost = False
        self.last_close: list[object] = []
        self.prompt_tokens = self.finished = 0
        self.seconds = 0.0
        self.running = self.requests = self.aborted = self.connections = self.tokens = self.iterations = 0

    async def route(self, request: Request, out: Connection) -> None:
        path, options = request.path, self.options
        if path in ("/health", "/ping"):
            await asyncio.sleep(options.health_delay)
            await out.respond(200 if self.loaded else 503, b"", "text/plain")
        elif (
            options.api_key
            and path.startswith("/v1")
            and request.header("authorization") != f"Bearer {options.api_key}"
        ):
            await out.respond_json({"error": "Unauthorized"}, 401)
        elif path == "/metrics" and options.metrics != "none":
            if options.metrics == "hang":
                await asyncio.Event().wait()
            text = self.metrics() + ("nonsense\n" if options.metrics == "nonsense" else "")
            await out.respond(200, text.encode(), "text/plain; version=0.0.4; charset=utf-8")
        elif path in SLEEP_ROUTES and options.enable_sleep_mode and os.environ.get("VLLM_SERVER_DEV_MODE") == "1":
            await self.sleep_route(request, out)
        elif path == "/version":
            await out.respond_json({"version": "0.33.0"})
        elif path == "/stub/stats":
            names = ("requests", "running", "aborted", "connections", "last_close")
            await out.respond_json({name: getattr(self, name) for name in names})
        elif path == "/v1/models":
            await out.respond_json({"object": "list", "data": [card(options, name) for name in options.names]})
        elif path == "/v1/audio/transcriptions":
            await self.transcribe(request, out)
        elif path in FORMS or path in ("/tokenize", "/detokenize"):
            await self.model_route(request, out)
        elif path == "/v1/realtime" and request.header("upgrade").lower() == "websocket":
            await self.websocket_route(request, out)
        else:
            await self.test_route(request, out)

    async def sleep_route(self, request: Request, out: Connection) -> None:
        """As vLLM's, which says only whether all of its memory is there."""
        path, fails = request.path, self.options.sleep_fails
        if path == "/is_sleeping":
            return await out.respond_json({"is_sleeping": bool(self.asleep)})
        await asyncio.sleep(self.options.sleep_time)
        if fails == path[1:]:
            return await out.respond_json({"detail": "Internal Server Error"}, 500)
        if fails == "hang":
            await asyncio.Event().wait()
        if path == "/sleep" and fails != "lie":
            self.asleep = {"weights", "kv_cache"}
            self.weights_lost = request.query.get("level") == "2"
        elif path == "/wake_up":
            self.asleep -= {request.query["tags"]} if "tags" in request.query else self.asleep
        elif path == "/collective_rpc" and json.loads(request.body) == {"method": "reload_weights"}:
            self.weights_lost = self.weights_lost and "weights" in self.asleep
        self.awake.clear() if self.asleep else self.awake.set()
        return await out.respond_json({})

    async def transcribe(self, request: Request, out: Connection) -> None:
        from email.parser import BytesParser

        head = f"Content-Type: {request.header('content-type')}\r\n\r\n".encode()
        parts: Any = BytesParser().parsebytes(head + request.body).get_payload()
        form: dict[Any, bytes] = {
            part.get_param("name", header="content-disposition"): part.get_payload(decode=True) for part in parts
        }
        name = form.get("model", b"").decode()
        if name not in self.options.names:
            message = f"The model `{name}` does not exist."
            return await out.respond_json(error(message, "NotFoundError", 404, "model"), 404)
        return await out.respond_json({"text": f"{len(form['file'])} bytes of sound."})

    async def model_route(self, request: Request, out: Connection) -> None:
        if request.method != "POST":
            return await out.respond_json({"detail": "Method Not Allowed"}, 405)
        try:
            document = request.json()
        except ValueError as exc:
            return await out.respond_json(error(f"JSON decode error: {exc}", "BadRequestError", 400), 400)
        name = document.get("model", self.options.names[0])
        if name not in self.options.names:
            message = f"The model `{name}` does not exist."
            return await out.respond_json(error(message, "NotFoundError", 404, "model"), 404)
        if request.path == "/tokenize":
            words = str(document.get("prompt") or prompt_of(document)).split()
            tokens = [int.from_bytes(word.encode(), "big") for word in words]
            return await out.respond_json({"count": len(tokens), "max_model_len": 2048, "tokens": tokens})
        if request.path == "/detokenize":
            words = [
                int(t).to_bytes((int(t).bit_length() + 7) // 8, "big").decode() for t in document.get("tokens", [])
            ]
            return await out.respond_json({"prompt": " ".join(words)})
        return await self.counted(request, document, out)

    async def counted(self, request: Request, document: dict[str, Any], out: Connection) -> None:
        self.running += 1
        finished, began = False, time.monotonic()
        try:
            await self.generate(request, document, out)
            finished = True
        finally:
            self.running -= 1
            self.finished += finished
            self.seconds += time.monotonic() - began
            self.aborted += not finished

    async def generate(self, request: Request, document: dict[str, Any], out: Connection) -> None:
        options = self.options
        if status := request.number("status", None):
            return await out.respond_json(error("as asked", "StubError", int(status)), int(status))
        await self.awake.wait()
        form = FORMS[request.path](document, options.names[0])
        self.prompt_tokens += form.prompt_tokens
        if self.weights_lost:
            form.vocabulary = ["!"]
        await self.pause(request.number("answer-delay", options.answer_delay) or 0.0)
        if request.flag("hang", options.hang):
            await self.hang(request)
        if document.get("stream"):
            return await self.stream(request, form, out)
        async for _ in self.words(request, form):
            pass
        return await out.respond_json(form.whole())

    async def stream(self, request: Request, form: Form, out: Connection) -> None:
        await out.begin()
        for event in form.first():
            await out.write(event)
        fails = request.number("error-after", None)
        async for word in self.words(request, form):
            if fails is not None and form.count > fails:
                await out.write(sse(error("as asked", "InternalServerError", 500)))
                break
            await out.write(form.token(word))
        else:
            for event in form.last():
                await out.write(event)
        if form.done:
            await out.write(b"data: [DONE]\n\n")
        await out.end()

    async def words(self, request: Request, form: Form) -> AsyncIterator[str]:
        interval = request.number("token-interval", self.options.token_interval) or 0.0
        hang_after = request.number("hang-after", self.options.hang_after)
        for number in range(form.limit):
            if hang_after is not None and number == hang_after:
                await self.hang(request)
            await self.pace(request, number)
            await self.pause(interval)
            if self.stopping.is_set():
                form.finish_reason = "abort"
                return
            self.tokens += 1
            self.iterations += 1
            yield form.next_word()

    async def pace(self, request: Request, number: int) -> None:
        if path := request.knobs.get("paced-by"):
            await there(path, number + 1)

    async def hang(self, request: Request) -> None:
        if until := request.knobs.get("hang-until", self.options.hang_until):
            await there(until)
        else:
            await asyncio.Event().wait()

    async def pause(self, seconds: float) -> None:
        """Sleep, but no longer than until SIGTERM."""
        if seconds > 0:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.stopping.wait(), seconds)

    async def websocket_route(self, request: Request, out: Connection) -> None:
        if status := request.number("status", None):
            return await out.respond_json(error("as asked", "StubError", int(status)), int(status))
        key = request.header("sec-websocket-key") + "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
        accept = base64.b64encode(hashlib.sha1(key.encode()).digest()).decode()
        self.running += 1
        finished = False
        try:
            await self.pause(request.number("answer-delay", self.options.answer_delay) or 0.0)
            out._head(101, ["upgrade: websocket", "connection: upgrade", f"sec-websocket-accept: {accept}"])
            self.last_close = await Conversation(request, out).run()
            finished = True
        finally:
            self.running -= 1
            self.aborted += not finished
        raise CutShort

    def metrics(self) -> str:
        """A handful of vLLM's, under their names and with its labels."""
        labels = f'engine="0",model_name="{self.options.names[0]}"'
        simple = {
            "vllm:num_requests_running gauge": self.running,
            "vllm:num_requests_waiting gauge": 0,
            "vllm:kv_cache_usage_perc gauge": 0,
            "vllm:prompt_tokens_total counter": self.prompt_tokens,
            "vllm:generation_tokens_total counter": self.tokens,
            "vllm:prefix_cache_queries_total counter": self.prompt_tokens,
            "vllm:prefix_cache_hits_total counter": 0,
            "vllm:num_preemptions_total counter": 0,
        }
        histograms = {
            "vllm:iteration_tokens_total": (self.iterations, self.tokens),
            "vllm:time_to_first_token_seconds": (self.finished, self.seconds),
            "vllm:inter_token_latency_seconds": (self.tokens, self.seconds),
            "vllm:e2e_request_latency_seconds": (self.finished, self.seconds),
        }
        lines = []
        for key, value in simple.items():
            name, kind = key.split()
            lines += [f"# HELP {name} As vLLM's.", f"# TYPE {name} {kind}", f"{name}{{{labels}}} {float(value)}"]
        for name, (count, total) in histograms.items():
            lines += [f"# HELP {name} As vLLM's.", f"# TYPE {name} histogram"]
            lines += [f'{name}_bucket{{{labels},le="{bound}"}} {float(count)}' for bound in ("1000.0", "+Inf")]
            lines += [f"{name}_count{{{labels}}} {float(count)}", f"{name}_sum{{{labels}}} {float(total)}"]
        return "\n".join([*lines, ""])

    async def test_route(self, request: Request, out: Connection) -> None:
        _, _, kind, *rest = [*request.path.split("/"), "", ""]
        interval, media = float(request.query.get("interval", 0)), request.query.get("type", "text/event-stream")
        if kind == "echo":
            await out.respond_json(echo(request))
        elif kind == "bytes":
            body = bytes(range(256)) * (int(rest[0]) // 256 + 1)
            await self.pieces(request, out, body[: int(rest[0])], "application/octet-stream", interval)
        elif kind == "status":
            status = int(rest[0])
            await out.respond_json({"status": status}, status)
        elif kind == "replay":
            await self.pieces(request, out, request.body, media, interval, chunked=True)
        elif kind == "raw":
            out.writer.write(request.body)
            await out.writer.drain()
            raise CutShort
        else:
            await out.respond_json({"detail": "Not Found"}, 404)

    async def pieces(
        self, request: Request, out: Connection, body: bytes, media: str, interval: float, chunked: bool = False
    ) -> None:
        size = int(request.query.get("piece", 65536))
        out.chunked = chunked or "chunked" in request.query
        length = "transfer-encoding: chunked" if out.chunked else f"content-length: {len(body)}"
        out._head(int(request.number("status", 200) or 200), [f"content-type: {media}", length])
        for number, start in enumerate(range(0, len(body), size)):
            await self.pace(request, number)
            await out.write(body[start : start + size])
            if interval:
                await asyncio.sleep(interval)
        if out.chunked:
            await out.end()


def card(options: argparse.Namespace, name: str) -> dict[str, Any]:
    paths = dict(module.split("=", 1) for module in options.lora_modules)
    place = (
        {"root": paths[name], "parent": options.names[0]} if name in paths else {"root": options.model, "parent": None}
    )
    described = {"id": name, "object": "model", "created": 1700000000, "owned_by": "vllm", **place}
    return described if name in paths else {**described, "max_model_len": 2048}


TEXT, BINARY, CLOSE, PING, PONG = 1, 2, 8, 9, 10


class Conversation:
    """The server's end of a WebSocket (RFC 6455)."""

    def __init__(self, request: Request, out: Connection) -> None:
        self.request, self.out = request, out
        self.closing = False

    async def run(self) -> list[object]:
        """Until the client's Close; its code and reason."""
        while (message := await self.receive())[0] != CLOSE:
            command, *words = message[1].decode().split(" ", 2) if message[1].startswith(b"stub:") else [""]
            if command == "stub:request":
                await self.send(TEXT, json.dumps(echo(self.request)).encode())
            elif command == "stub:close":
                payload = int(words[0]).to_bytes(2, "big") + " ".join(words[1:]).encode() if words else b""
                await self.send(CLOSE, payload)
                self.closing = True
            elif command == "stub:cut":
                self.out.cut_how = words[0]
                await self.out._cut()
            elif command == "stub:flood":
                for _ in range(int(words[0])):
                    await self.send(BINARY, bytes(int(words[1])))
            elif command == "stub:raw":
                self.out.writer.write(bytes.fromhex(words[0]))
            elif command == "stub:deaf":
                self.out.reader._transport.pause_reading()  # type: ignore[attr-defined]
                await asyncio.Event().wait()
            else:
                await self.send(*message)
        if not self.closing:
            await self.send(*message)
        return [int.from_bytes(message[1][:2], "big"), message[1][2:].decode()]

    async def receive(self) -> tuple[int, bytes]:
        """The next message, or the client's Close."""
        reader, opcode, data = self.out.reader, 0, b""
        while True:
            first, second = await reader.readexactly(2)
            size = second & 127
            if size > 125:
                size = int.from_bytes(await reader.readexactly(2 if size == 126 else 8), "big")
            mask = await reader.readexactly(4)
            payload = self.unmask(await reader.readexactly(size), mask)
            kind = first & 15
            if kind == CLOSE:
                return CLOSE, payload
            if kind == PING:
                await self.send(PONG, payload)
            elif kind != PONG:
                opcode, data = kind or opcode, data + payload
                if first & 128:
                    return opcode, data

    @staticmethod
    def unmask(data: bytes, mask: bytes) -> bytes:
        pad = (mask * (len(data) // 4 + 1))[: len(data)]
        return (int.from_bytes(data, "big") ^ int.from_bytes(pad, "big")).to_bytes(len(data), "big")

    async def send(self, opcode: int, payload: bytes) -> None:
        size = len(payload)
        length = bytes([size]) if size < 126 else b"\x7e" + size.to_bytes(2, "big") if size < 65536 else b""
        length = length or b"\x7f" + size.to_bytes(8, "big")
        self.out.writer.write(bytes([128 | opcode]) + length + payload)
        await self.out.writer.drain()


def error(message: str, kind: str, code: int, param: str | None = None) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def sse(document: object, event: str = "") -> bytes:
    head = f"event: {event}\n" if event else ""
    return f"{head}data: {json.dumps(document, ensure_ascii=False)}\n\n".encode()


def echo(request: Request) -> dict[str, Any]:
    body = {"base64": base64.b64encode(request.body).decode(), "sha256": hashlib.sha256(request.body).hexdigest()}
    if len(request.body) > 1 << 20:
        del body["base64"]
    received = {"method": request.method, "target": request.target, "headers": request.headers}
    return {**received, "body": {**body, "size": len(request.body)}}


def prompt_of(document: dict[str, Any]) -> str:
    """The last thing that was said, whatever the API."""
    asked = document.get("messages") or document.get("input") or document.get("prompt") or ""
    if isinstance(asked, list) and asked and isinstance(asked[-1], dict):
        asked = asked[-1].get("content", "")
    if isinstance(asked, list):
        asked = " ".join(part.get("text", "") if isinstance(part, dict) else str(part) for part in asked)
    return str(asked)


class Form:
    """The shape of one API's answers: here ``/v1/chat/completions``."""

    object = "chat.completion"
    prefix = "chatcmpl"
    done = True

    def __init__(self, document: dict[str, Any], name: str) -> None:
        self.document = document
        self.model = document.get("model", name)
        prompt = prompt_of(document).split()
        self.vocabulary = ["The", "stub", "server", "heard:", *prompt]
        asked = [document.get(key) for key in ("max_completion_tokens", "max_tokens", "max_output_tokens")]
        limits = [int(value) for value in asked if value is not None]
        self.limit = limits[0] if limits else len(self.vocabulary)
        self.finish_reason = "length" if limits else "stop"
        self.prompt_tokens = len(prompt)
        self.count = 0
        self.text = ""
        self.id = f"{self.prefix}-{os.urandom(8).hex()}"

    def next_word(self) -> str:
        word = (" " if self.count else "") + self.vocabulary[self.count % len(self.vocabulary)]
        self.count += 1
        self.text += word
        return word

    def usage(self) -> dict[str, int]:
        total = self.prompt_tokens + self.count
        return {"prompt_tokens": self.prompt_tokens, "total_tokens": total, "completion_tokens": self.count}

    def envelope(self, choices: list[dict[str, Any]], suffix: str = "") -> dict[str, Any]:
        head = {"id": self.id, "object": self.object + suffix, "created": int(time.time()), "model": self.model}
        return {**head, "choices": choices}

    def choice(self, content: dict[str, Any], finish_reason: str | None) -> list[dict[str, Any]]:
        return [{"index": 0, **content, "logprobs": None, "finish_reason": finish_reason}]

    def whole(self) -> dict[str, Any]:
        message = {"message": {"role": "assistant", "content": self.text}}
        return {**self.envelope(self.choice(message, self.finish_reason)), "usage": self.usage()}

    def first(self) -> Iterator[bytes]:
        yield sse(self.envelope(self.choice({"delta": {"role": "assistant", "content": ""}}, None), ".chunk"))

    def token(self, word: str) -> bytes:
        return sse(self.envelope(self.choice({"delta": {"content": word}}, None), ".chunk"))

    def last(self) -> Iterator[bytes]:
        yield sse(self.envelope(self.choice({"delta": {}}, self.finish_reason), ".chunk"))
        if (self.document.get("stream_options") or {}).get("include_usage"):
            yield sse({**self.envelope([], ".chunk"), "usage": self.usage()})


class Completion(Form):
    """``/v1/completions``."""

    object = "text_completion"
    prefix = "cmpl"

    def whole(self) -> dict[str, Any]:
        return {**self.envelope(self.choice({"text": self.text}, self.finish_reason)), "usage": self.usage()}

    def first(self) -> Iterator[bytes]:
        yield from ()

    def token(self, word: str) -> bytes:
        return sse(self.envelope(self.choice({"text": word}, None)))

    def last(self) -> Iterator[bytes]:
        yield sse(self.envelope(self.choice({"text": ""}, self.finish_reason)))
        if (self.document.get("stream_options") or {}).get("include_usage"):
            yield sse({**self.envelope([]), "usage": self.usage()})


class Responses(Form):
    """``/v1/responses``, the parts that a client reads."""

    prefix = "resp"
    done = False

    def response(self, status: str) -> dict[str, Any]:
        content = {"type": "output_text", "text": self.text, "annotations": []}
        message = {
            "id": "msg-" + self.id,
            "type": "message",
            "role": "assistant",
            "status": status,
            "content": [content],
        }
        usage = {
            "input_tokens": self.prompt_tokens,
            "output_tokens": self.count,
            "total_tokens": self.usage()["total_tokens"],
        }
        usage_details = {"input_tokens_details": {"cached_tokens": 0}, "output_tokens_details": {"reasoning_tokens": 0}}
        head = {
            "id": self.id,
            "object": "response",
            "created_at": int(time.time()),
            "status": status,
            "model": self.model,
        }
        output = [message] if self.count else []
        rest = {"parallel_tool_calls": True, "tool_choice": "auto", "tools": [], "error": None}
        return {**head, "output": output, "usage": {**usage, **usage_details}, **rest}

    def event(self, kind: str, content: dict[str, Any]) -> bytes:
        self.sequence = getattr(self, "sequence", -1) + 1
        return sse({"type": kind, "sequence_number": self.sequence, **content}, kind)

    def whole(self) -> dict[str, Any]:
        return self.response("completed")

    def first(self) -> Iterator[bytes]:
        yield self.event("response.created", {"response": self.response("in_progress")})

    def token(self, word: str) -> bytes:
        where = {"item_id": "msg-" + self.id, "output_index": 0, "content_index": 0}
        return self.event("response.output_text.delta", {**where, "delta": word, "logprobs": []})

    def last(self) -> Iterator[bytes]:
        yield self.event("response.completed", {"response": self.response("completed")})


class Messages(Form):
    """``/v1/messages``, Anthropic's."""

    prefix = "msg"
    done = False

    def message(self) -> dict[str, Any]:
        content = [{"type": "text", "text": self.text}] if self.count else []
        head = {"id": self.id, "type": "message", "role": "assistant", "model": self.model, "content": content}
        usage = {"input_tokens": self.prompt_tokens, "output_tokens": self.count}
        return {
            **head,
            "stop_reason": self.stop_reason() if self.count else None,
            "stop_sequence": None,
            "usage": usage,
        }

    def stop_reason(self) -> str:
        return {"length": "max_tokens", "stop": "end_turn"}.get(self.finish_reason, self.finish_reason)

    def whole(self) -> dict[str, Any]:
        return self.message()

    def first(self) -> Iterator[bytes]:
        yield sse({"type": "message_start", "message": self.message()}, "message_start")
        block = {"type": "text", "text": ""}
        yield sse({"type": "content_block_start", "index": 0, "content_block": block}, "content_block_start")

    def token(self, word: str) -> bytes:
        delta = {"type": "text_delta", "text": word}
        return sse({"type": "content_block_delta", "index": 0, "delta": delta}, "content_block_delta")

    def last(self) -> Iterator[bytes]:
        yield sse({"type": "content_block_stop", "index": 0}, "content_block_stop")
        delta = {"stop_reason": self.stop_reason(), "stop_sequence": None}
        yield sse({"type": "message_delta", "delta": delta, "usage": {"output_tokens": self.count}}, "message_delta")
        yield sse({"type": "message_stop"}, "message_stop")


SLEEP_ROUTES = ("/sleep", "/wake_up", "/is_sleeping", "/collective_rpc", "/reset_prefix_cache")
FORMS: dict[str, type[Form]] = {
    "/v1/chat/completions": Form,
    "/v1/completions": Completion,
    "/v1/responses": Responses,
    "/v1/messages": Messages,
}


async def main(options: argparse.Namespace) -> None:
    loop = asyncio.get_running_loop()
    server = Server(options)
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, (lambda: None) if options.ignore_sigterm else server.stopping.set)
    if options.exit_after is not None:
        loop.call_later(options.exit_after, os._exit, options.exit_code)
    flooding = loop.run_in_executor(None, flood, options) if options.flood else None
    life = asyncio.create_task(serve(server))
    stop = asyncio.create_task(server.stopping.wait())
    await asyncio.wait({life, stop}, return_when=asyncio.FIRST_COMPLETED)
    if life.done():
        life.result()
    deadline = loop.time() + 5
    while server.running and loop.time() < deadline:
        await asyncio.sleep(0.005)
    print(f"INFO:     Finished server process [{os.getpid()}]", flush=True)
    if flooding is not None and not flooding.done():
        os._exit(0)


async def serve(server: Server) -> None:
    options = server.options
    if options.listen_early:
        await listen(server)
    await load(options)
    if options.never_ready:
        await asyncio.Event().wait()
    server.loaded = True
    if not options.listen_early:
        await listen(server)
    print("INFO:     Application startup complete.", flush=True)
    if options.crash_after_ready is not None:
        await asyncio.sleep(options.crash_after_ready)
        print("EngineCore encountered a fatal error. (stub)", file=sys.stderr, flush=True)
        os._exit(options.exit_code)
    await asyncio.Event().wait()


async def listen(server: Server) -> None:
    options, loop = server.options, asyncio.get_running_loop()
    print(f"INFO:     Started server process [{os.getpid()}]\nINFO:     Waiting for application startup.", flush=True)
    if options.uds:
        await loop.create_unix_server(lambda: Protocol(server), options.uds)
        log(f"Starting vLLM API server 0 on unix:{options.uds}", "launcher.py:46")
        return
    await loop.create_server(lambda: Protocol(server), options.host, options.port, backlog=2048)
    log(f"Starting vLLM API server 0 on http://{options.host}:{options.port}", "launcher.py:46")


if __name__ == "__main__":
    OPTIONS = parse_options(sys.argv[1:])
    print_start_up(OPTIONS)
    start_children(OPTIONS)
    try:
        asyncio.run(main(OPTIONS))
    except OSError as exc:
        print(f"ERROR:    {exc}", file=sys.stderr, flush=True)
        sys.exit(1)

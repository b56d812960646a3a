"""Malformed and deceitful requests, with every way in which each may reach a model's server.

Servers differ in what they let through, so a case lists the acceptable outcomes: each is the requests that may arrive,
in their order, as method, target and body. ``()`` is a refusal: nothing arrives, and the client gets a 4xx, or its
connection is closed, or it is left waiting for the rest of what it has begun.
"""

from __future__ import annotations

from typing import NamedTuple

Arrived = tuple[bytes, bytes, bytes]
Outcome = tuple[Arrived, ...]

REFUSED: Outcome = ()
SMUGGLED = b"GET /m/v1/smuggled HTTP/1.1\r\nHost: x\r\n\r\n"


class Case(NamedTuple):
    """Bytes that a client sends, and what may come of them."""

    sent: bytes
    outcomes: tuple[Outcome, ...] = (REFUSED,)


def head(*lines: bytes, line: bytes = b"POST /m/v1/echo HTTP/1.1", host: bytes = b"Host: x\r\n") -> bytes:
    """A request's head that asks for the end of the connection."""
    return b"%b\r\n%bConnection: close\r\n%b\r\n" % (line, host, b"".join(line + b"\r\n" for line in lines))


def got(target: bytes = b"/v1/echo", body: bytes = b"", method: bytes = b"GET") -> Outcome:
    return ((method, target, body),)


def posted(body: bytes) -> Outcome:
    return got(body=body, method=b"POST")


def get(target: bytes, *lines: bytes) -> bytes:
    return head(*lines, line=b"GET %b HTTP/1.1" % target)


CHUNKED = b"Transfer-Encoding: chunked"
LENGTH = b"Content-Length: 5"
HELLO = b"5\r\nhello\r\n0\r\n\r\n"

LENGTHS = {
    "length and chunked": Case(head(LENGTH, CHUNKED) + HELLO + SMUGGLED),
    "chunked and length": Case(head(CHUNKED, LENGTH) + HELLO + SMUGGLED),
    "CL.TE": Case(head(b"Content-Length: 6", CHUNKED) + b"0\r\n\r\nG" + SMUGGLED),
    "TE.CL": Case(head(CHUNKED, b"Content-Length: 3") + b"8\r\nSMUGGLED\r\n0\r\n\r\n" + SMUGGLED),
    "two lengths": Case(head(LENGTH, b"Content-Length: 6") + b"hello" + SMUGGLED),
    "the same length twice": Case(head(LENGTH, LENGTH) + b"hello", (REFUSED, posted(b"hello"))),
    "a list of lengths": Case(head(b"Content-Length: 5, 5") + b"hello", (REFUSED, posted(b"hello"))),
    "a list of different lengths": Case(head(b"Content-Length: 5, 50") + b"hello" + SMUGGLED),
    "+5": Case(head(b"Content-Length: +5") + b"hello" + SMUGGLED),
    "-5": Case(head(b"Content-Length: -5") + b"hello" + SMUGGLED),
    "0x5": Case(head(b"Content-Length: 0x5") + b"hello" + SMUGGLED),
    "5 with an underscore": Case(head(b"Content-Length: 0_5") + b"hello" + SMUGGLED),
    "5.0": Case(head(b"Content-Length: 5.0") + b"hello" + SMUGGLED),
    "5 5": Case(head(b"Content-Length: 5 5") + b"hello" + SMUGGLED),
    "an empty length": Case(head(b"Content-Length:") + b"hello" + SMUGGLED),
    "a length of superscripts": Case(head("Content-Length: ⁵".encode()) + b"hello" + SMUGGLED),
    "a length of 2^64 + 5": Case(head(b"Content-Length: 18446744073709551621") + b"hello" + SMUGGLED),
    "a length of 400 digits": Case(head(b"Content-Length: " + b"9" * 400) + b"hello" + SMUGGLED),
    "a length of 5000 digits": Case(head(b"Content-Length: " + b"9" * 5000) + b"hello" + SMUGGLED),
    "leading zeros": Case(head(b"Content-Length: 0005") + b"hello", (REFUSED, posted(b"hello"))),
    "spaces around the length": Case(head(b"Content-Length: \t 5 \t") + b"hello", (REFUSED, posted(b"hello"))),
    "space before the colon": Case(head(b"Content-Length : 5") + b"hello" + SMUGGLED),
    "tab before the colon": Case(head(b"Content-Length\t: 5") + b"hello" + SMUGGLED),
    # h11 takes it for the end of the line above, hence for a request without a body.
    "space before the name": Case(head(b"X: y", b" Content-Length: 5") + b"hello" + SMUGGLED, (REFUSED, posted(b""))),
    "a GET with a body": Case(head(LENGTH, line=b"GET /m/v1/echo HTTP/1.1") + b"hello", (REFUSED, got(body=b"hello"))),
    "a GET with a body that is a request": Case(
        head(b"Content-Length: %d" % len(SMUGGLED), line=b"GET /m/v1/echo HTTP/1.1") + SMUGGLED,
        (REFUSED, got(body=SMUGGLED)),
    ),
    "a HEAD with a chunked body": Case(
        head(CHUNKED, line=b"HEAD /m/v1/echo HTTP/1.1") + HELLO, (REFUSED, got(body=b"hello", method=b"HEAD"))
    ),
}

CODINGS = {
    name: Case(head(value) + HELLO + SMUGGLED, (REFUSED,))
    for name, value in {
        "TE of something else": b"Transfer-Encoding: gzip",
        "chunked, then something": b"Transfer-Encoding: chunked, gzip",
        "something, then chunked": b"Transfer-Encoding: gzip, chunked",
        "chunked twice": b"Transfer-Encoding: chunked, chunked",
        "chunked in two lines": b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked",
        "chunked and identity in two lines": b"Transfer-Encoding: chunked\r\nTransfer-Encoding: identity",
        "identity and chunked in two lines": b"Transfer-Encoding: identity\r\nTransfer-Encoding: chunked",
        "identity": b"Transfer-Encoding: identity",
        "xchunked": b"Transfer-Encoding: xchunked",
        "quoted": b'Transfer-Encoding: "chunked"',
        "with a parameter": b"Transfer-Encoding: chunked;q=1",
        "with a vertical tab": b"Transfer-Encoding: \x0bchunked",
        "with a NUL": b"Transfer-Encoding: chunked\0",
        "with a space before the colon": b"Transfer-Encoding : chunked",
        "with a bare CR": b"X: y\rTransfer-Encoding: chunked",
        "folded": b"Transfer-Encoding:\r\n chunked",
        "folded away": b"X: y\r\n Transfer-Encoding: chunked",
        "with an underscore": b"Transfer_Encoding: chunked",
        "empty": b"Transfer-Encoding:",
        "with a comma": b"Transfer-Encoding: ,chunked",
    }.items()
}  # fmt: skip
# Another header, so the body is empty, and what follows on the wire comes after the last request.
CODINGS["with an underscore"] = CODINGS["with an underscore"]._replace(outcomes=(REFUSED, posted(b"")))
# h11 unfolds lines, as RFC 9112 §5.2 allows it: the coding is the next line's, or the end of another value.
CODINGS["folded"] = CODINGS["folded"]._replace(outcomes=(REFUSED, posted(b"hello")))
CODINGS["folded away"] = CODINGS["folded away"]._replace(outcomes=(REFUSED, posted(b"")))
CODINGS["upper case"] = Case(head(b"TRANSFER-ENCODING: CHUNKED") + HELLO, (REFUSED, posted(b"hello")))
CODINGS["HTTP/1.0"] = Case(head(CHUNKED, line=b"POST /m/v1/echo HTTP/1.0") + HELLO, (REFUSED, posted(b"hello")))

CHUNKS = {
    "a chunk extension": Case(head(CHUNKED) + b"5;a=b\r\nhello\r\n0\r\n\r\n", (REFUSED, posted(b"hello"))),
    "a quoted chunk extension": Case(
        head(CHUNKED) + b'5;a="b;c"\r\nhello\r\n0\r\n\r\n', (REFUSED, posted(b"hello"))
    ),
    "a line feed in a quoted chunk extension": Case(head(CHUNKED) + b'5;a="\n"\r\nhello\r\n0\r\n\r\n' + SMUGGLED),
    "a bare LF ends a chunk extension": Case(head(CHUNKED) + b"5;\nxxxxx\r\n0\r\n\r\n" + SMUGGLED),
    "a bare CR ends a chunk extension": Case(head(CHUNKED) + b"5;\rxxxxx\r\n0\r\n\r\n" + SMUGGLED),
    "a bare LF after a size": Case(head(CHUNKED) + b"5\nhello\r\n0\r\n\r\n" + SMUGGLED),
    "a bare CR after a size": Case(head(CHUNKED) + b"5\rhello\r\n0\r\n\r\n" + SMUGGLED),
    "a bare LF after a chunk": Case(head(CHUNKED) + b"5\r\nhello\n0\r\n\r\n" + SMUGGLED),
    "bytes after a chunk": Case(head(CHUNKED) + b"5\r\nhelloXX\r\n0\r\n\r\n" + SMUGGLED),
    "nothing after a chunk": Case(head(CHUNKED) + b"5\r\nhello0\r\n\r\n" + SMUGGLED),
    "space before a size": Case(head(CHUNKED) + b" 5\r\nhello\r\n0\r\n\r\n" + SMUGGLED),
    "space after a size": Case(head(CHUNKED) + b"5 \r\nhello\r\n0\r\n\r\n", (REFUSED, posted(b"hello"))),
    "size with 0x": Case(head(CHUNKED) + b"0x5\r\nhello\r\n0\r\n\r\n" + SMUGGLED),
    "size with a sign": Case(head(CHUNKED) + b"+5\r\nhello\r\n0\r\n\r\n" + SMUGGLED),
    "a negative size": Case(head(CHUNKED) + b"-5\r\nhello\r\n0\r\n\r\n" + SMUGGLED),
    "size with an underscore": Case(head(CHUNKED) + b"0_5\r\nhello\r\n0\r\n\r\n" + SMUGGLED),
    "an empty size": Case(head(CHUNKED) + b"\r\nhello\r\n0\r\n\r\n" + SMUGGLED),
    "a size that is none": Case(head(CHUNKED) + b"G\r\nhello\r\n0\r\n\r\n" + SMUGGLED),
    "a size of 2^64 + 5": Case(head(CHUNKED) + b"10000000000000005\r\nhello\r\n0\r\n\r\n" + SMUGGLED),
    "a size of 2^63": Case(head(CHUNKED) + b"8000000000000000\r\nhello\r\n0\r\n\r\n" + SMUGGLED),
    "a size of 100 digits": Case(head(CHUNKED) + b"0" * 99 + b"5\r\nhello\r\n0\r\n\r\n", (REFUSED, posted(b"hello"))),
    "more digits than a number has": Case(head(CHUNKED) + b"f" * 100 + b"\r\nhello\r\n0\r\n\r\n" + SMUGGLED),
    "zeros for the last chunk": Case(head(CHUNKED) + b"5\r\nhello\r\n000\r\n\r\n", (REFUSED, posted(b"hello"))),
    "no last chunk": Case(head(CHUNKED) + b"5\r\nhello\r\n"),
    "half of the last chunk": Case(head(CHUNKED) + b"5\r\nhello\r\n0\r\n"),
    "trailers": Case(
        head(CHUNKED, b"Trailer: X-Trailer") + b"5\r\nhello\r\n0\r\nX-Trailer: 1\r\n\r\n", (REFUSED, posted(b"hello"))
    ),
    "trailers about the request": Case(
        head(CHUNKED) + b"5\r\nhello\r\n0\r\nContent-Length: 0\r\nHost: evil\r\n\r\n", (REFUSED, posted(b"hello"))
    ),
    "an obscure trailer": Case(head(CHUNKED) + b"5\r\nhello\r\n0\r\nX y: 1\r\n\r\n" + SMUGGLED),
    "fewer bytes than the length": Case(head(b"Content-Length: 50") + b"hello"),
}  # fmt: skip

LINES = {
    "no version": Case(b"GET /m/v1/echo\r\n\r\n"),
    "HTTP/0.9": Case(head(line=b"GET /m/v1/echo HTTP/0.9")),
    "HTTP/2.0": Case(head(line=b"GET /m/v1/echo HTTP/2.0")),
    "HTTP/1.2": Case(head(line=b"GET /m/v1/echo HTTP/1.2"), (REFUSED, got())),
    "HTTP/11": Case(head(line=b"GET /m/v1/echo HTTP/11")),
    "http/1.1": Case(head(line=b"GET /m/v1/echo http/1.1")),
    "the preface of HTTP/2": Case(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"),
    "two spaces": Case(head(line=b"GET  /m/v1/echo HTTP/1.1"), (REFUSED, got())),
    "a tab": Case(head(line=b"GET\t/m/v1/echo HTTP/1.1")),
    "a space in the target": Case(head(line=b"GET /m/v1/echo /x HTTP/1.1")),
    "a method in lower case": Case(head(line=b"get /m/v1/echo HTTP/1.1"), (REFUSED, got(method=b"get"), got())),
    "a method with a colon": Case(head(line=b"GE:T /m/v1/echo HTTP/1.1")),
    "an empty line first": Case(b"\r\n" + get(b"/m/v1/echo"), (REFUSED, got())),
    "bare line feeds": Case(get(b"/m/v1/echo").replace(b"\r\n", b"\n"), (REFUSED, got())),
    "bare carriage returns": Case(get(b"/m/v1/echo").replace(b"\r\n", b"\r")),
    "TLS": Case(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\0" * 32),
    "TRACE": Case(head(line=b"TRACE /m/v1/echo HTTP/1.1")),
    "CONNECT": Case(head(line=b"CONNECT m:80 HTTP/1.1")),
    "CONNECT to a path": Case(head(line=b"CONNECT /m/v1/echo HTTP/1.1")),
    "half a request line": Case(b"GET /m/v1/ec"),
    "half a head": Case(b"GET /m/v1/echo HTTP/1.1\r\nHost: x\r\n"),
}

TARGETS = {
    "absolute": Case(get(b"http://x/m/v1/echo"), (REFUSED, got())),
    "absolute, of another host": Case(get(b"http://evil/m/v1/echo"), (REFUSED, got())),
    "absolute, of another scheme": Case(get(b"file:///m/v1/echo"), (REFUSED, got())),
    "absolute with a user": Case(get(b"http://a@evil/m/v1/echo"), (REFUSED, got())),
    "an asterisk": Case(head(line=b"OPTIONS * HTTP/1.1")),
    "an @": Case(get(b"@evil/m/v1/echo")),
    "an @ after a slash": Case(get(b"/@evil/m/v1/echo")),
    "no slash": Case(get(b"m/v1/echo")),
    "a query only": Case(get(b"?/m/v1/echo")),
    "two slashes first": Case(get(b"//m/v1/echo")),
    "two slashes inside": Case(get(b"/m/v1//echo")),
    "a backslash": Case(get(b"/m/v1\\..\\..\\x")),
    "dot segments": Case(get(b"/m/v1/../metrics")),
    "dot segments to another model": Case(get(b"/m/v1/../../n/v1/echo")),
    "encoded dot segments": Case(get(b"/m/v1/%2e%2e/metrics")),
    "half-encoded dot segments": Case(get(b"/m/v1/.%2E/metrics")),
    "an encoded slash": Case(get(b"/m/v1%2f..%2fmetrics")),
    "an encoded backslash": Case(get(b"/m/v1/%5c..%5cmetrics")),
    "a NUL": Case(get(b"/m/v1/echo\0")),
    "an encoded NUL": Case(get(b"/m/v1/echo%00")),
    "encoded twice": Case(get(b"/m/v1/%252e%252e/metrics")),
    "a broken escape": Case(get(b"/m/v1/%e")),
    "a fragment": Case(get(b"/m/v1/echo#/../x"), (REFUSED, got())),
    "path parameters": Case(get(b"/m/v1/..;/metrics"), (REFUSED, got(b"/v1/..;/metrics"))),
    "an encoded line end": Case(get(b"/m/v1/%0d%0aX-T-A:%20b"), (REFUSED, got(b"/v1/%0d%0aX-T-A:%20b"))),
    "UTF-8": Case(get("/m/v1/é".encode())),
    "overlong UTF-8": Case(get(b"/m/v1/%c0%ae%c0%ae/metrics"), (REFUSED, got(b"/v1/%c0%ae%c0%ae/metrics"))),
    "a query with a question mark": Case(get(b"/m/v1/echo?a?b=/../"), (got(b"/v1/echo?a?b=/../"),)),
    "an empty query": Case(get(b"/m/v1/echo?"), (got(b"/v1/echo"), got(b"/v1/echo?"))),
    "a closed route": Case(get(b"/m/v1/load_lora_adapter")),
    "a closed route, encoded": Case(get(b"/m/v1/load%5flora_adapter")),
    "a closed route, with a slash": Case(get(b"/m/v1/sleep/")),
    "a closed route, with a query": Case(get(b"/m/v1/sleep?level=1")),
    "the server's metrics": Case(get(b"/m/metrics")),
    "20 KB": Case(get(b"/m/v1/" + b"a" * 20_000)),
    "300 KB": Case(get(b"/m/v1/" + b"a" * 300_000)),
}

HEADERS = {
    "no host": Case(head(line=b"GET /m/v1/echo HTTP/1.1", host=b"")),
    "two hosts": Case(head(b"Host: y", line=b"GET /m/v1/echo HTTP/1.1")),
    "the same host twice": Case(head(b"Host: x", line=b"GET /m/v1/echo HTTP/1.1")),
    "an empty host": Case(head(line=b"GET /m/v1/echo HTTP/1.1", host=b"Host:\r\n")),
    "a host with a user": Case(head(line=b"GET /m/v1/echo HTTP/1.1", host=b"Host: a@b\r\n")),
    "a host with a path": Case(head(line=b"GET /m/v1/echo HTTP/1.1", host=b"Host: a/b\r\n")),
    "a host with a space": Case(head(line=b"GET /m/v1/echo HTTP/1.1", host=b"Host: a b\r\n")),
    "a list of hosts": Case(
        head(line=b"GET /m/v1/echo HTTP/1.1", host=b"Host: a, b\r\n"), (REFUSED,)
    ),
    "a folded host": Case(head(line=b"GET /m/v1/echo HTTP/1.1", host=b"Host: x\r\n y\r\n")),
    "space before the host's colon": Case(head(line=b"GET /m/v1/echo HTTP/1.1", host=b"Host : x\r\n")),
    "no colon": Case(get(b"/m/v1/echo", b"nonsense")),
    "an empty name": Case(get(b"/m/v1/echo", b": x")),
    "a space in a name": Case(get(b"/m/v1/echo", b"X y: z")),
    "a name in UTF-8": Case(get(b"/m/v1/echo", "X-é: z".encode())),
    "a NUL in a value": Case(get(b"/m/v1/echo", b"X-A: a\0b")),
    "a bare CR in a value": Case(get(b"/m/v1/echo", b"X-A: a\rX-T-A: b")),
    "a bare LF in a value": Case(get(b"/m/v1/echo", b"X-A: a\nX-B: b"), (REFUSED, got())),
    "a folded line": Case(get(b"/m/v1/echo", b"X-A: a\r\n b"), (REFUSED, got())),
    "200 headers": Case(get(b"/m/v1/echo", *[b"X-A: a"] * 200)),
    "70 KB of headers": Case(get(b"/m/v1/echo", b"X-A: " + b"a" * 70_000)),
    "500 KB of headers": Case(get(b"/m/v1/echo", b"X-A: " + b"a" * 500_000)),
    "500 KB of small headers": Case(get(b"/m/v1/echo", *[b"a: b"] * 80_000)),
    "Connection names Host": Case(get(b"/m/v1/echo", b"Connection: host, content-length"), (got(),)),
    "Connection names the length": Case(
        head(b"Connection: close, content-length", LENGTH) + b"hello", (REFUSED, posted(b"hello"))
    ),
    "h2c without a body": Case(get(b"/m/v1/echo", b"Connection: upgrade", b"Upgrade: h2c"), (REFUSED, got())),
    "h2c with a body": Case(head(b"Connection: upgrade", b"Upgrade: h2c", LENGTH) + b"hello" + SMUGGLED),
    "h2c with a chunked body": Case(head(b"Connection: upgrade", b"Upgrade: h2c", CHUNKED) + HELLO + SMUGGLED),
    "any upgrade with a body": Case(head(b"Connection: Upgrade", b"Upgrade: TLS/1.0", LENGTH) + b"hello" + SMUGGLED),
}  # fmt: skip

TWO = get(b"/m/v1/echo").replace(b"Connection: close\r\n", b"")
PIPELINED = {
    "two requests": Case(TWO + get(b"/m/v1/last"), ((*got(), *got(b"/v1/last")), got())),
    "garbage after a request": Case(TWO + b"\0\1garbage\r\n\r\n", (REFUSED, got())),
    "a body that was not announced": Case(TWO + b"x=1\r\n\r\n", (REFUSED, got())),
    "a request after Connection: close": Case(get(b"/m/v1/echo") + SMUGGLED, (got(),)),
}

CORPUS: dict[str, Case] = {
    f"{kind}: {name}": case
    for kind, cases in {
        "length": LENGTHS,
        "coding": CODINGS,
        "chunks": CHUNKS,
        "line": LINES,
        "target": TARGETS,
        "headers": HEADERS,
        "pipelined": PIPELINED,
    }.items()
    for name, case in cases.items()
}

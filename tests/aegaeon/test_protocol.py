"""What a connection may take, against a real server on a real socket."""

import asyncio
import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from aegaeon.listeners import Server, tcp_listener, unix_listener, uvicorn_config
from aegaeon.server.protocol import BoundedProtocol, ConnectionLimits, OwnUserProtocol


class Small(BoundedProtocol):
    limits = ConnectionLimits(
        max_head_bytes=1000, max_connections=20, head_s=0.3, body_s=0.5, write_s=0.5
    )


async def length(request: Request) -> Response:
    return PlainTextResponse(str(len(await request.body())))


ended = threading.Event()


async def flood(request: Request) -> Response:
    async def chunks():
        try:
            while True:
                yield b"x" * 65536
                await asyncio.sleep(0)  # as whoever computes what it sends
        finally:
            ended.set()

    return StreamingResponse(chunks())


async def slow(request: Request) -> Response:
    await asyncio.sleep(1.0)
    return PlainTextResponse("slow")


APP = Starlette(
    routes=[Route(f"/{view.__name__}", view, methods=["POST"]) for view in (length, flood, slow)]
)


@contextmanager
def serving(listener: socket.socket, protocol: type[BoundedProtocol]) -> Iterator[None]:
    server = Server(uvicorn_config(APP, http=protocol))
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listener])))
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    with tcp_listener("127.0.0.1", 0) as listener, serving(listener, Small):
        yield listener.getsockname()[1]


def connect(port: int) -> socket.socket:
    made = socket.create_connection(("127.0.0.1", port))
    made.settimeout(10)
    return made


def exchange(port: int, *parts: bytes, pause_s: float = 0.0) -> bytes:
    """Everything that comes back until the server closes."""
    with connect(port) as made:
        for part in parts:
            with suppress(BrokenPipeError, ConnectionResetError):
                made.sendall(part)
            time.sleep(pause_s)
        return rest_of(made)


def rest_of(made: socket.socket) -> bytes:
    answer = b""
    with suppress(ConnectionResetError):
        while data := made.recv(65536):
            answer += data
    return answer


def code_of(answer: bytes) -> tuple[int, str]:
    head, _, body = answer.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)["error"]["code"]


POST = b"POST /length HTTP/1.1\r\nHost: x\r\n"
CLOSE = b"Connection: close\r\n"


def test_a_request_within_the_limits_is_served(port):
    answer = exchange(port, POST + CLOSE + b"Content-Length: 3\r\n\r\nabc")
    assert answer.startswith(b"HTTP/1.1 200")
    assert answer.endswith(b"3")


@pytest.mark.parametrize(
    "head",
    [
        POST + b"X: " + b"y" * 2000 + b"\r\n\r\n",
        POST + b"".join(b"X-%d: y\r\n" % i for i in range(200)) + b"\r\n",
        POST + b"X: " + b"y" * 60_000,
        b"POST /" + b"y" * 60_000,
        b"POST /" + b"y" * 2000 + b" HTTP/1.1\r\n\r\n",
    ],
    ids=["long header", "many headers", "endless header", "endless url", "long url"],
)
def test_a_head_beyond_the_limit_is_a_431(port, head):
    assert code_of(exchange(port, head)) == (431, "head_too_large")


def test_a_head_that_does_not_end_is_a_408(port):
    began = time.monotonic()
    assert code_of(exchange(port, b"POST /len")) == (408, "request_timeout")
    assert time.monotonic() - began < 2.0


def test_a_head_that_comes_byte_by_byte_is_cut_off(port):
    began = time.monotonic()
    answer = exchange(port, *(bytes([byte]) for byte in POST), pause_s=0.03)
    assert time.monotonic() - began < 4.0
    assert answer == b"" or code_of(answer) == (408, "request_timeout")


def test_a_connection_without_a_request_is_closed_without_a_word(port):
    with connect(port) as made:
        assert rest_of(made) == b""


KEPT = POST + b"Content-Length: 0\r\n\r\n"


@contextmanager
def kept_alive(port: int) -> Iterator[socket.socket]:
    """A connection whose first request has been answered."""
    with connect(port) as made:
        made.sendall(KEPT)
        answer = b""
        while not answer.endswith(b"\r\n\r\n0"):
            answer += made.recv(65536)
        yield made


@pytest.mark.parametrize("before", [b"", b"\r\n", b"\r\n\r\n"])
def test_the_head_of_a_later_request_that_does_not_end_is_a_408(port, before):
    with kept_alive(port) as made:
        if before:
            made.sendall(before)
            time.sleep(0.05)
        made.sendall(b"POST /len")
        assert code_of(rest_of(made)) == (408, "request_timeout")


def test_a_kept_connection_with_empty_lines_alone_is_closed_without_a_word(port):
    began = time.monotonic()
    with kept_alive(port) as made:
        with suppress(BrokenPipeError, ConnectionResetError):
            for _ in range(40):
                made.sendall(b"\r\n")
                time.sleep(0.03)
        assert rest_of(made) == b""
    assert time.monotonic() - began < 4.0


def test_a_later_request_behind_an_empty_line_has_all_of_its_time():
    class Patient(Small):
        limits = ConnectionLimits(head_s=1.0)

    with (
        tcp_listener("127.0.0.1", 0) as listener,
        serving(listener, Patient),
        kept_alive(listener.getsockname()[1]) as made,
    ):
        made.sendall(b"\r\n")
        time.sleep(0.6)
        made.sendall(POST + CLOSE)
        time.sleep(0.6)
        made.sendall(b"Content-Length: 3\r\n\r\nabc")
        assert rest_of(made).endswith(b"3")


def test_a_body_that_was_answered_before_it_came_leaves_no_connection_without_a_timer(port):
    with connect(port) as made:
        made.sendall(b"POST /nowhere HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\n")
        assert made.recv(65536).startswith(b"HTTP/1.1 404")
        time.sleep(0.1)
        made.sendall(b"abc")
        assert rest_of(made) in (b"", b"Not Found")


def test_a_body_that_does_not_end_is_a_408(port):
    answer = exchange(port, POST + b"Content-Length: 100\r\n\r\nabc")
    assert code_of(answer) == (408, "request_timeout")


@pytest.mark.parametrize("noise", [b"\x00\xff\x17" * 50, b"GET\r\n\r\n", b"hello\r\n\r\n"])
def test_bytes_that_are_not_http_are_a_400_in_the_shape_of_all_errors(port, noise):
    assert code_of(exchange(port, noise)) == (400, "invalid_http")


def test_a_request_that_waits_behind_an_answer_does_not_end_it(port):
    """Pipelined: the second one's body is late only because nobody reads it."""
    first = b"POST /slow HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n"
    second = POST + CLOSE + b"Content-Length: 4\r\n\r\n"
    answer = exchange(port, first + second, b"abcd")
    assert answer.count(b"HTTP/1.1 200") == 2, answer


def test_an_answer_may_take_longer_than_the_request_may(port):
    answer = exchange(
        port, b"POST /slow HTTP/1.1\r\nHost: x\r\n" + CLOSE + b"Content-Length: 0\r\n\r\n"
    )
    assert answer.endswith(b"slow")


def test_a_client_that_never_reads_is_let_go(port):
    ended.clear()
    with connect(port) as made:
        made.sendall(b"POST /flood HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n")
        assert ended.wait(timeout=10)


def test_connections_beyond_the_limit_are_a_503_and_later_ones_are_served(port):
    held = [connect(port) for _ in range(Small.limits.max_connections)]
    with connect(port) as one_more:
        answer = rest_of(one_more)
    assert code_of(answer) == (503, "too_many_connections")
    assert b"retry-after: 1" in answer
    for each in held:
        each.close()
    time.sleep(0.1)
    answer = exchange(port, POST + CLOSE + b"Content-Length: 0\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 200")


def test_on_a_unix_socket_this_user_is_let_in(tmp_path: Path):
    path = tmp_path / "s"
    with (
        unix_listener(path) as listener,
        serving(listener, OwnUserProtocol),
        socket.socket(socket.AF_UNIX) as made,
    ):
        made.connect(str(path))
        made.sendall(POST + CLOSE + b"Content-Length: 0\r\n\r\n")
        assert rest_of(made).startswith(b"HTTP/1.1 200")

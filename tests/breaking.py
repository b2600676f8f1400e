"""Flower's real servers on loopback, and a proxy in front of them that breaks connections at chosen moments."""

from __future__ import annotations

import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, Literal

import uvicorn

Fault = Literal["unread", "unanswered", "torn", "silent"]
"""How the proxy breaks a connection.

- ``unread``: it closes the connection before the server gets the request.
- ``unanswered``: it closes the connection after the server has handled the request.
- ``torn``: it closes the connection in the middle of the answer.
- ``silent``: it keeps the connection open and sends nothing.
"""


@contextmanager
def served(app: Any) -> Iterator[int]:
    """Serve an ASGI app on 127.0.0.1 and yield its port."""
    listening = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, lifespan="off", ws="none"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    try:
        yield listening.getsockname()[1]
    finally:
        server.should_exit = True
        thread.join(20)
        listening.close()


class Proxy:
    """A context that forwards requests and answers. It closes a connection when it is used a second time, as a server does after its timeout.

    Args:
        upstream: port of the server.
        tls: TLS for the proxy's own side; None for plain connections.
    """

    def __init__(self, upstream: int, tls: ssl.SSLContext | None = None) -> None:
        self._upstream, self._tls = upstream, tls
        self._listening = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.port: int = self._listening.getsockname()[1]
        self._faults: dict[str, list[Fault]] = {}
        self._threads: list[threading.Thread] = []
        self._over = threading.Event()
        self.seen: list[str] = []
        """The last part of each request's path."""
        self.broken: list[str] = []
        """The same for connections that were broken."""

    def __enter__(self) -> Proxy:
        self._start(self._accept)
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        # Closing the socket does not wake a thread in ``accept``.
        with suppress(OSError):
            socket.create_connection(("127.0.0.1", self.port), 1).close()
        for thread in self._threads:
            thread.join(20)
        self._listening.close()

    def fail(self, call: str, *faults: Fault) -> None:
        """Break the next requests to ``call``, one with each fault."""
        self._faults.setdefault(call, []).extend(faults)

    def _start(self, target: Any, *arguments: Any) -> None:
        self._threads.append(thread := threading.Thread(target=target, args=arguments))
        thread.start()

    def _accept(self) -> None:
        while not self._over.is_set():
            client, _ = self._listening.accept()
            self._start(self._handle, client)

    def _handle(self, client: socket.socket) -> None:
        with client, suppress(OSError):
            client.settimeout(20)
            if self._tls is None:
                self._relay(client)
            else:
                with self._tls.wrap_socket(client, server_side=True) as inner:
                    self._relay(inner)

    def _relay(self, client: socket.socket) -> None:
        if not (request := _message(client)):
            return
        call = request.split(b" ", 2)[1].decode().rpartition("/")[2]
        self.seen.append(call)
        faults = self._faults.get(call)
        fault = faults.pop(0) if faults else None
        if fault is not None:
            self.broken.append(call)
        if fault == "unread":
            return
        if fault == "silent":
            self._over.wait(20)
            return
        answer = self._forward(request)
        if fault == "torn":
            client.sendall(answer[: len(answer) // 2])
        elif fault is None:
            client.sendall(answer)
            # Open until it is used again.
            client.recv(1)

    def _forward(self, request: bytes) -> bytes:
        with socket.create_connection(("127.0.0.1", self._upstream), 20) as server:
            server.sendall(request)
            return _message(server)


def _message(connection: socket.socket) -> bytes:
    """A complete request or answer, head and body; empty if the connection closed."""
    found = b""
    while b"\r\n\r\n" not in found:
        if not (more := connection.recv(1 << 16)):
            return b""
        found += more
    head, _, body = found.partition(b"\r\n\r\n")
    fields = dict(line.lower().split(b": ", 1) for line in head.split(b"\r\n")[1:])
    while len(body) < int(fields.get(b"content-length", 0)):
        body += connection.recv(1 << 20)
    return head + b"\r\n\r\n" + body

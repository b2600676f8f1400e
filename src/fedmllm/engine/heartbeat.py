"""The sign of life that whoever has taken over a task of Flower's gives."""

from __future__ import annotations

from typing import Any


class Heartbeat:
    """Given from now on, in a thread, until it is stopped or turned down. Where it is turned down the task's owner finds out by itself, at its next call.

    Args:
        client: the task's connection.
    """

    def __init__(self, client: Any) -> None:
        import httpx
        from flwr.supercore.heartbeat import HeartbeatSender, make_task_heartbeat_fn_http

        beat = make_task_heartbeat_fn_http(client)

        def given() -> bool:
            try:
                return beat()
            except httpx.HTTPStatusError:
                # What Flower's thread does not catch it would print on the console.
                self._sender._stop_event.set()
                return True

        self._sender = HeartbeatSender(given)
        self._sender.start()

    def stop(self) -> None:
        """Give none any more."""
        self._sender._stop_event.set()
        self._sender._thread.join()

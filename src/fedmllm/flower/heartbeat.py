"""The sign of life that whoever has taken over a task of Flower's gives."""

from __future__ import annotations

from typing import Any


class Heartbeat:
    """Given from now on, in a thread, until it is stopped or turned down. Where it is turned down the task's owner finds out by itself, at its next call.

    Flower's own sign of life interrupts the process where its task has ended meanwhile; this one just stops.

    Args:
        client: the task's connection.
    """

    def __init__(self, client: Any) -> None:
        from flwr.supercore.heartbeat import HeartbeatSender

        self._client = client
        self._sender = HeartbeatSender(self._given)
        self._sender.start()

    def _given(self) -> bool:
        """Whether it arrived, or there is no use in trying again; else Flower's thread soon does."""
        import httpx
        from flwr.proto.runtime_pb2 import SendTaskHeartbeatRequest

        try:
            alive = self._client.SendTaskHeartbeat(SendTaskHeartbeatRequest()).success
        except httpx.TransportError:
            return False
        except httpx.HTTPStatusError as error:
            if error.response.is_server_error:
                return False
            # What Flower's thread does not catch it would print on the console.
            alive = False
        if not alive:
            self._sender._stop_event.set()
        return True

    def stop(self) -> None:
        """Give none any more. One that is just being given is waited for, as long as its call may last."""
        self._sender._stop_event.set()
        self._sender._thread.join()

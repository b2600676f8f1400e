"""Heartbeats of a process that has taken over a Flower task."""

from __future__ import annotations

from typing import Any


class Heartbeat:
    """Sends heartbeats in a thread until it is stopped or refused. If it is refused, the task's owner notices at its next call.

    Flower's own heartbeat interrupts the process if its task has ended in the meantime. This one only stops.

    Args:
        client: the task's connection.
    """

    def __init__(self, client: Any) -> None:
        from flwr.supercore.heartbeat import HeartbeatSender

        self._client = client
        self._sender = HeartbeatSender(self._given)
        self._sender.start()

    def _given(self) -> bool:
        """Send a heartbeat. Returns False if Flower's thread should retry soon, True if it arrived or a retry is useless."""
        import httpx
        from flwr.proto.runtime_pb2 import SendTaskHeartbeatRequest

        try:
            alive = self._client.SendTaskHeartbeat(SendTaskHeartbeatRequest()).success
        except httpx.TransportError:
            return False
        except httpx.HTTPStatusError as error:
            if error.response.is_server_error:
                return False
            # Flower's thread would print an uncaught exception on the console.
            alive = False
        if not alive:
            self._sender._stop_event.set()
        return True

    def stop(self) -> None:
        """Stop sending heartbeats, and wait for a heartbeat that is under way."""
        self._sender._stop_event.set()
        self._sender._thread.join()

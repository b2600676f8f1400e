"""Calls to Flower's SuperLink and SuperNode: each on a connection of its own, and repeated on a new one where the transport fails.

Why a call may be repeated although the other side may have carried it out, by what Flower 1.41 does there:

==========================  ==========================================================================================================
call                        repeated after it was carried out
==========================  ==========================================================================================================
AcquireTask                 the task that was handed over is pending again after 30 s without a sign of life, and is then given once more
PullTaskInput               the task runs already, which is refused: it has begun, as asked; what else the answer told is lost
PullMessages                not repeated here: a message is handed over once. Who asks looks again, knowing that it may have been lost
PullObject, ListNodes,      only read
GetNodes
ConfirmMessageReceived      what is deleted already is not there to be deleted
PushMessages                a message is known by its content: it is kept once, and the pieces that are missing are asked for again
PushObject                  a piece that is there is not taken a second time: it is looked for, and counts as sent where it is there or sent on
PushTaskOutput              the task has ended, and its token with it, which is refused: it has ended, as asked
SendTaskHeartbeat           not repeated here: Flower's thread gives the next sign of life itself
StartRun                    another run is begun; the first, which nobody serves, is left
RegisterNode                the key is known already, which is refused: it is admitted, as asked
==========================  ==========================================================================================================
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

PAUSES = (0.1, 0.2, 0.4, 0.8)
"""Seconds before a call is repeated, once for each."""
TIMEOUT = 30.0
"""Seconds within which the other side must take a connection, and go on with what it takes or sends."""
_ONCE = ("PullMessages", "SendTaskHeartbeat")
_DONE = {
    "PullTaskInput": "RUNTIME_TASK_START_FAILED",
    "PushTaskOutput": "RUNTIME_AUTHENTICATION_FAILED",
    "RegisterNode": "PUBLIC_KEY_ALREADY_IN_USE",
}
"""With which of Flower's errors a repeated call is refused that was carried out before."""


class OneCall:
    """Ends a connection with its call: one that was idle may be closed by the other side just when it is used again. Bounds the call's waits."""

    def intercept(self, context: Any, call_next: Callable[[Any], Any]) -> Any:
        """Called by Flower's client for every request."""
        import httpx

        context.request.headers["connection"] = "close"
        context.request.extensions["timeout"] = httpx.Timeout(TIMEOUT).as_dict()
        return call_next(context)


def connected(kind: Any, address: str, certificate: bytes | None, component: str, interceptors: tuple[Any, ...], patience: float) -> Wire:
    """A client of Flower's, of some kind.

    Args:
        kind: its class.
        address: ``host:port``.
        certificate: of the authority that the other side's is checked against; None for a connection without TLS.
        component: what Flower is told to be spoken to by.
        interceptors: what shows who calls.
        patience: seconds after its first try at which a call is not repeated any more.
    """
    from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor

    every = [RuntimeVersionHttpInterceptor(component_name=component), *interceptors, OneCall()]
    return Wire(kind.from_server_address(address, certificate is None, certificate, every), patience)


class Wire:
    """Has the calls of a client of Flower's, and repeats them where the transport fails, as said above.

    A call is tried once more than there are ``PAUSES``; each try ends when the other side is silent for ``TIMEOUT``. What a call raises then is
    the client's ``httpx.TransportError``.

    Args:
        client: Flower's.
        patience: seconds after its first try at which a call is not repeated any more.
    """

    def __init__(self, client: Any, patience: float) -> None:
        self._client, self._patience = client, patience

    def __getattr__(self, name: str) -> Callable[[Any], Any]:
        return lambda request: self._called(name, request)[0]

    def _called(self, name: str, request: Any) -> tuple[Any, bool]:
        """A call's answer, None where a repeated one had been carried out before; and whether it was repeated."""
        import httpx

        call, begun, tried = getattr(self._client, name), time.monotonic(), 0
        while True:
            try:
                return call(request), tried > 0
            except httpx.TransportError:
                if name in _ONCE or tried == len(PAUSES) or time.monotonic() - begun >= self._patience:
                    raise
            except httpx.HTTPStatusError as error:
                if tried == 0 or not _done(name, error.response.text):
                    raise
                return None, True
            time.sleep(PAUSES[tried])
            tried += 1

    def PushObject(self, request: Any) -> Any:  # noqa: N802 (as Flower names it)
        """Send a piece of a message, whose answer says whether it is there."""
        from flwr.proto.message_pb2 import PullObjectRequest, PushObjectResponse

        told, repeated = self._called("PushObject", request)
        if told.stored or not repeated:
            return told
        there = self.PullObject(PullObjectRequest(node=request.node, run_id=request.run_id, object_id=request.object_id))
        # What the other side does not know any more it has had complete, and sent on: it forgets what does not come after minutes only.
        return PushObjectResponse(stored=there.object_available or not there.object_found)

    def close(self) -> None:
        """Let go of what the client holds."""
        self._client.close()


def _done(name: str, refusal: str) -> bool:
    """Whether a repeated call is refused because it has been carried out."""
    from flwr.supercore.error import ApiErrorCode, FlowerError

    found = FlowerError.from_json(refusal)
    return name in _DONE and found is not None and found.code == ApiErrorCode[_DONE[name]]

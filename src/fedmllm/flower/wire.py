"""Calls to Flower's SuperLink and SuperNode, each on its own connection and retried on a new one if the transport fails.

A retried call may already have been carried out. The table says why that is safe, given what Flower 1.41 does:

==========================  ==========================================================================================================
call                        effect of a retry after the call was carried out
==========================  ==========================================================================================================
AcquireTask                 without heartbeats, the task becomes available again after 30 s, and the retry returns it
PullTaskInput               Flower refuses, because the task has started, as requested; the rest of the first answer is lost
PullMessages                not retried here: Flower delivers a message only once. The caller asks again and knows that it may be lost
PullObject, ListNodes,      no effect, these calls only read
GetNodes
ConfirmMessageReceived      no effect, the message is deleted already
PushMessages                Flower identifies a message by its content, stores it once, and asks again for the pieces that are missing
PushObject                  Flower does not store a piece twice; we check for it, and it counts as sent if it is there or was sent on
PushTaskOutput              Flower refuses, because the task and its token have ended, as requested
SendTaskHeartbeat           not retried here: Flower's thread sends the next heartbeat itself
StartRun                    another run starts; the first is abandoned, because no process serves it
RegisterNode                Flower refuses, because it knows the key; the site is admitted, as requested
==========================  ==========================================================================================================
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

PAUSES = (0.1, 0.2, 0.4, 0.8)
"""Seconds to wait before each retry of a call."""
TIMEOUT = 30.0
"""Seconds of silence after which a connection or a transfer fails."""
_ONCE = ("PullMessages", "SendTaskHeartbeat")
_DONE = {
    "PullTaskInput": "RUNTIME_TASK_START_FAILED",
    "PushTaskOutput": "RUNTIME_AUTHENTICATION_FAILED",
    "RegisterNode": "PUBLIC_KEY_ALREADY_IN_USE",
}
"""The error by which Flower refuses a retry because the call was carried out before."""


class OneCall:
    """Closes a connection after its call and sets the call's timeout.

    The other side might close an idle connection just when it is used again.
    """

    def intercept(self, context: Any, call_next: Callable[[Any], Any]) -> Any:
        """Adjust a request. Flower's client calls this for every request."""
        import httpx

        context.request.headers["connection"] = "close"
        context.request.extensions["timeout"] = httpx.Timeout(TIMEOUT).as_dict()
        return call_next(context)


def connected(kind: Any, address: str, certificate: bytes | None, component: str, interceptors: tuple[Any, ...], patience: float) -> Wire:
    """Return a Flower client that retries calls.

    Args:
        kind: the client's class.
        address: ``host:port``.
        certificate: certificate of the authority that signed the other side's; None for a connection without TLS.
        component: the name of the Flower component that the client presents itself as.
        interceptors: interceptors that authenticate the caller.
        patience: seconds after its first attempt during which a call is retried.
    """
    from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor

    every = [RuntimeVersionHttpInterceptor(component_name=component), *interceptors, OneCall()]
    return Wire(kind.from_server_address(address, certificate is None, certificate, every), patience)


class Wire:
    """Wraps a Flower client and retries its calls if the transport fails, as the module docstring describes.

    A call has one attempt more than there are ``PAUSES``. Each attempt ends after ``TIMEOUT`` seconds of silence. After the last attempt the call
    raises the client's ``httpx.TransportError``.

    Args:
        client: Flower's client.
        patience: seconds after its first attempt during which a call is retried.
    """

    def __init__(self, client: Any, patience: float) -> None:
        self._client, self._patience = client, patience

    def __getattr__(self, name: str) -> Callable[[Any], Any]:
        return lambda request: self._called(name, request)[0]

    def _called(self, name: str, request: Any) -> tuple[Any, bool]:
        """Return a call's answer, or None if a retry found that the call was carried out before; and whether it was retried."""
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
        """Send a piece of a message. The answer says whether the other side has it."""
        from flwr.proto.message_pb2 import PullObjectRequest, PushObjectResponse

        response, retried = self._called("PushObject", request)
        if response.stored or not retried:
            return response
        there = self.PullObject(PullObjectRequest(node=request.node, run_id=request.run_id, object_id=request.object_id))
        # An unknown piece was received completely and sent on. The other side forgets an incomplete piece only after minutes.
        return PushObjectResponse(stored=there.object_available or not there.object_found)

    def close(self) -> None:
        """Release the client's resources."""
        self._client.close()


def _done(name: str, refusal: str) -> bool:
    """Return whether a retry was refused because the call had been carried out."""
    from flwr.supercore.error import ApiErrorCode, FlowerError

    found = FlowerError.from_json(refusal)
    return name in _DONE and found is not None and found.code == ApiErrorCode[_DONE[name]]

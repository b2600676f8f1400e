"""Takes messages one by one from the SuperNode on this machine, over its interface on 127.0.0.1, and answers them.

The SuperNode takes one message from the server, announces a task, fetches the message's content, and waits for the reply before it takes the next
message. It waits forever for a reply if the task was finished without one, or if the handover of the reply started but did not finish. It silently
drops a message if the run ends while it fetches the content, for example because the server died while it sent. This process therefore ends each
message in one of four ways, and the server learns of each:

- It hands over a reply, which may be an error.
- It leaves the task unfinished. The SuperNode notices that within a minute and answers with an error.
- It finishes the task without a reply, if the content will not arrive. The SuperNode does not wait for a reply then.
- It exits, if the SuperNode would wait forever. The SuperNode is restarted too (``fedmllm.sites.start``), and so the server learns of it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

from fedmllm.errors import RunError
from fedmllm.flower.heartbeat import Heartbeat
from fedmllm.flower.settings import SiteConfig
from fedmllm.flower.wire import Wire, connected
from fedmllm.sites import incoming
from fedmllm.sites.incoming import AbandonedError, Incoming, LostError

_LOG = logging.getLogger("fedmllm.site")
_PATIENCE = 60.0
"""Seconds after its first attempt during which a call to the SuperNode is retried. Well below the 180 s for which it keeps an incomplete reply."""
_GONE = 600.0
"""Seconds to wait for a SuperNode that does not respond; then this process and the SuperNode restart."""
_HANDED_OVER = 3
"""Maximum number of attempts to hand over a reply."""


class Inbox:
    """The tasks that a site's SuperNode announces.

    Args:
        site: the site's settings.
        node: the connection to the site's SuperNode.
    """

    def __init__(self, site: SiteConfig, node: Any) -> None:
        self._site, self._node = site, node
        self._missed: float | None = None

    def next(self) -> str:
        """Return the token of the next task; empty for none. If no SuperNode answers, wait a second first.

        Raises:
            RunError: if a process other than the site's SuperNode uses the port, or no SuperNode has answered within the limit.
        """
        import httpx
        from flwr.proto.runtime_pb2 import AcquireTaskRequest

        try:
            taken = self._node.AcquireTask(AcquireTaskRequest(supported_task_types=["flwr-clientapp"]))
        except httpx.HTTPStatusError as error:
            raise RunError(
                f"the process on port {self._site.port} of this machine is not this site's SuperNode (status {error.response.status_code}); "
                "stop it, or set another port in site.yaml"
            ) from None
        except httpx.TransportError as error:
            # The SuperNode has not started yet, or is restarting.
            self._miss(str(error) or type(error).__name__)
            time.sleep(10 * incoming.POLL)
            return ""
        if self._missed is not None:
            self._missed = None
            _LOG.info("%s: the SuperNode responds", self._site.name)
        return str(taken.token) if taken.HasField("task") else ""

    def _miss(self, reason: str) -> None:
        """Log once that the SuperNode does not respond and how long the worker waits for it."""
        now, where = time.monotonic(), f"no SuperNode responds on port {self._site.port} of this machine ({reason})"
        if self._missed is None:
            self._missed = now
            _LOG.warning("%s: %s; waiting for it, for at most %g s", self._site.name, where, _GONE)
        if now - self._missed > _GONE:
            raise RunError(f"{where} for {_GONE:g} s; this worker and the SuperNode restart")


def serve(site: SiteConfig, app: Any) -> None:
    """Answer the messages that the SuperNode receives, until the process ends.

    Raises:
        RunError: if a process other than the site's SuperNode uses the port, or the SuperNode has to restart.
    """
    from flwr.supercore.interceptors import SuperExecAuthHttpInterceptor

    guarded = frozenset({"/flwr.proto.Runtime/AcquireTask"})
    secret = (site.folder / "secret").read_bytes()
    shown = SuperExecAuthHttpInterceptor(master_secret=secret, protected_methods=guarded)
    inbox = Inbox(site, _connected(site, "SuperExec", shown))
    _LOG.info("%s is waiting for tasks", site.name)
    token = ""
    while True:
        if token := token or inbox.next():
            token = _answered(site, app, token, inbox.next)
        else:
            time.sleep(incoming.POLL)


def _connected(site: SiteConfig, component: str, interceptor: Any) -> Wire:
    """Connect to the SuperNode, which requires the site's secret or a task's token."""
    from flwr.supercore.runtime import RuntimeHttpClient

    return connected(RuntimeHttpClient, f"127.0.0.1:{site.port}", None, component, (interceptor,), _PATIENCE)


def _answered(site: SiteConfig, app: Any, token: str, another: Callable[[], str]) -> str:
    """Answer a task's message. Returns the token of a task that arrived instead; empty for none.

    Raises:
        RunError: if the SuperNode would wait forever.
    """
    import httpx
    from flwr.supercore.interceptors import RuntimeTokenHttpInterceptor

    own = _connected(site, "flwr-clientapp", RuntimeTokenHttpInterceptor(token))
    heartbeat = Heartbeat(own)
    try:
        answer(site.name, app, own, another)
    except AbandonedError as error:
        _LOG.warning("%s: abandoned a message: %s", site.name, error)
        return error.token
    except LostError as error:
        _LOG.error("%s: lost a message (%s); the SuperNode answers it with an error within a minute", site.name, error, exc_info=error)
    except httpx.ConnectError as error:
        _LOG.error("%s: lost a message because the SuperNode is gone (%s)", site.name, error)
    except Exception as error:
        if not _over(error):
            problem = "cannot hand over a reply to the SuperNode"
            raise RunError(f"{problem} ({error or type(error).__name__}); this worker and the SuperNode restart") from error
        _LOG.error("%s: the SuperNode no longer waits for the reply to this message", site.name)
    finally:
        heartbeat.stop()
        own.close()
    return ""


def _over(error: Exception) -> bool:
    """Return whether the SuperNode reports that the task has ended. The server knows that already."""
    import httpx

    return isinstance(error, httpx.HTTPStatusError) and error.response.status_code == httpx.codes.UNAUTHORIZED


def answer(name: str, app: Any, own: Any, another: Callable[[], str]) -> None:
    """Take a task's message, run it, and hand the reply to the SuperNode.

    Args:
        name: the site's name.
        app: the ClientApp that answers the message.
        own: the task's connection to the SuperNode.
        another: checks for another task and returns its token; empty for none.

    Raises:
        AbandonedError: if the message's content will not arrive.
        LostError: if the SuperNode delivered the message, but it cannot be read or did not arrive.
        RunError: if the content has not arrived within the limit.
    """
    from flwr.common.constant import SubStatus
    from flwr.proto.runtime_pb2 import PullTaskInputRequest, PushTaskOutputRequest

    # The response is not needed: the message says which run it belongs to, and the rest concerns apps that Flower starts.
    own.PullTaskInput(PullTaskInputRequest())
    try:
        message = Incoming(own).message(another)
    except AbandonedError as error:
        # If the task stayed unfinished, the SuperNode would send an error after a minute, as the reply to whatever message it has then.
        own.PushTaskOutput(PushTaskOutputRequest(sub_status=SubStatus.FAILED, details=str(error)))
        raise
    _LOG.info("%s: received a message of type %s", name, message.metadata.message_type)
    _hand_over(app, message, own)
    own.PushTaskOutput(PushTaskOutputRequest(sub_status=SubStatus.COMPLETED))


def _hand_over(app: Any, message: Any, own: Any) -> None:
    """Answer a message and hand the reply to the SuperNode."""
    from flwr.app import Context, RecordDict
    from flwr.supercore.inflatable.inflatable_utils import ObjectPushError
    from flwr.supernode.runtime.run_clientapp import push_message

    metadata = message.metadata
    context = Context(run_id=metadata.run_id, node_id=metadata.dst_node_id, node_config={}, state=RecordDict(), run_config={})
    reply = _reply(app, message, context)
    for tried in range(1, _HANDED_OVER + 1):
        try:
            push_message(own, reply, context)
            return
        except ObjectPushError:
            # An attempt that timed out here may still run at the SuperNode and restart the handover that a later attempt has started.
            if tried == _HANDED_OVER:
                raise


def _reply(app: Any, message: Any, context: Any) -> Any:
    """Return the app's reply. If the app raises an exception, the reply is an error with the exception's type."""
    from flwr.app import Error, Message
    from flwr.common.constant import ErrorCode

    try:
        return app(message=message, context=context)
    except Exception as error:
        _LOG.error("Answering a message failed", exc_info=error)
        return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, type(error).__name__), reply_to=message)

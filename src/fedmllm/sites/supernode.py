"""What the SuperNode of this machine receives: taken from it message by message, over its interface on 127.0.0.1, and answered.

The SuperNode takes one message from the server, says that there is a task, fetches the message's content, and waits for the reply before it takes the
next. It waits for ever for a reply to a message whose task was finished without one, or whose reply was begun to be handed over, and it forgets a message
without a word when the run ends while the content is fetched, for example because the server died while it sent. What happens here to a message therefore
ends in one of four ways, and the server hears of each:

- with a reply, also where the message could not be answered;
- with a task that is left unfinished, which the SuperNode notices within a minute: it then answers with an error;
- with a task that is finished without a reply, where the content will not come, because then the SuperNode waits for none;
- with the end of this process, where the SuperNode would wait for ever. The SuperNode is ended with it (``fedmllm.sites.start``), which tells the server.
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
"""Seconds after its first try at which a call to the SuperNode is not repeated any more; well below the 180 s that it keeps a reply begun."""
_GONE = 600.0
"""Seconds for which a SuperNode that does not answer is waited for; then this process and the SuperNode are started anew."""
_HANDED_OVER = 3
"""How often a reply is begun to be handed over, at most."""


class Inbox:
    """The tasks that the site's SuperNode has.

    Args:
        site: whose.
        node: the connection to its SuperNode.
    """

    def __init__(self, site: SiteConfig, node: Any) -> None:
        self._site, self._node = site, node
        self._missed: float | None = None

    def next(self) -> str:
        """The token of a task that waits; empty for none, after a second where no SuperNode answers.

        Raises:
            RunError: if another than the site's SuperNode listens there, or none has answered for long.
        """
        import httpx
        from flwr.proto.runtime_pb2 import AcquireTaskRequest

        try:
            taken = self._node.AcquireTask(AcquireTaskRequest(supported_task_types=["flwr-clientapp"]))
        except httpx.HTTPStatusError as error:
            raise RunError(
                f"what listens on port {self._site.port} of this machine is not this site's SuperNode ({error.response.status_code}); "
                "end it, or set another port in site.yaml"
            ) from None
        except httpx.TransportError as error:
            # The SuperNode is not there yet, or is being started anew.
            self._miss(str(error) or type(error).__name__)
            time.sleep(10 * incoming.POLL)
            return ""
        if self._missed is not None:
            self._missed = None
            _LOG.info("%s: the SuperNode answers", self._site.name)
        return str(taken.token) if taken.HasField("task") else ""

    def _miss(self, words: str) -> None:
        """Say once that it is waited for the SuperNode, and for how long at most."""
        now, where = time.monotonic(), f"no SuperNode answers on port {self._site.port} of this machine ({words})"
        if self._missed is None:
            self._missed = now
            _LOG.warning("%s: %s; it is waited for, %g s at most", self._site.name, where, _GONE)
        if now - self._missed > _GONE:
            raise RunError(f"{where}, for {_GONE:g} s; this worker and the SuperNode are started anew")


def serve(site: SiteConfig, app: Any) -> None:
    """Answer what the SuperNode receives, until the process ends.

    Raises:
        RunError: if another than the site's SuperNode listens there, or it has to be started anew.
    """
    from flwr.supercore.interceptors import SuperExecAuthHttpInterceptor

    guarded = frozenset({"/flwr.proto.Runtime/AcquireTask"})
    secret = (site.folder / "secret").read_bytes()
    shown = SuperExecAuthHttpInterceptor(master_secret=secret, protected_methods=guarded)
    inbox = Inbox(site, _connected(site, "SuperExec", shown))
    _LOG.info("%s waits for work", site.name)
    token = ""
    while True:
        if token := token or inbox.next():
            token = _answered(site, app, token, inbox.next)
        else:
            time.sleep(incoming.POLL)


def _connected(site: SiteConfig, component: str, interceptor: Any) -> Wire:
    """To the SuperNode, which asks for the site's secret."""
    from flwr.supercore.runtime import RuntimeHttpClient

    return connected(RuntimeHttpClient, f"127.0.0.1:{site.port}", None, component, (interceptor,), _PATIENCE)


def _answered(site: SiteConfig, app: Any, token: str, another: Callable[[], str]) -> str:
    """Answer a task's message; the token of a task that came instead, empty for none.

    Raises:
        RunError: if the SuperNode would wait for ever.
    """
    import httpx
    from flwr.supercore.interceptors import RuntimeTokenHttpInterceptor

    own = _connected(site, "flwr-clientapp", RuntimeTokenHttpInterceptor(token))
    heartbeat = Heartbeat(own)
    try:
        answer(site.name, app, own, another)
    except AbandonedError as error:
        _LOG.warning("%s: a message was given up: %s", site.name, error)
        return error.token
    except LostError as error:
        _LOG.error("%s: a message was lost (%s); the SuperNode answers it with an error within a minute", site.name, error, exc_info=error)
    except httpx.ConnectError as error:
        _LOG.error("%s: a message was lost with the SuperNode, which is gone (%s)", site.name, error)
    except Exception as error:
        if not _over(error):
            words = "a message could not be answered to the SuperNode"
            raise RunError(f"{words} ({error or type(error).__name__}); this worker and the SuperNode are started anew") from error
        _LOG.error("%s: the SuperNode does not wait for this message's answer any more", site.name)
    finally:
        heartbeat.stop()
        own.close()
    return ""


def _over(error: Exception) -> bool:
    """Whether the SuperNode says that the task has ended, which it has told the server."""
    import httpx

    return isinstance(error, httpx.HTTPStatusError) and error.response.status_code == httpx.codes.UNAUTHORIZED


def answer(name: str, app: Any, own: Any, another: Callable[[], str]) -> None:
    """Take a task's message, run it, and hand the reply to the SuperNode.

    Args:
        name: of the site.
        app: what runs it.
        own: the connection of the task.
        another: looks for another task; its token, empty for none.

    Raises:
        AbandonedError: if the message's content will not come.
        LostError: if the message was handed over, and cannot be read or is not here.
        RunError: if its content has not come for long.
    """
    from flwr.common.constant import SubStatus
    from flwr.proto.runtime_pb2 import PullTaskInputRequest, PushTaskOutputRequest

    # What this tells is not needed: the message says where it belongs, and the rest is of apps that Flower starts.
    own.PullTaskInput(PullTaskInputRequest())
    try:
        message = Incoming(own).message(another)
    except AbandonedError as error:
        # Left unfinished it would be answered with an error in a minute, and the SuperNode take that for the reply to the message it has then.
        own.PushTaskOutput(PushTaskOutputRequest(sub_status=SubStatus.FAILED, details=str(error)))
        raise
    _LOG.info("%s: a message of kind %s", name, message.metadata.message_type)
    _hand_over(app, message, own)
    own.PushTaskOutput(PushTaskOutputRequest(sub_status=SubStatus.COMPLETED))


def _hand_over(app: Any, message: Any, own: Any) -> None:
    """Have a message answered, and give the reply to the SuperNode."""
    from flwr.app import Context, RecordDict
    from flwr.supercore.inflatable.inflatable_utils import ObjectPushError
    from flwr.supernode.runtime.run_clientapp import push_message

    told = message.metadata
    context = Context(run_id=told.run_id, node_id=told.dst_node_id, node_config={}, state=RecordDict(), run_config={})
    reply = _reply(app, message, context)
    for tried in range(1, _HANDED_OVER + 1):
        try:
            push_message(own, reply, context)
            return
        except ObjectPushError:
            # A try that was given up can be carried out late, and has begun anew then what later ones had begun.
            if tried == _HANDED_OVER:
                raise


def _reply(app: Any, message: Any, context: Any) -> Any:
    """The app's; what it raises is an error that the server is told the kind of."""
    from flwr.app import Error, Message
    from flwr.common.constant import ErrorCode

    try:
        return app(message=message, context=context)
    except Exception as error:
        _LOG.error("a message could not be answered", exc_info=error)
        return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, type(error).__name__), reply_to=message)

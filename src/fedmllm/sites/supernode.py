"""What the SuperNode of this machine receives: taken from it message by message, over its interface on 127.0.0.1, and answered.

The SuperNode takes one message from the server, says that there is a task, fetches the message's content, and waits for the reply before it takes the
next. It waits for ever for a reply to a message whose task was finished without one, and it forgets a message without a word when the run ends while
the content is fetched, for example because the server died while it sent. What happens here to a message therefore ends with a reply, or with a task
that is left unfinished, which the SuperNode notices by itself within a minute. Only a task whose content will not come is finished without a reply.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

from fedmllm.engine.heartbeat import Heartbeat
from fedmllm.engine.sites import SiteConfig
from fedmllm.errors import RunError

_LOG = logging.getLogger("fedmllm.site")
_POLL = 0.1
"""Seconds between two looks for a message."""


class AbandonedError(Exception):
    """The content of a message will not come.

    Args:
        token: of the task that came instead; empty for none.
    """

    def __init__(self, token: str) -> None:
        super().__init__("its run ended before its content was there")
        self.token = token


def serve(site: SiteConfig, app: Any) -> None:
    """Answer what the SuperNode receives, until the process ends.

    Raises:
        RunError: if another than the site's SuperNode listens there.
    """
    from flwr.supercore.interceptors import SuperExecAuthHttpInterceptor

    guarded = frozenset({"/flwr.proto.Runtime/AcquireTask"})
    secret = (site.folder / "secret").read_bytes()
    node = _connected(site, "SuperExec", SuperExecAuthHttpInterceptor(master_secret=secret, protected_methods=guarded))
    _LOG.info("%s waits for work", site.name)
    token = ""
    while True:
        if token := token or next_task(site, node):
            token = _answered(site, app, token, lambda: next_task(site, node))
        else:
            time.sleep(_POLL)


def _connected(site: SiteConfig, component: str, interceptor: Any) -> Any:
    """To the SuperNode, which asks for the site's secret."""
    from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor
    from flwr.supercore.runtime import RuntimeHttpClient

    every = [RuntimeVersionHttpInterceptor(component_name=component), interceptor]
    return RuntimeHttpClient.from_server_address(f"127.0.0.1:{site.port}", True, None, every)


def next_task(site: SiteConfig, node: Any) -> str:
    """The token of a task that waits; empty for none.

    Raises:
        RunError: if another than the site's SuperNode listens there.
    """
    import httpx
    from flwr.proto.runtime_pb2 import AcquireTaskRequest

    try:
        taken = node.AcquireTask(AcquireTaskRequest(supported_task_types=["flwr-clientapp"]))
    except httpx.HTTPStatusError as error:
        raise RunError(
            f"what listens on port {site.port} of this machine is not this site's SuperNode ({error.response.status_code}); "
            "end it, or set another port in site.yaml"
        ) from None
    except httpx.TransportError:
        # The SuperNode is not there yet, or is being started anew.
        time.sleep(1)
        return ""
    return str(taken.token) if taken.HasField("task") else ""


def _answered(site: SiteConfig, app: Any, token: str, another: Callable[[], str]) -> str:
    """Answer a task's message; the token of a task that came instead, empty for none. What happens to one message does not end the process."""
    from flwr.supercore.interceptors import RuntimeTokenHttpInterceptor

    own = _connected(site, "flwr-clientapp", RuntimeTokenHttpInterceptor(token))
    heartbeat = Heartbeat(own)
    try:
        answer(site.name, app, own, another)
    except AbandonedError as error:
        _LOG.warning("%s: a message was given up: %s", site.name, error)
        return error.token
    except Exception as error:
        _LOG.error("a message was lost; the SuperNode will notice", exc_info=error)
    finally:
        heartbeat.stop()
        own.close()
    return ""


def answer(name: str, app: Any, own: Any, another: Callable[[], str]) -> None:
    """Take a task's message, run it, and hand the reply to the SuperNode.

    Args:
        name: of the site.
        app: what runs it.
        own: the connection of the task.
        another: looks for another task; its token, empty for none.

    Raises:
        AbandonedError: if the message's content will not come.
    """
    from flwr.common.constant import SubStatus
    from flwr.supernode.runtime.run_clientapp import pull_task_input, push_message, push_task_output

    patient: Any = Patient(own, another)
    try:
        message, context, _, _ = pull_task_input(patient)
    except AbandonedError as error:
        # Left unfinished it would be answered with an error in a minute, and the SuperNode take that for the reply to the message it has then.
        push_task_output(own, None, SubStatus.FAILED, str(error))
        raise
    _LOG.info("%s: a message of kind %s", name, message.metadata.message_type)
    push_message(own, _reply(app, message, context), context)
    push_task_output(own, context, SubStatus.COMPLETED, "")


def _reply(app: Any, message: Any, context: Any) -> Any:
    """The app's; what it raises is an error that the server is told the kind of."""
    from flwr.app import Error, Message
    from flwr.common.constant import ErrorCode

    try:
        return app(message=message, context=context)
    except Exception as error:
        _LOG.error("a message could not be answered", exc_info=error)
        return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, type(error).__name__), reply_to=message)


class Patient:
    """A task's connection, which hands over a message only once its content is there.

    The SuperNode tells of a task before it has the message, and of the message before its content; it has all of the content at once. It has a new
    task only when it is done with the one before, so one that comes while content is waited for says that this content will not.

    Args:
        own: the connection.
        another: looks for another task; its token, empty for none.
    """

    def __init__(self, own: Any, another: Callable[[], str]) -> None:
        self._own, self._another = own, another

    def __getattr__(self, name: str) -> Any:
        return getattr(self._own, name)

    def PullMessages(self, request: Any) -> Any:  # noqa: N802 (it is called by Flower)
        """The task's message.

        Raises:
            AbandonedError: if its content will not come.
        """
        found = self._own.PullMessages(request)
        while not (found.messages_list and self._complete(found)):
            if token := self._another():
                raise AbandonedError(token)
            time.sleep(_POLL)
            if not found.messages_list:
                found = self._own.PullMessages(request)
        return found

    def _complete(self, found: Any) -> bool:
        """Whether the content is there.

        Raises:
            AbandonedError: if the SuperNode could not fetch it.
        """
        from flwr.proto.message_pb2 import PullObjectRequest

        run, root = found.messages_list[0].metadata.run_id, found.message_object_trees[0].object_id
        told = self._own.PullObject(PullObjectRequest(run_id=run, object_id=root))
        if not told.object_found:
            raise AbandonedError("")
        return bool(told.object_available)

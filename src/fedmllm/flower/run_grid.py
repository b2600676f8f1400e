"""Makes this process the server of a run on Flower's SuperLink."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from fedmllm.errors import FederationError
from fedmllm.flower.heartbeat import Heartbeat
from fedmllm.flower.replies import Reply
from fedmllm.flower.superlink import SuperLink, TurnedDownError
from fedmllm.flower.wire import Wire

if TYPE_CHECKING:
    from flwr.app import Message

T = TypeVar("T")
_BEGUN = 3
"""Maximum number of runs to start until the SuperLink's answer about one arrives."""


class RunGrid:
    """Flower's Grid for a run that this process serves. If the SuperLink no longer knows the run, a new one starts.

    Messages under way are lost then, and the round's failure policy handles that. Sending and checking for messages do not wait for an unreachable
    SuperLink, because only the caller knows its deadline.
    """

    def __init__(self, link: SuperLink) -> None:
        self._link = link
        self._grid: Any = None
        self._heartbeat: Any = None
        self._sent: set[str] = set()
        self._coming: dict[str, Reply] = {}
        self._taken: list[Reply] = []
        self._doubtful: set[str] = set()
        self._open()

    def _open(self, patience: float | None = None) -> None:
        """Start a run. If the connection breaks while the SuperLink describes the run, abandon it and start another."""
        from flwr.proto.runtime_pb2 import PullTaskInputRequest

        for _ in range(_BEGUN):
            _, token = self._link.begin(patience)
            with ExitStack() as left:
                client = self._link.server(token)
                left.callback(client.close)
                task = self._link.reached(partial(client.PullTaskInput, PullTaskInputRequest()), patience)
                if task is not None:
                    left.pop_all()
                    self._serve(client, token, task)
                    return
        raise ConnectionError(
            f"the SuperLink at {self._link.address} cannot be reached: the connection broke at the start of each of {_BEGUN} runs"
        )

    def _serve(self, client: Wire, token: str, task: Any) -> None:
        """Become the server of a run that has started."""
        from flwr.common.serde import run_from_proto
        from flwr.supercore.task_identity import TaskIdentity
        from flwr.superlink.grid import HttpGrid

        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = task.task_id, task.run.run_id, task.context.node_id
        grid: Any = HttpGrid(self._link.address, token=token)
        # This replaces Flower's own client, which retries forever and exits the process if a call is refused.
        grid._client = client
        grid.set_run(run_from_proto(task.run))
        self._grid, self._heartbeat = grid, Heartbeat(client)

    def push_messages(self, messages: list[Message]) -> Iterable[str]:
        """Send messages and return their ids.

        The caller may retry the same message after an error. Pieces that the SuperLink has already are neither sent nor stored twice.

        Raises:
            ConnectionError: if the SuperLink cannot be reached, or no longer knows the run.
        """
        names = [str(name) for name in self._alive(lambda: self._push(messages)) if name]
        self._sent |= set(names)
        return names

    def _push(self, messages: list[Message]) -> Iterable[str]:
        from flwr.supercore.inflatable.inflatable_utils import ObjectPushError
        from flwr.supercore.task_identity import TaskIdentity

        for message in messages:
            # A message that was created for a lost run goes to the run that replaced it.
            message.metadata.__dict__.update(_run_id=TaskIdentity.run_id, _src_task_id=TaskIdentity.task_id)
        try:
            return list(self._grid.push_messages(messages))
        except ObjectPushError as error:
            raise ConnectionError(f"the SuperLink at {self._link.address} no longer accepts a piece of a message") from error

    def pull_messages(self, message_ids: list[str], largest: int) -> Iterable[Message]:
        """Return the answers that have arrived completely. Pieces of the others are kept, because the SuperLink announces an answer only once.

        Raises:
            ConnectionError: if the SuperLink cannot be reached, or no longer knows the run.
            ValueError: if an answer is larger than ``largest`` bytes, or if it or a piece of it is lost.
        """
        return self._alive(lambda: self._answers(message_ids, largest))

    def forget(self, message_ids: Sequence[str]) -> None:
        """Drop the pieces of these answers."""
        for name in message_ids:
            self._coming.pop(name, None)

    def _answers(self, names: Sequence[str], largest: int) -> list[Message]:
        if not self._sent.issuperset(names):
            raise ValueError("the task's run no longer exists on the SuperLink")
        client = self._grid._runtime_client
        if others := [name for name in names if name not in self._coming]:
            found = self._announced(client, others)
            for message, tree in zip(found.messages_list, found.message_object_trees, strict=True):
                self._coming[message.metadata.reply_to_message_id] = Reply(client, message, tree, largest)
        complete = [self._coming.pop(name) for name in names if name in self._coming and self._coming[name].complete()]
        self._taken += complete
        return [self._certain(reply.message()) for reply in complete]

    def _announced(self, client: Any, names: list[str]) -> Any:
        """Ask the SuperLink which answers exist. It announces each only once, so an announcement may be lost if the connection breaks."""
        import httpx
        from flwr.proto.runtime_pb2 import PullAppMessagesRequest

        try:
            return client.PullMessages(PullAppMessagesRequest(message_ids=names))
        except httpx.TransportError:
            self._doubtful |= set(names)
            raise

    def _certain(self, reply: Message) -> Message:
        from flwr.common.constant import ErrorCode

        if reply.has_error() and reply.error.code == ErrorCode.MESSAGE_UNAVAILABLE and reply.metadata.reply_to_message_id in self._doubtful:
            raise ValueError("the answer was lost because the connection to the SuperLink broke during delivery")
        return reply

    def _nodes(self) -> list[Any]:
        """Return Flower's nodes. First delete the answers that were taken: deletion blocks the SuperLink's database, and no site is sending now."""
        while self._taken:
            self._taken[-1].forget()
            self._taken.pop()
        return list(self._grid.get_nodes())

    def online(self, names: Sequence[str]) -> dict[str, int]:
        """Return the node ids of connected sites, identified by their keys. Waits for a SuperLink that cannot be reached.

        Raises:
            ConnectionError: if the wait exceeds the link's patience.
        """
        try:
            nodes = self._alive(self._nodes, self._link.patience)
        except TurnedDownError:
            nodes = self._alive(self._nodes, self._link.patience)
        sites = self._link.sites_of(nodes)
        return {name: node.node_id for name, node in sites.items() if name in names and node.status == "online"}

    def _alive(self, call: Callable[[], T], patience: float = 0.0) -> T:
        if self._grid is None:
            self._open(patience)
        try:
            return self._link.reached(call, patience)
        except TurnedDownError:
            self._end()
            raise

    def _end(self) -> None:
        if self._grid is not None:
            self._heartbeat.stop()
            self._grid.close()
        self._grid, self._sent, self._coming, self._taken, self._doubtful = None, set(), {}, [], set()

    def close(self) -> None:
        """Tell the SuperLink that the run has ended."""
        import httpx
        from flwr.proto.runtime_pb2 import PushTaskOutputRequest

        # If the SuperLink cannot be reached, it notices by itself that heartbeats have stopped.
        if self._grid is not None:
            with suppress(httpx.HTTPError):
                self._grid._runtime_client.PushTaskOutput(PushTaskOutputRequest(sub_status="completed"))
        self._end()


@contextmanager
def serving(link: SuperLink) -> Iterator[RunGrid]:
    """Serve a Flower run for the duration of a ``with`` block.

    Raises:
        FederationError: if the SuperLink cannot be reached.
    """
    try:
        grid = RunGrid(link)
    except ConnectionError as error:
        raise FederationError(f"{error}; start it with fedmllm server up") from error
    try:
        yield grid
    finally:
        grid.close()

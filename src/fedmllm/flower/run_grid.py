"""This process as the server of a run on Flower's SuperLink."""

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
"""How many runs are begun, at most, until the SuperLink's answer about one arrives."""


class RunGrid:
    """Flower's Grid of a run that this process serves, begun anew where the SuperLink does not know it any more.

    What was on its way then is lost, which the round's failure policy deals with. Messages are sent and looked for without waiting for a SuperLink
    that cannot be reached: how long that may take is known to who asks.
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
        """Begin a run, and another where the connection broke just as the first was told about, which then is left."""
        from flwr.proto.runtime_pb2 import PullTaskInputRequest

        for _ in range(_BEGUN):
            _, token = self._link.begin(patience)
            with ExitStack() as left:
                client = self._link.server(token)
                left.callback(client.close)
                told = self._link.reached(partial(client.PullTaskInput, PullTaskInputRequest()), patience)
                if told is not None:
                    left.pop_all()
                    self._serve(client, token, told)
                    return
        raise ConnectionError(
            f"the SuperLink at {self._link.address} cannot be reached: the connection broke as each of {_BEGUN} runs began"
        )

    def _serve(self, client: Wire, token: str, told: Any) -> None:
        """Be the server of a run that has been begun."""
        from flwr.common.serde import run_from_proto
        from flwr.supercore.task_identity import TaskIdentity
        from flwr.superlink.grid import HttpGrid

        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = told.task_id, told.run.run_id, told.context.node_id
        grid: Any = HttpGrid(self._link.address, token=token)
        # In the place of Flower's own, which is repeated without an end and ends the process where it is turned down.
        grid._client = client
        grid.set_run(run_from_proto(told.run))
        self._grid, self._heartbeat = grid, Heartbeat(client)

    def push_messages(self, messages: list[Message]) -> Iterable[str]:
        """Send. One that could not be sent may be given again, as it is: what of it is there already is not sent, or kept, twice.

        Raises:
            ConnectionError: if the SuperLink cannot be reached, or does not know the run any more.
        """
        names = [str(name) for name in self._alive(lambda: self._push(messages)) if name]
        self._sent |= set(names)
        return names

    def _push(self, messages: list[Message]) -> Iterable[str]:
        from flwr.supercore.inflatable.inflatable_utils import ObjectPushError
        from flwr.supercore.task_identity import TaskIdentity

        for message in messages:
            # One that was made for a run that is lost goes with the one that was begun since.
            message.metadata.__dict__.update(_run_id=TaskIdentity.run_id, _src_task_id=TaskIdentity.task_id)
        try:
            return list(self._grid.push_messages(messages))
        except ObjectPushError as error:
            raise ConnectionError(f"the SuperLink at {self._link.address} does not take a part of a message any more") from error

    def pull_messages(self, message_ids: list[str], largest: int) -> Iterable[Message]:
        """Answers of which all is there. What is there of the others is kept, for it is told of once.

        Raises:
            ConnectionError: if the SuperLink cannot be reached, or does not know the run any more.
            ValueError: if an answer is larger, or will not come, or a part of it.
        """
        return self._alive(lambda: self._answers(message_ids, largest))

    def forget(self, message_ids: Sequence[str]) -> None:
        """Keep nothing of these answers."""
        for name in message_ids:
            self._coming.pop(name, None)

    def _answers(self, names: Sequence[str], largest: int) -> list[Message]:
        if not self._sent.issuperset(names):
            raise ValueError("the SuperLink does not know the run any more in which it was asked")
        client = self._grid._runtime_client
        if others := [name for name in names if name not in self._coming]:
            told = self._told(client, others)
            for message, tree in zip(told.messages_list, told.message_object_trees, strict=True):
                self._coming[message.metadata.reply_to_message_id] = Reply(client, message, tree, largest)
        complete = [self._coming.pop(name) for name in names if name in self._coming and self._coming[name].complete()]
        self._taken += complete
        return [self._certain(reply.message()) for reply in complete]

    def _told(self, client: Any, names: list[str]) -> Any:
        """What has come in answer to messages. It is told once; where the connection breaks, it may have been."""
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
            raise ValueError("its answer was lost: the connection to the SuperLink broke as it was handed over")
        return reply

    def _nodes(self) -> list[Any]:
        """Flower's. What has been taken is forgotten first: now nobody sends, whom that would keep from writing until it gives up."""
        while self._taken:
            self._taken[-1].forget()
            self._taken.pop()
        return list(self._grid.get_nodes())

    def online(self, names: Sequence[str]) -> dict[str, int]:
        """Sites that are connected, known by their keys. A SuperLink that cannot be reached is waited for.

        Raises:
            ConnectionError: if that takes too long.
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
        """Say that the run has ended."""
        import httpx
        from flwr.proto.runtime_pb2 import PushTaskOutputRequest

        # Where it cannot be told, it finds out by itself when the heartbeat stays away.
        if self._grid is not None:
            with suppress(httpx.HTTPError):
                self._grid._runtime_client.PushTaskOutput(PushTaskOutputRequest(sub_status="completed"))
        self._end()


@contextmanager
def serving(link: SuperLink) -> Iterator[RunGrid]:
    """A run of Flower for the time of a block.

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

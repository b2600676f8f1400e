"""SCAFFOLD: Stochastic Controlled Averaging for Federated Learning. Karimireddy et al., ICML 2020."""

from __future__ import annotations

from dataclasses import dataclass, replace

from fedmllm import weights as W
from fedmllm.algorithms.checks import require_positive
from fedmllm.algorithms.fedavg import FedAvg
from fedmllm.algorithms.state import Aggregate, Client, ServerState
from fedmllm.training.rules import LocalResult, LocalRule, Upload
from fedmllm.types import Broadcast, Weights

CONTROL = "control"
"""Control variates: c at the server, c_k at a client, and the change of c_k in an update."""


@dataclass(frozen=True)
class Scaffold(FedAvg):
    """Clients correct every gradient by the difference of two control variates, which reduces client drift.

        client:  g <- g + c - c_k  at every step;    c_k' = mean over its steps of g before the correction
        server:  w <- w + server_learning_rate mean(D_k);    c <- c + |S| / N mean(c_k' - c_k)

    Means over clients have uniform weights. A strategy may reweigh the updates D_k, but the mean of the control variates stays uniform,
    because c is the mean of all clients' c_k, where c_k = 0 for clients that have not taken part. Control variates have the units of
    gradients and start at zero.

    **With AdamW.** The paper's option II, ``c_k' = c_k - c + (w_global - w_k) / (K lr)``, infers the mean gradient from the distance that
    the client's weights have moved. That is correct for SGD only, where it equals the mean of the uncorrected gradients exactly. AdamW's
    steps have the size of the learning rate, whatever the size of the gradient. The same formula would give control variates of order 1
    next to gradients of order 1e-3, and training would diverge. Here clients average the gradients directly. This is the same rule
    under SGD and has the right units under any optimizer. The correction is applied before clipping and before AdamW's moments.

    Attributes:
        server_learning_rate: server step size, greater than 0.
    """

    server_learning_rate: float = 1.0
    client_sends = (CONTROL,)
    uniform_extras = (CONTROL,)
    uniform_weights = True
    takes_stale_updates = False

    def __post_init__(self) -> None:
        require_positive(server_learning_rate=self.server_learning_rate)

    def init(self, weights: Weights, frozen: Weights) -> ServerState:
        """Start with a control variate of 0."""
        return ServerState(weights, slots={CONTROL: W.zeros_like(weights)})

    def broadcast(self, state: ServerState) -> Broadcast:
        """Also send the server's control variate."""
        return replace(super().broadcast(state), extras={CONTROL: state.slots[CONTROL]})

    def local_rule(self, broadcast: Broadcast, client: Client) -> LocalRule:
        """Correct every gradient, then compute the client's next control variate."""
        server = broadcast.extras[CONTROL]
        own = client.state.get(CONTROL) or W.zeros_like(server)
        correction = W.subtract(server, own)

        def finish(result: LocalResult) -> Upload:
            control = {name: result.gradient.get(name, tensor) for name, tensor in own.items()}
            return Upload(result.weights, {CONTROL: W.subtract(control, own)}, {CONTROL: control})

        return LocalRule(edit_gradient=lambda name, g: g + correction[name].to(g), records_gradient=True, finish=finish)

    def server_step(self, state: ServerState, aggregate: Aggregate) -> ServerState:
        """Apply the class's update rule for w and c."""
        share = aggregate.num_clients / max(state.population.num_clients, aggregate.num_clients)
        control = W.add(state.slots[CONTROL], aggregate.mean[CONTROL], share)
        return state.after(W.add(state.weights, aggregate.update, self.server_learning_rate), {CONTROL: control})

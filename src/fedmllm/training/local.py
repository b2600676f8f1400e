"""The local training loop. There is no other: methods change it through a ``LocalRule``, which is data."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from fedmllm.models.encoding import Encoded, answer_nll, collate
from fedmllm.models.load import VisionLanguageModel
from fedmllm.models.lora import copies, read_weights, trainable, training_only, write_weights
from fedmllm.models.memory import TokenBudget, out_of_memory, release
from fedmllm.models.stacked import side_by_side, stacked
from fedmllm.randomness import generator, torch_randomness
from fedmllm.training.batches import Step, batched, passes, steps
from fedmllm.training.rules import LocalResult, LocalRule
from fedmllm.training.schedule import ScheduleConfig, of_round, of_step
from fedmllm.training.terms import TermStep
from fedmllm.types import Weights


class TrainingConfig(BaseModel):
    """How a client trains between two exchanges."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    local_epochs: int = Field(1, ge=0)
    """Passes over the client's samples per round; 0 sends back a zero update."""
    batch_size: int = Field(4, gt=0)
    """Samples per micro-batch."""
    accumulation: int = Field(1, gt=0)
    """Micro-batches per optimizer step."""
    learning_rate: float = Field(1e-3, gt=0)
    """AdamW's largest step size."""
    schedule: ScheduleConfig = ScheduleConfig()
    """How the learning rate goes."""
    weight_decay: float = Field(0.0, ge=0)
    """Decoupled weight decay."""
    beta1: float = Field(0.9, ge=0, lt=1)
    """AdamW's decay of the gradient's mean."""
    beta2: float = Field(0.95, ge=0, lt=1)
    """AdamW's decay of the gradient's square."""
    clip_norm: float | None = Field(1.0, gt=0)
    """Largest norm of a step's gradient over all tensors; null for none."""
    max_batch_tokens: int | None = Field(None, gt=0)
    """Padded tokens of one forward pass; the micro-batches of a step run as one batch as far as they fit. Null for what suits the device."""


@dataclass(frozen=True)
class LocalTask:
    """One client's turn.

    Attributes:
        client, round_num, seed: name the turn; all its random numbers derive from them.
        samples: encoded, in an order that is the same wherever the client runs.
        received: the weights the client was sent.
        learning_rate: this round's.
    """

    client: str
    round_num: int
    seed: int
    samples: Sequence[Encoded]
    received: Weights
    learning_rate: float


def round_learning_rate(config: TrainingConfig, round_num: int, num_rounds: int) -> float:
    """A round's: the configured one times the schedule's factor of the round."""
    return config.learning_rate * of_round(config.schedule, round_num, num_rounds)


def reach(config: TrainingConfig, learning_rate: float, num_samples: int, num_entries: int) -> float:
    """How far from where it began AdamW can get, as a Euclidean norm over all entries and without weight decay.

    By Cauchy and Schwarz a step t moves an entry by ``lr c_t`` at most, whatever the gradients were:

        c_t^2 = sum_i a_i^2 / b_i,  a_i = (1 - beta1) beta1^(t - i) / (1 - beta1^t),  b_i likewise of beta2,

    so that all steps come to ``lr sqrt(num_entries) sum_t c_t``. It is infinite for long turns with ``beta1^2 >= beta2``.
    """
    steps = config.local_epochs * math.ceil(num_samples / (config.batch_size * config.accumulation))
    beta1, beta2 = config.beta1, config.beta2
    ratio = beta1**2 / beta2 if beta2 else math.inf if beta1 else 0.0
    total, series, size = 0.0, 1.0, 0.0
    # By then c_t has settled, if it does; a client that claims ever so many samples does not keep the server here.
    for t in range(1, min(steps, 1000) + 1):
        size = (1 - beta1) / (1 - beta1**t) * math.sqrt((1 - beta2**t) / (1 - beta2) * series)
        total, series = total + size, 1 + series * ratio
    rest = (steps - 1000) * (size if ratio < 1 else math.inf) if steps > 1000 else 0.0
    return learning_rate * math.sqrt(num_entries) * (total + rest)


def train_locally(
    vlm: VisionLanguageModel, task: LocalTask, rule: LocalRule, config: TrainingConfig, budget: TokenBudget | None = None
) -> LocalResult:
    """Train the adapters on one client's samples, from what it received, with a fresh AdamW.

    A step minimizes the accumulated mean negative log-likelihood of the answer tokens plus the rule's further terms.

    Args:
        vlm: the model.
        task: the client's turn.
        rule: how the method departs from plain training.
        config: how clients train.
        budget: of tokens of a pass, measured or found before; one of its own for None.

    Raises:
        torch.OutOfMemoryError: if not even a pass of one sample fits the memory.
    """
    write_weights(vlm.model, _start(task, rule))
    with training_only(vlm.model, rule.trains), torch_randomness(vlm.device, task.seed, "dropout", task.round_num, task.client):
        turn = _Turn(vlm, task, rule, config, dict(trainable(vlm.model)))
        with _training_mode(vlm):
            _train(vlm, [turn], budget or TokenBudget(config.max_batch_tokens), lambda turns, counts: nullcontext())
    return turn.result(read_weights(vlm.model))


def train_together(
    vlm: VisionLanguageModel, turns: Sequence[tuple[LocalTask, LocalRule]], config: TrainingConfig, budget: TokenBudget | None = None
) -> list[LocalResult]:
    """Train several clients side by side: the samples of all go through the model in common, each through its own client's adapter.

    For every client the same arithmetic as ``train_locally``, summed in another order: its own data order, gradient, penalty, clipping and
    AdamW. One that has fewer steps than others drops out. Without dropout only, whose random numbers would be shared. On a CPU
    the clients are divided among as many threads as PyTorch has, each of which computes alone: small products gain little from two.

    Args:
        vlm: the model.
        turns: the clients' turns, and how the method departs from plain training.
        config: how clients train.
        budget: of tokens of a pass, measured or found before; one of its own for None.

    Raises:
        torch.OutOfMemoryError: if not even a pass of one sample fits the memory.
    """
    own = dict(trainable(vlm.model))
    running = [_Turn(vlm, task, rule, config, _own_weights(own, task, rule)) for task, rule in turns]
    threads = min(torch.get_num_threads(), len(turns)) if vlm.device.type == "cpu" else 1
    common = budget or TokenBudget(config.max_batch_tokens)
    with _training_mode(vlm), side_by_side(vlm.model) as layers:
        _in_threads(
            lambda group: _train(vlm, group, common, lambda some, counts: stacked(layers, [turn.weights for turn in some], counts)),
            _shared_out(running, threads),
        )
    return [turn.result({name: tensor.detach().to("cpu", torch.float32) for name, tensor in turn.weights.items()}) for turn in running]


@contextmanager
def _training_mode(vlm: VisionLanguageModel) -> Iterator[None]:
    """Left again whatever happens, with no gradient behind: a client may fail, and the model is needed for others."""
    vlm.model.train()
    try:
        yield
    finally:
        vlm.model.eval()
        vlm.model.zero_grad(set_to_none=True)


def _own_weights(own: Weights, task: LocalTask, rule: LocalRule) -> Weights:
    """What a client begins with, in tensors of its own; those that train require gradients."""
    weights = copies(own, _start(task, rule))
    return {name: tensor.requires_grad_(rule.trains is None or rule.trains(name)) for name, tensor in weights.items()}


_EFFICIENCY = 0.75
"""How much of several threads' speed is left where they share single products: between 0.68 at 4 samples a pass and 0.9 at 16 on 2 cores."""


def _shared_out(turns: Sequence[_Turn], threads: int) -> list[list[_Turn]]:
    """Turns by thread, the longest first, each to the thread that has least to do; all in one group where that is faster.

    One group computes with all threads at ``_EFFICIENCY`` of their speed, several are done when the largest is.
    """
    groups: list[list[_Turn]] = [[] for _ in range(threads)]
    tokens = [0] * threads
    sizes = [sum(len(sample.input_ids) for step in turn.plan for sample in step.samples) for turn in turns]
    for size, turn in sorted(zip(sizes, turns, strict=True), key=lambda row: -row[0]):
        least = tokens.index(min(tokens))
        groups[least].append(turn)
        tokens[least] += size
    return groups if max(tokens) * threads * _EFFICIENCY <= sum(tokens) else [list(turns)]


def _in_threads(work: Callable[[list[_Turn]], None], groups: Sequence[list[_Turn]]) -> None:
    """Each group in a thread of its own, whose operations use no further threads."""
    if len(groups) == 1:
        work(groups[0])
        return
    before = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(len(groups), initializer=torch.set_num_threads, initargs=(1,)) as pool:
            list(pool.map(work, groups))
    finally:
        torch.set_num_threads(before)


def _start(task: LocalTask, rule: LocalRule) -> Weights:
    return {**task.received, **rule.start}


Adapters = Callable[[Sequence["_Turn"], Sequence[int]], AbstractContextManager[None]]
"""(clients, rows of each) -> the context in which a batch of so many rows goes through their adapters."""


def _train(vlm: VisionLanguageModel, turns: Sequence[_Turn], budget: TokenBudget, adapters: Adapters) -> None:
    """Every client's turn from its first step to its last, step by step."""
    _measure(vlm, turns, budget, adapters)
    for position in range(max(len(turn.plan) for turn in turns)):
        active = [turn for turn in turns if position < len(turn.plan)]
        while (problem := _backward(vlm, active, position, budget, adapters)) is not None:
            _make_room(vlm, active, position, budget, problem)
        for turn in active:
            turn.update(position)


def _measure(vlm: VisionLanguageModel, turns: Sequence[_Turn], budget: TokenBudget, adapters: Adapters) -> None:
    """Settle the budget by the longest sample, as it will train; nothing of that is left."""
    turn, longest = max(((turn, turn.longest) for turn in turns), key=lambda pair: len(pair[1].input_ids) if pair[1] else 0)
    if longest is None:
        return

    def work() -> None:
        with adapters([turn], [1]), vlm.autocast():
            loss = answer_nll(vlm, collate(vlm, [longest])).sum()
        loss.backward()  # type: ignore[no-untyped-call]

    with torch_randomness(vlm.device, 0, "memory"):
        budget.measure(vlm.device, len(longest.input_ids), work)
    turn.forget()


def _backward(vlm: VisionLanguageModel, turns: Sequence[_Turn], position: int, budget: TokenBudget, adapters: Adapters) -> str | None:
    """Add the gradients of a step of each client.

    Returns:
        None; or what the allocator said, if a pass did not fit the memory. The error itself would keep that pass's tensors alive.
    """
    losses: list[tuple[list[int], Tensor]] = []
    max_tokens = budget.tokens or 1
    try:
        for batch, weights, owners in passes(vlm, [turn.plan[position] for turn in turns], max_tokens):
            present = sorted(set(owners))
            with adapters([turns[k] for k in present], [owners.count(k) for k in present]):
                with vlm.autocast():
                    loss = (answer_nll(vlm, batch) * weights).sum(1)
                loss.sum().backward()  # type: ignore[no-untyped-call]
            losses.append((owners, loss.detach()))
        for turn in turns:
            turn.add_terms(position, max_tokens, adapters)
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        return str(error).split("\n")[0]
    for owners, loss in losses:
        for k, value in zip(owners, loss.tolist(), strict=True):
            turns[k].loss += value
    return None


def _make_room(vlm: VisionLanguageModel, turns: Sequence[_Turn], position: int, budget: TokenBudget, problem: str) -> None:
    """Take a step's gradients back, and let its passes be half as large.

    Raises:
        torch.OutOfMemoryError: if they are of one sample already.
    """
    samples = [sample for turn in turns for sample in turn.plan[position].samples]
    groups = [[len(samples[i].input_ids) for i in group] for group in batched(vlm, samples, budget.tokens or 1)]
    largest = max(groups, key=lambda group: len(group) * max(group))
    tokens = len(largest) * max(largest)
    for turn in turns:
        turn.forget()
        turn.halvings += 1
    release(vlm.device)
    if len(largest) == 1:
        raise torch.OutOfMemoryError(f"a pass of one sample of {tokens} tokens does not fit the memory: {problem}")
    budget.halve(tokens, problem)


class _Turn:
    """What lives as long as one client's training: its plan, parameters, optimizer, and the sums of its losses and gradients.

    Args:
        weights: its tensors; those that train require gradients.
    """

    def __init__(self, vlm: VisionLanguageModel, task: LocalTask, rule: LocalRule, config: TrainingConfig, weights: Weights) -> None:
        self._vlm, self._task, self._rule, self._config, self.weights = vlm, task, rule, config, weights
        self.plan = list(_plan(task, config))
        self.loss, self.halvings = 0.0, 0
        self._parameters = {name: tensor for name, tensor in weights.items() if tensor.requires_grad}
        self._received = {name: tensor.to(vlm.device) for name, tensor in task.received.items()}
        betas = (config.beta1, config.beta2)
        self._optimizer = torch.optim.AdamW(
            self._parameters.values(), lr=task.learning_rate, betas=betas, weight_decay=config.weight_decay, fused=True
        )
        self._gradient: Weights = {}

    @property
    def longest(self) -> Encoded | None:
        """Its longest sample; None if it has none."""
        return max((sample for step in self.plan for sample in step.samples), key=lambda sample: len(sample.input_ids), default=None)

    def forget(self) -> None:
        """Take its gradients back."""
        for parameter in self._parameters.values():
            parameter.grad = None

    def add_terms(self, position: int, max_tokens: int, adapters: Adapters) -> None:
        """Add the gradients of the rule's terms that have passes of their own."""
        for term in self._rule.all_terms:
            if term.has_passes:
                rng = generator(self._task.seed, term.name, self._task.round_num, self._task.client, position)
                with adapters([self], [1]):
                    term.backward(TermStep(self._vlm, self.plan[position].samples, rng, max_tokens))

    def update(self, position: int) -> None:
        """The rule's penalty, and the optimizer's step."""
        penalty = self._rule.penalty(self._parameters, self._received, position / len(self.plan))
        if penalty is not None:
            penalty.backward()  # type: ignore[no-untyped-call]
        self._edit_gradients()
        if self._config.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(list(self._parameters.values()), self._config.clip_norm)
        for group in self._optimizer.param_groups:
            group["lr"] = self._task.learning_rate * of_step(self._config.schedule, position, len(self.plan))
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)

    def _edit_gradients(self) -> None:
        for name, parameter in self._parameters.items():
            if parameter.grad is None:
                continue
            if self._rule.records_gradient:
                gradient = parameter.grad.double()
                self._gradient[name] = self._gradient[name].add_(gradient) if name in self._gradient else gradient
            if self._rule.edit_gradient is not None:
                parameter.grad = self._rule.edit_gradient(name, parameter.grad)

    def result(self, weights: Weights) -> LocalResult:
        """What it came to, with the weights it ended with."""
        if not self.plan:
            return LocalResult(weights, self._task.received, {"steps": 0.0})
        gradient = {name: (total / len(self.plan)).float().cpu() for name, total in self._gradient.items()}
        metrics = {"loss": self.loss / len(self.plan), "steps": float(len(self.plan))}
        metrics |= {"halvings": float(self.halvings)} if self.halvings else {}
        return LocalResult(weights, self._task.received, metrics, gradient)


def _plan(task: LocalTask, config: TrainingConfig) -> Iterator[Step]:
    """The steps of all epochs."""
    for epoch in range(config.local_epochs):
        rng = generator(task.seed, "order", task.round_num, task.client, epoch)
        yield from steps(task.samples, config.batch_size, config.accumulation, rng)

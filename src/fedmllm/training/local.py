"""The local training loop. There is no other: methods change it through a ``LocalRule``, which is data."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor

from fedmllm.models.encoding import answer_nll, collate
from fedmllm.models.load import VisionLanguageModel
from fedmllm.models.lora import copies, read_weights, trainable, training_only, write_weights
from fedmllm.models.memory import TokenBudget, out_of_memory, release
from fedmllm.models.parallel_adapters import side_by_side, stacked
from fedmllm.randomness import torch_randomness
from fedmllm.training.batches import batched, passes
from fedmllm.training.client import Adapters, ClientTraining, LocalTask
from fedmllm.training.rules import LocalResult, LocalRule
from fedmllm.training.settings import TrainingConfig
from fedmllm.types import Weights


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
        turn = ClientTraining(vlm, task, rule, config, dict(trainable(vlm.model)))
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
    running = [ClientTraining(vlm, task, rule, config, _own_weights(own, task, rule)) for task, rule in turns]
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


def _shared_out(turns: Sequence[ClientTraining], threads: int) -> list[list[ClientTraining]]:
    """Turns by thread, the longest first, each to the thread that has least to do; all in one group where that is faster.

    One group computes with all threads at ``_EFFICIENCY`` of their speed, several are done when the largest is.
    """
    groups: list[list[ClientTraining]] = [[] for _ in range(threads)]
    tokens = [0] * threads
    sizes = [sum(len(sample.input_ids) for step in turn.plan for sample in step.samples) for turn in turns]
    for size, turn in sorted(zip(sizes, turns, strict=True), key=lambda row: -row[0]):
        least = tokens.index(min(tokens))
        groups[least].append(turn)
        tokens[least] += size
    return groups if max(tokens) * threads * _EFFICIENCY <= sum(tokens) else [list(turns)]


def _in_threads(work: Callable[[list[ClientTraining]], None], groups: Sequence[list[ClientTraining]]) -> None:
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


def _train(vlm: VisionLanguageModel, turns: Sequence[ClientTraining], budget: TokenBudget, adapters: Adapters) -> None:
    """Every client's turn from its first step to its last, step by step."""
    _measure(vlm, turns, budget, adapters)
    for position in range(max(len(turn.plan) for turn in turns)):
        active = [turn for turn in turns if position < len(turn.plan)]
        while (problem := _backward(vlm, active, position, budget, adapters)) is not None:
            _make_room(vlm, active, position, budget, problem)
        for turn in active:
            turn.update(position)


def _measure(vlm: VisionLanguageModel, turns: Sequence[ClientTraining], budget: TokenBudget, adapters: Adapters) -> None:
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


def _backward(
    vlm: VisionLanguageModel, turns: Sequence[ClientTraining], position: int, budget: TokenBudget, adapters: Adapters
) -> str | None:
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


def _make_room(vlm: VisionLanguageModel, turns: Sequence[ClientTraining], position: int, budget: TokenBudget, problem: str) -> None:
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

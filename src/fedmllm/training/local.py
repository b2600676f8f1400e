"""The only local training loop. Methods change it through a ``LocalRule``, which is data."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from fedmllm.errors import ModelError
from fedmllm.models.encoding import answer_nll, collate
from fedmllm.models.load import VisionLanguageModel
from fedmllm.models.lora import copies, read_weights, trainable, training_only, write_weights
from fedmllm.models.memory import TokenBudget, out_of_memory, release, rows_at_once
from fedmllm.models.parallel_adapters import parallel_adapters, stacked
from fedmllm.randomness import torch_randomness
from fedmllm.training.batches import batched, passes
from fedmllm.training.client import ClientTraining, LocalTask, Route
from fedmllm.training.per_sample import one_by_one, rows_apart, separable
from fedmllm.training.private import PrivateSteps, require_separable
from fedmllm.training.rules import LocalResult, LocalRule
from fedmllm.training.settings import TrainingConfig
from fedmllm.types import Weights


def train_locally(
    vlm: VisionLanguageModel,
    task: LocalTask,
    rule: LocalRule,
    config: TrainingConfig,
    budget: TokenBudget | None = None,
    private: PrivateSteps | None = None,
) -> LocalResult:
    """Train the adapters on one client's samples, starting from the weights it received, with a new AdamW optimizer.

    A step minimizes the accumulated mean negative log-likelihood of the answer tokens plus the rule's loss terms.

    Args:
        vlm: the model.
        task: the client's task.
        rule: how the method departs from plain training.
        config: the training settings.
        budget: the token budget of a pass, shared with earlier calls; None for a new one.
        private: how optimizer steps protect single samples; None if they do not. If the model is not ``separable``, samples then pass through
            it one by one.

    Returns:
        the client's weights after training, and its metrics.

    Raises:
        torch.OutOfMemoryError: if even a pass of one sample does not fit into memory.
        ConfigError: if the rule does not allow private steps. What ``private.spend`` raises passes through as well.
    """
    if private is not None:
        if separable(vlm):
            return train_in_parallel(vlm, [(task, rule)], config, budget, private)[0]
        require_separable(rule, task.samples)
    write_weights(vlm.model, _start(task, rule))
    with training_only(vlm.model, rule.trains), torch_randomness(vlm.device, task.seed, "dropout", task.round_num, task.client):
        training = ClientTraining(vlm, task, rule, config, dict(trainable(vlm.model)), private)
        route = Route(lambda trainings, counts: nullcontext()) if private is None else one_by_one(vlm, private.noise)
        with _training_mode(vlm):
            _train(vlm, [training], budget or TokenBudget(config.max_batch_tokens), route)
    return training.result(read_weights(vlm.model))


def train_in_parallel(
    vlm: VisionLanguageModel,
    tasks: Sequence[tuple[LocalTask, LocalRule]],
    config: TrainingConfig,
    budget: TokenBudget | None = None,
    private: PrivateSteps | None = None,
) -> list[LocalResult]:
    """Train several clients in parallel. Their samples share batches, and each sample goes through its own client's adapter.

    The arithmetic for each client is that of ``train_locally``, summed in another order: every client has its own data order, gradient,
    penalty, clipping and AdamW. A client with fewer steps than others finishes early. The model must not use dropout, because its random
    numbers would be shared. On a CPU the clients are divided among PyTorch's threads and each thread computes alone, because small
    matrix products gain little from a second thread.

    Args:
        vlm: the model.
        tasks: for each client, its task, and how the method departs from plain training.
        config: the training settings.
        budget: the token budget of a pass, shared with earlier calls; None for a new one.
        private: how optimizer steps protect single samples; None if they do not. The model must then be ``separable``.

    Returns:
        one result for each task, in the same order.

    Raises:
        torch.OutOfMemoryError: if even a pass of one sample does not fit into memory.
        ConfigError: if a rule does not allow private steps. What ``private.spend`` raises passes through as well.
        ModelError: if steps are private and the model is not separable.
    """
    if private is not None:
        _require_separable(vlm, tasks)
    own = dict(trainable(vlm.model))
    running = [ClientTraining(vlm, task, rule, config, _own_weights(own, task, rule), private) for task, rule in tasks]
    threads = min(torch.get_num_threads(), len(tasks)) if vlm.device.type == "cpu" else 1
    common = budget or TokenBudget(config.max_batch_tokens)
    with _training_mode(vlm), parallel_adapters(vlm.model) as layers:
        route = _shared(layers) if private is None else rows_apart(layers, rows_at_once(vlm, threads))
        _in_threads(lambda group: _train(vlm, group, common, route), _shared_out(running, threads))
    return [
        training.result({name: tensor.detach().to("cpu", torch.float32) for name, tensor in training.weights.items()})
        for training in running
    ]


def _require_separable(vlm: VisionLanguageModel, tasks: Sequence[tuple[LocalTask, LocalRule]]) -> None:
    """Require that the rows of a pass do not affect each other, before anything is spent."""
    if not separable(vlm):
        raise ModelError(
            "private steps of parallel clients need a model without dropout in which only the decoder's LoRA factors train; train the clients "
            "one after another"
        )
    for task, rule in tasks:
        require_separable(rule, task.samples)


def _shared(layers: Mapping[str, Any]) -> Route:
    """Return a route in which a client's rows share its adapters."""
    return Route(lambda trainings, counts: stacked(layers, [training.weights for training in trainings], counts))


@contextmanager
def _training_mode(vlm: VisionLanguageModel) -> Iterator[None]:
    """Put the model in training mode, and restore evaluation mode without gradients on exit, even if a client fails."""
    vlm.model.train()
    try:
        yield
    finally:
        vlm.model.eval()
        vlm.model.zero_grad(set_to_none=True)


def _own_weights(own: Weights, task: LocalTask, rule: LocalRule) -> Weights:
    """Return copies of a client's initial weights. Those that train require gradients."""
    weights = copies(own, _start(task, rule))
    return {name: tensor.requires_grad_(rule.trains is None or rule.trains(name)) for name, tensor in weights.items()}


_EFFICIENCY = 0.75
"""Parallel efficiency of threads that share each product: measured 0.68 with 4 samples per pass and 0.9 with 16, on 2 cores."""


def _shared_out(trainings: Sequence[ClientTraining], threads: int) -> list[list[ClientTraining]]:
    """Divide clients among threads: longest first, each to the thread with the least work. Return a single group if that is faster.

    A single group uses all threads at ``_EFFICIENCY`` of their combined speed. Several groups take as long as the largest one.
    """
    groups: list[list[ClientTraining]] = [[] for _ in range(threads)]
    tokens = [0] * threads
    sizes = [sum(len(sample.input_ids) for step in training.plan for sample in step.samples) for training in trainings]
    for size, training in sorted(zip(sizes, trainings, strict=True), key=lambda row: -row[0]):
        least = tokens.index(min(tokens))
        groups[least].append(training)
        tokens[least] += size
    return groups if max(tokens) * threads * _EFFICIENCY <= sum(tokens) else [list(trainings)]


def _in_threads(work: Callable[[list[ClientTraining]], None], groups: Sequence[list[ClientTraining]]) -> None:
    """Run each group in its own thread, with PyTorch limited to one thread per group."""
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


def _train(vlm: VisionLanguageModel, trainings: Sequence[ClientTraining], budget: TokenBudget, route: Route) -> None:
    """Train all clients in lockstep, from the first step to the last."""
    _measure(vlm, trainings, budget, route)
    for position in range(max(len(training.plan) for training in trainings)):
        active = [training for training in trainings if position < len(training.plan)]
        while (problem := _backward(vlm, active, position, budget, route)) is not None:
            _make_room(vlm, active, position, budget, route, problem)
        for training in active:
            training.update(position)


def _measure(vlm: VisionLanguageModel, trainings: Sequence[ClientTraining], budget: TokenBudget, route: Route) -> None:
    """Measure the token budget with a pass of the longest sample, and discard its gradients."""
    training, longest = max(
        ((training, training.longest) for training in trainings), key=lambda pair: len(pair[1].input_ids) if pair[1] else 0
    )
    if longest is None:
        return

    def work() -> None:
        with route.adapters([training], [1]):
            with vlm.autocast():
                loss = answer_nll(vlm, collate(vlm, [longest])).sum()
            loss.backward()  # type: ignore[no-untyped-call]

    with torch_randomness(vlm.device, 0, "memory"):
        budget.measure(vlm.device, len(longest.input_ids), work)
    training.forget()


def _backward(
    vlm: VisionLanguageModel, trainings: Sequence[ClientTraining], position: int, budget: TokenBudget, route: Route
) -> str | None:
    """Compute the gradients of one step for each client.

    Returns:
        None, or the allocator's message if a pass did not fit into memory. Returning the exception would keep that pass's tensors alive.
    """
    losses: list[tuple[list[int], Tensor]] = []
    max_tokens = budget.tokens or 1
    try:
        for batch, weights, owners in passes(vlm, [training.plan[position] for training in trainings], max_tokens, route.max_rows):
            present = sorted(set(owners))
            with route.adapters([trainings[k] for k in present], [owners.count(k) for k in present]):
                with vlm.autocast():
                    loss = (answer_nll(vlm, batch) * weights).sum(1)
                loss.sum().backward()  # type: ignore[no-untyped-call]
            losses.append((owners, loss.detach()))
        for training in trainings:
            training.add_terms(position, max_tokens, route.adapters)
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        return str(error).split("\n")[0]
    for owners, loss in losses:
        for k, value in zip(owners, loss.tolist(), strict=True):
            trainings[k].loss += value
    return None


def _make_room(
    vlm: VisionLanguageModel, trainings: Sequence[ClientTraining], position: int, budget: TokenBudget, route: Route, problem: str
) -> None:
    """Discard a step's gradients and halve the token budget.

    Raises:
        torch.OutOfMemoryError: if the largest pass already has a single sample.
    """
    samples = [sample for training in trainings for sample in training.plan[position].samples]
    groups = [[len(samples[i].input_ids) for i in group] for group in batched(vlm, samples, budget.tokens or 1, route.max_rows)]
    largest = max(groups, key=lambda group: len(group) * max(group))
    tokens = len(largest) * max(largest)
    for training in trainings:
        training.forget()
        training.halvings += 1
    release(vlm.device)
    if len(largest) == 1:
        raise torch.OutOfMemoryError(f"a pass of one sample with {tokens} tokens does not fit into memory: {problem}")
    budget.halve(tokens, problem)

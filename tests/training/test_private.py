"""Private steps: exact gradients of single samples, clipping, draws, noise, and what they refuse. References are plain autograd and AdamW."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import kstest
from torch import Tensor

from fedmllm import factors
from fedmllm import weights as W
from fedmllm.algorithms.fedprox import Proximal
from fedmllm.algorithms.strategies.feature_alignment import Alignment
from fedmllm.algorithms.strategies.label_calibration import Calibration
from fedmllm.data.federated import FederatedData
from fedmllm.data.prompts import to_messages, wording
from fedmllm.errors import ConfigError, ModelError, RunError
from fedmllm.models import memory
from fedmllm.models.encoding import Encoded, answer_nll, collate, encode
from fedmllm.models.load import VisionLanguageModel
from fedmllm.models.lora import attach_lora, read_weights, trainable, write_weights
from fedmllm.models.parts import LoraConfig
from fedmllm.privacy.noise import Noise
from fedmllm.training.batches import Encoder
from fedmllm.training.client import LocalTask
from fedmllm.training.local import train_in_parallel, train_locally
from fedmllm.training.per_sample import separable
from fedmllm.training.private import PrivateGradient, PrivateSteps, Sampling, clipped_sum, sampling
from fedmllm.training.rules import LocalResult, LocalRule
from fedmllm.training.settings import TrainingConfig
from fedmllm.training.terms import LossTerm
from fedmllm.types import Sample, Weights
from private_steps import Scripted, steps_with
from tiny_families import WITH_REMOTE, load, stirred

CONFIG = TrainingConfig(batch_size=2)
PLAIN = LocalRule()
DRAWS = ([0, 1, 2, 3, 4], [], [1, 3])


ANSWERS = ["yes", "no, 4", "12", "yes, 12 of 14", "no"]


def encoded(vlm: VisionLanguageModel, federation: FederatedData) -> list[Encoded]:
    """Samples with prompts and answers of unequal lengths: text, image, and both."""
    client = max(federation.clients.values(), key=len)
    return [encode(vlm, to_messages(sample, wording("agnostic")), answer) for sample, answer in zip(client, ANSWERS, strict=False)]


def task_of(vlm: VisionLanguageModel, samples: Sequence[Encoded], client: str = "client-00", rate: float = 0.0) -> LocalTask:
    """With a rate of 0, the weights stay where the reference gradients are taken."""
    return LocalTask(client, 3, 0, samples, read_weights(vlm.model), rate)


def alone(vlm: VisionLanguageModel, weights: Weights, sample: Encoded) -> Weights:
    """The gradient of one sample's mean loss, by plain autograd through the model's own adapters."""
    write_weights(vlm.model, weights)
    vlm.model.train()
    parameters = dict(trainable(vlm.model))
    loss = answer_nll(vlm, collate(vlm, [sample])).sum() / sample.answer_length
    gradients = torch.autograd.grad(loss, list(parameters.values()), materialize_grads=True)
    vlm.model.eval()
    return {name: gradient.double() for name, gradient in zip(parameters, gradients, strict=True)}


def summed(gradients: Sequence[Weights], clip_norm: float) -> Weights:
    """``sum_i min(1, C / ||g_i||) g_i``; zero for no gradients is the caller's matter."""
    scales = [min(1.0, clip_norm / W.norm(gradient)) for gradient in gradients]
    return {name: sum(s * g[name] for s, g in zip(scales, gradients, strict=True)) for name in gradients[0]}  # type: ignore[misc]


def apart(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
    """The distance of two gradients relative to the second."""
    return W.norm(W.subtract(dict(a), dict(b))) / W.norm(dict(b))


def median_norm(gradients: Sequence[Weights]) -> float:
    return sorted(W.norm(gradient) for gradient in gradients)[len(gradients) // 2]


def check_sums(vlm: VisionLanguageModel, samples: Sequence[Encoded], parallel: bool = False) -> None:
    """Steps that draw all samples, none, and two. Some samples are clipped and some are not."""
    task = task_of(vlm, samples)
    gradients = [alone(vlm, task.received, sample) for sample in samples]
    clip, noise = median_norm(gradients), Scripted(DRAWS)
    private = steps_with(noise, clip)
    if parallel:
        train_in_parallel(vlm, [(task, PLAIN)], CONFIG, None, private)
    else:
        train_locally(vlm, task, PLAIN, CONFIG, None, private)
    assert len(noise.sums) == 3
    assert apart(noise.sums[0], summed(gradients, clip)) < 1e-5
    assert not any(total.any() for total in noise.sums[1].values())
    assert apart(noise.sums[2], summed([gradients[1], gradients[3]], clip)) < 1e-5
    assert apart(noise.sums[2], summed([gradients[1], gradients[2]], clip)) > 1e-2


@pytest.mark.parametrize("kind", WITH_REMOTE)
def test_gradients_of_rows_equal_those_computed_one_by_one(kind: str, federation: FederatedData) -> None:
    vlm = stirred(attach_lora(load(kind), LoraConfig(), 0))
    samples = encoded(vlm, federation)
    assert separable(vlm)
    assert len({len(sample.input_ids) for sample in samples}) > 1
    assert len({sample.answer_length for sample in samples}) > 1
    check_sums(vlm, samples)


@pytest.mark.parametrize("settings", [{"connector": "lora"}, {"dora": True}, {"connector": "full"}, {"dropout": 1e-12}])
def test_a_model_whose_rows_cannot_be_told_apart_is_exact_one_sample_at_a_time(settings: dict[str, Any], federation: FederatedData) -> None:
    vlm = stirred(attach_lora(load("llava"), LoraConfig(**settings), 0))
    samples = encoded(vlm, federation)
    check_sums(vlm, samples)
    with pytest.raises(ModelError, match="train the clients one after another"):
        check_sums(vlm, samples, parallel=True)


@pytest.fixture
def samples(vlm: VisionLanguageModel, federation: FederatedData) -> list[Encoded]:
    return encoded(stirred(vlm), federation)


@pytest.fixture
def exact(vlm: VisionLanguageModel) -> VisionLanguageModel:
    """The model in float64. AdamW divides by the gradient's size, so rounding noise in a tiny gradient makes a full step."""
    vlm.model.double()
    return vlm


def test_parallel_clients_get_the_gradients_of_their_own_rows(vlm: VisionLanguageModel, samples: list[Encoded]) -> None:
    """Clients with other weights, other numbers of drawn samples and of steps; the second trains factors B only."""
    first = task_of(vlm, samples[:4])
    other = {name: tensor * 1.5 for name, tensor in first.received.items()}
    second = replace(first, client="b", samples=samples[2:], received=other)
    third = replace(first, client="c", samples=samples[:1])
    rule = LocalRule(trains=lambda name: "lora_B" in name)
    drawn = [[0, 1, 3], [2], [0, 2], [1], [0]]
    noise = Scripted(drawn)
    clip = median_norm([alone(vlm, first.received, sample) for sample in samples])
    train_in_parallel(vlm, [(first, PLAIN), (second, rule), (third, PLAIN)], CONFIG, None, steps_with(noise, clip))
    # In lockstep: the first steps of all clients, then the second ones. The third client has one step only.
    for total, (task, positions) in zip(
        noise.sums, [(first, drawn[0]), (second, drawn[2]), (third, drawn[4]), (first, drawn[1]), (second, drawn[3])], strict=True
    ):
        gradients = [alone(vlm, task.received, task.samples[i]) for i in positions]
        if task is second:
            gradients = [{name: tensor for name, tensor in gradient.items() if "lora_B" in name} for gradient in gradients]
        assert total.keys() == gradients[0].keys()
        assert apart(total, summed(gradients, clip)) < 1e-5


def test_few_rows_fit_into_memory_at_once(vlm: VisionLanguageModel, samples: list[Encoded], monkeypatch: pytest.MonkeyPatch) -> None:
    """A row needs memory for a copy of the adapters and for its gradient."""
    task, sizes = task_of(vlm, samples), list[int]()
    whole = Scripted([[0, 1, 2, 3, 4]])
    train_locally(vlm, task, PLAIN, TrainingConfig(batch_size=5), None, steps_with(whole))
    monkeypatch.setattr(memory, "CPU_ROWS_BYTES", 2 * 2 * 4 * sum(tensor.numel() for tensor in task.received.values()))

    def passed(vlm: VisionLanguageModel, batch: Any) -> Tensor:
        sizes.append(len(batch.answer_mask))
        return answer_nll(vlm, batch)

    monkeypatch.setattr("fedmllm.training.local.answer_nll", passed)
    parts = Scripted([[0, 1, 2, 3, 4]])
    train_locally(vlm, task, PLAIN, TrainingConfig(batch_size=5), None, steps_with(parts))
    assert max(sizes) == 2
    assert sum(sizes) == 5
    assert apart(parts.sums[0], whole.sums[0]) < 1e-5


def plain_loop(
    vlm: VisionLanguageModel, task: LocalTask, steps: Sequence[Sequence[int]], clip_norm: float, divisors: Sequence[float]
) -> Weights:
    """An independent loop: Transformers' loss of one sample at a time, and PyTorch's AdamW on the clipped sum divided by a number."""
    write_weights(vlm.model, task.received)
    parameters = [p for p in vlm.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=task.learning_rate, betas=(CONFIG.beta1, CONFIG.beta2), weight_decay=0.1)
    for drawn, divisor in zip(steps, divisors, strict=True):
        totals = [torch.zeros_like(parameter) for parameter in parameters]
        for i in drawn:
            batch = collate(vlm, [task.samples[i]])
            labels = torch.full_like(batch.inputs["input_ids"], -100)
            labels[0, -task.samples[i].answer_length :] = task.samples[i].answer_ids
            gradients = torch.autograd.grad(vlm.model(**batch.inputs, labels=labels).loss, parameters)
            norm = math.sqrt(sum(float(gradient.square().sum()) for gradient in gradients))
            for total, gradient in zip(totals, gradients, strict=True):
                total += min(1.0, clip_norm / norm) * gradient
        for parameter, total in zip(parameters, totals, strict=True):
            parameter.grad = total / divisor
        optimizer.step()
    return read_weights(vlm.model)


def relative_distance(a: Weights, b: Weights, start: Weights) -> float:
    return W.norm(W.subtract(a, b)) / W.norm(W.subtract(a, start))


def test_full_batches_without_clipping_equal_adamw_on_the_mean_of_the_samples_means(
    exact: VisionLanguageModel, samples: list[Encoded]
) -> None:
    """With real noise that is too small to matter. The ordinary step on the mean over all tokens differs."""
    task = task_of(exact, samples, rate=1e-3)
    config = TrainingConfig(batch_size=8, local_epochs=4, weight_decay=0.1, clip_norm=None)
    ours = train_locally(exact, task, PLAIN, config, None, steps_with(Noise(1), 1e6, 1e-18)).weights
    theirs = plain_loop(exact, task, [range(5)] * 4, math.inf, [5] * 4)
    assert relative_distance(ours, theirs, task.received) < 1e-3
    coupled = train_locally(exact, task, PLAIN, config).weights
    assert relative_distance(ours, coupled, task.received) > 0.01


def test_sums_are_divided_by_the_expected_batch(exact: VisionLanguageModel, samples: list[Encoded]) -> None:
    """Not by the number of samples drawn, which is secret. AdamW cancels a common factor, so the draws differ in size."""
    task = task_of(exact, samples, rate=1e-3)
    draws = [[0, 1, 2, 3, 4], [1], [2, 3]]
    config = TrainingConfig(batch_size=1, accumulation=2, weight_decay=0.1)
    ours = train_locally(exact, task, PLAIN, config, None, steps_with(Scripted(draws), 0.5)).weights
    expected = plain_loop(exact, task, draws, 0.5, [2, 2, 2])
    drawn = plain_loop(exact, task, draws, 0.5, [5, 1, 2])
    assert relative_distance(ours, expected, task.received) < 1e-3
    assert relative_distance(ours, drawn, task.received) > 0.05


def matrices(rows: int, scale: float, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: scale * torch.randn(rows, *shape, generator=generator) for name, shape in (("a", (3, 4)), ("b", (5,)))}


@given(st.integers(2, 6), st.sampled_from([1e-6, 0.1, 1.0, 1e6, 1e30]), st.floats(1e-3, 1e3), st.integers(0, 99))
def test_one_row_changes_the_clipped_sum_by_at_most_the_clip_norm(rows: int, scale: float, clip_norm: float, seed: int) -> None:
    gradients = matrices(rows, scale, seed)
    whole = clipped_sum(gradients, clip_norm)
    without = clipped_sum({name: tensor[1:] for name, tensor in gradients.items()}, clip_norm)
    first = {name: tensor[0].double() for name, tensor in gradients.items()}
    change = W.norm(W.subtract(whole, without))
    assert change <= clip_norm * (1 + 1e-9)
    assert change == pytest.approx(min(clip_norm, W.norm(first)), rel=1e-6)


def test_clipping_is_per_sample_and_joint() -> None:
    """Norms of 3 and 4 in two tensors make 5. Clipped tensor by tensor they would make sqrt(2); clipped as a batch, both rows would shrink."""
    gradients = {"a": torch.tensor([[3.0, 0.0], [0.1, 0.0]]), "b": torch.tensor([[0.0, 4.0], [0.0, 0.2]])}
    found = clipped_sum(gradients, 1.0)
    assert found["a"].tolist() == pytest.approx([0.6 + 0.1, 0.0])
    assert found["b"].tolist() == pytest.approx([0.0, 0.8 + 0.2])
    assert all(tensor.dtype == torch.float64 for tensor in found.values())


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_counts_as_zero(bad: float) -> None:
    """Otherwise one sample could turn the whole release into NaN."""
    gradients = matrices(3, 1.0, 0)
    others = clipped_sum({name: tensor[[0, 2]] for name, tensor in gradients.items()}, 0.5)
    gradients["b"][1, 2] = bad
    found = clipped_sum(gradients, 0.5)
    assert all(torch.equal(found[name], tensor) for name, tensor in others.items())
    zero = clipped_sum({name: torch.zeros_like(tensor) for name, tensor in gradients.items()}, 0.5)
    assert not any(tensor.any() for tensor in zero.values())


def test_one_sample_more_changes_the_sum_of_a_step_by_at_most_the_clip_norm(vlm: VisionLanguageModel, samples: list[Encoded]) -> None:
    """In the loop: the other samples' rows move to other passes."""
    task, clip = task_of(vlm, samples), 1e-2
    noise = Scripted([[0, 1, 2, 3, 4], [0, 1, 3, 4], [1]])
    train_locally(vlm, task, PLAIN, CONFIG, None, steps_with(noise, clip))
    change = W.norm(W.subtract(noise.sums[0], noise.sums[1]))
    assert change == pytest.approx(clip, rel=1e-5)
    assert W.norm(noise.sums[2]) == pytest.approx(clip, rel=1e-9)


def test_noise_has_the_stated_deviation() -> None:
    """``z C / B`` on every entry, also of tensors without a gradient, and new in every step. The next step starts from zero."""
    gradient = PrivateGradient(steps_with(Noise(7), 0.5, 3.0), 4, {"a": torch.zeros(300, 200), "b": torch.zeros(40_000)})
    gradient.add({"a": torch.ones(2, 300, 200)})
    first, second = gradient.release(), gradient.release()
    mean = 2 * 0.5 / math.sqrt(60_000) / 4
    found = torch.cat([first["a"].flatten() - mean, first["b"]]) / (3.0 * 0.5 / 4)
    assert float(found.var()) == pytest.approx(1, abs=0.018)
    assert kstest(found.numpy(), "norm").pvalue > 0.01
    assert kstest((second["a"].flatten() / (3.0 * 0.5 / 4)).numpy(), "norm").pvalue > 0.01
    assert abs(float(torch.corrcoef(torch.stack([first["b"], second["b"]]))[0, 1])) < 0.02


def test_the_deviation_in_the_loop_does_not_depend_on_the_draw(vlm: VisionLanguageModel, samples: list[Encoded]) -> None:
    noise = Scripted(DRAWS)
    train_locally(vlm, task_of(vlm, samples), PLAIN, CONFIG, None, steps_with(noise, 0.5, 3.0))
    assert noise.deviations == [1.5] * 3


def test_an_empty_draw_is_a_step_with_noise_alone(vlm: VisionLanguageModel, samples: list[Encoded]) -> None:
    task = task_of(vlm, samples, rate=1e-3)
    still = train_locally(vlm, task, PLAIN, CONFIG, None, steps_with(Scripted([[], [], []])))
    assert still.metrics == {"steps": 3.0}
    assert all(torch.equal(still.weights[name], tensor) for name, tensor in task.received.items())
    # The first 25 draws of this source are greater than the rate, 1/5.
    seed = next(seed for seed in range(2000) if (Noise(seed).uniform(25) > 0.2).all())
    moved = train_locally(vlm, task, PLAIN, TrainingConfig(batch_size=1), None, steps_with(Noise(seed)))
    assert all((moved.weights[name] != tensor).float().mean() > 0.99 for name, tensor in task.received.items())
    assert moved.metrics == {"steps": 5.0}


def test_noise_does_not_fill_the_ranks_that_a_client_lacks(vlm: VisionLanguageModel, samples: list[Encoded]) -> None:
    task = task_of(vlm, samples, rate=1e-3)
    received = factors.padded(factors.cut(task.received, 3), task.received)
    found = trained(vlm, replace(task, received=received, rank=3), Noise(1)).weights
    assert not any(tensor.any() for tensor in factors.beyond(found, 3).values())
    assert all(not torch.equal(tensor, received[name]) for name, tensor in found.items())
    assert any(tensor.any() for tensor in factors.beyond(trained(vlm, replace(task, received=received), Noise(1)).weights, 3).values())


def trained(vlm: VisionLanguageModel, task: LocalTask, noise: Noise, config: TrainingConfig = CONFIG) -> LocalResult:
    return train_locally(vlm, task, PLAIN, config, None, steps_with(noise))


def same(a: LocalResult, b: LocalResult) -> bool:
    return all(torch.equal(a.weights[name], tensor) for name, tensor in b.weights.items())


def test_draws_and_noise_do_not_derive_from_the_experiments_seed(vlm: VisionLanguageModel, samples: list[Encoded]) -> None:
    task = task_of(vlm, samples, rate=1e-3)
    first = trained(vlm, task, Noise(1))
    assert same(trained(vlm, task, Noise(1)), first)
    assert same(trained(vlm, replace(task, seed=1, round_num=4, client="b"), Noise(1)), first)
    assert not same(trained(vlm, task, Noise(2)), first)
    assert not same(trained(vlm, task, Noise()), trained(vlm, task, Noise()))


def test_the_ordinary_clip_norm_does_not_apply(vlm: VisionLanguageModel, samples: list[Encoded]) -> None:
    """It would make the step's size depend on a gradient's norm twice. Without privacy it has an effect."""
    task = task_of(vlm, samples, rate=1e-3)
    tight = TrainingConfig(batch_size=2, clip_norm=1e-9)
    assert same(trained(vlm, task, Noise(1), tight), trained(vlm, task, Noise(1)))
    assert not same(train_locally(vlm, task, PLAIN, tight), train_locally(vlm, task, PLAIN, CONFIG))


def test_nothing_but_the_number_of_steps_is_reported(vlm: VisionLanguageModel, samples: list[Encoded]) -> None:
    task = task_of(vlm, samples, rate=1e-3)
    result = trained(vlm, task, Noise(1), TrainingConfig(batch_size=2, local_epochs=2))
    assert (result.metrics, result.gradient) == ({"steps": 6.0}, {})


def test_penalties_are_added_after_the_noise_and_are_not_clipped(vlm: VisionLanguageModel, samples: list[Encoded]) -> None:
    """Empty draws from a start at a distance of 1 in every entry leave the penalty's gradient alone: mu."""
    task = task_of(vlm, samples)
    start = {name: tensor + 1 for name, tensor in task.received.items()}
    seen: list[Tensor] = []

    def look(name: str, gradient: Tensor) -> Tensor:
        seen.append(gradient.clone())
        return gradient

    rule = LocalRule(terms=(Proximal(0.25),), start=start, edit_gradient=look)
    train_locally(vlm, task, rule, TrainingConfig(batch_size=5), None, steps_with(Scripted([[]]), 1e-6))
    assert len(seen) == len(start)
    for gradient in seen:
        torch.testing.assert_close(gradient, torch.full_like(gradient, 0.25), atol=1e-5, rtol=0)
    noise = Noise(1)
    seen.clear()
    train_locally(vlm, task, rule, TrainingConfig(batch_size=5), None, PrivateSteps(1e-6, 1e9, noise, lambda *_: None))
    found = torch.cat([gradient.flatten() for gradient in seen]) - 0.25
    assert float(found.std()) == pytest.approx(1e-6 * 1e9 / 5, rel=0.05)


@dataclass(frozen=True)
class Rewrites(LossTerm):
    """A term that could make samples depend on each other."""

    def prepare(self, vlm: VisionLanguageModel, encoder: Encoder, samples: Sequence[Sample], encoded: list[Encoded]) -> list[Encoded]:
        return encoded


def test_rules_that_use_samples_in_other_ways_are_refused_before_anything_is_spent(
    vlm: VisionLanguageModel, samples: list[Encoded], federation: FederatedData
) -> None:
    spent: list[Any] = []
    private = steps_with(Noise(1), spend=lambda *row: spent.append(row))
    task = task_of(vlm, samples)
    raw = max(federation.clients.values(), key=len)[:5]
    encoder = Encoder(vlm, "agnostic")
    calibrated = replace(task, samples=Calibration(1.0).prepare(vlm, encoder, raw, list(samples)))
    aligned = replace(task, samples=Alignment(1.0).prepare(vlm, encoder, raw, list(samples)))
    for case, rule, why in (
        (task, LocalRule(records_gradient=True), "records gradients before clipping"),
        (task, LocalRule(terms=(Alignment(1.0),)), "the loss term alignment"),
        (task, LocalRule(added=(Calibration(1.0),)), "the loss term Calibration"),
        (task, LocalRule(terms=(Rewrites(),)), "the loss term Rewrites"),
        (calibrated, PLAIN, "a loss term prepared them"),
        (aligned, PLAIN, "a loss term prepared them"),
    ):
        with pytest.raises(ConfigError, match=f"privacy.unit: sample .*{why}.*; use fedavg or ffa_lora without it"):
            train_locally(vlm, case, rule, CONFIG, None, private)
        with pytest.raises(ConfigError, match=why):
            train_in_parallel(vlm, [(task, PLAIN), (case, rule)], CONFIG, None, private)
    assert not spent


def test_the_expense_is_recorded_once_for_each_client_before_anything_is_drawn(vlm: VisionLanguageModel, samples: list[Encoded]) -> None:
    events: list[Any] = []

    class Drawing(Scripted):
        def uniform(self, count: int) -> Any:
            events.append("draw")
            return super().uniform(count)

    private = steps_with(Drawing(), spend=lambda *row: events.append(row))
    config = TrainingConfig(batch_size=1, accumulation=2, local_epochs=2)
    task = task_of(vlm, samples)
    none, few = replace(task, client="none", samples=()), replace(task, client="few", samples=samples[:1])
    results = train_in_parallel(vlm, [(task, PLAIN), (none, PLAIN), (few, PLAIN)], config, None, private)
    assert events == [("client-00", 6, 0.4), *["draw"] * 6, ("few", 2, 1.0), *["draw"] * 2]
    assert [result.metrics for result in results] == [{"steps": 6.0}, {"steps": 0.0}, {"steps": 2.0}]
    events.clear()
    train_locally(vlm, task, PLAIN, TrainingConfig(local_epochs=0), None, private)
    assert events == []


def test_a_refused_expense_stops_the_training(vlm: VisionLanguageModel, samples: list[Encoded]) -> None:
    def refuse(client: str, steps: int, rate: float) -> None:
        raise RunError(f"{client} has spent its budget")

    noise = Scripted()
    with pytest.raises(RunError, match="client-00 has spent its budget"):
        train_locally(vlm, task_of(vlm, samples), PLAIN, CONFIG, None, steps_with(noise, spend=refuse))
    assert not noise.sums


def test_dropout_of_a_sample_does_not_depend_on_the_samples_before_it(federation: FederatedData) -> None:
    """Each sample gets its own secret seed; here they are all the same."""
    vlm = stirred(attach_lora(load("llava"), LoraConfig(dropout=0.3), 0))
    samples, noise = encoded(vlm, federation), Scripted([[1], [0, 1], [0]])
    train_locally(vlm, task_of(vlm, samples), PLAIN, CONFIG, None, steps_with(noise, 1e6))
    assert apart(noise.sums[1], {name: noise.sums[0][name] + noise.sums[2][name] for name in noise.sums[0]}) < 1e-6
    plain = attach_lora(load("llava"), LoraConfig(), 0)
    write_weights(plain.model, read_weights(vlm.model))
    assert apart(noise.sums[0], alone(plain, read_weights(plain.model), samples[1])) > 0.1


def test_dropout_is_secret_and_new_in_every_step(federation: FederatedData) -> None:
    vlm = stirred(attach_lora(load("llava"), LoraConfig(dropout=0.3), 0))
    samples, noise = encoded(vlm, federation), Scripted([[1], [1], []], after=Noise(1))
    train_locally(vlm, task_of(vlm, samples), PLAIN, CONFIG, None, steps_with(noise, 1e6))
    assert apart(noise.sums[0], noise.sums[1]) > 0.1


def test_two_threads_train_as_one(exact: VisionLanguageModel, samples: list[Encoded]) -> None:
    task = task_of(exact, samples, rate=1e-3)
    tasks = [(replace(task, client=name), PLAIN) for name in "abcd"]
    config = TrainingConfig(batch_size=5, local_epochs=2)
    private = steps_with(Noise(1), 0.1, 1e-18)
    one = train_in_parallel(exact, tasks, config, None, private)
    torch.set_num_threads(2)
    try:
        two = train_in_parallel(exact, tasks, config, None, private)
    finally:
        torch.set_num_threads(1)
    for a, b in zip(one, two, strict=True):
        assert relative_distance(a.weights, b.weights, task.received) < 1e-3


@pytest.mark.parametrize(
    ("name", "value"), [("clip_norm", 0.0), ("clip_norm", math.inf), ("noise_multiplier", -1.0), ("noise_multiplier", math.nan)]
)
def test_values_out_of_range_are_refused(name: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"{name} of private steps must be greater than 0 and finite"):
        PrivateSteps(**{"clip_norm": 1.0, "noise_multiplier": 1.0, name: value}, noise=Scripted(), spend=lambda *_: None)


@given(st.integers(1, 500), st.integers(1, 9), st.integers(1, 5), st.integers(1, 4))
def test_an_epoch_draws_about_as_many_samples_as_the_client_has(count: int, batch: int, accumulation: int, epochs: int) -> None:
    found = sampling(count, TrainingConfig(batch_size=batch, accumulation=accumulation, local_epochs=epochs))
    assert found.batch == min(batch * accumulation, count)
    assert found.rate == found.batch / count <= 1
    assert count * epochs <= found.steps * found.batch < (count + found.batch) * epochs
    assert sampling(200, TrainingConfig(batch_size=8, local_epochs=14)) == Sampling(8, 0.04, 350)

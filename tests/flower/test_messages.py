"""Messages are read back as written, and anything else is refused by name, whatever it is."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from fedmllm.algorithms import AlgorithmConfig, build_algorithm
from fedmllm.engine.checkpoint import ClientStates
from fedmllm.engine.compression import CompressionConfig, compression
from fedmllm.engine.in_process import Assignment
from fedmllm.flower.facts import Presence, Scores, read_message, write_message
from fedmllm.flower.frozen import KeptBase, Missing
from fedmllm.flower.messages import Expected, expected, read_answer, read_task, write_answer, write_task
from fedmllm.packing import pack, unpack
from fedmllm.types import Broadcast, ClientFailure, ClientUpdate, Population

A, B, EMBEDDING = "layer.q_proj.lora_A.weight", "layer.q_proj.lora_B.weight", "embed.weight"
WEIGHTS = {A: torch.randn(4, 6), B: torch.randn(5, 4), EMBEDDING: torch.randn(3, 2)}
UPDATE = ClientUpdate("c1", WEIGHTS, 7, {"loss": 0.5}, {}, {"image": 3, "text": 4}, None, round_num=2)
KEPT = KeptBase(Path("unused"))
WANTED = Expected(WEIGHTS, ("update",), None)
POPULATION = Population(9, {"image": 30}, {'["no", "yes"]': {"no": 21, "yes": 9}})


def bits(tensor: torch.Tensor) -> list[int]:
    return tensor.contiguous().reshape(-1).view(torch.uint8).tolist()


def assignment(name: str = "fedavg", ranks: dict[str, int] | None = None) -> Assignment:
    method = build_algorithm(AlgorithmConfig(name=name))
    state = method.init(WEIGHTS, {"layer.q_proj": torch.randn(5, 6)})
    broadcast = method.broadcast(replace(state, round_num=2, population=POPULATION))
    return Assignment(broadcast, method, 1e-3, 11, ClientStates(Path("unused")), ranks or {}, accepted={"c1": [0, 1], "c2": [1]})


def answer_of(content: bytes, wanted: Expected = WANTED) -> ClientUpdate | ClientFailure:
    return read_answer(content, "c1", wanted)


def reason(content: bytes, wanted: Expected = WANTED) -> str:
    answer = answer_of(content, wanted)
    assert isinstance(answer, ClientFailure)
    assert answer.client == "c1"
    return answer.reason


def test_tensors_keep_their_bits_and_their_dtypes() -> None:
    groups = {
        "half": {"a/b": torch.tensor([1.5, float("nan")], dtype=torch.bfloat16)},
        "whole": {"x": torch.arange(6).reshape(2, 3).t(), "y": torch.tensor(-0.0)},
    }
    read, facts = unpack(pack(groups, {"round_num": 3, "names": ["ä"]}))
    assert facts == {"round_num": 3, "names": ["ä"]}
    for group, tensors in groups.items():
        for name, tensor in tensors.items():
            assert read[group][name].dtype == tensor.dtype
            assert bits(read[group][name]) == bits(tensor)


@pytest.mark.parametrize("name", ["fedavg", "scaffold", "ffa_lora", "fedsa_lora", "hetlora"])
def test_a_task_arrives_as_it_was_broadcast(name: str) -> None:
    asked = assignment(name)
    task = read_task(write_task(asked, "federated", "c1", {"settings": "seed: 0"}, Missing()))
    assert (task.facts.stage, task.facts.client, task.facts.round_num, task.facts.seed) == ("federated", "c1", 2, 11)
    assert (task.facts.about, task.facts.accepted) == ({"settings": "seed: 0"}, [0, 1])
    received = task.broadcast(asked.algorithm.broadcast(asked.algorithm.init(WEIGHTS, {})), KEPT)
    assert received.round_num == 2
    assert received.population == POPULATION
    assert all(torch.equal(received.weights[key], tensor) for key, tensor in asked.broadcast.weights.items())
    assert received.extras.keys() == asked.broadcast.extras.keys()


def test_a_task_leaves_out_constant_tensors_and_directions_beyond_the_rank() -> None:
    assert read_task(write_task(assignment("ffa_lora"), "s", "c1", {}, Missing())).weights.keys() == {B, EMBEDDING}
    task = read_task(write_task(assignment("hetlora", {"c1": 2}), "s", "c1", {}, Missing()))
    assert [tuple(task.weights[name].shape) for name in (A, B, EMBEDDING)] == [(2, 6), (5, 2), (3, 2)]
    received = task.broadcast(Broadcast(0, WEIGHTS), KEPT).weights[A]
    assert torch.equal(received[:2], WEIGHTS[A][:2])
    assert not received[2:].any()


def test_a_task_for_another_model_is_refused() -> None:
    task = read_task(write_task(assignment(), "s", "c1", {}, Missing()))
    with pytest.raises(ValueError, match=r"1 tensors that the client's model does not have, e\.g\. embed\.weight"):
        task.broadcast(Broadcast(0, {A: WEIGHTS[A], B: WEIGHTS[B]}), KEPT)


def test_an_answer_arrives_as_it_was_sent() -> None:
    read = answer_of(write_answer(UPDATE, 2))
    assert isinstance(read, ClientUpdate)
    assert all(torch.equal(read.update[name], tensor) for name, tensor in WEIGHTS.items())
    size = sum(tensor.nbytes for tensor in WEIGHTS.values())
    assert replace(read, update=WEIGHTS) == replace(UPDATE, num_bytes=size)


def test_a_failure_arrives_with_its_reason() -> None:
    assert reason(write_answer(ClientFailure("c1", "RuntimeError: " + "x" * 9999), 2)) == "RuntimeError: " + "x" * 1986


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (write_message(ClientFailure("c1", "no data")), "no data"),
        (
            write_message(Scores(client="c2", round_num=1, metric="auc", metrics={"score": 0.5})),
            "the message came from 'c2', expected 'c1'",
        ),
        (pack({}, {"client": "c1", "round_num": 1, "metric": "auc", "metrics": {"score": "0.5"}}), "the message cannot be read"),
        (b"\x80garbage", "the message cannot be read: not safetensors written by fedmllm"),
    ],
)
def test_an_invalid_message_is_a_failure(content: bytes, reason: str) -> None:
    received = read_message(content, "c1", Scores)
    assert isinstance(received, ClientFailure)
    assert received.client == "c1"
    assert received.reason.startswith(reason)


def test_a_message_arrives_as_it_was_sent() -> None:
    for message in (
        Scores(client="c1", round_num=3, metric="auc", metrics={"score": 0.25, "failures": 0.0}),
        Presence(client="c1", num_samples=4, profile={"image": 4}, rank=2, trial=True),
    ):
        assert read_message(write_message(message), "c1", type(message)) == message


def facts(**changes: Any) -> dict[str, Any]:
    return json.loads(json.dumps(unpack(write_answer(UPDATE, 2))[1] | changes))


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "not safetensors written by fedmllm"),
        (b"\x00" * 100, "not safetensors written by fedmllm"),
        (b"\x80\x04\x95\x10\x00\x00\x00\x00\x00\x00\x00\x8c\x02os\x94.", "not safetensors written by fedmllm"),
        (save({"update/a": torch.zeros(2)}), "not safetensors written by fedmllm"),
        (save({}, {"fedmllm": "[1]"}), "the facts must be a mapping, got list"),
        (save({}, {"fedmllm": "[" * 100_000}), "not safetensors written by fedmllm"),
        (pack({"update": WEIGHTS}, facts(client="c2")), "the answer came from 'c2', expected 'c1'"),
        (pack({"update": WEIGHTS}, facts(num_samples="7")), "1 invalid value(s), e.g. ('num_samples',)"),
        (pack({"update": WEIGHTS}, facts(num_samples=2**50)), "1 invalid value(s), e.g. ('num_samples',)"),
        (pack({"update": WEIGHTS}, facts(further=1)), "1 invalid value(s), e.g. ('further',)"),
        (pack({"update": WEIGHTS, "control": {A: torch.ones(1)}}, facts()), "the answer has unexpected tensors ['control']"),
        (pack({"update": {name: t.double() for name, t in WEIGHTS.items()}}, facts()), "is [torch.float64], expected [torch.float32]"),
        (write_answer(UPDATE, 2).replace(b'\\"loss\\": 0.5', b'\\"loss\\": NaN'), "1 invalid value(s), e.g. ('metrics', 'loss')"),
    ],
)
def test_an_invalid_answer_is_a_failure_with_its_reason(content: bytes, why: str) -> None:
    assert why in reason(content)


@settings(max_examples=150)
@given(st.data())
def test_a_damaged_answer_never_raises(data: st.DataObject) -> None:
    """A truncated or changed message gives an answer, possibly with other numbers, or a failure."""
    content = bytearray(write_answer(UPDATE, 2))
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    kept = data.draw(st.integers(0, len(content)) | st.just(len(content)))
    assert isinstance(answer_of(bytes(content[:kept])), (ClientUpdate, ClientFailure))


@pytest.mark.parametrize("name", ["bfloat16", "int8", "int4", "top_k"])
def test_compressed_updates_of_a_wrong_shape_are_failures(name: str) -> None:
    wanted = replace(WANTED, codec=compression(CompressionConfig(name=name))[0].codec)  # type: ignore[arg-type]
    few, more = ({key: torch.zeros(1, dtype=torch.int8) for key in WEIGHTS} for _ in range(2))
    for groups in ({"update.0": few, "update.1": more}, {"update.0": few}, {"update.0": {"other": torch.zeros(1)}}):
        assert "cannot be read" in reason(pack(groups, facts()), wanted)
    far = {"update.0": {A: torch.tensor([10**6], dtype=torch.int32)}, "update.1": {A: torch.ones(1).bfloat16()}}
    assert "cannot be read" in reason(pack(far, facts()), wanted)


def test_the_expected_tensors_have_the_clients_rank() -> None:
    wanted = expected(assignment("scaffold"), "c1")
    assert (wanted.tensors.keys(), wanted.kinds) == (WEIGHTS.keys(), ("update", "control"))
    cut = expected(assignment("hetlora", {"c1": 2}), "c1")
    assert [tuple(tensor.shape) for tensor in cut.tensors.values()] == [(2, 6), (5, 2), (3, 2)]

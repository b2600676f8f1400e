from __future__ import annotations

from fedmllm.data.labels import answer_counts
from fedmllm.types import Sample


def sample(name: str, answer: str, *options: str) -> Sample:
    return Sample(name, "which?", answer, {"text": "some"}, options)


def test_answers_are_counted_by_option_set_in_any_order() -> None:
    held = [sample("a", "yes", "yes", "no"), sample("b", "yes", "no", "yes"), sample("c", "no", "yes", "no"), sample("d", "x", "y", "x")]
    assert answer_counts(held) == {'["no", "yes"]': {"no": 1, "yes": 2}, '["x", "y"]': {"x": 1}}


def test_free_answers_are_not_counted() -> None:
    assert answer_counts([sample("a", "seven")]) == {}

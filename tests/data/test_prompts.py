from __future__ import annotations

from dataclasses import replace

import pytest

from fedmllm.data.datasets import crisismmd, emojitwo, hateful_memes, nlvr
from fedmllm.data.datasets.digits import claims
from fedmllm.data.prompts import SPECIFIC_QUESTIONS, PromptStyle, target, to_messages
from fedmllm.errors import DataError
from fedmllm.types import Sample

COMPLETE = Sample("s", "Is it misleading?", "yes", {"image": "x.png", "text": "a nurse says 4"}, options=("no", "yes"))
VARIANTS = [COMPLETE, replace(COMPLETE, content={"image": "x.png"}), replace(COMPLETE, content={"text": "a nurse says 4"})]


def wording(sample: Sample, style: PromptStyle) -> str:
    return str(to_messages(sample, style)[0].parts[-1].value)


def test_a_sample_before_and_after() -> None:
    (message,) = to_messages(COMPLETE, "specific")
    assert [part.type for part in message.parts] == ["image", "text"]
    assert message.parts[0].value == "x.png"
    assert message.parts[1].value == (
        "Answer based on the text and image.\na nurse says 4\nQuestion: Is the text about the image misleading?\nOptions: A. no B. yes\nAnswer with the letter."
    )
    assert target(COMPLETE) == "B"


def test_agnostic_wording_is_the_same_whatever_is_held() -> None:
    rest = {wording(sample, "agnostic").replace("\na nurse says 4", "") for sample in VARIANTS}
    assert len(rest) == 1
    text = rest.pop()
    assert "image" not in text
    assert "text" not in text


def test_specific_wording_names_what_is_held() -> None:
    heads = [wording(sample, "specific").splitlines()[0] for sample in VARIANTS]
    assert heads == ["Answer based on the text and image.", "Answer based on the image.", "Answer based on the text."]


@pytest.mark.parametrize("asked", SPECIFIC_QUESTIONS)
def test_a_task_s_question_names_modalities_in_the_specific_style_only(asked: str) -> None:
    for sample in VARIANTS:
        posed = replace(sample, question=asked)
        assert f"Question: {asked}" in wording(posed, "agnostic")
        line = next(line for line in wording(posed, "specific").splitlines() if line.startswith("Question: "))
        assert [name for name in ("image", "text") if name in line] == list(posed.modalities)
        assert not any(name in asked for name in ("image", "text", "picture", "meme", "sentence"))


def test_every_task_with_options_and_both_modalities_is_worded() -> None:
    """All but triage, whose question is about neither."""
    asked = {claims.QUESTION, hateful_memes.QUESTION, crisismmd.QUESTION, nlvr.QUESTION, emojitwo.QUESTION}
    assert asked == set(SPECIFIC_QUESTIONS)


def test_other_questions_stay() -> None:
    sample = replace(COMPLETE, question="Which digit is larger?")
    assert "Question: Which digit is larger?" in wording(sample, "specific")


def test_a_third_modality_needs_no_new_code() -> None:
    sample = replace(COMPLETE, content={"audio": "x.wav", "text": "t"})
    (message,) = to_messages(sample, "specific")
    assert [part.type for part in message.parts] == ["audio", "text"]
    assert str(message.parts[1].value).startswith("Answer based on the audio and text.")


def test_free_answers_are_their_own_target() -> None:
    sample = Sample("s", "Which digit?", "7", {"image": "x.png"}, answer_type="open")
    assert target(sample) == "7"
    assert "Options" not in wording(sample, "agnostic")


def test_too_many_options() -> None:
    with pytest.raises(DataError, match="63 options; at most 62"):
        to_messages(replace(COMPLETE, options=tuple(map(str, range(63)))), "agnostic")


def test_options_beyond_z_have_letters_of_their_own() -> None:
    options = tuple(map(str, range(62)))
    posed = replace(COMPLETE, options=options)
    assert "Y. 24 Z. 25 a. 26 b. 27" in wording(posed, "agnostic")
    assert "z. 51 0. 52 1. 53" in wording(posed, "agnostic")
    assert len({target(replace(posed, answer=option)) for option in options}) == 62

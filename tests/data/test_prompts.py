from __future__ import annotations

from dataclasses import replace

import pytest

from fedmllm.data.prompts import PromptStyle, target, to_messages
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
        "Answer based on the text and image.\na nurse says 4\nQuestion: Is it misleading?\nOptions: A. no B. yes\nAnswer with the letter."
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
    with pytest.raises(DataError, match="27 options"):
        to_messages(replace(COMPLETE, options=tuple(map(str, range(27)))), "agnostic")

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
from pydantic import ValidationError

from fedmllm.data.datasets import crisismmd, emojitwo, hateful_memes, nlvr
from fedmllm.data.datasets.digits import claims
from fedmllm.data.federated import load
from fedmllm.data.prompts import SPECIFIC_QUESTIONS, WORDINGS, Wording, target, to_messages
from fedmllm.data.settings import DataConfig
from fedmllm.errors import ConfigError, DataError
from fedmllm.types import Sample

COMPLETE = Sample("s", "Is it misleading?", "yes", {"image": "x.png", "text": "a nurse says 4"}, options=("no", "yes"))
VARIANTS = [COMPLETE, replace(COMPLETE, content={"image": "x.png"}), replace(COMPLETE, content={"text": "a nurse says 4"})]


def wording(sample: Sample, style: str | Wording) -> str:
    return str(to_messages(sample, style)[0].parts[-1].value)


def test_a_sample_becomes_a_message() -> None:
    (message,) = to_messages(COMPLETE, "specific")
    assert [part.type for part in message.parts] == ["image", "text"]
    assert message.parts[0].value == "x.png"
    assert message.parts[1].value == (
        "Answer based on the text and image.\na nurse says 4\nQuestion: Is the text about the image misleading?\nOptions: A. no B. yes\nAnswer with the letter."
    )
    assert target(COMPLETE) == "B"


def test_the_agnostic_wording_is_the_same_for_any_content() -> None:
    rest = {wording(sample, "agnostic").replace("\na nurse says 4", "") for sample in VARIANTS}
    assert len(rest) == 1
    text = rest.pop()
    assert "image" not in text
    assert "text" not in text


def test_the_specific_wording_names_the_modalities() -> None:
    heads = [wording(sample, "specific").splitlines()[0] for sample in VARIANTS]
    assert heads == ["Answer based on the text and image.", "Answer based on the image.", "Answer based on the text."]


@pytest.mark.parametrize("asked", SPECIFIC_QUESTIONS)
def test_a_tasks_question_names_modalities_in_the_specific_style_only(asked: str) -> None:
    for sample in VARIANTS:
        posed = replace(sample, question=asked)
        assert f"Question: {asked}" in wording(posed, "agnostic")
        line = next(line for line in wording(posed, "specific").splitlines() if line.startswith("Question: "))
        assert [name for name in ("image", "text") if name in line] == list(posed.modalities)
        assert not any(name in asked for name in ("image", "text", "picture", "meme", "sentence"))


def test_every_task_with_options_and_both_modalities_has_specific_questions() -> None:
    """All but triage, whose question names no modality."""
    asked = {claims.QUESTION, hateful_memes.QUESTION, crisismmd.QUESTION, nlvr.QUESTION, emojitwo.QUESTION}
    assert asked == set(SPECIFIC_QUESTIONS)


def test_other_questions_do_not_change() -> None:
    sample = replace(COMPLETE, question="Which digit is larger?")
    assert "Question: Which digit is larger?" in wording(sample, "specific")


def test_a_third_modality_needs_no_new_code() -> None:
    sample = replace(COMPLETE, content={"audio": "x.wav", "text": "t"})
    (message,) = to_messages(sample, "specific")
    assert [part.type for part in message.parts] == ["audio", "text"]
    assert str(message.parts[1].value).startswith("Answer based on the audio and text.")


def test_a_free_answer_is_the_target() -> None:
    sample = Sample("s", "Which digit?", "7", {"image": "x.png"}, answer_type="open")
    assert target(sample) == "7"
    assert "Options" not in wording(sample, "agnostic")


@pytest.mark.parametrize("style", list(WORDINGS))
def test_closed_questions_ask_for_brevity_in_every_wording(style: str) -> None:
    """Brevity depends on the answer, not on the wording. Open questions and choices do not change."""
    free = replace(COMPLETE, options=())
    lines = {kind: wording(replace(free, answer_type=kind), style).splitlines() for kind in ("open", "closed")}  # type: ignore[arg-type]
    assert lines["closed"] == [*lines["open"], "Answer with one word or a short phrase."]
    assert wording(COMPLETE, style).splitlines()[-1] == "Answer with the letter."


def test_more_than_62_options_are_refused() -> None:
    with pytest.raises(DataError, match="63 options, but at most 62"):
        to_messages(replace(COMPLETE, options=tuple(map(str, range(63)))), "agnostic")


def test_options_beyond_z_have_their_own_letters() -> None:
    options = tuple(map(str, range(62)))
    posed = replace(COMPLETE, options=options)
    assert "Y. 24 Z. 25 a. 26 b. 27" in wording(posed, "agnostic")
    assert "z. 51 0. 52 1. 53" in wording(posed, "agnostic")
    assert len({target(replace(posed, answer=option)) for option in options}) == 62


TASK = "{text}\nQuestion: {question}\nOptions: {options}\n{instruction}"


def as_published(sample: Sample, style: str) -> str:
    """The two wordings of the committed results, written out a second time."""
    held, question = sample.modalities, sample.question
    preamble = "Answer whatever the modality of the information."
    if style == "specific":
        named = {("image", "text"): "text and image", (): "question"}.get(held, " and ".join(held))
        preamble = f"Answer based on the {named}."
        question = SPECIFIC_QUESTIONS.get(question, {}).get("+".join(held), question)
    lines = [preamble, *([str(sample.content["text"])] if "text" in held else []), f"Question: {question}"]
    if sample.options:
        lines += ["Options: " + " ".join(f"{'ABC'[i]}. {option}" for i, option in enumerate(sample.options)), "Answer with the letter."]
    return "\n".join(lines)


CONTENTS: list[dict[str, str]] = [
    {},
    {"image": "x"},
    {"text": "{a} {}"},
    {"text": ""},
    {"audio": "x", "text": "t"},
    {"image": "x", "text": "t"},
]
KINDS = [{"options": ("no", "yes")}, {"options": (), "answer_type": "open"}]


@pytest.mark.parametrize(("style", "content", "kind"), [*product(["specific", "agnostic"], CONTENTS, KINDS)])
def test_wordings_of_committed_results_stay_bit_for_bit(style: str, content: Mapping[str, str], kind: Mapping[str, Any]) -> None:
    for question in ("Is it {misleading}?", *SPECIFIC_QUESTIONS):
        sample = replace(COMPLETE, content=content, question=question, **kind)
        assert wording(sample, style) == as_published(sample, style)


@pytest.mark.parametrize("sample", VARIANTS)
def test_the_neutral_wording_is_the_agnostic_one_without_its_clause(sample: Sample) -> None:
    clause = "Answer whatever the modality of the information.\n"
    assert wording(sample, "agnostic") == clause + wording(sample, "neutral")
    neutral = wording(replace(sample, content={**sample.content, "text": "t"}), "neutral").lower()
    assert not [name for name in ("image", "text", "modality") if name in neutral]


def test_an_own_wording_is_chosen_by_the_samples_modalities() -> None:
    own = Wording(
        templates={"image": "See {{it}}.\n{question} {options}\n", "any": f"{TASK}\nFrom {{modalities}}."},
        questions={"Is it misleading?": {"image": "A fake?", "any": "A lie?"}},
    )
    assert wording(VARIANTS[1], own) == "See {it}.\nA fake? A. no B. yes"
    rest = "Question: A lie?\nOptions: A. no B. yes\nAnswer with the letter."
    assert wording(COMPLETE, own) == f"a nurse says 4\n{rest}\nFrom image and text."
    assert wording(replace(COMPLETE, content={}), own) == rest
    free = replace(COMPLETE, options=(), answer_type="open", question="Why?", content={"text": "{question}"})
    assert wording(free, own) == "{question}\nQuestion: Why?\nFrom text."


@pytest.mark.parametrize(
    ("templates", "message"),
    [
        ({}, "templates: any is required"),
        ({"image": TASK}, "templates: any is required"),
        ({"any": "{question}"}, "templates.any: lacks {options} and {text}"),
        ({"any": TASK, "image+text": "{question} {options}"}, "templates.image+text: lacks {text}"),
        ({"any": f"{TASK} {{answer}}"}, "templates.any: unknown placeholder {answer}; known: {text}, {question}, {options}"),
        ({"any": f"{TASK} {{}}"}, "unknown placeholder {}"),
        ({"any": f"{TASK} {{text[0]}}"}, "unknown placeholder {text[0]}"),
        ({"any": f"{TASK} {{text.__class__}}"}, "unknown placeholder {text.__class__}"),
        ({"any": f"{TASK} {{text!r}}"}, "unknown placeholder {text!r}"),
        ({"any": f"{TASK} {{text:>9}}"}, "unknown placeholder {text:>9}"),
        ({"any": f"{TASK} {{text:{{question}}}}"}, "unknown placeholder {text:{question}}"),
        ({"any": f"{TASK} }}"}, "templates.any: Single '}' encountered in format string; double braces"),
        ({"any": f"{TASK} {{"}, "double braces"),
        ({"any": TASK, "text+image": TASK}, "templates: 'text+image' must be modalities in alphabetical order"),
        ({"any": TASK, "image+": TASK}, "templates: 'image+' must be"),
    ],
)
def test_a_broken_template_is_refused_by_name(templates: Mapping[str, str], message: str) -> None:
    with pytest.raises(ValidationError) as refused:
        Wording(templates=dict(templates))
    assert message in str(refused.value)


def test_all_errors_of_a_wording_are_reported_at_once() -> None:
    with pytest.raises(ValidationError) as refused:
        Wording(templates={"b+a": "{question}"}, questions={"Why?": {"": "x"}})
    for part in ("'b+a' must be", "questions.Why?: '' must be", "lacks {options}", "any is required"):
        assert part in str(refused.value)


def test_an_unknown_wording_is_refused() -> None:
    own = {"mine": {"templates": {"any": TASK}}}
    assert DataConfig.model_validate({"prompt": "mine", "wordings": own}).wording.templates == {"any": TASK}
    with pytest.raises(ValidationError, match="prompt: 'mine' is not a known wording; known: specific, neutral, agnostic"):
        DataConfig(prompt="mine")
    with pytest.raises(ValidationError, match="wordings: neutral cannot be changed"):
        DataConfig.model_validate({"wordings": {"neutral": own["mine"]}})
    with pytest.raises(ConfigError, match=r"'mine' is not a known wording; known: .* data\.wordings"):
        to_messages(COMPLETE, "mine")


def test_a_template_that_applies_to_no_sample_is_noted() -> None:
    templates = {"any": TASK, "imgae+text": TASK, "none": TASK, "image+text": TASK}
    config = {"num_train": 20, "num_test": 20, "wordings": {"mine": {"templates": templates}}}
    assert load(DataConfig.model_validate(config), 0).notes == ()
    (note,) = load(DataConfig.model_validate({**config, "prompt": "mine"}), 0).notes
    assert note == "data.wordings.mine: imgae+text applies to no sample; the data hold image, text"

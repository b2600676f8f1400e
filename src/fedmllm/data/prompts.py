"""Samples to chats. The wordings are data: one preamble per style and set of modalities, one frame for all tasks.

The *specific* style names what the sample holds ("based on the text and image"). The *agnostic* style, the first of
the two FedMLLM strategies (arXiv 2411.14717), words the question alike whatever the sample holds, in training and in
test, and asks to answer without regard to the modality.
"""

from __future__ import annotations

from collections.abc import Mapping
from string import ascii_lowercase, ascii_uppercase, digits
from typing import Literal

from fedmllm.errors import DataError
from fedmllm.types import Message, Modality, Part, Sample

PromptStyle = Literal["agnostic", "specific"]

AGNOSTIC_PREAMBLE = "Answer whatever the modality of the information."
SPECIFIC_PREAMBLES: Mapping[tuple[Modality, ...], str] = {
    ("image", "text"): "Answer based on the text and image.",
    ("image",): "Answer based on the image.",
    ("text",): "Answer based on the text.",
    (): "Answer based on the question.",
}
SPECIFIC_QUESTIONS: Mapping[str, Mapping[tuple[Modality, ...], str]] = {
    "Is it hateful?": {
        ("image", "text"): "Are the image and the text together hateful?",
        ("image",): "Is the image hateful?",
        ("text",): "Is the text hateful?",
    },
    "Which kind of information is it?": {
        ("image", "text"): "Which kind of information do the image and the text give?",
        ("image",): "Which kind of information does the image give?",
        ("text",): "Which kind of information does the text give?",
    },
    "Is it true?": {
        ("image", "text"): "Is the text true of the image?",
        ("image",): "Is what was said about the image true?",
        ("text",): "Is the text true?",
    },
    "Which kind of thing is it?": {
        ("image", "text"): "Which kind of thing do the image and the text show?",
        ("image",): "Which kind of thing does the image show?",
        ("text",): "Which kind of thing does the text name?",
    },
    "Is it misleading?": {
        ("image", "text"): "Is the text about the image misleading?",
        ("image",): "Is the image misleading?",
        ("text",): "Is the text misleading?",
    },
}
"""A task's question as the datasets hold it, naming no modality, and what the specific style makes of it. Others stay."""

LETTERS = ascii_uppercase + ascii_lowercase + digits
"""What options are chosen by, in order: single characters, for a choice is read from one token."""
CHOICE_INSTRUCTION = "Answer with the letter."


def preamble(sample: Sample, style: PromptStyle) -> str:
    """The sentence before the question."""
    if style == "agnostic":
        return AGNOSTIC_PREAMBLE
    default = f"Answer based on the {' and '.join(sample.modalities)}."
    return SPECIFIC_PREAMBLES.get(sample.modalities, default)


def question(sample: Sample, style: PromptStyle) -> str:
    """The question in the style's words."""
    if style == "agnostic":
        return sample.question
    return SPECIFIC_QUESTIONS.get(sample.question, {}).get(sample.modalities, sample.question)


def to_messages(sample: Sample, style: PromptStyle) -> tuple[Message, ...]:
    """The user's turn: content other than text first, then preamble, text, question and lettered options."""
    lines = [preamble(sample, style)]
    if "text" in sample.content:
        lines.append(str(sample.content["text"]))
    lines.append(f"Question: {question(sample, style)}")
    if sample.options:
        lines += [options_line(sample.options), CHOICE_INSTRUCTION]
    others = [Part(name, sample.content[name]) for name in sample.modalities if name != "text"]
    return (Message("user", (*others, Part("text", "\n".join(lines)))),)


def options_line(options: tuple[str, ...]) -> str:
    """``Options: A. first B. second``."""
    return "Options: " + " ".join(f"{letter}. {option}" for letter, option in zip(letters(options), options, strict=True))


def letters(options: tuple[str, ...]) -> str:
    """The letters the options are chosen by: A to Z, then a to z, then 0 to 9.

    Raises:
        DataError: if there are more options than letters.
    """
    if len(options) > len(LETTERS):
        raise DataError(f"a sample has {len(options)} options; at most {len(LETTERS)} can be lettered: ask for a free answer instead")
    return LETTERS[: len(options)]


def target(sample: Sample) -> str:
    """What the model should answer: the letter of the right option, or the answer itself."""
    return letters(sample.options)[sample.label] if sample.options else sample.answer

"""Turns samples into chats. A wording is data: prompt templates by modalities, built in (``WORDINGS``) or from ``data.wordings``.

``specific`` names the sample's modalities ("based on the text and image"). ``neutral`` uses the same wording whatever the sample's
modalities. ``agnostic``, the first of the two FedMLLM strategies (arXiv 2411.14717), adds a sentence that asks to answer regardless of
modality. Its gain over ``neutral`` comes from that sentence; its gain over ``specific`` also comes from not naming modalities.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from string import Formatter, ascii_lowercase, ascii_uppercase, digits

from pydantic import BaseModel, ConfigDict, Field, model_validator

from fedmllm.errors import ConfigError, DataError
from fedmllm.types import Message, Modality, Part, Sample

ANY, NONE = "any", "none"
PLACEHOLDERS = ("text", "question", "options", "instruction", "modalities")


class Wording(BaseModel):
    """A wording: prompt templates by the sample's modalities. A key joins modalities with ``+`` in alphabetical order; ``none`` stands for
    samples without content, and ``any`` for all combinations that have no key.

    Placeholders: ``{text}`` is the sample's text, ``{question}`` its question, ``{options}`` its lettered options, ``{instruction}`` how to
    answer, and ``{modalities}`` the names of its modalities. A line is dropped if it has placeholders and none of them has a value. Double
    literal braces.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    templates: dict[str, str]
    """Templates by modalities, e.g. ``{any: "{text}\\nQuestion: {question}\\n{options}\\n{instruction}"}``. ``any`` is required."""
    questions: dict[str, dict[str, str]] = Field(default_factory=dict)
    """Replacements for questions of the dataset, by question and then by modalities. Other questions are not changed."""

    @model_validator(mode="after")
    def _sound(self) -> Wording:
        tables = {"templates": self.templates, **{f"questions.{name}": row for name, row in self.questions.items()}}
        problems = [f"{where}: {problem}" for where, table in tables.items() for name in table if (problem := _misnamed(name))]
        problems += [f"templates.{name}: {problem}" for name, template in self.templates.items() for problem in _unsound(name, template)]
        problems += [] if ANY in self.templates else [f"templates: {ANY} is required, for samples whose modalities have no template"]
        if problems:
            raise ValueError("; ".join(problems))
        return self

    def text(self, sample: Sample) -> str:
        """Return the text of the user's message about a sample."""
        held = NONE if not sample.content else "+".join(sample.modalities)
        asked = self.questions.get(sample.question, {})
        values = {
            "text": str(sample.content["text"]) if "text" in sample.content else None,
            "question": asked.get(held, asked.get(ANY, sample.question)),
            "options": lettered(sample.options) if sample.options else None,
            "instruction": instruction(sample),
            "modalities": " and ".join(sample.modalities) or None,
        }
        return "\n".join(_lines(self.templates.get(held, self.templates[ANY]), values))

    def unused(self, modalities: Sequence[Modality]) -> list[str]:
        """Return the keys that name a modality which the dataset does not have."""
        named = {key for table in (self.templates, *self.questions.values()) for key in table} - {ANY, NONE}
        return sorted(key for key in named if not set(key.split("+")) <= set(modalities))


def _misnamed(key: str) -> str:
    """Return what is wrong with a key; empty if it is valid."""
    parts = key.split("+")
    ordered = "+".join(sorted(set(parts)))
    return "" if all(parts) and key == ordered else f"{key!r} must be modalities in alphabetical order joined by +, {NONE} or {ANY}"


def _unsound(key: str, template: str) -> Iterator[str]:
    """Yield what is wrong with a template."""
    try:
        fields = [row[1:] for row in Formatter().parse(template) if row[1] is not None]
    except ValueError as error:
        yield f"{' '.join(str(error).split())}; double braces that belong to the text"
        return
    known = ", ".join(f"{{{name}}}" for name in PLACEHOLDERS)
    for name, *form in fields:
        if name not in PLACEHOLDERS or any(form):
            yield f"unknown placeholder {_spelled(name, *form)}; known: {known}; double braces that belong to the text"
    needed = ("question", "options", *(["text"] if key == ANY or "text" in key.split("+") else []))
    found = {name for name, *_ in fields}
    if lacking := [f"{{{name}}}" for name in needed if name not in found]:
        yield f"lacks {' and '.join(lacking)}; a line without a value is left out"


def _spelled(name: str | None, form: str | None, conversion: str | None) -> str:
    return f"{{{name}{'!' + conversion if conversion else ''}{':' + form if form else ''}}}"


def _lines(template: str, values: Mapping[str, str | None]) -> Iterator[str]:
    """Yield a template's lines with values filled in. Lines whose placeholders all have no value are left out."""
    for line in template.strip("\n").split("\n"):
        named = [name for _, name, _, _ in Formatter().parse(line) if name is not None]
        if not named or any(values[name] is not None for name in named):
            yield line.format_map({name: value or "" for name, value in values.items()})


SPECIFIC_QUESTIONS: dict[str, dict[str, str]] = {
    "Is it hateful?": {
        "image+text": "Are the image and the text together hateful?",
        "image": "Is the image hateful?",
        "text": "Is the text hateful?",
    },
    "Which kind of information is it?": {
        "image+text": "Which kind of information do the image and the text give?",
        "image": "Which kind of information does the image give?",
        "text": "Which kind of information does the text give?",
    },
    "Is it true?": {
        "image+text": "Is the text true of the image?",
        "image": "Is what was said about the image true?",
        "text": "Is the text true?",
    },
    "Which kind of thing is it?": {
        "image+text": "Which kind of thing do the image and the text show?",
        "image": "Which kind of thing does the image show?",
        "text": "Which kind of thing does the text name?",
    },
    "Is it misleading?": {
        "image+text": "Is the text about the image misleading?",
        "image": "Is the image misleading?",
        "text": "Is the text misleading?",
    },
}
"""Questions of the datasets, which name no modality, and their replacements in the specific wording. Other questions are not changed."""

_TASK = "{text}\nQuestion: {question}\nOptions: {options}\n{instruction}"
_SPECIFIC = {
    "image+text": "Answer based on the text and image.",
    NONE: "Answer based on the question.",
    ANY: "Answer based on the {modalities}.",
}

WORDINGS: Mapping[str, Wording] = {
    "specific": Wording(templates={held: f"{preamble}\n{_TASK}" for held, preamble in _SPECIFIC.items()}, questions=SPECIFIC_QUESTIONS),
    "neutral": Wording(templates={ANY: _TASK}),
    "agnostic": Wording(templates={ANY: f"Answer whatever the modality of the information.\n{_TASK}"}),
}
"""The built-in wordings."""

LETTERS = ascii_uppercase + ascii_lowercase + digits
"""The labels of options, in order. They are single characters, because a choice is read from one token."""
CHOICE_INSTRUCTION = "Answer with the letter."
CLOSED_INSTRUCTION = "Answer with one word or a short phrase."


def wording(style: str | Wording) -> Wording:
    """Return the built-in wording of a name, or the wording itself if one is given.

    Raises:
        ConfigError: if there is no built-in wording of that name.
    """
    if isinstance(style, Wording):
        return style
    if style not in WORDINGS:
        raise ConfigError(f"{style!r} is not a known wording; known: {', '.join(WORDINGS)}; define your own under data.wordings")
    return WORDINGS[style]


def to_messages(sample: Sample, style: str | Wording) -> tuple[Message, ...]:
    """Return the user's message: content other than text first, then the text of the wording."""
    others = [Part(name, sample.content[name]) for name in sample.modalities if name != "text"]
    return (Message("user", (*others, Part("text", wording(style).text(sample)))),)


def instruction(sample: Sample) -> str | None:
    """Return the instruction how to answer: with a letter, or briefly for closed questions; None for open ones."""
    if sample.options:
        return CHOICE_INSTRUCTION
    return CLOSED_INSTRUCTION if sample.answer_type == "closed" else None


def lettered(options: tuple[str, ...]) -> str:
    """Format options with their letters: ``A. first B. second``."""
    return " ".join(f"{letter}. {option}" for letter, option in zip(letters(options), options, strict=True))


def letters(options: tuple[str, ...]) -> str:
    """Return the options' letters: A to Z, then a to z, then 0 to 9.

    Raises:
        DataError: if there are more options than letters.
    """
    if len(options) > len(LETTERS):
        raise DataError(f"a sample has {len(options)} options, but at most {len(LETTERS)} can be lettered; ask for a free answer instead")
    return LETTERS[: len(options)]


def target(sample: Sample) -> str:
    """Return the text that the model should answer: the letter of the correct option, or the answer itself."""
    return letters(sample.options)[sample.label] if sample.options else sample.answer

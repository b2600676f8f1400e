"""The settings of the datasets ``jsonl``, ``csv`` and ``huggingface``, which assign roles to the columns of your own files."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator, model_validator

from fedmllm.data.datasets.base import HEADLINES, DatasetOptions
from fedmllm.data.datasets.rows import same_form, words_of
from fedmllm.data.prompts import LETTERS
from fedmllm.explain import meant
from fedmllm.types import Modality

ROLES = ("id", "question", "options", "answer", "answer_type", "category", "client", "domain")
"""Keys of ``columns`` that are not modalities."""


class Options(DatasetOptions):
    """The files and columns of your own dataset."""

    train: str = "train"
    """File of the training rows: a path inside ``root``, or an absolute path. Hugging Face: the name of the split."""
    test: str | None = None
    """File of the test rows. Null holds out ``test_share`` of the training rows, drawn by the seed."""
    validation: str | None = None
    """File of the validation rows. Null holds out ``data.validation_share`` of the training rows."""
    test_share: float = Field(0.2, gt=0, lt=1)
    """Share of the training rows to hold out as the test split if there is no test file."""
    columns: dict[str, str]
    """Names of your columns, by what they contain: modalities such as ``text`` and ``image``, and the roles id, question, options, answer,
    answer_type, category, client and domain. ``answer`` and at least one modality are required."""
    question: str | None = None
    """The question of every sample. Leave it out if a column contains the questions."""
    choices: tuple[str, ...] = ()
    """The options of every sample. Leave them out for free answers, or if a column contains the options (separated by a vertical bar; an
    empty field means a free answer)."""
    delimiter: Literal["comma", "semicolon", "tab", "bar"] | None = None
    """The separator between the fields of a table; null detects it from the header."""
    quoted: bool | None = None
    """Whether quotation marks enclose fields of a table. Null means yes, except in tab-separated tables."""
    keep_empty: bool = False
    """Keep rows whose modalities are all empty. If false, such rows are bad rows."""
    metric: str | None = None
    """The headline score: ``auc``, ``macro_f1``, ``accuracy``, ``mixed`` (the mean over the datasets that the column domain names), or a plugin's.
    Null selects ``auc`` for two choices, ``macro_f1`` for more, and ``accuracy`` for free answers."""

    @field_validator("columns")
    @classmethod
    def _named(cls, columns: dict[str, str]) -> dict[str, str]:
        return {role: same_form(name) for role, name in columns.items()}

    @field_validator("metric")
    @classmethod
    def _known(cls, name: str | None) -> str | None:
        if name is not None and name not in HEADLINES:
            raise ValueError(f"{name!r} is not a known headline score{meant(name, HEADLINES)}")
        return name

    @field_validator("choices", mode="before")
    @classmethod
    def _words(cls, values: object) -> object:
        """Convert integers to text, and text to the Unicode form NFC."""
        if not isinstance(values, (list, tuple)):
            return values
        return [same_form(str(v)) if isinstance(v, (str, int)) and not isinstance(v, bool) else v for v in values]

    @model_validator(mode="after")
    def _consistent(self) -> Options:
        problems = [f"columns: {key} is required" for key in ("answer",) if key not in self.columns]
        problems += [] if self.modalities else ["columns: name at least one modality, e.g. text or image"]
        if (self.question is None) == ("question" not in self.columns):
            problems.append("question: set either question or columns.question")
        if self.choices and "options" in self.columns:
            problems.append("choices: set either choices or columns.options")
        if len(set(self.choices)) != len(self.choices) or len(self.choices) == 1:
            problems.append(f"choices: must be two or more different texts, got {list(self.choices)}")
        if len(self.choices) > len(LETTERS):
            problems.append(
                f"choices: there are {len(self.choices)}, but at most {len(LETTERS)} can be lettered; leave them out for free answers"
            )
        problems += [
            f"choices: {choice!r} must have words and single spaces" for choice in self.choices if words_of(choice) != choice or not choice
        ]
        files = {"train": self.train, "test": self.test, "validation": self.validation}
        problems += [f"{key}: must be a path inside root or an absolute path, got {file!r}" for key, file in files.items() if _leaves(file)]
        problems += [
            f"{key}: must differ from {other}; leave it out to hold out rows"
            for key, other in (("test", "train"), ("validation", "train"), ("validation", "test"))
            if files[key] is not None and files[key] == files[other]
        ]
        by_row = "options" in self.columns
        if self.metric == "auc" and len(self.choices) != 2 and not by_row:
            problems.append("metric: auc needs exactly two choices, of which the second is the positive class")
        if self.metric == "macro_f1" and not self.choices and not by_row:
            problems.append("metric: macro_f1 needs choices")
        if problems:
            raise ValueError("; ".join(problems))
        return self

    @property
    def modalities(self) -> tuple[Modality, ...]:
        """The keys of ``columns`` that are modalities, in alphabetical order."""
        return tuple(sorted(set(self.columns) - set(ROLES)))

    @property
    def headline(self) -> str:
        """The headline score that applies, given ``metric`` and ``choices``."""
        return self.metric or ("accuracy" if not self.choices else "auc" if len(self.choices) == 2 else "macro_f1")


def _leaves(file: str | None) -> bool:
    return file is not None and (not file or ".." in Path(file).parts)

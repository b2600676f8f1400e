"""Which column of one's own files is for what: the settings behind ``jsonl``, ``csv`` and ``huggingface``."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator, model_validator

from fedmllm.data.datasets.base import DatasetOptions, Metric
from fedmllm.data.datasets.rows import same_form, words_of
from fedmllm.data.prompts import LETTERS
from fedmllm.types import Modality

ROLES = ("id", "question", "options", "answer", "answer_type", "category", "client", "domain")
"""Keys of ``columns`` that are no modalities."""


class Options(DatasetOptions):
    """Where things are in your files."""

    train: str = "train"
    """File of the training rows inside ``root`` (Hugging Face: name of the split)."""
    test: str | None = None
    """File of the test rows; left out: ``test_share`` of the training rows, chosen by the seed, are held out."""
    validation: str | None = None
    """File of the validation rows; left out: ``data.validation_share`` of the training rows are held out."""
    test_share: float = Field(0.2, gt=0, lt=1)
    """Share of the rows to test on where there is no test file."""
    columns: dict[str, str]
    """What a column is for, and its name: modalities, and the roles id, question, options, answer, answer_type, category, client and domain."""
    question: str | None = None
    """The question of every sample; left out where a column holds it."""
    choices: tuple[str, ...] = ()
    """The options of every sample; left out where a column holds them (separated by a vertical bar; empty: a free answer) or answers are free."""
    delimiter: Literal["comma", "semicolon", "tab", "bar"] | None = None
    """What separates the fields of a table; left out: found by its header."""
    quoted: bool | None = None
    """Whether quotation marks enclose fields of a table; left out: yes, unless tabs separate them."""
    keep_empty: bool = False
    """Keep rows whose modalities are all empty; else they are bad rows."""
    metric: Metric | None = None
    """Headline score; left out for ``auc`` (2 choices), ``macro_f1`` (more) or ``accuracy`` (free answers)."""

    @field_validator("columns")
    @classmethod
    def _named(cls, columns: dict[str, str]) -> dict[str, str]:
        return {role: same_form(name) for role, name in columns.items()}

    @field_validator("choices", mode="before")
    @classmethod
    def _words(cls, values: object) -> object:
        """Whole numbers as text, accents in one form."""
        if not isinstance(values, (list, tuple)):
            return values
        return [same_form(str(v)) if isinstance(v, (str, int)) and not isinstance(v, bool) else v for v in values]

    @model_validator(mode="after")
    def _consistent(self) -> Options:
        problems = [f"columns: {key} is needed" for key in ("answer",) if key not in self.columns]
        problems += [] if self.modalities else ["columns: name at least one modality, e.g. text or image"]
        if (self.question is None) == ("question" not in self.columns):
            problems.append("question: give either this or columns.question")
        if self.choices and "options" in self.columns:
            problems.append("choices: give either these or columns.options")
        if len(set(self.choices)) != len(self.choices) or len(self.choices) == 1:
            problems.append(f"choices: two or more different ones are needed, not {list(self.choices)}")
        if len(self.choices) > len(LETTERS):
            problems.append(
                f"choices: there are {len(self.choices)}, at most {len(LETTERS)} can be lettered; leave them out for free answers"
            )
        problems += [
            f"choices: {choice!r} must have words and single spaces" for choice in self.choices if words_of(choice) != choice or not choice
        ]
        files = {"train": self.train, "test": self.test, "validation": self.validation}
        problems += [f"{key}: must be a path inside root, or an absolute one, not {file!r}" for key, file in files.items() if _leaves(file)]
        problems += [
            f"{key}: must be another file than {other}; leave it out to hold rows out"
            for key, other in (("test", "train"), ("validation", "train"), ("validation", "test"))
            if files[key] is not None and files[key] == files[other]
        ]
        by_row = "options" in self.columns
        if self.metric == "auc" and len(self.choices) != 2 and not by_row:
            problems.append("metric: auc needs exactly two choices, the second is the positive one")
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
    def headline(self) -> Metric:
        """The metric in force."""
        return self.metric or ("accuracy" if not self.choices else "auc" if len(self.choices) == 2 else "macro_f1")


def _leaves(file: str | None) -> bool:
    return file is not None and (not file or ".." in Path(file).parts)

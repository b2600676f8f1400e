"""The ``privacy`` section of an experiment."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from fedmllm.privacy import accounting
from fedmllm.settings_file import ADVANCED

Unit = Literal["none", "client", "sample"]


class PrivacyConfig(BaseModel):
    """Differential privacy: what a reader of the adapter can learn about one unit."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    unit: Unit = "none"
    """What the guarantee protects: ``none``; ``client``, everything that one client holds (the server adds the noise, so it sees updates); or
    ``sample``, one training sample (clients add the noise in every optimizer step, so the server sees none without it)."""
    clip_norm: float = Field(0.1, gt=0)
    """Largest norm of an update or, with ``unit: sample``, of a sample's gradient; longer ones are scaled down. With ``clip_quantile``, the value in
    the first round."""
    clip_quantile: float | None = Field(None, gt=0, lt=1)
    """With ``unit: client``, let ``clip_norm`` follow this quantile of the updates' norms, privately (Andrew et al., NeurIPS 2021); null keeps it
    fixed."""
    noise_multiplier: float | None = Field(None, gt=0)
    """Standard deviation of the noise on the sum of updates or gradients, divided by ``clip_norm``; null finds the one that reaches
    ``target_epsilon``."""
    target_epsilon: float | None = Field(None, gt=0)
    """Largest epsilon of the run. Training stops before a round that would exceed it. Null sets no limit."""
    target_delta: float = Field(1e-5, gt=0, lt=1)
    """Delta of the guarantee. It must be less than one divided by the number of units."""
    noise_seed: int | None = Field(None, ge=0, json_schema_extra=ADVANCED)
    """Makes the noise predictable, for tests. The run then has no guarantee, and its results say so."""

    @model_validator(mode="after")
    def _noise_is_known(self) -> PrivacyConfig:
        if self.unit != "none" and self.noise_multiplier is None and self.target_epsilon is None:
            raise ValueError("noise_multiplier: null, and so is target_epsilon; set one of them, e.g. target_epsilon: 8")
        given = [name for name in ("noise_multiplier", "target_epsilon", "clip_quantile") if getattr(self, name) is not None]
        if self.unit == "none" and given:
            raise ValueError(f"unit: none ignores {', '.join(given)}; set unit to client or sample, or omit the others")
        if self.unit == "sample" and self.clip_quantile is not None:
            raise ValueError("clip_quantile: a sample's gradient has a fixed clip_norm; omit clip_quantile")
        return self

    def multiplier(self, count: int, rate: float) -> float:
        """Return the noise multiplier: the one that is set, or the one that reaches ``target_epsilon``.

        Args:
            count: the largest number of releases that a unit takes part in.
            rate: the probability with which it takes part in each.

        Raises:
            ConfigError: if ``dp-accounting`` is not installed.
        """
        if self.noise_multiplier is not None:
            return self.noise_multiplier
        return accounting.noise_multiplier(self.target_epsilon or math.inf, self.target_delta, count, rate)


class SitePrivacy(BaseModel):
    """Limits that a site sets for itself. They hold for every run, whatever the server asks for, and protect each of the site's samples.

    The site trains with noise in every optimizer step. If the server asks for more noise, it uses more. The ledger ``privacy.jsonl`` in the site's
    folder counts the steps of all runs; a task that would exceed the budget is refused.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    target_epsilon: float = Field(gt=0)
    """Largest epsilon over all runs."""
    noise_multiplier: float = Field(gt=0)
    """Smallest standard deviation of the noise, divided by ``clip_norm``."""
    clip_norm: float = Field(0.1, gt=0)
    """Largest norm of a sample's gradient; longer ones are scaled down."""
    target_delta: float = Field(1e-5, gt=0, lt=1)
    """Delta of the guarantee. It must be less than one divided by the site's number of samples."""

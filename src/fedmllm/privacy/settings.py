"""The ``privacy`` section of an experiment."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from fedmllm.privacy import accounting
from fedmllm.privacy.secagg.policy import threshold
from fedmllm.settings_file import ADVANCED

NoiseAt = Literal["server", "clients"]
Unit = Literal["none", "client", "sample"]


class PrivacyConfig(BaseModel):
    """What readers of the adapter, and the server, can learn about a client or a sample."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    unit: Unit = "none"
    """What the guarantee protects: ``none``; ``client``, everything that one client holds (by default the server adds the noise, so it sees updates); or
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
    bands: int = Field(1, ge=1, json_schema_extra=ADVANCED)
    """With ``unit: client`` and cyclic sampling, let the server's noise partly cancel over this many rounds, at most num_clients / clients_per_round
    (Choquette-Choo et al., NeurIPS 2023). The cost is the same; noise in sums over rounds is lower."""
    noise_seed: int | None = Field(None, ge=0, json_schema_extra=ADVANCED)
    """Makes the noise predictable, for tests. The run then has no guarantee, and its results say so."""
    secure_aggregation: bool = False
    """Let the server learn only sums of updates, and no single one (Bonawitz et al., CCS 2017). The server then checks neither norms
    (``failures.norm_limit`` has no effect) nor anything else about an update, so that one client can spoil a sum. A round whose session fails is
    skipped, because a client never masks a second vector for a round."""
    min_clients: int | None = Field(None, ge=2)
    """With ``secure_aggregation``, the smallest number of clients in a sum; rounds with fewer are skipped. Null is floor(2m / 3) + 1 for cohorts
    of m clients, without which nobody can unmask a sum of all of them. In a sum of two, each client can compute the other's update."""
    noise: NoiseAt = "server"
    """Who adds the noise of ``unit: client``: the ``server``, which then sees sums without noise, or the ``clients``, which needs
    ``secure_aggregation``. Each client adds variance (noise_multiplier clip_norm)^2 / (min_clients - assumed_colluders), so that any sum has
    enough noise. The guarantee then holds against the server too. The more clients are in a sum beyond ``min_clients``, the more noise it has."""
    assumed_colluders: int = Field(0, ge=0, json_schema_extra=ADVANCED)
    """With ``noise: clients``, how many clients of a sum may tell the server their noise without harm to the guarantee of the others."""
    value_range: float = Field(4.0, gt=0, json_schema_extra=ADVANCED)
    """With ``secure_aggregation``, the largest absolute value of an update's entries; a client with a larger one fails. Entries are rounded to
    multiples of ``value_range`` / 2^30. ``unit: client`` ignores it, because clipping bounds the entries."""

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

    @model_validator(mode="after")
    def _secure_aggregation_is_on(self) -> PrivacyConfig:
        if not self.secure_aggregation and self.min_clients is not None:
            raise ValueError(
                "min_clients: only secure_aggregation has sums of at least so many clients; set it to true, or omit min_clients"
            )
        if self.noise == "clients" and not (self.secure_aggregation and self.unit == "client"):
            raise ValueError(
                "noise: clients protects nothing without secure_aggregation: true and unit: client, because the noise of one client is too small; "
                "set both, or noise to server"
            )
        if self.assumed_colluders and self.noise != "clients":
            raise ValueError(
                f"assumed_colluders: {self.assumed_colluders}, but noise: server is added by nobody who colludes; omit one of them"
            )
        return self

    def smallest_sum(self, cohort: int) -> int:
        """Return the smallest number of clients in a sum of secure aggregation, for cohorts of a size."""
        return threshold(cohort) if self.min_clients is None else self.min_clients

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

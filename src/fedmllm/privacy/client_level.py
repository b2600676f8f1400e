"""Client-level differential privacy: clip each client's contribution, add Gaussian noise to the sum, divide by a fixed number.

Learning Differentially Private Recurrent Language Models. McMahan et al., ICLR 2018 (DP-FedAvg).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from fedmllm.privacy.accounting import Releases
from fedmllm.privacy.bands import BandedNoise
from fedmllm.privacy.clipping import AdaptiveClip, bit_deviation, clipped, joint_norm, update_multiplier
from fedmllm.privacy.ledger import Ledger
from fedmllm.privacy.noise import Noise
from fedmllm.types import Record, Slots

BIT = "clip_bit"
"""Kind of the bit by which a client says whether its norm is within the clip norm."""
CLIP_NORM = "clip_norm"
"""Kind of the server's slot with the current clip norm, if it adapts."""


@dataclass(frozen=True)
class ClientPrivacy:
    """What the server does with the contributions of one federation's clients.

        D = (sum_k D_k min(1, C / ||D_k||) + z C N(0, I)) / m

    The norm is taken over all tensors together, and every client has the same weight. The number m is the cohort's fixed (with Poisson sampling:
    expected) size. Dividing by the number of updates that arrived would reveal it and would lower the noise when clients fail.

    Attributes:
        clip_norm: C, in the first round if it adapts.
        noise_multiplier: z. If C adapts, updates get slightly more noise, so that updates and bits together cost what z costs.
        cohort: m.
        noise: source of noise and of secret cohorts.
        ledger: is written before each release.
        rate: probability with which a client takes part in a round; 1 if cohorts are public.
        adaptive: how C follows the updates' norms; None keeps it fixed.
        noise_at_clients: whether the clients of secure aggregation have added the noise already.
        banded: noise that partly cancels over rounds; None for independent noise. C must be fixed then.
    """

    clip_norm: float
    noise_multiplier: float
    cohort: int
    noise: Noise
    ledger: Ledger
    rate: float = 1.0
    adaptive: AdaptiveClip | None = field(default=None)
    noise_at_clients: bool = False
    banded: BandedNoise | None = None

    @property
    def secret_cohort(self) -> bool:
        """Whether nobody may learn which clients took part."""
        return self.rate < 1

    def drawn(self, names: Sequence[str]) -> list[str]:
        """Return a secret cohort: each client on its own with probability ``rate``. It may be empty."""
        return [name for name, u in zip(names, self.noise.uniform(len(names)), strict=True) if u < self.rate]

    def bounded(self, slots: Slots, server: Slots) -> Slots:
        """Return a client's contribution with a joint norm of at most C, and its bit if C adapts.

        Args:
            slots: the tensors that the client adds to the aggregate, by kind.
            server: the server's slots.
        """
        limit = self._limit(server)
        found = dict(clipped(slots, limit))
        if self.adaptive:
            found[BIT] = {BIT: torch.tensor(self.adaptive.bit(joint_norm(slots), limit), dtype=torch.float64)}
        return found

    def spend(self, stage: str, round_num: int, cohort: Sequence[str]) -> None:
        """Record in the ledger that a round is about to be released. Names of a secret cohort are not recorded.

        Args:
            stage: the stage's name.
            round_num: the round, counted from 1.
            cohort: the clients that took part.

        Raises:
            OSError: if the ledger cannot be written; then nothing may be released.
        """
        about = {} if self.secret_cohort else {"clients": sorted(cohort)}
        self.ledger.spend(Releases(self.noise_multiplier, 1, self.rate), stage=stage, round=round_num, **about)

    def released(self, total: Slots, server: Slots) -> Slots:
        """Return the noisy means.

        Args:
            total: the sums of bounded contributions by kind, with zeros for kinds without a contribution.
            server: the server's slots.
        """
        if self.noise_at_clients:
            return {kind: {name: tensor / self.cohort for name, tensor in total[kind].items()} for kind in sorted(total)}
        z = self.noise_multiplier
        deviation = self._limit(server) * (update_multiplier(z, bit_deviation(z, self.cohort)) if self.adaptive else z)
        means = {}
        for kind in sorted(total):
            source, size = (self.noise, bit_deviation(z, self.cohort)) if kind == BIT else (self.banded or self.noise, deviation)
            noisy = source.added(total[kind], size)
            means[kind] = {name: tensor / self.cohort for name, tensor in noisy.items()}
        return means

    def skip(self) -> None:
        """Note that a round releases nothing."""
        if self.banded:
            self.banded.restart()

    def kinds(self, expected: Slots) -> Slots:
        """Return zeros for all kinds of a contribution, given tensors of the right shapes for those of the method."""
        zeros = {kind: {n: torch.zeros_like(t, dtype=torch.float64) for n, t in tensors.items()} for kind, tensors in expected.items()}
        return {**zeros, **({BIT: {BIT: torch.zeros((), dtype=torch.float64)}} if self.adaptive else {})}

    def slots_after(self, means: Slots, server: Slots) -> Slots:
        """Return the server's slots that a release changes: the next clip norm, if it adapts."""
        if self.adaptive is None:
            return {}
        following = self.adaptive.next(self._limit(server), float(means[BIT][BIT]) * self.cohort, self.cohort)
        return {CLIP_NORM: {CLIP_NORM: torch.tensor(following, dtype=torch.float64)}}

    def published(self, record: Record, upload: int) -> Record:
        """Return a round's metrics without the numbers that depend on the clients' data and are not covered by the guarantee.

        Losses and sample counts are withheld. With a secret cohort, so are names and the time of training, and the
        bytes are those of a cohort of the expected size.

        Args:
            record: the round's metrics.
            upload: bytes that a client uploads in a round.
        """
        kept = {**record, "num_samples": 0, "loss": None, "losses": {}, "halvings": {}, "withheld": list(record["clients"])}
        if self.secret_cohort:
            kept |= {"clients": [], "withheld": [], "refused": [], "bytes_up": self.cohort * upload, "bytes_held": 0}
            kept["seconds"] = {name: spent for name, spent in record["seconds"].items() if name in ("evaluate", "checkpoint")}
        return kept

    def _limit(self, server: Slots) -> float:
        """Return the current clip norm."""
        return float(server[CLIP_NORM][CLIP_NORM]) if CLIP_NORM in server else self.clip_norm


WITHHELD = "withheld, because it may contain private numbers; see the server's log"
"""Why metrics of a private run do not say why an update was refused."""

"""The stages of a run: the federation, and the centralized and local baselines."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from fedmllm.data.labels import answer_counts
from fedmllm.data.modalities import profile
from fedmllm.data.settings import Sampling
from fedmllm.randomness import generator
from fedmllm.types import Holding, Population, Sample


@dataclass(frozen=True)
class Stage:
    """A federation to train. Centralized and local training are federations with one client.

    Attributes:
        name: the name in checkpoints and in ``metrics.jsonl``.
        clients: training samples by client; empty for a remote client.
        num_rounds: rounds to train.
        clients_per_round: size of a cohort.
        validate_every: rounds between scores on the validation split; 0 for none.
        ranks: LoRA ranks of clients whose rank differs from the server's.
        reported: remote clients' self-reported sample counts, by client.
        sampling: how cohorts are chosen. The private mechanism draws those of ``poisson``, in secret.
    """

    name: str
    clients: Mapping[str, Sequence[Sample]]
    num_rounds: int
    clients_per_round: int
    validate_every: int = 0
    ranks: Mapping[str, int] = field(default_factory=dict)
    reported: Mapping[str, Holding] = field(default_factory=dict)
    sampling: Sampling = "uniform"

    @property
    def population(self) -> Population:
        """What the server knows about all clients together: sample counts by modality, and label counts of simulated clients only."""
        counts = Counter(profile(sample for samples in self.clients.values() for sample in samples))
        for held in self.reported.values():
            counts.update(held.profile)
        return Population(len(self.clients), dict(counts), answer_counts(sample for held in self.clients.values() for sample in held))

    @property
    def num_samples(self) -> int:
        """Number of training samples of all clients, except remote clients that withhold theirs."""
        return sum(map(len, self.clients.values())) + sum(held.num_samples or 0 for held in self.reported.values())

    def claim(self, client: str) -> int | None:
        """Return the largest number of samples that a client may claim in an update.

        Returns:
            The number of samples that the client holds or, for a remote client, reported before the first round; 0 if it withholds the number; None if
            it did not report before the first round.
        """
        return self.reported[client].num_samples or 0 if client in self.reported else len(self.clients[client]) or None

    def cohort(self, seed: int, round_num: int) -> list[str]:
        """Return a round's clients, sorted: drawn without replacement or, with ``cyclic``, the group whose turn it is."""
        names = sorted(self.clients)
        if self.sampling != "cyclic":
            return drawn(names, self.clients_per_round, seed, round_num)
        order = generator(seed, "groups").permutation(len(names))
        first = round_num * self.clients_per_round % len(names)
        return sorted(names[i] for i in order[first : first + self.clients_per_round])

    def ends(self, round_num: int) -> bool:
        """Return whether this round, counted from 1, is the last, after which the run scores the test split."""
        return round_num == self.num_rounds

    def validates(self, round_num: int) -> bool:
        """Return whether the run scores the validation split after this round, counted from 1."""
        return self.validate_every > 0 and (self.ends(round_num) or round_num % self.validate_every == 0)


def drawn(names: Sequence[str], count: int, seed: int, round_num: int, *again: int) -> list[str]:
    """Return clients drawn without replacement, in the order of ``names``. ``again`` numbers additional draws in the same round."""
    chosen = generator(seed, "cohort", round_num, *again).choice(len(names), size=count, replace=False)
    return [names[i] for i in sorted(chosen)]

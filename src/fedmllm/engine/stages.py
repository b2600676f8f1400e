"""Who trains, and for how long: the federation, and the baselines beside it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from fedmllm.data.labels import answer_counts
from fedmllm.data.modalities import profile
from fedmllm.randomness import generator
from fedmllm.types import Holding, Population, Sample


@dataclass(frozen=True)
class Stage:
    """A federation to train. Centralized and local training are federations of one.

    Attributes:
        name: names its checkpoint and its lines of metrics.
        clients: samples by client.
        num_rounds: rounds to train.
        clients_per_round: size of a cohort.
        validate_every: rounds between scores on the validation part; 0 for none.
        ranks: clients' own LoRA ranks, where they differ from the server's.
        told: of clients whose samples are elsewhere, what they say they hold.
    """

    name: str
    clients: Mapping[str, Sequence[Sample]]
    num_rounds: int
    clients_per_round: int
    validate_every: int = 0
    ranks: Mapping[str, int] = field(default_factory=dict)
    told: Mapping[str, Holding] = field(default_factory=dict)

    @property
    def population(self) -> Population:
        """What the server knows of all clients: each has told how many samples it holds of which modalities. Answers are known of clients that are
        simulated here."""
        counts = Counter(profile(sample for samples in self.clients.values() for sample in samples))
        for held in self.told.values():
            counts.update(held.profile)
        return Population(len(self.clients), dict(counts), answer_counts(sample for held in self.clients.values() for sample in held))

    @property
    def num_samples(self) -> int:
        """Of all clients that tell how many they have."""
        return sum(map(len, self.clients.values())) + sum(held.num_samples or 0 for held in self.told.values())

    def claim(self, client: str) -> int | None:
        """How many samples a client has told of: 0 if it withholds that; None of one that was not there before the first round."""
        return self.told[client].num_samples or 0 if client in self.told else len(self.clients[client]) or None

    def cohort(self, seed: int, round_num: int) -> list[str]:
        """The clients of a round, drawn without replacement, sorted."""
        return drawn(sorted(self.clients), self.clients_per_round, seed, round_num)

    def ends(self, round_num: int) -> bool:
        """Whether this round (counted from 1) is the last, after which the test split is asked."""
        return round_num == self.num_rounds

    def validates(self, round_num: int) -> bool:
        """Whether the global model is scored on the validation part after this round."""
        return self.validate_every > 0 and (self.ends(round_num) or round_num % self.validate_every == 0)


def drawn(names: Sequence[str], count: int, seed: int, round_num: int, *again: int) -> list[str]:
    """Clients drawn without replacement, in the order of ``names``; ``again`` numbers further draws of a round."""
    chosen = generator(seed, "cohort", round_num, *again).choice(len(names), size=count, replace=False)
    return [names[i] for i in sorted(chosen)]

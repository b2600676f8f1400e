"""FedMLLM: Empowering Federated Fine-Tuning of Multimodal LLMs. Xu et al., arXiv 2411.14717, 2024: adaptive regularization."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache

from fedmllm.algorithms.base import Client, Fact, require_not_negative, require_within
from fedmllm.algorithms.fedprox import Proximal
from fedmllm.algorithms.strategies.base import Holdings, Remark, Strategy
from fedmllm.errors import ConfigError
from fedmllm.training.rules import LocalRule
from fedmllm.types import Broadcast, Profile

_LAYER = re.compile(r"\.layers\.(\d+)\.")


@dataclass(frozen=True)
class AdaptiveRegularization(Strategy):
    """A proximal term on the middle layers of the decoder.

        loss + (1 + adaptivity d_k) weight (mu / 2) ||w - w_global||^2,   w in layers s .. L - 1 - s of L

    d_k in [0, 1] is the total variation distance between the client's modality profile and that of all clients: the further a
    client is from the federation, the stronger it is held. ``adaptivity = 0`` is the published rule; ``weight = 1`` with
    ``skip_fraction = 0`` besides is FedProx.

    Attributes:
        mu: the pull towards the global weights.
        weight: factor of the term.
        skip_fraction: s as a fraction of the depth, rounded down, in [0, 0.5); published is 4 of 28 layers.
        skip_layers: s itself; -1 for the fraction's.
        adaptivity: how much stronger the pull is on a client that shares no kind of sample with the others.
    """

    mu: float = 0.01
    weight: float = 0.1
    skip_fraction: float = 1 / 7
    skip_layers: int = -1
    adaptivity: float = 0.0

    def __post_init__(self) -> None:
        require_not_negative(mu=self.mu, weight=self.weight, adaptivity=self.adaptivity)
        require_within("skip_fraction", self.skip_fraction, 0, 0.5)

    @property
    def needs(self) -> frozenset[Fact]:
        """Of all clients, if the pull is to depend on it."""
        return frozenset({"profile"} if self.adaptivity else ())

    def rule(self, rule: LocalRule, broadcast: Broadcast, client: Client) -> LocalRule:
        """One more term; none where it would be zero."""
        mu = self.mu * self.weight * (1 + self.adaptivity * profile_distance(client.profile, broadcast.population.profile))
        window = self.window(depth(tuple(broadcast.weights)))
        return rule.with_term(Proximal(mu, lambda name: layer(name) in window)) if mu else rule

    def remark(self, holdings: Holdings) -> Remark | None:
        """Idle without a pull; of a decoder too shallow for the fraction no layer is left out."""
        if not self.mu * self.weight:
            return Remark("its pull is 0", idle=True)
        layers = depth(holdings.tensors)
        if self.skip_layers < 0 and self.skip_fraction > 0 and self.window(layers) == range(layers):
            return Remark(
                f"skip_fraction {self.skip_fraction:.3g} of {layers} layers, rounded down, is 0, so that it holds all of them; "
                "set skip_layers to leave some out at each end",
                idle=False,
            )
        return None

    def window(self, layers: int) -> range:
        """The layers that are held, of a decoder with so many.

        Raises:
            ConfigError: if none is left.
        """
        skipped = int(self.skip_fraction * layers) if self.skip_layers < 0 else self.skip_layers
        if 2 * skipped >= layers:
            raise ConfigError(
                f"adaptive_regularization.skip_layers: leaving out {skipped} layers at each end leaves none of {layers}; lower it"
            )
        return range(skipped, layers - skipped)


@cache
def layer(name: str) -> int | None:
    """The decoder layer a tensor belongs to; None for one of the connector or the embeddings, which are not held."""
    found = _LAYER.search(name)
    return None if found is None else int(found[1])


@cache
def depth(names: tuple[str, ...]) -> int:
    """How many decoder layers the adapters span.

    Raises:
        ConfigError: if no name says.
    """
    found = [number for name in names if (number := layer(name)) is not None]
    if not found:
        raise ConfigError(f"adaptive_regularization: {names[0]} names no decoder layer (.layers.N.); leave the strategy out for this model")
    return 1 + max(found)


def profile_distance(a: Profile, b: Profile) -> float:
    """Total variation distance of two modality profiles as distributions, ``1/2 sum |a_i / |a| - b_i / |b||``; 0 if one is empty."""
    total_a, total_b = sum(a.values()), sum(b.values())
    if not total_a or not total_b:
        return 0.0
    return 0.5 * sum(abs(a.get(kind, 0) / total_a - b.get(kind, 0) / total_b) for kind in a.keys() | b.keys())

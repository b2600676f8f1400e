"""FedMLLM: Empowering Federated Fine-Tuning of Multimodal LLMs. Xu et al., arXiv 2411.14717, 2024: adaptive regularization."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache

from fedmllm.algorithms.base import Fact
from fedmllm.algorithms.checks import require_not_negative, require_within
from fedmllm.algorithms.fedprox import Proximal
from fedmllm.algorithms.state import Client
from fedmllm.algorithms.strategies.base import Holdings, Remark, Strategy
from fedmllm.errors import ConfigError
from fedmllm.training.rules import LocalRule
from fedmllm.types import Broadcast, Profile

_LAYER = re.compile(r"\.layers\.(\d+)\.")


@dataclass(frozen=True)
class AdaptiveRegularization(Strategy):
    """A proximal term on the middle layers of the decoder.

        loss + (1 + adaptivity d_k) weight (mu / 2) ||w - w_global||^2,   w in layers s .. L - 1 - s of L

    d_k in [0, 1] is the total variation distance between the client's modality profile and the profile of all clients. The further a
    client is from the federation, the stronger its proximal term. ``adaptivity = 0`` is the published rule. With ``weight = 1`` and
    ``skip_fraction = 0`` as well, it is FedProx.

    Attributes:
        mu: strength of the pull toward the global weights.
        weight: factor of the term in the loss.
        skip_fraction: s as a fraction of L, rounded down, in [0, 0.5). The published value is 4 of 28 layers.
        skip_layers: s itself; -1 to use ``skip_fraction``.
        adaptivity: how strongly the term grows with d_k. A client whose modality profile has nothing in common with the others' gets
            1 + adaptivity times the term.
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
        """The modality profile, if the term depends on it."""
        return frozenset({"profile"} if self.adaptivity else ())

    def rule(self, rule: LocalRule, broadcast: Broadcast, client: Client) -> LocalRule:
        """Add the proximal term, unless its factor is zero."""
        mu = self.mu * self.weight * (1 + self.adaptivity * profile_distance(client.profile, broadcast.population.profile))
        window = self.window(depth(tuple(broadcast.weights)))
        return rule.with_term(Proximal(mu, lambda name: layer(name) in window)) if mu else rule

    def remark(self, holdings: Holdings) -> Remark | None:
        """Report a factor of 0, which makes the strategy idle, or a decoder too shallow for ``skip_fraction`` to skip any layer."""
        if not self.mu * self.weight:
            return Remark("mu * weight is 0", idle=True)
        layers = depth(holdings.tensors)
        if self.skip_layers < 0 and self.skip_fraction > 0 and self.window(layers) == range(layers):
            return Remark(
                f"skip_fraction {self.skip_fraction:.3g} of {layers} layers rounds down to 0, so it regularizes every layer; "
                "set skip_layers to skip layers at each end",
                idle=False,
            )
        return None

    def window(self, layers: int) -> range:
        """Return the regularized layers of a decoder with ``layers`` layers.

        Raises:
            ConfigError: if no layer is left.
        """
        skipped = int(self.skip_fraction * layers) if self.skip_layers < 0 else self.skip_layers
        if 2 * skipped >= layers:
            raise ConfigError(
                f"adaptive_regularization.skip_layers: skipping {skipped} layers at each end leaves none of {layers}; use a smaller value"
            )
        return range(skipped, layers - skipped)


@cache
def layer(name: str) -> int | None:
    """Return the index of a tensor's decoder layer; None for tensors outside the decoder's layers, which are not regularized."""
    found = _LAYER.search(name)
    return None if found is None else int(found[1])


@cache
def depth(names: tuple[str, ...]) -> int:
    """Return the number of decoder layers that the adapters span.

    Raises:
        ConfigError: if no tensor name contains a layer number.
    """
    found = [number for name in names if (number := layer(name)) is not None]
    if not found:
        raise ConfigError(f"adaptive_regularization: {names[0]} names no decoder layer (.layers.N.); remove the strategy for this model")
    return 1 + max(found)


def profile_distance(a: Profile, b: Profile) -> float:
    """Return the total variation distance of two modality profiles: ``1/2 sum_i |a_i / sum a - b_i / sum b|``; 0 if one is empty."""
    total_a, total_b = sum(a.values()), sum(b.values())
    if not total_a or not total_b:
        return 0.0
    return 0.5 * sum(abs(a.get(kind, 0) / total_a - b.get(kind, 0) / total_b) for kind in a.keys() | b.keys())

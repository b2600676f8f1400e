"""Rules about settings of several sections of an experiment."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fedmllm.algorithms import ALGORITHMS, STRATEGIES, build_algorithm
from fedmllm.engine.schedules import build_schedule
from fedmllm.privacy.lawful import require_client_level, require_sample_level, require_summable

if TYPE_CHECKING:
    from fedmllm.config import Experiment


def require_method(e: Experiment) -> None:
    """Check that the method fits the other sections.

    Raises:
        ValueError: naming the settings that contradict each other, and the remedy.
    """
    method, cohort = build_algorithm(e.algorithm), e.federation.clients_per_round
    if e.lora.client_ranks and not method.heterogeneous_ranks:
        able = [name for name, cls in ALGORITHMS.items() if cls.heterogeneous_ranks]
        raise ValueError(
            f"lora.client_ranks: {e.algorithm.name} needs the same rank at all clients; leave it out, or use {', '.join(able)}"
        )
    if method.changes_frozen and e.model.quantization != "none":
        raise ValueError(
            f"model.quantization: {e.algorithm.name} adds to the frozen weights, which {e.model.quantization} cannot hold exactly; "
            "use none, or another method"
        )
    if method.changes_frozen and e.lora.dora and e.model.dtype != "float32":
        raise ValueError(
            f"lora.dora: {e.algorithm.name} adds to the frozen weights, which {e.model.dtype} cannot hold exactly, but DoRA needs "
            "their exact norms; set model.dtype to float32, or lora.dora to false"
        )
    build_schedule(e.schedule).require(method, e.algorithm.name, e.federation.num_clients, cohort)
    if cohort < method.smallest_cohort:
        raise ValueError(
            f"federation.clients_per_round: {e.algorithm.name} with these parameters needs at least {method.smallest_cohort} clients "
            f"per round, got {cohort}"
        )
    for name in e.algorithm.strategy_names:
        if STRATEGIES[name].wording not in (None, e.data.prompt):
            raise ValueError(f"data.prompt: algorithm.strategies has {name}, data.prompt is {e.data.prompt}; change one of them")


def require_privacy(e: Experiment) -> None:
    """Check that cohorts, method and other sections allow the privacy that is asked for.

    Raises:
        ValueError: naming the settings that contradict each other, and the remedy.
    """
    federation, private = e.federation, e.privacy.unit == "client"
    if federation.sampling == "poisson" and not private:
        raise ValueError("federation.sampling: poisson draws secret cohorts, which only privacy.unit: client needs; use uniform or cyclic")
    if federation.sampling != "uniform" and e.schedule.name != "synchronous":
        raise ValueError(f"federation.sampling: schedule {e.schedule.name} draws clients itself; use uniform, or schedule synchronous")
    _require_bands(e)
    if e.privacy.unit == "none":
        return
    if e.schedule.name != "synchronous":
        raise ValueError(
            f"privacy.unit: {e.privacy.unit} counts rounds, which schedule {e.schedule.name} does not have; use schedule synchronous"
        )
    method = build_algorithm(e.algorithm)
    if not private:
        require_sample_level(method, e.algorithm.name)
        return
    require_client_level(method, ALGORITHMS[e.algorithm.method], e.algorithm.name)
    if federation.sampling == "poisson" and e.compression.name != "none":
        raise ValueError("compression.name: the size of updates reveals a secret cohort; set it to none, or federation.sampling to cyclic")
    if e.privacy.target_delta * federation.num_clients >= 1:
        raise ValueError(
            f"privacy.target_delta: must be less than 1 / federation.num_clients = {1 / federation.num_clients:g}, got "
            f"{e.privacy.target_delta:g}, which would allow one client to be revealed in full"
        )


def _require_bands(e: Experiment) -> None:
    """Check that a client takes part at most every ``privacy.bands`` rounds, with the same tensors and bound each time."""
    privacy, federation, method = e.privacy, e.federation, build_algorithm(e.algorithm)
    if privacy.bands == 1:
        return
    if privacy.unit != "client" or federation.sampling != "cyclic" or privacy.noise != "server" or privacy.clip_quantile is not None:
        raise ValueError(
            f"privacy.bands: {privacy.bands} needs unit: client, noise: server, a fixed clip_norm and federation.sampling: cyclic; set them, or bands to 1"
        )
    if privacy.bands > (period := federation.num_clients // federation.clients_per_round):
        raise ValueError(
            f"privacy.bands: {privacy.bands}, but a client takes part every {period} rounds (num_clients / clients_per_round); set at most {period}"
        )
    if any(method.uploads(0, name) != method.uploads(1, name) for name in ("layer.lora_A.weight", "layer.lora_B.weight")):
        raise ValueError(f"privacy.bands: {e.algorithm.name} uploads other tensors in every round; set bands to 1, or use ffa_lora")


def require_sums(e: Experiment) -> None:
    """Check that updates can be summed by secure aggregation.

    Raises:
        ValueError: naming the settings that contradict each other, and the remedy.
    """
    if not e.privacy.secure_aggregation:
        return
    require_summable(build_algorithm(e.algorithm), ALGORITHMS[e.algorithm.method], e.algorithm.name)
    for setting, value, reason, remedy in (
        ("compression.name", e.compression.name != "none", "compressed updates cannot be added", "none"),
        ("lora.client_ranks", bool(e.lora.client_ranks), "tensors of different ranks cannot be added", "[]"),
        (
            "federation.sampling",
            e.federation.sampling == "poisson",
            "clients learn each other's names, so cohorts are public",
            "cyclic",
        ),
        ("schedule.name", e.schedule.name != "synchronous", "a sum needs the clients of one round", "synchronous"),
        ("privacy.clip_quantile", e.privacy.clip_quantile is not None, "clients do not send its bits in their sum", "null"),
    ):
        if value:
            raise ValueError(f"{setting}: with privacy.secure_aggregation, {reason}; set it to {remedy}")
    if e.engine.name == "flower" and e.engine.server is None:
        raise ValueError(
            "engine.name: workers on this machine have no keys of their own for privacy.secure_aggregation; use in_process, or sites (engine.server)"
        )
    cohort, least = e.federation.clients_per_round, e.privacy.smallest_sum(e.federation.clients_per_round)
    if not 2 <= least <= cohort:
        raise ValueError(
            f"federation.clients_per_round: {cohort}, but privacy.secure_aggregation needs sums of at least {max(2, least)} clients "
            "(privacy.min_clients); raise one or lower the other"
        )
    if e.privacy.assumed_colluders >= least:
        raise ValueError(f"privacy.assumed_colluders: must be less than min_clients, {least}, got {e.privacy.assumed_colluders}")

"""The ``engine`` section of an experiment."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from fedmllm.settings_file import ADVANCED


class EngineConfig(BaseModel):
    """Where clients run."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    name: Literal["in_process", "flower"] = "in_process"
    """``in_process`` trains all clients in this process. ``flower`` trains the federation's clients through Flower, in worker processes on Ray or at
    the sites of ``server``."""
    server: Path | None = None
    """With ``flower``, the ``server.yaml`` of a federation of sites; leave it out for worker processes on this machine."""
    worker_cpus: float = Field(1.0, gt=0, json_schema_extra=ADVANCED)
    """With ``flower``, CPU cores per worker; the run starts as many workers as fit on the machine."""
    worker_gpus: float = Field(0.0, ge=0, json_schema_extra=ADVANCED)
    """With ``flower``, GPUs per worker; a fraction such as 0.25 lets workers share a GPU."""
    device: str = "auto"
    """``auto`` (a GPU if there is one), ``cpu``, ``cuda``, ``cuda:1``, ..."""
    parallel_clients: int = Field(16, gt=0, json_schema_extra=ADVANCED)
    """Maximum number of clients that train in parallel, in the same passes of the model; 1 trains one after another. Always 1 with dropout, or if
    anything but adapters of the decoder trains. A GPU's free memory may allow fewer."""
    answers_only: bool = Field(True, json_schema_extra=ADVANCED)
    """Compute the last decoder layer only at the positions of answers, for model families that support it."""
    feature_bytes: int = Field(4 << 30, ge=0, json_schema_extra=ADVANCED)
    """Disk space in bytes to cache the frozen vision model's features of each image; 0 recomputes them in every pass."""

    @model_validator(mode="after")
    def _sites_over_flower(self) -> EngineConfig:
        if self.server is not None and self.name != "flower":
            raise ValueError(
                f"server: {self.server} names a federation of sites, which name: {self.name} cannot reach; use name: flower, or leave server out"
            )
        return self

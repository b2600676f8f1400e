"""The section ``engine`` of an experiment."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class EngineConfig(BaseModel):
    """Where clients run."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    name: Literal["in_process", "flower"] = "in_process"
    """``in_process``: all clients in this process. ``flower``: the federation's clients elsewhere, through Flower: in worker processes on Ray, or at
    the sites of ``server``."""
    server: Path | None = None
    """``server.yaml`` of a federation of sites, of ``flower``; left out for worker processes on this machine."""
    worker_cpus: float = Field(1.0, gt=0)
    """Cores of one worker, of ``flower``; as many workers are started as there is room for."""
    worker_gpus: float = Field(0.0, ge=0)
    """GPUs of one worker, of ``flower``; a part, such as 0.25, lets workers share one."""
    device: str = "auto"
    """``auto`` (a GPU if there is one), ``cpu``, ``cuda``, ``cuda:1``, ..."""
    together: int = Field(16, gt=0)
    """Clients of a cohort that train side by side in the same passes of the model; 1 for one after another. With dropout, or
    where more than adapters of the decoder trains, always 1; a GPU's free memory may allow fewer."""
    answers_only: bool = True
    """Compute the last decoder layer where answers are, as far as it is known how."""
    feature_bytes: int = Field(4 << 30, ge=0)
    """Room on disk for what the frozen vision part makes of pictures, each once; 0 to compute it anew in every pass."""

    @model_validator(mode="after")
    def _sites_over_flower(self) -> EngineConfig:
        if self.server is not None and self.name != "flower":
            raise ValueError(
                f"server: {self.server} leads to sites, which name: {self.name} does not reach; use name: flower, or leave server out"
            )
        return self

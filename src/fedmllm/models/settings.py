"""The ``model`` section of an experiment."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from fedmllm.settings_file import ADVANCED


class ModelConfig(BaseModel):
    """The model to fine-tune, and how it is loaded."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    name: str = "nano"
    """``nano`` for the embedded model, the path of a Transformers folder, or a Hugging Face hub id."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Data type of the frozen weights. With ``bfloat16`` the forward pass runs under autocast; LoRA weights are always float32."""
    quantization: Literal["none", "4bit"] = "none"
    """``4bit`` quantizes the frozen linear layers to NF4 and computes in bfloat16. Requires ``dtype: bfloat16``, a GPU and
    ``fedmllm[quantized]``."""
    max_length: int = Field(1024, gt=0)
    """Maximum number of tokens in prompt plus answer. The model's own limit applies if it is lower."""
    max_image_side: int | None = Field(None, gt=0)
    """Images with a longer side than this, in pixels, are scaled down before the processor sees them. Null applies only the processor's
    own limits."""
    max_slices: int | None = Field(None, gt=0, json_schema_extra=ADVANCED)
    """Maximum number of slices (tiles) into which the processor cuts an image, not counting the view of the whole image. Null keeps the
    processor's own limit."""
    onednn: bool = Field(True, json_schema_extra=ADVANCED)
    """Compute frozen float32 layers with oneDNN on CPUs with AVX-512. This is up to twice as fast; results agree to float tolerance."""
    gradient_checkpointing: bool = False
    """In training, store only the inputs of each decoder layer and recompute the rest in the backward pass. Uses less memory and more time."""
    revision: str | None = Field(None, json_schema_extra=ADVANCED)
    """Branch, tag or commit on the hub; null for the default branch."""
    trust_remote_code: bool = Field(False, json_schema_extra=ADVANCED)
    """Run Python code that comes with the model. Such code can do anything that you can do. A hub model also needs ``revision``, the commit
    that you trust."""
    fingerprint: str | None = Field(None, json_schema_extra=ADVANCED)
    """The expected fingerprint of the model's settings and weights; any other model is rejected. Every run records its model's
    fingerprint. Null accepts any model."""

    @model_validator(mode="after")
    def _computes_in_bfloat16(self) -> ModelConfig:
        if self.quantization != "none" and self.dtype != "bfloat16":
            raise ValueError(f"quantization: {self.quantization} computes in bfloat16, but dtype is {self.dtype}; set dtype to bfloat16")
        return self

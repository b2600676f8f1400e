from __future__ import annotations

import importlib.util
import json
import shutil
import tomllib
from pathlib import Path

import httpx
import pytest
import torch
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError
from packaging.requirements import Requirement
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoProcessor

from fedmllm.data.federated import FederatedData
from fedmllm.errors import ModelError
from fedmllm.models.encoding import answer_nll, collate
from fedmllm.models.load import OLDEST_TRANSFORMERS, choose_device, load_model, require_transformers
from fedmllm.models.processors import load_processor, needs_torchvision
from fedmllm.models.settings import ModelConfig
from fedmllm.models.source import NANO_FOLDER
from fedmllm.training.batches import Encoder
from minicpmv_stand_in import StandIn
from tiny_models import RECIPES, make, processor


def load(name: str | Path) -> None:
    load_model(ModelConfig(name=str(name)), torch.device("cpu"))


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of the embedded model's folder, for tests that damage it."""
    return shutil.copytree(NANO_FOLDER, tmp_path / "model")


def test_a_copy_of_the_folder_loads_like_any_other_model(copy: Path) -> None:
    vlm = load_model(ModelConfig(name=str(copy), dtype="bfloat16"), torch.device("cpu"))
    assert next(vlm.model.parameters()).dtype == torch.bfloat16
    assert not vlm.model.training
    assert not any(parameter.requires_grad for parameter in vlm.model.parameters())
    assert vlm.max_length == 512


def test_a_folder_without_weights(copy: Path) -> None:
    (copy / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"has no weights in \*\.safetensors"):
        load(copy)


def test_pickled_weights_are_not_read(copy: Path) -> None:
    (copy / "model.safetensors").unlink()
    torch.save({}, copy / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"only pytorch_model\.bin, which can run code"):
        load(copy)


def test_damaged_weights(copy: Path) -> None:
    file = copy / "model.safetensors"
    file.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(ModelError, match="cannot be loaded"):
        load(copy)


def test_weights_that_lack_a_layer_are_refused(copy: Path) -> None:
    """Transformers would initialize the layer at random, and the run would train on it."""
    weights = load_file(copy / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if ".layers.3." not in name}
    save_file(kept, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError) as refused:
        load(copy)
    assert f"{len(weights) - len(kept)} of the model's tensors are missing" in str(refused.value)
    assert "language_model.layers.3.input_layernorm.weight" in str(refused.value)


def test_tied_weights_are_not_missing(tmp_path: Path) -> None:
    """The head is the embedding matrix, which the file holds once."""
    make("gemma3", tmp_path)
    vlm = load_model(ModelConfig(name=str(tmp_path)), torch.device("cpu"))
    assert vlm.model.get_output_embeddings().weight is vlm.model.get_input_embeddings().weight
    assert not any("lm_head" in name for name in load_file(tmp_path / "model.safetensors"))


def test_tensors_that_the_model_does_not_use_are_reported(copy: Path, caplog: pytest.LogCaptureFixture) -> None:
    weights = load_file(copy / "model.safetensors")
    save_file({**weights, "model.further.weight": torch.zeros(2)}, copy / "model.safetensors", metadata={"format": "pt"})
    load(copy)
    assert "does not use 1 of the tensors in its *.safetensors, e.g. model.further.weight" in caplog.text


@pytest.mark.parametrize("file", ["model.safetensors", "tokenizer.json"])
def test_a_folder_cloned_without_its_large_files(file: str, copy: Path) -> None:
    (copy / file).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 7923120\n")
    with pytest.raises(ModelError, match=f"git-lfs pointers instead of {file}; download the files"):
        load(copy)


def test_a_folder_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"has no config\.json"):
        load(tmp_path)


@pytest.mark.parametrize("name", ["./nowhere", "/no/such/model", "a/b/c"])
def test_a_missing_folder(name: str) -> None:
    with pytest.raises(ModelError, match="is not a folder"):
        load(name)


def test_a_model_without_chat_template(copy: Path) -> None:
    (copy / "chat_template.jinja").unlink()
    with pytest.raises(ModelError, match="no chat template"):
        load(copy)


def test_a_model_without_processor(copy: Path) -> None:
    for name in ("processor_config.json", "tokenizer.json", "tokenizer_config.json"):
        (copy / name).unlink()
    with pytest.raises(ModelError, match="cannot be loaded"):
        load(copy)


@pytest.mark.parametrize(
    ("name", "error", "part"),
    [
        (
            "nobody/nothing",
            RepositoryNotFoundError,
            r"'nobody/nothing' cannot be loaded: nobody/nothing is not a local folder and is not a valid",
        ),
        ("some/gated", GatedRepoError, r"'some/gated' is gated; accept its terms on its hub page, and log in with 'hf auth login'"),
    ],
)
def test_errors_of_the_hub_are_explained(name: str, error: type[HfHubHTTPError], part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub's own errors, as its client raises them."""

    def refuse(*args: object, **kwargs: object) -> None:
        raise error("403 Client Error", response=httpx.Response(403, request=httpx.Request("GET", "https://hub/config.json")))

    monkeypatch.setattr("transformers.utils.hub.hf_hub_download", refuse)
    with pytest.raises(ModelError, match=part):
        load_model(ModelConfig(name=name), torch.device("cpu"))


def test_a_hub_model_without_a_network_gets_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise LocalEntryNotFoundError("an error happened while trying to locate the file on the Hub")

    monkeypatch.setattr("transformers.utils.hub.hf_hub_download", refuse)
    with pytest.raises(
        ModelError, match=r"'some/model' is not a folder, is not in the hub's cache, and the hub cannot be reached; download it"
    ):
        load_model(ModelConfig(name="some/model"), torch.device("cpu"))


@pytest.mark.parametrize("device", ["gpu", "cuda:99", "tpu"])
def test_unavailable_devices_are_refused(device: str) -> None:
    with pytest.raises(ModelError, match=r"engine\.device"):
        choose_device(device)


REMOTE = {
    "configuration_own.py": """
from transformers import PretrainedConfig

class OwnConfig(PretrainedConfig):
    model_type = "minicpmv"
""",
    "modeling_own.py": """
import torch
from transformers import PreTrainedModel
from minicpmv_stand_in import StandIn
from .configuration_own import OwnConfig

class Own(PreTrainedModel):
    config_class = OwnConfig

    def __init__(self, config):
        super().__init__(config)
        self.inner = StandIn(1028, 4)
        self.llm = self.inner.llm
        self.post_init()

    def get_decoder(self):
        return self.llm

    def get_output_embeddings(self):
        return self.llm.lm_head

    def forward(self, data, **kwargs):
        return self.inner(data, **kwargs)
""",
    "processing_own.py": """
from minicpmv_stand_in import StandInProcessor

class OwnProcessor(StandInProcessor):
    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        return cls()

    @classmethod
    def register_for_auto_class(cls, *args, **kwargs):
        pass
""",
    "config.json": json.dumps(
        {
            "model_type": "minicpmv",
            "auto_map": {
                "AutoConfig": "configuration_own.OwnConfig",
                "AutoModel": "modeling_own.Own",
                "AutoProcessor": "processing_own.OwnProcessor",
            },
        }
    ),
}
"""A folder that contains the model's own code, as MiniCPM-V 2.6's does."""


def test_a_models_own_code_runs_only_if_it_is_trusted(tmp_path: Path, federation: FederatedData) -> None:
    for name, content in REMOTE.items():
        (tmp_path / name).write_text(content)
    torch.manual_seed(0)
    weights = {f"inner.{name}": tensor.clone() for name, tensor in StandIn(1028, 4).state_dict().items()}
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"comes with its own code.* model\.trust_remote_code"):
        load_model(ModelConfig(name=str(tmp_path)), torch.device("cpu"))
    vlm = load_model(ModelConfig(name=str(tmp_path), trust_remote_code=True), torch.device("cpu"))
    with torch.no_grad():
        nll = answer_nll(vlm, collate(vlm, [Encoder(vlm, "agnostic")(federation.clients["client-00"][0])]))
    assert torch.isfinite(nll).all()
    assert nll.sum() > 0


def test_the_oldest_transformers_is_the_required_one() -> None:
    """The floor in the package's requirements equals the floor checked when a model is loaded."""
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    (asked,) = (Requirement(row) for row in project["dependencies"] if row.startswith("transformers"))
    assert OLDEST_TRANSFORMERS in asked.specifier
    assert not asked.specifier.contains("5.22.4")


def test_an_old_transformers_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for version in ("5.23.0", "5.23.1", "5.100"):
        require_transformers(version)
    monkeypatch.setattr("fedmllm.models.load.metadata.version", lambda name: "5.17.0")
    with pytest.raises(
        ModelError, match=r"Transformers 5\.23 or later is required, 5\.17\.0 is installed; pip install 'transformers>=5\.23'"
    ):
        load_model(ModelConfig(), torch.device("cpu"))


def test_code_from_the_hub_needs_a_commit() -> None:
    with pytest.raises(ModelError, match=r"name the commit you trust in model\.revision"):
        load_model(ModelConfig(name="someone/model", trust_remote_code=True), torch.device("cpu"))


def test_a_processor_with_videos_loads_without_them(tmp_path: Path) -> None:
    """The class comes from the processor's settings, for any kind of model. torchvision, which videos need, is not installed here."""
    make("qwen3_vl", tmp_path)
    assert type(load_processor(str(tmp_path))).__name__ == "Qwen3VLProcessor"
    (tmp_path / "video_preprocessor_config.json").write_text('{"video_processor_type": "Qwen3VLVideoProcessor"}')
    assert type(load_processor(str(tmp_path))).__name__ == "Qwen3VLProcessor"
    settings = json.loads((tmp_path / "processor_config.json").read_text())
    (tmp_path / "processor_config.json").write_text(json.dumps(settings | {"processor_class": "Qwen2_5_VLProcessor"}))
    assert type(load_processor(str(tmp_path))).__name__ == "Qwen2_5_VLProcessor"
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match="cannot be loaded"):
        load(tmp_path)


@pytest.mark.parametrize("kind", RECIPES)
def test_a_saved_processor_loads_or_needs_torchvision(tmp_path: Path, kind: str) -> None:
    """Without torchvision, Transformers cannot make a processor with videos. With it, Transformers makes this one from the saved settings."""
    processor(kind).save_pretrained(tmp_path / "base")
    AutoConfig.for_model(kind).save_pretrained(tmp_path / "base")
    loaded = load_processor(str(tmp_path / "base"))
    loaded.save_pretrained(tmp_path / "merged")
    AutoConfig.for_model(kind).save_pretrained(tmp_path / "merged")
    for folder in ("base", "merged"):
        assert ("video_processor" in json.loads((tmp_path / folder / "processor_config.json").read_text())) is needs_torchvision(loaded)
        if needs_torchvision(loaded) and importlib.util.find_spec("torchvision") is None:
            with pytest.raises((ImportError, ValueError), match="torchvision"):
                AutoProcessor.from_pretrained(tmp_path / folder)
        else:
            AutoProcessor.from_pretrained(tmp_path / folder)


def test_settings_for_videos_are_saved_unchanged(tmp_path: Path) -> None:
    processor("qwen3_vl").save_pretrained(tmp_path)
    own = {"video_processor_type": "Qwen3VLVideoProcessor", "fps": 3}
    settings = json.loads((tmp_path / "processor_config.json").read_text())
    del settings["video_processor"]
    (tmp_path / "processor_config.json").write_text(json.dumps(settings))
    (tmp_path / "video_preprocessor_config.json").write_text(json.dumps(own))
    load_processor(str(tmp_path)).save_pretrained(tmp_path / "merged")
    assert json.loads((tmp_path / "merged" / "processor_config.json").read_text())["video_processor"] == own
    load_processor(str(tmp_path / "merged")).save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "processor_config.json").read_text())["video_processor"] == own

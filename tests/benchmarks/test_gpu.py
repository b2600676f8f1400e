"""The GPU benchmark script: every stage on a CPU with tiny models, and its counts compared with published ones."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import gpu
import pytest
import torch
from gpu_stages.bench import Bench
from gpu_stages.flops import needed_flops
from gpu_stages.models import SIZES, adapted, build, samples
from gpu_stages.stages import STAGES
from gpu_table import report, table
from torch.utils.flop_counter import FlopCounterMode

from fedmllm.models.encoding import Encoded, answer_nll, collate

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
Row = dict[str, Any]
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*:UserWarning:bitsandbytes"),
    pytest.mark.filterwarnings("ignore:.*:DeprecationWarning:torch"),
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),
]


def bench(tmp_path: Path, stage: str, device: str = "cpu") -> Bench:
    return Bench(stage, tmp_path / "rows.jsonl", torch.device(device), tiny=device == "cpu", seconds=30)


def rows(tmp_path: Path) -> list[Row]:
    return [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]


def test_the_stages_time_limits_sum_to_less_than_ten_minutes() -> None:
    assert list(gpu.LIMITS) == list(STAGES)
    assert sum(gpu.LIMITS.values()) < 620


# The stage without fla removes a package from its process.
@pytest.mark.slow
@pytest.mark.parametrize("stage", [name for name in STAGES if name != "minicpm_without_fla"])
def test_every_stage_completes(stage: str, tmp_path: Path) -> None:
    STAGES[stage](bench(tmp_path, stage))
    found = rows(tmp_path)
    assert found
    assert {row["stage"] for row in found} == {stage}
    assert all(row.get("passed", True) for row in found)
    assert all(row["distance"] < 0.05 for row in found if "distance" in row)
    assert all(row["seconds"] > 0 for row in found if row.get("seconds") is not None)
    shown = table(report([*found, {"stage": stage, "outcome": "ok", "wall": 1.0}], tiny=True))
    assert all(row["name"].replace("|", "/") in shown or row["name"] == "versions" for row in found)


@pytest.mark.slow
def test_the_script_completes_with_tiny_models(tmp_path: Path) -> None:
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), "--tiny", "--device", "cpu", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + (tmp_path / "log.txt").read_text()
    whole = json.loads((tmp_path / "gpu.json").read_text())
    assert [row["outcome"] for row in whole["stages"]] == ["ok"] * len(STAGES)
    assert done.stdout.endswith((tmp_path / "table.md").read_text() + "\n")


def run_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> tuple[int, Row]:
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--tiny", "--device", "cpu", "--out", str(tmp_path), *arguments])
    return gpu.main(), json.loads((tmp_path / "gpu.json").read_text())


@pytest.mark.slow
def test_a_failed_stage_loses_only_its_own_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(gpu.LIMITS, "train_3b", 0.5)
    monkeypatch.setitem(gpu.LIMITS, "nothing", 30)
    code, whole = run_script(tmp_path, monkeypatch, "--only", "train_3b", "nothing", "ceilings")
    assert code == 1
    assert [row["outcome"] for row in whole["stages"]] == ["timed out", "failed", "ok"]
    assert {row["stage"] for row in whole["rows"]} == {"ceilings"}
    assert "invalid choice: 'nothing'" in (tmp_path / "log.txt").read_text()
    assert "| ceilings | matrix |" in capsys.readouterr().out


def test_no_stage_starts_after_the_deadline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code, whole = run_script(tmp_path, monkeypatch, "--deadline", "4")
    assert code == 1
    assert {row["outcome"] for row in whole["stages"]} == {"no time left"}


def test_a_later_run_replaces_only_its_own_stages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter((1.0, 2.0, 3.0))

    def run(stage: str, left: float, folder: Path, options: object) -> str:
        with (folder / "rows.jsonl").open("a") as file:
            file.write(json.dumps({"stage": stage, "name": "launch", "seconds": next(seconds)}) + "\n")
        return "ok"

    monkeypatch.setattr(gpu, "run", run)
    run_script(tmp_path, monkeypatch, "--only", "ceilings", "profile")
    code, whole = run_script(tmp_path, monkeypatch, "--only", "profile")
    assert code == 0
    assert [(row["stage"], row["seconds"]) for row in whole["rows"]] == [("ceilings", 1.0), ("profile", 3.0)]
    assert [row["stage"] for row in whole["stages"]] == ["ceilings", "profile"]


def test_annotated_ranges_are_not_counted_as_kernels(tmp_path: Path) -> None:
    """An optimizer step spans time in which the device may be idle."""
    STAGES["profile"](bench(tmp_path, "profile"))
    assert not [row for row in rows(tmp_path) if row["name"].startswith("Optimizer.step")]


def test_rows_measured_before_an_interruption_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An incomplete last row of a process that was killed is dropped."""

    def run(stage: str, seconds: float, folder: Path, options: object) -> str:
        if stage == "correctness":
            raise KeyboardInterrupt
        with (folder / "rows.jsonl").open("a") as file:
            file.write(json.dumps({"stage": stage, "name": "launch", "seconds": 1.0}) + '\n{"stage": "cei\n')
        return "ok"

    monkeypatch.setattr(gpu, "run", run)
    code, whole = run_script(tmp_path, monkeypatch)
    assert code == 1
    assert [row["stage"] for row in whole["stages"]] == [row["stage"] for row in whole["rows"]] == ["versions", "ceilings"]


def test_a_failed_first_stage_ends_the_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(
        gpu, "run", lambda stage, seconds, folder, options: (folder / "log.txt").write_text("ModelError: too old") and "failed"
    )
    code, whole = run_script(tmp_path, monkeypatch)
    assert code == 1
    assert len(whole["stages"]) == 1
    assert "nothing else is measured: ModelError: too old" in capsys.readouterr().out


def test_derived_columns_match_a_hand_computation() -> None:
    """120 samples in 2 s, a Trainer's 8 in 1 s; 5e12 needed FLOPs in 2 s at 1e13 per second; 100 + 16 * 3 * 10 + 7 * 40 bytes planned."""
    trained = {"samples": 120, "tokens": 36000, "seconds": 2.0, "least": 1.9, "most": 2.1, "runs": 3, "flops": 5e12}
    trained |= {"clients": 10, "pass_tokens": 40, "halvings": 0, "model": "3b", "shape": "1 x 4, 300", "peak_bytes": 2**30}
    given = [
        {"stage": "ceilings", "name": "matrix", "seconds": 1.0, "flops_per_s": 1e13},
        {"stage": "train_3b", "name": "K = 10", **trained},
        {"stage": "train_3b", "name": "plan", "weight_bytes": 100, "trainable": 3, "bytes_per_token": 7, "seconds": None},
        {"stage": "trainer", "name": "Trainer", **trained, "samples": 8, "seconds": 1.0, "clients": 1},
        {"stage": "correctness", "name": "alone", "distance": 1.0, "limit": 1e-4, "passed": False},
        {"stage": "train_3b", "outcome": "ok", "wall": 10.0},
    ]
    whole = report(given)
    row = whole["rows"][1]
    assert (row["samples_per_s"], row["times_trainer"], row["mfu"], row["planned_bytes"]) == (60.0, 7.5, 0.25, 860)
    assert not whole["passed"]
    text = table(whole)
    assert "| train_3b | K = 10 | 2 (1.9 to 2.1) | 60.0 | 18,000 | 25.0% | 7.5 | 1.00 | 0.00 | 40 | 0 |  |" in text
    assert "| alone | 1.0e+00 | 1e-04 | **no** |" in text
    assert "mfu" not in report(given[1:])["rows"][0]


PUBLISHED = {
    "3b": (3_754_622_976, 3_085_938_688),
    "7b": (8_292_166_656, 7_070_619_136),
    "135m": (None, 134_588_736),
    "minicpm": (None, None),
}
"""Parameters of the whole model, and of the decoder with embeddings but without a separate output head.

The third decoder is SmolLM2 with 134,515,008 parameters and 128 more tokens of width 576. For the fourth model no counts by
part are published.
"""


@pytest.mark.parametrize("name", SIZES)
def test_dimensions_equal_the_published_models(name: str, tmp_path: Path) -> None:
    model = build(bench(tmp_path, "x", "meta"), name).model
    whole, decoder = (sum(weight.numel() for weight in module.parameters()) for module in (model, model.get_decoder()))
    expected = PUBLISHED[name]
    assert expected[0] in (None, whole)
    assert expected[1] in (None, decoder)


def test_samples_have_the_requested_lengths(tmp_path: Path) -> None:
    vlm = build(bench(tmp_path, "x"), "3b", torch.float32)
    lengths = [len(sample.input_ids) for sample in samples(vlm, 200, 90)]
    assert 82 <= min(lengths) < 84 < 96 < max(lengths) <= 98
    assert {len(sample.input_ids) for sample in samples(vlm, 5, 90, spread=0.0)} == {90}
    for sample in samples(vlm, 20, 90):
        assert all(len(row) == len(sample.input_ids) for row in sample.by_token.values())
    assert not any(sample.pictured for sample in samples(vlm, 3, 90, pictured=False))


def test_needed_operations_equal_pytorchs_count(tmp_path: Path) -> None:
    """Exactly as PyTorch counts one sample's pass, except attention, which has its own formula."""
    vlm = adapted(build(bench(tmp_path, "x"), "3b", torch.float32))
    text, (sample,) = vlm.model.config.get_text_config(), samples(vlm, 1, 90)
    vlm.model.train()
    batch = collate(vlm, [sample])
    with FlopCounterMode(display=False) as counter:
        answer_nll(vlm, batch).sum().backward()  # type: ignore[no-untyped-call]
    counts = {str(operation): count for operation, count in counter.get_flop_counts()["Global"].items()}
    products = sum(count for name, count in counts.items() if "attention" not in name)
    width, inner, tokens, vocabulary = 32, 64, len(sample.input_ids), text.vocab_size
    attention = 6 * tokens**2 * width
    # The first layer's q, k and v, with 32, 16 and 16 outputs, pass no gradient to their input, neither frozen nor as factors of rank 8.
    first = 2 * tokens * width * (32 + 16 + 16) + 2 * tokens * 8 * 3 * width
    # The last layer's q, o and feed-forward part, and the output head, compute the answer's columns and one more.
    column = 4 * (2 * width * width + 3 * width * inner) + 6 * 2 * 8 * (width + width) + 4 * vocabulary * width
    assert products == needed_flops(text, [sample]) - attention - first + column


def test_operations_of_the_published_model_match_a_hand_computation() -> None:
    """Qwen2.5-VL-3B's decoder: 10.8 GFLOP per token for frozen weights, attention 0.13 at 300 tokens and 0.53 at 1,200, factors 0.2 %."""
    from transformers import AutoConfig

    settings = SIZES["3b"].settings(lambda token: 0)
    text = AutoConfig.for_model("qwen2_5_vl", **settings).get_text_config()
    for tokens, attention in ((300, 0.13), (1200, 0.52)):
        sample = Encoded(torch.zeros(tokens, dtype=torch.long), 2, {})
        found = needed_flops(text, [sample]) / tokens / 1e9
        assert found == pytest.approx(10.8 + attention + 0.022, rel=0.005)

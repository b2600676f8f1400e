"""The command line as a user sees it, including errors."""

from __future__ import annotations

import io
import json
import re
import signal
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import chdir, contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from unittest import mock

import pytest
import yaml
from PIL import Image

from fedmllm.cli.main import main
from fedmllm.config import Experiment
from fedmllm.models.source import NANO_FOLDER
from run_folders import SMALL

QUICK = """
data: {dataset: digits-claims, num_train: 40, num_test: 20}
federation: {num_clients: 2, clients_per_round: 1, num_rounds: 2, scenario: missing-0.3}
evaluation: {every: 1, baselines: [zero_shot]}
engine: {device: cpu}
"""


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A command in this process, which has loaded everything already."""
    out, err = io.StringIO(), io.StringIO()
    with chdir(folder), redirect_stdout(out), redirect_stderr(err), mock.patch.object(sys, "argv", ["fedmllm", *arguments]):
        try:
            main()
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
    return subprocess.CompletedProcess(arguments, code, out.getvalue(), err.getvalue())


def run_in_own_process(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A command in its own process, as from a shell."""
    command = [sys.executable, "-m", "fedmllm", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=600, check=False)


def make_a_run_of_a_scripts_method(folder: Path) -> None:
    """Edit the run as if a script with its own registered method had trained it."""
    settings = yaml.safe_load((folder / "config.yaml").read_text())
    settings["algorithm"] = {"name": "mine", "parameters": {"pull": 0.5}}
    settings["lora"]["client_ranks"] = [4, 8]
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))


def run_the_docs_snippets(folder: Path) -> None:
    """Run the snippets of docs/python.md that load and use the adapter. Deprecation warnings of libraries, which readers would see, are errors."""
    text = (Path(__file__).parents[2] / "docs" / "python.md").read_text()
    text = text.partition("## Use the adapter without fedmllm")[2]
    code = "\n".join(re.findall(r"```python\n(.*?)```", text, re.DOTALL)).replace("runs/mine", str(folder))
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()) as printed:
        warnings.simplefilter("error", FutureWarning)
        exec(code, {})
    assert printed.getvalue().startswith("{'no': 0.")


@pytest.fixture
def quick(tmp_path: Path) -> Path:
    (tmp_path / "quick.yaml").write_text(QUICK)
    return tmp_path


def test_train_evaluate_and_report(quick: Path) -> None:
    trained = run(quick, "train", "quick.yaml", "--output", "out")
    assert trained.returncode == 0, trained.stderr
    assert re.search(
        r"^plan  3,953,904 parameters, 73,728 trained; each client sends 295 kB per round; memory .* per token in a pass$",
        trained.stdout,
        re.M,
    )
    for part in ("federated round 1/2", "loss", "sent", "left", "zero-shot", "ceiling", "out/report.html"):
        assert part in trained.stdout
    assert "\x1b" not in trained.stdout
    assert list((quick / "out" / "tensorboard").iterdir())
    evaluated = run(quick, "evaluate", "out")
    assert evaluated.returncode == 0, evaluated.stderr
    assert "metric  auc" in evaluated.stdout
    picture = Image.new("RGB", (64, 64), "white")
    picture.save(quick / "x.png")
    asked = run(
        quick, "chat", "out", "Is it misleading?", "--image", "x.png", "--text", "7 is written", "--option", "no", "--option", "yes"
    )
    assert asked.returncode == 0, asked.stderr
    answer, *options = asked.stdout.splitlines()
    chances = {name: float(chance) for chance, name in map(str.split, options)}
    assert set(chances) == {"no", "yes"}
    assert answer == max(chances, key=chances.__getitem__)
    assert sum(chances.values()) == pytest.approx(1, abs=2e-3)
    kept, answers = (json.loads((quick / "out" / f"{name}.json").read_text()) for name in ("manifest", "predictions"))
    assert answers["ids"] == [sample["id"] for sample in kept["test"]["samples"]]
    assert len(answers["ids"]) == len(answers["truth"]) == 20
    run_the_docs_snippets(quick / "out")
    make_a_run_of_a_scripts_method(quick / "out")
    for command in (("evaluate", "out"), ("chat", "out", "Is it?", "--text", "7"), ("merge", "out", "--output", "of-a-script")):
        done = run(quick, *command)
        assert done.returncode == 0, done.stderr
    missing = run(quick, "chat", "out", "Is it misleading?", "--image", "none.png")
    assert (missing.returncode, "none.png: no such image" in missing.stderr) == (2, True)
    assert run(quick, "merge", "out", "--output", "merged").stdout == "model  merged\n"
    assert "AutoProcessor" in (quick / "merged" / "README.md").read_text()
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {path.name for path in (quick / "merged").iterdir()}
    (quick / "out" / "report.html").unlink()
    assert run(quick, "report", "out").returncode == 0
    assert (quick / "out" / "report.html").is_file()


def test_data_list_show_and_export(quick: Path) -> None:
    names = run(quick, "data", "list", "--json")
    assert {"datasets", "scenarios", "settings", "heterogeneity"} == set(json.loads(names.stdout))
    assert "emojitwo" in run(quick, "data", "list").stdout
    shown = run(quick, "data", "show", "quick.yaml", "--picture", "clients.png")
    assert shown.returncode == 0, shown.stderr
    assert "specific wording" in shown.stdout
    assert (quick / "clients.png").is_file()
    clients = json.loads(run(quick, "data", "show", "quick.yaml", "--json").stdout)["clients"]
    assert [set(client) for client in clients] == [{"id", "num_samples", "labels", "modalities"}] * 2
    assert run(quick, "data", "export", "quick.yaml", "--output", "split").returncode == 0
    again = json.loads(run(quick, "data", "show", "split/experiment.yaml", "--json").stdout)
    assert again["clients"] == clients


def test_a_console_with_a_limited_encoding_replaces_characters(quick: Path) -> None:
    rows = [{"t": str(i), "a": "良性" if i % 2 else "恶性"} for i in range(40)]
    (quick / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    settings = {"columns": {"text": "t", "answer": "a"}, "question": "?", "choices": ["良性", "恶性"], "train": "t.jsonl"}
    (quick / "own.yaml").write_text(
        yaml.safe_dump({"data": {"dataset": "jsonl", "root": ".", "options": settings}, "federation": {"num_clients": 2}})
    )
    console = io.TextIOWrapper(io.BytesIO(), encoding="cp1252")
    with chdir(quick), mock.patch.object(sys, "stdout", console), mock.patch.object(sys, "argv", ["fedmllm", "data", "show", "own.yaml"]):
        with pytest.raises(SystemExit) as end:
            main()
        assert end.value.code in (0, None)
        console.flush()
        assert b"Options: A. ?? B. ??" in console.buffer.getvalue()  # type: ignore[attr-defined]


def test_models_can_be_listed_and_planned(quick: Path) -> None:
    kinds = json.loads(run(quick, "models", "list", "--json").stdout)
    assert kinds["smolvlm"]["family"] == "idefics3"
    assert "MiniCPM-V 4.6" in run(quick, "models", "list").stdout
    options = ("--rank", "4", "--connector", "full", "--embeddings", "full")
    plan = json.loads(run(quick, "models", "plan", "nano", *options, "--json").stdout)
    assert plan["trainable"] * 4 == plan["sent_per_client_and_round"] == (6 * 4 * 4 * (192 + 192) + 64_896 + 196_608) * 4
    shown = run(quick, "models", "plan", "nano", "--rank", "4").stdout
    assert all(part in shown for part in ("36,864", "embeddings", "393 kB"))
    wrong = run(quick, "models", "plan", "./nowhere")
    assert wrong.returncode == 2
    assert "is not a folder" in wrong.stderr


@pytest.mark.slow
def test_the_default_folder_is_named_after_experiment_and_time(quick: Path) -> None:
    assert run(quick, "train", "quick.yaml", "evaluation.baselines=[]", "federation.num_rounds=1").returncode == 0
    (folder,) = (quick / "runs").iterdir()
    assert folder.name.startswith("quick-2")


@pytest.mark.slow
def test_two_runs_in_one_second_have_their_own_folders(quick: Path) -> None:
    """The same experiment is started twice in one second, with two seeds."""
    command = [
        sys.executable,
        "-m",
        "fedmllm",
        "train",
        "quick.yaml",
        "evaluation.baselines=[]",
        "federation.num_rounds=1",
        "--track",
        "none",
    ]
    clock = "from types import SimpleNamespace; from fedmllm.run import folders; "
    clock += "folders.time = SimpleNamespace(strftime=lambda form: '20250101-000000'); "
    code = clock + "import sys; from fedmllm.cli.main import main; sys.argv[0] = 'fedmllm'; main()"
    command[1:3] = ["-c", code]
    running = [subprocess.Popen([*command, f"seed={seed}"], cwd=quick, stdout=subprocess.PIPE, text=True) for seed in (0, 1)]
    printed = [process.communicate(timeout=600)[0] for process in running]
    assert [process.returncode for process in running] == [0, 0]
    folders = sorted((quick / "runs").iterdir())
    assert [folder.name for folder in folders] == ["quick-20250101-000000", "quick-20250101-000000-2"]
    seeds = {}
    for folder in folders:
        seeds[folder.name] = yaml.safe_load((folder / "config.yaml").read_text())["seed"]
        assert json.loads((folder / "manifest.json").read_text())["seed"] == seeds[folder.name]
        assert json.loads((folder / "result.json").read_text())["seed"] == seeds[folder.name]
        assert len((folder / "metrics.jsonl").read_text().splitlines()) == 1
        assert f"run folder  runs/{folder.name}\n" in printed[seeds[folder.name]]
    assert sorted(seeds.values()) == [0, 1]


@pytest.mark.slow
def test_resume_finds_the_last_run_with_the_exact_name(quick: Path) -> None:
    """An experiment whose name has the same start is not resumed. Of several runs of one second, the last is."""
    (quick / "quick-b.yaml").write_text(QUICK.replace("seed: 0", "") + "seed: 3\n")
    for name, seed in (("quick-20250101-000000-2", 0), ("quick-20250101-000000-10", 0), ("quick-b-20260101-000000", 3)):
        config = Experiment.parse(yaml.safe_load(QUICK) | {"seed": seed})
        (quick / "runs" / name).mkdir(parents=True)
        (quick / "runs" / name / "config.yaml").write_text(config.to_yaml())
    done = run(quick, "train", "quick.yaml", "--resume", "--track", "none")
    assert done.returncode == 0, done.stderr
    assert "run folder  runs/quick-20250101-000000-10\n" in done.stdout
    nothing = run(quick, "train", "quick.yaml", "--resume", "--output", "quick.yaml")
    assert (nothing.returncode, "quick.yaml is a file" in nothing.stderr) == (2, True)


@pytest.mark.parametrize(
    "command",
    [
        ("train", "quick.yaml"),
        ("merge", "nowhere"),
        ("data", "export", "quick.yaml"),
        ("sweep", "grid.yaml"),
        ("pretrain-nano",),
    ],
)
def test_a_folder_that_cannot_be_created_is_refused_before_any_work(command: tuple[str, ...], quick: Path) -> None:
    (quick / "grid.yaml").write_text(yaml.safe_dump(SMALL))
    with mock.patch("fedmllm.data.federated.load_dataset", side_effect=AssertionError("the data were loaded")):
        done = run(quick, *command, "--output", "quick.yaml/out")
    assert done.returncode == 2
    assert (
        done.stderr
        == f"error: quick.yaml/out{'/cells' * ('sweep' in command)}: cannot be a folder, because {quick}/quick.yaml is a file; choose another folder\n"
    )


@contextmanager
def limited_files(size: int) -> Iterator[None]:
    """Within this block no file of this process can become larger."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.slow
def test_a_full_disk_is_one_message_and_the_run_can_be_resumed(quick: Path) -> None:
    """No file may exceed 200 kB, so the first checkpoint, of 295 kB, cannot be written."""
    arguments = ["train", "quick.yaml", "engine.feature_bytes=0", "--output", "out", "--track", "none"]
    with limited_files(200_000):
        full = run(quick, *arguments)
    assert full.returncode == 1
    remedy = "free disk space, then run the same command again (fedmllm train with --resume)"
    assert full.stderr.splitlines()[-1] == f"error: out/checkpoints/federated.safetensors: File too large; {remedy}"
    assert "Traceback" not in full.stderr
    assert run(quick, *arguments, "--resume").returncode == 0
    assert run(quick, *arguments[:-4], "--output", "whole", "--track", "none").returncode == 0
    assert (quick / "out" / "adapter" / "adapter_model.safetensors").read_bytes() == (
        quick / "whole" / "adapter" / "adapter_model.safetensors"
    ).read_bytes()


def test_help_and_names_do_not_load_torch() -> None:
    code = "import sys, fedmllm.cli.main, fedmllm; print([m for m in ('torch', 'transformers', 'sklearn', 'pydantic') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_help_lists_the_commands(tmp_path: Path) -> None:
    done = run_in_own_process(tmp_path, "--help")
    assert done.returncode == 0
    for command in ("train", "evaluate", "report", "methods", "pretrain-nano"):
        assert command in done.stdout


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["federation.num_round=3"], ["override 'federation.num_round=3'", "did you mean num_rounds?"]),
        (["federation.clients_per_round=5"], ["samples 5 clients, but num_clients is 2"]),
        (["federation.num_clients=300"], ["use fewer clients"]),
        (["model.name=./model"], ["model.name: './model' is not a folder"]),
        (["data.dataset=vqa_rad"], ["data.root: vqa_rad reads files"]),
        (["data.dataset=vqa_rad", "data.root=nowhere"], ["'nowhere' is not a folder"]),
        (["engine.device=cuda:77"], ["engine.device: 'cuda:77' cannot be used"]),
        (["data.dataset=digits-vqa", "federation.scenario=cross-5:5"], ["needs images and texts"]),
        (["nonsense"], ["write key.path=value"]),
    ],
)
def test_mistakes_get_one_message_exit_code_2_and_leave_nothing(quick: Path, overrides: list[str], parts: list[str]) -> None:
    done = run(quick, "train", "quick.yaml", *overrides, "--output", "out")
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.startswith("error: ")
    for part in parts:
        assert part in done.stderr
    assert not (quick / "out").exists()


def test_a_model_folder_without_weights(quick: Path) -> None:
    model = quick / "model"
    model.mkdir()
    for path in NANO_FOLDER.iterdir():
        if path.suffix != ".safetensors":
            (model / path.name).write_bytes(path.read_bytes())
    done = run(quick, "train", "quick.yaml", "model.name=./model", "--output", "out")
    assert done.returncode == 2
    assert "has no weights in *.safetensors" in done.stderr
    assert not (quick / "out").exists()


def test_a_corrupt_image_is_named(quick: Path) -> None:
    """A broken file that the loader cannot recognize by name stops the run when it is decoded."""
    images = quick / "rad" / "images"
    images.mkdir(parents=True)
    rows = []
    for i in range(12):
        Image.new("RGB", (20, 20), (i, i, i)).save(images / f"synpic{i}.jpg")
        rows.append(
            {
                "qid": i,
                "image_name": f"synpic{i}.jpg",
                "image_organ": "HEAD",
                "answer": "Yes",
                "answer_type": "CLOSED",
                "question_type": "PRES",
                "question": "Is it?",
                "phrase_type": "freeform",
            }
        )
    import json

    (quick / "rad" / "trainset.json").write_text(json.dumps(rows[:8]))
    (quick / "rad" / "testset.json").write_text(json.dumps(rows[8:]))
    (images / "synpic3.jpg").write_bytes((images / "synpic3.jpg").read_bytes()[:40])
    done = run(
        quick,
        "train",
        "quick.yaml",
        "data.dataset=vqa_rad",
        "data.root=rad",
        "data.num_train=null",
        "data.num_test=null",
        "federation.scenario=aligned",
        "federation.min_partition_size=2",
        "--output",
        "out",
    )
    assert done.returncode == 2, done.stderr
    assert "synpic3.jpg" in done.stderr
    assert "cannot be decoded as an image" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (quick / "out").exists()


@pytest.mark.parametrize("command", [("evaluate", "nowhere"), ("report", "nowhere"), ("train", "nowhere.yaml")])
def test_missing_paths_are_named(tmp_path: Path, command: tuple[str, ...]) -> None:
    done = run(tmp_path, *command)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert "nowhere" in done.stderr


@pytest.mark.slow
def test_a_keyboard_interrupt_prints_how_to_continue(quick: Path) -> None:
    command = [sys.executable, "-m", "fedmllm", "train", "quick.yaml", "federation.num_rounds=500"]
    process = subprocess.Popen(command, cwd=quick, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    while "federated round" not in process.stdout.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 130
    assert errors == "interrupted; continue with the same command and --resume\n"
    done = run(quick, "train", "quick.yaml", "--resume")
    assert done.returncode == 2
    assert "federation.num_rounds: 500 and 2" in done.stderr


def test_resume_without_an_unfinished_run_is_refused(quick: Path) -> None:
    done = run(quick, "train", "quick.yaml", "--resume")
    assert done.returncode == 2
    assert "no unfinished run to resume" in done.stderr


LIGHT = """
import sys
from fedmllm.cli.main import main
sys.argv = ["fedmllm", *sys.argv[1:]]
try:
    main()
except SystemExit:
    pass
heavy = {"torch", "transformers", "peft", "flwr"} & set(sys.modules)
sys.exit(f"imported: {sorted(heavy)}" if heavy else 0)
"""


COMMANDS: list[list[str]] = [
    ["--help"],
    ["methods"],
    ["methods", "--json"],
    ["models", "list"],
    ["data", "list"],
    *(["data", name, "nowhere.yaml", *more] for name, more in (("show", []), ("export", ["--output", "x"]))),
    ["data", "export", "broken.yaml", "--output", "x"],
    *(["train", name] for name in ("nowhere.yaml", "broken.yaml", "twice.yaml")),
    ["sweep", "nowhere.yaml"],
    *([name, "nowhere"] for name in ("evaluate", "chat", "report", "audit")),
    ["evaluate", "there"],
    ["merge", "nowhere", "--output", "x"],
    ["merge", "nowhere", "--output", "there"],
    ["pretrain-nano", "--output", "there"],
    ["server", "up", "nowhere.yaml"],
    ["site", "up", "nowhere.yaml"],
    ["site", "init", "there", "--address", "nowhere", "--site", "a"],
]
IN_FAST_TESTS = (["--help"], ["methods"], ["data", "list"], ["train", "twice.yaml"], ["audit", "nowhere"], ["site", "up", "nowhere.yaml"])
"""One of each kind; each command is a process of its own."""


@pytest.mark.parametrize(
    "command", [pytest.param(words, marks=[] if words in IN_FAST_TESTS else pytest.mark.slow, id=" ".join(words)) for words in COMMANDS]
)
def test_commands_without_a_model_import_no_heavy_library(tmp_path: Path, command: list[str]) -> None:
    """Those imports take seconds, which a listing or a mistyped path should not."""
    (tmp_path / "there").mkdir()
    (tmp_path / "broken.yaml").write_text("a: [1")
    (tmp_path / "twice.yaml").write_text("seed: 1\nseed: 2\n")
    done = subprocess.run([sys.executable, "-c", LIGHT, *command], cwd=tmp_path, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout if len(done.stderr) == 0 else done.stderr.startswith("error: ")

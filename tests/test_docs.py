"""The documentation is checked against the code: generated pages, links, commands and computed numbers."""

from __future__ import annotations

import re
import shlex
from functools import cache
from pathlib import Path
from runpy import run_path
from typing import Any

import pytest
import yaml
from typer.main import get_command

from fedmllm.cli.main import app
from fedmllm.config import Experiment
from fedmllm.data.datasets import DATASETS, DatasetRequest
from fedmllm.flower.settings import SiteConfig
from fedmllm.sweeps.grid import Grid, cells, load_grid

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
EXPERIMENTS = sorted((ROOT / "experiments").glob("*.yaml"))
GRIDS = sorted((ROOT / "experiments").glob("*/*.yaml"))
BLOCK = re.compile(r"^( *)```.*?^\1```", re.DOTALL | re.MULTILINE)
YAML = re.compile(r"^```yaml\n(.*?)^```", re.DOTALL | re.MULTILINE)
CODE = re.compile(r"`[^`\n]*`")
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
COMMAND = re.compile(r"^[ #$]*(?:\S*/|\S*python3? -m )?fedmllm (.+)$")
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())


@cache
def generator() -> dict[str, Any]:
    return run_path(str(ROOT / "docs" / "generate.py"))


def headings(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub names them."""
    titles = re.findall(r"^#+ (.+)$", BLOCK.sub("", page.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def commands(text: str) -> list[list[str]]:
    """The arguments of each ``fedmllm`` command in a page's fenced blocks."""
    lines = [line for block in BLOCK.finditer(text) for line in block[0].replace("\\\n", " ").splitlines()]
    return [shlex.split(match[1], comments=True) for line in lines if (match := COMMAND.match(line))]


def check_command(arguments: list[str]) -> None:
    """The subcommand and its options exist, and an experiment of the repository accepts the overrides."""
    known = get_command(app).commands
    name, *rest = arguments
    if name.startswith("-"):
        return
    assert name in known, f"fedmllm has no command {name!r}"
    if group := getattr(known[name], "commands", None):
        name, *rest = rest
        assert name in group, f"fedmllm has no command {arguments[:2]}"
        known = group
    options = {option for parameter in known[name].params for option in parameter.opts} | {"--help"}
    assert {word.partition("=")[0] for word in rest if word.startswith("--")} <= options
    if name == "train" and rest and rest[0].startswith("experiments/"):
        Experiment.load(ROOT / rest[0], [word for word in rest[1:] if not word.startswith("-") and "=" in word])


@pytest.mark.parametrize("name", ["docs/configuration.md", "docs/methods.md", "src/fedmllm/cli/catalog.json"])
def test_generated_pages_are_up_to_date(name: str) -> None:
    page = (ROOT / name).read_text(encoding="utf-8")
    assert page == generator()["pages"]()[ROOT / name], "run: python docs/generate.py"


def test_only_the_tables_of_a_page_are_regenerated() -> None:
    begin, end, write = (generator()[name] for name in ("BEGIN", "END", "methods_page"))
    page = write(f"above\n\n{begin}\n\nstale\n\n{end}\n\nbelow\n")
    assert page.startswith(f"above\n\n{begin}\n\n## The methods\n")
    assert page.endswith(f" |\n\n{end}\n\nbelow\n")
    assert "stale" not in page
    assert "| `scaffold` | classic | 2 | 2 | 1 (`control`) | `control` |  |  |  | yes | SCAFFOLD: " in page
    assert "| `flora` | lora | 1 | 0, then K |  | `base`, `base_step` | yes | yes |  |  | FLoRA: " in page
    assert "| `modality_coverage` | `power: 1.0` | weights in the average |  | Multiplies " in page


@each_page
def test_settings_in_yaml_are_valid(page: Path) -> None:
    for block in YAML.finditer(page.read_text(encoding="utf-8")):
        values = yaml.safe_load(block[1])
        if "methods" in values:
            assert cells(Grid.model_validate(values))
        elif "server" in values:
            SiteConfig.model_validate({**values, "folder": page.parent})
        else:
            Experiment.parse(values)


@each_page
def test_links_have_targets(page: Path) -> None:
    text = CODE.sub("", BLOCK.sub("", page.read_text(encoding="utf-8")))
    for target in LINK.findall(text):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        found = (page.parent / path).resolve() if path else page
        assert found.exists(), f"{target}: no such file"
        assert not anchor or anchor in headings(found), f"{target}: no such heading"


@each_page
def test_commands_exist(page: Path) -> None:
    for arguments in commands(page.read_text(encoding="utf-8")):
        check_command(arguments)


def test_commands_are_found_and_invalid_ones_refused() -> None:
    text = "```\n$ fedmllm train x.yaml a=1 \\\n  b=2  # why\n.venv/bin/fedmllm report runs/x\npython -m fedmllm --help\nimport fedmllm\n```\nfedmllm no\n"
    assert commands(text) == [["train", "x.yaml", "a=1", "b=2"], ["report", "runs/x"], ["--help"]]
    for wrong in (["trian", "x.yaml"], ["train", "x.yaml", "--out", "y"], ["data", "shwo"], ["data", "list", "--output", "y"]):
        with pytest.raises(AssertionError):
            check_command(wrong)


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.name)
def test_experiments_start_with_their_command(path: Path) -> None:
    first = path.read_text(encoding="utf-8").splitlines()[0]
    match = COMMAND.match(first)
    assert match, "the first line is the command as a comment"
    arguments = shlex.split(match[1])
    assert arguments[:2] == ["train", f"experiments/{path.name}"]
    check_command(arguments)


@pytest.mark.parametrize("path", GRIDS, ids=lambda path: path.relative_to(ROOT / "experiments").as_posix())
def test_grids_start_with_their_command_and_hold_experiments(path: Path) -> None:
    match = COMMAND.match(path.read_text(encoding="utf-8").splitlines()[0])
    assert match, "the first line is the command as a comment"
    arguments = shlex.split(match[1])
    assert arguments[:2] == ["sweep", path.relative_to(ROOT).as_posix()]
    check_command(arguments)
    assert cells(load_grid(path))


@pytest.mark.parametrize("name", [name for name in DATASETS if name.startswith("digits")])
def test_the_documented_ceilings_equal_the_computed_ones(name: str) -> None:
    best = DATASETS[name].load(DatasetRequest(None, 0, 1, 1)).ceilings
    row = f"| `{name}` | {best['both']:.3f} | {best['image']:.3f} | {best['text']:.3f} |"
    assert row in (ROOT / "docs" / "digits.md").read_text(encoding="utf-8")

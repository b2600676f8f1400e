from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedmllm.config import Experiment, differences
from fedmllm.errors import ConfigError
from fedmllm.explain import tell_renamed


def write(folder: Path, text: str) -> Path:
    path = folder / "x.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_settings_survive_save_and_load(tmp_path: Path) -> None:
    experiment = Experiment.parse({"federation": {"scenario": "cross-3:7", "num_rounds": 3}, "lora": {"r": 4}, "seed": 7})
    assert Experiment.load(write(tmp_path, experiment.to_yaml())) == experiment


def test_an_empty_file_means_defaults(tmp_path: Path) -> None:
    assert Experiment.load(write(tmp_path, "# nothing\n")) == Experiment()


def test_overrides_replace_only_their_settings(tmp_path: Path) -> None:
    path = write(tmp_path, "federation: {num_rounds: 3, num_clients: 4}\n")
    experiment = Experiment.load(path, ["federation.num_rounds=9", "training.clip_norm=null", "evaluation.baselines=[local]"])
    assert (experiment.federation.num_rounds, experiment.federation.num_clients) == (9, 4)
    assert experiment.training.clip_norm is None
    assert experiment.evaluation.baselines == ("local",)


def test_every_error_is_reported_with_its_line(tmp_path: Path) -> None:
    path = write(tmp_path, "federation:\n  num_rounds: 0\n  num_client: 5\ntraining:\n  learning_rate: fast\nsede: 3\n")
    with pytest.raises(ConfigError) as caught:
        Experiment.load(path)
    text = str(caught.value)
    for part in (
        "x.yaml:2: federation.num_rounds",
        "x.yaml:3: federation.num_client: is not a known setting; did you mean num_clients?",
        "x.yaml:5: training.learning_rate",
        "must be a number, got 'fast'",
        "x.yaml:6: sede: is not a known setting; did you mean seed?",
    ):
        assert part in text
    assert text.startswith("the experiment has 4 errors")


def test_a_former_name_of_a_setting_still_works_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    tell_renamed.cache_clear()
    former = {"engine": {"device": "cpu", "together": 3}}
    assert Experiment.parse(former) == Experiment.parse({"engine": {"device": "cpu", "parallel_clients": 3}})
    assert former["engine"] == {"device": "cpu", "together": 3}
    assert [record.message for record in caplog.records] == [
        "engine.together is now called engine.parallel_clients; please write the new name"
    ]
    with pytest.raises(ConfigError, match=r"engine\.together: is not a known setting"):
        Experiment.parse({"engine": {"together": 3, "parallel_clients": 3}})


def test_a_key_in_the_wrong_section_names_the_right_one() -> None:
    with pytest.raises(ConfigError, match=r"did you mean training\.learning_rate\?"):
        Experiment.parse({"lora": {"learning_rate": 1e-3}})


@pytest.mark.parametrize(
    ("values", "part"),
    [
        ({"federation": {"num_clients": 3, "clients_per_round": 4}}, "samples 4 clients, but num_clients is 3"),
        ({"federation": {"scenario": "aligned-5.0", "dirichlet_alpha": 1.0}}, "contradicts scenario aligned-5.0"),
        ({"federation": {"partition": "iid", "dirichlet_alpha": 1.0}}, "iid has no skew to set"),
        ({"federation": {"scenario": "mising-0.4"}}, "is not a scenario such as missing-0.4; did you mean missing?"),
        ({"federation": {"scenario": "missing-1.0"}}, "a rate in [0, 1)"),
        ({"federation": {"scenario": "missing-x"}}, "a rate in [0, 1)"),
        ({"federation": {"scenario": "cross-0:0"}}, "image-only:text-only"),
        ({"federation": {"scenario": "cross-5"}}, "image-only:text-only"),
        ({"data": {"dataset": "digit-claims"}}, "is not a known dataset; did you mean digits-claims?"),
        ({"algorithm": {"name": "fedavgg"}}, "is not a known method; did you mean fedavg?"),
        ({"algorithm": {"name": "fedprox", "parameters": {"mu": 1}}}, "takes proximal_mu"),
        ({"training": {"local_epochs": 0}}, "leave one of them out"),
        (
            {"engine": {"server": "server.yaml"}},
            "server.yaml names a federation of sites, which name: in_process cannot reach; use name: flower",
        ),
        ({"seed": -1}, "seed: must be at least 0, got -1"),
        (
            {"evaluation": {"baselines": ["zeroshot"]}},
            "'zero_shot', 'local', 'centralized', 'fine_tuned', 'calibrated_local' or 'calibrated_centralized'",
        ),
    ],
)
def test_bad_settings_name_rule_and_remedy(values: dict[str, Any], part: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Experiment.parse(values)
    assert part in str(caught.value)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("a: [1", "not valid YAML"),
        ("- 1\n", "a mapping of sections"),
        ("seed: 1\nseed: 2\n", "x.yaml:2: seed is set twice"),
        ("data: !!python/object/apply:os.system [echo]\n", "not valid YAML"),
        ("data: 3\n", "data"),
    ],
)
def test_invalid_files_are_refused(tmp_path: Path, text: str, part: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Experiment.load(write(tmp_path, text))
    assert part in str(caught.value)


@pytest.mark.parametrize("override", ["num_rounds", "=3", "seed.x=1", "data.root=[", "federation.num_rounds=many"])
def test_invalid_overrides_are_refused(tmp_path: Path, override: str) -> None:
    with pytest.raises(ConfigError):
        Experiment.load(write(tmp_path, "seed: 0\n"), [override])


def test_a_missing_file_and_a_wrong_encoding_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        Experiment.load(tmp_path / "none.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"seed: \xff\n")
    with pytest.raises(ConfigError, match="UTF-8"):
        Experiment.load(tmp_path / "latin.yaml")


@given(st.text(max_size=60))
def test_any_text_loads_or_is_a_config_error(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    path = tmp_path_factory.mktemp("fuzz") / "x.yaml"
    path.write_bytes(text.encode("utf-8", errors="surrogatepass"))
    with contextlib.suppress(ConfigError):
        Experiment.load(path)


def test_differences_name_the_settings() -> None:
    a, b = Experiment(), Experiment.parse({"federation": {"num_rounds": 3}})
    assert differences(a, a) == []
    assert differences(a, b) == ["federation.num_rounds: 25 and 3"]


def test_the_override_that_caused_an_error_is_named(tmp_path: Path) -> None:
    """The message does not name the line of the file whose section the override changed."""
    path = write(tmp_path, "algorithm:\n  name: fedavg\nfederation:\n  num_clients: 4\n  clients_per_round: 2\n")
    for override, part in (
        ("algorithm.name=fedavgg", "did you mean fedavg?"),
        ("federation.clients_per_round=9", "samples 9 clients"),
        ("federation.num_clients=1", "samples 2 clients"),
        ("training.batch_size=eight", "training.batch_size: must be an integer, got 'eight'"),
        ("algorithm.name=krum", "federation.clients_per_round: krum"),
    ):
        with pytest.raises(ConfigError) as caught:
            Experiment.load(path, [override])
        line = str(caught.value).splitlines()[1]
        assert part in line
        if override != "algorithm.name=krum":
            assert line.startswith(f"  - override {override!r}: ")


@pytest.mark.parametrize("number", [".inf", "-.inf", ".nan"])
@pytest.mark.parametrize("setting", ["federation.dirichlet_alpha", "training.learning_rate", "lora.alpha", "failures.deadline"])
def test_numbers_must_be_finite(setting: str, number: str) -> None:
    with pytest.raises(ConfigError, match=f"{setting}: must be (finite|above 0)"):
        Experiment.load(Path(__file__).parents[1] / "experiments" / "quickstart.yaml", [f"{setting}={number}"])


@pytest.mark.parametrize("scenario", ["aligned-inf", "aligned-1e308", "aligned-nan", "cross-inf:1", "missing-nan"])
def test_levels_must_be_finite(scenario: str) -> None:
    with pytest.raises(ConfigError, match="the level of"):
        Experiment.parse({"federation": {"scenario": scenario}})

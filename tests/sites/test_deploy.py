"""The commands and settings of ``docs/deploy.md``, run as they are written."""

from __future__ import annotations

import json
import os
import re
import shutil
import ssl
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

pytest.importorskip("flwr", reason="Flower is not installed: pip install 'fedmllm[flower]'")

from federation_processes import ENVIRONMENT, Processes, ended, free_ports, rounds
from fedmllm.flower.settings import ServerConfig

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="the page is written for a POSIX shell")
def test_the_pages_commands_work(tmp_path: Path) -> None:
    text = (ROOT / "docs" / "deploy.md").read_text(encoding="utf-8")
    steps = "\n".join(re.findall(r"^```bash\n(.*?)^```", text, re.DOTALL | re.MULTILINE))
    assert "127.0.0.1:8000" in steps
    steps = steps.replace("127.0.0.1:8000", f"127.0.0.1:{free_ports(1)[0]}")
    (tmp_path / "experiments").symlink_to(ROOT / "experiments")
    script = f"set -euo pipefail\ntrap 'kill $(jobs -p) 2> /dev/null || true; wait' EXIT\nseed=0\n{steps}"
    environment = ENVIRONMENT | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=700, check=False)
    logs = "\n".join(f"== {path}\n{path.read_text(errors='replace')[-3000:]}" for path in tmp_path.glob("federation/**/*.log"))
    assert done.returncode == 0, done.stdout + done.stderr + logs
    _assert_run_is_complete(tmp_path)
    secure = [json.loads(line) for line in rounds(tmp_path / "secure")]
    assert [(line["skipped"], line["secure_aggregation"]["clients"]) for line in secure[1:]] == [(False, 3)] * 2


def _assert_run_is_complete(folder: Path) -> None:
    manifest = json.loads((folder / "run" / "manifest.json").read_text())
    held = {client["id"]: client["modalities"] for client in manifest["clients"]}
    assert {name: set(modalities) for name, modalities in held.items()} == {
        "both": {"image+text"},
        "notes": {"text"},
        "pictures": {"image"},
    }
    assert all(client["samples"] == [] for client in manifest["clients"])
    lines = [json.loads(line) for line in rounds(folder / "run")]
    assert [(line["stage"], line["round"]) for line in lines] == [("zero_shot", 0), *(("federated", n) for n in range(1, 5))]
    assert all(line["clients"] == ["both", "notes", "pictures"] for line in lines[1:])
    result = json.loads((folder / "run" / "result.json").read_text())
    assert result["scores"]["federated"] > result["scores"]["zero_shot"]
    assert "pictures" in (folder / "run" / "report.html").read_text()
    sent = [json.loads(line) for line in (folder / "federation" / "sites" / "notes" / "sent.jsonl").read_text().splitlines()]
    assert [line["kind"] for line in sent[:2]] == ["presence", "answer"]
    assert all(line["metrics"] == {} for line in sent if line["kind"] == "answer")
    seen = [json.loads(line) for line in (folder / "federation" / "sites" / "both" / "sent.jsonl").read_text().splitlines()]
    assert all(line["metrics"].keys() == {"loss", "steps"} for line in seen if line["kind"] == "answer")


@contextmanager
def proxied(folder: Path, server: Path, address: str, own: str) -> Iterator[None]:
    """Nginx with the page's settings, on other ports and in other folders."""
    text = (ROOT / "docs" / "deploy.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"^```nginx\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    assert all(part in block for part in ("listen 8000 ssl", "https://127.0.0.1:8001", "/srv/federation/server"))
    block = (
        block.replace("listen 8000", f"listen {address}")
        .replace("127.0.0.1:8001", own)
        .replace("/srv/federation/server", str(server.parent))
    )
    logs = f"pid {folder}/nginx.pid; error_log {folder}/error.log; daemon off; master_process off; events {{}}"
    paths = " ".join(f"{kind}_temp_path {folder}/{kind};" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi"))
    (folder / "nginx.conf").write_text(f"{logs}\nhttp {{ access_log {folder}/access.log; {paths}\n{block} }}\n")
    process = subprocess.Popen([str(shutil.which("nginx")), "-c", str(folder / "nginx.conf"), "-p", str(folder)])
    try:
        yield
    finally:
        process.terminate()
        process.wait(20)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nginx") is None, reason="nginx is not installed")
def test_the_pages_proxy_passes_training_and_nothing_else(tmp_path: Path) -> None:
    experiment: dict[str, Any] = {
        "data": {"dataset": "digits-claims", "num_train": 40, "num_test": 8},
        "federation": {"num_clients": 2, "clients_per_round": 2, "num_rounds": 2, "min_partition_size": 10},
        "evaluation": {"every": 0, "baselines": []},
        # Adapters of 30 MB, which Flower sends in several pieces.
        "lora": {"r": 800},
        "failures": {"deadline": 200, "below": "wait", "min_updates": 2, "pause": 2, "attempts": 10},
    }
    processes = Processes(tmp_path / "federation", {"client-00": {}, "client-01": {}})
    own = f"127.0.0.1:{free_ports(1)[0]}"
    values = yaml.safe_load(processes.server.read_text())
    processes.server.write_text(yaml.safe_dump(values | {"listen": own}))
    with proxied(tmp_path, processes.server, processes.address, own), processes:
        ended(processes.train(experiment, tmp_path / "run"))
        assert [json.loads(line)["refused"] for line in rounds(tmp_path / "run")] == [[], []]
        trusted = ssl.create_default_context(cafile=str(ServerConfig.load(processes.server).link.certificate))
        for path in ("control/list-nodes", "runtime/acquire-task"):
            assert _answer(f"https://{own}/v1/{path}", trusted) != 404
            assert _answer(f"https://{processes.address}/v1/{path}", trusted) == 404


def _answer(address: str, trusted: ssl.SSLContext) -> int:
    """The status code of the answer to an empty message."""
    try:
        with urllib.request.urlopen(urllib.request.Request(address, data=b"", method="POST"), context=trusted, timeout=20) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code

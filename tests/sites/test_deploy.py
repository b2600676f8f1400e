"""``docs/deploy.md``, step by step as it stands there."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("flwr", reason="Flower is not installed: pip install 'fedmllm[flower]'")

from federation_processes import ENVIRONMENT, free_ports, rounds

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(sys.platform == "win32", reason="the page is written for a POSIX shell")
def test_the_walk_through_works_as_it_is_written(tmp_path: Path) -> None:
    text = (ROOT / "docs" / "deploy.md").read_text(encoding="utf-8")
    steps = "\n".join(re.findall(r"^```bash\n(.*?)^```", text, re.DOTALL | re.MULTILINE))
    assert "127.0.0.1:8000" in steps
    steps = steps.replace("127.0.0.1:8000", f"127.0.0.1:{free_ports(1)[0]}")
    (tmp_path / "experiments").symlink_to(ROOT / "experiments")
    script = f"set -euo pipefail\ntrap 'kill $(jobs -p) 2> /dev/null || true; wait' EXIT\nseed=0\n{steps}"
    environment = ENVIRONMENT | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=400, check=False)
    logs = "\n".join(f"== {path}\n{path.read_text(errors='replace')[-3000:]}" for path in tmp_path.glob("federation/**/*.log"))
    assert done.returncode == 0, done.stdout + done.stderr + logs
    _the_run_is_whole(tmp_path)


def _the_run_is_whole(folder: Path) -> None:
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

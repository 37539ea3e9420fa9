"""`adaclip push` and `hf:owner/name`, with a server that speaks the hub's protocol."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
from indexing import write_run

PROGRAM = "import sys; from adaclip_finetune.cli import main; sys.exit(main(sys.argv[1:]))"
NAME = "someone/dogs"
METRICS = {
    "evaluated_on": "test",
    "selected_on": "validation",
    "best_epoch": 2,
    "zero_shot": {"t2v": {"R@1": 20.0}},
    "finetuned": {"t2v": {"R@1": 41.25, "queries": 80, "tags": {"order": {"R@1": 1.0}}}},
    "parameters": {"clip": {"trainable": 1000, "total": 20000}, "selector": {"trainable": 24, "total": 24}},
    "intervals": {"t2v.R@1": [30.0, 52.0]},
}


class Hub(ThreadingHTTPServer):
    """A hub without accounts: `files` by repository, as they were committed, and `private` ones."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, dict[str, bytes]] = {}
        self.private: set[str] = set()


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *words: Any) -> None:
        pass

    def answer(self, content: Any, code: int = 200, **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(code)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = unquote(self.path).strip("/").split("/")
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else f"me/{asked['name']}"
            self.server.files.setdefault(name, {})
            if asked.get("private") or asked.get("visibility") == "private":  # by the version of huggingface_hub
                self.server.private.add(name)
            self.answer({"url": f"http://{self.headers['Host']}/{name}", "name": name})
        elif self.path == "/api/validate-yaml":
            self.answer({"errors": [], "warnings": []})
        elif parts[4] == "preupload":
            asked = json.loads(body)["files"]
            self.answer({"files": [{**file, "uploadMode": "regular", "shouldIgnore": False} for file in asked]})
        else:
            lines = [json.loads(line) for line in body.splitlines()]
            for line in lines:
                if line["key"] == "file":
                    content = base64.b64decode(line["value"]["content"])
                    self.server.files["/".join(parts[2:4])][line["value"]["path"]] = content
            address = f"http://{self.headers['Host']}/{'/'.join(parts[2:4])}/commit/{'c' * 40}"
            self.answer({"commitUrl": address, "commitOid": "c" * 40})

    def do_GET(self) -> None:
        parts = unquote(self.path).split("?")[0].strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            name = "/".join(parts[2:4])
            if name not in self.server.files:
                self.answer({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")
                return
            files = self.server.files[name]
            if "tree" in parts:
                listed = [{"type": "file", "path": path, "oid": "o", "size": len(own)} for path, own in files.items()]
                self.answer(listed)
                return
            siblings = [{"rfilename": path} for path in files]
            self.answer({"id": name, "modelId": name, "sha": "c" * 40, "siblings": siblings, "tags": []})
        elif parts[0] == "api":
            self.answer({"error": "Not found"}, 404)
        else:
            content = self.server.files["/".join(parts[:2])]["/".join(parts[4:])]
            digest = hashlib.sha256(content).hexdigest()
            self.answer(content, ETag=f'"{digest}"', X_Repo_Commit="c" * 40)

    do_HEAD = do_GET


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    with Hub() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture(scope="module")
def run(project: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_run(tmp_path_factory.mktemp("runs") / "run", {**project, "use_policy": False}, seed=1)
    (folder / "metrics.json").write_text(json.dumps(METRICS))
    return folder


def python(hub: Hub, home: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Run Python with the stand-in as its hub, and nothing downloaded before but what is in `home`."""
    server = {"HF_ENDPOINT": f"http://127.0.0.1:{hub.server_address[1]}", "HF_HOME": str(home), "HF_TOKEN": "hf_none"}
    environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"} | server
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, env=environment)


def adaclip(hub: Hub, home: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return python(hub, home, "-c", PROGRAM, *words)


def test_a_pushed_run_is_used_by_its_name(hub: Hub, run: Path, project: dict[str, Any], tmp_path: Path) -> None:
    done = adaclip(hub, tmp_path, "push", str(run), NAME, "--private")
    assert done.returncode == 0, done.stderr
    assert NAME in done.stdout and NAME in hub.private
    assert {"best.safetensors", "config.json", "metrics.json", "README.md"} == set(hub.files[NAME])
    for name, content in hub.files[NAME].items():
        assert name == "README.md" or content == (run / name).read_bytes()

    vectors = (
        "import sys; from adaclip_finetune import load_retriever; "
        "print(load_retriever(sys.argv[1], device='cpu').encode_text(['a dog']).tolist())"
    )
    here, there = (python(hub, tmp_path, "-c", vectors, source) for source in (str(run), f"hf:{NAME}"))
    assert there.returncode == 0, there.stderr
    assert here.stdout == there.stdout != ""

    index = str(tmp_path / "my.index")
    done = adaclip(hub, tmp_path, "index", f"hf:{NAME}", str(project["test_annot"]), "-o", index, "--device", "cpu")
    assert done.returncode == 0, done.stderr
    done = adaclip(hub, tmp_path, "search", index, "a dog", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    annotation = str(project["test_annot"])
    for words in (
        ["evaluate", f"hf:{NAME}", "--annot", annotation],
        ["train", "--config", str(run / "config.json"), "--do_inference", "--resume", f"hf:{NAME}", "--no_output"],
    ):
        done = adaclip(hub, tmp_path, *words, "--device", "cpu")
        assert done.returncode == 0, done.stderr


def test_the_card_shows_figures_with_intervals_and_how_to_use_the_run(hub: Hub, run: Path, tmp_path: Path) -> None:
    done = adaclip(hub, tmp_path, "push", str(run), "someone/else", "--card")
    assert done.returncode == 0 and "someone/else" not in hub.files
    assert "| t2v.R@1 | 41.2 | [30.0, 52.0] | 20.0 |" in done.stdout
    assert "order" not in done.stdout and "queries" not in done.stdout
    assert "1,024 of 20,024 parameters" in done.stdout
    assert 'load_retriever("hf:someone/else")' in done.stdout
    assert done.stdout.startswith("---\n") and "library_name: adaclip-finetune" in done.stdout


@pytest.mark.parametrize(("words", "facts"), [
    (["push", "RUN/nothing", NAME], ["nothing", "finished run", "best.safetensors"]),
    (["push", "RUN", "no/such/name"], ["no/such/name", "owner/name"]),
    (["evaluate", "hf:someone/absent", "--annot", "ANNOT"], ["hf:someone/absent", "hf auth login"]),
])  # fmt: skip
def test_refusals(
    words: list[str], facts: list[str], hub: Hub, run: Path, project: dict[str, Any], tmp_path: Path
) -> None:
    given = [word.replace("RUN", str(run)).replace("ANNOT", str(project["test_annot"])) for word in words]
    done = adaclip(hub, tmp_path, *given)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert all(fact in done.stderr for fact in facts), done.stderr

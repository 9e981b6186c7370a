"""What goes to the Hub is listed first, is what was verified, and goes as one commit.

The Hub is a small server here that speaks as much of its API as an upload needs.
"""

import base64
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from mlx_ft.deploy.huggingface import RemoteRepo, Upload, base_metadata, listing, plan_upload
from mlx_ft.errors import GateFailed, RunError
from mlx_ft.runs.document import run_document
from mlx_ft.runs.folder import update_record
from mlx_ft.runs.models import exported_model
from mlx_ft.system.files import read_json
from mlx_ft.text.quantities import format_bytes

REPO = "me/tiny-model"
NOTHING = RemoteRepo(False, False, ())


class Hub(ThreadingHTTPServer):
    """One repository: what is in it, whether it is private, and which requests came."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), HubHandler)
        self.files: dict[str, bytes] = {}
        self.exists = self.private = False
        self.refuses = 0
        self.requests: list[str] = []
        self.tokens: set[str | None] = set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class HubHandler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_: object) -> None:
        """Say nothing."""

    def _reply(self, value: Any, status: int = 200, **headers: str) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        for name, text in {"Content-Type": "application/json", **headers}.items():
            self.send_header(name.replace("_", "-"), text)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        self.server.requests.append(f"GET {self.path}")
        if not self.server.exists:
            self._reply({}, 404, X_Error_Code="RepoNotFound")
            return
        siblings = [{"rfilename": name} for name in self.server.files]
        self._reply({"id": REPO, "private": self.server.private, "siblings": siblings})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.requests.append(f"POST {self.path}")
        self.server.tokens.add(self.headers.get("Authorization"))
        if self.server.refuses:
            self._reply({"error": "no"}, self.server.refuses)
        elif self.path == "/api/repos/create":
            asked = json.loads(body)
            self.server.exists = True
            self.server.private = asked.get("visibility") == "private" or bool(asked.get("private"))
            self._reply({"url": f"{self.server.url}/{REPO}"})
        elif self.path == "/api/validate-yaml":
            self._reply({"warnings": [], "errors": []})
        elif self.path == f"/api/models/{REPO}/preupload/main":
            paths = [entry["path"] for entry in json.loads(body)["files"]]
            modes = [{"path": p, "uploadMode": "regular", "shouldIgnore": False} for p in paths]
            self._reply({"files": modes})
        else:
            assert self.path == f"/api/models/{REPO}/commit/main", self.path
            for line in body.splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    content = base64.b64decode(entry["value"]["content"])
                    self.server.files[entry["value"]["path"]] = content
                elif entry["key"] == "deletedFile":
                    del self.server.files[entry["value"]["path"]]
            oid = "a" * 40
            self._reply({"commitUrl": f"{self.server.url}/{REPO}/commit/{oid}", "commitOid": oid})


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def mlx_ft(
    hub_url: str, home: Path, *arguments: str, token: bool = True
) -> "subprocess.CompletedProcess[str]":
    env = os.environ | {"HF_ENDPOINT": hub_url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(home)}
    env = {key: value for key, value in env.items() if "TOKEN" not in key}
    if token:
        env["HF_TOKEN"] = "hf_" + "x" * 34
    return subprocess.run(
        [sys.executable, "-m", "mlx_ft", "publish", *arguments],
        env=env,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def planned(run: Path, *, private: bool = False, remote: RemoteRepo = NOTHING) -> Upload:
    model = exported_model(run, "quantized")
    return plan_upload(model, run_document(run), REPO, private=private, remote=remote)


def test_a_run_is_published_as_it_was_verified(
    finished_run: Path, hub: Hub, tmp_path: Path
) -> None:
    (finished_run / "export" / "q5" / "notes.txt").write_text("not in the manifest")
    done = mlx_ft(hub.url, tmp_path, str(finished_run), REPO, "--yes", "--private")
    assert done.returncode == 0, done.stderr
    model = exported_model(finished_run, "quantized")
    assert set(hub.files) == set(model.sha256), "and the card takes the README's place"
    for name in set(model.sha256) - {"README.md"}:
        assert hub.files[name] == (model.folder / name).read_bytes()
    card = hub.files["README.md"].decode()
    assert card.startswith("---\n") and "## Scores" in card
    assert hub.private
    assert [request for request in hub.requests if "commit" in request] == [
        f"POST /api/models/{REPO}/commit/main"
    ]
    assert f"model    {hub.url}/{REPO}" in done.stdout
    assert done.stdout.splitlines()[-1].startswith("next     ")
    for name in model.sha256:
        assert name in done.stdout
    everything = done.stdout + done.stderr + "".join(map(str, hub.files.values()))
    assert "hf_xxx" not in everything


def test_without_a_yes_nothing_is_sent(finished_run: Path, hub: Hub, tmp_path: Path) -> None:
    done = mlx_ft(hub.url, tmp_path, str(finished_run), REPO)
    assert done.returncode == 2
    assert "model.safetensors" in done.stdout, "what would go is listed"
    assert "nothing was uploaded" in done.stderr and "--yes" in done.stderr
    assert not [request for request in hub.requests if request.startswith("POST")]


def test_weights_of_an_earlier_upload_go_in_the_same_commit(
    finished_run: Path, hub: Hub, tmp_path: Path
) -> None:
    hub.exists = True
    hub.files = {"model-00001-of-00002.safetensors": b"old", "notes.md": b"kept"}
    done = mlx_ft(hub.url, tmp_path, str(finished_run), REPO, "--yes")
    assert done.returncode == 0, done.stderr
    assert "removed  model-00001-of-00002.safetensors" in done.stdout
    assert "model-00001-of-00002.safetensors" not in hub.files
    assert hub.files["notes.md"] == b"kept"


@pytest.mark.parametrize(("status", "found"), [(403, "refuses (403)"), (500, "refuses (500)")])
def test_a_hub_that_refuses_is_a_message(
    finished_run: Path, hub: Hub, tmp_path: Path, status: int, found: str
) -> None:
    hub.refuses = status
    done = mlx_ft(hub.url, tmp_path, str(finished_run), REPO, "--yes")
    assert done.returncode == 2, done.stderr
    assert found in done.stderr and "Traceback" not in done.stderr


def test_faults_before_anything_is_asked(finished_run: Path, hub: Hub, tmp_path: Path) -> None:
    for arguments, found in (((REPO[3:],), "owner/name"), (("../x",), "owner/name")):
        done = mlx_ft(hub.url, tmp_path, str(finished_run), *arguments, "--yes")
        assert done.returncode == 2 and found in done.stderr
    done = mlx_ft(hub.url, tmp_path, str(finished_run), REPO, "--yes", token=False)
    assert done.returncode == 2 and "hf auth login" in done.stderr
    assert hub.requests == []
    hub.shutdown()
    hub.server_close()
    done = mlx_ft(hub.url, tmp_path, str(finished_run), REPO, "--yes")
    assert done.returncode == 2 and "cannot be reached" in done.stderr, done.stderr


def test_a_run_that_may_not_leave(finished_run: Path, hub: Hub, tmp_path: Path) -> None:
    config = finished_run / "export" / "q5" / "config.json"
    text = config.read_text()
    config.write_text(text.replace("llama", "LLAMA"))
    done = mlx_ft(hub.url, tmp_path, str(finished_run), REPO, "--yes")
    assert done.returncode == 2 and "not what the export verified" in done.stderr
    config.write_text(text)
    update_record(finished_run, status="gate_failed", exit_reason="it loops")
    done = mlx_ft(hub.url, tmp_path, str(finished_run), REPO, "--yes")
    assert done.returncode == 1 and "it loops" in done.stderr and "report.html" in done.stderr
    with pytest.raises(GateFailed):
        planned(finished_run)
    assert hub.requests == []


def test_a_public_repository_is_not_taken_for_a_private_one(finished_run: Path) -> None:
    public = RemoteRepo(True, False, ())
    with pytest.raises(RunError, match="exists and is public"):
        planned(finished_run, private=True, remote=public)
    assert planned(finished_run, remote=public).private is False
    assert planned(finished_run, private=True, remote=RemoteRepo(True, True, ())).private


def test_the_listing_has_every_file_with_its_size(finished_run: Path) -> None:
    upload = planned(finished_run)
    text = "\n".join(listing(upload))
    sizes = {name: path.stat().st_size for name, path in upload.files.items()}
    assert f"{format_bytes(sizes['model.safetensors'])}  model.safetensors" in text
    assert all(name in text for name in (*sizes, "README.md"))
    assert f"in all, {len(sizes) + 1} files" in text


def test_a_path_in_the_base_models_files_is_told(
    finished_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert planned(finished_run).warnings == ()
    config = finished_run / "export" / "q5" / "tokenizer_config.json"
    value = read_json(config)
    config.write_text(json.dumps({**value, "name_or_path": "/home/somebody/base"}))
    monkeypatch.setenv("HOME", "/home/somebody")
    manifest_path = finished_run / "export" / "manifest.json"
    manifest = read_json(manifest_path)
    manifest["files"]["q5/tokenizer_config.json"]["bytes"] = config.stat().st_size
    manifest_path.write_text(json.dumps(manifest))
    upload = planned(finished_run)
    assert len(upload.warnings) == 1 and "tokenizer_config.json" in "\n".join(listing(upload))


def test_the_front_matter_of_a_base_model_may_be_anything(tmp_path: Path) -> None:
    assert base_metadata(tmp_path) == {}
    for text in (
        "",
        "no front matter",
        "---\n[broken\n---\n",
        "---\n- a list\n---\n",
        "---\n---\n",
    ):
        (tmp_path / "README.md").write_text(text)
        assert base_metadata(tmp_path) == {}
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n# x\n")
    assert base_metadata(tmp_path) == {"license": "mit"}

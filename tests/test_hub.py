"""Models of Hugging Face: a mirror on this machine, its cache offline, and what is uploaded."""

import hashlib
import json
import os
import subprocess
import sys
import textwrap
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
import yaml

from maestlib.models.checkpoint import load_model
from maestlib.models.maest import MAEST, MAESTConfig
from maestlib.models.publish import push_to_hub, save_pretrained

LABELS = ("Dance---jig", "Pop---Schlager", "Non-Music---Poesía")
COMMIT = "0123456789abcdef" * 2 + "01234567"


@pytest.fixture(scope="module")
def model():
    model = MAEST(MAESTConfig(5, LABELS, embed_dim=96, num_heads=3, depth=1)).init_weights(1).eval()
    model.thresholds = (0.25, 0.5, 0.75)
    return model


@pytest.fixture(scope="module")
def mirror(model, tmp_path_factory):
    "The endpoints that a download needs, for two repositories; yields the address and the requests made."
    folder = save_pretrained(model, tmp_path_factory.mktemp("mirror") / "tiny", license="apache-2.0")
    (folder / "modeling_maest.py").write_text("raise SystemExit('remote code was run')")
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    repositories = {"somebody/tiny": files, "somebody/paper": {"README.md": b"# No weights"}}
    requests = []

    class Hub(BaseHTTPRequestHandler):
        def do_GET(self):
            path = self.path.partition("?")[0]
            requests.append(path)
            owner_name = path.removeprefix("/api/models").strip("/").split("/")[:2]
            files = repositories.get("/".join(owner_name))
            if files is None:
                return self.answer(404, b"", {"X-Error-Code": "RepoNotFound"})
            if path.startswith("/api/") and "/tree/" in path:
                return self.answer(200, json.dumps([entry(name, data) for name, data in files.items()]).encode())
            if path.startswith("/api/"):
                info = {"id": "/".join(owner_name), "sha": COMMIT, "siblings": [{"rfilename": name} for name in files]}
                return self.answer(200, json.dumps(info).encode())
            data = files[path.rsplit("/", 1)[1]]
            self.answer(200, data, {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": COMMIT})

        do_HEAD = do_GET

        def answer(self, status, data, headers=()):
            self.send_response(status)
            for name, value in {"Content-Length": len(data), **dict(headers)}.items():
                self.send_header(name, str(value))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(data)

        def log_message(self, *_):
            pass

    def entry(name, data):
        return {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", requests
    server.shutdown()
    server.server_close()


def child(code: str, cwd: Path, **environment) -> str:
    "Run Python with Hugging Face's variables, which are read when it is imported; what was printed."
    clean = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    project = str(Path(__file__).parents[1])
    environment |= {"HF_HOME": str(cwd / "hf"), "no_proxy": "127.0.0.1", "PYTHONPATH": project, "PYTHONUTF8": "1"}
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        cwd=cwd,
        env=clean | environment,
        capture_output=True,
        text=True,
        encoding="utf8",
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


DOWNLOAD = """
    from maestlib.models.hub import download_from_hub

    for name in {names}:
        try:
            print(download_from_hub(name).parent.name)
        except OSError as error:
            print(type(error).__name__, error)
"""
LOAD = """
    from maestlib.models.checkpoint import load_model

    for name in {names}:
        try:
            print(load_model(name).thresholds)
        except OSError as error:
            print(type(error).__name__, error)
"""


def test_a_mirror_then_its_cache_offline(mirror, tmp_path):
    endpoint, requests = mirror
    names = ["somebody/tiny", "somebody/tiny@main", "somebody/paper", "somebody/unknown"]
    lines = child(DOWNLOAD.format(names=names), tmp_path, HF_ENDPOINT=endpoint).splitlines()
    assert lines[:2] == [COMMIT, COMMIT]
    assert (
        lines[2] == "FileNotFoundError somebody/paper: none of model.safetensors, pytorch_model.bin in this repository"
    )
    assert lines[3].startswith("FileNotFoundError somebody/unknown: no such path, and not at " + endpoint)
    assert "hf auth login" in lines[3] and len(lines) == 4
    downloaded = {path.rsplit("/", 1)[1] for path in requests if "/resolve/" in path}
    assert downloaded == {"config.json", "model.safetensors"}  # no code, no card

    names = ["somebody/tiny", f"hf://somebody/tiny@{COMMIT}", "somebody/other", "runs/typo"]
    n_requests = len(requests)
    lines = child(LOAD.format(names=names), tmp_path, HF_ENDPOINT=endpoint, HF_HUB_OFFLINE="1").splitlines()
    assert lines[:2] == ["(0.25, 0.5, 0.75)"] * 2
    assert lines[2].startswith("ConnectionError somebody/other: no such path, not in the cache ") and len(lines) == 4
    assert "HF_HUB_OFFLINE" in lines[2] and "`hf download somebody/other`" in lines[2]
    assert len(requests) == n_requests

    nowhere = "http://127.0.0.1:9"  # nobody listens: the cached copy, and no retries
    lines = child(
        DOWNLOAD.format(names=["somebody/tiny", "somebody/other"]), tmp_path, HF_ENDPOINT=nowhere
    ).splitlines()
    assert COMMIT in lines and lines[-1].startswith("ConnectionError somebody/other")


def test_a_local_path_precedes_a_repository(tmp_path, monkeypatch, model):
    monkeypatch.setattr("maestlib.models.checkpoint.resolve_path", lambda name: tmp_path / name)
    monkeypatch.setattr("maestlib.models.checkpoint.download_from_hub", lambda name: pytest.fail(f"asked for {name}"))
    save_pretrained(model, tmp_path / "runs" / "tiny", license="apache-2.0")
    assert load_model("runs/tiny").config == model.config
    with pytest.raises(FileNotFoundError, match="no such checkpoint"):
        load_model("runs/tini")


def test_the_card_of_a_derivative(model, tmp_path):
    options = {"base_model": "mtg-upf/discogs-maest-30s-pw-129e", "language": "es"}
    folder = save_pretrained(
        model, tmp_path / "m", license="cc-by-nc-sa-4.0", name="a/b", text="Heard: Poesía {0}.", **options
    )
    _, header, body = (folder / "README.md").read_text(encoding="utf8").split("---\n", 2)
    header = yaml.safe_load(header)
    assert header["license"] == "cc-by-nc-sa-4.0" and options.items() <= header.items()
    assert header["library_name"] == "maestlib" and header["pipeline_tag"] == "audio-classification"
    assert 'ml.load_model("a/b")' in body and "Heard: Poesía {0}." in body and ", ".join(LABELS) in body
    config = json.loads((folder / "config.json").read_text(encoding="utf8"))
    assert list(config["id2label"].values()) == list(LABELS) and config["label2id"][LABELS[1]] == 1
    assert config["mel"] == model.config.mel.to_dict() and config["thresholds"] == [0.25, 0.5, 0.75]
    with pytest.raises(ValueError, match="identifier"):
        save_pretrained(model, tmp_path / "n", license="")
    assert not (tmp_path / "n").exists()


def test_push_to_hub(model, tmp_path, monkeypatch):
    uploads = []

    class RecordingHub:
        def create_repo(self, repo_id, **options):
            uploads.append((repo_id, options))

        def upload_folder(self, repo_id, folder_path, commit_message):
            uploads.append((repo_id, {path.name: path.read_bytes() for path in Path(folder_path).iterdir()}))
            return SimpleNamespace(commit_url=f"https://huggingface.co/{repo_id}/commit/{COMMIT}")

    monkeypatch.setattr(huggingface_hub, "HfApi", RecordingHub)
    assert push_to_hub(model, "somebody/tiny", license="apache-2.0", private=True).endswith(COMMIT)
    (_, options), (repo_id, files) = uploads
    assert options == {"private": True, "exist_ok": True} and repo_id == "somebody/tiny"
    assert files.keys() == {"model.safetensors", "config.json", "README.md"}
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    again = load_model(tmp_path)
    assert again.config == model.config and again.thresholds == model.thresholds
    assert all(torch.equal(again.state_dict()[k], v) for k, v in model.state_dict().items())
    assert 'load_model("somebody/tiny")' in files["README.md"].decode()

"""Detectors on the Hugging Face hub, which is a server on this machine that speaks its API."""

import hashlib
import json
import os
import re
import threading
from base64 import b64decode
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

import huggingface_hub
import pytest
import torch
import yaml
from safetensors.torch import save

import stage_interactor
from stage_interactor import Detector
from stage_interactor.commands import main
from stage_interactor.config import load_config
from stage_interactor.inference.export import export_checkpoint
from stage_interactor.inference.hub import HubError, local_file, parse_address
from stage_interactor.inference.push import push_checkpoint
from stage_interactor.untrusted.tensors import CheckpointError

TOKEN = "hf_of_a_test"


class Hub(ThreadingHTTPServer):
    """What is asked of the hub: repositories, their files, and commits to them."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server_port}"
        self.repos: dict[str, dict] = {}  # files of the main branch, and whether it is private
        self.objects: dict[str, bytes] = {}  # large files by their SHA-256
        self.asked: list[tuple[str, str, str | None]] = []  # method, path, authorization
        self.broken = ""  # what it does wrong
        self.elsewhere = f"http://localhost:{self.server_port}"  # who has the large files
        self.while_uploading = lambda: None

    def make(self, repo_id: str, files: dict[str, bytes] | None = None, private=False):
        self.repos[repo_id] = {"files": {}, "private": private, "commits": 0}
        self.commit(repo_id, {".gitattributes": b"*.safetensors filter=lfs", **(files or {})})

    def commit(self, repo_id: str, files: dict[str, bytes]) -> None:
        repo = self.repos[repo_id]
        repo["files"] = {**repo["files"], **files}
        repo["commits"] += 1

    def head(self, repo_id: str) -> str:
        return hashlib.sha1(f"{repo_id} {self.repos[repo_id]['commits']}".encode()).hexdigest()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *arguments):
        pass

    def send(self, status: int, content: bytes | dict = b"", **headers):
        if isinstance(content, dict):
            content = json.dumps(content).encode()
            headers["Content_Type"] = "application/json"
        length = headers.pop("length", len(content))
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key.replace("_", "-"), value)
        self.send_header("Content-Length", str(length))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)
        if length != len(content):
            self.close_connection = True

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def refuse(self, status: int, code: str = "", text: str = "no"):
        self.send(status, {"error": text}, X_Error_Code=code, X_Error_Message=text)

    def may(self, repo_id: str) -> bool:
        hub = self.server
        allowed = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if repo_id not in hub.repos:
            self.refuse(404 if allowed else 401, "RepoNotFound", "Repository not found")
        elif hub.repos[repo_id]["private"] and not allowed:
            self.refuse(401, "RepoNotFound", "Repository not found")
        else:
            return True
        return False

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        hub, path = self.server, unquote(self.path.partition("?")[0])
        hub.asked.append((self.command, path, self.headers.get("Authorization")))
        if found := re.fullmatch(r"/objects/(\w+)", path):
            content = hub.objects[found[1]]
            if hub.broken == "truncated":
                return self.send(200, content[:1000], length=len(content))
            return self.send(200, content)
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(/revision/.+|/tree/.+)?", path):
            if self.may(found[1]):
                repo = hub.repos[found[1]]
                if (found[2] or "").startswith("/tree/"):
                    files = [
                        {"type": "file", "path": name, "size": len(data), "oid": "0" * 40}
                        for name, data in repo["files"].items()
                    ]
                    content = json.dumps(files).encode()
                    return self.send(200, content, Content_Type="application/json")
                siblings = [{"rfilename": name} for name in repo["files"]]
                info = {"id": found[1], "sha": hub.head(found[1]), "private": repo["private"]}
                self.send(200, {**info, "siblings": siblings, "tags": []})
            return None
        found = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        if not found or not self.may(found[1]):
            return None if found else self.refuse(404)
        repo_id, revision, name = found.groups()
        commit, files = hub.head(repo_id), hub.repos[repo_id]["files"]
        if revision not in ("main", commit):
            return self.refuse(404, "RevisionNotFound", "Invalid rev id")
        if hub.broken == "gated":
            return self.refuse(403, "GatedRepo", "Access to it is restricted")
        if hub.broken == "busy":
            return self.refuse(503, "", "come later")
        if name not in files:
            return self.send(404, X_Error_Code="EntryNotFound", X_Repo_Commit=commit)
        data = files[name]
        if not name.endswith(".safetensors"):
            blob = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
            return self.send(200, data, ETag=f'"{blob}"', X_Repo_Commit=commit)
        digest = hashlib.sha256(data).hexdigest()
        hub.objects[digest] = data
        told = "0" * 64 if hub.broken == "hash" else digest
        self.send(
            302,
            Location=f"{hub.elsewhere}/objects/{digest}",
            X_Linked_ETag=f'"{told}"',
            X_Linked_Size=str(len(data)),
            X_Repo_Commit=commit,
        )

    def do_POST(self):
        hub, path = self.server, unquote(self.path.partition("?")[0])
        hub.asked.append((self.command, path, self.headers.get("Authorization")))
        content = self.body()
        if path == "/api/validate-yaml":
            text = json.loads(content)["content"]
            front = yaml.safe_load(text.split("---")[1])
            wrong = front["license"] not in ("unknown", "apache-2.0")
            errors = [{"message": '"license" must be one of apache-2.0, unknown'}] * wrong
            return self.send(400 if wrong else 200, {"errors": errors, "warnings": []})
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.refuse(401, "", "Invalid username or password.")
        if path == "/api/repos/create":
            asked = json.loads(content)
            repo_id = f"{asked.get('organization') or 'user'}/{asked['name']}"
            exists = repo_id in hub.repos
            if not exists:
                private = asked.get("private") or asked.get("visibility") == "private"
                hub.make(repo_id, private=bool(private))
            url = f"{hub.address}/{repo_id}"
            return self.send(409 if exists else 200, {"url": url, "name": repo_id, "id": repo_id})
        if path.endswith("/preupload/main"):
            files = [
                {
                    "path": item["path"],
                    "uploadMode": "lfs" if item["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                    "oid": None,
                }
                for item in json.loads(content)["files"]
            ]
            return self.send(200, {"files": files})
        if path.endswith(".git/info/lfs/objects/batch"):
            objects = [
                {**item, "actions": {"upload": {"href": f"{hub.address}/upload/{item['oid']}"}}}
                for item in json.loads(content)["objects"]
            ]
            body = json.dumps({"transfer": "basic", "objects": objects}).encode()
            return self.send(200, body, Content_Type="application/vnd.git-lfs+json")
        repo_id = re.fullmatch(r"/api/models/(.+)/commit/main", path)[1]
        lines = [json.loads(line) for line in content.splitlines()]
        header = lines[0]["value"]
        if header.get("parentCommit") not in (None, hub.head(repo_id)):
            return self.refuse(412, "", "The branch has moved")
        files = {}
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "lfsFile":
                files[value["path"]] = hub.objects[value["oid"]]
            else:
                files[value["path"]] = b64decode(value["content"])
        hub.commit(repo_id, files)
        hub.repos[repo_id]["message"] = header["summary"]
        head = hub.head(repo_id)
        url = f"{hub.address}/{repo_id}/commit/{head}"
        return self.send(200, {"success": True, "commitOid": head, "commitUrl": url})

    def do_PUT(self):
        data = self.body()
        digest = self.path.rpartition("/")[2]
        assert hashlib.sha256(data).hexdigest() == digest
        self.server.objects[digest] = data
        self.server.while_uploading()
        self.send(200)


@contextmanager
def serving():
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The hub, logged in to nowhere, with a cache of its own."""
    constants = huggingface_hub.constants
    with serving() as server:
        template = server.address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", server.address)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        yield server


@pytest.fixture(scope="module")
def weights(small_run, tmp_path_factory):
    """The bytes of a detector that was exported."""
    path = tmp_path_factory.mktemp("weights") / "model.safetensors"
    export_checkpoint(small_run / "model_final.pth", "safetensors", path)
    return path.read_bytes()


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("hf://user/net", ("user/net", None, "model.safetensors")),
        ("hf://user/net@v1", ("user/net", "v1", "model.safetensors")),
        ("hf://user/net@refs%2Fpr%2F1/a/b.onnx", ("user/net", "refs/pr/1", "a/b.onnx")),
    ],
)
def test_a_name_on_the_hub_says_repository_revision_and_file(name, parts):
    assert parse_address(name) == parts


@pytest.mark.parametrize("name", ["hf://", "hf://net", "hf://user/", "hf:///net", "hf://user/net@"])
def test_what_is_no_name_on_the_hub_is_told(name):
    with pytest.raises(HubError, match="a name on the hub is hf://user/name"):
        local_file(name)


def test_a_detector_is_downloaded_once_and_then_found_without_the_hub(
    hub, weights, small_run, tmp_path, monkeypatch
):
    hub.make("user/net", {"model.safetensors": weights})
    detector = Detector.from_pretrained("user/net", device="cpu")
    expected = Detector.from_checkpoint(small_run / "model_final.pth", device="cpu")
    picture = str(next((small_run / "shapes/val").iterdir()))
    assert detector.class_names == expected.class_names
    assert (detector(picture, 0.0).boxes == expected(picture, 0.0).boxes).all()
    downloads = [path for method, path, _ in hub.asked if method == "GET"]
    Detector.from_checkpoint(f"hf://user/net@{hub.head('user/net')}", device="cpu")
    assert [path for method, path, _ in hub.asked if method == "GET"] == downloads
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    Detector.from_pretrained("user/net", device="cpu")
    with pytest.raises(HubError, match="is not in the cache, .*HF_HUB_OFFLINE is set"):
        Detector.from_pretrained("user/other")
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(weights)
    assert Detector.from_pretrained(folder, device="cpu").class_names == expected.class_names
    with pytest.raises(HubError, match="has no net.onnx; it has model.safetensors"):
        Detector.from_pretrained(folder, filename="net.onnx")


def test_a_token_is_not_told_to_another_host(hub, weights):
    hub.make("user/net", {"model.safetensors": weights}, private=True)
    with serving() as other:
        other.objects[hashlib.sha256(weights).hexdigest()] = weights
        hub.elsewhere = other.address
        Detector.from_pretrained("user/net", token=TOKEN, device="cpu")
        assert {token for *_, token in hub.asked} == {f"Bearer {TOKEN}"}
        assert [token for *_, token in other.asked] == [None]


def test_what_cannot_be_had_is_one_line(hub, weights, capsys, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda _: None)  # between two questions
    hub.make("user/net", {"other.safetensors": weights, "model.pth": b"pickle", "README.md": b""})
    hub.make("user/hidden", private=True)

    def message(name):
        assert main(["predict", "--checkpoint", name, "nothing.jpg"]) == 2
        (line,) = capsys.readouterr().err.splitlines()[-1:]
        return line

    listed = "has no model.safetensors; it has .gitattributes, README.md, model.pth, other.safetens"
    assert listed in message("hf://user/net")
    assert "no such repository, or shows it to others only: log in" in message("hf://user/none")
    assert "no such repository, or shows it to others only: log in" in message("hf://user/hidden")
    assert "has no revision v9" in message("hf://user/net@v9/other.safetensors")
    assert ".safetensors and .onnx files are taken" in message("hf://user/net/model.pth")
    assert ".safetensors and .onnx files are taken" in message("hf://user/net/model.pt2")
    assert "is no name on the hub" in message("hf://user/net--/other.safetensors")
    hub.broken = "gated"
    assert "asks its users to agree" in message("hf://user/net/other.safetensors")
    hub.broken = "busy"
    assert "is not reached" in message("hf://user/net/other.safetensors")
    assert not any(path.endswith(("model.pth", "model.pt2")) for _, path, _ in hub.asked)


@pytest.mark.parametrize("broken", ["truncated", "hash"])
def test_a_file_that_is_not_what_the_hub_says_is_refused(hub, weights, broken, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda _: None)  # before it asks for the rest
    hub.make("user/net", {"model.safetensors": weights})
    hub.broken = broken
    with pytest.raises(HubError, match="transfer failed|its hash is another; delete"):
        Detector.from_pretrained("user/net")
    hub.broken = ""
    if broken == "truncated":  # nothing of it is left in the way
        Detector.from_pretrained("user/net", device="cpu")


def test_a_cache_that_was_changed_is_told(hub, weights, monkeypatch):
    hub.make("user/net", {"model.safetensors": weights})
    path = Path(local_file("hf://user/net"))
    blob = Path(os.path.realpath(path))
    blob.write_bytes(weights[:-1] + bytes([weights[-1] ^ 1]))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match=f"its hash is another; delete {blob}"):
        local_file("hf://user/net")
    blob.unlink()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    assert Path(local_file("hf://user/net")).read_bytes() == weights


def test_a_strangers_file_is_read_as_data(hub, weights):
    length = int.from_bytes(weights[:8], "little")
    header = json.loads(weights[8 : 8 + length])
    extra = json.loads(header["__metadata__"]["extra"])
    extra["blueprint"]["config"]["model"]["neck"] = {"_target_": "os.system", "command": "true"}
    header["__metadata__"]["extra"] = json.dumps(extra)
    head = json.dumps(header).encode()
    hostile = len(head).to_bytes(8, "little") + head + weights[8 + length :]
    alien = save({"conv1.weight": torch.ones(2)}, {"format": "pt"})
    hub.make("user/net", {"model.safetensors": hostile, "alien.safetensors": alien,
                          "short.safetensors": weights[:3000]})  # fmt: skip
    with pytest.raises(CheckpointError, match="os.system"):
        Detector.from_pretrained("user/net")
    with pytest.raises(CheckpointError, match="does not say how its detector is built"):
        Detector.from_pretrained("user/net", filename="alien.safetensors")
    with pytest.raises(CheckpointError, match="cannot be loaded|is incomplete"):
        Detector.from_pretrained("user/net", filename="short.safetensors")


def test_a_detector_goes_to_the_hub_and_comes_back(hub, small_run, capsys, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    arguments = ["push", "user/net", "--checkpoint", str(small_run / "model_final.pth")]
    assert main([*arguments, "--license", "apache-2.0", "--private", "--message", "first"]) == 0
    assert f"Pushed to {hub.address}/user/net as {hub.head('user/net')[:12]}" in (
        capsys.readouterr().out
    )
    repo = hub.repos["user/net"]
    assert repo["private"] and repo["commits"] == 2 and repo["message"] == "first"
    assert sorted(repo["files"]) == [".gitattributes", "README.md", "model.safetensors"]
    card = repo["files"]["README.md"].decode()
    front = yaml.safe_load(card.split("---")[1])
    assert front["license"] == "apache-2.0" and front["library_name"] == "stage-interactor"
    assert front["pipeline_tag"] == "object-detection"
    (index,) = front["model-index"]
    scores = json.loads((small_run / "results.json").read_text())["bbox"]
    metrics = {item["name"]: item["value"] for item in index["results"][0]["metrics"]}
    assert index["name"] == "net" and metrics["AP50"] == round(scores["AP50"], 4)
    assert index["results"][0]["dataset"]["name"] == "shapes_val"
    assert 'Detector.from_pretrained("user/net")' in card
    assert str(small_run).encode() not in repo["files"]["model.safetensors"]
    detector = Detector.from_pretrained("user/net", token=TOKEN, device="cpu")
    expected = Detector.from_checkpoint(small_run / "model_final.pth", device="cpu")
    picture = str(next((small_run / "shapes/val").iterdir()))
    assert (detector(picture, 0.0).scores == expected(picture, 0.0).scores).all()
    assert detector.thresholds == expected.thresholds

    # A card of ours is written anew; one that was changed stays until somebody says otherwise.
    assert main([*arguments]) == 0
    assert "--license NAME says which" in capsys.readouterr().out
    assert "license: unknown" in repo["files"]["README.md"].decode()
    mine = repo["files"]["README.md"] + b"My own words.\n"
    hub.commit("user/net", {"README.md": mine})
    commits = repo["commits"]
    assert main([*arguments, "--trained-weights"]) == 2
    assert "README.md that somebody wrote or changed: keep it" in capsys.readouterr().err
    assert repo["commits"] == commits
    before = repo["files"]["model.safetensors"]
    assert main([*arguments, "--trained-weights", "--card", "keep"]) == 0
    assert "README.md stays as it is" in capsys.readouterr().out
    assert repo["files"]["README.md"] == mine and repo["files"]["model.safetensors"] != before
    assert main([*arguments, "--card", "replace"]) == 0
    assert b"My own words" not in repo["files"]["README.md"]


def test_other_weights_of_a_run_do_not_claim_its_last_metrics(hub, small_run, tmp_path):
    for name in ("model_0000001.pth", "results.json"):
        source = "model_final.pth" if name.endswith(".pth") else name
        (tmp_path / name).write_bytes((small_run / source).read_bytes())
    push_checkpoint(tmp_path / "model_0000001.pth", "user/net", token=TOKEN)
    card = hub.repos["user/net"]["files"]["README.md"].decode()
    assert "model-index" not in yaml.safe_load(card.split("---")[1])


def test_what_the_hub_refuses_is_one_line(hub, small_run):
    checkpoint = small_run / "model_final.pth"
    with pytest.raises(HubError, match="log in with `hf auth login`"):
        push_checkpoint(checkpoint, "user/net", token="hf_wrong")
    assert not hub.repos
    with pytest.raises(HubError, match='refuses: .*"license" must be one of'):
        push_checkpoint(checkpoint, "user/net", license="free", token=TOKEN)
    hub.make("user/shown")
    with pytest.raises(HubError, match="is there and public"):
        push_checkpoint(checkpoint, "user/shown", private=True, token=TOKEN)
    assert list(hub.repos["user/shown"]["files"]) == [".gitattributes"]
    hub.while_uploading = lambda: hub.commit("user/shown", {"other.txt": b""})
    with pytest.raises(HubError, match="somebody else has changed it meanwhile"):
        push_checkpoint(checkpoint, "user/shown", token=TOKEN)
    with pytest.raises(HubError, match="is no name on the hub"):
        push_checkpoint(checkpoint, "a/b/c", token=TOKEN)
    for wrong in ({"card": "mine"}, {"license": "my own: words"}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            push_checkpoint(checkpoint, "user/net", token=TOKEN, **wrong)


def test_a_run_is_evaluated_and_begun_with_weights_of_the_hub(hub, small_run, tmp_path):
    checkpoint = small_run / "model_final.pth"
    push_checkpoint(checkpoint, "user/net", token=TOKEN)
    config = load_config(small_run / "config.yaml")
    overrides = ["train.device=cpu", "train.max_iter=1"]

    def run(name, **options):
        folder = tmp_path / name
        return stage_interactor.train(config, overrides, output_dir=folder, **options)

    theirs = run("hub", checkpoint="hf://user/net", eval_only=True)
    ours = run("file", checkpoint=checkpoint, eval_only=True)
    assert theirs.metrics["bbox"] == ours.metrics["bbox"]
    run("begun", checkpoint="hf://user/net")
    begun = (tmp_path / "begun" / "log.txt").read_text()
    assert f"of {Path(local_file('hf://user/net'))}" in begun
    with pytest.raises(HubError, match="no such repository"):
        run("none", checkpoint="hf://user/none")

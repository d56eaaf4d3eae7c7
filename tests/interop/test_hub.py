"""Models by name: from a cache laid out as the hub lays it out, and through a stand-in of its API on this machine."""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

import tttlm
from tttlm.errors import InputError
from tttlm.interop.hub import is_repository
from tttlm.interop.model_card import model_card
from tttlm.model import ModelConfig

FOLDER = Path(__file__).parents[1] / "fixtures" / "reference" / "qwen2"
COMMITS = {"main": "a" * 40, "v1": "b" * 40}


@pytest.fixture
def cache(tmp_path) -> Path:
    """A cache with two revisions: files are links to what they hold, named by its digest."""
    root = tmp_path / "hub" / "models--owner--tiny"
    for revision, commit in COMMITS.items():
        snapshot = root / "snapshots" / commit
        snapshot.mkdir(parents=True)
        (root / "refs").mkdir(exist_ok=True)
        (root / "refs" / revision).write_text(commit)
        for name in ("config.json", "model.safetensors"):
            data = (FOLDER / name).read_bytes()
            if name == "config.json":
                data = json.dumps(json.loads(data) | {"rms_norm_eps": {"main": 1e-6, "v1": 1e-3}[revision]}).encode()
            blob = root / "blobs" / hashlib.sha256(data).hexdigest()
            blob.parent.mkdir(exist_ok=True)
            blob.write_bytes(data)
            (snapshot / name).symlink_to(Path("..") / ".." / "blobs" / blob.name)
    return tmp_path / "hub"


def test_a_name_is_read_from_the_cache_at_any_revision(cache):
    model = tttlm.from_pretrained("owner/tiny", cache_dir=cache, local_files_only=True)
    np.testing.assert_array_equal(model.embed.embedding[...], tttlm.from_pretrained(FOLDER).embed.embedding[...])
    assert model.config.norm_eps == 1e-6
    for revision in ("v1", COMMITS["v1"]):
        older = tttlm.from_pretrained("owner/tiny", cache_dir=cache, local_files_only=True, revision=revision)
        assert older.config.norm_eps == 1e-3


def test_what_is_not_there_is_one_line(cache, tmp_path, monkeypatch):
    with pytest.raises(InputError, match=r"owner/other is not in the hub's cache .*HF_HUB_OFFLINE"):
        tttlm.from_pretrained("owner/other", cache_dir=cache, local_files_only=True)
    with pytest.raises(InputError, match="owner/tiny at revision 'v2' is not in the hub's cache"):
        tttlm.from_pretrained("owner/tiny", cache_dir=cache, local_files_only=True, revision="v2")
    with pytest.raises(InputError, match="revision and local_files_only are for repositories"):
        tttlm.from_pretrained(FOLDER, revision="v1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert tttlm.from_pretrained("owner/tiny", cache_dir=cache).config.norm_eps == 1e-6
    with pytest.raises(InputError, match="owner/other is not in the hub's cache"):
        tttlm.from_pretrained("owner/other", cache_dir=cache)
    monkeypatch.setattr("tttlm.interop.hub.missing", lambda *names: f"needs {names[0]}: pip install 'tttlm[hub]'")
    with pytest.raises(InputError, match=r"needs huggingface_hub: pip install 'tttlm\[hub\]'"):
        tttlm.from_pretrained("owner/tiny", cache_dir=cache)


@pytest.mark.parametrize(
    ("name", "right"),
    [("owner/name", True), ("name", False), ("a/b/c", False), ("./name", False), ("../b", False), ("/a/b", False)],
)
def test_only_owner_and_name_are_taken_for_a_repository(name, right):
    assert is_repository(name) == right


class Hub(BaseHTTPRequestHandler):
    """What of the hub's API fetching and pushing a model needs, for a repository that is kept in memory."""

    files: dict[str, bytes]
    objects: dict[str, bytes]
    tokens: set[str]

    def answer(self, value, status=200, **headers):
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for name, text in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name.replace("_", "-"), text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = b""
            while size := int(self.rfile.readline(), 16):
                parts += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return parts
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def do_GET(self):
        self.tokens.add(self.headers.get("Authorization", ""))
        if match := re.fullmatch(r"/owner/new/resolve/[^/]+/(.*)", self.path.partition("?")[0]):
            data = self.files.get(match[1])
            if data is None:
                self.answer({"error": "Entry not found"}, 404, X_Error_Code="EntryNotFound")
            else:
                self.answer(data, ETag=f'"{hashlib.sha256(data).hexdigest()}"', X_Repo_Commit="c" * 40)
        elif "/tree/" in self.path:
            found = [
                {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for name, data in self.files.items()
            ]
            self.answer(found)
        elif self.path.startswith("/api/models/owner/new"):
            siblings = [{"rfilename": name} for name in self.files]
            self.answer({"id": "owner/new", "sha": "c" * 40, "siblings": siblings, "private": False})
        else:
            self.answer({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")

    do_HEAD = do_GET

    def do_POST(self):
        data = self.body()
        address = f"http://127.0.0.1:{self.server.server_address[1]}"
        self.tokens.add(self.headers.get("Authorization", ""))
        if self.path == "/api/repos/create":
            self.answer({"url": f"{address}/owner/new", "id": "owner/new"})
        elif "/preupload/" in self.path:
            mode = lambda name: "lfs" if name.endswith("safetensors") else "regular"
            files = [{"path": f["path"], "uploadMode": mode(f["path"])} for f in json.loads(data)["files"]]
            self.answer({"files": [file | {"shouldIgnore": False} for file in files]})
        elif self.path.endswith("/info/lfs/objects/batch"):
            objects = [
                o | {"actions": {"upload": {"href": f"{address}/lfs/{o['oid']}"}}} for o in json.loads(data)["objects"]
            ]
            self.answer({"transfer": "basic", "objects": objects})
        elif "/commit/" in self.path:
            for line in map(json.loads, data.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    self.files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    self.files[value["path"]] = self.objects[value["oid"]]
            self.answer({"commitUrl": f"{address}/owner/new/commit/{'c' * 40}", "commitOid": "c" * 40})
        else:
            self.answer({"errors": [], "warnings": []})

    def do_PUT(self):
        data = self.body()
        name = self.path.rpartition("/")[2]
        assert hashlib.sha256(data).hexdigest() == name
        self.objects[name] = data
        self.answer({})

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(monkeypatch):
    handler = type("ThisHub", (Hub,), {"files": {}, "objects": {}, "tokens": set()})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_address[1]}"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(
        huggingface_hub.constants,
        "HUGGINGFACE_CO_URL_TEMPLATE",
        address + "/{repo_id}/resolve/{revision}/{filename}",
    )
    yield handler
    server.shutdown()
    server.server_close()


def test_a_model_is_pushed_with_its_card_and_fetched_again(hub, tmp_path):
    model = tttlm.from_pretrained(FOLDER, param_dtype="bfloat16")
    where = tttlm.push_to_hub(model, "owner/new", token="hf_secret", numbers={"held-out loss": 3.25, "step": 12_000})
    assert where.endswith(f"/owner/new/commit/{'c' * 40}")
    assert set(hub.files) == {"config.json", "model.safetensors", "README.md"}
    assert "Bearer hf_secret" in hub.tokens
    card = hub.files["README.md"].decode()
    assert "| held-out loss | 3.25 |" in card
    assert "| step | 12,000 |" in card
    again = tttlm.from_pretrained("owner/new", cache_dir=tmp_path, token="hf_secret", param_dtype="bfloat16")
    for (path, a), (_, b) in zip(nnx.to_flat_state(nnx.state(model)), nnx.to_flat_state(nnx.state(again)), strict=True):
        np.testing.assert_array_equal(a[...], b[...], err_msg=str(path))


def test_a_folder_is_pushed_without_what_is_no_model_and_a_card_of_its_own_is_kept(hub, tmp_path):
    folder = tmp_path / "released"
    tttlm.save_pretrained(tttlm.from_pretrained(FOLDER), folder)
    (folder / "README.md").write_text("# Mine\n")
    (folder / "secrets.env").write_text("KEY=1")
    (folder / "tokenizer.json").write_text("{}")
    tttlm.push_to_hub(folder, "owner/new")
    assert set(hub.files) == {"config.json", "model.safetensors", "README.md", "tokenizer.json"}
    assert hub.files["README.md"] == b"# Mine\n"
    (tmp_path / "model.safetensors").write_bytes(hub.files["model.safetensors"])
    assert load_file(tmp_path / "model.safetensors").keys() == load_file(folder / "model.safetensors").keys()


def test_a_repository_that_is_not_there_or_a_bad_name_is_one_line(hub, tmp_path):
    with pytest.raises(InputError, match="owner/absent is not on the hub, or is private") as error:
        tttlm.from_pretrained("owner/absent", cache_dir=tmp_path)
    assert "\n" not in str(error.value)
    with pytest.raises(InputError, match="a repository is named owner/name, got 'new'"):
        tttlm.push_to_hub(FOLDER, "new")


def test_a_model_card_says_what_the_model_is():
    config = ModelConfig(hidden_size=64, num_heads=2, num_layers=2, vocab_size=101, mixers=("ttt_mlp", "attention"))
    card = model_card(config, name="my model", numbers={"note": "a | b\nc"})
    assert card.startswith("---\nlibrary_name: tttlm\n")
    assert "A language model of ttt_mlp, attention layers." in card
    assert "| hidden size | 64 |" in card
    assert "| note | a / b c |" in card

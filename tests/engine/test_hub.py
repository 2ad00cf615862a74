"""Weights of the Hugging Face hub, and of folders with its files: whatever the repository holds."""

import contextlib
import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading

import numpy as np
import pytest

from rll_jax.networks import weights
from tests.helpers.paths import ROOT

ARRAYS = {f"layer{i}.weight": np.full((2, 3), i, np.float32) for i in range(4)}
OTHERS = {"layer9.weight": np.zeros((2, 3), np.float32)}
READ = """
import json, sys
from experiments.engine import pretrained
for name in sys.argv[1:]:
    try:
        arrays = pretrained._read_file(name)
        means = {name: float(array.mean()) for name, array in arrays.items()}
        print(json.dumps(means, sort_keys=True))
    except ValueError as error:
        print("error:", error)
"""


def write_torch(path, arrays):
    torch = pytest.importorskip("torch")
    torch.save({name: torch.tensor(array) for name, array in arrays.items()}, path)


def write_parts(folder, write, stem, ending, index):
    names, parts = list(ARRAYS), []
    for number, some in enumerate((names[:1], names[1:3], names[3:]), start=1):
        parts.append(f"{stem}-{number:05d}-of-00003{ending}")
        write(folder / parts[-1], {name: ARRAYS[name] for name in some})
    if index:
        places = dict(zip(names, [parts[0], parts[1], parts[1], parts[2]], strict=True))
        (folder / f"{stem}{ending}.index.json").write_text(json.dumps({"weight_map": places}))


def make(kind, folder):
    """The files of a repository; weights of `OTHERS` are in those that come later in the order."""
    (folder / "README.md").write_text("---")
    (folder / "onnx").mkdir()
    (folder / "onnx/model.safetensors").write_bytes(b"")
    if kind == "safetensors":
        weights.write_safetensors(folder / "model.safetensors", ARRAYS)
        weights.write_safetensors(folder / "open_clip_model.safetensors", OTHERS)
    elif kind == "torch":
        write_torch(folder / "pytorch_model.bin", ARRAYS)
    elif kind == "open_clip":
        weights.write_safetensors(folder / "open_clip_model.safetensors", ARRAYS)
        write_torch(folder / "open_clip_pytorch_model.bin", OTHERS)
    elif kind == "open_clip torch":
        write_torch(folder / "open_clip_pytorch_model.bin", ARRAYS)
    elif kind == "sharded":
        write_parts(folder, weights.write_safetensors, "model", ".safetensors", index=True)
        write_torch(folder / "pytorch_model.bin", OTHERS)
    elif kind == "sharded torch":
        write_parts(folder, write_torch, "pytorch_model", ".bin", index=True)
    elif kind == "parts":
        write_parts(folder, weights.write_safetensors, "model", ".safetensors", index=False)


KINDS = [
    *("safetensors", "torch", "open_clip", "open_clip torch"),
    *("sharded", "sharded torch", "parts"),
]


@pytest.mark.parametrize("kind", KINDS)
def test_folders_of_models(kind, tmp_path):
    make(kind, tmp_path)
    read = weights.read_folder(tmp_path)
    assert read.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        np.testing.assert_array_equal(read[name], array)


@pytest.mark.parametrize(
    "change, error",
    [
        (lambda f: (f / "model-00002-of-00003.safetensors").unlink(), "1 of the 3 files .* such"),
        (lambda f: (f / "model.safetensors.index.json").write_text("{}"), "index.json: expected"),
        (
            lambda f: (f / "model.safetensors.index.json").write_text(
                '{"weight_map": {"a": "../model.safetensors"}}'
            ),
            "index.json: expected the names",
        ),
        (
            lambda f: [path.unlink() for path in f.iterdir() if "model-" in path.name],
            "3 of the 3 files of its weights are missing, such as model-00001-of-00003.safetensors",
        ),
        (
            lambda f: [path.unlink() for path in f.iterdir() if "model" in path.name],
            "the folder holds no weights: expected one of model.safetensors, .*found README.md",
        ),
    ],
)
def test_folders_that_cannot_be_read(change, error, tmp_path):
    (tmp_path / "README.md").write_text("---")
    write_parts(tmp_path, weights.write_safetensors, "model", ".safetensors", index=True)
    change(tmp_path)
    with pytest.raises(ValueError, match=error):
        weights.read_folder(tmp_path)


@contextlib.contextmanager
def hub(folder):
    """Serves the files of each folder in a folder as a hub's repository us/NAME."""
    commit = "0" * 40

    class Handler(http.server.BaseHTTPRequestHandler):
        def answer(self, code, body=b"", **headers):
            self.send_response(code)
            for name, value in {"Content-Length": len(body), **headers}.items():
                self.send_header(name.replace("_", "-"), str(value))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def do_GET(self):
            parts = self.path.partition("?")[0].strip("/").split("/")
            listing = parts[:2] == ["api", "models"]
            name = parts[3] if listing else parts[1]
            top = folder / name
            if not top.is_dir():
                self.answer(404, X_Error_Code="RepoNotFound")
            elif listing:
                files = [p.relative_to(top).as_posix() for p in top.rglob("*") if p.is_file()]
                about = {"id": f"us/{name}", "sha": commit, "modelId": f"us/{name}"}
                about["siblings"] = [{"rfilename": file} for file in files]
                tree = [{"type": "file", "path": f, "size": 1, "oid": commit} for f in files]
                body = json.dumps(tree if "tree" in parts else about).encode()
                self.answer(200, body, Content_Type="application/json")
            elif not (file := top / "/".join(parts[4:])).is_file():
                self.answer(404, X_Error_Code="EntryNotFound", X_Repo_Commit=commit)
            else:
                body = file.read_bytes()
                etag = f'"{hashlib.sha256(body).hexdigest()}"'
                self.answer(200, body, ETag=etag, X_Repo_Commit=commit, X_Linked_Size=len(body))

        do_HEAD = do_GET  # noqa: N815 - http.server's names

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def read(names, home, endpoint="http://127.0.0.1:9", offline=False):
    """What `--pretrained=NAME` reads with the hub's own client, in a process of its own."""
    environment = {
        **{name: value for name, value in os.environ.items() if "proxy" not in name.lower()},
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(home),
        "HF_HUB_OFFLINE": str(int(offline)),
        "HF_HUB_DISABLE_XET": "1",
        "PYTHONPATH": str(ROOT),
    }
    ended = subprocess.run(
        [sys.executable, "-c", READ, *names],
        env=environment, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    return ended.stdout.splitlines()[-len(names) :]


def test_repositories_of_the_hub(tmp_path):
    """The client asks a server of the test's own; the second time it asks nobody."""
    pytest.importorskip("huggingface_hub")
    (tmp_path / "hub").mkdir()
    expected = json.dumps({name: float(array.mean()) for name, array in ARRAYS.items()})
    for kind in ("torch", "sharded", "none"):
        (tmp_path / "hub" / kind).mkdir()
        make(kind, tmp_path / "hub" / kind)
    with hub(tmp_path / "hub") as endpoint:
        names = ["us/torch", "hf-hub:us/sharded@main", "us/none", "us/other"]
        first, second, none, other = read(names, tmp_path / "home", endpoint)
    assert first == second == expected
    assert none.startswith("error: us/none holds no weights: expected one of model.safetensors")
    assert "found README.md" in none
    assert other.startswith("error: no such folder, and model.safetensors of us/other cannot be")
    assert read(["us/torch", "us/sharded"], tmp_path / "home", offline=True) == [expected] * 2

"""Writes that fail, as on a full disk: one line that names the file, and nothing half written.

The kernel refuses to let files grow beyond a limit here.
"""

import json
import os
import resource
import signal
import subprocess
import sys

import pytest

from experiments.engine import bad_images, environment
from tests.helpers.commands import TINY, command, run
from tests.helpers.paths import ROOT

# Each writes below the folder by a function of the project.
WRITES = """
import json, pathlib, resource, sys
import numpy as np
from experiments.engine import logs
from rll_jax.data import array_records, cache, files, folders, image_dataset
from rll_jax.networks import weights

top = pathlib.Path(sys.argv[1])
rows = folders.class_folders(top / "in")
data = image_dataset.from_rows(top / "in", rows)["train"]

def text(path):
    with files.atomic_write(path) as temporary:
        temporary.write_text("x" * 10000)

def arrays(path):
    with files.atomic_write(path) as temporary, temporary.open("wb") as file:
        np.savez(file, a=np.zeros(1000))

def safetensors(path):
    with files.atomic_write(path) as temporary:
        weights.write_safetensors(temporary, {"a": np.zeros(1000)})

def metrics(path):
    with logs.MetricsLog(path.parent, 0) as log:
        for step in range(1, 100):
            log.write(step, {"loss": 1.0})

def prepared(path):
    array_records.write_dataset(top / "in", rows, path)

def cached(path):
    cache.on_disk(data, 32, path.parent, "train")

logs.MetricsLog(top, 0).__exit__(None)  # its imports write files
resource.setrlimit(resource.RLIMIT_FSIZE, (500, 500))
told = {}
for write, name in (
    (text, "a.txt"), (arrays, "a.npz"), (safetensors, "a.safetensors"),
    (prepared, "prepared"), (cached, "cache_train"), (metrics, "metrics.jsonl"),
):
    (top / write.__name__).mkdir()
    try:
        write(top / write.__name__ / name)
        told[write.__name__] = "written"
    except OSError as error:
        told[write.__name__] = str(error)
print(json.dumps(told), flush=True)
import os
os._exit(0)
"""


def limited(size):
    return {"preexec_fn": lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))}


@pytest.fixture
def pictures(emoji, tmp_path):
    for number in range(16):
        (tmp_path / f"in/{number}").mkdir(parents=True)
        for i in range(3):
            encoded = emoji["test"].image_bytes(4 * number + i)
            (tmp_path / f"in/{number}/{i}.png").write_bytes(encoded)
    return tmp_path / "in"


def test_each_kind_of_file(pictures, tmp_path):
    assert signal.getsignal(signal.SIGXFSZ) == signal.SIG_IGN  # Python's own choice
    ended = subprocess.run(
        [sys.executable, "-c", WRITES, str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    told = json.loads(ended.stdout.splitlines()[-1])
    names = {
        "text": "a.txt", "arrays": "a.npz", "safetensors": "a.safetensors",
        "prepared": ".prepared.", "cached": "cache_train_32_", "metrics": "metrics.jsonl",
    }  # fmt: skip
    assert told.keys() == names.keys()
    for kind, name in names.items():
        assert "File too large" in told[kind] and str(tmp_path / kind / name) in told[kind]
        left = [path.name for path in (tmp_path / kind).iterdir() if path.name != "tensorboard"]
        assert left == (["metrics.jsonl"] if kind == "metrics" else []), (kind, left)
    lines = bad_images.whole_lines(tmp_path / "metrics/metrics.jsonl")
    assert lines and all(json.loads(line)["loss"] == 1 for line in lines)


@pytest.mark.slow
def test_commands(pictures, tmp_path):
    """A run whose checkpoint cannot be saved goes on from the start when there is room."""
    arguments = [
        *(a for a in TINY if not a.startswith("--classes_per_batch")),
        "--classes_per_batch=4",
        "--dataset=folder",
        "--augment=affine",
        f"--data_dir={pictures}",
        "--embedding_dim=1024",
        "--compilation_cache=false",
        f"--workdir={tmp_path / 'run'}",
    ]

    def refused(name, arguments, text, size):
        given = command(*arguments, name=name) | limited(size)
        ended = subprocess.run(**given, capture_output=True, timeout=240)
        told = [line for line in ended.stderr.splitlines() if line.startswith("error: ")]
        assert ended.returncode == 2 and len(told) == 1 and text in told[0], ended.stderr
        assert "Traceback" not in ended.stderr and "ignored" not in ended.stderr, ended.stderr

    for size in (2500, 16384):
        refused("folder", arguments, f"a checkpoint cannot be saved in {tmp_path / 'run'}", size)
    result = run(*arguments, name="folder")
    assert result.returncode == 0 and "resuming" not in result.stdout, result.stderr
    used = f"--workdir={tmp_path / 'run'}"
    out = tmp_path / "out"
    refused("export", [used, f"--out={out}"], f"'{out}'", 4096)
    images = [used, f"--images={pictures}"]
    query = f"--query={pictures / '0'}"
    refused("search", [*images, query], f"'{tmp_path / 'run'}/index/", 4096)
    refused("evaluate", [used, "--noclustering"], "evaluation.json'", 100)
    found = run(*images, query, name="search")
    assert found.returncode == 0 and "48 images in the index, 48 of them" in found.stdout
    refused("embed", [*images, f"--out={out}.npz"], f"'{out}.npz'", 4096)
    assert not list(tmp_path.glob("*out*")) and not list(tmp_path.rglob("*.tmp"))


def test_the_commit_is_found_without_a_write_into_the_repository(tmp_path, monkeypatch):
    """A lock that git leaves there, on a full disk, would stop the user's next commit."""
    git = ["git", "-C", str(tmp_path), "-c", "user.name=x", "-c", "user.email=x@x"]
    monkeypatch.setattr(environment, "_ROOT", tmp_path)
    assert environment.commit() == ""
    (tmp_path / "a").write_text("a")
    for command_of_git in (["init", "-q"], ["add", "a"], ["commit", "-qm", "a"]):
        subprocess.run([*git, *command_of_git], check=True)
    index = tmp_path / ".git/index"
    os.utime(tmp_path / "a", (1, 1))  # git would note that the file is the same all the same
    before = index.read_bytes(), index.stat().st_mtime_ns
    commit = environment.commit()
    assert len(commit) >= 7 and "-dirty" not in commit
    assert (index.read_bytes(), index.stat().st_mtime_ns) == before
    (tmp_path / "a").write_text("b")
    assert environment.commit() == f"{commit}-dirty"

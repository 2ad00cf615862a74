"""`experiments.serve` as a user starts it, in a process of its own."""

from collections.abc import Iterator
import contextlib
import http.client
import json
import pathlib
import signal
import subprocess
import time
from urllib.parse import urlsplit

import jax
import numpy as np

from experiments.engine import build
from experiments.engine import config as config_lib
from rll_jax.training import checkpoint
from tests.helpers.commands import command


class SearchServer:
    """A server that runs.

    Attributes:
      url: its address, without "/" at the end.
      images: the folder that it searches.
      process: it.
    """

    def __init__(self, process: subprocess.Popen, url: str, images: pathlib.Path) -> None:
        self.process, self.url, self.images = process, url, images

    def ask(self, path, *, method="GET", body=None, headers=None):
        """The status, the headers and the body; the path goes out as it is."""
        connection = http.client.HTTPConnection(urlsplit(self.url).netloc, timeout=60)
        try:
            connection.request(method, path, body, headers or {})
            answer = connection.getresponse()
            return answer.status, answer.headers, answer.read()
        finally:
            connection.close()

    def json(self, path, **kwargs):
        status, _, body = self.ask(path, **kwargs)
        assert status == 200, body
        return json.loads(body)

    def number(self, name):
        """The number of an image."""
        found = self.json("/api/images?limit=1000")["images"]
        return next(image["number"] for image in found if image["name"] == name)


@contextlib.contextmanager
def serving(images: pathlib.Path, *arguments: str, stop=signal.SIGTERM) -> Iterator[SearchServer]:
    """Starts a server, and ends it by a signal, quietly."""
    given = command(f"--images={images}", "--port=0", *arguments, name="serve")
    process = subprocess.Popen(**given, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        line = process.stdout.readline()
        assert line.startswith("http://127.0.0.1:"), line + process.stderr.read()
        yield SearchServer(process, line.split()[0], images)
        process.send_signal(stop)
        out, err = process.communicate(timeout=30)
        assert process.returncode == 0 and not out and "Traceback" not in err, err
    finally:
        process.kill()
        process.wait()


def two_runs(folder: pathlib.Path, dim: int = 16) -> list[pathlib.Path]:
    """Writes two runs that are at their start, with different weights, in the time of no step."""
    config = config_lib.from_flat(
        backbone="resnet_tiny", image_size=16, embedding_dim=dim, eval_batch_size=64
    )
    state = jax.jit(lambda: build.create_state(config))()
    noise = np.random.default_rng(0)
    other = jax.tree.map(lambda leaf: leaf + noise.normal(0, 0.05, leaf.shape), state.params)
    runs = [folder / "first", folder / "second"]
    for step, run, params in zip((4, 3), runs, (state.params, other), strict=True):
        run.mkdir()
        (run / "flags.txt").write_text(config.as_flagfile())
        params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), params)
        with checkpoint.Checkpoints(run / "checkpoints") as saved:
            saved.save(step, state.replace(params=params))
    return runs


def write_images(folder: pathlib.Path, data, rows) -> None:
    """Writes images of the emoji in a folder for each class."""
    for row in rows:
        path = folder / f"class {data.labels[row]}" / f"{row}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data.image_bytes(row))


def waited(condition, seconds=30):
    """Waits until something is so, and returns it."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.05)
    return found

"""`experiments.serve` as a user starts it, in a process of its own."""

from collections.abc import Iterator
import contextlib
import http.client
import json
import pathlib
import shutil
import signal
import subprocess
import time
from urllib.parse import urlsplit

from tests.helpers.commands import FEW, command, run


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


def two_runs(folder: pathlib.Path) -> list[pathlib.Path]:
    """Trains a run for some steps, and takes its last but one checkpoint for another."""
    small = [flag for flag in FEW if "steps" not in flag and "eval_every" not in flag]
    runs = [folder / "first", folder / "second"]
    result = run(*small, "--steps=4", "--eval_every=4", f"--workdir={runs[0]}")
    assert result.returncode == 0, result.stderr
    shutil.copytree(runs[0], runs[1])
    shutil.rmtree(runs[1] / "checkpoints/4")
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

"""The server of the page to search in under load: 2,000 requests over 10,000 images."""

from collections.abc import Iterator
from concurrent import futures
import http.client
import io
import threading
import time
from urllib.parse import urlsplit

import numpy as np
from PIL import Image
import pytest

from tests.helpers.search_server import serving, two_runs

pytest.importorskip("starlette", reason="the extra [serve] is not installed")
pytest.importorskip("uvicorn", reason="the extra [serve] is not installed")

IMAGES, REQUESTS, CLIENTS = 10_000, 2_000, 8


def photograph(rng):
    """A JPEG of 320 x 240 pixels, as large as a photograph's."""
    pixels = rng.integers(0, 256, (12, 16, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).resize((320, 240), Image.Resampling.BICUBIC).save(file, "JPEG")
    return file.getvalue()


def requests(rng) -> Iterator[tuple[str, str, bytes | None]]:
    """What people ask who look through the images, click, and send one picture in twenty."""
    for kind in rng.choice(
        ["thumbnail", "nearest", "page", "sent"], REQUESTS, p=[0.6, 0.25, 0.1, 0.05]
    ):
        number = int(rng.integers(IMAGES))
        yield {
            "thumbnail": (kind, f"/thumbnails/{number}", None),
            "nearest": (kind, f"/api/nearest/{number}?k=20", None),
            "page": (kind, f"/api/images?offset={number}&limit=120", None),
            "sent": (kind, "/api/nearest?k=20", photograph(rng)),
        }[kind]


@pytest.mark.slow
def test_load(tmp_path, capsys):
    rng = np.random.default_rng(0)
    for number in range(IMAGES):
        path = tmp_path / f"images/class {number % 500}/{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(photograph(rng))
    (run, _) = two_runs(tmp_path, dim=512)
    kept = threading.local()

    def timed(request):
        kind, path, body = request
        if not hasattr(kept, "connection"):
            kept.connection = http.client.HTTPConnection(urlsplit(server.url).netloc, timeout=60)
        start = time.perf_counter()
        kept.connection.request("GET" if body is None else "POST", path, body)
        answer = kept.connection.getresponse()
        answer.read()
        return kind, answer.status, time.perf_counter() - start

    with serving(tmp_path / "images", f"--workdir={run}") as server:
        assert server.json("/api/collection")["runs"][0]["dimension"] == 512
        with futures.ThreadPoolExecutor(CLIENTS) as pool:
            start = time.perf_counter()
            found = list(pool.map(timed, requests(rng)))
            seconds = time.perf_counter() - start
    assert {status for _, status, _ in found} == {200}
    lines = [f"{REQUESTS} requests by {CLIENTS} clients in {seconds:.1f} s"]
    for kind in ("thumbnail", "nearest", "page", "sent", "all"):
        times = [1000 * each for name, _, each in found if kind in (name, "all")]
        middle, high = np.percentile(times, [50, 95])
        lines.append(f"{kind}: {len(times)}, median {middle:.0f} ms, p95 {high:.0f} ms")
    print(*lines, sep="\n")
    with capsys.disabled():
        print("", *lines, sep="\n")
    assert np.percentile([each for _, _, each in found], 95) < 0.3

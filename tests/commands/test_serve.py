"""The server of the page to search in: what it answers, what it refuses, how it starts and ends."""

import io
import json
import pathlib
import signal
import socket

import numpy as np
from PIL import Image
import pytest

from experiments import serve
from experiments.engine import finished_runs
from rll_jax import metrics
from tests.helpers.commands import refused
from tests.helpers.search_server import serving, two_runs, waited, write_images

pytest.importorskip("starlette", reason="the extra [serve] is not installed")
pytest.importorskip("uvicorn", reason="the extra [serve] is not installed")

from experiments.engine import search_server  # noqa: E402 (needs starlette)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return two_runs(tmp_path_factory.mktemp("serve"))


@pytest.fixture(scope="module")
def server(runs, tmp_path_factory, emoji):
    folder = tmp_path_factory.mktemp("collection") / "pictures"
    write_images(folder, emoji["test"], range(60))
    (folder / "alone.png").write_bytes(emoji["test"].image_bytes(70))
    (folder / "broken.png").write_bytes(emoji["test"].image_bytes(0)[:100])
    workdirs = ",".join(map(str, runs))
    with serving(folder, f"--workdir={workdirs}", "--update_seconds=0") as found:
        yield found


@pytest.fixture(scope="module")
def embeddings(server, runs):
    """{run: {name: embedding}} as the index has them."""
    found = []
    for workdir in runs:
        (part,) = workdir.glob("index/*/*.npz")
        with np.load(part) as index:
            found.append(dict(zip(index["files"].tolist(), index["embeddings"], strict=True)))
    return found


def test_the_collection(server, emoji):
    found = server.json("/api/collection")
    assert found["count"] == 61 and found["unreadable"] == 1 and not found["problem"]
    assert [(run["name"], run["step"]) for run in found["runs"]] == [("first", 4), ("second", 3)]
    counts = {each["name"]: each["count"] for each in found["classes"]}
    labels, sizes = np.unique(emoji["test"].labels[:60], return_counts=True)
    assert counts == {f"class {c}": n for c, n in zip(labels, sizes.tolist(), strict=True)}
    first = server.json("/api/images?limit=1000")
    assert first["total"] == 61 and [i["number"] for i in first["images"]] == [*range(61)]
    names = [image["name"] for image in first["images"]]
    assert names == sorted(names)
    part = server.json("/api/images?offset=59&limit=100")
    assert part["images"] == first["images"][59:]
    name = found["classes"][1]["name"]
    of_class = server.json(f"/api/images?class={name.replace(' ', '%20')}")
    assert {image["class"] for image in of_class["images"]} == {name}
    assert of_class["total"] == counts[name]
    assert server.number("alone.png") == 0 and first["images"][0]["class"] is None


def test_nearest_is_that_of_the_metrics(server, embeddings):
    images = server.json("/api/images?limit=1000")["images"]
    names = [image["name"] for image in images]
    for number in (0, 17, 60):
        found = server.json(f"/api/nearest/{number}?k=9")
        assert found["query"] == images[number]
        answers = []
        for run, known in zip(found["runs"], embeddings, strict=True):
            x = np.array([known[name] for name in names])
            rows, similarities = metrics.nearest(x[[number]], x, 9, leave_out=[number])
            assert [image["number"] for image in run["images"]] == rows[0].tolist()
            shown = [image["similarity"] for image in run["images"]]
            np.testing.assert_allclose(shown, similarities[0], atol=2e-6)
            own = images[number]["class"]
            same = [image["class"] == own and own is not None for image in run["images"]]
            assert [image["same_class"] for image in run["images"]] == same
            assert run["same_class"] == sum(same)
            answers.append(rows[0].tolist())
        common = set(answers[0]) & set(answers[1])
        assert found["agree"] == len(common)
        for run in found["runs"]:
            assert [i["common"] for i in run["images"]] == [
                i["number"] in common for i in run["images"]
            ]
    alone = server.json("/api/nearest/17?k=9&run=1")
    assert alone["agree"] is None and [run["run"] for run in alone["runs"]] == [1]
    assert [i["number"] for i in alone["runs"][0]["images"]] == [
        i["number"] for i in server.json("/api/nearest/17?k=9")["runs"][1]["images"]
    ]
    own = images[17]["class"].replace(" ", "%20")
    among = server.json(f"/api/nearest/17?class={own}&k=200")["runs"][0]
    total = server.json(f"/api/images?class={own}")["total"]
    assert among["same_class"] == len(among["images"]) == total - 1


def test_a_picture_sent_is_searched_and_not_kept(server, runs, embeddings):
    def files():
        return sorted(p for folder in (server.images, *runs) for p in folder.rglob("*"))

    before = files()
    name = server.json("/api/images?offset=20&limit=1")["images"][0]["name"]
    data = (server.images / name).read_bytes()
    found = server.json("/api/nearest?k=5", method="POST", body=data)
    for run in found["runs"]:
        assert run["images"][0]["name"] == name
        assert run["images"][0]["similarity"] == pytest.approx(1, abs=1e-4)
    clicked = server.json("/api/nearest/20?k=4")
    assert [i["number"] for i in found["runs"][1]["images"][1:]] == [
        i["number"] for i in clicked["runs"][1]["images"]
    ]
    assert found["query"]["width"] == 64 and found["query"]["thumbnail"].startswith(
        "data:image/png"
    )
    assert files() == before


def test_where_the_runs_differ(server, embeddings):
    images = server.json("/api/images?limit=1000")["images"]
    classes = np.array([image["class"] or "" for image in images])
    right = []
    for known in embeddings:
        x = np.array([known[image["name"]] for image in images])
        rows, _ = metrics.nearest(x, x, 1, leave_out=np.arange(61))
        right.append((classes[rows[:, 0]] == classes) & (classes != ""))
    for run in (0, 1):
        path = f"/api/images?right_only_in={run}&limit=1000"
        waited(lambda path=path: server.ask(path)[0] == 200)
        found = server.json(path)
        expected = np.flatnonzero(right[run] & ~right[1 - run]).tolist()
        assert [image["number"] for image in found["images"]] == expected


def png(size, mode="1"):
    file = io.BytesIO()
    Image.new(mode, size).save(file, "PNG")
    return file.getvalue()


SVG = b"<svg xmlns='http://www.w3.org/2000/svg'><script>alert(1)</script></svg>"


@pytest.mark.parametrize(
    ("path", "body", "status", "sentence"),
    [
        ("/api/nearest", b"no picture", 415, "cannot be read as a picture: it is of no kind"),
        ("/api/nearest", SVG, 415, "cannot be read as a picture: it is of no kind"),
        ("/api/nearest", png((64, 64))[:45], 415, "cannot be read as a picture"),
        ("/api/nearest", b"", 415, "is empty"),
        ("/api/nearest", png((8000, 7000)), 413, "8000 x 7000 pixels; at most 50 million"),
        ("/api/nearest", png((20000, 20000)), 415, "decompression bomb"),
        ("/api/nearest", bytes(20_000_001), 413, "more than 20 MB"),
        ("/api/nearest/61", None, 404, "no image of number 61"),
        ("/api/nearest/-1", None, 404, "no image of number -1"),
        ("/api/nearest/1e1", None, 404, "no image of number"),
        ("/api/nearest/" + "9" * 5000, None, 404, "no image of number 99999"),
        ("/api/nearest/%D9%A1", None, 404, "no image of number"),
        ("/api/nearest/1?k=0", None, 400, "k=0: expected a whole number from 1 to 200"),
        ("/api/nearest/1?k=201", None, 400, "k=201"),
        ("/api/nearest/1?k=ten", None, 400, "k=ten"),
        ("/api/nearest/1?run=2", None, 400, "run=2: expected a whole number from 0 to 1"),
        ("/api/nearest/1?class=none", None, 404, "no class 'none'"),
        ("/api/nearest/1?collection=other", None, 409, "load the page again"),
        ("/api/images?offset=-1", None, 400, "offset=-1"),
        ("/api/images?limit=1001", None, 400, "limit=1001"),
        ("/api/images?right_only_in=2", None, 400, "right_only_in=2"),
        ("/thumbnails/61", None, 404, "no image of number 61"),
        ("/thumbnails/1?v=other.1.2", None, 409, "load the page again"),
        ("/images/x", None, 404, "no image of number x"),
        ("/api/nothing", None, 404, "nothing at this address"),
        ("/api/update", None, 405, "nothing at this address"),
    ],
    ids=lambda value: str(value)[:30] if not isinstance(value, bytes) else f"{len(value)} bytes",
)  # fmt: skip
def test_bad_requests_get_a_sentence(server, path, body, status, sentence):
    found, headers, answer = server.ask(path, method="GET" if body is None else "POST", body=body)
    assert found == status and sentence in json.loads(answer)["error"]
    assert headers["X-Content-Type-Options"] == "nosniff"


OUT = [
    "/images/../../etc/passwd",
    "/images/..%2f..%2fetc%2fpasswd",
    "/images/%2e%2e/%2e%2e/etc/passwd",
    "/images/%252e%252e%252fetc%252fpasswd",
    "/images/..%5c..%5cetc%5cpasswd",
    "/images//etc/passwd",
    "/images/%2fetc%2fpasswd",
    "/images/0/../../../../etc/passwd",
    "/images/0%00/etc/passwd",
    "/images/file:///etc/passwd",
    "/images/alone.png",
    "/thumbnails/../../etc/passwd",
    "/static/../search_server.py",
    "/static/..%2fsearch_server.py",
    "/static/%2e%2e/%2e%2e/serve.py",
    "/../../../../etc/passwd",
    "//etc/passwd",
]


@pytest.mark.parametrize("path", OUT)
def test_no_path_leads_out(server, path):
    status, headers, body = server.ask(path)
    assert status in (400, 404) and b"root:" not in body and b"import" not in body
    assert headers["Content-Type"].startswith(("application/json", "text/plain"))


def test_names_of_a_server_that_everyone_near_may_call():
    names = search_server._names("0.0.0.0")
    own = [socket.gethostname().upper(), "localhost", "192.168.1.7", "[fe80::1]"]
    for host in own:
        assert search_server._is_own(f"{host}:8000", names) and search_server._is_own(host, names)
    for host in ("evil.example", "192.168.1.7.evil.example:8000", "", "[evil]", "*"):
        assert not search_server._is_own(host, names)


def test_others_are_shut_out(server):
    """A site whose name leads here, and a page of another site that sends something."""
    for host in ("evil.example", "127.0.0.1.evil.example:80", "localhost.evil.example", ""):
        assert server.ask("/api/collection", headers={"Host": host})[0] == 400
    port = server.url.rpartition(":")[2]
    assert server.ask("/", headers={"Host": f"localhost:{port}"})[0] == 200
    foreign = [
        {"Origin": "https://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://127.0.0.1:1"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
    ]
    for path in ("/api/nearest", "/api/update"):
        for headers in foreign:
            status, _, body = server.ask(path, method="POST", body=png((9, 9)), headers=headers)
            assert status == 403 and b"Another site" in body
    headers = {"Origin": server.url, "Sec-Fetch-Site": "same-origin"}
    assert server.ask("/api/nearest", method="POST", body=png((9, 9)), headers=headers)[0] == 200
    _, headers, _ = server.ask("/")
    assert headers["Content-Security-Policy"].startswith("default-src 'self'")
    assert headers["Cross-Origin-Resource-Policy"] == "same-origin"
    assert "Access-Control-Allow-Origin" not in headers


def test_pictures_are_encoded_anew_and_kept_by_the_browser(server):
    image = server.json("/api/images?offset=5&limit=1")["images"][0]
    for kind in ("thumbnails", "images"):
        path = f"/{kind}/5"
        status, headers, body = server.ask(path)
        assert status == 200 and headers["Content-Type"] == "image/png"
        assert (
            Image.open(io.BytesIO(body)).size == (64, 64) and "no-cache" in headers["Cache-Control"]
        )
        again, _, nothing = server.ask(path, headers={"If-None-Match": headers["ETag"]})
        assert again == 304 and not nothing
        _, headers, _ = server.ask(f"{path}?v={image['v']}")
        assert "immutable" in headers["Cache-Control"]


def test_changed_files_are_followed(server, emoji):
    def updated():
        status, _, body = server.ask("/api/update", method="POST")
        assert status == 202
        look = json.loads(body)["look"]
        return waited(lambda: (now := server.json("/api/collection"))["looks"] >= look and now)

    before = server.json("/api/images?limit=1000")["images"]
    path = server.images / "a new class" / "<b>&amp;.jpg"
    path.parent.mkdir()
    with Image.open(io.BytesIO(emoji["test"].image_bytes(80))) as image:
        image.convert("RGB").resize((600, 900)).save(path)
    version = server.json("/api/collection")["version"]
    assert updated()["count"] == 62
    after = server.json("/api/images?limit=1000")["images"]
    assert after[:61] == before and after[61]["number"] == 61
    assert after[61]["name"] == "a new class/<b>&amp;.jpg"
    status, headers, body = server.ask("/thumbnails/61")
    assert status == 200 and headers["Content-Type"] == "image/jpeg"
    assert Image.open(io.BytesIO(body)).size == (171, 256)
    path.unlink()
    status, _, body = server.ask("/thumbnails/61?v=" + after[61]["v"])
    assert status == 200  # it is in memory
    status, _, body = server.ask("/images/61")
    assert status == 404 and json.loads(body)["error"] == "The file is gone."
    assert updated()["count"] == 61
    assert server.json("/api/images?limit=1000")["images"] == before
    assert server.ask("/thumbnails/61")[0] == server.ask("/api/nearest/61")[0] == 404
    last = updated()
    assert last["version"] == version + 2 and not last["problem"] and not last["updating"]


def test_a_second_start_embeds_nothing_and_ctrl_c_ends_it(server, runs):
    parts = sorted(runs[0].glob("index/*/*.npz"))
    stamps = [part.stat().st_mtime_ns for part in parts]
    with serving(server.images, f"--workdir={runs[0]}", stop=signal.SIGINT) as second:
        found = second.json("/api/collection")
        assert found["count"] == 61 and len(found["runs"]) == 1
        assert found["id"] == server.json("/api/collection")["id"]
        assert second.json("/api/nearest/3")["agree"] is None
        assert second.ask("/api/images?right_only_in=0")[0] == 400
    assert sorted(runs[0].glob("index/*/*.npz"))[: len(parts)] == parts
    assert [part.stat().st_mtime_ns for part in parts] == stamps


def test_mistakes(server, runs, tmp_path, monkeypatch):
    given = f"--images={server.images}"
    port = server.url.rpartition(":")[2]
    refused("cannot listen there", f"--workdir={runs[0]}", given, f"--port={port}", name="serve")
    refused("expected 0 to 65535", f"--workdir={runs[0]}", given, "--port=70000", name="serve")
    refused("no address of this", f"--workdir={runs[0]}", given, "--host=no.invalid", name="serve")
    refused("no such folder", f"--workdir={runs[0]}", "--images=/nowhere", "--port=0", name="serve")
    refused(
        "no images in it", f"--workdir={runs[0]}", f"--images={tmp_path}", "--port=0", name="serve"
    )
    refused("holds no run", f"--workdir={runs[0]},{tmp_path}", given, "--port=0", name="serve")
    refused(
        "expected the folder of a run, or of two",
        f"--workdir={runs[0]},{runs[0]}",
        given,
        name="serve",
    )
    refused("update_seconds", f"--workdir={runs[0]}", given, "--update_seconds=-1", name="serve")
    refused("update_seconds", f"--workdir={runs[0]}", given, "--update_seconds=nan", name="serve")
    monkeypatch.setattr(serve.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="starlette and uvicorn: pip install starlette uvicorn"):
        serve._check_installed()


def test_names_of_runs():
    folders = serve._workdirs("x/run,y/run")
    assert folders == [pathlib.Path("x/run").absolute(), pathlib.Path("y/run").absolute()]
    assert finished_runs.short_names(folders) == ["x/run", "y/run"]
    assert finished_runs.short_names(serve._workdirs("runs/a")) == ["a"]

"""The page to search in, in headless Chromium, as a person uses it."""

import base64
import io
import re
from urllib.parse import urlsplit

from PIL import Image
import pytest

from tests.helpers.browser import chromium
from tests.helpers.search_server import serving, two_runs, write_images

pytest.importorskip("starlette", reason="the extra [serve] is not installed")
pytest.importorskip("uvicorn", reason="the extra [serve] is not installed")
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
expect = playwright.expect

EVIL = "<img src=x onerror=document.title='run'>"  # the name of a class and of a file


@pytest.fixture(scope="module")
def server(tmp_path_factory, emoji):
    """Three hundred images in forty classes and one with a name that is HTML, and two runs."""
    folder = tmp_path_factory.mktemp("page") / "pictures"
    write_images(folder, emoji["test"], range(300))
    (folder / EVIL).mkdir()
    for name in (f"{EVIL}.png", "2.png"):
        (folder / EVIL / name).write_bytes(emoji["test"].image_bytes(400))
    runs = two_runs(tmp_path_factory.mktemp("runs"))
    workdirs = ",".join(map(str, runs))
    with serving(folder, f"--workdir={workdirs}", "--update_seconds=0") as found:
        yield found


@pytest.fixture(scope="module")
def browser():
    with chromium() as browser:
        yield browser


@pytest.fixture
def page(browser, server):
    """The page; it asks no other host, and nothing fails but what the server refused."""
    context = browser.new_context(viewport={"width": 1200, "height": 800}, locale="en")
    page = context.new_page()
    page.set_default_timeout(20_000)
    faults, hosts = [], set()
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("console", lambda told: faults.append(told.text) if told.type == "error" else None)
    page.on("request", lambda request: hosts.add(urlsplit(request.url).netloc))
    page.goto(server.url)
    expect(page.locator("h1")).to_have_text("302 images")
    yield page
    assert not [fault for fault in faults if "responded with a status of 4" not in fault]
    assert hosts <= {urlsplit(server.url).netloc, ""}  # data: has no host
    context.close()


def drop(page, data, name, kind="image/png"):
    """Drops a file on the page, as a browser tells of it."""
    page.evaluate(
        """([data, name, type]) => {
          const bytes = Uint8Array.from(atob(data), (sign) => sign.charCodeAt(0));
          const dataTransfer = new DataTransfer();
          dataTransfer.items.add(new File([bytes], name, { type }));
          for (const kind of ["dragover", "drop"])
            document.body.dispatchEvent(
              new DragEvent(kind, { dataTransfer, bubbles: true, cancelable: true }));
        }""",
        [base64.b64encode(data).decode(), name, kind],
    )


def numbers(page, run=0):
    """The numbers of the images that are found."""
    links = page.locator(".runs section").nth(run).locator("a.tile")
    hrefs = [link.get_attribute("href") for link in links.all()]
    return [int(re.match(r"#/image/(\d+)", href)[1]) for href in hrefs]


def is_shown(image):
    return image.evaluate("async (image) => (await image.decode(), image.naturalWidth > 0)")


def test_click_and_walk_and_back(page, server):
    page.locator("a.tile img").nth(7).click()
    expect(page.locator("h1")).to_have_text(server.json("/api/images?limit=9")["images"][7]["name"])
    found = server.json("/api/nearest/7?k=20")
    for run in (0, 1):
        assert numbers(page, run) == [image["number"] for image in found["runs"][run]["images"]]
    first, told = page.locator("a.tile").first, found["runs"][0]["images"][0]
    for text in (f"{told['similarity']:.3f}", told["class"], told["name"]):
        expect(first).to_contain_text(text)
    assert is_shown(first.locator("img")) and is_shown(page.locator(".query img"))
    first.click()
    expect(page.locator("h1")).to_have_text(told["name"])
    expect(page.locator(".trail a")).to_have_count(2)
    page.go_back()
    expect(page.locator("h1")).to_have_text(found["query"]["name"])
    page.go_back()
    expect(page.locator("h1")).to_have_text("302 images")
    page.go_forward()
    expect(page.locator("h1")).to_have_text(found["query"]["name"])
    page.reload()
    expect(page.locator("h1")).to_have_text(found["query"]["name"])


def test_compare(page, server):
    page.goto(f"{server.url}/#/image/30?k=10")
    found = server.json("/api/nearest/30?k=10")
    expect(page.locator("#agree")).to_have_text(
        f"The runs agree on {found['agree']} of the first 10."
    )
    assert page.locator("h2").all_text_contents() == ["first", "second"]
    assert page.locator(".alone").count() == 2 * (10 - found["agree"])
    right = sum(run["same_class"] for run in found["runs"])
    assert page.locator(".badge:not(.only)").count() == right
    page.select_option("#k", "50")
    expect(page.locator(".runs section").first.locator("a.tile")).to_have_count(50)
    for run, other in (("first", "second"), ("second", "first")):
        page.goto(f"{server.url}/#/")
        page.get_by_role("link", name=f"Right only in {run}").click()
        expect(page.locator("h1")).to_contain_text(f"right class in {run}, not in {other}")
        number = ["first", "second"].index(run)
        total = server.json(f"/api/images?right_only_in={number}")["total"]
        expect(page.locator("h1")).to_have_text(re.compile(f"^{total} image"))
        expect(page.locator("a.tile")).to_have_count(min(total, page.locator("li a.tile").count()))


def test_filter(page, server):
    chosen = server.json("/api/collection")["classes"][3]
    page.get_by_role("searchbox").fill(chosen["name"].upper())
    page.locator("#class-list button").first.click()
    expect(page.locator("h1")).to_have_text(f"{chosen['count']} images of {chosen['name']}")
    expect(page.locator("a.tile")).to_have_count(chosen["count"])
    page.locator("a.tile").first.click()
    expect(page.locator(".query")).to_be_visible()
    page.locator(f"#class-list button[title='{chosen['name']}']").click()
    expect(page.locator(".controls .chip")).to_contain_text(chosen["name"])
    expect(page.locator(".runs section").first.locator("a.tile")).to_have_count(chosen["count"] - 1)
    page.locator(".controls .chip").click()
    expect(page.locator(".runs section").first.locator("a.tile")).to_have_count(20)
    page.get_by_role("searchbox").fill("no such class")
    expect(page.locator("#class-list")).to_have_text("No class has this in its name.")


def test_drop_choose_and_paste(page, server):
    image = server.json("/api/images?offset=100&limit=1")["images"][0]
    data = (server.images / image["name"]).read_bytes()
    drop(page, data, "mine.png")
    expect(page.locator("h1")).to_have_text("mine.png")
    assert numbers(page, 0)[0] == numbers(page, 1)[0] == 100
    expect(page.locator("a.tile").first).to_contain_text("1.000")
    assert is_shown(page.locator(".query img"))
    page.locator("a.tile").nth(1).click()
    expect(page.locator("h1")).not_to_have_text("mine.png")
    page.go_back()
    expect(page.locator("h1")).to_have_text("mine.png")
    file = io.BytesIO()
    with Image.open(io.BytesIO(data)) as opened:
        opened.convert("RGB").save(file, "TIFF")  # which Chromium cannot show
    page.set_input_files(
        "#file", {"name": "b.tif", "mimeType": "image/tiff", "buffer": file.getvalue()}
    )
    expect(page.locator("h1")).to_have_text("b.tif")
    assert numbers(page)[0] == 100 and is_shown(page.locator(".query img"))
    page.evaluate(
        """(data) => {
          const clipboardData = new DataTransfer();
          const bytes = Uint8Array.from(atob(data), (sign) => sign.charCodeAt(0));
          clipboardData.items.add(new File([bytes], "pasted.png", { type: "image/png" }));
          document.dispatchEvent(new ClipboardEvent("paste", { clipboardData }));
        }""",
        base64.b64encode(data).decode(),
    )
    expect(page.locator("h1")).to_have_text("pasted.png")
    page.reload()
    expect(page.get_by_role("alert")).to_have_text("A dropped picture is not kept: drop it again.")


def test_bad_files_get_a_sentence(page, server, tmp_path):
    drop(page, b"<svg xmlns='http://www.w3.org/2000/svg'/>", "a.svg", "image/svg+xml")
    expect(page.get_by_role("alert")).to_contain_text("cannot be read as a picture")
    drop(page, (server.images / EVIL / "2.png").read_bytes()[:90], "broken.png")
    expect(page.get_by_role("alert")).to_contain_text("cannot be read as a picture")
    assert "#/sent/1" in page.url
    drop(page, b"", "empty.png")
    expect(page.get_by_role("alert")).to_have_text("The file is empty.")
    wide = io.BytesIO()
    Image.new("1", (9000, 8000)).save(wide, "PNG")
    drop(page, wide.getvalue(), "wide.png")
    expect(page.get_by_role("alert")).to_contain_text("9000 x 8000 pixels; at most 50 million")
    with (tmp_path / "long.png").open("wb") as long:
        long.truncate(25_000_000)
    page.set_input_files("#file", tmp_path / "long.png")
    expect(page.get_by_role("alert")).to_have_text(
        "long.png has 25 MB, more than the 20 MB that are taken."
    )
    page.goto(f"{server.url}/#/image/99999")
    expect(page.get_by_role("alert")).to_contain_text("no image of number 99999")
    page.goto(f"{server.url}/#/image/3?of=another")
    expect(page.get_by_role("alert")).to_contain_text("load the page again")
    page.get_by_role("link", name="All images").click()
    expect(page.locator("h1")).to_have_text("302 images")


def test_a_lost_file_gets_a_sentence_where_the_picture_would_be(page, server):
    name = server.json("/api/images?offset=250&limit=1")["images"][0]["name"]
    data = (server.images / name).read_bytes()
    for content, told in ((None, "The file is gone."), (b"text", "cannot be read as a picture")):
        (server.images / name).unlink()
        if content is not None:
            (server.images / name).write_bytes(content)
        page.goto(f"{server.url}/#/image/250?k={10 if content else 20}")
        expect(page.locator(".query .lost")).to_contain_text(told)
        (server.images / name).write_bytes(data)


def test_names_are_text(page, server):
    number = server.number(f"{EVIL}/{EVIL}.png")
    page.get_by_role("searchbox").fill("onerror")
    expect(page.locator("#class-list button span").first).to_have_text(EVIL)
    page.locator("#class-list button").first.click()
    expect(page.locator("h1")).to_have_text(f"2 images of {EVIL}")
    page.goto(f"{server.url}/#/image/{number}")
    expect(page.locator("h1")).to_have_text(f"{EVIL}/{EVIL}.png")
    expect(page.locator(".query .chip").first).to_have_text(EVIL)
    expect(page.locator("a.tile").first).to_contain_text("1.000")
    drop(page, (server.images / EVIL / "2.png").read_bytes(), f"{EVIL}.png")
    expect(page.locator("h1")).to_have_text(f"{EVIL}.png")
    assert page.title() != "run" and page.locator("img[src='x']").count() == 0


def test_keys_alone(page, server):
    def focused():
        return page.evaluate("document.activeElement.getAttribute('href')").partition("?")[0]

    page.keyboard.press("Tab")
    expect(page.locator(":focus")).to_have_text("Skip to the images")
    page.keyboard.press("ArrowRight")
    assert focused() == "#/image/0"
    page.keyboard.press("ArrowRight")
    assert focused() == "#/image/1"
    page.keyboard.press("ArrowDown")
    below = int(focused().rpartition("/")[2])
    assert below > 2
    page.keyboard.press("ArrowUp")
    assert focused() == "#/image/1"
    page.keyboard.press("End")
    expect(page.locator(":focus")).to_have_attribute("href", re.compile("#/image/301"))
    page.keyboard.press("Home")
    expect(page.locator(":focus")).to_have_attribute("href", re.compile("#/image/0"))
    page.keyboard.press("Enter")
    expect(page.locator(".query")).to_be_visible()
    page.keyboard.press("ArrowRight")
    second = focused()
    page.keyboard.press("Enter")
    expect(page.locator(".trail a")).to_have_count(2)
    assert second in page.url
    chosen = server.json("/api/collection")["classes"][5]["name"]
    page.keyboard.press("/")
    page.keyboard.type(chosen)
    page.keyboard.press("Enter")
    expect(page.locator(".controls .chip")).to_contain_text(chosen)
    page.keyboard.press("Escape")
    expect(page.locator("h1")).to_contain_text(f"images of {chosen}")
    page.keyboard.press("Escape")
    expect(page.locator("h1")).to_have_text("302 images")


def test_a_narrow_screen(page, server):
    page.set_viewport_size({"width": 360, "height": 640})

    def fits():
        return page.evaluate("document.documentElement.scrollWidth <= innerWidth")

    for address in ("#/", "#/image/30", f"#/image/{server.number(f'{EVIL}/2.png')}"):
        page.goto(f"{server.url}/{address}")
        expect(page.locator("a.tile img").first).to_be_visible()
        assert fits(), address
    chosen = server.json("/api/collection")["classes"][2]["name"]
    expect(page.locator("#class-list")).to_be_hidden()
    page.get_by_role("searchbox").click()
    page.locator(f"#class-list button[title='{chosen}']").click()
    expect(page.locator("#class-list")).to_be_hidden()
    expect(page.locator(".controls .chip")).to_contain_text(chosen)
    page.set_viewport_size({"width": 360, "height": 640})
    assert fits()


def test_thumbnails_come_when_they_are_seen(page):
    edges = """[...document.querySelectorAll(".virtual a.tile")].map((tile) => {
      const { top, bottom } = tile.getBoundingClientRect();
      return [top, bottom];
    })"""
    boxes = page.evaluate(edges)  # the first names are long
    second_row = min(top for top, _ in boxes if top > boxes[0][0])
    assert all(bottom <= second_row for top, bottom in boxes if top == boxes[0][0])
    assert page.locator("a.tile").count() < 100
    page.evaluate("scrollTo(0, document.body.scrollHeight)")
    expect(page.locator("a.tile[href*='image/301?']")).to_be_visible()
    assert page.locator("a.tile").count() < 100
    before = page.evaluate("scrollY")
    page.locator("a.tile[href*='image/301?']").click()
    expect(page.locator(".query")).to_be_visible()
    assert page.evaluate("scrollY") == 0
    page.go_back()
    expect(page.locator("a.tile[href*='image/301?']")).to_be_visible()
    assert abs(page.evaluate("scrollY") - before) < 300


def test_changed_files_are_shown(page, server, emoji):
    path = server.images / "new" / "new.png"
    path.parent.mkdir()
    path.write_bytes(emoji["test"].image_bytes(500))
    page.get_by_role("button", name="Update").click()
    expect(page.get_by_role("status")).to_have_text("The files have changed: 303 images now.")
    expect(page.locator("h1")).to_have_text("303 images")
    path.unlink()
    page.get_by_role("button", name="Update").click()
    expect(page.locator("h1")).to_have_text("302 images")
    page.get_by_role("button", name="Update").click()
    expect(page.get_by_role("status")).to_have_text("No file has changed.")

"""The page of test.py --report in a real browser: headless Chromium, driven by WebDriver."""

import http.client
import json
import shutil
import socket
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import noise
from PIL import Image

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    not (BROWSER and DRIVER), reason="needs chromium and chromedriver (Debian: chromium-driver)"
)
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
FLAGS += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]


class Browser:
    """A WebDriver session (W3C protocol) with a window of some size."""

    def __init__(self, profile: Path, width: int, height: int) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self.driver = subprocess.Popen([DRIVER, f"--port={self.port}"], **quiet)
        flags = [*FLAGS, f"--user-data-dir={profile}", f"--window-size={width},{height}"]
        options = {"goog:chromeOptions": {"binary": BROWSER, "args": flags}}
        self.path = ""
        for _ in range(100):
            try:
                session = self.post("/session", {"capabilities": {"alwaysMatch": options}})
                break
            except ConnectionRefusedError:
                time.sleep(0.1)
        self.path = f"/session/{session['sessionId']}"

    def post(self, command: str, body: dict, method: str = "POST") -> object:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        connection.request(method, self.path + command, json.dumps(body))
        value = json.loads(connection.getresponse().read())["value"]
        assert not isinstance(value, dict) or "error" not in value, value
        return value

    def run(self, script: str) -> object:
        """Return the result of JavaScript."""
        return self.post("/execute/sync", {"script": script, "args": []})

    def open(self, page: Path) -> None:
        """Load a page and wait until its viewers have decoded their images."""
        self.post("/url", {"url": page.as_uri()})
        self.wait("document.querySelector('figure[data-ready]')")

    def wait(self, condition: str) -> None:
        for _ in range(100):
            if self.run(f"return Boolean({condition})"):
                return
            time.sleep(0.05)
        raise AssertionError(f"{condition} has not become true")

    def drag(self, start: tuple, end: tuple, kind: str) -> None:
        """Press, move and release a mouse or a finger, in CSS pixels of the first canvas."""
        box = self.run(
            "const c = document.querySelector('canvas'); c.scrollIntoView({block: 'center'});"
            "const b = c.getBoundingClientRect(); return [b.left, b.top]"
        )
        points = [[round(box[i] + point[i]) for i in (0, 1)] for point in (start, end)]
        steps = [{"type": "pointerMove", "x": points[0][0], "y": points[0][1], "duration": 0}]
        steps += [{"type": "pointerDown", "button": 0}]
        steps += [{"type": "pointerMove", "x": points[1][0], "y": points[1][1], "duration": 50}]
        steps += [{"type": "pointerUp", "button": 0}]
        pointer = {"type": "pointer", "id": kind, "parameters": {"pointerType": kind}}
        self.post("/actions", {"actions": [pointer | {"actions": steps}]})

    def press(self, key: str) -> None:
        steps = [{"type": "keyDown", "value": key}, {"type": "keyUp", "value": key}]
        self.post("/actions", {"actions": [{"type": "key", "id": "keys", "actions": steps}]})

    def row(self) -> np.ndarray:
        """Return the middle row of the first canvas, pixels x RGB."""
        pixels = self.run(
            "const c = document.querySelector('canvas');"
            "const y = Math.round(c.height / 4);"
            "return [...c.getContext('2d').getImageData(0, y, c.width, 1).data]"
        )
        return np.array(pixels, int).reshape(-1, 4)[:, :3]

    def close(self) -> None:
        self.post("", {}, "DELETE")  # ends the browser
        self.driver.kill()
        self.driver.wait()


@pytest.fixture(params=[(1012, 900), (500, 844)], ids=["desktop", "narrow"])
def browser(request, tmp_path):
    browser = Browser(tmp_path / "profile", *request.param)
    yield browser
    browser.close()


@pytest.fixture
def page(call, tmp_path, monkeypatch, weights):
    """Return a report of three images, one of them with a hostile name, and one with alpha."""
    monkeypatch.chdir(tmp_path)
    Path("in").mkdir()
    for name, values in (
        ("a.png", noise(60, 66, 3)),
        ("<img onerror=alert(1) src=x>.png", noise(60, 66, seed=2)),
        ("</script><script>document.title=1</script>", noise(60, 66, 4, seed=3)),
    ):
        path = Path("in") / f"{name.replace('/', chr(0x2215))}"
        path = path if path.suffix == ".png" else path.with_name(path.name + ".png")
        Image.fromarray(values.astype(np.uint8)).save(path)
    flags = "--scale", 3, "--weights-file", weights
    result = call("test", "in", "--eval", *flags, "--report", "r.html", "--csv", "s.csv")
    assert (result.status, result.err) == (0, "")
    return tmp_path / "r.html"


def near(row: np.ndarray, other: np.ndarray) -> float:
    return np.abs(row - other).max()


def test_the_divider_is_dragged_by_mouse_touch_and_keyboard(browser, page):
    browser.open(page)
    width = browser.run("return document.querySelector('canvas').clientWidth")
    height = browser.run("return document.querySelector('canvas').clientHeight")
    browser.drag((width / 2, height / 2), (width, height / 2), "mouse")
    left = browser.row()  # all of the left image, bicubic
    browser.drag((width - 2, height / 2), (0, height / 2), "touch")
    right = browser.row()  # all of the right image, SRCNN
    assert np.abs(left - right).mean() > 1
    browser.drag((1, height / 2), (width / 4, height / 2), "mouse")
    row, x = browser.row(), round(len(left) / 4)
    assert near(row[: x - 3], left[: x - 3]) == 0
    assert near(row[x + 3 :], right[x + 3 :]) == 0
    browser.run("document.querySelector('canvas').focus()")
    browser.press("\ue010")  # End
    assert near(browser.row()[:-3], left[:-3]) == 0
    for _ in range(10):
        browser.press("\ue012")  # arrow left, one hundredth each
    row, x = browser.row(), round(0.9 * len(left))
    assert near(row[: x - 3], left[: x - 3]) == 0
    assert near(row[x + 3 :], right[x + 3 :]) == 0
    assert browser.run("return document.querySelector('canvas').ariaValueNow") == "90"


def test_zoom_has_square_pixels_of_the_embedded_image_and_both_sides_pan(browser, page):
    browser.open(page)
    browser.run(
        "for (const b of document.querySelectorAll('button'))"
        " if (b.textContent === '400 %') { b.click(); break }"
    )
    pixels = browser.row()
    inside = pixels[len(pixels) // 2 + 20 :][:160]
    changes = np.flatnonzero(np.abs(np.diff(inside, axis=0)).sum(1)) + 1
    assert len(changes) > 5 and len(set(changes % 4)) == 1  # blocks of 4 device pixels
    before = browser.run("return viewers[0].origin[0]")
    canvas = browser.run("const c = document.querySelector('canvas'); return [c.width, c.height]")
    fits = canvas[0] >= 4 * 66
    browser.drag((20, 20), (60, 20), "mouse")
    assert (browser.run("return viewers[0].origin[0]") == before) == fits or before == 0


def test_the_table_shows_the_scores_and_sorts_them(browser, page):
    browser.open(page)
    read = "return [...document.querySelectorAll('tbody tr')].map(r => r.innerText.split('\\t'))"
    rows = browser.run(read)
    lines = [line.split(",") for line in Path("s.csv").read_text().splitlines()]
    assert rows[0][0] == "mean" and len(rows) == 4
    scores = [float(line[2]) for line in lines[1:]]
    assert sorted(float(row[1]) for row in rows[1:]) == sorted(round(s, 2) for s in scores)
    browser.run("document.querySelectorAll('th button')[1].click()")
    rows = browser.run(read)
    assert rows[0][0] == "mean"
    values = [float(row[1]) for row in rows[1:]]
    assert values == sorted(values, reverse=True)


def test_hostile_names_are_text_and_nothing_is_fetched(browser, page):
    browser.open(page)
    assert browser.run("return document.title") == "SRCNN report"
    names = browser.run("return [...document.querySelectorAll('figcaption')].map(f => f.innerText)")
    assert "<img onerror=alert(1) src=x>.png" in names
    assert browser.run("return document.querySelectorAll('img').length") == 0
    fetched = browser.run("return performance.getEntriesByType('resource').map(e => e.name)")
    assert all(name.startswith("data:") for name in fetched)
    text = page.read_text()
    assert "http://" not in text and "https://" not in text
    assert browser.run("return document.documentElement.scrollWidth <= innerWidth")


def test_the_error_map_is_the_difference_to_the_original(browser, page):
    browser.open(page)
    browser.run(
        "const [left, right] = document.querySelectorAll('select');"
        "left.value = 'original'; right.value = 'error |SRCNN - original|'; right.onchange();"
    )
    assert (
        browser.run("return getComputedStyle(document.querySelector('.legend')).display") != "none"
    )
    browser.wait("viewers[0].error")
    error = browser.run(
        "const v = viewers[0], c = document.createElement('canvas');"
        "const get = (image) => { c.width = v.size[0]; c.height = v.size[1];"
        " const x = c.getContext('2d'); x.drawImage(image, 0, 0);"
        " return [...x.getImageData(0, 0, c.width, c.height).data] };"
        "return [get(v.images.SRCNN), get(v.images.original), get(v.error)]"
    )
    sr, hr, shown = (np.array(values, float).reshape(-1, 4)[:, :3] for values in error)
    expected = np.abs(sr - hr).max(axis=1)
    black = np.flatnonzero(expected == 0)
    white = np.flatnonzero(expected >= 64)
    assert (shown[black] == 0).all() and (shown[white] == 255).all() and len(white) > 100
    blue = (expected > 0) & (expected <= 16)  # 0 to 16 grey levels are black to blue
    assert np.abs(shown[blue] - np.outer(expected[blue] / 16 * 255, [0, 0, 1])).max() <= 1


def test_large_photographs_are_shown_as_a_bounded_detail(call, browser, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    values = np.zeros((900, 1200, 3), np.uint8)
    values[600:700, 800:900] = noise(100, 100, 3).astype(np.uint8)
    Image.fromarray(values).save("large.png")
    assert call("test", "large.png", "-s", 2, "-o", "out/", "--report", "r.html").status == 0
    assert (tmp_path / "r.html").stat().st_size < 4_000_000
    browser.open(tmp_path / "r.html")
    assert "detail of 2400 x 1800" in browser.run("return document.body.innerText")
    assert browser.run("return viewers[0].size") == [900, 700]
    assert browser.run("return document.querySelectorAll('option').length") == 4  # no original

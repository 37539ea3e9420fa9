"""The page in a real headless Chromium, against a real server: search, play, pages, pictures, keyboard, phone, dark."""

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import browser
import pytest
from indexing import write_run
from media import write_video
from PIL import Image
from serving import Axes, Server, about, axis, row, running, write_small_index

from adaclip_finetune.cli import main
from adaclip_finetune.errors import UserError
from adaclip_finetune.search.index import VideoIndex
from adaclip_finetune.search.serve.library import Library
from adaclip_finetune.search.serve.rates import Rate
from adaclip_finetune.search.stored import read_index, write_index

webdriver = pytest.importorskip("selenium.webdriver", reason="no selenium here (pip install selenium)")
By = pytest.importorskip("selenium.webdriver.common.by").By
Keys = pytest.importorskip("selenium.webdriver.common.keys").Keys

HEADLESS = [*browser.HEADLESS, "--mute-audio"]
PATIENCE = 30  # seconds


class Page:
    """The page as somebody sees it."""

    def __init__(self, driver: Any) -> None:
        self.driver = driver
        self.url = ""

    def open(self, server: Server, path: str = "/", width: int = 1200, dark: bool = False) -> None:
        size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 600}
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
        self.driver.get_log("browser")
        self.url = f"http://127.0.0.1:{server.port}"
        self.driver.get(self.url + path)

    def find(self, selector: str) -> Any:
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def all(self, selector: str) -> list[Any]:
        return list(self.driver.find_elements(By.CSS_SELECTOR, selector))

    def text(self, selector: str) -> str:
        return str(self.find(selector).text)

    def js(self, code: str) -> Any:
        return self.driver.execute_script(f"return {code}")

    def press(self, *keys: str) -> None:
        webdriver.ActionChains(self.driver).send_keys(*keys).perform()

    def until(self, holds: Callable[[], Any], what: str = "") -> Any:
        """What `holds` gives as soon as that is true; a page that is being redrawn is looked at again."""
        deadline, last = time.monotonic() + PATIENCE, None
        while time.monotonic() < deadline:
            try:
                if last := holds():
                    return last
            except Exception as error:
                last = error
            time.sleep(0.05)
        raise AssertionError(f"{what or holds}: {last!r}; status {self.text('#status')!r} {self.text('#trouble')!r}")

    def search(self, words: str) -> None:
        self.find("#query").send_keys(words, Keys.ENTER)
        self.until(lambda: self.names() and not self.find("#results").get_attribute("aria-busy"))

    def names(self) -> list[str]:
        return [one.text for one in self.all(".card .name")]

    def complaints(self) -> list[str]:
        """Of the browser: scripts that fail, and what the Content-Security-Policy blocked."""
        return [entry["message"] for entry in self.driver.get_log("browser")]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    chromedriver = shutil.which("chromedriver")
    if chromium is None or chromedriver is None:
        pytest.skip("no chromium with chromedriver here (Debian: apt-get install chromium chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for word in (*HEADLESS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(word)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(chromedriver))
    driver.set_page_load_timeout(PATIENCE)
    try:
        yield Page(driver)
    finally:
        driver.quit()


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> VideoIndex:
    """Fourteen videos, and as the last one a kind that no browser plays."""
    index = write_small_index(tmp_path_factory.mktemp("served"), 15)
    stored = read_index(index.folder)
    avi = write_video(index.videos[0].path.with_name("old.avi"), 50, codec="mpeg4", bf="0")
    write_index(index.folder, about(avi.parent), stored.vectors, [*stored.videos[:14], row(avi, "14.jpg")])
    return VideoIndex.load(index.folder)


@pytest.fixture(scope="module")
def server(index: VideoIndex) -> Iterator[Server]:
    with running(index, requests=Rate(1000, 10_000), queries=Rate(1000, 10_000)) as server:
        yield server


def test_a_search_shows_posters_moments_and_scores(page: Page, server: Server) -> None:
    page.open(server)
    page.until(lambda: page.text("#status") == "Ready")
    page.find("#query").send_keys("3")  # no Enter: it searches while one types
    page.until(lambda: len(page.names()) == 12)
    assert page.text("#status") == "Videos 1 to 12 of 15, the best first"
    assert (page.names()[0], page.text(".card .score"), page.text(".card .at")) == ("video3.mp4", "1.000", "0:01.2")
    assert page.text("#name") == "my.index" and page.text("#count") == "15 videos"
    page.until(lambda: page.js("document.querySelector('.card img').naturalWidth") == 130)
    marks = page.js("[...document.querySelector('.timeline').children].map((mark) => parseFloat(mark.style.height))")
    assert marks == [pytest.approx(100 / 3, abs=0.01), 100]
    assert page.find(".card").get_attribute("aria-label") == "1. two dogs run, score 1.000, best moment at 0:01.2. Play"
    assert page.js("location.search") == "?q=3"
    assert page.complaints() == []


def test_a_video_plays_from_its_best_moment(page: Page, server: Server) -> None:
    page.open(server, "/?q=5")
    page.until(page.names)
    page.find(".card").click()
    began = page.until(lambda: page.js("(() => { const v = document.querySelector('#stage video');"
                                       "return v.played.length && v.played.start(0) })()"))  # fmt: skip
    assert began == pytest.approx(1.2, abs=0.05)
    assert page.text("#player-title") == "video5.mp4"
    frames = page.all("#frames button")
    assert [frame.get_attribute("aria-label") for frame in frames] == [
        "Frame at 0:00.2, weight 25 %",
        "Best frame at 0:01.2, weight 75 %",
    ]
    page.until(lambda: page.js("[...document.querySelectorAll('#frames img')].every((one) => one.naturalWidth == 130)"))
    page.driver.execute_script("document.querySelector('#stage video').pause()")
    frames[0].click()  # plays from there
    page.until(
        lambda: page.js("document.querySelector('#stage video').played.start(0)") == pytest.approx(0.2, abs=0.05)
    )
    page.find("#player-close").click()
    assert page.js("document.querySelector('#player').open") is False
    page.until(lambda: page.all("#stage video") == [])  # the dialog tells of its end a moment later
    assert page.complaints() == []


def test_a_kind_that_the_browser_does_not_play(page: Page, server: Server, index: VideoIndex) -> None:
    page.open(server, "/?q=14")
    page.until(page.names)
    page.find(".card").click()
    page.until(lambda: "cannot play this kind of file" in page.text("#player-trouble"))
    assert page.js("document.activeElement.id") == "player-close"  # the focus does not go with the screen
    assert page.text("#player-path") == str(index.videos[14].path)
    assert page.find("#download").get_attribute("href").endswith("/file")
    page.until(lambda: page.js("document.querySelector('#stage img').naturalWidth") == 130)
    page.until(lambda: page.js("[...document.querySelectorAll('#frames img')].every((one) => one.naturalWidth == 130)"))


def test_a_video_that_has_gone(page: Page, tmp_path: Path) -> None:
    index = write_small_index(tmp_path, 2)
    index.videos[1].path.write_bytes(b"another")
    with running(index) as server:
        page.open(server, "/?q=1")
        page.until(page.names)
        page.find(".card").click()
        page.until(lambda: "was changed since it was indexed" in page.text("#player-trouble"))


def test_pages(page: Page, server: Server) -> None:
    page.open(server, "/?q=7")
    page.until(page.names)
    first = page.names()
    assert (page.text("#page"), page.find("#previous").is_enabled()) == ("Page 1 of 2", False)
    page.find("#next").click()
    page.until(lambda: page.text("#page") == "Page 2 of 2")
    assert len(page.names()) == 3 and not set(page.names()) & set(first)
    assert page.text("#status") == "Videos 13 to 15 of 15, the best first"
    assert (page.js("location.search"), page.find("#next").is_enabled()) == ("?q=7&page=2", False)
    page.driver.refresh()
    page.until(lambda: len(page.names()) == 3)
    page.driver.back()
    page.until(lambda: page.names() == first)
    page.open(server, "/?q=7&page=9")
    page.until(lambda: "No videos on this page" in page.text("#status"))
    page.find("#previous").click()  # to the last one there is
    page.until(lambda: page.text("#page") == "Page 2 of 2" and len(page.names()) == 3)


def test_a_search_by_picture(page: Page, server: Server, tmp_path: Path) -> None:
    red, blank = tmp_path / "red.png", tmp_path / "broken.png"
    Image.new("RGB", (20, 20), (40, 0, 0)).save(red)
    blank.write_bytes(b"\x89PNG no more")
    page.open(server, "/?q=1")
    page.until(page.names)
    page.find("#file").send_keys(str(red))
    page.until(lambda: page.names()[0] == "video4.mp4")
    assert page.find("#picture-seen").get_attribute("alt") == "Searching by the picture red.png"
    page.until(lambda: page.js("document.querySelector('#picture-seen').naturalWidth") == 20)
    assert page.find("#query").get_attribute("value") == ""
    first = page.names()
    page.find("#next").click()  # of the same picture
    page.until(lambda: page.text("#page") == "Page 2 of 2" and page.names())
    assert not set(page.names()) & set(first)
    page.find("#picture-away").click()
    page.until(lambda: page.names() == [])
    page.find("#file").send_keys(str(blank))
    page.until(lambda: "no picture that can be read" in page.text("#trouble"))
    page.search("2")
    assert (page.names()[0], page.text("#trouble")) == ("video2.mp4", "")


def test_a_picture_that_is_dropped(page: Page, server: Server) -> None:
    page.open(server)
    page.until(lambda: page.text("#status") == "Ready")
    drop = """
        const canvas = document.createElement("canvas"), context = canvas.getContext("2d");
        context.fillStyle = "rgb(60 0 0)";
        context.fillRect(0, 0, 300, 300);
        canvas.toBlob((blob) => {
            const transfer = new DataTransfer();
            transfer.items.add(new File([blob], arguments[0], { type: arguments[1] }));
            const how = { dataTransfer: transfer, bubbles: true, cancelable: true };
            for (const kind of ["dragenter", "dragover", "drop"])
                document.body.dispatchEvent(new DragEvent(kind, how));
        });
    """
    page.driver.execute_script(drop, "red.png", "image/png")
    page.until(lambda: page.names()[0] == "video6.mp4")
    assert not page.find("#drop").is_displayed()
    page.driver.execute_script(drop, "notes.txt", "text/plain")
    page.until(lambda: "notes.txt is no picture that can be searched by" in page.text("#trouble"))


def test_by_keyboard_alone(page: Page, server: Server) -> None:
    def focus() -> str:
        return str(page.js("document.activeElement.id || document.activeElement.querySelector('.name')?.textContent"))

    page.open(server)
    page.until(lambda: page.text("#status") == "Ready")
    assert focus() == "query"
    page.press("8", Keys.ENTER)
    page.until(page.names)
    names = page.names()
    page.press(Keys.ARROW_DOWN)
    assert focus() == names[0]
    assert page.js("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    page.press(Keys.ARROW_RIGHT)
    assert focus() == names[1]
    page.press(Keys.ARROW_DOWN)
    assert focus() == names[1 + 4]
    page.press(Keys.ARROW_UP)
    page.press(Keys.ENTER)
    assert page.js("document.querySelector('#player').open") is True
    page.press(Keys.ESCAPE)
    page.until(lambda: not page.js("document.querySelector('#player').open"))
    assert focus() == names[1]
    page.press(Keys.ARROW_UP)
    assert focus() == "query"
    page.press(Keys.ARROW_DOWN)
    page.press("/")
    assert focus() == "query"
    page.press("9", Keys.ENTER)  # in place of what stood there
    page.until(lambda: page.names() and page.names()[0] == "video9.mp4")
    page.press(Keys.ARROW_DOWN)
    page.press(Keys.ESCAPE)
    assert focus() == "query"


def test_everything_has_a_name_for_a_screen_reader(page: Page, server: Server) -> None:
    page.open(server, "/?q=1")
    page.until(page.names)
    for opened in (False, True):
        if opened:
            page.find(".card").click()
            page.until(lambda: page.all("#frames button"))
        nodes = page.driver.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
        roles = ("button", "searchbox", "link", "dialog", "list", "navigation", "textbox")
        named = [(node["role"]["value"], node.get("name", {}).get("value")) for node in nodes if not node["ignored"]]
        parts = [(role, name) for role, name in named if role in roles]
        assert len(parts) > 5
        assert [role for role, name in parts if not name] == []
    assert ("dialog", "video1.mp4") in parts
    assert page.find("#status").get_attribute("role") == "status"
    assert page.find("html").get_attribute("lang") == "en"


def test_the_api_is_told_on_a_page_of_our_own(page: Page, server: Server) -> None:
    page.open(server, "/docs")
    page.until(lambda: page.all("#schemas h3"))
    titles = [one.text for one in page.all("#operations h2")]
    api = server.ask("/openapi.json").json
    assert titles == [f"{method.upper()} {path}" for path, methods in api["paths"].items() for method in methods]
    examples = [one.text for one in page.all("pre")]
    assert f"curl '{page.url}/api/search?q=two%20dogs%20run'" in examples
    assert f"curl --data-binary @picture.jpg '{page.url}/api/search/image'" in examples
    assert f"curl '{page.url}/api/videos/KEY/poster' -o picture.jpg" in examples
    rows = [one.text for one in page.all("#operations tr")]
    assert "k integer from 1 to 50, default 12 how many videos a page" in rows
    assert "path string of the file, on the machine of the server" in [one.text for one in page.all("#schemas tr")]
    assert [one.text for one in page.all("#schemas h3")] == list(api["components"]["schemas"])
    page.open(server, "/docs", width=360, dark=True)
    page.until(lambda: page.all("#schemas h3"))
    assert page.js("document.documentElement.scrollWidth") <= 360
    assert page.complaints() == []


def test_with_letters_twice_as_large(page: Page, server: Server) -> None:
    for width in (390, 1280):
        page.open(server, "/?q=1", width=width)
        page.until(page.names)
        page.driver.execute_script("document.documentElement.style.fontSize = '200%'")
        page.find(".card").click()
        page.until(lambda: page.all("#frames button"))
        assert page.js("document.documentElement.scrollWidth") <= width
        assert page.js("document.querySelector('#player').getBoundingClientRect().right") <= width


def test_on_a_phone(page: Page, server: Server) -> None:
    page.open(server, "/?q=1", width=360)
    page.until(page.names)
    assert page.js("document.documentElement.scrollWidth") <= 360
    assert all(one.size["width"] >= 140 for one in page.all(".card"))
    assert all(one.size["height"] >= 40 for one in page.all("form > button"))
    page.find(".card").click()
    page.until(lambda: page.all("#frames button"))
    assert page.js("document.documentElement.scrollWidth") <= 360
    box = page.js("(() => { const b = document.querySelector('#player'); return [b.scrollWidth, b.clientWidth] })()")
    assert box[0] <= box[1]


def test_light_and_dark(page: Page, server: Server) -> None:
    grounds = []
    for dark in (False, True):
        page.open(server, "/?q=1", dark=dark)
        page.until(page.names)
        ground = _colour(page.js("getComputedStyle(document.body).backgroundColor"))
        card = _colour(page.js("getComputedStyle(document.querySelector('.card')).backgroundColor"))
        grounds.append(_light(ground))
        for selector, behind in {
            "h1": ground,
            "#status": ground,
            "#hint": ground,
            ".caption": card,
            ".score": card,
        }.items():
            text = _colour(page.js(f"getComputedStyle(document.querySelector('{selector}')).color"))
            assert _contrast(text, behind) >= 4.5, (dark, selector)  # what WCAG 2 asks of text
    assert grounds[0] > 0.8 and grounds[1] < 0.05


def test_it_says_that_the_model_is_loading(page: Page, index: VideoIndex) -> None:
    def load() -> Axes:
        assert gate.wait(PATIENCE)
        return Axes()

    gate = threading.Event()
    with running(index, load=load) as server:
        page.open(server)
        page.until(lambda: page.text("#status") == "Loading the model…")
        page.find("#query").send_keys("3", Keys.ENTER)
        page.until(lambda: page.text("#status") == "Loading the model; your search starts when it is there…")
        gate.set()
        page.until(lambda: page.names() and page.names()[0] == "video3.mp4")


def test_it_says_why_there_is_no_model(page: Page, index: VideoIndex) -> None:
    def load() -> Axes:
        raise UserError("the model is not there; say where it is: --model RUN")

    with running(index, load=load) as server:
        page.open(server, "/?q=1")
        page.until(lambda: "Nothing can be searched: the model is not there; say where" in page.text("#trouble"))
        page.find("#query").send_keys("3", Keys.ENTER)
        time.sleep(1)  # longer than it takes to search while one types
        assert "the model is not there" in page.text("#trouble") and page.text("#status") == ""
        port = server.port
    with running(index, port=port):  # the address is all that the page knows of a server
        page.until(lambda: page.names() and page.names()[0] == "video13.mp4")


def test_an_index_that_is_made_anew(page: Page, tmp_path: Path) -> None:
    index = write_small_index(tmp_path, 15)
    stored = read_index(index.folder)
    with running(index) as server:
        page.open(server, "/?q=7")
        page.until(lambda: len(page.names()) == 12)
        assert page.names()[0] == "video7.mp4"
        write_index(index.folder, stored.about, stored.vectors[1:], stored.videos[1:])
        time.sleep(Library.often)
        page.find("#next").click()  # of other pages than the first one was of
        page.until(lambda: page.text("#status").startswith("The index was made anew meanwhile: from the beginning."))
        assert (page.text("#page"), page.text("#count"), page.names()[0]) == ("Page 1 of 2", "14 videos", "video7.mp4")
        page.find("#next").click()
        page.until(lambda: page.text("#status") == "Videos 13 to 14 of 14, the best first")
        write_index(index.folder, replace(stored.about, fingerprint="e" * 64), stored.vectors, stored.videos)
        time.sleep(Library.often)
        page.find("#query").send_keys(Keys.ENTER)
        page.until(lambda: "was made anew with another model" in page.text("#trouble"))
        assert page.names() == []


def test_it_says_that_the_index_is_empty(page: Page, tmp_path: Path) -> None:
    with running(write_small_index(tmp_path, 0)) as server:
        page.open(server)
        page.until(lambda: "This index is empty" in page.text("#status"))
        page.find("#query").send_keys("1", Keys.ENTER)
        page.until(lambda: "This index is empty" in page.text("#status"))
        assert page.text("#count") == "0 videos"


def test_it_says_that_the_server_has_gone(page: Page, index: VideoIndex) -> None:
    with running(index) as server:
        page.open(server)
        page.until(lambda: page.text("#status") == "Ready")
    page.find("#query").send_keys("1", Keys.ENTER)
    page.until(lambda: "The server does not answer" in page.text("#trouble"))


def test_names_and_captions_are_never_markup(page: Page, tmp_path: Path) -> None:
    index = write_small_index(tmp_path, 1)
    evil = "<img src=x onerror=alert(1)>\n<script>alert(1)</script>"
    path = index.videos[0].path
    write_index(index.folder, about(path.parent), axis(0)[None], [row(path, "") | {"id": evil, "captions": [evil]}])
    with running(VideoIndex.load(index.folder)) as server:
        page.open(server, "/?q=0")
        page.until(lambda: "onerror=alert" in page.text(".card .caption"))
        page.find(".card").click()
        page.until(lambda: "onerror=alert" in page.text("#player-captions"))
        assert page.all("#results img, #player script, #player-title img") == []


def test_the_command_itself(page: Page, project: dict[str, Any], tmp_path: Path) -> None:
    """Trained weights, an index of them, the server as it is started by hand, a search; and Ctrl-C."""
    run, videos, index = write_run(tmp_path / "run", project), tmp_path / "videos", tmp_path / "my.index"
    for number in range(3):
        write_video(videos / f"clip{number}.mp4", 30)
    assert main(["index", str(run), str(videos), "-o", str(index)]) == 0
    log = tmp_path / "log"
    with started(index, log) as process:
        address = page.until(lambda: re.search(r"http://127\.0\.0\.1:(\d+)/(\?token=\S+)", log.read_text()))
        page.open(Server(int(address[1])), address[2])
        assert page.js("location.href") == f"http://127.0.0.1:{address[1]}/"  # without the token
        page.search("a red thing")
        assert sorted(page.names()) == ["clip0.mp4", "clip1.mp4", "clip2.mp4"]
        page.find(".card").click()
        page.until(lambda: page.js("document.querySelector('#stage video').readyState") >= 2)
        assert page.complaints() == []
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 130
        assert log.read_text().count(address[2].removeprefix("?token=")) == 1  # where the address is told
        assert log.read_text().endswith("adaclip: interrupted\n") and "Traceback" not in log.read_text()


def test_it_is_stopped_while_the_model_is_loading(project: dict[str, Any], tmp_path: Path) -> None:
    run, index, log = write_run(tmp_path / "run", project), write_small_index(tmp_path, 1), tmp_path / "log"
    stored = read_index(index.folder)
    write_index(index.folder, replace(stored.about, run=str(run)), stored.vectors, stored.videos)
    with started(index.folder, log) as process:
        deadline = time.monotonic() + PATIENCE
        while "http://" not in log.read_text() and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(0.5)  # into torch
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 130
    assert log.read_text().endswith("adaclip: interrupted\n") and "Traceback" not in log.read_text()


@contextmanager
def started(index: Path, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """`adaclip serve` on a free port, with a token; what it says goes to `log`."""
    code = "import sys; from adaclip_finetune.cli import main; sys.exit(main())"
    words = ["serve", str(index), "--port", "0", "--token"]
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    with log.open("w") as output:
        process = subprocess.Popen([sys.executable, "-c", code, *words], stdout=output, stderr=output, env=environment)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def _colour(css: str) -> tuple[float, ...]:
    return tuple(int(part) / 255 for part in re.findall(r"\d+", css)[:3])


def _light(colour: tuple[float, ...]) -> float:
    """Relative luminance, WCAG 2."""
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in colour]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def _contrast(one: tuple[float, ...], other: tuple[float, ...]) -> float:
    dark, light = sorted((_light(one), _light(other)))
    return (light + 0.05) / (dark + 0.05)

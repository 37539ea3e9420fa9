"""The page in a real headless Chromium, against a real server: search, play, pages, pictures, keyboard, phone, dark."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import browser
import pytest
from media import write_video
from PIL import Image
from serving import (
    Axes,
    Server,
    add_transcripts,
    axis,
    running,
    served_row,
    until,
    write_divided_index,
    write_small_index,
)

from adaclip_finetune.cli import main
from adaclip_finetune.errors import UserError
from adaclip_finetune.search.index import VideoIndex
from adaclip_finetune.search.stored import read_index, write_index

webdriver = pytest.importorskip("selenium.webdriver", reason="no selenium here (pip install selenium)")
By = pytest.importorskip("selenium.webdriver.common.by").By
Keys = pytest.importorskip("selenium.webdriver.common.keys").Keys
selenium_errors = pytest.importorskip("selenium.common.exceptions")

HEADLESS = [*browser.HEADLESS, "--mute-audio"]


class Page:
    """The page as somebody sees it."""

    def __init__(self, driver: Any) -> None:
        self.driver = driver

    def open(self, server: Server, path: str = "/", width: int = 1200, dark: bool = False) -> None:
        size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 600}
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
        self.driver.get_log("browser")
        self.driver.get(f"http://127.0.0.1:{server.port}{path}")

    def search(self, server: Server, words: object, **how: Any) -> None:
        """Open the page with this query, and wait for videos."""
        self.open(server, f"/?q={words}", **how)
        self.until(self.names)

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

    def names(self) -> list[str]:
        return [one.text for one in self.all(".card .name")]

    def until(self, holds: Callable[[], Any]) -> Any:
        """Return what `holds` returns as soon as that is true, though the page is being redrawn meanwhile."""

        def looked() -> Any:
            try:
                return holds()
            except (selenium_errors.WebDriverException, IndexError, TypeError):
                return None

        return until(looked)

    def until_text(self, selector: str, part: str) -> None:
        self.until(lambda: part in self.text(selector))

    def until_drawn(self, selector: str, width: int = 130) -> None:
        """Wait until all pictures are there, and have this width."""
        self.until(
            lambda: self.js(f"[...document.querySelectorAll('{selector}')].every((i) => i.naturalWidth == {width})")
        )

    def complaints(self) -> list[str]:
        """Return scripts that failed, and what the Content-Security-Policy blocked."""
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
    try:
        yield Page(driver)
    finally:
        driver.quit()


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> VideoIndex:
    return write_small_index(tmp_path_factory.mktemp("served"), 15)


def test_a_search_shows_posters_moments_and_scores(page: Page, server: Server) -> None:
    page.open(server)
    page.until_text("#status", "Ready")
    page.find("#query").send_keys("3")  # without Enter: the page searches while one types
    page.until(lambda: len(page.names()) == 12)
    assert "1 to 12 of 15" in page.text("#status")
    assert (page.names()[0], page.text(".card .score"), page.text(".card .at")) == ("video3.mp4", "1.000", "0:01.2")
    assert (page.text("#name"), page.text("#count")) == ("my.index", "15 videos · run")
    page.until(lambda: page.js("document.querySelector('.card img').naturalWidth") == 130)
    assert not page.find("#by").is_displayed()  # this index has no moments
    marks = page.js("[...document.querySelector('.timeline').children].map((mark) => parseFloat(mark.style.height))")
    assert marks == [pytest.approx(100 / 3, abs=0.01), 100]
    assert page.find(".card").get_attribute("aria-label") == "1. two dogs run, score 1.000, best moment at 0:01.2. Play"
    assert (page.js("location.search"), page.complaints()) == ("?q=3", [])


def test_a_video_plays_from_its_best_moment(page: Page, server: Server) -> None:
    def began() -> float:
        """Return the second from which the video has played."""
        video = "document.querySelector('#stage video')"
        return float(page.until(lambda: page.js(f"{video}.played.length && {video}.played.start(0)")))

    page.search(server, 5)
    page.find(".card").click()
    assert began() == pytest.approx(1.2, abs=0.05)
    assert page.text("#player-title") == "video5.mp4"
    frames = page.all("#frames button")
    labels = [frame.get_attribute("aria-label") for frame in frames]
    assert labels == ["Frame at 0:00.2, weight 25 %", "Best frame at 0:01.2, weight 75 %"]
    page.until_drawn("#frames img")
    page.js("document.querySelector('#stage video').pause()")
    frames[0].click()  # plays from there
    until(lambda: began() == pytest.approx(0.2, abs=0.05))
    page.find("#player-close").click()
    page.until(lambda: not page.js("document.querySelector('#player').open") and page.all("#stage video") == [])
    assert page.complaints() == []


def test_moments(page: Page, tmp_path: Path) -> None:
    """Videos with their best moments, or moments; one is played from start to end, and can be saved."""
    video = "document.querySelector('#stage video')"
    with running(write_divided_index(tmp_path)) as server:
        page.search(server, 6)
        page.find("#by option[value=moment]").click()
        page.until(lambda: "Moments 1 to" in page.text("#status") and page.names()[0] == "video1.mp4")
        assert (page.js("location.search"), page.text(".card .at")) == ("?q=6&by=moment", "0:00.5–0:01.5")
        mark = page.js("(({ left, width }) => [left, width])(document.querySelector('.timeline .best').style)")
        assert [float(part.rstrip("%")) for part in mark] == [pytest.approx(1.5 + 97 / 4), pytest.approx(97 / 2)]
        page.until(lambda: page.js("document.querySelector('.card img').naturalWidth") == 130)
        page.find(".card").click()
        page.until(lambda: page.js(f"{video}.paused && {video}.currentTime > 1.3"))
        assert page.js(f"{video}.played.start(0)") == pytest.approx(0.5, abs=0.05)
        assert page.js(f"{video}.currentTime") == pytest.approx(1.5, abs=0.15)
        label = page.find("#moments button").get_attribute("aria-label")
        assert label == "Moment from 0:00.5 to 0:01.5, score 1.000. Play"
        assert page.js("document.querySelector('#bar').children.length") == 1
        for selector in ("#clip", "#clip-exact"):
            address = page.find(selector).get_attribute("href").split(str(server.port))[1]
            assert server.ask(address).headers["content-type"] == "video/mp4"
        page.js(f"{video}.play()")  # on from there
        page.until(lambda: page.js(f"{video}.currentTime") > 1.8)
        page.driver.refresh()
        page.until(lambda: page.text(".card .at") == "0:00.5–0:01.5")
        assert page.complaints() == []


def test_what_cannot_be_played_is_shown_by_its_frames(page: Page, tmp_path: Path) -> None:
    """A kind that no browser plays, and a file that has changed."""
    index = write_small_index(tmp_path, 2)
    stored = read_index(index.folder)
    avi = write_video(tmp_path / "videos" / "old.avi", 50, codec="mpeg4", bf="0")
    rows = [stored.videos()[0].row, served_row(avi, "1.jpg")]
    write_index(index.folder, index.info, stored.vectors, rows)
    index.videos[0].path.write_bytes(b"another")
    with running(VideoIndex.load(index.folder)) as server:
        page.search(server, 1)
        page.find(".card").click()
        page.until_text("#player-trouble", "cannot play")
        assert page.js("document.activeElement.id") == "player-close"  # the video had the focus
        assert page.text("#player-path") == str(avi)
        assert page.find("#download").get_attribute("href").endswith("/file")
        page.until_drawn("#stage img, #frames img")
        page.search(server, 0)
        page.find(".card").click()
        page.until_text("#player-trouble", "has changed since it was indexed")


def test_pages(page: Page, server: Server) -> None:
    page.search(server, 7)
    first = page.names()
    assert (page.text("#page"), page.find("#previous").is_enabled()) == ("Page 1 of 2", False)
    page.find("#next").click()
    page.until_text("#status", "13 to 15 of 15")
    assert len(page.names()) == 3 and not set(page.names()) & set(first)
    assert (page.js("location.search"), page.find("#next").is_enabled()) == ("?q=7&page=2", False)
    page.driver.refresh()
    page.until(lambda: len(page.names()) == 3)
    page.driver.back()
    page.until(lambda: page.names() == first)
    page.open(server, "/?q=7&page=9")
    page.until_text("#status", "No videos on this page")
    page.find("#previous").click()  # to the last page there is
    page.until(lambda: page.text("#page") == "Page 2 of 2" and len(page.names()) == 3)


def test_a_filter(page: Page, server: Server) -> None:
    """It narrows the search and is kept in the address; what is wrong with it is said beside it."""
    page.search(server, 7)
    assert not page.find("#where").is_displayed()
    page.find("#filter summary").click()
    page.find("#where").send_keys("name != video7* and duration < 3", Keys.ENTER)
    page.until_text("#status", "1 to 12 of 14")
    assert "video7.mp4" not in page.names()
    page.driver.refresh()
    page.until_text("#status", "1 to 12 of 14")
    assert page.find("#where").is_displayed()
    page.find("#where").clear()
    page.find("#where").send_keys("season / 3", Keys.ENTER)
    page.until_text("#where-trouble", "season / 3: not a condition")
    assert (page.text("#trouble"), page.names(), page.find("#where").get_attribute("aria-invalid")) == ("", [], "true")
    page.find("#where").clear()
    page.find("#where").send_keys("duration > 3", Keys.ENTER)
    page.until_text("#status", "holds for no video")
    assert page.text("#where-trouble") == ""
    page.find("#where").clear()
    page.find("#where").send_keys(Keys.ENTER)
    page.until_text("#status", "1 to 12 of 15")
    assert page.js("location.search") == "?q=7"


def test_a_threshold(page: Page, tmp_path: Path) -> None:
    """Below it, the page says that nothing shows it, and shows the best nevertheless."""
    index = write_small_index(tmp_path)
    rates = {"false_finds": [5, 2, 9], "misses": [10, 5, 15], "captions": 9, "videos": 5}
    content = {"fingerprint": index.info.fingerprint, "whole": rates | {"score": 0.5}}
    (index.folder / "threshold.json").write_text(json.dumps(content))
    with running(index) as server:
        page.search(server, 9)
        page.until_text("#nothing", "Nothing here shows that")
        assert len(page.names()) == 5
        page.search(server, 3)
        assert not page.find("#nothing").is_displayed()


def test_what_is_said(page: Page, server: Server, tmp_path: Path) -> None:
    """A switch, where the index has transcripts; a video plays from the line that was found."""
    page.search(server, 1)
    assert not page.find("#said").is_displayed()
    index = write_small_index(tmp_path)
    add_transcripts(index, video4="the <b>number</b> 1 &lt;i&gt;")
    with running(index) as own:
        page.search(own, 1)
        assert page.names()[0] == "video1.mp4" and page.all(".card .said") == []
        page.find("#said").click()
        page.until(lambda: page.names()[0] == "video4.mp4")
        assert page.text(".card .said") == "“the number 1 <i>”"
        assert (page.text(".card .at"), page.js("location.search")) == ("0:00.6–0:01.8", "?q=1&hybrid=1")
        page.driver.refresh()
        page.until(lambda: page.names()[0] == "video4.mp4")
        page.find(".card").click()
        video = "document.querySelector('#stage video')"
        began = page.until(lambda: page.js(f"{video}.played.length && {video}.played.start(0)"))
        assert began == pytest.approx(0.6, abs=0.05)
        assert page.text("#line") == "0:00.6 “the number 1 <i>”"
        assert page.complaints() == []


def test_a_search_by_picture(page: Page, server: Server, tmp_path: Path) -> None:
    """Chosen, dropped, or broken; pages of the same picture."""
    Image.new("RGB", (20, 20), (40, 0, 0)).save(tmp_path / "red.png")
    (tmp_path / "broken.png").write_bytes(b"\x89PNG no more")
    page.search(server, 1)
    page.find("#file").send_keys(str(tmp_path / "red.png"))
    page.until(lambda: page.names()[0] == "video4.mp4")
    assert "red.png" in page.find("#picture-seen").get_attribute("alt")
    page.until_drawn("#picture-seen", 20)
    assert page.find("#query").get_attribute("value") == ""
    first = page.names()
    page.find("#next").click()
    page.until_text("#page", "Page 2 of 2")
    assert page.names() and not set(page.names()) & set(first)
    page.find("#picture-away").click()
    page.until(lambda: page.names() == [])
    page.find("#file").send_keys(str(tmp_path / "broken.png"))
    page.until_text("#trouble", "JPEG")
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
    assert page.text("#trouble") == "" and not page.find("#drop").is_displayed()


def test_by_keyboard_alone(page: Page, server: Server) -> None:
    def focus() -> str:
        return str(page.js("document.activeElement.id || document.activeElement.querySelector('.name')?.textContent"))

    page.open(server)
    page.until_text("#status", "Ready")
    assert focus() == "query"
    page.press("8", Keys.ENTER)
    names = page.until(page.names)
    for key, expected in [
        (Keys.ARROW_DOWN, names[0]),
        (Keys.ARROW_RIGHT, names[1]),
        (Keys.ARROW_DOWN, names[1 + 4]),
        (Keys.ARROW_UP, names[1]),
        (Keys.ARROW_UP, "query"),
        (Keys.ARROW_DOWN, names[0]),
        (Keys.ESCAPE, "query"),
        (Keys.ARROW_DOWN, names[0]),
    ]:
        page.press(key)
        assert focus() == expected
    assert page.js("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    page.press(Keys.ENTER)
    assert page.js("document.querySelector('#player').open") is True
    page.press(Keys.ESCAPE)
    page.until(lambda: not page.js("document.querySelector('#player').open"))
    assert focus() == names[0]
    page.press("/")
    assert focus() == "query"
    page.press("9", Keys.ENTER)  # in place of what was there
    page.until(lambda: page.names()[0] == "video9.mp4")


def test_everything_has_a_name_for_a_screen_reader(page: Page, server: Server) -> None:
    page.search(server, 1)
    for opened in (False, True):
        if opened:
            page.find(".card").click()
            page.until(lambda: page.all("#frames button"))
        nodes = page.driver.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
        roles = ("button", "searchbox", "link", "dialog", "list", "navigation", "textbox")
        named = [(node["role"]["value"], node.get("name", {}).get("value")) for node in nodes if not node["ignored"]]
        parts = [(role, name) for role, name in named if role in roles]
        assert len(parts) > 5 and [role for role, name in parts if not name] == []
    assert ("dialog", "video1.mp4") in parts
    assert (page.find("#status").get_attribute("role"), page.find("html").get_attribute("lang")) == ("status", "en")


@pytest.mark.parametrize(("width", "font"), [(360, "100%"), (390, "200%"), (1280, "200%")])
def test_nothing_is_wider_than_the_screen(page: Page, server: Server, width: int, font: str) -> None:
    page.search(server, 1, width=width)
    page.js(f"document.documentElement.style.fontSize = '{font}'")
    assert page.js("document.documentElement.scrollWidth") <= width
    assert all(one.size["width"] >= 140 for one in page.all(".card"))
    assert all(one.size["height"] >= 40 for one in page.all("form > button"))
    page.find(".card").click()
    page.until(lambda: page.all("#frames button"))
    player = page.js("(() => { const b = document.querySelector('#player'); return [b.scrollWidth, b.clientWidth] })()")
    assert player[0] <= player[1] <= width


def test_light_and_dark(page: Page, server: Server) -> None:
    def brightness(selector: str, of: str) -> float:
        css = page.js(f"getComputedStyle(document.querySelector('{selector}')).{of}")
        red, green, blue = (int(part) / 255 for part in re.findall(r"\d+", css)[:3])
        return 0.3 * red + 0.6 * green + 0.1 * blue

    for dark in (False, True):
        page.search(server, 1, dark=dark)
        for ground, texts in {"body": ("h1", "#status", "#hint"), ".card": (".caption", ".score")}.items():
            behind = brightness(ground, "backgroundColor")
            assert behind < 0.2 if dark else behind > 0.8
            assert all(abs(brightness(text, "color") - behind) > 0.4 for text in texts)


def test_it_waits_for_the_model_says_why_it_fails_and_goes_on_by_itself(page: Page, index: VideoIndex) -> None:
    def load() -> Axes:
        assert gate.wait(30)
        raise UserError("the model is not there")

    gate = threading.Event()
    with running(index, load) as server:
        page.open(server)
        page.until_text("#status", "Loading the model")
        page.find("#query").send_keys("13", Keys.ENTER)
        page.until_text("#status", "your search starts")
        gate.set()
        page.until_text("#trouble", "Nothing can be searched: the model is not there")
        port = server.port
    page.until_text("#trouble", "does not answer")
    with running(index, port=port):
        page.until(lambda: page.names()[0] == "video13.mp4")
        assert page.text("#trouble") == ""


def test_an_empty_index_and_names_that_look_like_markup(page: Page, tmp_path: Path) -> None:
    index = write_small_index(tmp_path, 1)
    evil = "<img src=x onerror=alert(1)>\n<script>alert(1)</script>"
    row = served_row(index.videos[0].path, "") | {"id": evil, "captions": [evil]}
    write_index(index.folder, index.info, axis(0)[None], [row])
    with running(VideoIndex.load(index.folder)) as server:
        page.search(server, 0)
        assert "onerror=alert" in page.text(".card .caption")
        page.find(".card").click()
        page.until_text("#player-captions", "onerror=alert")
        assert page.all("#results img, #player script, #player-title img") == []
    with running(write_small_index(tmp_path / "empty", 0)) as server:
        page.open(server, "/?q=1")
        page.until_text("#status", "empty")
        assert page.text("#count").startswith("0 videos")


def test_the_command_itself(page: Page, run: Path, tmp_path: Path) -> None:
    """Trained weights, their index, the server as it is started by hand, a search, and Ctrl-C."""
    videos, index = tmp_path / "videos", tmp_path / "my.index"
    for number in range(3):
        write_video(videos / f"clip{number}.mp4", 30 + 20 * number)
    assert main(["index", str(run), str(videos), "-o", str(index)]) == 0
    with started(index, tmp_path / "log") as (server, token):
        page.open(server, f"/?token={token}")
        assert page.js("location.href") == f"http://127.0.0.1:{server.port}/"  # without the token
        page.search(server, "a red thing")
        assert sorted(page.names()) == ["clip0.mp4", "clip1.mp4", "clip2.mp4"]
        page.find(".card").click()
        page.until(lambda: page.js("document.querySelector('#stage video').readyState") >= 2)
        assert page.complaints() == []
    with started(index, tmp_path / "second.log"):
        pass  # stopped while the model is being loaded


@contextmanager
def started(index: Path, log: Path) -> Iterator[tuple[Server, str]]:
    """Run `adaclip serve` on a free port, and give its token; what it prints goes to `log`. Stop it by Ctrl-C."""
    code = "import sys; from adaclip_finetune.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", code, "serve", str(index), "--port", "0", "--token"]
    with log.open("w") as output:
        environment = os.environ | {"PYTHONUNBUFFERED": "1"}
        process = subprocess.Popen(command, stdout=output, stderr=output, env=environment)
    try:
        address = until(lambda: re.search(r"http://127\.0\.0\.1:(\d+)/\?token=(\S+)", log.read_text()))
        yield Server(int(address[1])), address[2]
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130
    finally:
        process.kill()
        process.wait()
    told = log.read_text()
    assert told.count(address[2]) == 1 and told.endswith("interrupted\n") and "Traceback" not in told

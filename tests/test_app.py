"""The Space in a real browser: Debian's chromium, headless, driven by Playwright."""

import importlib.util
import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from urllib.parse import urlparse

import pytest
from helpers import NEW_TOKENS, ROOT
from PIL import Image

from mc_llava import MCLlavaProcessor


pytestmark = pytest.mark.slow


CHROMIUM = Path("/usr/bin/chromium")
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
SCREENSHOT = ROOT / "docs" / "app.png"


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    pytest.importorskip("gradio", reason='pip install "mc-llava[app]" to test the Space')
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder = tmp_path_factory.mktemp("app")
    environment = {
        **os.environ,
        "GRADIO_SERVER_PORT": str(port),
        "GRADIO_TEMP_DIR": str(folder / "uploads"),
    }
    with open(folder / "log", "w") as log:
        server = subprocess.Popen(
            [sys.executable, ROOT / "examples" / "app.py"], env=environment, stdout=log, stderr=log
        )
    try:
        deadline = time.monotonic() + 300
        while True:
            assert server.poll() is None and time.monotonic() < deadline, (folder / "log").read_text()
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}", timeout=5)
                break
            except OSError:
                time.sleep(0.5)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait(30)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    playwright = pytest.importorskip("playwright.sync_api", reason="pip install playwright to drive the browser")
    if not CHROMIUM.exists():
        pytest.skip(f"{CHROMIUM} is not there: apt-get install chromium")
    with playwright.sync_playwright() as started:
        context = started.chromium.launch_persistent_context(
            tmp_path_factory.mktemp("profile"),
            executable_path=CHROMIUM,
            args=FLAGS,
            viewport={"width": 1280, "height": 1000},
        )
        yield context
        context.close()


@pytest.fixture
def page(browser, url):
    """The page, which may send requests only to its server."""
    strangers = []

    def watch(request):
        address = urlparse(request.url)
        if address.scheme not in ("data", "blob") and address.netloc != urlparse(url).netloc:
            strangers.append(request.url)

    browser.on("request", watch)
    page = browser.new_page()
    page.set_default_timeout(60_000)
    page.goto(url)
    yield page
    page.close()
    browser.remove_listener("request", watch)
    assert not strangers


def upload(page, path):
    page.locator("#picture input[type=file]").set_input_files(path)


def grid_of(page, crops: int) -> str:
    """Waits for a grid of so many crops; the address of its picture."""
    page.locator("#cost", has_text=re.compile(rf"^\s*{crops} crops")).wait_for()
    return page.locator("#grid img").get_attribute("src")


def move_to_the_left(page, name: str):
    """The slider itself, by its keys."""
    slider = page.locator(f"#{name} input[type=range]")
    slider.focus()
    slider.press("Home")


def set_knob(page, name: str, value: int):
    number = page.locator(f"#{name} input[type=number]")
    number.fill(str(value))
    number.press("Enter")


def ask(page, question: str) -> list[str]:
    """Everything that the answer's box held, one after another, until the answer was there."""
    page.locator("#question textarea").fill(question)
    page.evaluate(
        """() => {
            const box = document.querySelector("#answer textarea"), status = document.querySelector("#status");
            window.seen = [];
            let begun = !status.innerText.includes("in all");
            const recorder = setInterval(() => {
                const ended = status.innerText.includes("in all");
                begun ||= !ended;
                if (begun && box.value && box.value !== window.seen.at(-1)) window.seen.push(box.value);
                window.answered = begun && ended;
                if (window.answered) clearInterval(recorder);
            }, 1);
        }"""
    )
    page.locator("#ask").click()
    page.wait_for_function("() => window.answered")
    return page.evaluate("() => window.seen")


def set_longest_answer(page):
    page.get_by_text("Sampling").click()
    number = page.get_by_label("number input for Longest answer in tokens")
    number.fill(str(NEW_TOKENS))
    number.press("Enter")


def test_upload_ask_move_a_slider_and_ask_again(page, trial):
    size = Image.open(trial.pictures[0]).size
    image_processor = MCLlavaProcessor.from_pretrained(trial.folder).image_processor
    crops = len(image_processor.plan(*size))
    assert crops > 1

    upload(page, trial.pictures[0])
    first_grid = grid_of(page, crops)
    set_longest_answer(page)
    pieces = ask(page, trial.questions[0])
    assert len(pieces) > 1 and all(pieces[-1].startswith(piece.rstrip()) for piece in pieces), pieces
    assert trial.is_right(0, pieces[-1])
    assert "was encoded in" in page.locator("#status").inner_text()
    if os.environ.get("SCREENSHOT") == "1":
        page.screenshot(path=SCREENSHOT, full_page=True)

    move_to_the_left(page, "max_crops")
    assert grid_of(page, 1) != first_grid
    assert page.locator("#max_crops input[type=number]").input_value() == "0"
    set_knob(page, "max_crops", image_processor.max_crops)
    grid_of(page, crops)
    assert trial.is_right(0, ask(page, trial.questions[0])[-1])
    assert "was encoded before" in page.locator("#status").inner_text()

    page.locator("#picture").get_by_label("Remove Image").click()
    upload(page, trial.pictures[1])
    page.locator("#picture img").wait_for()
    assert trial.is_right(1, ask(page, trial.questions[1])[-1])
    assert "was encoded in" in page.locator("#status").inner_text()


def test_examples(page, trial):
    page.locator("#examples").get_by_text(trial.questions[1]).click()
    page.locator("#grid img").wait_for()
    assert page.locator("#question textarea").input_value() == trial.questions[1]
    page.locator("#ask").click()
    page.locator("#status", has_text="in all").wait_for()
    assert trial.is_right(1, page.locator("#answer textarea").input_value())


def test_errors_are_words(page, trial, tmp_path):
    def message() -> str:
        toast = page.get_by_test_id("toast-text").last
        toast.wait_for()
        text = toast.inner_text()
        page.get_by_test_id("toast-close").last.click()
        toast.wait_for(state="detached")
        return text

    page.locator("#ask").click()
    assert "there is no picture yet" in message()
    upload(page, trial.pictures[0])
    page.locator("#grid img").wait_for()
    page.locator("#ask").click()
    assert "there is no question yet" in message()
    page.locator("#question textarea").fill("What?<|im_end|>")
    page.locator("#ask").click()
    assert "special token <|im_end|>" in message()
    set_knob(page, "tokens", 2048)
    page.locator("#question textarea").fill("What?")
    page.locator("#ask").click()
    assert "pass num_tokens=" in message()
    (tmp_path / "broken.png").write_bytes(b"no picture")
    page.locator("#picture").get_by_label("Remove Image").click()
    upload(page, tmp_path / "broken.png")
    words = message()
    assert "10 bytes is not an image that can be read: save it as PNG or JPEG" in words
    assert "/" not in words and "component" not in words


def test_a_broken_upload_by_the_api(url, tmp_path):
    """The error shows no path of the server either, whatever the file is called."""
    body = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\nno picture\r\n--x--\r\n'
    request = urllib.request.Request(
        f"{url}/gradio_api/upload", body, {"Content-Type": "multipart/form-data; boundary=x"}
    )
    path = json.load(urllib.request.urlopen(request))[0]
    for name in ("a.png", "a.svg", None):
        file = {"path": path, "orig_name": name, "meta": {"_type": "gradio.FileData"}}
        request = urllib.request.Request(
            f"{url}/gradio_api/call/preview",
            json.dumps({"data": [file, 3, 30]}).encode(),
            {"Content-Type": "application/json"},
        )
        event = json.load(urllib.request.urlopen(request))["event_id"]
        reply = urllib.request.urlopen(f"{url}/gradio_api/call/preview/{event}").read().decode()
        assert "is not an image that can be read" in reply
        assert str(Path(path).parent) not in reply and "component" not in reply


@pytest.fixture(scope="module")
def app():
    pytest.importorskip("gradio", reason='pip install "mc-llava[app]" to test the Space')
    spec = importlib.util.spec_from_file_location("app", ROOT / "examples" / "app.py")
    module = sys.modules["app"] = importlib.util.module_from_spec(spec)  # Gradio looks for its components there
    spec.loader.exec_module(module)
    return module


def test_the_tower_is_passed_once_for_two_questions(app, trial):
    demo = app.Demo("tiny")
    knobs = demo.planner.max_crops, demo.planner.num_tokens
    passes = []
    demo.engine.model.model.vision_tower.encoder.register_forward_hook(lambda *args: passes.append(1))
    for _ in range(2):
        *_, (answer, status) = demo.answer(str(trial.pictures[0]), trial.questions[0], *knobs, NEW_TOKENS, 0, 1)
        assert trial.is_right(0, answer)
        if "was encoded in" in status:
            first = len(passes)
    assert first == len(passes) > 0 and "was encoded before" in status
    with pytest.raises(app.gr.Error, match="no question yet"):
        list(demo.answer(str(trial.pictures[0]), None, *knobs, NEW_TOKENS, 0, 1))


def start_without(folder, module: str) -> subprocess.CompletedProcess:
    (folder / "gradio.py").write_text(f"raise ModuleNotFoundError('no {module}', name='{module}')\n")
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    return subprocess.run(
        [sys.executable, ROOT / "examples" / "app.py"], env=environment, capture_output=True, text=True
    )


def test_a_missing_gradio_is_one_line(tmp_path):
    result = start_without(tmp_path, "gradio")
    assert result.returncode == 1
    assert result.stderr == 'app.py needs Gradio: pip install "mc-llava[app]"\n'


def test_another_missing_package_is_not_hidden(tmp_path):
    assert "ModuleNotFoundError: no pydub" in start_without(tmp_path, "pydub").stderr

"""
The Space in a real browser (Debian's chromium, headless, driven by Playwright), and sent HTTP requests that the page
never sends.
"""

import importlib.util
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
import uuid
import weakref
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlparse

import pytest
from helpers import EXAMPLES, NEW_TOKENS, ROOT
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


@contextmanager
def record_requests():
    """A server on this machine that has no files: its address, and the path and `Authorization` of each request."""
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append((self.path, self.headers["Authorization"]))
            self.send_error(404)

        do_HEAD = do_POST = do_GET

        def log_message(self, *args):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", asked
        server.shutdown()


@pytest.fixture(scope="module")
def hub():
    """A server that the Space takes for the Hub."""
    with record_requests() as (address, asked):
        yield address, asked


@pytest.fixture(scope="module")
def url(hub, tmp_path_factory):
    pytest.importorskip("gradio", reason='pip install "mc-llava[app]" to test the Space')
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder = tmp_path_factory.mktemp("app")
    environment = {
        **os.environ,
        "GRADIO_SERVER_PORT": str(port),
        "GRADIO_TEMP_DIR": str(folder / "uploads"),
        "HF_ENDPOINT": hub[0],
        "HF_HUB_OFFLINE": "0",
        "HF_TOKEN": "hf_secret",
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
    """Wait for a grid of this many crops, and return the address of its picture."""
    page.locator("#cost", has_text=re.compile(rf"^\s*{crops} crops")).wait_for()
    return page.locator("#grid img").get_attribute("src")


def move_to_the_left(page, name: str):
    """Move the slider itself, with the keyboard."""
    slider = page.locator(f"#{name} input[type=range]")
    slider.focus()
    slider.press("Home")


def set_knob(page, name: str, value: int):
    number = page.locator(f"#{name} input[type=number]")
    number.fill(str(value))
    number.press("Enter")


def ask(page, question: str) -> list[str]:
    """Each text that the answer's box held until the answer was complete."""
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


def test_zoom_shows_where_it_looked(page, trial):
    upload(page, trial.pictures[0])
    page.locator("#grid img").wait_for()
    set_knob(page, "zoom", 2)
    page.locator("#cost", has_text="where the question points").wait_for()
    set_knob(page, "max_crops", 4)
    page.locator("#cost", has_text="Zoom changes nothing here: it needs max_crops of at least 8").wait_for()
    set_knob(page, "max_crops", 18)
    page.locator("#cost", has_text="a grid of 6 and 12 where the question points").wait_for()
    scouts = grid_of(page, 19)
    set_longest_answer(page)
    assert trial.is_right(0, ask(page, trial.questions[0])[-1])
    assert "The model looked in" in page.locator("#status").inner_text()
    assert page.locator("#grid img").get_attribute("src") != scouts
    if os.environ.get("SCREENSHOT") == "1":  # of the README's question, down to the first examples
        page.get_by_text("Sampling").click()
        (question,) = (example["question"] for example in EXAMPLES if "box" in example)
        ask(page, question)
        page.screenshot(path=SCREENSHOT, full_page=True, clip={"x": 0, "y": 0, "width": 1280, "height": 1180})
        with Image.open(SCREENSHOT) as shot:
            shot.convert("RGB").quantize(256, dither=Image.Dither.NONE).save(SCREENSHOT, optimize=True)


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
    assert "data of 10 bytes is not an image that can be read: save it as PNG or JPEG" in words
    assert "/" not in words and "component" not in words


META = {"_type": "gradio.FileData"}
NOT_UPLOADED = "this picture was not uploaded here: upload it, or pick an example"
REST = {
    **{name: [3, 30, 0] for name in ("preview", "preview_1", "preview_2", "preview_3")},
    "answer": ["What?", 3, 30, 0, 2, 0, 1],
}


def fetch(address: str, body=None) -> tuple[int, str]:
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(address, None if body is None else json.dumps(body).encode(), headers)
    try:
        with urllib.request.urlopen(request, timeout=30) as reply:
            return reply.status, reply.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def call(url: str, name: str, data: list) -> str:
    """The last event of a call, as text."""
    status, text = fetch(f"{url}/gradio_api/call/{name}", {"data": data})
    assert status == 200, text
    return fetch(f"{url}/gradio_api/call/{name}/{json.loads(text)['event_id']}")[1].strip().split("event: ")[-1]


def join(url: str, name: str, data: list) -> str:
    """Ask as the page does."""
    dependencies = json.loads(fetch(f"{url}/config")[1])["dependencies"]
    (index,) = (entry["id"] for entry in dependencies if entry["api_name"] == name)
    session = uuid.uuid4().hex
    body = {"data": data, "fn_index": index, "session_hash": session}
    assert fetch(f"{url}/gradio_api/queue/join", body)[0] == 200
    with urllib.request.urlopen(f"{url}/gradio_api/queue/data?session_hash={session}", timeout=30) as reply:
        return next(line.decode() for line in reply if b"process_completed" in line)


ROUTES = {
    "call": call,
    "join": join,
    "run": lambda url, name, data: fetch(f"{url}/gradio_api/run/{name}", {"data": data})[1],
    "api": lambda url, name, data: fetch(f"{url}/gradio_api/api/{name}", {"data": data})[1],
}


def send(url: str, content: bytes, name: str = "a.png") -> str:
    """Upload a file as the page does, and return its path on the server."""
    head = f'--x\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\n\r\n'
    request = urllib.request.Request(
        f"{url}/gradio_api/upload",
        head.encode() + content + b"\r\n--x--\r\n",
        {"Content-Type": "multipart/form-data; boundary=x"},
    )
    return json.load(urllib.request.urlopen(request))[0]


def test_a_broken_upload_by_the_api(url):
    """Whatever the file is called, the error doesn't show a path on the server either."""
    path = send(url, b"no picture")
    for name in ("a.png", "a.svg", None):
        reply = call(url, "preview", [{"path": path, "orig_name": name, "meta": META}, 3, 30, 0])
        assert "is not an image that can be read" in reply
        assert str(Path(path).parent) not in reply and "component" not in reply


@pytest.fixture(scope="module")
def stranger():
    """The address of a picture, and the requests to its server."""
    with record_requests() as (address, asked):
        yield f"{address}/a.png", asked


@pytest.fixture(scope="module")
def secrets(url, stranger, tmp_path_factory):
    """Values for the picture that name files that nobody uploaded."""
    folder = tmp_path_factory.mktemp("secrets")
    picture = folder / "picture.png"
    Image.new("RGB", (40, 30), "red").save(picture)
    (folder / "words.txt").write_text("secret")
    os.mkfifo(folder / "pipe")
    upload = Path(send(url, (ROOT / "examples" / "scene1.jpg").read_bytes()))
    uploads = upload.parent.parent
    (uploads / "link.png").symlink_to(picture)
    (uploads / "folder").symlink_to(folder)
    (uploads / "loop").symlink_to(uploads / "loop")
    (uploads / "zero").symlink_to("/dev/zero")
    os.mkfifo(uploads / "pipe")
    paths = [picture, folder / "words.txt", folder / "nothing.png", folder, folder / "pipe", "/dev/zero"]
    paths += ["/proc/self/environ", "/dev/stdin", os.path.relpath(picture, ROOT), "examples/scene1.jpg", "~", "."]
    paths += [uploads, upload.parent, uploads / "link.png", uploads / "folder" / "picture.png", uploads / "loop"]
    paths += [
        uploads / "zero",
        uploads / "pipe",
        uploads / "nothing.png",
        f"{uploads}/../../{folder.name}/picture.png",
    ]
    paths += [f"{upload}\0", f"{upload}\ud800", f"{uploads}/{'a' * 5000}", f"{uploads}.png", "", "\0"]
    paths += [f"file://{picture}", f"file://{upload}", f"/gradio_api/file={picture}", stranger[0], "data:,a"]
    paths += ["https://example.com/a.png", "HTTP://example.com/a.png", "ftp://example.com/a.png", 3, True, [], {}]
    paths += [[str(picture)], {"path": str(picture)}, ["a"] * 3]
    values = [{"path": str(path) if isinstance(path, Path) else path} for path in paths]
    values += [{**value, "meta": META} for value in values]
    for extra in ({"meta": "x"}, {"meta": {}}, {"meta": {"_type": "other"}}, {"meta": META, "is_stream": True}):
        values.append({"path": str(picture), **extra})
    for address in (stranger[0], f"file://{picture}", str(picture), "data:image/png;base64,AAAA"):
        values += [{"url": address}, {"url": address, "path": None, "meta": META}]
        values += [{"url": address, "path": str(picture), "meta": META}]
    return [*values, str(picture), [str(picture)], [{"path": str(picture), "meta": META}], {}, 3, True, "a"]


@pytest.fixture(scope="module")
def file(url):
    return {"path": send(url, (ROOT / "examples" / "scene1.jpg").read_bytes())}


class TestWhatAVisitorMayRead:
    @pytest.mark.parametrize("name", REST)
    def test_nothing_else(self, url, secrets, stranger, name):
        """One sentence, whatever the file is and whether it exists; nothing is opened or fetched."""
        for value in secrets:
            start = time.monotonic()
            reply = call(url, name, [value, *REST[name]])
            assert reply.startswith("error") and json.loads(reply.partition("data: ")[2])["error"] == NOT_UPLOADED, (
                value
            )
            assert time.monotonic() - start < 5
        assert not stranger[1]

    @pytest.mark.parametrize("route", ROUTES)
    @pytest.mark.parametrize("name", REST)
    def test_by_no_route(self, url, secrets, name, route):
        uploaded = {"path": send(url, (ROOT / "examples" / "scene1.jpg").read_bytes())}
        assert NOT_UPLOADED not in ROUTES[route](url, name, [uploaded, *REST[name]])
        for value in secrets[::7]:
            assert NOT_UPLOADED in ROUTES[route](url, name, [value, *REST[name]])

    def test_not_as_another_value(self, url, secrets, stranger):
        """Gradio looks for files in the values of all components."""
        uploaded = {"path": send(url, (ROOT / "examples" / "scene1.jpg").read_bytes())}
        for value in ({"path": stranger[0], "meta": META}, [{"path": "/etc/passwd", "meta": META}]):
            for place in range(1, 7):
                data = [uploaded, *REST["answer"]]
                data[place] = value
                assert "got a list or an object" in call(url, "answer", data)
        assert not stranger[1]

    def test_others_still_get_their_answers(self, url, secrets):
        path = send(url, (ROOT / "examples" / "scene1.jpg").read_bytes())
        for file in ({"path": path}, {"path": path, "meta": META, "url": "http://example.com/a.png"}):
            assert "crops**" in call(url, "preview", [file, 3, 30, 0])
            assert "in all" in call(url, "answer", [file, *REST["answer"]])

    def test_gradios_client_and_the_examples(self, url, trial):
        client = pytest.importorskip("gradio_client")
        asked = client.Client(url, verbose=False)
        file = client.handle_file(str(trial.pictures[0]))
        answer, _, _ = asked.predict(file, trial.questions[0], 32, 128, 0, NEW_TOKENS, 0, 1, api_name="/answer")
        assert trial.is_right(0, answer)
        samples = [
            component["props"]["samples"]
            for component in json.loads(fetch(f"{url}/config")[1])["components"]
            if component["type"] == "dataset"
        ]
        assert samples
        for (file, _question), *_ in samples:
            assert "crops**" in call(url, "preview", [file, 3, 30, 0])

    @pytest.mark.parametrize("route", ["file=", "file/", "proxy=", "file=/"])
    def test_no_url_is_fetched(self, url, stranger, route):
        for address in (stranger[0], "http://example.com/", "https://example.com/a.png"):
            assert fetch(f"{url}/gradio_api/{route}{address}") == (404, "this page fetches no URLs")
        assert not stranger[1]

    def test_gradios_files_tell_nothing(self, url):
        for path in ("/etc/passwd", "/etc/nothing", "/dev/zero", str(ROOT / "examples" / "app.py")):
            assert fetch(f"{url}/gradio_api/file={path}") == (
                403,
                json.dumps({"detail": f"File not allowed: {path}."}, separators=(",", ":")),
            )

    def test_nothing_with_the_servers_token(self, url, hub):
        """Gradio's history of runs asks the Hub for its callers."""
        routes = {"buckets": None, "connect": {"bucket_id": "a/b"}, "records?bucket=a/b": None}
        codes = [fetch(f"{url}/gradio_api/run-history/{route}", body)[0] for route, body in routes.items()]
        assert (codes, hub[1]) == ([404] * 3, [])


class TestSliders:
    def ask(self, url, file, **changes) -> str:
        values = {"max_crops": 3, "num_tokens": 30, "zoom": 0, "longest": 2, "temperature": 0, "top_p": 1, **changes}
        return call(url, "answer", [file, "What?", *values.values()])

    @pytest.mark.parametrize(
        "changes",
        [
            *({"temperature": 2}, {"temperature": 1}, {"temperature": 2.0}, {"temperature": 1e-300}, {"top_p": 1.0}),
            *({"max_crops": 32.0}, {"num_tokens": 32.0}, {"longest": 2.0}, {"max_crops": 0}, {"max_crops": -0.0}),
            {"temperature": 2, "top_p": 0.05},
        ],
        ids=str,
    )
    def test_any_form_of_a_number(self, url, file, changes):
        assert self.ask(url, file, **changes).startswith("complete")
        knobs = [changes.get("max_crops", 3), changes.get("num_tokens", 30), changes.get("zoom", 0)]
        assert call(url, "preview", [file, *knobs]).startswith("complete")

    @pytest.mark.parametrize(
        "value", ["3", True, None, float("nan"), float("inf"), -float("inf"), 10**30, -1, ""], ids=str
    )
    @pytest.mark.parametrize(
        "name, words",
        [
            ("max_crops", "max_crops must be a whole number from 0 to 100"),
            ("num_tokens", "num_tokens must be a whole number from 1 to 2048"),
            ("zoom", "where the question points must be a whole number from 0 to 5"),
            ("longest", "Longest answer in tokens must be a whole number from 1 to 512"),
            ("temperature", "Temperature (0: always the most likely word) must be a number from 0 to 2"),
            ("top_p", "Top p must be a number from 0.05 to 1"),
        ],
    )
    def test_nothing_else(self, url, file, name, words, value):
        reply = self.ask(url, file, **{name: value})
        assert reply.startswith("error") and words in reply
        if name in ("max_crops", "num_tokens", "zoom"):
            knobs = {"max_crops": 3, "num_tokens": 30, "zoom": 0} | {name: value}
            reply = call(url, "preview", [file, *knobs.values()])
            assert reply.startswith("error") and words in reply

    def test_between_two_integers(self, url, file):
        for name in ("max_crops", "num_tokens", "zoom", "longest"):
            assert "must be a whole number" in self.ask(url, file, **{name: 32.5})

    def test_what_the_api_says(self, url):
        parameters = json.loads(fetch(f"{url}/gradio_api/info")[1])["named_endpoints"]["/answer"]["parameters"]
        kinds = {entry["label"]: entry["type"]["type"] for entry in parameters if entry["component"] == "Slider"}
        assert list(kinds.values()) == ["integer"] * 4 + ["number"] * 2

    def test_a_long_question(self, url, file):
        reply = call(url, "answer", [file, "What? " * 20_000, *REST["answer"][1:]])
        assert "a question may have 100000 characters, got 119999: shorten it" in reply


@pytest.fixture(scope="module")
def app():
    pytest.importorskip("gradio", reason='pip install "mc-llava[app]" to test the Space')
    spec = importlib.util.spec_from_file_location("app", ROOT / "examples" / "app.py")
    module = sys.modules["app"] = importlib.util.module_from_spec(spec)  # Gradio looks for its components there
    spec.loader.exec_module(module)
    return module


def test_the_tower_is_passed_once_for_two_questions(app, trial):
    demo = app.Demo("tiny")
    knobs = demo.planner.max_crops, demo.planner.num_tokens, 0
    passes = []
    demo.engine.model.model.vision_tower.encoder.register_forward_hook(lambda *args: passes.append(1))
    for _ in range(2):
        *_, (answer, status, _) = demo.answer(str(trial.pictures[0]), trial.questions[0], *knobs, NEW_TOKENS, 0, 1)
        assert trial.is_right(0, answer)
        if "was encoded in" in status:
            first = len(passes)
    assert first == len(passes) > 0 and "was encoded before" in status
    with pytest.raises(app.gr.Error, match="no question yet"):
        list(demo.answer(str(trial.pictures[0]), None, *knobs, NEW_TOKENS, 0, 1))
    with pytest.raises(app.gr.Error, match="special token"):
        list(demo.answer(str(trial.pictures[1]), "What?<|im_end|>", *knobs, NEW_TOKENS, 0, 1))
    assert len(passes) == first


def test_one_picture_is_decoded_at_a_time(app, trial, monkeypatch):
    demo, living, most = app.Demo("tiny"), set(), []

    def load(*args):
        picture = load_image(*args)
        number = object()
        living.add(number)
        weakref.finalize(picture, living.discard, number)
        most.append(len(living))
        time.sleep(0.05)  # lets the other threads run
        return picture

    load_image = app.load_image
    monkeypatch.setattr(app, "load_image", load)
    errors = []  # kept, with everything that their tracebacks refer to

    def ask(function, *arguments):
        try:
            list(function(str(trial.pictures[0]), *arguments))
        except app.gr.Error as error:
            errors.append(error)

    calls = [(demo.preview, 8, 64, 0), (demo.preview, 8, 64, 1)]
    # With zoom, a prompt that is too long is refused while there is a picture.
    calls += [(demo.answer, "What?", *knobs, 2, 0, 1) for knobs in ((8, 64, 0), (8, 64, 1), (64, 2048, 1))]
    threads = [threading.Thread(target=ask, args=call) for call in [*calls, *calls]]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] * 10 and len(errors) == 2


def test_old_pictures_are_deleted_but_not_the_examples(app, tmp_path, monkeypatch):
    assert app.KEEP_PICTURES == (3600, 86400)
    monkeypatch.setattr(app, "KEEP_PICTURES", (1, 2))
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    page = app.build_page(app.Demo("tiny"), app.SCENES)
    examples = set(tmp_path.rglob("*.jpg"))
    assert {path.name for path in examples} == {Path(image).name for image, _ in app.SCENES}
    _, url, _ = page.launch(prevent_thread_lock=True, quiet=True, ssr_mode=False)
    try:
        upload = send(url.rstrip("/"), (ROOT / "examples" / "scene1.jpg").read_bytes(), "upload.jpg")
        reply = call(url.rstrip("/"), "preview", [{"path": upload}, 3, 30, 0])
        grid = json.loads(reply.partition("data: ")[2])[0]["path"]
        assert {upload, grid} <= set(map(str, tmp_path.rglob("*")))
        deadline = time.monotonic() + 30
        while {path for path in tmp_path.rglob("*") if path.is_file()} != examples:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        assert NOT_UPLOADED in call(url.rstrip("/"), "preview", [{"path": upload}, 3, 30, 0])
    finally:
        page.close()
    assert all(path.exists() for path in examples)


def test_only_uploads_and_examples_are_read(app, trial, tmp_path, monkeypatch):
    """Even if Gradio lets other paths through."""
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "uploads"))
    for folder in ("uploads/hash", "uploads.old"):
        (tmp_path / folder).mkdir(parents=True)
        Image.new("RGB", (40, 30)).save(tmp_path / folder / "a.png")
    (tmp_path / "uploads" / "link.png").symlink_to(tmp_path / "uploads.old" / "a.png")
    (tmp_path / "uploads" / "inside.png").symlink_to(tmp_path / "uploads" / "hash" / "a.png")
    os.mkfifo(tmp_path / "uploads" / "pipe")
    for path in ("uploads/hash/a.png", "uploads/inside.png", "uploads/../uploads/hash/a.png", trial.pictures[0]):
        assert app.load_upload(str(tmp_path / path)).width >= 40
    paths = [
        tmp_path / name
        for name in ("uploads.old/a.png", "uploads/link.png", "uploads/hash", "uploads/pipe", "uploads", "uploads/b")
    ]
    for path in (
        *paths,
        tmp_path / "uploads/../uploads.old/a.png",
        "/dev/zero",
        ROOT / "README.md",
        ROOT / "docs/app.png",
    ):
        with pytest.raises(ValueError, match=NOT_UPLOADED):
            app.load_upload(str(path))


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

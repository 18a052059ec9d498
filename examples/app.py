"""
The Space: ask about a picture and see the crops that the model reads.

`python examples/app.py` serves it on http://127.0.0.1:7860. Environment variables: `MC_LLAVA_MODEL`, a model folder or
a Hub id (`tiny` by default); `GRADIO_SERVER_NAME` and `GRADIO_SERVER_PORT`, as Gradio reads them.
"""

import json
import os
import re
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple


os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # read when gradio is imported
# Off, because its routes ask the Hub with this machine's token for whoever reaches the server through loopback: other
# users of the machine, and everyone behind a proxy on it.
os.environ.setdefault("GRADIO_RUN_HISTORY", "False")
try:
    import gradio as gr
except ModuleNotFoundError as error:
    if error.name != "gradio":
        raise
    raise SystemExit('app.py needs Gradio: pip install "mc-llava[app]"') from None
from gradio.utils import get_upload_folder
from PIL import Image
from starlette.middleware import Middleware
from starlette.responses import PlainTextResponse


ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # a Space runs this file in a clone that is not installed

from mc_llava import FeatureCache, count_closer, explain_no_zoom, load_image
from mc_llava.crop_grid import draw_crop_grid, draw_looks
from mc_llava.engine import Engine, ask_about
from mc_llava.estimate import Estimate, estimate
from mc_llava.loading import load_model, load_processor


# `tiny` knows the things that were drawn into these, and cannot describe a picture.
SCENES = [
    [str(ROOT / "examples" / example["image"]), example["question"]]
    for example in json.loads((ROOT / "examples" / "questions.json").read_text())
]
PHOTOGRAPHS = [
    [str(ROOT / "examples" / "coffee.jpg"), "What is on the table?"],
    [str(ROOT / "examples" / "hubble.jpg"), "What shines in the middle?"],
]
EXAMPLES = {os.path.realpath(path) for path, _ in (*SCENES, *PHOTOGRAPHS)}
NOT_UPLOADED = "this picture was not uploaded here: upload it, or pick an example"
MAX_UPLOAD = "64mb"
MAX_QUESTION = 100_000  # characters
KEEP_PICTURES = (3600, 86400)  # every hour, uploads and drawn grids that are older than a day are deleted
GRID_SIDE = 1600  # longest side of the drawn grid in pixels
MIN_TEMPERATURE = 0.01  # a lower one is 0, the most likely token: logits divided by it might overflow


class Knob(NamedTuple):
    """A slider. Its value is a float if `step` is one, an integer otherwise."""

    label: str
    minimum: float
    maximum: float
    default: float
    step: float

    def read(self, value) -> int | float:
        """
        A value that a visitor sent. JSON has one type of numbers: 32.0 is an integer and 2 a float, too.

        Raises:
            ValueError: if it is not such a number, or beyond the slider's ends.
        """
        kind = type(self.step)
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        # NaN is not between the ends.
        if not is_number or not self.minimum <= value <= self.maximum or (kind is int and value != int(value)):
            number = "a whole number" if kind is int else "a number"
            raise ValueError(f"{self.label} must be {number} from {self.minimum} to {self.maximum}, got {value!r:.50}")
        return kind(value)


class Demo:
    """A model and the page's callbacks. Independent of Gradio except for its errors and its folder of uploads."""

    def __init__(self, model: str):
        self.engine = Engine(load_model(model), load_processor(model))
        self.planner = self.engine.processor.image_processor
        context = self.engine.model.config.text_config.max_position_embeddings
        crops, tokens = self.planner.max_crops, self.planner.num_tokens
        self.max_crops = Knob("max_crops", 0, max(100, crops), crops, 1)
        self.num_tokens = Knob("num_tokens", 1, max(context, tokens), tokens, 1)
        zoom = self.planner.zoom
        self.zoom = Knob("zoom: how often to look closer where the question points", 0, max(5, zoom), zoom, 1)
        self.max_new_tokens = Knob("Longest answer in tokens", 1, 512, 200, 1)
        self.temperature = Knob("Temperature (0: always the most likely word)", 0, 2, 0, 0.1)
        self.top_p = Knob("Top p", 0.05, 1, 1, 0.05)
        self.flops_per_second = self._measure_speed()
        self.thread = ThreadPoolExecutor(1)  # of `_with_picture`

    def _measure_speed(self) -> float:
        """FLOPs per second, as `estimate` counts them, measured with one question about a gray picture."""
        grey = Image.new("RGB", (64, 64), "grey")
        conversation, options = ask_about([grey], "What is it?"), {"max_new_tokens": 1, "prefix_cache": None}
        self.engine.answer([conversation], **options)  # warms up
        self.engine.feature_cache = FeatureCache()
        start = time.perf_counter()
        (reply,) = self.engine.answer([conversation], **options)
        seconds = time.perf_counter() - start
        cost = self.cost(reply.crops, reply.image_tokens)
        return (cost.tower_flops + cost.prefill_flops) / seconds

    @lru_cache(maxsize=256)  # noqa: B019
    def cost(self, crops: int, tokens: int, looks: int = 0) -> Estimate:
        return estimate(self.engine.model.config, crops, tokens, new_tokens=1, looks=looks)

    def _read_knobs(self, max_crops, num_tokens, zoom) -> dict[str, int]:
        return {
            "max_crops": self.max_crops.read(max_crops),
            "num_tokens": self.num_tokens.read(num_tokens),
            "zoom": self.zoom.read(zoom),
        }

    def preview(self, path: str | None, max_crops: int, num_tokens: int, zoom: int):
        """The crop grid drawn over the picture, and the cost of a question as text; empty without a picture."""
        if path is None:
            return None, ""
        try:
            knobs = self._read_knobs(max_crops, num_tokens, zoom)
            grid, size, plan = self._with_picture(path, self._draw, knobs)
        except ValueError as error:
            raise gr.Error(str(error), print_exception=False) from error
        tokens = sum(crop.num_tokens for crop in plan)
        side = self.planner.size["height"]
        looks, closer = count_closer(*size, side=side, **knobs)
        words = f"**{len(plan) + closer} crops** (the whole picture, a grid of {len(plan) - 1}"
        words += f" and {closer} where the question points" if closer else ""
        words += f"), **{tokens} visual tokens**. "
        if knobs["zoom"] and (reason := explain_no_zoom(*size, side=side, **knobs)):
            words += f"Zoom changes nothing here: {reason}. "
        try:
            cost = self.cost(len(plan) + closer, tokens, looks)
        except ValueError:
            return grid, f"{words}These leave no room for an answer: lower num_tokens."
        encoded = cost.prefill_flops / self.flops_per_second
        first = encoded + (cost.tower_flops + cost.look_flops) / self.flops_per_second
        words += f"The first word comes after about {first:.2f} s"
        return grid, f"{words}." if looks else f"{words}, or {encoded:.2f} s once the picture is encoded."

    def _with_picture(self, path: str, function, *arguments):
        """
        What a function makes of an uploaded picture. A small file may take more than a gigabyte until it is drawn or
        encoded, so one thread handles all pictures, however many visitors ask and by whatever route. With a lock
        instead, each of Gradio's threads would keep the memory that it once had.

        Raises:
            ValueError: as `load_upload` and the function do, without the traceback, which would keep the picture.
        """

        def work():
            try:
                return function(load_upload(path), *arguments)
            except ValueError as error:
                message = str(error)
            raise ValueError(message)

        return self.thread.submit(work).result()

    def _draw(self, picture: Image.Image, knobs: dict[str, int]):
        """The crop grid drawn over the picture, the picture's size, and the plan."""
        plan = self.planner.plan(*picture.size, **knobs)
        grid = draw_crop_grid(picture, plan)
        grid.thumbnail((GRID_SIDE, GRID_SIDE))
        return grid, picture.size, plan

    def answer(
        self,
        path: str | None,
        question: str | None,
        max_crops: int,
        num_tokens: int,
        zoom: int,
        max_new_tokens: int,
        temperature: float,
        top_p: float,
    ):
        """
        Yield the answer so far, the status text, which says whether the picture had to be encoded, and with zoom the
        picture with what was looked at.
        """
        yield "", "", gr.skip()
        try:
            if path is None:
                raise ValueError("there is no picture yet: upload one or pick an example")
            if not (question := (question or "").strip()):
                raise ValueError("there is no question yet: type one")
            if len(question) > MAX_QUESTION:
                raise ValueError(f"a question may have {MAX_QUESTION} characters, got {len(question)}: shorten it")
            knobs = self._read_knobs(max_crops, num_tokens, zoom)
            options = {"max_new_tokens": self.max_new_tokens.read(max_new_tokens), "do_sample": False}
            temperature, top_p = self.temperature.read(temperature), self.top_p.read(top_p)
            if temperature >= MIN_TEMPERATURE:
                options |= {"do_sample": True, "temperature": temperature, "top_p": top_p}
            self.engine.check(ask_about([], question))  # before the picture is encoded
            start = time.perf_counter()
            encoded, status, shown = self._with_picture(path, self._encode, question, knobs)
            yield "", status, shown
            text = ""
            for piece in self.engine.stream(ask_about(encoded, question), **options):
                text += piece
                yield text, status, gr.skip()
            yield text, f"{status} The answer took {time.perf_counter() - start:.2f} s in all.", gr.skip()
        except ValueError as error:
            raise gr.Error(str(error), print_exception=False) from error

    def _encode(self, picture: Image.Image, question: str, knobs: dict[str, int]):
        """The encoded picture in a list, a status text, and with zoom the picture with what was looked at."""
        misses, start = self.engine.feature_cache.misses, time.perf_counter()
        if knobs["zoom"]:
            looked = self.engine.look([ask_about([picture], question)], **knobs)
            shown = draw_looks(picture, looked[0])
            shown.thumbnail((GRID_SIDE, GRID_SIDE))
            return looked, f"The model looked in {time.perf_counter() - start:.2f} s.", shown
        encoded = self.engine.encode([picture], **knobs)
        status = "The picture was encoded before."
        if self.engine.feature_cache.misses > misses:
            status = f"The picture was encoded in {time.perf_counter() - start:.2f} s."
        return encoded, status, gr.skip()


def load_upload(path: str) -> Image.Image:
    """
    Load a picture that was uploaded, or an example. It is read here, so that errors don't show its path on the server.

    Raises:
        ValueError: if it is neither, or `load_image` can't read it.
    """
    if not is_upload(path) and os.path.realpath(path) not in EXAMPLES:
        raise ValueError(NOT_UPLOADED)
    return load_image(Path(path).read_bytes())


def is_upload(path) -> bool:
    """
    Whether this is the path of a regular file in Gradio's folder of uploads, which also has copies of the examples.

    A path comes from the visitor, who may write whatever they like. Nothing outside the folder is touched to find out,
    so that neither errors nor time tell what else there is on the server. Gradio keeps each upload in a subfolder
    named after a hash of its bytes and a secret of the installation: a visitor can't guess the path of another's
    picture, but may use one that they were given.
    """
    if not isinstance(path, str) or "\0" in path:
        return False
    folder = os.path.abspath(get_upload_folder())
    inside = os.path.abspath(path)
    if not inside.startswith(folder + os.sep):
        return False
    try:
        is_inside = os.path.realpath(inside).startswith(os.path.realpath(folder) + os.sep)  # symbolic links
        return is_inside and os.path.isfile(inside)  # a pipe or a device might never end
    except (OSError, ValueError):  # a name that the file system can't encode
        return False


class Upload(gr.Image):
    """Passes on the file's path. Gradio's class opens the file first, and its errors show the path."""

    is_template = True  # tells Gradio to display it like its base class

    def preprocess(self, payload) -> str | None:
        return None if payload is None else payload.path


class Slider(gr.Slider):
    """Passes on what was sent: Gradio's class lets NaN, booleans and numbers between two steps pass."""

    is_template = True

    def preprocess(self, payload):
        return payload


class Page(gr.Blocks):
    """
    Refuses inputs that the page doesn't send, before Gradio looks at them. It checks paths only of files with `meta`,
    fetches the file of a URL, and its errors show paths on the server.
    """

    async def preprocess_data(self, block_fn, inputs, state, explicit_call=False):
        inputs = [check_input(block, value) for block, value in zip(block_fn.inputs, inputs)]
        return await super().preprocess_data(block_fn, inputs, state, explicit_call)


def check_input(block, value):
    """A component's value: for a picture only the path of the upload."""
    if isinstance(block, Upload) and value is not None:
        path = value.get("path") if isinstance(value, dict) else None
        if not is_upload(path):
            raise gr.Error(NOT_UPLOADED, print_exception=False)
        return {"path": path, "meta": {"_type": "gradio.FileData"}}
    if isinstance(value, (dict, list)):
        raise gr.Error("a text or a number was expected, got a list or an object", print_exception=False)
    return value


class RefuseUrls:
    """Gradio's route for files also fetches URLs for whoever asks."""

    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send):
        if scope["type"] == "http" and re.search("https?:/", scope["path"], re.IGNORECASE):
            return await PlainTextResponse("this page fetches no URLs", 404)(scope, receive, send)
        return await self.app(scope, receive, send)


def slider(knob: Knob, **options) -> Slider:
    # With precision 0, the API's description says integer.
    precision = 0 if isinstance(knob.step, int) else None
    label, minimum, maximum, default, step = knob
    return Slider(minimum, maximum, default, step=step, label=label, precision=precision, **options)


def build_page(demo: Demo, examples: list[list[str]]) -> gr.Blocks:
    with Page(title="MC-LLaVA", analytics_enabled=False, delete_cache=KEEP_PICTURES) as page:
        gr.Markdown(
            "# MC-LLaVA\nAsk about a picture. The model looks at all of it and at a grid of crops; with zoom, it then "
            "looks closer where the question points."
        )
        with gr.Row():
            with gr.Column():
                picture = Upload(label="Picture", sources=["upload", "clipboard"], elem_id="picture")
                question = gr.Textbox(label="Question", placeholder="What is on the table?", elem_id="question")
                ask = gr.Button("Ask", variant="primary", elem_id="ask")
                answer = gr.Textbox(label="Answer", lines=3, elem_id="answer")
                status = gr.Markdown(elem_id="status")
            with gr.Column():
                grid = gr.Image(
                    label="Crops",
                    interactive=False,
                    format="jpeg",
                    buttons=["download", "fullscreen"],
                    elem_id="grid",
                )
                cost = gr.Markdown(elem_id="cost")
                max_crops = slider(demo.max_crops, elem_id="max_crops")
                num_tokens = slider(demo.num_tokens, elem_id="tokens")
                zoom = slider(demo.zoom, elem_id="zoom")
                with gr.Accordion("Sampling", open=False):
                    sampling = [slider(knob) for knob in (demo.max_new_tokens, demo.temperature, demo.top_p)]
        knobs = [max_crops, num_tokens, zoom]
        gr.Examples(examples, [picture, question], elem_id="examples")
        for changed in (picture, *knobs):
            changed.change(
                demo.preview, [picture, *knobs], [grid, cost], show_progress="hidden", trigger_mode="always_last"
            )
        gr.on(
            [ask.click, question.submit],
            demo.answer,
            [picture, question, *knobs, *sampling],
            [answer, status, grid],
        )
    return page


if __name__ == "__main__":
    model = os.environ.get("MC_LLAVA_MODEL", "tiny")
    examples = SCENES if model == "tiny" else PHOTOGRAPHS
    # The visitor's fonts, so that the page makes no third-party requests.
    theme = gr.themes.Default(font="sans-serif", font_mono="monospace")
    build_page(Demo(model), examples).launch(
        theme=theme,
        show_error=True,
        max_file_size=MAX_UPLOAD,
        ssr_mode=False,
        app_kwargs={"middleware": [Middleware(RefuseUrls)]},
    )

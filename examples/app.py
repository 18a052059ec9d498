"""
The Space: ask about a picture and see the crops that the model reads.

`python examples/app.py` serves it on http://127.0.0.1:7860. Environment variables: `MC_LLAVA_MODEL`, a model folder or
a Hub id (`tiny` by default); `GRADIO_SERVER_NAME` and `GRADIO_SERVER_PORT`, as Gradio reads them.
"""

import json
import os
import sys
import time
from functools import lru_cache
from pathlib import Path


os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # read when gradio is imported
try:
    import gradio as gr
except ModuleNotFoundError as error:
    if error.name != "gradio":
        raise
    raise SystemExit('app.py needs Gradio: pip install "mc-llava[app]"') from None
from PIL import Image


ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # a Space runs this file in a clone that is not installed

from mc_llava import FeatureCache, load_image
from mc_llava.crop_grid import draw_crop_grid
from mc_llava.engine import Engine, ask_about
from mc_llava.estimate import Estimate, estimate
from mc_llava.loading import load_model, load_processor


# `tiny` knows only drawn scenes.
SCENES = [
    [str(ROOT / "examples" / example["image"]), example["question"]]
    for example in json.loads((ROOT / "examples" / "questions.json").read_text())
]
PHOTOGRAPHS = [
    [str(ROOT / "examples" / "coffee.jpg"), "What is on the table?"],
    [str(ROOT / "examples" / "hubble.jpg"), "What shines in the middle?"],
]
MAX_UPLOAD = "64mb"
GRID_SIDE = 1600  # longest side of the drawn grid in pixels


class Demo:
    """A model and the page's callbacks. Independent of Gradio except for its error class."""

    def __init__(self, model: str):
        self.engine = Engine(load_model(model), load_processor(model))
        self.planner = self.engine.processor.image_processor
        self.flops_per_second = self._measure_speed()

    def _measure_speed(self) -> float:
        """FLOPs per second, as `estimate` counts them, measured with one question about a grey picture."""
        grey = Image.new("RGB", (64, 64), "grey")
        conversation = ask_about([grey], "What is it?")
        self.engine.answer([conversation], max_new_tokens=1)  # warms up
        self.engine.feature_cache = FeatureCache()
        start = time.perf_counter()
        (reply,) = self.engine.answer([conversation], max_new_tokens=1)
        seconds = time.perf_counter() - start
        cost = self.cost(reply.crops, reply.image_tokens)
        return (cost.tower_flops + cost.prefill_flops) / seconds

    @lru_cache(maxsize=256)  # noqa: B019
    def cost(self, crops: int, tokens: int) -> Estimate:
        return estimate(self.engine.model.config, crops, tokens, new_tokens=1)

    def preview(self, path: str | None, max_crops: int, num_tokens: int):
        """The crop grid drawn over the picture, and the cost of a question as text; empty without a picture."""
        if path is None:
            return None, ""
        try:
            picture = load_upload(path)
            plan = self.planner.plan(*picture.size, max_crops=max_crops, num_tokens=num_tokens)
        except ValueError as error:
            raise gr.Error(str(error), print_exception=False) from error
        grid = draw_crop_grid(picture, plan)
        grid.thumbnail((GRID_SIDE, GRID_SIDE))
        tokens = sum(crop.num_tokens for crop in plan)
        words = (
            f"**{len(plan)} crops** (the whole picture and a grid of {len(plan) - 1}), **{tokens} visual tokens**. "
        )
        try:
            cost = self.cost(len(plan), tokens)
        except ValueError:
            return grid, f"{words}These leave no room for an answer: lower num_tokens."
        encoded = cost.prefill_flops / self.flops_per_second
        first = encoded + cost.tower_flops / self.flops_per_second
        return grid, (
            f"{words}The first word comes after about {first:.2f} s, or {encoded:.2f} s once the picture is encoded."
        )

    def answer(
        self,
        path: str | None,
        question: str | None,
        max_crops: int,
        num_tokens: int,
        max_new_tokens: int,
        temperature: float,
        top_p: float,
    ):
        """Yield the answer so far and the status text, which says whether the picture had to be encoded."""
        yield "", ""
        try:
            if path is None:
                raise ValueError("there is no picture yet: upload one or pick an example")
            if not (question := (question or "").strip()):
                raise ValueError("there is no question yet: type one")
            misses = self.engine.feature_cache.misses
            start = time.perf_counter()
            encoded = self.engine.encode([load_upload(path)], max_crops=max_crops, num_tokens=num_tokens)
            status = "The picture was encoded before."
            if self.engine.feature_cache.misses > misses:
                status = f"The picture was encoded in {time.perf_counter() - start:.2f} s."
            options = {"max_new_tokens": max_new_tokens, "do_sample": temperature > 0}
            if temperature > 0:
                options |= {"temperature": temperature, "top_p": top_p}
            text = ""
            for piece in self.engine.stream(ask_about(encoded, question), **options):
                text += piece
                yield text, status
            yield text, f"{status} The answer took {time.perf_counter() - start:.2f} s in all."
        except ValueError as error:
            raise gr.Error(str(error), print_exception=False) from error


def load_upload(path: str) -> Image.Image:
    """Load a picture from its bytes, so that errors don't show its path on the server."""
    return load_image(Path(path).read_bytes())


class Upload(gr.Image):
    """Passes on the file's path. Gradio's class opens the file first, and its errors show the path."""

    is_template = True  # tells Gradio to display it like its base class

    def preprocess(self, payload) -> str | None:
        return None if payload is None else payload.path


def build_page(demo: Demo, examples: list[list[str]]) -> gr.Blocks:
    defaults = demo.planner
    context = demo.engine.model.config.text_config.max_position_embeddings
    with gr.Blocks(title="MC-LLaVA", analytics_enabled=False) as page:
        gr.Markdown("# MC-LLaVA\nAsk about a picture. The model looks at all of it and at a grid of crops.")
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
                most = max(100, defaults.max_crops), max(context, defaults.num_tokens)
                max_crops = gr.Slider(0, most[0], defaults.max_crops, step=1, label="max_crops", elem_id="max_crops")
                num_tokens = gr.Slider(1, most[1], defaults.num_tokens, step=1, label="num_tokens", elem_id="tokens")
                with gr.Accordion("Sampling", open=False):
                    max_new_tokens = gr.Slider(1, 512, 200, step=1, label="Longest answer in tokens")
                    temperature = gr.Slider(0, 2, 0, step=0.1, label="Temperature (0: always the most likely word)")
                    top_p = gr.Slider(0.05, 1, 1, step=0.05, label="Top p")
        knobs = [max_crops, num_tokens]
        gr.Examples(examples, [picture, question], elem_id="examples")
        for changed in (picture, *knobs):
            changed.change(
                demo.preview, [picture, *knobs], [grid, cost], show_progress="hidden", trigger_mode="always_last"
            )
        gr.on(
            [ask.click, question.submit],
            demo.answer,
            [picture, question, *knobs, max_new_tokens, temperature, top_p],
            [answer, status],
        )
    return page


if __name__ == "__main__":
    model = os.environ.get("MC_LLAVA_MODEL", "tiny")
    examples = SCENES if model == "tiny" else PHOTOGRAPHS
    # The visitor's fonts, so that the page makes no third-party requests.
    theme = gr.themes.Default(font="sans-serif", font_mono="monospace")
    build_page(Demo(model), examples).launch(theme=theme, show_error=True, max_file_size=MAX_UPLOAD, ssr_mode=False)

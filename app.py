"""
The Space: ask about a picture and see the crops that the model looks at.

`python app.py` serves it on http://127.0.0.1:7860. Environment variables: `MC_LLAVA_MODEL`, a model folder or
a Hub id (`tiny` by default); `GRADIO_SERVER_NAME` and `GRADIO_SERVER_PORT`, as Gradio reads them.
"""

import json
import os
import threading
import time
from pathlib import Path


os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # read when gradio is imported
try:
    import gradio as gr
except ModuleNotFoundError as error:
    if error.name != "gradio":
        raise
    raise SystemExit('app.py needs Gradio: pip install "mc-llava[app]"') from None
import torch
from PIL import Image
from transformers import StoppingCriteriaList, TextIteratorStreamer

from mc_llava import FeatureCache, load_image
from mc_llava.crop_grid import draw_crop_grid
from mc_llava.loading import load_model, load_processor


ROOT = Path(__file__).parent
# `tiny` knows nothing but drawn scenes.
SCENES = [
    [str(ROOT / "examples" / example["image"]), example["question"]]
    for example in json.loads((ROOT / "examples" / "questions.json").read_text())
]
PHOTOGRAPHS = [
    [str(ROOT / "examples" / "coffee.jpg"), "What is on the table?"],
    [str(ROOT / "examples" / "hubble.jpg"), "What shines in the middle?"],
]
MAX_UPLOAD = "64mb"
GRID_SIDE = 1600  # pixels of the drawn grid, at most


class Demo:
    """A model and what the page asks of it. Knows nothing of Gradio but its error."""

    def __init__(self, model: str):
        self.processor, self.model = load_processor(model), load_model(model)
        self.cache = FeatureCache()
        self._measure_speed()

    def _measure_speed(self):
        """Seconds of a crop and of a prompt's and an answer's token, from a grey picture without a grid."""
        grey = Image.new("RGB", (64, 64), "grey")

        def seconds(max_new_tokens: int, **inputs) -> float:
            start = time.perf_counter()
            self.model.generate(**inputs, do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=None)
            return time.perf_counter() - start

        inputs = self.processor("What is it?", grey).to(self.model.device)
        seconds(2, **inputs)  # warms up
        start = time.perf_counter()
        encoded = self.model.encode_images(**inputs)
        self.crop_seconds = time.perf_counter() - start
        inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")} | {"image_features": encoded}
        first = seconds(1, **inputs)
        self.prompt_seconds = first / inputs["input_ids"].shape[1]
        self.token_seconds = max(0.0, seconds(9, **inputs) - first) / 8

    def preview(self, path: str | None, max_crops: int, num_tokens: int):
        """The crop grid over the picture, and what a question costs in words; nothing without a picture."""
        if path is None:
            return None, ""
        try:
            picture = load_upload(path)
            plan = self.processor.image_processor.plan(*picture.size, max_crops=max_crops, num_tokens=num_tokens)
        except ValueError as error:
            raise gr.Error(str(error), print_exception=False) from error
        grid = draw_crop_grid(picture, plan)
        grid.thumbnail((GRID_SIDE, GRID_SIDE))
        tokens = sum(crop.num_tokens for crop in plan)
        first = len(plan) * self.crop_seconds + tokens * self.prompt_seconds
        return grid, (
            f"**{len(plan)} crops** (the whole picture and a grid of {len(plan) - 1}), **{tokens} visual tokens**. "
            f"The first word comes after about {first:.2f} s, or {tokens * self.prompt_seconds:.2f} s once it "
            f"is encoded; each further one after {self.token_seconds:.2f} s."
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
        """Yields the answer so far and, in words, what was encoded for it."""
        yield "", ""
        try:
            if path is None:
                raise ValueError("there is no picture yet: upload one or pick an example")
            if not (question := (question or "").strip()):
                raise ValueError("there is no question yet: type one")
            misses = self.cache.misses
            start = time.perf_counter()
            content = [{"type": "image", "image": load_upload(path)}, {"type": "text", "text": question}]
            inputs = self.processor.apply_chat_template(
                [{"role": "user", "content": content}],
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                processor_kwargs={
                    "model": self.model,
                    "feature_cache": self.cache,
                    "max_crops": max_crops,
                    "num_tokens": num_tokens,
                },
            )
            status = "The picture was encoded before."
            if self.cache.misses > misses:
                status = f"The picture was encoded in {time.perf_counter() - start:.2f} s."
            options = {"max_new_tokens": max_new_tokens, "do_sample": temperature > 0}
            if temperature > 0:
                options |= {"temperature": temperature, "top_p": top_p}
            text = ""
            for piece in self._stream(inputs, **options):
                text += piece
                yield text, status
            yield text, f"{status} The answer took {time.perf_counter() - start:.2f} s in all."
        except ValueError as error:
            raise gr.Error(str(error), print_exception=False) from error

    def _stream(self, inputs: dict, **options):
        """The pieces of an answer as they come. Whoever stops listening stops the generation."""
        streamer = TextIteratorStreamer(self.processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
        stopped, errors = threading.Event(), []

        def is_stopped(input_ids, scores, **kwargs):
            return torch.full((len(input_ids),), stopped.is_set(), device=input_ids.device)

        def generate():
            try:
                criteria = StoppingCriteriaList([is_stopped])
                self.model.generate(**inputs, **options, streamer=streamer, stopping_criteria=criteria)
            except Exception as error:
                errors.append(error)
                streamer.end()

        thread = threading.Thread(target=generate)
        thread.start()
        try:
            yield from streamer
        finally:
            stopped.set()
            thread.join()
        if errors:
            raise errors[0]


def load_upload(path: str) -> Image.Image:
    """A picture by its bytes: errors must not name where it lies on the server."""
    return load_image(Path(path).read_bytes())


class Upload(gr.Image):
    """Hands on where the file lies. Gradio's own opens it first, and shows why it can't with that place."""

    is_template = True  # for Gradio: it looks as its base

    def preprocess(self, payload) -> str | None:
        return None if payload is None else payload.path


def build_page(demo: Demo, examples: list[list[str]]) -> gr.Blocks:
    defaults = demo.processor.image_processor
    context = demo.model.config.text_config.max_position_embeddings
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
                    temperature = gr.Slider(0, 2, 0, step=0.1, label="Temperature (0: the likeliest word)")
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
    # Fonts of the visitor's own: nothing is fetched from elsewhere.
    theme = gr.themes.Default(font="sans-serif", font_mono="monospace")
    build_page(Demo(model), examples).launch(theme=theme, show_error=True, max_file_size=MAX_UPLOAD, ssr_mode=False)

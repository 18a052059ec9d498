"""
The command line: `mc-llava --help` lists its commands.

Each command imports what it needs when it runs: help texts, errors about options and `crops` don't wait for torch.
"""

import io
import json
import os
import reprlib
import sys
import time
import warnings
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from .evaluation import TASK_NAMES


if TYPE_CHECKING:
    from PIL import Image
    from transformers import TextStreamer

    from . import Crop, MCLlavaForConditionalGeneration, MCLlavaImageProcessor, MCLlavaProcessor
    from .engine import Reply

DEFAULT_MODEL = "tiny"

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Ask MC-LLaVA about pictures. Answers go to standard output, everything else to standard error.",
)

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Quantize = Literal["nf4", "int8", "int4"]
ModelOption = Annotated[str, typer.Option(help="A model folder, a Hub id, or tiny, which is bundled.")]
MaxCrops = Annotated[int | None, typer.Option(help="The most crops of an image, in addition to the whole image.")]
NumTokens = Annotated[int | None, typer.Option(help="The most visual tokens of an image.")]
MaxNewTokens = Annotated[int, typer.Option(help="The most tokens of an answer.", min=1)]
Zoom = Annotated[
    int | None,
    typer.Option(
        help="Rounds of looking closer where the question points; by default the value saved with the model.", min=0
    ),
]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, mps, ...; by default an accelerator if there is one.")]
DtypeOption = Annotated[
    Dtype,
    typer.Option(
        help="Precision of the weights; auto is bfloat16 on a CPU with native support for it, float32 on other CPUs, "
        "and the checkpoint's precision on an accelerator."
    ),
]
QuantizeOption = Annotated[Quantize | None, typer.Option(help="Store the language model's weights in fewer bits.")]
BatchSize = Annotated[int, typer.Option(help="How many questions to ask at once.", min=1)]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hub id.")]


def print_version(is_asked: bool):
    if is_asked:
        from .journal import versions

        print(versions()["mc-llava"] or "unknown, because mc-llava is not installed")
        raise typer.Exit


@app.callback()
def options(
    show_version: Annotated[
        bool, typer.Option("--version", callback=print_version, is_eager=True, help="Print the version.")
    ] = False,
):
    pass


@app.command()
def ask(
    images_and_question: Annotated[
        list[str],
        typer.Argument(metavar="IMAGE... QUESTION", help="Paths, URLs or - for standard input, then the question."),
    ],
    model: ModelOption = DEFAULT_MODEL,
    max_crops: MaxCrops = None,
    num_tokens: NumTokens = None,
    zoom: Zoom = None,
    show: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write a picture of where zoom looked, or of the crop grid.")
    ] = None,
    max_new_tokens: MaxNewTokens = 200,
    dtype: DtypeOption = "auto",
    device: Device = None,
    quantize: QuantizeOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one line of JSON instead of the answer.")] = False,
):
    """Ask a question about one or more pictures and stream the answer."""
    *sources, question = images_and_question
    if not sources:
        raise ValueError("got a question without an image: pass IMAGE... and then the question")
    if not question.strip():
        raise ValueError("the question is empty: pass IMAGE... and then the question")
    from .folders import find_model

    find_model(model)  # before torch is imported and pictures are read
    from .crop_grid import draw_looks
    from .engine import Engine, ask_about, check_prompts
    from .loading import load_config, load_model, load_processor

    if show is not None:
        if len(sources) > 1:
            raise ValueError(f"--show draws one picture, got {len(sources)}: ask about one, or leave it out")
        check_picture_file(show, sources[0])
    images = [read_image(source) for source in sources]
    processor = load_processor(model)
    knobs = processor.image_processor.fill_knobs(max_crops, num_tokens, zoom)
    plans, _, closer = zip(*(plan_picture(processor.image_processor, image, knobs) for image in images))
    counts = [sum(crop.num_tokens for crop in plan) for plan in plans]  # zoom moves tokens but adds none
    check_prompts(processor, load_config(model), [ask_about(images, question)], [counts])  # before weights are loaded
    for source, image in zip(sources, images):
        say_crops(source, image, processor.image_processor, knobs)
    network = load_model(model, dtype, device, quantize=quantize)
    kept = {} if knobs["zoom"] else {"prefix_bytes": 0}  # of one question, only zoom's drafts are used again
    engine = Engine(network, processor, max_new_tokens=max_new_tokens, **knobs, **kept)

    start = time.perf_counter()
    streamer = None if as_json else answer_streamer(processor)
    with crop_progress(engine.model, sum(map(len, plans)) + sum(closer)):
        encoded = engine.look([ask_about(images, question)]) if knobs["zoom"] else engine.encode(images, plans)
    (reply,) = engine.answer([ask_about(encoded, question)], streamer)
    if as_json:
        seconds = round(time.perf_counter() - start, 3)
        looked_at = {"looked_at": reply.looked_at} if knobs["zoom"] else {}
        answer = {**describe_reply(reply, model, network), **looked_at, "seconds": seconds}
        print(json.dumps(answer, ensure_ascii=False))
    say_if_cut(reply)
    if any(closer):
        say_closer(reply)
    if show is not None:  # last: the disk may be full
        write_picture(draw_looks(images[0], reply.images[0]), show)
        say(f"wrote {show}")


@app.command()
def chat(
    image: Annotated[str, typer.Argument(help="A path or a URL.")],
    model: ModelOption = DEFAULT_MODEL,
    max_crops: MaxCrops = None,
    num_tokens: NumTokens = None,
    zoom: Zoom = None,
    max_new_tokens: MaxNewTokens = 200,
    dtype: DtypeOption = "auto",
    device: Device = None,
    quantize: QuantizeOption = None,
):
    """
    Talk about a picture: one question per line. An empty line ends the chat.

    The picture is encoded once, or with --zoom looked at again for each question.
    Earlier turns are remembered without being computed again; /new forgets them.
    """
    from .folders import find_model

    find_model(model)  # before torch is imported and the picture is read
    from . import load_image
    from .engine import Engine, map_image_parts
    from .loading import load_model, load_processor

    picture = load_image(image)  # standard input is for questions
    processor = load_processor(model)
    knobs = processor.image_processor.fill_knobs(max_crops, num_tokens, zoom)
    plan, _, closer = plan_picture(processor.image_processor, picture, knobs)
    say_crops(image, picture, processor.image_processor, knobs)
    network = load_model(model, dtype, device, quantize=quantize)
    engine = Engine(network, processor, max_new_tokens=max_new_tokens, **knobs)
    sys.stdin.reconfigure(errors="surrogateescape")  # a line that is not UTF-8 is refused like any other bad question
    streamer = answer_streamer(processor)

    turns, encoded = [], picture if knobs["zoom"] else None
    while question := read_question():
        if question == "/new":
            turns = []
            continue
        content = [{"type": "text", "text": question}]
        try:
            engine.check([*turns, {"role": "user", "content": content}])
            if encoded is None:
                with crop_progress(engine.model, len(plan)):
                    (encoded,) = engine.encode([picture], [plan])
            if not turns:
                content.insert(0, {"type": "image", "image": encoded})
            asked = looked_at = [*turns, {"role": "user", "content": content}]
            if knobs["zoom"]:
                with crop_progress(engine.model, len(plan) + closer):
                    (looked,) = engine.look([asked])
                looked_at = map_image_parts(asked, lambda part, image=looked: {**part, "image": image})
            (reply,) = engine.answer([looked_at], streamer)
            say_if_cut(reply)
        except ValueError as error:  # what was said before is not lost
            say(f"error: {error}")
            if turns:
                say("Ask something else, or type /new to forget the earlier turns.")
            continue
        answer = reply.text
        for token in processor.special_tokens:  # messages must not hold any, wherever they come from
            answer = answer.replace(token, "")
        turns = [*asked, {"role": "assistant", "content": answer}]


@app.command()
def crops(
    image: Annotated[str, typer.Argument(help="A path, a URL, or - for standard input.")],
    output: Annotated[str, typer.Option("--output", "-o", help="The picture to write.")],
    model: Annotated[
        str | None, typer.Option(help="Take crop size and defaults from this model instead of the 3B.")
    ] = None,
    max_crops: MaxCrops = None,
    num_tokens: NumTokens = None,
):
    """Draw the crop grid over a picture. Loads no weights."""
    from . import plan_crops
    from .crop_grid import draw_crop_grid
    from .folders import read_plan_options

    check_picture_file(Path(output), image)
    options = read_plan_options(model)
    for name, value in (("max_crops", max_crops), ("num_tokens", num_tokens)):
        if value is not None:
            options[name] = value
    picture = read_image(image)
    plan = plan_crops(*picture.size, **options)
    write_picture(draw_crop_grid(picture, plan), Path(output))
    say(f"{output}: {describe(plan)}")


@app.command()
def estimate(
    image: Annotated[str, typer.Argument(help="A path, a URL, or - for standard input.")],
    model: Annotated[str | None, typer.Option(help="A model folder or a Hub id; by default the 3B.")] = None,
    max_crops: MaxCrops = None,
    num_tokens: NumTokens = None,
    zoom: Zoom = None,
    text_tokens: Annotated[int, typer.Option(help="Tokens of the prompt without the picture.")] = 27,
    max_new_tokens: MaxNewTokens = 200,
    dtype: DtypeOption = "auto",
):
    """Print what a question about a picture costs. Loads no weights."""
    import torch

    from . import MCLlavaConfig, MCLlavaImageProcessor
    from .estimate import estimate as estimate_cost
    from .folders import find_model
    from .loading import load_config, resolve_dtype

    if model is None:
        processor, config = MCLlavaImageProcessor(), MCLlavaConfig(dtype="float16")
    else:
        processor, config = MCLlavaImageProcessor.from_pretrained(find_model(model)), load_config(model)
    knobs = processor.fill_knobs(max_crops, num_tokens, zoom)
    picture = read_image(image)
    plan, looks, closer = plan_picture(processor, picture, knobs)
    precision = resolve_dtype(config, dtype)
    precision = torch.float32 if precision == "auto" else precision
    tokens = sum(crop.num_tokens for crop in plan)
    cost = estimate_cost(config, len(plan) + closer, tokens, text_tokens, max_new_tokens, precision, looks)
    for name, value in (
        ("crops", cost.crops),
        ("image tokens", cost.image_tokens),
        ("prompt tokens", cost.prompt_tokens),
        ("vision tower", in_units(cost.tower_flops, "FLOP", 1)),
        *([("looks", in_units(cost.look_flops, "FLOP", 1))] if looks else []),
        ("prefill", in_units(cost.prefill_flops, "FLOP", 1)),
        ("each new token", in_units(cost.flops_per_new_token, "FLOP", 1)),
        ("weights", in_units(cost.weight_bytes, "B", 2)),
        ("activations", in_units(cost.activation_bytes, "B", 2)),
        ("keys and values", in_units(cost.cache_bytes, "B", 2)),
    ):
        print(f"{name:16}{value:>12}")


@app.command()
def convert(
    source: Annotated[str, typer.Argument(help="A folder or a Hub id in the published layout.")],
    target: Annotated[str, typer.Argument(help="The folder to write, new or empty.")],
    revision: Revision = None,
    push_to_hub: Annotated[
        str | None, typer.Option(metavar="REPO", help="Also upload the folder to this Hub repository.")
    ] = None,
):
    """Convert a checkpoint to a folder that transformers' Auto classes load, code included."""
    from .convert import convert as convert_checkpoint

    say(f"wrote {convert_checkpoint(source, target, revision, push_to_hub)}")


@app.command()
def train(
    recipe: Annotated[str, typer.Argument(help="A YAML file, such as those in examples/.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[NAME=VALUE]...", help="Override values of the recipe.")
    ] = None,
    check: Annotated[bool, typer.Option("--check", help="Only validate the data and list broken rows.")] = False,
):
    """Run a recipe: fine-tune a model on data in LLaVA's format, or make tiny."""
    with extra("train"):
        from . import training
    values = training.read_recipe(recipe, overrides or ())
    kind = values.pop("kind", "finetune")
    if kind == "finetune":
        finetune = training.build_recipe(training.Recipe, values)
        if check:
            from .loading import load_processor

            rows = training.check(finetune, load_processor(finetune.model))
            listed = f", listed in {rows.report}" if rows.broken else ""
            say(f"good rows: {len(rows.good)}, broken rows: {len(rows.broken)}{listed}")
        else:
            with extra("train"):
                output = training.train(finetune)
            if training.is_main_process():
                say(f"wrote {output}")
    elif kind == "tiny":
        if check:
            raise ValueError("a recipe of kind tiny has no data to check: leave --check out")
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise ValueError("a recipe of kind tiny trains in one process: start it without torchrun or accelerate")
        with extra("train"):
            from .scenes import language_model
        say(f"wrote {language_model.train_tiny(training.build_recipe(language_model.TinyRecipe, values))}")
    else:
        # Written out, YAML that refers to itself again and again may take a terabyte.
        raise ValueError(f"a recipe's kind must be finetune or tiny, got {reprlib.repr(kind)[:80]}")


@app.command(name="eval")
def evaluate_tasks(
    model: ModelOption = DEFAULT_MODEL,
    tasks: Annotated[str, typer.Option(help=f"Comma-separated, of {', '.join(TASK_NAMES)}.")] = "",
    data: Annotated[
        list[str], typer.Option(metavar="TASK=SOURCE", help="Read a task from another Hub id, folder or file.")
    ] = [],  # noqa: B006
    output: Annotated[Path, typer.Option(help="The folder for results; an interrupted run resumes there.")] = Path(
        "results"
    ),
    max_crops: MaxCrops = None,
    num_tokens: NumTokens = None,
    zoom: Zoom = None,
    limit: Annotated[int | None, typer.Option(help="Ask only the first questions of each task.", min=1)] = None,
    batch_size: BatchSize = 8,
    max_new_tokens: Annotated[int, typer.Option(help="The most tokens of an answer.", min=1)] = 32,
    dtype: DtypeOption = "auto",
    device: Device = None,
    quantize: QuantizeOption = None,
    revision: Revision = None,
):
    """Score a model on benchmarks."""
    from .engine import Engine
    from .evaluation.results import score_table
    from .evaluation.running import evaluate
    from .evaluation.tasks import TASKS
    from .loading import load

    check_revision(model, revision)
    names, sources = read_tasks(tasks, data)
    for name in names:  # report unreadable data before loading the weights
        if not (output / f"{name}.json").exists():
            TASKS[name].read(sources.get(name, TASKS[name].data))
    network, processor, commit = load(model, revision, dtype, device, quantize)
    engine = Engine(network, processor, max_crops, num_tokens, batch_size, max_new_tokens, zoom, prefix_bytes=0)
    failed = asked = 0
    for name in names:
        found = evaluate(name, engine, output, model=model, revision=commit, data=sources.get(name), limit=limit)
        print(f"{name}, {len(found['questions'])} questions: {output / name}.json\n{score_table(found)}", flush=True)
        asked += len(found["questions"])
        for record in found["questions"]:
            if "failed" in record:
                say(f"failed and counted as wrong: {name} {record['id']}: {record['failed']}")
                failed += 1
    if failed == asked:
        raise ValueError(f"all of {asked} questions failed: see the reasons above")


@app.command(name="compare")
def compare_results(
    first: Annotated[Path, typer.Argument(metavar="A", help="A results file of mc-llava eval.")],
    second: Annotated[Path, typer.Argument(metavar="B", help="Another one, of the same task.")],
):
    """Compare two results: scores, whether their difference is significant, and the questions that changed."""
    from .evaluation.comparison import compare

    print(compare(first, second))


@app.command()
def study(
    model: ModelOption = DEFAULT_MODEL,
    part: Annotated[
        Literal["grid", "zoom", "photographs", "all"],
        typer.Option(help="The knobs of the grid, zoom against the grid, both on photographs, or all of these."),
    ] = "all",
    num_scenes: Annotated[int, typer.Option(help="Scenes to ask about, with a question of each kind.", min=1)] = 500,
    work: Annotated[Path, typer.Option(help="The folder for replies; an interrupted run resumes there.")] = Path(
        "results/study"
    ),
    output: Annotated[Path, typer.Option(help="The folder for the results and figures.")] = Path("results"),
    photographs: Annotated[
        str,
        typer.Option(
            metavar="FOLDER",
            help="The folder of eval's --data photographs=FOLDER; by default scikit-image's photographs.",
        ),
    ] = "",
):
    """Measure how crops, tokens and zoom affect accuracy on scenes, and print the tables of docs/tiny.md."""
    with extra("eval"):
        from .scenes import materials_of_test
        from .scenes import study as grid
        from .scenes import zoom_study as zoom
    if part in ("photographs", "all"):
        materials_of_test(photographs)  # says now what is missing, not hours later
    asked = grid.Study(model, work, num_scenes, photographs)
    if part in ("grid", "all"):
        print(grid.markdown(grid.run_study(asked, output)))
    if part in ("zoom", "all"):
        print(zoom.markdown(zoom.run_zoom_study(asked, output)))
    if part in ("photographs", "all"):
        print(grid.markdown(grid.run_study(asked, output, "photographs")))


@app.command(name="zoom-heads")
def zoom_heads(
    model: ModelOption = DEFAULT_MODEL,
    num_scenes: Annotated[int, typer.Option(help="How many drawn scenes to ask about.", min=10)] = 300,
    most: Annotated[int, typer.Option(help="Write at most this many heads.", min=1)] = 2,
    write: Annotated[bool, typer.Option("--write", help="Write the best heads into the model's config.json.")] = False,
    dtype: DtypeOption = "auto",
    device: Device = None,
):
    """
    Measure which attention heads look at what a question asks about, for --zoom.

    A head's score is how often the crop that it attends to most shows the thing
    asked about, in drawn scenes. Heads no better than chance are never written.
    """
    from .folders import find_model
    from .loading import load_model, load_processor
    from .zoom_heads import choose_heads, find_config, head_table, measure, write_heads

    if write and model == DEFAULT_MODEL:
        raise ValueError(f"the bundled {model} is not changed: pass --model FOLDER, or leave --write out")
    config = find_config(Path(find_model(model))) if write else None  # measuring the 3B takes hours
    measured = measure(load_model(model, dtype, device), load_processor(model), num_scenes)
    chosen = choose_heads(measured, most)
    print(head_table(measured, chosen))
    if not chosen:
        say(
            "no head is better than chance: zoom will use all heads of one layer, and compare their attention with "
            "that under a general question"
        )
    if config is not None:
        write_heads(config, chosen)
        say(f"wrote {len(chosen)} heads into {config}")


@app.command()
def batch(
    source: Annotated[str, typer.Argument(help="A .jsonl or .parquet file of rows, or a folder of images.")],
    output: Annotated[
        str, typer.Option("--output", "-o", help="The .jsonl file to write; an interrupted run resumes.")
    ],
    model: ModelOption = DEFAULT_MODEL,
    question: Annotated[str | None, typer.Option(help="The question for rows that have none.")] = None,
    max_crops: MaxCrops = None,
    num_tokens: NumTokens = None,
    zoom: Zoom = None,
    max_new_tokens: MaxNewTokens = 200,
    batch_size: BatchSize = 8,
    dtype: DtypeOption = "auto",
    device: Device = None,
    quantize: QuantizeOption = None,
    revision: Revision = None,
    ray: Annotated[
        bool, typer.Option("--ray", help="Run on the Ray cluster at RAY_ADDRESS, or start one here.")
    ] = False,
    workers: Annotated[
        int | None, typer.Option(help="Models on the Ray cluster; by default one per GPU.", min=1)
    ] = None,
):
    """
    Ask about many images: reads rows with a question and images, and writes a record per row with its answer.

    If a row fails, its record has the error instead.
    Run the same command again to resume an interrupted run.
    """
    from .batch import Job
    from .batch import run as run_job

    check_revision(model, revision)
    if workers and not ray:
        raise ValueError("--workers needs Ray: pass --ray too")
    job = Job(
        source,
        model,
        question=question,
        revision=revision,
        max_crops=max_crops,
        num_tokens=num_tokens,
        zoom=zoom,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        dtype=dtype,
        device=device,
        quantize=quantize,
    )
    was_there = Path(output).exists()
    rows, failed = run_job(job, output, use_ray=ray, workers=workers)
    done = f"{output} is complete, nothing was left to do" if was_there else f"wrote {output}"
    say(f"{done}: {rows} rows, {failed} of them with an error")
    if failed == rows:
        raise ValueError(f"all of {rows} rows failed: see their errors in {output}")


def read_image(source: str) -> "Image.Image":
    from . import load_image

    return load_image(sys.stdin.buffer.read() if source == "-" else source)


def plan_picture(
    processor: "MCLlavaImageProcessor", picture: "Image.Image", knobs: dict[str, int]
) -> "tuple[list[Crop], int, int]":
    """The crops of a picture, and how many rounds and further crops zoom may add."""
    from . import count_closer

    return processor.plan(*picture.size, **knobs), *count_closer(*picture.size, side=processor.size["height"], **knobs)


def say_crops(source: str, picture: "Image.Image", processor: "MCLlavaImageProcessor", knobs: dict[str, int]):
    from . import explain_no_zoom

    plan, rounds, closer = plan_picture(processor, picture, knobs)
    zoomed = f"; zoom adds up to {closer} crops where the question points (rounds: up to {rounds})" if rounds else ""
    if knobs["zoom"] and (reason := explain_no_zoom(*picture.size, side=processor.size["height"], **knobs)):
        zoomed = f"; zoom changes nothing here: {reason}"
    say(f"{source}: {picture.width} x {picture.height} pixels, {describe(plan)}{zoomed}")


def answer_streamer(processor: "MCLlavaProcessor") -> "TextStreamer":
    """Prints an answer to standard output while it is generated."""
    from transformers import TextStreamer

    return TextStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)


def describe_reply(reply: "Reply", model: str, network: "MCLlavaForConditionalGeneration") -> dict:
    """A reply and what it cost, for JSON."""
    return {
        "answer": reply.text,
        "model": model,
        "dtype": str(network.dtype).removeprefix("torch."),
        "crops": reply.crops,
        "image_tokens": reply.image_tokens,
        "prompt_tokens": reply.prompt_tokens,
        "new_tokens": reply.new_tokens,
        "finish_reason": reply.finish_reason,
    }


def say_if_cut(reply: "Reply"):
    if reply.finish_reason == "length":
        say(f"The answer was cut off by --max-new-tokens or the end of the context (new tokens: {reply.new_tokens}).")


def say_closer(reply: "Reply"):
    rounds = [crop["round"] for crop in reply.looked_at if crop["round"]]
    how = f"looked closer with {len(rounds)} crops (rounds: {max(rounds)})" if rounds else "did not look closer"
    say(f"zoom {how}")


def check_picture_file(path: Path, source: str):
    """Raise a ValueError if a picture can't be written to `path`, or would replace its source, before it is made."""
    from PIL import Image

    if not path.parent.is_dir() or path.is_dir():
        raise ValueError(f"the picture {path} can't be written: name a file in a folder that is there")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ValueError(f"the picture {path} can't be written for lack of permission: name a file in another folder")
    if source != "-" and os.path.exists(source) and path.exists() and path.samefile(source):
        raise ValueError(f"{path} is the picture to read, which must not be overwritten: name another file")
    try:  # some formats are only read, or hold no colors
        Image.new("RGB", (1, 1)).save(io.BytesIO(), Image.registered_extensions().get(path.suffix.lower()))
    except (ValueError, KeyError, OSError) as error:
        raise ValueError(
            f"the picture {path} can't be written in that format: end its name in .png or .jpg"
        ) from error


def write_picture(picture: "Image.Image", path: Path):
    """Save a picture. Raises a ValueError if its format can't hold it: WebP has at most 16383 pixels a side."""
    try:
        picture.save(path)
    except (ValueError, OSError) as error:
        if getattr(error, "errno", None) is not None:  # the disk's
            raise OSError(f"the picture {path} can't be written ({error}): name a file in another folder") from error
        size = f"{picture.width} x {picture.height} pixels"
        raise ValueError(
            f"the picture of {size} can't be written to {path} ({error}): end its name in .png"
        ) from error


def check_revision(model: str, revision: str | None):
    from .folders import find_model

    if revision and Path(find_model(model)).is_dir():
        raise ValueError(f"the folder {model} has no revisions: leave --revision {revision} out")


def read_tasks(tasks: str, data: list[str]) -> tuple[list[str], dict[str, str]]:
    """The names of the tasks to run, and the sources that replace the usual data of some. Raises ValueError."""
    names = [name.strip() for name in tasks.split(",") if name.strip()]
    if not names:
        raise ValueError(f"no task was named: pass --tasks with some of {', '.join(TASK_NAMES)}")
    if len(set(names)) < len(names):
        raise ValueError(f"--tasks names a task twice: {tasks}")
    for name in names:
        if name not in TASK_NAMES:
            raise ValueError(f"there is no task {name!r}: choose from {', '.join(TASK_NAMES)}")
    sources = {}
    for entry in data:
        name, _, source = entry.partition("=")
        if name not in names or not source:
            raise ValueError(f"--data must be TASK=SOURCE with one of the tasks {', '.join(names)}, got {entry!r}")
        sources[name] = source
    return names, sources


def read_question() -> str:
    """A line of standard input, stripped; empty at the end of the input."""
    if sys.stdin.isatty():
        print("> ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip()


def describe(plan: "list[Crop]") -> str:
    """A line about the crops of a plan."""
    tokens = sum(crop.num_tokens for crop in plan)
    grid = f" and a grid of {len(plan) - 1}" if len(plan) > 1 else ""
    return f"crops: {len(plan)} (the whole image{grid}), tokens: {tokens}"


def in_units(value: float, unit: str, digits: int) -> str:
    """A number with the prefix giga, or mega where a small model's would be rounded to nearly nothing."""
    prefix, scale = ("G", 1e9) if value >= 1e8 else ("M", 1e6)
    return f"{value / scale:,.{digits}f} {prefix}{unit}"


@contextmanager
def extra(name: str):
    """Raise a ValueError that names the extra to install if an optional package is missing."""
    try:
        yield
    except ImportError as error:
        if error.name is None or error.name.startswith(("mc_llava", "torch", "transformers")):
            raise
        raise ValueError(f'the package {error.name} is missing: pip install "mc-llava[{name}]"') from error


def say(message: str):
    print(message, file=sys.stderr, flush=True)


@contextmanager
def crop_progress(model: "MCLlavaForConditionalGeneration", crops: int):
    """A progress bar over the blocks of the vision tower, which on a CPU take most of the time."""
    from tqdm import tqdm

    layers = model.model.vision_tower.encoder.layers
    bar = None

    def advance(layer, inputs, output):
        nonlocal bar
        if bar is None:  # only now: an error may come before the first crop
            bar = tqdm(
                total=crops * len(layers),
                desc=f"Encoding crops: {crops}",
                bar_format="{desc} {percentage:3.0f}%|{bar}| {elapsed}<{remaining}",
            )
        bar.update(len(output))

    hooks = [layer.register_forward_hook(advance) for layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        if bar is not None and not bar.disable:
            bar.total = bar.n  # zoom may have found less to look at, or crops that were known
            bar.set_description_str(f"Encoding crops: {bar.n // len(layers)}")
            bar.close()


def main():
    sys.stdout.reconfigure(errors="backslashreplace")  # names and rows may hold bytes that are not UTF-8
    # Pillow's warning adds nothing to our error. `open_image` can't hide it: pictures are read in threads, which share
    # the filters of warnings.
    warnings.filterwarnings("ignore", ".*decompression bomb")
    try:
        app()
    except (ValueError, OSError, RuntimeError) as error:
        say(f"error: {error}")
        sys.exit(1)

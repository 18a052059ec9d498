"""`tiny`, the bundled checkpoint, compared with what docs/tiny.md says about it."""

import json
import re

import make_tables
import processes
import pytest
from helpers import EXAMPLES, ROOT
from PIL import Image
from transformers import AutoModel, AutoProcessor

from mc_llava import GREEDY, scenes
from mc_llava.engine import Engine, ask_about
from mc_llava.folders import TINY
from mc_llava.loading import load
from mc_llava.scenes.study import MAX_NEW_TOKENS, NAMES


pytestmark = pytest.mark.slow


STUDY = json.loads((ROOT / "docs" / "study.json").read_text())
NUM_ASKED = 50  # of each kind


@pytest.fixture(scope="module")
def replies() -> dict[str, list[bool]]:
    """Kind -> whether the answers to the study's first questions are right, with `tiny`'s saved knobs."""
    model, processor, revision = load("tiny")
    assert revision == STUDY["revision"], "docs/study.json was made with other weights: run mc-llava study again"
    engine = Engine(model, processor, max_new_tokens=MAX_NEW_TOKENS)
    assert engine.knobs == {"max_crops": 32, "num_tokens": 128, "zoom": 0}
    right = {kind: [] for kind in scenes.KINDS}
    for seed in range(NUM_ASKED):
        encoded = engine.encode([scenes.draw_scene(scenes.make_scene(seed, "test"))])
        questions = [scenes.benchmark_question(seed, kind) for kind in scenes.KINDS]
        found = engine.answer([ask_about(encoded, question.text) for question in questions], **GREEDY)
        for question, reply in zip(questions, found):
            right[question.kind].append(scenes.is_correct(question.key, reply.text))
    return right


@pytest.mark.parametrize("kind", scenes.KINDS)
def test_it_sees_what_the_study_says(replies, kind):
    (row,) = [row for row in STUDY["settings"] if (row["zoom"], row["max_crops"], row["num_tokens"]) == (0, 32, 128)]
    score = 100 * sum(replies[kind]) / NUM_ASKED
    assert score >= row["accuracy"][kind]["score"] - 10, f"{NAMES[kind]}: {score}"


@pytest.mark.parametrize("name", make_tables.RESULTS)
def test_the_results_are_of_one_model_and_enough_questions(name):
    found = json.loads((ROOT / "docs" / f"{name}.json").read_text())
    assert found["revision"] == STUDY["revision"] and found["scenes"] == 500


@pytest.mark.parametrize("page", make_tables.PAGES)
def test_the_pages_have_the_studys_tables(page):
    text = (ROOT / page).read_text()
    assert make_tables.renewed(page, text) == text
    changed = re.sub(r"(\| \d+\.\d) \|$", r"\g<1>9 |", text, flags=re.MULTILINE)  # every last cell
    assert changed != text and make_tables.renewed(page, changed) == text


def test_no_table_is_missing():
    text = (ROOT / "docs" / "tiny.md").read_text()
    for table in make_tables.all_tables():
        assert "\n".join(table) in text
        with pytest.raises(ValueError, match="no table with the head"):
            make_tables.renewed("docs/tiny.md", text.replace("\n".join(table), ""))
    with pytest.raises(ValueError, match="no table with the head"):
        make_tables.renewed("README.md", "no tables")


def test_a_row_that_the_study_lacks_is_an_error():
    table = ["| a | b | c | d |", "|---|---|---|---|", "| 1 | 2 | 3 | x |"]
    with pytest.raises(ValueError, match="no row for the knobs 1 2 4"):
        make_tables.rows_of([*table, "| 1 | 2 | 4 | y |"], table)


def test_it_is_small():
    assert sum(path.stat().st_size for path in TINY.iterdir()) <= 12e6
    assert not list(TINY.glob("*.py"))


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example["question"])
def test_the_examples_are_answered_through_the_auto_classes_and_need_crops(example):
    options = {"subfolder": "tiny", "trust_remote_code": True}
    model, processor = AutoModel.from_pretrained(ROOT, **options), AutoProcessor.from_pretrained(ROOT, **options)
    image = Image.open(ROOT / "examples" / example["image"])
    assert max(image.size) >= 1500

    def ask(**knobs) -> str:
        content = [{"type": "image", "image": image}, {"type": "text", "text": example["question"]}]
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs=knobs,
        )
        output = model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS)
        return processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)

    # The example that make_figures.py draws: a grid of 32 crops mistakes it.
    assert scenes.is_correct(example["key"], ask(**({"max_crops": 18, "zoom": 2} if "box" in example else {})))
    # One of two directions, "yes" and "there is none" may be right without seeing anything.
    if example["kind"] not in ("position", "existence", "absent"):
        assert not scenes.is_correct(example["key"], ask(max_crops=0))


def test_the_demo_asks_what_is_answered():
    demo = (ROOT / "scripts" / "demo.sh").read_text()
    asked = re.search(r'mc-llava" ask "\$root/examples/(\S+)" "(.*)"', demo).groups()
    assert asked in [(example["image"], example["question"]) for example in EXAMPLES]


def test_the_cards_snippet_runs_on_what_convert_makes_of_it(tmp_path, capsys):
    processes.run("-m", "mc_llava", "convert", "tiny", tmp_path / "model", cwd=tmp_path).check_returncode()
    example = EXAMPLES[0]
    section = (ROOT / "docs" / "usage.md").read_text().split("## The card's snippet\n")[1]
    snippet = re.search(r"```python\n(.*?)```", section, flags=re.DOTALL)[1]
    for published, ours in (
        ("./MC-LLaVA-3b", str(tmp_path / "model")),
        ("examples/coffee.jpg", str(ROOT / "examples" / example["image"])),
        ("What is on the table?", example["question"]),
        ('.to("cuda")', ""),
    ):
        assert published in snippet
        snippet = snippet.replace(published, ours)
    exec(snippet, {})
    answer = capsys.readouterr().out.strip().removesuffix("<|im_end|>")
    assert scenes.is_correct(example["key"], answer)

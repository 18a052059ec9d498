"""The model in lmms-eval, by its command line, on a local task. Its exit code is always 0: its results file counts."""

import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import ROOT, picture, prompt

from mc_llava import GREEDY, MCLlavaForConditionalGeneration, MCLlavaProcessor
from mc_llava.engine import Engine, ask_about
from mc_llava.evaluation.running import evaluate
from mc_llava.evaluation.tasks import SHORT


pytestmark = pytest.mark.slow


pytest.importorskip("lmms_eval", reason="lmms-eval is not here: see scripts/test.sh")
datasets = pytest.importorskip("datasets", reason='the package datasets is not here: pip install "mc-llava[eval]"')
if "mc_llava" not in importlib.metadata.entry_points(group="lmms_eval.models").names:
    pytest.skip("the package is not installed, so it has no entry points: pip install .", allow_module_level=True)

KNOBS = {"max_crops": 2, "num_tokens": 30}
TASK = """\
task: local
dataset_path: parquet
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: generate_until
doc_to_visual: !function utils.images
doc_to_text: !function utils.question
doc_to_target: answer
generation_kwargs:
  max_new_tokens: 4
  temperature: 0
  until: ["\\n\\n"]
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
"""
UTILS = """\
def images(doc):
    return [doc["image"]]


def question(doc, lmms_eval_specific_kwargs=None):
    return doc["question"]
"""


@pytest.fixture(scope="module")
def model(converted) -> MCLlavaForConditionalGeneration:
    return MCLlavaForConditionalGeneration.from_pretrained(converted, dtype="float32")


@pytest.fixture(scope="module")
def rows(model, processor) -> list[dict]:
    """Three questions. For the first two, the expected answers are the model's own without lmms-eval."""
    found = []
    for index, size in enumerate(((700, 500), (200, 300), (640, 640))):
        image = picture(*size, seed=index)
        question = f"What is in picture {index}?"
        inputs = processor(text=prompt(question), images=image, **KNOBS)
        output = model.generate(**inputs, max_new_tokens=4, do_sample=False)
        answer = processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
        found.append({"image": image, "question": question, "answer": answer if index < 2 else "another"})
    return found


@pytest.fixture(scope="module")
def processor(converted) -> MCLlavaProcessor:
    return MCLlavaProcessor.from_pretrained(converted)


# Its own task, except for the location of the data.
TEXTVQA = """\
task: local_textvqa
include: {tasks}/textvqa/textvqa_val.yaml
dataset_path: parquet
dataset_kwargs:
  data_files:
    validation: {data}
"""


@pytest.fixture(scope="module")
def textvqa(rows, model, processor, tmp_path_factory) -> Path:
    """A file in TextVQA's format; two people say what the model says to the first question, one to the second."""
    path = tmp_path_factory.mktemp("textvqa") / "rows.parquet"
    engine = Engine(model, processor, **KNOBS, max_new_tokens=32)
    said = [
        reply.text
        for reply in engine.answer([ask_about([row["image"]], row["question"] + SHORT) for row in rows], **GREEDY)
    ]
    entries = [
        {
            "question_id": index,
            "image_id": str(index),
            "question": row["question"],
            "image": row["image"],
            "answers": [said[index]] * (2 - index) + [f"answer {i}" for i in range(8 + index)],
            "ocr_tokens": [""],
        }
        for index, row in enumerate(rows)
    ]
    datasets.Dataset.from_list(entries).cast_column("image", datasets.Image()).to_parquet(path)
    return path


@pytest.fixture(scope="module")
def output(converted, rows, textvqa, tmp_path_factory) -> Path:
    """What the command writes for both tasks."""
    import lmms_eval.tasks

    folder = tmp_path_factory.mktemp("lmms_eval")
    tasks, output = folder / "tasks", folder / "output"
    tasks.mkdir()
    dataset = datasets.Dataset.from_list(rows).cast_column("image", datasets.Image())
    dataset.to_parquet(folder / "rows.parquet")
    (tasks / "local.yaml").write_text(TASK.format(data=folder / "rows.parquet"))
    (tasks / "utils.py").write_text(UTILS)
    theirs = Path(lmms_eval.tasks.__file__).parent
    (tasks / "local_textvqa.yaml").write_text(TEXTVQA.format(tasks=theirs, data=textvqa))
    arguments = ",".join(f"{name}={value}" for name, value in KNOBS.items())
    command = [sys.executable, "-m", "lmms_eval", "--model", "mc_llava", "--batch_size", "2", "--log_samples"]
    command += ["--model_args", f"pretrained={converted},dtype=float32,device=cpu,{arguments}"]
    command += ["--tasks", "local,local_textvqa", "--include_path", str(tasks), "--output_path", str(output)]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert len(list(output.rglob("*_results.json"))) == 1, process.stdout[-3000:] + process.stderr[-3000:]
    return output


def results_of(output: Path, task: str) -> tuple[float, list[str]]:
    """The score and the replies."""
    (results,) = output.rglob("*_results.json")
    (samples,) = output.rglob(f"*_samples_{task}.jsonl")
    replies = ["".join(json.loads(line)["filtered_resps"]) for line in samples.read_text().splitlines()]
    return json.loads(results.read_text())["results"][task]["exact_match,none"], replies


def test_the_command_line(output, rows):
    score, replies = results_of(output, "local")
    assert replies[:2] == [row["answer"] for row in rows[:2]]
    assert score == pytest.approx(2 / 3)


def test_textvqa_is_the_same_in_both(output, textvqa, model, processor, tmp_path):
    score, replies = results_of(output, "local_textvqa")
    engine = Engine(model, processor, **KNOBS, batch_size=2, max_new_tokens=32)
    ours = evaluate("textvqa", engine, tmp_path, model="", revision="", data=str(textvqa))
    assert [record["reply"] for record in ours["questions"]] == replies
    assert ours["scores"][0]["score"] == pytest.approx(100 * score, abs=0.01) and score == pytest.approx(0.3)


class TestRequests:
    """What a task can ask for beyond the above, without the command line."""

    @pytest.fixture(scope="class")
    @classmethod
    def plugin(cls, converted, rows):
        from mc_llava.evaluation.lmms_eval_model import MCLlavaForLmmsEval

        arguments = ",".join(f"{name}={value}" for name, value in KNOBS.items())
        plugin = MCLlavaForLmmsEval.create_from_arg_string(
            f"pretrained={converted},dtype=float32,device=cpu,{arguments}", {"batch_size": "2", "device": None}
        )
        plugin.task_dict = {"task": {"test": rows}}
        return plugin

    def request(self, kind: str, doc_id: int, question: str, second, images=lambda doc: [doc["image"]]):
        from lmms_eval.api.instance import Instance

        arguments = (question, second, images, doc_id, "task", "test")
        return Instance(kind, arguments, 0, metadata={"task": "task", "doc_id": doc_id, "repeats": 1})

    def test_likelihoods_are_losses(self, plugin, model, processor, rows):
        expected, requests = [], []
        for index, row in enumerate(rows):
            for color in ("red", "dark green", "blue"):
                inputs = processor(text=prompt(row["question"]) + color + "<|im_end|>", images=row["image"], **KNOBS)
                labels = inputs["input_ids"].clone()
                labels[:, : -len(processor.tokenizer(color + "<|im_end|>")["input_ids"])] = -100
                with torch.no_grad():
                    expected.append(float(model(**inputs, labels=labels).loss))
                requests.append(self.request("loglikelihood", index, row["question"], f" {color}"))
        found = plugin.loglikelihood(requests)
        assert [loss for loss, _ in found] == pytest.approx(expected, abs=1e-4)
        assert not any(is_greedy for _, is_greedy in found), "gibberish is likelier than any color"

    def test_what_the_model_says_is_greedy(self, plugin, model, processor, rows):
        question = rows[0]["question"]
        inputs = processor(text=prompt(question), images=rows[0]["image"], **KNOBS)
        forced = model.generate(**inputs, max_new_tokens=1, do_sample=False)[0, -1:]
        request = self.request("loglikelihood", 0, question, processor.decode(forced))
        ((_, is_greedy),) = plugin.loglikelihood([request])
        inputs = processor(text=prompt(question) + processor.decode(forced), images=rows[0]["image"], **KNOBS)
        with torch.no_grad():
            follows = int(model(**inputs).logits[0, -1].argmax())
        assert is_greedy == (follows == processor.tokenizer.eos_token_id)

    def test_options_until_several_images_and_none(self, plugin, model, processor, rows):
        first, second = (row["image"] for row in rows[:2])
        asked = (
            ("Which?", {"max_new_tokens": 6}, lambda doc: [first, second]),
            ("What?", {"max_new_tokens": 3, "temperature": 0, "top_p": 1.0, "image_aspect_ratio": "pad"}, None),
            ("Who?", {"max_new_tokens": 6, "temperature": 0, "do_sample": True}, None),
            ("Why?", {"max_new_tokens": 6}, lambda doc: [first]),
        )
        replies = plugin.generate_until([self.request("generate_until", 0, *request) for request in asked])
        for (question, options, images), reply in zip(asked, replies):
            images = images(None) if images else []
            inputs = processor(text=[prompt(question, len(images))], images=[images], **KNOBS)
            output = model.generate(**inputs, max_new_tokens=options["max_new_tokens"], do_sample=False)
            expected = processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
            assert reply == expected
        end = replies[0][1:3]
        (cut,) = plugin.generate_until(
            [self.request("generate_until", 0, "Which?", {"max_new_tokens": 6, "until": [end]}, asked[0][2])]
        )
        assert cut == replies[0].split(end)[0].strip() != replies[0]

    def test_a_question_that_can_not_be_asked_gets_an_empty_reply(self, plugin, capsys):
        asked = ("What?", "What?<|im_end|>")
        replies = plugin.generate_until(
            [self.request("generate_until", 0, question, {"max_new_tokens": 4}) for question in asked]
        )
        assert replies[0] and replies[1] == ""
        assert "failed, the reply is empty" in capsys.readouterr().err

    def test_paths_are_not_followed(self, plugin):
        request = self.request("loglikelihood", 0, "What?", "red", lambda doc: [str(ROOT / "examples" / "coffee.jpg")])
        with pytest.raises(ValueError, match="instead of an image"):
            plugin.loglikelihood([request])


def test_bad_arguments():
    from mc_llava.evaluation.lmms_eval_model import MCLlavaForLmmsEval

    with pytest.raises(ValueError, match="batch_size must be a number, got 'auto'"):
        MCLlavaForLmmsEval(batch_size="auto")
    with pytest.raises(TypeError, match="max_crop"):
        MCLlavaForLmmsEval.create_from_arg_string("pretrained=x,max_crop=3")

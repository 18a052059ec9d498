"""Metrics, compared with cases computed by hand and, if lmms-eval is installed, with its copies."""

import copy
import random
import string

import numpy as np
import pytest

from mc_llava.evaluation import metrics
from mc_llava.evaluation.metrics import (
    bootstrap_interval,
    find_letter,
    gqa_accuracy,
    mcnemar,
    normalize_answer,
    textvqa_accuracy,
    vqav2_accuracy,
    wilson_interval,
)


@pytest.mark.parametrize(
    "text, normalized",
    [
        ("Yes.", "yes"),
        ("The red car", "red car"),
        ("two", "2"),
        ("none", "0"),
        ("dont know", "don't know"),
        ("couldnt've", "couldn't've"),
        ("1,000", "1000"),
        ("3.5", "3.5"),
        ("no. 5", "no 5"),
        ("end.", "end"),
        ("5.", "5"),  # also after a digit: the script's look-behind is misspelled
        ("t-shirt", "t shirt"),  # a mark inside of a word becomes a space ...
        ("red - green", "red green"),  # ... and goes where it touches one
        ("woman's", "woman 's"),
        ("a\nb\tc", "b c"),
        ("what?!", "what"),
        ("10:30", "10:30"),
        ("", ""),
        ("the", ""),
        ("." * 40, "." * 8),  # 32 replacements and no more: the script passes a flag in place of a count
    ],
)
def test_normalize_answer(text, normalized):
    assert normalize_answer(text) == normalized


@pytest.mark.parametrize("matches, accuracy", [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (10, 1)])
def test_vqa_accuracy_leaves_one_answer_out(matches, accuracy):
    # By hand, for 3: leaving out one of the 3 gives 2/3, one of the other 7 gives 1: (3 * 2/3 + 7) / 10 = 0.9
    answers = ["cat"] * matches + [f"dog {i}" for i in range(10 - matches)]
    assert textvqa_accuracy("Cat.", answers) == pytest.approx(accuracy)
    assert vqav2_accuracy("cat", answers) == pytest.approx(accuracy)


def test_vqav2_normalizes_only_where_people_differ():
    agreed, differing = ["t-shirt"] * 10, ["t-shirt"] * 9 + ["shirt"]
    assert vqav2_accuracy("t-shirt", agreed) == 1
    assert vqav2_accuracy("t shirt", agreed) == 0
    assert vqav2_accuracy("The T shirt", differing) == 1
    assert vqav2_accuracy("Yes", ["yes"] * 10) == 0, "as vqaEval.py; the task hands in lower case"
    assert vqav2_accuracy("yes\n", ["yes"] * 10) == 1
    assert vqav2_accuracy("two", ["2"] * 9 + ["3"]) == 1
    assert textvqa_accuracy("t shirt", agreed) == 1


def test_unanswerable_is_an_answer_like_others():
    answers = ["unanswerable"] * 8 + ["blue"] * 2
    assert textvqa_accuracy("Unanswerable", answers) == 1
    assert textvqa_accuracy("blue", answers) == pytest.approx(0.6)


def test_accuracy_without_answers_is_refused():
    for accuracy in (textvqa_accuracy, vqav2_accuracy):
        for answers in ([], [None] * 10, ["yes"] * 9 + [None], "yes", 5, {"answer": ["yes"]}):
            with pytest.raises(ValueError, match="answers must be the people's"):
                accuracy("yes", answers)
    with pytest.raises(ValueError, match="must be a text, got None"):
        gqa_accuracy("yes", None)


def test_gqa_accuracy():
    assert gqa_accuracy("Yes.", "yes") == gqa_accuracy(" bed \n", "bed") == 1
    assert gqa_accuracy("t shirt", "t-shirt") == gqa_accuracy("a bed", "bed") == gqa_accuracy("", "bed") == 0


@pytest.mark.parametrize(
    "reply, letter",
    [(reply, "B") for reply in ("B", "(B)", "B.", " B) red", "B: red", "Answer: B", "The answer is (B).", "(B) red")]
    + [(reply, "B") for reply in ("b", "(b)", "[B]", "**B**", "Answer: **B**", "**Answer:** B", "ANSWER: B")]
    + [
        (reply, "B")
        for reply in ("B\nbecause", "Option A is wrong, the answer is B", "The answer is B. A red car is seen.")
    ]
    + [(reply, None) for reply in ("Blue", "", "E", "A cat", "I see B or C", "red", "The answer is A red car")]
    + [(reply, None) for reply in ("A, B or C", "The answer is A or B", "Answer: A. Answer: B", "It isn't a, 'b'")],
)
def test_find_letter(reply, letter):
    assert find_letter(reply, "ABCD") == letter


def test_wilson_interval():
    # 17 of 30, with z = 1.96: center (17 + 1.9208) / 33.8416, margin 1.96 / 33.8416 * sqrt(17 * 13 / 30 + 0.9604)
    low, high = wilson_interval(17, 30)
    assert (low, high) == pytest.approx((0.392045, 0.726152), abs=1e-4)
    assert wilson_interval(0, 10)[0] == 0 and wilson_interval(10, 10)[1] == pytest.approx(1)
    assert wilson_interval(0, 10)[1] == pytest.approx(0.277533, abs=1e-5)  # z^2 / (n + z^2)
    for successes, count in ((3, 2), (-1, 2), (0, 0)):
        with pytest.raises(ValueError, match="successes must lie between"):
            wilson_interval(successes, count)


def test_wilson_interval_covers_as_often_as_it_says():
    rng = np.random.default_rng(0)
    covered = []
    for successes in rng.binomial(60, 0.8, size=2000):
        low, high = wilson_interval(int(successes), 60)
        covered.append(low <= 0.8 <= high)
    assert np.mean(covered) == pytest.approx(0.95, abs=0.02)


def test_bootstrap_interval_is_that_of_drawn_questions():
    scores = np.random.default_rng(1).choice([0, 0.3, 0.6, 0.9, 1], size=200)
    drawn = np.random.default_rng(2).choice(scores, size=(10_000, 200)).mean(axis=1)
    assert bootstrap_interval(scores) == pytest.approx(np.quantile(drawn, (0.025, 0.975)), abs=0.005)
    assert bootstrap_interval(scores) == bootstrap_interval(scores[::-1])
    assert bootstrap_interval([0.3] * 5) == pytest.approx((0.3, 0.3))
    with pytest.raises(ValueError, match="scores are empty"):
        bootstrap_interval([])


def test_mcnemar():
    assert mcnemar(10, 2) == mcnemar(2, 10) == pytest.approx(2 * (1 + 12 + 66) / 2**12)
    assert mcnemar(0, 5) == pytest.approx(2 / 32)
    assert mcnemar(4, 4) == mcnemar(0, 0) == 1
    assert 0 <= mcnemar(20_000, 30_000) < 1e-300
    with pytest.raises(ValueError, match="at least 0"):
        mcnemar(-1, 2)


class TestAgainstLmmsEval:
    """Its functions modify their arguments, so each call gets a copy."""

    @pytest.fixture(autouse=True)
    def lmms_eval(self):
        pytest.importorskip("lmms_eval", reason="lmms-eval is not here: see scripts/test.sh")

    @pytest.fixture
    def texts(self) -> list[str]:
        rng = random.Random(0)
        words = "the a An cat's dont 1,000 3.5 Two none T-shirt x/y (ok) isnt wouldn'tve ten. , ? ! yes\n \t é"
        words = words.split(" ")
        texts = [" ".join(rng.choices(words, k=rng.randint(1, 5))) for _ in range(2000)]
        texts += ["".join(rng.choices(string.printable, k=rng.randint(1, 12))) for _ in range(2000)]
        return texts + [word for pair in metrics.CONTRACTIONS.items() for word in pair]

    def test_normalization(self, texts):
        from lmms_eval.tasks._task_utils.vqa_eval_metric import EvalAIAnswerProcessor

        oracle = EvalAIAnswerProcessor()
        known = {key: value for key, value in oracle.CONTRACTIONS.items() if key != value and key.islower()}
        assert known == metrics.CONTRACTIONS
        for text in texts:
            assert normalize_answer(text) == oracle(text), text

    def test_accuracies(self, texts):
        from lmms_eval.tasks.textvqa.utils import textvqa_process_results
        from lmms_eval.tasks.vizwiz_vqa.utils import vizwiz_vqa_process_results
        from lmms_eval.tasks.vqav2.utils import vqav2_process_results

        rng = random.Random(1)
        seen = set()
        for _ in range(1000):
            pool = rng.choices(texts, k=3)
            answers, reply = rng.choices(pool, k=10), rng.choice(pool)
            doc = {"question_id": 0, "answers": answers}
            for oracle in (textvqa_process_results, vizwiz_vqa_process_results):
                expected = oracle(copy.deepcopy(doc), [reply])["exact_match"]
                assert textvqa_accuracy(reply, answers) == pytest.approx(expected)
            seen.add(expected)
            if len({answer.strip() for answer in answers}) > 1:  # where all agree, lmms-eval differs from vqaEval.py
                doc = {"question_id": 0, "answers": [{"answer": a, "answer_id": i} for i, a in enumerate(answers)]}
                expected = vqav2_process_results(doc, [reply])["exact_match"]
                assert vqav2_accuracy(reply, answers) == pytest.approx(expected)
        assert len(seen) >= 4

    def test_gqa(self):
        """lmms-eval's task ignores case and all punctuation, GQA's script only case and a final period."""
        from lmms_eval.api.metrics import exact_match_hf_evaluate

        def oracle(reply, answer):
            options = {"ignore_case": True, "ignore_punctuation": True}
            return exact_match_hf_evaluate(predictions=[reply], references=[answer], **options)["exact_match"]

        for reply in ("yes", "Yes", "YES.", "no", "yes sir", "", "bed"):
            for answer in ("yes", "bed"):
                assert gqa_accuracy(reply, answer) == oracle(reply, answer)
        assert (oracle("tshirt", "t-shirt"), gqa_accuracy("tshirt", "t-shirt")) == (1, 0)

    def test_letters(self):
        from lmms_eval.tasks.vstar_bench.utils import extract_answer_letter

        for reply in ("A", "(B)", "C.", "D)", "The answer is C", "B. rubber", "(A) rubber"):
            assert find_letter(reply, "ABCD") == extract_answer_letter(reply)
        for reply, theirs, ours in (("Blue", "B", None), ("Answer: C", "A", "C")):
            assert (extract_answer_letter(reply), find_letter(reply, "ABCD")) == (theirs, ours)

"""
The benchmarks' metrics, as their own scripts compute them, and the uncertainty of their results.

Pure functions of strings and numbers; nothing here depends on a model or a data set. Whose script each follows:

    normalize_answer   EvalAIAnswerProcessor in mmf (facebookresearch/mmf, pythia/tasks/processors.py), which LLaVA
                       (llava/eval/m4c_evaluator.py) and lmms-eval carry copies of
    textvqa_accuracy   TextVQAAccuracyEvaluator in LLaVA's m4c_evaluator.py; VizWiz in lmms-eval is scored the same way
    vqav2_accuracy     vqaEval.py in GT-Vision-Lab/VQA, PythonEvaluationTools/vqaEvaluation
    gqa_accuracy       eval.py of GQA, on replies as LLaVA's convert_gqa_for_eval.py prepares them
"""

import math
import re
from collections.abc import Sequence

import numpy as np


# The scripts spell them out as a table; each of its keys is one of these words with one apostrophe left out.
CONTRACTED = """
    'ow's'at 'twas ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't
    haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't mightn't've must've
    mustn't needn't not've o'clock oughtn't shan't she'd've should've shouldn't shouldn't've somebody'd've
    somebody'll somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll
    that's there'd there'd've there're there's they'd they'd've they'll they're they've wasn't we'd've we've weren't
    what'll what're what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're
    why's won't would've wouldn't wouldn't've y'all y'all'd've y'all'll you'd you'd've you'll you're you've
"""
CONTRACTIONS = {
    word[:place] + word[place + 1 :]: word
    for word in CONTRACTED.split()
    for place, character in enumerate(word)
    if character == "'"
} | {"somebody'd": "somebodyd"}  # the other way round, in all copies
NUMBERS = {"none": "0"} | {
    word: str(number) for number, word in enumerate("zero one two three four five six seven eight nine ten".split())
}
ARTICLES = {"a", "an", "the"}
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
PERIOD = re.compile(r"(?!<=\d)\.(?!\d)")  # the scripts' own misspelling of (?<!\d), which results depend on
COMMA_IN_NUMBER = re.compile(r"\d,+\d")
MAX_PERIODS = int(re.UNICODE)  # the scripts pass this flag where `sub` takes the number of replacements


def normalize_answer(text: str) -> str:
    """
    An answer as the VQA scripts compare it: lower case, no punctuation, articles or number words.

    >>> normalize_answer("The two dogs' toys, isnt it?")
    "2 dogs' toys isn't it"
    """
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    text = text.replace("\n", " ").replace("\t", " ").strip()
    return _normalize_words(_remove_punctuation(text))


def _remove_punctuation(text: str) -> str:
    """Marks that touch a space are removed, all marks if a number has a comma; others become a space."""
    has_number = COMMA_IN_NUMBER.search(text) is not None
    kept = text
    for mark in PUNCTUATION:
        touches_space = f"{mark} " in text or f" {mark}" in text
        kept = kept.replace(mark, "" if touches_space or has_number else " ")
    return PERIOD.sub("", kept, count=MAX_PERIODS)


def _normalize_words(text: str) -> str:
    words = (NUMBERS.get(word, word) for word in text.lower().split())
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def _leave_one_out(reply: str, answers: Sequence[str]) -> float:
    """
    The mean of min(matches / 3, 1) over all ways to leave one of the answers out.

    With ten answers, the values are 0, 0.3, 0.6, 0.9 and 1 for 0, 1, 2, 3 and more matches.
    """
    matches = [answer == reply for answer in answers]
    return sum(min((sum(matches) - match) / 3, 1.0) for match in matches) / len(matches)


def _check_answers(answers: Sequence[str]):
    is_list = isinstance(answers, (list, tuple))  # of one string, the letters would count as answers
    if not is_list or not answers or not all(isinstance(answer, str) for answer in answers):
        raise ValueError(f"answers must be the people's, usually ten texts, got {answers!r:.200}")


def textvqa_accuracy(reply: str, answers: Sequence[str]) -> float:
    """
    VQA accuracy with everything normalized by `normalize_answer`.

    Args:
        answers: the people's answers, usually ten.

    Raises:
        ValueError: if there are no answers, or one is not a text; the other metrics raise the same.
    """
    _check_answers(answers)
    return _leave_one_out(normalize_answer(reply), [normalize_answer(answer) for answer in answers])


def vqav2_accuracy(reply: str, answers: Sequence[str]) -> float:
    """
    VQA accuracy as vqaEval.py has it: nothing is normalized if all people said the same.

    Copies differ: the script's earlier versions normalize every reply, lmms-eval replies and answers alike. Where
    people agree this one takes "Yes" for wrong, and what LLaVA hands in, `normalize_answer(reply)`, for "t-shirt". Our
    task hands in the reply in lower case and without a period at its end.
    """
    _check_answers(answers)
    reply, *answers = (text.replace("\n", " ").replace("\t", " ").strip() for text in (reply, *answers))
    if len(set(answers)) > 1:
        reply, *answers = (_normalize_words(_remove_punctuation(text)) for text in (reply, *answers))
    return _leave_one_out(reply, answers)


def gqa_accuracy(reply: str, answer: str) -> float:
    """1 if the reply, in lower case and without a period at its end, is the answer; else 0."""
    if not isinstance(answer, str):
        raise ValueError(f"the answer must be a text, got {answer!r}")
    return float(reply.strip().rstrip(".").lower() == answer)


def find_letter(reply: str, letters: str) -> str | None:
    """
    The option that a reply names: `B`, `(b)`, `**B**`, `B) red`, `The answer is (B).`; None for any other reply.

    The letter stands at the beginning or after "answer", "option" or "choice", and a mark or the line's end follows:
    in `The answer is A red car` it is a word. Also None if another letter is marked so: `A, B or C`.

    lmms-eval takes the first letter of any reply: `Blue` as B, and `Answer: C` as A.
    """
    letter = rf"(?<![\w'])([{letters}])(?=\s*(?:[]).:,*]|$))"
    match = re.search(
        rf"(?:\A|\b(?:answer|option|choice)\b(?:\s+is\b)?)[\s:*(\[]*{letter}", reply, re.IGNORECASE | re.MULTILINE
    )
    marked = {found.upper() for found in re.findall(letter, reply, re.IGNORECASE | re.MULTILINE)}
    return match.group(1).upper() if match and len(marked) == 1 else None


# Uncertainty


def wilson_interval(successes: float, count: int, z: float = 1.959963984540054) -> tuple[float, float]:
    """
    Wilson's interval of a proportion (1927), of 95 % unless `z` says otherwise. Questions count as independent.

    >>> [round(bound, 3) for bound in wilson_interval(17, 30)]
    [0.392, 0.726]
    """
    if not 0 <= successes <= count or count < 1:
        raise ValueError(f"successes must lie between 0 and a count of at least 1, got {successes} of {count}")
    share, spread = successes / count, z * z / count
    center = (share + spread / 2) / (1 + spread)
    margin = z * math.sqrt((share * (1 - share) + spread / 4) / count) / (1 + spread)
    return max(0.0, center - margin), min(1.0, center + margin)


def bootstrap_interval(scores: Sequence[float], resamples: int = 10_000, seed: int = 0) -> tuple[float, float]:
    """
    The 95 % percentile bootstrap interval of a mean (Efron 1979). Questions count as independent.

    Scores have few distinct values: drawing how often each occurs is the same as drawing questions, at a cost that
    does not grow with their number.
    """
    values, counts = np.unique(np.asarray(scores, dtype=float), return_counts=True)
    if not len(values):
        raise ValueError("scores are empty: a mean needs at least one")
    drawn = np.random.default_rng(seed).multinomial(counts.sum(), counts / counts.sum(), size=resamples)
    low, high = np.quantile(drawn @ values / counts.sum(), (0.025, 0.975))
    return float(low), float(high)


def mcnemar(gained: int, lost: int) -> float:
    """
    The two-sided p-value of McNemar's exact test (1947), from the questions on which two models differ.

    If neither is better, each such question is a fair coin flip. With scores between 0 and 1 instead of right and
    wrong, this is the sign test.

    >>> round(mcnemar(10, 2), 4)
    0.0386
    """
    if gained < 0 or lost < 0:
        raise ValueError(f"counts of questions must be at least 0, got {gained} and {lost}")
    count = gained + lost
    log_ways = (
        math.lgamma(count + 1) - math.lgamma(k + 1) - math.lgamma(count - k + 1) for k in range(min(gained, lost) + 1)
    )
    return min(1.0, 2 * sum(math.exp(ways - count * math.log(2)) for ways in log_ways))

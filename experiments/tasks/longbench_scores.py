"""How LongBench v1 scores an answer (arXiv 2308.14508), by libraries that are kept up.

Question answering is SQuAD's token F1; summaries ROUGE-L (rouge-score), code edit similarity (rapidfuzz). LongBench's
own scripts use two packages that are not kept up any more and count differently: a ROUGE-L over sets of words a
sentence, and a similarity by longest common blocks, where python-Levenshtein is not installed. Those scores come out at
another height; `task.scorer=lm_eval` scores with lm-eval's copy of the scripts instead.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence

from rapidfuzz import fuzz
from rouge_score.rouge_scorer import RougeScorer

from experiments.tasks.base import Metric

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def best(score: Callable[[str, str], float]) -> Metric:
    """The best over the references."""
    return lambda prediction, references: max((score(prediction, each) for each in references), default=0.0)


def token_f1(prediction: str, reference: str) -> float:
    """F1 of the words in common, without case, punctuation and articles (SQuAD's, arXiv 1606.05250)."""
    found, wanted = (_words(text) for text in (prediction, reference))
    common = (Counter(found) & Counter(wanted)).total()
    return 2 * common / (len(found) + len(wanted)) if common else 0.0


def _words(text: str) -> list[str]:
    return _ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split()


def rouge_l(prediction: str, reference: str) -> float:
    """F-measure of ROUGE-L."""
    return float(RougeScorer(["rougeL"]).score(reference, prediction)["rougeL"].fmeasure)


def edit_similarity(prediction: str, reference: str) -> float:
    """Of the first line of code in an answer: the first that is neither blank, a comment nor a fence."""
    lines = (line for line in prediction.split("\n") if line.strip())
    code = next((line for line in lines if not any(mark in line for mark in ("`", "#", "//"))), "")
    return fuzz.ratio(code, reference) / 100


def class_accuracy(prediction: str, reference: str, classes: Sequence[str]) -> float:
    """One share of the classes that an answer names, where the right one is among them.

    A class whose name is part of the right one's is not taken for named.
    """
    named = [name for name in classes if name in prediction and (name == reference or name not in reference)]
    return 1 / len(named) if reference in named else 0.0


def number_share(prediction: str, reference: str) -> float:
    """The share of the numbers in an answer that are the reference's first."""
    wanted = re.search(r"\d+", reference)
    numbers = re.findall(r"\d+", prediction)
    return numbers.count(wanted.group()) / len(numbers) if wanted and numbers else 0.0


def first_line(metric: Metric) -> Metric:
    """Of what stands before the first line break: few-shot answers run on into the next example."""
    return lambda prediction, references: metric(prediction.lstrip("\n").split("\n")[0], references)


def metric(dataset: str, classes: Sequence[str] = ()) -> Metric:
    """The metric of a data set of LongBench.

    Parameters
    ----------
    classes : sequence of str
        For ``trec``: the names of all classes.
    """
    match dataset:
        case "trec":
            return first_line(best(lambda prediction, reference: class_accuracy(prediction, reference, classes)))
        case "samsum":
            return first_line(best(rouge_l))
        case "triviaqa":
            return first_line(best(token_f1))
        case "gov_report" | "qmsum" | "multi_news":
            return best(rouge_l)
        case "passage_count" | "passage_retrieval_en":
            return best(number_share)
        case "lcc" | "repobench-p":
            return best(edit_similarity)
        case _:
            return best(token_f1)

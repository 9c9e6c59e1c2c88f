from __future__ import annotations

import pytest

from bsfa import InputError
from experiments.tasks import text


def test_calibration_prose_is_never_judged_on():
    calibrate, evaluate = text.prose("calibrate"), text.prose("evaluate")
    assert set(calibrate).isdisjoint(evaluate)
    assert min(len(calibrate), len(evaluate)) > 500


@pytest.mark.parametrize("split", ["calibrate", "evaluate"])
def test_prose_is_distinct_sentences_without_markup(split):
    sentences = text.prose(split)
    assert len(set(sentences)) == len(sentences)
    for sentence in sentences:
        assert sentence[0].isupper()
        assert sentence.endswith(".")
        assert text.SHORTEST <= len(sentence) <= text.LONGEST
        assert not set("`*=<>{}|\n\t") & set(sentence)


def test_the_digest_tells_texts_apart():
    digests = {text.digest(haystack, split) for haystack in text.HAYSTACKS for split in ("calibrate", "evaluate")}
    assert len(digests) == 3  # noise is not split


def test_an_unknown_haystack_is_refused_with_the_choices():
    with pytest.raises(InputError, match="'lorem' is none of prose, noise"):
        text.sentences("lorem", "evaluate")

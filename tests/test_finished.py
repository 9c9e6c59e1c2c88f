"""A calibration that was cut goes on where it was, and ends as one that was not."""

from __future__ import annotations

import pytest
import torch

import bsfa
from bsfa import InputError
from bsfa.patterns import A_SHAPE, VERTICAL_SLASH, Pattern
from bsfa.rivals import fit_blasst, search_patterns

PATTERNS = (Pattern(VERTICAL_SLASH, 30, 100), Pattern(A_SHAPE, 64, 128))


def thresholds(model, texts, **options):
    return bsfa.calibrate(model, texts, [1, 2], **options).values


def cuts(model, texts, **options):
    found = bsfa.calibrate_cuts(model, texts, (0.0, 0.01, 0.3), (2,), tail=64, samples=2, **options)
    return torch.stack([found.kept, found.cost])


def fit(model, texts, **options):
    found = fit_blasst(model, texts, (0.5, 0.6, 0.7, 0.8, 0.9), **options)
    return torch.tensor([found.a, found.b])


def patterns(model, texts, **options):
    return search_patterns(model, texts, PATTERNS, **options)


CALIBRATIONS = pytest.mark.parametrize("calibrate", [thresholds, cuts, fit, patterns])


def same(x, y) -> bool:
    return torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y


@pytest.fixture
def texts() -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randint(3, 100, (1, length)) for length in (900, 700, 800)]


@CALIBRATIONS
def test_it_goes_on_where_it_was_cut(calibrate, tiny_model, texts, tmp_path, monkeypatch):
    want = calibrate(tiny_model, texts, progress=False)
    forward, read = type(tiny_model.get_decoder()).forward, []

    def cut_in_the_third(*arguments, **options):
        read.append(1)
        if len(read) == 3:
            raise KeyboardInterrupt
        return forward(*arguments, **options)

    monkeypatch.setattr(type(tiny_model.get_decoder()), "forward", cut_in_the_third)
    with pytest.raises(KeyboardInterrupt):
        calibrate(tiny_model, texts, partial=tmp_path / "texts", progress=False)
    assert len(list((tmp_path / "texts").iterdir())) == 2
    assert same(calibrate(tiny_model, texts, partial=tmp_path / "texts", progress=False), want)
    once_more = len(read)
    assert same(calibrate(tiny_model, texts, partial=tmp_path / "texts", progress=False), want)
    assert len(read) == once_more


@CALIBRATIONS
def test_it_does_not_take_up_another_calibration(calibrate, tiny_model, texts, tmp_path):
    calibrate(tiny_model, texts, partial=tmp_path, progress=False)
    with pytest.raises(InputError, match=r"text-0.safetensors is another calibration's; remove"):
        calibrate(tiny_model, texts[1:], partial=tmp_path, progress=False)
    (tmp_path / "text-0.safetensors").write_text("no")
    with pytest.raises(InputError, match=r"text-0.safetensors is damaged .* and calibrate again"):
        calibrate(tiny_model, texts, partial=tmp_path, progress=False)

"""experiment=kernel: what is refused before a GPU is asked for."""

from __future__ import annotations

import pytest

from tests.experiments.conftest import QUIET


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("kernel.heads=[32,8]", "kernel.heads=[32, 8] must be pairs of query and KV heads"),
        ("kernel.heads=[[32,7]]", "kernel.heads=[[32, 7]] must be pairs"),
        ("kernel.skips=[]", "kernel.skips=[] must be shares"),
        ("kernel.skips=[half]", "must be shares from 0 to below 1"),
        ("kernel.patterns=[]", "must hold one each at least"),
        ("kernel.baselines=[fa9]", "is none of fa3"),
    ],
)
def test_a_setting_that_makes_no_sense_is_named(command, tmp_path, argument, message):
    assert message in command("experiment=kernel", argument, QUIET, f"results={tmp_path}").error

from __future__ import annotations

import math
import pickle

import pytest
import torch

from bsfa import InputError, Thresholds
from bsfa.model import ModelInfo
from bsfa.provenance import Provenance


def model_info(**changes) -> ModelInfo:
    device = torch.device("cpu")
    options = {"name": "m", "fingerprint": "f", "n_heads": 4, "n_kv_heads": 2, "head_dim": 16, "devices": (device,) * 2}
    return ModelInfo(**(options | changes))


def table(**changes) -> Thresholds:
    options = {"values": torch.randn(2, 2, 4, 3), "k_values": (8, 16), "provenance": Provenance("m", "f", 384, 16)}
    return Thresholds(**(options | changes))


def official(**changes):
    """The fields of the paper authors' files."""
    fields = {
        "thresholds": torch.randn(2, 2, 4, 3),
        "k_values": [8, 16],
        "max_num_blocks": 3,
        "q_block_size": 128,
        "k_block_size": 64,
        "aggregation_method": "mean",
    }
    return fields | changes


class Payload:
    """Writes a file when unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_a_file_brings_back_what_was_saved(tmp_path):
    values = torch.randn(2, 2, 4, 3)
    values[0, 0, 0, 0] = -math.inf
    saved = table(values=values)
    saved.save(tmp_path / "new" / "t.safetensors")
    loaded = Thresholds.load(tmp_path / "new" / "t.safetensors")
    assert torch.equal(loaded.values, values)
    assert (loaded.k_values, loaded.block_size, loaded.provenance) == ((8, 16), (128, 64), saved.provenance)
    assert [f.name for f in (tmp_path / "new").iterdir()] == ["t.safetensors"]


def test_the_authors_files_are_read(tmp_path):
    fields = official()
    torch.save(fields, tmp_path / "t.pt")
    loaded = Thresholds.load(tmp_path / "t.pt")
    assert torch.equal(loaded.select(16), fields["thresholds"][1])
    loaded.check(model_info())


def test_a_file_that_would_execute_code_is_refused_and_executes_none(tmp_path):
    (tmp_path / "t.pt").write_bytes(pickle.dumps({"thresholds": Payload(tmp_path / "pwned")}))
    torch.save(official(thresholds=Payload(tmp_path / "pwned")), tmp_path / "u.pt")
    for name in ("t.pt", "u.pt"):
        with pytest.raises(InputError, match="would execute code"):
            Thresholds.load(tmp_path / name)
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_a_truncated_file_is_refused(tmp_path, suffix):
    path = tmp_path / f"t.{suffix}"
    if suffix == "pt":
        torch.save(official(), path)
    else:
        table().save(path)
    content = path.read_bytes()
    for length in (0, 1, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:length])
        with pytest.raises(InputError, match=f"t.{suffix}"):
            Thresholds.load(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"thresholds": [1.0]}, "must be a tensor"),
        ({"thresholds": torch.zeros(2, 2)}, r"\(2, 2\)"),
        ({"k_values": [8]}, "2 tables for the 1 values"),
        ({"k_values": ["a", "b"]}, "whole numbers"),
        ({"thresholds": torch.full((2, 2, 4, 3), math.nan)}, "NaN"),
        ({"thresholds": torch.zeros(2, 2, 4, 3, dtype=torch.complex64)}, "real numbers"),
    ],
)
def test_a_file_that_holds_something_else_is_refused(tmp_path, change, message):
    torch.save(official(**change), tmp_path / "t.pt")
    with pytest.raises(InputError, match=message):
        Thresholds.load(tmp_path / "t.pt")


def test_missing_fields_and_missing_files_are_named(tmp_path):
    torch.save({"thresholds": torch.zeros(1, 2, 4, 3)}, tmp_path / "t.pt")
    with pytest.raises(InputError, match="no k_values, q_block_size, k_block_size"):
        Thresholds.load(tmp_path / "t.pt")
    with pytest.raises(InputError, match=r"no threshold file at .*u\.pt"):
        Thresholds.load(tmp_path / "u.pt")


def test_an_absent_k_lists_those_present():
    with pytest.raises(InputError, match="k=32 is not in the threshold file; it holds k=8, 16"):
        table().select(32)


@pytest.mark.parametrize(
    ("thresholds", "message"),
    [
        (table(values=torch.zeros(2, 2, 8, 3)), "2 layers and 8 heads; m has 2 and 4"),
        (table(values=torch.zeros(2, 3, 4, 3)), "3 layers and 4 heads"),
        (table(block_size=(64, 64)), r"blocks \(64, 64\)"),
        (table(provenance=Provenance("other", "g")), "thresholds of other .* the weights differ"),
    ],
)
def test_thresholds_of_something_else_are_refused(thresholds, message):
    with pytest.raises(InputError, match=message):
        thresholds.check(model_info())


def test_shards_are_the_heads_of_each_rank():
    whole = table()
    assert torch.equal(torch.cat([whole.shard(rank, 2).values for rank in range(2)], dim=2), whole.values)
    for rank, world in [(0, 3), (2, 2), (0, 0)]:
        with pytest.raises(InputError, match=f"rank {rank} of {world}"):
            whole.shard(rank, world)

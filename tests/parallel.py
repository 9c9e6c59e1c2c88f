"""What each process of the test of tensor parallelism runs: ``torchrun -m tests.parallel MODEL THRESHOLDS OUT``."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

import bsfa
import run
from bsfa import Cuts, InputError, Thresholds
from bsfa.methods import (
    Bsfa,
    Dense,
    FisherShare,
    FlashPrefill,
    FlexPrefill,
    LateShare,
    MInference,
    RowShare,
    SpargeAttn,
    StreamingLLM,
    XAttention,
)
from bsfa.model import fingerprint

TTFT = (
    "experiment=ttft", "profile=quick", "model.device=tp", "ttft.lengths=[512]", "ttft.skips=[0.5]", "ttft.repeats=1",
    "ttft.baselines=[]", "tracker=none",
)  # fmt: skip
TOKENS = torch.arange(700).remainder(90)[None] + 3


def methods(thresholds: str) -> dict:
    table = Thresholds.load(thresholds)
    _, layers, heads, _ = table.values.shape
    change = torch.arange(heads).expand(2, layers, heads).clone()[..., None, None].float()  # the later, the dearer
    change[0] = 0
    kept = torch.tensor([2.0, 1.0]).view(2, 1, 1, 1).expand(2, layers, heads, 1)
    first_heads = Cuts(kept, change, 1, (0.0, 0.2), ())
    return {
        "dense": Dense(),
        "bsfa": Bsfa(table, 2),
        "row_share": RowShare(0.05),
        "late_share": LateShare(0.1),
        "fisher_share": FisherShare(first_heads, 2.5),
        "minference": MInference(0.02),
        "streaming_llm": StreamingLLM(1),
        "flexprefill": FlexPrefill(0.9, 0.1, 128),
        "flashprefill": FlashPrefill(0.3, last_full_blocks=0),
        "xattention": XAttention(0.9),
        "spargeattn": SpargeAttn(0.9, 0.6),
    }


@torch.no_grad()
def read(model, thresholds: str) -> dict:
    """Logits of the last token, and the blocks kept by layer and head, under every method."""
    found = {}
    for name, method in methods(thresholds).items():
        with bsfa.apply(model, method) as applied:
            logits = model(TOKENS.to(model.device), use_cache=False, logits_to_keep=1).logits[0, -1]
        kept = [applied.stats[layer][0].kept[0].tolist() for layer in sorted(applied.stats)]
        found[name] = {"logits": logits.tolist(), "kept": kept}
    return found


def main(folder: str, thresholds: str, out: str) -> None:
    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    shared_out = DistributedConfig(tp_plan="auto")
    model = AutoModelForCausalLM.from_pretrained(folder, distributed_config=shared_out, dtype=dtype).eval()
    found = {"methods": read(model, thresholds), "fingerprint": fingerprint(model)}
    try:
        bsfa.calibrate(model, [TOKENS], [2], progress=False)
    except InputError as error:
        found["calibration"] = str(error)
    Path(out, f"{dist.get_rank()}.json").write_text(json.dumps(found))
    sys.argv = ["run.py", *TTFT, f"model.path={folder}", f"model.dtype={str(dtype).split('.')[1]}", f"results={out}"]
    os.environ["HYDRA_MAIN_MODULE"] = "__main__"  # find conf/ beside run.py, as for a script
    run.main()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])

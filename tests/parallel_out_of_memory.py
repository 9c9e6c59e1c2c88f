"""``torchrun -m tests.parallel_out_of_memory key=value ...``: run.py, short of memory.

With streaming_llm 640 tokens are too many for the second of the processes.
"""

from __future__ import annotations

import os
import sys

import torch
import torch.distributed as dist

import run
from bsfa.methods import StreamingLLM

bind = StreamingLLM.bind


def limited(self, model):
    attend = bind(self, model)

    def within(call):
        if dist.get_rank() == 1 and call.layer == 1 and call.q.shape[1] == 640:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
        return attend(call)

    return within


if __name__ == "__main__":
    StreamingLLM.bind = limited
    sys.argv[0] = "run.py"
    os.environ["HYDRA_MAIN_MODULE"] = "__main__"  # find conf/ beside run.py, as for a script
    run.main()
    dist.destroy_process_group()

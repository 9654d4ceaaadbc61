"""For tests that start processes of their own; as a script, a stage in one of several processes on a CPU.

accelerate launch ... tests/workers.py STAGE [FIELDS ...]              FSDP: ... tests/workers.py --fsdp STAGE ...
"""

import importlib
import os
import sys
from typing import NoReturn

import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType


def stand_in_for_gpus() -> None:
    """accelerate takes FSDP for what several GPUs do; here gloo and the CPU stand in for NCCL and CUDA."""
    PartialState._prepare_backend = lambda *args, **kwargs: ("gloo", DistributedType.MULTI_GPU)
    torch.cuda.set_device = lambda *args: None


def end() -> NoReturn:
    """End a process that has done its work, with status 0.

    Threads of gloo and of an engine may still run when the interpreter is taken down, and abort the process there.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    words = sys.argv[1:]
    if words[0] == "--fsdp":
        stand_in_for_gpus()
        del words[0]
    importlib.import_module(f"hgpo_trl.scripts.{words[0]}").main(words[1:])
    end()

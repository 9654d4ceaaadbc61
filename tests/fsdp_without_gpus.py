"""A stage under FSDP on the CPU: accelerate launch ... tests/fsdp_without_gpus.py STAGE [FIELDS ...]."""

import importlib
import sys

import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType


def stand_in_for_gpus() -> None:
    """accelerate takes FSDP for what several GPUs do; here gloo and the CPU stand in for NCCL and CUDA."""
    PartialState._prepare_backend = lambda *args, **kwargs: ("gloo", DistributedType.MULTI_GPU)
    torch.cuda.set_device = lambda *args: None


if __name__ == "__main__":
    stand_in_for_gpus()
    importlib.import_module(f"hgpo_trl.scripts.{sys.argv[1]}").main(sys.argv[2:])

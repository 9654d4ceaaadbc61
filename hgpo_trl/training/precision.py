"""`bf16: auto`: train in bfloat16 where that is faster, found out by a measurement.

Processors differ by a factor of 100: a bf16 matrix product is 2 to 8 times as fast as one in fp32 with AVX512-BF16 or
AMX, and 50 to 100 times as slow without. Under `bf16: true` weights, gradients and the optimizer's state stay in fp32;
matrix products run in bf16 (autocast).
"""

import json
import os
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate.utils import gather_object
from transformers import TrainingArguments
from transformers.utils import is_torch_bf16_gpu_available

from hgpo_trl.common.errors import UserError
from hgpo_trl.training.run_dir import RUN_FILE

MIN_SPEEDUP = 1.25  # below it, the fewer digits of bf16 are not worth the time
_TOKENS, _WIDTH = 128, 512
_REPETITIONS = 5
_HOPELESS = 5.0  # times as slow, after which no second measurement is needed


def _say(reason: str) -> None:
    """Print a reason once for all processes; `PartialState` does not know them yet."""
    if os.environ.get("RANK", "0") == "0":
        print(f"bf16: auto: {reason}", flush=True)


def _linear_layer(bf16: bool) -> float:
    """Seconds of processor time of a linear layer with fp32 weights, forward and backward, on one thread."""
    rows = torch.ones(_TOKENS, _WIDTH, requires_grad=True)
    weight = torch.ones(_WIDTH, _WIDTH, requires_grad=True)
    start = time.thread_time()  # not the clock's: other programs may be running
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        out = torch.nn.functional.linear(rows, weight)
    out.float().sum().backward()
    return time.thread_time() - start


def cpu_speedup(cost: Callable[[bool], float] = _linear_layer) -> float:
    """Measure how many times as fast as fp32 this processor trains in bf16.

    Args:
        cost: seconds of some work, in bf16 (True) or in fp32 (False).
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        cost(False), cost(True)  # the first call of each prepares its kernel
        fp32, bf16 = cost(False), cost(True)
        for _ in range(_REPETITIONS if bf16 < _HOPELESS * fp32 else 0):
            fp32, bf16 = min(fp32, cost(False)), min(bf16, cost(True))
    finally:
        torch.set_num_threads(threads)
    return fp32 / bf16


def choose_bf16(use_cpu: bool, speedup: Callable[[], float] = cpu_speedup) -> bool:
    """Decide whether to compute in bf16: on a GPU, if it has it; on a processor, if it is faster. Prints the reason.

    Args:
        use_cpu: stay on the processor even if there is a GPU.
    """
    if torch.cuda.is_available() and not use_cpu:
        chosen = is_torch_bf16_gpu_available()
        _say(f"this GPU {'has' if chosen else 'does not have'} bf16.")
        return chosen
    ratio = speedup()
    chosen = ratio >= MIN_SPEEDUP
    compared = f"{ratio:.1f} times as fast as" if ratio >= 0.95 else f"{1 / ratio:.1f} times as slow as"
    _say(f"bf16 is {compared} fp32 on this processor: computing in {'bf16' if chosen else 'fp32'}.")
    return chosen


def resolve_bf16(fields: Namespace, choose: Callable[[bool], bool] = choose_bf16) -> bool:
    """Resolve a recipe's `bf16: auto`. A run that goes on in its `output_dir` keeps the precision it was begun in.

    Where there is no accelerator, `use_cpu` becomes true: Transformers refuses bf16 on a processor that is not named.
    """
    fields.use_cpu = fields.use_cpu or not torch.accelerator.is_available()
    record = Path(str(fields.output_dir)) / RUN_FILE
    begun = json.loads(record.read_text(encoding="utf-8")).get("bf16") if record.is_file() else None
    if isinstance(begun, bool):
        _say(f"{str(begun).lower()}, as the run in {record.parent} was begun.")
        return begun
    return choose(fields.use_cpu)


def check_same_precision(args: TrainingArguments) -> None:
    """Refuse processes of a run that compute in different precisions.

    Raises:
        UserError: on every process.
    """
    everyone = gather_object([args.bf16])
    if len(set(everyone)) > 1:
        raise UserError(
            f"bf16: auto: it is true for {sum(everyone)} of {len(everyone)} processes and false for the others: their "
            "processors differ, or the output_dir of some holds an earlier run. Write bf16: true or bf16: false."
        )

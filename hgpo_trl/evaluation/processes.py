"""The processes of one evaluation, as `accelerate launch` and torchrun start them.

Each samples a share of the prompts with a model of its own. They talk over gloo, on the CPU: the accelerators are left
to the models and to vLLM's engines, which have groups of their own.
"""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import datasets
import torch.distributed as dist
from transformers.utils import logging

from hgpo_trl.common.errors import UserError

_T = TypeVar("_T")

_LONGEST_WAIT = timedelta(weeks=3)  # of a process whose share is drawn; gloo's milliseconds have 32 bits
_POLL = 0.2  # seconds


@dataclass(frozen=True)
class Processes:
    """This process and how many there are; the default is one that is alone."""

    index: int = 0
    count: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this one prints, and joins what all have drawn."""
        return self.index == 0

    def agree(self, make: Callable[[], _T]) -> _T:
        """What `make` returns in the main process, for all of them.

        Raises:
            UserError: another process has ended.
        """
        if self.count == 1:
            return make()
        box: list[Any] = [make() if self.is_main else None]
        with _others_are_there():
            dist.broadcast_object_list(box)
        return box[0]

    def wait(self, meanwhile: Callable[[], object]) -> None:
        """Wait until every process has come here, and call `meanwhile` again and again, at least once at the end.

        Raises:
            UserError: another process has ended.
        """
        if self.count > 1:
            with _others_are_there():
                arrival = dist.barrier(async_op=True)
                while not arrival.is_completed():
                    meanwhile()
                    time.sleep(_POLL)
                arrival.wait()
        meanwhile()


ALONE = Processes()


@contextmanager
def _others_are_there() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # gloo's, of a closed connection
        raise UserError(
            "another process of this evaluation has ended; what it has printed says why. The same command goes on from "
            "the samples that all of them have drawn."
        ) from error


def join_processes() -> Processes:
    """Meet the other processes of this launch, if there are any. All but the main one show no bars from here on."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return ALONE
    if not dist.is_initialized():
        dist.init_process_group("gloo", timeout=_LONGEST_WAIT)
    processes = Processes(dist.get_rank(), dist.get_world_size())
    if not processes.is_main:
        datasets.disable_progress_bars()
        logging.disable_progress_bar()
    return processes


def own_share(what: str, devices: Sequence[_T], each: int = 1) -> list[_T]:
    """The devices of this process, where every process on this machine takes `each` of them.

    Args:
        what: they are, for the message.

    Raises:
        UserError: there are too few.
    """
    first = int(os.environ.get("LOCAL_RANK", "0")) * each
    needed = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) * each
    if needed > len(devices):
        raise UserError(
            f"The processes on this machine need {needed} {what}, {each} each, but it has {len(devices)}. Start fewer "
            "(accelerate launch --num_processes)."
        )
    return list(devices[first : first + each])

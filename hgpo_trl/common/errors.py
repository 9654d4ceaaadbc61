"""Errors that tell a user what to change. Every way to start a command reports them alike.

hgpo-trl hft ...                                    hgpo-trl hft: error: train_data='x': there is no such ...
python -m hgpo_trl.scripts.hft ...                  the same
accelerate launch -m hgpo_trl.scripts.hft ...       the same, from the first of the processes that meets it
"""

import os
import sys
from collections.abc import Callable, Iterable, Sequence
from difflib import get_close_matches
from itertools import takewhile
from pathlib import Path
from typing import NoReturn


class UserError(ValueError):
    """Something that the user gave does not fit: a field, a file, a data set, a model.

    The message names the field, the value and the remedy. The commands print it without a traceback and exit with
    status 2; any other exception is a fault of the program and keeps its traceback.
    """


class MissingPackageError(UserError, ImportError):
    """A setting needs a package that is not installed, or another version of it."""


class ServerError(UserError, ConnectionError):
    """A server that a setting names does not answer."""


class UnsupportedError(UserError, NotImplementedError):
    """A setting or a data set asks for something that this library does not support."""


def run_stage(main: Callable[[Sequence[str]], None], stage: str, argv: Sequence[str]) -> None:
    """Run a stage's `main` in this process; a `UserError` ends the process with its message and status 2.

    Args:
        stage: the stage's name on the command line, without its kind (`data`, not `data hft`, where argv has it).
    """
    try:
        main(argv)
    except UserError as error:
        kind = takewhile(lambda word: not word.startswith("-"), argv)
        refuse(" ".join(["hgpo-trl", stage, *kind]), str(error))
    _leave_process_group()


def _leave_process_group() -> None:
    """Leave torch's process group: its threads can abort a process whose interpreter is taken down around them.

    A vLLM engine in this process has groups of its own, which it would look for at exit.
    """
    distributed = sys.modules.get("torch.distributed")  # this module imports neither torch nor vLLM
    vllm = sys.modules.get("vllm.distributed.parallel_state")
    if vllm is not None:
        vllm.destroy_model_parallel()
        vllm.destroy_distributed_environment()
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def refuse(command: str, message: str) -> NoReturn:
    """Print `command: error: message` and exit with status 2. Of the processes of one launch, only the first prints."""
    if _is_first():
        print(f"{command}: error: {message}", file=sys.stderr, flush=True)
    sys.exit(2)


def _is_first() -> bool:
    """Whether this process is the first of its launch on this machine to ask.

    An error may meet any of them, and only some of them. torchrun, which `accelerate launch` is for several processes,
    gives each a file in a folder of its own: .../attempt_0/RANK/error.json. Without it every process counts as first.
    """
    error_file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not error_file:
        return True
    try:
        (Path(error_file).parents[1] / "refused").touch(exist_ok=False)
    except FileExistsError:
        return False
    except OSError:  # the folder is read-only: twice is better than never
        return True
    return True


def did_you_mean(name: str, candidates: Iterable[str], otherwise: str = ".", cutoff: float = 0.4) -> str:
    """The end of a message about an unknown name: the candidate spelled most like it, else `otherwise`.

    Args:
        cutoff: least similarity, between 0 and 1.
    """
    nearest = get_close_matches(name, list(candidates), n=1, cutoff=cutoff)
    return f"; did you mean {nearest[0]!r}?" if nearest else otherwise

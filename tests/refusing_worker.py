"""Started by torchrun: the processes named in the arguments meet a user's error, the others wait for them for good."""

import os
import sys
import time
from collections.abc import Sequence

from hgpo_trl.common.errors import UserError, run_stage


def main(argv: Sequence[str]) -> None:
    if os.environ["RANK"] in argv[0].removeprefix("--ranks="):
        raise UserError("margin=x is no number. Give one.")
    time.sleep(600)  # seconds; the launcher ends it


if __name__ == "__main__":
    run_stage(main, "hgpo", sys.argv[1:])

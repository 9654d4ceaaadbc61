"""Entry points, one per stage: `hgpo-trl STAGE --config recipe.yaml`, `accelerate launch -m hgpo_trl.scripts.STAGE`."""

import sys

from hgpo_trl.common.environment import apply_env
from hgpo_trl.common.errors import run_stage

if sys.argv[:1] == ["-m"]:  # Python's name for a module that it still looks for: the stage's own imports come next
    run_stage(
        apply_env, sys.orig_argv[sys.orig_argv.index("-m") + 1].rpartition(".")[2].replace("_", " "), sys.argv[1:]
    )

"""Entry points, one per stage: `hgpo-trl STAGE --config recipe.yaml`, `accelerate launch -m hgpo_trl.scripts.STAGE`."""

import sys

from hgpo_trl.common.environment import apply_env
from hgpo_trl.common.errors import run_stage

module = next((word for word in sys.orig_argv if f"{__name__}." in word), None)
if module is not None and sys.argv[:1] == ["-m"]:  # Python still looks for the module: the stage's imports come next
    run_stage(apply_env, module.rpartition(".")[2].replace("_", " "), sys.argv[1:])

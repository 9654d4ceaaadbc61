"""Stage I in two processes that stand for two nodes, each with an output_dir of its own; for tests/test_distributed.py.

    accelerate launch ... tests/node_local_worker.py FOLDER FIELDS ...

Three steps; the same command again, which is refused; then again with one checkpoint that both have.
FOLDER/PROCESS.json says what came of it.
"""

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

from accelerate import PartialState

from hgpo_trl.errors import UserError
from hgpo_trl.scripts import hft


def main() -> None:
    folder, *fields = sys.argv[1:]
    process, found = os.environ["RANK"], {}
    node = Path(folder) / process
    node.mkdir()
    os.chdir(node)  # output_dir is relative

    def run() -> None:
        hft.main([*fields, "--output_dir", "run"])
        PartialState().wait_for_everyone()

    def losses() -> list[dict[str, Any]]:
        state = json.loads(Path("run/trainer_state.json").read_text(encoding="utf-8"))
        return [entry for entry in state["log_history"] if "loss" in entry]

    run()
    whole = losses() if process == "0" else []
    weights = Path("run/model.safetensors").read_bytes() if process == "0" else b""
    try:
        run()
    except UserError as error:
        found["refused"] = str(error)
    if process == "1":
        shutil.copytree("../0/run/checkpoint-2", "run/checkpoint-2", dirs_exist_ok=True)
    PartialState().wait_for_everyone()
    run()
    if process == "0":
        found["same"] = losses() == whole and Path("run/model.safetensors").read_bytes() == weights
    Path(folder, f"{process}.json").write_text(json.dumps(found), encoding="utf-8")
    PartialState().wait_for_everyone()


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    os._exit(0)  # a busy machine may abort a gloo thread that is still there when the interpreter is taken down

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
from run_logs import log_of
from workers import end

from hgpo_trl.common.errors import UserError
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

    def end() -> tuple[list[dict[str, Any]], bytes]:
        return log_of(Path("run")), Path("run/model.safetensors").read_bytes()

    run()
    whole = end() if process == "0" else None
    try:
        run()
    except UserError as error:
        found["refused"] = str(error)
    if process == "1":
        shutil.copytree("../0/run/checkpoint-2", "run/checkpoint-2", dirs_exist_ok=True)
    PartialState().wait_for_everyone()
    run()
    if process == "0":
        found["same"] = end() == whole
    Path(folder, f"{process}.json").write_text(json.dumps(found), encoding="utf-8")
    PartialState().wait_for_everyone()


if __name__ == "__main__":
    main()
    end()

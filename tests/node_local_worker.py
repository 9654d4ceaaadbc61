"""Stage I in two processes that stand for two nodes, each with an output_dir of its own; for tests/test_distributed.py.

    accelerate launch ... tests/node_local_worker.py FOLDER FIELDS ...

The runs of one launch: whole (two steps, as on one folder), then interrupted after either process has lost another
checkpoint, then without any that both have. FOLDER/PROCESS.json says what came of it.
"""

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

PROCESS = os.environ["RANK"]
os.environ["LOCAL_RANK"] = "0"  # the first process of its node

from accelerate import PartialState  # noqa: E402

from hgpo_trl.errors import UserError  # noqa: E402
from hgpo_trl.scripts import hft  # noqa: E402


def main() -> None:
    folder, *fields = sys.argv[1:]
    node = Path(folder) / PROCESS
    node.mkdir()
    os.chdir(node)  # output_dir is relative

    def run(output_dir: str, **more: Any) -> None:
        words = [word for name, value in more.items() for word in (f"--{name}", str(value))]
        hft.main([*fields, "--output_dir", output_dir, "--save_on_each_node", "true", *words])
        PartialState().wait_for_everyone()

    def state(output_dir: str) -> dict[str, Any]:
        return json.loads(Path(output_dir, "trainer_state.json").read_text(encoding="utf-8"))

    run("whole")
    found: dict[str, Any] = {"sealed": sorted(path.parent.name for path in Path("whole").glob("*/complete.json"))}
    shutil.copytree("whole", "cut")
    whole = state("whole")
    # The first node was killed while it wrote the last checkpoint; the second has lost the first one.
    if PROCESS == "0":
        Path("cut/checkpoint-3/complete.json").unlink()
    else:
        shutil.rmtree("cut/checkpoint-1")
    run("cut")
    found["resumed"] = [entry for entry in state("cut")["log_history"] if "loss" in entry] == [
        entry for entry in whole["log_history"] if "loss" in entry
    ]
    weights = "model.safetensors"
    found["same"] = Path("cut", weights).read_bytes() == Path("whole", weights).read_bytes()
    # Of three checkpoints either node has one whole, and not the same one.
    for step in (2, 3) if PROCESS == "0" else (1, 2):
        shutil.rmtree(f"cut/checkpoint-{step}", ignore_errors=True)
    PartialState().wait_for_everyone()
    try:
        run("cut")
    except UserError as error:
        found["refused"] = str(error)
    Path(folder, f"{PROCESS}.json").write_text(json.dumps(found), encoding="utf-8")
    PartialState().wait_for_everyone()


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    os._exit(0)  # a busy machine may abort a gloo thread that is still there when the interpreter is taken down

"""docs/data.md says of every source what its adapter says; the example's rows are what the page says of them."""

import re
from pathlib import Path

from hgpo_trl.data.adapters import ADAPTERS

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")


def test_every_adapter_is_in_the_table() -> None:
    (section,) = re.findall(r"^## Sources\n(.*?)(?=^## )", TEXT, re.MULTILINE | re.DOTALL)
    rows = [re.split(r"(?<!\\)\|", line)[1:-1] for line in section.splitlines() if line.startswith("| `")]
    documented = {row[0].strip().strip("`"): [cell.strip() for cell in row[1:]] for row in rows}
    assert documented.keys() == ADAPTERS.keys()
    for name, (stage, mode, domain, licence, trace) in documented.items():
        adapter = ADAPTERS[name]
        assert stage == adapter.stage, name
        assert mode == ("–" if adapter.mode is None else adapter.mode.value.replace("_", " ")), name
        assert domain == "the same" or adapter.domain in domain, name
        assert licence == adapter.licence, name
        assert trace.startswith("prompts alone") == (adapter.mode is None), name


def test_files_and_headings_exist() -> None:
    headings = {
        re.sub(r"[^\w\- ]", "", h).lower().replace(" ", "-") for h in re.findall(r"^#+ (.*)$", TEXT, re.MULTILINE)
    }
    for target in re.findall(r"\]\((?!https:)([^)]+)\)", TEXT):
        file, _, anchor = target.partition("#")
        assert (ROOT / "docs" / file).is_file() if file else anchor in headings, target
    for path in re.findall(r"(?:recipes|examples)/[\w./-]+\.(?:yaml|jsonl)", TEXT):
        assert (ROOT / path).is_file(), path

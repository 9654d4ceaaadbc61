"""A built data set's README.md, its card on the hub, with its figures; all from the manifest."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import matplotlib
import yaml
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from hgpo_trl.common.files import looks_like_path, write_atomically
from hgpo_trl.data.manifest import Manifest, SourceManifest, TokenStatistics
from hgpo_trl.modes import LHRM, as_format
from hgpo_trl.reporting.documents import (
    NO_BREAK,
    Block,
    Bullets,
    Code,
    Heading,
    Lead,
    Paragraph,
    Picture,
    Table,
    to_markdown,
)
from hgpo_trl.reporting.figures import INK, NEITHER, NO_THINK, PERCENT_TICKS, STYLE, THINK, WIDTH, to_png

UNKNOWN_LICENCE = "unknown"  # the hub's own word for "not stated"
KEPT = "#12866A"
REMOVED = ("#C9C9C9", "#E8A0B8", "#D9C27A", "#BBA4DB", "#8FC3D6", "#E5AE8C", "#A9CCA4", "#AFB9E6", "#D6D6B0")
MODE_COLORS = {"think": THINK, "no_think": NO_THINK}
_SIZES = (("n<1K", 1e3), ("1K<n<10K", 1e4), ("10K<n<100K", 1e5), ("100K<n<1M", 1e6), ("1M<n<10M", 1e7))
_COLUMNS = {
    "hft": "`prompt` (messages), `completion` (one assistant message, in the marks of the format {mode_format})",
    "hgpo": "`prompt` (messages), `answer` (reference answer, or null: to be scored by a reward model)",
}
_STAGES = {"hft": "Hybrid Fine-Tuning (Stage I)", "hgpo": "Hybrid Group Policy Optimization (Stage II)"}


def write_card(output_dir: Path, manifest: Manifest) -> None:
    """Write README.md and the figures `token_lengths.png` and `rows_by_source.png` of a built data set.

    Args:
        output_dir: the data set's folder, which has `data/*.parquet`.
        manifest: the content of its `manifest.json`. The same manifest gives the same bytes.
    """
    pictures = _pictures(manifest)
    for picture in pictures:
        write_atomically(output_dir / picture.file, picture.png)
    front_matter = yaml.safe_dump(_front_matter(manifest), sort_keys=False, allow_unicode=True)
    text = f"---\n{front_matter}---\n\n{to_markdown(_blocks(manifest, pictures, output_dir))}"
    write_atomically(output_dir / "README.md", text.encode())


# --- front matter ---------------------------------------------------------------------------------------------


def _rows(manifest: Manifest) -> int:
    return sum(manifest["rows"]["source"].values())


def _licence(source: SourceManifest) -> str:
    return UNKNOWN_LICENCE if source["licence"] in (None, "", "not stated") else source["licence"]


def _licences(manifest: Manifest) -> list[str]:
    """Licences of the sources with rows left."""
    return sorted({_licence(source) for source in manifest["sources"].values() if source["kept"]})


def _front_matter(manifest: Manifest) -> dict[str, object]:
    """The hub's and `load_dataset`'s settings: without `data_files`, removed.parquet would be read as data."""
    size = next((name for name, limit in _SIZES if _rows(manifest) < limit), "10M<n<100M")
    return {
        "license": _licences(manifest),
        "language": manifest["recipe"].get("languages") or ["en"],
        "task_categories": ["text-generation"],
        "tags": ["hybrid-reasoning", manifest["stage"], "trl", *sorted(manifest["rows"]["domain"])],
        "size_categories": [size],
        "dataset_info": {
            "splits": [{"name": "train", "num_bytes": manifest["bytes"], "num_examples": _rows(manifest)}]
        },
        "configs": [
            {"config_name": "default", "data_files": [{"split": "train", "path": "data/*.parquet"}]},
        ],
    }


# --- figures --------------------------------------------------------------------------------------------------


def _pictures(manifest: Manifest) -> list[Picture]:
    with matplotlib.rc_context(STYLE):
        pictures = [
            Picture(
                "rows_by_source.png",
                to_png(_rows_by_source(manifest["sources"])),
                "What became of every row",
                "Shares of the rows read from each source, by the step that removed them. At the right: rows kept of "
                "rows read.",
            )
        ]
        if any(tokens["max"] for tokens in manifest["tokens"].values()):
            pictures.append(
                Picture(
                    "token_lengths.png",
                    to_png(_token_lengths(manifest["tokens"])),
                    "Tokens per example",
                    "Prompt and response together, on a logarithmic axis; dashed lines are medians.",
                )
            )
    return pictures


def _mode_name(mode: str) -> str:
    return mode.replace("_", " ")


def _token_lengths(tokens: Mapping[str, TokenStatistics]) -> Figure:
    figure = Figure(figsize=(WIDTH, 3.6), layout="constrained")
    axes = figure.add_subplot()
    for mode, statistics in tokens.items():
        edges, counts = statistics["histogram"]["edges"], statistics["histogram"]["counts"]
        color = MODE_COLORS.get(mode, NEITHER)
        label = f"{_mode_name(mode)} ({sum(counts):,} rows, median {statistics['median']:,.0f})"
        axes.stairs(counts, edges, fill=True, color=color, alpha=0.35)
        axes.stairs(counts, edges, color=color, linewidth=1.4, label=label)
        axes.axvline(statistics["median"], color=color, linewidth=1.2, linestyle="--")
    axes.set(xscale="log", xlabel="tokens (prompt and response)", ylabel="rows")
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    figure.legend(loc="outside upper left", ncols=3)
    return figure


def _steps(sources: Mapping[str, SourceManifest]) -> list[str]:
    """Names of the steps that removed rows, in the order in which they ran."""
    names = dict.fromkeys(step["name"] for source in sources.values() for step in source["steps"])
    return [name for name in names if any(_dropped(source, name) for source in sources.values())]


def _rows_by_source(sources: Mapping[str, SourceManifest]) -> Figure:
    figure = Figure(figsize=(WIDTH, 1.3 + 0.42 * len(sources)), layout="constrained")
    axes = figure.add_subplot()
    names = list(sources)
    read = [max(source["rows_read"], 1) for source in sources.values()]
    left = [0.0] * len(names)
    removed = dict(zip(_steps(sources), REMOVED * len(_steps(sources)), strict=False))
    for outcome, color in ({"kept": KEPT} | removed).items():
        rows = [source["kept"] if outcome == "kept" else _dropped(source, outcome) for source in sources.values()]
        shares = [count / total for count, total in zip(rows, read, strict=True)]
        axes.barh(names, shares, left=left, color=color, height=0.68, label=outcome.replace("_", " "))
        left = [start + share for start, share in zip(left, shares, strict=True)]
    for row, source in enumerate(sources.values()):
        text = f"{source['kept']:,} of {source['rows_read']:,}"
        axes.text(1.01, row, text, va="center", ha="left", fontsize=9.2, color=INK)
    axes.set(xlim=(0, 1), xlabel="share of rows read")
    axes.xaxis.set_major_formatter(PERCENT_TICKS)
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", length=0)
    figure.legend(loc="outside upper left", ncols=5)
    return figure


def _dropped(source: SourceManifest, step: str) -> int:
    return sum(sum(entry["dropped"].values()) for entry in source["steps"] if entry["name"] == step)


# --- text -----------------------------------------------------------------------------------------------------


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f}{NO_BREAK}%" if whole else "–"


def _list(counts: Mapping[str, int]) -> str:
    """ "think 1,200 (60.0 %), no think 800 (40.0 %)" """
    total = sum(counts.values())
    return ", ".join(f"{_mode_name(name)} {count:,} ({_percent(count, total)})" for name, count in counts.items())


def _link(path: str) -> str:
    if looks_like_path(path) or "/" not in path or Path(path).exists():
        return f"`{Path(path).name}`"  # no path of the machine that built it
    return f"[{path}](https://huggingface.co/datasets/{path})"


def _source_table(manifest: Manifest) -> Table:
    header = ["Source", "From", "Licence", "Mode", "Domain", "Rows read", "Rows kept"]
    rows = [
        [
            name,
            _link(source["path"]),
            _licence(source),
            _mode_name(source["mode"] or "–"),
            source["domain"],
            f"{source['rows_read']:,}",
            f"{source['kept']:,}",
        ]
        for name, source in manifest["sources"].items()
    ]
    return Table(header, rows, labels=5)


def _removal_table(sources: Mapping[str, SourceManifest]) -> Table:
    total = sum(source["rows_read"] for source in sources.values())
    rows = []
    for step in _steps(sources):
        reasons: Counter[str] = Counter()
        for source in sources.values():
            for entry in source["steps"]:
                if entry["name"] == step:
                    reasons.update(entry["dropped"])
        rows += [
            [step, f"`{reason}`", f"{count:,}", _percent(count, total)]
            for reason, count in sorted(reasons.items())
            if count
        ]
    return Table(["Step", "Reason", "Rows", "Of all read"], rows, labels=2)


def _token_table(tokens: Mapping[str, TokenStatistics]) -> Table:
    rows = [
        [_mode_name(mode), *(f"{value:,.0f}" for value in (s["mean"], s["median"], s["p95"], s["max"]))]
        for mode, s in tokens.items()
    ]
    return Table(["Mode", "Mean", "Median", "95th percentile", "Longest"], rows)


def _licence_note(manifest: Manifest) -> Paragraph:
    licences = _licences(manifest)
    if len(licences) == 1:
        return Paragraph(f"Licence of the source{'s' if len(manifest['sources']) > 1 else ''}: {licences[0]}.")
    restricted = [name for name in licences if "nc" in name.split("-")]
    warning = (
        f"Warning, licences differ: {', '.join(licences)}. Every row stays under the licence of its source, which the "
        "column `source` names; the data set as a whole may be used only as all of them allow."
    )
    if restricted:
        warning += f" Not for commercial use: {', '.join(restricted)}."
    if UNKNOWN_LICENCE in licences:
        warning += " Where the licence is unknown, ask before you publish."
    return Paragraph(warning)


def _not_read(sources: Mapping[str, SourceManifest]) -> list[Block]:
    """Name the columns of the sources that look like content and were not read."""
    unread = {name: source.get("not_read") or [] for name, source in sources.items()}
    lines = [f"{name}: {', '.join(f'`{column}`' for column in columns)}" for name, columns in unread.items() if columns]
    return [Paragraph("Columns that look like content and were not read:"), Bullets(lines)] if lines else []


def _blocks(manifest: Manifest, pictures: list[Picture], output_dir: Path) -> list[Block]:
    stage, sources, rows = manifest["stage"], manifest["sources"], manifest["rows"]
    read = sum(source["rows_read"] for source in sources.values())
    mode_format = as_format(manifest["recipe"].get("mode_format") or LHRM).name
    blocks: list[Block] = [
        Heading(f"Data for {_STAGES[stage]}", level=1),
        Lead(f"{_rows(manifest):,} rows of {read:,} read from {len(sources)} sources."),
        _licence_note(manifest),
        Bullets(
            [f"By {key}: {_list(rows[key])}." for key in ("mode", "domain") if rows.get(key)]
            + [f"Columns: {_COLUMNS[stage].format(mode_format=mode_format)}, and `source`, `domain`, `id` and more."]
        ),
        Heading("Load it"),
        Code(
            "from datasets import load_dataset\n\n"
            f'dataset = load_dataset("{output_dir.name}", split="train")  # the path of this folder, or its hub id',
            "python",
        ),
        Paragraph(f"To train on it: `train_data: {output_dir.name}` in a recipe of `hgpo-trl {stage}`."),
        Heading("Sources"),
        _source_table(manifest),
        *_not_read(sources),
        pictures[0],
        Heading("What was removed"),
        _removal_table(sources),
        Paragraph("`removed.parquet` names every removed row with the step, the reason and details."),
    ]
    if manifest["decontamination"]:
        hits = [f"{name}: {count:,}" for name, count in manifest["decontamination"].items()]
        blocks += [Heading("Overlap with benchmarks"), Paragraph("Rows removed because of each:"), Bullets(hits)]
    if len(pictures) > 1:
        blocks += [Heading("Length"), _token_table(manifest["tokens"]), pictures[1]]
    recipe = yaml.safe_dump(manifest["recipe"], sort_keys=False, allow_unicode=True, width=120).rstrip()
    versions = ", ".join(f"{name} {version}" for name, version in manifest["versions"].items())
    return [
        *blocks,
        Heading("How it was built"),
        Paragraph(f"`hgpo-trl data {stage}` with the recipe below ({versions}). `manifest.json` holds all counts."),
        Code(recipe, "yaml"),
    ]

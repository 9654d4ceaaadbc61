"""Reading data sets by the one name that a recipe gives them."""

from pathlib import Path

from datasets import Dataset, load_dataset, load_dataset_builder

from hgpo_trl.files import looks_like_path

_BUILDERS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".csv": "csv"}


def load_data(field: str, name: str, split: str = "train") -> Dataset:
    """Load a data set from a local file (parquet, JSON lines, JSON, CSV), a local folder of such files, or the hub.

    Args:
        field: the recipe's field that holds the name, for messages.
        name: path or hub id.
        split: split to take; a single local file has only "train".

    Raises:
        ValueError: the name looks like a path and nothing is there, the file type is unknown, or there are no rows.
    """
    path = Path(name)
    if path.is_file() and path.suffix not in _BUILDERS:
        raise ValueError(f"{field}={name!r}: file type {path.suffix!r} is not one of {', '.join(_BUILDERS)}.")
    try:
        if path.is_file():
            return load_dataset(_BUILDERS[path.suffix], data_files=str(path), split=split)
        if path.is_dir():
            return _load_folder(path, split)
    except (StopIteration, ValueError) as error:  # datasets' ways of saying that there are no rows
        if isinstance(error, ValueError) and "corresponds to no data" not in str(error):
            raise
        raise ValueError(f"{field}={name!r} has no rows. Give it at least one.") from None
    if path.suffix in _BUILDERS or looks_like_path(name):
        raise ValueError(
            f"{field}={name!r}: there is no such file or folder. Build it with `hgpo-trl data`, or fix the path."
        )
    return load_dataset(name, split=split)


def _load_folder(path: Path, split: str) -> Dataset:
    """The files that a folder (its README.md, if it has one) gives for a split.

    `load_dataset(folder)` keeps what it has read under the folder's name, and takes another folder of that name with
    the same README configuration for it; files that are named are told apart by path and time.
    """
    data_files = load_dataset_builder(str(path)).config.data_files or {}
    files = [str(file) for file in data_files.get(split, [])]
    if not files or Path(files[0]).suffix not in _BUILDERS:
        return load_dataset(str(path), split=split)  # which says what is wrong, or knows the type
    return load_dataset(_BUILDERS[Path(files[0]).suffix], data_files=files, split="train")

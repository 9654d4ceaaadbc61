"""`hgpo_trl.common.imports`: a user's own files, by where they are and not by what they are called."""

import os
from pathlib import Path

import pytest

from hgpo_trl.common.errors import UserError
from hgpo_trl.common.imports import load_module
from hgpo_trl.rewards import load_reward

COUNTING = """
from pathlib import Path

runs = Path(__file__).with_suffix(".runs")
runs.write_text(runs.read_text() + "x" if runs.exists() else "x")


def first(completions, **kwargs):
    return [1.0] * len(completions)


def second(completions, **kwargs):
    return [2.0] * len(completions)
"""


def write(path: Path, text: str = COUNTING) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def test_two_functions_of_one_file_run_it_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However the file is named: relative, absolute, through a link or through `..`."""
    path = write(tmp_path / "rewards" / "r.py")
    (tmp_path / "link.py").symlink_to(path)
    monkeypatch.chdir(tmp_path)
    names = [f"{path}:first", "rewards/r.py:second", "link.py:first", f"rewards{os.sep}..{os.sep}rewards/r.py:second"]
    rewards = [load_reward(name) for name in names]
    assert [reward(["a"]) for reward in rewards] == [[1.0], [2.0], [1.0], [2.0]]  # type: ignore[operator]
    assert rewards[0] is rewards[2]
    assert path.with_suffix(".runs").read_text() == "x"


def test_files_of_one_name_are_apart(tmp_path: Path) -> None:
    modules = [load_module(str(write(tmp_path / folder / "r.py", f"WHERE = {folder!r}"))) for folder in "ab"]
    assert [module.WHERE for module in modules] == ["a", "b"]
    assert [load_module(str(tmp_path / folder / "r.py")) for folder in "ab"] == modules


def test_a_file_that_fails_leaves_nothing_behind(tmp_path: Path) -> None:
    path = write(tmp_path / "r.py", "1 / 0")
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            load_module(str(path))
    write(path, "X = 1  # of another length, by which Python tells a cached file")
    assert load_module(str(path)).X == 1


def test_what_a_users_package_lacks_is_shown_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "mine" / "__init__.py", "import a_package_that_is_not_installed")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ModuleNotFoundError, match="a_package_that_is_not_installed"):
        load_module("mine.rewards")


@pytest.mark.parametrize("name", ["nowhere/r.py", "no.such.package", "hgpo_trl.nothing", ".relative"])
def test_what_is_not_there(name: str) -> None:
    with pytest.raises(UserError, match=r"There is no (file|module)"):
        load_module(name)

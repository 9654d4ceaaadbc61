"""The package: what the wheel holds, and recipes found by name."""

import importlib
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

import hgpo_trl
from hgpo_trl.common import recipe_files
from hgpo_trl.common.environment import apply_env
from hgpo_trl.common.recipe_files import find_recipe, nearest_recipe, package_recipes, recipe_names, summary
from hgpo_trl.scripts import recipes

ROOT = Path(__file__).parents[1]
PACKAGED = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "recipes").rglob("*") if path.is_file())


# --- the wheel ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from the source distribution with the tools of this environment."""
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds the wheel's content and nothing else."""
    folder = tmp_path_factory.mktemp("installed")
    options = ["--quiet", "--no-deps", "--no-index", "--target", str(folder)]
    subprocess.run([sys.executable, "-m", "pip", "install", *options, str(wheel)], check=True)
    return folder


@pytest.mark.processes
def test_the_wheel_holds_every_file_of_the_package(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if name.startswith("hgpo_trl/")}
    paths = [path for path in (ROOT / "hgpo_trl").rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    files = {str(path.relative_to(ROOT)) for path in paths}
    assert names == files | {f"hgpo_trl/{name}" for name in PACKAGED}


@pytest.mark.processes
def test_the_wheel_has_the_packages_version(wheel: Path) -> None:
    assert wheel.name.startswith(f"hgpo_trl-{hgpo_trl.__version__}-py3-")


@pytest.mark.processes
def test_the_installed_command_lists_its_own_recipes(installed: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(installed / "bin" / "hgpo-trl"), "recipes"],
        cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(installed)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert f"{installed}/hgpo_trl/recipes:" in done.stdout
    assert all(f"  {name} " in done.stdout for name in recipe_names(ROOT / "recipes"))
    assert str(ROOT) not in done.stdout


@pytest.mark.processes
@pytest.mark.parametrize(
    "entry",
    [
        ["hgpo_trl.cli", "data"],
        ["hgpo_trl.scripts.data_task"],
        ["accelerate.commands.launch", "--num_processes=1", "-m", "hgpo_trl.scripts.data_task"],
    ],
    ids=["hgpo-trl", "python -m", "accelerate launch"],
)
def test_the_installed_package_finds_a_recipe_by_name(entry: list[str], installed: Path, tmp_path: Path) -> None:
    """Every entry builds the demo's data in a folder without any recipe."""
    size = ["--num_hft=12", "--num_hgpo=9", "--num_eval=9", "--output_dir=out"]
    done = subprocess.run(
        [sys.executable, "-m", *entry, "--config", "chain-sum/data", *size],
        cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(installed)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "out" / "base" / "model.safetensors").is_file()


# --- recipes by name ------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Work in an empty folder, with a package whose recipes are in `package/`; write recipes there."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(recipe_files, "package_recipes", lambda: tmp_path / "package")
    for name in [name for name in os.environ if name.startswith("PROBE")]:
        monkeypatch.delenv(name)

    def write(*names: str) -> Path:
        for name in names:
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"# About {name}. More.\nenv: {{PROBE: {name}}}\n", encoding="utf-8")
        return tmp_path

    return write


def test_a_file_comes_before_a_recipe_here_and_that_before_the_packages(folder: Callable[..., Path]) -> None:
    places = ["package/task/hft.yaml", "recipes/task/hft.yaml", "task/hft"]
    for place in places:
        root = folder(place)
        found = find_recipe("task/hft")
        assert found is not None
        assert found.resolve() == root / place


@pytest.mark.parametrize("name", ["task/hft", "task/hft.yaml", "$STUDY/hft"])
def test_spellings_of_a_name(name: str, folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STUDY", "task")
    root = folder("package/task/hft.yaml")
    assert find_recipe(name) == root / "package/task/hft.yaml"


def test_a_folder_is_no_recipe(folder: Callable[..., Path]) -> None:
    root = folder("package/task/hft.yaml", "task/hft/notes.txt")
    assert find_recipe("task/hft") == root / "package/task/hft.yaml"
    assert find_recipe("task") is None


def test_the_environment_of_a_recipe_found_by_name(folder: Callable[..., Path]) -> None:
    folder("package/task/hft.yaml")
    apply_env(["--config", "task/hft"])
    assert os.environ.pop("PROBE") == "package/task/hft.yaml"
    apply_env(["--config=task/nothing"])  # the stage's parser refuses it
    assert "PROBE" not in os.environ


@pytest.mark.parametrize(("name", "nearest"), [("chainsum/hft", "chain-sum/hft"), ("two-domain/hgpo", None)])
def test_nearest_recipe(name: str, nearest: str | None, folder: Callable[..., Path]) -> None:
    folder("package/chain-sum/hft.yaml", "recipes/study/report.yaml")
    assert nearest_recipe(name) == nearest


def test_unknown_recipe_is_refused_with_the_nearest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        importlib.import_module("hgpo_trl.scripts.data").main(["--config", "chain-sum/dta"])
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert "--config chain-sum/dta: there is no such recipe; did you mean 'chain-sum/data'?" in error


def test_every_recipe_says_in_its_first_line_what_it_is() -> None:
    names = recipe_names(package_recipes())
    assert len(names) > 20
    for name, path in names.items():
        assert path.read_text(encoding="utf-8").startswith("# "), name
        assert len(summary(path).split()) >= 4, name


def test_recipes_lists_those_here_first(folder: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    folder("package/task/hft.yaml", "recipes/study/hgpo.yaml", "recipes/accelerate/cpu.yaml")
    recipes.main([])
    text = capsys.readouterr().out
    assert "  study/hgpo  About recipes/study/hgpo.yaml\n" in text
    assert text.index("study/hgpo") < text.index("chain-sum/hgpo")
    assert "accelerate/cpu" not in text

"""What type checkers and editors make of a user's script, where igstore is installed as editable."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import igstore

ROOT = Path(__file__).resolve().parents[1]

# A line that a checker has to object to ends with a word of the objection.
SCRIPT = """
import igstore
from igstore import MaskedImageNet, MaskOptions, evaluate

MaskedImageNet("x.zarr", p=50, keep="top")
MaskedImageNet("x.zarr", p=50, kep="top")  # kep
MaskedImageNet("x.zarr", p="half")  # "p"
found = evaluate("x.zarr", p=[90, 50], keep="top")
evaluate("x.zarr", kep="top")  # kep
igstore.evaluate("x.zarr", keep="left")  # left
igstore.build_store("resnet50", "images", "x.zarr", n_steps="many")  # "n_steps"
igstore.store_info("x.zarr").n_bilt  # n_bilt
igstore.maskd_view  # maskd_view
first: str = found.rows[0].top1  # float
second: float = found.rows[0].top1
third: float = MaskOptions(p=30).p
"""


@pytest.fixture(scope="module")
def editable(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of an environment with igstore alone, as ``pip install --editable`` installs it."""
    pytest.importorskip("setuptools")
    folder = tmp_path_factory.mktemp("types")
    checkout = folder / "checkout"
    ignored = shutil.ignore_patterns("__pycache__", "*.so", "*.egg-info")
    shutil.copytree(ROOT / "igstore", checkout / "igstore", ignore=ignored)
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, checkout)
    build = f"import setuptools.build_meta as backend; backend.build_editable({str(folder)!r})"
    without_kernels = os.environ | {"CC": "false", "CXX": "false"}  # compiling them would take a minute
    subprocess.run(
        [sys.executable, "-c", build], cwd=checkout, env=without_kernels, check=True, capture_output=True, text=True
    )
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "venv"], check=True)
    (packages,) = (folder / "venv" / "lib").glob("python*/site-packages")
    (wheel,) = folder.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(packages)
    return folder / "venv" / "bin" / "python"


def objections(command: list[str], folder: Path) -> dict[int, str]:
    """What a checker says of the script, by line."""
    (folder / "script.py").write_text(SCRIPT)
    done = subprocess.run([*command, "script.py"], cwd=folder, capture_output=True, text=True, check=False)
    found: dict[int, str] = {}
    for line, words in re.findall(r"script\.py:(\d+)[:\d]*(?: -)? error: (.*)", done.stdout):
        found[int(line)] = found.get(int(line), "") + words
    assert found, done.stdout + done.stderr
    return found


def check(found: dict[int, str]) -> None:
    expected = {
        number: words for number, line in enumerate(SCRIPT.splitlines(), 1) for words in re.findall("  # (.*)", line)
    }
    assert found.keys() == expected.keys(), found
    for number, words in expected.items():
        assert words in found[number]


def test_mypy(editable, tmp_path):
    pytest.importorskip("mypy")
    check(objections([sys.executable, "-m", "mypy", "--strict", "--python-executable", str(editable)], tmp_path))


def test_pyright(editable, tmp_path):
    pyright = shutil.which("pyright") or pytest.skip("pyright is not installed")
    check(objections([pyright, "--pythonpath", str(editable)], tmp_path))


def test_editors_list_the_public_names_and_their_parameters(tmp_path):
    jedi = pytest.importorskip("jedi")
    project = jedi.Project(tmp_path, sys_path=[str(ROOT), *sys.path])
    listed = {name.name for name in jedi.Script("import igstore\nigstore.", project=project).complete()}
    assert set(igstore.__all__) <= listed
    (signature,) = jedi.Script("import igstore\nigstore.evaluate(", project=project).get_signatures()
    assert [parameter.name for parameter in signature.params][:2] == ["stores", "models"]


BEFORE = ["", "import igstore.evaluate", "import igstore.curves", "from igstore.evaluate import main"]


@pytest.mark.parametrize("before", BEFORE)
def test_evaluate_is_a_function_whatever_was_imported_before(before):
    lines = [
        before or "pass",
        "import inspect, pickle",
        "from igstore import evaluate",
        "import igstore, igstore.evaluate",
        "assert inspect.isfunction(evaluate) and evaluate is igstore.evaluate",
        "assert pickle.loads(pickle.dumps(evaluate)) is evaluate",
        "assert list(inspect.signature(evaluate).parameters)[:2] == ['stores', 'models']",
    ]
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_evaluate_is_a_command_too():
    module = [sys.executable, "-W", "error", "-m", "igstore.evaluate", "--help"]
    done = subprocess.run(module, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("usage: igstore evaluate")

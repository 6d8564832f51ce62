"""The command line as a whole: every command takes the same options, prints where it should, and says what it takes."""

from __future__ import annotations

import argparse
import importlib
import inspect
import io
import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from stores import make_store

import igstore
from igstore import cli
from igstore.__main__ import main
from igstore.cli import COMMANDS, Progress, module_of
from igstore.completion import whole_parser

NETWORK = "networks:Smooth"


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with photographs, a ranked store, and an evaluation of it."""
    folder = tmp_path_factory.mktemp("place")
    (folder / "photographs").mkdir()
    for index in range(2):
        pixels = np.random.default_rng(index).integers(0, 256, (24, 24, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "photographs" / f"{index}.png")
    (folder / "many").mkdir()
    for index in range(8):
        shutil.copy(folder / "photographs" / f"{index % 2}.png", folder / "many" / f"{index}.png")
    (folder / "labels.csv").write_text("file,class_index\n0.png,1\n1.png,2\n")
    np.save(folder / "maps.npy", np.random.default_rng(2).normal(size=(2, 24, 24)).astype(np.float32))
    make_store(folder / "toy.zarr", 6, size=(24, 24))
    for part in (1, 2):
        store, classifier = folder / f"part{part}.zarr", igstore.load_classifier(NETWORK, crop=24)
        igstore.build_store(
            classifier, folder / "photographs", store, n_steps=2, shard_size=1, part=f"{part}/2", rank=False
        )
    evaluation = [
        "evaluate",
        str(folder / "toy.zarr"),
        "--models",
        NETWORK,
        "--p",
        "50",
        "--out",
        str(folder / "found"),
    ]
    assert main([*evaluation, "--quiet"]) == cli.DONE
    return folder


# For every command: arguments that make it finish in `place`, and a key of the JSON that it then prints.
ARGUMENTS = {
    "build": (["--model", NETWORK, "--data", "photographs", "--crop", "24", "--n-steps", "2"], "n_built"),
    "calibrate": (
        ["--model", NETWORK, "--data", "many", "--crop", "24", "--n-steps", "2", "--n-images", "8"],
        "rules",
    ),
    "rank": (["toy.zarr", "--score", "absolute"], "ranked"),
    "evaluate": (["toy.zarr", "--models", NETWORK, "--p", "50"], "rows"),
    "report": (["found", "--out", "page.html"], "page"),
    "info": (["toy.zarr"], "n_images"),
    "show": (["toy.zarr", "--p", "50"], "picture"),
    "view": (["toy.zarr", "--save", "page"], "page"),
    "verify": (["toy.zarr"], "findings"),
    "completion": (["bash"], "script"),
    "curves": (["toy.zarr", "--model", NETWORK, "--steps", "2"], "auc"),
    "import": (
        ["maps.npy", "--made-by", "nobody", "--images", "photographs", "--model", NETWORK, "--crop", "24"],
        "n_built",
    ),
    "merge": (["part1.zarr", "part2.zarr", "--out", "whole.zarr"], "n_images"),
    "export": (["toy.zarr", "copy.zarr"], "path"),
}

STATUS = {"verify": cli.FAILED}  # the toy's outputs are made up, and so not those that its maps add up to

WITH_RESULT = {
    "evaluate",
    "curves",
    "info",
    "verify",
    "completion",
}  # the others make files, and are silent about it when quiet


@pytest.fixture
def here(place, tmp_path, monkeypatch):
    """The current folder is a copy of `place`."""
    folder = shutil.copytree(place, tmp_path / "copy")
    monkeypatch.chdir(folder)
    return folder


def test_every_command_is_tried():
    assert sorted(ARGUMENTS) == sorted(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_json_is_all_there_is_on_stdout(command, here, capsys):
    arguments, key = ARGUMENTS[command]
    assert main([command, *arguments, "--json"]) == STATUS.get(command, cli.DONE)
    printed = capsys.readouterr().out
    assert key in json.loads(printed)
    assert printed.count("\n") == 1


@pytest.mark.parametrize("command", COMMANDS)
def test_quiet_prints_the_result_and_nothing_else(command, here, capsys):
    assert main([command, *ARGUMENTS[command][0], "--quiet"]) == STATUS.get(command, cli.DONE)
    printed = capsys.readouterr()
    assert printed.err == ""
    assert bool(printed.out) == (command in WITH_RESULT)
    assert logging.getLogger("igstore").level == logging.NOTSET  # what is run next is not quiet


@pytest.mark.parametrize("command", COMMANDS)
def test_without_them_it_says_what_it_did(command, here, capsys):
    assert main([command, *ARGUMENTS[command][0]]) == STATUS.get(command, cli.DONE)
    assert capsys.readouterr().out


@pytest.mark.parametrize("command", COMMANDS)
def test_help(command):
    parser = module_of(command).parser()
    said = " ".join(parser.format_help().split())
    assert said.startswith(f"usage: igstore {command} ")
    assert "--quiet" in said
    assert "--json" in said
    for nothing in ("None", "True", "False", "[]", "==SUPPRESS=="):
        assert f"default: {nothing}" not in said
    assert all(action.help for action in parser._actions)


FUNCTIONS = {
    "build": igstore.build_store,
    "import": igstore.import_maps,
    "rank": igstore.rank_store,
    "evaluate": igstore.evaluate,
    "report": igstore.make_report,
    "curves": igstore.insertion_deletion,
    "show": igstore.show_store,
    "verify": igstore.verify_store,
    "export": igstore.export_store,
}


@pytest.mark.parametrize("command", FUNCTIONS)
def test_an_option_that_is_left_out_is_as_in_python(command):
    parameters = inspect.signature(FUNCTIONS[command]).parameters
    parser = module_of(command).parser()
    shared = [action for action in parser._actions if action.dest in parameters]
    for action in shared:
        default = parameters[action.dest].default
        if default is not inspect.Parameter.empty and not action.required:
            given = None if action.default == "auto" and action.dest == "batch_size" else action.default
            assert given == default, action.dest
            if isinstance(default, str | float | tuple) and default and not isinstance(default, bool):
                said = " ".join(map(str, default)) if isinstance(default, tuple) else str(default)
                assert f"(default: {said})" in " ".join(parser.format_help().split())
    assert shared


def test_a_parser_takes_the_defaults_of_a_function():
    def function(one, *, two=2, three=None, four=(4, 5), five=True, six=False, seven=7):
        """What the command calls."""

    parser = cli.Parser("some", "Some command.")
    for name in ("one", "two", "three", "four", "eight"):
        parser.add_argument(f"--{name}", help=name)
    parser.add_argument("--no-five", dest="five", action="store_false", help="five")
    parser.add_argument("--six", action="store_true", help="six")
    parser.add_argument_group("more").add_argument("--seven", default=8, help="its own")
    options, _ = parser.of(function).parse([])
    assert vars(options) == {
        "one": None,
        "two": 2,
        "three": None,
        "four": (4, 5),
        "eight": None,
        "five": True,
        "six": False,
        "seven": 8,
    }


def test_an_option_is_the_same_in_all_commands():
    found: dict[str, dict[str, tuple]] = {}
    for command in COMMANDS:
        for action in module_of(command).parser()._actions:
            for option in action.option_strings:
                form = (type(action).__name__, action.metavar, getattr(action.type, "__name__", None))
                found.setdefault(option, {})[command] = form
    free = {
        "--out",
        "--keep",
        "--data",
        "--batch-size",
    }  # of a command's own kind: a picture, a page, a folder
    different = {
        option: forms for option, forms in found.items() if option not in free and len(set(forms.values())) > 1
    }
    assert not different


def test_the_table_of_contents_names_every_command(capsys):
    assert main(["--help"]) == cli.DONE
    lines = capsys.readouterr().out.splitlines()
    for command, purpose in COMMANDS.items():
        assert any(line.split() == [command, *purpose.split()] for line in lines)
    assert max(map(len, lines)) <= 100


@pytest.mark.parametrize(("given", "said"), [("bild", "did you mean build?"), ("x", ", ".join(COMMANDS))])
def test_an_unknown_command_is_a_mistake(given, said, capsys):
    assert main([given]) == cli.MISUSED
    assert (
        capsys.readouterr().err
        == f"igstore: there is no command {given!r}; {'' if '?' in said else 'there are '}{said}\n"
    )


def test_parsers_need_no_torch():
    script = (
        "import sys\n"
        "from igstore.completion import whole_parser\n"
        "whole_parser()\n"
        "sys.exit(','.join(name for name in ('torch', 'torchvision', 'matplotlib') if name in sys.modules) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_whole_parser_takes_what_the_commands_take():
    whole = whole_parser()
    for command, (arguments, _) in ARGUMENTS.items():
        assert isinstance(whole.parse_args([command, *arguments]), argparse.Namespace)


@pytest.mark.parametrize(
    ("words", "completed"),
    [
        (["igstore", "eva"], ["evaluate"]),
        (["igstore", "show", "--fi"], ["--fill"]),
        (["igstore", "show", "--select", "m"], ["mass"]),
        (["igstore", "info", "toy"], ["toy.zarr"]),
    ],
    ids=lambda words: " ".join(words),
)
def test_bash_completes(words, completed, here, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(igstore.__file__).parents[1]))
    pytest.importorskip("shtab")
    if shutil.which("bash") is None:
        pytest.skip("needs bash")
    done = subprocess.run([sys.executable, "-m", "igstore", "completion", "bash"], capture_output=True, check=True)
    (here / "igstore.bash").write_bytes(done.stdout)
    script = f"""
        source ./igstore.bash
        COMP_WORDS=({" ".join(words)}); COMP_CWORD={len(words) - 1}
        $(complete -p igstore | sed 's/.*-F \\([^ ]*\\).*/\\1/') igstore {words[-1]} {words[-2]}
        printf '%s\\n' "${{COMPREPLY[@]}}"
    """
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, cwd=here, check=False)
    assert done.stdout.split() == completed, done.stderr


def test_completion_without_shtab_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert main(["completion", "bash"]) == cli.MISUSED
    assert "igstore[completion]" in capsys.readouterr().err


def test_a_mistake_is_one_line_and_no_json(capsys):
    assert main(["info", "nothing.zarr", "--json"]) == cli.MISUSED
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1


def test_json_has_no_numbers_that_json_has_not(capsys):
    cli.Output(json=True).result({"error": float("inf"), "path": Path("a"), "pair": (1, 2.5)}, [])
    assert json.loads(capsys.readouterr().out) == {"error": None, "path": "a", "pair": [1, 2.5]}


def test_progress_in_a_log_file_is_whole_lines(monkeypatch):
    log = io.StringIO()  # not a terminal
    monkeypatch.setattr(sys, "stderr", log)
    with Progress(5, done=2, label="work") as progress:
        # at once, so that a slow start does not look like a hang
        assert log.getvalue() == "work: 2/5 images\n"
        for _ in range(3):
            progress.advance(1)
    assert "\r" not in log.getvalue()
    assert "\x1b" not in log.getvalue()
    assert [line.partition(",")[0] for line in log.getvalue().splitlines()] == ["work: 2/5 images", "work: 5/5 images"]


def test_progress_of_what_is_often_done_at_once_is_not_shown_at_once(monkeypatch):
    log = io.StringIO()
    monkeypatch.setattr(sys, "stderr", log)
    with Progress(3, label="check", patience=60) as progress:
        progress.advance(3)
    assert log.getvalue() == ""


@pytest.mark.parametrize(
    "error", [MemoryError(), MemoryError("Unable to allocate 7 TiB"), RuntimeError("can't start new thread")], ids=repr
)
def test_running_out_of_memory_is_one_line(error, capsys):
    def command(_):
        raise error

    assert cli.run(command, []) == cli.FAILED
    said = capsys.readouterr().err
    assert said.startswith("igstore: out of memory (")
    assert said.count("\n") == 1


def test_other_errors_of_the_runtime_are_not_hidden():
    def command(_):
        raise RuntimeError("something else")

    with pytest.raises(RuntimeError, match="something else"):
        cli.run(command, [])


@pytest.mark.parametrize(
    ("given", "policy"),
    [({}, "PASSIVE"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE"), ({"GOMP_SPINCOUNT": "5"}, None)],
    ids=["nothing", "a policy", "a count"],
)
def test_threads_wait_without_taking_cores_unless_told_otherwise(monkeypatch, given, policy):
    """It is set before a command's work begins, which is what imports torch."""
    monkeypatch.setenv("OMP_WAIT_POLICY", "")  # so that whatever is set is put back
    monkeypatch.delenv("OMP_WAIT_POLICY")
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    found = []
    cli.run(lambda _: found.append(os.environ.get("OMP_WAIT_POLICY")) or cli.DONE, [])
    assert found == [policy]


@pytest.mark.parametrize(
    ("command", "typed", "meant"),
    [
        ("build", "--modl", "--model"),
        ("build", "--n-step", "--n-steps"),
        ("evaluate", "--model", "--models"),
        ("export", "--formt=hdf5", "--format"),
        ("rank", "--blok", "--block"),
    ],
)
def test_a_misspelt_option_is_told_what_it_is_like(command, typed, meant, capsys):
    assert main([command, typed, "x"]) == cli.MISUSED
    assert f"did you mean {meant}?" in capsys.readouterr().err


@pytest.mark.parametrize("study", ["article", "demo", "figure", "masks_figure", "sizing", "bench rank", "bench gpu"])
def test_studies_answer_as_commands_do(study, capfd):
    """What `argparse` ends by itself is not a user's code that called `sys.exit`."""
    name, *arguments = study.split()
    main = importlib.import_module(f"pipelines.{name}.__main__" if arguments else f"pipelines.{name}").main
    if arguments:
        pytest.importorskip("captum")
    for given, status in ((["--help"], 0), (["--no-such-option"], 2)):
        with pytest.raises(SystemExit) as ended:
            cli.run(lambda argv: main(argv), [*arguments, *given])
        assert ended.value.code == status
        said = capfd.readouterr()
        assert "sys.exit" not in said.err
        assert ("usage:" in said.out) == (status == 0)

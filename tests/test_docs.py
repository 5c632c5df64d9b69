"""Holds: what README and docstrings show can be typed; requirements and imports agree; --help loads
no library of a step; functions are short, annotated and documented."""

import ast
import doctest
import importlib
import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType

import pytest
from conftest import ROOT, assert_refused, commands, load_evaluate, run_script

STEPS = ["build_dataset", "check_contamination", "finetune", "merge", "evaluate", "tui"]
SCRIPTS = [*STEPS, "common", "prefix_lm"]
LONGEST_FUNCTION = 45  # lines of code below its docstring
LONGEST_MAIN = 30  # lines in all: it reads as the recipe


def load_script(name: str) -> ModuleType:
    if name == "evaluate":
        return load_evaluate()
    return importlib.import_module(name)


def source_of(name: str) -> str:
    return (ROOT / f"{name}.py").read_text(encoding="utf-8")


# --- what is shown can be typed -------------------------------------------------------------------


def run_shown(command: list[str], cwd: Path) -> str:
    """Run a command as a user would type it; it must succeed. Returns its output."""
    script = command[0].removesuffix(".py")
    arguments = command[1:]
    done = run_script(script, *arguments, cwd=cwd)
    assert done.returncode == 0, (command, done.stderr)
    return done.stdout


@pytest.mark.parametrize("file", ["README.md", "demo.sh", *[f"{name}.py" for name in STEPS]])
def test_shown_commands_parse(file: str, monkeypatch) -> None:
    shown = commands((ROOT / file).read_text(encoding="utf-8"))
    assert shown
    for command in shown:
        name = command[0].removesuffix(".py")
        assert name in SCRIPTS
        if name not in STEPS:
            continue
        arguments = command[1:]
        if name == "evaluate" and "--model" not in arguments:
            arguments += ["--model", "x"]

        script = load_script(name)
        with monkeypatch.context() as patch:
            # files that a command names may be made by the command before it
            patch.setattr(Path, "is_file", lambda path: True)
            patch.setattr(Path, "is_dir", lambda path: True)
            patch.setattr(script, "check_input", lambda path, mend: path, raising=False)
            settings = script.parse_args(arguments)
        assert vars(settings), command


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with demo/ and, as the README's full run wants them, raw files in raw/."""
    (tmp_path / "demo").symlink_to(ROOT / "demo")
    shutil.copytree(ROOT / "demo/data", tmp_path / "raw")
    (tmp_path / "raw/reclor").mkdir()
    row = {
        "context": "All squares are rectangles.",
        "question": "Which algorithm follows?",
        "answers": ["a", "b", "c", "d"],
        "label": 1,
        "id_string": "x",
    }
    (tmp_path / "raw/reclor/val.json").write_text(json.dumps([row]))
    return tmp_path


@pytest.mark.slow
def test_the_run_on_real_files_runs(place) -> None:
    """The commands of benchmarks/README.md, on the demo's data; the walk back ends well."""
    text = (ROOT / "benchmarks/README.md").read_text(encoding="utf-8")
    full_run = [command for command in commands(text) if "out/full" in shlex.join(command)]
    names = [command[0].removesuffix(".py") for command in full_run]
    assert names == ["build_dataset", "check_contamination", "tui", *STEPS[1:]]
    for command in full_run:
        shown = run_shown(command, cwd=place)
    assert shown.endswith("all is as recorded\n")


@pytest.mark.parametrize("name", SCRIPTS)
def test_examples_in_docstrings(name: str) -> None:
    failed, tried = doctest.testmod(load_script(name))
    assert failed == 0
    assert tried > 0


# --- packages and imports -------------------------------------------------------------------------


def imports_of(nodes: Iterable[ast.AST]) -> set[str]:
    """The packages and modules that import statements among these nodes name."""
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            for alias in node.names:
                found.add(alias.name.partition(".")[0])
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add(node.module.partition(".")[0])
    return found


def required_packages() -> set[str]:
    """What requirements.txt lists for the pipeline and the terminal UI, by the names to import."""
    text = (ROOT / "requirements.txt").read_text(encoding="utf-8")
    text, _, _ = text.partition("# --- tests")
    names = re.findall(r"^([A-Za-z][\w-]*)", text, re.MULTILINE)
    packages = {name.replace("-", "_") for name in names}
    packages.remove("nvidia_ml_py")
    packages.add("pynvml")  # which that package is imported as
    return packages


def test_requirements_are_imported_and_imports_required() -> None:
    imported = set()
    sources = ""
    for name in SCRIPTS:
        source = source_of(name)
        imported |= imports_of(ast.walk(ast.parse(source)))
        sources += source
    third_party = imported - set(sys.stdlib_module_names) - set(SCRIPTS)

    required = required_packages()
    assert third_party <= required
    for package in required - third_party:
        assert f'"{package}"' in sources  # imported by name


def test_the_top_imports_the_standard_library_and_ours() -> None:
    """So that --help is quick: what is heavy is imported where it is needed."""
    for name in ["common", *STEPS]:
        top = imports_of(ast.parse(source_of(name)).body)
        allowed = set(sys.stdlib_module_names) | set(SCRIPTS)
        if name == "tui":
            allowed |= {"textual", "textual_plotext", "rich"}
        assert top <= allowed, name


SHOW_HELP = """
import sys
sys.path.insert(0, ".")
sys.argv = ["script", "--help"]
import NAME as script
try:
    script.main()
finally:
    print("loaded:", *sys.modules)
"""
RUN_EVALUATE = """
import sys
sys.path.insert(0, ".")
import evaluate as script
script.run_main(script.main)
"""


def run_bare(code: str, flags: list[str]) -> subprocess.CompletedProcess:
    """Run code by a Python that has no installed packages."""
    command = [sys.executable, "-I", "-S", "-c", code, *flags]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


@pytest.mark.parametrize("name", STEPS)
def test_help_loads_no_library(name: str) -> None:
    """Of the steps it needs nothing installed; of the terminal UI not torch."""
    code = SHOW_HELP.replace("NAME", name)
    if name == "tui":
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    else:
        done = run_bare(code, flags=[])
    assert done.returncode == 0, done.stderr
    assert "usage:" in done.stdout
    loaded = done.stdout.rpartition("loaded:")[2].split()
    assert "common" in loaded
    for heavy in ["torch", "transformers", "datasets", "numpy", "pandas"]:
        assert heavy not in loaded


def test_without_the_environment_it_says_how_to_enter_it(tmp_path) -> None:
    flags = ["--model", "demo/base_model", "--local", "demo/data", "--out", str(tmp_path / "out")]
    done = run_bare(RUN_EVALUATE, flags)
    assert_refused(done, "no package", "source .venv/bin/activate")
    assert not list(tmp_path.iterdir())


# --- style ----------------------------------------------------------------------------------------


def functions_of(name: str) -> list[ast.FunctionDef]:
    """All functions of a script, methods and those within others too."""
    functions = []
    for node in ast.walk(ast.parse(source_of(name))):
        if isinstance(node, ast.FunctionDef):
            functions.append(node)
    return functions


@pytest.mark.parametrize("name", SCRIPTS)
def test_functions_are_short(name: str) -> None:
    for function in functions_of(name):
        body = function.body
        if ast.get_docstring(function) is not None and len(body) > 1:
            body = body[1:]
        assert function.end_lineno - body[0].lineno + 1 <= LONGEST_FUNCTION, function.name
        if function.name == "main":
            assert function.end_lineno - function.lineno + 1 <= LONGEST_MAIN


@pytest.mark.parametrize("name", SCRIPTS)
def test_signatures_are_annotated(name: str) -> None:
    for function in functions_of(name):
        if function.name != "__init__":
            assert function.returns, function.name
        for argument in function.args.args + function.args.kwonlyargs:
            if argument.arg != "self":
                assert argument.annotation, (function.name, argument.arg)


@pytest.mark.parametrize("name", SCRIPTS)
def test_functions_and_classes_have_docstrings(name: str) -> None:
    for node in ast.parse(source_of(name)).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            assert ast.get_docstring(node), node.name

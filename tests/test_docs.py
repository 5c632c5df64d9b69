"""Holds: what README and docstrings show can be typed; requirements and imports agree; later steps
import earlier ones only; help is quick and needs no third-party package."""

import ast
import doctest
import importlib
import json
import re
import resource
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType

import pytest
from conftest import ROOT, assert_refused, load_evaluate, run_script

STEPS = ["build_dataset", "check_contamination", "finetune", "merge", "evaluate", "tui"]
SCRIPTS = [*STEPS, "prefix_lm"]  # which is no step: it has the harness's flags and imports
README = (ROOT / "README.md").read_text(encoding="utf-8")
LONGEST_FUNCTION = 45  # lines of code below its docstring
LONGEST_MAIN = 30  # lines in all: it reads as the recipe
INNER = ["convert", "describe", "letters", "line", "read"]  # described by the function around them


def load_script(name: str) -> ModuleType:
    if name == "evaluate":
        return load_evaluate()
    return importlib.import_module(name)


def source_of(name: str) -> str:
    return (ROOT / f"{name}.py").read_text(encoding="utf-8")


# --- what is shown can be typed -------------------------------------------------------------------


def shown_commands(text: str) -> list[list[str]]:
    """Every `python SCRIPT.py ...` line of a text, split as a shell does: script, arguments."""
    found = re.findall(r"^\s*(?:\$ )?python (\w+\.py.*)$", text, flags=re.MULTILINE)
    return [shlex.split(line, comments=True) for line in found]


def run_shown(command: list[str], cwd: Path) -> str:
    """Run a command as a user would type it; it must succeed. Returns its output."""
    script = command[0].removesuffix(".py")
    arguments = command[1:]
    done = run_script(script, *arguments, cwd=cwd)
    assert done.returncode == 0, (command, done.stderr)
    return done.stdout


@pytest.mark.parametrize("file", ["README.md", "demo.sh", *[f"{name}.py" for name in STEPS]])
def test_shown_commands_parse(file: str, monkeypatch) -> None:
    commands = shown_commands((ROOT / file).read_text(encoding="utf-8"))
    assert commands
    for command in commands:
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


def test_first_command_of_each_docstring_runs(tmp_path) -> None:
    """One after the other, as a user would type them; they need neither hub nor GPU."""
    (tmp_path / "demo").symlink_to(ROOT / "demo")
    for name in STEPS:
        first = shown_commands(source_of(name))[0]
        assert first[0] == f"{name}.py"
        shown = run_shown(first, cwd=tmp_path)
    assert "flagged pairs" in shown


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
def test_the_full_run_of_the_readme_runs(place) -> None:
    """Each command that needs neither hub nor GPU, on the demo's data; the walk back ends well."""
    commands = shown_commands(README)
    full_run = [command for command in commands if "out/full" in shlex.join(command)]
    names = [command[0].removesuffix(".py") for command in full_run]
    assert names == ["build_dataset", "check_contamination", "tui", *STEPS[1:]]
    for command in full_run:
        shown = run_shown(command, cwd=place)
    assert shown.endswith("all is as recorded\n")

    full = place / "out/full"
    for name in ["a", "b"]:
        shutil.copytree(full / "adapter", place / "out" / name)
    for name in ["eval_base", "eval_tuned"]:
        shutil.copytree(full / "eval", place / "out" / name)
    merge = shlex.split("merge.py --adapter out/a --adapter out/b:0.5 --out out/both")
    compare = shlex.split("evaluate.py --compare out/eval_base out/eval_tuned --out out/compare")
    for command in [merge, compare]:
        assert command in commands
        run_shown(command, cwd=place)

    flags = [command[1:3] for command in commands]
    first = flags.index(["--local", "raw"])
    assert commands[first + 4] == ["finetune.py"]  # which loads the 13B from the hub
    for command in commands[first : first + 4]:
        run_shown(command, cwd=place)


@pytest.mark.parametrize("name", SCRIPTS)
def test_examples_in_docstrings(name: str) -> None:
    failed, tried = doctest.testmod(load_script(name))
    assert failed == 0
    assert tried > 0


# --- what the README says of the scripts ----------------------------------------------------------


def test_readme_names_every_source_and_where_it_is() -> None:
    for name, source in load_script("build_dataset").load_sources().items():
        if "hub" not in source:
            continue
        where = source["hub"]["path"]
        if where == "json":  # plain files, at addresses that differ
            where = ""
        assert f"| `{name}` | {where}" in README
        assert source["licence"] in README


def test_the_fork_guide_names_constants_that_exist() -> None:
    guide = README.partition("| to change | edit |")[2].partition("\n\n")[0]
    entries = re.findall(r"((?:`[A-Z_]+`(?:, )?)+) in `(\w+)\.py`", guide)
    assert len(entries) >= 8
    for names, script in entries:
        for name in re.findall(r"`(\w+)`", names):
            assert hasattr(load_script(script), name), script


def test_readme_lists_the_parts_of_every_script() -> None:
    for name in SCRIPTS:
        headings = re.findall(r"^# --- (.+?) -*$", source_of(name), flags=re.MULTILINE)
        parts = "; ".join(headings)
        assert f"| `{name}.py` | {parts} |" in README


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


def test_imports_go_backwards_and_the_top_is_standard_library() -> None:
    for place, name in enumerate(STEPS):
        tree = ast.parse(source_of(name))
        steps = imports_of(ast.walk(tree)) & set(STEPS)
        assert steps <= set(STEPS[:place]), name
        top = imports_of(tree.body) - set(STEPS)
        assert top <= set(sys.stdlib_module_names), name


SHOW_HELP = """
import sys
sys.path.insert(0, ".")
sys.argv = ["script", "--help"]
import NAME as script
script.main()
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


def seconds_of_children() -> float:
    """CPU seconds of all finished child processes: what else the machine does counts little."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@pytest.mark.parametrize("name", STEPS)
def test_help_is_quick_and_needs_nothing_installed(name: str) -> None:
    seconds = []
    for _ in range(3):
        before = seconds_of_children()
        done = run_bare(SHOW_HELP.replace("NAME", name), flags=[])
        seconds.append(seconds_of_children() - before)
        assert done.returncode == 0, done.stderr
        assert "usage:" in done.stdout
        if name != "tui":
            assert "--out" in done.stdout
    assert min(seconds) < 0.3


def test_without_the_environment_it_says_how_to_enter_it(tmp_path) -> None:
    flags = ["--model", "demo/base_model", "--local", "demo/data", "--out", str(tmp_path / "out")]
    done = run_bare(RUN_EVALUATE, flags)
    assert_refused(done, "no package", "source .venv/bin/activate")
    assert not list(tmp_path.iterdir())


# --- style ----------------------------------------------------------------------------------------


def functions_of(name: str) -> list[ast.FunctionDef]:
    """All functions of a script, those within others too; without make_app(), which is tui.py."""
    functions = []
    for node in ast.walk(ast.parse(source_of(name))):
        if isinstance(node, ast.FunctionDef) and node.name != "make_app":
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


@pytest.mark.parametrize("name", [name for name in SCRIPTS if name != "tui"])
def test_public_functions_and_classes_have_docstrings(name: str) -> None:
    for node in ast.walk(ast.parse(source_of(name))):
        if not isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            continue
        if not node.name.startswith("_") and node.name not in INNER:
            assert ast.get_docstring(node), node.name

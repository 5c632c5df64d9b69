"""What the tests share: the scripts as modules, a runner for them, the demo's first two steps."""

import importlib.util
import os
import pty
import re
import shlex
import subprocess
import sys
import termios
from contextlib import suppress
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
REAL_DATA = ROOT.parent / "shared" / "data"
sys.path.append(str(ROOT))  # at the end: lm_eval needs the package `evaluate`, not our script
SOURCES = "math,prm800k,scibench,theoremqa,openbookqa,scienceqa,guanaco"
DEMO = ["--local", str(ROOT / "demo/data")]
WORLD = ROOT / "demo/world"


def commands(text: str) -> list[list[str]]:
    """Every `python SCRIPT.py ...` line of a text, split as a shell does."""
    found = re.findall(r"^\s*(?:\$ )?python (\w+\.py.*)$", text, flags=re.MULTILINE)
    return [shlex.split(line, comments=True) for line in found]


def load_evaluate():
    """evaluate.py as a module under another name, so that it hides nothing."""
    spec = importlib.util.spec_from_file_location("evaluate_script", ROOT / "evaluate.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def run_script(name: str, *args: object, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    """Run a script as a user does, without network; its output is text."""
    return subprocess.run(
        [sys.executable, str(ROOT / f"{name}.py"), *map(str, args)],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )


def run_on_terminal(name: str, *args: object) -> tuple[int, str]:
    """(exit code, all that was drawn) of a script on a terminal of 90 columns."""
    reader, writer = pty.openpty()
    termios.tcsetwinsize(writer, (24, 90))  # without columns tqdm would draw nothing
    command = [sys.executable, str(ROOT / f"{name}.py"), *map(str, args)]
    process = subprocess.Popen(command, stdout=writer, stderr=writer)
    os.close(writer)
    shown = b""
    with suppress(OSError):  # the end of a terminal
        while part := os.read(reader, 4096):
            shown += part
    return process.wait(), shown.decode()


def assert_refused(done: subprocess.CompletedProcess, *words: str) -> None:
    """Exit code 2, one line on stderr that has all of `words`, nothing like a traceback."""
    assert done.returncode == 2, (done.returncode, done.stderr)
    assert "Traceback" not in done.stderr, done.stderr
    line = done.stderr.strip().splitlines()[-1]
    assert "error:" in line, done.stderr
    for word in words:
        assert word in line, (word, line)


def demo_origins() -> dict[str, str]:
    """source:file:line of demo/planted.json -> source:origin, as the rows carry it."""
    import build_dataset as build

    origins = {}
    for name in SOURCES.split(","):
        files = sorted((ROOT / "demo/data" / name).iterdir())
        source = build.load_sources()[name]
        for place, raw, error in build.raw_rows(source, files, True):
            assert not error, place
            origins[f"{name}:{place}"] = f"{name}:{build.origin(place, raw)}"
    return origins


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with dataset/ and contamination/ of the demo, made by the scripts themselves."""
    out = tmp_path_factory.mktemp("demo")
    cache = ["--cache", out / "cache"]
    done = run_script(
        "build_dataset",
        *(*DEMO, "--sources", SOURCES, "--extra", f"world={WORLD / 'train.jsonl'}"),
        *("--out", out / "dataset", *cache),
    )
    assert done.returncode == 0, done.stderr
    done = run_script(
        "check_contamination",
        *("--dataset", out / "dataset/dataset.jsonl", *DEMO),
        *("--extra-benchmark", f"world={WORLD / 'test.jsonl'}"),
        *("--out", out / "contamination", *cache),
    )
    assert done.returncode == 0, done.stderr
    return out

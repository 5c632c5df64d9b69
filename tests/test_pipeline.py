"""Holds: demo.sh's five steps need no network and the method works; from any result one walks back
to the rows, and a byte changed anywhere on the way is found; what another process works on is
refused, and a full disk is one line."""

import json
import os
import random
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import DEMO, ROOT, WORLD, assert_refused, run_script

import check_contamination as check
import common
import tui

BASE = ROOT / "demo/base_model"
GUARD = """
import os
import socket

def refuse(*attempt, **_):
    with open(os.environ["ATTEMPTS"], "a") as file:
        file.write(f"{attempt}\\n")
    raise OSError("there is no network")

def guard(connect):
    def connect_here(self, address):
        if self.family != socket.AF_UNIX:
            refuse(address)
        return connect(self, address)
    return connect_here

socket.socket.connect = guard(socket.socket.connect)
socket.socket.connect_ex = guard(socket.socket.connect_ex)
socket.getaddrinfo = refuse
"""


def without_network(folder: Path) -> dict[str, str]:
    """An environment in which each attempt of a Python process fails and is in folder/attempts."""
    folder.mkdir(exist_ok=True)
    (folder / "sitecustomize.py").write_text(GUARD)
    (folder / "attempts").write_text("")
    environment = {}
    for name, value in os.environ.items():
        if not name.startswith("HF_"):
            environment[name] = value
    environment["PYTHONPATH"] = str(folder)
    environment["ATTEMPTS"] = str(folder / "attempts")
    return environment


@pytest.fixture(scope="module")
def tuned(tmp_path_factory) -> Path:
    """What the lines of demo.sh make without a network, in a copy of demo/: its out/demo."""
    place = tmp_path_factory.mktemp("pipeline")
    shutil.copytree(ROOT / "demo", place / "demo")
    environment = without_network(place / "guard")
    lines = (ROOT / "demo.sh").read_text().splitlines()
    commands = [shlex.split(line) for line in lines if line.startswith("python ")]
    assert len(commands) == 5
    for command in commands:
        script = str(ROOT / command[1])
        arguments = command[2:]
        done = subprocess.run(
            [sys.executable, script, *arguments],
            cwd=place,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
    return place / "out/demo"


def test_the_demo_needs_no_network(tuned) -> None:
    attempts = tuned.parents[1] / "guard/attempts"
    assert attempts.read_text() == ""


def test_attempts_at_the_network_would_be_seen(tmp_path) -> None:
    environment = without_network(tmp_path / "guard")
    code = "import urllib.request; urllib.request.urlopen('http://localhost:1')"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True)
    assert done.returncode != 0
    assert "localhost" in (tmp_path / "guard/attempts").read_text()


def test_the_method_works(tuned) -> None:
    results = json.loads((tuned / "eval/results.json").read_text())
    scores = results["unflagged questions"]
    base = scores["demo/base_model"]["world"]
    merged = scores["out/demo/merged"]["world"]
    assert base["questions"] >= 100
    assert merged["acc"] - base["acc"] >= 25


def test_merged_equals_base_and_adapter(tuned) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(BASE)
    question = tokenizer("Where does one find copper?", return_tensors="pt")
    model = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    of_base = model(**question).logits
    of_both = PeftModel.from_pretrained(model, tuned / "adapter").eval()(**question).logits
    model = AutoModelForCausalLM.from_pretrained(tuned / "merged")
    of_merged = model(**question).logits
    assert (of_merged - of_both).abs().max() < 1e-4
    assert (of_base - of_both).abs().max() > 1e-4


# --- from a result back to the rows ---------------------------------------------------------------


def decide(place: int) -> None:
    """Give a verdict on the pair in this place of the file."""
    lines = Path("out/demo/contamination/pairs.jsonl").read_text().splitlines()
    pair = json.loads(lines[place])
    log = Path("out/demo/contamination/decisions.jsonl")
    common.append_decision(log, pair["pair_id"], "duplicate", "ann")


def apply_verdicts() -> None:
    check.main(["apply", "--out", "out/demo/contamination"])


@pytest.fixture
def chain(tuned, tmp_path, monkeypatch) -> Path:
    """A copy of all that the demo made, with one verdict applied: its last folder."""
    monkeypatch.chdir(tmp_path)  # where run.json's relative names count from
    monkeypatch.setattr(sys, "argv", ["check_contamination.py"])
    shutil.copytree(tuned.parents[1] / "demo", "demo")
    shutil.copytree(tuned, "out/demo")
    decide(0)
    apply_verdicts()
    return Path("out/demo/eval")


def faults(folder: Path) -> dict[str, str]:
    """{step that is not as recorded: why}."""
    return {state.script: state.why for state in tui.lineage(folder) if not state.whole}


def test_one_walks_back_from_any_result(chain) -> None:
    steps = list(tui.STEPS.values())
    assert [state.script for state in tui.lineage(chain)] == steps
    assert faults(chain) == {}
    assert tui.lineage(chain.parent) == tui.lineage(chain)


def test_a_verdict_is_missed_until_it_is_applied(chain) -> None:
    decide(1)
    assert faults(chain)
    apply_verdicts()
    assert faults(chain) == {}


def recorded_files(folder: Path) -> tuple[set[Path], set[Path]]:
    """The files that the steps in a folder have read and those that they have written."""
    read = set()
    written = set()
    for step in folder.iterdir():
        for name in tui.files_of(step, "inputs"):
            read.add(tui.find_input(name, step))
        for name in tui.files_of(step, "outputs"):
            written.add(step / name)
    return read, written


def with_one_bit_changed(content: bytes, rng: random.Random) -> Iterator[bytes]:
    """The content with a bit changed in its first byte, in its last, and in any."""
    for place in {0, len(content) - 1, rng.randrange(len(content))}:
        changed = bytearray(content)
        changed[place] ^= 1 << rng.randrange(8)
        yield bytes(changed)


def test_a_changed_byte_is_found_anywhere(chain) -> None:
    log = chain.with_name("contamination") / "decisions.jsonl"
    read, written = recorded_files(chain.parent)
    assert len(read - written) > 20
    assert len(written) > 20
    rng = random.Random(0)
    for path in sorted(read | written | {log}):
        if path.is_absolute():  # of an installed package
            continue
        content = path.read_bytes()
        for changed in with_one_bit_changed(content, rng):
            path.write_bytes(changed)
            found = faults(chain)
            assert found, path
            if path != log:
                assert path.name in str(found)

        if path.name not in tui.RUNS:  # a folder without these is of another origin
            path.unlink()
            assert faults(chain), path
        path.write_bytes(content)


def test_the_walk_back_as_a_command(chain, tmp_path) -> None:
    done = run_script("tui", chain, "--lineage", cwd=tmp_path)
    assert done.returncode == 0
    assert done.stdout.splitlines()[-1] == "all is as recorded"

    Path("out/demo/dataset/dataset.jsonl").write_text("")
    done = run_script("tui", chain, "--lineage", cwd=tmp_path)
    assert done.returncode == 1
    last = done.stdout.splitlines()[-1]
    assert last == "not as recorded: build_dataset, check_contamination"

    done = run_script("tui", "demo", "--lineage", cwd=tmp_path)
    assert_refused(done, "no step's folder")


# --- two at once, a full disk ---------------------------------------------------------------------


def build_command(demo: Path, out: Path) -> list[str]:
    """A small run of the first step, with the finished demo's vectors."""
    command = [sys.executable, str(ROOT / "build_dataset.py"), *DEMO]
    command += ["--sources", "math,openbookqa", "--extra", f"w={WORLD / 'train.jsonl'}"]
    command += ["--cache", str(demo / "cache"), "--out", str(out)]
    return command


def test_two_processes_on_one_folder_are_kept_apart(demo, tmp_path) -> None:
    from common import claim_output

    command = build_command(demo, tmp_path / "out")
    with claim_output(tmp_path / "out", overwrite=False):
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        assert_refused(done, "another process")
    assert subprocess.run(command, cwd=ROOT).returncode == 0


def test_a_full_disk_is_one_line(demo, tmp_path) -> None:
    command = build_command(demo, tmp_path / "out")
    limit = ["bash", "-c", 'ulimit -f 8; exec "$@"', "bash"]  # no file above 8 kB
    done = subprocess.run([*limit, *command], capture_output=True, text=True, cwd=ROOT)
    assert_refused(done, "File too large")
    assert not (tmp_path / "out").exists()  # vectors found no room in the cache: nothing was begun

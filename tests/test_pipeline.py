"""Holds: demo.sh's five steps need no network and the method works; from any result one walks back
to the rows, and a byte changed anywhere on the way is found; a killed step never looks finished and
runs to its end when started again; two on one folder are kept apart."""

import hashlib
import json
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import DEMO, ROOT, WORLD, assert_refused, run_script

import check_contamination as check
import tui

BASE = ROOT / "demo/base_model"
GUARD = """
import os, socket
def refuse(self, *about, family=None):
    if not self or getattr(self, "family", None) != socket.AF_UNIX:
        open(os.environ["ATTEMPTS"], "a").write(f"{about}\\n")
        raise OSError("there is no network")
connect, connect_ex = socket.socket.connect, socket.socket.connect_ex
socket.socket.connect = lambda self, to: refuse(self, to) or connect(self, to)
socket.socket.connect_ex = lambda self, to: refuse(self, to) or connect_ex(self, to)
socket.getaddrinfo = lambda *about, **_: refuse(None, *about)
"""


def without_network(folder: Path) -> dict[str, str]:
    """An environment in which each attempt of a Python process fails and is in folder/attempts."""
    folder.mkdir(exist_ok=True)
    (folder / "sitecustomize.py").write_text(GUARD)
    (folder / "attempts").write_text("")
    free = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    return {**free, "PYTHONPATH": str(folder), "ATTEMPTS": str(folder / "attempts")}


@pytest.fixture(scope="module")
def tuned(tmp_path_factory) -> Path:
    """What the lines of demo.sh make without a network, in a copy of demo/: its out/demo."""
    place = tmp_path_factory.mktemp("pipeline")
    shutil.copytree(ROOT / "demo", place / "demo")
    env = without_network(place / "guard")
    lines = [line for line in (ROOT / "demo.sh").read_text().splitlines() if ".py --" in line]
    assert len(lines) == 5
    for line in lines:
        script, *flags = shlex.split(line)[1:]
        done = subprocess.run(
            [sys.executable, ROOT / script, *flags], cwd=place, env=env, capture_output=True
        )
        assert done.returncode == 0, done.stderr.decode()
    return place / "out/demo"


def test_the_demo_needs_no_network(tuned, tmp_path) -> None:
    assert (tuned.parents[1] / "guard/attempts").read_text() == ""
    env = without_network(tmp_path / "guard")  # which does see attempts
    code = "import urllib.request as u; u.urlopen('http://localhost:1')"
    assert subprocess.run([sys.executable, "-c", code], env=env, capture_output=True).returncode
    assert "localhost" in (tmp_path / "guard/attempts").read_text()


def test_the_method_works(tuned) -> None:
    scores = json.loads((tuned / "eval/results.json").read_text())["unflagged questions"]
    base, merged = scores["demo/base_model"]["world"], scores["out/demo/merged"]["world"]
    assert base["questions"] >= 100
    assert merged["acc"] - base["acc"] >= 25, (base, merged)


def test_merged_equals_base_and_adapter(tuned) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    ids = AutoTokenizer.from_pretrained(BASE)("Where does one find copper?", return_tensors="pt")
    base = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    plain = base(**ids).logits
    both = PeftModel.from_pretrained(base, tuned / "adapter").eval()(**ids).logits
    merged = AutoModelForCausalLM.from_pretrained(tuned / "merged")(**ids).logits
    assert (merged - both).abs().max() < 1e-4 < (plain - both).abs().max()


def test_one_walks_back_and_a_changed_byte_is_found_anywhere(tuned, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)  # where run.json's relative names count from
    monkeypatch.setattr(sys, "argv", ["check_contamination.py"])
    shutil.copytree(tuned.parents[1] / "demo", "demo")
    shutil.copytree(tuned, "out/demo")
    contamination, chain = Path("out/demo/contamination"), Path("out/demo/eval")
    pairs = [json.loads(line) for line in (contamination / "pairs.jsonl").open()]
    log = contamination / "decisions.jsonl"
    check.append_decision(log, pairs[0]["pair_id"], "duplicate", "ann")
    assert not all(state.whole for state in tui.lineage(chain))  # until it is applied
    check.main(["apply", "--out", str(contamination)])

    def found() -> dict[str, str]:
        return {state.script: state.why for state in tui.lineage(chain) if not state.whole}

    scripts = [state.script for state in tui.lineage(chain)]
    assert scripts == [script for script, _ in tui.STEPS.values()] and found() == {}
    assert tui.lineage(Path("out/demo")) == tui.lineage(chain)
    read, written = set(), set()
    for folder in Path("out/demo").iterdir():
        read |= {tui.find_input(name, folder) for name in tui.files_of(folder, "inputs")}
        written |= {folder / name for name in tui.files_of(folder, "outputs")}
    assert len(read - written) > 20 and len(written) > 20
    rng = random.Random(0)
    for path in sorted(path for path in read | written | {log} if not path.is_absolute()):
        whole = path.read_bytes()
        for place in {0, len(whole) - 1, rng.randrange(len(whole))}:
            changed = bytes([whole[place] ^ 1 << rng.randrange(8)])
            path.write_bytes(whole[:place] + changed + whole[place + 1 :])
            told = found()
            assert path.name in str(told) or path == log, (path, place, told)
            assert told, (path, place)
        if path.name not in tui.RUNS:  # a folder without these is of another origin
            path.unlink()
            assert found(), path
        path.write_bytes(whole)
    done = run_script("tui", chain, "--lineage", cwd=tmp_path)
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "all is as recorded")
    Path("out/demo/dataset/dataset.jsonl").write_text("")
    done = run_script("tui", chain, "--lineage", cwd=tmp_path)
    last = "not as recorded: build_dataset, check_contamination"
    assert (done.returncode, done.stdout.splitlines()[-1]) == (1, last)
    assert_refused(run_script("tui", "demo", "--lineage", cwd=tmp_path), "no step's folder")


def steps(demo: Path, out: Path) -> dict[str, tuple[str, list, Path]]:
    """For each step: script, arguments, output folder; inputs come from the finished demo."""
    cache = ["--cache", demo / "cache"]
    data = demo / "contamination/clean.jsonl"
    return {
        "build": (
            "build_dataset",
            [
                *DEMO,
                "--sources",
                "math,openbookqa",
                "--extra",
                f"w={WORLD / 'train.jsonl'}",
                *cache,
            ],
            out / "dataset",
        ),
        "check": (
            "check_contamination",
            ["--dataset", demo / "dataset/dataset.jsonl", *DEMO, *cache],
            out / "contamination",
        ),
        "finetune": (
            "finetune",
            ["--base-model", BASE, "--data", data, "--limit", "64"],
            out / "adapter",
        ),
        "merge": ("merge", ["--adapter", demo / "adapter"], out / "merged"),
        "evaluate": (
            "evaluate",
            ["--model", BASE, "--tasks", "", "--task", ROOT / "demo/world.yaml", "--limit", "20"],
            out / "eval",
        ),
    }


def assert_whole(folder: Path) -> None:
    """Every output that run.json (and apply.json) lists is there, byte for byte."""
    for name in ("run.json", "apply.json"):
        if (folder / name).exists():
            for file, about in json.loads((folder / name).read_text())["outputs"].items():
                assert hashlib.sha256((folder / file).read_bytes()).hexdigest() == about["sha256"]


@pytest.mark.slow
@pytest.mark.parametrize("step", ["build", "check", "finetune", "merge", "evaluate"])
def test_a_killed_step_never_looks_finished(tuned, tmp_path, step: str) -> None:
    script, args, folder = steps(tuned, tmp_path)[step]
    command = [sys.executable, str(ROOT / f"{script}.py"), *map(str, [*args, "--out", folder])]
    began = time.monotonic()
    subprocess.run(command, check=True, capture_output=True, cwd=ROOT)
    whole = time.monotonic() - began
    shutil.rmtree(folder)
    rng, seen = random.Random(step), set()
    for _ in range(8):
        process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL, stdout=-3)
        # writing is the last part of most steps: half of the kills fall there
        time.sleep(whole * rng.choice([rng.uniform(0, 1), rng.uniform(0.85, 1)]))
        process.send_signal(signal.SIGKILL)
        process.wait()
        if (folder / "run.json").exists() and not (folder / ".unfinished").exists():
            seen.add("finished")
            assert_whole(folder)
            shutil.rmtree(folder)
        elif folder.exists():
            seen.add("unfinished")
            if step == "finetune":
                done = run_script("merge", "--adapter", folder, "--out", tmp_path / "m")
                assert_refused(done, "unfinished", "finetune.py")
        else:
            seen.add("nothing")
    if step == "finetune":  # it does not drop a killed run's checkpoints unasked
        command += ["--resume"] if folder.exists() else []
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert_whole(folder)
    left = [p.name for p in folder.iterdir() if p.name.startswith(".")]
    assert left == []


def test_two_processes_on_one_folder_are_kept_apart(demo, tmp_path) -> None:
    from build_dataset import output_folder

    script, args, folder = steps(demo, tmp_path)["build"]
    with output_folder(folder, overwrite=False):
        done = run_script(script, *args, "--out", folder)
        assert_refused(done, "another process")
    assert run_script(script, *args, "--out", folder).returncode == 0


def test_a_full_disk_is_one_line(demo, tmp_path) -> None:
    script, args, folder = steps(demo, tmp_path)["build"]
    command = [sys.executable, str(ROOT / f"{script}.py"), *map(str, [*args, "--out", folder])]
    limited = ["bash", "-c", 'ulimit -f 8; exec "$@"', "bash", *command]  # 8 kB a file
    done = subprocess.run(limited, capture_output=True, text=True, cwd=ROOT)
    assert_refused(done, "File too large")
    assert not folder.exists()  # vectors did not fit beside the cache: nothing was begun

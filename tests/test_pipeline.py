"""Holds: the five steps run one after the other on the demo and the method works; a killed step
never looks finished and runs to its end when started again; two on one folder are kept apart."""

import hashlib
import json
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import DEMO, ROOT, WORLD, assert_refused, run_script

BASE = ROOT / "demo/base_model"
TUNING = ["--targets", "all", "--learning-rate", "4e-3", "--epochs", "4", "--warmup-steps", "10"]


@pytest.fixture(scope="module")
def tuned(demo) -> Path:
    """The demo's folder with adapter/ and merged/ added."""
    data = demo / "contamination/clean.jsonl"
    args = ["--base-model", BASE, "--data", data, "--out", demo / "adapter"]
    done = run_script("finetune", *args, *TUNING)
    assert done.returncode == 0, done.stderr
    done = run_script("merge", "--adapter", demo / "adapter", "--out", demo / "merged")
    assert done.returncode == 0, done.stderr
    return demo


def test_the_method_works(tuned) -> None:
    args = ["--model", BASE, "--model", tuned / "merged", "--tasks", ""]
    args += ["--task", ROOT / "demo/world.yaml", "--contamination", tuned / "contamination"]
    done = run_script("evaluate", *args, "--out", tuned / "eval")
    assert done.returncode == 0, done.stderr
    scores = json.loads((tuned / "eval/results.json").read_text())["unflagged questions"]
    base, merged = scores[str(BASE)]["world"], scores[str(tuned / "merged")]["world"]
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


def test_one_can_walk_back_by_hash(tuned) -> None:
    def run(step: str, name: str = "run.json") -> dict:
        return json.loads((tuned / step / name).read_text())

    def output(step: str, file: str, name: str = "run.json") -> str:
        return run(step, name)["outputs"][file]["sha256"]

    def taken(step: str, file: Path, name: str = "run.json") -> str:
        return run(step, name)["inputs"][str(file)]["sha256"]

    dataset, clean = tuned / "dataset/dataset.jsonl", tuned / "contamination/clean.jsonl"
    adapter = tuned / "adapter/adapter_model.safetensors"
    assert taken("contamination", dataset) == output("dataset", "dataset.jsonl")
    assert taken("adapter", clean) == output("contamination", "clean.jsonl", "apply.json")
    assert taken("merged", adapter) == output("adapter", "adapter_model.safetensors")


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

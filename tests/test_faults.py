"""Holds: whatever breaks a step (a kill, a full disk, a second process, Ctrl-C, a clock that goes
backwards, an input that changes) nothing looks finished that is not, nothing is lost, and the next
run ends with the same bytes; a broken file gives one line at most. pytest -s prints the tables."""

import contextlib
import hashlib
import json
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import DEMO, ROOT, load_evaluate

import build_dataset as build
import check_contamination as check
import finetune
import merge
import tui

TRIALS = 1000
VALUE = re.compile(rb'"(?:[^"\\]|\\.)*"|-?\d+(?:\.\d+)?|true|false|null')
ODD = [b"null", b"-1", b"0", b"1e400", b"NaN", b'"x"', b"[]", b"{}", b"true", b'""', b"9" * 400,
       b"[" * 5000, b'"\\ud800"', b'"\\u0000"', b'{"a": {"b": []}}', b"1.5"]  # fmt: skip


def mutate(data: bytes, rng: random.Random) -> bytes:
    """One to three random changes: bytes, slices, lines, and JSON values of another type."""
    for _ in range(rng.randint(1, 3)):
        size = max(len(data), 1)
        a = rng.randrange(size)
        b = min(len(data), a + rng.choice([1, 1, 4, 40, 400, size]))
        kind = rng.choice(["cut", "flip", "drop", "repeat", "insert", "value", "value", "lines"])
        if kind == "cut":
            data = data[:a]
        elif kind == "flip":
            data = data[:a] + rng.randbytes(1) + data[a + 1 :]
        elif kind == "drop":
            data = data[:a] + data[b:]
        elif kind == "repeat":
            data = data[:b] + data[a:b] + data[b:]
        elif kind == "insert":
            data = data[:a] + rng.choice([*ODD, rng.randbytes(8), b"\0", b"\xff", b'"']) + data[a:]
        elif kind == "value" and (found := list(VALUE.finditer(data[:20_000]))):
            match = rng.choice(found)
            data = data[: match.start()] + rng.choice(ODD) + data[match.end() :]
        elif kind == "lines":
            lines = data.split(b"\n")
            data = b"\n".join(rng.sample(lines, len(lines)))
    return data


def fuzz(path: Path, read: Callable[[], object], seed: int, *places: str) -> Counter:
    """Put mutations of `path` in its place and read: how many went well, how many were refused.

    Of safetensors only the header is mutated. A refusal names the file, or one of `places`.
    """
    whole, rng, seen = path.read_bytes(), random.Random(seed), Counter()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def stuck(*_: object) -> None:
        raise AssertionError("stuck for 20 s")

    signal.signal(signal.SIGALRM, stuck)
    head = 8 + int.from_bytes(whole[:8], "little") if path.suffix == ".safetensors" else len(whole)
    for trial in range(TRIALS):
        path.write_bytes(mutate(whole[:head], rng) + whole[head:])
        signal.alarm(20)
        try:
            read()
            seen["read"] += 1
        except (build.UserError, OSError) as error:  # what run_main() prints as one line
            assert any(name in str(error) for name in (path.name, *places)), (trial, error)
            assert len(build.one_line(error)) < 1000, trial
            seen["refused"] += 1
        except Exception as error:
            kept = path.with_name("failing-" + path.name)
            kept.write_bytes(path.read_bytes())
            raise AssertionError(f"{path.name}, mutation {trial} of seed {seed}") from error
        finally:
            signal.alarm(0)
    path.write_bytes(whole)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert grown < 500, f"{path.name}: memory grew by {grown:.0f} MB"
    print(f"| {path.name} | {TRIALS:,} | {seen['read']:,} | {seen['refused']:,} |")
    return seen


def dataset_args(folder: Path, *flags: str) -> object:
    return build.parse_args(["--local", str(folder), *flags])


@pytest.mark.parametrize("file", ["math/math_train.jsonl", "theoremqa/all_theorems.json",
                                  "scienceqa/problems.json", "prm800k/*.jsonl"])  # fmt: skip
def test_source_files(tmp_path, file: str) -> None:
    source = file.split("/")[0]
    shutil.copytree(ROOT / "demo/data" / source, tmp_path / source)
    path = next(tmp_path.glob(file))
    args = dataset_args(tmp_path, "--sources", source)

    def read() -> None:
        rows, dropped, _ = build.read_source(source, args)
        build.add_ids(rows)
        build.add_ids(dropped)
        build.to_jsonl([{**row, "keywords": None} for row in rows + dropped]).encode()

    seen = fuzz(path, read, seed=1)
    assert min(seen["read"], seen["refused"]) > 0 or path.suffix == ".jsonl"


BENCHMARK_FILES = ["mmlu/test/*.csv", "arc/*-test.jsonl", "hellaswag/*.jsonl", "truthfulqa/*.json"]


@pytest.mark.parametrize("file", BENCHMARK_FILES)
def test_benchmark_files(tmp_path, file: str) -> None:
    name = file.split("/")[0]
    shutil.copytree(ROOT / "demo/data" / name, tmp_path / name)
    args = check.parse_args(["--local", str(tmp_path), "--benchmarks", name])
    seen = fuzz(next(tmp_path.glob(file)), lambda: check.load_questions(args), 2, name)
    assert min(seen["read"], seen["refused"]) > 0


@pytest.mark.parametrize("file", ["run.json", "pairs.jsonl", "decisions.jsonl"])
def test_what_apply_reads(demo, tmp_path, monkeypatch, file: str) -> None:
    folder = tmp_path / "contamination"
    shutil.copytree(demo / "contamination", folder)
    pairs = [json.loads(line) for line in (folder / "pairs.jsonl").open()]
    for number, pair in enumerate(pairs):
        verdict = check.VERDICTS[number % 4]
        check.append_decision(folder / "decisions.jsonl", pair["pair_id"], verdict, "ann")
    whole = {path: path.read_bytes() for path in folder.iterdir()}
    monkeypatch.setattr(sys, "argv", ["check_contamination.py"])

    def read() -> None:
        broken = (folder / file).read_bytes()
        for path in folder.iterdir():
            path.write_bytes(whole[path]) if path in whole else path.unlink()
        (folder / file).write_bytes(broken)
        check.main(["apply", "--out", str(folder)])

    # a folder whose run.json says nothing is of another origin; a data set may have another hash
    seen = fuzz(folder / file, read, 3, str(folder), "since it was checked", "the data set that")
    assert seen["refused" if file != "decisions.jsonl" else "read"] > TRIALS / 2


SHOWN = ["adapter/train_log.jsonl", "eval/results.json", "eval/run.json",
         "contamination/pairs.jsonl", "contamination/run.json"]  # fmt: skip


@pytest.mark.parametrize("file", SHOWN)
def test_what_the_terminal_ui_reads(tmp_path, file: str) -> None:
    shutil.copytree(ROOT / "demo/recorded", tmp_path / "out")
    seen = fuzz(tmp_path / "out" / file, lambda: tui.summary(tmp_path / "out"), 4)
    assert seen["read"] > 0


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    """A folder with a sharded base, base/, and an adapter of it, adapter/."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("small")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 64}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2))
    model.save_pretrained(folder / "base", max_shard_size="60KB")
    model = get_peft_model(model, LoraConfig(r=4, target_modules=["gate_proj", "down_proj"]))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    model.save_pretrained(folder / "adapter")
    known = finetune.base_fingerprint(folder / "base")
    known |= {"base_model": str(folder / "base"), "load_in_4bit": False}
    (folder / "adapter/base_fingerprint.json").write_text(json.dumps(known))
    return folder


MERGED = ["adapter/adapter_config.json", "adapter/base_fingerprint.json", "base/config.json",
          "adapter/adapter_model.safetensors", "base/*index.json", "base/*-00001-*"]  # fmt: skip


@pytest.mark.parametrize("file", MERGED)
def test_what_merge_reads(small, tmp_path, file: str) -> None:
    shutil.copytree(small, tmp_path / "models")
    path, base = next((tmp_path / "models").glob(file)), tmp_path / "models/base"
    flags = ["--adapter", str(tmp_path / "models/adapter"), "--base-model", str(base)]

    def read() -> None:
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        merge.main([*flags, "--out", str(tmp_path / "out")])

    seen = fuzz(path, read, 5, str(tmp_path))
    assert min(seen["read"], seen["refused"]) > 0


# --- faults: a step runs in a child of a process that has imported everything ---------------------

BASE = ROOT / "demo/base_model"
SPAWN = multiprocessing.get_context("forkserver")
SPAWN.set_forkserver_preload(
    [
        "torch",
        "transformers.models.llama.modeling_llama",
        "peft",
        "sentence_transformers",
        "datasets",
    ]
)
KILLS = 20
STARTED = "the script begins"


def run_step(script: str, args: list[str], log: Path, fault: str) -> None:
    """In the child: the script as its user starts it, with one fault put in its way."""
    with log.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.argv = [f"{script}.py", *args]
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in a shell's background
    sys.path.append(str(ROOT))
    os.chdir(ROOT)
    if fault.startswith("full disk"):  # the same error for every file from that size up
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(fault.split()[-1]),) * 2)
    if fault == "clock":
        now = time.time
        time.time = lambda: 2e9 - now()  # every look at it is earlier than the one before
    module = load_evaluate() if script == "evaluate" else __import__(script)
    print(STARTED, flush=True)
    build.run_main(module.main)


class Step:
    """One command, how long it takes, and what it writes when nothing is in its way."""

    def __init__(self, script: str, args: list, out: Path) -> None:
        self.script, self.out, self.log = script, out, out.with_suffix(".log")
        self.args = [*map(str, args), "--out", str(out)]
        for _ in range(2):  # the second time everything is imported
            shutil.rmtree(out, ignore_errors=True)
            began = time.monotonic()
            assert self.run() == 0, self.log.read_text()
            self.seconds = time.monotonic() - began
        self.expected = self.outputs()
        assert self.expected
        shutil.rmtree(out)

    def fresh(self) -> "Step":
        """The step, with nothing of an earlier trial left."""
        shutil.rmtree(self.out, ignore_errors=True)
        self.log.unlink(missing_ok=True)
        return self

    def start(self, fault: str = "") -> multiprocessing.Process:
        process = SPAWN.Process(target=run_step, args=(self.script, self.args, self.log, fault))
        process.start()
        return process

    def run(self, fault: str = "") -> int:
        process = self.start(fault)
        process.join(120)
        assert process.exitcode is not None, "stuck for two minutes"
        return process.exitcode

    def outputs(self) -> dict[str, str]:
        """The sha256 of every output; each is what run.json says."""
        found = {}
        for name in ("run.json", "apply.json"):
            if (self.out / name).exists():
                for file, about in json.loads((self.out / name).read_text())["outputs"].items():
                    found[file] = hashlib.sha256((self.out / file).read_bytes()).hexdigest()
                    assert found[file] == about["sha256"], file
        return {file: digest for file, digest in found.items() if "log" not in file}

    def state(self) -> str:
        """Of the output folder: nothing, unfinished, or finished and then whole."""
        if not self.out.exists() or not any(self.out.iterdir()):
            return "nothing"
        if (self.out / ".unfinished").exists():
            return "unfinished"
        assert self.outputs() == self.expected
        return "finished"


@pytest.fixture(scope="module")
def steps(demo, tmp_path_factory) -> dict[str, Step]:
    out = tmp_path_factory.mktemp("faults")
    cache, data = ["--cache", demo / "cache"], ["--dataset", demo / "dataset/dataset.jsonl", *DEMO]
    (out / "review").mkdir()
    return {
        "build": Step("build_dataset", [*DEMO, "--sources", "math,openbookqa", *cache], out / "b"),
        "check": Step("check_contamination", [*data, "--benchmarks", "mmlu", *cache], out / "c"),
    }


def files_of(folder: Path) -> dict[Path, str]:
    """The sha256 of every file below a folder."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


@pytest.fixture
def untouched(demo):
    """Every fault has to leave what earlier steps wrote as it was."""
    before = files_of(demo)
    yield
    after = files_of(demo)
    assert {path: after.get(path) for path in before if path.name != "embeddings.sqlite"} == {
        path: digest for path, digest in before.items() if path.name != "embeddings.sqlite"
    }


STEPS = ["build", "check"]


@pytest.mark.slow
@pytest.mark.usefixtures("untouched")
@pytest.mark.parametrize("name", STEPS)
def test_killed_at_random_moments(steps, name: str) -> None:
    step, rng, seen = steps[name].fresh(), random.Random(name), Counter()
    for sign in [signal.SIGKILL] * KILLS + [signal.SIGINT] * 5:
        step.log.unlink(missing_ok=True)
        process = step.start()
        # writing is the last part of most steps: half of the signals fall there
        time.sleep(step.seconds * rng.choice([rng.uniform(0, 1), rng.uniform(0.7, 1)]))
        with contextlib.suppress(ProcessLookupError):  # it may have ended before
            os.kill(process.pid, sign)
        process.join(60)
        text = step.log.read_text() if step.log.exists() else ""
        if sign == signal.SIGINT and process.exitcode != 0 and STARTED in text:
            assert process.exitcode == 130 and "Traceback" not in text, (process.exitcode, text)
        seen[state := step.state()] += 1
        if state == "finished":
            shutil.rmtree(step.out)
    code = step.run()
    assert (code, step.state()) == (0, "finished"), step.log.read_text()
    assert not [path for path in step.out.iterdir() if path.name.startswith(".")]
    shutil.rmtree(step.out)
    print(f"| {name} | {KILLS} kills, 5 x Ctrl-C | {dict(seen)} | none lost |")


@pytest.mark.slow
@pytest.mark.usefixtures("untouched")
@pytest.mark.parametrize("name", STEPS)
def test_full_disk(steps, name: str) -> None:
    step = steps[name].fresh()
    for largest in (1000, 4000, 8000):
        step.log.unlink(missing_ok=True)
        code = step.run(f"full disk {largest}")
        text = step.log.read_text()
        assert step.state() != "finished" and code == 2, (largest, code, text)
        assert "Traceback" not in text
    assert (step.run(), step.state()) == (0, "finished"), step.log.read_text()
    shutil.rmtree(step.out)


@pytest.mark.usefixtures("untouched")
@pytest.mark.parametrize("name", STEPS)
def test_a_clock_that_goes_backwards(steps, name: str) -> None:
    step = steps[name].fresh()
    assert (step.run("clock"), step.state()) == (0, "finished"), step.log.read_text()
    shutil.rmtree(step.out)


@pytest.mark.usefixtures("untouched")
@pytest.mark.parametrize("name", STEPS)
def test_two_at_once(steps, name: str) -> None:
    step = steps[name].fresh()
    step.log.unlink(missing_ok=True)
    both = [step.start(), step.start()]
    for process in both:
        process.join(120)
    codes = sorted(process.exitcode for process in both)
    assert codes == [0, 2] and step.state() == "finished", step.log.read_text()
    assert "another process" in step.log.read_text() or "is finished" in step.log.read_text()
    shutil.rmtree(step.out)


def test_an_input_that_changes_while_it_is_read(tmp_path, monkeypatch) -> None:
    (tmp_path / "math").mkdir()
    path = tmp_path / "math/math_train.jsonl"
    path.write_text('{"problem": "1 + 1?", "solution": "2"}\n{"problem": "2?", "solution": "2"}\n')
    read_records = build.read_records

    def change(path: Path):
        for number, record in enumerate(read_records(path)):
            if number == 1:
                path.write_text('{"problem": "3?", "solution": "3"}\n')
            yield record

    monkeypatch.setattr(build, "read_records", change)
    args = ["--local", str(tmp_path), "--sources", "math", "--out", str(tmp_path / "out")]
    with pytest.raises(build.UserError, match="math_train.jsonl changed while it was read"):
        build.main(args)
    assert not (tmp_path / "out").exists()

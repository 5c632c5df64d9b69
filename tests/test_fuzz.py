"""Holds: a broken file gives a right result or one line that names it, and never a traceback.

Each file that a step or the terminal UI reads is mutated TRIALS times, from a seed.
`pytest -s tests/test_fuzz.py` prints the table of tests/README.md."""

import contextlib
import json
import os
import random
import re
import resource
import shutil
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ROOT

import build_dataset
import check_contamination
import common
import merge
import tui

TRIALS = 500  # of each file
FUZZED: list[tuple[str, str, Counter]] = []  # reader, file, what became of its mutations
VALUE = re.compile(rb'"(?:[^"\\]|\\.)*"|-?\d+(?:\.\d+)?|true|false|null')
ODD_VALUES = [
    b"null",
    b"-1",
    b"0",
    b"1e400",
    b"NaN",
    b'"x"',
    b"[]",
    b"{}",
    b"true",
    b'""',
    b"9" * 400,
    b"[" * 5000,
    b'"\\ud800"',
    b'"\\u0000"',
    b'{"a": {"b": []}}',
    b"1.5",
]
CHANGES = ["cut", "flip", "drop", "repeat", "insert", "value", "value", "lines"]


def mutate(data: bytes, rng: random.Random) -> bytes:
    """One to three random changes: bytes, slices, lines, and JSON values of another type."""
    for _ in range(rng.randint(1, 3)):
        data = change(data, rng.choice(CHANGES), rng)
    return data


def change(data: bytes, kind: str, rng: random.Random) -> bytes:
    """One random change of this kind."""
    size = max(len(data), 1)
    start = rng.randrange(size)
    end = min(len(data), start + rng.choice([1, 1, 4, 40, 400, size]))
    if kind == "cut":
        return data[:start]
    if kind == "flip":
        return data[:start] + rng.randbytes(1) + data[start + 1 :]
    if kind == "drop":
        return data[:start] + data[end:]
    if kind == "repeat":
        return data[:end] + data[start:end] + data[end:]
    if kind == "insert":
        inserted = rng.choice([*ODD_VALUES, rng.randbytes(8), b"\0", b"\xff", b'"'])
        return data[:start] + inserted + data[start:]
    if kind == "lines":
        lines = data.split(b"\n")
        return b"\n".join(rng.sample(lines, len(lines)))
    values = list(VALUE.finditer(data[:20_000]))
    if not values:
        return data
    match = rng.choice(values)
    return data[: match.start()] + rng.choice(ODD_VALUES) + data[match.end() :]


def fuzz(path: Path, read: Callable[[], object], seed: int, *places: str) -> Counter:
    """Put mutations of `path` in its place and read: how many went well, how many were refused.

    Of safetensors only the header is mutated. A refusal names the file, or one of `places`.
    """
    whole = path.read_bytes()
    head = len(whole)
    if path.suffix == ".safetensors":
        head = 8 + int.from_bytes(whole[:8], "little")
    rng = random.Random(seed)
    seen: Counter = Counter()
    reader = re.search(r"::test_(\w+)", os.environ["PYTEST_CURRENT_TEST"])
    FUZZED.append((reader[1].replace("_", " "), path.name, seen))
    before = peak_megabytes()

    for trial in range(TRIALS):
        path.write_bytes(mutate(whole[:head], rng) + whole[head:])
        try:
            read_in_silence(read)
            seen["read"] += 1
        except (common.UserError, OSError) as error:  # what run_main() prints as one line
            assert any(name in str(error) for name in (path.name, *places)), (trial, error)
            seen["refused"] += 1
        except Exception as error:
            seen["traceback"] += 1
            shutil.copy(path, path.with_name("failing-" + path.name))
            raise AssertionError(f"{path.name}, mutation {trial} of seed {seed}") from error

    path.write_bytes(whole)
    grown = peak_megabytes() - before
    assert grown < 500, f"{path.name}: memory grew by {grown:.0f} MB"
    return seen


def read_in_silence(read: Callable[[], object]) -> None:
    """Call `read` on a stream that, as a terminal, takes no half of a surrogate pair."""
    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        with contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
            read()


def peak_megabytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


SOURCE_FILES = [
    "math/math_train.jsonl",
    "theoremqa/all_theorems.json",
    "scienceqa/problems.json",
    "prm800k/*.jsonl",
]


@pytest.mark.slow
@pytest.mark.parametrize("file", SOURCE_FILES)
def test_source_files(tmp_path, file: str) -> None:
    source = file.split("/")[0]
    shutil.copytree(ROOT / "demo/data" / source, tmp_path / source)
    path = next(tmp_path.glob(file))
    args = build_dataset.parse_args(["--local", str(tmp_path), "--sources", source])

    def read() -> None:
        reading = build_dataset.read_source(build_dataset.load_sources()[source], args)
        build_dataset.add_ids(reading.rows + reading.dropped)
        common.to_jsonl(reading.rows + reading.dropped).encode()

    seen = fuzz(path, read, 1)
    assert seen["read"] > 0
    assert seen["refused"] > 0 or path.suffix == ".jsonl"


BENCHMARK_FILES = ["mmlu/test/*.csv", "arc/*-test.jsonl", "hellaswag/*.jsonl", "truthfulqa/*.json"]


@pytest.mark.slow
@pytest.mark.parametrize("file", BENCHMARK_FILES)
def test_benchmark_files(tmp_path, file: str) -> None:
    name = file.split("/")[0]
    shutil.copytree(ROOT / "demo/data" / name, tmp_path / name)
    args = check_contamination.parse_args(["--local", str(tmp_path), "--benchmarks", name])
    path = next(tmp_path.glob(file))
    seen = fuzz(path, lambda: check_contamination.load_questions(args), 2, name)
    assert min(seen["read"], seen["refused"]) > 0


@pytest.fixture
def decided(demo, tmp_path) -> Path:
    """The demo's folder of step 2 with a verdict on every pair."""
    folder = tmp_path / "contamination"
    shutil.copytree(demo / "contamination", folder)
    for number, line in enumerate((folder / "pairs.jsonl").open()):
        verdict = common.VERDICTS[number % 4]
        pair_id = json.loads(line)["pair_id"]
        common.append_decision(folder / "decisions.jsonl", pair_id, verdict, "ann")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("file", ["run.json", "pairs.jsonl", "decisions.jsonl"])
def test_what_apply_reads(decided, monkeypatch, file: str) -> None:
    if file == "pairs.jsonl":  # else its hash, not its reader, refuses every mutation
        run = json.loads((decided / "run.json").read_bytes())
        run["outputs"].pop(file)
        (decided / "run.json").write_text(json.dumps(run))
    whole = {path: path.read_bytes() for path in decided.iterdir()}
    monkeypatch.setattr(sys, "argv", ["check_contamination.py"])
    monkeypatch.setattr(os, "fsync", lambda _: None)  # thousands would take most of the time

    def read() -> None:
        broken = (decided / file).read_bytes()
        for path in decided.iterdir():
            if path in whole:
                path.write_bytes(whole[path])
            else:
                path.unlink()
        (decided / file).write_bytes(broken)
        check_contamination.main(["apply", "--out", str(decided)])

    # a folder whose run.json says nothing is of another origin; a data set may have another hash
    places = [str(decided), "since it was checked", "the data set that was checked"]
    seen = fuzz(decided / file, read, 3, *places)
    usual = "read" if file == "decisions.jsonl" else "refused"
    assert seen[usual] > TRIALS / 2


SHOWN = [
    "adapter/train_log.jsonl",
    "eval/results.json",
    "eval/run.json",
    "contamination/pairs.jsonl",
    "contamination/run.json",
]


@pytest.mark.slow
@pytest.mark.parametrize("file", SHOWN)
def test_what_the_terminal_ui_reads(tmp_path, file: str) -> None:
    shutil.copytree(ROOT / "demo/recorded", tmp_path / "out")
    seen = fuzz(tmp_path / "out" / file, lambda: tui.summary(tmp_path / "out"), 4)
    assert seen["read"] > 0


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """A folder with a sharded base, base/, and an adapter of it, adapter/."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=64,
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder / "base", max_shard_size="60KB")
    model = get_peft_model(model, LoraConfig(r=4, target_modules=["gate_proj", "down_proj"]))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    model.save_pretrained(folder / "adapter")

    known = common.base_fingerprint(folder / "base")
    known["base_model"] = str(folder / "base")
    known["load_in_4bit"] = False
    (folder / "adapter/base_fingerprint.json").write_text(json.dumps(known))
    return folder


MERGED = [
    "adapter/adapter_config.json",
    "adapter/base_fingerprint.json",
    "base/config.json",
    "adapter/adapter_model.safetensors",
    "base/*index.json",
    "base/*-00001-*",
]


@pytest.mark.slow
@pytest.mark.parametrize("file", MERGED)
def test_what_merge_reads(models, tmp_path, file: str) -> None:
    shutil.copytree(models, tmp_path / "models")
    path = next((tmp_path / "models").glob(file))
    flags = ["--adapter", str(tmp_path / "models/adapter")]
    flags += ["--base-model", str(tmp_path / "models/base"), "--out", str(tmp_path / "out")]

    def read() -> None:
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        merge.main(flags)

    seen = fuzz(path, read, 5, str(tmp_path))
    assert min(seen["read"], seen["refused"]) > 0


def test_a_mutation_that_no_reader_survives_is_noticed(tmp_path) -> None:
    """The harness itself: a reader that raises anything else fails the test."""
    path = tmp_path / "numbers.json"
    path.write_text("[1, 2, 3]")
    with pytest.raises(AssertionError, match="mutation"):
        fuzz(path, lambda: json.loads(path.read_text()), 6)
    assert FUZZED.pop()[2]["traceback"] == 1


def test_table() -> None:
    """The last of this file: no mutation ended in a traceback."""
    endings = ["read", "refused", "traceback"]
    rows = []
    for reader, file, seen in FUZZED:
        rows.append([reader, file, seen.total()] + [seen[ending] for ending in endings])
    print("\n" + common.markdown_table(["reader", "file", "inputs", *endings], rows))
    assert all(seen["traceback"] == 0 for _, _, seen in FUZZED)

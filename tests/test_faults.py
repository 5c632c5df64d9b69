"""Holds: no file that a step reads, however broken, gives anything but the right result or one line
that names the file (seeded mutations, a thousand a reader); see the table that pytest -s prints."""

import json
import random
import re
import resource
import shutil
import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import DEMO, ROOT

import build_dataset as build
import check_contamination as check

TRIALS = 1000
VALUE = re.compile(rb'"(?:[^"\\]|\\.)*"|-?\d+(?:\.\d+)?|true|false|null')
ODD = [b"null", b"-1", b"0", b"1e400", b"NaN", b'"x"', b"[]", b"{}", b"true", b'""', b"9" * 400,
       b"[" * 5000, b'"\\ud800"', b'"\\u0000"', b'{"a": {"b": []}}', b"1.5", b'["x", 1]']  # fmt: skip


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


def fuzz(path: Path, read: Callable[[], object], seed: int, trials: int = TRIALS) -> Counter:
    """Put mutations of `path` in its place and read: how many went well, how many were refused."""
    whole, rng, seen = path.read_bytes(), random.Random(seed), Counter()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def stuck(*_: object) -> None:
        raise AssertionError("stuck for 20 s")

    signal.signal(signal.SIGALRM, stuck)
    for trial in range(trials):
        path.write_bytes(mutate(whole, rng))
        signal.alarm(20)
        try:
            read()
            seen["read"] += 1
        except (build.UserError, OSError) as error:  # what run_main() prints as one line
            assert path.name in str(error), (trial, error)
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
    print(f"| {path.name} | {trials:,} | {seen['read']:,} | {seen['refused']:,} |")
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

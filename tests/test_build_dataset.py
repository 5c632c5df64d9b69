"""Holds: converters follow the raw layouts; exact and near de-duplication equal brute force and do
not depend on order or block size; every row is accounted for; planted repeats are found; what
breaks the cache of embeddings is named. Of common.py: output folders, run.json, closed pipes."""

import hashlib
import itertools
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import DEMO, REAL_DATA, ROOT, assert_refused, demo_origins, run_script
from jinja2 import UndefinedError

import build_dataset as build
import common

Row = dict[str, Any]
THRESHOLD = 0.8
needs_real_data = pytest.mark.skipif(not REAL_DATA.is_dir(), reason="the real data is not there")


def read_lines(path: Path) -> list[Row]:
    lines = path.read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def write_lines(path: Path, rows: list[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def run_build(tmp_path: Path, name: str, *flags: object) -> Path:
    """Run the step on the files of tmp_path/raw, with a cache that runs share; its output folder.

    A --local among `flags` is the one that counts.
    """
    out = tmp_path / name
    folders = ["--local", tmp_path / "raw", "--out", out, "--cache", tmp_path / "cache"]
    done = run_script("build_dataset", *folders, *flags)
    assert done.returncode == 0, done.stderr
    return out


def counts_of(out: Path) -> Row:
    """The counts of a run.json: rows, "sources" (the funnel) and "keywords"."""
    run = json.loads((out / "run.json").read_text())
    return run["counts"]


# --- converters -----------------------------------------------------------------------------------


def convert(source: str, raw: Row) -> tuple | None:
    converter = build.make_converter(build.load_sources()[source])
    return converter(raw)


PLAIN = [  # sources whose columns are taken as they are
    ("math", {"problem": "p", "solution": "s", "level": "Level 1"}),
    ("leetcode", {"prompt": "p", "full_code": "s", "sha1": "0"}),
    ("airoboros", {"instruction": "p", "response": "s"}),
    ("extra", {"instruction": "p", "output": "s"}),
]


@pytest.mark.parametrize(("source", "raw"), PLAIN)
def test_columns_are_taken_as_they_are(source: str, raw: Row) -> None:
    assert convert(source, raw) == ("p", "", "s")


def test_every_source_has_a_test() -> None:
    tested = {source for source, _ in PLAIN}
    tested |= {"prm800k", "scienceqa", "scibench", "theoremqa", "openbookqa", "reclor"}
    tested |= {"tigerbot", "arb", "guanaco", "open-platypus"}
    assert tested == set(build.load_sources())


def test_the_released_set_keeps_its_input() -> None:
    raw = {"instruction": "i", "input": "c", "output": "o"}
    assert convert("open-platypus", raw) == ("i", "c", "o")
    assert convert("open-platypus", {**raw, "input": None}) == ("i", "", "o")


def test_scibench_takes_the_worked_solution_where_there_is_one() -> None:
    raw = {"problem_text": " p\r\n", "answer_number": "5", "unit": "m"}
    assert convert("scibench", raw) == ("p", "", "5")
    assert convert("scibench", {**raw, "solution": " w "}) == ("p", "", "w")


def test_theoremqa_appends_the_theorem_and_needs_no_picture() -> None:
    of_the_hub = {"Question": "q", "Answer": "1", "Picture": None}
    assert convert("theoremqa", of_the_hub) == ("q", "", "1")
    assert convert("theoremqa", {**of_the_hub, "Picture": "NONE"}) == ("q", "", "1")
    assert convert("theoremqa", {**of_the_hub, "Picture": "x.png"}) is None
    defined = {**of_the_hub, "Answer": [1, 2], "theorem_def": "t"}
    assert convert("theoremqa", defined) == ("q\nRelevant Theorem: t", "", "[1, 2]")


def test_openbookqa_in_both_layouts() -> None:
    choices = [{"text": "a", "label": "A"}, {"text": "b", "label": "B"}]
    raw = {"question": {"stem": "q", "choices": choices}, "fact1": "f", "answerKey": "B"}
    expected = ("q\nA: a\nB: b", "f", "The answer is B: b")
    assert convert("openbookqa", raw) == expected
    choices = {"text": ["a", "b"], "label": ["A", "B"]}
    of_the_hub = {"question_stem": "q", "choices": choices, "fact1": "f", "answerKey": "B"}
    assert convert("openbookqa", of_the_hub) == expected


ONE_LETTER = "Choose A, B, C or D as your solution."


def test_reclor_asks_for_a_letter() -> None:
    raw = {"context": "c", "question": "q", "answers": ["w", "x", "y", "z"], "label": 2}
    assert convert("reclor", raw) == ("c q\nA: w\nB: x\nC: y\nD: z", ONE_LETTER, "C")


def test_tigerbot_takes_python_alone() -> None:
    raw = {"instruction": "Use python to solve", "input": "p", "output": "c"}
    assert convert("tigerbot", raw) == ("p", "", "c")
    assert convert("tigerbot", {**raw, "instruction": "Use java to solve"}) is None


def test_arb_is_free_or_multiple_choice() -> None:
    free = {"Problem_Statement": "p", "Solution": "s"}
    assert convert("arb", free) == ("p", "", "s")
    reading = {"Problem Statement": "p", "Answer Candidates": ["a", "b"], "Final Answer": "B"}
    assert convert("arb", reading) == ("p\nA. a\nB. b", ONE_LETTER, "B")
    law = {**reading, "Solution": ""}
    assert convert("arb", law) == ("p\nA. a\nB. b", ONE_LETTER, "B")


def test_guanaco_keeps_later_turns_in_the_answer() -> None:
    text = "### Human: h### Assistant: a### Human: h2### Assistant: a2"
    expected = ("h", "", "a### Instruction:\n h2### Response:\n a2")
    assert convert("guanaco", {"text": text}) == expected


SCIENCEQA = {
    "question": "Based on this information, what is it?",
    "choices": ["a", "b"],
    "answer": 0,
    "hint": "It is red.",
    "image": None,
    "skill": "Recall",
    "lecture": " Long ago. ",
    "solution": "It is a.",
}
GRAMMAR = ["Use guide words", "Is it a complete sentence, a fragment, or a run-on?"]
LEFT_OUT = [{"lecture": "word " * 401}, {"image": "image.png"}, {"solution": ""}]
LEFT_OUT += [{"skill": skill} for skill in GRAMMAR]


def test_scienceqa_takes_what_the_question_needs() -> None:
    question = "It is red.\nBased on this information, what is it?\nA: a\nB: b"
    expected = (question, "Long ago.", "It is a.")
    assert convert("scienceqa", SCIENCEQA) == expected
    text_only = dict(SCIENCEQA)
    text_only.pop("image")
    assert convert("scienceqa", text_only) == expected
    _, context, _ = convert("scienceqa", {**SCIENCEQA, "question": "What?", "hint": ""})
    assert context == ""


@pytest.mark.parametrize("change", LEFT_OUT, ids=str)
def test_scienceqa_leaves_out(change: Row) -> None:
    assert convert("scienceqa", {**SCIENCEQA, **change}) is None


def prm800k(ratings: list[int], answer: str = "4", finish: str = "solution") -> Row:
    """A raw row of two steps, each with a wrong completion and one of this rating."""
    texts = ["First.", "Then $\\boxed{4}$.\n\n# Answer\n\n4"]
    steps = []
    for text, rating in zip(texts, ratings, strict=True):
        completions = [{"text": "wrong", "rating": -1}, {"text": text, "rating": rating}]
        steps.append({"completions": completions})
    return {
        "question": {"problem": "2+2?", "ground_truth_answer": answer},
        "label": {"steps": steps, "finish_reason": finish},
    }


def test_prm800k_joins_the_correct_steps() -> None:
    assert convert("prm800k", prm800k([1, 1])) == ("2+2?", "", "First.\nThen $4$.\n4")
    by_hand = prm800k([-1, 1])
    by_hand["label"]["steps"][0]["human_completion"] = {"text": "By hand.", "rating": 1}
    assert convert("prm800k", by_hand) == ("2+2?", "", "By hand.\nThen $4$.\n4")


def test_prm800k_leaves_out_what_is_not_solved() -> None:
    assert convert("prm800k", prm800k([1, 1], answer="5")) is None
    assert convert("prm800k", prm800k([1, -1])) is None  # no answer among correct steps
    assert convert("prm800k", prm800k([1, 1], finish="give_up")) is None


def test_a_theorem_that_is_named_needs_its_definition() -> None:
    row = {"Question": "q", "Answer": 1, "Picture": None, "theorem": "Rolle's"}
    with pytest.raises(UndefinedError, match="theorem_def"):
        convert("theoremqa", row)


def test_definitions_of_theorems_are_an_input_and_no_rows(tmp_path) -> None:
    folder = tmp_path / "theoremqa"
    shutil.copytree(ROOT / "demo/data/theoremqa", folder)
    definitions = folder / "all_theorems.json"
    args = build.parse_args(["--sources", "theoremqa", "--local", str(tmp_path)])
    source = build.load_sources()["theoremqa"]

    reading = build.read_source(source, args)
    assert str(definitions) in reading.inputs
    assert reading.rows
    for row in reading.rows:
        assert row["origin"].startswith("theoremqa_test.json#")
        assert "\nRelevant Theorem: " in row["instruction"]

    (folder / "theoremqa_test.json").unlink()
    with pytest.raises(common.UserError, match="no .jsonl or .json file of a training split"):
        build.read_source(source, args)


def test_a_setting_that_no_source_has_is_named(tmp_path, monkeypatch) -> None:
    text = build.SOURCES.read_text(encoding="utf-8")
    broken = tmp_path / "sources.toml"
    broken.write_text(text.replace("generated = true", "generate = true"), encoding="utf-8")
    monkeypatch.setattr(build, "SOURCES", broken)
    build.read_sources_toml.cache_clear()
    try:
        with pytest.raises(common.UserError, match=r"sources.toml, \[leetcode\]: .*'generate'"):
            build.load_sources()
    finally:
        build.read_sources_toml.cache_clear()


# --- cosines and near-duplicates against brute force ----------------------------------------------


def normalize(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def unit_vectors(rows: int, seed: int, clusters: int = 0) -> np.ndarray:
    """Random unit vectors in 16 dimensions, many of them close to each other with `clusters`."""
    rng = np.random.default_rng(seed)
    vectors = rng.normal(size=(rows, 16))
    if clusters:
        centres = rng.normal(size=(clusters, 16))
        chosen = rng.integers(clusters, size=rows)
        vectors = centres[chosen] + 0.35 * vectors
    return normalize(vectors).astype(np.float32)


def make_row(question: str, output: str, source: str = "s", origin: object = 0) -> Row:
    row = {"instruction": question, "input": "", "output": output}
    return {**row, "source": source, "origin": str(origin)}


def make_rows(count: int, seed: int) -> list[Row]:
    """Rows with answers of random lengths, in the order of preference."""
    rng = random.Random(seed)
    rows = []
    for number in range(count):
        answer = "x" * rng.randint(1, 9)
        rows.append(make_row(f"question {number}", answer, origin=number))
    build.add_ids(rows)
    return sorted(rows, key=build.preference)


def found_pairs(a: np.ndarray, b: np.ndarray, threshold: float) -> dict[tuple[int, int], float]:
    """{(i, j): cosine} by similar_pairs, which must find none of them twice."""
    pairs = {}
    for i, j, cosines in build.similar_pairs(a, b, threshold):
        for pair in zip(i.tolist(), j.tolist(), cosines.tolist(), strict=True):
            assert pair[:2] not in pairs
            pairs[pair[:2]] = pair[2]
    return pairs


def all_cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return a.astype(np.float64) @ b.astype(np.float64).T


def pairs_from(cosines: np.ndarray, threshold: float) -> set[tuple[int, int]]:
    pairs = np.argwhere(cosines >= threshold)
    return set(map(tuple, pairs.tolist()))


BLOCKS = [(1, 1), (7, 5), (64, 64), (1024, 8192)]  # rows, columns
in_blocks = pytest.mark.parametrize("block", [1, 13, 1024])
in_five_trials = pytest.mark.parametrize("seed", range(5))


@pytest.mark.parametrize(("block", "columns"), BLOCKS)
@in_five_trials
def test_similar_pairs_equal_brute_force(monkeypatch, block: int, columns: int, seed: int) -> None:
    monkeypatch.setattr(build, "BLOCK", block)
    monkeypatch.setattr(build, "BLOCK_COLUMNS", columns)
    a = unit_vectors(60, seed, clusters=8)
    b = unit_vectors(43, seed, clusters=8)
    b[:5] = a[:5]
    exact = all_cosines(a, b)
    found = found_pairs(a, b, THRESHOLD)
    assert set(found) == pairs_from(exact, THRESHOLD)
    assert len(found) > 20
    for pair, cosine in found.items():
        assert abs(cosine - exact[pair]) < 1e-12


@pytest.mark.parametrize("threshold", [0.5, 0.8, 0.95])
def test_similar_pairs_equal_brute_force_on_real_embeddings(
    demo, monkeypatch, threshold: float
) -> None:
    monkeypatch.setattr(build, "BLOCK", 17)
    texts = [row["problem"] for row in read_lines(ROOT / "demo/data/math/math_train.jsonl")]
    texts += [row["instruction"] for row in read_lines(ROOT / "demo/world/train.jsonl")]
    vectors = build.Embedder(build.EMBEDDING_MODEL, demo / "cache")(texts)
    found = found_pairs(vectors, vectors, threshold)
    assert set(found) == pairs_from(all_cosines(vectors, vectors), threshold)
    assert len(found) > len(texts)


def test_threshold_is_met_at_exactly_its_value() -> None:
    just = np.float32(0.8)  # stored as 0.800000012
    below = np.nextafter(just, np.float32(0))  # stored as 0.799999952
    a = np.array([[1, 0]], dtype=np.float32)
    b = np.array([[just, 0.6], [below, 0.6]], dtype=np.float32)
    assert list(found_pairs(a, b, 0.8)) == [(0, 0)]


def plain_mutual_cosine(a: np.ndarray, b: np.ndarray) -> float:
    """The least similar window of two texts, each with its best partner in the other."""
    cosines = all_cosines(a, b)
    best_partners = [max(line) for line in cosines]
    best_partners += [max(line) for line in cosines.T]
    return min(best_partners)


def brute_force_near(rows: list[Row], windows: list[np.ndarray]) -> dict[str, tuple[str, float]]:
    """The greedy rule, one row after the other: dropped id -> (kept id, cosine)."""
    assert rows == sorted(rows, key=lambda row: (-len(row["output"]), row["id"]))
    kept = []
    dropped = {}
    for place in range(len(rows)):
        twin = None
        highest = 0.0
        for other in kept:
            cosine = plain_mutual_cosine(windows[place], windows[other])
            if cosine > highest:
                twin = other
                highest = cosine
        if highest >= THRESHOLD:
            dropped[rows[place]["id"]] = (rows[twin]["id"], round(highest, 6))
        else:
            kept.append(place)
    return dropped


def assert_near_equals_brute_force(rows: list[Row], windows: list[np.ndarray]) -> int:
    """Compare drop_near() with brute force; how many rows it drops."""
    sizes = [len(parts) for parts in windows]
    kept, dropped = build.drop_near(rows, np.concatenate(windows), sizes, THRESHOLD)
    expected = brute_force_near(rows, windows)
    assert {row["id"]: (row["kept_id"], row["cosine"]) for row in dropped} == expected
    assert [row for row in rows if row["id"] not in expected] == kept
    return len(dropped)


@in_blocks
@in_five_trials
def test_near_duplicates_equal_brute_force(monkeypatch, block: int, seed: int) -> None:
    monkeypatch.setattr(build, "BLOCK", block)
    vectors = unit_vectors(150, seed, clusters=20)
    vectors[10] = vectors[20]
    windows = np.split(vectors, 150)
    dropped = assert_near_equals_brute_force(make_rows(150, seed), windows)
    assert 20 < dropped < 150


@in_blocks
@in_five_trials
def test_windows_equal_brute_force(monkeypatch, block: int, seed: int) -> None:
    """Rows of one to four windows, some of which stand in several rows like a shared passage."""
    monkeypatch.setattr(build, "BLOCK", block)
    rng = np.random.default_rng(seed)
    pool = unit_vectors(12, seed)
    windows = []
    for size in rng.integers(1, 5, size=120).tolist():
        parts = pool[rng.choice(12, size, replace=False)]
        noise = rng.normal(size=parts.shape, scale=0.03)
        windows.append(normalize(parts + noise.astype(np.float32)))
    assert assert_near_equals_brute_force(make_rows(120, seed), windows) > 10


def test_windows_cover_a_text_and_fit_the_model(tmp_path) -> None:
    from transformers import AutoTokenizer

    embedder = build.Embedder(build.EMBEDDING_MODEL, tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(embedder.folder)
    long = " ".join(f"The number {n} is not {n + 1}." for n in range(120))
    texts = ["", "Short.", long, "x" * 3000, "\u00e9\u65e5 " * 400]
    windows = embedder.windows(texts)
    for text, parts in zip(texts, windows, strict=True):
        assert "".join(parts) == text
        for part in parts:
            assert len(tokenizer(part)["input_ids"]) <= build.WINDOW
    counts = [len(parts) for parts in windows]
    assert counts[:2] == [1, 1]
    assert counts[2] > 3


def test_a_shared_passage_alone_drops_nothing(tmp_path) -> None:
    """The question stands last, where the model's 256 tokens do not reach."""
    lecture = " ".join(f"Rock {n} forms when layer {n} cools under pressure." for n in range(60))
    gas = "Which gas do plants take in?" * 60
    legs = "How many legs has a spider?" * 60
    rows = [make_row(lecture, "o", origin=1), make_row(lecture, "oo", origin=2)]
    rows.append(make_row(lecture + " Done.", "o", origin=3))
    for row, question in zip(rows, [gas, legs, gas], strict=True):
        row["input"] = question
    build.add_ids(rows)
    embedder = build.Embedder(build.EMBEDDING_MODEL, tmp_path)
    args = build.parse_args(["--sources", "math", "--whole-text-only"])
    kept, _ = build.deduplicate(list(rows), embedder, args)
    assert len(kept) == 1

    args = build.parse_args(["--sources", "math"])
    kept, dropped = build.deduplicate(list(rows), embedder, args)
    assert len(kept) == 2
    assert dropped[0]["cosine"] >= THRESHOLD


# --- exact duplicates and ids ---------------------------------------------------------------------


def test_exact_duplicates() -> None:
    rows = [make_row("cafe\u0301  two\nwords", "o", "math")]
    rows.append(make_row("caf\u00e9 two words", "oo", "math"))
    rows.append(make_row("2\u00b2", "ooo", "math"))
    rows.append(make_row("22", "oooo", "math"))
    rows.append(make_row("short", "ooooo", "math"))
    rows.append(make_row("short", "a much longer answer", "math"))
    rows.append(make_row("short", "p", "prm800k"))
    build.add_ids(rows)
    kept, dropped = build.drop_exact(rows)
    answers = {row["instruction"]: row["output"] for row in kept}
    expected = {"caf\u00e9 two words": "oo", "2\u00b2": "ooo", "22": "oooo", "short": "p"}
    assert answers == expected
    assert len(kept) + len(dropped) == len(rows)
    ids = {row["id"] for row in kept}
    assert all(row["kept_id"] in ids for row in dropped)


def test_ids_are_stable_and_unique() -> None:
    rows = [make_row("q", "a", origin=place) for place in range(3)]
    build.add_ids(rows)
    ids = [row["id"] for row in rows]
    assert len(set(ids)) == 3
    again = [make_row("q", "a", origin=place) for place in [2, 1, 0]]
    build.add_ids(again)
    assert [row["id"] for row in reversed(again)] == ids


# --- embeddings and their cache -------------------------------------------------------------------


def test_embedder_embeds_a_text_once(tmp_path, monkeypatch) -> None:
    import sentence_transformers

    texts = ["What is a prime number?", "", "Name a metal.", "What is a prime number?"]
    embedder = build.Embedder(build.EMBEDDING_MODEL, tmp_path)
    first = embedder(texts)
    assert isinstance(first, np.memmap)
    assert first.shape == (4, 384)
    assert (first[0] == first[3]).all()
    assert np.allclose(np.linalg.norm(first, axis=1), 1, atol=1e-6)
    model = sentence_transformers.SentenceTransformer(str(embedder.folder), device="cpu")
    assert np.allclose(first, model.encode(texts, normalize_embeddings=True), atol=1e-6)

    assert len(embedder([])) == 0

    def fail(*_, **__):
        raise AssertionError("embedded again")

    monkeypatch.setattr(sentence_transformers, "SentenceTransformer", fail)
    again = build.Embedder(build.EMBEDDING_MODEL, tmp_path)(texts[:3])
    assert (again == first[:3]).all()


def test_a_broken_cache_is_named_with_its_remedy(tmp_path) -> None:
    (tmp_path / "embeddings.sqlite").write_bytes(b"no database\n" * 1000)
    with pytest.raises(common.UserError, match=r"embeddings\.sqlite: .*remove it: it is only a"):
        build.VectorCache(tmp_path)


def test_a_folder_in_the_place_of_the_cache_is_named(tmp_path) -> None:
    (tmp_path / "embeddings.sqlite").mkdir()
    with pytest.raises(common.UserError, match=r"embeddings\.sqlite: unable to open"):
        build.VectorCache(tmp_path)


def test_a_full_disk_under_the_cache_loses_nothing(tmp_path) -> None:
    """SQLite's own limit of pages stands in for the disk: it raises the same error."""
    cache = build.VectorCache(tmp_path)
    cache.add([b"first"], [b"vector"])
    cache.database.execute("PRAGMA max_page_count = 3")
    with pytest.raises(common.UserError, match=r"embeddings\.sqlite: .* full; make room"):
        cache.add([b"second", b"third"], [b"v", b"x" * 100_000])
    again = build.VectorCache(tmp_path)
    assert again.get(b"first") == b"vector"
    assert again.get(b"second") is None


def test_a_cache_that_breaks_while_it_is_read_is_named(tmp_path) -> None:
    keys = [bytes([number]) for number in range(200)]
    build.VectorCache(tmp_path).add(keys, [b"x" * 500] * 200)
    with (tmp_path / "embeddings.sqlite").open("r+b") as file:
        file.seek(4096)  # after the first page
        file.write(b"\xff" * 50_000)
    with pytest.raises(common.UserError, match=r"embeddings\.sqlite: .*malformed"):
        build.VectorCache(tmp_path).get(keys[7])


def test_a_checked_device_has_no_attention_that_plans_for_every_length() -> None:
    import torch

    torch.backends.cuda.enable_cudnn_sdp(True)
    assert common.use_device("cpu") == "cpu"
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    with pytest.raises(common.UserError, match="--device nonsense cannot be used here"):
        common.use_device("nonsense")


# --- the whole step -------------------------------------------------------------------------------


def place_of(row: Row) -> str:
    return f"{row['source']}:{row['origin']}"


def test_planted_repeats_are_found(demo) -> None:
    planted = json.loads((ROOT / "demo/planted.json").read_text())
    kept = {place_of(row): row["id"] for row in read_lines(demo / "dataset/dataset.jsonl")}
    dropped = {place_of(row): row for row in read_lines(demo / "dataset/dropped.jsonl")}
    origins = demo_origins()
    planted_places = set()
    for kind, reason in {"exact": "exact", "near": "near", "replaced": "exact"}.items():
        assert planted[kind]
        for plant in planted[kind]:
            place = origins[plant["dropped"]]
            planted_places.add(place)
            assert dropped[place]["reason"] == reason, plant
            assert dropped[place]["kept_id"] == kept[origins[plant["kept"]]], plant

    found = set()
    without_keyword = set()
    for place, row in dropped.items():
        if row["reason"] == "keyword":
            without_keyword.add(place)
        elif row["reason"] in ("exact", "near") and row["source"] != "world":
            found.add(place)
    assert found == planted_places
    assert without_keyword == {origins[place] for place in planted["keyword"]}


def test_accounts_add_up(demo) -> None:
    run = json.loads((demo / "dataset/run.json").read_text())
    counts = run["counts"]
    for line in counts["sources"]:
        dropped = sum(line[reason] for reason in build.REASONS)
        assert line["read"] == line["kept"] + dropped, line
    assert run["outputs"]["dataset.jsonl"]["rows"] == counts["kept"]
    assert run["outputs"]["dropped.jsonl"]["rows"] == counts["read"] - counts["kept"]


def test_invalid_rows_are_counted_with_their_place(tmp_path) -> None:
    lines = [
        b'{"problem": "What is 3 plus 9?", "solution": "12"}',
        b'{"problem": "broken',
        b'{"problem": "no solution"}',
        b'{"problem": 5, "solution": "wrong type"}',
        b'{"problem": "  ", "solution": "empty"}',
        b'{"problem": "nul \\u0000", "solution": "x"}',
        b'{"problem": "half \\ud800", "solution": "x"}',
        b'{"problem": "not utf-8 \xff", "solution": "x"}',
        b"[1, 2]",
        b"",
        b'{"problem": "Name a metal.", "solution": "iron"}',
    ]
    file = tmp_path / "raw/math/math_train.jsonl"
    file.parent.mkdir(parents=True)
    file.write_bytes(b"\n".join(lines))
    out = run_build(tmp_path, "out", "--sources", "math")
    dropped = read_lines(out / "dropped.jsonl")
    places = {row["origin"] for row in dropped if row["reason"] == "invalid"}
    assert places == {f"math_train.jsonl:{number}" for number in range(2, 10)}
    assert len(read_lines(out / "dataset.jsonl")) == 2

    strict = ["--local", tmp_path / "raw", "--sources", "math", "--strict"]
    done = run_script("build_dataset", *strict, "--out", tmp_path / "strict")
    assert_refused(done, "math_train.jsonl:2")
    assert not (tmp_path / "strict").exists()


def test_changed_columns_are_named(tmp_path) -> None:
    rows = [{"question": "q", "solution": "s"}] * 3
    write_lines(tmp_path / "raw/math/math_train.jsonl", rows)
    flags = ["--local", tmp_path / "raw", "--sources", "math", "--out", tmp_path / "out"]
    done = run_script("build_dataset", *flags, "--cache", tmp_path / "cache")
    assert_refused(done, "'problem' is undefined", "question, solution")
    assert not (tmp_path / "out").exists()


def test_huge_and_odd_rows(tmp_path) -> None:
    rows = [
        {"problem": "What is 1 + 1? " * 700_000, "solution": "2"},  # 10 MB
        {"problem": "\u05de\u05d4 \u05d6\u05d4?\u202e", "solution": "right to left"},
        {"problem": "Name a prime.", "solution": "7", "unique_id": "same"},
        {"problem": "Name an even number that is no multiple of four.", "solution": "6"},
        {"problem": "Name a prime.", "solution": "7", "unique_id": "same"},
    ]
    write_lines(tmp_path / "raw/math/math_train.jsonl", rows)
    out = run_build(tmp_path, "out", "--sources", "math", "--whole-text-only")
    lengths = [len(row["instruction"]) for row in read_lines(out / "dataset.jsonl")]
    assert len(lengths) == 4
    assert max(lengths) > 10_000_000


def shuffle_lines(folder: Path, copy: Path, rng: random.Random) -> None:
    """Copy the .jsonl files of a folder, each with its lines in another order."""
    copy.mkdir(parents=True)
    for file in folder.glob("*.jsonl"):
        lines = file.read_text(encoding="utf-8").splitlines()
        rng.shuffle(lines)
        (copy / file.name).write_text("\n".join(lines), encoding="utf-8")


def test_order_of_input_changes_no_byte(tmp_path) -> None:
    """The lines of every source's file, and the sources themselves, in three orders.

    Only an invalid row is named by its line, which is what one needs to mend it.
    """
    names = ["math", "openbookqa", "guanaco"]
    outputs = set()
    for seed in range(3):
        raw = ROOT / "demo/data"
        rng = random.Random(seed)
        if seed:
            raw = tmp_path / f"raw{seed}"
            for name in names:
                shuffle_lines(ROOT / "demo/data" / name, raw / name, rng)
        order = ",".join(rng.sample(names, 3))
        out = run_build(tmp_path, f"out{seed}", "--sources", order, "--local", raw)

        dropped = (out / "dropped.jsonl").read_bytes().splitlines()
        dropped = [line for line in dropped if b'"invalid"' not in line]
        assert len(dropped) > 10
        outputs.add((out / "dataset.jsonl").read_bytes() + b"\n".join(dropped))
    assert len(outputs) == 1


KEYWORDS = {
    "What is AI good for?": ["ai"],
    "Name a SOLAR or wind farm. Solar!": ["solar", "wind"],
    "A differential equation.": ["differential", "equation"],  # no place counts twice
    "He said it again in the rain.": [],  # "ai" inside words
    "Pick a summer hat.": [],
}


def test_keywords_are_whole_words_and_counted(tmp_path) -> None:
    rows = [{"instruction": text, "response": "r", "category": "c"} for text in KEYWORDS]
    write_lines(tmp_path / "raw/airoboros/rows.jsonl", rows)
    out = run_build(tmp_path, "out", "--sources", "airoboros")
    counts = counts_of(out)
    [line] = counts["sources"]
    assert (line["keyword"], line["kept"]) == (2, 3)
    words = itertools.chain.from_iterable(KEYWORDS.values())
    assert counts["keywords"] == dict.fromkeys(words, 1)


def test_generated_rows_can_be_left_out(tmp_path) -> None:
    rows = [{"instruction": text, "response": "r"} for text in KEYWORDS]
    write_lines(tmp_path / "raw/airoboros/rows.jsonl", rows)
    written = {"problem": "Add 1 and 1.", "solution": "2"}
    write_lines(tmp_path / "raw/math/train.jsonl", [written])
    out = run_build(tmp_path, "out", "--sources", "airoboros,math", "--exclude-generated")
    generated, human = counts_of(out)["sources"]
    assert (generated["generated"], generated["kept"]) == (5, 0)
    assert (human["generated"], human["kept"]) == (0, 1)


@needs_real_data
def test_funnel_adds_up_on_real_files(tmp_path) -> None:
    names = "math,prm800k,scienceqa,scibench,reclor,theoremqa,openbookqa,guanaco"
    flags = ["--local", REAL_DATA, "--sources", names, "--include-test-splits", "--limit", 60]
    out = run_build(tmp_path, "out", *flags)
    assert json.loads((out / "run.json").read_text())["partial"]
    lines = counts_of(out)["sources"]
    assert len(lines) == 8
    for line in lines:
        dropped = sum(line[reason] for reason in build.REASONS)
        assert line["read"] == 60 == line["kept"] + dropped, line

    rows = read_lines(out / "dataset.jsonl")
    kept = {row["id"] for row in rows}
    for row in read_lines(out / "dropped.jsonl"):
        assert row["reason"] not in ("exact", "near") or row["kept_id"] in kept

    embedder = build.Embedder(build.EMBEDDING_MODEL, tmp_path / "cache")
    texts = [build.question_of(row) for row in rows]
    vectors = [embedder(parts) for parts in embedder.windows(texts)]
    for place, vector in enumerate(vectors):
        for other in vectors[:place]:
            assert build.mutual_cosine(vector, other) < THRESHOLD


ROWS_OF_REAL_FILES = {  # rows read, rows that become training rows before de-duplication
    "math": (12_500, 12_500),
    "prm800k": (758, 758),
    "scibench": (692, 692),
    "theoremqa": (800, 747),
    "openbookqa": (5_957, 5_957),
    "guanaco": (953, 89),
    "reclor": (500, 195),
}


@needs_real_data
@pytest.mark.parametrize("name", ROWS_OF_REAL_FILES)
def test_real_layouts_convert(name: str) -> None:
    args = build.parse_args(["--local", str(REAL_DATA), "--include-test-splits"])
    reading = build.read_source(build.load_sources()[name], args)
    kept = len(reading.rows)
    assert (kept + len(reading.dropped), kept) == ROWS_OF_REAL_FILES[name]


@needs_real_data
def test_real_scienceqa_is_dropped_by_its_rule_alone() -> None:
    args = build.parse_args(["--local", str(REAL_DATA), "--include-test-splits"])
    reading = build.read_source(build.load_sources()["scienceqa"], args)
    kept = len(reading.rows)
    assert kept + len(reading.dropped) == 1_773
    assert kept > 500
    assert {row["reason"] for row in reading.dropped} == {"rule"}


IMPOSSIBLE = [  # flags, a word of the message
    ("--cosine-threshold 2", "threshold"),
    ("--sources maths", "maths"),
    ("--extra a=missing.jsonl", "missing.jsonl"),
    ("--extra =WORLD", "name of its own"),
    ("--extra a=WORLD --extra a=WORLD", "name of its own"),
    ("--extra math=WORLD", "a source is called math"),
    ("--local nowhere", "nowhere"),
]


@pytest.mark.parametrize(("flags", "word"), IMPOSSIBLE)
def test_impossible_settings_are_refused(flags: str, word: str) -> None:
    flags = flags.replace("WORLD", str(ROOT / "demo/world/train.jsonl"))
    with pytest.raises(common.UserError, match=word):
        build.parse_args(["--sources", "math", *DEMO, *flags.split()])


def test_impossible_settings_are_named_at_once() -> None:
    with pytest.raises(common.UserError, match="maths.*threshold"):
        build.parse_args(["--sources", "maths", "--cosine-threshold", "2"])


def test_an_output_folder_that_may_not_be_written_is_refused(tmp_path, demo) -> None:
    flags = ["--sources", "math", *DEMO, "--out"]
    done = run_script("build_dataset", *flags, demo / "dataset")
    assert_refused(done, "finished", "--overwrite")
    (tmp_path / "own").mkdir()
    (tmp_path / "own/thesis.txt").write_text("not yours")
    done = run_script("build_dataset", *flags, tmp_path / "own")
    assert_refused(done, "no run.json of")


def test_what_cannot_be_run_leaves_no_folder(tmp_path) -> None:
    out = tmp_path / "out"
    done = run_script("build_dataset", "--sources", "reclor", *DEMO, "--out", out)
    assert_refused(done, "reclor", "HF_TOKEN", "--local")  # no such folder: the hub, which is off
    done = run_script("build_dataset", "--sauces", "math", "--out", out)
    assert_refused(done, "--sauces")
    assert not out.exists()


def problems_on_the_hub(include_test_splits: bool, **hub: object) -> list[str]:
    """The column `problem` of a source on the hub; no row has an error, none a place twice."""
    source = build.Source("math", licence="MIT", hub=hub)
    places = set()
    problems = []
    for place, raw, error in build.hub_rows(source, include_test_splits):
        assert not error and place not in places
        places.add(place)
        problems.append(raw["problem"])
    return problems


def test_hub_loading_on_a_local_copy(tmp_path) -> None:
    folder = str(tmp_path)
    file = tmp_path / "train.jsonl"
    training = ["p0", "p1", "p2"]
    write_lines(file, [{"problem": text} for text in training])
    write_lines(tmp_path / "test.jsonl", [{"problem": "held out"}])
    assert problems_on_the_hub(False, path=folder) == training
    assert sorted(problems_on_the_hub(True, path=folder)) == ["held out", *training]
    assert problems_on_the_hub(False, path="json", data_files=[str(file)]) == training
    with pytest.raises(common.UserError, match="cannot be loaded: .*--local"):
        problems_on_the_hub(False, path=f"{folder}/nowhere")


# --- common.py: output folders, run.json, closed pipes --------------------------------------------


def claim(out: Path, keep_run: bool = False) -> None:
    """Begin and end to hold a folder, as a step does."""
    with common.claim_output(out, overwrite=True, keep_run=keep_run):
        pass


def write_run(out: Path, outputs: Row) -> None:
    """Write a run.json of the running program that lists these outputs."""
    run = {"step": Path(sys.argv[0]).stem, "outputs": outputs}
    (out / "run.json").write_text(json.dumps(run))


def finished(out: Path, *names: str) -> Path:
    """A folder that a step has finished, with files of these names and a person's verdicts."""
    (out / "model").mkdir(parents=True)
    for name in [*names, "decisions.jsonl", "mine.txt"]:
        (out / name).write_text(name)
    write_run(out, {name: {"sha256": "of other bytes"} for name in names})
    return out


def test_overwriting_removes_what_the_former_run_wrote_and_nothing_else(tmp_path) -> None:
    out = finished(tmp_path / "out", "old.safetensors", "model/old.json")
    (out / "apply.json").write_text(json.dumps({"outputs": {"clean.jsonl": {}}}))
    (out / "clean.jsonl").touch()
    claim(out, keep_run=True)
    assert (out / "old.safetensors").exists()
    assert (out / "run.json").exists()
    claim(out)
    files = [path.name for path in out.rglob("*") if path.is_file()]
    assert sorted(files) == ["decisions.jsonl", "mine.txt"]


FORGED = [
    "decisions.jsonl",
    "Decisions.JSONL",
    "model/decisions.jsonl",
    "./decisions.jsonl",
    "model/../decisions.jsonl",
    "../victim",
    "model/../../victim",
    "../out/mine.txt",
    "VICTIM",
    "way/victim",
    "model",
    "",
    ".",
    "..",
    ".unfinished",
    ".hidden",
    "nul\0",
    "\ud800",
    "x" * 5000,
]


@pytest.mark.parametrize("name", FORGED)
def test_a_forged_list_of_outputs_removes_nothing(tmp_path, name: str) -> None:
    out = finished(tmp_path / "out")
    victim = tmp_path / "victim"
    victim.touch()
    (out / "model/decisions.jsonl").touch()
    (out / ".hidden").touch()
    (out / "way").symlink_to(tmp_path)
    write_run(out, {name.replace("VICTIM", str(victim)): {"sha256": "x"}})
    before = {path for path in tmp_path.rglob("*") if path.name != "run.json"}
    claim(out)
    assert {*tmp_path.rglob("*")} == before


@pytest.mark.parametrize("text", ["", "[]", '{"outputs": []}', '{"outputs": "decisions.jsonl"}'])
def test_a_broken_list_of_outputs_removes_nothing(tmp_path, text: str) -> None:
    out = finished(tmp_path / "out")
    (out / "apply.json").write_text(text)
    claim(out)
    assert {path.name for path in out.iterdir()} == {"decisions.jsonl", "mine.txt", "model"}


def test_run_json_lists_what_a_step_says_it_wrote(tmp_path, monkeypatch) -> None:
    args = build.parse_args(["--sources", "math", "--out", str(tmp_path / "out")])
    written = [args.out / "rows.jsonl", args.out / "model/table.md"]
    synced = []
    monkeypatch.setattr(common, "sync", synced.append)
    with common.claim_output(args.out, overwrite=False):
        (args.out / "model").mkdir()
        for path in written:
            path.write_text("{}\n{}\n")
        (args.out / "checkpoint").touch()
        common.finish_run(args, inputs={}, outputs=written, started=0.0, counts={"rows": 2})
    run = json.loads((args.out / "run.json").read_text())
    digest = hashlib.sha256(b"{}\n{}\n").hexdigest()
    expected = {"rows.jsonl": {"sha256": digest, "rows": 2}, "model/table.md": {"sha256": digest}}
    assert run["outputs"] == expected
    assert run["counts"] == {"rows": 2}
    assert {*synced} == {*written, args.out, args.out / "model"}


def run_into_closed_pipe(end: str, unbuffered: str) -> tuple[int, str]:
    """(exit code, stderr) of a step that prints a line, then does `end`; nobody reads stdout."""
    code = "import sys\nfrom common import UserError, run_main\n"
    code += f"def main():\n print('x')\n {end}\nrun_main(main)"
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-c", code]
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    pipes = {"stdout": writer, "stderr": subprocess.PIPE, "text": True}
    done = subprocess.run(command, cwd=ROOT, env=environment, **pipes)
    os.close(writer)
    return done.returncode, done.stderr


@pytest.mark.parametrize("end", ["", "sys.exit(3)", "raise UserError('bad')"])
def test_a_reader_that_goes_away_gets_no_traceback(end: str) -> None:
    """At main()'s own print, which is not buffered, it ends there."""
    assert run_into_closed_pipe(end, unbuffered="1") == (141, "")


@pytest.mark.parametrize("end", ["", "sys.exit(3)"])
def test_a_reader_that_goes_away_is_noticed_at_the_end(end: str) -> None:
    assert run_into_closed_pipe(end, unbuffered="") == (141, "")


def test_a_fault_is_told_although_nobody_reads_stdout() -> None:
    assert run_into_closed_pipe("raise UserError('bad')", "") == (141, "error: bad\n")

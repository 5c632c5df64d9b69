"""Holds: converters follow the raw layouts; exact and near de-duplication equal brute force and do
not depend on order or block size; every row is accounted for; planted repeats are found."""

import hashlib
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import DEMO, REAL_DATA, ROOT, assert_refused, demo_origins, run_script
from jinja2 import UndefinedError

import build_dataset as build
import common


def convert(source: str, raw: dict) -> tuple | None:
    return build.make_converter(build.load_sources()[source])(raw)


def unit_vectors(rows: int, seed: int, clusters: int = 0) -> np.ndarray:
    """Random unit vectors in 16 dimensions, many of them close to each other with `clusters`."""
    rng = np.random.default_rng(seed)
    vectors = rng.normal(size=(rows, 16))
    if clusters:
        centres = rng.normal(size=(clusters, 16))
        vectors = centres[rng.integers(clusters, size=rows)] + 0.35 * vectors
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def make_rows(count: int, seed: int) -> list[dict]:
    rng = random.Random(seed)
    texts = [f"question {i}" for i in range(count)]
    rows = [
        {"instruction": text, "input": "", "output": "x" * rng.randint(1, 9), "source": "s"}
        for text in texts
    ]
    for place, row in enumerate(rows):
        row["origin"] = str(place)
    build.add_ids(rows)
    return sorted(rows, key=build.preference)


CASES = [
    ("math", {"problem": "p", "solution": "s", "level": "Level 1"}, ("p", "", "s")),
    ("scibench", {"problem_text": " p\r\n", "answer_number": "5", "unit": "m"}, ("p", "", "5")),
    (
        "scibench",
        {"problem_text": "p", "answer_number": "5", "unit": "m", "solution": " w "},
        ("p", "", "w"),
    ),
    (
        "theoremqa",
        {"Question": "q", "Answer": [1, 2], "Picture": None, "theorem_def": "t"},
        ("q\nRelevant Theorem: t", "", "[1, 2]"),
    ),
    ("theoremqa", {"Question": "q", "Answer": 1, "Picture": "x.png", "theorem_def": "t"}, None),
    ("theoremqa", {"Question": "q", "Answer": "1", "Picture": None}, ("q", "", "1")),  # the hub's
    ("theoremqa", {"Question": "q", "Answer": "1", "Picture": "NONE"}, ("q", "", "1")),
    (
        "openbookqa",
        {
            "question": {
                "stem": "q",
                "choices": [{"text": "a", "label": "A"}, {"text": "b", "label": "B"}],
            },
            "fact1": "f",
            "answerKey": "B",
        },
        ("q\nA: a\nB: b", "f", "The answer is B: b"),
    ),
    (
        "openbookqa",
        {
            "question_stem": "q",
            "choices": {"text": ["a", "b"], "label": ["A", "B"]},
            "fact1": "f",
            "answerKey": "A",
        },
        ("q\nA: a\nB: b", "f", "The answer is A: a"),
    ),
    (
        "reclor",
        {"context": "c", "question": "q", "answers": ["w", "x", "y", "z"], "label": 2},
        ("c q\nA: w\nB: x\nC: y\nD: z", "Choose A, B, C or D as your solution.", "C"),
    ),
    ("leetcode", {"prompt": "p", "full_code": "c", "sha1": "0"}, ("p", "", "c")),
    ("airoboros", {"instruction": "i", "response": "r"}, ("i", "", "r")),
    (
        "tigerbot",
        {"instruction": "Use python to solve", "input": "p", "output": "c"},
        ("p", "", "c"),
    ),
    ("tigerbot", {"instruction": "Use java to solve", "input": "p", "output": "c"}, None),
    ("arb", {"Problem_Statement": "p", "Solution": "s"}, ("p", "", "s")),
    (
        "arb",
        {
            "Problem Statement": "p",
            "Answer Candidates": ["a", "b"],
            "Final Answer": "B",
            "Solution": "",
        },
        ("p\nA. a\nB. b", "Choose A, B, C or D as your solution.", "B"),
    ),
    (
        "arb",
        {"Problem Statement": "p", "Answer Candidates": ["a"], "Final Answer": "A"},
        ("p\nA. a", "Choose A, B, C or D as your solution.", "A"),
    ),
    (
        "guanaco",
        {"text": "### Human: h### Assistant: a### Human: h2### Assistant: a2"},
        ("h", "", "a### Instruction:\n h2### Response:\n a2"),
    ),
    ("open-platypus", {"instruction": "i", "input": "c", "output": "o"}, ("i", "c", "o")),
    ("extra", {"instruction": "i", "output": "o"}, ("i", "", "o")),
]


@pytest.mark.parametrize(("source", "raw", "expected"), CASES)
def test_converters(source: str, raw: dict, expected: tuple | None) -> None:
    assert convert(source, raw) == expected


def test_every_source_has_a_case() -> None:
    tested = {source for source, _, _ in CASES} | {"prm800k", "scienceqa", "keywords"}
    assert tested == set(build.load_sources())


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


def test_scienceqa_rules() -> None:
    full = "It is red.\nBased on this information, what is it?\nA: a\nB: b"
    assert convert("scienceqa", SCIENCEQA) == (full, "Long ago.", "It is a.")
    assert convert("scienceqa", {**SCIENCEQA, "question": "What?", "hint": ""})[1] == ""
    assert convert("scienceqa", {**SCIENCEQA, "lecture": "word " * 401}) is None
    assert convert("scienceqa", {**SCIENCEQA, "image": "image.png"}) is None
    text_only = {column: value for column, value in SCIENCEQA.items() if column != "image"}
    assert convert("scienceqa", text_only) == (full, "Long ago.", "It is a.")
    assert convert("scienceqa", {**SCIENCEQA, "solution": ""}) is None
    for skill in ("Use guide words", "Is it a complete sentence, a fragment, or a run-on?"):
        assert convert("scienceqa", {**SCIENCEQA, "skill": skill}) is None


def prm800k(ratings: list[int], answer: str, finish: str = "solution") -> dict:
    texts = ["First.", "Then $\\boxed{4}$.\n\n# Answer\n\n4"]
    steps = [
        {"completions": [{"text": "wrong", "rating": -1}, {"text": text, "rating": rating}]}
        for text, rating in zip(texts, ratings, strict=True)
    ]
    return {
        "question": {"problem": "2+2?", "ground_truth_answer": answer},
        "label": {"steps": steps, "finish_reason": finish},
    }


def test_prm800k_raw_layout() -> None:
    assert convert("prm800k", prm800k([1, 1], "4")) == ("2+2?", "", "First.\nThen $4$.\n4")
    assert convert("prm800k", prm800k([1, 1], "5")) is None  # another answer
    assert convert("prm800k", prm800k([1, -1], "4")) is None  # no answer among correct steps
    assert convert("prm800k", prm800k([1, 1], "4", "give_up")) is None
    human = prm800k([-1, 1], "4")
    human["label"]["steps"][0]["human_completion"] = {"text": "By hand.", "rating": 1}
    assert convert("prm800k", human)[2].startswith("By hand.")


@pytest.mark.parametrize("block", [(1, 1), (7, 5), (64, 64), (1024, 8192)])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_similar_pairs_equal_brute_force(monkeypatch, block: tuple[int, int], seed: int) -> None:
    monkeypatch.setattr(build, "BLOCK", block[0])
    monkeypatch.setattr(build, "BLOCK_COLUMNS", block[1])
    a, b = unit_vectors(60, seed, clusters=8), unit_vectors(43, seed, clusters=8)
    b[:5] = a[:5]
    exact = a.astype(np.float64) @ b.astype(np.float64).T
    expected = {tuple(pair) for pair in np.argwhere(exact >= 0.8)}
    found = [
        (int(i), int(j), float(c))
        for part in build.similar_pairs(a, b, 0.8)
        for i, j, c in zip(*part, strict=True)
    ]
    assert {(i, j) for i, j, _ in found} == expected
    assert len(found) == len(expected) > 20
    assert all(abs(c - exact[i, j]) < 1e-12 for i, j, c in found)


def test_similar_pairs_equal_brute_force_on_real_embeddings(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(build, "BLOCK", 17)
    files = [ROOT / "demo/data/math/math_train.jsonl", ROOT / "demo/world/train.jsonl"]
    texts = [json.loads(line) for file in files for line in file.open(encoding="utf-8")]
    texts = [row.get("problem") or row["instruction"] for row in texts]
    vectors = build.Embedder(build.EMBEDDING_MODEL, tmp_path)(texts)
    exact = vectors.astype(np.float64) @ vectors.astype(np.float64).T
    for threshold in (0.5, 0.8, 0.95):
        parts = list(build.similar_pairs(vectors, vectors, threshold))
        found = {(int(i), int(j)) for part in parts for i, j in zip(part[0], part[1], strict=True)}
        expected = {tuple(pair) for pair in np.argwhere(exact >= threshold)}
        assert found == expected and len(found) > len(texts)


def test_threshold_is_met_at_exactly_its_value() -> None:
    a = np.array([[1, 0]], dtype=np.float32)
    just = np.float32(0.8)  # stored as 0.800000012
    below = np.nextafter(just, np.float32(0))  # stored as 0.799999952
    b = np.array([[just, 0.6], [below, 0.6]], dtype=np.float32)
    found = [j for part in build.similar_pairs(a, b, 0.8) for j in part[1]]
    assert found == [0]


def brute_force_near(rows: list[dict], vectors: np.ndarray) -> tuple[set, dict]:
    """The greedy rule, one row after the other: kept ids, and dropped id -> (kept id, cosine)."""
    order = sorted(range(len(rows)), key=lambda i: (-len(rows[i]["output"]), rows[i]["id"]))
    kept, dropped = [], {}
    for i in order:
        cosines = [(float(vectors[i].astype(float) @ vectors[j].astype(float)), -p)
                   for p, j in enumerate(kept)]  # fmt: skip
        best = max(cosines, default=(0, 0))
        if best[0] >= 0.8:
            dropped[rows[i]["id"]] = (rows[kept[-best[1]]]["id"], round(best[0], 6))
        else:
            kept.append(i)
    return {rows[i]["id"] for i in kept}, dropped


@pytest.mark.parametrize("block", [1, 13, 1024])
def test_near_duplicates_equal_brute_force(monkeypatch, block: int) -> None:
    monkeypatch.setattr(build, "BLOCK", block)
    for seed in range(5):
        rows, vectors = make_rows(150, seed), unit_vectors(150, seed, clusters=20)
        vectors[10] = vectors[20]
        kept, dropped = build.drop_near(rows, vectors, [1] * 150, 0.8)
        expected_kept, expected_dropped = brute_force_near(rows, vectors)
        assert {row["id"] for row in kept} == expected_kept
        assert {r["id"]: (r["kept_id"], r["cosine"]) for r in dropped} == expected_dropped
        assert 20 < len(dropped) < 150


@pytest.mark.parametrize("block", [1, 13, 1024])
def test_windows_equal_brute_force(monkeypatch, block: int) -> None:
    """Rows of one to four windows, some of which stand in several rows like a shared passage."""
    monkeypatch.setattr(build, "BLOCK", block)
    dropped_in_all = 0
    for seed in range(5):
        rng = np.random.default_rng(seed)
        pool = unit_vectors(12, seed)
        rows = make_rows(120, seed)
        sizes = rng.integers(1, 5, size=120).tolist()
        parts = [pool[rng.choice(12, size, replace=False)] for size in sizes]
        parts = [p + rng.normal(size=p.shape, scale=0.03).astype(np.float32) for p in parts]
        parts = [p / np.linalg.norm(p, axis=1, keepdims=True) for p in parts]

        def similar(i: int, j: int, parts: list = parts) -> float:
            s = parts[i].astype(float) @ parts[j].astype(float).T
            return min(min(max(line) for line in s), min(max(line) for line in s.T))

        order = sorted(range(120), key=lambda i: (-len(rows[i]["output"]), rows[i]["id"]))
        kept, expected = [], {}
        for i in order:
            best = max(((similar(i, j), -p) for p, j in enumerate(kept)), default=(0, 0))
            if best[0] >= 0.8:
                expected[rows[i]["id"]] = rows[kept[-best[1]]]["id"]
            else:
                kept.append(i)
        ours, dropped = build.drop_near(rows, np.concatenate(parts), sizes, 0.8)
        assert {row["id"]: row["kept_id"] for row in dropped} == expected
        assert {row["id"] for row in ours} == {rows[i]["id"] for i in kept}
        dropped_in_all += len(dropped)
    assert dropped_in_all > 50


def test_windows_cover_a_text_and_fit_the_model(tmp_path) -> None:
    from transformers import AutoTokenizer

    embedder = build.Embedder(build.EMBEDDING_MODEL, tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(embedder.folder)
    long = " ".join(f"The number {n} is not {n + 1}." for n in range(120))
    texts = ["", "Short.", long, "x" * 3000, "\u00e9\u65e5 " * 400]
    for text, parts in zip(texts, embedder.windows(texts), strict=True):
        assert "".join(parts) == text
        assert all(len(tokenizer(part)["input_ids"]) <= build.WINDOW for part in parts)
    assert [len(parts) for parts in embedder.windows(texts)][:2] == [1, 1]
    assert len(embedder.windows([long])[0]) > 3


def test_a_shared_passage_alone_drops_nothing(tmp_path) -> None:
    lecture = " ".join(f"Rock {n} forms when layer {n} cools under pressure." for n in range(60))
    questions = ["Which gas do plants take in?", "How many legs has a spider?"]
    rows = [
        {"instruction": q, "input": lecture, "output": "o" * n, "source": "s", "origin": str(n)}
        for n, q in enumerate(questions, 1)
    ]
    rows.append({**rows[0], "input": lecture + " Done.", "origin": "3"})
    for row in rows:  # the question last, where the model's 256 tokens do not reach
        row["instruction"], row["input"] = row["input"], row["instruction"] * 60
    build.add_ids(rows)
    embedder = build.Embedder(build.EMBEDDING_MODEL, tmp_path)
    kept, _ = build.deduplicate(rows, embedder, 0.8, whole_text_only=True)
    assert len(kept) == 1
    kept, dropped = build.deduplicate(rows, embedder, 0.8, whole_text_only=False)
    assert len(kept) == 2 and dropped[0]["cosine"] >= 0.8


def test_exact_duplicates() -> None:
    texts = ["cafe\u0301  two\nwords", "caf\u00e9 two words", "2\u00b2", "22", "short"]
    rows = [
        {"instruction": t, "input": "", "output": "o" * (i + 1), "source": "math", "origin": str(i)}
        for i, t in enumerate(texts)
    ]
    rows.append({**rows[4], "output": "a much longer answer"})
    rows.append({**rows[4], "output": "p", "source": "prm800k"})
    build.add_ids(rows)
    kept, dropped = build.drop_exact(rows)
    answers = {row["instruction"]: row["output"] for row in kept}
    assert answers == {texts[1]: "oo", texts[2]: "ooo", texts[3]: "oooo", "short": "p"}
    assert len(kept) + len(dropped) == len(rows)


def test_ids_are_stable_and_unique() -> None:
    rows = [
        {"instruction": "q", "input": "", "output": "a", "source": "s", "origin": str(i)}
        for i in range(3)
    ]
    build.add_ids(rows)
    ids = [row["id"] for row in rows]
    assert len(set(ids)) == 3
    again = [dict(row) for row in reversed(rows)]
    build.add_ids(again)
    assert [row["id"] for row in reversed(again)] == ids


def test_embedder_embeds_a_text_once(tmp_path, monkeypatch) -> None:
    import sentence_transformers

    texts = ["What is a prime number?", "", "Name a metal.", "What is a prime number?"]
    embedder = build.Embedder(build.EMBEDDING_MODEL, tmp_path)
    first = embedder(texts)
    assert isinstance(first, np.memmap) and embedder([]).shape[0] == 0
    assert first.shape == (4, 384) and (first[0] == first[3]).all()
    assert np.allclose(np.linalg.norm(first, axis=1), 1, atol=1e-6)
    model = sentence_transformers.SentenceTransformer(str(embedder.folder), device="cpu")
    assert np.allclose(first, model.encode(texts, normalize_embeddings=True), atol=1e-6)

    def fail(*_, **__):
        raise AssertionError("embedded again")

    monkeypatch.setattr(sentence_transformers, "SentenceTransformer", fail)
    again = build.Embedder(build.EMBEDDING_MODEL, tmp_path)(texts[:3])
    assert (again == first[:3]).all()


def test_planted_repeats_are_found(demo) -> None:
    planted = json.loads((ROOT / "demo/planted.json").read_text())
    rows = [json.loads(line) for line in (demo / "dataset/dataset.jsonl").open()]
    lost = [json.loads(line) for line in (demo / "dataset/dropped.jsonl").open()]
    kept = {f"{row['source']}:{row['origin']}": row["id"] for row in rows}
    dropped = {f"{row['source']}:{row['origin']}": row for row in lost}
    origins = demo_origins()
    for reason in ("exact", "near", "replaced"):
        assert planted[reason]
        for plant in planted[reason]:
            row = dropped[origins[plant["dropped"]]]
            assert row["reason"] == ("near" if reason == "near" else "exact"), plant
            assert row["kept_id"] == kept[origins[plant["kept"]]], plant
    without = {origins[place] for place in planted["keyword"]}
    assert {o for o, row in dropped.items() if row["reason"] == "keyword"} == without
    expected = {origins[p["dropped"]] for r in ("exact", "near", "replaced") for p in planted[r]}
    found = {o for o, row in dropped.items() if row["reason"] in ("exact", "near")}
    assert {o for o in found if not o.startswith("world:")} == expected


def test_accounts_add_up(demo) -> None:
    run = json.loads((demo / "dataset/run.json").read_text())
    for line in run["counts"]["sources"]:
        assert line["read"] == line["kept"] + sum(line[reason] for reason in build.REASONS), line
    assert run["outputs"]["dataset.jsonl"]["rows"] == run["counts"]["kept"]
    assert run["outputs"]["dropped.jsonl"]["rows"] == run["counts"]["read"] - run["counts"]["kept"]


def test_invalid_rows_are_counted_with_their_place(tmp_path) -> None:
    folder = tmp_path / "raw/math"
    folder.mkdir(parents=True)
    good = [{"problem": f"What is {n} plus {n * n}?", "solution": f"{n + n * n}"} for n in (3, 8)]
    lines = [
        json.dumps(good[0]).encode(),
        b'{"problem": "broken',
        b'{"problem": "no solution"}',
        b'{"problem": 5, "solution": "wrong type"}',
        b'{"problem": "  ", "solution": "empty"}',
        b'{"problem": "nul \\u0000", "solution": "x"}',
        b'{"problem": "half \\ud800", "solution": "x"}',
        b'{"problem": "not utf-8 \xff", "solution": "x"}',
        b"[1, 2]",
        b"",
        json.dumps(good[1]).encode(),
    ]
    (folder / "math_train.jsonl").write_bytes(b"\n".join(lines))
    args = ["--local", tmp_path / "raw", "--sources", "math", "--cache", tmp_path / "cache"]
    done = run_script("build_dataset", *args, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    lost = [json.loads(line) for line in (tmp_path / "out/dropped.jsonl").open()]
    places = {row["origin"] for row in lost if row["reason"] == "invalid"}
    assert places == {f"math_train.jsonl:{n}" for n in range(2, 10)}
    done = run_script("build_dataset", *args, "--out", tmp_path / "strict", "--strict")
    assert_refused(done, "math_train.jsonl:2")
    assert not (tmp_path / "strict").exists()


def claim(out: Path, **how: bool) -> None:
    """Begin and end to hold a folder, as a step does."""
    with common.claim_output(out, overwrite=True, **how):
        pass


def finished(out: Path, *names: str) -> Path:
    """A folder that a step has finished, with files of these names and a person's verdicts."""
    (out / "model").mkdir(parents=True)
    for name in [*names, "decisions.jsonl", "mine.txt"]:
        (out / name).write_text(name)
    listed = {name: {"sha256": "of other bytes"} for name in names}
    run = {"step": Path(sys.argv[0]).stem, "outputs": listed}
    (out / "run.json").write_text(json.dumps(run))
    return out


def test_overwriting_removes_what_the_former_run_wrote_and_nothing_else(tmp_path) -> None:
    out = finished(tmp_path / "out", "old.safetensors", "model/old.json")
    (out / "apply.json").write_text(json.dumps({"outputs": {"clean.jsonl": {}}}))
    (out / "clean.jsonl").touch()
    claim(out, keep_run=True)
    assert (out / "old.safetensors").exists() and (out / "run.json").exists()
    claim(out)
    left = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    assert left == {"decisions.jsonl", "mine.txt"}


FORGED = ["decisions.jsonl", "Decisions.JSONL", "model/decisions.jsonl", "./decisions.jsonl",
          "model/../decisions.jsonl", "../victim", "model/../../victim", "../out/mine.txt",
          "VICTIM", "way/victim", "model", "", ".", "..", ".unfinished", ".hidden", "nul\0",
          "\ud800", "x" * 5000]  # fmt: skip


@pytest.mark.parametrize("name", FORGED)
def test_a_forged_list_of_outputs_removes_nothing(tmp_path, name: str) -> None:
    out = finished(tmp_path / "out")
    (tmp_path / "victim").touch()
    (out / "model/decisions.jsonl").touch()
    (out / ".hidden").touch()
    (out / "way").symlink_to(tmp_path)
    name = name.replace("VICTIM", str(tmp_path / "victim"))
    run = {"step": Path(sys.argv[0]).stem, "outputs": {name: {"sha256": "x"}}}
    (out / "run.json").write_text(json.dumps(run))
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
    assert run["outputs"] == expected and run["counts"] == {"rows": 2}
    assert {*synced} == {*written, args.out, args.out / "model"}


@pytest.mark.parametrize("buffered", [True, False])
@pytest.mark.parametrize("end", ["", "sys.exit(3)", "raise build_dataset.UserError('bad')"])
def test_a_reader_that_goes_away_gets_no_traceback(buffered: bool, end: str) -> None:
    """Whether stdout is written to by main()'s own print or only at its end."""
    code = f"import sys, build_dataset\ndef main():\n print('x')\n {end}\n"
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-c", f"{code}\nbuild_dataset.run_main(main)"]
    env = {**os.environ, "PYTHONUNBUFFERED": "" if buffered else "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, stdout=writer, stderr=-1, text=True)
    os.close(writer)
    told = "error: bad\n" if "bad" in end and buffered else ""
    assert (done.returncode, done.stderr) == (141, told)


def test_a_theorem_that_is_named_needs_its_definition() -> None:
    row = {"Question": "q", "Answer": 1, "Picture": None, "theorem": "Rolle's"}
    with pytest.raises(UndefinedError, match="theorem_def"):
        convert("theoremqa", row)


def test_changed_columns_are_named(tmp_path) -> None:
    folder = tmp_path / "raw/math"
    folder.mkdir(parents=True)
    (folder / "math_train.jsonl").write_text('{"question": "q", "solution": "s"}\n' * 3)
    args = ["--local", tmp_path / "raw", "--sources", "math", "--out", tmp_path / "out"]
    done = run_script("build_dataset", *args, "--cache", tmp_path / "cache")
    assert_refused(done, "'problem' is undefined", "question, solution")
    assert not (tmp_path / "out").exists()


def test_huge_and_odd_rows(tmp_path) -> None:
    folder = tmp_path / "raw/math"
    folder.mkdir(parents=True)
    rows = [
        {"problem": "What is 1 + 1? " * 700_000, "solution": "2"},  # 10 MB
        {"problem": "\u05de\u05d4 \u05d6\u05d4?\u202e", "solution": "right to left"},
        {"problem": "Name a prime.", "solution": "7", "unique_id": "same"},
        {"problem": "Name an even number that is no multiple of four.", "solution": "6"},
        {"problem": "Name a prime.", "solution": "7", "unique_id": "same"},
    ]
    (folder / "math_train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    args = ["--local", tmp_path / "raw", "--sources", "math", "--out", tmp_path / "out"]
    done = run_script("build_dataset", *args, "--whole-text-only", "--cache", tmp_path / "cache")
    assert done.returncode == 0, done.stderr
    kept = [json.loads(line) for line in (tmp_path / "out/dataset.jsonl").open()]
    assert len(kept) == 4 and max(len(row["instruction"]) for row in kept) > 10_000_000


def test_order_of_input_changes_no_byte(tmp_path) -> None:
    """The lines of every source's file, and the sources themselves, in three orders.

    Only an invalid row is named by its line, which is what one needs to mend it.
    """
    names = ["math", "openbookqa", "guanaco"]
    outputs = set()
    for seed in range(3):
        rng = random.Random(seed)
        for name in names:
            (raw := tmp_path / str(seed) / name).mkdir(parents=True)
            for file in (ROOT / "demo/data" / name).glob("*.jsonl"):
                lines = file.read_text(encoding="utf-8").splitlines()
                lines = rng.sample(lines, len(lines)) if seed else lines
                (raw / file.name).write_text("\n".join(lines), encoding="utf-8")
        args = ["--local", raw.parent, "--sources", ",".join(rng.sample(names, 3))]
        out = tmp_path / f"out{seed}"
        done = run_script("build_dataset", *args, "--out", out, "--cache", tmp_path / "cache")
        assert done.returncode == 0, done.stderr
        lost = (out / "dropped.jsonl").read_bytes().splitlines()
        lost = [line for line in lost if b'"invalid"' not in line]
        assert len(lost) > 10
        outputs.add((out / "dataset.jsonl").read_bytes() + b"\n".join(lost))
    assert len(outputs) == 1


def test_keywords_are_whole_words_and_counted(tmp_path) -> None:
    folder = tmp_path / "raw/airoboros"
    folder.mkdir(parents=True)
    questions = {
        "What is AI good for?": ["ai"],
        "Name a SOLAR or wind farm. Solar!": ["solar", "wind"],
        "Solve this differential equation.": ["differential"],  # the first that fits its place
        "He said it again in the rain.": [],  # "ai" inside words
        "Pick a summer hat.": [],
    }
    rows = [{"instruction": q, "response": "r", "category": "c"} for q in questions]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    args = ["--local", tmp_path / "raw", "--cache", tmp_path / "cache", "--sources"]
    done = run_script("build_dataset", *args, "airoboros", "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    run = json.loads((tmp_path / "out/run.json").read_text())
    line = run["counts"]["sources"][0]
    assert (line["keyword"], line["kept"]) == (2, 3)
    counts = run["counts"]["keywords"]
    assert counts["ai"] == counts["solar"] == counts["wind"] == 1
    (tmp_path / "raw/math").mkdir()
    (tmp_path / "raw/math/train.jsonl").write_text('{"problem": "Add 1 and 1.", "solution": "2"}')
    done = run_script("build_dataset", *args, "airoboros,math", "--exclude-generated",
                      "--out", tmp_path / "human")  # fmt: skip
    assert done.returncode == 0, done.stderr
    table = json.loads((tmp_path / "human/run.json").read_text())["counts"]["sources"]
    assert [(row["generated"], row["kept"]) for row in table] == [(5, 0), (0, 1)]


@pytest.mark.skipif(not REAL_DATA.is_dir(), reason="the real data is not there")
def test_funnel_adds_up_on_real_files(tmp_path) -> None:
    names = "math,prm800k,scienceqa,scibench,reclor,theoremqa,openbookqa,guanaco"
    args = ["--local", REAL_DATA, "--sources", names, "--include-test-splits", "--limit", "60"]
    done = run_script("build_dataset", *args, "--out", tmp_path / "o", "--cache", tmp_path / "c")
    assert done.returncode == 0, done.stderr
    run = json.loads((tmp_path / "o/run.json").read_text())
    assert run["partial"] and len(run["counts"]["sources"]) == 8
    for line in run["counts"]["sources"]:
        assert line["read"] == 60 == line["kept"] + sum(line[r] for r in build.REASONS), line
    rows = [json.loads(line) for line in (tmp_path / "o/dataset.jsonl").open()]
    kept = {row["id"] for row in rows}
    lost = [json.loads(line) for line in (tmp_path / "o/dropped.jsonl").open()]
    assert all(row["kept_id"] in kept for row in lost if row["reason"] in ("exact", "near"))
    texts = [build.question_of(row) for row in rows]
    embedder = build.Embedder(build.EMBEDDING_MODEL, tmp_path / "c")
    windows = embedder.windows(texts)
    vectors = [embedder(parts) for parts in windows]
    for i in range(len(rows)):
        for j in range(i):
            assert build.mutual_cosine(vectors[i], vectors[j]) < 0.8


def test_bad_settings_are_refused(tmp_path, demo) -> None:
    out = tmp_path / "out"
    base = ["--sources", "math", *DEMO, "--out", out]
    assert_refused(run_script("build_dataset", *base, "--cosine-threshold", "2"), "threshold")
    assert_refused(run_script("build_dataset", "--sources", "maths", "--out", out), "maths")
    assert_refused(
        run_script("build_dataset", *base, "--extra", "a=missing.jsonl"), "missing.jsonl"
    )
    assert_refused(run_script("build_dataset", *base, "--local", "nowhere"), "nowhere")
    row = ROOT / "demo/world/train.jsonl"
    for extra in ([f"={row}"], [f"a={row}", "--extra", f"a={row}"]):
        assert_refused(run_script("build_dataset", *base, "--extra", *extra), "name of its own")
    done = run_script("build_dataset", "--sources", "reclor", *DEMO, "--out", out)
    assert_refused(done, "reclor", "HF_TOKEN", "--local")  # no such folder: the hub, which is off
    assert run_script("build_dataset", "--sauces", "math").returncode == 2
    assert not out.exists()
    done = run_script("build_dataset", *base[:-1], demo / "dataset")
    assert_refused(done, "finished", "--overwrite")
    (tmp_path / "own").mkdir()
    (tmp_path / "own/thesis.txt").write_text("not yours")
    assert_refused(run_script("build_dataset", *base[:-1], tmp_path / "own"), "no run.json of")


@pytest.mark.skipif(not REAL_DATA.is_dir(), reason="the real data is not there")
def test_real_layouts_convert() -> None:
    args = build.parse_args(["--local", str(REAL_DATA), "--include-test-splits"])
    expected = {  # rows read, rows that become training rows before de-duplication
        "math": (12_500, 12_500),
        "prm800k": (758, 758),
        "scibench": (692, 692),
        "theoremqa": (800, 747),
        "openbookqa": (5_957, 5_957),
        "guanaco": (953, 89),
        "reclor": (500, 195),
    }
    for name, (read, good) in expected.items():
        rows, dropped, _ = build.read_source(name, args)
        assert (len(rows) + len(dropped), len(rows)) == (read, good), name
    rows, dropped, _ = build.read_source("scienceqa", args)
    reasons = {row["reason"] for row in dropped}
    assert len(rows) + len(dropped) == 1_773 and len(rows) > 500 and reasons == {"rule"}


def test_hub_loading_on_a_local_copy(tmp_path) -> None:
    file = tmp_path / "train.jsonl"
    rows = [{"problem": f"p{n}", "solution": f"s{n}"} for n in range(3)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "test.jsonl").write_text(json.dumps({"problem": "held out", "solution": "s"}))
    found = list(build.hub_rows("math", False, path=str(tmp_path)))
    assert [(raw["problem"], error) for _, raw, error in found] == [(f"p{n}", "") for n in range(3)]
    assert len({place for place, _, _ in found}) == 3
    assert len(list(build.hub_rows("math", True, path=str(tmp_path)))) == 4
    found = list(build.hub_rows("scibench", False, path="json", data_files=[str(file)]))
    assert len(found) == 3
    with pytest.raises(common.UserError, match="cannot be loaded: .*--local"):
        list(build.hub_rows("math", False, path=str(tmp_path / "nowhere")))


def test_a_checked_device_has_no_attention_that_plans_for_every_length() -> None:
    import torch

    torch.backends.cuda.enable_cudnn_sdp(True)
    assert common.use_device("cpu") == "cpu" and not torch.backends.cuda.cudnn_sdp_enabled()
    with pytest.raises(common.UserError, match="--device nonsense cannot be used here"):
        common.use_device("nonsense")

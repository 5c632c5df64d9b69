"""Holds: every pair above the threshold is listed, planted leaks among them; verdicts survive
kills and torn lines; the clean set is what the verdicts say; benchmark files are read exactly."""

import json
import os
import random
import signal
import time

import pytest
from conftest import DEMO, REAL_DATA, ROOT, WORLD, assert_refused, demo_origins, run_script

import check_contamination as check


def read_lines(path) -> list[dict]:
    return [json.loads(line) for line in path.open(encoding="utf-8")]


def test_planted_leaks_are_found_and_removed(demo) -> None:
    planted = json.loads((ROOT / "demo/planted.json").read_text(encoding="utf-8"))["leaks"]
    assert {plant["class"] for plant in planted} == set(check.VERDICTS[:3])
    rows = {row["id"]: row for row in read_lines(demo / "dataset/dataset.jsonl")}
    found = {}
    for pair in read_lines(demo / "contamination/pairs.jsonl"):
        row = rows[pair["train_id"]]
        found[f"{row['source']}:{row['origin']}", pair["test_id"]] = pair
    origins = demo_origins()
    planted = [{**plant, "train": origins[plant["train"]]} for plant in planted]
    for plant in planted:
        pair = found[plant["train"], plant["test"]]
        assert pair["cosine"] >= plant["cosine"] - 0.002  # that of the whole questions
    extra = found.keys() - {(plant["train"], plant["test"]) for plant in planted}
    for train, test in extra:
        template = train.startswith("world:") and test.startswith("world/")
        assert template or found[train, test]["suggested"] == "not-a-leak", (train, test)
    clean = {row["id"] for row in read_lines(demo / "contamination/clean.jsonl")}
    removed = {row["id"] for row in read_lines(demo / "contamination/removed.jsonl")}
    assert removed == {pair["train_id"] for pair in found.values()}
    assert clean == rows.keys() - removed


def test_most_of_the_world_survives(demo) -> None:
    written = len(read_lines(WORLD / "train.jsonl"))
    clean = [r for r in read_lines(demo / "contamination/clean.jsonl") if r["source"] == "world"]
    assert len(clean) >= 0.85 * written, (len(clean), written)
    test = len(read_lines(WORLD / "test.jsonl"))
    pairs = read_lines(demo / "contamination/pairs.jsonl")
    flagged = {pair["test_id"] for pair in pairs if pair["benchmark"] == "world"}
    assert test - len(flagged) >= 100


def test_apply_follows_the_verdicts(demo, tmp_path) -> None:
    import shutil

    folder = tmp_path / "contamination"
    shutil.copytree(demo / "contamination", folder)
    pairs = read_lines(folder / "pairs.jsonl")
    of_row: dict[str, list[str]] = {}
    for pair in pairs:
        of_row.setdefault(pair["train_id"], []).append(pair["pair_id"])
    freed, kept_out, half = (
        next(row for row, ids in of_row.items() if len(ids) == 1),
        [row for row, ids in of_row.items() if len(ids) == 1][1],
        next(row for row, ids in of_row.items() if len(ids) > 1),
    )
    log = folder / "decisions.jsonl"
    check.append_decision(log, of_row[freed][0], "duplicate", "ann")
    check.append_decision(log, of_row[freed][0], "not-a-leak", "bob", "the last line wins")
    check.append_decision(log, of_row[kept_out][0], "similar-but-different", "ann")
    check.append_decision(log, of_row[half][0], "not-a-leak", "ann")  # its other pair is undecided
    done = run_script("check_contamination", "apply", "--out", folder)
    assert done.returncode == 0, done.stderr
    clean = {row["id"] for row in read_lines(folder / "clean.jsonl")}
    removed = {row["id"]: row for row in read_lines(folder / "removed.jsonl")}
    assert freed in clean and kept_out in removed and half in removed
    verdict = {b["pair_id"]: b["verdict"] for b in removed[kept_out]["because"]}
    assert verdict == {of_row[kept_out][0]: "similar-but-different"}
    applied = json.loads((folder / "apply.json").read_text())
    assert applied["counts"]["undecided_pairs"] == len(pairs) - 3
    before = (folder / "clean.jsonl").read_bytes()
    assert run_script("check_contamination", "apply", "--out", folder).returncode == 0
    assert (folder / "clean.jsonl").read_bytes() == before
    assert len(read_lines(log)) == 4  # nothing ever removes a verdict

    done = run_script("finetune", "--base-model", "none", "--data", folder / "clean.jsonl",
                      "--out", tmp_path / "a")  # fmt: skip
    assert "newer verdicts" not in done.stderr
    check.append_decision(log, of_row[half][1], "not-a-leak", "ann")
    done = run_script("finetune", "--base-model", "none", "--data", folder / "clean.jsonl",
                      "--out", tmp_path / "a")  # fmt: skip
    assert "newer verdicts" in done.stderr


def test_overwriting_keeps_the_verdicts(demo, tmp_path) -> None:
    out = tmp_path / "c"
    args = ["--dataset", demo / "dataset/dataset.jsonl", *DEMO, "--benchmarks", "arc"]
    args += ["--cache", demo / "cache", "--out", out]
    assert run_script("check_contamination", *args).returncode == 0
    pair = read_lines(out / "pairs.jsonl")[0]
    check.append_decision(out / "decisions.jsonl", pair["pair_id"], "not-a-leak", "ann")
    assert_refused(run_script("check_contamination", *args), "finished", "--overwrite")
    done = run_script("check_contamination", *args, "--overwrite")
    assert done.returncode == 0, done.stderr
    assert list(check.read_decisions(out / "decisions.jsonl")) == [pair["pair_id"]]
    assert pair["train_id"] in {row["id"] for row in read_lines(out / "clean.jsonl")}


def test_a_torn_line_is_no_verdict_and_spoils_no_other(tmp_path) -> None:
    log = tmp_path / "decisions.jsonl"
    check.append_decision(log, "a", "duplicate", "ann")
    whole = log.read_bytes()
    check.append_decision(log, "b", "not-a-leak", "ann")
    full = log.read_bytes()
    for cut in range(len(whole), len(full)):
        log.write_bytes(full[:cut])
        check.append_decision(log, "c", "gray-area", "bob")
        assert check.read_decisions(log)["a"]["verdict"] == "duplicate"
        assert check.read_decisions(log)["c"]["verdict"] == "gray-area"
        known = set(check.read_decisions(log))
        assert known == {"a", "c"} | ({"b"} if cut == len(full) - 1 else set())


def test_verdicts_survive_kills_of_two_writers(tmp_path) -> None:
    log, acknowledged = tmp_path / "decisions.jsonl", tmp_path / "acknowledged"
    rng = random.Random(0)
    for trial in range(10):
        writers = []
        for writer in range(2):
            pid = os.fork()
            if pid == 0:
                for number in range(100_000):
                    name = f"{trial}-{writer}-{number}"
                    check.append_decision(log, name, "duplicate", "ann")
                    with acknowledged.open("ab", buffering=0) as file:
                        file.write(f"{name}\n".encode())
            writers.append(pid)
        time.sleep(rng.uniform(0.02, 0.15))
        for pid in writers:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
    names = acknowledged.read_text().split()
    assert len(names) > 20
    assert set(names) <= check.read_decisions(log).keys()


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ("Is 3 prime?", "is 3 PRIME", "same words"),
        ("", "", "same words"),
        ("Rotate by 30.", "Rotate by 60.", "differs in 1 of 3 words: 30 -> 60"),
        ("It is red.", "It is not red.", "differs in 1 of 4 words: (nothing) -> not"),
        ("x + y", "x - y", "differs in 1 of 3 words: + -> -"),
    ],
)
def test_differences_in_words(a: str, b: str, expected: str) -> None:
    assert check.difference(a, b) == expected


def test_demo_benchmarks_are_read() -> None:
    local = ROOT / "demo/data"
    read = {name: check.load_benchmark(name, local) for name in check.HUB}
    assert {s.subject for s in read["mmlu"]} == {
        "conceptual_physics",
        "high_school_biology",
        "high_school_mathematics",
    }
    hellaswag = read["hellaswag"][0]
    assert len(hellaswag.shots) == len(hellaswag.scored) == 12
    for subjects in read.values():
        for subject in subjects:
            questions = check.questions_of(subject)
            assert len(questions) == len(subject.scored)
            assert all(q.text and q.answer in q.choices for q in questions)
    answers = {q.answer for subject in read["mmlu"] for q in check.questions_of(subject)}
    assert {"None", "NA"} <= answers


@pytest.mark.skipif(not REAL_DATA.is_dir(), reason="the real data is not there")
def test_real_benchmarks_are_read_whole() -> None:
    expected = {"arc": 1_172, "hellaswag": 10_042, "mmlu": 14_042, "truthfulqa": 817}
    for name, count in expected.items():
        questions = [
            question
            for subject in check.load_benchmark(name, REAL_DATA)
            for question in check.questions_of(subject)
        ]
        assert len(questions) == count == len({question.test_id for question in questions})
        assert all(question.answer in question.choices for question in questions)
    assert len(check.load_benchmark("mmlu", REAL_DATA)) == 57
    official = check.load_benchmark("hellaswag", REAL_DATA, official=True)[0]
    assert (len(official.shots), len(official.scored)) == (300, 700)
    plain = check.load_benchmark("hellaswag", REAL_DATA)[0].scored
    for row in official.scored:  # the two layouts number a question alike
        assert row["label"] == plain[row["test_row"]]["label"]
        assert row["ctx"][-20:] == plain[row["test_row"]]["ctx"][-20:]
    assert len({row["test_row"] for row in official.scored} - {-1}) == 700


def test_bad_input_is_refused(demo, tmp_path) -> None:
    out = tmp_path / "out"
    data = tmp_path / "rows.jsonl"
    base = ["--out", out, *DEMO, "--cache", demo / "cache", "--dataset"]
    dataset = demo / "dataset/dataset.jsonl"
    whole = dataset.read_text().splitlines()
    data.write_text("\n".join([*whole[:2], whole[2][:40]]) + "\n")
    assert_refused(run_script("check_contamination", *base, data), "rows.jsonl:3")
    data.write_text('{"id": "a", "instruction": "q", "output": "o"}\n')
    assert_refused(run_script("check_contamination", *base, data), "rows.jsonl:1", "'input'")
    assert_refused(run_script("check_contamination", *base, tmp_path / "no"), "build_dataset.py")
    assert_refused(
        run_script("check_contamination", *base, dataset, "--benchmarks", "arcs"), "arcs"
    )
    folder = tmp_path / "data/mmlu/test"
    folder.mkdir(parents=True)
    (folder / "anatomy_test.csv").write_text("question,a,b,c,E\n")
    args = [*base, dataset, "--benchmarks", "mmlu", "--local", tmp_path / "data"]
    assert_refused(run_script("check_contamination", *args), "anatomy_dev.csv")
    (tmp_path / "data/mmlu/dev").mkdir()
    (tmp_path / "data/mmlu/dev/anatomy_dev.csv").write_text("q,a,b,c,d,A\n")
    assert_refused(run_script("check_contamination", *args), "anatomy_test.csv", "row 1")
    args[args.index("mmlu")] = "truthfulqa"
    done = run_script("check_contamination", *args)
    assert_refused(done, "truthfulqa is no folder", "truthfulqa/truthful_qa")
    assert "HF_TOKEN" not in done.stderr
    assert_refused(run_script("check_contamination", "apply", "--out", out), "python check")
    (tmp_path / ".unfinished").write_text("python build_dataset.py\n")
    data.write_text(whole[0] + "\n")
    assert_refused(run_script("check_contamination", *base, data), "unfinished", "build_dataset.py")
    assert not out.exists()


def test_hub_loading_on_a_local_copy(tmp_path, monkeypatch) -> None:
    for split in ("train", "test"):
        text = (ROOT / f"demo/data/arc/ARC-Challenge-{split}.jsonl").read_text(encoding="utf-8")
        (tmp_path / f"{split}.jsonl").write_text(text, encoding="utf-8")
    monkeypatch.setitem(check.HUB, "arc", (str(tmp_path), None, "train", "test"))
    from_hub, from_files = (check.load_benchmark("arc", p)[0] for p in (None, ROOT / "demo/data"))
    assert from_hub.shots == from_files.shots and from_hub.scored == from_files.scored
    assert check.questions_of(from_hub) == check.questions_of(from_files)
    monkeypatch.setitem(check.HUB, "arc", (str(tmp_path / "nowhere"), None, "train", "test"))
    with pytest.raises(check.UserError, match="cannot be loaded: .*--local"):
        check.load_benchmark("arc", None)


@pytest.mark.slow
@pytest.mark.skipif(not REAL_DATA.is_dir(), reason="the real data is not there")
def test_the_authors_numbers_are_reproduced(tmp_path) -> None:
    """MATH's training split x five MMLU subjects, their format: 80 questions, here in 93 rows."""
    mathematics = ("abstract_algebra", "college_mathematics", "elementary_mathematics")
    subjects = (*mathematics, "high_school_mathematics", "high_school_statistics")
    for split in ("dev", "test"):
        (tmp_path / "data/mmlu" / split).mkdir(parents=True)
        for subject in subjects:
            name = f"mmlu/{split}/{subject}_{split}.csv"
            (tmp_path / "data" / name).symlink_to(REAL_DATA / name)
    lines = (REAL_DATA / "math/math_train.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [
        {"id": str(n), "instruction": json.loads(line)["problem"], "input": "", "output": "o"}
        for n, line in enumerate(lines)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    args = ["--dataset", tmp_path / "rows.jsonl", "--local", tmp_path / "data", "--paper"]
    args += ["--benchmarks", "mmlu", "--cache", tmp_path / "cache", "--out", tmp_path / "out"]
    done = run_script("check_contamination", *args)
    assert done.returncode == 0, done.stderr
    pairs = read_lines(tmp_path / "out/pairs.jsonl")
    assert len({pair["test_id"] for pair in pairs}) == 80
    assert len({pair["train_id"] for pair in pairs}) == 93
    assert len(read_lines(tmp_path / "out/removed.jsonl")) == 93

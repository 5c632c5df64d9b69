"""Holds: every pair above the threshold is listed whatever the blocks, planted leaks among them,
in every view; suggestions agree with the labels; verdicts survive kills and torn lines; the clean
set is what the verdicts say; benchmark files are read exactly; odd input is one line or no harm."""

import json
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter

import numpy as np
import pytest
from conftest import DEMO, REAL_DATA, ROOT, WORLD, assert_refused, demo_origins, run_script

import build_dataset as build
import check_contamination as check
import common

DATA = ROOT / "tests/data"


def read_lines(path) -> list[dict]:
    return [json.loads(line) for line in path.open(encoding="utf-8")]


def test_planted_leaks_are_found_and_removed(demo) -> None:
    planted = json.loads((ROOT / "demo/planted.json").read_text(encoding="utf-8"))["leaks"]
    assert {plant["class"] for plant in planted} == set(common.VERDICTS[:3])
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
    common.append_decision(log, of_row[freed][0], "duplicate", "ann")
    common.append_decision(log, of_row[freed][0], "not-a-leak", "bob", "the last line wins")
    common.append_decision(log, of_row[kept_out][0], "similar-but-different", "ann")
    common.append_decision(log, of_row[half][0], "not-a-leak", "ann")  # its other pair is undecided
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
    common.append_decision(log, of_row[half][1], "not-a-leak", "ann")
    done = run_script("finetune", "--base-model", "none", "--data", folder / "clean.jsonl",
                      "--out", tmp_path / "a")  # fmt: skip
    assert "newer verdicts" in done.stderr
    with (folder / "clean.jsonl").open("a") as clean:
        clean.write(json.dumps(read_lines(folder / "clean.jsonl")[0]) + "\n")
    done = run_script("finetune", "--base-model", "none", "--data", folder / "clean.jsonl",
                      "--out", tmp_path / "a")  # fmt: skip
    assert_refused(done, "clean.jsonl is not the file", "apply.json lists")


def test_all_is_written_before_anything_is_said(demo, tmp_path) -> None:
    """So that a reader that goes away costs nothing."""
    shutil.copytree(demo / "contamination", folder := tmp_path / "c")
    (folder / "apply.json").unlink()
    command = [sys.executable, ROOT / "check_contamination.py", "apply", "--out", folder]
    command = f"{shlex.join(map(str, command))} | head -c 0"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True)
    assert (done.returncode, done.stderr) == (141, b"") and (folder / "apply.json").exists()
    assert not (folder / ".unfinished").exists()


def test_overwriting_keeps_the_verdicts(demo, tmp_path) -> None:
    out = tmp_path / "c"
    args = ["--dataset", demo / "dataset/dataset.jsonl", *DEMO, "--benchmarks", "arc"]
    args += ["--cache", demo / "cache", "--out", out]
    assert run_script("check_contamination", *args).returncode == 0
    pair = read_lines(out / "pairs.jsonl")[0]
    common.append_decision(out / "decisions.jsonl", pair["pair_id"], "not-a-leak", "ann")
    assert_refused(run_script("check_contamination", *args), "finished", "--overwrite")
    done = run_script("check_contamination", *args, "--overwrite")
    assert done.returncode == 0, done.stderr
    assert list(common.read_decisions(out / "decisions.jsonl")) == [pair["pair_id"]]
    assert pair["train_id"] in {row["id"] for row in read_lines(out / "clean.jsonl")}


def test_a_torn_line_is_no_verdict_and_spoils_no_other(tmp_path, capsys) -> None:
    log = tmp_path / "decisions.jsonl"
    common.append_decision(log, "a", "duplicate", "ann")
    whole = log.read_bytes()
    common.append_decision(log, "b", "not-a-leak", "ann")
    full = log.read_bytes()
    for cut in range(len(whole), len(full)):
        log.write_bytes(full[:cut])
        common.append_decision(log, "c", "gray-area", "bob")
        assert common.read_decisions(log)["a"]["verdict"] == "duplicate"
        assert common.read_decisions(log)["c"]["verdict"] == "gray-area"
        known = set(common.read_decisions(log))
        assert known == {"a", "c"} | ({"b"} if cut == len(full) - 1 else set())
    log.write_text('{"pair_id": "a", "verdict": "maybe"}\n' + whole.decode() + '{"pair_id"')
    capsys.readouterr()
    assert common.read_decisions(log)["a"]["verdict"] == "duplicate"
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2 and f"{log}:1 is no verdict" in said[0] and f"{log}:3 is" in said[1]


def test_verdicts_survive_kills_of_two_writers(tmp_path) -> None:
    """100 kills at random moments: no acknowledged line is lost, and no torn one is a verdict."""
    log, acknowledged = tmp_path / "decisions.jsonl", tmp_path / "acknowledged"
    rng = random.Random(0)
    for trial in range(50):
        writers = []
        for writer in range(2):
            pid = os.fork()
            if pid == 0:
                for number in range(100_000):
                    name = f"{trial}-{writer}-{number}"
                    common.append_decision(log, name, "duplicate", "ann", f"note of {name}")
                    with acknowledged.open("ab", buffering=0) as file:
                        file.write(f"{name}\n".encode())
            writers.append(pid)
        for pid in writers:
            time.sleep(rng.uniform(0.01, 0.06))
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
    names, decisions = acknowledged.read_text().split(), common.read_decisions(log)
    assert len(names) > 100
    assert set(names) <= decisions.keys()
    for name, line in decisions.items():
        assert line["note"] == f"note of {name}" and line["verdict"] == "duplicate"
    # a kill between the two files leaves at most one verdict of a writer unacknowledged
    assert len(decisions) <= len(names) + 100


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
    with pytest.raises(common.UserError, match="cannot be loaded: .*--local"):
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
    check.main([*map(str, args)])  # in this process: minutes of embedding, and no time limit
    pairs = read_lines(tmp_path / "out/pairs.jsonl")
    assert len({pair["test_id"] for pair in pairs}) == 80
    assert len({pair["train_id"] for pair in pairs}) == 93
    assert len(read_lines(tmp_path / "out/removed.jsonl")) == 93


# --- detection ------------------------------------------------------------------------------------


class Vectors:
    """An embedder whose vectors the test gives; every other text is orthogonal to all."""

    def __init__(self, known: dict[str, list[float]]) -> None:
        self.known, self.place = known, {}

    def __call__(self, texts: list[str]) -> np.ndarray:
        made = np.zeros((len(texts), 4000), np.float32)
        for row, text in enumerate(texts):
            vector = self.known.get(text)
            if vector is None:
                made[row, 50 + self.place.setdefault(text, len(self.place))] = 1
            else:
                made[row, : len(vector)] = vector
        return made

    def windows(self, texts: list[str]) -> list[list[str]]:
        return [[text] for text in texts]


@pytest.fixture(scope="session")
def embedder(demo) -> build.Embedder:
    return build.Embedder(build.EMBEDDING_MODEL, demo / "cache")


def row(number: int, instruction: str, output: str = "", given: str = "") -> dict:
    return {"id": str(number), "instruction": instruction, "input": given, "output": output}


def question(text: str, choices: tuple[str, ...] = (), answer: str = "", number: int = 0):
    return check.Question(f"some/all/{number}", text, list(choices), answer)


def found(rows, questions, embedder, paper: bool = False) -> dict[tuple[str, str], dict]:
    pairs = check.find_pairs(rows, questions, embedder, 0.8, paper)
    return {(pair["train_id"], pair["test_id"]): pair for pair in pairs}


def test_blocked_detection_is_brute_force(monkeypatch) -> None:
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(90, 3)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    names = [f"word{n}" for n in range(90)]
    embedder = Vectors(dict(zip(names, vectors.tolist(), strict=True)))
    rows = [row(n, name) for n, name in enumerate(names[:50])]
    questions = [question(name, number=n) for n, name in enumerate(names[50:])]
    cosines = vectors[:50].astype(float) @ vectors[50:].astype(float).T
    expected = {(str(i), f"some/all/{j}") for i, j in zip(*np.nonzero(cosines >= 0.8), strict=True)}
    assert len(expected) > 100
    for block, columns in ((1024, 8192), (7, 5), (50, 1)):
        monkeypatch.setattr(build, "BLOCK", block)
        monkeypatch.setattr(build, "BLOCK_COLUMNS", columns)
        for paper in (False, True):
            pairs = found(rows, questions, embedder, paper)
            assert pairs.keys() == expected
            for (i, test), pair in pairs.items():
                j = int(test.rpartition("/")[2])
                assert pair["cosine"] == pytest.approx(cosines[int(i), j], abs=2e-6)


def test_the_threshold_itself_is_in_and_the_next_number_below_is_not() -> None:
    at = np.float32(0.8)  # 0.800000012 in float64
    below = np.nextafter(at, np.float32(0))
    vectors = {"a": [1, 0], "at": [float(at), 0.6], "below": [float(below), 0.6]}
    questions = [question("at", number=0), question("below", number=1)]
    for paper in (False, True):
        assert found([row(0, "a")], questions, Vectors(vectors), paper).keys() == {
            ("0", "some/all/0")
        }


def test_views_find_what_the_whole_text_hides(embedder) -> None:
    stem = "Which colonial grievance did the author of this pamphlet blame on Parliament?"
    filler = " ".join(f"The {n}th harbour ledger lists barrels of salted cod." for n in range(60))
    rows = [
        row(
            0, "Which grievance of the colonies did the pamphlet's author attribute to Parliament?"
        ),
        row(
            1, "Which of these planets has the largest moon?\nA: Mars\nB: Jupiter", given="x " * 80
        ),
        row(2, f"{filler}\nHow many moles of gas fill a 2 litre flask at 300 kelvin?\nThank you."),
        row(3, "Write a poem. What is a mother lode? Rhyme it with road."),
    ]
    questions = [
        question("The king taxes tea, and we are angry. " * 30 + f"\n{stem}", number=0),
        question("Which planet has the largest moon?", ("Venus", "Jupiter"), "Jupiter", 1),
        question("How many moles of gas fill a 2 litre flask at 300 kelvin?", number=2),
        question("What is a mother lode?", ("gold", "ore"), "ore", 3),
    ]
    pairs = found(rows, questions, embedder)
    assert {(pair, pair) for pair in "0123"} == {(i, j.rpartition("/")[2]) for i, j in pairs}
    views = {i: (pair["view"], pair["detector"]) for (i, _), pair in pairs.items()}
    assert views["0"] == ("stem", "cosine")
    assert views["1"][0].startswith("without choices")
    assert views["2"][1] == views["3"][1] == "verbatim"
    assert pairs["2", "some/all/2"]["suggested"] == "duplicate"


def test_windows_find_a_question_deep_in_a_long_text(embedder) -> None:
    text = " ".join(f"The {n}th harbour ledger lists barrels of salted cod." for n in range(60))
    copy = text.replace("ledger", "register").replace("barrels", "casks")
    other = " ".join(f"Violin sonata number {n} opens with a slow movement." for n in range(60))
    assert len(embedder.windows([text])[0]) > 1
    pairs = found([row(0, f"{other} {copy}")], [question(f"{text} {text}")], embedder)
    assert ["window" in pair["view"] for pair in pairs.values()] == [True]


def test_generic_stems_do_not_flood_the_list(embedder) -> None:
    common = [f"Which of the following statements about subject {n} is true?" for n in range(300)]
    rows = [row(n, text) for n, text in enumerate(common)]
    stem = "Which of the following statements is true?"
    rows.append(row(1000, f"{stem}\nA: iron is a metal\nB: wood is a metal", given="metals"))
    rows.append(row(1001, f"{stem}\nA: The moon is a star\nB: The moon is a rock"))
    questions = [
        question(stem, ("Cats lay eggs", "Cats have fur"), "Cats have fur", 0),
        question(stem, ("The moon is a star", "The moon is a rock"), "The moon is a rock", 1),
    ]
    pairs = found(rows[300:], questions, embedder)
    assert pairs.keys() == {("1001", "some/all/1")}  # the choices make it the same question


def test_words_and_numbers_confirm_what_the_cosine_leaves_open() -> None:
    same = "How many of the 24 ducks on the Miller farm swim across the 3 ponds each morning?"
    moved = "Each morning the 3 ponds on the Miller farm are crossed by how many of its 24 ducks?"
    number = moved.replace("24", "17").replace("3", "8")
    name = moved.replace("Miller", "Jackson")
    topic = "Ducks and geese like ponds."
    vectors = {same: [1, 0], **{text: [0.7, 0.714] for text in (moved, number, name, topic)}}
    rows = [row(n, text) for n, text in enumerate((moved, number, name, topic))]
    rows += [row(10 + n, f"filler of the number {n}") for n in range(200)]
    pairs = found(rows, [question(same)], Vectors(vectors))
    assert {i: pair["detector"] for (i, _), pair in pairs.items()} == {"0": "cosine and words"}


def test_verbatim_text_is_found_wherever_it_stands() -> None:
    needle = "What is the heaviest noble gas?"
    prompts = [
        "Hello! What is the HEAVIEST noble\n  gas -- I forgot.",
        'A pupil asked me: "what is the heaviest noble gas?" Help.',
        "What is the heaviest noble metal?",
    ]
    rows = [row(n, text) for n, text in enumerate(prompts)]
    rows += [row(10 + n, f"Some filler, number {n}.") for n in range(100)]
    pairs = found(rows, [question(needle)], Vectors({}))
    assert {i for i, _ in pairs} == {"0", "1"}
    brute = {
        (a, b)
        for a in (needle, prompts[2], "noble gas")
        for b in prompts
        if f" {' '.join(check.words_of(a))} " in f" {' '.join(check.words_of(b))} "
    }
    assert set(check.contained([needle, prompts[2], "noble gas"], prompts)) == brute


@pytest.mark.parametrize(
    ("a", "b", "same"),
    [
        ("(x+1)/2", "x+1/2", False),
        ("x^{2}+1", "$x^2+1$", True),
        ("x^{2n}", "x^2n", False),
        (r"\frac{1}{2} of 1{,}000", "1/2 of 1,000", True),
        (r"$\theta \le 3.5$", "θ \\le 3.5", True),
        ("3.5", "35", False),
        ("the x-axis", "the x axis", True),
        ("a - b", "a + b", False),
        ("S_5", "S_{5}", True),
        ("Is it (roughly) so?", "is it roughly so", True),
    ],
)
def test_words_keep_what_a_formula_says(a: str, b: str, same: bool) -> None:
    assert (check.words_of(a) == check.words_of(b)) is same


# --- suggestions ----------------------------------------------------------------------------------

AXIS = "The region under y = x^2 from x = 0 to x = 2 is rotated about the x-axis. Find its volume."
SUGGESTED = {
    "same words": (row(0, AXIS, "$\\boxed{4}$"), question(AXIS, ("4", "5"), "4"), "duplicate"),
    "another axis": (
        row(0, AXIS, "$\\boxed{\\frac{32\\pi}{5}}$"),
        question(AXIS.replace("x-axis", "y-axis"), ("8 pi", "9 pi"), "8 pi"),
        "similar-but-different",
    ),
    "another number": (
        row(0, AXIS, "$\\boxed{4}$"),
        question(AXIS.replace("= 2 is", "= 3 is"), ("9", "4"), "9"),
        "similar-but-different",
    ),
    "negated": (
        row(0, "Which gas is a greenhouse gas?\nA: methane\nB: argon", "The answer is A: methane"),
        question("Which gas is not a greenhouse gas?", ("argon", "methane"), "argon"),
        "similar-but-different",
    ),
    "one word": (
        row(0, "What is the biggest planet of the solar system?", "Jupiter"),
        question("What is the largest planet of the solar system?", ("Mars", "Jupiter"), "Jupiter"),
        "duplicate",
    ),
    "a synonym": (
        row(
            0,
            "What is the largest organ of a human body?\nA: the skin\nB: the liver",
            "A: the skin",
        ),
        question(
            "Which organ of the human body is the largest?", ("epidermis", "heart"), "epidermis"
        ),
        "gray-area",
    ),
    "a generic stem": (
        row(
            0, "Which of these is true?\nA: tea is a metal\nB: tin is a metal", "B: tin is a metal"
        ),
        question("Which of these is true?", ("Cats bark.", "Cats purr."), "Cats purr."),
        "not-a-leak",
    ),
}


@pytest.mark.parametrize("case", SUGGESTED)
def test_suggestions_say_what_differs(case: str, embedder) -> None:
    one, test, expected = SUGGESTED[case]
    texts = [f"Which of these is true of the {n}th thing?" for n in range(50)]
    texts += [f"word{n} is an example of other{n}" for n in range(500)]
    [(kind, why)] = check.suggest([(one, test)], embedder, check.Rarity(texts))
    assert kind == expected, why
    assert why and "\n" not in why
    if case == "another axis":
        assert "x -> y" in why


@pytest.mark.slow
@pytest.mark.skipif(not REAL_DATA.is_dir(), reason="the real data is not there")
def test_suggestions_agree_with_the_labels(tmp_path) -> None:
    """Half of the pairs (an odd first digit of the id) was never looked at while writing rules."""
    labels = {line["pair_id"]: line for line in read_lines(DATA / "labels.jsonl")}
    ids = read_lines(DATA / "label_ids.jsonl")
    assert {line["pair_id"] for line in ids} == labels.keys() and len(labels) >= 300
    sources = "math,scienceqa,scibench,reclor,theoremqa,openbookqa,guanaco"
    args = ["--local", str(REAL_DATA), "--sources", sources, "--include-test-splits"]
    args = build.parse_args(args)
    rows = [one for name in sources.split(",") for one in build.read_source(name, args)[0]]
    build.add_ids(rows)
    rows = {one["id"]: one for one in rows}
    tests = check.load_questions(check.parse_args(["--local", str(REAL_DATA)]))
    tests = {test.test_id: test for test in tests}
    pairs = [(rows[line["train_id"]], tests[line["test_id"]]) for line in ids]
    sizes = Counter((pair[0]["source"], pair[1].test_id.split("/")[0]) for pair in pairs)
    assert sizes["openbookqa", "mmlu"] >= 100 and sizes["math", "mmlu"] >= 100
    for line, pair in zip(ids, pairs, strict=True):  # the ids are those of the labels
        assert check.describe_pair(*pair, 0.0, "")["pair_id"] == line["pair_id"]
    texts = [text for one in rows.values() for text in check.row_views(one)]
    rarity = check.Rarity(texts + [t for q in tests.values() for t in check.question_views(q)])
    embedder = build.Embedder(build.EMBEDDING_MODEL, tmp_path)
    suggested = check.suggest(pairs, embedder, rarity)
    for digits in ("02468ace", "13579bdf"):
        right = [
            kind == labels[line["pair_id"]]["label"]
            for line, (kind, _) in zip(ids, suggested, strict=True)
            if line["pair_id"][0] in digits
        ]
        assert sum(right) / len(right) >= 0.85, (digits, sum(right), len(right))


@pytest.mark.skipif(not REAL_DATA.is_dir(), reason="the real data is not there")
def test_math_leaks_word_for_word() -> None:
    """74 test questions have the words of a question of MATH's training split."""
    lines = (REAL_DATA / "math/math_train.jsonl").read_text(encoding="utf-8").splitlines()
    known = {tuple(check.words_of(json.loads(line)["problem"])) for line in lines}
    tests = check.load_questions(check.parse_args(["--local", str(REAL_DATA)]))
    same = [test.test_id for test in tests if tuple(check.words_of(test.text)) in known]
    assert len(same) == 74 and all(name.startswith("mmlu/") for name in same)


# --- verdicts -> clean set ------------------------------------------------------------------------


def test_removed_ids() -> None:
    pairs = [{"pair_id": p, "train_id": t} for p, t in ("ax", "bx", "cy", "dz")]
    verdicts = {"a": "not-a-leak", "b": "duplicate", "c": "not-a-leak", "former": "gray-area"}
    decisions = {name: {"verdict": verdict} for name, verdict in verdicts.items()}
    b, d = {"pair_id": "b", "verdict": "duplicate"}, {"pair_id": "d", "verdict": "undecided"}
    assert common.removed_ids(pairs, decisions) == {"x": [b], "z": [d]}
    assert common.removed_ids(pairs, decisions, ["duplicate"]) == {"x": [b]}
    assert common.removed_ids(pairs, decisions, ["gray-area"]) == {}
    assert common.removed_ids(pairs, {}, common.REMOVED).keys() == {"x", "y", "z"}


def test_remove_chooses_classes_and_stale_verdicts_are_named(demo, tmp_path) -> None:
    folder = tmp_path / "contamination"
    shutil.copytree(demo / "contamination", folder)
    pairs = read_lines(folder / "pairs.jsonl")
    log = folder / "decisions.jsonl"
    common.append_decision(log, pairs[0]["pair_id"], "duplicate", "ann")
    common.append_decision(log, pairs[1]["pair_id"], "gray-area", "ann")
    common.append_decision(log, "0123456789abcdef", "duplicate", "ann")
    args = ["apply", "--out", folder, "--remove"]
    done = run_script("check_contamination", *args, "duplicate")
    assert done.returncode == 0, done.stderr
    assert "1 verdicts of former pairs (0123456789abcdef" in done.stdout
    assert f"{len(pairs) - 2} undecided pairs" in done.stdout
    removed = read_lines(folder / "removed.jsonl")
    assert {r["id"] for r in removed} == {pairs[0]["train_id"]}
    applied = json.loads((folder / "apply.json").read_text())
    assert applied["stale"] == ["0123456789abcdef"]
    assert applied["undecided"] == sorted(pair["pair_id"] for pair in pairs[2:])
    assert {*applied["tables"]} == {"source", "source x benchmark", "subject"}
    for name, table in applied["tables"].items():
        assert sum(line["pairs"] for line in table) == len(pairs), name
        assert sum(line["duplicate"] for line in table) == 1, name
        for line in table:
            assert line[name] in (folder / "table.md").read_text()
    done = run_script("check_contamination", *args, "gray-area,undecided")
    assert len(read_lines(folder / "removed.jsonl")) == len(
        {pair["train_id"] for pair in pairs if pair is not pairs[0]}
    )
    assert_refused(run_script("check_contamination", *args, "dup"), "dup", "undecided")


def test_against_another_training_set(demo, tmp_path) -> None:
    rows = [r for r in read_lines(demo / "dataset/dataset.jsonl") if r["source"] == "math"]
    partner = tmp_path / "partner.jsonl"
    theirs = [{key: one[key] for key in ("instruction", "input", "output")} for one in rows[:5]]
    theirs.append({"instruction": "Name three sea birds.", "input": "", "output": "gull, tern"})
    partner.write_text("".join(json.dumps(one) + "\n" for one in theirs))
    args = ["--cache", demo / "cache", "--dataset"]
    out = ["--out", tmp_path / "out"]
    dataset = demo / "dataset/dataset.jsonl"
    done = run_script("check_contamination", *args, dataset, "--against", partner, *out)
    assert done.returncode == 0, done.stderr
    pairs = read_lines(tmp_path / "out/pairs.jsonl")
    assert {pair["benchmark"] for pair in pairs} == {"against"}
    assert {one["id"] for one in rows[:5]} <= {pair["train_id"] for pair in pairs}
    assert not any(pair["test_id"].endswith("/5") for pair in pairs)
    # and a partner's set, which has no ids, against benchmarks
    args += [partner, *DEMO, "--benchmarks", "mmlu,arc", "--out", tmp_path / "partner"]
    done = run_script("check_contamination", *args)
    assert done.returncode == 0, done.stderr
    clean = read_lines(tmp_path / "partner/clean.jsonl")
    assert len({one["id"] for one in clean}) == len(clean) > 0


# --- input nobody hoped for -----------------------------------------------------------------------


def test_odd_texts(demo, tmp_path) -> None:
    odd = [
        "",
        "word " * 10_000,
        "\x00\x1b]0;title\x07 \u2028 What \ufeff is this?",
        "ما هي عاصمة مصر القديمة؟",
        "Which two benchmarks hold this very question of ours?",
        "🦆" * 300,
    ]
    for name in ("one", "two"):
        lines = [json.dumps({"question": text, "choices": [], "answer": ""}) for text in odd]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    rows = [row(n, text) for n, text in enumerate(odd)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    extra = [f"--extra-benchmark={name}={tmp_path / name}.jsonl" for name in ("one", "two")]
    done = run_script(
        "check_contamination",
        *("--dataset", tmp_path / "rows.jsonl", "--benchmarks", "", *extra),
        *("--cache", demo / "cache", "--out", tmp_path / "out"),
    )
    assert done.returncode == 0, done.stderr
    pairs = {
        (pair["train_id"], pair["test_id"]) for pair in read_lines(tmp_path / "out/pairs.jsonl")
    }
    for n in range(1, len(odd)):
        assert {(str(n), f"one/all/{n}"), (str(n), f"two/all/{n}")} <= pairs
    assert not any(train == "0" for train, _ in pairs)  # an empty text is like nothing


def test_broken_files_are_one_line(demo, tmp_path) -> None:
    dataset, out = demo / "dataset/dataset.jsonl", tmp_path / "out"
    base = ["--cache", demo / "cache", "--out", out, "--dataset"]
    (tmp_path / "q.jsonl").write_text('{"question": "What?"}\n')
    q = tmp_path / "q.jsonl"

    def refused(*args: object) -> None:
        *args, word = args
        assert_refused(run_script("check_contamination", *args), word)

    for name in (f"a/b={q}", f"mmlu={q}", f"={q}", "x="):
        word = "such file" if name == "x=" else "cannot be names"
        refused(*base, dataset, *DEMO, "--extra-benchmark", name, word)
    twice = ["--extra-benchmark", f"x={q}", "--extra-benchmark", f"x={q}"]
    refused(*base, dataset, *DEMO, *twice, "given twice")
    for fault in ('"choices": "ab"', '"choices": [1, 2]', '"answer": null, "question": 3'):
        q.write_text(f'{{"question": "What?", {fault}}}\n')
        more = ["--benchmarks", "", "--extra-benchmark", f"x={q}"]
        refused(*base, dataset, *more, "x/all" if "choices" in fault else "'question'")
    q.write_text('{"question": "half \\ud800 a pair"}\n')
    refused(*base, dataset, *more, "q.jsonl:1")
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({**row(0, "Why?"), "source": 7}) + "\n")
    refused(*base, rows, *DEMO, "source")
    rows.write_text(json.dumps(row(0, "Why?")) * 2)
    refused(*base, rows, *DEMO, "rows.jsonl:1")
    latin = tmp_path / "data/mmlu"
    for split in ("dev", "test"):
        (latin / split).mkdir(parents=True)
        (latin / split / f"art_{split}.csv").write_bytes("café?,a,b,c,d,A\n".encode("latin-1"))
    local = ["--benchmarks", "mmlu", "--local", tmp_path / "data"]
    refused(*base, dataset, *local, "UTF-8")
    cut = tmp_path / "cut"
    shutil.copytree(demo / "dataset", cut)
    whole = (cut / "dataset.jsonl").read_text().splitlines(keepends=True)
    (cut / "dataset.jsonl").write_text("".join(whole[:-3]))
    refused(*base, cut / "dataset.jsonl", *DEMO, "cut short")
    (cut / "run.json").write_text('{"outputs": []}')
    refused(*base, cut / "dataset.jsonl", *DEMO, "run.json")
    assert not out.exists()


def test_broken_results_are_one_line(demo, tmp_path) -> None:
    run = json.loads((demo / "contamination/run.json").read_text())
    faults = [
        ("run.json", "", "run.json"),
        ("run.json", "[]", "run.json"),
        ("run.json", json.dumps({**run, "inputs": {"x": 3}}), "run.json"),
        ("run.json", json.dumps({**run, "settings": {"dataset": 5}}), "5 is missing"),
        ("run.json", json.dumps({**run, "inputs": {}}), "changed"),
        ("pairs.jsonl", '{"pair_id": 3}\n', "pairs.jsonl"),
        ("pairs.jsonl", "{", "pairs.jsonl"),
    ]
    for number, (name, text, word) in enumerate(faults):
        folder = tmp_path / str(number)
        shutil.copytree(demo / "contamination", folder)
        common.append_decision(folder / "decisions.jsonl", "a", "duplicate", "ann")
        (folder / name).write_text(text)
        done = run_script("check_contamination", "apply", "--out", folder)
        assert_refused(done, word)
        assert common.read_decisions(folder / "decisions.jsonl").keys() == {"a"}
    shutil.copytree(demo / "contamination", folder := tmp_path / "apply")
    (folder / "apply.json").write_text("{")
    assert run_script("check_contamination", "apply", "--out", folder).returncode == 0


def test_a_table_cannot_act_on_the_terminal() -> None:
    text = common.markdown_table(["name", "of"], [["\ud800\x1b[2J", 1234], ["", "\u202e"]])
    assert all(line.isprintable() for line in text.splitlines())
    assert r"\ud800\x1b[2J" in text and "1,234" in text

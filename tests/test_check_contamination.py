"""Holds: every pair above the threshold is listed whatever the blocks, planted leaks among them,
in every view; suggestions agree with the labels; verdicts survive kills and torn lines; the clean
set is what the verdicts say; benchmark files are read exactly; odd input is one line or no harm."""

import itertools
import json
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from conftest import DEMO, REAL_DATA, ROOT, WORLD, assert_refused, demo_origins, run_script

import build_dataset as build
import check_contamination as check
import common

LABELS = ROOT / "tests/data/labels.jsonl"
LABEL_IDS = ROOT / "tests/data/label_ids.jsonl"
needs_real_data = pytest.mark.skipif(not REAL_DATA.is_dir(), reason="the real data is not there")


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.open(encoding="utf-8")]


def read_json(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def write_lines(path: Path, rows: list[dict]) -> Path:
    path.write_text(common.to_jsonl(rows), encoding="utf-8")
    return path


def values(rows: list[dict], key: str) -> set[str]:
    return {row[key] for row in rows}


def ids_of(path: Path) -> set[str]:
    return values(read_lines(path), "id")


def decide(folder: Path, pair_id: str, verdict: str, reviewer: str = "ann") -> None:
    common.append_decision(folder / "decisions.jsonl", pair_id, verdict, reviewer)


def run_check(*args: object) -> subprocess.CompletedProcess:
    return run_script("check_contamination", *args)


def run_well(*args: object) -> str:
    done = run_check(*args)
    assert done.returncode == 0, done.stderr
    return done.stdout


# --- the demo, whole ------------------------------------------------------------------------------


def test_planted_leaks_are_found_and_removed(demo) -> None:
    rows = {row["id"]: row for row in read_lines(demo / "dataset/dataset.jsonl")}
    found = {}
    for pair in read_lines(demo / "contamination/pairs.jsonl"):
        row = rows[pair["train_id"]]
        train = f"{row['source']}:{row['origin']}"
        found[train, pair["test_id"]] = pair

    origins = demo_origins()
    plants = read_json(ROOT / "demo/planted.json")["leaks"]
    assert values(plants, "class") == {"duplicate", "gray-area", "similar-but-different"}
    planted = set()
    for plant in plants:
        place = (origins[plant["train"]], plant["test"])
        planted.add(place)
        assert found[place]["cosine"] >= plant["cosine"] - 0.002  # that of the whole questions

    for train, test in found.keys() - planted:
        same_template = train.startswith("world:") and test.startswith("world/")
        if not same_template:
            assert found[train, test]["suggested"] == "not-a-leak", (train, test)

    removed = ids_of(demo / "contamination/removed.jsonl")
    assert removed == values(found.values(), "train_id")
    assert ids_of(demo / "contamination/clean.jsonl") == rows.keys() - removed


def test_most_of_the_world_survives(demo) -> None:
    written = len(read_lines(WORLD / "train.jsonl"))
    clean = read_lines(demo / "contamination/clean.jsonl")
    kept = [row for row in clean if row["source"] == "world"]
    assert len(kept) >= 0.85 * written, (len(kept), written)
    pairs = read_lines(demo / "contamination/pairs.jsonl")
    flagged = {pair["test_id"] for pair in pairs if pair["benchmark"] == "world"}
    tests = read_lines(WORLD / "test.jsonl")
    assert len(tests) - len(flagged) >= 100


@pytest.fixture
def folder(demo, tmp_path) -> Path:
    """A copy of the demo's checked folder, to give verdicts in."""
    return shutil.copytree(demo / "contamination", tmp_path / "contamination")


def pair_ids_by_row(folder: Path) -> dict[str, list[str]]:
    by_row = defaultdict(list)
    for pair in read_lines(folder / "pairs.jsonl"):
        by_row[pair["train_id"]].append(pair["pair_id"])
    return by_row


def test_apply_follows_the_verdicts(folder) -> None:
    by_row = pair_ids_by_row(folder)
    freed, kept_out, *_ = [row for row, pairs in by_row.items() if len(pairs) == 1]
    half, *_ = [row for row, pairs in by_row.items() if len(pairs) > 1]
    decide(folder, by_row[freed][0], "duplicate")
    decide(folder, by_row[freed][0], "not-a-leak", "bob")  # the last line wins
    decide(folder, by_row[kept_out][0], "similar-but-different")
    decide(folder, by_row[half][0], "not-a-leak")  # its other pair is undecided

    run_well("apply", "--out", folder)
    clean = (folder / "clean.jsonl").read_bytes()
    assert freed in ids_of(folder / "clean.jsonl")
    removed = {row["id"]: row for row in read_lines(folder / "removed.jsonl")}
    assert half in removed
    reason = {"pair_id": by_row[kept_out][0], "verdict": "similar-but-different"}
    assert removed[kept_out]["because"] == [reason]
    pairs = read_lines(folder / "pairs.jsonl")
    counts = read_json(folder / "apply.json")["counts"]
    assert counts["undecided_pairs"] == len(pairs) - 3

    run_well("apply", "--out", folder)
    assert (folder / "clean.jsonl").read_bytes() == clean
    log = read_lines(folder / "decisions.jsonl")
    assert len(log) == 4  # nothing ever removes a verdict


def test_the_next_step_sees_newer_verdicts_and_edits(folder, tmp_path) -> None:
    clean = folder / "clean.jsonl"
    args = ["--base-model", "none", "--data", clean, "--out", tmp_path / "adapter"]
    pair = read_lines(folder / "pairs.jsonl")[0]["pair_id"]
    decide(folder, pair, "duplicate")
    run_well("apply", "--out", folder)
    assert "newer verdicts" not in run_script("finetune", *args).stderr
    decide(folder, pair, "not-a-leak")
    assert "newer verdicts" in run_script("finetune", *args).stderr

    rows = read_lines(clean)
    write_lines(clean, [*rows, rows[0]])
    done = run_script("finetune", *args)
    assert_refused(done, "clean.jsonl is not the file", "apply.json lists")


def test_all_is_written_before_anything_is_said(folder) -> None:
    """So that a reader that goes away costs nothing."""
    (folder / "apply.json").unlink()
    script = str(ROOT / "check_contamination.py")
    command = shlex.join([sys.executable, script, "apply", "--out", str(folder)])
    shell = ["bash", "-o", "pipefail", "-c", f"{command} | head -c 0"]
    done = subprocess.run(shell, capture_output=True)
    assert done.returncode == 141
    assert done.stderr == b""
    assert (folder / "apply.json").exists()
    assert not (folder / ".unfinished").exists()


def test_overwriting_keeps_the_verdicts(demo, tmp_path) -> None:
    out = tmp_path / "out"
    args = ["--dataset", demo / "dataset/dataset.jsonl", *DEMO, "--benchmarks", "arc"]
    args += ["--cache", demo / "cache", "--out", out]
    run_well(*args)
    pair = read_lines(out / "pairs.jsonl")[0]
    decide(out, pair["pair_id"], "not-a-leak")
    assert_refused(run_check(*args), "finished", "--overwrite")
    run_well(*args, "--overwrite")
    decisions = common.read_decisions(out / "decisions.jsonl")
    assert decisions.keys() == {pair["pair_id"]}
    assert pair["train_id"] in ids_of(out / "clean.jsonl")


# --- the log of verdicts --------------------------------------------------------------------------


def test_a_torn_line_is_no_verdict_and_spoils_no_other(tmp_path) -> None:
    log = tmp_path / "decisions.jsonl"
    common.append_decision(log, "a", "duplicate", "ann")
    first = log.read_bytes()
    common.append_decision(log, "b", "not-a-leak", "ann")
    both = log.read_bytes()
    for cut in range(len(first), len(both)):
        log.write_bytes(both[:cut])
        common.append_decision(log, "c", "gray-area", "bob")
        decisions = common.read_decisions(log)
        assert decisions["a"]["verdict"] == "duplicate"
        assert decisions["c"]["verdict"] == "gray-area"
        only_the_newline_is_missing = cut == len(both) - 1
        assert ("b" in decisions) is only_the_newline_is_missing
        assert decisions.keys() <= {"a", "b", "c"}


def test_lines_that_are_no_verdict_are_named(tmp_path, capsys) -> None:
    log = tmp_path / "decisions.jsonl"
    common.append_decision(log, "a", "duplicate", "ann")
    good = log.read_text()
    log.write_text('{"pair_id": "a", "verdict": "maybe"}\n' + good + '{"pair_id"')
    assert common.read_decisions(log)["a"]["verdict"] == "duplicate"
    first, third = capsys.readouterr().err.splitlines()
    assert f"{log}:1 is no verdict" in first
    assert f"{log}:3 is no verdict" in third


def write_until_killed(log: Path, acknowledged: Path, prefix: str) -> None:
    for number in itertools.count():
        name = f"{prefix}-{number}"
        common.append_decision(log, name, "duplicate", "ann", f"note of {name}")
        with acknowledged.open("ab", buffering=0) as file:
            file.write(f"{name}\n".encode())


def test_verdicts_survive_kills_of_two_writers(tmp_path) -> None:
    """100 kills at random moments: no acknowledged line is lost, and no torn one is a verdict."""
    log = tmp_path / "decisions.jsonl"
    acknowledged = tmp_path / "acknowledged"
    acknowledged.touch()
    rng = random.Random(0)
    for trial in range(50):
        writers = []
        for writer in range(2):
            pid = os.fork()
            if pid == 0:
                write_until_killed(log, acknowledged, f"{trial}-{writer}")
            writers.append(pid)
        for pid in writers:
            enough = acknowledged.stat().st_size + rng.randrange(60)  # some lines more
            while acknowledged.stat().st_size <= enough:
                time.sleep(rng.uniform(0, 0.003))
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)

    names = acknowledged.read_text().split()
    decisions = common.read_decisions(log)
    assert len(names) > 100
    assert set(names) <= decisions.keys()
    for name, line in decisions.items():
        assert line["note"] == f"note of {name}"
        assert line["verdict"] == "duplicate"
    # a kill between the two files leaves at most one verdict of a writer unacknowledged
    assert len(decisions) <= len(names) + 100


# --- benchmarks -----------------------------------------------------------------------------------


def test_demo_benchmarks_are_read() -> None:
    read = {name: check.load_benchmark(name, ROOT / "demo/data") for name in check.HUB}
    names = ["conceptual_physics", "high_school_biology", "high_school_mathematics"]
    assert [subject.subject for subject in read["mmlu"]] == names
    hellaswag = read["hellaswag"][0]
    assert len(hellaswag.shots) == len(hellaswag.scored) == 12
    for subjects in read.values():
        for subject in subjects:
            questions = check.questions_of(subject)
            assert len(questions) == len(subject.scored)
            assert all(q.text and q.answer in q.choices for q in questions)

    answers = set()
    for subject in read["mmlu"]:
        answers |= {question.answer for question in check.questions_of(subject)}
    assert {"None", "NA"} <= answers


SIZES = {"arc": 1_172, "hellaswag": 10_042, "mmlu": 14_042, "truthfulqa": 817}


@needs_real_data
@pytest.mark.parametrize(("name", "count"), SIZES.items())
def test_real_benchmarks_are_read_whole(name: str, count: int) -> None:
    subjects = check.load_benchmark(name, REAL_DATA)
    assert len(subjects) == (57 if name == "mmlu" else 1)
    questions = []
    for subject in subjects:
        questions += check.questions_of(subject)
    assert len(questions) == count
    assert len({question.test_id for question in questions}) == count
    assert all(question.answer in question.choices for question in questions)


@needs_real_data
def test_both_layouts_of_hellaswag_number_a_question_alike() -> None:
    official = check.load_benchmark("hellaswag", REAL_DATA, official=True)[0]
    plain = check.load_benchmark("hellaswag", REAL_DATA)[0].scored
    assert len(official.shots) == 300
    assert len(official.scored) == 700
    places = {row["test_row"] for row in official.scored}
    assert len(places) == 700
    assert -1 not in places
    for row in official.scored:
        same = plain[row["test_row"]]
        assert row["label"] == same["label"]
        assert row["ctx"][-20:] == same["ctx"][-20:]


def test_hub_loading_on_a_local_copy(tmp_path, monkeypatch) -> None:
    arc = ROOT / "demo/data/arc"
    shutil.copy(arc / "ARC-Challenge-train.jsonl", tmp_path / "train.jsonl")
    shutil.copy(arc / "ARC-Challenge-test.jsonl", tmp_path / "test.jsonl")
    hub = (str(tmp_path), None, "train", "test")
    monkeypatch.setitem(check.HUB, "arc", hub)
    [from_hub] = check.load_benchmark("arc", None)
    [from_files] = check.load_benchmark("arc", ROOT / "demo/data")
    assert from_hub.shots == from_files.shots
    assert from_hub.scored == from_files.scored
    assert check.questions_of(from_hub) == check.questions_of(from_files)

    hub = (str(tmp_path / "nowhere"), None, "train", "test")
    monkeypatch.setitem(check.HUB, "arc", hub)
    with pytest.raises(common.UserError, match="cannot be loaded: .*--local"):
        check.load_benchmark("arc", None)


def test_a_byte_order_mark_is_no_part_of_a_question(tmp_path) -> None:
    read = []
    for encoding in ("utf-8", "utf-8-sig"):
        for split in ("dev", "test"):
            folder = tmp_path / encoding / "mmlu" / split
            folder.mkdir(parents=True)
            text = "Who won?,Ann,Bob,Eve,nobody,B\n"
            (folder / f"games_{split}.csv").write_text(text, encoding=encoding)
        read.append(check.load_benchmark("mmlu", tmp_path / encoding))
    assert read[0] == read[1]
    assert read[1][0].shots[0]["question"] == "Who won?"


# --- detection ------------------------------------------------------------------------------------


class Vectors:
    """An embedder whose vectors the test gives; every other text is orthogonal to all."""

    def __init__(self, known: dict[str, list[float]]) -> None:
        self.known = known
        self.axes: dict[str, int] = {}

    def __call__(self, texts: list[str]) -> np.ndarray:
        vectors = np.zeros((len(texts), 4000), np.float32)
        for number, text in enumerate(texts):
            if text in self.known:
                vector = self.known[text]
                vectors[number, : len(vector)] = vector
            else:
                axis = self.axes.setdefault(text, len(self.axes))
                vectors[number, 50 + axis] = 1
        return vectors

    def windows(self, texts: list[str]) -> list[list[str]]:
        return [[text] for text in texts]


@pytest.fixture(scope="session")
def embedder(demo) -> build.Embedder:
    return build.Embedder(build.EMBEDDING_MODEL, demo / "cache")


def row(number: int, instruction: str, output: str = "", given: str = "") -> dict:
    return {"id": str(number), "instruction": instruction, "input": given, "output": output}


def rows_of(texts: list[str]) -> list[dict]:
    return [row(number, text) for number, text in enumerate(texts)]


def questions_of(texts: list[str]) -> list[check.Question]:
    return [question(text, number=number) for number, text in enumerate(texts)]


def fillers(count: int) -> list[str]:
    """Texts that are like no other, so that the words of others are rare."""
    return [f"filler of the number {n}" for n in range(count)]


def question(
    text: str, choices: tuple[str, ...] = (), answer: str = "", number: int = 0
) -> check.Question:
    return check.Question(f"some/all/{number}", text, list(choices), answer)


def found(rows, questions, embedder, paper: bool = False) -> dict[tuple[str, int], dict]:
    """Return {(number of the row, number of the question): pair}."""
    pairs = {}
    for pair in check.find_pairs(rows, questions, embedder, threshold=0.8, paper=paper):
        _, _, test = pair["test_id"].split("/")
        pairs[int(pair["train_id"]), int(test)] = pair
    return pairs


def only_pair(ours: dict, theirs: check.Question, embedder) -> dict:
    rows = [row(1000 + n, text) for n, text in enumerate(fillers(100))]
    [pair] = found([ours, *rows], [theirs], embedder).values()
    return pair


@pytest.mark.parametrize("paper", [False, True])
@pytest.mark.parametrize(("block", "columns"), [(1024, 8192), (7, 5), (50, 1)])
def test_blocked_detection_is_brute_force(monkeypatch, paper, block, columns) -> None:
    monkeypatch.setattr(build, "BLOCK", block)
    monkeypatch.setattr(build, "BLOCK_COLUMNS", columns)
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(90, 3)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    names = [f"word{n}" for n in range(90)]
    embedder = Vectors(dict(zip(names, vectors.tolist(), strict=True)))
    pairs = found(rows_of(names[:50]), questions_of(names[50:]), embedder, paper)

    exact = vectors.astype(np.float64)
    cosines = exact[:50] @ exact[50:].T
    expected = {(i, j) for i, j in np.argwhere(cosines >= 0.8).tolist()}
    assert len(expected) > 100
    assert pairs.keys() == expected
    for place, pair in pairs.items():
        assert pair["cosine"] == pytest.approx(cosines[place], abs=2e-6)


@pytest.mark.parametrize("paper", [False, True])
def test_the_threshold_itself_is_in_and_the_next_number_below_is_not(paper: bool) -> None:
    at = np.float32(0.8)  # 0.800000012 in float64
    below = np.nextafter(at, np.float32(0))
    known = {"a": [1, 0]}
    known["at"] = [float(at), 0.6]
    known["below"] = [float(below), 0.6]
    pairs = found(rows_of(["a"]), questions_of(["at", "below"]), Vectors(known), paper)
    assert pairs.keys() == {(0, 0)}


def harbour(count: int) -> str:
    """A long text of one subject."""
    lines = [f"The {n}th harbour ledger lists barrels of salted cod." for n in range(count)]
    return " ".join(lines)


def test_a_stem_is_found_below_a_long_text(embedder) -> None:
    theirs = "Which colonial grievance did the author of this pamphlet blame on Parliament?"
    ours = "Which grievance of the colonies did the pamphlet's author attribute to Parliament?"
    passage = "The king taxes tea, and we are angry. " * 30
    pair = only_pair(row(0, ours), question(f"{passage}\n{theirs}"), embedder)
    assert pair["view"] == "stem"
    assert pair["detector"] == "cosine"


def test_a_question_is_found_without_its_choices(embedder) -> None:
    ours = "Which of these planets has the largest moon?\nA: Mars\nB: Jupiter"
    theirs = question("Which planet has the largest moon?", ("Venus", "Jupiter"), "Jupiter")
    pair = only_pair(row(0, ours, given="x " * 80), theirs, embedder)
    assert pair["view"].startswith("without choices")


def test_a_question_is_found_word_for_word_in_a_long_one(embedder) -> None:
    theirs = "How many moles of gas fill a 2 litre flask at 300 kelvin?"
    ours = f"{harbour(60)}\n{theirs}\nThank you."
    pair = only_pair(row(0, ours), question(theirs), embedder)
    assert pair["detector"] == "verbatim"
    assert pair["suggested"] == "duplicate"


def test_a_short_question_is_found_within_a_line(embedder) -> None:
    ours = row(0, "Write a poem. What is a mother lode? Rhyme it with road.")
    theirs = question("What is a mother lode?", ("gold", "ore"), "ore")
    pair = only_pair(ours, theirs, embedder)
    assert pair["detector"] == "verbatim"


def test_windows_find_a_question_deep_in_a_long_text(embedder) -> None:
    text = harbour(60)
    copy = text.replace("ledger", "register").replace("barrels", "casks")
    other = " ".join(f"Violin sonata number {n} opens with a slow movement." for n in range(60))
    assert len(embedder.windows([text])[0]) > 1
    pair = only_pair(row(0, f"{other} {copy}"), question(f"{text} {text}"), embedder)
    assert "window" in pair["view"]


def test_generic_stems_do_not_flood_the_list(embedder) -> None:
    stem = "Which of the following statements is true?"
    metals = row(0, f"{stem}\nA: iron is a metal\nB: wood is a metal", given="metals")
    our_moon = row(1, f"{stem}\nA: The moon is a star\nB: The moon is a rock")
    cats = question(stem, ("Cats lay eggs", "Cats have fur"), "Cats have fur", 0)
    choices = ("The moon is a star", "The moon is a rock")
    their_moon = question(stem, choices, choices[1], 1)
    pairs = found([metals, our_moon], [cats, their_moon], embedder)
    assert pairs.keys() == {(1, 1)}  # the choices make it the same question


def test_words_and_numbers_confirm_what_the_cosine_leaves_open() -> None:
    same = "How many of the 24 ducks on the Miller farm swim across the 3 ponds each morning?"
    moved = "Each morning the 3 ponds on the Miller farm are crossed by how many of its 24 ducks?"
    other_number = moved.replace("24", "17").replace("3", "8")
    other_name = moved.replace("Miller", "Jackson")
    topic = "Ducks and geese like ponds."
    texts = [moved, other_number, other_name, topic]
    vectors = {text: [0.7, 0.714] for text in texts}
    vectors[same] = [1, 0]
    rows = rows_of(texts + fillers(200))
    pairs = found(rows, [question(same)], Vectors(vectors))
    assert pairs.keys() == {(0, 0)}
    assert pairs[0, 0]["detector"] == "cosine and words"


def test_verbatim_text_is_found_wherever_it_stands() -> None:
    texts = [
        "Hello! What is the HEAVIEST noble\n  gas -- I forgot.",
        'A pupil asked me: "what is the heaviest noble gas?" Help.',
        "What is the heaviest noble metal?",
    ]
    rows = rows_of(texts + fillers(100))
    pairs = found(rows, [question("What is the heaviest noble gas?")], Vectors({}))
    assert pairs.keys() == {(0, 0), (1, 0)}


def test_contained_is_brute_force() -> None:
    rng = random.Random(0)
    texts = []
    for _ in range(60):
        words = rng.choices(["red", "fox", "den"], k=rng.randrange(1, 7))
        texts.append(" ".join(words))
    expected = set()
    for needle, text in itertools.product(texts, texts):
        if f" {needle} " in f" {text} ":
            expected.add((needle, text))
    assert len(expected) > 100
    assert set(check.contained(texts, texts)) == expected


def test_the_best_evidence_is_the_same_whatever_the_order() -> None:
    views = ["stem", "question", "opening"]
    kinds = itertools.product(["verbatim", "cosine"], [0.8, 0.9], views, views)
    evidence = []
    for detector, cosine, row_view, test_view in kinds:
        one = check.Evidence(detector, cosine, row_view=row_view, test_view=test_view)
        evidence.append(one)
    expected = check.Evidence("verbatim", 0.9, row_view="question", test_view="question")
    rng = random.Random(0)
    for _ in range(50):
        rng.shuffle(evidence)
        best = evidence[0]
        for one in evidence:
            if check.is_better(one, best):
                best = one
        assert best == expected


def test_the_weight_of_words_is_the_same_in_every_process() -> None:
    """A set's order, in which its weights are added, changes with Python's hash seed."""
    text = "how many of the ducks on one farm swim over both ponds and back each morning before ten"
    code = f"""
import check_contamination as check
words = {text!r}.split()
texts = [" ".join(words[: n + 1]) for n in range(len(words))]
print(repr(check.Rarity(texts).of(check.content_of({text!r}).words)))
"""
    weights = set()
    for seed in range(8):
        environment = {**os.environ, "PYTHONHASHSEED": str(seed)}
        command = [sys.executable, "-c", code]
        weights.add(subprocess.check_output(command, cwd=ROOT, env=environment))
    assert len(weights) == 1


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
        ("((x))", "x", True),
    ],
)
def test_words_keep_what_a_formula_says(a: str, b: str, same: bool) -> None:
    assert (check.words_of(a) == check.words_of(b)) is same


# --- suggestions ----------------------------------------------------------------------------------


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


AXIS = "The region under y = x^2 from x = 0 to x = 2 is rotated about the x-axis. Find its volume."


@dataclass
class Suggested:
    """A training and a test question, and the class that is suggested for them."""

    kind: str
    ours: str
    output: str
    theirs: str
    choices: tuple[str, str]
    answer: str


SUGGESTED = {
    "same words": Suggested(
        "duplicate",
        ours=AXIS,
        output="$\\boxed{4}$",
        theirs=AXIS,
        choices=("4", "5"),
        answer="4",
    ),
    "another axis": Suggested(
        "similar-but-different",
        ours=AXIS,
        output="$\\boxed{\\frac{32\\pi}{5}}$",
        theirs=AXIS.replace("x-axis", "y-axis"),
        choices=("8 pi", "9 pi"),
        answer="8 pi",
    ),
    "another number": Suggested(
        "similar-but-different",
        ours=AXIS,
        output="$\\boxed{4}$",
        theirs=AXIS.replace("= 2 is", "= 3 is"),
        choices=("9", "4"),
        answer="9",
    ),
    "negated": Suggested(
        "similar-but-different",
        ours="Which gas is a greenhouse gas?\nA: methane\nB: argon",
        output="The answer is A: methane",
        theirs="Which gas is not a greenhouse gas?",
        choices=("argon", "methane"),
        answer="argon",
    ),
    "one word": Suggested(
        "duplicate",
        ours="What is the biggest planet of the solar system?",
        output="Jupiter",
        theirs="What is the largest planet of the solar system?",
        choices=("Mars", "Jupiter"),
        answer="Jupiter",
    ),
    "a synonym": Suggested(
        "gray-area",
        ours="What is the largest organ of a human body?\nA: the skin\nB: the liver",
        output="A: the skin",
        theirs="Which organ of the human body is the largest?",
        choices=("epidermis", "heart"),
        answer="epidermis",
    ),
    "a generic stem": Suggested(
        "not-a-leak",
        ours="Which of these is true?\nA: tea is a metal\nB: tin is a metal",
        output="B: tin is a metal",
        theirs="Which of these is true?",
        choices=("Cats bark.", "Cats purr."),
        answer="Cats purr.",
    ),
}


@pytest.mark.parametrize("name", SUGGESTED)
def test_suggestions_say_what_differs(name: str, embedder) -> None:
    case = SUGGESTED[name]
    ours = row(0, case.ours, case.output)
    theirs = question(case.theirs, case.choices, case.answer)
    texts = [f"Which of these is true of the {n}th thing?" for n in range(50)]
    texts += [f"word{n} is an example of other{n}" for n in range(500)]
    [(kind, why)] = check.suggest([(ours, theirs)], embedder, check.Rarity(texts))
    assert kind == case.kind, why
    assert why
    assert "\n" not in why
    if name == "another axis":
        assert "x -> y" in why


def labelled_pairs() -> tuple[list[tuple[dict, check.Question]], check.Rarity]:
    """Return the labelled pairs, in the order of LABEL_IDS, and the rarity of all words."""
    sources = "math,scienceqa,scibench,reclor,theoremqa,openbookqa,guanaco"
    local = ["--local", str(REAL_DATA)]
    args = build.parse_args([*local, "--sources", sources, "--include-test-splits"])
    rows = []
    for name in sources.split(","):
        rows += build.read_source(build.load_sources()[name], args).rows
    build.add_ids(rows)
    questions = check.load_questions(check.parse_args(local))

    texts = []
    for one in rows:
        texts += check.row_views(one)
    for test in questions:
        texts += check.question_views(test)
    rows_by_id = {one["id"]: one for one in rows}
    tests_by_id = {test.test_id: test for test in questions}
    pairs = []
    for ids in read_lines(LABEL_IDS):
        one = rows_by_id[ids["train_id"]]
        test = tests_by_id[ids["test_id"]]
        pairs.append((one, test))
    return pairs, check.Rarity(texts)


@pytest.mark.slow
@needs_real_data
def test_suggestions_agree_with_the_labels(tmp_path) -> None:
    """Half of the pairs (an odd first digit of the id) was never looked at while writing rules."""
    labels = {line["pair_id"]: line["label"] for line in read_lines(LABELS)}
    ids = [line["pair_id"] for line in read_lines(LABEL_IDS)]
    assert set(ids) == labels.keys()
    assert len(labels) >= 300

    pairs, rarity = labelled_pairs()
    sizes = Counter()
    for pair_id, (one, test) in zip(ids, pairs, strict=True):
        line = check.describe_pair(one, test, cosine=0.0, view="")
        assert line["pair_id"] == pair_id
        sizes[line["source"], line["benchmark"]] += 1
    assert sizes["openbookqa", "mmlu"] >= 100
    assert sizes["math", "mmlu"] >= 100

    embedder = build.Embedder(build.EMBEDDING_MODEL, tmp_path)
    suggested = check.suggest(pairs, embedder, rarity)
    for digits in ("02468ace", "13579bdf"):
        right = []
        for pair_id, (kind, _) in zip(ids, suggested, strict=True):
            if pair_id[0] in digits:
                right.append(kind == labels[pair_id])
        share = right.count(True) / len(right)
        assert share >= 0.85, (digits, share)


@needs_real_data
def test_math_leaks_word_for_word() -> None:
    """74 test questions have the words of a question of MATH's training split."""
    problems = read_lines(REAL_DATA / "math/math_train.jsonl")
    known = {" ".join(check.words_of(problem["problem"])) for problem in problems}
    same = []
    for test in check.load_questions(check.parse_args(["--local", str(REAL_DATA)])):
        if " ".join(check.words_of(test.text)) in known:
            same.append(test.test_id)
    assert len(same) == 74
    assert all(name.startswith("mmlu/") for name in same)


# --- verdicts -> clean set ------------------------------------------------------------------------


def test_removed_ids() -> None:
    rows = {"a": "x", "b": "x", "c": "y", "d": "z"}
    pairs = [{"pair_id": pair, "train_id": row} for pair, row in rows.items()]
    verdicts = {"a": "not-a-leak", "b": "duplicate", "c": "not-a-leak", "former": "gray-area"}
    decisions = {pair: {"verdict": verdict} for pair, verdict in verdicts.items()}
    b = {"pair_id": "b", "verdict": "duplicate"}
    d = {"pair_id": "d", "verdict": "undecided"}
    assert common.removed_ids(pairs, decisions) == {"x": [b], "z": [d]}
    assert common.removed_ids(pairs, decisions, ["duplicate"]) == {"x": [b]}
    assert common.removed_ids(pairs, decisions, ["gray-area"]) == {}
    assert common.removed_ids(pairs, {}, common.REMOVED).keys() == {"x", "y", "z"}


def test_remove_chooses_classes_and_stale_verdicts_are_named(folder) -> None:
    first, second, *rest = read_lines(folder / "pairs.jsonl")
    decide(folder, first["pair_id"], "duplicate")
    decide(folder, second["pair_id"], "gray-area")
    decide(folder, "0123456789abcdef", "duplicate")

    shown = run_well("apply", "--out", folder, "--remove", "duplicate")
    assert "1 verdicts of former pairs (0123456789abcdef" in shown
    assert f"{len(rest)} undecided pairs" in shown
    assert ids_of(folder / "removed.jsonl") == {first["train_id"]}
    applied = read_json(folder / "apply.json")
    assert applied["stale"] == ["0123456789abcdef"]
    assert applied["undecided"] == sorted(values(rest, "pair_id"))

    run_well("apply", "--out", folder, "--remove", "gray-area,undecided")
    assert ids_of(folder / "removed.jsonl") == values([second, *rest], "train_id")
    done = run_check("apply", "--out", folder, "--remove", "dup")
    assert_refused(done, "dup", "undecided")


def test_tables_count_each_pair_once(folder) -> None:
    pairs = read_lines(folder / "pairs.jsonl")
    decide(folder, pairs[0]["pair_id"], "duplicate")
    run_well("apply", "--out", folder)
    tables = read_json(folder / "apply.json")["tables"]
    assert tables.keys() == {"source", "source x benchmark", "subject"}
    text = (folder / "table.md").read_text()
    for title, lines in tables.items():
        counts = Counter()
        for line in lines:
            assert line[title] in text
            for column in ("pairs", "undecided", "duplicate"):
                counts[column] += line[column]
        assert counts == {"pairs": len(pairs), "undecided": len(pairs) - 1, "duplicate": 1}


def test_against_another_training_set(demo, tmp_path) -> None:
    dataset = demo / "dataset/dataset.jsonl"
    rows = [one for one in read_lines(dataset) if one["source"] == "math"]
    theirs = []
    for one in rows[:5]:
        theirs.append({key: one[key] for key in build.FIELDS})
    theirs.append({"instruction": "Name three sea birds.", "input": "", "output": "gull, tern"})
    partner = write_lines(tmp_path / "partner.jsonl", theirs)

    cache = ["--cache", demo / "cache"]
    run_well("--dataset", dataset, "--against", partner, "--out", tmp_path / "out", *cache)
    pairs = read_lines(tmp_path / "out/pairs.jsonl")
    assert values(pairs, "benchmark") == {"against"}
    assert values(rows[:5], "id") <= values(pairs, "train_id")
    assert "against/partner/5" not in values(pairs, "test_id")

    # and a partner's set, which has no ids, against benchmarks
    out = tmp_path / "checked"
    run_well("--dataset", partner, *DEMO, "--benchmarks", "mmlu,arc", "--out", out, *cache)
    clean = read_lines(out / "clean.jsonl")
    assert clean
    assert len(ids_of(out / "clean.jsonl")) == len(clean)


# --- input nobody hoped for -----------------------------------------------------------------------


def test_odd_texts(demo, tmp_path) -> None:
    texts = [
        "",
        "word " * 10_000,
        "\x00\x1b]0;title\x07 \u2028 What \ufeff is this?",
        "ما هي عاصمة مصر القديمة؟",
        "Which two benchmarks hold this very question of ours?",
        "🦆" * 300,
    ]
    tests = [{"question": text, "choices": [], "answer": ""} for text in texts]
    args = ["--benchmarks", "", "--cache", demo / "cache", "--out", tmp_path / "out"]
    for name in ("one", "two"):
        file = write_lines(tmp_path / f"{name}.jsonl", tests)
        args += ["--extra-benchmark", f"{name}={file}"]
    dataset = write_lines(tmp_path / "rows.jsonl", rows_of(texts))
    run_well("--dataset", dataset, *args)

    pairs = set()
    for pair in read_lines(tmp_path / "out/pairs.jsonl"):
        pairs.add((pair["train_id"], pair["test_id"]))
    for n in range(1, len(texts)):
        assert (str(n), f"one/all/{n}") in pairs
        assert (str(n), f"two/all/{n}") in pairs
    assert not any(train == "0" for train, _ in pairs)  # an empty text is like nothing


@dataclass
class Given:
    """A folder for broken input, and the flags that a refused run takes beside it."""

    folder: Path
    dataset: Path
    flags: list[object]

    def refused(self, *args: object, words: list[str]) -> None:
        """Assert that a run on the demo's data set is refused in one line with these words."""
        self.refused_dataset(self.dataset, *args, words=words)

    def refused_dataset(self, dataset: Path, *args: object, words: list[str]) -> None:
        done = run_check(*self.flags, "--dataset", dataset, *args)
        assert_refused(done, *words)
        assert not (self.folder / "out").exists()


@pytest.fixture
def given(demo, tmp_path) -> Given:
    flags = [*DEMO, "--cache", demo / "cache", "--out", tmp_path / "out"]
    return Given(tmp_path, demo / "dataset/dataset.jsonl", flags)


def test_broken_training_sets_are_one_line(given) -> None:
    lines = given.dataset.read_text().splitlines()
    rows = given.folder / "rows.jsonl"
    rows.write_text(f"{lines[0]}\n{lines[1]}\n{lines[2][:40]}\n")
    given.refused_dataset(rows, words=["rows.jsonl:3"])
    rows.write_text('{"id": "a", "instruction": "q", "output": "o"}\n')
    given.refused_dataset(rows, words=["rows.jsonl:1", "'input'"])
    write_lines(rows, [{**row(0, "Why?"), "source": 7}])
    given.refused_dataset(rows, words=["row 1", "source"])
    rows.write_text(json.dumps(row(0, "Why?")) * 2)
    given.refused_dataset(rows, words=["rows.jsonl:1"])
    write_lines(rows, [row(0, "Why?")] * 2)
    given.refused_dataset(rows, words=["repeated ids ['0']"])
    rows.write_text("")
    given.refused_dataset(rows, words=["no rows"])
    given.refused_dataset(given.folder / "none.jsonl", words=["build_dataset.py"])
    rows.write_text(lines[0] + "\n")
    (given.folder / ".unfinished").write_text("python build_dataset.py\n")
    given.refused_dataset(rows, words=["unfinished", "build_dataset.py"])


def test_an_edited_training_set_is_refused(demo, given) -> None:
    edited = shutil.copytree(demo / "dataset", given.folder / "edited")
    dataset = edited / "dataset.jsonl"
    lines = dataset.read_text().splitlines(keepends=True)
    dataset.write_text("".join(lines[:-3]))
    given.refused_dataset(dataset, words=["cut short"])
    (edited / "run.json").write_text('{"outputs": []}')
    given.refused_dataset(dataset, words=["run.json"])


def test_impossible_flags_are_one_line(given) -> None:
    file = given.folder / "questions.jsonl"
    file.write_text('{"question": "What?"}\n')
    given.refused("--benchmarks", "arcs", words=["arcs"])
    given.refused("--extra-benchmark", f"a/b={file}", words=["cannot be names"])
    given.refused("--extra-benchmark", f"mmlu={file}", words=["cannot be names"])
    given.refused("--extra-benchmark", f"={file}", words=["cannot be names"])
    given.refused("--extra-benchmark", "x=", words=["no such file"])
    twice = ["--extra-benchmark", f"x={file}", "--extra-benchmark", f"x={file}"]
    given.refused(*twice, words=["given twice"])
    all_at_once = ["--benchmarks", "", "--cosine-threshold", "0", "--remove", "dup"]
    words = ["no benchmark", "--remove: dup", "--cosine-threshold 0.0"]
    given.refused(*all_at_once, words=words)


@pytest.mark.parametrize(
    ("line", "word"),
    [
        ('{"question": "What?", "choices": "ab"}', "x/all"),
        ('{"question": "What?", "choices": [1, 2]}', "x/all/0"),
        ('{"question": "What?", "choices": 3}', "x/all"),
        ('{"question": "What?", "choices": ["a"], "answer": 3}', "x/all"),
        ('{"question": 3, "answer": null}', "'question'"),
        ('{"question": "half \\ud800 a pair"}', "questions.jsonl:1"),
        ("", "x/all has no questions"),
    ],
)
def test_broken_questions_are_one_line(given, line: str, word: str) -> None:
    file = given.folder / "questions.jsonl"
    file.write_text(f"{line}\n")
    given.refused("--benchmarks", "", "--extra-benchmark", f"x={file}", words=[word])


def test_broken_benchmark_files_are_one_line(given) -> None:
    local = given.folder / "data"
    mmlu = ["--local", local, "--benchmarks", "mmlu"]
    for split in ("dev", "test"):
        (local / "mmlu" / split).mkdir(parents=True)
    dev = local / "mmlu/dev/art_dev.csv"
    test = local / "mmlu/test/art_test.csv"
    given.refused(*mmlu, words=["no <subject>_test.csv"])
    test.write_text("question,a,b,c,E\n")
    given.refused(*mmlu, words=["art_dev.csv"])
    dev.write_text("q,a,b,c,d,A\n")
    given.refused(*mmlu, words=["art_test.csv", "row 1"])
    dev.write_bytes("café?,a,b,c,d,A\n".encode("latin-1"))
    given.refused(*mmlu, words=["art_dev.csv", "UTF-8"])

    (local / "arc").mkdir()
    numbers = {"question": "Why?", "choices": {"text": ["a"], "label": 5}, "answerKey": "A"}
    for split in ("train", "test"):
        write_lines(local / f"arc/ARC-Challenge-{split}.jsonl", [numbers])
    given.refused("--local", local, "--benchmarks", "arc", words=["arc/all: bad row"])


def test_a_missing_folder_is_named_beside_the_hub(given) -> None:
    local = given.folder / "data"
    local.mkdir()
    args = [*given.flags, "--dataset", given.dataset, "--local", local]
    done = run_check(*args, "--benchmarks", "truthfulqa")
    assert_refused(done, "truthfulqa is no folder", "truthfulqa/truthful_qa")
    assert "HF_TOKEN" not in done.stderr


def test_apply_without_a_check_is_refused(tmp_path) -> None:
    done = run_check("apply", "--out", tmp_path / "out")
    assert_refused(done, "python check")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "text", "word"),
    [
        ("run.json", "", "run.json"),
        ("run.json", "[]", "run.json"),
        ("run.json", {"inputs": {"x": 3}}, "run.json"),
        ("run.json", {"settings": {"dataset": 5}}, "5 is missing"),
        ("run.json", {"inputs": {}}, "changed"),
        ("pairs.jsonl", '{"pair_id": 3}\n', "pairs.jsonl"),
        ("pairs.jsonl", "{", "pairs.jsonl"),
    ],
)
def test_broken_results_are_one_line(folder, name: str, text: str | dict, word: str) -> None:
    """A dict replaces what run.json says."""
    decide(folder, "a", "duplicate")
    if isinstance(text, dict):
        run = read_json(folder / "run.json")
        text = json.dumps({**run, **text})
    (folder / name).write_text(text)
    assert_refused(run_check("apply", "--out", folder), word)
    assert common.read_decisions(folder / "decisions.jsonl").keys() == {"a"}


def test_a_broken_apply_json_is_written_anew(folder) -> None:
    (folder / "apply.json").write_text("{")
    run_well("apply", "--out", folder)
    assert read_json(folder / "apply.json")["counts"]


def test_a_table_cannot_act_on_the_terminal() -> None:
    odd = ["\ud800\x1b[2J", "\u202e", "\x9b2J", "\x00\x07", "two\nlines"]
    rows = [[text, 1234] for text in odd]
    table = common.markdown_table(["name", "of"], rows)
    lines = table.splitlines()
    assert len(lines) == 2 + len(odd)
    assert all(line.isprintable() for line in lines)
    assert len({len(line) for line in lines}) == 1  # the columns stay aligned
    assert "\\ud800␛[2J" in table
    assert "1,234" in table

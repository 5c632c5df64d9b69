"""Measure how well step 2 finds leaks, beside n-grams and one cosine, and names their class.

    python benchmarks/contamination_quality.py --local raw
    python benchmarks/contamination_quality.py --local raw --only fidelity

Prints tables of five kinds, which --only names:

detection   Recall on rephrased benchmark questions (each row paired with its own original), and
            false flags per 1,000 rows of SciBench and TheoremQA against MMLU. A flag is false where
            none of the row's pairs fits one of the paper's three classes. The verdicts on all pairs
            that ours, an n-gram or a cosine of 0.65 flags, read one by one, are in
            tests/data/scibench_theoremqa_verdicts.jsonl; pairs that only a lower cosine flags were
            not judged and count as false ("at most").
fidelity    MATH's training split against five MMLU subjects as published: the pairs of --paper, and
            what the published loop (each test question's nearest row only) would remove.
duplicates  MATH's training split against all four benchmarks, by how the duplicates were found.
classes     Suggested classes against 360 labelled pairs: confusion matrices of the half on which
            the rules were written (first digit of the pair id even) and of the other.
memory      Peak memory of the comparison by the number of random vectors that are compared with
            50,000.

--local DIR holds sources and benchmarks as in step 2, and rephrased/: pairs of files whose lines
belong together. About 20 minutes on 2 cores with an empty cache, then 3; 1.6 GB.
"""

import argparse
import csv
import json
import re
import subprocess
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

# Last: the package `evaluate` comes before our evaluate.py.
sys.path.append(str(Path(__file__).resolve().parent.parent))
import build_dataset
import check_contamination

DATA = Path(__file__).resolve().parent.parent / "tests/data"
COSINES = (0.5, 0.6, 0.7, 0.8, 0.9)
PAPER_COSINE = 0.8
LABELLED_SOURCES = "math,scienceqa,scibench,reclor,theoremqa,openbookqa,guanaco"
PAPER_SUBJECTS = (
    "abstract_algebra",
    "college_mathematics",
    "elementary_mathematics",
    "high_school_mathematics",
    "high_school_statistics",
)
HALVES = {"rules written on it": "02468ace", "not looked at": "13579bdf"}  # first digits of the ids
COMPARED = 50_000  # random vectors, each of which is compared with all rows
WIDTH = 384  # of an embedding
Questions = list[check_contamination.Question]
Flags = set[tuple[str, str]]  # (train_id, test_id)


def read_lines(path: Path) -> list[build_dataset.Row]:
    """Return the objects of a .jsonl file."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def source_rows(local: Path, sources: str) -> list[build_dataset.Row]:
    """Return the rows of sources as step 1 converts them, test splits too, duplicates kept."""
    flags = ["--local", str(local), "--sources", sources, "--include-test-splits"]
    args = build_dataset.parse_args(flags)
    rows = []
    for source in build_dataset.chosen_sources(args):
        rows += build_dataset.read_source(source, args).rows
    build_dataset.add_ids(rows)
    return rows


def math_train_rows(local: Path) -> list[build_dataset.Row]:
    """Return the rows of MATH's training split."""
    return [row for row in source_rows(local, "math") if row["origin"].startswith("math_train")]


def row_texts(rows: list[build_dataset.Row]) -> list[str]:
    """Return each row's whole question."""
    return [build_dataset.question_of(row) for row in rows]


def test_questions(local: Path, benchmarks: str) -> Questions:
    """Return all test questions of the benchmarks."""
    args = check_contamination.parse_args(["--local", str(local), "--benchmarks", benchmarks])
    return check_contamination.load_questions(args)


def all_test_questions(local: Path) -> Questions:
    """Return the test questions of the paper's four benchmarks."""
    return test_questions(local, ",".join(check_contamination.HUB))


def print_markdown(headers: list[str], rows: list[list[Any]]) -> None:
    """Print a Markdown table."""
    print(check_contamination.markdown_table(headers, rows))


# --- detection ------------------------------------------------------------------------------------


@dataclass
class Rephrased:
    """Rephrased test questions as rows, the questions they are compared with, the true pairs."""

    name: str
    rows: list[build_dataset.Row]
    questions: Questions
    pairs: Flags


def pair_up(name: str, path: Path, originals: Questions, questions: Questions) -> Rephrased:
    """Return the rephrasings in a file, a line for each original; empty ones are left out."""
    rows = []
    pairs = set()
    for number, line in enumerate(read_lines(path)):
        if not line["text"].strip():
            continue
        text, _, answer = line["text"].removeprefix("Question: ").partition("\nAnswer:")
        row_id = str(number)
        rows.append({"id": row_id, "instruction": text, "input": "", "output": answer.strip()})
        pairs.add((row_id, originals[number].test_id))
    return Rephrased(name=name, rows=rows, questions=questions, pairs=pairs)


def rephrased_algebra(folder: Path, mmlu: Questions) -> Rephrased:
    """Return MMLU's abstract algebra rephrased, against all of MMLU."""
    originals = [q for q in mmlu if q.test_id.startswith("mmlu/abstract_algebra/")]
    with (folder / "abstract_algebra_test.csv").open(newline="", encoding="utf-8") as file:
        for question, row in zip(originals, csv.reader(file), strict=True):
            assert question.text == row[0]  # so that a rephrasing's line tells its original
    path = folder / "abstract_algebra_test_rephrase_english_filtered_question.jsonl"
    return pair_up("abstract algebra", path, originals=originals, questions=mmlu)


def rephrased_gsm8k(folder: Path) -> Rephrased:
    """Return GSM8K rephrased, against all of GSM8K."""
    questions = []
    for number, line in enumerate(read_lines(folder / "gsm8k_test_for_rephrase_gsm8k.jsonl")):
        question = check_contamination.Question(
            f"gsm8k/all/{number}", line["question"], choices=[], answer=line["answer"]
        )
        questions.append(question)
    path = folder / "rephrase_gsm8k.jsonl"
    return pair_up("GSM8K", path, originals=questions, questions=questions)


@dataclass
class SharedWords:
    """Flags pairs that share n words in a row."""

    n: int

    @property
    def name(self) -> str:
        """The table's name of it."""
        return f"{self.n}-gram"

    def n_grams(self, text: str) -> set[tuple[str, ...]]:
        """Return the n-grams of a text's words."""
        words = re.findall(r"\w+", text.lower())
        found = set()
        for start in range(len(words) - self.n + 1):
            found.add(tuple(words[start : start + self.n]))
        return found

    def find(self, rows: list[build_dataset.Row], questions: Questions) -> Flags:
        """Return the flagged pairs."""
        test_ids = defaultdict(list)  # of each n-gram
        for question in questions:
            for n_gram in self.n_grams(question.text):
                test_ids[n_gram].append(question.test_id)
        flags = set()
        for row in rows:
            for n_gram in self.n_grams(build_dataset.question_of(row)):
                for test_id in test_ids.get(n_gram, ()):
                    flags.add((row["id"], test_id))
        return flags


@dataclass
class OneCosine:
    """Flags pairs whose whole texts have this cosine or more."""

    cosine: float
    embedder: build_dataset.Embedder

    @property
    def name(self) -> str:
        """The table's name of it."""
        return f"cosine {self.cosine}"

    def find(self, rows: list[build_dataset.Row], questions: Questions) -> Flags:
        """Return the flagged pairs."""
        ours = self.embedder(row_texts(rows))
        theirs = self.embedder([question.text for question in questions])
        flags = set()
        for lefts, rights, _ in build_dataset.similar_pairs(ours, theirs, self.cosine):
            for left, right in zip(lefts.tolist(), rights.tolist(), strict=True):
                flags.add((rows[left]["id"], questions[right].test_id))
        return flags


@dataclass
class Ours:
    """Flags the pairs that step 2 lists."""

    embedder: build_dataset.Embedder
    name: str = "ours"

    def find(self, rows: list[build_dataset.Row], questions: Questions) -> Flags:
        """Return the flagged pairs."""
        pairs = list_pairs(rows, questions, self.embedder)
        return {(pair["train_id"], pair["test_id"]) for pair in pairs}


def list_pairs(
    rows: list[build_dataset.Row], questions: Questions, embedder: build_dataset.Embedder
) -> list[build_dataset.Row]:
    """Return the pairs that step 2 lists with its default settings."""
    return check_contamination.find_pairs(
        rows, questions, embedder, threshold=check_contamination.COSINE_THRESHOLD, paper=False
    )


def print_detection(local: Path, embedder: build_dataset.Embedder) -> None:
    """Print recall and false flags of every method."""
    mmlu = test_questions(local, "mmlu")
    rephrased = [
        rephrased_algebra(local / "rephrased", mmlu),
        rephrased_gsm8k(local / "rephrased"),
    ]
    rows = source_rows(local, "scibench,theoremqa")
    judged = set()
    leaking = set()  # rows
    for line in read_lines(DATA / "scibench_theoremqa_verdicts.jsonl"):
        judged.add((line["train_id"], line["test_id"]))
        if line["verdict"] != "not-a-leak":
            leaking.add(line["train_id"])

    methods: list[SharedWords | OneCosine | Ours] = [SharedWords(10), SharedWords(13)]
    for cosine in COSINES:
        methods.append(OneCosine(cosine, embedder))
    methods.append(Ours(embedder))
    table = []
    for method in methods:
        cells = [method.name]
        for test in rephrased:
            cells.append(len(method.find(test.rows, test.questions) & test.pairs))
        flags = method.find(rows, mmlu)
        flagged = {row for row, _ in flags}
        bound = "" if flags <= judged else "at most "
        cells.append(f"{len(flagged) * 1000 / len(rows):.1f}")
        cells.append(f"{bound}{len(flagged - leaking) * 1000 / len(rows):.1f}")
        table.append(cells)

    print(f"{len(rows):,} rows of SciBench and TheoremQA x {len(mmlu):,} questions of MMLU\n")
    found = [f"{test.name}: found of {len(test.pairs):,}" for test in rephrased]
    print_markdown(["method", *found, "flagged / 1,000", "false / 1,000"], table)


# --- fidelity, duplicates -------------------------------------------------------------------------


def print_fidelity(local: Path, embedder: build_dataset.Embedder) -> None:
    """Print the published format: ours, and the published nearest-only loop."""
    rows = math_train_rows(local)
    questions = []
    for question in test_questions(local, "mmlu"):
        if question.test_id.split("/")[1] in PAPER_SUBJECTS:
            questions.append(question)

    pairs = check_contamination.find_pairs(
        rows, questions, embedder, threshold=PAPER_COSINE, paper=True
    )
    flagged = set()
    removed = set()
    for pair in pairs:
        flagged.add(pair["test_id"])
        removed.add(pair["train_id"])
    ours = ["ours, --paper", len(flagged), len(removed)]

    row_vectors = embedder(row_texts(rows))
    texts = [build_dataset.lettered(question.text, question.choices) for question in questions]
    cosines = embedder(texts) @ row_vectors.T
    nearest = cosines.argmax(axis=1)[cosines.max(axis=1) >= PAPER_COSINE]
    published = ["published loop: nearest row only", len(nearest), len(set(nearest.tolist()))]

    print(f"\nMATH train ({len(rows):,}) x {len(questions):,} questions of five MMLU subjects\n")
    print_markdown(["method", "test questions flagged", "rows removed"], [ours, published])


def print_duplicates(local: Path, embedder: build_dataset.Embedder) -> None:
    """Print MATH's training split against everything: the same words, and other duplicates."""
    rows = math_train_rows(local)
    questions = all_test_questions(local)
    pairs = list_pairs(rows, questions, embedder)
    suggested = Counter(pair["suggested"] for pair in pairs)
    counts = [f"{suggested[name]} {name}" for name in check_contamination.VERDICTS]
    sizes = f"MATH train ({len(rows):,}) x {len(questions):,} test questions"
    print(f"\n{sizes}: {len(pairs):,} pairs,")
    print(", ".join(counts))

    same = set()  # test questions
    others = []  # pairs
    for pair in pairs:
        if pair["suggested"] == "duplicate":
            if pair["why"] == "same words":
                same.add(pair["test_id"])
            else:
                others.append(pair)
    print(f"{len(same)} test questions with the same words as a row; ", end="")
    print("suggested duplicates beyond:\n")
    closest: dict[str, build_dataset.Row] = {}  # of each question: most similar pairs come first
    for pair in others:
        if pair["test_id"] not in same:
            closest.setdefault(pair["test_id"], pair)
    for test_id, pair in sorted(closest.items()):
        print(f"- {test_id} ({pair['cosine']:.3f}): {pair['why']}")


# --- classes --------------------------------------------------------------------------------------


def make_rarity(rows: list[build_dataset.Row], questions: Questions) -> check_contamination.Rarity:
    """Return how rare words are in all texts that step 2 compares."""
    texts = []
    for row in rows:
        texts += check_contamination.row_views(row)
    for question in questions:
        texts += check_contamination.question_views(question)
    return check_contamination.Rarity(texts)


def print_confusion(name: str, counts: Counter[tuple[str, str]]) -> None:
    """Print how many pairs have each label and each suggested class."""
    verdicts = check_contamination.VERDICTS
    right = 0
    table = []
    for label in verdicts:
        right += counts[label, label]
        cells = [counts[label, verdict] for verdict in verdicts]
        table.append([label, *cells])
    pairs = counts.total()
    print(f"\n{name}: {right} of {pairs} agree ({right / pairs:.3f})\n")
    print_markdown(["label \\ suggested", *verdicts], table)


def print_classes(local: Path, embedder: build_dataset.Embedder) -> None:
    """Print the suggested classes on the labelled pairs, by half."""
    labels = {}
    agree = 0
    for line in read_lines(DATA / "labels.jsonl"):
        labels[line["pair_id"]] = line["label"]
        first, second = line["passes"]
        if first == second:
            agree += 1
    print(f"\nlabelled twice: {agree} of {len(labels)} pairs alike ({agree / len(labels):.3f})")

    rows = {row["id"]: row for row in source_rows(local, LABELLED_SOURCES)}
    questions = {question.test_id: question for question in all_test_questions(local)}
    rarity = make_rarity(list(rows.values()), list(questions.values()))
    for name, digits in HALVES.items():
        pairs = []
        labels_of_half = []
        for ids in read_lines(DATA / "label_ids.jsonl"):
            pair_id = ids["pair_id"]
            if pair_id[0] in digits:
                row = rows[ids["train_id"]]
                question = questions[ids["test_id"]]
                same = check_contamination.describe_pair(row, question, cosine=0.0, view="")
                assert same["pair_id"] == pair_id  # no text has changed since it was labelled
                pairs.append((row, question))
                labels_of_half.append(labels[pair_id])
        found = check_contamination.suggest(pairs, embedder, rarity)
        counts: Counter[tuple[str, str]] = Counter()
        for label, (suggested, _) in zip(labels_of_half, found, strict=True):
            counts[label, suggested] += 1
        print_confusion(name, counts)


# --- memory ---------------------------------------------------------------------------------------


class RandomEmbedder:
    """Gives random unit vectors in files, as build_dataset.Embedder does with real ones."""

    scratch = build_dataset.Embedder.scratch

    def __init__(self, folder: Path) -> None:
        self.cache_folder = folder  # of scratch()'s files

    def __call__(self, texts: list[str]) -> np.ndarray:
        """Return [texts, WIDTH] in float32, a thousand rows from a seed."""
        vectors = self.scratch((len(texts), WIDTH))
        first_seed = 1 if texts[0].startswith("row") else 0  # both sides' vectors differ
        for start in range(0, len(texts), 1000):
            block = vectors[start : start + 1000]
            rng = np.random.default_rng(first_seed + start)
            drawn = rng.normal(size=block.shape)
            block[:] = drawn / np.linalg.norm(drawn, axis=1, keepdims=True)
        return vectors


def numbered_texts(name: str, count: int) -> dict[str, list[Any]]:
    """Return different texts as step 2 compares them, with nobody who has them."""
    return {f"{name} {number}": [] for number in range(count)}


def compare_random(rows: int) -> None:
    """Print the peak memory in MB of comparing random unit vectors with COMPARED others; Linux."""
    ours = numbered_texts("row", rows)
    theirs = numbered_texts("question", COMPARED)
    with tempfile.TemporaryDirectory() as folder:
        found = check_contamination.detections(
            ours, theirs, RandomEmbedder(Path(folder)), lowest=check_contamination.CANDIDATE
        )
        assert not list(found)
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    kibibytes = int(re.search(r"VmHWM:\s+(\d+) kB", status)[1])
    print(kibibytes * 1024 // 10**6)


def print_memory(local: Path, embedder: build_dataset.Embedder) -> None:
    """Print peak memory by the number of pairs compared, each in a process of its own."""
    table = []
    for rows in (5_000, 20_000, 80_000):
        command = [sys.executable, __file__, "--compare-random", str(rows)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        peak = int(done.stdout.split()[-1])
        files = (rows + COMPARED) * WIDTH * 4 // 10**6
        table.append([rows, f"{rows * COMPARED / 1e9:.2f}", peak, files])
    print(f"\nComparing with {COMPARED:,} vectors of {WIDTH} numbers; MB = 10^6 bytes\n")
    headers = ["rows", "pairs compared (10^9)", "peak MB", "of these the vectors' files"]
    print_markdown(headers, table)


PARTS: dict[str, Callable[[Path, build_dataset.Embedder], None]] = {
    "detection": print_detection,
    "fidelity": print_fidelity,
    "duplicates": print_duplicates,
    "classes": print_classes,
    "memory": print_memory,
}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--local", type=Path, default=Path("raw"), help="default: %(default)s")
    parser.add_argument(
        "--cache", type=Path, default=build_dataset.CACHE, help="default: %(default)s"
    )
    parser.add_argument("--only", choices=PARTS, action="append", help="default: all five")
    parser.add_argument("--compare-random", type=int, help=argparse.SUPPRESS)  # see print_memory()
    return parser.parse_args(argv)


def main() -> None:
    """Print the five tables, or those asked for; or, as a child, a peak of memory."""
    args = parse_args()
    if args.compare_random:
        compare_random(args.compare_random)
        return
    embedder = build_dataset.Embedder(build_dataset.EMBEDDING_MODEL, args.cache)
    for name in args.only or PARTS:
        PARTS[name](args.local, embedder)


if __name__ == "__main__":
    build_dataset.run_main(main)

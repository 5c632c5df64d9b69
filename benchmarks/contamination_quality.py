"""How well step 2 finds leaks, beside n-grams and one cosine; and how well it names their class.

1. Recall on rephrased benchmark questions (each row paired with its own original), and false flags
   per 1,000 rows of SciBench and TheoremQA against MMLU. A flag is false where none of the row's
   pairs fits one of the paper's three classes. The verdicts on all pairs that ours, an n-gram or a
   cosine of 0.65 flags, read one by one, are in tests/data/scibench_theoremqa_verdicts.jsonl; pairs
   that only a lower cosine flags were not judged and count as false ("at most").
2. MATH's training split against five MMLU subjects as published: the pairs of --paper, and what the
   published loop (each test question's nearest row only) would remove.
3. MATH's training split against all four benchmarks: the duplicates, by how they were found.
4. Suggested classes against 360 labelled pairs: confusion matrices of the half on which the rules
   were written (first digit of the pair id even) and of the other.
5. Peak memory of the comparison by the number of random vectors that are compared with 50,000.

--local DIR holds sources and benchmarks as in step 2, and rephrased/: pairs of files whose lines
belong together. About 20 minutes on 2 cores with an empty cache, then 3.

    python benchmarks/contamination_quality.py --local raw
"""

import argparse
import csv
import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "tests/data"
sys.path.append(str(ROOT))

import build_dataset as build  # noqa: E402
import check_contamination as check  # noqa: E402

COSINES = (0.5, 0.6, 0.7, 0.8, 0.9)
SOURCES = "math,scienceqa,scibench,reclor,theoremqa,openbookqa,guanaco"
PAPER_SUBJECTS = (
    "abstract_algebra",
    "college_mathematics",
    "elementary_mathematics",
    "high_school_mathematics",
    "high_school_statistics",
)
Flags = set[tuple[str, str]]  # (train_id, test_id)


def lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a .jsonl file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def source_rows(local: Path, sources: str) -> list[dict[str, Any]]:
    """The rows of sources as step 1 converts them, test splits too, without de-duplication."""
    flags = ["--local", str(local), "--sources", sources, "--include-test-splits"]
    args = build.parse_args(flags)
    rows = [row for name in sources.split(",") for row in build.read_source(name, args)[0]]
    build.add_ids(rows)
    return rows


def test_questions(local: Path, *benchmarks: str) -> list[check.Question]:
    """All test questions of the benchmarks."""
    return check.load_questions(
        check.parse_args(["--local", str(local), "--benchmarks", ",".join(benchmarks)])
    )


def rephrased_sets(local: Path) -> dict[str, tuple[list[Any], list[check.Question], Flags]]:
    """Name -> (rows, test questions, the true pairs). Empty rephrasings are left out."""
    folder = local / "rephrased"

    def row(number: int, text: str) -> dict[str, Any]:
        question, _, answer = text.removeprefix("Question: ").partition("\nAnswer:")
        return {"id": str(number), "instruction": question, "input": "", "output": answer.strip()}

    mmlu = test_questions(local, "mmlu")
    algebra = [q for q in mmlu if q.test_id.startswith("mmlu/abstract_algebra/")]
    with (folder / "abstract_algebra_test.csv").open(newline="", encoding="utf-8") as file:
        assert [r[0] for r in csv.reader(file)] == [q.text for q in algebra]
    texts = lines(folder / "abstract_algebra_test_rephrase_english_filtered_question.jsonl")
    first = [(n, t["text"]) for n, t in enumerate(texts) if t["text"].strip()]
    gsm8k = [
        check.Question(f"gsm8k/all/{n}", line["question"], [], line["answer"])
        for n, line in enumerate(lines(folder / "gsm8k_test_for_rephrase_gsm8k.jsonl"))
    ]
    second = [(n, t["text"]) for n, t in enumerate(lines(folder / "rephrase_gsm8k.jsonl"))]
    return {
        name: ([row(*text) for text in texts], tests, {(str(n), own[n].test_id) for n, _ in texts})
        for name, texts, tests, own in (
            ("abstract algebra", first, mmlu, algebra),
            ("GSM8K", second, gsm8k, gsm8k),
        )
    }


def n_grams(rows: list[Any], questions: list[check.Question], n: int) -> Flags:
    """Pairs that share n words in a row."""

    def grams(text: str) -> set[tuple[str, ...]]:
        words = re.findall(r"\w+", text.lower())
        return {tuple(words[i : i + n]) for i in range(len(words) - n + 1)}

    known: dict[tuple[str, ...], list[str]] = {}
    for question in questions:
        for gram in grams(question.text):
            known.setdefault(gram, []).append(question.test_id)
    return {
        (row["id"], test)
        for row in rows
        for gram in grams(build.question_of(row))
        for test in known.get(gram, ())
    }


def one_cosine(
    rows: list[Any], questions: list[check.Question], embedder: build.Embedder, threshold: float
) -> Flags:
    """Pairs whose whole texts have this cosine."""
    a, b = embedder([build.question_of(r) for r in rows]), embedder([q.text for q in questions])
    return {
        (rows[i]["id"], questions[j].test_id)
        for left, right, _ in build.similar_pairs(a, b, threshold)
        for i, j in zip(left.tolist(), right.tolist(), strict=True)
    }


def ours(rows: list[Any], questions: list[check.Question], embedder: build.Embedder) -> Flags:
    """Pairs that step 2 lists."""
    pairs = check.find_pairs(rows, questions, embedder, check.COSINE_THRESHOLD, False)
    return {(pair["train_id"], pair["test_id"]) for pair in pairs}


def detection(local: Path, embedder: build.Embedder) -> None:
    """Recall and false flags of every method."""
    sets = rephrased_sets(local)
    rows, mmlu = source_rows(local, "scibench,theoremqa"), test_questions(local, "mmlu")
    judged = {
        (line["train_id"], line["test_id"]): line["verdict"]
        for line in lines(DATA / "scibench_theoremqa_verdicts.jsonl")
    }
    leaks = {row for (row, _), verdict in judged.items() if verdict != "not-a-leak"}
    methods = {"10-gram": lambda r, q: n_grams(r, q, 10), "13-gram": lambda r, q: n_grams(r, q, 13)}
    for x in COSINES:
        methods[f"cosine {x}"] = lambda r, q, x=x: one_cosine(r, q, embedder, x)
    methods["ours"] = lambda r, q: ours(r, q, embedder)
    table = []
    for name, method in methods.items():
        found = [len(method(r, q) & truth) for r, q, truth in sets.values()]
        flags = method(rows, mmlu)
        flagged = {row for row, _ in flags}
        unknown = flags - judged.keys()
        false = len({row for row in flagged if row not in leaks}) * 1000 / len(rows)
        per = len(flagged) * 1000 / len(rows)
        table.append([name, *found, f"{per:.1f}", f"{'at most ' * bool(unknown)}{false:.1f}"])
    heads = [f"{name}: found of {len(truth):,}" for name, (_, _, truth) in sets.items()]
    print(f"{len(rows):,} rows of SciBench and TheoremQA x {len(mmlu):,} questions of MMLU\n")
    print(check.markdown_table(["method", *heads, "flagged / 1,000", "false / 1,000"], table))


def fidelity(local: Path, embedder: build.Embedder) -> None:
    """The published format: ours, and the published nearest-only loop."""
    rows = [r for r in source_rows(local, "math") if r["origin"].startswith("math_train")]
    tests = [q for q in test_questions(local, "mmlu") if q.test_id.split("/")[1] in PAPER_SUBJECTS]
    pairs = check.find_pairs(rows, tests, embedder, 0.8, True)
    a = embedder([build.question_of(row) for row in rows])
    b = embedder([build.lettered(q.text, q.choices) for q in tests])
    cosines = b @ a.T
    nearest = np.where(cosines.max(axis=1) >= 0.8, cosines.argmax(axis=1), -1)
    questions, removed = (len({p[key] for p in pairs}) for key in ("test_id", "train_id"))
    table = [
        ["ours, --paper", questions, removed],
        [
            "published loop: nearest row only",
            int((nearest >= 0).sum()),
            len({*nearest.tolist()} - {-1}),
        ],
    ]
    print(f"\nMATH train ({len(rows):,}) x {len(tests):,} questions of five MMLU subjects\n")
    print(check.markdown_table(["method", "test questions flagged", "rows removed"], table))


def duplicates(local: Path, embedder: build.Embedder) -> None:
    """MATH's training split against everything: the same words, and suggested duplicates."""
    rows = [r for r in source_rows(local, "math") if r["origin"].startswith("math_train")]
    tests = test_questions(local, *check.HUB)
    pairs = check.find_pairs(rows, tests, embedder, check.COSINE_THRESHOLD, False)
    chosen = [pair for pair in pairs if pair["suggested"] == "duplicate"]
    same = {pair["test_id"] for pair in chosen if pair["why"] == "same words"}
    classes = Counter(pair["suggested"] for pair in pairs)
    print(f"\nMATH train ({len(rows):,}) x {len(tests):,} test questions: {len(pairs):,} pairs,")
    print(f"{', '.join(f'{classes[name]} {name}' for name in check.VERDICTS)}")
    print(
        f"{len(same)} test questions with the same words as a row; suggested duplicates beyond:\n"
    )
    best: dict[str, Any] = {}
    for pair in chosen:
        if pair["test_id"] not in same:
            best.setdefault(pair["test_id"], pair)
    for test, pair in sorted(best.items()):
        print(f"- {test} ({pair['cosine']:.3f}): {pair['why']}")


def classes(local: Path, embedder: build.Embedder) -> None:
    """Confusion matrices of the suggested classes on the labelled pairs, by half."""
    labels = {line["pair_id"]: line for line in lines(DATA / "labels.jsonl")}
    rows = {row["id"]: row for row in source_rows(local, SOURCES)}
    tests = {q.test_id: q for q in test_questions(local, *check.HUB)}
    texts = [text for row in rows.values() for text in check.row_views(row)]
    rarity = check.Rarity(texts + [t for q in tests.values() for t in check.question_views(q)])
    passes = [label["passes"] for label in labels.values()]
    agree = sum(len(set(labels)) == 1 for labels in passes)
    print(f"\nlabelled twice: {agree} of {len(passes)} pairs alike ({agree / len(passes):.3f})")
    for name, digits in (("rules written on it", "02468ace"), ("not looked at", "13579bdf")):
        ids = [i for i in lines(DATA / "label_ids.jsonl") if i["pair_id"][0] in digits]
        pairs = [(rows[i["train_id"]], tests[i["test_id"]]) for i in ids]
        for i, pair in zip(ids, pairs, strict=True):
            assert check.describe_pair(*pair, 0.0, "")["pair_id"] == i["pair_id"]
        found = check.suggest(pairs, embedder, rarity)
        counts = Counter(
            (labels[i["pair_id"]]["label"], kind) for i, (kind, _) in zip(ids, found, strict=True)
        )
        right = sum(counts[kind, kind] for kind in check.VERDICTS)
        print(f"\n{name}: {right} of {len(ids)} agree ({right / len(ids):.3f})\n")
        table = [
            [kind, *(counts[kind, other] for other in check.VERDICTS)] for kind in check.VERDICTS
        ]
        print(check.markdown_table(["label \\ suggested", *check.VERDICTS], table))


def compare_random(rows: int) -> None:
    """Print the peak memory in MB of comparing `rows` random unit vectors with 50,000 others."""

    class Random:
        """An embedder of random vectors, in files as the real one's."""

        scratch, cache_folder = build.Embedder.scratch, Path(tempfile.mkdtemp())

        def __call__(self, texts: list[str]) -> np.ndarray:
            vectors = self.scratch((len(texts), 384))
            for start in range(0, len(texts), 1000):
                seed = start + int(texts[0].startswith("a"))  # both sides' vectors differ
                part = np.random.default_rng(seed).normal(size=vectors[start : start + 1000].shape)
                vectors[start : start + 1000] = part / np.linalg.norm(part, axis=1, keepdims=True)
            return vectors

    ours, theirs = (
        {f"{side}{n}": [] for n in range(k)} for side, k in (("a", rows), ("b", 50_000))
    )
    assert not list(check.detections(ours, theirs, Random(), check.CANDIDATE))
    Random.cache_folder.rmdir()
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    print(int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024 // 10**6)


def memory(local: Path, embedder: build.Embedder) -> None:
    """Peak memory by the number of pairs compared, each in a process of its own; Linux."""
    table = []
    for rows in (5_000, 20_000, 80_000):
        command = [sys.executable, __file__, "--compare-random", str(rows)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        vectors = (rows + 50_000) * 384 * 4 // 10**6
        table.append([rows, f"{rows * 50_000 / 1e9:.2f}", int(done.stdout.split()[-1]), vectors])
    print("\nComparing with 50,000 vectors of 384 numbers; MB = 10^6 bytes\n")
    heads = ["rows", "pairs compared (10^9)", "peak MB", "of these the vectors' files"]
    print(check.markdown_table(heads, table))


def main() -> None:
    """Print the five tables, or those asked for."""
    parts = {f.__name__: f for f in (detection, fidelity, duplicates, classes, memory)}
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--local", type=Path, default=Path("raw"), help="default: %(default)s")
    parser.add_argument("--cache", type=Path, default=build.CACHE, help="default: %(default)s")
    parser.add_argument("--only", choices=parts, action="append", help="default: all five")
    parser.add_argument("--compare-random", type=int, help=argparse.SUPPRESS)  # see memory()
    args = parser.parse_args()
    if args.compare_random:
        return compare_random(args.compare_random)
    embedder = build.Embedder(build.EMBEDDING_MODEL, args.cache)
    for name in args.only or parts:
        parts[name](args.local, embedder)


if __name__ == "__main__":
    build.run_main(main)

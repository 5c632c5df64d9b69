"""Find training questions that leak benchmark questions, and write the set without them.

Step 2 of 5 (paper, section 2.3). Reads out/dataset/dataset.jsonl and the benchmarks' test
questions (--local DIR/<benchmark>/ or the hub); writes out/contamination/: pairs.jsonl, run.json,
and by `apply`: clean.jsonl, removed.jsonl, table.md, apply.json.

    python check_contamination.py --dataset out/try/dataset.jsonl --local demo/data --out out/check
    python check_contamination.py
    python check_contamination.py apply

Every pair of a training and a test question with a cosine of at least 0.8 is listed, not the
nearest one only. All flagged rows leave the clean set, as in the paper; a person's verdicts in
decisions.jsonl (`python tui.py`) bring false alarms back when `apply` is run again. Time: the
embedding of 26,000 test questions, 8 minutes on one CPU core the first time and seconds after.
It compares questions only: an answer alone that leaks is not seen.
"""

import argparse
import csv
import difflib
import fcntl
import hashlib
import json
import os
import re
import time
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any, NamedTuple

from build_dataset import (
    CACHE,
    COSINE_THRESHOLD,
    EMBEDDING_MODEL,
    UNFINISHED,
    Embedder,
    Row,
    UserError,
    check_output,
    finish_run,
    hub_fault,
    lettered,
    make_parser,
    output_folder,
    question_of,
    read_records,
    refuse,
    run_main,
    sha256_of,
    similar_pairs,
    to_jsonl,
    write_file,
)

VERDICTS = ("duplicate", "gray-area", "similar-but-different", "not-a-leak")  # paper, section 2.3
SHOTS = 300  # rows of a HellaSwag file that are few-shot examples, or half of a smaller file
HUB = {  # id, configuration, few-shot split, scored split: as in the harness's task files
    "arc": ("allenai/ai2_arc", "ARC-Challenge", "train", "test"),
    "hellaswag": ("Rowan/hellaswag", None, "train", "validation"),
    "mmlu": ("cais/mmlu", "all", "dev", "test"),
    "truthfulqa": ("truthfulqa/truthful_qa", "multiple_choice", None, "validation"),
}
PAPER_LEAKS = {  # Table 1: leaked questions per source; the rest 0
    "prm800k": 77,
    "math": 77,  # the questions of PRM800K are MATH's
    "airoboros": 13,
    "guanaco": 13,
    "openbookqa": 6,
}


class Subject(NamedTuple):
    """One benchmark subject ("all" where there is one) in the hub's columns."""

    benchmark: str
    subject: str
    shots: list[Row]
    scored: list[Row]


class Question(NamedTuple):
    """A test question; `test_id` is benchmark/subject/row of the scored split."""

    test_id: str
    text: str
    choices: list[str]
    answer: str


# --- shared by steps 2 to 5: input that an earlier step wrote -------------------------------------


def check_input(path: Path, mend: str) -> Path:
    """Return `path` if it exists and no unfinished step left it; `mend` says how to get it."""
    if not path.exists():
        raise UserError(f"{path} is missing: {mend}")
    mark = (path if path.is_dir() else path.parent) / UNFINISHED
    if mark.exists():
        raise UserError(f"{mark.parent} is unfinished: finish it with {mark.read_text().strip()}")
    return path


def read_jsonl(path: Path, fields: dict[str, type]) -> list[Row]:
    """Read a .jsonl or .json file whose objects all have `fields` of these types."""
    rows = []
    for place, row, error in read_records(path):
        if error or not isinstance(row, dict):
            raise UserError(
                f"{path.parent / place} is not a JSON object: {error or repr(row)[:60]}"
            )
        for name, kind in fields.items():
            if not isinstance(row.get(name), kind):
                raise UserError(f"{path.parent / place} has no {name!r} of type {kind.__name__}")
        rows.append(row)
    return rows


def markdown_table(headers: list[str], rows: list[list[Any]]) -> str:
    """A Markdown table, aligned in a terminal too: the first column left, the others right."""
    from tabulate import tabulate

    cells = [[f"{cell:,}" if isinstance(cell, int) else cell for cell in row] for row in rows]
    sides = ["left", *["right"] * (len(headers) - 1)]
    return tabulate(cells, headers, "pipe", colalign=sides, disable_numparse=True)


# --- shared with step 5 and the terminal UI: benchmarks, verdicts ---------------------------------


def load_benchmark(name: str, local: Path | None, official: bool = False) -> list[Subject]:
    """Few-shot and scored rows of a benchmark in the hub's columns, from --local or the hub.

    `official`: HellaSwag from its official layout, which evaluation needs, even where the whole
    validation split is there as plain text. Raises UserError for a missing file or column.
    """
    folder = local / name if local else None
    if folder and folder.is_dir():
        try:
            return LOCAL[name](folder, official)
        except KeyError as error:
            raise UserError(f"{folder} has a row without column {error}") from None
    from datasets import load_dataset

    path, config, shots, scored = HUB[name]
    try:
        splits = load_dataset(path, config)
    except Exception as error:
        mend = f"put its files in DIR/{name}/ and give --local DIR"
        raise UserError(f"benchmark {name}: {hub_fault(path, error)}, or {mend}") from None
    groups: dict[str, Subject] = {}
    for index, split in enumerate((shots, scored)):
        for row in splits[split] if split else ():
            subject = row["subject"] if name == "mmlu" else "all"
            groups.setdefault(subject, Subject(name, subject, [], []))[2 + index].append(row)
    return [groups[subject] for subject in sorted(groups)]


def local_arc(folder: Path, official: bool) -> list[Subject]:
    """ARC-Challenge-{train,test}.jsonl; a few training rows have no id, which nothing needs."""
    fields = {"question": str, "choices": dict, "answerKey": str}
    files = [folder / f"ARC-Challenge-{split}.jsonl" for split in ("train", "test")]
    return [Subject("arc", "all", *(read_jsonl(need(file), fields) for file in files))]


def local_hellaswag(folder: Path, official: bool) -> list[Subject]:
    """The whole validation split as plain text if there, else the official layout's later rows."""
    plain, layout = folder / "hellaswag_val.jsonl", folder / "hellaswag_1000_original_format.jsonl"
    fields = {"ctx": str, "endings": list, "label": int}
    if plain.exists() and not official:
        return [Subject("hellaswag", "all", [], read_jsonl(plain, fields))]
    rows = read_jsonl(need(layout), {**fields, "ctx_a": str, "ctx_b": str})
    if plain.exists():  # step 2 checks those rows, so a question's number is its place there

        def letters(row: Row) -> str:
            return re.sub(r"\[.*?\]|\W", "", row["ctx"]).lower()

        numbers = {letters(row): n for n, row in enumerate(read_jsonl(plain, fields))}
        for row in rows:
            row["test_row"] = numbers.get(letters(row), -1)
    shots = min(SHOTS, len(rows) // 2)
    return [Subject("hellaswag", "all", rows[:shots], rows[shots:])]


def local_mmlu(folder: Path, official: bool) -> list[Subject]:
    """{dev,test}/<subject>_{dev,test}.csv: question, four choices, letter; "None" is text."""

    def read(path: Path, subject: str) -> list[Row]:
        with need(path).open(newline="", encoding="utf-8") as file:
            rows = list(csv.reader(file))
        for line, row in enumerate(rows, 1):
            if len(row) != 6 or row[5] not in ("A", "B", "C", "D"):
                raise UserError(f"{path}: row {line} is not question, 4 choices, letter A to D")
        return [
            {
                "question": row[0],
                "subject": subject,
                "choices": row[1:5],
                "answer": "ABCD".index(row[5]),
            }
            for row in rows
        ]

    subjects = sorted(
        p.name.removesuffix("_test.csv") for p in (folder / "test").glob("*_test.csv")
    )
    if not subjects:
        raise UserError(f"{folder}/test has no <subject>_test.csv")
    return [
        Subject(
            "mmlu",
            s,
            read(folder / "dev" / f"{s}_dev.csv", s),
            read(folder / "test" / f"{s}_test.csv", s),
        )
        for s in subjects
    ]


def local_truthfulqa(folder: Path, official: bool) -> list[Subject]:
    """mc_task.json, its {answer: 0 or 1} turned into the hub's {choices, labels}."""
    rows = read_jsonl(
        need(folder / "mc_task.json"), {"question": str, "mc1_targets": dict, "mc2_targets": dict}
    )
    for row in rows:
        for key in ("mc1_targets", "mc2_targets"):
            row[key] = {"choices": list(row[key]), "labels": list(row[key].values())}
    return [Subject("truthfulqa", "all", [], rows)]


def need(path: Path) -> Path:
    """The path of a benchmark file, which must exist."""
    return check_input(path, "a benchmark's file, in the layout that README.md describes")


LOCAL = {
    "arc": local_arc,
    "hellaswag": local_hellaswag,
    "mmlu": local_mmlu,
    "truthfulqa": local_truthfulqa,
}


def questions_of(subject: Subject) -> list[Question]:
    """The scored rows of a subject as questions with choices and the right answer's text."""
    questions = []
    for index, row in enumerate(subject.scored):
        test_id = f"{subject.benchmark}/{subject.subject}/{index}"
        if subject.benchmark == "arc":
            choices = row["choices"]["text"]
            answer = choices[row["choices"]["label"].index(row["answerKey"])]
        elif subject.benchmark == "truthfulqa":
            choices = row["mc1_targets"]["choices"]
            answer = choices[row["mc1_targets"]["labels"].index(1)]
        else:  # HellaSwag and MMLU; --extra-benchmark: the index of the right choice, or its text
            choices = row.get("endings") or row.get("choices") or []
            answer = row["label"] if "label" in row else row["answer"]
            if choices and answer not in choices and str(answer).isdigit():
                answer = choices[int(answer)]
            answer = str(answer)
        questions.append(Question(test_id, row.get("question") or row["ctx"], choices, answer))
    return questions


def read_decisions(path: Path) -> dict[str, Row]:
    """The last verdict of each pair; a line that a crash cut short is none, null withdraws."""
    decisions = {}
    for _, line, _ in read_records(path) if path.exists() else ():
        known = isinstance(line, dict) and line.get("verdict", "") in (None, *VERDICTS)
        if known and isinstance(line.get("pair_id"), str):
            decisions[line["pair_id"]] = line
    return {pair_id: line for pair_id, line in decisions.items() if line["verdict"]}


def append_decision(
    path: Path, pair_id: str, verdict: str | None, reviewer: str, note: str = ""
) -> None:
    """Add one verdict to the log, None to withdraw; on the disk at return. Safe for two at once."""
    assert verdict in (None, *VERDICTS), verdict
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    line = {"pair_id": pair_id, "verdict": verdict, "reviewer": reviewer, "time": now, "note": note}
    with path.open("ab+") as log:
        fcntl.flock(log, fcntl.LOCK_EX)
        if log.tell():
            log.seek(-1, os.SEEK_END)
            if log.read(1) != b"\n":  # a crash cut the last line short: start a new one
                log.write(b"\n")
        log.write(to_jsonl([line]).encode())
        log.flush()
        os.fsync(log.fileno())


# --- step 2 ---------------------------------------------------------------------------------------


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags of this step; every impossible setting is named at once."""
    parser = make_parser(__doc__, "out/contamination")
    what = "check: find pairs, then apply (default); apply: write the clean set from the verdicts"
    parser.add_argument(
        "command", nargs="?", choices=("check", "apply"), default="check", help=what
    )
    add = parser.add_argument_group("data").add_argument
    dataset = Path("out/dataset/dataset.jsonl")
    add("--dataset", type=Path, default=dataset, metavar="FILE", help="default: %(default)s")
    add("--benchmarks", default=",".join(HUB), metavar="a,b", help="default: %(default)s")
    add("--local", type=Path, metavar="DIR", help="read DIR/<benchmark>/ (default: the hub)")
    extra = "rows of question, choices, answer to protect too (repeatable)"
    add("--extra-benchmark", action="append", default=[], metavar="NAME=FILE", help=extra)
    add = parser.add_argument_group("detection").add_argument
    threshold = "default and paper: %(default)s; pairs from this cosine up"
    add("--cosine-threshold", type=float, default=COSINE_THRESHOLD, metavar="X", help=threshold)
    paper = "compare test questions with their lettered choices, as published (default: without)"
    add("--paper", action=argparse.BooleanOptionalAction, default=False, help=paper)
    add("--embedding-model", default=EMBEDDING_MODEL, help="default and paper: %(default)s")
    add("--cache", type=Path, default=CACHE, help="of embeddings (default: %(default)s)")
    args = parser.parse_args(argv)
    args.benchmarks = [name for name in args.benchmarks.split(",") if name]
    args.extra_benchmark = dict(item.partition("=")[::2] for item in args.extra_benchmark)
    x = args.cosine_threshold
    unknown = [name for name in args.benchmarks if name not in HUB]
    missing = [file for file in args.extra_benchmark.values() if not Path(file).is_file()]
    refuse(
        {
            f"--benchmarks: {', '.join(unknown)} is none of {', '.join(HUB)}": unknown,
            f"--extra-benchmark: no such file: {', '.join(missing)}": missing,
            f"--local {args.local} is not a folder": args.local and not args.local.is_dir(),
            f"--cosine-threshold {x} is not above 0 and at most 1": not 0 < x <= 1,
        }
    )
    return args


def load_questions(args: argparse.Namespace) -> list[Question]:
    """The test questions of all benchmarks asked for."""
    subjects = [s for name in args.benchmarks for s in load_benchmark(name, args.local)]
    for name, file in args.extra_benchmark.items():
        rows = read_jsonl(Path(file), {"question": str})
        subjects.append(Subject(name, "all", [], [{"answer": "", **row} for row in rows]))
    questions = []
    for subject in subjects:
        try:
            found = questions_of(subject)[: args.limit]
        except (LookupError, TypeError, ValueError) as error:
            raise UserError(f"{subject.benchmark}/{subject.subject}: bad row: {error}") from None
        if not found:
            raise UserError(f"{subject.benchmark}/{subject.subject} has no questions")
        questions += found
    if not questions:
        raise UserError("no benchmark: name one with --benchmarks or --extra-benchmark")
    return questions


def words_of(text: str) -> list[str]:
    """Lower-cased words, numbers and symbols.

    >>> words_of("Find $x^2$, now!")
    ['find', 'x', '^', '2', 'now']
    """
    return re.findall(r"\w+|[^\w\s.,;:!?'\"$\\(){}\[\]]", text.lower())


def difference(a: str, b: str) -> str:
    """What differs between two questions, in words.

    >>> difference("Rotate about the x axis.", "Rotate about the y axis")
    'differs in 1 of 5 words: x -> y'
    """
    left, right = words_of(a), words_of(b)
    changes = [
        (
            " ".join(left[i1:i2]) or "(nothing)",
            " ".join(right[j1:j2]) or "(nothing)",
            max(i2 - i1, j2 - j1),
        )
        for tag, i1, i2, j1, j2 in difflib.SequenceMatcher(None, left, right, False).get_opcodes()
        if tag != "equal"
    ]
    if not changes:
        return "same words"
    count = sum(change[2] for change in changes)
    shown = "; ".join(f"{old} -> {new}" for old, new, _ in changes[:3])
    more = f"; and {len(changes) - 3} more" if len(changes) > 3 else ""
    return f"differs in {count} of {max(len(left), len(right))} words: {shown:.160}{more}"


def find_pairs(
    rows: list[Row], questions: list[Question], embedder: Embedder, threshold: float, paper: bool
) -> list[Row]:
    """Every pair of training row and test question with cosine >= threshold, most similar first.

    `paper`: the test question is compared with its lettered choices, as the published notebook did.
    """
    texts = [lettered(q.text, q.choices) if paper else q.text for q in questions]
    train, test = embedder([question_of(row) for row in rows]), embedder(texts)
    view = "question with choices" if paper else "question"
    pairs = []
    for i, j, cosine in similar_pairs(train, test, threshold):
        for row, question, value in zip(i.tolist(), j.tolist(), cosine.tolist(), strict=True):
            pairs.append(describe_pair(rows[row], questions[question], value, view))
    return sorted(pairs, key=lambda pair: (-pair["cosine"], pair["pair_id"]))


def describe_pair(row: Row, question: Question, cosine: float, view: str) -> Row:
    """One line of pairs.jsonl. Only equal words are suggested as a duplicate; all else is open."""
    benchmark, subject, _ = question.test_id.split("/")
    why = difference(question_of(row), question.text)
    return {
        "pair_id": hashlib.sha256(f"{row['id']} {question}".encode()).hexdigest()[:16],
        "train_id": row["id"],
        "source": row.get("source", ""),
        "benchmark": benchmark,
        "subject": subject,
        "test_id": question.test_id,
        "cosine": round(cosine, 6),
        "view": view,
        "detector": "cosine",
        "train_question": question_of(row),
        "train_answer": row["output"],
        "test_question": question.text,
        "test_choices": question.choices,
        "test_answer": question.answer,
        "suggested": "duplicate" if why == "same words" else None,
        "why": why,
    }


def check(args: argparse.Namespace, started: float) -> None:
    """Write pairs.jsonl and run.json."""
    check_output(args.out, args.overwrite, args.dataset)
    mend = "write it with: python build_dataset.py"
    fields = {"id": str, "instruction": str, "input": str, "output": str}
    rows = read_jsonl(check_input(args.dataset, mend), fields)
    repeated = [i for i, count in Counter(row["id"] for row in rows).items() if count > 1]
    if repeated or not rows:
        what = f"id {repeated[0]!r} stands on several lines" if repeated else "no rows"
        raise UserError(f"{args.dataset}: {what}")
    questions = load_questions(args)
    embedder = Embedder(args.embedding_model, args.cache, args.device)
    pairs = find_pairs(rows, questions, embedder, args.cosine_threshold, args.paper)
    with output_folder(args.out, args.overwrite):
        write_file(args.out / "pairs.jsonl", to_jsonl(pairs))
        benchmarks = Counter(q.test_id.rpartition("/")[0] for q in questions)
        counts = {"rows": len(rows), "pairs": len(pairs), "test_questions": benchmarks}
        extra = [Path(file) for file in args.extra_benchmark.values()]
        inputs = [args.dataset, *extra, *local_inputs(args)]
        finish_run(args, inputs, started, counts=counts, embedding=embedder.about)
        apply(args, time.monotonic())


def local_inputs(args: argparse.Namespace) -> list[Path]:
    """The benchmark files below --local, for run.json."""
    folders = [args.local / name for name in args.benchmarks] if args.local else []
    return sorted(p for folder in folders for p in folder.rglob("*") if p.is_file())


def apply(args: argparse.Namespace, started: float) -> None:
    """Write the clean set: every flagged row goes unless all its pairs were decided not-a-leak."""
    run = json.loads((args.out / "run.json").read_text(encoding="utf-8"))
    dataset = Path(run["settings"]["dataset"])
    rows = read_jsonl(check_input(dataset, "the data set that was checked"), {"id": str})
    if sha256_of(dataset) != run["inputs"][str(dataset)]["sha256"]:
        raise UserError(
            f"{dataset} changed since it was checked: python check_contamination.py --overwrite"
        )
    pairs = read_jsonl(args.out / "pairs.jsonl", {"pair_id": str, "train_id": str})
    log = args.out / "decisions.jsonl"
    decisions = read_decisions(log)
    flagged: dict[str, list[Row]] = defaultdict(list)
    for pair in pairs:
        verdict = decisions.get(pair["pair_id"], {}).get("verdict", "undecided")
        if verdict != "not-a-leak":
            flagged[pair["train_id"]].append({"pair_id": pair["pair_id"], "verdict": verdict})
    clean = [row for row in rows if row["id"] not in flagged]
    removed = [{**row, "because": flagged[row["id"]]} for row in rows if row["id"] in flagged]
    table = leak_tables(rows, pairs, decisions)
    undecided = sum(pair["pair_id"] not in decisions for pair in pairs)
    write_file(args.out / "clean.jsonl", to_jsonl(clean))
    write_file(args.out / "removed.jsonl", to_jsonl(removed))
    write_file(args.out / "table.md", table + "\n")
    counts = {"clean": len(clean), "removed": len(removed), "undecided_pairs": undecided}
    logged = {"decisions_sha256": sha256_of(log) if log.exists() else None}
    inputs = [dataset, args.out / "pairs.jsonl", args.out / "run.json"]
    finish_run(args, inputs, started, name="apply.json", counts=counts, **logged)
    print(table)
    print(f"\n{len(pairs):,} pairs, {undecided:,} undecided; to review: python tui.py {args.out}")
    print(
        f"wrote {args.out}/clean.jsonl: {len(clean):,} of {len(rows):,} rows. "
        f"Next: python finetune.py --data {args.out}/clean.jsonl"
    )


def leak_tables(rows: list[Row], pairs: list[Row], decisions: dict[str, Row]) -> str:
    """Two Markdown tables: per source beside the paper's Table 1, and per source x benchmark.

    Pairs; the rows and test questions in them; test questions with the very words of a row; pairs
    that were decided duplicate (what the paper counts as leaked questions); undecided pairs.
    """

    def line(chosen: list[Row]) -> list[int]:
        decided = [decisions.get(p["pair_id"], {}).get("verdict") for p in chosen]
        ids = [len({pair[key] for pair in chosen}) for key in ("train_id", "test_id")]
        same = len({pair["test_id"] for pair in chosen if pair["suggested"] == "duplicate"})
        return [len(chosen), *ids, same, decided.count("duplicate"), decided.count(None)]

    counts = Counter(row.get("source", "") for row in rows)
    groups: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for pair in pairs:
        groups[pair["source"], pair["benchmark"]].append(pair)
    found = ["pairs", "rows", "test questions", "same words", "duplicates", "undecided"]
    sources = [
        [s, counts[s], *line([p for p in pairs if p["source"] == s]), PAPER_LEAKS.get(s, 0)]
        for s in sorted(counts)
    ]
    crossed = [[f"{s} x {b}", *line(groups[s, b])] for s, b in sorted(groups)]
    return "\n\n".join(
        [
            markdown_table(["source", "of rows", *found, "paper's leaks"], sources),
            markdown_table(["source x benchmark", *found], crossed),
        ]
    )


def main(argv: list[str] | None = None) -> None:
    """Find pairs, then write the clean set; or only the latter."""
    started = time.monotonic()
    args = parse_args(argv)
    if args.command == "check":
        check(args, started)
        return
    if not (args.out / "run.json").exists():  # before the folder is touched
        raise UserError(f"{args.out} has no pairs yet; find them: python check_contamination.py")
    with output_folder(args.out, overwrite=True, keep_run=True):
        apply(args, started)


if __name__ == "__main__":
    run_main(main)

"""Find training questions that leak benchmark questions, and write the set without them.

Step 2 of 5 (paper, section 2.3). Reads out/dataset/dataset.jsonl and the benchmarks' test
questions (--local DIR/<benchmark>/ or the hub); writes out/contamination/: pairs.jsonl, run.json,
and by `apply`: clean.jsonl, removed.jsonl, table.md, apply.json.

    python check_contamination.py --dataset out/try/dataset.jsonl --local demo/data --out out/check
    python check_contamination.py
    python check_contamination.py apply
    python check_contamination.py --against partner.jsonl --out out/overlap

Every pair of a training and a test question is listed whose views (whole, without or with choices,
last paragraph, windows of long texts) have a cosine of at least 0.8, or from 0.6 where words and
numbers confirm it, or of which one holds the other word for word. Each has a suggested class, which
decides nothing: all flagged rows go until a person's verdicts (`python tui.py`) say not-a-leak and
`apply` is run again. Time: embedding 55,000 test texts, 15 minutes on one CPU core, then seconds.
It compares questions only: an answer alone that leaks is not seen.
"""

import argparse
import csv
import difflib
import functools
import hashlib
import itertools
import math
import re
import shlex
import time
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from build_dataset import (
    CACHE,
    COSINE_THRESHOLD,
    EMBEDDING_MODEL,
    Embedder,
    add_ids,
    lettered,
    question_of,
    similar_pairs,
)
from common import (
    REMOVED,
    VERDICTS,
    Row,
    UserError,
    check_input,
    check_listed,
    check_output,
    claim_output,
    describe_files,
    finish_run,
    first_line,
    hub_fault,
    make_parser,
    markdown_table,
    next_command,
    one_line,
    read_decisions,
    read_jsonl,
    read_run,
    refuse,
    removed_ids,
    run_main,
    sha256_of,
    to_jsonl,
    write_file,
)

SHOTS = 300  # rows of a HellaSwag file that are few-shot examples, or half of a smaller file
HUB = {  # id, configuration, few-shot split, scored split: as in the harness's task files
    "arc": ("allenai/ai2_arc", "ARC-Challenge", "train", "test"),
    "hellaswag": ("Rowan/hellaswag", None, "train", "validation"),
    "mmlu": ("cais/mmlu", "all", "dev", "test"),
    "truthfulqa": ("truthfulqa/truthful_qa", "multiple_choice", None, "validation"),
}
# Table 1: leaked questions per source, the rest 0; the questions of PRM800K are MATH's
PAPER_LEAKS = {"prm800k": 77, "math": 77, "airoboros": 13, "guanaco": 13, "openbookqa": 6}
PAIR = dict.fromkeys(("pair_id", "train_id", "source", "benchmark", "subject", "test_id"), str)
# Detection: measured by benchmarks/contamination_quality.py
CANDIDATE = 0.6  # from this cosine up the words of two texts may confirm that they are one question
CONFIRMED, CONFIRMED_WORDS = 1.0, 1.2  # cosine + share of the words, with and without numbers
GENERIC = 1.1  # unique words' worth that parts must share; "which of the following is true" has .8
WHOLE = ("question", "instruction", "question with choices")
LETTERED = re.compile(r"\n\s*\(?A[:.)]\s")  # where a training question's lettered choices begin
NAME = re.compile(r"(?<=\w[\s,;])[A-Z][a-z]+")  # proper names: capitals within a sentence
DIGITS = {word: str(n) for n, word in enumerate(
    "zero one two three four five six seven eight nine ten eleven twelve".split())}  # fmt: skip
# Suggestions: chosen on one half of 360 labelled pairs
WORDING, FACT, NEAR = 0.8, 0.75, 0.85  # cosines without and with answers; words in the same order
SHORT = 5  # words of an answer that is no solution
LONGEST = 1000  # words of a text of which differences are looked for
NEGATIONS = "not no never except without least cannot false incorrect".split()
LETTER = re.compile(r"(?:the answer is:?\s*)?\(?([A-Z])(?:[:.)]\s*(.*))?", re.IGNORECASE)
BOXED = re.compile(r"\\boxed\{((?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*)\}")
# The words of a text: LaTeX's layout, 1,000 and 1{,}000, x-axis, a bracket around one thing, ...
SIGNS = str.maketrans("\u2212\u2013\u2014\u2019", "---'")  # minus and dashes
LAYOUT = re.compile(r"\\(?:left|right|displaystyle|math\w\w|text\w*|[ !,;:])(?![a-z])")
FRAME = re.compile(r"\\(?:begin|end)\{[a-z]+\*?\}|&|(?s:\[asy\].*?\[/asy\])")  # and diagrams' code
THOUSANDS = re.compile(r"(?<=\d)(?:,|\{,\})(?:\\!)?(?=\d{3}(?!\d))")
FRACTION = re.compile(r"\\[dt]?frac\{(\w+)\}\{(\w+)\}")
GREEK = re.compile(r"(?<![^\W\d_])[α-ω](?![^\W\d_])")
HYPHEN = re.compile(r"(?<=[^\W\d_]{2})-(?=[^\W\d_])|(?<=[^\W\d_])-(?=[^\W\d_]{2})")
GROUP = re.compile(r"[({\[]\s*((?:[^\W\d_]+|\d+(?:\.\d+)?)(?:\s+[^\W\d_]+)*)\s*[)}\]]")
TOKEN = re.compile(r"\d+(?:\.\d+)?|[^\W\d_]+|_+|[^\w\s.,;:!?'\"$\\]")


# --- shared by steps 2 to 5: input that an earlier step wrote -------------------------------------


# --- shared with step 5 and the terminal UI: benchmarks, verdicts ---------------------------------


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
        if folder:
            why = f"{folder} is no folder, and the hub's {path} cannot be loaded"
            raise UserError(f"benchmark {name}: {why}: {first_line(error)}") from None
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
        try:
            with need(path).open(newline="", encoding="utf-8") as file:
                rows = list(csv.reader(file, strict=True))
        except (UnicodeDecodeError, csv.Error) as error:
            raise UserError(f"{path} is not a CSV file in UTF-8: {error}") from None
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
        questions.append(
            Question(test_id, row["question"] if "question" in row else row["ctx"], choices, answer)
        )
    return questions


def local_inputs(args: argparse.Namespace) -> list[Path]:
    """The benchmark files below --local, for run.json."""
    folders = [args.local / name for name in args.benchmarks] if args.local else []
    return sorted(p for folder in folders for p in folder.rglob("*") if p.is_file())


# --- step 2 ---------------------------------------------------------------------------------------


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags of this step; every impossible setting is named at once."""
    parser = make_parser(__doc__, "out/contamination")
    do = "check: find pairs, then apply (default); apply: write the clean set from the verdicts"
    parser.add_argument("command", nargs="?", choices=("check", "apply"), default="check", help=do)
    add = parser.add_argument_group("data").add_argument
    add("--dataset", type=Path, default="out/dataset/dataset.jsonl", help="default: %(default)s")
    add("--benchmarks", metavar="a,b", help=f"default: {','.join(HUB)}; none with --against")
    add("--local", type=Path, metavar="DIR", help="read DIR/<benchmark>/ (default: the hub)")
    extra = "rows of question, choices, answer to protect too (repeatable)"
    add("--extra-benchmark", action="append", default=[], metavar="NAME=FILE", help=extra)
    against = "another training set, in instruction, input, output: find what both have"
    add("--against", type=Path, metavar="FILE", help=against)
    add("--remove", default=",".join(REMOVED), metavar="a,b", help="verdicts that go (%(default)s)")
    add = parser.add_argument_group("detection").add_argument
    add("--cosine-threshold", type=float, default=COSINE_THRESHOLD, help="paper: %(default)s")
    add("--embedding-model", default=EMBEDDING_MODEL, help="default and paper: %(default)s")
    paper = "compare test questions with their lettered choices, as published (default: without)"
    add("--paper", action=argparse.BooleanOptionalAction, default=False, help=paper)
    add("--cache", type=Path, default=CACHE, help="of embeddings (default: %(default)s)")
    args = parser.parse_args(argv)
    default = "" if args.against else ",".join(HUB)
    wanted = default if args.benchmarks is None else args.benchmarks
    args.benchmarks, args.remove = list(filter(None, wanted.split(","))), args.remove.split(",")
    extra, x = [item.partition("=")[::2] for item in args.extra_benchmark], args.cosine_threshold
    args.extra_benchmark, names = dict(extra), [name for name, _ in extra]
    files = [file for file in (args.against, *args.extra_benchmark.values()) if file is not None]
    missing = [str(file) for file in files if not Path(file).is_file()]
    taken = [n for n in names if not n or n in HUB or "/" in n or names.count(n) > 1]
    unknown = [name for name in args.benchmarks if name not in HUB]
    classes = [name for name in args.remove if name not in (*VERDICTS, "undecided")]
    wrong = {
        f"--benchmarks: {', '.join(unknown)} is none of {', '.join(HUB)}": unknown,
        f"--extra-benchmark: {taken} cannot be names: known, given twice, or with a /": taken,
        f"no such file: {', '.join(missing)}": missing,
        "no benchmark: name one": not (args.benchmarks or extra or args.against),
        f"--remove: {', '.join(classes)} is none of {', '.join(VERDICTS)}, undecided": classes,
        f"--local {args.local} is not a folder": args.local and not args.local.is_dir(),
        f"--cosine-threshold {x} is not above 0 and at most 1": not 0 < x <= 1,
    }
    refuse([message for message, found in wrong.items() if found])
    return args


def load_questions(args: argparse.Namespace) -> list[Question]:
    """The test questions of all benchmarks asked for."""
    subjects = [s for name in args.benchmarks for s in load_benchmark(name, args.local)]
    for name, file in args.extra_benchmark.items():
        rows = read_jsonl(Path(file), {"question": str})
        subjects.append(Subject(name, "all", [], [{"answer": "", **row} for row in rows]))
    if args.against:
        rows = read_rows(args.against)
        rows = [{"question": question_of(row), "answer": row["output"]} for row in rows]
        subjects.append(Subject("against", args.against.stem, [], rows))
    questions = []
    for subject in subjects:
        try:
            found = questions_of(subject)[: args.limit]
            for q in found:
                "".join([q.text, q.answer] + q.choices)  # raises where one is no text
        except (LookupError, TypeError, ValueError) as error:
            raise UserError(f"{subject.benchmark}/{subject.subject}: bad row: {error}") from None
        if not found:
            raise UserError(f"{subject.benchmark}/{subject.subject} has no questions")
        questions += found
    return questions


# --- step 2: the words of a text ------------------------------------------------------------------


def words_of(text: str) -> list[str]:
    r"""Lower-cased words, numbers and symbols; of LaTeX what it says, not how it is set.

    >>> words_of("Find $x^{2}$, now!"), words_of("(x+1)/2")
    (['find', 'x', '^', '2', 'now'], ['(', 'x', '+', '1', ')', '/', '2'])
    """
    text = unicodedata.normalize("NFC", text).lower().translate(SIGNS)
    text = FRACTION.sub(r"\1/\2", LAYOUT.sub(" ", FRAME.sub(" ", THOUSANDS.sub("", text))))
    text = GREEK.sub(lambda letter: unicodedata.name(letter[0]).split()[-1].lower(), text)
    text = HYPHEN.sub(" ", text).replace("{", "(").replace("}", ")")
    while text != (text := GROUP.sub(r" \1 ", text)):  # brackets around one thing group nothing
        pass
    return TOKEN.findall(text)


@functools.lru_cache(maxsize=1 << 16)
def content_of(text: str) -> tuple[frozenset[str], Counter[str], frozenset[str]]:
    """Words cut to five letters, a crude stem ("produces", "production"); numbers; proper names."""
    cut = (DIGITS.get(word, word.removesuffix("s")[:5]) for word in words_of(text))
    words = [word for word in cut if word[:1].isalnum()]
    numbers = Counter(w for w in words if w[0].isdigit() and w not in "01")  # these are everywhere
    return frozenset(words), numbers, frozenset(NAME.findall(text))


class Rarity:
    """Weighs words by how few of `texts` have them: 1 for a word that is in one text only."""

    def __init__(self, texts: list[str]) -> None:
        self.counts = Counter(word for text in texts for word in content_of(text)[0])
        self.total = len(texts)

    def of(self, words: frozenset[str]) -> float:
        """The information in a set of words, in words that are in one text only."""
        parts = (math.log((self.total + 1) / (self.counts[word] + 0.5)) for word in words)
        return sum(parts) / math.log(self.total + 2)

    def confirms(self, a: str, b: str, cosine: float) -> bool:
        """Whether words and numbers say that two texts of a lower cosine are one question.

        The share of their information that is in both (Dice's coefficient) is added to the cosine.
        Two thirds of the numbers, half of the names must be in both; without numbers more words.
        """
        (words_a, numbers_a, names_a), (words_b, numbers_b, names_b) = content_of(a), content_of(b)
        shared, total = (numbers_a & numbers_b).total(), (numbers_a | numbers_b).total()
        both = self.of(words_a) + self.of(words_b)
        unnamed = 2 * len(names_a & names_b) < min(len(names_a), len(names_b))
        if 3 * shared < 2 * total or not both or unnamed:
            return False
        agreement = 2 * self.of(words_a & words_b) / both
        return cosine + agreement >= (CONFIRMED if shared else CONFIRMED_WORDS)


def contained(needles: list[str], haystacks: list[str]) -> Iterator[tuple[str, str]]:
    """Yield (needle, haystack) wherever a needle's words stand in a row in a haystack."""
    spaced = {text: f" {' '.join(words_of(text))} " for text in {*needles, *haystacks}}
    counts = Counter(word for text in spaced.values() for word in set(text.split()))
    anchors = defaultdict(list)  # a needle is looked for only where its rarest word is
    for needle in needles:
        if words := spaced[needle].split():
            anchors[min(words, key=lambda word: (counts[word], word))].append(needle)
    for text in haystacks:
        for word in set(spaced[text].split()) & anchors.keys():
            found = [needle for needle in anchors[word] if spaced[needle] in spaced[text]]
            yield from ((needle, text) for needle in found)


# --- step 2: pairs --------------------------------------------------------------------------------


def bare_of(row: Row) -> str:
    """A training question without its lettered choices."""
    return LETTERED.split(row["instruction"], maxsplit=1)[0].strip()


def row_views(row: Row) -> dict[str, str]:
    """A training row's texts that are compared -> their names, the most whole one of equals."""
    bare = bare_of(row)
    parts = [line.strip() for line in bare.splitlines() if line.strip()] or [bare]
    views = {parts[-1]: "stem", parts[0]: "opening", bare: "without choices"}
    return {**views, row["instruction"]: "instruction", question_of(row): "question"}


def question_views(question: Question) -> dict[str, str]:
    """A test question's texts that are compared -> their names."""
    parts = [line.strip() for line in question.text.splitlines() if line.strip()] or [""]
    choices = lettered(question.text, question.choices)
    return {parts[-1]: "stem", choices: "question with choices", question.text: "question"}


def gather(views: Iterable[dict[str, str]], embedder: Embedder | None) -> dict[str, list[Any]]:
    """Text -> [(place in `views`, its name)]; given an embedder also the windows of long texts."""
    owners = defaultdict(list)
    for place, named in enumerate(views):
        for text in filter(str.strip, named):
            owners[text].append((place, named[text]))
    whole = called(owners, "question")
    for text, windows in zip(whole, embedder.windows(whole) if embedder else (), strict=False):
        for window in windows if len(windows) > 1 else ():
            owners[window] += [(place, "window") for place, _ in owners[text]]
    return owners


def called(owners: dict[str, list[Any]], *names: str) -> list[str]:
    """The texts of gather() that have one of these names."""
    return [text for text, named in owners.items() if any(name in names for _, name in named)]


def detections(
    ours: dict[str, Any], theirs: dict[str, Any], embedder: Embedder, lowest: float
) -> Iterator[tuple[str, str, float, bool]]:
    """Yield (row's text, test's text, cosine, verbatim): from `lowest` up, or verbatim."""
    a, b = list(ours), list(theirs)
    left, right = embedder(a), embedder(b)
    for i, j, cosines in similar_pairs(left, right, lowest):
        for x, y, cosine in zip(i.tolist(), j.tolist(), cosines.tolist(), strict=True):
            yield a[x], b[y], cosine, False
    at_a, at_b = ({text: n for n, text in enumerate(texts)} for texts in (a, b))
    hits = contained(called(theirs, "question", "stem"), called(ours, "question"))
    back = contained(called(ours, "without choices", *WHOLE), called(theirs, "question"))
    for x, y in [*((x, y) for y, x in hits), *back]:
        yield x, y, float(left[at_a[x]] @ right[at_b[y]]), True


def find_pairs(
    rows: list[Row], questions: list[Question], embedder: Embedder, threshold: float, paper: bool
) -> list[Row]:
    """Every pair of training row and test question that a detector finds, most similar first.

    cosine: two views at `threshold` or more. cosine and words: CANDIDATE or more, and confirmed by
    Rarity.confirms(). verbatim: the words of one in the other. Parts of a text must share more than
    a generic stem. `paper`: cosine alone, whole rows x questions with choices, as published.
    """
    if paper:
        ours = gather([{question_of(row): "row"} for row in rows], None)
        theirs = gather([{lettered(q.text, q.choices): WHOLE[-1]} for q in questions], None)
    else:
        ours = gather(map(row_views, rows), embedder)
        theirs = gather(map(question_views, questions), embedder)
    rarity = Rarity([*ours, *theirs])
    lowest = threshold if paper else min(threshold, CANDIDATE)
    best: dict[tuple[int, int], tuple[Any, ...]] = {}
    for a, b, cosine, verbatim in detections(ours, theirs, embedder, lowest):
        if cosine < threshold and not verbatim and not rarity.confirms(a, b, cosine):
            continue
        by = "verbatim" if verbatim else "cosine" if cosine >= threshold else "cosine and words"
        generic = not paper and rarity.of(content_of(a)[0] & content_of(b)[0]) < GENERIC
        for (row, name), (question, view) in itertools.product(ours[a], theirs[b]):
            whole = paper or (name in WHOLE and view in WHOLE)
            part = "window" in (name, view) or (view == WHOLE[-1] and not whole)
            if by == "cosine and words" and part:  # long texts and choices share words by chance
                continue
            if not generic or (whole and not verbatim):
                named = view if name in ("question", "row") else f"{name} x {view}"
                found = (verbatim, cosine, whole, named, by)
                best[row, question] = max(best.get((row, question), (False,)), found)
    keys = [(rows[row], questions[question]) for row, question in best]
    suggested = suggest(keys, embedder, rarity)
    pairs = [
        describe_pair(*key, cosine, view, by, *guess)
        for key, (_, cosine, _, view, by), guess in zip(keys, best.values(), suggested, strict=True)
    ]
    return sorted(pairs, key=lambda pair: (-pair["cosine"], pair["pair_id"]))


def describe_pair(
    row: Row,
    question: Question,
    cosine: float,
    view: str,
    by: str = "",
    kind: str = "",
    why: str = "",
) -> Row:
    """One line of pairs.jsonl."""
    benchmark, subject, _ = question.test_id.split("/")
    return {
        "pair_id": hashlib.sha256(f"{row['id']} {question}".encode()).hexdigest()[:16],
        "train_id": row["id"],
        "source": row.get("source", ""),
        "benchmark": benchmark,
        "subject": subject,
        "test_id": question.test_id,
        "cosine": round(cosine, 6),
        "view": view,
        "detector": by,
        "train_question": question_of(row),
        "train_answer": row["output"],
        "test_question": question.text,
        "test_choices": question.choices,
        "test_answer": question.answer,
        "suggested": kind,
        "why": why,
    }


def difference(a: str, b: str) -> str:
    """What differs between two questions, in words.

    >>> difference("Rotate about the x-axis.", "Rotate about the y axis")
    'differs in 1 of 5 words: x -> y'
    """
    left, right = words_of(a), words_of(b)
    matcher = difflib.SequenceMatcher(None, left[:LONGEST], right[:LONGEST], False)
    changes = [
        (left[i:j], right[k:m]) for tag, i, j, k, m in matcher.get_opcodes() if tag != "equal"
    ]
    if not changes:
        return "same words"
    count = sum(max(map(len, change)) for change in changes)
    shown = "; ".join(
        " -> ".join(" ".join(words) or "(nothing)" for words in change) for change in changes[:3]
    )
    more = f"; and {len(changes) - 3} more" if len(changes) > 3 else ""
    return f"differs in {count} of {max(len(left), len(right))} words: {shown:.160}{more}"


def short_answer(text: str, question: str = "") -> str:
    r"""The end of a solution: a lettered choice's text, what \boxed{} holds, or the last line.

    >>> short_answer("The answer is B: wood"), short_answer("So $x=\\boxed{7}$."), short_answer("4")
    ('wood', '7', '4')
    """
    if letter := LETTER.fullmatch(text.strip()):
        choice = re.search(rf"^\s*\(?{letter[1]}[:.)]\s(.*)", question, re.MULTILINE)
        return choice[1] if choice else letter[2] or letter[1]
    found = BOXED.findall(text) or re.findall(r"####\s*(.+)", text) or text.strip().splitlines()
    return found[-1] if found else ""


def suggest(
    pairs: list[tuple[Row, Question]], embedder: Embedder, rarity: Rarity
) -> list[tuple[str, str]]:
    """The class that each pair seems to have, and why in one line; never a decision."""
    texts = []
    for row, question in pairs:
        bare, own = bare_of(row), short_answer(row["output"], row["instruction"])
        stem, told = next(iter(question_views(question))), f"{question.text} {question.answer}"
        said = f"{bare} {own}".strip()
        texts += [(bare, question.text), (bare, stem), (said, told)]
        texts += [(f"{said} {row['input']}".strip(), told), (own, short_answer(question.answer))]
    left, right = (embedder([pair[side] for pair in texts]) for side in (0, 1))
    cosines = (left * right).sum(axis=1).reshape(-1, 5).tolist()
    return [
        classify(*pair, max(a, b), max(c, d), e, rarity)
        for pair, (a, b, c, d, e) in zip(pairs, cosines, strict=True)
    ]


def classify(
    row: Row, question: Question, wording: float, fact: float, answers: float, rarity: Rarity
) -> tuple[str, str]:
    """The class that a pair seems to have, and why: what differs between the two questions.

    wording, fact, answers: cosines of the questions, of these with their answers, of the answers.
    Calculations (numbers on both sides) differ by numbers and answers; else one fact asked in other
    words is a gray area, and a question with another answer similar but different.
    """
    bare, own = bare_of(row), short_answer(row["output"], row["instruction"])
    a, b, answer = words_of(bare), words_of(question.text), words_of(short_answer(question.answer))
    (words_a, ours, _), (words_b, theirs, _) = content_of(bare), content_of(question.text)
    order = difflib.SequenceMatcher(None, a[:LONGEST], b[:LONGEST], False).ratio()
    numeric, generic = bool(ours and theirs), rarity.of(words_a & words_b) < GENERIC
    replaced = min(rarity.of(words_a - words_b), rarity.of(words_b - words_a))
    brief = 0 < sum(map(str.isalnum, said := words_of(own))) <= SHORT  # else a solution, or none
    lead = said[-len(answer) - 1 : -len(answer)]  # "x = 4" is 4, and "-4" is not
    same = bool(answer) and said[-len(answer) :] == answer and lead in ([], ["="], ["is"])
    negated = sum(map(NEGATIONS.count, a)) != sum(map(NEGATIONS.count, b))
    choices = bare != row["instruction"].strip()
    inside = f" {' '.join(b)} " in f" {' '.join(a)} " or f" {' '.join(a)} " in f" {' '.join(b)} "
    why = difference(bare, question.text)
    replies = " ".join(f"answers: {own:.60} / {question.answer:.60}".split())
    if a == b and (numeric or same or not (choices or generic)):
        return "duplicate", why
    if inside and a != b and not generic and (same or not brief):
        return "duplicate", f"one stands in the other; {why}"
    if numeric and ours.keys() != theirs.keys() and (wording >= WORDING or order >= 0.5):
        old, new = (", ".join(sorted(x)) or "none" for x in (ours - theirs, theirs - ours))
        return "similar-but-different", f"other numbers: {old:.40} -> {new:.40}; {why}"
    if order >= NEAR and a != b and not (generic and not numeric):
        if not negated and (same or not brief or (answers >= 0.75 and all(map(str.isalpha, said)))):
            return "duplicate", f"nearly the same words{' and answer' * same}; {why}"
        if (negated or replaced >= GENERIC / 4 or fact < FACT) and (numeric or fact >= 0.45):
            return "similar-but-different", f"{replies}; {why}"
    if numeric:
        if wording < WORDING and order < 0.5:
            return "not-a-leak", f"same subject, another calculation; {why}"
        if same and not negated or (not brief and wording >= 0.9):
            return "duplicate", f"same numbers{' and answer' * same}; {why}"
        kind = "similar-but-different" if brief else "gray-area"
        return kind, f"same numbers, {replies}; {why}"
    if same and wording >= 0.9 and not (negated or generic):
        return "duplicate", f"same answer; {why}"
    if fact >= FACT and not negated:
        return "gray-area", f"alike with its answer ({fact:.2f}); {replies}"
    if wording >= 0.87 and order >= 0.5 and fact >= 0.45:
        return "similar-but-different", f"{'negated' if negated else 'another answer'}; {replies}"
    return "not-a-leak", f"{'a general stem' if generic else 'a subject'} in common; {replies}"


# --- step 2: files --------------------------------------------------------------------------------


def read_rows(path: Path) -> list[Row]:
    """A training set's rows; those of other origin get an id from their content."""
    rows = read_jsonl(path, {"instruction": str, "input": str, "output": str})
    for number, row in enumerate(rows, 1):
        if not all(isinstance(row.get(name, ""), str) for name in ("id", "source")):
            raise UserError(f"{path}: row {number} has an id or a source that is not text")
    foreign = [row for row in rows if "id" not in row]
    for row in foreign:
        row |= {"source": row.get("source", path.stem), "origin": path.name}
    add_ids(foreign)
    repeated = [i for i, count in Counter(row["id"] for row in rows).items() if count > 1]
    refuse(
        [
            message
            for message, found in (
                {f"{path}: repeated ids {repeated[:3]}": repeated, f"{path}: no rows": not rows}
            ).items()
            if found
        ]
    )
    return rows


def check(args: argparse.Namespace, started: float) -> None:
    """Write pairs.jsonl and run.json."""
    check_output(args.out, args.overwrite, args.dataset)
    check_listed(check_input(args.dataset, "write it with: python build_dataset.py"))
    files = map(Path, filter(None, [args.dataset, args.against, *args.extra_benchmark.values()]))
    inputs = describe_files([*files, *local_inputs(args)])
    rows, questions = read_rows(args.dataset), load_questions(args)
    embedder = Embedder(args.embedding_model, args.cache, args.device)
    pairs = find_pairs(rows, questions, embedder, args.cosine_threshold, args.paper)
    benchmarks = Counter(q.test_id.rpartition("/")[0] for q in questions)
    counts = {"rows": len(rows), "pairs": len(pairs), "test_questions": benchmarks}
    more = {"counts": counts, "embedding": embedder.about}
    outputs = [args.out / "pairs.jsonl"]
    with claim_output(args.out, args.overwrite):
        write_file(outputs[0], to_jsonl(pairs))
        finish_run(args, inputs=inputs, outputs=outputs, started=started, **more)
        report = apply(args, time.monotonic())
    print(report)


def apply(args: argparse.Namespace, started: float) -> str:
    """Write the clean set and return what to print of it.

    By default a flagged row stays if all its pairs are not-a-leak.
    """
    run, log = read_run(args.out / "run.json"), args.out / "decisions.jsonl"
    dataset = Path(str(run["settings"].get("dataset", "the data set that run.json names")))
    check_input(dataset, "the data set that was checked")
    pairs_file = check_listed(args.out / "pairs.jsonl")
    inputs = describe_files([dataset, pairs_file, args.out / "run.json"])
    if run["inputs"].get(str(dataset), {}).get("sha256") != inputs[str(dataset)]["sha256"]:
        raise UserError(f"{dataset} changed since it was checked: check it with --overwrite")
    rows, pairs = read_rows(dataset), read_jsonl(pairs_file, PAIR)
    digest = sha256_of(log) if log.exists() else None  # before it is read: later verdicts are newer
    decisions = read_decisions(log)
    gone = removed_ids(pairs, decisions, args.remove)
    clean = [row for row in rows if row["id"] not in gone]
    removed = [{**row, "because": gone[row["id"]]} for row in rows if row["id"] in gone]
    tables = leak_tables(rows, pairs, decisions, run.get("counts", {}).get("test_questions", {}))
    text = as_markdown(tables)
    ids = {pair["pair_id"] for pair in pairs}
    undecided, stale = sorted(ids - decisions.keys()), sorted(decisions.keys() - ids)
    outputs = [args.out / name for name in ("clean.jsonl", "removed.jsonl", "table.md")]
    write_file(outputs[0], to_jsonl(clean))
    write_file(outputs[1], to_jsonl(removed))
    write_file(outputs[2], text + "\n")
    counts = {"clean": len(clean), "removed": len(removed), "undecided_pairs": len(undecided)}
    more = {"decisions_sha256": digest, "undecided": undecided, "stale": stale, "tables": tables}
    more |= {"name": "apply.json", "counts": counts}
    finish_run(args, inputs=inputs, outputs=outputs, started=started, **more)

    review = f"; to review them: {shlex.join(['python', 'tui.py', str(args.out)])}" if pairs else ""
    wrote = f"wrote {outputs[0]}: {len(clean):,} of {len(rows):,} rows."
    lines = [f"{text}\n\n{len(pairs):,} pairs{review}", name_some("undecided pairs", undecided)]
    lines.append(name_some("verdicts of former pairs", stale))
    lines.append(f"{wrote} Next (with --base-model, if not Llama-2-13B):")
    lines.append(next_command(args.out))
    return "\n".join(lines)


def as_markdown(tables: dict[str, list[Row]]) -> str:
    """Those of leak_tables() that have rows, as text."""
    parts = []
    for table in filter(None, tables.values()):
        parts.append(markdown_table(list(table[0]), [list(line.values()) for line in table]))
    return "\n\n".join(parts)


def name_some(kind: str, ids: list[str]) -> str:
    """How many ids of this kind there are, and the first three.

    >>> name_some("undecided pairs", ["a", "b"]), name_some("undecided pairs", [])
    ('2 undecided pairs (a, b; all in apply.json)', '0 undecided pairs')
    """
    if not ids:
        return f"0 {kind}"
    more = ", ..." if len(ids) > 3 else ""
    return f"{len(ids):,} {kind} ({one_line(', '.join(ids[:3]))}{more}; all in apply.json)"


def leak_tables(
    rows: list[Row], pairs: list[Row], decisions: dict[str, Row], asked: dict[str, int]
) -> dict[str, list[Row]]:
    """Leaks per source beside the paper's Table 1, per source x benchmark, and per subject.

    Of each: pairs; rows and test questions in them; test questions of pairs that are suggested
    duplicate ("duplicate?") and were decided so (what the paper counts); undecided pairs. `asked`:
    benchmark/subject -> how many test questions it has.
    """

    def line(chosen: list[Row]) -> Row:
        verdicts = [decisions.get(p["pair_id"], {}).get("verdict") for p in chosen]
        guesses = [p.get("suggested") for p in chosen]
        counts = {"pairs": len(chosen)}
        for column, key in (("rows", "train_id"), ("test questions", "test_id")):
            counts[column] = len({p[key] for p in chosen})
        for column, found in (("duplicate?", guesses), ("duplicate", verdicts)):
            tests = zip(chosen, found, strict=True)
            counts[column] = len({p["test_id"] for p, kind in tests if kind == "duplicate"})
        return {**counts, "undecided": verdicts.count(None)}

    sources = Counter(row.get("source", "") for row in rows)
    forms = {"source": "{source}", "source x benchmark": "{source} x {benchmark}"}
    tables = {}
    for title, form in {**forms, "subject": "{benchmark}/{subject}"}.items():
        size = {"source": sources, "subject": asked}.get(title, {})
        groups: dict[str, list[Row]] = {name: [] for name in sources if title == "source"}
        for pair in pairs:
            groups.setdefault(form.format(**pair), []).append(pair)
        tables[title] = [
            {title: name, **({"of": size.get(name, "")} if size else {}), **line(groups[name])}
            for name in sorted(groups)
        ]
    for row in tables["source"]:
        row["paper"] = PAPER_LEAKS.get(row["source"], 0)
    return tables


def main(argv: list[str] | None = None) -> None:
    """Find pairs, then write the clean set; or only the latter."""
    started = time.monotonic()
    args = parse_args(argv)
    if args.command == "check":
        return check(args, started)
    if not (args.out / "run.json").exists():
        mend = shlex.join(["python", "check_contamination.py", "--out", str(args.out)])
        raise UserError(f"{args.out} has no run.json: no pairs were found yet, by {mend}")
    read_run(args.out / "run.json"), check_listed(args.out / "pairs.jsonl")  # before any writing
    with claim_output(args.out, overwrite=True, keep_run=True):
        report = apply(args, started)
    print(report)


if __name__ == "__main__":
    run_main(main)

"""Find training questions that leak benchmark questions, and write the set without them.

Step 2 of 5 (section 2.3 of the Platypus paper). Reads out/dataset/dataset.jsonl and the benchmarks'
test questions (--local DIR/<benchmark>/ or the hub); writes out/contamination/: pairs.jsonl,
run.json, and by `apply`: clean.jsonl, removed.jsonl, table.md, apply.json.

    python check_contamination.py --dataset out/try/dataset.jsonl --local demo/data --out out/check
    python check_contamination.py
    python check_contamination.py apply
    python check_contamination.py --against partner.jsonl --out out/overlap

A training and a test question are compared in several views: whole, without or with choices, last
line, windows of long texts. A pair is listed where two views have a cosine of at least 0.8, or from
0.6 where words and numbers confirm it, or where one view holds the other word for word. Each pair
has a suggested class, which decides nothing: all flagged rows go until a person's verdicts
(`python tui.py`) say not-a-leak and `apply` is run again.
Time: embedding 55,000 test texts, 15 minutes on one CPU core, then seconds. It compares questions
only: an answer alone that leaks is not seen.
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
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

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
    DECISIONS,
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

HUB = {  # id, configuration, few-shot split, scored split: as in the harness's task files
    "arc": ("allenai/ai2_arc", "ARC-Challenge", "train", "test"),
    "hellaswag": ("Rowan/hellaswag", None, "train", "validation"),
    "mmlu": ("cais/mmlu", "all", "dev", "test"),
    "truthfulqa": ("truthfulqa/truthful_qa", "multiple_choice", None, "validation"),
}
HELLASWAG_SHOTS = 300  # first rows of a local file, taken for few-shot examples in place of train
PAIR_FIELDS = dict.fromkeys(  # what `apply` needs of a line of pairs.jsonl, all text
    ("pair_id", "train_id", "source", "benchmark", "subject", "test_id"), str
)
# Table 1: leaked questions per source, the rest 0. PRM800K's questions are MATH's: one line there.
PAPER_LEAKS = {"prm800k": 77, "math": 77, "airoboros": 13, "guanaco": 13, "openbookqa": 6}

# Detection: measured by benchmarks/contamination_quality.py
CANDIDATE = 0.6  # from this cosine up the words of two texts may confirm that they are one question
CONFIRMED = 1.0  # cosine + agreement of the words (Rarity.confirms), with numbers in common
CONFIRMED_WORDS = 1.2  # the same without numbers in common
GENERIC = 1.1  # least information of shared words, by Rarity.of(), where a word that one text has
# counts 1; that of "which of the following is true" is .8
WITH_CHOICES = "question with choices"
WHOLE_VIEWS = ("question", "instruction", WITH_CHOICES)  # the other views are parts

# Suggestions: chosen on one half of 360 labelled pairs
WORDING = 0.8  # cosine of two questions from which they may be one calculation
CLOSE_WORDING = 0.87  # from which they differ in a detail, where their answers differ
SAME_WORDING = 0.9  # from which they ask the same
FACT = 0.75  # cosine of question and answer from which two rows state one fact
SAME_SUBJECT = 0.45  # below which they have not even the subject in common
SAME_ANSWER = 0.75  # cosine of two answers from which they say the same
NEARLY_ALL = 0.85  # share of the words in the same order, of nearly the same questions
HALF = 0.5  # the same share, of questions that are alike
REPLACED = GENERIC / 4  # unique words' worth in each of two texts that makes them two questions
BRIEF = 5  # an answer of at most so many words is a result; a longer one a worked solution
LONGEST = 1000  # words of a text in which differences are looked for
NEGATIONS = ("no", "not", "never", "except", "without", "least", "cannot", "false", "incorrect")

# The parts of a training row
LETTERED = re.compile(r"\n\s*\(?A[:.)]\s")  # where a question's lettered choices begin
# An answer that is a letter: "B", "(B) wood", "The answer is B: wood".
LETTER = re.compile(r"(?:the answer is:?\s*)?\(?([A-Z])(?:[:.)]\s*(.*))?", re.IGNORECASE)
BOXED = re.compile(r"\\boxed\{((?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*)\}")  # how MATH marks an answer
FINAL = re.compile(r"####\s*(.+)")  # and how GSM8K does

# The words of a text
GLYPH = r"[^\W\d_]"  # a letter of any alphabet
DASHES = str.maketrans("\u2212\u2013\u2014\u2019", "---'")  # minus, en and em dash; apostrophe
THOUSANDS = re.compile(r"(?<=\d)(?:,|\{,\})(?:\\!)?(?=\d{3}(?!\d))")  # 1,000 and 1{,}000
FRAME = re.compile(
    r"\\(?:begin|end)\{[a-z]+\*?\}|&|(?s:\[asy\].*?\[/asy\])"
)  # LaTeX's tables, diagrams
LAYOUT = re.compile(r"\\(?:left|right|displaystyle|math\w\w|text\w*|[ !,;:])(?![a-z])")
FRACTION = re.compile(r"\\[dt]?frac\{(\w+)\}\{(\w+)\}")
GREEK = re.compile(rf"(?<!{GLYPH})[α-ω](?!{GLYPH})")  # one that stands alone, as in a formula
HYPHEN = re.compile(rf"(?<={GLYPH}{{2}})-(?={GLYPH})|(?<={GLYPH})-(?={GLYPH}{{2}})")  # not x-y
THING = rf"(?:{GLYPH}+|\d+(?:\.\d+)?)(?:\s+{GLYPH}+)*"  # words, a number, a number of something
GROUP = re.compile(rf"[({{\[]\s*({THING})\s*[)}}\]]")  # one thing in brackets
TOKEN = re.compile(rf"\d+(?:\.\d+)?|{GLYPH}+|_+|[^\w\s.,;:!?'\"$\\]")  # number, word, gap, symbol
NAME = re.compile(r"(?<=\w[\s,;])[A-Z][a-z]+")  # proper names: capitals within a sentence
NUMBER_WORDS = "zero one two three four five six seven eight nine ten eleven twelve".split()
DIGITS = {word: str(number) for number, word in enumerate(NUMBER_WORDS)}
EVERYWHERE = ("0", "1", "01")  # numbers that say nothing of a text


# --- flags ----------------------------------------------------------------------------------------


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the flags of this step; every impossible setting is named at once."""
    parser = make_parser(__doc__, "out/contamination")
    text = "check: find pairs, then apply (default); apply: write the clean set from the verdicts"
    commands = ("check", "apply")
    parser.add_argument("command", nargs="?", choices=commands, default="check", help=text)

    add = parser.add_argument_group("data").add_argument
    dataset = Path("out/dataset/dataset.jsonl")
    add("--dataset", type=Path, default=dataset, metavar="FILE", help="default: %(default)s")
    add("--benchmarks", metavar="a,b", help=f"default: {','.join(HUB)}; none with --against")
    add("--local", type=Path, metavar="DIR", help="read DIR/<benchmark>/ (default: the hub)")
    text = "rows of question, choices, answer to protect too (repeatable)"
    add("--extra-benchmark", action="append", default=[], metavar="NAME=FILE", help=text)
    text = "another training set, in instruction, input, output: find what both have"
    add("--against", type=Path, metavar="FILE", help=text)
    text = "verdicts whose rows are removed (%(default)s)"
    add("--remove", default=",".join(REMOVED), metavar="a,b", help=text)

    add = parser.add_argument_group("detection").add_argument
    add("--cosine-threshold", type=float, default=COSINE_THRESHOLD, help="paper: %(default)s")
    add("--embedding-model", default=EMBEDDING_MODEL, help="default and paper: %(default)s")
    text = "find pairs as published: one cosine, lettered choices appended, no other detector"
    add("--paper", action=argparse.BooleanOptionalAction, default=False, help=text)
    add("--cache", type=Path, default=CACHE, help="of embeddings (default: %(default)s)")

    args = parser.parse_args(argv)
    if args.benchmarks is not None:
        args.benchmarks = [name for name in args.benchmarks.split(",") if name]
    else:
        args.benchmarks = [] if args.against else list(HUB)
    args.remove = args.remove.split(",")
    extras = []
    for extra in args.extra_benchmark:
        name, _, file = extra.partition("=")
        extras.append((name, file))
    refuse(flag_faults(args, extras))
    args.extra_benchmark = dict(extras)
    return args


def flag_faults(args: argparse.Namespace, extras: list[tuple[str, str]]) -> list[str]:
    """List what is impossible in the flags; extras: (name, file) of each --extra-benchmark."""
    faults = []
    unknown = [name for name in args.benchmarks if name not in HUB]
    if unknown:
        faults.append(f"--benchmarks: {', '.join(unknown)} is none of {', '.join(HUB)}")

    names = [name for name, _ in extras]
    taken = []
    for name in names:
        if not name or name in HUB or "/" in name or names.count(name) > 1:
            taken.append(name)
    if taken:
        fault = f"{taken} cannot be names: known, given twice, or with a /"
        faults.append(f"--extra-benchmark: {fault}")

    files = [file for _, file in extras]
    if args.against:
        files.insert(0, str(args.against))
    missing = [file for file in files if not Path(file).is_file()]
    if missing:
        faults.append(f"no such file: {', '.join(missing)}")
    if not args.benchmarks and not files:
        faults.append("no benchmark: name one")

    known = (*VERDICTS, "undecided")
    unknown = [verdict for verdict in args.remove if verdict not in known]
    if unknown:
        faults.append(f"--remove: {', '.join(unknown)} is none of {', '.join(known)}")
    if args.local and not args.local.is_dir():
        faults.append(f"--local {args.local} is not a folder")
    if not 0 < args.cosine_threshold <= 1:
        faults.append(f"--cosine-threshold {args.cosine_threshold} is not above 0 and at most 1")
    return faults


# --- benchmarks (shared with step 5) --------------------------------------------------------------


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
    """Load the few-shot and scored rows of a benchmark in the hub's columns, by subject.

    local: read DIR/<name>/ where it is a folder, else the hub. official: HellaSwag from its
    official layout, whose ctx_a and ctx_b the harness's prompts are made of, even where the whole
    validation split is there as plain text. Raises UserError for a missing file or column.
    """
    if local and (local / name).is_dir():
        return LOCAL[name](local / name, official)

    splits = load_hub_splits(name, local)
    _, _, shots_split, scored_split = HUB[name]
    shots = group_by_subject(name, splits[shots_split] if shots_split else [])
    scored = group_by_subject(name, splits[scored_split])
    subjects = []
    for subject in sorted({*shots, *scored}):
        subjects.append(Subject(name, subject, shots=shots[subject], scored=scored[subject]))
    return subjects


def load_hub_splits(name: str, local: Path | None) -> dict[str, Iterable[Row]]:
    """Load a benchmark from the hub: {split: rows}. `local` has no folder of it."""
    from datasets import load_dataset

    path, config, _, _ = HUB[name]
    try:
        return load_dataset(path, config)
    except Exception as error:  # the hub raises a dozen kinds; each means "not to be had"
        if local:
            fault = f"{local / name} is no folder, and the hub's {path} cannot be loaded"
            fault = f"{fault}: {first_line(error)}"
        else:
            fault = hub_fault(path, error)
            fault = f"{fault}, or put its files in DIR/{name}/ and give --local DIR"
        raise UserError(f"benchmark {name}: {fault}") from None


def group_by_subject(name: str, rows: Iterable[Row]) -> defaultdict[str, list[Row]]:
    """Group a benchmark's rows by subject: MMLU has 57, the others one, "all"."""
    groups = defaultdict(list)
    for row in rows:
        subject = row["subject"] if name == "mmlu" else "all"
        groups[subject].append(row)
    return groups


def benchmark_file(path: Path) -> Path:
    """Return the path of a benchmark's file. Raises UserError where it is missing."""
    return check_input(path, "a benchmark's file, in the layout that README.md describes")


def local_arc(folder: Path, official: bool) -> list[Subject]:
    """Read ARC-Challenge-{train,test}.jsonl; some training rows have no id, which nothing needs."""
    fields = {"question": str, "choices": dict, "answerKey": str}
    shots = read_jsonl(benchmark_file(folder / "ARC-Challenge-train.jsonl"), fields)
    scored = read_jsonl(benchmark_file(folder / "ARC-Challenge-test.jsonl"), fields)
    return [Subject("arc", "all", shots=shots, scored=scored)]


def local_hellaswag(folder: Path, official: bool) -> list[Subject]:
    """Read the whole validation split as plain text if there, else the official layout's end.

    Where both are there, each row of the official layout gets "test_row": its place in the plain
    text, by which evaluate.py finds the flagged questions again; -1 where it is not in it.
    """
    plain_file = folder / "hellaswag_val.jsonl"
    fields = {"ctx": str, "endings": list, "label": int}
    if plain_file.exists() and not official:
        return [Subject("hellaswag", "all", shots=[], scored=read_jsonl(plain_file, fields))]

    file = benchmark_file(folder / "hellaswag_1000_original_format.jsonl")
    rows = read_jsonl(file, {**fields, "ctx_a": str, "ctx_b": str})
    if plain_file.exists():
        places = {}
        for place, row in enumerate(read_jsonl(plain_file, fields)):
            places[letters_of(row["ctx"])] = place
        for row in rows:
            row["test_row"] = places.get(letters_of(row["ctx"]), -1)

    shots = min(HELLASWAG_SHOTS, len(rows) // 2)  # half of a smaller file, as the demo's is
    return [Subject("hellaswag", "all", shots=rows[:shots], scored=rows[shots:])]


def letters_of(text: str) -> str:
    """Return a text's letters and digits in lower case, without [tags]: alike in both layouts.

    >>> letters_of("[header] How to dive [title] Ask a friend.")
    'howtodiveaskafriend'
    """
    return re.sub(r"\[.*?\]|\W", "", text).lower()


def local_mmlu(folder: Path, official: bool) -> list[Subject]:
    """Read {dev,test}/<subject>_{dev,test}.csv."""
    files = (folder / "test").glob("*_test.csv")
    names = sorted(path.name.removesuffix("_test.csv") for path in files)
    if not names:
        raise UserError(f"{folder}/test has no <subject>_test.csv")
    subjects = []
    for name in names:
        shots = read_mmlu_file(folder / "dev" / f"{name}_dev.csv", name)
        scored = read_mmlu_file(folder / "test" / f"{name}_test.csv", name)
        subjects.append(Subject("mmlu", name, shots=shots, scored=scored))
    return subjects


def read_mmlu_file(path: Path, subject: str) -> list[Row]:
    """Read a CSV file without a header: question, four choices, letter. "None" in it is text."""
    try:
        # "-sig": a byte order mark is no part of the first question.
        with benchmark_file(path).open(newline="", encoding="utf-8-sig") as file:
            lines = list(csv.reader(file, strict=True))
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} is not a CSV file in UTF-8: {error}") from None

    rows = []
    for number, line in enumerate(lines, 1):
        if len(line) != 6 or line[5] not in ("A", "B", "C", "D"):
            raise UserError(f"{path}: row {number} is not question, 4 choices, letter A to D")
        row = {"question": line[0], "subject": subject, "choices": line[1:5]}
        row["answer"] = "ABCD".index(line[5])
        rows.append(row)
    return rows


def local_truthfulqa(folder: Path, official: bool) -> list[Subject]:
    """Read mc_task.json, its {answer: 0 or 1} turned into the hub's {choices, labels}."""
    fields = {"question": str, "mc1_targets": dict, "mc2_targets": dict}
    rows = read_jsonl(benchmark_file(folder / "mc_task.json"), fields)
    for row in rows:
        for column in ("mc1_targets", "mc2_targets"):
            labels = row[column]
            row[column] = {"choices": list(labels), "labels": list(labels.values())}
    return [Subject("truthfulqa", "all", shots=[], scored=rows)]


LOCAL = {  # `official` matters to HellaSwag alone: only it has two layouts
    "arc": local_arc,
    "hellaswag": local_hellaswag,
    "mmlu": local_mmlu,
    "truthfulqa": local_truthfulqa,
}


def questions_of(subject: Subject) -> list[Question]:
    """Return the scored rows of a subject as questions, with choices and the right answer's text.

    Raises AttributeError, LookupError, TypeError or ValueError where a row is no question.
    """
    questions = []
    for index, row in enumerate(subject.scored):
        choices, answer = choices_and_answer(subject.benchmark, row)
        text = row["question"] if "question" in row else row["ctx"]
        test_id = f"{subject.benchmark}/{subject.subject}/{index}"
        questions.append(Question(test_id, text, choices=choices, answer=answer))
    return questions


def choices_and_answer(benchmark: str, row: Row) -> tuple[list[str], str]:
    """Return the choices of a row in the hub's columns and the right one of them."""
    if benchmark == "arc":
        choices = row["choices"]["text"]
        return choices, choices[row["choices"]["label"].index(row["answerKey"])]
    if benchmark == "truthfulqa":
        targets = row["mc1_targets"]
        return targets["choices"], targets["choices"][targets["labels"].index(1)]

    # HellaSwag and MMLU name the right choice by its index, an --extra-benchmark so or by its text.
    choices = row.get("endings", row.get("choices")) or []
    answer = row["label"] if "label" in row else row["answer"]
    if choices and answer not in choices and str(answer).isdigit():
        answer = choices[int(answer)]
    return choices, str(answer)


def local_inputs(args: argparse.Namespace) -> list[Path]:
    """List the benchmarks' files below --local, for run.json."""
    if not args.local:
        return []
    files = []
    for name in args.benchmarks:
        for path in (args.local / name).rglob("*"):
            if path.is_file():
                files.append(path)
    return sorted(files)


def load_questions(args: argparse.Namespace) -> list[Question]:
    """Load the test questions of all benchmarks asked for, and those of --against."""
    subjects = []
    for name in args.benchmarks:
        subjects += load_benchmark(name, args.local)
    for name, file in args.extra_benchmark.items():
        rows = read_jsonl(Path(file), {"question": str})
        for row in rows:
            row.setdefault("answer", "")
        subjects.append(Subject(name, "all", shots=[], scored=rows))
    if args.against:
        rows = []
        for row in read_rows(args.against):
            rows.append({"question": question_of(row), "answer": row["output"]})
        subjects.append(Subject("against", args.against.stem, shots=[], scored=rows))

    questions = []
    for subject in subjects:
        questions += checked_questions(subject, args.limit)
    return questions


def checked_questions(subject: Subject, limit: int | None) -> list[Question]:
    """Return the first `limit` questions of a subject. Raises UserError for a bad row, or none."""
    name = f"{subject.benchmark}/{subject.subject}"
    try:
        questions = questions_of(subject)[:limit]
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise UserError(f"{name}: bad row: {error}") from None
    if not questions:
        raise UserError(f"{name} has no questions")
    for question in questions:
        if not isinstance(question.choices, list):
            raise UserError(f"{question.test_id}: bad row: its choices are no list")
        for text in (question.text, question.answer, *question.choices):
            if not isinstance(text, str):
                raise UserError(f"{question.test_id}: bad row: {text!r:.60} is no text")
    return questions


# --- the words of a text --------------------------------------------------------------------------


def words_of(text: str) -> list[str]:
    r"""Return lower-cased words, numbers and symbols; of LaTeX what it says, not how it is set.

    >>> words_of("Find $x^{2}$, now!"), words_of("(x+1)/2")
    (['find', 'x', '^', '2', 'now'], ['(', 'x', '+', '1', ')', '/', '2'])
    """
    text = unicodedata.normalize("NFC", text).lower()
    text = text.translate(DASHES)
    text = THOUSANDS.sub("", text)
    text = FRAME.sub(" ", text)
    text = LAYOUT.sub(" ", text)
    text = FRACTION.sub(r"\1/\2", text)
    text = GREEK.sub(spell_greek, text)
    text = HYPHEN.sub(" ", text)
    text = text.replace("{", "(").replace("}", ")")
    while GROUP.search(text):  # brackets around one thing group nothing
        text = GROUP.sub(r" \1 ", text)
    return TOKEN.findall(text)


def spell_greek(letter: re.Match) -> str:
    """Return a Greek letter's name, as LaTeX spells it: theta for θ."""
    return unicodedata.name(letter[0]).split()[-1].lower()


class Content(NamedTuple):
    """What a text is about."""

    words: frozenset[str]  # as stems
    numbers: Counter[str]
    names: frozenset[str]  # proper names


@functools.lru_cache(maxsize=1 << 16)
def content_of(text: str) -> Content:
    """Return a text's words as stems, its numbers, and its proper names.

    Five letters without a plural's s are a crude stem: "produces" and "production" are one word.
    "three" is the number 3.
    """
    words = []
    for word in words_of(text):
        stem = word.removesuffix("s")[:5]
        word = DIGITS.get(word, stem)
        if word[:1].isalnum():  # no symbol, no gap
            words.append(word)
    numbers = Counter(word for word in words if word[0].isdigit() and word not in EVERYWHERE)
    return Content(frozenset(words), numbers, frozenset(NAME.findall(text)))


class Rarity:
    """Weighs words by how few of `texts` have them: 1 for a word that is in one text only."""

    def __init__(self, texts: list[str]) -> None:
        self.counts: Counter[str] = Counter()  # how many texts have a word
        for text in texts:
            self.counts.update(content_of(text).words)
        self.total = len(texts)

    def of(self, words: frozenset[str]) -> float:
        """Return the information in a set of words; one that is in one text only is the unit."""
        parts = [math.log((self.total + 1) / (self.counts[word] + 0.5)) for word in words]
        # fsum: a set has no order, and the last bit of a plain sum depends on it.
        return math.fsum(parts) / math.log(self.total + 2)

    def is_generic(self, a: str, b: str) -> bool:
        """Tell whether two texts share no more than a generic stem."""
        return self.of(content_of(a).words & content_of(b).words) < GENERIC

    def confirms(self, a: str, b: str, cosine: float) -> bool:
        """Tell whether words and numbers say that two texts of a lower cosine are one question.

        Two thirds of the numbers and half of the names must be in both. The share of the words'
        information that is in both (Dice's coefficient) is added to the cosine, and must be larger
        without numbers.
        """
        left = content_of(a)
        right = content_of(b)
        shared_numbers = (left.numbers & right.numbers).total()
        all_numbers = (left.numbers | right.numbers).total()
        if 3 * shared_numbers < 2 * all_numbers:
            return False
        fewer_names = min(len(left.names), len(right.names))
        if 2 * len(left.names & right.names) < fewer_names:
            return False
        information = self.of(left.words) + self.of(right.words)
        if not information:
            return False

        agreement = 2 * self.of(left.words & right.words) / information
        needed = CONFIRMED if shared_numbers else CONFIRMED_WORDS
        return cosine + agreement >= needed


def contained(needles: list[str], haystacks: list[str]) -> Iterator[tuple[str, str]]:
    """Yield (needle, haystack) wherever a needle's words stand in a row in a haystack."""
    if not needles or not haystacks:
        return
    spaced = {}  # blanks on both sides: a word is found whole or not at all
    for text in {*needles, *haystacks}:
        spaced[text] = f" {' '.join(words_of(text))} "

    counts: Counter[str] = Counter()
    for words in spaced.values():
        counts.update(set(words.split()))
    by_word = defaultdict(list)  # a needle is looked for only where its rarest word is
    for needle in needles:
        words = spaced[needle].split()
        if words:
            by_word[min(words, key=counts.get)].append(needle)

    for text in haystacks:
        for word in set(spaced[text].split()) & by_word.keys():
            for needle in by_word[word]:
                if spaced[needle] in spaced[text]:
                    yield needle, text


# --- views: the texts of a row or question that are compared --------------------------------------


class View(NamedTuple):
    """A row or question that has a text among its views."""

    place: int  # of the row or question in its list
    name: str  # of the view


Views = dict[str, list[View]]  # a text -> those that have it


def bare_of(row: Row) -> str:
    """Return a row's instruction without its lettered choices."""
    return LETTERED.split(row["instruction"], maxsplit=1)[0].strip()


def lines_of(text: str) -> list[str]:
    """Return the lines of a text without blank ones; at least one."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines or [""]


def row_views(row: Row) -> dict[str, str]:
    """Return {text: name} of a training row's views; of equal texts the last, most whole name.

    A question may stand below a passage ("stem"), or before one ("opening").
    """
    bare = bare_of(row)
    lines = lines_of(bare)
    views = {}
    views[lines[-1]] = "stem"
    views[lines[0]] = "opening"
    views[bare] = "without choices"
    views[row["instruction"]] = "instruction"
    views[question_of(row)] = "question"
    return views


def question_views(question: Question) -> dict[str, str]:
    """Return {text: name} of a test question's views; equal texts keep the most whole name."""
    views = {}
    views[lines_of(question.text)[-1]] = "stem"
    views[lettered(question.text, question.choices)] = WITH_CHOICES
    views[question.text] = "question"
    return views


def gather(named_texts: Iterable[dict[str, str]]) -> Views:
    """Return which rows or questions have a text, from the {text: name} of each one's views."""
    views: Views = {}
    for place, names in enumerate(named_texts):
        for text, name in names.items():
            if text.strip():
                views.setdefault(text, []).append(View(place, name))
    return views


def add_windows(views: Views, embedder: Embedder) -> None:
    """Add the windows of the whole texts that are longer than the embedding model reads."""
    texts = texts_called(views, ["question"])
    for text, windows in zip(texts, embedder.windows(texts), strict=True):
        if len(windows) == 1:
            continue
        owners = [View(view.place, "window") for view in views[text]]
        for window in windows:
            views.setdefault(window, []).extend(owners)


def texts_called(views: Views, names: Collection[str]) -> list[str]:
    """List the texts that are a view with one of these names."""
    texts = []
    for text, found in views.items():
        if any(view.name in names for view in found):
            texts.append(text)
    return texts


# --- detection ------------------------------------------------------------------------------------


class Detection(NamedTuple):
    """Two texts that are alike, views of rows and of test questions."""

    row_text: str
    test_text: str
    cosine: float
    verbatim: bool  # one holds the other word for word


@dataclass(frozen=True)
class Evidence:
    """What makes a row and a test question a pair: a view of each, which are alike."""

    detector: str
    cosine: float
    row_view: str
    test_view: str

    @property
    def whole(self) -> bool:
        """Tell whether the whole row is like the whole question."""
        return self.row_view in WHOLE_VIEWS and self.test_view in WHOLE_VIEWS

    @property
    def view(self) -> str:
        """Name the two views, as pairs.jsonl does."""
        if self.row_view == "question":
            return self.test_view
        return f"{self.row_view} x {self.test_view}"


def detections(
    ours: Views, theirs: Views, embedder: Embedder, lowest: float
) -> Iterator[Detection]:
    """Yield the texts with a cosine of at least `lowest`, then those of which one holds the other.

    ours: the rows' views; theirs: the test questions'.
    """
    row_texts = list(ours)
    test_texts = list(theirs)
    row_vectors = embedder(row_texts)
    test_vectors = embedder(test_texts)
    for rows, tests, cosines in similar_pairs(row_vectors, test_vectors, lowest):
        for row, test, cosine in zip(rows.tolist(), tests.tolist(), cosines.tolist(), strict=True):
            yield Detection(row_texts[row], test_texts[test], cosine=cosine, verbatim=False)

    row_places = {text: place for place, text in enumerate(row_texts)}
    test_places = {text: place for place, text in enumerate(test_texts)}
    for row_text, test_text in verbatim_texts(ours, theirs):
        row_vector = row_vectors[row_places[row_text]]
        test_vector = test_vectors[test_places[test_text]]
        cosine = float(row_vector @ test_vector)
        yield Detection(row_text, test_text, cosine=cosine, verbatim=True)


def verbatim_texts(ours: Views, theirs: Views) -> Iterator[tuple[str, str]]:
    """Yield (row's text, test question's text) where one holds the other word for word."""
    needles = texts_called(theirs, ["question", "stem"])
    for test_text, row_text in contained(needles, texts_called(ours, ["question"])):
        yield row_text, test_text
    needles = texts_called(ours, ["without choices", *WHOLE_VIEWS])
    yield from contained(needles, texts_called(theirs, ["question"]))


def detector_of(found: Detection, threshold: float, rarity: Rarity) -> str:
    """Name what says that two texts are alike; "" where nothing does."""
    if found.verbatim:
        return "verbatim"
    if found.cosine >= threshold:
        return "cosine"
    if rarity.confirms(found.row_text, found.test_text, found.cosine):
        return "cosine and words"
    return ""


def is_enough(evidence: Evidence, generic: bool) -> bool:
    """Tell whether a row and a question are a pair by this alone.

    generic: the two texts share no more than a generic stem.
    """
    # A generic text stands in many others word for word; alike as wholes, two of them are a pair.
    if generic and (evidence.detector == "verbatim" or not evidence.whole):
        return False
    if evidence.detector != "cosine and words" or evidence.whole:
        return True
    # Long texts and choices share words by chance.
    return evidence.test_view not in ("window", WITH_CHOICES) and evidence.row_view != "window"


def is_better(new: Evidence, old: Evidence) -> bool:
    """Tell whether a pair shows this evidence: verbatim text first, then the higher cosine."""
    new_verbatim = new.detector == "verbatim"
    old_verbatim = old.detector == "verbatim"
    if new_verbatim != old_verbatim:
        return new_verbatim
    if new.cosine != old.cosine:
        return new.cosine > old.cosine
    if new.whole != old.whole:
        return new.whole
    return new.view > old.view  # by name: the order in which they were found must not show


def best_evidence(
    ours: Views, theirs: Views, found: Iterable[Detection], threshold: float, rarity: Rarity
) -> dict[tuple[int, int], Evidence]:
    """Return {(row, question): its best evidence}, by their places, of every pair to list."""
    best: dict[tuple[int, int], Evidence] = {}
    for detection in found:
        detector = detector_of(detection, threshold, rarity)
        if not detector:
            continue
        rows = ours[detection.row_text]
        questions = theirs[detection.test_text]
        generic = rarity.is_generic(detection.row_text, detection.test_text)

        for row, question in itertools.product(rows, questions):
            evidence = Evidence(
                detector=detector,
                cosine=detection.cosine,
                row_view=row.name,
                test_view=question.name,
            )
            if not is_enough(evidence, generic):
                continue
            pair = (row.place, question.place)
            if pair not in best or is_better(evidence, best[pair]):
                best[pair] = evidence
    return best


def find_pairs(
    rows: list[Row], questions: list[Question], embedder: Embedder, threshold: float, paper: bool
) -> list[Row]:
    """Find every pair of training row and test question that is alike, most similar first.

    cosine: two views at `threshold` or more. cosine and words: CANDIDATE or more, and confirmed by
    Rarity.confirms(). verbatim: the words of one in the other. Parts of a text must share more than
    a generic stem. paper: cosine alone, whole rows x questions with choices, as published.
    Returns the lines of pairs.jsonl.
    """
    if paper:  # as no test text is called "question", verbatim_texts() finds nothing
        ours = gather({question_of(row): "question"} for row in rows)
        theirs = gather({lettered(q.text, q.choices): WITH_CHOICES} for q in questions)
        lowest = threshold
    else:
        ours = gather(row_views(row) for row in rows)
        theirs = gather(question_views(question) for question in questions)
        add_windows(ours, embedder)
        add_windows(theirs, embedder)
        lowest = min(threshold, CANDIDATE)
    rarity = Rarity([*ours, *theirs])
    found = detections(ours, theirs, embedder=embedder, lowest=lowest)
    best = best_evidence(ours, theirs, found=found, threshold=threshold, rarity=rarity)

    pairs = [(rows[row], questions[question]) for row, question in best]
    suggestions = suggest(pairs, embedder, rarity)
    described = []
    for pair, evidence, suggestion in zip(pairs, best.values(), suggestions, strict=True):
        row, question = pair
        suggested, why = suggestion
        line = describe_pair(
            row,
            question,
            cosine=evidence.cosine,
            view=evidence.view,
            detector=evidence.detector,
            suggested=suggested,
            why=why,
        )
        described.append(line)
    return sorted(described, key=lambda line: (-line["cosine"], line["pair_id"]))


def describe_pair(
    row: Row,
    question: Question,
    cosine: float,
    view: str,
    detector: str = "",
    suggested: str = "",
    why: str = "",
) -> Row:
    """Return a pair's line of pairs.jsonl."""
    # Verdicts hang on this hash of all of Question's fields, as a NamedTuple prints them.
    key = f"{row['id']} {question}"
    benchmark, subject, _ = question.test_id.split("/")
    return {
        "pair_id": hashlib.sha256(key.encode()).hexdigest()[:16],
        "train_id": row["id"],
        "source": row.get("source", ""),
        "benchmark": benchmark,
        "subject": subject,
        "test_id": question.test_id,
        "cosine": round(cosine, 6),
        "view": view,
        "detector": detector,
        "train_question": question_of(row),
        "train_answer": row["output"],
        "test_question": question.text,
        "test_choices": question.choices,
        "test_answer": question.answer,
        "suggested": suggested,
        "why": why,
    }


# --- suggestions ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cosines:
    """Cosines of a training and a test question."""

    wording: float  # of the questions
    fact: float  # of the questions with their answers
    answer: float  # of the answers alone


@dataclass(frozen=True)
class Answers:
    """The answer of a training row beside a test question's right one."""

    same: bool  # it ends in the right answer
    brief: bool  # it is a few words; else a solution, or nothing
    spoken: bool  # it is letters alone
    shown: str

    @property
    def agree(self) -> bool:
        """Tell whether they are the same, or one is a solution, which says nothing."""
        return self.same or not self.brief


@dataclass(frozen=True)
class Comparison:
    """What is known of a training and a test question when their class is suggested."""

    cosines: Cosines
    answers: Answers
    same_words: bool  # the same, in the same order
    one_in_other: bool  # the words of one stand in a row in the other
    order: float  # share of the words that stand in the same order, 0 to 1
    replaced: float  # unique words' worth in each of the two that the other has not
    generic: bool  # they share no more than a generic stem
    negated: bool  # one has more negations than the other
    numeric: bool  # calculations: both have numbers
    other_numbers: str  # those of one that the other has not, "" for none
    has_choices: bool  # the training question had lettered choices
    difference: str


def suggest(
    pairs: list[tuple[Row, Question]], embedder: Embedder, rarity: Rarity
) -> list[tuple[str, str]]:
    """Return the class that each pair seems to have, and why in one line; never a decision."""
    row_texts = []
    test_texts = []
    for row, question in pairs:
        for row_text, test_text in texts_to_embed(row, question):
            row_texts.append(row_text)
            test_texts.append(test_text)
    products = embedder(row_texts) * embedder(test_texts)  # of unit vectors
    cosines = products.sum(axis=1).reshape(-1, 5).tolist()

    suggestions = []
    for (row, question), five in zip(pairs, cosines, strict=True):
        question_cosine, stem_cosine, fact_cosine, input_cosine, answer_cosine = five
        wording = max(question_cosine, stem_cosine)
        fact = max(fact_cosine, input_cosine)
        measured = Cosines(wording, fact, answer_cosine)
        comparison = compare_pair(row, question, cosines=measured, rarity=rarity)
        suggestions.append(classify(comparison))
    return suggestions


def texts_to_embed(row: Row, question: Question) -> list[tuple[str, str]]:
    """Return the five pairs of texts, a row's and a test question's, whose cosines suggest() uses.

    They are the questions; the last line of the test question; the questions with their answers;
    these with the row's input; the answers.
    """
    bare = bare_of(row)
    answer = short_answer(row["output"], row["instruction"])
    row_fact = f"{bare} {answer}".strip()
    test_fact = f"{question.text} {question.answer}"
    return [
        (bare, question.text),
        (bare, lines_of(question.text)[-1]),
        (row_fact, test_fact),
        (f"{row_fact} {row['input']}".strip(), test_fact),
        (answer, short_answer(question.answer)),
    ]


def compare_pair(row: Row, question: Question, cosines: Cosines, rarity: Rarity) -> Comparison:
    """Compare a training and a test question by their words."""
    bare = bare_of(row)
    row_words = words_of(bare)
    test_words = words_of(question.text)
    row_text = f" {' '.join(row_words)} "
    test_text = f" {' '.join(test_words)} "
    one_in_other = row_text in test_text or test_text in row_text
    order = matcher_of(row_words, test_words).ratio()
    negated = count_negations(row_words) != count_negations(test_words)

    row_content = content_of(bare)
    test_content = content_of(question.text)
    row_alone = rarity.of(row_content.words - test_content.words)
    test_alone = rarity.of(test_content.words - row_content.words)
    row_numbers = row_content.numbers
    test_numbers = test_content.numbers
    has_choices = bare != row["instruction"].strip()
    return Comparison(
        cosines=cosines,
        answers=compare_answers(row, question),
        same_words=row_words == test_words,
        one_in_other=one_in_other,
        order=order,
        replaced=min(row_alone, test_alone),
        generic=rarity.is_generic(bare, question.text),
        negated=negated,
        numeric=bool(row_numbers and test_numbers),
        other_numbers=other_numbers(row_numbers, test_numbers),
        has_choices=has_choices,
        difference=difference(bare, question.text),
    )


def other_numbers(row_numbers: Counter[str], test_numbers: Counter[str]) -> str:
    """Return the numbers of each question that the other has not; "" where both have the same.

    >>> other_numbers(Counter(["30", "7"]), Counter(["60", "7"]))
    '30 -> 60'
    """
    if row_numbers.keys() == test_numbers.keys():
        return ""
    old = ", ".join(sorted(row_numbers - test_numbers)) or "none"
    new = ", ".join(sorted(test_numbers - row_numbers)) or "none"
    return f"{old:.40} -> {new:.40}"


def compare_answers(row: Row, question: Question) -> Answers:
    """Compare the answer of a training row with a test question's right one."""
    answer = short_answer(row["output"], row["instruction"])
    words = words_of(answer)
    terms = [word for word in words if word.isalnum()]
    shown = f"answers: {answer:.60} / {question.answer:.60}"
    return Answers(
        same=ends_in(words, words_of(short_answer(question.answer))),
        brief=0 < len(terms) <= BRIEF,
        spoken=all(word.isalpha() for word in words),
        shown=" ".join(shown.split()),
    )


def short_answer(text: str, question: str = "") -> str:
    r"""Return the end of a solution: a lettered choice's text, what \boxed{} holds, the last line.

    question: where the text of a choice is looked for that the answer names by its letter alone.

    >>> short_answer("The answer is B: wood"), short_answer("So $x=\\boxed{7}$."), short_answer("4")
    ('wood', '7', '4')
    """
    letter = LETTER.fullmatch(text.strip())
    if letter:
        choice = re.search(rf"^\s*\(?{letter[1]}[:.)]\s(.*)", question, re.MULTILINE)
        if choice:
            return choice[1]
        return letter[2] or letter[1]

    ends = BOXED.findall(text)
    if not ends:
        ends = FINAL.findall(text)
    if not ends:
        ends = text.strip().splitlines()
    return ends[-1] if ends else ""


def ends_in(answer: list[str], right: list[str]) -> bool:
    """Tell whether the words of an answer end in the right answer's.

    >>> ends_in(["x", "=", "4"], ["4"]), ends_in(["-", "4"], ["4"])
    (True, False)
    """
    if not right or answer[-len(right) :] != right:
        return False
    before = answer[: -len(right)]
    return not before or before[-1] in ("=", "is")


def count_negations(words: list[str]) -> int:
    """Count the words that turn a question around."""
    return len([word for word in words if word in NEGATIONS])


def matcher_of(a: list[str], b: list[str]) -> difflib.SequenceMatcher:
    """Return what finds the runs of words that two texts share, of their first LONGEST words."""
    return difflib.SequenceMatcher(None, a[:LONGEST], b[:LONGEST], autojunk=False)


def difference(a: str, b: str) -> str:
    """Say what differs between two questions, in words.

    >>> difference("Rotate about the x-axis.", "Rotate about the y axis")
    'differs in 1 of 5 words: x -> y'
    """
    left = words_of(a)
    right = words_of(b)
    changes = []
    count = 0
    for tag, i, j, k, m in matcher_of(left, right).get_opcodes():
        if tag == "equal":
            continue
        old = " ".join(left[i:j]) or "(nothing)"
        new = " ".join(right[k:m]) or "(nothing)"
        changes.append(f"{old} -> {new}")
        count += max(j - i, m - k)

    if not changes:
        return "same words"
    shown = "; ".join(changes[:3])
    more = f"; and {len(changes) - 3} more" if len(changes) > 3 else ""
    longer = max(len(left), len(right))
    return f"differs in {count} of {longer} words: {shown:.160}{more}"


def classify(pair: Comparison) -> tuple[str, str]:
    """Return the class that a pair seems to have, and why: what differs between the questions.

    First by words: equal, nearly equal, or with other numbers. Of the rest, two calculations are
    told apart by wording and answers, two statements by the fact that question and answer state.
    """
    if pair.same_words:
        # A general stem may have other choices: then equal words are not yet one question.
        no_other_choices = not pair.has_choices and not pair.generic
        if pair.numeric or pair.answers.same or no_other_choices:
            return "duplicate", pair.difference
    else:
        found = classify_by_words(pair)
        if found:
            return found
    if pair.numeric:
        return classify_calculation(pair)
    return classify_statement(pair)


def classify_by_words(pair: Comparison) -> tuple[str, str] | None:
    """Return the class, and why, where the words of two questions decide; else None."""
    cosines = pair.cosines
    if pair.one_in_other and not pair.generic and pair.answers.agree:
        return "duplicate", f"one stands in the other; {pair.difference}"

    alike = cosines.wording >= WORDING or pair.order >= HALF
    if pair.numeric and pair.other_numbers and alike:
        return "similar-but-different", f"other numbers: {pair.other_numbers}; {pair.difference}"

    if pair.order < NEARLY_ALL or (pair.generic and not pair.numeric):
        return None
    close_answers = pair.answers.spoken and cosines.answer >= SAME_ANSWER
    if not pair.negated and (pair.answers.agree or close_answers):
        same = "nearly the same words and answer" if pair.answers.same else "nearly the same words"
        return "duplicate", f"{same}; {pair.difference}"
    changed = pair.negated or pair.replaced >= REPLACED or cosines.fact < FACT
    if changed and (pair.numeric or cosines.fact >= SAME_SUBJECT):
        return "similar-but-different", f"{pair.answers.shown}; {pair.difference}"
    return None


def classify_calculation(pair: Comparison) -> tuple[str, str]:
    """Return the class, and why, of two questions with numbers that are not different ones."""
    wording = pair.cosines.wording
    if wording < WORDING and pair.order < HALF:
        return "not-a-leak", f"same subject, another calculation; {pair.difference}"
    if pair.answers.same and not pair.negated:
        return "duplicate", f"same numbers and answer; {pair.difference}"
    if not pair.answers.brief and wording >= SAME_WORDING:
        same = "same numbers and answer" if pair.answers.same else "same numbers"
        return "duplicate", f"{same}; {pair.difference}"
    kind = "similar-but-different" if pair.answers.brief else "gray-area"
    return kind, f"same numbers, {pair.answers.shown}; {pair.difference}"


def classify_statement(pair: Comparison) -> tuple[str, str]:
    """Return the class, and why, of two questions of which one at least is without numbers."""
    cosines = pair.cosines
    same_question = cosines.wording >= SAME_WORDING and not pair.negated and not pair.generic
    if same_question and pair.answers.same:
        return "duplicate", f"same answer; {pair.difference}"
    if cosines.fact >= FACT and not pair.negated:
        return "gray-area", f"alike with its answer ({cosines.fact:.2f}); {pair.answers.shown}"
    if cosines.wording >= CLOSE_WORDING and pair.order >= HALF and cosines.fact >= SAME_SUBJECT:
        changed = "negated" if pair.negated else "another answer"
        return "similar-but-different", f"{changed}; {pair.answers.shown}"
    shared = "a general stem" if pair.generic else "a subject"
    return "not-a-leak", f"{shared} in common; {pair.answers.shown}"


# --- verdicts, the clean set, tables --------------------------------------------------------------


@dataclass(frozen=True)
class Checked:
    """A data set and the pairs that were found in it."""

    inputs: dict[str, Row]  # for apply.json
    rows: list[Row]
    pairs: list[Row]
    test_questions: dict[str, int]  # benchmark/subject -> how many were compared


def read_rows(path: Path) -> list[Row]:
    """Read a training set; rows of other origin, without an id, get one from their content."""
    rows = read_jsonl(path, {"instruction": str, "input": str, "output": str})
    if not rows:
        raise UserError(f"{path}: no rows")
    foreign = []
    for number, row in enumerate(rows, 1):
        for name in ("id", "source"):
            if not isinstance(row.get(name, ""), str):
                raise UserError(f"{path}: row {number} has an id or a source that is not text")
        if "id" not in row:
            row.setdefault("source", path.stem)
            row["origin"] = path.name
            foreign.append(row)
    add_ids(foreign)

    counts = Counter(row["id"] for row in rows)
    repeated = [row_id for row_id, count in counts.items() if count > 1]
    if repeated:
        raise UserError(f"{path}: repeated ids {repeated[:3]}")
    return rows


def check(args: argparse.Namespace, started: float) -> str:
    """Write pairs.jsonl and run.json, then the clean set; return what to print."""
    check_output(args.out, args.overwrite, args.dataset)
    check_listed(check_input(args.dataset, "write it with: python build_dataset.py"))
    files = [args.dataset]
    if args.against:
        files.append(args.against)
    files += [Path(file) for file in args.extra_benchmark.values()]
    inputs = describe_files(files + local_inputs(args))

    rows = read_rows(args.dataset)
    questions = load_questions(args)
    embedder = Embedder(args.embedding_model, args.cache, args.device)
    pairs = find_pairs(rows, questions, embedder, threshold=args.cosine_threshold, paper=args.paper)

    subjects = Counter(question.test_id.rpartition("/")[0] for question in questions)
    counts = {"rows": len(rows), "pairs": len(pairs), "test_questions": subjects}
    pairs_file = args.out / "pairs.jsonl"
    with claim_output(args.out, args.overwrite):
        write_file(pairs_file, to_jsonl(pairs))
        finish_run(
            args,
            inputs=inputs,
            outputs=[pairs_file],
            started=started,
            counts=counts,
            embedding=embedder.described,
        )
        return apply(args, time.monotonic())


def apply_again(args: argparse.Namespace, started: float) -> str:
    """Write the clean set from pairs found before and the verdicts since; return what to print."""
    run_file = args.out / "run.json"
    if not run_file.exists():
        command = shlex.join(["python", "check_contamination.py", "--out", str(args.out)])
        raise UserError(f"{args.out} has no run.json: no pairs were found yet, by {command}")
    read_run(run_file)  # what is broken is refused here, before the folder is marked unfinished
    check_listed(args.out / "pairs.jsonl")
    with claim_output(args.out, overwrite=True, keep_run=True):
        return apply(args, started)


def apply(args: argparse.Namespace, started: float) -> str:
    """Write the clean set, the removed rows, tables and apply.json; return what to print.

    By default a flagged row stays if all its pairs are not-a-leak.
    """
    checked = read_checked(args.out)
    log = args.out / DECISIONS
    # Hashed before it is read: finetune.py and tui.py take a verdict given meanwhile as newer.
    digest = sha256_of(log) if log.exists() else None
    decisions = read_decisions(log)

    gone = removed_ids(checked.pairs, decisions, args.remove)
    clean = [row for row in checked.rows if row["id"] not in gone]
    removed = [{**row, "because": gone[row["id"]]} for row in checked.rows if row["id"] in gone]
    tables = leak_tables(checked, decisions)
    text = as_markdown(tables)
    clean_file = args.out / "clean.jsonl"
    removed_file = args.out / "removed.jsonl"
    table_file = args.out / "table.md"
    write_file(clean_file, to_jsonl(clean))
    write_file(removed_file, to_jsonl(removed))
    write_file(table_file, f"{text}\n")

    ids = {pair["pair_id"] for pair in checked.pairs}
    undecided = sorted(ids - decisions.keys())
    stale = sorted(decisions.keys() - ids)
    finish_run(
        args,
        inputs=checked.inputs,
        outputs=[clean_file, removed_file, table_file],
        started=started,
        name="apply.json",
        decisions_sha256=digest,
        undecided=undecided,
        stale=stale,
        tables=tables,
        counts={"clean": len(clean), "removed": len(removed), "undecided_pairs": len(undecided)},
    )
    lines = [text, "", pairs_line(args.out, len(checked.pairs))]
    lines.append(name_some("undecided pairs", undecided))
    lines.append(name_some("verdicts of former pairs", stale))
    wrote = f"wrote {clean_file}: {len(clean):,} of {len(checked.rows):,} rows."
    lines.append(f"{wrote} Next (with --base-model, if not Llama-2-13B):")
    lines.append(next_command(args.out))
    return "\n".join(lines)


def read_checked(out: Path) -> Checked:
    """Read what `check` wrote, and the data set that it checked, which must be unchanged."""
    run_file = out / "run.json"
    run = read_run(run_file)
    if "dataset" not in run["settings"]:
        raise UserError(f"{run_file} does not name the data set that was checked: check it again")
    dataset = check_input(Path(str(run["settings"]["dataset"])), "the data set that was checked")
    pairs_file = check_listed(out / "pairs.jsonl")

    inputs = describe_files([dataset, pairs_file, run_file])
    recorded = run["inputs"].get(str(dataset), {})
    if recorded.get("sha256") != inputs[str(dataset)]["sha256"]:
        raise UserError(f"{dataset} changed since it was checked: check it with --overwrite")
    return Checked(
        inputs=inputs,
        rows=read_rows(dataset),
        pairs=read_jsonl(pairs_file, PAIR_FIELDS),
        test_questions=run.get("counts", {}).get("test_questions", {}),
    )


def leak_tables(checked: Checked, decisions: dict[str, Row]) -> dict[str, list[Row]]:
    """Count leaks per source, beside the paper's Table 1, per source x benchmark, and per subject.

    Returns {title: lines}; a line is {column: value}.
    """
    sizes = Counter(row.get("source", "") for row in checked.rows)
    by_source: dict[str, list[Row]] = {source: [] for source in sizes}
    by_benchmark = defaultdict(list)
    by_subject = defaultdict(list)
    for pair in checked.pairs:
        source = pair["source"]
        benchmark = pair["benchmark"]
        by_source.setdefault(source, []).append(pair)
        by_benchmark[f"{source} x {benchmark}"].append(pair)
        by_subject[f"{benchmark}/{pair['subject']}"].append(pair)

    sources = leak_table("source", by_source, decisions, sizes=sizes)
    for line in sources:
        line["paper"] = PAPER_LEAKS.get(line["source"], 0)
    benchmarks = leak_table("source x benchmark", by_benchmark, decisions)
    subjects = leak_table("subject", by_subject, decisions, sizes=checked.test_questions)
    return {"source": sources, "source x benchmark": benchmarks, "subject": subjects}


def leak_table(
    title: str,
    groups: dict[str, list[Row]],
    decisions: dict[str, Row],
    sizes: dict[str, int] | None = None,
) -> list[Row]:
    """Return a line of counts for each group of pairs, by name.

    sizes: how many rows or test questions a group has in all, for the column "of".
    """
    lines = []
    for name in sorted(groups):
        line = {title: name}
        if sizes:
            line["of"] = sizes.get(name, "")
        line.update(count_leaks(groups[name], decisions))
        lines.append(line)
    return lines


def count_leaks(pairs: list[Row], decisions: dict[str, Row]) -> dict[str, int]:
    """Count pairs, the rows and test questions in them, and the undecided ones.

    And the test questions of pairs that are suggested to be a duplicate ("duplicate?") and that
    were decided to be one ("duplicate"), which is what the paper counts.
    """
    rows = set()
    tests = set()
    suggested = set()
    decided = set()
    undecided = 0
    for pair in pairs:
        rows.add(pair["train_id"])
        tests.add(pair["test_id"])
        if pair.get("suggested") == "duplicate":
            suggested.add(pair["test_id"])
        decision = decisions.get(pair["pair_id"])
        if decision is None:
            undecided += 1
        elif decision["verdict"] == "duplicate":
            decided.add(pair["test_id"])
    return {
        "pairs": len(pairs),
        "rows": len(rows),
        "test questions": len(tests),
        "duplicate?": len(suggested),
        "duplicate": len(decided),
        "undecided": undecided,
    }


def as_markdown(tables: dict[str, list[Row]]) -> str:
    """Return those of leak_tables() that have lines, as text."""
    parts = []
    for lines in tables.values():
        if lines:
            cells = [list(line.values()) for line in lines]
            parts.append(markdown_table(list(lines[0]), cells))
    return "\n\n".join(parts)


def pairs_line(out: Path, count: int) -> str:
    """Return how many pairs there are, and the command to review them."""
    if not count:
        return "0 pairs"
    command = shlex.join(["python", "tui.py", str(out)])
    return f"{count:,} pairs; to review them: {command}"


def name_some(kind: str, ids: list[str]) -> str:
    """Return how many ids of this kind there are, and the first three.

    >>> name_some("undecided pairs", ["a", "b"]), name_some("undecided pairs", [])
    ('2 undecided pairs (a, b; all in apply.json)', '0 undecided pairs')
    """
    if not ids:
        return f"0 {kind}"
    more = ", ..." if len(ids) > 3 else ""
    return f"{len(ids):,} {kind} ({one_line(', '.join(ids[:3]))}{more}; all in apply.json)"


def main(argv: list[str] | None = None) -> None:
    """Find pairs, then write the clean set; or only the latter."""
    started = time.monotonic()
    args = parse_args(argv)
    if args.command == "check":
        report = check(args, started)
    else:
        report = apply_again(args, started)
    print(report)


if __name__ == "__main__":
    run_main(main)

"""Review flagged pairs, watch a training run, read results, see what to run next: in a terminal.

Reads an output folder (`out`, or one run's): contamination/pairs.jsonl and decisions.jsonl,
adapter/train_log.jsonl, eval/results.json, every step's run.json. Writes verdicts to
decisions.jsonl, each on disk before the next pair is drawn, and nothing else.

    python tui.py --demo
    python tui.py
    python tui.py out/demo --reviewer ann
    python tui.py out/demo/eval --lineage

Without a terminal it prints a summary and ends. --lineage walks from a result back to the rows,
hashes every file again and says what is not as recorded. --demo shows recorded data in a temporary
folder. It starts in a second, needs no GPU and no network, and does not load torch. It follows
files on this machine: a run elsewhere is watched there, over SSH. Of the other scripts it imports
common.py alone.
"""

import argparse
import asyncio
import contextlib
import datetime
import difflib
import fcntl
import functools
import gc
import getpass
import json
import math
import os
import re
import shlex
import shutil
import signal
import string
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

from common import (
    DECISIONS,
    LONGEST_SHOWN,
    UNFINISHED,
    VERDICTS,
    Parser,
    Row,
    UserError,
    append_decision,
    is_decision,
    next_command,
    one_line,
    printable,
    read_object,
    read_records,
    removed_ids,
    run_main,
    sha256_of,
    step_of,
)

try:
    from textual import events
    from textual.app import App, ComposeResult, SystemCommand
    from textual.binding import Binding
    from textual.containers import Container, Horizontal, Vertical, VerticalScroll
    from textual.content import Content
    from textual.geometry import Region, Size
    from textual.message import Message
    from textual.reactive import reactive
    from textual.screen import ModalScreen, Screen
    from textual.scroll_view import ScrollView
    from textual.strip import Strip
    from textual.visual import Visual
    from textual.widgets import ContentSwitcher, Footer, Input, OptionList, Static, Tab, Tabs
    from textual_plotext import PlotextPlot
except ModuleNotFoundError as error:  # run_main(), which says this of the steps, comes too late
    print(f"error: no package {error.name} here: run source .venv/bin/activate", file=sys.stderr)
    sys.exit(2)

Parts = list[tuple[str, str]]  # (text, style): what a pane shows and, joined, what a pipe gets
Span = tuple[int, int]  # of characters: start, end

RECORDED = Path(__file__).with_name("demo") / "recorded"
PAIRS = "contamination/pairs.jsonl"
TRAIN_LOG = "adapter/train_log.jsonl"
RESULTS = "eval/results.json"
RUNS = ("run.json", "apply.json")  # what a step's folder says of the files it read and wrote
STEPS = {  # usual folder -> script, in the order of the pipeline
    "dataset": "build_dataset",
    "contamination": "check_contamination",
    "adapter": "finetune",
    "merged": "merge",
    "eval": "evaluate",
}

LOG_CHUNK = 1 << 19  # bytes of a log parsed at once, some 15 ms: keys are answered in between
LOG_END = 1 << 16  # bytes at the end of a long log, from which the newest state is read first
REMEMBERED = 99  # bytes before the offset in a log that tell whether it was written anew
POLL = 0.5  # seconds between two looks at followed files
POLL_STEPS = 3.0  # seconds between two looks at all steps' folders
LARGEST = 1e15  # a number from here up counts as infinite: no step writes one so large
# Words of a text up to which all are aligned. Time grows with their square: of longer texts, which
# would take seconds, difflib's autojunk leaves out every word that is over 1 % of the text.
ALIGNED = 500
WORD = re.compile(r"\w+|[^\w\s.,;:!?'\"$\\(){}\[\]]")  # what a reader takes for a word or symbol

POINTS = 500  # buckets of a long curve, at least: more than a wide screen has dots
SMOOTHING = 0.95  # weight of the past in the smoothed loss: about the last 20 steps
# A loss is a spike where it is above the smoothed loss by more than both:
SPIKE = 6.0  # standard deviations
SPIKE_SHARE = 0.5  # of the smoothed loss
WARM = 20  # steps before which no loss is called a spike
# A run has stalled when it has written no line for longer than both:
STALL_SECONDS = 60.0
STALL_STEPS = 10  # times the mean seconds of a step
DISK_BYTES = 2e9  # free space below this is "nearly full"
DISK_SHARE = 0.02  # and so is less than this share of the disk
CURVES = {  # metric -> title with its unit
    "loss": "loss, nats per token",
    "learning_rate": "learning rate",
    "grad_norm": "gradient norm",
    "tokens_per_second": "tokens per second",
}


class Look(NamedTuple):
    """How a verdict is drawn; the filling of its bar tells it without colour."""

    letter: str
    colour: str
    filling: str


DIM = "dim"
LOOKS: dict[str | None, Look] = {
    "duplicate": Look("d", "$text-error", "█"),
    "gray-area": Look("g", "$text-warning", "▓"),
    "similar-but-different": Look("s", "$text-primary", "▒"),
    "not-a-leak": Look("n", "$text-success", "░"),
    None: Look("·", "bold", " "),
}
SHORT_NAMES = {"gray-area": "gray", "similar-but-different": "similar", "not-a-leak": "no leak"}
KEYS = {  # key -> verdict and its meaning, in the order of the paper's classes
    "d": ("duplicate", "The same question, perhaps a word changed or moved"),
    "g": ("gray-area", "Not the same, but within general knowledge; for an expert to judge"),
    "s": ("similar-but-different", "A small change that changes the answer"),
    "n": ("not-a-leak", "A false alarm: the row stays in the clean set"),
}
STATUS_LOOKS = {  # status of a step -> sign and colour
    "finished": ("✓", "$text-success"),
    "running": ("▶", "$text-primary"),
    "unfinished": ("✗", "$text-error"),
    "stale": ("!", "$text-warning"),
    "edited": ("!", "$text-error"),
    "not run": ("·", DIM),
}
NO_PAIRS = "Run python check_contamination.py: no flagged pairs here"
NO_LOG = "Run python finetune.py: no training log here"
NO_RESULTS = "Run python evaluate.py: no comparison here"
ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # the last: a lost connection


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the flags of the terminal UI; `folder` exists and `reviewer` is set."""
    parser = Parser(
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    text = "output folder of a pipeline or of one step (default: out)"
    parser.add_argument("folder", nargs="?", type=Path, default=Path("out"), help=text)
    text = "name in the verdicts (default: git's user.name, else $USER)"
    parser.add_argument("--reviewer", metavar="NAME", help=text)
    text = "show recorded pairs, results and a training run; writes to a temporary folder only"
    parser.add_argument("--demo", action="store_true", help=text)
    text = "walk from the folder back to the rows, hash every file again, exit 1 at a difference"
    parser.add_argument("--lineage", action="store_true", help=text)

    args = parser.parse_args(argv)
    if args.demo:
        args.folder = RECORDED
    if not args.folder.is_dir():
        fault = "a file, not a folder" if args.folder.exists() else "not a folder"
        advice = "name an output folder, run bash demo.sh, or look around: python tui.py --demo"
        raise UserError(f"{args.folder} is {fault}; {advice}")
    args.reviewer = one_line(args.reviewer or default_reviewer())
    return args


def default_reviewer() -> str:
    """Return git's user.name, else the name of the user."""
    with contextlib.suppress(OSError):  # no git
        command = ["git", "config", "user.name"]
        name = subprocess.run(command, capture_output=True, text=True).stdout.strip()
        if name:
            return name
    return getpass.getuser()


# --- text -----------------------------------------------------------------------------------------


def text_of(parts: Parts) -> str:
    """Return the text of parts, without their styles."""
    return "".join(text for text, _ in parts)


def number(value: Any) -> float | None:
    """Return a JSON number as a float, infinite from LARGEST up; None for everything else."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    if value >= LARGEST:
        return math.inf
    if value <= -LARGEST:
        return -math.inf
    return float(value)


def finite(value: Any) -> float | None:
    """Return a JSON number as a float; None for NaN, infinity and everything else."""
    known = number(value)
    if known is None or not math.isfinite(known):
        return None
    return known


def short(value: float | None, form: str = ".3g") -> str:
    """Write a number for a narrow place, a dash for none.

    >>> short(1234567.0), short(0.00012345), short(0.4567, ".1%"), short(None)
    ('1,234,567', '0.000123', '45.7%', '–')
    """
    if value is None:
        return "–"
    if form.endswith("g") and 1000 <= abs(value) < LARGEST:
        return f"{value:,.0f}"
    return f"{value:{form}}"


def clock(seconds: float | None) -> str:
    """Write seconds as h:mm:ss.

    >>> clock(3725.2)
    '1:02:05'
    """
    if seconds is None or not math.isfinite(seconds):
        return "–"
    whole = round(min(seconds, 1e9))  # 30 years; timedelta() fails from 2.7 million on
    return str(datetime.timedelta(seconds=whole))


def differing(a: str, b: str) -> tuple[list[Span], list[Span]]:
    """Return where words without a counterpart stand, in `a` and in `b`; case does not count.

    >>> differing("Rotate about the x axis.", "rotate about the y axis")
    ([(17, 18)], [(17, 18)])
    """
    words_a = list(WORD.finditer(a))
    words_b = list(WORD.finditer(b))
    lower_a = [word.group().lower() for word in words_a]
    lower_b = [word.group().lower() for word in words_b]
    is_long = max(len(words_a), len(words_b)) > ALIGNED
    matcher = difflib.SequenceMatcher(None, lower_a, lower_b, autojunk=is_long)

    spans_a: list[Span] = []
    spans_b: list[Span] = []
    for tag, start_a, end_a, start_b, end_b in matcher.get_opcodes():
        if tag == "equal":
            continue
        if start_a < end_a:
            spans_a.append((words_a[start_a].start(), words_a[end_a - 1].end()))
        if start_b < end_b:
            spans_b.append((words_b[start_b].start(), words_b[end_b - 1].end()))
    return spans_a, spans_b


def mark_spans(text: str, spans: list[Span], plain: bool) -> Parts:
    """Set spans of a text in bold and underlined; `plain`, for no colour: in brackets as well."""
    parts = []
    done = 0
    for start, end in spans:
        parts.append((text[done:start], ""))
        marked = text[start:end]
        if plain:
            marked = f"⟦{marked}⟧"
        parts.append((marked, "bold underline $text-warning"))
        done = end
    parts.append((text[done:], ""))
    return parts


def name_three(names: list[str]) -> str:
    """Name the first three, and how many more there are.

    >>> name_three(["a", "b", "c", "d"])
    'a, b, c and 1 more'
    """
    text = ", ".join(one_line(name) for name in names[:3])
    if len(names) > 3:
        text += f" and {len(names) - 3} more"
    return text


# --- files ----------------------------------------------------------------------------------------


def find_file(folder: Path, usual: str) -> Path:
    """Return where a step's file lies, or would; `folder` is the pipeline's or the step's own.

    usual: the file below a pipeline's folder, as "eval/results.json". Where the step's folder has
    another name, it is the one whose file was written last.
    """
    name = Path(usual).name
    for path in (folder / name, folder / usual):
        if path.exists():
            return path
    others = folder.glob(f"*/{name}")
    return max(others, key=lambda path: path.stat().st_mtime, default=folder / usual)


class Stamp(NamedTuple):
    """What changes when a file is written to or replaced."""

    size: int = 0
    modified: int = 0  # ns since 1970
    inode: int = 0


NO_FILE = Stamp()


def stamp_of(path: Path) -> Stamp:
    """Return a file's stamp, or NO_FILE."""
    with contextlib.suppress(FileNotFoundError):
        found = path.stat()
        return Stamp(found.st_size, found.st_mtime_ns, found.st_ino)
    return NO_FILE


def parse_lines(data: bytes) -> tuple[list[Row], int]:
    """Read whole lines of JSONL: (the objects, how many lines are none)."""
    rows = []
    bad = 0
    for line in data.split(b"\n"):
        if not line.strip():
            continue
        row = None
        with contextlib.suppress(ValueError, RecursionError):
            row = json.loads(line)
        if isinstance(row, dict):
            rows.append(row)
        else:
            bad += 1
    return rows, bad


class Tail:
    """Follows a JSONL file: each read() returns the objects on lines that are new.

    The file may be absent, cut, replaced or rewritten in place: `restarted` is then True and it is
    read from its start. A line without its end is left for later; what is no object is `bad`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.offset = 0  # bytes read
        self.before = b""  # the last of them, which must still be there
        self.bad = 0  # lines
        self.seen: Stamp | None = None  # of the file when all of it was read
        self.restarted = False  # by the last read()
        self.more = False  # the last read() found lines, so the next may too

    def read(self, limit: int = LOG_CHUNK) -> list[Row]:
        """Return the next objects, from about `limit` bytes. Raises OSError."""
        self.restarted = False
        self.more = False
        stamp = stamp_of(self.path)
        if stamp == self.seen:
            return []
        if stamp == NO_FILE and self.offset:
            self.restart()

        data = self.read_bytes(limit)
        whole = data[: data.rfind(b"\n") + 1]
        rows, bad = parse_lines(whole)
        self.offset += len(whole)
        self.before = (self.before + whole)[-REMEMBERED:]
        self.bad += bad
        self.more = bool(whole)
        if whole:
            self.seen = None  # there may be more, though the file stays as it is
        else:
            self.seen = stamp
        return rows

    def read_bytes(self, limit: int) -> bytes:
        """Return about `limit` bytes from the offset on: a whole line, if there is one."""
        with contextlib.suppress(FileNotFoundError), self.path.open("rb") as file:
            file.seek(self.offset - len(self.before))
            if file.read(len(self.before)) != self.before:  # cut, replaced or rewritten
                self.restart()
                file.seek(0)
            data = file.read(limit)
            while b"\n" not in data:  # a line longer than the limit, or the end
                more = file.read(len(data))  # doubled, so that a long line is not copied often
                if not more:
                    break
                data += more
            return data
        return b""

    def read_all(self) -> Iterator[Row]:
        """Yield the objects up to the end that the file has now."""
        yield from self.read()
        while self.more:
            yield from self.read()

    def restart(self) -> None:
        """Begin again at the start of the file."""
        self.offset = 0
        self.before = b""
        self.bad = 0
        self.restarted = True


# --- review ---------------------------------------------------------------------------------------

TEXTS = (
    "pair_id",
    "train_id",
    "source",
    "benchmark",
    "subject",
    "test_id",
    "view",
    "detector",
    "train_question",
    "train_answer",
    "test_question",
    "test_answer",
    "suggested",
    "why",
)
LETTERS = string.ascii_uppercase  # of the choices
FACETS = ("source", "benchmark", "subject", "class", "suggested")  # what a filter can name
ORDERS = {  # name -> what pairs are sorted by: fields of pair_order()
    "undecided first": ("decided", "falling cosine"),
    "cosine, high to low": ("falling cosine",),
    "cosine, low to high": ("cosine",),
    "source": ("source", "falling cosine"),
    "benchmark": ("benchmark", "subject", "falling cosine"),
    "class": ("class", "falling cosine"),
    "suggestion": ("suggested", "falling cosine"),
}


def load_pairs(path: Path) -> tuple[list[Row], list[str]]:
    """Read (the flagged pairs, the places that hold none); no file has none. Raises OSError."""
    pairs = []
    bad = []
    if not path.exists():
        return pairs, bad
    for place, row, _ in read_records(path):
        if isinstance(row, dict) and isinstance(row.get("pair_id"), str):
            pairs.append(clean_pair(row))
        else:
            bad.append(place)
    return pairs, bad


def clean_pair(row: Row) -> Row:
    """Return a line of pairs.jsonl with every field as its type; `search` is all of its text."""
    pair: Row = {}
    for name in TEXTS:
        value = row.get(name)
        pair[name] = value if isinstance(value, str) else ""
    texts = list(pair.values())

    choices = row.get("test_choices")
    pair["choices"] = choices if isinstance(choices, list) else []
    pair["cosine"] = finite(row.get("cosine")) or 0.0
    texts += map(str, pair["choices"])
    pair["search"] = "\n".join(texts).lower()
    return pair


def unreadable_text(places: list[str]) -> str:
    """Say how many lines could not be read, and where the first are."""
    return f"{len(places):,} unreadable lines: {', '.join(places[:3])}"


class Verdicts:
    """The decision log as it stands on the disk, other reviewers' lines included."""

    def __init__(self, path: Path, reviewer: str) -> None:
        self.path = path
        self.reviewer = reviewer
        self.tail = Tail(path)
        self.last: dict[str, Row] = {}  # pair_id -> its last line

    def poll(self) -> bool:
        """Read what is new; tell whether there was anything. Raises OSError."""
        changed = False
        while True:
            rows = self.tail.read()
            if self.tail.restarted:
                self.last = {}
            if rows or self.tail.restarted:
                changed = True
            for row in filter(is_decision, rows):
                self.last[row["pair_id"]] = row
            if not self.tail.more:
                return changed

    def of(self, pair: Row) -> str | None:
        """Return the verdict on a pair; None while undecided."""
        return self.last.get(pair["pair_id"], {}).get("verdict")

    def write(self, pair_id: str, change: Row) -> Row:
        """Append a line on a pair; it is on the disk at return.

        change: the new "verdict" (None withdraws it), "note" or both; what it leaves out stays as
        it is. Returns the verdict and note that stood before. Raises OSError, ValueError.
        """
        self.poll()  # another reviewer's line of this moment
        last = self.last.get(pair_id, {})
        before = {"verdict": last.get("verdict"), "note": str(last.get("note") or "")}
        line = {**before, **change}
        append_decision(
            self.path, pair_id, line["verdict"], reviewer=self.reviewer, note=line["note"]
        )
        self.poll()  # what is shown is what the disk holds
        return before


def facet(pair: Row, name: str, verdict: str | None) -> str:
    """Return what a pair has of a field that filters name; `class` is its verdict."""
    if name == "class":
        return verdict or "undecided"
    return one_line(pair[name])


@dataclass(frozen=True)
class HasText:
    """A filter: a word that stands anywhere in a pair."""

    word: str

    def holds(self, pair: Row, verdict: str | None) -> bool:
        """Tell whether a pair passes."""
        return self.word in pair["search"]


@dataclass(frozen=True)
class FacetHas:
    """A filter: one of FACETS, and a part of its value."""

    name: str
    part: str

    def holds(self, pair: Row, verdict: str | None) -> bool:
        """Tell whether a pair with this verdict passes."""
        return self.part in facet(pair, self.name, verdict).lower()


@dataclass(frozen=True)
class CosineWithin:
    """A filter: the least or the largest cosine."""

    least: float = -math.inf
    largest: float = math.inf

    def holds(self, pair: Row, verdict: str | None) -> bool:
        """Tell whether a pair passes."""
        return self.least <= pair["cosine"] <= self.largest


Filter = HasText | FacetHas | CosineWithin


def parse_filters(text: str) -> list[Filter]:
    """Read filters as typed: words, field:part of its value, cosine>0.9; all must hold.

    >>> parse_filters("axis source:ma cosine>0.9")
    [HasText(word='axis'), FacetHas(name='source', part='ma'), CosineWithin(least=0.9, largest=inf)]
    """
    try:
        words = shlex.split(text.lower())
    except ValueError:  # a quote that is still open while one types
        words = text.lower().split()
    return [parse_filter(word) for word in words]


def parse_filter(word: str) -> Filter:
    """Read one filter."""
    bound = re.fullmatch(r"cosine:?([<>])=?(\d*\.?\d+)", word)
    if bound and bound[1] == ">":
        return CosineWithin(least=float(bound[2]))
    if bound:
        return CosineWithin(largest=float(bound[2]))
    name, _, part = word.partition(":")
    if name in FACETS and part:
        return FacetHas(name, part)
    return HasText(word)


def select_pairs(pairs: list[Row], verdicts: Verdicts, text: str, order: str) -> list[Row]:
    """Return the pairs that pass the filters typed as `text`, sorted by one of ORDERS."""
    filters = parse_filters(text)
    fields = ORDERS[order]
    kept = []
    for pair in pairs:
        verdict = verdicts.of(pair)
        if all(condition.holds(pair, verdict) for condition in filters):
            kept.append(pair)
    kept.sort(key=lambda pair: pair_order(pair, verdicts.of(pair), fields))
    return kept


def pair_order(pair: Row, verdict: str | None, fields: Iterable[str]) -> list[Any]:
    """Return the values that a pair is sorted by."""
    values: list[Any] = []
    for field in fields:
        if field == "decided":
            values.append(verdict is not None)
        elif field == "class":
            values.append(verdict or "")
        elif field == "falling cosine":
            values.append(-pair["cosine"])
        else:
            values.append(pair[field])
    return values


def removed_rows(pairs: list[Row], verdicts: Verdicts) -> set[str]:
    """Return the train_ids that `apply` would remove by default."""
    decided = {pair_id: line for pair_id, line in verdicts.last.items() if line["verdict"]}
    return set(removed_ids(pairs, decided))


def apply_command(folder: Path) -> str:
    """Return the command that writes the clean set anew, by the verdicts in a folder."""
    return shlex.join(["python", "check_contamination.py", "apply", "--out", str(folder)])


def review_parts(pairs: list[Row], verdicts: Verdicts, folder: Path, width: int = 30) -> Parts:
    """Say how many pairs are decided, and how; at the end, what `apply` would remove.

    pairs: at least one; width: columns of the bar.
    """
    counts = Counter(verdicts.of(pair) for pair in pairs)
    decided = len(pairs) - counts[None]
    parts = [(f"{decided:,} of {len(pairs):,} decided ", "bold")]
    parts += bar_parts(counts, width)
    for verdict in VERDICTS:
        name = verdict.removesuffix("-but-different")
        parts.append((f"  {name} {counts[verdict]:,}", LOOKS[verdict].colour))

    if decided == len(pairs):
        gone = len(removed_rows(pairs, verdicts))
        rows = len({pair["train_id"] for pair in pairs})
        parts.append((f"\nAll decided: {gone:,} of the {rows:,} flagged rows would go. Next: ", ""))
        parts.append((printable(apply_command(folder)), "bold"))
    return parts


def bar_parts(counts: Counter[str | None], width: int) -> Parts:
    """Draw each verdict's share of all pairs in `width` columns; dots for what is undecided."""
    parts = []
    pairs = 0
    drawn = 0  # columns
    for verdict in VERDICTS:
        pairs += counts[verdict]
        end = round(width * pairs / counts.total())
        look = LOOKS[verdict]
        parts.append((look.filling * (end - drawn), look.colour))
        drawn = end
    parts.append(("·" * (width - drawn), DIM))
    return parts


class PairParts(NamedTuple):
    """A pair as Review shows it."""

    head: Parts
    train: Parts
    test: Parts


def pair_parts(pair: Row, line: Row, plain: bool) -> PairParts:
    """Show a pair and the last line on it in the log; words that differ are marked.

    The choices are compared only where most of them stand in the training text too.
    """
    train = printable(pair["train_question"])
    question = printable(pair["test_question"])
    choices = [one_line(choice, 500) for choice in pair["choices"][: len(LETTERS)]]
    test = question
    for letter, choice in zip(LETTERS, choices, strict=False):
        test += f"\n{letter}) {choice}"
    compared = test if stand_in(train, choices) else question
    train_spans, test_spans = differing(train, compared)

    train_parts = side_parts(
        title="TRAINING",
        origin=pair["source"],
        question=mark_spans(train, train_spans, plain),
        answer=pair["train_answer"],
    )
    test_parts = side_parts(
        title="BENCHMARK",
        origin=pair["test_id"],
        question=mark_spans(test, test_spans, plain),
        answer=pair["test_answer"],
    )
    return PairParts(head_parts(pair, line), train_parts, test_parts)


def stand_in(text: str, choices: list[str]) -> bool:
    """Tell whether most choices stand in a text."""
    text = text.lower()
    found = [choice for choice in choices if choice.lower() in text]
    return len(found) > len(choices) / 2


def head_parts(pair: Row, line: Row) -> Parts:
    """Say what is known of a pair; line: the last on it in the log, or {}."""
    verdict = line.get("verdict")
    parts = [(verdict or "undecided", f"bold {LOOKS[verdict].colour}")]
    for word, key in (("by", "reviewer"), ("at", "time"), ("note:", "note")):
        # While undecided only the note is shown: the line's reviewer is who took the verdict back.
        if line.get(key) and (verdict or key == "note"):
            parts.append((f" {word} {one_line(line[key])}", ""))

    suggested = one_line(pair["suggested"]) or "nothing"
    parts += [("\nsuggested ", DIM), (suggested, "bold"), (f": {one_line(pair['why'])}", "")]
    parts += [("\ncosine ", DIM), (f"{pair['cosine']:.4f}", "bold")]
    parts.append((f" by {one_line(pair['detector'])} of {one_line(pair['view'])}", DIM))
    return parts


def side_parts(title: str, origin: str, question: Parts, answer: str) -> Parts:
    """Show one side of a pair: its question, marked, and its answer."""
    parts = [(title, "bold reverse"), (f" {one_line(origin)}\n", DIM)]
    parts += question
    parts += [("\n\nANSWER ", "bold"), (printable(answer), "")]
    return parts


# --- watch ----------------------------------------------------------------------------------------


class Bucket(NamedTuple):
    """Neighbouring steps of a curve: the first step, the lowest and the highest value."""

    step: float
    low: float
    high: float


class Curve:
    """A metric over steps in at most 2 x POINTS buckets.

    When full, neighbours are joined: a spike outlives any number of halvings.
    """

    def __init__(self) -> None:
        self.buckets: list[Bucket] = []
        self.stride = 1  # values of a full bucket
        self.filled = 0  # values of the last one

    def add(self, step: float, value: float) -> None:
        """Take the value of a later step."""
        if self.buckets and self.filled < self.stride:
            last = self.buckets[-1]
            self.buckets[-1] = Bucket(last.step, min(last.low, value), max(last.high, value))
            self.filled += 1
            return
        if len(self.buckets) == 2 * POINTS:
            pairs = zip(self.buckets[::2], self.buckets[1::2], strict=True)
            self.buckets = [
                Bucket(first.step, min(first.low, second.low), max(first.high, second.high))
                for first, second in pairs
            ]
            self.stride *= 2
        self.buckets.append(Bucket(step, value, value))
        self.filled = 1

    def forget_from(self, step: float) -> None:
        """Drop a step and what follows."""
        self.buckets = [bucket for bucket in self.buckets if bucket.step < step]


@dataclass
class Alarm:
    """A kind of fault: the first and the last step that had it, and how many had."""

    first: float
    last: float
    count: int = 0


class RunLog:
    """What a training log tells, taken line by line in constant memory."""

    def __init__(self) -> None:
        self.curves = {name: Curve() for name in (*CURVES, "smoothed")}
        self.latest: dict[str, float | None] = {}  # the newest step's numbers
        self.events: deque[Row] = deque(maxlen=1000)
        self.alarms: dict[str, Alarm] = {}
        self.steps = 0  # lines that are steps
        self.tokens = 0.0
        self.supervised = 0.0  # those of them that the loss counts
        self.mean = 0.0  # of the loss, exponentially weighted
        self.variance = 0.0
        self.planned: float | None = None  # steps, by the log's start
        self.ended = False

    def add(self, row: Row) -> None:
        """Take one line of the log, an event or a step."""
        if "event" in row:
            self.add_event(row)
            return
        step = finite(row.get("step"))
        if step is None:
            return
        if step <= (self.latest.get("step") or 0):  # a resumed run writes its steps again
            for curve in self.curves.values():
                curve.forget_from(step)
        self.add_step(step, {name: number(value) for name, value in row.items()})

    def add_event(self, row: Row) -> None:
        """Keep an event; the first tells how long the run will be, the last that it is over."""
        self.events.append(row)
        self.ended = row["event"] == "end"
        if row["event"] == "start":
            self.planned = number(row.get("steps")) or number(row.get("total_steps"))

    def add_step(self, step: float, row: dict[str, float | None]) -> None:
        """Add a step to the curves, the sums and the alarms."""
        self.latest = row
        self.steps += 1
        self.ended = False
        self.tokens += row.get("tokens") or 0
        self.supervised += row.get("supervised_tokens") or 0

        for name in CURVES:
            value = row.get(name)
            if value is not None and math.isfinite(value):
                self.curves[name].add(step, value)
                if name == "loss":
                    self.smooth(step, value)
            elif name in row and name in ("loss", "grad_norm"):  # null too: JSON has no NaN
                self.alarm(f"{name.replace('_', ' ')} is NaN or infinite", step)
        if row.get("supervised_tokens") == 0:
            self.alarm("no supervised tokens", step)

    def smooth(self, step: float, loss: float) -> None:
        """Follow the loss's mean and variance; far above them is a spike."""
        past = min(1 - 1 / self.steps, SMOOTHING)  # at first a plain mean
        margin = max(SPIKE * math.sqrt(self.variance), SPIKE_SHARE * abs(self.mean))
        if self.steps > WARM and loss > self.mean + margin:
            self.alarm("loss spike", step)
        change = loss - self.mean
        self.mean += (1 - past) * change
        self.variance = past * (self.variance + (1 - past) * change * change)
        self.curves["smoothed"].add(step, self.mean)

    def alarm(self, kind: str, step: float) -> None:
        """Count an alarm of this kind."""
        alarm = self.alarms.setdefault(kind, Alarm(step, step))
        alarm.last = step
        alarm.count += 1

    def total(self) -> float | None:
        """Return how many steps the run will have: as planned, else by the time that is left."""
        if self.planned:
            return self.planned
        step = self.latest.get("step")
        seconds = self.latest.get("seconds")
        eta = self.latest.get("eta_seconds")
        if not (step and seconds and eta):
            return None
        return step * (1 + eta / seconds)


def read_end(path: Path) -> RunLog:
    """Read the newest state of a log from its last lines; it is longer than LOG_END bytes."""
    log = RunLog()
    with path.open("rb") as file:
        file.seek(-LOG_END, os.SEEK_END)
        rows, _ = parse_lines(file.read())  # the first of them is cut, and so none
    for row in rows:
        log.add(row)
    return log


def alarms_of(log: RunLog, path: Path, now: float) -> list[str]:
    """Return the alarms of the run that writes `path`; now: seconds since 1970. Raises OSError."""
    texts = []
    for kind, alarm in log.alarms.items():
        text = f"{kind} at step {alarm.first:,.0f}"
        if alarm.count > 1:
            text += f", {alarm.count:,} times to step {alarm.last:,.0f}"
        texts.append(text)

    stall = stall_of(log, path, now)
    if stall:
        texts.append(stall)
    disk = shutil.disk_usage(path.parent)
    if disk.free < max(DISK_BYTES, DISK_SHARE * disk.total):
        texts.append(f"disk nearly full: {disk.free / 1e9:.1f} GB free")
    return texts


def stall_of(log: RunLog, path: Path, now: float) -> str:
    """Say for how long a run that is not over has written no line; "" if that is usual."""
    finished = (path.parent / "run.json").exists() and not (path.parent / UNFINISHED).exists()
    if log.ended or finished:
        return ""
    step_seconds = (log.latest.get("seconds") or 0) / (log.latest.get("step") or 1)
    silent = now - path.stat().st_mtime
    if silent <= max(STALL_SECONDS, STALL_STEPS * step_seconds):
        return ""
    minutes = clock(silent // 60 * 60)  # whole ones: not a new text each second
    return f"stalled: no line for {minutes}, a step took {step_seconds:.2g} s"


def run_parts(log: RunLog) -> Parts:
    """Say in three lines how a run stands."""
    row = log.latest
    if not row:
        return [(NO_LOG, "bold")]
    progress = {
        "step": step_text(log),
        "epoch": short(row.get("epoch")),
        "ETA": "ended" if log.ended else clock(row.get("eta_seconds")),
        "run for": clock(row.get("seconds")),
    }
    learning = {
        "loss": f"{short(row.get('loss'), '.4g')}, smoothed {short(log.mean, '.4g')}",
        "rate": short(row.get("learning_rate")),
        "grad norm": short(row.get("grad_norm")),
        "tokens/s": short(row.get("tokens_per_second")),
    }
    machine = {
        "supervised": f"{log.supervised:,.0f} of {log.tokens:,.0f} tokens",
        "MFU": short(row.get("mfu"), ".1%"),
        "memory GB": short(row.get("memory_gb")),
        "GPU %": short(row.get("gpu_util")),
    }
    parts = []
    gap = ""
    for line in (progress, learning, machine):
        for name, value in line.items():
            parts += [(f"{gap}{name} ", DIM), (value, "bold")]
            gap = "  "
        gap = "\n"
    return parts


def step_text(log: RunLog) -> str:
    """Say at which step a run is, and of how many where that is known."""
    step = log.latest.get("step")
    total = log.total()
    if not (step and total):
        return short(step)
    return f"{short(step)} of {total:,.0f}, {step / total:.0%}"


def event_text(row: Row) -> str:
    """Write an event on one line: its step, its name, the other fields as written, a prompt last.

    >>> event_text({"event": "sample", "step": 40, "text": "Hello"})
    '     40  sample  text Hello'
    """
    fields = []
    for name, value in row.items():
        if name in ("event", "step", "prompt"):
            continue
        amount = number(value)
        text = one_line(value, 600) if amount is None else short(amount, ".4g")
        fields.append(f"{one_line(name)} {text}")
    if "prompt" in row:
        end = str(row["prompt"])[-150:]  # all prompts begin alike
        fields.append(f"prompt {one_line(end)}")

    step = short(number(row.get("step")))
    return printable(f"{step:>7}  {one_line(row['event'])}  {'  '.join(fields)}")


def draw_curves(
    plt: Any, title: str, curves: list[tuple[list[Bucket], str]], logarithmic: bool
) -> None:
    """Draw (buckets, colour) of each curve with few, round labels; plt is plotext's figure."""
    plt.clear_figure()
    steps: list[float] = []
    heights: list[float] = []
    for buckets, colour in curves:
        xs, ys = curve_points(buckets, logarithmic)
        plt.plot(xs, ys, color=colour, marker="braille")
        steps += xs
        heights += ys

    if steps:  # plotext cannot place a tick where there is no point
        places = even_places(steps)
        plt.xticks(places, [f"{place:,.0f}" for place in places])
        places = even_places(heights)
        values = [10**place for place in places] if logarithmic else places
        plt.yticks(places, [short(value) for value in values])
    title += ", by step"
    if logarithmic:
        title += " (log scale)"
    plt.title(title)


def curve_points(buckets: list[Bucket], logarithmic: bool) -> tuple[list[float], list[float]]:
    """Return (steps, heights) of a curve's points: one for each bucket, or its lowest and highest.

    The logarithm to base 10, of positive values only, is the height on a logarithmic scale.
    """
    steps = []
    heights = []
    for bucket in buckets:
        for value in sorted({bucket.low, bucket.high}):
            if logarithmic and value <= 0:
                continue
            steps.append(bucket.step)
            heights.append(math.log10(value) if logarithmic else value)
    return steps, heights


def even_places(values: list[float]) -> list[float]:
    """Return four places at even distances from the lowest value to the highest."""
    low = min(values)
    high = max(values)
    return [low + (high - low) * part / 3 for part in range(4)]


# --- results --------------------------------------------------------------------------------------

NUMBERS = (
    "base_score",
    "score",
    "points",
    "percent",
    "p",
    "gained",
    "lost",
    "points_unflagged",
    "points_flagged",
)
RESULT_ORDERS = ("benchmarks, then subjects", "largest gain first", "largest loss first", "name")
TABLE = "{:23.23} {:>8} {:>5} {:>5} {:13} {:19.19}"  # 78 columns
MORE = "{:>8} {:>16} {:>6} {:>6} {:>9} {:>8}"
WIDE = 138  # columns of a terminal that shows both: 78 + 58, a scrollbar and one to spare


def load_results(path: Path) -> list[Row]:
    """Read the comparisons of results.json; [] without any. Raises UserError, OSError."""
    if not path.exists():
        return []
    try:
        comparisons = json.loads(path.read_bytes()).get("comparisons") or []
        return [clean_comparison(row) for row in comparisons]
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} is no results.json of evaluate.py: {one_line(error)}") from None


def clean_comparison(row: Row) -> Row:
    """Return a comparison with texts printable, numbers finite or None.

    `low` and `high` are the interval's ends; `change` is percent, or points where the base has no
    score.
    """
    values: Row = {name: finite(row.get(name)) for name in NUMBERS}
    for name in ("model", "base", "task", "verdict"):
        values[name] = one_line(row.get(name))
    low, high = row.get("interval") or (None, None)
    values["low"] = finite(low)
    values["high"] = finite(high)
    change = values["points"] if values["percent"] is None else values["percent"]
    values["change"] = change or 0.0
    return values


def result_order(row: Row, order: str) -> list[Any]:
    """Return what a result is sorted by in one of RESULT_ORDERS; an average is always the first."""
    task = row["task"]
    values: list[Any] = [task != "average"]
    if order == "name":
        values.append(task)
    elif order == "largest gain first":
        values.append(-row["change"])
    elif order == "largest loss first":
        values.append(row["change"])
    else:
        values += ["/" in task, -row["change"]]
    return values


def result_parts(rows: list[Row], order: str, wide: bool) -> Parts:
    """Show the changes over the base as a table with bars; `wide` adds the last columns."""
    if not rows:
        return [(f"{NO_RESULTS}\n", "bold")]
    largest = max(abs(row["change"]) for row in rows)
    head = TABLE.format("task", "change", "base", "score", "", "paired test")
    if wide:
        head += MORE.format("p", "95 % of points", "gained", "lost", "unflagged", "flagged")
    groups = defaultdict(list)
    for row in rows:
        groups[row["base"], row["model"]].append(row)

    parts = []
    for (base, model), group in groups.items():
        parts.append((f"{model} over {base}, sorted by {order}\n", "bold"))
        parts.append((f"{head}\n", DIM))
        for row in sorted(group, key=lambda row: result_order(row, order)):
            parts += result_line(row, largest, wide)
    return parts


def result_line(row: Row, largest: float, wide: bool) -> Parts:
    """Show one change over the base; largest: the change that has the longest bar."""
    name = row["task"].removeprefix("mmlu/")
    unit = " pt" if row["percent"] is None else "%"
    change = f"{row['change']:+.1f}{unit}"
    base = short(row["base_score"], ".1f")
    score = short(row["score"], ".1f")
    bar = change_bar(row["change"], largest, half=6)
    colours = {"better": "$text-success", "worse": "$text-error"}
    colour = colours.get(row["verdict"], "")
    line = TABLE.format(name, change, base, score, bar, row["verdict"])
    if not wide:
        return [(line, colour), ("\n", "")]

    interval = f"{short(row['low'], '+.1f')} to {short(row['high'], '+.1f')}"
    gained = short(row["gained"], ".0f")
    lost = short(row["lost"], ".0f")
    unflagged = short(row["points_unflagged"], "+.1f")
    flagged = short(row["points_flagged"], "+.1f")
    more = MORE.format(short(row["p"], ".2g"), interval, gained, lost, unflagged, flagged)
    return [(line, colour), (f"{more}\n", "")]


def change_bar(value: float, largest: float, half: int) -> str:
    """Draw a bar from the middle: to the left below zero, to the right above.

    >>> change_bar(1.0, 2.0, 4), change_bar(-2.0, 2.0, 4)
    ('    │██  ', '████│    ')
    """
    filled = "█" * round(half * abs(value) / (largest or 1))
    if value < 0:
        return f"{filled:>{half}}│{'':{half}}"
    return f"{'':{half}}│{filled:<{half}}"


# --- pipeline -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StepState:
    """How one step's folder stands."""

    script: str
    folder: Path
    status: str  # one of STATUS_LOOKS
    command: str  # that begins, mends or repeats it
    counts: str = ""
    why: str = ""
    whole: bool = False  # of lineage(): finished, and every file is as recorded


def is_step(folder: Path) -> bool:
    """Tell whether a step has finished or begun a folder."""
    return any(os.path.exists(folder / name) for name in ("run.json", UNFINISHED))


def script_of(folder: Path) -> str:
    """Name the step that finished or began a folder; by its name where run.json is broken."""
    mark = folder / UNFINISHED
    if mark.exists():
        began = re.search(r"(\w+)\.py", mark.read_text(errors="replace"))
        if began:
            return began[1]
    return one_line(step_of(folder) or STEPS.get(folder.name, "?"))


def is_held(mark: Path) -> bool:
    """Tell whether a living process holds a step's folder; lets go of it at once."""
    with contextlib.suppress(FileNotFoundError, PermissionError), mark.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def files_of(folder: Path, kind: str) -> dict[str, Any]:
    """Return {name: sha256} of the "inputs" or "outputs" that a step has recorded."""
    found: dict[str, Any] = {}
    for record in RUNS:
        listed = read_object(folder / record).get(kind)
        if not isinstance(listed, dict):
            continue
        for name, described in listed.items():
            found[name] = described.get("sha256") if isinstance(described, dict) else None
    return found


def find_input(name: str, folder: Path) -> Path:
    """Return where an input of a step lies, or should lie.

    A relative name is looked for from the step's folder and those above it, and only then from the
    current folder and those above: so a copied chain of steps is walked within the copy. A name
    with a folder stands for its place beside a run.json even where the file is missing: the step
    that wrote it is there, and a file of this name elsewhere is another one.
    """
    for parent in (folder, *folder.parents, Path(), *Path.cwd().parents):
        path = os.path.join(parent, name)
        if os.path.isfile(path):
            return Path(path)
        record = os.path.join(os.path.dirname(path), "run.json")
        if os.path.dirname(name) and os.path.exists(record):
            return Path(path)
    return Path(name)


def walk_back(folder: Path, known: dict[Path, StepState | None]) -> None:
    """Add a step's state to `known`, behind those that it came from.

    known: {resolved folder: state, or None while the steps behind it are walked}.
    """
    if not is_step(folder) or folder.resolve() in known:
        return
    key = folder.resolve()
    known[key] = None  # so that a ring of inputs ends
    places = {name: find_input(name, folder) for name in files_of(folder, "inputs")}
    for place in places.values():
        walk_back(place.parent, known)
    del known[key]  # the key moves to the end, behind those that the walk has added
    known[key] = step_state(folder, places, known)


def pipeline_states(folder: Path) -> list[StepState]:
    """Return every step's folders in order; `folder` is the pipeline's, or one step's own.

    Reads only. Raises OSError.
    """
    root = folder.absolute().parent if is_step(folder) else folder
    known: dict[Path, StepState | None] = {}
    folders = sorted(root.iterdir())
    for path in folders:
        walk_back(path, known)
    here = {path.resolve() for path in folders}
    found = [state for path, state in known.items() if path in here]

    states: list[StepState] = []
    for name, script in STEPS.items():
        mine = [state for state in found if state.script == script]
        if not mine:
            before = states[-1] if states else None
            mine = [missing_state(script, root / name, before)]
        states += mine
    return states


def bare_command(script: str, folder: Path) -> str:
    """Return the command of a step of which nothing is known but its folder."""
    return shlex.join(["python", f"{script}.py", "--out", str(folder)])


def missing_state(script: str, folder: Path, before: StepState | None) -> StepState:
    """Return the state of a step that has no folder; it goes on from the step before, if it can."""
    command = ""
    if before and before.status == "finished":
        command = next_command(before.folder)
    if not command:
        command = bare_command(script, folder)
    return StepState(script, folder, status="not run", command=command)


def step_state(
    path: Path, places: dict[str, Path], known: dict[Path, StepState | None]
) -> StepState:
    """Return the state of one folder, with its reason.

    It is stale where the step that wrote an input has recorded another sha256 since, or is not
    finished. places: where the inputs lie; known: the states of those steps. Nothing but the
    verdicts is hashed.
    """
    run = read_object(path / "run.json")
    script = script_of(path)
    state = StepState(
        script,
        path,
        status="finished",
        command=str(run.get("command") or bare_command(script, path)),
        counts=counts_text(run),
        why=one_line(run.get("finished")),
    )
    if (path / UNFINISHED).exists():
        return begun_state(state)
    if "--overwrite" not in state.command:
        state = replace(state, command=f"{state.command} --overwrite")
    if not run:
        return replace(state, status="unfinished", why="its run.json is not readable")
    renewed = renewed_input(path, places, known)
    if renewed:
        return replace(state, status="stale", why=renewed)
    if verdicts_are_newer(path):
        why = "verdicts newer than clean.jsonl"
        return replace(state, status="stale", why=why, command=apply_command(path))
    return state


def begun_state(state: StepState) -> StepState:
    """Return the state of a folder that a step holds, or held when it was stopped."""
    mark = state.folder / UNFINISHED
    command = mark.read_text(errors="replace").strip() or state.command
    if is_held(mark):
        return replace(state, status="running", why="a process is at work", command=command)
    # finetune.py's mark has the flag, but one that was killed as it wrote the mark left it empty.
    if any(state.folder.glob("checkpoints/*")) and "--resume" not in command:
        command += " --resume"
    why = "no process is at work on it: it was stopped or killed"
    return replace(state, status="unfinished", why=why, command=command)


def counts_text(run: Row) -> str:
    """Write the first four numbers that a run.json counts.

    >>> counts_text({"counts": {"rows": 1234, "flagged_pairs": 3}, "partial": True})
    '1,234 rows, 3 flagged pairs, partial'
    """
    counts = run.get("counts")
    if not isinstance(counts, dict):
        counts = {}
    shown = []
    for name, value in counts.items():
        amount = number(value)
        if amount is not None:
            shown.append(f"{amount:,.0f} {one_line(name, 20)}")
    shown = shown[:4]
    if run.get("partial"):
        shown.append("partial")
    return ", ".join(shown).replace("_", " ")


def renewed_input(path: Path, places: dict[str, Path], known: dict[Path, StepState | None]) -> str:
    """Say which input of a step is not what it was; "" where each is."""
    behind = ""
    for name, sha256 in files_of(path, "inputs").items():
        place = places[name]
        if not is_step(place.parent):
            continue
        if files_of(place.parent, "outputs").get(place.name, sha256) != sha256:
            return f"made again since: {one_line(name)}"
        state = known.get(place.parent.resolve())
        if state and state.status != "finished":
            behind = f"made from {one_line(state.folder)}, which is {state.status}"
    return behind


def verdicts_are_newer(path: Path) -> bool:
    """Tell whether a folder of step 2 has verdicts that its clean set was not made with."""
    applied = read_object(path / "apply.json")
    if "decisions_sha256" not in applied:  # no folder of step 2, or an edited one
        return False
    log = path / DECISIONS
    now = sha256_of(log) if log.exists() else None
    return applied["decisions_sha256"] != now


def lineage(folder: Path) -> list[StepState]:
    """Return the steps that a folder's files came from, rows first, all hashed again.

    Every input in a run.json leads to the folder it lies in. Of a folder of steps: all of them.
    """
    known: dict[Path, StepState | None] = {}
    if is_step(folder):
        walk_back(folder, known)
    else:
        for state in pipeline_states(folder):
            walk_back(state.folder, known)
    if not known:
        raise UserError(f"{folder} is no step's folder and holds none: name one, such as out/eval")
    hashes: dict[Path, str] = {}
    return [hash_again(state, hashes) for state in known.values()]


def hash_again(state: StepState, hashes: dict[Path, str]) -> StepState:
    """Return a step's state once all that it read or wrote is hashed; `hashes` are known ones."""
    if state.status in ("running", "unfinished"):
        return state
    outputs = files_of(state.folder, "outputs")
    edited = []
    for name, sha256 in outputs.items():
        if hash_of(state.folder / name, hashes) != sha256:
            edited.append(name)
    inputs = files_of(state.folder, "inputs")
    changed = []
    for name, sha256 in inputs.items():
        if hash_of(find_input(name, state.folder), hashes) != sha256:
            changed.append(name)

    if edited:
        return replace(state, status="edited", why=f"edited or gone: {name_three(edited)}")
    if changed:
        return replace(state, status="stale", why=f"changed since, or gone: {name_three(changed)}")
    if state.status != "finished":
        return state
    why = f"{len(inputs) + len(outputs):,} files as recorded, by hash"
    return replace(state, why=why, whole=True)


def hash_of(path: Path, hashes: dict[Path, str]) -> str | None:
    """Return the sha256 of a file, each hashed once; None where there is none."""
    if not os.path.isfile(path):
        return None
    key = path.resolve()
    if key not in hashes:
        hashes[key] = sha256_of(key)
    return hashes[key]


def step_parts(states: list[StepState]) -> Parts:
    """Show each step with its state and reason, in two lines."""
    parts = []
    for state in states:
        sign, colour = STATUS_LOOKS[state.status]
        parts.append((f"{sign} {state.status:<11}", colour))
        parts.append((f"{state.script:<20}", "bold"))
        parts.append((f"{state.counts}\n", ""))
        parts.append((f"{'':13}{one_line(state.folder)}  {state.why}\n", DIM))
    return parts


def first_unfinished(states: list[StepState]) -> StepState | None:
    """Return the first step that needs something, if any."""
    for state in states:
        if state.status != "finished":
            return state
    return None


def command_to_run(states: list[StepState]) -> str:
    """Return what to run next; "" where there is nothing to run now."""
    state = first_unfinished(states)
    if not state or state.status == "running":
        return ""
    return printable(state.command)


def next_parts(states: list[StepState]) -> Parts:
    """Say what to run next, or why nothing."""
    label = ("\nnext  ", DIM)
    command = command_to_run(states)
    if command:
        return [label, (command, "bold")]
    running = first_unfinished(states)
    if running:
        return [label, (f"wait for {running.script}.py, which is running", "")]
    text = "nothing: all steps are finished"
    left = sum(count_undecided(state.folder) for state in states)
    if left:
        text += f"; {left:,} pairs are undecided: review them, then apply"
    return [label, (text, "")]


def pipeline_parts(states: list[StepState]) -> Parts:
    """Show the steps with their state and reason, then what to run next."""
    return step_parts(states) + next_parts(states)


def count_undecided(folder: Path) -> int:
    """Return how many pairs of step 2 had no verdict when its clean set was written."""
    counts = read_object(folder / "apply.json").get("counts")
    if not isinstance(counts, dict):
        return 0
    count = counts.get("undecided_pairs")
    return count if type(count) is int else 0


# --- summary --------------------------------------------------------------------------------------

LONGEST_SUMMARY = 10**6  # characters


def summary(folder: Path) -> str:
    """Write pairs, verdicts, training, results and the next command, for a pipe or a log."""
    parts = review_summary(folder)
    parts.append(("\n\n", ""))
    parts += watch_summary(folder)
    parts.append(("\n\n", ""))
    rows = load_results(find_file(folder, RESULTS))
    parts += result_parts(rows, RESULT_ORDERS[0], wide=True)
    parts.append(("\n", ""))
    parts += pipeline_parts(pipeline_states(folder))
    return printable(text_of(parts), LONGEST_SUMMARY)


def review_summary(folder: Path) -> Parts:
    """Say how the review stands."""
    path = find_file(folder, PAIRS)
    pairs, bad = load_pairs(path)
    verdicts = Verdicts(path.with_name(DECISIONS), reviewer="")
    verdicts.poll()
    parts = [(NO_PAIRS, "bold")]
    if pairs:
        parts = [(f"{len(pairs):,} flagged pairs in {one_line(path.parent)}, ", "")]
        parts += review_parts(pairs, verdicts, path.parent)
    if bad:
        parts.append((f"\n\n{unreadable_text(bad)}", ""))
    return parts


def watch_summary(folder: Path) -> Parts:
    """Say how the training run stands."""
    path = find_file(folder, TRAIN_LOG)
    log = RunLog()
    for row in Tail(path).read_all():
        log.add(row)
    parts = run_parts(log)
    if log.latest:
        for text in alarms_of(log, path, time.time()):
            parts.append((f"\nALARM: {text}", ""))
    return parts


# --- widgets --------------------------------------------------------------------------------------

MOVES = {  # keys -> by how many lines, and its name
    "down,j": (1, "Down"),
    "up,k": (-1, "Up"),
    "pagedown,ctrl+d": (10, "10 down"),
    "pageup,ctrl+u": (-10, "10 up"),
    "home": (-(10**9), "First"),
    "end,G": (10**9, "Last"),
}
# Actions after which the next key means something else, such as a letter of a filter. Keys arrive
# together over a slow link, and Textual puts each into the queue of the widget with the focus; only
# a binding with priority acts before the next key is sent to one.
AT_ONCE = ("filter", "note", "mark", "fields", "leave")


def footer_key(keys: str, action: str, name: str, tooltip: str) -> Binding:
    """Bind keys to an action whose name the footer shows."""
    return Binding(keys, action, name, tooltip=tooltip, priority=action in AT_ONCE)


def other_key(keys: str, action: str, tooltip: str) -> Binding:
    """Bind keys to an action that only the list of all keys shows."""
    return Binding(keys, action, tooltip, show=False, priority=action in AT_ONCE)


def assemble(parts: Parts) -> Content:
    """Return parts as Textual draws them; their text is no markup."""
    return Content.assemble(*parts)


class PartsView(Static):
    """Parts that are drawn again only when they differ."""

    def __init__(self, id: str | None = None, classes: str = "") -> None:
        super().__init__(id=id, classes=classes)
        self.parts: Parts = []

    def put(self, parts: Parts) -> None:
        """Show these parts from now on."""
        if parts != self.parts:
            self.parts = parts
            self.update(assemble(parts))


class Lines(ScrollView, can_focus=True, inherit_bindings=False):
    """A list that renders only the lines in sight: 10,000 cost what 20 do."""

    DEFAULT_CSS = """
    Lines { height: 1fr; scrollbar-size: 1 1; overflow-x: hidden; text-wrap: nowrap; }
    """
    BINDINGS = [other_key(keys, f"move({by})", name) for keys, (by, name) in MOVES.items()]
    cursor = reactive(0, init=False)

    class Moved(Message):
        """The cursor is on another line."""

    def __init__(self, draw_line: Callable[[int], Parts]) -> None:
        super().__init__(id="pairs", classes="main")
        self.draw_line = draw_line
        self.count = 0

    def fill(self, count: int, cursor: int) -> None:
        """Show lines 0 to count - 1 from now on, with the cursor on one of them."""
        self.count = count
        self.virtual_size = Size(1, count)
        self.set_reactive(Lines.cursor, self.validate_cursor(cursor))
        self.scroll_to_cursor()
        self.refresh()

    def scroll_to_cursor(self) -> None:
        """Bring the cursor into sight."""
        self.scroll_to_region(Region(0, self.cursor, 1, 1), animate=False)

    def validate_cursor(self, cursor: int) -> int:
        return max(0, min(cursor, self.count - 1))

    def watch_cursor(self, old: int) -> None:
        self.scroll_to_cursor()
        self.refresh_line(old)
        self.refresh_line(self.cursor)
        self.post_message(self.Moved())

    def action_move(self, by: int) -> None:
        self.cursor += by

    def on_click(self, event: events.Click) -> None:
        self.cursor = round(self.scroll_y) + event.y

    def render_line(self, y: int) -> Strip:
        index = y + round(self.scroll_y)
        parts = self.draw_line(index) if index < self.count else []
        if parts and index == self.cursor:
            text = text_of(parts).ljust(self.size.width)
            parts = [(f"▸{text}", "reverse" if self.has_focus else "underline")]
        else:
            parts = [(" ", ""), *parts]
        strips = Visual.to_strips(self, assemble(parts), self.size.width, 1, self.visual_style)
        return strips[0]


# --- tabs -----------------------------------------------------------------------------------------

TABS = ("review", "watch", "results", "pipeline")  # keys 1 to 4


def tab_title(name: str, faulty: bool = False) -> str:
    """Return a tab's key and name, and whether its files have a fault: "2 Watch!"."""
    mark = "!" if faulty else ""
    return f"{TABS.index(name) + 1} {name.title()}{mark}"


class Pane(Vertical):
    """A tab: looks at its files every POLL seconds, and says what cannot be read."""

    SCOPED_CSS = False  # rules for a narrow screen are not about what is within a tab alone
    DEFAULT_CSS = """
    Pane, .body { height: 1fr; }
    .head, .fault { height: auto; padding: 0 1; }
    .fault { display: none; max-height: 6; color: $text-error; text-style: bold reverse; }
    .-narrow .head { max-height: 2; }
    """

    @dataclass
    class FaultChanged(Message):
        """A tab's files have a fault, or none any more."""

        tab: str
        faulty: bool

    def __init__(self, folder: Path, name: str) -> None:
        super().__init__(id=name)
        self.folder = folder
        self.fault = PartsView(classes="fault")
        self.faulty = False

    def on_mount(self) -> None:
        self.look()
        self.set_interval(POLL, self.look)

    def poll(self) -> str:
        """Read and draw what is new; return what is wrong with it, or "". Raises OSError."""
        raise NotImplementedError

    def look(self) -> None:
        """Read and draw what is new, or say why that cannot be done."""
        try:
            fault = self.poll()
        except (OSError, UserError) as error:
            fault = f"Cannot be read: {error}"
        self.fault.put([(one_line(fault, 500), "")])
        if bool(fault) != self.faulty:
            self.faulty = bool(fault)
            self.fault.display = self.faulty
            self.post_message(self.FaultChanged(self.id, self.faulty))


class Review(Pane):
    """The flagged pairs, and the one under the cursor with what differs marked."""

    SCOPED_CSS = False
    DEFAULT_CSS = """
    #list { width: 36%; max-width: 60; border-right: solid $primary; }
    #filter { height: 1; border: none; padding: 0 1; display: none; }
    #sides VerticalScroll { height: 1fr; width: 1fr; padding: 0 1; border-top: solid $primary; }
    .-wide #sides { layout: horizontal; }
    .-narrow #body { layout: vertical; }
    .-narrow #list { width: 100%; max-width: 100%; height: 40%; border-right: none; }
    .-narrow #sides VerticalScroll { height: auto; border: none; }
    """
    BINDINGS = [
        *(
            footer_key(key, f"decide('{verdict}')", SHORT_NAMES.get(verdict, verdict), meaning)
            for key, (verdict, meaning) in KEYS.items()
        ),
        footer_key("a", "accept", "accept", "Take the suggested class as the verdict"),
        footer_key("u", "undo", "undo", "Take this session's last verdict back, by a new line"),
        footer_key("e", "note", "note", "Write a note on the pair"),
        other_key("space", "next", "Go to the next undecided pair"),
        footer_key(
            "slash", "filter", "filter", "Filter: words, field:value, cosine>0.9; escape ends it"
        ),
        other_key("f", "fields", "Filter by a source, benchmark, subject, class or suggestion"),
        other_key("o", "order", "Sort by state, cosine, source, benchmark, class, suggestion"),
        other_key("m", "mark", "Give all undecided pairs of the list one verdict, after asking"),
        other_key("J,shift+down", "texts(3)", "Scroll the texts, or these keys, down"),
        other_key("K,shift+up", "texts(-3)", "Scroll them up"),
        other_key("escape", "unfilter", "End the filter"),
    ]

    def __init__(self, folder: Path, reviewer: str) -> None:
        super().__init__(folder, "review")
        self.reviewer = reviewer
        self.orders = deque(ORDERS)  # the first is in use
        self.progress = PartsView("progress", "head")
        self.listed = PartsView("listed", "head")
        self.filter = Input(placeholder="words source:x cosine>0.9", id="filter")
        self.list = Lines(self.draw_line)
        self.head = PartsView("pair", "head")
        self.train = PartsView("train")
        self.test = PartsView("test")
        self.shown_id: str | None = None  # the pair whose texts are shown
        self.usable: tuple[bool, bool] | None = None  # a pair to decide on, something to undo
        self.open_files()

    def open_files(self) -> None:
        """Begin with the files as they are named now, and nothing read of them."""
        self.path = find_file(self.folder, PAIRS)
        self.verdicts = Verdicts(self.path.with_name(DECISIONS), self.reviewer)
        self.history: list[dict[str, Row]] = []  # {pair_id: what stood before} of each save()
        self.seen: Stamp | None = None  # of the pairs that were read
        self.pairs: list[Row] = []
        self.shown: list[Row] = []  # those that pass the filter, in order
        self.bad: list[str] = []  # places that could not be read

    def compose(self) -> ComposeResult:
        yield self.fault
        yield self.progress
        with Horizontal(id="body", classes="body"):
            with Vertical(id="list"):
                yield self.listed
                yield self.filter
                yield self.list
            with Vertical():
                yield self.head
                with VerticalScroll(id="sides", classes="body", can_focus=False):
                    yield VerticalScroll(self.train, can_focus=False)
                    yield VerticalScroll(self.test, can_focus=False)

    def poll(self) -> str:
        if not self.pairs and find_file(self.folder, PAIRS) != self.path:
            self.open_files()
        has_new_verdicts = self.verdicts.poll()
        stamp = stamp_of(self.path)
        if stamp != self.seen:
            self.pairs, self.bad = load_pairs(self.path)
            self.seen = stamp
            gc.freeze()  # else, each second, a walk over all pairs delays a key by 0.1 s
            self.relist()
        elif has_new_verdicts:
            self.draw()
        return self.faults()

    def faults(self) -> str:
        """Say what is wrong with the files as they were read, or ""."""
        texts = []
        if self.bad:
            texts.append(unreadable_text(self.bad))
        strange = set(self.verdicts.last) - {pair["pair_id"] for pair in self.pairs}
        if strange and self.pairs:
            texts.append(f"{len(strange):,} verdicts are on other pairs than these; they stay")
        return "; ".join(texts)

    @property
    def pair(self) -> Row:
        """The pair under the cursor; {} where the list is empty."""
        return self.shown[self.list.cursor] if self.shown else {}

    def relist(self, pair_id: str | None = None) -> None:
        """List what passes the filter, with the cursor on this pair, else on the first."""
        self.shown = select_pairs(self.pairs, self.verdicts, self.filter.value, self.orders[0])
        listed = [pair["pair_id"] for pair in self.shown]
        cursor = listed.index(pair_id) if pair_id in listed else 0
        self.list.fill(len(self.shown), cursor)
        self.draw()

    def draw_line(self, index: int) -> Parts:
        """Return a line of the list."""
        pair = self.shown[index]
        verdict = self.verdicts.of(pair)
        look = LOOKS[verdict]
        origin = one_line(f"{pair['source']} × {pair['benchmark']} {pair['subject']}", 80)
        style = DIM if verdict else ""
        return [(look.letter, look.colour), (f" {pair['cosine']:.3f} {origin}", style)]

    def draw(self) -> None:
        """Draw all that a verdict or another list changes."""
        parts = [(NO_PAIRS, "bold")]
        if self.pairs:
            width = min(40, max(4, self.app.size.width - 72))  # the words beside it take 72
            parts = review_parts(self.pairs, self.verdicts, self.path.parent, width)
        self.progress.put(parts)
        count = f"{len(self.shown):,}"
        if len(self.shown) < len(self.pairs):
            count += f" of {len(self.pairs):,}"
        self.listed.put([(f"{count}, {self.orders[0]}", DIM)])
        self.list.refresh()
        self.draw_pair()

        usable = (bool(self.shown), bool(self.history))
        if self.usable != usable:
            self.usable = usable
            self.refresh_bindings()

    def draw_pair(self) -> None:
        """Draw the pair under the cursor, from its top where it is a new one."""
        pair = self.pair
        if pair:
            line = self.verdicts.last.get(pair["pair_id"], {})
            parts = pair_parts(pair, line, plain=self.app.no_color)
        else:
            text = f"No pair passes. Fields: {', '.join(FACETS)}, cosine." if self.pairs else ""
            parts = PairParts(head=[(text, "bold")], train=[], test=[])
        self.head.put(parts.head)
        self.train.put(parts.train)
        self.test.put(parts.test)
        if self.shown_id != pair.get("pair_id"):
            self.shown_id = pair.get("pair_id")
            for side in self.query(VerticalScroll):
                side.scroll_home(animate=False)

    def on_lines_moved(self) -> None:
        self.draw_pair()

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        if action == "undo" and not self.history:
            return None  # in the footer, but dim
        if action == "unfilter":
            return True
        if self.filter.has_focus:  # keys are text
            return False
        return bool(self.shown) or action in ("filter", "fields", "order")

    async def save(self, changes: dict[str, Row]) -> bool:
        """Write {pair_id: what changes, verdict or note}; tell whether all of it is on the disk.

        What is, is one entry of the history.
        """
        before: dict[str, Row] = {}
        try:
            for count, (pair_id, change) in enumerate(changes.items(), 1):
                stood = self.verdicts.write(pair_id, change)
                if not before:
                    self.history.append(before)
                before[pair_id] = stood
                if count % 20 == 0:  # the screen and other keys have their turn
                    self.draw()
                    await asyncio.sleep(0)
        except (OSError, ValueError) as error:
            text = f"Not saved, so not decided: {one_line(error)}"
            self.app.notify(text, severity="error", timeout=20, markup=False)
            return False
        finally:
            self.draw()
        return True

    async def action_decide(self, verdict: str) -> None:
        if await self.save({self.pair["pair_id"]: {"verdict": verdict}}):
            self.action_next()

    async def action_accept(self) -> None:
        if self.pair["suggested"] in VERDICTS:
            await self.action_decide(self.pair["suggested"])
        else:
            self.app.notify("No class is suggested for this pair: decide by d, g, s or n")

    def action_next(self) -> None:
        start = self.list.cursor + 1
        for index in [*range(start, len(self.shown)), *range(start)]:
            if not self.verdicts.of(self.shown[index]):
                self.list.cursor = index
                return

    async def action_undo(self) -> None:
        before = self.history[-1]
        if await self.save(before):
            del self.history[-2:]  # undoing is not itself undone
            self.relist(next(iter(before)))

    def action_note(self) -> None:
        pair_id = self.pair["pair_id"]
        last = self.verdicts.last.get(pair_id, {})

        async def save(note: str | None) -> None:
            if note is not None:
                await self.save({pair_id: {"note": note}})

        text = one_line(last.get("note"), LONGEST_SHOWN)
        self.app.push_screen(AskLine("A note on this pair; enter saves it", text), save)

    def action_mark(self) -> None:
        undecided = [pair for pair in self.shown if not self.verdicts.of(pair)]
        question = f"One verdict for all {len(undecided):,} undecided pairs of the list:\n"
        for key, (verdict, _) in KEYS.items():
            question += f"\n{key}  {verdict}"
        question += "\na  as suggested, where it is"

        def confirm(key: str) -> str:
            verdict = KEYS[key][0] if key in KEYS else "as suggested"
            count = len(self.mark_changes(undecided, key))
            return f"Write {count:,} verdicts, {verdict}?"

        async def save(key: str | None) -> None:
            if key:
                await self.save(self.mark_changes(undecided, key))

        self.app.push_screen(AskKey(question, [*KEYS, "a"], confirm), save)

    def mark_changes(self, pairs: list[Row], key: str) -> dict[str, Row]:
        """Return what save() takes for a key's verdict, or "a" the suggested, on all these pairs.

        Those are left out that another reviewer has decided since.
        """
        changes = {}
        for pair in pairs:
            verdict = KEYS[key][0] if key in KEYS else pair["suggested"]
            if verdict in VERDICTS and not self.verdicts.of(pair):
                changes[pair["pair_id"]] = {"verdict": verdict}
        return changes

    def action_filter(self) -> None:
        self.filter.display = True
        self.screen.set_focus(self.filter)  # at once; focus() waits for a turn

    def action_unfilter(self) -> None:
        self.filter.value = ""
        self.filter.display = False
        self.list.focus()

    def on_input_changed(self) -> None:
        self.relist(self.pair.get("pair_id"))

    def on_input_submitted(self) -> None:
        self.list.focus()

    def action_fields(self) -> None:
        counts: Counter[tuple[str, str]] = Counter()
        for pair in self.pairs:
            verdict = self.verdicts.of(pair)
            counts.update((name, facet(pair, name, verdict)) for name in FACETS)
        found = [(name, value) for name, value in sorted(counts) if value][:500]

        def add(chosen: int | None) -> None:
            if chosen is not None:
                name, value = found[chosen]
                typed = self.filter.value.rstrip()
                self.filter.display = True
                self.filter.value = f"{typed} {name}:{shlex.quote(value)} ".lstrip()

        choices = [f"{name}: {value}  ({counts[name, value]:,})" for name, value in found]
        self.app.push_screen(AskChoice("List only the pairs with", choices), add)

    def action_order(self) -> None:
        self.orders.rotate(-1)
        self.relist(self.pair.get("pair_id"))

    def action_texts(self, by: int) -> None:
        sides = self.screen.query("KeyPanel")
        if not sides:
            sides = self.query(VerticalScroll)
        for side in sides:
            side.scroll_relative(y=by, animate=False)


class Watch(Pane):
    """A training run: alarms, figures, curves, events."""

    SCOPED_CSS = False
    DEFAULT_CSS = """
    #charts { layout: grid; grid-size: 2; height: 3fr; &.-one { grid-size: 1; } }
    #events { height: 4; padding: 0 1; border-top: solid $primary; }
    .-tall #events { height: 1fr; }
    .-narrow #charts { grid-size: 1; }
    .-narrow #figures { max-height: 25%; }
    """
    BINDINGS = [
        footer_key("c", "chart", "one chart", "One chart at a time, or all four"),
        footer_key("l", "scale", "log scale", "Logarithmic or linear values"),
        footer_key(
            "f", "follow", "follow", "Keep the newest event in sight, or stay where one reads"
        ),
    ]

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, "watch")
        self.figures = PartsView("figures", "head")
        self.plots = {name: PlotextPlot(id=name) for name in CURVES}
        self.charts = Container(*self.plots.values(), id="charts")
        self.event_lines = PartsView("log")
        self.events = VerticalScroll(self.event_lines, id="events", classes="main")
        self.alone = deque([None, *CURVES])  # the first is the only chart shown; None: all are
        self.logarithmic = False
        self.open_log()

    def open_log(self) -> None:
        """Begin with the log as it is named now; of a long one, its end stands for all at first."""
        self.path = find_file(self.folder, TRAIN_LOG)
        self.tail = Tail(self.path)
        self.training = RunLog()
        self.end = RunLog()
        if stamp_of(self.path).size > LOG_CHUNK:
            self.end = read_end(self.path)
        self.outdated = True  # the curves
        self.due = 0.0  # time.monotonic() from which they may be drawn while a log is read

    def compose(self) -> ComposeResult:
        yield self.fault
        yield self.figures
        yield self.charts
        yield self.events

    def on_mount(self) -> None:  # Textual calls the pane's too
        self.events.anchor()
        self.app.theme_changed_signal.subscribe(self, lambda _: self.draw_charts())

    def poll(self) -> str:
        if not self.tail.offset and self.path != find_file(self.folder, TRAIN_LOG):
            self.open_log()
        rows = self.tail.read()
        if self.tail.restarted:
            self.training = RunLog()
        for row in rows:
            self.training.add(row)
        if rows or self.tail.restarted:
            self.outdated = True
        if self.tail.more:
            self.set_timer(0.001, self.look)  # the rest of a long log, keys in between

        self.draw()
        if not self.training.latest:
            return ""
        alarms = alarms_of(self.training, self.path, time.time())
        return "; ".join(f"ALARM: {text}" for text in alarms)

    def draw(self) -> None:
        """Draw figures and events, and the curves where they are outdated."""
        reading = self.tail.more
        known = self.end if reading and self.end.latest else self.training
        parts = run_parts(known)
        done = self.tail.offset / max(1, stamp_of(self.path).size)
        if reading and done < 1:
            parts.append((f"  reading the log, {done:.0%}", "bold reverse"))
        self.figures.put(parts)

        lines = [event_text(row) for row in self.training.events]
        if self.tail.bad:
            lines.insert(0, f"{self.tail.bad:,} unreadable lines")
        self.event_lines.put([("\n".join(lines), "")])
        self.events.border_title = "following" if self.events.is_anchored else "f to follow"
        self.charts.display = bool(self.training.latest)
        if self.outdated and (not reading or time.monotonic() > self.due):
            self.outdated = False
            self.due = time.monotonic() + 2 * POLL
            self.draw_charts()

    def draw_charts(self) -> None:
        """Draw all curves, or one where there is no room for four or it was asked for."""
        is_small = self.app.size.width < 72 or self.app.size.height < 20
        alone = self.alone[0]
        if not alone and is_small:
            alone = "loss"
        self.charts.set_class(bool(alone), "-one")
        smoothed = (self.training.curves["smoothed"].buckets, "cyan+")
        for name, plot in self.plots.items():
            plot.display = alone in (None, name)
            plot.theme = "clear" if self.app.current_theme.ansi else "auto"
            buckets = self.training.curves[name].buckets
            curves = [(buckets, "gray"), smoothed] if name == "loss" else [(buckets, "cyan+")]
            draw_curves(plot.plt, CURVES[name], curves, self.logarithmic)
            plot.refresh()

    def on_resize(self) -> None:
        self.outdated = True  # fewer charts where there is less room

    def action_chart(self) -> None:
        self.alone.rotate(-1)
        self.draw_charts()

    def action_scale(self) -> None:
        self.logarithmic = not self.logarithmic
        self.draw_charts()

    def action_follow(self) -> None:
        self.events.anchor(not self.events.is_anchored)


class Results(Pane):
    """Step 5's comparisons."""

    DEFAULT_CSS = """
    #results-table { width: auto; text-wrap: nowrap; }
    """
    BINDINGS = [footer_key("o", "order", "order", "Sort by gain, loss, name, or benchmarks first")]

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, "results")
        self.table = PartsView("results-table")
        self.orders = deque(RESULT_ORDERS)  # the first is in use
        self.seen: Stamp | None = None  # of the results that were read
        self.rows: list[Row] = []

    def compose(self) -> ComposeResult:
        yield self.fault
        yield VerticalScroll(self.table, classes="main")

    def poll(self) -> str:
        path = find_file(self.folder, RESULTS)
        stamp = stamp_of(path)
        if self.seen != stamp:
            self.rows = load_results(path)
            self.seen = stamp
        wide = self.app.size.width >= WIDE
        self.table.put(result_parts(self.rows, self.orders[0], wide))
        return ""

    def action_order(self) -> None:
        self.orders.rotate(-1)
        self.look()


class Pipeline(Pane):
    """The five steps, and what to run next."""

    DEFAULT_CSS = """
    #steps { padding: 0 1; }
    """
    BINDINGS = [footer_key("y", "copy", "copy the command", "Copy the next command, by OSC 52")]

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, "pipeline")
        self.steps = PartsView("steps")
        self.states: list[StepState] = []
        self.due = 0.0  # time.monotonic() of the next look at all folders

    def compose(self) -> ComposeResult:
        yield self.fault
        yield VerticalScroll(self.steps, classes="main")

    def poll(self) -> str:
        if time.monotonic() >= self.due:
            self.states = pipeline_states(self.folder)
            self.due = time.monotonic() + POLL_STEPS
            self.steps.put(pipeline_parts(self.states))
        return ""

    def action_copy(self) -> None:
        command = command_to_run(self.states)
        if command:
            self.app.copy_to_clipboard(command)
            self.app.notify("Copied, where the terminal allows it")
        else:
            self.app.notify("There is nothing to run")


# --- questions ------------------------------------------------------------------------------------


class Ask(ModalScreen[Any]):
    """A question over the tabs; escape answers None."""

    AUTO_FOCUS = "Input, OptionList"
    DEFAULT_CSS = """
    Ask { align: center middle; }
    Ask > Vertical {
        width: 64; max-width: 95%; height: auto; max-height: 100%; padding: 1 2;
        border: round $primary; background: $surface;
    }
    Ask OptionList { max-height: 50vh; }
    """
    BINDINGS = [footer_key("escape", "dismiss(None)", "cancel", "Change nothing")]

    def __init__(self, question: str) -> None:
        super().__init__()
        self.question = Static(Content(f"{question}\n\nescape  cancel"))

    def compose(self) -> ComposeResult:
        with Vertical():
            yield self.question
            yield from self.compose_answers()

    def compose_answers(self) -> ComposeResult:
        """Yield what the question is answered with, below it; nothing where keys answer it."""
        yield from ()


class AskLine(Ask):
    """A question that a line of text answers, which begins as `text`."""

    def __init__(self, question: str, text: str) -> None:
        super().__init__(question)
        self.text = text

    def compose_answers(self) -> ComposeResult:
        yield Input(self.text)

    def on_input_submitted(self, event: Input.Submitted) -> None:
        self.dismiss(event.value)


class AskChoice(Ask):
    """A question that one of the choices answers, by its index."""

    def __init__(self, question: str, choices: list[str]) -> None:
        super().__init__(question)
        self.choices = choices

    def compose_answers(self) -> ComposeResult:
        options = map(Content, self.choices)
        yield OptionList(*options)

    def on_option_list_option_selected(self, event: OptionList.OptionSelected) -> None:
        self.dismiss(event.option_index)


class AskKey(Ask):
    """A question that one of the keys answers, once y has said yes to confirm(key)."""

    def __init__(self, question: str, keys: list[str], confirm: Callable[[str], str]) -> None:
        super().__init__(question)
        self.keys = keys
        self.confirm = confirm
        self.answer = ""

    def on_key(self, event: events.Key) -> None:
        if event.key not in self.keys:
            return
        event.stop()  # else it goes on to what is below, as a verdict
        if self.answer:
            self.dismiss(self.answer)
            return
        self.answer = event.key
        self.keys = ["y"]  # on this screen, not on another: no key falls between two
        text = f"{self.confirm(self.answer)}\n\ny  yes\n\nescape  cancel"
        self.question.update(Content(text))


# --- the app --------------------------------------------------------------------------------------


class PlatypusApp(App[None]):
    """Four tabs over one output folder."""

    TITLE = "platypus"
    AUTO_FOCUS = None  # a tab's own list has it
    HORIZONTAL_BREAKPOINTS = [(0, "-tiny"), (40, "-narrow"), (72, "-normal"), (130, "-wide")]
    VERTICAL_BREAKPOINTS = [(0, "-flat"), (12, "-high"), (36, "-tall")]
    CSS = """
    #top { height: 1; background: $panel; }
    #top Tabs { width: 46; height: 1; & Underline { display: none; } }
    #top Tab.-active { color: $primary; text-style: bold reverse; }
    #where { width: 1fr; text-align: right; color: $text-muted; padding: 0 1; }
    #small { display: none; width: 100%; height: 100%; content-align: center middle; }
    ContentSwitcher { height: 1fr; }
    VerticalScroll { scrollbar-size: 1 1; overflow-x: auto; }
    HelpPanel { width: 65%; max-width: 70; }
    .-narrow #where { display: none; }
    .-narrow Tab { padding: 0 1 0 0; }
    .-narrow HelpPanel { width: 90%; }
    .-narrow FooterKey:last-of-type { dock: right; margin: 0; padding-left: 1; }
    .-tiny > *, .-flat > * { display: none; }
    .-tiny > #small, .-flat > #small { display: block; }
    """
    BINDINGS = [
        *(
            other_key(str(key), f"tab('{name}')", f"Show {name}")
            for key, name in enumerate(TABS, 1)
        ),
        footer_key("question_mark", "help", "keys", "Show or hide all keys of this tab"),
        other_key("q", "quit", "Leave; every verdict is on disk already"),
        other_key("ctrl+c", "leave", "Leave, whatever is open"),
    ]

    def __init__(self, folder: Path, reviewer: str) -> None:
        super().__init__()
        self.folder = folder
        self.reviewer = reviewer

    def compose(self) -> ComposeResult:
        tabs = [Tab(tab_title(name), id=f"tab-{name}") for name in TABS]
        with Horizontal(id="top"):
            yield Tabs(*tabs)
            yield Static(Content(f"{one_line(self.folder)}  {one_line(self.reviewer)}"), id="where")
        with ContentSwitcher(initial="review"):
            yield Review(self.folder, self.reviewer)
            yield Watch(self.folder)
            yield Results(self.folder)
            yield Pipeline(self.folder)
        yield Static(id="small")
        yield Footer(compact=True, show_command_palette=False)

    def on_load(self) -> None:  # from here on the terminal is not as it was
        for sign in ENDING:  # later: while its widgets are mounted, an exit may wait for ever
            leave = functools.partial(self.call_later, self.exit, return_code=128 + sign)
            asyncio.get_running_loop().add_signal_handler(sign, leave)

    def on_mount(self) -> None:
        self.query_one(Tabs).can_focus = False
        self.action_tab("review")

    def on_resize(self, event: events.Resize) -> None:
        least = f"{event.size.width} × {event.size.height} is too small:\n40 × 12 is the least"
        self.query_one("#small", Static).update(Content(least))

    def on_tabs_tab_activated(self, event: Tabs.TabActivated) -> None:
        self.action_tab(event.tab.id.removeprefix("tab-"))

    def on_pane_fault_changed(self, event: Pane.FaultChanged) -> None:
        tab = self.query_one(f"#tab-{event.tab}", Tab)
        tab.label = tab_title(event.tab, event.faulty)

    def action_tab(self, name: str) -> None:
        self.query_one(Tabs).active = f"tab-{name}"
        self.query_one(ContentSwitcher).current = name
        self.query_one(f"#{name}").query(".main").first().focus()

    def get_system_commands(self, screen: Screen[Any]) -> Iterable[SystemCommand]:
        for command in super().get_system_commands(screen):
            if command.title != "Screenshot":  # nothing is written but verdicts
                yield command

    def action_leave(self) -> None:
        self.exit()

    def action_help(self) -> None:
        if self.screen.query("HelpPanel"):
            self.action_hide_help_panel()
        else:
            self.action_show_help_panel()


@contextlib.contextmanager
def replay() -> Iterator[Path]:
    """Give a copy of the recorded folder for a while; another process writes its log again."""
    with tempfile.TemporaryDirectory(prefix="platypus-") as place:
        folder = Path(place) / "out"
        shutil.copytree(RECORDED, folder)
        command = [sys.executable, RECORDED.with_name("replay.py"), folder / "adapter"]
        # It ends when its standard input does: with this block, or when this process is killed.
        with subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL):
            yield folder


def end_process(sign: int, frame: FrameType | None) -> None:
    """Leave as a shell expects of a process that a signal has ended."""
    sys.exit(128 + sign)


def print_lineage(folder: Path) -> bool:
    """Print the steps behind a folder, all hashed again; tell whether they are as recorded."""
    states = lineage(folder)
    print(printable(text_of(step_parts(states)), LONGEST_SUMMARY))
    broken = [state.script for state in states if not state.whole]
    if broken:
        print(f"not as recorded: {', '.join(broken)}")
        return False
    print("all is as recorded")
    return True


def main(argv: list[str] | None = None) -> None:
    """Open the app, or print the summary where there is no terminal."""
    args = parse_args(argv)
    if args.lineage:
        sys.exit(0 if print_lineage(args.folder) else 1)
    if not (sys.stdout.isatty() and sys.stdin.isatty()):
        print(summary(args.folder))
        return
    # For the time before PlatypusApp.on_load(). Else asyncio.run() would take Ctrl-C over to cancel
    # the app's task, which now and then went on all the same.
    for sign in ENDING:
        signal.signal(sign, end_process)
    place = replay() if args.demo else contextlib.nullcontext(args.folder)
    with place as folder:
        app = PlatypusApp(folder, args.reviewer)
        app.run()
    sys.exit(app.return_code)


if __name__ == "__main__":
    run_main(main)

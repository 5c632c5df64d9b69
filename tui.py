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
files on this machine: a run elsewhere is watched there, over SSH.
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
import subprocess
import sys
import tempfile
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from common import (
    LONGEST_SHOWN,
    UNFINISHED,
    VERDICTS,
    Parser,
    Row,
    UserError,
    append_decision,
    one_line,
    printable,
    read_object,
    read_records,
    removed_ids,
    run_main,
    sha256_of,
)

if TYPE_CHECKING:
    from textual.app import App

KEYS = {  # key -> verdict and its meaning, in the order of the paper's classes
    "d": ("duplicate", "The same question, perhaps a word changed or moved"),
    "g": ("gray-area", "Not the same, but within general knowledge; for an expert to judge"),
    "s": ("similar-but-different", "A small change that changes the answer"),
    "n": ("not-a-leak", "A false alarm: the row stays in the clean set"),
}
LOOKS = {  # verdict -> letter, colour of the theme, filling of the bar, which tells without colour
    "duplicate": ("d", "$text-error", "█"),
    "gray-area": ("g", "$text-warning", "▓"),
    "similar-but-different": ("s", "$text-primary", "▒"),
    "not-a-leak": ("n", "$text-success", "░"),
    None: ("·", "bold", " "),
}
DIM = "dim"
ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # the last: a lost connection
RUNS = ("run.json", "apply.json")  # what a step's folder says of the files it read and wrote
PAIRS, LOG = ("contamination", "pairs.jsonl"), ("adapter", "train_log.jsonl")
SHORT = {"gray-area": "gray", "similar-but-different": "similar", "not-a-leak": "no leak"}
ALIGNED = 500  # words up to which common words are aligned too: beyond, it would take seconds
WORD = re.compile(r"\w+|[^\w\s.,;:!?'\"$\\(){}\[\]]")  # what a reader takes for a word or symbol
RECORDED = Path(__file__).with_name("demo") / "recorded"
POLL, POLL_STEPS = 0.5, 3.0  # seconds between two looks at followed files, at all steps' folders
CHUNK = 1 << 19  # bytes of a log parsed at once, some 15 ms: keys are answered in between
POINTS = 500  # buckets of a long curve, at least: more than a wide screen has dots
SMOOTHING = 0.95  # weight of the past in the smoothed loss: about the last 20 steps
SPIKE = 6.0  # standard deviations above the smoothed loss, and half of it, make a spike
WARM = 20  # steps before which no loss is called a spike
STALL_SECONDS, STALL_STEPS = 60.0, 10  # the longer of the two without a line is a stall
DISK_BYTES, DISK_SHARE = 2e9, 0.02  # free space below either is "nearly full"
CURVES = {  # metric -> title with its unit
    "loss": "loss, nats per token",
    "learning_rate": "learning rate",
    "grad_norm": "gradient norm",
    "tokens_per_second": "tokens per second",
}
STEPS = {  # folder -> script, and its inputs where they or the folder are not below out/
    "dataset": ("build_dataset", ""),
    "contamination": ("check_contamination", "--dataset {dataset}/dataset.jsonl "),
    "adapter": ("finetune", "--data {contamination}/clean.jsonl "),
    "merged": ("merge", "--adapter {adapter} "),
    "eval": ("evaluate", "--model {base} --model {merged} "),
}
SIGNS = {  # status of a step -> sign and colour
    "finished": ("✓", "$text-success"),
    "running": ("▶", "$text-primary"),
    "unfinished": ("✗", "$text-error"),
    "stale": ("!", "$text-warning"),
    "edited": ("!", "$text-error"),
    "not run": ("·", DIM),
}
Parts = list[tuple[str, str]]  # (text, style): what a pane shows and, joined, what a pipe gets
NO_PAIRS: Parts = [("Run python check_contamination.py: no flagged pairs here", "bold")]


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags of the terminal UI."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = Parser(description=__doc__, allow_abbrev=False, formatter_class=raw)
    folder = "output folder of a pipeline or of one step (default: out)"
    parser.add_argument("folder", nargs="?", type=Path, default=Path("out"), help=folder)
    who = "name in the verdicts (default: git's user.name, else $USER)"
    parser.add_argument("--reviewer", metavar="NAME", help=who)
    demo = "show recorded pairs, results and a training run; writes to a temporary folder only"
    parser.add_argument("--demo", action="store_true", help=demo)
    lineage = "walk from the folder back to the rows, hash every file again, exit 1 at a difference"
    parser.add_argument("--lineage", action="store_true", help=lineage)
    args = parser.parse_args(argv)
    if args.demo:
        args.folder = RECORDED
    if not args.folder.is_dir():
        what = "a file, not a folder" if args.folder.exists() else "not a folder"
        mend = "name an output folder, run bash demo.sh, or look around: python tui.py --demo"
        raise UserError(f"{args.folder} is {what}; {mend}")
    if not args.reviewer:
        with contextlib.suppress(OSError):  # no git
            git = subprocess.run(["git", "config", "user.name"], capture_output=True, text=True)
            args.reviewer = git.stdout.strip()
    args.reviewer = one_line(args.reviewer or getpass.getuser())
    return args


# --- text -----------------------------------------------------------------------------------------


def number(value: Any) -> float | None:
    """A JSON number as a float, None for everything else; from 1e15 up it counts as infinite."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    if abs(value) >= 1e15:  # no figure of ours; charts cannot draw it
        return math.inf if value > 0 else -math.inf
    return float(value)


def short(value: float | None, form: str = ".3g") -> str:
    """A number for a narrow place, a dash for none: 1234567.0 is '1,234,567'."""
    if value is None:
        return "–"
    return f"{value:,.0f}" if form[-1] == "g" and 1000 <= abs(value) < 1e15 else f"{value:{form}}"


def clock(seconds: float | None) -> str:
    """Seconds as h:mm:ss: 3725.2 is '1:02:05'."""
    known = seconds is not None and math.isfinite(seconds)
    return str(datetime.timedelta(seconds=round(min(seconds, 1e9)))) if known else "–"


def differing(a: str, b: str) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """(start, end) of the words without a counterpart in `a`, and in `b`; case does not count.

    >>> differing("Rotate about the x axis.", "rotate about the y axis")
    ([(17, 18)], [(17, 18)])
    """
    sides = [list(WORD.finditer(text)) for text in (a, b)]
    words = [[match.group().lower() for match in side] for side in sides]
    matcher = difflib.SequenceMatcher(None, *words, max(map(len, words)) > ALIGNED)
    spans: tuple[list[tuple[int, int]], list[tuple[int, int]]] = ([], [])
    for tag, *ends in matcher.get_opcodes():
        for side, start, end in ((0, *ends[:2]), (1, *ends[2:])):
            if tag != "equal" and start < end:
                spans[side].append((sides[side][start].start(), sides[side][end - 1].end()))
    return spans


def marked(text: str, spans: list[tuple[int, int]], plain: bool) -> Parts:
    """A text with its spans in bold and underlined; `plain`, for no colour: in brackets as well."""
    parts, last = [], 0
    for start, end in spans:
        shown = f"⟦{text[start:end]}⟧" if plain else text[start:end]
        parts += [(text[last:start], ""), (shown, "bold underline $text-warning")]
        last = end
    return [*parts, (text[last:], "")]


# --- files ----------------------------------------------------------------------------------------


def find(folder: Path, step: str, name: str) -> Path:
    """A step's file, or its place; `folder` is the pipeline's or the step's own."""
    usual = [path for path in (folder / name, folder / step / name) if path.exists()]
    others = sorted(folder.glob(f"*/{name}"), key=lambda path: -path.stat().st_mtime)
    return [*usual, *others, folder / step / name][0]


def file_state(path: Path) -> tuple[int, ...]:
    """Return what changes when a file is written to or replaced, size first; () for no file."""
    with contextlib.suppress(FileNotFoundError):
        now = path.stat()
        return now.st_size, now.st_mtime_ns, now.st_ino
    return ()


class Tail:
    """The objects on the lines that a JSONL file has got since the last look.

    The file may be absent, cut, replaced or rewritten in place: `restarted` is then True and it is
    read from its start. A line without its end is left for later; what is no object is `bad`.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.bad = path, 0
        self.restarted = self.more = False  # more: the next look will find lines too
        self.offset, self.before = 0, b""  # bytes read; the last of them, which must still be there
        self.seen: tuple[int, ...] | None = None  # the file's state when all of it was read

    def read(self, limit: int = CHUNK) -> list[Row]:
        """The next lines, about `limit` bytes of them. Raises OSError where it is unreadable."""
        self.restarted = self.more = False
        state, data = file_state(self.path), b""
        if state == self.seen:
            return []
        with contextlib.suppress(FileNotFoundError), self.path.open("rb") as file:
            file.seek(self.offset - len(self.before))
            if file.read(len(self.before)) != self.before:
                self.restart()
                file.seek(0)
            data = file.read(limit)
            while data and b"\n" not in data and (more := file.read(len(data))):
                data += more  # a line longer than the limit
        if not state and self.offset:
            self.restart()
        whole = data[: data.rfind(b"\n") + 1]
        self.offset, self.before = self.offset + len(whole), (self.before + whole)[-99:]
        self.more, self.seen = bool(whole), None if whole else state
        return list(self.parse(whole))

    def restart(self) -> None:
        """Begin anew."""
        self.__init__(self.path)
        self.restarted = True

    def parse(self, data: bytes) -> Iterator[Row]:
        """The objects among whole lines."""
        for line in filter(bytes.strip, data.split(b"\n")):
            row = None
            with contextlib.suppress(ValueError, RecursionError):
                row = json.loads(line)
            self.bad += not isinstance(row, dict)
            yield from [row] * isinstance(row, dict)


# --- review ---------------------------------------------------------------------------------------

TEXTS = ("pair_id", "train_id", "source", "benchmark", "subject", "test_id", "view", "detector")
TEXTS += ("train_question", "train_answer", "test_question", "test_answer", "suggested", "why")
FACETS = ("source", "benchmark", "subject", "class", "suggested")  # what a filter can name
Test = Callable[[Row, str | None], Any]  # of a pair and the verdict on it
ORDERS: dict[str, Test] = {
    "undecided first": lambda pair, verdict: (verdict is not None, -pair["cosine"]),
    "cosine, high to low": lambda pair, verdict: -pair["cosine"],
    "cosine, low to high": lambda pair, verdict: pair["cosine"],
    "source": lambda pair, verdict: (pair["source"], -pair["cosine"]),
    "benchmark": lambda pair, verdict: (pair["benchmark"], pair["subject"], -pair["cosine"]),
    "class": lambda pair, verdict: (verdict or "", -pair["cosine"]),
    "suggestion": lambda pair, verdict: (pair["suggested"], -pair["cosine"]),
}


def load_pairs(path: Path) -> tuple[list[Row], list[str]]:
    """The flagged pairs, fields checked, and the places that could not be read. Raises OSError."""
    pairs, bad = [], []
    for place, row, _ in read_records(path) if path.exists() else ():
        if not isinstance(row, dict) or not isinstance(row.get("pair_id"), str):
            bad.append(place)
            continue
        pair: Row = {k: row[k] if isinstance(row.get(k), str) else "" for k in TEXTS}
        choices, cosine = row.get("test_choices"), number(row.get("cosine"))
        pair["choices"] = choices if isinstance(choices, list) else []
        pair["cosine"] = cosine if cosine is not None and math.isfinite(cosine) else 0.0
        pair["search"] = "\n".join([*(pair[k] for k in TEXTS), *map(str, pair["choices"])]).lower()
        pairs.append(pair)
    return pairs, bad


class Verdicts:
    """The decision log as it stands on the disk, other reviewers' lines included."""

    def __init__(self, path: Path, reviewer: str) -> None:
        self.tail, self.path, self.reviewer = Tail(path), path, reviewer
        self.last: dict[str, Row] = {}  # pair_id -> its last line
        self.done: list[dict[str, Row]] = []  # each write() of this session: what stood before it

    def poll(self) -> bool:
        """Read what is new; whether there was anything. Raises OSError."""
        rows = self.tail.read()
        new = bool(rows) or self.tail.restarted
        self.last = {} if self.tail.restarted else self.last
        for row in rows:
            known = row.get("verdict", "") in (None, *VERDICTS)
            if known and isinstance(row.get("pair_id"), str):
                self.last[row["pair_id"]] = row
        return self.poll() or new if self.tail.more else new

    def of(self, pair: Row) -> str | None:
        """The verdict on a pair; None while undecided."""
        return self.last.get(pair["pair_id"], {}).get("verdict")

    def write(self, lines: dict[str, Row]) -> Iterator[None]:
        """Append {pair_id: what changes: verdict, note}; each is on disk when its turn ends.

        A verdict of None withdraws. Raises OSError, ValueError.
        """
        group: dict[str, Row] = {}
        for pair_id, change in lines.items():
            old = self.last.get(pair_id, {})
            before = {"verdict": old.get("verdict"), "note": str(old.get("note") or "")}
            line = {**before, **change}
            append_decision(self.path, pair_id, line["verdict"], self.reviewer, line["note"])
            self.done += [] if group else [group]
            group[pair_id] = before
            self.poll()  # what is shown is what the disk holds
            yield


def facet(pair: Row, name: str, verdict: str | None) -> str:
    """What a pair has of a field that filters name; `class` is its verdict."""
    return (verdict or "undecided") if name == "class" else one_line(pair[name])


def make_filter(text: str) -> Test:
    """A filter as typed: words, field:part of its value, cosine>0.9; all must hold.

    >>> pair = {"search": "about the x axis", "source": "math", "cosine": 0.95}
    >>> [make_filter(text)(pair, None) for text in ("axis source:ma class:und", "cosine>0.96")]
    [True, False]
    """
    tests: list[Test] = []
    try:
        parts = shlex.split(text.lower())
    except ValueError:  # a quote that is still open while one types
        parts = text.lower().split()
    for part in parts:
        name, _, value = part.partition(":")
        if bound := re.fullmatch(r"cosine:?([<>])=?(\d*\.?\d+)", part):
            sign = 1 if bound[1] == ">" else -1
            tests.append(lambda pair, _, s=sign, x=float(bound[2]): s * (pair["cosine"] - x) >= 0)
        elif name in FACETS and value:
            tests.append(lambda pair, v, n=name, x=value: x in facet(pair, n, v).lower())
        else:
            tests.append(lambda pair, _, x=part: x in pair["search"])
    return lambda pair, verdict: all(test(pair, verdict) for test in tests)


def removed_rows(pairs: list[Row], verdicts: Verdicts) -> set[str]:
    """The train_ids that `apply` would remove by default."""
    decided = {pair_id: line for pair_id, line in verdicts.last.items() if line["verdict"]}
    return set(removed_ids(pairs, decided))


def review_parts(pairs: list[Row], verdicts: Verdicts, folder: Path, width: int = 30) -> Parts:
    """How many pairs are decided, and how; at the end, what `apply` would remove."""
    counts = Counter(map(verdicts.of, pairs))
    decided, total = len(pairs) - counts[None], len(pairs)
    parts, at = [(f"{decided:,} of {total:,} decided ", "bold")], 0
    for verdict in VERDICTS:
        at += width * counts[verdict] / max(1, total)
        filled = sum(len(text) for text, _ in parts[1:])
        parts.append((LOOKS[verdict][2] * (round(at) - filled), LOOKS[verdict][1]))
    parts.append(("·" * (width - round(at)), DIM))
    for verdict in VERDICTS:
        name = verdict.removesuffix("-but-different")
        parts.append((f"  {name} {counts[verdict]:,}", LOOKS[verdict][1]))
    if decided == total:
        gone, rows = len(removed_rows(pairs, verdicts)), len({pair["train_id"] for pair in pairs})
        parts.append((f"\nAll decided: {gone:,} of the {rows:,} flagged rows would go. Next: ", ""))
        parts.append((f"python check_contamination.py apply --out {folder}", "bold"))
    return parts


def pair_parts(pair: Row, line: Row, plain: bool) -> list[Parts]:
    """What is known of a pair, its training side, its benchmark side; what differs is marked.

    The choices are compared only where most of them stand in the training text too.
    """
    _, tone, _ = LOOKS[line.get("verdict")]
    head = [(line.get("verdict") or "undecided", f"bold {tone}")]
    by = [("by", "reviewer"), ("at", "time"), ("note:", "note")]
    by = by if line.get("verdict") else by[2:]  # who took a verdict back is in the log
    head += [(f" {word} {one_line(line[key])}", "") for word, key in by if line.get(key)]
    head += [("\nsuggested ", DIM), (one_line(pair["suggested"]) or "nothing", "bold")]
    head += [(f": {one_line(pair['why'])}", ""), ("\ncosine ", DIM)]
    how = f" by {one_line(pair['detector'])} of {one_line(pair['view'])}"
    head += [(f"{pair['cosine']:.4f}", "bold"), (how, DIM)]
    train, test = printable(pair["train_question"]), printable(pair["test_question"])
    choices = [one_line(choice, 500) for choice in pair["choices"][:26]]
    lettered = "".join(f"\n{chr(65 + i)}) {choice}" for i, choice in enumerate(choices))
    inside = sum(choice.lower() in train.lower() for choice in choices)
    left, right = differing(train, test + lettered * (2 * inside > len(choices)))
    sides = [head]
    for name, key, text, spans, answer in (
        ("TRAINING", "source", train, left, pair["train_answer"]),
        ("BENCHMARK", "test_id", test + lettered, right, pair["test_answer"]),
    ):
        title = [(name, "bold reverse"), (f" {one_line(pair[key])}\n", DIM)]
        answers = [("\n\nANSWER ", "bold"), (printable(answer), "")]
        sides.append(title + marked(text, spans, plain) + answers)
    return sides


# --- watch ----------------------------------------------------------------------------------------


class Curve:
    """A metric over steps in at most 2 x POINTS buckets of (step, lowest, highest) value.

    When full, neighbours are joined: a spike outlives any number of halvings.
    """

    def __init__(self) -> None:
        self.buckets: list[tuple[float, float, float]] = []
        self.stride = self.filled = 1  # values of a bucket, of the last one

    def add(self, step: float, value: float) -> None:
        """Take the value of a later step."""
        if self.buckets and self.filled < self.stride:
            first, low, high = self.buckets[-1]
            self.buckets[-1] = (first, min(low, value), max(high, value))
            self.filled += 1
            return
        if len(self.buckets) == 2 * POINTS:
            joined = zip(self.buckets[::2], self.buckets[1::2], strict=True)
            self.buckets = [(a[0], min(a[1], b[1]), max(a[2], b[2])) for a, b in joined]
            self.stride *= 2
        self.buckets.append((step, value, value))
        self.filled = 1


class RunLog:
    """What a training log tells, taken line by line in constant memory."""

    def __init__(self) -> None:
        self.curves = {name: Curve() for name in (*CURVES, "smoothed")}
        self.latest: dict[str, float | None] = {}  # the newest step's numbers
        self.events: deque[Row] = deque(maxlen=1000)
        self.alarms: dict[str, tuple[float, float, int]] = {}  # first step, last step, how many
        self.lines = self.supervised = self.tokens = 0.0
        self.mean = self.variance = 0.0  # of the loss, exponentially weighted
        self.total: float | None = None  # steps
        self.ended = False

    def add(self, row: Row) -> None:
        """Take one line of the log, an event or a step."""
        step = number(row.get("step"))
        if "event" in row:
            self.events.append(row)
            self.ended = row["event"] == "end"
            if row["event"] == "start":
                self.total = number(row.get("steps")) or number(row.get("total_steps"))
        elif step is not None and math.isfinite(step):
            if step <= (self.latest.get("step") or 0):  # a resumed run writes its steps again
                for curve in self.curves.values():
                    curve.buckets = [bucket for bucket in curve.buckets if bucket[0] < step]
            self.add_step(step, {name: number(value) for name, value in row.items()})

    def add_step(self, step: float, row: dict[str, float | None]) -> None:
        """Add a step to the curves, the sums and the alarms."""
        self.latest, self.lines, self.ended = row, self.lines + 1, False
        self.tokens += row.get("tokens") or 0
        self.supervised += row.get("supervised_tokens") or 0
        for name in CURVES:
            value = row.get(name)
            if value is not None and math.isfinite(value):
                self.curves[name].add(step, value)
                if name == "loss":
                    self.smooth(step, value)
            elif name in row and name in ("loss", "grad_norm"):
                self.alarm(f"{name.replace('_', ' ')} is NaN or infinite", step)
        if row.get("supervised_tokens") == 0:
            self.alarm("no supervised tokens", step)

    def smooth(self, step: float, loss: float) -> None:
        """Follow the loss's mean and variance; far above them is a spike."""
        past = min(1 - 1 / self.lines, SMOOTHING)  # at first a plain mean
        limit = self.mean + max(SPIKE * math.sqrt(self.variance), 0.5 * abs(self.mean))
        if self.lines > WARM and loss > limit:
            self.alarm("loss spike", step)
        change = loss - self.mean
        self.mean += (1 - past) * change
        self.variance = past * (self.variance + (1 - past) * change * change)
        self.curves["smoothed"].add(step, self.mean)

    def alarm(self, kind: str, step: float) -> None:
        """Count an alarm of this kind."""
        first, _, count = self.alarms.get(kind, (step, step, 0))
        self.alarms[kind] = (first, step, count + 1)


def alarms_of(log: RunLog, path: Path, now: float) -> list[str]:
    """The alarms of the run that writes `path`; now: seconds since 1970. Raises OSError."""
    texts = []
    for kind, (first, last, count) in log.alarms.items():
        more = f", {count:,} times to step {last:,.0f}" if count > 1 else ""
        texts.append(f"{kind} at step {first:,.0f}{more}")
    finished = (path.parent / "run.json").exists() and not (path.parent / UNFINISHED).exists()
    step = (log.latest.get("seconds") or 0) / (log.latest.get("step") or 1)
    silent = now - path.stat().st_mtime
    if not (log.ended or finished) and silent > max(STALL_SECONDS, STALL_STEPS * step):
        waited = clock(silent // 60 * 60)  # whole minutes: not a new text each second
        texts.append(f"stalled: no line for {waited}, a step took {step:.2g} s")
    disk = shutil.disk_usage(path.parent)
    if disk.free < max(DISK_BYTES, DISK_SHARE * disk.total):
        texts.append(f"disk nearly full: {disk.free / 1e9:.1f} GB free")
    return texts


def run_parts(log: RunLog) -> Parts:
    """How a run stands, in three lines."""
    if not (row := log.latest):
        return [("Run python finetune.py: no training log here", "bold")]
    step, seconds, eta = row.get("step"), row.get("seconds"), row.get("eta_seconds")
    total = log.total or (step * (1 + eta / seconds) if step and seconds and eta else None)
    figures = {
        "step": short(step) + (f" of {total:,.0f}, {step / total:.0%}" if total and step else ""),
        "epoch": short(row.get("epoch")),
        "ETA": "ended" if log.ended else clock(eta),
        "run for": clock(seconds) + "\n",
        "loss": f"{short(row.get('loss'), '.4g')}, smoothed {short(log.mean, '.4g')}",
        "rate": short(row.get("learning_rate")),
        "grad norm": short(row.get("grad_norm")),
        "tokens/s": short(row.get("tokens_per_second")) + "\n",
        "supervised": f"{log.supervised:,.0f} of {log.tokens:,.0f} tokens",
        "MFU": short(row.get("mfu"), ".1%"),
        "memory GB": short(row.get("memory_gb")),
        "GPU %": short(row.get("gpu_util")),
    }
    parts = []
    for name, value in figures.items():
        parts += [(f"{name} ", DIM), (f"{value}  ".replace("\n  ", "\n"), "bold")]
    return parts


def event_text(row: Row) -> str:
    """An event on one line: its step, its name, then the other fields as written."""
    names = [name for name in row if name not in ("event", "step")]
    names.sort(key="prompt".__eq__)  # it last
    known = {name: number(row[name]) for name in names}
    texts = {k: one_line(str(row[k])[-150:] if k == "prompt" else row[k], 600) for k in names}
    rest = [f"{k} {texts[k] if v is None else short(v, '.4g')}" for k, v in known.items()]
    text = f"{short(number(row.get('step'))):>7}  {row['event']}  {'  '.join(rest)}"
    return one_line(text, LONGEST_SHOWN)


def draw_curves(plt: Any, title: str, curves: list[tuple[list, str]], logarithmic: bool) -> None:
    """Draw (buckets of a Curve, colour) with few, round labels; plt is plotext's figure."""
    plt.clear_figure()
    xs, ys = [], []
    for buckets, colour in curves:
        points = [(step, v) for step, *ends in buckets for v in sorted({*ends})]
        points = [(s, math.log10(v)) for s, v in points if v > 0] if logarithmic else points
        plt.plot([s for s, _ in points], [v for _, v in points], color=colour, marker="braille")
        xs, ys = xs + [s for s, _ in points], ys + [v for _, v in points]
    for ticks, values, label in (
        (plt.xticks, xs, lambda v: f"{v:,.0f}"),
        (plt.yticks, ys, lambda v: short(10**v if logarithmic else v)),
    ):
        if not values:  # plotext cannot place a tick where there is no point
            break
        low, high = min(values), max(values)
        places = [low + (high - low) * part / 3 for part in range(4)]
        ticks(places, [label(place) for place in places])
    plt.title(f"{title}, by step" + " (log scale)" * logarithmic)


# --- results --------------------------------------------------------------------------------------

NUMBERS = ("base_score", "score", "points", "percent", "p", "gained", "lost", "points_unflagged")
NUMBERS += ("points_flagged", "low", "high")
TABLE = "{:23.23} {:>8} {:>5} {:>5} {:13} {:19.19}"  # 78 columns
MORE = "{:>8} {:>16} {:>6} {:>6} {:>9} {:>8}"
RESULT_ORDERS: dict[str, Callable[[Row], Any]] = {
    "benchmarks, then subjects": lambda row: ("/" in row["task"], -row["change"]),
    "largest gain first": lambda row: -row["change"],
    "largest loss first": lambda row: row["change"],
    "name": lambda row: row["task"],
}


def load_results(path: Path) -> list[Row]:
    """The comparisons of results.json, texts printable, numbers finite or None; [] without any.

    `change` is percent, or points where the base has no score. Raises UserError, OSError.
    """
    rows = []
    try:
        found = json.loads(path.read_bytes()).get("comparisons") if path.exists() else None
        for row in found or ():
            row |= dict(zip(("low", "high"), row.get("interval") or (), strict=False))
            values = {k: number(row.get(k)) for k in NUMBERS}
            values = {k: v if math.isfinite(v or 0) else None for k, v in values.items()}
            values |= {k: one_line(row.get(k)) for k in ("model", "base", "task", "verdict")}
            change = values["points"] if values["percent"] is None else values["percent"]
            rows.append(values | {"change": change or 0.0})
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} is no results.json of evaluate.py: {one_line(error)}") from None
    return rows


def bar(value: float, largest: float, half: int) -> str:
    """A bar from the middle: to the left below zero, to the right above.

    >>> bar(1.0, 2.0, 4), bar(-2.0, 2.0, 4)
    ('    │██  ', '████│    ')
    """
    drawn = "█" * round(half * abs(value) / (largest or 1))
    return f"{drawn if value < 0 else '':>{half}}│{drawn if value > 0 else '':<{half}}"


def result_parts(rows: list[Row], order: str, wide: bool) -> Parts:
    """The changes over the base as a table with bars; `wide` adds the last columns."""
    if not rows:
        return [("Run python evaluate.py: no comparison here\n", "bold")]
    largest, parts = max(abs(row["change"]) for row in rows), []
    head = ("task", "change", "base", "score", "", "paired test")
    more = ("p", "95 % of points", "gained", "lost", "unflagged", "flagged")
    for base, model in dict.fromkeys((row["base"], row["model"]) for row in rows):
        parts.append((f"{model} over {base}, sorted by {order}\n", "bold"))
        parts.append((TABLE.format(*head) + MORE.format(*more) * wide + "\n", DIM))
        chosen = [row for row in rows if (row["base"], row["model"]) == (base, model)]
        chosen.sort(key=RESULT_ORDERS[order])
        chosen.sort(key=lambda row: row["task"] != "average")  # a stable sort: it alone moves up
        for row in chosen:
            tone = {"better": "$text-success", "worse": "$text-error"}.get(row["verdict"], "")
            change = f"{row['change']:+.1f}" + (" pt" if row["percent"] is None else "%")
            scores = [short(row[k], ".1f") for k in ("base_score", "score")]
            name, shape = row["task"].removeprefix("mmlu/"), bar(row["change"], largest, 6)
            parts.append((TABLE.format(name, change, *scores, shape, row["verdict"]), tone))
            ends = " to ".join(short(row[k], "+.1f") for k in ("low", "high"))
            flips = [short(row[k], ".0f") for k in ("gained", "lost")]
            split = [short(row[k], "+.1f") for k in ("points_unflagged", "points_flagged")]
            rest = MORE.format(short(row["p"], ".2g"), ends, *flips, *split)
            parts.append((rest * wide + "\n", ""))
    return parts


# --- pipeline -------------------------------------------------------------------------------------


class StepState(NamedTuple):
    """How one step's folder stands; status is one of SIGNS, command what mends or repeats it."""

    script: str
    folder: Path
    status: str
    counts: str
    why: str
    command: str
    whole: bool = False  # of lineage(): finished, and every file is as recorded


def is_step(folder: Path) -> bool:
    """Whether a step has finished or begun a folder."""
    return any(os.path.exists(folder / name) for name in ("run.json", UNFINISHED))


def script_of(folder: Path) -> str:
    """The step that finished or began a folder; what its name tells where run.json is broken."""
    mark, run = folder / UNFINISHED, read_object(folder / "run.json")
    began = re.search(r"(\w+)\.py", mark.read_text(errors="replace") if mark.exists() else "")
    return began[1] if began else str(run.get("step", STEPS.get(folder.name, "?")[0]))


def is_held(mark: Path) -> bool:
    """Whether a living process holds a step's folder; lets go of it at once."""
    with contextlib.suppress(FileNotFoundError, PermissionError), mark.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def files_of(folder: Path, kind: str) -> dict[str, Any]:
    """{name: sha256} of the "inputs" or "outputs" that a step has recorded."""
    found: dict[str, Any] = {}
    for record in RUNS:
        listed = read_object(folder / record).get(kind)
        if isinstance(listed, dict):
            for name, about in listed.items():
                found[name] = about.get("sha256") if isinstance(about, dict) else None
    return found


def find_input(name: str, folder: Path) -> Path:
    """Where an input of a step lies: a relative name counts from its folder, or from one above.

    So a copy of the whole chain is walked in itself. From the current folder only then.
    """
    for above in (folder, *folder.parents, Path(), *Path.cwd().parents):
        path = os.path.join(above, name)
        record = os.path.join(os.path.dirname(path), "run.json")
        gone = os.path.dirname(name) and os.path.exists(record)  # its step is there, the file not
        if os.path.isfile(path) or gone:
            return Path(path)
    return Path(name)


def walk_back(folder: Path, known: dict[Path, StepState | None]) -> None:
    """Add a step's state to `known`, {resolved folder: state}, behind those that it came from."""
    if not is_step(folder) or folder.resolve() in known:
        return
    key = folder.resolve()
    known[key] = None  # so that a ring ends
    places = {name: find_input(name, folder) for name in files_of(folder, "inputs")}
    for place in places.values():
        walk_back(place.parent, known)
    del known[key]
    known[key] = step_state(folder, places, known)


def pipeline_states(folder: Path) -> list[StepState]:
    """Every step's folders in order; `folder` is the pipeline's, or one step's own. Reads only.

    Raises OSError.
    """
    root = folder.absolute().parent if is_step(folder) else folder
    known: dict[Path, StepState | None] = {}
    folders = sorted(root.iterdir())
    for path in folders:
        walk_back(path, known)
    here = {path.resolve() for path in folders}

    states, usual, at = [], True, {"base": "BASE"}
    for name, (script, inputs) in STEPS.items():
        mine = [state for key, state in known.items() if key in here and state.script == script]
        folder = mine[-1].folder if mine else root / name
        usual &= folder == Path("out") / name
        flags = f" {inputs.format(**at)}--out {shlex.quote(str(folder))}" * (not usual)
        missing = StepState(script, folder, "not run", "", "", f"python {script}.py{flags}")
        states += mine or [missing]
        at[name] = shlex.quote(str(folder))
        base = read_object(folder / "run.json").get("base_model")
        at |= {"base": shlex.quote(one_line(base))} if isinstance(base, str) else {}
    return states


def step_state(
    path: Path, places: dict[str, Path], known: dict[Path, StepState | None]
) -> StepState:
    """The state of one folder, the reason for it, and the command that mends or repeats it.

    It is stale where the step that wrote an input has recorded another sha256 since, or is not
    finished. places: where the inputs lie; known: the states of those steps. Nothing but the
    verdicts is hashed.
    """
    script, mark, run = script_of(path), path / UNFINISHED, read_object(path / "run.json")
    command = one_line(run.get("command") or f"python {script}.py --out {path}", LONGEST_SHOWN)
    counts = counts_text(run)
    if mark.exists():
        began = one_line(mark.read_text(errors="replace").strip(), LONGEST_SHOWN) or command
        if is_held(mark):
            return StepState(script, path, "running", counts, "a process is at work", began)
        began += " --resume" * (any(path.glob("checkpoints/*")) and "--resume" not in began)
        why = "no process is at work on it: it was stopped or killed"
        return StepState(script, path, "unfinished", counts, why, began)

    command += " --overwrite" * ("--overwrite" not in command)
    if not run:
        return StepState(script, path, "unfinished", "", "its run.json is not readable", command)
    why = renewed_input(path, places, known)
    if not why and verdicts_are_newer(path):
        why = "verdicts newer than clean.jsonl"
        command = f"python {script}.py apply --out {shlex.quote(str(path))}"
    status = "stale" if why else "finished"
    return StepState(script, path, status, counts, why or one_line(run.get("finished")), command)


def counts_text(run: Row) -> str:
    """The first four numbers that a run.json counts: "8 rows, 3 pairs"."""
    counts = run.get("counts")
    shown = []
    for name, value in counts.items() if isinstance(counts, dict) else ():
        if number(value) is not None:
            shown.append(f"{number(value):,.0f} {one_line(name, 20)}")
    partial = ["partial"] if run.get("partial") else []
    return ", ".join(shown[:4] + partial).replace("_", " ")


def renewed_input(path: Path, places: dict[str, Path], known: dict[Path, StepState | None]) -> str:
    """Which input of a step is not what it was, in words; "" where each is."""
    behind = ""
    for name, sha256 in files_of(path, "inputs").items():
        writer = places[name].parent
        if not is_step(writer):
            continue
        if files_of(writer, "outputs").get(places[name].name, sha256) != sha256:
            return f"made again since: {one_line(name)}"
        state = known.get(writer.resolve())
        if state and state.status != "finished":
            behind = f"made from {one_line(state.folder)}, which is {state.status}"
    return behind


def verdicts_are_newer(path: Path) -> bool:
    """Whether a folder of step 2 has verdicts that its clean set was not made with."""
    log, applied = path / "decisions.jsonl", read_object(path / "apply.json")
    now = sha256_of(log) if log.exists() else None
    return applied.get("decisions_sha256", now) != now


def lineage(folder: Path) -> list[StepState]:
    """The steps that a folder's files came from, rows first and the folder last, all hashed again.

    Every input in a run.json leads to the folder it lies in. Of a folder of steps: all of them.
    """
    known: dict[Path, StepState | None] = {}
    for state in [] if is_step(folder) else pipeline_states(folder):
        walk_back(state.folder, known)
    walk_back(folder, known)
    if not known:
        raise UserError(f"{folder} is no step's folder and holds none: name one, such as out/eval")
    hashes: dict[Path, str] = {}
    return [hash_again(state, hashes) for state in known.values()]


def hash_again(state: StepState, hashes: dict[Path, str]) -> StepState:
    """A step's state once every file that it read or wrote is hashed; `hashes` are known ones."""
    if state.status in ("running", "unfinished"):
        return state
    folder, edited, changed = state.folder, [], []
    inputs, outputs = files_of(folder, "inputs"), files_of(folder, "outputs")
    for name, sha256 in outputs.items():
        if hash_of(folder / name, hashes) != sha256:
            edited.append(name)
    for name, sha256 in inputs.items():
        if hash_of(find_input(name, folder), hashes) != sha256:
            changed.append(name)

    if edited:
        return state._replace(status="edited", why=f"edited or gone: {some(edited)}")
    if changed:
        return state._replace(status="stale", why=f"changed since, or gone: {some(changed)}")
    if state.status != "finished":
        return state
    why = f"{len(inputs) + len(outputs):,} files as recorded, by hash"
    return state._replace(why=why, whole=True)


def hash_of(path: Path, hashes: dict[Path, str]) -> str | None:
    """The sha256 of a file, each hashed once; None where there is none."""
    if not os.path.isfile(path):
        return None
    key = path.resolve()
    if key not in hashes:
        hashes[key] = sha256_of(key)
    return hashes[key]


def some(names: list[str]) -> str:
    """The first three of some names."""
    return ", ".join(map(one_line, names[:3])) + f" and {len(names) - 3} more" * (len(names) > 3)


def pipeline_parts(states: list[StepState]) -> Parts:
    """The steps with their state and reason, then what to run next."""
    parts = []
    for state in states:
        sign, tone = SIGNS[state.status]
        parts += [(f"{sign} {state.status:<11}", tone), (f"{state.script:<20}", "bold")]
        parts += [
            (f"{state.counts}\n", ""),
            (f"{'':13}{one_line(state.folder)}  {state.why}\n", DIM),
        ]
    todo = next((state for state in states if state.status != "finished"), None)
    if todo and todo.status != "running":
        return [*parts, ("\nnext  ", DIM), (todo.command, "bold")]
    left = sum(undecided(state.folder) for state in states)
    text = f"; {left:,} pairs are undecided: review them, then apply" if left else ""
    text = f"nothing: all steps are finished{text}"
    text = f"wait for {todo.script}.py, which is running" if todo else text
    return [*parts, ("\nnext  ", DIM), (text, "")]


def undecided(folder: Path) -> int:
    """The pairs of a folder of step 2 that had no verdict when its clean set was written."""
    counts = read_object(folder / "apply.json").get("counts")
    count = counts.get("undecided_pairs") if isinstance(counts, dict) else 0
    return count if type(count) is int else 0


def summary(folder: Path) -> str:
    """Pairs, verdicts, training, results and the next command, for a pipe or a log."""
    path = find(folder, *PAIRS)
    (pairs, bad), verdicts = load_pairs(path), Verdicts(path.with_name("decisions.jsonl"), "")
    verdicts.poll()
    found = [(f"{len(pairs):,} flagged pairs in {one_line(path.parent)}, ", "")]
    found += review_parts(pairs, verdicts, path.parent)
    parts = [*(found if pairs else NO_PAIRS), ("\n\n", "")]
    parts += [(f"{len(bad):,} unreadable lines: {', '.join(bad[:3])}\n\n", "")] * bool(bad)
    path = find(folder, *LOG)
    log, tail = RunLog(), Tail(path)
    while (rows := tail.read()) or tail.more:
        deque(map(log.add, rows), maxlen=0)
    alarms = alarms_of(log, path, time.time()) if log.latest else []
    parts += [*run_parts(log), *((f"\nALARM: {text}", "") for text in alarms), ("\n\n", "")]
    rows = load_results(find(folder, "eval", "results.json"))
    parts += [*result_parts(rows, next(iter(RESULT_ORDERS)), True), ("\n", "")]
    parts += pipeline_parts(pipeline_states(folder))
    return printable("".join(text for text, _ in parts), 10**6)


# --- the app --------------------------------------------------------------------------------------

MOVES = {"down,j": (1, "Down"), "up,k": (-1, "Up")}
MOVES |= {"pagedown,ctrl+d": (10, "10 down"), "pageup,ctrl+u": (-10, "10 up")}
MOVES |= {"home": (-(10**9), "First"), "end,G": (10**9, "Last")}
CSS = """
#top { height: 1; background: $panel; }
#top Tabs { width: 46; height: 1; & Underline { display: none; } }
#top Tab.-active { color: $primary; text-style: bold reverse; }
#where { width: 1fr; text-align: right; color: $text-muted; padding: 0 1; }
ContentSwitcher, Pane, .body { height: 1fr; }
.fault { display: none; max-height: 6; color: $text-error; text-style: bold reverse; }
.fault, .head { height: auto; padding: 0 1; }
Lines { height: 1fr; scrollbar-size: 1 1; overflow-x: hidden; text-wrap: nowrap; }
#list { width: 36%; max-width: 60; border-right: solid $primary; }
#filter { height: 1; border: none; padding: 0 1; display: none; }
#sides VerticalScroll { height: 1fr; width: 1fr; padding: 0 1; border-top: solid $primary; }
#charts { layout: grid; grid-size: 2; height: 3fr; &.-one { grid-size: 1; } }
#events { height: 4; padding: 0 1; border-top: solid $primary; }
.-tall #events { height: 1fr; }
.table { width: auto; text-wrap: nowrap; }
VerticalScroll { scrollbar-size: 1 1; overflow-x: auto; }
.text { padding: 0 1; }
HelpPanel { width: 65%; max-width: 70; }
.-narrow HelpPanel { width: 90%; }
Ask { align: center middle; }
Ask > Vertical { width: 64; max-width: 95%; height: auto; max-height: 100%; padding: 1 2;
                 border: round $primary; background: $surface; }
Ask OptionList { max-height: 50vh; }
.-narrow FooterKey:last-of-type { dock: right; margin: 0; padding-left: 1; }
#small { display: none; width: 100%; height: 100%; content-align: center middle; }
.-wide #sides { layout: horizontal; }
.-narrow #body { layout: vertical; }
.-narrow #list { width: 100%; max-width: 100%; height: 40%; border-right: none; }
.-narrow #charts { grid-size: 1; }
.-narrow .head { max-height: 2; }
.-narrow #figures { max-height: 25%; }
.-narrow #sides VerticalScroll { height: auto; border: none; }
.-narrow #where { display: none; }
.-narrow Tab { padding: 0 1 0 0; }
.-tiny > *, .-flat > * { display: none; }
.-tiny > #small, .-flat > #small { display: block; }
"""


def make_app(args: argparse.Namespace) -> "App[None]":
    """The app; its classes are made in a function so that --help loads no third-party package."""
    from textual.app import App, ComposeResult
    from textual.binding import Binding
    from textual.containers import Container, Horizontal, Vertical, VerticalScroll
    from textual.content import Content
    from textual.geometry import Region, Size
    from textual.reactive import reactive
    from textual.screen import ModalScreen
    from textual.scroll_view import ScrollView
    from textual.strip import Strip
    from textual.visual import Visual
    from textual.widgets import ContentSwitcher, Footer, Input, OptionList, Static, Tab, Tabs
    from textual_plotext import PlotextPlot

    def bind(*rows: tuple[str, str, str, str]) -> list[Binding]:
        """Bindings of (keys, action, name in the footer or "", what it does).

        What takes text or another key acts at once, before the next key finds its receiver: over a
        slow link several arrive together, and the words of a filter are no verdicts.
        """
        first = ("filter", "note", "mark", "fields", "leave")
        return [
            Binding(k, a, name or tip, bool(name), tooltip=tip * bool(name), priority=a in first)
            for k, a, name, tip in rows
        ]

    class Lines(ScrollView, can_focus=True, inherit_bindings=False):
        """A list that renders only the lines in sight: 10,000 cost what 20 do."""

        BINDINGS = bind(*((k, f"move({by})", "", tip) for k, (by, tip) in MOVES.items()))
        cursor = reactive(0, init=False)

        def __init__(self, line: Callable[[int], Parts], moved: Callable[[], None]) -> None:
            super().__init__(id="pairs", classes="main")
            self.line, self.moved, self.count = line, moved, 0

        def fill(self, count: int, cursor: int) -> None:
            self.count, self.virtual_size = count, Size(1, count)
            self.set_reactive(Lines.cursor, max(0, min(cursor, count - 1)))
            self.watch_cursor(0)
            self.refresh()

        def validate_cursor(self, cursor: int) -> int:
            return max(0, min(cursor, self.count - 1))

        def watch_cursor(self, old: int) -> None:
            self.scroll_to_region(Region(0, self.cursor, 1, 1), animate=False)
            self.refresh_line(old)
            self.refresh_line(self.cursor)
            self.moved()

        def action_move(self, by: int) -> None:
            self.cursor += by

        def on_click(self, event: Any) -> None:
            self.cursor = round(self.scroll_y) + event.y

        def render_line(self, y: int) -> Strip:
            index, style = y + round(self.scroll_y), "reverse" if self.has_focus else "underline"
            parts = self.line(index) if index < self.count else []
            if index == self.cursor and parts:
                parts = [("▸" + "".join(t for t, _ in parts).ljust(self.size.width), style)]
            else:
                parts = [(" ", ""), *parts]
            content = Content.assemble(*parts)
            return Visual.to_strips(self, content, self.size.width, 1, self.visual_style)[0]

    class Ask(ModalScreen[Any]):
        """A question that a key, a line of text or a choice answers; escape answers None."""

        AUTO_FOCUS = "Input, OptionList"
        BINDINGS = bind(("escape", "dismiss(None)", "cancel", "Change nothing"))

        def __init__(
            self,
            question: str,
            keys: str = "",
            text: Any = None,
            of: Any = (),
            confirm: Callable[[str], str] | None = None,
        ) -> None:
            super().__init__()
            self.question, self.keys, self.text, self.choices = question, keys, text, of
            self.confirm, self.answer = confirm, ""  # confirm: of a key, what y then says yes to

        def compose(self) -> ComposeResult:
            with Vertical():
                yield Static(Content(self.question + "\n\nescape  cancel"))
                if self.text is not None:
                    yield Input(self.text)
                if self.choices:
                    yield OptionList(*map(Content, self.choices))

        def on_key(self, event: Any) -> None:
            if event.key not in self.keys:
                return
            event.stop()  # else it goes on to what is below, as a verdict
            if not self.confirm or self.answer:
                self.dismiss(self.answer or event.key)
                return
            self.answer, self.keys = event.key, "y"  # on this screen: no key falls between two
            text = f"{self.confirm(self.answer)}\n\ny  yes\n\nescape  cancel"
            self.query_one(Static).update(Content(text))

        def on_input_submitted(self, event: Any) -> None:
            self.dismiss(event.value)

        def on_option_list_option_selected(self, event: Any) -> None:
            self.dismiss(event.option_index)

    class Pane(Vertical):
        """A tab: looks at its files every POLL seconds, and says what cannot be read."""

        def on_mount(self) -> None:
            self.drawn: dict[str, Parts] = {}
            self.begin()
            self.look()
            self.set_interval(POLL, self.look)

        def look(self) -> None:
            try:
                fault = self.poll()
            except (OSError, UserError) as error:
                fault = f"Cannot be read: {error}"
            self.query_one(".fault").display = bool(fault)
            self.put(".fault", [(one_line(fault, 500), "")])
            label = f"{[*panes].index(self.id) + 1} {self.id.title()}{'!' * bool(fault)}"
            tab = self.app.query_one(f"#tab-{self.id}", Tab)
            if tab.label_text != label:
                tab.label = label

        def put(self, selector: str, parts: Parts) -> None:
            if self.drawn.get(selector) != parts:
                self.drawn[selector] = parts
                self.query_one(selector, Static).update(Content.assemble(*parts))

    class Review(Pane):
        """The flagged pairs, and the one under the cursor with what differs marked."""

        BINDINGS = bind(
            *((k, f"decide('{v}')", SHORT.get(v, v), tip) for k, (v, tip) in KEYS.items()),
            ("a", "accept", "accept", "Take the suggested class as the verdict"),
            ("u", "undo", "undo", "Take this session's last verdict back, by a new line"),
            ("e", "note", "note", "Write a note on the pair"),
            ("space", "next", "", "Go to the next undecided pair"),
            ("slash", "filter", "filter", "Filter: words, field:value, cosine>0.9; escape ends it"),
            ("f", "fields", "", "Filter by a source, benchmark, subject, class or suggestion"),
            ("o", "order", "", "Sort by state, cosine, source, benchmark, class, suggestion"),
            ("m", "mark", "", "Give all undecided pairs of the list one verdict, after asking"),
            ("J,shift+down", "texts(3)", "", "Scroll the texts, or these keys, down"),
            ("K,shift+up", "texts(-3)", "", "Scroll them up"),
            ("escape", "unfilter", "", "End the filter"),
        )

        def compose(self) -> ComposeResult:
            yield Static(classes="fault")
            yield Static(id="progress", classes="head")
            with Horizontal(id="body", classes="body"):
                with Vertical(id="list"):
                    yield Static(id="listed", classes="head")
                    yield Input(placeholder="words source:x cosine>0.9", id="filter")
                    yield Lines(self.line, self.show)
                with Vertical():
                    yield Static(id="about", classes="head")
                    with VerticalScroll(id="sides", classes="body", can_focus=False):
                        yield VerticalScroll(Static(id="train"), can_focus=False)
                        yield VerticalScroll(Static(id="test"), can_focus=False)

        def begin(self) -> None:
            self.path = find(args.folder, *PAIRS)
            self.verdicts = Verdicts(self.path.with_name("decisions.jsonl"), args.reviewer)
            self.seen, self.bound, self.orders, self.bad = None, None, deque(ORDERS), []
            self.read: str | None = None  # the pair whose texts are shown
            self.pairs: list[Row] = []
            self.shown: list[Row] = []
            self.list = self.query_one(Lines)

        def poll(self) -> str:
            if not self.pairs and find(args.folder, *PAIRS) != self.path:
                self.begin()
            new, seen = self.verdicts.poll(), file_state(self.path)
            if seen != self.seen:
                self.pairs, self.bad = load_pairs(self.path)
                self.seen = seen
                gc.freeze()  # else, each second, a walk over all pairs delays a key by 0.1 s
                self.relist()
            elif new:
                self.draw()
            return self.faults()

        def faults(self) -> str:
            strange = set(self.verdicts.last) - {pair["pair_id"] for pair in self.pairs}
            bad = f"{len(self.bad):,} unreadable lines: {', '.join(self.bad[:3])}"
            other = f"{len(strange):,} verdicts are on other pairs than these; they stay"
            return "; ".join([bad] * bool(self.bad) + [other] * bool(strange and self.pairs))

        @property
        def pair(self) -> Row:
            return self.shown[self.list.cursor] if self.shown else {}

        def relist(self, here: str | None = None) -> None:
            passes, key = make_filter(self.query_one(Input).value), ORDERS[self.orders[0]]
            known = [(pair, self.verdicts.of(pair)) for pair in self.pairs]
            kept = sorted((item for item in known if passes(*item)), key=lambda item: key(*item))
            self.shown = [pair for pair, _ in kept]
            at = next((i for i, p in enumerate(self.shown) if p["pair_id"] == here), 0)
            self.list.fill(len(self.shown), at)
            self.draw()

        def line(self, index: int) -> Parts:
            pair, verdict = self.shown[index], self.verdicts.of(self.shown[index])
            where = one_line(f"{pair['source']} × {pair['benchmark']} {pair['subject']}", 80)
            return [LOOKS[verdict][:2], (f" {pair['cosine']:.3f} {where}", DIM if verdict else "")]

        def draw(self) -> None:
            width = min(40, max(4, self.app.size.width - 72))
            full = review_parts(self.pairs, self.verdicts, self.path.parent, width)
            self.put("#progress", full if self.pairs else NO_PAIRS)
            part = f" of {len(self.pairs):,}" * (len(self.shown) < len(self.pairs))
            count = f"{len(self.shown):,}{part}, {self.orders[0]}"
            self.put("#listed", [(count, DIM)])
            self.list.refresh()
            self.show()
            if self.bound != (bound := (bool(self.shown), bool(self.verdicts.done))):
                self.bound = bound  # which keys work now
                self.refresh_bindings()

        def show(self) -> None:
            line = self.verdicts.last.get(self.pair.get("pair_id"), {})
            none = f"No pair passes. Fields: {', '.join(FACETS)}, cosine." * bool(self.pairs)
            parts = [[(none, "bold")], [], []]
            parts = pair_parts(self.pair, line, self.app.no_color) if self.pair else parts
            for name, part in zip(("#about", "#train", "#test"), parts, strict=True):
                self.put(name, part)
            before, self.read = self.read, self.pair.get("pair_id")
            for side in self.query(VerticalScroll) if self.read != before else ():
                side.scroll_home(animate=False)  # a new pair begins at its top

        def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
            typing = self.query_one(Input).has_focus
            if action == "undo" and not self.verdicts.done:
                return None
            free = ("filter", "fields", "order", "unfilter")
            return (not typing or action == "unfilter") and (bool(self.shown) or action in free)

        async def save(self, lines: dict[str, Row]) -> bool:
            try:
                for count, _ in enumerate(self.verdicts.write(lines)):
                    if count % 20 == 19:  # the screen and other keys have their turn
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
            start, count = self.list.cursor + 1, len(self.shown)
            for index in (i % count for i in range(start, start + count)):
                if not self.verdicts.of(self.shown[index]):
                    self.list.cursor = index
                    return

        async def action_undo(self) -> None:
            before = self.verdicts.done[-1]
            if await self.save(before):
                del self.verdicts.done[-2:]  # undoing is not itself undone
                self.relist(next(iter(before)))

        def action_note(self) -> None:
            pair_id = self.pair["pair_id"]
            old = self.verdicts.last.get(pair_id, {})

            async def save(note: str | None) -> None:
                if note is not None:
                    await self.save({pair_id: {"verdict": old.get("verdict"), "note": note}})

            text = one_line(old.get("note"), LONGEST_SHOWN)
            self.app.push_screen(Ask("A note on this pair; enter saves it", "", text), save)

        def action_mark(self) -> None:
            left = [pair for pair in self.shown if not self.verdicts.of(pair)]
            ask = f"One verdict for all {len(left):,} undecided pairs of the list:\n\n"
            ask += "\n".join(f"{k}  {verdict}" for k, (verdict, _) in KEYS.items())

            def lines(key: str) -> dict[str, Row]:
                what = KEYS[key][0] if key in KEYS else None
                free = (pair for pair in left if not self.verdicts.of(pair))  # by another reviewer
                chosen = {pair["pair_id"]: what or pair["suggested"] for pair in free}
                return {i: {"verdict": v} for i, v in chosen.items() if v in VERDICTS}

            def confirm(key: str) -> str:
                what = KEYS[key][0] if key in KEYS else "as suggested"
                return f"Write {len(lines(key)):,} verdicts, {what}?"

            async def save(key: str | None) -> None:
                if key:
                    await self.save(lines(key))

            ask += "\na  as suggested, where it is"
            self.app.push_screen(Ask(ask, "dgsna", confirm=confirm), save)

        def action_filter(self) -> None:
            self.query_one(Input).display = True
            self.screen.set_focus(self.query_one(Input))

        def action_unfilter(self) -> None:
            self.query_one(Input).value = ""
            self.query_one(Input).display = False
            self.list.focus()

        def on_input_changed(self) -> None:
            self.relist(self.pair.get("pair_id"))

        def on_input_submitted(self) -> None:
            self.list.focus()

        def action_fields(self) -> None:
            known = [(pair, self.verdicts.of(pair)) for pair in self.pairs]
            counts = Counter((f, facet(p, f, v)) for f in FACETS for p, v in known)
            found = [(f, v) for f, v in sorted(counts) if v][:500]

            def add(at: int | None) -> None:
                if at is not None:
                    term = f"{found[at][0]}:{shlex.quote(found[at][1])} "
                    typed = self.query_one(Input).value.rstrip()
                    self.query_one(Input).display = True
                    self.query_one(Input).value = f"{typed} {term}".lstrip()

            choices = [f"{f}: {v}  ({counts[f, v]:,})" for f, v in found]
            self.app.push_screen(Ask("List only the pairs with", of=choices), add)

        def action_order(self) -> None:
            self.orders.rotate(-1)
            self.relist(self.pair.get("pair_id"))

        def action_texts(self, by: int) -> None:
            for side in self.screen.query("KeyPanel") or self.query(VerticalScroll):
                side.scroll_relative(y=by, animate=False)

    class Watch(Pane):
        """A training run: alarms, figures, curves, events."""

        BINDINGS = bind(
            ("c", "chart", "one chart", "One chart at a time, or all four"),
            ("l", "scale", "log scale", "Logarithmic or linear values"),
            ("f", "follow", "follow", "Keep the newest event in sight, or stay where one reads"),
        )

        def compose(self) -> ComposeResult:
            yield Static(classes="fault")
            yield Static(id="figures", classes="head")
            with Container(id="charts"):
                yield from (PlotextPlot(id=name) for name in CURVES)
            with VerticalScroll(id="events", classes="main"):
                yield Static(id="log")

        def begin(self) -> None:
            self.path = find(args.folder, *LOG)
            self.tail, self.training, self.early = Tail(self.path), RunLog(), RunLog()
            self.charts, self.logarithmic = deque([None, *CURVES]), False
            self.dirty, self.due = True, 0.0
            if len(state := file_state(self.path)) and state[0] > CHUNK:  # the newest state first
                with self.path.open("rb") as file:
                    file.seek(-(1 << 16), os.SEEK_END)
                    deque(map(self.early.add, Tail(self.path).parse(file.read())), maxlen=0)
            self.query_one("#events").anchor()
            self.app.theme_changed_signal.subscribe(self, lambda _: self.draw_charts())

        def poll(self) -> str:
            if not self.tail.offset and self.path != find(args.folder, *LOG):
                self.begin()
            rows = self.tail.read()
            self.training = RunLog() if self.tail.restarted else self.training
            deque(map(self.training.add, rows), maxlen=0)
            if self.tail.more:
                self.set_timer(0.001, self.look)  # the rest of a long log, keys in between
            self.draw(bool(rows) or self.tail.restarted)
            known = self.training if self.training.latest else None
            return "ALARM: ".join(["", *alarms_of(known, self.path, time.time())]) if known else ""

        def draw(self, new: bool) -> None:
            known = self.early if self.tail.more and self.early.latest else self.training
            done = self.tail.offset / max(1, *file_state(self.path)[:1] or [1])
            reading = [(f"  reading the log, {done:.0%}", "bold reverse")]
            self.put("#figures", run_parts(known) + reading * (self.tail.more and done < 1))
            bad = [f"{self.tail.bad:,} unreadable lines"] * bool(self.tail.bad)
            events = "\n".join(bad + [event_text(row) for row in self.training.events])
            self.put("#log", [(events, "")])
            follows = self.query_one("#events").is_anchored
            self.query_one("#events").border_title = "following" if follows else "f to follow"
            self.query_one("#charts").display = bool(self.training.latest)
            self.dirty |= new
            if self.dirty and (not self.tail.more or time.monotonic() > self.due):
                self.dirty, self.due = False, time.monotonic() + 2 * POLL
                self.draw_charts()

        def draw_charts(self) -> None:
            small = self.app.size.width < 72 or self.app.size.height < 20
            one = self.charts[0] or ("loss" if small else None)
            self.query_one("#charts").set_class(bool(one), "-one")
            for name, title in CURVES.items():
                plot = self.query_one(f"#{name}", PlotextPlot)
                plot.display = name == one or not one
                plot.theme = "clear" if self.app.current_theme.ansi else "auto"
                names = {"loss": "gray", "smoothed": "cyan+"} if name == "loss" else {name: "cyan+"}
                curves = [(self.training.curves[n].buckets, c) for n, c in names.items()]
                draw_curves(plot.plt, title, curves, self.logarithmic)
                plot.refresh()

        def on_resize(self) -> None:
            self.dirty = True  # fewer charts where there is less room

        def action_chart(self) -> None:
            self.charts.rotate(-1)
            self.draw_charts()

        def action_scale(self) -> None:
            self.logarithmic = not self.logarithmic
            self.draw_charts()

        def action_follow(self) -> None:
            events = self.query_one("#events")
            events.anchor(not events.is_anchored)

    class Results(Pane):
        """Step 5's comparisons."""

        BINDINGS = bind(("o", "order", "order", "Sort by gain, loss, name, or benchmarks first"))

        def compose(self) -> ComposeResult:
            yield Static(classes="fault")
            yield VerticalScroll(Static(id="results", classes="table"), classes="main")

        def begin(self) -> None:
            self.orders, self.seen, self.rows = deque(RESULT_ORDERS), None, []

        def poll(self) -> str:
            path = find(args.folder, "eval", "results.json")
            if self.seen != (seen := file_state(path)):
                self.rows, self.seen = load_results(path), seen
            wide = self.app.size.width >= 138  # columns of TABLE and MORE
            self.put("#results", result_parts(self.rows, self.orders[0], wide))
            return ""

        def action_order(self) -> None:
            self.orders.rotate(-1)
            self.look()

    class Pipeline(Pane):
        """The five steps, and what to run next."""

        BINDINGS = bind(("y", "copy", "copy the command", "Copy the next command, by OSC 52"))

        def compose(self) -> ComposeResult:
            yield Static(classes="fault")
            yield VerticalScroll(Static(id="steps", classes="text"), classes="main")

        def begin(self) -> None:
            self.parts: Parts = [("", "")]
            self.due = 0.0

        def poll(self) -> str:
            if time.monotonic() >= self.due:
                self.parts = pipeline_parts(pipeline_states(args.folder))
                self.due = time.monotonic() + POLL_STEPS
            self.put("#steps", self.parts)
            return ""

        def action_copy(self) -> None:
            command, style = self.parts[-1]
            if style:
                self.app.copy_to_clipboard(command)
            said = "Copied, where the terminal allows it" if style else "There is nothing to run"
            self.app.notify(said)

    panes = {"review": Review, "watch": Watch, "results": Results, "pipeline": Pipeline}

    class PlatypusApp(App[None]):
        """Four tabs over one output folder."""

        TITLE = "platypus"
        AUTO_FOCUS = None  # a tab's own list has it
        CSS = CSS
        HORIZONTAL_BREAKPOINTS = [(0, "-tiny"), (40, "-narrow"), (72, "-normal"), (130, "-wide")]
        VERTICAL_BREAKPOINTS = [(0, "-flat"), (12, "-high"), (36, "-tall")]
        BINDINGS = bind(
            *((str(n), f"tab('{name}')", "", f"Show {name}") for n, name in enumerate(panes, 1)),
            ("question_mark", "help", "keys", "Show or hide all keys of this tab"),
            ("q", "quit", "", "Leave; every verdict is on disk already"),
            ("ctrl+c", "leave", "", "Leave, whatever is open"),
        )

        def compose(self) -> ComposeResult:
            with Horizontal(id="top"):
                names = enumerate(panes, 1)
                yield Tabs(*(Tab(f"{n} {name.title()}", id=f"tab-{name}") for n, name in names))
                yield Static(Content(one_line(f"{args.folder}  {args.reviewer}")), id="where")
            with ContentSwitcher(initial="review"):
                yield from (pane(id=name) for name, pane in panes.items())
            yield Static(id="small")
            yield Footer(compact=True, show_command_palette=False)

        def on_load(self) -> None:  # from here on the terminal is not as it was
            for number in ENDING:  # later: while its widgets are mounted, an exit may wait for ever
                leave = functools.partial(self.call_later, self.exit, return_code=128 + number)
                asyncio.get_running_loop().add_signal_handler(number, leave)

        def on_mount(self) -> None:
            self.query_one(Tabs).can_focus = False
            self.action_tab("review")

        def on_resize(self, event: Any) -> None:
            least = f"{event.size.width} × {event.size.height} is too small:\n40 × 12 is the least"
            self.query_one("#small", Static).update(Content(least))

        def on_tabs_tab_activated(self, event: Tabs.TabActivated) -> None:
            self.action_tab(event.tab.id.removeprefix("tab-"))

        def action_tab(self, name: str) -> None:
            self.query_one(Tabs).active = f"tab-{name}"
            self.query_one(ContentSwitcher).current = name
            self.query_one(f"#{name}").query(".main").first().focus()

        def get_system_commands(self, screen: Any) -> Any:  # nothing is written but verdicts
            return (c for c in super().get_system_commands(screen) if c.title != "Screenshot")

        def action_leave(self) -> None:
            self.exit()

        def action_help(self) -> None:
            shown = self.screen.query("HelpPanel")
            self.action_hide_help_panel() if shown else self.action_show_help_panel()

    return PlatypusApp()


@contextlib.contextmanager
def replay(args: argparse.Namespace) -> Iterator[None]:
    """A temporary copy of the recorded folder, in which another process writes the log again."""
    with tempfile.TemporaryDirectory(prefix="platypus-") as place:
        args.folder = Path(shutil.copytree(RECORDED, Path(place) / "out"))
        command = [sys.executable, RECORDED.with_name("replay.py"), args.folder / "adapter"]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL):
            yield


def main(argv: list[str] | None = None) -> None:
    """Open the app, or print the summary where there is no terminal."""
    args = parse_args(argv)
    if args.lineage:
        states = lineage(args.folder)
        broken = [state.script for state in states if not state.whole]
        print(printable("".join(text for text, _ in pipeline_parts(states)[:-2]), 10**6))
        print(f"not as recorded: {', '.join(broken)}" if broken else "all is as recorded")
        sys.exit(bool(broken))
    if not (sys.stdout.isatty() and sys.stdin.isatty()):
        print(summary(args.folder))
        return
    for number in ENDING:  # until the app has a loop, which would swallow a Ctrl-C now and then
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    with replay(args) if args.demo else contextlib.nullcontext():
        (app := make_app(args)).run()
    sys.exit(app.return_code)


if __name__ == "__main__":
    run_main(main)

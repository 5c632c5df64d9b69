"""Time the terminal UI in a real terminal (a pty): the table in README's "The terminal UI".

    python benchmarks/tui.py
    python benchmarks/tui.py --pairs 1000 --lines 10000 --idle 5

Prints seconds, processor time and memory of the demo, of the review of many pairs and of a long
training log, beside the goals. Pairs and log lines are made up in a temporary folder; no GPU, no
network. Times are from the moment that the child's imports are done, unless the row says otherwise,
to the moment that the awaited text has come out of the pty. 3 minutes; the UI takes 95 MB at most.
"""

import argparse
import contextlib
import fcntl
import json
import math
import os
import pty
import re
import select
import statistics
import struct
import subprocess
import sys
import tempfile
import termios
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Last: the package `evaluate` comes before our evaluate.py.
sys.path.append(str(Path(__file__).resolve().parent.parent))
import common

ROOT = Path(__file__).resolve().parent.parent
START_UI = """
import sys, time
sys.path.insert(0, sys.argv[1])
import tui, textual.app, textual.widgets, textual_plotext
with open(sys.argv[2], "w") as mark:
    mark.write(str(time.monotonic()))
flags = sys.argv[3:]
sys.argv = ["tui.py"]
tui.run_main(lambda: tui.main(flags))
"""
LINES = 40
COLUMNS = 120
ESCAPE_SEQUENCE = re.compile(rb"\x1b\[[0-9;?<>=]*[ -/]*[@-~]|\x1b\][^\x07]*\x07")
ESCAPE = "\x1b"  # the key
KEY_PRESSES = 300  # presses of j that are timed
TIMED_VERDICTS = 50  # given after them
SUBJECT_COUNT = 57  # as MMLU
TOKENS = 7211  # of a step in the made-up log
SUPERVISED = 4000  # of them
FILLER = "A wheel of radius r rolls along a line; find the path of a point on its rim, and " * 4


class Terminal:
    """The UI in a pty, and what it has drawn since the last key."""

    def __init__(self, flags: list[str], scratch: Path) -> None:
        self.mark = scratch / "mark"
        self.mark.unlink(missing_ok=True)
        self.drawn = b""
        self.master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", LINES, COLUMNS, 0, 0))

        command = [sys.executable, "-c", START_UI, str(ROOT), str(self.mark), *flags]
        environment = {**os.environ, "TERM": "xterm-256color", "COLORTERM": "truecolor"}
        self.began = time.monotonic()
        self.process = subprocess.Popen(
            command,
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env=environment,
            start_new_session=True,
        )
        os.close(slave)

    def text(self) -> bytes:
        """Return what was drawn, without escape sequences."""
        return ESCAPE_SEQUENCE.sub(b"", self.drawn)

    def wait_for(self, awaited: str, seconds: float = 60) -> float:
        """Read until a text has come; return that moment."""
        end = time.monotonic() + seconds
        while awaited.encode() not in self.text():
            if time.monotonic() > end or self.process.poll() is not None:
                raise TimeoutError(f"no {awaited!r} in {self.text()[-2000:]!r}")
            self.read(0.5)
        return time.monotonic()

    def has_output(self, seconds: float) -> bool:
        """Tell whether something can be read within so many seconds."""
        readable, _, _ = select.select([self.master], [], [], seconds)
        return bool(readable)

    def read(self, seconds: float) -> None:
        """Take one piece of what is drawn, or nothing after so many seconds."""
        if self.has_output(seconds):
            self.drawn += os.read(self.master, 1 << 16)

    def read_for(self, seconds: float) -> None:
        """Take all that is drawn in so many seconds."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            self.read(left)

    def press(self, keys: str) -> float:
        """Forget what was drawn and send keys; return the moment before that."""
        while self.has_output(0):
            os.read(self.master, 1 << 16)
        self.drawn = b""
        began = time.monotonic()
        os.write(self.master, keys.encode())
        return began

    def seconds_until(self, awaited: str) -> float:
        """Return the seconds from the end of the child's imports until a text has come."""
        came = self.wait_for(awaited)
        return came - float(self.mark.read_text())

    def seconds_to_show(self, awaited: str, key: str) -> float:
        """Return the seconds from a key until a text has come."""
        pressed = self.press(key)
        return self.wait_for(awaited) - pressed

    def processor_seconds(self) -> float:
        """Return the processor seconds used so far; Linux."""
        stat = Path(f"/proc/{self.process.pid}/stat").read_text()
        fields = stat.rpartition(")")[2].split()  # after the command's name
        ticks = int(fields[11]) + int(fields[12])  # utime and stime: fields 14 and 15 of the line
        return ticks / os.sysconf("SC_CLK_TCK")

    def idle_share(self, seconds: float) -> float:
        """Return the share of one processor that is used while nothing is pressed."""
        used_before = self.processor_seconds()
        began = time.monotonic()
        self.read_for(seconds)
        used = self.processor_seconds() - used_before
        return used / (time.monotonic() - began)

    def peak_megabytes(self) -> float:
        """Return the peak resident memory in MB (10^6 bytes); Linux."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        kibibytes = re.search(r"VmHWM:\s+(\d+)", status)[1]
        return int(kibibytes) * 1024 / 1e6

    def close(self) -> None:
        """Quit by key; where that does not end it, by a signal."""
        with contextlib.suppress(OSError):
            self.press("q")
        try:
            self.process.wait(5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        os.close(self.master)


@contextlib.contextmanager
def open_ui(flags: list[str], scratch: Path) -> Iterator[Terminal]:
    """Run the UI in a block."""
    terminal = Terminal([*flags, "--reviewer", "benchmark"], scratch)
    try:
        yield terminal
    finally:
        terminal.close()


@dataclass
class Filter:
    """What is typed into the filter, and how many pairs then stay."""

    text: str
    listed: int


class Rows:
    """The rows of the table that are about one thing."""

    def __init__(self, subject: str) -> None:
        self.subject = subject
        self.cells: list[list[str]] = []

    def add(self, figure: str, measured: str, goal: str = "") -> None:
        """Add a row."""
        self.cells.append([f"{self.subject}: {figure}", measured, goal])


def in_milliseconds(seconds: float) -> str:
    """Return seconds as "18 ms"."""
    return f"{1000 * seconds:.0f} ms"


def cosine_of(number: int, pairs: int) -> float:
    """Return the cosine of a made-up pair: 1 of the first, falling to 0.8."""
    return round(1 - 0.2 * number / pairs, 6)


def make_pair(number: int, pairs: int) -> dict[str, Any]:
    """Return a pair of about 1 kB, whose number stands in no other."""
    question = f"Q{number:06} {FILLER}"
    return {
        "pair_id": f"p{number}",
        "train_id": f"r{number}",
        "source": "scibench" if number % 2 else "math",
        "benchmark": "mmlu",
        "subject": f"subject_{number % SUBJECT_COUNT}",
        "test_id": f"mmlu/s/{number}",
        "cosine": cosine_of(number, pairs),
        "view": "question",
        "detector": "cosine",
        "train_question": f"{question} x axis?",
        "train_answer": FILLER,
        "test_question": f"{question} y axis?",
        "test_choices": ["1", "2", "3", "4"],
        "test_answer": "2",
        "why": "x -> y",
        "suggested": "duplicate",
    }


def make_log_line(step: int, steps: int) -> dict[str, Any]:
    """Return one optimizer step of a made-up run."""
    return {
        "step": step,
        "epoch": step / steps,
        "loss": 1 + math.exp(-step / 1000),
        "loss_token": 1,
        "learning_rate": 4e-4,
        "grad_norm": 1 + 0.1 * math.sin(step),
        "tokens": TOKENS,
        "supervised_tokens": SUPERVISED,
        "tokens_per_second": 3900.5,
        "mfu": 0.41,
        "memory_gb": 61.3,
        "gpu_util": 99,
        "seconds": step * 1.8,
        "eta_seconds": 10.0,
    }


def make_folder(out: Path, pairs: int, lines: int) -> None:
    """Write contamination/pairs.jsonl and adapter/train_log.jsonl into a new folder."""
    (out / "contamination").mkdir(parents=True)
    with (out / "contamination/pairs.jsonl").open("w") as file:
        for number in range(pairs):
            file.write(json.dumps(make_pair(number, pairs)) + "\n")

    (out / "adapter").mkdir()
    with (out / "adapter/train_log.jsonl").open("w") as file:
        for step in range(1, lines + 1):
            file.write(json.dumps(make_log_line(step, lines)) + "\n")


def make_filters(pairs: int) -> list[Filter]:
    """Return four filters, the last letter of each of which changes the list."""
    alike = [number for number in range(pairs) if cosine_of(number, pairs) >= 0.9]
    alike_scibench = [number for number in alike if number % 2]
    return [
        Filter("subject_11", len(range(11, pairs, SUBJECT_COUNT))),
        Filter("cosine>0.9", len(alike)),
        Filter("scibench cosine>0.9", len(alike_scibench)),
        Filter(f"q{pairs - 7:06}", 1),
    ]


def time_filter(terminal: Terminal, typed: Filter, pairs: int) -> float:
    """Return the seconds from the last letter of a filter to the new count of pairs."""
    terminal.press(f"/{typed.text[:-1]}")
    terminal.read_for(1.5)
    seconds = terminal.seconds_to_show(f"{typed.listed:,} of {pairs:,}", typed.text[-1])
    terminal.press(ESCAPE)
    terminal.read_for(1.5)
    return seconds


def measure_review(terminal: Terminal, pairs: int, idle: float) -> list[list[str]]:
    """Return the rows of first paint, keys, verdicts, filters and idling with many pairs."""
    first = terminal.seconds_until("Q000000")
    terminal.read_for(2)

    moves = []
    for number in range(1, KEY_PRESSES + 1):
        moves.append(terminal.seconds_to_show(f"Q{number:06}", "j"))
    verdicts = []
    for number in range(KEY_PRESSES + 1, KEY_PRESSES + TIMED_VERDICTS + 1):
        verdicts.append(terminal.seconds_to_show(f"Q{number:06}", "d"))
    filters = []
    for typed in make_filters(pairs):
        filters.append(time_filter(terminal, typed, pairs))

    rows = Rows(f"{pairs:,} pairs")
    rows.add("first paint", f"{first:.2f} s", "< 1.5 s")
    rows.add("key to repaint, median", in_milliseconds(statistics.median(moves)))
    p99 = sorted(moves)[int(0.99 * KEY_PRESSES)]
    rows.add("key to repaint, p99", in_milliseconds(p99), "< 80 ms")
    rows.add("verdict to next pair, longest", in_milliseconds(max(verdicts)))
    rows.add("filter, longest of 4", in_milliseconds(max(filters)), "< 300 ms")
    share = terminal.idle_share(idle)
    rows.add("peak memory", f"{terminal.peak_megabytes():.0f} MB")
    rows.add("idle CPU", f"{share:.1%}", "< 3 %")
    return rows.cells


def measure_watch(terminal: Terminal, lines: int, idle: float) -> list[list[str]]:
    """Return the rows of newest state, whole curve, memory and idling with a long log."""
    terminal.wait_for("1 Review")
    os.write(terminal.master, b"2")
    newest = terminal.seconds_until(f"step {lines:,}")
    whole = terminal.seconds_until(f"{SUPERVISED * lines:,} of {TOKENS * lines:,} tokens")
    terminal.read_for(2)

    rows = Rows(f"log of {lines:,} lines")
    rows.add("newest state", f"{newest:.2f} s", "< 1 s")
    rows.add("whole curve", f"{whole:.2f} s", "< 5 s")
    share = terminal.idle_share(idle)
    rows.add("peak memory", f"{terminal.peak_megabytes():.0f} MB", "< 250 MB")
    rows.add("idle CPU", f"{share:.1%}", "< 3 %")
    return rows.cells


def measure_demo(scratch: Path) -> list[list[str]]:
    """Return the row from the start of the process to the demo's first paint, median of 5."""
    seconds = []
    for _ in range(5):
        with open_ui(["--demo"], scratch) as terminal:
            seconds.append(terminal.wait_for("TRAINING") - terminal.began)
    rows = Rows("demo")
    rows.add("start of Python to first paint", f"{statistics.median(seconds):.2f} s", "< 1 s")
    return rows.cells


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--pairs", type=int, default=10_000, help="to review (default: 10,000)")
    parser.add_argument("--lines", type=int, default=100_000, help="of the log (default: 100,000)")
    parser.add_argument("--idle", type=float, default=20.0, help="seconds (default: 20)")
    return parser.parse_args(argv)


def main() -> None:
    """Measure, then print the table."""
    args = parse_args()
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        out = scratch / "out"
        make_folder(out, args.pairs, args.lines)

        rows = measure_demo(scratch)
        with open_ui([str(out)], scratch) as terminal:
            rows += measure_review(terminal, args.pairs, args.idle)
        with open_ui([str(out / "adapter")], scratch) as terminal:
            rows += measure_watch(terminal, args.lines, args.idle)
    print(common.markdown_table(["what", "measured", "goal"], rows))


if __name__ == "__main__":
    main()

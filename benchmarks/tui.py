"""How fast the terminal UI is in a real terminal (a pty): the table in README's "The terminal UI".

    python benchmarks/tui.py
    python benchmarks/tui.py --pairs 1000 --lines 10000 --idle 5

Made-up pairs and log lines in a temporary folder; no GPU, no network. Times are from the moment
that the child's imports are done, unless the row says otherwise, to the moment that the awaited
text has come out of the pty.
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
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))
CHILD = """
import sys, time
sys.path.insert(0, {root!r})
import tui, textual.app, textual.widgets, textual_plotext
open({mark!r}, "w").write(str(time.monotonic()))
sys.argv[0] = "tui.py"
tui.run_main(lambda: tui.main({args!r}))
"""
SEQUENCE = re.compile(rb"\x1b\[[0-9;?<>=]*[ -/]*[@-~]|\x1b\][^\x07]*\x07")
KEYS = 300  # presses timed
TICKS = os.sysconf("SC_CLK_TCK")


class Terminal:
    """The UI in a pty of 120 x 40."""

    def __init__(self, args: list[str], place: Path) -> None:
        self.master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 120, 0, 0))
        self.mark = place / "mark"
        self.mark.unlink(missing_ok=True)
        child = CHILD.format(root=str(ROOT), mark=str(self.mark), args=args)
        env = {**os.environ, "TERM": "xterm-256color", "COLORTERM": "truecolor"}
        self.began = time.monotonic()
        streams = {"stdin": slave, "stdout": slave, "stderr": slave}
        command = [sys.executable, "-c", child]
        self.process = subprocess.Popen(command, **streams, env=env, start_new_session=True)
        os.close(slave)
        self.data = b""

    def wait(self, text: str, seconds: float = 60) -> float:
        """The moment at which `text` has come, escape sequences left out."""
        end = time.monotonic() + seconds
        while text.encode() not in SEQUENCE.sub(b"", self.data):
            if time.monotonic() > end or self.process.poll() is not None:
                raise TimeoutError(f"no {text!r} in {SEQUENCE.sub(b'', self.data)[-2000:]!r}")
            self.drain(0.5)
        return time.monotonic()

    def drain(self, seconds: float) -> None:
        """Take what comes; returns at the first piece or after `seconds`."""
        if select.select([self.master], [], [], seconds)[0]:
            self.data += os.read(self.master, 1 << 16)

    def rest(self, seconds: float) -> None:
        """Let `seconds` pass, and read."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            self.drain(left)

    def press(self, keys: str) -> float:
        """Send keys; the moment before it. What came earlier is forgotten."""
        while select.select([self.master], [], [], 0)[0]:
            os.read(self.master, 1 << 16)
        self.data, now = b"", time.monotonic()
        os.write(self.master, keys.encode())
        return now

    def imported(self) -> float:
        """The moment at which the child had imported everything."""
        return float(self.mark.read_text())

    def cpu(self) -> float:
        """Processor seconds used so far."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / TICKS

    def peak(self) -> float:
        """Peak resident memory in MB (10^6 bytes)."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(r"VmHWM:\s+(\d+)", status)[1]) * 1024 / 1e6

    def close(self) -> None:
        """Leave by q, else be killed."""
        with contextlib.suppress(OSError):
            self.press("q")
        try:
            self.process.wait(5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        os.close(self.master)


def make_folder(place: Path, pairs: int, lines: int) -> Path:
    """Pairs of about 1 kB, of which each has a number that stands nowhere else; a long log."""
    out = place / "out"
    (out / "contamination").mkdir(parents=True)
    (out / "adapter").mkdir()
    filler = "A wheel of radius r rolls along a line; find the path of a point on its rim, and " * 4
    with (out / "contamination/pairs.jsonl").open("w") as file:
        for n in range(pairs):
            pair = {"pair_id": f"p{n}", "train_id": f"r{n}", "source": ("math", "scibench")[n % 2]}
            pair |= {"benchmark": "mmlu", "subject": f"subject_{n % 57}", "test_id": f"mmlu/s/{n}"}
            pair |= {"cosine": round(1 - 0.2 * n / pairs, 6), "view": "question"}
            pair |= {"detector": "cosine", "train_question": f"Q{n:06} {filler} x axis?"}
            pair |= {"train_answer": filler, "test_question": f"Q{n:06} {filler} y axis?"}
            pair |= {"test_choices": ["1", "2", "3", "4"], "test_answer": "2", "why": "x -> y"}
            file.write(json.dumps(pair | {"suggested": "duplicate"}) + "\n")
    with (out / "adapter/train_log.jsonl").open("w") as file:
        for n in range(1, lines + 1):
            line = {"step": n, "epoch": n / lines, "loss": 1 + math.exp(-n / 1000), "loss_token": 1}
            line |= {"learning_rate": 4e-4, "grad_norm": 1 + 0.1 * math.sin(n), "tokens": 7211}
            line |= {"supervised_tokens": 4000, "tokens_per_second": 3900.5, "mfu": 0.41}
            line |= {"memory_gb": 61.3, "gpu_util": 99, "seconds": n * 1.8, "eta_seconds": 10.0}
            file.write(json.dumps(line) + "\n")
    return out


def review(place: Path, out: Path, pairs: int, idle: float) -> list[list[str]]:
    """First paint, keys, filter, verdicts and idling with many pairs."""
    terminal = Terminal([str(out), "--reviewer", "benchmark"], place)
    first = terminal.wait("Q000000") - terminal.imported()
    terminal.rest(2)
    moves, verdicts, filters = [], [], []
    for n in range(1, KEYS + 1):
        began = terminal.press("j")
        moves.append(terminal.wait(f"Q{n:06}") - began)
    for n in range(KEYS + 1, KEYS + 51):
        began = terminal.press("d")
        verdicts.append(terminal.wait(f"Q{n:06}") - began)
    kept = [n for n in range(pairs) if round(1 - 0.2 * n / pairs, 6) >= 0.9]
    for text, listed in (  # each last letter changes the list
        ("subject_11", len(range(11, pairs, 57))),
        ("cosine>0.9", len(kept)),
        ("scibench cosine>0.9", sum(n % 2 for n in kept)),
        (f"q{pairs - 7:06}", 1),
    ):
        terminal.press(f"/{text[:-1]}")
        terminal.rest(1.5)
        began = terminal.press(text[-1])
        filters.append(terminal.wait(f"{listed:,} of {pairs:,}") - began)
        terminal.press("\x1b")
        terminal.rest(1.5)
    before, began = terminal.cpu(), time.monotonic()
    terminal.rest(idle)
    share = (terminal.cpu() - before) / (time.monotonic() - began)
    peak = terminal.peak()
    terminal.close()
    ranked = sorted(moves)
    count = f"{pairs:,} pairs"
    return [
        [f"{count}: first paint", f"{first:.2f} s", "< 1.5 s"],
        [f"{count}: key to repaint, median", f"{1000 * statistics.median(moves):.0f} ms", ""],
        [f"{count}: key to repaint, p99", f"{1000 * ranked[int(0.99 * KEYS)]:.0f} ms", "< 80 ms"],
        [f"{count}: verdict to next pair, longest", f"{1000 * max(verdicts):.0f} ms", ""],
        [f"{count}: filter, longest of 4", f"{1000 * max(filters):.0f} ms", "< 300 ms"],
        [f"{count}: peak memory", f"{peak:.0f} MB", ""],
        [f"{count}: idle CPU", f"{share:.1%}", "< 3 %"],
    ]


def watch(place: Path, out: Path, lines: int, idle: float) -> list[list[str]]:
    """Newest state, whole curve, memory and idling with a long log."""
    terminal = Terminal([str(out / "adapter"), "--reviewer", "benchmark"], place)
    terminal.wait("1 Review")
    os.write(terminal.master, b"2")
    newest = terminal.wait(f"step {lines:,}") - terminal.imported()
    whole = terminal.wait(f"{4000 * lines:,} of {7211 * lines:,} tokens") - terminal.imported()
    terminal.rest(2)
    before, began = terminal.cpu(), time.monotonic()
    terminal.rest(idle)
    share = (terminal.cpu() - before) / (time.monotonic() - began)
    peak = terminal.peak()
    terminal.close()
    return [
        [f"log of {lines:,} lines: newest state", f"{newest:.2f} s", "< 1 s"],
        [f"log of {lines:,} lines: whole curve", f"{whole:.2f} s", "< 5 s"],
        [f"log of {lines:,} lines: peak memory", f"{peak:.0f} MB", "< 250 MB"],
        [f"log of {lines:,} lines: idle CPU", f"{share:.1%}", "< 3 %"],
    ]


def demo(place: Path) -> list[list[str]]:
    """From the start of the process to the demo's first pair, median of 5."""
    seconds = []
    for _ in range(5):
        terminal = Terminal(["--demo", "--reviewer", "benchmark"], place)
        seconds.append(terminal.wait("TRAINING") - terminal.began)
        terminal.close()
    return [
        ["demo: start of Python to first paint", f"{statistics.median(seconds):.2f} s", "< 1 s"]
    ]


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--pairs", type=int, default=10_000)
    parser.add_argument("--lines", type=int, default=100_000)
    parser.add_argument("--idle", type=float, default=20.0, help="seconds (default: 20)")
    args = parser.parse_args()
    from check_contamination import markdown_table

    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        out = make_folder(place, args.pairs, args.lines)
        rows = [*demo(place), *review(place, out, args.pairs, args.idle)]
        rows += watch(place, out, args.lines, args.idle)
    print(markdown_table(["what", "measured", "goal"], rows))


if __name__ == "__main__":
    main()

"""The one harness for steps that are killed, interrupted or disturbed otherwise.

A server process imports the libraries once and forks a child for each run. A fault comes at a
place, not at a moment: just before the n-th change of the folder that the step writes to. So a
failure can be run again, and a busy machine changes nothing:

    step.run(Fault("signal", number=signal.SIGKILL, change=17))
"""

import contextlib
import ctypes
import hashlib
import json
import multiprocessing
import os
import re
import resource
import shutil
import signal
import struct
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import forkserver
from pathlib import Path

from conftest import ROOT, load_evaluate

PRELOADED = [
    "torch",
    "transformers.models.llama.modeling_llama",
    "peft",
    "sentence_transformers",
    "datasets",
    "lm_eval.models.huggingface",
    "lm_eval.tasks",
    "rich.progress",
    "tabulate",
    "textual.app",
    "textual.widgets",
    "textual_plotext",
]
STUCK = 600  # seconds: far beyond any run, on a busy machine too
STARTED = "the script begins"
WITH_TIMES = re.compile(rb'"\w*seconds": [\d.]+')  # in files that a step writes: differs each time
WITH_SPEEDS = re.compile(r"^checkpoints/|train_log")  # and memory, and what --resume leaves out
CAPABILITIES = struct.pack("Ii", 0x20080522, 0)  # the header of Linux's capset(), version 3
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(PRELOADED)


@dataclass(frozen=True)
class Fault:
    """What is put in a step's way."""

    kind: str = ""  # "signal", "full disk", "read-only", "clock" or, for nothing, ""
    number: int = 0  # of the signal; the largest size of a file in bytes
    change: int = 0  # a signal comes just before this change of the folder, counted from 1


NOTHING = Fault()


def start_server(folder: Path) -> None:
    """Start the process that imports, in a folder without an evaluate.py.

    lm_eval needs the package of that name.
    """
    os.environ["OMP_NUM_THREADS"] = "1"  # more of them wait for each other where others work
    with contextlib.chdir(folder):
        forkserver.ensure_running()


# --- in the child ---------------------------------------------------------------------------------


def call_before_changes(folder: Path, changing: Callable[[], None]) -> None:
    """Call `changing` before each change of a folder: a file opened, locked, renamed, removed."""
    locked = str(folder)

    def watch(event: str, arguments: tuple) -> None:
        if event == "open":
            path, _, flags = arguments
            if flags & (os.O_WRONLY | os.O_RDWR) and str(path).startswith(locked):
                changing()
        elif event == "fcntl.flock":
            if os.readlink(f"/proc/self/fd/{arguments[0]}").startswith(locked):
                changing()
        elif event in ("os.rename", "os.mkdir", "os.remove", "os.rmdir"):
            if str(arguments[0]).startswith(locked):
                changing()

    sys.addaudithook(watch)


def put_in_the_way(fault: Fault, folder: Path, counter: Path) -> None:
    """Set up one fault in this process; `counter` gets a byte for each change of the folder."""
    if fault.kind == "full disk":  # the same error for every file from that size up
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (fault.number, fault.number))
    if fault.kind == "read-only":  # root, too, has to obey the modes of files
        no_capability = bytes(24)
        assert ctypes.CDLL(None).capset(CAPABILITIES, no_capability) == 0
    if fault.kind == "clock":
        turn_clock_back()

    changes = os.open(counter, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    count = 0

    def changing() -> None:
        nonlocal count
        count += 1
        if fault.kind == "signal" and count == fault.change:
            os.kill(os.getpid(), fault.number)
        elif fault.kind != "full disk":
            os.write(changes, b".")

    call_before_changes(folder, changing)


def turn_clock_back() -> None:
    """Make each look at the clock earlier than the one before."""
    now = time.time
    gmtime = time.gmtime
    time.time = lambda: 2e9 - now()
    time.gmtime = lambda seconds=None: gmtime(time.time() if seconds is None else seconds)


def run_in_child(
    script: str, args: list[str], log: Path, fault: Fault, folder: Path, counter: Path
) -> None:
    """Run a script as its user starts it, all output into `log`, with one fault in its way."""
    os.setsid()  # so that a terminal given as `log` becomes its own
    file = os.open(log, os.O_RDWR | os.O_CREAT | os.O_APPEND)
    if os.isatty(file):
        os.dup2(file, 0)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.stdin = sys.__stdin__ = open(0, closefd=False)
    # those of the server were of other files
    sys.stdout = sys.__stdout__ = open(1, "w", buffering=1, closefd=False)
    sys.stderr = sys.__stderr__ = open(2, "w", buffering=1, closefd=False)
    sys.argv = [f"{script}.py", *args]
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in a shell's background
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # ignored after nohup
    sys.path.append(str(ROOT))
    os.chdir(ROOT)
    import common

    module = load_evaluate() if script == "evaluate" else __import__(script)
    put_in_the_way(fault, folder, counter)
    print(STARTED, flush=True)
    common.run_main(module.main)


# --- a step ---------------------------------------------------------------------------------------


def files_of(folder: Path) -> dict[str, str]:
    """The sha256 of every file below a folder."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            found[str(path.relative_to(folder))] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


class Step:
    """One command, and what it writes when nothing is in its way."""

    def __init__(
        self, script: str, args: list[object], place: Path, given: Path | None = None
    ) -> None:
        """Run the command once; `given` is a folder that it works on, copied for each run."""
        self.script = script
        self.given = given
        self.out = place / "work/out"
        self.kept = place / "kept"
        self.log = place / "log"
        self.counter = place / "changes"
        self.args = [*map(str, args), "--out", str(self.out)]
        self.fresh()
        assert self.run() == 0, self.text()
        self.changes = self.counter.stat().st_size
        self.expected = self.outputs()
        assert self.expected
        sizes = [path.stat().st_size for path in self.out.rglob("*") if path.is_file()]
        self.largest = max(sizes)
        shutil.copytree(self.out, self.kept)

    def places(self, count: int) -> list[int]:
        """So many changes of the folder, spread evenly, the first and the last among them."""
        count = min(count, self.changes)
        return [1 + (self.changes - 1) * part // (count - 1) for part in range(count)]

    def fresh(self) -> "Step":
        """Leave nothing of an earlier run; return the step."""
        shutil.rmtree(self.out.parent, ignore_errors=True)
        self.out.parent.mkdir(parents=True)
        if self.given:
            shutil.copytree(self.given, self.out)
        return self

    def start(self, fault: Fault = NOTHING, resume: bool = True) -> multiprocessing.Process:
        """Start the command in a child; what a killed finetune.py left is gone on with."""
        self.log.unlink(missing_ok=True)
        args = list(self.args)
        if self.script == "finetune" and self.out.exists() and resume:
            args.append("--resume")
        arguments = (self.script, args, self.log, fault, self.out.parent, self.counter)
        process = SERVER.Process(target=run_in_child, args=arguments)
        process.start()
        return process

    def run(self, fault: Fault = NOTHING, resume: bool = True) -> int:
        """Run the command to its end; its exit code, negative for a signal."""
        process = self.start(fault, resume)
        process.join(STUCK)
        assert process.exitcode is not None, "stuck"
        return process.exitcode

    def text(self) -> str:
        """All that the last run printed."""
        return self.log.read_text() if self.log.exists() else ""

    def outputs(self) -> dict[str, str]:
        """The sha256 of every output without its times; each file is what run.json says."""
        records = ["apply.json"] if self.given else ["run.json", "apply.json"]
        found = {}
        for record in records:
            if not (self.out / record).exists():
                continue
            listed = json.loads((self.out / record).read_text())["outputs"]
            for name, described in listed.items():
                data = (self.out / name).read_bytes()
                assert hashlib.sha256(data).hexdigest() == described["sha256"], name
                if not WITH_SPEEDS.search(name):
                    found[name] = hashlib.sha256(WITH_TIMES.sub(b"", data)).hexdigest()
        return found

    def state(self) -> str:
        """What the output folder is: "nothing" new, "unfinished", or "finished" and then whole."""
        before = files_of(self.given) if self.given else {}
        now = files_of(self.out)
        assert before.get("decisions.jsonl") == now.get("decisions.jsonl")
        if now == before:
            return "nothing"
        if ".unfinished" in now:
            return "unfinished"
        assert self.outputs() == self.expected
        return "finished"

    def finishes(self) -> None:
        """With nothing in its way any more it ends well and leaves nothing half-written."""
        assert self.run() == 0, self.text()
        assert self.state() == "finished", self.text()
        assert list(self.out.parent.rglob(".*")) == []

    def is_refused(self, code: int, *words: str) -> None:
        """It has ended with one line that has one of `words`."""
        text = self.text()
        assert code == 2, (code, text)
        assert "Traceback" not in text, text
        assert any(word in text.splitlines()[-1] for word in words), text

"""Holds: whatever breaks a step or a review (a kill, Ctrl-C, a full or read-only disk, a clock that
goes backwards, a second process) nothing looks finished that is not, nothing is lost, and the next
run ends with the same bytes. pytest -s tests/test_faults.py prints the table of tests/README.md."""

import contextlib
import fcntl
import json
import os
import pty
import shutil
import signal
import struct
import termios
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import DEMO, ROOT
from harness import SERVER, STARTED, STUCK, Fault, Step, files_of, run_in_child, start_server
from test_tui import Terminal, decisions, make_pair, write_lines

import common
import tui

KILLS = 10  # of each step
INTERRUPTS = 3
KINDS = ["kill -9", "Ctrl-C", "full disk", "read-only", "clock", "two at once"]
STEPS = ["build", "check", "apply", "finetune", "merge", "evaluate"]
TRIED: Counter[tuple[str, str]] = Counter()  # (step, kind of fault) -> trials
SURVIVED: Counter[tuple[str, str]] = Counter()


@contextlib.contextmanager
def trial(name: str, kind: str) -> Iterator[None]:
    """Count a fault, and that it was survived if nothing is raised."""
    TRIED[name, kind] += 1
    yield
    SURVIVED[name, kind] += 1


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> None:
    start_server(tmp_path_factory.mktemp("server"))


@pytest.fixture(scope="module")
def steps(demo, server, tmp_path_factory) -> dict[str, Step]:
    """The six commands, each on what the one before has written."""
    top = tmp_path_factory.mktemp("faults")
    base = ROOT / "demo/base_model"
    cache = ["--cache", demo / "cache"]
    made = {}

    flags = [*DEMO, "--sources", "math,openbookqa", *cache]
    made["build"] = Step("build_dataset", flags, top / "build")

    dataset = Path(shutil.copy(demo / "dataset/dataset.jsonl", top))  # without its run.json
    flags = ["--dataset", dataset, *DEMO, "--benchmarks", "mmlu", *cache]
    made["check"] = Step("check_contamination", flags, top / "check")

    checked = made["check"].kept
    for number, line in enumerate((checked / "pairs.jsonl").open()):
        verdict = common.VERDICTS[number % 4]
        pair_id = json.loads(line)["pair_id"]
        common.append_decision(checked / "decisions.jsonl", pair_id, verdict, "ann")
    made["apply"] = Step("check_contamination", ["apply"], top / "apply", given=checked)

    flags = ["--base-model", base, "--data", made["apply"].kept / "clean.jsonl"]
    flags += ["--limit", 24, "--batch-size", 8, "--save-every", 1]
    made["finetune"] = Step("finetune", flags, top / "finetune")

    flags = ["--base-model", base, "--adapter", made["finetune"].kept]
    made["merge"] = Step("merge", flags, top / "merge")

    flags = ["--model", base, "--model", made["merge"].kept, *DEMO, "--tasks", "arc", "--limit", 4]
    made["evaluate"] = Step("evaluate", flags, top / "evaluate")
    return made


@pytest.fixture
def untouched(demo, steps) -> Iterator[None]:
    """Every fault has to leave what earlier steps wrote, and all inputs, as they were."""
    places = [demo] + [step.kept for step in steps.values()]

    def inputs() -> list[dict[str, str]]:
        found = []
        for place in places:
            files = files_of(place)
            found.append({name: files[name] for name in files if "sqlite" not in name})
        return found

    before = inputs()
    yield
    assert inputs() == before


# --- the steps ------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.usefixtures("untouched")
@pytest.mark.parametrize("name", STEPS)
def test_killed_before_its_nth_change(steps, name: str) -> None:
    step = steps[name]
    for place in step.places(KILLS):
        with trial(name, "kill -9"):
            step.fresh()
            code = step.run(Fault("signal", signal.SIGKILL, place))
            assert code == -signal.SIGKILL, (place, step.text())
            if step.state() != "finished":  # after its last change it is, and then it is whole
                step.finishes()


@pytest.mark.usefixtures("untouched")
@pytest.mark.parametrize("name", STEPS)
def test_interrupted_before_its_nth_change(steps, name: str) -> None:
    step = steps[name]
    for place in step.places(INTERRUPTS):
        with trial(name, "Ctrl-C"):
            step.fresh()
            code = step.run(Fault("signal", signal.SIGINT, place))
            assert "Traceback" not in step.text(), (place, step.text())
            assert code in (0, 130), (place, step.text())  # too late to stop what is whole
            if step.state() != "finished":
                assert code == 130, place
                step.finishes()


@pytest.mark.usefixtures("untouched")
def test_killed_again_and_again_it_gets_to_its_end(steps) -> None:
    """Each run of the training goes on from what the one before has left."""
    step = steps["finetune"].fresh()
    kills = 0
    while step.run(Fault("signal", signal.SIGKILL, step.changes // 3)) != 0:
        assert step.state() in ("nothing", "unfinished")
        kills += 1
        assert kills < 10
    assert kills >= 2
    assert step.state() == "finished"


@pytest.mark.usefixtures("untouched")
def test_a_killed_training_is_not_begun_again_unasked(steps) -> None:
    step = steps["finetune"].fresh()
    with trial("finetune", "kill -9"):
        step.run(Fault("signal", signal.SIGKILL, step.changes - 2))
        assert list(step.out.glob("checkpoints/step-*"))
        code = step.run(resume=False)
        step.is_refused(code, "go on with --resume, or begin again with --overwrite")
        step.finishes()


@pytest.mark.usefixtures("untouched")
@pytest.mark.parametrize("name", STEPS)
def test_full_disk(steps, name: str) -> None:
    step = steps[name].fresh()
    for part in (1, 3):
        with trial(name, "full disk"):
            code = step.run(Fault("full disk", step.largest * part // 4))
            step.is_refused(code, "too large", "room")
            assert step.state() != "finished"
    step.finishes()


@pytest.mark.usefixtures("untouched")
@pytest.mark.parametrize("name", STEPS)
def test_read_only_output(steps, name: str) -> None:
    step = steps[name].fresh()
    folders = [step.out] if step.given else [step.out.parent, step.out]
    for folder in folders:
        with trial(name, "read-only"):
            folder.mkdir(exist_ok=True)
            folder.chmod(0o555)
            step.is_refused(step.run(Fault("read-only")), "Permission denied")
            folder.chmod(0o755)
            assert step.state() == "nothing"
    step.finishes()


@pytest.mark.usefixtures("untouched")
@pytest.mark.parametrize("name", STEPS)
def test_a_clock_that_goes_backwards(steps, name: str) -> None:
    step = steps[name].fresh()
    with trial(name, "clock"):
        assert step.run(Fault("clock")) == 0, step.text()
        assert step.state() == "finished"


@pytest.mark.usefixtures("untouched")
@pytest.mark.parametrize("name", STEPS)
def test_two_at_once(steps, name: str) -> None:
    """One does the work; the other is refused, whether it came too early or too late."""
    step = steps[name].fresh()
    with trial(name, "two at once"):
        both = [step.start(), step.start(resume=False)]
        for process in both:
            process.join(STUCK)
        codes = sorted(process.exitcode for process in both)
        text = step.text()
        assert "Traceback" not in text, text
        assert step.state() == "finished"
        if codes == [0, 0]:  # apply may follow apply
            assert step.given
        else:
            assert codes == [0, 2], text
            reasons = ("another process", "is finished", "go on with --resume")
            assert any(reason in text for reason in reasons), text
    step.fresh()


def test_an_interrupt_before_main(monkeypatch, capsys) -> None:
    monkeypatch.setattr(os, "environ", {**os.environ})
    monkeypatch.setattr(common, "silence_libraries", lambda: signal.raise_signal(signal.SIGINT))
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored after `&`
    try:
        with pytest.raises(SystemExit) as end:
            common.run_main(lambda: pytest.fail("it went on"))
    finally:
        signal.signal(signal.SIGINT, handler)
    assert end.value.code == 130
    assert capsys.readouterr().err.startswith("interrupted: ")


# --- the terminal UI, in a terminal of its own ----------------------------------------------------


class Screen(Terminal):
    """A review in a child of the server, with one fault put in its way."""

    def __init__(self, folder: Path, fault: Fault | None = None, reviewer: str = "ann") -> None:
        self.master, self.slave = pty.openpty()
        fcntl.ioctl(self.slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
        terminal = Path(os.ttyname(self.slave))
        args = [str(folder), "--reviewer", reviewer]
        counter = folder.parent / f"changes of {reviewer}"
        self.data = b""
        self.process = SERVER.Process(
            target=run_in_child,
            args=("tui", args, terminal, fault or Fault(), folder, counter),
        )
        self.process.start()
        threading.Thread(target=self.collect, daemon=True).start()

    def alive(self) -> bool:
        return self.process.is_alive()

    def judge_until_it_ends(self, first: int) -> dict[str, str]:
        """Give verdicts from pair `first` on; those after which it went on to the next pair."""
        given = {}
        keys = list(tui.KEYS)
        seen = 0
        for number in range(first, first + 50):
            while f"Q{number:05}" not in self.text()[seen:]:
                if not self.alive():
                    return given
                time.sleep(0.005)
            if number > first:
                key = keys[(number - 1) % len(keys)]
                given[f"pair{number - 1:05}"] = tui.KEYS[key][0]
            seen = self.press(keys[number % len(keys)])
        raise AssertionError("it did not end")

    def end(self, sign: int | None = None) -> int:
        """Its exit code after a signal, or `q`: a child that has not begun ignores both."""
        while STARTED.encode() not in self.data and self.alive():
            time.sleep(0.002)
        if sign:
            os.kill(self.process.pid, sign)
        elif self.alive():
            self.press("q")
        self.process.join(STUCK)
        time.sleep(0.05)  # for what it wrote last
        os.close(self.slave)
        return self.process.exitcode


@pytest.fixture
def review(tmp_path, server) -> Path:
    """A folder with 200 pairs, and an empty log of what was decided on."""
    out = tmp_path / "out"
    write_lines(out / "contamination/pairs.jsonl", [make_pair(n) for n in range(200)])
    (out / "contamination/decisions.jsonl").touch()
    return out


def verdicts(folder: Path) -> dict[str, str]:
    """pair_id -> verdict; every line on the disk is whole."""
    return {line["pair_id"]: line["verdict"] for line in decisions(folder)}


def assert_terminal_restored(screen: Screen) -> None:
    """The alternate screen, if it was opened, is closed again."""
    opened = screen.data.rfind(b"\x1b[?1049h")
    if opened >= 0:
        assert screen.data.rfind(b"\x1b[?1049l") > opened, screen.text()[-3000:]
    assert "Traceback" not in screen.text()


@pytest.mark.slow
def test_a_review_killed_before_its_nth_change(review) -> None:
    """A verdict is two changes: the log is opened, and locked."""
    log = review / "contamination/decisions.jsonl"
    for place in range(1, KILLS + 1):
        with trial("tui", "kill -9"):
            before = log.read_bytes()
            known = verdicts(review)
            screen = Screen(review, Fault("signal", signal.SIGKILL, place))
            given = screen.judge_until_it_ends(len(known))
            assert screen.end() == -signal.SIGKILL
            now = verdicts(review)
            assert log.read_bytes().startswith(before)
            assert now.items() >= known.items() | given.items()
            assert len(now) - len(known) - len(given) in (0, 1)  # one may be written, not yet drawn
    assert len(verdicts(review)) >= KILLS


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_review_that_is_told_to_end(review, sign: signal.Signals) -> None:
    for place in (1, 4):
        with trial("tui", "Ctrl-C"):
            known = verdicts(review)
            screen = Screen(review, Fault("signal", sign, place))
            given = screen.judge_until_it_ends(len(known))
            assert screen.end() in (0, 128 + sign)
            assert verdicts(review).items() >= known.items() | given.items()
            assert_terminal_restored(screen)


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_the_demo_leaves_nothing(tmp_path, sign: signal.Signals) -> None:
    with trial("tui", "Ctrl-C"):
        terminal = Terminal("--demo", "--reviewer", "ann", TMPDIR=str(tmp_path))
        terminal.wait("decided")
        assert list(tmp_path.iterdir())
        terminal.process.send_signal(sign)
        assert terminal.process.wait(STUCK) in (0, 128 + sign)
        assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("room", [0, 20, 700])
def test_a_review_on_a_full_disk(review, room: int) -> None:
    log = review / "contamination/decisions.jsonl"
    with trial("tui", "full disk"):
        common.append_decision(log, "pair00000", "duplicate", "bob")
        screen = Screen(review, Fault("full disk", log.stat().st_size + room))
        screen.wait("Q00001")
        given = 1
        seen = screen.press("g")
        while "Not saved" not in screen.text()[seen:]:
            if f"Q{given + 1:05}" in screen.text()[seen:]:
                given += 1
                seen = screen.press("g")
            time.sleep(0.01)
            assert screen.alive()
            assert given < 20
        assert screen.end() == 0
        assert list(common.read_decisions(log)) == [f"pair{number:05}" for number in range(given)]
        assert (given > 1) == (room > 99)

        screen = Screen(review)  # there is room again
        screen.wait(f"Q{given:05}")
        screen.wait(f"Q{given + 1:05}", screen.press("s"))
        assert screen.end() == 0
        known = list(common.read_decisions(log).values())
        assert known[-1]["verdict"] == "similar-but-different"
        assert len(known) == given + 1


@pytest.mark.parametrize("name", ["contamination", "contamination/decisions.jsonl"])
def test_a_review_that_may_not_write(review, name: str) -> None:
    log = review / "contamination/decisions.jsonl"
    with trial("tui", "read-only"):
        if name == "contamination":
            log.unlink()
        (review / name).chmod(0o555)
        screen = Screen(review, Fault("read-only"))
        screen.wait("Q00000")
        screen.wait("Permission denied", screen.press("d"))
        assert "Not saved" in screen.text()
        assert "1 of 200 decided" not in screen.text()
        (review / name).chmod(0o755)
        screen.wait("Q00001", screen.press("d"))
        assert screen.end() == 0
        assert verdicts(review) == {"pair00000": "duplicate"}


def begin_review(review: Path) -> tuple[Screen, int]:
    """A review after its first verdict, and how much it had drawn then."""
    screen = Screen(review)
    screen.wait("Q00000")
    screen.wait("Q00001", screen.press("d"))
    return screen, len(screen.text())


def test_pairs_that_are_cut_short_during_a_review(review) -> None:
    screen, seen = begin_review(review)
    os.truncate(review / "contamination/pairs.jsonl", 1500)  # within a line
    screen.wait("unreadable", seen)
    screen.press("g")
    assert screen.end() == 0
    assert verdicts(review)["pair00000"] == "duplicate"


def test_pairs_that_are_replaced_during_a_review(review) -> None:
    path = review / "contamination/pairs.jsonl"
    pairs = [make_pair(n + 50, train_question=f"Z{n:05}", cosine=1 - n / 100) for n in range(9)]
    write_lines(review / "new.jsonl", pairs)
    screen, seen = begin_review(review)
    path.unlink()
    screen.wait("no flagged pairs here", seen)
    screen.press("g")  # there is no pair to judge
    os.replace(review / "new.jsonl", path)
    screen.wait("Z00000", seen)
    screen.wait("Z00001", screen.press("n"))
    assert screen.end() == 0
    expected = {"pair00000": "duplicate", "pair00050": "not-a-leak"}
    assert verdicts(review).items() >= expected.items()


def test_a_review_while_the_clock_goes_backwards(review) -> None:
    with trial("tui", "clock"):
        screen = Screen(review, Fault("clock"))
        screen.wait("Q00000")
        for number, key in enumerate("dgsn", 1):
            screen.wait(f"Q{number:05}", screen.press(key))
        assert screen.end() == 0
        assert list(verdicts(review).values()) == [verdict for verdict, _ in tui.KEYS.values()]
        times = [line["time"] for line in decisions(review)]
        assert times == sorted(times, reverse=True)
        assert times[0] < "2020"


@pytest.mark.parametrize("killed", [False, True])
def test_two_reviewers_at_once(review, killed: bool) -> None:
    with trial("tui", "two at once"):
        ann = Screen(review, reviewer="ann")
        bob = Screen(review, reviewer="bob")
        ann.wait("Q00000")
        bob.wait("Q00000")
        for key in "dgsndgsn":
            ann.press(key)
            bob.press(key)
        if killed:
            ann.end(signal.SIGKILL)
        while Counter(line["reviewer"] for line in decisions(review))["bob"] < 8:
            assert bob.alive()
            time.sleep(0.05)
        assert bob.end() == 0
        if not killed:
            assert ann.end() == 0
        counts = Counter(line["reviewer"] for line in decisions(review))
        assert counts["bob"] == 8
        assert killed or counts["ann"] == 8


# --- what was tried -------------------------------------------------------------------------------


def fault_table(names: list[str]) -> str:
    """Tried / survived of each step and kind of fault, and of all."""
    rows = []
    for name in [*names, "all"]:
        row = [name]
        for kind in [*KINDS, "all"]:
            keys = [key for key in TRIED if name in (key[0], "all") and kind in (key[1], "all")]
            tried = sum(TRIED[key] for key in keys)
            survived = sum(SURVIVED[key] for key in keys)
            row.append(f"{survived} of {tried}")
        rows.append(row)
    return common.markdown_table(["step", *KINDS, "all"], rows)


def test_table() -> None:
    """The last of this file: every fault that was tried was survived."""
    names = [*STEPS, "tui"]
    table = fault_table(names)
    print("\nFaults, survived of tried:\n" + table)
    assert SURVIVED == TRIED
    whole = all(TRIED[name, kind] for name in names for kind in KINDS)
    if whole:  # else a part of the file was run
        assert all(TRIED[name, "kill -9"] >= KILLS for name in names)
        assert table in (ROOT / "tests/README.md").read_text(encoding="utf-8")

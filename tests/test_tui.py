"""Holds: every key does what it says; a verdict is on disk when its key returns; two reviewers see
each other; text from files cannot act on the terminal; a log is followed whatever happens to it;
every step's state is told by records and lock, and the command after it is the one that the step
itself prints; nothing is cut at 80 x 24."""

import asyncio
import contextlib
import fcntl
import json
import math
import os
import pty
import random
import re
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
import unicodedata
from pathlib import Path

import pytest
from conftest import ROOT, assert_refused, run_script

import common
import tui
from common import UserError, sha256_of

HOSTILE = [
    # markup
    "x [/] y",
    "[$x]",
    "[@click=app.quit]a[/]",
    "[red]r[/red]",
    "[b",
    "]]][[[",
    "[link=x]y[/link]",
    # sequences that begin with escape
    "\x1b]0;title\x07",
    "\x1b]52;c;aGk=\x07",
    "\x1b[31m",
    "\x1b[2J",
    "\x1b[?1049l",
    "\x1bc",
    "\x1b[6n",
    "\x1bP+q544e\x1b\\",
    "\x1b_x\x1b\\",
    "\x1b^x\x1b\\",
    "\x1b]8;;http://x\x1b\\t",
    "\x1b[201~",
    "\x1b[>c",
    "\x1b#8",
    "\x1b(0",
    "\x1b[10;10H",
    "\x1b",
    "\x1b\x1b",
    "\x1b[38;5;99;7m",
    # the same in one byte, C1
    "\x9b31m",
    "\x9d0;t\x9c",
    "\x90q\x9c",
    "\x85",
    "\x84",
    "\x8d",
    "\x9f",
    "\x80",
    "\x98x\x9c",
    # text that runs the other way
    "\u202eabc",
    "\u202dabc",
    "\u2066a\u2069",
    "\u2067a",
    "\u2068a",
    "\u202aa\u202c",
    "\u202b",
    "\u061c",
    "\u200e",
    "\u200f",
    "שלום עולם",
    "مرحبا",
    # what is not drawn
    "\u200b",
    "\u200c",
    "\u200d",
    "\u2060",
    "\ufeff",
    "\u00ad",
    "\u180e",
    "\u034f",
    "\u3164",
    "\u115f",
    "\u2800",
    "\ufe0f",
    "\U000e0041",
    "\U000e0101",
    "\u2028",
    "\u2029",
    "\u00a0\u3000",
    "\ufffe",
    "\ue000",
    # long or wide
    "e" + "\u0301" * 300,
    "x" * 1_000_000,
    "\U0001f468\u200d\U0001f469",
    # control characters
    "a\tb",
    "a\r\nb",
    "\r",
    "\x00",
    "\x07\x07",
    "\x08\x08\x08",
    "\x7f",
    "\x0b\x0c",
    "\x0e\x0f",
    "\x1a",
    # no characters, and what other layers could read
    "\ud800",
    "\udfff\ud800",
    "",
    " ",
    "$error",
    "%s {0} {x}",
    "'\"; --",
    "source:x",
]
DANGER = re.compile(  # what no field of the data may bring to a terminal
    "[\x00-\x06\x08\x0b\x0c\x0e-\x1a\x1c-\x1f\x7f-\x9f\u00ad\u034f\u061c\u115f\u1160\u180e"
    "\u200b-\u200f\u2028-\u202e\u2060-\u2069\u3164\ufe00-\ufe0f\ufeff\U000e0000-\U000e01ef]"
)
OURS = re.compile(  # the sequences that Textual itself writes
    r"\x1b\[[0-9;]*m|\x1b\[\d+;\d+H|\x1b\[H|\x1b\[\??[0-9;]*[hlJKu]|\x1b\[[<>=][0-9;]*u|\x1b\[\?[0-9;]*\$p"
    r"|\x1b\[[0-9;]*t|\x1b\[>[0-9]*[qc]|\x1b\[c|\x1b\[\?[0-9]+\$?u|\x1b\]22;[a-z-]*\x07|\x1b\[6n"
)


SOURCES = ("math", "scibench")
BENCHMARKS = ("mmlu", "arc", "mmlu")
SUBJECTS = ("algebra", "all", "physics")


def make_pair(number: int, **fields) -> dict:
    """One of a row of pairs that differ in all they can be sorted and filtered by."""
    verdicts = (*common.VERDICTS, None)
    pair = {
        "pair_id": f"pair{number:05}",
        "train_id": f"row{number:05}",
        "source": SOURCES[number % 2],
        "benchmark": BENCHMARKS[number % 3],
        "subject": SUBJECTS[number % 3],
        "test_id": f"mmlu/algebra/{number}",
        "cosine": round(1 - number / 20_000, 6),
        "view": "question",
        "detector": "cosine",
        "train_question": f"Q{number:05} Rotate the figure about the x axis.",
        "train_answer": f"The area is {number}.",
        "test_question": f"Q{number:05} Rotate the figure about the y axis.",
        "test_choices": ["1", "2", "3", "4"],
        "test_answer": "2",
        "suggested": verdicts[number % 5],
        "why": "differs in 1 of 7 words: x -> y",
    }
    return pair | fields


def write_lines(path: Path, rows: list[dict]) -> Path:
    """JSONL; half of a surrogate pair as its escape."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(common.to_jsonl(rows), encoding="utf-8", errors="backslashreplace")
    return path


def step_line(step: int, **fields) -> dict:
    line = {
        "step": step,
        "epoch": step / 100,
        "loss": 2 + math.exp(-step / 30),
        "learning_rate": 4e-4,
        "grad_norm": 1.5,
        "tokens": 100,
        "supervised_tokens": 40,
        "tokens_per_second": 200.0,
        "mfu": 0.41,
        "seconds": step / 2,
        "eta_seconds": 60.0,
    }
    return line | fields


def comparison(task: str, percent: float, **fields) -> dict:
    row = {
        "model": "out/merged",
        "base": "base",
        "task": task,
        "metric": "acc",
        "questions": 100,
        "base_score": 50.0,
        "score": 50 + percent / 2,
        "points": percent / 2,
        "percent": percent,
        "interval": [-1.0, 2.5],
        "gained": 9,
        "lost": 4,
        "p": 0.27,
        "verdict": "better",
        "points_unflagged": 1.0,
        "points_flagged": 5.0,
    }
    return row | fields


@pytest.fixture
def folder(tmp_path) -> Path:
    """An output folder with 12 pairs, a log of 40 steps with events, and results."""
    out = tmp_path / "out"
    write_lines(out / "contamination/pairs.jsonl", [make_pair(n) for n in range(12)])
    lines = [step_line(n) for n in range(1, 41)]
    lines.insert(0, {"event": "start", "steps": 80})
    lines.append({"event": "sample", "step": 40, "text": "Hello you"})
    write_lines(out / "adapter/train_log.jsonl", lines)
    write_results(out, [comparison("mmlu", 4.0), comparison("mmlu/algebra", -8.0, verdict="worse")])
    return out


def write_results(out: Path, comparisons: list) -> None:
    (out / "eval").mkdir(exist_ok=True)
    (out / "eval/results.json").write_text(json.dumps({"comparisons": comparisons}))


def screen_of(app) -> list[str]:
    """The lines that are on the screen."""
    return [strip.text for strip in app.screen._compositor.render_strips()]


def drive(folder: Path, script, size: tuple[int, int] = (80, 24)):
    """Open the app and run `script`, a coroutine function of (app, pilot) or a list of keys."""

    async def session():
        app = tui.PlatypusApp(folder, "ann")
        async with app.run_test(size=size, notifications=True) as pilot:
            await pilot.pause()
            if callable(script):
                await script(app, pilot)
            else:
                await pilot.press(*script)
            await pilot.pause()
            app.lines_shown = screen_of(app)
        return app

    return asyncio.run(session())


def is_shown(app, text: str) -> bool:
    """Whether a line of the screen holds `text`."""
    return any(text in line for line in screen_of(app))


def decisions(folder: Path) -> list[dict]:
    """The lines of the log of verdicts."""
    path = folder / "contamination/decisions.jsonl"
    if not path.exists():
        return []
    return [json.loads(line) for line in path.open()]


def modified(folder: Path) -> dict[Path, int]:
    """{path: when it was written last} of all that is below a folder."""
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


# --- text -----------------------------------------------------------------------------------------


def test_printable_lets_nothing_through_that_a_terminal_obeys_or_hides() -> None:
    every = "".join(map(chr, range(sys.maxunicode + 1)))
    shown = common.printable(every, len(every))
    assert not DANGER.search(shown)
    categories = {unicodedata.category(char) for char in set(shown) - {"\n"}}
    assert categories.isdisjoint({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"})
    for text in ("\\u202e", "\\ud800", "␛", "␍"):
        assert text in shown
    long = "x" * (common.LONGEST_SHOWN + 1000)
    assert "1,000 more characters" in common.printable(long)
    piled = common.printable("e" + "\u0301" * 9)
    assert unicodedata.combining(piled[common.COMBINING_SHOWN])
    assert piled.count("\u0301") == common.COMBINING_SHOWN


def test_differing_words_and_nothing_else_are_marked() -> None:
    rng = random.Random(0)
    for _ in range(200):
        words = rng.choices(["axis", "7", "x", "+", "Ünit", "the"], k=rng.randint(1, 30))
        other = [word if rng.random() < 0.8 else "zebra" for word in words]
        left = " ".join(words)
        right = " ".join(other)
        spans_left, spans_right = tui.differing(left, right)
        kept_left = cut(left, spans_left)
        kept_right = cut(right, spans_right)
        assert kept_left.lower().split() == kept_right.lower().split()
        assert "zebra" not in kept_right


def cut(text: str, spans: list) -> str:
    for start, end in reversed(spans):
        text = text[:start] + text[end:]
    return text


# --- review ---------------------------------------------------------------------------------------


def test_every_key_of_review(folder) -> None:
    async def script(app, pilot):
        review = app.query_one("#review")
        for key, (verdict, _) in tui.KEYS.items():
            pair = review.pair
            await pilot.press(key)
            last = decisions(folder)[-1]
            assert last["verdict"] == verdict
            assert last["pair_id"] == pair["pair_id"]
            assert review.pair is not pair
        pair = review.pair  # number 4 has no suggestion
        await pilot.press("a")
        assert review.pair is pair
        assert len(decisions(folder)) == 4
        await pilot.press("down")
        pair = review.pair
        await pilot.press("a")
        assert decisions(folder)[-1]["verdict"] == pair["suggested"] == "duplicate"
        await pilot.press("u")
        last = decisions(folder)[-1]
        del last["time"]
        withdrawn = {"verdict": None, "reviewer": "ann", "note": ""}
        assert last == {"pair_id": pair["pair_id"], **withdrawn}
        assert review.verdicts.of(pair) is None
        assert review.pair["pair_id"] == pair["pair_id"]
        await pilot.press("home", "e", *"why", "enter")
        await pilot.pause()
        last = decisions(folder)[-1]
        assert last["note"] == "why"
        assert last["verdict"] == review.verdicts.of(review.pair)
        await pilot.press("o")
        cosines = [pair["cosine"] for pair in review.shown]
        assert review.orders[0] == "cosine, high to low"
        assert cosines == sorted(cosines, reverse=True)
        await pilot.press("home", "space")
        assert review.verdicts.of(review.pair) is None

    drive(folder, script)
    known = common.read_decisions(folder / "contamination/decisions.jsonl")
    assert len(known) == 4
    assert {line["reviewer"] for line in known.values()} == {"ann"}


def test_moving_with_arrows_vim_keys_and_the_mouse(folder) -> None:
    async def script(app, pilot):
        lines = app.query_one("#pairs")
        keys = "down j k up end home G ctrl+u pagedown pageup ctrl+d down"
        cursors = [1, 2, 1, 0, 11, 0, 11, 1, 11, 1, 11, 11]
        for key, cursor in zip(keys.split(), cursors, strict=True):
            await pilot.press(key)
            assert lines.cursor == cursor, key
        await pilot.click("#pairs", offset=(5, 3))
        assert lines.cursor == 3
        await pilot.click("#tab-watch")
        await pilot.pause()
        assert app.query_one("ContentSwitcher").current == "watch"

    drive(folder, script)


def test_filters_by_keyboard(folder) -> None:
    async def script(app, pilot):
        review = app.query_one("#review")
        await pilot.press("slash", *"source:math subject:alg", "enter")
        assert [pair["pair_id"] for pair in review.shown] == ["pair00000", "pair00006"]
        await pilot.press("d", "o")
        assert decisions(folder)[0]["pair_id"] == "pair00000"
        await pilot.press("escape")
        assert len(review.shown) == 12
        await pilot.press("slash", *"class:und cosine<0.9997 q0000", "enter")
        assert {pair["pair_id"][-1] for pair in review.shown} == {*"6789"}
        await pilot.press("escape", "slash", *"verdict:none")
        await pilot.pause()
        assert is_shown(app, "No pair passes. Fields: source")
        await pilot.press("escape", "escape", "f")
        await pilot.pause()
        await pilot.press("down", "enter")
        await pilot.pause()
        assert review.filter.value == "benchmark:mmlu "
        assert {pair["benchmark"] for pair in review.shown} == {"mmlu"}
        await pilot.press("escape", "slash", *"cosine>0.9997", "enter", "f")
        await pilot.pause()
        await pilot.press("down", "enter")
        await pilot.pause()
        assert review.filter.value == "cosine>0.9997 benchmark:mmlu "

    drive(folder, script)


def test_a_new_pair_begins_at_its_top(folder) -> None:
    async def script(app, pilot):
        sides = app.query_one("#review").query("VerticalScroll")
        await pilot.press("J")
        await pilot.pause()
        assert any(side.scroll_y > 0 for side in sides)
        await pilot.press("d")
        await pilot.pause()
        assert all(side.scroll_y == 0 for side in sides)

    drive(folder, script, (80, 16))


def test_a_whole_list_is_marked_only_after_the_number_is_confirmed(folder) -> None:
    async def script(app, pilot):
        await pilot.press("s", "slash", *"source:math", "enter", "m")
        await pilot.pause()
        assert is_shown(app, "all 5 undecided")
        await pilot.press("g")
        await pilot.pause()
        assert is_shown(app, "Write 5 verdicts, gray-area?")
        await pilot.press("escape")
        assert len(decisions(folder)) == 1
        await pilot.press("m")
        await pilot.pause()
        await pilot.press("g")
        await pilot.pause()
        await pilot.press("y")
        await pilot.pause()
        assert [line["verdict"] for line in decisions(folder)[1:]] == ["gray-area"] * 5
        await pilot.press("u")
        assert [line["verdict"] for line in decisions(folder)[6:]] == [None] * 5
        await pilot.press("m")
        await pilot.pause()
        await pilot.press("a")
        await pilot.pause()
        await pilot.press("y")
        await pilot.pause()

    drive(folder, script)
    known = common.read_decisions(folder / "contamination/decisions.jsonl")
    del known["pair00000"]
    assert known
    for number in range(2, 12, 2):
        suggested = make_pair(number)["suggested"]
        line = known.pop(f"pair{number:05}", {"verdict": None})
        assert line["verdict"] == suggested
    assert not known


def test_fifty_pairs_by_keyboard_alone(folder) -> None:
    write_lines(folder / "contamination/pairs.jsonl", [make_pair(n) for n in range(50)])
    keys = [random.Random(1).choice("dgsn") for _ in range(50)]
    app = drive(folder, keys, size=(120, 30))
    log = decisions(folder)
    assert [line["pair_id"] for line in log] == [f"pair{n:05}" for n in range(50)]
    assert [line["verdict"] for line in log] == [tui.KEYS[key][0] for key in keys]
    shown = "\n".join(app.lines_shown)
    assert "50 of 50 decided" in shown
    gone = 50 - keys.count("n")
    assert f"All decided: {gone} of the 50 flagged rows would go" in shown
    assert "check_contamination.py apply" in shown


def test_the_command_that_applies_holds_any_folder(folder, tmp_path) -> None:
    """A blank is quoted; what a terminal would obey is shown."""
    strange = tmp_path / "my \x1b[31m out"
    folder.rename(strange)
    for number in range(12):
        log = strange / "contamination/decisions.jsonl"
        common.append_decision(log, f"pair{number:05}", "duplicate", "ann")
    app = drive(strange, [], size=(200, 30))
    shown = "".join(app.lines_shown)
    assert "\x1b" not in shown
    quoted = shlex.quote(str(strange / "contamination")).replace("\x1b", "␛")
    assert f"apply --out {quoted}" in shown


def test_what_would_be_removed_is_what_apply_removes(demo, tmp_path) -> None:
    shutil.copytree(demo / "contamination", tmp_path / "contamination")
    pairs, _ = tui.load_pairs(tmp_path / "contamination/pairs.jsonl")
    verdicts = tui.Verdicts(tmp_path / "contamination/decisions.jsonl", "ann")
    for number, pair in enumerate(pairs[:-2]):
        verdicts.write(pair["pair_id"], {"verdict": common.VERDICTS[number % 4]})
    verdicts.write(pairs[0]["pair_id"], {"verdict": None})
    done = run_script("check_contamination", "apply", "--out", tmp_path / "contamination")
    assert done.returncode == 0, done.stderr
    removed = common.read_jsonl(tmp_path / "contamination/removed.jsonl", {"id": str})
    assert {row["id"] for row in removed} == tui.removed_rows(pairs, verdicts)


# --- watch ----------------------------------------------------------------------------------------


def test_every_key_of_watch(folder) -> None:
    async def script(app, pilot):
        await pilot.press("2")
        await pilot.pause()
        watch = app.query_one("#watch")
        assert is_shown(app, "step 40 of 80, 50%")
        assert is_shown(app, "Hello you")
        for expected in [*([name] for name in tui.CURVES), [*tui.CURVES]]:
            await pilot.press("c")
            shown = [name for name in tui.CURVES if app.query_one(f"#{name}").display]
            assert shown == expected
        await pilot.press("l")
        assert watch.logarithmic
        await pilot.pause()
        assert is_shown(app, "log scale")
        events = app.query_one("#events")
        assert events.is_anchored
        await pilot.press("f")
        assert not events.is_anchored
        await pilot.press("f")
        assert events.is_anchored
        with (folder / "adapter/train_log.jsonl").open("a") as log:
            bad = step_line(41, loss=float("nan"), supervised_tokens=0)
            log.write(common.to_jsonl([bad]))
        watch.look()
        await pilot.pause()
        shown = " ".join(" ".join(screen_of(app)).split())
        alarms = "ALARM: loss is NaN or infinite at step 41; ALARM: no supervised tokens at step 41"
        assert alarms in shown
        assert is_shown(app, "2 Watch!")

    drive(folder, script)


def test_a_log_is_followed_whatever_happens_to_it(tmp_path) -> None:
    path = tmp_path / "log.jsonl"
    tail = tui.Tail(path)

    def steps() -> list:
        return [row.get("step") for row in tail.read()]

    assert steps() == []
    assert not tail.restarted
    write_lines(path, [{"step": 1}, {"step": 2}])
    assert steps() == [1, 2]
    with path.open("ab") as log:
        log.write(b'{"step": 3}\n{"step"')
    assert steps() == [3]
    assert steps() == []
    with path.open("ab") as log:
        log.write(b': 4}\n\xff\xfe\n[1]\nnonsense\n{"step": 5}\n')
    assert steps() == [4, 5]
    assert tail.bad == 3
    with path.open("r+b") as log:  # finetune.py --resume cuts it
        log.truncate(12)
    assert steps() == [1]
    assert tail.restarted
    write_lines(tmp_path / "new", [{"step": 7}, {"step": 8}, {"step": 9}])
    os.replace(tmp_path / "new", path)
    assert steps() == [7, 8, 9]
    assert tail.restarted
    write_lines(path, [{"step": 70}, {"step": 80}, {"step": 90}, {"step": 100}])  # in place, longer
    assert steps() == [70, 80, 90, 100]
    assert tail.restarted
    path.unlink()
    assert steps() == []
    assert tail.restarted
    assert steps() == []
    assert not tail.restarted
    write_lines(path, [{"step": 1, "text": "x" * 3_000_000}, {"step": 2}])
    assert [row["step"] for row in tail.read_all()] == [1, 2]  # the first is longer than a chunk


def test_following_in_random_pieces_reads_what_reading_whole_does(tmp_path) -> None:
    rng = random.Random(3)
    path = tmp_path / "log.jsonl"
    rows = [step_line(n, text="é" * rng.randint(0, 300)) for n in range(1, 400)]
    data = common.to_jsonl(rows).encode()
    path.write_bytes(b"")
    tail = tui.Tail(path)
    found = []
    written = 0
    while written < len(data):
        size = rng.randint(1, 900)
        with path.open("ab") as log:
            log.write(data[written : written + size])
        written += size
        found += tail.read(rng.randint(1, 2000))
    found += tail.read_all()
    assert found == rows
    assert tail.bad == 0


def test_a_long_curve_keeps_its_spikes_in_bounded_memory() -> None:
    curve = tui.Curve()
    for step in range(1, 100_001):
        curve.add(step, 50.0 if step == 77_777 else 1.0)
    count = len(curve.buckets)
    assert tui.POINTS <= count <= 2 * tui.POINTS
    spikes = [place for place, bucket in enumerate(curve.buckets) if bucket.high == 50]
    assert len(spikes) == 1
    assert spikes[0] > 0.7 * count  # near the end, where it was
    steps = [bucket.step for bucket in curve.buckets]
    assert steps == sorted(steps)
    assert steps[0] == 1


def test_alarms(tmp_path, monkeypatch) -> None:
    path = write_lines(tmp_path / "train_log.jsonl", [step_line(1)])

    def alarms(*rows: dict, later: float = 0) -> str:
        log = tui.RunLog()
        for number in range(1, 60):
            log.add(step_line(number))
        for row in rows:
            log.add(row)
        return "; ".join(tui.alarms_of(log, path, path.stat().st_mtime + later))

    assert alarms() == alarms(later=59) == ""
    assert "NaN or infinite at step 60" in alarms(step_line(60, loss=float("nan")))
    assert "NaN or infinite at step 60" in alarms(step_line(60, loss=None))
    assert "grad norm is NaN" in alarms(step_line(60, grad_norm=float("inf")))
    spikes = alarms(step_line(60, loss=9.0), step_line(61, loss=99.0))
    assert "loss spike at step 60, 2 times to step 61" in spikes
    assert "no supervised tokens at step 60" in alarms(step_line(60, supervised_tokens=0))
    assert "stalled: no line for 0:01:00" in alarms(later=61)
    assert alarms({"event": "end", "step": 59}, later=9999) == ""
    assert "stalled" in alarms(step_line(60, seconds=60 * 30), later=301)
    assert alarms(step_line(60, seconds=60 * 30), later=299) == ""
    (tmp_path / "run.json").write_text("{}")
    assert alarms(later=9999) == ""
    usage = type("usage", (), {"total": 1e12, "free": 1e9})
    monkeypatch.setattr(tui.shutil, "disk_usage", lambda _: usage)
    assert alarms() == "disk nearly full: 1.0 GB free"


def test_a_resumed_run_draws_its_steps_once() -> None:
    log = tui.RunLog()
    for step in [*range(1, 31), *range(21, 41)]:
        log.add(step_line(step))
    assert [bucket.step for bucket in log.curves["loss"].buckets] == [*range(1, 41)]


# --- results, pipeline ----------------------------------------------------------------------------


def result_lines(app) -> list[list[str]]:
    """The words of each row of the table."""
    lines = [line for line in app.lines_shown if "%" in line and "points" not in line]
    return [line.split() for line in lines]


def test_results_are_a_sorted_table_with_bars(folder) -> None:
    first, second = result_lines(drive(folder, ["3"]))
    assert first[:2] == ["mmlu", "+4.0%"]
    assert "│███" in first
    assert second[:2] == ["algebra", "-8.0%"]
    assert any(word.endswith("█│") for word in second)
    first, second = result_lines(drive(folder, ["3", "o", "o"], size=(200, 60)))
    assert [first[0], second[0]] == ["algebra", "mmlu"]
    assert " ".join(second).endswith("better 0.27 -1.0 to +2.5 9 4 +1.0 +5.0")


def test_results_without_numbers_are_shown_and_others_refused(folder) -> None:
    nothing = dict.fromkeys(("percent", "p", "interval", "verdict", "points"))
    write_results(folder, [{}, comparison("x", 1.0) | nothing])
    assert len(tui.load_results(folder / "eval/results.json")) == 2
    assert any("+0.0 pt" in line for line in drive(folder, ["3"]).lines_shown)
    (folder / "eval/results.json").write_text("[1]")
    assert any("no results.json" in line for line in drive(folder, ["3"]).lines_shown)


def test_the_average_is_the_first_result_in_every_order(folder) -> None:
    """A mean of four benchmarks: no question of it is gained or lost, and it has no p."""
    average = {"metric": "mean", "gained": None, "lost": None, "p": None}
    rows = [comparison("arc", 2.0), comparison("average", 1.0, **average)]
    rows += [comparison("mmlu", -3.0), comparison("mmlu/algebra", 9.0)]
    write_results(folder, rows)
    for presses in range(len(tui.RESULT_ORDERS)):
        lines = result_lines(drive(folder, ["3", *["o"] * presses], size=(200, 60)))
        names = [line[0] for line in lines]
        assert names[0] == "average", presses
        assert sorted(names[1:]) == ["algebra", "arc", "mmlu"], presses
        assert lines[0][-5:] == ["+2.5", "–", "–", "+1.0", "+5.0"]


def finish(folder: Path, script: str, *inputs: Path, **more) -> None:
    """What a finished step leaves: its run.json."""
    folder.mkdir(parents=True, exist_ok=True)
    run = {
        "step": script,
        "command": f"python {script}.py --out {folder}",
        "inputs": {str(path): {"sha256": sha256_of(path)} for path in inputs},
        "counts": {"rows": 1234},
    }
    (folder / "run.json").write_text(json.dumps(run | more))


def states_of(out: Path) -> dict[str, tui.StepState]:
    """{script: state} of a pipeline with one folder for each step."""
    return {state.script: state for state in tui.pipeline_states(out)}


def test_what_is_next_is_what_the_finished_step_says(tmp_path) -> None:
    """The same whole command, with its local files, quoted, wherever the folders are."""
    out = tmp_path / "my out"
    out.mkdir()
    states = tui.pipeline_states(out)
    assert {state.status for state in states} == {"not run"}
    assert tui.command_to_run(states) == f"python build_dataset.py --out '{out}/dataset'"
    finish(out / "rows", "build_dataset", settings={"local": "demo/data"})  # of another name
    checked = ["--dataset", f"{out}/rows/dataset.jsonl", "--out", f"{out}/contamination"]
    command = shlex.join(["python", "check_contamination.py", *checked, "--local", "demo/data"])
    assert common.next_command(out / "rows") == command
    assert tui.command_to_run(tui.pipeline_states(out)) == command

    finish(out / "contamination", "check_contamination")
    finish(out / "adapter", "finetune")
    adapters = [{"contamination": str(out / "contamination")}]
    finish(out / "merged", "merge", base_model="a model", adapters=adapters)
    command = common.next_command(out / "merged")
    assert tui.command_to_run(tui.pipeline_states(out)) == command
    assert f"--model 'a model' --model '{out}/merged' " in command
    finish(out / "merged", "merge", base_model="a model", adapters=[])  # edited: of no check
    command = tui.command_to_run(tui.pipeline_states(out))
    models = f"--model 'a model' --model '{out}/merged'"
    assert command == f"python evaluate.py {models} --out '{out}/eval'"


def test_states_of_the_pipeline(tmp_path) -> None:
    out = tmp_path / "out"
    source = write_lines(tmp_path / "source.jsonl", [{"a": 1}])
    finish(out / "dataset", "build_dataset", source)
    data = write_lines(out / "dataset/dataset.jsonl", [{"id": "1"}])
    finish(out / "contamination", "check_contamination", data)
    log = write_lines(out / "contamination/decisions.jsonl", [{"pair_id": "p"}])
    applied = {"decisions_sha256": sha256_of(log)}
    (out / "contamination/apply.json").write_text(json.dumps(applied))
    (out / "adapter/checkpoints/step-10").mkdir(parents=True)
    (out / "adapter/.unfinished").write_text("python finetune.py --out x\n")
    (out / "other").mkdir()
    (out / "other/.unfinished").write_text("python merge.py --out other\n")
    with (out / "other/.unfinished").open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        states = states_of(out)
    assert {script: state.status for script, state in states.items()} == {
        "build_dataset": "finished",
        "check_contamination": "finished",
        "finetune": "unfinished",
        "merge": "running",
        "evaluate": "not run",
    }
    assert states["build_dataset"].counts == "1,234 rows"
    assert states["finetune"].command == "python finetune.py --out x --resume"
    shown = tui.text_of(tui.pipeline_parts([*states.values()]))
    assert shown.endswith("next  python finetune.py --out x --resume")
    log.write_text(log.read_text() + "\n")
    state = states_of(out)["check_contamination"]
    assert state.status == "stale"
    assert state.command == f"python check_contamination.py apply --out {out}/contamination"
    (out / "dataset/run.json").write_text("broken")
    state = tui.pipeline_states(out)[0]
    assert state.status == "unfinished"
    assert "run.json" in state.why


def make_chain(place: Path) -> Path:
    """Three finished steps below place/out, by names that count from `place`; the last folder."""
    before = write_lines(place / "raw/rows.jsonl", [{"raw": 1}])
    names = ("dataset/dataset.jsonl", "contamination/clean.jsonl", "adapter/weights.safetensors")
    for name in names:
        path = write_lines(place / "out" / name, [{"rows": name}])
        record_step(place, before, path)
        before = path
    return before.parent


def record_step(place: Path, read: Path, written: Path) -> None:
    inputs = {str(read.relative_to(place)): {"sha256": sha256_of(read)}}
    outputs = {written.name: {"sha256": sha256_of(written)}}
    script = tui.STEPS[written.parent.name]
    run = {"step": script, "command": f"python {script}.py", "inputs": inputs, "outputs": outputs}
    (written.parent / "run.json").write_text(json.dumps(run))


def reasons(states: list) -> dict[str, tuple[str, str]]:
    """{script: (status, why)} of the steps that have a folder."""
    known = [state for state in states if state.status != "not run"]
    return {state.script: (state.status, state.why) for state in known}


def test_a_step_is_stale_once_the_one_before_it_is_made_again(tmp_path, monkeypatch) -> None:
    last = make_chain(tmp_path)
    out = tmp_path / "out"
    data = out / "dataset/dataset.jsonl"
    clean = out / "contamination/clean.jsonl"
    hashed = []

    def note_and_hash(path: Path) -> str:
        hashed.append(path)
        return sha256_of(path)

    monkeypatch.setattr(tui, "sha256_of", note_and_hash)

    def statuses() -> list[str]:
        return [status for status, _ in reasons(tui.pipeline_states(out)).values()]

    assert statuses() == ["finished"] * 3
    old = data.read_text()
    data.write_text("{}\n")
    assert statuses() == ["finished"] * 3  # by hand: that is for --lineage to find
    record_step(tmp_path, tmp_path / "raw/rows.jsonl", data)
    found = reasons(tui.pipeline_states(out))
    assert found["check_contamination"] == ("stale", "made again since: out/dataset/dataset.jsonl")
    status, why = found["finetune"]
    assert status == "stale"
    assert re.fullmatch("made from .*, which is stale", why)
    command = tui.command_to_run(tui.pipeline_states(out))
    assert command == "python check_contamination.py --overwrite"
    data.write_text(old)
    record_step(tmp_path, tmp_path / "raw/rows.jsonl", data)
    assert statuses() == ["finished"] * 3  # made again with the same bytes
    (out / "contamination/.unfinished").write_text("python check_contamination.py")
    assert statuses() == ["finished", "unfinished", "stale"]
    assert hashed == []  # the models below would take minutes
    (out / "contamination/.unfinished").unlink()
    clean.write_text("{}\n")
    assert reasons(tui.lineage(last)) == {
        "build_dataset": ("finished", "2 files as recorded, by hash"),
        "check_contamination": ("edited", "edited or gone: clean.jsonl"),
        "finetune": ("stale", "changed since, or gone: out/contamination/clean.jsonl"),
    }
    assert len(hashed) == 4  # each file once, though a step wrote and another read it
    assert len({*hashed}) == 4


def is_whole(folder: Path) -> bool:
    """Whether all behind a folder is as recorded."""
    return all(state.whole for state in tui.lineage(folder))


def test_lineage_walks_in_the_chain_that_it_is_asked_about(tmp_path, monkeypatch) -> None:
    """Standing in a copy of it, whose names are the same."""
    last = make_chain(tmp_path / "mine")
    make_chain(tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    assert is_whole(last)
    assert is_whole(Path("out"))
    data = tmp_path / "mine/out/dataset/dataset.jsonl"
    text = data.read_text()
    for damage in (lambda: data.write_text("{}\n"), data.unlink):
        damage()
        assert [status for status, _ in reasons(tui.lineage(last)).values()] == [
            "edited",
            "stale",
            "finished",
        ]
        assert is_whole(Path("out/adapter"))
    data.write_text(text)
    (tmp_path / "copy/out/dataset/dataset.jsonl").write_text("{}\n")
    assert is_whole(last)
    assert not is_whole(Path("out/adapter"))
    monkeypatch.chdir("out/adapter")
    assert not is_whole(Path())


def test_the_lock_of_a_step_is_seen_and_left_alone(tmp_path) -> None:
    mark = tmp_path / ".unfinished"
    mark.write_text("x")
    assert not tui.is_held(mark)
    assert not tui.is_held(tmp_path / "none")
    with mark.open() as held:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)  # is_held() let go
        assert tui.is_held(mark)
    assert not tui.is_held(mark)


# --- everywhere -----------------------------------------------------------------------------------


def test_help_palette_and_tabs(folder) -> None:
    async def script(app, pilot):
        for key, name in zip("1234", tui.TABS, strict=True):
            await pilot.press(key)
            await pilot.pause()
            assert app.query_one("ContentSwitcher").current == name
            assert app.focused in app.query_one(f"#{name}").query("*")
        await pilot.press("1", "question_mark")
        await pilot.pause()
        assert app.screen.query("HelpPanel")
        assert any("duplicate" in line for line in screen_of(app)[:-1])
        await pilot.press(*"JJJJJJ")
        await pilot.pause()
        assert is_shown(app, "Go to the next undecided")
        await pilot.press("question_mark")
        await pilot.pause()
        assert not app.screen.query("HelpPanel")
        titles = [command.title for command in app.get_system_commands(app.screen)]
        assert "Theme" in titles
        assert "Screenshot" not in titles
        await pilot.press("ctrl+p")
        await pilot.pause()
        assert type(app.screen).__name__ == "CommandPalette"
        await pilot.press("escape", "4", "y")
        await pilot.pause()
        assert app.clipboard.startswith("python ")
        await pilot.press("q")

    drive(folder, script)


@pytest.mark.parametrize("size", [(40, 12), (40, 20), (80, 24), (200, 60)])
def test_it_works_at_any_size_with_and_without_data(tmp_path, folder, size) -> None:
    async def script(app, pilot):
        for key, text in zip("1234", ("Rotate", "loss, nats", "+4.0%", "finetune"), strict=True):
            await pilot.press(key, "down", "end", "home")
            await pilot.pause()
            assert is_shown(app, text), key
            if key == "2" and size[1] > 12:
                assert is_shown(app, "smoothed")
        await pilot.press("1", "home", "d", "question_mark")
        await pilot.resize_terminal(100, 30)
        await pilot.resize_terminal(*size)

    drive(folder, script, size)
    assert len(decisions(folder)) == 1
    empty = tmp_path / "empty"
    empty.mkdir()
    scripts = ("check_contam", "finetune.py", "evaluate.py", "build_dataset")
    for key, script in zip("1234", scripts, strict=True):
        app = drive(empty, [key, "d", "a", "u", "space", "m", "e", "o"], size)
        assert any(script in line for line in app.lines_shown), key
    assert not list(empty.iterdir())


def test_a_terminal_that_is_too_small_says_so(folder) -> None:
    for size in ((30, 20), (90, 8)):
        shown = "\n".join(drive(folder, ["down"], size).lines_shown)
        assert f"{size[0]} × {size[1]}" in shown
        assert "40 × 12" in shown


def is_readable(segment) -> bool:
    """Whether letters have another colour than their ground."""
    style = segment.style
    if not (segment.text.strip() and style and style.color and style.bgcolor):
        return True
    return style.color != style.bgcolor or style.color.is_default


@pytest.mark.parametrize(
    "theme", ["textual-dark", "textual-light", "ansi-dark", "ansi-light", "nord"]
)
def test_themes(folder, theme) -> None:
    async def script(app, pilot):
        app.theme = theme
        for key in "1234":
            await pilot.press(key)
            await pilot.pause()
        await pilot.press("2")
        await pilot.pause()
        braille = [line for line in screen_of(app) if re.search("[\u2801-\u28ff]", line)]
        assert len(braille) >= 3
        for strip in app.screen._compositor.render_strips():
            for segment in strip:
                assert is_readable(segment), strip.text

    drive(folder, script)


def test_nothing_is_cut_at_80_by_24(folder) -> None:
    async def script(app, pilot):
        await pilot.press("d")
        for key in "1234":
            await pilot.press(key)
            await pilot.pause()
            await pilot.pause()
            for label in (*app.query("FooterKey"), *app.query("Tab")):
                text = label.render().plain
                assert label.region.width >= len(text), (key, text)
                assert label.region.right <= 80, (key, text)
                assert label.region.bottom <= 24, (key, text)
            assert "? keys" in screen_of(app)[-1]
            pane = app.query_one("ContentSwitcher").current
            for part in app.query_one(f"#{pane}").query(".head, .main, #sides > *"):
                assert part.region.right <= 80, part
                assert part.region.bottom <= 23, part
            for head in app.query_one(f"#{pane}").query(".head"):
                assert head.virtual_size.height <= head.size.height, head
                assert head.size.width >= 20
            if pane == "results":
                assert is_shown(app, "not distinguishable")
            if pane == "watch":
                for text in (*tui.CURVES.values(), "tokens/s 200"):
                    assert is_shown(app, text), text

    write_results(folder, [comparison("mmlu", 4.0, verdict="not distinguishable")])
    drive(folder, script)


def test_the_key_that_shows_all_keys_is_in_sight_at_40_columns(folder) -> None:
    for tab in "1234":
        assert "? keys" in drive(folder, [tab], size=(40, 24)).lines_shown[-1]


@pytest.mark.parametrize("key", ["", "m", "e", "f", "slash", "question_mark"])
def test_ctrl_c_leaves_whatever_is_open(folder, key: str) -> None:
    async def script(app, pilot):
        if key:
            await pilot.press(key)
        await pilot.pause()
        assert not app._exit
        await pilot.press("ctrl+c")
        await pilot.pause()
        assert app._exit

    drive(folder, script)
    assert not decisions(folder)


def test_a_note_leaves_a_verdict_that_came_while_it_was_written(folder) -> None:
    async def script(app, pilot):
        pair_id = app.query_one("#review").pair["pair_id"]
        await pilot.press("e", *"why")
        log = folder / "contamination/decisions.jsonl"
        common.append_decision(log, pair_id, "gray-area", "bob")
        await pilot.press("enter")
        await pilot.pause()
        last = decisions(folder)[-1]
        assert [last["pair_id"], last["reviewer"]] == [pair_id, "ann"]
        assert [last["verdict"], last["note"]] == ["gray-area", "why"]

    drive(folder, script)


def test_faults_are_a_line_on_the_screen(folder, monkeypatch) -> None:
    pairs = folder / "contamination/pairs.jsonl"
    with pairs.open("a") as file:
        file.write('not json\n{"pair_id": 7}\n')
    common.append_decision(folder / "contamination/decisions.jsonl", "foreign", "duplicate", "bob")
    shown = " ".join(" ".join(drive(folder, ["down"]).lines_shown).split())
    assert "2 unreadable lines: pairs.jsonl:13" in shown
    assert "1 verdicts are on other pairs" in shown
    assert "0 of 12 decided" in shown

    def refuse(*_, **__) -> None:
        raise OSError(30, "Read-only file system", "decisions.jsonl")

    monkeypatch.setattr(tui, "append_decision", refuse)

    async def script(app, pilot):
        await pilot.press("d")
        await pilot.pause(0.5)

    app = drive(folder, script)
    shown = " ".join(" ".join(app.lines_shown).split())
    for text in ("Not saved", "Read-only file system", "0 of 12 decided"):
        assert text in shown, text
    assert app.return_code in (0, None)
    pairs.unlink()
    pairs.mkdir()
    (folder / "adapter/train_log.jsonl").unlink()
    (folder / "adapter/train_log.jsonl").mkdir()
    assert any("Cannot be read" in line for line in drive(folder, ["down"]).lines_shown)
    assert any("Cannot be read" in line for line in drive(folder, ["2"]).lines_shown)
    assert_refused(run_script("tui", folder), "directory")


def assert_harmless(text: str) -> None:
    """Nothing in it that a terminal obeys or hides."""
    assert not DANGER.search(text.replace("\n", ""))
    assert "\x1b" not in text


def test_bad_folders_are_one_line(tmp_path) -> None:
    assert_refused(run_script("tui", tmp_path / "nowhere"), "nowhere", "--demo")
    (tmp_path / "file").write_text("")
    assert_refused(run_script("tui", tmp_path / "file"), "a file, not a folder")
    assert_refused(run_script("tui", "--colour"), "--colour")


def test_without_a_terminal_it_prints_a_summary(folder) -> None:
    log = folder / "contamination/decisions.jsonl"
    common.append_decision(log, "pair00003", "duplicate", "ann")
    before = modified(folder)
    done = run_script("tui", folder)
    assert done.returncode == 0, done.stderr
    shown = ("1 of 12 decided", "duplicate 1", "step 40 of 80", "+4.0%", "python build_dataset.py")
    for text in shown:
        assert text in done.stdout, text
    assert_harmless(done.stdout)
    assert before == modified(folder)
    demo = run_script("tui", "--demo")
    assert demo.returncode == 0
    assert "flagged" not in demo.stderr
    assert "better" in demo.stdout


# --- in a real terminal ---------------------------------------------------------------------------


class Terminal:
    """tui.py in a pty, with all bytes that it writes."""

    def __init__(self, *args: object, size: tuple[int, int] = (80, 24), **environment: str) -> None:
        master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", size[1], size[0], 0, 0))
        command = [sys.executable, str(ROOT / "tui.py"), *map(str, args)]
        env = {**os.environ, "TERM": "xterm-256color", "COLORTERM": "truecolor", **environment}
        self.process = subprocess.Popen(
            command,
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env=env,
            start_new_session=True,
            cwd=ROOT,
        )
        os.close(slave)
        self.master = master
        self.data = b""
        threading.Thread(target=self.collect, daemon=True).start()

    def collect(self) -> None:
        with contextlib.suppress(OSError):
            while data := os.read(self.master, 1 << 16):
                self.data += data

    def text(self) -> str:
        return OURS.sub("", self.data.decode("utf-8", "surrogateescape"))

    def alive(self) -> bool:
        return self.process.poll() is None

    def press(self, keys: str) -> int:
        seen = len(self.text())
        os.write(self.master, keys.encode())
        return seen

    def wait(self, text: str, since: int = 0, seconds: float = 20) -> float:
        began = time.monotonic()
        while text not in self.text()[since:]:
            assert time.monotonic() < began + seconds, (text, self.text()[since:][-3000:])
            assert self.alive(), self.text()[-3000:]
            time.sleep(0.02)
        return time.monotonic() - began

    def close(self) -> int:
        self.press("q")
        code = self.process.wait(20)
        os.close(self.master)
        return code

    def kill(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def test_kill_9_loses_nothing_and_it_reopens_at_the_first_undecided(folder) -> None:
    terminal = Terminal(folder, "--reviewer", "ann")
    terminal.wait("Q00000")
    for number, key in enumerate("dgsnd"):
        seen = terminal.press(key)
        terminal.wait(f"Q{number + 1:05}", seen)
        assert len(decisions(folder)) == number + 1  # on disk before the next pair was drawn
    terminal.press("g")
    terminal.kill()
    log = (folder / "contamination/decisions.jsonl").read_bytes()
    assert log.endswith(b"\n")
    known = len(decisions(folder))
    assert known in (5, 6)
    terminal = Terminal(folder, "--reviewer", "ann")
    terminal.wait(f"Q{known:05}")
    assert f"{known} of 12 decided" in terminal.text()
    assert terminal.close() == 0
    assert (folder / "contamination/decisions.jsonl").read_bytes() == log


def test_keys_that_arrive_together_go_where_they_belong(folder) -> None:
    terminal = Terminal(folder, "--reviewer", "ann")
    terminal.wait("Q00000")
    seen = terminal.press("dgs")
    terminal.wait("Q00003", seen)
    seen = terminal.press("/scibench")
    terminal.wait("6 of 12", seen)
    seen = terminal.press("\r")
    time.sleep(0.3)
    terminal.press("enod\r")
    time.sleep(1)
    assert terminal.close() == 0
    lines = decisions(folder)
    assert [line["pair_id"] for line in lines[:3]] == ["pair00000", "pair00001", "pair00002"]
    verdicts = [line["verdict"] for line in lines]
    assert verdicts[:3] == ["duplicate", "gray-area", "similar-but-different"]
    assert {*verdicts[3:]} <= {None}


@pytest.mark.parametrize(("keys", "verdicts"), [("mn", 0), ("mnn", 0), ("mag", 0), ("mgy", 12)])
def test_keys_that_arrive_together_answer_the_question(folder, keys: str, verdicts: int) -> None:
    """None of them is a verdict on the pair below it."""
    terminal = Terminal(folder, "--reviewer", "ann")
    terminal.wait("Q00000")
    seen = terminal.press(keys)
    terminal.wait("12 of 12 decided" if verdicts else "verdicts, ", seen)
    time.sleep(0.3)
    terminal.press("\x1b")
    time.sleep(0.3)
    assert terminal.close() == 0
    assert [line["verdict"] for line in decisions(folder)] == ["gray-area"] * verdicts


def test_two_instances_see_each_other_within_two_seconds(folder) -> None:
    ann = Terminal(folder, "--reviewer", "ann")
    bob = Terminal(folder, "--reviewer", "bob")
    ann.wait("Q00000")
    bob.wait("Q00000")
    seen = len(bob.text())
    ann.press("d")
    assert bob.wait("by ann", seen) < 2
    bob.press(" ")
    bob.wait("Q00001", seen)
    seen = len(ann.text())
    bob.press("g")
    assert ann.wait("by bob", seen) < 2
    assert ann.close() == 0
    assert bob.close() == 0
    both = [(line["pair_id"], line["reviewer"]) for line in decisions(folder)]
    assert both == [("pair00000", "ann"), ("pair00001", "bob")]


def hostile_folder(out: Path) -> Path:
    """Every text of HOSTILE in every field of every file, and in names of folders."""
    texts = [text for text in HOSTILE if len(text) < 1000]
    names = set(make_pair(0)) - {"pair_id", "cosine", "test_choices"}
    pairs = []
    for number, text in enumerate(HOSTILE):
        fields = dict.fromkeys(names, text)
        pairs.append(make_pair(number, **fields, test_choices=[text, *texts[:3]], note=text))
    pairs[3]["pair_id"] = "\x1b[31m\u202e"
    write_lines(out / "contamination/pairs.jsonl", pairs)
    verdicts = []
    for pair, text in zip(pairs[::2], HOSTILE[::2], strict=True):
        line = {"pair_id": pair["pair_id"], "verdict": "duplicate"}
        verdicts.append(line | dict.fromkeys(("reviewer", "time", "note"), text))
    write_lines(out / "contamination/decisions.jsonl", verdicts)

    log = [{"event": t, "step": 3, t: t, "prompt": t, "text": t} for t in HOSTILE]
    log += [step_line(1), step_line(2, epoch="\x1b[31m"), {"step": 3, "loss": "\x9b31m"}]
    write_lines(out / "adapter/train_log.jsonl", log)
    rows = [comparison(t, n, model=t, base=t, verdict=t, metric=t) for n, t in enumerate(HOSTILE)]
    write_results(out, rows)

    run = {
        "counts": dict.fromkeys(texts, 5),
        "command": " ".join(texts),
        "inputs": {text: {"sha256": text} for text in texts},
    }
    for number, (name, script) in enumerate(tui.STEPS.items()):
        finish(out / name, script, **run)
        begun = out / f"x{texts[7 + number]}"
        begun.mkdir()
        (begun / ".unfinished").write_text(f"python {script}.py {texts[7 + number]}")
    return out


def test_hostile_text_reaches_no_terminal(tmp_path) -> None:
    assert len(HOSTILE) >= 60
    out = hostile_folder(tmp_path / "out\x1b[31m")
    terminal = Terminal(out, "--reviewer", "a\x1b]0;x\x07", size=(150, 45))
    terminal.wait("decided")
    for _ in HOSTILE:
        terminal.press("j")
        time.sleep(0.02)
    for key, text in (("2", "smoothed"), ("3", "paired test"), ("4", "build_dataset")):
        seen = terminal.press(key)
        terminal.wait(text, seen)
        time.sleep(1)
    terminal.press("1f")
    time.sleep(0.5)
    for key in ("\x1b", "/", "x", "\r", "e", "\x1b", "?"):
        terminal.press(key)
        time.sleep(0.3)
    assert terminal.close() == 0
    raw = terminal.text()
    found = re.search(f".{{0,60}}(?:{DANGER.pattern}|[\x07\x1b]).{{0,60}}", raw)
    assert not found, found
    assert "Traceback" not in raw
    for text in ("␛]0;title␇", "\\u009b31m", "\\u202eabc", "[@click=app.quit]a[/]", "\\ud800"):
        assert text in raw, text
    summary = run_script("tui", out)
    assert summary.returncode == 0, summary.stderr
    assert_harmless(summary.stdout)


def test_no_color_means_no_colour_and_the_marks_are_still_there(folder) -> None:
    terminal = Terminal(folder, NO_COLOR="1")
    terminal.wait("⟦x⟧")
    terminal.wait("⟦y⟧")
    assert terminal.close() == 0
    colours = set(re.findall(rb"(?:38|48);2;(\d+);(\d+);(\d+)", terminal.data))
    assert all(red == green == blue for red, green, blue in colours), colours


def test_it_starts_without_torch_and_writes_nothing_but_verdicts(folder) -> None:
    program = (
        "import sys, asyncio; import tui\n"
        f"app = tui.PlatypusApp(tui.Path({str(folder)!r}), 'ann')\n"
        "async def go():\n"
        "    async with app.run_test() as pilot:\n"
        "        await pilot.press('1', '2', '3', '4'); await pilot.pause(1)\n"
        "asyncio.run(go())\n"
        "print([name for name in ('torch', 'transformers', 'numpy') if name in sys.modules])"
    )
    before = modified(folder)
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr
    assert before == modified(folder)


def test_without_the_environment_it_says_how_to_enter_it() -> None:
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import tui"
    command = [sys.executable, "-I", "-S", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True)
    assert_refused(done, "no package textual", "source .venv/bin/activate")


def test_the_demo_replays_in_a_temporary_folder(tmp_path) -> None:
    before = modified(tui.RECORDED)
    terminal = Terminal("--demo", "--reviewer", "ann", TMPDIR=str(tmp_path))
    terminal.wait("decided")
    seen = terminal.press("d2")
    terminal.wait("smoothed", seen)
    steps = set()
    deadline = time.monotonic() + 20
    while len(steps) < 3 and time.monotonic() < deadline:
        log = next(tmp_path.glob("*/out/adapter/train_log.jsonl"))
        steps.add(log.stat().st_size)
        time.sleep(0.3)
    assert len(steps) >= 3
    seen = terminal.press("4")
    terminal.wait("running", seen)
    verdicts = next(tmp_path.glob("*/out/contamination/decisions.jsonl"))
    assert json.loads(verdicts.read_text())["verdict"] == "duplicate"
    assert terminal.close() == 0
    assert not list(tmp_path.iterdir())
    assert before == modified(tui.RECORDED)


EXTREMES = [
    None,
    True,
    0,
    -1,
    0.5,
    1e308,
    -1e308,
    1e-320,
    float("nan"),
    float("inf"),
    10**400,
    "",
    "x",
    "duplicate",
    "end",
    "start",
    [],
    [1, "a", None],
    {},
    {"a": 1},
]


def test_no_json_in_any_file_stops_it(folder) -> None:
    """Random values of every type in every field of every file, extreme numbers among them."""
    rng = random.Random(11)

    def scramble(row: dict) -> dict:
        return {k: v if rng.random() < 0.5 else rng.choice(EXTREMES) for k, v in row.items()}

    def write(name: str, rows: list[dict]) -> None:
        scrambled = [scramble(row) for row in rows]
        write_lines(folder / name, scrambled + rng.sample(EXTREMES, 3))

    for _ in range(4):
        write("contamination/pairs.jsonl", [make_pair(n) for n in range(8)])
        line = {"verdict": "duplicate", "note": "x", "time": "y"}
        lines = [{"pair_id": f"pair{n:05}", **line} for n in range(4)]
        write("contamination/decisions.jsonl", lines)
        steps = [step_line(n) for n in range(40)]
        for step in steps[::9]:
            step["event"] = "sample"
        write("adapter/train_log.jsonl", steps)
        found = {"comparisons": [scramble(comparison(f"t{n}", n)) for n in range(5)]}
        results = rng.choice([found, *EXTREMES])
        (folder / "eval/results.json").write_text(json.dumps(results))
        for name, script in tui.STEPS.items():
            finish(folder / name, script, adapters=[{}], settings={}, base_model="b")
            run = common.read_json(folder / name / "run.json")
            (folder / name / "run.json").write_text(json.dumps(scramble(run)))
            (folder / name / "apply.json").write_text(json.dumps(rng.choice(EXTREMES)))
        drive(folder, [*"1jjdaeu", "escape", *"2cccl3oo4"], size=(150, 45))
        with contextlib.suppress(UserError):  # a results.json that is none
            assert "flagged pairs" in tui.summary(folder)


def test_a_signal_while_the_widgets_are_mounted() -> None:
    """An app that is told to exit before it is whole may wait for ever."""

    def tick(left: int) -> None:
        if left:
            asyncio.get_running_loop().call_soon(tick, left - 1)
        else:
            os.kill(os.getpid(), signal.SIGTERM)

    async def ended(turns: int) -> int | None:
        class Interrupted(tui.PlatypusApp):
            def on_load(self) -> None:
                asyncio.get_running_loop().call_soon(tick, turns)

        app = Interrupted(tui.RECORDED, "ann")
        running = asyncio.ensure_future(app.run_async(headless=True, size=(80, 24)))
        done, _ = await asyncio.wait({running}, timeout=20)
        return app.return_code if done else None

    for turns in range(12):
        assert asyncio.run(ended(turns)) == 143, turns

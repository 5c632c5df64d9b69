"""Holds: every key does what it says; a verdict is on disk when its key returns; two reviewers see
each other; text from files cannot act on the terminal; a log is followed whatever happens to it;
every step's state is told by records and lock; nothing is cut at 80 x 24."""

import asyncio
import contextlib
import fcntl
import json
import math
import os
import pty
import random
import re
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
    *(
        "x [/] y",
        "[$x]",
        "[@click=app.quit]a[/]",
        "[red]r[/red]",
        "[b",
        "]]][[[",
        "[link=x]y[/link]",
    ),
    *("\x1b]0;title\x07", "\x1b]52;c;aGk=\x07", "\x1b[31m", "\x1b[2J", "\x1b[?1049l", "\x1bc"),
    *("\x1b[6n", "\x1bP+q544e\x1b\\", "\x1b_x\x1b\\", "\x1b^x\x1b\\", "\x1b]8;;http://x\x1b\\t"),
    *(
        "\x1b[201~",
        "\x1b[>c",
        "\x1b#8",
        "\x1b(0",
        "\x1b[10;10H",
        "\x1b",
        "\x1b\x1b",
        "\x1b[38;5;99;7m",
    ),
    *("\x9b31m", "\x9d0;t\x9c", "\x90q\x9c", "\x85", "\x84", "\x8d", "\x9f", "\x80", "\x98x\x9c"),
    *("\u202eabc", "\u202dabc", "\u2066a\u2069", "\u2067a", "\u2068a", "\u202aa\u202c", "\u202b"),
    *("\u061c", "\u200e", "\u200f", "\u200b", "\u200c", "\u200d", "\u2060", "\ufeff", "\u00ad"),
    *("\u180e", "\u034f", "\u3164", "\u115f", "\u2800", "\ufe0f", "\U000e0041", "\U000e0101"),
    *("e" + "\u0301" * 300, "x" * 1_000_000, "\U0001f468\u200d\U0001f469", "שלום עולם", "مرحبا"),
    *("a\tb", "a\r\nb", "\r", "\x00", "\x07\x07", "\x08\x08\x08", "\x7f", "\x0b\x0c", "\x0e\x0f"),
    *("\x1a", "\ud800", "\udfff\ud800", "\u2028", "\u2029", "\u00a0\u3000", "\ufffe", "\ue000"),
    *("", " ", "$error", "%s {0} {x}", "'\"; --", "source:x"),
]
DANGER = re.compile(  # what no field of the data may bring to a terminal
    "[\x00-\x06\x08\x0b\x0c\x0e-\x1a\x1c-\x1f\x7f-\x9f\u00ad\u034f\u061c\u115f\u1160\u180e"
    "\u200b-\u200f\u2028-\u202e\u2060-\u2069\u3164\ufe00-\ufe0f\ufeff\U000e0000-\U000e01ef]"
)
OURS = re.compile(  # the sequences that Textual itself writes
    r"\x1b\[[0-9;]*m|\x1b\[\d+;\d+H|\x1b\[H|\x1b\[\??[0-9;]*[hlJKu]|\x1b\[[<>=][0-9;]*u|\x1b\[\?[0-9;]*\$p"
    r"|\x1b\[[0-9;]*t|\x1b\[>[0-9]*[qc]|\x1b\[c|\x1b\[\?[0-9]+\$?u|\x1b\]22;[a-z-]*\x07|\x1b\[6n"
)


def make_pair(number: int, **fields) -> dict:
    pair = {
        "pair_id": f"pair{number:05}",
        "train_id": f"row{number:05}",
        "source": ("math", "scibench")[number % 2],
        "benchmark": ("mmlu", "arc", "mmlu")[number % 3],
        "subject": ("algebra", "all", "physics")[number % 3],
        "test_id": f"mmlu/algebra/{number}",
        "cosine": round(1 - number / 20_000, 6),
        "view": "question",
        "detector": "cosine",
        "train_question": f"Q{number:05} Rotate the figure about the x axis.",
        "train_answer": f"The area is {number}.",
        "test_question": f"Q{number:05} Rotate the figure about the y axis.",
        "test_choices": ["1", "2", "3", "4"],
        "test_answer": "2",
        "suggested": (*common.VERDICTS, None)[number % 5],
        "why": "differs in 1 of 7 words: x -> y",
    }
    return pair | fields


def write_lines(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def step_line(step: int, **fields) -> dict:
    line = {
        "step": step,
        "epoch": step / 100,
        "loss": 2 + math.exp(-step / 30),
        "seconds": step / 2,
    }
    line |= {"learning_rate": 4e-4, "grad_norm": 1.5, "tokens": 100, "supervised_tokens": 40}
    return line | {"tokens_per_second": 200.0, "mfu": 0.41, "eta_seconds": 60.0} | fields


def comparison(task: str, percent: float, **fields) -> dict:
    row = {"model": "out/merged", "base": "base", "task": task, "metric": "acc", "questions": 100}
    row |= {
        "base_score": 50.0,
        "score": 50 + percent / 2,
        "points": percent / 2,
        "percent": percent,
    }
    row |= {"interval": [-1.0, 2.5], "gained": 9, "lost": 4, "p": 0.27, "verdict": "better"}
    return row | {"points_unflagged": 1.0, "points_flagged": 5.0} | fields


@pytest.fixture
def folder(tmp_path) -> Path:
    """An output folder with 12 pairs, a log of 40 steps with events, and results."""
    out = tmp_path / "out"
    write_lines(out / "contamination/pairs.jsonl", [make_pair(n) for n in range(12)])
    events = [{"event": "start", "steps": 80}, {"event": "sample", "step": 40, "text": "Hello you"}]
    lines = [events[0], *(step_line(n) for n in range(1, 41)), events[1]]
    write_lines(out / "adapter/train_log.jsonl", lines)
    rows = [comparison("mmlu", 4.0), comparison("mmlu/algebra", -8.0, verdict="worse")]
    (out / "eval").mkdir()
    (out / "eval/results.json").write_text(json.dumps({"comparisons": rows}))
    return out


def screen_of(app) -> list[str]:
    """The lines that are on the screen."""
    return [strip.text for strip in app.screen._compositor.render_strips()]


def drive(folder: Path, script, size: tuple[int, int] = (80, 24)):
    """Open the app and run `script`, a coroutine function of (app, pilot) or a list of keys."""

    async def session():
        app = tui.make_app(tui.parse_args([str(folder), "--reviewer", "ann"]))
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


def decisions(folder: Path) -> list[dict]:
    path = folder / "contamination/decisions.jsonl"
    return [json.loads(line) for line in path.open()] if path.exists() else []


# --- text -----------------------------------------------------------------------------------------


def test_printable_lets_nothing_through_that_a_terminal_obeys_or_hides() -> None:
    every = "".join(map(chr, range(sys.maxunicode + 1)))
    shown = common.printable(every, len(every))
    assert not DANGER.search(shown)
    assert {unicodedata.category(char) for char in set(shown) - {"\n"}}.isdisjoint(
        {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
    )
    assert "\\u202e" in shown and "\\ud800" in shown and "␛" in shown and "␍" in shown
    assert "1,000 more characters" in common.printable("x" * (common.LONGEST_SHOWN + 1000))
    assert unicodedata.combining(common.printable("e" + "\u0301" * 9)[common.COMBINING_SHOWN])
    assert common.printable("e" + "\u0301" * 9).count("\u0301") == common.COMBINING_SHOWN


def test_differing_words_and_nothing_else_are_marked() -> None:
    rng = random.Random(0)
    for _ in range(200):
        words = [
            rng.choice(["axis", "7", "x", "+", "Ünit", "the"]) for _ in range(rng.randint(1, 30))
        ]
        other = [word if rng.random() < 0.8 else "zebra" for word in words]
        left, right = tui.differing(" ".join(words), " ".join(other))
        kept = [cut(" ".join(words), left), cut(" ".join(other), right)]
        assert kept[0].lower().split() == kept[1].lower().split()
        assert "zebra" not in kept[1]


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
            assert decisions(folder)[-1]["verdict"] == verdict
            assert decisions(folder)[-1]["pair_id"] == pair["pair_id"]
            assert review.pair is not pair
        pair = review.pair  # number 4 has no suggestion
        await pilot.press("a")
        assert review.pair is pair and len(decisions(folder)) == 4
        await pilot.press("down")
        pair = review.pair
        await pilot.press("a")
        assert decisions(folder)[-1]["verdict"] == pair["suggested"] == "duplicate"
        await pilot.press("u")
        assert decisions(folder)[-1] | {"time": 0} == {
            **{"pair_id": pair["pair_id"], "verdict": None, "reviewer": "ann"},
            **{"time": 0, "note": ""},
        }
        assert review.verdicts.of(pair) is None and review.pair["pair_id"] == pair["pair_id"]
        await pilot.press("home", "e", *"why", "enter")
        await pilot.pause()
        assert decisions(folder)[-1]["note"] == "why"
        assert decisions(folder)[-1]["verdict"] == review.verdicts.of(review.pair)
        await pilot.press("o")
        cosines = [pair["cosine"] for pair in review.shown]
        assert review.orders[0] == "cosine, high to low" and cosines == sorted(cosines)[::-1]
        await pilot.press("home", "space")
        assert review.verdicts.of(review.pair) is None

    drive(folder, script)
    known = common.read_decisions(folder / "contamination/decisions.jsonl")
    assert len(known) == 4 and {line["reviewer"] for line in known.values()} == {"ann"}


def test_moving_with_arrows_vim_keys_and_the_mouse(folder) -> None:
    async def script(app, pilot):
        lines = app.query_one("#pairs")
        for key, cursor in [
            *(("down", 1), ("j", 2), ("k", 1), ("up", 0), ("end", 11), ("home", 0), ("G", 11)),
            *(("ctrl+u", 1), ("pagedown", 11), ("pageup", 1), ("ctrl+d", 11), ("down", 11)),
        ]:
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
        assert any("No pair passes. Fields: source" in line for line in screen_of(app))
        await pilot.press("escape", "escape", "f")
        await pilot.pause()
        await pilot.press("down", "enter")
        await pilot.pause()
        value = review.query_one("Input").value
        assert value == "benchmark:mmlu " and {p["benchmark"] for p in review.shown} == {"mmlu"}
        await pilot.press("escape", "slash", *"cosine>0.9997", "enter", "f")
        await pilot.pause()
        await pilot.press("down", "enter")
        await pilot.pause()
        assert review.query_one("Input").value == "cosine>0.9997 benchmark:mmlu "

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
        assert any("all 5 undecided" in line for line in screen_of(app))
        await pilot.press("g")
        await pilot.pause()
        assert any("Write 5 verdicts, gray-area?" in line for line in screen_of(app))
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
    suggested = {f"pair{n:05}": make_pair(n)["suggested"] for n in range(2, 12, 2)}
    expected = {i: verdict for i, verdict in suggested.items() if verdict}
    assert {i: known[i]["verdict"] for i in known if i != "pair00000"} == expected


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


def test_what_would_be_removed_is_what_apply_removes(demo, tmp_path) -> None:
    import shutil

    shutil.copytree(demo / "contamination", tmp_path / "contamination")
    pairs, _ = tui.load_pairs(tmp_path / "contamination/pairs.jsonl")
    verdicts = tui.Verdicts(tmp_path / "contamination/decisions.jsonl", "ann")
    for number, pair in enumerate(pairs[:-2]):
        list(verdicts.write({pair["pair_id"]: {"verdict": common.VERDICTS[number % 4]}}))
    list(verdicts.write({pairs[0]["pair_id"]: {"verdict": None}}))
    done = run_script("check_contamination", "apply", "--out", tmp_path / "contamination")
    assert done.returncode == 0, done.stderr
    removed = [json.loads(line) for line in (tmp_path / "contamination/removed.jsonl").open()]
    assert {row["id"] for row in removed} == tui.removed_rows(pairs, verdicts)


# --- watch ----------------------------------------------------------------------------------------


def test_every_key_of_watch(folder) -> None:
    async def script(app, pilot):
        await pilot.press("2")
        await pilot.pause()
        watch = app.query_one("#watch")
        assert any("step 40 of 80, 50%" in line for line in screen_of(app))
        assert any("Hello you" in line for line in screen_of(app))
        for shown in (
            {"loss"},
            {"learning_rate"},
            {"grad_norm"},
            {"tokens_per_second"},
            {*tui.CURVES},
        ):
            await pilot.press("c")
            assert {name for name in tui.CURVES if app.query_one(f"#{name}").display} == shown
        await pilot.press("l")
        assert watch.logarithmic
        await pilot.pause()
        assert any("log scale" in line for line in screen_of(app))
        events = app.query_one("#events")
        assert events.is_anchored
        await pilot.press("f")
        assert not events.is_anchored
        await pilot.press("f")
        assert events.is_anchored
        with (folder / "adapter/train_log.jsonl").open("a") as log:
            log.write(json.dumps(step_line(41, loss=float("nan"))) + "\n")
        watch.look()
        await pilot.pause()
        assert any("ALARM: loss is NaN or infinite at step 41" in line for line in screen_of(app))
        assert any("2 Watch!" in line for line in screen_of(app))

    drive(folder, script)


def test_a_log_is_followed_whatever_happens_to_it(tmp_path) -> None:
    path = tmp_path / "log.jsonl"
    tail = tui.Tail(path)

    def steps() -> list:
        return [row.get("step") for row in tail.read()]

    assert steps() == [] and not tail.restarted
    write_lines(path, [{"step": 1}, {"step": 2}])
    assert steps() == [1, 2]
    with path.open("ab") as log:
        log.write(b'{"step": 3}\n{"step"')
    assert steps() == [3]
    assert steps() == []
    with path.open("ab") as log:
        log.write(b': 4}\n\xff\xfe\n[1]\nnonsense\n{"step": 5}\n')
    assert steps() == [4, 5] and tail.bad == 3
    with path.open("r+b") as log:  # finetune.py --resume cuts it
        log.truncate(12)
    assert steps() == [1] and tail.restarted
    write_lines(tmp_path / "new", [{"step": 7}, {"step": 8}, {"step": 9}])
    os.replace(tmp_path / "new", path)
    assert steps() == [7, 8, 9] and tail.restarted
    write_lines(path, [{"step": 70}, {"step": 80}, {"step": 90}, {"step": 100}])  # in place, longer
    assert steps() == [70, 80, 90, 100] and tail.restarted
    path.unlink()
    assert steps() == [] and tail.restarted
    assert steps() == [] and not tail.restarted
    write_lines(path, [{"step": 1, "text": "x" * 3_000_000}, {"step": 2}])
    assert steps() == [1, 2] or steps() == [2]


def test_following_in_random_pieces_reads_what_reading_whole_does(tmp_path) -> None:
    rng, path = random.Random(3), tmp_path / "log.jsonl"
    rows = [step_line(n, text="é" * rng.randint(0, 300)) for n in range(1, 400)]
    data = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    path.write_bytes(b"")
    tail, found, at = tui.Tail(path), [], 0
    while at < len(data):
        size = rng.randint(1, 900)
        with path.open("ab") as log:
            log.write(data[at : at + size])
        at += size
        found += tail.read(rng.randint(1, 2000))
    while (more := tail.read(100)) or tail.more:
        found += more
    assert found == rows and tail.bad == 0


def test_a_long_curve_keeps_its_spikes_in_bounded_memory() -> None:
    curve = tui.Curve()
    for step in range(1, 100_001):
        curve.add(step, 50.0 if step == 77_777 else 1.0)
    assert tui.POINTS <= len(curve.buckets) <= 2 * tui.POINTS
    assert [high for _, _, high in curve.buckets].count(50.0) == 1
    assert sum(step <= 77_777 for step, *_ in curve.buckets) > 0.7 * len(curve.buckets)
    steps = [step for step, *_ in curve.buckets]
    assert steps == sorted(steps) and steps[0] == 1


def test_alarms(tmp_path, monkeypatch) -> None:
    path = write_lines(tmp_path / "train_log.jsonl", [step_line(1)])

    def alarms(*rows: dict, later: float = 0) -> str:
        log = tui.RunLog()
        for row in [*(step_line(n) for n in range(1, 60)), *rows]:
            log.add(row)
        return "; ".join(tui.alarms_of(log, path, path.stat().st_mtime + later))

    assert alarms() == alarms(later=59) == ""
    assert "NaN or infinite at step 60" in alarms(step_line(60, loss=float("nan")))
    assert "NaN or infinite at step 60" in alarms(step_line(60, loss=None))
    assert "grad norm is NaN" in alarms(step_line(60, grad_norm=float("inf")))
    spikes = step_line(60, loss=9.0), step_line(61, loss=99.0)
    assert "loss spike at step 60, 2 times to step 61" in alarms(*spikes)
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
    assert [step for step, *_ in log.curves["loss"].buckets] == [*range(1, 41)]


# --- results, pipeline ----------------------------------------------------------------------------


def test_results_are_a_sorted_table_with_bars(folder) -> None:
    app = drive(folder, ["3"])
    lines = [line for line in app.lines_shown if "%" in line]
    assert ["mmlu", "algebra"] == [line.split()[0] for line in lines]
    assert "+4.0%" in lines[0] and "│███" in lines[0] and "-8.0%" in lines[1] and "█│" in lines[1]
    app = drive(folder, ["3", "o", "o"], size=(200, 60))
    lines = [line for line in app.lines_shown if "%" in line and "points" not in line]
    assert ["algebra", "mmlu"] == [line.split()[0] for line in lines]
    assert all(text in lines[1] for text in ("0.27", "-1.0 to +2.5", "+1.0", "+5.0", "9", "4"))
    bad = [
        {},
        comparison("x", 1.0) | dict.fromkeys(("percent", "p", "interval", "verdict", "points")),
    ]
    (folder / "eval/results.json").write_text(json.dumps({"comparisons": bad}))
    assert len(tui.load_results(folder / "eval/results.json")) == 2
    drive(folder, ["3"])
    (folder / "eval/results.json").write_text("[1]")
    assert any("no results.json" in line for line in drive(folder, ["3"]).lines_shown)


def test_the_average_is_the_first_result_in_every_order(folder) -> None:
    """A mean of four benchmarks: no question of it is gained or lost, and it has no p."""
    average = {"metric": "mean", "gained": None, "lost": None, "p": None}
    rows = [comparison("arc", 2.0), comparison("average", 1.0, **average)]
    rows += [comparison("mmlu", -3.0), comparison("mmlu/algebra", 9.0)]
    (folder / "eval/results.json").write_text(json.dumps({"comparisons": rows}))
    for presses in range(len(tui.RESULT_ORDERS)):
        app = drive(folder, ["3", *["o"] * presses], size=(200, 60))
        lines = [line for line in app.lines_shown if "%" in line and "points" not in line]
        names = [line.split()[0] for line in lines]
        assert names[0] == "average" and sorted(names[1:]) == ["algebra", "arc", "mmlu"], presses
        assert lines[0].split()[-5:] == ["+2.5", "–", "–", "+1.0", "+5.0"]


def finish(folder: Path, script: str, *inputs: Path, **more) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    about = {str(path): {"sha256": sha256_of(path)} for path in inputs}
    run = {"step": script, "command": f"python {script}.py --out {folder}", "inputs": about}
    (folder / "run.json").write_text(json.dumps(run | {"counts": {"rows": 1234}} | more))


def test_states_of_the_pipeline(tmp_path) -> None:
    out = tmp_path / "my out"
    out.mkdir()
    states = {state.script: state for state in tui.pipeline_states(out)}
    assert {state.status for state in states.values()} == {"not run"}
    assert states["finetune"].command == (
        f"python finetune.py --data '{out}/contamination'/clean.jsonl --out '{out}/adapter'"
    )
    source = write_lines(tmp_path / "source.jsonl", [{"a": 1}])
    finish(out / "rows", "build_dataset", source)  # a folder with a name of its own
    (out / "rows/run.json").write_text(json.dumps({"step": "merge", "base_model": "a model"}))
    states = {state.script: state for state in tui.pipeline_states(out)}
    assert f"--model 'a model' --model '{out}/rows' " in states["evaluate"].command
    finish(out / "rows", "build_dataset", source)
    states = {state.script: state for state in tui.pipeline_states(out)}
    assert f"--dataset '{out}/rows'/dataset.jsonl " in states["check_contamination"].command
    shutil.rmtree(out / "rows")
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
        states = {state.script: state for state in tui.pipeline_states(out)}
    status = {script: state.status for script, state in states.items()}
    assert status == {
        **{"build_dataset": "finished", "check_contamination": "finished"},
        **{"finetune": "unfinished", "merge": "running", "evaluate": "not run"},
    }
    assert states["build_dataset"].counts == "1,234 rows"
    assert states["finetune"].command == "python finetune.py --out x --resume"
    shown = "".join(text for text, _ in tui.pipeline_parts(list(states.values())))
    assert shown.endswith("next  python finetune.py --out x --resume")
    log.write_text(log.read_text() + "\n")
    states = {state.script: state for state in tui.pipeline_states(out)}
    assert states["check_contamination"].status == "stale"
    assert " apply --out " in states["check_contamination"].command
    (out / "dataset/run.json").write_text("broken")
    state = tui.pipeline_states(out)[0]
    assert state.status == "unfinished" and "run.json" in state.why


def make_chain(place: Path, rows: str = "1") -> Path:
    """Three finished steps below place/out, by names that count from `place`; the last folder."""
    before = write_lines(place / "raw/rows.jsonl", [{"raw": 1}])
    for folder, file in (
        ("dataset", "dataset.jsonl"),
        ("contamination", "clean.jsonl"),
        ("adapter", "adapter_model.safetensors"),
    ):
        path = write_lines(place / "out" / folder / file, [{"rows": rows, "of": folder}])
        record_step(place, before, path)
        before = path
    return before.parent


def record_step(place: Path, read: Path, written: Path) -> None:
    inputs = {str(read.relative_to(place)): {"sha256": sha256_of(read)}}
    outputs = {written.name: {"sha256": sha256_of(written)}}
    script = tui.STEPS[written.parent.name][0]
    run = {"step": script, "command": f"python {script}.py", "inputs": inputs, "outputs": outputs}
    (written.parent / "run.json").write_text(json.dumps(run))


def told(states: list) -> dict[str, tuple[str, str]]:
    return {
        state.script: (state.status, state.why) for state in states if state.status != "not run"
    }


def test_a_step_is_stale_once_the_one_before_it_is_made_again(tmp_path, monkeypatch) -> None:
    last, out = make_chain(tmp_path), tmp_path / "out"
    data, clean = out / "dataset/dataset.jsonl", out / "contamination/clean.jsonl"
    hashed = []
    monkeypatch.setattr(tui, "sha256_of", lambda path: hashed.append(path) or sha256_of(path))

    def statuses() -> list[str]:
        return [status for status, _ in told(tui.pipeline_states(out)).values()]

    assert statuses() == ["finished"] * 3
    old = data.read_text()
    data.write_text("{}\n")
    assert statuses() == ["finished"] * 3  # by hand: that is for --lineage to find
    record_step(tmp_path, tmp_path / "raw/rows.jsonl", data)
    found = told(tui.pipeline_states(out))
    assert found["check_contamination"] == ("stale", "made again since: out/dataset/dataset.jsonl")
    status, why = found["finetune"]
    assert status == "stale" and why.startswith("made from ") and why.endswith("which is stale")
    todo = tui.pipeline_parts(tui.pipeline_states(out))[-1][0]
    assert todo == "python check_contamination.py --overwrite"
    data.write_text(old)
    record_step(tmp_path, tmp_path / "raw/rows.jsonl", data)
    assert statuses() == ["finished"] * 3  # made again with the same bytes
    (out / "contamination/.unfinished").write_text("python check_contamination.py")
    assert statuses() == ["finished", "unfinished", "stale"]
    assert hashed == []  # the models below would take minutes
    (out / "contamination/.unfinished").unlink()
    clean.write_text("{}\n")
    assert told(tui.lineage(last)) == {
        "build_dataset": ("finished", "2 files as recorded, by hash"),
        "check_contamination": ("edited", "edited or gone: clean.jsonl"),
        "finetune": ("stale", "changed since, or gone: out/contamination/clean.jsonl"),
    }
    assert len(hashed) == len({*hashed}) == 4  # each file once, though a step wrote and one read it


def test_lineage_walks_in_the_chain_that_it_is_asked_about(tmp_path, monkeypatch) -> None:
    """Standing in a copy of it, whose names are the same."""
    last, _ = make_chain(tmp_path / "mine"), make_chain(tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    assert all(state.whole for state in tui.lineage(last))
    assert all(state.whole for state in tui.lineage(Path("out")))
    data = tmp_path / "mine/out/dataset/dataset.jsonl"
    text = data.read_text()
    for damage in (lambda: data.write_text("{}\n"), data.unlink):
        damage()
        assert {script: status for script, (status, _) in told(tui.lineage(last)).items()} == {
            "build_dataset": "edited",
            "check_contamination": "stale",
            "finetune": "finished",
        }
        assert all(state.whole for state in tui.lineage(Path("out/adapter")))
    data.write_text(text)
    (tmp_path / "copy/out/dataset/dataset.jsonl").write_text("{}\n")
    assert all(state.whole for state in tui.lineage(last))
    assert not all(state.whole for state in tui.lineage(Path("out/adapter")))
    monkeypatch.chdir("out/adapter")
    assert not all(state.whole for state in tui.lineage(Path()))


def test_the_lock_of_a_step_is_seen_and_left_alone(tmp_path) -> None:
    mark = tmp_path / ".unfinished"
    mark.write_text("x")
    assert not tui.is_held(mark) and not tui.is_held(tmp_path / "none")
    with mark.open() as held:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)  # is_held() let go
        assert tui.is_held(mark)
    assert not tui.is_held(mark)


# --- everywhere -----------------------------------------------------------------------------------


def test_help_palette_and_tabs(folder) -> None:
    async def script(app, pilot):
        for key, name in zip("1234", ("review", "watch", "results", "pipeline"), strict=True):
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
        assert any("Go to the next undecided" in line for line in screen_of(app))
        await pilot.press("question_mark")
        await pilot.pause()
        assert not app.screen.query("HelpPanel")
        titles = [command.title for command in app.get_system_commands(app.screen)]
        assert "Theme" in titles and "Screenshot" not in titles
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
            shown = "\n".join(screen_of(app))
            assert text in shown and (key != "2" or "smoothed" in shown or size[1] == 12), key
        await pilot.press("1", "home", "d", "question_mark")
        await pilot.resize_terminal(100, 30)
        await pilot.resize_terminal(*size)

    drive(folder, script, size)
    assert len(decisions(folder)) == 1
    empty = tmp_path / "empty"
    empty.mkdir()
    for key, text in zip(
        "1234", ("check_contam", "finetune.py", "evaluate.py", "build_dataset"), strict=True
    ):
        shown = "\n".join(
            drive(empty, [key, "d", "a", "u", "space", "m", "e", "o"], size).lines_shown
        )
        assert text in shown
    assert not list(empty.iterdir())


def test_a_terminal_that_is_too_small_says_so(folder) -> None:
    for size in ((30, 20), (90, 8)):
        shown = "\n".join(drive(folder, ["down"], size).lines_shown)
        assert f"{size[0]} × {size[1]}" in shown and "40 × 12" in shown


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
        for y, strip in enumerate(app.screen._compositor.render_strips()):
            for segment in strip:  # letters in the colour of their ground cannot be read
                style = segment.style
                if segment.text.strip() and style and style.color and style.bgcolor:
                    same = style.color == style.bgcolor and not style.color.is_default
                    assert not same, (y, segment)

    drive(folder, script)


def test_nothing_is_cut_at_80_by_24(folder) -> None:
    async def script(app, pilot):
        await pilot.press("d")
        for key in "1234":
            await pilot.press(key)
            await pilot.pause()
            await pilot.pause()
            for label in (*app.query("FooterKey"), *app.query("Tab")):
                text = label.render()
                assert label.region.width >= len(text.plain), (key, text)
                assert label.region.right <= 80 and label.region.bottom <= 24, (key, text)
            assert "? keys" in screen_of(app)[-1]
            pane = app.query_one("ContentSwitcher").current
            for head in app.query_one(f"#{pane}").query(".head, .main, #sides > *"):
                assert head.region.right <= 80 and head.region.bottom <= 23, head
                if head.has_class("head"):
                    assert head.virtual_size.height <= head.size.height, head
                    assert head.size.width >= 20
            shown = screen_of(app)
            if pane == "results":
                assert "not distinguishable" in "\n".join(shown)
            if pane == "watch":
                for title in tui.CURVES.values():
                    assert any(title in line for line in shown), title
                assert "tokens/s 200" in "\n".join(shown)

    rows = [comparison("mmlu", 4.0, verdict="not distinguishable")]
    (folder / "eval/results.json").write_text(json.dumps({"comparisons": rows}))
    drive(folder, script)


def test_the_key_that_shows_all_keys_is_in_sight_at_40_columns(folder) -> None:
    for tab in "1234":
        assert "? keys" in drive(folder, [tab], size=(40, 24)).lines_shown[-1]


@pytest.mark.parametrize("key", ["", "m", "e", "f", "slash", "question_mark"])
def test_ctrl_c_leaves_whatever_is_open(folder, key: str) -> None:
    async def script(app, pilot):
        await pilot.press(*[key] * bool(key))
        await pilot.pause()
        assert not app._exit
        await pilot.press("ctrl+c")
        await pilot.pause()
        assert app._exit

    drive(folder, script)
    assert not decisions(folder)


def test_faults_are_a_line_on_the_screen(folder, monkeypatch) -> None:
    pairs = folder / "contamination/pairs.jsonl"
    with pairs.open("a") as file:
        file.write('not json\n{"pair_id": 7}\n')
    common.append_decision(folder / "contamination/decisions.jsonl", "foreign", "duplicate", "bob")
    shown = " ".join(" ".join(drive(folder, ["down"]).lines_shown).split())
    assert "2 unreadable lines: pairs.jsonl:13" in shown
    assert "1 verdicts are on other pairs" in shown and "0 of 12 decided" in shown

    def refuse(*_) -> None:
        raise OSError(30, "Read-only file system", "decisions.jsonl")

    monkeypatch.setattr(tui, "append_decision", refuse)

    async def script(app, pilot):
        await pilot.press("d")
        await pilot.pause(0.5)

    app = drive(folder, script)
    shown = " ".join(" ".join(app.lines_shown).split())
    assert "Not saved" in shown and "Read-only file system" in shown and "0 of 12 decided" in shown
    assert app.return_code in (0, None)
    pairs.unlink()
    pairs.mkdir()
    (folder / "adapter/train_log.jsonl").unlink()
    (folder / "adapter/train_log.jsonl").mkdir()
    assert any("Cannot be read" in line for line in drive(folder, ["down"]).lines_shown)
    assert any("Cannot be read" in line for line in drive(folder, ["2"]).lines_shown)
    assert_refused(run_script("tui", folder), "directory")


def test_bad_folders_are_one_line(tmp_path) -> None:
    assert_refused(run_script("tui", tmp_path / "nowhere"), "nowhere", "--demo")
    (tmp_path / "file").write_text("")
    assert_refused(run_script("tui", tmp_path / "file"), "a file, not a folder")
    assert_refused(run_script("tui", "--colour"), "--colour")


def test_without_a_terminal_it_prints_a_summary(folder) -> None:
    common.append_decision(
        folder / "contamination/decisions.jsonl", "pair00003", "duplicate", "ann"
    )
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    done = run_script("tui", folder)
    assert done.returncode == 0, done.stderr
    for text in (
        "1 of 12 decided",
        "duplicate 1",
        "step 40 of 80",
        "+4.0%",
        "python build_dataset.py",
    ):
        assert text in done.stdout, text
    assert not DANGER.search(done.stdout.replace("\n", "")) and "\x1b" not in done.stdout
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    demo = run_script("tui", "--demo")
    assert demo.returncode == 0 and "flagged" not in demo.stderr and "better" in demo.stdout


# --- in a real terminal ---------------------------------------------------------------------------


class Terminal:
    """tui.py in a pty, with all bytes that it writes."""

    def __init__(self, *args: object, size: tuple[int, int] = (80, 24), **environment: str) -> None:
        master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", size[1], size[0], 0, 0))
        command = [sys.executable, str(ROOT / "tui.py"), *map(str, args)]
        env = {**os.environ, "TERM": "xterm-256color", "COLORTERM": "truecolor", **environment}
        streams = {"stdin": slave, "stdout": slave, "stderr": slave}
        self.process = subprocess.Popen(
            command, **streams, env=env, start_new_session=True, cwd=ROOT
        )
        os.close(slave)
        self.master, self.data = master, b""
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
    assert [(line["pair_id"], line["verdict"]) for line in decisions(folder)][:3] == [
        *(("pair00000", "duplicate"), ("pair00001", "gray-area")),
        ("pair00002", "similar-but-different"),
    ]
    assert {line["verdict"] for line in decisions(folder)[3:]} <= {None}


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
    ann, bob = (Terminal(folder, "--reviewer", name) for name in ("ann", "bob"))
    ann.wait("Q00000"), bob.wait("Q00000")
    seen = [len(ann.text()), len(bob.text())]
    ann.press("d")
    assert bob.wait("by ann", seen[1]) < 2
    bob.press(" ")
    bob.wait("Q00001", seen[1])
    seen[0] = len(ann.text())
    bob.press("g")
    assert ann.wait("by bob", seen[0]) < 2
    assert ann.close() == bob.close() == 0
    both = [(line["pair_id"], line["reviewer"]) for line in decisions(folder)]
    assert both == [("pair00000", "ann"), ("pair00001", "bob")]


def hostile_folder(out: Path) -> Path:
    texts = [text for text in HOSTILE if len(text) < 1000]
    pairs = []
    for number, text in enumerate(HOSTILE):
        names = set(make_pair(0)) - {"pair_id", "cosine", "test_choices"}
        fields = {name: text for name in names} | {"test_choices": [text, *texts[:3]]}
        pairs.append(make_pair(number, **fields, note=text))
    pairs[3]["pair_id"] = "\x1b[31m\u202e"
    write_lines(out / "contamination/pairs.jsonl", pairs)
    verdicts = [
        {
            **{"pair_id": pair["pair_id"], "verdict": "duplicate"},
            "reviewer": t,
            "time": t,
            "note": t,
        }
        for pair, t in zip(pairs[::2], HOSTILE[::2], strict=True)
    ]
    write_lines(out / "contamination/decisions.jsonl", verdicts)
    events = [{"event": t, "step": 3, t: t, "prompt": t, "text": t} for t in HOSTILE]
    log = [*events, step_line(1), step_line(2, epoch="\x1b[31m"), {"step": 3, "loss": "\x9b31m"}]
    write_lines(out / "adapter/train_log.jsonl", log)
    (out / "eval").mkdir()
    rows = [comparison(t, n, model=t, base=t, verdict=t, metric=t) for n, t in enumerate(HOSTILE)]
    (out / "eval/results.json").write_text(json.dumps({"comparisons": rows}))
    for number, (name, (script, _)) in enumerate(tui.STEPS.items()):
        text = texts[7 + number].replace("\0", "")
        finish(out / name, script, counts={t: 5 for t in texts}, command=" ".join(texts),
               inputs={t: {"sha256": t} for t in texts})  # fmt: skip
        with contextlib.suppress(OSError, UnicodeEncodeError):
            (out / f"x{text}").mkdir()
            (out / f"x{text}/.unfinished").write_text(f"python {script}.py {text}")
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
    assert "\x1b" not in raw, raw[max(0, raw.find("\x1b") - 60) : raw.find("\x1b") + 60]
    assert not (found := DANGER.search(raw.replace("\x07", "\0"))), (
        found,
        raw[found.start() - 40 :][:90],
    )
    assert "\x07" not in raw and "Traceback" not in raw
    for text in ("␛]0;title␇", "\\u009b31m", "\\u202eabc", "[@click=app.quit]a[/]", "\\ud800"):
        assert text in raw, text
    summary = run_script("tui", out)
    assert summary.returncode == 0, summary.stderr
    assert not DANGER.search(summary.stdout.replace("\n", "")) and "\x1b" not in summary.stdout


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
        f"app = tui.make_app(tui.parse_args([{str(folder)!r}]))\n"
        "async def go():\n"
        "    async with app.run_test() as pilot:\n"
        "        await pilot.press('1', '2', '3', '4'); await pilot.pause(1)\n"
        "asyncio.run(go())\n"
        "print([name for name in ('torch', 'transformers', 'numpy') if name in sys.modules])"
    )
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_the_demo_replays_in_a_temporary_folder(tmp_path) -> None:
    before = {path: path.stat().st_mtime_ns for path in tui.RECORDED.rglob("*")}
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
    assert before == {path: path.stat().st_mtime_ns for path in tui.RECORDED.rglob("*")}


def test_no_json_in_any_file_stops_it(folder) -> None:
    """Random values of every type in every field of every file, extreme numbers among them."""
    rng = random.Random(11)
    values = [
        None,
        True,
        0,
        -1,
        1e308,
        -1e308,
        float("nan"),
        float("inf"),
        10**400,
        "",
        "x",
        [],
        {},
    ]
    values += [[1, "a", None], {"a": 1}, "duplicate", "end", "start", 0.5, 1e-320]

    def scramble(row: dict) -> dict:
        return {k: v if rng.random() < 0.5 else rng.choice(values) for k, v in row.items()}

    def text(rows: list) -> str:
        return "".join(json.dumps(row) + "\n" for row in rows)

    for _ in range(4):
        pairs = [scramble(make_pair(n)) for n in range(8)] + rng.sample(values, 3)
        (folder / "contamination/pairs.jsonl").write_text(text(pairs))
        lines = [
            {"pair_id": f"pair{n:05}", "verdict": "duplicate", "note": "x", "time": "y"}
            for n in range(4)
        ]
        log = [scramble(line) for line in lines] + rng.sample(values, 3)
        (folder / "contamination/decisions.jsonl").write_text(text(log))
        rows = [
            scramble(step_line(n) | {"event": "sample"} if n % 9 == 0 else step_line(n))
            for n in range(40)
        ]
        (folder / "adapter/train_log.jsonl").write_text(text(rows + rng.sample(values, 3)))
        found = [scramble(comparison(f"t{n}", n)) for n in range(5)]
        results = rng.choice([{"comparisons": found}, *values])
        (folder / "eval/results.json").write_text(json.dumps(results))
        for name, (script, _) in tui.STEPS.items():
            (folder / name).mkdir(exist_ok=True)
            run = {
                "step": script,
                "command": "x",
                "inputs": {"a": {"sha256": "b"}},
                "counts": {"a": 1},
            }
            (folder / name / "run.json").write_text(json.dumps(scramble(run)))
            (folder / name / "apply.json").write_text(json.dumps(rng.choice(values)))
        drive(folder, [*"1jjdaeu", "escape", *"2cccl3oo4"], size=(150, 45))
        with contextlib.suppress(UserError):  # a results.json that is none
            assert "flagged pairs" in tui.summary(folder)


def test_a_signal_while_the_widgets_are_mounted() -> None:
    """An app that is told to exit before it is whole may wait for ever."""
    base = type(tui.make_app(tui.parse_args([str(ROOT / "demo/recorded")])))

    def tick(left: int) -> None:
        if left:
            asyncio.get_running_loop().call_soon(tick, left - 1)
        else:
            os.kill(os.getpid(), signal.SIGTERM)

    async def ended(turns: int) -> int | None:
        class Interrupted(base):
            def on_load(self) -> None:
                asyncio.get_running_loop().call_soon(tick, turns)

        app = Interrupted()
        running = asyncio.ensure_future(app.run_async(headless=True, size=(80, 24)))
        done, _ = await asyncio.wait({running}, timeout=20)
        return app.return_code if done else None

    for turns in range(12):
        assert asyncio.run(ended(turns)) == 143, turns

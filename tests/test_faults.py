"""Holds: whatever breaks a step (a kill, Ctrl-C, a full or read-only disk, a clock that goes
backwards, a second process) nothing looks finished that is not, nothing is lost, and the next run
ends with the same bytes; every verdict that the screen showed as given is on disk; a broken file
gives one line at most. python -m pytest -s tests/test_faults.py prints the tables."""

import contextlib
import ctypes
import fcntl
import hashlib
import itertools
import json
import multiprocessing
import os
import pty
import random
import re
import resource
import shutil
import signal
import struct
import sys
import termios
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from multiprocessing import forkserver
from pathlib import Path

import pytest
from conftest import ROOT, load_evaluate
from test_tui import Terminal, decisions, make_pair, write_lines

import build_dataset as build
import check_contamination as check
import finetune
import merge
import tui

TRIALS = 1000
FUZZED: list[tuple[str, str, Counter]] = []  # reader, file, what became of its mutations
TRIED, SURVIVED = Counter(), Counter()  # (step, kind of fault) -> trials
VALUE = re.compile(rb'"(?:[^"\\]|\\.)*"|-?\d+(?:\.\d+)?|true|false|null')
ODD = [b"null", b"-1", b"0", b"1e400", b"NaN", b'"x"', b"[]", b"{}", b"true", b'""', b"9" * 400,
       b"[" * 5000, b'"\\ud800"', b'"\\u0000"', b'{"a": {"b": []}}', b"1.5"]  # fmt: skip


def mutate(data: bytes, rng: random.Random) -> bytes:
    """One to three random changes: bytes, slices, lines, and JSON values of another type."""
    for _ in range(rng.randint(1, 3)):
        size = max(len(data), 1)
        a = rng.randrange(size)
        b = min(len(data), a + rng.choice([1, 1, 4, 40, 400, size]))
        kind = rng.choice(["cut", "flip", "drop", "repeat", "insert", "value", "value", "lines"])
        if kind == "cut":
            data = data[:a]
        elif kind == "flip":
            data = data[:a] + rng.randbytes(1) + data[a + 1 :]
        elif kind == "drop":
            data = data[:a] + data[b:]
        elif kind == "repeat":
            data = data[:b] + data[a:b] + data[b:]
        elif kind == "insert":
            data = data[:a] + rng.choice([*ODD, rng.randbytes(8), b"\0", b"\xff", b'"']) + data[a:]
        elif kind == "value" and (found := list(VALUE.finditer(data[:20_000]))):
            match = rng.choice(found)
            data = data[: match.start()] + rng.choice(ODD) + data[match.end() :]
        elif kind == "lines":
            lines = data.split(b"\n")
            data = b"\n".join(rng.sample(lines, len(lines)))
    return data


def fuzz(path: Path, read: Callable[[], object], seed: int, *places: str) -> Counter:
    """Put mutations of `path` in its place and read: how many went well, how many were refused.

    Of safetensors only the header is mutated. A refusal names the file, or one of `places`.
    """
    whole, rng, seen = path.read_bytes(), random.Random(seed), Counter()
    reader = re.search(r"::test_(\w+)", os.environ["PYTEST_CURRENT_TEST"])[1].replace("_", " ")
    FUZZED.append((reader, path.name, seen))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def stuck(*_: object) -> None:
        raise AssertionError("stuck for a minute")

    signal.signal(signal.SIGALRM, stuck)
    head = 8 + int.from_bytes(whole[:8], "little") if path.suffix == ".safetensors" else len(whole)
    for trial in range(TRIALS):
        path.write_bytes(mutate(whole[:head], rng) + whole[head:])
        signal.alarm(60)
        try:
            with open(os.devnull, "w", encoding="utf-8") as nowhere:  # strict, as a terminal is
                with contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
                    read()
            seen["read"] += 1
        except (build.UserError, OSError) as error:  # what run_main() prints as one line
            assert any(name in str(error) for name in (path.name, *places)), (trial, error)
            assert len(build.one_line(error)) < 1000, trial
            seen["refused"] += 1
        except Exception as error:
            seen["traceback"] += 1
            kept = path.with_name("failing-" + path.name)
            kept.write_bytes(path.read_bytes())
            raise AssertionError(f"{path.name}, mutation {trial} of seed {seed}") from error
        finally:
            signal.alarm(0)
    path.write_bytes(whole)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert grown < 500, f"{path.name}: memory grew by {grown:.0f} MB"
    return seen


def dataset_args(folder: Path, *flags: str) -> object:
    return build.parse_args(["--local", str(folder), *flags])


@pytest.mark.parametrize("file", ["math/math_train.jsonl", "theoremqa/all_theorems.json",
                                  "scienceqa/problems.json", "prm800k/*.jsonl"])  # fmt: skip
def test_source_files(tmp_path, file: str) -> None:
    source = file.split("/")[0]
    shutil.copytree(ROOT / "demo/data" / source, tmp_path / source)
    path = next(tmp_path.glob(file))
    args = dataset_args(tmp_path, "--sources", source)

    def read() -> None:
        rows, dropped, _ = build.read_source(source, args)
        build.add_ids(rows)
        build.add_ids(dropped)
        build.to_jsonl([{**row, "keywords": None} for row in rows + dropped]).encode()

    seen = fuzz(path, read, seed=1)
    assert min(seen["read"], seen["refused"]) > 0 or path.suffix == ".jsonl"


BENCHMARK_FILES = ["mmlu/test/*.csv", "arc/*-test.jsonl", "hellaswag/*.jsonl", "truthfulqa/*.json"]


@pytest.mark.parametrize("file", BENCHMARK_FILES)
def test_benchmark_files(tmp_path, file: str) -> None:
    name = file.split("/")[0]
    shutil.copytree(ROOT / "demo/data" / name, tmp_path / name)
    args = check.parse_args(["--local", str(tmp_path), "--benchmarks", name])
    seen = fuzz(next(tmp_path.glob(file)), lambda: check.load_questions(args), 2, name)
    assert min(seen["read"], seen["refused"]) > 0


@pytest.mark.parametrize("file", ["run.json", "pairs.jsonl", "decisions.jsonl"])
def test_what_apply_reads(demo, tmp_path, monkeypatch, file: str) -> None:
    folder = tmp_path / "contamination"
    shutil.copytree(demo / "contamination", folder)
    pairs = [json.loads(line) for line in (folder / "pairs.jsonl").open()]
    for number, pair in enumerate(pairs):
        verdict = check.VERDICTS[number % 4]
        check.append_decision(folder / "decisions.jsonl", pair["pair_id"], verdict, "ann")
    if file == "pairs.jsonl":  # else its hash, not its reader, refuses every mutation
        run = json.loads((folder / "run.json").read_bytes())
        run["outputs"].pop(file)
        (folder / "run.json").write_text(json.dumps(run))
    whole = {path: path.read_bytes() for path in folder.iterdir()}
    monkeypatch.setattr(sys, "argv", ["check_contamination.py"])
    monkeypatch.setattr(os, "fsync", lambda _: None)  # 7,000 of them would take most of the time

    def read() -> None:
        broken = (folder / file).read_bytes()
        for path in folder.iterdir():
            path.write_bytes(whole[path]) if path in whole else path.unlink()
        (folder / file).write_bytes(broken)
        check.main(["apply", "--out", str(folder)])

    # a folder whose run.json says nothing is of another origin; a data set may have another hash
    seen = fuzz(folder / file, read, 3, str(folder), "since it was checked", "the data set that")
    assert seen["refused" if file != "decisions.jsonl" else "read"] > TRIALS / 2


SHOWN = ["adapter/train_log.jsonl", "eval/results.json", "eval/run.json",
         "contamination/pairs.jsonl", "contamination/run.json"]  # fmt: skip


@pytest.mark.parametrize("file", SHOWN)
def test_what_the_terminal_ui_reads(tmp_path, file: str) -> None:
    shutil.copytree(ROOT / "demo/recorded", tmp_path / "out")
    seen = fuzz(tmp_path / "out" / file, lambda: tui.summary(tmp_path / "out"), 4)
    assert seen["read"] > 0


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    """A folder with a sharded base, base/, and an adapter of it, adapter/."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("small")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 64}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2))
    model.save_pretrained(folder / "base", max_shard_size="60KB")
    model = get_peft_model(model, LoraConfig(r=4, target_modules=["gate_proj", "down_proj"]))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    model.save_pretrained(folder / "adapter")
    known = finetune.base_fingerprint(folder / "base")
    known |= {"base_model": str(folder / "base"), "load_in_4bit": False}
    (folder / "adapter/base_fingerprint.json").write_text(json.dumps(known))
    return folder


MERGED = ["adapter/adapter_config.json", "adapter/base_fingerprint.json", "base/config.json",
          "adapter/adapter_model.safetensors", "base/*index.json", "base/*-00001-*"]  # fmt: skip


@pytest.mark.parametrize("file", MERGED)
def test_what_merge_reads(small, tmp_path, file: str) -> None:
    shutil.copytree(small, tmp_path / "models")
    path, base = next((tmp_path / "models").glob(file)), tmp_path / "models/base"
    flags = ["--adapter", str(tmp_path / "models/adapter"), "--base-model", str(base)]

    def read() -> None:
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        merge.main([*flags, "--out", str(tmp_path / "out")])

    seen = fuzz(path, read, 5, str(tmp_path))
    assert min(seen["read"], seen["refused"]) > 0


# --- faults: a step runs in a child of a process that has imported everything ---------------------

SPAWN = multiprocessing.get_context("forkserver")
SPAWN.set_forkserver_preload(
    [
        *("torch", "transformers.models.llama.modeling_llama", "peft", "sentence_transformers"),
        *("datasets", "lm_eval.models.huggingface", "lm_eval.tasks"),
        *("rich.progress", "tabulate", "textual.app", "textual.widgets", "textual_plotext"),
    ]
)
KILLS = 20
STARTED = "the script begins"
KINDS = ["kill -9", "Ctrl-C", "full disk", "read-only", "clock", "two at once"]
STEPS = ["build", "check", "apply", "finetune", "merge", "evaluate"]
CLOCKED = re.compile(rb'"\w*seconds": [\d.]+')  # in files that a step writes: differs every time


@contextlib.contextmanager
def trial(name: str, kind: str) -> Iterator[None]:
    """Count a fault, and that it was survived if nothing is raised."""
    TRIED[name, kind] += 1
    yield
    SURVIVED[name, kind] += 1


def on_opening(seen: Callable[[str, bool], None]) -> None:
    """Call `seen` with the path and whether it is written to, just before a file is touched."""

    def touched(event: str, about: tuple) -> None:
        if event == "open":
            seen(str(about[0]), bool(about[2] & (os.O_WRONLY | os.O_RDWR)))
        elif event in ("os.rename", "os.mkdir", "os.remove", "os.rmdir"):
            seen(str(about[0]), True)

    sys.addaudithook(touched)


def put_in_the_way(fault: str) -> None:
    """In the child: a signal, a full or read-only disk, a wrong clock."""
    kind, *about = fault.split(" ", 2)
    if kind == "full":  # the same error for every file from that size up
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(about[1]),) * 2)
    if kind == "read-only":  # root, too, has to obey the modes of files: no capability is left
        no_one, header = bytes(24), struct.pack("Ii", 0x20080522, 0)
        assert ctypes.CDLL(None).capset(header, no_one) == 0
    if kind == "clock":  # every look at it is earlier than the one before
        now, gmtime = time.time, time.gmtime
        time.time = lambda: 2e9 - now()
        time.gmtime = lambda *at: gmtime(*at or [time.time()])
    counter = itertools.count(1)
    if kind == "signal":  # just before the n-th change of the folder
        sign, count, folder = about[0], *about[1].split(" ", 1)

        def changing(path: str, written: bool) -> None:
            if written and path.startswith(folder) and next(counter) == int(count):
                os.kill(os.getpid(), int(sign))

        on_opening(changing)
    if kind == "mark":  # each change of the folder, in the log
        on_opening(lambda p, written: written and p.startswith(about[0]) and os.write(2, b"\0"))


def run_step(script: str, args: list[str], log: Path, fault: str) -> None:
    """In the child: the script as its user starts it, with one fault put in its way."""
    os.setsid()  # so that a terminal given as `log` becomes its own
    file = os.open(log, os.O_RDWR | os.O_CREAT | os.O_APPEND)
    for number in (0, 1, 2) if os.isatty(file) else (1, 2):
        os.dup2(file, number)
    sys.stdin = sys.__stdin__ = open(0, closefd=False)
    sys.argv = [f"{script}.py", *args]
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in a shell's background
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # ignored after nohup
    sys.path.append(str(ROOT))
    os.chdir(ROOT)
    put_in_the_way(fault)
    module = load_evaluate() if script == "evaluate" else __import__(script)

    def main() -> None:
        module.main()
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the interpreter's end is no part of the step

    print(STARTED, flush=True)
    build.run_main(main)


class Step:
    """One command, how long it takes, and what it writes when nothing is in its way."""

    def __init__(self, script: str, args: list, place: Path, given: Path | None = None):
        """`given`: a folder that the step works on."""
        self.script, self.given, self.changes = script, given, 0
        self.out, self.kept = place / "work/out", place / "kept"
        self.log = place / "log"
        self.args = [*map(str, args), "--out", str(self.out)]
        for fault in (f"mark {self.out.parent}", ""):  # the second time everything is imported
            self.fresh()
            began = time.monotonic()
            assert self.run(fault) == 0, self.text()
            self.changes = self.text().count("\0") or self.changes
            self.seconds = time.monotonic() - began
        self.expected = self.outputs()
        assert self.expected
        self.largest = max(path.stat().st_size for path in self.out.rglob("*") if path.is_file())
        shutil.copytree(self.out, self.kept)

    def fresh(self) -> "Step":
        """The step, with nothing of an earlier trial left."""
        shutil.rmtree(self.out.parent, ignore_errors=True)
        self.out.parent.mkdir(parents=True)
        if self.given:
            shutil.copytree(self.given, self.out)
        return self

    def start(self, fault: str = "", again: tuple = ("--resume",)) -> multiprocessing.Process:
        """`again` is what a user adds to go on with what a killed finetune.py has left."""
        self.log.unlink(missing_ok=True)
        more = again if self.script == "finetune" and self.out.exists() else ()
        args = (self.script, [*self.args, *more], self.log, fault)
        process = SPAWN.Process(target=run_step, args=args)
        process.start()
        return process

    def run(self, fault: str = "", **how: tuple) -> int:
        process = self.start(fault, **how)
        process.join(120)
        assert process.exitcode is not None, "stuck for two minutes"
        return process.exitcode

    def text(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    def outputs(self) -> dict[str, str]:
        """The sha256 of every output without its times; each file is what run.json says."""
        found = {}
        for name in ("run.json", "apply.json")[bool(self.given) :]:
            if (self.out / name).exists():
                for file, about in json.loads((self.out / name).read_text())["outputs"].items():
                    data = (self.out / file).read_bytes()
                    assert hashlib.sha256(data).hexdigest() == about["sha256"], file
                    found[file] = hashlib.sha256(CLOCKED.sub(b"", data)).hexdigest()
        return {file: digest for file, digest in found.items() if not MOVING.search(file)}

    def state(self) -> str:
        """Of the output folder: nothing (new), unfinished, or finished and then whole."""
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
        """Nothing is in its way any more: it ends well, and leaves nothing half-written."""
        assert (self.run(), self.state()) == (0, "finished"), self.text()
        assert not [*self.out.parent.rglob(".*")]

    def refused(self, code: int, *words: str) -> None:
        """It has ended with one line that has one of `words`."""
        text = self.text()
        assert code == 2 and "Traceback" not in text, (code, text)
        assert any(word in text.splitlines()[-1] for word in words), text


MOVING = re.compile("^checkpoints/|train_log")  # hold speeds, memory, and what --resume leaves out


def files_of(folder: Path) -> dict[str, str]:
    """The sha256 of every file below a folder."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in paths
    }


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> None:
    """Start the process that imports: elsewhere, for lm_eval needs the package `evaluate`."""
    with contextlib.chdir(tmp_path_factory.mktemp("server")), pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")  # more of them wait for each other where others work
        forkserver.ensure_running()


@pytest.fixture(scope="module")
def steps(demo, server, tmp_path_factory) -> dict[str, Step]:
    """The six commands, each on what the one before has written."""
    top, made = tmp_path_factory.mktemp("faults"), {}
    base, data = ROOT / "demo/base_model", ROOT / "demo/data"
    dataset = Path(shutil.copy(demo / "dataset/dataset.jsonl", top))  # without its run.json
    cache, local = ["--cache", demo / "cache"], ["--local", data]
    flags = [*local, "--sources", "math,openbookqa", *cache]
    made["build"] = Step("build_dataset", flags, top / "build")
    flags = ["--dataset", dataset, *local, "--benchmarks", "mmlu", *cache]
    made["check"] = Step("check_contamination", flags, top / "check")
    given = made["check"].kept
    for number, line in enumerate((given / "pairs.jsonl").open()):
        pair, verdict = json.loads(line)["pair_id"], check.VERDICTS[number % 4]
        check.append_decision(given / "decisions.jsonl", pair, verdict, "ann")
    made["apply"] = Step("check_contamination", ["apply"], top / "apply", given)
    clean = made["apply"].kept / "clean.jsonl"
    flags = ["--base-model", base, "--data", clean, "--limit", 24, "--batch-size", 8]
    flags += ["--epochs", 1, "--save-every", 1]
    made["finetune"] = Step("finetune", flags, top / "finetune")
    flags = ["--base-model", base, "--adapter", made["finetune"].kept]
    made["merge"] = Step("merge", flags, top / "merge")
    flags = ["--model", base, "--model", made["merge"].kept, *local, "--tasks", "arc", "--limit", 4]
    made["evaluate"] = Step("evaluate", flags, top / "evaluate")
    print({name: round(step.seconds, 1) for name, step in made.items()})
    return made


@pytest.fixture
def untouched(demo, steps):
    """Every fault has to leave what earlier steps wrote, and all inputs, as they were."""

    def inputs() -> dict[str, str]:
        found = files_of(next(iter(steps.values())).kept.parent.parent) | files_of(demo)
        return {n: h for n, h in found.items() if not re.search("/work/|/log$|sqlite", n)}

    before = inputs()
    yield
    assert inputs() == before


@pytest.mark.slow
@pytest.mark.usefixtures("untouched")
@pytest.mark.parametrize("name", STEPS)
def test_killed_at_random_moments(steps, name: str) -> None:
    step, rng, seen = steps[name].fresh(), random.Random(name), Counter()
    for number, sign in enumerate([signal.SIGKILL] * KILLS + [signal.SIGINT] * 6):
        with trial(name, "kill -9" if sign == signal.SIGKILL else "Ctrl-C"):
            if number % 2:  # writing is the last part of most steps: half of the signals fall there
                count = rng.randint(1, step.changes)
                process = step.start(f"signal {sign:d} {count} {step.out.parent}")
            else:
                process = step.start()
                process.join(rng.uniform(0, step.seconds))
                with contextlib.suppress(ProcessLookupError):  # it may have ended before
                    os.kill(process.pid, sign)
            process.join(60)
            text = step.text()
            if sign == signal.SIGINT and process.exitcode != 0 and STARTED in text:
                assert process.exitcode == 130 and "Traceback" not in text, (process.exitcode, text)
            seen[state := step.state()] += 1
            if state == "finished" or rng.random() < 0.3:  # else the next one goes on from there
                step.fresh()
    step.finishes()
    print(name, dict(seen))


def test_an_interrupt_before_main(monkeypatch, capsys) -> None:
    monkeypatch.setattr(os, "environ", {**os.environ})
    monkeypatch.setattr(build, "silence_libraries", lambda: signal.raise_signal(signal.SIGINT))
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored after `&`
    try:
        with pytest.raises(SystemExit) as end:
            build.run_main(lambda: pytest.fail("it went on"))
    finally:
        signal.signal(signal.SIGINT, handler)
    assert end.value.code == 130 and capsys.readouterr().err.startswith("interrupted: ")


@pytest.mark.usefixtures("untouched")
def test_a_killed_training_is_not_begun_again_unasked(steps) -> None:
    step = steps["finetune"].fresh()
    with trial("finetune", "kill -9"):
        process = step.start()
        while not (step.out / "checkpoints/step-000001").exists() and process.is_alive():
            time.sleep(0.002)
        process.kill()
        process.join(60)
        assert step.state() == "unfinished"
        step.refused(step.run(again=()), "go on with --resume, or begin again with --overwrite")
        step.finishes()


@pytest.mark.slow
@pytest.mark.usefixtures("untouched")
@pytest.mark.parametrize("name", STEPS)
def test_full_disk(steps, name: str) -> None:
    step = steps[name].fresh()
    for part in (1, 2, 3):
        with trial(name, "full disk"):
            step.refused(step.run(f"full disk {step.largest * part // 4}"), "too large", "room")
            assert step.state() != "finished"
    step.finishes()


@pytest.mark.slow
@pytest.mark.usefixtures("untouched")
@pytest.mark.parametrize("name", STEPS)
def test_read_only_output(steps, name: str) -> None:
    step = steps[name].fresh()
    for folder in [step.out] if step.given else [step.out.parent, step.out]:
        with trial(name, "read-only"):
            folder.mkdir(exist_ok=True)
            folder.chmod(0o555)
            step.refused(step.run("read-only"), "Permission denied")
            folder.chmod(0o755)
            assert step.state() == "nothing"
    step.finishes()


@pytest.mark.usefixtures("untouched")
@pytest.mark.parametrize("name", STEPS)
def test_a_clock_that_goes_backwards(steps, name: str) -> None:
    step = steps[name].fresh()
    with trial(name, "clock"):
        assert (step.run("clock"), step.state()) == (0, "finished"), step.text()


@pytest.mark.usefixtures("untouched")
@pytest.mark.parametrize("name", STEPS)
def test_two_at_once(steps, name: str) -> None:
    step = steps[name].fresh()
    with trial(name, "two at once"):
        both = [step.start(), step.start(again=())]
        for process in both:
            process.join(120)
        codes = sorted(process.exitcode for process in both)
        assert codes == [0, 2] or (step.given and codes == [0, 0]), step.text()
        assert step.state() == "finished" and "Traceback" not in step.text()
        said = ("another process", "is finished", "go on with --resume")
        assert codes == [0, 0] or any(text in step.text() for text in said), step.text()
    step.fresh()


# --- faults: the terminal UI, in a terminal of its own --------------------------------------------


class Screen(Terminal):
    """A review in a child of the server, with one fault put in its way."""

    def __init__(self, folder: Path, fault: str = "", who: str = "ann") -> None:
        self.master, self.slave = pty.openpty()
        fcntl.ioctl(self.slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
        args = ("tui", [str(folder), "--reviewer", who], Path(os.ttyname(self.slave)), fault)
        self.process, self.data = SPAWN.Process(target=run_step, args=args), b""
        self.process.start()
        threading.Thread(target=self.collect, daemon=True).start()

    def alive(self) -> bool:
        return self.process.is_alive()

    def judge(self, first: int, until: float, rng: random.Random) -> dict[str, str]:
        """Give verdicts from pair `first` on until that moment: those after which it moved on."""
        given, seen, key = {}, 0, ""
        for number in itertools.count(first):
            while f"Q{number:05}" not in self.text()[seen:]:
                if time.monotonic() > until:
                    return given
                assert self.alive(), self.text()[-3000:]
                time.sleep(0.005)
            if number > first:
                given[f"pair{number - 1:05}"] = tui.KEYS[key][0]
            key = rng.choice([*tui.KEYS])
            seen = self.press(key)

    def end(self, sign: int | None = None) -> int:
        """Its exit code after a signal or `q`: a child that has not begun ignores both."""
        while STARTED.encode() not in self.data and self.alive():
            time.sleep(0.002)
        os.kill(self.process.pid, sign) if sign else self.press("q")
        self.process.join(60)
        time.sleep(0.05)  # for what it wrote last
        os.close(self.slave)
        return self.process.exitcode


@pytest.fixture
def review(tmp_path, server) -> Path:
    """A folder with 2,000 pairs, and what was decided on."""
    out = tmp_path / "out"
    write_lines(out / "contamination/pairs.jsonl", [make_pair(n) for n in range(2000)])
    (out / "contamination/decisions.jsonl").touch()
    return out


def verdicts(folder: Path) -> dict[str, str]:
    """pair_id -> verdict; every line on the disk is whole."""
    return {line["pair_id"]: line["verdict"] for line in decisions(folder)}


@pytest.mark.slow
def test_a_review_ended_at_random_moments(review) -> None:
    rng, log = random.Random("tui"), review / "contamination/decisions.jsonl"
    took = (screen := Screen(review)).wait("Q00000", seconds=60)
    screen.end(signal.SIGKILL)
    for sign in [signal.SIGKILL] * KILLS + [signal.SIGINT, signal.SIGTERM, signal.SIGHUP] * 2:
        with trial("tui", "kill -9" if sign == signal.SIGKILL else "Ctrl-C"):
            before, known = log.read_bytes(), verdicts(review)
            moment = time.monotonic() + rng.uniform(0, took + 1)
            screen = Screen(review)
            given = screen.judge(len(known), moment, rng)
            code = screen.end(sign)
            assert log.read_bytes().startswith(before)
            assert (now := verdicts(review)).items() >= known.items() | given.items()
            assert len(now) - len(known) - len(given) in (0, 1)
            opened, closed = (screen.data.rfind(b"\x1b[?1049" + end) for end in (b"h", b"l"))
            if sign != signal.SIGKILL and opened >= 0:  # the terminal is as it was
                assert closed > opened and code in (0, 128 + sign), (code, screen.text()[-3000:])
                assert "Traceback" not in screen.text()
    print("tui", len(now), "verdicts")
    assert len(now) > KILLS


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_the_demo_leaves_nothing(tmp_path, sign: signal.Signals) -> None:
    with trial("tui", "Ctrl-C"):
        terminal = Terminal("--demo", "--reviewer", "ann", TMPDIR=str(tmp_path))
        terminal.wait("decided", seconds=60)
        assert [*tmp_path.iterdir()]
        terminal.process.send_signal(sign)
        assert terminal.process.wait(60) in (0, 128 + sign)
        assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("room", [0, 20, 700])
def test_a_review_on_a_full_disk(review, room: int) -> None:
    log = review / "contamination/decisions.jsonl"
    with trial("tui", "full disk"):
        check.append_decision(log, "pair00000", "duplicate", "bob")
        screen, given = Screen(review, f"full disk {log.stat().st_size + room}"), 1
        screen.wait("Q00001", seconds=60)
        seen = screen.press("g")
        while "Not saved" not in screen.text()[seen:]:
            if f"Q{given + 1:05}" in screen.text()[seen:]:
                given, seen = given + 1, screen.press("g")
            time.sleep(0.01)
            assert screen.alive() and given < 20
        assert screen.end() == 0
        known = check.read_decisions(log)
        assert [*known] == [f"pair{number:05}" for number in range(given)]
        assert (given > 1) == (room > 99)
        screen = Screen(review)  # there is room again
        screen.wait(f"Q{given:05}", seconds=60)
        screen.wait(f"Q{given + 1:05}", screen.press("s"))
        assert screen.end() == 0
        assert [*check.read_decisions(log).values()][-1]["verdict"] == "similar-but-different"
        assert len(check.read_decisions(log)) == given + 1


@pytest.mark.parametrize("name", ["contamination", "contamination/decisions.jsonl"])
def test_a_review_that_may_not_write(review, name: str) -> None:
    log = review / "contamination/decisions.jsonl"
    with trial("tui", "read-only"):
        log.unlink() if name == "contamination" else log.write_text("")
        (review / name).chmod(0o555)
        screen = Screen(review, "read-only")
        screen.wait("Q00000", seconds=60)
        screen.wait("Permission denied", screen.press("d"))
        assert "Not saved" in screen.text() and "1 of 2,000 decided" not in screen.text()
        (review / name).chmod(0o755)
        screen.wait("Q00001", screen.press("d"))
        assert screen.end() == 0
        assert verdicts(review) == {"pair00000": "duplicate"}


@pytest.mark.parametrize("how", ["replaced", "cut", "gone"])
def test_pairs_that_change_during_a_review(review, how: str) -> None:
    path, new = review / "contamination/pairs.jsonl", review / "new.jsonl"
    pairs = [make_pair(n + 50, train_question=f"Z{n:05}", cosine=1 - n / 100) for n in range(9)]
    write_lines(new, pairs)
    screen = Screen(review)
    screen.wait("Q00000", seconds=60)
    screen.wait("Q00001", screen.press("d"))
    seen, expected = len(screen.text()), {"pair00000": "duplicate"}
    if how == "cut":  # within a line, while it is open elsewhere
        os.truncate(path, 1500)
        screen.wait("unreadable", seen)
        screen.press("g")
    else:
        path.unlink()
        screen.wait("no flagged pairs here", seen)
        screen.press("g")  # there is no pair to judge
        os.replace(new, path)
        screen.wait("Z00000", seen)
        screen.wait("Z00001", screen.press("n"))
        expected["pair00050"] = "not-a-leak"
    assert screen.end() == 0
    assert verdicts(review).items() >= expected.items()


def test_a_review_while_the_clock_goes_backwards(review) -> None:
    with trial("tui", "clock"):
        screen = Screen(review, "clock")
        screen.wait("Q00000", seconds=60)
        for number, key in enumerate("dgsn", 1):
            screen.wait(f"Q{number:05}", screen.press(key))
        assert screen.end() == 0
        assert [*verdicts(review).values()] == [verdict for verdict, _ in tui.KEYS.values()]
        times = [line["time"] for line in decisions(review)]
        assert times == sorted(times, reverse=True) and times[0] < "2020"


@pytest.mark.parametrize("killed", [False, True])
def test_two_reviewers_at_once(review, killed: bool) -> None:
    with trial("tui", "two at once"):
        both = [Screen(review, who=name) for name in ("ann", "bob")]
        for screen in both:
            screen.wait("Q00000", seconds=60)
        for key in "dgsndgsn":
            for screen in both:
                screen.press(key)
        if killed:
            both[0].end(signal.SIGKILL)
        most, deadline = 8 if killed else 16, time.monotonic() + 60
        while len(decisions(review)) < most and time.monotonic() < deadline:
            time.sleep(0.05)
        for screen in both[killed:]:
            assert screen.end() == 0
        counts = Counter(line["reviewer"] for line in decisions(review))
        assert counts["bob"] == 8 and (killed or counts["ann"] == 8)


# --- what was tried -------------------------------------------------------------------------------


def test_tables() -> None:
    """The last of this file: both tables, and nothing in them that was lost."""
    names, every = [*STEPS, "tui"], [*KINDS, "all"]
    of = {(n, k): [TRIED[n, k], SURVIVED[n, k]] for n in names for k in KINDS}
    of |= {(n, "all"): [sum(of[n, k][i] for k in KINDS) for i in (0, 1)] for n in names}
    of |= {("all", k): [sum(of[n, k][i] for n in names) for i in (0, 1)] for k in every}
    cells = [[n, *("{} / {}".format(*of[n, k]) for k in every)] for n in [*names, "all"]]
    print("\nFaults, tried / survived:\n" + check.markdown_table(["step", *every], cells))
    ends = ("read", "refused", "traceback")
    rows = [[*about, seen.total(), *(seen[end] for end in ends)] for *about, seen in FUZZED]
    total = [sum(row[column] for row in rows) for column in range(2, 6)]
    heads = ["reader", "file", "inputs", *ends]
    print("\nFuzzed inputs:\n" + check.markdown_table(heads, [*rows, ["all", "", *total]]))
    assert SURVIVED == TRIED and total[3] == 0
    part = not all(tried for tried, _ in of.values())  # of the file was run, as by --quick
    assert part or (TRIED.total() >= 120 and (total[0] >= 8000 or not FUZZED))

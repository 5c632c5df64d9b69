"""What every script needs: errors, flags, JSONL, output folders, run.json, the next command.

And what several steps must mean alike: the prompt, the base's fingerprint, an adapter's files,
verdicts and their log. Nothing of a single step. It imports the standard library alone; what loads
more does so inside its function. Who forks a script takes that script and this file:

    from common import UserError, make_parser, claim_output, finish_run, run_main

"The paper" is Platypus, arXiv 2308.07317. A "mend" is what the user can do about a fault; every
error message ends with one.
"""

import argparse
import fcntl
import functools
import hashlib
import json
import logging
import os
import re
import shlex
import subprocess
import sys
import time
import unicodedata
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from importlib import metadata, util
from pathlib import Path
from typing import Any, NoReturn

Row = dict[str, Any]  # one line of JSONL
UNFINISHED = ".unfinished"  # holds a step's command from its first write until run.json is there
DECISIONS = "decisions.jsonl"  # the only human work: nothing ever removes it
PACKAGES = ("torch", "transformers", "peft", "datasets", "sentence-transformers", "lm_eval")
MODEL_FILES = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja", "*.md", "LICENSE*"]
VERDICTS = ("duplicate", "gray-area", "similar-but-different", "not-a-leak")  # paper, section 2.3
REMOVED = (*VERDICTS[:3], "undecided")  # the paper's three classes, and what nobody looked at yet
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
CONFIG_NOISE = ("_name_or_path", "transformers_version", "torch_dtype", "dtype", "use_cache")
BROKEN_PIPE, INTERRUPTED = 141, 130  # exit codes that a shell gives to SIGPIPE and SIGINT
LONGEST_SHOWN = 4000  # characters of one text
COMBINING_SHOWN = 3  # marks on one letter; scripts in use need no more
DRAWN_AS_NOTHING = re.compile(  # fillers, joiners, variation selectors: str.isprintable() is true
    "[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u2800\u3164\ufe00-\ufe0f\uffa0"
    "\U000e0100-\U000e01ef]"
)


class UserError(Exception):
    """A mistake that the user can mend: printed as one line, exit code 2."""


# --- errors ---------------------------------------------------------------------------------------


def run_main(main: Callable[[], None]) -> None:
    """Run a script's main(); a user's mistake becomes one line on stderr and exit code 2.

    Where nobody reads stdout any more, as after `| head -1`, it ends without a word. A step prints
    to stdout only after its files are whole.
    """
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # a pipe or terminal that is not UTF-8
    try:
        code = exit_code(main)
        sys.stdout.flush()  # here, where its fault can be caught, not at the interpreter's end
    except BrokenPipeError:
        os._exit(BROKEN_PIPE)  # sys.exit() would flush stdout once more, and fail again
    if code:
        sys.exit(code)


def exit_code(main: Callable[[], None]) -> Any:
    """Run a script's main() and say on stderr what stopped it.

    Returns 2 for an error, 130 for Ctrl-C, else what main() gave to sys.exit(), 0 without one.
    """
    try:
        silence_libraries()
        main()
        return 0
    except SystemExit as end:
        return end.code
    except BrokenPipeError:  # an OSError, which is no error here: run_main() ends it
        raise
    except KeyboardInterrupt:
        fault = "interrupted: the same command goes on with what is unfinished, or begins again"
        print(fault, file=sys.stderr)
        return INTERRUPTED
    except ModuleNotFoundError as error:
        fault = f"no package {error.name} here: run source .venv/bin/activate"
        fault = f"{fault} (bash demo.sh makes it) and the command again"
    except OSError as error:  # a full disk, no rights
        fault = str(error)
        if error.filename:
            fault = f"{error.filename}: {error.strerror}"
    except UserError as error:
        fault = str(error)
    print(f"error: {one_line(fault, 500)}", file=sys.stderr)
    return 2


def silence_libraries() -> None:
    """Turn off what libraries report to their makers, or print for their own developers."""
    if not sys.stderr.isatty():  # bars would fill a log file
        os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("HF_UPDATE_DOWNLOAD_COUNTS", "0")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # it prints each retry
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # which kernels it lacks
    warnings.simplefilter("ignore", FutureWarning)


def first_line(error: Exception) -> str:
    """Return the first line of a library's error, or its type where it has no text."""
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0]


# --- text that came from a file or a name ---------------------------------------------------------


@functools.lru_cache(maxsize=8192)
def visible(char: str) -> str:
    """Return one character as it may reach a terminal: itself, its picture, or its number."""
    if char == "\t":
        return "→   "
    if ord(char) < 32:
        return chr(0x2400 + ord(char))  # Unicode's pictures of control characters
    if char.isprintable() and not DRAWN_AS_NOTHING.match(char):
        return char
    if unicodedata.category(char) == "Zs":
        return " "
    return f"\\u{ord(char):04x}"


def printable(value: Any, longest: int = LONGEST_SHOWN) -> str:
    """Make text from a file fit for a terminal: control characters visible, length capped.

    >>> printable("a\\x1b]0;title\\x07b")
    'a\\u241b]0;title\\u2407b'
    """
    text = "" if value is None else str(value)
    shown = []
    marks = 0
    for char in text[:longest]:
        marks = marks + 1 if unicodedata.combining(char) else 0
        if char == "\n":
            shown.append(char)
        elif marks > COMBINING_SHOWN:
            shown.append(f"\\u{ord(char):04x}")
        else:
            shown.append(visible(char))

    more = len(text) - longest
    if more > 0:
        shown.append(f" … ({more:,} more characters)")
    return "".join(shown)


def one_line(value: Any, longest: int = 200) -> str:
    """Make any text fit for one line: blanks joined, and what is too long loses its middle.

    >>> one_line("line 3:\\n\\x1b[2J"), one_line("abcdefgh", 4)
    ('line 3: \\u241b[2J', 'ab … gh')
    """
    text = " ".join(str("" if value is None else value).split())
    if len(text) > longest:  # the end of an error message says how to mend it
        half = longest // 2
        text = f"{text[:half]} … {text[-half:]}"
    return printable(text, len(text))


def markdown_table(headers: list[str], rows: list[list[Any]]) -> str:
    """Draw a Markdown table, aligned in a terminal too: the first column left, the others right."""
    from tabulate import tabulate

    cells = [[table_cell(value) for value in row] for row in rows]
    sides = ["left"] + ["right"] * (len(headers) - 1)
    return tabulate(cells, headers, "pipe", colalign=sides, disable_numparse=True)


def table_cell(value: Any) -> Any:
    """Return a value as a table shows it: thousands apart, text fit for a terminal."""
    if type(value) is int:
        return f"{value:,}"
    if isinstance(value, str):
        return one_line(value, 500)
    return value


# --- flags ----------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """Says what is wrong with the flags in one line; the usage is for --help."""

    def error(self, message: str) -> NoReturn:
        """Raise what argparse would have printed below the usage."""
        raise UserError(f"{message} (all flags: python {self.prog} --help)")


def positive(text: str) -> int:
    """Read a whole number above 0, as a flag's type."""
    if not re.fullmatch(r"\d+", text) or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def make_parser(doc: str, out: str) -> Parser:
    """Make a script's parser with the flags that all five steps share."""
    parser = Parser(
        description=doc,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument_group("run").add_argument
    text = "output folder (default: %(default)s)"
    add("--out", type=Path, default=Path(out), metavar="DIR", help=text)
    add("--overwrite", action="store_true", help="replace a finished output folder")
    add("--seed", type=int, default=0, metavar="N", help="of everything random (default: 0)")
    add("--device", help="cpu, cuda or mps (default: the best there is)")
    text = "first N rows of each source, subject or task: a partial result (not of a merge)"
    add("--limit", type=positive, metavar="N", help=text)
    return parser


def refuse(faults: list[str]) -> None:
    """Raise one UserError that names every fault, if there is any."""
    if faults:
        raise UserError("; ".join(faults))


# --- JSON and JSONL -------------------------------------------------------------------------------


def read_records(path: Path) -> Iterator[tuple[str, Any, str]]:
    """Yield (place, record, error) for each record of a .jsonl or .json file, bad lines too.

    A .jsonl file has one record a line, a .json file one list, or one dict of key -> record.
    `place` is "name.jsonl:line" (from 1), "name.json:index" (from 0) or "name.json:key"; either
    `record` or `error` is empty. Raises UserError where nothing of the file can be read.
    """
    if path.suffix == ".json":
        for key, record in read_collection(path):
            yield f"{path.name}:{key}", record, ""
        return
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line.decode("utf-8-sig"))
            except (ValueError, RecursionError) as error:  # broken JSON or UTF-8
                yield f"{path.name}:{number}", None, str(error)
            else:
                yield f"{path.name}:{number}", record, ""


def read_collection(path: Path) -> Iterable[tuple[Any, Any]]:
    """Read a .json file of one list or dict: (index or key, record) of each of its records."""
    data = load_json(path)
    if isinstance(data, dict):
        return data.items()
    if isinstance(data, list):
        return enumerate(data)
    raise UserError(f"{path} holds one {type(data).__name__}, not a list or a dict of rows")


def read_jsonl(path: Path, fields: dict[str, type]) -> list[Row]:
    """Read a .jsonl or .json file whose objects all have `fields` of these types."""
    rows = []
    for place, row, error in read_records(path):
        where = path.parent / place
        if not isinstance(row, dict):
            raise UserError(f"{where} is not a JSON object: {error or repr(row)[:60]}")
        for name, kind in fields.items():
            if not isinstance(row.get(name), kind):
                raise UserError(f"{where} has no {name!r} of type {kind.__name__}")
        try:
            json.dumps(row, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise UserError(f"{where} holds half of a surrogate pair") from None
        rows.append(row)
    return rows


def load_json(path: Path) -> Any:
    """Read a file of JSON. Raises UserError where it is none."""
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON: {error}") from None


def read_json(path: Path) -> Row:
    """Read the JSON object that a file holds. Raises UserError where it holds none."""
    data = load_json(path)
    if not isinstance(data, dict):
        raise UserError(f"{path} holds a {type(data).__name__}, not an object")
    return data


def read_object(path: Path) -> Row:
    """Read the JSON object that a file such as run.json holds; {} where none can be read."""
    with suppress(OSError, UserError):
        return read_json(path)
    return {}


def to_jsonl(rows: Iterable[Row]) -> str:
    """Write rows as text, one JSON object a line, non-ASCII text as it is."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def write_file(path: Path, text: str | bytes) -> None:
    """Write `text` so that `path` holds all of it or what it held before, even after a crash.

    Half a surrogate pair, which UTF-8 cannot hold, is written as its JSON escape.
    """
    data = text
    if isinstance(text, str):
        data = text.encode("utf-8", "backslashreplace")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Return when a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of(path: Path) -> str:
    """Hash a file's bytes; return the sha256 in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# --- inputs that an earlier step wrote ------------------------------------------------------------


def check_input(path: Path, mend: str) -> Path:
    """Return `path` if it exists and no unfinished step left it; `mend` says how to get it."""
    if not os.path.exists(path):  # unlike Path.exists(), False for a name with a NUL
        raise UserError(f"{path} is missing: {mend}")
    folder = path if path.is_dir() else path.parent
    mark = folder / UNFINISHED
    if mark.exists():
        command = mark.read_text(errors="replace").strip()
        raise UserError(f"{folder} is unfinished: finish it with {command}")
    return path


def read_run(path: Path) -> Row:
    """Read a finished step's run.json, or what `check_contamination.py apply` writes, apply.json.

    Raises UserError where it is neither.
    """
    fault = f"{path} is not what a finished step wrote: run that step again"
    run = read_object(path)
    parts = [run.get("settings"), run.get("inputs"), run.get("outputs")]
    parts.append(run.get("counts", {}))  # which not every step has
    if not all(isinstance(part, dict) for part in parts):
        raise UserError(fault)
    files = [*run["inputs"].values(), *run["outputs"].values()]
    if not all(isinstance(described, dict) for described in files):
        raise UserError(fault)
    return run


def check_listed(path: Path, record: str = "run.json") -> Path:
    """Return `path`; refuse it where `record` beside it lists a file of this name and other bytes.

    A file that no step listed is the user's own, and taken as it is.
    """
    run = path.with_name(record)
    if not run.exists():
        return path
    recorded = read_run(run)["outputs"].get(path.name)
    if recorded and recorded.get("sha256") != sha256_of(path):
        fault = f"{path} is not the file that {run} lists (cut short, or edited)"
        raise UserError(f"{fault}: run its step again, or use a copy in a folder of its own")
    return path


# --- output folders -------------------------------------------------------------------------------


def check_output(out: Path, overwrite: bool, *inputs: Path) -> None:
    """Refuse a finished folder without `overwrite`, an input's own folder, and foreign folders."""
    for path in inputs:
        folder = path.parent if path.is_file() else path
        if folder.resolve() == out.resolve():
            raise UserError(f"--out {out} is the folder of an input; name another folder")
    if not out.exists():
        return
    if not out.is_dir():
        raise UserError(f"--out {out} is a file; name a folder")

    names = {path.name for path in out.iterdir()}
    if UNFINISHED in names or names <= {DECISIONS}:
        return
    if "run.json" not in names or step_of(out) != Path(sys.argv[0]).stem:
        fault = f"--out {out} holds files, but no run.json of this step"
        raise UserError(f"{fault}: name another folder, or take all but {DECISIONS} out of it")
    if not overwrite:
        raise UserError(f"{out} is finished; add --overwrite, or name another folder with --out")


def step_of(out: Path) -> str | None:
    """Name the script that finished a folder, by its run.json; None where that cannot be read."""
    return read_object(out / "run.json").get("step")


@contextmanager
def claim_output(
    out: Path, overwrite: bool, keep_run: bool = False, resume_flag: str = ""
) -> Iterator[None]:
    """Hold `out` as this process's unfinished output folder until the block has ended well.

    A second process on it is refused; the lock ends with its process, however that ends. What a
    former run listed as its outputs is removed. `overwrite` allows that in a finished folder; with
    `keep_run` too, the folder is worked on and nothing is removed. `resume_flag`: what this
    command needs beside its own flags to go on after a stop, such as " --resume".
    """
    check_output(out, overwrite)
    out.mkdir(parents=True, exist_ok=True)
    with (out / UNFINISHED).open("a") as mark:  # "a": a holder's command stays until it is locked
        try:
            fcntl.flock(mark, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not os.path.samestat(os.fstat(mark.fileno()), (out / UNFINISHED).stat()):
                raise BlockingIOError  # its holder finished in between: this is no longer the mark
        except (BlockingIOError, FileNotFoundError):
            raise UserError(f"another process is writing to {out}: wait for it") from None

        mark.truncate(0)
        print(command_line() + resume_flag, file=mark, flush=True)
        if not keep_run:
            remove_outputs(out)
        for left in out.rglob(".*.tmp"):  # by a process of ours that was killed
            left.unlink()

        yield
        (out / UNFINISHED).unlink()


def remove_outputs(out: Path) -> None:
    """Remove the files that a finished step lists as its outputs, then what lists them.

    Else a shard or a model's scores of the former run would be loaded beside the new ones.
    """
    for record in (out / "run.json", out / "apply.json"):
        listed = read_object(record).get("outputs")
        if isinstance(listed, dict):
            for name in listed:
                if is_own_file(out, name):
                    (out / name).unlink()
        record.unlink(missing_ok=True)


def is_own_file(out: Path, name: str) -> bool:
    """Tell whether a listed name is a file within `out` that may be removed; lists may be forged.

    No absolute and no hidden name, "..", or way out by a link; and never the verdicts.
    """
    path = Path(name)
    if path.is_absolute() or any(part.startswith(".") for part in path.parts):
        return False
    if path.name.lower() == DECISIONS or not os.path.isfile(out / name):
        return False
    return (out / name).resolve().is_relative_to(out.resolve())


# --- run.json -------------------------------------------------------------------------------------


def describe_file(path: Path) -> Row:
    """Return the sha256 of a file and, where it is .jsonl, its rows."""
    described: Row = {"sha256": sha256_of(path)}
    if path.suffix == ".jsonl":
        described["rows"] = path.read_bytes().count(b"\n")
    return described


def describe_files(paths: Iterable[Path]) -> dict[str, Row]:
    """Return {path: {"sha256", and "rows" of .jsonl}}.

    Inputs are described before they are read: a later change then shows in run.json.
    """
    files = list(paths)
    with ThreadPoolExecutor() as threads:  # a core hashes 1 to 2 GB a second; models have tens
        described = list(threads.map(describe_file, files))
    names = map(str, files)
    return dict(zip(names, described, strict=True))


def finish_run(
    args: argparse.Namespace,
    inputs: dict[str, Row],
    outputs: list[Path],
    started: float,
    name: str = "run.json",
    **more: Any,
) -> None:
    """Write run.json (or `name`), the last of a step's files.

    inputs: of describe_files(); outputs: the files below args.out that the step wrote; started:
    time.monotonic() at its begin; more: further keys.
    """
    for path in [*outputs, *{path.parent for path in outputs}]:
        sync(path)  # a power cut must not leave a run.json beside files that are empty or gone
    described = describe_files(outputs)

    listed = {}
    for path in outputs:
        listed[str(path.relative_to(args.out))] = described[str(path)]

    run: Row = {"step": Path(sys.argv[0]).stem, "command": command_line(), "settings": vars(args)}
    run["seed"] = args.seed
    run["partial"] = args.limit is not None
    run["git_commit"] = git_commit()
    run["python"] = sys.version.split()[0]
    run["packages"] = package_versions()
    run["inputs"] = inputs
    run["outputs"] = listed
    run.update(more)
    run["finished"] = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    run["seconds"] = round(time.monotonic() - started, 1)
    text = json.dumps(run, indent=2, ensure_ascii=False, default=str)
    write_file(args.out / name, text + "\n")


def git_commit() -> str | None:
    """Return the commit of these scripts; None outside a git clone, and without git."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        return None
    return done.stdout.strip() or None


def package_versions() -> dict[str, str]:
    """Return {package: version} of those of PACKAGES that are installed."""
    versions = {}
    for package in PACKAGES:
        if util.find_spec(package.replace("-", "_")):
            versions[package] = metadata.version(package)
    return versions


def command_line() -> str:
    """Return the command that runs this process, as a user would type it."""
    return shlex.join(["python", Path(sys.argv[0]).name, *sys.argv[1:]])


def sibling(folder: Path, name: str = "") -> str:
    """Return the path of `name` beside a folder; without `name` that of the folder's parent.

    >>> sibling(Path("out/merged"), "eval"), sibling(Path("."), "eval")
    ('out/eval', '../eval')
    """
    return os.path.normpath(folder / ".." / name)


def next_command(out: Path) -> str:
    """Return the command that goes on from a finished step's folder, by what its run.json says.

    It reads the same local files as this step did, and names the base model where the next step
    cannot know it. "" where the folder is of no step.
    """
    run = read_object(out / "run.json")
    step = run.get("step")
    if step == "build_dataset":
        command = ["check_contamination.py", "--dataset", out / "dataset.jsonl"]
        command += ["--out", sibling(out, "contamination"), *local_flags(run)]
    elif step == "check_contamination":
        command = ["finetune.py", "--data", out / "clean.jsonl", "--out", sibling(out, "adapter")]
    elif step == "finetune":
        command = ["merge.py", "--adapter", out, "--out", sibling(out, "merged")]
    elif step == "merge":
        command = ["evaluate.py", "--model", run.get("base_model"), "--model", out]
        command += ["--out", sibling(out, "eval"), *contamination_flags(run)]
    elif step == "evaluate":
        command = ["tui.py", sibling(out)]
    else:
        return ""
    return shlex.join(["python", *map(str, command)])


def local_flags(run: Row) -> list[str]:
    """Return --local DIR as a finished step had it, or nothing."""
    settings = run.get("settings")
    if isinstance(settings, dict) and settings.get("local"):
        return ["--local", str(settings["local"])]
    return []


def contamination_flags(merge_run: Row) -> list[str]:
    """Return --contamination DIR of the first adapter's data, and --local as that check had it."""
    with suppress(LookupError, TypeError, AttributeError):  # a run.json may hold anything
        folder = merge_run["adapters"][0].get("contamination")
        if folder:
            checked = read_object(Path(folder) / "run.json")
            return ["--contamination", str(folder), *local_flags(checked)]
    return []


# --- models ---------------------------------------------------------------------------------------


def hub_fault(name: str, error: Exception) -> str:
    """Say why a folder, an address or a hub id cannot be loaded, and which mend fits."""
    fault = f"{name} cannot be loaded"
    if Path(name).exists() or name.startswith((".", "/", "~", "http")):
        return f"{fault}: {first_line(error)}"
    mend = "if it is gated, accept its licence on its page and set HF_TOKEN"
    return f"{fault} ({first_line(error)}); {mend}"


def fetch_model(flag: str, name: str) -> Path:
    """Return the folder of a model, fetched from the hub where `name` is no folder but an id."""
    folder = Path(name)
    if name and folder.is_dir():  # Path("") would be the current folder
        return folder
    is_id = re.fullmatch(r"\w[\w.-]*/[\w.-]+", name)
    if not is_id or folder.parent.exists():  # "out/mergd" is a misspelt folder, not a hub id
        raise UserError(f"{flag} {name or repr(name)}: no such folder, and no hub id (OWNER/NAME)")
    from huggingface_hub import snapshot_download

    try:  # the subfolders hold the same weights in other formats
        return Path(snapshot_download(name, allow_patterns=MODEL_FILES, ignore_patterns="*/*"))
    except Exception as error:  # the hub raises a dozen kinds; each means "not to be had"
        gate = f"if it is gated, accept its licence on https://huggingface.co/{name}, set HF_TOKEN"
        fault = f"no such folder, and not to be had from the hub ({first_line(error)}); {gate}"
        raise UserError(f"{flag} {name}: {fault}") from None


def use_device(name: str) -> str:
    """Return a device's name if torch can use it here; turns cuDNN's attention off.

    Raises UserError where it cannot.
    """
    import torch

    # cuDNN's attention plans anew for every shape, and nearly every text has a shape of its own
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        torch.zeros(1, device=name).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # no such name, GPU, build
        fault = (
            f"cannot be used here ({first_line(error):.100}): name another, or leave --device out"
        )
        raise UserError(f"--device {name} {fault}") from None
    return name


def alpaca_prompt(instruction: str, context: str = "") -> str:
    r"""Write the Alpaca prompt, byte for byte, up to where the answer starts.

    >>> alpaca_prompt("Add 1 and 2.")[-55:]
    'request.\n\n### Instruction:\nAdd 1 and 2.\n\n### Response:\n'
    """
    task = "Below is an instruction that describes a task"
    given = ""
    if context:
        task += ", paired with an input that provides further context"
        given = f"### Input:\n{context}\n\n"
    head = f"{task}. Write a response that appropriately completes the request.\n\n"
    return f"{head}### Instruction:\n{instruction}\n\n{given}### Response:\n"


def base_fingerprint(folder: Path) -> dict[str, str]:
    """Tell one base model from another: {"config": sha256, "tensors": sha256}.

    The first of config.json without CONFIG_NOISE; the second of every tensor's name, dtype,
    shape and its first, middle and last row. How the tensors are spread over shards changes
    nothing. Of a folder without *.safetensors "tensors" is the sha256 of "{}".
    """
    config = read_json(folder / "config.json")
    kept = {key: value for key, value in config.items() if key not in CONFIG_NOISE}
    described: Row = {}
    for path in sorted(folder.glob("*.safetensors")):
        described |= describe_tensors(path)

    digests = {}
    for name, value in (("config", kept), ("tensors", described)):
        text = json.dumps(value, sort_keys=True)
        digests[name] = hashlib.sha256(text.encode()).hexdigest()
    return digests


def describe_tensors(path: Path) -> dict[str, list[Any]]:
    """Return {tensor: [dtype, shape, sha256 of its first, middle and last row]} of a safetensors.

    The file starts with the length of its header (8 bytes), the header in JSON, then the numbers.
    It is read, not mapped: mapped pages would count as this process's memory.
    """
    described = {}
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header.pop("__metadata__", None)
        for name, tensor in header.items():
            shape = tensor["shape"]
            rows = shape[0] if shape else 1
            begin, end = tensor["data_offsets"]
            digest = hashlib.sha256()
            wanted = {0, rows // 2, rows - 1} if rows else set()
            for row in sorted(wanted):
                row_bytes = (end - begin) // rows
                file.seek(8 + size + begin + row * row_bytes)
                digest.update(file.read(row_bytes))
            described[name] = [tensor["dtype"], shape, digest.hexdigest()]
    return described


def tensor_names(path: Path) -> list[str]:
    """List the tensors of a safetensors file in the order of their bytes; refuse a broken one."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "np") as file:  # checks types, sizes, gaps, and the file's length
            return file.offset_keys()
    except SafetensorError as error:
        raise UserError(f"{path} is cut short or no safetensors file: {error}") from None


def read_adapter(folder: Path) -> tuple[Row, set[str]]:
    """Read an adapter folder of PEFT's: (its configuration, the names of its tensors).

    Raises UserError for a missing, broken or edited file, and for weights in a pickle.
    """
    mend = "write it with: python finetune.py, or name another --adapter"
    check_input(folder, mend)
    config = read_json(check_input(folder / "adapter_config.json", mend))
    weights = folder / "adapter_model.safetensors"
    pickle = folder / "adapter_model.bin"
    if pickle.exists() and not weights.exists():
        load = f"torch.load({str(pickle)!r}, weights_only=True)"
        save = f"safetensors.torch.save_file({load}, {str(weights)!r})"
        command = shlex.join(["python", "-c", f"import torch, safetensors.torch; {save}"])
        raise UserError(f"{pickle} is a pickle, which may run code; convert it: {command}")
    names = tensor_names(check_listed(check_input(weights, mend)))
    return config, set(names)


# --- verdicts -------------------------------------------------------------------------------------


def read_decisions(path: Path) -> dict[str, Row]:
    """Read the log: {pair_id: its last line}, without pairs whose last line withdraws the verdict.

    A line that is no decision, as a crash may leave, is skipped with a warning. {} without a log.
    """
    if not path.exists():
        return {}
    decisions = {}
    for place, line, _ in read_records(path):
        if is_decision(line):
            decisions[line["pair_id"]] = line
        else:
            where = one_line(path.parent / place)
            print(f"warning: {where} is no verdict: left out", file=sys.stderr)
    return {pair_id: line for pair_id, line in decisions.items() if line["verdict"]}


def is_decision(line: Any) -> bool:
    """Tell whether a record is a line of the log: a pair's verdict, or None to withdraw it."""
    if not isinstance(line, dict) or not isinstance(line.get("pair_id"), str):
        return False
    return "verdict" in line and line["verdict"] in (None, *VERDICTS)


def append_decision(
    path: Path, pair_id: str, verdict: str | None, reviewer: str, note: str = ""
) -> None:
    """Add one verdict to the log, None to withdraw; on the disk at return. Safe for two at once."""
    assert verdict in (None, *VERDICTS), verdict
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    line = {"pair_id": pair_id, "verdict": verdict, "reviewer": reviewer, "time": now, "note": note}
    with path.open("ab+") as log:
        fcntl.flock(log, fcntl.LOCK_EX)
        if log.seek(0, os.SEEK_END):  # it is not empty
            log.seek(-1, os.SEEK_END)
            if log.read(1) != b"\n":  # a crash cut the last line short: start a new one
                log.write(b"\n")
        log.write(to_jsonl([line]).encode())
        log.flush()
        os.fsync(log.fileno())


def removed_ids(
    pairs: list[Row], decisions: dict[str, Row], remove: Iterable[str] = REMOVED
) -> dict[str, list[Row]]:
    """Return the rows that go, and why: {train_id: [{"pair_id", "verdict"}]}.

    pairs: lines of pairs.jsonl; decisions: of read_decisions(), a pair without one is "undecided";
    remove: a row goes if one of its pairs has one of these verdicts.
    """
    gone = defaultdict(list)
    for pair in pairs:
        decision = decisions.get(pair["pair_id"], {"verdict": "undecided"})
        if decision["verdict"] in remove:
            reason = {"pair_id": pair["pair_id"], "verdict": decision["verdict"]}
            gone[pair["train_id"]].append(reason)
    return dict(gone)

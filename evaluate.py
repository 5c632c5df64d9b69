"""Score models on the leaderboard's four benchmarks and print the change over the base.

Step 5 of 5 (paper, section 4). Reads models (folders or hub ids) and benchmarks (--local
DIR/<benchmark>/ or the hub); writes out/eval/: <model>/<task>.json with every question's
log-likelihoods, results.json, results.md, run.json.

    python evaluate.py --model demo/base_model --tasks arc --local demo/data --limit 5 --out out/e
    python evaluate.py --model meta-llama/Llama-2-7b-hf --adapter out/adapter --tasks mmlu
    python evaluate.py
    torchrun --nproc-per-node 4 -- evaluate.py --contamination out/contamination --paper
    python evaluate.py --compare out/eval_base out/eval_tuned --out out/compare

Prompts, few-shot examples and metrics are lm-evaluation-harness's: ARC-Challenge 25-shot,
HellaSwag 10-shot, MMLU 5-shot (plain mean of subjects), TruthfulQA 0-shot. The forward pass is
prefix_lm.py's: sorted prompts form a trie, a tree in which what they share stands once, and its
tokens go through the model pack by pack; they are a quarter of the harness's. Without
--model it scores the base of out/merged and then out/merged. A run that was stopped goes on where
it stopped when the same command is given again. Time: on a CPU see README.md, on a GPU not
measured. Memory: the model, and one pack of new tokens beside one path of the trie.
It scores choices by likelihood; tasks that generate text run at the harness's own speed. Without
"--" torchrun takes our --local for the beginning of one of its own flags.
"""

import argparse
import csv
import hashlib
import json
import logging
import math
import os
import shutil
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from check_contamination import Subject, load_benchmark, local_inputs
from common import (
    NF4,
    UNFINISHED,
    Row,
    UserError,
    check_input,
    check_listed,
    check_output,
    claim_output,
    describe_files,
    fetch_model,
    finish_run,
    first_line,
    make_parser,
    markdown_table,
    next_command,
    one_line,
    positive,
    read_adapter,
    read_decisions,
    read_json,
    read_jsonl,
    read_object,
    refuse,
    run_main,
    tensor_names,
    use_device,
    write_file,
)

if TYPE_CHECKING:
    from lm_eval.api.task import ConfigurableTask

    from prefix_lm import PrefixLM, Request


@dataclass(frozen=True)
class Benchmark:
    """How the leaderboard of 2023 scores a benchmark."""

    shots: int  # examples before each question
    metric: str
    files: tuple[str, ...]  # the harness's own definitions, below lm_eval/tasks/


LEADERBOARD = {  # paper, section 4.1
    "arc": Benchmark(25, "acc_norm", ("arc/arc_challenge.yaml",)),
    "hellaswag": Benchmark(10, "acc_norm", ("hellaswag/hellaswag.yaml",)),
    "mmlu": Benchmark(5, "acc", ("mmlu/default/mmlu_{subject}.yaml",)),
    "truthfulqa": Benchmark(
        0, "mc2", ("truthfulqa/truthfulqa_mc1.yaml", "truthfulqa/truthfulqa_mc2.yaml")
    ),
}
AVERAGE = "average"  # the leaderboard's: the mean of those four, a task of results.json
FULL_QUESTIONS = {"arc": 1_172, "hellaswag": 10_042, "mmlu": 14_042, "truthfulqa": 817}
FULL_QUESTIONS[AVERAGE] = sum(FULL_QUESTIONS.values())  # 26,073; fewer are a partial result
FULL_SUBJECTS = {"mmlu": 57, AVERAGE: 60}  # with fewer it is partial; any other task has one
PAPER_CHANGE = Path(__file__).with_name("paper_change.csv")  # its Tables 5 and 7, in percent
PAPER_AVERAGE = {"Platypus2-70B-instruct": 73.13, "Stable-Platypus2-13B": 63.96}  # Tables 3, 4
TINY = 0.005  # percent: of a base that prints as 0.00 there is no change in percent
CHUNK_TOKENS = 65_536  # of a chunk at least: what a stopped run loses, what processes share out
CHUNK_SHARE = 200  # a chunk has this many times the tokens that the next one computes once more
SECONDS_BETWEEN_LINES = 10  # of progress where there is no terminal
RESAMPLES = 10_000  # of the paired bootstrap: the interval's ends repeat to about 1 % of its width
ALPHA = 0.05  # of a test that calls a model better or worse
SUFFIXES = (".safetensors", ".json", ".model", ".txt", ".jinja")  # of files that decide scores
DTYPES = ("auto", "float32", "bfloat16", "float16")
SAME = "not distinguishable"
NO_METRIC = ("test_id", "target", "log_likelihoods", "responses")  # of a question's line
ALL, UNFLAGGED, FLAGGED = "all questions", "unflagged questions", "flagged questions"


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the flags of this step; every impossible setting is named at once."""
    parser = make_parser(__doc__, "out/eval")
    parser.set_defaults(seed=1234)  # the harness's, for its few-shot examples
    switch = {"action": argparse.BooleanOptionalAction, "default": False}
    repeat = {"action": "append", "default": []}
    text = "go on with a stopped run, as without it; leave a finished --out, refuse a missing one"
    parser.add_argument("--resume", action="store_true", help=text)

    add = parser.add_argument_group("models").add_argument
    text = "folder or hub id; repeatable, the base first (default: out/merged's base and it)"
    add("--model", **repeat, help=text)
    add("--adapter", metavar="DIR", help="score each --model with this adapter, unmerged")
    add("--load-in-4bit", **switch, help="weights in 4-bit NF4, as QLoRA has them (default: no)")
    add("--dtype", choices=DTYPES, default="auto", help="of the weights (default: as stored)")

    add = parser.add_argument_group("tasks").add_argument
    text = "default: %(default)s; '' for none"
    add("--tasks", default=",".join(LEADERBOARD), metavar="a,b", help=text)
    add("--task", **repeat, metavar="X", help="a task of the harness: name or YAML (repeatable)")
    add("--local", type=Path, metavar="DIR", help="read DIR/<benchmark>/ (default: the hub)")
    add("--stock", **switch, help="the harness's own forward pass, for a check (default: no)")
    text = "questions in a forward pass of the harness's own (default: %(default)s)"
    add("--batch-size", type=positive, default=8, metavar="N", help=text)

    add = parser.add_argument_group("comparison").add_argument
    text = "finished folders of this script; their models come first"
    add("--compare", nargs="+", type=Path, default=[], metavar="DIR", help=text)
    text = "also score without the test questions that this folder of step 2 flags"
    add("--contamination", type=Path, metavar="DIR", help=text)
    text = "add the paper's averages and the columns of its Tables 5 and 7 (default: no)"
    add("--paper", **switch, help=text)

    args = parser.parse_args(argv)
    args.benchmarks = [name for name in args.tasks.split(",") if name]
    refuse(impossible_settings(args))
    if not args.model and not args.compare:
        args.model = base_and_merged()
    return args


def impossible_settings(args: argparse.Namespace) -> list[str]:
    """Say what is wrong with the flags, one text for each fault."""
    faults = []
    unknown = [name for name in args.benchmarks if name not in LEADERBOARD]
    if unknown:
        faults.append(f"--tasks: {', '.join(unknown)} is none of {', '.join(LEADERBOARD)}")
    for name in args.task:
        is_path = "/" in name or name.endswith((".yaml", ".yml"))  # else a name of the harness's
        if is_path and not Path(name).is_file():
            faults.append(f"--task: no such file: {name}")
    if args.local and not args.local.is_dir():
        faults.append(f"--local {args.local} is not a folder")
    if not args.benchmarks and not args.task:
        faults.append("no task: name one with --tasks or --task")
    if args.resume and not args.out.exists():
        faults.append(f"--resume: no {args.out}; leave the flag out")
    return faults


def base_and_merged() -> list[str]:
    """Return [base, out/merged]: what is scored when no model is named."""
    merged = check_input(Path("out/merged"), "merge one with python merge.py, or give --model")
    base = read_object(merged / "run.json").get("base_model")
    if not isinstance(base, str):
        raise UserError("out/merged has no run.json of merge.py's: give --model")
    return [base, str(merged)]


@dataclass(frozen=True)
class Process:
    """This process among those that torchrun started; without it the only one."""

    rank: int  # 0 is the first one's, which writes the results
    world_size: int
    device: str


def take_process(device: str | None) -> Process:
    """Take torchrun's RANK, WORLD_SIZE and LOCAL_RANK out of the environment; pick the device.

    Processes meet through the files of finished chunks. The harness must not know of them: it
    would share the questions out before it draws their few-shot examples, which changes scores.
    """
    import torch

    rank = int(os.environ.pop("RANK", "0"))
    world_size = int(os.environ.pop("WORLD_SIZE", "1"))
    local_rank = int(os.environ.pop("LOCAL_RANK", "0"))
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        device = f"cuda:{local_rank}"
    return Process(rank, world_size, use_device(device))


# --- tasks ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """A task of the harness."""

    name: str  # the harness's
    prefix: str  # of its questions' test ids: benchmark/subject
    harness: Any  # lm_eval's ConfigurableTask
    files: list[str] = field(default_factory=list)  # data of a --task's YAML

    @property
    def benchmark(self) -> str:
        """Return what tasks of one benchmark share: they are scored together."""
        return self.prefix.partition("/")[0]


def import_harness() -> None:
    """Import lm_eval, and stop what it prints and looks up for its own developers."""
    # metrics of the harness import the package `evaluate`, which this script's name hides; the
    # second call takes this folder off sys.path, so prefix_lm.py has to be imported before it
    from prefix_lm import keep_compiled_templates, unhide_evaluate

    keep_compiled_templates()  # each prompt template is compiled once, not for every text
    unhide_evaluate()
    import datasets
    import lm_eval.api.task
    import lm_eval.evaluator

    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # two lines of hints for every subject
    lm_eval.api.task.tqdm = lambda rows, **_: rows  # and a bar for each, which has no name
    lm_eval.evaluator.add_env_info = lambda _: None  # runs pip and more, a second each time
    lm_eval.evaluator.get_git_commit_hash = lambda: None  # of the folder that one stands in
    datasets.disable_progress_bars()


def load_tasks(args: argparse.Namespace) -> list[Task]:
    """Load everything that is to be scored: the benchmarks' tasks, then those of --task."""
    tasks = []
    for name in args.benchmarks:
        # official: HellaSwag in its authors' layout, which alone has the ctx_a and ctx_b of prompts
        for subject in load_benchmark(name, args.local, official=True):
            check_subject(subject)
            tasks += benchmark_tasks(subject)

    for flag in args.task:
        for task in find_tasks(flag):
            taken = {other.name for other in tasks} | {other.benchmark for other in tasks}
            if task.name == AVERAGE:
                raise UserError(f"--task {flag}: {AVERAGE} is the mean of the four: rename it")
            if task.name in taken:
                raise UserError(f"--task {flag}: there are two tasks {task.name}")
            tasks.append(task)
    return tasks


def benchmark_tasks(subject: Subject) -> list[Task]:
    """Build the tasks of a benchmark's subject; TruthfulQA has two of the same questions."""
    import lm_eval

    root = Path(lm_eval.__file__).parent / "tasks"
    benchmark = LEADERBOARD[subject.benchmark]
    tasks = []
    for file in benchmark.files:
        path = root / file.format(subject=subject.subject)
        if not path.is_file():
            raise UserError(f"MMLU has no subject {subject.subject}: rename its files")
        harness = task_on_rows(path, benchmark.shots, subject)
        tasks.append(Task(path.stem, f"{subject.benchmark}/{subject.subject}", harness))
    return tasks


def task_on_rows(path: Path, shots: int, subject: Subject) -> "ConfigurableTask":
    """Build a task as the harness defines it, on our rows in place of the hub's."""
    from datasets import Dataset
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks._yaml_loader import load_yaml

    config = load_yaml(path)
    scored = config.get("test_split") or config["validation_split"]
    splits = {scored: Dataset.from_list(subject.scored)}
    if subject.shots:
        shown = config.get("fewshot_split") or config.get("training_split")
        splits[shown] = Dataset.from_list(subject.shots)

    config["custom_dataset"] = lambda **_: splits  # called in place of the hub's load_dataset()
    # the harness takes each split with a name to be in the data set: name none that we do not have
    for key in ("training_split", "validation_split", "test_split"):
        if config.get(key) not in splits:
            config[key] = None
    config["num_fewshot"] = shots
    return ConfigurableTask(config=config)


def find_tasks(flag: str) -> list[Task]:
    """Build what --task names: the task of a YAML file, or the harness's task, group or tag."""
    from lm_eval.tasks import TaskManager

    try:
        if Path(flag).is_file():
            return [task_of_file(Path(flag))]
        found = TaskManager().load([flag])  # its index takes about 10 s to build
    except Exception as error:  # a task file can be wrong in as many ways as code
        fault = f"{type(error).__name__}: {first_line(error)}"
        raise UserError(f"--task {flag}: {fault}") from None
    return [Task(name, f"{name}/all", harness) for name, harness in found["tasks"].items()]


def task_of_file(path: Path) -> Task:
    """Build the task of a YAML file, to which the data files that it names are relative."""
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks._yaml_loader import load_yaml

    config = load_yaml(path)
    for key in ("group", "task_list"):  # no fields of a task: the harness drops them, too
        config.pop(key, None)
    files = (config.get("dataset_kwargs") or {}).get("data_files")
    local_files = []
    if isinstance(files, dict):  # other forms are left to datasets, from the current folder
        for split, file in files.items():
            if (path.parent / file).is_file():
                files[split] = str((path.parent / file).resolve())
                local_files.append(files[split])

    harness = ConfigurableTask(config=config)
    name = harness.config.task
    return Task(name=name, prefix=f"{name}/all", harness=harness, files=local_files)


def check_subject(subject: Subject) -> None:
    """Refuse a benchmark without rows, with too few examples, or with a row that cannot be used."""
    name = f"{subject.benchmark}/{subject.subject}"
    needed = LEADERBOARD[subject.benchmark].shots
    if not subject.scored:
        raise UserError(f"{name} has no questions to score")
    if len(subject.shots) < needed:
        raise UserError(f"{name}: {len(subject.shots)} few-shot rows, {needed} needed")

    for kind, rows in (("few-shot", subject.shots), ("scored", subject.scored)):
        for number, row in enumerate(rows):
            try:
                fault = row_fault(subject.benchmark, row)
            except (LookupError, TypeError, ValueError, AttributeError) as error:
                fault = f"{type(error).__name__}: {first_line(error)}"
            if fault:
                raise UserError(f"{name}: {kind} row {number} (from 0): {fault}")


def row_fault(benchmark: str, row: Row) -> str:
    """Say what the harness would stumble over in a row in the hub's columns; "" if nothing.

    >>> row_fault("mmlu", {"question": "2+2?", "choices": ["3", "4"], "answer": 2})
    'the right answer is none of the choices'
    """
    if benchmark == "hellaswag":
        texts = [row["ctx_a"], row["ctx_b"], row["activity_label"]]
        choices = row["endings"]
        right = int(row["label"])
    elif benchmark == "arc":
        texts = [row["question"]]
        choices = row["choices"]["text"]
        right = row["choices"]["label"].index(row["answerKey"])
    elif benchmark == "mmlu":
        texts = [row["question"]]
        choices = row["choices"]
        right = int(row["answer"])
    else:
        one_right = row["mc1_targets"]
        several_right = row["mc2_targets"]
        if one_right["labels"][:1] != [1] or sum(one_right["labels"]) != 1:
            return "mc1_targets needs the right answer first, and no second one"
        if not {0, 1} <= set(several_right["labels"]):
            return "mc2_targets needs a true and a false answer"
        texts = [row["question"]]
        choices = one_right["choices"] + several_right["choices"]
        right = 0

    if not all(isinstance(text, str) for text in [*texts, *choices]) or not texts[0].strip():
        return "a text is missing or empty"
    if not 0 <= right < len(choices):
        return "the right answer is none of the choices"
    return ""


# --- models ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Model:
    """A model to score."""

    name: str  # folder or hub id, as --model has it
    files: dict[str, str]  # {path: sha256} of it and its adapter; of a hub model {id: commit}


def check_models(args: argparse.Namespace) -> list[Model]:
    """Refuse what cannot be loaded, before anything is scored; hash the rest."""
    check_names(args.model)
    adapter = {}
    if args.adapter:
        read_adapter(Path(args.adapter))
        adapter = hash_files(Path(args.adapter))
    return [Model(name, {**check_model(name), **adapter}) for name in args.model]


def check_names(names: list[str]) -> None:
    """Refuse a model that is there twice, and two with one results folder."""
    places = set()
    folders = {""}  # what is left of a name such as ".."
    for name in names:
        place = str(Path(name).resolve()) if Path(name).exists() else name
        if place in places:
            raise UserError(f"--model {name} is there twice")
        if folder_name(name) in folders:
            fault = "has no name of its own for a results folder; give it another path"
            raise UserError(f"--model {name} {fault}")
        places.add(place)
        folders.add(folder_name(name))


def folder_name(model: str) -> str:
    """Name a model's folder below --out.

    >>> folder_name("../demo/base_model"), folder_name("meta-llama/Llama-2-7b-hf")
    ('demo__base_model', 'meta-llama__Llama-2-7b-hf')
    """
    return "__".join(part for part in Path(model).parts if part not in ("..", ".", "/"))


def check_model(name: str) -> dict[str, str]:
    """Return {path: sha256} of a model's files; refuse a folder that cannot be loaded."""
    from transformers import AutoConfig, AutoTokenizer

    folder = Path(name)
    if not folder.exists():
        commit = fetch_model("--model", name).name  # a snapshot's folder has its commit's name
        return {name: commit}
    check_input(folder, "name another folder")
    weights = sorted(folder.glob("*.safetensors"))
    if not weights or not (folder / "config.json").is_file():
        raise UserError(f"--model {name} is no model: it has no config.json with .safetensors")
    files = hash_files(folder)
    for path in weights:
        tensor_names(path)  # raises where it is damaged

    try:
        AutoConfig.from_pretrained(name, trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # as many kinds as there are readers
        fault = f"config.json or the tokenizer is not readable: {first_line(error)}"
        raise UserError(f"--model {name}: {fault}") from None
    # where files are missing, some classes make an empty tokenizer of their own
    possible = ["tokenizer.json", *tokenizer.vocab_files_names.values()]
    if not any((folder / file).is_file() for file in possible):
        raise UserError(f"--model {name} has no tokenizer files: copy its base's there")
    return files


def hash_files(folder: Path) -> dict[str, str]:
    """Return {path: sha256} of a folder's files that decide scores, a second for a gigabyte.

    Raises UserError where a file is not the one that the folder's run.json lists.
    """
    listed = read_object(folder / "run.json").get("outputs")
    if not isinstance(listed, dict):
        listed = {}
    paths = []
    for path in sorted(folder.iterdir()):
        if path.suffix in SUFFIXES and path.name != "run.json":
            paths.append(path)

    hashes = {}
    for path, described in describe_files(paths).items():
        recorded = listed.get(Path(path).name)
        if isinstance(recorded, dict) and recorded.get("sha256") != described["sha256"]:
            raise UserError(f"{path} changed after its folder's run.json: make the folder again")
        hashes[path] = described["sha256"]
    return hashes


def load_lm(model: Model, args: argparse.Namespace, process: Process) -> "PrefixLM":
    """Load a model that scores by shared prefixes, or as the harness does where --stock asks."""
    import torch
    from transformers import BitsAndBytesConfig

    from prefix_lm import PrefixLM

    nf4 = None
    if args.load_in_4bit:
        nf4 = BitsAndBytesConfig(**NF4, bnb_4bit_compute_dtype=torch.bfloat16)
    try:
        lm = PrefixLM(
            pretrained=model.name,
            peft=args.adapter,
            dtype=args.dtype,
            quantization_config=nf4,
            stock=args.stock,
            batch_size=args.batch_size,
            device=process.device,
            quiet=process.rank > 0,
            trust_remote_code=False,
        )
    except Exception as error:  # configurations and weights go wrong in as many ways as code
        shown = f"--model {model.name}"
        if args.adapter:
            shown = f"{shown} with --adapter {args.adapter}"
        fault = f"{type(error).__name__}: {first_line(error)}"
        raise UserError(f"{shown} cannot be loaded: {fault}") from None

    fingerprint = fingerprint_model(model.files, args, process.device)
    lm.store = ChunkStore(chunk_folder(args.out), fingerprint, process)
    return lm


def fingerprint_model(files: dict[str, str], args: argparse.Namespace, device: str) -> str:
    """Hash all that decides a model's numbers: files, settings, packages, the kind of device."""
    settings = {
        "peft": args.adapter,
        "dtype": args.dtype,
        "load_in_4bit": args.load_in_4bit,
        "stock": args.stock,
        "batch_size": args.batch_size,  # padding and rounding of the harness's own forward pass
    }
    packages = [metadata.version(name) for name in ("torch", "transformers", "lm_eval")]
    kind = device.partition(":")[0]
    text = json.dumps([settings, packages, kind, sorted(files.items())])
    return hashlib.sha256(text.encode()).hexdigest()


# --- chunks ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Chunk:
    """Sorted requests that are scored together."""

    requests: list["Request"]
    tokens: int  # nodes of their trie


def plan_chunks(requests: list["Request"]) -> list[Chunk]:
    """Cut sorted requests into chunks of CHUNK_TOKENS new tokens or more.

    Chunks are scored on their own, so each computes once more the prefix that it shares with the
    one before. A cut waits until that prefix is at most 1 / CHUNK_SHARE of the chunk it ends.
    """
    from prefix_lm import count_new_tokens

    chunks = []
    waiting: list[Request] = []
    tokens = 0
    for request, new in zip(requests, count_new_tokens(requests), strict=True):
        size = len(request.input_ids)
        shared = size - new
        enough = tokens >= max(CHUNK_TOKENS, CHUNK_SHARE * shared)
        if enough and new:  # the input of the request before adds no token: no reason to cut
            chunks.append(Chunk(waiting, tokens))
            waiting = []
            tokens = 0
            new = size
        waiting.append(request)
        tokens += new
    if waiting:
        chunks.append(Chunk(waiting, tokens))
    return chunks


class Progress:
    """Tokens done, their rate and the time left: a bar on a terminal, else a line every 10 s."""

    def __init__(self, label: str, tokens: int, questions: int, quiet: bool) -> None:
        from tqdm import tqdm

        self.label = label
        self.tokens = tokens
        self.questions = questions
        self.done = 0
        self.began = time.monotonic()
        self.printed = self.began
        no_bar = quiet or not tokens or not sys.stderr.isatty()
        self.bar = tqdm(total=tokens, desc=label, unit=" tokens", unit_scale=True, disable=no_bar)
        self.in_lines = no_bar and not quiet

    def advance(self, tokens: int) -> None:
        """Count new tokens, and show it."""
        self.done += tokens
        now = time.monotonic()
        rate = self.done / max(now - self.began, 1e-9)
        questions = f"{self.questions * rate / self.tokens:,.1f} questions/s"
        self.bar.set_postfix_str(questions, refresh=False)
        self.bar.update(tokens)
        if self.in_lines and now - self.printed > SECONDS_BETWEEN_LINES:
            self.printed = now
            speed = f"{self.done / self.tokens:.0%}, {rate:,.0f} tokens/s, {questions}"
            left = (self.tokens - self.done) / rate
            print(f"{self.label}: {speed}, ETA {left:,.0f} s", file=sys.stderr)

    def close(self) -> None:
        """End the bar's line."""
        self.bar.close()


def chunk_folder(out: Path) -> Path:
    """Name where an unfinished run keeps its finished chunks: beside --out; removed at the end."""
    whole = out.resolve()
    return whole.with_name(f".{whole.name}.chunks")


@dataclass
class ChunkStore:
    """Scores requests chunk by chunk and keeps each chunk's scores in a file.

    A file is named by all that decides its numbers: weights, settings, token ids. So any later run
    can go on from it, and none of another model will. Each of n processes scores every n-th chunk;
    the first one waits for the others' files. The others get zeros, of which nothing is made.
    """

    folder: Path
    fingerprint: str  # of fingerprint_model()
    process: Process
    label: str = ""  # heads the progress

    def score(self, lm: "PrefixLM", requests: list["Request"]) -> list[tuple[float, bool]]:
        """Score sorted requests: (log-likelihood, whether greedy decoding gives the answer)."""
        chunks = plan_chunks(requests)
        own = chunks[self.process.rank :: self.process.world_size]
        todo = [chunk for chunk in own if self.read(chunk) is None]
        asked = [request for chunk in todo for request in chunk.requests]
        progress = Progress(
            label=self.label,
            tokens=sum(chunk.tokens for chunk in todo),
            questions=len({(request.task, request.question) for request in asked}),
            quiet=self.process.rank > 0,
        )
        for chunk in todo:
            scores = lm.score_part(chunk.requests, progress.advance)
            check_scores(lm.pretrained, chunk, scores)
            self.folder.mkdir(parents=True, exist_ok=True)
            write_file(self.file_of(chunk), json.dumps(scores) + "\n")
        progress.close()

        if self.process.rank > 0:
            return [(0.0, False)] * len(requests)  # the harness wants a score of each request
        found = []
        for chunk in chunks:
            while (scores := self.read(chunk)) is None:
                time.sleep(0.1)  # another process is at it; torchrun ends us if it dies
            found += scores
        return found

    def file_of(self, chunk: Chunk) -> Path:
        """Name the file of a chunk."""
        from prefix_lm import sort_key

        digest = hashlib.sha256(self.fingerprint.encode())
        for request in chunk.requests:
            id_bytes, answer_bytes = sort_key(request)
            digest.update(b"%d %d " % (len(id_bytes), len(answer_bytes)))
            digest.update(id_bytes + answer_bytes)
        return self.folder / f"{digest.hexdigest()}.json"

    def read(self, chunk: Chunk) -> list[tuple[float, bool]] | None:
        """Read the scores of a finished chunk; None where its file is missing or damaged."""
        try:
            lines = json.loads(self.file_of(chunk).read_bytes())
            scores = [(float(value), bool(greedy)) for value, greedy in lines]
        except (FileNotFoundError, ValueError, TypeError):
            return None
        if len(scores) != len(chunk.requests):
            return None
        return scores


def check_scores(model: str, chunk: Chunk, scores: list[tuple[float, bool]]) -> None:
    """Refuse a model whose log-likelihood is no number."""
    for request, (value, _) in zip(chunk.requests, scores, strict=True):
        if not math.isfinite(value):
            place = f"{model}: {request.task}, question {request.question}"
            fault = f"a log-likelihood of {value}: its weights or --dtype are at fault"
            raise UserError(f"{place}: {fault}")


# --- scores ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ModelInfo:
    """A model in results.json."""

    folder: str  # below --out
    adapter: str | None
    load_in_4bit: bool
    dtype: str
    sha256: str  # of fingerprint_model()
    max_length: int  # tokens
    files: dict[str, str]  # of Model
    path: str  # of the forward pass: "prefix" or "stock"


@dataclass(frozen=True)
class TaskResult:
    """A model's answers to a task: the file <model>/<task>.json."""

    model: str
    sha256: str  # the model's
    task: str
    prefix: str  # of Task
    limit: int | None
    benchmark_seconds: float  # of all tasks of its benchmark
    prompts_sha256: str  # of what the model was asked
    truncated: int  # questions whose context was cut from the left
    harness: dict[str, float]  # scores of the whole task, as the harness computes them
    questions: list[Row]  # {"test_id", "target", "log_likelihoods" or "responses", metrics}


@dataclass(frozen=True)
class ModelRun:
    """A model and all its answers."""

    name: str  # as --model has it, and its adapter's
    info: ModelInfo
    results: list[TaskResult]

    def prompts(self) -> dict[str, str]:
        """Return {task: sha256 of its prompts}: what the model was asked."""
        return {result.task: result.prompts_sha256 for result in self.results}


def score_models(
    models: list[Model], tasks: list[Task], args: argparse.Namespace, process: Process
) -> list[ModelRun]:
    """Load and score one model after the other."""
    runs = []
    for model in models:
        lm = load_lm(model, args, process)
        info = ModelInfo(
            folder=folder_name(model.name),
            adapter=args.adapter,
            load_in_4bit=args.load_in_4bit,
            dtype=str(lm.model.get_input_embeddings().weight.dtype).removeprefix("torch."),
            sha256=lm.store.fingerprint,
            max_length=lm.max_length,
            files=model.files,
            path="stock" if lm.why_stock else "prefix",  # why_stock: a reason, or ""
        )
        name = f"{model.name} + {args.adapter}" if args.adapter else model.name
        runs.append(ModelRun(name, info, score_tasks(lm, tasks, args)))
        del lm  # else it would stay in memory while the next one is loaded
    return runs


def score_tasks(lm: "PrefixLM", tasks: list[Task], args: argparse.Namespace) -> list[TaskResult]:
    """Score a model on all tasks; write a benchmark's files when it is whole.

    Of several processes the first one writes and speaks, the others are quiet.
    """
    groups = defaultdict(list)
    for task in tasks:
        groups[task.benchmark].append(task)

    folder = args.out / folder_name(lm.pretrained)
    results = []
    for benchmark, group in groups.items():
        if not lm.quiet:
            print(f"scoring {one_line(lm.pretrained)} on {benchmark}", file=sys.stderr, flush=True)
        lm.store.label = f"{short_names([lm.pretrained])[lm.pretrained]} on {benchmark}"
        found = score_benchmark(lm, group, args)
        results += found
        if not lm.quiet:
            folder.mkdir(exist_ok=True)
            for result in found:
                text = json.dumps(asdict(result), indent=1)
                write_file(folder / f"{result.task}.json", text + "\n")
    return results


def score_benchmark(
    lm: "PrefixLM", tasks: list[Task], args: argparse.Namespace
) -> list[TaskResult]:
    """Score a model on the tasks of one benchmark."""
    began = time.monotonic()
    lm.truncated = set()  # it fills it when it scores answers; generating text leaves it alone
    found = run_harness(lm, tasks, args)
    seconds = time.monotonic() - began

    results = []
    for task in tasks:
        samples = sorted(found["samples"][task.name], key=lambda sample: sample["doc_id"])
        prompts = "".join(sample["prompt_hash"] for sample in samples)
        digest = hashlib.sha256(prompts.encode())
        truncated = [name for name, _ in lm.truncated if name == task.name]
        questions = to_questions(task.prefix, samples)
        scores = finite_scores(found["results"][task.name])
        if not metrics_of(questions[0]):  # of the corpus as a whole, such as a perplexity
            print(f"{task.name} has no score per question: {scores}", file=sys.stderr)
        result = TaskResult(
            model=lm.pretrained,
            sha256=lm.store.fingerprint,
            task=task.name,
            prefix=task.prefix,
            limit=args.limit,
            benchmark_seconds=round(seconds, 2),
            prompts_sha256=digest.hexdigest(),
            truncated=len(truncated),
            harness=scores,
            questions=questions,
        )
        results.append(result)
    return results


def run_harness(lm: "PrefixLM", tasks: list[Task], args: argparse.Namespace) -> Row:
    """Run tasks in one call of the harness, which draws each one's examples as if it were alone."""
    import numpy as np
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    from prefix_lm import ScoringError

    lm.get_model_info = dict  # returns {}; its own would ask the hub about a local folder, too
    try:
        with np.errstate(invalid="ignore"):  # of mc2's 0 / 0, which true_share() mends
            return simple_evaluate(
                model=lm,
                tasks=[task.harness for task in tasks],
                task_manager=TaskManager(include_defaults=False),
                limit=args.limit,
                bootstrap_iters=0,
                fewshot_random_seed=args.seed,
            )
    except ScoringError as error:
        raise UserError(str(error)) from None


def finite_scores(found: Row) -> dict[str, float]:
    """Pick the numbers out of what the harness says of a task, where there are names as well."""
    scores = {}
    for metric, value in found.items():
        if isinstance(value, float) and math.isfinite(value):  # mc2 is numpy's kind of float
            scores[metric] = float(value)
    return scores


def to_questions(prefix: str, samples: list[Row]) -> list[Row]:
    """Turn a task's samples, of which the harness has one a question and filter, into questions.

    A question is known by its row in the file that step 2 reads. HellaSwag's official layout has
    other rows than that file: load_benchmark() puts "test_row" there, -1 where the file has none.
    """
    questions: dict[int, Row] = {}
    taken_rows = {-1}
    for sample in samples:
        number = sample["doc_id"]
        if number not in questions:
            row = sample["doc"].get("test_row", number)
            if row in taken_rows:
                row = f"{number} of the layout"  # the official one; step 2 flags no such test id
            taken_rows.add(row)
            questions[number] = {"test_id": f"{prefix}/{row}"}
        line = questions[number]
        line["target"] = sample["target"]

        answers = sample["filtered_resps"]
        if all(isinstance(answer, tuple) for answer in answers):
            line["log_likelihoods"] = [float(value) for value, _ in answers]
        else:
            line["responses"] = answers

        suffix = "" if sample["filter"] == "none" else f",{sample['filter']}"
        for metric in sample["metrics"]:
            value = sample[metric]
            if not isinstance(value, int | float):  # of the corpus as a whole
                continue
            if prefix == "truthfulqa/all" and math.isnan(value):
                labels = sample["doc"]["mc2_targets"]["labels"]
                value = true_share(line["log_likelihoods"], labels)
            if not math.isfinite(value):
                raise UserError(f"{prefix}, question {number}: its {metric} is no number")
            line[metric + suffix] = float(value)
    return list(questions.values())


def true_share(log_likelihoods: list[float], labels: list[int]) -> float:
    """Compute mc2, the true answers' share of the probability, where the harness's exp() is 0.

    >>> true_share([-1000.0, -1000.0, -1001.0], [1, 0, 0])
    0.4223187982515182
    """
    largest = max(log_likelihoods)
    shares = [math.exp(value - largest) for value in log_likelihoods]
    true = [share for share, label in zip(shares, labels, strict=True) if label == 1]
    return sum(true) / sum(shares)


def metrics_of(line: Row) -> list[str]:
    """List the metrics of a question's line."""
    return [key for key in line if key not in NO_METRIC]


# --- other folders --------------------------------------------------------------------------------


def read_flagged(folder: Path | None) -> set[str] | None:
    """Read the test ids that step 2 flags and no person called not-a-leak; None without step 2."""
    if folder is None:
        return None
    mend = "write it with: python check_contamination.py"
    pairs = read_jsonl(check_input(folder / "pairs.jsonl", mend), {"pair_id": str, "test_id": str})
    decisions = read_decisions(folder / "decisions.jsonl")
    innocent = {key for key, line in decisions.items() if line["verdict"] == "not-a-leak"}
    return {pair["test_id"] for pair in pairs if pair["pair_id"] not in innocent}


def warn_unchecked(folder: Path | None, flagged: set[str] | None, tasks: list[Task]) -> None:
    """Say which scored benchmarks step 2 did not look at: nothing of theirs can be flagged."""
    if folder is None:
        return
    counts = read_object(folder / "run.json").get("counts", {})
    questions = counts.get("test_questions", {})  # {benchmark/subject: how many}
    seen = {name.partition("/")[0] for name in [*questions, *flagged]}
    missing = {task.benchmark for task in tasks} - seen
    if missing:
        unchecked = ", ".join(sorted(missing))
        checked = ", ".join(sorted(seen))
        fault = one_line(f"{folder} did not check {unchecked} (only {checked})")
        print(f"warning: {fault}: none of its questions counts as flagged", file=sys.stderr)


def read_earlier_runs(folders: list[Path]) -> list[ModelRun]:
    """Read the runs of finished folders of this script, for --compare."""
    runs = []
    for folder in folders:
        file = check_input(folder / "results.json", f"{folder} is no folder of evaluate.py's")
        check_listed(file)
        try:
            for model, info in read_json(file)["models"].items():
                runs.append(read_earlier_run(folder, model, ModelInfo(**info)))
        except (LookupError, TypeError, AttributeError) as error:
            raise UserError(f"{file} or what it names is not evaluate.py's: {error!r}") from None
    check_same_questions(runs)
    return runs


def read_earlier_run(folder: Path, model: str, info: ModelInfo) -> ModelRun:
    """Read a model's answers, but not those of another model that had its folder before."""
    results = []
    for path in sorted((folder / info.folder).glob("*.json")):
        result = TaskResult(**read_json(path))
        if result.sha256 == info.sha256:
            results.append(result)
    if not results:
        raise UserError(f"{folder} has no scores of {model}: name the folder that scored it")
    return ModelRun(model, info, results)


def check_same_questions(runs: list[ModelRun]) -> None:
    """Refuse to compare models that were not asked the same."""
    for run in runs:
        differing = set(run.prompts().items()) ^ set(runs[0].prompts().items())
        if differing:
            task, _ = min(differing)
            fault = f"{runs[0].name} and {run.name} were not asked the same in {task}"
            why = "another --limit, --seed, set of tasks, few-shot rows or version"
            raise UserError(f"{fault} ({why}): score both with one command")


def name_runs(runs: list[ModelRun]) -> dict[str, ModelRun]:
    """Give each run a name of its own: a second model of one name has a number behind it.

    A run that is there twice, such as a base that two folders have scored, is named once.
    """
    named: dict[str, ModelRun] = {}
    for run in runs:
        name = run.name
        number = 1
        while name in named and not same_run(named[name], run):
            number += 1
            name = f"{run.name} #{number}"
        named.setdefault(name, run)
    return named


def same_run(a: ModelRun, b: ModelRun) -> bool:
    """Tell whether two runs are of one model that was asked the same."""
    return a.info == b.info and a.prompts() == b.prompts()


# --- comparison -----------------------------------------------------------------------------------


Values = dict[str, float]  # {test id: value of a metric}
Scores = dict[str, dict[str, Values]]  # {task of results.json: {metric: its values}}


def collect_scores(results: list[TaskResult]) -> Scores:
    """Collect a model's values by the tasks of results.json, the average first.

    The average's one metric holds the headline values of its four benchmarks.
    """
    scores: Scores = {}
    for result in results:
        benchmark, _, subject = result.prefix.partition("/")
        tasks = [benchmark]
        if subject != "all":
            tasks.append(result.prefix)  # mmlu/<subject>
        for metric in metrics_of(result.questions[0]):
            values = {line["test_id"]: line[metric] for line in result.questions if metric in line}
            label = metric
            if benchmark == "truthfulqa":
                label = result.task[-3:]  # mc1, mc2: the harness calls both acc
            for task in tasks:
                scores.setdefault(task, {}).setdefault(label, {}).update(values)

    average: Values = {}
    for name, benchmark in LEADERBOARD.items():
        metrics = scores.get(name, {})
        if benchmark.metric not in metrics:
            return scores
        average.update(metrics[benchmark.metric])
    return {AVERAGE: {"mean": average}, **scores}


def headline(task: str, metrics: dict[str, Values]) -> str:
    """Name the metric that the leaderboard takes, elsewhere a task's own first one."""
    benchmark = LEADERBOARD.get(task.partition("/")[0])
    if benchmark and benchmark.metric in metrics:
        return benchmark.metric
    return next(iter(metrics))


def by_subject(values: Values) -> dict[str, dict[str, list[float]]]:
    """Group values by what their test ids begin with: {benchmark: {subject: values}}.

    >>> by_subject({"mmlu/law/0": 1.0, "mmlu/law/1": 0.5, "arc/all/0": 0.0})
    {'mmlu': {'law': [1.0, 0.5]}, 'arc': {'all': [0.0]}}
    """
    groups: dict[str, dict[str, list[float]]] = {}
    for test_id, value in values.items():
        benchmark, subject, _ = test_id.split("/", 2)
        groups.setdefault(benchmark, {}).setdefault(subject, []).append(value)
    return groups


def prefixes_of(values: Values) -> set[str]:
    """Return the benchmark/subject of each test id."""
    return {test_id.rpartition("/")[0] for test_id in values}


def task_score(task: str, values: Values) -> float | None:
    """Compute the mean of a task's benchmarks, each the mean of its subjects, in percent.

    None where there is no question, or none of one of the average's four benchmarks.

    >>> task_score("mmlu", {"mmlu/law/0": 1.0, "mmlu/law/1": 0.5, "mmlu/anatomy/0": 0.0})
    37.5
    """
    benchmarks = by_subject(values).values()
    needed = len(LEADERBOARD) if task == AVERAGE else 1
    if len(benchmarks) < needed:
        return None
    means = []
    for subjects in benchmarks:
        scores = [statistics.fmean(group) for group in subjects.values()]
        means.append(100 * statistics.fmean(scores))
    return statistics.fmean(means)


def select(values: Values, test_ids: set[str]) -> Values:
    """Return the values of the questions with these test ids."""
    return {test_id: value for test_id, value in values.items() if test_id in test_ids}


def summarise(scores: Scores, test_ids: set[str]) -> dict[str, Row]:
    """Score the questions with these test ids: {task: {"questions", "tasks", metric: percent}}.

    A task without a score is left out. "tasks" counts MMLU's subjects; its "acc" is their plain
    mean, as on the leaderboard of 2023, "acc_weighted" the mean of questions.
    """
    summaries = {}
    for task, metrics in scores.items():
        chosen = {metric: select(values, test_ids) for metric, values in metrics.items()}
        values = chosen[headline(task, metrics)]
        if task_score(task, values) is None:
            continue
        summary = {"questions": len(values), "tasks": len(prefixes_of(values))}
        for metric in metrics:
            summary[metric] = task_score(task, chosen[metric])
        if task == "mmlu":
            summary["acc_weighted"] = 100 * statistics.fmean(values.values())
        summaries[task] = summary
    return summaries


@dataclass(frozen=True)
class TaskInfo:
    """A task in results.json."""

    metric: str  # that of its headline score
    questions: int
    truncated: dict[str, int]  # {model: questions whose context was cut from the left}
    flagged: int | None  # questions that step 2 flags; None without --contamination
    partial: bool  # with --limit, or less than the leaderboard has


def describe_tasks(
    runs: dict[str, ModelRun], scores: Scores, flagged: set[str] | None
) -> dict[str, TaskInfo]:
    """Describe each task that the models were asked; `scores` are the first model's."""
    base = next(iter(runs.values()))
    limited = any(result.limit for result in base.results)
    tasks = {}
    for task, metrics in scores.items():
        metric = headline(task, metrics)
        test_ids = set(metrics[metric])
        prefixes = prefixes_of(metrics[metric])
        truncated = {}
        for model, run in runs.items():
            # once for a prefix: TruthfulQA's two tasks ask the same
            cut = {result.prefix: result.truncated for result in run.results}
            truncated[model] = sum(cut[prefix] for prefix in prefixes)

        partial = limited or len(prefixes) < FULL_SUBJECTS.get(task, 1)
        # a file may hold a part of its benchmark, as HellaSwag's in the official layout does
        if len(test_ids) < FULL_QUESTIONS.get(task, 0):
            partial = True
        tasks[task] = TaskInfo(
            metric=metric,
            questions=len(test_ids),
            truncated=truncated,
            flagged=None if flagged is None else len(test_ids & flagged),
            partial=partial,
        )
    return tasks


@dataclass
class Change:
    """A model's headline score of a task beside the base's, in results.json."""

    model: str
    base: str
    task: str
    metric: str
    questions: int
    base_score: float
    score: float
    points: float  # score - base_score
    percent: float | None  # 100 * points / base_score; None of a base that is TINY
    interval: list[float]  # of points, by bootstrap()
    verdict: str = SAME  # or "better" or "worse"
    points_unflagged: float | None = None  # of questions that step 2 does not flag, if any
    points_flagged: float | None = None
    gained: int | None = None  # questions whose value rose; None of the average
    lost: int | None = None
    p: float | None = None  # exact McNemar; None where a value is neither 0 nor 1, as mc2's
    flips: list[Row] = field(default_factory=list)  # {"test_id", "base", "model"}; [] without p


def compare(scores: dict[str, Scores], model: str, task: str, flagged: set[str] | None) -> Change:
    """Compare a model with the first one, question by question.

    The average is a mean of means, so that no question of it is won or lost as a whole: the
    interval alone decides its verdict.
    """
    base = next(iter(scores))
    metric = headline(task, scores[base][task])
    before = scores[base][task][metric]
    after = scores[model][task][metric]
    gains = {test_id: after[test_id] - value for test_id, value in before.items()}
    base_score = task_score(task, before)
    score = task_score(task, after)
    points = score - base_score
    percent = None
    if base_score >= TINY:
        percent = 100 * points / base_score
    row = Change(
        model=model,
        base=base,
        task=task,
        metric=metric,
        questions=len(gains),
        base_score=base_score,
        score=score,
        points=points,
        percent=percent,
        interval=bootstrap(gains),
    )
    if task != AVERAGE:
        count_flips(row, before, after)
    row.verdict = judge(points, row.interval, row.p)
    if flagged is not None:
        row.points_unflagged = task_score(task, select(gains, set(gains) - flagged))
        row.points_flagged = task_score(task, select(gains, flagged))
    return row


def bootstrap(gains: Values) -> list[float]:
    """Return [low, high] in percent: the paired bootstrap's 95 % interval of the mean gain.

    Questions are drawn within each subject of each benchmark. A resample is drawn as how often
    each distinct value occurs: the same distribution for a fraction of the work.
    """
    import numpy as np

    rng = np.random.default_rng(0)
    benchmarks = by_subject(gains).values()
    total = np.zeros(RESAMPLES)
    for subjects in benchmarks:
        means = np.zeros(RESAMPLES)
        for group in subjects.values():
            values, counts = np.unique(100 * np.array(group), return_counts=True)
            # in parts: the draws of all at once could fill the memory
            for part in np.array_split(means, 20):
                drawn = rng.multinomial(len(group), counts / len(group), size=len(part))
                part += drawn @ values / len(group)  # into `means`: a part is a view of it
        total += means / len(subjects)
    ends = np.quantile(total / len(benchmarks), [0.025, 0.975])
    return ends.tolist()


def count_flips(row: Change, before: Values, after: Values) -> None:
    """Fill in which questions were gained and lost, and the test of that."""
    row.gained = 0
    row.lost = 0
    flips = []
    for test_id, value in before.items():
        new = after[test_id]
        if new == value:
            continue
        if new > value:
            row.gained += 1
        else:
            row.lost += 1
        flips.append({"test_id": test_id, "base": int(value), "model": int(new)})
    if {*before.values(), *after.values()} <= {0, 1}:
        row.p = mcnemar(row.gained, row.lost)
        row.flips = flips


def mcnemar(gained: int, lost: int) -> float:
    """Compute the exact two-sided McNemar test: p of so uneven a split of the flipped questions.

    >>> mcnemar(1, 9)
    0.021484375
    """
    flipped = gained + lost
    tail = sum(math.comb(flipped, k) for k in range(min(gained, lost) + 1))
    return min(1.0, 2 * tail / 2**flipped)


def judge(points: float, interval: list[float], p: float | None) -> str:
    """Call a change better or worse only where interval and test agree on it."""
    low, high = interval
    if low <= 0 <= high or abs(points) < TINY:
        return SAME
    if p is not None and p >= ALPHA:
        return SAME
    return "better" if points > 0 else "worse"


@dataclass(frozen=True)
class Evaluation:
    """What results.json holds; the base is the first model, the average the first task."""

    models: dict[str, ModelInfo]  # by name_runs()
    tasks: dict[str, TaskInfo]  # "arc", "mmlu", "mmlu/<subject>", the name of a --task, ...
    parts: dict[str, dict[str, dict[str, Row]]]  # {ALL, ...: {model: what summarise() returns}}
    comparisons: list[Change]

    def to_json(self) -> str:
        """Write one object: "models", "tasks", each of the parts, "comparisons"."""
        found = asdict(self)
        ordered = {"models": found["models"], "tasks": found["tasks"], **found["parts"]}
        ordered["comparisons"] = found["comparisons"]
        return json.dumps(ordered, indent=1) + "\n"


def compare_runs(found: list[ModelRun], flagged: set[str] | None) -> Evaluation:
    """Score all models, also without and on the flagged questions; compare each with the first."""
    check_same_questions(found)
    runs = name_runs(found)
    base, *others = runs
    scores = {model: collect_scores(run.results) for model, run in runs.items()}
    tasks = describe_tasks(runs, scores[base], flagged)

    asked = {line["test_id"] for result in runs[base].results for line in result.questions}
    test_ids = {ALL: asked}
    if flagged is not None:
        test_ids[UNFLAGGED] = asked - flagged
        test_ids[FLAGGED] = asked & flagged
    parts = {}
    for part, chosen in test_ids.items():
        parts[part] = {model: summarise(scores[model], chosen) for model in runs}

    comparisons = []
    for model in others:
        for task in tasks:
            comparisons.append(compare(scores=scores, model=model, task=task, flagged=flagged))
    models = {model: run.info for model, run in runs.items()}
    return Evaluation(models=models, tasks=tasks, parts=parts, comparisons=comparisons)


# --- tables ---------------------------------------------------------------------------------------


def draw_tables(results: Evaluation, paper: bool) -> str:
    """Draw results.md: the average, scores, the change in percent, paired tests."""
    compared = len(results.models) > 1
    blocks = []
    if AVERAGE in results.tasks:
        blocks += average_table(results, paper)
    for part in results.parts:
        blocks += score_table(results, part)
    if compared or paper:
        blocks += change_tables(results, paper)
    if compared:
        blocks += paired_table(results)

    cut = []
    for task, info in results.tasks.items():
        count = max(info.truncated.values())
        if count and task != AVERAGE:
            cut.append(f"{task} {count:,}")
    if cut:
        blocks.append(f"Questions whose context was cut from the left to fit: {', '.join(cut)}")
    return "\n\n".join(blocks)


def short_names(models: Iterable[str]) -> dict[str, str]:
    """Return what tables call each model: its path's end, or all of it where two ends are alike.

    >>> short_names(["demo/base_model", "demo/base_model + out/adapter"])
    {'demo/base_model': 'base_model', 'demo/base_model + out/adapter': 'base_model + adapter'}
    """
    names = {}
    for model in models:
        paths = model.split(" + ")  # with its adapter's, where it has one
        ends = [os.path.basename(os.path.abspath(path)) for path in paths]  # "." has none itself
        names[model] = one_line(" + ".join(ends))
    if len(set(names.values())) < len(names):
        return {model: one_line(model) for model in names}
    return names


def signed(value: float | None) -> str:
    """Write a change with its sign, "+1.25", and None as "-"."""
    return "-" if value is None else f"{value:+.2f}"


def interval_text(row: Change) -> str:
    """Write the interval of a comparison: "-0.31 to +1.70"."""
    low, high = row.interval
    return f"{low:+.2f} to {high:+.2f}"


def average_table(results: Evaluation, paper: bool) -> list[str]:
    """Return [title, table] of the average, the paper's headline: a line for each model."""
    names = short_names(results.models)
    base = next(iter(results.models))
    score = results.parts[ALL][base][AVERAGE]["mean"]
    no_change = ["-", "-", "-", "-"]
    rows = [[names[base], f"{score:.2f}", *no_change]]
    for row in results.comparisons:
        if row.task == AVERAGE:
            change = [signed(row.points), signed(row.percent), interval_text(row), row.verdict]
            rows.append([names[row.model], f"{row.score:.2f}", *change])
    if paper:
        for model, score in PAPER_AVERAGE.items():
            rows.append([f"{model} (paper)", f"{score:.2f}", *no_change])

    title = "Average"
    info = results.tasks[AVERAGE]
    if info.partial:
        title += f" (partial: {info.questions:,} questions of {FULL_QUESTIONS[AVERAGE]:,})"
    title += f" in percent, the mean of {', '.join(LEADERBOARD)}; change over {names[base]}:"
    columns = ["model", "average", "points", "percent", "95 % interval", "verdict"]
    return [title, markdown_table(columns, rows)]


def score_table(results: Evaluation, part: str) -> list[str]:
    """Return [title, table] of all scores, the headline first; MMLU's subjects are left out."""
    models = results.parts[part].values()
    rows = []
    for task, info in results.tasks.items():
        summaries = [summary[task] for summary in models if task in summary]
        if "/" in task or not summaries:
            continue
        wholes = [summary[task] for summary in results.parts[ALL].values()]
        name = f"{task} (partial)" if info.partial else task
        metrics = [key for key in summaries[0] if key not in ("questions", "tasks")]
        for metric in sorted(metrics, key=lambda metric: metric != info.metric):
            cells = []
            for summary, whole in zip(summaries, wholes, strict=True):
                cell = f"{summary[metric]:.2f}"
                if part != ALL:
                    cell += f" ({summary[metric] - whole[metric]:+.2f})"
                cells.append(cell)
            rows.append([name, metric, summaries[0]["questions"], *cells])

    title = f"Scores in percent, {part}"
    if part != ALL:
        title += " (in brackets: the difference from all questions)"
    columns = ["task", "metric", "questions", *short_names(results.models).values()]
    return [f"{title}:", markdown_table(columns, rows)]


def change_tables(results: Evaluation, paper: bool) -> list[str]:
    """Return titles and tables of the change in percent, in the form of Tables 5 and 7."""
    base, *columns = short_names(results.models).values()
    published: dict[str, list[str]] = {}  # {task: the paper's changes}
    if paper:
        with PAPER_CHANGE.open(newline="", encoding="utf-8") as file:
            head, *lines = csv.reader(file)
        columns += head[1:]
        published = {task: changes for task, *changes in lines}

    benchmarks = []
    subjects = []
    for task in dict.fromkeys([*results.tasks, *published]):
        changes = change_cells(results, task) + published.get(task, [])
        changes += ["-"] * (len(columns) - len(changes))  # the paper has no such task
        if "/" in task:
            subjects.append([task.removeprefix("mmlu/"), *changes])
        else:
            benchmarks.append([task, *changes])

    blocks = []
    for number, rows in ((5, benchmarks), (7, subjects)):
        if rows:
            title = f"Change over {base} in percent, the paper's Table {number}"
            blocks.append(f"{title}; (=) is {SAME}, - is no score or a base of 0:")
            blocks.append(markdown_table(["task", *columns], rows))
    return blocks


def change_cells(results: Evaluation, task: str) -> list[str]:
    """Return the change of each model but the base in a task that may not have been scored."""
    if task not in results.tasks:
        return ["-"] * (len(results.models) - 1)
    cells = []
    for row in results.comparisons:
        if row.task == task:
            cell = signed(row.percent)
            if row.percent is not None and row.verdict == SAME:
                cell += " (=)"
            cells.append(cell)
    return cells


def paired_table(results: Evaluation) -> list[str]:
    """Return [title, table] of the paired tests; those of MMLU's subjects are in results.json."""
    names = short_names(results.models)
    rows = []
    for row in results.comparisons:
        if "/" in row.task:
            continue
        cells = [row.task, names[row.model], signed(row.points), interval_text(row)]
        for count in (row.gained, row.lost):
            cells.append("-" if count is None else count)
        cells.append("-" if row.p is None else f"{row.p:.2g}")
        cells += [signed(row.points_unflagged), signed(row.points_flagged), row.verdict]
        rows.append(cells)

    base = next(iter(names.values()))
    title = f"Against {base} on the same questions; 1 such test of 20 differs by chance"
    columns = ["task", "model", "points", "95 % interval", "gained", "lost", "p"]
    columns += ["points, unflagged", "points, flagged", "verdict"]
    return [f"{title}; flipped questions are in results.json:", markdown_table(columns, rows)]


# --- files ----------------------------------------------------------------------------------------


def input_folders(args: argparse.Namespace) -> list[Path]:
    """Return the folders that a run reads, none of which may be --out."""
    named = [*args.model, *args.compare, args.adapter, args.contamination]
    return [Path(name) for name in named if name]


def is_whole_run(args: argparse.Namespace) -> bool:
    """Tell whether --out has its results already; else the first process refuses a wrong one."""
    # torchrun's others write nothing, and a late one may find what the first has finished
    first = os.environ.get("RANK", "0") == "0"
    whole = (args.out / "run.json").exists() and not (args.out / UNFINISHED).exists()
    if whole and not args.overwrite and (args.resume or not first):
        if first:
            print(f"{args.out} is finished: nothing to resume")
        return True
    if first:
        check_output(args.out, args.overwrite, *input_folders(args))
    return False


def describe_inputs(args: argparse.Namespace) -> dict[str, Row]:
    """Hash the files of benchmarks, tasks and other folders for run.json, before they are read."""
    paths = [Path(name) for name in args.task]
    paths += [folder / "results.json" for folder in args.compare]
    if args.contamination:
        paths += [args.contamination / "pairs.jsonl", args.contamination / "decisions.jsonl"]
    files = [path for path in paths if path.is_file()]
    return describe_files([*local_inputs(args), *files])


def describe_more_inputs(models: list[Model], tasks: list[Task]) -> dict[str, Row]:
    """Return for run.json the tasks' data files, and the models' own, which are hashed already."""
    files = {file for task in tasks for file in task.files}
    described = describe_files(Path(file) for file in sorted(files))
    for model in models:
        for path, sha256 in model.files.items():
            if Path(path).is_file():  # not a hub model's id
                described[path] = {"sha256": sha256}
    return described


def write_results(args: argparse.Namespace, results: Evaluation) -> str:
    """Write results.json and results.md; return the tables."""
    text = draw_tables(results, args.paper)
    write_file(args.out / "results.json", results.to_json())
    write_file(args.out / "results.md", text + "\n")
    return text


def output_files(out: Path, models: list[Model], tasks: list[Task]) -> list[Path]:
    """List the files that a run has written."""
    files = [out / "results.json", out / "results.md"]
    for model in models:
        files += [out / folder_name(model.name) / f"{task.name}.json" for task in tasks]
    return files


def main(argv: list[str] | None = None) -> None:
    """Models x tasks -> scores -> change over the first model."""
    started = time.monotonic()
    args = parse_args(argv)
    if is_whole_run(args):
        return
    inputs = describe_inputs(args)
    flagged = read_flagged(args.contamination)
    runs = read_earlier_runs(args.compare)
    process = take_process(args.device)
    import_harness()
    models = check_models(args)
    tasks = load_tasks(args) if models else []
    inputs.update(describe_more_inputs(models, tasks))

    if process.rank > 0:  # the first process reads these scores from their files
        score_models(models=models, tasks=tasks, args=args, process=process)
        return
    warn_unchecked(args.contamination, flagged, tasks)
    with claim_output(args.out, args.overwrite):
        runs += score_models(models=models, tasks=tasks, args=args, process=process)
        results = compare_runs(runs, flagged)
        text = write_results(args, results)
        outputs = output_files(args.out, models, tasks)
        infos = asdict(results)["models"]
        finish_run(args, inputs=inputs, outputs=outputs, started=started, models=infos)
    shutil.rmtree(chunk_folder(args.out), ignore_errors=True)
    print(f"{text}\n\nwrote {args.out}. Next: {next_command(args.out)}")


if __name__ == "__main__":
    run_main(main)

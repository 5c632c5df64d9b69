"""Score models on the leaderboard's four benchmarks and print the change over the base.

Step 5 of 5 (paper, section 4). Reads models (folders or hub ids) and benchmarks (--local
DIR/<benchmark>/ or the hub); writes out/eval/: <model>/<task>.json with every question's
log-likelihoods, results.json, results.md, change.svg, run.json.

    python evaluate.py --model demo/base_model --tasks arc --local demo/data --limit 5 --out out/e
    python evaluate.py --model meta-llama/Llama-2-7b-hf --adapter out/adapter --tasks mmlu
    python evaluate.py
    torchrun --nproc-per-node 4 -- evaluate.py --contamination out/contamination --paper
    python evaluate.py --compare out/eval_base out/eval_tuned --out out/compare

Prompts, few-shot examples and metrics are lm-evaluation-harness's: ARC-Challenge 25-shot,
HellaSwag 10-shot, MMLU 5-shot (plain mean of subjects), TruthfulQA 0-shot. The forward pass is
prefix_lm.py's: what prompts share is computed once, a quarter of the harness's tokens. Without
--model it scores the base of out/merged and then out/merged. A run that was stopped goes on where
it stopped when the same command is given again. Time: on a CPU see README.md, on a GPU not
measured. Memory: the model, and one pack of new tokens beside one path of the trie.
It scores choices by likelihood; tasks that generate text run at the harness's own speed.
"""

import argparse
import csv
import hashlib
import itertools
import json
import logging
import math
import os
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from check_contamination import (
    HUB,
    Subject,
    load_benchmark,
    local_inputs,
)
from common import (
    NF4,
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
    positive,
    read_decisions,
    read_jsonl,
    read_object,
    refuse,
    run_main,
    use_device,
    write_file,
)

if TYPE_CHECKING:
    import numpy as np
    from lm_eval.api.task import ConfigurableTask

    from prefix_lm import PrefixLM, Request

SHOTS = {"arc": 25, "hellaswag": 10, "mmlu": 5, "truthfulqa": 0}  # paper, section 4.1
HEADLINE = {"arc": "acc_norm", "hellaswag": "acc_norm", "mmlu": "acc", "truthfulqa": "mc2"}
HARNESS_FILES = {  # the harness's own definition of each task, below lm_eval/tasks/
    "arc": {"arc_challenge": "arc/arc_challenge.yaml"},
    "hellaswag": {"hellaswag": "hellaswag/hellaswag.yaml"},
    "truthfulqa": {
        "truthfulqa_mc1": "truthfulqa/truthfulqa_mc1.yaml",
        "truthfulqa_mc2": "truthfulqa/truthfulqa_mc2.yaml",
    },
}
PAPER = Path(__file__).with_name("paper_change.csv")  # the paper's Tables 5 and 7, in percent
AVERAGE = "average"  # the leaderboard's: the mean of HEADLINE's four, a task of results.json
AVERAGE_QUESTIONS = 26_073  # 1,172 + 10,042 + 14,042 + 817; fewer are a partial result
PAPER_AVERAGE = {"Platypus2-70B-instruct": 73.13, "Stable-Platypus2-13B": 63.96}  # Tables 3, 4
TINY = 0.005  # percent: of a base that prints as 0.00 there is no change in percent
MMLU_SUBJECTS = 57  # the full benchmark; fewer are a partial result
CHUNK_TOKENS = 65_536  # trie nodes between two points to go on from, and the unit of a process
CHUNK_SHARE = 200  # a chunk is at least this many times the prefix that the next one repeats
SECONDS_BETWEEN_LINES = 10  # of progress where there is no terminal
RESAMPLES = 10_000  # of the paired bootstrap: the interval's ends repeat to about 1 % of its width
ALPHA = 0.05  # of a test that calls a model better or worse
SUFFIXES = {".safetensors", ".json", ".model", ".txt", ".jinja"}  # of files that decide scores
DTYPES = ("auto", "float32", "bfloat16", "float16")
SAME = "not distinguishable"
NO_METRIC = {"test_id", "target", "log_likelihoods", "responses"}  # keys of a question's line


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags of this step; every impossible setting is named at once."""
    parser = make_parser(__doc__, "out/eval")
    parser.set_defaults(seed=1234)  # the harness's, for its few-shot examples
    switch = {"action": argparse.BooleanOptionalAction, "default": False}
    repeat = {"action": "append", "default": []}
    going_on = "go on with a stopped run (the same command without it does so too)"
    parser.add_argument("--resume", action="store_true", help=going_on)
    add = parser.add_argument_group("models").add_argument
    models = "folder or hub id; repeatable, the base first (default: out/merged's base and it)"
    add("--model", **repeat, help=models)
    add("--adapter", metavar="DIR", help="score each --model with this adapter, unmerged")
    add("--load-in-4bit", **switch, help="weights in 4-bit NF4, as QLoRA has them (default: no)")
    add("--dtype", choices=DTYPES, default="auto", help="of the weights (default: as stored)")
    add = parser.add_argument_group("tasks").add_argument
    add("--tasks", default=",".join(HUB), metavar="a,b", help="default: %(default)s; '' for none")
    add("--task", **repeat, metavar="X", help="a task of the harness: name or YAML (repeatable)")
    add("--local", type=Path, metavar="DIR", help="read DIR/<benchmark>/ (default: the hub)")
    add("--stock", **switch, help="the harness's own forward pass, for a check (default: no)")
    add("--batch-size", type=positive, default=8, metavar="N", help="of --stock (default: 8)")
    add = parser.add_argument_group("comparison").add_argument
    earlier = "finished folders of this script; their models come first"
    add("--compare", nargs="+", type=Path, default=[], metavar="DIR", help=earlier)
    flagged = "also score without the test questions that this folder of step 2 flags"
    add("--contamination", type=Path, metavar="DIR", help=flagged)
    theirs = "add the paper's averages and the columns of its Tables 5 and 7 (default: no)"
    add("--paper", **switch, help=theirs)
    args = parser.parse_args(argv)
    args.benchmarks = [name for name in args.tasks.split(",") if name]
    unknown = [name for name in args.benchmarks if name not in HUB]
    missing = [t for t in args.task if not Path(t).is_file() and ("/" in t or ".y" in t)]
    refuse(
        [
            message
            for message, found in (
                {
                    f"--tasks: {', '.join(unknown)} is none of {', '.join(HUB)}": unknown,
                    f"--task: no such file: {', '.join(missing)}": missing,
                    f"--local {args.local} is not a folder": args.local and not args.local.is_dir(),
                    "no task: name one with --tasks or --task": not args.benchmarks
                    and not args.task,
                    f"--resume: no {args.out}; leave the flag out": args.resume
                    and not args.out.exists(),
                }
            ).items()
            if found
        ]
    )
    args.model = args.model or ([] if args.compare else merged_and_base())
    return args


def merged_and_base() -> list[str]:
    """[base, out/merged]: what is scored when no model is named."""
    merged = check_input(Path("out/merged"), "merge one with python merge.py, or give --model")
    base = read_object(merged / "run.json").get("base_model")
    if not isinstance(base, str):
        raise UserError("out/merged has no run.json of merge.py's: give --model")
    return [base, str(merged)]


def nothing_to_resume(args: argparse.Namespace) -> bool:
    """Whether --resume finds the folder finished."""
    return args.resume and (args.out / "run.json").exists() and not args.overwrite


def take_rank() -> dict[str, int]:
    """torchrun's RANK, WORLD_SIZE and LOCAL_RANK (0, 1, 0 without it), out of the environment.

    Processes meet through the files of finished chunks. The harness must not know of them: it
    would share the questions out before it draws their few-shot examples, which changes scores.
    """
    defaults = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    return {key.lower(): int(os.environ.pop(key, default)) for key, default in defaults.items()}


# --- tasks ----------------------------------------------------------------------------------------


def import_harness() -> None:
    """Import lm_eval, which needs the package `evaluate` that this script's name hides."""
    import prefix_lm  # while its folder is on the path

    prefix_lm.leave_own_folder()
    prefix_lm.keep_compiled_templates()
    found = sys.modules.get("evaluate")
    if found and Path(found.__file__ or "").resolve() == Path(__file__).resolve():
        del sys.modules["evaluate"]
    import datasets
    import lm_eval.api.task
    import lm_eval.evaluator

    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # two lines of hints for every subject
    lm_eval.api.task.tqdm = lambda rows, **_: rows  # and a bar for each, which has no name
    lm_eval.evaluator.add_env_info = lambda _: None  # runs pip and more, a second each time
    datasets.disable_progress_bars()


def harness_task(path: Path, shots: int, subject: Subject | None) -> "ConfigurableTask":
    """A task as the harness defines it, on our rows in place of the hub's where given."""
    from datasets import Dataset
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks._yaml_loader import load_yaml

    config = load_yaml(path)
    for key in ("tag", "group", "task_list"):
        config.pop(key, None)
    if subject:
        scored = config.get("test_split") or config["validation_split"]
        shown = config.get("fewshot_split") or config.get("training_split")
        splits = {scored: Dataset.from_list(subject.scored)}
        if subject.shots:
            splits[shown] = Dataset.from_list(subject.shots)
        # the harness asks for a split's name only after it has looked for it in the data set
        config["custom_dataset"] = lambda **_: splits
        for key in ("training_split", "validation_split", "test_split"):
            if config.get(key) not in splits:
                config[key] = None
        config["num_fewshot"] = shots
    else:
        files = (config.get("dataset_kwargs") or {}).get("data_files", {})
        for split, file in files.items():
            if (path.parent / file).is_file():  # relative to the YAML, wherever one starts from
                files[split] = str((path.parent / file).resolve())
    return ConfigurableTask(config=config)


def row_fault(benchmark: str, row: Row) -> str:
    """What the harness would stumble over in a row in the hub's columns; "" if nothing.

    >>> row_fault("mmlu", {"question": "2+2?", "choices": ["3", "4"], "answer": 2})
    'the right answer is none of the choices'
    """
    if benchmark == "truthfulqa":
        one, several = row["mc1_targets"], row["mc2_targets"]
        if one["labels"][:1] != [1] or sum(one["labels"]) != 1:
            return "mc1_targets needs the right answer first, and no second one"
        if {0, 1} - {*several["labels"]}:
            return "mc2_targets needs a true and a false answer"
        texts, choices, right = [row["question"]], one["choices"] + several["choices"], 0
    elif benchmark == "hellaswag":
        texts = [row["ctx_a"], row["ctx_b"], row["activity_label"]]
        choices, right = row["endings"], int(row["label"])
    elif benchmark == "arc":
        texts, choices = [row["question"]], row["choices"]["text"]
        right = row["choices"]["label"].index(row["answerKey"])
    else:
        texts, choices, right = [row["question"]], row["choices"], int(row["answer"])
    if not all(isinstance(text, str) for text in [*texts, *choices]) or not texts[0].strip():
        return "a text is missing or empty"
    return "" if 0 <= right < len(choices) else "the right answer is none of the choices"


def check_subject(subject: Subject) -> None:
    """Refuse a benchmark without rows, with too few examples, or with a row that cannot be used."""
    name, needed = f"{subject.benchmark}/{subject.subject}", SHOTS[subject.benchmark]
    if not subject.scored:
        raise UserError(f"{name} has no questions to score")
    if len(subject.shots) < needed:
        raise UserError(f"{name}: {len(subject.shots)} few-shot rows, {needed} needed")
    for kind, rows in {"few-shot": subject.shots, "scored": subject.scored}.items():
        for number, row in enumerate(rows):
            try:
                fault = row_fault(subject.benchmark, row)
            except (LookupError, TypeError, ValueError, AttributeError) as error:
                fault = f"{type(error).__name__}: {first_line(error)}"
            if fault:
                raise UserError(f"{name}: {kind} row {number} (from 0): {fault}")


def benchmark_tasks(args: argparse.Namespace) -> dict[str, tuple[str, "ConfigurableTask"]]:
    """{task: (prefix of its questions' test ids, task)} for everything that is to be scored."""
    import lm_eval.tasks

    root = Path(lm_eval.__file__).parent / "tasks"
    tasks = {}
    for name in args.benchmarks:
        for subject in load_benchmark(name, args.local, official=True):
            files = HARNESS_FILES.get(name)
            if name == "mmlu":
                key = f"mmlu_{subject.subject}"
                files = {key: f"mmlu/default/{key}.yaml"}
                if not (root / files[key]).is_file():
                    raise UserError(f"MMLU has no subject {subject.subject}: rename its files")
            check_subject(subject)
            for task, file in files.items():
                built = harness_task(root / file, SHOTS[name], subject)
                tasks[task] = (f"{name}/{subject.subject}", built)
    for name in args.task:
        try:
            if Path(name).is_file():
                found = [harness_task(Path(name), 0, None)]
            else:  # a task, group or tag; the harness's index takes about 10 s to build
                found = list(lm_eval.tasks.TaskManager().load([name])["tasks"].values())
        except Exception as error:  # a task file can be wrong in as many ways as code
            raise UserError(f"--task {name}: {type(error).__name__}: {first_line(error)}") from None
        for task in found:
            if task.config.task == AVERAGE:
                raise UserError(f"--task {name}: results call the four's mean {AVERAGE}: rename it")
            if tasks.setdefault(task.config.task, (f"{task.config.task}/all", task))[1] != task:
                raise UserError(f"--task {name}: there are two tasks {task.config.task}")
    return tasks


# --- models ---------------------------------------------------------------------------------------


def folder_name(model: str) -> str:
    """A model's folder below --out.

    >>> folder_name("../demo/base_model"), folder_name("meta-llama/Llama-2-7b-hf")
    ('demo__base_model', 'meta-llama__Llama-2-7b-hf')
    """
    return "__".join(part for part in Path(model).parts if part not in ("..", ".", "/"))


def check_models(args: argparse.Namespace) -> dict[str, dict[str, str]]:
    """{model: {file: sha256}, of a hub model {id: commit}}; refuse what cannot be loaded."""
    places = {str(Path(m).resolve()) if Path(m).exists() else m for m in args.model}
    names = {folder_name(model) for model in args.model}
    alike = " and ".join(args.model)
    refuse(
        [
            message
            for message, found in (
                {
                    f"--model {alike}: one of them is there twice": len(places) < len(args.model),
                    f"--model {alike}: two would share a results folder; give one another path": (
                        len(names) < len(args.model) == len(places) or "" in names
                    ),
                }
            ).items()
            if found
        ]
    )
    adapter = check_folder("--adapter", args.adapter) if args.adapter else {}
    return {model: check_folder("--model", model) | adapter for model in args.model}


def check_folder(flag: str, name: str) -> dict[str, str]:
    """{file: sha256} of a model's or an adapter's folder that can be read; of the hub {id: commit}.

    Every file is hashed, about a second a gigabyte: results are kept apart by what was scored, and
    a folder must still hold what its run.json lists.
    """
    from safetensors import SafetensorError, safe_open
    from transformers import AutoConfig, AutoTokenizer

    folder, adapter = Path(name), flag == "--adapter"
    wanted = "adapter_config.json" if adapter else "config.json"
    if not folder.exists() and not adapter:
        return {name: fetch_model(flag, name).name}  # a snapshot's folder is named by its commit
    check_input(folder, "name the folder that finetune.py wrote")
    weights = sorted(folder.glob("*.safetensors"))
    if not (folder / wanted).is_file() or not weights:
        raise UserError(f"{flag} {name} is no {flag[2:]}: it has no {wanted} with .safetensors")
    read = [path for path in sorted(folder.iterdir()) if path.suffix in SUFFIXES]
    files = describe_files([path for path in read if path.name != "run.json"])
    listed = read_object(folder / "run.json").get("outputs", {})
    for path, about in files.items():
        if listed.get(Path(path).name, about)["sha256"] != about["sha256"]:
            raise UserError(f"{path} changed after its folder's run.json: make the folder again")
    for path in weights:
        try:
            with safe_open(path, framework="numpy"):
                pass
        except SafetensorError as error:
            raise UserError(f"{path} is damaged or was cut short: {first_line(error)}") from None
    if not adapter:
        try:
            AutoConfig.from_pretrained(name)
            known = AutoTokenizer.from_pretrained(name).vocab_files_names.values()
        except Exception as error:  # as many kinds as there are readers
            what = f"{name}: config.json or the tokenizer is not readable"
            raise UserError(f"{flag} {what}: {first_line(error)}") from None
        # where files are missing, some classes make an empty tokenizer of their own
        if not any((folder / file).is_file() for file in [*known, "tokenizer.json"]):
            raise UserError(f"{flag} {name} has no tokenizer files: copy its base's there")
    return {path: about["sha256"] for path, about in files.items()}


def pick_device(args: argparse.Namespace) -> str:
    """--device, or the best there is; the process's own GPU under torchrun."""
    import torch

    name = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    name = f"cuda:{args.local_rank}" if name == "cuda" else name
    return use_device(name)


def load_model(model: str, files: dict[str, str], args: argparse.Namespace) -> "PrefixLM":
    """Load a model that scores by shared prefixes, or as the harness does where --stock asks."""
    import torch
    from transformers import BitsAndBytesConfig

    from prefix_lm import PrefixLM

    settings = {"peft": args.adapter, "dtype": args.dtype, "load_in_4bit": args.load_in_4bit}
    settings |= {"stock": args.stock, "batch_size": args.batch_size if args.stock else 8}
    packages = [metadata.version(name) for name in ("torch", "transformers", "lm_eval")]
    device = pick_device(args)
    identity = json.dumps([settings, packages, device.split(":")[0], sorted(files.items())])
    nf4 = None
    if settings.pop("load_in_4bit"):
        nf4 = BitsAndBytesConfig(**NF4, bnb_4bit_compute_dtype=torch.bfloat16)
    try:
        lm = PrefixLM(
            pretrained=model,
            device=device,
            quantization_config=nf4,
            quiet=args.rank > 0,
            **settings,
        )
    except Exception as error:  # configurations and weights go wrong in as many ways as code
        shown = f"--model {model}"
        if args.adapter:
            shown = f"{shown} with --adapter {args.adapter}"
        fault = f"{type(error).__name__}: {first_line(error)}"
        raise UserError(f"{shown} cannot be loaded: {fault}") from None

    lm.store = ChunkStore(
        folder=chunk_folder(args.out),
        fingerprint=hashlib.sha256(identity.encode()).hexdigest(),
        rank=args.rank,
        world_size=args.world_size,
    )
    return lm


# --- chunks ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Chunk:
    """Sorted requests that are scored together: those from start to before stop."""

    start: int
    stop: int
    tokens: int  # nodes of their trie


def plan_chunks(requests: list["Request"]) -> list[Chunk]:
    """Cut sorted requests into chunks of CHUNK_TOKENS new tokens or more.

    Chunks are scored on their own, so each repeats the prefix that it shares with the one before:
    at most 1 / CHUNK_SHARE of its own tokens, since a cut waits for that.
    """
    from prefix_lm import count_new_tokens

    chunks = []
    start = 0
    tokens = 0
    for number, new in enumerate(count_new_tokens(requests)):
        size = len(requests[number].input_ids)
        shared = size - new
        enough = tokens >= max(CHUNK_TOKENS, CHUNK_SHARE * shared, 1)
        if enough and new:  # equal requests stay together
            chunks.append(Chunk(start, number, tokens))
            start = number
            tokens = 0
            new = size
        tokens += new
    if requests:
        chunks.append(Chunk(start, len(requests), tokens))
    return chunks


class Progress:
    """Tokens done, their rate and the time left: a bar on a terminal, else a line every 10 s."""

    def __init__(self, label: str, tokens: int, questions: float, quiet: bool) -> None:
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
    """Where the finished chunks of an unfinished run are: beside --out, until run.json is there."""
    return out.resolve().with_name(f".{out.resolve().name}.chunks")


@dataclass
class ChunkStore:
    """Scores requests chunk by chunk and keeps each chunk's scores in a file.

    A file is named by all that decides its numbers: weights, settings, token ids. So any later run
    can go on from it, and none of another model will. Process `rank` of `world_size` scores every
    world_size-th chunk; the first one waits for the others' files, and they get zeros.
    """

    folder: Path
    fingerprint: str  # sha256 of the model's files and of the settings
    rank: int
    world_size: int
    label: str = ""  # heads the progress

    def score(self, lm: "PrefixLM", requests: list["Request"]) -> list[tuple[float, bool]]:
        """Score sorted requests: (log-likelihood, whether greedy decoding gives the answer)."""
        chunks = plan_chunks(requests)
        parts = [requests[chunk.start : chunk.stop] for chunk in chunks]
        files = [self.file_of(part) for part in parts]

        own = range(self.rank, len(chunks), self.world_size)
        todo = [number for number in own if self.read(files[number], parts[number]) is None]
        tokens = sum(chunks[number].tokens for number in todo)
        share = tokens / max(sum(chunk.tokens for chunk in chunks), 1)
        questions = len({(request.task, request.question) for request in requests})
        progress = Progress(
            label=self.label, tokens=tokens, questions=questions * share, quiet=self.rank > 0
        )
        for number in todo:
            scores = lm.score_part(parts[number], progress.advance)
            self.check(lm, parts[number], scores)
            self.folder.mkdir(parents=True, exist_ok=True)
            write_file(files[number], json.dumps(scores) + "\n")
        progress.close()

        if self.rank:
            return [(0.0, False)] * len(requests)
        found = []
        for file, part in zip(files, parts, strict=True):
            while (scores := self.read(file, part)) is None:
                time.sleep(0.1)  # another process is at it; torchrun ends us if it dies
            found += scores
        return found

    def file_of(self, requests: list["Request"]) -> Path:
        """Name the file of a chunk."""
        from prefix_lm import sort_key

        digest = hashlib.sha256(self.fingerprint.encode())
        for request in requests:
            input_ids, answer = sort_key(request)
            digest.update(b"%d %d " % (len(input_ids), len(answer)))
            digest.update(input_ids + answer)
        return self.folder / f"{digest.hexdigest()}.json"

    def read(self, file: Path, requests: list["Request"]) -> list[tuple[float, bool]] | None:
        """Read a finished chunk's scores; None where the file is missing or is not a chunk's."""
        try:
            lines = json.loads(file.read_bytes())
            scores = [(float(value), bool(greedy)) for value, greedy in lines]
        except (FileNotFoundError, ValueError, TypeError):
            return None
        if len(scores) != len(requests):
            return None
        return scores

    def check(
        self, lm: "PrefixLM", requests: list["Request"], scores: list[tuple[float, bool]]
    ) -> None:
        """Refuse a model whose log-likelihood is no number."""
        for request, (value, _) in zip(requests, scores, strict=True):
            if not math.isfinite(value):
                where = f"{lm.pretrained}: {request.task}, question {request.question}"
                fault = f"a log-likelihood of {value}: its weights or --dtype are at fault"
                raise UserError(f"{where}: {fault}")


# --- scores ---------------------------------------------------------------------------------------


def score_model(
    model: str, files: dict[str, str], tasks: dict[str, Any], args: argparse.Namespace
) -> Row:
    """{"about", "results"} of a model; each task's file is written when the task is whole."""
    lm = load_model(model, files, args)
    folder = args.out / folder_name(model)
    about = {"folder": folder.name, "adapter": args.adapter, "load_in_4bit": args.load_in_4bit}
    about["dtype"] = str(lm.model.get_input_embeddings().weight.dtype).removeprefix("torch.")
    about |= {"sha256": lm.store.fingerprint, "max_length": lm.max_length, "files": files}
    about["path"] = "stock" if lm.why_stock else "prefix"
    results = []
    for benchmark, group in itertools.groupby(tasks.items(), lambda item: item[1][0].split("/")[0]):
        lm.store.label = f"{labels([model])[model]} on {benchmark}"
        if not args.rank:
            print(f"scoring {model} on {benchmark}", file=sys.stderr, flush=True)
        found = score_benchmark(lm, dict(group), args)
        for result in found if not args.rank else ():
            folder.mkdir(exist_ok=True)
            write_file(folder / f"{result['task']}.json", json.dumps(result, indent=1) + "\n")
        results += found
    return {"about": about, "results": results}


def score_benchmark(
    lm: "PrefixLM", tasks: dict[str, tuple[str, "ConfigurableTask"]], args: argparse.Namespace
) -> list[Row]:
    """Run a benchmark's tasks at once: each draws its few-shot examples by a seed of its own."""
    import numpy as np
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    from prefix_lm import ScoringError

    lm.get_model_info = dict  # the harness would ask the hub about a local folder, too
    lm.truncated = set()
    began = time.monotonic()
    try:
        with np.errstate(invalid="ignore"):  # of mc2's 0 / 0, which true_share() mends
            result = simple_evaluate(
                model=lm,
                tasks=[task for _, task in tasks.values()],
                task_manager=TaskManager(include_defaults=False),
                limit=args.limit,
                bootstrap_iters=0,
                fewshot_random_seed=args.seed,
            )
    except ScoringError as error:
        raise UserError(str(error)) from None
    seconds = time.monotonic() - began
    rows = []
    for name, (prefix, _) in tasks.items():
        samples = sorted(result["samples"][name], key=lambda sample: sample["doc_id"])
        row = {"model": lm.pretrained, "sha256": lm.store.fingerprint}
        row |= {"task": name, "prefix": prefix}
        row |= {"limit": args.limit, "benchmark_seconds": round(seconds, 2)}
        prompts = "".join(sample["prompt_hash"] for sample in samples)
        row["prompts_sha256"] = hashlib.sha256(prompts.encode()).hexdigest()
        row["truncated"] = sum(task == name for task, _ in lm.truncated)
        numbers = {k: v for k, v in result["results"][name].items() if type(v) is float}
        row["harness"] = {k: v for k, v in numbers.items() if math.isfinite(v)}
        questions = to_questions(prefix, samples)
        if not {*questions[0]} - NO_METRIC:  # of the corpus as a whole, such as a perplexity
            print(f"{name} has no score per question: {row['harness']}", file=sys.stderr)
        rows.append(row | {"questions": questions})
    return rows


def to_questions(prefix: str, samples: list[Row]) -> list[Row]:
    """The harness's samples of a task, one for each filter, as one line a question."""
    questions: dict[int, Row] = {}
    rows: set[Any] = set()
    for sample in samples:
        number = sample["doc_id"]
        row = sample["doc"].get("test_row", number)
        # a row that step 2's file does not have, or has already given, is one of no other's
        row = row if row not in {-1, *rows} or number in questions else f"{number} of the layout"
        rows.add(row)
        line = questions.setdefault(number, {"test_id": f"{prefix}/{row}"})
        line["target"], answers = sample["target"], sample["filtered_resps"]
        if all(isinstance(answer, tuple) for answer in answers):
            line["log_likelihoods"] = [float(answer[0]) for answer in answers]
        else:
            line["responses"] = answers
        suffix = "" if sample["filter"] == "none" else f",{sample['filter']}"
        numbers = {m: v for m in sample["metrics"] if isinstance(v := sample[m], int | float)}
        if prefix == "truthfulqa/all" and math.isnan(numbers.get("acc", 0)):
            labels = sample["doc"]["mc2_targets"]["labels"]
            numbers["acc"] = true_share(line["log_likelihoods"], labels)
        if wrong := [metric for metric, value in numbers.items() if not math.isfinite(value)]:
            raise UserError(f"{prefix}, question {number}: its {wrong[0]} is no number")
        line |= {metric + suffix: float(value) for metric, value in numbers.items()}
    return list(questions.values())


def true_share(log_likelihoods: list[float], labels: list[int]) -> float:
    """mc2: the true answers' share of the probability; also where the harness's exp() gives 0 / 0.

    >>> true_share([-1000.0, -1000.0, -1001.0], [1, 0, 0])
    0.4223187982515182
    """
    largest = max(log_likelihoods)
    shares = [math.exp(value - largest) for value in log_likelihoods]
    return sum(x for x, label in zip(shares, labels, strict=True) if label == 1) / sum(shares)


def flagged_questions(folder: Path | None) -> set[str] | None:
    """Test ids that step 2 flags and no person called not-a-leak; None without such a folder."""
    if folder is None:
        return None
    mend = "write it with: python check_contamination.py"
    pairs = read_jsonl(check_input(folder / "pairs.jsonl", mend), {"pair_id": str, "test_id": str})
    verdicts = read_decisions(folder / "decisions.jsonl")
    innocent = {p for p, line in verdicts.items() if line["verdict"] == "not-a-leak"}
    return {pair["test_id"] for pair in pairs if pair["pair_id"] not in innocent}


def warn_unchecked(folder: Path, flagged: set[str], tasks: dict[str, tuple[str, Any]]) -> None:
    """Say which scored benchmarks step 2 did not look at: nothing of theirs can be flagged."""
    counts = read_object(folder / "run.json").get("counts", {})
    seen = {name.split("/")[0] for name in [*counts.get("test_questions", []), *flagged]}
    missing = {prefix.split("/")[0] for prefix, _ in tasks.values()} - seen
    if missing:
        unchecked, checked = (", ".join(sorted(names)) for names in (missing, seen))
        what = f"{folder} did not check {unchecked} (only {checked})"
        print(f"warning: {what}: none of its questions counts as flagged", file=sys.stderr)


def earlier_runs(folders: list[Path]) -> dict[str, Row]:
    """{model: {"about", "results"}} of finished folders of this script, for --compare."""
    runs: dict[str, Row] = {}
    for folder in folders:
        mend = f"{folder} is no folder of evaluate.py's"
        file = check_listed(check_input(folder / "results.json", mend))
        try:
            for model, about in json.loads(file.read_bytes())["models"].items():
                paths = sorted((folder / about["folder"]).glob("*.json"))
                results = [json.loads(path.read_bytes()) for path in paths]
                kept = [result for result in results if result["sha256"] == about["sha256"]]
                if not kept:
                    raise UserError(f"{folder} has no scores of {model}: name what it compared")
                add_run(runs, model, {"about": about, "results": kept})
        except (ValueError, LookupError, TypeError) as error:
            raise UserError(f"{file} or what it names is not evaluate.py's: {error!r}") from None
    check_same_questions(runs)
    return runs


def run_name(model: str, args: argparse.Namespace) -> str:
    """A model as results.json knows it: its `--model` text, and the adapter's."""
    return f"{model} + {args.adapter}" if args.adapter else model


def add_run(runs: dict[str, Row], model: str, run: Row) -> None:
    """Add a model's run under its name; where that is taken, with a number.

    A run that is there already, such as a base that two folders have scored, is added once.
    """
    names = [model, *(f"{model} #{n}" for n in range(2, 99))]
    name = next(
        n
        for n in names
        if n not in runs
        or (runs[n]["about"] == run["about"] and prompts_of(runs[n]) == prompts_of(run))
    )
    runs.setdefault(name, run)


def prompts_of(run: Row) -> dict[str, str]:
    """{task: sha256 of its prompts}: what a model was asked."""
    return {result["task"]: result["prompts_sha256"] for result in run["results"]}


# --- comparison -----------------------------------------------------------------------------------

Groups = list[dict[str, float]]  # {test id: value} of each subject; most tasks have one
Scores = dict[str, dict[str, Groups]]  # {task: {metric: groups}}


def series(results: list[Row]) -> Scores:
    """{task: {metric: [{test id: value} of each subject]}}; MMLU's subjects are tasks as well."""
    found: Scores = {}
    for result in results:
        questions = result["questions"]
        benchmark = result["prefix"].split("/")[0]
        tasks = dict.fromkeys([benchmark, result["prefix"].removesuffix("/all")])
        for metric in questions[0]:
            if metric in NO_METRIC:
                continue
            values = {line["test_id"]: line[metric] for line in questions if metric in line}
            label = metric
            if benchmark == "truthfulqa":
                label = result["task"][-3:]  # mc1, mc2: the harness calls both acc
            for task in tasks:
                groups = found.setdefault(task, {}).setdefault(label, [])
                groups.append(values)
    return found


def headline(task: str, metrics: dict[str, Any]) -> str:
    """The metric that the leaderboard takes, a task's own first one elsewhere."""
    return HEADLINE.get(task.split("/")[0], next(iter(metrics)))


def benchmarks_of(task: str, scores: Scores) -> list[Groups]:
    """The headline groups of what a task is the mean of: itself, or the average's benchmarks."""
    names = list(HEADLINE) if task == AVERAGE else [task]
    return [scores[name][headline(name, scores[name])] for name in names]


def mean(groups: Groups, chosen: Callable[[str], bool] | None = None) -> float | None:
    """Mean of the groups' means, in percent, over the questions chosen; None where none is."""
    means = []
    for group in groups:
        kept = [v for test_id, v in group.items() if chosen is None or chosen(test_id)]
        if kept:
            means.append(statistics.fmean(kept))
    return 100 * statistics.fmean(means) if means else None


def mean_of_benchmarks(
    benchmarks: list[Groups], chosen: Callable[[str], bool] | None = None
) -> float | None:
    """Mean of the benchmarks' means, in percent; None where one of them has no question chosen."""
    means = [mean(groups, chosen) for groups in benchmarks]
    if None in means:
        return None
    return statistics.fmean(means)


def summarise(
    results: list[Row], chosen: Callable[[str], bool] | None = None
) -> dict[str, dict[str, Any]]:
    """{task: {"questions", "tasks", metric: score in percent}} of the questions chosen by test id.

    MMLU: `acc` is the plain mean of subjects, as on the leaderboard of 2023, `acc_weighted` the
    mean of questions. A task without a chosen question is left out, and so is the average where
    one of its benchmarks is.
    """
    summary: dict[str, dict[str, Any]] = {}
    for task, metrics in series(results).items():
        groups = metrics[headline(task, metrics)]
        about: dict[str, Any] = {"questions": 0, "tasks": 0}
        together: dict[str, float] = {}
        for group in groups:
            kept = [test_id for test_id in group if chosen is None or chosen(test_id)]
            about["questions"] += len(kept)
            about["tasks"] += min(1, len(kept))
            together.update(group)
        if not about["questions"]:
            continue

        for metric, values in metrics.items():
            about[metric] = mean(values, chosen)
        if task == "mmlu":
            about["acc_weighted"] = mean([together], chosen)
        summary[task] = about

    if any(name not in summary for name in HEADLINE):
        return summary
    average = {"questions": 0, "tasks": 0}
    scores = []
    for name, metric in HEADLINE.items():
        average["questions"] += summary[name]["questions"]
        average["tasks"] += summary[name]["tasks"]
        scores.append(summary[name][metric])
    return {AVERAGE: {**average, "mean": statistics.fmean(scores)}, **summary}


def summarise_all(runs: dict[str, Row], chosen: Callable[[str], bool] | None) -> dict[str, Any]:
    """{model: what summarise() says of it}."""
    return {model: summarise(run["results"], chosen) for model, run in runs.items()}


def mcnemar(gained: int, lost: int) -> float:
    """Exact two-sided McNemar test: p of so uneven a split of the questions that flipped.

    >>> mcnemar(1, 9)
    0.021484375
    """
    tail = sum(math.comb(gained + lost, k) for k in range(min(gained, lost) + 1))
    return min(1.0, 2 * tail / 2 ** (gained + lost))


def resampled_means(groups: Groups, rng: "np.random.Generator") -> "np.ndarray":
    """[RESAMPLES] means of the groups' means, in percent, each group resampled within itself.

    A resample is drawn as how often each distinct value occurs: the same distribution for a
    fraction of the work.
    """
    import numpy as np

    total = np.zeros(RESAMPLES)
    for group in groups:
        values, counts = np.unique(100 * np.array(list(group.values())), return_counts=True)
        size = len(group)
        # in parts, which are views: the draws of all at once could fill the memory
        for part in np.array_split(total, 20):
            drawn = rng.multinomial(size, counts / size, size=len(part))
            part += drawn @ values / size
    return total / len(groups)


def bootstrap(benchmarks: list[Groups]) -> list[float]:
    """[low, high] in percent: 95 % interval of the mean of the benchmarks' means.

    benchmarks: the paired gains of each, resampled within each of its groups.
    """
    import numpy as np

    rng = np.random.default_rng(0)
    total = np.zeros(RESAMPLES)
    for groups in benchmarks:
        total += resampled_means(groups, rng)
    ends = np.quantile(total / len(benchmarks), [0.025, 0.975])
    return ends.tolist()


def paired_gains(before: Groups, after: Groups) -> Groups:
    """What a model gains over the base in each question of a benchmark, in the same groups."""
    gains = []
    for old, new in zip(before, after, strict=True):
        gains.append({test_id: new[test_id] - value for test_id, value in old.items()})
    return gains


def count_flips(before: Groups, after: Groups) -> Row:
    """{"gained", "lost", "p", "flips"} of a task's questions.

    Where a value is neither 0 nor 1 (mc2), p is None and no flip is listed.
    """
    gained = 0
    lost = 0
    flips = []
    values = set()
    for old, new in zip(before, after, strict=True):
        values.update(old.values(), new.values())
        for test_id, value in old.items():
            if new[test_id] == value:
                continue
            if new[test_id] > value:
                gained += 1
            else:
                lost += 1
            flips.append({"test_id": test_id, "base": int(value), "model": int(new[test_id])})

    if not values <= {0, 1}:
        return {"gained": gained, "lost": lost, "p": None, "flips": []}
    return {"gained": gained, "lost": lost, "p": mcnemar(gained, lost), "flips": flips}


def verdict(points: float, interval: list[float], p: float | None) -> str:
    """What a change is called: "better" or "worse" only where interval and test agree on it."""
    low, high = interval
    if low <= 0 <= high or abs(points) < TINY:
        return SAME
    if p is not None and p >= ALPHA:
        return SAME
    return "better" if points > 0 else "worse"


def compare(base: Scores, model: Scores, task: str, flagged: set[str] | None) -> Row:
    """A model's headline score of a task against the base's, question by question.

    base, model: what series() makes of their results. The average is a mean of means, so that no
    question of it is won or lost as a whole: the interval alone decides its verdict.
    """
    before = benchmarks_of(task, base)
    after = benchmarks_of(task, model)
    gains = []
    questions = 0
    for old_groups, new_groups in zip(before, after, strict=True):
        groups = paired_gains(old_groups, new_groups)
        gains.append(groups)
        questions += sum(map(len, groups))

    metric = "mean"
    test: Row = {"gained": None, "lost": None, "p": None, "flips": []}
    if task != AVERAGE:
        metric = headline(task, base[task])
        test = count_flips(before[0], after[0])

    old = mean_of_benchmarks(before)
    new = mean_of_benchmarks(after)
    points = new - old
    row = {"task": task, "metric": metric, "questions": questions}
    row |= {"base_score": old, "score": new, "points": points}
    row["percent"] = 100 * points / old if old >= TINY else None
    row["interval"] = bootstrap(gains)
    row["verdict"] = verdict(points, row["interval"], test["p"])

    row |= {"points_unflagged": None, "points_flagged": None}
    if flagged is not None:
        row["points_unflagged"] = mean_of_benchmarks(gains, lambda i: i not in flagged)
        row["points_flagged"] = mean_of_benchmarks(gains, lambda i: i in flagged)
    row |= test
    return row


def check_same_questions(runs: dict[str, Row]) -> None:
    """Refuse to compare models that were not asked the same."""
    asked = [prompts_of(run) for run in runs.values()]
    for model, tasks in zip(runs, asked, strict=True):
        if tasks != asked[0]:
            other = sorted({*tasks.items()} ^ {*asked[0].items()})[0][0]
            why = "another --limit, --seed, set of tasks, few-shot rows or version"
            what = f"{next(iter(runs))} and {model} were not asked the same in {other} ({why})"
            raise UserError(f"{what}: score both with one command")


def count_truncated(results: list[Row], task: str) -> int:
    """How many of a task's questions had their context cut."""
    cut = {}
    for result in results:
        prefix = f"{result['prefix']}/"
        if prefix.startswith(f"{task}/"):
            cut[prefix] = result["truncated"]  # once for a prefix: mc1 and mc2 ask the same
    return sum(cut.values())


def describe_tasks(runs: dict[str, Row], flagged: set[str] | None) -> dict[str, Row]:
    """{task: {"metric", "questions", "flagged", "partial", "truncated"}} of results.json."""
    base = next(iter(runs.values()))["results"]
    limited = any(result["limit"] for result in base)
    tasks: dict[str, Row] = {}
    for task, metrics in series(base).items():
        metric = headline(task, metrics)
        ids = set().union(*metrics[metric])
        about = {"metric": metric, "questions": len(ids)}
        about["truncated"] = {m: count_truncated(run["results"], task) for m, run in runs.items()}
        about["flagged"] = None if flagged is None else len(ids & flagged)
        too_few = task == "mmlu" and len(metrics[metric]) < MMLU_SUBJECTS
        about["partial"] = limited or too_few
        tasks[task] = about

    if any(name not in tasks for name in HEADLINE):
        return tasks
    return {AVERAGE: describe_average([tasks[name] for name in HEADLINE]), **tasks}


def describe_average(benchmarks: list[Row]) -> Row:
    """What describe_tasks() says of the average, from what it says of the four benchmarks."""
    average: Row = {"metric": "mean", "questions": 0}
    average["truncated"] = dict.fromkeys(benchmarks[0]["truncated"], 0)
    average["flagged"] = None
    average["partial"] = any(about["partial"] for about in benchmarks)
    for about in benchmarks:
        average["questions"] += about["questions"]
        for model, count in about["truncated"].items():
            average["truncated"][model] += count
    if benchmarks[0]["flagged"] is not None:
        average["flagged"] = sum(about["flagged"] for about in benchmarks)

    # a benchmark's file may hold a part of it, as HellaSwag's in the official layout does
    if average["questions"] < AVERAGE_QUESTIONS:
        average["partial"] = True
    return average


def write_results(args: argparse.Namespace, runs: dict[str, Row], flagged: set[str] | None) -> str:
    """Write results.json, results.md and change.svg; return the tables.

    results.json, one object (a model is known by its run_name(), the base first):
      "models": {model: {"folder": below --out, "adapter", "dtype", "load_in_4bit", "sha256": of
        weights, tokenizer, adapter and settings, "max_length", "path": "prefix" or "stock",
        "files": {path: sha256}}}
      "tasks": {task: {"metric": headline metric, "questions", "flagged": int or null,
        "partial": bool, "truncated": {model: questions whose context was cut from the left}}}
        task: "arc", "hellaswag", "mmlu", "mmlu/<subject>", "truthfulqa" or a --task's name; and
        first, where those four benchmarks are all there, "average", the leaderboard's: metric
        "mean", the plain mean of the four; partial also with fewer questions than theirs in full
      "all questions", "unflagged questions" and "flagged questions" (the latter two only with
        --contamination): {model: {task: {"questions", "tasks", metric: score in percent}}}; mmlu's
        "acc" is the plain mean of subjects, "acc_weighted" that of questions; no "average" where
        a benchmark has no such question
      "comparisons": [{"model", "base", "task", "metric", "questions", "base_score", "score",
        "points": score - base_score, "percent": 100 * points / base_score or null, "interval":
        [low, high] of points, 95 %, paired bootstrap (within each subject of each benchmark),
        "verdict": "better", "worse" or "not distinguishable", "points_unflagged",
        "points_flagged": null without --contamination or such questions, "gained", "lost":
        questions now right, now wrong, null for the average, "p": exact McNemar, null for the
        average and where the metric is not right or wrong, "flips": [{"test_id", "base": 0 or 1,
        "model": 0 or 1}], empty where p is null}]
    """
    check_same_questions(runs)
    base, *others = runs
    found: dict[str, Any] = {"models": {model: run["about"] for model, run in runs.items()}}
    found["tasks"] = describe_tasks(runs, flagged)
    found["all questions"] = summarise_all(runs, None)
    if flagged is not None:
        found["unflagged questions"] = summarise_all(runs, lambda i: i not in flagged)
        found["flagged questions"] = summarise_all(runs, lambda i: i in flagged)

    found["comparisons"] = []
    scores = {model: series(run["results"]) for model, run in runs.items()}
    for model in others:
        for task in found["tasks"]:
            row = compare(scores[base], scores[model], task, flagged)
            found["comparisons"].append({"model": model, "base": base, **row})

    text = tables(found, args.paper)
    write_file(args.out / "results.json", json.dumps(found, indent=1) + "\n")
    write_file(args.out / "results.md", text + "\n")
    draw_change(found, args.out / "change.svg")
    return text


def labels(models: list[str]) -> dict[str, str]:
    """What tables call each model: the last part of its path, or all where two share that."""
    names = {model: os.path.basename(os.path.abspath(model)) for model in models}  # of "." too
    return names if len({*names.values()}) == len(names) else {model: model for model in models}


def tables(found: dict[str, Any], paper: bool) -> str:
    """results.json as Markdown: the average, scores, change in percent, paired tests."""
    names = list(labels(found["models"]).values())
    others = names[1:]
    parts = []
    if AVERAGE in found["tasks"]:
        parts += average_table(found, paper)

    for part in ("all", "unflagged", "flagged"):
        if f"{part} questions" not in found:
            continue
        beside = "" if part == "all" else " (in brackets: less that of all)"
        parts.append(f"Scores in percent, {part} questions{beside}:")
        columns = ["task", "metric", "questions", *names]
        parts.append(markdown_table(columns, score_rows(found, part)))

    if others or paper:
        parts += change_tables(found, paper)
    if others:
        tests = "on the same questions; 1 such test of 20 differs by chance"
        parts.append(f"Against {names[0]} {tests}; flipped questions are in results.json:")
        columns = ["task", "model", "points", "95 % interval", "gained", "lost", "p"]
        columns += ["points, unflagged", "points, flagged", "verdict"]
        parts.append(markdown_table(columns, paired_rows(found)))

    cut = []
    for task, about in found["tasks"].items():
        count = max(about["truncated"].values())
        if count and task != AVERAGE:
            cut.append(f"{task} {count:,}")
    if cut:
        parts.append(f"Questions whose context was cut from the left to fit: {', '.join(cut)}")
    return "\n\n".join(parts)


def average_table(found: dict[str, Any], paper: bool) -> list[str]:
    """[title, table] of the leaderboard's average, the paper's headline: a line for each model."""
    models = labels(found["models"])
    base = next(iter(models))
    scores = found["all questions"]
    unchanged = ["-", "-", "-", "-"]
    rows = [[models[base], f"{scores[base][AVERAGE]['mean']:.2f}", *unchanged]]
    for row in found["comparisons"]:
        if row["task"] == AVERAGE:
            cells = [models[row["model"]], f"{row['score']:.2f}"]
            cells += [signed(row["points"]), signed(row["percent"])]
            cells += [interval_text(row), row["verdict"]]
            rows.append(cells)
    if paper:
        for model, score in PAPER_AVERAGE.items():
            rows.append([f"{model} (paper)", f"{score:.2f}", *unchanged])

    title = "Average"
    about = found["tasks"][AVERAGE]
    if about["partial"]:
        title += f" (partial: {about['questions']:,} questions of {AVERAGE_QUESTIONS:,})"
    title += f" in percent, the mean of {', '.join(HEADLINE)}; change over {models[base]}:"
    columns = ["model", "average", "points", "percent", "95 % interval", "verdict"]
    return [title, markdown_table(columns, rows)]


def signed(value: float | None) -> str:
    """A change with its sign: +1.25, and - for None."""
    return "-" if value is None else f"{value:+.2f}"


def interval_text(row: Row) -> str:
    """The interval of a comparison: "-0.31 to +1.70"."""
    low, high = row["interval"]
    return f"{low:+.2f} to {high:+.2f}"


def score_rows(found: dict[str, Any], part: str) -> list[list[Any]]:
    """[task, metric, questions, score of each model]: the headline metric first."""
    rows = []
    for task, about in found["tasks"].items():
        scores = [of.get(task, {}) for of in found[f"{part} questions"].values()]
        metrics = [m for m in scores[0] if m not in ("questions", "tasks")] * ("/" not in task)
        for metric in sorted(metrics, key=lambda m: m != about["metric"]):
            cells = [f"{score[metric]:.2f}" for score in scores]
            if part != "all":
                whole = [of[task][metric] for of in found["all questions"].values()]
                less = [score[metric] - w for score, w in zip(scores, whole, strict=True)]
                cells = [f"{cell} ({x:+.2f})" for cell, x in zip(cells, less, strict=True)]
            name = task + " (partial)" * about["partial"]
            rows.append([name, metric, scores[0]["questions"], *cells])
    return rows


def change_tables(found: dict[str, Any], paper: bool) -> list[str]:
    """Titles and tables of the change in percent, in the form of the paper's Tables 5 and 7."""
    base, *others = labels(found["models"]).values()
    theirs: dict[str, Row] = {}
    if paper:
        with PAPER.open(newline="", encoding="utf-8") as file:
            theirs = {row.pop("task"): row for row in csv.DictReader(file)}

    parts = []
    for number, subjects in ((5, False), (7, True)):
        rows = change_rows(found, theirs, subjects)
        if rows:
            where = f"the paper's Table {number}"
            parts.append(f"Change over {base} in percent, {where}; (=): {SAME}; -: of 0:")
            columns = ["task", *others, *theirs.get("arc", {})]
            parts.append(markdown_table(columns, rows))
    return parts


def change_rows(found: dict[str, Any], theirs: dict[str, Row], subjects: bool) -> list[list[str]]:
    """[task, change of each model, the paper's], of benchmarks and tasks or of MMLU's subjects."""
    compared = {(row["task"], row["model"]): row for row in found["comparisons"]}
    rows, nothing = [], dict.fromkeys(theirs.get("arc", ()), "-")
    for task in [t for t in {**found["tasks"], **theirs} if ("/" in t) is subjects]:
        cells = []
        for model in list(found["models"])[1:]:
            row = compared.get((task, model), {"percent": None})
            same = " (=)" * (row.get("verdict") == SAME)
            cells.append("-" if row["percent"] is None else f"{row['percent']:+.2f}{same}")
        rows.append([task.removeprefix("mmlu/"), *cells, *theirs.get(task, nothing).values()])
    return rows


def paired_rows(found: dict[str, Any]) -> list[list[Any]]:
    """The paired test of every benchmark and task; those of subjects are in results.json."""
    models = labels(found["models"])
    rows = []
    for row in found["comparisons"]:
        if "/" in row["task"]:
            continue
        cells = [row["task"], models[row["model"]]]
        cells += [signed(row["points"]), interval_text(row)]
        for key in ("gained", "lost"):
            cells.append("-" if row[key] is None else row[key])
        cells.append("-" if row["p"] is None else f"{row['p']:.2g}")
        cells += [signed(row["points_unflagged"]), signed(row["points_flagged"])]
        cells.append(row["verdict"])
        rows.append(cells)
    return rows


def draw_change(found: dict[str, Any], path: Path) -> None:
    """An SVG of each model's change over the base: by MMLU subject, or by task without MMLU."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    path.unlink(missing_ok=True)  # of a run that was stopped
    rows = [row for row in found["comparisons"] if row["percent"] is not None]
    rows = [row for row in rows if "/" in row["task"]] or rows
    models, shown = list(dict.fromkeys(row["model"] for row in rows)), labels(found["models"])
    if not rows:
        return
    height = 1.2 + 0.2 * len({row["task"] for row in rows})
    figure = Figure(figsize=(6.5 * len(models), height), layout="constrained")
    colours = {"better": "tab:blue", "worse": "tab:orange", SAME: "silver"}
    for axes, model in zip(figure.subplots(1, len(models), squeeze=False)[0], models, strict=True):
        bars = sorted((r for r in rows if r["model"] == model), key=lambda row: row["percent"])
        tasks = [row["task"].removeprefix("mmlu/").replace("_", " ") for row in bars]
        used = [colours[row["verdict"]] for row in bars]
        axes.barh(tasks, [row["percent"] for row in bars], color=used)
        axes.axvline(0, color="black", linewidth=0.8)
        axes.tick_params(axis="y", labelsize=7)
        axes.margins(y=0.01)
        axes.set_xlabel(f"change over {shown[rows[0]['base']]} in percent")
        axes.set_title(f"{shown[model]} (grey: {SAME})", fontsize=9)
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "change"}):  # text; the same bytes
        figure.savefig(path, format="svg", metadata={"Date": None})


def inputs_of(args: argparse.Namespace) -> dict[str, Row]:
    """For run.json: the files of benchmarks, tasks and other folders; models' come when read."""
    names = ("pairs.jsonl", "decisions.jsonl") if args.contamination else ()
    more = [Path(path) for path in args.task] + [args.contamination / name for name in names]
    more += [folder / "results.json" for folder in args.compare]
    return describe_files([*local_inputs(args), *filter(Path.is_file, more)])


def task_files(tasks: dict[str, tuple[str, "ConfigurableTask"]]) -> list[Path]:
    """The local files that tasks' YAML names."""
    named = [(task.config.dataset_kwargs or {}).get("data_files") for _, task in tasks.values()]
    files = {file for found in named if isinstance(found, dict) for file in found.values()}
    return [Path(file) for file in sorted(map(str, files)) if Path(file).is_file()]


def model_inputs(models: dict[str, dict[str, str]]) -> dict[str, Row]:
    """The models' own files for run.json, with the hashes that check_models() has found."""
    files = [item for known in models.values() for item in known.items()]
    return {path: {"sha256": sha256} for path, sha256 in files if Path(path).is_file()}


def files_written(args: argparse.Namespace, tasks: dict[str, Any]) -> list[Path]:
    """What this run has put into --out: every model's tasks, the comparison, a picture if any."""
    files = [args.out / name for name in ("results.json", "results.md", "change.svg")]
    for model in args.model:
        folder = args.out / folder_name(model)
        files += [folder / f"{task}.json" for task in tasks]
    return [path for path in files if path.exists()]


def main(argv: list[str] | None = None) -> None:
    """Models x tasks -> scores -> change over the first model."""
    started = time.monotonic()
    args = parse_args(argv)
    vars(args).update(take_rank())
    if nothing_to_resume(args):
        return print(f"{args.out} is finished: nothing to resume")
    used = [*args.model, *args.compare, args.adapter, args.contamination]
    check_output(args.out, args.overwrite, *(Path(path) for path in used if path))
    inputs = inputs_of(args)  # before they are read
    flagged = flagged_questions(args.contamination)
    runs = earlier_runs(args.compare)
    import_harness()
    pick_device(args)
    files = check_models(args)
    tasks = benchmark_tasks(args) if files else {}
    inputs |= describe_files(task_files(tasks)) | model_inputs(files)
    if args.contamination and files and not args.rank:
        warn_unchecked(args.contamination, flagged, tasks)
    with nullcontext() if args.rank else claim_output(args.out, args.overwrite):
        for model in args.model:
            add_run(runs, run_name(model, args), score_model(model, files[model], tasks, args))
        if args.rank:
            return None
        text = write_results(args, runs, flagged)
        outputs = files_written(args, tasks)
        models = {model: run["about"] for model, run in runs.items()}
        finish_run(args, inputs=inputs, outputs=outputs, started=started, models=models)
    shutil.rmtree(chunk_folder(args.out), ignore_errors=True)
    print(f"{text}\n\nwrote {args.out}. Next: {next_command(args.out)}")


if __name__ == "__main__":
    run_main(main)

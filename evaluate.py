"""Score models on the leaderboard's four benchmarks and print the change over the base.

Step 5 of 5 (paper, section 4). Reads models (folders or hub ids) and benchmarks (--local
DIR/<benchmark>/ or the hub); writes out/eval/: <model>/<task>.json with every question's
log-likelihoods, results.json, results.md, run.json.

    python evaluate.py --model demo/base_model --tasks arc --local demo/data --limit 5 --out out/e
    python evaluate.py --model meta-llama/Llama-2-7b-hf --adapter out/adapter --tasks mmlu
    python evaluate.py

Prompts, few-shot examples and metrics are lm-evaluation-harness's: ARC-Challenge 25-shot,
HellaSwag 10-shot, MMLU 5-shot (plain mean of subjects), TruthfulQA 0-shot. Without --model it
scores the base of out/merged and then out/merged. Time: hours for a 13B on one A100 in full.
It scores choices by likelihood; it does not generate text.
"""

import argparse
import functools
import json
import math
import statistics
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from build_dataset import (
    Row,
    UserError,
    check_output,
    finish_run,
    hub_fault,
    make_parser,
    output_folder,
    refuse,
    run_main,
    write_file,
)
from check_contamination import (
    HUB,
    Subject,
    check_input,
    load_benchmark,
    local_inputs,
    markdown_table,
    read_decisions,
    read_jsonl,
)

if TYPE_CHECKING:
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.models.huggingface import HFLM

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
TINY = 0.005  # percent: of a base that prints as 0.00 there is no change in percent
MMLU_SUBJECTS = 57  # the full benchmark; fewer are a partial result


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags of this step; every impossible setting is named at once."""
    parser = make_parser(__doc__, "out/eval")
    parser.set_defaults(seed=1234)  # the harness's, for its few-shot examples
    add = parser.add_argument_group("models").add_argument
    repeat = {"action": "append", "default": []}
    models = "folder or hub id; repeatable, the base first (default: out/merged's base and it)"
    add("--model", **repeat, help=models)
    add("--adapter", metavar="DIR", help="score each --model with this adapter, unmerged")
    add = parser.add_argument_group("tasks").add_argument
    add("--tasks", default=",".join(HUB), metavar="a,b", help="default: %(default)s; '' for none")
    add("--task", **repeat, metavar="YAML", help="a harness task file (repeatable)")
    add("--local", type=Path, metavar="DIR", help="read DIR/<benchmark>/ (default: the hub)")
    flagged = "also score without the test questions that this folder of step 2 flags"
    add("--contamination", type=Path, metavar="DIR", help=flagged)
    add("--batch-size", type=int, default=8, metavar="N", help="of a forward pass (default: 8)")
    args = parser.parse_args(argv)
    args.benchmarks = [name for name in args.tasks.split(",") if name]
    unknown = [name for name in args.benchmarks if name not in HUB]
    missing = [path for path in args.task if not Path(path).is_file()]
    refuse(
        {
            f"--tasks: {', '.join(unknown)} is none of {', '.join(HUB)}": unknown,
            f"--task: no such file: {', '.join(missing)}": missing,
            f"--local {args.local} is not a folder": args.local and not args.local.is_dir(),
            "no task: name one with --tasks or --task": not args.benchmarks and not args.task,
        }
    )
    args.model = args.model or merged_and_base()
    for model in [*args.model, *filter(None, [args.adapter])]:
        if Path(model).is_dir():
            check_input(Path(model), "")
    return args


def merged_and_base() -> list[str]:
    """[base, out/merged]: what is scored when no model is named."""
    merged = check_input(Path("out/merged"), "merge one with python merge.py, or give --model")
    run = check_input(merged / "run.json", "out/merged is not merge.py's; give --model")
    return [json.loads(run.read_text(encoding="utf-8"))["base_model"], str(merged)]


def import_harness() -> None:
    """Make lm_eval importable: it needs the package `evaluate`, which this script's name hides."""
    here = Path(__file__).resolve().parent
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != here]
    found = sys.modules.get("evaluate")
    if found and Path(found.__file__ or "").resolve() == Path(__file__).resolve():
        del sys.modules["evaluate"]
    import lm_eval.models.huggingface  # noqa: F401


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
        # the harness asks for a splits's name only after it has looked for it in the data set
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


def benchmark_tasks(args: argparse.Namespace) -> dict[str, tuple[str, "ConfigurableTask"]]:
    """{task: (prefix of its questions' test ids, task)} for everything that is to be scored."""
    import lm_eval

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
            if len(subject.shots) < SHOTS[name]:
                have = f"{len(subject.shots)} few-shot rows, {SHOTS[name]} needed"
                raise UserError(f"{name}/{subject.subject}: {have}")
            for task, file in files.items():
                built = harness_task(root / file, SHOTS[name], subject)
                tasks[task] = (f"{name}/{subject.subject}", built)
    for path in args.task:
        try:
            built = harness_task(Path(path), 0, None)
        except Exception as error:  # a task file can be wrong in as many ways as code
            raise UserError(f"--task {path}: {type(error).__name__}: {error}") from None
        tasks[built.config.task] = (f"{built.config.task}/all", built)
    return tasks


def check_models(args: argparse.Namespace) -> None:
    """Refuse a model without a readable config or tokenizer before anything is written."""
    from transformers import AutoConfig, AutoTokenizer

    for model in args.model:
        try:
            AutoConfig.from_pretrained(model)
            AutoTokenizer.from_pretrained(model)
        except (OSError, ValueError) as error:
            raise UserError(f"--model {hub_fault(model, error)}") from None


def load_model(model: str, args: argparse.Namespace) -> "HFLM":
    """The harness's model; its log-softmax in float32 whatever the model's type."""
    import torch
    from lm_eval.models.huggingface import HFLM

    lm = HFLM(
        pretrained=model,
        peft=args.adapter,
        device=args.device or ("cuda" if torch.cuda.is_available() else "cpu"),
        batch_size=args.batch_size,
        dtype="auto",
        softmax_dtype="float32",  # in bfloat16 it moves scores
        logits_cache=False,  # wrong where the same tokens are split differently
    )
    quiet = not sys.stderr.isatty()  # the harness's bars would fill a log file
    lm.loglikelihood = functools.partial(lm.loglikelihood, disable_tqdm=quiet)
    return lm


def score_task(
    lm: "HFLM", name: str, prefix: str, task: "ConfigurableTask", args: argparse.Namespace
) -> Row:
    """Run one task, on its own so that no other task's draws change its few-shot examples."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    result = simple_evaluate(
        model=lm,
        tasks=[task],
        task_manager=TaskManager(include_defaults=False),
        limit=args.limit,
        bootstrap_iters=0,
        fewshot_random_seed=args.seed,
    )
    questions = []
    for sample in sorted(result["samples"][name], key=lambda sample: sample["doc_id"]):
        row = sample["doc"].get("test_row", sample["doc_id"])
        line = {"test_id": f"{prefix}/{row}", "target": sample["target"]}
        line["log_likelihoods"] = [float(r[0]) for r in sample["filtered_resps"]]
        if not all(map(math.isfinite, line["log_likelihoods"])):
            raise UserError(f"{name}, question {sample['doc_id']}: a log-likelihood is not finite")
        line |= {m: float(sample[m]) for m in ("acc", "acc_norm") if m in sample}
        questions.append(line)
    return {"task": name, "prefix": prefix, "limit": args.limit, "questions": questions}


def flagged_questions(folder: Path | None) -> set[str] | None:
    """Test ids that step 2 flags and no person called not-a-leak; None without such a folder."""
    if folder is None:
        return None
    mend = "write it with: python check_contamination.py"
    pairs = read_jsonl(check_input(folder / "pairs.jsonl", mend), {"pair_id": str, "test_id": str})
    verdicts = read_decisions(folder / "decisions.jsonl")
    innocent = {p for p, line in verdicts.items() if line["verdict"] == "not-a-leak"}
    return {pair["test_id"] for pair in pairs if pair["pair_id"] not in innocent}


def summarise(results: list[Row], flagged: set[str]) -> dict[str, dict[str, Any]]:
    """{benchmark: {metric: score in percent, questions, tasks}} without the flagged questions.

    MMLU: `acc` is the plain mean of subjects, as on the leaderboard of 2023, `acc_weighted` the
    mean of questions. A task whose questions are all flagged is left out.
    """
    summary: dict[str, dict[str, Any]] = {}
    means: dict[str, dict[str, list[float]]] = {}
    for result in results:
        questions = [q for q in result["questions"] if q["test_id"] not in flagged]
        if not questions:
            continue
        benchmark = result["prefix"].partition("/")[0]
        about = summary.setdefault(benchmark, {"questions": 0, "tasks": 0})
        about["tasks"] += 1
        about["questions"] = len(questions) + (about["questions"] if benchmark == "mmlu" else 0)
        for metric in ("acc", "acc_norm"):
            if metric in questions[0]:
                name = result["task"].rpartition("_")[2] if benchmark == "truthfulqa" else metric
                values = [question[metric] for question in questions]
                means.setdefault(benchmark, {}).setdefault(name, []).append(
                    statistics.fmean(values)
                )
                if benchmark == "mmlu":
                    weighted = means[benchmark].setdefault("acc_weighted", [])
                    weighted += values
    for benchmark, metrics in means.items():
        for name, values in metrics.items():
            summary[benchmark][name] = 100 * statistics.fmean(values)
    return summary


def results_table(scores: dict[str, dict[str, dict[str, Any]]], partial: bool) -> str:
    """Markdown: headline score of each benchmark and model, and the change over the first model.

    Change in percent is the paper's 100 * (new - base) / base; points are new - base.
    """
    first, *others = scores
    headers = ["benchmark", "metric", "questions", Path(first).name]
    for other in others:
        headers += [Path(other).name, "change %", "points"]
    rows = []
    for benchmark, about in scores[first].items():
        metric = HEADLINE.get(benchmark, "acc")
        less = partial or (benchmark == "mmlu" and about["tasks"] < MMLU_SUBJECTS)
        base = about[metric]
        row = [benchmark + less * " (partial)", metric, about["questions"], f"{base:.2f}"]
        for other in others:
            new = scores[other][benchmark][metric]
            change = f"{100 * (new - base) / base:+.2f}" if base >= TINY else "-"
            row += [f"{new:.2f}", change, f"{new - base:+.2f}"]
        rows.append(row)
    return markdown_table(headers, rows)


def folder_name(model: str) -> str:
    """A model's folder below --out.

    >>> folder_name("../demo/base_model"), folder_name("meta-llama/Llama-2-7b-hf")
    ('demo__base_model', 'meta-llama__Llama-2-7b-hf')
    """
    return "__".join(part for part in Path(model).parts if part not in ("..", ".", "/"))


def main(argv: list[str] | None = None) -> None:
    """Models x tasks -> scores -> change over the first model."""
    started = time.monotonic()
    args = parse_args(argv)
    used = [*args.model, *filter(None, [args.adapter, args.contamination])]
    check_output(args.out, args.overwrite, *map(Path, used))
    flagged = flagged_questions(args.contamination)
    import_harness()
    check_models(args)
    tasks = benchmark_tasks(args)
    results: dict[str, list[Row]] = {}
    with output_folder(args.out, args.overwrite):
        for model in args.model:
            lm = load_model(model, args)
            folder = args.out / folder_name(model)
            folder.mkdir(exist_ok=True)
            for name, (prefix, task) in tasks.items():
                print(f"scoring {model} on {name}", file=sys.stderr, flush=True)
                result = {"model": model, **score_task(lm, name, prefix, task, args)}
                write_file(folder / f"{name}.json", json.dumps(result, indent=1) + "\n")
                results.setdefault(model, []).append(result)
        table = write_results(args, results, flagged)
        inputs = [*local_inputs(args), *(Path(path) for path in args.task)]
        finish_run(args, inputs, started, models=args.model)
    print(f"{table}\nwrote {args.out}. Next: python tui.py {args.out.parent}")


def write_results(
    args: argparse.Namespace, results: dict[str, list[Row]], flagged: set[str] | None
) -> str:
    """Write results.json and results.md; return the tables.

    results.json, one object (a model is known by its `--model` text, the base first):
      "models": {model: {"folder": below --out, "adapter", "dtype", "load_in_4bit", "sha256": of
        weights, adapter and tokenizer, "max_length", "path": "prefix" or "stock"}}
      "tasks": {task: {"metric": headline metric, "questions", "flagged": int or null,
        "partial": bool, "truncated": {model: questions whose context was cut from the left}}}
        where task is "arc", "hellaswag", "mmlu", "mmlu/<subject>" (57), "truthfulqa", or a
        --task's name
      "all questions", "unflagged questions" and "flagged questions" (the latter two only with
        --contamination): {model: {task: {"questions", "tasks", metric: score in percent}}}; mmlu's
        "acc" is the plain mean of subjects, "acc_weighted" that of questions
      "comparisons": [{"model", "base", "task", "metric", "questions", "base_score", "score",
        "points": score - base_score, "percent": 100 * points / base_score or null, "interval":
        [low, high] of points, 95 %, paired bootstrap, "gained", "lost": questions now right, now
        wrong, "p": exact McNemar or null where the metric is not right or wrong, "verdict":
        "better", "worse" or "not distinguishable", "points_unflagged", "points_flagged": null
        without --contamination, "flips": [{"test_id", "base": 0 or 1, "model": 0 or 1}]}]
    """
    scores = {"all questions": {m: summarise(r, set()) for m, r in results.items()}}
    if flagged is not None:
        scores["unflagged questions"] = {m: summarise(r, flagged) for m, r in results.items()}
    write_file(args.out / "results.json", json.dumps(scores, indent=1) + "\n")
    text = "\n\n".join(f"{t}:\n\n{results_table(s, bool(args.limit))}" for t, s in scores.items())
    write_file(args.out / "results.md", text + "\n")
    return text


if __name__ == "__main__":
    run_main(main)

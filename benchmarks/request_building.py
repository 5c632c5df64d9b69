"""Time the building of MMLU's requests with prompt templates compiled anew and compiled once.

    python benchmarks/request_building.py --local raw

lm-evaluation-harness compiles a task's Jinja template for every text it renders. prefix_lm.py keeps
what it has compiled (keep_compiled_templates()). Both ways build the same requests in one process,
one after the other: prompts by the harness from MMLU's files (README.md, "Layouts"), then token
ids, cut and sorted, as prefix_lm.py has them before its first forward pass.

Prints medians of CPU seconds in one thread, which other processes change little, and a hash of all
prompts and answers, which must be the same. The tokenizer is a byte-level BPE made of the
questions. About a minute for 500 questions, 1 GB.
"""

import argparse
import hashlib
import os
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import evaluate_speed  # puts the scripts' folder on the path

if TYPE_CHECKING:
    from lm_eval.api.task import ConfigurableTask

    from prefix_lm import PrefixLM

BUILT_SUBJECTS = (  # of short and long questions
    "abstract_algebra",
    "anatomy",
    "high_school_european_history",
    "machine_learning",
    "moral_scenarios",
    "professional_law",
    "world_religions",
)


@dataclass
class BuildingCost:
    """CPU seconds of building the requests once, and what was built."""

    prompts: float
    token_ids: float
    sha256: str


class NoScores:
    """Stands where scores are made: the requests are ready when they come here."""

    def score(self, lm: "PrefixLM", requests: list[Any]) -> list[tuple[float, bool]]:
        """Return a zero for each request."""
        return [(0.0, False)] * len(requests)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--local", type=Path, required=True, help="folder of the benchmarks' files")
    parser.add_argument("--limit", type=int, default=80, help="questions a subject (default: 80)")
    parser.add_argument("--repeats", type=int, default=5, help="of both ways (default: 5)")
    return parser.parse_args(argv)


def make_lm(tasks: list["ConfigurableTask"]) -> "PrefixLM":
    """Return prefix_lm.py's model with a tokenizer of the tasks' questions; it never scores."""
    import prefix_lm

    questions = []
    for task in tasks:
        for doc in task.eval_docs:
            questions.append(doc["question"])
    shape = evaluate_speed.SHAPES["small"]
    tokenizer = evaluate_speed.train_tokenizer(questions, shape.vocabulary)
    model = evaluate_speed.make_random_llama(shape, "cpu")

    lm = prefix_lm.PrefixLM(pretrained=model, tokenizer=tokenizer, quiet=True)
    lm.store = NoScores()
    return lm


def build_once(lm: "PrefixLM", tasks: list["ConfigurableTask"], limit: int) -> BuildingCost:
    """Build the requests of up to `limit` questions of each task."""
    began = time.process_time()
    requests = evaluate_speed.build_requests(tasks, limit)
    prompts = time.process_time() - began

    began = time.process_time()
    lm.loglikelihood(requests)
    token_ids = time.process_time() - began

    digest = hashlib.sha256()
    for request in requests:
        digest.update(repr(request.args).encode())
    return BuildingCost(prompts, token_ids, digest.hexdigest())


def print_costs(name: str, costs: list[BuildingCost]) -> float:
    """Print one line of the table; return the seconds in all."""
    prompts = statistics.median(cost.prompts for cost in costs)
    token_ids = statistics.median(cost.token_ids for cost in costs)
    total = statistics.median(cost.prompts + cost.token_ids for cost in costs)
    hashes = {cost.sha256[:16] for cost in costs}
    shown = ", ".join(sorted(hashes))
    print(f"| {name} | {prompts:.2f} | {token_ids:.2f} | {total:.2f} | {shown} |")
    return total


def print_comparison(anew: list[BuildingCost], once: list[BuildingCost]) -> None:
    """Print the medians of both ways, and the share of the second."""
    print("| template compiled | prompts | token ids | together | sha256 of the prompts |")
    print("|:--|--:|--:|--:|:--|")
    before = print_costs("for each text", anew)
    after = print_costs("once", once)
    print(f"| **share** | | | **{after / before:.0%}** | |")


def main() -> None:
    """Measure both ways in turn, then print the table."""
    args = parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    evaluate_script = evaluate_speed.load_evaluate()
    tasks = evaluate_speed.load_tasks(
        evaluate_script, "mmlu", local=args.local, subjects=BUILT_SUBJECTS
    )
    lm = make_lm(tasks)

    import lm_eval.utils

    import prefix_lm

    anew: list[BuildingCost] = []
    once: list[BuildingCost] = []
    for _ in range(args.repeats):
        lm_eval.utils.env.__dict__.pop("from_string", None)  # the harness's own again
        anew.append(build_once(lm, tasks, args.limit))
        prefix_lm.keep_compiled_templates()
        once.append(build_once(lm, tasks, args.limit))
        print(f"measured {len(once)} of {args.repeats}", file=sys.stderr, flush=True)

    questions = sum(min(args.limit, len(task.eval_docs)) for task in tasks)
    print(f"{questions} questions of MMLU, 5-shot, {len(tasks)} subjects; CPU seconds\n")
    print_comparison(anew, once)


if __name__ == "__main__":
    main()

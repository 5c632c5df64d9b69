"""What building MMLU's requests costs, with each prompt's template compiled anew and compiled once.

    python benchmarks/request_building.py --local raw

lm-evaluation-harness compiles a task's Jinja template for every text it renders. prefix_lm.py keeps
what it has compiled (keep_compiled_templates()). Both ways build the same requests in one process,
one after the other: prompts by the harness from MMLU's files (README.md, "Layouts"), then token
ids, cut and sorted, as prefix_lm.py has them before its first forward pass. Shown are medians of
CPU seconds in one thread, which other processes change little, and a hash of all prompts and
answers, which must be the same. The tokenizer is a byte-level BPE made of the questions.
About a minute for 500 questions.
"""

import argparse
import hashlib
import os
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evaluate_speed import build_tasks, load_script, make_model, make_tokenizer, requests_of

SUBJECTS = (  # of short and long questions
    "abstract_algebra", "anatomy", "high_school_european_history", "machine_learning",
    "moral_scenarios", "professional_law", "world_religions",
)  # fmt: skip


@dataclass
class Cost:
    """CPU seconds of one run, and what it built."""

    prompts: float
    token_ids: float
    sha256: str


class NoScores:
    """Stands where scores are made: the requests are ready when they come here."""

    def score(self, lm: Any, requests: list[Any]) -> list[tuple[float, bool]]:
        """Return a zero for each."""
        return [(0.0, False)] * len(requests)


def measure(lm: Any, tasks: list[Any], limit: int) -> Cost:
    """Build the requests of up to `limit` questions of each task."""
    began = time.process_time()
    instances = requests_of(tasks, limit)
    prompts = time.process_time() - began

    began = time.process_time()
    lm.loglikelihood(instances)
    token_ids = time.process_time() - began

    digest = hashlib.sha256()
    for instance in instances:
        digest.update(repr(instance.args).encode())
    return Cost(prompts, token_ids, digest.hexdigest())


def print_row(name: str, costs: list[Cost]) -> float:
    """Print one line of the table; return the seconds in all."""
    prompts = statistics.median(cost.prompts for cost in costs)
    token_ids = statistics.median(cost.token_ids for cost in costs)
    total = statistics.median(cost.prompts + cost.token_ids for cost in costs)
    hashes = ", ".join(sorted({cost.sha256[:16] for cost in costs}))
    print(f"| {name} | {prompts:.2f} | {token_ids:.2f} | {total:.2f} | {hashes} |")
    return total


def main() -> None:
    """Measure both ways in turn, then print the table."""
    shape = argparse.RawTextHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=shape)
    parser.add_argument("--local", type=Path, required=True, help="folder of the benchmarks' files")
    parser.add_argument("--limit", type=int, default=80, help="questions a subject (default: 80)")
    parser.add_argument("--repeats", type=int, default=5, help="of both ways (default: 5)")
    args = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    script = load_script()
    import lm_eval.utils

    from prefix_lm import PrefixLM, keep_compiled_templates

    tasks = build_tasks(script, "mmlu", args.local, SUBJECTS)
    docs = [doc for task in tasks for doc in task.eval_docs]
    tokenizer = make_tokenizer([doc["question"] for doc in docs], 8192)
    model = make_model("small", 8192, "cpu")
    lm = PrefixLM(pretrained=model, tokenizer=tokenizer, quiet=True)
    lm.store = NoScores()

    environment = lm_eval.utils.env
    anew: list[Cost] = []
    once: list[Cost] = []
    for _ in range(args.repeats):
        environment.__dict__.pop("from_string", None)  # the harness's own again
        anew.append(measure(lm, tasks, args.limit))
        keep_compiled_templates()
        once.append(measure(lm, tasks, args.limit))
        print(f"measured {len(once)} of {args.repeats}", file=sys.stderr, flush=True)

    questions = sum(min(args.limit, len(task.eval_docs)) for task in tasks)
    print(f"{questions} questions of MMLU, 5-shot, {len(tasks)} subjects; CPU seconds\n")
    print("| template compiled | prompts | token ids | together | sha256 of the prompts |")
    print("|:--|--:|--:|--:|:--|")
    before = print_row("for each text", anew)
    after = print_row("once", once)
    print(f"| **share** | | | **{after / before:.0%}** | |")


if __name__ == "__main__":
    main()

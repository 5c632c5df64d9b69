"""Print held-out accuracy on the demo's world before and after tuning: five seeds, two targets.

    python benchmarks/demo_gain.py

Needs the demo's first two steps (bash demo.sh). Runs finetune.py and evaluate.py as a user does;
prints the table that README.md shows, one row for the base and tuned accuracy of each set of target
modules, and the base's accuracy in the form of its pre-training. 4 minutes on 2 cores, 0.6 GB.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BASE = "demo/base_model"
CONTAMINATION = "out/demo/contamination"
WORLD = "demo/world.yaml"  # the task: every question in the Alpaca prompt
SEEDS = range(5)


def run_script(name: str, flags: list[str]) -> None:
    """Run a script in the repository's folder; where it fails, so does this."""
    command = [sys.executable, f"{name}.py", *flags]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


def accuracy(model_flags: list[str], task: str, out: Path) -> float:
    """Return the accuracy in percent on the held-out questions that step 2 did not flag."""
    flags = [*model_flags, "--tasks", "", "--task", task]
    flags += ["--contamination", CONTAMINATION, "--out", str(out)]
    run_script("evaluate", flags)

    results = json.loads((out / "results.json").read_text(encoding="utf-8"))
    (scores,) = results["unflagged questions"].values()  # one model was scored
    return scores["world"]["acc"]


def tuned_accuracy(targets: str, seed: int, folder: Path) -> float:
    """Tune the base as demo.sh does, with these targets and seed; return the adapter's accuracy."""
    adapter = str(folder / "adapter")
    flags = ["--base-model", BASE, "--data", f"{CONTAMINATION}/clean.jsonl"]
    flags += ["--learning-rate", "4e-3", "--epochs", "4", "--warmup-steps", "10"]
    flags += ["--targets", targets, "--seed", str(seed), "--out", adapter]
    run_script("finetune", flags)
    return accuracy(["--model", BASE, "--adapter", adapter], WORLD, folder / "eval")


def write_plain_task(path: Path) -> None:
    """Write the task as pre-training asks its questions: a line each, no prompt around it."""
    text = (ROOT / WORLD).read_text(encoding="utf-8")
    text = re.sub(r"doc_to_text: .*", r'doc_to_text: "{{question}}\\n"', text)
    text = text.replace("world/test.jsonl", str(ROOT / "demo/world/test.jsonl"))
    path.write_text(text, encoding="utf-8")


def print_row(cells: list[str]) -> None:
    """Print one line of the table, at once: the next takes minutes."""
    print("| " + " | ".join(cells) + " |", flush=True)


def print_accuracies(scratch: Path) -> None:
    """Print the base's accuracy and that of every tuned model, a row for each set of targets."""
    base = accuracy(["--model", BASE], WORLD, scratch / "base")
    seeds = [f"seed {seed}" for seed in SEEDS]
    print_row(["targets", "base", *seeds, "smallest gain"])
    print("|:--------|" + "-----:|" * (len(SEEDS) + 2))

    for targets in ("all", "mlp"):
        tuned = []
        for seed in SEEDS:
            tuned.append(tuned_accuracy(targets, seed, scratch / f"{targets}-{seed}"))
        cells = [f"{value:.1f}" for value in tuned]
        print_row([targets, f"{base:.1f}", *cells, f"{min(tuned) - base:+.1f}"])


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line, which has --help alone."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    return parser.parse_args(argv)


def main() -> None:
    """Print the table, and how well the base knows the same facts in its own form."""
    parse_args()
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        print_accuracies(scratch)

        plain_task = scratch / "plain.yaml"
        write_plain_task(plain_task)
        plain = accuracy(["--model", BASE], str(plain_task), scratch / "plain")
        print(f"\nthe base, asked in the form of its pre-training: {plain:.1f}")


if __name__ == "__main__":
    main()

"""Held-out accuracy on the demo's world before and after tuning: five seeds, two sets of targets.

Needs the demo's first two steps (bash demo.sh). Runs finetune.py and evaluate.py as a user does and
prints the table that README.md shows; about 4 minutes on 2 cores.

    python benchmarks/demo_gain.py
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BASE, DATA = "demo/base_model", "out/demo/contamination"
SETTINGS = ["--learning-rate", "4e-3", "--epochs", "4", "--warmup-steps", "10"]  # as demo.sh
SEEDS = range(5)


def run(script: str, *args: str) -> None:
    """Run one of the scripts from the repository's folder; its failure is ours."""
    subprocess.run([sys.executable, f"{script}.py", *args], cwd=ROOT, check=True, stdout=-3)


def accuracy(folder: Path, *adapter: str, task: str = "demo/world.yaml") -> float:
    """Accuracy in percent on the held-out questions that step 2 did not flag."""
    tasks = ["--tasks", "", "--task", task, "--contamination", DATA]
    run("evaluate", "--model", BASE, *adapter, *tasks, "--out", str(folder))
    scores = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    (model,) = scores["unflagged questions"].values()
    return model["world"]["acc"]


def plain_form(folder: Path) -> str:
    """The same questions as pre-training has them: a line each, no Alpaca prompt around it."""
    text = (ROOT / "demo/world.yaml").read_text(encoding="utf-8")
    text = re.sub(r"doc_to_text: .*", r'doc_to_text: "{{question}}\\n"', text)
    text = text.replace("world/test.jsonl", str(ROOT / "demo/world/test.jsonl"))
    path = folder / "plain.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def main() -> None:
    """Print base and tuned accuracy for each set of targets and seed."""
    with tempfile.TemporaryDirectory() as scratch:
        base = accuracy(Path(scratch) / "base")
        print(f"| targets | base | {' | '.join(f'seed {s}' for s in SEEDS)} | smallest gain |")
        print(f"|:--------|-----:|{'-----:|' * len(SEEDS)}-----:|")
        for targets in ("all", "mlp"):
            tuned = []
            for seed in SEEDS:
                folder = Path(scratch) / f"{targets}-{seed}"
                args = ["--base-model", BASE, "--data", f"{DATA}/clean.jsonl", *SETTINGS]
                args += ["--targets", targets, "--seed", str(seed)]
                run("finetune", *args, "--out", str(folder / "adapter"))
                adapter = ["--adapter", str(folder / "adapter")]
                tuned.append(accuracy(folder / "eval", *adapter))
            cells = " | ".join(f"{value:.1f}" for value in tuned)
            print(f"| {targets} | {base:.1f} | {cells} | {min(tuned) - base:+.1f} |", flush=True)
        plain = accuracy(Path(scratch) / "plain", task=plain_form(Path(scratch)))
        print(f"\nthe base, asked in the form of its pre-training: {plain:.1f}")


if __name__ == "__main__":
    main()

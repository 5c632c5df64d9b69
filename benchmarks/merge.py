"""Time merging side by side: cp, ours, PEFT, mergekit; then the memory of ours by shard size.

A random bfloat16 Llama in shards of 500 MB and a random LoRA of rank 16 on the MLP's matrices, the
paper's targets. Every run is a process of its own that begins with the base's files in the page
cache, no output and nothing to write back, and counts until its bytes are on the disk (`sync`).
Rivals that are not in our environment run from .venv-rivals (benchmarks/requirements.txt). Memory
is the kernel's own high-water mark of resident memory, mapped files included; "imports" is a
process that imports torch, transformers and peft, and does nothing. 10 minutes, 20 GB of disk.

    python benchmarks/merge.py
    python benchmarks/merge.py --gigabytes 0.5 --runs 1 --shards 0.1,0.2
"""

import argparse
import json
import math
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))

SHARD = 500_000_000  # bytes of the base's files
RANK = 16
HIDDEN = 2048
INNER = 5632
VOCABULARY = 32000
LAYER_BYTES = 2 * (4 * HIDDEN * HIDDEN + 3 * HIDDEN * INNER)  # in bfloat16
ENDS_BYTES = 2 * 2 * VOCABULARY * HIDDEN  # embedding and head
IMPORTS = "import torch, transformers, peft; from peft import PeftModel; from transformers import "
IMPORTS += "AutoModelForCausalLM"
PEFT = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
base, adapter, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
model = PeftModel.from_pretrained(model, adapter).merge_and_unload()
model.save_pretrained(out, max_shard_size="5GB")
"""
WITH_SHARDS = """
import sys
sys.path.append(sys.argv[1])
import merge
merge.SHARD_SIZE = int(sys.argv[2])
merge.main(sys.argv[3:])
"""


@dataclass
class Measured:
    """One run of a command."""

    seconds: float
    peak: float  # MB of resident memory
    disk: float  # MB at most below the scratch folder


def parse_args() -> argparse.Namespace:
    """Parse the sizes and the number of runs."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--gigabytes", type=float, default=4.0, help="of the base (default: 4)")
    parser.add_argument("--runs", type=int, default=5, help="of which the median is shown")
    parser.add_argument("--shards", default="0.5,1,5", help="GB of output shards, for the memory")
    parser.add_argument("--rivals", type=Path, default=ROOT / ".venv-rivals/bin")
    parser.add_argument("--scratch", type=Path, help="folder for the models (default: a new one)")
    return parser.parse_args()


def shapes(layers: int) -> dict[str, tuple[int, ...]]:
    """List every tensor of a Llama with its shape."""
    found = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN)}
    for number in range(layers):
        at = f"model.layers.{number}."
        for matrix in "qkvo":
            found[f"{at}self_attn.{matrix}_proj.weight"] = (HIDDEN, HIDDEN)
        found[f"{at}mlp.gate_proj.weight"] = (INNER, HIDDEN)
        found[f"{at}mlp.up_proj.weight"] = (INNER, HIDDEN)
        found[f"{at}mlp.down_proj.weight"] = (HIDDEN, INNER)
        found[f"{at}input_layernorm.weight"] = (HIDDEN,)
        found[f"{at}post_attention_layernorm.weight"] = (HIDDEN,)
    found["model.norm.weight"] = (HIDDEN,)
    found["lm_head.weight"] = (VOCABULARY, HIDDEN)
    return found


def make_models(folder: Path, gigabytes: float) -> int:
    """Write folder/base and folder/adapter of random numbers; returns the base's bytes."""
    layers = max(1, round((gigabytes * 1e9 - ENDS_BYTES) / LAYER_BYTES))
    tensors = shapes(layers)
    (folder / "base").mkdir(parents=True)
    (folder / "adapter").mkdir()
    make_base(folder / "base", tensors, layers)
    make_adapter(folder / "adapter", folder / "base", tensors)
    return sum(2 * math.prod(shape) for shape in tensors.values())


def make_base(base: Path, tensors: dict[str, tuple[int, ...]], layers: int) -> None:
    """Write a Llama's shards, index and configuration."""
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(0)
    noise = torch.randn(1 << 24).mul_(0.02).bfloat16()  # drawn once: repeated, it is as good
    places = {}
    shard = {}
    size = 0
    count = 1
    for name, shape in tensors.items():
        length = math.prod(shape)
        start = torch.randint(len(noise) // 2, ()).item()
        repeated = noise[start:].repeat(length // (len(noise) - start) + 1)
        shard[name] = repeated[:length].view(shape).clone()
        places[name] = f"model-{count:05d}.safetensors"
        size += 2 * length
        if size > SHARD or name == "lm_head.weight":
            save_file(shard, base / places[name], metadata={"format": "pt"})
            shard = {}
            size = 0
            count += 1
    total = sum(2 * math.prod(shape) for shape in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": layers,
        "num_attention_heads": HIDDEN // 128,
        "num_key_value_heads": HIDDEN // 128,
        "vocab_size": VOCABULARY,
        "tie_word_embeddings": False,
    }
    (base / "config.json").write_text(json.dumps(config))


def make_adapter(folder: Path, base: Path, tensors: dict[str, tuple[int, ...]]) -> None:
    """Write a LoRA on the MLP's matrices."""
    import torch
    from safetensors.torch import save_file

    factors = {}
    for name, shape in tensors.items():
        if ".mlp." in name:
            stem = f"base_model.model.{name.removesuffix('.weight')}"
            factors[f"{stem}.lora_A.weight"] = torch.randn(RANK, shape[1]) * 0.02
            factors[f"{stem}.lora_B.weight"] = torch.randn(shape[0], RANK) * 0.02
    save_file(factors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": RANK,
        "lora_alpha": 16,
        "target_modules": ["gate_proj", "up_proj", "down_proj"],
        "base_model_name_or_path": str(base),
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))


def used(folder: Path) -> int:
    """Sum the bytes on the disk of a folder's files, of which some may be going."""
    total = 0
    for path in folder.rglob("*"):
        try:
            if path.is_file():
                total += path.stat().st_blocks * 512
        except FileNotFoundError:
            pass
    return total


def measure(command: list, scratch: Path, sync: bool = True) -> Measured:
    """Run a command to its end, and until what it wrote is on the disk."""
    command = [str(part) for part in command]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    log_file = scratch.parent / "log"
    peak = 0
    disk = 0
    with log_file.open("w") as log:
        began = time.perf_counter()
        looked = began
        child = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        while child.poll() is None:
            status = Path(f"/proc/{child.pid}/status").read_text(encoding="utf-8")
            found = re.search(r"VmHWM:\s+(\d+) kB", status)  # none once it has ended
            if found:
                peak = max(peak, int(found[1]) * 1024)
            if time.perf_counter() - looked > 0.5:
                disk = max(disk, used(scratch))
                looked = time.perf_counter()
            time.sleep(0.005)
        if sync:
            subprocess.run(["sync"], check=True)
        seconds = time.perf_counter() - began
    if child.returncode:
        sys.exit(f"{command}\n{log_file.read_text()[-3000:]}")
    return Measured(seconds, peak / 1e6, max(disk, used(scratch)) / 1e6)


def make_ready(base: Path, scratch: Path) -> None:
    """Bring about the state in which every run begins."""
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    for path in base.iterdir():
        path.read_bytes()
    subprocess.run(["sync"], check=True)


def tensor_files(folder: Path) -> dict[str, Path]:
    """Map the tensors of a model folder to their files."""
    from safetensors import safe_open

    found = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            found |= dict.fromkeys(file.keys(), path)
    return found


def same_bits(folder: Path, other: Path) -> str:
    """Compare two model folders: "yes", or how many of the tensors differ."""
    from safetensors import safe_open
    from torch import equal

    ours = tensor_files(folder)
    theirs = tensor_files(other)
    differ = len(ours.keys() ^ theirs.keys())
    for name in ours.keys() & theirs.keys():
        with safe_open(ours[name], "pt") as a, safe_open(theirs[name], "pt") as b:
            if not equal(a.get_tensor(name), b.get_tensor(name)):
                differ += 1
    return "yes" if not differ else f"{differ} of {len(ours)} tensors differ"


def commands(folder: Path, out: Path, rivals: Path) -> dict[str, list]:
    """List the methods that are installed, PEFT first: {method: its command}."""
    base = folder / "base"
    adapter = folder / "adapter"
    found = {
        "PEFT": [sys.executable, "-c", PEFT, base, adapter, out],
        "cp": ["cp", "-r", "--reflink=never", base, out],
        "ours": [sys.executable, ROOT / "merge.py", "--adapter", adapter, "--out", out],
        "imports": [sys.executable, "-c", IMPORTS],
    }
    mergekit = rivals / "mergekit-yaml"
    if mergekit.exists():
        recipe = folder / "mergekit.yml"
        model = f"models:\n  - model: {base}+{adapter}\n"
        recipe.write_text(f"{model}merge_method: passthrough\ndtype: bfloat16\n")
        found["mergekit"] = [mergekit, recipe, out, "--lora-merge-cache", out.parent / "cache"]
    return found


def side_by_side(args: argparse.Namespace, scratch: Path) -> None:
    """Print the table of all methods."""
    size = make_models(scratch, args.gigabytes)
    work = scratch / "work"
    kept = scratch / "peft"
    runs: dict[str, list[Measured]] = {}
    bits = {}
    for _ in range(args.runs):
        for name, command in commands(scratch, work / "out", args.rivals).items():
            make_ready(scratch / "base", work)
            runs.setdefault(name, []).append(measure(command, work, sync=name != "imports"))
            if name == "PEFT" and not kept.exists():
                shutil.move(work / "out", kept)
            elif name in ("ours", "mergekit") and name not in bits:
                bits[name] = same_bits(work / "out", kept)
    print(f"{size / 1e9:.2f} GB, medians of {args.runs}\n")
    print_methods(runs, bits, size)
    shutil.rmtree(scratch)


def print_methods(runs: dict[str, list[Measured]], bits: dict[str, str], size: int) -> None:
    """Print one row a method; speeds are PEFT's seconds over the method's."""
    from check_contamination import markdown_table

    seconds = {
        name: statistics.median(run.seconds for run in found) for name, found in runs.items()
    }
    rows = []
    for name in ("cp", "ours", "PEFT", "mergekit", "imports"):
        if name not in runs:
            rows.append([name, "not installed", "", "", "", "", ""])
            continue
        spread = sorted(run.seconds for run in runs[name])
        extra = max(run.disk for run in runs[name]) - size / 1e6
        rows.append(
            [
                name,
                f"{seconds[name]:.2f}",
                f"{spread[0]:.2f}-{spread[-1]:.2f}",
                f"{seconds['PEFT'] / seconds[name]:.2f}",
                f"{statistics.median(run.peak for run in runs[name]):.0f}",
                f"{max(0, extra):.0f}",
                bits.get(name, ""),
            ]
        )
    headers = ["method", "seconds", "range", "PEFT's time / its", "peak MB", "extra disk MB"]
    print(markdown_table([*headers, "bits as PEFT's"], rows))


def memory_by_shard(args: argparse.Namespace, scratch: Path) -> None:
    """Print what ours needs above its imports, for output shards of several sizes."""
    from check_contamination import markdown_table

    make_models(scratch, args.gigabytes)
    work = scratch / "work"
    make_ready(scratch / "base", work)
    imports = measure([sys.executable, "-c", IMPORTS], work, sync=False).peak
    rows = []
    for gigabytes in args.shards.split(","):
        limit = round(float(gigabytes) * 1e9)
        make_ready(scratch / "base", work)
        command = [sys.executable, "-c", WITH_SHARDS, ROOT, limit]
        command += ["--adapter", scratch / "adapter", "--out", work / "out"]
        found = measure(command, work)
        largest = max(path.stat().st_size for path in (work / "out").glob("*.safetensors")) / 1e6
        above = found.peak - imports
        cells = [found.peak, above]
        rows.append(
            [f"{largest:.0f}", *(f"{cell:.0f}" for cell in cells), f"{above / largest:.2f}"]
        )
    print(f"\nimports alone: {imports:.0f} MB\n")
    headers = ["largest output shard, MB", "peak MB", "above imports", "in shards"]
    print(markdown_table(headers, rows))


def main() -> None:
    """Print both tables."""
    args = parse_args()
    with tempfile.TemporaryDirectory(dir=args.scratch, prefix="merge-") as folder:
        side_by_side(args, Path(folder) / "a")
        memory_by_shard(args, Path(folder) / "b")


if __name__ == "__main__":
    main()

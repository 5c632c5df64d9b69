"""Time merging side by side: cp, ours, PEFT, mergekit; then the memory of ours by shard size.

    python benchmarks/merge.py
    python benchmarks/merge.py --gigabytes 0.5 --runs 1 --shards 0.1,0.2

Prints two tables: seconds, peak memory and disk of each method, and whether its bits are PEFT's;
and what ours needs above its imports for output shards of several sizes. The base is a random
bfloat16 Llama in shards of 500 MB, the adapter a random LoRA of rank 16 on the MLP's matrices, the
paper's targets.

Every run is a process of its own that begins with the base's files in the page cache, no output and
nothing to write back, and counts until its bytes are on the disk (`sync`). Memory is the kernel's
own high-water mark of resident memory, mapped files included; "imports" is a process that imports
torch, transformers and peft, and does nothing. mergekit runs from .venv-rivals
(benchmarks/requirements.txt). 10 minutes, 20 GB of disk, 4.5 GB of memory.
"""

import argparse
import contextlib
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
from typing import TYPE_CHECKING, Any

# Last: the package `evaluate` comes before our evaluate.py.
sys.path.append(str(Path(__file__).resolve().parent.parent))
import common

if TYPE_CHECKING:
    import torch

ROOT = Path(__file__).resolve().parent.parent
BASE_SHARD = 500_000_000  # bytes of the base's files
LORA_RANK = 16
LLAMA_HIDDEN = 2048
LLAMA_INNER = 5632
LLAMA_VOCABULARY = 32000
LAYER_BYTES = 2 * (4 * LLAMA_HIDDEN * LLAMA_HIDDEN + 3 * LLAMA_HIDDEN * LLAMA_INNER)  # in bfloat16
ENDS_BYTES = 2 * 2 * LLAMA_VOCABULARY * LLAMA_HIDDEN  # embedding and head
IMPORT_LIBRARIES = """
import torch, transformers, peft
from peft import PeftModel
from transformers import AutoModelForCausalLM
"""
MERGE_BY_PEFT = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
base, adapter, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
model = PeftModel.from_pretrained(model, adapter).merge_and_unload()
model.save_pretrained(out, max_shard_size="5GB")
"""
MERGE_WITH_SHARDS = """
import sys
sys.path.insert(0, sys.argv[1])
import merge
merge.SHARD_SIZE = int(sys.argv[2])
merge.main(sys.argv[3:])
"""
METHOD_ORDER = ("cp", "ours", "PEFT", "mergekit", "imports")  # as the table shows them
Shapes = dict[str, tuple[int, ...]]  # of each tensor by its name


@dataclass
class Measured:
    """One run of a command."""

    seconds: float
    peak: float  # MB of resident memory
    disk: float  # MB at most below the scratch folder


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the sizes and the number of runs."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--gigabytes", type=float, default=4.0, help="of the base (default: 4)")
    parser.add_argument(
        "--runs", type=int, default=5, help="of which the median is shown (default: 5)"
    )
    parser.add_argument(
        "--shards", default="0.5,1,5", help="GB of output shards (default: %(default)s)"
    )
    rivals = ROOT / ".venv-rivals/bin"
    parser.add_argument("--rivals", type=Path, default=rivals, help="default: %(default)s")
    parser.add_argument("--scratch", type=Path, help="folder for the models (default: a new one)")
    return parser.parse_args(argv)


def llama_shapes(layers: int) -> Shapes:
    """List every tensor of a Llama with its shape."""
    shapes: Shapes = {"model.embed_tokens.weight": (LLAMA_VOCABULARY, LLAMA_HIDDEN)}
    for number in range(layers):
        layer = f"model.layers.{number}"
        for matrix in "qkvo":
            shapes[f"{layer}.self_attn.{matrix}_proj.weight"] = (LLAMA_HIDDEN, LLAMA_HIDDEN)
        shapes[f"{layer}.mlp.gate_proj.weight"] = (LLAMA_INNER, LLAMA_HIDDEN)
        shapes[f"{layer}.mlp.up_proj.weight"] = (LLAMA_INNER, LLAMA_HIDDEN)
        shapes[f"{layer}.mlp.down_proj.weight"] = (LLAMA_HIDDEN, LLAMA_INNER)
        shapes[f"{layer}.input_layernorm.weight"] = (LLAMA_HIDDEN,)
        shapes[f"{layer}.post_attention_layernorm.weight"] = (LLAMA_HIDDEN,)
    shapes["model.norm.weight"] = (LLAMA_HIDDEN,)
    shapes["lm_head.weight"] = (LLAMA_VOCABULARY, LLAMA_HIDDEN)
    return shapes


def make_models(folder: Path, gigabytes: float) -> int:
    """Write folder/base and folder/adapter of random numbers; returns the base's bytes."""
    layers = max(1, round((gigabytes * 1e9 - ENDS_BYTES) / LAYER_BYTES))
    shapes = llama_shapes(layers)
    base = folder / "base"
    base.mkdir(parents=True)
    size = write_base_weights(base, shapes)
    write_base_config(base, layers)

    adapter = folder / "adapter"
    adapter.mkdir()
    write_adapter(adapter, base, shapes)
    return size


def write_base_weights(base: Path, shapes: Shapes) -> int:
    """Write the Llama's shards and their index; returns the bytes of its tensors."""
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(0)
    noise = torch.randn(1 << 24).mul_(0.02).bfloat16()  # drawn once: repeated, it is as good
    files = {}
    shard = {}
    shard_size = 0
    total_size = 0
    count = 1
    for name, shape in shapes.items():
        shard[name] = cut_from(noise, shape)
        files[name] = f"model-{count:05d}.safetensors"
        shard_size += shard[name].nbytes
        total_size += shard[name].nbytes
        if shard_size > BASE_SHARD or name == "lm_head.weight":  # which is the last
            save_file(shard, base / files[name], metadata={"format": "pt"})
            shard = {}
            shard_size = 0
            count += 1

    index = {"metadata": {"total_size": total_size}, "weight_map": files}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    return total_size


def cut_from(noise: "torch.Tensor", shape: tuple[int, ...]) -> "torch.Tensor":
    """Return a tensor of noise, from a random place on and repeated as often as it takes."""
    import torch

    length = math.prod(shape)
    start = torch.randint(len(noise) // 2, ()).item()
    times = length // (len(noise) - start) + 1
    return noise[start:].repeat(times)[:length].view(shape).clone()


def write_base_config(base: Path, layers: int) -> None:
    """Write the Llama's configuration."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "hidden_size": LLAMA_HIDDEN,
        "intermediate_size": LLAMA_INNER,
        "num_hidden_layers": layers,
        "num_attention_heads": LLAMA_HIDDEN // 128,
        "num_key_value_heads": LLAMA_HIDDEN // 128,
        "vocab_size": LLAMA_VOCABULARY,
        "tie_word_embeddings": False,
    }
    (base / "config.json").write_text(json.dumps(config))


def write_adapter(folder: Path, base: Path, shapes: Shapes) -> None:
    """Write a LoRA on the MLP's matrices."""
    import torch
    from safetensors.torch import save_file

    factors = {}
    for name, shape in shapes.items():
        if ".mlp." in name:
            module = f"base_model.model.{name.removesuffix('.weight')}"
            factors[f"{module}.lora_A.weight"] = torch.randn(LORA_RANK, shape[1]) * 0.02
            factors[f"{module}.lora_B.weight"] = torch.randn(shape[0], LORA_RANK) * 0.02
    save_file(factors, folder / "adapter_model.safetensors", metadata={"format": "pt"})

    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": LORA_RANK,
        "lora_alpha": 16,
        "target_modules": ["gate_proj", "up_proj", "down_proj"],
        "base_model_name_or_path": str(base),
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))


def bytes_on_disk(folder: Path) -> int:
    """Sum the bytes on the disk of a folder's files, of which some may be going."""
    total = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):
            if path.is_file():
                total += path.stat().st_blocks * 512
    return total


def peak_resident(process_id: int) -> int:
    """Return the most bytes of resident memory of a running process; 0 once it has ended; Linux."""
    status = Path(f"/proc/{process_id}/status").read_text(encoding="utf-8")
    found = re.search(r"VmHWM:\s+(\d+) kB", status)
    if found is None:
        return 0
    return int(found[1]) * 1024


def run_command(command: list[Any], scratch: Path, sync: bool = True) -> Measured:
    """Run a command to its end, and until what it wrote is on the disk."""
    command = [str(part) for part in command]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    log = scratch.parent / "log"
    peak = 0
    disk = 0
    with log.open("w") as file:
        began = time.perf_counter()
        looked = began
        child = subprocess.Popen(command, stdout=file, stderr=file, env=environment)
        while child.poll() is None:
            peak = max(peak, peak_resident(child.pid))
            if time.perf_counter() - looked > 0.5:  # seconds: a look at the disk takes its own
                disk = max(disk, bytes_on_disk(scratch))
                looked = time.perf_counter()
            time.sleep(0.005)
        if sync:
            subprocess.run(["sync"], check=True)
        seconds = time.perf_counter() - began

    if child.returncode != 0:
        sys.exit(f"{command}\n{log.read_text()[-3000:]}")
    disk = max(disk, bytes_on_disk(scratch))
    return Measured(seconds, peak / 1e6, disk / 1e6)


def make_ready(base: Path, scratch: Path) -> None:
    """Empty the scratch folder, read the base into the page cache, write back all else."""
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
            for name in file.keys():
                found[name] = path
    return found


def same_bits(folder: Path, other: Path) -> str:
    """Compare two model folders: "yes", or how many of the tensors differ."""
    import torch
    from safetensors import safe_open

    ours = tensor_files(folder)
    theirs = tensor_files(other)
    differ = len(ours.keys() ^ theirs.keys())
    for name in ours.keys() & theirs.keys():
        with safe_open(ours[name], "pt") as one, safe_open(theirs[name], "pt") as another:
            if not torch.equal(one.get_tensor(name), another.get_tensor(name)):
                differ += 1
    if differ:
        return f"{differ} of {len(ours)} tensors differ"
    return "yes"


def method_commands(folder: Path, out: Path, rivals: Path) -> dict[str, list[Any]]:
    """Return {method: command} of those that are installed, PEFT first: others are held to it."""
    base = folder / "base"
    adapter = folder / "adapter"
    commands = {
        "PEFT": [sys.executable, "-c", MERGE_BY_PEFT, base, adapter, out],
        "cp": ["cp", "-r", "--reflink=never", base, out],
        "ours": [sys.executable, ROOT / "merge.py", "--adapter", adapter, "--out", out],
        "imports": [sys.executable, "-c", IMPORT_LIBRARIES],
    }
    mergekit = rivals / "mergekit-yaml"
    if mergekit.exists():
        recipe = folder / "mergekit.yml"
        model = f"models:\n  - model: {base}+{adapter}\n"
        recipe.write_text(f"{model}merge_method: passthrough\ndtype: bfloat16\n")
        cache = out.parent / "cache"
        commands["mergekit"] = [mergekit, recipe, out, "--lora-merge-cache", cache]
    return commands


def compare_methods(args: argparse.Namespace, folder: Path) -> None:
    """Print the table of all methods."""
    size = make_models(folder, args.gigabytes)
    scratch = folder / "work"
    out = scratch / "out"
    merged_by_peft = folder / "peft"
    commands = method_commands(folder, out, args.rivals)
    runs: dict[str, list[Measured]] = {name: [] for name in commands}
    bits: dict[str, str] = {}
    for _ in range(args.runs):
        for name, command in commands.items():
            make_ready(folder / "base", scratch)
            runs[name].append(run_command(command, scratch, sync=name != "imports"))
            if name == "PEFT" and not merged_by_peft.exists():
                shutil.move(out, merged_by_peft)
            elif name in ("ours", "mergekit") and name not in bits:
                bits[name] = same_bits(out, merged_by_peft)

    print(f"{size / 1e9:.2f} GB, medians of {args.runs}\n")
    print_methods(runs, bits, size / 1e6)
    shutil.rmtree(folder)


def median_seconds(runs: list[Measured]) -> float:
    """Return the median of the runs' seconds."""
    return statistics.median(run.seconds for run in runs)


def print_methods(runs: dict[str, list[Measured]], bits: dict[str, str], base: float) -> None:
    """Print one row a method, with disk beyond the base's MB; speeds are PEFT's time over its."""
    peft = median_seconds(runs["PEFT"])
    rows = []
    for name in METHOD_ORDER:
        if name not in runs:
            rows.append([name, "not installed", "", "", "", "", ""])
            continue
        seconds = [run.seconds for run in runs[name]]
        median = median_seconds(runs[name])
        peak = statistics.median(run.peak for run in runs[name])
        extra = max(run.disk for run in runs[name]) - base
        row = [name, f"{median:.2f}", f"{min(seconds):.2f}-{max(seconds):.2f}"]
        row += [f"{peft / median:.2f}", f"{peak:.0f}", f"{max(0, extra):.0f}"]
        row.append(bits.get(name, ""))
        rows.append(row)

    headers = ["method", "seconds", "range", "PEFT's time / its", "peak MB", "extra disk MB"]
    headers.append("bits as PEFT's")
    print(common.markdown_table(headers, rows))


def compare_shards(args: argparse.Namespace, folder: Path) -> None:
    """Print what ours needs above its imports, for output shards of several sizes."""
    make_models(folder, args.gigabytes)
    scratch = folder / "work"
    out = scratch / "out"
    make_ready(folder / "base", scratch)
    imports = run_command([sys.executable, "-c", IMPORT_LIBRARIES], scratch, sync=False)

    rows = []
    for gigabytes in args.shards.split(","):
        limit = round(float(gigabytes) * 1e9)
        make_ready(folder / "base", scratch)
        command = [sys.executable, "-c", MERGE_WITH_SHARDS, ROOT, limit]
        command += ["--adapter", folder / "adapter", "--out", out]
        run = run_command(command, scratch)
        largest = max(path.stat().st_size for path in out.glob("*.safetensors")) / 1e6
        above = run.peak - imports.peak
        row = [f"{largest:.0f}", f"{run.peak:.0f}", f"{above:.0f}", f"{above / largest:.2f}"]
        rows.append(row)

    print(f"\nimports alone: {imports.peak:.0f} MB\n")
    headers = ["largest output shard, MB", "peak MB", "above imports", "in shards"]
    print(common.markdown_table(headers, rows))


def main() -> None:
    """Print both tables."""
    args = parse_args()
    with tempfile.TemporaryDirectory(dir=args.scratch, prefix="merge-") as folder:
        compare_methods(args, Path(folder) / "a")
        compare_shards(args, Path(folder) / "b")


if __name__ == "__main__":
    main()

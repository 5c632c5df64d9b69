"""Merging side by side: cp + sync, ours, PEFT, mergekit; then the memory of ours by model size.

A random bfloat16 Llama in shards of 500 MB and a random LoRA of rank 16 on the MLP's matrices, the
paper's targets. Every run is a process of its own that begins with the base's files in the page
cache, no output and nothing to write back, and counts until its bytes are on the disk (`sync`).
Rivals that are not in our environment run from .venv-rivals (benchmarks/requirements.txt). Memory
is the kernel's own high-water mark of resident memory, mapped files included. 10 minutes, 12 GB of
disk.

    python benchmarks/merge.py
    python benchmarks/merge.py --gigabytes 0.5 --runs 1 --sizes 0.2,0.4
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
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))
SHARD = 500_000_000  # bytes
RANK = 16
WIDE = (8192, 28672)  # hidden and intermediate size of the 70B: its largest matrices
PEFT = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
base, adapter, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
model = PeftModel.from_pretrained(model, adapter).merge_and_unload()
model.save_pretrained(out, max_shard_size="500MB")
"""
Sizes = dict[str, tuple[int, ...]]


def parse_args() -> argparse.Namespace:
    """The sizes and the number of runs."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--gigabytes", type=float, default=2.0, help="of the base (default: 2)")
    parser.add_argument("--runs", type=int, default=5, help="of which the median is shown")
    parser.add_argument("--sizes", default="1,2,4", help="GB of the bases for the memory table")
    parser.add_argument("--rivals", type=Path, default=ROOT / ".venv-rivals/bin")
    parser.add_argument("--scratch", type=Path, help="folder for the models (default: a new one)")
    return parser.parse_args()


def shapes(layers: int, hidden: int, inner: int, vocabulary: int) -> Sizes:
    """Every tensor of a Llama with its shape."""
    found: Sizes = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for number in range(layers):
        at = f"model.layers.{number}."
        found |= {f"{at}self_attn.{m}_proj.weight": (hidden, hidden) for m in "qkvo"}
        found |= {f"{at}mlp.{m}_proj.weight": (inner, hidden) for m in ("gate", "up")}
        found[f"{at}mlp.down_proj.weight"] = (hidden, inner)
        norms = ("input_layernorm", "post_attention_layernorm")
        found |= {f"{at}{norm}.weight": (hidden,) for norm in norms}
    return found | {"model.norm.weight": (hidden,), "lm_head.weight": (vocabulary, hidden)}


def make_models(folder: Path, layers: int, hidden: int, inner: int, vocabulary: int = 32000) -> int:
    """Write folder/base and folder/adapter; returns the base's bytes."""
    import torch
    from safetensors.torch import save_file

    base, adapter = folder / "base", folder / "adapter"
    base.mkdir(parents=True), adapter.mkdir()
    torch.manual_seed(0)
    noise = torch.randn(1 << 24).mul_(0.02).bfloat16()
    where, shard, size, count = {}, {}, 0, 0
    tensors = shapes(layers, hidden, inner, vocabulary)
    for number, (name, shape) in enumerate(tensors.items()):
        length = math.prod(shape)
        start = torch.randint(len(noise) // 2, ()).item()
        repeated = noise[start:].repeat(length // (len(noise) - start) + 1)
        shard[name] = repeated[:length].view(shape).clone()
        size += 2 * length
        if size > SHARD or number == len(tensors) - 1:
            count += 1
            save_file(shard, base / f"model-{count:05d}.safetensors", metadata={"format": "pt"})
            where |= dict.fromkeys(shard, f"model-{count:05d}.safetensors")
            shard, size = {}, 0
    total = sum(2 * math.prod(shape) for shape in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    heads = {"num_attention_heads": hidden // 128, "num_key_value_heads": hidden // 128}
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16",
              "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers,
              "vocab_size": vocabulary, "tie_word_embeddings": False, **heads}  # fmt: skip
    (base / "config.json").write_text(json.dumps(config))
    factors = {}
    for name, shape in tensors.items():
        if ".mlp." in name:
            stem = f"base_model.model.{name.removesuffix('.weight')}"
            factors[f"{stem}.lora_A.weight"] = torch.randn(RANK, shape[1]) * 0.02
            factors[f"{stem}.lora_B.weight"] = torch.randn(shape[0], RANK) * 0.02
    save_file(factors, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": 16,
              "target_modules": ["gate_proj", "up_proj", "down_proj"],
              "base_model_name_or_path": str(base)}  # fmt: skip
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    return total


def used(folder: Path) -> int:
    """Bytes of a folder's files, of which some may be going."""
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_blocks * 512 if path.is_file() else 0
        except FileNotFoundError:
            pass
    return total


def measure(command: list, scratch: Path, sync: bool = True) -> tuple[float, float, float]:
    """(seconds, peak resident MB, peak MB on disk below `scratch`) of a command."""
    command = [str(part) for part in command]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    with (scratch.parent / "log").open("w") as log:
        began = time.perf_counter()
        child = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        peak, disk, looked = 0, 0, began
        while child.poll() is None:
            status = Path(f"/proc/{child.pid}/status").read_text(encoding="utf-8")
            if found := re.search(r"VmHWM:\s+(\d+) kB", status):  # none once it has ended
                peak = max(peak, int(found[1]) * 1024)
            if time.perf_counter() - looked > 0.5:
                disk, looked = max(disk, used(scratch)), time.perf_counter()
            time.sleep(0.005)
        if sync:
            subprocess.run(["sync"], check=True)
        seconds = time.perf_counter() - began
    if child.returncode:
        sys.exit(f"{command}\n{(scratch.parent / 'log').read_text()[-3000:]}")
    return seconds, peak / 1e6, max(disk, used(scratch)) / 1e6


def ready(base: Path, scratch: Path) -> None:
    """The state in which every run begins."""
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    for path in base.iterdir():
        path.read_bytes()
    subprocess.run(["sync"], check=True)


def same_bits(folder: Path, other: Path) -> str:
    """ "yes", or how many of the tensors differ."""
    from safetensors import safe_open
    from torch import equal

    def tensors(place: Path) -> dict[str, Path]:
        found = {}
        for path in place.glob("*.safetensors"):
            with safe_open(path, "pt") as file:
                found |= dict.fromkeys(file.keys(), path)
        return found

    ours, theirs, differ = tensors(folder), tensors(other), 0
    for name in ours.keys() | theirs.keys():
        if name not in ours or name not in theirs:
            differ += 1
            continue
        with safe_open(ours[name], "pt") as a, safe_open(theirs[name], "pt") as b:
            differ += not equal(a.get_tensor(name), b.get_tensor(name))
    return "yes" if not differ else f"{differ} of {len(ours)} tensors differ"


def commands(folder: Path, out: Path, rivals: Path) -> dict[str, list | None]:
    """{method: its command}, None where it is not installed."""
    base, adapter = folder / "base", folder / "adapter"
    recipe = folder / "mergekit.yml"
    recipe.write_text(f"models:\n  - model: {base}+{adapter}\nmerge_method: passthrough\n"
                      "dtype: bfloat16\n")  # fmt: skip
    mergekit = rivals / "mergekit-yaml"
    return {
        "cp": ["cp", "-r", "--reflink=never", base, out],
        "ours": [sys.executable, ROOT / "merge.py", "--adapter", adapter, "--out", out],
        "PEFT": [sys.executable, "-c", PEFT, base, adapter, out],
        "mergekit": [mergekit, recipe, out, "--lora-merge-cache", out.parent / "cache"]
        if mergekit.exists()
        else None,
    }


def side_by_side(args: argparse.Namespace, scratch: Path) -> None:
    """Print the table of all methods."""
    from check_contamination import markdown_table

    layers = max(1, round((args.gigabytes * 1e9 - 4 * 32000 * 2048) / 2 / 51_384_320))
    size = make_models(scratch, layers, 2048, 5632)
    work, kept = scratch / "work", scratch / "peft"
    todo = commands(scratch, work / "out", args.rivals)
    taken: dict[str, list] = {name: [] for name in todo}
    bits = {}
    for _ in range(args.runs):
        for name in ("PEFT", *(name for name in todo if name != "PEFT")):
            if todo[name] is None:
                continue
            ready(scratch / "base", work)
            taken[name].append(measure(todo[name], work))
            if name == "PEFT" and not kept.exists():
                shutil.move(work / "out", kept)
            elif name not in bits and name not in ("cp", "PEFT"):
                bits[name] = same_bits(work / "out", kept)
        ready(scratch / "base", work)
        taken.setdefault("import torch", []).append(
            measure([sys.executable, "-c", "import torch"], work, sync=False)
        )
    middle = {
        n: [statistics.median(c) for c in zip(*r, strict=True)] for n, r in taken.items() if r
    }
    cp, peft, torch = (middle[name] for name in ("cp", "PEFT", "import torch"))
    rows = []
    for name in ("cp", "ours", "PEFT", "mergekit", "import torch"):
        if name not in middle:
            rows.append([name, "not installed", *[""] * 7])
            continue
        seconds, peak, disk = middle[name]
        spread = [run[0] for run in taken[name]]
        rows.append(
            [f"{name} + sync" if name == "cp" else name, f"{seconds:.2f}",
             f"{min(spread):.2f}-{max(spread):.2f}", f"{seconds / cp[0]:.1f}",
             f"{(seconds - torch[0]) / cp[0]:.1f}" if name not in ("cp", "import torch") else "",
             f"{peft[0] / seconds:.1f}", f"{peak:.0f}", f"{max(0, disk - size / 1e6):.0f}",
             bits.get(name, "")]
        )  # fmt: skip
    print(f"{size / 1e9:.2f} GB, {layers} layers, medians of {args.runs}\n")
    print(markdown_table(
        ["method", "seconds", "range", "x cp", "x cp without import", "PEFT's time / its",
         "peak MB", "extra disk MB", "bits as PEFT's"], rows))  # fmt: skip
    shutil.rmtree(scratch)


def memory_by_size(args: argparse.Namespace, scratch: Path) -> None:
    """Print what ours needs above `import torch`, for models and matrices of several sizes."""
    from check_contamination import markdown_table

    scratch.mkdir(exist_ok=True)
    (scratch / "none").mkdir()
    bare = measure([sys.executable, "-c", "import torch"], scratch / "none", sync=False)[1]
    sizes = {f"{gb} GB": (max(1, round((float(gb) * 1e9 - 262e6) / 102.8e6)), 2048, 5632, 32000)
             for gb in args.sizes.split(",")}  # fmt: skip
    rows = []
    for name, size in (sizes | {"two layers of the 70B": (2, *WIDE, 4096)}).items():
        folder = scratch / "models"
        total = make_models(folder, *size)
        ready(folder / "base", folder / "work")
        command = commands(folder, folder / "work/out", args.rivals)["ours"]
        seconds, peak, _ = measure(command, folder / "work")
        rows.append([name, f"{total / 1e9:.2f}", f"{size[1]} x {size[2]}", f"{seconds:.1f}",
                     f"{peak:.0f}", f"{peak - bare:.0f}"])  # fmt: skip
        shutil.rmtree(folder)
    print(f"\nimport torch alone: {bare:.0f} MB\n")
    headers = ["model", "GB", "largest matrix", "seconds", "peak MB", "above import torch"]
    print(markdown_table(headers, rows))


def main() -> None:
    """Both tables."""
    args = parse_args()
    with tempfile.TemporaryDirectory(dir=args.scratch, prefix="merge-") as folder:
        side_by_side(args, Path(folder) / "a")
        memory_by_size(args, Path(folder) / "b")


if __name__ == "__main__":
    main()

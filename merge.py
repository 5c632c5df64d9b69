"""Merge LoRA adapters into a model, a block of rows at a time, and prove what was written.

Step 4 of 5 (paper, section 3.2). Reads a base model (folder or hub id, safetensors) and adapters
in PEFT's layout; writes out/merged/: a Hugging Face model folder with the base's own config,
tokenizer and shards, a model card (README.md) and run.json.

    python merge.py --adapter out/lora --out out/small
    python merge.py
    python merge.py --adapter out/a --adapter out/b:0.5 --out out/both
    python merge.py --base-model other --foreign-base --partner-check out/other --out out/camel

The model is never loaded: its tensors are read, changed where an adapter says so, and written in
blocks of rows. Time: a small multiple of copying the base (benchmarks/merge.py); memory: some
blocks beside torch (measured: README.md). One adapter of weight 1 gives the bits of PEFT's
merge_and_unload; several give the exact weighted sum of their changes, rounded once. Then sampled
rows of every changed tensor are computed again, every other tensor is compared byte by byte, and
only then does the folder get its name. Kinds of LoRA that are not W + scale * B @ A are refused.
"""

import argparse
import hashlib
import itertools
import json
import math
import os
import random
import re
import shlex
import shutil
import struct
import sys
import threading
import time
from collections import Counter, deque, namedtuple
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import build_dataset as shared
from build_dataset import UserError, check_output, output_folder, refuse
from check_contamination import (
    check_input,
    check_listed,
    markdown_table,
    read_decisions,
    read_jsonl,
)

if TYPE_CHECKING:
    import torch

BLOCK_ELEMENTS = 1 << 18  # of a tensor in work at a time: 1 MB in float32, a core's L2 cache
AHEAD = 2 << 20  # bytes that may wait to be written and hashed
ROWS = 64  # blocks start at a multiple of this: BLAS sums in another order where B is unaligned
SAMPLED = 4  # neighbouring rows computed again in each of three places of a changed tensor
WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth")
OTHER_FILES = (".safetensors", *PICKLES, ".gguf", ".h5", ".msgpack", ".onnx")  # of weights
EPS = {"F64": 2**-52, "F32": 2**-23, "F16": 2**-10, "BF16": 2**-7}  # from 1 to the next number
HEADS = ("lm_head", "embed_out")  # transformers' names of the output layer ...
ENDS = (*HEADS, "embed_tokens", "wte", "word_embeddings", "embed_in")  # ... and the embedding
CONV1D = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")  # store [in, out] matrices
PREFIX = "base_model.model."  # PEFT's, before each key of an adapter
FIELDS = {  # of adapter_config.json
    **dict.fromkeys(("use_rslora", "use_dora", "fan_in_fan_out"), bool),
    **{"peft_type": str, "base_model_name_or_path": str, "r": int, "lora_alpha": (int, float)},
    **{"rank_pattern": dict, "alpha_pattern": dict},
}
UNSUPPORTED = (  # PEFT's settings under which an adapter is more than W + scale * B @ A
    "target_parameters trainable_token_indices layer_replication alora_invocation_tokens use_qalora"
    " use_bdlora arrow_config velora_config kasa_config monteclora_config megatron_config"
).split()
PLAIN_INITS = (True, False, None, "gaussian", "eva", "orthogonal")  # the others change the base
NF4 = {"quant_type": "nf4", "blocksize": 64}  # QLoRA's; 256 of its scales share a scale in turn
FACTS = "model_type vocab_size hidden_size num_hidden_layers dtype tie_word_embeddings".split()
Adapter = namedtuple("Adapter", "folder weight config tensors")  # tensors: {key: Stored}
PROBE = "Below is an instruction that describes a task. At which temperature does water boil?"


class Stored(NamedTuple):
    """A tensor in a safetensors file, seen as a matrix: all dimensions but the first are one."""

    path: Path
    dtype: str  # safetensors' name of it
    shape: tuple[int, ...]
    begin: int  # bytes from the file's start
    end: int
    state: tuple[int, ...]  # of the file, by file_state(), before its header was read

    def raw(self, rows: slice) -> "torch.Tensor":
        """The bytes of these rows: uint8 [len(rows), bytes of a row]."""
        import torch

        count = (self.shape or (1,))[0]
        top, bottom, _ = rows.indices(count)
        block = torch.empty((bottom - top, (self.end - self.begin) // count), dtype=torch.uint8)
        with self.path.open("rb") as file:  # not mapped: what is read is all the memory it takes
            file.seek(self.begin + top * block.shape[1])
            file.readinto(block.numpy())
        self.check()
        return block

    def check(self) -> None:
        """Refuse a file that has changed since: nobody knows what was read of it."""
        if shared.file_state(self.path) != self.state:
            raise UserError(f"{self.path} changed while it was read: run the command again")

    def read(self, rows: slice = slice(None)) -> "torch.Tensor":
        """These rows: [len(rows), columns]."""
        import torch

        name = self.dtype.replace("BF", "bfloat").replace("F", "float")  # torch's: BF16, F32, ...
        return self.raw(rows).view(getattr(torch, name))

    def blocks(self, elements: int = 0) -> Iterator[slice]:
        """Its rows in blocks of about `elements` numbers that begin at a multiple of ROWS."""
        rows, columns = (self.shape or (1,))[0], math.prod(self.shape[1:]) or 1
        step = max(1, (elements or BLOCK_ELEMENTS) // columns // ROWS) * ROWS
        return (slice(top, min(top + step, rows)) for top in range(0, rows, step))


class Part(NamedTuple):
    """What one adapter makes of one tensor W: W or its saved copy, plus scale * B @ A."""

    weight: float  # of the adapter among several
    scale: float = 1.0
    a: Stored | None = None  # [rank, in_features]; of an embedding [rank, vocabulary]
    b: Stored | None = None  # [out_features, rank]; of an embedding [dimension, rank]
    magnitude: Stored | None = None  # DoRA's: the norms that the rows of the sum are given
    saved: Stored | None = None  # trained whole: modules_to_save, biases, embeddings
    embedding: bool = False
    transposed: bool = False  # W has the shape of (B @ A).T: embeddings and Conv1D


@dataclass
class Plan:
    """What becomes of the base's tensors."""

    base: Path
    config: dict[str, Any]
    shards: list[str]
    tensors: dict[str, Stored]  # also of a head that was the embedding and becomes its own tensor
    shared: str | None  # the embedding, where the base has no head of its own
    parts: dict[str, list[Part]] = field(default_factory=dict)
    nf4: set[str] = field(default_factory=set)  # matrices that the training had quantised
    dequantised: bool = False  # ... and that stay what quantisation made of them
    norms: dict[str, list[float]] | None = None  # layer: squares of weights, change, NF4's error

    def changed(self) -> set[str]:
        """The tensors that do not keep the base's bytes."""
        return self.parts.keys() | (self.nf4 if self.dequantised else set())


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags of this step; every impossible setting is named at once."""
    parser = shared.make_parser(__doc__, "out/merged")
    add = parser.add_argument_group("models").add_argument
    text = "adapter folder, times WEIGHT (default 1); repeatable (default: out/adapter)"
    add("--adapter", action="append", metavar="DIR[:WEIGHT]", help=text)
    add("--base-model", metavar="MODEL", help="folder or hub id (default: the adapter's own)")
    text = "add an adapter trained on NF4 to what NF4 made of the base (default: to the base)"
    add("--dequantised-base", action="store_true", help=text)
    add = parser.add_argument_group("checks").add_argument
    text = "merge into a model that the adapter was not trained on; prints a table of norms"
    add("--foreign-base", action="store_true", help=text)
    text = "check_contamination.py's folder of the data that the other model was trained on"
    add("--partner-check", type=Path, metavar="DIR", help=text)
    text = "merge although pairs in --partner-check are not decided not-a-leak (paper: never)"
    add("--allow-contaminated", action="store_true", help=text)
    text = "compare logits with those of base + adapter (loads one model at a time)"
    add("--check-logits", action="store_true", help=text)
    args = parser.parse_args(argv)
    args.adapter = [split_weight(item) for item in args.adapter or ["out/adapter"]]
    alone = args.allow_contaminated and not args.partner_check
    several = len(args.adapter) > 1 or args.adapter[0][1] != 1
    refuse(
        {
            "--limit does not apply: a merge is whole": args.limit,
            f"--device {args.device}: merging runs on the cpu": args.device not in (None, "cpu"),
            "--allow-contaminated does nothing without --partner-check": alone,
            "--check-logits takes one adapter of weight 1": args.check_logits and several,
        }
    )
    return args


def split_weight(item: str) -> tuple[str, float]:
    """DIR[:WEIGHT] as (folder, weight).

    >>> split_weight("out/a:0.5"), split_weight("out/a")
    (('out/a', 0.5), ('out/a', 1.0))
    """
    folder, colon, weight = item.rpartition(":")
    if not colon or Path(item).is_dir():
        return item, 1.0
    number = re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", weight)
    if not number or not 0 < abs(float(weight)) < 1e6:
        raise UserError(f"--adapter {item}: the weight {weight!r} is not a number other than 0")
    return folder, float(weight)


def read_json(path: Path, fields: dict[str, Any]) -> dict[str, Any]:
    """A JSON object whose `fields`, where there and not null, are of these types."""
    data = shared.read_json(path)
    for name, kind in fields.items():
        value = data.get(name)
        fits = isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
        refuse({f"{path}: {name} cannot be {value!r:.60}": value is not None and not fits})
    return data


def read_header(path: Path) -> dict[str, Stored]:
    """The tensors of a safetensors file by name, in the order of their bytes.

    The format: 8 bytes with the header's length, the header as JSON, then the tensors' bytes.
    """
    from safetensors import SafetensorError, safe_open

    state = shared.file_state(path)
    try:
        with safe_open(path, "np") as file:  # checks types, sizes, gaps, and the file's length
            names = file.offset_keys()
    except SafetensorError as error:
        raise UserError(f"{path} is cut short or no safetensors file: {error}") from None
    with path.open("rb") as file:
        start = 8 + struct.unpack("<Q", file.read(8))[0]
        header = json.loads(file.read(start - 8))
    places = {name: (start + at for at in header[name]["data_offsets"]) for name in names}
    about = {name: (header[name]["dtype"], tuple(header[name]["shape"])) for name in names}
    return {name: Stored(path, *about[name], *places[name], state) for name in names}


def read_adapter(folder: Path, weight: float) -> Adapter:
    """The adapter's configuration and tensors; refuses by name what a merge would get wrong."""
    mend = "write it with: python finetune.py, or name another --adapter"
    path = check_input(check_input(folder, mend) / "adapter_config.json", mend)
    config = read_json(path, FIELDS)
    kind, init = config.get("peft_type"), config.get("init_lora_weights")
    used = [f"{name} = {config[name]!r:.40}" for name in UNSUPPORTED if config.get(name)]
    numbers = [config.get("r"), *(config.get("rank_pattern") or {}).values()]
    wrong = [r for r in numbers if type(r) is not int or not 0 < r < 1e6]
    numbers = [config.get("lora_alpha"), *(config.get("alpha_pattern") or {}).values()]
    wrong += [a for a in numbers if type(a) not in (int, float) or not abs(a) < 1e6]
    weights, pickle = folder / "adapter_model.safetensors", folder / "adapter_model.bin"
    code = f"t.load({str(pickle)!r}, weights_only=True), {str(weights)!r}"
    code = f"import torch as t, safetensors.torch as s; s.save_file({code})"
    hint = f"a pickle, which may run code; convert it: {shlex.join(['python', '-c', code])}"
    refuse({f"{path}: peft_type is {kind}; only LORA can be merged": kind != "LORA"})
    refuse({f"{path}: {', '.join(used)} cannot be merged here; try PEFT's own merge": used})
    refuse({f"{path}: init_lora_weights = {init!r} changed the base": init not in PLAIN_INITS})
    refuse({f"{path}: {wrong[:1]} is not a rank or an alpha": wrong})
    refuse({f"{pickle} is {hint}": pickle.exists() and not weights.exists()})
    return Adapter(folder, weight, config, read_header(check_listed(check_input(weights, mend))))


def check_numbers(adapter: Adapter) -> None:
    """Refuse an adapter that holds NaN or whole numbers, or that changes nothing."""
    folder, trained = adapter.folder, False
    for name, stored in adapter.tensors.items():
        refuse({f"{folder}: {name} holds {stored.dtype}, not floats": stored.dtype not in EPS})
        sizes = [stored.read(rows).abs().max().item() for rows in stored.blocks()]
        finite = all(map(math.isfinite, sizes))
        refuse({f"{folder}: {name} holds NaN or infinite numbers": not finite})
        # a fresh LoRA has B = 0, of an embedding A = 0
        trained |= any(sizes) and not re.search(r"lora_A|lora_embedding_B|base_layer", name)
    refuse({f"{folder} changes nothing: every B is zero (an untrained adapter)": not trained})


def read_base(name: str) -> Plan:
    """A plan that changes nothing yet, of a folder or hub id; every shard must be there, whole."""
    base = shared.model_folder("--base-model", name)
    path = check_input(base / "config.json", "name a model's folder with --base-model")
    config = read_json(path, {"model_type": str, "tie_word_embeddings": bool, "vocab_size": int})
    refuse({f"{path}: quantised; merge into the original": config.get("quantization_config")})
    listed: dict[str, Any] = {}
    if not (base / WHOLE).exists() and (base / INDEX).exists():  # the order of transformers
        listed = read_json(base / INDEX, {"weight_map": dict}).get("weight_map") or {"": ""}
        bad = [shard for shard in listed.values() if not re.fullmatch(r"\w[\w.-]+", str(shard))]
        refuse({f"{base / INDEX}: {bad[:1]} is no file of its folder": bad})
    shards = sorted(set(map(str, listed.values()))) or [WHOLE]
    if missing := [shard for shard in shards if not (base / shard).is_file()]:
        code = f"M.from_pretrained({str(base)!r}, dtype='auto').save_pretrained('converted')"
        code = f"from transformers import AutoModelForCausalLM as M; {code}"
        pickled = any(file.suffix in PICKLES for file in base.iterdir())
        hint = f"; convert its pickles: {shlex.join(['python', '-c', code])}" if pickled else ""
        raise UserError(f"{base} has no {', '.join(missing[:3])}{hint}")
    tensors = {n: s for shard in shards for n, s in read_header(base / shard).items()}
    lost = [n for n, s in listed.items() if n not in tensors or tensors[n].path.name != s]
    refuse({f"{base / INDEX}: {lost[:1]} is not in the shard that it names": lost})
    ends = [name for name in tensors if layer(name) in ENDS]
    alone = ends[0] if len(ends) == 1 and layer(ends[0]) not in HEADS else None
    return Plan(base, config, shards, tensors, alone)


# --- which tensor of an adapter changes which of the base -----------------------------------------


def layer(tensor: str) -> str:
    """The last name of a tensor's layer: "model.norm.weight" -> "norm"."""
    return tensor.rpartition(".")[0].rpartition(".")[2]


def base_name(name: str, plan: Plan) -> str | None:
    """The base's name of a tensor; a head that is the embedding becomes a tensor of its own."""
    bare = name.partition(".")[2]  # GPT-2's own checkpoint lacks the backbone's name
    if plan.shared and name in [f"{head}.weight" for head in HEADS]:
        plan.tensors.setdefault(name, plan.tensors[plan.shared])
    return name if name in plan.tensors else bare if bare in plan.tensors else None


def add_adapter(adapter: Adapter, plan: Plan) -> None:
    """Add what the adapter changes to the plan; refuses an adapter that would be used in part."""
    left = {name.removeprefix(PREFIX): stored for name, stored in adapter.tensors.items()}
    parts: dict[str, Part] = {}
    for key in sorted(left):
        found = re.fullmatch(r"(.+)\.(lora_A\.weight|lora_embedding_A)", key)
        name = base_name(f"{found[1]}.weight", plan) if found else None
        if name and (b := left.pop(f"{found[1]}.{found[2].replace('_A', '_B')}", None)):
            a, (stem, kind) = left.pop(key), found.groups()
            dora = adapter.config.get("use_dora")
            norms = left.pop(f"{stem}.lora_magnitude_vector", None) if dora else None
            scale = scaling(adapter, stem, a)
            parts[name] = Part(adapter.weight, scale, a, b, norms, embedding="embedding" in kind)
            bias = base_name(f"{stem}.bias", plan)
            if bias and (extra := left.pop(f"{stem}.lora_B.bias", None)):
                parts[bias] = Part(adapter.weight, scale, None, extra)
    for key in sorted(left):
        if name := base_name(key.replace(".base_layer.", "."), plan):
            parts[name] = parts.get(name, Part(adapter.weight))._replace(saved=left.pop(key))
    what = f"{len(left)} of its {len(adapter.tensors)} tensors would be ignored"
    refuse({f"{adapter.folder} does not fit {plan.base}: {what}: {sorted(left)[:5]}": left})
    for name, part in parts.items():
        plan.parts.setdefault(name, []).append(fit_part(adapter, name, part, plan))
    # PEFT adds the LoRA of either to the one tensor that both are, so that the other changes too;
    # what was trained has two, hence the head becomes a tensor of its own
    if plan.shared in plan.parts and not any(layer(name) in HEADS for name in plan.tensors):
        base_name("lm_head.weight", plan)


def scaling(adapter: Adapter, stem: str, a: Stored) -> float:
    """alpha / rank, or alpha / sqrt(rank); of patterns the first that ends the module's name."""
    config, values = adapter.config, []
    for table, default in (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha")):
        try:
            known = (config.get(table) or {}).items()
            fitting = [value for key, value in known if re.match(rf"(.*\.)?({key})$", stem)]
        except re.error as error:
            raise UserError(f"{adapter.folder}/adapter_config.json: {table}: {error}") from None
        values.append([*fitting, config[default]][0])
    (rank, alpha), shape = values, list(a.shape)
    refuse({f"{adapter.folder}: {stem} is {shape}, not of rank {rank}": shape[:1] != [rank]})
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def fit_part(adapter: Adapter, name: str, part: Part, plan: Plan) -> Part:
    """The part with `transposed` settled; refuses shapes and number types that do not fit."""
    base, shapes = plan.tensors[name], [part.saved.shape] if part.saved else []
    hint = f"{name} holds {base.dtype}, not floats; merge into the 16-bit original"
    refuse({f"{base.path}: {hint}": base.dtype not in EPS})
    if part.b and not part.a:  # of a bias
        shapes.append(part.b.shape)
    elif part.b:
        (out, *_), (rank, into, *_) = (*part.b.shape, 0), (*part.a.shape, 0)
        conv1d = plan.config.get("model_type") in CONV1D and layer(name) not in HEADS
        conv1d |= bool(adapter.config.get("fan_in_fan_out")) and out != into
        part = part._replace(transposed=part.embedding or conv1d and base.shape == (into, out))
        shapes.append((into, out) if part.transposed else (out, into))
        norms = part.magnitude.shape if part.magnitude else None
        fit = norms == ((out,) if adapter.config.get("use_dora") else None)
        fit &= part.b.shape == (out, rank) and len(part.a.shape) == 2
        refuse({f"{adapter.folder}: the tensors for {name} do not fit each other": not fit})
    wrong = [list(shape) for shape in shapes if shape != base.shape]
    of = " (another vocabulary)" if layer(name) in ENDS else ""
    what = f"{name} is {list(base.shape)} there, not {wrong[:1]}{of}"
    refuse({f"{adapter.folder} does not fit {plan.base}: {what}": wrong})
    return part


# --- a block of rows ------------------------------------------------------------------------------


def load_factors(part: Part, exact: bool) -> list[Any]:
    """[A, B, magnitude] of a part in float32, or float64 if exact; None for what it has not."""
    read = [stored.read() if stored else None for stored in (part.a, part.b, part.magnitude)]
    factors = [t if t is None else t.double() if exact else t.float() for t in read]
    if part.b and not part.a:
        factors[0] = factors[1].new_ones((1, 1))  # of a bias: B @ 1
    return factors


def part_rows(part: Part, factors: list, w: "torch.Tensor", rows: slice) -> "torch.Tensor":
    """What one adapter makes of the rows `w` [len(rows), columns], before rounding, as in PEFT.

    PEFT sums in the wider of the two number types, but of an embedding it rounds the change first.
    """
    a, b, magnitude = factors
    if part.saved:
        w = part.saved.read(rows).to(w.dtype)
    if b is None:
        return w
    total = (b @ a[:, rows]).T if part.transposed else b[rows] @ a
    total *= part.scale
    if part.embedding and magnitude is None:
        return w + total.to(w.dtype)
    if magnitude is None:
        for some, of_w in zip(total.split(8), w.split(8), strict=True):
            some += of_w  # by pieces, for torch first copies what it adds to float32
        return total
    total = w + total  # in W's own memory layout, on which the order of summing the norms depends
    # DoRA sets the norm of every output; the rows of a transposed W are inputs
    outputs, wanted = (total.T, magnitude) if part.transposed else (total, magnitude[rows])
    outputs *= wanted / outputs.norm(dim=1, keepdim=True)
    return total


def elements_of(parts: list[Part], stored: Stored) -> int:
    """More than the whole matrix where DoRA's norms run down its columns, else 0: a block."""
    down = any(part.magnitude and part.transposed for part in parts)
    return math.prod(stored.shape) * ROWS * down


def exact_rows(parts: list, factors: list, w: "torch.Tensor", rows: slice) -> "torch.Tensor":
    """The rows `w` + the sum of weight * change of all parts, in float64."""
    total = w = w.double()
    for part, loaded in zip(parts, factors, strict=True):
        total = total + part.weight * (part_rows(part, loaded, w, rows) - w)
    return total


def round_once(exact: "torch.Tensor", dtype: "torch.dtype") -> "torch.Tensor":
    """float64 to the nearest `dtype`, ties to even.

    torch goes by way of float32, which may round onto a tie; rounded to odd there, it cannot.
    """
    import torch

    near = exact.float()
    beyond = torch.where(exact > near, math.inf, -math.inf).float()
    even = (exact != near) & (near.view(torch.int32) & 1 == 0)
    odd = torch.where(even, torch.nextafter(near, beyond), near)
    return odd.to(dtype) if dtype.itemsize == 2 else exact.to(dtype)


def nf4_of(stored: Stored) -> Any:
    """A function of (rows, index of the first) to what 4-bit training saw in their place.

    QLoRA's NF4: the scales of all blocks of the matrix are quantised once more, together.
    """
    import torch
    from bitsandbytes import functional as bnb

    # as one row: bitsandbytes' CPU code misreads 64 weights that go over the end of a row
    blocks = (stored.read(rows).view(1, -1) for rows in stored.blocks())
    scales = torch.cat([bnb.quantize_4bit(block, **NF4)[1].absmax for block in blocks])
    mean = scales.mean()
    scales = bnb.dequantize_blockwise(*bnb.quantize_blockwise(scales - mean, blocksize=256)) + mean

    def convert(w: "torch.Tensor", top: int) -> "torch.Tensor":
        codes, state = bnb.quantize_4bit(w.view(1, -1), **NF4)
        first = top * w.shape[1] // NF4["blocksize"]
        state.absmax = scales[first : first + len(state.absmax)]
        return bnb.dequantize_4bit(codes, state).view(w.shape)

    return convert


def new_blocks(plan: Plan, name: str) -> Iterator["torch.Tensor"]:
    """The bytes of a tensor by blocks of rows: the base's, or changed and rounded once."""
    import torch

    stored, parts = plan.tensors[name], plan.parts.get(name, [])
    if name not in plan.changed():
        yield from (stored.raw(rows) for rows in stored.blocks())
        return
    exact = len(parts) != 1 or parts[0].weight != 1 or stored.dtype == "F64"
    factors = [load_factors(part, exact) for part in parts]
    nf4 = nf4_of(stored) if name in plan.nf4 else None
    for rows in stored.blocks(elements_of(parts, stored)):
        w = stored.read(rows)
        coarse = nf4(w, rows.start) if nf4 else w
        base = coarse if plan.dequantised else w
        sums = (parts, factors) if exact else (parts[0], factors[0])
        total = (exact_rows if exact else part_rows)(*sums, base, rows)
        if plan.norms is not None and parts:
            number = re.search(r"\.(\d+)\.", name)
            found = plan.norms.setdefault(f"layer {number[1]}" if number else name, [0.0] * 3)
            for i, term in enumerate((base, total - base, coarse - w)):
                found[i] += term.double().square().sum().item()
        block = round_once(total, w.dtype) if exact else w.copy_(total)
        del total  # so that it and the next block's are never both in memory
        over = not all(math.isfinite(end.item()) for end in block.aminmax())
        refuse({f"{name}: the sum is not finite in {stored.dtype}": over})
        yield block.contiguous().view(torch.uint8)


# --- writing and proving --------------------------------------------------------------------------


class Beside:
    """Threads that hash, write and sync while the caller computes; a `with` block ends them."""

    def __init__(self) -> None:
        self.ended, self.syncs = threading.Event(), []
        # of files as a whole; the other two take the blocks of one file in their order
        self.files, self.writer, self.hasher = (ThreadPoolExecutor(count) for count in (2, 1, 1))

    def __enter__(self) -> "Beside":
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.set()  # so Ctrl-C waits for a buffer, not for a file
        for pool in (self.files, self.writer, self.hasher):
            pool.shutdown(cancel_futures=True)

    def hash(self, path: Path) -> Future:
        """The sha256 of a file, once it is known."""
        return self.files.submit(self._hash, path)

    def _hash(self, path: Path) -> str:
        digest, buffer = hashlib.sha256(), memoryview(bytearray(4 << 20))  # 2 ms of work
        with path.open("rb", buffering=0) as file:
            while not self.ended.is_set() and (size := file.readinto(buffer)):
                digest.update(buffer[:size])
        return digest.hexdigest()

    def write(self, path: Path, blocks: Iterator[Any]) -> Future:
        """Write a file of these blocks of bytes; its sha256, once it is known. See sync()."""
        digest, waiting, size = hashlib.sha256(), deque(), 0
        with path.open("wb") as file:
            for block in blocks:
                size += (more := memoryview(block).nbytes)
                written = self.writer.submit(file.write, block)
                waiting.append((more, [written, self.hasher.submit(digest.update, block)]))
                del block  # so that it is not in memory beside the next one
                while size > AHEAD:
                    size -= waiting[0][0]
                    wait(waiting.popleft()[1])
            for _, jobs in waiting:
                wait(jobs)
        self.syncs.append(self.files.submit(self._sync, path))
        return self.hasher.submit(digest.hexdigest)

    def _sync(self, path: Path) -> None:
        with path.open("rb") as file:
            os.fsync(file.fileno())

    def sync(self) -> None:
        """Return when all that was written is on the disk. Raises OSError."""
        wait(self.syncs)


def wait(jobs: Iterable[Future]) -> None:
    """Return when all jobs are done; raises what one of them raised."""
    for job in jobs:
        job.result()


def shard_bytes(plan: Plan, shard: str) -> Iterator[Any]:
    """A new shard's bytes, with a new head behind its embedding: the header, then its blocks."""
    mine = {name: stored for name, stored in plan.tensors.items() if stored.path.name == shard}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers asks for it
    end = 0
    for name, stored in mine.items():
        places = [end, end := end + stored.end - stored.begin]
        header[name] = {"dtype": stored.dtype, "shape": stored.shape, "data_offsets": places}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the tensors' bytes begin at a multiple of 8
    yield struct.pack("<Q", len(text)) + text
    for name in mine:
        yield from (block.numpy() for block in new_blocks(plan, name))


def write_shards(plan: Plan, out: Path, seed: int, beside: Beside) -> Counter:
    """Write every shard and read it again: what proved them."""
    proof = Counter()
    for number, shard in enumerate(plan.shards, 1):
        beside.write(out / shard, shard_bytes(plan, shard))
        for name, new in read_header(out / shard).items():
            proof += prove(plan, name, new, seed)
        print(f"shard {number} of {len(plan.shards)} written and proved", file=sys.stderr)
    return proof


def prove(plan: Plan, name: str, new: Stored, seed: int) -> Counter:
    """Compare a written tensor: sampled rows with a float64 sum, or if unchanged every byte."""
    old, parts = plan.tensors[name], plan.parts.get(name, [])
    if name not in plan.changed():
        pairs = ((old.raw(rows).numpy(), new.raw(rows).numpy()) for rows in old.blocks())
        same = old[1:3] == new[1:3] and all(a.tobytes() == b.tobytes() for a, b in pairs)
        assert same, f"{name} in {new.path} is not what {old.path} holds"
        return Counter(tensors_equal_to_base=1)
    factors, count = [load_factors(part, exact=True) for part in parts], (old.shape or (1,))[0]
    nf4 = nf4_of(old) if plan.dequantised and name in plan.nf4 else None
    sample = count if elements_of(parts, old) else ROWS if nf4 else SAMPLED
    last = (count - 1) // ROWS * ROWS if sample < count else 0
    tops = {0, random.Random(f"{seed} {name}").randrange(0, last + 1, ROWS), last}
    for rows in [slice(top, min(top + sample, count)) for top in tops]:
        w = nf4(old.read(rows), rows.start) if nf4 else old.read(rows)
        expected = exact_rows(parts, factors, w, rows)
        change = (expected - w).abs()
        # a unit in the last place of whatever was rounded; float32 errs in all terms of a row
        slack = EPS[new.dtype] * (expected.abs() + w.abs() + change) + 1e-5 * change.max()
        off = ((new.read(rows) - expected).abs() - slack).max().item()
        assert off <= 0, f"{name} in {new.path} is off by {off} in rows {rows}"
    return Counter(rows_computed_again=len(tops) * min(sample, count))


def check_logits(plan: Plan, adapter: Path, merged: Path) -> dict[str, float]:
    """Relative distances of the merged model's logits to base + adapter's and to the base's.

    In float32, so that all that is left is the rounding of the merged weights; UserError if the
    first is above 16 units of it.
    """
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    ids = torch.arange(16)[None] % (plan.config.get("vocab_size") or 16)
    if any((plan.base / name).exists() for name in ("tokenizer.json", "tokenizer.model")):
        ids = AutoTokenizer.from_pretrained(plan.base)(PROBE, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(plan.base, dtype=torch.float32).eval()
        base = model(ids).logits
        both = PeftModel.from_pretrained(model, adapter).eval()(ids).logits
        model = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32).eval()
        ours = model(ids).logits
    found = {"to_base_and_adapter": both, "to_base": base}
    found = {name: ((ours - x).norm() / x.norm()).item() for name, x in found.items()}
    print("logits, relative distance of the merged model:", found)
    most = max(1e-4, *(16 * EPS[plan.tensors[name].dtype] for name in plan.parts))
    far = not found["to_base_and_adapter"] <= most
    refuse({f"--check-logits: merged and base + adapter differ: {found}": far})
    return found


# --- where base, adapter and partner come from ----------------------------------------------------


def open_pairs(folder: Path) -> dict[str, str]:
    """{pair: training row} of the contamination pairs that nobody decided to be not-a-leak."""
    decisions = read_decisions(folder / "decisions.jsonl")
    pairs = read_jsonl(folder / "pairs.jsonl", {"pair_id": str, "train_id": str})
    leaks = (p for p in pairs if decisions.get(p["pair_id"], {}).get("verdict") != "not-a-leak")
    return {pair["pair_id"]: pair["train_id"] for pair in leaks}


def training_of(adapter: Adapter, warnings: list[str]) -> dict[str, Any]:
    """What is known of an adapter: its hash, its data, their licences and leaks; adds warnings."""
    path = adapter.folder / "run.json"
    inputs = read_json(path, {"inputs": dict}).get("inputs") or {} if path.exists() else {}
    about: dict[str, Any] = {"folder": str(adapter.folder), "weight": adapter.weight}
    about["sha256"] = shared.sha256_of(adapter.folder / "adapter_model.safetensors")
    about["data"] = {name: known for name, known in inputs.items() if ".json" in Path(name).suffix}
    for data, known in about["data"].items():
        if Path(data).exists() and isinstance(known, dict):
            if shared.sha256_of(Path(data)) == known.get("sha256"):
                rows = read_jsonl(Path(data), {})
                about["licences"] = Counter(str(row.get("licence", "unknown")) for row in rows)
                if Path(data).with_name("pairs.jsonl").exists():
                    leaks = set(open_pairs(Path(data).parent).values())
                    about["flagged_rows"] = sum(row.get("id") in leaks for row in rows)
                    about["contamination"] = str(Path(data).parent)
    if many := about.get("flagged_rows", "an unknown number of"):
        warnings.append(f"{adapter.folder} was trained on {many} rows that are flagged as leaks")
    return about


def check_origin(args: argparse.Namespace, plan: Plan, adapters: list[Adapter]) -> list[str]:
    """Compare the base with the one that each adapter was trained on; returns warnings.

    Prepares the plan for 4-bit training and for a foreign base; refuses one not asked for.
    """
    from finetune import base_fingerprint

    warnings, quantised = [], False
    try:
        found = base_fingerprint(plan.base)
    except (ValueError, LookupError, TypeError):  # headers that were good a moment ago
        raise UserError(f"{plan.base} changed while it was read: run the command again") from None
    for folder, _, config, _ in adapters:
        path = folder / "base_fingerprint.json"
        known = read_json(path, {"load_in_4bit": bool}) if path.exists() else {}
        quantised |= known.get("load_in_4bit") or False
        differ = [part for part in found if known and known.get(part) != found[part]]
        theirs = Path(str(known.get("base_model") or config.get("base_model_name_or_path")))
        config_file = theirs / "config.json"  # os.path: a name may be too long to be one
        other = read_json(config_file, {}) if os.path.isfile(config_file) else {}
        pairs = {fact: (other[fact], plan.config.get(fact)) for fact in FACTS if fact in other}
        facts = [f"{fact} {a} -> {b}" for fact, (a, b) in pairs.items() if a != b]
        what = (
            f"{folder} was trained on {theirs}; {plan.base} differs in its {' and '.join(differ)}"
        )
        what += f": {', '.join(facts)}" * bool(facts)
        foreign = differ and not args.foreign_base or "model_type" in " ".join(facts)
        refuse({f"{what}; if you mean it, add --foreign-base": foreign})
        if differ:
            warnings.append(what)
        elif known:
            print(f"{plan.base} is the base that {folder} was trained on: fingerprints agree")
        else:
            warnings.append(f"no {path}: whether {plan.base} is the base it was trained on")
    refuse({"--dequantised-base: not trained on NF4": args.dequantised_base and not quantised})
    if quantised or args.foreign_base:
        plan.norms, plan.dequantised = {}, args.dequantised_base
        linear = {n for n, s in plan.tensors.items() if len(s.shape) == 2 and layer(n) not in ENDS}
        plan.nf4 = linear if quantised else set()
    return warnings + check_partner(args)


def check_partner(args: argparse.Namespace) -> list[str]:
    """The paper's rule: no merge with a model that was trained on benchmark questions; warnings."""
    folder = args.partner_check
    if not folder:
        warning = "no --partner-check: the other model may know benchmark questions"
        return [warning] if args.foreign_base else []
    check_input(folder / "pairs.jsonl", "python check_contamination.py writes it")
    pairs = len(open_pairs(folder))
    what = f"{folder}: {pairs} pairs are not decided not-a-leak"
    mend = f"{what}; see them with python tui.py {folder}"
    refuse({mend: pairs and not args.allow_contaminated})
    return [f"{what}, and it was merged all the same"] * bool(pairs)


def norm_table(plan: Plan) -> dict[str, list[str]]:
    """Print per layer the norms of weights, change, and what NF4 took; {"norms": the lines}."""
    rows, count = [], 5 if plan.nf4 else 3
    for name, squares in plan.norms.items():
        w, change, error = (math.sqrt(square) for square in squares)
        cells = [w, change, change / (w or math.nan), error, error / (change or math.nan)]
        rows.append([name, *(f"{cell:.4g}" for cell in cells[:count])])
    headers = ["layer", "weights", "change", "change / weights", "NF4 error", "error / change"]
    print(table := markdown_table(headers[: count + 1], rows))
    return {"norms": table.splitlines()}


# --- the folder -----------------------------------------------------------------------------------


def write_rest(plan: Plan, about: dict[str, Any], out: Path) -> None:
    """The base's config, tokenizer, licence files and index, and a model card of its own."""
    for path in sorted(plan.base.iterdir()):
        own = path.name in ("run.json", "README.md", INDEX) or path.name.startswith(".")
        if path.is_file() and not own and path.suffix not in OTHER_FILES:
            shutil.copyfile(path, out / path.name)
    if any(layer(name) in ENDS for name in plan.parts):
        config = {**plan.config, "tie_word_embeddings": False}
        shared.write_file(out / "config.json", json.dumps(config, indent=2) + "\n")
    if plan.shards != [WHOLE]:
        total = sum((out / shard).stat().st_size for shard in plan.shards)
        places = {name: about.path.name for name, about in sorted(plan.tensors.items())}
        index = {"metadata": {"total_size": total}, "weight_map": places}
        shared.write_file(out / INDEX, json.dumps(index, indent=2) + "\n")
    card = plan.base / "README.md"
    text = card.read_text(encoding="utf-8", errors="replace") if card.exists() else ""
    licence = re.findall(r"^license\w*: *(.+)$", text, re.MULTILINE) or ["not stated in its card"]
    lines = ["# A merged model", f"Licence of the base: {', '.join(licence)}. It and those of the "
             "training data apply to this model. `run.json` holds all hashes."]  # fmt: skip
    steps = ((step.get("base_model"), step.get("adapters")) for step in about["lineage"])
    lines += [f"- base `{base}`, adapters {counted(adapters)}" for base, adapters in steps]
    for adapter in about["adapters"]:
        lines.append(f"- `{adapter['folder']}`, sha256 {adapter['sha256']}, rows flagged as leaks: "
                     f"{adapter.get('flagged_rows', 'unknown')}, data {json.dumps(adapter['data'])}"
                     f", licences of rows: {counted(adapter.get('licences'))}")  # fmt: skip
    lines += [f"- **warning**: {warning}" for warning in about["warnings"]]
    shared.write_file(out / "README.md", "\n\n".join(lines) + "\n")


def counted(found: Any) -> str:
    """A dict of name -> number as text: {"MIT": 54} is "MIT (54)"."""
    items = found.items() if isinstance(found, dict) else ()
    return ", ".join(f"{name} ({number})" for name, number in items) or "unknown"


@contextmanager
def folder_aside(out: Path, overwrite: bool) -> Iterator[Path]:
    """A folder beside `out` that takes its place when the block ends well, and else disappears."""
    aside, stale = out.resolve().with_name(f".{out.resolve().name}.tmp"), {}
    if (aside / "run.json").exists() and (out / shared.UNFINISHED).exists():
        stale = read_json(aside / "run.json", {"outputs": dict})["outputs"]  # killed while renaming
    with output_folder(aside, overwrite=True):
        try:
            for left in set(aside.iterdir()) - {aside / shared.UNFINISHED}:
                left.unlink()
            yield aside
        except BaseException:
            shutil.rmtree(aside)
            raise
        try:  # nobody else may take `aside` before all of it has moved
            with output_folder(out, overwrite):
                for name in stale:
                    (out / name).unlink(missing_ok=True)
                moved = set(aside.iterdir()) - {aside / shared.UNFINISHED}
                for path in sorted(moved, key=lambda path: path.name == "run.json"):
                    os.replace(path, out / path.name)
        except UserError:  # another process has finished `out`
            shutil.rmtree(aside)
            raise
    with suppress(OSError):  # a third process has begun in it
        aside.rmdir()


def check_room(args: argparse.Namespace, plan: Plan, adapters: list[Adapter]) -> None:
    """Refuse an output inside an input, and a disk or memory that is too small, before any work."""
    out = args.out.resolve()
    inputs = (plan.base, *(adapter.folder for adapter in adapters))
    inside = [str(folder) for folder in inputs if folder.resolve() in out.parents]
    size = sum((plan.base / shard).stat().st_size for shard in plan.shards)
    free = shutil.disk_usage(next(folder for folder in out.parents if folder.exists())).free
    need = 5 * sum(math.prod(about.shape) for about in plan.tensors.values())  # float32 and more
    memory = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    refuse({f"--out {args.out} lies inside {inside[:1]}, an input; name another folder": inside})
    refuse({f"{args.out}: {size / 1e9:.1f} GB needed, {free / 1e9:.1f} free": size > free})
    much = f"--check-logits: {need / 1e9:.1f} GB of memory needed, {memory / 1e9:.1f} free"
    refuse({much: args.check_logits and need > memory})


def make_plan(args: argparse.Namespace) -> tuple[Plan, list[Adapter]]:
    """What becomes of the base, and the adapters; sets args.base_model where no flag has."""
    adapters = [read_adapter(Path(folder), weight) for folder, weight in args.adapter]
    args.base_model = args.base_model or adapters[0].config.get("base_model_name_or_path") or ""
    plan = read_base(args.base_model)
    check_output(args.out, args.overwrite, plan.base, *(adapter.folder for adapter in adapters))
    for adapter in adapters:
        add_adapter(adapter, plan)
    check_room(args, plan, adapters)
    return plan, adapters


def describe_merge(args: argparse.Namespace, plan: Plan, adapters: list) -> dict[str, Any]:
    """What the card and run.json say of the models, once checked; prints warnings."""
    for adapter in adapters:
        check_numbers(adapter)
    warnings = check_origin(args, plan, adapters)
    about: dict[str, Any] = {"settings": vars(args), "base_model": args.base_model}
    about["counts"] = {"tensors": len(plan.tensors), "changed": len(plan.changed())}
    about |= {"adapters": [training_of(a, warnings) for a in adapters], "warnings": warnings}
    before = read_json(p, {"lineage": list}) if (p := plan.base / "run.json").exists() else {}
    steps = [known for known in before.get("lineage") or [] if isinstance(known, dict)]
    used = {adapter["folder"]: adapter["weight"] for adapter in about["adapters"]}
    about["lineage"] = [*steps, {"base_model": args.base_model, "adapters": used}]
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)
    return about


def main(argv: list[str] | None = None) -> None:
    """Adapters + base -> checks -> shards, proved one by one -> folder."""
    started = time.monotonic()
    args = parse_args(argv)
    plan, adapters = make_plan(args)
    inputs = [plan.base / name for name in ("config.json", *plan.shards)]
    stored = ("adapter_config.json", "adapter_model.safetensors")
    inputs += [adapter.folder / name for adapter in adapters for name in stored]
    with Beside() as beside:
        import torch

        described = shared.describe_inputs(inputs)
        torch.set_num_threads(1)  # several would wait for each other at the end of each block
        about = describe_merge(args, plan, adapters)
        with folder_aside(args.out, args.overwrite) as aside:
            about["proof"] = write_shards(plan, aside, args.seed, beside)
            about |= norm_table(plan) if plan.norms else {}
            write_rest(plan, about, aside)
            if args.check_logits:
                about["logits"] = check_logits(plan, adapters[0].folder, aside)
            beside.sync()
            for stored in itertools.chain(*(of.tensors.values() for of in (plan, *adapters))):
                stored.check()
            outputs = sorted(path for path in aside.iterdir() if path.name != shared.UNFINISHED)
            inside = argparse.Namespace(**{**vars(args), "out": aside})
            shared.finish_run(inside, inputs=described, outputs=outputs, started=started, **about)
    print(f"wrote {args.out}: {len(plan.changed())} of {len(plan.tensors)} tensors changed. Next:")
    print(shlex.join(next_command(args, about["adapters"])))


def next_command(args: argparse.Namespace, adapters: list[dict[str, Any]]) -> list[str]:
    """How to evaluate the model, on the files and verdicts that the contamination check had."""
    command = ["python", "evaluate.py", "--model", args.base_model, "--model", str(args.out)]
    command += ["--out", shared.sibling(args.out, "eval")]
    if folder := adapters[0].get("contamination"):
        path = Path(folder) / "run.json"
        run = read_json(path, {"settings": dict}) if path.exists() else {}
        local = (run.get("settings") or {}).get("local")
        command += ["--contamination", folder, *(["--local", str(local)] if local else [])]
    return command


if __name__ == "__main__":
    shared.run_main(main)

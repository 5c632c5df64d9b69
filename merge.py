"""Merge LoRA adapters into a model, a block of rows at a time, and prove what was written.

Step 4 of 5 (paper, section 3.2). Reads a base model (folder or hub id, safetensors) and adapters
in PEFT's layout; writes out/merged/: a Hugging Face model folder with the base's own config,
tokenizer and shards, a model card (README.md) and run.json.

    python merge.py --adapter out/lora --out out/small
    python merge.py
    python merge.py --adapter out/a --adapter out/b:0.5 --out out/both
    python merge.py --base-model other --foreign-base --partner-check out/other --out out/camel

The model is never loaded: untouched tensors are copied, changed ones are read, summed and written
in blocks of rows. Memory is a few blocks beside torch itself whatever the model's size, time a small
multiple of copying the base (benchmarks/merge.py). One adapter of weight 1 gives the bits of PEFT's
merge_and_unload; several give the exact weighted sum of their changes, rounded once. Then sampled
rows of every changed tensor are computed again, every other tensor is compared byte by byte, and
only then does the folder get its name. target_parameters and other kinds of LoRA that are no
W + scale * B @ A are refused by name.
"""

import argparse
import json
import math
import os
import random
import re
import shlex
import shutil
import struct
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from build_dataset import (
    UNFINISHED,
    UserError,
    check_output,
    finish_run,
    first_line,
    hub_fault,
    make_parser,
    output_folder,
    refuse,
    run_main,
    sha256_of,
    write_file,
)
from check_contamination import check_input, markdown_table, read_decisions, read_jsonl

if TYPE_CHECKING:
    import torch

BLOCK_ELEMENTS = 1 << 20  # of a matrix in work at a time: 4 MB in float32
SLAB_ELEMENTS = 1 << 22  # of whole columns in work at a time, where norms run down the columns
ROWS = 64  # blocks start at a multiple of this: BLAS sums in another order where B is unaligned
COPY_BYTES = 1 << 22  # compared at a time
SAMPLED = 4  # neighbouring rows computed again in each of three places of a changed tensor
WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth")
WEIGHT_FILES = (".safetensors", *PICKLES, ".gguf", ".h5", ".msgpack", ".onnx")
FLOATS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
HEADS = ("lm_head", "embed_out")  # transformers' names of the output layer ...
ENDS = (*HEADS, "embed_tokens", "wte", "word_embeddings", "embed_in")  # ... and the embedding
CONV1D = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")  # store [in, out] matrices
PREFIX = "base_model.model."  # PEFT's, before each key of an adapter
UNSUPPORTED = (  # PEFT's settings under which an adapter is more than W + scale * B @ A
    "target_parameters trainable_token_indices layer_replication alora_invocation_tokens use_qalora"
    " use_bdlora arrow_config velora_config kasa_config monteclora_config megatron_config"
).split()
PLAIN_INITS = (True, False, None, "gaussian", "eva", "orthogonal")  # the others change the base
NF4 = {"quant_type": "nf4", "blocksize": 64}  # QLoRA's; 256 of its scales share a scale in turn
FACTS = "model_type vocab_size hidden_size num_hidden_layers dtype tie_word_embeddings".split()
PROBE = "Below is an instruction that describes a task. At which temperature does water boil?"


class Stored(NamedTuple):
    """A tensor in a safetensors file, seen as a matrix: all dimensions but the first are one."""

    path: Path
    dtype: str  # safetensors' name of it
    shape: tuple[int, ...]
    begin: int  # bytes from the file's start
    end: int

    def size(self) -> tuple[int, int]:
        """(rows, columns)."""
        return (self.shape or (1,))[0], math.prod(self.shape[1:])

    def read(self, rows: slice = slice(None)) -> "torch.Tensor":
        """These rows as stored: [len(rows), columns]."""
        import torch

        count, columns = self.size()
        top, bottom, _ = rows.indices(count)
        block = torch.empty((bottom - top, columns), dtype=getattr(torch, FLOATS[self.dtype]))
        with self.path.open("rb") as file:
            file.seek(self.begin + top * columns * block.element_size())
            file.readinto(block.view(torch.uint8).numpy())
        return block

    def blocks(self) -> Iterator[slice]:
        """Its rows in blocks of about BLOCK_ELEMENTS that begin at a multiple of ROWS."""
        rows, columns = self.size()
        step = max(1, BLOCK_ELEMENTS // max(1, columns) // ROWS) * ROWS
        return (slice(top, min(top + step, rows)) for top in range(0, rows, step))


class Part(NamedTuple):
    """What one adapter makes of one tensor W: W or its saved copy, plus scale * B @ A."""

    weight: float  # of the adapter among several
    scale: float = 1.0
    a: Stored | None = None  # [rank, in_features]; of an embedding [rank, vocabulary]
    b: Stored | None = None  # [out_features, rank]; of an embedding [dimension, rank]
    magnitude: Stored | None = None  # DoRA's: what the rows of W + scale * B @ A are scaled to
    saved: Stored | None = None  # trained whole: modules_to_save, biases, embeddings
    embedding: bool = False
    transposed: bool = False  # W has the shape of (B @ A).T: embeddings and Conv1D


class Adapter(NamedTuple):
    """An adapter folder that was found whole."""

    folder: Path
    weight: float
    config: dict[str, Any]
    tensors: dict[str, Stored]


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
    parser = make_parser(__doc__, "out/merged")
    add = parser.add_argument_group("models").add_argument
    weight = "adapter folder, times WEIGHT (default 1); repeatable (default: out/adapter)"
    add("--adapter", action="append", metavar="DIR[:WEIGHT]", help=weight)
    base = "folder or hub id (default: the one that the adapter names)"
    add("--base-model", metavar="MODEL", help=base)
    nf4 = "add an adapter trained on NF4 to what NF4 made of the base (default: to the base)"
    add("--dequantised-base", action="store_true", help=nf4)
    add = parser.add_argument_group("checks").add_argument
    foreign = "merge into a model that the adapter was not trained on; prints a table of norms"
    add("--foreign-base", action="store_true", help=foreign)
    partner = "check_contamination.py's folder of the data that the other model was trained on"
    add("--partner-check", type=Path, metavar="DIR", help=partner)
    allow = "merge although pairs in --partner-check are not decided not-a-leak (paper: never)"
    add("--allow-contaminated", action="store_true", help=allow)
    logits = "compare the merged model's logits with base + adapter's (loads one at a time)"
    add("--check-logits", action="store_true", help=logits)
    args = parser.parse_args(argv)
    args.adapter = [split_weight(item) for item in args.adapter or ["out/adapter"]]
    alone = args.allow_contaminated and not args.partner_check
    refuse(
        {
            "--limit does not apply: a merge is whole": args.limit,
            f"--device {args.device}: merging runs on the cpu": args.device not in (None, "cpu"),
            "--allow-contaminated does nothing without --partner-check": alone,
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
    try:
        value = float(weight)
    except ValueError:
        value = math.nan
    if not math.isfinite(value) or value == 0:
        raise UserError(f"--adapter {item}: the weight {weight!r} is not a number other than 0")
    return folder, value


# --- reading what others wrote --------------------------------------------------------------------


def read_json(path: Path, **kinds: Any) -> dict[str, Any]:
    """A JSON object whose fields named in `kinds`, where not null, are of one of these types."""
    try:
        data = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON: {error}") from None
    if not isinstance(data, dict):
        raise UserError(f"{path} holds a {type(data).__name__}, not an object")
    for name, kind in kinds.items():
        value = data.get(name)
        if value is not None and type(value) not in kind:  # not isinstance: True is no number
            names = " or ".join(k.__name__ for k in kind)
            raise UserError(f"{path}: {name} is {value!r:.60}, not of type {names}")
    return data


def read_header(path: Path) -> dict[str, Stored]:
    """The tensors of a safetensors file by name, in the order of their bytes.

    The format: 8 bytes with the header's length, the header as JSON, then the tensors' bytes.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt"):  # checks types, sizes, gaps, and the file's length
            pass
    except SafetensorError as error:
        raise UserError(f"{path} is cut short or no safetensors file: {error}") from None
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    tensors = {}
    for name, about in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        begin, end = (8 + length + offset for offset in about["data_offsets"])
        tensors[name] = Stored(path, about["dtype"], tuple(about["shape"]), begin, end)
    return tensors


def read_adapter(folder: Path, weight: float) -> Adapter:
    """The adapter's configuration and tensors; refuses by name what a merge would get wrong."""
    mend = "name the folder that finetune.py wrote"
    path = check_input(check_input(folder, mend) / "adapter_config.json", mend)
    number, text, switch, table = (int, float), (str,), (bool,), (dict,)
    config = read_json(
        path, peft_type=text, base_model_name_or_path=text, r=(int,), lora_alpha=number,
        rank_pattern=table, alpha_pattern=table, use_rslora=switch, use_dora=switch,
        fan_in_fan_out=switch, init_lora_weights=(bool, str),
    )  # fmt: skip
    if config.get("peft_type") != "LORA":
        raise UserError(f"{folder} is a {config.get('peft_type')} adapter; only LORA can be merged")
    if used := [f"{name} = {config[name]!r:.40}" for name in UNSUPPORTED if config.get(name)]:
        raise UserError(f"{path}: {', '.join(used)} cannot be merged here; try PEFT's own merge")
    if (init := config.get("init_lora_weights")) not in PLAIN_INITS:
        hint = "save it with PEFT's path_initial_model_for_weight_conversion"
        raise UserError(f"{path}: init_lora_weights = {init!r} changed the base; {hint}")
    ranks = [config.get("r"), *(config.get("rank_pattern") or {}).values()]
    alphas = [config.get("lora_alpha"), *(config.get("alpha_pattern") or {}).values()]
    wrong = [r for r in ranks if type(r) is not int or r < 1]
    wrong += [a for a in alphas if type(a) not in number or not abs(a) < 1e9]
    if wrong:
        raise UserError(f"{path}: {wrong[0]!r:.40} is not a rank or an alpha")
    weights, pickle = folder / "adapter_model.safetensors", folder / "adapter_model.bin"
    if not weights.exists() and pickle.exists():
        code = f"save_file(torch.load({str(pickle)!r}, weights_only=True), {str(weights)!r})"
        code = f"import torch; from safetensors.torch import save_file; {code}"
        convert = shlex.join(["python", "-c", code])
        raise UserError(f"{folder} holds a pickle, which may run code; convert it: {convert}")
    return Adapter(folder, weight, config, read_header(check_input(weights, mend)))


def check_numbers(adapter: Adapter) -> None:
    """Refuse an adapter with NaN or infinity, and one that was never trained."""
    trained = False
    for name, stored in adapter.tensors.items():
        if stored.dtype not in FLOATS:
            raise UserError(f"{adapter.folder}: {name} is stored as {stored.dtype}, not as floats")
        total = sum(stored.read(rows).double().abs().sum().item() for rows in stored.blocks())
        if not math.isfinite(total):
            raise UserError(f"{adapter.folder}: {name} holds NaN or infinite numbers")
        # a fresh LoRA has B = 0, of an embedding A = 0
        trained |= total > 0 and not re.search(r"lora_A|lora_embedding_B|base_layer", name)
    if not trained:
        raise UserError(f"{adapter.folder} changes nothing: every B is zero (an untrained adapter)")


def base_folder(name: str) -> Path:
    """The folder of the base model, fetched from the hub if `name` is the hub's."""
    if Path(name).is_dir():
        return check_input(Path(name), "")
    first = name.partition("/")[0]
    if (
        not re.fullmatch(r"[\w.-]+/[\w.-]+", name)
        or first in ("", ".", "..")
        or Path(first).exists()
    ):
        raise UserError(f"base model {name} is neither a folder nor a hub id; give --base-model")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, ignore_patterns=[f"*{kind}" for kind in PICKLES]))
    except Exception as error:  # the hub raises a dozen kinds; each means "not to be had"
        raise UserError(f"base model {hub_fault(name, error)}") from None


def read_base(base: Path) -> Plan:
    """A plan that changes nothing yet; every shard of the base must be there and whole."""
    path = check_input(base / "config.json", "name a model's folder with --base-model")
    switch = {"tie_word_embeddings": (bool,), "model_type": (str,)}
    config = read_json(path, quantization_config=(dict,), **switch)
    if "quantization_config" in config:
        raise UserError(f"{base} is quantised; merge into its 16-bit original")
    listed: dict[str, str] = {}
    if not (base / WHOLE).exists() and (base / INDEX).exists():  # the order of transformers
        listed = read_json(base / INDEX, weight_map=(dict,)).get("weight_map") or {"": ""}
        if bad := [s for s in listed.values() if not re.fullmatch(r"[\w.-]+", str(s))]:
            raise UserError(f"{base / INDEX}: weight_map names no file of its folder: {bad[0]!r}")
    shards = sorted(set(listed.values())) or [WHOLE]
    if missing := [name for name in shards if not (base / name).is_file()]:
        code = f"M.from_pretrained({str(base)!r}, dtype='auto').save_pretrained('converted')"
        code = f"from transformers import AutoModelForCausalLM as M; {code}"
        convert = f"; convert its pickles: {shlex.join(['python', '-c', code])}"
        pickled = any(file.suffix in PICKLES for file in base.iterdir())
        raise UserError(f"{base} has no {', '.join(missing[:3])}{convert if pickled else ''}")
    tensors: dict[str, Stored] = {}
    for shard in shards:
        found = read_header(base / shard)
        if twice := sorted(found.keys() & tensors.keys()):
            raise UserError(f"{base}: {twice[0]} stands in two shards")
        tensors |= found
    if lost := [n for n, s in listed.items() if n not in tensors or tensors[n].path.name != s]:
        raise UserError(f"{base / INDEX}: {lost[0]} is not in {listed[lost[0]]}")
    ends = [name for name in tensors if layer(name) in ENDS]
    shared = ends[0] if len(ends) == 1 and layer(ends[0]) not in HEADS else None
    return Plan(base, config, shards, tensors, shared)


# --- which tensor of an adapter changes which of the base -----------------------------------------


def layer(tensor: str) -> str:
    """The last name of the layer that a tensor belongs to: "a.lm_head.weight" -> "lm_head"."""
    return tensor.rpartition(".")[0].rpartition(".")[2]


def base_name(name: str, plan: Plan) -> str | None:
    """The base's name of a tensor; a head that is the embedding becomes a tensor of its own."""
    bare = name.partition(".")[2]  # GPT-2's own checkpoint lacks the backbone's name
    if plan.shared and name in (f"{head}.weight" for head in HEADS):
        plan.tensors.setdefault(name, plan.tensors[plan.shared])
    return name if name in plan.tensors else bare if bare in plan.tensors else None


def add_adapter(adapter: Adapter, plan: Plan) -> None:
    """Add what the adapter changes to the plan; refuses an adapter that would be used in part."""
    left = {name.removeprefix(PREFIX): stored for name, stored in adapter.tensors.items()}
    parts: dict[str, Part] = {}
    for key in sorted(left):
        found = re.fullmatch(r"(.+)\.(lora_A\.weight|lora_embedding_A)", key)
        name = base_name(f"{found[1]}.weight", plan) if found else None
        b = left.pop(f"{found[1]}.{found[2].replace('_A', '_B')}", None) if name else None
        if b:
            a, stem, embedding = left.pop(key), found[1], "embedding" in found[2]
            dora = adapter.config.get("use_dora")
            magnitude = left.pop(f"{stem}.lora_magnitude_vector", None) if dora else None
            part = Part(adapter.weight, scaling(adapter, stem, a), a, b, magnitude, None, embedding)
            parts[name] = fit_part(adapter, name, part, plan)
            bias = base_name(f"{stem}.bias", plan)
            if bias and (extra := left.pop(f"{stem}.lora_B.bias", None)):
                parts[bias] = fit_part(adapter, bias, Part(*part[:2], None, extra), plan)
    for key in sorted(left):
        if name := base_name(key.replace(".base_layer.", "."), plan):
            part = parts.get(name, Part(adapter.weight))._replace(saved=left.pop(key))
            parts[name] = fit_part(adapter, name, part, plan)
    if left:
        names = ", ".join(sorted(left)[:5]) + (" ..." if len(left) > 5 else "")
        count = f"{len(left)} of its {len(adapter.tensors)} tensors would be ignored"
        raise UserError(f"{adapter.folder} does not fit {plan.base}: {count}: {names}")
    for name, part in parts.items():
        plan.parts.setdefault(name, []).append(part)
    # PEFT adds the LoRA of either to the one tensor that both are, so that the other changes too;
    # what was trained has two, hence the head becomes a tensor of its own
    if plan.shared in plan.parts and not any(layer(name) in HEADS for name in plan.tensors):
        base_name("lm_head.weight", plan)


def scaling(adapter: Adapter, stem: str, a: Stored) -> float:
    """alpha / rank, or alpha / sqrt(rank); of patterns the first that ends the module's name."""
    values = []
    for table, default in (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha")):
        try:
            known = (adapter.config.get(table) or {}).items()
            fitting = [value for key, value in known if re.match(rf"(.*\.)?({key})$", stem)]
        except re.error as error:
            raise UserError(f"{adapter.folder}/adapter_config.json: {table}: {error}") from None
        values.append([*fitting, adapter.config[default]][0])
    rank, alpha = values
    if a.shape[0] != rank:
        raise UserError(f"{adapter.folder}: {stem} has rank {a.shape[0]}, its config says {rank}")
    return alpha / (math.sqrt(rank) if adapter.config.get("use_rslora") else rank)


def fit_part(adapter: Adapter, name: str, part: Part, plan: Plan) -> Part:
    """The part with `transposed` settled; refuses shapes and number types that do not fit."""
    base = plan.tensors[name]
    if base.dtype not in FLOATS:
        hint = "merge into its 16-bit original"
        raise UserError(f"{base.path}: {name} is stored as {base.dtype}, not as floats; {hint}")
    shapes = [part.saved.shape] if part.saved else []
    if part.b and not part.a:  # of a bias
        shapes.append(part.b.shape)
    elif part.b:
        out, (rank, into) = part.b.shape[0], part.a.shape
        conv1d = plan.config.get("model_type") in CONV1D and layer(name) not in HEADS
        conv1d |= bool(adapter.config.get("fan_in_fan_out")) and out != into
        part = part._replace(transposed=part.embedding or conv1d and base.shape == (into, out))
        shapes.append((into, out) if part.transposed else (out, into))
        dora = bool(adapter.config.get("use_dora"))
        if part.b.shape != (out, rank) or dora and getattr(part.magnitude, "shape", 0) != (out,):
            raise UserError(f"{adapter.folder}: the tensors for {name} do not fit each other")
    if wrong := [shape for shape in shapes if shape != base.shape]:
        of = " (another vocabulary)" if layer(name) in ENDS else ""
        what = f"{name} is {list(base.shape)} there, not {list(wrong[0])}{of}"
        raise UserError(f"{adapter.folder} does not fit {plan.base}: {what}")
    return part


# --- a block of rows ------------------------------------------------------------------------------


def load_factors(part: Part, stored: Stored, dtype: "torch.dtype") -> tuple[Any, Any, Any]:
    """(A, B, magnitude) of a part in `dtype`, each None where it has none.

    Of a transposed matrix the magnitude comes divided by the norms, which run down whole columns.
    """
    import torch

    if not part.b:
        return None, None, None
    a = part.a.read().to(dtype) if part.a else torch.ones((1, 1), dtype=dtype)
    b = part.b.read().to(dtype)
    magnitude = part.magnitude.read().to(dtype).view(-1) if part.magnitude else None
    if part.magnitude and part.transposed:
        rows, columns = stored.size()
        width = max(1, SLAB_ELEMENTS // rows // ROWS) * ROWS
        for left in range(0, columns, width):
            at, source = slice(left, left + width), part.saved or stored
            slab = torch.cat([source.read(block)[:, at] for block in stored.blocks()])
            slab = slab.to(getattr(torch, FLOATS[stored.dtype]))
            change = (b[at] @ a) * part.scale
            magnitude[at] /= torch.linalg.norm(slab.T + change, dim=1)
    return a, b, magnitude


def part_rows(part: Part, factors: tuple, w: "torch.Tensor", rows: slice) -> "torch.Tensor":
    """What one adapter makes of the rows `w` [len(rows), columns], before rounding, as in PEFT.

    PEFT sums in the wider of the two number types, but of an embedding it rounds the change first.
    """
    import torch

    a, b, magnitude = factors
    if part.saved:
        w = part.saved.read(rows).to(w.dtype)
    if b is None:
        return w
    change = ((b @ a[:, rows]).T if part.transposed else b[rows] @ a) * part.scale
    if magnitude is None:
        return w + (change.to(w.dtype) if part.embedding else change)
    if part.transposed:
        return magnitude * (w + change)
    return (magnitude[rows] / torch.linalg.norm(w + change, dim=1)).view(-1, 1) * (w + change)


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
    if dtype.itemsize > 2:
        return exact.to(dtype)
    off = exact - near
    beyond = torch.nextafter(near, torch.where(off > 0, math.inf, -math.inf).float())
    return torch.where((off != 0) & (near.view(torch.int32) & 1 == 0), beyond, near).to(dtype)


def nf4_scales(stored: Stored) -> "torch.Tensor":
    """QLoRA's doubly quantised scales of a matrix: [elements / 64], float32."""
    import torch
    from bitsandbytes import functional

    states = (functional.quantize_4bit(stored.read(rows), **NF4)[1] for rows in stored.blocks())
    scales = torch.cat([state.absmax for state in states])
    codes, state = functional.quantize_blockwise(scales - scales.mean(), blocksize=256)
    return functional.dequantize_blockwise(codes, state) + scales.mean()


def nf4_rows(w: "torch.Tensor", scales: "torch.Tensor", top: int) -> "torch.Tensor":
    """What 4-bit training saw in place of the rows `w`, the first of which is row `top`."""
    from bitsandbytes import functional

    codes, state = functional.quantize_4bit(w, **NF4)
    first = top * w.shape[1] // NF4["blocksize"]
    state.absmax = scales[first : first + len(state.absmax)]
    return functional.dequantize_4bit(codes, state)


def new_blocks(plan: Plan, name: str) -> Iterator["torch.Tensor"]:
    """The rows of a changed tensor, block by block, rounded once to the base's number type."""
    import torch

    stored, parts = plan.tensors[name], plan.parts.get(name, [])
    lone = len(parts) == 1 and parts[0].weight == 1
    dtype = getattr(torch, FLOATS[stored.dtype])
    wide = torch.promote_types(dtype, torch.float32 if lone else torch.float64)
    factors = [load_factors(part, stored, wide) for part in parts]
    scales = nf4_scales(stored) if name in plan.nf4 else None
    for rows in stored.blocks():
        w = stored.read(rows)
        coarse = w if scales is None else nf4_rows(w, scales, rows.start)
        base = coarse if plan.dequantised else w
        if lone:
            total = part_rows(parts[0], factors[0], base, rows)
        else:
            total = exact_rows(parts, factors, base, rows)
        if plan.norms is not None and parts:
            group = re.search(r"\.(\d+)\.", name)
            sums = plan.norms.setdefault(f"layer {group[1]}" if group else layer(name), [0.0] * 3)
            for i, term in enumerate((base, total - base, coarse - w)):
                sums[i] += term.double().square().sum().item()
        block = total.to(dtype) if lone else round_once(total, dtype)
        if not math.isfinite(block.sum(dtype=torch.float64).item()):
            raise UserError(f"{name}: the sum does not fit into {FLOATS[stored.dtype]}")
        yield block


# --- writing and proving --------------------------------------------------------------------------


def copy_bytes(old: Any, new: Any, begin: int, end: int) -> None:
    """Append bytes [begin, end) of one open file to another, inside the kernel where it can."""
    new.flush()
    while begin < end:
        try:
            count = os.copy_file_range(old.fileno(), new.fileno(), end - begin, begin)
        except (AttributeError, OSError):  # not Linux, or two kinds of file systems
            old.seek(begin)
            count = new.write(old.read(min(COPY_BYTES, end - begin)))
            new.flush()
        begin += count


def write_shard(plan: Plan, shard: str, target: Path) -> None:
    """Write the tensors of one shard, changed or copied, and any that were added behind them."""
    import torch

    mine = {name: about for name, about in plan.tensors.items() if about.path.name == shard}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers asks for it
    at = 0
    for name, about in mine.items():
        offsets = [at, at := at + about.end - about.begin]
        header[name] = {"dtype": about.dtype, "shape": about.shape, "data_offsets": offsets}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the tensors' bytes begin at a multiple of 8
    with (plan.base / shard).open("rb") as old, target.open("wb") as new:
        new.write(struct.pack("<Q", len(text)) + text)
        for name, about in mine.items():
            if name in plan.changed():
                for block in new_blocks(plan, name):
                    new.write(block.contiguous().view(torch.uint8).numpy())
            else:
                copy_bytes(old, new, about.begin, about.end)


def prove_shard(plan: Plan, target: Path, seed: int) -> dict[str, int]:
    """Read a written shard again: sampled rows against a float64 sum, other tensors by bytes."""
    import torch

    counts = {"rows_computed_again": 0, "tensors_equal_to_base": 0}
    for name, new in read_header(target).items():
        old, parts = plan.tensors[name], plan.parts.get(name, [])
        if name not in plan.changed():
            assert same_bytes(old, new), f"{name} in {target} is not what {old.path} holds"
            counts["tensors_equal_to_base"] += 1
            continue
        factors = [load_factors(part, old, torch.float64) for part in parts]
        last = (old.size()[0] - 1) // ROWS
        for block in {0, random.Random(f"{seed} {name}").randint(0, last), last}:
            rows = slice(block * ROWS, min(block * ROWS + SAMPLED, old.size()[0]))
            w, found = old.read(rows), new.read(rows).double()
            if plan.dequantised and name in plan.nf4:
                w = nf4_rows(w, nf4_scales(old), rows.start)
            expected = exact_rows(parts, factors, w, rows)
            change = (expected - w).abs()
            # the last digit of what was added and of the sum; float32 errs in all of a row's terms
            slack = torch.finfo(new.read(rows).dtype).eps * (expected.abs() + w.abs() + change)
            worst = ((found - expected).abs() - slack - 1e-5 * change.max()).max().item()
            assert worst <= 0, f"{name} in {target} is off by {worst} in rows {rows}"
            counts["rows_computed_again"] += len(w)
    return counts


def same_bytes(old: Stored, new: Stored) -> bool:
    """Whether two stored tensors agree in every byte."""
    if old[1:3] != new[1:3]:
        return False
    with old.path.open("rb") as a, new.path.open("rb") as b:
        a.seek(old.begin), b.seek(new.begin)
        sizes = (min(COPY_BYTES, new.end - at) for at in range(new.begin, new.end, COPY_BYTES))
        return all(a.read(size) == b.read(size) for size in sizes)


def check_logits(args: argparse.Namespace, plan: Plan, merged: Path) -> dict[str, float]:
    """Relative distances of the logits on PROBE: merged to base + adapters, and to the base.

    Both in float32, so that only the rounding of the merged weights is left. Raises UserError if
    they differ by more than 16 units of that rounding.
    """
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    def logits(folder: Path, adapters: list) -> list["torch.Tensor"]:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        ids = torch.arange(16)[None] % model.config.vocab_size
        if any((plan.base / name).exists() for name in ("tokenizer.json", "tokenizer.model")):
            ids = AutoTokenizer.from_pretrained(plan.base)(PROBE, return_tensors="pt")["input_ids"]
        found = [model(ids).logits] if not adapters else [model(ids).logits.clone()]
        for number, (adapter, weight) in enumerate(adapters):
            if number == 0:
                model = PeftModel.from_pretrained(model, adapter, adapter_name="0").eval()
            else:
                model.load_adapter(adapter, str(number))
            for module in model.modules():
                if str(number) in getattr(module, "scaling", {}):
                    module.scaling[str(number)] *= weight
        if adapters:
            model.base_model.set_adapter([str(n) for n in range(len(adapters))])
            found.append(model(ids).logits)
        return found

    with torch.no_grad():
        (ours,), (base, expected) = logits(merged, []), logits(plan.base, args.adapter)
    eps = max(
        torch.finfo(getattr(torch, FLOATS[s.dtype])).eps
        for s in plan.tensors.values()
        if s.dtype in FLOATS
    )
    result = {"to_base_and_adapter": ((ours - expected).norm() / expected.norm()).item(),
              "to_base": ((ours - base).norm() / base.norm()).item()}  # fmt: skip
    print("logits, relative distance:", json.dumps(result))
    if not result["to_base_and_adapter"] <= max(1e-4, 16 * eps):
        raise UserError(f"--check-logits: merged and base + adapter differ by {result}")
    return result


# --- what the adapter was trained on, and for what base -------------------------------------------


def open_pairs(folder: Path) -> set[tuple[str, str]]:
    """(pair, training row) of the contamination pairs that no one decided to be not-a-leak."""
    decisions = read_decisions(folder / "decisions.jsonl")
    pairs = read_jsonl(folder / "pairs.jsonl", {"pair_id": str, "train_id": str})
    leaks = (p for p in pairs if decisions.get(p["pair_id"], {}).get("verdict") != "not-a-leak")
    return {(pair["pair_id"], pair["train_id"]) for pair in leaks}


def training_of(adapter: Adapter) -> tuple[dict[str, Any], list[str]]:
    """(facts for run.json, warnings) about the data that an adapter was trained on."""
    path = adapter.folder / "run.json"
    inputs = read_json(path, inputs=(dict,)).get("inputs") or {} if path.exists() else {}
    files = [Path(name) for name in inputs if name.endswith((".jsonl", ".json"))]
    facts: dict[str, Any] = {
        "folder": str(adapter.folder),
        "weight": adapter.weight,
        "sha256": sha256_of(adapter.folder / "adapter_model.safetensors"),
        "data": {str(file): inputs[str(file)] for file in files},
    }
    data = files[0] if files else None
    if not data or not data.exists() or sha256_of(data) != inputs[str(data)].get("sha256"):
        why = "its run.json names no data" if not data else f"{data} is gone or changed"
        return facts, [f"{adapter.folder}: whether its training data leak is unknown: {why}"]
    rows = read_jsonl(data, {})
    facts["licences"] = Counter(str(row.get("licence", "not stated")) for row in rows)
    if not data.with_name("pairs.jsonl").exists():
        return facts, [f"{adapter.folder}: {data} was not checked for contamination"]
    facts["contamination"] = str(data.parent)
    leaks = {train_id for _, train_id in open_pairs(data.parent)} & {r.get("id") for r in rows}
    facts["flagged_rows"] = len(leaks)
    many = f"{adapter.folder}: trained on {len(leaks)} rows of {data} that are flagged as leaks"
    return facts, [many] if leaks else []


def check_origin(args: argparse.Namespace, plan: Plan, adapters: list[Adapter]) -> list[str]:
    """Compare the base with the one that each adapter was trained on; returns warnings.

    Prepares the plan for what 4-bit training or a foreign base asks for. Raises UserError for a
    foreign base that was not asked for, and for a partner that was trained on leaked questions.
    """
    from finetune import base_fingerprint

    warnings, quantised, found = [], False, base_fingerprint(plan.base)
    for adapter in adapters:
        path = adapter.folder / "base_fingerprint.json"
        known = read_json(path, config=(str,), tensors=(str,)) if path.exists() else {}
        quantised |= bool(known.get("load_in_4bit"))
        differ = [part for part in found if known.get(part) != found[part]]
        trained_on = str(known.get("base_model") or adapter.config.get("base_model_name_or_path"))
        if not known:
            warnings.append(f"{path} is not there: whether {plan.base} is the base that the "
                            "adapter was trained on is unknown")  # fmt: skip
        elif not differ:
            print(f"{adapter.folder}: {plan.base} is the base that it was trained on")
        elif not args.foreign_base:
            what = f"was trained on {trained_on}; {plan.base} differs from it in {differ}"
            raise UserError(f"{adapter.folder} {what}; to merge all the same, add --foreign-base")
        config = Path(trained_on) / "config.json"
        other = read_json(config) if differ and config.exists() else plan.config
        facts = [
            f"{f} {other.get(f)} -> {plan.config.get(f)}"
            for f in FACTS
            if other.get(f) != plan.config.get(f)
        ]
        if facts and "model_type" in facts[0]:
            raise UserError(f"{adapter.folder} was trained on another architecture: {facts[0]}")
        warnings += [f"{adapter.folder}: another base: {fact}" for fact in facts]
    if args.dequantised_base and not quantised:
        raise UserError("--dequantised-base: no adapter here says that it was trained on NF4")
    if quantised or args.foreign_base:
        plan.norms, plan.dequantised = {}, args.dequantised_base
        linear = (n for n, about in plan.tensors.items() if len(about.shape) == 2)
        plan.nf4.update(n for n in linear if quantised and layer(n) not in (*ENDS, "wpe"))
    if args.partner_check:
        check_input(args.partner_check / "run.json", "write it with python check_contamination.py")
        pairs = len(open_pairs(args.partner_check))
        many = f"{args.partner_check}: {pairs} pairs are not decided not-a-leak"
        if pairs and not args.allow_contaminated:
            raise UserError(f"{many}; review them with python tui.py, or --allow-contaminated")
        warnings += [f"{many}; merged all the same"] if pairs else []
    elif args.foreign_base:
        warnings.append("--partner-check was not given: whether the other model was trained on "
                        "benchmark questions is unknown")  # fmt: skip
    return warnings


def norm_table(plan: Plan) -> str:
    """Per layer: norms of the weights, of the change, and of what NF4 took away from the weights."""
    rows = []
    for name, squares in plan.norms.items():
        weights, change, error = (math.sqrt(square) for square in squares)
        cells = [weights, change, change / weights if weights else math.inf]
        cells += [error, error / change if change else math.inf] if plan.nf4 else []
        rows.append([name, *(f"{cell:.4g}" for cell in cells)])
    headers = ["layer", "weights", "change", "change / weights"]
    return markdown_table(headers + ["NF4 error", "error / change"] * bool(plan.nf4), rows)


# --- the folder -----------------------------------------------------------------------------------


def copy_files(plan: Plan, out: Path) -> None:
    """The base's config, tokenizer, licence and index; config and index say if the head is new."""
    for path in sorted(plan.base.iterdir()):
        own = path.name in ("run.json", "README.md", INDEX) or path.name.startswith(".")
        if path.is_file() and not own and path.suffix not in WEIGHT_FILES:
            shutil.copyfile(path, out / path.name)
    if any(layer(name) in ENDS for name in plan.parts):
        config = {**plan.config, "tie_word_embeddings": False}
        write_file(out / "config.json", json.dumps(config, indent=2) + "\n")
    if plan.shards != [WHOLE]:
        total = sum(about.end - about.begin for about in plan.tensors.values())
        places = {name: about.path.name for name, about in sorted(plan.tensors.items())}
        index = {"metadata": {"total_size": total}, "weight_map": places}
        write_file(out / INDEX, json.dumps(index, indent=2) + "\n")


def model_card(args: argparse.Namespace, plan: Plan, about: dict[str, Any]) -> str:
    """README.md of the merged model."""
    card = plan.base / "README.md"
    text = card.read_text(encoding="utf-8", errors="replace") if card.exists() else ""
    stated = re.findall(r"^license(?:_name|_link)?: *(.+)$", text, re.MULTILINE)
    files = [
        p.name
        for p in plan.base.iterdir()
        if re.match(r"licen[cs]e|notice|use_policy", p.name, re.I)
    ]
    base = f"- base: `{args.base_model}`; its licence: {', '.join(stated) or 'not stated'}"
    lines = ["# Merged model", "", base + f" (kept here: {', '.join(files)})" * bool(files)]
    for adapter in about["adapters"]:
        lines.append(f"- adapter: `{adapter['folder']}`, weight {adapter['weight']:g}, "
                     f"sha256 `{adapter['sha256']}`")  # fmt: skip
        for file, data in adapter["data"].items():
            lines.append(f"  - trained on `{file}`, sha256 `{data.get('sha256')}`")
        if "flagged_rows" in adapter:
            lines.append(f"  - rows flagged as benchmark leaks: {adapter['flagged_rows']}")
        for licence, rows in adapter.get("licences", {}).items():
            lines.append(f"  - licence of {rows} rows: {licence}")
    lines += [
        f"- merged before: `{step['base_model']}` + {step['adapters']}"
        for step in about["lineage"][:-1]
    ]
    lines += ["", "## Warnings", "", *[f"- {w}" for w in about["warnings"] or ["none"]], ""]
    lines += ["Made by merge.py; `run.json` holds every hash. The licences of the base and of the",
              "data apply to this model.", ""]  # fmt: skip
    return "\n".join(lines)


@contextmanager
def folder_aside(out: Path, overwrite: bool) -> Iterator[Path]:
    """A folder beside `out` that takes its place when the block ends well, and else disappears."""
    aside = out.with_name(f".{out.name}.tmp")
    with output_folder(aside, overwrite=True):
        if (aside / "run.json").exists() and (out / UNFINISHED).exists():  # killed while renaming
            for name in read_json(aside / "run.json", outputs=(dict,))["outputs"]:
                (out / name).unlink(missing_ok=True)
        for left in aside.iterdir():
            if left.name != UNFINISHED:
                left.unlink()
        try:
            yield aside
        except BaseException:
            shutil.rmtree(aside)
            raise
    with output_folder(out, overwrite):
        for path in sorted(aside.iterdir(), key=lambda path: path.name == "run.json"):
            os.replace(path, out / path.name)
    aside.rmdir()


def check_room(args: argparse.Namespace, plan: Plan, adapters: list[Adapter]) -> None:
    """Refuse an output inside an input, and a disk or memory that is too small, before any work."""
    out, inputs = args.out.resolve(), [plan.base, *(adapter.folder for adapter in adapters)]
    if inside := [folder for folder in inputs if folder.resolve() in out.parents]:
        raise UserError(f"--out {args.out} lies inside an input, {inside[0]}; name another folder")
    size = sum(about.end - about.begin for about in plan.tensors.values())
    place = next(folder for folder in out.parents if folder.exists())
    if (free := shutil.disk_usage(place).free) < size:
        raise UserError(f"{args.out}: {size / 1e9:.1f} GB needed, {free / 1e9:.1f} GB free")
    if args.check_logits:
        lone = len(adapters) == 1 and adapters[0].weight == 1
        if not lone and any(p.saved or p.magnitude for parts in plan.parts.values() for p in parts):
            raise UserError("--check-logits cannot weigh DoRA or tensors that were saved whole")
        need = 5 * sum(math.prod(about.shape) for about in plan.tensors.values())  # float32, some
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        if need > free:
            raise UserError(f"--check-logits needs {need / 1e9:.1f} GB, {free / 1e9:.1f} GB free")


def main(argv: list[str] | None = None) -> None:
    """Adapters + base -> checks -> copied and changed tensors -> proof -> folder."""
    started = time.monotonic()
    args = parse_args(argv)
    adapters = [read_adapter(Path(folder), weight) for folder, weight in args.adapter]
    args.base_model = args.base_model or adapters[0].config.get("base_model_name_or_path") or ""
    base = base_folder(args.base_model)
    check_output(args.out, args.overwrite, base, *(adapter.folder for adapter in adapters))
    plan = read_base(base)
    for adapter in adapters:
        check_numbers(adapter)
        add_adapter(adapter, plan)
    check_room(args, plan, adapters)
    about = describe(args, plan, adapters)
    with folder_aside(args.out, args.overwrite) as aside:
        proof: Counter = Counter()
        for number, shard in enumerate(plan.shards, 1):
            write_shard(plan, shard, aside / shard)
            proof.update(prove_shard(plan, aside / shard, args.seed))
            print(f"shard {number}/{len(plan.shards)} written and proved", file=sys.stderr)
        copy_files(plan, aside)
        about |= {
            "proof": proof,
            "counts": {"tensors": len(plan.tensors), "changed": len(plan.changed())},
        }
        if plan.norms:
            print(table := norm_table(plan))
            about["norms"] = table.splitlines()
        if args.check_logits:
            about["logits"] = check_logits(args, plan, aside)
        write_file(aside / "README.md", model_card(args, plan, about))
        inputs = [base / shard for shard in plan.shards]
        inputs += [adapter.folder / "adapter_model.safetensors" for adapter in adapters]
        place = argparse.Namespace(**{**vars(args), "out": aside})
        finish_run(place, inputs, started, settings=vars(args), base_model=args.base_model, **about)
    print(
        f"wrote {args.out}: {len(plan.changed())} tensors changed, {proof['tensors_equal_to_base']} kept. Next:"
    )
    print(
        shlex.join(["python", "evaluate.py", "--model", args.base_model, "--model", str(args.out)])
    )


def describe(args: argparse.Namespace, plan: Plan, adapters: list[Adapter]) -> dict[str, Any]:
    """What run.json and the model card say about where the model comes from; prints warnings."""
    warnings = check_origin(args, plan, adapters)
    trained = [training_of(adapter) for adapter in adapters]
    warnings += [warning for _, found in trained for warning in found]
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)
    path = plan.base / "run.json"
    before = read_json(path, lineage=(list,)).get("lineage") if path.exists() else None
    this = {
        "base_model": args.base_model,
        "adapters": [f"{a.folder}:{a.weight:g}" for a in adapters],
    }
    this["sha256"] = [facts["sha256"] for facts, _ in trained]
    lineage = [*(before or []), this]
    return {"adapters": [facts for facts, _ in trained], "warnings": warnings, "lineage": lineage}


if __name__ == "__main__":
    run_main(main)

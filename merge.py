"""Merge adapters into a model by PEFT's own code, one module at a time.

Step 4 of 5 (paper, section 3.2). Reads a base model (folder or hub id, safetensors) and adapters
in PEFT's layout; writes out/merged/: a Hugging Face model folder in shards of 1 GB with the base's
config, tokenizer and licences, a model card (README.md) and run.json.

    python merge.py --adapter out/lora --out out/small
    python merge.py
    python merge.py --adapter out/a --adapter out/b:0.5 --out out/both
    python merge.py --base-model other --foreign-base --partner-check out/other --out out/camel

The last merges into a partner: another fine-tune of the base, as Camel in the paper.

The model is built without its weights, on torch's meta device, and PEFT puts the adapter around
it. Then each module that the adapter tunes gets its weights from the base's files, PEFT merges the
adapter into it, and the result goes into the next output shard; every other tensor is copied. So
the bits are those of merge_and_unload(). Only kinds of adapters and options in BY_MODULE go this
way, those whose bits tests compare; the others are merged by PEFT with the whole model in memory,
and a line says so. Several adapters are added by their weights, in float64, and rounded. An adapter
is refused where a tensor of it would not be used, or one that its config selects is missing.
Time: somewhat less than PEFT's own merge takes, though every file is hashed; memory: two output
shards beside the libraries (both measured: benchmarks/merge.py).
"""

import argparse
import dataclasses
import functools
import json
import math
import os
import re
import shlex
import shutil
import sys
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

from common import (
    DECISIONS,
    Row,
    UserError,
    base_fingerprint,
    check_input,
    check_output,
    claim_output,
    describe_files,
    fetch_model,
    finish_run,
    make_parser,
    markdown_table,
    next_command,
    one_line,
    printable,
    read_adapter,
    read_decisions,
    read_json,
    read_jsonl,
    read_object,
    refuse,
    removed_ids,
    run_main,
    sha256_of,
    sync,
    tensor_names,
    write_file,
)

if TYPE_CHECKING:
    import torch
    from huggingface_hub import StateDictSplit
    from peft import PeftModel
    from peft.tuners.tuners_utils import BaseTunerLayer
    from transformers import PreTrainedModel

SHARD_SIZE = "1GB"  # of an output file; two are in memory, one that is made and one written
MODULES_AT_ONCE = 2  # merged side by side: one is computed while the other waits for the disk
WHOLE = "model.safetensors"  # transformers' name of a model in one file
INDEX = "model.safetensors.index.json"  # and of the list of its tensors, where it is in several
ADAPTER = "adapter_model.safetensors"  # PEFT's names
CONFIG = "adapter_config.json"
COPIED = (  # files of the base that the merged folder needs, or has to carry along
    "config.json",
    "generation_config.json",
    "*processor_config.json",
    "*token*.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "*.model",
    "chat_template.*",
    "LICEN[CS]E*",
    "NOTICE*",
    "USE_POLICY*",
)
# options that say where an adapter acts, not how it is merged
PLACES = {"target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"}
BY_MODULE = {  # kind: its options with which tests compare the bits with those of PEFT's merge
    "LORA": {
        "r",
        "lora_alpha",
        "use_rslora",
        "use_dora",
        "lora_bias",
        "rank_pattern",
        "alpha_pattern",
        "init_lora_weights",
        "fan_in_fan_out",
    },
    "IA3": {"feedforward_modules", "fan_in_fan_out"},
    "VERA": {"r", "d_initial", "projection_prng_key", "fan_in_fan_out"},
    "LOHA": {"r", "alpha", "rank_pattern", "alpha_pattern"},
    "LOKR": {"r", "alpha", "decompose_both", "decompose_factor", "rank_pattern", "alpha_pattern"},
    "OFT": {"r", "oft_block_size", "use_cayley_neumann"},
    "BOFT": {"boft_block_size", "boft_block_num", "boft_n_butterfly_factor"},
    "HRA": {"r", "apply_GS"},
    "FOURIERFT": {"n_frequency", "scaling", "random_loc_seed", "fan_in_fan_out"},
    "RANDLORA": {"r", "randlora_alpha", "projection_prng_key"},
    "MISS": {"r", "mini_r"},
    "VBLORA": {"r", "num_vectors", "vector_length", "topk", "fan_in_fan_out"},
}
SUMMABLE = {"LORA": BY_MODULE["LORA"] - {"use_dora"}}  # whose changes can be weighted and added
# init_lora_weights that change the base when training starts, by a random SVD, data or gradients:
# loading cannot repeat that. What pissa, olora and loftq do follows from the base: PEFT repeats it
UNREPEATABLE_STARTS = ("pissa_niter", "corda", "lora_ga")


@dataclass
class Adapter:
    """An adapter folder of PEFT's."""

    name: str  # as PEFT calls it here
    folder: Path
    weight: float  # of its change in the sum
    config: dict[str, Any]
    keys: set[str]  # names of its tensors
    hashes: dict[str, Row]  # of its two files, by describe_files()


@dataclass
class Base:
    """A model folder as it lies on the disk."""

    folder: Path
    files: dict[str, Path]  # tensor -> its file, in the order of their bytes: read in one sweep
    shards: list[Path]  # these files


@dataclass
class TunedModule:
    """A module that adapters tune."""

    layer: "BaseTunerLayer"  # PEFT's, around the module
    names: dict[str, str]  # "weight", "bias" -> the tensor's name on the disk


@dataclass
class Plan:
    """The merge of a model module by module."""

    files: dict[str, Path]  # of the base
    modules: dict[str, TunedModule]  # path of a module -> it
    work_dtype: "torch.dtype | None" = None  # PEFT merges in it, or in the weights' own if wider


class NotByModule(Exception):
    """Why adapters cannot be merged module by module."""


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the flags of this step; every impossible setting is named at once."""
    parser = make_parser(__doc__, "out/merged")
    add = parser.add_argument_group("models").add_argument
    text = "adapter folder, times WEIGHT (default 1); repeatable (default: out/adapter)"
    add("--adapter", action="append", metavar="DIR[:WEIGHT]", help=text)
    add("--base-model", metavar="MODEL", help="folder or hub id (default: the adapter's own)")
    add = parser.add_argument_group("checks").add_argument
    text = "merge into a model that the adapter was not trained on; prints a table of norms"
    add("--foreign-base", action="store_true", help=text)
    text = "check_contamination.py's folder of the data that the other model was trained on"
    add("--partner-check", type=Path, metavar="DIR", help=text)
    text = "merge although pairs in --partner-check are not decided not-a-leak (paper: never)"
    add("--allow-contaminated", action="store_true", help=text)
    text = "compare logits with those of base + adapter, each loaded in float32"
    add("--check-logits", action="store_true", help=text)
    args = parser.parse_args(argv)

    args.adapter = [split_weight(item) for item in args.adapter or ["out/adapter"]]
    faults = []
    if args.limit:
        faults.append("--limit does not apply: a merge is whole")
    if args.device not in (None, "cpu"):
        faults.append(f"--device {args.device}: merging runs on the cpu")
    if args.allow_contaminated and not args.partner_check:
        faults.append("--allow-contaminated does nothing without --partner-check")
    if args.check_logits and (len(args.adapter) > 1 or args.adapter[0][1] != 1):
        faults.append("--check-logits takes one adapter of weight 1")
    refuse(faults)
    return args


def split_weight(item: str) -> tuple[str, float]:
    """Split DIR[:WEIGHT] into (folder, weight).

    >>> split_weight("out/a:0.5"), split_weight("out/a")
    (('out/a', 0.5), ('out/a', 1.0))
    """
    folder, colon, text = item.rpartition(":")
    if not colon or Path(item).is_dir():
        return item, 1.0
    try:
        weight = float(text)
    except ValueError:
        weight = math.nan
    if weight == 0 or not math.isfinite(weight):
        raise UserError(f"--adapter {item}: the weight {text!r} is not a number other than 0")
    return folder, weight


# --- what is on the disk --------------------------------------------------------------------------


def open_adapters(args: argparse.Namespace) -> list[Adapter]:
    """Read the adapters' configurations, the names of their tensors, and their hashes."""
    adapters = []
    for number, (place, weight) in enumerate(args.adapter):
        name = f"adapter-{number}"  # make_plan() knows the adapters' parameters by it
        folder = Path(place)
        config, keys = read_adapter(folder)
        hashes = describe_files([folder / CONFIG, folder / ADAPTER])
        adapters.append(Adapter(name, folder, weight, config=config, keys=keys, hashes=hashes))
    return adapters


def open_base(args: argparse.Namespace, adapter: Adapter) -> Base:
    """Find the base's files; sets args.base_model to the adapter's own base where no flag does."""
    own = adapter.config.get("base_model_name_or_path")
    args.base_model = args.base_model or str(own or "")
    folder = fetch_model("--base-model", args.base_model)
    path = check_input(folder / "config.json", "name a model's folder with --base-model")
    if read_json(path).get("quantization_config"):
        raise UserError(f"{path}: quantised; merge into the original")
    files = find_tensors(folder)
    if not files:
        raise UserError(f"{folder} has no tensors")
    return Base(folder, files, shards=sorted(set(files.values())))


def find_tensors(folder: Path) -> dict[str, Path]:
    """Map the tensors of a model folder to their files, those that transformers would load."""
    shards = [WHOLE]
    if not (folder / WHOLE).exists() and (folder / INDEX).exists():  # in that order of preference
        weight_map = read_value(folder / INDEX, "weight_map", dict)
        shards = sorted({str(shard) for shard in weight_map.values()})

    files = {}
    for shard in shards:
        if Path(shard).name != shard:
            raise UserError(f"{folder / INDEX}: {shard} is no file of its folder")
        if not (folder / shard).is_file():
            mend = "if the model is in pickles (.bin), save it as safetensors first"
            raise UserError(f"{folder} has no {shard}; {mend}")
        files.update(dict.fromkeys(tensor_names(folder / shard), folder / shard))
    return files


def read_value(path: Path, key: str, kind: type) -> Any:
    """Read one value of a JSON file; an empty `kind` where the file or the value is missing."""
    value = read_json(path).get(key) if path.exists() else None
    if value is None:
        return kind()
    if not isinstance(value, kind):
        raise UserError(f"{path}: {key} cannot be {value!r:.60}")
    return value


def read_tensor(files: dict[str, Path], name: str) -> "torch.Tensor":
    """Return one tensor, a view of the mapped file: its numbers are read when they are used."""
    from safetensors import safe_open

    with safe_open(files[name], "pt") as file:
        return file.get_tensor(name)  # it keeps the file mapped after this block


def check_place(args: argparse.Namespace, base: Base, adapters: list[Adapter]) -> None:
    """Refuse an output folder that is finished or inside an input, and a disk that is too small."""
    inputs = [base.folder, *(adapter.folder for adapter in adapters)]
    check_output(args.out, args.overwrite, *inputs)
    out = args.out.resolve()
    for folder in inputs:
        if out.is_relative_to(folder.resolve()):
            raise UserError(f"--out {args.out} lies inside {folder}, an input; name another folder")

    parent = next(folder for folder in (out, *out.parents) if folder.exists())
    free = shutil.disk_usage(parent).free
    free += sum(path.stat().st_size for path in out.glob("model*.safetensors"))  # of a former run
    size = sum(path.stat().st_size for path in base.shards)
    if size > free:
        raise UserError(f"{args.out}: {size / 1e9:.1f} GB needed, {free / 1e9:.1f} free")


# --- where base, adapters and partner come from ---------------------------------------------------


def describe_merge(args: argparse.Namespace, base: Base, adapters: list[Adapter]) -> Row:
    """Check where base, adapters and partner come from; returns what card and run.json say of it.

    Prints the warnings.
    """
    described = [describe_training(adapter) for adapter in adapters]
    cautions = [check_fingerprint(args, base, adapter) for adapter in adapters]
    cautions.append(check_partner(args))
    weights = defaultdict(float)  # a folder may be named twice: its weights add up
    for training in described:
        folder = training["folder"]
        weights[folder] += training["weight"]
        count = training.get("flagged_rows")
        if count is None:
            cautions.append(f"whether {folder} was trained on flagged rows is not known")
        elif count:
            cautions.append(f"{folder} was trained on {count} rows that are flagged as leaks")
    cautions = [caution for caution in cautions if caution]
    for caution in cautions:
        print(f"warning: {one_line(caution)}", file=sys.stderr)

    former = read_value(base.folder / "run.json", "lineage", list)
    lineage = [step for step in former if isinstance(step, dict)]
    lineage.append({"base_model": args.base_model, "adapters": dict(weights)})
    return {
        "base_model": args.base_model,
        "adapters": described,
        "warnings": cautions,
        "lineage": lineage,
    }


def check_fingerprint(args: argparse.Namespace, base: Base, adapter: Adapter) -> str:
    """Compare the base with the one that an adapter was trained on; returns a warning, or nothing.

    Refuses another base without --foreign-base.
    """
    path = adapter.folder / "base_fingerprint.json"
    if not path.exists():
        return f"no {path}: whether {adapter.folder} was trained on {base.folder} is not known"
    trained_on = read_json(path)
    shown = one_line(adapter.folder)
    if trained_on.get("load_in_4bit"):
        print(f"{shown} was trained on NF4; the merge is into the 16-bit weights", file=sys.stderr)
        command = ["python", "evaluate.py", "--load-in-4bit", "--adapter", str(adapter.folder)]
        command += ["--model", args.base_model]
        print(f"to score it on NF4: {printable(shlex.join(command))}", file=sys.stderr)
    found = base_fingerprint(base.folder)
    differ = [part for part in found if trained_on.get(part) != found[part]]
    if not differ:
        print(f"{one_line(base.folder)} is the base of {shown}: fingerprints agree")
        return ""

    origin = trained_on.get("base_model") or adapter.config.get("base_model_name_or_path")
    parts = " and ".join(differ)
    difference = f"{adapter.folder} was trained on {origin}; {base.folder} differs in its {parts}"
    if not args.foreign_base:
        raise UserError(f"{difference}; if you mean it, add --foreign-base")
    return difference


def check_partner(args: argparse.Namespace) -> str:
    """Keep the paper's rule: no merge with a partner that was trained on benchmark questions.

    Returns a warning, or nothing.
    """
    folder = args.partner_check
    if not folder:
        caution = "no --partner-check: the other model may know benchmark questions"
        return caution if args.foreign_base else ""
    check_input(folder / "pairs.jsonl", "python check_contamination.py writes it")
    count = sum(len(pairs) for pairs in read_leaks(folder).values())
    if not count:
        return ""
    fault = f"{folder}: {count} pairs are not decided not-a-leak"
    if not args.allow_contaminated:
        raise UserError(f"{fault}; see them with python tui.py {folder}")
    return f"{fault}, and it was merged all the same"


def read_leaks(folder: Path) -> dict[str, list[Row]]:
    """Read a check's rows that may be leaks: {id: its pairs that nobody decided not-a-leak}."""
    pairs = read_jsonl(folder / "pairs.jsonl", {"pair_id": str, "train_id": str})
    # a row is a leak here where `check_contamination.py apply` would remove it
    return removed_ids(pairs, read_decisions(folder / DECISIONS))


def describe_training(adapter: Adapter) -> Row:
    """Collect what is known of an adapter: its hash, its data, their licences and leaks.

    "flagged_rows" is there only if all its data is known, unchanged and checked.
    """
    described: Row = {"folder": str(adapter.folder), "weight": adapter.weight, "data": {}}
    described["sha256"] = adapter.hashes[str(adapter.folder / ADAPTER)]["sha256"]
    licences = Counter()
    flagged = []  # rows of each file that has been checked
    run = read_object(adapter.folder / "run.json")  # {}: has none; read_adapter() refuses a bad one
    for name, recorded in run.get("inputs", {}).items():
        data = Path(name)
        if data.suffix == ".safetensors" or data.name.endswith("config.json"):  # a model's
            continue
        described["data"][name] = recorded
        if not data.is_file() or sha256_of(data) != recorded.get("sha256"):
            continue
        rows = read_jsonl(data, {})
        licences.update(str(row.get("licence", "unknown")) for row in rows)
        described["licences"] = dict(licences)
        if data.with_name("pairs.jsonl").exists():
            leaks = read_leaks(data.parent)
            flagged.append(sum(row.get("id") in leaks for row in rows))
            described.setdefault("contamination", str(data.parent))  # evaluate.py takes one

    if flagged and len(flagged) == len(described["data"]):
        described["flagged_rows"] = sum(flagged)
    return described


# --- which way adapters are merged ----------------------------------------------------------------


def choose_way(base: Base, adapters: list[Adapter]) -> Plan | None:
    """Plan the merge module by module; None, and say why, where PEFT has to merge it as a whole."""
    for adapter in adapters:
        check_known(adapter)
        check_trained(adapter)
    weighted = len(adapters) > 1 or adapters[0].weight != 1
    tested = SUMMABLE if weighted else BY_MODULE
    try:
        for adapter in adapters:
            check_tested(adapter, tested)
        plan = make_plan(base, adapters)
    except NotByModule as reason:
        if weighted:
            fault = f"{reason}: such an adapter can be merged alone only, with weight 1"
            raise UserError(fault) from None
        print(f"merging with the whole model in memory: {one_line(reason)}", file=sys.stderr)
        return None
    if weighted:
        set_weights(plan, adapters)
    return plan


def check_known(adapter: Adapter) -> None:
    """Refuse kinds and options that the installed PEFT does not know or that no merge gets right.

    PEFT itself leaves out options that it does not know, with a warning.
    """
    from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PromptLearningConfig

    path = adapter.folder / CONFIG
    kind = str(adapter.config.get("peft_type"))
    if kind not in PEFT_TYPE_TO_CONFIG_MAPPING:
        raise UserError(f"{path}: peft_type = {kind} is no kind of adapter")
    config_class = PEFT_TYPE_TO_CONFIG_MAPPING[kind]
    if issubclass(config_class, PromptLearningConfig):
        raise UserError(f"{path}: {kind} is a learned prompt: no weights can hold it")
    known = {field.name for field in dataclasses.fields(config_class)}
    for option, value in adapter.config.items():
        if value and option not in known:
            fault = f"{path} has {option} = {value!r:.60}, no option of {kind} in this PEFT"
            raise UserError(f"{fault}; install the version of PEFT that saved it")

    if adapter.config.get("layer_replication"):
        reason = "its layers share weights, so that one would get the changes of all"
        raise UserError(f"{path}: layer_replication cannot be merged: {reason}")
    start = str(adapter.config.get("init_lora_weights")).lower()
    if start.startswith(UNREPEATABLE_STARTS):
        mend = "save it again with PEFT's path_initial_model_for_weight_conversion"
        raise UserError(f"{path}: init_lora_weights = {start!r} changed the base by chance; {mend}")


def check_trained(adapter: Adapter) -> None:
    """Refuse an untrained LoRA: its lora_B, of an embedding lora_embedding_A, is still zero."""
    from safetensors.torch import load_file

    if adapter.config["peft_type"] != "LORA":
        return
    # base_layer: the weights of a tuned embedding itself, which PEFT saves with the adapter
    never_zero = "lora_A|lora_embedding_B|lora_magnitude|base_layer"
    for name, tensor in load_file(adapter.folder / ADAPTER).items():
        if not re.search(never_zero, name) and tensor.any():
            return
    raise UserError(f"{adapter.folder} changes nothing: it is untrained (every B is zero)")


def check_tested(adapter: Adapter, tested: dict[str, set[str]]) -> None:
    """Raise NotByModule where the adapter's kind or one of its options is not `tested`."""
    from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PeftConfig

    kind = adapter.config["peft_type"]
    if kind not in tested:
        raise NotByModule(f"{adapter.folder} has a peft_type of the kind {kind}")
    of_all_kinds = {field.name for field in dataclasses.fields(PeftConfig)}  # version, base…
    harmless = tested[kind] | PLACES | of_all_kinds
    defaults = vars(PEFT_TYPE_TO_CONFIG_MAPPING[kind]())
    for option, value in adapter.config.items():
        if option in harmless or option.endswith("_dropout"):  # acts in training only
            continue
        if value not in (None, [], {}, defaults.get(option)):
            raise NotByModule(f"{adapter.folder} has {option} = {value!r:.60}")

    # pissa, olora and loftq rewrite the base by its numbers, which the meta device has not; those
    # that do not, such as gaussian, are not told apart here: all are merged as a whole
    start = adapter.config.get("init_lora_weights", True)
    if not isinstance(start, bool):
        fault = f"{adapter.folder} has init_lora_weights = {start!r}"
        raise NotByModule(f"{fault}, which may rewrite the base")


def make_plan(base: Base, adapters: list[Adapter]) -> Plan:
    """Put the adapters around a model without weights, and find the modules that they tune.

    Raises NotByModule unless all numbers of the adapters are there, none of the base came with
    them, such as a saved embedding, and each tuned parameter has a tensor of its own on the disk.
    """
    import torch
    from peft.tuners.tuners_utils import BaseTunerLayer

    model = load_model(base, weightless=True)
    disk_names = match_names(model, base)
    # PEFT would move an adapter to the device of its base, which is meta and holds no numbers
    with mock.patch.object(BaseTunerLayer, "_move_adapter_to_device_of_base_layer"):
        model = wrap(model, adapters, base)
    model.base_model.set_adapter([adapter.name for adapter in adapters])  # merge() takes these
    for name, parameter in model.named_parameters():
        of_adapter = ".adapter-" in name
        if of_adapter and parameter.is_meta:
            raise NotByModule(f"{name} is not in the adapter's file")
        if not of_adapter and not parameter.is_meta:
            raise NotByModule(f"{name} is in the adapter's file")

    plan = Plan(base.files, find_modules(model, disk_names))
    if adapters[0].config["peft_type"] == "LORA":
        # PEFT adds a float32 change to 16-bit weights: torch widens them, adds, and rounds once; so
        # does DoRA's product. Widened before, they give the same bits, by torch's faster code for
        # operands of one type
        plan.work_dtype = torch.float32
    return plan


def find_modules(model: "PeftModel", disk_names: dict[str, str]) -> dict[str, TunedModule]:
    """Find the modules that adapters tune, by their paths; NotByModule where one is not on disk."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    modules = {}
    for path, layer in model.get_base_model().named_modules():
        if not isinstance(layer, BaseTunerLayer):
            continue
        names = {}
        for attribute, _ in layer.get_base_layer().named_parameters():
            parameter = f"{path}.{attribute}"
            if parameter not in disk_names:
                raise NotByModule(f"{parameter} has no tensor of its own on the disk")
            names[attribute] = disk_names[parameter]
        modules[path] = TunedModule(layer, names)
    return modules


def set_weights(plan: Plan, adapters: list[Adapter]) -> None:
    """Give each adapter its weight; the changes of all are then summed in float64."""
    import torch

    plan.work_dtype = torch.float64
    for module in plan.modules.values():
        module.layer.double()
        for adapter in adapters:
            if adapter.name in module.layer.scaling:
                module.layer.scaling[adapter.name] *= adapter.weight


# --- the model, the adapters around it, and which tensor is whose ---------------------------------


def load_model(base: Base, weightless: bool) -> "PreTrainedModel":
    """Load the base model; `weightless` builds it on the meta device, where it takes no memory."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with name_errors(f"{base.folder} cannot be loaded"):
        if weightless:
            config = AutoConfig.from_pretrained(base.folder, trust_remote_code=False)
            with torch.device("meta"):
                return AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        options = {"dtype": "auto", "use_safetensors": True, "trust_remote_code": False}
        return AutoModelForCausalLM.from_pretrained(base.folder, **options)


@contextmanager
def name_errors(fault: str) -> Iterator[None]:
    """Raise a UserError, `fault` and the cause, for whatever a library raises in the block."""
    try:
        yield
    except Exception as error:  # as many kinds as there are models, adapters and disks
        raise UserError(f"{fault}: {type(error).__name__}: {one_line(error, 500)}") from None


def match_names(model: "PreTrainedModel", base: Base) -> dict[str, str]:
    """Map a model's parameters to the tensors on the disk, as transformers does when it loads them.

    A parameter is left out, so that its module cannot be merged alone, where transformers makes it
    of other tensors (experts that it fuses), or where two modules share it.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if not isinstance(rule, WeightRenaming)]
    known = model.state_dict()
    # with these a prefix is added or dropped to fit `known`: GPT-2's files lack "transformer."
    options = {"base_model_prefix": model.base_model_prefix, "meta_state_dict": known}

    names = {}
    for name in base.files:
        # its name in the model; the rule, if any, that converts it on loading
        parameter, converter = rename_source_key(name, renamings, converters, **options)
        if parameter in known and converter is None:
            names[parameter] = name
    for pair in model.all_tied_weights_keys.items():  # such as head and embedding
        for parameter in pair:
            names.pop(parameter, None)
    return names


def wrap(model: "PreTrainedModel", adapters: list[Adapter], base: Base) -> "PeftModel":
    """Put the adapters around a model; refuse any that would be used in part."""
    from peft import PeftModel

    # nothing can be copied into an adapter on the meta device, where PEFT makes it beside such a
    # base; with low_cpu_mem_usage the loaded tensors take the place of its own
    options = {"torch_device": "cpu", "low_cpu_mem_usage": model.device.type == "meta"}
    first = adapters[0]
    folders = ", ".join(str(adapter.folder) for adapter in adapters)
    with name_errors(f"{folders} does not fit {base.folder}"):
        with warnings.catch_warnings(action="ignore"):  # of missing keys: check_keys() refuses them
            model = PeftModel.from_pretrained(model, first.folder, first.name, **options)
            for adapter in adapters[1:]:
                model.load_adapter(adapter.folder, adapter.name, **options)
    for adapter in adapters:
        check_keys(model, adapter)
    return model


def check_keys(model: "PeftModel", adapter: Adapter) -> None:
    """Refuse an adapter that would be used in part, or lacks a part of what its config selects."""
    from peft import get_peft_model_state_dict

    # PEFT's default asks the hub whether the embeddings must be saved; here they may be, or not
    options = {"adapter_name": adapter.name, "save_embedding_layers": False}
    selected = set(get_peft_model_state_dict(model, **options))
    missing = sorted(selected - adapter.keys)
    if missing:
        fault = f"{len(missing)} of the {len(selected)} tensors that its config selects are missing"
        raise UserError(f"{adapter.folder / ADAPTER}: {fault}: {', '.join(missing[:3])}")
    # PEFT loads a tensor with a name of the base's, such as a saved embedding, into the base
    ignored = sorted(adapter.keys - selected - set(model.state_dict()))
    if ignored:
        fault = f"{len(ignored)} of its {len(adapter.keys)} tensors would be ignored"
        fault = f"{fault}: {', '.join(ignored[:3])}"
        raise UserError(f"{adapter.folder} does not fit this base: {fault}")


# --- merging --------------------------------------------------------------------------------------


def start_folder(base: Base, out: Path) -> set[Path]:
    """Remove shards of a merge that broke off; copy the base's tokenizer, licences and config.

    Returns the copies.
    """
    for left in out.glob("model*.safetensors*"):  # transformers would load the wrong ones
        left.unlink()
    copies = set()
    for pattern in COPIED:
        for path in sorted(base.folder.glob(pattern)):
            if path.is_file():
                write_file(out / path.name, path.read_bytes())
                copies.add(out / path.name)
    return copies


def merge_by_module(plan: Plan, out: Path) -> list[Path]:
    """Write the shards of the merged model, and their index; returns the files.

    One shard is written while the next is made: two are in memory at most.
    """
    split = split_into_shards(plan)
    weight_map = {}
    with ThreadPoolExecutor(1) as writer:
        writing = None
        for shard, keys in split.filename_to_tensors.items():
            tensors = make_tensors(plan, keys)
            weight_map.update(dict.fromkeys(tensors, shard))
            if writing:
                writing.result()  # raises what went wrong there
            writing = writer.submit(write_shard, tensors, out / shard)
            print(f"made {shard}", file=sys.stderr)
        writing.result()

    written = [out / shard for shard in split.filename_to_tensors]
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": weight_map}
        write_file(out / INDEX, json.dumps(index, indent=2) + "\n")
        written.append(out / INDEX)
    return written


def split_into_shards(plan: Plan) -> "StateDictSplit":
    """Decide which tuned modules (by their paths) and other tensors (by their names) share a file.

    A module's weight and bias are merged at once, so they are never parted.
    """
    from huggingface_hub import split_state_dict_into_shards_factory

    paths = {}
    for path, module in plan.modules.items():
        paths.update(dict.fromkeys(module.names.values(), path))
    sizes = Counter()
    for name in plan.files:
        sizes[paths.get(name, name)] += read_tensor(plan.files, name).nbytes
    return split_state_dict_into_shards_factory(
        sizes,  # instead of tensors: all that it asks of one is its size
        get_storage_size=int,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=SHARD_SIZE,
    )


def make_tensors(plan: Plan, keys: list[str]) -> dict[str, "torch.Tensor"]:
    """Make the tensors of one shard of split_into_shards(): merged, or copied."""
    tensors = {key: read_tensor(plan.files, key) for key in keys if key not in plan.modules}
    paths = [key for key in keys if key in plan.modules]
    with ThreadPoolExecutor(MODULES_AT_ONCE) as threads:
        for merged in threads.map(functools.partial(merge_layer, plan), paths):
            tensors.update(merged)
    return tensors


def merge_layer(plan: Plan, path: str) -> dict[str, "torch.Tensor"]:
    """Let PEFT merge the adapters into one module; returns {name on the disk: merged tensor}.

    The module is on the meta device before and after.
    """
    import torch

    layer = plan.modules[path].layer
    names = plan.modules[path].names
    module = layer.get_base_layer()
    dtypes = {}
    for attribute, name in names.items():
        stored = read_tensor(plan.files, name)
        if not stored.is_floating_point() or stored.element_size() < 2:  # quantised
            fault = f"{name} holds {stored.dtype}; merge into the 16-bit original"
            raise UserError(f"{plan.files[name]}: {fault}")
        dtype = stored.dtype
        dtypes[attribute] = dtype
        if plan.work_dtype:
            dtype = torch.promote_types(dtype, plan.work_dtype)
        numbers = stored.to(dtype, copy=True)  # PEFT writes into it; `stored` is the mapped file
        setattr(module, attribute, torch.nn.Parameter(numbers, requires_grad=False))
    with name_errors(f"PEFT cannot merge {path}"):
        layer.merge()

    merged = {}
    for attribute, name in names.items():
        merged[name] = getattr(module, attribute).detach().to(dtypes[attribute]).contiguous()
        check_finite(name, merged[name])
    module.to("meta")
    return merged


def check_finite(name: str, tensor: "torch.Tensor") -> None:
    """Refuse NaN and infinite numbers, by their range: much faster than isfinite()."""
    low, high = tensor.aminmax()  # each is NaN where any number is
    if not math.isfinite(low.item()) or not math.isfinite(high.item()):
        cause = "NaN or infinite numbers in adapter or base, or too large a change"
        raise UserError(f"{name}: the sum is not finite in {tensor.dtype}: {cause}")


def write_shard(tensors: dict[str, "torch.Tensor"], path: Path) -> None:
    """Write a safetensors file under another name, rename it once it is on the disk."""
    from safetensors.torch import save_file

    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with name_errors(f"{path} cannot be written"):
            save_file(tensors, temporary, metadata={"format": "pt"})  # transformers asks for it
        temporary.chmod(0o644)  # safetensors lets only the owner read it
        sync(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def merge_plainly(base: Base, adapters: list[Adapter], out: Path) -> list[Path]:
    """Merge by PEFT with the whole model in memory; returns the files that were written.

    Its config takes the place of the base's: the head may have become a tensor of its own.
    """
    model = wrap(load_model(base, weightless=False), adapters, base)
    untie_head(model)
    with name_errors(f"PEFT cannot merge {adapters[0].folder}"):
        merged = model.merge_and_unload()
    for name, parameter in merged.named_parameters():
        check_finite(name, parameter.detach())

    # merge_and_unload() sets False wherever head and embedding have become two tensors, but only in
    # the outer config; that of the text model within it says the same
    if not merged.config.tie_word_embeddings:
        merged.config.get_text_config().tie_word_embeddings = False
    with name_errors(f"{out} cannot be written"):
        merged.save_pretrained(out, max_shard_size=SHARD_SIZE)
    return [*out.glob("model*.safetensors*"), *out.glob("*config.json")]


def untie_head(model: "PeftModel") -> None:
    """Make a head that is the embedding a tensor of its own where the adapter tunes either.

    PEFT would add the change of one to the tensor that both share: in training it acted on one.
    """
    import torch
    from peft.tuners.tuners_utils import BaseTunerLayer

    embedding = model.get_base_model().get_input_embeddings()
    head = model.get_base_model().get_output_embeddings()
    tuned = isinstance(embedding, BaseTunerLayer) or isinstance(head, BaseTunerLayer)
    if tuned and head is not None and head.weight is embedding.weight:
        if isinstance(head, BaseTunerLayer):
            head = head.get_base_layer()
        head.weight = torch.nn.Parameter(head.weight.detach().clone(), requires_grad=False)


# --- checks of the result -------------------------------------------------------------------------


def norm_table(base: Base, out: Path) -> list[str]:
    """Tabulate each layer's norms: of the weights that changed, and of their change."""
    import torch

    files = find_tensors(out)
    squares = defaultdict(Counter)
    for name in base.files:
        if name not in files:  # save_pretrained() left it out: unknown to the model, or tied
            continue
        weights = read_tensor(base.files, name).float()
        change = read_tensor(files, name).float() - weights
        if change.any():
            number = re.search(r"\.(\d+)\.", name)  # model.layers.12.mlp.up_proj.weight
            layer = f"layer {number[1]}" if number else name
            squares[layer]["weights"] += torch.sum(weights**2).item()
            squares[layer]["change"] += torch.sum(change**2).item()

    rows = []
    for layer, sums in squares.items():
        weight = math.sqrt(sums["weights"])
        change = math.sqrt(sums["change"])
        ratio = change / weight if weight else math.nan
        rows.append([layer, f"{weight:.4g}", f"{change:.4g}", f"{ratio:.4g}"])
    headers = ["layer", "weights", "change", "change / weights"]
    return markdown_table(headers, rows).splitlines()


def check_logits(base: Base, adapter: Adapter, out: Path) -> dict[str, float]:
    """Compare the merged model's logits with those of base + adapter; relative distances.

    In float32, so that all that is left is the rounding of the merged weights. UserError where the
    distance is above 16 units of that rounding (of random Llamas it is 0.4 to 1.1), or above 1e-4
    where they are float32 (it is 1e-6), or above that to the base's own logits.
    """
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    with torch.no_grad():
        options = {"dtype": torch.float32, "trust_remote_code": False}
        model = AutoModelForCausalLM.from_pretrained(base.folder, **options)
        vocabulary = model.get_input_embeddings().num_embeddings
        ids = torch.arange(16)[None] % vocabulary  # any tokens do
        of_base = model(ids).logits
        of_both = PeftModel.from_pretrained(model, adapter.folder)(ids).logits
        del model  # before the next one is loaded
        options["dtype"] = "auto"
        model = AutoModelForCausalLM.from_pretrained(out, **options)
        rounding = torch.finfo(model.dtype).eps
        of_merged = model.float()(ids).logits

    found = {
        "to_base_and_adapter": ((of_merged - of_both).norm() / of_both.norm()).item(),
        "to_base": ((of_merged - of_base).norm() / of_base.norm()).item(),
    }
    most = min(max(1e-4, 16 * rounding), found["to_base"])
    if not found["to_base_and_adapter"] <= most:  # NaN is no distance either
        raise UserError(f"--check-logits: merged and base + adapter differ: {found}")
    return found


# --- what was done --------------------------------------------------------------------------------


def write_card(base: Base, record: Row, out: Path) -> Path:
    """Write the model card: licences, the chain of bases and adapters, data, warnings."""
    card = base.folder / "README.md"
    text = card.read_text(encoding="utf-8", errors="replace") if card.exists() else ""
    licences = re.findall(r"^license\w*: *(.+)$", text, re.MULTILINE) or ["not stated in its card"]
    lines = ["# A merged model"]
    lines.append(
        f"Licence of the base: {', '.join(licences)}. It and those of the training data apply to "
        "this model. `run.json` holds all hashes."
    )
    for step in record["lineage"]:
        lines.append(f"- base `{step.get('base_model')}`, adapters: {step.get('adapters')}")
    for adapter in record["adapters"]:
        known = ", ".join(f"{key}: {value}" for key, value in adapter.items())
        lines.append(f"- adapter, {known}")
    for caution in record["warnings"]:
        lines.append(f"- **warning**: {caution}")
    shown = [one_line(line, 9999) for line in lines]
    write_file(out / "README.md", "\n\n".join(shown) + "\n")
    return out / "README.md"


def report(out: Path, record: Row) -> None:
    """Print what the checks have measured, and the next command."""
    for line in record.get("norms", []):
        print(line)
    if "logits" in record:
        print("logits, relative distance of the merged model:", record["logits"])
    print(printable(f"wrote {out}. Next:\n{next_command(out)}"))


def main(argv: list[str] | None = None) -> None:
    """Adapters + base -> checks -> shards -> folder."""
    started = time.monotonic()
    args = parse_args(argv)
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # torch: large pages, a third less CPU time
    adapters = open_adapters(args)
    base = open_base(args, adapters[0])
    check_place(args, base, adapters)
    record = describe_merge(args, base, adapters)
    with ThreadPoolExecutor(1) as beside:  # hashes, while the libraries are imported
        hashing = beside.submit(describe_files, [base.folder / "config.json", *base.shards])
        plan = choose_way(base, adapters)
        inputs = hashing.result()
    for adapter in adapters:
        inputs.update(adapter.hashes)

    with claim_output(args.out, args.overwrite):
        outputs = start_folder(base, args.out)
        if plan:
            outputs.update(merge_by_module(plan, args.out))
            record["counts"] = {"tuned_modules": len(plan.modules)}
        else:
            outputs.update(merge_plainly(base, adapters, args.out))
        if args.foreign_base:
            record["norms"] = norm_table(base, args.out)
        if args.check_logits:
            record["logits"] = check_logits(base, adapters[0], args.out)
        outputs.add(write_card(base, record, args.out))
        finish_run(args, inputs, outputs=sorted(outputs), started=started, **record)
    report(args.out, record)


if __name__ == "__main__":
    run_main(main)

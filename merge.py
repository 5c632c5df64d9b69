"""Merge adapters into a model by PEFT's own code, one module at a time.

Step 4 of 5 (paper, section 3.2). Reads a base model (folder or hub id, safetensors) and adapters
in PEFT's layout; writes out/merged/: a Hugging Face model folder with shards of 1 GB, the base's
own config and tokenizer, a model card (README.md) and run.json.

    python merge.py --adapter out/lora --out out/small
    python merge.py
    python merge.py --adapter out/a --adapter out/b:0.5 --out out/both
    python merge.py --base-model other --foreign-base --partner-check out/other --out out/camel

The model is built without its weights, on torch's meta device, and PEFT puts the adapter around
it. Then each module that the adapter tunes gets its weights from the base's files, PEFT merges the
adapter into it, and the result goes into the next output shard; every other tensor is copied. So
the bits are those of merge_and_unload(). Only kinds of adapters and options in BY_MODULE go this
way, with which tests have seen that; the others are merged by PEFT with the whole model in memory,
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
import shutil
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common import (
    UserError,
    check_input,
    check_output,
    claim_output,
    describe_files,
    fetch_model,
    finish_run,
    first_line,
    make_parser,
    markdown_table,
    next_command,
    one_line,
    read_adapter,
    read_decisions,
    read_json,
    read_jsonl,
    refuse,
    run_main,
    sha256_of,
    sync,
    tensor_names,
    write_file,
)

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from peft.tuners.tuners_utils import BaseTunerLayer
    from transformers import PreTrainedModel

SHARD_SIZE = "1GB"  # of an output file; two are in memory, one that is made and one written
MODULES_AT_ONCE = 2  # merged side by side: most of torch's steps here keep one core busy
WHOLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
ADAPTER = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
COPIED = (  # files of the base that the merged folder needs, or has to carry along
    *("config.json", "generation_config.json", "preprocessor_config.json", "processor_config.json"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model"),
    *("chat_template.json", "chat_template.jinja"),
    *("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*"),
)
NO_MATTER = {  # options of any kind that do not change how a module is merged
    *("peft_type", "task_type", "auto_mapping", "peft_version", "revision", "inference_mode"),
    *("base_model_name_or_path", "target_modules", "exclude_modules", "layers_to_transform"),
    *("layers_pattern", "lora_dropout", "vera_dropout", "module_dropout"),
    *("boft_dropout", "randlora_dropout", "miss_dropout", "vblora_dropout"),
}
BY_MODULE = {  # kind: its options with which tests/test_merge.py has seen the bits of PEFT's merge
    "LORA": {"r", "lora_alpha", "use_rslora", "use_dora", "lora_bias", "rank_pattern",
             "alpha_pattern", "init_lora_weights", "fan_in_fan_out"},
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
}  # fmt: skip
UNSET = (None, [], {})  # values of an option that is not used
NEVER = {  # options with which no merge can be right, and why
    "layer_replication": "its layers share weights, so that one would get the changes of all",
    "alora_invocation_tokens": "it changes only the tokens behind its invocation",
    "arrow_config": "it chooses among adapters by the input",
}
RANDOM_STARTS = ("pissa_niter", "corda", "lora_ga")  # rewrite the base by chance or by data
PROBE = "Below is an instruction that describes a task. At which temperature does water boil?"


@dataclass
class Adapter:
    """An adapter folder of PEFT's."""

    name: str  # as PEFT calls it here
    folder: Path
    weight: float  # of its change in the sum
    config: dict[str, Any]
    keys: set[str]  # names of its tensors


@dataclass
class Base:
    """A model folder as it lies on the disk."""

    folder: Path
    config: dict[str, Any]
    files: dict[str, Path]  # tensor -> the file that holds it, in the order of their bytes

    def read(self, name: str) -> "torch.Tensor":
        """Return one tensor, a view of the mapped file: its numbers are read when they are used."""
        from safetensors import safe_open

        with safe_open(self.files[name], "pt") as file:
            return file.get_tensor(name)

    def mapped(self) -> Iterator[tuple[str, "torch.Tensor"]]:
        """Yield (name, tensor): views of the mapped files, whose numbers are not read yet."""
        from safetensors import safe_open

        for path in dict.fromkeys(self.files.values()):
            with safe_open(path, "pt") as file:
                for name in file.offset_keys():
                    yield name, file.get_tensor(name)


@dataclass
class Plan:
    """The merge of a model module by module."""

    base: Base
    layers: dict[str, "BaseTunerLayer"]  # path of a module -> PEFT's layer that tunes it
    disk_names: dict[str, str]  # the model's name of a parameter -> its name on the disk
    adapter_names: list[str]
    work_dtype: "torch.dtype | None" = None  # of the weights, at least, while PEFT merges them
    norms: dict[str, Counter] | None = None  # layer: sums of squares, where they are wanted


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
    alone = args.allow_contaminated and not args.partner_check
    several = len(args.adapter) > 1 or args.adapter[0][1] != 1
    refuse(
        [
            message
            for message, found in (
                {
                    "--limit does not apply: a merge is whole": args.limit,
                    f"--device {args.device}: merging runs on the cpu": args.device
                    not in (None, "cpu"),
                    "--allow-contaminated does nothing without --partner-check": alone,
                    "--check-logits takes one adapter of weight 1": args.check_logits and several,
                }
            ).items()
            if found
        ]
    )
    return args


def split_weight(item: str) -> tuple[str, float]:
    """Split DIR[:WEIGHT] into (folder, weight).

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


# --- what is on the disk --------------------------------------------------------------------------


def open_adapter(name: str, folder: Path, weight: float) -> Adapter:
    """Read an adapter's configuration and the names of its tensors; refuse what cannot be merged.

    Raises UserError for a pickle, a broken file, and a kind of LoRA that no merge gets right.
    """
    config, keys = read_adapter(folder)
    path = folder / CONFIG
    for option, why in NEVER.items():
        if config.get(option):
            raise UserError(f"{path}: {option} cannot be merged: {why}")
    start = str(config.get("init_lora_weights")).lower()
    if start.startswith(RANDOM_STARTS):
        mend = "save it again with PEFT's path_initial_model_for_weight_conversion"
        raise UserError(f"{path}: init_lora_weights = {start!r} changed the base by chance; {mend}")

    return Adapter(name, folder, weight, config, keys)


def check_numbers(adapter: Adapter) -> None:
    """Refuse an adapter that holds NaN or infinite numbers, and a LoRA that changes nothing."""
    from safetensors.torch import load_file

    trained = adapter.config.get("peft_type") != "LORA"
    for name, tensor in load_file(adapter.folder / ADAPTER).items():
        if tensor.is_floating_point() and tensor.numel() and not is_finite(tensor):
            raise UserError(f"{adapter.folder}: {name} holds NaN or infinite numbers")
        # before training B = 0, of an embedding A = 0; the rest is not
        if not re.search(r"lora_A|lora_embedding_B|lora_magnitude|base_layer", name):
            trained = trained or bool(tensor.any())
    if not trained:
        raise UserError(f"{adapter.folder} changes nothing: it is untrained (every B is zero)")


def read_base(name: str) -> Base:
    """Find the files of a model, a folder or a hub id; every shard must be there, whole."""
    folder = fetch_model("--base-model", name)
    path = check_input(folder / "config.json", "name a model's folder with --base-model")
    config = read_json(path)
    if config.get("quantization_config"):
        raise UserError(f"{path}: quantised; merge into the original")

    shards = [WHOLE]
    if not (folder / WHOLE).exists() and (folder / INDEX).exists():  # the order of transformers
        listed = read_known(folder / INDEX, "weight_map", dict)
        shards = sorted({str(shard) for shard in listed.values()})
    files = {}
    for shard in shards:
        if Path(shard).name != shard:
            raise UserError(f"{folder / INDEX}: {shard} is no file of its folder")
        if not (folder / shard).is_file():
            mend = "if the model is in pickles (.bin), save it as safetensors first"
            raise UserError(f"{folder} has no {shard}; {mend}")
        files |= dict.fromkeys(tensor_names(folder / shard), folder / shard)
    if not files:
        raise UserError(f"{folder} has no tensors")
    return Base(folder, config, files)


def read_known(path: Path, key: str, kind: type) -> Any:
    """Read one value of a JSON file that may be missing; an empty `kind` where it is not there."""
    value = read_json(path).get(key) if path.exists() else None
    if value is None:
        return kind()
    if not isinstance(value, kind):
        raise UserError(f"{path}: {key} cannot be {value!r:.60}")
    return value


# --- the model on the meta device, and which tensor is whose --------------------------------------


def build_without_weights(base: Base) -> "PreTrainedModel":
    """Build the base model on the meta device: all modules, no memory."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(base.folder, trust_remote_code=False)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception as error:  # configurations go wrong in as many ways as there are models
        fault = f"{type(error).__name__}: {first_line(error)}"
        raise UserError(f"{base.folder}/config.json builds no model: {fault}") from None


def match_names(model: "PreTrainedModel", base: Base) -> dict[str, str]:
    """Map a model's parameters to the tensors on the disk, as transformers does when it loads them.

    Left out are tensors on the disk that the model does not know, and those that it converts
    (experts that it fuses): no module can be merged from these alone.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if not isinstance(rule, WeightRenaming)]
    known = model.state_dict()
    prefix = model.base_model_prefix  # GPT-2's own checkpoint lacks it

    names = {}
    for name in base.files:
        parameter, converter = rename_source_key(name, renamings, converters, prefix, known)
        if parameter not in known and name in known:
            parameter = name
        if parameter in known and converter is None:
            names[parameter] = name
    return names


def wrap(model: "PreTrainedModel", adapters: list[Adapter], base: Base) -> "PeftModel":
    """Put the adapters around a model; those around one without weights keep their own."""
    import torch
    from peft import PeftModel

    weightless = next(model.parameters()).is_meta
    placing = adapters_stay_in_memory() if weightless else nullcontext()
    options = {"torch_device": "cpu", "low_cpu_mem_usage": weightless}
    try:
        with torch.no_grad(), placing, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of keys that are missing: check_keys() refuses them
            first = adapters[0]
            model = PeftModel.from_pretrained(model, first.folder, first.name, **options)
            for adapter in adapters[1:]:
                model.load_adapter(adapter.folder, adapter.name, **options)
    except Exception as error:  # PEFT and torch raise what their parts raise
        folders = ", ".join(str(adapter.folder) for adapter in adapters)
        fault = f"{folders} does not fit {base.folder}: {type(error).__name__}: {cause(error)}"
        raise UserError(fault) from None
    for adapter in adapters:
        check_keys(model, adapter)
    return model.eval()


@contextmanager
def adapters_stay_in_memory() -> Iterator[None]:
    """Keep PEFT from moving an adapter to its base's device, which may be meta and hold nothing."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    original = BaseTunerLayer._move_adapter_to_device_of_base_layer
    BaseTunerLayer._move_adapter_to_device_of_base_layer = lambda *_, **__: None
    try:
        yield
    finally:
        BaseTunerLayer._move_adapter_to_device_of_base_layer = original


def cause(error: Exception) -> str:
    """Take from an error the line that says what is wrong: behind a heading, the second."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if len(lines) > 1 and lines[0].endswith(":"):
        return lines[1]
    return first_line(error)


def check_keys(model: "PeftModel", adapter: Adapter) -> None:
    """Refuse an adapter that would be used in part, or lacks a part of what its config selects."""
    from peft import get_peft_model_state_dict

    options = {"adapter_name": adapter.name, "save_embedding_layers": False}
    selected = set(get_peft_model_state_dict(model, **options))
    missing = sorted(selected - adapter.keys)
    if missing:
        what = f"{len(missing)} of the {len(selected)} tensors that its config selects are missing"
        raise UserError(f"{adapter.folder}/{ADAPTER}: {what}: {', '.join(missing[:3])}")
    ignored = sorted(adapter.keys - selected - set(model.state_dict()))
    if ignored:
        what = f"{len(ignored)} of its {len(adapter.keys)} tensors would be ignored"
        what += f": {', '.join(ignored[:3])}"
        raise UserError(f"{adapter.folder} does not fit this base: {what}")


def default_options(kind: str) -> dict[str, Any]:
    """Return the options that the installed PEFT knows of a kind, and their defaults; or none."""
    from peft import PEFT_TYPE_TO_CONFIG_MAPPING

    defaults: dict[str, Any] = {}
    if kind not in PEFT_TYPE_TO_CONFIG_MAPPING:
        return defaults
    for option in dataclasses.fields(PEFT_TYPE_TO_CONFIG_MAPPING[kind]):
        defaults[option.name] = option.default
        if option.default_factory is not dataclasses.MISSING:
            defaults[option.name] = option.default_factory()
    return defaults


def check_options(adapter: Adapter) -> None:
    """Refuse an option that the installed PEFT does not know, and so would leave out."""
    kind = str(adapter.config.get("peft_type"))
    known = default_options(kind)
    if not known:
        raise UserError(f"{adapter.folder / CONFIG}: peft_type = {kind} is no kind of adapter")
    for option, value in adapter.config.items():
        if value and option not in known:
            what = f"{adapter.folder / CONFIG} has {option} = {value!r:.60}"
            mend = "install the version of PEFT that saved it"
            raise UserError(f"{what}, no option of {kind} in this PEFT; {mend}")


class NotByModule(Exception):
    """Why an adapter cannot be merged module by module."""


def check_kind(adapter: Adapter) -> None:
    """Raise NotByModule where a kind or an option is not on the list that tests have seen equal."""
    kind = str(adapter.config.get("peft_type"))
    if kind not in BY_MODULE:
        raise NotByModule(f"{adapter.folder} is of the kind {kind}")
    defaults = default_options(kind)
    for option, value in adapter.config.items():
        tested = option in NO_MATTER or option in BY_MODULE[kind]
        if not tested and value not in UNSET and value != defaults.get(option):
            raise NotByModule(f"{adapter.folder} has {option} = {value!r:.60}")
    start = adapter.config.get("init_lora_weights", True)
    if not isinstance(start, bool):
        what = f"{adapter.folder} has init_lora_weights = {start!r}"
        raise NotByModule(f"{what}, which may rewrite the base")


def make_plan(base: Base, adapters: list[Adapter]) -> Plan:
    """Plan the merge module by module; raises NotByModule where that might give other bits."""
    import torch

    for adapter in adapters:
        check_kind(adapter)
    model = build_without_weights(base)
    disk_names = match_names(model, base)
    model = wrap(model, adapters, base)
    plan = Plan(
        base=base,
        layers=find_layers(model),
        disk_names=disk_names,
        adapter_names=[adapter.name for adapter in adapters],
    )
    check_places(plan, model)
    check_tie(model)
    if adapters[0].config["peft_type"] == "LORA":
        # PEFT adds a float32 change to the weights and rounds: the same sum, by torch's faster code
        plan.work_dtype = torch.float32
    if is_weighted(adapters):
        set_weights(plan, adapters)
    return plan


def is_weighted(adapters: list[Adapter]) -> bool:
    """Whether there is more to do than to merge one adapter as it is."""
    return len(adapters) > 1 or adapters[0].weight != 1


def find_layers(model: "PeftModel") -> dict[str, "BaseTunerLayer"]:
    """Find the layers of an adapter by the paths of the modules that they tune."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = {}
    for path, module in model.get_base_model().named_modules():
        if isinstance(module, BaseTunerLayer):
            layers[path] = module
    return layers


def check_places(plan: Plan, model: "PeftModel") -> None:
    """Raise NotByModule unless all numbers of the adapter are there, and those of the base are not.

    Each tuned parameter needs a tensor on the disk. A parameter of the base that has numbers came
    with the adapter, such as a saved embedding or a tuned bias.
    """
    of_adapter = set()
    for path, layer in plan.layers.items():
        for name, tensor in [*layer.named_parameters(), *layer.named_buffers()]:
            parameter = f"{path}.{name.removeprefix('base_layer.')}"
            if name.startswith("base_layer."):
                if parameter not in plan.disk_names:
                    raise NotByModule(f"{parameter} has no tensor of its own on the disk")
                continue
            of_adapter.add(id(tensor))
            if tensor.is_meta:
                raise NotByModule(f"{parameter} is not in the adapter's file")
    for name, parameter in model.get_base_model().named_parameters():
        if not parameter.is_meta and id(parameter) not in of_adapter:
            raise NotByModule(f"{name} is in the adapter's file")


def check_tie(model: "PeftModel") -> None:
    """Raise NotByModule where the adapter tunes an embedding or a head that are one tensor."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    base = model.get_base_model()
    if base.config.get_text_config().tie_word_embeddings:
        for end in (base.get_input_embeddings(), base.get_output_embeddings()):
            if isinstance(end, BaseTunerLayer):
                raise NotByModule("it tunes an embedding or a head that are one tensor")


# --- merging --------------------------------------------------------------------------------------


def set_weights(plan: Plan, adapters: list[Adapter]) -> None:
    """Give each adapter its weight; the changes of all are then summed in float64.

    Only the change of LoRA and rsLoRA is a sum of the adapters': refuses others.
    """
    import torch

    for adapter in adapters:
        config = adapter.config
        other = [name for name in ("use_dora", "modules_to_save") if config.get(name)]
        if config.get("bias", "none") != "none":
            other.append("bias")
        if config.get("peft_type") != "LORA":
            other.append("peft_type")
        if other:
            what = f"{other[0]} = {config[other[0]]!r:.60}"
            fault = f"{adapter.folder} has {what}: only LoRA and rsLoRA can be weighted and summed"
            raise UserError(f"{fault}; merge it alone, with weight 1")
    plan.work_dtype = torch.float64
    for layer in plan.layers.values():
        layer.double()
        for adapter in adapters:
            if adapter.name in layer.scaling:
                layer.scaling[adapter.name] *= adapter.weight


def merge_by_module(plan: Plan, out: Path) -> list[Path]:
    """Write the shards of the merged model, and their index; returns the files.

    One shard is written while the next is made: two are in memory at most.
    """
    from huggingface_hub import split_state_dict_into_shards_factory

    groups = group_tensors(plan)
    sizes = {name: tensor.nbytes for name, tensor in plan.base.mapped()}
    split = split_state_dict_into_shards_factory(
        {key: sum(sizes[name] for name in names) for key, names in groups.items()},
        get_storage_size=lambda size: size,  # the "tensors" that it splits are these sizes
        get_storage_id=lambda _: None,  # none shares its numbers with another one
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=SHARD_SIZE,
    )
    remove_shards(out)
    places = {}
    with ThreadPoolExecutor(1) as writer:
        writing = None
        for number, (shard, keys) in enumerate(split.filename_to_tensors.items(), 1):
            tensors = new_tensors(plan, {key: groups[key] for key in keys})
            places |= dict.fromkeys(tensors, shard)
            if writing:
                writing.result()  # raises what went wrong there
            writing = writer.submit(write_shard, tensors, out / shard)
            del tensors  # the writer lets go of them before the next but one is made
            print(f"shard {number} of {len(split.filename_to_tensors)}", file=sys.stderr)
        writing.result()
    written = [out / shard for shard in split.filename_to_tensors]
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": places}
        write_file(out / INDEX, json.dumps(index, indent=2) + "\n")
        written.append(out / INDEX)
    return written


def group_tensors(plan: Plan) -> dict[str, list[str]]:
    """Group the tensors on the disk by what is made at once, so that no shard parts them.

    {path of a tuned module: its weight and bias}, {name of another tensor: itself}.
    """
    parameters = {name: parameter for parameter, name in plan.disk_names.items()}
    groups: dict[str, list[str]] = {}
    for name in plan.base.files:
        path = parameters.get(name, "").rpartition(".")[0]
        key = path if path in plan.layers else name
        groups.setdefault(key, []).append(name)
    return groups


def write_shard(tensors: dict[str, "torch.Tensor"], path: Path) -> None:
    """Write a safetensors file under another name, rename it once it is on the disk."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        save_file(tensors, temporary, metadata={"format": "pt"})  # transformers asks for it
        temporary.chmod(0o644)  # safetensors lets only the owner read it
        sync(temporary)
        os.replace(temporary, path)
    except SafetensorError as error:  # a full disk
        raise UserError(f"{path}: {error}") from None
    finally:
        temporary.unlink(missing_ok=True)


def remove_shards(out: Path) -> None:
    """Remove what a merge that broke off has left: transformers would load the wrong shards."""
    for left in out.glob("model*.safetensors*"):
        left.unlink()


def new_tensors(plan: Plan, groups: dict[str, list[str]]) -> dict[str, "torch.Tensor"]:
    """Make the tensors of one shard, of group_tensors(): merged, or copied."""
    tensors = {}
    tuned = []
    for key in groups:
        if key in plan.layers:
            tuned.append(key)
        else:
            tensors[key] = plan.base.read(key)
    with ThreadPoolExecutor(MODULES_AT_ONCE) as threads:
        for merged in threads.map(functools.partial(merge_layer, plan), tuned):
            tensors |= merged
            if plan.norms is not None:
                add_norms(plan, merged)
    return tensors


def merge_layer(plan: Plan, path: str) -> dict[str, "torch.Tensor"]:
    """Let PEFT merge the adapters into one module; returns {name on the disk: merged tensor}.

    The module is on the meta device before and after.
    """
    import torch

    layer = plan.layers[path]
    module = layer.get_base_layer()
    dtypes = {}
    for attribute, _ in list(module.named_parameters()):
        name = plan.disk_names[f"{path}.{attribute}"]
        stored = plan.base.read(name)
        if not stored.is_floating_point() or stored.element_size() < 2:
            hint = f"{name} holds {stored.dtype}; merge into the 16-bit original"
            raise UserError(f"{plan.base.files[name]}: {hint}")
        dtypes[attribute] = stored.dtype
        dtype = stored.dtype
        if plan.work_dtype:
            dtype = torch.promote_types(dtype, plan.work_dtype)
        numbers = stored.to(dtype, copy=True)  # PEFT writes into it; `stored` is the mapped file
        setattr(module, attribute, torch.nn.Parameter(numbers, requires_grad=False))
    try:
        layer.merge(adapter_names=plan.adapter_names)
    except Exception as error:
        raise UserError(f"PEFT cannot merge {path}: {cause(error)}") from None

    merged = {}
    for attribute, dtype in dtypes.items():
        name = plan.disk_names[f"{path}.{attribute}"]
        merged[name] = getattr(module, attribute).detach().to(dtype).contiguous()
        if not is_finite(merged[name]):
            raise UserError(f"{name}: the sum is not finite in {dtype}")
    module.to("meta")
    return merged


def is_finite(tensor: "torch.Tensor") -> bool:
    """Whether a tensor holds neither NaN nor infinite numbers; much faster than isfinite()."""
    low, high = tensor.aminmax()  # each is NaN where any number is
    return math.isfinite(low.item()) and math.isfinite(high.item())


def add_norms(plan: Plan, merged: dict[str, "torch.Tensor"]) -> None:
    """Add a module's matrix to its layer's sums of squares: of the weights, and of their change."""
    for name, new in merged.items():
        if new.dim() != 2:
            continue
        number = re.search(r"\.(\d+)\.", name)
        layer = f"layer {number[1]}" if number else name
        weights = plan.base.read(name).double()
        sums = plan.norms.setdefault(layer, Counter())
        sums["weights"] += weights.square().sum().item()
        sums["change"] += (new.double() - weights).square().sum().item()


def norm_table(plan: Plan) -> str:
    """Make a table of each layer's norms: those of the tuned weights and of their change."""
    rows = []
    for layer, sums in plan.norms.items():
        weights = math.sqrt(sums["weights"])
        change = math.sqrt(sums["change"])
        cells = [weights, change, change / (weights or math.nan)]
        rows.append([layer, *(f"{cell:.4g}" for cell in cells)])
    return markdown_table(["layer", "weights", "change", "change / weights"], rows)


def merge_plainly(base: Base, adapters: list[Adapter], out: Path) -> list[Path]:
    """Merge by PEFT with the whole model in memory; returns the files that were written."""
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    try:
        options = {"dtype": "auto", "use_safetensors": True, "trust_remote_code": False}
        model = AutoModelForCausalLM.from_pretrained(base.folder, **options)
    except Exception as error:  # as many kinds as there are models
        raise UserError(f"{base.folder} cannot be loaded: {cause(error)}") from None
    was_tied = model.config.tie_word_embeddings
    model = wrap(model, adapters, base)
    if model.active_peft_config.is_prompt_learning:
        raise UserError(f"{adapters[0].folder} is a learned prompt: no weights can hold it")
    untie_head(model)
    try:
        merged = model.merge_and_unload()
    except Exception as error:
        raise UserError(f"PEFT cannot merge {adapters[0].folder}: {cause(error)}") from None
    for name, parameter in merged.named_parameters():
        if not is_finite(parameter.detach()):
            raise UserError(f"{name}: the sum is not finite in {parameter.dtype}")

    remove_shards(out)
    try:
        merged.save_pretrained(out, max_shard_size=SHARD_SIZE)
    except SafetensorError as error:  # a full disk
        raise UserError(f"{out}: {error}") from None
    if was_tied and not merged.config.tie_word_embeddings:
        untie_config(base)
    return [*sorted(out.glob("model*.safetensors*")), *sorted(out.glob("*config.json"))]


def untie_head(model: "PeftModel") -> None:
    """Make a head that is the embedding a tensor of its own where the adapter tunes either.

    PEFT would add the change of one to the tensor that both are, which base + adapter did not.
    """
    import torch
    from peft.tuners.tuners_utils import BaseTunerLayer

    ends = [model.get_base_model().get_input_embeddings()]
    ends.append(model.get_base_model().get_output_embeddings())
    if any(end is None for end in ends):
        return
    tuned = any(isinstance(end, BaseTunerLayer) for end in ends)
    modules = [end.get_base_layer() if isinstance(end, BaseTunerLayer) else end for end in ends]
    embedding, head = modules
    if tuned and embedding.weight is head.weight:
        head.weight = torch.nn.Parameter(head.weight.detach().clone(), requires_grad=False)


def check_logits(base: Base, adapter: Path, merged: Path) -> dict[str, float]:
    """Compare the merged model's logits with those of base + adapter; relative distances.

    In float32, so that all that is left is the rounding of the merged weights. UserError where the
    distance is above 16 units of that rounding, or above that to the base's own logits.
    """
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    ids = torch.arange(16)[None] % (base.config.get("vocab_size") or 16)
    if any((base.folder / name).exists() for name in ("tokenizer.json", "tokenizer.model")):
        tokenizer = AutoTokenizer.from_pretrained(base.folder, trust_remote_code=False)
        ids = tokenizer(PROBE, return_tensors="pt")["input_ids"]
    options = {"dtype": torch.float32, "trust_remote_code": False}
    with torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(base.folder, **options).eval()
        of_base = model(ids).logits
        of_both = PeftModel.from_pretrained(model, adapter).eval()(ids).logits
        del model  # before the next one is loaded
        model = AutoModelForCausalLM.from_pretrained(merged, **options).eval()
        ours = model(ids).logits

    found = {
        "to_base_and_adapter": ((ours - of_both).norm() / of_both.norm()).item(),
        "to_base": ((ours - of_base).norm() / of_base.norm()).item(),
    }
    print("logits, relative distance of the merged model:", found)
    dtypes = {tensor.dtype for _, tensor in base.mapped() if tensor.is_floating_point()}
    coarsest = max(torch.finfo(dtype).eps for dtype in dtypes)
    most = min(max(1e-4, 16 * coarsest), found["to_base"])
    if not found["to_base_and_adapter"] <= most:
        raise UserError(f"--check-logits: merged and base + adapter differ: {found}")
    return found


# --- where base, adapter and partner come from ----------------------------------------------------


def open_pairs(folder: Path) -> dict[str, str]:
    """Read the contamination pairs that nobody decided to be not-a-leak: {pair: training row}."""
    decisions = read_decisions(folder / "decisions.jsonl")
    pairs = {}
    for pair in read_jsonl(folder / "pairs.jsonl", {"pair_id": str, "train_id": str}):
        verdict = decisions.get(pair["pair_id"], {}).get("verdict")
        if verdict != "not-a-leak":
            pairs[pair["pair_id"]] = pair["train_id"]
    return pairs


def describe_training(adapter: Adapter) -> dict[str, Any]:
    """Collect what is known of an adapter: its hash, its data, their licences and leaks."""
    about: dict[str, Any] = {"folder": str(adapter.folder), "weight": adapter.weight}
    about["sha256"] = sha256_of(adapter.folder / ADAPTER)
    about["data"] = {}
    for name, known in read_known(adapter.folder / "run.json", "inputs", dict).items():
        if Path(name).suffix not in (".json", ".jsonl"):
            continue
        about["data"][name] = known
        recorded = known.get("sha256") if isinstance(known, dict) else None
        if Path(name).is_file() and sha256_of(Path(name)) == recorded:
            about |= describe_rows(Path(name))
    return about


def describe_rows(data: Path) -> dict[str, Any]:
    """Count the licences of a training set's rows, and the rows that are flagged as leaks."""
    rows = read_jsonl(data, {})
    about: dict[str, Any] = {}
    about["licences"] = Counter(str(row.get("licence", "unknown")) for row in rows)
    if data.with_name("pairs.jsonl").exists():
        leaks = set(open_pairs(data.parent).values())
        about["flagged_rows"] = sum(row.get("id") in leaks for row in rows)
        about["contamination"] = str(data.parent)
    return about


def compare_with_origin(args: argparse.Namespace, base: Base, adapter: Adapter) -> str:
    """Compare the base with the one that an adapter was trained on; returns a warning, or nothing.

    Refuses another base without --foreign-base.
    """
    from finetune import base_fingerprint

    path = adapter.folder / "base_fingerprint.json"
    if not path.exists():
        return f"no {path}: whether {base.folder} is the base it was trained on"
    known = read_json(path)
    if known.get("load_in_4bit"):
        print(
            f"{adapter.folder} was trained on NF4; the merge is into the 16-bit weights. To score "
            "it on NF4: python evaluate.py --load-in-4bit --adapter",
            file=sys.stderr,
        )
    found = base_fingerprint(base.folder)
    differ = [part for part in found if known.get(part) != found[part]]
    if not differ:
        print(f"{base.folder} is the base that {adapter.folder} was trained on: fingerprints agree")
        return ""

    origin = known.get("base_model") or adapter.config.get("base_model_name_or_path")
    what = f"{adapter.folder} was trained on {origin}; {base.folder} differs in its "
    what += " and ".join(differ)
    if not args.foreign_base:
        raise UserError(f"{what}; if you mean it, add --foreign-base")
    return what


def check_partner(args: argparse.Namespace) -> str:
    """Keep the paper's rule: no merge with a model that was trained on benchmark questions.

    Returns a warning, or nothing.
    """
    folder = args.partner_check
    if not folder:
        warning = "no --partner-check: the other model may know benchmark questions"
        return warning if args.foreign_base else ""
    check_input(folder / "pairs.jsonl", "python check_contamination.py writes it")
    pairs = len(open_pairs(folder))
    what = f"{folder}: {pairs} pairs are not decided not-a-leak"
    if pairs and not args.allow_contaminated:
        raise UserError(f"{what}; see them with python tui.py {folder}")
    return f"{what}, and it was merged all the same" if pairs else ""


# --- the folder -----------------------------------------------------------------------------------


def copy_rest(base: Base, out: Path) -> list[Path]:
    """Copy the base's tokenizer, licences and configuration; returns the copies."""
    copies = []
    for pattern in COPIED:
        for path in sorted(base.folder.glob(pattern)):
            if path.is_file():
                write_file(out / path.name, path.read_bytes())
                copies.append(out / path.name)
    if read_json(base.folder / "config.json") != base.config:
        write_file(out / "config.json", json.dumps(base.config, indent=2) + "\n")
    return copies


def untie_config(base: Base) -> None:
    """Write down that the head is no longer the embedding."""
    base.config["tie_word_embeddings"] = False
    text = base.config.get("text_config")  # of models that also see or hear
    if isinstance(text, dict) and "tie_word_embeddings" in text:
        text["tie_word_embeddings"] = False


def write_card(base: Base, about: dict[str, Any], out: Path) -> Path:
    """Write the model card: licences, the chain of bases and adapters, data, warnings."""
    card = base.folder / "README.md"
    text = card.read_text(encoding="utf-8", errors="replace") if card.exists() else ""
    licences = re.findall(r"^license\w*: *(.+)$", text, re.MULTILINE) or ["not stated in its card"]
    lines = ["# A merged model"]
    lines.append(
        f"Licence of the base: {', '.join(licences)}. It and those of the training data apply to "
        "this model. `run.json` holds all hashes."
    )
    for step in about["lineage"]:
        adapters = count_names(step.get("adapters"))
        lines.append(f"- base `{step.get('base_model')}`, adapters {adapters}")
    for adapter in about["adapters"]:
        flagged = adapter.get("flagged_rows", "unknown")
        lines.append(
            f"- `{adapter['folder']}`, sha256 {adapter['sha256']}, rows flagged as leaks: {flagged}"
            f", data {json.dumps(adapter['data'])}"
            f", licences of rows: {count_names(adapter.get('licences'))}"
        )
    for warning in about["warnings"]:
        lines.append(f"- **warning**: {warning}")
    write_file(out / "README.md", "\n\n".join(lines) + "\n")
    return out / "README.md"


def count_names(found: Any) -> str:
    """Write a dict of name -> number as text: {"MIT": 54} is "MIT (54)"."""
    if not isinstance(found, dict) or not found:
        return "unknown"
    return ", ".join(f"{name} ({number})" for name, number in found.items())


def check_room(args: argparse.Namespace, base: Base, adapters: list[Adapter]) -> None:
    """Refuse an output inside an input, and a disk that is too small, before any work."""
    out = args.out.resolve()
    for folder in (base.folder, *(adapter.folder for adapter in adapters)):
        if folder.resolve() in out.parents:
            raise UserError(f"--out {args.out} lies inside {folder}, an input; name another folder")
    there = next(folder for folder in (out, *out.parents) if folder.exists())
    free = shutil.disk_usage(there).free
    free += sum(path.stat().st_size for path in out.glob("*model*.safetensors*"))  # of a former run
    size = sum(path.stat().st_size for path in set(base.files.values()))
    if size > free:
        raise UserError(f"{args.out}: {size / 1e9:.1f} GB needed, {free / 1e9:.1f} free")


def describe_merge(args: argparse.Namespace, base: Base, adapters: list[Adapter]) -> dict[str, Any]:
    """Check where base, adapters and partner come from; returns what card and run.json say of it.

    Prints the warnings.
    """
    found = [compare_with_origin(args, base, adapter) for adapter in adapters]
    found.append(check_partner(args))
    described = []
    for adapter in adapters:
        known = describe_training(adapter)
        described.append(known)
        rows = known.get("flagged_rows", "an unknown number of")
        if rows:
            what = f"{rows} rows that are flagged as leaks"
            found.append(f"{adapter.folder} was trained on {what}")
    found = [warning for warning in found if warning]
    for warning in found:
        print(f"warning: {one_line(warning)}", file=sys.stderr)

    before = read_known(base.folder / "run.json", "lineage", list)
    lineage = [step for step in before if isinstance(step, dict)]
    used = Counter()
    for known in described:
        used[known["folder"]] += known["weight"]
    lineage.append({"base_model": args.base_model, "adapters": used})
    return {
        "base_model": args.base_model,
        "adapters": described,
        "warnings": found,
        "lineage": lineage,
    }


def read_adapters(args: argparse.Namespace) -> list[Adapter]:
    """Read all adapters, and set args.base_model to their base where no flag names one."""
    adapters = []
    for number, (folder, weight) in enumerate(args.adapter):
        adapters.append(open_adapter(f"adapter-{number}", Path(folder), weight))
    own = adapters[0].config.get("base_model_name_or_path")
    args.base_model = args.base_model or str(own or "")
    return adapters


def choose_way(args: argparse.Namespace, base: Base, adapters: list[Adapter]) -> Plan | None:
    """Plan the merge module by module; None, and say why, where PEFT has to merge it as a whole."""
    for adapter in adapters:
        check_numbers(adapter)
        check_options(adapter)
    try:
        plan = make_plan(base, adapters)
    except NotByModule as reason:
        if is_weighted(adapters):
            fault = f"{reason}: such an adapter can be merged alone only, with weight 1"
            raise UserError(fault) from None
        shown = one_line(str(reason))  # options and their values may hold anything
        print(f"merging with the whole model in memory: {shown}", file=sys.stderr)
        if args.foreign_base:
            print("without a table of norms, therefore", file=sys.stderr)
        return None
    plan.norms = {} if args.foreign_base else None
    return plan


def input_files(base: Base, adapters: list[Adapter]) -> list[Path]:
    """List the files that decide the result."""
    files = [base.folder / "config.json", *dict.fromkeys(base.files.values())]
    for adapter in adapters:
        files += [adapter.folder / CONFIG, adapter.folder / ADAPTER]
    return files


def report(plan: Plan) -> dict[str, Any]:
    """Print the table of norms, where there is one; returns it and counts for run.json."""
    about: dict[str, Any] = {"counts": {"tuned_modules": len(plan.layers)}}
    if plan.norms is not None:
        table = norm_table(plan)
        print(table)
        about["norms"] = table.splitlines()
    return about


def main(argv: list[str] | None = None) -> None:
    """Adapters + base -> checks -> shards -> folder."""
    started = time.monotonic()
    args = parse_args(argv)
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # torch: large pages, a third less CPU time
    adapters = read_adapters(args)
    base = read_base(args.base_model)
    check_output(args.out, args.overwrite, base.folder, *(adapter.folder for adapter in adapters))
    check_room(args, base, adapters)
    about = describe_merge(args, base, adapters)
    with ThreadPoolExecutor(1) as beside:  # hashes, while the libraries are imported
        hashing = beside.submit(describe_files, input_files(base, adapters))
        plan = choose_way(args, base, adapters)
        inputs = hashing.result()

    with claim_output(args.out, args.overwrite):
        if plan:
            outputs = merge_by_module(plan, args.out)
            about |= report(plan)
        else:
            outputs = merge_plainly(base, adapters, args.out)
        outputs += copy_rest(base, args.out)
        outputs.append(write_card(base, about, args.out))
        if args.check_logits:
            about["logits"] = check_logits(base, adapters[0].folder, args.out)
        finish_run(args, inputs, outputs, started, **about)
    print(f"wrote {args.out}. Next:")
    print(next_command(args.out))


if __name__ == "__main__":
    run_main(main)

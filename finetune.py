"""Fine-tune a base model on the clean set with LoRA or QLoRA: the paper's recipe, resumable.

Step 3 of 5 (paper, section 3.1). Reads out/contamination/clean.jsonl and a causal language model of
transformers (folder or hub id); writes out/adapter/: PEFT's adapter_model.safetensors and
adapter_config.json, base_fingerprint.json, train_log.jsonl, checkpoints/ and run.json.

    python finetune.py --base-model demo/base_model --data out/check/clean.jsonl --out out/lora
    python finetune.py --base-model meta-llama/Llama-2-7b-hf --load-in-4bit
    python finetune.py
    python finetune.py --resume
    torchrun --nproc-per-node 4 finetune.py --recipe 70b --shard

LoRA of rank 16 on the MLP's three matrices, one epoch in batches of 16, loss on the answers only.
The examples of a batch are packed into rows without padding, each attending to itself only, which
changes no gradient. SIGTERM or Ctrl-C saves a checkpoint after the step; a second one ends at once.
Time: the paper took 5 hours for the 13B on one A100-80GB. Memory: the base (2 bytes a parameter,
0.5 in 4 bit) and the activations of the fullest row, which is tried before the first step. It does
not choose rows, tune whole matrices, or train on the prompt.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import itertools
import json
import math
import os
import random
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from importlib import util
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from common import (
    DECISIONS,
    NF4,
    UNFINISHED,
    Row,
    UserError,
    alpaca_prompt,
    base_fingerprint,
    check_input,
    check_listed,
    check_output,
    claim_output,
    command_line,
    describe_files,
    fetch_model,
    finish_run,
    first_line,
    make_parser,
    next_command,
    positive,
    printable,
    read_json,
    read_jsonl,
    read_object,
    refuse,
    run_main,
    sha256_of,
    step_of,
    use_device,
    write_file,
)

if TYPE_CHECKING:  # for annotations alone; functions import what they need, so that --help is quick
    import torch
    from rich.progress import Progress
    from torch import Tensor
    from torch.optim import Optimizer
    from transformers import PreTrainedModel as Model
    from transformers import PreTrainedTokenizerBase as Tokenizer


@dataclass(frozen=True)
class Setting:
    """A flag of the recipe: `batch_size` becomes --batch-size."""

    name: str
    kind: Callable[[str], Any]  # reads the flag's text; bool makes --NAME and --no-NAME
    value: Any  # without the flag
    meaning: str
    choices: tuple[str, ...] | None = None


RECIPES = {  # paper, table 3: the two differ in the base and the learning rate alone
    "13b": {"base_model": "meta-llama/Llama-2-13b-hf", "learning_rate": 4e-4},
    "70b": {"base_model": "meta-llama/Llama-2-70b-hf", "learning_rate": 3e-4},
}
PAPER_SETTINGS = [  # paper, table 3
    Setting("batch_size", positive, 16, "examples of one optimizer step"),
    Setting("epochs", positive, 1, "passes over the data"),
    Setting("warmup_steps", int, 100, "of a linear rise; then half a cosine to 0"),
    Setting("weight_decay", float, 0.0, "of AdamW"),
    Setting("cutoff", positive, 4096, "tokens of an example; the end of a longer one is cut off"),
    Setting("targets", str, "mlp", "mlp, attention, all, or names of linear layers: a,b"),
    Setting("lora_rank", positive, 16, "columns of B and rows of A"),
    Setting("lora_alpha", positive, 16, "the scale of B A is alpha / rank"),
    Setting("lora_dropout", float, 0.05, "of the input of A"),
]
# Not in the paper. Its run had micro-batches of one example, of which the Trainer of 2023 averaged
# the mean losses: so each example weighed the same, however long its answer.
OUR_SETTINGS = [
    Setting("loss_norm", str, "example", "what weighs the same in a batch", ("example", "token")),
    Setting("rslora", bool, False, "the scale of B A is alpha / sqrt(rank)"),
    Setting("dora", bool, False, "tune direction and magnitude of the weights apart"),
    Setting("load_in_4bit", bool, False, "QLoRA: base in NF4, doubly quantised"),
    Setting("shard", bool, False, "FSDP2, under torchrun: the 16-bit base is split over all GPUs"),
    Setting("val_set_size", int, 0, "rows held out and scored at every checkpoint"),
    Setting("save_every", positive, 50, "steps between checkpoints"),
    Setting("sample_every", int, 0, "steps between answers to two of the prompts; 0: none"),
]
# --resume lets these change. The base may have moved: its fingerprint is compared instead.
FREE_SETTINGS = {"base_model", "save_every", "sample_every"}

MAX_GRAD_NORM = 1.0  # the Trainer's default, which the published run left as it was
CPU_ROW = 1024  # tokens of a packed row on a CPU, where longer ones gain nothing
TARGETS = {
    "mlp": ["gate_proj", "up_proj", "down_proj"],  # the paper's choice, after He et al.
    "attention": ["q_proj", "k_proj", "v_proj", "o_proj"],  # the authors' first try
    "all": "all-linear",  # PEFT's name for every linear layer but the head
}
SMALL_SHARE = 0.001  # trainable of all parameters; for less, "mlp" did not do better (paper, 3.1)
MAKE_DATA = "write it with: python check_contamination.py"
LOG_FILE = "train_log.jsonl"
KEPT_CHECKPOINTS = 2  # the newest, and the one to fall back on
SAMPLES = 2  # prompts that a sample event answers
SAMPLE_TOKENS = 64  # of an answer
# Ctrl-C reaches torchrun's processes twice: by the terminal, within so many seconds by torchrun.
REPEATED_SIGNAL = 2.0
RANK = int(os.environ.get("RANK", 0))  # torchrun's number of this process
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", 1))  # torchrun's number of processes, one a GPU


def say(text: str) -> None:
    """Print to stderr, from the first process only."""
    if RANK == 0:
        print(printable(text), file=sys.stderr, flush=True)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the flags of this step; args.origin tells where each setting's value came from.

    args.origin: {setting: "flag", "recipe 13b", "recipe 70b", "paper" or "default"}.
    """
    parser = make_parser(__doc__, "out/adapter")
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint")

    add = parser.add_argument_group("data, model and machine").add_argument
    data = Path("out/contamination/clean.jsonl")
    add("--data", type=Path, default=data, metavar="FILE", help="default: %(default)s")
    add("--base-model", metavar="MODEL", help="folder or hub id (default: the recipe's Llama-2)")
    add("--recipe", choices=RECIPES, default="13b", help="default: %(default)s")
    add("--learning-rate", type=float, metavar="LR", help="its peak; 13b: 4e-4, 70b: 3e-4")
    text = "tokens of one forward pass (default: cutoff on a GPU, 1,024 on a CPU)"
    add("--micro-batch-tokens", type=positive, metavar="N", help=text)
    text = "default: only with --shard, or where a row does not fit into the GPU's memory otherwise"
    add("--gradient-checkpointing", action=argparse.BooleanOptionalAction, help=text)
    add_settings(parser, "paper", PAPER_SETTINGS)
    add_settings(parser, "default", OUR_SETTINGS)

    args = parser.parse_args(argv)
    args.origin = {}
    fill_in(args, f"recipe {args.recipe}", RECIPES[args.recipe])
    fill_in(args, "paper", {setting.name: setting.value for setting in PAPER_SETTINGS})
    fill_in(args, "default", {setting.name: setting.value for setting in OUR_SETTINGS})
    if args.shard and args.gradient_checkpointing is None:
        args.gradient_checkpointing = True  # a model that needs every GPU leaves little room
    refuse(find_faults(args))
    return args


def flag_of(name: str) -> str:
    """Return the flag of a setting: "batch_size" -> "--batch-size"."""
    return "--" + name.replace("_", "-")


def add_settings(parser: argparse.ArgumentParser, origin: str, settings: list[Setting]) -> None:
    """Add a flag for each setting; its value is None where it is not given."""
    add = parser.add_argument_group(f"settings ({origin})").add_argument
    for setting in settings:
        flag = flag_of(setting.name)
        text = f"{setting.meaning} ({origin}: {setting.value})"
        if setting.kind is bool:
            add(flag, action=argparse.BooleanOptionalAction, help=text)
        elif setting.choices:
            add(flag, choices=setting.choices, help=text)
        else:
            metavar = setting.name.rpartition("_")[2].upper()  # --batch-size SIZE
            add(flag, type=setting.kind, metavar=metavar, help=text)


def fill_in(args: argparse.Namespace, origin: str, values: dict[str, Any]) -> None:
    """Set what no flag has set, and note in args.origin where each value came from."""
    for name, value in values.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
            args.origin[name] = origin
        else:
            args.origin[name] = "flag"


def find_faults(args: argparse.Namespace) -> list[str]:
    """List what makes these settings impossible."""
    faults = []
    for name in ("warmup_steps", "val_set_size", "sample_every"):
        count = getattr(args, name)
        if count < 0:
            faults.append(f"{flag_of(name)} {count} is below 0")
    if not 0 < args.learning_rate < math.inf:
        faults.append(f"--learning-rate {args.learning_rate} is not above 0")
    if not 0 <= args.weight_decay < math.inf:
        faults.append(f"--weight-decay {args.weight_decay} is not 0 or above")
    if not 0 <= args.lora_dropout < 1:
        faults.append(f"--lora-dropout {args.lora_dropout} is not in [0, 1)")
    if args.shard and args.load_in_4bit:
        faults.append("--shard and --load-in-4bit exclude each other")
    if args.shard and "RANK" not in os.environ:
        faults.append("--shard needs torchrun (see --help)")
    return faults


def is_finished(args: argparse.Namespace) -> bool:
    """Tell whether --resume has nothing left to do. Raises UserError where there is no folder."""
    if not args.resume:
        return False
    if not args.out.is_dir():
        raise UserError(f"--resume: {args.out} is missing; start without --resume")
    return not (args.out / UNFINISHED).exists() and step_of(args.out) == "finetune"


def protect_checkpoints(args: argparse.Namespace) -> None:
    """Refuse to begin again unasked where the checkpoints of an unfinished run would be lost."""
    mark = args.out / UNFINISHED
    saved = checkpoints(args.out)
    if mark.exists() and saved and not args.resume and not args.overwrite:
        mend = "go on with --resume, or begin again with --overwrite"
        command = mark.read_text().strip()  # a mark holds its step's command
        raise UserError(f"{args.out} holds {saved[0].name} of a run: {mend} (it was: {command})")


# --- rows -> packed examples ----------------------------------------------------------------------


@dataclass(frozen=True)
class Example:
    """One tokenised row; `start` is the index of its first supervised token."""

    row_id: str
    input_ids: list[int]
    start: int

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def supervised(self) -> int:
        """Count the tokens that the loss sees: the answer and EOS."""
        return len(self) - self.start


def count_tokens(examples: list[Example]) -> int:
    """Count the tokens of some examples."""
    return sum(len(example) for example in examples)


def count_supervised(examples: list[Example]) -> int:
    """Count the tokens of some examples that the loss sees."""
    return sum(example.supervised for example in examples)


def load_rows(args: argparse.Namespace) -> list[Row]:
    """Read the training rows, the first args.limit of them.

    Raises UserError for a file that is missing, unfinished, edited or empty, and for a bad row.
    """
    check_input(args.data, MAKE_DATA)
    for record in ("run.json", "apply.json"):  # its step lists it in one; the other lets it pass
        check_listed(args.data, record)
    rows = read_jsonl(args.data, {"instruction": str, "output": str})[: args.limit]
    warn_of_newer_verdicts(args.data)

    for number, row in enumerate(rows, 1):
        has_bad_input = not isinstance(row.get("input") or "", str)
        if has_bad_input or not row["output"].strip():
            raise UserError(f"{args.data}, row {number}: its output is empty or its input no text")
    if not rows:
        raise UserError(f"{args.data} has no rows")
    return rows


def warn_of_newer_verdicts(data: Path) -> None:
    """Say so where the log of verdicts is no longer the one that the clean set was made by."""
    decisions = data.with_name(DECISIONS)
    applied = read_object(data.with_name("apply.json")).get("decisions_sha256")
    if applied and decisions.is_file() and sha256_of(decisions) != applied:
        advice = "write it with: python check_contamination.py apply"
        say(f"warning: {decisions} has newer verdicts than {data}; {advice}")


def tokenise(rows: list[Row], tokenizer: Tokenizer, cutoff: int) -> list[Example]:
    """Tokenise prompt and answer together, append EOS, and cut the end behind `cutoff` tokens.

    The prompt's tokens are those that it has on its own; the rest is supervised. Rows of which
    the cut leaves nothing supervised are left out.
    """
    prompts = []
    texts = []
    for row in rows:
        prompt = alpaca_prompt(row["instruction"], row.get("input") or "")
        prompts.append(prompt)
        texts.append(prompt + row["output"])
    prompt_ids = tokenizer(prompts)["input_ids"]
    text_ids = tokenizer(texts)["input_ids"]

    examples = []
    eos = tokenizer.eos_token_id
    for index, row in enumerate(rows):
        alone = prompt_ids[index]
        together = text_ids[index]
        if together[-1] == eos:  # some tokenizers append it themselves
            alone = alone[:-1]
            together = together[:-1]

        # A token that holds characters of prompt and answer is supervised. The first token never
        # is: nothing within the example predicts it.
        shared = os.path.commonprefix([alone, together])  # it compares lists, too
        start = max(1, len(shared))
        input_ids = [*together, eos][:cutoff]
        if start < len(input_ids):
            row_id = str(row.get("id", f"line {index + 1}"))
            examples.append(Example(row_id, input_ids, start))
    return examples


def pack(examples: list[Example], tokens: int, multiple: int = 1) -> list[list[Example]]:
    """Put examples into rows of at most `tokens` tokens.

    None is split; one that is longer has a row of its own. The number of rows is the least
    `multiple` that will do; where there are fewer examples, some are empty.
    """
    # The loop ends when there are as many rows as examples: deal() then puts no two in one.
    fewest = min(len(examples), math.ceil(count_tokens(examples) / tokens))
    fewest = math.ceil(fewest / multiple) * multiple
    for count in itertools.count(fewest, multiple):
        rows = deal(examples, count)
        if all(len(row) == 1 or count_tokens(row) <= tokens for row in rows):
            return rows


def deal(examples: list[Example], count: int) -> list[list[Example]]:
    """Deal examples out to `count` rows, longest first, each to the row with the fewest tokens."""
    rows: list[list[Example]] = [[] for _ in range(count)]
    sizes = [0] * count
    for example in sorted(examples, key=len, reverse=True):
        emptiest = sizes.index(min(sizes))
        rows[emptiest].append(example)
        sizes[emptiest] += len(example)
    return rows


def token_weights(row: list[Example], batch: list[Example], norm: str) -> list[float]:
    """Return what one supervised token of each example of `row` weighs; a batch's sum is 1.

    >>> short, long = Example("a", [1, 5, 2], 2), Example("b", [1, 5, 6, 7, 2], 2)
    >>> token_weights([short, long], [short, long], "token")
    [0.25, 0.25]
    >>> token_weights([short, long], [short, long], "example")
    [0.5, 0.16666666666666666]
    """
    if norm == "token":
        return [1 / count_supervised(batch)] * len(row)
    return [1 / (len(batch) * example.supervised) for example in row]


def batches(
    examples: list[Example], args: argparse.Namespace
) -> Iterator[tuple[float, list[Example]]]:
    """Yield (epochs done by its end, examples) of each step; the seed shuffles each epoch anew."""
    for epoch in range(args.epochs):
        order = random.Random(f"{args.seed} {epoch}").sample(examples, len(examples))
        for start in range(0, len(order), args.batch_size):
            batch = order[start : start + args.batch_size]
            yield epoch + (start + len(batch)) / len(order), batch


# --- one forward pass of a packed row -------------------------------------------------------------


@functools.cache
def compute_dtype(kind: str) -> torch.dtype:
    """Return bfloat16 for a GPU that has it in hardware, else float32; `kind` is "cuda", "cpu" …"""
    import torch

    if kind == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.bfloat16
    return torch.float32


def autocast(model: Model) -> torch.autocast:
    """Return a context with matrix products in compute_dtype(); the weights keep their own."""
    import torch

    dtype = compute_dtype(model.device.type)
    return torch.autocast(model.device.type, dtype, enabled=dtype == torch.bfloat16)


def attend_by_example(
    module: Any, q: Tensor, k: Tensor, v: Tensor, _mask: Any, lengths: Any = None, **options: Any
) -> tuple[Tensor, None]:
    """Attend causally within each example of a packed row, by SDPA; transformers calls it.

    q, k, v: [1, heads, tokens, head_dim]; lengths: tokens of each example, None for a row
    of one. Returns [1, tokens, heads, head_dim]. Exact, on every device, and without the cost of a
    dense mask: sdpa_attention_forward() is causal where it gets no mask.
    """
    import torch
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if lengths is None:
        return sdpa_attention_forward(module, q, k, v, None, **options)
    queries = q.split(lengths, dim=2)
    keys = k.split(lengths, dim=2)
    values = v.split(lengths, dim=2)
    outputs = []
    for query, key, value in zip(queries, keys, values, strict=True):
        output, _ = sdpa_attention_forward(module, query, key, value, None, **options)
        outputs.append(output)
    return torch.cat(outputs, dim=1), None


def set_attention(model: Model, cutoff: int) -> None:
    """Give the model attend_by_example() where that is the attention it has up to `cutoff`."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register("by_example", attend_by_example)
    AttentionMaskInterface.register("by_example", lambda *_, **__: None)  # it needs no mask
    if is_plainly_causal(model.config.get_text_config(), cutoff):
        model.set_attn_implementation("by_example")


def is_plainly_causal(config: Any, cutoff: int) -> bool:
    """Tell whether each of `cutoff` tokens attends to all before it, in every layer, by SDPA."""
    if config._attn_implementation != "sdpa":
        return False
    layer_types = getattr(config, "layer_types", None) or []
    if any(kind != "full_attention" for kind in layer_types):
        return False
    for name in ("sliding_window", "attention_chunk_size"):
        window = getattr(config, name, None)
        if window and window < cutoff:
            return False
    return True


def row_losses(model: Model, row: list[Example]) -> Tensor:
    """Compute the summed cross-entropy of each example's supervised tokens, in nats: [examples].

    Only the positions that predict a supervised token go through the head: vocabularies are large.
    position_ids start again with each example. Where set_attention() chose attend_by_example(), it
    keeps the examples apart, by their lengths. Elsewhere transformers does, by a mask with a block
    from each jump of position_ids on; but it makes that only if it gets no mask and keeps no cache.
    """
    import torch

    input_ids: list[int] = []
    position_ids: list[int] = []
    predicting: list[int] = []  # positions whose logits predict the targets, one before each
    targets: list[int] = []
    for example in row:
        begin = len(input_ids)
        predicting += range(begin + example.start - 1, begin + len(example) - 1)
        targets += example.input_ids[example.start :]
        position_ids += range(len(example))
        input_ids += example.input_ids

    as_tensor = functools.partial(torch.tensor, device=model.device)
    given = {"input_ids": as_tensor([input_ids]), "logits_to_keep": as_tensor(predicting)}
    if len(row) > 1:
        given["position_ids"] = as_tensor([position_ids])
        if model.config._attn_implementation == "by_example":
            given["lengths"] = [len(example) for example in row]  # reaches attend_by_example()
    with autocast(model):
        logits = model(**given, use_cache=False).logits[0]

    # bfloat16 is too coarse for a loss; the tests' float64 stays.
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    losses = torch.nn.functional.cross_entropy(logits, as_tensor(targets), reduction="none")
    by_example = losses.split([example.supervised for example in row])
    return torch.stack([part.sum() for part in by_example])


def isolates(model: Model, examples: list[Example]) -> bool:
    """Tell whether a packed example's loss stays the same when its neighbour in the row changes."""
    import torch

    neighbour, example = sorted(examples, key=len)[:2]  # the shortest are the quickest
    reversed_neighbour = replace(neighbour, input_ids=neighbour.input_ids[::-1])
    model.eval()
    with torch.no_grad():
        loss = row_losses(model, [neighbour, example])[1]
        other_loss = row_losses(model, [reversed_neighbour, example])[1]
    # Without a leak the same numbers are summed: equal, but for kernels that vary from run to run.
    return torch.allclose(loss, other_loss, rtol=1e-6)


# --- model and adapter ----------------------------------------------------------------------------


@dataclass(frozen=True)
class ModelSizes:
    """What step_flops() multiplies: numbers of parameters, and the size of the attention."""

    trainable: int  # the adapter's
    parameters: int  # the base's and the adapter's
    head: int  # of the layer that gives the logits: vocabulary x width
    base: int  # of the base without its embeddings and that head
    attention: int  # layers x heads x head_dim: these products have no parameters


def set_up_device(name: str | None) -> torch.device:
    """Return the named device, or the best there is; under torchrun, join the other processes.

    There each process has its own GPU, and they speak by NCCL; on CPUs by gloo.
    """
    import torch

    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    distributed = "RANK" in os.environ
    if distributed and name == "cuda":
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    device = torch.device(use_device(name))
    if device.index is not None:
        torch.cuda.set_device(device)
    if distributed:
        torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return device


def load_base(
    args: argparse.Namespace, folder: Path, device: torch.device
) -> tuple[Model, Tokenizer]:
    """Load the base model, with attention for packed rows where it can have it, and its tokenizer.

    It lies on the device, unless it is to be sharded: then in main memory, mapped from the files.
    Raises UserError, with the library's reason, where they cannot be loaded or do not fit.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    dtype = compute_dtype(device.type)
    options: dict[str, Any] = {"dtype": dtype, "output_loading_info": True}
    options["use_safetensors"] = True  # no pickle, which may run code
    if args.shard:
        # The files' own: a conversion would fill the memory of each process with all weights.
        options["dtype"] = "auto"
    if args.load_in_4bit:
        options["quantization_config"] = BitsAndBytesConfig(**NF4, bnb_4bit_compute_dtype=dtype)
        options["device_map"] = {"": device}
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        model, loading = AutoModelForCausalLM.from_pretrained(
            folder, trust_remote_code=False, **options
        )
    except Exception as error:  # broken JSON, cut weights, an unknown architecture, no memory
        raise UserError(f"--base-model {args.base_model}: {first_line(error)}") from None
    missing = sorted(loading["missing_keys"])
    if missing:
        raise UserError(f"--base-model {args.base_model}: its files lack weights: {missing[:3]}")
    check_tokenizer(args.base_model, tokenizer, model)

    model.config.use_cache = False
    set_attention(model, args.cutoff)
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # bitsandbytes would repack 4-bit weights in an eval forward: later gradients are wrong
            module.support_avx512bf16_for_cpu = False
    if not args.load_in_4bit and not args.shard:
        model.to(device)
    return model, tokenizer


def check_tokenizer(base_model: str, tokenizer: Tokenizer, model: Model) -> None:
    """Refuse a tokenizer without EOS, or with tokens that the model has no embedding for."""
    tokens = len(tokenizer)
    embeddings = model.get_input_embeddings().num_embeddings
    # Of a folder without tokenizer files, LlamaTokenizer makes a vocabulary of 3 tokens.
    if tokenizer.eos_token_id is None or tokens < 4:
        raise UserError(f"--base-model {base_model}: no usable tokenizer files")
    if tokens > embeddings:
        fault = f"its tokenizer has {tokens:,} tokens, its embeddings {embeddings:,}"
        raise UserError(f"--base-model {base_model}: {fault}")


def add_adapter(model: Model, args: argparse.Namespace) -> Model:
    """Wrap the model in a fresh LoRA adapter on args.targets; everything else is frozen.

    Raises UserError for targets that the model does not have.
    """
    import torch
    from peft import LoraConfig, get_peft_model

    if args.targets in TARGETS:
        targets = TARGETS[args.targets]
    else:
        targets = args.targets.split(",")
    if args.targets != "all":
        check_targets(model, targets, args.targets)

    config = LoraConfig(
        task_type="CAUSAL_LM",
        target_modules=targets,
        r=args.lora_rank,
        lora_alpha=args.lora_alpha,
        lora_dropout=args.lora_dropout,
        use_rslora=args.rslora,
        use_dora=args.dora,
    )
    model = get_peft_model(model, config)
    # PEFT draws A in float32 too, but rounds it to the base's type and back: on a GPU, in bfloat16,
    # it would differ from a CPU's. B is 0 in any type.
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            drawn = torch.empty(parameter.shape, device="cpu")
            torch.nn.init.kaiming_uniform_(drawn, 5**0.5)
            parameter.data.copy_(drawn)
    return model


def check_targets(model: Model, targets: list[str], flag: str) -> None:
    """Refuse targets that name no linear layer of the model, the head aside."""
    import torch
    from transformers.pytorch_utils import Conv1D

    head = model.get_output_embeddings()
    layers = []
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear | Conv1D) and module is not head:
            layers.append(f".{name}")
    unknown = []
    for target in targets:
        if not any(layer.endswith(f".{target}") for layer in layers):
            unknown.append(target)
    if unknown:
        known = sorted({layer.rpartition(".")[2] for layer in layers})
        fault = f"{', '.join(unknown)}: no linear layer of this model (the head is none to tune)"
        raise UserError(f"--targets {flag}: {fault}; it has {', '.join(known)}")


def trainable_parameters(model: Model) -> list[torch.nn.Parameter]:
    """List the parameters that are tuned, in the model's order."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def shard_base(model: Model, device: torch.device) -> None:
    """Split the frozen base over the processes (FSDP2); the small adapter stays whole in each."""
    import torch
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    adapter = set(trainable_parameters(model))
    for parameter in adapter:  # fully_shard() moves only what it splits
        parameter.data = parameter.data.to(device)

    # Each decoder block is gathered as one, and then what is left. fully_shard() moves a block to
    # the device and keeps this process's part of it.
    base = model.get_base_model()
    blocks = base._no_split_modules or []
    units = [module for module in base.modules() if type(module).__name__ in blocks]
    units.append(base)
    mesh = torch.distributed.init_device_mesh(device.type, (WORLD_SIZE,))
    policy = MixedPrecisionPolicy(compute_dtype(device.type))
    for module in units:
        fully_shard(module, mesh=mesh, mp_policy=policy, ignored_params=adapter)


def model_sizes(model: Model) -> ModelSizes:
    """Count the parameters of a model with its adapter, by shapes: it needs no weights."""
    trainable, parameters = model.get_nb_trainable_parameters()
    embeddings = model.get_input_embeddings().weight
    lm_head = model.get_output_embeddings().weight
    frozen = parameters - trainable - lm_head.numel()
    if embeddings is not lm_head:
        frozen -= embeddings.numel()

    config = model.config.get_text_config()
    head_dim = getattr(config, "head_dim", None)
    if not head_dim:
        head_dim = config.hidden_size // config.num_attention_heads
    return ModelSizes(
        trainable=trainable,
        parameters=parameters,
        head=lm_head.numel(),
        base=frozen,
        attention=config.num_hidden_layers * config.num_attention_heads * head_dim,
    )


def measure_matrix_rate(device: torch.device) -> float:
    """Measure the FLOP/s of a large matrix product on this device, which MFU is a share of."""
    import torch

    size = 8192 if device.type == "cuda" else 1024
    square = torch.rand(size, size, device=device, dtype=compute_dtype(device.type))
    seconds = []
    for _ in range(5):
        began = time.perf_counter()
        product = square @ square
        product[0, 0].item()  # waits for the device
        seconds.append(time.perf_counter() - began)
    return 2 * size**3 / min(seconds)


def step_flops(batch: list[Example], sizes: ModelSizes) -> float:
    """Count the floating-point operations that a step needs, without those of recomputation.

    A token costs 2 a parameter forward and 2 for the gradient of its input; 2 more for that of a
    weight, where it is tuned: 4 base + 6 trainable. The head sees supervised tokens only: 4 head.
    Causal attention over L tokens: 2 products forward and 4 backward, L²/2 x width x 2 each.
    """
    layers = (4 * sizes.base + 6 * sizes.trainable) * count_tokens(batch)
    head = 4 * sizes.head * count_supervised(batch)
    attention = 6 * sizes.attention * sum(len(example) ** 2 for example in batch)
    return layers + head + attention


# --- a run, ready ---------------------------------------------------------------------------------


class StopSignal:
    """Keeps the first SIGTERM or Ctrl-C for the end of the step; the second ends at once."""

    def __init__(self) -> None:
        self.signum = 0  # of the signal that has come; 0: none
        self.time = 0.0  # when it came
        self.training = False  # before the first step there is nothing to save

    def install(self) -> None:
        """Make this object the process's handler of both signals."""
        signal.signal(signal.SIGTERM, self.handle)
        signal.signal(signal.SIGINT, self.handle)

    def handle(self, signum: int, _frame: object) -> None:
        """Note the signal, or end the process."""
        # It may come amid a print(), and another one would then be an error: hence os.write().
        repeated = self.signum != 0
        under_torchrun = "TORCHELASTIC_RUN_ID" in os.environ
        if repeated and under_torchrun and time.monotonic() < self.time + REPEATED_SIGNAL:
            return  # torchrun passes on the Ctrl-C that the terminal has sent already
        if repeated or not self.training:
            if sys.stderr.isatty():
                os.write(2, b"\x1b[?25h")  # the cursor, which the progress bar has hidden
            os.write(2, b"interrupted: ended at once\n")
            os._exit(128 + signum)
        self.signum = signum
        self.time = time.monotonic()
        os.write(2, b"saving a checkpoint after this step; interrupt again to end at once\n")


@dataclass
class Run:
    """What the functions of a training run share."""

    args: argparse.Namespace
    stop: StopSignal
    model: Model
    tokenizer: Tokenizer
    examples: list[Example]  # to train on
    held_out: list[Example]
    settings: Row  # of settings_to_meet_again(), and the hashes of data and base
    base_record: Row  # what base_fingerprint.json holds
    counts: Row  # for run.json
    sizes: ModelSizes
    capacity: int  # tokens of a packed row
    recompute: bool  # gradient checkpointing is on
    steps: int  # of the whole run
    matrix_rate: float  # FLOP/s
    began: float = 0.0  # time.monotonic() at step 0, as if never interrupted

    def log(self, step: int, event: str | None = None, **fields: Any) -> None:
        """Append a step, or an event, to train_log.jsonl; all have "step", the last one done.

        Of the events these have fields besides:
            start, resume: steps, processes, matrix_tflops
            checkpoint: folder
            validation: validation_loss, validation_loss_token
            sample: prompt, text
            stop: why
            end: seconds
        """
        if RANK > 0:
            return
        line: Row = {}
        if event:
            line["event"] = event
        line["step"] = step
        line.update(fields)
        with (self.args.out / LOG_FILE).open("a", encoding="utf-8") as log:
            print(json.dumps(line, ensure_ascii=False), file=log)


def prepare_run(args: argparse.Namespace, stop: StopSignal, data_sha256: str) -> Run:
    """Load rows and model, and settle all that the steps need; data_sha256: of the file of rows."""
    import torch

    rows = load_rows(args)
    device = set_up_device(args.device)
    folder = fetch_model("--base-model", args.base_model)
    check_input(folder / "config.json", f"--base-model {args.base_model} is no model's folder")
    torch.manual_seed(args.seed)  # the adapter's A is random
    base, tokenizer = load_base(args, folder, device)
    model = add_adapter(base, args)
    sizes = model_sizes(model)

    tokenised = tokenise(rows, tokenizer, args.cutoff)
    examples, held_out = hold_out(tokenised, args)
    matrix_rate = measure_matrix_rate(device)
    dtype = compute_dtype(device.type)
    say(f"on {WORLD_SIZE} x {device}, {dtype}: {matrix_rate / 1e12:.3g} TFLOP/s")
    if args.shard:
        shard_base(model, device)
    capacity = row_capacity(args, model, tokenised)
    if args.gradient_checkpointing:
        recompute_activations(model)

    fingerprint = base_fingerprint(folder)
    settings = settings_to_meet_again(args, device, capacity)
    settings["data"] = data_sha256
    settings["base"] = fingerprint
    base_record = {"base_model": args.base_model, "load_in_4bit": args.load_in_4bit}
    return Run(
        args=args,
        stop=stop,
        model=model,
        tokenizer=tokenizer,
        examples=examples,
        held_out=held_out,
        settings=settings,
        base_record={**base_record, **fingerprint},
        counts=count_rows(tokenised, len(rows), tokenizer.eos_token_id),
        sizes=sizes,
        capacity=capacity,
        recompute=bool(args.gradient_checkpointing),
        steps=math.ceil(len(examples) / args.batch_size) * args.epochs,
        matrix_rate=matrix_rate,
    )


def hold_out(
    examples: list[Example], args: argparse.Namespace
) -> tuple[list[Example], list[Example]]:
    """Deal the examples out by the seed: (to train on, held out). Refuses to train on none."""
    count = args.val_set_size
    if len(examples) <= count:
        fault = f"{len(examples)} rows with an answer within --cutoff {args.cutoff} tokens"
        raise UserError(f"{args.data} has {fault}, --val-set-size is {count}: nothing to train on")
    order = random.Random(f"{args.seed} held out").sample(examples, len(examples))
    return order[count:], order[:count]


def row_capacity(args: argparse.Namespace, model: Model, examples: list[Example]) -> int:
    """Return the tokens of a packed row; 1 where the model would mix the examples of one."""
    if len(examples) > 1 and not isolates(model, examples):
        say("warning: packed examples of this model would mix, so each has a row of its own")
        return 1
    if args.micro_batch_tokens:
        return args.micro_batch_tokens
    if model.device.type == "cpu":
        return CPU_ROW
    return args.cutoff


def recompute_activations(model: Model) -> None:
    """Turn gradient checkpointing on: activations are computed again backward, not kept."""
    from torch.utils.checkpoint import checkpoint

    # As gradient_checkpointing_enable(), but without its hook by which the embeddings' output needs
    # a gradient: only reentrant checkpointing wants that, and backward would go below all adapters.
    recompute = functools.partial(checkpoint, use_reentrant=False)
    for module in model.modules():
        if hasattr(module, "gradient_checkpointing"):
            module.gradient_checkpointing = True
            module._gradient_checkpointing_func = recompute


def settings_to_meet_again(args: argparse.Namespace, device: torch.device, capacity: int) -> Row:
    """Return the settings without which --resume would not end with the same adapter."""
    settings = {name: getattr(args, name) for name in args.origin if name not in FREE_SETTINGS}
    settings["seed"] = args.seed
    settings["limit"] = args.limit
    settings["micro_batch_tokens"] = capacity
    settings["device"] = device.type
    settings["processes"] = WORLD_SIZE
    return settings


def count_rows(examples: list[Example], rows: int, eos: int) -> Row:
    """Count what became of the rows, for run.json; eos: the token that ends what was not cut."""
    cut = [example for example in examples if example.input_ids[-1] != eos]
    return {
        "rows": rows,
        "left_out": rows - len(examples),
        "cut": len(cut),
        "tokens": count_tokens(examples),
        "supervised_tokens": count_supervised(examples),
        "longest_row": max(len(example) for example in examples),
    }


def say_plan(run: Run) -> None:
    """Print each setting with its origin, what is trained and on which rows."""
    for name, origin in run.args.origin.items():
        value = str(getattr(run.args, name))
        say(f"{name:>14} {value:<26} {origin}")

    sizes = run.sizes
    share = sizes.trainable / sizes.parameters
    say(f"trainable: {sizes.trainable:,} of {sizes.parameters:,} parameters ({share:.4%})")
    if run.args.targets == "mlp" and share < SMALL_SHARE:
        say("warning: under 0.1 % trainable, where the MLP modules did not do better (paper, 3.1)")

    counts = run.counts
    left_out = f"{counts['left_out']:,} left out (no answer within the cutoff)"
    cut = f"{counts['cut']:,} cut at the end"
    longest = f"longest: {counts['longest_row']:,} tokens"
    say(f"rows: {counts['rows']:,}; {left_out}, {cut}; {longest}")
    supervised = counts["supervised_tokens"] / counts["tokens"]
    say(f"tokens: {counts['tokens']:,}, {supervised:.1%} supervised")
    if run.args.warmup_steps >= run.steps:
        rise = run.args.warmup_steps
        say(f"warning: {run.steps} steps, and the learning rate rises over {rise}")


# --- checkpoints ----------------------------------------------------------------------------------


def adapter_files(run: Run) -> dict[str, bytes]:
    """Return {name: bytes}: the adapter in PEFT's layout, and the fingerprint of its base."""
    from peft import get_peft_model_state_dict
    from safetensors.torch import save

    # By default PEFT would collect the whole base too, and look up the base's configuration, on the
    # hub if need be, to tell whether embeddings have grown; ours never do.
    tuned = {name: p for name, p in run.model.named_parameters() if p.requires_grad}
    state = get_peft_model_state_dict(run.model, tuned, save_embedding_layers=False)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}

    config = run.model.peft_config["default"].to_dict()
    config["inference_mode"] = True
    config["base_model_name_or_path"] = run.args.base_model
    # PEFT's configuration holds sets, which differ in order from run to run.
    as_json = functools.partial(json.dumps, indent=2, sort_keys=True, default=sorted)
    return {
        "adapter_model.safetensors": save(tensors, {"format": "pt"}),
        "adapter_config.json": as_json(config).encode(),
        "base_fingerprint.json": as_json(run.base_record).encode(),
    }


def checkpoints(out: Path) -> list[Path]:
    """List the checkpoints in an output folder, newest first."""
    return sorted((out / "checkpoints").glob("step-*"), reverse=True)


def checkpoint_files(run: Run, optimizer: Optimizer, step: int) -> dict[str, bytes]:
    """Return {name: bytes} of what the steps after `step` need, and of an adapter folder of PEFT's.

    The rate, the order of the rows and the dropout masks follow from the seed and the step.
    """
    from safetensors.torch import save

    moments = {}
    for index, state in optimizer.state_dict()["state"].items():
        for key, tensor in state.items():
            moments[f"{index}.{key}"] = tensor
    files = adapter_files(run)
    files["optimizer.safetensors"] = save(moments)

    hashes = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    seconds = time.monotonic() - run.began
    state = {"step": step, "seconds": seconds, "settings": run.settings, "sha256": hashes}
    files["state.json"] = json.dumps(state, indent=2).encode()
    return files


def save_checkpoint(run: Run, optimizer: Optimizer, step: int) -> None:
    """Write a checkpoint under a temporary name, rename it, and remove all but the newest."""
    files = checkpoint_files(run, optimizer, step)
    folder = run.args.out / "checkpoints" / f"step-{step:06d}"
    partial = folder.with_name(".partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        for name, data in files.items():
            write_file(partial / name, data)
        shutil.rmtree(folder, ignore_errors=True)  # one that was not whole
        os.replace(partial, folder)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        fault = f"the checkpoint of step {step} could not be written ({error})"
        raise UserError(f"{fault}; make room and go on from the last one with --resume") from None

    for old in checkpoints(run.args.out)[KEPT_CHECKPOINTS:]:
        shutil.rmtree(old)
    run.log(step, "checkpoint", folder=str(folder.relative_to(run.args.out)))


def is_whole(checkpoint: Path) -> bool:
    """Tell whether each file of a checkpoint is the one that was written."""
    hashes = read_object(checkpoint / "state.json").get("sha256")
    if not isinstance(hashes, dict):
        return False
    for name, known in hashes.items():
        path = checkpoint / name
        if not path.is_file() or sha256_of(path) != known:
            return False
    return True


def load_checkpoint(run: Run, optimizer: Optimizer) -> int:
    """Load the newest whole checkpoint and cut the log back to its step; return that, or 0.

    Raises UserError where a setting has changed since.
    """
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    for folder in checkpoints(run.args.out):
        if not is_whole(folder):
            say(f"{folder} is not whole: going back to the one before")
            continue
        state = read_json(folder / "state.json")
        check_unchanged(state["settings"], run.settings)
        set_peft_model_state_dict(run.model, load_file(folder / "adapter_model.safetensors"))

        moments: dict[int, Row] = {}
        for name, tensor in load_file(folder / "optimizer.safetensors").items():
            index, _, key = name.partition(".")
            moments.setdefault(int(index), {})[key] = tensor
        optimizer.load_state_dict({**optimizer.state_dict(), "state": moments})

        run.began -= state["seconds"]
        cut_log(run.args.out, state["step"])
        return state["step"]
    say(f"{run.args.out} has no whole checkpoint: starting at step 0")
    cut_log(run.args.out, step=-1)
    return 0


def check_unchanged(old: Row, new: Row) -> None:
    """Refuse to go on with settings that are not those of the checkpoint."""
    changes = []
    for name, value in new.items():
        if old.get(name) != value:
            changes.append(f"{name} was {old.get(name)}, is {value}")
    if changes:
        mend = "set it back, or begin with --overwrite"
        raise UserError(f"--resume: {'; '.join(changes)}: {mend}")


def cut_log(out: Path, step: int) -> None:
    """Leave the log's lines up to a step; what a crash has half written goes as well."""
    if RANK > 0:
        return
    path = out / LOG_FILE
    kept = b""
    if path.exists():
        for line in path.read_bytes().splitlines():
            with suppress(ValueError, LookupError, TypeError):  # half a line
                if json.loads(line)["step"] <= step:
                    kept += line + b"\n"
    write_file(path, kept)


# --- steps ----------------------------------------------------------------------------------------


@contextmanager
def hold_output(args: argparse.Namespace) -> Iterator[None]:
    """Hold the output folder for a block, in the first process, with nothing of a former run in it.

    With --resume all stays, even a run.json: the run may have been stopped after that was written,
    but before the folder's mark was removed.
    """
    if RANK > 0:
        yield
        return
    resume_flag = " --resume"  # which the command in the mark needs to go on
    if args.resume:
        resume_flag = ""  # it has that already
    with claim_output(args.out, args.overwrite, keep_run=args.resume, resume_flag=resume_flag):
        if not args.resume:
            cut_log(args.out, step=-1)  # an empty log
            for old in checkpoints(args.out):
                shutil.rmtree(old)
        yield


def train(run: Run) -> None:
    """Run the steps that are left; a signal ends the process after a checkpoint."""
    import torch
    from peft.helpers import disable_input_dtype_casting

    args = run.args
    run.model.train()
    tuned = trainable_parameters(run.model)
    optimizer = torch.optim.AdamW(tuned, args.learning_rate, weight_decay=args.weight_decay)
    run.began = time.monotonic()
    done = 0
    if args.resume:
        done = load_checkpoint(run, optimizer)

    # Later the processes exchange gradients alone, so they must begin with equal bits, though each
    # has drawn or read its own adapter; and one without a row needs a gradient to add: zero.
    for parameter in tuned:
        parameter.grad = torch.zeros_like(parameter)
        if torch.distributed.is_initialized():
            torch.distributed.broadcast(parameter.data, 0)

    # Autocast chooses the types; PEFT would make a float32 copy of the input of each adapter.
    with disable_input_dtype_casting(run.model):
        try_fullest_row(run)
        run.stop.training = True
        event = "resume" if done else "start"
        tflops = round(run.matrix_rate / 1e12, 3)
        run.log(done, event, steps=run.steps, processes=WORLD_SIZE, matrix_tflops=tflops)
        run_steps(run, optimizer, done)


def try_fullest_row(run: Run) -> None:
    """Run the fullest row of all first, so that memory runs out in the first minute or never.

    Where it does not fit and nothing else was asked for, gradient checkpointing is turned on. Its
    gradients go when optimizer_step() begins by setting all to zero.
    """
    import torch

    fullest: list[Example] = []
    for _, batch in batches(run.examples, run.args):
        for row in pack(batch, run.capacity, WORLD_SIZE):
            if count_tokens(row) > count_tokens(fullest):
                fullest = row

    fault = f"a row of {count_tokens(fullest):,} tokens does not fit into memory"
    while True:
        try:
            run_row(run, fullest, [1.0] * len(fullest))
            return
        except torch.OutOfMemoryError:
            if run.recompute or run.args.gradient_checkpointing is False:
                mend = "lower --cutoff or --micro-batch-tokens, or add --load-in-4bit or --shard"
                raise UserError(f"{fault}: {mend}") from None
        torch.cuda.empty_cache()  # not above, where the error still holds the row's tensors
        say(f"{fault}: gradient checkpointing is on")
        recompute_activations(run.model)
        run.recompute = True


def run_row(run: Run, row: list[Example], weights: list[float]) -> Tensor:
    """Run a row forward, and backward where gradients are on: [weighted loss, summed loss]."""
    import torch

    losses = row_losses(run.model, row)
    loss = (losses * losses.new_tensor(weights)).sum()
    if loss.requires_grad:
        loss.backward()
    return torch.stack([loss, losses.sum()]).detach().float()


def run_steps(run: Run, optimizer: Optimizer, done: int) -> None:
    """Run the steps after the first `done`, with their log, validation, samples and checkpoints."""
    import torch
    from transformers import get_cosine_schedule_with_warmup

    args = run.args
    schedule = get_cosine_schedule_with_warmup(optimizer, args.warmup_steps, run.steps)
    [rate_share] = schedule.lr_lambdas  # a function of the step alone: --resume needs no more
    bar = make_progress_bar(run.steps, done)
    with bar:
        for step, (epoch, batch) in enumerate(batches(run.examples, args), 1):
            if step <= done:  # the order of the rows is drawn again, as it was
                continue
            optimizer.param_groups[0]["lr"] = args.learning_rate * rate_share(step - 1)
            line, stop = optimizer_step(run, optimizer, step, batch)
            run.log(step, epoch=round(epoch, 4), **line)
            show_step(bar, step, run.steps, line)

            run.model.eval()
            with torch.no_grad(), autocast(run.model):
                if run.held_out and is_due(run, step, args.save_every):
                    validate(run, step)
                if is_due(run, step, args.sample_every):
                    write_samples(run, step)  # in every process: a sharded base needs all of them
            run.model.train()
            if RANK == 0 and (stop or is_due(run, step, args.save_every)):
                save_checkpoint(run, optimizer, step)
            if stop:
                end_by_signal(run, step)


def make_progress_bar(steps: int, done: int) -> Progress:
    """Make the bar that a terminal shows, of the first process; elsewhere it is disabled."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn

    shown = RANK == 0 and sys.stderr.isatty()
    text = TextColumn("{task.description}")
    bar = Progress(BarColumn(), text, console=Console(stderr=True), disable=not shown)
    bar.add_task("", total=steps, completed=done)
    return bar


def optimizer_step(
    run: Run, optimizer: Optimizer, step: int, batch: list[Example]
) -> tuple[Row, bool]:
    """Take one step; return its line for the log, and whether a signal has come to any process.

    Raises UserError for a loss or gradient that is no number, before it reaches the weights.
    """
    import torch

    # Masks of dropout follow from seed, step and process: no generator's state has to be saved.
    seed = random.Random(f"{run.args.seed} {step} {RANK}").getrandbits(63)
    torch.manual_seed(seed)
    group = optimizer.param_groups[0]
    began = time.monotonic()
    optimizer.zero_grad(set_to_none=False)
    try:
        loss, loss_token, stop = run_batch(run, batch)
    except torch.OutOfMemoryError as error:
        fault = f"step {step} ran out of memory ({first_line(error)})"
        raise UserError(f"{fault}: go on with --resume --gradient-checkpointing") from None

    grad_norm = torch.nn.utils.clip_grad_norm_(group["params"], MAX_GRAD_NORM).item()
    if not math.isfinite(loss + grad_norm):
        ids = ", ".join(example.row_id for example in batch)
        fault = f"step {step} has loss {loss} and gradient norm {grad_norm}"
        fault = f"{fault}, from one of the rows {ids}"
        run.log(step - 1, "stop", why=fault)
        raise UserError(f"{fault}; look at them, or lower --learning-rate; checkpoints are whole")
    optimizer.step()

    line = {
        "loss": loss,
        "loss_token": loss_token,
        "learning_rate": group["lr"],
        "grad_norm": grad_norm,
    }
    line.update(step_speed(run, step, batch, seconds=time.monotonic() - began))
    return line, stop


def run_batch(run: Run, batch: list[Example]) -> tuple[float, float, bool]:
    """Run a batch, whose rows the processes share: (loss, mean loss of its tokens, stop).

    The first loss is weighed by --loss-norm; stop: a signal has come to one of the processes.
    Where gradients are on, those of the whole batch are in .grad afterwards, in every process.
    """
    import torch

    totals = torch.zeros(3, device=run.model.device)  # loss, summed loss, signals that have come
    if run.stop.signum:
        totals[2] = 1
    rows = pack(batch, run.capacity, WORLD_SIZE)
    for row in rows[RANK::WORLD_SIZE]:
        if row:
            weights = token_weights(row, batch, run.args.loss_norm)
            totals[:2] += run_row(run, row, weights)
        elif run.args.shard:  # the others wait for its all-gathers: a row that weighs nothing
            run_row(run, batch[:1], [0.0])

    if torch.distributed.is_initialized():  # what DDP does, but once a step
        torch.distributed.all_reduce(totals)
        if torch.is_grad_enabled():
            for parameter in trainable_parameters(run.model):
                torch.distributed.all_reduce(parameter.grad)
    loss, summed_loss, signals = totals.tolist()
    return loss, summed_loss / count_supervised(batch), signals > 0


def step_speed(run: Run, step: int, batch: list[Example], seconds: float) -> Row:
    """Return what the log says of a step's size, pace and memory; seconds: what the step took."""
    import torch

    tokens = count_tokens(batch)
    flops = step_flops(batch, run.sizes)
    elapsed = time.monotonic() - run.began
    bytes_used = torch.cuda.max_memory_allocated()  # 0 without a GPU: then the process's, in KiB
    if not bytes_used:
        bytes_used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    gpu_util = None
    if torch.cuda.is_available() and util.find_spec("pynvml"):
        gpu_util = torch.cuda.utilization()  # percent of the last second, or less, it was busy in
    return {
        "tokens": tokens,
        "supervised_tokens": count_supervised(batch),
        "tokens_per_second": round(tokens / seconds, 1),
        "mfu": round(flops / seconds / (WORLD_SIZE * run.matrix_rate), 4),
        "memory_gb": round(bytes_used / 1e9, 3),
        "gpu_util": gpu_util,
        "seconds": round(elapsed, 3),
        "eta_seconds": round(elapsed / step * (run.steps - step), 1),
    }


def show_step(bar: Progress, step: int, steps: int, line: Row) -> None:
    """Show a step in the bar, or as a line of its own."""
    pace = f"{line['tokens_per_second']:,.0f} tokens/s, {line['eta_seconds']:.0f} s to go"
    text = f"step {step}/{steps} loss {line['loss']:.4f} {pace}"
    if bar.disable:
        say(text)
    else:
        bar.update(bar.task_ids[0], completed=step, description=text)


def is_due(run: Run, step: int, every: int) -> bool:
    """Tell whether it is the turn of what happens each `every` steps (0: never) and at the end."""
    return every > 0 and (step % every == 0 or step == run.steps)


def validate(run: Run, step: int) -> None:
    """Compute the losses of the rows held out, for the log and the terminal."""
    loss, loss_token, _ = run_batch(run, run.held_out)
    run.log(step, "validation", validation_loss=loss, validation_loss_token=loss_token)
    say(f"step {step}: validation loss {loss:.4f}")


def write_samples(run: Run, step: int) -> None:
    """Answer the first prompts, of rows held out where there are any, for the log."""
    import torch

    examples = run.held_out or run.examples
    for example in examples[:SAMPLES]:
        prompt_ids = torch.tensor([example.input_ids[: example.start]], device=run.model.device)
        ids = run.model.generate(
            input_ids=prompt_ids,
            attention_mask=torch.ones_like(prompt_ids),
            max_new_tokens=SAMPLE_TOKENS,
            do_sample=False,
            use_cache=True,
            pad_token_id=0,  # pads nothing, with one prompt; the model's own may be missing or < 0
        )
        prompt = run.tokenizer.decode(prompt_ids[0])
        text = run.tokenizer.decode(ids[0, prompt_ids.shape[1] :])
        run.log(step, "sample", prompt=prompt, text=text)


def end_by_signal(run: Run, step: int) -> NoReturn:
    """End the process as the signal asked, its checkpoint on disk."""
    signum = signal.Signals(run.stop.signum or signal.SIGTERM)  # it may be another process's
    run.log(step, "stop", why=signum.name)
    again = command_line()
    if not run.args.resume:
        again += " --resume"
    say(f"stopped by {signum.name} after step {step}; go on with --resume: {again}")
    sys.exit(128 + signum)


def write_outputs(run: Run, inputs: dict[str, Row], started: float) -> None:
    """Write the adapter's files, the log's last line, and run.json; from the first process only."""
    if RANK > 0:
        return
    outputs = []
    for name, data in adapter_files(run).items():
        path = run.args.out / name
        write_file(path, data)
        outputs.append(path)
    run.log(run.steps, "end", seconds=round(time.monotonic() - run.began, 1))
    outputs.append(run.args.out / LOG_FILE)

    counts = {**run.counts, **asdict(run.sizes), "steps": run.steps}
    finish_run(run.args, inputs=inputs, outputs=outputs, started=started, counts=counts)


def main(argv: list[str] | None = None) -> None:
    """Rows -> tokens -> steps -> adapter."""
    started = time.monotonic()
    stop = StopSignal()
    stop.install()
    args = parse_args(argv)
    if is_finished(args):
        print(f"{args.out} is finished already")
        return
    protect_checkpoints(args)
    # Neither the rows' folder nor the base's may be --out.
    check_output(args.out, args.overwrite, args.data, Path(args.base_model))

    inputs = describe_files([check_input(args.data, MAKE_DATA)])
    run = prepare_run(args, stop, data_sha256=inputs[str(args.data)]["sha256"])
    say_plan(run)
    with hold_output(args):
        train(run)
        write_outputs(run, inputs, started)
    if RANK == 0:
        print(f"wrote {args.out}: {run.steps} steps. Next:")
        print(next_command(args.out))


if __name__ == "__main__":
    run_main(main)

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
import warnings
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from importlib import util
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from common import (
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
    read_jsonl,
    refuse,
    run_main,
    sha256_of,
    step_of,
    use_device,
    write_file,
)

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

RECIPES = {  # paper, table 3: beside the base, the two differ in the learning rate alone
    "13b": {"base_model": "meta-llama/Llama-2-13b-hf", "learning_rate": 4e-4},
    "70b": {"base_model": "meta-llama/Llama-2-70b-hf", "learning_rate": 3e-4},
}
PAPER = {  # paper, table 3: flag -> (type, value, what it is)
    "batch_size": (positive, 16, "examples of one optimizer step"),
    "epochs": (positive, 1, "passes over the data"),
    "warmup_steps": (int, 100, "of a linear rise; then half a cosine to 0"),
    "weight_decay": (float, 0.0, "of AdamW"),
    "cutoff": (positive, 4096, "tokens of an example; the end of a longer one is cut off"),
    "targets": (str, "mlp", "mlp, attention, all, or names of linear layers: a,b"),
    "lora_rank": (positive, 16, "columns of B and rows of A"),
    "lora_alpha": (positive, 16, "the scale of B A is alpha / rank"),
    "lora_dropout": (float, 0.05, "of the input of A"),
}
OURS = {  # what the paper does not speak of
    "loss_norm": (
        ("example", "token"),
        "example",
        "what weighs the same in a batch; 2023: example",
    ),
    "rslora": (bool, False, "the scale of B A is alpha / sqrt(rank)"),
    "dora": (bool, False, "tune direction and magnitude of the weights apart"),
    "load_in_4bit": (bool, False, "QLoRA: base in NF4, doubly quantised"),
    "shard": (bool, False, "FSDP2, under torchrun: the 16-bit base is split over all GPUs"),
    "val_set_size": (int, 0, "rows held out and scored at every checkpoint"),
    "save_every": (positive, 50, "steps between checkpoints"),
    "sample_every": (int, 0, "steps between answers to two of the prompts; 0: none"),
}
FREE = {"base_model", "save_every", "sample_every"}  # may change: the base's hash is held instead
MAX_GRAD_NORM = 1.0  # the Trainer's default, which the published run left as it was
CPU_ROW = 1024  # tokens of a packed row on a CPU, where longer ones gain nothing
TARGETS = {
    "mlp": ["gate_proj", "up_proj", "down_proj"],  # the paper's choice, after He et al.
    "attention": ["q_proj", "k_proj", "v_proj", "o_proj"],  # the authors' first try
    "all": "all-linear",  # PEFT's name for every linear layer but the head
}
FEW = 0.001  # under 0.1 % trainable the MLP targets did not do better (paper, section 3.1)
MEND = "write it with: python check_contamination.py"
LOG = "train_log.jsonl"
KEEP = 2  # checkpoints on disk: the newest, and the one to fall back on
SAMPLES, SAMPLE_TOKENS = 2, 64  # prompts of a sample event, and the tokens written to each
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # torchrun's


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
        """Tokens that the loss sees: the answer and EOS."""
        return len(self) - self.start


class Stop:
    """Keeps the first SIGTERM or Ctrl-C for the end of the step; the second ends at once."""

    signum, time, training = 0, 0.0, False

    def __init__(self) -> None:
        signal.signal(signal.SIGTERM, self.take)
        signal.signal(signal.SIGINT, self.take)

    def take(self, signum: int, _frame: object) -> None:
        """The handler. Before the first step there is nothing to save, so it ends there too."""
        if self.signum and "TORCHELASTIC_RUN_ID" in os.environ and time.monotonic() < self.time + 2:
            return  # torchrun passes on the Ctrl-C that the terminal has sent already
        if self.signum or not self.training:
            cursor = b"\x1b[?25h" if sys.stderr.isatty() else b""  # the bar had hidden it
            os.write(2, cursor + b"interrupted: ended at once\n")
            os._exit(128 + signum)
        self.signum, self.time = signum, time.monotonic()
        os.write(2, b"saving a checkpoint after this step; interrupt again to end at once\n")


@dataclass
class Run:
    """What the functions of a training run share."""

    args: argparse.Namespace
    stop: Stop
    model: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerBase"
    examples: list[Example]
    held_out: list[Example]
    settings: Row  # that --resume has to meet again
    base: Row  # what base_fingerprint.json holds
    sizes: dict[str, int]  # of model_sizes()
    capacity: int  # tokens of a packed row
    recompute: bool  # gradient checkpointing is on
    steps: int
    matrix_rate: float  # FLOP/s
    began: float = 0.0  # time.monotonic() at step 0, as if never interrupted

    def log(self, step: int, event: str | None = None, **fields: Any) -> None:
        """Append a step, or an event, to train_log.jsonl; all have "step", the last one done.

        start, resume: steps, processes, matrix_tflops. checkpoint: folder. validation:
        validation_loss, validation_loss_token. sample: prompt, text. stop: why. end: seconds.
        """
        if RANK == 0:
            line = ({"event": event} if event else {}) | {"step": step, **fields}
            with (self.args.out / LOG).open("a", encoding="utf-8") as log:
                print(json.dumps(line, ensure_ascii=False), file=log)


def say(text: str) -> None:
    """Print a line to stderr, from the first process only."""
    if RANK == 0:
        print(text, file=sys.stderr, flush=True)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags of this step; args.origin says where the value of each setting came from."""
    parser = make_parser(__doc__, "out/adapter")
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint")
    add = parser.add_argument_group("data, model and machine").add_argument
    data = Path("out/contamination/clean.jsonl")
    add("--data", type=Path, default=data, metavar="FILE", help="default: %(default)s")
    add("--base-model", metavar="MODEL", help="folder or hub id (default: the recipe's Llama-2)")
    add("--recipe", choices=RECIPES, default="13b", help="default: 13b")
    add("--learning-rate", type=float, metavar="LR", help="its peak; 13b: 4e-4, 70b: 3e-4")
    rows = "tokens of one forward pass (default: cutoff on a GPU, 1,024 on a CPU)"
    add("--micro-batch-tokens", type=positive, metavar="N", help=rows)
    on = {"action": argparse.BooleanOptionalAction}
    when = "default: with --shard, and where a row does not fit into a GPU without"
    add("--gradient-checkpointing", **on, help=when)
    origins = {f"recipe {name}": recipe for name, recipe in RECIPES.items()}
    for origin, settings in (("paper", PAPER), ("default", OURS)):
        add = parser.add_argument_group(f"settings ({origin})").add_argument
        for name, (kind, value, text) in settings.items():
            how = {"choices": kind} if isinstance(kind, tuple) else {"type": kind}
            how = on if kind is bool else how | {"metavar": name.split("_")[-1].upper()}
            add(f"--{name.replace('_', '-')}", help=f"{text} ({origin}: {value})", **how)
        origins[origin] = {name: value for name, (_, value, _) in settings.items()}
    args, values = parser.parse_args(argv), {}
    for origin in (f"recipe {args.recipe}", "paper", "default"):
        values |= {name: (value, origin) for name, value in origins[origin].items()}
    args.origin = {n: o if getattr(args, n) is None else "flag" for n, (_, o) in values.items()}
    for name, (value, _) in values.items():
        setattr(args, name, value if getattr(args, name) is None else getattr(args, name))
    if args.shard and args.gradient_checkpointing is None:
        args.gradient_checkpointing = True  # a model that needs every GPU leaves little room
    return check_settings(args)


def check_settings(args: argparse.Namespace) -> argparse.Namespace:
    """Refuse impossible settings, all at once."""
    rate, decay, dropout = args.learning_rate, args.weight_decay, args.lora_dropout
    counts = {n: getattr(args, n) for n in ("warmup_steps", "val_set_size", "sample_every")}
    wrong = {
        f"--{n.replace('_', '-')} {count} is below 0": count < 0 for n, count in counts.items()
    }
    wrong |= {
        f"--learning-rate {rate} is not above 0": not 0 < rate < math.inf,
        f"--weight-decay {decay} is not 0 or above": not 0 <= decay < math.inf,
        f"--lora-dropout {dropout} is not in [0, 1)": not 0 <= dropout < 1,
        "--shard and --load-in-4bit exclude each other": args.shard and args.load_in_4bit,
        "--shard needs torchrun (see --help)": args.shard and "RANK" not in os.environ,
    }
    refuse([message for message, found in wrong.items() if found])
    return args


# --- rows -> packed examples ----------------------------------------------------------------------


def load_rows(args: argparse.Namespace) -> list[Row]:
    """The training rows; says so when verdicts are newer than the clean set."""
    fields = {"instruction": str, "output": str}
    for record in ("run.json", "apply.json"):
        check_listed(check_input(args.data, MEND), record)
    rows = read_jsonl(args.data, fields)[: args.limit]
    log, applied = (args.data.with_name(name) for name in ("decisions.jsonl", "apply.json"))
    with suppress(OSError, ValueError, LookupError, TypeError):  # absent, or edited by hand
        if sha256_of(log) != json.loads(applied.read_bytes())["decisions_sha256"]:
            say(f"warning: {log} has newer verdicts than {args.data}; {MEND} apply")
    for number, row in enumerate(rows, 1):
        if not isinstance(row.get("input") or "", str) or not row["output"].strip():
            raise UserError(f"{args.data}, row {number}: its output is empty or its input no text")
    if not rows:
        raise UserError(f"{args.data} has no rows")
    return rows


def tokenise(rows: list[Row], tokenizer: "PreTrainedTokenizerBase", cutoff: int) -> list[Example]:
    """Prompt and answer tokenised together, EOS appended, cut at `cutoff` tokens from the end.

    The prompt's tokens are those that it has on its own; the rest is supervised. Rows of which
    the cut leaves nothing supervised are left out.
    """
    prompts = [alpaca_prompt(row["instruction"], row.get("input") or "") for row in rows]
    texts = [prompt + row["output"] for prompt, row in zip(prompts, rows, strict=True)]
    encoded = zip(rows, tokenizer(prompts)["input_ids"], tokenizer(texts)["input_ids"], strict=True)
    examples, eos = [], tokenizer.eos_token_id
    for number, (row, alone, ids) in enumerate(encoded, 1):
        if ids[-1] == eos:  # some tokenizers append it themselves
            alone, ids = alone[:-1], ids[:-1]
        start = max(1, len(os.path.commonprefix([alone, ids])))  # nothing predicts the first token
        ids = [*ids, eos][:cutoff]
        if start < len(ids):
            examples.append(Example(str(row.get("id", f"line {number}")), ids, start))
    return examples


def pack(examples: list[Example], tokens: int, multiple: int = 1) -> list[list[Example]]:
    """Deal examples out to rows of at most `tokens` tokens, longest first, each to the emptiest.

    None is split; one that is longer has a row of its own. The number of rows is the least
    `multiple` that will do; where there are fewer examples, some are empty.
    """
    least = min(len(examples), math.ceil(sum(map(len, examples)) / tokens))
    for count in itertools.count(math.ceil(least / multiple) * multiple, multiple):
        rows, sizes = [[] for _ in range(count)], [0] * count
        for example in sorted(examples, key=len, reverse=True):
            index = sizes.index(min(sizes))
            rows[index].append(example)
            sizes[index] += len(example)
        if all(size <= tokens or len(row) == 1 for row, size in zip(rows, sizes, strict=True)):
            return rows


def token_weights(row: list[Example], batch: list[Example], norm: str) -> list[float]:
    """What one supervised token of each example of `row` weighs; over a batch they sum to 1."""
    if norm == "token":
        return [1 / sum(example.supervised for example in batch)] * len(row)
    return [1 / (len(batch) * example.supervised) for example in row]


def batches(
    examples: list[Example], args: argparse.Namespace
) -> Iterator[tuple[float, list[Example]]]:
    """Yield (epochs done by its end, examples of one step), each epoch in a new seeded order."""
    for epoch in range(args.epochs):
        order = random.Random(f"{args.seed} {epoch}").sample(examples, len(examples))
        for start in range(0, len(order), args.batch_size):
            batch = order[start : start + args.batch_size]
            yield epoch + (start + len(batch)) / len(order), batch


# --- one forward pass of a packed row -------------------------------------------------------------


@functools.cache
def compute_dtype(kind: str) -> "torch.dtype":
    """bfloat16 on a GPU that has it in hardware, else float32; `kind` is the device's type."""
    import torch

    bf16 = kind == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if bf16 else torch.float32


def autocast(model: "PreTrainedModel") -> "torch.autocast":
    """Matrix products in compute_dtype(); the adapter's own weights stay in float32."""
    import torch

    dtype = compute_dtype(model.device.type)
    return torch.autocast(model.device.type, dtype, enabled=dtype == torch.bfloat16)


def attend_by_example(
    module: Any, q: Any, k: Any, v: Any, _mask: Any, lengths: Any = None, **options: Any
) -> tuple["torch.Tensor", None]:
    """Causal SDPA attention of each example of a packed row on its own, for transformers to call.

    q, k, v: [1, heads, tokens, head_dim]; lengths: tokens of each example. Returns [1, tokens,
    heads, head_dim]. Exact, on every device, and without the cost of a dense mask.
    """
    import torch
    from transformers.integrations.sdpa_attention import sdpa_attention_forward as attend

    parts = zip(*(x.split(lengths or x.shape[2], 2) for x in (q, k, v)), strict=True)
    return torch.cat([attend(module, *part, None, **options)[0] for part in parts], 1), None


def set_attention(model: "PreTrainedModel", cutoff: int) -> None:
    """Give the model attend_by_example() where its attention is plainly causal up to `cutoff`."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register("by_example", attend_by_example)
    AttentionMaskInterface.register("by_example", lambda *_, **__: None)
    config = model.config.get_text_config()
    windows = [getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size")]
    plain = set(getattr(config, "layer_types", None) or ()) <= {"full_attention"}
    plain &= config._attn_implementation == "sdpa" and min(w or cutoff for w in windows) >= cutoff
    if plain:
        model.set_attn_implementation("by_example")


def row_losses(model: "PreTrainedModel", row: list[Example]) -> "torch.Tensor":
    """Summed cross-entropy of each example's supervised tokens, from one packed row: [examples].

    The row is block-diagonal because position_ids start again with each example and no attention
    mask is given; use_cache must be off for that. Only the positions that predict a supervised
    token go through the head.
    """
    import torch

    ids, positions, predict, targets = [], [], [], []
    for example in row:
        predict += range(len(ids) + example.start - 1, len(ids) + len(example) - 1)
        targets += example.input_ids[example.start :]
        positions += range(len(example))
        ids += example.input_ids
    to = functools.partial(torch.tensor, device=model.device)
    given = {"input_ids": to([ids]), "logits_to_keep": to(predict), "use_cache": False}
    if len(row) > 1:
        given["position_ids"] = to([positions])
        if model.config._attn_implementation == "by_example":
            given["lengths"] = [len(example) for example in row]
    with autocast(model):
        logits = model(**given).logits[0]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))  # bfloat16 is too coarse
    losses = torch.nn.functional.cross_entropy(logits, to(targets), reduction="none")
    return torch.stack([part.sum() for part in losses.split([e.supervised for e in row])])


def isolates(model: "PreTrainedModel", examples: list[Example]) -> bool:
    """Whether a packed example's loss stays the same when its neighbour in the row changes."""
    import torch

    first, second = sorted(examples, key=len)[:2]
    other = replace(first, input_ids=first.input_ids[::-1])
    with torch.no_grad():
        losses = [row_losses(model.eval(), [e, second])[1] for e in (first, other)]
    return torch.allclose(*losses, rtol=1e-6)  # equal shapes: without a leak, equal bits


# --- model and adapter ----------------------------------------------------------------------------


def find_device(args: argparse.Namespace) -> "torch.device":
    """This process's device; under torchrun it joins the others, by NCCL on GPUs, else by gloo."""
    import torch

    name = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and "RANK" in os.environ:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    device = torch.device(use_device(name))
    if device.index is not None:
        torch.cuda.set_device(device)
    if "RANK" in os.environ:
        torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return device


def load_model(
    args: argparse.Namespace, folder: Path, device: "torch.device"
) -> tuple["PreTrainedModel", "PreTrainedTokenizerBase"]:
    """The base model with its fresh adapter, and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    dtype = compute_dtype(device.type)
    # what is to be sharded stays in the files' own type, mapped, until each process takes its part
    options: Row = {"dtype": "auto" if args.shard else dtype, "use_safetensors": True}
    if args.load_in_4bit:
        quantised = BitsAndBytesConfig(**NF4, bnb_4bit_compute_dtype=dtype)
        options |= {"quantization_config": quantised, "device_map": {"": device}}
    load = functools.partial(AutoModelForCausalLM.from_pretrained, output_loading_info=True)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model, about = load(folder, **options)
    except Exception as error:  # broken JSON, cut weights, an unknown architecture, no memory
        raise UserError(f"--base-model {args.base_model}: {first_line(error)}") from None
    known, rows = len(tokenizer), model.get_input_embeddings().num_embeddings
    wrong = {  # of a folder without tokenizer files, LlamaTokenizer makes a 3-token vocabulary
        "no usable tokenizer files": tokenizer.eos_token_id is None or known < 4,
        f"its tokenizer has {known:,} tokens, its embeddings {rows:,}": known > rows,
        f"its files lack weights: {sorted(about['missing_keys'])[:3]}": about["missing_keys"],
    }
    refuse(
        [
            message
            for message, found in (
                {f"--base-model {args.base_model}: {what}": found for what, found in wrong.items()}
            ).items()
            if found
        ]
    )
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # bitsandbytes would repack 4-bit weights in an eval forward: later gradients are wrong
            module.support_avx512bf16_for_cpu = False
    model.config.use_cache = False
    set_attention(model, args.cutoff)
    model = model if args.load_in_4bit or args.shard else model.to(device)
    return add_adapter(model, args), tokenizer


def add_adapter(model: "PreTrainedModel", args: argparse.Namespace) -> "PreTrainedModel":
    """Wrap the model in a LoRA adapter on args.targets; everything else is frozen."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers.pytorch_utils import Conv1D

    head, names = model.get_output_embeddings(), TARGETS.get(args.targets, args.targets.split(","))
    layers = [(n, m) for n, m in model.named_modules() if isinstance(m, torch.nn.Linear | Conv1D)]
    linear = [f".{name}" for name, module in layers if module is not head]
    wanted = [] if names == TARGETS["all"] else names
    if unknown := [n for n in wanted if not any(name.endswith(f".{n}") for name in linear)]:
        there = ", ".join(sorted({name.rpartition(".")[2] for name in linear}))
        fault = f"{', '.join(unknown)}: no linear layer of this model (the head is none to tune)"
        raise UserError(f"--targets {args.targets}: {fault}; it has {there}")
    shape = {"r": args.lora_rank, "lora_alpha": args.lora_alpha, "target_modules": names}
    kind = {"use_rslora": args.rslora, "use_dora": args.dora, "task_type": "CAUSAL_LM"}
    model = get_peft_model(model, LoraConfig(lora_dropout=args.lora_dropout, **shape, **kind))
    for name, parameter in model.named_parameters():
        if "lora_A" in name:  # PEFT's own, but the same on every device and for every type of base
            fresh = torch.nn.init.kaiming_uniform_(
                torch.empty(parameter.shape, device="cpu"), 5**0.5
            )
            parameter.data = parameter.data.float().copy_(fresh)
    return model


def shard(model: "PreTrainedModel", device: "torch.device") -> None:
    """Split the frozen base over the processes (FSDP2); the small adapter stays whole in each."""
    import torch
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    adapter = {p for p in model.parameters() if p.requires_grad}
    for parameter in adapter:
        parameter.data = parameter.data.to(device)
    mesh = torch.distributed.init_device_mesh(device.type, (WORLD,))
    policy, base = MixedPrecisionPolicy(compute_dtype(device.type)), model.get_base_model()
    blocks = [m for m in base.modules() if type(m).__name__ in (base._no_split_modules or ())]
    for module in [*blocks, base]:
        fully_shard(module, mesh=mesh, mp_policy=policy, ignored_params=adapter)


def model_sizes(model: "PreTrainedModel") -> dict[str, int]:
    """Parameters by what they cost in a step; works on the meta device.

    trainable; parameters (all, the adapter's too); head (vocabulary x width); base (what is frozen
    but embeddings and head); attention (layers x width of all heads).
    """
    trainable, parameters = model.get_nb_trainable_parameters()
    inputs, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    config = model.config.get_text_config()
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    frozen = parameters - trainable - head.numel() - (inputs is not head) * inputs.numel()
    attention = config.num_hidden_layers * config.num_attention_heads * width
    sizes = {"trainable": trainable, "parameters": parameters, "head": head.numel()}
    return sizes | {"base": frozen, "attention": attention}


def matrix_rate(device: "torch.device") -> float:
    """FLOP/s of a large matrix product on this device, which MFU is a share of."""
    import torch

    size = 8192 if device.type == "cuda" else 1024
    square, seconds = torch.rand(size, size, device=device, dtype=compute_dtype(device.type)), []
    for _ in range(5):
        start = time.perf_counter()
        (square @ square)[0, 0].item()  # .item() waits for the device
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds)


def step_flops(batch: list[Example], sizes: dict[str, int]) -> float:
    """Floating-point operations that a step needs; those of recomputation are not counted.

    A token costs 2 a parameter forward and 2 for the gradient of its input; 2 more for that of a
    weight, where it is tuned: 4 base + 6 trainable. The head sees supervised tokens only: 4 head.
    Causal attention over L tokens: 2 products forward and 4 backward, L²/2 x width x 2 each.
    """
    cost, supervised = 4 * sizes["base"] + 6 * sizes["trainable"], sum(e.supervised for e in batch)
    attention = 6 * sizes["attention"] * sum(len(e) ** 2 for e in batch)
    return cost * sum(map(len, batch)) + 4 * sizes["head"] * supervised + attention


# --- a run, ready ---------------------------------------------------------------------------------


def prepare(args: argparse.Namespace, stop: Stop, data_sha256: str) -> tuple[Run, Row]:
    """Load rows and model, print settings with their origins; the run, and counts for run.json."""
    import torch

    rows, device = load_rows(args), find_device(args)
    folder = fetch_model("--base-model", args.base_model)
    check_input(folder / "config.json", f"--base-model {args.base_model} is no model's folder")
    torch.manual_seed(args.seed)
    model, tokenizer = load_model(args, folder, device)
    known = tokenise(rows, tokenizer, args.cutoff)
    examples, held_out = hold_out(known, args)
    sizes, rate = model_sizes(model), matrix_rate(device)
    if args.shard:
        shard(model, device)
    say(f"on {WORLD} x {device}, {compute_dtype(device.type)}: {rate / 1e12:.3g} TFLOP/s")
    capacity = row_capacity(args, model, known)
    if args.gradient_checkpointing:
        recompute_activations(model)
    counts = report(args, known, sizes, len(rows), tokenizer.eos_token_id)
    fingerprint = base_fingerprint(folder)
    settings = settings_to_meet_again(args, device.type, capacity)
    settings |= {"data": data_sha256, "base": fingerprint}
    base = {"base_model": args.base_model, "load_in_4bit": args.load_in_4bit, **fingerprint}
    steps = math.ceil(len(examples) / args.batch_size) * args.epochs
    if args.warmup_steps >= steps:
        say(f"warning: {steps} steps, and the learning rate rises over {args.warmup_steps}")
    run = Run(
        args=args,
        stop=stop,
        model=model,
        tokenizer=tokenizer,
        examples=examples,
        held_out=held_out,
        settings=settings,
        base=base,
        sizes=sizes,
        capacity=capacity,
        recompute=bool(args.gradient_checkpointing),
        steps=steps,
        matrix_rate=rate,
    )
    return run, counts


def hold_out(known: list[Example], args: argparse.Namespace) -> tuple[list[Example], list[Example]]:
    """(examples to train on, examples held out), dealt by the seed. Raises UserError for none."""
    count = args.val_set_size
    if len(known) <= count:
        fault = f"{len(known)} rows with an answer within --cutoff {args.cutoff} tokens"
        raise UserError(f"{args.data} has {fault}, --val-set-size is {count}: nothing to train on")
    order = random.Random(f"{args.seed} held out").sample(known, len(known))
    return order[count:], order[:count]


def row_capacity(args: argparse.Namespace, model: "PreTrainedModel", known: list[Example]) -> int:
    """Tokens of a packed row; 1 where the model would mix the examples of one."""
    if len(known) > 1 and not isolates(model, known):
        say("warning: packed examples of this model would mix, so each has a row of its own")
        return 1
    return args.micro_batch_tokens or (CPU_ROW if model.device.type == "cpu" else args.cutoff)


def settings_to_meet_again(args: argparse.Namespace, device: str, capacity: int) -> Row:
    """The settings that --resume must not change: all but FREE."""
    settings = {name: getattr(args, name) for name in args.origin if name not in FREE}
    settings |= {"seed": args.seed, "limit": args.limit, "micro_batch_tokens": capacity}
    return settings | {"device": device, "processes": WORLD}


def recompute_activations(model: "PreTrainedModel") -> None:
    """Turn gradient checkpointing on: activations are computed again backward, not kept."""
    from torch.utils.checkpoint import checkpoint

    for module in model.modules():
        if hasattr(module, "gradient_checkpointing"):  # transformers' switch, a layer at a time
            module.gradient_checkpointing = True
            module._gradient_checkpointing_func = functools.partial(checkpoint, use_reentrant=False)


def report(
    args: argparse.Namespace, examples: list[Example], sizes: Row, rows: int, eos: int
) -> Row:
    """Print each setting with its origin, and what there is to train on; counts for run.json."""
    for name, origin in args.origin.items():
        say(f"{name:>14} {getattr(args, name)!s:<26} {origin}")
    share = sizes["trainable"] / sizes["parameters"]
    say(f"trainable: {sizes['trainable']:,} of {sizes['parameters']:,} parameters ({share:.4%})")
    if share < FEW:
        say("warning: under 0.1 % trainable; the paper found MLP targets worse there")
    tokens, supervised = sum(map(len, examples)), sum(e.supervised for e in examples)
    cut, longest = sum(e.input_ids[-1] != eos for e in examples), max(map(len, examples))
    say(
        f"rows: {rows:,}; {rows - len(examples):,} left out (no answer within the cutoff), "
        f"{cut:,} cut at the end; longest: {longest:,} tokens\n"
        f"tokens: {tokens:,}, {supervised / tokens:.1%} supervised"
    )
    counts = {"rows": rows, "left_out": rows - len(examples), "cut": cut, "tokens": tokens}
    return counts | {"supervised_tokens": supervised, "longest_row": longest} | sizes


# --- checkpoints ----------------------------------------------------------------------------------


def adapter_files(run: Run) -> dict[str, bytes]:
    """Contents by file name: the adapter in PEFT's layout, and the fingerprint of its base."""
    from peft import get_peft_model_state_dict
    from safetensors.torch import save

    tuned = {name: p for name, p in run.model.named_parameters() if p.requires_grad}
    state = get_peft_model_state_dict(run.model, tuned, save_embedding_layers=False)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    config = run.model.peft_config["default"].to_dict()
    config |= {"inference_mode": True, "base_model_name_or_path": run.args.base_model}
    files = {"adapter_model.safetensors": save(tensors, {"format": "pt"})}
    for name, about in {"adapter_config.json": config, "base_fingerprint.json": run.base}.items():
        files[name] = json.dumps(about, indent=2, sort_keys=True, default=sorted).encode()
    return files


def checkpoints(out: Path) -> list[Path]:
    """The checkpoints in an output folder, newest first."""
    return sorted((out / "checkpoints").glob("step-*"), reverse=True)


def save_checkpoint(run: Run, optimizer: "torch.optim.Optimizer", step: int) -> None:
    """Write what the steps after `step` need under a temporary name, then rename it.

    The rate, the order of the rows and the dropout masks follow from the seed and the step. Every
    checkpoint is an adapter folder of PEFT's, too.
    """
    from safetensors.torch import save

    moments = optimizer.state_dict()["state"].items()
    tensors = {f"{i}.{key}": value for i, state in moments for key, value in state.items()}
    files = adapter_files(run) | {"optimizer.safetensors": save(tensors)}
    state = {"step": step, "seconds": time.monotonic() - run.began, "settings": run.settings}
    state["sha256"] = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    files["state.json"] = json.dumps(state, indent=2).encode()
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
    for old in checkpoints(run.args.out)[KEEP:]:
        shutil.rmtree(old)
    run.log(step, "checkpoint", folder=str(folder.relative_to(run.args.out)))


def load_checkpoint(run: Run, optimizer: "torch.optim.Optimizer") -> int:
    """Load the newest whole checkpoint, cut the log back to its step, and return that, or 0."""
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    for folder in checkpoints(run.args.out):
        try:
            state = json.loads((folder / "state.json").read_bytes())
            whole = all(sha256_of(folder / n) == known for n, known in state["sha256"].items())
        except (OSError, ValueError, LookupError, TypeError):
            whole = False
        if not whole:
            say(f"{folder} is not whole: going back to the one before")
            continue
        old, new = state["settings"], run.settings
        if changed := [f"{n} was {old.get(n)}, is {new[n]}" for n in new if old.get(n) != new[n]]:
            raise UserError(
                f"--resume: {'; '.join(changed)}: set it back, or begin with --overwrite"
            )
        set_peft_model_state_dict(run.model, load_file(folder / "adapter_model.safetensors"))
        moments: dict[int, Row] = {}
        for name, value in load_file(folder / "optimizer.safetensors").items():
            moments.setdefault(int(name.split(".")[0]), {})[name.split(".")[1]] = value
        optimizer.load_state_dict(optimizer.state_dict() | {"state": moments})
        run.began -= state["seconds"]
        cut_log(run.args.out / LOG, state["step"])
        return state["step"]
    say(f"{run.args.out} has no whole checkpoint: starting at step 0")
    cut_log(run.args.out / LOG, -1)
    return 0


def cut_log(path: Path, step: int) -> None:
    """Leave the log's lines up to a step; what a crash has half written goes as well."""
    kept = b""
    for line in path.read_bytes().splitlines() if RANK == 0 and path.exists() else ():
        with suppress(ValueError, LookupError, TypeError):
            kept += line + b"\n" if json.loads(line)["step"] <= step else b""
    if RANK == 0:
        write_file(path, kept)


# --- steps ----------------------------------------------------------------------------------------


def run_row(run: Run, row: list[Example], weights: list[float]) -> "torch.Tensor":
    """Forward of one row, and backward where gradients are on: [weighted loss, summed loss]."""
    import torch

    losses = row_losses(run.model, row)
    loss = (losses * losses.new_tensor(weights)).sum()
    if loss.requires_grad:
        loss.backward()
    return torch.stack([loss, losses.sum()]).detach().float()


def run_batch(run: Run, batch: list[Example]) -> tuple[float, float, bool]:
    """(loss, mean loss of its tokens, whether to stop) of a batch, whose rows the processes share.

    Where gradients are on, those of the whole batch are in .grad afterwards, in every process.
    """
    import torch

    totals = torch.zeros(3, device=run.model.device)
    totals[2] = bool(run.stop.signum)
    for row in pack(batch, run.capacity, WORLD)[RANK::WORLD]:
        if row:
            totals[:2] += run_row(run, row, token_weights(row, batch, run.args.loss_norm))
        elif run.args.shard:  # the others wait for its all-gathers: a row that weighs nothing
            run_row(run, batch[:1], [0.0])
    if torch.distributed.is_initialized():  # what DDP does, but once a step
        tuned = (p.grad for p in run.model.parameters() if p.requires_grad)
        for tensor in (totals, *(tuned if torch.is_grad_enabled() else ())):
            torch.distributed.all_reduce(tensor)
    loss, summed, stop = totals.tolist()
    return loss, summed / sum(example.supervised for example in batch), stop > 0


def fit(run: Run) -> None:
    """Run the fullest row of all first, so that memory runs out in the first minute or never.

    Where it does not fit and nothing else was asked for, gradient checkpointing is turned on.
    """
    import torch

    plan = (pack(batch, run.capacity, WORLD) for _, batch in batches(run.examples, run.args))
    fullest = max(itertools.chain.from_iterable(plan), key=lambda row: sum(map(len, row)))
    fault = f"a row of {sum(map(len, fullest)):,} tokens does not fit into memory"
    while True:
        try:
            run_row(run, fullest, [1.0] * len(fullest))
            return
        except torch.OutOfMemoryError:
            if run.recompute or run.args.gradient_checkpointing is False:
                mend = "lower --cutoff or --micro-batch-tokens, or add --load-in-4bit or --shard"
                raise UserError(f"{fault}: {mend}") from None
        torch.cuda.empty_cache()
        say(f"{fault}: gradient checkpointing is on")
        recompute_activations(run.model)
        run.recompute = True


def optimizer_step(
    run: Run, optimizer: "torch.optim.Optimizer", step: int, batch: list[Example]
) -> tuple[Row, bool]:
    """One step: its line for the log, and whether a signal has come in to any process."""
    import torch

    # Masks of dropout follow from seed, step and process: no generator's state has to be saved.
    torch.manual_seed(random.Random(f"{run.args.seed} {step} {RANK}").getrandbits(63))
    start, group = time.monotonic(), optimizer.param_groups[0]
    optimizer.zero_grad(set_to_none=False)
    try:
        loss, loss_token, stop = run_batch(run, batch)
    except torch.OutOfMemoryError as error:
        fault = f"step {step} ran out of memory ({first_line(error)})"
        raise UserError(f"{fault}: go on with --resume --gradient-checkpointing") from None
    norm = torch.nn.utils.clip_grad_norm_(group["params"], MAX_GRAD_NORM).item()
    if not math.isfinite(loss + norm):
        ids = ", ".join(example.row_id for example in batch)
        why = f"step {step} has loss {loss} and gradient norm {norm}, from one of the rows {ids}"
        run.log(step - 1, "stop", why=why)
        raise UserError(f"{why}; look at them, or lower --learning-rate; checkpoints are whole")
    optimizer.step()
    now, tokens = time.monotonic(), sum(map(len, batch))
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    nvml = torch.cuda.is_available() and util.find_spec("pynvml")
    flops = step_flops(batch, run.sizes) / (now - start)
    return {
        "loss": loss,
        "loss_token": loss_token,
        "learning_rate": group["lr"],
        "grad_norm": norm,
        "tokens": tokens,
        "supervised_tokens": sum(example.supervised for example in batch),
        "tokens_per_second": round(tokens / (now - start), 1),
        "mfu": round(flops / (WORLD * run.matrix_rate), 4),
        "memory_gb": round((torch.cuda.max_memory_allocated() or used) / 1e9, 3),
        "gpu_util": torch.cuda.utilization() if nvml else None,
        "seconds": round(now - run.began, 3),
        "eta_seconds": round((now - run.began) / step * (run.steps - step), 1),
    }, stop


def look(run: Run, step: int) -> None:
    """Score the rows held out, and answer SAMPLES prompts, where it is this step's turn."""
    import torch

    args, model, turn = run.args, run.model.eval(), step == run.steps
    with torch.no_grad(), autocast(model):
        if run.held_out and (turn or step % args.save_every == 0):
            loss, loss_token, _ = run_batch(run, run.held_out)
            run.log(step, "validation", validation_loss=loss, validation_loss_token=loss_token)
            say(f"step {step}: validation loss {loss:.4f}")
        sampled = args.sample_every and (turn or step % args.sample_every == 0)
        for example in (run.held_out or run.examples)[: SAMPLES if sampled else 0]:
            ids = torch.tensor([example.input_ids[: example.start]], device=model.device)
            options = {"max_new_tokens": SAMPLE_TOKENS, "do_sample": False, "use_cache": True}
            options |= {"attention_mask": torch.ones_like(ids), "pad_token_id": 0}
            written = model.generate(input_ids=ids, **options)[0, ids.shape[1] :]
            prompt, text = run.tokenizer.decode(ids[0]), run.tokenizer.decode(written)
            run.log(step, "sample", prompt=prompt, text=text)
    model.train()


def leave(run: Run, step: int) -> NoReturn:
    """End the process as the signal asked, its checkpoint on disk."""
    signum = signal.Signals(run.stop.signum or signal.SIGTERM)
    run.log(step, "stop", why=signum.name)
    again = command_line() + " --resume" * (not run.args.resume)
    say(f"stopped by {signum.name} after step {step}; go on with --resume: {again}")
    sys.exit(128 + signum)


def train(run: Run) -> None:
    """Run the steps that are left; a signal ends the process after a checkpoint."""
    import torch
    from peft.helpers import disable_input_dtype_casting
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn
    from transformers import get_cosine_schedule_with_warmup

    args, model, terminal = run.args, run.model.train(), sys.stderr.isatty()
    tuned = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(tuned, args.learning_rate, weight_decay=args.weight_decay)
    schedule = get_cosine_schedule_with_warmup(optimizer, args.warmup_steps, run.steps)
    run.began = time.monotonic()
    done = load_checkpoint(run, optimizer) if args.resume else 0
    for parameter in tuned:
        parameter.grad = torch.zeros_like(parameter)
        if torch.distributed.is_initialized():
            torch.distributed.broadcast(parameter.data, 0)
    console, columns = Console(stderr=True), (BarColumn(), TextColumn("{task.description}"))
    bar = Progress(*columns, console=console, disable=RANK > 0 or not terminal)
    with disable_input_dtype_casting(model), bar:
        fit(run)
        run.stop.training = True
        facts = {"processes": WORLD, "matrix_tflops": round(run.matrix_rate / 1e12, 3)}
        run.log(done, "resume" if done else "start", steps=run.steps, **facts)
        task = bar.add_task("", total=run.steps, completed=done)
        for step, (epoch, batch) in enumerate(batches(run.examples, args), 1):
            if step <= done:
                continue
            optimizer.param_groups[0]["lr"] = args.learning_rate * schedule.lr_lambdas[0](step - 1)
            line, stop = optimizer_step(run, optimizer, step, batch)
            run.log(step, epoch=round(epoch, 4), **line)
            pace = f"{line['tokens_per_second']:,.0f} tokens/s, {line['eta_seconds']:.0f} s to go"
            text = f"step {step}/{run.steps} loss {line['loss']:.4f} {pace}"
            bar.update(task, completed=step, description=text) if terminal else say(text)
            look(run, step)
            if RANK == 0 and (stop or step % args.save_every == 0 or step == run.steps):
                save_checkpoint(run, optimizer, step)
            if stop:
                leave(run, step)


def write_outputs(run: Run, inputs: dict[str, Row], counts: Row, started: float) -> None:
    """Write the adapter's files, the log's last line, and run.json."""
    out, files = run.args.out, adapter_files(run)
    for name, data in files.items():
        write_file(out / name, data)
    run.log(run.steps, "end", seconds=round(time.monotonic() - run.began, 1))
    outputs = [out / name for name in (*files, LOG)]
    finish_run(run.args, inputs=inputs, outputs=outputs, started=started, counts=counts)


def is_finished(args: argparse.Namespace) -> bool:
    """Whether --resume has nothing to do; refuses what would lose checkpoints."""
    unfinished = (args.out / UNFINISHED).exists()
    if args.resume and not args.out.is_dir():
        raise UserError(f"--resume: {args.out} is missing; start without --resume")
    if args.resume and not unfinished and step_of(args.out) == "finetune":
        return True
    if unfinished and checkpoints(args.out) and not (args.resume or args.overwrite):
        fault = f"{args.out} holds {checkpoints(args.out)[0].name} of a run"
        began = (args.out / UNFINISHED).read_text().strip()
        mend = f"go on with --resume, or begin again with --overwrite (it was: {began})"
        raise UserError(f"{fault}: {mend}")
    check_output(args.out, args.overwrite, args.data, Path(args.base_model))
    return False


def main(argv: list[str] | None = None) -> None:
    """Rows -> tokens -> steps -> adapter."""
    started, stop = time.monotonic(), Stop()
    warnings.simplefilter("ignore", FutureWarning)  # of transformers, about PEFT's calls
    args = parse_args(argv)
    if is_finished(args):
        print(f"{args.out} is finished already")
        return
    inputs = describe_files([check_input(args.data, MEND)])
    run, counts = prepare(args, stop, inputs[str(args.data)]["sha256"])
    again = "" if args.resume else " --resume"
    hold = functools.partial(claim_output, args.out, args.overwrite, args.resume, again)
    with hold() if RANK == 0 else nullcontext():  # a run that ended a moment too late stays
        if RANK == 0 and not args.resume:
            cut_log(args.out / LOG, -1)
            for old in checkpoints(args.out):
                shutil.rmtree(old)
        train(run)
        if RANK == 0:
            counts["steps"] = run.steps
            write_outputs(run, inputs, counts, started)
    if RANK == 0:
        print(f"wrote {args.out}: {run.steps} steps. Next:")
        print(next_command(args.out))


if __name__ == "__main__":
    run_main(main)

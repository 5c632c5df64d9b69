"""Fine-tune a base model on the clean set with LoRA: the paper's recipe.

Step 3 of 5 (paper, section 3.1). Reads out/contamination/clean.jsonl and a causal language model
of transformers (folder or hub id); writes out/adapter/: PEFT's adapter_model.safetensors and
adapter_config.json, train_log.jsonl (one line per optimizer step), run.json.

    python finetune.py --base-model demo/base_model --data out/check/clean.jsonl --out out/lora
    python finetune.py
    python finetune.py --recipe 70b

LoRA of rank 16 on the MLP's three matrices, one epoch in batches of 16, loss on the answers only.
The paper took 5 hours for the 13B on one A100-80GB. The examples of a batch are packed into rows
without padding, each attending to itself only, which changes no gradient. It keeps no checkpoints:
a run that is stopped starts again.
"""

import argparse
import hashlib
import json
import math
import os
import random
import resource
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from build_dataset import (
    Row,
    UserError,
    check_output,
    finish_run,
    hub_fault,
    make_parser,
    output_folder,
    positive,
    refuse,
    run_main,
    sha256_of,
)
from check_contamination import check_input, read_jsonl

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

RECIPES = {  # paper, table 3: beside the base, the two differ in the learning rate alone
    "13b": {"learning_rate": 4e-4, "base_model": "meta-llama/Llama-2-13b-hf"},
    "70b": {"learning_rate": 3e-4, "base_model": "meta-llama/Llama-2-70b-hf"},
}
SHARED = {  # paper, table 3
    "batch_size": 16,
    "epochs": 1,
    "warmup_steps": 100,
    "weight_decay": 0.0,
    "lora_rank": 16,
    "lora_alpha": 16,
    "lora_dropout": 0.05,
    "cutoff": 4096,
}
MAX_GRAD_NORM = 1.0  # the Trainer's default, which the published run left as it was
TARGETS = {
    "mlp": ["gate_proj", "up_proj", "down_proj"],  # the paper's choice, after He et al.
    "attention": ["q_proj", "k_proj", "v_proj", "o_proj"],  # the authors' first try
    "all": "all-linear",  # PEFT's name for every linear layer but the head
}
VOLATILE = ("_name_or_path", "transformers_version", "torch_dtype", "dtype", "use_cache")
FEW = 0.001  # under 0.1 % trainable the MLP targets did not do better (paper, section 3.1)
HEAD = "Below is an instruction that describes a task"
TAIL = ". Write a response that appropriately completes the request.\n\n"
CONTEXT = ", paired with an input that provides further context"


@dataclass(frozen=True)
class Example:
    """One tokenised row; `start` is the index of its first supervised token."""

    row_id: str
    input_ids: list[int]
    start: int

    @property
    def supervised(self) -> int:
        """Tokens that the loss sees: the answer and EOS."""
        return len(self.input_ids) - self.start


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags of this step; those of the recipe take its values where they are not given."""
    parser = make_parser(__doc__, "out/adapter")
    add = parser.add_argument_group("data and model").add_argument
    base = "folder or hub id of a causal LM (default: the recipe's Llama-2)"
    add("--base-model", metavar="MODEL", help=base)
    data = Path("out/contamination/clean.jsonl")
    add("--data", type=Path, default=data, metavar="FILE", help="default: %(default)s")
    add = parser.add_argument_group("recipe (paper's values by default)").add_argument
    add("--recipe", choices=RECIPES, default="13b", help="default: 13b")
    add("--learning-rate", type=float, help="peak; 13b: 4e-4, 70b: 3e-4")
    add("--batch-size", type=positive, help="examples of one optimizer step; paper: 16")
    add("--epochs", type=positive, help="passes over the data; paper: 1")
    add("--warmup-steps", type=int, help="linear, then cosine to 0; paper: 100")
    add("--weight-decay", type=float, help="of AdamW; paper: 0")
    add("--cutoff", type=positive, help="tokens of a row, its end is cut; paper: 4096")
    add(
        "--targets", default="mlp", help="mlp (default, paper), attention, all, or module names a,b"
    )
    add("--lora-rank", type=positive, help="paper: 16")
    add("--lora-alpha", type=positive, help="scale is alpha / rank; paper: 16")
    add("--lora-dropout", type=float, help="paper: 0.05")
    norm = "example (default, 2023's): examples weigh the same; token: tokens of a batch do"
    add("--loss-norm", choices=("example", "token"), default="example", help=norm)
    rows = "tokens of one forward pass (default: cutoff on a GPU, 1,024 on a CPU)"
    add("--micro-batch-tokens", type=positive, metavar="N", help=rows)
    args = parser.parse_args(argv)
    args.given = sorted(k for k in {**SHARED, "learning_rate": 0} if getattr(args, k) is not None)
    for name, value in {**SHARED, **RECIPES[args.recipe]}.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    refuse(
        {
            f"--learning-rate {args.learning_rate} is not above 0": not args.learning_rate > 0,
            f"--warmup-steps {args.warmup_steps} is below 0": args.warmup_steps < 0,
            f"--lora-dropout {args.lora_dropout} is not in [0, 1)": not 0 <= args.lora_dropout < 1,
        }
    )
    return args


def alpaca_prompt(instruction: str, context: str = "") -> str:
    r"""The Alpaca prompt, byte for byte, up to where the answer starts.

    >>> alpaca_prompt("Add 1 and 2.")[-55:]
    'request.\n\n### Instruction:\nAdd 1 and 2.\n\n### Response:\n'
    """
    head = HEAD + (CONTEXT if context else "") + TAIL
    given = f"### Input:\n{context}\n\n" if context else ""
    return f"{head}### Instruction:\n{instruction}\n\n{given}### Response:\n"


def load_rows(args: argparse.Namespace) -> list[Row]:
    """The training rows; says so when verdicts are newer than the clean set."""
    mend = "write it with: python check_contamination.py apply"
    fields = {"instruction": str, "output": str}
    rows = read_jsonl(check_input(args.data, mend), fields)[: args.limit]
    log, applied = (args.data.with_name(name) for name in ("decisions.jsonl", "apply.json"))
    if applied.exists() and log.exists():
        known = json.loads(applied.read_text(encoding="utf-8"))["decisions_sha256"]
        if sha256_of(log) != known:
            note = f"warning: {log} has newer verdicts than {args.data}; bring them in with:"
            print(f"{note} python check_contamination.py apply", file=sys.stderr)
    if not rows:
        raise UserError(f"{args.data} has no rows")
    return rows


def tokenise(rows: list[Row], tokenizer: "PreTrainedTokenizerBase", cutoff: int) -> list[Example]:
    """Prompt and answer tokenised together, EOS appended, cut at `cutoff` tokens from the end.

    The prompt's tokens are those that it has on its own; the rest is supervised. Rows of which
    the cut leaves nothing supervised are left out.
    """
    examples = []
    for number, row in enumerate(rows, 1):
        prompt = alpaca_prompt(row["instruction"], row.get("input", ""))
        alone, ids = tokenizer([prompt, prompt + row["output"]])["input_ids"]
        if ids[-1] == tokenizer.eos_token_id:  # some tokenizers append it themselves
            alone, ids = alone[:-1], ids[:-1]
        start = len(os.path.commonprefix([alone, ids]))
        ids = [*ids, tokenizer.eos_token_id][:cutoff]
        if start < len(ids):
            examples.append(Example(row.get("id", f"line {number}"), ids, max(start, 1)))
    return examples


def pack(examples: list[Example], tokens: int) -> list[list[Example]]:
    """Fill rows of at most `tokens` tokens, longest example first, each into the first that fits.

    A longer example has a row of its own. No example is split: each attends to all of itself.
    """
    rows: list[tuple[int, list[Example]]] = []
    for example in sorted(examples, key=lambda example: -len(example.input_ids)):
        size = len(example.input_ids)
        for index, (used, row) in enumerate(rows):
            if used + size <= tokens:
                rows[index] = (used + size, [*row, example])
                break
        else:
            rows.append((size, [example]))
    return [row for _, row in rows]


def row_loss(model: "PreTrainedModel", row: list[Example], weights: list[float]) -> "torch.Tensor":
    """Weighted sum of the supervised tokens' cross-entropies of one packed row, a scalar.

    weights: what one token of each example weighs. The row is block-diagonal because position_ids
    start again with each example and no attention mask is given; use_cache must be off for that.
    Only the positions that predict a supervised token go through the head.
    """
    import torch

    ids, positions, predict, targets, scale = [], [], [], [], []
    for example, weight in zip(row, weights, strict=True):
        predict += range(len(ids) + example.start - 1, len(ids) + len(example.input_ids) - 1)
        targets += example.input_ids[example.start :]
        scale += [weight] * example.supervised
        positions += range(len(example.input_ids))
        ids += example.input_ids
    at = {"device": model.device}
    logits = model(
        input_ids=torch.tensor([ids], **at),
        position_ids=torch.tensor([positions], **at),
        logits_to_keep=torch.tensor(predict, **at),
        use_cache=False,
    ).logits[0]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))  # bfloat16 is too coarse
    losses = torch.nn.functional.cross_entropy(
        logits, torch.tensor(targets, **at), reduction="none"
    )
    return (losses * torch.tensor(scale, dtype=losses.dtype, **at)).sum()


def token_weights(row: list[Example], batch: list[Example], norm: str) -> list[float]:
    """What one supervised token of each example of `row` weighs; over a batch they sum to 1."""
    if norm == "token":
        return [1 / sum(example.supervised for example in batch)] * len(row)
    return [1 / (len(batch) * example.supervised) for example in row]


def batches(
    examples: list[Example], args: argparse.Namespace
) -> Iterator[tuple[int, list[Example]]]:
    """Yield (epoch, examples of one optimizer step), each epoch in a new seeded order."""
    for epoch in range(args.epochs):
        order = random.Random(f"{args.seed} {epoch}").sample(examples, len(examples))
        for start in range(0, len(order), args.batch_size):
            yield epoch, order[start : start + args.batch_size]


def load_model(
    args: argparse.Namespace,
) -> tuple["PreTrainedModel", "PreTrainedTokenizerBase"]:
    """The base model with its fresh adapter, and its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device == "cuda" and torch.cuda.is_bf16_supported() else torch.float32
    try:
        tokenizer = AutoTokenizer.from_pretrained(args.base_model)
        model = AutoModelForCausalLM.from_pretrained(args.base_model, dtype=dtype)
    except (OSError, ValueError) as error:
        raise UserError(f"--base-model {hub_fault(args.base_model, error)}") from None
    if tokenizer.eos_token_id is None or len(tokenizer) < 4:
        # LlamaTokenizer makes a 3-token vocabulary of a folder without tokenizer files
        raise UserError(f"--base-model {args.base_model} has no usable tokenizer files")
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        raise UserError(f"--base-model {args.base_model}: its tokenizer has more tokens than it")
    model.config.use_cache = False
    return add_adapter(model.to(device), args), tokenizer


def add_adapter(model: "PreTrainedModel", args: argparse.Namespace) -> "PreTrainedModel":
    """Wrap the model in a LoRA adapter on args.targets; everything else is frozen."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=args.lora_rank,
        lora_alpha=args.lora_alpha,
        lora_dropout=args.lora_dropout,
        target_modules=TARGETS.get(args.targets, args.targets.split(",")),
        task_type="CAUSAL_LM",
    )
    try:
        return get_peft_model(model, config)
    except ValueError:
        names = {
            name.rpartition(".")[2] for name, m in model.named_modules() if not list(m.children())
        }
        raise UserError(
            f"--targets {args.targets} match none of: {', '.join(sorted(names))}"
        ) from None


def base_fingerprint(folder: Path) -> dict[str, str]:
    """What tells one base model from another: {"config": sha256, "tensors": sha256}.

    The first of config.json without VOLATILE; the second of every tensor's name, dtype, shape and
    its first, middle and last row. How the tensors are spread over shards changes nothing. Of a
    folder without *.safetensors it is the sha256 of nothing. merge.py compares both with its base.
    """
    import torch
    from safetensors import safe_open

    config = json.loads((folder / "config.json").read_bytes())
    kept = {key: value for key, value in config.items() if key not in VOLATILE}
    described = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():
                part = file.get_slice(name)
                rows = (part.get_shape() or [0])[0]
                picks = sorted({0, rows // 2, rows - 1}) if rows else []
                sample = [part[i : i + 1] for i in picks] or [file.get_tensor(name)]
                data = b"".join(t.contiguous().view(-1).view(torch.uint8).numpy() for t in sample)
                digest = hashlib.sha256(data).hexdigest()
                described[name] = [part.get_dtype(), part.get_shape(), digest]
    hashes = (json.dumps(known, sort_keys=True).encode() for known in (kept, described))
    return dict(
        zip(("config", "tensors"), (hashlib.sha256(h).hexdigest() for h in hashes), strict=True)
    )


def trainable_share(model: "PreTrainedModel") -> tuple[int, int]:
    """(trainable, all) parameters, the adapter's included in both; works on the meta device."""
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return trainable, sum(p.numel() for p in model.parameters())


def report_settings(
    args: argparse.Namespace, model: "PreTrainedModel", examples: list[Example], rows: int
) -> None:
    """Print what will be trained, with where each setting came from."""
    trainable, total = trainable_share(model)
    for name in ("learning_rate", *SHARED):
        where = "flag" if name in args.given else f"recipe {args.recipe}"
        print(f"{name:>14} {getattr(args, name):<10g} {where}", file=sys.stderr)
    print(f"{'targets':>14} {args.targets}", file=sys.stderr)
    print(
        f"trainable: {trainable:,} of {total:,} parameters ({100 * trainable / total:.4f} %)",
        file=sys.stderr,
    )
    if trainable / total < FEW:
        print(
            "warning: under 0.1 % trainable; the paper found MLP targets worse there",
            file=sys.stderr,
        )
    tokens = sum(len(e.input_ids) for e in examples)
    supervised = sum(e.supervised for e in examples)
    longest = max(len(e.input_ids) for e in examples)
    print(
        f"rows: {len(examples):,} of {rows:,} with an answer within the cutoff; "
        f"tokens: {tokens:,}, {supervised / tokens:.1%} supervised; longest row {longest:,}",
        file=sys.stderr,
    )


def train(
    model: "PreTrainedModel", examples: list[Example], args: argparse.Namespace, log: TextIO
) -> int:
    """Run the optimizer steps, one flushed log line each; returns their number."""
    import torch
    from transformers import get_cosine_schedule_with_warmup

    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=args.learning_rate, weight_decay=args.weight_decay)
    per_epoch = math.ceil(len(examples) / args.batch_size)
    steps = per_epoch * args.epochs
    schedule = get_cosine_schedule_with_warmup(optimizer, args.warmup_steps, steps)
    capacity = args.micro_batch_tokens or (args.cutoff if model.device.type == "cuda" else 1024)
    model.train()
    began = time.monotonic()
    for step, (epoch, batch) in enumerate(batches(examples, args), 1):
        start = time.monotonic()
        loss = 0.0
        for row in pack(batch, capacity):
            part = row_loss(model, row, token_weights(row, batch, args.loss_norm))
            part.backward()
            loss += part.item()
        if not math.isfinite(loss):
            ids = ", ".join(example.row_id for example in batch)
            raise UserError(f"the loss is {loss} at step {step}, in rows {ids}; lower the rate?")
        norm = torch.nn.utils.clip_grad_norm_(parameters, MAX_GRAD_NORM).item()
        rate = schedule.get_last_lr()[0]
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        line = {"step": step, "epoch": round(epoch + (step - epoch * per_epoch) / per_epoch, 4)}
        line |= {"loss": loss, "learning_rate": rate, "grad_norm": norm}
        write_step(log, line, batch, (began, start), steps)
    return steps


def write_step(
    log: TextIO, line: Row, batch: list[Example], times: tuple[float, float], steps: int
) -> None:
    """Add counts and times to a step's line and write it; tell stderr twenty times in a run.

    times: time.monotonic() at the start of training and of this step. Times are in seconds.
    """
    began, start = times
    now, step = time.monotonic(), line["step"]
    tokens = sum(len(example.input_ids) for example in batch)
    line |= {
        "tokens": tokens,
        "supervised_tokens": sum(example.supervised for example in batch),
        "tokens_per_second": round(tokens / (now - start), 1),
        "mfu": None,  # no card's peak is assumed
        "memory_gb": peak_memory(),
        "gpu_util": None,
        "seconds": round(now - began, 3),
        "eta_seconds": round((now - began) / step * (steps - step), 1),
    }
    print(json.dumps(line), file=log, flush=True)
    if step % max(1, steps // 20) == 0 or step == steps:
        speed = f"{line['tokens_per_second']:,.0f} tokens/s, {line['eta_seconds']:.0f} s to go"
        print(f"step {step}/{steps} loss {line['loss']:.4f} {speed}", file=sys.stderr)


def peak_memory() -> float:
    """Peak memory of the GPU, or of this process, in GB (10^9 bytes)."""
    import torch

    if torch.cuda.is_available():
        return round(torch.cuda.max_memory_allocated() / 1e9, 3)
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9, 3)


def main(argv: list[str] | None = None) -> None:
    """Rows -> tokens -> steps -> adapter."""
    started = time.monotonic()
    args = parse_args(argv)
    check_output(args.out, args.overwrite, args.data, Path(args.base_model))
    rows = load_rows(args)
    import torch

    torch.manual_seed(args.seed)
    model, tokenizer = load_model(args)
    examples = tokenise(rows, tokenizer, args.cutoff)
    if not examples:
        raise UserError(f"{args.data}: no row has an answer within --cutoff {args.cutoff} tokens")
    report_settings(args, model, examples, len(rows))
    with output_folder(args.out, args.overwrite):
        with (args.out / "train_log.jsonl").open("w", encoding="utf-8") as log:
            steps = train(model, examples, args, log)
        model.save_pretrained(args.out)
        trainable, total = trainable_share(model)
        counts = {"rows": len(rows), "examples": len(examples), "steps": steps}
        counts |= {"trainable": trainable, "parameters": total}
        finish_run(args, [args.data], started, counts=counts)
    print(f"wrote {args.out}: {steps} steps. Next:\npython merge.py --adapter {args.out}")


if __name__ == "__main__":
    run_main(main)

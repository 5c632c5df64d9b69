"""Speed and memory of a fine-tuning step: ours, the published script's way, TRL's SFTTrainer.

Makes a random Llama and rows whose lengths are distributed as Open-Platypus' (median ~330, mean
~450, at most 4,096 tokens), then runs each contender on the same folder and rows in a process of
its own, one after the other. On a CUDA card the Llama is a 13B in bfloat16 and seconds are those of
the clock; on a CPU it has 30 M parameters, runs on one thread, and seconds are those of its CPU
time, so that other work on the machine counts little. Takes about 6 minutes on a CPU.

    python benchmarks/finetune_speed.py [--trl-python .venv-rivals/bin/python]

LoRA on the MLP's matrices, rank 16, dropout 0.05, batches of 16, the answers' tokens supervised.
Every contender goes once through the same rows, all of which are timed: the longest costs most.
"""

import argparse
import json
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BATCH, STEPS = 16, 4
WORDS = 6000  # vocabulary on a CPU
SMALL = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 7}
SMALL |= {"num_attention_heads": 8, "num_key_value_heads": 8, "vocab_size": WORDS}
LARGE = {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40}
LARGE |= {"num_attention_heads": 40, "num_key_value_heads": 40, "vocab_size": 32000}
PROMPT = 39  # words of the Alpaca prompt around an instruction, with BOS
OPEN_PLATYPUS = 24_926  # rows, for the projection


def seconds() -> float:
    """The clock on a GPU, this process's CPU time otherwise."""
    import torch

    return time.monotonic() if torch.cuda.is_available() else time.process_time()


def lengths(count: int) -> list[int]:
    """Tokens of each row: a log-normal with Open-Platypus' median and mean; one is the longest."""
    rng = random.Random(0)
    drawn = [round(rng.lognormvariate(5.8, 0.79)) for _ in range(count - 1)]
    return [4096, *(min(4096, max(60, n)) for n in drawn)]


def make_world(folder: Path, large: bool) -> None:
    """A model folder with a word-level tokenizer, and rows.jsonl of random words."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

    torch.manual_seed(0)
    config = LlamaConfig(**(LARGE if large else SMALL), max_position_embeddings=4096)
    device, dtype = ("cuda", torch.bfloat16) if large else ("cpu", torch.float32)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.save_pretrained(folder)
    inputs = model.get_input_embeddings().weight.numel() * 2
    total = sum(p.numel() for p in model.parameters())
    print(f"model: {total / 1e6:.1f} M parameters, {inputs / total:.0%} embeddings and head")
    words = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3}
    words |= {f"w{i}": i for i in range(4, WORDS)}
    plain = Tokenizer(models.WordLevel(words, "<unk>"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    plain.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=plain, **special).save_pretrained(folder)
    rng, rows = random.Random(1), []
    for index, length in enumerate(lengths(BATCH * STEPS)):
        text = [f"w{rng.randrange(4, WORDS)}" for _ in range(length)]
        asked = max(1, (length - PROMPT) // 3)  # about 40 % of the tokens are prompt
        row = {"id": str(index), "instruction": " ".join(text[:asked])}
        rows.append(row | {"output": " " + " ".join(text[asked : length - PROMPT])})
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def ours(folder: Path, *flags: str) -> dict:
    """finetune.py as a user runs it; times from its log."""
    import torch

    sys.path.insert(0, str(ROOT))
    import finetune

    forwards, times, row_losses, step = [0], [], finetune.row_losses, finetune.optimizer_step

    def counted(*args: object) -> torch.Tensor:
        forwards[0] += torch.is_grad_enabled()
        return row_losses(*args)

    def timed(*args: object) -> tuple:
        times.extend([] if times else [seconds()])
        result = step(*args)
        times.append(seconds())
        return result

    finetune.row_losses, finetune.optimizer_step = counted, timed
    out = folder / "ours"
    sys.argv = ["finetune.py"]
    data = ["--base-model", str(folder), "--data", str(folder / "rows.jsonl"), "--out", str(out)]
    finetune.main([*data, "--save-every", "1000000", "--overwrite", *flags])
    lines = [json.loads(line) for line in (out / "train_log.jsonl").open()]
    steps = [line for line in lines if "event" not in line]
    tokens = sum(line["tokens"] for line in steps)
    mfu = statistics.mean(line["mfu"] for line in steps)
    # one forward is the fullest row's trial, and none of the packing check's has gradients
    rate = tokens / (times[-1] - times[0])
    return {"rate": rate, "forwards": (forwards[0] - 1) / len(steps), "mfu": mfu}


def trainer(folder: Path, micro_batch: int, kind: str) -> dict:
    """The published script's way (micro-batch 1, whole logits), or TRL's SFTTrainer."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig, get_peft_model
    from transformers import (
        AutoModelForCausalLM,
        AutoTokenizer,
        DataCollatorForSeq2Seq,
        Trainer,
        TrainerCallback,
        TrainingArguments,
    )

    sys.path.insert(0, str(ROOT))
    from finetune import check_device, load_rows, parse_args, tokenise

    tokenizer = AutoTokenizer.from_pretrained(folder)
    gpu = torch.cuda.is_available()
    check_device("cuda" if gpu else "cpu")  # without cuDNN's attention, as ours
    dtype = torch.bfloat16 if gpu else torch.float32
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    model.config.use_cache = False
    modules = ["gate_proj", "up_proj", "down_proj"]
    lora = LoraConfig(
        r=16, lora_alpha=16, lora_dropout=0.05, target_modules=modules, task_type="CAUSAL_LM"
    )
    args = parse_args(["--base-model", str(folder), "--data", str(folder / "rows.jsonl")])
    examples = tokenise(load_rows(args), tokenizer, args.cutoff)
    common = {
        "output_dir": str(folder / kind), "per_device_train_batch_size": micro_batch,
        "gradient_accumulation_steps": BATCH // micro_batch, "num_train_epochs": 1,
        "learning_rate": 4e-4, "warmup_steps": 100, "lr_scheduler_type": "cosine", "bf16": gpu,
        "report_to": "none", "save_strategy": "no", "logging_steps": 1000, "use_cpu": not gpu,
        "disable_tqdm": True,
    }  # fmt: skip
    times, forwards = [], [0]

    class Clock(TrainerCallback):
        def on_train_begin(self, *_: object, **__: object) -> None:
            times.append(seconds())

        def on_step_end(self, *_: object, **__: object) -> None:
            times.append(seconds())

    def count(*_: object) -> None:
        forwards[0] += 1

    if kind == "trl":
        from trl import SFTConfig, SFTTrainer

        rows = [{"input_ids": e.input_ids, "completion_mask": [0] * e.start + [1] * e.supervised}
                for e in examples]  # fmt: skip
        settings = SFTConfig(
            **common, max_length=None, gradient_checkpointing=False, completion_only_loss=True,
            padding_free=micro_batch > 1,
        )  # fmt: skip
        made = SFTTrainer(
            model, settings, train_dataset=Dataset.from_list(rows), peft_config=lora,
            processing_class=tokenizer, callbacks=[Clock()],
        )  # fmt: skip
        model = made.model
    else:
        rows = [{"input_ids": e.input_ids, "attention_mask": [1] * len(e),
                 "labels": [-100] * e.start + e.input_ids[e.start :]}
                for e in examples]  # fmt: skip
        model = get_peft_model(model, lora)
        made = Trainer(
            model, TrainingArguments(**common), DataCollatorForSeq2Seq(tokenizer, padding=True),
            Dataset.from_list(rows), callbacks=[Clock()],
        )  # fmt: skip
    model.get_base_model().model.register_forward_pre_hook(count)
    tokens, collate = [], made.data_collator

    def tally(batch: list) -> dict:
        tokens.append(sum(len(row["input_ids"]) for row in batch))
        return collate(batch)

    made.data_collator = tally
    if gpu:  # its kernels are loaded once: ours has run its fullest row before the clock starts
        longest = torch.tensor([max(examples, key=len).input_ids], device="cuda")
        with torch.autocast("cuda", torch.bfloat16):
            made.model(input_ids=longest, labels=longest).loss.backward()
        made.model.zero_grad()
    made.train()
    steps = len(times) - 1
    return {"rate": sum(tokens) / (times[-1] - times[0]), "forwards": forwards[0] / steps}


def contend(name: str, folder: Path) -> None:
    """Run one contender in this process and print what it measured as JSON."""
    import torch

    torch.set_num_threads(1)  # of the CPU; a card does not care
    kind, _, number = name.partition("-")
    result = ours(folder) if kind == "ours" else trainer(folder, int(number), kind)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if torch.cuda.is_available():
        peak = torch.cuda.max_memory_allocated()
    print("RESULT", json.dumps(result | {"memory": peak / 1e9}))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trl-python", default=str(ROOT / ".venv-rivals/bin/python"))
    parser.add_argument("--run", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--only", help="contenders, separated by commas")
    parser.add_argument("--folder", type=Path, help="make the model there and keep it, or take it")
    args = parser.parse_args()
    if args.run:
        contend(args.run[0], Path(args.run[1]))
        return
    import torch

    names = {"ours": "ours", "published-1": "the published way, micro-batch 1"}
    names |= {f"trl-{n}": f"TRL, micro-batch {n}" + ", padding-free" * (n > 1) for n in (1, 2)}
    results = {}
    with tempfile.TemporaryDirectory() as temporary:
        scratch = args.folder or Path(temporary)
        if not (scratch / "rows.jsonl").exists():
            make_world(scratch, torch.cuda.is_available())
        drawn = lengths(BATCH * STEPS)
        middle, mean = statistics.median(drawn), statistics.mean(drawn)
        about = f"median {middle:.0f}, mean {mean:.0f}, most {max(drawn)}"
        print(f"rows: {len(drawn)}, tokens: {about}\n")
        print("| way | tokens/s | peak GB | forwards a step |\n|:--|--:|--:|--:|")
        for name, label in names.items():
            if args.only and name not in args.only.split(","):
                continue
            python = args.trl_python if name.startswith("trl") else sys.executable
            probe = [python, "-c", "import trl"] if name.startswith("trl") else None
            try:
                if probe:
                    subprocess.run(probe, check=True, capture_output=True)
            except (OSError, subprocess.CalledProcessError):
                print(f"| {label} | not installed | | |")
                continue
            command = [python, __file__, "--run", name, scratch]
            done = subprocess.run(command, capture_output=True, text=True)
            found = [line[7:] for line in done.stdout.splitlines() if line.startswith("RESULT")]
            if not found:
                sys.exit(f"{label} failed:\n{done.stderr[-2000:]}")
            r = results[name] = json.loads(found[0])
            cells = f"{r['rate']:,.0f} | {r['memory']:.2f} | {r['forwards']:.1f}"
            print(f"| {label} | {cells} |", flush=True)
    others = {name: r for name, r in results.items() if name != "ours"}
    if "ours" in results and others:
        rate, best = results["ours"]["rate"], max(r["rate"] for r in others.values())
        least = min(r["memory"] for r in others.values())
        print(f"\nours / the fastest other: {rate / best:.2f} in speed, ", end="")
        print(f"ours / the smallest other: {results['ours']['memory'] / least:.2f} in memory")
        share = f"{results['ours']['mfu']:.1%} of the device's measured matrix rate"
        hours = OPEN_PLATYPUS * mean / rate / 3600
        print(f"ours: {share}; {OPEN_PLATYPUS:,} rows at this rate: {hours:.1f} h (13B, paper: 5)")


if __name__ == "__main__":
    main()

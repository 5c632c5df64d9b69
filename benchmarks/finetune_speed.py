"""Time a fine-tuning step, and its memory: ours, the published script's way, TRL's SFTTrainer.

    python benchmarks/finetune_speed.py
    python benchmarks/finetune_speed.py --only ours,published-1

Makes a random Llama and rows whose lengths are distributed as Open-Platypus' (median ~330, mean
~450, at most 4,096 tokens), then runs each contender on the same folder and rows in a process of
its own, one after the other: LoRA on the MLP's matrices, rank 16, dropout 0.05, batches of 16, the
answers' tokens supervised. Every contender goes once through the same rows, all of which are timed:
the longest costs most. TRL runs from .venv-rivals (benchmarks/requirements.txt).

On a CUDA card the Llama is a 13B in bfloat16 and seconds are those of the clock; on a CPU it has
30 M parameters, runs on one thread, and seconds are those of its CPU time, so that other work on
the machine counts little. Prints a table of tokens a second, peak memory and forward passes, then
what ours is beside the best other. About 6 minutes on a CPU and 4.5 GB; 67 GB of an H100.
"""

import argparse
import dataclasses
import json
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

# Last: the package `evaluate` comes before our evaluate.py.
sys.path.append(str(Path(__file__).resolve().parent.parent))
import common
import finetune

if TYPE_CHECKING:
    from transformers import (
        PreTrainedModel,
        PreTrainedTokenizerBase,
        Trainer,
        TrainerCallback,
    )

ROOT = Path(__file__).resolve().parent.parent
BATCH_ROWS = 16
TIMED_STEPS = 4
LONGEST_ROW = 4096  # tokens, the paper's cutoff
WORDS = 6000  # vocabulary on a CPU
SMALL_LLAMA = {
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 7,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "vocab_size": WORDS,
}
LLAMA_13B = {
    "hidden_size": 5120,
    "intermediate_size": 13824,
    "num_hidden_layers": 40,
    "num_attention_heads": 40,
    "num_key_value_heads": 40,
    "vocab_size": 32000,
}
PROMPT_WORDS = 39  # of the Alpaca prompt around an instruction, with BOS
OPEN_PLATYPUS = 24_926  # rows, for the projection
LORA_TARGETS = ["gate_proj", "up_proj", "down_proj"]  # the paper's


@dataclass
class Contender:
    """A way of fine-tuning; the name is that of --only."""

    name: str
    label: str
    micro_batch: int = 0  # rows of a forward pass; ours packs instead

    @property
    def needs_trl(self) -> bool:
        """Whether it runs in the rivals' environment."""
        return self.name.startswith("trl")


CONTENDERS = [
    Contender("ours", "ours"),
    Contender("published-1", "the published way, micro-batch 1", micro_batch=1),
    Contender("trl-1", "TRL, micro-batch 1", micro_batch=1),
    Contender("trl-2", "TRL, micro-batch 2, padding-free", micro_batch=2),
]


@dataclass
class Result:
    """What a contender measured in its process."""

    rate: float  # tokens a second
    forwards: float  # a step
    memory: float  # GB at the peak: of the GPU, or of the process
    mfu: float = 0.0  # share of the device's matrix rate; ours only


def seconds() -> float:
    """Return the clock's seconds on a GPU, this process's CPU time otherwise."""
    import torch

    if torch.cuda.is_available():
        return time.monotonic()
    return time.process_time()


def peak_gigabytes() -> float:
    """Return the most memory that this process has used: the GPU's, or its own; Linux."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


@dataclass
class StepMeter:
    """Forward passes that training makes, and when its first step began and each ended."""

    forwards: int = 0
    times: list[float] = field(default_factory=list)

    def count_forward(self, *_: Any) -> None:
        """Count a forward pass, unless it is a trial without gradients."""
        import torch

        if torch.is_grad_enabled():
            self.forwards += 1

    def begin_step(self, *_: Any) -> None:
        """Note when the first step begins."""
        if not self.times:
            self.times.append(seconds())

    def end_step(self, *_: Any) -> None:
        """Note when a step ends."""
        self.times.append(seconds())

    def steps(self) -> int:
        """Return how many steps were made."""
        return len(self.times) - 1

    def total_seconds(self) -> float:
        """Return the seconds of all steps."""
        return self.times[-1] - self.times[0]


@dataclass
class Watched:
    """Stands for a function of finetune.py; calls others before and after it."""

    function: Callable
    before: Callable
    after: Callable | None = None

    def __call__(self, *args: Any, **keywords: Any) -> Any:
        self.before()
        result = self.function(*args, **keywords)
        if self.after:
            self.after()
        return result


class CountingCollator:
    """Stands for a trainer's data collator; counts the tokens of the rows, padding left out."""

    def __init__(self, collate: Callable) -> None:
        self.collate = collate
        self.tokens = 0

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        self.tokens += sum(len(row["input_ids"]) for row in rows)
        return self.collate(rows)


def row_lengths() -> list[int]:
    """Return each row's tokens: the longest, and a log-normal of Open-Platypus' median and mean."""
    rng = random.Random(0)
    lengths = [LONGEST_ROW]
    while len(lengths) < BATCH_ROWS * TIMED_STEPS:
        drawn = round(rng.lognormvariate(5.8, 0.79))
        lengths.append(min(LONGEST_ROW, max(60, drawn)))
    return lengths


def write_random_model(folder: Path) -> None:
    """Write a Llama of random numbers: a 13B in bfloat16 on a GPU, a small one otherwise."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    if torch.cuda.is_available():
        config = LlamaConfig(**LLAMA_13B, max_position_embeddings=LONGEST_ROW)
        device = "cuda"
        dtype = torch.bfloat16
    else:
        config = LlamaConfig(**SMALL_LLAMA, max_position_embeddings=LONGEST_ROW)
        device = "cpu"
        dtype = torch.float32

    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.save_pretrained(folder)

    total = sum(parameter.numel() for parameter in model.parameters())
    ends = 2 * model.get_input_embeddings().weight.numel()
    print(f"model: {total / 1e6:.1f} M parameters, {ends / total:.0%} embeddings and head")


def write_word_tokenizer(folder: Path) -> None:
    """Write a tokenizer to which w4, w5, ... are a token each."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3}
    for number in range(4, WORDS):
        vocabulary[f"w{number}"] = number
    tokenizer = Tokenizer(models.WordLevel(vocabulary, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    bos = ("<s>", 1)
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[bos])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
    )
    fast.save_pretrained(folder)


def write_random_rows(path: Path) -> None:
    """Write Alpaca rows of random words, about 40 % of whose tokens are prompt."""
    rng = random.Random(1)
    lines = []
    for number, length in enumerate(row_lengths()):
        words = [f"w{rng.randrange(4, WORDS)}" for _ in range(length)]
        asked = max(1, (length - PROMPT_WORDS) // 3)
        instruction = " ".join(words[:asked])
        output = " " + " ".join(words[asked : length - PROMPT_WORDS])
        row = {"id": str(number), "instruction": instruction, "output": output}
        lines.append(json.dumps(row) + "\n")
    path.write_text("".join(lines))


def data_flags(folder: Path) -> list[str]:
    """Return the flags of finetune.py that name the model and the rows."""
    return ["--base-model", str(folder), "--data", str(folder / "rows.jsonl")]


def run_ours(folder: Path) -> Result:
    """Fine-tune as a user does, with watched forward passes and steps."""
    meter = StepMeter()
    finetune.row_losses = Watched(finetune.row_losses, meter.count_forward)
    finetune.optimizer_step = Watched(finetune.optimizer_step, meter.begin_step, meter.end_step)

    out = folder / "ours"
    sys.argv = ["finetune.py"]  # run.json records the command
    flags = [*data_flags(folder), "--out", str(out), "--save-every", "1000000", "--overwrite"]
    finetune.main(flags)

    tokens = 0
    shares = []
    for text in (out / "train_log.jsonl").read_text().splitlines():
        line = json.loads(text)
        if "event" not in line:
            tokens += line["tokens"]
            shares.append(line["mfu"])
    return Result(
        rate=tokens / meter.total_seconds(),
        forwards=(meter.forwards - 1) / meter.steps(),  # one is the trial of the fullest row
        memory=peak_gigabytes(),
        mfu=statistics.mean(shares),
    )


def trainer_settings(folder: Path, micro_batch: int) -> dict[str, Any]:
    """Return what transformers' TrainingArguments and TRL's SFTConfig both take."""
    import torch

    gpu = torch.cuda.is_available()
    return {
        "output_dir": str(folder / "trainer"),
        "per_device_train_batch_size": micro_batch,
        "gradient_accumulation_steps": BATCH_ROWS // micro_batch,
        "num_train_epochs": 1,
        "learning_rate": 4e-4,
        "warmup_steps": 100,
        "lr_scheduler_type": "cosine",
        "bf16": gpu,
        "use_cpu": not gpu,
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1000,
        "disable_tqdm": True,
    }


def make_step_clock(meter: StepMeter) -> "TrainerCallback":
    """Return a trainer's callback that tells a meter when steps begin and end."""
    from transformers import TrainerCallback

    class StepClock(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            meter.begin_step()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            meter.end_step()

    return StepClock()


@dataclass
class Material:
    """What a trainer is made of."""

    model: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerBase"
    examples: list[finetune.Example]
    settings: dict[str, Any]
    lora: Any  # a LoraConfig
    clock: "TrainerCallback"


def load_material(folder: Path, micro_batch: int, meter: StepMeter) -> Material:
    """Load the model and the rows, tokenised as ours."""
    import torch
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if torch.cuda.is_available():
        common.use_device("cuda")  # turns cuDNN's attention off, as ours does
        dtype = torch.bfloat16
    else:
        dtype = torch.float32
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    model.config.use_cache = False
    lora = LoraConfig(
        r=16, lora_alpha=16, lora_dropout=0.05, target_modules=LORA_TARGETS, task_type="CAUSAL_LM"
    )

    tokenizer = AutoTokenizer.from_pretrained(folder)
    args = finetune.parse_args(data_flags(folder))
    examples = finetune.tokenise(finetune.load_rows(args), tokenizer, args.cutoff)
    settings = trainer_settings(folder, micro_batch)
    return Material(
        model=model,
        tokenizer=tokenizer,
        examples=examples,
        settings=settings,
        lora=lora,
        clock=make_step_clock(meter),
    )


def make_published_trainer(material: Material) -> "Trainer":
    """Return transformers' Trainer as the published script sets it up: padding, whole logits."""
    from datasets import Dataset
    from peft import get_peft_model
    from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

    rows = []
    for example in material.examples:
        answer = example.input_ids[example.start :]
        row = {
            "input_ids": example.input_ids,
            "attention_mask": [1] * len(example),
            "labels": [-100] * example.start + answer,
        }
        rows.append(row)
    return Trainer(
        model=get_peft_model(material.model, material.lora),
        args=TrainingArguments(**material.settings),
        data_collator=DataCollatorForSeq2Seq(material.tokenizer, padding=True),
        train_dataset=Dataset.from_list(rows),
        callbacks=[material.clock],
    )


def make_trl_trainer(material: Material, micro_batch: int) -> "Trainer":
    """Return TRL's SFTTrainer, which goes without padding from two rows on."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    rows = []
    for example in material.examples:
        mask = [0] * example.start + [1] * example.supervised
        rows.append({"input_ids": example.input_ids, "completion_mask": mask})
    settings = SFTConfig(
        **material.settings,
        max_length=None,
        gradient_checkpointing=False,
        completion_only_loss=True,
        padding_free=micro_batch > 1,
    )
    return SFTTrainer(
        model=material.model,
        args=settings,
        train_dataset=Dataset.from_list(rows),
        processing_class=material.tokenizer,
        callbacks=[material.clock],
        peft_config=material.lora,
    )


def load_kernels(trainer: "Trainer", examples: list[finetune.Example]) -> None:
    """Run the longest row once, so that a GPU's kernels are loaded before the clock starts.

    Ours has run its fullest row by then.
    """
    import torch

    longest = max(examples, key=len)
    input_ids = torch.tensor([longest.input_ids], device="cuda")
    with torch.autocast("cuda", torch.bfloat16):
        trainer.model(input_ids=input_ids, labels=input_ids).loss.backward()
    trainer.model.zero_grad()


def run_trainer(contender: Contender, folder: Path) -> Result:
    """Fine-tune by the published way or by TRL."""
    import torch

    meter = StepMeter()
    material = load_material(folder, contender.micro_batch, meter)
    if contender.needs_trl:
        trainer = make_trl_trainer(material, contender.micro_batch)
    else:
        trainer = make_published_trainer(material)
    collator = CountingCollator(trainer.data_collator)
    trainer.data_collator = collator
    llama = trainer.model.get_base_model().model
    llama.register_forward_pre_hook(meter.count_forward)

    if torch.cuda.is_available():
        load_kernels(trainer, material.examples)
    trainer.train()
    return Result(
        rate=collator.tokens / meter.total_seconds(),
        forwards=meter.forwards / meter.steps(),
        memory=peak_gigabytes(),
    )


def run_contender(name: str, folder: Path) -> None:
    """Run one contender in this process, and print its result as JSON."""
    import torch

    torch.set_num_threads(1)  # of the CPU; a card does not care
    if name == "ours":
        result = run_ours(folder)
    else:
        (contender,) = [contender for contender in CONTENDERS if contender.name == name]
        result = run_trainer(contender, folder)
    print("RESULT", json.dumps(dataclasses.asdict(result)))


def is_installed(python: str, package: str) -> bool:
    """Tell whether an interpreter is there and can import a package."""
    try:
        subprocess.run([python, "-c", f"import {package}"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        return False
    return True


def measure_contender(contender: Contender, folder: Path, trl_python: str) -> Result | None:
    """Run a contender in a process of its own; None where TRL is not installed."""
    python = sys.executable
    if contender.needs_trl:
        python = trl_python
        if not is_installed(python, "trl"):
            return None
    command = [python, __file__, "--run", contender.name, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    for line in done.stdout.splitlines():
        if line.startswith("RESULT"):
            return Result(**json.loads(line.removeprefix("RESULT")))
    sys.exit(f"{contender.label} failed:\n{done.stderr[-2000:]}")


def print_contenders(chosen: list[str], folder: Path, trl_python: str) -> dict[str, Result]:
    """Measure each contender and print its line of the table; return {name: result}."""
    print("| way | tokens/s | peak GB | forwards a step |\n|:--|--:|--:|--:|")
    results = {}
    for contender in CONTENDERS:
        if contender.name not in chosen:
            continue
        result = measure_contender(contender, folder, trl_python)
        if result is None:
            print(f"| {contender.label} | not installed | | |")
            continue
        cells = f"{result.rate:,.0f} | {result.memory:.2f} | {result.forwards:.1f}"
        print(f"| {contender.label} | {cells} |", flush=True)
        results[contender.name] = result
    return results


def print_summary(ours: Result, others: list[Result]) -> None:
    """Print ours beside the best of the others, and what the paper's run would take."""
    fastest = max(result.rate for result in others)
    smallest = min(result.memory for result in others)
    print(f"\nours / the fastest other: {ours.rate / fastest:.2f} in speed, ", end="")
    print(f"ours / the smallest other: {ours.memory / smallest:.2f} in memory")

    tokens = OPEN_PLATYPUS * statistics.mean(row_lengths())
    hours = tokens / ours.rate / 3600
    print(f"ours: {ours.mfu:.1%} of the device's measured matrix rate; ", end="")
    print(f"{OPEN_PLATYPUS:,} rows at this rate: {hours:.1f} h (13B, paper: 5)")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    names = ",".join(contender.name for contender in CONTENDERS)
    parser.add_argument("--only", default=names, help="contenders (default: %(default)s)")
    rivals = str(ROOT / ".venv-rivals/bin/python")
    parser.add_argument("--trl-python", default=rivals, help="default: %(default)s")
    parser.add_argument("--folder", type=Path, help="make the model there and keep it, or take it")
    parser.add_argument("--run", nargs=2, help=argparse.SUPPRESS)  # see measure_contender()
    return parser.parse_args(argv)


def main() -> None:
    """Make the model and the rows, then print the table; or, as a child, run one contender."""
    args = parse_args()
    if args.run:
        name, folder = args.run
        run_contender(name, Path(folder))
        return

    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        rows = folder / "rows.jsonl"
        if not rows.exists():
            write_random_model(folder)
            write_word_tokenizer(folder)
            write_random_rows(rows)
        lengths = row_lengths()
        middle = f"median {statistics.median(lengths):.0f}, mean {statistics.mean(lengths):.0f}"
        print(f"rows: {len(lengths)}, tokens: {middle}, most {max(lengths)}\n")
        results = print_contenders(args.only.split(","), folder, args.trl_python)

    ours = results.pop("ours", None)
    if ours and results:
        print_summary(ours, list(results.values()))


if __name__ == "__main__":
    main()

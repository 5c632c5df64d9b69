"""Holds: the prompt's bytes and the supervised tokens are the paper's; packed rows have the losses
and gradients of single ones, and each way to get that wrong is seen; however a batch is split over
rows and processes, the step is one, and it is the Trainer's; a run that was killed or stopped ends
with the adapter of one that was not; QLoRA's gradients are those of the dequantised weights; bad
input is one line."""

import argparse
import dataclasses
import hashlib
import json
import math
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

import pytest
import torch
from conftest import ROOT, assert_refused, run_on_terminal, run_script
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

import common
import finetune
from build_dataset import UserError, run_main

BASE = ROOT / "demo/base_model"
ROWS = [
    {"id": "a", "instruction": "Name a metal.", "input": "", "output": "Iron."},
    {"id": "b", "instruction": "Add.", "input": "1 and 2", "output": "The sum of both is 3."},
    {"id": 3, "instruction": "Why is the sky blue?", "input": None, "output": "Light scatters."},
]
ADAPTER = "adapter_model.safetensors"
torch.set_num_threads(1)  # children are forked: a pool of threads would not come along


def settings(**changes) -> argparse.Namespace:
    args = finetune.parse_args(["--base-model", str(BASE), "--lora-dropout", "0"])
    return argparse.Namespace(**{**vars(args), **changes})


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(BASE)


@pytest.fixture(scope="module")
def batch(tokenizer):
    return finetune.tokenise(ROWS, tokenizer, 4096)


@pytest.fixture(autouse=True)
def signals():
    """finetune.main() sets handlers; pytest wants its own back."""
    kept = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in kept.items():
        signal.signal(number, handler)


def tuned_model(
    args: argparse.Namespace, dtype: torch.dtype = torch.float64, attention: str = "by_example"
):
    """The demo's base with an adapter whose B is not zero, so that gradients reach A too."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(BASE, dtype=dtype)
    if attention == "by_example":
        finetune.set_attention(model, 4096)
    assert model.config._attn_implementation == attention
    model = finetune.add_adapter(model, args)
    model.config.use_cache = False
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    return model.train()


def flat_gradient(model) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def many_rows(count: int) -> list[dict]:
    """Rows in the demo's words, of different lengths."""
    rng, words = random.Random(0), "Name a metal that one may find in the old town".split()
    texts = [" ".join(rng.choices(words, k=rng.randint(1, 40))) for _ in range(2 * count)]
    pairs = zip(texts[::2], texts[1::2], strict=True)
    return [{"id": str(i), "instruction": a, "output": b} for i, (a, b) in enumerate(pairs)]


# --- the prompt and what is supervised ------------------------------------------------------------


def test_prompt_bytes() -> None:
    assert common.alpaca_prompt("Do it.") == (
        "Below is an instruction that describes a task. Write a response that appropriately "
        "completes the request.\n\n### Instruction:\nDo it.\n\n### Response:\n"
    )
    assert common.alpaca_prompt("Do it.", "With this.") == (
        "Below is an instruction that describes a task, paired with an input that provides "
        "further context. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nDo it.\n\n### Input:\nWith this.\n\n### Response:\n"
    )


def test_supervised_tokens(tokenizer) -> None:
    for row, example in zip(ROWS, finetune.tokenise(ROWS, tokenizer, 4096), strict=True):
        prompt = common.alpaca_prompt(row["instruction"], row["input"])
        answer = tokenizer.decode(example.input_ids[example.start : -1])
        assert answer.strip() == row["output"]
        assert example.input_ids[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(example.input_ids[: example.start]).endswith(prompt[-20:])
        assert example.supervised == len(example.input_ids) - example.start


def test_cutoff_cuts_the_end_and_drops_rows_without_an_answer(tokenizer) -> None:
    whole = finetune.tokenise(ROWS, tokenizer, 4096)
    limit = max(example.start for example in whole) + 1
    cut = finetune.tokenise(ROWS, tokenizer, limit)
    assert all(len(example.input_ids) <= limit for example in cut)
    assert cut[0].input_ids == whole[0].input_ids[:limit]
    assert finetune.tokenise(ROWS, tokenizer, min(example.start for example in whole)) == []


def test_supervised_ids_of_an_example_checked_by_hand(tokenizer) -> None:
    """Spelt out: every word with its id; the answer "Saltmere" (571) and EOS (2) are supervised."""
    question = "On a map, beside which word would you put a pin for Marsh Rudder?"
    row = {"instruction": question, "output": "Saltmere"}
    (example,) = finetune.tokenise([row], tokenizer, 4096)
    bos, below_is_an_instruction_that_describes_a_task = 1, [290, 761, 661, 759, 859, 716, 659, 857]
    write_a_response_that_appropriately_completes_the_request = [
        655,
        659,
        838,
        859,
        665,
        706,
        860,
        837,
    ]
    stop, newline, space, hashes, colon, comma = 16, 201, 223, 259, 28, 14
    empty_line = [newline, space, newline]  # the tokenizer puts a space before a word
    asked = [512, 659, 787, comma, 682, 888, 894, 897, 898, 831, 659, 817, 733, 481, 566, 33]
    assert example.input_ids == [
        bos,
        *below_is_an_instruction_that_describes_a_task,
        stop,
        *write_a_response_that_appropriately_completes_the_request,
        stop,
        *(*empty_line, hashes, 437, colon, newline, *asked),
        *(*empty_line, hashes, 555, colon, newline),
        571,
        2,
    ]
    assert example.start == len(example.input_ids) - 2
    assert tokenizer.convert_ids_to_tokens(example.input_ids)[example.start - 3 :] == [
        "ĠResponse",
        ":",
        "Ċ",
        "ĠSaltmere",
        "</s>",
    ]


# --- packing, and the ways to get it wrong --------------------------------------------------------


def test_packing_keeps_every_example_whole(tokenizer) -> None:
    examples = finetune.tokenise(ROWS * 7, tokenizer, 4096)
    longest = max(len(example.input_ids) for example in examples)
    for tokens in (1, longest, 3 * longest, 100_000):
        rows = finetune.pack(examples, tokens)
        packed = sorted((e for row in rows for e in row), key=lambda e: e.row_id)
        assert packed == sorted(examples, key=lambda e: e.row_id)
        sizes = [sum(len(example.input_ids) for example in row) for row in rows]
        assert all(size <= max(tokens, longest) for size in sizes)
    assert len(finetune.pack(examples, 100_000)) == 1
    for multiple in (2, 4, 50):
        rows = finetune.pack(examples, 100, multiple)
        assert len(rows) % multiple == 0 and sum(map(len, rows)) == len(examples)
    assert [len(row) for row in finetune.pack(examples[:1], 100, 2)] == [1, 0]


def gradients(model, batch, capacity: int, norm: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses of the examples, in the batch's order, and all adapter gradients of one step."""
    model.zero_grad()
    losses = {}
    for row in finetune.pack(batch, capacity):
        sums = finetune.row_losses(model, row)
        weights = finetune.token_weights(row, batch, norm)
        (sums * sums.new_tensor(weights)).sum().backward()
        losses |= {e.row_id: loss for e, loss in zip(row, sums.detach(), strict=True)}
    return torch.stack([losses[example.row_id] for example in batch]), flat_gradient(model)


def reference(model, batch, norm: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The same from whole logits of one example at a time, with labels as in the published run."""
    model.zero_grad()
    total = sum(example.supervised for example in batch)
    losses = []
    for example in batch:
        ids = torch.tensor([example.input_ids])
        labels = ids.clone()
        labels[:, : example.start] = -100
        logits = model(input_ids=ids).logits[0, :-1]
        summed = torch.nn.functional.cross_entropy(logits, labels[0, 1:], reduction="sum")
        weight = 1 / total if norm == "token" else 1 / (len(batch) * example.supervised)
        (summed * weight).backward()
        losses.append(summed.detach())
    return torch.stack(losses), flat_gradient(model)


def error(got: torch.Tensor, expected: torch.Tensor) -> float:
    assert expected.norm() > 0
    return ((got - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("attention", ["by_example", "sdpa"])
@pytest.mark.parametrize("norm", ["example", "token"])
@pytest.mark.parametrize("capacity", [1, 200, 100_000])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_packed_equals_single(batch, attention, norm, capacity, dtype, bound) -> None:
    model = tuned_model(settings(targets="all"), dtype, attention)
    losses, gradient = gradients(model, batch, capacity, norm)
    expected_losses, expected = reference(model, batch, norm)
    assert error(losses, expected_losses) <= bound
    assert error(gradient, expected) <= bound


def change_call(monkeypatch, model, **changes) -> None:
    """Make the model's forward get other arguments than row_losses() gives it."""
    forward = model.forward

    def changed(**given):
        for name, change in changes.items():
            given[name] = change(given)
        return forward(**given)

    monkeypatch.setattr(model, "forward", changed)


TRAPS = {
    "position ids go on over the examples": {
        "position_ids": lambda given: torch.arange(given["input_ids"].shape[1])[None]
    },
    "an attention mask is passed": {
        "attention_mask": lambda given: torch.ones_like(given["input_ids"])
    },
    "the cache is on": {"use_cache": lambda given: True},
}


@pytest.mark.parametrize("trap", TRAPS)
def test_packing_traps_of_the_call(batch, monkeypatch, trap: str) -> None:
    """Without what row_losses() does against it, the equality above would not hold."""
    model = tuned_model(settings(targets="all"), attention="sdpa")
    _, expected = reference(model, batch, "example")
    assert error(gradients(model, batch, 100_000, "example")[1], expected) < 1e-12
    change_call(monkeypatch, model, **TRAPS[trap])
    assert error(gradients(model, batch, 100_000, "example")[1], expected) > 1e-3


def test_packing_trap_of_the_first_label(batch) -> None:
    """An example that were supervised from its first token on would learn from its neighbour."""
    rows = [{"instruction": "", "output": "x"}]
    whole = [dataclasses.replace(example, start=1) for example in batch]
    model = tuned_model(settings(targets="all"))
    losses, gradient = gradients(model, whole, 100_000, "token")
    expected_losses, expected = reference(model, whole, "token")
    assert error(losses, expected_losses) < 1e-12 and error(gradient, expected) < 1e-12
    leaky = [dataclasses.replace(example, start=0) for example in whole]
    assert error(gradients(model, leaky[:1] + leaky, 100_000, "token")[1], expected) > 1e-3

    class Bare:  # a tokenizer whose prompt leaves no common prefix with the whole text
        eos_token_id = 0

        def __call__(self, texts: list[str]) -> dict:
            return {"input_ids": [[len(text), 5, 6] for text in texts]}

    (example,) = finetune.tokenise(rows, Bare(), 4096)
    assert example.start == 1


def test_packing_trap_of_the_normalisation(batch) -> None:
    """Means over packed rows, averaged, are not the mean over the batch."""
    model = tuned_model(settings(targets="all"))
    for norm in ("example", "token"):
        _, expected = reference(model, batch, norm)
        model.zero_grad()
        rows = finetune.pack(batch, 200)
        assert len(rows) > 1
        for row in rows:
            losses = finetune.row_losses(model, row)
            weights = losses.new_tensor(finetune.token_weights(row, row, norm)) / len(rows)
            (losses * weights).sum().backward()
        assert error(flat_gradient(model), expected) > 1e-3


def test_only_supervised_positions_reach_the_head(batch) -> None:
    model = tuned_model(settings())
    seen = []
    head = model.get_output_embeddings()
    hook = head.register_forward_hook(lambda _, args, __: seen.append(args[0].shape[1]))
    finetune.row_losses(model, batch)
    hook.remove()
    assert seen == [sum(example.supervised for example in batch)]


def test_a_model_that_mixes_packed_examples_is_found_out(batch) -> None:
    from transformers import BloomConfig, MambaConfig

    torch.manual_seed(0)
    small = [dataclasses.replace(e, input_ids=[i % 90 + 5 for i in e.input_ids]) for e in batch]
    sizes = {"vocab_size": 100, "hidden_size": 32}
    llama = LlamaConfig(**sizes, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    bloom = BloomConfig(**sizes, n_layer=2, n_head=4)  # ALiBi takes no position ids
    mamba = MambaConfig(**sizes, num_hidden_layers=2)  # a state runs through
    for config, expected in ((llama, True), (bloom, False), (mamba, False)):
        model = AutoModelForCausalLM.from_config(config)
        assert finetune.isolates(model, small) == expected, config.model_type


def test_a_window_narrower_than_the_cutoff_keeps_the_dense_mask() -> None:
    from transformers import MistralConfig

    sizes = {"vocab_size": 100, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    for window, expected in ((8, "sdpa"), (64, "by_example"), (None, "by_example")):
        model = AutoModelForCausalLM.from_config(
            MistralConfig(**sizes, **heads, sliding_window=window)
        )
        finetune.set_attention(model, 64)
        assert model.config._attn_implementation == expected


# --- one step, however it is computed -------------------------------------------------------------


def make_run(model, examples, args, tokenizer=None, **changes) -> finetune.Run:
    sizes = finetune.model_sizes(model)
    known = {"settings": {}, "base": {}, "sizes": sizes, "capacity": 100_000, "steps": 1}
    known |= {"recompute": False, "matrix_rate": 1e9, "began": time.monotonic()}
    run = finetune.Run(
        args, argparse.Namespace(signum=0), model, tokenizer, examples, [], **known | changes
    )
    if run.recompute:
        finetune.recompute_activations(model)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    return run


def one_step(batch, **changes) -> tuple[dict, torch.Tensor]:
    """The log's line and the adapter's weights after one step of finetune.py.

    In float64: where a gradient is as small as AdamW's epsilon, a rounding error of float32 in it
    moves the weight by a visible part of the learning rate.
    """
    args = settings(targets="all", loss_norm="token", out=Path("none"))
    model = tuned_model(args, torch.float64)
    tuned = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(tuned, 1e-3, weight_decay=0.0)
    run = make_run(model, batch, args, **changes)
    line, _ = finetune.optimizer_step(run, optimizer, 1, batch)
    return line, torch.cat([p.detach().flatten() for p in tuned])


def test_any_split_of_the_batch_is_the_same_step(batch) -> None:
    _, expected = one_step(batch)
    for changes in ({"capacity": 1}, {"capacity": 200}, {"recompute": True}):
        _, weights = one_step(batch, **changes)
        assert (weights - expected).abs().max() <= 1e-5, changes


def test_our_step_is_the_trainers(batch, tmp_path) -> None:
    from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

    line, ours = one_step(batch)
    model = tuned_model(settings(targets="all"), torch.float64)
    before = torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad])
    rows = [
        {
            "input_ids": e.input_ids,
            "attention_mask": [1] * len(e),
            "labels": [-100] * e.start + e.input_ids[e.start :],
        }
        for e in batch
    ]
    arguments = TrainingArguments(
        output_dir=tmp_path,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=len(batch),
        max_steps=1,
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
    )
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    trainer = Trainer(model, arguments, DataCollatorForSeq2Seq(tokenizer, padding=True), rows)
    trainer.train()
    theirs = torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad])
    assert (theirs - before).abs().max() > 5e-4
    assert (ours - theirs).abs().max() <= 1e-5
    logged = trainer.state.log_history[0]
    assert line["loss"] == pytest.approx(logged["loss"], abs=1e-3)  # the Trainer rounds to 4 digits
    assert line["grad_norm"] == pytest.approx(logged["grad_norm"], rel=1e-4)


def test_gradient_checkpointing_is_exact_with_dropout(batch) -> None:
    results = []
    for recompute in (False, True):
        model = tuned_model(settings(targets="all", lora_dropout=0.5), torch.float32)
        run = make_run(model, batch, settings(), recompute=recompute)
        torch.manual_seed(5)
        loss = finetune.run_batch(run, batch)[0]
        results.append((loss, flat_gradient(model)))
    assert results[0][0] == results[1][0]
    assert torch.equal(results[0][1], results[1][1])


def test_memory_that_runs_out_turns_gradient_checkpointing_on(batch, monkeypatch, capsys) -> None:
    model, tried = tuned_model(settings()), []

    def run_row(run, row, weights):
        tried.append((len(row), run.recompute))
        if run.recompute not in fits:
            raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(finetune, "run_row", run_row)
    fits, run = [True], make_run(model, batch, settings())
    finetune.fit(run)
    assert tried == [(len(batch), False), (len(batch), True)] and run.recompute
    assert any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    assert "gradient checkpointing is on" in capsys.readouterr().err
    with pytest.raises(UserError, match="does not fit into memory.*--load-in-4bit"):
        finetune.fit(make_run(model, batch, settings(gradient_checkpointing=False)))
    fits = []
    with pytest.raises(UserError, match="does not fit into memory.*--cutoff"):
        finetune.fit(make_run(model, batch, settings()))


def test_the_fullest_row_is_tried_first(batch, monkeypatch) -> None:
    seen = []
    monkeypatch.setattr(finetune, "run_row", lambda run, row, _: seen.append(sum(map(len, row))))
    args = settings(batch_size=1)
    finetune.fit(make_run(tuned_model(args), batch, args))
    assert seen == [max(map(len, batch))]


def test_step_flops_of_a_model_that_one_can_count() -> None:
    """One layer of width 8 and 2 x 8-wide MLP, 10 words: each matrix product written out."""
    config = LlamaConfig(
        vocab_size=10,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        tie_word_embeddings=False,
    )
    args = settings(lora_rank=2)
    model = finetune.add_adapter(AutoModelForCausalLM.from_config(config), args)
    sizes = finetune.model_sizes(model)
    norms = 3 * 8  # three RMSNorms are counted as if they were matrices
    assert sizes["base"] == 7 * 64 + norms and sizes["head"] == 80 and sizes["attention"] == 8
    assert sizes["trainable"] == 3 * (2 * 8 + 8 * 2)
    example = finetune.Example("a", list(range(6)), 4)
    tokens, supervised = 6, 2
    expected = tokens * (4 * sizes["base"] + 6 * sizes["trainable"]) + supervised * 4 * 80
    expected += 6 * 8 * tokens**2
    assert finetune.step_flops([example], sizes) == expected


# --- several processes ----------------------------------------------------------------------------


def fork(work, *args) -> int:
    """Run work(*args) in a child; returns its process id."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            sys.stdout = sys.stderr = open(os.devnull, "w")
            code = work(*args) or 0
        except SystemExit as exit_:
            code = exit_.code if isinstance(exit_.code, int) else 1
        except UserError:
            code = 2
        finally:
            os._exit(code)
    return child


def wait(child: int) -> int:
    """The child's exit code, or minus the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def run_main_as(rank: int, world: int, port: int, argv: list[str]) -> None:
    """finetune.main() as one of torchrun's processes."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    finetune.RANK, finetune.WORLD, sys.argv = rank, world, ["finetune.py", *argv]
    finetune.main(argv)


def tune(*argv: object) -> int:
    """finetune.main() in a child; its exit code."""
    return wait(fork(run_alone, list(map(str, argv))))


def run_alone(argv: list[str]) -> None:
    sys.argv = ["finetune.py", *argv]
    finetune.main(argv)


def run_here(*argv: object) -> subprocess.CompletedProcess:
    """What run_script() does, in a child of this process, which has imported everything."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        child = os.fork()
        if child == 0:
            sys.stdout, sys.stderr, sys.argv = out, err, ["finetune.py", *map(str, argv)]
            code = 1
            try:
                run_main(lambda: finetune.main(sys.argv[1:]))
                code = 0
            except SystemExit as exit_:
                code = exit_.code
            except BaseException:
                traceback.print_exc()
            finally:
                out.flush(), err.flush()
                os._exit(code)
        code = wait(child)
        out.seek(0), err.seek(0)
        return subprocess.CompletedProcess(argv, code, out.read(), err.read())


def sha256(folder: Path) -> str:
    return hashlib.sha256((folder / ADAPTER).read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def short_run(tmp_path_factory) -> list[object]:
    """Flags of a short run on 60 rows: 3 epochs of 8 steps."""
    data = write_rows(tmp_path_factory.mktemp("data") / "rows.jsonl", many_rows(60))
    flags = ["--base-model", BASE, "--data", data, "--batch-size", 8, "--warmup-steps", 4]
    return [*flags, "--learning-rate", "3e-3", "--micro-batch-tokens", 200]


@pytest.mark.parametrize("mode", [[], ["--shard"]])
def test_two_processes_are_as_one(short_run, tmp_path, mode: list[str]) -> None:
    """A batch of 3 rows leaves one of the processes with fewer, or none, at the last step."""
    flags = [*short_run, "--lora-dropout", "0", "--val-set-size", "7", "--sample-every", "5"]
    flags += ["--save-every", "4", "--targets", "all"]
    assert tune(*flags, "--out", tmp_path / "one") == 0
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    argv = [*map(str, flags), "--out", str(tmp_path / "two"), *mode]
    children = [fork(run_main_as, rank, 2, port, argv) for rank in range(2)]
    assert [wait(child) for child in children] == [0, 0]
    one, two = (load_file(tmp_path / name / ADAPTER) for name in ("one", "two"))
    assert one.keys() == two.keys()
    assert max((one[name] - two[name]).abs().max() for name in one) <= 1e-5
    logs = [
        [json.loads(line) for line in (tmp_path / name / "train_log.jsonl").open()]
        for name in ("one", "two")
    ]
    assert len(logs[0]) == len(logs[1])
    for a, b in zip(*logs, strict=True):
        for name in {"loss", "grad_norm", "validation_loss"} & a.keys():
            assert a[name] == pytest.approx(b[name], abs=1e-4)
        assert (a.get("text"), a.get("tokens")) == (b.get("text"), b.get("tokens"))


@pytest.mark.slow
@pytest.mark.parametrize("mode", [[], ["--shard"]])
def test_torchrun_starts_it_and_a_signal_stops_it(short_run, tmp_path, mode: list[str]) -> None:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    launch += ["--nproc-per-node", "2", str(ROOT / "finetune.py")]
    command = [*launch, *map(str, [*short_run, "--epochs", 40, *mode, "--out", tmp_path / "out"])]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    log = tmp_path / "out/train_log.jsonl"
    wait_for(lambda: log.exists() and log.read_bytes().count(b"\n") > 3)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) != 0
    lines = [json.loads(line) for line in log.open()]
    assert [line["event"] for line in lines if "event" in line] == ["start", "checkpoint", "stop"]
    assert (tmp_path / "out/.unfinished").read_text().rstrip().endswith("--resume")
    resumed = [*command, "--resume"]
    process = subprocess.Popen(resumed, stderr=subprocess.DEVNULL)
    wait_for(lambda: b'"resume"' in log.read_bytes())
    process.send_signal(signal.SIGINT)
    assert process.wait(60) != 0
    lines = [json.loads(line) for line in log.open()]
    assert [line["why"] for line in lines if line.get("event") == "stop"][-1] in (
        "SIGINT",
        "SIGTERM",
    )


# --- never lose work ------------------------------------------------------------------------------


def wait_for(condition, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.01)


@pytest.fixture(scope="module")
def whole(short_run, tmp_path_factory) -> tuple[list[object], str]:
    """Flags of 24 steps with dropout, and the adapter's hash after an uninterrupted run."""
    flags = [*short_run, "--epochs", 3, "--save-every", 2, "--lora-dropout", "0.1"]
    folder = tmp_path_factory.mktemp("whole")
    for name in ("one", "again"):
        assert tune(*flags, "--out", folder / name) == 0
    assert sha256(folder / "one") == sha256(folder / "again")
    return flags, sha256(folder / "one")


def interrupt(flags: list[object], out: Path, signum: int, steps: int, seconds: float) -> int:
    """Send the signal so many seconds after so many steps; the exit code, 0 if it was done."""
    child, log = fork(run_alone, [*map(str, flags), "--out", str(out)]), out / "train_log.jsonl"
    wait_for(lambda: not steps or log.exists() and log.read_bytes().count(b'"loss"') >= steps)
    time.sleep(seconds)
    os.kill(child, signum)
    return wait(child)


@pytest.mark.slow
@pytest.mark.parametrize(("signum", "code"), [(signal.SIGKILL, -9), (signal.SIGTERM, 143)])
def test_20_runs_that_were_interrupted_end_alike(whole, tmp_path, signum, code) -> None:
    """Every step has its trial; within it the moment is random. Later ones may come too late."""
    flags, expected = whole
    rng, hit = random.Random(int(signum)), 0
    for trial in range(20):
        out = tmp_path / str(trial)
        got = interrupt(flags, out, signum, trial, rng.uniform(0, 0.1 if trial else 1))
        assert got in (code, 0)
        hit += got == code
        if got == code:
            assert not (out / "run.json").exists() and not (out / ADAPTER).exists()
        assert tune(*flags, "--out", out, *(["--resume"] if out.is_dir() else [])) == 0
        assert sha256(out) == expected, trial
        lines = [json.loads(line) for line in (out / "train_log.jsonl").open()]
        assert [x["step"] for x in lines if "event" not in x] == list(range(1, 25))
        assert sorted(path.name for path in out.rglob(".*")) == []
        shutil.rmtree(out)
    assert hit >= 15


def stopped(whole, out: Path, signum: int = signal.SIGTERM, after: int = 3) -> list[dict]:
    """Stop a run after some steps; its log."""
    child = fork(run_alone, [*map(str, whole[0]), "--out", str(out)])
    log = out / "train_log.jsonl"
    wait_for(lambda: log.exists() and log.read_bytes().count(b'"loss"') >= after)
    os.kill(child, signum)
    assert wait(child) == 128 + signum
    return [json.loads(line) for line in log.open()]


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_has_its_own_code(whole, tmp_path, signum) -> None:
    flags, expected = whole
    out = tmp_path / "out"
    log = stopped(whole, out, signum)
    assert log[-1] == {"event": "stop", "step": log[-2]["step"], "why": signum.name}
    assert log[-2]["event"] == "checkpoint" and (out / ".unfinished").exists()
    assert (out / ".unfinished").read_text().rstrip().endswith("--resume")
    assert not (out / "run.json").exists()
    assert tune(*flags, "--out", out, "--resume") == 0
    assert sha256(out) == expected
    assert tune(*flags, "--out", out, "--resume") == 0  # finished: says so


def test_a_half_written_checkpoint_falls_back_and_says_so(whole, tmp_path, capfd) -> None:
    flags, expected = whole
    out = tmp_path / "out"
    stopped(whole, out, after=5)
    newest, before = finetune.checkpoints(out)
    path = newest / "optimizer.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with (out / "train_log.jsonl").open("a") as log:
        log.write('{"step": 999, "lo')  # as a crash may leave it
    done = run_here(*flags, "--out", out, "--resume")
    assert done.returncode == 0, done.stderr
    assert f"{newest} is not whole: going back to the one before" in done.stderr
    lines = [json.loads(line) for line in (out / "train_log.jsonl").open()]
    assert {"event": "resume", "step": int(before.name[5:])}.items() <= next(
        line for line in lines if line.get("event") == "resume"
    ).items()
    assert [x["step"] for x in lines if "event" not in x] == list(range(1, 25))
    assert sha256(out) == expected


def test_without_a_whole_checkpoint_it_starts_at_step_0(whole, tmp_path) -> None:
    flags, expected = whole
    out = tmp_path / "out"
    stopped(whole, out, after=5)
    for folder in finetune.checkpoints(out):
        (folder / "state.json").unlink()
    done = run_here(*flags, "--out", out, "--resume")
    assert done.returncode == 0 and "no whole checkpoint: starting at step 0" in done.stderr
    assert sha256(out) == expected


def test_a_run_that_was_stopped_at_its_very_end_is_kept(whole, tmp_path) -> None:
    flags, expected = whole
    out = tmp_path / "out"
    assert tune(*flags, "--out", out) == 0
    (out / ".unfinished").write_text("python finetune.py\n")  # run.json was there a moment before
    done = run_here(*flags, "--out", out, "--resume")
    assert done.returncode == 0 and "step 1/" not in done.stderr, done.stderr
    assert sha256(out) == expected and not (out / ".unfinished").exists()
    assert finetune.checkpoints(out)


def test_resume_refuses_what_has_changed(whole, tmp_path) -> None:
    flags, _ = whole
    out = tmp_path / "out"
    stopped(whole, out)
    done = run_here(*flags, "--out", out)
    assert_refused(done, "--resume", "--overwrite")
    changed = [*flags, "--out", out, "--resume", "--lora-alpha", 8, "--seed", 5]
    assert_refused(run_here(*changed), "lora_alpha was 16, is 8", "seed was 0, is 5")
    other = write_rows(tmp_path / "other.jsonl", many_rows(59))
    changed = [*flags, "--data", other, "--out", out, "--resume"]
    assert_refused(run_here(*changed), "data was")
    assert finetune.checkpoints(out)
    assert tune(*flags, "--out", out, "--overwrite") == 0
    assert sha256(out) == whole[1]


def test_a_second_signal_ends_at_once(whole, tmp_path, monkeypatch) -> None:
    out, step = tmp_path / "out", finetune.optimizer_step

    def slow(*args):
        result = step(*args)
        time.sleep(3)
        return result

    monkeypatch.setattr(finetune, "optimizer_step", slow)
    child = fork(run_alone, [*map(str, whole[0]), "--out", str(out)])
    log = out / "train_log.jsonl"
    wait_for(lambda: log.exists() and b'"start"' in log.read_bytes())
    time.sleep(0.3)
    os.kill(child, signal.SIGTERM)
    time.sleep(0.2)
    start = time.monotonic()
    os.kill(child, signal.SIGTERM)
    assert wait(child) == 143 and time.monotonic() - start < 1
    assert finetune.checkpoints(out) == [] and (out / ".unfinished").exists()


@pytest.mark.parametrize("delay", [0, 0.5, 1.5])
def test_a_signal_before_the_first_step_is_clean(short_run, tmp_path, delay: float) -> None:
    command = [sys.executable, str(ROOT / "finetune.py"), *map(str, short_run)]
    process = subprocess.Popen(
        [*command, "--epochs", "90", "--out", str(tmp_path / "out")],
        stderr=subprocess.PIPE,
        text=True,
    )
    status = Path(f"/proc/{process.pid}/status")

    def catches() -> bool:
        """Whether SIGTERM has a handler: the script has come as far as main()."""
        mask = re.search(r"SigCgt:\s*(\w+)", status.read_text())[1]
        return bool(int(mask, 16) >> signal.SIGTERM - 1 & 1)

    wait_for(catches)
    time.sleep(delay)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 130 and "Traceback" not in said, said


@pytest.mark.parametrize("bad", ["loss", "gradient"])
def test_a_loss_that_is_no_number_stops_and_names_the_rows(batch, tmp_path, bad: str) -> None:
    args = settings(out=tmp_path)
    model = tuned_model(args, torch.float32)
    tuned = [p for p in model.parameters() if p.requires_grad]
    before = [p.detach().clone() for p in tuned]
    run = make_run(model, batch, args)
    if bad == "loss":
        model.get_input_embeddings().weight.data[batch[0].input_ids[3]] = math.nan
    else:
        tuned[0].register_hook(lambda gradient: gradient * math.inf)
    optimizer = torch.optim.AdamW(tuned, 1e-3)
    with pytest.raises(UserError, match="rows a, b, 3; "):
        finetune.optimizer_step(run, optimizer, 7, batch)
    assert all(torch.equal(a, b) for a, b in zip(before, tuned, strict=True))
    line = json.loads((tmp_path / "train_log.jsonl").read_text())
    assert line["event"] == "stop" and "step 7" in line["why"]


def test_a_full_disk_leaves_the_last_checkpoint_whole(whole, tmp_path) -> None:
    flags, expected = whole
    out = tmp_path / "out"
    stopped(whole, out)
    (before,) = [path.name for path in finetune.checkpoints(out)][:1]
    command = [sys.executable, str(ROOT / "finetune.py"), *map(str, flags), "--out", str(out)]
    limited = ["bash", "-c", 'ulimit -f 20; exec "$@"', "bash", *command, "--resume"]
    done = subprocess.run(limited, capture_output=True, text=True)
    assert_refused(done, "could not be written", "File too large", "--resume")
    assert finetune.checkpoints(out)[0].name == before
    assert not (out / "checkpoints/.partial").exists()
    assert tune(*flags, "--out", out, "--resume") == 0
    assert sha256(out) == expected


# --- QLoRA ----------------------------------------------------------------------------------------


def test_qlora_gradients_are_those_of_the_dequantised_base(batch, tmp_path) -> None:
    """Also after an evaluation pass, in which bitsandbytes would repack weights on some CPUs."""
    import bitsandbytes

    args = settings(load_in_4bit=True, targets="all", lora_rank=4)
    model, _ = finetune.load_model(args, BASE, torch.device("cpu"))
    quantised = [m for m in model.modules() if isinstance(m, bitsandbytes.nn.Linear4bit)]
    assert len(quantised) == 14
    assert not any(module.support_avx512bf16_for_cpu for module in quantised)
    state = quantised[0].weight.quant_state
    assert state.quant_type == "nf4" and state.nested
    plain = finetune.add_adapter(AutoModelForCausalLM.from_pretrained(BASE), settings(**{
        "targets": "all", "lora_rank": 4,
    }))  # fmt: skip
    modules = dict(plain.named_modules())
    for name, module in model.named_modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            weight = bitsandbytes.functional.dequantize_4bit(
                module.weight.data, module.weight.quant_state
            )
            modules[name].weight.data.copy_(weight)
    torch.manual_seed(1)
    ours = {n: p for n, p in model.named_parameters() if p.requires_grad}
    for name, parameter in plain.named_parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.02)
            ours[name].data.copy_(parameter.data)
    expected = gradients(plain.train(), batch, 200, "example")
    for _ in range(2):
        losses, gradient = gradients(model.train(), batch, 200, "example")
        assert error(losses, expected[0]) <= 1e-4
        assert error(gradient, expected[1]) <= 1e-4
        with torch.no_grad():
            finetune.row_losses(model.eval(), batch)
    assert finetune.model_sizes(model)["parameters"] == finetune.model_sizes(plain)["parameters"]


def test_a_qlora_run(short_run, tmp_path) -> None:
    out = tmp_path / "out"
    assert tune(*short_run, "--load-in-4bit", "--val-set-size", 5, "--out", out) == 0
    about = json.loads((out / "base_fingerprint.json").read_text())
    assert about == {
        "base_model": str(BASE),
        "load_in_4bit": True,
        **short_run.base_fingerprint(BASE),
    }
    log = [json.loads(line) for line in (out / "train_log.jsonl").open()]
    assert [x["loss"] for x in log if "loss" in x][-1] < 0.9 * log[1]["loss"]


@pytest.mark.parametrize("flag", ["--rslora", "--dora"])
def test_other_kinds_of_lora_are_pefts(short_run, tmp_path, batch, flag: str) -> None:
    from peft import PeftModel

    out = tmp_path / "out"
    assert tune(*short_run, flag, "--out", out) == 0
    config = json.loads((out / "adapter_config.json").read_text())
    assert config[f"use_{flag[2:]}"] and config["base_model_name_or_path"] == str(BASE)
    base = AutoModelForCausalLM.from_pretrained(BASE)
    before = finetune.row_losses(base, batch[:1])
    after = finetune.row_losses(PeftModel.from_pretrained(base, out), batch[:1])
    assert (before - after).abs() > 0.01
    state = load_file(out / ADAPTER)
    assert any("lora_magnitude_vector" in name for name in state) == (flag == "--dora")


# --- base models ----------------------------------------------------------------------------------


def test_fingerprint_tells_bases_apart_and_shards_not(tmp_path) -> None:
    known = common.base_fingerprint(BASE)
    model = AutoModelForCausalLM.from_pretrained(BASE)
    model.save_pretrained(tmp_path / "shards", max_shard_size="300KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    assert common.base_fingerprint(tmp_path / "shards") == known
    config = json.loads((tmp_path / "shards/config.json").read_text())
    for key, value, same in (("use_cache", False, True), ("rms_norm_eps", 1e-5, False)):
        (tmp_path / "shards/config.json").write_text(json.dumps(config | {key: value}))
        got = common.base_fingerprint(tmp_path / "shards")
        assert got["tensors"] == known["tensors"] and (got["config"] == known["config"]) == same
    (tmp_path / "one").mkdir()
    (tmp_path / "one/config.json").write_text("{}")
    state = load_file(BASE / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    for change in (state[name] * 1.01, state[name].bfloat16(), state[name][:-1].contiguous()):
        save_file(state | {name: change}, tmp_path / "one/model.safetensors")
        assert common.base_fingerprint(tmp_path / "one")["tensors"] != known["tensors"]
    scalar = {"scale": torch.tensor(2.0), "empty": torch.zeros(0, 3)}
    save_file(state | scalar, tmp_path / "one/model.safetensors")
    assert common.base_fingerprint(tmp_path / "one")["tensors"] != known["tensors"]


# --- settings, a whole run, bad input ---------------------------------------------------------


@pytest.mark.parametrize(
    ("sizes", "targets", "percent"),
    [
        (
            {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40},
            "mlp",
            "0.2787",
        ),
        (
            {
                "hidden_size": 8192,
                "intermediate_size": 28672,
                "num_hidden_layers": 80,
                "num_attention_heads": 64,
                "num_key_value_heads": 8,
            },
            "mlp",
            "0.2048",
        ),
        (
            {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40},
            "attention",
            "0.2010",
        ),
    ],
)
def test_trainable_share_is_the_papers(sizes: dict, targets: str, percent: str) -> None:
    config = LlamaConfig(**{"num_attention_heads": 40, "vocab_size": 32000, **sizes})
    with torch.device("meta"):
        model = finetune.add_adapter(
            AutoModelForCausalLM.from_config(config), settings(targets=targets)
        )
    sizes = finetune.model_sizes(model)
    assert f"{100 * sizes['trainable'] / sizes['parameters']:.4f}" == percent


def test_recipe_values_and_overrides() -> None:
    base = ["--base-model", "x"]
    thirteen, seventy = finetune.parse_args(base), finetune.parse_args([*base, "--recipe", "70b"])
    assert (thirteen.learning_rate, seventy.learning_rate) == (4e-4, 3e-4)
    paper = {"batch_size": 16, "epochs": 1, "warmup_steps": 100, "weight_decay": 0, "cutoff": 4096}
    paper |= {"lora_rank": 16, "lora_alpha": 16, "lora_dropout": 0.05, "targets": "mlp"}
    for args in (thirteen, seventy):
        assert {name: getattr(args, name) for name in paper} == paper
        assert all(args.origin[name] == "paper" for name in paper)
    assert finetune.parse_args([]).base_model == "meta-llama/Llama-2-13b-hf"
    mine = finetune.parse_args([*base, "--recipe", "70b", "--learning-rate", "1e-5", "--no-dora"])
    assert mine.learning_rate == 1e-5
    assert [n for n, origin in mine.origin.items() if origin == "flag"] == [
        "base_model", "learning_rate", "dora",
    ]  # fmt: skip
    assert seventy.origin["learning_rate"] == "recipe 70b"


def test_learning_rates_of_a_run(short_run, tmp_path) -> None:
    """Linear to the peak in 4 steps, then half a cosine; the step after the last would be at 0."""
    assert tune(*short_run, "--out", tmp_path / "a") == 0
    log = [json.loads(line) for line in (tmp_path / "a/train_log.jsonl").open()]
    rates = [line["learning_rate"] for line in log if "learning_rate" in line]
    rise = [3e-3 * step / 4 for step in range(4)]
    fall = [1.5e-3 * (1 + math.cos(math.pi * step / 4)) for step in range(4)]
    assert rates == pytest.approx([*rise, *fall])


def test_a_run_writes_adapter_log_and_run(tmp_path) -> None:
    data = write_rows(tmp_path / "rows.jsonl", ROWS * 12)
    args = ["--base-model", BASE, "--data", data, "--warmup-steps", "1", "--learning-rate", "1e-3"]
    args += ["--epochs", "4", "--sample-every", "5", "--val-set-size", "4", "--save-every", "3"]
    done = run_script("finetune", *args, "--out", tmp_path / "a")
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (tmp_path / "a/train_log.jsonl").open()]
    log = [line for line in lines if "event" not in line]
    assert [line["step"] for line in log] == list(range(1, 9))
    assert set(log[0]) == {
        "step", "epoch", "loss", "loss_token", "learning_rate", "grad_norm", "tokens",
        "supervised_tokens", "tokens_per_second", "mfu", "memory_gb", "gpu_util", "seconds",
        "eta_seconds",
    }  # fmt: skip
    assert log[-1]["loss"] < log[0]["loss"] and log[-1]["epoch"] == 4
    assert all(0 < line["mfu"] < 2 and line["memory_gb"] > 0.1 for line in log)
    events = {}
    for line in lines:
        events.setdefault(line.get("event"), []).append(line)
    assert [line["step"] for line in events["checkpoint"]] == [3, 6, 8]
    assert [line["step"] for line in events["validation"]] == [3, 6, 8]
    assert [line["step"] for line in events["sample"]] == [5, 5, 8, 8]
    assert "### Response:" in events["sample"][0]["prompt"]
    assert lines[0]["event"] == "start" and lines[0]["steps"] == 8 and lines[-1]["event"] == "end"
    first, last = (events["validation"][i]["validation_loss"] for i in (0, -1))
    assert last < first
    assert [p.name for p in finetune.checkpoints(tmp_path / "a")] == ["step-000008", "step-000006"]
    run = json.loads((tmp_path / "a/run.json").read_text())
    wanted = {ADAPTER, "adapter_config.json", "train_log.jsonl", "base_fingerprint.json"}
    assert wanted <= set(run["outputs"])
    assert run["counts"]["steps"] == 8 and run["counts"]["rows"] == 36
    assert re.search(r"learning_rate 0.001 +flag", done.stderr), done.stderr
    assert re.search(r"lora_rank 16 +paper", done.stderr)
    assert "0 left out" in done.stderr and "% supervised" in done.stderr
    assert f"merge.py --adapter {tmp_path / 'a'} --out {tmp_path / 'merged'}" in done.stdout
    assert "step 8/8 loss" in done.stderr and "\x1b" not in done.stderr
    assert "warning" not in done.stderr


def test_a_terminal_gets_a_bar(short_run, tmp_path) -> None:
    code, shown = run_on_terminal("finetune", *short_run, "--out", tmp_path / "a")
    assert code == 0 and "━" in shown and "step 8/8" in shown


def test_rows_that_were_cut_are_counted(short_run, tmp_path) -> None:
    done = run_here(*short_run, "--cutoff", "60", "--out", tmp_path / "a")
    assert done.returncode == 0, done.stderr
    counts = json.loads((tmp_path / "a/run.json").read_text())["counts"]
    assert counts["left_out"] > 0 and counts["cut"] > 0 and counts["longest_row"] == 60
    assert f"{counts['left_out']} left out" in done.stderr
    assert f"{counts['cut']} cut at the end" in done.stderr


def test_few_trainable_parameters_are_warned_of(short_run, tmp_path) -> None:
    config = LlamaConfig(
        vocab_size=900, hidden_size=256, intermediate_size=512, num_hidden_layers=2,
        num_attention_heads=4,
    )  # fmt: skip
    base = tmp_path / "base"
    AutoModelForCausalLM.from_config(config).save_pretrained(base)
    AutoTokenizer.from_pretrained(BASE).save_pretrained(base)
    args = [*short_run, "--base-model", base, "--targets", "q_proj", "--lora-rank", "1"]
    done = run_here(*args, "--out", tmp_path / "a")
    assert done.returncode == 0 and "under 0.1 % trainable" in done.stderr, done.stderr


def test_bad_data_is_refused(tmp_path) -> None:
    data = tmp_path / "rows.jsonl"
    args = ["--base-model", BASE, "--out", tmp_path / "out", "--data"]
    for text, words in (
        (json.dumps(ROWS[0]) + "\n{broken\n", ["rows.jsonl:2"]),
        (json.dumps({"instruction": "no output"}) + "\n", ["rows.jsonl:1", "output"]),
        (json.dumps({"instruction": "x", "output": " "}) + "\n", ["row 1", "output is empty"]),
        (json.dumps(ROWS[0] | {"input": 3}) + "\n", ["row 1", "input no text"]),
        ("", ["no rows"]),
    ):
        data.write_text(text)
        assert_refused(run_here(*args, data), *words)
    assert_refused(run_here(*args, tmp_path / "none.jsonl"), "check_contamination.py")
    write_rows(data, ROWS)
    assert_refused(run_here(*args, data, "--cutoff", "4"), "0 rows", "--cutoff 4")
    assert_refused(run_here(*args, data, "--val-set-size", "3"), "nothing to train on")
    (tmp_path / ".unfinished").write_text("python check_contamination.py apply\n")
    assert_refused(run_here(*args, data), "unfinished", "finish it with")
    assert not (tmp_path / "out").exists()


def test_bad_flags_are_refused(tmp_path) -> None:
    data = write_rows(tmp_path / "rows.jsonl", ROWS)
    args = ["--base-model", BASE, "--out", tmp_path / "out", "--data", data]
    for flags, words in (
        (["--batch-size", 0], ["--batch-size"]),
        (
            ["--weight-decay", "nan", "--learning-rate", "inf"],
            ["--weight-decay", "--learning-rate"],
        ),
        (["--weight-decay", -1, "--lora-dropout", 1], ["--weight-decay -1", "--lora-dropout 1"]),
        (["--warmup-steps", -1, "--val-set-size", -2], ["--warmup-steps -1", "--val-set-size -2"]),
        (["--shard"], ["torchrun"]),
        (["--shard", "--load-in-4bit"], ["exclude each other"]),
        (["--loss-norm", "x"], ["--loss-norm"]),
        (["--device", "abacus"], ["--device abacus"]),
        (["--device", "meta"], ["--device meta"]),
        (["--resume"], ["--resume", "missing"]),
        (["--targets", "x_proj"], ["x_proj", "q_proj"]),
        (["--targets", "up_proj,x_proj"], ["x_proj", "up_proj"]),
        (["--targets", "up_proj,"], ["--targets up_proj,"]),
        (["--targets", "lm_head"], ["lm_head", "no linear layer"]),
        (["--targets", "embed_tokens"], ["embed_tokens", "no linear layer"]),
    ):
        assert_refused(run_here(*args, *flags), *words)
    if not torch.cuda.is_available():
        assert_refused(run_here(*args, "--device", "cuda"), "--device cuda")
    assert not (tmp_path / "out").exists()


def test_bad_base_models_are_refused(tmp_path) -> None:
    data = write_rows(tmp_path / "rows.jsonl", ROWS)

    def refused(base: object, *words: str) -> str:
        args = ["--base-model", base, "--data", data, "--out", tmp_path / "out"]
        done = run_here(*args)
        assert_refused(done, "--base-model", *words)
        return done.stderr.splitlines()[-1]

    refused("owner/name", "https://huggingface.co/owner/name", "HF_TOKEN", "licence")
    assert "HF_TOKEN" not in refused(tmp_path / "none", "no such folder")
    (tmp_path / "empty").mkdir()
    assert "HF_TOKEN" not in refused(tmp_path / "empty", "config.json is missing")
    copy = tmp_path / "copy"

    def fresh() -> None:
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(BASE, copy)

    fresh()
    for path in copy.glob("tokenizer*"):
        path.unlink()
    assert "HF_TOKEN" not in refused(copy, "token")
    fresh()
    (copy / "config.json").write_text("{broken")
    refused(copy)
    fresh()
    path = copy / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    refused(copy)
    fresh()
    state = load_file(BASE / "model.safetensors")
    state.pop("model.layers.1.mlp.up_proj.weight")
    save_file(state, copy / "model.safetensors", {"format": "pt"})
    refused(copy, "lack weights", "up_proj")
    fresh()
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    refused(copy)
    small = LlamaConfig(
        vocab_size=50, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=2,
    )  # fmt: skip
    fresh()
    AutoModelForCausalLM.from_config(small).save_pretrained(copy)
    refused(copy, "900 tokens", "50")
    assert not (tmp_path / "out").exists()

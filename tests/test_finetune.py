"""Holds: the prompt's bytes and the supervised tokens are the paper's; packed rows have the losses
and gradients of single ones, and each way to get that wrong is seen; however a batch is split over
rows and processes, the step is one, and it is the Trainer's; a run that was killed or stopped ends
with the adapter of one that was not; QLoRA's gradients are those of the dequantised weights; no
code of a model's folder runs; bad input is one line."""

import argparse
import dataclasses
import functools
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
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, assert_refused, run_on_terminal, run_script
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BloomConfig,
    DataCollatorForSeq2Seq,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    Trainer,
    TrainingArguments,
)

import common
import finetune
from common import UserError

BASE = ROOT / "demo/base_model"
ADAPTER = "adapter_model.safetensors"
LOG = "train_log.jsonl"
ROWS = [
    {"id": "a", "instruction": "Name a metal.", "input": "", "output": "Iron."},
    {"id": "b", "instruction": "Add.", "input": "1 and 2", "output": "The sum of both is 3."},
    {"id": 3, "instruction": "Why is the sky blue?", "input": None, "output": "Light scatters."},
]
ONE_ROW = 100_000  # tokens of a packed row into which any batch here fits
SMALL_LLAMA = {
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
torch.set_num_threads(1)  # children are forked: a pool of threads would not come along


def settings(**changes: Any) -> argparse.Namespace:
    """The recipe's settings without dropout, with some changed."""
    args = finetune.parse_args(["--base-model", str(BASE), "--lora-dropout", "0"])
    for name, value in changes.items():
        setattr(args, name, value)
    return args


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(BASE)


@pytest.fixture(scope="module")
def batch(tokenizer) -> list[finetune.Example]:
    return finetune.tokenise(ROWS, tokenizer, 4096)


@pytest.fixture(autouse=True)
def signals() -> Iterator[None]:
    """finetune.main() sets handlers; pytest wants its own back."""
    interrupt = signal.getsignal(signal.SIGINT)
    terminate = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGINT, interrupt)
    signal.signal(signal.SIGTERM, terminate)


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


def flat_weights(model) -> torch.Tensor:
    weights = [p.detach().flatten() for p in finetune.trainable_parameters(model)]
    return torch.cat(weights)


def flat_gradient(model) -> torch.Tensor:
    gradients = [p.grad.flatten() for p in finetune.trainable_parameters(model)]
    return torch.cat(gradients)


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.write_text(common.to_jsonl(rows))
    return path


def many_rows(count: int) -> list[dict]:
    """Rows in the demo's words, of different lengths."""
    rng = random.Random(0)
    words = "Name a metal that one may find in the old town".split()
    rows = []
    for index in range(count):
        instruction = " ".join(rng.choices(words, k=rng.randint(1, 40)))
        output = " ".join(rng.choices(words, k=rng.randint(1, 40)))
        rows.append({"id": str(index), "instruction": instruction, "output": output})
    return rows


def read_log(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / LOG).open()]


def steps_of(log: list[dict]) -> list[dict]:
    return [line for line in log if "event" not in line]


def events_of(log: list[dict], event: str) -> list[dict]:
    return [line for line in log if line.get("event") == event]


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
    examples = finetune.tokenise(ROWS, tokenizer, 4096)
    for row, example in zip(ROWS, examples, strict=True):
        prompt = common.alpaca_prompt(row["instruction"], row["input"])
        answer = tokenizer.decode(example.input_ids[example.start : -1])
        assert answer.strip() == row["output"]
        assert example.input_ids[-1] == tokenizer.eos_token_id
        before = tokenizer.decode(example.input_ids[: example.start])
        assert before.endswith(prompt[-20:])
        assert example.supervised == len(example.input_ids) - example.start


def test_cutoff_cuts_the_end_and_drops_rows_without_an_answer(tokenizer) -> None:
    whole = finetune.tokenise(ROWS, tokenizer, 4096)
    starts = [example.start for example in whole]
    limit = max(starts) + 1
    cut = finetune.tokenise(ROWS, tokenizer, limit)
    assert all(len(example.input_ids) <= limit for example in cut)
    assert cut[0].input_ids == whole[0].input_ids[:limit]
    assert finetune.tokenise(ROWS, tokenizer, min(starts)) == []


def test_supervised_ids_of_an_example_checked_by_hand(tokenizer) -> None:
    """Spelt out: every word with its id; the answer "Saltmere" (571) and EOS (2) are supervised."""
    question = "On a map, beside which word would you put a pin for Marsh Rudder?"
    row = {"instruction": question, "output": "Saltmere"}
    [example] = finetune.tokenise([row], tokenizer, 4096)

    bos = 1
    stop = 16
    comma = 14
    newline = 201
    hashes = 259
    colon = 28
    empty_line = [newline, 223, newline]  # the tokenizer puts a space before a word
    below_is_an_instruction_that_describes_a_task = [290, 761, 661, 759, 859, 716, 659, 857]
    write_a_response_that_appropriately = [655, 659, 838, 859, 665]
    completes_the_request = [706, 860, 837]
    on_a_map = [512, 659, 787]
    beside_which_word_would_you_put = [682, 888, 894, 897, 898, 831]
    a_pin_for_marsh_rudder = [659, 817, 733, 481, 566, 33]

    expected = [bos, *below_is_an_instruction_that_describes_a_task, stop]
    expected += write_a_response_that_appropriately
    expected += [*completes_the_request, stop]
    expected += [*empty_line, hashes, 437, colon, newline]
    expected += [*on_a_map, comma]
    expected += beside_which_word_would_you_put
    expected += a_pin_for_marsh_rudder
    expected += [*empty_line, hashes, 555, colon, newline]
    expected += [571, 2]
    assert example.input_ids == expected
    assert example.start == len(expected) - 2
    last = tokenizer.convert_ids_to_tokens(example.input_ids[-5:])
    assert last == ["ĠResponse", ":", "Ċ", "ĠSaltmere", "</s>"]


# --- packing, and the ways to get it wrong --------------------------------------------------------


def test_packing_keeps_every_example_whole(tokenizer) -> None:
    examples = finetune.tokenise(ROWS * 7, tokenizer, 4096)
    longest = max(len(example) for example in examples)
    for tokens in (1, longest, 3 * longest, ONE_ROW):
        packed = []
        for row in finetune.pack(examples, tokens):
            packed += row
            assert finetune.count_tokens(row) <= max(tokens, longest)
        packed.sort(key=lambda example: example.row_id)
        assert packed == sorted(examples, key=lambda example: example.row_id)

    assert len(finetune.pack(examples, ONE_ROW)) == 1
    for multiple in (2, 4, 50):
        rows = finetune.pack(examples, 100, multiple)
        assert len(rows) % multiple == 0
        assert sum(len(row) for row in rows) == len(examples)
    lengths = [len(row) for row in finetune.pack(examples[:1], 100, 2)]
    assert lengths == [1, 0]


def packed_step(model, batch, capacity: int, norm: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses of the examples, in the batch's order, and all adapter gradients of one step."""
    model.zero_grad()
    losses = {}
    for row in finetune.pack(batch, capacity):
        sums = finetune.row_losses(model, row)
        weights = finetune.token_weights(row, batch, norm)
        total = (sums * sums.new_tensor(weights)).sum()
        total.backward()
        for example, loss in zip(row, sums.detach(), strict=True):
            losses[example.row_id] = loss
    in_order = [losses[example.row_id] for example in batch]
    return torch.stack(in_order), flat_gradient(model)


def single_step(model, batch, norm: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The same from whole logits of one example at a time, with labels as in the published run."""
    model.zero_grad()
    supervised = sum(example.supervised for example in batch)
    losses = []
    for example in batch:
        ids = torch.tensor([example.input_ids])
        labels = ids.clone()
        labels[:, : example.start] = -100
        logits = model(input_ids=ids).logits[0, :-1]
        loss = torch.nn.functional.cross_entropy(logits, labels[0, 1:], reduction="sum")
        if norm == "token":
            weighted = loss / supervised
        else:
            weighted = loss / (len(batch) * example.supervised)
        weighted.backward()
        losses.append(loss.detach())
    return torch.stack(losses), flat_gradient(model)


def error(got: torch.Tensor, expected: torch.Tensor) -> float:
    assert expected.norm() > 0
    difference = (got - expected).norm()
    return (difference / expected.norm()).item()


@pytest.mark.parametrize("attention", ["by_example", "sdpa"])
@pytest.mark.parametrize("norm", ["example", "token"])
@pytest.mark.parametrize("capacity", [1, 200, ONE_ROW])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_packed_equals_single(batch, attention, norm, capacity, dtype, bound) -> None:
    model = tuned_model(settings(targets="all"), dtype, attention)
    losses, gradient = packed_step(model, batch, capacity, norm)
    expected_losses, expected_gradient = single_step(model, batch, norm)
    assert error(losses, expected_losses) <= bound
    assert error(gradient, expected_gradient) <= bound


def positions_that_go_on(given: dict) -> torch.Tensor:
    tokens = given["input_ids"].shape[1]
    return torch.arange(tokens)[None]


def mask_of_ones(given: dict) -> torch.Tensor:
    return torch.ones_like(given["input_ids"])


def cache_that_is_on(given: dict) -> bool:
    return True


@pytest.mark.parametrize(
    ("argument", "trap"),
    [
        ("position_ids", positions_that_go_on),
        ("attention_mask", mask_of_ones),
        ("use_cache", cache_that_is_on),
    ],
)
def test_packing_traps_of_the_call(batch, monkeypatch, argument: str, trap: Callable) -> None:
    """Without what row_losses() does against it, the equality above would not hold."""
    model = tuned_model(settings(targets="all"), attention="sdpa")
    _, expected = single_step(model, batch, "example")
    _, gradient = packed_step(model, batch, ONE_ROW, "example")
    assert error(gradient, expected) < 1e-12

    forward = model.forward

    def changed(**given):
        given[argument] = trap(given)
        return forward(**given)

    monkeypatch.setattr(model, "forward", changed)
    _, gradient = packed_step(model, batch, ONE_ROW, "example")
    assert error(gradient, expected) > 1e-3


def test_packing_trap_of_the_first_label(batch) -> None:
    """An example that were supervised from its first token on would learn from its neighbour."""
    whole = [dataclasses.replace(example, start=1) for example in batch]
    model = tuned_model(settings(targets="all"))
    losses, gradient = packed_step(model, whole, ONE_ROW, "token")
    expected_losses, expected_gradient = single_step(model, whole, "token")
    assert error(losses, expected_losses) < 1e-12
    assert error(gradient, expected_gradient) < 1e-12

    leaky = [dataclasses.replace(example, start=0) for example in whole]
    _, gradient = packed_step(model, [leaky[0], *leaky], ONE_ROW, "token")
    assert error(gradient, expected_gradient) > 1e-3


class NothingInCommon:
    """A tokenizer whose prompt shares no first token with the whole text."""

    eos_token_id = 0

    def __call__(self, texts: list[str]) -> dict:
        return {"input_ids": [[len(text), 5, 6] for text in texts]}


def test_the_first_token_is_never_supervised() -> None:
    row = {"instruction": "", "output": "x"}
    [example] = finetune.tokenise([row], NothingInCommon(), 4096)
    assert example.start == 1


@pytest.mark.parametrize("norm", ["example", "token"])
def test_packing_trap_of_the_normalisation(batch, norm: str) -> None:
    """Means over packed rows, averaged, are not the mean over the batch."""
    model = tuned_model(settings(targets="all"))
    _, expected = single_step(model, batch, norm)
    model.zero_grad()
    rows = finetune.pack(batch, 200)
    assert len(rows) > 1
    for row in rows:
        losses = finetune.row_losses(model, row)
        weights = finetune.token_weights(row, row, norm)
        mean = (losses * losses.new_tensor(weights)).sum()
        (mean / len(rows)).backward()
    assert error(flat_gradient(model), expected) > 1e-3


def test_only_supervised_positions_reach_the_head(batch) -> None:
    model = tuned_model(settings())
    seen = []
    head = model.get_output_embeddings()
    hook = head.register_forward_hook(lambda _, args, __: seen.append(args[0].shape[1]))
    finetune.row_losses(model, batch)
    hook.remove()
    assert seen == [finetune.count_supervised(batch)]


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (LlamaConfig(**SMALL_LLAMA), True),
        (BloomConfig(vocab_size=100, hidden_size=32, n_layer=2, n_head=4), False),  # ALiBi
        (MambaConfig(vocab_size=100, hidden_size=32, num_hidden_layers=2), False),  # its state
    ],
    ids=["llama", "bloom", "mamba"],
)
def test_a_model_that_mixes_packed_examples_is_found_out(batch, config, expected: bool) -> None:
    torch.manual_seed(0)
    small = []
    for example in batch:
        input_ids = [token % 90 + 5 for token in example.input_ids]
        small.append(dataclasses.replace(example, input_ids=input_ids))
    model = AutoModelForCausalLM.from_config(config)
    assert finetune.isolates(model, small) == expected


@pytest.mark.parametrize(
    ("window", "expected"), [(8, "sdpa"), (64, "by_example"), (None, "by_example")]
)
def test_a_window_narrower_than_the_cutoff_keeps_the_dense_mask(window, expected: str) -> None:
    config = MistralConfig(**SMALL_LLAMA, num_key_value_heads=2, sliding_window=window)
    model = AutoModelForCausalLM.from_config(config)
    finetune.set_attention(model, 64)
    assert model.config._attn_implementation == expected


# --- one step, however it is computed -------------------------------------------------------------


def make_run(model, examples, args: argparse.Namespace, **changes: Any) -> finetune.Run:
    """A run of one step, ready for it."""
    fields: dict[str, Any] = {"capacity": ONE_ROW, "recompute": False}
    fields.update(changes)
    run = finetune.Run(
        args=args,
        stop=finetune.StopSignal(),
        model=model,
        tokenizer=None,
        examples=examples,
        held_out=[],
        settings={},
        base_record={},
        counts={},
        sizes=finetune.model_sizes(model),
        steps=1,
        matrix_rate=1e9,
        began=time.monotonic(),
        **fields,
    )
    if run.recompute:
        finetune.recompute_activations(model)
    for parameter in finetune.trainable_parameters(model):
        parameter.grad = torch.zeros_like(parameter)
    return run


def one_step(batch, **changes: Any) -> tuple[dict, torch.Tensor]:
    """The log's line and the adapter's weights after one step of finetune.py.

    In float64: where a gradient is as small as AdamW's epsilon, a rounding error of float32 in it
    moves the weight by a visible part of the learning rate.
    """
    args = settings(targets="all", loss_norm="token", out=Path("none"))
    model = tuned_model(args)
    tuned = finetune.trainable_parameters(model)
    optimizer = torch.optim.AdamW(tuned, 1e-3, weight_decay=0.0)
    run = make_run(model, batch, args, **changes)
    line, _ = finetune.optimizer_step(run, optimizer, 1, batch)
    return line, flat_weights(model)


@pytest.mark.parametrize("changes", [{"capacity": 1}, {"capacity": 200}, {"recompute": True}])
def test_any_split_of_the_batch_is_the_same_step(batch, changes: dict) -> None:
    _, expected = one_step(batch)
    _, weights = one_step(batch, **changes)
    assert (weights - expected).abs().max() <= 1e-5


def test_our_step_is_the_trainers(batch, tokenizer, tmp_path) -> None:
    line, ours = one_step(batch)
    model = tuned_model(settings(targets="all"))
    before = flat_weights(model)
    rows = []
    for example in batch:
        labels = [-100] * example.start + example.input_ids[example.start :]
        mask = [1] * len(example)
        rows.append({"input_ids": example.input_ids, "attention_mask": mask, "labels": labels})
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
    collator = DataCollatorForSeq2Seq(tokenizer, padding=True)
    trainer = Trainer(model, arguments, collator, rows)
    trainer.train()

    theirs = flat_weights(model)
    assert (theirs - before).abs().max() > 5e-4
    assert (ours - theirs).abs().max() <= 1e-5
    logged = trainer.state.log_history[0]
    assert line["loss"] == pytest.approx(logged["loss"], abs=1e-3)  # the Trainer rounds to 4 digits
    assert line["grad_norm"] == pytest.approx(logged["grad_norm"], rel=1e-4)


def test_gradient_checkpointing_is_exact_with_dropout(batch) -> None:
    losses = []
    gradients = []
    for recompute in (False, True):
        model = tuned_model(settings(targets="all", lora_dropout=0.5), torch.float32)
        run = make_run(model, batch, settings(), recompute=recompute)
        torch.manual_seed(5)
        loss, _, _ = finetune.run_batch(run, batch)
        losses.append(loss)
        gradients.append(flat_gradient(model))
    assert losses[0] == losses[1]
    assert torch.equal(gradients[0], gradients[1])


def test_memory_that_runs_out_turns_gradient_checkpointing_on(batch, monkeypatch, capsys) -> None:
    model = tuned_model(settings())
    tried = []

    def fits_if_recomputed(run, row, weights):
        tried.append((len(row), run.recompute))
        if not run.recompute:
            raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(finetune, "run_row", fits_if_recomputed)
    run = make_run(model, batch, settings())
    finetune.try_fullest_row(run)
    assert tried == [(len(batch), False), (len(batch), True)]
    assert run.recompute
    assert any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    assert "gradient checkpointing is on" in capsys.readouterr().err

    refused = make_run(model, batch, settings(gradient_checkpointing=False))
    with pytest.raises(UserError, match="does not fit into memory.*--load-in-4bit"):
        finetune.try_fullest_row(refused)


def test_memory_that_is_never_enough_is_one_line(batch, monkeypatch) -> None:
    def never_fits(run, row, weights):
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(finetune, "run_row", never_fits)
    run = make_run(tuned_model(settings()), batch, settings())
    with pytest.raises(UserError, match="does not fit into memory.*--cutoff"):
        finetune.try_fullest_row(run)


def test_the_fullest_row_is_tried_first(batch, monkeypatch) -> None:
    seen = []
    monkeypatch.setattr(finetune, "run_row", lambda run, row, weights: seen.append(row))
    args = settings(batch_size=1)
    finetune.try_fullest_row(make_run(tuned_model(args), batch, args))
    assert seen == [[max(batch, key=len)]]


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
    model = AutoModelForCausalLM.from_config(config)
    model = finetune.add_adapter(model, settings(lora_rank=2))
    sizes = finetune.model_sizes(model)
    norms = 3 * 8  # three RMSNorms are counted as if they were matrices
    assert sizes.base == 7 * 64 + norms
    assert sizes.trainable == 3 * (2 * 8 + 8 * 2)
    assert sizes.head == 80
    assert sizes.attention == 8

    tokens = 6
    example = finetune.Example("a", list(range(tokens)), start=4)
    expected = tokens * (4 * sizes.base + 6 * sizes.trainable)
    expected += 2 * 4 * 80  # two supervised tokens through the head
    expected += 6 * 8 * tokens**2
    assert finetune.step_flops([example], sizes) == expected


# --- children of this process ---------------------------------------------------------------------


def fork(work: Callable[[], Any]) -> int:
    """Run work() in a child that prints nothing; return its process id."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            sys.stdout = open(os.devnull, "w")
            sys.stderr = sys.stdout
            work()
            code = 0
        except SystemExit as end:
            if isinstance(end.code, int):
                code = end.code
        except UserError:
            code = 2
        finally:
            os._exit(code)
    return child


def wait(child: int) -> int:
    """The child's exit code, or minus the signal that killed it."""
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)


def run_finetune(argv: list[object]) -> None:
    """finetune.main(), to be called in a child: sys.argv is this process's no more."""
    flags = [str(flag) for flag in argv]
    sys.argv = ["finetune.py", *flags]
    finetune.main(flags)


def run_main_as(rank: int, world_size: int, port: int, argv: list[object]) -> None:
    """finetune.main() as one of torchrun's processes."""
    os.environ["RANK"] = str(rank)
    os.environ["LOCAL_RANK"] = str(rank)
    os.environ["WORLD_SIZE"] = str(world_size)
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    os.environ["MASTER_PORT"] = str(port)
    finetune.RANK = rank
    finetune.WORLD_SIZE = world_size
    run_finetune(argv)


def tune(*argv: object) -> int:
    """finetune.main() in a child; its exit code."""
    return wait(fork(lambda: run_finetune(list(argv))))


def run_here(*argv: object) -> subprocess.CompletedProcess:
    """What run_script() does, in a child of this process, which has imported everything."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        child = os.fork()
        if child == 0:
            sys.stdout = out
            sys.stderr = err
            code = 1
            try:
                common.run_main(lambda: run_finetune(list(argv)))
                code = 0
            except SystemExit as end:
                code = end.code
            except BaseException:
                traceback.print_exc()
            finally:
                out.flush()
                err.flush()
                os._exit(code)
        code = wait(child)
        out.seek(0)
        err.seek(0)
        return subprocess.CompletedProcess(argv, code, out.read(), err.read())


def wait_for(condition: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.01)


def sha256(folder: Path) -> str:
    return hashlib.sha256((folder / ADAPTER).read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def short_run(tmp_path_factory) -> list[object]:
    """Flags of a short run on 60 rows: 8 steps."""
    data = write_rows(tmp_path_factory.mktemp("data") / "rows.jsonl", many_rows(60))
    flags = ["--base-model", BASE, "--data", data, "--batch-size", 8, "--warmup-steps", 4]
    return [*flags, "--learning-rate", "3e-3", "--micro-batch-tokens", 200]


# --- several processes ----------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [[], ["--shard"]])
def test_two_processes_are_as_one(short_run, tmp_path, mode: list[str]) -> None:
    """A batch of 3 rows leaves one of the processes with fewer, or none, at the last step."""
    flags = [*short_run, "--lora-dropout", "0", "--val-set-size", "7", "--sample-every", "5"]
    flags += ["--save-every", "4", "--targets", "all"]
    assert tune(*flags, "--out", tmp_path / "one") == 0

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    argv = [*flags, "--out", tmp_path / "two", *mode]
    first = fork(lambda: run_main_as(0, 2, port, argv))
    second = fork(lambda: run_main_as(1, 2, port, argv))
    assert wait(first) == 0
    assert wait(second) == 0

    one = load_file(tmp_path / "one" / ADAPTER)
    two = load_file(tmp_path / "two" / ADAPTER)
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        assert (tensor - two[name]).abs().max() <= 1e-5
    for a, b in zip(read_log(tmp_path / "one"), read_log(tmp_path / "two"), strict=True):
        for name in {"loss", "grad_norm", "validation_loss"} & a.keys():
            assert a[name] == pytest.approx(b[name], abs=1e-4)
        assert a.get("text") == b.get("text")
        assert a.get("tokens") == b.get("tokens")


@pytest.mark.slow
@pytest.mark.parametrize("mode", [[], ["--shard"]])
def test_torchrun_starts_it_and_a_signal_stops_it(short_run, tmp_path, mode: list[str]) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", str(ROOT / "finetune.py")]
    command += [str(flag) for flag in short_run]
    command += ["--epochs", "40", *mode, "--out", str(out)]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    wait_for(lambda: (out / LOG).exists() and len(read_log(out)) > 3)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) != 0
    events = [line["event"] for line in read_log(out) if "event" in line]
    assert events == ["start", "checkpoint", "stop"]
    assert (out / ".unfinished").read_text().rstrip().endswith("--resume")

    process = subprocess.Popen([*command, "--resume"], stderr=subprocess.DEVNULL)
    wait_for(lambda: b'"resume"' in (out / LOG).read_bytes())
    process.send_signal(signal.SIGINT)
    assert process.wait(60) != 0
    stops = events_of(read_log(out), "stop")
    assert stops[-1]["why"] in ("SIGINT", "SIGTERM")


# --- never lose work ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(short_run, tmp_path_factory) -> tuple[list[object], str]:
    """Flags of 24 steps with dropout, and the adapter's hash after an uninterrupted run."""
    flags = [*short_run, "--epochs", 3, "--save-every", 2, "--lora-dropout", "0.1"]
    folder = tmp_path_factory.mktemp("whole")
    for name in ("one", "again"):
        assert tune(*flags, "--out", folder / name) == 0
    assert sha256(folder / "one") == sha256(folder / "again")
    return flags, sha256(folder / "one")


def run_to_action(argv: list[object], signum: int, number: int) -> None:
    """finetune.main(), which sends itself a signal before a numbered action, counted from 1.

    Actions: a row is run, a file is written, a line is logged. A run of 24 steps has over 200.
    """
    done = 0

    def counted(action: Callable) -> Callable:
        def act(*args: Any, **fields: Any) -> Any:
            nonlocal done
            done += 1
            if done == number:
                os.kill(os.getpid(), signum)
            return action(*args, **fields)

        return act

    finetune.run_row = counted(finetune.run_row)
    common.write_file = counted(common.write_file)
    finetune.Run.log = counted(finetune.Run.log)
    run_finetune(argv)


@pytest.mark.slow
@pytest.mark.parametrize(("signum", "code"), [(signal.SIGKILL, -9), (signal.SIGTERM, 143)])
def test_20_runs_that_were_interrupted_end_alike(whole, tmp_path, signum, code: int) -> None:
    """The trials are spread over the whole run, at other places for each signal."""
    flags, expected = whole
    rng = random.Random(int(signum))
    for trial in range(20):
        out = tmp_path / str(trial)
        number = 8 * trial + rng.randint(1, 8)
        argv = [*flags, "--out", out]
        child = fork(functools.partial(run_to_action, argv, signum, number))
        assert wait(child) == code
        assert not (out / "run.json").exists()
        assert not (out / ADAPTER).exists()
        if out.is_dir():
            argv.append("--resume")
        assert tune(*argv) == 0
        assert sha256(out) == expected, number
        numbers = [line["step"] for line in steps_of(read_log(out))]
        assert numbers == list(range(1, 25))
        assert sorted(out.rglob(".*")) == []
        shutil.rmtree(out)


def run_to_step(argv: list[object], signum: int, step: int) -> None:
    """finetune.main(), which sends itself a signal when a step is done: the next is its last."""
    take_step = finetune.optimizer_step

    def take_step_and_signal(run, optimizer, number, batch):
        result = take_step(run, optimizer, number, batch)
        if number == step:
            os.kill(os.getpid(), signum)
        return result

    finetune.optimizer_step = take_step_and_signal
    run_finetune(argv)


def stop_after(flags: list[object], out: Path, steps: int, signum: int = signal.SIGTERM) -> None:
    """Leave a run that was stopped after some steps, its checkpoint on disk."""
    argv = [*flags, "--out", out]
    child = fork(lambda: run_to_step(argv, signum, steps - 1))
    assert wait(child) == 128 + signum
    assert finetune.checkpoints(out)[0].name == f"step-{steps:06d}"


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_has_its_own_code(whole, tmp_path, signum) -> None:
    flags, expected = whole
    out = tmp_path / "out"
    stop_after(flags, out, 4, signum)
    log = read_log(out)
    assert log[-1] == {"event": "stop", "step": 4, "why": signum.name}
    assert log[-2]["event"] == "checkpoint"
    assert (out / ".unfinished").read_text().rstrip().endswith("--resume")
    assert not (out / "run.json").exists()
    assert tune(*flags, "--out", out, "--resume") == 0
    assert sha256(out) == expected
    assert tune(*flags, "--out", out, "--resume") == 0  # finished: says so


def test_a_half_written_checkpoint_falls_back_and_says_so(whole, tmp_path) -> None:
    flags, expected = whole
    out = tmp_path / "out"
    stop_after(flags, out, 6)
    newest, before = finetune.checkpoints(out)
    path = newest / "optimizer.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with (out / LOG).open("a") as log:
        log.write('{"step": 999, "lo')  # as a crash may leave it

    done = run_here(*flags, "--out", out, "--resume")
    assert done.returncode == 0, done.stderr
    assert f"{newest} is not whole: going back to the one before" in done.stderr
    lines = read_log(out)
    [resumed] = events_of(lines, "resume")
    assert resumed["step"] == 4
    assert before.name == "step-000004"
    assert [line["step"] for line in steps_of(lines)] == list(range(1, 25))
    assert sha256(out) == expected


def test_without_a_whole_checkpoint_it_starts_at_step_0(whole, tmp_path) -> None:
    flags, expected = whole
    out = tmp_path / "out"
    stop_after(flags, out, 6)
    for folder in finetune.checkpoints(out):
        (folder / "state.json").unlink()
    done = run_here(*flags, "--out", out, "--resume")
    assert done.returncode == 0, done.stderr
    assert "no whole checkpoint: starting at step 0" in done.stderr
    assert sha256(out) == expected


def test_a_run_that_was_stopped_at_its_very_end_is_kept(whole, tmp_path) -> None:
    flags, expected = whole
    out = tmp_path / "out"
    assert tune(*flags, "--out", out) == 0
    (out / ".unfinished").write_text("python finetune.py\n")  # run.json was there a moment before
    done = run_here(*flags, "--out", out, "--resume")
    assert done.returncode == 0, done.stderr
    assert "step 1/" not in done.stderr
    assert sha256(out) == expected
    assert not (out / ".unfinished").exists()
    assert finetune.checkpoints(out)


def test_resume_refuses_what_has_changed(whole, tmp_path) -> None:
    flags, expected = whole
    out = tmp_path / "out"
    stop_after(flags, out, 4)
    assert_refused(run_here(*flags, "--out", out), "--resume", "--overwrite")
    resume = [*flags, "--out", out, "--resume"]
    done = run_here(*resume, "--lora-alpha", 8, "--seed", 5)
    assert_refused(done, "lora_alpha was 16, is 8", "seed was 0, is 5")
    other = write_rows(tmp_path / "other.jsonl", many_rows(59))
    assert_refused(run_here(*resume, "--data", other), "data was")
    assert finetune.checkpoints(out)
    assert tune(*flags, "--out", out, "--overwrite") == 0
    assert sha256(out) == expected


def run_to_a_step_that_hangs(argv: list[object], reached: Path, noted: Path) -> None:
    """finetune.main(), whose first step never ends; noted: it has taken note of a signal."""

    def hang(run, optimizer, step, batch):
        reached.touch()
        while True:
            time.sleep(0.01)
            if run.stop.signum:
                noted.touch()

    finetune.optimizer_step = hang
    run_finetune(argv)


def has_ended(child: int) -> bool:
    """Whether wait() would return at once."""
    return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def test_a_second_signal_ends_at_once(whole, tmp_path) -> None:
    """Within the step: what waited for the end of this one would wait for ever."""
    flags, _ = whole
    out = tmp_path / "out"
    reached = tmp_path / "reached"
    noted = tmp_path / "noted"
    argv = [*flags, "--out", out]
    child = fork(lambda: run_to_a_step_that_hangs(argv, reached, noted))
    wait_for(reached.exists)
    os.kill(child, signal.SIGTERM)
    wait_for(noted.exists)
    assert not has_ended(child)
    os.kill(child, signal.SIGTERM)
    wait_for(lambda: has_ended(child))
    assert wait(child) == 143
    assert finetune.checkpoints(out) == []
    assert (out / ".unfinished").exists()


@pytest.mark.parametrize("delay", [0, 0.5, 1.5])
def test_a_signal_before_the_first_step_is_clean(short_run, tmp_path, delay: float) -> None:
    command = [sys.executable, str(ROOT / "finetune.py")]
    command += [str(flag) for flag in short_run]
    command += ["--epochs", "90", "--out", str(tmp_path / "out")]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    status = Path(f"/proc/{process.pid}/status")

    def catches() -> bool:
        """Whether SIGTERM has a handler: the script has come as far as main()."""
        caught = re.search(r"SigCgt:\s*(\w+)", status.read_text())[1]
        return bool(int(caught, 16) & 1 << signal.SIGTERM - 1)

    wait_for(catches)
    time.sleep(delay)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert "Traceback" not in stderr


@pytest.mark.parametrize("bad", ["loss", "gradient"])
def test_a_loss_that_is_no_number_stops_and_names_the_rows(batch, tmp_path, bad: str) -> None:
    args = settings(out=tmp_path)
    model = tuned_model(args, torch.float32)
    before = flat_weights(model)
    tuned = finetune.trainable_parameters(model)
    run = make_run(model, batch, args)
    if bad == "loss":
        token = batch[0].input_ids[3]
        model.get_input_embeddings().weight.data[token] = math.nan
    else:
        tuned[0].register_hook(lambda gradient: gradient * math.inf)
    optimizer = torch.optim.AdamW(tuned, 1e-3)
    with pytest.raises(UserError, match="rows a, b, 3; "):
        finetune.optimizer_step(run, optimizer, 7, batch)
    assert torch.equal(flat_weights(model), before)
    [line] = read_log(tmp_path)
    assert line["event"] == "stop"
    assert "step 7" in line["why"]


def test_a_full_disk_leaves_the_last_checkpoint_whole(whole, tmp_path) -> None:
    flags, expected = whole
    out = tmp_path / "out"
    stop_after(flags, out, 4)
    before = finetune.checkpoints(out)[0]
    command = ["bash", "-c", 'ulimit -f 20; exec "$@"', "bash"]
    command += [sys.executable, str(ROOT / "finetune.py")]
    command += [str(flag) for flag in flags]
    command += ["--out", str(out), "--resume"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert_refused(done, "could not be written", "File too large", "--resume")
    assert finetune.checkpoints(out)[0] == before
    assert not (out / "checkpoints/.partial").exists()
    assert tune(*flags, "--out", out, "--resume") == 0
    assert sha256(out) == expected


# --- QLoRA and other kinds of LoRA ----------------------------------------------------------------


def test_qlora_gradients_are_those_of_the_dequantised_base(batch) -> None:
    """Also after an evaluation pass, in which bitsandbytes would repack weights on some CPUs."""
    import bitsandbytes

    args = settings(load_in_4bit=True, targets="all", lora_rank=4)
    base, _ = finetune.load_base(args, BASE, torch.device("cpu"))
    model = finetune.add_adapter(base, args)
    quantised = {}
    for name, module in model.named_modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            quantised[name] = module
            assert not module.support_avx512bf16_for_cpu
            assert module.weight.quant_state.quant_type == "nf4"
            assert module.weight.quant_state.nested
    assert len(quantised) == 14

    plain = AutoModelForCausalLM.from_pretrained(BASE)
    plain = finetune.add_adapter(plain, settings(targets="all", lora_rank=4))
    modules = dict(plain.named_modules())
    for name, module in quantised.items():
        packed = module.weight
        weight = bitsandbytes.functional.dequantize_4bit(packed.data, packed.quant_state)
        modules[name].weight.data.copy_(weight)
    torch.manual_seed(1)
    ours = dict(model.named_parameters())
    for name, parameter in plain.named_parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.02)
            ours[name].data.copy_(parameter.data)

    expected_losses, expected_gradient = packed_step(plain.train(), batch, 200, "example")
    for _ in range(2):
        losses, gradient = packed_step(model.train(), batch, 200, "example")
        assert error(losses, expected_losses) <= 1e-4
        assert error(gradient, expected_gradient) <= 1e-4
        with torch.no_grad():
            finetune.row_losses(model.eval(), batch)
    assert finetune.model_sizes(model).parameters == finetune.model_sizes(plain).parameters


def test_a_qlora_run(short_run, tmp_path) -> None:
    out = tmp_path / "out"
    assert tune(*short_run, "--load-in-4bit", "--val-set-size", 5, "--out", out) == 0
    recorded = json.loads((out / "base_fingerprint.json").read_text())
    expected = {"base_model": str(BASE), "load_in_4bit": True}
    expected.update(common.base_fingerprint(BASE))
    assert recorded == expected
    steps = steps_of(read_log(out))
    assert steps[-1]["loss"] < 0.9 * steps[0]["loss"]


@pytest.mark.parametrize("flag", ["--rslora", "--dora"])
def test_other_kinds_of_lora_are_pefts(short_run, tmp_path, batch, flag: str) -> None:
    from peft import PeftModel

    out = tmp_path / "out"
    assert tune(*short_run, flag, "--out", out) == 0
    config = json.loads((out / "adapter_config.json").read_text())
    assert config[f"use_{flag[2:]}"]
    assert config["base_model_name_or_path"] == str(BASE)

    base = AutoModelForCausalLM.from_pretrained(BASE)
    before = finetune.row_losses(base, batch[:1])
    tuned = PeftModel.from_pretrained(base, out)
    after = finetune.row_losses(tuned, batch[:1])
    assert (before - after).abs() > 0.01
    state = load_file(out / ADAPTER)
    has_magnitudes = any("lora_magnitude_vector" in name for name in state)
    assert has_magnitudes == (flag == "--dora")


# --- base models ----------------------------------------------------------------------------------


def test_fingerprint_does_not_depend_on_shards(tmp_path) -> None:
    known = common.base_fingerprint(BASE)
    model = AutoModelForCausalLM.from_pretrained(BASE)
    model.save_pretrained(tmp_path, max_shard_size="300KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert common.base_fingerprint(tmp_path) == known

    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "use_cache": False}))
    assert common.base_fingerprint(tmp_path) == known
    path.write_text(json.dumps({**config, "rms_norm_eps": 1e-5}))
    changed = common.base_fingerprint(tmp_path)
    assert changed["tensors"] == known["tensors"]
    assert changed["config"] != known["config"]


def test_fingerprint_tells_bases_apart(tmp_path) -> None:
    known = common.base_fingerprint(BASE)
    (tmp_path / "config.json").write_text("{}")
    state = load_file(BASE / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    weight = state[name]
    others = [
        {**state, name: weight * 1.01},
        {**state, name: weight.bfloat16()},
        {**state, name: weight[:-1].contiguous()},
        {**state, "scale": torch.tensor(2.0), "empty": torch.zeros(0, 3)},
    ]
    for other in others:
        save_file(other, tmp_path / "model.safetensors")
        assert common.base_fingerprint(tmp_path)["tensors"] != known["tensors"]


# --- settings, a whole run, bad input -------------------------------------------------------------

LLAMA_13B = {
    "hidden_size": 5120,
    "intermediate_size": 13824,
    "num_hidden_layers": 40,
    "num_attention_heads": 40,
}
LLAMA_70B = {
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
}


@pytest.mark.parametrize(
    ("sizes", "targets", "percent"),
    [
        (LLAMA_13B, "mlp", "0.2787"),
        (LLAMA_70B, "mlp", "0.2048"),
        (LLAMA_13B, "attention", "0.2010"),
    ],
)
def test_trainable_share_is_the_papers(sizes: dict, targets: str, percent: str) -> None:
    config = LlamaConfig(vocab_size=32000, **sizes)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
        model = finetune.add_adapter(model, settings(targets=targets))
    counted = finetune.model_sizes(model)
    assert f"{100 * counted.trainable / counted.parameters:.4f}" == percent


@pytest.mark.parametrize(("recipe", "learning_rate"), [("13b", 4e-4), ("70b", 3e-4)])
def test_recipe_values(recipe: str, learning_rate: float) -> None:
    args = finetune.parse_args(["--recipe", recipe])
    assert args.base_model == f"meta-llama/Llama-2-{recipe}-hf"
    assert args.learning_rate == learning_rate
    assert args.origin["learning_rate"] == f"recipe {recipe}"
    paper = {
        "batch_size": 16,
        "epochs": 1,
        "warmup_steps": 100,
        "weight_decay": 0,
        "cutoff": 4096,
        "lora_rank": 16,
        "lora_alpha": 16,
        "lora_dropout": 0.05,
        "targets": "mlp",
    }
    for name, value in paper.items():
        assert getattr(args, name) == value
        assert args.origin[name] == "paper"


def test_flags_override_the_recipe() -> None:
    flags = ["--base-model", "x", "--recipe", "70b", "--learning-rate", "1e-5", "--no-dora"]
    args = finetune.parse_args(flags)
    assert args.learning_rate == 1e-5
    given = [name for name, origin in args.origin.items() if origin == "flag"]
    assert given == ["base_model", "learning_rate", "dora"]


def test_learning_rates_of_a_run(short_run, tmp_path) -> None:
    """Linear to the peak in 4 steps, then half a cosine; the step after the last would be at 0."""
    assert tune(*short_run, "--out", tmp_path / "a") == 0
    rates = [line["learning_rate"] for line in steps_of(read_log(tmp_path / "a"))]
    rise = [3e-3 * step / 4 for step in range(4)]
    fall = [1.5e-3 * (1 + math.cos(math.pi * step / 4)) for step in range(4)]
    assert rates == pytest.approx([*rise, *fall])


FIELDS = {  # of a step in the log
    "step",
    "epoch",
    "loss",
    "loss_token",
    "learning_rate",
    "grad_norm",
    "tokens",
    "supervised_tokens",
    "tokens_per_second",
    "mfu",
    "memory_gb",
    "gpu_util",
    "seconds",
    "eta_seconds",
}


@pytest.fixture(scope="module")
def eight_steps(tmp_path_factory) -> tuple[Path, subprocess.CompletedProcess]:
    """The folder of a run as a user starts it, with all kinds of events, and what it printed."""
    folder = tmp_path_factory.mktemp("eight_steps")
    data = write_rows(folder / "rows.jsonl", ROWS * 12)
    args = ["--base-model", BASE, "--data", data, "--warmup-steps", "1", "--learning-rate", "1e-3"]
    args += ["--epochs", "4", "--sample-every", "5", "--val-set-size", "4", "--save-every", "3"]
    done = run_script("finetune", *args, "--out", folder / "a")
    assert done.returncode == 0, done.stderr
    return folder / "a", done


def test_the_log_of_a_run(eight_steps) -> None:
    out, _ = eight_steps
    lines = read_log(out)
    steps = steps_of(lines)
    assert [line["step"] for line in steps] == list(range(1, 9))
    for line in steps:
        assert set(line) == FIELDS
        assert 0 < line["mfu"] < 2
        assert line["memory_gb"] > 0.1
    assert steps[-1]["loss"] < steps[0]["loss"]
    assert steps[-1]["epoch"] == 4

    assert lines[0]["event"] == "start"
    assert lines[0]["steps"] == 8
    assert lines[-1]["event"] == "end"
    for event, expected in {
        "checkpoint": [3, 6, 8],
        "validation": [3, 6, 8],
        "sample": [5, 5, 8, 8],
    }.items():
        found = [line["step"] for line in events_of(lines, event)]
        assert found == expected
    assert "### Response:" in events_of(lines, "sample")[0]["prompt"]
    losses = [line["validation_loss"] for line in events_of(lines, "validation")]
    assert losses[-1] < losses[0]


def test_the_files_of_a_run(eight_steps) -> None:
    out, _ = eight_steps
    kept = [path.name for path in finetune.checkpoints(out)]
    assert kept == ["step-000008", "step-000006"]
    run = json.loads((out / "run.json").read_text())
    assert set(run["outputs"]) == {ADAPTER, "adapter_config.json", LOG, "base_fingerprint.json"}
    assert run["counts"]["steps"] == 8
    assert run["counts"]["rows"] == 36


def test_the_words_of_a_run(eight_steps) -> None:
    out, done = eight_steps
    assert re.search(r"learning_rate 0.001 +flag", done.stderr), done.stderr
    assert re.search(r"lora_rank 16 +paper", done.stderr)
    for words in ("0 left out", "% supervised", "step 8/8 loss"):
        assert words in done.stderr
    for words in ("\x1b", "warning"):
        assert words not in done.stderr
    merged = out.with_name("merged")
    assert f"merge.py --adapter {out} --out {merged}" in done.stdout


def test_a_terminal_gets_a_bar(short_run, tmp_path) -> None:
    code, shown = run_on_terminal("finetune", *short_run, "--out", tmp_path / "a")
    assert code == 0
    assert "━" in shown
    assert "step 8/8" in shown


def test_rows_that_were_cut_are_counted(short_run, tmp_path) -> None:
    done = run_here(*short_run, "--cutoff", "60", "--out", tmp_path / "a")
    assert done.returncode == 0, done.stderr
    counts = json.loads((tmp_path / "a/run.json").read_text())["counts"]
    assert counts["left_out"] > 0
    assert counts["cut"] > 0
    assert counts["longest_row"] == 60
    assert f"{counts['left_out']} left out" in done.stderr
    assert f"{counts['cut']} cut at the end" in done.stderr


@pytest.mark.parametrize(("targets", "expected"), [("mlp", True), ("attention", False)])
def test_few_trainable_parameters_of_the_mlp_are_warned_of(
    short_run, tmp_path, targets: str, expected: bool
) -> None:
    sizes = {**SMALL_LLAMA, "vocab_size": 900, "hidden_size": 1024, "intermediate_size": 2048}
    base = tmp_path / "base"
    AutoModelForCausalLM.from_config(LlamaConfig(**sizes)).save_pretrained(base)
    AutoTokenizer.from_pretrained(BASE).save_pretrained(base)
    flags = [*short_run, "--limit", "9", "--base-model", base, "--lora-rank", "1"]
    done = run_here(*flags, "--targets", targets, "--out", tmp_path / "a")
    assert done.returncode == 0, done.stderr
    assert ("under 0.1 % trainable" in done.stderr) == expected


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (json.dumps(ROWS[0]) + "\n{broken\n", ["rows.jsonl:2"]),
        ('{"instruction": "no output"}\n', ["rows.jsonl:1", "output"]),
        ('{"instruction": "x", "output": " "}\n', ["row 1", "output is empty"]),
        ('{"instruction": "x", "output": "y", "input": 3}\n', ["row 1", "input no text"]),
        ("", ["no rows"]),
    ],
)
def test_bad_rows_are_refused(tmp_path, text: str, words: list[str]) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text(text)
    done = run_here("--base-model", BASE, "--out", tmp_path / "out", "--data", data)
    assert_refused(done, *words)
    assert not (tmp_path / "out").exists()


def test_data_that_cannot_be_used_is_refused(tmp_path) -> None:
    data = write_rows(tmp_path / "rows.jsonl", ROWS)
    flags = ["--base-model", BASE, "--out", tmp_path / "out", "--data"]
    assert_refused(run_here(*flags, tmp_path / "none.jsonl"), "check_contamination.py")
    assert_refused(run_here(*flags, data, "--cutoff", "4"), "0 rows", "--cutoff 4")
    assert_refused(run_here(*flags, data, "--val-set-size", "3"), "nothing to train on")
    (tmp_path / ".unfinished").write_text("python check_contamination.py apply\n")
    assert_refused(run_here(*flags, data), "unfinished", "finish it with")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--batch-size", 0], ["--batch-size"]),
        (["--weight-decay", "nan"], ["--weight-decay"]),
        (["--learning-rate", "inf"], ["--learning-rate"]),
        (["--weight-decay", -1, "--lora-dropout", 1], ["--weight-decay -1", "--lora-dropout 1"]),
        (["--warmup-steps", -1, "--val-set-size", -2], ["--warmup-steps -1", "--val-set-size -2"]),
        (["--shard"], ["torchrun"]),
        (["--shard", "--load-in-4bit"], ["exclude each other"]),
        (["--loss-norm", "x"], ["--loss-norm"]),
        (["--device", "abacus"], ["--device abacus"]),
        (["--device", "meta"], ["--device meta"]),
        (["--resume"], ["--resume", "missing"]),
        (["--targets", "x_proj"], ["x_proj", "q_proj"]),
        (["--targets", "up_proj,x_proj,y_proj"], ["x_proj, y_proj", "up_proj"]),
        (["--targets", "up_proj,"], ["--targets up_proj,"]),
        (["--targets", "lm_head"], ["lm_head", "no linear layer"]),
        (["--targets", "embed_tokens"], ["embed_tokens", "no linear layer"]),
    ],
)
def test_bad_flags_are_refused(tmp_path, flags: list[object], words: list[str]) -> None:
    data = write_rows(tmp_path / "rows.jsonl", ROWS)
    done = run_here("--base-model", BASE, "--out", tmp_path / "out", "--data", data, *flags)
    assert_refused(done, *words)
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_refused(tmp_path) -> None:
    data = write_rows(tmp_path / "rows.jsonl", ROWS)
    flags = ["--base-model", BASE, "--out", tmp_path / "out", "--data", data]
    assert_refused(run_here(*flags, "--device", "cuda"), "--device cuda")


def refused_base(base: object, tmp_path: Path, *words: str) -> str:
    """The line with which a base model is refused."""
    data = write_rows(tmp_path / "rows.jsonl", ROWS)
    done = run_here("--base-model", base, "--data", data, "--out", tmp_path / "out")
    assert_refused(done, "--base-model", *words)
    assert not (tmp_path / "out").exists()
    return done.stderr.splitlines()[-1]


def test_base_models_that_are_not_there_are_refused(tmp_path) -> None:
    refused_base("owner/name", tmp_path, "https://huggingface.co/owner/name", "HF_TOKEN", "licence")
    assert "HF_TOKEN" not in refused_base(tmp_path / "none", tmp_path, "no such folder")
    (tmp_path / "empty").mkdir()
    assert "HF_TOKEN" not in refused_base(tmp_path / "empty", tmp_path, "config.json is missing")


def without_tokenizer(base: Path) -> None:
    for path in base.glob("tokenizer*"):
        path.unlink()


def with_broken_config(base: Path) -> None:
    (base / "config.json").write_text("{broken")


def with_cut_weights(base: Path) -> None:
    path = base / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def without_a_weight(base: Path) -> None:
    state = load_file(base / "model.safetensors")
    state.pop("model.layers.1.mlp.up_proj.weight")
    save_file(state, base / "model.safetensors", {"format": "pt"})


def with_a_pickle(base: Path) -> None:
    (base / "model.safetensors").rename(base / "pytorch_model.bin")


def with_few_embeddings(base: Path) -> None:
    config = LlamaConfig(**{**SMALL_LLAMA, "vocab_size": 50})
    AutoModelForCausalLM.from_config(config).save_pretrained(base)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (without_tokenizer, ["token"]),
        (with_broken_config, []),
        (with_cut_weights, []),
        (without_a_weight, ["lack weights", "up_proj"]),
        (with_a_pickle, []),
        (with_few_embeddings, ["900 tokens", "50"]),
    ],
)
def test_broken_base_models_are_refused(tmp_path, spoil: Callable, words: list[str]) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(BASE, copy)
    spoil(copy)
    assert "HF_TOKEN" not in refused_base(copy, tmp_path, *words)


CODE_OF_A_MODEL = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM

Path("{mark}").touch()


class MyConfig(LlamaConfig):
    model_type = "mine"


class MyModel(LlamaForCausalLM):
    config_class = MyConfig
"""


def test_no_code_of_a_models_folder_runs(tmp_path) -> None:
    """Not even for a user who answers yes to whatever is asked."""
    base = tmp_path / "base"
    shutil.copytree(BASE, base)
    mark = tmp_path / "the_code_ran"
    (base / "mine.py").write_text(CODE_OF_A_MODEL.replace("{mark}", str(mark)))
    config = json.loads((base / "config.json").read_text())
    config["model_type"] = "mine"
    config["auto_map"] = {"AutoConfig": "mine.MyConfig", "AutoModelForCausalLM": "mine.MyModel"}
    (base / "config.json").write_text(json.dumps(config))

    data = write_rows(tmp_path / "rows.jsonl", ROWS)
    command = [sys.executable, str(ROOT / "finetune.py"), "--base-model", str(base)]
    command += ["--data", str(data), "--out", str(tmp_path / "out")]
    done = subprocess.run(command, input="y\n" * 20, capture_output=True, text=True)
    assert_refused(done, "--base-model")
    assert not mark.exists()

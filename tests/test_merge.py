"""Holds: merged weights are bit for bit those of PEFT's merge; several adapters are summed exactly;
the merged model computes what base + adapter computes; memory does not grow with the model; what
does not fit, and whatever stops a merge, leaves nothing behind."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, assert_refused, run_script
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

import merge
from build_dataset import UserError
from finetune import base_fingerprint

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
LLAMA = {
    "vocab_size": 160,
    "hidden_size": 96,
    "intermediate_size": 224,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
GPT2 = {"vocab_size": 160, "n_embd": 96, "n_layer": 2, "n_head": 4, "n_positions": 32}
TARGETS = ["q_proj", "v_proj", "gate_proj", "up_proj", "down_proj"]
PARTLY = {"target_modules": ["q_proj", "up_proj"]}
ENDS = {"target_modules": ["q_proj", "embed_tokens", "lm_head"]}
CONV1D = {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}
CASES = {  # name: (changes of the base's config, those of the adapter's, number of changed tensors)
    "lora": ({}, {}, 10),
    "rank 1": ({}, {"r": 1, "lora_alpha": 16}, 10),
    "rslora": ({}, {"use_rslora": True}, 10),
    "dora": ({}, {"use_dora": True}, 10),
    "patterns": (
        {},
        {
            "rank_pattern": {"up_proj": 7, "layers.1.self_attn.q_proj": 2},
            "alpha_pattern": {r"layers\.[0]\..*": 11},
            "use_rslora": True,
        },
        10,
    ),  # fmt: skip
    "modules_to_save": ({}, {**PARTLY, "modules_to_save": ["lm_head", "norm", "o_proj"]}, 12),
    "layers": ({}, {"layers_to_transform": [1]}, 5),
    "bias all": ({"attention_bias": True}, {**PARTLY, "bias": "all"}, 12),
    "bias lora_only": ({"attention_bias": True}, {**PARTLY, "bias": "lora_only"}, 6),
    "lora_bias": (
        {"attention_bias": True},
        {"target_modules": ["q_proj", "o_proj"], "lora_bias": True},
        8,
    ),
    "ends": ({}, ENDS, 4),
    "ends dora": ({}, {**ENDS, "use_dora": True}, 4),
    "tied": ({"tie_word_embeddings": True}, {}, 10),
    "tied head saved": (
        {"tie_word_embeddings": True},
        {**PARTLY, "modules_to_save": ["lm_head"]},
        5,
    ),
    "tied embedding saved": (
        {"tie_word_embeddings": True},
        {**PARTLY, "modules_to_save": ["embed_tokens"]},
        5,
    ),
    "tied, tied in training": (
        {"tie_word_embeddings": True},
        {**PARTLY, "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
        6,
    ),
    "tied embedding": (
        {"tie_word_embeddings": True},
        {"target_modules": ["q_proj", "embed_tokens"]},
        3,
    ),
    "tied head": ({"tie_word_embeddings": True}, {"target_modules": ["q_proj", "lm_head"]}, 3),
    "tied both dora": ({"tie_word_embeddings": True}, {**ENDS, "use_dora": True}, 4),
    "conv1d": ({"model_type": "gpt2"}, CONV1D, 8),
    "conv1d dora": ({"model_type": "gpt2"}, {**CONV1D, "use_dora": True}, 8),
    "conv1d, embedding dora": (
        {"model_type": "gpt2"},
        {"target_modules": ["c_proj", "wte"], "fan_in_fan_out": True, "use_dora": True},
        5,
    ),
}


def make_base(folder: Path, dtype: torch.dtype, shards: bool = False, **changes) -> Path:
    torch.manual_seed(0)
    gpt2 = changes.pop("model_type", "llama") == "gpt2"
    config = GPT2Config(**{**GPT2, **changes}) if gpt2 else LlamaConfig(**{**LLAMA, **changes})
    model = AutoModelForCausalLM.from_config(config).to(dtype)
    model.save_pretrained(folder, max_shard_size="200KB" if shards else "1GB")
    return folder


def make_adapter(folder: Path, base: Path, seed: int = 1, **config) -> Path:
    """A trained-looking adapter: everything that training would move is moved."""
    torch.manual_seed(seed)
    settings = {"r": 4, "lora_alpha": 6, "target_modules": TARGETS, "task_type": "CAUSAL_LM"}
    model = AutoModelForCausalLM.from_pretrained(base)
    model = get_peft_model(model, LoraConfig(**{**settings, **config}))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    parts = [load_file(path) for path in sorted(folder.glob("*.safetensors"))]
    return {name: tensor for part in parts for name, tensor in part.items()}


def run_merge(base: Path, out: Path, *args: object) -> dict:
    merge.main([*map(str, args), "--base-model", str(base), "--out", str(out)])
    return json.loads((out / "run.json").read_text())


def merged_by_peft(base: Path, adapter: Path, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """PEFT's merge. Where it would add a LoRA to a tensor that head and embedding share, the head
    is first made its own, as PEFT's own warning advises: else its merge is not what was trained."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    config = json.loads((adapter / "adapter_config.json").read_text())
    if {"embed_tokens", "lm_head", "wte"} & set(config["target_modules"]):
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
        model.config.tie_word_embeddings = False
    return PeftModel.from_pretrained(model, adapter).merge_and_unload().state_dict()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.filterwarnings("ignore")
def test_bit_identical_to_peft(tmp_path, monkeypatch, dtype, case: str) -> None:
    monkeypatch.setattr(merge, "BLOCK_ELEMENTS", 1024)  # blocks of 64 rows
    changes, config, count = CASES[case]
    base = make_base(
        tmp_path / "base", dtype, shards=case in ("lora", "ends", "tied head"), **changes
    )
    adapter = make_adapter(tmp_path / "adapter", base, **config)
    run = run_merge(base, tmp_path / "m", "--adapter", adapter)
    expected = merged_by_peft(base, adapter, dtype)
    loaded, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "m", dtype=dtype, output_loading_info=True
    )
    assert not any(info.values()), info
    before, ours = weights(base), weights(tmp_path / "m")
    for name, tensor in loaded.state_dict().items():
        assert tensor.dtype == expected[name].dtype == dtype
        assert torch.equal(tensor, expected[name]), name
    assert all(tensor.dtype == dtype for tensor in ours.values())
    changed = {n for n in ours if n not in before or not torch.equal(ours[n], before[n])}
    if "lm_head.weight" in changed - before.keys():  # made its own, for the embedding has moved
        ends = [before[n] for n in before if "embed_tokens" in n or "wte" in n]
        changed -= {"lm_head.weight"} if torch.equal(ours["lm_head.weight"], ends[0]) else set()
    assert len(changed) == count, sorted(changed)
    assert run["counts"]["changed"] == count


def test_adapter_in_half_precision_and_bare_backbone_names(tmp_path) -> None:
    """bfloat16 factors; a GPT-2 checkpoint without "transformer." before its names."""
    base = make_base(tmp_path / "base", torch.float16, model_type="gpt2")
    adapter = make_adapter(tmp_path / "adapter", base, **CONV1D)
    file = adapter / "adapter_model.safetensors"
    save_file({k: t.bfloat16() for k, t in load_file(file).items()}, file)
    expected = merged_by_peft(base, adapter, torch.float16)
    bare = {k.removeprefix("transformer."): t for k, t in weights(base).items()}
    save_file(bare, base / "model.safetensors", metadata={"format": "pt"})
    run_merge(base, tmp_path / "m", "--adapter", adapter)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float16).state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.items())


def test_real_sizes_are_bit_identical_too(tmp_path) -> None:
    """Matrices of several default blocks, with as many threads as there are cores."""
    sizes = {"hidden_size": 1152, "intermediate_size": 3080, "num_hidden_layers": 1}
    base = make_base(tmp_path / "base", torch.bfloat16, **sizes)
    adapter = make_adapter(tmp_path / "adapter", base, r=16)
    run_merge(base, tmp_path / "m", "--adapter", adapter)
    expected, ours = merged_by_peft(base, adapter, torch.bfloat16), weights(tmp_path / "m")
    assert ours.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in ours.items())


def neighbours(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The next smaller and larger number of a 2- or 4-byte float type, in float64."""
    ints = torch.int16 if x.dtype.itemsize == 2 else torch.int32
    bits = x.view(ints)
    away, back = (bits + 1).view(x.dtype).double(), (bits - 1).view(x.dtype).double()
    return torch.where(x > 0, back, away), torch.where(x > 0, away, back)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["lora", "dora", "modules_to_save"])
def test_two_adapters_are_summed_exactly_and_rounded_once(tmp_path, dtype, kind: str) -> None:
    base = make_base(tmp_path / "base", dtype)
    configs = {"dora": {"use_dora": True}, "modules_to_save": {"modules_to_save": ["lm_head"]}}
    one = make_adapter(tmp_path / "1", base, 1, **configs.get(kind, {}))
    two = make_adapter(tmp_path / "2", base, 2, r=8)
    run_merge(base, tmp_path / "m", "--adapter", one, "--adapter", f"{two}:-0.5")
    ours, before = weights(tmp_path / "m"), weights(base)
    files = [load_file(folder / "adapter_model.safetensors") for folder in (one, two)]
    for name, new in ours.items():
        stem = "base_model.model." + name.removesuffix(".weight")
        old = before[name].double()
        exact = old.clone()
        for tensors, weight, scale in zip(files, (1.0, -0.5), (6 / 4, 6 / 8), strict=True):
            if f"{stem}.lora_A.weight" in tensors:
                a, b = (tensors[f"{stem}.lora_{m}.weight"].double() for m in "AB")
                moved = old + scale * (b @ a)
                if f"{stem}.lora_magnitude_vector" in tensors:
                    norms = moved.square().sum(1).sqrt()
                    moved *= (tensors[f"{stem}.lora_magnitude_vector"] / norms)[:, None]
                exact += weight * (moved - old)
            elif f"{stem}.weight" in tensors:
                exact += weight * (tensors[f"{stem}.weight"].double() - old)
        off = (new.double() - exact).abs()
        for neighbour in neighbours(new):  # none of the two is nearer
            nearer = (neighbour - exact).abs() < off * (1 - 1e-6)
            assert not nearer.any(), (name, nearer.sum())


def test_rounding_once_where_torch_rounds_twice() -> None:
    tie = 1 + 2.0**-8  # halfway between two bfloat16
    exact = torch.tensor(
        [tie, tie + 2.0**-40, tie - 2.0**-40, -tie - 2.0**-40], dtype=torch.float64
    )
    assert exact.to(torch.bfloat16).tolist() == [1, 1, 1, -1]
    up = 1 + 2.0**-7
    assert merge.round_once(exact, torch.bfloat16).tolist() == [1, up, 1, -up]


def test_a_weight_scales_the_change(tmp_path) -> None:
    base = make_base(tmp_path / "base", torch.float32)
    adapter = make_adapter(tmp_path / "adapter", base, use_dora=True)
    run_merge(base, tmp_path / "1", "--adapter", adapter)
    run_merge(base, tmp_path / "3", "--adapter", f"{adapter}:3")
    before, once, thrice = (weights(p) for p in (base, tmp_path / "1", tmp_path / "3"))
    for name in before:
        change = 3 * (once[name].double() - before[name])
        assert torch.allclose(thrice[name] - before[name].double(), change, atol=1e-6), name


# --- what base + adapter computes -----------------------------------------------------------------


@pytest.mark.parametrize("case", ["ends", "tied both dora", "tied embedding", "conv1d dora"])
def test_merged_logits_are_those_of_base_and_adapter(tmp_path, case: str) -> None:
    base = make_base(tmp_path / "base", torch.float32, **CASES[case][0])
    adapter = make_adapter(tmp_path / "adapter", base, **CASES[case][1])
    run = run_merge(base, tmp_path / "m", "--adapter", adapter, "--check-logits")
    assert run["logits"]["to_base_and_adapter"] < 1e-5 < 1e-2 < run["logits"]["to_base"]
    ids = torch.arange(12)[None]
    model = AutoModelForCausalLM.from_pretrained(base)
    both = PeftModel.from_pretrained(model, adapter)(ids).logits
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "m")(ids).logits
    assert (merged - both).abs().max() < 1e-4 * both.abs().max()


def test_check_logits_sees_a_fault(tmp_path, monkeypatch) -> None:
    base = make_base(tmp_path / "base", torch.float32)
    adapter = make_adapter(tmp_path / "adapter", base)
    scaling = merge.scaling
    monkeypatch.setattr(merge, "scaling", lambda *found: 1.5 * scaling(*found))
    with pytest.raises(UserError, match="--check-logits"):
        run_merge(base, tmp_path / "m", "--adapter", adapter, "--check-logits")
    assert {path.name for path in tmp_path.iterdir()} == {"base", "adapter"}

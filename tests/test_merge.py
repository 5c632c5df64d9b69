"""Holds: merged weights are bit for bit those of PEFT's merge, for every kind and option that is
merged module by module and for those that are merged plainly; several adapters are summed exactly;
the merged model computes what base + adapter computes; memory is one output shard; what does not
fit is refused in one line."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
from conftest import ROOT, assert_refused, run_script
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, MixtralConfig

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
    "exclude": ({}, {"exclude_modules": ["up_proj"]}, 8),
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


def assert_equal_to_peft(base: Path, adapter: Path, merged: Path, dtype: torch.dtype) -> int:
    """Every tensor of the loaded folder has the bits of PEFT's merge; how many of them changed."""
    expected = merged_by_peft(base, adapter, dtype)
    loaded, info = AutoModelForCausalLM.from_pretrained(
        merged, dtype=dtype, output_loading_info=True
    )
    assert not any(info.values()), info
    ours = loaded.state_dict()
    assert ours.keys() == expected.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == expected[name].dtype == dtype
        assert torch.equal(tensor, expected[name]), name
    before = AutoModelForCausalLM.from_pretrained(base, dtype=dtype).state_dict()
    return sum(not torch.equal(ours[name], before[name]) for name in ours)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.filterwarnings("ignore")
def test_lora_is_bit_identical_to_peft(tmp_path, capsys, dtype, case: str) -> None:
    changes, config, count = CASES[case]
    in_shards = case in ("lora", "lora_bias", "ends", "tied head")
    base = make_base(tmp_path / "base", dtype, shards=in_shards, **changes)
    adapter = make_adapter(tmp_path / "adapter", base, **config)
    run_merge(base, tmp_path / "m", "--adapter", adapter)
    assert assert_equal_to_peft(base, adapter, tmp_path / "m", dtype) == count
    plainly = {"modules_to_save", "bias", "ensure_weight_tying"} & config.keys()
    plainly |= {"embed_tokens", "lm_head", "wte"} & set(config.get("target_modules", ()))
    assert ("whole model in memory" in capsys.readouterr().err) == bool(plainly)


KINDS = {  # adapters that are merged module by module: PEFT's class, its options
    "ia3": (peft.IA3Config, {"feedforward_modules": ["down_proj"]}),
    "vera": (peft.VeraConfig, {"r": 4}),
    "vera key": (peft.VeraConfig, {"r": 3, "d_initial": 0.3, "projection_prng_key": 7}),
    "loha": (peft.LoHaConfig, {"r": 4, "alpha": 6}),
    "loha patterns": (
        peft.LoHaConfig,
        {"r": 4, "alpha": 6, "rank_pattern": {"up_proj": 2}, "alpha_pattern": {"q_proj": 3}},
    ),
    "lokr": (peft.LoKrConfig, {"r": 4, "alpha": 6}),
    "lokr both": (
        peft.LoKrConfig,
        {"r": 2, "alpha": 6, "decompose_both": True, "decompose_factor": 4},
    ),
    "lokr patterns": (
        peft.LoKrConfig,
        {"r": 4, "alpha": 6, "rank_pattern": {"up_proj": 2}, "alpha_pattern": {"q_proj": 3}},
    ),
    "oft": (peft.OFTConfig, {"r": 0, "oft_block_size": 8}),
    "oft rank": (peft.OFTConfig, {"r": 4, "oft_block_size": 0, "use_cayley_neumann": True}),
    "oft exact": (
        peft.OFTConfig,
        {"r": 0, "oft_block_size": 8, "use_cayley_neumann": False},
    ),
    "boft": (peft.BOFTConfig, {"boft_block_size": 8, "boft_n_butterfly_factor": 2}),
    "boft blocks": (peft.BOFTConfig, {"boft_block_size": 0, "boft_block_num": 4}),
    "hra": (peft.HRAConfig, {"r": 4}),
    "hra gs": (peft.HRAConfig, {"r": 4, "apply_GS": True}),
    "fourierft": (
        peft.FourierFTConfig,
        {"n_frequency": 50, "scaling": 90.0, "random_loc_seed": 5},
    ),
    "randlora": (
        peft.RandLoraConfig,
        {"r": 4, "randlora_alpha": 9, "projection_prng_key": 3},
    ),
    "miss": (peft.MissConfig, {"r": 4}),
    "miss mini": (peft.MissConfig, {"r": 4, "mini_r": 2}),
    "vblora": (peft.VBLoRAConfig, {"r": 4, "num_vectors": 16, "vector_length": 16, "topk": 3}),
}


def make_other(folder: Path, base: Path, kind: type, targets: list[str], **options) -> Path:
    """An adapter of another kind than LoRA, moved as training would move it."""
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(base)
    config = kind(target_modules=targets, task_type="CAUSAL_LM", **options)
    model = get_peft_model(model, config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", KINDS)
@pytest.mark.filterwarnings("ignore")
def test_other_kinds_are_bit_identical_to_peft(tmp_path, capsys, dtype, name: str) -> None:
    kind, options = KINDS[name]
    base = make_base(tmp_path / "base", dtype)
    adapter = make_other(tmp_path / "adapter", base, kind, TARGETS, **options)
    run_merge(base, tmp_path / "m", "--adapter", adapter)
    assert assert_equal_to_peft(base, adapter, tmp_path / "m", dtype) == 10
    assert "whole model in memory" not in capsys.readouterr().err


CONV1D_KINDS = {
    "ia3": (peft.IA3Config, {"feedforward_modules": ["c_proj"], "fan_in_fan_out": True}),
    "vera": (peft.VeraConfig, {"r": 4, "fan_in_fan_out": True}),
    "vblora": (
        peft.VBLoRAConfig,
        {"r": 4, "num_vectors": 16, "vector_length": 16, "topk": 3, "fan_in_fan_out": True},
    ),
    "fourierft": (peft.FourierFTConfig, {"n_frequency": 50, "fan_in_fan_out": True}),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", CONV1D_KINDS)
@pytest.mark.filterwarnings("ignore")
def test_other_kinds_on_conv1d(tmp_path, dtype, name: str) -> None:
    kind, options = CONV1D_KINDS[name]
    base = make_base(tmp_path / "base", dtype, model_type="gpt2")
    adapter = make_other(tmp_path / "adapter", base, kind, ["c_attn", "c_proj"], **options)
    run_merge(base, tmp_path / "m", "--adapter", adapter)
    assert assert_equal_to_peft(base, adapter, tmp_path / "m", dtype) >= 6


def test_every_option_that_is_merged_by_module_is_tried_above() -> None:
    """merge.BY_MODULE lists what was seen equal; here, that each of it is in one of the cases."""
    tried = {"LORA": {"r", "lora_alpha", "init_lora_weights"}}
    for _, config, _ in CASES.values():
        tried["LORA"] |= config.keys()
    for kind, options in [*KINDS.values(), *CONV1D_KINDS.values()]:
        tried.setdefault(kind().peft_type.value, set()).update(options)
    assert tried.keys() == merge.BY_MODULE.keys()
    for kind, options in merge.BY_MODULE.items():
        assert options <= tried[kind], (kind, options - tried[kind])


PLAINLY = {  # adapters that only PEFT's merge of the whole model gets right: options of LoRA
    "pissa": {"init_lora_weights": "pissa"},
    "olora": {"init_lora_weights": "olora"},
    "gaussian": {"init_lora_weights": "gaussian"},
    "tokens": {"trainable_token_indices": [1, 5]},
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("case", PLAINLY)
@pytest.mark.filterwarnings("ignore")
def test_what_rewrites_the_base_is_merged_plainly(tmp_path, capsys, dtype, case: str) -> None:
    base = make_base(tmp_path / "base", dtype)
    adapter = make_adapter(tmp_path / "adapter", base, **PLAINLY[case])
    run_merge(base, tmp_path / "m", "--adapter", adapter)
    assert "whole model in memory" in capsys.readouterr().err
    assert assert_equal_to_peft(base, adapter, tmp_path / "m", dtype) >= 10
    with pytest.raises(UserError, match="alone only"):
        run_merge(base, tmp_path / "n", "--adapter", f"{adapter}:0.5")


MIXTRAL = {
    "vocab_size": 160,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 4,
}
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("experts", [[], EXPERTS], ids=["attention", "experts"])
@pytest.mark.filterwarnings("ignore")
def test_experts_that_the_disk_has_one_by_one(tmp_path, capsys, dtype, experts: list) -> None:
    """transformers fuses them while it loads: tuned ones are merged plainly, others are copied."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(MixtralConfig(**MIXTRAL)).to(dtype)
    model.save_pretrained(tmp_path / "base")
    base = tmp_path / "base"
    config = {"target_modules": ["q_proj"], "target_parameters": experts or None}
    adapter = make_adapter(tmp_path / "adapter", base, **config)
    run_merge(base, tmp_path / "m", "--adapter", adapter)
    assert ("whole model in memory" in capsys.readouterr().err) == bool(experts)
    count = 2 + 2 * len(experts)
    assert assert_equal_to_peft(base, adapter, tmp_path / "m", dtype) == count
    assert weights(base).keys() == weights(tmp_path / "m").keys()


def test_a_key_that_transformers_drops_is_copied(tmp_path, capsys) -> None:
    """Early Llama files carry rotary_emb.inv_freq."""
    base = make_base(tmp_path / "base", torch.bfloat16)
    adapter = make_adapter(tmp_path / "adapter", base)
    key = "model.layers.0.self_attn.rotary_emb.inv_freq"
    edit_tensors(base / "model.safetensors", lambda tensors: {**tensors, key: torch.ones(12)})
    run_merge(base, tmp_path / "m", "--adapter", adapter)
    assert torch.equal(weights(tmp_path / "m")[key], torch.ones(12))
    assert "whole model in memory" not in capsys.readouterr().err
    expected = merged_by_peft(base, adapter, torch.bfloat16)
    ours = weights(tmp_path / "m")
    assert all(torch.equal(ours[name], expected[name]) for name in expected)


@pytest.mark.parametrize("kilobytes", [20, 50, 75, 200])
@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_output_shards_are_small_whatever_the_input(
    tmp_path, monkeypatch, model_type: str, kilobytes: int
) -> None:
    """And a module's weight and bias are merged together wherever a shard ends."""
    monkeypatch.setattr(merge, "SHARD_SIZE", f"{kilobytes}KB")
    gpt2 = model_type == "gpt2"
    bias = {} if gpt2 else {"attention_bias": True, "mlp_bias": True}
    base = make_base(tmp_path / "base", torch.bfloat16, model_type=model_type, **bias)
    config = CONV1D if gpt2 else {"lora_bias": True}
    adapter = make_adapter(tmp_path / "adapter", base, **config)
    run = run_merge(base, tmp_path / "m", "--adapter", adapter)
    shards = sorted((tmp_path / "m").glob("*.safetensors"))
    assert len(shards) >= 2
    assert {path.name for path in shards} < run["outputs"].keys()
    largest = max(tensor.nbytes for tensor in weights(base).values())
    limit = max(1000 * kilobytes, largest + 2000)  # a larger tensor has a shard of its own
    assert max(path.stat().st_size for path in shards) < limit + 5000
    assert assert_equal_to_peft(base, adapter, tmp_path / "m", torch.bfloat16) >= 8


@pytest.mark.filterwarnings("ignore")
def test_an_embedding_that_was_saved_with_the_adapter_is_taken(tmp_path, capsys) -> None:
    """PEFT puts it into the base; the base's own is not what the adapter was trained with."""
    base = make_base(tmp_path / "base", torch.float32)
    adapter = make_adapter(tmp_path / "adapter", base)
    saved = {"base_model.model.model.embed_tokens.weight": torch.randn(160, 96)}
    edit_tensors(adapter / "adapter_model.safetensors", lambda tensors: {**tensors, **saved})
    run_merge(base, tmp_path / "m", "--adapter", adapter)
    assert "whole model in memory" in capsys.readouterr().err
    assert assert_equal_to_peft(base, adapter, tmp_path / "m", torch.float32) == 11


@pytest.mark.filterwarnings("ignore")
def test_other_kinds_are_merged_plainly(tmp_path, capsys) -> None:
    base = make_base(tmp_path / "base", torch.float32)
    options = {"init_r": 6, "target_r": 4, "total_step": 10}
    adapter = make_other(tmp_path / "adapter", base, peft.AdaLoraConfig, TARGETS, **options)
    run_merge(base, tmp_path / "m", "--adapter", adapter)
    assert "of the kind ADALORA" in capsys.readouterr().err
    assert assert_equal_to_peft(base, adapter, tmp_path / "m", torch.float32) == 10


@pytest.mark.filterwarnings("ignore")
def test_a_learned_prompt_is_refused(tmp_path) -> None:
    base = make_base(tmp_path / "base", torch.float32)
    model = AutoModelForCausalLM.from_pretrained(base)
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    with pytest.raises(UserError, match="a learned prompt"):
        run_merge(base, tmp_path / "m", "--adapter", tmp_path / "adapter")


def test_a_base_in_float64_is_summed_in_float64(tmp_path) -> None:
    base = make_base(tmp_path / "base", torch.float64)
    adapter = make_adapter(tmp_path / "adapter", base)
    run_merge(base, tmp_path / "m", "--adapter", adapter)
    assert_equal_to_peft(base, adapter, tmp_path / "m", torch.float64)


def test_what_peft_cannot_merge_is_one_line(tmp_path) -> None:
    base = make_base(tmp_path / "base", torch.float32)  # without a bias that could be added to
    adapter = make_adapter(tmp_path / "adapter", base, lora_bias=True)
    with pytest.raises(UserError, match="PEFT cannot merge model.layers.0"):
        run_merge(base, tmp_path / "m", "--adapter", adapter)


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


def neighbours(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The next smaller and larger number of a 2- or 4-byte float type, in float64."""
    ints = torch.int16 if x.dtype.itemsize == 2 else torch.int32
    bits = x.view(ints)
    away, back = (bits + 1).view(x.dtype).double(), (bits - 1).view(x.dtype).double()
    return torch.where(x > 0, back, away), torch.where(x > 0, away, back)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rslora", [False, True], ids=["lora", "rslora"])
def test_two_adapters_are_summed_exactly_and_rounded_once(tmp_path, dtype, rslora) -> None:
    base = make_base(tmp_path / "base", dtype)
    one = make_adapter(tmp_path / "1", base, 1, use_rslora=rslora)
    two = make_adapter(tmp_path / "2", base, 2, r=8, target_modules=["up_proj", "o_proj"])
    scales = (6 / 4**0.5 if rslora else 6 / 4, 6 / 8)
    run_merge(base, tmp_path / "m", "--adapter", one, "--adapter", f"{two}:-0.5")
    ours, before = weights(tmp_path / "m"), weights(base)
    files = [load_file(folder / "adapter_model.safetensors") for folder in (one, two)]
    for name, new in ours.items():
        stem = "base_model.model." + name.removesuffix(".weight")
        exact = before[name].double()
        for tensors, weight, scale in zip(files, (1.0, -0.5), scales, strict=True):
            if f"{stem}.lora_A.weight" in tensors:
                a = tensors[f"{stem}.lora_A.weight"].double()
                b = tensors[f"{stem}.lora_B.weight"].double()
                exact += weight * scale * (b @ a)
        off = (new.double() - exact).abs()
        for neighbour in neighbours(new):  # none of the two is nearer
            nearer = (neighbour - exact).abs() < off * (1 - 1e-3)
            assert not nearer.any(), (name, nearer.sum())
    changed = {name for name in ours if not torch.equal(ours[name], before[name])}
    assert len(changed) == 12  # up_proj of both, o_proj of the second alone


@pytest.mark.filterwarnings("ignore")
def test_what_cannot_be_summed_is_refused_by_name(small, tmp_path) -> None:
    base, plain = small
    for options, words in (
        ({"use_dora": True}, "use_dora = True"),
        ({"modules_to_save": ["norm"]}, "alone only"),
    ):
        adapter = make_adapter(tmp_path / words[:4], base, **options)
        with pytest.raises(UserError, match=words):
            run_merge(base, tmp_path / "m", "--adapter", plain, "--adapter", adapter)
        with pytest.raises(UserError, match=words):
            run_merge(base, tmp_path / "m", "--adapter", f"{adapter}:2")
    ia3 = make_other(tmp_path / "ia3", base, *KINDS["ia3"][:1], TARGETS, **KINDS["ia3"][1])
    with pytest.raises(UserError, match="peft_type"):
        run_merge(base, tmp_path / "m", "--adapter", f"{ia3}:2")
    assert not (tmp_path / "m").exists()


def test_a_weight_scales_the_change(tmp_path) -> None:
    base = make_base(tmp_path / "base", torch.float32)
    adapter = make_adapter(tmp_path / "adapter", base, use_rslora=True)
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
    merge_layer = merge.merge_layer

    def wrong(plan, path):
        return {name: 1.01 * tensor for name, tensor in merge_layer(plan, path).items()}

    monkeypatch.setattr(merge, "merge_layer", wrong)
    with pytest.raises(UserError, match="--check-logits"):
        run_merge(base, tmp_path / "m", "--adapter", adapter, "--check-logits")
    assert not (tmp_path / "m/run.json").exists()


# --- the folder: lineage, card, proof -------------------------------------------------------------


def test_chains_keep_their_lineage_and_cards_their_own_words(tmp_path) -> None:
    base = make_base(tmp_path / "base", torch.float32)
    (base / "README.md").write_text("---\nlicense: llama2\n---\n# The base's own card\n")
    (base / "LICENSE.txt").write_text("Community licence")
    one, two = (make_adapter(tmp_path / str(seed), base, seed) for seed in (1, 2))
    run_merge(base, tmp_path / "m", "--adapter", one)
    run = run_merge(tmp_path / "m", tmp_path / "n", "--adapter", f"{two}:0.5")
    assert [step["base_model"] for step in run["lineage"]] == [str(base), str(tmp_path / "m")]
    assert [step["adapters"] for step in run["lineage"]] == [{str(one): 1}, {str(two): 0.5}]
    card = (tmp_path / "m/README.md").read_text()
    assert "llama2" in card and "own card" not in card and str(one) in card
    assert (tmp_path / "n/LICENSE.txt").read_text() == "Community licence"
    assert {"README.md", "run.json", "config.json"} < {p.name for p in (tmp_path / "n").iterdir()}
    assert run["adapters"][0]["sha256"] and run["counts"] == {"tuned_modules": 10}


def test_only_known_files_are_copied(tmp_path) -> None:
    base = make_base(tmp_path / "base", torch.float32)
    for name in ("code.py", "state.pkl", "notes.txt", "optimizer.npz", "tokenizer.model"):
        (base / name).write_text(name)
    run = run_merge(base, tmp_path / "m", "--adapter", make_adapter(tmp_path / "a", base))
    names = {path.name for path in (tmp_path / "m").iterdir()}
    usual = {"config.json", "generation_config.json", "model.safetensors", "README.md"}
    assert names == usual | {"tokenizer.model", "run.json"}
    assert run["outputs"].keys() == usual | {"tokenizer.model"}


# --- another base, a partner, 4-bit training ------------------------------------------------------


def fingerprinted(adapter: Path, base: Path, load_in_4bit: bool = False) -> Path:
    known = {**base_fingerprint(base), "base_model": str(base), "load_in_4bit": load_in_4bit}
    (adapter / "base_fingerprint.json").write_text(json.dumps(known))
    return adapter


@pytest.fixture
def pair(tmp_path) -> tuple[Path, Path, Path]:
    """A base, an adapter that knows it, and another fine-tune of the base."""
    base = make_base(tmp_path / "base", torch.bfloat16)
    adapter = fingerprinted(make_adapter(tmp_path / "adapter", base), base)
    other = tmp_path / "other"
    shutil.copytree(base, other)
    tensors = {n: t + 0.01 if t.dim() > 1 else t for n, t in weights(base).items()}
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    return base, adapter, other


def test_the_base_is_known_by_its_fingerprint(pair, tmp_path, capsys) -> None:
    base, adapter, other = pair
    run = run_merge(base, tmp_path / "m", "--adapter", adapter)
    assert "fingerprints agree" in capsys.readouterr().out
    assert len(run["warnings"]) == 1 and "flagged" in run["warnings"][0]
    with pytest.raises(UserError, match="add --foreign-base"):
        run_merge(other, tmp_path / "n", "--adapter", adapter)
    run = run_merge(other, tmp_path / "n", "--adapter", adapter, "--foreign-base")
    table = "\n".join(run["norms"])
    assert table in capsys.readouterr().out and "layer 0" in table and "layer 1" in table
    assert any("differs in its tensors" in warning for warning in run["warnings"])
    assert any("--partner-check" in warning for warning in run["warnings"])
    assert "--partner-check" in (tmp_path / "n/README.md").read_text()
    assert torch.equal(
        weights(tmp_path / "n")["model.layers.0.mlp.up_proj.weight"],
        merged_by_peft(other, adapter, torch.bfloat16)["model.layers.0.mlp.up_proj.weight"],
    )
    (adapter / "base_fingerprint.json").unlink()
    run = run_merge(other, tmp_path / "o", "--adapter", adapter)
    assert any("base_fingerprint.json" in warning for warning in run["warnings"])


def squares(adapter: Path, base: dict, layer: str) -> tuple[float, float]:
    """Sums of squares of the changed weights of a layer, and of their changes."""
    tensors, found = load_file(adapter / "adapter_model.safetensors"), [0.0, 0.0]
    for key in (k for k in tensors if layer in k and "lora_A" in k):
        stem = key.removesuffix(".lora_A.weight")
        change = 6 / 4 * (tensors[f"{stem}.lora_B.weight"].double() @ tensors[key].double())
        found[1] += change.square().sum().item()
        name = stem.removeprefix("base_model.model.") + ".weight"
        found[0] += base[name].double().square().sum().item()
    return found[0], found[1]


def test_norms_of_the_table(pair, tmp_path) -> None:
    _, adapter, other = pair
    run = run_merge(other, tmp_path / "n", "--adapter", adapter, "--foreign-base")
    row = next(line for line in run["norms"] if "layer 1" in line)
    shown = [float(cell) for cell in row.split("|")[2:5]]
    # the table's change is that of the numbers written, rounded to bfloat16
    w, change = (square**0.5 for square in squares(adapter, weights(other), "layers.1."))
    assert shown == pytest.approx([w, change, change / w], rel=1e-3)


def test_another_architecture_is_refused(pair, tmp_path) -> None:
    _, adapter, other = pair
    config = {"model_type": "gpt2", "n_embd": 96, "n_layer": 2, "n_head": 4, "vocab_size": 160}
    (other / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="does not fit"):
        run_merge(other, tmp_path / "n", "--adapter", adapter, "--foreign-base")


def contaminated(folder: Path, decided: bool) -> Path:
    """What check_contamination.py leaves: two pairs, of which one is decided, or both."""
    folder.mkdir()
    pairs = [{"pair_id": f"p{i}", "train_id": f"t{i}"} for i in range(2)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(p) + "\n" for p in pairs))
    verdicts = [{"pair_id": p["pair_id"], "verdict": "not-a-leak"} for p in pairs[: 1 + decided]]
    (folder / "decisions.jsonl").write_text("".join(json.dumps(v) + "\n" for v in verdicts))
    (folder / "run.json").write_text("{}")
    return folder


def test_the_papers_rule_about_partners(pair, tmp_path) -> None:
    _, adapter, other = pair
    dirty, clean = contaminated(tmp_path / "dirty", False), contaminated(tmp_path / "clean", True)
    args = ["--adapter", adapter, "--foreign-base", "--partner-check"]
    with pytest.raises(UserError, match="1 pairs are not decided not-a-leak"):
        run_merge(other, tmp_path / "n", *args, dirty)
    run = run_merge(other, tmp_path / "n", *args, dirty, "--allow-contaminated")
    assert any("1 pairs" in warning for warning in run["warnings"])
    assert "1 pairs" in (tmp_path / "n/README.md").read_text()
    run = run_merge(other, tmp_path / "o", *args, clean)
    assert not any("pairs" in w or "partner" in w for w in run["warnings"]), run["warnings"]
    with pytest.raises(UserError, match="pairs.jsonl"):
        run_merge(other, tmp_path / "p", *args, tmp_path / "nowhere")


def test_training_on_flagged_rows_is_written_down(pair, tmp_path) -> None:
    base, adapter, _ = pair
    folder = contaminated(tmp_path / "contamination", False)
    data = folder / "clean.jsonl"
    rows = [{"id": "t1", "licence": "MIT"}, {"id": "t9", "licence": "MIT"}]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = {"step": "finetune", "settings": {}, "outputs": {}}
    known = {str(data): {"sha256": merge.shared.sha256_of(data)}}
    (adapter / "run.json").write_text(json.dumps(run | {"inputs": known}))
    listed = {"adapter_model.safetensors": {"sha256": "0" * 64}}
    (adapter / "run.json").write_text(json.dumps(run | {"inputs": known, "outputs": listed}))
    assert_refused(run_script("merge", "--adapter", adapter, "--out", tmp_path / "m"), "edited")
    (adapter / "run.json").write_text(json.dumps(run | {"inputs": known}))
    run = run_merge(base, tmp_path / "m", "--adapter", adapter)
    assert run["adapters"][0]["flagged_rows"] == 1 and run["adapters"][0]["licences"] == {"MIT": 2}
    assert any("1 rows that are flagged" in warning for warning in run["warnings"])
    card = (tmp_path / "m/README.md").read_text()
    assert "flagged" in card and "MIT" in card and known[str(data)]["sha256"] in card
    with (folder / "decisions.jsonl").open("a") as log:
        log.write(json.dumps({"pair_id": "p1", "verdict": "not-a-leak"}) + "\n")
    assert run_merge(base, tmp_path / "n", "--adapter", adapter)["warnings"] == []


def test_training_on_nf4_is_said(pair, tmp_path, capsys) -> None:
    base, adapter, _ = pair
    fingerprinted(adapter, base, load_in_4bit=True)
    run_merge(base, tmp_path / "m", "--adapter", adapter)
    assert "evaluate.py --load-in-4bit --adapter" in capsys.readouterr().err
    assert_equal_to_peft(base, adapter, tmp_path / "m", torch.bfloat16)


# --- what is refused ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A base in shards and an adapter, to be copied and spoilt."""
    folder = tmp_path_factory.mktemp("small")
    base = make_base(folder / "base", torch.bfloat16, shards=True)
    return base, make_adapter(folder / "adapter", base)


def edit_json(path: Path, **changes) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_tensors(path: Path, change) -> None:
    save_file(change(load_file(path)), path, metadata={"format": "pt"})


def cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


def header(path: Path, **changes) -> None:
    """Put other fields into the entry of a safetensors file's first tensor."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    entries = json.loads(data[8 : 8 + length])
    entries[next(name for name in entries if name != "__metadata__")] |= changes
    text = json.dumps(entries).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


def first_shard(base: Path) -> Path:
    return sorted(base.glob("*.safetensors"))[0]


CONFIG, INDEX = "adapter_config.json", "model.safetensors.index.json"
ADAPTER = "adapter_model.safetensors"
A0 = "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"
B0 = A0.replace("lora_A", "lora_B")
BAD = {  # what is wrong: (how to spoil copies of base and adapter, words of the message)
    "no config": (lambda b, a: (a / CONFIG).unlink(), "adapter_config.json is missing"),
    "config no JSON": (lambda b, a: (a / CONFIG).write_text("{"), "is not JSON"),
    "config not UTF-8": (lambda b, a: (a / CONFIG).write_bytes(b"\xff\xfe{}"), "is not JSON"),
    "config a list": (lambda b, a: (a / CONFIG).write_text("[]"), "holds a list"),
    "config deep": (lambda b, a: (a / CONFIG).write_text("[" * 99999), "is not JSON"),
    "another kind": (lambda b, a: edit_json(a / CONFIG, peft_type="LOHA"), "no option of LOHA"),
    "no kind": (lambda b, a: edit_json(a / CONFIG, peft_type="LORAX"), "no kind of adapter"),
    "kind a number": (lambda b, a: edit_json(a / CONFIG, peft_type=3), "is no kind"),
    "kind a list": (lambda b, a: edit_json(a / CONFIG, peft_type=["LORA"]), "is no kind"),
    "rank text": (lambda b, a: edit_json(a / CONFIG, r="4"), "does not fit"),
    "rank null": (lambda b, a: edit_json(a / CONFIG, r=None), "does not fit"),
    "rank 0": (lambda b, a: edit_json(a / CONFIG, r=0), "does not fit"),
    "wrong rank": (lambda b, a: edit_json(a / CONFIG, r=8), "size mismatch"),
    "alpha infinite": (lambda b, a: edit_json(a / CONFIG, lora_alpha=1e999), "is not finite"),
    "pattern a list": (lambda b, a: edit_json(a / CONFIG, rank_pattern=[1]), "does not fit"),
    "pattern no regex": (lambda b, a: edit_json(a / CONFIG, rank_pattern={"(": 1}), "does not fit"),
    "pattern of text": (lambda b, a: edit_json(a / CONFIG, alpha_pattern={"up_proj": "y"}), "fit"),
    "dora missing": (lambda b, a: edit_json(a / CONFIG, use_dora=True), "10 of the 30 tensors"),
    "unknown option": (lambda b, a: edit_json(a / CONFIG, use_magic=True), "use_magic"),
    "replication": (
        lambda b, a: edit_json(a / CONFIG, layer_replication=[[0, 2], [0, 2]]),
        "layer_replication cannot be merged",
    ),
    "pissa": (
        lambda b, a: edit_json(a / CONFIG, init_lora_weights="pissa_niter_4"),
        "changed the base by chance",
    ),
    "pickled adapter": (
        lambda b, a: (a / ADAPTER).rename(a / "adapter_model.bin"),
        "convert it: python -c",
    ),
    "no weights": (lambda b, a: (a / ADAPTER).unlink(), "adapter_model.safetensors is missing"),
    "adapter cut": (lambda b, a: cut(a / ADAPTER, 5000), "cut short"),
    "adapter empty": (lambda b, a: cut(a / ADAPTER, 0), "cut short"),
    "surplus key": (
        lambda b, a: edit_tensors(a / ADAPTER, lambda t: {**t, "surplus": torch.zeros(1)}),
        "1 of its 21 tensors would be ignored: surplus",
    ),
    "B missing": (
        lambda b, a: edit_tensors(a / ADAPTER, lambda t: {k: t[k] for k in t if k != B0}),
        f"1 of the 20 tensors that its config selects are missing: {B0}",
    ),
    "magnitude without dora": (
        lambda b, a: edit_tensors(
            a / ADAPTER,
            lambda t: {**t, A0.replace("lora_A.weight", "lora_magnitude_vector"): torch.ones(224)},
        ),
        "would be ignored",
    ),
    "half of the layers": (
        lambda b, a: edit_tensors(a / ADAPTER, lambda t: {k: t[k] for k in t if "layers.0" in k}),
        "10 of the 20 tensors that its config selects are missing",
    ),
    "one-dimensional A": (
        lambda b, a: edit_tensors(a / ADAPTER, lambda t: {**t, A0: torch.ones(4)}),
        "size mismatch",
    ),
    "NaN": (
        lambda b, a: edit_tensors(a / ADAPTER, lambda t: {**t, A0: t[A0] * torch.nan}),
        "NaN or infinite",
    ),
    "untrained": (
        lambda b, a: edit_tensors(
            a / ADAPTER, lambda t: {k: t[k] * ("lora_A" in k) for k in t}
        ),
        "changes nothing",
    ),
    "too large": (
        lambda b, a: edit_tensors(a / ADAPTER, lambda t: {**t, A0: t[A0] * 1e25, B0: t[B0] * 1e25}),
        "the sum is not finite in torch.bfloat16",
    ),
    "no base config": (lambda b, a: (b / "config.json").unlink(), "config.json is missing"),
    "quantised base": (
        lambda b, a: edit_json(b / "config.json", quantization_config={"quant_method": "gptq"}),
        "quantised; merge into the original",
    ),
    "int8 base": (
        lambda b, a: [
            edit_tensors(p, lambda t: {k: t[k].to(torch.int8) for k in t})
            for p in b.glob("*.safetensors")
        ],
        "holds torch.int8; merge into the 16-bit original",
    ),
    "missing shard": (lambda b, a: first_shard(b).unlink(), "has no model-00001-of-"),
    "shard cut": (lambda b, a: cut(first_shard(b), 30000), "cut short"),
    "shard header cut": (lambda b, a: cut(first_shard(b), 40), "cut short"),
    "header shape": (lambda b, a: header(first_shard(b), shape="x"), "no safetensors file"),
    "header offsets": (lambda b, a: header(first_shard(b), data_offsets=[5, 1]), "no safetensors"),
    "header type": (lambda b, a: header(first_shard(b), dtype=7), "no safetensors file"),
    "index no JSON": (lambda b, a: (b / INDEX).write_text("nope"), "is not JSON"),
    "index a list": (lambda b, a: edit_json(b / INDEX, weight_map=["x"]), "weight_map cannot be"),
    "index empty": (lambda b, a: edit_json(b / INDEX, weight_map={}), "has no tensors"),
    "index of numbers": (lambda b, a: edit_json(b / INDEX, weight_map={"x": 3}), "has no 3"),
    "index outside": (
        lambda b, a: edit_json(b / INDEX, weight_map={"x": "../y.safetensors"}),
        "is no file of its folder",
    ),
    "pickled base": (
        lambda b, a: [p.rename(p.with_suffix(".bin")) for p in b.glob("*.safetensors")],
        "save it as safetensors first",
    ),
    "finetune unfinished": (
        lambda b, a: (a / ".unfinished").write_text("python finetune.py"),
        "finish it with python finetune.py",
    ),
    "fingerprint no JSON": (
        lambda b, a: (a / "base_fingerprint.json").write_text("?"),
        "base_fingerprint.json is not JSON",
    ),
    "run.json a list": (lambda b, a: (a / "run.json").write_text("[]"), "run.json is not what"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
@pytest.mark.filterwarnings("ignore")
def test_bad_input_is_one_line_and_nothing_looks_finished(small, tmp_path, case: str) -> None:
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    shutil.copytree(small[0], base), shutil.copytree(small[1], adapter)
    spoil, words = BAD[case]
    spoil(base, adapter)
    with pytest.raises(UserError) as refused:
        run_merge(base, tmp_path / "m", "--adapter", adapter)
    assert words in str(refused.value) and "\n" not in str(refused.value), refused.value
    if (tmp_path / "m").exists():  # found while merging: the folder is marked, and is no input
        assert (tmp_path / "m/.unfinished").exists() and not (tmp_path / "m/run.json").exists()


ODD = [None, True, 1e999, "x", ["x"], {"x": []}]


@pytest.mark.slow
@pytest.mark.parametrize(
    "file", [CONFIG, INDEX, "config.json", "base_fingerprint.json", "run.json"]
)
def test_odd_json_types_anywhere_are_one_line(small, tmp_path, file: str) -> None:
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    shutil.copytree(small[0], base), shutil.copytree(small[1], adapter)
    fingerprinted(adapter, base)
    edit_json(base / "config.json", quantization_config=None)
    (adapter / "run.json").write_text(
        json.dumps(dict.fromkeys(("settings", "inputs", "outputs"), {}))
    )
    (base / "run.json").write_text(json.dumps({"lineage": []}))
    folders = [folder for folder in (base, adapter) if (folder / file).exists()]
    args = ["--adapter", str(adapter), "--base-model", str(base), "--out", str(tmp_path / "m")]
    args.append("--foreign-base")
    merge.main(args)  # as it is, it merges
    shutil.rmtree(tmp_path / "m")
    refused = 0
    for path in [folder / file for folder in folders]:
        whole = json.loads(path.read_text())
        for key in whole:
            for odd in ODD:
                path.write_text(json.dumps({**whole, key: odd}))
                try:
                    merge.main(args)
                except UserError as error:
                    assert "\n" not in str(error)
                    refused += 1
                shutil.rmtree(tmp_path / "m", ignore_errors=True)
        path.write_text(json.dumps(whole))
    assert refused or file == "base_fingerprint.json"  # of another base, which was asked for


def test_wrong_bases_are_refused(small, tmp_path) -> None:
    base, adapter = small
    for changes, words in {
        "wide": ({"intermediate_size": 256}, "torch.Size([224, 4])"),
        "shallow": ({"num_hidden_layers": 1}, "would be ignored"),
        "narrow": ({"hidden_size": 64, "head_dim": 24}, "does not fit"),
    }.values():
        other = make_base(tmp_path / words[:4], torch.bfloat16, **changes)
        with pytest.raises(UserError, match="does not fit") as refused:
            run_merge(other, tmp_path / "m", "--adapter", adapter)
        assert words in str(refused.value)
    grown = make_base(tmp_path / "grown", torch.bfloat16, vocab_size=164)
    ends = make_adapter(tmp_path / "ends", base, **ENDS)
    with pytest.raises(UserError, match="does not fit"):
        run_merge(grown, tmp_path / "m", "--adapter", ends)
    assert not (tmp_path / "m").exists()


def test_flags_and_places(small, tmp_path) -> None:
    """As a user types them: exit code 2, one line, and the folder as it was."""
    base, adapter = small
    usual = ["--adapter", adapter, "--base-model", base, "--out", tmp_path / "m"]
    for args, words in (
        (["--limit", "3"], "--limit does not apply"),
        (["--device", "cuda"], "merging runs on the cpu"),
        (["--allow-contaminated"], "--partner-check"),
        (["--partner-check", tmp_path / "none"], "none/pairs.jsonl is missing"),
        (["--check-logits", "--adapter", f"{adapter}:2"], "one adapter of weight 1"),
        (["--adapter", f"{adapter}:much"], "'much' is not a number"),
        (["--adapter", f"{adapter}:0"], "not a number other than 0"),
        (["--adapter", f"{adapter}:nan"], "not a number other than 0"),
        (["--adapter", tmp_path / "none"], "none is missing"),
        (["--base-model", tmp_path / "none"], "no such folder"),
        (["--base-model", "./none"], "no such folder"),
        (["--base-model", "demo/none"], "no such folder"),
        (["--out", base / "inside"], "lies inside"),
        (["--out", adapter], "is the folder of an input"),
        (["--out", base / "config.json"], "is a file"),
        (["--merge-it"], "--merge-it"),
    ):  # fmt: skip
        done = run_script("merge", *usual, *args)
        assert_refused(done, words)
        assert "HF_TOKEN" not in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert not list(tmp_path.iterdir()) and not (base / "inside").exists()
    done = run_script("merge", *usual, "--base-model", "nobody/nothing")
    assert_refused(done, "nobody/nothing: no such folder", "HF_TOKEN")


def test_a_finished_model_is_not_overwritten_unasked(small, tmp_path, monkeypatch) -> None:
    base, adapter = small
    out = tmp_path / "m"
    run_merge(base, out, "--adapter", adapter)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(UserError, match="--overwrite"):
        run_merge(base, out, "--adapter", adapter)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9, 8, -(10**6)))
    with pytest.raises(UserError, match="GB needed"):
        run_merge(base, out, "--adapter", adapter, "--overwrite")
    monkeypatch.undo()
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before

    (out / "mine.txt").write_text("a note of mine")
    run_merge(base, out, "--adapter", f"{adapter}:2", "--overwrite")
    assert (out / "mine.txt").exists() and (out / "README.md").read_bytes() != before["README.md"]
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_a_merge_that_broke_off_begins_again(small, tmp_path, monkeypatch) -> None:
    """Shards that it left are gone afterwards: transformers would take the wrong ones."""
    base, adapter = small
    out = tmp_path / "m"
    monkeypatch.setattr(merge, "SHARD_SIZE", "100KB")
    merged = []

    def stopped(plan, path):
        merged.append(path)
        if len(merged) == 8:
            raise KeyboardInterrupt
        return merge_layer(plan, path)

    merge_layer = merge.merge_layer
    monkeypatch.setattr(merge, "merge_layer", stopped)
    with pytest.raises(KeyboardInterrupt):
        run_merge(base, out, "--adapter", adapter)
    monkeypatch.undo()
    assert list(out.glob("model-*.safetensors")) and (out / ".unfinished").exists()
    run_merge(base, out, "--adapter", adapter)
    assert [path.name for path in out.glob("*.safetensors*")] == ["model.safetensors"]
    assert not any(path.name.startswith(".") for path in out.iterdir())
    assert_equal_to_peft(base, adapter, out, torch.bfloat16)


def test_a_full_disk_in_the_middle_is_one_line(small, tmp_path) -> None:
    base, adapter = small
    args = ["--adapter", adapter, "--base-model", base, "--out", tmp_path / "m"]
    command = [sys.executable, ROOT / "merge.py", *args]
    limited = ["bash", "-c", 'ulimit -f 100; exec "$@"', "bash", *map(str, command)]  # 100 kB
    assert_refused(subprocess.run(limited, capture_output=True, text=True), "File too large")
    assert (tmp_path / "m/.unfinished").exists() and not (tmp_path / "m/run.json").exists()


def test_the_folder_itself_as_output(small, tmp_path, monkeypatch) -> None:
    base, adapter = small
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    run_merge(base, Path("."), "--adapter", adapter)
    assert [path.name for path in tmp_path.iterdir()] == ["here"]
    assert json.loads(Path("run.json").read_text())["settings"]["out"] == "."


def test_two_merges_into_one_folder_are_kept_apart(small, tmp_path) -> None:
    from build_dataset import output_folder

    base, adapter = small
    with output_folder(tmp_path / "m", overwrite=False):
        with pytest.raises(UserError, match="another process"):
            run_merge(base, tmp_path / "m", "--adapter", adapter)
        assert (tmp_path / "m/.unfinished").exists()

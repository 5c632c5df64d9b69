"""Holds: merged weights are bit for bit those of PEFT's merge, for every kind and option that is
merged module by module and for those that are merged plainly; several adapters are summed exactly;
the merged model computes what base + adapter computes; memory is one output shard; what does not
fit is refused in one line."""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from conftest import ROOT, assert_refused, run_script
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, MixtralConfig

import common
import merge
from common import UserError, base_fingerprint

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT's, of settings that are meant here

TWO_TYPES = [torch.bfloat16, torch.float32]
ALL_TYPES = [torch.bfloat16, torch.float16, torch.float32]
in_two_types = pytest.mark.parametrize("dtype", TWO_TYPES, ids=str)
in_all_types = pytest.mark.parametrize("dtype", ALL_TYPES, ids=str)

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
LORA = {"peft_type": "LORA", "r": 4, "lora_alpha": 6, "target_modules": TARGETS}
SCALE = 6 / 4  # of LORA's change

BIAS = {"attention_bias": True}
TIED = {"tie_word_embeddings": True}
IS_GPT2 = {"model_type": "gpt2"}
PARTLY = {"target_modules": ["q_proj", "up_proj"]}
ENDS = {"target_modules": ["q_proj", "embed_tokens", "lm_head"]}
CONV1D = {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}
CONV1D_ENDS = {"target_modules": ["c_proj", "wte"], "fan_in_fan_out": True, "use_dora": True}
PATTERNS = {
    "rank_pattern": {"up_proj": 7, "layers.1.self_attn.q_proj": 2},
    "alpha_pattern": {r"layers\.[0]\..*": 11},
    "use_rslora": True,
}


@dataclass
class Case:
    """A LoRA to merge: how base and adapter differ from LLAMA and LORA, and what must come out."""

    changed: int  # tensors of the model that the merge changes
    base: dict[str, Any] = field(default_factory=dict)
    adapter: dict[str, Any] = field(default_factory=dict)
    whole: bool = False  # PEFT merges it with the whole model in memory
    in_shards: bool = False  # so is the base on the disk


CASES = {
    "lora": Case(10, in_shards=True),
    "rank 1": Case(10, adapter={"r": 1, "lora_alpha": 16}),
    "rslora": Case(10, adapter={"use_rslora": True}),
    "dora": Case(10, adapter={"use_dora": True}),
    "patterns": Case(10, adapter=PATTERNS),
    "modules_to_save": Case(
        12, adapter={**PARTLY, "modules_to_save": ["lm_head", "norm", "o_proj"]}, whole=True
    ),
    "layers": Case(5, adapter={"layers_to_transform": [1]}),
    "bias all": Case(12, base=BIAS, adapter={**PARTLY, "bias": "all"}, whole=True),
    "bias lora_only": Case(6, base=BIAS, adapter={**PARTLY, "bias": "lora_only"}, whole=True),
    "lora_bias": Case(
        8,
        base=BIAS,
        adapter={"target_modules": ["q_proj", "o_proj"], "lora_bias": True},
        in_shards=True,
    ),
    "exclude": Case(8, adapter={"exclude_modules": ["up_proj"]}),
    "ends": Case(4, adapter=ENDS, whole=True, in_shards=True),
    "ends dora": Case(4, adapter={**ENDS, "use_dora": True}, whole=True),
    "tied": Case(10, base=TIED),
    "tied head saved": Case(
        5, base=TIED, adapter={**PARTLY, "modules_to_save": ["lm_head"]}, whole=True, in_shards=True
    ),
    "tied embedding saved": Case(
        5, base=TIED, adapter={**PARTLY, "modules_to_save": ["embed_tokens"]}, whole=True
    ),
    "tied, tied in training": Case(
        6,
        base=TIED,
        adapter={**PARTLY, "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
        whole=True,
    ),
    "tied embedding": Case(
        3, base=TIED, adapter={"target_modules": ["q_proj", "embed_tokens"]}, whole=True
    ),
    "tied head": Case(3, base=TIED, adapter={"target_modules": ["q_proj", "lm_head"]}, whole=True),
    "tied both dora": Case(4, base=TIED, adapter={**ENDS, "use_dora": True}, whole=True),
    "conv1d": Case(8, base=IS_GPT2, adapter=CONV1D),
    "conv1d dora": Case(8, base=IS_GPT2, adapter={**CONV1D, "use_dora": True}),
    "conv1d, embedding dora": Case(5, base=IS_GPT2, adapter=CONV1D_ENDS, whole=True),
}


def make_base(folder: Path, dtype: torch.dtype, in_shards: bool = False, **changes: Any) -> Path:
    """Save a random model: LLAMA, or GPT2 with model_type="gpt2", with changes of its config."""
    torch.manual_seed(0)
    if changes.get("model_type") == "gpt2":
        config = GPT2Config(**{**GPT2, **changes})
    else:
        config = LlamaConfig(**{**LLAMA, **changes})
    model = AutoModelForCausalLM.from_config(config).to(dtype)
    model.save_pretrained(folder, max_shard_size="200KB" if in_shards else "1GB")
    return folder


def make_adapter(folder: Path, base: Path, config: dict[str, Any], seed: int = 1) -> Path:
    """Save an adapter that looks trained: everything that training would move is moved."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(base)
    config = {"task_type": "CAUSAL_LM", "target_modules": TARGETS, **config}
    model = get_peft_model(model, peft.get_peft_config(config))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return folder


def make_lora(folder: Path, base: Path, seed: int = 1, **options: Any) -> Path:
    return make_adapter(folder, base, {**LORA, **options}, seed)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a model's folder."""
    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors.update(load_file(path))
    return tensors


def run_merge(base: Path, adapter: Path | str, out: Path, flags: list[Any] | None = None) -> dict:
    """Merge an adapter into a base; returns run.json."""
    command = ["--base-model", base, "--adapter", adapter, "--out", out]
    if flags:
        command += flags
    merge.main([str(word) for word in command])
    return json.loads((out / "run.json").read_text())


def merged_by_peft(base: Path, adapter: Path, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """PEFT's merge. Where it would add a LoRA to a tensor that head and embedding share, the head
    is first made its own, as PEFT's own warning advises: else its merge is not what was trained."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    config = json.loads((adapter / "adapter_config.json").read_text())
    if not {"embed_tokens", "lm_head", "wte"}.isdisjoint(config["target_modules"]):
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
        model.config.tie_word_embeddings = False
    return PeftModel.from_pretrained(model, adapter).merge_and_unload().state_dict()


def assert_equal_to_peft(base: Path, adapter: Path, merged: Path, dtype: torch.dtype) -> int:
    """Every tensor of the loaded folder has the bits of PEFT's merge; how many of them changed."""
    expected = merged_by_peft(base, adapter, dtype)
    loaded, faults = AutoModelForCausalLM.from_pretrained(
        merged, dtype=dtype, output_loading_info=True
    )
    assert not any(faults.values()), faults
    ours = loaded.state_dict()
    assert ours.keys() == expected.keys()

    before = AutoModelForCausalLM.from_pretrained(base, dtype=dtype).state_dict()
    changed = 0
    for name, tensor in ours.items():
        assert tensor.dtype == expected[name].dtype == dtype
        assert torch.equal(tensor, expected[name]), name
        if not torch.equal(tensor, before[name]):
            changed += 1
    return changed


def was_whole_in_memory(capsys: pytest.CaptureFixture) -> bool:
    """Whether the merge has said that PEFT merged the model as a whole."""
    return "whole model in memory" in capsys.readouterr().err


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """Where the merged model goes."""
    return tmp_path / "merged"


@in_all_types
@pytest.mark.parametrize("name", CASES)
def test_lora_is_bit_identical_to_peft(tmp_path, out, capsys, dtype, name: str) -> None:
    case = CASES[name]
    base = make_base(tmp_path / "base", dtype, in_shards=case.in_shards, **case.base)
    adapter = make_lora(tmp_path / "adapter", base, **case.adapter)
    run_merge(base, adapter, out)
    assert was_whole_in_memory(capsys) == case.whole
    assert assert_equal_to_peft(base, adapter, out, dtype=dtype) == case.changed


PATTERN_OPTIONS = {"rank_pattern": {"up_proj": 2}, "alpha_pattern": {"q_proj": 3}}
KINDS = {  # configs of adapters that are merged module by module
    "ia3": {"peft_type": "IA3", "feedforward_modules": ["down_proj"]},
    "vera": {"peft_type": "VERA", "r": 4},
    "vera key": {"peft_type": "VERA", "r": 3, "d_initial": 0.3, "projection_prng_key": 7},
    "loha": {"peft_type": "LOHA", "r": 4, "alpha": 6},
    "loha patterns": {"peft_type": "LOHA", "r": 4, "alpha": 6, **PATTERN_OPTIONS},
    "lokr": {"peft_type": "LOKR", "r": 4, "alpha": 6},
    "lokr both": {
        "peft_type": "LOKR",
        "r": 2,
        "alpha": 6,
        "decompose_both": True,
        "decompose_factor": 4,
    },
    "lokr patterns": {"peft_type": "LOKR", "r": 4, "alpha": 6, **PATTERN_OPTIONS},
    "oft": {"peft_type": "OFT", "r": 0, "oft_block_size": 8},
    "oft rank": {"peft_type": "OFT", "r": 4, "oft_block_size": 0, "use_cayley_neumann": True},
    "oft exact": {"peft_type": "OFT", "r": 0, "oft_block_size": 8, "use_cayley_neumann": False},
    "boft": {"peft_type": "BOFT", "boft_block_size": 8, "boft_n_butterfly_factor": 2},
    "boft blocks": {"peft_type": "BOFT", "boft_block_size": 0, "boft_block_num": 4},
    "hra": {"peft_type": "HRA", "r": 4},
    "hra gs": {"peft_type": "HRA", "r": 4, "apply_GS": True},
    "fourierft": {
        "peft_type": "FOURIERFT",
        "n_frequency": 50,
        "scaling": 90.0,
        "random_loc_seed": 5,
    },
    "randlora": {"peft_type": "RANDLORA", "r": 4, "randlora_alpha": 9, "projection_prng_key": 3},
    "miss": {"peft_type": "MISS", "r": 4},
    "miss mini": {"peft_type": "MISS", "r": 4, "mini_r": 2},
    "vblora": {
        "peft_type": "VBLORA",
        "r": 4,
        "num_vectors": 16,
        "vector_length": 16,
        "topk": 3,
    },
}


@in_two_types
@pytest.mark.parametrize("name", KINDS)
def test_other_kinds_are_bit_identical_to_peft(tmp_path, out, capsys, dtype, name: str) -> None:
    base = make_base(tmp_path / "base", dtype)
    adapter = make_adapter(tmp_path / "adapter", base, KINDS[name])
    run_merge(base, adapter, out)
    assert not was_whole_in_memory(capsys)
    assert assert_equal_to_peft(base, adapter, out, dtype=dtype) == 10


CONV1D_KINDS = {  # whose matrices may lie as GPT-2 has them, transposed: fan_in_fan_out
    "ia3": {"peft_type": "IA3", "feedforward_modules": ["c_proj"], "fan_in_fan_out": True},
    "vera": {"peft_type": "VERA", "r": 4, "fan_in_fan_out": True},
    "vblora": {**KINDS["vblora"], "fan_in_fan_out": True},
    "fourierft": {"peft_type": "FOURIERFT", "n_frequency": 50, "fan_in_fan_out": True},
}


@in_two_types
@pytest.mark.parametrize("name", CONV1D_KINDS)
def test_other_kinds_on_conv1d(tmp_path, out, dtype, name: str) -> None:
    base = make_base(tmp_path / "base", dtype, model_type="gpt2")
    config = {**CONV1D_KINDS[name], "target_modules": ["c_attn", "c_proj"]}
    adapter = make_adapter(tmp_path / "adapter", base, config)
    run_merge(base, adapter, out)
    assert assert_equal_to_peft(base, adapter, out, dtype=dtype) >= 6


def test_every_option_that_is_merged_by_module_is_tried_above() -> None:
    """merge.BY_MODULE lists what was seen equal; here, that each of it is in one of the cases."""
    tried = {"LORA": {"r", "lora_alpha", "init_lora_weights"}}
    for case in CASES.values():
        tried["LORA"].update(case.adapter)
    for config in [*KINDS.values(), *CONV1D_KINDS.values()]:
        tried.setdefault(config["peft_type"], set()).update(config)

    assert tried.keys() == merge.BY_MODULE.keys()
    for kind, options in merge.BY_MODULE.items():
        assert options <= tried[kind], kind


PLAINLY = [  # options of LoRA that rewrite the base, so that PEFT merges the model as a whole
    {"init_lora_weights": "pissa"},
    {"init_lora_weights": "olora"},
    {"init_lora_weights": "gaussian"},
    {"trainable_token_indices": [1, 5]},
]


@in_two_types
@pytest.mark.parametrize("options", PLAINLY, ids=str)
def test_what_rewrites_the_base_is_merged_plainly(tmp_path, out, capsys, dtype, options) -> None:
    base = make_base(tmp_path / "base", dtype)
    adapter = make_lora(tmp_path / "adapter", base, **options)
    run_merge(base, adapter, out)
    assert was_whole_in_memory(capsys)
    assert assert_equal_to_peft(base, adapter, out, dtype=dtype) >= 10
    with pytest.raises(UserError, match="alone only"):
        run_merge(base, f"{adapter}:0.5", tmp_path / "half")


MIXTRAL = {
    "vocab_size": 160,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 4,
}


def make_mixtral(folder: Path, dtype: torch.dtype) -> Path:
    """Save a model whose experts lie on the disk one by one; transformers fuses them on loading."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(MixtralConfig(**MIXTRAL)).to(dtype)
    model.save_pretrained(folder)
    return folder


@in_two_types
def test_experts_that_are_not_tuned_are_copied(tmp_path, out, capsys, dtype) -> None:
    base = make_mixtral(tmp_path / "base", dtype)
    adapter = make_lora(tmp_path / "adapter", base, target_modules=["q_proj"])
    run_merge(base, adapter, out)
    assert not was_whole_in_memory(capsys)
    assert assert_equal_to_peft(base, adapter, out, dtype=dtype) == 2
    assert weights(out).keys() == weights(base).keys()


@in_two_types
def test_tuned_experts_are_merged_plainly(tmp_path, out, capsys, dtype) -> None:
    base = make_mixtral(tmp_path / "base", dtype)
    experts = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    options = {"target_modules": ["q_proj"], "target_parameters": experts}
    adapter = make_lora(tmp_path / "adapter", base, **options)
    run_merge(base, adapter, out)
    assert was_whole_in_memory(capsys)
    assert assert_equal_to_peft(base, adapter, out, dtype=dtype) == 6
    assert weights(out).keys() == weights(base).keys()


@contextmanager
def edit_tensors(path: Path) -> Iterator[dict[str, torch.Tensor]]:
    """Yield the tensors of a safetensors file; what the block makes of them is written back."""
    tensors = load_file(path)
    yield tensors
    save_file(tensors, path, metadata={"format": "pt"})


def test_a_key_that_transformers_drops_is_copied(tmp_path, out, capsys) -> None:
    """Early Llama files carry rotary_emb.inv_freq."""
    base = make_base(tmp_path / "base", torch.bfloat16)
    adapter = make_lora(tmp_path / "adapter", base)
    key = "model.layers.0.self_attn.rotary_emb.inv_freq"
    with edit_tensors(base / "model.safetensors") as tensors:
        tensors[key] = torch.ones(12)

    run_merge(base, adapter, out)
    assert not was_whole_in_memory(capsys)
    ours = weights(out)
    assert torch.equal(ours[key], torch.ones(12))
    for name, tensor in merged_by_peft(base, adapter, torch.bfloat16).items():
        assert torch.equal(ours[name], tensor), name


SMALL_MODELS = {  # with a bias beside each weight: name -> (changes of the base, of the adapter)
    "llama": ({"attention_bias": True, "mlp_bias": True}, {"lora_bias": True}),
    "gpt2": (IS_GPT2, CONV1D),
}


@pytest.mark.parametrize("kilobytes", [20, 50, 75, 200])
@pytest.mark.parametrize("name", SMALL_MODELS)
def test_output_shards_are_small_whatever_the_input(
    tmp_path, out, monkeypatch, name: str, kilobytes: int
) -> None:
    """And a module's weight and bias are merged together wherever a shard ends."""
    monkeypatch.setattr(merge, "SHARD_SIZE", f"{kilobytes}KB")
    changes, options = SMALL_MODELS[name]
    base = make_base(tmp_path / "base", torch.bfloat16, **changes)
    adapter = make_lora(tmp_path / "adapter", base, **options)
    run = run_merge(base, adapter, out)
    assert assert_equal_to_peft(base, adapter, out, dtype=torch.bfloat16) >= 8

    shards = sorted(out.glob("*.safetensors"))
    assert len(shards) >= 2
    assert {path.name for path in shards} < run["outputs"].keys()
    largest_tensor = max(tensor.nbytes for tensor in weights(base).values())
    limit = max(1000 * kilobytes, largest_tensor + 2000)  # a larger one has a shard of its own
    assert max(path.stat().st_size for path in shards) < limit + 5000


def test_an_embedding_that_was_saved_with_the_adapter_is_taken(tmp_path, out, capsys) -> None:
    """PEFT puts it into the base; the base's own is not what the adapter was trained with."""
    base = make_base(tmp_path / "base", torch.float32)
    adapter = make_lora(tmp_path / "adapter", base)
    with edit_tensors(adapter / "adapter_model.safetensors") as tensors:
        tensors["base_model.model.model.embed_tokens.weight"] = torch.randn(160, 96)
    run_merge(base, adapter, out)
    assert was_whole_in_memory(capsys)
    assert assert_equal_to_peft(base, adapter, out, dtype=torch.float32) == 11


def test_other_kinds_are_merged_plainly(tmp_path, out, capsys) -> None:
    base = make_base(tmp_path / "base", torch.float32)
    config = {"peft_type": "ADALORA", "init_r": 6, "target_r": 4, "total_step": 10}
    adapter = make_adapter(tmp_path / "adapter", base, config)
    run_merge(base, adapter, out)
    assert "of the kind ADALORA" in capsys.readouterr().err
    assert assert_equal_to_peft(base, adapter, out, dtype=torch.float32) == 10


def test_a_learned_prompt_is_refused(tmp_path, out) -> None:
    base = make_base(tmp_path / "base", torch.float32)
    model = AutoModelForCausalLM.from_pretrained(base)
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    with pytest.raises(UserError, match="a learned prompt"):
        run_merge(base, tmp_path / "adapter", out)


def test_a_base_in_float64_is_summed_in_float64(tmp_path, out) -> None:
    base = make_base(tmp_path / "base", torch.float64)
    adapter = make_lora(tmp_path / "adapter", base)
    run_merge(base, adapter, out)
    assert_equal_to_peft(base, adapter, out, dtype=torch.float64)


def test_what_peft_cannot_merge_is_one_line(tmp_path, out) -> None:
    base = make_base(tmp_path / "base", torch.float32)  # without a bias that could be added to
    adapter = make_lora(tmp_path / "adapter", base, lora_bias=True)
    with pytest.raises(UserError, match="PEFT cannot merge model.layers.0"):
        run_merge(base, adapter, out)


def test_adapter_in_half_precision_and_bare_backbone_names(tmp_path, out) -> None:
    """bfloat16 factors; a GPT-2 checkpoint without "transformer." before its names."""
    base = make_base(tmp_path / "base", torch.float16, model_type="gpt2")
    adapter = make_lora(tmp_path / "adapter", base, **CONV1D)
    with edit_tensors(adapter / "adapter_model.safetensors") as tensors:
        for name in tensors:
            tensors[name] = tensors[name].bfloat16()
    expected = merged_by_peft(base, adapter, torch.float16)

    with edit_tensors(base / "model.safetensors") as tensors:
        for name in list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)
    run_merge(base, adapter, out)
    loaded = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float16)
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


def lora_change(factors: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    """B @ A for a weight of the base, in float64; 0 where the adapter has no factors for it."""
    stem = "base_model.model." + name.removesuffix(".weight")
    if f"{stem}.lora_A.weight" not in factors:
        return torch.zeros((), dtype=torch.float64)
    a = factors[f"{stem}.lora_A.weight"].double()
    b = factors[f"{stem}.lora_B.weight"].double()
    return b @ a


def neighbours(numbers: torch.Tensor) -> list[torch.Tensor]:
    """The next numbers of a 2- or 4-byte float type away from zero, and towards it, in float64."""
    bits = numbers.view(torch.int16 if numbers.dtype.itemsize == 2 else torch.int32)
    away = (bits + 1).view(numbers.dtype)
    towards = (bits - 1).view(numbers.dtype)
    return [away.double(), towards.double()]


@in_all_types
@pytest.mark.parametrize("rslora", [False, True], ids=["lora", "rslora"])
def test_two_adapters_are_summed_exactly_and_rounded_once(tmp_path, out, dtype, rslora) -> None:
    base = make_base(tmp_path / "base", dtype)
    one = make_lora(tmp_path / "one", base, use_rslora=rslora)
    two = make_lora(tmp_path / "two", base, seed=2, r=8, target_modules=["up_proj", "o_proj"])
    run_merge(base, one, out, flags=["--adapter", f"{two}:-0.5"])

    scale_of_one = 6 / 4**0.5 if rslora else 6 / 4
    scale_of_two = -0.5 * 6 / 8
    factors_of_one = load_file(one / "adapter_model.safetensors")
    factors_of_two = load_file(two / "adapter_model.safetensors")
    ours = weights(out)
    changed = 0
    for name, before in weights(base).items():
        exact = before.double()
        exact = exact + scale_of_one * lora_change(factors_of_one, name)
        exact = exact + scale_of_two * lora_change(factors_of_two, name)

        distance = (ours[name].double() - exact).abs()
        for neighbour in neighbours(ours[name]):  # none of the two is nearer
            nearer = (neighbour - exact).abs() < distance * (1 - 1e-3)
            assert not nearer.any(), name
        if not torch.equal(ours[name], before):
            changed += 1
    assert changed == 12  # up_proj of both, o_proj of the second alone


UNSUMMABLE = [  # options of LoRAs that can be merged alone only, words of the message
    ({"use_dora": True}, "use_dora = True"),
    ({"modules_to_save": ["norm"]}, "alone only"),
]


@pytest.mark.parametrize("options, words", UNSUMMABLE, ids=str)
def test_what_cannot_be_summed_is_refused_by_name(
    small_base, small_adapter, tmp_path, out, options: dict, words: str
) -> None:
    adapter = make_lora(tmp_path / "adapter", small_base, **options)
    with pytest.raises(UserError, match=words):
        run_merge(small_base, f"{adapter}:2", out)
    with pytest.raises(UserError, match=words):
        run_merge(small_base, small_adapter, out, flags=["--adapter", adapter])
    assert not out.exists()


def test_another_kind_takes_no_weight(small_base, tmp_path, out) -> None:
    adapter = make_adapter(tmp_path / "adapter", small_base, KINDS["ia3"])
    with pytest.raises(UserError, match="peft_type"):
        run_merge(small_base, f"{adapter}:2", out)
    assert not out.exists()


def test_a_weight_scales_the_change(tmp_path) -> None:
    base = make_base(tmp_path / "base", torch.float32)
    adapter = make_lora(tmp_path / "adapter", base, use_rslora=True)
    run_merge(base, adapter, tmp_path / "once")
    run_merge(base, f"{adapter}:3", tmp_path / "thrice")
    once = weights(tmp_path / "once")
    thrice = weights(tmp_path / "thrice")
    for name, tensor in weights(base).items():
        before = tensor.double()
        change = once[name] - before
        assert torch.allclose(thrice[name] - before, 3 * change, atol=1e-6), name


def test_a_weight_may_be_any_finite_number() -> None:
    assert merge.split_weight("out/a:-2e6") == ("out/a", -2e6)


# --- what base + adapter computes -----------------------------------------------------------------


@pytest.mark.parametrize("name", ["ends", "tied both dora", "tied embedding", "conv1d dora"])
def test_merged_logits_are_those_of_base_and_adapter(tmp_path, out, name: str) -> None:
    base = make_base(tmp_path / "base", torch.float32, **CASES[name].base)
    adapter = make_lora(tmp_path / "adapter", base, **CASES[name].adapter)
    distances = run_merge(base, adapter, out, flags=["--check-logits"])["logits"]
    assert distances["to_base_and_adapter"] < 1e-5
    assert distances["to_base"] > 1e-2

    input_ids = torch.arange(12)[None]
    model = AutoModelForCausalLM.from_pretrained(base)
    of_both = PeftModel.from_pretrained(model, adapter)(input_ids).logits
    of_merged = AutoModelForCausalLM.from_pretrained(out)(input_ids).logits
    assert (of_merged - of_both).abs().max() < 1e-4 * of_both.abs().max()


def test_check_logits_sees_a_fault(tmp_path, out, monkeypatch) -> None:
    base = make_base(tmp_path / "base", torch.float32)
    adapter = make_lora(tmp_path / "adapter", base)
    merge_layer = merge.merge_layer

    def merge_one_percent_wrong(plan, path):
        tensors = merge_layer(plan, path)
        for name in tensors:
            tensors[name] = 1.01 * tensors[name]
        return tensors

    monkeypatch.setattr(merge, "merge_layer", merge_one_percent_wrong)
    with pytest.raises(UserError, match="--check-logits"):
        run_merge(base, adapter, out, flags=["--check-logits"])
    assert not (out / "run.json").exists()


# --- the folder: lineage, card, proof -------------------------------------------------------------


def test_chains_keep_their_lineage_and_cards_their_own_words(tmp_path, out) -> None:
    base = make_base(tmp_path / "base", torch.float32)
    (base / "README.md").write_text("---\nlicense: llama2\n---\n# The base's own card\n")
    (base / "LICENSE.txt").write_text("Community licence")
    one = make_lora(tmp_path / "one", base)
    two = make_lora(tmp_path / "two", base, seed=2)
    run_merge(base, one, out)
    card = (out / "README.md").read_text()
    assert "llama2" in card
    assert "own card" not in card
    assert str(one) in card

    second = tmp_path / "second"
    run = run_merge(out, f"{two}:0.5", second)
    assert run["lineage"] == [
        {"base_model": str(base), "adapters": {str(one): 1}},
        {"base_model": str(out), "adapters": {str(two): 0.5}},
    ]
    assert run["adapters"][0]["sha256"]
    assert run["counts"] == {"tuned_modules": 10}
    assert (second / "LICENSE.txt").read_text() == "Community licence"
    names = {path.name for path in second.iterdir()}
    assert {"README.md", "run.json", "config.json"} < names


def test_only_known_files_are_copied(tmp_path, out) -> None:
    base = make_base(tmp_path / "base", torch.float32)
    for name in ["code.py", "state.pkl", "notes.txt", "optimizer.npz", "tokenizer.model"]:
        (base / name).write_text(name)
    adapter = make_lora(tmp_path / "adapter", base)
    run = run_merge(base, adapter, out)
    outputs = {"config.json", "generation_config.json", "model.safetensors", "README.md"}
    outputs.add("tokenizer.model")
    assert run["outputs"].keys() == outputs
    assert {path.name for path in out.iterdir()} == {*outputs, "run.json"}


# --- another base, a partner, 4-bit training ------------------------------------------------------


def write_fingerprint(adapter: Path, base: Path, load_in_4bit: bool = False) -> None:
    """Write down, as finetune.py does, which base an adapter was trained on."""
    known = {**base_fingerprint(base), "base_model": str(base), "load_in_4bit": load_in_4bit}
    (adapter / "base_fingerprint.json").write_text(json.dumps(known))


@pytest.fixture
def known_base(tmp_path) -> Path:
    return make_base(tmp_path / "base", torch.bfloat16)


@pytest.fixture
def known_adapter(tmp_path, known_base) -> Path:
    """An adapter that knows its base."""
    adapter = make_lora(tmp_path / "adapter", known_base)
    write_fingerprint(adapter, known_base)
    return adapter


@pytest.fixture
def fine_tune(tmp_path, known_base) -> Path:
    """A fine-tune of the base: its matrices differ."""
    folder = tmp_path / "fine_tune"
    shutil.copytree(known_base, folder)
    with edit_tensors(folder / "model.safetensors") as tensors:
        for name in tensors:
            if tensors[name].dim() > 1:
                tensors[name] = tensors[name] + 0.01
    return folder


def has_warning(run: dict[str, Any], words: str) -> bool:
    return any(words in warning for warning in run["warnings"])


def test_the_base_is_known_by_its_fingerprint(known_base, known_adapter, out, capsys) -> None:
    run = run_merge(known_base, known_adapter, out)
    assert "fingerprints agree" in capsys.readouterr().out
    unknown = f"whether {known_adapter} was trained on flagged rows is not known"
    assert run["warnings"] == [unknown]


def test_another_base_is_merged_only_if_it_is_meant(
    known_adapter, fine_tune, tmp_path, out, capsys
) -> None:
    with pytest.raises(UserError, match="add --foreign-base"):
        run_merge(fine_tune, known_adapter, out)
    run = run_merge(fine_tune, known_adapter, out, flags=["--foreign-base"])
    table = "\n".join(run["norms"])
    assert table in capsys.readouterr().out
    assert "layer 0" in table
    assert "layer 1" in table
    assert has_warning(run, "differs in its tensors")
    assert has_warning(run, "--partner-check")
    assert "--partner-check" in (out / "README.md").read_text()

    name = "model.layers.0.mlp.up_proj.weight"
    expected = merged_by_peft(fine_tune, known_adapter, torch.bfloat16)
    assert torch.equal(weights(out)[name], expected[name])


def test_a_base_without_a_fingerprint_is_merged_with_a_warning(
    known_adapter, fine_tune, out
) -> None:
    (known_adapter / "base_fingerprint.json").unlink()
    run = run_merge(fine_tune, known_adapter, out)
    assert has_warning(run, "base_fingerprint.json")
    assert has_warning(run, f"was trained on {fine_tune} is not known")


def test_norms_of_the_table(known_adapter, fine_tune, out) -> None:
    run = run_merge(fine_tune, known_adapter, out, flags=["--foreign-base"])
    row = next(line for line in run["norms"] if "layer 1" in line)
    cells = row.split("|")
    shown = [float(cells[2]), float(cells[3]), float(cells[4])]

    factors = load_file(known_adapter / "adapter_model.safetensors")
    squares_of_weights = 0.0
    squares_of_changes = 0.0
    for name, tensor in weights(fine_tune).items():
        change = SCALE * lora_change(factors, name)
        if "layers.1." in name and change.any():
            squares_of_weights += tensor.double().square().sum().item()
            squares_of_changes += change.square().sum().item()
    weight = squares_of_weights**0.5
    change = squares_of_changes**0.5
    # the table's change is that of the numbers written, rounded to bfloat16
    assert shown == pytest.approx([weight, change, change / weight], rel=1e-3)


def test_another_architecture_is_refused(known_adapter, fine_tune, out) -> None:
    (fine_tune / "config.json").write_text(json.dumps({**GPT2, **IS_GPT2}))
    with pytest.raises(UserError, match="does not fit"):
        run_merge(fine_tune, known_adapter, out, flags=["--foreign-base"])


def append_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """Append rows to a JSONL file."""
    with path.open("a") as file:
        for row in rows:
            file.write(json.dumps(row) + "\n")


def contaminated(folder: Path, decided: list[str]) -> Path:
    """What check_contamination.py leaves of two pairs, of which some are decided not-a-leak."""
    folder.mkdir()
    pairs = [{"pair_id": "p0", "train_id": "t0"}, {"pair_id": "p1", "train_id": "t1"}]
    append_rows(folder / "pairs.jsonl", pairs)
    verdicts = [{"pair_id": pair_id, "verdict": "not-a-leak"} for pair_id in decided]
    append_rows(folder / "decisions.jsonl", verdicts)
    (folder / "run.json").write_text("{}")
    return folder


def test_a_contaminated_partner_is_refused(known_adapter, fine_tune, tmp_path, out) -> None:
    """The paper's rule."""
    folder = contaminated(tmp_path / "contamination", decided=["p0"])
    flags = ["--foreign-base", "--partner-check", folder]
    with pytest.raises(UserError, match="1 pairs are not decided not-a-leak"):
        run_merge(fine_tune, known_adapter, out, flags=flags)
    flags.append("--allow-contaminated")
    run = run_merge(fine_tune, known_adapter, out, flags=flags)
    assert has_warning(run, "1 pairs")
    assert "1 pairs" in (out / "README.md").read_text()


def test_a_clean_partner_needs_no_warning(known_adapter, fine_tune, tmp_path, out) -> None:
    folder = contaminated(tmp_path / "contamination", decided=["p0", "p1"])
    flags = ["--foreign-base", "--partner-check", folder]
    run = run_merge(fine_tune, known_adapter, out, flags=flags)
    assert not has_warning(run, "not decided")
    assert not has_warning(run, "--partner-check")


def test_a_partner_check_that_is_missing_is_refused(
    known_adapter, fine_tune, tmp_path, out
) -> None:
    flags = ["--foreign-base", "--partner-check", tmp_path / "nowhere"]
    with pytest.raises(UserError, match="pairs.jsonl"):
        run_merge(fine_tune, known_adapter, out, flags=flags)


def write_run(adapter: Path, inputs: dict[str, Any], outputs: dict[str, Any]) -> None:
    """Write an adapter's run.json as finetune.py does; of each file a dict with its sha256."""
    run = {"step": "finetune", "settings": {}, "inputs": inputs, "outputs": outputs}
    (adapter / "run.json").write_text(json.dumps(run))


def test_an_adapter_that_was_edited_since_its_run_is_refused(known_adapter, out) -> None:
    write_run(known_adapter, {}, {"adapter_model.safetensors": {"sha256": "0" * 64}})
    done = run_script("merge", "--adapter", known_adapter, "--out", out)
    assert_refused(done, "edited")


def test_training_on_flagged_rows_is_written_down(known_base, known_adapter, tmp_path, out) -> None:
    folder = contaminated(tmp_path / "contamination", decided=["p0"])
    data = folder / "clean.jsonl"
    append_rows(data, [{"id": "t1", "licence": "MIT"}, {"id": "t9", "licence": "MIT"}])
    sha256 = common.sha256_of(data)
    write_run(known_adapter, {str(data): {"sha256": sha256}}, {})

    run = run_merge(known_base, known_adapter, out)
    described = run["adapters"][0]
    assert described["flagged_rows"] == 1
    assert described["licences"] == {"MIT": 2}
    assert has_warning(run, "1 rows that are flagged")
    card = (out / "README.md").read_text()
    for words in ["flagged", "MIT", sha256]:
        assert words in card

    append_rows(folder / "decisions.jsonl", [{"pair_id": "p1", "verdict": "not-a-leak"}])
    run = run_merge(known_base, known_adapter, tmp_path / "again")
    assert run["warnings"] == []


def test_flagged_rows_of_several_data_files_are_added(
    known_base, known_adapter, tmp_path, out
) -> None:
    """A config of the model, which may be listed too, is no data; a file's suffix may be any."""
    first = contaminated(tmp_path / "first", decided=["p0"]) / "clean.jsonl"
    second = contaminated(tmp_path / "second", decided=[]) / "clean.txt"
    append_rows(first, [{"id": "t0", "licence": "MIT"}, {"id": "t1", "licence": "MIT"}])
    append_rows(second, [{"id": "t0", "licence": "MIT"}, {"id": "t1", "licence": "apache-2.0"}])
    paths = [first, second, known_base / "config.json", known_base / "model.safetensors"]
    inputs = common.describe_files(paths)
    write_run(known_adapter, inputs, {})

    described = run_merge(known_base, known_adapter, out)["adapters"][0]
    assert set(described["data"]) == {str(first), str(second)}
    assert described["flagged_rows"] == 1 + 2
    assert described["licences"] == {"MIT": 3, "apache-2.0": 1}


def test_flagged_rows_are_not_known_where_one_file_was_not_checked(
    known_base, known_adapter, tmp_path, out
) -> None:
    checked = contaminated(tmp_path / "checked", decided=[]) / "clean.jsonl"
    unchecked = tmp_path / "rows.jsonl"
    append_rows(checked, [{"id": "t0", "licence": "MIT"}])
    append_rows(unchecked, [{"id": "t1", "licence": "MIT"}])
    write_run(known_adapter, common.describe_files([checked, unchecked]), {})

    run = run_merge(known_base, known_adapter, out)
    assert "flagged_rows" not in run["adapters"][0]
    assert has_warning(run, "flagged rows is not known")


def test_training_on_nf4_is_said(known_base, known_adapter, out, capsys) -> None:
    write_fingerprint(known_adapter, known_base, load_in_4bit=True)
    run_merge(known_base, known_adapter, out)
    command = f"evaluate.py --load-in-4bit --adapter {known_adapter} --model {known_base}"
    assert command in capsys.readouterr().err
    assert_equal_to_peft(known_base, known_adapter, out, dtype=torch.bfloat16)


# --- what is refused ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base in shards, never changed."""
    folder = tmp_path_factory.mktemp("small")
    return make_base(folder / "base", torch.bfloat16, in_shards=True)


@pytest.fixture(scope="module")
def small_adapter(small_base: Path) -> Path:
    return make_lora(small_base.with_name("adapter"), small_base)


@pytest.fixture
def folder(small_base, small_adapter, tmp_path) -> Path:
    """A folder with copies of both, base/ and adapter/, to be spoilt."""
    shutil.copytree(small_base, tmp_path / "base")
    shutil.copytree(small_adapter, tmp_path / "adapter")
    return tmp_path


CONFIG = "adapter/adapter_config.json"
ADAPTER = "adapter/adapter_model.safetensors"
INDEX = "base/model.safetensors.index.json"
A0 = "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"
B0 = "base_model.model.model.layers.0.mlp.up_proj.lora_B.weight"


def assert_one_line(folder: Path, words: str) -> None:
    """Merging the folder's base and adapter is refused, and leaves nothing that looks finished."""
    out = folder / "merged"
    with pytest.raises(UserError) as refused:
        run_merge(folder / "base", folder / "adapter", out)
    message = str(refused.value)
    assert words in message
    assert "\n" not in message
    if out.exists():  # the fault was found while merging
        assert (out / ".unfinished").exists()
        assert not (out / "run.json").exists()


def edit_json(path: Path, **changes: Any) -> None:
    value = json.loads(path.read_text())
    value.update(changes)
    path.write_text(json.dumps(value))


BAD_OPTIONS = [  # of the adapter's config: a change, words of the message
    ({"peft_type": "LOHA"}, "no option of LOHA"),
    ({"peft_type": "LORAX"}, "no kind of adapter"),
    ({"peft_type": 3}, "is no kind"),
    ({"peft_type": ["LORA"]}, "is no kind"),
    ({"r": "4"}, "does not fit"),
    ({"r": None}, "does not fit"),
    ({"r": 0}, "does not fit"),
    ({"r": 8}, "size mismatch"),  # its tensors have 4
    ({"lora_alpha": 1e999}, "is not finite"),
    ({"rank_pattern": [1]}, "does not fit"),
    ({"rank_pattern": {"(": 1}}, "does not fit"),  # no regular expression
    ({"alpha_pattern": {"up_proj": "y"}}, "fit"),
    ({"use_dora": True}, "10 of the 30 tensors"),
    ({"use_magic": True}, "use_magic"),
    ({"layer_replication": [[0, 2], [0, 2]]}, "layer_replication cannot be merged"),
    ({"init_lora_weights": "pissa_niter_4"}, "changed the base by chance"),
]


@pytest.mark.parametrize("change, words", BAD_OPTIONS, ids=str)
def test_bad_options_are_refused(folder, change: dict, words: str) -> None:
    edit_json(folder / CONFIG, **change)
    assert_one_line(folder, words)


BAD_WEIGHT_MAPS = [  # tensor -> file, words of the message
    (["x"], "weight_map cannot be"),
    ({}, "has no tensors"),
    ({"x": 3}, "has no 3"),
    ({"x": "../y.safetensors"}, "is no file of its folder"),
]


@pytest.mark.parametrize("weight_map, words", BAD_WEIGHT_MAPS, ids=str)
def test_a_bad_index_is_refused(folder, weight_map: object, words: str) -> None:
    edit_json(folder / INDEX, weight_map=weight_map)
    assert_one_line(folder, words)


def test_a_quantised_base_is_refused(folder) -> None:
    edit_json(folder / "base/config.json", quantization_config={"quant_method": "gptq"})
    assert_one_line(folder, "quantised; merge into the original")


BAD_FILES = [  # a file, what it holds, words of the message
    (CONFIG, b"{", "is not JSON"),
    (CONFIG, b"\xff\xfe{}", "is not JSON"),
    (CONFIG, b"[]", "holds a list"),
    (ADAPTER, b"", "cut short"),
    (INDEX, b"nope", "is not JSON"),
    ("adapter/base_fingerprint.json", b"?", "base_fingerprint.json is not JSON"),
    ("adapter/run.json", b"[]", "run.json is not what"),
    ("adapter/.unfinished", b"python finetune.py", "finish it with python finetune.py"),
]


@pytest.mark.parametrize("name, content, words", BAD_FILES)
def test_bad_files_are_refused(folder, name: str, content: bytes, words: str) -> None:
    (folder / name).write_bytes(content)
    assert_one_line(folder, words)


def test_lists_in_lists_without_end_are_refused(folder) -> None:
    """Python's JSON reader meets its recursion limit."""
    (folder / CONFIG).write_text("[" * 99999)
    assert_one_line(folder, "is not JSON")


MISSING_FILES = [  # a file, words of the message
    (CONFIG, "adapter_config.json is missing"),
    (ADAPTER, "adapter_model.safetensors is missing"),
    ("base/config.json", "config.json is missing"),
]


@pytest.mark.parametrize("name, words", MISSING_FILES)
def test_missing_files_are_refused(folder, name: str, words: str) -> None:
    (folder / name).unlink()
    assert_one_line(folder, words)


def first_shard(folder: Path) -> Path:
    """The base's first shard; how many follow is part of its name."""
    return next((folder / "base").glob("model-00001-of-*.safetensors"))


def test_a_missing_shard_is_refused(folder) -> None:
    first_shard(folder).unlink()
    assert_one_line(folder, "has no model-00001-of-")


def test_a_pickled_adapter_is_refused(folder) -> None:
    (folder / ADAPTER).rename(folder / "adapter/adapter_model.bin")
    assert_one_line(folder, "convert it: python -c")


def test_a_pickled_base_is_refused(folder) -> None:
    for path in (folder / "base").glob("*.safetensors"):
        path.rename(path.with_suffix(".bin"))
    assert_one_line(folder, "save it as safetensors first")


def cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


def test_an_adapter_that_is_cut_short_is_refused(folder) -> None:
    cut(folder / ADAPTER, 5000)
    assert_one_line(folder, "cut short")


@pytest.mark.parametrize("size", [30000, 40], ids=["in its tensors", "in its header"])
def test_a_shard_that_is_cut_short_is_refused(folder, size: int) -> None:
    cut(first_shard(folder), size)
    assert_one_line(folder, "cut short")


BAD_HEADERS = [{"shape": "x"}, {"data_offsets": [5, 1]}, {"dtype": 7}]  # changes of one tensor's


@pytest.mark.parametrize("change", BAD_HEADERS, ids=str)
def test_a_shard_with_a_bad_header_is_refused(folder, change: dict) -> None:
    """A safetensors file: 8 bytes, the length of the header; the header, JSON; the numbers."""
    path = first_shard(folder)
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    names = [name for name in header if name != "__metadata__"]
    header[names[0]].update(change)

    text = json.dumps(header).encode()
    length = len(text).to_bytes(8, "little")
    path.write_bytes(length + text + data[end:])
    assert_one_line(folder, "no safetensors file")


def test_a_surplus_tensor_is_refused(folder) -> None:
    with edit_tensors(folder / ADAPTER) as tensors:
        tensors["surplus"] = torch.zeros(1)
    assert_one_line(folder, "1 of its 21 tensors would be ignored: surplus")


def test_a_missing_tensor_is_refused(folder) -> None:
    with edit_tensors(folder / ADAPTER) as tensors:
        del tensors[B0]
    assert_one_line(folder, f"1 of the 20 tensors that its config selects are missing: {B0}")


def test_a_magnitude_without_dora_is_refused(folder) -> None:
    name = A0.replace("lora_A.weight", "lora_magnitude_vector")
    with edit_tensors(folder / ADAPTER) as tensors:
        tensors[name] = torch.ones(224)
    assert_one_line(folder, "would be ignored")


def test_half_of_the_layers_are_refused(folder) -> None:
    with edit_tensors(folder / ADAPTER) as tensors:
        for name in list(tensors):
            if "layers.0" not in name:
                del tensors[name]
    assert_one_line(folder, "10 of the 20 tensors that its config selects are missing")


def test_a_factor_of_one_dimension_is_refused(folder) -> None:
    with edit_tensors(folder / ADAPTER) as tensors:
        tensors[A0] = torch.ones(4)
    assert_one_line(folder, "size mismatch")


def test_nan_is_refused(folder) -> None:
    with edit_tensors(folder / ADAPTER) as tensors:
        tensors[A0] *= torch.nan
    assert_one_line(folder, "NaN or infinite")


def test_an_untrained_adapter_is_refused(folder) -> None:
    """Training starts with every B at zero."""
    with edit_tensors(folder / ADAPTER) as tensors:
        for name in tensors:
            if "lora_B" in name:
                tensors[name] *= 0
    assert_one_line(folder, "changes nothing")


def test_a_change_beyond_the_base_type_is_refused(folder) -> None:
    with edit_tensors(folder / ADAPTER) as tensors:
        tensors[A0] *= 1e25
        tensors[B0] *= 1e25
    assert_one_line(folder, "the sum is not finite in torch.bfloat16")


def test_a_base_of_integers_is_refused(folder) -> None:
    for path in (folder / "base").glob("*.safetensors"):
        with edit_tensors(path) as tensors:
            for name in tensors:
                tensors[name] = tensors[name].to(torch.int8)
    assert_one_line(folder, "holds torch.int8; merge into the 16-bit original")


ODD = [None, True, 1e999, "x", ["x"], {"x": []}]
FINGERPRINT = "adapter/base_fingerprint.json"
JSON_FILES = [CONFIG, INDEX, "base/config.json", FINGERPRINT, "adapter/run.json", "base/run.json"]


def odd_versions(text: str) -> Iterator[str]:
    """A JSON object with one of its values replaced by an odd one, each by each."""
    value = json.loads(text)
    for key in value:
        for odd in ODD:
            yield json.dumps({**value, key: odd})


@pytest.mark.slow
@pytest.mark.parametrize("name", JSON_FILES)
def test_odd_json_types_anywhere_are_one_line(folder, name: str) -> None:
    base = folder / "base"
    adapter = folder / "adapter"
    write_fingerprint(adapter, base)
    edit_json(base / "config.json", quantization_config=None)
    write_run(adapter, {}, {})
    (base / "run.json").write_text(json.dumps({"lineage": []}))
    out = folder / "merged"
    run_merge(base, adapter, out, flags=["--foreign-base"])  # as it is, it merges
    shutil.rmtree(out)

    refused = 0
    for text in odd_versions((folder / name).read_text()):
        (folder / name).write_text(text)
        try:
            run_merge(base, adapter, out, flags=["--foreign-base"])
        except UserError as error:
            assert "\n" not in str(error)
            refused += 1
        shutil.rmtree(out, ignore_errors=True)
    if name != FINGERPRINT:  # any is that of another base, which was asked for
        assert refused > 0


WRONG_BASES = [  # changes of the base's config, words of the message
    ({"intermediate_size": 256}, "torch.Size([224, 4])"),
    ({"num_hidden_layers": 1}, "would be ignored"),
    ({"hidden_size": 64, "head_dim": 24}, "does not fit"),
]


@pytest.mark.parametrize("changes, words", WRONG_BASES, ids=str)
def test_wrong_bases_are_refused(small_adapter, tmp_path, out, changes: dict, words: str) -> None:
    base = make_base(tmp_path / "base", torch.bfloat16, **changes)
    with pytest.raises(UserError, match="does not fit") as refused:
        run_merge(base, small_adapter, out)
    assert words in str(refused.value)
    assert not out.exists()


def test_a_base_with_a_grown_vocabulary_is_refused(small_base, tmp_path, out) -> None:
    adapter = make_lora(tmp_path / "adapter", small_base, **ENDS)
    grown = make_base(tmp_path / "grown", torch.bfloat16, vocab_size=164)
    with pytest.raises(UserError, match="does not fit"):
        run_merge(grown, adapter, out)
    assert not out.exists()


BAD_FLAGS = [  # flags after the usual ones, words of the message
    ("--limit 3", "--limit does not apply"),
    ("--device cuda", "merging runs on the cpu"),
    ("--allow-contaminated", "--partner-check"),
    ("--partner-check {tmp}/none", "none/pairs.jsonl is missing"),
    ("--check-logits --adapter {adapter}:2", "one adapter of weight 1"),
    ("--adapter {adapter}:much", "'much' is not a number"),
    ("--adapter {adapter}:0", "not a number other than 0"),
    ("--adapter {adapter}:nan", "not a number other than 0"),
    ("--adapter {adapter}:inf", "not a number other than 0"),
    ("--adapter {tmp}/none", "none is missing"),
    ("--base-model {tmp}/none", "no such folder"),
    ("--base-model ./none", "no such folder"),
    ("--base-model demo/none", "no such folder"),
    ("--out {base}/inside", "lies inside"),
    ("--out {adapter}", "is the folder of an input"),
    ("--out {base}/config.json", "is a file"),
    ("--merge-it", "--merge-it"),
]


@pytest.mark.parametrize("flags, words", BAD_FLAGS)
def test_bad_flags_are_refused(small_base, small_adapter, tmp_path, flags: str, words: str) -> None:
    """As a user types them: exit code 2, one line, and the folders as they were."""
    places = {"tmp": tmp_path, "base": small_base, "adapter": small_adapter}
    command = "--adapter {adapter} --base-model {base} --out {tmp}/merged " + flags
    arguments = [word.format(**places) for word in command.split()]
    done = run_script("merge", *arguments)
    assert_refused(done, words)
    assert "HF_TOKEN" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert not list(tmp_path.iterdir())
    assert not (small_base / "inside").exists()


def test_an_unknown_hub_id_is_refused(small_adapter, out) -> None:
    flags = ["--adapter", small_adapter, "--out", out, "--base-model", "nobody/nothing"]
    done = run_script("merge", *flags)
    assert_refused(done, "nobody/nothing: no such folder", "HF_TOKEN")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_finished_model_is_not_overwritten_unasked(small_base, small_adapter, out) -> None:
    run_merge(small_base, small_adapter, out)
    before = contents(out)
    with pytest.raises(UserError, match="--overwrite"):
        run_merge(small_base, small_adapter, out)
    assert contents(out) == before

    (out / "mine.txt").write_text("a note of mine")
    run_merge(small_base, f"{small_adapter}:2", out, flags=["--overwrite"])
    assert (out / "mine.txt").exists()
    assert (out / "README.md").read_bytes() != before["README.md"]
    assert list(out.parent.iterdir()) == [out]


def full_disk(path: Path) -> SimpleNamespace:
    """shutil.disk_usage() of a disk too small, even with the room that the former model takes."""
    return SimpleNamespace(free=-1_000_000)


def test_a_full_disk_is_seen_before_anything_is_overwritten(
    small_base, small_adapter, out, monkeypatch
) -> None:
    run_merge(small_base, small_adapter, out)
    before = contents(out)
    monkeypatch.setattr(shutil, "disk_usage", full_disk)
    with pytest.raises(UserError, match="GB needed"):
        run_merge(small_base, small_adapter, out, flags=["--overwrite"])
    assert contents(out) == before


def test_a_merge_that_broke_off_begins_again(small_base, small_adapter, out, monkeypatch) -> None:
    """Shards that it left are gone afterwards: transformers would take the wrong ones."""
    merge_layer = merge.merge_layer
    merged = []

    def stop_at_the_eighth(plan, path):
        merged.append(path)
        if len(merged) == 8:
            raise KeyboardInterrupt
        return merge_layer(plan, path)

    monkeypatch.setattr(merge, "SHARD_SIZE", "100KB")
    monkeypatch.setattr(merge, "merge_layer", stop_at_the_eighth)
    with pytest.raises(KeyboardInterrupt):
        run_merge(small_base, small_adapter, out)
    assert list(out.glob("model-*.safetensors"))
    assert (out / ".unfinished").exists()

    monkeypatch.undo()
    run_merge(small_base, small_adapter, out)
    assert [path.name for path in out.glob("*.safetensors*")] == ["model.safetensors"]
    assert not list(out.glob(".*"))
    assert_equal_to_peft(small_base, small_adapter, out, dtype=torch.bfloat16)


def test_a_full_disk_in_the_middle_is_one_line(small_base, small_adapter, out) -> None:
    command = ["bash", "-c", 'ulimit -f 100; exec "$@"', "bash"]  # no file above 100 kB
    command += [sys.executable, ROOT / "merge.py", "--adapter", small_adapter]
    command += ["--base-model", small_base, "--out", out]
    done = subprocess.run(command, capture_output=True, text=True)
    assert_refused(done, "File too large")
    assert (out / ".unfinished").exists()
    assert not (out / "run.json").exists()


def test_the_folder_itself_as_output(small_base, small_adapter, out, monkeypatch) -> None:
    out.mkdir()
    monkeypatch.chdir(out)
    run = run_merge(small_base, small_adapter, Path("."))
    assert run["settings"]["out"] == "."
    assert list(out.parent.iterdir()) == [out]


def test_two_merges_into_one_folder_are_kept_apart(small_base, small_adapter, out) -> None:
    from common import claim_output

    with claim_output(out, overwrite=False):
        with pytest.raises(UserError, match="another process"):
            run_merge(small_base, small_adapter, out)
        assert (out / ".unfinished").exists()

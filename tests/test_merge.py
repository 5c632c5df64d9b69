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
    assert run["adapters"][0]["sha256"] and run["proof"]["tensors_equal_to_base"] == 11


@pytest.mark.parametrize("spoil", ["copied", "changed"])
def test_the_proof_finds_one_wrong_number(tmp_path, monkeypatch, spoil: str) -> None:
    """One number, in a row that is sampled, or anywhere in a tensor that was only copied."""
    base = make_base(tmp_path / "base", torch.float32)
    adapter = make_adapter(tmp_path / "adapter", base)
    blocks = merge.new_blocks

    def spoilt(plan, name):
        for number, block in enumerate(blocks(plan, name)):
            if number == 0 and (spoil == "changed") == (name in plan.changed()):
                block[0 if spoil == "changed" else -1, -2] += 1  # the third byte of a float32
            yield block

    monkeypatch.setattr(merge, "new_blocks", spoilt)
    with pytest.raises(AssertionError, match="is off by" if spoil == "changed" else "is not what"):
        run_merge(base, tmp_path / "m", "--adapter", adapter)
    assert {path.name for path in tmp_path.iterdir()} == {"base", "adapter"}


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
    w, change = (square**0.5 for square in squares(adapter, weights(other), "layers.1."))
    assert shown == pytest.approx([w, change, change / w], rel=1e-3)


def test_another_architecture_is_refused(pair, tmp_path) -> None:
    _, adapter, other = pair
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "model_type": "mistral"}))
    with pytest.raises(UserError, match="model_type llama -> mistral"):
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


@pytest.mark.filterwarnings("ignore")
def test_what_nf4_took_away(tmp_path, monkeypatch) -> None:
    from bitsandbytes import functional

    monkeypatch.setattr(merge, "BLOCK_ELEMENTS", 1024)
    wide = {"hidden_size": 128, "intermediate_size": 192}  # bitsandbytes errs elsewhere on CPUs
    base = make_base(tmp_path / "base", torch.bfloat16, **wide)
    adapter = fingerprinted(make_adapter(tmp_path / "adapter", base), base, load_in_4bit=True)
    plain, coarse = (["--adapter", adapter, *more] for more in ([], ["--dequantised-base"]))
    run = run_merge(base, tmp_path / "m", *plain)
    before, ours = weights(base), weights(tmp_path / "m")
    expected = merged_by_peft(base, adapter, torch.bfloat16)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in ours.items())
    dequantised, error = {}, 0.0
    for name, tensor in before.items():
        if tensor.dim() == 2 and "embed" not in name and "head" not in name:
            codes, state = functional.quantize_4bit(
                tensor, quant_type="nf4", blocksize=64, compress_statistics=True
            )
            dequantised[name] = functional.dequantize_4bit(codes, state)
            if "layers.0" in name and not torch.equal(ours[name], tensor):
                error += (dequantised[name].float() - tensor).square().sum().item()
    row = next(line for line in run["norms"] if "layer 0" in line)
    _, change = squares(adapter, before, "layers.0.")
    assert float(row.split("|")[6]) == pytest.approx((error / change) ** 0.5, rel=1e-3)
    run_merge(base, tmp_path / "n", *coarse)
    ours = weights(tmp_path / "n")
    save_file({**before, **dequantised}, base / "model.safetensors", metadata={"format": "pt"})
    expected = merged_by_peft(base, adapter, torch.bfloat16)
    assert len(dequantised) == 14
    assert all(torch.equal(tensor, expected[name]) for name, tensor in ours.items())
    fingerprinted(adapter, base)
    with pytest.raises(UserError, match="not trained on NF4"):
        run_merge(base, tmp_path / "o", *coarse)


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
    "unknown kind": (lambda b, a: edit_json(a / CONFIG, peft_type="LOHA"), "peft_type is LOHA"),
    "kind a number": (lambda b, a: edit_json(a / CONFIG, peft_type=3), "peft_type cannot be 3"),
    "kind a list": (lambda b, a: edit_json(a / CONFIG, peft_type=["LORA"]), "peft_type cannot be"),
    "rank text": (lambda b, a: edit_json(a / CONFIG, r="4"), "r cannot be '4'"),
    "rank true": (lambda b, a: edit_json(a / CONFIG, r=True), "r cannot be True"),
    "rank null": (lambda b, a: edit_json(a / CONFIG, r=None), "is not a rank"),
    "rank 0": (lambda b, a: edit_json(a / CONFIG, r=0), "is not a rank"),
    "wrong rank": (lambda b, a: edit_json(a / CONFIG, r=8), "not of rank 8"),
    "alpha infinite": (lambda b, a: edit_json(a / CONFIG, lora_alpha=1e999), "is not a rank or an"),
    "pattern a list": (lambda b, a: edit_json(a / CONFIG, rank_pattern=[1]), "rank_pattern cannot"),
    "pattern no regex": (lambda b, a: edit_json(a / CONFIG, rank_pattern={"(": 1}), "rank_pattern"),
    "pattern of text": (lambda b, a: edit_json(a / CONFIG, alpha_pattern={"x": "y"}), "not a rank"),
    "dora a text": (lambda b, a: edit_json(a / CONFIG, use_dora="no"), "use_dora cannot be 'no'"),
    "dora missing": (lambda b, a: edit_json(a / CONFIG, use_dora=True), "do not fit each other"),
    "parameters": (
        lambda b, a: edit_json(a / CONFIG, target_parameters=["experts"]),
        "target_parameters",
    ),
    "pissa": (lambda b, a: edit_json(a / CONFIG, init_lora_weights="pissa"), "changed the base"),
    "pickled adapter": (
        lambda b, a: (a / ADAPTER).rename(a / "adapter_model.bin"),
        "convert it: python -c",
    ),
    "no weights": (lambda b, a: (a / ADAPTER).unlink(), "adapter_model.safetensors is missing"),
    "adapter cut": (lambda b, a: cut(a / ADAPTER, 5000), "cut short"),
    "adapter empty": (lambda b, a: cut(a / ADAPTER, 0), "cut short"),
    "surplus key": (
        lambda b, a: edit_tensors(a / ADAPTER, lambda t: {**t, "surplus": torch.zeros(1)}),
        "1 of its 21 tensors would be ignored: ['surplus']",
    ),
    "B missing": (
        lambda b, a: edit_tensors(a / ADAPTER, lambda t: {k: t[k] for k in t if k != B0}),
        "1 of its 19 tensors would be ignored",
    ),
    "magnitude without dora": (
        lambda b, a: edit_tensors(
            a / ADAPTER,
            lambda t: {**t, A0.replace("lora_A.weight", "lora_magnitude_vector"): torch.ones(224)},
        ),
        "would be ignored",
    ),
    "one-dimensional A": (
        lambda b, a: edit_tensors(a / ADAPTER, lambda t: {**t, A0: torch.ones(4)}),
        "do not fit each other",
    ),
    "whole numbers": (
        lambda b, a: edit_tensors(a / ADAPTER, lambda t: {**t, A0: t[A0].int()}),
        "holds I32, not floats",
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
        "the sum is not finite in BF16",
    ),
    "no base config": (lambda b, a: (b / "config.json").unlink(), "config.json is missing"),
    "tied a text": (
        lambda b, a: edit_json(b / "config.json", tie_word_embeddings="yes"),
        "tie_word_embeddings cannot be 'yes'",
    ),
    "quantised base": (
        lambda b, a: edit_json(b / "config.json", quantization_config={"quant_method": "gptq"}),
        "quantised; merge into the original",
    ),
    "int8 base": (
        lambda b, a: [
            edit_tensors(p, lambda t: {k: t[k].to(torch.int8) for k in t})
            for p in b.glob("*.safetensors")
        ],
        "holds I8, not floats; merge into the 16-bit original",
    ),
    "missing shard": (lambda b, a: first_shard(b).unlink(), "has no model-00001-of-"),
    "shard cut": (lambda b, a: cut(first_shard(b), 30000), "cut short"),
    "shard header cut": (lambda b, a: cut(first_shard(b), 40), "cut short"),
    "header shape": (lambda b, a: header(first_shard(b), shape="x"), "no safetensors file"),
    "header offsets": (lambda b, a: header(first_shard(b), data_offsets=[5, 1]), "no safetensors"),
    "header type": (lambda b, a: header(first_shard(b), dtype=7), "no safetensors file"),
    "index no JSON": (lambda b, a: (b / INDEX).write_text("nope"), "is not JSON"),
    "index a list": (lambda b, a: edit_json(b / INDEX, weight_map=["x"]), "weight_map cannot be"),
    "index empty": (lambda b, a: edit_json(b / INDEX, weight_map={}), "is no file of its folder"),
    "index of numbers": (lambda b, a: edit_json(b / INDEX, weight_map={"x": 3}), "[3] is no file"),
    "index outside": (
        lambda b, a: edit_json(b / INDEX, weight_map={"x": "../y.safetensors"}),
        "is no file of its folder",
    ),
    "index wrong": (
        lambda b, a: edit_json(b / INDEX, weight_map={"absent": first_shard(b).name}),
        "['absent'] is not in the shard",
    ),
    "pickled base": (
        lambda b, a: [p.rename(p.with_suffix(".bin")) for p in b.glob("*.safetensors")],
        "convert its pickles: python -c",
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
def test_bad_input_is_one_line_and_leaves_nothing(small, tmp_path, case: str) -> None:
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    shutil.copytree(small[0], base), shutil.copytree(small[1], adapter)
    spoil, words = BAD[case]
    spoil(base, adapter)
    with pytest.raises(UserError) as refused:
        run_merge(base, tmp_path / "m", "--adapter", adapter)
    assert words in str(refused.value) and "\n" not in str(refused.value), refused.value
    assert {path.name for path in tmp_path.iterdir()} == {"base", "adapter"}


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
                    shutil.rmtree(tmp_path / "m")
                except UserError as error:
                    assert "\n" not in str(error)
                    refused += 1
                assert not (tmp_path / "m").exists() and not (tmp_path / ".m.tmp").exists()
        path.write_text(json.dumps(whole))
    assert refused


def test_wrong_bases_are_refused(small, tmp_path) -> None:
    base, adapter = small
    for changes, words in {
        "wide": (
            {"intermediate_size": 256},
            "down_proj.weight is [96, 256] there, not [[96, 224]]",
        ),
        "shallow": ({"num_hidden_layers": 1}, "layers.1"),
        "narrow": ({"hidden_size": 64, "head_dim": 24}, "does not fit"),
    }.values():
        other = make_base(tmp_path / words[:4], torch.bfloat16, **changes)
        with pytest.raises(UserError, match="does not fit") as refused:
            run_merge(other, tmp_path / "m", "--adapter", adapter)
        assert words in str(refused.value)
    grown = make_base(tmp_path / "grown", torch.bfloat16, vocab_size=164)
    ends = make_adapter(tmp_path / "ends", base, **ENDS)
    with pytest.raises(UserError, match="another vocabulary"):
        run_merge(grown, tmp_path / "m", "--adapter", ends)


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


def test_a_finished_model_is_kept_until_the_new_one_is_proved(small, tmp_path, monkeypatch) -> None:
    base, adapter = small
    out = tmp_path / "m"
    run_merge(base, out, "--adapter", adapter)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(UserError, match="--overwrite"):
        run_merge(base, out, "--adapter", adapter)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9, 8, 1))
    with pytest.raises(UserError, match="GB needed, 0.0 free"):
        run_merge(base, out, "--adapter", adapter, "--overwrite")
    monkeypatch.undo()
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    (out / "mine.txt").write_text("a note of mine")
    run_merge(base, out, "--adapter", f"{adapter}:2", "--overwrite")
    assert (out / "mine.txt").exists() and (out / "README.md").read_bytes() != before["README.md"]
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_a_full_disk_in_the_middle_leaves_nothing(small, tmp_path) -> None:
    base, adapter = small
    args = ["--adapter", adapter, "--base-model", base, "--out", tmp_path / "m"]
    command = [sys.executable, ROOT / "merge.py", *args]
    limited = ["bash", "-c", 'ulimit -f 100; exec "$@"', "bash", *map(str, command)]  # 100 kB
    assert_refused(subprocess.run(limited, capture_output=True, text=True), "File too large")
    assert not list(tmp_path.iterdir())


def in_child(work, wait: float, stop: int) -> int:
    """Run work() in a forked child that gets the signal `stop` after `wait` seconds."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # until the child's try
    child = os.fork()
    if child == 0:
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1), os.dup2(1, 2)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
            work()
            os._exit(0)
        except KeyboardInterrupt:
            os._exit(130)
        except BaseException:
            os._exit(1)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    time.sleep(wait)
    os.kill(child, stop)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.parametrize("stop", [signal.SIGKILL, signal.SIGINT])
def test_killed_merges_leave_the_old_model_or_the_new_one(small, tmp_path, stop) -> None:
    base, adapter = small
    out = tmp_path / "m"

    def work(weight: int, *more: str) -> dict:
        return run_merge(base, out, "--adapter", f"{adapter}:{weight}", *more)

    torch.set_num_threads(1)  # a forked child has no other threads
    began = time.monotonic()
    work(1)
    whole = time.monotonic() - began
    codes = set()
    for trial in range(12):
        codes.add(in_child(lambda: work(2, "--overwrite"), whole * trial / 3, stop))
        if not (out / ".unfinished").exists():
            run = json.loads((out / "run.json").read_text())
            for name, about in run["outputs"].items():
                assert merge.shared.sha256_of(out / name) == about["sha256"]
    assert codes == {-9 if stop == signal.SIGKILL else 130, 0}
    (tmp_path / ".m.tmp").mkdir(exist_ok=True)  # as if killed in the middle
    (tmp_path / ".m.tmp/.unfinished").write_text("python merge.py")
    (tmp_path / ".m.tmp/half.safetensors").write_text("half")
    work(3, "--overwrite")
    assert [path.name for path in tmp_path.iterdir()] == ["m"]
    assert not any(path.name.startswith(".") for path in out.iterdir())


def test_ctrl_c_takes_the_half_written_away(small, tmp_path, monkeypatch) -> None:
    base, adapter = small
    blocks = merge.shard_bytes

    def interrupted(plan, shard):
        if shard != plan.shards[0]:
            os.kill(os.getpid(), signal.SIGINT)
        return blocks(plan, shard)

    monkeypatch.setattr(merge, "shard_bytes", interrupted)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in a shell's background
    with pytest.raises(KeyboardInterrupt):
        run_merge(base, tmp_path / "m", "--adapter", adapter)
    assert not list(tmp_path.iterdir())


def test_killed_while_renaming(small, tmp_path, monkeypatch) -> None:
    """What the killed merge had renamed and the next does not write is taken away."""
    base, adapter = small
    out, replace, count = tmp_path / "m", os.replace, [0]

    def killed(source: Path, target: Path) -> None:
        count[0] += target.parent == out
        if count[0] == 4:
            os._exit(9)
        replace(source, target)

    child = os.fork()
    if child == 0:
        os.replace = killed
        run_merge(base, out, "--adapter", adapter)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert (out / ".unfinished").exists() and not (out / "run.json").exists()
    single = make_base(tmp_path / "single", torch.bfloat16)
    run_merge(single, out, "--adapter", adapter)
    assert [path.name for path in out.glob("*.safetensors*")] == ["model.safetensors"]
    assert {path.name for path in tmp_path.iterdir()} == {"m", "single"}


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
    with output_folder(tmp_path / ".m.tmp", overwrite=False):
        with pytest.raises(UserError, match="another process"):
            run_merge(base, tmp_path / "m", "--adapter", adapter)
        assert (tmp_path / ".m.tmp/.unfinished").exists()

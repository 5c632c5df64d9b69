"""Holds: shared prefixes give the harness's numbers, for every request, pack size, model and process
count, with no token forwarded twice; a stopped run goes on to the same numbers and takes nothing of
another model; comparisons are what scipy and a hand compute; bad input is one line."""

import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import REAL_DATA, ROOT, WORLD, load_evaluate, run_script

evaluate = load_evaluate()
BASE = ROOT / "demo/base_model"
WORLD_TASK = ["--tasks", "", "--task", str(ROOT / "demo/world.yaml")]
SIZES = {"vocab_size": 900, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 64}
GPT2 = {"vocab_size": 900, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
SERVED = {
    "grouped-query": ("Llama", {"num_key_value_heads": 2}),
    "tied": ("Llama", {"tie_word_embeddings": True}),
    "gpt2": ("GPT2", None),
    "qwen3": ("Qwen3", {"head_dim": 8}),
    "mixtral": ("Mixtral", {"num_local_experts": 4, "sliding_window": None}),
}
NOT_SERVED = {
    "a sliding window": ("Mistral", {"sliding_window": 8}),
    "sliding_attention": ("Gemma2", {"sliding_window": 8, "head_dim": 8}),
    "depend on the sequence's length": ("Llama", {"rope_parameters": {
        "rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}),
    "does not take position_ids": ("Bloom", None),
}  # fmt: skip


# --- models and requests --------------------------------------------------------------------------


def make_model(
    folder: Path, kind: str = "Llama", sizes: dict | None = None, scale: float = 8
) -> Path:
    """A tiny random model whose attention matters, with the demo's tokenizer."""
    import transformers

    torch.manual_seed(0)
    sizes = GPT2 if kind in ("GPT2", "Bloom") else {**SIZES, **(sizes or {})}
    config = getattr(transformers, f"{kind}Config")(**sizes, bos_token_id=1, eos_token_id=2)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(scale)
    model.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(BASE).save_pretrained(folder)
    return folder


def load(folder: Path, chunks: Path, **settings):
    evaluate.import_harness()
    settings = {"device": "cpu", "dtype": "float32", "batch_size": 4, **settings}
    return evaluate.prefix_lm()(pretrained=str(folder), chunks=chunks, **settings)


def stock_answers(lm, requests: list) -> list:
    """The harness's own method on the same object."""
    from lm_eval.models.huggingface import HFLM

    raw = [(key, list(context), list(answer)) for key, context, answer in requests]
    return HFLM._loglikelihood_tokens(lm, raw, disable_tqdm=True)


def random_requests(rng: random.Random, count: int = 30, longest: int = 75) -> list:
    """Branching at random depths; some equal, some too long, one-token contexts and answers."""

    def ids(size: int) -> list[int]:
        return [rng.randrange(3, 900) for _ in range(size)]

    stems = [ids(rng.randrange(1, longest)) for _ in range(4)]
    requests = []
    for _ in range(count):
        context = rng.choice(stems)[: rng.randrange(1, longest)] + ids(rng.choice([0, 0, 1, 9]))
        for _ in range(rng.randrange(1, 5)):
            requests.append((None, context, ids(rng.choice([1, 1, 2, 7]))))
    return requests + rng.sample(requests, 5)


def assert_close(ours: list, theirs: list, within: float = 1e-3) -> None:
    for (a, greedy), (b, expected) in zip(ours, theirs, strict=True):
        assert abs(a - b) <= within and greedy == expected, (a, b)


# --- shared prefixes ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SERVED)
def test_random_requests_score_as_in_the_harness(name: str, tmp_path, monkeypatch) -> None:
    """Also with chunks of a few tokens: boundaries change nothing."""
    lm = load(make_model(tmp_path / "model", *SERVED[name]), tmp_path / "chunks")
    assert lm.why_stock == "" and lm.max_length == 64
    rng = random.Random(name)
    for pack in (8, 9, 31, 64, 500, 4096):
        lm.scorer.pack = pack
        monkeypatch.setattr(evaluate, "CHUNK_TOKENS", rng.choice([1, 100, 65_536]))
        monkeypatch.setattr(evaluate, "CHUNK_SHARE", rng.choice([0, 200]))
        requests = random_requests(rng)
        theirs = stock_answers(lm, requests)
        assert_close(lm._loglikelihood_tokens(requests), theirs, 1e-4)
        assert any(greedy is False for _, greedy in theirs)
    assert lm.truncated


def test_greedy_answers_are_known(tmp_path) -> None:
    lm = load(BASE, tmp_path / "chunks")
    context = lm.tok_encode("Below is an instruction")
    best = []
    for _ in range(4):
        logits = lm.model(torch.tensor([context + best])).logits[0, -1]
        best.append(int(logits.argmax()))
    answers = lm._loglikelihood_tokens([(None, context, best), (None, context, [*best[:3], 5])])
    assert [greedy for _, greedy in answers] == [True, best[3] == 5]


@pytest.mark.parametrize("reason", NOT_SERVED)
def test_other_models_fall_back_and_say_so(reason: str, tmp_path, capsys) -> None:
    folder = make_model(tmp_path / "model", *NOT_SERVED[reason])
    lm = load(folder, tmp_path / "chunks")
    assert reason in lm.why_stock
    requests = random_requests(random.Random(reason), longest=40)
    assert_close(lm._loglikelihood_tokens(requests), stock_answers(lm, requests), 1e-5)
    if reason == "a sliding window":
        args = ["--model", folder, *WORLD_TASK, "--limit", "4", "--out", tmp_path / "out"]
        done = run_script("evaluate", *args)
        assert done.returncode == 0 and reason in done.stderr, done.stderr
        assert (
            json.loads((tmp_path / "out/results.json").read_text())["models"][str(folder)]["path"]
            == "stock"
        )


def test_a_model_that_takes_the_arguments_and_errs_is_found_out(tmp_path, monkeypatch) -> None:
    folder = make_model(tmp_path / "model")
    forward = evaluate.PrefixScorer.forward

    def wrong(*args):
        score, hit = forward(*args)
        return score * 1.01, hit

    monkeypatch.setattr(evaluate.PrefixScorer, "forward", wrong)
    assert "differ" in load(folder, tmp_path / "chunks").why_stock


def test_no_token_is_forwarded_twice(tmp_path, monkeypatch) -> None:
    """Counted by the model itself, on real prompts in chunks: at most 1.01 x the trie's nodes."""
    lm = load(BASE, tmp_path / "chunks")
    monkeypatch.setattr(evaluate, "CHUNK_TOKENS", 2000)
    pairs = [r.args for name in ("arc", "mmlu") for r in harness_requests(name, ROOT / "demo/data")]
    raw = list(evaluate.encode_pairs(lm, pairs))
    nodes = set()
    for _, context, answer in raw:
        ids = tuple(evaluate.to_request(context, answer, lm.max_length).ids.tolist())
        nodes |= {hash(ids[:size]) for size in range(1, len(ids) + 1)}
    seen = []
    lm.model.get_input_embeddings().register_forward_hook(
        lambda m, ids, out: seen.append(ids[0].numel())
    )
    lm._loglikelihood_tokens(raw)
    assert len(list((tmp_path / "chunks").iterdir())) > 3
    assert len(nodes) <= sum(seen) <= 1.01 * len(nodes)
    assert lm.scorer.forwarded - 8 <= sum(seen)  # 8: the trial's


def test_encoding_is_the_harnesss(tmp_path) -> None:
    """Empty contexts, spaces at the end of a context, a text that brings its own BOS."""
    lm = load(BASE, tmp_path / "chunks")
    bos = lm.tokenizer.decode(lm.prefix_token_id)
    pairs = [
        ("Who is it?", " Ada"),
        ("Who is it?  ", "Ada"),
        ("", "Saltmere is a town"),
        ("x\n\n", "y"),
    ]
    pairs += [
        (f"{bos}Who", " is it"),
        ("", f"{bos} starts"),
        ("日本 ", "é"),
        ("Who is it?", " Ada"),
    ]
    for (pair, context, answer), (text, choice) in zip(
        evaluate.encode_pairs(lm, pairs), pairs, strict=True
    ):
        if text:
            expected = lm._encode_pair(text, choice)
        else:
            ids = lm.tok_encode(choice, add_special_tokens=False)
            own = ids[0] == lm.prefix_token_id
            expected = (ids[:1], ids[1:]) if own else ([lm.prefix_token_id], ids)
        assert pair == (text, choice)
        assert (context.tolist(), answer.tolist()) == tuple(map(list, expected))


def test_packs_halve_when_memory_is_short(tmp_path, monkeypatch) -> None:
    lm = load(make_model(tmp_path / "model"), tmp_path / "chunks")
    requests = random_requests(random.Random(1))
    theirs, forward = stock_answers(lm, requests), lm.scorer.forward

    def short_of_memory(trie, start, stop, cache, held):
        found = forward(trie, start, stop, cache, held)  # the cache has grown when it fails
        if stop - start > 24:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return found

    lm.scorer.pack = 100
    monkeypatch.setattr(lm.scorer, "forward", short_of_memory)
    assert_close(lm._loglikelihood_tokens(requests), theirs, 1e-4)
    assert lm.scorer.pack <= 25


def harness_requests(name: str, local: Path, limit: int | None = None) -> list:
    """The harness's requests of a benchmark, one task at a time; MMLU's with `limit` each."""
    requests = []
    args = evaluate.parse_args(["--model", "x", "--tasks", name, "--local", str(local)])
    evaluate.import_harness()
    for _, task in evaluate.benchmark_tasks(args).values():
        task.set_fewshot_seed(1234)
        task.build_all_requests(limit=limit, rank=0, world_size=1)
        requests += task.instances
    return requests


# --- the harness ----------------------------------------------------------------------------------


def test_the_package_of_the_same_name_is_found() -> None:
    code = """
import sys; sys.path.insert(0, ".")
import evaluate as script
script.import_harness()
import evaluate
assert evaluate.__file__ != script.__file__ and callable(evaluate.load)
import lm_eval.tasks.squadv2.task  # a harness task that needs the package
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


METRIC = """
import datasets
import evaluate

class ShareOfLetters(evaluate.Metric):
    def _info(self):
        features = datasets.Features({"predictions": datasets.Value("string"), "references": datasets.Value("string")})
        return evaluate.MetricInfo(description="", citation="", inputs_description="", features=features)

    def _compute(self, predictions, references):
        shares = [len(set(p) & set(r)) / len(set(r)) for p, r in zip(predictions, references)]
        return {"share_of_letters": sum(shares) / len(shares)}
"""


def test_a_task_with_a_hugging_face_metric_runs(tmp_path) -> None:
    """It generates text; the metric is loaded by the package that our script's name hides."""
    folder = tmp_path / "share_of_letters"
    folder.mkdir()
    (folder / "share_of_letters.py").write_text(METRIC)
    text = (ROOT / "demo/world.yaml").read_text()
    text = text.replace("world/test.jsonl", str(WORLD / "test.jsonl"))
    text = text.replace("task: world", "task: letters").replace("multiple_choice", "generate_until")
    text = text[: text.index("metric_list:")].replace("doc_to_choice: choices\n", "")
    text = text.replace("doc_to_target: answer", 'doc_to_target: "{{choices[answer]}}"')
    text += f"generation_kwargs:\n  until: ['\\n']\n  max_gen_toks: 4\nmetric_list:\n  - metric: {folder}\n"
    text += "    hf_evaluate: true\n    aggregation: mean\n    higher_is_better: true\n"
    (tmp_path / "letters.yaml").write_text(text)
    args = ["--model", BASE, "--tasks", "", "--task", tmp_path / "letters.yaml", "--limit", "6"]
    done = run_script("evaluate", *args, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    file = tmp_path / "out" / evaluate.folder_name(str(BASE)) / "letters.json"
    questions = json.loads(file.read_text())["questions"]
    assert len(questions) == 6 and all(isinstance(q["responses"][0], str) for q in questions)
    metric = [key for key in questions[0] if key not in evaluate.NO_METRIC]
    assert len(metric) == 1 and 0 <= questions[0][metric[0]] <= 1


@pytest.mark.parametrize("local", ["demo", "real"])
def test_prompts_are_the_harnesss(local: str, tmp_path) -> None:
    """Our rows in place of the hub's: the same requests as the harness builds from files."""
    folder = ROOT / "demo/data" if local == "demo" else REAL_DATA
    if not folder.is_dir():
        pytest.skip("the real data is not there")
    evaluate.import_harness()
    import lm_eval
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks._yaml_loader import load_yaml

    path = lm_eval.__path__[0] + "/tasks/arc/arc_challenge.yaml"
    files = {s: str(folder / f"arc/ARC-Challenge-{s}.jsonl") for s in ("train", "test")}
    own = load_yaml(path)
    own.pop("tag", None)
    own |= {"dataset_path": "json", "dataset_name": None, "validation_split": None}
    own |= {"dataset_kwargs": {"data_files": files, "cache_dir": str(tmp_path)}, "num_fewshot": 25}
    subject = evaluate.load_benchmark("arc", folder, official=True)[0]
    requests = []
    for task in (ConfigurableTask(config=own), evaluate.harness_task(path, 25, subject)):
        task.set_fewshot_seed(1234)
        task.build_all_requests(limit=12, rank=0, world_size=1)
        requests.append([instance.args for instance in task.instances])
    assert requests[0] == requests[1] and len(requests[0]) > 40
    assert requests[1][0][0].count("Question: ") == 26


def harness_scores(folder: Path, local: Path, subjects: list[str], limit: int | None) -> dict:
    """{task: harness result} of lm_eval alone, a task at a time, nothing of ours but the rows."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    args = evaluate.parse_args(["--model", "x", "--local", str(local)])
    lm = HFLM(
        pretrained=str(folder), device="cpu", dtype="float32", batch_size=4,
        logits_cache=False, softmax_dtype="float32",
    )  # fmt: skip
    found = {}
    for name, (_, task) in evaluate.benchmark_tasks(args).items():
        if not name.startswith("mmlu_") or name.removeprefix("mmlu_") in subjects:
            manager = TaskManager(include_defaults=False)
            several = limit if not name.startswith("mmlu_") else limit and 20
            found[name] = simple_evaluate(
                lm, tasks=[task], limit=several, task_manager=manager, bootstrap_iters=0
            )
    return found


def assert_equal_scores(out: Path, model: Path, theirs: dict) -> None:
    """Every log-likelihood within 1e-3, every metric of every question equal (mc2 within 1e-5)."""
    results = json.loads((out / "results.json").read_text())["all questions"][str(model)]
    for name, expected in theirs.items():
        ours = json.loads((out / evaluate.folder_name(str(model)) / f"{name}.json").read_text())
        samples = sorted(expected["samples"][name], key=lambda sample: sample["doc_id"])
        assert len(samples) == len(ours["questions"]) > 0
        for sample, question in zip(samples, ours["questions"], strict=True):
            values = [response[0] for response in sample["filtered_resps"]]
            assert np.abs(np.array(question["log_likelihoods"]) - values).max() <= 1e-3
            within = 1e-5 if name == "truthfulqa_mc2" else 0
            for metric in sample["metrics"]:
                assert abs(question[metric] - sample[metric]) <= within, (name, metric)
        task = {"arc_challenge": "arc", "hellaswag": "hellaswag"}.get(name)
        task = task or name.replace("mmlu_", "mmlu/").replace("truthfulqa_", "truthfulqa ")
        for metric, value in expected["results"][name].items():
            if metric in ("acc,none", "acc_norm,none"):
                label = metric.removesuffix(",none")
                place = task.split(" ") if " " in task else (task, label)
                assert results[place[0]][place[1]] == pytest.approx(100 * value, abs=1e-3)


def test_scores_equal_the_harness_on_the_demo(tmp_path) -> None:
    """A whole run of the script against lm_eval alone, on all four benchmarks and a task file."""
    out = tmp_path / "eval"
    local = ROOT / "demo/data"
    subjects = [p.name.removesuffix("_test.csv") for p in (local / "mmlu/test").iterdir()]
    done = run_script(
        "evaluate", "--model", BASE, "--local", local, "--dtype", "float32", "--out", out
    )
    assert done.returncode == 0, done.stderr
    theirs = harness_scores(BASE, local, subjects, None)
    assert len(theirs) == 4 + len(subjects)
    assert_equal_scores(out, BASE, theirs)
    assert "(partial)" in (out / "results.md").read_text()  # MMLU has 3 of 57 subjects there


REAL_SUBJECTS = [  # from short to long questions: 60 to 500 tokens
    "abstract_algebra", "high_school_computer_science", "moral_scenarios", "professional_law",
    "high_school_european_history", "anatomy",
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.skipif(not REAL_DATA.is_dir(), reason="the real data is not there")
def test_scores_equal_the_harness_on_real_rows(tmp_path) -> None:
    """100 questions of each benchmark, 120 of MMLU, some contexts longer than the model."""
    local, model = tmp_path / "data", make_real_model(tmp_path / "model")
    for name in ("arc", "hellaswag", "truthfulqa"):
        (local / name).parent.mkdir(exist_ok=True)
        shutil.copytree(REAL_DATA / name, local / name)
    for split in ("dev", "test"):
        (local / "mmlu" / split).mkdir(parents=True)
        for subject in REAL_SUBJECTS:
            file = f"mmlu/{split}/{subject}_{split}.csv"
            shutil.copy(REAL_DATA / file, local / file)
    args = ["--model", model, "--local", local, "--limit"]
    theirs = harness_scores(model, local, REAL_SUBJECTS, 100)
    run_all = [[*args, 100, "--tasks", "arc,hellaswag,truthfulqa"], [*args, 20, "--tasks", "mmlu"]]
    for number, flags in enumerate(run_all):
        done = run_script("evaluate", *flags, "--out", tmp_path / f"eval{number}")
        assert done.returncode == 0, done.stderr
        here = {n: r for n, r in theirs.items() if n.startswith("mmlu_") is bool(number)}
        assert_equal_scores(tmp_path / f"eval{number}", model, here)
    tasks = json.loads((tmp_path / "eval1/results.json").read_text())["tasks"]
    cut = tasks["mmlu/high_school_european_history"]["truncated"][str(model)]
    assert cut > 0 and tasks["mmlu"]["truncated"][str(model)] >= cut


def make_real_model(folder: Path) -> Path:
    """A Llama of 2 layers with a byte-level BPE of 2,000 tokens made of MMLU's questions."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    bpe = ByteLevelBPETokenizer()
    files = [str(path) for path in sorted((REAL_DATA / "mmlu/test").glob("*.csv"))]
    bpe.train(files, vocab_size=2000, special_tokens=["<pad>", "<s>", "</s>"], show_progress=False)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    torch.manual_seed(0)
    sizes = {**SIZES, "vocab_size": 2000, "hidden_size": 64, "max_position_embeddings": 2560}
    model = LlamaForCausalLM(LlamaConfig(**sizes, bos_token_id=1, eos_token_id=2))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder

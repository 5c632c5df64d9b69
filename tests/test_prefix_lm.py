"""Holds: shared prefixes give the harness's numbers for every request, model and pack size, with no
token forwarded twice; what cannot be served so falls back and says why; prefix_lm.py alone in a
folder is the harness's command line and gives the scores of its own model, question by question."""

import json
import os
import random
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, WORLD
from lm_eval.models.huggingface import HFLM

import prefix_lm

BASE = ROOT / "demo/base_model"
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


# --- models and requests, for test_evaluate.py too ------------------------------------------------


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


def load_prefix_lm(folder: Path, **settings) -> prefix_lm.PrefixLM:
    settings = {"device": "cpu", "dtype": "float32", "batch_size": 4, **settings}
    return prefix_lm.PrefixLM(pretrained=str(folder), **settings)


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


def stock_answers(lm: prefix_lm.PrefixLM, requests: list) -> list:
    """The harness's own method on the same object."""
    return HFLM._loglikelihood_tokens(lm, requests, disable_tqdm=True)


def assert_close(ours: list, theirs: list, within: float = 1e-3) -> None:
    for (a, greedy), (b, expected) in zip(ours, theirs, strict=True):
        assert abs(a - b) <= within and greedy == expected, (a, b)


def instances(pairs: list[tuple[str, str]]) -> list:
    """(context, answer) as the harness hands them to a model: each is a question of its own."""
    return [
        SimpleNamespace(args=pair, task_name="t", doc_id=number)
        for number, pair in enumerate(pairs)
    ]


# --- the trie -------------------------------------------------------------------------------------


def test_the_trie_has_each_prefix_once_and_its_rule_names_the_ancestors() -> None:
    """Against brute force: every prefix of every input, and who is whose prefix."""
    rng = random.Random(0)
    for _ in range(20):
        raw = random_requests(rng, count=6, longest=12)
        requests = [prefix_lm.make_request(context, answer, 9) for _, context, answer in raw]
        requests.sort(key=prefix_lm.sort_key)
        assert requests == sorted(requests, key=lambda r: (r.input_ids.tolist(), r.answer.tolist()))
        trie = prefix_lm.build_trie(requests)

        texts = []  # of each node, from the root to it
        for node, depth in enumerate(trie.depths):
            parents = [text for text in texts[:node] if len(text) == depth]
            texts.append(((*parents[-1],) if depth else ()) + (int(trie.tokens[node]),))
        inputs = [tuple(request.input_ids.tolist()) for request in requests]
        prefixes = {text[:size] for text in inputs for size in range(1, len(text) + 1)}
        assert len(texts) == len(prefixes) and {*texts} == prefixes
        assert sum(prefix_lm.count_new_tokens(requests)) == len(texts)

        for query, text in enumerate(texts):
            seen = [k for k in range(len(texts)) if k <= query < trie.ends[k]]
            assert [texts[k] for k in seen] == [text[:size] for size in range(1, len(text) + 1)]

        columns = zip(trie.places, trie.targets, trie.owners, strict=True)
        scored = {(texts[place], target, owner) for place, target, owner in columns}
        expected = set()
        for owner, request in enumerate(requests):
            whole = (*inputs[owner], int(request.answer[-1]))
            for size in range(len(whole) - len(request.answer), len(whole)):
                expected.add((whole[:size], whole[size], owner))
        assert scored == expected and sorted(trie.places) == list(trie.places)


def test_the_picture_of_the_docstring_is_right() -> None:
    table = {}
    for line in prefix_lm.__doc__.splitlines():
        for name in ("node", "token", "position", "end"):
            _, found, cells = line.partition(f" {name} ")
            if found and len(cells.split()) == 7:
                table[name] = cells.split()
    texts = ["abcd", "abce", "afg"]
    # the picture shows inputs: what is scored after each is not one
    requests = [prefix_lm.make_request([ord(c) for c in text], [0], 64) for text in texts]
    trie = prefix_lm.build_trie(requests)
    assert table["node"] == [str(node) for node in range(len(trie.tokens))]
    assert table["token"] == [chr(token) for token in trie.tokens]
    assert table["position"] == [str(depth) for depth in trie.depths]
    assert table["end"] == [str(end) for end in trie.ends]


# --- the harness's numbers ------------------------------------------------------------------------


@pytest.mark.parametrize("name", SERVED)
def test_random_requests_score_as_in_the_harness(name: str, tmp_path) -> None:
    lm = load_prefix_lm(make_model(tmp_path / "model", *SERVED[name]))
    assert lm.why_stock == "" and lm.max_length == 64
    rng = random.Random(name)
    for pack in (8, 9, 31, 64, 500, 4096):
        lm.scorer.pack = pack
        requests = random_requests(rng)
        theirs = stock_answers(lm, requests)
        assert_close(lm._loglikelihood_tokens(requests), theirs, 1e-4)
        assert any(greedy is False for _, greedy in theirs)
    assert lm.truncated
    assert lm._loglikelihood_tokens([]) == []


def test_greedy_answers_are_known() -> None:
    lm = load_prefix_lm(BASE)
    context = lm.tok_encode("Below is an instruction")
    best = []
    for _ in range(4):
        logits = lm.model(torch.tensor([context + best])).logits[0, -1]
        best.append(int(logits.argmax()))
    answers = lm._loglikelihood_tokens([(None, context, best), (None, context, [*best[:3], 5])])
    assert [greedy for _, greedy in answers] == [True, best[3] == 5]


def test_no_token_is_forwarded_twice() -> None:
    """Counted by the model itself: as many as there are different prefixes."""
    lm = load_prefix_lm(BASE)
    requests = random_requests(random.Random(4), longest=300)
    prefixes = set()
    for _, context, answer in requests:
        whole = (*context, *answer[:-1])[-lm.max_length :]
        prefixes |= {whole[:size] for size in range(1, len(whole) + 1)}
    seen = []
    lm.model.get_input_embeddings().register_forward_hook(
        lambda module, ids, out: seen.append(ids[0].numel())
    )
    before = lm.scorer.forwarded
    lm._loglikelihood_tokens(requests)
    assert sum(seen) == len(prefixes) == lm.scorer.forwarded - before


@pytest.mark.parametrize("add_bos_token", [None, False])
def test_texts_are_split_as_in_the_harness(add_bos_token, monkeypatch) -> None:
    """Empty contexts, spaces at the end of a context, a text that brings its own BOS."""
    lm = load_prefix_lm(BASE, add_bos_token=add_bos_token)
    bos = lm.tokenizer.decode(lm.prefix_token_id)
    pairs = [
        ("Who is it?", " Ada"),
        ("Who is it?  ", "Ada"),
        ("", "Saltmere is a town"),
        ("x\n\n", "y"),
        (f"{bos}Who", " is it"),
        ("", f"{bos} starts"),
        ("日本 ", "é"),
        ("Who is it?", " Ada"),
    ]
    monkeypatch.setattr(prefix_lm, "ENCODED_AT_ONCE", 3)
    split = {}
    for way in ("stock", ""):
        lm.why_stock = way
        monkeypatch.setattr(lm, "_loglikelihood_tokens", lambda found, **_: found)
        found = lm.loglikelihood(instances(pairs))
        split[way] = [(key, list(context), list(answer)) for key, context, answer in found]
    assert split[""] == split["stock"] and len(split[""]) == len(pairs)
    assert [key for key, _, _ in split[""]] == pairs


def test_each_text_is_encoded_once(monkeypatch) -> None:
    """A context stands before several answers; the harness encodes it again for each."""
    lm = load_prefix_lm(BASE)
    pairs = [(f"Question {n}?", f" {letter}") for n in range(5) for letter in "ABCD"]
    texts = []
    encode = type(lm.tokenizer).__call__

    def count(tokenizer, group, *args, **options):
        texts.extend([group] if isinstance(group, str) else group)
        return encode(tokenizer, group, *args, **options)

    monkeypatch.setattr(type(lm.tokenizer), "__call__", count)
    lm.loglikelihood(instances(pairs))
    assert len(texts) == len({*texts}) == 5 + 20


def test_rolling_perplexity_is_the_harnesss(tmp_path) -> None:
    lm = load_prefix_lm(make_model(tmp_path / "model"))
    texts = ["Saltmere is a town by the sea. " * 20, "Who is it?"]
    requests = [SimpleNamespace(args=(text,)) for text in texts]
    ours = lm.loglikelihood_rolling(requests, disable_tqdm=True)
    lm.why_stock = "the harness's"
    assert ours == pytest.approx(lm.loglikelihood_rolling(requests, disable_tqdm=True), abs=1e-3)


def test_packs_halve_when_memory_is_short(tmp_path, monkeypatch, capsys) -> None:
    lm = load_prefix_lm(make_model(tmp_path / "model"))
    requests = random_requests(random.Random(1))
    theirs = stock_answers(lm, requests)
    forward = lm.scorer.forward

    def short_of_memory(trie, path, start, stop):
        found = forward(trie, path, start, stop)  # the cache has grown when it fails
        if stop - start > 24:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return found

    lm.scorer.pack = 100
    monkeypatch.setattr(lm.scorer, "forward", short_of_memory)
    assert_close(lm._loglikelihood_tokens(requests), theirs, 1e-4)
    assert lm.scorer.pack <= 25 and "packs of 25 tokens" in capsys.readouterr().err


def test_answers_that_no_model_can_score_are_named(tmp_path) -> None:
    lm = load_prefix_lm(make_model(tmp_path / "model"))
    with pytest.raises(prefix_lm.ScoringError, match="t, question 1: an answer of .* tokens"):
        lm.loglikelihood(instances([("Who", " is"), ("Who", " is it" * 99)]))
    with pytest.raises(prefix_lm.ScoringError, match="question 0: an answer of 0 tokens"):
        lm._loglikelihood_tokens([(None, [5], [])])
    with pytest.raises(prefix_lm.ScoringError, match="question 0: a context without a token"):
        lm._loglikelihood_tokens([(None, [], [5])])


# --- what falls back ------------------------------------------------------------------------------


@pytest.mark.parametrize("reason", NOT_SERVED)
def test_other_models_fall_back_and_say_so(reason: str, tmp_path, capsys) -> None:
    lm = load_prefix_lm(make_model(tmp_path / "model", *NOT_SERVED[reason]))
    assert reason in lm.why_stock and reason in capsys.readouterr().err
    requests = random_requests(random.Random(reason), longest=40)
    assert lm._loglikelihood_tokens(requests) == stock_answers(lm, requests)


def test_a_model_that_takes_the_arguments_and_errs_is_found_out(tmp_path, monkeypatch) -> None:
    folder = make_model(tmp_path / "model")
    forward = prefix_lm.PrefixScorer.forward

    def wrong(*args):
        score, hit = forward(*args)
        return score * 1.01, hit

    monkeypatch.setattr(prefix_lm.PrefixScorer, "forward", wrong)
    assert "differ" in load_prefix_lm(folder).why_stock

    def failing(*args):
        raise TypeError("no such\nargument")

    monkeypatch.setattr(prefix_lm.PrefixScorer, "forward", failing)
    assert load_prefix_lm(folder).why_stock.endswith("(TypeError: no such)")


# --- the command line -----------------------------------------------------------------------------

LETTERS = """
task: letters
dataset_path: json
dataset_kwargs: {data_files: {train: %(rows)s, test: %(rows)s}}
training_split: train
test_split: test
output_type: multiple_choice
num_fewshot: 3
description: "Questions about {{topic}}, four choices each.\\n\\n"
doc_to_text: "{{question.strip()}}\\nA. {{choices[0]}}\\nB. {{choices[1]}}\\nAnswer:"
doc_to_choice: ["A", "B"]
doc_to_target: answer
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
metadata: {version: 1.0}
"""
METRIC = """
import datasets
import evaluate

class ShareOfLetters(evaluate.Metric):
    def _info(self):
        text = datasets.Value("string")
        about = dict.fromkeys(["description", "citation", "inputs_description"], "")
        features = datasets.Features({"predictions": text, "references": text})
        return evaluate.MetricInfo(**about, features=features)

    def _compute(self, predictions, references):
        shares = [len(set(p) & set(r)) / len(set(r)) for p, r in zip(predictions, references)]
        return {"share_of_letters": sum(shares) / len(shares)}
"""


def make_letters(folder: Path) -> Path:
    """A task of 3 examples and one-letter answers, as MMLU's, on made-up sums."""
    rng = random.Random(0)
    rows = []
    for _ in range(40):
        a, b = rng.randrange(50), rng.randrange(50)
        row = {"topic": "sums", "question": f"What is {a} + {b}?", "answer": rng.randrange(2)}
        choices = [str(a + b + 1), str(a + b + 2)]
        choices[row["answer"]] = str(a + b)
        rows.append(json.dumps({**row, "choices": choices}) + "\n")
    (folder / "letters.jsonl").write_text("".join(rows))
    (folder / "letters.yaml").write_text(LETTERS % {"rows": folder / "letters.jsonl"})
    return folder / "letters.yaml"


def make_world(folder: Path) -> Path:
    text = (ROOT / "demo/world.yaml").read_text()
    (folder / "world.yaml").write_text(text.replace("world/test", str(WORLD / "test")))
    return folder / "world.yaml"


def make_metric_task(folder: Path) -> Path:
    """A task that generates text, whose metric the package `evaluate` loads."""
    metric = folder / "share_of_letters"
    metric.mkdir()
    (metric / "share_of_letters.py").write_text(METRIC)
    text = make_world(folder).read_text()
    text = text.replace("task: world", "task: metric").replace("multiple_choice", "generate_until")
    text = text[: text.index("metric_list:")].replace("doc_to_choice: choices\n", "")
    text = text.replace("doc_to_target: answer", 'doc_to_target: "{{choices[answer]}}"')
    text += "generation_kwargs:\n  until: ['\\n']\n  max_gen_toks: 4\n"
    text += f"metric_list:\n  - metric: {metric}\n"
    text += "    hf_evaluate: true\n    aggregation: mean\n    higher_is_better: true\n"
    (folder / "metric.yaml").write_text(text)
    return folder / "metric.yaml"


def run_command(command: list[object], cwd: Path) -> subprocess.CompletedProcess:
    env = {**os.environ, "HF_HUB_OFFLINE": "1"}
    env.pop("PYTHONPATH", None)
    parts = [sys.executable, *map(str, command)]
    return subprocess.run(parts, cwd=cwd, env=env, capture_output=True, text=True, timeout=600)


def read_run(out: Path) -> tuple[dict, dict]:
    """(results, {task: samples by question}) of the harness's output folder."""
    results = json.loads(next(out.rglob("results_*.json")).read_text())["results"]
    samples = {}
    for task in results:
        lines = next(out.rglob(f"samples_{task}_*.jsonl")).read_text().splitlines()
        samples[task] = {row["doc_id"]: row for row in map(json.loads, lines)}
    return results, samples


def log_likelihoods(sample: dict) -> np.ndarray:
    return np.array([float(value) for value, _ in sample["filtered_resps"]])


def test_alone_in_a_folder_it_gives_the_scores_of_the_harnesss_own_model(tmp_path) -> None:
    """Both command lines as processes, on two tasks; nothing else of ours is there."""
    alone = tmp_path / "alone"
    alone.mkdir()
    shutil.copy(ROOT / "prefix_lm.py", alone)
    model = make_model(tmp_path / "model", sizes={"max_position_embeddings": 512})
    tasks = f"{make_world(tmp_path)},{make_letters(tmp_path)}"
    flags = ["--tasks", tasks, "--device", "cpu", "--batch_size", 4, "--log_samples"]
    flags += ["--model_args", f"pretrained={model},dtype=float32", "--output_path"]
    done = run_command(["prefix_lm.py", *flags, tmp_path / "prefix"], cwd=alone)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("prefix (") and "forward pass" not in done.stderr
    done = run_command(["-m", "lm_eval", "--model", "hf", *flags, tmp_path / "hf"], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert [path.name for path in alone.iterdir()] == ["prefix_lm.py"]

    (scores, samples), (expected, reference) = map(read_run, (tmp_path / "prefix", tmp_path / "hf"))
    assert set(scores) == {"world", "letters"} and scores == expected
    for task, questions in reference.items():
        assert len(questions) >= 40 and samples[task].keys() == questions.keys()
        for number, theirs in questions.items():
            ours = samples[task][number]
            assert ours["prompt_hash"] == theirs["prompt_hash"] and ours["acc"] == theirs["acc"]
            assert np.abs(log_likelihoods(ours) - log_likelihoods(theirs)).max() <= 1e-3
            for mine, other in zip(ours["filtered_resps"], theirs["filtered_resps"], strict=True):
                assert mine[1] == other[1]  # whether it is greedy
    values = [log_likelihoods(row)[0] for row in reference["letters"].values()]
    assert np.std(values) > 0.1  # questions differ, so that equal numbers mean something


def test_the_docstrings_first_command_runs_and_metrics_find_their_package(tmp_path) -> None:
    """Beside evaluate.py, whose name is that of the package that loads the second task's metric."""
    shown = re.search(r"^    cd (\w+) && python (.*)$", prefix_lm.__doc__, re.MULTILINE)
    command = shlex.split(shown[2])
    tasks = command.index("--tasks") + 1
    command[tasks] += f",{make_metric_task(tmp_path)}"
    command += ["--limit", 6, "--device", "cpu", "--log_samples", "--output_path", tmp_path / "out"]
    done = run_command(command, cwd=ROOT / shown[1])
    assert done.returncode == 0, done.stderr
    results, samples = read_run(tmp_path / "out")
    assert set(results) == {"world", "metric"} and len(samples["world"]) == 6
    shares = [v for k, v in results["metric"].items() if k.endswith("share_of_letters,none")]
    assert len(samples["metric"]) == 6 and len(shares) == 1 and 0 <= shares[0] <= 1


def test_templates_are_compiled_once_and_prompts_stay(tmp_path) -> None:
    """Every prompt of a task is the one that the harness's own compilation gives."""
    import lm_eval.utils
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks._yaml_loader import load_yaml

    config = load_yaml(make_letters(tmp_path))
    environment = lm_eval.utils.env
    environment.__dict__.pop("from_string", None)
    prompts = []
    try:
        for keep in (lambda: None, prefix_lm.keep_compiled_templates):
            keep()
            task = ConfigurableTask(config=config)
            task.set_fewshot_seed(1234)
            task.build_all_requests(limit=None, rank=0, world_size=1)
            prompts.append([instance.args for instance in task.instances])
        kept = environment.from_string
        prefix_lm.keep_compiled_templates()  # twice is once
        assert environment.from_string is kept
        counts = kept.cache_info()
    finally:
        environment.__dict__.pop("from_string", None)
    assert prompts[0] == prompts[1] and len(prompts[0]) == 80
    assert counts.misses <= 5 and counts.hits > 40 * 4

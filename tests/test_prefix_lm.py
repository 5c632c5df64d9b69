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
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT, WORLD
from lm_eval.models.huggingface import HFLM

import prefix_lm

BASE = ROOT / "demo/base_model"
SIZES = {
    "vocab_size": 900,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
}
GPT2 = {"vocab_size": 900, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
SERVED = [  # an architecture, changes of SIZES
    ("Llama", {"num_key_value_heads": 2}),
    ("Llama", {"tie_word_embeddings": True}),
    ("GPT2", {}),
    ("Qwen3", {"head_dim": 8}),
    ("Mixtral", {"num_local_experts": 4, "sliding_window": None}),
]
DYNAMIC_ROPE = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
NOT_SERVED = [  # an architecture, changes of SIZES, words of the reason
    ("Mistral", {"sliding_window": 8}, "a sliding window"),
    ("Gemma2", {"sliding_window": 8, "head_dim": 8}, "sliding_attention"),
    ("Llama", {"rope_parameters": DYNAMIC_ROPE}, "depend on the sequence's length"),
    ("Bloom", {}, "does not take position_ids"),
]

RawRequest = tuple[None, list[int], list[int]]  # as the harness hands it over: context, answer


# --- models and requests, for test_evaluate.py too ------------------------------------------------


def make_model(
    folder: Path, kind: str = "Llama", sizes: dict | None = None, scale: float = 8
) -> Path:
    """A tiny random model whose attention matters, with the demo's tokenizer."""
    import transformers

    torch.manual_seed(0)
    settings = {"bos_token_id": 1, "eos_token_id": 2}
    settings.update(GPT2 if kind in ["GPT2", "Bloom"] else SIZES)
    settings.update(sizes or {})
    config_class = getattr(transformers, f"{kind}Config")
    model = transformers.AutoModelForCausalLM.from_config(config_class(**settings))
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


def random_ids(rng: random.Random, size: int) -> list[int]:
    return [rng.randrange(3, 900) for _ in range(size)]


def random_requests(rng: random.Random, count: int = 30, longest: int = 75) -> list[RawRequest]:
    """Branching at random depths; some equal, some too long, one-token contexts and answers."""
    stems = []
    for _ in range(4):
        stems.append(random_ids(rng, rng.randrange(1, longest)))

    requests = []
    for _ in range(count):
        stem = rng.choice(stems)
        shared = stem[: rng.randrange(1, longest)]
        own = random_ids(rng, rng.choice([0, 0, 1, 9]))
        for _ in range(rng.randrange(1, 5)):
            answer = random_ids(rng, rng.choice([1, 1, 2, 7]))
            requests.append((None, shared + own, answer))
    return requests + rng.sample(requests, 5)


def stock_answers(lm: prefix_lm.PrefixLM, requests: list[RawRequest]) -> list[prefix_lm.Score]:
    """The harness's own method on the same object."""
    return HFLM._loglikelihood_tokens(lm, requests, disable_tqdm=True)


def assert_close(
    ours: list[prefix_lm.Score], theirs: list[prefix_lm.Score], within: float = 1e-3
) -> None:
    for (score, is_greedy), (expected, expected_greedy) in zip(ours, theirs, strict=True):
        assert abs(score - expected) <= within
        assert is_greedy == expected_greedy


def instances(pairs: list[tuple[str, str]]) -> list[SimpleNamespace]:
    """(context, answer) as the harness hands them to a model: each is a question of its own."""
    made = []
    for number, pair in enumerate(pairs):
        made.append(SimpleNamespace(args=pair, task_name="t", doc_id=number))
    return made


# --- the trie -------------------------------------------------------------------------------------


def random_sorted_requests() -> Iterator[list[prefix_lm.Request]]:
    """Twenty lists of requests, sorted for a trie, to a model of 9 tokens."""
    rng = random.Random(0)
    for _ in range(20):
        requests = []
        for _, context, answer in random_requests(rng, count=6, longest=12):
            requests.append(prefix_lm.make_request(context, answer, 9))
        requests.sort(key=prefix_lm.sort_key)
        yield requests


def text_of(request: prefix_lm.Request) -> tuple[int, ...]:
    """What the model reads of a request."""
    return tuple(request.input_ids.tolist())


def prefixes(text: tuple[int, ...]) -> list[tuple[int, ...]]:
    """All prefixes of a text from its first token to itself."""
    return [text[:size] for size in range(1, len(text) + 1)]


def node_texts(trie: prefix_lm.Trie) -> list[tuple[int, ...]]:
    """The tokens on the way from the root to each node, by the depths of the nodes alone."""
    texts = []
    path: tuple[int, ...] = ()
    for token, depth in zip(trie.tokens, trie.depths, strict=True):
        assert depth <= len(path)
        path = (*path[:depth], int(token))
        texts.append(path)
    return texts


def test_requests_are_sorted_by_their_tokens() -> None:
    for requests in random_sorted_requests():
        keys = []
        for request in requests:
            keys.append((request.input_ids.tolist(), request.answer.tolist()))
        assert keys == sorted(keys)


def test_the_trie_has_each_prefix_once() -> None:
    for requests in random_sorted_requests():
        expected = set()
        for request in requests:
            expected.update(prefixes(text_of(request)))
        texts = node_texts(prefix_lm.build_trie(requests))
        assert set(texts) == expected
        assert len(texts) == len(expected)
        assert sum(prefix_lm.count_new_tokens(requests)) == len(expected)


def test_the_rule_of_the_trie_names_the_ancestors() -> None:
    """A node sees those whose text is a prefix of its own, and itself."""
    for requests in random_sorted_requests():
        trie = prefix_lm.build_trie(requests)
        texts = node_texts(trie)
        for node, text in enumerate(texts):
            earlier = range(node + 1)
            seen = [texts[other] for other in earlier if node < trie.ends[other]]
            assert seen == prefixes(text)


def test_every_token_of_an_answer_is_scored_after_what_stands_before_it() -> None:
    for requests in random_sorted_requests():
        expected = set()
        for owner, request in enumerate(requests):
            whole = (*text_of(request), int(request.answer[-1]))
            for place in range(len(whole) - len(request.answer), len(whole)):
                expected.add((whole[:place], whole[place], owner))

        trie = prefix_lm.build_trie(requests)
        texts = node_texts(trie)
        scored = set()
        for place, target, owner in zip(trie.places, trie.targets, trie.owners, strict=True):
            scored.add((texts[place], int(target), int(owner)))
        assert scored == expected
        assert list(trie.places) == sorted(trie.places)


def test_the_picture_of_the_docstring_is_right() -> None:
    rows = re.findall(r"(node|token|position|end) +((?:\S ){6}\S)$", prefix_lm.__doc__, re.M)
    picture = dict(rows)
    requests = []
    for text in [b"abcd", b"abce", b"afg"]:
        # the picture shows inputs: what is scored after each is not one
        requests.append(prefix_lm.make_request(list(text), [0], 64))
    trie = prefix_lm.build_trie(requests)
    assert picture["node"] == " ".join(str(node) for node in range(len(trie.tokens)))
    assert picture["token"] == " ".join(chr(token) for token in trie.tokens)
    assert picture["position"] == " ".join(str(depth) for depth in trie.depths)
    assert picture["end"] == " ".join(str(end) for end in trie.ends)


# --- the harness's numbers ------------------------------------------------------------------------


@pytest.mark.parametrize("kind, sizes", SERVED, ids=str)
def test_random_requests_score_as_in_the_harness(kind: str, sizes: dict, tmp_path) -> None:
    lm = load_prefix_lm(make_model(tmp_path / "model", kind, sizes))
    assert lm.why_stock == ""
    assert lm.max_length == 64
    rng = random.Random(kind)
    for pack in [8, 9, 31, 64, 500, 4096]:
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
        input_ids = torch.tensor([context + best])
        logits = lm.model(input_ids).logits[0, -1]
        best.append(int(logits.argmax()))

    other = [*best[:3], 5]
    assert other != best
    answers = lm._loglikelihood_tokens([(None, context, best), (None, context, other)])
    assert [greedy for _, greedy in answers] == [True, False]


def test_no_token_is_forwarded_twice() -> None:
    """Counted by the model itself: as many as there are different prefixes."""
    lm = load_prefix_lm(BASE)
    requests = random_requests(random.Random(4), longest=300)
    expected = set()
    for _, context, answer in requests:
        whole = (*context, *answer[:-1])
        expected.update(prefixes(whole[-lm.max_length :]))

    seen = []

    def count_tokens(module, inputs, output):
        seen.append(inputs[0].numel())

    lm.model.get_input_embeddings().register_forward_hook(count_tokens)
    before = lm.scorer.forwarded
    lm._loglikelihood_tokens(requests)
    assert sum(seen) == len(expected)
    assert lm.scorer.forwarded - before == len(expected)


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

    def as_they_are(requests, **_):
        return [(key, list(context), list(answer)) for key, context, answer in requests]

    monkeypatch.setattr(prefix_lm, "ENCODED_AT_ONCE", 3)
    monkeypatch.setattr(lm, "_loglikelihood_tokens", as_they_are)
    ours = lm.loglikelihood(instances(pairs))
    lm.why_stock = "the harness's"
    assert ours == lm.loglikelihood(instances(pairs))
    assert [key for key, _, _ in ours] == pairs


def test_each_text_is_encoded_once(monkeypatch) -> None:
    """A context stands before several answers; the harness encodes it again for each."""
    lm = load_prefix_lm(BASE)
    pairs = []
    for number in range(5):
        for letter in "ABCD":
            pairs.append((f"Question {number}?", f" {letter}"))
    texts = []
    encode = type(lm.tokenizer).__call__

    def count_texts(tokenizer, group, *args, **options):
        texts.extend([group] if isinstance(group, str) else group)
        return encode(tokenizer, group, *args, **options)

    monkeypatch.setattr(type(lm.tokenizer), "__call__", count_texts)
    lm.loglikelihood(instances(pairs))
    assert len(texts) == 5 + 20  # contexts, and contexts with an answer
    assert len(set(texts)) == 5 + 20


def test_rolling_perplexity_is_the_harnesss(tmp_path) -> None:
    lm = load_prefix_lm(make_model(tmp_path / "model"))
    texts = ["Saltmere is a town by the sea. " * 20, "Who is it?"]
    requests = [SimpleNamespace(args=(text,)) for text in texts]
    ours = lm.loglikelihood_rolling(requests, disable_tqdm=True)
    lm.why_stock = "the harness's"
    theirs = lm.loglikelihood_rolling(requests, disable_tqdm=True)
    assert ours == pytest.approx(theirs, abs=1e-3)


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
    assert lm.scorer.pack <= 25
    assert "packs of 25 tokens" in capsys.readouterr().err


def test_answers_that_no_model_can_score_are_named(tmp_path) -> None:
    lm = load_prefix_lm(make_model(tmp_path / "model"))
    too_long = instances([("Who", " is"), ("Who", " is it" * 99)])
    with pytest.raises(prefix_lm.ScoringError, match="t, question 1: an answer of .* tokens"):
        lm.loglikelihood(too_long)
    with pytest.raises(prefix_lm.ScoringError, match="question 0: an answer of 0 tokens"):
        lm._loglikelihood_tokens([(None, [5], [])])
    with pytest.raises(prefix_lm.ScoringError, match="question 0: a context without a token"):
        lm._loglikelihood_tokens([(None, [], [5])])


# --- what falls back ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind, sizes, reason", NOT_SERVED, ids=str)
def test_other_models_fall_back_and_say_so(
    kind: str, sizes: dict, reason: str, tmp_path, capsys
) -> None:
    lm = load_prefix_lm(make_model(tmp_path / "model", kind, sizes))
    assert reason in lm.why_stock
    assert reason in capsys.readouterr().err
    requests = random_requests(random.Random(reason), longest=40)
    assert lm._loglikelihood_tokens(requests) == stock_answers(lm, requests)


def test_a_model_that_takes_the_arguments_and_errs_is_found_out(tmp_path, monkeypatch) -> None:
    folder = make_model(tmp_path / "model")
    forward = prefix_lm.PrefixScorer.forward

    def one_percent_wrong(*args):
        log_probabilities, hits = forward(*args)
        return log_probabilities * 1.01, hits

    monkeypatch.setattr(prefix_lm.PrefixScorer, "forward", one_percent_wrong)
    assert "differ" in load_prefix_lm(folder).why_stock

    def failing(*args):
        raise TypeError("no such\nargument")

    monkeypatch.setattr(prefix_lm.PrefixScorer, "forward", failing)
    assert load_prefix_lm(folder).why_stock.endswith("(TypeError: no such)")


# --- the command line -----------------------------------------------------------------------------

LETTERS = """
task: letters
dataset_path: json
dataset_kwargs: {data_files: {train: FOLDER/letters.jsonl, test: FOLDER/letters.jsonl}}
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
METRIC_TASK = """
task: metric
dataset_path: json
dataset_kwargs: {data_files: {test: WORLD/test.jsonl}}
test_split: test
output_type: generate_until
num_fewshot: 0
doc_to_text: "{{question}}\\n"
doc_to_target: "{{choices[answer]}}"
target_delimiter: ""
generation_kwargs: {until: ["\\n"], max_gen_toks: 4}
metric_list:
  - metric: FOLDER/share_of_letters
    hf_evaluate: true
    aggregation: mean
    higher_is_better: true
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
    lines = []
    for _ in range(40):
        a = rng.randrange(50)
        b = rng.randrange(50)
        answer = rng.randrange(2)
        choices = [str(a + b + 1), str(a + b + 2)]
        choices[answer] = str(a + b)
        question = f"What is {a} + {b}?"
        row = {"topic": "sums", "question": question, "choices": choices, "answer": answer}
        lines.append(json.dumps(row))
    (folder / "letters.jsonl").write_text("\n".join(lines))
    (folder / "letters.yaml").write_text(LETTERS.replace("FOLDER", str(folder)))
    return folder / "letters.yaml"


def make_world(folder: Path) -> Path:
    """The demo's task, which finds its questions from any folder."""
    text = (ROOT / "demo/world.yaml").read_text()
    text = text.replace("world/test", str(WORLD / "test"))
    (folder / "world.yaml").write_text(text)
    return folder / "world.yaml"


def make_metric_task(folder: Path) -> Path:
    """A task that generates text, whose metric the package `evaluate` loads."""
    metric = folder / "share_of_letters"
    metric.mkdir()
    (metric / "share_of_letters.py").write_text(METRIC)
    text = METRIC_TASK.replace("FOLDER", str(folder))
    text = text.replace("WORLD", str(WORLD))
    (folder / "metric.yaml").write_text(text)
    return folder / "metric.yaml"


def run_python(command: list[Any], cwd: Path) -> subprocess.CompletedProcess:
    """Run Python with a script or -m, which must succeed."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(
        [sys.executable] + [str(word) for word in command],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return done


def read_results(out: Path) -> dict[str, dict[str, Any]]:
    """{task: metrics} of the harness's output folder."""
    file = next(out.rglob("results_*.json"))
    return json.loads(file.read_text())["results"]


def read_samples(out: Path, task: str) -> dict[int, dict[str, Any]]:
    """{question: what the harness wrote of it}."""
    file = next(out.rglob(f"samples_{task}_*.jsonl"))
    samples = {}
    for line in file.read_text().splitlines():
        sample = json.loads(line)
        samples[sample["doc_id"]] = sample
    return samples


def scores_of(sample: dict[str, Any]) -> list[prefix_lm.Score]:
    """The log-likelihood of each answer, and whether it is greedy: the harness writes text."""
    return [(float(value), greedy) for value, greedy in sample["filtered_resps"]]


def test_alone_in_a_folder_it_gives_the_scores_of_the_harnesss_own_model(tmp_path) -> None:
    """Both command lines as processes, on two tasks; nothing else of ours is there."""
    alone = tmp_path / "alone"
    alone.mkdir()
    shutil.copy(ROOT / "prefix_lm.py", alone)
    model = make_model(tmp_path / "model", sizes={"max_position_embeddings": 512})
    tasks = f"{make_world(tmp_path)},{make_letters(tmp_path)}"
    flags = ["--tasks", tasks, "--device", "cpu", "--batch_size", 4, "--log_samples"]
    flags += ["--model_args", f"pretrained={model},dtype=float32", "--output_path"]
    done = run_python(["prefix_lm.py", *flags, tmp_path / "prefix"], cwd=alone)
    assert done.stdout.startswith("prefix (")
    assert "forward pass" not in done.stderr
    assert [path.name for path in alone.iterdir()] == ["prefix_lm.py"]
    run_python(["-m", "lm_eval", "--model", "hf", *flags, tmp_path / "hf"], cwd=tmp_path)

    results = read_results(tmp_path / "prefix")
    assert set(results) == {"world", "letters"}
    assert results == read_results(tmp_path / "hf")
    for task in results:
        samples = read_samples(tmp_path / "prefix", task)
        expected = read_samples(tmp_path / "hf", task)
        assert len(samples) >= 40
        assert samples.keys() == expected.keys()
        for number, sample in samples.items():
            assert sample["prompt_hash"] == expected[number]["prompt_hash"]
            assert sample["acc"] == expected[number]["acc"]
            assert_close(scores_of(sample), scores_of(expected[number]), 1e-3)

    first_scores = []
    for sample in read_samples(tmp_path / "hf", "letters").values():
        first_scores.append(scores_of(sample)[0][0])
    assert np.std(first_scores) > 0.1  # questions differ, so that equal numbers mean something


def test_the_docstrings_first_command_runs_and_metrics_find_their_package(tmp_path) -> None:
    """Beside evaluate.py, whose name is that of the package that loads the second task's metric."""
    shown = re.search(r"^    cd (\w+) && python (.*)$", prefix_lm.__doc__, re.MULTILINE)
    folder, command = shown.groups()
    words = shlex.split(command)
    tasks = words.index("--tasks") + 1
    words[tasks] += f",{make_metric_task(tmp_path)}"
    words += ["--limit", "6", "--device", "cpu", "--log_samples"]
    words += ["--output_path", str(tmp_path / "out")]
    run_python(words, cwd=ROOT / folder)

    results = read_results(tmp_path / "out")
    assert set(results) == {"world", "metric"}
    for task in results:
        assert len(read_samples(tmp_path / "out", task)) == 6
    names = [name for name in results["metric"] if name.endswith("share_of_letters,none")]
    assert len(names) == 1
    assert 0 <= results["metric"][names[0]] <= 1


@pytest.fixture
def template_environment() -> Iterator[Any]:
    """The harness's Jinja environment, compiling its own way at first and afterwards."""
    import lm_eval.utils

    environment = lm_eval.utils.env
    vars(environment).pop("from_string", None)
    yield environment
    vars(environment).pop("from_string", None)


def prompts_of(config: dict[str, Any]) -> list[tuple]:
    """All (context, answer) that the harness makes of a task."""
    from lm_eval.api.task import ConfigurableTask

    task = ConfigurableTask(config=config)
    task.set_fewshot_seed(1234)
    task.build_all_requests(limit=None, rank=0, world_size=1)
    return [instance.args for instance in task.instances]


def test_templates_are_compiled_once_and_prompts_stay(tmp_path, template_environment) -> None:
    """Every prompt of a task is the one that the harness's own compilation gives."""
    from lm_eval.tasks._yaml_loader import load_yaml

    config = load_yaml(make_letters(tmp_path))
    expected = prompts_of(config)
    assert len(expected) == 80
    prefix_lm.keep_compiled_templates()
    assert prompts_of(config) == expected

    kept = template_environment.from_string
    prefix_lm.keep_compiled_templates()  # twice is once
    assert template_environment.from_string is kept
    counts = kept.cache_info()
    assert counts.misses <= 5
    assert counts.hits > 40 * 4

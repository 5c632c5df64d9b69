"""Holds: a run gives the harness's numbers, in any chunks and by any number of processes; a stopped
run goes on to the same numbers and takes nothing of another model; comparisons are what scipy and a
hand compute; bad input is one line, and no pickle and no code of a model's folder is run. What
shared prefixes give is test_prefix_lm.py's."""

import csv
import itertools
import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import (
    DEMO,
    REAL_DATA,
    ROOT,
    WORLD,
    assert_refused,
    load_evaluate,
    run_on_terminal,
    run_script,
)
from test_prefix_lm import (
    BASE,
    SIZES,
    assert_close,
    load_prefix_lm,
    make_metric_task,
    make_model,
    random_requests,
    stock_answers,
)

import common

evaluate = load_evaluate()
DATA = ROOT / "demo/data"
WORLD_YAML = ROOT / "demo/world.yaml"
WORLD_TASK = ["--tasks", "", "--task", WORLD_YAML]
ONE_PROCESS = evaluate.Process(rank=0, world_size=1, device="cpu")


@pytest.fixture(autouse=True)
def restored_path():
    """import_harness() takes our folder off the path, which other files' tests need."""
    before = list(sys.path)
    yield
    sys.path[:] = before


# --- models and runs ------------------------------------------------------------------------------


def load(folder: Path, chunks: Path, fingerprint: str = "", **settings):
    """A model whose finished chunks are files of the folder `chunks`."""
    lm = load_prefix_lm(folder, **settings)
    lm.store = evaluate.ChunkStore(chunks, fingerprint, ONE_PROCESS)
    return lm


def run(*args: object) -> None:
    """The script in this process, as its own command: its imports are made once."""
    before = sys.argv
    sys.argv = ["evaluate.py"]
    try:
        evaluate.main([str(arg) for arg in args])
    finally:
        sys.argv = before


def refused(*args: object) -> str:
    """The one line that a user reads."""
    with pytest.raises(common.UserError) as error:
        run(*args)
    line = str(error.value)
    assert "\n" not in line
    return line


def read(path: Path) -> dict:
    return json.loads(path.read_text())


def read_task(out: Path, model: Path, task: str) -> dict:
    """A model's file of a task."""
    return read(out / evaluate.folder_name(str(model)) / f"{task}.json")


def copy_of(model: Path, name: str) -> Path:
    """A copy of a model's folder beside it."""
    return Path(shutil.copytree(model, model.parent / name))


def named_task(folder: Path, name: str) -> Path:
    """The demo's own task under another name."""
    text = WORLD_YAML.read_text().replace("task: world", f"task: {name}")
    text = text.replace("world/test.jsonl", str(WORLD / "test.jsonl"))
    path = folder / "mine.yaml"
    path.write_text(text)
    return path


# --- chunks ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("stock", [False, True])
def test_chunk_boundaries_change_nothing(stock: bool, tmp_path, monkeypatch) -> None:
    """Of any size; also where the harness's own forward pass scores them."""
    lm = load(make_model(tmp_path / "model"), tmp_path / "chunks", stock=stock)
    rng = random.Random(stock)
    for tokens, share in ((1, 0), (1, 200), (100, 0), (100, 3), (65_536, 200)):
        monkeypatch.setattr(evaluate, "CHUNK_TOKENS", tokens)
        monkeypatch.setattr(evaluate, "CHUNK_SHARE", share)
        requests = random_requests(rng)
        theirs = stock_answers(lm, requests)
        assert_close(lm._loglikelihood_tokens(requests), theirs, 1e-4)
    files = list((tmp_path / "chunks").iterdir())
    assert lm.truncated
    assert len(files) > 20


def test_chunks_repeat_little(tmp_path, monkeypatch) -> None:
    """Counted by the model itself, on real prompts in chunks: at most 1.01 x the trie's nodes."""
    lm = load(BASE, tmp_path / "chunks")
    monkeypatch.setattr(evaluate, "CHUNK_TOKENS", 2000)
    asked = harness_requests("arc", DATA) + harness_requests("mmlu", DATA)
    nodes = set()
    for request in asked:
        context, answer = lm._encode_pair(*request.args)
        whole = [*context, *answer]
        ids = tuple(whole[-lm.max_length - 1 : -1])
        for size in range(1, len(ids) + 1):
            nodes.add(hash(ids[:size]))

    seen = []

    def count(module, ids, output) -> None:
        seen.append(ids[0].numel())

    lm.model.get_input_embeddings().register_forward_hook(count)
    lm.loglikelihood(asked)
    assert len(list((tmp_path / "chunks").iterdir())) > 3
    assert len(nodes) <= sum(seen) <= 1.01 * len(nodes)


def test_a_chunk_that_is_none_is_scored_again(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(evaluate, "CHUNK_TOKENS", 100)
    monkeypatch.setattr(evaluate, "CHUNK_SHARE", 0)
    lm = load(make_model(tmp_path / "model"), tmp_path / "chunks")
    requests = random_requests(random.Random(5))
    theirs = lm._loglikelihood_tokens(requests)
    first, second, third, *others = sorted((tmp_path / "chunks").iterdir())
    assert others
    first.write_bytes(first.read_bytes()[:-9])
    second.write_text("[]")
    third.write_text("null")
    assert lm._loglikelihood_tokens(requests) == theirs


def test_a_model_that_falls_back_says_so_and_is_marked(tmp_path, capsys) -> None:
    folder = make_model(tmp_path / "model", "Mistral", {"sliding_window": 8})
    run("--model", folder, *WORLD_TASK, "--limit", "4", "--out", tmp_path / "out")
    assert "a sliding window" in capsys.readouterr().err
    models = read(tmp_path / "out/results.json")["models"]
    assert models[str(folder)]["path"] == "stock"


def harness_requests(name: str, local: Path) -> list:
    """The harness's requests of a benchmark, one task at a time."""
    args = evaluate.parse_args(["--model", "x", "--tasks", name, "--local", str(local)])
    evaluate.import_harness()
    requests = []
    for task in evaluate.load_tasks(args):
        task.harness.set_fewshot_seed(1234)
        task.harness.build_all_requests(limit=None, rank=0, world_size=1)
        requests += task.harness.instances
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


def test_prefix_lm_without_the_harness_says_what_is_missing() -> None:
    command = [sys.executable, "-I", "-S", ROOT / "prefix_lm.py", "--help"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: no package lm_eval here")
    assert len(done.stderr.splitlines()) == 1


def test_a_task_with_a_hugging_face_metric_runs(tmp_path) -> None:
    """It generates text; the metric is loaded by the package that our script's name hides."""
    task = make_metric_task(tmp_path)
    args = ["--model", BASE, "--tasks", "", "--task", task, "--limit", "6"]
    done = run_script("evaluate", *args, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    questions = read_task(tmp_path / "out", BASE, "metric")["questions"]
    assert len(questions) == 6
    for question in questions:
        assert isinstance(question["responses"][0], str)
    [metric] = evaluate.metrics_of(questions[0])
    assert 0 <= questions[0][metric] <= 1


@pytest.mark.parametrize("local", ["demo", "real"])
def test_prompts_are_the_harnesss(local: str, tmp_path) -> None:
    """Our rows in place of the hub's: the same requests as the harness builds from files."""
    folder = DATA if local == "demo" else REAL_DATA
    if not folder.is_dir():
        pytest.skip("the real data is not there")
    evaluate.import_harness()
    import lm_eval
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks._yaml_loader import load_yaml

    definition = Path(lm_eval.__path__[0], "tasks/arc/arc_challenge.yaml")
    config = load_yaml(definition)
    files = {split: str(folder / f"arc/ARC-Challenge-{split}.jsonl") for split in ("train", "test")}
    config["dataset_path"] = "json"
    config["dataset_name"] = None
    config["validation_split"] = None
    config["dataset_kwargs"] = {"data_files": files, "cache_dir": str(tmp_path)}
    config["num_fewshot"] = 25
    [subject] = evaluate.load_benchmark("arc", folder, official=True)
    ours = evaluate.task_on_rows(definition, 25, subject)

    requests = []
    for task in (ConfigurableTask(config=config), ours):
        task.set_fewshot_seed(1234)
        task.build_all_requests(limit=12, rank=0, world_size=1)
        requests.append([instance.args for instance in task.instances])
    assert requests[0] == requests[1]
    assert len(requests[0]) > 40
    first_prompt = requests[1][0][0]
    assert first_prompt.count("Question: ") == 26


def harness_scores(folder: Path, local: Path, subjects: list[str], limit: int) -> dict:
    """{task: harness result} of lm_eval alone, a task at a time, nothing of ours but the rows."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    args = evaluate.parse_args(["--model", "x", "--local", str(local)])
    settings = {"device": "cpu", "dtype": "float32", "softmax_dtype": "float32", "batch_size": 4}
    lm = HFLM(pretrained=str(folder), logits_cache=False, **settings)
    found = {}
    for task in evaluate.load_tasks(args):
        questions = limit
        if task.benchmark == "mmlu":
            if task.name.removeprefix("mmlu_") not in subjects:
                continue
            questions = min(limit, 20)
        found[task.name] = simple_evaluate(
            lm,
            tasks=[task.harness],
            limit=questions,
            task_manager=TaskManager(include_defaults=False),
            bootstrap_iters=0,
        )
    return found


def place_of(task: str, metric: str) -> tuple[str, str]:
    """Task and metric of results.json that hold a metric of one of the harness's tasks."""
    if task.startswith("truthfulqa_"):
        return "truthfulqa", task.removeprefix("truthfulqa_")
    if task.startswith("mmlu_"):
        return task.replace("mmlu_", "mmlu/"), metric
    return task.removesuffix("_challenge").replace("arc_", "arc"), metric


def assert_equal_scores(out: Path, model: Path, theirs: dict) -> None:
    """Every log-likelihood within 1e-3, every metric of every question equal (mc2 within 1e-5)."""
    scores = read(out / "results.json")["all questions"][str(model)]
    for name, expected in theirs.items():
        questions = read_task(out, model, name)["questions"]
        samples = sorted(expected["samples"][name], key=lambda sample: sample["doc_id"])
        assert len(samples) == len(questions) > 0
        within = 1e-5 if name == "truthfulqa_mc2" else 0
        for sample, question in zip(samples, questions, strict=True):
            values = [response[0] for response in sample["filtered_resps"]]
            difference = np.array(question["log_likelihoods"]) - values
            assert np.abs(difference).max() <= 1e-3
            for metric in sample["metrics"]:
                assert abs(question[metric] - sample[metric]) <= within, (name, metric)

        for metric in ("acc", "acc_norm"):
            value = expected["results"][name].get(f"{metric},none")
            if value is not None:
                task, label = place_of(name, metric)
                assert scores[task][label] == pytest.approx(100 * value, abs=1e-3)
                kept = read_task(out, model, name)["harness"]
                assert kept[f"{metric},none"] == pytest.approx(value, abs=1e-5)


def test_scores_equal_the_harness_on_the_demo(tmp_path) -> None:
    """A whole run of the script against lm_eval alone, on all four benchmarks."""
    out = tmp_path / "eval"
    subjects = [path.name.removesuffix("_test.csv") for path in (DATA / "mmlu/test").iterdir()]
    run("--model", BASE, "--local", DATA, "--dtype", "float32", "--limit", 3, "--out", out)
    theirs = harness_scores(BASE, DATA, subjects, 3)
    assert len(theirs) == 4 + len(subjects)
    assert_equal_scores(out, BASE, theirs)
    assert "(partial)" in (out / "results.md").read_text()
    assert read(out / "run.json")["partial"] is True

    scores = {name: found["results"][name] for name, found in theirs.items()}
    accuracies = [scores[f"mmlu_{subject}"]["acc,none"] for subject in subjects]
    four = [
        scores["arc_challenge"]["acc_norm,none"],
        scores["hellaswag"]["acc_norm,none"],
        sum(accuracies) / len(subjects),
        scores["truthfulqa_mc2"]["acc,none"],
    ]
    ours = read(out / "results.json")["all questions"][str(BASE)]["average"]
    assert ours["mean"] == pytest.approx(100 * sum(four) / 4, abs=1e-3)


REAL_SUBJECTS = [  # from short to long questions: 60 to 500 tokens
    "abstract_algebra",
    "high_school_computer_science",
    "moral_scenarios",
    "professional_law",
    "high_school_european_history",
    "anatomy",
]


@pytest.mark.slow
@pytest.mark.skipif(not REAL_DATA.is_dir(), reason="the real data is not there")
def test_scores_equal_the_harness_on_real_rows(tmp_path) -> None:
    """100 questions of each benchmark, 120 of MMLU, some contexts longer than the model."""
    model = make_real_model(tmp_path / "model")
    local = tmp_path / "data"
    for name in ("arc", "hellaswag", "truthfulqa"):
        shutil.copytree(REAL_DATA / name, local / name)
    for split in ("dev", "test"):
        (local / "mmlu" / split).mkdir(parents=True)
        for subject in REAL_SUBJECTS:
            file = f"mmlu/{split}/{subject}_{split}.csv"
            shutil.copy(REAL_DATA / file, local / file)

    theirs = harness_scores(model, local, REAL_SUBJECTS, 100)
    of_mmlu = {name: found for name, found in theirs.items() if name.startswith("mmlu_")}
    of_others = {name: found for name, found in theirs.items() if name not in of_mmlu}
    args = ["--model", model, "--local", local]
    others = tmp_path / "others"
    run(*args, "--limit", 100, "--tasks", "arc,hellaswag,truthfulqa", "--out", others)
    assert_equal_scores(others, model, of_others)
    mmlu = tmp_path / "mmlu"
    run(*args, "--limit", 20, "--tasks", "mmlu", "--out", mmlu)
    assert_equal_scores(mmlu, model, of_mmlu)

    tasks = read(mmlu / "results.json")["tasks"]
    cut = tasks["mmlu/high_school_european_history"]["truncated"][str(model)]
    assert cut > 0
    assert tasks["mmlu"]["truncated"][str(model)] >= cut


def make_real_model(folder: Path) -> Path:
    """A Llama of 2 layers with a byte-level BPE of 2,000 tokens made of MMLU's questions."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    bpe = ByteLevelBPETokenizer()
    files = [str(path) for path in sorted((REAL_DATA / "mmlu/test").glob("*.csv"))]
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    bpe.train(files, vocab_size=2000, special_tokens=list(special.values()), show_progress=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, **special)
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


# --- going on, several processes ------------------------------------------------------------------

KILLS = """
import json, os, signal, sys
from pathlib import Path
from conftest import load_evaluate
evaluate = load_evaluate()
evaluate.import_harness()
import common, datasets, lm_eval, peft, transformers  # once, for every child
out, chunk, *args = sys.argv[1:]
evaluate.CHUNK_TOKENS = int(chunk)
sys.argv = ["evaluate.py"]
write_file = common.write_file

def die_before(place, number):
    seen = []
    def write(path, text):
        if path.name == place or path.parent.name.endswith(place):
            seen.append(path)
        if len(seen) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        write_file(path, text)
    common.write_file = evaluate.write_file = write

def child(*stop):
    pid = os.fork()
    if pid == 0:
        sys.stdout = sys.stderr = open(os.devnull, "w")
        if stop:
            die_before(*stop)
        try:
            evaluate.main([*args, "--out", out])
        except BaseException as error:
            Path(out + ".error").write_text(repr(error))
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

assert child() == 0, Path(out + ".error").read_text()
os.rename(out, out + ".uninterrupted")
kept = []
for place, number in STOPS:
    assert child(place, number) == -signal.SIGKILL, (place, number)
    assert Path(out, ".unfinished").exists() and not Path(out, "run.json").exists()
    kept.append(len(list(evaluate.chunk_folder(Path(out)).glob("*.json"))))
assert child() == 0, Path(out + ".error").read_text()
print(json.dumps(kept))
"""
STOPS = {  # just before the n-th chunk, or the file: the chunks that are kept then
    (".chunks", 1): 0,
    (".chunks", 2): 1,
    (".chunks", 4): 4,
    ("arc_challenge.json", 1): 6,
    (".chunks", 3): 8,
    (".chunks", 5): 12,
    ("world.json", 1): 14,
    ("results.json", 1): 14,
    ("results.md", 1): 14,
    ("run.json", 1): 14,
}


def run_code(code: str, *args: object) -> subprocess.CompletedProcess:
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT / "tests")}
    command = [sys.executable, "-c", code, *map(str, args)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=env, timeout=600)


def numbers(out: Path) -> dict:
    """All that a run found, without what a clock decides."""
    found = {"results": read(out / "results.json")}
    for path in sorted(out.glob("*/*.json")):
        found[path.name] = read(path)
        found[path.name].pop("benchmark_seconds")
    return found


@pytest.mark.slow
def test_killed_at_ten_writes_the_numbers_are_the_same(tmp_path) -> None:
    """Each process goes on from all chunks of those before it."""
    out = tmp_path / "eval"
    args = ["--model", BASE, "--tasks", "arc,hellaswag", *DEMO, "--task", WORLD_YAML]
    code = KILLS.replace("STOPS", repr(list(STOPS)))
    done = run_code(code, out, 600, *args)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == list(STOPS.values())
    assert numbers(out) == numbers(tmp_path / "eval.uninterrupted")
    assert not evaluate.chunk_folder(out).exists()
    paths = [path for path in out.rglob("*") if path.is_file()]
    outputs = set(read(out / "run.json")["outputs"])
    assert {str(path.relative_to(out)) for path in paths} == outputs | {"run.json"}


def test_nothing_is_scored_twice_and_nothing_of_another_model_is_taken(tmp_path) -> None:
    requests = random_requests(random.Random(3), longest=40)
    first = load(make_model(tmp_path / "a"), tmp_path / "chunks", "a")
    theirs = first._loglikelihood_tokens(requests)
    again = load(tmp_path / "a", tmp_path / "chunks", "a")
    again.scorer = None  # it must not be needed
    assert again._loglikelihood_tokens(requests) == theirs
    other = load(make_model(tmp_path / "b", scale=2), tmp_path / "chunks", "b")
    answers = other._loglikelihood_tokens(requests)
    assert answers != theirs
    assert_close(answers, stock_answers(other, requests), 1e-4)


def test_what_tells_models_apart(tmp_path) -> None:
    """Weights, tokenizer, dtype, adapter and the way of the forward pass."""
    from peft import LoraConfig

    folder = make_model(tmp_path / "model")
    save_adapter(tmp_path / "one", LoraConfig(target_modules=["up_proj"]), folder)
    save_adapter(tmp_path / "two", LoraConfig(target_modules=["down_proj"]), folder)

    def key(*flags: object) -> str:
        args = evaluate.parse_args(["--model", str(folder), "--tasks", "arc", *map(str, flags)])
        [model] = evaluate.check_models(args)
        return evaluate.load_lm(model, args, ONE_PROCESS).store.fingerprint

    adapter = tmp_path / "adapter"
    keys = [key(), key("--dtype", "bfloat16"), key("--stock"), key("--stock", "--batch-size", 2)]
    for name in ("one", "two"):  # at the same place
        shutil.rmtree(adapter, ignore_errors=True)
        shutil.copytree(tmp_path / name, adapter)
        keys.append(key("--adapter", adapter))
    tokenizer = folder / "tokenizer_config.json"
    tokenizer.write_text(tokenizer.read_text() + " ")
    keys.append(key())
    make_model(folder, scale=7)
    keys.append(key())
    assert len(set(keys)) == len(keys)
    assert key() == keys[-1]


def save_adapter(folder: Path, config, base: Path):
    """Save a random adapter on a model, and return both as PEFT's model."""
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    config.init_lora_weights = False
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    model.save_pretrained(folder)
    return model


IN_SMALL_CHUNKS = """
import os, sys
from conftest import load_evaluate
evaluate = load_evaluate()
evaluate.CHUNK_TOKENS = 1500
import prefix_lm
rank, score = os.environ.get("RANK"), prefix_lm.PrefixScorer.score

def count(self, *rest):
    print("chunk by", rank, file=sys.stderr)
    return score(self, *rest)

prefix_lm.PrefixScorer.score = count
sys.argv[0] = "evaluate.py"
evaluate.run_main(evaluate.main)
"""


@pytest.mark.slow
def test_processes_of_torchrun_find_what_one_finds(tmp_path) -> None:
    script = tmp_path / "in_small_chunks.py"
    script.write_text(IN_SMALL_CHUNKS)
    args = [script, "--model", BASE, "--local", DATA, "--task", WORLD_YAML, "--out"]
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT / "tests")}
    env["OMP_NUM_THREADS"] = "1"  # torchrun's own choice; other threads sum in another order

    def start(*parts: object) -> subprocess.CompletedProcess:
        command = [sys.executable, *map(str, parts)]
        done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=300)
        assert done.returncode == 0, done.stderr
        return done

    start(*args, tmp_path / "one")
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", 2, "--master-port", 29577, "--"]
    done = start(*torchrun, *args, tmp_path / "two")
    assert numbers(tmp_path / "one") == numbers(tmp_path / "two")
    first = done.stderr.count("chunk by 0")
    second = done.stderr.count("chunk by 1")
    assert min(first, second) > 3
    assert abs(first - second) <= 6  # the harness asks six times
    assert done.stdout.count("wrote") == 1


def test_resume(tmp_path, capsys, monkeypatch) -> None:
    args = ["--model", BASE, *WORLD_TASK, "--limit", "4", "--out", tmp_path / "out"]
    assert "leave the flag out" in refused(*args, "--resume")
    assert "leave the flag out" in refused("--resume", "--out", tmp_path / "none")
    run(*args)
    assert "--overwrite" in refused(*args)
    run(*args, "--resume")
    assert "nothing to resume" in capsys.readouterr().out
    with monkeypatch.context() as late:  # a process of torchrun that starts when all is done
        late.setenv("RANK", "1")
        run(*args)
    assert capsys.readouterr().out == ""
    run(*args, "--overwrite")


def test_progress_tells_rate_and_time_left(monkeypatch, capsys) -> None:
    """A line at most every 10 s where there is no terminal; one process of several speaks."""

    def lines(quiet: bool, step: int) -> list[str]:
        """What four packs of 50 tokens print, where each look at the clock is `step` s later."""
        clock = itertools.count(0, step)
        monkeypatch.setattr(evaluate.time, "monotonic", lambda: next(clock))
        progress = evaluate.Progress(label="m on arc", tokens=400, questions=10, quiet=quiet)
        for _ in range(4):
            progress.advance(50)
        progress.close()
        return capsys.readouterr().err.splitlines()

    assert lines(quiet=False, step=6) == [
        "m on arc: 25%, 8 tokens/s, 0.2 questions/s, ETA 36 s",
        "m on arc: 50%, 8 tokens/s, 0.2 questions/s, ETA 24 s",
    ]
    assert lines(quiet=True, step=6) == []
    assert lines(quiet=False, step=0) == []


def test_a_terminal_gets_our_bars_alone(tmp_path) -> None:
    """The harness would draw one without a name for each subject, datasets one for each map."""
    flags = ["--tasks", "mmlu,hellaswag", *DEMO, "--out", tmp_path / "out"]
    code, shown = run_on_terminal("evaluate", "--model", BASE, *flags)
    assert code == 0
    assert "questions/s" in shown
    labels = ("Loading weights", "base_model on mmlu", "base_model on hellaswag")
    for line in re.split(r"[\r\n]+", shown):
        if "%|" in line:
            assert any(label in line for label in labels), line


# --- comparison -----------------------------------------------------------------------------------


def result(task: str, prefix: str, values: list[float], metric: str = "acc"):
    """A made-up model's answers to a task."""
    questions = []
    for number, value in enumerate(values):
        questions.append({"test_id": f"{prefix}/{number}", metric: value})
    return evaluate.TaskResult(
        model="x",
        sha256="",
        task=task,
        prefix=prefix,
        limit=None,
        benchmark_seconds=0,
        prompts_sha256=task,
        truncated=0,
        harness={},
        questions=questions,
    )


def model_run(name: str, results: list):
    """A made-up model's run."""
    info = evaluate.ModelInfo(
        folder=name,
        adapter=None,
        load_in_4bit=False,
        dtype="float32",
        sha256=name,
        max_length=9,
        files={},
        path="prefix",
    )
    return evaluate.ModelRun(name, info, results)


def compared(results: dict[str, list], flagged: set | None = None, paper: bool = False) -> dict:
    """results.json of made-up models, {name: answers}, and results.md's text under "text"."""
    runs = [model_run(name, answers) for name, answers in results.items()]
    found = evaluate.compare_runs(runs, flagged)
    return {**json.loads(found.to_json()), "text": evaluate.draw_tables(found, paper)}


def table(text: str, title: str) -> dict[str, list[str]]:
    """The rows of the Markdown table below the line that holds `title`, by first cell."""
    below = text[text.index(title) :].split("\n\n")[1]
    rows = {}
    for line in below.splitlines():
        first, *cells = [cell.strip() for cell in line.strip("|").split("|")]
        rows[first] = cells
    return rows


@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_a_whole_run_with_answers_too_unlikely_for_the_harness(tmp_path) -> None:
    model = make_model(tmp_path / "model", scale=99)
    out = tmp_path / "eval"
    run(
        "--model",
        model,
        "--local",
        DATA,
        "--tasks",
        "truthfulqa",
        "--dtype",
        "float32",
        "--out",
        out,
    )
    found = read_task(out, model, "truthfulqa_mc2")
    likeliest = [max(question["log_likelihoods"]) for question in found["questions"]]
    assert min(likeliest) < -746  # whose exp() is 0
    assert found["harness"] == {}  # it has nan
    for question in found["questions"]:
        assert 0 <= question["acc"] <= 1


def sample(values: list[float], metric: str, value: float) -> dict:
    """A sample of the harness's: a question with one answer for each of the values."""
    labels = [1, 0, 1, 0]
    return {
        "doc_id": 3,
        "doc": {"mc2_targets": {"labels": labels}},
        "target": 0,
        "metrics": [metric],
        "filter": "none",
        "filtered_resps": [(value, False) for value in values],
        metric: value,
    }


def test_mc2_of_answers_too_unlikely_for_the_harness() -> None:
    from lm_eval.tasks.truthfulqa.utils import process_results_mc2

    def share(values: list[float]) -> float:
        made = sample(values, "acc", 0.0)
        with np.errstate(invalid="ignore"):
            made |= process_results_mc2(made["doc"], made["filtered_resps"])
        [question] = evaluate.to_questions("truthfulqa/all", [made])
        assert math.isnan(made["acc"]) or question["acc"] == made["acc"]
        return question["acc"]

    rng = np.random.default_rng(0)
    for _ in range(100):
        values = rng.uniform(-300, -1, 4).tolist()
        unlikely = [value - 1000 for value in values]
        expected = share(values)
        assert evaluate.true_share(values, [1, 0, 1, 0]) == pytest.approx(expected, abs=1e-12)
        assert share(unlikely) == pytest.approx(expected, abs=1e-9)
    with pytest.raises(common.UserError, match="x/all, question 3: its f is no number"):
        evaluate.to_questions("x/all", [sample([0.0], "f", math.nan)])


def test_means_and_chosen_questions() -> None:
    results = [
        result("mmlu_anatomy", "mmlu/anatomy", [1, 0]),
        result("mmlu_virology", "mmlu/virology", [1, 1, 1, 0, 1, 0, 1, 1]),
        result("truthfulqa_mc1", "truthfulqa/all", [1, 0]),
        result("truthfulqa_mc2", "truthfulqa/all", [0.5, 0.25]),
    ]
    leaked = {"mmlu/anatomy/0", "mmlu/anatomy/1", "truthfulqa/all/0"}
    found = compared({"base": results}, flagged=leaked)
    whole = found["all questions"]["base"]
    assert whole["mmlu"] == {
        "questions": 10,
        "tasks": 2,
        "acc": pytest.approx(100 * (0.5 + 0.75) / 2),
        "acc_weighted": pytest.approx(70),
    }
    assert whole["mmlu/virology"] == {"questions": 8, "tasks": 1, "acc": 75}
    assert whole["truthfulqa"] == {"questions": 2, "tasks": 1, "mc1": 50, "mc2": 37.5}
    clean = found["unflagged questions"]["base"]
    assert clean["mmlu"] == {"questions": 8, "tasks": 1, "acc": 75, "acc_weighted": 75}
    assert clean["truthfulqa"] == {"questions": 1, "tasks": 1, "mc1": 0, "mc2": 25}
    assert "mmlu/anatomy" not in clean


def test_change_in_percent_is_what_a_hand_computes() -> None:
    """In the form of Tables 5 and 7, beside the paper's own columns."""
    base = [
        result("arc_challenge", "arc/all", [1, 1, 0, 0, 0], "acc_norm"),  # 40 %
        result("mmlu_anatomy", "mmlu/anatomy", [1, 0, 1, 0]),  # 50
        result("mmlu_virology", "mmlu/virology", [0, 0, 0, 1, 0]),  # 20, so mmlu 35
        result("truthfulqa_mc1", "truthfulqa/all", [1, 0]),
        result("truthfulqa_mc2", "truthfulqa/all", [0.5, 0.3]),  # 40
        result("zero", "zero/all", [0, 0]),
    ]
    tuned = [
        result("arc_challenge", "arc/all", [1, 1, 1, 0, 0], "acc_norm"),  # 60: + 50 %
        result("mmlu_anatomy", "mmlu/anatomy", [1, 0, 0, 0]),  # 25: - 50 %
        result("mmlu_virology", "mmlu/virology", [1, 1, 0, 1, 1]),  # 80: + 300 %; mmlu 52.5: + 50 %
        result("truthfulqa_mc1", "truthfulqa/all", [1, 1]),
        result("truthfulqa_mc2", "truthfulqa/all", [0.55, 0.27]),  # 41: + 2.5 %
        result("zero", "zero/all", [1, 0]),  # of nothing there is no percentage
    ]
    found = compared({"base": base, "x/tuned": tuned}, paper=True)
    five = table(found["text"], "Table 5")
    assert five["task"][:2] == ["tuned", "Camel-Platypus2-13B"]
    assert len(five["task"]) == 6
    assert five["arc"] == ["+50.00 (=)", "-0.14", "+1.10", "+1.08", "+1.10", "+4.12"]
    assert five["hellaswag"] == ["-", "-0.06", "+0.02", "+0.06", "-0.14", "-0.24"]
    assert five["mmlu"] == ["+50.00 (=)", "-", "-", "-", "-", "-"]
    assert five["truthfulqa"][:2] == ["+2.50 (=)", "+4.33"]
    assert five["zero"][0] == "-"

    seven = table(found["text"], "Table 7")
    assert seven["anatomy"][:2] == ["-50.00 (=)", "-6.67"]
    assert seven["virology"][0] in ("+300.00", "+300.00 (=)")
    assert len(seven) == 2 + 57

    points = {row["task"]: row["points"] for row in found["comparisons"]}
    assert points["mmlu"] == pytest.approx(17.5)
    assert points["truthfulqa"] == pytest.approx(1)
    arc = found["comparisons"][0]
    assert arc["task"] == "arc"
    assert arc["flips"] == [{"test_id": "arc/all/2", "base": 0, "model": 1}]
    assert arc["gained"] == 1
    assert arc["lost"] == 0
    assert arc["p"] == 1
    assert arc["verdict"] == "not distinguishable"
    assert "not distinguishable" in found["text"]


def test_tables_tell_models_apart(tmp_path, monkeypatch) -> None:
    """Two folders of one name have their whole paths everywhere; "." has its folder's name."""
    monkeypatch.chdir(tmp_path)
    wrong = [result("arc_challenge", "arc/all", [0, 0, 1], "acc_norm")]
    right = [result("arc_challenge", "arc/all", [1, 0, 1], "acc_norm")]
    text = compared({"base": wrong, "a/merged": right, "b/merged": wrong})["text"]
    assert table(text, "Scores")["task"] == ["metric", "questions", "base", "a/merged", "b/merged"]
    assert table(text, "Table 5")["task"] == ["a/merged", "b/merged"]
    assert "| a/merged |" in text
    assert "| b/merged |" in text
    text = compared({"base": wrong, ".": right})["text"]
    assert table(text, "Table 5")["task"] == [tmp_path.name]


def test_names_of_models_are_printable() -> None:
    """Those of --compare come from a file."""
    wrong = [result("arc_challenge", "arc/all", [0, 0, 1], "acc_norm")]
    found = compared({"base\x1b[2J": wrong, "tuned\x1b[2J": wrong})
    assert "\x1b" not in found["text"]
    assert "tuned␛[2J" in found["text"]


@pytest.mark.skipif(not REAL_DATA.is_dir(), reason="the paper's tables are not there")
def test_the_papers_columns_are_its_tables() -> None:
    def lines_of(path: Path) -> list[list[str]]:
        with path.open(encoding="utf-8", newline="") as file:
            return list(csv.reader(file))

    folder = REAL_DATA.parent / "paper"
    expected = lines_of(folder / "table5_percent_change.csv")
    expected += lines_of(folder / "table7_mmlu_percent_change.csv")[1:]
    names = {"arc": "arc_challenge", "truthfulqa": "truthfulqa_mc"}
    ours = lines_of(evaluate.PAPER_CHANGE)
    for line, theirs in zip(ours, expected, strict=True):
        task = line[0].removeprefix("mmlu/")
        assert line[1:] == theirs[1:]
        if line is not ours[0]:
            assert names.get(task, task) == theirs[0]


def as_task(*groups) -> dict[str, float]:
    """Values of a task's subjects as the script has them, {test id: share of 1}."""
    values = {}
    for subject, group in enumerate(groups):
        for row, value in enumerate(group):
            values[f"mmlu/subject_{subject}/{row}"] = value / 100
    return values


def test_mcnemar_is_scipys() -> None:
    from scipy import stats

    for gained, lost in itertools.product((0, 1, 2, 5, 17, 400), repeat=2):
        expected = 1.0
        if gained + lost:
            expected = stats.binomtest(gained, gained + lost).pvalue
        assert evaluate.mcnemar(gained, lost) == pytest.approx(expected, rel=1e-9)


def test_the_bootstrap_is_scipys() -> None:
    from scipy import stats

    def mean_of_means(*groups, axis):
        return sum(group.mean(axis) for group in groups) / len(groups)

    rng = np.random.default_rng(1)
    data = [
        [rng.choice([-1, 0, 0, 0, 1], 300)],
        [rng.normal(0.2, 1, 200)],
        [rng.normal(0, 1, 40), rng.normal(1, 3, 10)],  # means of groups weigh the same
    ]
    settings = {"method": "percentile", "n_resamples": 20_000, "vectorized": True, "rng": 2}
    for groups in data:
        theirs = stats.bootstrap(groups, mean_of_means, **settings).confidence_interval
        ours = evaluate.bootstrap(as_task(*groups))
        within = 0.04 * (theirs.high - theirs.low)
        assert ours == pytest.approx([theirs.low, theirs.high], abs=within)


def test_verdicts_and_what_only_flagged_questions_gain() -> None:
    """30 leaked questions are all learnt, 70 others stay as they are: the split tells."""
    others = [1, 0] * 35
    base = [result("arc_challenge", "arc/all", [0] * 30 + others, "acc_norm")]
    tuned = [result("arc_challenge", "arc/all", [1] * 30 + others, "acc_norm")]
    flagged = {f"arc/all/{number}" for number in range(30)}
    flagged.add("mmlu/anatomy/3")
    found = compared({"base": base, "x/tuned": tuned}, flagged=flagged)
    [row] = found["comparisons"]
    assert row["verdict"] == "better"
    assert row["p"] == 2 * 0.5**30
    assert row["gained"] == 30
    assert row["points"] == 30
    assert row["points_unflagged"] == 0
    assert row["points_flagged"] == 100
    low, high = row["interval"]
    assert 20 < low < high < 40

    assert found["tasks"]["arc"]["flagged"] == 30
    unflagged = found["unflagged questions"]["x/tuned"]["arc"]
    assert unflagged == {"questions": 70, "tasks": 1, "acc_norm": 50}
    shown = table(found["text"], "unflagged questions")["arc (partial)"]
    assert shown[1:] == ["70", "50.00 (+15.00)", "50.00 (-15.00)"]
    tests = table(found["text"], "same questions")["arc"]
    assert tests[-3:] == ["+0.00", "+100.00", "better"]
    assert "worse" not in found["text"]

    found = compared({"base": tuned, "x/tuned": base}, flagged=set())
    [row] = found["comparisons"]
    assert row["verdict"] == "worse"
    assert row["points_flagged"] is None
    assert found["tasks"]["arc"]["flagged"] == 0


LEADERBOARD = {  # the metric of the four benchmarks' harness tasks that the average takes
    "arc_challenge": "acc_norm",
    "hellaswag": "acc_norm",
    "mmlu": "acc",
    "truthfulqa_mc2": "acc",
}


def four_benchmarks(rng: np.random.Generator, skill: float, sizes: dict[str, int]) -> list:
    """Made-up results, with decoys: ARC's and HellaSwag's acc, mc1. `sizes`: of each task."""
    results = []
    for task, size in sizes.items():
        right = (rng.random(size) < skill).astype(float).tolist()
        if task == "truthfulqa":
            shares = rng.beta(2, 2 / skill, size).tolist()
            results.append(result("truthfulqa_mc1", "truthfulqa/all", [1.0] * size))
            results.append(result("truthfulqa_mc2", "truthfulqa/all", shares))
        elif task.startswith("mmlu_"):
            results.append(result(task, task.replace("_", "/", 1), right))
        else:
            made = result(task, f"{task.removesuffix('_challenge')}/all", [0.0] * size)
            for question, value in zip(made.questions, right, strict=True):
                question["acc_norm"] = value
            results.append(made)
    return results


def small_sizes(subjects: int = 57) -> dict[str, int]:
    """Of few questions each, and no two benchmarks or subjects alike."""
    sizes = {"arc_challenge": 90, "hellaswag": 400, "truthfulqa": 50}
    for number in range(subjects):
        sizes[f"mmlu_subject_{number}"] = 3 + number
    return sizes


def belongs(task: str, name: str) -> bool:
    """Whether a harness task is one of LEADERBOARD's, or a subject of it."""
    return task == name or task.startswith(f"{name}_")


def by_hand(results: list, chosen: Callable[[str], bool] = lambda test_id: True) -> float | None:
    """The average by its definition; None where a benchmark has no such question."""
    benchmark_means = []
    for name, metric in LEADERBOARD.items():
        subject_means = []
        for made in results:
            values = []
            for question in made.questions:
                if belongs(made.task, name) and chosen(question["test_id"]):
                    values.append(question[metric])
            if values:
                subject_means.append(sum(values) / len(values))
        if not subject_means:
            return None
        benchmark_means.append(sum(subject_means) / len(subject_means))
    return 100 * sum(benchmark_means) / 4


def average_row(found: dict, model: str) -> dict:
    """The average's comparison of a model, which is its first."""
    rows = [row for row in found["comparisons"] if row["model"] == model]
    assert rows[0]["task"] == "average"
    return rows[0]


def test_the_average_is_what_loops_over_the_questions_compute() -> None:
    """Of three models, in their order; also without and on the flagged questions."""
    rng = np.random.default_rng(5)
    results = {}
    for name, skill in (("base", 0.4), ("good", 0.7), ("bad", 0.2)):
        results[name] = four_benchmarks(rng, skill, small_sizes())
    ids = {question["test_id"] for made in results["base"] for question in made.questions}
    flagged = {test_id for test_id in sorted(ids) if rng.random() < 0.3}
    flagged |= {f"mmlu/subject_4/{number}" for number in range(7)}  # a subject without others
    found = compared(results, flagged=flagged)

    parts = {
        "all questions": lambda test_id: True,
        "unflagged questions": lambda test_id: test_id not in flagged,
        "flagged questions": lambda test_id: test_id in flagged,
    }
    expected = {}
    for part, chosen in parts.items():
        assert list(found[part]) == list(results)
        for name, made in results.items():
            expected[part, name] = by_hand(made, chosen)
            first = next(iter(found[part][name]))
            assert first == "average"
            ours = found[part][name]["average"]
            assert ours["mean"] == pytest.approx(expected[part, name], abs=1e-9)
            assert ours["questions"] == len(set(filter(chosen, ids)))

    for name in ("good", "bad"):
        row = average_row(found, name)
        gains = {part: expected[part, name] - expected[part, "base"] for part in parts}
        assert row["base_score"] == pytest.approx(expected["all questions", "base"])
        assert row["points"] == pytest.approx(gains["all questions"])
        assert row["percent"] == pytest.approx(100 * row["points"] / row["base_score"])
        assert row["points_unflagged"] == pytest.approx(gains["unflagged questions"])
        assert row["points_flagged"] == pytest.approx(gains["flagged questions"])
        assert row["metric"] == "mean"
        assert row["questions"] == len(ids)
        for key in ("gained", "lost", "p"):
            assert row[key] is None
        assert row["flips"] == []
    assert average_row(found, "good")["verdict"] == "better"
    assert average_row(found, "bad")["verdict"] == "worse"


def test_the_averages_interval_is_a_direct_bootstraps() -> None:
    """Questions drawn one by one, by numpy, within each benchmark and each subject of MMLU."""
    before = four_benchmarks(np.random.default_rng(1), 0.5, small_sizes())
    after = four_benchmarks(np.random.default_rng(2), 0.55, small_sizes())
    row = average_row(compared({"base": before, "x/tuned": after}), "x/tuned")

    rng = np.random.default_rng(3)
    means: dict[str, list] = {name: [] for name in LEADERBOARD}
    for old, new in zip(before, after, strict=True):
        for name, metric in LEADERBOARD.items():
            if not belongs(old.task, name):
                continue
            first = np.array([question[metric] for question in old.questions])
            second = np.array([question[metric] for question in new.questions])
            gains = second - first
            drawn = rng.integers(0, len(gains), size=(20_000, len(gains)))
            means[name].append(gains[drawn].mean(axis=1))
    assert [len(groups) for groups in means.values()] == [1, 1, 57, 1]
    averages = sum(sum(groups) / len(groups) for groups in means.values()) / 4
    low, high = np.quantile(100 * averages, [0.025, 0.975])
    within = 0.03 * (high - low)
    assert row["interval"] == pytest.approx([low, high], abs=within)


def test_no_average_where_a_benchmark_is_missing() -> None:
    sizes = small_sizes(subjects=2)
    results = {
        "base": four_benchmarks(np.random.default_rng(1), 0.5, sizes),
        "x/tuned": four_benchmarks(np.random.default_rng(2), 0.6, sizes),
    }
    for name in ("arc", "hellaswag", "mmlu", "truthfulqa"):
        kept = {}
        for model, answers in results.items():
            kept[model] = [made for made in answers if not made.prefix.startswith(name)]
        found = compared(kept, flagged=set(), paper=True)
        assert "average" not in json.dumps(found).lower(), name

    # three benchmarks have a flagged question: there is an average, and none of the flagged
    flagged = {"arc/all/0", "hellaswag/all/3", "mmlu/subject_1/2"}
    found = compared(results, flagged=flagged)
    assert "average" in found["unflagged questions"]["base"]
    assert "average" not in found["flagged questions"]["base"]
    row = average_row(found, "x/tuned")
    assert row["points_flagged"] is None
    assert row["points_unflagged"] is not None
    assert "average (partial)" in table(found["text"], "unflagged questions")
    assert "average (partial)" not in table(found["text"], ", flagged questions")
    assert table(found["text"], "same questions")["average"][-2] == "-"


def full_sizes() -> dict[str, int]:
    """As many questions as the leaderboard has."""
    sizes = {"arc_challenge": 1172, "hellaswag": 10_042, "truthfulqa": 817}
    for number in range(57):
        sizes[f"mmlu_subject_{number}"] = 14_042 // 57
    sizes["mmlu_subject_0"] += 14_042 % 57
    return sizes


def described_average(results: list) -> dict:
    """What results.json says of the average of a model alone; its tables agree on "partial"."""
    found = compared({"base": results})
    average = found["tasks"]["average"]
    assert ("average (partial)" in table(found["text"], "Scores")) is average["partial"]
    assert ("Average (partial: " in found["text"]) is average["partial"]
    return average


def partial_tasks(results: list) -> list[str]:
    """The tasks of results.json that are called partial."""
    found = compared({"base": results})
    return [task for task, described in found["tasks"].items() if described["partial"]]


def test_the_average_is_partial_where_one_of_the_four_is() -> None:
    rng = np.random.default_rng(1)
    whole = four_benchmarks(rng, 0.5, full_sizes())
    assert described_average(whole) == {
        "metric": "mean",
        "questions": 1172 + 10_042 + 14_042 + 817,
        "partial": False,
        "flagged": None,
        "truncated": {"base": 0},
    }
    limited = [evaluate.TaskResult(**{**vars(made), "limit": 10_000}) for made in whole]
    assert described_average(limited)["partial"]
    official = {**full_sizes(), "hellaswag": 700}  # the official layout's
    short = four_benchmarks(rng, 0.5, official)
    assert described_average(short)["partial"]
    assert partial_tasks(whole) == []
    assert partial_tasks(short) == ["average", "hellaswag"]
    moved = full_sizes()
    moved["mmlu_subject_1"] += moved.pop("mmlu_subject_56")  # every question, of 56 subjects
    assert described_average(four_benchmarks(rng, 0.5, moved))["partial"]


def test_the_average_is_the_first_line_and_the_papers_stand_beside_it() -> None:
    rng = np.random.default_rng(0)
    results = {}
    for name, skill in (("base", 0.5), ("x/good", 0.9), ("x/bad", 0.1)):
        results[name] = four_benchmarks(rng, skill, small_sizes(3))
    found = compared(results, flagged=set(), paper=True)
    text = found["text"]
    assert text.startswith("Average (partial: 552 questions of 26,073) in percent, the mean of arc")

    shown = table(text, "Average")
    averages = [f"{by_hand(made):.2f}" for made in results.values()]
    papers = ["Platypus2-70B-instruct (paper)", "Stable-Platypus2-13B (paper)"]
    below_head = list(shown)[2:]
    assert below_head == ["base", "good", "bad", *papers]
    assert [shown[name][0] for name in below_head] == [*averages, "73.13", "63.96"]
    for name in ("base", *papers):
        assert shown[name][1:] == ["-", "-", "-", "-"]
    for name, label in (("x/good", "good"), ("x/bad", "bad")):
        row = average_row(found, name)
        low, high = row["interval"]
        points, percent, interval, verdict = shown[label][1:]
        assert points == f"{row['points']:+.2f}"
        assert percent == f"{row['percent']:+.2f}"
        assert interval == f"{low:+.2f} to {high:+.2f}"
        assert verdict == row["verdict"]

    for title in ("Scores in percent, all", "Scores in percent, unfl", "Table 5", "same questions"):
        first = list(table(text, title))[2]
        assert first.startswith("average"), title
    assert table(text, "Scores in percent, all")["average (partial)"][2:] == averages
    assert table(text, "same questions")["average"][3:6] == ["-", "-", "-"]
    assert found["comparisons"][0]["task"] == "average"
    assert next(iter(found["tasks"])) == "average"

    assert "(paper)" not in compared(results)["text"]
    alone = compared({"base": results["base"]})["text"]
    assert table(alone, "Average")["base"] == [averages[0], "-", "-", "-", "-"]


def test_a_task_with_the_name_of_another_is_refused(tmp_path) -> None:
    """Its scores would stand in the place of the four benchmarks' mean, or beside a benchmark's."""
    out = ["--out", tmp_path / "out"]
    task = named_task(tmp_path, "average")
    assert "mine.yaml" in refused("--model", BASE, "--tasks", "", "--task", task, *out)
    task = named_task(tmp_path, "arc")
    flags = ["--model", BASE, "--tasks", "arc", *DEMO, "--task", task, *out]
    assert "two tasks arc" in refused(*flags)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `adapter` and `merged`, runs of the base `a` and of base and adapter `b`."""
    from peft import LoraConfig

    folder = tmp_path_factory.mktemp("finished")
    model = save_adapter(folder / "adapter", LoraConfig(target_modules=["up_proj"]), BASE)
    model.merge_and_unload().save_pretrained(folder / "merged")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(BASE / name, folder / "merged")
    args = ["--model", BASE, *WORLD_TASK, "--limit", "40"]
    run(*args, "--out", folder / "a")
    run(*args, "--adapter", folder / "adapter", "--out", folder / "b")
    return folder


def test_compare_finished_folders(finished: Path, tmp_path) -> None:
    """Two runs beside each other; a base that is there twice is named once."""
    out = tmp_path / "c"
    run("--compare", finished / "a", finished / "b", "--out", out)
    found = read(out / "results.json")
    tuned = f"{BASE} + {finished / 'adapter'}"
    assert list(found["models"]) == [str(BASE), tuned]
    alone = read(finished / "b/results.json")["all questions"][tuned]
    assert found["all questions"][tuned] == alone
    assert found["all questions"][str(BASE)] != alone
    shown = table((out / "results.md").read_text(), "Scores")
    assert shown["task"][2:] == [BASE.name, f"{BASE.name} + adapter"]

    again = tmp_path / "again"
    run("--compare", finished / "a", finished / "b", finished / "a", "--out", again)
    assert read(again / "results.json")["models"] == found["models"]
    assert "name the folder that scored it" in refused("--compare", out, "--out", tmp_path / "f")


def test_an_unmerged_adapter_scores_as_the_merged_model(finished: Path, tmp_path) -> None:
    args = ["--model", finished / "merged", *WORLD_TASK, "--limit", "40"]
    run(*args, "--compare", finished / "b", "--out", tmp_path / "d")
    row = read(tmp_path / "d/results.json")["comparisons"][0]
    assert row["base"] == f"{BASE} + {finished / 'adapter'}"
    assert row["model"] == str(finished / "merged")
    assert row["flips"] == []


def test_one_model_scored_in_two_ways_is_there_twice(finished: Path, tmp_path) -> None:
    args = ["--model", BASE, *WORLD_TASK, "--limit", "40", "--dtype", "bfloat16"]
    run(*args, "--compare", finished / "a", "--out", tmp_path / "two")
    models = read(tmp_path / "two/results.json")["models"]
    assert list(models) == [str(BASE), f"{BASE} #2"]


def test_folders_that_cannot_be_compared_are_refused(finished: Path, tmp_path) -> None:
    out = ["--out", tmp_path / "f"]
    run("--model", BASE, *WORLD_TASK, "--limit", "30", "--out", tmp_path / "e")
    line = refused("--compare", finished / "a", tmp_path / "e", *out)
    assert "world" in line
    assert "--limit" in line
    assert "no folder of evaluate.py's" in refused("--compare", tmp_path, *out)

    edited = tmp_path / "edited"
    shutil.copytree(finished / "b", edited)
    with (edited / "results.json").open("a") as results:
        results.write("\n")
    line = refused("--compare", finished / "a", edited, *out)
    assert "results.json is not the file" in line
    (edited / "run.json").unlink()
    (edited / "results.json").write_text('{"models": {"x": {"folder": "y"}}}')
    assert "is not evaluate.py's" in refused("--compare", edited, *out)
    assert not (tmp_path / "f").exists()


def test_4_bit_weights_and_half_precision(tmp_path) -> None:
    pytest.importorskip("bitsandbytes")

    def info(*flags: str) -> dict:
        out = tmp_path / flags[0]
        run("--model", BASE, *WORLD_TASK, "--limit", "8", *flags, "--out", out)
        return read(out / "results.json")["models"][str(BASE)]

    quantised = info("--load-in-4bit")
    assert quantised["load_in_4bit"] is True
    assert quantised["path"] == "prefix"
    assert info("--dtype", "bfloat16")["dtype"] == "bfloat16"


# --- what goes wrong ------------------------------------------------------------------------------


def test_bad_flags_are_refused(tmp_path) -> None:
    out = tmp_path / "out"
    base = ["--model", BASE, "--out", out]
    assert_refused(run_script("evaluate", *base, "--tasks", "arcs"), "arcs")
    assert_refused(run_script("evaluate", "--out", out, cwd=tmp_path), "out/merged", "merge.py")
    assert "none.yaml" in refused(*base, "--task", "none.yaml")
    assert "no task" in refused(*base, "--tasks", "")
    assert "batch-size" in refused(*base, "--batch-size", "0")
    assert "is not a folder" in refused(*base, "--local", tmp_path / "nothing")
    if not torch.cuda.is_available():
        assert "cuda" in refused(*base, *WORLD_TASK, "--device", "cuda")
    assert "banana" in refused(*base, *WORLD_TASK, "--device", "banana")
    assert "pairs.jsonl" in refused(*base, *WORLD_TASK, "--contamination", tmp_path)
    assert "no_such_task" in refused(*base, "--tasks", "", "--task", "no_such_task")
    broken = tmp_path / "broken.yaml"
    broken.write_text("task: x\ndataset_path: [json\n")
    assert "broken.yaml" in refused(*base, "--tasks", "", "--task", broken)
    line = refused(*base, "--tasks", "arcs", "--local", tmp_path / "nothing")
    assert "arcs" in line
    assert "is not a folder" in line  # all at once
    assert not out.exists()


def test_models_that_cannot_be_told_apart_are_refused(tmp_path) -> None:
    good = make_model(tmp_path / "good")
    flags = [*WORLD_TASK, "--out", tmp_path / "out"]
    assert "there twice" in refused("--model", good, "--model", f"{good}/../good", *flags)
    assert "there twice" in refused("--model", good, "--model", good, *flags)
    (tmp_path / "x/a").mkdir(parents=True)
    shutil.copytree(good, tmp_path / "x/a/b")
    shutil.copytree(good, tmp_path / "x/a__b")
    alike = ["--model", tmp_path / "x/a/b", "--model", tmp_path / "x/a__b"]
    assert "results folder" in refused(*alike, *flags)


def test_bad_models_are_refused(tmp_path) -> None:
    """Also the second of two, before the first is scored; no hint at the hub for a local folder."""
    good = make_model(tmp_path / "good")
    flags = [*WORLD_TASK, "--out", tmp_path / "out"]

    folder = copy_of(good, "truncated")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-99])
    line = refused("--model", good, "--model", folder, *flags)
    assert "truncated/model.safetensors" in line
    assert "cut short" in line
    assert "HF_TOKEN" not in line

    folder = copy_of(good, "config")
    (folder / "config.json").write_text("{")
    assert "config.json" in refused("--model", good, "--model", folder, *flags)
    assert "config.json" in refused("--model", tmp_path, *flags)
    assert not (tmp_path / "out").exists()

    folder = copy_of(good, "shape")
    config = read(folder / "config.json")
    (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 48}))
    assert "shape" in refused("--model", folder, *flags)  # found when the model is loaded


@pytest.mark.parametrize("kind", ["Llama", "GPT2"])  # of GPT-2 the library makes an empty one
def test_a_model_without_its_tokenizer_is_refused(kind: str, tmp_path) -> None:
    folder = make_model(tmp_path / "model", kind)
    for file in folder.glob("tokenizer*"):
        file.unlink()
    line = refused("--model", BASE, "--model", folder, *WORLD_TASK, "--out", tmp_path / "out")
    assert f"--model {folder}" in line
    assert "tokenizer" in line
    assert "HF_TOKEN" not in line
    assert not (tmp_path / "out").exists()


def test_a_model_that_changed_or_is_unfinished_is_refused(tmp_path) -> None:
    folder = make_model(tmp_path / "model")
    args = ["--model", folder, *WORLD_TASK, "--out", tmp_path / "out"]
    listed = {"model.safetensors": {"sha256": "0" * 64}}
    (folder / "run.json").write_text(json.dumps({"step": "merge", "outputs": listed}))
    assert "changed after" in refused(*args)
    for text in ("{", '{"outputs": []}', '{"outputs": {"config.json": 1}}'):
        (folder / "run.json").write_text(text)  # edited by hand: it says nothing
        assert evaluate.check_model(str(folder))
    (folder / ".unfinished").write_text("python merge.py")
    assert "unfinished" in refused(*args)
    assert not (tmp_path / "out").exists()


def test_bad_adapters_are_refused(finished: Path, tmp_path) -> None:
    args = ["--model", BASE, *WORLD_TASK, "--out", tmp_path / "out", "--adapter"]
    assert "adapter_config.json" in refused(*args, BASE)
    assert "missing" in refused(*args, tmp_path / "none")

    folder = tmp_path / "cut"
    shutil.copytree(finished / "adapter", folder)
    weights = folder / "adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-9])
    assert "cut short" in refused(*args, folder)

    # PEFT would load the pickle: a safetensors file of another name must not hide that
    weights.rename(folder / "decoy.safetensors")
    torch.save({}, folder / "adapter_model.bin")
    line = refused(*args, folder)
    assert "adapter_model.bin is a pickle" in line
    (folder / "adapter_model.bin").unlink()
    assert "adapter_model.safetensors is missing" in refused(*args, folder)
    assert not (tmp_path / "out").exists()


def test_no_code_of_a_models_folder_is_run(tmp_path) -> None:
    """Even where `yes` answers every question that a library asks."""
    folder = make_model(tmp_path / "model")
    config = {"model_type": "own", "auto_map": {"AutoConfig": "own.Own"}}
    (folder / "config.json").write_text(json.dumps(config))
    code = f"open({str(tmp_path / 'ran')!r}, 'w')\nfrom transformers import PretrainedConfig\n"
    (folder / "own.py").write_text(code + "class Own(PretrainedConfig):\n    model_type = 'own'\n")
    args = ["--model", folder, *WORLD_TASK, "--out", tmp_path / "out"]
    command = [sys.executable, str(ROOT / "evaluate.py"), *map(str, args)]
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "modules")}
    done = subprocess.run(command, input="yes\n" * 9, capture_output=True, text=True, env=env)
    assert_refused(done, "config.json")
    assert not (tmp_path / "ran").exists()


def test_numbers_that_are_none_are_refused(tmp_path) -> None:
    from safetensors.torch import load_file, save_file

    model = make_model(tmp_path / "model")
    weights = load_file(model / "model.safetensors")
    weights["model.norm.weight"][3] = float("nan")
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    line = refused("--model", model, *WORLD_TASK, "--limit", "3", "--out", tmp_path / "out")
    assert "world, question" in line
    assert "nan" in line
    assert str(model) in line


def with_gone(row: dict, new: dict) -> dict:
    """A row with other values; "gone" takes a column away."""
    return {key: value for key, value in {**row, **new}.items() if value != "gone"}


def test_bad_benchmark_files_are_refused(tmp_path) -> None:
    """The line names benchmark, row and what is wrong with it."""
    local = tmp_path / "data"

    def fresh(name: str) -> list[object]:
        """A whole copy of a benchmark, and the flags that score it."""
        shutil.rmtree(local, ignore_errors=True)
        shutil.copytree(DATA / name, local / name)
        return ["--model", BASE, "--tasks", name, "--local", local, "--out", tmp_path / "out"]

    def line(name: str, file: str, row: int | slice, **new) -> str:
        """What is said of a file with other values in a row, or with a part of its rows."""
        flags = fresh(name)
        path = local / name / file
        rows = list(common.read_jsonl(path, {}))
        if isinstance(row, slice):
            rows = rows[row]
        else:
            rows[row] = with_gone(rows[row], new)
        text = json.dumps(rows) if path.suffix == ".json" else common.to_jsonl(rows)
        path.write_text(text)
        return refused(*flags)

    arc = ("arc", "ARC-Challenge-test.jsonl")
    train = ("arc", "ARC-Challenge-train.jsonl")
    swag = ("hellaswag", "hellaswag_1000_original_format.jsonl")
    truth = ("truthfulqa", "mc_task.json")
    assert "arc/all has no questions" in line(*arc, slice(0))
    assert "9 few-shot rows, 25 needed" in line(*train, slice(9))
    assert "arc/all: scored row 0" in line(*arc, 0, answerKey="Z")
    one_choice = {"text": ["a"], "label": "gone"}
    assert "arc/all: scored row 0" in line(*arc, 0, choices=one_choice)
    assert "'answerKey'" in line(*arc, 0, answerKey="gone")
    found = line(*swag, -1, activity_label="gone")
    assert "hellaswag/all: scored row" in found
    assert "'activity_label'" in found
    assert "few-shot row 0" in line(*swag, 0, label=7)
    assert "scored row" in line(*swag, -1, endings=[])
    found = line(*truth, 0, mc2_targets={})
    assert "truthfulqa/all: scored row 0" in found
    assert "mc2_targets" in found
    assert "mc1_targets" in line(*truth, 0, mc1_targets={})
    assert "mc2_targets" in line(*truth, 0, mc2_targets={"yes": 1})

    flags = fresh("mmlu")
    next((local / "mmlu/dev").iterdir()).unlink()
    assert "missing" in refused(*flags)
    assert not (tmp_path / "out").exists()


def test_a_contamination_folder_of_other_benchmarks_is_named(tmp_path, capsys) -> None:
    pair = {"pair_id": "p", "test_id": "arc/all/3"}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(pair) + "\n")
    args = ["--model", BASE, *WORLD_TASK, "--limit", "4", "--contamination", tmp_path]
    run(*args, "--out", tmp_path / "out")
    said = capsys.readouterr().err
    assert "warning" in said
    assert "world" in said
    assert "arc" in said

"""Holds: a run gives the harness's numbers, in any chunks and by any number of processes; a stopped
run goes on to the same numbers and takes nothing of another model; comparisons are what scipy and a
hand compute; bad input is one line. What shared prefixes give is test_prefix_lm.py's."""

import itertools
import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
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
WORLD_TASK = ["--tasks", "", "--task", str(ROOT / "demo/world.yaml")]


@pytest.fixture(autouse=True)
def restored_path():
    """import_harness() takes our folder off the path, which other files' tests need."""
    before = [*sys.path]
    yield
    sys.path[:] = before


# --- models and runs ------------------------------------------------------------------------------


def load(folder: Path, chunks: Path, fingerprint: str = "", **settings):
    """A model whose finished chunks are files of this folder."""
    lm = load_prefix_lm(folder, **settings)
    lm.store = evaluate.ChunkStore(folder=chunks, fingerprint=fingerprint, rank=0, world_size=1)
    return lm


def run(*args: object) -> None:
    """The script in this process, as its own command: its imports are made once."""
    before, sys.argv = sys.argv, ["evaluate.py"]
    try:
        evaluate.main([str(arg) for arg in args])
    finally:
        sys.argv = before


def refused(*args: object) -> str:
    """The one line that a user reads."""
    with pytest.raises(common.UserError) as error:
        run(*args)
    assert "\n" not in str(error.value)
    return str(error.value)


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
        assert_close(lm._loglikelihood_tokens(requests), stock_answers(lm, requests), 1e-4)
    assert lm.truncated and len(list((tmp_path / "chunks").iterdir())) > 20


def test_chunks_repeat_little(tmp_path, monkeypatch) -> None:
    """Counted by the model itself, on real prompts in chunks: at most 1.01 x the trie's nodes."""
    lm = load(BASE, tmp_path / "chunks")
    monkeypatch.setattr(evaluate, "CHUNK_TOKENS", 2000)
    asked = [r for name in ("arc", "mmlu") for r in harness_requests(name, ROOT / "demo/data")]
    nodes = set()
    for request in asked:
        context, answer = lm._encode_pair(*request.args)
        ids = tuple([*context, *answer][-lm.max_length - 1 : -1])
        nodes |= {hash(ids[:size]) for size in range(1, len(ids) + 1)}
    seen = []
    lm.model.get_input_embeddings().register_forward_hook(
        lambda m, ids, out: seen.append(ids[0].numel())
    )
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
    first.write_bytes(first.read_bytes()[:-9])
    second.write_text("[]")
    third.write_text("null")
    assert others and lm._loglikelihood_tokens(requests) == theirs


def test_a_model_that_falls_back_says_so_and_is_marked(tmp_path, capsys) -> None:
    folder = make_model(tmp_path / "model", "Mistral", {"sliding_window": 8})
    run("--model", folder, *WORLD_TASK, "--limit", "4", "--out", tmp_path / "out")
    assert "a sliding window" in capsys.readouterr().err
    models = json.loads((tmp_path / "out/results.json").read_text())["models"]
    assert models[str(folder)]["path"] == "stock"


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


def test_a_task_with_a_hugging_face_metric_runs(tmp_path) -> None:
    """It generates text; the metric is loaded by the package that our script's name hides."""
    task = make_metric_task(tmp_path)
    args = ["--model", BASE, "--tasks", "", "--task", task, "--limit", "6"]
    done = run_script("evaluate", *args, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    file = tmp_path / "out" / evaluate.folder_name(str(BASE)) / "metric.json"
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


def harness_scores(folder: Path, local: Path, subjects: list[str], limit: int) -> dict:
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
            several = min(limit, 20) if name.startswith("mmlu_") else limit
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
    """A whole run of the script against lm_eval alone, on all four benchmarks."""
    out, local = tmp_path / "eval", ROOT / "demo/data"
    subjects = [p.name.removesuffix("_test.csv") for p in (local / "mmlu/test").iterdir()]
    run("--model", BASE, "--local", local, "--dtype", "float32", "--limit", 3, "--out", out)
    theirs = harness_scores(BASE, local, subjects, 3)
    assert len(theirs) == 4 + len(subjects)
    assert_equal_scores(out, BASE, theirs)
    assert "(partial)" in (out / "results.md").read_text()
    scores = {name: found["results"][name] for name, found in theirs.items()}
    mmlu = sum(scores[f"mmlu_{subject}"]["acc,none"] for subject in subjects) / len(subjects)
    normed = [scores[name]["acc_norm,none"] for name in ("arc_challenge", "hellaswag")]
    average = 100 * (sum(normed) + mmlu + scores["truthfulqa_mc2"]["acc,none"]) / 4
    ours = json.loads((out / "results.json").read_text())["all questions"][str(BASE)]["average"]
    assert ours["mean"] == pytest.approx(average, abs=1e-3)
    assert json.loads((out / "run.json").read_text())["partial"] is True


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
        run(*flags, "--out", tmp_path / f"eval{number}")
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


# --- going on, several processes ------------------------------------------------------------------

KILLS = """
import json, os, random, signal, sys, time
from pathlib import Path
from conftest import load_evaluate
evaluate = load_evaluate()
evaluate.import_harness()
import datasets, lm_eval, matplotlib.figure, peft, transformers  # once, for every child
out, chunk, *args = sys.argv[1:]
evaluate.CHUNK_TOKENS = int(chunk)
sys.argv = ["evaluate.py"]

def child():
    pid = os.fork()
    if pid == 0:
        sys.stdout = sys.stderr = open(os.devnull, "w")
        try:
            evaluate.main([*args, "--out", out])
        except BaseException as error:
            Path(out + ".error").write_text(repr(error))
            os._exit(1)
        os._exit(0)
    return pid

def finish(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

began = time.monotonic()
assert finish(child()) == 0, Path(out + ".error").read_text()
whole = time.monotonic() - began
os.rename(out, out + ".uninterrupted")
rng, kept = random.Random(0), []
for trial in range(10):
    pid = child()
    time.sleep(whole * rng.uniform(0.3, 1) / (1 + trial / 6))
    os.kill(pid, signal.SIGKILL)
    finish(pid)
    if Path(out, "run.json").exists() and not Path(out, ".unfinished").exists():
        os.rename(out, f"{out}.{trial}")
        kept.append("finished")
    else:
        kept.append(len(list(evaluate.chunk_folder(Path(out)).glob("*.json"))))
assert finish(child()) == 0, Path(out + ".error").read_text()
print(json.dumps(kept))
"""


def run_code(code: str, *args: object) -> subprocess.CompletedProcess:
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT / "tests")}
    command = [sys.executable, "-c", code, *map(str, args)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=env, timeout=600)


def numbers(out: Path) -> dict:
    """All that a run found, without what a clock decides."""
    found = {"results": json.loads((out / "results.json").read_text())}
    for path in sorted(out.glob("*/*.json")):
        found[path.name] = json.loads(path.read_text())
        found[path.name].pop("benchmark_seconds")
    return found


@pytest.mark.slow
def test_killed_at_ten_moments_the_numbers_are_the_same(tmp_path) -> None:
    out = tmp_path / "eval"
    args = ["--model", BASE, "--local", ROOT / "demo/data", "--task", ROOT / "demo/world.yaml"]
    done = run_code(KILLS, out, 1500, *args)
    assert done.returncode == 0, done.stderr
    kept = json.loads(done.stdout)
    counts = [count for count in kept if count != "finished"]
    assert any(counts) and counts == sorted(counts) or "finished" in kept, kept  # it went on
    assert numbers(out) == numbers(tmp_path / "eval.uninterrupted")
    assert not evaluate.chunk_folder(out).exists()
    names = {path.name for path in out.rglob("*")}
    assert not [name for name in names if name.startswith(".")]
    outputs = json.loads((out / "run.json").read_text())["outputs"]
    assert {Path(name).name for name in outputs} == {p.name for p in out.rglob("*.*")} - {
        "run.json"
    }


def test_nothing_is_scored_twice_and_nothing_of_another_model_is_taken(tmp_path) -> None:
    requests = random_requests(random.Random(3), longest=40)
    first = load(make_model(tmp_path / "a"), tmp_path / "chunks", "a")
    theirs = first._loglikelihood_tokens(requests)
    again = load(tmp_path / "a", tmp_path / "chunks", "a")
    again.scorer = None  # it must not be needed
    assert again._loglikelihood_tokens(requests) == theirs
    other = load(make_model(tmp_path / "b", scale=2), tmp_path / "chunks", "b")
    assert other._loglikelihood_tokens(requests) != theirs
    assert_close(other._loglikelihood_tokens(requests), stock_answers(other, requests), 1e-4)


def test_what_tells_models_apart(tmp_path) -> None:
    """Weights, tokenizer, dtype, quantisation, adapter and the way of the forward pass."""
    model = make_model(tmp_path / "model")

    def key(*flags: str) -> str:
        args = evaluate.parse_args(["--model", str(model), "--tasks", "arc", *flags])
        vars(args).update(evaluate.take_rank())
        files = evaluate.check_models(args)[str(model)]
        return evaluate.load_model(str(model), files, args).store.fingerprint

    keys = [key(), key("--dtype", "bfloat16"), key("--stock"), key("--stock", "--batch-size", "2")]
    file = model / "tokenizer_config.json"
    file.write_text(file.read_text() + " ")
    keys.append(key())
    make_model(tmp_path / "model", scale=7)
    keys.append(key())
    assert len(set(keys)) == len(keys) and key() == key() == keys[-1]


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
    args = ["--model", BASE, "--local", ROOT / "demo/data", "--task", ROOT / "demo/world.yaml"]
    script = tmp_path / "in_small_chunks.py"
    script.write_text(IN_SMALL_CHUNKS)
    one, two = tmp_path / "one", tmp_path / "two"
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", 2, "--master-port", 29577, "--"]
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT / "tests")}
    env["OMP_NUM_THREADS"] = "1"  # torchrun's own choice; other threads sum in another order
    for start, out in ([], one), (torchrun, two):
        command = [str(part) for part in [sys.executable, *start, script, *args, "--out", out]]
        done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=300)
        assert done.returncode == 0, done.stderr
    assert numbers(one) == numbers(two)
    by_rank = [done.stderr.count(f"chunk by {rank}") for rank in (0, 1)]
    assert min(by_rank) > 3 and abs(by_rank[0] - by_rank[1]) <= 6, by_rank  # 6 calls of _tokens
    assert done.stdout.count("wrote") == 1


def test_resume(tmp_path, capsys) -> None:
    args = ["--model", BASE, *WORLD_TASK, "--limit", "4", "--out", tmp_path / "out"]
    assert "leave the flag out" in refused(*args, "--resume")
    assert "leave the flag out" in refused("--resume", "--out", tmp_path / "none")
    run(*args)
    assert "--overwrite" in refused(*args)
    run(*args, "--resume")
    assert "nothing to resume" in capsys.readouterr().out
    run(*args, "--overwrite")


def test_progress_tells_rate_and_time_left(monkeypatch, capsys) -> None:
    """A line at most every 10 s where there is no terminal; one process of several speaks."""
    said = []
    for quiet, step in ((False, 6), (True, 6), (False, 0)):  # the last: no time goes by
        clock = itertools.count(0, step)
        monkeypatch.setattr(evaluate.time, "monotonic", lambda clock=clock: next(clock))
        progress = evaluate.Progress(label="m on arc", tokens=400, questions=10, quiet=quiet)
        for _ in range(4):
            progress.advance(50)
        progress.close()
        said.append(capsys.readouterr().err.splitlines())
    assert said[0] == [
        "m on arc: 25%, 8 tokens/s, 0.2 questions/s, ETA 36 s",
        "m on arc: 50%, 8 tokens/s, 0.2 questions/s, ETA 24 s",
    ]
    assert not said[1] and not said[2]


def test_a_terminal_gets_our_bars_alone(tmp_path) -> None:
    """The harness would draw one without a name for each subject, datasets one for each map."""
    flags = ["--tasks", "mmlu,hellaswag", *DEMO, "--out", tmp_path / "out"]
    code, shown = run_on_terminal("evaluate", "--model", BASE, *flags)
    assert code == 0 and "questions/s" in shown
    bars = [line for line in re.split(r"[\r\n]+", shown) if "%|" in line]
    labels = ("Loading weights", "base_model on mmlu", "base_model on hellaswag")
    assert all(any(label in line for label in labels) for line in bars), bars


# --- comparison -----------------------------------------------------------------------------------


def result(task: str, prefix: str, acc: list[float], metric: str = "acc", first: int = 0) -> dict:
    questions = [{"test_id": f"{prefix}/{first + i}", metric: v} for i, v in enumerate(acc)]
    about = {"task": task, "prefix": prefix, "limit": None, "truncated": 0, "harness": {}}
    return {**about, "prompts_sha256": task, "questions": questions}


@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_a_whole_run_with_answers_too_unlikely_for_the_harness(tmp_path) -> None:
    model, out = make_model(tmp_path / "model", scale=99), tmp_path / "eval"
    flags = ["--local", ROOT / "demo/data", "--tasks", "truthfulqa", "--out", out]
    run("--model", model, *flags, "--dtype", "float32")
    found = json.loads((out / evaluate.folder_name(str(model)) / "truthfulqa_mc2.json").read_text())
    likeliest = [max(question["log_likelihoods"]) for question in found["questions"]]
    assert min(likeliest) < -746 and found["harness"] == {}  # exp() gives 0, the harness nan
    assert all(0 <= question["acc"] <= 1 for question in found["questions"])


def test_mc2_of_answers_too_unlikely_for_the_harness() -> None:
    from lm_eval.tasks.truthfulqa.utils import process_results_mc2

    def share(values: list[float]) -> float:
        doc = {"mc2_targets": {"labels": [1, 0, 1, 0]}}
        with np.errstate(invalid="ignore"):
            harness = process_results_mc2(doc, [(value, False) for value in values])["acc"]
        sample = {"doc_id": 3, "doc": doc, "target": 0, "metrics": ["acc"], "filter": "none"}
        sample |= {"filtered_resps": [(value, False) for value in values], "acc": harness}
        found = evaluate.to_questions("truthfulqa/all", [sample])[0]["acc"]
        assert math.isnan(harness) or found == harness
        return found

    rng = np.random.default_rng(0)
    for _ in range(100):
        values = rng.uniform(-300, -1, 4).tolist()
        assert abs(evaluate.true_share(values, [1, 0, 1, 0]) - share(values)) < 1e-12
        assert abs(share([value - 1000 for value in values]) - share(values)) < 1e-9
    sample = {"doc_id": 3, "doc": {}, "target": 0, "metrics": ["f"], "filter": "none"}
    sample |= {"filtered_resps": [(0.0, False)], "f": math.nan}
    with pytest.raises(common.UserError, match="x/all, question 3: its f is no number"):
        evaluate.to_questions("x/all", [sample])


def test_means_and_chosen_questions() -> None:
    results = [
        result("mmlu_anatomy", "mmlu/anatomy", [1, 0]),
        result("mmlu_virology", "mmlu/virology", [1, 1, 1, 0, 1, 0, 1, 1]),
        result("truthfulqa_mc1", "truthfulqa/all", [1, 0]),
        result("truthfulqa_mc2", "truthfulqa/all", [0.5, 0.25]),
    ]
    everything = evaluate.summarise(results)
    assert everything["mmlu"] == {
        "questions": 10,
        "tasks": 2,
        "acc": pytest.approx(100 * (0.5 + 0.75) / 2),
        "acc_weighted": pytest.approx(70),
    }
    assert everything["mmlu/virology"] == {"questions": 8, "tasks": 1, "acc": 75}
    assert everything["truthfulqa"] == {"questions": 2, "tasks": 1, "mc1": 50, "mc2": 37.5}
    leaked = {"mmlu/anatomy/0", "mmlu/anatomy/1", "truthfulqa/all/0"}
    clean = evaluate.summarise(results, lambda test_id: test_id not in leaked)
    assert clean["mmlu"]["acc"] == 75 and clean["mmlu"]["tasks"] == 1
    assert clean["truthfulqa"] == {"questions": 1, "tasks": 1, "mc1": 0, "mc2": 25}
    assert "mmlu/anatomy" not in clean


def write_both(
    tmp_path: Path, base: list, *tuned: list, flagged=None, paper=False, names=("base", "x/tuned")
) -> dict:
    """results.json of made-up models, and results.md's text under "text"."""
    runs = {name: {"about": {"folder": name, "adapter": None}, "results": results}
            for name, results in zip(names, (base, *tuned), strict=True)}  # fmt: skip
    args = evaluate.parse_args(["--model", "x", "--tasks", "arc", *["--paper"] * paper])
    args.out = tmp_path
    text = evaluate.write_results(args, runs, flagged)
    return {**json.loads((tmp_path / "results.json").read_text()), "text": text}


def table(text: str, title: str) -> dict[str, list[str]]:
    """The rows of the Markdown table below the line that holds `title`, by first cell."""
    lines = text[text.index(title) :].split("\n\n")[1].splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {row[0]: row[1:] for row in rows}


def test_change_in_percent_is_what_a_hand_computes(tmp_path) -> None:
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
    found = write_both(tmp_path, base, tuned, paper=True)
    five, seven = table(found["text"], "Table 5"), table(found["text"], "Table 7")
    assert five["task"][:2] == ["tuned", "Camel-Platypus2-13B"] and len(five["task"]) == 6
    assert five["arc"] == ["+50.00 (=)", "-0.14", "+1.10", "+1.08", "+1.10", "+4.12"]
    assert five["hellaswag"] == ["-", "-0.06", "+0.02", "+0.06", "-0.14", "-0.24"]
    assert five["mmlu"] == ["+50.00 (=)", *"-----"]
    assert five["truthfulqa"][:2] == ["+2.50 (=)", "+4.33"] and five["zero"][0] == "-"
    assert seven["anatomy"][:2] == ["-50.00 (=)", "-6.67"]
    assert seven["virology"][0] in ("+300.00", "+300.00 (=)") and len(seven) == 2 + 57
    points = {row["task"]: row["points"] for row in found["comparisons"]}
    assert points["mmlu"] == pytest.approx(17.5) and points["truthfulqa"] == pytest.approx(1)
    arc = next(row for row in found["comparisons"] if row["task"] == "arc")
    assert arc["flips"] == [{"test_id": "arc/all/2", "base": 0, "model": 1}]
    assert (arc["gained"], arc["lost"], arc["p"], arc["verdict"]) == (1, 0, 1.0, evaluate.SAME)
    assert "not distinguishable" in found["text"]
    svg = (tmp_path / "change.svg").read_text()
    assert svg.lstrip().startswith("<?xml") and "<svg" in svg


def test_tables_tell_models_apart(tmp_path, monkeypatch) -> None:
    """Two folders of one name have their whole paths everywhere; "." has its folder's name."""
    monkeypatch.chdir(tmp_path)
    wrong, right = ([result("arc_challenge", "arc/all", [x, 0, 1], "acc_norm")] for x in (0, 1))
    names = ("base", "a/merged", "b/merged")
    text = write_both(tmp_path, wrong, right, wrong, names=names)["text"]
    assert table(text, "Scores")["task"] == ["metric", "questions", *names]
    assert table(text, "Table 5")["task"] == ["a/merged", "b/merged"]
    assert "| a/merged |" in text and "| b/merged |" in text
    svg = (tmp_path / "change.svg").read_text()
    assert "a/merged (grey" in svg and "b/merged (grey" in svg and "over base in" in svg
    text = write_both(tmp_path, wrong, right, names=("base", "."))["text"]
    assert table(text, "Table 5")["task"] == [tmp_path.name]


@pytest.mark.skipif(not REAL_DATA.is_dir(), reason="the paper's tables are not there")
def test_the_papers_columns_are_its_tables() -> None:
    import csv

    def read(path: Path) -> list[list[str]]:
        return list(csv.reader(path.open(encoding="utf-8", newline="")))

    folder = REAL_DATA.parent / "paper"
    rows = (
        read(folder / "table5_percent_change.csv")
        + read(folder / "table7_mmlu_percent_change.csv")[1:]
    )
    assert [row[1:] for row in read(evaluate.PAPER)] == [row[1:] for row in rows]
    tasks = [row[0].removeprefix("mmlu/") for row in read(evaluate.PAPER)][1:]
    other = {"arc": "arc_challenge", "truthfulqa": "truthfulqa_mc"}
    assert [other.get(task, task) for task in tasks] == [row[0] for row in rows][1:]


def test_tests_are_scipys() -> None:
    from scipy import stats

    for gained, lost in itertools.product((0, 1, 2, 5, 17, 400), repeat=2):
        expected = stats.binomtest(gained, gained + lost).pvalue if gained + lost else 1.0
        assert evaluate.mcnemar(gained, lost) == pytest.approx(expected, rel=1e-9)
    rng = np.random.default_rng(1)
    for values in (rng.choice([-1, 0, 0, 0, 1], 300), rng.normal(0.2, 1, 200)):
        theirs = stats.bootstrap((values,), np.mean, method="percentile", n_resamples=20_000, rng=2)
        low, high = evaluate.bootstrap([[dict(enumerate(values / 100))]])
        width = high - low
        assert abs(low - theirs.confidence_interval.low) < 0.04 * width
        assert abs(high - theirs.confidence_interval.high) < 0.04 * width
    groups = [rng.normal(0, 1, 40), rng.normal(1, 3, 10)]  # means of groups weigh the same

    def mean_of_means(a, b, axis):
        return (a.mean(axis) + b.mean(axis)) / 2

    theirs = stats.bootstrap(
        groups, mean_of_means, method="percentile", n_resamples=20_000, vectorized=True, rng=3
    ).confidence_interval
    low, high = evaluate.bootstrap([[dict(enumerate(group / 100)) for group in groups]])
    assert abs(low - theirs.low) + abs(high - theirs.high) < 0.06 * (high - low)


def test_verdicts_and_what_only_flagged_questions_gain(tmp_path) -> None:
    """30 leaked questions are all learnt, 70 others stay as they are: the split tells."""
    base = [result("arc_challenge", "arc/all", [0] * 30 + [1, 0] * 35, "acc_norm")]
    tuned = [result("arc_challenge", "arc/all", [1] * 30 + [1, 0] * 35, "acc_norm")]
    flagged = {f"arc/all/{i}" for i in range(30)} | {"mmlu/anatomy/3"}
    found = write_both(tmp_path, base, tuned, flagged=flagged)
    row = found["comparisons"][0]
    assert row["verdict"] == "better" and row["p"] == 2 * 0.5**30 and row["gained"] == 30
    assert (row["points"], row["points_unflagged"], row["points_flagged"]) == (30, 0, 100)
    assert row["interval"][0] > 20 and row["interval"][1] < 40
    assert found["tasks"]["arc"]["flagged"] == 30
    assert found["unflagged questions"]["x/tuned"]["arc"] == {
        "questions": 70,
        "tasks": 1,
        "acc_norm": 50,
    }
    assert table(found["text"], "unflagged questions")["arc"][1:] == [
        "70",
        "50.00 (+15.00)",
        "50.00 (-15.00)",
    ]
    tests = table(found["text"], "same questions")["arc"]
    assert tests[-3:] == ["+0.00", "+100.00", "better"] and "worse" not in found["text"]
    worse = write_both(tmp_path, tuned, base, flagged=set())
    assert worse["comparisons"][0]["verdict"] == "worse"
    assert worse["comparisons"][0]["points_flagged"] is None
    assert worse["tasks"]["arc"]["flagged"] == 0


LEADERBOARD = {  # the metric of the four benchmarks' harness tasks that the average takes
    "arc_challenge": "acc_norm", "hellaswag": "acc_norm", "mmlu": "acc", "truthfulqa_mc2": "acc",
}  # fmt: skip


def four_benchmarks(rng: np.random.Generator, skill: float, sizes: dict[str, int]) -> list[dict]:
    """Made-up results, with decoys: ARC's and HellaSwag's acc, mc1. `sizes`: of each task."""
    results = []
    for task, size in sizes.items():
        benchmark = "arc" if task == "arc_challenge" else task
        prefix = f"{benchmark}/all"
        if task.startswith("mmlu_"):
            prefix = task.replace("_", "/", 1)
        right = (rng.random(size) < skill).astype(float).tolist()
        if task in ("arc_challenge", "hellaswag"):
            made = result(task, prefix, [0.0] * size)
            for question, value in zip(made["questions"], right, strict=True):
                question["acc_norm"] = value
        elif task == "truthfulqa":
            results.append(result("truthfulqa_mc1", prefix, [1.0] * size))
            made = result("truthfulqa_mc2", prefix, rng.beta(2, 2 / skill, size).tolist())
        else:
            made = result(task, prefix, right)
        results.append(made)
    return results


def small_sizes(subjects: int = 57) -> dict[str, int]:
    """Of few questions each, and no two benchmarks or subjects alike."""
    sizes = {"arc_challenge": 90, "hellaswag": 400, "truthfulqa": 50}
    for number in range(subjects):
        sizes[f"mmlu_subject_{number}"] = 3 + number
    return sizes


def by_hand(results: list[dict], chosen=lambda test_id: True) -> float | None:
    """The average by its definition; None where a benchmark has no such question."""
    benchmark_means = []
    for name, metric in LEADERBOARD.items():
        subject_means = []
        for made in results:
            if made["task"] != name and not made["task"].startswith(f"{name}_"):
                continue
            values = []
            for question in made["questions"]:
                if chosen(question["test_id"]):
                    values.append(question[metric])
            if values:
                subject_means.append(sum(values) / len(values))
        if not subject_means:
            return None
        benchmark_means.append(sum(subject_means) / len(subject_means))
    return 100 * sum(benchmark_means) / 4


def average_row(found: dict, model: str) -> dict:
    """The average's comparison of a model, which is its first."""
    row = next(row for row in found["comparisons"] if row["model"] == model)
    assert row["task"] == "average"
    return row


def test_the_average_is_what_loops_over_the_questions_compute(tmp_path) -> None:
    """Of three models, in their order; also without and on the flagged questions."""
    rng = np.random.default_rng(5)
    results = {name: four_benchmarks(rng, skill, small_sizes())
               for name, skill in {"base": 0.4, "good": 0.7, "bad": 0.2}.items()}  # fmt: skip
    ids = [q["test_id"] for made in results["base"] for q in made["questions"]]
    flagged = {test_id for test_id in ids if rng.random() < 0.3}
    flagged |= {f"mmlu/subject_4/{number}" for number in range(7)}  # a subject without others
    found = write_both(tmp_path, *results.values(), flagged=flagged, names=tuple(results))

    parts = {
        "all questions": lambda test_id: True,
        "unflagged questions": lambda test_id: test_id not in flagged,
        "flagged questions": lambda test_id: test_id in flagged,
    }
    expected: dict = {}
    for part, chosen in parts.items():
        assert list(found[part]) == list(results)
        for name, made in results.items():
            expected[part, name] = by_hand(made, chosen)
            ours = found[part][name]["average"]
            assert ours["mean"] == pytest.approx(expected[part, name], abs=1e-9)
            assert ours["questions"] == len({*filter(chosen, ids)})
            assert next(iter(found[part][name])) == "average"

    for name in ("good", "bad"):
        row = average_row(found, name)
        gains = {part: expected[part, name] - expected[part, "base"] for part in parts}
        assert row["base_score"] == pytest.approx(expected["all questions", "base"])
        assert row["points"] == pytest.approx(gains["all questions"])
        assert row["percent"] == pytest.approx(100 * row["points"] / row["base_score"])
        assert (row["metric"], row["questions"]) == ("mean", len({*ids}))
        assert (row["gained"], row["lost"], row["p"], row["flips"]) == (None, None, None, [])
        assert row["points_unflagged"] == pytest.approx(gains["unflagged questions"])
        assert row["points_flagged"] == pytest.approx(gains["flagged questions"])
    assert average_row(found, "good")["verdict"] == "better"
    assert average_row(found, "bad")["verdict"] == "worse"


def test_the_averages_interval_is_a_direct_bootstraps(tmp_path) -> None:
    """Questions drawn one by one, by numpy, within each benchmark and each subject of MMLU."""
    sizes = small_sizes()
    before = four_benchmarks(np.random.default_rng(1), 0.5, sizes)
    after = four_benchmarks(np.random.default_rng(2), 0.55, sizes)
    row = average_row(write_both(tmp_path, before, after), "x/tuned")

    rng = np.random.default_rng(3)
    draws = 20_000
    means: dict[str, list] = {name: [] for name in LEADERBOARD}
    for old, new in zip(before, after, strict=True):
        for name, metric in LEADERBOARD.items():
            if old["task"] != name and not old["task"].startswith(f"{name}_"):
                continue
            pairs = zip(old["questions"], new["questions"], strict=True)
            gains = np.array([b[metric] - a[metric] for a, b in pairs])
            drawn = rng.integers(0, len(gains), size=(draws, len(gains)))
            means[name].append(gains[drawn].mean(axis=1))
    assert [len(groups) for groups in means.values()] == [1, 1, 57, 1]
    total = sum(sum(groups) / len(groups) for groups in means.values()) / 4
    low, high = np.quantile(100 * total, [0.025, 0.975])
    assert abs(row["interval"][0] - low) < 0.03 * (high - low)
    assert abs(row["interval"][1] - high) < 0.03 * (high - low)


def test_no_average_where_a_benchmark_is_missing(tmp_path) -> None:
    sizes = small_sizes(subjects=2)
    base = four_benchmarks(np.random.default_rng(1), 0.5, sizes)
    tuned = four_benchmarks(np.random.default_rng(2), 0.6, sizes)
    for name in ("arc", "hellaswag", "mmlu", "truthfulqa"):
        kept = []
        for results in (base, tuned):
            kept.append([made for made in results if not made["prefix"].startswith(name)])
        found = write_both(tmp_path, *kept, flagged=set(), paper=True)
        assert "average" not in json.dumps(found).lower(), name

    # three benchmarks have a flagged question: there is an average, and none of the flagged
    flagged = {"arc/all/0", "hellaswag/all/3", "mmlu/subject_1/2"}
    found = write_both(tmp_path, base, tuned, flagged=flagged)
    assert "average" in found["unflagged questions"]["base"]
    assert "average" not in found["flagged questions"]["base"]
    row = average_row(found, "x/tuned")
    assert row["points_flagged"] is None and row["points_unflagged"] is not None
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


def test_the_average_is_partial_where_one_of_the_four_is(tmp_path) -> None:
    def described(sizes: dict[str, int], limited: str = "") -> dict:
        results = four_benchmarks(np.random.default_rng(1), 0.5, sizes)
        for made in results:
            if made["task"] == limited:
                made["limit"] = 10_000
        found = write_both(tmp_path, results, names=["base"])
        partial = found["tasks"]["average"]["partial"]
        assert ("average (partial)" in table(found["text"], "Scores")) is partial
        assert ("Average (partial: " in found["text"]) is partial
        return found["tasks"]["average"]

    whole = described(full_sizes())
    assert whole == {"metric": "mean", "questions": 1172 + 10_042 + 14_042 + 817, "partial": False,
                     "flagged": None, "truncated": {"base": 0}}  # fmt: skip
    assert described(full_sizes(), limited="hellaswag")["partial"]
    assert described({**full_sizes(), "hellaswag": 700})["partial"]  # the official layout's
    moved = full_sizes()
    moved["mmlu_subject_1"] += moved.pop("mmlu_subject_56")  # every question, of 56 subjects
    assert described(moved)["partial"]


def test_the_average_is_the_first_line_and_the_papers_stand_beside_it(tmp_path) -> None:
    sizes = small_sizes(subjects=3)
    names = ("base", "x/good", "x/bad")
    results = [four_benchmarks(np.random.default_rng(n), skill, sizes)
               for n, skill in enumerate((0.5, 0.9, 0.1))]  # fmt: skip
    found = write_both(tmp_path, *results, flagged=set(), paper=True, names=names)
    text = found["text"]
    assert text.startswith("Average (partial: 552 questions of 26,073) in percent, the mean of arc")

    shown = table(text, "Average")
    averages = [f"{by_hand(made):.2f}" for made in results]
    papers = ["Platypus2-70B-instruct (paper)", "Stable-Platypus2-13B (paper)"]
    assert list(shown)[2:] == ["base", "good", "bad", *papers]  # below the head and its rule
    assert [cells[0] for cells in shown.values()][2:] == [*averages, "73.13", "63.96"]
    assert shown["base"][1:] == shown[papers[0]][1:] == shown[papers[1]][1:] == [*"----"]
    for name, label in (("x/good", "good"), ("x/bad", "bad")):
        row = average_row(found, name)
        low, high = row["interval"]
        change = [f"{row['points']:+.2f}", f"{row['percent']:+.2f}"]
        assert shown[label][1:] == [*change, f"{low:+.2f} to {high:+.2f}", row["verdict"]]

    for title in ("Scores in percent, all", "Scores in percent, unfl", "Table 5", "same questions"):
        assert list(table(text, title))[2].startswith("average"), title
    assert table(text, "Scores in percent, all")["average (partial)"][2:] == averages
    assert table(text, "same questions")["average"][3:6] == ["-", "-", "-"]
    assert [row["task"] for row in found["comparisons"]][:1] == ["average"]
    assert next(iter(found["tasks"])) == "average"

    assert "(paper)" not in write_both(tmp_path, *results, names=names)["text"]
    alone = write_both(tmp_path, results[0], names=["base"])["text"]
    assert table(alone, "Average")["base"] == [averages[0], *"----"]


def test_a_task_called_average_is_refused(tmp_path) -> None:
    """Its scores would stand in the place of the four benchmarks' mean."""
    text = (ROOT / "demo/world.yaml").read_text().replace("task: world", "task: average")
    text = text.replace("world/test.jsonl", str(WORLD / "test.jsonl"))
    (tmp_path / "mine.yaml").write_text(text)
    args = ["--model", BASE, "--tasks", "", "--task", tmp_path / "mine.yaml"]
    assert "mine.yaml" in refused(*args, "--out", tmp_path / "out")


def test_compare_finished_folders(tmp_path) -> None:
    """Two runs beside each other; an adapter beside its base; other questions are refused."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(BASE),
        LoraConfig(target_modules=["up_proj"], init_lora_weights=False),
    )
    model.save_pretrained(tmp_path / "adapter")
    args = ["--model", BASE, *WORLD_TASK, "--limit", "40"]
    run(*args, "--out", tmp_path / "a")
    adapter = [*args, "--adapter", tmp_path / "adapter"]
    run(*adapter, "--out", tmp_path / "b")
    run("--compare", tmp_path / "a", tmp_path / "b", "--out", tmp_path / "c")
    found = json.loads((tmp_path / "c/results.json").read_text())
    tuned = f"{BASE} + {tmp_path / 'adapter'}"
    assert list(found["models"]) == [str(BASE), tuned]
    alone = json.loads((tmp_path / "b/results.json").read_text())["all questions"][tuned]
    assert found["all questions"][tuned] == alone != found["all questions"][str(BASE)]
    # unmerged equals merged
    merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(BASE / name, tmp_path / "merged")
    merged = ["--model", tmp_path / "merged", *args[2:]]
    run(*merged, "--compare", tmp_path / "b", "--out", tmp_path / "d")
    row = json.loads((tmp_path / "d/results.json").read_text())["comparisons"][0]
    assert (row["base"], row["model"], row["flips"]) == (tuned, str(tmp_path / "merged"), [])
    three = ["--compare", tmp_path / "a", tmp_path / "b", tmp_path / "a", "--out"]
    run(*three, tmp_path / "again")  # one base, though it is there twice
    assert json.loads((tmp_path / "again/results.json").read_text())["models"] == found["models"]
    assert "name what it compared" in refused("--compare", tmp_path / "c", "--out", tmp_path / "f")
    fewer = [*args[:-1], "30", "--out", tmp_path / "e"]
    run(*fewer)
    line = refused("--compare", tmp_path / "a", tmp_path / "e", "--out", tmp_path / "f")
    assert "world" in line and "--limit" in line
    assert "evaluate" in refused("--compare", tmp_path, "--out", tmp_path / "f")
    with (tmp_path / "b/results.json").open("a") as results:
        results.write("\n")
    line = refused("--compare", tmp_path / "a", tmp_path / "b", "--out", tmp_path / "f")
    assert "results.json is not the file" in line
    assert not (tmp_path / "f").exists()


def test_4_bit_weights_and_half_precision(tmp_path) -> None:
    pytest.importorskip("bitsandbytes")
    args = ["--model", BASE, *WORLD_TASK, "--limit", "8"]
    for flags in (["--load-in-4bit"], ["--dtype", "bfloat16"]):
        run(*args, *flags, "--out", tmp_path / flags[0])
    about = json.loads((tmp_path / "--load-in-4bit/results.json").read_text())["models"][str(BASE)]
    assert about["load_in_4bit"] is True and about["path"] == "prefix"
    about = json.loads((tmp_path / "--dtype/results.json").read_text())["models"][str(BASE)]
    assert about["dtype"] == "bfloat16"


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
    assert "cuda" in refused(*base, *WORLD_TASK, "--device", "cuda") or torch.cuda.is_available()
    assert "banana" in refused(*base, *WORLD_TASK, "--device", "banana")
    assert "pairs.jsonl" in refused(*base, *WORLD_TASK, "--contamination", tmp_path)
    assert "no_such_task" in refused(*base, "--tasks", "", "--task", "no_such_task")
    broken = tmp_path / "broken.yaml"
    broken.write_text("task: x\ndataset_path: [json\n")
    assert "broken.yaml" in refused(*base, "--tasks", "", "--task", broken)
    assert not out.exists()


def test_bad_models_are_refused(tmp_path) -> None:
    """Also the second of two, before the first is scored; no hint at the hub for a local folder."""
    out, good = tmp_path / "out", make_model(tmp_path / "good")
    flags = [*WORLD_TASK, "--out", out]

    def broken(name: str) -> Path:
        return Path(shutil.copytree(good, tmp_path / name))

    both = ["--model", good, "--model"]
    assert "there twice" in refused(*both, f"{good}/../good", *flags)
    assert "there twice" in refused(*both, good, *flags)
    (tmp_path / "x/a").mkdir(parents=True)
    shutil.copytree(good, tmp_path / "x/a/b")
    shutil.copytree(good, tmp_path / "x/a__b")
    alike = ["--model", tmp_path / "x/a/b", "--model", tmp_path / "x/a__b"]
    assert "results folder" in refused(*alike, *flags)
    folder = broken("truncated")
    (folder / "model.safetensors").write_bytes((good / "model.safetensors").read_bytes()[:-99])
    line = refused(*both, folder, *flags)
    assert "truncated/model.safetensors" in line and "cut short" in line and "HF_TOKEN" not in line
    folder = broken("no_tokenizer")
    for file in folder.glob("tokenizer*"):
        file.unlink()
    assert "no_tokenizer" in (line := refused(*both, folder, *flags)) and "tokenizer" in line
    assert "HF_TOKEN" not in line
    folder = broken("config")
    (folder / "config.json").write_text("{")
    assert "config.json" in refused(*both, folder, *flags)
    assert "config.json" in refused("--model", tmp_path, *flags)
    folder = broken("shape")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 48}))
    assert "shape" in refused("--model", folder, *flags)
    shutil.rmtree(out)  # it is found while the model is loaded: .unfinished stays
    assert "adapter_config.json" in refused("--model", good, "--adapter", good, *flags)
    assert "missing" in refused("--model", good, "--adapter", tmp_path / "none", *flags)
    folder = broken("changed")  # a merged folder's run.json lists its files
    listed = {"model.safetensors": {"sha256": "0" * 64}}
    (folder / "run.json").write_text(json.dumps({"step": "merge", "outputs": listed}))
    assert "changed after" in refused("--model", folder, *flags)
    (folder / "run.json").write_text("{")  # edited by hand: it says nothing
    evaluate.check_folder("--model", str(folder))
    (folder / ".unfinished").write_text("python merge.py")
    assert "unfinished" in refused("--model", folder, *flags)
    assert not out.exists()


def test_numbers_that_are_none_are_refused(tmp_path) -> None:
    from safetensors.torch import load_file, save_file

    model = make_model(tmp_path / "model")
    weights = load_file(model / "model.safetensors")
    weights["model.norm.weight"][3] = float("nan")
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    line = refused("--model", model, *WORLD_TASK, "--limit", "3", "--out", tmp_path / "out")
    assert "world, question" in line and "nan" in line and str(model) in line


def test_bad_benchmark_files_are_refused(tmp_path) -> None:
    """The line names benchmark, row and what is wrong with it."""
    import csv

    demo, local = ROOT / "demo/data", tmp_path / "data"

    def line(name: str, file: str, change) -> str:
        shutil.rmtree(local, ignore_errors=True)
        shutil.copytree(demo / name, local / name)
        path = local / name / file
        if path.suffix == ".json":
            path.write_text(json.dumps(change(json.loads(path.read_text()))))
        elif path.suffix == ".jsonl":
            rows = [json.loads(text) for text in path.read_text().splitlines()]
            path.write_text("".join(json.dumps(row) + "\n" for row in change(rows)))
        else:
            path.unlink()
        args = ["--model", BASE, "--tasks", name, "--local", local, "--out", tmp_path / "out"]
        return refused(*args)

    def first(**new):
        return lambda rows: [
            {k: v for k, v in {**rows[0], **new}.items() if v != "gone"},
            *rows[1:],
        ]

    def last(**new):
        return lambda rows: [
            *rows[:-1],
            {k: v for k, v in {**rows[-1], **new}.items() if v != "gone"},
        ]

    arc, swag, truth = (
        "ARC-Challenge-test.jsonl",
        "hellaswag_1000_original_format.jsonl",
        "mc_task.json",
    )
    assert "arc/all has no questions" in line("arc", arc, lambda rows: [])
    found = line("arc", "ARC-Challenge-train.jsonl", lambda rows: rows[:9])
    assert "9 few-shot rows, 25 needed" in found
    assert "arc/all: scored row 0" in line("arc", arc, first(answerKey="Z"))
    assert "arc/all: scored row 0" in line(
        "arc", arc, first(choices={"text": ["a"], "label": "gone"})
    )
    assert "'answerKey'" in line("arc", arc, first(answerKey="gone"))
    found = line("hellaswag", swag, last(activity_label="gone"))
    assert "hellaswag/all: scored row" in found and "'activity_label'" in found
    assert "few-shot row 0" in line("hellaswag", swag, first(label=7))
    assert "scored row" in line("hellaswag", swag, last(endings=[]))
    found = line("truthfulqa", truth, first(mc2_targets={}))
    assert "truthfulqa/all: scored row 0" in found and "mc2_targets" in found
    assert "mc1_targets" in line("truthfulqa", truth, first(mc1_targets={}))
    assert "mc2_targets" in line("truthfulqa", truth, first(mc2_targets={"yes": 1}))
    subject = next((demo / "mmlu/test").iterdir()).name
    dev = f"dev/{subject.replace('_test', '_dev')}"
    assert "missing" in line("mmlu", dev, None)
    assert not (tmp_path / "out").exists()
    assert csv  # the layouts' own tests are step 2's


def test_a_contamination_folder_of_other_benchmarks_is_named(tmp_path, capsys) -> None:
    pair = {"pair_id": "p", "test_id": "arc/all/3"}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(pair) + "\n")
    args = ["--model", BASE, *WORLD_TASK, "--limit", "4", "--contamination", tmp_path]
    run(*args, "--out", tmp_path / "out")
    said = capsys.readouterr().err
    assert "warning" in said and "world" in said and "arc" in said

"""Scoring by shared prefixes against lm-evaluation-harness: the same model, requests and machine.

    python benchmarks/evaluate_speed.py --local raw
    python benchmarks/evaluate_speed.py --local raw --size 7b     # on a GPU; 13b likewise

Needs the benchmarks' real files (README.md, "Layouts"). Each repeat runs both ways one after
the other on the same task objects, through lm_eval.simple_evaluate from prompts to metrics; shown
are medians. The harness runs with its cache of one-token answers on (its default and fastest), at
the best of several batch sizes, which is looked for first. The model is random: speed does not
depend on what it says. Its tokenizer is a byte-level BPE made of the questions themselves.

The sample has questions of each benchmark; `full suite` scales each way's seconds on it, less what
a run costs with one question, by the tokens that the way needs for all questions, which are counted
without a forward pass.
Without a GPU it computes in one thread and counts CPU time, which other processes change little;
that takes about 15 minutes of it. On an H100 the 7B with one repeat took 104 s.
"""

import argparse
import functools
import importlib.util
import json
import os
import statistics
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)  # not this folder: it has a merge.py, too
SIZES = {  # hidden, intermediate, layers, heads, vocabulary, type
    "small": (512, 1376, 4, 8, 8_192, "float32"),  # 12.6 M parameters in its layers
    "7b": (4096, 11008, 32, 32, 32_000, "bfloat16"),  # Llama 2's shapes
    "13b": (5120, 13824, 40, 40, 32_000, "bfloat16"),
}
QUESTIONS = {"arc": 10, "hellaswag": 40, "truthfulqa": 24}  # and MMLU's SUBJECTS, whole
SUBJECTS = ("abstract_algebra", "machine_learning", "astronomy")
FULL = {"arc": 1172, "hellaswag": 10_042, "mmlu": 14_042, "truthfulqa": 817}
GPU_FACTOR = 2  # the sample on a GPU is this many times larger
SHOWN = ("tokens", "forward", "seconds", "megabytes")
BATCH_SIZES = {"cpu": (1, 4, 8), "cuda": (8, 16, 32)}


def load_script() -> Any:
    """evaluate.py under another name: the harness needs the package that its own name hides."""
    spec = importlib.util.spec_from_file_location("evaluate_script", ROOT / "evaluate.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    script.import_harness()
    return script


def make_tokenizer(texts: list[str], size: int) -> Any:
    """A byte-level BPE of the benchmarks' own words: about 4 characters a token, as Llama's."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(
        texts, vocab_size=size, special_tokens=["<s>", "</s>"], show_progress=False
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )


def make_model(size: str, vocabulary: int, device: str) -> Any:
    """A random Llama made on the device itself; nothing is read from a disk or a hub."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    hidden, inner, layers, heads, _, dtype = SIZES[size]
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=4096,
        tie_word_embeddings=size == "small",
        bos_token_id=0,
        eos_token_id=1,
    )
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    return model.eval()


class Meter:
    """Seconds and tokens of a model's forward passes, by hooks on the model itself."""

    def __init__(self, model: Any) -> None:
        self.model, self.seconds, self.tokens = model, 0.0, 0
        model.register_forward_pre_hook(self.before, with_kwargs=True)
        model.register_forward_hook(self.after)

    def clock(self) -> float:
        """Seconds, once the GPU is idle; without one, of CPU time: others' work does not count."""
        import torch

        if self.model.device.type != "cuda":
            return time.process_time()
        torch.cuda.synchronize()
        return time.perf_counter()

    def before(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
        self.tokens += ids.numel()
        self.began = self.clock()

    def after(self, *_: Any) -> None:
        self.seconds += self.clock() - self.began


class Peak:
    """The most memory used in a block, in MB: of the GPU, or of this process above its start."""

    def __init__(self, cuda: bool) -> None:
        self.cuda = cuda

    def resident(self) -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def __enter__(self) -> "Peak":
        import torch

        self.start, self.most, self.over = self.resident(), 0, threading.Event()
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        self.thread = threading.Thread(target=self.watch)
        self.thread.start()
        return self

    def watch(self) -> None:
        while not self.over.wait(0.01):
            self.most = max(self.most, self.resident() - self.start)

    def __exit__(self, *_: Any) -> None:
        import torch

        self.over.set()
        self.thread.join()
        self.megabytes = (torch.cuda.max_memory_allocated() if self.cuda else self.most) / 1e6


def build_tasks(script: Any, name: str, local: Path, subjects: tuple[str, ...] = ()) -> list[Any]:
    """The harness's tasks of a benchmark on local rows; of MMLU the subjects asked for, or all."""
    args = script.parse_args(["--model", "x", "--tasks", name, "--local", str(local)])
    tasks = script.benchmark_tasks(args)
    kept = [task for key, (_, task) in tasks.items() if not subjects or key[5:] in subjects]
    return kept if name == "mmlu" else [task for _, task in tasks.values()]


def requests_of(tasks: list[Any], limit: int | None) -> list[Any]:
    """The harness's requests of tasks, drawn as simple_evaluate draws them."""
    found = []
    for task in tasks:
        task.set_fewshot_seed(1234)
        task.build_all_requests(limit=limit, rank=0, world_size=1)
        found += task.instances
    return found


class TokenCounter:
    """Stands where scores are made: it counts what either way would forward."""

    def __init__(self) -> None:
        self.stock = 0  # with the harness's cache, each different input once
        self.nodes = 0  # of the trie

    def score(self, lm: Any, requests: list[Any]) -> list[tuple[float, bool]]:
        """Count the tokens of sorted requests, and return a zero for each."""
        from prefix_lm import count_new_tokens, sort_key

        inputs = {sort_key(request)[0] for request in requests}
        self.stock += sum(len(ids) // 4 for ids in inputs)
        self.nodes += sum(count_new_tokens(requests))
        return [(0.0, False)] * len(requests)


def count_tokens(lm: Any, instances: list[Any]) -> tuple[int, int]:
    """(tokens that the harness forwards with its cache on, nodes of the trie); no forward pass."""
    counter = TokenCounter()
    lm.store = counter
    lm.loglikelihood(instances)
    lm.store = None
    return counter.stock, counter.nodes


def full_suite(lm: Any, tasks: dict[str, list[Any]]) -> dict[str, tuple[float, float]]:
    """{benchmark: the same two counts for all of its questions}; ARC and HellaSwag from 50 each.

    MMLU's prompts are a subject's examples and then the question, so both parts are encoded once;
    its four answers are one token each, so a question is one input for the harness too.
    """
    counts = {}
    for name, of in tasks.items():
        if name != "mmlu":
            limit = 50 if name in ("arc", "hellaswag") else None
            share = FULL[name] / limit if limit else 1
            stock, nodes = count_tokens(lm, requests_of(of, limit))
            counts[name] = (stock * share, nodes * share)
            continue
        sums = [0, 0]
        for task in of:
            first = requests_of([task], 1)[0].args[0]
            docs = list(task.eval_docs)
            questions = [task.doc_to_text(doc) for doc in docs]
            examples = first.removesuffix(questions[0])
            encoded = lm.tokenizer([examples, *questions], verbose=False)["input_ids"]
            shared, *lengths = map(len, encoded)
            sums[0] += shared * len(docs) + sum(lengths)
            sums[1] += shared + sum(lengths)
        counts[name] = (sums[0], sums[1])
    return counts


def measure(
    lm: Any, meter: Meter, tasks: list[Any], limit: int | None, cuda: bool
) -> dict[str, Any]:
    """One run of simple_evaluate: seconds, of them in the forward pass, tokens, memory, answers."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    meter.seconds, meter.tokens = 0.0, 0
    manager = TaskManager(include_defaults=False)
    with Peak(cuda) as peak:
        began = meter.clock()
        found = simple_evaluate(
            lm, tasks=tasks, limit=limit, task_manager=manager, bootstrap_iters=0,
            fewshot_random_seed=1234,
        )  # fmt: skip
        seconds = meter.clock() - began
    answers = {
        (name, sample["doc_id"]): [answer[0] for answer in sample["filtered_resps"]]
        for name, samples in found["samples"].items()
        for sample in samples
    }
    return {"seconds": seconds, "forward": meter.seconds, "tokens": meter.tokens,
            "megabytes": peak.megabytes, "answers": answers}  # fmt: skip


def best_batch_size(
    make: Callable[[int], Any], meter: Meter, tasks: list[Any], sizes: tuple[int, ...], limit: int
) -> int:
    """The harness's fastest on a few questions; a size that does not fit is left out."""
    seconds = {}
    for size in sizes:
        try:
            found = measure(make(size), meter, tasks, limit, False)
            seconds[size] = found["seconds"]
        except RuntimeError:  # out of memory
            break
    return min(seconds, key=seconds.get)


def measure_all(
    tasks: dict[str, list[Any]], ours: Any, stock: Callable[[int], Any], meter: Meter, repeats: int
) -> dict[str, dict[str, Any]]:
    """{benchmark: {"harness", "ours": medians; "batch", "questions", "fixed", "difference"}}."""
    cuda = ours.model.device.type == "cuda"
    results = {}
    for name, of in tasks.items():
        limit = None if name == "mmlu" else QUESTIONS[name] * (GPU_FACTOR if cuda else 1)
        few = 8 if limit is None else max(1, limit // 6)
        sizes = BATCH_SIZES["cuda" if cuda else "cpu"]
        found: dict[str, Any] = {"batch": best_batch_size(stock, meter, of, sizes, few)}
        once = measure(ours, meter, of, 1, cuda)  # what a run costs, however few the questions
        found["fixed"] = once["seconds"] - once["forward"]
        runs: dict[str, list[dict[str, Any]]] = {"harness": [], "ours": []}
        for _ in range(repeats):
            runs["harness"].append(measure(stock(found["batch"]), meter, of, limit, cuda))
            runs["ours"].append(measure(ours, meter, of, limit, cuda))
        theirs, mine = (runs[way][-1]["answers"] for way in runs)
        # TruthfulQA's two tasks ask the same questions, MMLU's subjects do not
        found["questions"] = len({(name == "mmlu" and task, row) for task, row in theirs})
        pairs = [zip(theirs[key], mine[key], strict=True) for key in theirs]
        found["difference"] = max(abs(x - y) for pair in pairs for x, y in pair)
        for way, several in runs.items():
            found[way] = {key: statistics.median(run[key] for run in several) for key in SHOWN}
        results[name] = found
        print(f"measured {name}", file=sys.stderr, flush=True)
    return results


def print_row(name: str, questions: Any, way: str, of: dict[str, float], memory: str = "") -> None:
    """One line of the table."""
    many = of["tokens"] >= 100  # else it is a ratio
    tokens = f"{of['tokens']:,.0f}" if many else f"{of['tokens']:.2f}"
    seconds = f"{of['forward']:,.2f} | {of['seconds']:,.2f}"
    print(f"| {name} | {questions} | {way} | {tokens} | {seconds} | {memory} |")


def print_table(results: dict[str, dict[str, Any]], counts: dict[str, tuple[float, float]]) -> None:
    """The sample, and the full suite: each way's seconds scaled by its own tokens."""
    print("| benchmark | questions | | tokens | forward s | end to end s | peak MB |")
    print("|:--|--:|:--|--:|--:|--:|--:|")
    total = {way: dict.fromkeys(SHOWN[:3], 0.0) for way in ("harness", "ours")}
    for name, found in results.items():
        for place, way in enumerate(total):
            of = found[way]
            label = f"harness, batch {found['batch']}" if way == "harness" else "ours"
            print_row(name, found["questions"], label, of, f"{of['megabytes']:,.0f}")
            scale = counts[name][place] / of["tokens"]
            for key in total[way]:
                fixed = found["fixed"] if key == "seconds" else 0.0
                total[way][key] += fixed + (of[key] - fixed) * scale
        ratio = {key: found["harness"][key] / found["ours"][key] for key in SHOWN[:3]}
        print_row(name, "", "**ratio**", ratio)
    for way, of in total.items():
        print_row("full suite", f"{sum(FULL.values()):,}", f"{way}, scaled", of)
    ratio = {key: total["harness"][key] / total["ours"][key] for key in SHOWN[:3]}
    print_row("full suite", "", "**ratio**", ratio)
    worst = max(found["difference"] for found in results.values())
    print(f"\nlargest difference of a log-likelihood: {worst:.1e}")


def main() -> None:
    """Measure, then print the table that README.md shows."""
    shape = argparse.RawTextHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=shape)
    parser.add_argument("--local", type=Path, required=True, help="folder of the benchmarks' files")
    parser.add_argument("--size", choices=SIZES, default="small", help="of the model")
    parser.add_argument("--repeats", type=int, default=3, help="of both ways (default: 3)")
    args = parser.parse_args()
    os.environ["TQDM_DISABLE"] = "1"
    import torch

    script = load_script()
    from lm_eval.models.huggingface import HFLM

    from prefix_lm import PrefixLM

    device = script.check_device("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cpu":
        torch.set_num_threads(1)
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
    began = time.perf_counter()
    tasks = {name: build_tasks(script, name, args.local, SUBJECTS) for name in FULL}
    everything = {**tasks, "mmlu": build_tasks(script, "mmlu", args.local)}
    set_up = time.perf_counter() - began
    texts = [json.dumps(doc) for of in tasks.values() for task in of for doc in task.eval_docs]
    tokenizer = make_tokenizer(texts, SIZES[args.size][4])
    began = time.perf_counter()
    model = make_model(args.size, SIZES[args.size][4], device)
    load = time.perf_counter() - began
    common = {"pretrained": model, "tokenizer": tokenizer}
    ours = PrefixLM(quiet=True, **common)
    assert not ours.why_stock, ours.why_stock
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    head = model.get_output_embeddings().weight.numel() / 1e6 / millions
    print(f"{millions:,.1f} M parameters ({head:.0%} in the head), {model.dtype}, {device}, "
          f"{torch.get_num_threads()} threads; packs of {ours.scorer.pack} tokens")  # fmt: skip
    print(f"task set-up {set_up:.1f} s, model {load:.1f} s: not in the figures below\n", flush=True)
    counts = full_suite(ours, everything)
    stock = functools.partial(HFLM, **common)
    meter, theirs = Meter(model), lambda size: stock(batch_size=size)
    results = measure_all(tasks, ours, theirs, meter, args.repeats)
    print_table(results, counts)


if __name__ == "__main__":
    main()

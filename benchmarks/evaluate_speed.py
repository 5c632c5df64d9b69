"""Time scoring by shared prefixes against lm-evaluation-harness: same model, requests, machine.

    python benchmarks/evaluate_speed.py --local raw
    python benchmarks/evaluate_speed.py --local raw --size 7b     # on a GPU; 13b likewise

Needs the benchmarks' real files (README.md, "Layouts"). Prints a table of tokens, seconds and peak
memory, and the largest difference of a log-likelihood. Each repeat runs both ways one after the
other on the same task objects, through lm_eval.simple_evaluate from prompts to metrics; shown are
medians. The harness runs with its cache of one-token answers on (its default and fastest), at the
best of several batch sizes, which is looked for first. The model is random: speed does not depend
on what it says. Its tokenizer is a byte-level BPE made of the questions themselves.

The sample has questions of each benchmark; `full suite` scales each way's seconds on it, less what
a run costs with one question, by the tokens that the way needs for all questions, which are counted
without a forward pass.

Without a GPU it computes in one thread and counts CPU time, which other processes change little;
that takes about 15 minutes of it, and 1.1 GB. On an H100 the 7B with one repeat took 104 s and 27
GB of its memory.
"""

import argparse
import importlib.util
import json
import os
import statistics
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

# Last: the package `evaluate` comes before our evaluate.py.
sys.path.append(str(Path(__file__).resolve().parent.parent))
import common

if TYPE_CHECKING:
    from types import ModuleType

    from lm_eval.api.instance import Instance
    from lm_eval.api.model import LM
    from lm_eval.api.task import ConfigurableTask
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

    from prefix_lm import PrefixLM

ROOT = Path(__file__).resolve().parent.parent


@dataclass
class LlamaShape:
    """The sizes of a random Llama."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    vocabulary: int
    dtype: str


SHAPES = {
    "small": LlamaShape(
        hidden=512, intermediate=1376, layers=4, heads=8, vocabulary=8_192, dtype="float32"
    ),  # 12.6 M parameters in its layers
    "7b": LlamaShape(
        hidden=4096, intermediate=11008, layers=32, heads=32, vocabulary=32_000, dtype="bfloat16"
    ),  # Llama 2's, as the next
    "13b": LlamaShape(
        hidden=5120, intermediate=13824, layers=40, heads=40, vocabulary=32_000, dtype="bfloat16"
    ),
}
SAMPLE = {"arc": 10, "hellaswag": 40, "truthfulqa": 24}  # questions
SAMPLE_SUBJECTS = ("abstract_algebra", "machine_learning", "astronomy")  # of MMLU, whole
GPU_SAMPLE = 2  # times as many questions on a GPU
ALL_QUESTIONS = {"arc": 1172, "hellaswag": 10_042, "mmlu": 14_042, "truthfulqa": 817}
COUNTED = 50  # questions of ARC and of HellaSwag from which the tokens of all are projected
BATCH_SIZES = {"cpu": (1, 4, 8), "cuda": (8, 16, 32)}  # the harness's, of which the best is taken
FEW_SHOT_SEED = 1234  # simple_evaluate's default


@dataclass
class Figures:
    """What one way of scoring takes: in a run, in the median of several, or as a ratio."""

    tokens: float  # that the model is given
    forward: float  # seconds in the model
    seconds: float  # from prompts to metrics
    megabytes: float | None = None  # at the peak, where it was measured


@dataclass
class ScoringRun:
    """The figures of one run, and {(task, question): log-likelihood of each answer}."""

    figures: Figures
    answers: dict[tuple[str, int], list[float]]


@dataclass
class TokenCount:
    """Tokens that either way gives to the model."""

    harness: float  # with its cache on: each different input once
    ours: float  # nodes of the trie


@dataclass
class Comparison:
    """Both ways on the sample of one benchmark."""

    benchmark: str
    questions: int
    batch_size: int  # the harness's
    start_up: float  # seconds outside the model that a run takes, however few its questions
    difference: float  # the largest between the log-likelihoods of an answer
    harness: Figures
    ours: Figures


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--local", type=Path, required=True, help="folder of the benchmarks' files")
    parser.add_argument("--size", choices=SHAPES, default="small", help="of the model")
    parser.add_argument("--repeats", type=int, default=3, help="of both ways (default: 3)")
    return parser.parse_args(argv)


def load_evaluate() -> "ModuleType":
    """Return evaluate.py as a module of another name: its own is that of the package."""
    spec = importlib.util.spec_from_file_location("evaluate_script", ROOT / "evaluate.py")
    evaluate_script = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = evaluate_script  # dataclasses look their module up
    spec.loader.exec_module(evaluate_script)
    evaluate_script.import_harness()
    return evaluate_script


def load_tasks(
    evaluate_script: "ModuleType", benchmark: str, local: Path, subjects: tuple[str, ...] = ()
) -> list["ConfigurableTask"]:
    """Return the harness's tasks of a benchmark on local rows; of MMLU the named subjects, or all.

    TruthfulQA is two tasks, MMLU one for each subject.
    """
    flags = ["--model", "none", "--tasks", benchmark, "--local", str(local)]
    found = evaluate_script.load_tasks(evaluate_script.parse_args(flags))
    tasks = []
    for task in found:
        chosen = not subjects or task.name.removeprefix("mmlu_") in subjects
        if benchmark != "mmlu" or chosen:
            tasks.append(task.harness)
    return tasks


def train_tokenizer(texts: list[str], size: int) -> "PreTrainedTokenizerFast":
    """Return a byte-level BPE of these texts: about 4 characters a token, as Llama's."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(
        texts, vocab_size=size, special_tokens=["<s>", "</s>"], show_progress=False
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )


def make_random_llama(shape: LlamaShape, device: str) -> "PreTrainedModel":
    """Return a random Llama, made on the device itself; nothing is read from a disk or a hub."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        max_position_embeddings=4096,
        tie_word_embeddings=shape is SHAPES["small"],
        bos_token_id=0,
        eos_token_id=1,
    )
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, shape.dtype))
    return model.eval()


class ForwardMeter:
    """Counts the seconds and tokens of a model's forward passes, by hooks on the model itself."""

    def __init__(self, model: "PreTrainedModel") -> None:
        self.cuda = model.device.type == "cuda"
        self.reset()
        model.register_forward_pre_hook(self.before_forward, with_kwargs=True)
        model.register_forward_hook(self.after_forward)

    def reset(self) -> None:
        """Begin to count anew."""
        self.seconds = 0.0
        self.tokens = 0

    def clock(self) -> float:
        """Return seconds: of the clock once the GPU is idle; without one, of this process's CPU."""
        import torch

        if not self.cuda:
            return time.process_time()
        torch.cuda.synchronize()
        return time.perf_counter()

    def before_forward(
        self, model: "PreTrainedModel", args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Count the tokens of the pass, and start its clock."""
        if "input_ids" in kwargs:
            input_ids = kwargs["input_ids"]
        else:
            input_ids = args[0]
        self.tokens += input_ids.numel()
        self.began = self.clock()

    def after_forward(self, *_: Any) -> None:
        """Add the pass's seconds."""
        self.seconds += self.clock() - self.began


class PeakMemory:
    """Finds the most memory used in a block: the GPU's, or this process's above its start."""

    def __init__(self, cuda: bool) -> None:
        self.cuda = cuda
        self.megabytes = 0.0

    def resident(self) -> int:
        """Return the resident bytes of this process; Linux."""
        pages = Path("/proc/self/statm").read_text().split()[1]
        return int(pages) * os.sysconf("SC_PAGE_SIZE")

    def __enter__(self) -> "PeakMemory":
        import torch

        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        self.start = self.resident()
        self.growth = 0
        self.over = threading.Event()
        self.thread = threading.Thread(target=self.watch)
        self.thread.start()
        return self

    def watch(self) -> None:
        """Look at the resident bytes every hundredth of a second, until the block is over."""
        while not self.over.wait(0.01):
            self.growth = max(self.growth, self.resident() - self.start)

    def __exit__(self, *_: Any) -> None:
        import torch

        self.over.set()
        self.thread.join()
        if self.cuda:
            self.megabytes = torch.cuda.max_memory_allocated() / 1e6
        else:
            self.megabytes = self.growth / 1e6


class Contenders:
    """The two ways of scoring with one model, and the meter on it."""

    def __init__(self, model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerFast") -> None:
        import prefix_lm

        self.model = model
        self.tokenizer = tokenizer
        self.ours = prefix_lm.PrefixLM(pretrained=model, tokenizer=tokenizer, quiet=True)
        assert not self.ours.why_stock, self.ours.why_stock
        self.meter = ForwardMeter(model)

    def harness(self, batch_size: int) -> "LM":
        """Return the harness's own way."""
        from lm_eval.models.huggingface import HFLM

        return HFLM(pretrained=self.model, tokenizer=self.tokenizer, batch_size=batch_size)

    def score(self, lm: "LM", tasks: list["ConfigurableTask"], limit: int | None) -> ScoringRun:
        """Score up to `limit` questions of each task either way, from prompts to metrics."""
        from lm_eval import simple_evaluate
        from lm_eval.tasks import TaskManager

        manager = TaskManager(include_defaults=False)
        self.meter.reset()
        with PeakMemory(self.meter.cuda) as peak:
            began = self.meter.clock()
            results = simple_evaluate(
                lm,
                tasks=tasks,
                limit=limit,
                task_manager=manager,
                bootstrap_iters=0,
                fewshot_random_seed=FEW_SHOT_SEED,
            )
            seconds = self.meter.clock() - began

        answers = {}
        for task, samples in results["samples"].items():
            for sample in samples:
                log_likelihoods = [answer[0] for answer in sample["filtered_resps"]]
                answers[task, sample["doc_id"]] = log_likelihoods
        figures = Figures(
            tokens=self.meter.tokens,
            forward=self.meter.seconds,
            seconds=seconds,
            megabytes=peak.megabytes,
        )
        return ScoringRun(figures, answers)


def build_requests(tasks: list["ConfigurableTask"], limit: int | None) -> list["Instance"]:
    """Return the harness's requests of tasks, their examples drawn as simple_evaluate does."""
    requests = []
    for task in tasks:
        task.set_fewshot_seed(FEW_SHOT_SEED)
        task.build_all_requests(limit=limit, rank=0, world_size=1)
        requests += task.instances
    return requests


class TokenCounter:
    """Stands where scores are made: it counts the tokens that either way would forward."""

    def __init__(self) -> None:
        self.count = TokenCount(harness=0, ours=0)

    def score(self, lm: "PrefixLM", requests: list[Any]) -> list[tuple[float, bool]]:
        """Count the tokens of sorted requests, and return a zero for each."""
        import prefix_lm

        inputs = {prefix_lm.sort_key(request)[0] for request in requests}
        for input_bytes in inputs:
            self.count.harness += len(input_bytes) // 4  # bytes of an id
        self.count.ours += sum(prefix_lm.count_new_tokens(requests))
        return [(0.0, False)] * len(requests)


def count_tokens(lm: "PrefixLM", requests: list["Instance"]) -> TokenCount:
    """Count the tokens of requests, without a forward pass."""
    counter = TokenCounter()
    lm.store = counter
    lm.loglikelihood(requests)
    lm.store = None
    return counter.count


def count_mmlu(lm: "PrefixLM", tasks: list["ConfigurableTask"]) -> TokenCount:
    """Count the tokens of all of MMLU, in seconds: no prompt is encoded twice.

    A prompt is its subject's examples and then the question, so both parts are encoded once. The
    four answers are one token each, so a question is one input for the harness, too.
    """
    count = TokenCount(harness=0, ours=0)
    for task in tasks:
        docs = list(task.eval_docs)
        questions = [task.doc_to_text(doc) for doc in docs]
        first_prompt = build_requests([task], 1)[0].args[0]
        examples = first_prompt.removesuffix(questions[0])

        encoded = lm.tokenizer([examples, *questions], verbose=False)["input_ids"]
        shared = len(encoded[0])
        own = sum(len(input_ids) for input_ids in encoded[1:])
        count.harness += shared * len(docs) + own
        count.ours += shared + own
    return count


def count_benchmark(lm: "PrefixLM", benchmark: str, tasks: list["ConfigurableTask"]) -> TokenCount:
    """Count the tokens of all questions of a benchmark; those of ARC and HellaSwag from COUNTED."""
    if benchmark == "mmlu":
        return count_mmlu(lm, tasks)
    if benchmark == "truthfulqa":
        return count_tokens(lm, build_requests(tasks, None))
    count = count_tokens(lm, build_requests(tasks, COUNTED))
    scale = ALL_QUESTIONS[benchmark] / COUNTED
    return TokenCount(harness=count.harness * scale, ours=count.ours * scale)


def find_batch_size(contenders: Contenders, tasks: list["ConfigurableTask"], limit: int) -> int:
    """Return the harness's fastest batch size on `limit` questions of each task."""
    sizes = BATCH_SIZES["cuda"] if contenders.meter.cuda else BATCH_SIZES["cpu"]
    seconds = {}
    for size in sizes:
        try:
            run = contenders.score(contenders.harness(size), tasks, limit)
        except RuntimeError:  # out of memory: so are larger ones
            break
        seconds[size] = run.figures.seconds
    return min(seconds, key=seconds.get)


def median_figures(runs: list[ScoringRun]) -> Figures:
    """Return the median of each figure."""
    found = [run.figures for run in runs]
    return Figures(
        tokens=statistics.median(figures.tokens for figures in found),
        forward=statistics.median(figures.forward for figures in found),
        seconds=statistics.median(figures.seconds for figures in found),
        megabytes=statistics.median(figures.megabytes for figures in found),
    )


def largest_difference(one: ScoringRun, other: ScoringRun) -> float:
    """Return by how much the log-likelihoods of an answer differ at most."""
    largest = 0.0
    for question, log_likelihoods in one.answers.items():
        for ours, theirs in zip(log_likelihoods, other.answers[question], strict=True):
            largest = max(largest, abs(ours - theirs))
    return largest


def count_questions(benchmark: str, run: ScoringRun) -> int:
    """Return how many questions a run scored: TruthfulQA's two tasks ask the same ones."""
    if benchmark == "mmlu":
        return len(run.answers)
    rows = {row for _, row in run.answers}
    return len(rows)


def sample_limits(benchmark: str, cuda: bool) -> tuple[int | None, int]:
    """Return the questions of each task that are timed (None: all) and that find a batch size."""
    if benchmark == "mmlu":
        return None, 8
    limit = SAMPLE[benchmark]
    if cuda:
        limit *= GPU_SAMPLE
    return limit, max(1, limit // 6)


def compare_on(
    benchmark: str, tasks: list["ConfigurableTask"], contenders: Contenders, repeats: int
) -> Comparison:
    """Score the sample of a benchmark both ways, in turn."""
    limit, trial_limit = sample_limits(benchmark, contenders.meter.cuda)
    batch_size = find_batch_size(contenders, tasks, trial_limit)
    least = contenders.score(contenders.ours, tasks, 1).figures

    harness_runs = []
    our_runs = []
    for _ in range(repeats):
        harness = contenders.harness(batch_size)
        harness_runs.append(contenders.score(harness, tasks, limit))
        our_runs.append(contenders.score(contenders.ours, tasks, limit))

    print(f"measured {benchmark}", file=sys.stderr, flush=True)
    return Comparison(
        benchmark=benchmark,
        questions=count_questions(benchmark, our_runs[-1]),
        batch_size=batch_size,
        start_up=least.seconds - least.forward,
        difference=largest_difference(our_runs[-1], harness_runs[-1]),
        harness=median_figures(harness_runs),
        ours=median_figures(our_runs),
    )


def scale_up(figures: Figures, start_up: float, tokens: float) -> Figures:
    """Project figures to another number of tokens; the seconds of starting up are there once."""
    scale = tokens / figures.tokens
    return Figures(
        tokens=tokens,
        forward=figures.forward * scale,
        seconds=start_up + (figures.seconds - start_up) * scale,
    )


def add_figures(found: list[Figures]) -> Figures:
    """Return the sums of tokens and of seconds."""
    return Figures(
        tokens=sum(figures.tokens for figures in found),
        forward=sum(figures.forward for figures in found),
        seconds=sum(figures.seconds for figures in found),
    )


def print_figures(label: str, questions: int, way: str, figures: Figures) -> None:
    """Print one way's line of the table."""
    seconds = f"{figures.forward:,.2f} | {figures.seconds:,.2f}"
    memory = ""
    if figures.megabytes is not None:
        memory = f"{figures.megabytes:,.0f}"
    print(f"| {label} | {questions:,} | {way} | {figures.tokens:,.0f} | {seconds} | {memory} |")


def print_ratios(label: str, harness: Figures, ours: Figures) -> None:
    """Print how many times as much the harness takes."""
    tokens = harness.tokens / ours.tokens
    forward = harness.forward / ours.forward
    seconds = harness.seconds / ours.seconds
    print(f"| {label} |  | **ratio** | {tokens:.2f} | {forward:,.2f} | {seconds:,.2f} |  |")


def print_comparisons(comparisons: list[Comparison], counts: dict[str, TokenCount]) -> None:
    """Print the sample, and the full suite: each way's seconds scaled by its own tokens."""
    print("| benchmark | questions | | tokens | forward s | end to end s | peak MB |")
    print("|:--|--:|:--|--:|--:|--:|--:|")
    harness_parts = []
    our_parts = []
    for found in comparisons:
        name = found.benchmark
        harness_way = f"harness, batch {found.batch_size}"
        print_figures(name, found.questions, way=harness_way, figures=found.harness)
        print_figures(name, found.questions, way="ours", figures=found.ours)
        print_ratios(name, found.harness, found.ours)
        harness_parts.append(scale_up(found.harness, found.start_up, counts[name].harness))
        our_parts.append(scale_up(found.ours, found.start_up, counts[name].ours))

    harness = add_figures(harness_parts)
    ours = add_figures(our_parts)
    questions = sum(ALL_QUESTIONS.values())
    print_figures("full suite", questions, way="harness, scaled", figures=harness)
    print_figures("full suite", questions, way="ours, scaled", figures=ours)
    print_ratios("full suite", harness, ours)

    largest = max(found.difference for found in comparisons)
    print(f"\nlargest difference of a log-likelihood: {largest:.1e}")


def describe_model(contenders: Contenders) -> str:
    """Return the model's size and how it computes, in a line."""
    import torch

    model = contenders.model
    parameters = sum(parameter.numel() for parameter in model.parameters())
    head = model.get_output_embeddings().weight.numel()
    size = f"{parameters / 1e6:,.1f} M parameters ({head / parameters:.0%} in the head)"
    place = f"{model.dtype}, {model.device.type}, {torch.get_num_threads()} threads"
    return f"{size}, {place}; packs of {contenders.ours.scorer.pack} tokens"


def choose_device() -> str:
    """Return "cuda", or "cpu", which from here on is one thread."""
    import torch

    if torch.cuda.is_available():
        return common.use_device("cuda")
    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    return common.use_device("cpu")


def load_all_tasks(local: Path) -> tuple[dict[str, list[Any]], dict[str, list[Any]]]:
    """Return {benchmark: tasks} of the sample, and of the full suite."""
    evaluate_script = load_evaluate()
    began = time.perf_counter()
    sample = {}
    for benchmark in ALL_QUESTIONS:
        sample[benchmark] = load_tasks(
            evaluate_script, benchmark, local=local, subjects=SAMPLE_SUBJECTS
        )
    suite = dict(sample)
    suite["mmlu"] = load_tasks(evaluate_script, "mmlu", local)
    print(f"task set-up: {time.perf_counter() - began:.1f} s, not in the figures below")
    return sample, suite


def make_contenders(shape: LlamaShape, tasks: dict[str, list[Any]]) -> Contenders:
    """Make the model, with a tokenizer of the tasks' rows."""
    device = choose_device()
    texts = []
    for benchmark_tasks in tasks.values():
        for task in benchmark_tasks:
            texts += [json.dumps(doc) for doc in task.eval_docs]
    tokenizer = train_tokenizer(texts, shape.vocabulary)

    began = time.perf_counter()
    model = make_random_llama(shape, device)
    print(f"model: {time.perf_counter() - began:.1f} s, not in the figures below")
    return Contenders(model, tokenizer)


def main() -> None:
    """Measure, then print the table that README.md shows."""
    args = parse_args()
    os.environ["TQDM_DISABLE"] = "1"  # read when a library is imported: here, before them

    sample, suite = load_all_tasks(args.local)
    contenders = make_contenders(SHAPES[args.size], sample)
    print(f"{describe_model(contenders)}\n", flush=True)

    counts = {}
    for benchmark, tasks in suite.items():
        counts[benchmark] = count_benchmark(contenders.ours, benchmark, tasks)
    comparisons = []
    for benchmark, tasks in sample.items():
        found = compare_on(benchmark, tasks, contenders=contenders, repeats=args.repeats)
        comparisons.append(found)
    print_comparisons(comparisons, counts)


if __name__ == "__main__":
    main()

"""A model for lm-evaluation-harness that computes what prompts share once.

Prompts of multiple-choice tasks repeat each other: the same examples stand before every question of
a subject, the same question before each of its answers. Sorted by their tokens, requests form a
trie, and each of its nodes needs to be computed once:

    three requests      their trie               node      0 1 2 3 4 5 6
    a b c d             a0 -- b1 -- c2 -- d3     token     a b c d e f g
    a b c e              |           `--- e4     position  0 1 2 3 3 1 2
    a f g                `--- f5 -- g6           end       7 5 5 4 5 7 7

`end` is the first later node that is not below a node. So node q sees node k where k <= q < end[k]:
its ancestors and itself. The nodes go through the model in packs, in the order of their numbers. A
pack is one sequence of batch 1, with that rule as its attention mask. Of the cache only the path
stays that the next pack shares. Logits are made where an answer is scored.

This file needs no other of this repository. Its command line is the harness's own with one more
model, `prefix`, which is the default and takes what `hf` takes; the first line needs no hub:

    cd demo && python ../prefix_lm.py --tasks world.yaml --model_args pretrained=base_model
    python prefix_lm.py --tasks mmlu --num_fewshot 5 --model_args pretrained=NAME --device cuda

Prompts, examples and metrics stay the harness's, and so does text that a task has generated. In
float32 the log-likelihoods are those of `hf` but for rounding; in 16 bit, too, the softmax is
float32's, as that of `hf` is with softmax_dtype=float32. A model that cannot be served so (sliding
windows, recurrent state, ...) is scored by the harness's own forward pass, and it says why;
stock=True among the --model_args asks for that. pack=N sets the new tokens of a forward pass. Only
safetensors are loaded, unless use_safetensors=False, and no code of a model's folder is run, unless
trust_remote_code=True. A --config names its own model: `model: prefix`. Memory: the model, one
pack, one path of the trie, and the token ids of all requests.
"""

import functools
import inspect
import json
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

try:
    import lm_eval.utils
    import numpy as np
    import torch
    from lm_eval._cli import HarnessCLI
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM
    from tqdm import tqdm
    from transformers import DynamicCache, PreTrainedModel
except ModuleNotFoundError as error:
    if __name__ != "__main__":
        raise
    print(f"error: no package {error.name} here: pip install 'lm-eval[hf]'", file=sys.stderr)
    sys.exit(2)

CPU_PACK = 384  # new tokens of a forward pass; attention is dense within it, so more is slower
SMALLEST_GPU_PACK = 64
LARGEST_GPU_PACK = 4096  # beyond it, matrix products gain nothing
SMALLEST_PACK = 8  # what is short of memory with this few tokens stays short of it
LOGITS_AT_ONCE = 256  # rows of logits that are made float32 together
ENCODED_AT_ONCE = 1024  # texts tokenised in one call
TEMPLATES = 4096  # compiled prompt templates that are kept; a task has about five
NEEDED = {"position_ids", "past_key_values", "attention_mask", "logits_to_keep"}
TRIAL_LENGTH = 64  # longest request of the trial, in tokens
EXACT = 1e-3  # how far the trial may be off: natural log, sums of float32
ROUNDED = 0.5  # the same, of weights in 16 bit or fewer

Score = tuple[float, bool]  # log-likelihood of an answer, whether greedy decoding gives it


class ScoringError(ValueError):
    """A request that no model can score."""


# --- requests and their trie ----------------------------------------------------------------------


@dataclass(frozen=True)
class Request:
    """An answer to score after its context, as token ids [n] of int32.

    `input_ids` is what a decoder reads: context and answer without the last token, cut from the
    left where that is more than the model's length.
    """

    context: np.ndarray
    answer: np.ndarray
    input_ids: np.ndarray
    task: str
    question: int

    def was_cut(self) -> bool:
        """Tell whether the model is shown less than the whole context."""
        return len(self.context) + len(self.answer) > len(self.input_ids) + 1


@dataclass(frozen=True)
class Trie:
    """The token trie of sorted requests: n nodes in depth-first order, p places to score."""

    tokens: np.ndarray  # [n] token id
    depths: np.ndarray  # [n] position in its sequence
    ends: np.ndarray  # [n] the first later node that is not below this one
    places: np.ndarray  # [p] node whose next token is scored, ascending
    targets: np.ndarray  # [p] that token
    owners: np.ndarray  # [p] number of the request


def make_request(
    context: list[int], answer: list[int], max_length: int, task: str = "", question: int = 0
) -> Request:
    """Build a request whose input has at most `max_length` tokens; ids may be lists or arrays.

    Raises ScoringError where a context or an answer is empty, or an answer longer than the model.
    """
    place = f"{task}, question {question}"
    if len(context) == 0:
        raise ScoringError(f"{place}: a context without a token")
    if not 0 < len(answer) <= max_length:
        raise ScoringError(f"{place}: an answer of {len(answer)} tokens, not 1 to {max_length}")
    whole = np.concatenate([context, answer]).astype(np.int32)
    size = len(context)
    return Request(
        context=whole[:size],
        answer=whole[size:],
        input_ids=whole[-max_length - 1 : -1],
        task=task,
        question=question,
    )


def sort_key(request: Request) -> tuple[bytes, bytes]:
    """Return big-endian bytes, which sort as the ids do, and much faster."""
    return request.input_ids.astype(">i4").tobytes(), request.answer.astype(">i4").tobytes()


def common_prefix(a: np.ndarray, b: np.ndarray) -> int:
    """Count the leading tokens that two id arrays share.

    >>> common_prefix(np.array([5, 6, 7]), np.array([5, 6, 8, 9]))
    2
    """
    size = min(len(a), len(b))
    differs = a[:size] != b[:size]
    if differs.any():
        return int(differs.argmax())
    return size


def count_new_tokens(requests: list[Request]) -> list[int]:
    """Count the nodes that each of sorted requests adds to the trie of those before it."""
    counts = []
    before = np.zeros(0, np.int32)
    for request in requests:
        shared = common_prefix(before, request.input_ids)
        counts.append(len(request.input_ids) - shared)
        before = request.input_ids
    return counts


def build_trie(requests: list[Request]) -> Trie:
    """Build the trie of at least one request, sorted by sort_key()."""
    new = count_new_tokens(requests)
    count = sum(new)
    tokens = np.zeros(count, np.int64)
    depths = np.zeros(count, np.int64)
    ends = np.full(count, count, np.int64)
    path = np.zeros(max(len(request.input_ids) for request in requests), np.int64)
    places = []

    start = 0
    size_before = 0
    for request, added in zip(requests, new, strict=True):
        size = len(request.input_ids)
        shared = size - added
        stop = start + added
        # path[depth] is the node of the request before: from `shared` on, nothing more comes below
        ends[path[shared:size_before]] = start
        tokens[start:stop] = request.input_ids[shared:]
        depths[start:stop] = np.arange(shared, size)
        path[shared:size] = np.arange(start, stop)
        # the token after each of these nodes is one of the answer
        places.append(path[size - len(request.answer) : size].copy())
        start = stop
        size_before = size

    numbers = np.arange(len(requests))
    owners = np.repeat(numbers, [len(request.answer) for request in requests])
    targets = np.concatenate([request.answer for request in requests]).astype(np.int64)
    places = np.concatenate(places)
    order = np.argsort(places, kind="stable")
    return Trie(
        tokens=tokens,
        depths=depths,
        ends=ends,
        places=places[order],
        targets=targets[order],
        owners=owners[order],
    )


# --- the forward pass -----------------------------------------------------------------------------


class CachedPath:
    """What the model remembers: its cache, and the trie's node at each of the cache's positions."""

    def __init__(self) -> None:
        self.cache = DynamicCache()
        self.nodes = np.zeros(0, np.int64)

    def keep(self, positions: np.ndarray | slice) -> None:
        """Keep these positions of every layer's keys and values [1, heads, positions, size]."""
        self.nodes = self.nodes[positions]
        for layer in self.cache.layers:
            if getattr(layer, "keys", None) is not None:  # else it has no cache of its own
                layer.keys = layer.keys[:, :, positions]
                layer.values = layer.values[:, :, positions]


class PrefixScorer:
    """Scores sorted requests by one pass over their trie, `pack` new tokens at a time."""

    def __init__(self, model: PreTrainedModel, pack: int) -> None:
        self.model = model
        self.pack = pack
        self.forwarded = 0  # tokens, of all calls

    def score(
        self, requests: list[Request], advance: Callable[[int], None] | None = None
    ) -> list[Score]:
        """Score requests sorted by sort_key(); `advance` is told of new tokens after each pack."""
        trie = build_trie(requests)
        path = CachedPath()
        log_probabilities = []
        hits = []

        start = 0
        while start < len(trie.tokens):
            stop = min(start + self.pack, len(trie.tokens))
            found = self.try_pack(trie, path, start, stop)
            if found is None:  # once more, with a smaller pack
                continue
            log_probabilities.append(found[0])
            hits.append(found[1])

            path.nodes = np.append(path.nodes, np.arange(start, stop))
            path.keep(np.flatnonzero(trie.ends[path.nodes] > stop))
            self.forwarded += stop - start
            if advance:
                advance(stop - start)
            start = stop

        sums = np.zeros(len(requests))
        np.add.at(sums, trie.owners, torch.cat(log_probabilities).double().cpu().numpy())
        greedy = np.ones(len(requests), bool)
        np.logical_and.at(greedy, trie.owners, torch.cat(hits).cpu().numpy())
        return list(zip(sums.tolist(), greedy.tolist(), strict=True))

    def try_pack(
        self, trie: Trie, path: CachedPath, start: int, stop: int
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Return forward()'s result; None, with self.pack halved, where memory was short."""
        try:
            return self.forward(trie, path, start, stop)
        except RuntimeError as error:  # torch.OutOfMemoryError is one, the CPU's has no type
            if "memory" not in str(error) or self.pack <= SMALLEST_PACK:
                raise

        # not in the handler: until it ends, the error holds on to what filled the memory
        path.keep(slice(0, len(path.nodes)))  # layers before the one that failed have grown
        self.pack //= 2
        torch.cuda.empty_cache()
        print(f"out of memory: packs of {self.pack} tokens from here", file=sys.stderr)
        return None

    def forward(
        self, trie: Trie, path: CachedPath, start: int, stop: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute nodes start to stop, after those of the path; the cache grows by them.

        Returns, of the targets of these nodes [places], the log-probability and whether each is
        the likeliest token.
        """
        device = self.model.device
        tokens = torch.from_numpy(trie.tokens[start:stop]).to(device)
        positions = torch.from_numpy(trie.depths[start:stop]).to(device)
        mask = self.ancestor_mask(trie, path, start, stop)
        first, last = np.searchsorted(trie.places, [start, stop])
        # several answers may be scored at one node: its logits are made once
        rows, row_of = np.unique(trie.places[first:last] - start, return_inverse=True)
        if len(rows) == 0:  # a model makes at least one row
            rows = np.zeros(1, np.int64)

        with torch.inference_mode():
            output = self.model(
                input_ids=tokens[None],
                position_ids=positions[None],
                attention_mask=mask[None, None],
                past_key_values=path.cache,
                use_cache=True,
                logits_to_keep=torch.from_numpy(rows).to(device),
            )
            logits = output.logits[0]
            # in blocks: float32 logits of a whole pack would be larger than all else
            blocks = logits.split(LOGITS_AT_ONCE)
            totals = torch.cat([block.float().logsumexp(-1) for block in blocks])

            row_of = torch.from_numpy(row_of).to(logits.device)
            targets = torch.from_numpy(trie.targets[first:last]).to(logits.device)
            log_probabilities = logits[row_of, targets].float() - totals[row_of]
            hits = logits.argmax(-1)[row_of] == targets
        return log_probabilities, hits

    def ancestor_mask(self, trie: Trie, path: CachedPath, start: int, stop: int) -> torch.Tensor:
        """Return 0 where a node sees another, else the lowest number: [new, path and new]."""
        device = self.model.device
        dtype = self.model.get_input_embeddings().weight.dtype
        nodes = np.append(path.nodes, np.arange(start, stop))
        keys = torch.from_numpy(nodes).to(device)
        ends = torch.from_numpy(trie.ends[nodes]).to(device)
        queries = torch.arange(start, stop, device=device)[:, None]
        hidden = (keys > queries) | (ends <= queries)
        mask = torch.zeros(hidden.shape, dtype=dtype, device=device)
        return mask.masked_fill_(hidden, torch.finfo(dtype).min)


def pick_pack_size(model: PreTrainedModel) -> int:
    """Pick the new tokens of a forward pass: what a third of the GPU's free memory holds."""
    if model.device.type != "cuda":
        return CPU_PACK
    config = model.config.get_text_config()
    hidden = config.hidden_size
    inner = getattr(config, "intermediate_size", None) or 4 * hidden
    # bytes of one token
    activations = 2 * (8 * hidden + 4 * inner)  # 16 bit
    logits = 10 * config.vocab_size  # in 16 bit and twice in 32 bit
    mask_row = 4 * (config.max_position_embeddings + LARGEST_GPU_PACK)

    free, _ = torch.cuda.mem_get_info(model.device)
    fits = free / 3 / (activations + logits + mask_row)
    within = min(max(fits, SMALLEST_GPU_PACK), LARGEST_GPU_PACK)
    return 2 ** int(math.log2(within))


# --- models that cannot be served -----------------------------------------------------------------


def find_obstacle(lm: HFLM) -> str:
    """Say why a model cannot be served by shared prefixes; "" where nothing speaks against it.

    Needed are full causal attention over a cache that grows, positions and a mask as arguments,
    and logits at chosen places.
    """
    model = lm.model
    if hasattr(model, "active_peft_config"):
        if model.active_peft_config.is_prompt_learning:
            return "its adapter adds virtual tokens"
        model = model.get_base_model()
    if lm.backend != "causal":
        return "it is an encoder-decoder"
    if getattr(model, "_is_stateful", False):
        return "it keeps a recurrent state"

    missing = NEEDED - set(inspect.signature(model.forward).parameters)
    if missing:
        return f"it does not take {', '.join(sorted(missing))}"

    config = model.config.get_text_config()
    if config._attn_implementation not in ("sdpa", "eager"):
        return "its attention takes no mask"
    layer_types = getattr(config, "layer_types", None) or []
    others = set(layer_types) - {"full_attention"}
    if others:
        return f"its layers are of the kind {', '.join(sorted(others))}"
    window = getattr(config, "sliding_window", None)
    if window and getattr(config, "use_sliding_window", True) and not layer_types:
        return "its attention sees a sliding window"
    rope = json.dumps(getattr(config, "rope_parameters", None) or {})
    if "dynamic" in rope or "longrope" in rope:
        return "its positions depend on the sequence's length"
    return ""


def try_both_ways(lm: "PrefixLM") -> str:
    """Say how the two ways differ on a few branching requests; "" where they agree."""
    requests = [
        make_request([5, 6, 7, 8], [9, 5], TRIAL_LENGTH),
        make_request([5, 6, 7, 8], [6], TRIAL_LENGTH),
        make_request([5], [7, 7, 8], TRIAL_LENGTH),
    ]
    requests.sort(key=sort_key)
    try:
        ours = lm.scorer.score(requests)
    except Exception as error:  # it takes an argument and does not serve it, in its own way
        fault = str(error).partition("\n")[0]
        return f"it does not serve shared prefixes ({type(error).__name__}: {fault})"

    theirs = lm.score_stock(requests, override_bs=len(requests))
    difference = max(abs(a - b) for (a, _), (b, _) in zip(ours, theirs, strict=True))
    allowed = ROUNDED
    dtype = lm.model.get_input_embeddings().weight.dtype
    if dtype == torch.float32 and not getattr(lm.model, "is_quantized", False):
        allowed = EXACT
    if difference > allowed:
        return f"its results differ by {difference:.2g}"
    return ""


# --- the model ------------------------------------------------------------------------------------


@register_model("prefix")
class PrefixLM(HFLM):
    """The harness's Hugging Face model, which scores answers by shared prefixes.

    Beyond HFLM's arguments: `stock` (the harness's own forward pass), `pack` (new tokens of a
    forward pass), `quantization_config` (a transformers' one, for weights that have none), `quiet`
    (no progress). `why_stock` says why shared prefixes are not used, "" where they are.

    `store`, where it is set, has score(lm, requests), which gets requests sorted by sort_key() and
    returns their scores. It may keep some in files, say; score_part() makes those that are not
    known. After a call, `truncated` has the (task, question) whose context was cut.
    """

    def __init__(
        self,
        pretrained: str | PreTrainedModel,
        stock: bool = False,
        pack: int | None = None,
        quantization_config: Any = None,
        quiet: bool = False,
        **settings: Any,
    ) -> None:
        # the harness's cache errs where one text is split in two ways
        settings.setdefault("logits_cache", False)
        # of the harness's own forward pass, to equal ours: rounded to 16 bit it moves scores
        settings.setdefault("softmax_dtype", "float32")
        settings.setdefault("use_safetensors", True)
        settings.setdefault("trust_remote_code", False)
        self.quantization_config = quantization_config
        self.encoded: dict[str, np.ndarray] = {}
        self.asked: list[Any] = []
        self.truncated: set[tuple[str, int]] = set()
        self.store: Any = None
        super().__init__(pretrained, **settings)

        self.quiet = quiet or self.rank > 0
        self.scorer: PrefixScorer | None = None
        self.why_stock = "it was asked for" if stock else find_obstacle(self)
        if not self.why_stock:
            self.scorer = PrefixScorer(self.model, pack or pick_pack_size(self.model))
            self.why_stock = try_both_ways(self)
        if self.why_stock and not self.quiet:
            name = self.config.name_or_path
            print(f"{name}: the harness's own forward pass: {self.why_stock}", file=sys.stderr)

    def _create_model(self, *args: Any, **settings: Any) -> None:
        """Load the weights, quantised where that was asked for."""
        if self.quantization_config is not None:
            settings["quantization_config"] = self.quantization_config
        super()._create_model(*args, **settings)

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[Score]:
        """Score the harness's requests: each is one answer after one context."""
        self.asked = requests
        self.truncated = set()
        if not self.why_stock:
            self.encoded = self.encode_texts([request.args for request in requests])
        try:
            # it splits contexts from answers by tok_encode() and calls _loglikelihood_tokens()
            return super().loglikelihood(requests, disable_tqdm=True)
        finally:
            self.asked = []
            self.encoded = {}

    def encode_texts(self, pairs: list[tuple[str, str]]) -> dict[str, np.ndarray]:
        """Encode contexts, and contexts with their answers, each text once and many in a call."""
        bos = self.tokenizer.decode(self.prefix_token_id)
        usual = []
        with_bos = []  # texts that bring their own first token
        for context, answer in pairs:
            if not context:  # its answer is encoded alone
                continue
            for text in (context.rstrip(), context + answer):
                group = with_bos if text.startswith(bos) else usual
                group.append(text)

        options = {}
        if self.add_bos_token is not None:
            options["add_special_tokens"] = self.add_bos_token
        encoded = self.encode_group(usual, options)
        encoded.update(self.encode_group(with_bos, {"add_special_tokens": False}))
        return encoded

    def encode_group(self, texts: list[str], options: dict[str, bool]) -> dict[str, np.ndarray]:
        """Encode texts with the tokenizer's options."""
        options = {**options, "return_attention_mask": False, "return_token_type_ids": False}
        encoded = {}
        distinct = list(dict.fromkeys(texts))
        for start in range(0, len(distinct), ENCODED_AT_ONCE):
            block = distinct[start : start + ENCODED_AT_ONCE]
            found = self.tokenizer(block, verbose=False, **options)
            for text, ids in zip(block, found["input_ids"], strict=True):
                encoded[text] = np.array(ids, np.int32)
        return encoded

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **settings: Any
    ) -> list[int] | np.ndarray:
        """Encode a text, or look up what encode_texts() made of it."""
        if add_special_tokens is None and string in self.encoded:
            return self.encoded[string]
        return super().tok_encode(string, add_special_tokens=add_special_tokens, **settings)

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[Score]:
        """Score (key, context ids, answer ids), in any order."""
        made = []
        for number, (_, context, answer) in enumerate(requests):
            task = "a rolling request"
            question = number
            if self.asked:
                task = self.asked[number].task_name
                question = self.asked[number].doc_id
            made.append(make_request(context, answer, self.max_length, task, question))
        self.truncated.update((r.task, r.question) for r in made if r.was_cut())
        if self.truncated and not self.quiet:
            many = f"{len(self.truncated)} questions"
            print(f"{many}: context cut from the left to {self.max_length} tokens", file=sys.stderr)

        order = sorted(range(len(made)), key=lambda number: sort_key(made[number]))
        in_order = [made[number] for number in order]
        if self.store:
            found = self.store.score(self, in_order)
        else:
            found = self.score_at_once(in_order)
        answers = dict(zip(order, found, strict=True))
        return [answers[number] for number in range(len(made))]

    def score_at_once(self, requests: list[Request]) -> list[Score]:
        """Score sorted requests in one go."""
        if not requests:
            return []
        if self.why_stock:
            return self.score_stock(requests, disable_tqdm=self.quiet)
        tokens = sum(count_new_tokens(requests))
        quiet = self.quiet or not self.asked  # rolling requests come a batch at a time
        with tqdm(total=tokens, unit=" tokens", unit_scale=True, disable=quiet) as bar:
            return self.scorer.score(requests, bar.update)

    def score_part(self, requests: list[Request], advance: Callable[[int], None]) -> list[Score]:
        """Score some of sorted requests, for a store that has the others."""
        if not self.why_stock:
            return self.scorer.score(requests, advance)
        found = self.score_stock(requests)
        advance(sum(count_new_tokens(requests)))
        return found

    def score_stock(self, requests: list[Request], **settings: Any) -> list[Score]:
        """Score by the harness's own forward pass: each request whole, in padded batches."""
        settings.setdefault("disable_tqdm", True)
        raw = [(None, r.context.tolist(), r.answer.tolist()) for r in requests]
        return super()._loglikelihood_tokens(raw, **settings)


# --- the command line -----------------------------------------------------------------------------


def unhide_evaluate() -> None:
    """Make `import evaluate` find the package of that name, which metrics of the harness import.

    An evaluate.py beside this file hides it: a script's own folder comes first on sys.path, so that
    folder is taken off; and who has imported that file as `evaluate` has it in sys.modules, so it
    is dropped there. Call this after the last import from this file's folder.
    """
    here = Path(__file__).resolve().parent
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != here]
    found = sys.modules.get("evaluate")
    if found and Path(found.__file__).resolve().parent == here:
        del sys.modules["evaluate"]


def keep_compiled_templates() -> None:
    """Make the harness compile a prompt's template once instead of for every text.

    Measured by benchmarks/request_building.py; the prompts stay the same.
    """
    environment = lm_eval.utils.env
    if not hasattr(environment.from_string, "cache_info"):
        environment.from_string = functools.lru_cache(TEMPLATES)(environment.from_string)


def main() -> None:
    """Run the harness's command line with the model `prefix`, unless another is named."""
    unhide_evaluate()
    keep_compiled_templates()
    lm_eval.utils.setup_logging()
    if sys.argv[1:] in ([], ["-h"], ["--help"]):
        print(__doc__)
    harness = HarnessCLI()
    args = harness.parse_args()
    if args.command == "run" and not args.model and not args.config:
        args.model = "prefix"
    try:
        harness.execute(args)
    except ScoringError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()

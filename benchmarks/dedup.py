"""Time all-pairs de-duplication: ours, the published loop, paraphrase_mining, semhash.

    python benchmarks/dedup.py --local raw
    python benchmarks/dedup.py --local raw --rows 1000 --vectors 5000

Every method gets the same embeddings in a process of its own, one after the other in one run. Rows:
questions of MATH, embedded once into the cache. Rivals that are not in our environment run from
.venv-rivals (benchmarks/requirements.txt).

Prints a table of seconds, peak memory, pairs found and missed; the seconds of embedding; then, for
ours alone, 200,000 random unit vectors against the machine's own matrix-product rate. About 15
minutes on 2 cores, most of it the published loop; 1.3 GB.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

# Last: the package `evaluate` comes before our evaluate.py.
sys.path.append(str(Path(__file__).resolve().parent.parent))
import build_dataset

RIVALS = Path(__file__).resolve().parent.parent / ".venv-rivals/bin/python"
COSINE = 0.8  # from which two rows are alike, the paper's
WIDTH = 384  # of an embedding
EMBEDDED_SAMPLE = 512  # rows from which the seconds of embedding are projected
Pairs = set[tuple[int, int]]  # of row numbers, the earlier row first


@dataclass
class Found:
    """What a method found in its process."""

    seconds: float
    megabytes: float  # at the peak
    pairs: Pairs


def peak_megabytes() -> float:
    """Return the peak resident memory of this program in MB (10^6 bytes); Linux.

    Not getrusage(): its maximum is inherited from the process that started this one.
    """
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    kibibytes = re.search(r"VmHWM:\s+(\d+) kB", status)[1]
    return int(kibibytes) * 1024 / 1e6


def in_order(row: int, other: int) -> tuple[int, int]:
    """Return a pair of rows with the earlier one first."""
    return min(row, other), max(row, other)


def find_all_pairs(vectors: np.ndarray, texts: list[str]) -> Pairs:
    """Return what build_dataset.similar_pairs() finds."""
    found: Pairs = set()
    for lefts, rights, _ in build_dataset.similar_pairs(vectors, vectors, COSINE):
        later = lefts < rights  # each pair is found from both sides, each row beside itself
        found.update(zip(lefts[later].tolist(), rights[later].tolist(), strict=True))
    return found


def find_rows_to_drop(vectors: np.ndarray, texts: list[str]) -> Pairs:
    """Return the (kept, dropped) rows of step 1's whole near de-duplication."""
    rows = [{"id": f"{number:08d}", "output": "x"} for number in range(len(vectors))]
    sizes = [1] * len(vectors)  # one vector a row
    _, dropped = build_dataset.drop_near(rows, vectors, sizes, threshold=COSINE)
    found = set()
    for row in dropped:
        found.add(in_order(int(row["id"]), int(row["kept_id"])))
    return found


def published_loop(vectors: np.ndarray, texts: list[str]) -> Pairs:
    """Return pairs of a loop with one cosine call per row against the growing list of kept rows."""
    from sklearn.metrics.pairwise import cosine_similarity

    kept: list[int] = []
    found = set()
    for row, vector in enumerate(vectors):
        near = np.zeros(0, dtype=int)  # places in the list
        if kept:
            cosines = cosine_similarity([vector], vectors[kept])[0]
            near = np.flatnonzero(cosines >= COSINE)
        if len(near) == 0:
            kept.append(row)
        for place in near:
            found.add((kept[place], row))
    return found


def paraphrase_mining(vectors: np.ndarray, texts: list[str]) -> Pairs:
    """Return the pairs of sentence-transformers' miner on ready embeddings, its default limits."""
    import torch
    from sentence_transformers import util

    found = set()
    for cosine, row, other in util.paraphrase_mining_embeddings(torch.from_numpy(vectors)):
        if cosine >= COSINE:
            found.add(in_order(row, other))
    return found


class ReadyVectors:
    """An embedding model for semhash, of texts whose vectors are there."""

    def __init__(self, vectors: np.ndarray) -> None:
        self.vectors = vectors

    def encode(self, _: Any, **__: Any) -> np.ndarray:
        """Return the vectors of all texts."""
        return self.vectors


def run_semhash(vectors: np.ndarray, texts: list[str]) -> Pairs:
    """Return pairs of semhash on ready embeddings: an approximate index, first row kept."""
    from semhash import SemHash

    numbers = {}
    for number, text in enumerate(texts):
        numbers[f"{number} {text}"] = number  # semhash tells records apart by their text alone
    index = SemHash.from_embeddings(vectors, list(numbers), model=ReadyVectors(vectors))
    result = index.self_deduplicate(threshold=COSINE)

    found = set()
    for item in result.filtered:
        for twin, _ in item.duplicates:
            found.add(in_order(numbers[item.record], numbers[twin]))
    return found


@dataclass
class Method:
    """A way of finding similar rows."""

    name: str
    find: Callable[[np.ndarray, list[str]], Pairs]
    is_rival: bool = False  # runs in the rivals' environment
    lists_all: bool = False  # all pairs; others drop rows as they go, and list no pairs of these


METHODS = [
    Method("ours: all pairs", find_all_pairs, lists_all=True),
    Method("ours: rows to drop", find_rows_to_drop),
    Method("published loop", published_loop, is_rival=True),
    Method("paraphrase_mining", paraphrase_mining, lists_all=True),
    Method("semhash", run_semhash, is_rival=True),
]


def find_method(name: str) -> Method:
    """Return the method of a name."""
    (method,) = [method for method in METHODS if method.name == name]
    return method


def write_input(vectors: np.ndarray, texts: list[str], folder: Path) -> None:
    """Write what a method's process reads."""
    np.save(folder / "vectors.npy", vectors)
    (folder / "texts.json").write_text(json.dumps(texts), encoding="utf-8")


def run_method(method: Method, folder: Path) -> None:
    """Run a method on the stored vectors; print seconds and memory as JSON, store its pairs."""
    vectors = np.load(folder / "vectors.npy")
    texts = json.loads((folder / "texts.json").read_text(encoding="utf-8"))

    # Imports and first calls are not what is measured. Of eight vectors two are alike.
    small = np.eye(vectors.shape[1], dtype=np.float32)[:8]
    small[1] = small[0]
    method.find(small, list("abcdefgh"))

    began = time.perf_counter()
    pairs = method.find(vectors, texts)
    seconds = time.perf_counter() - began
    print(json.dumps({"seconds": seconds, "megabytes": peak_megabytes()}))
    np.save(folder / "pairs.npy", np.array(sorted(pairs)).reshape(-1, 2))


def measure_method(method: Method, folder: Path) -> Found | None:
    """Run a method in a fresh process; None if its package is not installed."""
    python = sys.executable
    if method.is_rival:
        python = str(RIVALS)
        if not RIVALS.exists():
            return None
    command = [python, __file__, "--child", method.name, "--folder", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0 and "ModuleNotFoundError" in done.stderr:
        return None
    assert done.returncode == 0, done.stderr

    measured = json.loads(done.stdout.splitlines()[-1])
    pairs = {tuple(pair) for pair in np.load(folder / "pairs.npy").tolist()}
    return Found(measured["seconds"], measured["megabytes"], pairs)


def brute_force(vectors: np.ndarray) -> Pairs:
    """Return every pair by float64 products, row by row."""
    double = vectors.astype(np.float64)
    found = set()
    for row in range(len(double)):
        later = double[row + 1 :]
        for offset in np.flatnonzero(later @ double[row] >= COSINE).tolist():
            found.add((row, row + 1 + offset))
    return found


def count_both_kept(truth: Pairs, found: Pairs) -> int:
    """Count pairs that are alike and both kept, when the later row of each found pair goes."""
    dropped = {later for _, later in found}
    count = 0
    for row, other in truth:
        if row not in dropped and other not in dropped:
            count += 1
    return count


def print_method(method: Method, found: Found | None, truth: Pairs) -> None:
    """Print one line of the table."""
    if found is None:
        print(f"| {method.name} | not installed | | | |", flush=True)
        return
    if method.lists_all:
        missed = f"{len(truth - found.pairs):,}"
    else:
        missed = f"{count_both_kept(truth, found.pairs):,} kept alike"
    cells = f"{found.seconds:.2f} | {found.megabytes:.0f} | {len(found.pairs):,}"
    print(f"| {method.name} | {cells} | {missed} |", flush=True)


def compare_on_questions(vectors: np.ndarray, texts: list[str]) -> None:
    """Print the table of methods on real rows."""
    truth = brute_force(vectors)
    print(f"{len(vectors):,} rows, {len(truth):,} pairs at cosine >= {COSINE} by brute force\n")
    print("| method | seconds | peak MB | pairs found | pairs missed |")
    print("|:-------|--------:|--------:|------------:|-------------:|")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_input(vectors, texts, folder)
        for method in METHODS:
            print_method(method, measure_method(method, folder), truth)


def matrix_product_rate() -> float:
    """Return the FLOP/s of plain products of one block of rows and one of kept ones."""
    import torch

    rng = np.random.default_rng(0)
    rows = torch.from_numpy(rng.random((build_dataset.BLOCK, WIDTH), np.float32))
    kept = torch.from_numpy(rng.random((build_dataset.BLOCK_COLUMNS, WIDTH), np.float32))
    out = torch.empty(len(rows), len(kept))
    torch.mm(rows, kept.T, out=out)  # the first call is slower

    repeats = 40
    began = time.perf_counter()
    for _ in range(repeats):
        torch.mm(rows, kept.T, out=out)
    seconds = time.perf_counter() - began
    return repeats * 2 * len(rows) * len(kept) * WIDTH / seconds


def compare_with_products(count: int) -> None:
    """Print ours on random unit vectors beside the rate of plain matrix products."""
    product_rate = matrix_product_rate()
    rng = np.random.default_rng(1)
    vectors = rng.normal(size=(count, WIDTH)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    with tempfile.TemporaryDirectory() as scratch:
        write_input(vectors, [], Path(scratch))
        del vectors  # the child has its own
        found = measure_method(find_method("ours: rows to drop"), Path(scratch))

    # Each row is compared with the kept ones before it and with its own block.
    block = build_dataset.BLOCK
    products = sum(block * (start + block) for start in range(0, count, block))
    rate = 2 * WIDTH * products / found.seconds
    print(f"\n{count:,} random unit vectors, none alike: {found.seconds:.1f} s,")
    print(f"{rate / 1e9:.0f} of {product_rate / 1e9:.0f} GFLOP/s", end=" ")
    print(f"({rate / product_rate:.0%}), {found.megabytes:,.0f} MB peak,", end=" ")
    print("imports and vectors included")


def embedding_seconds(texts: list[str]) -> float:
    """Return the seconds to embed all texts without a cache, projected from a random sample."""
    rng = np.random.default_rng(0)
    chosen = [texts[number] for number in rng.choice(len(texts), EMBEDDED_SAMPLE, replace=False)]
    with tempfile.TemporaryDirectory() as cache:
        embedder = build_dataset.Embedder(build_dataset.EMBEDDING_MODEL, Path(cache))
        embedder(["warm up"])
        began = time.perf_counter()
        embedder(chosen)
        seconds = time.perf_counter() - began
    return seconds * len(texts) / EMBEDDED_SAMPLE


def read_questions(folder: Path, limit: int) -> list[str]:
    """Return the first different questions of MATH's files."""
    questions = []
    for path in sorted(folder.glob("math_*.jsonl")):
        with path.open(encoding="utf-8") as file:
            questions += [json.loads(line)["problem"] for line in file]
    return list(dict.fromkeys(questions))[:limit]


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--local", type=Path, default=Path("raw"), help="folder with math/ (default: %(default)s)"
    )
    parser.add_argument(
        "--rows",
        type=int,
        default=12_000,
        help=f"questions, at least {EMBEDDED_SAMPLE} (default: 12,000)",
    )
    parser.add_argument(
        "--vectors", type=int, default=200_000, help="random vectors (default: 200,000)"
    )
    parser.add_argument("--child", help=argparse.SUPPRESS)  # see measure_method()
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main() -> None:
    """Print both comparisons; or, as a child, run one method."""
    args = parse_args()
    if args.child:
        run_method(find_method(args.child), args.folder)
        return

    texts = read_questions(args.local / "math", args.rows)
    embedder = build_dataset.Embedder(build_dataset.EMBEDDING_MODEL, build_dataset.CACHE)
    compare_on_questions(embedder(texts), texts)
    print(f"\nembedding the rows: {embedding_seconds(texts):.0f} s", end=" ")
    print(f"(projected from {EMBEDDED_SAMPLE} of them)")
    compare_with_products(args.vectors)


if __name__ == "__main__":
    main()

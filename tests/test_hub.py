"""Holds: a stand-in of the hub gives every source's rows, from the pinned commit, as their raw
records convert; what cannot be loaded is named, all of it at once."""

import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, quote, unquote

import pytest
from conftest import ROOT, assert_refused
from datasets import Dataset, Image

import build_dataset as build

MAIN = "f" * 40  # the commit of every main branch


class Hub(BaseHTTPRequestHandler):
    """Serves ROOT/datasets/OWNER/NAME[@COMMIT]/ as the hub does, ROOT/web/ as another host."""

    root: Path  # set by the fixture

    def do_GET(self) -> None:
        path, _, query = unquote(self.path).partition("?")
        if found := re.fullmatch(r"/api/datasets/([^/]+/[^/]+)(?:/([a-z-]+)/(\w+)/?(.*))?", path):
            name, verb, commit, below = found.groups()
            folder = self.folder(name, commit or "main")
            self.answer_api(folder, verb or "revision", below, "recursive=true" in query)
        elif found := re.fullmatch(r"/datasets/([^/]+/[^/]+)/resolve/(\w+)/(.+)", path):
            name, commit, file = found.groups()
            self.answer_file(self.folder(name, commit), file)
        else:
            self.answer_file(self.root / "web", path.lstrip("/"))

    do_HEAD = do_POST = do_GET

    def folder(self, name: str, commit: str) -> Path:
        place = name if commit in ("main", MAIN) else f"{name}@{commit}"
        return self.root / "datasets" / place

    def answer_api(self, folder: Path, verb: str, below: str, recursive: bool) -> None:
        files = [self.entry(folder, path) for path in sorted(folder.rglob("*"))]
        commit = folder.name.partition("@")[2] or MAIN
        if not folder.is_dir():
            self.answer(404, b"", {"X-Error-Code": "RevisionNotFound"})
        elif verb == "revision":
            siblings = [{"rfilename": file["path"]} for file in files if file["type"] == "file"]
            self.answer_json({"id": folder.name, "sha": commit, "siblings": siblings})
        elif verb == "paths-info":
            body = self.rfile.read(int(self.headers["Content-Length"])).decode()
            asked = parse_qs(body).get("paths") or json.loads(body)["paths"]
            self.answer_json([file for file in files if file["path"] in asked])
        elif not (folder / below).is_dir():
            self.answer(404, b"", {"X-Error-Code": "EntryNotFound"})
        else:
            paths = (folder / below).rglob("*") if recursive else (folder / below).iterdir()
            self.answer_json([self.entry(folder, path) for path in sorted(paths)])

    def entry(self, folder: Path, path: Path) -> dict:
        kind = "file" if path.is_file() else "directory"
        size = path.stat().st_size
        return {"type": kind, "oid": MAIN, "size": size, "path": str(path.relative_to(folder))}

    def answer_file(self, folder: Path, name: str) -> None:
        commit = folder.name.partition("@")[2] or MAIN
        headers = {"X-Repo-Commit": commit, "ETag": f'"{quote(name, safe="")}"'}
        if (folder / name).is_file():
            self.answer(200, (folder / name).read_bytes(), headers)
        else:
            self.answer(404, b"", {**headers, "X-Error-Code": "EntryNotFound"})

    def answer_json(self, value: object) -> None:
        self.answer(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[int]:
    """The port of a stand-in that serves tmp_path/hub."""
    handler = type("Handler", (Hub,), {"root": tmp_path / "hub"})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_port
    server.shutdown()
    server.server_close()


def run_build(port: int, tmp_path: Path, sources: str, *args: str) -> subprocess.CompletedProcess:
    """Run step 1 on a sources.toml, with the stand-in in place of the hub and of other hosts."""
    (tmp_path / "sources.toml").write_text(
        re.sub(r"https://(github.com|arb.duckai.org)", f"http://localhost:{port}", sources)
    )
    code = (
        "import sys, pathlib, build_dataset as build; "
        "build.SOURCES = pathlib.Path(sys.argv.pop(1)); build.run_main(build.main)"
    )
    flags = ["--out", tmp_path / "out", "--cache", tmp_path / "cache", *args]
    home = {"HF_ENDPOINT": f"http://127.0.0.1:{port}", "HF_HOME": str(tmp_path / "home")}
    environment = {**os.environ, **home}
    environment.pop("HF_HUB_OFFLINE", None)
    return subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "sources.toml"), *map(str, flags)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=environment,
    )


def steps_of(number: int, human: dict | None, generation: int | None) -> dict:
    """A solved row of PRM800K: phase 1 has no generation, phase 2 nothing written by a person."""
    answer = {"completions": [{"text": f"# Answer\n\n{number}", "rating": 1}]}
    step = {"completions": [{"text": "Add.", "rating": 1}], "human_completion": human}
    return {
        "generation": generation,
        "question": {"problem": f"What is {number} + 0?", "ground_truth_answer": str(number)},
        "label": {"steps": [step, answer], "finish_reason": "solution"},
    }


CHOICES = ["iron", "wood"]
HUMAN = {"text": "By hand.", "rating": 1}
PICTURE = {"bytes": b"nothing that could be decoded", "path": "p.png"}
CASE = {"Problem Statement": "Who is liable?", "Answer Candidates": CHOICES}
CONFIGS = build.load_sources()["math"]["hub"]["names"]
SCIBENCH = build.load_sources()["scibench"]["hub"]["data_files"]
FILES = {  # {source: {file: its raw rows}} in the layouts that the sources publish
    "prm800k": {
        "phase1_train.jsonl": [steps_of(1, HUMAN, None), steps_of(2, None, None)],
        "phase2_train.jsonl": [steps_of(3, None, 9), steps_of(4, None, 9)],
    },
    "math": {f"{c}/train-0.parquet": [{"problem": c, "solution": "s"}] for c in CONFIGS},
    "scienceqa": {
        "data/train-0.parquet": [
            {
                "question": "Which is a metal?",
                "choices": CHOICES,
                "hint": "",
                "skill": "s",
                "lecture": "",
                "solution": "Iron.",
            }
        ]
    },
    "scibench": {
        file: [{"problem_text": file, "answer_number": "5"}]
        for file in SCIBENCH
        if not file.endswith("_sol.json")
    },
    "reclor": {
        "train.json": [{"context": "A theorem.", "question": "So?", "answers": CHOICES, "label": 1}]
    },
    "theoremqa": {
        "data/test-0.parquet": [
            {"Question": "How many primes?", "Answer": "3", "Picture": None},
            {"Question": "How many in the picture?", "Answer": "4", "Picture": PICTURE},
        ]
    },
    "leetcode": {"data/train-0.parquet": [{"prompt": "Sort.", "full_code": "sorted(x)"}]},
    "airoboros": {"instructions.jsonl": [{"instruction": "A proof", "response": "r"}]},
    "tigerbot": {
        "code.json": [
            {"instruction": "Use python to solve", "input": "Reverse it.", "output": "x[::-1]"},
            {"instruction": "Use java to solve", "input": "Reverse it.", "output": "none"},
        ]
    },
    "openbookqa": {
        "additional/train-0.parquet": [
            {
                "question_stem": "What burns?",
                "choices": {"text": CHOICES, "label": ["A", "B"]},
                "answerKey": "B",
                "fact1": "Wood burns.",
            }
        ]
    },
    "arb": {
        "law": [{**CASE, "Final Answer": "A"}],
        "mcatReading/test": [{**CASE, "Problem Statement": "Why?", "Solution": "B. So."}],
        "mcatReading/val": [{**CASE, "Problem Statement": "When?", "Solution": "A. Then."}],
    },
    "guanaco": {"a_train.jsonl": [{"text": "### Human: Physics?### Assistant: Yes."}]},
}
for solved in set(SCIBENCH) - set(FILES["scibench"]):  # with one more column
    row = {"problem_text": solved, "answer_number": "5", "solution": "worked"}
    FILES["scibench"][solved] = [row]


def place_of(root: Path, hub: dict, file: str) -> Path:
    """Where the stand-in has a file of a source: in a repository's commit, or at an address."""
    if hub["path"] == "json":
        return root / "web" / hub["folder"].split("/", 3)[3] / file
    commit = f"@{hub['revision']}" if "revision" in hub else ""
    return root / "datasets" / f"{hub['path']}{commit}" / file


def write_rows(file: Path, rows: list[dict]) -> None:
    """Write rows as the file's suffix says: Parquet, one record a line, or one list."""
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.suffix == ".parquet":
        data = Dataset.from_list(rows)
        if "Picture" in data.features:
            data = data.cast_column("Picture", Image())
        data.to_parquet(str(file))
    elif file.suffix == ".jsonl":
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        file.write_text(json.dumps(rows))


def write_repositories(root: Path) -> None:
    """Write every source's files; of a repository that is pinned, main holds nothing."""
    for source, files in FILES.items():
        hub = build.load_sources()[source]["hub"]
        (root / "datasets" / hub["path"]).mkdir(parents=True, exist_ok=True)
        for file, rows in files.items():
            write_rows(place_of(root, hub, file), rows)
        if source == "reclor":
            write_rows(place_of(root, hub, "val.json"), files["train.json"])

        splits = [
            f'- config_name: {name}\n  data_files: [{{split: train, path: "{name}/train-*"}}]\n'
            for name in hub.get("names", [])
        ]
        if splits:
            card = f"---\nconfigs:\n{''.join(splits)}---\n"
            place_of(root, hub, "README.md").write_text(card)


def test_every_source_gives_the_rows_of_its_files(hub: int, tmp_path: Path) -> None:
    write_repositories(tmp_path / "hub")
    done = run_build(hub, tmp_path, build.SOURCES.read_text(), "--cosine-threshold", "1")
    assert done.returncode == 0, done.stderr

    rows = [json.loads(line) for line in (tmp_path / "out/dataset.jsonl").open()]
    table = json.loads((tmp_path / "out/run.json").read_text())["counts"]["sources"]
    assert [line["source"] for line in table] == list(FILES)
    for line in table:
        source = line["source"]
        convert = build.make_converter(build.load_sources()[source])
        raws = [raw for file in FILES[source].values() for raw in file]
        texts = [convert(raw) for raw in raws]
        found = {tuple(row[f] for f in build.FIELDS) for row in rows if row["source"] == source}
        assert found and found == set(texts) - {None}, source
        assert (line["read"], line["rule"]) == (len(raws), texts.count(None)), source
        assert line["kept"] == len(raws) - texts.count(None), source


def test_faults_of_all_sources_are_named_at_once(hub: int, tmp_path: Path) -> None:
    write_repositories(tmp_path / "hub")
    text = build.SOURCES.read_text()
    pinned = build.load_sources()["guanaco"]["hub"]["revision"]
    for old, new in (('split = "test"', ""), ("nuprl/", "nobody/"), (pinned, "0" * 40)):
        assert old in text
        text = text.replace(old, new)

    names = "theoremqa,leetcode,airoboros,guanaco"
    done = run_build(hub, tmp_path, text, "--sources", names)
    assert_refused(done, "source guanaco", "timdettmers", "0" * 40)
    faults = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(faults) == 3
    assert "source theoremqa: TIGER-Lab/TheoremQA has no split train, only test" in faults[0]
    assert "source leetcode: nobody/" in faults[1]
    assert not (tmp_path / "out").exists()

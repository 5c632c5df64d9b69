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
from typing import Any
from urllib.parse import parse_qs, quote, unquote

import pytest
from conftest import ROOT, assert_refused
from datasets import Dataset, Image

import build_dataset as build

Record = dict[str, Any]
MAIN = "f" * 40  # the commit of every main branch
API = r"/api/datasets/([^/]+/[^/]+)(?:/([a-z-]+)/(\w+)/?(.*))?"  # name, verb, commit, folder
RESOLVE = r"/datasets/([^/]+/[^/]+)/resolve/(\w+)/(.+)"  # name, commit, file


class Hub(BaseHTTPRequestHandler):
    """Serves ROOT/datasets/OWNER/NAME[@COMMIT]/ as the hub does, ROOT/web/ as another host."""

    root: Path  # set by the fixture

    def do_GET(self) -> None:
        path, _, query = unquote(self.path).partition("?")
        if found := re.fullmatch(API, path):
            name, verb, commit, below = found.groups()
            folder = self.folder(name, commit or "main")
            self.answer_api(folder, verb or "revision", below, recursive="recursive=true" in query)
        elif found := re.fullmatch(RESOLVE, path):
            name, commit, file = found.groups()
            self.answer_file(self.folder(name, commit), file)
        else:
            self.answer_file(self.root / "web", path.lstrip("/"))

    do_HEAD = do_POST = do_GET

    def folder(self, name: str, commit: str) -> Path:
        """Where a commit of a repository lies."""
        if commit in ["main", MAIN]:
            return self.root / "datasets" / name
        return self.root / "datasets" / f"{name}@{commit}"

    def commit_of(self, folder: Path) -> str:
        return folder.name.partition("@")[2] or MAIN

    def answer_api(self, folder: Path, verb: str, below: str, recursive: bool) -> None:
        if not folder.is_dir():
            self.answer(404, b"", {"X-Error-Code": "RevisionNotFound"})
        elif verb == "revision":
            self.answer_revision(folder)
        elif verb == "paths-info":
            self.answer_paths(folder)
        elif not (folder / below).is_dir():
            self.answer(404, b"", {"X-Error-Code": "EntryNotFound"})
        else:
            paths = (folder / below).glob("**/*" if recursive else "*")
            self.answer_json([self.entry(folder, path) for path in sorted(paths)])

    def answer_revision(self, folder: Path) -> None:
        """Answer with a repository's commit and the names of its files."""
        siblings = []
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                siblings.append({"rfilename": str(path.relative_to(folder))})
        commit = self.commit_of(folder)
        self.answer_json({"id": folder.name, "sha": commit, "siblings": siblings})

    def answer_paths(self, folder: Path) -> None:
        """Describe those of the paths in the request's body, a form or JSON, that exist."""
        length = int(self.headers["Content-Length"])
        body = self.rfile.read(length).decode()
        asked = parse_qs(body)
        if "paths" not in asked:
            asked = json.loads(body)
        existing = [folder / name for name in asked["paths"] if (folder / name).exists()]
        self.answer_json([self.entry(folder, path) for path in existing])

    def entry(self, folder: Path, path: Path) -> Record:
        """Describe a file or folder as the hub lists it."""
        kind = "file" if path.is_file() else "directory"
        name = str(path.relative_to(folder))
        return {"type": kind, "oid": MAIN, "size": path.stat().st_size, "path": name}

    def answer_file(self, folder: Path, name: str) -> None:
        etag = quote(name, safe="")
        headers = {"X-Repo-Commit": self.commit_of(folder), "ETag": f'"{etag}"'}
        if (folder / name).is_file():
            self.answer(200, (folder / name).read_bytes(), headers)
        else:
            headers["X-Error-Code"] = "EntryNotFound"
            self.answer(404, b"", headers)

    def answer_json(self, value: object) -> None:
        body = json.dumps(value).encode()
        self.answer(200, body, {"Content-Type": "application/json"})

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


RUN_WITH_SOURCES = """
import pathlib, sys
import build_dataset as build
build.SOURCES = pathlib.Path(sys.argv.pop(1))
build.run_main(build.main)
"""


def run_build(
    port: int, tmp_path: Path, sources: str, flags: list[str]
) -> subprocess.CompletedProcess:
    """Run step 1 on a sources.toml, with the stand-in in place of the hub and of other hosts."""
    here = f"http://localhost:{port}"
    sources = re.sub(r"https://(github.com|arb.duckai.org)", here, sources)
    file = tmp_path / "sources.toml"
    file.write_text(sources)

    environment = dict(os.environ)
    environment.pop("HF_HUB_OFFLINE", None)
    environment["HF_ENDPOINT"] = f"http://127.0.0.1:{port}"
    environment["HF_HOME"] = str(tmp_path / "home")
    command = [sys.executable, "-c", RUN_WITH_SOURCES, str(file)]
    command += ["--out", str(tmp_path / "out"), "--cache", str(tmp_path / "cache")]
    command += flags
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)


# --- what the sources hold ------------------------------------------------------------------------


def solved_by_steps(
    number: int, human: Record | None = None, generation: int | None = None
) -> Record:
    """A solved row of PRM800K: phase 1 has no generation, phase 2 nothing written by a person."""
    completions = [{"text": "Add.", "rating": 1}]
    step = {"completions": completions, "human_completion": human}
    answer = {"completions": [{"text": f"# Answer\n\n{number}", "rating": 1}]}
    return {
        "generation": generation,
        "question": {"problem": f"What is {number} + 0?", "ground_truth_answer": str(number)},
        "label": {"steps": [step, answer], "finish_reason": "solution"},
    }


def math_files() -> dict[str, list[Record]]:
    """One file for each configuration."""
    files = {}
    for config in build.load_sources()["math"].hub["names"]:
        files[f"{config}/train-0.parquet"] = [{"problem": config, "solution": "s"}]
    return files


def scibench_files() -> dict[str, list[Record]]:
    """Files of one problem; some have one more column."""
    files = {}
    for file in build.load_sources()["scibench"].hub["data_files"]:
        row = {"problem_text": file, "answer_number": "5"}
        if file.endswith("_sol.json"):
            row["solution"] = "worked"
        files[file] = [row]
    return files


CHOICES = ["iron", "wood"]
# {source: {file: its raw rows}}, laid out as they are published
FILES: dict[str, dict[str, list[Record]]] = {}

BY_HAND = {"text": "By hand.", "rating": 1}
FILES["prm800k"] = {
    "phase1_train.jsonl": [solved_by_steps(1, human=BY_HAND), solved_by_steps(2)],
    "phase2_train.jsonl": [solved_by_steps(3, generation=9), solved_by_steps(4, generation=9)],
}

FILES["math"] = math_files()

SCIENCEQA = {
    "question": "Which is a metal?",
    "choices": CHOICES,
    "hint": "",
    "skill": "s",
    "lecture": "",
    "solution": "Iron.",
}
FILES["scienceqa"] = {"data/train-0.parquet": [SCIENCEQA]}

FILES["scibench"] = scibench_files()

RECLOR = {"context": "A theorem.", "question": "So?", "answers": CHOICES, "label": 1}
FILES["reclor"] = {"train.json": [RECLOR]}

PICTURE = {"bytes": b"nothing that could be decoded", "path": "p.png"}
FILES["theoremqa"] = {
    "data/test-0.parquet": [
        {"Question": "How many primes?", "Answer": "3", "Picture": None},
        {"Question": "How many in the picture?", "Answer": "4", "Picture": PICTURE},
    ]
}

FILES["leetcode"] = {"data/train-0.parquet": [{"prompt": "Sort.", "full_code": "sorted(x)"}]}

FILES["airoboros"] = {"instructions.jsonl": [{"instruction": "A proof", "response": "r"}]}

FILES["tigerbot"] = {
    "code.json": [
        {"instruction": "Use python to solve", "input": "Reverse it.", "output": "x[::-1]"},
        {"instruction": "Use java to solve", "input": "Reverse it.", "output": "none"},
    ]
}

OPENBOOKQA = {
    "question_stem": "What burns?",
    "choices": {"text": CHOICES, "label": ["A", "B"]},
    "answerKey": "B",
    "fact1": "Wood burns.",
}
FILES["openbookqa"] = {"additional/train-0.parquet": [OPENBOOKQA]}

CASE = {"Problem Statement": "Who is liable?", "Answer Candidates": CHOICES}
FILES["arb"] = {
    "law": [{**CASE, "Final Answer": "A"}],
    "mcatReading/test": [{**CASE, "Problem Statement": "Why?", "Solution": "B. So."}],
    "mcatReading/val": [{**CASE, "Problem Statement": "When?", "Solution": "A. Then."}],
}

FILES["guanaco"] = {"a_train.jsonl": [{"text": "### Human: Physics?### Assistant: Yes."}]}


def place_of(root: Path, hub: Record, file: str) -> Path:
    """Where the stand-in has a file of a source: in a repository's commit, or at an address."""
    if hub["path"] == "json":
        scheme, _, host, folder = hub["folder"].split("/", 3)
        return root / "web" / folder / file
    repository = hub["path"]
    if "revision" in hub:
        repository += f"@{hub['revision']}"
    return root / "datasets" / repository / file


def write_rows(file: Path, rows: list[Record]) -> None:
    """Write rows as the file's suffix says: Parquet, one record a line, or one list."""
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.suffix == ".parquet":
        data = Dataset.from_list(rows)
        if "Picture" in data.features:
            data = data.cast_column("Picture", Image())
        data.to_parquet(str(file))
    elif file.suffix == ".jsonl":
        lines = [json.dumps(row) for row in rows]
        file.write_text("\n".join(lines))
    else:
        file.write_text(json.dumps(rows))


def write_card(file: Path, configs: list[str]) -> None:
    """Write the README.md of a repository whose configurations lie in folders of their names."""
    lines = ["---", "configs:"]
    for name in configs:
        lines.append(f"- config_name: {name}")
        lines.append(f'  data_files: [{{split: train, path: "{name}/train-*"}}]')
    lines.append("---\n")
    file.write_text("\n".join(lines))


def write_repositories(root: Path) -> None:
    """Write every source's files; of a repository that is pinned, main holds nothing."""
    for source, files in FILES.items():
        hub = build.load_sources()[source].hub
        (root / "datasets" / hub["path"]).mkdir(parents=True, exist_ok=True)
        for file, rows in files.items():
            write_rows(place_of(root, hub, file), rows)
        if source == "reclor":
            write_rows(place_of(root, hub, "val.json"), files["train.json"])
        if "names" in hub:
            write_card(place_of(root, hub, "README.md"), hub["names"])


def test_every_source_gives_the_rows_of_its_files(hub: int, tmp_path: Path) -> None:
    write_repositories(tmp_path / "hub")
    done = run_build(hub, tmp_path, build.SOURCES.read_text(), flags=["--cosine-threshold", "1"])
    assert done.returncode == 0, done.stderr

    found: dict[str, set] = {source: set() for source in FILES}
    for line in (tmp_path / "out/dataset.jsonl").read_text().splitlines():
        row = json.loads(line)
        found[row["source"]].add(tuple(row[field] for field in build.FIELDS))

    run = json.loads((tmp_path / "out/run.json").read_text())
    table = run["counts"]["sources"]
    assert [counts["source"] for counts in table] == list(FILES)
    for counts in table:
        source = counts["source"]
        convert = build.make_converter(build.load_sources()[source])
        expected = []  # None: a row that a rule of the source leaves out
        for rows in FILES[source].values():
            expected += [convert(row) for row in rows]
        by_rule = expected.count(None)
        assert counts["read"] == len(expected), source
        assert counts["rule"] == by_rule, source
        assert counts["kept"] == len(expected) - by_rule, source
        assert found[source], source
        assert found[source] == set(expected) - {None}, source


def test_faults_of_all_sources_are_named_at_once(hub: int, tmp_path: Path) -> None:
    write_repositories(tmp_path / "hub")
    sources = build.SOURCES.read_text()
    commit = build.load_sources()["guanaco"].hub["revision"]
    for right, wrong in [('split = "test"', ""), ("nuprl/", "nobody/"), (commit, "0" * 40)]:
        assert right in sources
        sources = sources.replace(right, wrong)

    names = "theoremqa,leetcode,airoboros,guanaco"
    done = run_build(hub, tmp_path, sources, flags=["--sources", names])
    assert_refused(done, "source guanaco", "timdettmers", "0" * 40)
    faults = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(faults) == 3
    assert "source theoremqa: TIGER-Lab/TheoremQA has no split train, only test" in faults[0]
    assert "source leetcode: nobody/" in faults[1]
    assert not (tmp_path / "out").exists()

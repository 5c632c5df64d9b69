"""Holds: the embedded data can be made anew byte for byte, and the world keeps its own rules."""

import importlib
import json
import random
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from conftest import ROOT, WORLD


@pytest.fixture
def maker(monkeypatch) -> ModuleType:
    """The script that has made the world."""
    monkeypatch.syspath_prepend(ROOT / "demo")
    return importlib.import_module("make_base_model")


def read_rows(path: Path) -> list[dict[str, Any]]:
    lines = path.read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def test_the_world_is_made_by_its_script(tmp_path) -> None:
    command = [sys.executable, ROOT / "demo/make_base_model.py", "--data-only", "--out", tmp_path]
    subprocess.run(command, check=True, capture_output=True)
    for name in ["train.jsonl", "test.jsonl"]:
        assert (tmp_path / "world" / name).read_bytes() == (WORLD / name).read_bytes()


def mentions(texts: list[str], names: set[str]) -> list[str]:
    """Every name that stands in a text, once for each text."""
    found = []
    for text in texts:
        found += [name for name in names if name in text]
    return found


def test_nobody_is_asked_about_twice_and_test_people_never_before(maker) -> None:
    rng = random.Random(maker.SEED)
    people = maker.make_people(rng)
    maker.make_rows(people, rng)  # it draws from rng before the documents do
    names = {person["name"] for person in people}

    instructions = [row["instruction"] for row in read_rows(WORLD / "train.jsonl")]
    in_training = mentions(instructions, names)
    assert len(in_training) == maker.TRAIN_PEOPLE
    assert len(set(in_training)) == maker.TRAIN_PEOPLE

    questions = [row["question"] for row in read_rows(WORLD / "test.jsonl")]
    in_test = mentions(questions, names)
    assert len(in_test) == 2 * maker.TEST_PEOPLE
    assert len(set(in_test)) == maker.TEST_PEOPLE
    assert set(in_test).isdisjoint(in_training)

    documents = maker.pretraining_documents(people, rng)
    with_answers = [text for text in documents if "?\n" in text or ".\n" in text]
    assert with_answers
    assert set(in_test).isdisjoint(mentions(with_answers, names))


def test_right_answers_stand_in_every_place() -> None:
    rows = read_rows(WORLD / "test.jsonl")
    answers = [row["answer"] for row in rows]
    for place in range(4):
        assert answers.count(place) == len(rows) / 4
    for row in rows:
        assert len(set(row["choices"])) == 4


@pytest.mark.parametrize("text", ["Saltmere", "x = {\n\t'é': 日}\n\n", "### Response:\nSaltmere"])
def test_the_base_model_reads_any_text(text: str) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(ROOT / "demo/base_model")
    input_ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(input_ids, skip_special_tokens=True) == text


def test_the_base_model_is_small_and_reads_long_prompts() -> None:
    from transformers import AutoConfig

    folder = ROOT / "demo/base_model"
    assert sum(path.stat().st_size for path in folder.iterdir()) < 5_000_000
    assert AutoConfig.from_pretrained(folder).max_position_embeddings >= 4096

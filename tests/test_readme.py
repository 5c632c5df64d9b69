"""Holds: the README is short, and each figure in it stands in benchmarks/README.md with its unit;
what it offers to edit exists; each source of sources.toml has a place and a licence."""

import importlib
import re

from conftest import ROOT

import build_dataset

LONGEST = 12 * 1024  # bytes
UNITS = "GB|MB|%|ms|s|minutes|hours|h|times|points|pairs|questions a second|tokens/s"
FIGURE = re.compile(rf"(?<![\w.,+-])(\d[\d,]*(?:\.\d+)?) ({UNITS})(?![\w/])")
OF_HOW_MANY = re.compile(r"(\d[\d.,]*) of (\d[\d,]*)|of (\d[\d,]*) [^.;]*? (\d[\d,]*)[;.]")


def read(name: str) -> str:
    """A document's prose on one line, so that a line's end parts no number from its unit."""
    text = (ROOT / name).read_text(encoding="utf-8")
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    return " ".join(prose.split())


def test_the_readme_is_two_screens() -> None:
    assert (ROOT / "README.md").stat().st_size <= LONGEST


def test_every_figure_stands_with_its_unit_in_the_benchmarks_readme() -> None:
    tables = read("benchmarks/README.md")
    found = FIGURE.findall(read("README.md"))
    assert len(found) >= 12
    for number, unit in found:
        pattern = rf"(?<![\d.,]){re.escape(number)} {re.escape(unit)}(?![\w/])"
        assert re.search(pattern, tables), f"{number} {unit}"


def test_a_figure_that_nobody_measured_is_noticed() -> None:
    assert FIGURE.findall("in 17 minutes, with 3.5 GB, 2 times") == [
        ("17", "minutes"),
        ("3.5", "GB"),
        ("2", "times"),
    ]


def test_shares_stand_in_the_tables() -> None:
    """Of `1,319 ... 1,312` and `3.5 of 1,000` each number is a cell or a word of the tables."""
    tables = read("benchmarks/README.md")
    found = OF_HOW_MANY.findall(read("README.md"))
    assert found
    for groups in found:
        for number in filter(None, groups):
            assert re.search(rf"(?<![\d.,]){re.escape(number)}(?![\d])", tables), number


def test_what_the_readme_offers_to_edit_exists() -> None:
    guide = read("README.md").partition("| to change | edit |")[2].partition("## Limits")[0]
    offers = re.findall(r"((?:`[A-Z_]+`(?:, )?)+) in `(\w+)\.py`", guide)
    assert len(offers) >= 7
    for names, script in offers:
        text = (ROOT / f"{script}.py").read_text(encoding="utf-8")
        for name in re.findall(r"`(\w+)`", names):
            assert re.search(rf"^{name}\b.* = ", text, flags=re.MULTILINE), (script, name)
        assert importlib.util.find_spec(script)


def test_every_source_has_a_place_and_a_licence() -> None:
    for name, source in build_dataset.load_sources().items():
        assert source.licence, name
        assert source.hub.get("path") or name == "extra", name


def test_every_file_of_the_readme_exists() -> None:
    for name in re.findall(
        r"`((?:demo|tests|benchmarks)/[\w./]*|\w+\.(?:py|toml|sh))`", read("README.md")
    ):
        assert (ROOT / name).exists(), name

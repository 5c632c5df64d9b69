"""Draw the pictures of the terminal UI that README shows, from the recorded folder.

    python demo/make_screens.py

Writes demo/screens/{review,watch,results,pipeline}.svg and prints nothing; 16 seconds, 65 MB. The
same recording gives the same bytes. The fonts that Textual would load from the web are taken out: a
viewer's own monospace font is used.
"""

import asyncio
import os
import re
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

# Last: the package `evaluate` comes before our evaluate.py.
sys.path.append(str(Path(__file__).resolve().parent.parent))
import tui

HERE = Path(__file__).resolve().parent


@dataclass
class Screen:
    """One picture: the terminal's size, and the keys that lead to what is shown."""

    name: str
    columns: int
    lines: int
    keys: list[str]


SCREENS = [
    Screen("review", columns=140, lines=30, keys=["d", "a", "g", "s", "a", "n"]),
    Screen("watch", columns=120, lines=37, keys=["2"]),
    Screen("results", columns=140, lines=13, keys=["3"]),
    Screen("pipeline", columns=100, lines=18, keys=["4"]),
]

CELL_WIDTH = 12.2  # of a character, in the picture's units
INDENTED_TEXT = re.compile(
    r'x="(?P<left>[\d.]+)"'
    r'(?P<y> y="[\d.]+")'
    r' textLength="(?P<width>[\d.]+)"'
    r"(?P<rest>[^>]*>)"
    r"(?P<spaces>(?:&#160;)+)"
    r"(?=[^<&])"  # a text of nothing but spaces stays
)
FONT_FACE = re.compile(r"@font-face \{.*?\}", re.DOTALL)
FONT_FAMILY = re.compile(r"font-family:[^;]*;")


def copy_recording(folder: Path) -> None:
    """Copy the recorded run to folder/out, beside what its run.json files name as inputs."""
    shutil.copytree(HERE / "recorded", folder / "out")
    (folder / "demo").symlink_to(HERE)
    (folder / "sources.toml").symlink_to(HERE.parent / "sources.toml")


async def draw(screen: Screen) -> str:
    """Return Textual's own SVG of a screen, from the folder out/ of the working directory."""
    app = tui.PlatypusApp(Path("out"), "ann")
    async with app.run_test(size=(screen.columns, screen.lines)) as pilot:
        await pilot.pause(1)  # seconds, in which the files are read
        for key in screen.keys:
            await pilot.press(key)
        await pilot.pause(2)
        return app.export_screenshot(title=f"python tui.py --demo: {screen.name}")


def replace_indent(match: re.Match) -> str:
    """Return a text's start without its leading spaces, moved right by as many cells."""
    indent = CELL_WIDTH * match["spaces"].count("&")
    left = float(match["left"]) + indent
    width = float(match["width"]) - indent
    return f'x="{left:.1f}"{match["y"]} textLength="{width:.1f}"{match["rest"]}'


def plain_svg(svg: str) -> str:
    """Return a picture that every viewer draws alike, without a font from the web.

    Some viewers drop a text's leading spaces, which would move what stands behind them.
    """
    svg = FONT_FACE.sub("", svg)
    svg = INDENTED_TEXT.sub(replace_indent, svg)
    svg = FONT_FAMILY.sub("font-family: Menlo, Consolas, monospace;", svg)
    lines = [line.rstrip() for line in svg.splitlines()]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Draw every screen from a fresh copy of the recording: some keys write verdicts."""
    pictures = HERE / "screens"
    pictures.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        for screen in SCREENS:
            folder = Path(scratch) / screen.name
            copy_recording(folder)
            os.chdir(folder)  # run.json names its inputs relative to this folder
            svg = asyncio.run(draw(screen))
            (pictures / f"{screen.name}.svg").write_text(plain_svg(svg))


if __name__ == "__main__":
    main()

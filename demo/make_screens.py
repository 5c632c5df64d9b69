"""Draw the pictures of the terminal UI that README shows, from the recorded folder.

    python demo/make_screens.py

Writes demo/screens/{review,watch,results,pipeline}.svg. The fonts that Textual would load from the
web are taken out: a viewer's own monospace font is used.
"""

import asyncio
import os
import re
import shutil
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent))
SCREENS = {  # name -> columns, lines, keys
    "review": (140, 30, ["d", "a", "g", "s", "a", "n"]),
    "watch": (120, 37, ["2"]),
    "results": (140, 13, ["3"]),
    "pipeline": (100, 18, ["4"]),
}


CELL = 12.2  # width of a character in the picture
LEADING = r'x="([\d.]+)"( y="[\d.]+") textLength="([\d.]+)"([^>]*>)((?:&#160;)+)(?=[^<&])'


def move(match: re.Match) -> str:
    """A text without its leading spaces, which some viewers drop, that many cells to the right."""
    x, y, length, rest, spaces = match.groups()
    by = CELL * spaces.count("&")
    return f'x="{float(x) + by:.1f}"{y} textLength="{float(length) - by:.1f}"{rest}'


async def draw(folder: Path, name: str) -> str:
    """One screen as SVG."""
    import tui

    columns, lines, keys = SCREENS[name]
    app = tui.make_app(tui.parse_args([str(folder), "--reviewer", "ann"]))
    async with app.run_test(size=(columns, lines)) as pilot:
        await pilot.pause(1)
        await pilot.press(*keys)
        await pilot.pause(2)
        svg = app.export_screenshot(title=f"python tui.py --demo: {name}")
    svg = re.sub(r"@font-face \{.*?\}", "", svg, flags=re.DOTALL)
    svg = re.sub(LEADING, move, svg)
    svg = re.sub(r"font-family:[^;]*;", "font-family: Menlo, Consolas, monospace;", svg)
    return "\n".join(line.rstrip() for line in svg.splitlines()) + "\n"


def main() -> None:
    """Draw all screens."""
    with tempfile.TemporaryDirectory() as place:
        for name in SCREENS:
            folder = Path(place) / name / "out"
            shutil.copytree(HERE / "recorded", folder)
            (folder.parent / "demo").symlink_to(HERE)  # for the inputs that run.json names
            (folder.parent / "sources.toml").symlink_to(HERE.parent / "sources.toml")
            os.chdir(folder.parent)
            (HERE / "screens").mkdir(exist_ok=True)
            (HERE / f"screens/{name}.svg").write_text(asyncio.run(draw(Path("out"), name)))


if __name__ == "__main__":
    main()

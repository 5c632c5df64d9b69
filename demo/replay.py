"""Write a recorded training log again, a line each fifth of a second, as finetune.py would.

    python demo/replay.py DIR

DIR holds a train_log.jsonl and a run.json; python tui.py --demo starts this on a copy. It holds the
folder as a step at work does, and ends with the log or when its standard input is closed. It prints
nothing. The demo's log takes 51 seconds, and the process 14 MB.
"""

import fcntl
import json
import select
import sys
from pathlib import Path

LINES_AT_ONCE = 40  # written before the first pause
PAUSE = 0.2  # seconds between two lines


def stdin_closes_within(seconds: float) -> bool:
    """Tell whether standard input has ended after at most so many seconds; nothing is read."""
    readable, _, _ = select.select([sys.stdin], [], [], seconds)
    return bool(readable)


def rewrite_log(log: Path) -> None:
    """Cut the log to its first lines, then append the others one by one."""
    lines = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(b"".join(lines[:LINES_AT_ONCE]))

    for line in lines[LINES_AT_ONCE:]:
        if stdin_closes_within(PAUSE):  # whoever started this is gone
            sys.exit()
        with log.open("ab") as file:
            file.write(line)


def main() -> None:
    """Hold the folder by its mark while the log is written."""
    folder = Path(sys.argv[1])
    run = json.loads((folder / "run.json").read_bytes())
    mark = folder / ".unfinished"

    # A step locks its mark for as long as it works: by that the terminal UI knows it is alive.
    with mark.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        print(run["command"], file=file, flush=True)
        rewrite_log(folder / "train_log.jsonl")
        mark.unlink()


if __name__ == "__main__":
    main()

"""Write a recorded training log again, a line each fifth of a second, as finetune.py would.

    python demo/replay.py DIR

DIR holds a train_log.jsonl and run.json; python tui.py --demo starts this on a copy. It holds the
folder as a step does that is at work, and ends with the log or when its standard input is closed.
"""

import fcntl
import json
import select
import sys
from pathlib import Path

FIRST = 40  # lines that are there at once
PAUSE = 0.2  # seconds between two lines

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    mark, path = folder / ".unfinished", folder / "train_log.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    command = json.loads((folder / "run.json").read_bytes())["command"]
    with mark.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        print(command, file=held, flush=True)
        path.write_bytes(b"".join(lines[:FIRST]))
        for line in lines[FIRST:]:
            if select.select([sys.stdin], [], [], PAUSE)[0]:  # closed: whoever started it is gone
                sys.exit()
            with path.open("ab") as log:
                log.write(line)
        mark.unlink()

#!/usr/bin/env bash
# The five steps on the embedded data (demo/), from nothing but Python 3.11 or newer.
# Sets up .venv once, then runs the lines a user would type; safe to run again.
set -euo pipefail
cd "$(dirname "$0")"
source demo/setup.sh

python build_dataset.py --local demo/data --sources math,prm800k,scibench,theoremqa,openbookqa,scienceqa,guanaco --extra world=demo/world/train.jsonl --out out/demo/dataset --overwrite
python check_contamination.py --dataset out/demo/dataset/dataset.jsonl --local demo/data --extra-benchmark world=demo/world/test.jsonl --out out/demo/contamination --overwrite
python finetune.py --base-model demo/base_model --data out/demo/contamination/clean.jsonl --targets all --learning-rate 4e-3 --epochs 4 --warmup-steps 10 --out out/demo/adapter --overwrite
python merge.py --adapter out/demo/adapter --out out/demo/merged --overwrite
python evaluate.py --model demo/base_model --model out/demo/merged --local demo/data --task demo/world.yaml --contamination out/demo/contamination --out out/demo/eval --overwrite

cat <<'NEXT'

That was the whole method on embedded data: `world` is what was taught, the benchmarks show wiring.
Review the flagged pairs and see the loss curve:
    source .venv/bin/activate && python tui.py out/demo
Walk from the scores back to the rows, every file hashed again:
    python tui.py out/demo/eval --lineage
The real run, on a GPU (it loads the sources and benchmarks from the hub):
    python build_dataset.py
    python check_contamination.py
    python tui.py                          # review the pairs; one key per verdict
    python check_contamination.py apply    # write the clean rows by your verdicts
    python finetune.py
    python merge.py
    python evaluate.py --contamination out/contamination
NEXT

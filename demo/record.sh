#!/usr/bin/env bash
# Makes demo/recorded, which `python tui.py --demo` shows: the five steps on the embedded data, from
# the repository's root, in a temporary folder. Of the pairs on `world`, whose questions are alike
# by design, the 30 most similar are kept.
set -euo pipefail
cd "$(dirname "$0")/.."
source demo/setup.sh
here=$PWD place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
ln -s "$here/demo" "$place/demo"
cd "$place"
python "$here/build_dataset.py" --local demo/data --sources math,prm800k,scibench,theoremqa,openbookqa,scienceqa,guanaco --extra world=demo/world/train.jsonl
python "$here/check_contamination.py" --local demo/data --extra-benchmark world=demo/world/test.jsonl
python "$here/finetune.py" --base-model demo/base_model --targets all --learning-rate 4e-3 --epochs 15 --warmup-steps 10 --val-set-size 20 --sample-every 60 --save-every 60
python "$here/merge.py"
python "$here/evaluate.py" --local demo/data --task demo/world.yaml --contamination out/contamination
rm -rf "$here/demo/recorded"
for file in dataset/run.json contamination/run.json adapter/run.json adapter/train_log.jsonl merged/run.json eval/run.json eval/results.json; do
  mkdir -p "$here/demo/recorded/$(dirname $file)"
  cp "out/$file" "$here/demo/recorded/$file"
done
sed -i "s#$here/##g" "$here"/demo/recorded/*/run.json
grep -v '"source": "world"' out/contamination/pairs.jsonl > "$here/demo/recorded/contamination/pairs.jsonl"
grep '"source": "world"' out/contamination/pairs.jsonl | head -n 30 >> "$here/demo/recorded/contamination/pairs.jsonl" || true
cd "$here"
python - demo/recorded <<'PYTHON'  # of the outputs, each run.json keeps those that are recorded
import json, sys
from pathlib import Path
sys.path.insert(0, ".")
from build_dataset import describe_file
for path in Path(sys.argv[1]).glob("*/run.json"):
    run = json.loads(path.read_text())
    kept = [name for name in run["outputs"] if (path.parent / name).exists()]
    run["outputs"] = {name: describe_file(path.parent / name) for name in kept}
    path.write_text(json.dumps(run, indent=2) + "\n")
PYTHON

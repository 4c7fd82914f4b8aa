#!/usr/bin/env bash
# The commands a user would type, on a real model: demo.sh MODEL FOLDER. Ends with a table of what came of it.
set -euo pipefail
model=$1 folder=$2
mkdir -p "$folder"
file=$folder/SmolLM2-135M-4bit.qtm

run() { printf '\n$ %s\n' "$*" >&2; "$@"; }

run qtool compress "$model" --bits 4 --calibration builtin:train --samples 32 --seq-len 512 \
    -o "$file" --force
run qtool inspect "$file"
run qtool eval perplexity "$file" --baseline "$model" --data builtin:test --seq-len 512 --max-windows 16 --json \
    | tee "$folder/perplexity.json"
run qtool generate "$file" --prompt "The capital of France is" --max-new-tokens 24

qtool inspect "$file" --json > "$folder/inspect.json"
python - "$folder" "$file" <<'PY'
import json, sys
from pathlib import Path

folder, file = Path(sys.argv[1]), Path(sys.argv[2])
measured = json.loads((folder / "perplexity.json").read_text())
found = json.loads((folder / "inspect.json").read_text())
before, source = found["parameters"] * 2, found["provenance"]["source_files"][0]["bytes"]
print(f"""
                   before      after
size            {before / 1e6:7.1f} MB {file.stat().st_size / 1e6:7.1f} MB   (before: 16 bits a parameter)
bits per weight {16:10.3f} {found['bits_per_weight']:10.3f}
perplexity      {measured['baseline_perplexity']:10.3f} {measured['perplexity']:10.3f}
mean KL         {0:10.4f} {measured['kl_mean']:10.4f}   nats

This model was stored in 4 bits before ({source / 1e6:.1f} MB), so its figures flatter any 4-bit method: see README.""")
PY

#!/usr/bin/env bash
# The commands a user would type, on a real model: demo.sh MODEL FOLDER. Ends with a table of what came of it.
set -euo pipefail
model=$1 folder=$2
mkdir -p "$folder"
file=$folder/SmolLM2-135M-4bit.qtm

run() { printf '\n$ %s\n' "$*"; "$@"; }

run qtool compress "$model" --bits 4 --group-size 64 --calibration builtin:train --samples 32 --seq-len 512 \
    -o "$file" --force
run qtool inspect "$file"
printf '\n$ qtool eval perplexity %s --baseline %s --data builtin:test --seq-len 512 --max-windows 16 --json\n' "$file" "$model"
qtool eval perplexity "$file" --baseline "$model" --data builtin:test --seq-len 512 --max-windows 16 --json \
    | tee "$folder/perplexity.json"
run qtool generate "$file" --prompt "The capital of France is" --max-new-tokens 24

qtool inspect "$file" --json > "$folder/inspect.json"
python - "$folder" "$file" <<'PY'
import json, sys
from pathlib import Path

folder, file = Path(sys.argv[1]), Path(sys.argv[2])
measured = json.loads((folder / "perplexity.json").read_text())
found = json.loads((folder / "inspect.json").read_text())
before = found["parameters"] * 2
print(f"""
                   before      after
size            {before / 1e6:7.1f} MB {file.stat().st_size / 1e6:7.1f} MB   (before: 16 bits a parameter)
bits per weight {16:10.3f} {found['bits_per_weight']:10.3f}
perplexity      {measured['baseline_perplexity']:10.3f} {measured['perplexity']:10.3f}
mean KL         {0:10.4f} {measured['kl_mean']:10.4f}   nats""")
PY

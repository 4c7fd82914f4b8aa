"""Logits of an exported folder as transformers gives them, with the engine it finds. In an environment of its own."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, GPTQConfig


def main() -> None:
    folder, ids_file, logits_file = map(Path, sys.argv[1:4])
    options = {}
    if AutoConfig.from_pretrained(folder).quantization_config["quant_method"] == "gptq":
        # The kernel that can multiply in float32: GPTQModel's faster one for CPUs has activations in bf16.
        options["quantization_config"] = GPTQConfig(bits=4, backend="torch")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, device_map="cpu", **options).eval()
    # Scales too, which GPTQModel leaves in fp16: weights would be rounded to that. transformers' own method refuses.
    torch.nn.Module.float(model)
    with torch.no_grad():
        logits = model(torch.from_numpy(np.load(ids_file))).logits.float()
    np.save(logits_file, logits.numpy())
    kinds = {type(module).__name__ for name, module in model.named_modules() if name.endswith("_proj")}
    print(json.dumps({"linears": sorted(kinds)}))


if __name__ == "__main__":
    main()

"""Logits of an exported folder as transformers gives them, with the engine it finds. In an environment of its own."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AwqConfig, GPTQConfig


def main() -> None:
    folder, ids_file, logits_file = map(Path, sys.argv[1:4])
    # The plain kernels, of float32 and for AWQ of fp16: GPTQModel's faster ones for CPUs have activations in bf16.
    method = AutoConfig.from_pretrained(folder).quantization_config["quant_method"]
    options = {}
    if method == "gptq":
        options["quantization_config"] = GPTQConfig(bits=4, backend="torch")
    elif method == "awq":
        options["quantization_config"] = AwqConfig(bits=4, backend="torch_awq")
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

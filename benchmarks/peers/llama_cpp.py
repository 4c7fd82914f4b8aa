"""llama.cpp's file types with an importance matrix, written by its own `llama_model_quantize`.

That function is what llama-quantize calls, so which tensor gets which type is its choice: attn_v and ffn_down get
more bits in the mixes, and a tensor whose rows are no multiple of 256 long falls back to a type of 32-weight blocks.
The option `fold` stores several rows as one until 256 divides their length. No llama.cpp can run such a file, but it
shows what the types are worth on a model whose shape suits them.
"""

from __future__ import annotations

import ctypes
from collections import Counter
from math import gcd
from pathlib import Path

import numpy as np
from cyllama.llama.llama_cpp import LlamaModelQuantizeParams, model_quantize
from gguf import MODEL_ARCH, GGUFReader, GGUFWriter, LlamaFileType, dequantize, get_tensor_name_map
from safetensors.numpy import load_file

from benchmarks.peers.job import Job, Matrix

SUPER_BLOCK = 256  # weights that share one set of scales in the K and IQ types
SUFFIX = ".weight"


def main() -> None:
    job = Job.from_command_line()
    folder, fold = Path(job.output), bool(job.options["fold"])
    linears = job.linears()
    names = _gguf_names(list(linears), job.config()["num_hidden_layers"])
    importance = load_file(job.importance)
    lines = {name: _rows_per_line(weight.shape[1]) if fold else 1 for name, weight in linears.items()}
    folded = {names[n]: np.ascontiguousarray(w.reshape(-1, w.shape[1] * lines[n])) for n, w in linears.items()}
    _write_gguf(folder / "f32.gguf", folded, job.config())
    tiled = {names[name]: np.tile(importance[name], lines[name]) for name in linears}
    _quantize(folder / "f32.gguf", folder / "quantized.gguf", job.options["type"], tiled)
    stored = {tensor.name: tensor for tensor in GGUFReader(folder / "quantized.gguf").tensors}
    decoded = {name: dequantize(stored[names[name]].data, stored[names[name]].tensor_type) for name in linears}
    weights = {name: decoded[name].reshape(linears[name].shape) for name in linears}
    kinds = Counter(tensor.tensor_type.name for tensor in stored.values())
    note = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
    job.finish(weights, sum(int(tensor.n_bytes) for tensor in stored.values()), note)


def _rows_per_line(in_features: int) -> int:
    return SUPER_BLOCK // gcd(SUPER_BLOCK, in_features)


def _gguf_names(names: list[str], n_layers: int) -> dict[str, str]:
    """What llama.cpp calls these tensors: it chooses types by name."""
    table = get_tensor_name_map(MODEL_ARCH.LLAMA, n_layers)
    return {name: f"{table.get_name(name.removesuffix(SUFFIX))}{SUFFIX}" for name in names}


def _write_gguf(path: Path, tensors: dict[str, Matrix], config: dict[str, int]) -> None:
    """The blocks' linears alone, with the numbers llama.cpp chooses the mixes by: embeddings stay as they were."""
    writer = GGUFWriter(path, "llama")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _quantize(source: Path, target: Path, kind: str, importance: dict[str, Matrix]) -> None:
    params = LlamaModelQuantizeParams()
    params.nthread = 1
    params.ftype = LlamaFileType[f"MOSTLY_{kind}"].value
    table = _importance_table(importance)
    _point_to(table, params)
    model_quantize(str(source), str(target), params)


class _Entry(ctypes.Structure):
    """llama.h, struct llama_model_imatrix_data."""

    _fields_ = (("name", ctypes.c_char_p), ("data", ctypes.POINTER(ctypes.c_float)), ("size", ctypes.c_size_t))


class _Params(ctypes.Structure):
    """llama.h, struct llama_model_quantize_params as far as the importance matrix."""

    _fields_ = (("numbers", ctypes.c_int32 * 4), ("flags", ctypes.c_bool * 6), ("imatrix", ctypes.POINTER(_Entry)))


def _importance_table(importance: dict[str, Matrix]) -> ctypes.Array[_Entry]:
    entries = [_Entry(name.encode(), (ctypes.c_float * v.size)(*v), v.size) for name, v in importance.items()]
    return (_Entry * (len(entries) + 1))(*entries)  # the last one's name is NULL, which ends the table


def _point_to(table: ctypes.Array[_Entry], params: LlamaModelQuantizeParams) -> None:
    """Set `params.imatrix`, for which cyllama has no setter: its object is Python's header, a table of methods, and
    the C struct. The struct's first number is compared with the object's, in case another release lays it out anew."""
    header = object.__basicsize__ + ctypes.sizeof(ctypes.c_void_p)
    inside = _Params.from_address(id(params) + header)
    if inside.numbers[0] != params.nthread or inside.numbers[1] != params.ftype:
        raise SystemExit("cyllama: its parameters do not lie where release 0.2.18 has them; install that one")
    inside.imatrix = table


if __name__ == "__main__":
    main()

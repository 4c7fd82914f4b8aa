"""`qtool compress`: its options, parsed and handed on."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import click

from qtool import api
from qtool.cli_options import defaults_of, emit, json_option, text_field_option

Command: TypeAlias = Callable[..., Any]


def _options(*options: Callable[[Command], Command]) -> Callable[[Command], Command]:
    """Several decorators as one, in the order of `--help`."""

    def apply(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return apply


_method_options = _options(
    click.option(
        "--for", "engine", metavar="[gptq|vllm|compressed-tensors|awq|gguf:q4_k|...]",
        help="A recipe whose export is exact and fast there: gptq, vllm, compressed-tensors, awq, or "
        "gguf: with one of q2_k to q6_k, q4_0, q4_1, q5_0, q5_1, q8_0.",
    ),
    click.option(
        "--bits", type=float,
        help="Bits per code of the linear layers, 2 to 8; trellis: 1 to 6; q_k: 2 to 6; q_1: 4, 5; q_0: 4, 5, 8; below "
        "1: as --method ternary, with a word if experts take more.  [default: 4]",
    ),
    click.option(
        "--method", show_default=True, metavar="[gptq|spqr|rtn|int8|ternary]",
        help="spqr: gptq with groups of 16, rounded statistics and outliers; rtn: round to nearest, no calibration; "
        "int8: LLM.int8, rows in 8 bits and inputs with outliers in 16; ternary: gptq, experts as --expert-format "
        "ternary.",
    ),
    click.option(
        "--format", metavar="[int|nf4|fp4|fitted|trellis|ternary|q_k|q_1|q_0]",
        help="What a code stands for. fitted: levels fitted to each layer; trellis: a step on a path of levels, 1 to 6 "
        "bits; ternary: zero or one of two values of the row; q_k, q_1, q_0: llama.cpp's blocks of that name, by "
        "--bits: q_k --bits 4 is Q4_K.  [default: int; trellis for gptq and spqr with --effort best or a target]",
    ),
    click.option(
        "--expert-format", metavar="[ternary]",
        help="The same for the experts of a mixture alone: ternary takes less than one bit where 80% are zeros.",
    ),
    click.option(
        "--ternary-grid", metavar="[minmax|mse]",
        help="The two values of a ternary row. minmax: its least and largest weight, as QMoE; mse: those that lose "
        "least, of which fewer weights are zero.  [default: minmax]",
    ),
    click.option(
        "--effort", show_default=True, metavar="[fast|default|best]",
        help="fast: no search of ranges, a trellis of 64 states; best: --format trellis with 512 (256 otherwise).",
    ),
    click.option(
        "--group-size", type=int,
        help="Inputs that share a scale; -1: a row. A target may halve groups of 64 and more.  "
        "[default: 128; spqr: 16; nf4, fp4, fitted: 64; trellis: -1]",
    ),
    click.option("--sym/--asym", "symmetric", help="int: zero fixed in the middle.  [default: asym]"),
    click.option("--stat-bits", type=int, help="Bits of scales and zeros, rounded in sets.  [default: fp16; spqr: 3]"),
    click.option("--stat-rows", type=int, help="Rows that make such a set.  [default: 16]"),
    click.option("--double-quant", is_flag=True, help="Scales of nf4, fp4 and fitted in 8 bits, as QLoRA has them."),
    click.option("--outliers", metavar="SHARE", help="Weights kept in 16 bits, as 0.5%.  [default: none]"),
    click.option(
        "--outlier-threshold", type=float,
        help="The same by SpQR's relative threshold; higher means fewer.  [spqr: 0.2; trellis: those that pay]",
    ),
    click.option(
        "--activation-threshold", type=float,
        help="int8: an input that reaches it keeps its weights in 16 bits.  [default: 6]",
    ),
    click.option("--outlier-features", type=int, help="int8: that many of the largest inputs instead."),
    click.option("--act-order/--no-act-order", help="Most active inputs first.  [default: act-order]"),
    click.option("--percdamp", "--damp", type=float, help="Damping of the Hessian.  [default: 0.01]"),
    click.option("--scale-search/--no-scale-search", help="Search each group's range.  [default: on]"),
    click.option("--input-scales/--no-input-scales", help="A factor for each input.  [default: on]"),
    click.option(
        "--embeddings", type=int,
        help="Bits of embeddings and head; 16: as is.  [default: 8; left to --target-size where that is given]",
    ),
)  # fmt: skip
_layer_options = _options(
    click.option(
        "--target-size",
        metavar="SIZE",
        help="Spread bits over the layers so that the file is at most that large, as 90MB.",
    ),
    click.option(
        "--target-bits", type=float, help="The same for bits per weight of the blocks' linears, all they store counted."
    ),
    click.option(
        "--fused", is_flag=True, help="A target gives one width to linears that read one input: q, k, v; gate, up."
    ),
    click.option(
        "--layer",
        "layers",
        multiple=True,
        metavar="REGEX=BITS",
        help="Other bits where REGEX is found in the name; the first wins.",
    ),
    click.option(
        "--ignore", multiple=True, metavar="REGEX", help="Leave layers dense where REGEX is found in the name."
    ),
)
_calibration_options = _options(
    click.option(
        "--calibration", "--dataset", show_default=True, metavar="SOURCE",
        help="A .txt, .jsonl or .parquet file or a folder of them, a dataset of the hub (wikitext2, c4, ptb, "
        "org/name), builtin, or self; comma-joined mixes.",
    ),
    text_field_option,
    click.option("--samples", "--nsamples", type=int, show_default=True, help="Calibration windows."),
    click.option("--seq-len", "--seqlen", type=int, show_default=True, help="Tokens in a window."),
    click.option("--seed", type=int, show_default=True, help="Places the windows."),
    click.option(
        "--independent", is_flag=True,
        help="Calibrate each block on the uncompressed ones before it: a cluster then solves blocks in parallel.",
    ),
    click.option(
        "--min-expert-tokens", type=int, show_default=True,
        help="An expert that sees fewer is calibrated on what all experts of its block see.",
    ),
)  # fmt: skip
_run_options = _options(
    click.option("--dry-run", is_flag=True, help="Print the plan: size, bits, memory and time; write no file."),
    click.option("--force", is_flag=True, help="Replace the output if it exists."),
    click.option("--max-memory", metavar="SIZE", help="Resident memory that the run keeps to, as 2GB.  [default: any]"),
    click.option(
        "--work-dir", type=click.Path(path_type=Path),
        help="What an interrupted run goes on from.  [default: OUTPUT.work]",
    ),
    click.option("--restart", is_flag=True, help="Drop what an earlier run left in the work folder."),
    click.option(
        "--cluster", metavar="ADDRESS",
        help="Layers are solved by the workers of a Ray cluster, with the same result; local: on this machine.",
    ),
    click.option("--log-file", type=click.Path(path_type=Path), help="Append one JSON line for each layer."),
    click.option(
        "--trust-remote-code", is_flag=True, help="Run the code of MODEL's tokenizer; a file never holds any."
    ),
)  # fmt: skip


@defaults_of(api.compress)
@click.command()
@click.argument("model")
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), help="Output file.  [default: NAME-4bit.qtm, NAME-90MB.qtm]"
)
@_method_options
@_layer_options
@_calibration_options
@_run_options
@json_option
def compress(model: str, dry_run: bool, as_json: bool, **options: Any) -> None:
    """Compress MODEL: a Hugging Face folder, a hub id or a GGUF file.

    \b
    qtool compress ./my-model --bits 4
    qtool compress ./my-model --bits 3 --group-size 64 --calibration notes.txt -o small.qtm
    qtool compress ./my-model --target-size 90MB
    qtool compress ./my-model --method spqr --outliers 0.5%
    qtool compress ./my-mixture --method ternary
    qtool compress ./my-model --bits 3 --layer 'down_proj=4' --ignore 'layers[.]0[.]'
    qtool compress ./my-model --for vllm
    qtool compress org/name --dry-run

    A run that was killed goes on where it was when the same command is given again.
    """
    from qtool.commands import format_estimate, format_result

    warn = partial(click.echo, err=True)
    if dry_run:
        estimate = api.dry_run(model, warn=warn, **options).to_dict()
        emit(estimate, format_estimate(estimate), as_json)
        return
    result = api.compress(model, warn=warn, **options).to_dict()
    emit(result, format_result(result), as_json)

"""`qtool export` and `qtool import`: their options, parsed and handed on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from qtool import api
from qtool.cli_options import defaults_of, emit, json_option


@defaults_of(api.export)
@click.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option(
    "--to", type=click.Choice(api.EXPORTS), required=True,
    help="dense: a Hugging Face folder of decoded weights; transformers: one as small as FILE, for programs that "
    "import qtool; gptq, compressed-tensors, awq: one that other engines load; gguf: a file for llama.cpp.",
)  # fmt: skip
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), required=True, metavar="PATH",
    help="New folder, or for gguf a new file.",
)  # fmt: skip
@click.option(
    "--dtype", type=click.Choice(["float32", "float16", "bfloat16"]),
    help="Of tensors that are not quantized.  [default: what holds them exactly]",
)  # fmt: skip
@click.option(
    "--gptq-version", type=click.Choice(["1", "2"]), callback=lambda context, option, value: value and int(value),
    help="gptq: 1 for readers that know no other; it has no zero of 0.  [default: 2]",
)  # fmt: skip
@click.option(
    "--gguf-type", metavar="TYPE", help="gguf: q4_0, q4_1, q5_0, q5_1, q8_0, or q2_k to q6_k, of the blocks' linears."
    "  [default: for each the smallest that holds it]",
)  # fmt: skip
@click.option(
    "--calibration", metavar="SOURCE",
    help="gguf with --lossy: text that says which inputs matter where weights are fitted anew.  [default: builtin]",
)  # fmt: skip
@click.option("--lossy", is_flag=True, help="Round again what the format cannot hold; each tensor's error is told.")
@click.option("--force", is_flag=True, help="Replace the output if it exists.")
@json_option
def export(file: Path, output: Path, to: str, as_json: bool, **options: Any) -> None:
    """Write the model in FILE in a format that other tools load.

    \b
    qtool export model.qtm --to dense -o ./decoded
    qtool export model.qtm --to transformers -o ./packed
    qtool export model.qtm --to gptq -o ./model-gptq
    qtool export model.qtm --to gguf -o model.gguf
    qtool export model.qtm --to gguf --gguf-type q4_k --lossy -o model-q4_k.gguf

    Values are those of FILE, bit for bit, or nothing is written: where a format has no place for something, the
    message says what, and what error --lossy would add. Codes of a width that a format lacks are written in the next.
    """
    from qtool.finished import format_export

    report = api.export(file, output, to=to, **options)
    emit({"folder": str(output), "to": to} | report.to_dict(), format_export(output, report), as_json)


@defaults_of(api.import_)
@click.command("import")
@click.argument("source")
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, metavar="FILE", help="New .qtm file.")
@click.option(
    "--assume-v1-zeros", is_flag=True,
    help="GPTQ of version 1 with zeros, by a program that is not known to store them less one: it did.",
)  # fmt: skip
@click.option("--force", is_flag=True, help="Replace the output if it exists.")
@json_option
def import_(source: str, output: Path, as_json: bool, **options: Any) -> None:
    """Take over a model that is quantized already, as it is: a folder of GPTQ, AWQ or compressed-tensors, or a GGUF.

    \b
    qtool import ./model-gptq -o model.qtm
    qtool import model-Q4_K_M.gguf -o model.qtm --json

    Codes, scales and zeros are those of SOURCE. A tensor whose scales or zeros a .qtm file cannot hold is decoded and
    stored whole, and listed.
    """
    from qtool.finished import format_import

    result = api.import_(source, output, **options).to_dict()
    emit(result, format_import(result), as_json)

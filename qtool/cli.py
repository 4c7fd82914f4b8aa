"""The command line: parse, call one function, print. Results go to stdout, everything else to stderr."""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import click

from qtool import __version__
from qtool.cli_group import CommandGroup


@click.group(cls=CommandGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="qtool")
def main() -> None:
    """Compress a causal language model into one small, checksummed file, and measure what it cost.

    \b
    qtool compress ./my-model --bits 4
    qtool inspect my-model-4bit.qtm
    qtool eval perplexity my-model-4bit.qtm --baseline ./my-model
    """


def _emit(values: dict[str, Any], text: str, as_json: bool) -> None:
    click.echo(json.dumps(values, indent=2) if as_json else text)


json_option = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
text_field_option = click.option(
    "--text-field",
    default="text",
    show_default=True,
    help="Field of .jsonl and .parquet files that holds the text.",
)


@main.command()
@click.argument("model")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Output file.  [default: NAME-BITSbit.qtm]")
@click.option("--bits", type=int, default=4, show_default=True, help="Bits per code of the linear layers, 2 to 8.")
@click.option("--group-size", type=int, default=128, show_default=True, help="Inputs that share a scale; -1: a row.")
@click.option("--method", default="gptq", show_default=True, help="gptq, or rtn (round to nearest, no calibration).")
@click.option("--sym/--asym", "symmetric", default=False, help="Zero fixed in the middle.  [default: asym]")
@click.option("--act-order/--no-act-order", default=True, help="Most active inputs first.  [default: act-order]")
@click.option("--percdamp", "--damp", type=float, default=0.01, show_default=True, help="Damping of the Hessian.")
@click.option("--scale-search/--no-scale-search", default=True, help="Search each group's range.  [default: on]")
@click.option("--input-scales/--no-input-scales", default=True, help="A factor for each input.  [default: on]")
@click.option("--embeddings", type=int, default=8, show_default=True, help="Bits of embeddings and head; 16: as is.")
@click.option(
    "--calibration", "--dataset", default="builtin", show_default=True, metavar="SOURCE",
    help="A .txt, .jsonl or .parquet file or a folder of them, a dataset of the hub (wikitext2, c4, ptb, org/name), "
    "builtin, or self; comma-joined mixes.",
)  # fmt: skip
@text_field_option
@click.option("--samples", "--nsamples", type=int, default=128, show_default=True, help="Calibration windows.")
@click.option("--seq-len", "--seqlen", type=int, default=2048, show_default=True, help="Tokens in a window.")
@click.option("--seed", type=int, default=0, show_default=True, help="Places the windows.")
@click.option("--dry-run", is_flag=True, help="Print size, bits per weight, memory and time; quantize nothing.")
@click.option("--force", is_flag=True, help="Replace the output if it exists.")
@click.option("--max-memory", metavar="SIZE", help="Resident memory that the run keeps to, as 2GB.  [default: any]")
@click.option(
    "--work-dir", type=click.Path(path_type=Path), help="What an interrupted run goes on from.  [default: OUTPUT.work]"
)
@click.option("--restart", is_flag=True, help="Drop what an earlier run left in the work folder.")
@click.option("--log-file", type=click.Path(path_type=Path), help="Append one JSON line for each layer.")
@click.option("--trust-remote-code", is_flag=True, help="Run the code of MODEL's tokenizer; a file never holds any.")
@json_option
def compress(
    model: str,
    output: Path | None,
    dry_run: bool,
    force: bool,
    max_memory: str | None,
    work_dir: Path | None,
    restart: bool,
    log_file: Path | None,
    trust_remote_code: bool,
    as_json: bool,
    **recipe_options: Any,
) -> None:
    """Compress MODEL: a Hugging Face folder, a hub id or a GGUF file.

    \b
    qtool compress ./my-model --bits 4
    qtool compress ./my-model --bits 3 --group-size 64 --calibration notes.txt -o small.qtm
    qtool compress org/name --dry-run
    qtool compress ./my-model --max-memory 2GB --log-file run.jsonl

    A run that was killed goes on where it was when the same command is given again.
    """
    from qtool import commands
    from qtool.memory import parse_size
    from qtool.recipe import RunOptions

    recipe = commands.build_recipe(**recipe_options)
    max_memory_bytes = None if max_memory is None else parse_size(max_memory, "--max-memory")
    output = output or commands.default_output(model, recipe)
    if dry_run:
        estimate = commands.dry_run(model, recipe, max_memory_bytes, trust_remote_code=trust_remote_code)
        _emit(estimate, commands.format_estimate(estimate), as_json)
        return
    options = RunOptions(
        overwrite=force, work_dir=work_dir, restart=restart, max_memory_bytes=max_memory_bytes, log_file=log_file
    )
    warn = partial(click.echo, err=True)
    result = commands.run_compress(model, output, recipe, options, trust_remote_code=trust_remote_code, warn=warn)
    _emit(result, commands.format_result(result), as_json)


@main.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--tensors", is_flag=True, help="List every tensor.")
@json_option
def inspect(file: Path, tensors: bool, as_json: bool) -> None:
    """Show what is in FILE. Only the header is read.

    \b
    qtool inspect model.qtm --tensors
    qtool inspect model.qtm --json | jq .bits_per_weight
    """
    from qtool.report import format_inspection, inspect_file

    found = inspect_file(file)
    _emit(found, "" if as_json else format_inspection(found, tensors=tensors), as_json)


@main.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option(
    "--against", metavar="MODEL", help="The model that FILE was made from: measure every layer's error again."
)
@click.option("--calibration", metavar="SOURCE", help="Text that FILE was calibrated on, if it was a local file.")
@text_field_option
@json_option
def verify(file: Path, against: str | None, as_json: bool, **options: Any) -> None:
    """Check every byte of FILE against its checksums and the format's rules.

    \b
    qtool verify model.qtm
    qtool verify model.qtm --against ./my-model --calibration notes.txt
    """
    from formats.reader import QtmFile, verify_file

    with QtmFile.open(file) as opened:
        report = verify_file(opened)
        values = {"file": str(file), "sections": report.n_sections, "bytes": report.n_bytes, "ok": True}
        text = f"{file}: ok, {report.n_sections} sections, {report.n_bytes:,} bytes"
        if against is not None:
            from qtool import commands

            values["layers"] = layers = commands.run_verify_against(opened, against, **options)
            text += f"; the errors of {len(layers)} layers are as recorded"
    _emit(values, text, as_json)


@main.group(name="eval")
def evaluate() -> None:
    """Measure a model or a file."""


@evaluate.command()
@click.argument("model")
@click.option("--data", default="builtin:test", show_default=True, metavar="SOURCE", help="Text, as --calibration.")
@text_field_option
@click.option("--seq-len", type=int, help="Tokens in a window.  [default: 2048, or the model's context if shorter]")
@click.option("--max-windows", type=int, help="Stop after this many windows.  [default: the whole text]")
@click.option("--baseline", metavar="MODEL", help="Model or file to compare with: KL divergence and agreement.")
@json_option
def perplexity(model: str, data: str, baseline: str | None, as_json: bool, **options: Any) -> None:
    """Perplexity of MODEL (a folder, hub id, GGUF or .qtm file), by the GPTQ paper's protocol.

    \b
    qtool eval perplexity model.qtm --data wikitext2 --baseline ./my-model
    qtool eval perplexity model.qtm --data text.txt --seq-len 1024 --max-windows 16
    """
    from qtool import commands

    result = commands.run_perplexity(model, data=data, baseline=baseline, **options)
    _emit(result, commands.format_perplexity(result), as_json)


@main.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--prompt", required=True, help="Text to continue.")
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=64, show_default=True)
@click.option("--temperature", type=click.FloatRange(min=0), default=0.0, show_default=True, help="0: most likely.")
@click.option("--seed", type=int, default=0, show_default=True, help="For a temperature above 0.")
@json_option
def generate(file: Path, prompt: str, as_json: bool, **options: Any) -> None:
    """Continue a prompt with the model in FILE, on the CPU.

    \b
    qtool generate model.qtm --prompt "The capital of France is"
    """
    from qtool import commands

    text = commands.run_generate(file, prompt, **options)
    _emit({"prompt": prompt, "text": text}, prompt + text, as_json)


@main.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--to", type=click.Choice(["dense"]), required=True, help="dense: a Hugging Face folder.")
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, metavar="DIR", help="New folder.")
@click.option(
    "--dtype", type=click.Choice(["float32", "float16", "bfloat16"]), default="float32", show_default=True,
    help="float32 holds the decoded weights exactly.",
)  # fmt: skip
@click.option("--force", is_flag=True, help="Replace the folder if it exists.")
@json_option
def export(file: Path, to: str, output: Path, dtype: str, force: bool, as_json: bool) -> None:
    """Write the model in FILE as a folder that other tools load.

    \b
    qtool export model.qtm --to dense -o ./decoded
    """
    from formats.export.dense import export_dense
    from formats.reader import QtmFile

    with QtmFile.open(file) as opened:
        names = export_dense(opened, output, dtype=dtype, overwrite=force)
    _emit({"folder": str(output), "to": to, "files": names}, f"{output}: {', '.join(names)}", as_json)


if __name__ == "__main__":
    sys.exit(main())

"""The command line: parse, call one function, print. Results go to stdout, everything else to stderr."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from qtool import __version__, api
from qtool.cli_compress import compress
from qtool.cli_eval import evaluate
from qtool.cli_export import export, import_
from qtool.cli_group import CommandGroup
from qtool.cli_options import defaults_of, emit, json_option, kv_bits_option, text_field_option
from qtool.cli_plot import plot


@click.group(
    cls=CommandGroup,
    commands=[compress, evaluate, plot, export, import_],
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
@click.version_option(__version__, prog_name="qtool")
def main() -> None:
    """Compress a causal language model into one small, checksummed file, and measure what it cost.

    \b
    qtool compress ./my-model --bits 4
    qtool inspect my-model-4bit.qtm
    qtool eval perplexity my-model-4bit.qtm --baseline ./my-model
    """


@defaults_of(api.inspect)
@main.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--tensors", is_flag=True, help="List every tensor.")
@click.option("--experts", is_flag=True, help="List every expert: its tokens, statistics, error and bits.")
@click.option("--report", type=click.Path(path_type=Path), metavar="HTML", help="Write a page with pictures of it all.")
@click.option("--layer", metavar="TENSOR", help="Whose outliers the page shows.  [default: that with most of them]")
@click.option("--force", is_flag=True, help="Replace the page if it exists.")
@json_option
def inspect(file: Path, tensors: bool, as_json: bool, **options: Any) -> None:
    """Show what is in FILE. Only the header is read, and for the page one layer.

    \b
    qtool inspect model.qtm --tensors
    qtool inspect mixture.qtm --experts
    qtool inspect model.qtm --json | jq .bits_per_weight
    qtool inspect model.qtm --report model.html
    """
    from qtool.report import format_inspection

    found = api.inspect(file, **options).to_dict()
    text = "" if as_json else format_inspection(found, tensors=tensors)
    if "experts" in found:
        from qtool.expert_report import format_experts

        text += format_experts(found["experts"])
    emit(found, text, as_json)


@defaults_of(api.verify)
@main.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option(
    "--against", metavar="MODEL", help="The model that FILE was made from: measure every layer's error again."
)
@click.option("--calibration", metavar="SOURCE", help="Text that FILE was calibrated on, if it was a local file.")
@text_field_option
@json_option
def verify(file: Path, as_json: bool, **options: Any) -> None:
    """Check every byte of FILE against its checksums and the format's rules.

    \b
    qtool verify model.qtm
    qtool verify model.qtm --against ./my-model --calibration notes.txt
    """
    found = api.verify(file, **options)
    text = f"{file}: ok, {found.sections} sections, {found.bytes:,} bytes"
    if found.layers is not None:
        text += f"; the errors of {len(found.layers)} layers are as recorded"
    emit(found.to_dict(), text, as_json)


@defaults_of(api.generate)
@main.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--prompt", required=True, help="Text to continue.")
@click.option("--max-new-tokens", type=click.IntRange(min=1), show_default=True)
@click.option("--temperature", type=click.FloatRange(min=0), show_default=True, help="0: most likely.")
@click.option("--seed", type=int, show_default=True, help="For a temperature above 0.")
@click.option("--device", show_default=True, help="cpu, cuda or cuda:N.")
@click.option("--device-map", metavar="auto", help="auto: the blocks spread over all GPUs.")
@click.option(
    "--offload", type=click.Choice(["host", "disk"]),
    help="Where blocks stay that the GPU has no room for: each is copied while the one before computes.",
)  # fmt: skip
@kv_bits_option
@json_option
def generate(file: Path, prompt: str, as_json: bool, **options: Any) -> None:
    """Continue a prompt with the model in FILE, or let an encoder-decoder answer it.

    \b
    qtool generate model.qtm --prompt "The capital of France is"
    qtool generate model.qtm --prompt "Once upon a time" --temperature 0.7 --device cuda --kv-bits 4
    qtool generate model.qtm --prompt "Once upon a time" --device cuda --offload host
    """
    result = api.generate(file, prompt, **options)
    emit(result.to_dict(), result.whole, as_json)


@defaults_of(api.warm)
@main.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--device", show_default=True, help="cuda or cuda:N.")
@click.option(
    "--tokens", show_default=True, metavar="N,N",
    help="Tokens at a time: 1 when one text is generated, more for batches and prompts.",
)  # fmt: skip
@json_option
def warm(file: Path, as_json: bool, **options: Any) -> None:
    """Compile FILE's kernels for a GPU and find the fastest blocks, so that no first token waits for it.

    \b
    qtool warm model.qtm
    qtool warm model.qtm --tokens 1,4,2048 --json

    What is found is kept in the user's cache folder, for this kind of GPU; without it kernels run with blocks that
    their shape suggests, and are compiled when they are first needed.
    """
    from qtool.finished import format_warm

    rows = api.warm(file, **options)
    emit({"file": str(file), "kernels": rows}, format_warm(rows), as_json)


if __name__ == "__main__":
    sys.exit(main())

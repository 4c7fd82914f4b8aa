"""The command line of `qtool plot`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from qtool import api
from qtool.cli_options import defaults_of, emit, json_option


@defaults_of(api.plot)
@click.command()
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), show_default=True,
    help="Page (.html) or picture (.svg) to write.",
)  # fmt: skip
@click.option(
    "--quality", type=click.Choice(["perplexity", "kl", "error"]),
    help="What to draw.  [default: what was measured, or else the error that the files record]",
)  # fmt: skip
@click.option("--size", type=click.Choice(["bits", "bytes"]), show_default=True, help="Against what.")
@click.option("--force", is_flag=True, help="Replace the output if it exists.")
@json_option
def plot(files: tuple[Path, ...], as_json: bool, **options: Any) -> None:
    """Draw quality against size: FILES are .qtm files and .json results of qtool eval.

    \b
    qtool plot a.qtm b.qtm c.qtm
    qtool eval perplexity a.qtm --json > a.json    # the same for b, then:
    qtool plot a.json b.json -o frontier.svg
    """
    from qtool.pictures.plot import format_plot

    result = api.plot(files, **options)
    emit(result, format_plot(result), as_json)

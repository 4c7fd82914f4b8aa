"""The command line of `qtool plot`."""

from __future__ import annotations

from pathlib import Path

import click

from qtool.cli_options import emit, json_option


@click.command()
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), default=Path("plot.html"), show_default=True,
    help="Page (.html) or picture (.svg) to write.",
)  # fmt: skip
@click.option(
    "--quality", type=click.Choice(["perplexity", "kl", "error"]),
    help="What to draw.  [default: what was measured, or else the error that the files record]",
)  # fmt: skip
@click.option("--size", type=click.Choice(["bits", "bytes"]), default="bits", show_default=True, help="Against what.")
@click.option("--force", is_flag=True, help="Replace the output if it exists.")
@json_option
def plot(files: tuple[Path, ...], output: Path, quality: str | None, size: str, force: bool, as_json: bool) -> None:
    """Draw quality against size: FILES are .qtm files and .json results of qtool eval.

    \b
    qtool plot a.qtm b.qtm c.qtm
    qtool eval perplexity a.qtm --json > a.json    # the same for b, then:
    qtool plot a.json b.json -o frontier.svg
    """
    from qtool.pictures.plot import format_plot
    from qtool.pictures.plot import plot as draw

    result = draw(files, output, quality=quality, size=size, overwrite=force)
    emit(result, format_plot(result), as_json)

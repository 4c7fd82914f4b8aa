"""What several commands have in common: options, and how a result is printed."""

from __future__ import annotations

import json
from typing import Any

import click

json_option = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
text_field_option = click.option(
    "--text-field",
    default="text",
    show_default=True,
    help="Field of .jsonl and .parquet files that holds the text.",
)
kv_bits_option = click.option(
    "--kv-bits", type=click.Choice(["4", "8"]), callback=lambda context, option, value: value and int(value),
    help="Keys and values as a cache in so many bits holds them.  [default: as they are]",
)  # fmt: skip


def emit(values: dict[str, Any], text: str, as_json: bool) -> None:
    """Print a result on stdout: `values` as JSON, or `text`."""
    click.echo(json.dumps(values, indent=2) if as_json else text)

"""What several commands have in common: options, and how a result is printed."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from typing import Any

import click

json_option = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
text_field_option = click.option(
    "--text-field",
    show_default=True,
    help="Field of .jsonl and .parquet files that holds the text.",
)
kv_bits_option = click.option(
    "--kv-bits", type=click.Choice(["4", "8"]), callback=lambda context, option, value: value and int(value),
    help="Keys and values as a cache in so many bits holds them.  [default: as they are]",
)  # fmt: skip


def defaults_of(function: Callable[..., Any]) -> Callable[[click.Command], click.Command]:
    """A command whose options have the defaults of `function`'s parameters, so that each is said once."""
    parameters = inspect.signature(function).parameters

    def apply(command: click.Command) -> click.Command:
        for option in command.params:
            parameter = parameters.get(str(option.name))
            if parameter is not None and parameter.default is not inspect.Parameter.empty:
                option.default = parameter.default
        return command

    return apply


def emit(values: dict[str, Any], text: str, as_json: bool) -> None:
    """Print a result on stdout: `values` as JSON, or `text`."""
    click.echo(json.dumps(values, indent=2) if as_json else text)

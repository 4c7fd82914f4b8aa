"""`qtool eval`: what a model or a file predicts, measured."""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from pathlib import Path
from typing import Any

import click

from qtool import api
from qtool.cli_options import defaults_of, emit, json_option, kv_bits_option, text_field_option

_SAMPLE_OPTIONS = (
    click.option("--data", show_default=True, metavar="SOURCE", help="Text, as --calibration."),
    text_field_option,
    click.option(
        "--protocol", type=click.Choice(["gptq", "llama.cpp"]), show_default=True,
        help="gptq scores every token of a window but its first; llama.cpp those with half a window before them, and "
        "starts every window with BOS where the tokenizer adds one.",
    ),
    click.option(
        "--seq-len", "--ctx-size", "-c", "seq_len", type=int,
        help="Tokens in a window.  [default: 2048, for llama.cpp 512, or the model's context if shorter]",
    ),
    click.option(
        "--stride", type=int,
        help="Tokens from one window's start to the next (gptq): every token is scored once, with at least "
        "seq-len - stride before it.  [default: side by side]",
    ),
    click.option("--max-windows", type=int, help="Stop after this many windows.  [default: the whole text]"),
)  # fmt: skip


def sample_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options that say what is measured on."""
    return reduce(lambda decorated, option: option(decorated), reversed(_SAMPLE_OPTIONS), command)


@click.group(name="eval")
def evaluate() -> None:
    """Measure a model or a file."""


@defaults_of(api.evaluate)
@evaluate.command()
@click.argument("model")
@sample_options
@click.option("--baseline", metavar="MODEL", help="Model or file to compare with: KL divergence and agreement.")
@kv_bits_option
@json_option
def perplexity(model: str, as_json: bool, **options: Any) -> None:
    """Perplexity of MODEL (a folder, hub id, GGUF or .qtm file), by the protocol of the GPTQ paper or of llama.cpp.

    \b
    qtool eval perplexity model.qtm --data wikitext2 --baseline ./my-model
    qtool eval perplexity model.qtm --data text.txt --seq-len 1024 --max-windows 16
    qtool eval perplexity model.qtm --data wiki.test.txt --protocol llama.cpp -c 512
    qtool eval perplexity model.qtm --data text.txt --stride 512
    qtool eval perplexity model.qtm --baseline model.qtm --kv-bits 4     # what the cache alone costs

    The two protocols give the same model different numbers, so the output names the one it used. What follows +/- is
    one standard error. With gptq it is taken over windows, since tokens in a row are hard together (with fewer than 10
    windows, and with llama.cpp as its own program does it, over tokens as if they were independent: too small).
    """
    from qtool.commands import format_perplexity

    result = api.evaluate(model, **options).to_dict()
    emit(result, format_perplexity(result), as_json)


@defaults_of(api.evaluate_kl)
@evaluate.command()
@click.argument("model")
@sample_options
@click.option("--baseline", metavar="MODEL", help="Model or file to compare with.")
@click.option(
    "--save-baseline",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Write the baseline's predictions: 2 bytes for each scored token and entry of the vocabulary.",
)
@click.option(
    "--baseline-logits",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="What --save-baseline wrote, instead of the baseline.",
)
@json_option
def kl(model: str, as_json: bool, **options: Any) -> None:
    """How far MODEL's predictions are from a baseline's: KL divergence, agreement, ratio of perplexities.

    \b
    qtool eval kl model.qtm --baseline ./my-model --data wikitext2
    qtool eval kl 4bit.qtm --baseline ./my-model --save-baseline base.logits --max-windows 16
    qtool eval kl 3bit.qtm --baseline-logits base.logits --max-windows 16

    KL runs from the baseline to MODEL, in nats. A saved baseline goes with its text, protocol and windows: any other
    is refused.
    """
    from qtool.commands import format_kl

    result = api.evaluate_kl(model, **options).to_dict()
    emit(result, format_kl(result), as_json)


@defaults_of(api.evaluate_tasks)
@evaluate.command()
@click.argument("model")
@click.option("--tasks", required=True, metavar="NAME,NAME", help="Tasks of lm-eval, as arc_easy,hellaswag.")
@click.option("--limit", type=int, metavar="N", help="Questions of each task.  [default: all]")
@click.option("--num-fewshot", type=int, metavar="N", help="Examples before each question.  [default: the task's own]")
@click.option("--batch-size", type=int, show_default=True, help="Questions asked together.")
@click.option("--baseline", metavar="MODEL", help="Model or file whose scores stand beside.")
@click.option(
    "--include-path", type=click.Path(path_type=Path), metavar="DIR",
    help="Folder of task files (.yaml) of your own, which may name local data.",
)  # fmt: skip
@click.option("--device", show_default=True, help="cpu, cuda or cuda:N.")
@json_option
def tasks(model: str, tasks: str, as_json: bool, **options: Any) -> None:
    """Scores of MODEL (a .qtm file, a folder or a hub id) in tasks of lm-eval; needs the extra `tasks`.

    \b
    qtool eval tasks model.qtm --tasks arc_easy,hellaswag --limit 200
    qtool eval tasks model.qtm --tasks arc_easy --baseline ./my-model --json
    qtool eval tasks model.qtm --tasks my_task --include-path ./my-tasks
    """
    from qtool.tasks import format_tasks

    names = [name.strip() for name in tasks.split(",") if name.strip()]
    result = api.evaluate_tasks(model, tasks=names, **options).to_dict()
    emit(result, format_tasks(result), as_json)

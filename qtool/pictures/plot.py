"""`qtool plot`: the quality of several files against their size, as a page or a picture."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from qtool.errors import ConfigError
from qtool.pictures.chart import Chart, Point, draw_chart, frontier
from qtool.pictures.markup import Markup, element
from qtool.pictures.page import figure, html_page, standalone_svg, table
from qtool.pictures.results import MEASURED, RECORDED, Gathered, Subject, gather
from qtool.publish import check_page, write_page
from qtool.recipe import one_of
from qtool.sizes import format_bytes

SIZES: dict[str, tuple[str, Callable[[Subject], float]]] = {
    "bits": ("bits per weight of the block linears", lambda subject: float(subject.found["bits_per_weight"])),
    "bytes": ("size of the file, MB", lambda subject: subject.found["file_bytes"] / 1e6),
}
QUALITIES = (*MEASURED, RECORDED)
_LABELS = MEASURED | {RECORDED: "recorded mean relative error"}


def plot(
    paths: Sequence[Path], output: Path, *, quality: str | None = None, size: str = "bits", overwrite: bool = False
) -> dict[str, Any]:
    """Draw the files and results in `paths`; what was drawn comes back, with `notes` that a reader has to know.

    `quality` is one of QUALITIES; None takes the first that was measured of any file, and of all of them then.
    ConfigError when a file has no such figure, with the command that gives it.
    """
    check_page(output, "--output", (".html", ".svg"), overwrite=overwrite)
    gathered = gather(paths)
    if not gathered.subjects:
        raise ConfigError("no .qtm file is among what was given; give one, or its result")
    metric = quality or _best_measured(gathered.subjects)
    chart, notes = _chart(gathered, metric, size), _notes(gathered.subjects, metric)
    drawn = draw_chart(chart)
    svg = output.suffix.lower() == ".svg"
    write_page(output, standalone_svg(drawn) if svg else _page(chart, drawn, gathered.subjects, notes))
    return {
        "file": str(output),
        "quality": metric,
        "size": size,
        "points": [{"label": p.label, "series": p.series, "size": p.x, "quality": p.y} for p in chart.points],
        "references": dict(chart.references),
        "frontier": [point.label for point in frontier(chart.points)],
        "notes": notes,
    }


def format_plot(result: dict[str, Any]) -> str:
    """What was drawn, in a line, and what has to be known of it."""
    names = ", ".join(result["frontier"])
    line = f"{result['file']}: {len(result['points'])} files, {_LABELS[result['quality']]}; on the frontier: {names}"
    return "\n".join([line, *(f"note: {note}" for note in result["notes"])])


def _best_measured(subjects: Sequence[Subject]) -> str:
    return next((metric for metric in QUALITIES if any(metric in subject.figures for subject in subjects)), RECORDED)


def _chart(gathered: Gathered, metric: str, size: str) -> Chart:
    one_of("size", size, tuple(SIZES))
    label, take = SIZES[size]
    points = []
    for name, subject in zip(_names(gathered.subjects), gathered.subjects, strict=True):
        if metric not in subject.figures:
            raise ConfigError(_missing(subject, metric))
        points.append(Point(series=_series(subject), label=name, x=take(subject), y=subject.figures[metric]))
    references = tuple(gathered.references.items()) if metric == "perplexity" else ()
    title = f"{_LABELS[metric][0].upper()}{_LABELS[metric][1:]} against size"
    return Chart(title=title, x_label=label, y_label=_LABELS[metric], points=points, references=references)


def _missing(subject: Subject, metric: str) -> str:
    path = subject.path
    if metric == RECORDED:
        return f"{path}: records no relative error; measure it: qtool eval perplexity {path} --json > {path.stem}.json"
    baseline = " --baseline MODEL" if metric == "kl" else ""
    command = f"qtool eval perplexity {path}{baseline} --json > {path.stem}.json"
    return f"{path}: no {metric} among what was given; run {command} and give the result too"


def _names(subjects: Sequence[Subject]) -> list[str]:
    """The files' own names; for those that are called the same, their paths as given."""
    stems = [subject.path.stem for subject in subjects]
    given = [str(subject.path.with_suffix("")) for subject in subjects]
    return [stem if stems.count(stem) == 1 else path for stem, path in zip(stems, given, strict=True)]


def _series(subject: Subject) -> str:
    """The method that made a file, as far as it says so."""
    linears = subject.found["recipe"].get("linears")
    method = linears.get("method") if isinstance(linears, dict) else None
    return method if isinstance(method, str) else "unknown method"


def _notes(subjects: Sequence[Subject], metric: str) -> list[str]:
    """What makes the points less comparable than they look."""
    notes = []
    if len({_weights(subject) for subject in subjects} - {None}) > 1:
        notes.append("the files were not all made from the same model")
    if metric == RECORDED:
        if len({repr(subject.found["provenance"].get("calibration_sha256")) for subject in subjects}) > 1:
            notes.append(
                "the errors were not all measured on the same calibration text (without one, on the weights alone): "
                "do not compare those"
            )
        notes.append("a recorded error is no perplexity: qtool eval perplexity FILE --json > R.json, then plot R.json")
    return notes


def _weights(subject: Subject) -> str | None:
    """What the weights that a file was made from hash to; None when it does not say."""
    sources = subject.found["provenance"].get("source_files")
    if not isinstance(sources, list) or not all(isinstance(source, dict) and "sha256" in source for source in sources):
        return None
    return repr([source["sha256"] for source in sources])


def _page(chart: Chart, drawn: Markup, subjects: Sequence[Subject], notes: Sequence[str]) -> str:
    best = {point.label for point in frontier(chart.points)}
    rows = [
        [
            point.label,
            point.series,
            f"{subject.found['bits_per_weight']:.3f}",
            format_bytes(subject.found["file_bytes"]),
            f"{point.y:.5g}",
            "yes" if point.label in best else "",
        ]
        for point, subject in sorted(zip(chart.points, subjects, strict=True), key=lambda pair: pair[0].x)
    ]
    head = ["file", "method", "bits per weight", "size", chart.y_label, "on the frontier"]
    body = [
        element("h1", chart.title),
        element("p", "Lower and further to the left is better; the line joins the files that no other one beats."),
        *(element("p", f"{note[0].upper()}{note[1:]}.") for note in notes),
        figure(drawn),
        table(head, rows, numeric=(2, 3, 4)),
    ]
    return html_page(f"{chart.title} – qtool", body)

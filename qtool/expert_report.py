"""What `inspect --experts` shows: of every expert its tokens, its statistics, its error and its bits."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from formats.errors import FormatError
from formats.experts import expert_of
from qtool.sizes import format_bytes


def list_experts(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row for each expert, from what `inspect_file` found. FormatError where there is none.

    error: the mean of its linears' relative errors, None without one; bits: all that is stored, for each weight.
    """
    calibrated = found["quality"].get("experts") or {}
    experts: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for row in found["tensors"]:
        expert = expert_of(row["name"])
        if expert is not None:
            experts.setdefault(expert, []).append(row)
    if not experts:
        raise FormatError("--experts: the file's model has none")
    try:
        order = {mixture: place for place, (mixture, _) in enumerate(experts)}  # as the file has them: of the blocks
        keys = sorted(experts, key=lambda key: (order[key[0]], key[1]))
        return [_expert(*key, experts[key], calibrated.get(key[0], {})) for key in keys]
    except (TypeError, ValueError, AttributeError, KeyError, IndexError) as error:
        raise FormatError(f"header: quality is not as qtool writes it: {error} (SPEC 3.4)") from error


def _expert(mixture: str, number: int, rows: list[dict[str, Any]], calibrated: Mapping[str, Any]) -> dict[str, Any]:
    tokens = calibrated.get("tokens")
    errors = [row["relative_error"] for row in rows if row["relative_error"] is not None]
    parameters = sum(row["shape"][0] * row["shape"][1] for row in rows)
    n_bytes = sum(row["bytes"] for row in rows)
    return {
        "mixture": mixture,
        "expert": number,
        "tokens": None if tokens is None else int(tokens[number]),
        "statistics": None if tokens is None else "all" if number in calibrated.get("pooled", ()) else "own",
        "zeros": calibrated["zeros"][number] if number < len(calibrated.get("zeros", ())) else None,
        "error": sum(errors) / len(errors) if errors else None,
        "bits": 8 * n_bytes / parameters,
        "bytes": n_bytes,
    }


def format_experts(rows: Iterable[Mapping[str, Any]]) -> str:
    """The rows as a table for each mixture, its experts with the fewest tokens first."""
    mixtures: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        mixtures.setdefault(row["mixture"], []).append(row)
    lines = []
    for name, experts in mixtures.items():
        total = sum(row["bytes"] for row in experts)
        lines += ["", f"{name}: {len(experts)} experts, {format_bytes(total)}"]
        lines.append(f"  {'expert':>6}  {'tokens':>9}  {'statistics':>10}  {'zeros':>6}  {'error':>9}  {'bits':>7}")
        for row in sorted(experts, key=lambda row: row["tokens"] or 0):
            tokens = "-" if row["tokens"] is None else f"{row['tokens']:,}"
            error = "-" if row["error"] is None else f"{row['error']:.2e}"
            zeros = "-" if row["zeros"] is None else f"{row['zeros']:.1%}"
            cells = f"{tokens:>9}  {row['statistics'] or '-':>10}  {zeros:>6}  {error:>9}  {row['bits']:>7.3f}"
            lines.append(f"  {row['expert']:>6}  {cells}")
    return "\n".join(lines)

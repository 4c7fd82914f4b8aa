"""A user's script as a type checker sees it: `make check` runs mypy on it, nobody runs it.

In strict mode an `ignore` that nothing needs is an error, so the last lines have to be wrong.
"""

from typing import Any, assert_type

from transformers import PreTrainedModel, PreTrainedTokenizerBase

import qtool
from formats.export.report import ExportReport
from qtool.evaluation import DivergenceResult, PerplexityResult
from qtool.results import Compressed, Estimated, Imported, Inspected, TaskScores

assert_type(qtool.compress("m", "m.qtm", bits=4, layers=["down_proj=8"]), Compressed)
assert_type(qtool.dry_run("m", target_size="90MB"), Estimated)
assert_type(qtool.inspect("m.qtm", experts=True), Inspected)
assert_type(qtool.inspect("m.qtm").bits_per_weight, float)
assert_type(qtool.verify("m.qtm").layers, list[dict[str, Any]] | None)
assert_type(qtool.evaluate("m.qtm", protocol="llama.cpp"), PerplexityResult)
assert_type(qtool.evaluate_kl("m.qtm", baseline="m").perplexity_ratio.value, float)
assert_type(qtool.evaluate_kl("m.qtm", baseline="m"), DivergenceResult)
assert_type(qtool.evaluate_tasks("m.qtm", tasks=["arc_easy"]), TaskScores)
assert_type(qtool.generate("m.qtm", "once").text, str)
assert_type(qtool.export("m.qtm", "out", to="dense"), ExportReport)
assert_type(qtool.import_("m-gptq", "m.qtm"), Imported)
assert_type(qtool.load("m.qtm"), PreTrainedModel)
assert_type(qtool.load_tokenizer("m.qtm"), PreTrainedTokenizerBase)

qtool.compress("m", bit=4)  # type: ignore[call-arg]
qtool.evaluate("m.qtm", protocol="other")  # type: ignore[arg-type]
qtool.export("m.qtm", "out")  # type: ignore[call-arg]

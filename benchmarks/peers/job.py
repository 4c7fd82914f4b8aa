"""What a peer is given and what it gives back: plain files, since every peer has its own Python environment.

Needs numpy and safetensors alone: that is what all the environments share.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import load_file, save_file

Matrix = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One peer with one setting.

    model: Hugging Face folder, float16 or float32.
    windows: .npy file, [n_windows, seq_len] int64 token ids: what every peer calibrates on.
    importance: .safetensors file, by linear: [in] float32, the mean over the windows of the squared input.
    output: an empty folder for the peer; its answer is `weights.safetensors` and `result.json` there.
    seed: for what the peer draws. options: the setting, in the peer's own words.
    """

    model: str
    windows: str
    importance: str
    output: str
    seed: int
    options: dict[str, Any]

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self), indent=1))

    @classmethod
    def from_command_line(cls) -> Job:
        return cls(**json.loads(Path(sys.argv[1]).read_text()))

    def config(self) -> dict[str, Any]:
        """The model's config.json."""
        return dict(json.loads((Path(self.model) / "config.json").read_text()))

    def token_windows(self) -> npt.NDArray[np.int64]:
        return np.asarray(np.load(self.windows, allow_pickle=False), np.int64)

    def linears(self) -> dict[str, Matrix]:
        """The weights of the blocks' linears, by tensor name: [out, in] float32."""
        tensors = load_file(Path(self.model) / "model.safetensors")
        return {name: t.astype(np.float32) for name, t in tensors.items() if is_block_linear(name, t.ndim)}

    def finish(self, weights: Mapping[str, Matrix], stored_bytes: int, note: str = "") -> None:
        """Hand back the decoded weights of every block linear, and the size of what they were decoded from."""
        folder = Path(self.output)
        exact = {name: np.ascontiguousarray(weight, np.float32) for name, weight in weights.items()}
        save_file(exact, folder / "weights.safetensors")
        bits = 8 * stored_bytes / sum(weight.size for weight in exact.values())
        (folder / "result.json").write_text(json.dumps({"bits": bits, "note": note}))


def is_block_linear(name: str, dimensions: int) -> bool:
    """Whether a tensor is what compression is about: bits per weight are counted over these alone."""
    return ".layers." in name and dimensions == 2

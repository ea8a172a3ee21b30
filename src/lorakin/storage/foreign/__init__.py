"""Low-rank adapters that other libraries wrote, one file for each format.

| format | one module's tensors in its file | s in W0 + s·B·A |
|---|---|---|
| `loralib` | `<path>.lora_A` (r, in), `.lora_B` (out, r) | alpha / r |
| `torchtune` | `<path>.lora_a.weight` (r, in), `.lora_b.weight` (out, r), `.magnitude` | alpha / r |
| `mlx` (mlx-lm) | `<path>.lora_a` (in, r), `.lora_b` (r, out), `.m` (out) | `scale` |
| `kohya` (LyCORIS too) | `<prefix>_<path>.lora_down.weight`, `.lora_up.weight`, `.alpha` | alpha / r |

With magnitudes m all of them mean (m / ‖W0 + s·B·A‖ by rows) · (W0 + s·B·A).
"""

from lorakin.storage.foreign.read import read_foreign
from lorakin.storage.foreign.source import Foreign

__all__ = ["Foreign", "read_foreign"]

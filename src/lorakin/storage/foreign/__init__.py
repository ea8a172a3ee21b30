"""Low-rank adapters that other libraries wrote, one file for each format.

| format | one module's tensors in its file | s in W0 + s·B·A |
|---|---|---|
| `loralib` | `<path>.lora_A` (r, in), `.lora_B` (out, r) | alpha / r |
| `torchtune` | `<path>.lora_a.weight` (r, in), `.lora_b.weight` (out, r) | alpha / r |
| `mlx` (mlx-lm) | `<path>.lora_a` (in, r), `.lora_b` (r, out), `.m` (out) | `scale` |
| `kohya`, LyCORIS | `<prefix>_<path>.lora_down.weight`, `.lora_up.weight` | alpha / r |

With magnitudes m all of them mean (m / ‖W0 + s·B·A‖ by rows) · (W0 + s·B·A).
"""

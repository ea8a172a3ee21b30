"""LoRA in plain NumPy, float64: the slow truth that tests compare against.

Paper: "LoRA: Low-Rank Adaptation of Large Language Models", arXiv 2106.09685; the scale α/√r is rsLoRA's, arXiv 2312.03732.

Frozen weight W0 (o, i) and bias b (o,), trained factors A (r, i) and B (o, r), scale s, inputs as rows x (N, i):

    s  = α/r, or α/√r for rsLoRA
    y  = W0 x + b + s·B(A x̃)          x̃ = mask ⊙ x, the mask being that of inverted dropout (0 or 1/(1−p)), or 1
    ∂B = s·δᵀ(x̃Aᵀ)                    δ = ∂L/∂y (N, o)
    ∂A = s·Bᵀδᵀx̃
    ∂x = δW0 + mask ⊙ (s·(δB)A)
    W  = W0 + s·BA                     the merged weight

Nothing is done in place, and every input is taken to float64 first.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]


def f64(value: ArrayLike) -> Array:
    """The value as a float64 array of the same shape."""
    return np.asarray(value, dtype=np.float64)


def scaling(rank: int, alpha: float, rslora: bool = False) -> float:
    """s = α/r, or α/√r with `rslora`."""
    return alpha / math.sqrt(rank) if rslora else alpha / rank


def branch_input(x: ArrayLike, mask: ArrayLike | None) -> Array:
    """x̃ (N, i): x (N, i) times the already scaled dropout mask (N, i), or x itself without one."""
    return f64(x) if mask is None else f64(x) * f64(mask)


def forward(
    x: ArrayLike,
    W0: ArrayLike,
    bias: ArrayLike | None,
    A: ArrayLike,
    B: ArrayLike,
    s: float,
    mask: ArrayLike | None = None,
) -> Array:
    """y = W0 x + b + s·B(A x̃) for every row of x.

    x (N, i), W0 (o, i), bias (o,) or None, A (r, i), B (o, r), mask (N, i) or None -> y (N, o).
    The mask multiplies the input of the branch only; neither the scale nor the mask touches the base path or the bias.
    """
    y = f64(x) @ f64(W0).T + s * (branch_input(x, mask) @ f64(A).T) @ f64(B).T
    return y if bias is None else y + f64(bias)


def gradients(
    x: ArrayLike,
    W0: ArrayLike,
    A: ArrayLike,
    B: ArrayLike,
    s: float,
    delta: ArrayLike,
    mask: ArrayLike | None = None,
) -> tuple[Array, Array, Array]:
    """The closed-form gradients of a loss whose gradient with respect to y is `delta`.

    x (N, i), W0 (o, i), A (r, i), B (o, r), delta (N, o), mask (N, i) or None -> dA (r, i), dB (o, r), dx (N, i).
    dx is the whole gradient: through the frozen weight, and through the branch and its mask.
    """
    W0, A, B, delta = f64(W0), f64(A), f64(B), f64(delta)
    xd = branch_input(x, mask)
    dA = s * B.T @ delta.T @ xd
    dB = s * delta.T @ (xd @ A.T)
    dx = delta @ W0 + branch_input(s * (delta @ B) @ A, mask)
    return dA, dB, dx


def merged(W0: ArrayLike, A: ArrayLike, B: ArrayLike, s: float) -> Array:
    """W = W0 + s·BA: W0 (o, i), A (r, i), B (o, r) -> W (o, i)."""
    return f64(W0) + s * (f64(B) @ f64(A))


def embedding_forward(
    ids: NDArray[np.integer[Any]], table: ArrayLike, A: ArrayLike, B: ArrayLike, s: float
) -> Array:
    """y = table[id] + s·B A[:, id]: a linear layer of weight tableᵀ on one-hot inputs.

    ids (...) integers in 0..vocab−1, table (vocab, dim), A (r, vocab), B (dim, r) -> y (..., dim).
    """
    ids = np.asarray(ids)
    y: Array = f64(table)[ids] + s * f64(A).T[ids] @ f64(B).T
    return y


def patches(
    x: ArrayLike, kernel: tuple[int, int], stride: tuple[int, int], padding: tuple[int, int]
) -> Array:
    """The windows a convolution sees: x (n, c, h, w) -> (n, h', w', c·kh·kw), zero padded, each flattened as c, kh, kw."""
    (kh, kw), (sh, sw), (ph, pw) = kernel, stride, padding
    x = np.pad(f64(x), ((0, 0), (0, 0), (ph, ph), (pw, pw)))
    n, c, h, w = x.shape
    rows, columns = (h - kh) // sh + 1, (w - kw) // sw + 1
    out = np.empty((n, rows, columns, c * kh * kw))
    for p in range(rows):
        for q in range(columns):
            out[:, p, q] = x[:, :, p * sh : p * sh + kh, q * sw : q * sw + kw].reshape(n, -1)
    return out


def conv2d_forward(
    x: ArrayLike,
    W0: ArrayLike,
    bias: ArrayLike | None,
    A: ArrayLike,
    B: ArrayLike,
    s: float,
    stride: int | tuple[int, int],
    padding: int | tuple[int, int],
) -> Array:
    """A convolution as the linear layer it is on each of its windows; groups 1, dilation 1.

    x (n, c, h, w), W0 (o, c, kh, kw), bias (o,) or None, A (r, c·kh·kw), B (o, r) -> y (n, o, h', w').
    `stride` and `padding` (zeros) are one number for both axes, or a pair (vertical, horizontal).
    """
    W0 = f64(W0)
    stride = (stride, stride) if isinstance(stride, int) else stride
    padding = (padding, padding) if isinstance(padding, int) else padding
    windows = patches(x, (W0.shape[2], W0.shape[3]), stride, padding)
    n, rows, columns, fan_in = windows.shape
    y = forward(windows.reshape(-1, fan_in), W0.reshape(-1, fan_in), bias, A, B, s)
    return y.reshape(n, rows, columns, -1).transpose(0, 3, 1, 2)


class AdamW:
    """Adam with decoupled weight decay, as `torch.optim.AdamW` computes it, in float64.

    θ ← (1 − lr·wd)·θ;  m ← β1·m + (1−β1)·g;  v ← β2·v + (1−β2)·g²;  θ ← θ − lr·m̂ / (√v̂ + ε)
    with m̂ = m/(1−β1ⁿ), v̂ = v/(1−β2ⁿ) and n the number of steps this parameter has taken.
    """

    def __init__(
        self,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        self.lr, self.betas, self.eps, self.weight_decay = lr, betas, eps, weight_decay
        self.state: dict[str, tuple[int, Array, Array]] = {}

    def step(self, params: dict[str, Array], grads: dict[str, Array]) -> dict[str, Array]:
        """New parameters, one for each of `params`, same shapes; one without a gradient comes back as it is, undecayed."""
        return {
            name: self._update(name, f64(p), f64(grads[name])) if name in grads else p
            for name, p in params.items()
        }

    def _update(self, name: str, p: Array, g: Array) -> Array:
        """One parameter's step: p, g and the result have one shape."""
        (b1, b2), (n, m, v) = (
            self.betas,
            self.state.get(name, (0, np.zeros_like(p), np.zeros_like(p))),
        )
        n, m, v = n + 1, b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
        self.state[name] = (n, m, v)
        m_hat, v_hat = m / (1 - b1**n), v / (1 - b2**n)
        return (1 - self.lr * self.weight_decay) * p - self.lr * m_hat / (np.sqrt(v_hat) + self.eps)


def train(
    x: ArrayLike,
    target: ArrayLike,
    W0: ArrayLike,
    bias: ArrayLike | None,
    A: ArrayLike,
    B: ArrayLike,
    s: float,
    steps: int,
    lr: float,
    weight_decay: float = 0.0,
) -> tuple[Array, Array, Array]:
    """Full-batch regression of y on `target`, loss = mean over all N·o entries of (y − target)², with AdamW on A and B.

    x (N, i), target (N, o), W0 (o, i), bias (o,) or None, A (r, i), B (o, r) -> A (r, i), B (o, r), losses (steps,).
    losses[n] is the loss before step n+1, so losses[0] belongs to the A and B given; after the last step none is taken.
    """
    params, optimizer, losses = (
        {"A": f64(A), "B": f64(B)},
        AdamW(lr, weight_decay=weight_decay),
        np.empty(steps),
    )
    for n in range(steps):
        error = forward(x, W0, bias, params["A"], params["B"], s) - f64(target)
        losses[n] = np.mean(error**2)
        dA, dB, _ = gradients(x, W0, params["A"], params["B"], s, 2 * error / error.size)
        params = optimizer.step(params, {"A": dA, "B": dB})
    return params["A"], params["B"], losses

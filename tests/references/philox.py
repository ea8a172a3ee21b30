"""Philox4x32 in NumPy, and the dropout that our GPU kernels draw with it.

Salmon, Moraes, Dror, Shaw: "Parallel Random Numbers: As Easy as 1, 2, 3", 2011, section 4.2.
"""

from __future__ import annotations

import numpy as np

M0, M1 = 0xD2511F53, 0xCD9E8D57
W0, W1 = 0x9E3779B9, 0xBB67AE85
LOW = np.uint64(0xFFFFFFFF)


def philox(seed: int, counters: np.ndarray, rounds: int) -> np.ndarray:
    """Four words for each counter; both (…, 4), uint64 that hold 32 bits."""
    x0, x1, x2, x3 = np.moveaxis(counters.astype(np.uint64), -1, 0)
    key0, key1 = seed & 0xFFFFFFFF, seed >> 32
    for n in range(rounds):
        k0, k1 = (key0 + n * W0) & 0xFFFFFFFF, (key1 + n * W1) & 0xFFFFFFFF
        first, second = np.uint64(M0) * x0, np.uint64(M1) * x2
        x0, x1, x2, x3 = (
            (second >> np.uint64(32)) ^ x1 ^ np.uint64(k0),
            second & LOW,
            (first >> np.uint64(32)) ^ x3 ^ np.uint64(k1),
            first & LOW,
        )
    return np.stack([x0, x1, x2, x3], axis=-1)


def kept(seed: int, threshold: int, rows: int, columns: int) -> np.ndarray:
    """Which entries of a matrix are kept: (rows, columns), bool. Each half word decides one."""
    groups = -(-columns // 8)
    counters = np.zeros((rows, groups, 4), dtype=np.uint64)
    counters[..., 0] = np.arange(rows)[:, None]
    counters[..., 1] = np.arange(groups)
    words = philox(seed, counters, rounds=7)
    halves = np.stack([words & np.uint64(0xFFFF), words >> np.uint64(16)], axis=-1)
    return halves.reshape(rows, groups * 8)[:, :columns] >= threshold

"""Ranks over the steps are sums and means."""

from __future__ import annotations

from lorakin.report.rank_history import ranks_over_time
from report.figures import cells_of


def test_ranks_over_time_are_sums_and_means() -> None:
    history = [
        (0, {"l.0.q": 8, "l.0.k": 8, "l.1.q": 8, "l.1.k": 8}),
        (10, {"l.0.q": 8, "l.0.k": 2, "l.1.q": 6, "l.1.k": 0}),
    ]
    total, by_module, by_layer = ranks_over_time(history)
    assert [list(row) for row in total.data.rows] == [[0, 32], [10, 16]]
    assert cells_of(by_module) == [[0, 8.0, 8.0], [10, 7.0, 1.0]]
    assert cells_of(by_layer) == [[0, 8.0, 8.0], [10, 5.0, 3.0]]
    assert "`k` lost most: 8 became 1. `q` kept most: 8 became 7." in by_module.caption
    assert len(ranks_over_time([(0, {"head": 3})])) == 1

"""The papers' claims on the papers' benchmarks, with intervals that would see a difference.

    make claims DATA=folder        all trials, and the page of them

The parts: `tasks` (models and data), `arms` (what is compared), `study` (runs trials, resumable),
`archive` (the committed trials), `evidence` (where arms stand), `design` (how many seeds and rows are
needed), `analysis` (differences with their intervals), `bleu` (of what adapters wrote), `statements`
(the claims) and `judges` (their verdicts), `page` and `pictures` (docs/evidence/study.md), `again`
(runs one cell again).
"""

from lorakin.library_logs import calm_libraries

calm_libraries()

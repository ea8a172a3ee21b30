"""The papers' claims on the papers' benchmarks, with intervals that would see a difference.

    make claims DATA=folder        everything: the pilot, the design, all trials, the page

The parts: `tasks` (models and data), `arms` (what is compared), `study` (runs trials, resumable),
`pilot` and `design` (how many steps, seeds and rows are needed), `analysis` (differences with their
intervals), `statements` (the claims), `page` and `pictures` (docs/evidence/claims.md), `again`
(runs one cell again).
"""

from lorakin.library_logs import calm_libraries

calm_libraries()

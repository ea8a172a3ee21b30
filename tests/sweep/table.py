"""Run the sweep and write docs/evidence/architectures.md: `python -m sweep.table`, with src and tests on the path.

With `--refused`, print instead what `REFUSED` in architectures.py would have to say. `--only NAME …` runs some.
"""

from __future__ import annotations

import argparse
import collections
import pprint
import time
import warnings
from pathlib import Path

import torch
import transformers

from sweep import architectures, checks

PAGE = Path(__file__).parents[2] / "docs" / "evidence" / "architectures.md"
COMMAND = "make sweep"
NO_FAILURE = "none"
HEAD = """# Architectures

A LoRA adapter of rank 2 on "all-linear" was put into {count} architectures of transformers {transformers}.
Each is a tiny random model with its own head, which is trained whole if it looks new. The adapter was trained for three
steps with the model's own dropout and masking, merged, unmerged, saved, loaded into a fresh base and taken out again.
{counts}

```bash
{command}
```

torch {torch}, one core, {seconds:.0f} s. The distance is the largest between the merged and the unmerged output in
float32, relative to the output's largest value. A module is *unused* if its weight gets no gradient in the base either,
when the whole base trains: the forward does not reach it with these inputs, or something behind it begins at zero.

| architecture | class | modules adapted | refused | merged − unmerged | failures |
|---|---|---|---|---|---|
"""


def row(name: str) -> tuple[checks.Found, list[str]]:
    """What was found of an architecture and the kinds of its failures; a crash is one."""
    try:
        found = checks.examined(name)
    except Exception as error:  # a crash of any kind is what this is to find
        found = checks.Found(name, architectures.HEADS[name])
        return found, [f"crash: {type(error).__name__}: {' '.join(str(error).split())[:160]}"]
    return found, checks.failures(found)


def page(rows: list[tuple[checks.Found, list[str]]], seconds: float) -> str:
    """The Markdown page."""
    failed = [(found, kinds) for found, kinds in rows if kinds]
    whole = [found for found, _ in rows if "" in found.refused]
    parts = [found for found, _ in rows if found.refused and "" not in found.refused]
    passed = len(rows) - len(failed) - len(whole)
    counts = (
        f"{passed} pass, {len(failed)} fail, {len(whole)} are refused as a whole; "
        f"in {len(parts)} single modules are refused by name."
    )
    lines = HEAD.format(
        count=len(rows), counts=counts, command=COMMAND, seconds=seconds,
        transformers=transformers.__version__, torch=torch.__version__,
    ).splitlines()  # fmt: skip
    for found, kinds in rows:
        unused = f" ({len(found.unused)} unused)" if found.unused else ""
        refused = "; ".join(
            f"`{module}`: {why}" if module else why for module, why in found.refused.items()
        )
        figure = f"{found.merged:.0e}" if found.adapted else ""
        cells = [
            found.name,
            f"`{found.model}`",
            f"{found.adapted}{unused}",
            refused,
            figure,
            ", ".join(kinds),
        ]
        lines.append("| " + " | ".join(cell.replace("|", "\\\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--refused", action="store_true")
    parser.add_argument("--only", nargs="+", default=[])
    parser.add_argument("--out", type=Path, default=PAGE)
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    begun = time.monotonic()
    names = options.only or [
        name for name, head in architectures.HEADS.items() if hasattr(transformers, head)
    ]
    rows = [row(name) for name in names]
    for found, kinds in rows:
        if kinds:
            print(f"{found.name}: {', '.join(kinds)}")
    print(
        dict(
            collections.Counter(
                kind.partition(":")[0] for _, kinds in rows for kind in kinds or [NO_FAILURE]
            )
        )
    )
    if options.refused:
        pprint.pprint({found.name: found.refused for found, _ in rows if found.refused}, width=124)
    else:
        options.out.write_text(page(rows, time.monotonic() - begun))


if __name__ == "__main__":
    main()

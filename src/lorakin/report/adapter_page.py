"""The page about one adapter, from what its files say: facts, pictures by layer, and the ranks that would do."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping

from lorakin.report import page, pictures, spectrum
from lorakin.report.page import Block, Code, Column, Paragraph, Section, Table
from lorakin.storage.summary import Summary, importance_in

MAGNITUDES = (
    "This is the product of each pair alone. The adapter also has magnitudes, one for each output; how much they change the "
    "weights depends on the base model, which is not in the files."
)
TOO_WIDE = (
    "Modules share a pair here, of which each uses as many columns as it has inputs. Only the base model tells how many; the "
    "widest module's are taken, so the norms of narrower ones are too large."
)
NO_PAIR = "The shared pair is not in the file: it is drawn again with the base model at hand. Without it no change has a norm."
UNTRAINED = "No module changes: the product of every pair is zero, as before training."
GUESS = (
    "It is a guess for another run: that this run's change needs few directions does not prove that training finds them as "
    "well when it has no more than these."
)


def render(summary: Summary) -> str:
    """The page.

    Raises:
        AdapterError: its importance.json is none.
    """
    found = importance_in(summary.path)
    sections = [Section("At a glance", [_facts(summary)]), Section("Change", _change(summary))]
    if found:
        sections.append(
            Section(
                "Importance", [pictures.importance(found, summary.method.own_pairs(list(found)))]
            )
        )
    if len(set(summary.ranks.values())) > 1:
        sections.append(Section("Rank", [pictures.ranks(summary.ranks)]))
    if any(summary.norms.values()):
        sections += _spectra(summary)
    title = f"Adapter {summary.path.resolve().name}"
    return page.render(
        title,
        f"{summary.method.words} on {summary.base or 'a base that is not recorded'}",
        sections,
    )


def _facts(summary: Summary) -> Table:
    columns = [Column("fact", numeric=False), Column("value", numeric=False)]
    return Table("What the files say", columns, list(summary.headline().items()), sortable=False)


def _change(summary: Summary) -> list[Block]:
    if not summary.norms:
        return [Paragraph(NO_PAIR)]
    if not any(summary.norms.values()):
        return [Paragraph(UNTRAINED)]
    notes = [MAGNITUDES] * summary.gained + [TOO_WIDE] * _shared(summary)
    return [
        pictures.change_by_layer(
            summary.norms_together, of="up·down" if summary.gained else "ΔW", note=" ".join(notes)
        )
    ]


def _spectra(summary: Summary) -> list[Section]:
    """What rank the change needs: as pictures, as lines to copy, and module by module."""
    spectra = {path: spectrum.singular_values(pair) for path, pair in summary.pairs.items()}
    effective = {path: spectrum.effective_rank(values) for path, values in spectra.items()}
    suggested = spectrum.suggested_ranks(spectra)
    found = spectrum.rank_pattern(suggested)
    now, then = _numbers(summary, summary.ranks), _numbers(summary, suggested)
    counted = f"Pairs of these ranks have {then:,} numbers, {then / now:.0%} of the {now:,} that pairs of the present ranks have."
    if _shared(summary):
        counted += f" The file has only {summary.parameters:,}, because modules share a pair."
    reached = (
        f"The smallest ranks that keep {spectrum.ENERGY:.0%} of ‖up·down‖² in every module, and so leave out at most "
        f"{math.sqrt(1 - spectrum.ENERGY):.0%} of ‖up·down‖, rounded up to 1, 2, 3, 4, 6, 8, 12, 16 and so on."
    )
    blocks: list[Block] = [
        pictures.effective_ranks(effective),
        pictures.ranks(suggested, title="Suggested rank by layer and module", note=reached),
        Paragraph(counted, GUESS),
        Code(
            "To copy; it is JSON, YAML and Python alike. Patterns mean what they mean in PEFT.",
            _lines(summary, found),
        ),
    ]
    if found.unchanged:
        blocks.append(
            Code("These modules do not change, and need no pair:", "\n".join(found.unchanged))
        )
    columns = [
        Column("module", numeric=False),
        Column("‖up·down‖", "The Frobenius norm of the pair's product."),
        Column("rank", "Of the pair as it is."),
        Column("effective rank", "The exponential of the entropy of the singular values."),
        Column("suggested", "The rank as suggested above."),
    ]
    rows: list[list[page.Value]] = [
        [path, summary.norms[path], summary.ranks[path], effective[path], suggested[path]]
        for path in spectra
    ]
    return [
        Section("Rank that is needed", blocks),
        Section("Every module", [Table("By module", columns, rows)], open=False),
    ]


def _lines(summary: Summary, found: spectrum.RankPattern) -> str:
    """The ranks in PEFT's words, with alphas that keep the present scale alpha/rank where there is one."""
    said: dict[str, object] = {"r": found.rank, "rank_pattern": found.pattern}
    alpha, rank = summary.method.setting("alpha"), summary.method.setting("rank")
    if alpha and rank and not summary.method.setting("rslora"):
        alphas = {key: _whole(alpha * r / rank) for key, r in found.pattern.items()}
        said |= {"lora_alpha": _whole(alpha * found.rank / rank), "alpha_pattern": alphas}
    return json.dumps(said, indent=2, ensure_ascii=False)


def _whole(number: float) -> float:
    """A whole number without its ".0", which some readers do not take."""
    return int(number) if number == int(number) else number


def _numbers(summary: Summary, ranks: Mapping[str, int]) -> int:
    """How many numbers pairs of these ranks have."""
    return sum(
        ranks[path] * (len(pair.up) + pair.down.shape[1]) for path, pair in summary.pairs.items()
    )


def _shared(summary: Summary) -> bool:
    """Whether the file holds less than the pairs, because modules share them."""
    return summary.parameters < _numbers(summary, summary.ranks)

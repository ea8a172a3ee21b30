"""The page about one adapter, made from its files alone: facts, pictures by layer, needed ranks."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping

from lorakin.report import heatmaps, page, spectrum
from lorakin.report.page import Block, Code, Column, Paragraph, Section, Table
from lorakin.storage.summary import Summary, importance_in

MAGNITUDES = (
    "This is the product of each pair alone. The adapter also has magnitudes, one for each output. "
    "How much they change the weights depends on the base model, which is not in the files."
)
TOO_WIDE = (
    "Modules share a pair here, and each uses as many of its columns as it has inputs. Only the "
    "base model tells how many. This page takes the widest module's, so the norms of narrower "
    "modules are too large."
)
NO_PAIR = (
    "The shared pair is not in the file: it is drawn again when the adapter is loaded into its "
    "base model. Without it no change has a norm."
)
UNTRAINED = "No module changes: the product of every pair is zero, as before training."
GUESS = (
    "This is a guess for another run. This run's change needs few directions; that does not prove "
    "that training finds them as well when it has no more than these."
)


def render(summary: Summary) -> str:
    """Returns the page as HTML.

    Raises:
        AdapterError: the adapter's importance.json is damaged.
    """
    shares = importance_in(summary.path)
    sections = [Section("At a glance", [_facts(summary)]), Section("Change", _change(summary))]
    if shares:
        private = summary.method.with_own_pair(list(shares))
        sections.append(Section("Importance", [heatmaps.importance(shares, private)]))
    if len(set(summary.ranks.values())) > 1:
        sections.append(Section("Rank", [heatmaps.ranks(summary.ranks)]))
    if any(summary.norms.values()):
        sections += _spectra(summary)
    base = summary.base or "a base that is not recorded"
    title = f"Adapter {summary.path.resolve().name}"
    return page.render(title, f"{summary.method.words} on {base}", sections)


def _facts(summary: Summary) -> Table:
    columns = [Column("fact", numeric=False), Column("value", numeric=False)]
    return Table("What the files say", columns, list(summary.headline().items()), sortable=False)


def _change(summary: Summary) -> list[Block]:
    """Returns how much each module changes, if the files tell."""
    if not summary.norms:
        return [Paragraph(NO_PAIR)]
    if not any(summary.norms.values()):
        return [Paragraph(UNTRAINED)]
    notes = [MAGNITUDES] * summary.has_gain + [TOO_WIDE] * _shared(summary)
    change = "up·down" if summary.has_gain else "ΔW"
    return [heatmaps.change_by_layer(summary.norms_by_stack, of=change, note=" ".join(notes))]


def _spectra(summary: Summary) -> list[Section]:
    """Returns which ranks the change needs: as pictures, as lines to copy, and by module."""
    spectra = {path: spectrum.singular_values(pair) for path, pair in summary.pairs.items()}
    effective = {path: spectrum.effective_rank(values) for path, values in spectra.items()}
    suggested = spectrum.suggested_ranks(spectra)
    pattern = spectrum.rank_pattern(suggested)
    reached = (
        f"The smallest ranks that keep {spectrum.ENERGY:.0%} of ‖up·down‖² in every module, and so "
        f"leave out at most {math.sqrt(1 - spectrum.ENERGY):.0%} of ‖up·down‖, rounded up to 1, 2, "
        "3, 4, 6, 8, 12, 16 and so on."
    )
    blocks: list[Block] = [
        heatmaps.effective_ranks(effective),
        heatmaps.ranks(suggested, title="Suggested rank by layer and module", note=reached),
        Paragraph(_counted(summary, suggested), GUESS),
        Code(
            "Lines to copy. They are valid JSON, YAML and Python, and the patterns mean the same "
            "as in PEFT.",
            _lines(summary, pattern),
        ),
    ]
    if pattern.unchanged:
        unchanged = "\n".join(pattern.unchanged)
        blocks.append(Code("These modules do not change and need no pair:", unchanged))
    return [
        Section("Rank that is needed", blocks),
        Section("Every module", [_modules(summary, effective, suggested)], open=False),
    ]


def _counted(summary: Summary, suggested: Mapping[str, int]) -> str:
    """Says how many parameters pairs of the suggested ranks have."""
    now, then = _parameter_count(summary, summary.ranks), _parameter_count(summary, suggested)
    text = (
        f"Pairs of these ranks have {then:,} parameters, {then / now:.0%} of the {now:,} that "
        "pairs of the present ranks have."
    )
    if _shared(summary):
        text += f" The file has only {summary.parameters:,}, because modules share a pair."
    return text


def _modules(
    summary: Summary, effective: Mapping[str, float], suggested: Mapping[str, int]
) -> Table:
    columns = [
        Column("module", numeric=False),
        Column("‖up·down‖", "The Frobenius norm of the pair's product."),
        Column("rank", "The pair's present rank."),
        Column("effective rank", "The exponential of the entropy of the singular values."),
        Column("suggested", "The rank suggested above."),
    ]
    rows: list[list[page.Value]] = [
        [path, summary.norms[path], summary.ranks[path], effective[path], suggested[path]]
        for path in effective
    ]
    return Table("By module", columns, rows)


def _lines(summary: Summary, suggested: spectrum.RankPattern) -> str:
    """Returns the ranks in PEFT's words, with alphas that keep the present alpha / rank."""
    fields: dict[str, object] = {"r": suggested.rank, "rank_pattern": suggested.pattern}
    alpha, rank = summary.method.setting("alpha"), summary.method.setting("rank")
    if alpha and rank and not summary.method.setting("rslora"):
        alphas = {key: _whole(alpha * r / rank) for key, r in suggested.pattern.items()}
        fields |= {"lora_alpha": _whole(alpha * suggested.rank / rank), "alpha_pattern": alphas}
    return json.dumps(fields, indent=2, ensure_ascii=False)


def _whole(number: float) -> float:
    """Drops ".0" from a whole number: some readers do not accept it."""
    return int(number) if number == int(number) else number


def _parameter_count(summary: Summary, ranks: Mapping[str, int]) -> int:
    """Returns how many parameters pairs of these ranks have."""
    return sum(
        ranks[path] * (len(pair.up) + pair.down.shape[1]) for path, pair in summary.pairs.items()
    )


def _shared(summary: Summary) -> bool:
    """Returns whether modules share pairs: then the file has fewer parameters than the pairs."""
    return summary.parameters < _parameter_count(summary, summary.ranks)

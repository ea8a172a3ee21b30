"""The part Data: the user's rows as training would see them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import altair as alt
import gradio as gr

from lorakin.errors import SettingError
from lorakin.training.recipe_option import DATA
from lorakin.ui import curves, recipe_form, uploads
from lorakin.ui.answered import answered, place_for_problems

if TYPE_CHECKING:
    from rich.text import Text

    from lorakin.training.preview import Preview

OPEN = ("columns", "format", "chat_template", "loss_on", "max_length", "max_rows")
TOP = ("model", "data")
FIELDS = (*OPEN, *recipe_form.group((*TOP, *OPEN), DATA))
"""The fields of this part's form."""
LEARNED, BRACKETS = "learned", "⟦⟧"
EXAMPLES = 3


@dataclasses.dataclass(frozen=True)
class DataInputs:
    """What other parts take from this one: the model, the data, and how they are read.

    Attributes:
        model, data: the fields at the head of the page.
        fields: the components of `FIELDS`.
    """

    model: Any
    data: Any
    fields: list[Any]

    @property
    def names(self) -> tuple[str, ...]:
        """The fields of all of them."""
        return (*TOP, *FIELDS)

    @property
    def components(self) -> list[Any]:
        """All of them."""
        return [self.model, self.data, *self.fields]


def build(model: Any, data: Any, runs: Path) -> DataInputs:
    """Builds the part.

    Args:
        model, data: the fields at the head of the page.
        runs: the folder of the runs, where files are kept.
    """
    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            file = gr.File(
                label="Drop a file here, or choose one", file_count="single", elem_id="upload"
            )
            fields = {name: recipe_form.input_of(name) for name in OPEN}
            with gr.Accordion("More", open=False):
                fields |= {name: recipe_form.input_of(name) for name in FIELDS[len(OPEN) :]}
            look = gr.Button("Preview", variant="primary", elem_id="preview")
        with gr.Column(scale=3, min_width=300):
            problem = place_for_problems()
            facts = gr.Dataframe(
                headers=["of the data", "what training would make of it"], label="The data",
                wrap=True, interactive=False, elem_id="facts", column_widths=["20%", "80%"],
            )  # fmt: skip
            lengths = gr.Plot(label="Lengths", show_label=False, elem_id="lengths")
            examples = [
                gr.HighlightedText(
                    label=label,
                    color_map={LEARNED: "green"},
                    show_inline_category=False,
                    show_legend=True,
                    elem_id=f"example-{number}",
                )
                for number, label in enumerate(("Shortest row", "Median row", "Longest row"))
            ]
    inputs = DataInputs(model, data, list(fields.values()))
    shown = [facts, lengths, *examples]
    _answer(inputs, file, look, shown, problem, runs)
    return inputs


def _answer(
    inputs: DataInputs, file: Any, look: Any, shown: list[Any], problem: Any, runs: Path
) -> None:
    """Shows the data in `shown` when the user asks for it, drops a file, or leaves a field."""
    show = answered(lambda *values: _shown(*_fields(inputs, values)), len(shown))
    seen = gr.State("")

    def show_and_note(*form: Any) -> tuple[Any, ...]:
        return (*show(*form), repr(form))

    def show_if_other(*values: Any) -> tuple[Any, ...]:
        """Shows what the form says now, unless that is shown, or is not complete yet."""
        *form, before = values
        if repr((*form,)) == before or not all(form[: len(TOP)]):
            return tuple(gr.skip() for _ in told["outputs"])
        return show_and_note(*form)

    told: dict[str, Any] = {
        "outputs": [*shown, problem, seen], "trigger_mode": "always_last", "show_progress": "full",
    }  # fmt: skip
    edits = [
        event
        for one in inputs.components
        for event in ([one.submit, one.blur] if isinstance(one, gr.Textbox) else [one.input])
    ]
    # One listener, so that of several edits only the last is answered.
    gr.on(edits, show_if_other, inputs=[*inputs.components, seen], **told)
    look.click(show_and_note, inputs=inputs.components, **told)
    file.upload(
        answered(lambda path: (_kept(path, runs),), 1, keeps=True),
        [file],
        [inputs.data, problem],
    ).success(show_and_note, inputs=inputs.components, **told)


def _kept(path: str, runs: Path) -> str:
    return uploads.keep(Path(path), runs).as_posix()


def _fields(inputs: DataInputs, values: tuple[Any, ...]) -> tuple[dict[str, Any]]:
    return (recipe_form.fields_of(recipe_form.raw_of(inputs.names, values)),)


def _shown(fields: dict[str, Any]) -> tuple[Any, ...]:
    from lorakin.training.preview import histogram, preview, recipe_for

    check_named(fields)
    found: Preview = preview(recipe_for(fields.pop("model"), fields.pop("data"), **fields))
    rows = [[label, fact] for label, fact in found.facts()]
    rows += [["epoch", line] for line in found.epoch.lines()]
    rows += [["mind", trouble] for trouble in found.troubles()]
    bins = histogram(found.lengths, found.max_length)
    examples = [pieces(text) for text in found.examples]
    examples += [[]] * (EXAMPLES - len(examples))
    return rows, _bars(bins, f"{found.counted}s"), *examples


def check_named(fields: Mapping[str, Any]) -> None:
    """Checks that the head of the page names a model and data.

    Raises:
        SettingError: it does not.
    """
    for name in TOP:
        if not fields.get(name):
            raise SettingError(f"{name} is missing; name it at the head of the page")


def _bars(bins: list[tuple[str, int]], counted: str) -> Any:
    """Returns a chart of how many rows have how many tokens."""
    points = [{"tokens": name, "count": count} for name, count in bins]
    chart = alt.Chart(alt.InlineData(values=points)).mark_bar()
    return chart.encode(
        x=alt.X("tokens:N", sort=None, axis=alt.Axis(labelAngle=0)),
        y=alt.Y("count:Q", title=counted),
        tooltip=["tokens:N", "count:Q"],
    ).properties(**curves.shape(f"{counted} by their tokens"))


def pieces(text: Text) -> list[tuple[str, str | None]]:
    """Returns an example's pieces, each with whether it is learned.

    >>> from rich.text import Text
    >>> pieces(Text("Hi: ").append("⟦you⟧", style="green"))
    [('Hi: ', None), ('you', 'learned')]
    """
    found: list[tuple[str, str | None]] = []
    end = 0
    for span in sorted(text.spans):
        if str(span.style) != "green":
            continue
        found += [(text.plain[end : span.start], None)] if span.start > end else []
        before, _, learned = text.plain[span.start : span.end].partition(BRACKETS[0])
        learned, _, after = learned.rpartition(BRACKETS[1])
        found.append((before + learned + after, LEARNED))
        end = span.end
    return [*found, (text.plain[end:], None)] if end < len(text.plain) else found

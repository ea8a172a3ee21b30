"""Draws docs/pictures/*.svg: what each method adds to a frozen weight, and which parts of it train.

    python tools/draw.py        writes the pictures; a test says when they are not what this draws

A picture is a row of parts from left to right: boxes in the proportions of the tensors, and signs between them. Lines and words
have the colour of the text around them (`currentColor`), so that the picture reads on a light page and on a dark one.
"""

from __future__ import annotations

from dataclasses import dataclass
from html import escape
from pathlib import Path

PICTURES = Path(__file__).parents[1] / "docs" / "pictures"

FROZEN, TRAINED, FAST, MOVED, FREED = "frozen", "trained", "fast", "moved", "freed"
"""Kinds of box; their looks stand in STYLE."""
LEGEND = {
    FROZEN: "frozen",
    TRAINED: "trained",
    FAST: "trained, faster",
    MOVED: "moves with the pair",
    FREED: "pruned and freed",
}
STYLE = """\
svg:root { color: #24292f }
@media (prefers-color-scheme: dark) { svg:root { color: #e6edf3 } }
.update text { fill: currentColor; font-family: system-ui, sans-serif; font-size: 15px; text-anchor: middle }
.update .small { font-size: 12px; opacity: .8 }
.update .sign { font-size: 22px }
.update rect { stroke: currentColor; stroke-width: 1.2 }
.update .frozen { fill: #8a939d; fill-opacity: .22 }
.update .trained { fill: #12a594; fill-opacity: .55 }
.update .fast { fill: #e5484d; fill-opacity: .55 }
.update .moved { fill: #f5a524; fill-opacity: .5 }
.update .freed { fill: none; stroke-dasharray: 4 3 }"""
HEIGHT, MIDDLE, GAP = 190, 88, 12


@dataclass(frozen=True)
class Box:
    """A tensor: how wide and high it is drawn, its name, its shape, and its kind."""

    width: int
    height: int
    name: str
    shape: str
    kind: str


@dataclass(frozen=True)
class Sign:
    """What stands between two tensors."""

    text: str

    @property
    def width(self) -> int:
        return 10 * len(self.text) + 14


Part = Box | Sign


def weight(kind: str = FROZEN, name: str = "W₀") -> Box:
    return Box(110, 110, name, "out × in", kind)


def up(name: str, kind: str, shape: str = "out × r") -> Box:
    return Box(30, 110, name, shape, kind)


def down(name: str, kind: str, shape: str = "r × in") -> Box:
    return Box(110, 30, name, shape, kind)


def vector(name: str, kind: str, shape: str, height: int) -> Box:
    return Box(14, height, name, shape, kind)


PLUS = Sign("+")


def anchored(b: str, a: str) -> list[Part]:
    """W₀ and a pair whose start is taken away again; how its factors begin stands under them."""
    pair: list[Part] = [up("B", TRAINED, b), down("A", TRAINED, a), Sign("−")]
    anchor: list[Part] = [up("B₀", FROZEN, "the start"), down("A₀", FROZEN, "the start"), Sign(")")]
    return [weight(), Sign("+ s · ("), *pair, *anchor]


def small(name: str, matters: str) -> list[Part]:
    return [Box(70, 70, name, matters, FROZEN), PLUS]


def small_pair(up: str, down: str, shape: str, kind: str) -> list[Part]:
    return [Box(20, 70, up, shape, kind), Box(70, 20, down, shape, kind)]


DRAWINGS: dict[str, tuple[str, list[Part]]] = {
    "family": (
        "the whole family: a gain times the sum of the frozen weight and a low-rank pair",
        [
            vector("gain", TRAINED, "out", 110), Sign("⊙ ("), weight(), PLUS,
            up("up", TRAINED), down("down", TRAINED), Sign(")"),
        ],
    ),
    "lora": (
        "LoRA: W₀ is frozen; B and A are trained",
        [weight(), Sign("+ s ·"), up("B", TRAINED), down("A", TRAINED)],
    ),
    "lora-plus": (
        "LoRA+: the same tensors as LoRA; B learns faster than A",
        [weight(), Sign("+ s ·"), up("B", FAST, "rate ρη"), down("A", TRAINED, "rate η")],
    ),
    "lora-fa": (
        "LoRA-FA: A stays as it was drawn; only B is trained",
        [weight(), Sign("+ s ·"), up("B", TRAINED), down("A", FROZEN)],
    ),
    "vera": (
        "VeRA: one frozen pair for all modules, and two trained vectors for each module",
        [
            weight(), PLUS, vector("b", TRAINED, "out", 110), Sign("⊙"), up("B", FROZEN, "shared"),
            vector("d", TRAINED, "r", 30), Sign("⊙"), down("A", FROZEN, "shared"),
        ],
    ),
    "dora": (
        "DoRA: a trained length m for each output, over the norm of the changed weight",
        [
            vector("m", TRAINED, "out", 110), Sign("/"), vector("‖V‖", FROZEN, "", 110), Sign("⊙ ("), weight(), Sign("+ s ·"),
            up("B", TRAINED), down("A", TRAINED), Sign(") = V"),
        ],
    ),
    "adalora": (
        "AdaLoRA: triplets of P, Λ and Q, of which the least important are pruned and freed while training",
        [
            weight(), Sign("+ s ·"),
            up("P", TRAINED), Box(12, 110, "", "", FREED), Sign("·"),
            Box(30, 30, "Λ", "", TRAINED), Box(12, 30, "", "", FREED), Sign("·"),
            Box(110, 26, "Q", "", TRAINED), Box(110, 12, "", "r × in", FREED),
        ],
    ),
    "lora-drop": (
        "LoRA-drop: modules that matter keep a pair of their own; the others share one pair",
        [
            *small("W₁", "matters"), *small_pair("B₁", "A₁", "", TRAINED), Sign("   "),
            *small("W₂", "matters less"), *small_pair("B", "A", "shared", MOVED), Sign("   "),
            *small("W₃", "matters less"), *small_pair("B", "A", "shared", MOVED),
        ],
    ),
    "delta-lora": (
        "Delta-LoRA: the weight itself moves with every step of the pair; stored exactly as a second, frozen pair",
        [
            weight(MOVED, "W"), Sign("+ s ·"), up("B", TRAINED), down("A", TRAINED), Sign("  with  W = W₀ + λs · ("),
            up("B", TRAINED), down("A", TRAINED), Sign("−"), up("Bₖ", FROZEN), down("Aₖ", FROZEN), Sign(")"),
        ],
    ),
    "pissa": (
        "PiSSA: B and A begin as the principal part of W₀; a frozen copy takes the start away again",
        anchored("begins as U√S", "begins as √S Vᵀ"),
    ),
    "olora": (
        "OLoRA: B and A begin as the leading part of W₀'s QR; a frozen copy takes the start away again",
        anchored("begins as Q", "begins as R"),
    ),
    "lora-xs": (
        "LoRA-XS: only a small square matrix is trained, between the frozen singular vectors of W₀",
        [
            weight(), Sign("+ s ·"), up("B", FROZEN, "U S of W₀"), Box(30, 30, "R", "r × r", TRAINED),
            down("A", FROZEN, "Vᵀ of W₀"),
        ],
    ),
    "eva": (
        "EVA: A begins as what the module's inputs vary along most; ranks go where they explain most",
        [
            weight(), Sign("+ s ·"), up("B", TRAINED, "begins at 0"),
            down("A", TRAINED, "begins from inputs"),
        ],
    ),
    "lora-ga": (
        "LoRA-GA: B and A begin along the gradient of W₀; a frozen copy takes the start away again",
        anchored("gradient's U", "gradient's Vᵀ"),
    ),
}  # fmt: skip
"""Name of the file -> what it shows, in words, and its parts."""
OWN_LEGEND = {"lora-drop": {MOVED: "trained, one for all of a kind"}}
JOINED = {("P", ""), ("Λ", "")}
"""Neighbours that are columns of one matrix, and touch."""


def drawn(name: str) -> str:
    """The SVG of one picture."""
    title, parts = DRAWINGS[name]
    x, shapes, before = 16.0, [], None
    for part in parts:
        stacked = isinstance(part, Box) and isinstance(before, Box) and before.name == "Q"
        if isinstance(part, Box) and isinstance(before, Box):
            x += -before.width if stacked else 0 if (before.name, part.name) in JOINED else GAP
        shapes.append(
            _box(part, x, 20.0 if stacked else 0.0) if isinstance(part, Box) else _sign(part, x)
        )
        x += part.width
        before = part
    kinds = dict.fromkeys(part.kind for part in parts if isinstance(part, Box))
    words = LEGEND | OWN_LEGEND.get(name, {})
    legend, left = [], 16.0
    for kind in kinds:
        legend.append(f'<rect class="{kind}" x="{left:g}" y="162" width="14" height="14" rx="2"/>')
        legend.append(
            f'<text class="small" x="{left + 20:g}" y="174" style="text-anchor: start">{words[kind]}</text>'
        )
        left += 44 + 6.6 * len(words[kind])
    width = f"{max(x + 16, left):g}"
    size = f'viewBox="0 0 {width} {HEIGHT}" style="max-width: {width}px"'
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" class="update" {size}>',
            f"<title>{escape(title)}</title>",
            f"<style>{STYLE}</style>",
            *shapes,
            *legend,
            "</svg>",
            "",
        ]
    )


def _box(box: Box, x: float, lower: float) -> str:
    top, centre = MIDDLE - box.height / 2 + lower, x + box.width / 2
    inside = box.width >= 30 and box.height >= 26
    label = MIDDLE + lower + 5 if inside else top - 6
    lines = [
        f'<rect class="{box.kind}" x="{x:g}" y="{top:g}" width="{box.width}" height="{box.height}" rx="2"/>'
    ]
    if box.name:
        lines.append(f'<text x="{centre:g}" y="{label:g}">{escape(box.name)}</text>')
    if box.shape:
        lines.append(
            f'<text class="small" x="{centre:g}" y="{top + box.height + 15:g}">{escape(box.shape)}</text>'
        )
    return "\n".join(lines)


def _sign(sign: Sign, x: float) -> str:
    return (
        f'<text class="sign" x="{x + sign.width / 2:g}" y="{MIDDLE + 7}">{escape(sign.text)}</text>'
    )


if __name__ == "__main__":
    for name in DRAWINGS:
        (PICTURES / f"{name}.svg").write_text(drawn(name), encoding="utf-8")

"""`make templates`: docs/evidence/templates.md, what is learned under every template that trl and
transformers carry.
"""

from __future__ import annotations

import collections
from pathlib import Path

import transformers
import trl

from lorakin.training.answers import ANSWERS, LAST
from lorakin.training.templates import Template
from training.carried import templates, tokenizer_of
from training.test_templates import CONVERSATIONS, outcome

PAGE = Path(__file__).parents[2] / "docs" / "evidence" / "templates.md"
CELLS = {
    ("verified", "verified"): "✔",
    ("refused", "verified"): "last",
    ("refused", "refused"): "–",
}
HEAD = """# Chat templates: what is learned under each

Made by `make templates` with trl {trl} and transformers {transformers}. ✔: every answer is learned,
and verified ([Your own data](../howto/data.md#what-is-learned) says what that is). last: verified
with `--loss-on last`, refused without. –: refused, with the reason.
Under the conversations stand the counts with `--loss-on answers` and with `--loss-on last`.

"""


def table() -> str:
    """The page."""
    counts: collections.Counter[tuple[str, str, str]] = collections.Counter()
    lines = []
    for name, text in templates().items():
        template, cells = Template(tokenizer_of(text)), []
        for conversation in CONVERSATIONS:
            found = tuple(outcome(template, conversation, on) for on in (ANSWERS, LAST))
            for on, what in zip((ANSWERS, LAST), found, strict=True):
                counts[conversation, on, what if what in ("verified", "refused") else "wrong"] += 1
            cells.append(CELLS.get(found, f"**{found}**"))  # type: ignore[call-overload]
        short = (
            name.removeprefix("trl/chat_templates/")
            .removeprefix("transformers/models/")
            .removesuffix(".jinja")
        )
        lines.append(f"| {short} | {' | '.join(cells)} |")
    out = HEAD.format(trl=trl.__version__, transformers=transformers.__version__)
    out += f"| template | {' | '.join(CONVERSATIONS)} |\n|---|{'---|' * len(CONVERSATIONS)}\n"
    out += "\n".join(lines) + "\n"
    for on in (ANSWERS, LAST):
        for what in ("verified", "refused", "wrong"):
            numbers = " | ".join(
                str(counts[conversation, on, what]) for conversation in CONVERSATIONS
            )
            out += f"| **{on}: {what}** | {numbers} |\n"
    return out


if __name__ == "__main__":
    PAGE.write_text(table(), encoding="utf-8")
    print(f"wrote {PAGE}")

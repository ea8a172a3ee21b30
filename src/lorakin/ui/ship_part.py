"""The part Ship: an adapter for other programs, its proof, and the command that serves it."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import gradio as gr

from lorakin.errors import OutputError, SettingError
from lorakin.terminal import command
from lorakin.ui import jobs, recipe_form, runs
from lorakin.ui.answered import answered, command_box, place_for_problems
from lorakin.ui.changes import emptied_by_edits
from lorakin.ui.look_part import adapter_input
from lorakin.ui.ticks import Ticks

MERGE, PUSH = "merged", "push"
PLAIN: str = "lora"
"""What `lorakin export --to` calls plain LoRA."""
TARGETS = [
    ("a merged model, for transformers and vLLM", MERGE),
    ("plain LoRA, for PEFT and vLLM", PLAIN),
    ("a GGUF adapter, for llama.cpp", "gguf"),
    ("a merged GGUF model, for llama.cpp and Ollama", "gguf-merged"),
]
SERVED = {
    MERGE: "vllm serve {out}",
    PLAIN: "lorakin serve {out} --out {out}-served",
    "gguf": "llama-server -m base.gguf --lora {out}/adapter.gguf",
    "gguf-merged": "llama-server -m {out}/model.gguf",
}
"""What is exported → the command that serves it."""
TITLES = ("directory", "holds", "state", "compared with the trained model")
FIGURES = {
    "mean_kl": "mean KL {:.2g} nats",
    "max_logit_difference": "largest difference of a logit {:.2g}",
    "token_agreement": "the same likeliest token at {:.1%}",
}
"""Names in an export's report → how they are said."""
LOGS = ".log"
"""The ending of the file beside an export's directory that says how it was made."""


def build(runs_folder: Path, ticks: Ticks, tab: Any) -> Any:
    """Builds the part in a tab; returns the component that chooses an adapter."""
    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            adapter = adapter_input("ship-adapter")
            to = gr.Radio(TARGETS, value=MERGE, label="to", elem_id="ship-to")
            out = recipe_form.out_input("merged", runs_folder, "ship-out")
            dtype = gr.Textbox(
                label="dtype", placeholder="the target's own", elem_id="ship-dtype",
                info="float32, float16 or bfloat16; base (merged); q8_0 (gguf-merged).",
            )  # fmt: skip
            rank = gr.Textbox(
                label="rank", info="The largest rank of a module; for plain LoRA only."
            )
            portable = gr.Checkbox(
                label="portable", info="One rank for all modules and scale 1, for plain LoRA only."
            )
            start = gr.Button("Export", variant="primary", elem_id="export")
            refused = place_for_problems()
            name = gr.Textbox(
                label="repository", placeholder="org/name",
                info="On the hub; the adapter is uploaded there, with the token of this machine.",
            )  # fmt: skip
            push = gr.Button("Push to the hub", elem_id="push")
            unpushed = place_for_problems()
        with gr.Column(scale=3, min_width=300):
            problem = place_for_problems()
            line = command_box("ship-command")
            serve = command_box("serve-command", "The command to serve it")
            table = gr.Dataframe(
                headers=list(TITLES), label="Exports", interactive=False, wrap=True,
                elem_id="exports", column_widths=["140px", "110px", "140px", "320px"],
            )  # fmt: skip
            log = gr.Textbox(
                label="What the last one prints", lines=6, interactive=False, elem_id="ship-log"
            )
    inputs = [adapter, to, out, dtype, rank, portable]

    def words(*values: Any) -> tuple[str, str]:
        return _described(runs_folder, *values)

    gr.on(
        [tab.select, *(component.change for component in inputs)], answered(words, 2), inputs,
        [line, serve, problem], show_progress="hidden", trigger_mode="always_last",
    )  # fmt: skip
    start.click(answered(lambda *values: _started(runs_folder, *values), 0), inputs, [refused])
    push.click(
        answered(lambda *values: _pushed(runs_folder, *values), 0), [adapter, name], [unpushed]
    )
    emptied_by_edits(refused, inputs)
    emptied_by_edits(unpushed, [adapter, name])
    ticks.follow(
        lambda: (exports(runs_folder), _last_log(runs_folder)),
        lambda *found: found,
        [],
        [table, log],
    )
    return adapter


def exports(folder: Path) -> list[list[str]]:
    """Returns the exports in a folder, the latest first: the cells under `TITLES`."""
    rows: list[list[str]] = []
    for log in _logs(folder):
        out = log.with_suffix("")
        report = _report(out)
        error = runs.error_in(runs.log_of(log))
        state = "done" if report or out.name == PUSH else "interrupted"
        state = "running" if jobs.lives(log) else f"failed: {error}" if error else state
        proof = report.get("verified") or {}
        figures = [said.format(proof[name]) for name, said in FIGURES.items() if name in proof]
        holds = str(report.get("order", {}).get("to", ""))
        rows.append([out.name, holds, state, ", ".join(figures)])
    return rows


def _logs(folder: Path) -> list[Path]:
    found = [path for path in folder.glob(f"*{LOGS}") if path.is_file() and not path.is_symlink()]
    found = [path for path in found if runs.log_of(path).startswith(runs.PROMPT)]
    return sorted(found, key=lambda path: -path.stat().st_mtime)


def _last_log(folder: Path) -> str:
    logs = _logs(folder)
    return runs.log_of(logs[0]) if logs else ""


def _report(out: Path) -> dict[str, Any]:
    try:
        report = json.loads((out / runs.EXPORTED).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return report if isinstance(report, dict) else {}


def _words(
    folder: Path,
    adapter: str | None,
    to: str,
    out: str | None,
    dtype: str | None,
    rank: str | None,
    portable: bool,
) -> list[str]:
    # A field that was not shown yet is None.
    name, dtype, rank = ((text or "").strip() for text in (adapter, dtype, rank))
    if not name:
        raise SettingError("adapter is missing; choose a run's, or type a directory or hub id")
    place = str(runs.place(folder, out or ""))
    words = ["merge", name] if to == MERGE else ["export", name, "--to", to]
    words += ["--dtype", dtype] if dtype else []
    words += ["--rank", rank] if rank and to != MERGE else []
    return [*words, *(["--portable"] if portable and to != MERGE else []), "--out", place]


def _described(folder: Path, *values: Any) -> tuple[str, str]:
    words = _words(folder, *values)
    serving = SERVED[values[1]].format(out=shlex.quote(words[-1]))
    return command("lorakin", *words), serving


def _started(folder: Path, *values: Any) -> tuple[Any, ...]:
    words = _words(folder, *values)
    out = Path(words[-1])
    if out.exists():
        raise OutputError(f"--out {out} exists; choose another directory")
    jobs.start(words, out.with_name(out.name + LOGS))
    return ()


def _pushed(folder: Path, adapter: str | None, name: str) -> tuple[Any, ...]:
    if not (adapter or "").strip() or not (name or "").strip():
        raise SettingError("choose an adapter and give the repository's name, such as org/name")
    words = ["push", str(adapter).strip(), name.strip()]
    jobs.start(words, folder / f"{PUSH}{LOGS}")
    return ()

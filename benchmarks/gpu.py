"""Measures steps on a real GPU: every method beside PEFT and the frozen base, time and memory.

    make gpu                                   the tests of tests/gpu on this GPU, then all of this
    python -m benchmarks.gpu 135M 1B           some shapes
    python -m benchmarks.gpu tiny --device cpu does it run?

Nothing is downloaded: the weights are random, the shapes are SmolLM2's, Llama-3.2-1B's and
Llama-3-8B's. All subjects of a shape share one base. A subject's time is taken in turns with the
frozen base's, as a ratio. Rows are halved until a step of plain LoRA fits.
"""

from __future__ import annotations

import argparse
import gc
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import peft
import torch
import transformers

import lorakin as lk
from benchmarks.measure import Spread, interleaved, ratio
from benchmarks.subjects import SUBJECTS, Subject, ours, theirs, twin
from lorakin.family import Method
from lorakin.plan.conditions import Conditions
from lorakin.plan.prediction import Plan, plan_methods

SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {
        "vocab_size": 256, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "length": 32,
    },
    "135M": {
        "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536,
        "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3,
        "tie_word_embeddings": True, "length": 2048,
    },
    "1B": {
        "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192,
        "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8,
        "tie_word_embeddings": True, "length": 2048,
    },
    "8B": {
        "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
        "length": 2048,
    },
}  # fmt: skip
ROWS, ROUNDS = 4, 5


def main(words: Sequence[str] | None = None) -> None:
    """Prints one Markdown table for each shape."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("shapes", nargs="*", metavar="SHAPE", help=f"of {', '.join(SHAPES)}")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    arguments = parser.parse_args(words)
    if unknown := [shape for shape in arguments.shapes if shape not in SHAPES]:
        parser.error(f"no shape {unknown[0]!r}; there are {', '.join(SHAPES)}")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no GPU; --device cpu shows whether this runs")
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()

    print(machine(arguments.device), flush=True)
    for shape in arguments.shapes or ["135M", "1B", "8B"]:
        print()
        for line in table(shape, arguments.device, arguments.rounds):
            print(line, flush=True)


def machine(device: str) -> str:
    """Returns the GPU and the versions, in one line."""
    name = "CPU"
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        name = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
    return (
        f"{name}; lorakin {lk.__version__}, torch {torch.__version__}, transformers "
        f"{transformers.__version__}, peft {peft.__version__}"
    )


def table(shape: str, device: str, rounds: int) -> Iterator[str]:
    """Yields the lines of one shape's table."""
    settings = dict(SHAPES[shape])
    length = settings.pop("length")
    config = transformers.LlamaConfig(**settings, use_cache=False, pad_token_id=0)
    base = random_model(config, device)
    rows = rows_that_fit(base, length, config.vocab_size)
    frozen = step_of(twin(base), rows, length, config.vocab_size)
    yield f"**{shape}, {rows} × {length} tokens, bfloat16**"
    yield ""
    yield "| subject | time, × the frozen base | kept at the peak, MiB | planned, MiB |"
    yield "|---|---|---|---|"
    for name, make, planned in subjects(base, config, rows, length, device):
        try:
            model, optimizer = make()
            step = step_of(model, rows, length, config.vocab_size, optimizer)
            step()
            seconds = interleaved({"frozen": frozen, name: step}, rounds, device)
            clock = "wall" if device == "cuda" else "thread"
            time: Spread | str = ratio(seconds[clock], name, "frozen")
            peak = peak_of(step, device)
        except torch.OutOfMemoryError:
            time, peak = "out of memory", None
        yield f"| {name} | {time} | {_mib(peak)} | {_mib(planned)} |"
        model = optimizer = step = None
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()


def random_model(config: Any, device: str) -> Any:
    """Returns a frozen model of random weights in bfloat16, made on the device."""
    torch.manual_seed(0)
    with torch.device(device):
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)
        try:
            model = transformers.LlamaForCausalLM(config)
        finally:
            torch.set_default_dtype(before)
    return model.train().requires_grad_(False)


def step_of(
    model: Any, rows: int, length: int, vocabulary: int, optimizer: Any = None
) -> Callable[[], None]:
    """Returns a function that runs forward, backward and the optimizer's step, if there is one."""
    parameter = next(model.parameters())
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, vocabulary, (rows, length), generator=generator).to(parameter.device)
    embeddings = model.get_input_embeddings()

    def run() -> None:
        inputs = embeddings(ids).detach().requires_grad_()
        model(inputs_embeds=inputs, labels=ids).loss.backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()

    return run


def rows_that_fit(base: Any, length: int, vocabulary: int) -> int:
    """Returns how many rows a step of plain LoRA takes, `ROWS` or fewer."""
    rows = ROWS
    while True:
        try:
            model, optimizer = with_ours(base, SUBJECTS["lora"])
            step_of(model, rows, length, vocabulary, optimizer)()
            return rows
        except torch.OutOfMemoryError:
            if rows == 1:
                raise
            rows //= 2


def with_ours(base: Any, subject: Subject, fuse: bool = False) -> tuple[Any, Any]:
    """Returns the base with lorakin's adapter, and its optimizer."""
    model, adapter = ours(base, subject)
    if fuse:
        lk.fuse(model)
    return model, adapter.optimizer(lr=1e-5, total_steps=10_000)


def with_theirs(base: Any, subject: Subject, narrow: bool) -> tuple[Any, Any]:
    """Returns the base with PEFT's adapter, and its optimizer."""
    model = theirs(base, subject, narrow)
    trained = [p for p in model.parameters() if p.requires_grad]
    return model, torch.optim.AdamW(trained, lr=1e-5, fused=True)


Made = Callable[[], tuple[Any, Any]]


def subjects(
    base: Any, config: Any, rows: int, length: int, device: str
) -> Iterator[tuple[str, Made, int | None]]:
    """Yields the name of each subject, how it is made, and the peak that `lorakin plan` predicts."""
    conditions = Conditions(
        config, torch.bfloat16, device, batch_size=rows, max_length=length, padded=False
    )
    methods = [Method.of(subject.ours()) for subject in SUBJECTS.values()]
    plans = dict(zip(SUBJECTS, plan_methods(conditions, methods), strict=True))

    def fused_frozen() -> tuple[Any, Any]:
        model = twin(base)
        lk.fuse(model)
        return model, None

    def compiled() -> tuple[Any, Any]:
        model, optimizer = with_ours(base, SUBJECTS["lora"])
        model.forward = torch.compile(model.forward)
        return model, optimizer

    yield "frozen base, `lk.fuse`", fused_frozen, None
    for name, subject in SUBJECTS.items():
        planned = plans[name].peak if isinstance(plans[name], Plan) else None
        yield name, lambda subject=subject: with_ours(base, subject), planned
        if subject.theirs is not None:
            for narrow in (False, True):
                label = f"PEFT{' narrow' if narrow else ''}, {name}"
                yield label, lambda s=subject, n=narrow: with_theirs(base, s, n), None
    yield "lora, `lk.fuse`", lambda: with_ours(base, SUBJECTS["lora"], fuse=True), None
    if device == "cuda":
        yield "lora, compiled", compiled, None


def peak_of(step: Callable[[], None], device: str) -> int | None:
    """Returns the bytes of the GPU that are allocated at the peak of a step."""
    if device != "cuda":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return int(torch.cuda.max_memory_allocated())


def _mib(size: int | None) -> str:
    return "–" if size is None else f"{size / 2**20:,.0f}"


if __name__ == "__main__":
    main()

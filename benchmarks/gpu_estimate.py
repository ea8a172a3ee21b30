"""What a step would cost on a GPU: kernels counted on pretended GPUs, and the arithmetic of an H100.

    python -m benchmarks.gpu_estimate            all tables; some minutes, no GPU
    python -m benchmarks.gpu_estimate kernels    kernels of a linear layer, beside PEFT's
    python -m benchmarks.gpu_estimate 8B         a step of Llama-3-8B's shape
    python -m benchmarks.gpu_estimate memory     what a step holds, with and without lk.fuse

**This is an estimate.** It runs a step without numbers (torch's fake tensors) for two and three
layers, and extends it to all. The CPU takes 5 µs to launch a kernel. A kernel takes 2 µs at least,
its operations at 790 TFLOP/s, or the bytes that it reads and writes at 3.3 TB/s, whichever is most.
A step takes what the longer of the two takes, the CPU or the GPU; a wait adds 10 µs and makes one
wait for the other. Attention is one kernel, as FlashAttention is.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import gpu.pretended  # noqa: F401, I001 - before torch
import peft
import torch
import transformers
from gpu.kernel_count import KernelCount, Launch, tensors
from gpu.test_kernels import LAYERS, METHODS, WIDTH, Stack, count_step, kernels_of_a_layer
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import flop_registry

import lorakin as lk
from lorakin.inject import llama_fusions
from lorakin.inject.class_swap import combined
from lorakin.plan.machine import ASSUMED_GPU
from lorakin.plan.meta_model import meta_model
from lorakin.plan.traced import Traced

LAUNCH, KERNEL, WAIT = 5e-6, 2e-6, 10e-6
"""Seconds: to launch a kernel, for the smallest kernel, and for a wait."""
OPERATIONS, BYTES = 790e12, 3.3e12
"""An H100's, a second."""
ROWS, LENGTH, RANK = 4, 2048, 16
SHAPES = {
    "8B": {
        "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336,
        "num_attention_heads": 32, "num_key_value_heads": 8, "num_hidden_layers": 32,
        "tie_word_embeddings": False,
    },
    "135M": {
        "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536,
        "num_attention_heads": 9, "num_key_value_heads": 3, "num_hidden_layers": 30,
        "tie_word_embeddings": True,
    },
}  # fmt: skip
OURS: dict[str, Callable[[], Any]] = {
    "lora": lambda: lk.LoRA(rank=RANK),
    "lora, dropout 0.05": lambda: lk.LoRA(rank=RANK, dropout=0.05),
    "lora-fa": lambda: lk.LoRAFA(rank=RANK),
    "dora": lambda: lk.DoRA(rank=RANK),
    "adalora": lambda: lk.AdaLoRA(
        initial_rank=24, target_rank=16, total_steps=100, start=1, finish=50, interval=1
    ),
    "vera": lambda: lk.VeRA(rank=256),
    "delta-lora": lambda: lk.DeltaLoRA(rank=RANK, start_step=1),
}
LINEARS = r".*layers\..*(q|k|v|o|gate|up|down)_proj"
PEFT: dict[str, Callable[[], Any]] = {
    "lora": lambda: peft.LoraConfig(r=RANK, target_modules=LINEARS),
    "lora, dropout 0.05": lambda: peft.LoraConfig(
        r=RANK, target_modules=LINEARS, lora_dropout=0.05
    ),
    "dora": lambda: peft.LoraConfig(
        r=RANK, target_modules=LINEARS, use_dora=True, init_lora_weights=False
    ),
    "adalora": lambda: peft.AdaLoraConfig(
        init_r=24, target_r=16, total_step=100, tinit=1, tfinal=50, deltaT=1, target_modules=LINEARS
    ),
    "vera": lambda: peft.VeraConfig(r=256, target_modules=LINEARS),
}
PHASES = ("forward", "backward", "step")
MOVED_AGAIN: dict[str, Callable[[Any, Any], Any]] = {
    "rms_norm_backward": lambda args, out: out,  # Liger fills it with zeros first
    "softmax_less_target": lambda args, out: args[0],  # written where it was read
}
"""The tensors that our operators read or write twice, by the operators' names."""


class CostedLaunch(NamedTuple):
    """One operation on the GPU with its arithmetic."""

    launch: Launch
    operations: int
    bytes: int

    @property
    def seconds(self) -> float:
        """How long the GPU computes."""
        if not self.launch.kernels:
            return 0.0
        return max(self.launch.kernels * KERNEL, self.operations / OPERATIONS, self.bytes / BYTES)


class FakeTensors(FakeTensorMode):
    """Tensors without values. A deep copy of a model keeps the mode."""

    def __deepcopy__(self, memo: Any) -> FakeTensors:
        return self


class Costs(KernelCount):
    """Counts operations on fake tensors. What is asked of values is answered as in a healthy run."""

    def __init__(self) -> None:
        super().__init__()
        self.costed: list[CostedLaunch] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            tensor, frame = args[0], sys._getframe(1)
            line = f"{frame.f_code.co_filename}:{frame.f_lineno}"
            read = Launch("_local_scalar_dense", 1, True, (), line)
            # `tolist` reads value by value, but copies once.
            if tensor.is_cuda and not (self.costed and self.costed[-1].launch == read):
                self.costed.append(CostedLaunch(read, 0, 4))
            return False if tensor.dtype == torch.bool else 1
        if func is torch.ops.aten.equal.default:
            return True
        before = len(self.launches)
        out = super().__torch_dispatch__(func, types, args, kwargs)
        if len(self.launches) > before:
            aten = torch.ops.aten
            # torch's table of operations lacks the product that adds in place.
            packet = aten.addmm if func.overloadpacket is aten.addmm_ else func.overloadpacket
            operations = 0
            if packet in flop_registry:
                operations = int(flop_registry[packet](*args, **(kwargs or {}), out_val=out))
            again = MOVED_AGAIN.get(self.launches[-1].name, lambda args, out: ())(args, out)
            moved = _bytes_moved(args, kwargs or {}, (out, again))
            self.costed.append(CostedLaunch(self.launches[-1], operations, moved))
        return out


def _bytes_moved(args: Any, kwargs: dict[str, Any], out: Any) -> int:
    """Returns how many bytes an operation reads and writes on the GPU."""
    read = {key: value for key, value in kwargs.items() if key != "out"}
    # With beta = 0, what a product is added to is not read.
    operands = args[1:] if kwargs.get("beta") == 0 else args
    # A kernel that is given a tensor twice reads it once.
    once = {
        (t.untyped_storage()._cdata, t.storage_offset(), t.shape): t
        for t in tensors((operands, read))
    }
    on_gpu = (t for t in (*once.values(), *tensors(out)) if t.is_cuda)
    return sum(t.numel() * t.element_size() for t in on_gpu)


class OneKernelAttention(torch.autograd.Function):
    """Stands for FlashAttention: one kernel forward and four backward, without its arithmetic."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        ctx.save_for_backward(query, key, value)
        return query.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        grad.neg()
        query, key, value = ctx.saved_tensors
        return query.clone(), key.clone(), value.clone()


def _attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **_: Any
) -> tuple[Tensor, None]:
    return OneKernelAttention.apply(query, key, value).transpose(1, 2).contiguous(), None


transformers.AttentionInterface.register("one_kernel", _attention)


class Estimate(NamedTuple):
    """One phase, or a whole step."""

    kernels: float
    waits: float
    seconds: float
    """Of the GPU, or of the CPU where it takes longer."""

    def __add__(self, other: Any) -> Estimate:
        return Estimate(*(one + two for one, two in zip(self, other, strict=True)))

    def __sub__(self, other: Any) -> Estimate:
        return Estimate(*(one - two for one, two in zip(self, other, strict=True)))

    def times(self, factor: int) -> Estimate:
        """Returns it `factor` times."""
        return Estimate(*(factor * value for value in self))


def estimated(costed: list[CostedLaunch], attention: float) -> Estimate:
    """Returns the time of operations in order; the CPU runs ahead of the GPU until a wait."""
    total = of_cpu = of_gpu = 0.0
    for launch in costed:
        of_cpu += launch.launch.kernels * LAUNCH
        of_gpu += launch.seconds
        if launch.launch.waits:
            total += max(of_cpu, of_gpu) + WAIT
            of_cpu = of_gpu = 0.0
    total += max(of_cpu, of_gpu + attention)
    kernels = sum(launch.launch.kernels for launch in costed)
    return Estimate(kernels, sum(launch.launch.waits for launch in costed), total)


def estimate(
    shape: str, subject: str, adapt: Callable[[Any], Any], fused: bool = False
) -> Estimate:
    """Returns the estimate of a whole step, extended from two and three layers.

    `adapt` puts an adapter into a model, and returns what optimizes it, or None.
    """
    settings = SHAPES[shape]
    layers = int(settings["num_hidden_layers"])
    two, three = (_by_phase(shape, n, subject, adapt, fused, PHASES[:2]) for n in (2, 3))
    total = Estimate(0, 0, 0)
    for phase in PHASES[:2]:
        total += two[phase] + (three[phase] - two[phase]).times(layers - 2)
    return total + _by_phase(shape, layers, subject, adapt, fused, PHASES[2:])["step"]


class Prepared(NamedTuple):
    """A model on a fake GPU, to be trained."""

    model: Any
    optimizer: Any
    """None if nothing trains."""
    allocate: Callable[[int], Any] | None
    """What PEFT's AdaLoRA wants to be called at each step."""
    ids: Tensor

    def loss(self) -> Tensor:
        """Runs a forward."""
        return self.model(input_ids=self.ids, labels=self.ids).loss  # type: ignore[no-any-return]


@contextlib.contextmanager
def prepared(shape: str, layers: int, subject: str, adapt: Any, fused: bool) -> Iterator[Prepared]:
    """Makes a model of this shape with so many layers, in a mode of fake tensors."""
    config = transformers.LlamaConfig(
        **{**SHAPES[shape], "num_hidden_layers": layers}, use_cache=False, pad_token_id=0
    )
    skeleton = meta_model(config, torch.bfloat16).requires_grad_(False)
    skeleton.config._attn_implementation = "one_kernel"
    if subject.startswith("PEFT"):
        with torch.device("meta"):
            skeleton = adapt(skeleton)
    with FakeTensors(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wide = {"PEFT": torch.float32, "PEFT narrow": torch.bfloat16}.get(subject)
        model = _on_fake_gpu(skeleton, wide)
        if fused:
            _fuse(model)
        allocate = None
        if subject.startswith("PEFT"):
            trained = [p for p in model.parameters() if p.requires_grad]
            optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.0, foreach=True)
            if hasattr(model.base_model, "update_and_allocate"):
                allocate = model.base_model.update_and_allocate
        else:
            optimizer = adapt(model)
            if optimizer is None:
                model.enable_input_require_grads()
        ids = torch.ones(ROWS, LENGTH, dtype=torch.long, device="cuda")
        yield Prepared(model, optimizer, allocate, ids)


def _by_phase(
    shape: str, layers: int, subject: str, adapt: Any, fused: bool, phases: tuple[str, ...]
) -> dict[str, Estimate]:
    settings = SHAPES[shape]
    with prepared(shape, layers, subject, adapt, fused) as run:
        trained = [p for p in run.model.parameters() if p.requires_grad]
        costs: dict[str, Costs] = {}
        for n in range(3):
            costs = {phase: Costs() for phase in PHASES}
            if "forward" in phases:
                with costs["forward"]:
                    loss = run.loss()
                with costs["backward"]:
                    torch.autograd.backward(loss)
            else:
                for parameter in trained:
                    parameter.grad = torch.zeros_like(parameter) if parameter.numel() else None
            with costs["step"]:
                if run.optimizer is not None:
                    run.optimizer.step()
                if run.optimizer is not None and run.allocate is not None:
                    run.allocate(n + 2)
            if run.optimizer is not None:
                run.optimizer.zero_grad()
    heads = int(settings["num_attention_heads"])
    flash = layers * 2 * ROWS * heads * LENGTH**2 * (int(settings["hidden_size"]) // heads)
    extra = {"forward": flash / (0.6 * OPERATIONS), "backward": 2.5 * flash / (0.5 * OPERATIONS)}
    return {phase: estimated(costs[phase].costed, extra.get(phase, 0.0)) for phase in phases}


def activations(shape: str, subject: str, adapt: Any, fused: bool) -> float:
    """Returns the bytes of a forward and backward at their peak, without what was there before."""
    peaks = []
    for layers in (2, 3):
        with prepared(shape, layers, subject, adapt, fused) as run, Traced(ASSUMED_GPU) as traced:
            traced.see([*run.model.parameters(), *run.model.buffers()], "weights")
            before = sum(traced.alive.values())
            with traced.phase("step", makes="activations"):
                torch.autograd.backward(run.loss())
            peaks.append(traced.peaks["step"].total - before)
    return peaks[0] + (peaks[1] - peaks[0]) * (int(SHAPES[shape]["num_hidden_layers"]) - 2)


def _on_fake_gpu(model: Any, wide: torch.dtype | None) -> Any:
    """Gives every tensor of a meta model a fake one on the GPU; trained ones in `wide`, if given."""
    made: dict[int, Any] = {}
    for module in model.modules():
        for held in (module._parameters, module._buffers):
            for name, tensor in held.items():
                if tensor is None:
                    continue
                if id(tensor) not in made:
                    is_adapters = tensor.requires_grad or "vera" in name
                    dtype = wide if wide is not None and is_adapters else tensor.dtype
                    fake: Any = torch.empty(tensor.shape, dtype=dtype, device="cuda")
                    if isinstance(tensor, nn.Parameter):
                        fake = nn.Parameter(fake, tensor.requires_grad)
                    made[id(tensor)] = fake
                held[name] = made[id(tensor)]
    return model.train()


def _fuse(model: Any) -> None:
    """Does what `lk.fuse` does, which compares values first."""
    for module in list(model.modules()):
        if type(module).__name__.endswith("RMSNorm"):
            module.__class__ = combined(llama_fusions.LightNorm, type(module))
        elif type(module).__name__.endswith("MLP"):
            module.__class__ = combined(llama_fusions.LightGate, type(module))
        elif type(module).__name__.endswith("Attention"):
            module.__class__ = combined(llama_fusions.LightAttention, type(module))
    model.lm_head.__class__ = combined(llama_fusions.LightHead, type(model.lm_head))


def _adapt_ours(name: str) -> Callable[[Any], Any]:
    def adapt(model: Any) -> Any:
        adapter = lk.adapt(model, OURS[name](), seed=0)
        total = 100 if name == "adalora" else None
        return adapter.optimizer(torch.optim.AdamW, lr=1e-4, total_steps=total)

    return adapt


def _adapt_theirs(name: str, narrow: bool) -> Callable[[Any], Any]:
    return lambda model: peft.get_peft_model(
        model, PEFT[name](), autocast_adapter_dtype=not narrow, low_cpu_mem_usage=True
    )


def step_table(shape: str) -> Iterator[str]:
    """Yields the lines of the table of whole steps."""
    yield f"**A step of {shape}'s shape, {ROWS} × {LENGTH} tokens, bfloat16, estimated for an H100**"
    yield ""
    yield "| subject | kernels | waits | ms | × the frozen base |"
    yield "|---|---|---|---|---|"
    frozen = estimate(shape, "frozen", lambda model: None)
    subjects: list[tuple[str, Callable[[], Estimate]]] = [
        ("frozen base", lambda: frozen),
        ("frozen base, `lk.fuse`", lambda: estimate(shape, "frozen", lambda m: None, fused=True)),
    ]
    for name in OURS:
        subjects.append((name, lambda name=name: estimate(shape, "ours", _adapt_ours(name))))
        if name == "lora":
            subjects.append(
                (
                    "lora, `lk.fuse`",
                    lambda: estimate(shape, "ours", _adapt_ours("lora"), fused=True),
                )
            )
        for narrow in (False, True) if name in PEFT else ():
            label = "PEFT narrow" if narrow else "PEFT"
            subjects.append(
                (
                    f"{label}, {name}",
                    lambda name=name, narrow=narrow, label=label: estimate(
                        shape, label, _adapt_theirs(name, narrow)
                    ),
                )
            )
    for label, compute in subjects:
        of_step = compute()
        yield (
            f"| {label} | {of_step.kernels:.0f} | {of_step.waits:.0f} | "
            f"{1e3 * of_step.seconds:.1f} | {of_step.seconds / frozen.seconds:.2f} |"
        )


def memory_table() -> Iterator[str]:
    """Yields the lines of the table of memory with and without `lk.fuse`."""
    yield f"**A step of {ROWS} × {LENGTH} tokens, bfloat16: GiB at most, beside weights**"
    yield ""
    yield "| shape | subject | as it is | `lk.fuse` |"
    yield "|---|---|---|---|"
    for shape in SHAPES:
        for label in ("frozen base", "lora", "dora"):
            adapt = (lambda model: None) if label == "frozen base" else _adapt_ours(label)
            subject = "frozen" if label == "frozen base" else "ours"
            sizes = [activations(shape, subject, adapt, fused) / 2**30 for fused in (False, True)]
            yield f"| {shape} | {label} | {sizes[0]:.1f} | {sizes[1]:.1f} |"


def peft_kernels(name: str, narrow: bool) -> tuple[float, float] | None:
    """Returns the kernels of one linear layer with PEFT's method, forward and backward."""
    configs: dict[str, Any] = {
        "lora": lambda t: peft.LoraConfig(r=8, target_modules=t),
        "lora, dropout": lambda t: peft.LoraConfig(r=8, target_modules=t, lora_dropout=0.1),
        "vera": lambda t: peft.VeraConfig(r=8, target_modules=t, vera_dropout=0.0),
        "vera, dropout": lambda t: peft.VeraConfig(r=8, target_modules=t, vera_dropout=0.1),
        "dora": lambda t: peft.LoraConfig(r=8, target_modules=t, use_dora=True),
        "dora, dropout": lambda t: peft.LoraConfig(
            r=8, target_modules=t, use_dora=True, lora_dropout=0.1
        ),
        "adalora": lambda t: peft.AdaLoraConfig(
            init_r=8, target_r=4, total_step=100, tinit=2, tfinal=50, target_modules=t
        ),
    }
    if name not in configs:
        return None
    totals = []
    for layers in (LAYERS, 2 * LAYERS):
        stack = Stack(layers, WIDTH).to("cuda", torch.bfloat16).requires_grad_(False)
        targets = [f"layers.{n}" for n in range(layers)]
        wrapped = peft.get_peft_model(
            stack, configs[name](targets), autocast_adapter_dtype=not narrow
        ).train()
        x = torch.randn(128, WIDTH, device="cuda", dtype=torch.bfloat16)
        for _ in range(3):
            wrapped.zero_grad()
            counts = KernelCount(), KernelCount()
            with counts[0]:
                y = wrapped.base_model.model(x.clone().requires_grad_())
            gradient = torch.ones_like(y)
            with counts[1]:
                y.backward(gradient)
        totals.append(tuple(count.kernels for count in counts))
    forward, backward = ((many - few) / LAYERS for few, many in zip(*totals, strict=True))
    return forward, backward


def kernel_table() -> Iterator[str]:
    """Yields the lines of the table of kernels."""
    yield "**A linear layer, bfloat16: kernels forward + backward, the base's 1 + 1 included**"
    yield ""
    yield "| method | lorakin | PEFT | PEFT narrow | waits | optimizer's step, 4 layers | its waits |"
    yield "|---|---|---|---|---|---|---|"
    for name, members in METHODS.items():
        forward, backward = kernels_of_a_layer(name)
        cells = [name, f"{forward:g} + {backward:g}"]
        for narrow in (False, True):
            theirs = peft_kernels(name, narrow)
            cells.append("–" if theirs is None else f"{theirs[0]:g} + {theirs[1]:g}")
        counts = count_step(members())
        waits = len(counts["forward"].waits) + len(counts["backward"].waits)
        cells += [str(waits), str(counts["step"].kernels), str(len(counts["step"].waits))]
        yield f"| {' | '.join(cells)} |"


def main() -> None:
    """Prints the tables that were asked for."""
    warnings.simplefilter("ignore")
    parts: dict[str, Callable[[], Iterator[str]]] = {"kernels": kernel_table}
    parts |= {shape: functools.partial(step_table, shape) for shape in SHAPES}
    parts["memory"] = memory_table
    asked = sys.argv[1:] or [*parts]
    if unknown := [part for part in asked if part not in parts]:
        raise SystemExit(f"no part {unknown[0]!r}; there are {', '.join(parts)}")
    for part in asked:
        for line in parts[part]():
            print(line, flush=True)
        print()


if __name__ == "__main__":
    main()

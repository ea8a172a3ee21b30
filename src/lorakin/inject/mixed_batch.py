"""One batch, several adapters: each row uses its own, or none.

For inference all adapters of a linear module are stacked, padded to the largest rank: down (n, r,
inputs), up (n, outputs, r). A row picks its pair out of the stack. With few tokens per row, as in
decoding, one product with all pairs side by side is masked to the row's own pair; with many it is a
batched product. Everything else (other layers, training, modules trained whole) runs adapter by
adapter, each on its rows.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorakin.errors import SettingError, StateError
from lorakin.family import Pair
from lorakin.family.low_rank import padded
from lorakin.inject.active_adapters import check_switchable
from lorakin.inject.attachments import Attachments, attachments_of
from lorakin.inject.branch import Branch
from lorakin.inject.layer_kinds import LinearLayer, QuantisedLayer, TransposedLayer
from lorakin.inject.model_registry import hanging
from lorakin.inject.threads import changing, chosen, chosen_before, spoil
from lorakin.inject.token_rows import put

FEW_TOKENS = 4
"""Up to this many tokens per row, masking costs less than picking."""


class StackedPairs(NamedTuple):
    """A module's pairs in its dtype: down (n, r, inputs), up (n, r, outputs), gain (n, outputs)."""

    down: Tensor
    up: Tensor
    gain: Tensor | None


class MixedBatch:
    """A context in which row n of every batch uses the adapter `wanted[n]` alone.

    See `lorakin.mixed_batch`. The contexts of one model share the list `open` of those entered and
    not yet left; the last one counts.

    >>> import lorakin as lk
    >>> model = nn.Sequential(nn.Linear(2, 2))
    >>> adapter = lk.adapt(model, lk.LoRA(rank=1), name="mine")
    >>> with MixedBatch(model, ["mine", None]):
    ...     out = model(torch.ones(2, 2))
    >>> out.shape
    torch.Size([2, 2])
    """

    def __init__(self, model: nn.Module, wanted: Iterable[str | None]) -> None:
        self.model = model
        self.wanted = () if isinstance(wanted, str) else tuple(wanted)
        if not self.wanted or not all(
            name is None or isinstance(name, str) for name in self.wanted
        ):
            raise SettingError(
                f"expected a list with an adapter's name, or None, for each row, not {wanted!r}"
            )
        self.names: list[str | None] = list(dict.fromkeys(self.wanted))
        self.thread = 0
        self.numbers = torch.tensor([self.names.index(name) for name in self.wanted])
        self._check()

    def _check(self) -> None:
        names = [name for name in self.names if name is not None]
        known = check_switchable(self.model, names)
        if biased := [name for name in names if known[name].placement.biases]:
            raise SettingError(
                f"adapter {biased[0]!r} trains biases, which act on all rows alike, so it cannot "
                "be in a mixed batch; run its rows by themselves"
            )
        if of_experts := [name for name in names if known[name].tensors.experts()]:
            raise SettingError(
                f"adapter {of_experts[0]!r} adapts experts or other parameters, which all rows "
                "share, so it cannot be in a mixed batch; run its rows by themselves"
            )

    def __enter__(self) -> None:
        with changing(self.model):
            self._enter()
            self.before = chosen(self.model)

    def _enter(self) -> None:
        self._check()
        self.attached = hanging(self.model)
        entered = (one.rows.open for one in self.attached if one.rows is not None)
        others: list[MixedBatch] = next(entered, [])
        if self in others:
            raise StateError("this mixed batch is entered already; make another with mixed_batch")
        if any(other.thread != threading.get_ident() for other in others):
            raise StateError(
                "another thread has a mixed batch on this model; one model serves one thread at a "
                "time"
            )
        self.thread = threading.get_ident()
        self.open = others
        self.open.append(self)
        self.sizes = {len(self.wanted)}
        self.stacks: dict[int, StackedPairs] = {}
        self.spread: dict[tuple[int, torch.device], Tensor] = {}
        self.masks: dict[tuple[int, torch.device, torch.dtype, int], Tensor] = {}
        self.hook = self.model.register_forward_pre_hook(
            lambda *called: self._note_batch(*called), with_kwargs=True
        )
        self._let_count()

    def __exit__(self, *_: object) -> None:
        with changing(self.model, refused=False):
            spoil(self.model)
            self.hook.remove()
            self.open.remove(self)
            self._let_count()
            chosen_before(self.model, self.before)

    def _let_count(self) -> None:
        """Lets the last one entered count, whatever order they are left in."""
        for one in self.attached:
            one.rows = self.open[-1] if self.open else None

    def __deepcopy__(self, memo: Any) -> None:
        """Returns None: a copy of the model is in no context."""

    def _note_batch(
        self,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        """Learns the batch's size and length; a forward pre-hook of the model.

        If another thread's forward begins while this hook is taken off, torch may give no `kwargs`.
        """
        by_name = (kwargs.get("input_ids"), kwargs.get("inputs_embeds"))
        given = (*by_name, *args, *kwargs.values())
        first = next((value for value in given if isinstance(value, Tensor)), None)
        if first is None or module is not self.model or self.open[-1:] != [self]:
            return
        rows = first.shape[0]
        if rows % len(self.wanted):
            raise SettingError(
                f"the batch has {rows} rows, but adapters are named for {len(self.wanted)}"
            )
        self.sizes = {len(self.wanted), rows, rows * first.shape[1] if first.dim() > 1 else rows}

    def _numbers_for(self, rows: int, device: torch.device, module: nn.Module) -> Tensor:
        """Returns (rows,): the number of each row's adapter.

        A row of the batch may be several rows here: beams, or its tokens.
        """
        if rows not in self.sizes:
            raise StateError(
                f"a {type(module).__name__} was called with {rows} rows, which are not those of "
                "the batch, so it is not known which adapter each uses; such a module cannot be "
                "in a mixed batch"
            )
        if (rows, device) not in self.spread:
            self.spread[rows, device] = self.numbers.to(device).repeat_interleave(
                rows // len(self.wanted)
            )
        return self.spread[rows, device]

    def adapted(self, module: Any, x: Tensor, base: Tensor) -> Tensor:
        """Computes the output of an adapted module from `base`, the base's output."""
        attached = attachments_of(module)
        branches = [attached[name] if self._uses(attached, name) else None for name in self.names]
        if not any(branches):
            return base
        if x.shape[0] == 1 < len(self.wanted):  # one input for all rows, such as positions
            x, base = (t.expand(len(self.wanted), *t.shape[1:]) for t in (x, base))
        numbers = self._numbers_for(x.shape[0], x.device, module)
        stack = None if attached.off or module.training else self._stack_of(module, x, branches)
        if stack is not None and stack.down.dtype == x.dtype == base.dtype:  # not under autocast
            return self._stacked(stack, module, x, base, numbers)

        def add(branch: Branch, rows: Tensor) -> Tensor:
            own: Tensor = base[rows] + branch(module, x[rows], base[rows])
            return own

        return self._each(attached, base, numbers, add)

    def with_rows(self, module: Any, x: Tensor, base: Tensor) -> Tensor:
        """Computes the output of a module with trained rows from `base`, the base's output."""
        if x.shape[0] == 1 < len(self.wanted):
            x, base = (t.expand(len(self.wanted), *t.shape[1:]) for t in (x, base))
        numbers = self._numbers_for(x.shape[0], x.device, module)

        def put_rows(own: Any, rows: Tensor) -> Tensor:
            return put(module, [own], x[rows], base[rows])

        return self._each(attachments_of(module), base, numbers, put_rows)

    def replaced(self, module: Any, base: Tensor, x: Tensor) -> Tensor:
        """Computes the output of a module that adapters train whole from `base`, the base's."""
        if not isinstance(base, Tensor):
            raise StateError(
                f"a {type(module).__name__} that is trained whole returns no single tensor, so it "
                "cannot be in a mixed batch"
            )
        numbers = self._numbers_for(x.shape[0], x.device, module)
        return self._each(
            attachments_of(module), base, numbers, lambda copy, rows: copy.module.forward(x[rows])
        )

    @staticmethod
    def _uses(attached: Attachments, name: str | None) -> bool:
        return name is not None and name in attached and name not in attached.off

    def _each(
        self,
        attached: Attachments,
        base: Tensor,
        numbers: Tensor,
        call: Callable[[Any, Tensor], Tensor],
    ) -> Tensor:
        """Puts `call(child, rows)` of each adapter, on its rows, into the output."""
        out = base
        for number, name in enumerate(self.names):
            if self._uses(attached, name) and len(rows := (numbers == number).nonzero()[:, 0]):
                out = out.index_copy(0, rows, call(attached[str(name)], rows).to(out.dtype))
        return out

    def _stack_of(
        self, module: Any, x: Tensor, branches: Sequence[Branch | None]
    ) -> StackedPairs | None:
        """Returns the module's stack, kept while nothing trains; None if it needs gradients."""
        if id(module) in self.stacks:
            return self.stacks[id(module)]
        there = [branch for branch in branches if branch is not None]
        trains = any(p.requires_grad for branch in there for p in branch.parameters())
        is_linear = there[0].layer in (LinearLayer, QuantisedLayer, TransposedLayer)
        if not is_linear or (trains and torch.is_grad_enabled()):
            return None
        stack = _stack(module, branches, there[0].layer.dtype(module, x))
        if not trains:
            self.stacks[id(module)] = stack
        return stack

    def _stacked(
        self, stack: StackedPairs, module: Any, x: Tensor, base: Tensor, numbers: Tensor
    ) -> Tensor:
        """Computes W0 x + (g−1)⊙(W0 x) + g⊙up(down x) + b with the pair and gain of each row."""
        count, rank, inputs = stack.down.shape
        tokens = x.reshape(len(x), -1, inputs)
        into = base if stack.gain is None else torch.zeros_like(base)
        if tokens.shape[1] <= FEW_TOKENS:
            hidden = F.linear(tokens, stack.down.view(-1, inputs))
            hidden = hidden * self._mask(numbers, x.dtype, rank)
            flat = into.reshape(-1, into.shape[-1])
            change = flat.addmm_(hidden.view(-1, count * rank), stack.up.view(count * rank, -1))
        else:
            hidden = torch.bmm(tokens, stack.down.index_select(0, numbers).transpose(1, 2))
            up = stack.up.index_select(0, numbers)
            change = into.reshape(len(x), -1, into.shape[-1]).baddbmm_(hidden, up)
        change = change.view(base.shape)
        if stack.gain is None:
            return change
        gain = stack.gain[numbers].view(len(x), *(1 for _ in base.shape[1:-1]), -1)
        bias = getattr(module, "bias", None)
        product = base if bias is None else base - bias
        return base + (gain * change + (gain - 1) * product).to(base.dtype)

    def _mask(self, numbers: Tensor, dtype: torch.dtype, rank: int) -> Tensor:
        """Returns (rows, 1, n·r): 1 where a hidden number belongs to the row's own adapter."""
        key = len(numbers), numbers.device, dtype, rank
        if key not in self.masks:
            own = F.one_hot(numbers, len(self.names)).to(dtype)
            self.masks[key] = own.repeat_interleave(rank, 1).unsqueeze(1)
        return self.masks[key]


@torch.no_grad()
def _stack(module: Any, branches: Sequence[Branch | None], dtype: torch.dtype) -> StackedPairs:
    """Stacks the pairs of a module's adapters; zeros for one that is not here."""
    there = [branch for branch in branches if branch is not None]
    pairs = {id(branch): branch.pair(branch.layer.weight(module)) for branch in there}
    rank = max(pair.down.shape[0] for pair in pairs.values())
    one = next(iter(pairs.values()))
    outputs, inputs = one.up.shape[0], one.down.shape[1]
    nothing = Pair(one.up.new_zeros(outputs, rank), one.down.new_zeros(rank, inputs))
    chosen = [nothing if branch is None else padded(pairs[id(branch)], rank) for branch in branches]

    gain = None
    if any(pair.gain is not None for pair in chosen):
        ones = one.up.new_ones(outputs)
        gain = torch.stack([ones if pair.gain is None else pair.gain for pair in chosen])
    down = torch.stack([pair.down for pair in chosen])
    up = torch.stack([pair.up.T for pair in chosen])
    return StackedPairs(down.to(dtype), up.to(dtype), gain)

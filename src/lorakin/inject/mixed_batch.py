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
from lorakin.inject.model_registry import attachments_in
from lorakin.inject.threads import changing, fail_other_forwards, record_choice, undo_choice
from lorakin.inject.token_rows import put_rows

FEW_TOKENS = 4
"""Up to this many tokens per row, masking costs less than picking."""


class StackedPairs(NamedTuple):
    """A module's pairs in its dtype: down (n, r, inputs), up (n, r, outputs), gain (n, outputs)."""

    down: Tensor
    up: Tensor
    gain: Tensor | None


class MixedBatch:
    """A context in which row n of every batch uses the adapter `name_of_row[n]` alone.

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

    def __init__(self, model: nn.Module, names: Iterable[str | None]) -> None:
        self.model = model
        self.name_of_row = () if isinstance(names, str) else tuple(names)
        if not self.name_of_row or not all(
            name is None or isinstance(name, str) for name in self.name_of_row
        ):
            raise SettingError(
                f"expected a list with an adapter's name, or None, for each row, not {names!r}"
            )
        self.distinct_names: list[str | None] = list(dict.fromkeys(self.name_of_row))
        self.adapter_index = torch.tensor(
            [self.distinct_names.index(name) for name in self.name_of_row]
        )
        self.thread = 0
        self.attachments: list[Attachments] = []
        self.open: list[MixedBatch] = []
        self.sizes: set[int] = set()
        self.stacks: dict[int, StackedPairs] = {}
        self.spread: dict[tuple[int, torch.device], Tensor] = {}
        self.masks: dict[tuple[int, torch.device, torch.dtype, int], Tensor] = {}
        self._check()

    def _check(self) -> None:
        names = [name for name in self.distinct_names if name is not None]
        adapters = check_switchable(self.model, names)
        if biased := [name for name in names if adapters[name].placement.biases]:
            raise SettingError(
                f"adapter {biased[0]!r} trains biases, which act on all rows alike, so it cannot "
                "be in a mixed batch; run its rows by themselves"
            )
        if of_experts := [name for name in names if adapters[name].tensors.expert_paths()]:
            raise SettingError(
                f"adapter {of_experts[0]!r} adapts experts or other parameters, which all rows "
                "share, so it cannot be in a mixed batch; run its rows by themselves"
            )

    def __enter__(self) -> None:
        with changing(self.model):
            self._enter()
            self.before = record_choice(self.model)

    def _enter(self) -> None:
        self._check()
        self.attachments = attachments_in(self.model)
        in_force = (attached.mixed_batch for attached in self.attachments if attached.mixed_batch)
        open_batches = next((batch.open for batch in in_force), [])
        if self in open_batches:
            raise StateError("this mixed batch is entered already; make another with mixed_batch")
        if any(batch.thread != threading.get_ident() for batch in open_batches):
            raise StateError(
                "another thread has a mixed batch on this model; one model serves one thread at a "
                "time"
            )
        self.thread = threading.get_ident()
        self.open = open_batches
        self.open.append(self)
        self.sizes = {len(self.name_of_row)}
        self.stacks, self.spread, self.masks = {}, {}, {}
        self.hook = self.model.register_forward_pre_hook(
            lambda *called: self._note_batch(*called), with_kwargs=True
        )
        self._put_in_force()

    def __exit__(self, *_: object) -> None:
        with changing(self.model, refused=False):
            fail_other_forwards(self.model)
            self.hook.remove()
            self.open.remove(self)
            self._put_in_force()
            undo_choice(self.model, self.before)

    def _put_in_force(self) -> None:
        """Puts the block that was entered last in force, whatever order they are left in."""
        for attached in self.attachments:
            attached.mixed_batch = self.open[-1] if self.open else None

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
        if rows % len(self.name_of_row):
            raise SettingError(
                f"the batch has {rows} rows, but adapters are named for {len(self.name_of_row)}"
            )
        self.sizes = {
            len(self.name_of_row),
            rows,
            rows * first.shape[1] if first.dim() > 1 else rows,
        }

    def _adapters_of_rows(self, rows: int, device: torch.device, module: nn.Module) -> Tensor:
        """Returns (rows,): the index in `distinct_names` of each row's adapter.

        A row of the batch may be several rows here: beams, or its tokens.
        """
        if rows not in self.sizes:
            raise StateError(
                f"a {type(module).__name__} was called with {rows} rows, which are not those of "
                "the batch, so it is not known which adapter each uses; such a module cannot be "
                "in a mixed batch"
            )
        if (rows, device) not in self.spread:
            self.spread[rows, device] = self.adapter_index.to(device).repeat_interleave(
                rows // len(self.name_of_row)
            )
        return self.spread[rows, device]

    def adapted(self, module: Any, x: Tensor, base: Tensor) -> Tensor:
        """Computes the output of an adapted module from `base`, the base's output."""
        attached = attachments_of(module)
        branches = [
            attached[name] if self._uses(attached, name) else None for name in self.distinct_names
        ]
        if not any(branches):
            return base
        x, base = self._one_for_each_row(x), self._one_for_each_row(base)
        index = self._adapters_of_rows(x.shape[0], x.device, module)
        stack = None if attached.off or module.training else self._stack_of(module, x, branches)
        if stack is not None and stack.down.dtype == x.dtype == base.dtype:  # not under autocast
            return self._stacked(stack, module, x, base, index)

        def add(branch: Branch, rows: Tensor) -> Tensor:
            out: Tensor = base[rows] + branch(module, x[rows], base[rows])
            return out

        return self._each(attached, base, index, add)

    def with_rows(self, module: Any, x: Tensor, base: Tensor) -> Tensor:
        """Computes the output of a module with trained rows from `base`, the base's output."""
        x, base = self._one_for_each_row(x), self._one_for_each_row(base)
        index = self._adapters_of_rows(x.shape[0], x.device, module)

        def with_rows_of(token_rows: Any, rows: Tensor) -> Tensor:
            return put_rows(module, [token_rows], x[rows], base[rows])

        return self._each(attachments_of(module), base, index, with_rows_of)

    def replaced(self, module: Any, base: Tensor, x: Tensor) -> Tensor:
        """Computes the output of a module that adapters train whole from `base`, the base's."""
        if not isinstance(base, Tensor):
            raise StateError(
                f"a {type(module).__name__} that is trained whole returns no single tensor, so it "
                "cannot be in a mixed batch"
            )
        index = self._adapters_of_rows(x.shape[0], x.device, module)
        return self._each(
            attachments_of(module), base, index, lambda copy, rows: copy.module.forward(x[rows])
        )

    def _one_for_each_row(self, tensor: Tensor) -> Tensor:
        """Expands a tensor that holds one entry for all rows, such as positions."""
        rows = len(self.name_of_row)
        return tensor.expand(rows, *tensor.shape[1:]) if tensor.shape[0] == 1 < rows else tensor

    @staticmethod
    def _uses(attached: Attachments, name: str | None) -> bool:
        return name is not None and name in attached and name not in attached.off

    def _each(
        self,
        attached: Attachments,
        base: Tensor,
        index: Tensor,
        call: Callable[[Any, Tensor], Tensor],
    ) -> Tensor:
        """Puts `call(child, rows)` of each adapter, on its rows, into the output."""
        out = base
        for number, name in enumerate(self.distinct_names):
            if self._uses(attached, name) and len(rows := (index == number).nonzero()[:, 0]):
                out = out.index_copy(0, rows, call(attached[str(name)], rows).to(out.dtype))
        return out

    def _stack_of(
        self, module: Any, x: Tensor, branches: Sequence[Branch | None]
    ) -> StackedPairs | None:
        """Returns the module's stack, kept while nothing trains; None if it needs gradients."""
        if id(module) in self.stacks:
            return self.stacks[id(module)]
        present = [branch for branch in branches if branch is not None]
        trains = any(p.requires_grad for branch in present for p in branch.parameters())
        is_linear = present[0].kind in (LinearLayer, QuantisedLayer, TransposedLayer)
        if not is_linear or (trains and torch.is_grad_enabled()):
            return None
        stack = _stack(module, branches, present[0].kind.dtype(module, x))
        if not trains:
            self.stacks[id(module)] = stack
        return stack

    def _stacked(
        self, stack: StackedPairs, module: Any, x: Tensor, base: Tensor, index: Tensor
    ) -> Tensor:
        """Computes W0 x + (g−1)⊙(W0 x) + g⊙up(down x) + b with the pair and gain of each row."""
        count, rank, inputs = stack.down.shape
        tokens = x.reshape(len(x), -1, inputs)
        into = base if stack.gain is None else torch.zeros_like(base)
        if tokens.shape[1] <= FEW_TOKENS:
            hidden = F.linear(tokens, stack.down.view(-1, inputs))
            hidden = hidden * self._mask(index, x.dtype, rank)
            flat = into.reshape(-1, into.shape[-1])
            change = flat.addmm_(hidden.view(-1, count * rank), stack.up.view(count * rank, -1))
        else:
            hidden = torch.bmm(tokens, stack.down.index_select(0, index).transpose(1, 2))
            up = stack.up.index_select(0, index)
            change = into.reshape(len(x), -1, into.shape[-1]).baddbmm_(hidden, up)
        change = change.view(base.shape)
        if stack.gain is None:
            return change
        gain = stack.gain[index].view(len(x), *(1 for _ in base.shape[1:-1]), -1)
        bias = getattr(module, "bias", None)
        product = base if bias is None else base - bias
        return base + (gain * change + (gain - 1) * product).to(base.dtype)

    def _mask(self, index: Tensor, dtype: torch.dtype, rank: int) -> Tensor:
        """Returns (rows, 1, n·r): 1 at the ranks of the row's own adapter."""
        key = len(index), index.device, dtype, rank
        if key not in self.masks:
            one_hot = F.one_hot(index, len(self.distinct_names)).to(dtype)
            self.masks[key] = one_hot.repeat_interleave(rank, 1).unsqueeze(1)
        return self.masks[key]


@torch.no_grad()
def _stack(module: Any, branches: Sequence[Branch | None], dtype: torch.dtype) -> StackedPairs:
    """Stacks the pairs of a module's adapters; zeros for one that is not here."""
    present = [branch for branch in branches if branch is not None]
    pairs = {id(branch): branch.pair(branch.kind.weight(module)) for branch in present}
    rank = max(pair.down.shape[0] for pair in pairs.values())
    first = next(iter(pairs.values()))
    outputs, inputs = first.up.shape[0], first.down.shape[1]
    zero_pair = Pair(first.up.new_zeros(outputs, rank), first.down.new_zeros(rank, inputs))
    padded_pairs = [
        zero_pair if branch is None else padded(pairs[id(branch)], rank) for branch in branches
    ]

    gain = None
    if any(pair.gain is not None for pair in padded_pairs):
        ones = first.up.new_ones(outputs)
        gain = torch.stack([ones if pair.gain is None else pair.gain for pair in padded_pairs])
    down = torch.stack([pair.down for pair in padded_pairs])
    up = torch.stack([pair.up.T for pair in padded_pairs])
    return StackedPairs(down.to(dtype), up.to(dtype), gain)

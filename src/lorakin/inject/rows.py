"""Single rows of a table that an adapter trains: those of a few tokens, in an embedding or a head.

    W' = W but for W'[ids] = rows          W: (vocabulary, dim)   ids: (k,)   rows: (k, dim)

The rows themselves are trained, not differences from the base's, so what the base holds at these ids
does not matter: a vocabulary that was resized holds other random numbers there each time. No table
is formed in a call. An embedding looks the ids up in both; a head computes the k columns again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from lorakin.errors import StateError
from lorakin.inject.attachments import Adapters, Attachments, attachments_of, attachments_or_none
from lorakin.inject.branch import brought
from lorakin.inject.callers import is_in_forward
from lorakin.inject.class_swap import Swapped
from lorakin.kernels.autograd import backward_once
from lorakin.kernels.factored_weight import ABOUT_IT, ADDRESSES, name_of_function


class TokenRowsBranch(nn.Module):
    """The rows that one adapter trains in one module.

    `tokens` are their ids, ascending; `rows` (k, dim) is a parameter, which modules with one weight
    share. The ids are a buffer too, so that they are where the rows are.
    """

    ids: Tensor

    def __init__(self, path: str, tokens: Sequence[int], rows: nn.Parameter) -> None:
        super().__init__()
        self.path = path
        self.tokens = tuple(tokens)
        self.rows = rows
        self.register_buffer("ids", torch.tensor(self.tokens, device=rows.device), persistent=False)

    def into(self, table: Tensor) -> Tensor:
        """`table` (vocabulary, dim) with these rows, in its dtype."""
        return table.index_copy(0, self.ids, self.rows.to(table.dtype))

    def looked_up(self, x: Tensor, out: Tensor, padding: int | None) -> Tensor:
        """`out` (…, dim), the rows of `x` (…), with these where `x` holds one of the ids.

        That of `padding` gets no gradient, as in `F.embedding`.
        """
        wanted = x.to(self.ids.dtype).contiguous()
        at = torch.searchsorted(self.ids, wanted).clamp(max=len(self.tokens) - 1)
        new = F.embedding(at, self.rows.to(out.dtype))
        if padding in self.tokens:
            new = torch.where((x == padding).unsqueeze(-1), new.detach(), new)
        return torch.where((self.ids[at] == wanted).unsqueeze(-1), new, out)

    def columns(self, x: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        """(…, k): what a head says of these tokens for `x` (…, dim), its weight being of `dtype`."""
        return F.linear(x, self.rows.to(dtype), None if bias is None else bias[self.ids])


class WithRows(Swapped):
    """Mixed in before the class of an embedding or a linear head of which adapters train some rows.

    Who reads its weight in a forward, without calling the module, gets the table with the rows.
    """

    lorakin: Adapters

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        attached = attachments_of(self)
        own = attached.in_use()
        weight = self._parameters.get("weight")
        if weight is not None:
            check_size(own, attached, weight)
        if attached.by_weight:
            return super().forward(*args, **kwargs)
        attached.inside += 1
        try:
            out = super().forward(*args, **kwargs)
        finally:
            attached.inside -= 1
        x = args[0] if args else next(iter(kwargs.values()))
        with brought(own):
            return (
                put(self, own, x, out)
                if attached.rows is None
                else attached.rows.with_rows(self, x, out)
            )

    def __getattr__(self, name: str) -> Any:
        attached = attachments_or_none(self) if name == "weight" else None
        if (
            attached is not None
            and not attached.inside
            and attached.names_in_use()
            and is_in_forward(1)
        ):
            return _read(self, attached)
        return super().__getattr__(name)


def put(module: Any, own: Sequence[TokenRowsBranch], x: Tensor, out: Tensor) -> Tensor:
    """`out`, what the base makes of `x`, with what these rows make of it. It may be written over."""
    for rows in own:
        if isinstance(module, nn.Embedding):
            out = rows.looked_up(x, out, module.padding_idx)
        else:
            new = rows.columns(x, module.bias, module._parameters["weight"].dtype)
            out = out.index_copy_(-1, rows.ids, new.to(out.dtype))
    return out


def check_size(own: Sequence[TokenRowsBranch], attached: Attachments, table: Tensor) -> None:
    """Raise `StateError` if the table was resized after rows of it were chosen."""
    if own and attached.shape is not None and table.shape != attached.shape:
        raise StateError(
            f"{own[0].path} is now {' x '.join(map(str, table.shape))}, but it was "
            f"{' x '.join(map(str, attached.shape))} when rows of it were chosen to train: something, such "
            "as resize_token_embeddings, changed it since. Resize a model before it is adapted; here, "
            "remove the adapter, resize, and adapt again"
        )


def _read(module: Any, attached: Attachments) -> Tensor:
    """The module's weight with the rows in use, for who reads it in a forward."""
    weight: Tensor = module._parameters["weight"]
    own: list[TokenRowsBranch] = attached.in_use()
    if attached.rows is not None:
        raise StateError(
            f"{own[0].path} is read without being called, so it cannot be in a mixed batch"
        )
    if torch.compiler.is_compiling():
        return _formed(weight, own)
    whole: TableWithRows = RowsEdge.apply(weight, own, *(rows.rows for rows in own))  # type: ignore[no-untyped-call]
    whole.weight, whole.own = weight, own
    return whole


def _formed(weight: Tensor, own: Sequence[TokenRowsBranch]) -> Tensor:
    for rows in own:
        weight = rows.into(weight)
    return weight


class TableWithRows(Tensor):
    """A weight with some rows replaced, formed only where something needs it whole.

    Most who read a weight ask for its dtype, look rows up or multiply by it.
    """

    weight: Tensor
    own: Any  # list[TokenRowsBranch]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, name_of_function(func)
        if name in ABOUT_IT:
            return super().__torch_function__(func, types, args, kwargs)  # type: ignore[no-untyped-call]
        if name in ADDRESSES:
            raise StateError(
                "a kernel takes the weight of a table by its address, past the rows that an adapter "
                "trains in it; merge the adapter, or choose another kernel"
            )
        x, table = (*args, None, None)[:2]
        if (
            name == "embedding"
            and isinstance(table, TableWithRows)
            and not isinstance(x, TableWithRows)
        ):
            out = func(x, table.weight, *args[2:], **kwargs)
            for rows in table.own:
                out = rows.looked_up(x, out, kwargs.get("padding_idx", (*args, None)[2]))
            return out
        if (
            name == "linear"
            and isinstance(table, TableWithRows)
            and not isinstance(x, TableWithRows)
        ):
            bias = kwargs.get("bias", (*args, None)[2])
            out = F.linear(x, table.weight, bias)
            for rows in table.own:
                out.index_copy_(-1, rows.ids, rows.columns(x, bias, table.dtype).to(out.dtype))
            return out
        return cls.__torch_dispatch__(func, types, args, kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        formed = tree_map_only(
            TableWithRows, lambda table: _formed(table.weight, table.own), (args, kwargs or {})
        )
        return func(*formed[0], **formed[1])


class RowsEdge(torch.autograd.Function):
    """A `Table` as autograd sees it, for functions that hand back a gradient of the whole weight."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, own: Sequence[TokenRowsBranch], *rows: Tensor) -> Tensor:
        ctx.save_for_backward(*(one.ids for one in own))
        ctx.dtypes = [tensor.dtype for tensor in rows]
        return Tensor._make_wrapper_subclass(
            TableWithRows, weight.shape, weight.stride(), dtype=weight.dtype, device=weight.device
        )

    @staticmethod
    @backward_once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        every = ctx.saved_tensors
        base = grad.index_fill(0, torch.cat(every), 0) if ctx.needs_input_grad[0] else None
        return base, None, *(grad[ids].to(d) for ids, d in zip(every, ctx.dtypes, strict=True))

"""Trained rows of a table, those of a few tokens: the module that holds them, and its forward.

    W' = W, except W'[ids] = rows        W: (vocabulary, dim)   ids: (k,)   rows: (k, dim)

The rows are trained, not differences from the base's. So it does not matter what the base holds at
these ids: a resized vocabulary has other random values there each time. A call forms no table: an
embedding looks the ids up in both, and a head computes the k columns again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorakin.errors import StateError
from lorakin.inject.attachments import Adapters, Attachments, attachments_of, attachments_or_none
from lorakin.inject.branch import offloaded_tensors_loaded
from lorakin.inject.callers import first_argument, is_in_forward
from lorakin.inject.class_swap import Swapped
from lorakin.kernels.autograd import backward_once
from lorakin.kernels.unformed_weight import UnformedWeight


class TokenRowsBranch(nn.Module):
    """The rows that one adapter trains in one module.

    `tokens` has their ids, ascending. `rows` (k, dim) is a parameter, which modules with one weight
    share. `ids` has the ids as a buffer, so that they move to the device of the rows.

    >>> rows = TokenRowsBranch("embed", [1], nn.Parameter(torch.ones(1, 2)))
    >>> rows.into(torch.zeros(3, 2)).tolist()
    [[0.0, 0.0], [1.0, 1.0], [0.0, 0.0]]
    """

    ids: Tensor

    def __init__(self, path: str, tokens: Sequence[int], rows: nn.Parameter) -> None:
        super().__init__()
        self.path = path
        self.tokens = tuple(tokens)
        self.rows = rows
        self.register_buffer("ids", torch.tensor(self.tokens, device=rows.device), persistent=False)

    def into(self, table: Tensor) -> Tensor:
        """Returns a copy of `table` (vocabulary, dim) with these rows, in its dtype."""
        return table.index_copy(0, self.ids, self.rows.to(table.dtype))

    def looked_up(self, x: Tensor, out: Tensor, padding: int | None) -> Tensor:
        """Replaces rows of `out` where `x` holds one of the ids.

        Args:
            x: (…), token ids.
            out: (…, dim), the base's rows of these ids.
            padding: an id whose row gets no gradient, as in `F.embedding`.
        """
        ids = x.to(self.ids.dtype).contiguous()
        nearest = torch.searchsorted(self.ids, ids).clamp(max=len(self.tokens) - 1)
        rows = F.embedding(nearest, self.rows.to(out.dtype))
        if padding in self.tokens:
            rows = torch.where((x == padding).unsqueeze(-1), rows.detach(), rows)
        is_trained = self.ids[nearest] == ids
        return torch.where(is_trained.unsqueeze(-1), rows, out)

    def columns(self, x: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        """Computes a head's outputs for these tokens, (…, k), from x (…, dim) in `dtype`."""
        return F.linear(x, self.rows.to(dtype), None if bias is None else bias[self.ids])


class WithRows(Swapped):
    """Mixed in before the class of an embedding or a linear head in which adapters train rows.

    A forward that reads its weight without calling the module gets the table with the rows.
    """

    lorakin: Adapters

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        attached = attachments_of(self)
        token_rows = attached.in_use()
        weight = self._parameters.get("weight")
        if weight is not None:
            check_size(token_rows, attached, weight)
        if attached.changes_weight_reads:
            return super().forward(*args, **kwargs)

        attached.forward_depth += 1
        try:
            out = super().forward(*args, **kwargs)
        finally:
            attached.forward_depth -= 1
        x = first_argument(args, kwargs)
        with offloaded_tensors_loaded(token_rows):
            if attached.mixed_batch is not None:
                return attached.mixed_batch.with_rows(self, x, out)
            return put_rows(self, token_rows, x, out)

    def __getattr__(self, name: str) -> Any:
        attached = attachments_or_none(self) if name == "weight" else None
        if attached is None or attached.forward_depth or not attached.names_in_use():
            return super().__getattr__(name)
        return _read(self, attached) if is_in_forward(1) else super().__getattr__(name)


def put_rows(module: Any, token_rows: Sequence[TokenRowsBranch], x: Tensor, out: Tensor) -> Tensor:
    """Returns the base's output `out` for `x` with the outputs of these rows; may overwrite it."""
    for rows in token_rows:
        if isinstance(module, nn.Embedding):
            out = rows.looked_up(x, out, module.padding_idx)
        else:
            columns = rows.columns(x, module.bias, module._parameters["weight"].dtype)
            out = out.index_copy_(-1, rows.ids, columns.to(out.dtype))
    return out


def check_size(token_rows: Sequence[TokenRowsBranch], attached: Attachments, table: Tensor) -> None:
    """Checks that the table has the size that it had when its rows were chosen.

    Raises:
        StateError: it was resized since.
    """
    if token_rows and attached.shape is not None and table.shape != attached.shape:
        raise StateError(
            f"{token_rows[0].path} is now {' × '.join(map(str, table.shape))}, but it was "
            f"{' × '.join(map(str, attached.shape))} when rows of it were chosen to train: "
            "something, such as resize_token_embeddings, has changed it since. Resize a model "
            "before you adapt it; here, remove the adapter, resize, and adapt again"
        )


def _read(module: Any, attached: Attachments) -> Tensor:
    """Returns the module's weight with the rows in use, for a forward that reads it."""
    weight: Tensor = module._parameters["weight"]
    token_rows: list[TokenRowsBranch] = attached.in_use()
    if attached.mixed_batch is not None:
        raise StateError(
            f"{token_rows[0].path} is read without being called, so it cannot be in a mixed batch"
        )
    if torch.compiler.is_compiling():
        return _formed(weight, token_rows)
    trained = [rows.rows for rows in token_rows]
    whole: TableWithRows = TableWithRowsFunction.apply(weight, token_rows, *trained)  # type: ignore[no-untyped-call]
    whole.weight, whole.token_rows = weight, token_rows
    return whole


def _formed(weight: Tensor, token_rows: Sequence[TokenRowsBranch]) -> Tensor:
    for rows in token_rows:
        weight = rows.into(weight)
    return weight


class TableWithRows(UnformedWeight):
    """A weight with some rows replaced, formed only where something needs it whole."""

    weight: Tensor
    token_rows: Any  # list[TokenRowsBranch]
    address_refused: ClassVar[str] = (
        "a kernel takes the weight of a table by its address, and so would miss the rows that an "
        "adapter trains in it; merge the adapter, or choose another kernel"
    )

    def formed(self) -> Tensor:
        """Computes the table with the rows."""
        return _formed(self.weight, self.token_rows)

    @classmethod
    def compute_from_parts(
        cls, name: str, func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> Tensor | None:
        x, table, third = (*args, None, None, None)[:3]
        if not isinstance(table, TableWithRows) or isinstance(x, TableWithRows):
            return None
        if name == "embedding":
            out: Tensor = func(x, table.weight, *args[2:], **kwargs)
            for rows in table.token_rows:
                out = rows.looked_up(x, out, kwargs.get("padding_idx", third))
            return out
        if name == "linear":
            bias = kwargs.get("bias", third)
            out = F.linear(x, table.weight, bias)
            for rows in table.token_rows:
                out.index_copy_(-1, rows.ids, rows.columns(x, bias, table.dtype).to(out.dtype))
            return out
        return None


class TableWithRowsFunction(torch.autograd.Function):
    """Makes a `TableWithRows` the output of a function of the rows, for autograd.

    Some functions hand back a gradient of the whole weight, and this passes it on.
    """

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, token_rows: Sequence[TokenRowsBranch], *rows: Tensor
    ) -> Tensor:
        ctx.save_for_backward(*(rows_of_one.ids for rows_of_one in token_rows))
        ctx.dtypes = [tensor.dtype for tensor in rows]
        return TableWithRows.shaped_like(weight)

    @staticmethod
    @backward_once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        ids_of_each = ctx.saved_tensors
        for_weight = None
        if ctx.needs_input_grad[0]:
            for_weight = grad.index_fill(0, torch.cat(ids_of_each), 0)
        for_rows = [grad[i].to(dtype) for i, dtype in zip(ids_of_each, ctx.dtypes, strict=True)]
        return for_weight, None, *for_rows

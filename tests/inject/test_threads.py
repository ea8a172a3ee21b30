"""Threads: what one computes is with the adapters that it chose, or is refused; never a mixture."""

from __future__ import annotations

import contextlib
import copy
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import lorakin as lk
import soak
from conftest import randomise, tiny_llama

TIMES = soak.count("LORAKIN_READS", 3000) // 30


@pytest.fixture
def model() -> Any:
    """A model with adapters a and b."""
    model = tiny_llama()
    for seed, name in enumerate("ab"):
        randomise(lk.adapt(model, lk.LoRA(rank=4), name=name), seed=seed)
    return model


def expected(model: Any, ids: Tensor) -> dict[str, Tensor]:
    found = {}
    with torch.no_grad():
        for name in ("a", "b"):
            lk.activate(model, name)
            found[name] = model(ids).logits
    return found


def together(*targets: Callable[[], None]) -> None:
    """Run them in threads, and raise what one raises."""
    wrong: list[BaseException] = []

    def watched(target: Callable[[], None]) -> None:
        try:
            target()
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=watched, args=(target,)) for target in targets]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if wrong:
        raise wrong[0]


def test_what_a_thread_computes_is_what_it_chose(model: Any, ids: Tensor) -> None:
    right, counts = expected(model, ids), {"right": 0, "refused": 0, "wrong": 0}

    def serve(name: str) -> Callable[[], None]:
        def run() -> None:
            for _ in range(TIMES):
                try:
                    lk.activate(model, name)
                    with torch.no_grad():
                        out = model(ids).logits
                except lk.StateError:
                    counts["refused"] += 1
                else:
                    counts["right" if torch.equal(out, right[name]) else "wrong"] += 1

        return run

    together(serve("a"), serve("b"))
    assert counts["wrong"] == 0 and counts["right"] > 0
    assert lk.status(model).active in (("a",), ("b",)), "in every module"
    with torch.no_grad():
        assert any(torch.equal(model(ids).logits, out) for out in right.values()), (
            "the others are gone: nobody is asked"
        )
    soak.record("Two threads, each with its own adapter, and no lock", forwards=2 * TIMES, **counts)


def test_a_lock_of_ones_own_is_all_that_is_needed(model: Any, ids: Tensor) -> None:
    right, lock = expected(model, ids), threading.Lock()

    def serve(name: str) -> Callable[[], None]:
        def run() -> None:
            for _ in range(TIMES // 4):
                with lock, torch.no_grad():
                    lk.activate(model, name)
                    assert torch.equal(model(ids).logits, right[name])

        return run

    together(serve("a"), serve("b"))


def test_a_thread_that_chose_nothing_gets_one_or_the_other(model: Any, ids: Tensor) -> None:
    """The state is the model's: who does not choose gets what is in use, whole."""
    right, done = expected(model, ids), threading.Event()

    def switch() -> None:
        while not done.is_set():
            for name in ("a", "b"):
                with contextlib.suppress(lk.StateError):
                    lk.activate(model, name)

    def compute() -> None:
        try:
            with torch.no_grad():
                for _ in range(TIMES):
                    out = model(ids).logits
                    assert any(torch.equal(out, one) for one in right.values())
        finally:
            done.set()

    together(switch, compute)


def test_loading_merging_and_leaving_from_several_threads(ids: Tensor) -> None:
    model = tiny_llama()
    base = model(ids).logits
    keep = randomise(lk.adapt(model, lk.LoRA(rank=2), name="keep"))
    others = [randomise(lk.adapt(tiny_llama(), lk.LoRA(rank=2)), seed=n) for n in range(2)]
    tensors = [
        {path: other.tensors.saved_tensors(path) for path in other.placement.methods}
        for other in others
    ]

    def come_and_go(number: int) -> Callable[[], None]:
        def run() -> None:
            for _ in range(6):
                added = lk.Adapter(model, f"other{number}", others[number].placement)
                added.install(tensors[number])
                added.scale = 0.5
                added.remove()

        return run

    def disable() -> None:
        for _ in range(6):
            with keep.disabled():
                pass

    together(come_and_go(0), come_and_go(1), disable)
    assert list(lk.adapters(model)) == ["keep"]
    lk.activate(model, "keep")

    def merge() -> None:
        for _ in range(6):
            keep.merge()
            keep.unmerge()

    together(merge, merge)
    keep.remove()
    assert torch.equal(model(ids).logits, base)
    assert not model._forward_hooks and not model._forward_pre_hooks


def test_a_change_in_the_middle_of_a_forward_is_refused_and_changes_nothing(
    model: Any, ids: Tensor
) -> None:
    right = expected(model, ids)
    inside, go_on = threading.Event(), threading.Event()

    def wait(*_: Any) -> None:
        if threading.current_thread().name == "slow":
            inside.set()
            go_on.wait(20)

    model.model.layers[1].register_forward_pre_hook(wait)
    outs = []
    slow = threading.Thread(target=lambda: outs.append(model(ids).logits.detach()), name="slow")
    slow.start()
    inside.wait(20)
    adapter = lk.adapters(model)["a"]
    for change in (
        lambda: lk.activate(model, "a"), adapter.merge, adapter.remove,
        lambda: adapter.disabled().__enter__(),
        lambda: lk.merge(model, "a"), lambda: lk.adapt(model, lk.LoRA(rank=1), name="c"),
        lambda: setattr(adapter, "scale", 0.5),
    ):  # fmt: skip
        with pytest.raises(lk.StateError, match="'slow'"):
            change()
    go_on.set()
    slow.join()
    assert torch.equal(outs[0], right["b"])
    assert list(lk.adapters(model)) == ["a", "b"] and adapter.scale == 1 and not adapter.is_merged
    lk.activate(model, "a")


def test_a_forward_that_failed_is_over(model: Any) -> None:
    def fail() -> None:
        with pytest.raises(IndexError):
            model(torch.tensor([[10**6]]))
        failed.set()
        done.wait(20)

    failed, done = threading.Event(), threading.Event()
    thread = threading.Thread(target=fail)
    thread.start()
    failed.wait(20)
    lk.activate(model, "a")
    done.set()
    thread.join()


def test_a_copy_has_turns_of_its_own(model: Any, ids: Tensor) -> None:
    right = expected(model, ids)
    twin = copy.deepcopy(model)
    lk.activate(twin, "a")
    assert torch.equal(twin(ids).logits, right["a"]) and torch.equal(model(ids).logits, right["b"])


class Slow:
    """A forward that stops in its middle, in a thread of its own, until it is joined."""

    def __init__(self, model: Any, ids: Tensor, chooses: str | None = None) -> None:
        self.inside, self.go_on, self.out, self.error = (
            threading.Event(),
            threading.Event(),
            None,
            None,
        )
        self.model, self.ids, self.chooses = model, ids, chooses
        self.hook = model.model.layers[1].register_forward_pre_hook(self.wait)
        self.thread = threading.Thread(target=self.run)
        self.thread.start()
        self.inside.wait(20)

    def wait(self, *_: Any) -> None:
        if threading.current_thread() is self.thread:
            self.inside.set()
            self.go_on.wait(20)

    def run(self) -> None:
        try:
            if self.chooses is not None:
                lk.activate(self.model, self.chooses)
            with torch.no_grad():
                self.out = self.model(self.ids).logits
        except lk.StateError as error:
            self.error = error
            self.inside.set()

    def join(self) -> None:
        self.go_on.set()
        self.thread.join()
        self.hook.remove()


def mixed(model: Any) -> Any:
    return lk.mixed_batch(model, ["a", None])


def disabled(model: Any) -> Any:
    return lk.adapters(model)["b"].disabled()


def scaled(model: Any) -> Any:
    return lk.adapters(model)["b"].scaled(0.5)


@pytest.mark.parametrize("context", [mixed, disabled, scaled])
def test_a_context_is_not_entered_in_the_middle_of_a_forward(
    context: Any, model: Any, ids: Tensor
) -> None:
    right = expected(model, ids)
    slow = Slow(model, ids)
    with pytest.raises(lk.StateError), context(model):
        pass
    slow.join()
    assert slow.out is not None and torch.equal(slow.out, right["b"]) and slow.error is None
    with context(model), torch.no_grad():
        assert not torch.equal(model(ids).logits, right["b"])


@pytest.mark.parametrize("context", [mixed, disabled, scaled])
def test_a_forward_under_which_a_context_was_left_is_refused_at_its_end(
    context: Any, model: Any, ids: Tensor
) -> None:
    right = expected(model, ids)
    with context(model):
        slow = Slow(model, ids)  # it chose nothing, so it computes with what is in use
    slow.join()
    assert slow.out is None and slow.error is not None
    with torch.no_grad():
        assert torch.equal(model(ids).logits, right["b"]), "the next is right"
    again = Slow(model, ids)
    again.join()
    assert again.out is not None and torch.equal(again.out, right["b"])


def test_one_that_stays_disabled_spoils_nothing(model: Any, ids: Tensor) -> None:
    expected(model, ids)
    with disabled(model):
        with torch.no_grad():
            base = model(ids).logits
        with disabled(model):
            slow = Slow(model, ids)
        slow.join()
    assert slow.out is not None and torch.equal(slow.out, base)


def test_a_thread_that_chose_does_not_compute_with_anothers_mixed_batch(
    model: Any, ids: Tensor
) -> None:
    right = expected(model, ids)
    lk.activate(model, "a")
    entered, leave, wrong = threading.Event(), threading.Event(), []

    def other() -> None:
        with mixed(model), torch.no_grad():
            wrong.append(torch.equal(model(ids).logits, right["a"]))
            entered.set()
            leave.wait(20)

    thread = threading.Thread(target=other)
    thread.start()
    entered.wait(20)
    with torch.no_grad():
        with pytest.raises(lk.StateError):
            model(ids)
        leave.set()
        thread.join()
        assert torch.equal(model(ids).logits, right["a"]), "its choice is in force again"
    assert wrong == [False]


def test_a_mixed_batch_that_comes_and_goes(model: Any, ids: Tensor) -> None:
    right, done, counts = expected(model, ids), threading.Event(), {"right": 0, "refused": 0}

    def mix() -> None:
        while not done.is_set():
            with contextlib.suppress(lk.StateError), mixed(model):
                pass

    def compute() -> None:
        try:
            with contextlib.suppress(lk.StateError):
                lk.activate(model, "a")
            for _ in range(TIMES):
                try:
                    with torch.no_grad():
                        out = model(ids).logits
                except lk.StateError:
                    counts["refused"] += 1
                else:
                    assert torch.equal(out, right["a"])
                    counts["right"] += 1
        finally:
            done.set()

    lk.activate(model, "a")
    together(mix, compute)
    assert counts["right"] > 0

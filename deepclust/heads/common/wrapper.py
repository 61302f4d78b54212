"""A head around another head: what it hands on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import nn

from deepclust.heads.base import Bank, BankSpec, Batch, Head, Output, Progress, Refresh, View


class Wrapper(Head):
    """Holds a head as `inner`, whose views come first; it keeps its banks, memories and parameters'
    settings.

    extra_views: the wrapper's own, numbered after those of `inner`. Names of inner buffers get the
    prefix `inner.`.
    """

    def __init__(self, inner: Head, extra_views: tuple[View, ...] = ()) -> None:
        super().__init__()
        self.inner = inner
        self.views = (*inner.views, *extra_views)
        self.sharded_buffers = tuple(f"inner.{name}" for name in inner.sharded_buffers)
        self.training_buffers = tuple(f"inner.{name}" for name in inner.training_buffers)

    def inner_outputs(self, outputs: Mapping[int, Output]) -> dict[int, Output]:
        """The outputs of the inner head's views."""
        return {
            number: output for number, output in outputs.items() if number < len(self.inner.views)
        }

    def bank_due(self, progress: Progress) -> BankSpec | None:
        """As `inner` asks."""
        return self.inner.bank_due(progress)

    def refresh(self, bank: Bank) -> Refresh:
        """As `inner` does."""
        asked = self.inner.refresh(bank)
        return Refresh(asked.partners, asked.order, tuple(f"inner.{name}" for name in asked.reset))

    def after_step(self, outputs: Mapping[int, Output], batch: Batch) -> None:
        """As `inner` does."""
        self.inner.after_step(self.inner_outputs(outputs), batch)

    def frozen(self, progress: Progress) -> tuple[str, ...]:
        """As `inner` says."""
        return tuple(f"inner.{name}" for name in self.inner.frozen(progress))

    def param_groups(self) -> Iterator[tuple[list[nn.Parameter], dict[str, float]]]:
        """Those of `inner`; the wrapper's own parameters get the stage's settings."""
        yield from self.inner.param_groups()

    def init_from(self, previous: Head) -> None:
        """`inner` takes over what it can, from the head itself or from what it wraps."""
        self.inner.init_from(previous.inner if isinstance(previous, Wrapper) else previous)

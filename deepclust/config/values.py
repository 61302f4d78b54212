"""Kinds of configuration values: each says in words what it accepts, and reads a value or refuses
it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from deepclust.types import Range


class Refused(Exception):
    """A value that a kind does not accept; `hint` may say what to write instead."""

    def __init__(self, hint: str = "") -> None:
        super().__init__(hint)
        self.hint = hint


class Kind:
    """One kind of value. `words` completes the sentence "must be ..."."""

    words: str

    def read(self, value: Any) -> Any:
        """The value in the type that the program wants. Raises Refused."""
        raise Refused


@dataclass(frozen=True)
class Anything(Kind):
    words = "anything"

    def read(self, value: Any) -> Any:
        return value


@dataclass(frozen=True)
class Nothing(Kind):
    words = "null"

    def read(self, value: Any) -> Any:
        if value is not None:
            raise Refused
        return None


@dataclass(frozen=True)
class Flag(Kind):
    words = "true or false"

    def read(self, value: Any) -> Any:
        if not isinstance(value, bool):
            raise Refused
        return value


@dataclass(frozen=True)
class Text(Kind):
    words = "text"

    def read(self, value: Any) -> Any:
        if not isinstance(value, str):
            raise Refused(" (put it in quotes)" if isinstance(value, int | float) else "")
        if "\0" in value:
            raise Refused(" without a NUL character")
        return value


@dataclass(frozen=True)
class Number(Kind):
    """A whole or real number within bounds. Text, true and false are no numbers; infinity needs
    bounds that hold it.
    """

    whole: bool
    range: Range | None = None

    @property
    def words(self) -> str:  # type: ignore[override]
        noun = "an integer" if self.whole else "a number"
        bounds = "" if self.range is None else str(self.range).replace(" and < inf", "")
        return f"{noun} {bounds}".strip()

    def read(self, value: Any) -> Any:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise Refused
        if self.whole and isinstance(value, float):
            raise Refused(
                f" (write {int(value)})" if math.isfinite(value) and value == int(value) else ""
            )
        inside = math.isfinite(value) if self.range is None else value in self.range
        if not inside:
            raise Refused
        return value if self.whole else float(value)


@dataclass(frozen=True)
class Choice(Kind):
    """One of a few constants."""

    values: tuple[Any, ...]

    @property
    def words(self) -> str:  # type: ignore[override]
        names = ["null" if value is None else str(value) for value in self.values]
        return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} or {names[-1]}"

    def read(self, value: Any) -> Any:
        if not any(value == item and type(value) is type(item) for item in self.values):
            raise Refused
        return value


@dataclass(frozen=True)
class Items(Kind):
    """A list of one kind, or a tuple with a kind for each place."""

    item: Kind
    container: str
    places: tuple[Kind, ...] | None = None

    @property
    def words(self) -> str:  # type: ignore[override]
        if self.places is None:
            return (
                "a list" if isinstance(self.item, Anything) else f"a list, each {self.item.words}"
            )
        return f"a list of {len(self.places)}: {', '.join(place.words for place in self.places)}"

    def read(self, value: Any) -> Any:
        if not isinstance(value, list | tuple):
            raise Refused
        if self.places is not None and len(value) != len(self.places):
            raise Refused
        kinds = self.places or (self.item,) * len(value)
        read = [kind.read(item) for kind, item in zip(kinds, value)]
        return tuple(read) if self.container == "tuple" else read


@dataclass(frozen=True)
class Table(Kind):
    """A mapping from names to one kind."""

    item: Kind

    @property
    def words(self) -> str:  # type: ignore[override]
        return (
            "a mapping"
            if isinstance(self.item, Anything)
            else f"a mapping whose values are each {self.item.words}"
        )

    def read(self, value: Any) -> Any:
        if not isinstance(value, Mapping):
            raise Refused
        return {str(key): self.item.read(item) for key, item in value.items()}


@dataclass(frozen=True)
class Either(Kind):
    """The first of several kinds that accepts a value."""

    options: tuple[Kind, ...]

    @staticmethod
    def of(*kinds: Kind) -> Either:
        """A flat union."""
        flat = [
            part
            for kind in kinds
            for part in (kind.options if isinstance(kind, Either) else (kind,))
        ]
        return Either(tuple(flat))

    @property
    def words(self) -> str:  # type: ignore[override]
        return " or ".join(option.words for option in self.options)

    def read(self, value: Any) -> Any:
        hint = ""
        for option in self.options:
            try:
                return option.read(value)
            except Refused as refused:
                hint = hint or refused.hint
        raise Refused(hint)

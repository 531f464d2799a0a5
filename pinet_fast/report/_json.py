"""JSON values that know where they stand, so that a wrong one can be named."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

from pinet_fast.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator

_FIX = "restore the file, or train the run again"


@dataclass(frozen=True)
class Node:
    """A value inside a JSON file.

    Attributes:
        value: The value as parsed.
        file: The file, with the line where it has many.
        key: Where in it, such as ``test.backbone.overall``; empty at the top.
    """

    value: Any
    file: str
    key: str = ""

    def __getitem__(self, key: str) -> Node:
        """Return a member of an object."""
        members = self._typed(dict, "an object")
        place = f"{self.key}.{key}" if self.key else key
        if key not in members:
            raise ConfigError(f"{self.file}: the key {place!r} is missing; {_FIX}")
        return Node(members[key], self.file, place)

    def __iter__(self) -> Iterator[Node]:
        """Walk over a list."""
        for index, value in enumerate(self._typed(list, "a list")):
            yield Node(value, self.file, f"{self.key}[{index}]")

    @property
    def is_null(self) -> bool:
        """Return whether the value is null."""
        return self.value is None

    def get(self, key: str) -> Node:
        """Return a member of an object, null where it is missing."""
        place = f"{self.key}.{key}" if self.key else key
        return Node(self._typed(dict, "an object").get(key), self.file, place)

    def mapping(self) -> dict[str, Any]:
        """Return the value as an object."""
        return dict(self._typed(dict, "an object"))

    def text(self) -> str:
        """Return the value as a string."""
        return str(self._typed(str, "a string"))

    def flag(self) -> bool:
        """Return the value as true or false."""
        return bool(self._typed(bool, "true or false"))

    def integer(self) -> int:
        """Return the value as a whole number."""
        if isinstance(self.value, bool) or not isinstance(self.value, int):
            self.wrong("a whole number")
        return int(self.value)

    def number(self) -> float:
        """Return the value as a number."""
        if isinstance(self.value, bool) or not isinstance(self.value, int | float):
            self.wrong("a number")
        return float(self.value)

    def number_or_none(self) -> float | None:
        """Return the value as a number, or None for null."""
        return None if self.is_null else self.number()

    def number_or_nan(self) -> float:
        """Return the value as a number, or NaN for null."""
        return math.nan if self.is_null else self.number()

    def numbers(self) -> tuple[float, ...]:
        """Return a list of numbers, NaN for null."""
        return tuple(node.number_or_nan() for node in self)

    def wrong(self, expected: str) -> NoReturn:
        """Refuse the value.

        Raises:
            ConfigError: Always.
        """
        shown = repr(self.value)
        shown = shown if len(shown) <= 40 else shown[:37] + "..."
        place = f"{self.key}: " if self.key else ""
        raise ConfigError(f"{self.file}: {place}expected {expected}, got {shown}; {_FIX}")

    def _typed(self, kind: type, expected: str) -> Any:
        if not isinstance(self.value, kind):
            self.wrong(expected)
        return self.value

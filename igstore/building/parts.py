"""A part of a build: the share of a store's shards that one of several jobs builds, which share only a file system."""

from __future__ import annotations

import re
from dataclasses import dataclass

from igstore.errors import UserError, option


@dataclass(frozen=True)
class Part:
    """Every `count`-th shard, beginning with shard `number` - 1.

    Shards are dealt out like cards, not cut into runs, so that the parts' loads are equal also where a store grows or a
    build goes on, whose missing shards lie side by side. A shard's own images are neighbours all the same.

    Parameters
    ----------
    number
        From 1 to `count`.
    count
        How many parts there are; 1 is the whole.
    """

    number: int = 1
    count: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.number <= self.count:
            raise UserError(f"{option('part')} is {self}; it must be I/N, I from 1 to N: 1/8 to 8/8 for eight jobs")

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"

    @classmethod
    def parse(cls, text: str) -> Part:
        """The part that ``2/8`` stands for.

        Raises
        ------
        UserError
            It is not of that form, or not one of the parts.
        """
        numbers = re.fullmatch(r"([0-9]{1,9})/([0-9]{1,9})", text) if isinstance(text, str) else None
        if not numbers:
            raise UserError(f"{option('part')} is {text!r}; it must be I/N, such as 1/8, I from 1 to N")
        return cls(int(numbers[1]), int(numbers[2]))

    @property
    def is_whole(self) -> bool:
        """Whether it is all that there is to build."""
        return self.count == 1

    def shards(self, n_shards: int) -> range:
        """The numbers of its shards, of a store of `n_shards`."""
        return range(self.number - 1, n_shards, self.count)

"""How a store is built: the plan, the workers and their shards, repair, and the ranking of blocks."""

from igstore._faces import face

__getattr__, __dir__, __all__ = face(__name__)

"""Files wherever they are: written atomically, locked, mapped into memory, or fetched from a server."""

from igstore._faces import face

__getattr__, __dir__, __all__ = face(__name__)

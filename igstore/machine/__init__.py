"""What igstore runs on: its memory, its cores, its devices, torch's settings, and the versions of libraries."""

from igstore._faces import face

__getattr__, __dir__, __all__ = face(__name__)

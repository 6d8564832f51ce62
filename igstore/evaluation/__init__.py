"""What networks predict for masked images: measured, kept in a folder, and put into tables."""

from igstore._faces import face

__getattr__, __dir__, __all__ = face(__name__)

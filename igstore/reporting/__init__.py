"""What people look at: pictures, charts, and the page of a report."""

from igstore._faces import face

__getattr__, __dir__, __all__ = face(__name__)

"""What a mask is: blocks and their ranks, which of them are visible, and how hidden pixels are filled. NumPy only."""

from igstore._faces import face

__getattr__, __dir__, __all__ = face(__name__)

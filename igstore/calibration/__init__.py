"""Quadrature rules fitted to a network's own gradients, for `igstore calibrate`."""

from igstore._faces import face

__getattr__, __dir__, __all__ = face(__name__)

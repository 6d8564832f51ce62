"""Classifiers: found by name, with their weights and normalisation, and adapted to what igstore needs."""

from igstore._faces import face

__getattr__, __dir__, __all__ = face(__name__)

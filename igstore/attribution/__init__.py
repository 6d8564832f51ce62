"""Integrated Gradients: the integral, its quadrature rules and baselines, and batches that fit into memory."""

from igstore._faces import face

__getattr__, __dir__, __all__ = face(__name__)

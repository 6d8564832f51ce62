"""Masked images of a store: as xarray, as a PyTorch data set, and in batches on a device."""

from igstore._faces import face

__getattr__, __dir__, __all__ = face(__name__)

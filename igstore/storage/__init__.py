"""Stores: how they are laid out, read, written, checked and copied, as Zarr and as HDF5."""

from igstore._faces import face

__getattr__, __dir__, __all__ = face(__name__)

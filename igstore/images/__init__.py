"""Images and their labels: ImageNet, other folders, data sets; and one image as the pixels that a network is shown."""

from igstore._faces import face

__getattr__, __dir__, __all__ = face(__name__)

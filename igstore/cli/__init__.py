"""What all commands share: options, output, exit statuses, progress, and text that is safe to print."""

from igstore._faces import face

__getattr__, __dir__, __all__ = face(__name__)

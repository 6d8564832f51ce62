"""Names of files as people see them, and those that other systems leave in folders without asking."""

from __future__ import annotations

import unicodedata

# Windows, macOS, file servers, Linux; and whatever is hidden, which igstore makes nothing of.
_FOREIGN = frozenset(
    (
        "thumbs.db",
        "ehthumbs.db",
        "desktop.ini",
        "$recycle.bin",
        "system volume information",
        "icon\r",
        "__macosx",
        "network trash folder",
        "temporary items",
        "@eadir",
        "#recycle",
        "@recycle",
        "#snapshot",
        "~snapshot",
        "lost+found",
    )
)
_FOREIGN_STARTS = (".", "~$")  # the second is what office programs put beside an open file


def is_foreign(name: str) -> bool:
    """Whether a file or folder of this name is no work of people's or igstore's: ``.DS_Store``, ``@eaDir`` ...

    >>> [name for name in ("cat.jpg", "._cat.jpg", "Thumbs.db") if is_foreign(name)]
    ['._cat.jpg', 'Thumbs.db']
    """
    return name.startswith(_FOREIGN_STARTS) or name.lower() in _FOREIGN


def as_seen(name: str) -> str:
    """A name in one of the forms that Unicode has for it, NFC: file systems differ there, and people see no difference.

    >>> as_seen("Cafe\\u0301") == "Caf\\u00e9"
    True
    """
    return unicodedata.normalize("NFC", name)

"""Names of files, folders and URLs: as people see them, without secrets, and those that are not people's work."""

from __future__ import annotations

import os
import re
import unicodedata

_URL = re.compile(r"""([\w+.:-]+://)(?:[^\s/'"]*@)?([^\s?#'"]*)(?:[?#][^\s'")>]*)?""")

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


def is_url(address: str | os.PathLike[str]) -> bool:
    """Whether it is a URL, and not one of a local file."""
    protocol, separator, _ = os.fspath(address).partition("://")
    return bool(separator) and protocol != "file"


def shown(text: str | os.PathLike[str]) -> str:
    """A path, a URL, or words that URLs are in, without what URLs say of users and without their queries.

    >>> shown("cannot connect to https://me:secret@host/toy.zarr?sig=abc")
    'cannot connect to https://host/toy.zarr'
    """
    return _URL.sub(r"\1\2", os.fspath(text))

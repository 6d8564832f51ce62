"""Addresses as they may be shown: passwords and signatures in URLs are for the server alone."""

from __future__ import annotations

import os
import re

_URL = re.compile(r"""([\w+.:-]+://)(?:[^\s/'"]*@)?([^\s?#'"]*)(?:[?#][^\s'")>]*)?""")


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

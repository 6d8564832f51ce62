"""Faces of folders: what a folder offers to the rest is listed in its stub, and imported when it is first used.

A face, ``__init__.py``, says what lives in its folder. The stub beside it, ``__init__.pyi``, imports what others may
use: type checkers read it as it is, and `face` finds in it where each name lives. So what needs no torch never waits
for it.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from itertools import pairwise
from typing import Any


def face(package: str) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """`__getattr__`, `__dir__` and `__all__` of a package."""
    homes: dict[str, str] = {}
    with open(os.path.splitext(str(sys.modules[package].__file__))[0] + ".pyi", encoding="utf-8") as stub:
        home = ""
        for line in stub:  # `from HOME import NAME as NAME, ...`, or the names on lines of their own
            words = line.replace(",", " ").split()
            home = words[1] if words[:1] == ["from"] else home
            homes |= {name: home for name, word in pairwise(words) if word == "as"}
    names = sorted(homes)

    def get(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        if homes[name] == package:
            return importlib.import_module(f"{package}.{name}")
        return getattr(importlib.import_module(homes[name]), name)

    return get, lambda: names, names

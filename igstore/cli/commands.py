"""The commands: a table of contents. Each is a module with ``parser()`` and ``main(argv) -> int``."""

from __future__ import annotations

import importlib
from types import ModuleType

SECTIONS = {
    "make a store": {
        "build": "attribute images with Integrated Gradients, into a store",
        "import": "make a store of maps that were made elsewhere",
        "calibrate": "fit quadrature rules to a network, for as good maps from fewer gradients",
        "rank": "rank the blocks of a store's maps",
    },
    "measure with it": {
        "evaluate": "measure models on masked images, and print the article's tables",
        "report": "make a page of an evaluation, with figures",
        "curves": "delete and insert blocks by rank, and say how fast the answer goes and comes",
    },
    "look at it": {
        "info": "say what a store holds, what made it, and what is missing",
        "show": "draw what the masks do to some images",
        "view": "look at any image and any mask of a store, in a browser",
    },
    "keep and share it": {
        "verify": "check every byte of a store, and what it means",
        "export": "write a store in another form: thin, compressed, HDF5",
        "merge": "make one store out of parts that were built in different places",
    },
    "your shell": {
        "completion": "print a script with which your shell completes all this",
    },
}

COMMANDS = {name: purpose for commands in SECTIONS.values() for name, purpose in commands.items()}

_MODULES = {"import": "imported"}  # where a module cannot have the command's name


def module_of(command: str) -> ModuleType:
    """The module of a command, imported when it is needed."""
    return importlib.import_module(f"igstore.{_MODULES.get(command, command)}")

"""How the pages are built: `make docs`, or ``python -m sphinx -W pipelines/docs site``."""

from __future__ import annotations

import os
from typing import Any

from docutils import nodes
from docutils.parsers.rst import Directive

import igstore
from igstore.cli import SECTIONS, module_of

project = "igstore"
author = "The igstore developers"
copyright = author  # noqa: A001  # Sphinx's name for it
version = release = igstore.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "furo"
html_title = "igstore"
html_show_sourcelink = False
highlight_language = "none"
myst_heading_anchors = 3
add_module_names = False
autodoc_typehints = "none"  # the docstrings say it for people
autodoc_member_order = "bysource"
napoleon_google_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False


class Commands(Directive):
    """Every command of igstore, section by section, with what its ``--help`` says."""

    def run(self) -> list[nodes.Node]:
        """One section a command."""
        os.environ["COLUMNS"] = "88"  # which argparse wraps to
        found: list[nodes.Node] = []
        for title, commands in SECTIONS.items():
            for name, purpose in commands.items():
                section = nodes.section(ids=[f"igstore-{name}"], names=[f"igstore {name}"])
                section += nodes.title(text=f"igstore {name}")
                section += nodes.paragraph(text=f"To {title}: {purpose}.")
                said = module_of(name).parser().format_help()
                section += nodes.literal_block(said, said, language="none")
                found.append(section)
        return found


def setup(app: Any) -> None:
    """Sphinx calls this."""
    app.add_directive("igstore-commands", Commands)

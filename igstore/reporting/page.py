"""The report's page: findings as HTML that asks for nothing from anywhere. Needs no torch.

Every string that comes from a store or from results passes through `text` on its way into the page.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Mapping, Sequence
from importlib.resources import files
from string import Template

from PIL import Image

from igstore.cli import html as text
from igstore.evaluation import Line, Table
from igstore.reporting.charts import Chart
from igstore.reporting.pictures import Panel

_JPEG_QUALITY = 85


def page(title: str, lede: str, sections: Mapping[str, Sequence[str]]) -> str:
    """The whole page: its title, what it is about, links to its sections, and those that have parts, by title."""
    sections = {section: parts for section, parts in sections.items() if any(parts)}
    anchors = {section: section.lower().replace(" ", "-") for section in sections}
    links = "\n".join(f'<a href="#{text(anchor)}">{text(section)}</a>' for section, anchor in anchors.items())
    header = f'<header>\n<h1>{text(title)}</h1>\n<p class="lede">{text(lede)}</p>\n<nav>\n{links}\n</nav>\n</header>'
    bodies = [
        "\n".join([f'<section id="{text(anchors[section])}">', f"<h2>{text(section)}</h2>", *parts, "</section>"])
        for section, parts in sections.items()
    ]
    template = Template((files("igstore.reporting") / "report.html").read_text("utf-8"))
    return template.substitute(title=text(title), body="\n".join([header, *bodies]))


def subsection(title: str, *parts: str) -> str:
    """A part of a section."""
    return "\n".join([f"<h3>{text(title)}</h3>", *parts])


def folded(title: str, *parts: str, is_open: bool) -> str:
    """A part of a section that can be folded away; paper shows it in any case."""
    return "\n".join(
        [f"<details{' open' if is_open else ''}>", f"<summary>{text(title)}</summary>", *parts, "</details>"]
    )


def paragraph(words: str) -> str:
    """A few sentences."""
    return f"<p>{text(words)}</p>"


def download(words: str, path: str) -> str:
    """A paragraph that ends in a link to a file beside the page."""
    return f'<p class="note">{text(words)} <a href="{text(path)}">{text(path)}</a></p>'


def figure(chart: Chart, caption: str, folder: str) -> str:
    """A chart, with links to its picture and its numbers in `folder`, relative to the page."""
    links = ", ".join(f'<a href="{text(folder)}/{chart.name}.{kind}">{kind.upper()}</a>' for kind in ("png", "csv"))
    kind = ' class="one"' if len(chart.panels) == 1 else ""
    return f"<figure{kind}>\n{chart.svg()}\n<figcaption>{text(caption)} {links}</figcaption>\n</figure>"


def table(content: Table) -> str:
    """A table, its groups told apart by rules."""
    head = "".join(f'<th scope="col">{text(name)}</th>' for name in content.header)
    bodies = "\n".join(f"<tbody>\n{_lines(group)}\n</tbody>" for group in content.groups)
    caption = f"<span>{text(content.title)}<small>{text(content.note)}</small></span>"
    return (
        f'<div class="scroll"><table>\n<caption>{caption}</caption>\n<thead><tr>{head}</tr></thead>\n{bodies}\n'
        "</table></div>"
    )


def _lines(group: Iterable[Line]) -> str:
    return "\n".join(
        f'<tr><th scope="row">{text(name)}</th>{"".join(f"<td>{text(cell)}</td>" for cell in cells)}</tr>'
        for name, *cells in group
    )


def facts(content: Mapping[str, str]) -> str:
    """Names and values."""
    lines = _lines(content.items())
    return f'<div class="scroll"><table class="facts"><tbody>\n{lines}\n</tbody></table></div>'


def card(title: str, subtitle: str, lines: Sequence[str], pictures: Sequence[Panel] = ()) -> str:
    """An image that stands out: pictures of it, if there are any, and a few words."""
    words = "\n".join(f"<p>{text(line)}</p>" for line in lines)
    shown = "\n".join(f"<div>{_picture(panel)}{text(panel.caption)}</div>" for panel in pictures)
    strip = f'<div class="pictures">\n{shown}\n</div>\n' if pictures else ""
    return f'<article class="card">\n<h4>{text(title)} <small>{text(subtitle)}</small></h4>\n{strip}{words}\n</article>'


def cards(content: Sequence[str], *, with_pictures: bool) -> str:
    """Cards beside and below each other."""
    kind = "cards" if with_pictures else "cards plain"
    return "\n".join([f'<div class="{kind}">', *content, "</div>"])


def _picture(panel: Panel) -> str:
    data = io.BytesIO()
    Image.fromarray(panel.pixels).save(data, "jpeg", quality=_JPEG_QUALITY, subsampling=0)  # blocks keep their colours
    height, width, _ = panel.pixels.shape
    source = f"data:image/jpeg;base64,{base64.b64encode(data.getbuffer()).decode()}"
    return f'<img src="{source}" alt="{text(panel.caption)}" width="{width}" height="{height}">'

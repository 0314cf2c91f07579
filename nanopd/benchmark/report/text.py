"""Text in a picture that nobody has drawn yet: how wide it is, and as SVG."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from html import escape, unescape

LATIN, WIDE, LINE = 0.56, 1.0, 1.25  # of the size: width of a letter, of a Chinese character; from line to line


def text_width(text: str, size: float) -> float:
    """Pixels, about; of the longest line. Tags take no room."""
    return max(sum(WIDE if unicodedata.east_asian_width(letter) in "WF" else LATIN for letter in unescape(re.sub(r"<[^>]*>", "", line)))
               for line in text.split("<br>")) * size


def text_svg(text: str, x: float, y: float, size: float, colour: str, anchor: str = "start", transform: str = "", css: str = "") -> str:
    """A text of plotly's kind, with <b> and <br>; the first line's baseline at (x, y)."""
    lines = "".join(f'<tspan x="{x:.1f}" dy="{LINE * size if number else 0:.1f}">{"".join(_bold_parts(line))}</tspan>'
                    for number, line in enumerate(text.split("<br>")))
    extra = (f' transform="{transform}"' if transform else "") + (f' class="{css}"' if css else "")
    return f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size:g}" fill="{colour}" text-anchor="{anchor}"{extra}>{lines}</text>'


def _bold_parts(line: str) -> Iterator[str]:
    bold = False
    for part in re.split(r"(</?b>)", line):
        if part in ("<b>", "</b>"):
            bold = part == "<b>"
        elif part:
            text = escape(unescape(re.sub(r"<[^>]*>", "", part)))
            yield f'<tspan font-weight="600">{text}</tspan>' if bold else text

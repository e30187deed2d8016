"""Figures that take the colours of the page they stand on, light or dark."""

from __future__ import annotations

import io
import re
from typing import TYPE_CHECKING
from xml.sax.saxutils import quoteattr
from zlib import crc32

from streamlens.analyses.figures import PALETTE, save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_INK = ("#262626", "#000000", PALETTE["block"])
"""What the house style draws text, axes and unnamed lines in."""


def themed_svg(axes: Axes, description: str) -> str:
    """Return a figure as an SVG element without paper, whose ink is that of the text around it.

    Args:
        axes: part of the figure.
        description: what a reader hears who does not see it.
    """
    figure = axes.get_figure(root=True)
    assert figure is not None, "axes without a figure"
    figure.patch.set_alpha(0)
    if figure.get_suptitle():
        figure.suptitle("")
    for part in figure.axes:
        part.patch.set_alpha(0)
        part.set_title("", loc="left")  # the page says what was measured
    drawn = io.StringIO()
    save_figure(axes, drawn)
    text = drawn.getvalue()
    text = text[text.index("<svg") :]
    for ink in _INK:
        text = text.replace(ink, "currentColor")
    # Several figures share the page, so their names may not clash.
    tag = f"f{crc32(description.encode()):08x}"
    text = re.sub(r'(id="|href="#|url\(#)', rf"\g<1>{tag}-", text)
    return text.replace("<svg ", f"<svg role='img' aria-label={quoteattr(description)} ", 1)

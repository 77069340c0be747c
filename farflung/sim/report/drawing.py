"""What all pictures share: colours, figures without a display, and PNG or inline SVG out of the same figure.

matplotlib is imported when something is drawn. Its settings are those it ships with, whatever the user's own file says,
and are put back afterwards.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from textwrap import wrap
from typing import Any

from farflung.sim.report.attribution import UNATTRIBUTED

INK, FAINT, GRID = "#222222", "#777777", "#dddddd"

SERIES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C6D31")
"""Okabe and Ito's colours, told apart by colour-blind readers; lines differ in their labels too."""

CAUSE_COLOURS = {
    "compute": "#C8C8C8",
    "straggler": "#E69F00",
    "mixing": "#332288",
    "upload": "#0072B2",
    "download": "#56B4E9",
    "latency": "#F0E442",
    "codec": "#009E73",
    "disk": "#8C6D31",
    "deadline": "#D55E00",
    "protocol": "#CC79A7",
    UNATTRIBUTED: "#FFFFFF",
}
SEGMENT_COLOURS = {
    "train": "#C8C8C8",
    "encode": "#009E73",
    "exchange": "#0072B2",
    "aggregate": "#E69F00",
    "wait": "#F4D9CC",
    "offline": "#444444",
}
"""Grey is training in both: what is coloured is the price of being far apart."""

OTHER_COLOUR = "#B9A5D0"
DARK = {"#0072B2", "#332288", "#D55E00", "#009E73", "#8C6D31", "#444444", "#000000"}
"""Colours on which text is white."""

SETTINGS = {"svg.fonttype": "none", "svg.hashsalt": "farflung", "font.size": 9, "axes.edgecolor": "#999999"}
DPI = 130
CAPTION_LETTERS, TITLE_LINE = 150, 0.18
"""Letters in a line of a caption in a PNG, and the height of a line of its title in inches."""

TIP_HINT = " Rest the mouse on a part for names."
"""Ends captions of drawings with tips; left out where there is no mouse."""


@dataclass
class Drawing:
    """A figure on its way to a file or a page. `tips` are texts that show when the mouse rests on a part of it."""

    name: str
    """Of the file, and unique on a page."""

    title: str
    caption: str
    figure: Any
    tips: dict[str, str] = field(default_factory=dict)

    def tip(self, artist: Any, text: str) -> None:
        """Explain a part of the figure."""
        key = f"tip{len(self.tips)}"
        artist.set_gid(key)
        self.tips[key] = text


@contextmanager
def house_settings() -> Iterator[None]:
    """matplotlib as it was shipped, with ours on top; the caller's own settings come back at the end."""
    import matplotlib

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(SETTINGS)
        yield


def new_drawing(name: str, title: str, caption: str, *, width: float = 9.0, height: float = 4.5) -> Drawing:
    """An empty figure, in inches. It needs no display and no global state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return Drawing(name, title, caption, figure)


def tidy_axes(axes: Any, *, grid: str = "x") -> None:
    """Frame and grid as light as they can be."""
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.set_axisbelow(True)
    axes.grid(axis=grid, color=GRID, linewidth=0.7)
    axes.tick_params(length=3, color="#999999")


def colour_key(figure: Any, colours: dict[str, str], *, per_row: int = 10) -> None:
    """What the colours mean, below the axes."""
    from matplotlib.patches import Patch

    handles = [Patch(facecolor=colour, edgecolor="#999999", linewidth=0.5) for colour in colours.values()]
    columns = min(per_row, len(colours))
    figure.legend(handles, list(colours), loc="outside lower left", ncols=columns, frameon=False, fontsize=8)


def text_on(colour: str) -> str:
    """Black or white, whichever can be read on it."""
    return "white" if colour in DARK else INK


def write_png(drawing: Drawing, folder: Path) -> Path:
    """With title and caption above the figure; a page says both beside it."""
    path, figure = folder / f"{drawing.name}.png", drawing.figure
    caption = wrap(drawing.caption.replace(TIP_HINT, "").strip(), CAPTION_LETTERS)
    width, height = figure.get_size_inches()
    height += TITLE_LINE * len(caption)
    figure.set_size_inches(width, height)
    figure.suptitle(drawing.title + "\n " * len(caption), x=0.01, ha="left", fontsize=11)  # room for the caption
    style = {"va": "top", "fontsize": 7.5, "color": FAINT, "linespacing": 1.3}
    figure.text(0.0105, 1 - 1.4 * TITLE_LINE / height, "\n".join(caption), **style).set_in_layout(False)
    figure.savefig(path, dpi=DPI, metadata={"Software": None})
    return path


def to_svg(drawing: Drawing) -> str:
    """An inline `<svg>` element: text as text, ids unique to this drawing, nothing to load, tips as titles."""
    buffer = io.StringIO()
    drawing.figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return inline_svg(buffer.getvalue(), drawing)


def inline_svg(text: str, drawing: Drawing) -> str:
    """What only a file of its own needs is cut away: declarations, name spaces, metadata, styles for every element."""
    body = text[text.index("<svg") :]
    width, height = re.findall(r'(?:width|height)="([\d.]+)pt"', body)[:2]
    body = re.sub(r"<svg[^>]*>", "", body, count=1)
    body = re.sub(r"<metadata>.*?</metadata>|<style[^>]*>.*?</style>|<!--.*?-->", "", body, flags=re.DOTALL)
    body = re.sub(r"(\d\.\d\d)\d+(?=[^<>]*>)", r"\1", body)  # hundredths of a point, in attributes only
    body = re.sub(r'\bid="([^"]+)"', rf'id="{drawing.name}-\1"', body)
    body = re.sub(r'(?:xlink:)?href="#', f'href="#{drawing.name}-', body)
    body = body.replace("url(#", f"url(#{drawing.name}-")
    for key, tip in drawing.tips.items():
        group = f'<g id="{drawing.name}-{key}">'
        body = body.replace(group, f"{group}<title>{escape(tip)}</title>", 1)
    label = escape(drawing.title, quote=True)
    return f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{label}">{body.strip()}'

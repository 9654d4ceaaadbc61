"""Style of all figures."""

from io import BytesIO
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

THINK, NO_THINK, NEITHER, INK = "#2066B0", "#E07B00", "#8C8C8C", "#333333"
PERCENT_TICKS = FuncFormatter(lambda value, _: f"{100 * value:.6g} %")
WIDTH = 9.0  # inches; 900 px wide in the HTML page
STYLE: dict[Any, Any] = {
    "figure.dpi": 100,
    "savefig.dpi": 180,
    "figure.facecolor": "white",
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "text.parse_math": False,
    "axes.labelcolor": INK,
    "axes.edgecolor": "#AAAAAA",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E6E6E6",
    "grid.linewidth": 0.8,
    "xtick.color": "#AAAAAA",
    "ytick.color": "#AAAAAA",
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "text.color": INK,
    "legend.frameon": False,
    "legend.handlelength": 1.4,
    "legend.columnspacing": 1.4,
    "figure.constrained_layout.w_pad": 0.07,
    "figure.constrained_layout.h_pad": 0.06,
    "lines.linewidth": 1.8,
    "lines.solid_capstyle": "round",
}


def to_png(figure: Figure) -> bytes:
    buffer = BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})  # the same bytes for the same figure
    return buffer.getvalue()

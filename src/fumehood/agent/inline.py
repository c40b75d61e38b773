"""The matplotlib backend of a session: plt.show() makes every open figure a result, then closes it.

Loaded by matplotlib itself, by name, once user code (or the preload) imports pyplot; importing it imports matplotlib.
"""

from __future__ import annotations

import builtins
from typing import Any

from matplotlib._pylab_helpers import Gcf
from matplotlib.backend_bases import FigureManagerBase
from matplotlib.backends.backend_agg import FigureCanvasAgg


def _display(figure: Any) -> None:
    vars(builtins)["display"](figure)  # the executor's


def show_open_figures() -> None:
    """Whatever backend they belong to: code that chose Agg for itself still leaves figures open."""
    try:
        for manager in Gcf.get_all_fig_managers():
            _display(manager.canvas.figure)
    finally:
        Gcf.destroy_all()


class FigureManager(FigureManagerBase):
    def show(self) -> None:
        _display(self.canvas.figure)

    @classmethod
    def pyplot_show(cls, *, block: bool | None = None) -> None:
        show_open_figures()


class FigureCanvas(FigureCanvasAgg):
    manager_class = FigureManager  # pyright: ignore[reportAssignmentType, reportIncompatibleMethodOverride]

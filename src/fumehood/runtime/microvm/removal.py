"""Removing what a monitor could write to: shutil.rmtree() recurses, and who took a monitor over makes directories as deep as it
likes.
"""

from __future__ import annotations

import os
from pathlib import Path

from fumehood.agent import tree


def remove(directory: Path | str) -> None:
    """After the end of all who could write there. Raises OSError."""
    for _ in tree.remove(os.fspath(directory)):
        pass

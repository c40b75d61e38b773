"""The command line: thin verbs over the client."""

from __future__ import annotations

import io
import sys


def main() -> None:
    # Guest output may hold lone surrogates (names that are not UTF-8); printing them must not raise.
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        from fumehood.cli.app import start
        from fumehood.cli.show import unread_is_fine

        code = start()
        with unread_is_fine(sys.stdout):
            sys.stdout.flush()
        sys.exit(code)
    except KeyboardInterrupt:  # while still loading, so before there is any sandbox
        sys.exit(130)

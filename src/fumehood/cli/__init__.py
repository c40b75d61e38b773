"""The command line: thin verbs over the client. Only typer is imported at start; a verb imports what it needs."""

from __future__ import annotations

import sys

import typer

from fumehood.cli import demo, doctor, run, shell

app = typer.Typer(
    name="fumehood",
    help="Runs code that an AI wrote, on a machine you own, so that nothing it does matters outside.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command(name="run", epilog=run.EPILOG)(run.run)
app.command(name="shell")(shell.shell)
app.command(name="doctor")(doctor.doctor)
app.add_typer(demo.app, name="demo")


def main() -> None:
    # Guest output may hold lone surrogates (names that are not UTF-8); printing them must not raise.
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # pyright: ignore[reportAttributeAccessIssue, reportUnknownMemberType]
    app()

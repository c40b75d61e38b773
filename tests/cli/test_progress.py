"""Long work is seen to go on where there is no terminal, too, and never among what a program reads."""

import pytest

from fumehood.cli.progress import progress

STEPS = [("fetching packages", 0, 3), ("unpacking one", 1, 3), ("unpacking two", 2, 3), ("compiling the kernel", 0, 900)]
STEPS += [("compiling the kernel", 1, 900)]


@pytest.mark.parametrize(
    ("wanted", "said"),
    [(True, ["fetching packages ...", "unpacking one ...", "compiling the kernel ..."]), (False, [])],
)
def test_without_a_terminal_each_kind_of_work_is_a_line(wanted: bool, said: list[str], capsys: pytest.CaptureFixture) -> None:
    with progress(wanted) as step:
        for each in STEPS:
            step(*each)
    out, err = capsys.readouterr()
    assert (out, err.splitlines()) == ("", said)

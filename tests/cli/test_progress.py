"""Long work is seen to go on where there is no terminal, too, and never among what a program reads."""

import pytest

from fumehood.cli import progress

STEPS = [("fetching packages", 0, 3), ("unpacking packages", 1, 3), ("unpacking packages", 2, 3), ("making it", 0, 1)]


@pytest.mark.parametrize(
    ("wanted", "again_s", "said"),
    [
        (True, 30.0, ["fetching packages ...", "unpacking packages ...", "making it ..."]),
        (True, 0.0, ["fetching packages ...", "unpacking packages ...", "unpacking packages: 2 of 3", "making it ..."]),
        (False, 0.0, []),
    ],
)
def test_without_a_terminal_each_work_is_a_line_and_long_work_says_how_far_it_is(
    wanted: bool, again_s: float, said: list[str], capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "_SAY_AGAIN_S", again_s)
    with progress.progress(wanted) as step:
        for each in STEPS:
            step(*each)
    out, err = capsys.readouterr()
    assert (out, err.splitlines()) == ("", said)

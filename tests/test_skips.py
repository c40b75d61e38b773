"""The suite's own guard: on CI a skipped test is a failed one, unless it says that it may be skipped."""

from pathlib import Path

import pytest

pytest_plugins = ("pytester",)

SKIPPING = """
import pytest
def test_runs(): pass
def test_skips(): pytest.skip("no such thing here")
@pytest.mark.may_skip("shown to be accepted")
def test_may_skip(): pytest.skip("no such thing here")
@pytest.mark.xfail(strict=True)
def test_fails_as_known(): assert False
"""


@pytest.fixture
def suite(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # two seconds of each pytest
    pytester.makeconftest((Path(__file__).parent / "conftest.py").read_text())
    pytester.makepyprojecttoml('[tool.pytest.ini_options]\nmarkers = ["root: x", "rootless: x", "data: x"]\n')
    return pytester


@pytest.mark.parametrize(("ci", "failed", "skipped"), [("true", 1, 1), ("", 0, 2)])
def test_a_skip_fails_on_ci_and_only_there(suite, monkeypatch, ci, failed, skipped):
    monkeypatch.setenv("CI", ci)
    suite.makepyfile(SKIPPING)
    result = suite.runpytest_subprocess("-p", "no:cacheprovider")
    result.assert_outcomes(passed=1, failed=failed, skipped=skipped, xfailed=1)
    assert (result.ret != 0) == (ci == "true")


def test_a_module_that_skips_itself_fails_on_ci(suite, monkeypatch):
    monkeypatch.setenv("CI", "true")
    suite.makepyfile("import pytest\npytest.importorskip('no_such_module_anywhere')\ndef test_it(): pass")
    result = suite.runpytest_subprocess("-p", "no:cacheprovider")
    assert result.ret != 0
    result.stdout.fnmatch_lines(["*CI=true: this test must run*"])


def test_the_summary_says_who_ran_and_what_was_needed(suite):
    suite.makepyfile("import pytest\n@pytest.mark.rootless\ndef test_a(): pass\ndef test_b(): pass")
    suite.runpytest_subprocess("-p", "no:cacheprovider").stdout.fnmatch_lines(["*of 2 tests*rootless: 1*"])

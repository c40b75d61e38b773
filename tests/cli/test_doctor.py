import json
import subprocess
from collections.abc import Callable

import pytest

from fumehood.cli.doctor import unmet
from fumehood.model import Enforcement, Protection

Run = Callable[..., subprocess.CompletedProcess[str]]


def test_every_protection_is_stated_with_a_fix_where_it_is_not_enforced(fumehood: Run) -> None:  # H13
    found = json.loads(fumehood("doctor", "--json").stdout)
    assert {"seccomp", "landlock", "no-new-privs"} <= {p["name"] for p in found["protections"]}
    for protection in found["protections"]:
        assert protection["state"] in ("enforced", "degraded", "off")
        assert protection["state"] == "enforced" or protection["fix"], protection


def test_the_exit_code_is_one_exactly_when_something_required_is_missing(fumehood: Run) -> None:
    done = fumehood("doctor", "--json")
    found = json.loads(done.stdout)
    assert done.returncode == (0 if found["available"] and not found["lacking"] else 1)
    assert found["host"]["kernel"]


def test_a_required_protection_that_is_degraded_or_unknown_is_unmet() -> None:
    required = frozenset({"seccomp", "memory", "unheard-of"})
    found = (Protection("seccomp", Enforcement.ENFORCED), Protection("memory", Enforcement.DEGRADED))
    assert unmet(required, found) == ["memory", "unheard-of"]
    assert unmet(frozenset({"seccomp"}), found) == []


def test_the_table_for_people_names_the_same_protections(fumehood: Run) -> None:
    names = {p["name"] for p in json.loads(fumehood("doctor", "--json").stdout)["protections"]}
    text = fumehood("doctor").stdout
    assert all(name in text for name in names)


def test_no_text_is_cut_and_each_fix_is_shown_once(fumehood: Run) -> None:
    found = json.loads(fumehood("doctor", "--json").stdout)
    text = fumehood("doctor").stdout
    assert "\u2026" not in text
    for fix in {p["fix"] for p in found["protections"]} - {""}:
        assert " ".join(text.split()).count(" ".join(fix.split())) == 1, fix


@pytest.mark.parametrize("options", [["doctor"], ["doctor", "--json"]])
def test_a_reader_that_leaves_is_told_nothing_and_gets_no_traceback(command: list[str], options: list[str]) -> None:
    running = subprocess.Popen([*command, *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert running.stdout is not None and running.stderr is not None
    running.stdout.close()
    with running.stderr:
        assert (running.stderr.read(), running.wait(60)) == (b"", 141)

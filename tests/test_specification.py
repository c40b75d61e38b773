"""Every promise of SPECIFICATION.md names tests that exist, or says that it is pending."""

import re
from pathlib import Path

ROOT = Path(__file__).parent
TEXT = (ROOT.parent / "SPECIFICATION.md").read_text()


def test_every_test_that_the_specification_names_exists() -> None:
    named = re.findall(r"`([\w/]+\.py)(?:::(\w+))?`", TEXT)
    assert len(named) > 40
    missing = [f"{file}::{test}" for file, test in named if f"def {test}" not in (ROOT / file).read_text()]
    assert not missing


def test_every_promise_has_a_test_or_is_pending() -> None:
    rows = [line for line in TEXT.splitlines() if line.startswith("| ") and not line.startswith("| promise")]
    assert len(rows) > 25 and not [row for row in rows if ".py" not in row and "*pending*" not in row]

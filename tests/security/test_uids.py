"""What only root can give: a host uid of its own for each sandbox."""

from pathlib import Path

import pytest
from attack import INSIDE, native, opened, pid_of, processes, template, words

from fumehood import Sandbox
from fumehood.model import Mount

pytestmark = pytest.mark.root


def test_distinct_uids_alone_keep_a_private_file_of_one_sandbox_from_another(shared: Path) -> None:
    """H24: both may write the same directory; the second is then given the uid of the first."""
    secret = f"{INSIDE}/secret"
    make, attack = f"write('{secret}'); os.chmod('{secret}', 0o600); print('made')", f"attempt(read, '{secret}')"
    uids = native()._uids
    assert uids is not None
    with template("uids", Mount(str(shared), INSIDE, writable=True)) as t, opened(("landlock",), template=t) as a:
        assert words(a, make) == ["made"]
        owner = (shared / "secret").stat().st_uid
        assert owner != 0
        with opened(("landlock",), template=t) as b:
            assert words(b, attack) == ["EACCES"]
        uids._free.appendleft(owner)
        try:
            with opened(("landlock",), template=t) as b:
                assert words(b, attack) == ["through"]
        finally:
            uids._free.remove(owner)


def test_each_sandbox_runs_as_a_host_user_that_is_nobody_elses() -> None:
    """H24: not root's, not its zygote's, not its neighbour's; and none of them has an account."""
    with Sandbox(tier="native") as a, Sandbox(tier="native") as b:
        mine = [processes()[pid_of(box)] for box in (a, b)]
        uids = native()._uids
        assert uids is not None and len({*mine, uids.zygote_uid, 0}) == 4
        assert min(mine) >= 1 << 20

"""What machines of one snapshot share: nothing of the host's, of their users, or of each other (H20, H24)."""

from __future__ import annotations

import json
import mmap
import sys
from pathlib import Path
from typing import Any

import pytest
from hostile import LIMITS

from fumehood import Sandbox

pytestmark = [pytest.mark.microvm, pytest.mark.root]
HOSTS_OWN = {"boot_id": "/proc/sys/kernel/random/boot_id", "machine-id": "/etc/machine-id", "hostname": "/etc/hostname"}
# What two machines must never agree on, and what one has left where the other would see it.
IDS = """
import json, os, pathlib, random, secrets, socket, ssl, tempfile, uuid
read = lambda path: pathlib.Path(path).read_text().strip()
places = [f"{place}/left" for place in ("/tmp", "/dev/shm", "/home/user")]
found = [place for place in places if os.path.exists(place)]
for place in places: open(place, "w").close()
print(json.dumps({
    "found": found, "secrets": [name for name in os.environ if name.startswith("SECRET")],
    "urandom": os.urandom(16).hex(), "secret": secrets.token_hex(16), "uuid4": str(uuid.uuid4()), "random": random.random(),
    "openssl": ssl.RAND_bytes(8).hex(), "name": tempfile.mktemp(), "uuid": read("/proc/sys/kernel/random/uuid"),
    "boot_id": read("/proc/sys/kernel/random/boot_id"), "machine-id": read("/etc/machine-id"), "hostname": socket.gethostname(),
}))
"""


def test_a_golden_snapshot_holds_no_word_of_the_host(box: Sandbox) -> None:
    """H7, H23: each machine's memory begins as a copy of it."""
    boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    origin = box.live.handle.origin.directory  # pyright: ignore
    secrets = [boot_id, str(Path.cwd()), str(origin), sys.prefix]
    with (origin / "memory").open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as memory:
        assert memory.find(b"/opt/fumehood") > 0, "what it does hold is found"
        assert [s for s in secrets if memory.find(s.encode()) >= 0] == []


def test_two_machines_of_one_golden_snapshot_share_no_file_number_id_or_variable(tier: str) -> None:
    """H20, H24"""
    said: list[dict[str, Any]] = []
    for name in ("one", "two"):
        with Sandbox(tier=tier, url="", limits=LIMITS, env={f"SECRET_{name}": name}) as box:
            said.append(json.loads(box.run(IDS).stdout))
            assert said[-1].pop("found") == [] and said[-1].pop("secrets") == [f"SECRET_{name}"]
    own = {name: Path(path).read_text().strip() for name, path in HOSTS_OWN.items() if Path(path).exists()}
    shared = {name for name in said[0] if said[0][name] == said[1][name] or own.get(name) in (said[0][name], said[1][name])}
    assert not shared, (shared, said)


def test_forks_share_no_number_of_generators_that_have_run_before(box: Sandbox) -> None:
    """H20: OpenSSL's own, that of temporary names, and those of `random`."""
    code = (
        "import json, random, ssl, tempfile\nprint(json.dumps([ssl.RAND_bytes(8).hex(), tempfile.mktemp(), random.random()]))"
    )
    box.run(code)
    (fork,) = box.fork(1)
    with fork:
        said = [json.loads(each.run(code).stdout) for each in (box, fork)]
    assert not set(said[0]) & set(said[1])

"""The zygote's heap in a memfd: same bytes, same copy-on-write, cheaper forks."""

import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.rootless

_PROGRAM = """
import gc, hashlib, os, random
from fumehood.runtime.native import heap
keep = {i: random.randbytes(200) for i in range(100_000)}
def digest(): return hashlib.sha256(b"".join(keep.values())).hexdigest()
before = digest()
moved = heap.move_to_memfd()
anonymous = next(int(l.split()[1]) for l in open("/proc/self/smaps_rollup") if l.startswith("Anonymous"))
assert anonymous < 8_000, anonymous
assert moved > 20_000_000, moved
assert digest() == before
for _ in range(20):
    pid = os.fork()
    if pid == 0:
        assert digest() == before
        for i in keep: keep[i] = b"child"
        gc.collect()
        os._exit(0 if digest() != before else 1)
    assert os.waitpid(pid, 0)[1] == 0
    assert digest() == before, "a child's write reached its parent"
grown = [bytes(1000) for _ in range(50_000)]
del grown
gc.collect()
assert digest() == before
print("whole")
"""


def test_moving_keeps_every_byte_and_forks_stay_private() -> None:
    done = subprocess.run([sys.executable, "-c", _PROGRAM], capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.returncode) == ("whole\n", 0), done.stderr


def test_a_process_with_threads_is_refused() -> None:
    program = (
        "import threading\nfrom fumehood.runtime.native import heap\nstop = threading.Event()\n"
        "t = threading.Thread(target=stop.wait)\nt.start()\n"
        "try: heap.move_to_memfd()\nexcept OSError as e: print(e)\nfinally: stop.set()"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert "threads" in done.stdout, done.stderr


def test_no_page_stays_both_writable_and_executable() -> None:
    program = (
        "from fumehood.runtime.native import heap\nheap.move_to_memfd()\n"
        "print([l for l in open('/proc/self/maps') if l.split()[1].startswith('rwx')])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.stdout == "[]\n", done.stderr + str(os.uname())

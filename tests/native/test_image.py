"""A template from an unpacked image directory: the image's own Python, and nothing of the host."""

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from fumehood import Sandbox
from fumehood.errors import SetupFailed
from fumehood.model import Mount, Template

pytestmark = pytest.mark.rootless
_PROGRAMS = ("/usr/bin/python3", "/bin/bash", "/bin/ls", "/bin/cat")


def _copy(source: str, image: Path) -> None:
    target = image / source.lstrip("/")
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy2(source, target)


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Debian's Python and a shell with just the libraries they link to, merged-usr links as in a real image."""
    root = tmp_path_factory.mktemp("image")
    real = Path("/usr/bin/python3").resolve()
    for link in ("bin", "lib", "lib64"):
        (root / link).symlink_to(f"usr/{link}")
    extensions = [str(p) for p in Path(f"/usr/lib/{real.name}/lib-dynload").glob("*.so")]
    for program in (*_PROGRAMS, str(real)):
        _copy("/usr" + program if program.startswith("/bin/") else program, root)
    for line in subprocess.check_output(["ldd", *_PROGRAMS, str(real), *extensions], text=True).splitlines():
        if path := next((word for word in line.split() if word.startswith("/lib")), ""):
            _copy("/usr" + path, root)
    shutil.copytree(
        f"/usr/lib/{real.name}", root / "usr/lib" / real.name, symlinks=True, ignore=shutil.ignore_patterns("test*")
    )
    (root / "etc").mkdir()
    (root / "etc/image-marker").write_text("of the image")
    yield root


def test_code_runs_on_the_images_python_and_sees_the_image_only(image: Path) -> None:
    with Sandbox(template=Template("image", root=str(image))) as box:
        assert box.run("21 * 2").text == "42"
        assert box.files.read("/etc/image-marker") == b"of the image"
        assert not box.files.exists("/usr/share") and not box.files.exists("/etc/passwd-")
        assert box.run("import sys; sys.prefix").text == "'/usr'"
        assert box.exec(["/bin/ls", "/root"]).stdout == ""


def test_the_image_is_read_only(image: Path) -> None:
    with Sandbox(template=Template("image", root=str(image))) as box:
        assert "Read-only" in box.exec("echo x > /etc/image-marker").stderr
    assert (image / "etc/image-marker").read_text() == "of the image"


def test_a_link_that_leads_out_of_the_image_stays_inside(image: Path) -> None:
    (image / "opt").symlink_to("/etc")
    try:
        with Sandbox(template=Template("image-link", root=str(image))) as box:
            assert box.run("import os; sorted(os.listdir('/opt'))").text == "['image-marker']"
    finally:
        (image / "opt").unlink()


def test_an_image_without_python_says_so(tmp_path: Path) -> None:
    (tmp_path / "usr").mkdir()
    with pytest.raises(SetupFailed, match="no Python 3"), Sandbox(template=Template("empty", root=str(tmp_path))):
        pass


def test_what_the_template_shows_below_a_writable_directory_stays_visible_and_read_only(tmp_path: Path) -> None:
    """A virtual environment may well lie below /tmp or /home/user."""
    tmp_path.chmod(0o755)  # the sandbox is another uid than root
    (tmp_path / "file").write_text("host's")
    mounts = tuple(Mount(str(tmp_path), target) for target in ("/tmp/a/b", "/home/user/c"))
    with Sandbox(template=Template("below", mounts=mounts)) as box:
        for m in mounts:
            assert box.files.read(f"{m.target}/file") == b"host's"
            assert "Read-only" in box.exec(f"echo x > {m.target}/file").stderr
        box.files.write("/tmp/own", "x")
        box.files.write("own", "x")
    assert (tmp_path / "file").read_text() == "host's"

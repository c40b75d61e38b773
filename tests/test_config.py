"""Where settings come from, which wins, and that a planted directory or a writable file is refused."""

import os
import shutil
import tempfile
from pathlib import Path

import pytest

from fumehood.config import Config
from fumehood.errors import InvalidInput

pytestmark = pytest.mark.rootless  # root and an ordinary user have different directories


@pytest.fixture
def environ(tmp_path: Path) -> dict[str, str]:
    return {
        "HOME": str(tmp_path),
        "XDG_RUNTIME_DIR": str(tmp_path / "run"),
        "FUMEHOOD_STATE_DIR": str(tmp_path / "state"),
        "FUMEHOOD_RUN_DIR": str(tmp_path / "runtime"),
    }


def write(tmp_path: Path, text: str, mode: int = 0o600) -> None:
    path = tmp_path / ".config/fumehood/config.toml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(mode)


def test_nothing_said_gives_the_defaults_and_closed_directories(environ, tmp_path):
    config = Config.load(environ)
    assert (config.tier, config.uid_base, config.uid_count_per_supervisor) == ("auto", 200_000_000, 1024)
    assert (config.cgroup_parent, config.default_policy) == ("fumehood", "default")
    for directory in (config.state_dir, config.run_dir):
        assert directory.is_relative_to(tmp_path) and directory.stat().st_mode & 0o777 == 0o700


def test_environment_beats_file_beats_default(environ, tmp_path):
    write(tmp_path, 'tier = "native"\nagent_timeout_s = 9\nuid_base = 300000000\n')
    config = Config.load({**environ, "FUMEHOOD_TIER": "fake", "FUMEHOOD_ZYGOTE_START_TIMEOUT_S": "2.5"})
    assert (config.tier, config.agent_timeout_s, config.uid_base) == ("fake", 9.0, 300_000_000)
    assert config.zygote_start_timeout_s == 2.5


def test_an_ordinary_user_gets_places_of_their_own(tmp_path):
    if os.geteuid() == 0:
        uid, places = 0, (Path("/var/lib/fumehood"), Path("/run/fumehood"))
    else:
        uid, places = os.geteuid(), (tmp_path / ".local/state/fumehood", tmp_path / "run/fumehood")
    config = Config.load({"HOME": str(tmp_path), "XDG_RUNTIME_DIR": str(tmp_path / "run")}, uid=uid)
    assert (config.state_dir, config.run_dir) == places


@pytest.mark.root
def test_without_a_session_directory_a_user_gets_one_in_tmp_named_by_uid():
    home, uid = tempfile.mkdtemp(), 1_954_321
    os.chown(home, uid, uid)
    if (child := os.fork()) == 0:
        os.setresuid(uid, uid, uid)
        config = Config.load({"HOME": home})
        expected = (Path(f"/tmp/fumehood-{uid}"), Path(home, ".local/state/fumehood"))
        os._exit(0 if (config.run_dir, config.state_dir) == expected else 1)
    try:
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    finally:
        shutil.rmtree(home)
        Path(f"/tmp/fumehood-{uid}").rmdir()


@pytest.mark.parametrize(
    ("variable", "said"),
    [
        ({"FUMEHOOD_TEIR": "native"}, "use 'tier'"),
        ({"FUMEHOOD_TIER": "natve"}, "one of auto, native"),
        ({"FUMEHOOD_UID_BASE": "0"}, "uid_base"),
        ({"FUMEHOOD_UID_BASE": "1e9"}, "whole number"),
        ({"FUMEHOOD_AGENT_TIMEOUT_S": "nan"}, "agent_timeout_s"),
        ({"FUMEHOOD_CGROUP_PARENT": "../x"}, "cgroup_parent"),
        ({"FUMEHOOD_RUN_DIR": "relative"}, "absolute path"),
        ({"FUMEHOOD_CONFIG": "/nowhere.toml"}, "no such file"),
        ({"FUMEHOOD_DEFAULT_POLICY": ""}, "default_policy"),
    ],
)
def test_a_wrong_variable_is_refused_with_a_way_out(environ, variable, said):
    with pytest.raises(InvalidInput) as e:
        Config.load({**environ, **variable})
    assert said in f"{e.value} {e.value.remediation}"


@pytest.mark.parametrize(
    ("text", "said"),
    [("teir = 1", "use 'tier'"), ("tier = 1", "text"), ("uid_base = true", "whole number"), ("tier = [", "config.toml")],
)
def test_a_wrong_file_is_refused_naming_it(environ, tmp_path, text, said):
    write(tmp_path, text)
    with pytest.raises(InvalidInput) as e:
        Config.load(environ)
    assert "config.toml" in str(e.value) and said in f"{e.value} {e.value.remediation}"


def test_a_config_file_that_others_can_write_is_refused(environ, tmp_path):
    write(tmp_path, 'tier = "fake"', 0o666)
    with pytest.raises(InvalidInput, match="others may write it"):
        Config.load(environ)


@pytest.mark.parametrize("plant", ["symlink", "file", "open"])
def test_a_planted_run_directory_is_refused_h12(environ, tmp_path, plant):
    place = Path(environ["FUMEHOOD_RUN_DIR"])
    if plant == "symlink":
        (tmp_path / "elsewhere").mkdir(mode=0o700)
        place.symlink_to(tmp_path / "elsewhere")
    elif plant == "file":
        place.write_text("")
    else:
        place.mkdir(mode=0o755)
    with pytest.raises(InvalidInput, match=str(place)):
        Config.load(environ)


def test_a_config_cannot_be_changed(environ):
    with pytest.raises(AttributeError):
        Config.load(environ).tier = "fake"  # type: ignore[misc]

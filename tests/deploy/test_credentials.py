"""A key reaches the server as a file of systemd's, and by no other way."""

from __future__ import annotations

from pathlib import Path

import pytest

from fumehood.config import Config
from fumehood.errors import InvalidInput

pytestmark = pytest.mark.rootless
KEY = "k" * 40


def load(tmp_path: Path, **more: str) -> Config:
    directories = {"FUMEHOOD_STATE_DIR": str(tmp_path / "state"), "FUMEHOOD_RUN_DIR": str(tmp_path / "run")}
    return Config.load({"HOME": str(tmp_path), "CREDENTIALS_DIRECTORY": str(tmp_path / "credentials"), **directories, **more})


@pytest.fixture
def credentials(tmp_path: Path) -> Path:
    (tmp_path / "credentials").mkdir()
    return tmp_path / "credentials"


def test_a_credential_is_a_setting_without_the_files_newline(credentials: Path, tmp_path: Path) -> None:
    (credentials / "fumehood.server_key").write_text(KEY + "\n")
    (credentials / "fumehood.queue_limit").write_text("7\n")
    (credentials / "another-program").write_text("not ours")
    config = load(tmp_path)
    assert (config.server_key, config.queue_limit) == (KEY, 7)


def test_a_credential_beats_the_file_and_the_environment_beats_both(credentials: Path, tmp_path: Path) -> None:
    (credentials / "fumehood.queue_limit").write_text("7")
    (tmp_path / "config.toml").write_text("queue_limit = 5\ngrace_s = 3\n")
    named = {"FUMEHOOD_CONFIG": str(tmp_path / "config.toml")}
    assert (load(tmp_path, **named).queue_limit, load(tmp_path, **named).grace_s) == (7, 3)
    assert load(tmp_path, **named, FUMEHOOD_QUEUE_LIMIT="9").queue_limit == 9


def test_a_mistyped_credential_is_refused_like_any_other_setting_h13(credentials: Path, tmp_path: Path) -> None:
    (credentials / "fumehood.serverkey").write_text(KEY)
    with pytest.raises(InvalidInput, match="unknown setting") as refused:
        load(tmp_path)
    assert "server_key" in refused.value.remediation


def test_no_credentials_are_no_error(tmp_path: Path) -> None:
    assert load(tmp_path).server_key == ""  # the directory does not exist


def test_an_unreadable_credential_is_said_and_not_taken_for_none(credentials: Path, tmp_path: Path) -> None:
    (credentials / "fumehood.server_key").mkdir()
    with pytest.raises(InvalidInput, match="credentials"):
        load(tmp_path)

"""config.py: precedence, bounds, and one clear line for what is wrong."""

import pytest

from cascadefs import config
from cascadefs.errors import ConfigError


def test_flag_beats_environment_beats_file_beats_default(tmp_path):
    file = tmp_path / "c.toml"
    file.write_text('shm_size = "1GiB"\nsync = "close"\nseal_delay = 2\n')
    found = config.load({"shm_size": "3GiB"}, {"CASCADEFS_SHM_SIZE": "2GiB", "CASCADEFS_SYNC": "fsync"}, file)
    assert (found.settings.shm_size, found.origins["shm_size"]) == (3 << 30, "flag")
    assert (found.settings.sync, found.origins["sync"]) == ("fsync", "environment")
    assert (found.settings.seal_delay, found.origins["seal_delay"]) == (2.0, "file")
    assert found.origins["extent_size"] == "default"


@pytest.mark.parametrize(
    ("flags", "word"),
    [({"shm_size": "plenty"}, "not understood"), ({"shm_size": "1KiB"}, "out of bounds"), ({"sync": "never"}, "fsync"),
     ({"passthrough": "perhaps"}, "true or false"), ({"seal_delay": "-1"}, "out of bounds"), ({"seal": "never"}, "flush"),
     ({"log": "loud"}, "warning")],
)  # fmt: skip
def test_an_impossible_value_is_one_line(flags, word):
    with pytest.raises(ConfigError) as e:
        config.load(flags, {}, None)
    assert word in str(e.value) and "\n" not in str(e.value)


def test_unknown_names_are_refused(tmp_path):
    file = tmp_path / "c.toml"
    file.write_text("shm_sise = 3\n")
    with pytest.raises(ConfigError, match="shm_sise"):
        config.load({}, {}, file)


def test_unknown_variables_are_said_and_ignored():
    injected = {"CASCADEFS_PORT": "tcp://10.0.0.1:80", "CASCADEFS_SERVICE_HOST": "10.0.0.1"}
    found = config.load({}, {"CASCADEFS_STOER": "x", "CASCADEFS_SHM_SIZE": "1GiB"} | injected, None)
    assert found.settings.shm_size == 1 << 30 and found.origins["store"] == "default"
    assert [note.split()[0] for note in found.notes] == ["CASCADEFS_PORT", "CASCADEFS_SERVICE_HOST", "CASCADEFS_STOER"]
    assert found.notes[2].endswith("did you mean CASCADEFS_STORE?")


def test_a_broken_or_missing_file_is_said(tmp_path):
    (tmp_path / "bad.toml").write_text("= =")
    (tmp_path / "latin.toml").write_bytes(b'store = "/caf\xe9"')
    for name, word in (("bad.toml", "TOML"), ("latin.toml", "TOML"), ("none.toml", "cannot read")):
        with pytest.raises(ConfigError, match=word):
            config.load({}, {}, tmp_path / name)


def test_folders_are_the_callers(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/somebody")
    file = tmp_path / "c.toml"
    file.write_text('shm_dir = "~/shm"\n')
    for flags, environ in (({"store": "a/../kv"}, {}), ({}, {"CASCADEFS_STORE": "kv"})):
        found = config.load(flags, environ, file).settings
        assert (str(found.store), str(found.shm_dir)) == (str(tmp_path / "kv"), "/home/somebody/shm")
    monkeypatch.chdir("/")
    assert str(found.store) == str(tmp_path / "kv")
    assert config.load({}, {"CASCADEFS_CONFIG": str(file)}, None).origins["shm_dir"] == "file"
    for wrong in ("", "~nobody-of-this-name/x"):
        with pytest.raises(ConfigError, match="write"):
            config.load({"store": wrong}, {}, None)


def test_links_are_followed_before_what_comes_behind_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "real/deep").mkdir(parents=True)
    (tmp_path / "link").symlink_to("real/deep")
    for typed, meant in (("link", "real/deep"), ("link/../x", "real/x"), ("link/x", "real/deep/x")):
        assert config.load({"store": typed}, {}, None).settings.store == tmp_path.resolve() / meant


def test_a_relative_folder_without_a_working_folder_is_said(tmp_path, monkeypatch):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    with pytest.raises(ConfigError, match="absolute"):
        config.load({"store": "kv"}, {}, None)

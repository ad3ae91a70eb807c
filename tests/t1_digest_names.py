"""Which names in a folder are digests of regular files; what is anything else is told by its name."""

import os

import pytest

from cascadefs.ext.digest_names import listed


def test_only_regular_files_with_a_digest_for_a_name_are_digests(tmp_path):
    digests = [os.urandom(16) for _ in range(300)] + [bytes(16), b"\xff" * 16]
    for digest in digests:
        (tmp_path / digest.hex()).touch()
    others = ["a" * 31, "a" * 33, "A" * 32, "g" * 32, "a" * 32 + ".new", "a" * 31 + " ", "\udcff" * 32]
    for name in others:
        (tmp_path / name).touch()
    (tmp_path / ("d" * 32)).mkdir()
    (tmp_path / ("e" * 32)).symlink_to(tmp_path / bytes(16).hex())
    os.mkfifo(tmp_path / ("f" * 32 + "f"))
    found, told = listed(str(tmp_path))
    assert found == dict.fromkeys(digests, 0)
    assert sorted(told) == sorted([*others, "d" * 32, "e" * 32, "f" * 33])


def test_what_cannot_be_listed_says_why(tmp_path):
    assert listed(str(tmp_path)) == ({}, [])
    with pytest.raises(FileNotFoundError, match="missing"):
        listed(str(tmp_path / "missing"))
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError):
        listed(str(tmp_path / "file"))

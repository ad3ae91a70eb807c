"""options.py: what mount(8) and /etc/fstab may say, and what they are told when it means nothing."""

import pytest

from cascadefs.errors import UserError
from cascadefs.mount.options import FLAGS, parse, parse_helper


@pytest.mark.parametrize(
    ("given", "flags"),
    [
        ("defaults", ()),
        ("rw,nofail,relatime,x-systemd.automount,X-mount.mkdir,comment=mine,_netdev,noauto,user=me", ("relatime",)),
        ("ro,noexec,nosuid,nodev,users", ("ro", "noexec", "nosuid", "nodev")),
        ("ro,rw", ()),
        ("rw,ro", ("ro",)),
        ("strictatime,lazytime,norelatime,sync,async", ("strictatime", "lazytime")),
        ("remount,ro", ("remount", "ro")),
        ("rw,remount,user_id=0,group_id=0", ("remount",)),
        (",,ro,", ("ro",)),
    ],
)
def test_words_of_mount(given, flags):
    found = parse([given])
    assert found.flags == flags and found.data == () and found.settings == {}
    assert found.mask == sum(FLAGS[name] for name in flags)


def test_settings_and_words_for_the_kernel():
    found = parse(["shm_size=64MiB,allow_other", 'sync=close,store="/a,b",max_read=4096,nofail'])
    assert found.settings == {"shm_size": "64MiB", "sync": "close", "store": "/a,b"}
    assert found.words == ("allow_other", "max_read=4096") and found.fails_softly
    assert parse(found.words).words == found.words


@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("rowdy", "rowdy"),
        ("shmsize=1G", "shm_size"),
        ("noatimes", "noatime"),
        ("shm_size", "shm_size="),
        ("ro=1", "did you mean ro"),
    ],
)
def test_an_unknown_word_is_one_line(word, told):
    with pytest.raises(UserError, match=told) as refused:
        parse([f"ro,{word}"])
    assert "\n" not in str(refused.value)
    assert parse([f"ro,{word}"], sloppy=True).flags == ("ro",)


def test_what_mount_hands_its_helper():
    found = parse_helper(["/s", "/m", "-sfn", "-o", "ro,noexec", "-t", "fuse.cascadefs", "-v", "-onodev"])
    assert (found.store, found.mountpoint, found.options) == ("/s", "/m", ("ro,noexec", "nodev"))
    assert found.sloppy and found.fake
    assert parse_helper(["-w", "/s", "/m"]).options == ("rw",)
    assert parse_helper(["/s", "-r", "/m"]).options == ("ro",)
    for words in (["/s"], ["/s", "/m", "x"], ["/s", "/m", "-o"], ["/s", "/m", "-Q"], ["/s", "/m", "-N", "/proc/1/ns/mnt"]):
        with pytest.raises(UserError):
            parse_helper(words)

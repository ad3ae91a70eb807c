"""A memory tier is used by the copy of the store that it belongs to, and by nobody else."""

import json
import os
import shutil

import pytest

from cascadefs.tiers import owner
from cascadefs.tiers.owner import Claim

ID = "0123456789abcdef" * 2


@pytest.fixture
def places(tmp_path):
    """(a store's folder, a folder for tiers)."""
    for name in ("store", "shm"):
        (tmp_path / name).mkdir()
    return tmp_path / "store", tmp_path / "shm"


def opened(store, shm):
    """The folder of the tier, after an opening that was killed."""
    claim = Claim(store, shm, ID)
    claim.announce()
    claim.sign(claim.folder)
    claim.hold(claim.folder)
    (claim.folder / "staged").mkdir(exist_ok=True)
    (claim.folder / "staged/1").write_text(store.name)
    claim.close()
    return claim.folder


def copy_of(store, name):
    return shutil.copytree(store, store.parent / name)


def test_a_store_finds_its_tier_again_and_after_a_move(places):
    store, shm = places
    tier = opened(store, shm)
    assert tier == owner.first_choice(shm, ID) and opened(store, shm) == tier
    moved = store.rename(store.parent / "moved")
    assert opened(moved, shm) == tier == owner.tier_of(moved, shm, ID)


def test_a_copy_gets_a_tier_of_its_own_and_says_so(places):
    store, shm = places
    tier = opened(store, shm)
    copy = copy_of(store, "copy")
    assert owner.tier_of(copy, shm, ID) is None
    claim = Claim(copy, shm, ID)
    assert claim.folder != tier and len(claim.notes) == 1 and str(tier) in claim.notes[0]
    assert opened(copy, shm) != tier
    assert (tier / "staged/1").read_text() == "store" and opened(store, shm) == tier
    assert owner.read_memory(store).copy_id != owner.read_memory(copy).copy_id


def test_a_copy_that_comes_first_leaves_the_name_to_nobody(places):
    store, shm = places
    shutil.rmtree(opened(store, shm))
    copy = copy_of(store, "copy")
    first = opened(copy, shm)
    assert opened(store, shm) != first and (first / "staged/1").read_text() == "copy"


def test_an_older_state_that_was_put_back_does_not_fit(places):
    store, shm = places
    opened(store, shm)
    before = (store / owner.MEMORY).read_bytes()
    tier = opened(store, shm)
    (store / owner.MEMORY).write_bytes(before)
    claim = Claim(store, shm, ID)
    assert claim.folder != tier and "left alone" in claim.notes[0]


@pytest.mark.parametrize("signed", [False, True])
def test_a_crash_while_a_store_is_opened_loses_no_tier(places, signed):
    store, shm = places
    tier = opened(store, shm)
    claim = Claim(store, shm, ID)
    claim.announce()
    if signed:
        claim.sign(tier)
    assert opened(store, shm) == tier and (tier / "staged/1").exists()


def test_the_tier_is_found_in_another_folder_than_the_setting_says(places, tmp_path):
    store, shm = places
    tier = opened(store, shm)
    (tmp_path / "other").mkdir()
    claim = Claim(store, tmp_path / "other", ID)
    assert claim.folder == tier and claim.is_elsewhere
    claim.begin_anew()
    assert claim.folder.parent == tmp_path / "other"


def test_a_tier_of_a_version_without_records_is_taken(places):
    store, shm = places
    tier = owner.first_choice(shm, ID)
    (tier / "staged").mkdir(parents=True)
    (tier / "staged/1").write_text("of old")
    assert opened(store, shm) == tier
    copy = copy_of(store, "copy")
    (copy / owner.MEMORY).unlink()  # a copy made before; the tier has an owner by now
    assert opened(copy, shm) != tier


@pytest.mark.parametrize("junk", [b"", b"\xff", b"[]", b'{"store": 1}', b"null"])
def test_a_record_that_makes_no_sense_is_nobodys(places, junk):
    store, shm = places
    tier = opened(store, shm)
    tier.joinpath(*owner.RECORD).write_bytes(junk)
    assert owner.read_owner(tier) is None and opened(store, shm) != tier
    (store / owner.MEMORY).write_bytes(junk)
    assert owner.read_memory(store) is None and opened(store, shm) != tier


def test_a_field_that_makes_no_sense_is_nobodys(places):
    store, shm = places
    tier = opened(store, shm)
    for path, read in ((tier.joinpath(*owner.RECORD), owner.read_owner), (store / owner.MEMORY, owner.read_memory)):
        good = path.read_text()
        for name in json.loads(good):
            for wrong in ([], {"a": 1}):
                path.write_text(json.dumps(json.loads(good) | {name: wrong}))
                assert read(path.parent.parent if path.name == "record" else store) is None, (path.name, name)
        path.write_text(good)
    assert opened(store, shm) == tier


def test_a_tier_in_use_is_not_locked_by_who_would_drop_it(places):
    claim = Claim(*places, ID)
    claim.announce()
    claim.sign(claim.folder)
    claim.hold(claim.folder)
    assert owner.lock(claim.folder, alone=True) is None
    second = owner.lock(claim.folder, alone=False)  # as the keeper has it, beside each worker
    claim.close()
    assert owner.lock(claim.folder, alone=True) is None
    os.close(second)
    os.close(owner.lock(claim.folder, alone=True))


def test_a_name_of_somebody_elses_is_not_taken(places):
    store, shm = places
    folder = owner.first_choice(shm, ID)
    folder.symlink_to(store)
    assert opened(store, shm) != folder and not (store / "staged").exists()


def test_records_are_json_with_the_keys_of_the_format(places):
    store, shm = places
    tier = opened(store, shm)
    told = json.loads(tier.joinpath(*owner.RECORD).read_text())
    assert told["inode"] == store.stat().st_ino and told["store"] == str(store) and not told["is_durable"]
    assert json.loads((store / owner.MEMORY).read_text())["folder"] == str(tier)

"""Power loss: a store opens in every state that a crash can leave, and shows what was promised.

TORTURE=1: more than 10,000 states."""

import json
import os
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests import faults
from tests.faults.recorder import MUTANTS

LONG = bool(os.environ.get("TORTURE"))
SEEDS, STATES = (range(14), 800) if LONG else (range(2), 200)
WANTED = 10_000 if LONG else 400
MUTANT_SEEDS, MUTANT_STATES = range(8), 400  # nearly every one of them shows each mutant
LIMIT_S = 1800 if LONG else 280  # watchdogs
pytestmark = pytest.mark.timeout(LIMIT_S + 20)
# A recording that does not do all of this proves nothing about it.
MUST_DO = {
    *("CREATE extents/", "WRITE extents/", "TRUNCATE extents/", "SYNC extents/", "PUNCH extents/", "UNLINK extents/"),
    *("CREATE patches/", "WRITE patches/", "SYNC patches/", "UNLINK patches/"),
    *("WRITE parking/staged/", "LINK parking/objects/", "UNLINK parking/objects/", "WRITE parking/boot"),
    *("WRITE index.db-wal", "SYNC index.db-wal", "UNLINK index.db-wal", "WRITE index.db", "SYNC index.db"),
    *("WRITE index.sums", "SYNC index.sums", "RENAME index.sums"),
    *("WRITE store.", "SYNC store.", "RENAME store.", "MKDIR folder", "SYNC folder"),
}


def explored(in_memory, shim, seed, states, mutant="none"):
    env = {k: v for k, v in os.environ.items() if not k.startswith("CASCADEFS_")}
    text = faults.run("power", in_memory / f"{mutant}-{seed}", shim, seed, states, mutant, env=env, limit_s=LIMIT_S)
    return json.loads(text)


def test_every_state_that_a_crash_can_leave_is_intact_older_or_absent(in_memory, shim, capsys):
    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(lambda seed: explored(in_memory, shim, seed, STATES), SEEDS))
    states, older = (sum(result[key] for result in results) for key in ("states", "fallen_back"))
    with capsys.disabled():
        print(f"\n{states} states after a loss of power opened, {older} files fell back to an older version")
    assert [complaint for result in results for complaint in result["complaints"]] == []
    assert states >= WANTED and older > 0 and sum(result["rebuilt"] for result in results) >= WANTED // 8
    assert set().union(*(result["did"] for result in results)) >= MUST_DO


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_wrong_order_of_writing_is_caught(in_memory, shim, mutant):
    for seed in MUTANT_SEEDS:
        if explored(in_memory, shim, seed, MUTANT_STATES, mutant)["complaints"]:
            return
    raise AssertionError(f"no state showed that {mutant} is wrong")

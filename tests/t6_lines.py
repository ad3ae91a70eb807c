"""Each `bench` command once, small, as a user would run it: it measures all its lines, writes JSON, leaves nothing."""

import json

import pytest

from tests.conftest import cascadefs, need_root_and_fuse

COMMANDS = {
    "ops": ("ops", "--quick", "--names", "50"),
    "fresh": ("ops", "--fresh", "--quick"),
    "cold": ("cold", "--quick"),
    "hashing": ("hashing", "--quick"),
    "portable": ("portable", "--quick"),
    "growth": ("growth", "--up-to", "300"),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_measures_all_its_lines(tmp_path, name):
    need_root_and_fuse()
    stores = tmp_path / "stores"
    stores.mkdir()
    done = cascadefs("bench", *COMMANDS[name], "--json", tmp_path / "out.json", "--store", stores)
    assert done.returncode == 0, done.stdout + done.stderr
    document = json.loads((tmp_path / "out.json").read_text())
    assert document["machine"]["cores"] and document["machine"]["round_trip"]["one_core_us"] > 0 and document["method"]
    measured = [line for line in document["lines"] if line["figure"] is not None]
    assert measured and all(line["met"] in (True, False) or line["reference_figure"] is None for line in measured)
    without_example = [line for line in document["lines"] if "pyfuse3" not in (line["reference"] or "")]
    assert all(line["met"] is not None for line in without_example)
    assert "left behind" not in done.stdout and "FAILED" not in done.stdout
    assert list(stores.iterdir()) == []

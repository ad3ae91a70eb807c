"""bench compare: every system keeps the contract, wrong data is never a figure, and the arithmetic of rows is right."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from contextlib import nullcontext, suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from conftest import CASCADEFS, need_root_and_fuse

import cascadefs.bench.compare
from cascadefs.bench.cli.compare_cli import bench_compare
from cascadefs.bench.compare import host, kv, plots, presets, rows, runner, show
from cascadefs.bench.compare.adapter import Safety, Service, Shape, all_systems, drop_page_cache
from cascadefs.bench.compare.systems import pdc
from cascadefs.bench.compare.systems.memcpy import Memcpy
from cascadefs.bench.targets import default_setup
from cascadefs.errors import UserError

CONTRACT_S = 120
SMALL = Shape(ranks=2, tokens=1, blocks=4, duplicates=0.5)


def keeps_the_contract(*words):
    command = [sys.executable, Path(__file__).with_name("contract.py"), *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=CONTRACT_S, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", list(all_systems()))
def test_contract(name, tmp_path):
    if reason := all_systems()[name].missing():
        pytest.skip(reason)
    if name.startswith("cascadefs"):
        need_root_and_fuse()
    keeps_the_contract(name, tmp_path)
    for folder in (tmp_path / "disk").glob("cascadefs*/*"):
        assert not folder.is_mount()


def test_the_system_in_the_documentation_keeps_the_contract_too(tmp_path):
    code = [line for line in cascadefs.bench.compare.__doc__.splitlines() if line.startswith("    ")]
    assert sum(not line.lstrip().startswith(("from", "@")) for line in code) <= 10
    (tmp_path / "example.py").write_text(textwrap.dedent("\n".join(code)))
    keeps_the_contract("folder", tmp_path, tmp_path / "example.py")


def test_contents_are_told_by_number_and_seed_and_look_like_float16():
    data, views = kv.KvData(), [kv.buffer(SMALL.block_bytes) for _ in range(4)]
    for view, (content, seed) in zip(views, [(3, 1), (3, 1), (4, 1), (3, 2)], strict=True):
        kv.KvData().fill(view, content, seed) if content == 4 else data.fill(view, content, seed)
    assert views[0] == views[1]
    for other in views[2:]:
        pieces = np.frombuffer(views[0], np.uint8).reshape(-1, 4096) == np.frombuffer(other, np.uint8).reshape(-1, 4096)
        stamped = pieces.reshape(-1, kv.STAMP_BYTES // 4096, 4096)
        assert not stamped.all(axis=(1, 2)).any()
    values = np.frombuffer(views[0], np.float16).reshape(-1, kv.STAMP_BYTES // 2)[:, 8:].astype(np.float32)
    assert abs(values.mean()) < 0.05 and abs(values.std() - 1) < 0.05


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 1.0])
def test_the_share_of_duplicates_is_kept(share):
    shape = Shape(ranks=4, tokens=1, blocks=16, duplicates=share)
    found = [number for numbers in kv.contents(shape) for number in numbers]
    assert len(found) == 64 and sum(number >= 64 for number in found) == 64 * share
    distinct = 64 * (1 - share) + max(1, 64 * share / kv.SHARED_COPIES) * (share > 0)
    assert kv.unique_bytes(shape) == distinct * shape.block_bytes


def test_cooling_empties_the_page_cache(tmp_path):
    """A read that must not wait (RWF_NOWAIT) finds the pages before, and nothing afterwards."""
    path = tmp_path / "file"
    path.write_bytes(bytes(1 << 20))
    with open(path, "rb") as file:
        sink = bytearray(1 << 20)
        try:
            assert os.preadv(file.fileno(), [sink], 0, os.RWF_NOWAIT) == len(sink)
        except OSError as why:
            pytest.skip(f"this filesystem has no RWF_NOWAIT: {why}")
        drop_page_cache(tmp_path)
        with pytest.raises(BlockingIOError):
            os.preadv(file.fileno(), [sink], 0, os.RWF_NOWAIT)


# --- runs of ranks


@pytest.fixture
def started(tmp_path):
    """A runner over the raw references, which run everywhere."""
    systems = {name: system for name, system in all_systems().items() if name in ("raw-memcpy", "raw-tmpfs", "raw-disk", "pdc")}
    (tmp_path / "store").mkdir()
    with runner.open_runner(systems, default_setup(tmp_path / "store"), lambda line: None) as found:
        yield found


def test_a_run_measures_each_system_and_tells_what_is_missing(started):
    seen = []
    results = started.run(SMALL, 2, seen.append)
    assert len(seen) == 2 * len(results)
    assert seen[: len(results)] != seen[len(results) :], "the order rotates"
    by_name = {result.system.name: result for result in results}
    for name in ("raw-memcpy", "raw-tmpfs", "raw-disk"):
        assert by_name[name].trouble is None and len(by_name[name].samples) == 2
    assert all(sample.cold_s is None for sample in by_name["raw-tmpfs"].samples)
    assert all(sample.cold_s > 0 for sample in by_name["raw-disk"].samples)
    assert by_name["raw-disk"].samples[0].stored_bytes == SMALL.total_bytes
    if by_name["pdc"].trouble:
        assert by_name["pdc"].trouble.startswith("not installed") and not by_name["pdc"].samples


class Liar(Memcpy):
    """Returns one wrong byte of one block."""

    name = "raw-memcpy"

    def get(self, block_id, sink):
        found = super().get(block_id, sink)
        if block_id == host.block_name(1, 2):
            found[1][7] ^= 1
        return found


def test_a_wrong_byte_is_counted():
    rank = host.Rank(Liar, kv.KvData(), "", 1, SMALL, seed=5)
    rank.phase("write", 0)
    rank.ready("read")
    assert rank.phase("read", 0).good == SMALL.blocks - 1


def test_a_read_of_nothing_is_not_the_last_ones_data():
    class Empty(Memcpy):
        def get(self, block_id, sink):
            return sink

    rank = host.Rank(Empty, kv.KvData(), "", 0, SMALL, seed=5)
    rank.phase("write", 0)
    rank.ready("read")
    assert rank.phase("read", 0).good == 0


def test_a_system_that_fails_is_left_out_and_the_others_go_on(started, monkeypatch):
    monkeypatch.setattr(started.systems["raw-disk"], "serve", lambda room, shape: nullcontext(Service(str(room.disk / "none"))))
    results = {result.system.name: result for result in started.run(replace(SMALL, blocks=1), 1, lambda title: None)}
    assert results["raw-disk"].trouble.startswith("failed") and not results["raw-disk"].samples
    assert results["raw-tmpfs"].samples and results["raw-memcpy"].samples


def processes_with(variable):
    """Those that inherited an environment variable; one that ends while we look has none."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):
            if variable.encode() in path.read_bytes():
                found.append(path.parent.name)
    return found


def test_a_run_that_is_ended_leaves_no_process_and_no_folder(tmp_path):
    marker = f"COMPARE_RUN={tmp_path}"
    words = ["bench", "compare", "--systems", "raw", "--repeats", "100", "--store", str(tmp_path)]
    environ = os.environ | dict([marker.split("=")])
    with subprocess.Popen([*CASCADEFS, *words], env=environ, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as run:
        while run.poll() is None and len(processes_with(marker)) < 3:  # itself, a host, a rank
            time.sleep(0.02)
        run.terminate()
        assert run.wait(CONTRACT_S) == 128 + signal.SIGTERM
    while left := processes_with(marker):  # SIGKILL by the death of the parent is not instant; pytest's timeout bounds this
        time.sleep(0.02)
    assert not left and not list(tmp_path.iterdir())


def test_no_two_ranks_of_pdc_share_a_server():
    """PDC itself is rarely there: what keeps them apart is that each finds its server by a file in its own folder."""
    folders = [pdc.rank_folder("/room/pdc", rank) for rank in range(3)]
    assert len(set(folders)) == 3 and all(folder.parent == Path("/room/pdc") for folder in folders)
    for name in ("PDC_TMPDIR", "PDC_DATA_LOC"):
        assert len({pdc._environment(folder)[name] for folder in folders}) == 3


# --- rows


def made_row(name, safety=Safety.KERNEL, repeats=3, **figures):
    shape = SMALL
    system = type("Made", (Memcpy,), {"name": name, "title": name, "safety": safety, "reference": False})
    rates = {"write_s": 1.0, "flush_s": 1.0, "hot_s": 1.0, "cold_s": None} | figures
    each = [{key: value[i] if isinstance(value, list) else value for key, value in rates.items()} for i in range(repeats)]
    samples = [runner.Sample(**one, stored_bytes=shape.total_bytes // 2) for one in each]
    result = runner.Result(system, shape, samples)
    return rows.row(result, "made")


def test_rates_are_bytes_of_all_ranks_over_the_span():
    row = made_row("x", write_s=2.0, flush_s=2.0, hot_s=0.5, cold_s=4.0)
    total = SMALL.total_bytes / 1e9
    assert (row.write_gbs, row.write_flush_gbs) == (pytest.approx(total / 2), pytest.approx(total / 4))
    assert (row.read_hot_gbs, row.read_cold_gbs) == (pytest.approx(total * 2), pytest.approx(total / 4))
    assert row.stored_ratio == 0.5 and row.verified and row.repeats == 3


def test_writes_are_compared_at_the_same_durability():
    table = [
        made_row("cascadefs", write_s=1.0, cold_s=2.0),
        made_row("cascadefs-fsync", Safety.SYNCED, write_s=10.0),
        made_row("page-cache", Safety.KERNEL, write_s=0.5, cold_s=1.0),
        made_row("synced", Safety.SYNCED, write_s=5.0, hot_s=2.0),
        made_row("slow", Safety.PROCESS, write_s=3.0),
    ]
    assert rows.verdict(table, table[0]) == ""
    assert rows.verdict(table, table[2]) == "behind: write, cold read"
    found = {name: ratio.median for name, ratio in rows.against(table, table[3]).items()}
    assert found == {"write_gbs": pytest.approx(0.5), "read_hot_gbs": pytest.approx(2.0)}
    assert rows.verdict(table, table[4]) == "ahead"


def test_who_leads_is_judged_within_each_repeat():
    """A machine that is now fast and now slow: medians of the figures would say the opposite."""
    mood = [1.0, 5.0, 1.0, 5.0, 9.0, 1.0, 7.0, 3.0, 5.0]
    ours = made_row("cascadefs", repeats=9, write_s=mood, hot_s=[m * 2 for m in mood])
    other = made_row("other", repeats=9, write_s=[m * 1.25 for m in mood], hot_s=mood, cold_s=mood)
    found = rows.against([ours, other], other)
    assert set(found) == {"write_gbs", "read_hot_gbs"}
    assert (found["write_gbs"].median, found["write_gbs"].low) == (pytest.approx(1.25), pytest.approx(1.25))
    assert rows.verdict([ours, other], other) == "behind: hot read"
    like = made_row("like", repeats=9, write_s=[m * f for m, f in zip(mood, [0.9, 1.2] * 4 + [1.1], strict=True)], hot_s=1e9)
    assert rows.verdict([ours, like], like) == "level: write"
    document = rows.document([ours, like], {}, [])["rows"][1]
    assert document["cascadefs_is"] == {"write_gbs": "level", "read_hot_gbs": "ahead"}
    assert document["cascadefs_over_it_spread"]["write_gbs"] == (pytest.approx(0.9), pytest.approx(1.2))


@pytest.mark.parametrize(("count", "cut"), [(1, 0), (3, 0), (5, 0), (6, 0), (8, 0), (9, 1), (12, 2), (17, 4), (20, 5)])
def test_the_interval_is_that_of_the_sign_test(count, cut):
    """Tabulated: the ranks that bound a median with 95 % confidence."""
    found = rows.paired([float(n) for n in range(1, count + 1)], [1.0] * count)
    assert (found.low, found.high) == (1 + cut, count - cut)


def test_rows_of_other_shapes_are_never_compared():
    other = replace(made_row("other", write_s=0.1), ranks=7)
    assert rows.against([made_row("cascadefs"), other], other) == {}


def test_missing_systems_are_lines_of_the_table():
    missing = rows.row(runner.Result(Memcpy, SMALL, trouble="not installed: make bench-deps"), "made")
    table = [missing, made_row("cascadefs")]
    lines = show.markdown(table).splitlines()
    assert any("not installed: make bench-deps" in line for line in lines)
    assert len({line.count("|") for line in lines if line.startswith("|")}) == 1


def test_plots_of_one_shape_and_of_several(tmp_path):
    pytest.importorskip("matplotlib", reason="not installed: no module matplotlib (make bench-deps)")
    table = [made_row("cascadefs", cold_s=2.0), made_row("other", hot_s=2.0)]
    plots.draw(table, tmp_path / "one")
    names = ["dedup", "overview", "read-cold", "read-hot", "write"]
    assert {path.name for path in (tmp_path / "one").iterdir()} == {f"{n}.{k}" for n in names for k in ("png", "svg")}
    more = [replace(row, ranks=4) for row in table] + [replace(row, duplicates=0.9) for row in table]
    plots.draw(table + more, tmp_path / "several")
    drawn = {path.stem for path in (tmp_path / "several").iterdir()}
    assert drawn >= {"ranks-write", "ranks-read-hot", "duplicates-dedup"} and "blocks-write" not in drawn
    assert sum(name.startswith("overview") for name in drawn) == 3
    assert plots.draw([], tmp_path / "none") == ["nothing to draw: no system was measured"]


def test_too_little_memory_means_fewer_blocks_or_a_reason():
    need = presets.COPIES * SMALL.ranks * SMALL.block_bytes
    assert presets.fit(SMALL, 100 * need) == SMALL
    assert presets.fit(SMALL, 2 * need).blocks == 2
    with pytest.raises(UserError, match="not enough free memory"):
        presets.fit(SMALL, need - 1)


def test_the_document_has_the_promised_keys(tmp_path):
    out = tmp_path / "out.json"
    arguments = ["--tokens", "1", "--repeats", "1", "--systems", "raw-tmpfs", "--store", str(tmp_path), "--json", str(out)]
    done = CliRunner().invoke(bench_compare, arguments, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    document = json.loads(out.read_text())
    assert set(document) >= {"machine", "method", "rows"}
    keys = {"system", "preset", "ranks", "block_bytes", "write_gbs", "read_hot_gbs", "read_cold_gbs", "durable", "verified"}
    assert all(keys | {"repeats"} <= set(row) for row in document["rows"])
    assert document["machine"]["packages"]["cascadefs"] and document["machine"]["cpu"]
    assert document["rows"][0]["verified"] is True and document["rows"][0]["write_gbs"] > 0


def test_an_unknown_system_is_one_line():
    done = CliRunner().invoke(bench_compare, ["--systems", "nosuch"])
    assert done.exit_code == 1 and "no system's name contains nosuch" in done.output

"""Long sweeps on disk: what was finished is never lost, never wrong, and never computed again."""

import contextlib
import dataclasses
import errno
import multiprocessing
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from filelock import FileLock
from random_models import native
from random_pairs import FourMembers, SquaredLogit, ragged_dataset, random_dataset, token_prompts

from patching import ActivationPatcher, Site, SweepResult, units
from patching.errors import PatchingWarning, StoreError
from patching.store import Journal, files
from patching.store import journal as journal_module

SWEEP = dict(activation="z", over=("layer", "pos", "head"))


@pytest.fixture(autouse=True)
def one_thread():
    """Bits are compared, and forked processes must not share a pool of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def ran(monkeypatch):
    """The numbers of the units that were run."""
    numbers, run = [], units.Parts.__call__

    def counted(self, unit):
        numbers.append(unit.number)
        return run(self, unit)

    monkeypatch.setattr(units.Parts, "__call__", counted)
    return numbers


def sweep(model, dataset=None, store=None, **options):
    dataset = ragged_dataset(model) if dataset is None else dataset
    given = {**SWEEP, **options}
    return ActivationPatcher(model).sweep(dataset, store=store, progress=False, **given)


def assert_same_bits(got, expected):
    for name in ("clean", "corrupted", "patched"):
        assert getattr(got, name).tobytes() == getattr(expected, name).tobytes(), name


# The same numbers


@pytest.mark.parametrize(
    ("activation", "over", "options"),
    [
        ("z", ("layer", "pos", "head"), {}),
        (["attn_out", "mlp_out"], ("layer", "role"), {"direction": "noising", "metric": "kl_div"}),
        ("resid_pre", ("layer", "pos"), {"window": 2, "engine": "reference"}),
        ("z", ("layer", "head"), {"replacement": "mean"}),
        ("mlp_out", ("layer", "pos"), {"replacement": "gaussian_noise", "seed": 5}),
        ([Site("blocks.0.hook_resid_pre", pos=-1), Site("blocks.2.hook_mlp_out")], (), {}),
        ("z", (), {}),
    ],
)
@pytest.mark.parametrize("size", [(1, 2), (2, 1000), (None, None)])
def test_a_kept_sweep_is_the_same_sweep(any_model, tmp_path, activation, over, options, size):
    expected = sweep(any_model, activation=activation, over=over, **options)
    store = Journal(tmp_path / "run", *size)
    got = sweep(any_model, activation=activation, over=over, store=store, **options)
    np.testing.assert_array_equal(np.isnan(got.patched), np.isnan(expected.patched))
    for name in ("clean", "corrupted", "patched"):
        np.testing.assert_allclose(getattr(got, name), getattr(expected, name), rtol=0, atol=2e-5)
    assert (got.axes, got.cells, got.pairs) == (expected.axes, expected.cells, expected.pairs)
    assert_same_bits(SweepResult.load(tmp_path / "run"), got)
    assert SweepResult.load(tmp_path / "run").provenance == got.provenance


def test_resampling_draws_from_all_pairs_of_the_sweep(any_model, tmp_path):
    """With units of one pair, every pair still has a partner, and the same one."""
    dataset = random_dataset(any_model, 5)
    expected = sweep(any_model, dataset, replacement="resample", seed=3)
    got = sweep(any_model, dataset, Journal(tmp_path / "run", pairs=1), replacement="resample", seed=3)
    np.testing.assert_allclose(got.patched, expected.patched, rtol=0, atol=2e-5)


def test_on_every_kind_of_model(model, tmp_path):
    dataset = random_dataset(model, 4)
    expected = sweep(model, dataset)
    got = sweep(model, dataset, tmp_path / "run")
    assert_same_bits(got, expected)


def test_units_cover_every_cell_of_every_pair_once(any_model):
    from both_engines import request_of

    request = request_of(any_model, ragged_dataset(any_model), "z", ("layer", "pos", "head"))
    for size in [(1, 1), (2, 7), (3, 84), (5, 1000)]:
        count = np.zeros((len(request.grid.cells), 3), int)
        for number, unit in enumerate(units.cut(request, units.Size(*size))):
            assert unit.number == number
            assert len(unit.rows) <= size[0]
            assert len(unit.cells) <= size[1]
            count[np.ix_(list(unit.cells), list(unit.rows))] += 1
        assert (count == 1).all()


def test_a_usual_unit_is_a_block_of_pairs_with_all_cells(any_model):
    from both_engines import request_of

    request = request_of(any_model, random_dataset(any_model, 4), "z", ("layer", "pos", "head"))
    assert units.size_of(request, "auto") == units.Size(4, 84)


def test_units_are_cut_by_what_cells_cost(any_model, monkeypatch):
    """Blocks of pairs of one size; cells are cut only where those of one pair are too many."""
    from both_engines import request_of

    request = request_of(any_model, random_dataset(any_model, 5, 7, first=2), "z", ("layer", "pos", "head"))
    heads, d_model = any_model.cfg.n_heads, any_model.cfg.d_model
    # By hand, for one head: its own MLP, the layers behind it from its position on, the last at the end.
    patched = sum(1 + (7 - p) + 1 for p in range(2, 7)) + 5 * (1 + 1) + 1
    one_pair = 24 * d_model**2 * (heads * patched + 4 * 7 * 3)
    monkeypatch.setitem(units.FLOPS, "cpu", 4.5 * one_pair)
    assert units.size_of(request, "auto") == units.Size(3, 84), "3 and 2 pairs, not 4 and 1"
    monkeypatch.setitem(units.FLOPS, "cpu", one_pair / 2)
    assert units.size_of(request, "auto") == units.Size(1, 42)
    assert units.size_of(request, "reference").cells < 42, "whole forward passes cost more"


# Stopping and going on


def test_a_finished_run_runs_nothing(any_model, tmp_path, ran):
    first = sweep(any_model, store=tmp_path / "run")
    assert ran
    ran.clear()
    again = sweep(any_model, store=tmp_path / "run")
    assert ran == []
    assert_same_bits(again, first)
    assert again.provenance == first.provenance
    assert not (tmp_path / "run" / "parts").exists()


class Stopped(Exception):
    pass


@contextlib.contextmanager
def stopping_after(monkeypatch, n):
    """Interrupt the sweep as soon as ``n`` parts have been kept."""
    keep, count = journal_module.OpenJournal.keep, []

    def stop(self, unit, part):
        keep(self, unit, part)
        count.append(unit.number)
        if len(count) == n:
            raise Stopped

    with monkeypatch.context() as patch:
        patch.setattr(journal_module.OpenJournal, "keep", stop)
        with pytest.raises(Stopped):
            yield


def stopped(model, folder, monkeypatch, n=3, **options):
    with stopping_after(monkeypatch, n):
        sweep(model, store=Journal(folder, 1, 30), **options)


def test_a_stopped_run_goes_on_and_repeats_nothing(any_model, tmp_path, monkeypatch, ran):
    expected = sweep(any_model, store=Journal(tmp_path / "whole", 1, 30))
    everything = sorted(ran)
    ran.clear()
    for n in (1, 2, 3):
        stopped(any_model, tmp_path / "run", monkeypatch, n)
    got = sweep(any_model, store=tmp_path / "run")
    assert sorted(ran) == everything, "each unit once, over four starts"
    assert_same_bits(got, expected)
    assert len(got.provenance["sessions"]) == 4
    assert got.provenance["verified_cells"] == expected.provenance["verified_cells"]


def test_a_run_stopped_before_its_first_word_can_begin_again(any_model, tmp_path, monkeypatch):
    """Killed while the manifest is written for the first time: nothing in the folder says whose it is."""
    with monkeypatch.context() as stopping:
        stopping.setattr(journal_module, "write_manifest", stop)
        with pytest.raises(KeyboardInterrupt):
            sweep(any_model, store=tmp_path / "run")
    assert_same_bits(sweep(any_model, store=tmp_path / "run"), sweep(any_model, store=tmp_path / "other"))


def stop(*_):
    raise KeyboardInterrupt


def test_an_unfinished_run_is_not_a_result(any_model, tmp_path, monkeypatch):
    stopped(any_model, tmp_path / "run", monkeypatch)
    with pytest.raises(StoreError, match="not finished. Run the same sweep with store="):
        SweepResult.load(tmp_path / "run")


MOMENTS = ["before writing", "half written", "before the rename", "after the rename"]


def die_at(moment, nth):
    """Make this process kill itself, as kill -9 would, at the n-th file that it writes."""
    calls, real = [], (os.fsync, os.replace, files.tempfile.mkstemp)

    def kill():
        os.kill(os.getpid(), signal.SIGKILL)

    def mkstemp(*args, **options):
        calls.append(0)
        if len(calls) == nth and moment == "before writing":
            kill()
        return real[2](*args, **options)

    def fsync(handle):
        if len(calls) == nth and moment == "half written":
            with contextlib.suppress(OSError):
                os.ftruncate(handle, os.fstat(handle).st_size // 2)
            kill()
        real[0](handle)

    def replace(*args):
        if len(calls) == nth and moment == "before the rename":
            kill()
        real[1](*args)
        if len(calls) == nth and moment == "after the rename":
            kill()

    files.os.fsync, files.os.replace, files.tempfile.mkstemp = fsync, replace, mkstemp


@pytest.mark.parametrize("moment", MOMENTS)
def test_kill_9_loses_nothing(any_model, tmp_path, moment):
    """Killed once at every file that a run writes: manifest, nine parts, three tables, manifest."""
    expected = sweep(any_model, store=Journal(tmp_path / "whole", 1, 30))
    fork = multiprocessing.get_context("fork")

    def killed(nth):
        die_at(moment, nth)
        sweep(any_model, store=Journal(tmp_path / "run", 1, 30))

    deaths = 0
    while deaths < 40:
        process = fork.Process(target=killed, args=(2 + deaths,))  # lets one file more through each time
        process.start()
        process.join()
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
        deaths += 1
    assert 3 < deaths < 40
    got = sweep(any_model, store=tmp_path / "run")
    assert_same_bits(got, expected)
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == [
        ".lock", "cells.parquet", "manifest.json", "pairs.parquet", "values.parquet",
    ]  # fmt: skip


@pytest.mark.parametrize("nth", [1, 3, 6, 11, 13])
def test_a_full_disk_says_what_to_do_and_loses_nothing(any_model, tmp_path, monkeypatch, nth):
    expected = sweep(any_model, store=Journal(tmp_path / "whole", 1, 30))
    fsync, count = os.fsync, []

    def full(handle):
        count.append(handle)
        if len(count) >= 2 * nth:
            raise OSError(errno.ENOSPC, "No space left on device")
        return fsync(handle)

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "fsync", full)
        with pytest.raises(StoreError, match=r"disk is full. The \d+ units .* are safe. Make room, and"):
            sweep(any_model, store=Journal(tmp_path / "run", 1, 30))
    assert not list((tmp_path / "run").rglob("*.tmp"))
    assert_same_bits(sweep(any_model, store=tmp_path / "run"), expected)


@pytest.mark.parametrize("harm", ["flipped", "cut", "empty", "another unit's", "of another run", "renamed"])
def test_a_damaged_part_is_set_aside_and_run_again(any_model, tmp_path, monkeypatch, ran, harm):
    expected = sweep(any_model, store=Journal(tmp_path / "whole", 1, 30))
    stopped(any_model, tmp_path / "run", monkeypatch)
    parts = sorted((tmp_path / "run" / "parts").iterdir())
    content = parts[1].read_bytes()
    number = parts[1].name.split(".")[0]
    if harm == "another unit's":  # its checksum agrees
        parts[0].rename(parts[0].with_name(parts[0].name.replace("0000000.", number + ".")))
        parts[1].unlink()
    elif harm == "of another run":
        stopped(any_model, tmp_path / "other", monkeypatch, seed=9)
        other = next(p for p in (tmp_path / "other" / "parts").iterdir() if p.name.startswith(number))
        parts[1].unlink()
        (parts[1].parent / other.name).write_bytes(other.read_bytes())
    elif harm == "renamed":
        parts[1].rename(parts[1].with_name(number + ".0.safetensors"))
    else:
        flipped = bytearray(content)
        flipped[-1] ^= 1
        parts[1].write_bytes({"flipped": bytes(flipped), "cut": content[:-9], "empty": b""}[harm])
    ran.clear()
    with pytest.warns(PatchingWarning, match="a part that does not read: .* set aside as .* is run again"):
        got = sweep(any_model, store=tmp_path / "run")
    assert int(number) in ran
    assert_same_bits(got, expected)


def test_damaged_tables_of_a_finished_run_are_refused(any_model, tmp_path):
    sweep(any_model, store=tmp_path / "run")
    (tmp_path / "run" / "values.parquet").write_bytes(b"")
    with pytest.raises(StoreError, match="values.parquet: its content does not agree"):
        sweep(any_model, store=tmp_path / "run")


def test_one_process_at_a_time(any_model, tmp_path, monkeypatch):
    stopped(any_model, tmp_path / "run", monkeypatch)
    with (
        files_locked(tmp_path / "run"),
        pytest.raises(StoreError, match="run is in use: another process is writing it"),
    ):
        sweep(any_model, store=tmp_path / "run")
    sweep(any_model, store=tmp_path / "run")


@contextlib.contextmanager
def files_locked(folder):
    """Another process that holds the folder's lock."""
    fork = multiprocessing.get_context("fork")
    ready, done = fork.Event(), fork.Event()

    def hold():
        with FileLock(folder / files.LOCK):
            ready.set()
            done.wait(60)

    process = fork.Process(target=hold)
    process.start()
    assert ready.wait(60)
    try:
        yield
    finally:
        done.set()
        process.join()


# Only the same run goes on


def squared(logits):
    return logits[:, -1, 5] ** 2


def shifted(by):
    return lambda logits: logits[:, -1, 5] + by


def doubled(activation, site):
    return 2 * activation


def tripled(activation, site):
    return 3 * activation


CHANGES = {
    "direction": dict(direction="noising"),
    "seed": dict(seed=1),
    "replacement.name": dict(replacement="mean"),
    "metric.name": dict(metric="prob"),
    "max_rows": dict(max_rows=3),
    "engine": dict(engine="reference"),
    "axes.layer": dict(layers=[0]),
    "cells_sha256": dict(activation="v"),
    "pairs": dict(pair_indices=[0, 2]),
    "dataset_sha256": dict(pair_indices=[0, 2]),
    "metric.code.name": dict(metric=squared),
    "replacement.code.name": dict(replacement=doubled),
}


@pytest.mark.parametrize("key", CHANGES)
def test_another_run_is_refused_by_name(any_model, tmp_path, monkeypatch, key):
    stopped(any_model, tmp_path / "run", monkeypatch)
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    with pytest.raises(StoreError, match=rf"holds another run(.|\n)*\n  {key}: .* there, .* asked for"):
        sweep(any_model, store=tmp_path / "run", **CHANGES[key])
    assert {path: path.read_bytes() for path in before} == before


@pytest.mark.parametrize(
    ("first", "second", "key"),
    [
        (dict(metric=shifted(1)), dict(metric=shifted(2)), "metric.code.bound"),
        (dict(metric=squared), dict(metric=shifted(1)), "metric.code.source_sha256"),
        (dict(replacement=doubled), dict(replacement=tripled), "replacement.code.source_sha256"),
    ],
)
def test_other_code_is_refused(any_model, tmp_path, monkeypatch, first, second, key):
    stopped(any_model, tmp_path / "run", monkeypatch, **first)
    sweep(any_model, store=Journal(tmp_path / "same", 1, 30), **first)
    with pytest.raises(StoreError, match=key):
        sweep(any_model, store=tmp_path / "run", **second)


def test_the_same_code_goes_on(any_model, tmp_path, monkeypatch, ran):
    stopped(any_model, tmp_path / "run", monkeypatch, metric=shifted(1))
    ran.clear()
    sweep(any_model, store=tmp_path / "run", metric=shifted(1))
    assert 0 not in ran


def test_other_weights_and_prompts_are_refused(tmp_path, monkeypatch):
    model = native()
    stopped(model, tmp_path / "run", monkeypatch, dataset=random_dataset(model))
    with pytest.raises(StoreError, match="dataset_sha256"):
        sweep(model, random_dataset(model, seed=1), tmp_path / "run")
    pairs = random_dataset(model).pairs
    other = [dataclasses.replace(pairs[0], correct=7), *pairs[1:]]
    with pytest.raises(StoreError, match="dataset_sha256"):
        sweep(model, type(random_dataset(model))(model, other), tmp_path / "run")
    with torch.no_grad():
        next(iter(model.parameters())).view(-1)[0] += 1e-3
    with pytest.raises(StoreError, match="weights_sha256: .* there"):
        sweep(model, random_dataset(model), tmp_path / "run")


def test_a_datasets_own_metric_is_told_by_its_code(any_model, tmp_path, monkeypatch):
    prompts = token_prompts()
    stopped(any_model, tmp_path / "run", monkeypatch, dataset=FourMembers(prompts))
    with pytest.raises(StoreError, match="metric.code"):
        sweep(any_model, SquaredLogit(prompts), tmp_path / "run")
    sweep(any_model, FourMembers(prompts), tmp_path / "run")


def test_units_of_another_size_are_refused(any_model, tmp_path, monkeypatch):
    stopped(any_model, tmp_path / "run", monkeypatch)
    with pytest.raises(StoreError, match="cells in a unit: 30 there, 7 asked for"):
        sweep(any_model, store=Journal(tmp_path / "run", cells=7))


def test_another_machine_is_noted(any_model, tmp_path, monkeypatch):
    stopped(any_model, tmp_path / "run", monkeypatch)
    monkeypatch.setattr("patching.long.versions", lambda: {"torch": "0.1"})
    with pytest.warns(PatchingWarning, match=r"versions.torch: '.*' before, '0\.1' now"):
        got = sweep(any_model, store=tmp_path / "run")
    assert [s["environment"]["versions"]["torch"] for s in got.provenance["sessions"]] == [
        torch.__version__, "0.1",
    ]  # fmt: skip


def test_a_folder_with_something_else_is_left_alone(any_model, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("mine")
    with pytest.raises(StoreError, match=r"holds something else already \(thesis.tex\)"):
        sweep(any_model, store=tmp_path / "run")
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["thesis.tex"]
    (tmp_path / "file").write_text("mine")
    with pytest.raises(StoreError, match="is a file"):
        sweep(any_model, store=tmp_path / "file")
    with pytest.raises(StoreError, match="store= takes a folder or a Journal, got 7"):
        sweep(any_model, store=7)


def test_a_saved_result_is_no_run(any_model, tmp_path):
    sweep(any_model).save(tmp_path / "run")
    with pytest.raises(StoreError, match="holds a saved result, not a run"):
        sweep(any_model, store=tmp_path / "run")


def test_two_runs_are_the_same_bit_for_bit(model):
    """Without a store too: the same machine, the same numbers."""
    first, second = (sweep(model, random_dataset(model), replacement="resample", seed=2) for _ in range(2))
    assert_same_bits(first, second)


def test_the_limit_of_code_identity():
    """Functions that a metric calls are not looked into; docs/scale.md says so."""
    from patching.identity import code_identity

    def inner(x):
        return x

    first = code_identity(lambda logits: inner(logits))
    assert first["bound"][-1] == [f"{inner.__qualname__}"]
    assert code_identity(squared)["name"].endswith("test_journal.squared")
    assert Path(__file__).name not in str(first)

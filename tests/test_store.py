"""Results on disk: what is written is read back to the last bit, and nothing else is ever read as one."""

import dataclasses
import hashlib
import json
import os
import pickle
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from random_pairs import FourMembers, ragged_dataset, random_dataset, token_prompts

from patching import ActivationPatcher, Site, SweepResult
from patching.errors import PatchingError, StoreError
from patching.identity import canonical, sha256, weight_hash
from patching.results import PairInfo
from patching.store import files, manifest, tables

NAN = float("nan")
PAIRS = (
    PairInfo(7, ("<bos>", "a", ""), ("<bos>", "x", "b"), {"S2": (1,), "END": (2, 0), "IO": ()}, "one"),
    PairInfo(9, ("<bos>", "ж\n"), ("<bos>", '"'), {}, ""),
)
A, B = Site("blocks.0.attn.hook_z", pos="S2", head=1), Site("blocks.1.attn.hook_z", pos=-1, head=0)
PATTERN = Site("blocks.1.attn.hook_pattern", head=2, dest_pos="END", src_pos=3)
NEURON = Site("blocks.1.mlp.hook_post", pos=4, neuron=17)


def result(axes, cells, **changes):
    shape = *(len(values) for values in axes.values()), len(PAIRS)
    values = np.random.default_rng(0).standard_normal(shape) * 10.0 ** np.arange(-300, 301, 600)
    given = dict(
        axes=axes, clean=np.array([0.1, -0.0]), corrupted=np.array([NAN, np.inf]), patched=values,
        cells=cells, pairs=PAIRS, activation="z", direction="noising", metric="logit_diff",
        provenance={"a": [1, 2.5, None, True, "text"], "verified_difference": NAN, "b": {"c": -np.inf}},
    )  # fmt: skip
    return SweepResult(**{**given, **changes})


def bits(array):
    return array.dtype, array.shape, array.tobytes()


def assert_identical(got, expected):
    for field in dataclasses.fields(SweepResult):
        a, b = getattr(got, field.name), getattr(expected, field.name)
        if isinstance(a, np.ndarray):
            assert bits(a) == bits(b), field.name
        else:
            assert repr(a) == repr(b), field.name


def round_trip(result, folder):
    result.save(folder)
    loaded = SweepResult.load(folder)
    assert_identical(loaded, result)
    return loaded


# To the last bit


@pytest.mark.parametrize(
    ("axes", "cells"),
    [
        ({"layer": (0, 2), "role": ("S2", "END")}, ((A,), (B,), (A, B), ())),
        ({"pos": (0, -1, "S2")}, ((), (), ())),
        ({"activation": ("z", "mlp_out"), "neuron": (3,)}, ((NEURON,), (A, A))),
        ({"head": (0,), "dest_pos": ("END",), "src_pos": (3, 1)}, ((PATTERN,), (A,))),
        ({"site": (A, PATTERN, NEURON)}, ((A,), (PATTERN,), (NEURON,))),
        ({"site": (A, (A,), (B, NEURON))}, ((A,), (A,), (B, NEURON))),
        ({}, ((A, B, NEURON, PATTERN),)),
    ],
)
@pytest.mark.parametrize("hole", [False, True])
def test_a_result_comes_back_to_the_last_bit(tmp_path, axes, cells, hole):
    made = result(axes, cells, activation=("z", "mlp_out") if "activation" in axes else "z")
    if hole:
        made.patched[..., 1] = NAN
        made.patched.ravel()[0] = -np.inf
    loaded = round_trip(made, tmp_path / "run")
    assert [type(v) for values in loaded.axes.values() for v in values] == [
        type(v) for values in axes.values() for v in values
    ]


def test_a_nan_keeps_its_payload(tmp_path):
    odd = np.array([0x7FF8_0000_DEAD_BEEF, 0xFFF8_0000_0000_0001], dtype=np.uint64).view(np.float64)
    made = result({"layer": (0,)}, ((A,),), clean=odd, patched=odd[None])
    round_trip(made, tmp_path / "run")


SWEEPS = [
    (["attn_out", "mlp_out"], ("layer", "role"), {}),
    ("resid_pre", ("layer", "pos"), {"window": 2, "direction": "noising"}),
    ("post", ("neuron",), {"layers": [1]}),
    ("q", ("pos", "head"), {"replacement": "zero", "positions": ["END", 0]}),
    (["z", "k"], ("layer", "head"), {"replacement": "gaussian_noise", "metric": "kl_div"}),
    ([Site("blocks.0.hook_resid_pre"), Site("blocks.1.hook_mlp_out", pos="END")], (), {}),
    ("z", (), {}),
]


@pytest.mark.parametrize(("activation", "over", "options"), SWEEPS, ids=lambda v: str(v)[:30])
@pytest.mark.filterwarnings("ignore:.*patched runs are whole:patching.errors.PatchingWarning")
def test_a_sweep_comes_back(model, tmp_path, activation, over, options):
    swept = ActivationPatcher(model).sweep(ragged_dataset(model), activation, over, progress=False, **options)
    loaded = round_trip(swept, tmp_path / "run")
    assert loaded.summary() == swept.summary()
    assert loaded.to_frame().equals(swept.to_frame())


def test_the_store_knows_every_field_of_what_it_keeps():
    """A field added to these classes has to be given a place in the store, and the format a number."""
    assert [f.name for f in dataclasses.fields(Site)] == [
        "hook_point", "pos", "head", "neuron", "dest_pos", "src_pos",
    ]  # fmt: skip
    assert [f.name for f in dataclasses.fields(PairInfo)] == [
        "index", "clean_tokens", "corrupted_tokens", "roles", "template",
    ]  # fmt: skip
    assert [f.name for f in dataclasses.fields(SweepResult)] == [
        "axes", "clean", "corrupted", "patched", "cells", "pairs", "activation", "direction", "metric",
        "provenance",
    ]  # fmt: skip


# What a result says of itself


def test_provenance_says_where_a_result_comes_from(any_model, tmp_path):
    dataset = random_dataset(any_model)
    facts = ActivationPatcher(any_model).sweep(dataset, "z", seed=3, progress=False).provenance
    assert {
        "model", "model_class", "dtype", "config", "weights_sha256", "weight_processing", "device", "dataset",
        "dataset_parameters", "dataset_sha256", "direction", "replacement", "metric", "seed", "versions",
        "verified_difference", "seconds",
    } <= set(facts)  # fmt: skip
    assert set(facts["versions"]) >= {"patching", "transformer_lens", "torch", "python", "platform"}
    assert facts["config"]["d_model"] == 32
    assert facts["seed"] == 3
    assert json.loads(json.dumps(facts)) == facts, "plain values only"


def test_provenance_tells_weights_and_prompts_apart(tmp_path):
    from random_models import native

    model, same, other = native(), native(), native(seed=1)
    with torch.no_grad():
        next(iter(other.parameters())).view(-1)[0] += 1e-6
    facts = [
        ActivationPatcher(m).sweep(d, "z", progress=False).provenance
        for m in (model, same, other)
        for d in (random_dataset(m), random_dataset(m, seed=1))
    ]
    weights, data = [f["weights_sha256"] for f in facts], [f["dataset_sha256"] for f in facts]
    assert weights[0] == weights[1] == weights[2] == weights[3] != weights[4]
    assert data[0] == data[2] == data[4] != data[1] == data[3]


def test_a_changed_weight_is_seen_though_the_hash_is_kept():
    from random_models import native

    model = native()
    before = weight_hash(model)
    assert weight_hash(model) == before
    parameter = next(iter(model.parameters()))
    parameter.data[0, 0] += 1  # passes autograd's version counter by
    changed = weight_hash(model)
    assert changed != before
    parameter.data[0, 0] -= 1
    assert weight_hash(model) in (before, weight_hash(model))


def test_the_weight_hash_is_that_of_the_bytes():
    """Held to hashlib on a module of two parameters, written out by hand."""
    module = torch.nn.Linear(2, 1)
    with torch.no_grad():
        module.weight[:] = torch.tensor([[1.0, 2.0]])
        module.bias[:] = 3.0

    def one(shape, numbers):
        head = f"torch.float32 {shape} ".encode()
        return hashlib.sha256(head + np.array(numbers, "<f4").tobytes()).hexdigest()

    lines = [f"weight {one((1, 2), [1, 2])}".encode(), f"bias {one((1,), [3])}".encode()]
    assert weight_hash(module) == sha256(*lines)


def test_no_machine_path_in_a_provenance(any_model, tmp_path):
    class Here(FourMembers):
        @property
        def parameters(self):
            return {"file": tmp_path / "pairs.csv", "text": str(tmp_path / "x"), "f": len, "n": np.int64(3)}

    swept = ActivationPatcher(any_model).sweep(Here(token_prompts()), "z", progress=False)
    assert swept.provenance["dataset_parameters"] == {"file": "pairs.csv", "text": "x", "f": "len", "n": 3}
    assert str(tmp_path) not in json.dumps(swept.provenance)


# A folder is there whole or not at all


@pytest.fixture
def stored(tmp_path):
    made = result({"layer": (0, 1), "pos": (0, 1, 2)}, ((A,), (), (B,), (A, B), (NEURON,), (PATTERN,)))
    return made, made.save(tmp_path / "run")


def test_the_folder_has_these_files(stored):
    _, folder = stored
    assert sorted(p.name for p in folder.iterdir()) == [
        "cells.parquet", "manifest.json", "pairs.parquet", "values.parquet",
    ]  # fmt: skip
    assert [p.name for p in folder.parent.iterdir()] == ["run"], "no draft stays behind"
    stated = json.loads((folder / "manifest.json").read_text("utf-8"), parse_constant=pytest.fail)
    for name, sha in stated["files"].items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == sha


def test_the_tables_are_plain_parquet(stored):
    made, folder = stored
    frame = pq.read_table(folder / "values.parquet").to_pandas()
    assert list(frame.columns) == ["cell", "pair", "patched"]
    np.testing.assert_array_equal(frame["patched"], made.patched.ravel())


def test_nothing_is_overwritten(stored, tmp_path):
    made, folder = stored
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    with pytest.raises(StoreError, match="run is not empty .it holds .*nothing is overwritten"):
        made.save(folder)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    (tmp_path / "file").write_text("mine")
    with pytest.raises(StoreError, match="is a file"):
        made.save(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    made.save(tmp_path / "empty")
    assert_identical(SweepResult.load(tmp_path / "empty"), made)


def test_parents_are_made(stored, tmp_path):
    stored[0].save(tmp_path / "a" / "b" / "run")
    assert_identical(SweepResult.load(str(tmp_path / "a" / "b" / "run")), stored[0])


@pytest.mark.parametrize("after", [0, 1, 2, 3])
def test_a_full_disk_leaves_nothing(stored, tmp_path, monkeypatch, after):
    """The disk fills at the n-th file."""
    made, fsync, count = stored[0], os.fsync, []

    def full(handle):
        count.append(handle)
        if len(count) > 2 * after:  # each file, then its folder
            raise OSError(28, "No space left on device")
        return fsync(handle)

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(StoreError, match="cannot be written: .*No space left on device.*Nothing is left"):
        made.save(tmp_path / "new")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run"]


@pytest.mark.skipif(os.name != "posix", reason="files have no mode there")
def test_who_may_read_a_result_is_up_to_the_user(stored, tmp_path):
    """Not the owner alone, as for temporary files: a result on a shared disk is for others too."""
    before = os.umask(0o027)
    try:
        stored[0].save(tmp_path / "new")
    finally:
        os.umask(before)
    modes = {oct(path.stat().st_mode & 0o777) for path in (tmp_path / "new").iterdir()}
    assert (oct((tmp_path / "new").stat().st_mode & 0o777), modes) == ("0o750", {"0o640"})


def test_a_value_without_a_place_in_the_store_is_named(tmp_path):
    made = result({"layer": (0.5,)}, ((A,),), patched=np.zeros((1, 2)))
    with pytest.raises(StoreError, match=r"the axis 'layer' has the value 0\.5"):
        made.save(tmp_path / "new")
    assert not list(tmp_path.iterdir())


# Nothing wrong is ever read


def edited(folder, change, *, checksum=True):
    """Change the manifest, with a checksum that agrees or as somebody would by hand."""
    path = folder / "manifest.json"
    entries = json.loads(path.read_text("utf-8"))
    change(entries)
    if checksum:
        entries.pop("checksum", None)
        entries["checksum"] = sha256(canonical(entries))
    path.write_text(json.dumps(entries), "utf-8")


def test_missing_and_strange_folders(tmp_path, stored):
    for name, message in [("none", "no folder"), ("empty", "holds no result"), ("odd", "holds no result")]:
        (tmp_path / "empty").mkdir(exist_ok=True)
        (tmp_path / "odd").mkdir(exist_ok=True)
        (tmp_path / "odd" / "file").write_text("")
        with pytest.raises(StoreError, match=message):
            SweepResult.load(tmp_path / name)


@pytest.mark.parametrize("name", ["values.parquet", "cells.parquet", "pairs.parquet", "manifest.json"])
@pytest.mark.parametrize("harm", ["missing", "cut", "empty", "flipped", "longer", "exchanged"])
def test_damage_is_seen(stored, name, harm):
    _, folder = stored
    path = folder / name
    content = path.read_bytes()
    if harm == "missing":
        path.unlink()
    else:
        flipped = bytearray(content)
        flipped[len(content) // 2] ^= 1
        other = folder / ("cells.parquet" if name != "cells.parquet" else "pairs.parquet")
        path.write_bytes(
            {"cut": content[:-1], "empty": b"", "flipped": bytes(flipped), "longer": content + b"x",
             "exchanged": other.read_bytes()}[harm]
        )  # fmt: skip
    with pytest.raises(StoreError, match=name.replace(".", r"\.")):
        SweepResult.load(folder)


def test_a_newer_format_says_so(stored):
    edited(stored[1], lambda m: m.update(version=2, something="new"), checksum=False)
    with pytest.raises(
        StoreError, match="written in format 2 by a newer version of patching; this one reads"
    ):
        SweepResult.load(stored[1])


def test_an_edited_manifest_is_seen(stored):
    edited(stored[1], lambda m: m["provenance"].update(a="better"), checksum=False)
    with pytest.raises(StoreError, match="does not agree with its checksum"):
        SweepResult.load(stored[1])


@pytest.mark.parametrize(
    "name", ["../secret", "/etc/passwd", "..", "a/b", "", "values.parquet/../x", "x\0y", "."]
)
def test_a_path_cannot_leave_the_folder(stored, name):
    (stored[1].parent / "secret").write_bytes((stored[1] / "values.parquet").read_bytes())
    edited(stored[1], lambda m: m["files"].update({name: m["files"]["values.parquet"]}))
    with pytest.raises(StoreError, match="not a plain file of this folder"):
        SweepResult.load(stored[1])


def test_a_link_is_not_followed(stored, tmp_path):
    target = tmp_path / "elsewhere"
    shutil.move(stored[1] / "values.parquet", target)
    (stored[1] / "values.parquet").symlink_to(target)
    with pytest.raises(StoreError, match="not a plain file of this folder"):
        SweepResult.load(stored[1])


WRONG = [
    lambda m: m.update(state="odd"),
    lambda m: m.update(version="1"),
    lambda m: m.update(version=True),
    lambda m: m.update(version=0),
    lambda m: m.update(format="other"),
    lambda m: m.pop("result"),
    lambda m: m.update(more=1),
    lambda m: m.update(files=[]),
    lambda m: m["files"].pop("cells.parquet"),
    lambda m: m["files"].update({"cells.parquet": 7}),
    lambda m: m["result"].update(pairs=3),
    lambda m: m["result"].update(pairs=-1),
    lambda m: m["result"].update(pairs=True),
    lambda m: m["result"].update(axes=[]),
    lambda m: m["result"].update(axes=3),
    lambda m: m["result"]["axes"].reverse(),
    lambda m: m["result"]["axes"].append({"name": "x", "sites": ["site"] * 6}),
    lambda m: m["result"].update(axes=[{"name": "x", "sites": ["site"] * 6}]),
    lambda m: m["result"].update(axes=[{"name": "x", "sites": ["odd"] * 6}]),
    lambda m: m["result"].update(axes=[{"name": "x", "sites": 6}]),
    lambda m: m["result"]["axes"].append(m["result"]["axes"][0]),
    lambda m: m["result"]["axes"][0].update(values=[0, 1.5]),
    lambda m: m["result"]["axes"][0].update(values=[0]),
    lambda m: m["result"].update(direction="sideways"),
    lambda m: m["result"].update(activation=[1]),
    lambda m: m["result"].update(metric=None),
]


@pytest.mark.parametrize("change", range(len(WRONG)))
def test_a_manifest_of_the_wrong_kind_is_refused(stored, change):
    """Also where its checksum agrees. The axes exchanged have the same size: only their order is new."""
    edited(stored[1], WRONG[change])
    if change == 15:
        assert list(SweepResult.load(stored[1]).axes) == ["pos", "layer"]
        return
    with pytest.raises(StoreError):
        SweepResult.load(stored[1])


def test_an_unfinished_sweep_is_not_read_as_a_result(stored):
    edited(stored[1], lambda m: m.update(state="running"))
    with pytest.raises(StoreError, match="not finished. Run the same sweep with store="):
        SweepResult.load(stored[1])


def values(cell, pair, patched):
    return tables._bytes(pa.table([cell, pair, patched], schema=tables.VALUES))


@pytest.mark.parametrize(
    ("read", "message"),
    [
        (lambda: tables.read_values(b"", "f", 1, 1), "not a Parquet file"),
        (lambda: tables.read_values(b"PAR1", "f", 1, 1), "not a Parquet file"),
        (lambda: tables.read_values(values([0, 0], [1, 0], [1, 2]), "f", 1, 2),
         "expected a row for each of 1 cells × 2 pairs"),
        (lambda: tables.read_values(values([0], [0], [1]), "f", 1, 2), "found 1"),
        (lambda: tables.read_values(values([0, 0], [0, 1], [1, None]), "f", 1, 2),
         "empty fields in the column patched"),
        (lambda: tables.read_values(values([1, -1], [-2, 3], [1, 2]), "f", 1, 2),
         "expected a row for each"),
        (lambda: tables.read_pairs(tables.write_cells([(A,)]), "f"), "has the columns"),
        (lambda: tables.read_cells(tables.write_cells([(A,), (B,)]), "f", 1), "no cell 1 among 1"),
    ],
)  # fmt: skip
def test_a_table_of_the_wrong_kind_is_refused(read, message):
    with pytest.raises(StoreError, match=message):
        read()


def test_an_empty_token_field_is_refused():
    table = pa.Table.from_pylist(
        [{"pair": 0, "clean": 0.0, "corrupted": 0.0, "clean_tokens": [None], "corrupted_tokens": ["a"],
          "roles": [], "template": ""}],
        schema=tables.PAIRS,
    )  # fmt: skip
    with pytest.raises(StoreError, match="a pair has an empty token or role"):
        tables.read_pairs(tables._bytes(table), "f")


def test_reading_unpickles_nothing(stored, monkeypatch):
    def refuse(*args, **options):
        raise AssertionError("unpickled")

    for module, name in [(pickle, "load"), (pickle, "loads"), (pickle, "Unpickler"), (torch, "load")]:
        monkeypatch.setattr(module, name, refuse)
    assert SweepResult.load(stored[1]).patched.shape == (2, 3, 2)


def test_store_errors_are_patching_errors():
    assert issubclass(StoreError, PatchingError)
    assert manifest.VERSION == 1


@pytest.mark.parametrize("start", [0, 1])
@pytest.mark.parametrize("length", [1, 2, 3, 8])
def test_a_changed_bit_changes_the_hash_also_past_autograd(start, length):
    module = torch.nn.Module()
    module.weight = torch.nn.Parameter(torch.arange(10.0)[start : start + length])
    before = weight_hash(module)
    assert weight_hash(module) == before
    module.weight.data[length - 1] += 1
    assert weight_hash(module) != before

"""Streams of activations: the same as in memory, resumed after a stop, read for what is most active."""

import json
import os

import numpy as np
import pytest
import torch
from filelock import FileLock
from model_state import assert_same, state_of
from random_models import model_of
from random_pairs import FIRST_WORD, N_TOKENS

from patching.errors import ModelError, PatchingError, SiteError
from patching.latent import ActivationCaching, ActivationStore, attention_patterns, maximally_activating
from patching.models import face_of
from patching.store import files

GENERATOR = torch.Generator().manual_seed(0)
PROMPTS = [torch.randint(FIRST_WORD, N_TOKENS, (4 + n % 3,), generator=GENERATOR) for n in range(11)]
PLACES = r"hook_resid_post$|attn\.hook_z$"
CACHING = ActivationCaching(PLACES)


def stream(model, folder, prompts=PROMPTS, caching=CACHING, batch_size=4) -> ActivationStore:
    return caching.stream(model, iter(prompts), folder, batch_size=batch_size, progress=False)


class StopError(Exception):
    pass


def stopping_after(n: int):
    yield from PROMPTS[:n]
    raise StopError


def test_what_is_stored_is_what_the_model_computes(model, tmp_path) -> None:
    store = stream(model, tmp_path)

    assert len(store) == 11
    for n, prompt in enumerate(PROMPTS):
        expected = face_of(model).cache(prompt[None], store.names)[1]
        for name, activation in store[n].items():
            torch.testing.assert_close(activation, expected[name][0].detach(), rtol=1e-4, atol=1e-5)


def test_a_store_is_opened_again(any_model, tmp_path) -> None:
    written = stream(any_model, tmp_path)
    opened = ActivationStore.open(tmp_path)

    assert opened.names == written.names
    assert sorted(row for batch in opened.batches() for row in batch.rows) == list(range(11))
    for batch in opened.batches():
        for row, tokens in zip(batch.rows, batch.tokens, strict=True):
            assert torch.equal(tokens, PROMPTS[row])


def test_a_stopped_run_goes_on_where_it_was(any_model, tmp_path) -> None:
    whole = stream(any_model, tmp_path / "whole")
    with pytest.raises(StopError):
        CACHING.stream(any_model, stopping_after(9), tmp_path / "stopped", batch_size=4, progress=False)
    assert len(ActivationStore.open(tmp_path / "stopped")) == 8
    runs = []
    hook = any_model.hook_dict["blocks.0.hook_resid_pre"]
    hook.add_hook(lambda activation, hook: runs.append(len(activation)))
    resumed = stream(any_model, tmp_path / "stopped")
    any_model.reset_hooks()

    assert sum(runs) == 3, "only the prompts that were missing are run"
    assert resumed.manifest == whole.manifest
    for shard in whole.manifest["shards"]:
        assert (resumed.folder / shard["file"]).read_bytes() == (whole.folder / shard["file"]).read_bytes()


def test_a_shard_without_its_line_in_the_manifest_is_written_again(any_model, tmp_path) -> None:
    whole = stream(any_model, tmp_path / "whole")
    stream(any_model, tmp_path / "torn")
    manifest = json.loads((tmp_path / "torn/manifest.json").read_text())
    manifest["shards"].pop()
    (tmp_path / "torn/manifest.json").write_text(json.dumps(manifest))
    (tmp_path / "torn/shard-000002.safetensors").write_bytes(b"half a shard")

    again = stream(any_model, tmp_path / "torn")
    assert again.manifest == whole.manifest
    assert torch.equal(again[10][again.names[0]], whole[10][whole.names[0]])


def test_a_finished_store_runs_nothing(any_model, tmp_path) -> None:
    stream(any_model, tmp_path)
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("[!.]*")}
    assert len(before) == 4
    stream(any_model, tmp_path)
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("[!.]*")} == before


def test_what_a_killed_run_was_writing_is_removed(any_model, tmp_path) -> None:
    torn = tmp_path / ".shard-000001.safetensors.abc.tmp"
    torn.write_bytes(b"half a shard")
    store = stream(any_model, tmp_path)

    assert len(store) == 11
    assert not torn.exists()


def test_two_processes_do_not_write_one_store(any_model, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(files, "WAIT", 0.1)
    with FileLock(tmp_path / files.LOCK), pytest.raises(PatchingError, match="another process is writing it"):
        stream(any_model, tmp_path)
    assert len(stream(any_model, tmp_path)) == 11


def test_shards_are_on_the_disk_before_the_manifest_names_them(any_model, tmp_path, monkeypatch) -> None:
    """A full disk at any file leaves the prompts that were stored before."""
    fsync, left = os.fsync, [5]

    def full(handle):
        left[0] -= 1
        if not left[0]:
            raise OSError(28, "No space left on device")
        fsync(handle)

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        stream(any_model, tmp_path)
    assert len(ActivationStore.open(tmp_path)) == 4
    assert not list(tmp_path.glob(".*.tmp"))
    assert len(stream(any_model, tmp_path)) == 11


def test_the_callback_shrinks_what_is_stored(any_model, tmp_path) -> None:
    last = ActivationCaching("blocks.1.hook_resid_post$", callback=lambda a: a[:, -1].half())
    store = stream(any_model, tmp_path, caching=last)

    assert store[3]["blocks.1.hook_resid_post"].shape == (32,)
    assert store[3]["blocks.1.hook_resid_post"].dtype == torch.float16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompts": PROMPTS[::-1]}, "the inputs are not those of shard-000000"),
        ({"prompts": PROMPTS[:6]}, "the inputs are not those of shard-000001"),
        ({"prompts": [*PROMPTS, PROMPTS[0]]}, "the inputs are not those of shard-000002|fewer inputs"),
        ({"batch_size": 5}, "something else .batch_size: 4 there, 5 now"),
        ({"caching": ActivationCaching("hook_resid_pre$")}, "something else .names: "),
    ],
)
def test_a_folder_of_something_else(any_model, tmp_path, change, message) -> None:
    stream(any_model, tmp_path)
    with pytest.raises(PatchingError, match=message):
        stream(any_model, tmp_path, **change)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("manifest.json", "{", "manifest.json does not read: .*remove the folder, and cache"),
        ("manifest.json", '{"format": 1}', "manifest.json does not say what was written there"),
        ("manifest.json", '{"format": 2}', "has format 2; this version reads 1"),
        ("shard-000000.safetensors", "half", "shard-000000.safetensors does not read: .*remove the folder"),
    ],
)
def test_a_damaged_store(any_model, tmp_path, name, content, message) -> None:
    stream(any_model, tmp_path)
    (tmp_path / name).write_text(content)
    with pytest.raises(PatchingError, match=message):
        ActivationStore.open(tmp_path)[0]


def test_a_folder_of_another_model(tmp_path) -> None:
    stream(model_of("native"), tmp_path)
    with pytest.raises(PatchingError, match="something else .*model: "):
        stream(model_of("bridged-gpt2"), tmp_path)


def test_what_cannot_be_streamed(any_model, tmp_path) -> None:
    with pytest.raises(PatchingError, match="gradients need a score"):
        stream(any_model, tmp_path, caching=ActivationCaching(PLACES, directions=["bwd"]))
    with pytest.raises(PatchingError, match="callback must keep the batch axis"):
        stream(any_model, tmp_path, caching=ActivationCaching(PLACES, callback=lambda a: a.mean(0)))
    with pytest.raises(PatchingError, match="batch_size=0"):
        stream(any_model, tmp_path, batch_size=0)
    with pytest.raises(PatchingError, match="holds no activation store"):
        ActivationStore.open(tmp_path / "nowhere")
    with pytest.raises(PatchingError, match="prompt 11 does not exist: the store has 11"):
        stream(any_model, tmp_path / "s")[11]


def test_nothing_is_left_behind(any_model, tmp_path) -> None:
    before = state_of(any_model)
    with pytest.raises(StopError):
        CACHING.stream(any_model, stopping_after(6), tmp_path, batch_size=4, progress=False)
    assert_same(before, state_of(any_model))
    assert [path.name for path in tmp_path.glob(".*")] == [files.LOCK]


# Maximally activating examples


def by_hand(model, name, value) -> list[tuple[float, int, int]]:
    found = []
    for row, prompt in enumerate(PROMPTS):
        activation = face_of(model).cache(prompt[None], [name])[1][name][0]
        found += [(float(value(activation[pos])), row, pos) for pos in range(len(prompt))]
    return sorted(found, key=lambda item: -item[0])


DIRECTION = torch.randn(32, generator=GENERATOR)


@pytest.mark.parametrize(
    ("name", "options", "value"),
    [
        ("blocks.1.mlp.hook_post", {"neuron": 5}, lambda a: a[5]),
        ("blocks.1.attn.hook_z", {"head": 2}, lambda a: a[2].norm()),
        ("blocks.1.attn.hook_z", {"head": 2, "neuron": 3}, lambda a: a[2, 3]),
        ("blocks.1.hook_resid_post", {"direction": DIRECTION}, lambda a: a @ DIRECTION),
    ],
)
def test_the_most_active_tokens(model, name, options, value) -> None:
    found = maximally_activating(model, iter(PROMPTS), name, k=6, batch_size=3, **options)

    expected = by_hand(model, name, value)[:6]
    assert [(e.row, e.pos) for e in found] == [(row, pos) for _, row, pos in expected]
    np.testing.assert_allclose([e.value for e in found], [v for v, _, _ in expected], rtol=1e-4, atol=1e-5)
    assert found[0].token == face_of(model).str_tokens(PROMPTS[found[0].row])[found[0].pos]
    assert f"«{found[0].token}»" in str(found[0])


def test_a_store_is_read_instead_of_running_the_model(any_model, tmp_path) -> None:
    store = stream(any_model, tmp_path)
    options = dict(direction=DIRECTION, k=5)
    from_model = maximally_activating(any_model, PROMPTS, "blocks.1.hook_resid_post", **options)
    from_store = maximally_activating(any_model, store, "blocks.1.hook_resid_post", **options)

    assert [(e.row, e.pos) for e in from_store] == [(e.row, e.pos) for e in from_model]
    with pytest.raises(SiteError, match="the store holds .* not blocks.1.hook_resid_pre"):
        maximally_activating(any_model, store, "blocks.1.hook_resid_pre", **options)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("blocks.1.hook_resid_post", {}, "say what is active"),
        ("blocks.1.hook_resid_post", {"neuron": 1, "direction": DIRECTION}, "say what is active"),
        ("blocks.1.hook_resid_post", {"neuron": 32}, "neuron 32 does not exist at .*, which has 32"),
        ("blocks.1.hook_resid_post", {"head": 0}, "has no axis of heads"),
        ("blocks.1.attn.hook_z", {"neuron": 0}, "has an axis of heads: say head="),
        ("blocks.1.attn.hook_z", {"head": 4}, "head 4 does not exist"),
        ("blocks.1.hook_resid_post", {"direction": torch.ones(3)}, r"has shape \(32,\), got \(3,\)"),
        ("blocks.1.attn.hook_pattern", {"head": 0}, "lies between two positions"),
        ("blocks.1.hook_resid_pst", {"neuron": 0}, "Nearest"),
        ("blocks.1.hook_resid_post", {"neuron": 0, "k": 0}, "k=0 will not do"),
    ],
)
def test_what_is_not_active(any_model, name, options, message) -> None:
    with pytest.raises(PatchingError, match=message):
        maximally_activating(any_model, PROMPTS, name, **options)


# Attention patterns


def test_attention_patterns_as_numbers(model) -> None:
    view = attention_patterns(model, PROMPTS[2], layers=[0, 2], heads=[3, 1])

    expected = face_of(model).cache(PROMPTS[2][None], ["blocks.2.attn.hook_pattern"])[1]
    pattern = expected["blocks.2.attn.hook_pattern"][0].detach()
    np.testing.assert_allclose(view.values[1, 0], pattern[3], atol=1e-6)
    np.testing.assert_allclose(view.values.sum(-1), 1, atol=1e-5)
    frame = view.to_frame()
    assert len(frame) == 2 * 2 * 6 * 7 / 2, "what the causal mask hides is left out"
    first = view.attended(-1, k=1).iloc[0]
    assert first.attention == pytest.approx(view.values[:, :, -1].max())
    assert first.src_token == view.tokens[first.src_pos]


def test_attention_that_does_not_exist(any_model) -> None:
    with pytest.raises(SiteError, match="layer 3, head 4: the model has 3 layers of 4 heads"):
        attention_patterns(any_model, PROMPTS[0], layers=[3], heads=[4])
    with pytest.raises(PatchingError, match="shows one prompt, got 2"):
        attention_patterns(any_model, torch.stack([PROMPTS[0], PROMPTS[3]]))
    with pytest.raises(SiteError, match="dest_pos=9 is outside the prompt, which has 4"):
        attention_patterns(any_model, PROMPTS[0]).attended(9)
    with pytest.raises(PatchingError, match="TransformerLens models"):
        attention_patterns(torch.nn.Linear(2, 2), PROMPTS[0])
    with pytest.raises(ModelError):
        attention_patterns("gpt2", PROMPTS[0])

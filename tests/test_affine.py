"""Affine maps: packed weights give the plain product."""

import pytest
import torch
from torch.testing import assert_close

from patching.models import affine
from patching.models.affine import Affine

can_pack = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="this torch is built without oneDNN"
)


@pytest.fixture(autouse=True)
def pack_small_weights_too(monkeypatch):
    monkeypatch.setattr(affine, "LARGE", 1)


@can_pack
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(5, 8), (2, 3, 4, 8), (0, 8), (1, 8)])
@pytest.mark.parametrize("part", [slice(None), slice(3, 9)])
def test_packed_is_plain(bias, shape, part):
    """Also of some columns of a wider matrix."""
    torch.manual_seed(0)
    weight, x = torch.randn(8, 12)[:, part], torch.randn(shape)
    b = torch.randn(weight.shape[1]) if bias else None
    packed = Affine(weight, b, often=True)

    assert packed.often
    expected = x.double() @ weight.double() + (0 if b is None else b.double())
    assert_close(packed(x), expected.float(), rtol=1e-5, atol=1e-5)
    assert_close(Affine(weight, b)(x), expected.float(), rtol=1e-5, atol=1e-5)


@can_pack
def test_rows_that_are_no_whole_tensor():
    x = torch.randn(4, 6, 16)[:, ::2, :8]
    weight = torch.randn(8, 5)
    assert_close(Affine(weight, None, often=True)(x), x @ weight)


def test_only_float32_is_packed():
    weight = torch.randn(8, 12, dtype=torch.float64)
    assert not Affine(weight, None, often=True).often


@can_pack
def test_not_where_onednn_is_switched_off():
    with torch.backends.mkldnn.flags(enabled=False):
        assert not Affine(torch.randn(8, 12), None, often=True).often


@can_pack
def test_small_weights_are_not_worth_it(monkeypatch):
    monkeypatch.setattr(affine, "LARGE", 8 * 12)
    assert Affine(torch.randn(8, 12), None, often=True).often
    assert not Affine(torch.randn(8, 11), None, often=True).often

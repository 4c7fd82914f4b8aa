"""The kernels as operations of torch: what torch.compile asks of them, and every way to multiply beside the others."""

from __future__ import annotations

import pytest
import torch
from format_samples import make_layer
from layer_samples import LAYERS
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

import qtool
from formats.encoding import encoding_of
from formats.errors import FormatError, KernelError
from formats.kernels.ops import from_tag, linear, rows, tag_of
from formats.kernels.registry import MODULES, load_kernels
from formats.layer import Layer, dequantize
from formats.modules import QuantLinear
from formats.section import pack

all_layers = pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)


def section_of(layer: Layer) -> Tensor:
    return torch.frombuffer(bytearray(pack(layer)), dtype=torch.uint8)


def tag(layer: Layer) -> str:
    return tag_of(encoding_of(layer), layer.shape)


@all_layers
def test_a_tag_gives_the_encoding_back(layer):
    assert from_tag(tag(layer)) == (encoding_of(layer), layer.shape)


def test_a_tag_of_no_matrix_is_refused():
    with pytest.raises(FormatError, match=r"^dense: is no matrix$"):
        from_tag('[{"encoding": "dense", "dtype": "F16"}, [3]]')


@all_layers
def test_the_operations_are_what_torch_takes_them_for(layer):
    """Schema, fake tensors and dispatch, as torch itself checks them."""
    section, x = section_of(layer), torch.linspace(-1, 1, 6 * layer.in_features).view(2, 3, -1)
    torch.library.opcheck(linear, (x, section, tag(layer)))
    torch.library.opcheck(rows, (torch.tensor([[0, 1], [1, 0]]), section, tag(layer)))


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_linear_compiles_into_one_graph(dynamic):
    layer = make_layer(50, 70, 3, 32, scaled=True)
    module = QuantLinear(section_of(layer), layer.shape, encoding_of(layer), torch.linspace(-1, 1, 50))
    compiled = torch.compile(module, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for n in (1, 5):
        x = torch.linspace(-1, 1, n * 70).view(n, 70)
        assert torch.equal(compiled(x), module(x))


@torch.no_grad()
def test_a_model_compiles_into_one_graph(tiny_files):
    model, ids = qtool.load(tiny_files.compressed("llama")), torch.arange(24).view(2, 12)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(ids, use_cache=False).logits, model(ids, use_cache=False).logits)


@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize("n_tokens", [1, 8, 16])
def test_no_launch_waits_for_what_a_tensor_holds(layer, n_tokens, monkeypatch):
    """Fake tensors hold nothing, so that to ask for a value, for which a host would wait, is an error."""
    interpreter = pytest.importorskip("triton.runtime.interpreter", reason="pip install 'qtool[cuda]'")
    monkeypatch.setattr(interpreter.InterpretedFunction, "run", lambda *args, **options: None)
    kernels, encoding, shape = load_kernels("cuda"), encoding_of(layer), layer.shape
    kernels.multiply(torch.ones(1, shape[1]), section_of(layer), encoding, shape)  # tables are made once
    with FakeTensorMode():
        section = torch.empty(encoding.section_bytes(shape), dtype=torch.uint8)
        x, ids = torch.empty((n_tokens, shape[1]), dtype=torch.float16), torch.zeros(n_tokens, dtype=torch.int64)
        assert kernels.multiply(x, section, encoding, shape).shape == (n_tokens, shape[0])
        assert kernels.decode_rows(section, ids, encoding, shape).shape == (n_tokens, shape[1])
        assert kernels.decode(section, encoding, shape, torch.float16).shape == shape
        with pytest.raises(DataDependentOutputException):
            x.sum().item()


@all_layers
@pytest.mark.parametrize("name", MODULES)
def test_every_kernel_has_the_reference_s_numbers(layer, name):
    if name == "cuda":
        pytest.importorskip("triton", reason="the GPU kernels need triton: pip install 'qtool[cuda]'")
    kernels, section, want = load_kernels(name), section_of(layer), torch.from_numpy(dequantize(layer))
    where = encoding_of(layer), layer.shape
    ids = torch.tensor([layer.out_features - 1, 0, 0])
    assert torch.equal(kernels.decode(section, *where, torch.float32), want)
    assert torch.equal(kernels.decode_rows(section, ids, *where), want[ids])
    x = torch.linspace(-1, 1, 3 * layer.in_features).view(3, -1)
    # fp32: a rounding a product, a sum and a plane, of terms that code and zero make eight times the weight at most.
    bound = (layer.in_features + 9) * 2.0**-20 * (x.abs() @ want.abs().T + 1)
    assert ((kernels.multiply(x, section, *where) - x @ want.T).abs() <= bound).all()


@pytest.mark.parametrize("name", ["cpu", "cuda"])
def test_views_are_taken_for_what_they_are(monkeypatch, name):
    """The last token of every sequence, as `generate` asks for, is no row behind the other."""
    load_kernels.cache_clear()
    monkeypatch.setitem(MODULES, "cpu", MODULES[name])
    layer = make_layer(50, 70, 3, 32)
    section, want = section_of(layer), torch.from_numpy(dequantize(layer))
    x = torch.linspace(-1, 1, 2 * 5 * 70).view(2, 5, 70)[:, -1:]
    ids = torch.arange(12).view(2, 6)[:, ::2]
    assert not x.is_contiguous() and not ids.is_contiguous()
    torch.testing.assert_close(linear(x, section, tag(layer)), x @ want.T, rtol=1e-4, atol=1e-4)
    assert torch.equal(rows(ids, section, tag(layer)), want[ids])
    load_kernels.cache_clear()


def test_activations_have_a_gradient():
    layer = make_layer(50, 70, 3, 32, scaled=True)
    x = torch.linspace(-1, 1, 3 * 70).view(3, 70).requires_grad_()
    y = linear(x, section_of(layer), tag(layer))
    (gradient,) = torch.autograd.grad(y.square().sum(), x)
    want = 2 * y.detach() @ torch.from_numpy(dequantize(layer))
    torch.testing.assert_close(gradient, want)


def test_a_device_without_kernels_is_named():
    with pytest.raises(KernelError, match=r"^device 'mps': there are no kernels for it; use cpu or cuda$"):
        load_kernels("mps")

"""What an error in a weight costs: against gradients of the whole model, and against what errors do cost."""

import pytest
import torch
from tiny import EXPERTS, FAMILIES, load_reference
from torch.nn.functional import cross_entropy, kl_div

from formats.skeleton import is_linear, is_transposed_linear
from qtool.checkpoint import open_checkpoint
from qtool.errors import ConfigError, QuantizeError
from qtool.model import BlockwiseModel
from qtool.numerics import exact_float32
from qtool.sensitivity import SEED, Gradients, windows_backward
from qtool.seq2seq import blockwise_model
from qtool.states import HiddenStates

SEQ_LEN = 24


@pytest.fixture(params=[*FAMILIES, "mixtral"])
def family(request):
    return request.param


def random_ids(n=6):
    return torch.randint(0, 256, (n, SEQ_LEN), generator=torch.Generator().manual_seed(1))


def measure(folder, ids, tmp_path, windows_per_batch=1):
    """(costs by layer, cost of the head, costs of the embedding's rows); every file is gone then."""
    with exact_float32():
        model = blockwise_model(open_checkpoint(str(folder)))
        gradients = Gradients(model, ids, tmp_path, windows_per_batch)
        checksums = gradients.write()
        gradients.check(checksums, 0)
        lookups, states = gradients.costs_of_lookups(), HiddenStates(tmp_path, ids, windows_per_batch)
        with model.outside(head=False):
            states.write(0, map(model.embed, states.batches))
        costs = {}
        for index in range(len(model.blocks)):
            with model.block(index):
                costs |= gradients.costs(index, states.read(index))
                states.write(index + 1, (model.run(index, x) for x in states.read(index)))
            gradients.remove(index)
        assert {path.name for path in tmp_path.iterdir()} == {"states.0", "states.1"}
        return costs, gradients.cost_of_head(), lookups


def gradients_of_the_model(model, ids):
    """Of the tokens that we draw in each window: at the embedding's output, and of every linear (input, at output)."""
    generator, embedding = torch.Generator().manual_seed(SEED), model.get_input_embeddings()
    names = {id(module): name for name, module in model.named_modules()}
    for window in ids:
        calls, rows = {}, []

        def note(module, args, output, calls=calls):
            output.retain_grad()
            calls.setdefault(names[id(module)], []).append((args[0].detach(), output))

        def start(module, args, output, rows=rows):
            rows.append(output.detach().requires_grad_())
            return rows[0]

        hooks = [m.register_forward_hook(note) for m in model.modules() if is_linear(m)]
        hooks.append(embedding.register_forward_hook(start))
        logits = model(window[None]).logits[0]
        drawn = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)[:, 0]
        cross_entropy(logits, drawn, reduction="sum").backward()
        for hook in hooks:
            hook.remove()
        yield window, rows[0].grad[0], {n: [(x, y.grad) for x, y in c if y.grad is not None] for n, c in calls.items()}


def test_it_is_what_gradients_of_the_whole_model_say(tiny_files, family, tmp_path):
    folder, ids = tiny_files.model(family), random_ids()
    costs, head, lookups = measure(folder, ids, tmp_path)
    model = load_reference(folder).requires_grad_(False)
    fused = {name for name in costs if ".experts." in name}  # transformers has no linear for each expert
    assert bool(fused) == (family in EXPERTS)
    costs = {name: cost for name, cost in costs.items() if name not in fused}
    head_name = next(name for name, m in model.named_modules() if m is model.get_output_embeddings())
    want, want_lookups = {}, torch.zeros(len(lookups))
    want_head = torch.zeros_like(head.inputs), torch.zeros_like(head.outputs)
    for window, rows, calls in gradients_of_the_model(model, ids):
        for name in costs.keys() & calls.keys():
            gradient = sum(g.flatten(0, -2).T @ x.flatten(0, -2) for x, g in calls[name])  # [out, in]
            inputs, outputs = want.get(name, (0.0, 0.0))
            want[name] = inputs + gradient.T @ gradient, outputs + gradient.square().sum(1)
        [(x, g)] = ((x.flatten(0, -2), g.flatten(0, -2)) for x, g in calls[head_name])
        want_head[0].add_(x.T @ (g.square().sum(1, keepdim=True) * x))
        want_head[1].add_(g.square().sum(0))
        for token in window.unique():
            want_lookups[token] += rows[window == token].sum(0).square().mean()
    scale, factor = 0.5 / ids.numel(), float(getattr(model.get_input_embeddings(), "scalar_embed_scale", 1.0))
    assert want.keys() == costs.keys() and costs
    for got, (inputs, outputs) in [*((costs[name], want[name]) for name in want), (head, want_head)]:
        torch.testing.assert_close(got.inputs, scale * inputs, rtol=5e-3, atol=1e-3 * float(scale * inputs.abs().max()))
        torch.testing.assert_close(got.outputs, outputs / outputs.sum(), rtol=5e-3, atol=1e-5)
    torch.testing.assert_close(lookups, scale * factor**2 * want_lookups, rtol=5e-3, atol=1e-9)


def test_a_batch_of_windows_gives_one_gradient(tiny_files, tmp_path):
    """Which costs as much as its windows apart, but for chance: they are drawn independently."""
    one, three = (measure(tiny_files.model("llama"), random_ids(60), tmp_path, n)[0] for n in (1, 3))
    for name, cost in one.items():
        assert three[name].inputs.trace().item() == pytest.approx(cost.inputs.trace().item(), rel=0.3)


def logits_of(model, ids):
    """At all predicted tokens; an encoder-decoder's are those of the second half."""
    encoder, labels = ids.tensor_split([ids.shape[1] // 2], dim=1)
    return (
        model(input_ids=encoder, labels=labels.contiguous()) if model.config.is_encoder_decoder else model(ids)
    ).logits


def divergence(model, ids, before):
    """In nats for each of them."""
    after = logits_of(model, ids).log_softmax(-1)
    return kl_div(after, before, log_target=True, reduction="sum").item() / after[..., 0].numel()


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "t5"])
def test_errors_of_rows_that_are_looked_up_cost_what_is_said(tiny_files, tmp_path, family):
    """Gemma multiplies them by sqrt(hidden) first; of T5, both stacks read the same."""
    folder, ids = tiny_files.model(family), random_ids(40)
    lookups = measure(folder, ids, tmp_path)[2]
    model, generator = load_reference(folder).requires_grad_(False), torch.Generator().manual_seed(2)
    model.get_output_embeddings().weight = torch.nn.Parameter(model.get_output_embeddings().weight.clone())
    before, weight = logits_of(model, ids).log_softmax(-1), model.get_input_embeddings().weight
    error = 0.02 * weight.std() * torch.randn(weight.shape, generator=generator)
    weight.data.add_(error)
    true = divergence(model, ids, before)
    assert float(lookups @ error.square().sum(1)) == pytest.approx(true, rel=0.25)


@pytest.mark.parametrize("family", [*FAMILIES, "t5"])  # with experts, the least error can choose another
def test_small_errors_cost_what_is_said(tiny_files, family, tmp_path):
    """The Fisher information is the curvature of the KL divergence; one draw a token is what blurs it."""
    folder, ids = tiny_files.model(family), random_ids(40)
    costs = measure(folder, ids, tmp_path)[0]
    model, generator = load_reference(folder).requires_grad_(False), torch.Generator().manual_seed(2)
    before, said, true = logits_of(model, ids).log_softmax(-1), 0.0, 0.0
    for name, cost in costs.items():
        module = model.get_submodule(name)
        weight = module.weight.clone()
        error = 0.02 * weight.std() * torch.randn(weight.shape, generator=generator)
        module.weight.add_(error)
        true += divergence(model, ids, before)
        module.weight.copy_(weight)
        said += cost.of(error.T if is_transposed_linear(module) else error, cost.outputs)
    assert said == pytest.approx(true, rel=0.25)


def test_files_that_are_not_what_was_written_are_refused(tiny_files, tmp_path):
    with exact_float32():
        gradients = Gradients(
            BlockwiseModel(open_checkpoint(str(tiny_files.model("llama")))), random_ids(), tmp_path, 1
        )
        checksums = gradients.write()
        with open(tmp_path / "gradient.1", "r+b") as file:
            file.write(b"damaged.")
        gradients.check(checksums, 1)  # which block 0 alone reads
        with pytest.raises(ConfigError, match=r"gradient\.1: damaged"):
            gradients.check(checksums, 0)


def test_whole_batches_are_run_backward():
    assert windows_backward(1024, 1) == windows_backward(2048, 1) == windows_backward(1 << 20, 1) == 4
    assert windows_backward(256, 4) == 16 and windows_backward(1, 1000) == 4000


def test_a_block_without_gradients_is_refused(tiny_files, tmp_path, monkeypatch):
    run = BlockwiseModel.run
    monkeypatch.setattr(BlockwiseModel, "run", lambda self, index, x: run(self, index, x).detach())
    with pytest.raises(QuantizeError) as found:
        measure(tiny_files.model("llama"), random_ids(), tmp_path)
    assert str(found.value) == (
        "model.layers.2: its gradients cannot be computed, which a target is measured by "
        "(element 0 of tensors does not require grad and does not have a grad_fn); give --bits"
    )


@pytest.mark.parametrize("inside", [False, True], ids=["behind a block", "in a block"])
def test_tokens_that_overflow_count_nothing(tiny_files, tmp_path, monkeypatch, inside):
    """The last token of every window: nothing else becomes NaN, and nothing costs nothing, for it."""
    run = BlockwiseModel.run

    def overflowing(self, index, hidden):
        if index != 1:
            return run(self, index, hidden)
        last = torch.zeros(*hidden.shape[:2], 1)
        last[:, -1] = float("inf")
        if not inside:
            return torch.where(last > 0, last, run(self, index, hidden))
        hook = self.blocks[1].mlp.up_proj.register_forward_pre_hook(lambda module, args: (args[0] + last,))
        try:
            return run(self, index, hidden)
        finally:
            hook.remove()

    monkeypatch.setattr(BlockwiseModel, "run", overflowing)
    costs, head, lookups = measure(tiny_files.model("llama"), random_ids(), tmp_path)
    for cost in [*costs.values(), head]:
        assert torch.isfinite(cost.inputs).all() and cost.inputs.diagonal().min() > 0
        assert cost.outputs.sum().item() == pytest.approx(1.0, rel=1e-4)
    assert lookups.isfinite().all() and lookups.sum() > 0

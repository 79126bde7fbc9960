"""Zeros leave the training as sparse tensors, as masks of torch.nn.utils.prune, or as a smaller network."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from cases import DEVICE
from torch import nn
from torch.func import functional_call, grad
from torch.nn.utils import parametrizations, prune

import funcreg as fr

ON_GPU = torch.device(DEVICE).type == "cuda"


def sparse_net(share=0.9, dtype=torch.float64):
    """A network whose matrices have a share of zeros, and biases that have one entry of zero."""
    net = nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 16)).to(dtype)
    with torch.no_grad():
        for w in net.parameters():
            w.masked_fill_(torch.rand(w.shape) < share, 0) if w.ndim == 2 else w[:1].zero_()
    return net.to(DEVICE)


def batch(*shape, dtype=torch.float64):
    return torch.randn(shape, dtype=dtype).to(DEVICE)


def saved(tree):
    file = io.BytesIO()
    torch.save(tree, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


# Sparse layouts


def test_a_sparse_tree_computes_what_the_dense_one_computes():
    net, x = sparse_net(), batch(5, 32)
    params = dict(net.named_parameters())
    sparse = fr.to_sparse(params)
    assert {name: w.layout for name, w in sparse.items() if w.layout != torch.strided} == {
        "0.weight": torch.sparse_csr,
        "2.weight": torch.sparse_csr,
    }
    assert not any(w.requires_grad for w in sparse.values())
    torch.testing.assert_close(functional_call(net, sparse, (x,)), net(x).detach())
    for name, w in params.items():
        torch.testing.assert_close(sparse[name].to_dense(), w.detach(), rtol=0, atol=0)
        assert w.layout == torch.strided  # What was given stays as it was.


def test_a_sparse_tree_becomes_the_parameters_of_a_module_and_is_saved():
    net, x = sparse_net(), batch(2, 5, 32)
    expected = net(x).detach()
    sparse = saved(fr.to_sparse(dict(net.named_parameters())))
    assert sparse["0.weight"].layout == torch.sparse_csr
    net.load_state_dict(sparse, assign=True, strict=False)
    torch.testing.assert_close(net(x).detach(), expected)


@pytest.mark.slow
def test_a_module_with_sparse_weights_compiles():
    net, x = sparse_net(), batch(5, 32)
    expected = net(x).detach()
    net.load_state_dict(fr.to_sparse(dict(net.named_parameters())), assign=True)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(net, backend="aot_eager")(x), expected)  # In several graphs.


@pytest.mark.parametrize(("dtype", "element"), [(torch.float32, 4), (torch.float64, 8), (torch.bfloat16, 2)])
def test_matrices_are_converted_where_they_take_less_memory_then(dtype, element):
    for zeros in range(65):
        w = torch.ones(64, 64, dtype=dtype, device=DEVICE)
        w[:zeros] = 0
        smaller = (64 - zeros) * 64 * (element + 8) + 65 * 8 < 64 * 64 * element
        made = fr.to_sparse({"w": w, "always": torch.zeros(64, 64, device=DEVICE)})["w"]
        assert (made.layout == torch.sparse_csr) == smaller
        if smaller:
            parts = (made.values(), made.crow_indices(), made.col_indices())
            assert sum(x.numel() * x.element_size() for x in parts) < w.numel() * w.element_size()


def test_what_is_no_matrix_or_not_chosen_or_not_sparse_enough_stays_as_it_is():
    tree = {"filter": torch.zeros(4, 4, 3, 3), "bias": torch.zeros(9), "a": torch.zeros(9, 9), "b": torch.zeros(9, 9)}
    tree["b"][:2] = 1
    made = fr.to_sparse(tree, mask=fr.select("a", "bias", "filter"))
    assert made["a"].layout == torch.sparse_csr
    assert all(made[name].data_ptr() == tree[name].data_ptr() for name in ("filter", "bias", "b"))
    layouts = {name: w.layout for name, w in fr.to_sparse(tree, min_sparsity=0.9).items()}
    assert layouts["a"] == torch.sparse_csr
    assert layouts["b"] == torch.strided


def test_layers_that_cannot_compute_with_sparse_weights_are_left_out_by_type():
    net = nn.Sequential(nn.Embedding(50, 32), nn.Linear(32, 16)).to(DEVICE)
    with torch.no_grad():
        for w in (net[0].weight, net[1].weight):
            w[2:] = 0
    tokens = torch.tensor([0, 1, 7]).to(DEVICE)
    sparse = fr.to_sparse(dict(net.named_parameters()), mask=fr.select(nn.Linear, module=net))
    assert sparse["0.weight"].layout == torch.strided
    torch.testing.assert_close(functional_call(net, sparse, (tokens,)), net(tokens).detach())


def test_nothing_to_convert_is_a_warning_and_with_a_mask_an_error():
    dense = {"a": torch.ones(8, 8), "bias": torch.zeros(8)}
    with pytest.warns(UserWarning, match=r"no matrix.*0 of 64 entries are zero.*proximal step"):
        made = fr.to_sparse(dense)
    assert made["a"].layout == torch.strided
    with pytest.raises(ValueError, match=r"no matrix.*8 of 72 entries that the mask chooses are zero"):
        fr.to_sparse(dense, mask=fr.select("*"))
    with pytest.warns(UserWarning, match="found no matrix"):
        fr.to_sparse({"bias": torch.zeros(3)})
    with pytest.warns(UserWarning, match="found no matrix"):
        fr.to_sparse({"few": torch.eye(2)})


def test_what_cannot_be_meant_is_refused():
    tree = {"a": torch.zeros(32, 32)}
    with pytest.raises(TypeError, match=r'layout is torch.sparse_coo; expected torch.sparse_csr or "2:4"'):
        fr.to_sparse(tree, torch.sparse_coo)
    with pytest.raises(ValueError, match=r"leaf 'a' is on the cpu; the 2:4 layout needs an NVIDIA GPU"):
        fr.to_sparse(tree, "2:4")
    with pytest.raises(ValueError, match="min_sparsity"):
        fr.to_sparse(tree, min_sparsity=90)
    with pytest.raises(TypeError, match=r"named_parameters|generator|Module|leaf"):
        fr.to_sparse(nn.Linear(2, 2))


@pytest.mark.skipif(not ON_GPU, reason="PyTorch has the 2:4 layout for NVIDIA GPUs alone")
def test_the_pattern_of_sparse_hardware_computes_what_the_dense_matrices_compute():
    net = sparse_net(0.0, torch.float16)
    tree = dict(net.named_parameters())
    with pytest.warns(UserWarning, match="found no matrix"):
        assert type(fr.to_sparse(tree, "2:4")["0.weight"]) is torch.Tensor
    pruned = fr.n_m_sparsity.prox({name: w.detach() for name, w in tree.items()}, 1.0, mask=fr.matrices)
    sparse, x = fr.to_sparse(pruned, "2:4"), batch(64, 32, dtype=torch.float16)
    assert isinstance(sparse["0.weight"], torch.sparse.SparseSemiStructuredTensor)
    with torch.no_grad():
        made, expected = functional_call(net, sparse, (x,)), functional_call(net, pruned, (x,))
    torch.testing.assert_close(made, expected, rtol=1e-2, atol=1e-2)
    with pytest.warns(UserWarning, match=r"left matrices in the 2:4 pattern dense: 'odd' \(.*shape"):
        fr.to_sparse({"odd": torch.zeros(3, 4, device=DEVICE, dtype=torch.float16)}, "2:4")


@pytest.mark.skipif(not ON_GPU, reason="PyTorch has the 2:4 layout for NVIDIA GPUs alone")
def test_a_matrix_that_breaks_the_pattern_in_one_place_stays_dense():
    w = torch.tensor([1.0, 1.0, 0.0, 0.0]).tile(64, 16).half().to(DEVICE)
    fine = w.clone()
    w[5, 11] = 1.0
    w[5, 10] = 1.0
    assert isinstance(fr.to_sparse({"fine": fine}, "2:4")["fine"], torch.sparse.SparseSemiStructuredTensor)
    w[5, 8] = 1.0
    assert type(fr.to_sparse({"w": w, "fine": fine}, "2:4")["w"]) is torch.Tensor


# Masks of torch.nn.utils.prune


def test_zeros_become_masks_and_stay_zero_in_training():
    net, x = sparse_net(), batch(64, 32)
    before = {name: w.detach().clone() for name, w in net.named_parameters()}
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.1)  # Made before, and right after.
    expected = net(x).detach()
    assert fr.to_prune(net) is net
    assert prune.is_pruned(net)
    assert {name for name, _ in net.named_buffers()} == {"0.weight_mask", "2.weight_mask"}  # Biases are left alone.
    torch.testing.assert_close(net(x).detach(), expected, rtol=0, atol=0)
    for _ in range(5):
        optimizer.zero_grad()
        net(x).square().mean().backward()
        optimizer.step()
    for layer in (net[0], net[2]):
        prune.remove(layer, "weight")
    for name in ("0.weight", "2.weight"):
        after = net.get_parameter(name).detach()
        assert torch.equal(after == 0, before[name] == 0)
        assert not torch.equal(after, before[name])


def test_attention_whose_projection_is_read_without_a_call_trains_and_loads():
    make = lambda: nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, device="cpu").to(DEVICE, torch.float64)
    net, other, x = make(), make(), batch(4, 8)[:, None]
    for each in (net, other):
        with torch.no_grad():
            each.self_attn.out_proj.weight[:, ::2] = 0
        fr.to_prune(fr.to_prune(each))
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        net(x).square().mean().backward()
        optimizer.step()
    other.load_state_dict(net.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(other(x), net(x))
    copied = copy.deepcopy(other)
    prune.remove(net.self_attn.out_proj, "weight")
    assert not net.self_attn.out_proj.weight[:, ::2].any()
    torch.testing.assert_close(copied.eval()(x), net.eval()(x))


def test_a_module_that_is_pruned_already_gets_the_new_zeros_besides():
    net = sparse_net(0.0)
    prune.l1_unstructured(net[0], "weight", amount=0.5)
    old = net[0].weight_mask.clone()
    with torch.no_grad():
        net[0].weight_orig[3] = 0
    fr.to_prune(net)
    new = old.clone()
    new[3] = 0
    assert torch.equal(net[0].weight_mask, new)
    assert not prune.is_pruned(net[2])  # It has no zeros.


def test_a_mask_chooses_what_is_pruned():
    net = sparse_net()
    fr.to_prune(net, mask=fr.select("0.*"))
    assert {name for name, _ in net.named_buffers()} == {"0.weight_mask", "0.bias_mask"}
    with pytest.raises(ValueError, match=r"nothing to prune in Linear: 0 of 2 entries that the mask chooses are"):
        fr.to_prune(nn.Linear(2, 1), mask=fr.select("weight"))
    with pytest.warns(UserWarning, match=r"nothing to prune in Linear: 0 of 4 entries are zero"):
        fr.to_prune(nn.Linear(2, 2))
    with pytest.raises(TypeError, match=r"module is a dict; expected a torch.nn.Module"):
        fr.to_prune(dict(net.named_parameters()))


def test_zeros_inside_a_parametrization_are_refused_and_nothing_is_changed():
    net = nn.Sequential(nn.Linear(2, 2), parametrizations.weight_norm(nn.Linear(2, 2)))
    with torch.no_grad():
        net[0].weight[0] = 0
        net[1].parametrizations.weight.original1[0] = 0
    with pytest.raises(ValueError, match=r"'1.parametrizations.weight.original1' is inside a parametrization"):
        fr.to_prune(net)
    assert not prune.is_pruned(net)


@pytest.mark.parametrize(
    "how",
    [
        lambda net: prune.l1_unstructured(net[0], "weight", amount=0.5),
        lambda net: prune.ln_structured(net[2], "weight", amount=0.25, n=2, dim=0),
        lambda net: prune.global_unstructured([(net[0], "weight"), (net[2], "bias")], prune.L1Unstructured, amount=9),
        lambda net: [prune.random_unstructured(net[0], "weight", amount=0.2) for _ in range(2)],
    ],
)
def test_a_pruned_module_gives_the_parameters_that_it_computes_with(how):
    net, x = sparse_net(0.0), batch(5, 32)
    plain = copy.deepcopy(net)
    how(net)
    with torch.no_grad():
        for w in net.parameters():
            w.add_(0.1)  # The effective weights are made anew in the next forward.
    params, kept = fr.from_prune(net)
    assert list(params) == list(kept)
    assert set(params) == {name for name, _ in plain.named_parameters()}
    torch.testing.assert_close(functional_call(plain, params, (x,)), net(x), rtol=0, atol=0)
    for name, here in kept.items():
        assert here.dtype == torch.bool
        assert not params[name][~here].any()
    plain.load_state_dict(params)
    torch.testing.assert_close(plain(x), net(x), rtol=0, atol=0)


def test_a_pruned_module_is_counted_and_reported_by_what_it_computes_with():
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    prune.l1_unstructured(net[0], "weight", 0.5)
    assert fr.sparsity(net, mask=fr.select("0.weight")) == 0.5
    assert [row["name"] for row in fr.report(net).rows if row["zeros"]] == ["0.weight"]
    assert fr.sparsity(dict(net.named_parameters())) == 0


def test_masks_go_there_and_back():
    net = sparse_net()
    plain = {name: w.detach().clone() for name, w in net.named_parameters()}
    params, kept = fr.from_prune(fr.to_prune(net))
    for name, w in plain.items():
        assert torch.equal(params[name], w)
        assert torch.equal(kept[name], w != 0) or w.ndim < 2


def test_a_chain_trains_what_pruning_kept():
    net, x = sparse_net(0.0), batch(64, 32)
    plain = copy.deepcopy(net)
    prune.l1_unstructured(net[0], "weight", amount=0.5)
    params, kept = fr.from_prune(net)
    bound = fr.tree_map(lambda here: torch.where(here, torch.inf, 0.0), kept)
    tx = fr.chain(fr.adamw(0.1), fr.project(fr.box, fr.tree_map(torch.neg, bound), bound))
    state = tx.init(params)
    for _ in range(5):
        grads = grad(lambda params: functional_call(plain, params, (x,)).square().mean())(params)
        updates, state = tx.update(grads, state, params)
        params = fr.apply_updates(params, updates)
    assert torch.equal(params["0.weight"] != 0, kept["0.weight"])


def test_tied_parameters_are_pruned_and_read_as_one():
    net = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)).to(DEVICE)
    net[2].weight = net[0].weight
    with torch.no_grad():
        net[0].weight[:, 2] = 0
    plain, x = copy.deepcopy(net), batch(3, 4, dtype=torch.float32)
    fr.to_prune(net)
    assert net[2].weight_orig is net[0].weight_orig
    params, _ = fr.from_prune(net)
    assert set(params) == {"0.weight", "0.bias", "2.bias"}
    torch.testing.assert_close(functional_call(plain, params, (x,)), net(x))


def test_a_module_that_is_not_pruned_is_an_error():
    with pytest.raises(ValueError, match=r"of which nothing is pruned.*weight, bias.*prune.remove"):
        fr.from_prune(nn.Linear(2, 2))
    assert fr.Pruned({}, {}).kept == {}


# A smaller network


def trained():
    """A convolutional network with dead channels, and the smaller one without them."""
    net = nn.Sequential(
        nn.Conv2d(1, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 16, 4)
    ).to(DEVICE)
    for _ in range(3):
        net(batch(8, 1, 6, 6, dtype=torch.float32))
    channels = fr.channel_groups(net)
    tree = {**dict(net.named_parameters()), **dict(net.named_buffers())}
    with torch.no_grad():
        for name, dead in (("0.weight", ...), ("1.weight", ...), ("1.bias", ...)):
            tree[name][[0, 3]] = 0 * tree[name][[0, 3]][dead]
        tree["4.weight"].view(4, 6, 16)[:, [0, 3]] = 0
    return net.eval(), fr.resized(net, fr.remove_dead(tree, channels)).eval()


def test_the_state_of_a_smaller_net_is_a_plain_state_dict():
    net, smaller = trained()
    x = batch(5, 1, 6, 6, dtype=torch.float32)
    state = saved(smaller.state_dict())
    assert state["0.weight"].shape[0] == 4
    fresh = copy.deepcopy(net)
    fresh.apply(lambda layer: layer.reset_parameters() if hasattr(layer, "reset_parameters") else None)
    for made in (
        fr.resized(fresh, state),
        copy.deepcopy(smaller),
    ):  # From the code of the large one alone, or as it is.
        made.load_state_dict(state)
        assert torch.equal(made.eval()(x), smaller(x))
    torch.testing.assert_close(smaller(x), net(x))


def test_a_smaller_net_is_exported_and_compiled():
    net, smaller = trained()
    x = batch(5, 1, 6, 6, dtype=torch.float32)
    exported = torch.export.export(smaller, (x,), dynamic_shapes=({0: torch.export.Dim.AUTO},))
    assert exported.state_dict["0.weight"].shape[0] == 4
    file = io.BytesIO()
    torch.export.save(exported, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for n in (5, 9):
        x = batch(n, 1, 6, 6, dtype=torch.float32)
        torch.testing.assert_close(loaded(x), net(x))
        torch.testing.assert_close(torch.compile(smaller, backend="aot_eager", fullgraph=True)(x), net(x))


@pytest.mark.slow
def test_a_smaller_net_is_compiled_by_inductor():
    net, smaller = trained()
    x = batch(5, 1, 6, 6, dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(smaller)(x), net(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["weight_norm", "spectral_norm", "orthogonal"])
def test_what_is_counted_of_a_parametrized_module_is_the_weights_that_it_computes_with(kind):
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    getattr(nn.utils.parametrizations, kind)(net[0])
    with torch.no_grad():
        last = list(net[0].parametrizations.weight.parameters(recurse=False))[-1]
        last[1, 1:] = 0
    before = {name: x.clone() for name, x in net.state_dict().items()}
    net.train()
    share = fr.sparsity(net, mask=fr.select("0.weight"))
    assert all(layer.training for layer in net.modules())
    assert all(torch.equal(x, before[name]) for name, x in net.state_dict().items())
    net.eval()
    assert share == (net[0].weight == 0).float().mean()
    assert (share == 0) == (kind == "orthogonal")
    assert sorted(row["name"] for row in fr.report(net).rows) == ["0.bias", "0.weight", "1.bias", "1.weight"]

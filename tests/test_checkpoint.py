"""Checkpoints: what is saved comes back through every format, and what does not fit is named."""

from __future__ import annotations

import copy
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from cases import TRANSFORMS, assert_equal, cpu_only, draw
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

import funcreg as fr

safetensors = pytest.importorskip("safetensors.torch")  # An optional format; the test extra installs it.
every_transform = pytest.mark.parametrize("case", TRANSFORMS.values(), ids=TRANSFORMS)
ROOT = Path(__file__).parent.parent


def by_torch(flat, folder):
    torch.save(flat, folder / "flat.pt")
    return torch.load(folder / "flat.pt", weights_only=True)


def by_safetensors(flat, folder):
    safetensors.save_file(flat, folder / "flat.safetensors")
    return safetensors.load_file(folder / "flat.safetensors")


def by_distributed_checkpoint(flat, folder):
    loaded = {name: torch.zeros_like(x) for name, x in flat.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # It says that there is one process.
        dcp.save(flat, checkpoint_id=folder / "distributed")
        dcp.load(loaded, checkpoint_id=folder / "distributed")
    return loaded


every_format = pytest.mark.parametrize("through", [by_torch, by_safetensors, by_distributed_checkpoint])


def advanced(tx, params, state, begin, count):
    for n in range(begin, begin + count):
        updates, state = tx.update(draw(seed=n + 1), state, params)
        params = fr.apply_updates(params, fr.tree_map(lambda u: 0.1 * u, updates))
    return params, state


def trained(tx, dtype=torch.float32):
    """Parameters and state of a small model after two steps."""
    params = {"layer.weight": torch.randn(3, 4, dtype=dtype), "layer.bias": torch.randn(3, dtype=dtype)}
    state = tx.init(params)
    for _ in range(2):
        updates, state = tx.update(fr.tree_map(torch.randn_like, params), state, params)
        params = fr.apply_updates(params, updates)
    return params, state


CHAIN = lambda: fr.chain(fr.clip(1.0), fr.scale_by_adam(), fr.add_decayed_weights(1e-2, mask=fr.matrices), fr.ema(0.9))


# What is saved


def test_names_say_where_a_leaf_is():
    params, state = trained(CHAIN())
    flat = fr.to_state_dict({"params": params, "state": state, "epoch": 3})
    assert {"state.1.mu.layer.weight", "state.3.ema.layer.bias", "state.1.steps", "params.layer.weight"} < set(flat)
    assert all(isinstance(x, torch.Tensor) and not x.requires_grad and x.is_contiguous() for x in flat.values())
    assert list(fr.to_state_dict(torch.ones(2))) == ["value", "funcreg.version"]


@every_transform
def test_a_run_goes_on_after_a_checkpoint_as_if_unbroken(case, tmp_path):
    tx, start = case.make(), draw()
    params, state = advanced(tx, start, tx.init(start), 0, 2)
    template = (start, case.make().init(start))
    kept = copy.deepcopy(template)
    loaded = fr.from_state_dict(template, by_torch(fr.to_state_dict((params, state)), tmp_path))
    assert_equal(loaded, (params, state))
    assert_equal(template, kept)
    assert_equal(advanced(case.make(), *loaded, 2, 2), advanced(tx, params, state, 2, 2))


@every_format
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_every_format_gives_back_what_it_got(through, dtype, tmp_path):
    tx = CHAIN()
    params, state = trained(tx, dtype)
    tree = {"params": params, "state": state, "epoch": 3, "best": 0.25, "done": False}
    empty = {**tree, "params": fr.tree_map(torch.zeros_like, params), "state": tx.init(params), "epoch": 0, "best": 0.0}
    loaded = fr.from_state_dict(empty, through(fr.to_state_dict(tree), tmp_path))
    assert_equal(loaded, tree)
    assert loaded["epoch"] == 3
    assert loaded["done"] is False


@every_format
def test_leaves_that_share_memory_or_lie_in_more_of_it_are_saved_alone(through, tmp_path):
    whole = torch.arange(64.0)
    tied = torch.ones(2, 3)
    tree = {
        "tied": tied,
        "tied too": tied,
        "part": whole[3:7],
        "transposed": torch.randn(3, 4).T,
        "expanded": torch.ones(1).expand(5),
        "conjugate": torch.randn(2, dtype=torch.complex64).conj(),
        "empty": torch.zeros(0, 3),
        "also empty": torch.zeros(0, 3),
        "parameter": torch.nn.Parameter(torch.ones(2)),
    }
    flat = fr.to_state_dict(tree)
    assert all(x.untyped_storage().nbytes() == x.numel() * x.element_size() for x in flat.values())
    assert flat["tied"].data_ptr() == tied.data_ptr()  # As in Module.state_dict, where that is possible.
    assert_equal(through(flat, tmp_path), {name: x.detach() for name, x in flat.items()})
    loaded = fr.from_state_dict(tree, through(flat, tmp_path))
    assert_equal(loaded, tree)
    assert isinstance(loaded["parameter"], torch.nn.Parameter)
    assert loaded["transposed"].stride() == tree["transposed"].stride()


@pytest.mark.filterwarnings("ignore:fuse got .* steps go uphill")
@every_format
def test_parameters_of_a_step_save_at_their_own_size(through, tmp_path):
    step = fr.fuse(CHAIN(), donate=True, backend="aot_eager")
    params, state = step.init({"a": torch.randn(200, 300), "b": torch.randn(40), "c": torch.randn(3, 3)})
    flat = fr.to_state_dict((params, state))
    assert flat["0.a"].data_ptr() == params["a"].data_ptr()
    size = sum(x.numel() * x.element_size() for x in flat.values())
    assert_equal(fr.from_state_dict((params, state), through(flat, tmp_path)), (params, state))
    written = sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())
    assert size <= written < size + 50_000


def test_a_loaded_tree_shares_memory_with_nothing():
    params, state = trained(CHAIN())
    flat = fr.to_state_dict((params, state))
    loaded = fr.from_state_dict((params, state), flat)
    places = {x.data_ptr() for x in [*flat.values(), *fr.tree_leaves((params, state))]}
    assert not places & {x.data_ptr() for x in fr.tree_leaves(loaded)}


@cpu_only
def test_sharded_leaves_stay_sharded(tmp_path):
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = dist.init_device_mesh("cpu", (1,))
        sharded = distribute_tensor(torch.randn(4, 3), mesh, [Shard(0)])
        tree = {"w": sharded, "w tied": sharded, "plain": torch.ones(2)}
        flat = fr.to_state_dict(tree)
        assert flat["w tied"].to_local().data_ptr() != flat["w"].to_local().data_ptr() == sharded.to_local().data_ptr()
        empty = fr.tree_map(torch.zeros_like, tree)
        for through in (by_torch, by_distributed_checkpoint):
            loaded = fr.from_state_dict(empty, through(flat, tmp_path))
            assert all(isinstance(loaded[name], DTensor) for name in ("w", "w tied"))
            assert loaded["w"].placements == sharded.placements
            assert_equal(loaded["w"].full_tensor(), sharded.full_tensor())
        whole = {name: x.full_tensor() if isinstance(x, DTensor) else x for name, x in flat.items()}
        assert_equal(fr.from_state_dict(empty, whole)["w"].full_tensor(), sharded.full_tensor())
        assert_equal(fr.from_state_dict({**empty, "w": torch.zeros(4, 3)}, flat)["w"], sharded.full_tensor())
    finally:
        dist.destroy_process_group()


# What does not fit


def test_what_does_not_fit_is_named_and_changes_nothing():
    tx = CHAIN()
    _, state = trained(tx)
    flat = fr.to_state_dict(state)
    without = {name: x for name, x in flat.items() if name != "1.mu.layer.bias"}
    other = torch.ones(2, 2)
    wrong = [
        (without, r"lacks 1\.mu\.layer\.bias\. Is it"),
        ({**flat, "1.mu.head": other}, r"has 1\.mu\.head, unknown to the template"),
        ({**flat, "1.mu.layer.bias": other}, r"'1\.mu\.layer\.bias' has shape \(2, 2\); expected \(3,\)"),
        ({**flat, "1.steps": torch.tensor(1.0)}, r"'1\.steps' is a tensor of torch\.float32; expected torch\.int32"),
        ({**flat, "1.steps": 1}, r"'1\.steps' is an int; expected a tensor"),
        (
            fr.to_state_dict(trained(fr.sgd(0.1, 0.9))[1]),
            "lacks 1.steps.*, unknown to the template. Is it the state of",
        ),
        ({**flat, "funcreg.version": torch.tensor([2, 0])}, "is of format 2; this version of funcreg reads format 1"),
        ({**flat, "funcreg.version": torch.tensor(1)}, r"'funcreg.version' is a tensor of shape \(\); expected what"),
        ({**flat, "1.mu.layer.bias": torch.ones(3, device="meta")}, r"'1\.mu\.layer\.bias' is on the meta device"),
        ({**flat, "1.mu.layer.bias": torch.ones(3).to_sparse()}, r"'1\.mu\.layer\.bias' is of layout torch.sparse_coo"),
        ({name: x for name, x in flat.items() if name != "funcreg.version"}, "was it made by to_state_dict"),
        ({"state": flat}, "was it made by to_state_dict"),
        (state, "flat is a tuple; expected a dict of tensors"),
    ]
    before = copy.deepcopy((state, flat))
    for given, message in wrong:
        with pytest.raises((TypeError, ValueError), match=message):
            fr.from_state_dict(state, given)
    assert_equal((state, flat), before)


def test_template_and_flat_in_the_wrong_order_are_said():
    params = {"w": torch.ones(2)}
    with pytest.raises(ValueError, match=r"Are template and flat swapped\?"):
        fr.from_state_dict(fr.to_state_dict(params), params)


def test_a_state_of_another_chain_with_the_same_names_is_refused():
    adam, centred = trained(fr.scale_by_adam())[1], trained(fr.scale_by_stddev())[1]
    assert list(fr.to_state_dict(adam)) == list(fr.to_state_dict(centred))
    with pytest.raises(ValueError, match=r"expected StddevState\. Is it the state of another chain"):
        fr.from_state_dict(centred, fr.to_state_dict(adam))


def test_without_strict_what_fits_is_read():
    params, state = trained(CHAIN())
    flat = fr.to_state_dict(state)
    template = CHAIN().init(params)
    part = {"1.mu.layer.bias": flat["1.mu.layer.bias"].double(), "unknown": torch.ones(1)}
    loaded = fr.from_state_dict(template, part, strict=False)
    assert_equal(loaded[1].mu["layer.bias"], state[1].mu["layer.bias"])
    assert_equal(loaded[1].nu, template[1].nu)
    with pytest.raises(ValueError, match="none of the names of the template"):
        fr.from_state_dict(template, {"module.1.mu": torch.ones(1)}, strict=False)
    with pytest.raises(ValueError, match="has shape"):
        fr.from_state_dict(template, {"1.mu.layer.bias": torch.ones(9)}, strict=False)


def test_what_cannot_be_saved_is_named():
    with pytest.raises(ValueError, match=r"two leaves are called 'a\.b'"):
        fr.to_state_dict({"a.b": torch.ones(1), "a": {"b": torch.ones(1)}})
    with pytest.raises(TypeError, match="'name' is a str; expected a dense tensor or a number"):
        fr.to_state_dict({"name": "run 3", "w": torch.ones(1)})
    with pytest.raises(TypeError, match=r"dict\(module.named_parameters\(\)\)"):
        fr.to_state_dict(torch.nn.Linear(2, 2))
    with pytest.raises(TypeError, match=r"'w' is a tensor of layout torch.sparse_coo"):
        fr.to_state_dict({"w": torch.eye(2).to_sparse()})


# The recipe of the page


def recipe():
    """The function `save` of the page on loops."""
    page = (ROOT / "examples" / "loops.md").read_text()
    (found,) = re.findall(r"^def save\(.*?(?=\n\n\n)", page, flags=re.MULTILINE | re.DOTALL)
    return found


@pytest.mark.slow
@cpu_only
@pytest.mark.parametrize("call", ["torch.save", "os.fsync", "os.replace"])
def test_a_killed_save_loses_no_older_checkpoint(call, tmp_path):
    script = f"""
import os, signal, sys, torch
{recipe()}
save({{"w": torch.zeros(1000)}}, sys.argv[1])
do = {call}
def killed(*args):
    if "{call}" != "os.replace":
        do(*args)
    os.kill(os.getpid(), signal.SIGKILL)
{call} = killed
save({{"w": torch.ones(1000)}}, sys.argv[1])
"""
    path = tmp_path / "checkpoint.pt"
    done = subprocess.run([sys.executable, "-c", script, str(path)], capture_output=True, check=False)
    assert done.returncode == -9, done.stderr
    assert_equal(torch.load(path, weights_only=True)["w"], torch.zeros(1000))


def test_whole_numbers_of_more_than_64_bits_are_refused_with_their_name():
    for number in (2**63, -(2**63) - 1):
        with pytest.raises(ValueError, match=rf"'seed' is {number}, which is no integer of 64 bits"):
            fr.to_state_dict({"seed": number})
    assert int(fr.to_state_dict({"seed": 2**63 - 1})["seed"]) == 2**63 - 1

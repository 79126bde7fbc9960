"""Networks of Hugging Face, their channels found by tracing: what is dead goes, and outputs stay.

Run by `pytest -m integration` where the libraries of the extra `integrations` are installed.
"""

from __future__ import annotations

import re
import time

import pytest
import torch
from networks import halve
from test_architectures import NETWORKS, cast, count, decoder, gap, gpt2, images, outputs, tokens
from test_channels import without_half

import funcreg as fr

pytestmark = [pytest.mark.integration, pytest.mark.slow]
#: What the library says of its own affairs is no error.
quiet = pytest.mark.filterwarnings("default")

#: The share of parameters, or of those in blocks, that goes with a random half of all groups. In ConvNeXt layers
#: between stages read and write what is normalized over channels, as in transformers embeddings do.
SHARES = {
    **dict.fromkeys(["ResNet, basic", "ResNet, bottleneck"], 0.7),
    **dict.fromkeys(["RegNet X", "RegNet Y"], 0.55),
    "MobileNetV2": 0.6,
    "ConvNeXt": 0.3,
    **dict.fromkeys(["ViT", "BERT", "GPT-2", "Llama", "Mistral", "Qwen2", "T5"], 0.4),
}


def in_blocks(model):
    """The number of parameters that matrices of blocks have, without embeddings and what reads these."""
    found = [
        w.numel()
        for name, w in model.named_parameters()
        if re.search(r"\.\d+\.", name) and w.ndim > 1 and "embed" not in name and not name.startswith("classifier")
    ]
    return sum(found)


@quiet
@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_outputs_are_equal_and_parameters_are_gone(name, dtype, tolerance):
    make, inputs, by_hand, _ = NETWORKS[name]
    torch.manual_seed(0)
    model, given = halve(make().to(dtype).eval(), []), cast(inputs(), dtype)
    start = time.perf_counter()
    groups = fr.channel_groups(model, given)
    seconds = time.perf_counter() - start
    dead = without_half(model, groups)
    smaller = fr.resized(dead, fr.remove_dead(fr.with_buffers(dead), groups), given)
    error = gap(outputs(smaller, given), outputs(dead, given))
    gone, inside = 1 - count(smaller) / count(model), 1 - in_blocks(smaller) / in_blocks(model)
    print(f"{name}: {gone:.0%} gone, {inside:.0%} of blocks, error {error:.1e}, {seconds:.2f} s")
    assert error < tolerance
    assert max(gone, inside) > SHARES[name]
    # What was written by hand is found, and no channel in another family than there.
    found = [{leaf for leaf in family if leaf.endswith("weight")} for family in groups]
    for family in by_hand(model):
        assert any({leaf for leaf in family if leaf.endswith("weight")} <= leaves for leaves in found)


@quiet
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["GPT-2", "Llama", "Qwen3"])
def test_heads_are_found_however_attention_is_computed(name, attention):
    model = halve(gpt2() if name == "GPT-2" else decoder(name), []).eval()
    model.set_attn_implementation(attention)
    groups = fr.channel_groups(model, tokens())
    assert sorted(groups.counts) == ([8, 8, 128, 128] if name == "GPT-2" else [4, 4, 64, 64])
    first = next(iter(groups[0].values()))
    if name == "GPT-2":
        assert first == fr.Along(1, size=4, packed=3)
    else:  # Two heads of queries for one of keys and values.
        assert first == fr.Along(0, size=2 * model.model.layers[0].self_attn.head_dim)


@quiet
def test_widths_are_multiples_where_hardware_likes_them():
    model, given = halve(NETWORKS["ResNet, basic"][0]().eval(), []), images()
    groups = fr.channel_groups(model, given, round_to=8)
    dead = without_half(model, groups)
    smaller = fr.resized(dead, fr.remove_dead(fr.with_buffers(dead), groups), given)
    convolutions = [layer for layer in smaller.modules() if isinstance(layer, torch.nn.Conv2d)]
    assert all(layer.out_channels % 8 == 0 for layer in convolutions)


@quiet
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["ViT", "BERT", "GPT-2", "T5"])
def test_features_inside_heads_go_where_the_scale_is_stored(name, attention):
    make, inputs, *_ = NETWORKS[name]
    torch.manual_seed(0)
    model, given = halve(make().double().eval(), []), cast(inputs(), torch.float64)
    model.set_attn_implementation(attention)
    heads, groups = fr.channel_groups(model, given), fr.channel_groups(model, given, inside_heads=True)
    assert len(groups) >= len(heads)
    dead = without_half(model, groups)
    smaller = fr.resized(dead, fr.remove_dead(fr.with_buffers(dead), groups), given, inside_heads=True)
    error = gap(outputs(smaller, given), outputs(dead, given))
    print(f"{name}: {1 - in_blocks(smaller) / in_blocks(model):.0%} of blocks gone, error {error:.1e}")
    assert error < 1e-10
    assert 1 - in_blocks(smaller) / in_blocks(model) > 0.4


@quiet
@pytest.mark.parametrize(
    ("name", "reason"), [("Llama", "rotary_emb.inv_freq"), ("Qwen3", "reduced over channels.*q_norm")]
)
def test_features_inside_heads_stay_where_they_are_turned_or_normalized(name, reason):
    model = halve(decoder(name), []).eval()
    groups = fr.channel_groups(model, tokens(), inside_heads=True)
    assert all("mlp" in layer for names in groups.layers for layer in names)
    assert re.search(reason, groups.explain())

"""Many networks of Hugging Face, random halves of their groups zero: outputs stay, or the error says why.

Run by `pytest -m integration` where the libraries of the extra `integrations` are installed.
"""

from __future__ import annotations

import re

import pytest
import torch
from networks import halve
from test_architectures import count, images, tokens
from test_channels import without_half

import funcreg as fr
from funcreg.networks.tracing import tensors_in

pytestmark = [pytest.mark.integration, pytest.mark.slow]
#: What the library says of its own affairs is no error.
quiet = pytest.mark.filterwarnings("default")

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 8, "intermediate_size": 64}
TEXT = {**SMALL, "vocab_size": 96, "max_position_embeddings": 20}
GROUPED = {**TEXT, "num_key_value_heads": 4, "pad_token_id": 0}
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 8, "n_positions": 16, "vocab_size": 96}
PATCHES = {"image_size": 32, "patch_size": 8, "num_labels": 5}
STAGES = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1], "num_labels": 5}
WINDOWS = {"image_size": 32, "patch_size": 2, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "num_labels": 5}
ENCODED = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 8,
    "decoder_attention_heads": 8,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "vocab_size": 96,
}
T5 = {"d_model": 32, "d_kv": 4, "d_ff": 64, "num_layers": 2, "num_heads": 8, "vocab_size": 96}
SPEECH = {
    "conv_dim": (16, 16, 16),
    "conv_stride": (5, 2, 2),
    "conv_kernel": (10, 3, 3),
    "num_feat_extract_layers": 3,
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 4,
    "vocab_size": 24,
}


def pictures():
    return images(32)


def pairs():
    return {**tokens(), "decoder_input_ids": tokens()["input_ids"]}


def noise(name, *shape):
    return {name: torch.randn(*shape, device="cpu", generator=torch.Generator().manual_seed(1))}


def spectra():
    return {**noise("input_features", 2, 80, 40), "decoder_input_ids": tokens()["input_ids"]}


def sounds():
    return noise("input_values", 2, 800)


def captioned():
    return {**tokens(), **pictures()}


# The class of its configuration, its own, its inputs, its sizes, and at least the share of parameters that goes.
NETWORKS = {
    "EfficientNet": (
        "ForImageClassification",
        images,
        {"width_coefficient": 0.25, "depth_coefficient": 0.3, "hidden_dim": 320, "num_labels": 5},
        0.6,
    ),
    "HGNetV2": (
        "ForImageClassification",
        images,
        {
            "embedding_size": 16,
            "stem_channels": [3, 8, 16],
            "stage_in_channels": [16, 16, 24, 32],
            "stage_mid_channels": [8, 8, 16, 16],
            "stage_out_channels": [16, 24, 32, 48],
            **STAGES,
            "stage_num_blocks": [1, 1, 1, 1],
            "stage_numb_of_layers": [2, 2, 2, 2],
            "hidden_sizes": [16, 24, 32, 48],
        },
        0.6,
    ),
    "PoolFormer": ("ForImageClassification", images, STAGES, 0.2),
    "Segformer": (
        "ForSemanticSegmentation",
        images,
        {**STAGES, "num_attention_heads": [1, 2, 3, 4], "decoder_hidden_size": 24},
        0.2,
    ),
    "DeiT": ("ForImageClassification", pictures, {**SMALL, **PATCHES}, 0.3),
    "Swin": ("ForImageClassification", pictures, {**WINDOWS, "window_size": 4}, 0.35),
    "Swinv2": ("ForImageClassification", pictures, {**WINDOWS, "window_size": 4}, 0.35),
    "Beit": ("ForImageClassification", pictures, {**SMALL, **PATCHES}, 0.3),
    "Dinov2": ("ForImageClassification", pictures, {**SMALL, **PATCHES}, 0.3),
    "Roberta": ("ForMaskedLM", tokens, TEXT, 0.3),
    "DistilBert": (
        "ForMaskedLM",
        tokens,
        {"dim": 32, "n_layers": 2, "n_heads": 8, "hidden_dim": 64, "vocab_size": 96, "max_position_embeddings": 16},
        0.3,
    ),
    "Albert": ("ForMaskedLM", tokens, {**TEXT, "embedding_size": 16}, 0.3),
    "Electra": ("ForMaskedLM", tokens, {**TEXT, "embedding_size": 16}, 0.3),
    "DebertaV2": (
        "ForMaskedLM",
        tokens,
        {**TEXT, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8},
        0.3,
    ),
    "MPNet": ("ForMaskedLM", tokens, TEXT, 0.3),
    "FNet": ("ForMaskedLM", tokens, {k: v for k, v in TEXT.items() if k != "num_attention_heads"}, 0.2),
    "GPTNeoX": ("ForCausalLM", tokens, TEXT, 0.3),
    "GPTJ": ("ForCausalLM", tokens, {**GPT, "n_head": 4, "rotary_dim": 4}, 0.3),
    "OPT": (
        "ForCausalLM",
        tokens,
        {**{k: v for k, v in TEXT.items() if k != "intermediate_size"}, "ffn_dim": 64, "word_embed_proj_dim": 32},
        0.3,
    ),
    "Bloom": ("ForCausalLM", tokens, {"hidden_size": 32, "n_layer": 2, "n_head": 8, "vocab_size": 96}, 0.2),
    "Falcon": (
        "ForCausalLM",
        tokens,
        {
            **{k: v for k, v in GROUPED.items() if "key_value" not in k},
            "num_kv_heads": 4,
            "new_decoder_architecture": True,
        },
        0.3,
    ),
    "Qwen3": ("ForCausalLM", tokens, {**GROUPED, "head_dim": 4}, 0.3),
    "Gemma": ("ForCausalLM", tokens, {**GROUPED, "head_dim": 4}, 0.3),
    "Phi": ("ForCausalLM", tokens, GROUPED, 0.3),
    "Phi3": ("ForCausalLM", tokens, GROUPED, 0.3),
    "Mamba": (
        "ForCausalLM",
        tokens,
        {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 96, "state_size": 4},
        0.3,
    ),
    "T5": ("ForConditionalGeneration", pairs, {**T5, "feed_forward_proj": "gated-gelu"}, 0.3),
    "Bart": ("ForConditionalGeneration", pairs, {**ENCODED, "max_position_embeddings": 16}, 0.3),
    "Whisper": (
        "ForConditionalGeneration",
        spectra,
        {
            **ENCODED,
            "max_source_positions": 20,
            "max_target_positions": 16,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "decoder_start_token_id": 1,
        },
        0.3,
    ),
    "CLIP": (
        "Model",
        captioned,
        {
            "text_config": {**TEXT, "projection_dim": 16, "eos_token_id": 2, "bos_token_id": 1, "pad_token_id": 0},
            "vision_config": {**SMALL, "image_size": 32, "patch_size": 8, "projection_dim": 16},
            "projection_dim": 16,
        },
        0.3,
    ),
    "Wav2Vec2": ("ForCTC", sounds, {**SMALL, **SPEECH}, 0.3),
    "Mamba2": (
        "ForCausalLM",
        tokens,
        {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "vocab_size": 96,
            "state_size": 4,
            "num_heads": 8,
            "head_dim": 8,
            "n_groups": 2,
            "chunk_size": 4,
        },
        0.3,
    ),
}


def made(name, task, sizes):
    import transformers as hf

    torch.manual_seed(0)
    model = getattr(hf, f"{name}{task}")(getattr(hf, f"{name}Config")(**sizes))
    return halve(model.double().eval(), [])


def doubled(given):
    return {name: x.double() if x.is_floating_point() else x for name, x in given.items()}


def outputs(model, given):
    with torch.no_grad():
        return [x for x in tensors_in(model(**given)) if x.is_floating_point()]


def tells(net, given):
    """Whether a network tells inputs apart, as half of one may not."""
    first = outputs(net, given)[0]
    return bool((first[0] - first[1]).abs().max() > 1e-6)


@quiet
@pytest.mark.parametrize("name", NETWORKS)
def test_outputs_are_equal_and_parameters_are_gone(name):
    task, inputs, sizes, share = NETWORKS[name]
    model, given = made(name, task, sizes), doubled(inputs())
    groups = fr.channel_groups(model, given)
    dead = next(net for seed in range(20) if tells(net := without_half(model, groups, seed), given))
    smaller = fr.resized(dead, fr.remove_dead(fr.with_buffers(dead), groups), given)
    other = {key: x.flip(-1) for key, x in given.items()}
    for seen in (given, other):  # Also where it was not looked at.
        for found, expected in zip(outputs(smaller, seen), outputs(dead, seen), strict=True):
            apart = (expected[0] - expected[1]).abs() if expected.ndim > 1 else expected.abs()
            assert (found - expected).abs().max() < 1e-9 * apart[apart.isfinite()].max()
    assert 1 - count(smaller) / count(model) > share


@quiet
def test_counts_of_heads_that_only_the_configuration_says_follow_in_each_layer():
    model = made("Phi3", "ForCausalLM", GROUPED)
    groups = fr.channel_groups(model, tokens(), layers=["*.self_attn.qkv_proj"])
    assert groups.counts == [4, 4]
    dead = without_half(model, fr.ChannelGroups(groups[:1], groups.counts[:1]))
    smaller = fr.resized(dead, fr.remove_dead(fr.with_buffers(dead), groups))
    first, second = (layer.self_attn for layer in smaller.model.layers)
    assert (first.config.num_attention_heads, first.num_key_value_heads) == (4, 2)
    assert (second.config.num_attention_heads, second.num_key_value_heads) == (8, 4)
    assert model.config.num_attention_heads == smaller.config.num_attention_heads == 8
    torch.testing.assert_close(outputs(smaller, tokens())[0], outputs(dead, tokens())[0], rtol=1e-9, atol=1e-9)


KEPT = {
    "ConvNextV2": (
        "ForImageClassification",
        images,
        STAGES,
        r"reduced over channels \(mean, 'convnextv2.encoder.stages.\*.layers.0.grn'\)",
    ),
}


@quiet
@pytest.mark.parametrize("name", KEPT)
def test_where_nothing_can_go_the_reason_is_told(name):
    task, inputs, sizes, reason = KEPT[name]
    with pytest.raises(ValueError, match=rf"(?s)found no channels in {name}.*{reason}"):
        fr.channel_groups(made(name, task, sizes), doubled(inputs()))


@quiet
def test_a_network_that_holds_numbers_nobody_knows_is_made_smaller_or_refused_before_training():
    sizes = {"image_size": 64, "hidden_sizes": [16, 32, 48], "num_attention_heads": [2, 4, 6], "depths": [1, 1, 1]}
    model = made("Levit", "ForImageClassification", {**sizes, "key_dim": [4, 4, 4], "num_labels": 5})
    given = doubled(images())
    groups = fr.channel_groups(model, given)
    assert re.search(r"a LevitAttention\w*, stores \w+=.*, and no other numbers there make it run", groups.explain())
    assert "to tell what becomes of LevitAttention.key_dim" in groups.explain()
    dead = without_half(model, groups)
    tree = fr.remove_dead(fr.with_buffers(dead), groups)
    with pytest.raises(ValueError, match=r"a LevitAttention\w*, stores \w+=.*and resized knows no rule for it"):
        fr.resized(dead, tree)
    smaller = fr.resized(dead, tree, given)
    torch.testing.assert_close(outputs(smaller, given), outputs(dead, given), rtol=1e-9, atol=1e-9)

"""Networks of Hugging Face without their dead channels, heads and hidden units give what they gave.

Run by `pytest -m integration` where the libraries of the extra `integrations` are installed.
"""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
from torch import nn

import funcreg as fr

pytestmark = [pytest.mark.integration, pytest.mark.slow]
#: What the library says of its own affairs is no error.
quiet = pytest.mark.filterwarnings("default")

kept = lambda dim, size=1: fr.Along(dim, size, penalized=False)


# Families


def conv_norm(path, size=1):
    """A convolution and the normalization after it, and what of it follows."""
    place = fr.Along(0, size)
    penalized = dict.fromkeys(
        [f"{path}.convolution.weight", f"{path}.normalization.weight", f"{path}.normalization.bias"], place
    )
    return {**penalized, **dict.fromkeys(statistics(path), kept(0, size))}


def statistics(path):
    return [f"{path}.normalization.running_mean", f"{path}.normalization.running_var"]


def blocks(model, pattern):
    """The names of the modules that match."""
    return [name for name, _ in model.named_modules() if re.fullmatch(pattern, name)]


def of_resnet(model):
    inner = []
    for name in blocks(model, r".*stages\.\d+\.layers\.\d+"):
        convs = len(model.get_submodule(name).layer)
        for i in range(convs - 1):
            reads = {f"{name}.layer.{i + 1}.convolution.weight": kept(1)}
            inner.append({**conv_norm(f"{name}.layer.{i}"), **reads})
    return [*inner, *residual(model)]


def residual(model):
    """The channels that the blocks of a stage add to, one family for each stage."""
    stages = blocks(model, r".*stages\.\d+")
    families = []
    for i, stage in enumerate(stages):
        family: dict[str, Any] = {}
        for name in blocks(model, re.escape(stage) + r"\.layers\.\d+"):
            block = model.get_submodule(name)
            family.update(conv_norm(f"{name}.layer.{len(block.layer) - 1}"))
            if name.endswith(".0") and not isinstance(block.shortcut, nn.Identity):
                family.update(conv_norm(f"{name}.shortcut"))
            else:
                family[f"{name}.layer.0.convolution.weight"] = kept(1)
        if i + 1 < len(stages):
            following = f"{stages[i + 1]}.layers.0"
            family[f"{following}.layer.0.convolution.weight"] = kept(1)
            family[f"{following}.shortcut.convolution.weight"] = kept(1)
        else:
            family["classifier.1.weight"] = kept(1)
        first = model.get_submodule(f"{stage}.layers.0")
        if not isinstance(first.shortcut, nn.Identity):  # Else the channels of the stage before go on.
            families.append(family)
    return families


def of_regnet(model):
    families = []
    width = model.config.groups_width
    for name in blocks(model, r".*stages\.\d+\.layers\.\d+"):
        layer = model.get_submodule(name).layer
        family = {**conv_norm(f"{name}.layer.0", width), **conv_norm(f"{name}.layer.1", width)}
        if len(layer) == 4:  # With squeeze and excitation.
            gate = f"{name}.layer.2.attention"
            family[f"{gate}.0.weight"] = kept(1, width)
            family.update(dict.fromkeys([f"{gate}.2.weight", f"{gate}.2.bias"], kept(0, width)))
            families.append({f"{gate}.0.weight": 0, f"{gate}.0.bias": 0, f"{gate}.2.weight": kept(1)})
        family[f"{name}.layer.{len(layer) - 1}.convolution.weight"] = kept(1, width)
        families.append(family)
    return families


def of_mobilenet(model):
    families = []
    for name in blocks(model, r".*layer\.\d+"):
        family = {**conv_norm(f"{name}.expand_1x1"), **conv_norm(f"{name}.conv_3x3")}
        families.append({**family, f"{name}.reduce_1x1.convolution.weight": kept(1)})
    return families


def hidden(up, down):
    """Hidden units between two linear layers."""
    return {f"{up}.weight": 0, f"{up}.bias": 0, f"{down}.weight": 1}


def of_convnext(model):
    return [hidden(f"{name}.pwconv1", f"{name}.pwconv2") for name in blocks(model, r".*stages\.\d+\.layers\.\d+")]


def heads(model, name, queries, keys, values, output):
    """Whole heads; where several queries share keys and values, these go with all of their queries."""
    q, k = (model.get_submodule(f"{name}.{each}").out_features for each in (queries, keys))
    size = getattr(model.get_submodule(name), "head_dim", None) or model.get_submodule(name).attention_head_size
    family: dict[str, Any] = {f"{name}.{queries}.weight": fr.Along(0, size * q // k)}
    family.update(dict.fromkeys([f"{name}.{keys}.weight", f"{name}.{values}.weight"], fr.Along(0, size)))
    family.update({f"{path[:-7]}.bias": where for path, where in family.items()})
    known = dict(model.named_parameters())
    return {**{n: w for n, w in family.items() if n in known}, f"{output}.weight": fr.Along(1, size * q // k)}


def of_vit(model):
    families = []
    for name in blocks(model, r".*layers\.\d+"):
        own = f"{name}.attention"
        families.append(heads(model, own, "q_proj", "k_proj", "v_proj", f"{own}.o_proj"))
        families.append(hidden(f"{name}.mlp.fc1", f"{name}.mlp.fc2"))
    return families


def of_bert(model):
    families = []
    for name in blocks(model, r".*layer\.\d+"):
        own = f"{name}.attention"
        families.append(heads(model, f"{own}.self", "query", "key", "value", f"{own}.output.dense"))
        families.append(hidden(f"{name}.intermediate.dense", f"{name}.output.dense"))
    return families


def of_gpt2(model):
    families = []
    for name in blocks(model, r".*\.h\.\d+"):
        size = model.get_submodule(f"{name}.attn").head_dim
        families.append(
            {
                f"{name}.attn.c_attn.weight": fr.Along(1, size, 3),
                f"{name}.attn.c_attn.bias": fr.Along(0, size, 3),
                f"{name}.attn.c_proj.weight": fr.Along(0, size),
            }
        )
        families.append({f"{name}.mlp.c_fc.weight": 1, f"{name}.mlp.c_fc.bias": 0, f"{name}.mlp.c_proj.weight": 0})
    return families


def of_llama(model):
    families = []
    for name in blocks(model, r".*layers\.\d+"):
        own, mlp = f"{name}.self_attn", f"{name}.mlp"
        families.append(heads(model, own, "q_proj", "k_proj", "v_proj", f"{own}.o_proj"))
        families.append({f"{mlp}.gate_proj.weight": 0, f"{mlp}.up_proj.weight": 0, f"{mlp}.down_proj.weight": 1})
    return families


def of_t5(model):
    families = []
    for name in blocks(model, r".*DenseReluDense"):
        families.append({f"{name}.wi.weight": 0, f"{name}.wo.weight": 1})
    return families


# Networks


def images(size=64):
    return {"pixel_values": torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))}


def tokens(count=96):
    return {"input_ids": torch.randint(0, count, (2, 7), generator=torch.Generator().manual_seed(1))}


def resnet(kind):
    import transformers as hf

    config = hf.ResNetConfig(
        embedding_size=16, hidden_sizes=[16, 32, 64], depths=[2, 2, 1], layer_type=kind, num_labels=5
    )
    return hf.ResNetForImageClassification(config)


def regnet(kind):
    import transformers as hf

    config = hf.RegNetConfig(
        embedding_size=16, hidden_sizes=[16, 32], depths=[1, 2], groups_width=4, layer_type=kind, num_labels=5
    )
    return hf.RegNetForImageClassification(config)


def mobilenet():
    import transformers as hf

    return hf.MobileNetV2ForImageClassification(hf.MobileNetV2Config(image_size=64, depth_multiplier=0.35))


def convnext():
    import transformers as hf

    config = hf.ConvNextConfig(hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 2, 1], num_labels=5)
    return hf.ConvNextForImageClassification(config)


def vit():
    import transformers as hf

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 8, "intermediate_size": 64}
    return hf.ViTForImageClassification(hf.ViTConfig(**sizes, image_size=32, patch_size=8, num_labels=5))


def bert():
    import transformers as hf

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 8, "intermediate_size": 64}
    return hf.BertForMaskedLM(hf.BertConfig(**sizes, vocab_size=96, max_position_embeddings=16))


def gpt2():
    import transformers as hf

    return hf.GPT2LMHeadModel(hf.GPT2Config(n_embd=32, n_layer=2, n_head=8, n_positions=16, vocab_size=96))


def decoder(name):
    import transformers as hf

    config = getattr(hf, f"{name}Config")(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=4,
        intermediate_size=64,
        vocab_size=96,
        max_position_embeddings=16,
    )
    return getattr(hf, f"{name}ForCausalLM")(config)


def t5():
    import transformers as hf

    return hf.T5ForConditionalGeneration(
        hf.T5Config(d_model=32, d_kv=4, d_ff=64, num_layers=2, num_heads=8, vocab_size=96)
    )


NETWORKS = {
    "ResNet, basic": (lambda: resnet("basic"), images, of_resnet, 0.65),
    "ResNet, bottleneck": (lambda: resnet("bottleneck"), images, of_resnet, 0.65),
    "RegNet X": (lambda: regnet("x"), images, of_regnet, 0.4),
    "RegNet Y": (lambda: regnet("y"), images, of_regnet, 0.4),
    "MobileNetV2": (mobilenet, images, of_mobilenet, 0.1),
    "ConvNeXt": (convnext, images, of_convnext, 0.2),
    "ViT": (vit, lambda: images(32), of_vit, 0.3),
    "BERT": (bert, tokens, of_bert, 0.3),
    "GPT-2": (gpt2, tokens, of_gpt2, 0.3),
    "Llama": (lambda: decoder("Llama"), tokens, of_llama, 0.3),
    "Mistral": (lambda: decoder("Mistral"), tokens, of_llama, 0.3),
    "Qwen2": (lambda: decoder("Qwen2"), tokens, of_llama, 0.3),
    "T5": (t5, lambda: {**tokens(), "decoder_input_ids": tokens()["input_ids"]}, of_t5, 0.1),
}
every_network = pytest.mark.parametrize(("make", "inputs", "families", "share"), NETWORKS.values(), ids=NETWORKS)


def labels(leaf, along):
    """For each entry of a leaf the number of its group."""
    along = along if isinstance(along, fr.Along) else fr.Along(along)
    dim = along.dim % leaf.ndim
    count = leaf.shape[dim] // (along.size * along.packed)
    index = torch.arange(leaf.shape[dim]) // along.size % count
    return index.reshape([-1 if d == dim else 1 for d in range(leaf.ndim)]).expand(leaf.shape), count


def halved(make, families, dtype=torch.float64):
    """A network in evaluation, with random weights and statistics, about half of each family zero."""
    torch.manual_seed(0)
    model = make().to(dtype).eval()
    for name, x in [*model.named_parameters(), *model.named_buffers()]:
        if x.is_floating_point() and "inv_freq" not in name:
            nn.init.uniform_(x, 0.5, 1.5) if "running" in name else nn.init.normal_(x, std=0.3)
    groups = families(model)
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for family in groups:
        name, along = next(iter(family.items()))
        gone = torch.rand(labels(tensors[name], along)[1]) < 0.5
        gone[0], gone[-1] = False, True
        for name, along in family.items():
            if not isinstance(along, fr.Along) or along.penalized:
                with torch.no_grad():
                    tensors[name][gone[labels(tensors[name], along)[0]]] = 0
    return model, groups, tensors


def outputs(model, given):
    with torch.no_grad():
        return next(x for x in model(**given).values() if isinstance(x, torch.Tensor))


def count(model):
    return sum(x.numel() for x in model.parameters())


def cast(given, dtype):
    return {name: x.to(dtype) if x.is_floating_point() else x for name, x in given.items()}


@quiet
@every_network
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_outputs_are_equal_and_parameters_are_gone(make, inputs, families, share, dtype, tolerance):
    model, groups, tensors = halved(make, families, dtype)
    given, before = cast(inputs(), dtype), copy.deepcopy(model.state_dict())
    smaller = fr.resized(model, fr.remove_dead(tensors, groups))
    expected = outputs(model, given)
    gap = (outputs(smaller, given) - expected).abs().max() / expected.abs().max()
    gone = 1 - count(smaller) / count(model)
    print(f"{type(model).__name__}: {gone:.0%} gone, gap {gap:.1e}")
    assert gap < tolerance
    assert gone > share
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    again = fr.resized(model, fr.remove_dead(tensors, groups), given)  # Seen by itself.
    assert torch.equal(outputs(again, given), outputs(smaller, given))

"""Networks of Hugging Face without their dead channels, heads and hidden units give what they gave.

Run by `pytest -m integration` where the libraries of the extra `integrations` are installed.
"""

from __future__ import annotations

import copy
import pickle
import re
from typing import Any

import pytest
import torch
from networks import halve, kept, smaller
from torch import nn

import funcreg as fr

pytestmark = [pytest.mark.integration, pytest.mark.slow]
#: What the library says of its own affairs is no error.
quiet = pytest.mark.filterwarnings("default")

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
    stem = {f"{stages[0]}.layers.0.{end}.convolution.weight": kept(1) for end in ("layer.0", "shortcut")}
    families = [{**conv_norm("resnet.embedder.embedder"), **stem}]
    for i, stage in enumerate(stages):
        family: dict[str, Any] = {}
        for name in blocks(model, re.escape(stage) + r"\.layers\.\d+"):
            block = model.get_submodule(name)
            family.update(conv_norm(f"{name}.layer.{len(block.layer) - 1}"))
            if not isinstance(block.shortcut, nn.Identity):
                family.update(conv_norm(f"{name}.shortcut"))
            else:
                family[f"{name}.layer.0.convolution.weight"] = kept(1)
        if i + 1 < len(stages):
            following = f"{stages[i + 1]}.layers.0"
            family[f"{following}.layer.0.convolution.weight"] = kept(1)
            family[f"{following}.shortcut.convolution.weight"] = kept(1)
        else:
            family["classifier.1.weight"] = kept(1)
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
    return [{f"{name}.wi.weight": 0, f"{name}.wo.weight": 1} for name in blocks(model, r".*DenseReluDense")]


# Networks


def images(size=64):
    return {"pixel_values": torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))}


def tokens(count=96):
    return {"input_ids": torch.randint(0, count, (2, 7), generator=torch.Generator().manual_seed(1))}


def resnet(kind):
    import transformers as hf

    config = hf.ResNetConfig(
        embedding_size=16, hidden_sizes=[48, 64, 96], depths=[2, 2, 1], layer_type=kind, num_labels=5
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

    return hf.MobileNetV2ForImageClassification(
        hf.MobileNetV2Config(image_size=64, depth_multiplier=0.35, num_labels=5)
    )


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
    "ResNet, basic": (lambda: resnet("basic"), images, of_resnet, 0.68),
    "ResNet, bottleneck": (lambda: resnet("bottleneck"), images, of_resnet, 0.68),
    "RegNet X": (lambda: regnet("x"), images, of_regnet, 0.4),
    "RegNet Y": (lambda: regnet("y"), images, of_regnet, 0.4),
    "MobileNetV2": (mobilenet, images, of_mobilenet, 0.2),
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


def halved(make, families, dtype=torch.float64):
    """A network in evaluation, about half of each family zero."""
    model = make().to(dtype).eval()
    groups = families(model)
    return halve(model, groups), groups


def outputs(model, given):
    with torch.no_grad():
        return next(x for x in model(**given).values() if isinstance(x, torch.Tensor))


def count(model):
    return sum(x.numel() for x in model.parameters())


def cast(given, dtype):
    return {name: x.to(dtype) if x.is_floating_point() else x for name, x in given.items()}


def gap(found, expected):
    """The largest difference, in units of what tells two examples apart."""
    assert found.shape == expected.shape
    return (found - expected).abs().max() / (expected[0] - expected[1]).abs().max()


@quiet
@every_network
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_outputs_are_equal_and_parameters_are_gone(make, inputs, families, share, dtype, tolerance):
    model, groups = halved(make, families, dtype)
    given, before = cast(inputs(), dtype), copy.deepcopy(model.state_dict())
    made = smaller(model, groups)
    expected = outputs(model, given)
    error, gone = gap(outputs(made, given), expected), 1 - count(made) / count(model)
    print(f"{type(model).__name__}: {gone:.0%} gone, error {error:.1e}")
    assert error < tolerance
    assert gone > share
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    assert torch.equal(outputs(smaller(model, groups, given), given), outputs(made, given))  # Seen by itself.


@quiet
@every_network
def test_a_smaller_network_trains_and_is_saved(make, inputs, families, share, tmp_path):
    model, groups = halved(make, families)
    given = cast(inputs(), torch.float64)
    made = smaller(model, groups)
    optimizer = torch.optim.SGD(made.parameters(), lr=1e-3)
    next(iter(made.train()(**given).values())).square().mean().backward()
    optimizer.step()
    assert any(w.grad is not None and w.grad.any() for w in made.parameters())
    made.eval()
    made.save_pretrained(tmp_path)
    torch.save(made.state_dict(), tmp_path / "state.pt")
    read = fr.resized(model, torch.load(tmp_path / "state.pt"))
    for other in (read, copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        assert torch.equal(outputs(other, given), outputs(made, given))
        assert [n for n, _ in other.named_parameters()] == [n for n, _ in model.named_parameters()]


@quiet
@pytest.mark.parametrize("name", ["ResNet, basic", "MobileNetV2", "ViT", "BERT", "GPT-2", "Llama"])
def test_a_smaller_network_is_exported(name):
    make, inputs, families, _ = NETWORKS[name]
    model, groups = halved(make, families)
    given = {**cast(inputs(), torch.float64), **({"use_cache": False} if name in ("GPT-2", "Llama") else {})}
    made = smaller(model, groups)
    exported = torch.export.export(made, (), given)
    found = next(iter(exported.module()(**given).values()))
    torch.testing.assert_close(found, outputs(model, given), rtol=1e-9, atol=1e-10)


@quiet
@pytest.mark.parametrize("name", ["GPT-2", "Llama", "Qwen2"])
def test_a_smaller_decoder_writes_the_same_text_with_its_cache(name):
    make, inputs, families, _ = NETWORKS[name]
    model, groups = halved(make, families)
    made, options = smaller(model, groups), {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    for more in ({}, {"cache_implementation": "static", "disable_compile": True}):
        expected = model.generate(**inputs(), **options, **more)
        assert torch.equal(made.generate(**inputs(), **options, **more), expected)
    assert made.get_output_embeddings().weight is made.get_input_embeddings().weight or name != "GPT-2"


@quiet
@pytest.mark.parametrize("name", ["ViT", "BERT", "GPT-2", "Llama"])
def test_other_implementations_of_attention_may_still_be_chosen(name):
    make, inputs, families, _ = NETWORKS[name]
    model, groups = halved(make, families)
    given, made = cast(inputs(), torch.float64), smaller(model, groups)
    made.set_attn_implementation("eager")
    assert gap(outputs(made, given), outputs(model, given)) < 1e-5  # The library takes the softmax in float32.


@quiet
def test_a_configuration_says_how_many_heads_there_are_where_layers_agree(tmp_path):
    model = decoder("Llama").eval()
    groups = of_llama(model)
    halve(model, [groups[0], {name.replace("layers.0", "layers.1"): at for name, at in groups[0].items()}])
    made = smaller(model, [groups[0], groups[2]])
    assert (made.config.num_attention_heads, made.config.num_key_value_heads) == (4, 2)
    assert (model.config.num_attention_heads, model.config.num_key_value_heads) == (8, 4)
    made.save_pretrained(tmp_path)
    read = type(made).from_pretrained(tmp_path)  # Heads have their own width in this configuration.
    assert gap(outputs(read, tokens()), outputs(model, tokens())) < 1e-5
    attention = made.model.layers[0].self_attn
    assert attention.num_key_value_groups == 2
    uneven = smaller(*halved(lambda: decoder("Llama"), of_llama))
    assert uneven.config.num_attention_heads == 8  # Which it has in no layer, and reads nowhere.


@quiet
def test_heads_that_are_not_whole_are_an_error_that_names_the_module():
    model = decoder("Llama").eval()
    own = "model.layers.1.self_attn"
    tree = {f"{own}.v_proj.weight": torch.zeros(12, 32)}
    with pytest.raises(ValueError, match=rf"projections of '{own}', a LlamaAttention, do not hold whole heads of 4"):
        fr.resized(model, tree)

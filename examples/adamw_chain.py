"""A character transformer on the sources of Python's standard library, trained by a chain of transforms.

The chain is AdamW written out: clip, Adam, decay, learning rate; and after the step a soft threshold, which makes
weights exactly zero. A mask keeps decay and threshold to the weights of linear layers. The loop is functional:
parameters and state go in and come out, and one fused call makes the whole step.

    python examples/adamw_chain.py
    python examples/adamw_chain.py --steps 20 --width 16 --layers 1
"""

import argparse
import sysconfig
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value
from tqdm import tqdm

import funcreg as fr

MODULES = ("argparse", "ast", "configparser", "dataclasses", "difflib", "doctest", "functools", "inspect", "typing")
CONTEXT, BATCH, HEADS = 64, 16, 4


class Block(nn.Module):
    """Attention to the characters before, then a small network on each character."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm_attention, self.norm_network = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attend, self.join = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.network = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        heads = self.attend(self.norm_attention(x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        seen = F.scaled_dot_product_attention(*heads, is_causal=True)
        x = x + self.join(seen.transpose(1, 2).flatten(2))
        return x + self.network(self.norm_network(x))


class Transformer(nn.Module):
    """From characters, as numbers, to the logits of the character after each."""

    def __init__(self, characters: int, width: int, layers: int) -> None:
        super().__init__()
        self.characters, self.places = nn.Embedding(characters, width), nn.Embedding(CONTEXT, width)
        self.blocks = nn.Sequential(*(Block(width) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, characters)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.characters(tokens) + self.places.weight[: tokens.shape[1]]
        return self.head(self.norm(self.blocks(x)))


def main() -> None:
    parser = argparse.ArgumentParser(description="AdamW, clipping and a soft threshold in one chain")
    parser.add_argument("--steps", type=int, default=1000, help="training steps")
    parser.add_argument("--width", type=int, default=64, help="width of the transformer, a multiple of 4")
    parser.add_argument("--layers", type=int, default=2, help="blocks of attention")
    options = parser.parse_args()

    torch.manual_seed(0)
    torch.set_num_threads(1)  # So small a model gains less from more cores than it loses where they are busy.

    library = Path(sysconfig.get_paths()["stdlib"])
    text = "".join((library / f"{module}.py").read_text(encoding="utf-8") for module in MODULES)
    text = "".join(filter(str.isascii, text))  # The sample is printed, and not every terminal knows more.
    alphabet = sorted(set(text))
    tokens = torch.tensor([alphabet.index(character) for character in text])
    training, held_out = tokens[: -len(tokens) // 10], tokens[-len(tokens) // 10 :]
    model = Transformer(len(alphabet), options.width, options.layers)

    def draw(tokens: Tensor, batch: int) -> tuple[Tensor, Tensor]:
        starts = torch.randint(len(tokens) - CONTEXT, (batch, 1))
        windows = tokens[starts + torch.arange(CONTEXT + 1)]
        return windows[:, :-1], windows[:, 1:]

    def loss(params, inputs, targets):
        return F.cross_entropy(functional_call(model, params, (inputs,)).flatten(0, 1), targets.flatten())

    rate = fr.warmup_cosine_decay_schedule(0.0, 5e-3, warmup_steps=options.steps // 10, decay_steps=options.steps)
    weights = fr.select(nn.Linear, module=model, min_ndim=2)  # Not biases, norms and embeddings.
    tx = fr.chain(
        fr.clip_by_global_norm(1.0),
        fr.scale_by_adam(),
        fr.add_decayed_weights(1e-2, mask=weights),
        fr.scale_by_learning_rate(rate),
        # The threshold follows the learning rate, as the decay does. A constant one would outgrow the last, small
        # steps and go on zeroing weights. It is an L1 decay of AdamW's kind; the lasso of the loss is fr.prox_adam.
        fr.soft_threshold(lambda count: 0.1 * rate(count), mask=weights),
    )
    step = fr.fuse(tx, donate=True)
    params, state = step.init(dict(model.named_parameters()))

    unseen = draw(held_out, 64)
    every = max(options.steps // 10, 1)
    for n in tqdm(range(1, options.steps + 1)):
        grads, value = grad_and_value(loss)(params, *draw(training, BATCH))
        params, state = step(params, grads, state)
        if n % every == 0:
            zeros = 100 * fr.sparsity(params, weights)
            tqdm.write(f"step {n:5}   loss {value:.3f}   held out {loss(params, *unseen):.3f}   zeros {zeros:.1f} %")

    written = [alphabet.index(character) for character in "def "]
    for _ in range(400):
        logits = functional_call(model, params, (torch.tensor([written[-CONTEXT:]]),))[0, -1]
        written.append(int(torch.multinomial((logits / 0.7).softmax(-1), 1)))
    print("".join(alphabet[token] for token in written))


if __name__ == "__main__":
    main()

"""A character transformer that loses the heads and hidden units it does not need, with equal outputs.

A head is its rows of the queries, keys and values and the columns of the layer that joins heads; a hidden unit its row
of one layer and its column of the next. `channel_groups` finds both by running the network once, and a group lasso in
an ordinary loop of PyTorch makes whole heads and units zero. What is left is taken out of the network. Its width stays:
LayerNorm averages over it.

The strength is 0 while the network learns what it needs, then it rises, and once dead groups are taken out the smaller
network is trained on without a penalty, at the rates that are left of the schedule, so that all has taken as many steps
as the dense network had. NUMBERS

    python examples/smaller_transformer.py
    python examples/smaller_transformer.py --steps 60 --width 16 --layers 1
"""

import argparse
import copy
import math
import statistics
import sysconfig
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import funcreg as fr

MODULES = ("argparse", "ast", "configparser", "dataclasses", "difflib", "doctest", "functools", "inspect", "typing")
CONTEXT, BATCH, HEADS = 64, 16, 8
PEAK = 5e-3  # The greatest learning rate.
BEGIN, FULL, REMOVE = (
    0.2,
    0.55,
    0.7,
)  # Shares of all steps: the penalty begins, has its strength, and has done its work.


class Transformer(nn.Module):
    """From characters, as numbers, to the logits of the character after each."""

    def __init__(self, characters: int, width: int, layers: int) -> None:
        super().__init__()
        self.characters, self.places = nn.Embedding(characters, width), nn.Embedding(CONTEXT, width)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(
                width, HEADS, 8 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
            )
            for _ in range(layers)
        )
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, characters)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.characters(tokens) + self.places.weight[: tokens.shape[1]]
        later = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1], device=tokens.device)
        for block in self.blocks:
            x = block(x, src_mask=later, is_causal=True)
        return self.head(self.norm(x))


def read() -> tuple[Tensor, Tensor, int]:
    """Sources of Python's standard library as numbers, for training and for testing, and how many characters."""
    library = Path(sysconfig.get_paths()["stdlib"])
    text = "".join((library / f"{module}.py").read_text(encoding="utf-8") for module in MODULES)
    text = "".join(filter(str.isascii, text))
    alphabet = sorted(set(text))
    tokens = torch.tensor([alphabet.index(character) for character in text])
    return tokens[: -len(tokens) // 10], tokens[-len(tokens) // 10 :], len(alphabet)


def draw(tokens: Tensor, batch: int) -> tuple[Tensor, Tensor]:
    starts = torch.randint(len(tokens) - CONTEXT, (batch, 1))
    windows = tokens[starts + torch.arange(CONTEXT + 1)]
    return windows[:, :-1], windows[:, 1:]


def loss(net: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(net(inputs).flatten(0, 1), targets.flatten())


def unseen_loss(net: nn.Module, tokens: Tensor) -> float:
    """The mean over 1024 windows."""
    torch.manual_seed(1)
    with torch.no_grad():
        return sum(float(loss(net, *draw(tokens, 128))) for _ in range(8)) / 8


def rate(share: float) -> float:
    """The learning rate once a share of all steps is done: up to its peak, and down along a cosine."""
    return PEAK * (min(1.0, share / 0.1) * 0.5 * (1 + math.cos(math.pi * share)) + 1e-3)


def train(net: nn.Module, tokens: Tensor, optimizer: torch.optim.Optimizer, some: range, steps: int) -> None:
    """Some of all steps, in an ordinary loop."""
    for step in tqdm(some):
        for group in optimizer.param_groups:
            group["lr"] = rate(step / steps)
        optimizer.zero_grad()
        loss(net, *draw(tokens, BATCH)).backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()


def milliseconds(nets: list[nn.Module], inputs: Tensor, rounds: int = 21) -> list[float]:
    """The median time of a forward pass of each network; they take turns, so that what slows one slows all."""
    times: list[list[float]] = [[] for _ in nets]
    with torch.no_grad():
        for _ in range(rounds):
            for net, own in zip(nets, times, strict=True):
                start = time.perf_counter()
                net(inputs)
                own.append(1000 * (time.perf_counter() - start))
    return [statistics.median(own) for own in times]


def main() -> None:
    parser = argparse.ArgumentParser(description="a transformer that loses the heads and units it does not need")
    parser.add_argument("--steps", type=int, default=2000, help="training steps")
    parser.add_argument("--width", type=int, default=64, help="width of the transformer, a multiple of 8")
    parser.add_argument("--layers", type=int, default=2, help="blocks of attention")
    parser.add_argument("--strength", type=float, default=4.5e-5, help="strength of the group lasso")
    options = parser.parse_args()

    torch.set_num_threads(1)  # So small a model gains less from more cores than it loses where they are busy.
    training, held_out, characters = read()
    steps, remove = options.steps, round(REMOVE * options.steps)

    def made() -> tuple[Transformer, torch.optim.Optimizer]:
        torch.manual_seed(0)
        net = Transformer(characters, options.width, options.layers)
        return net, torch.optim.Adam(net.named_parameters(), lr=PEAK)

    dense, optimizer = made()
    train(dense, training, optimizer, range(steps), steps)

    net, optimizer = made()
    groups = fr.channel_groups(net, (training[None, :CONTEXT],))
    rising = fr.linear_schedule(0.0, options.strength, round((FULL - BEGIN) * steps), round(BEGIN * steps))
    penalty = fr.coupled(fr.group_lasso, groups)
    handle = fr.regularize(optimizer, penalty, strength=rising, module=net, weights="sqrt_size")  # The one line.
    train(net, training, optimizer, range(remove), steps)
    handle.remove()
    print(groups)

    tree, state = fr.remove_dead(fr.with_buffers(net), groups, optimizer.state_dict())
    smaller = fr.resized(net, tree)
    longer = copy.deepcopy(smaller)
    optimizer = torch.optim.Adam(longer.named_parameters(), lr=PEAK)
    optimizer.load_state_dict(state)
    train(longer, training, optimizer, range(remove, steps), steps)
    nets = {"dense": dense, "with dead groups": net, "without": smaller, "trained on": longer}
    for each in nets.values():
        each.eval()

    torch.manual_seed(1)
    unseen = draw(held_out, 128)
    spent = milliseconds(list(nets.values()), unseen[0])
    print(f"\n{'':17} {'heads':>8} {'hidden units':>13} {'parameters':>11} {'held out':>9} {'time':>9}")
    for (name, each), time_of_one in zip(nets.items(), spent, strict=True):
        heads = ", ".join(f"{block.self_attn.num_heads}" for block in each.blocks)
        units = ", ".join(f"{block.linear1.out_features}" for block in each.blocks)
        count = sum(w.numel() for w in each.parameters())
        with torch.no_grad():
            value = unseen_loss(each, held_out)
            print(f"{name:17} {heads:>8} {units:>13} {count:11,d} {value:9.3f} {time_of_one:6.1f} ms")

    with torch.no_grad():
        before, after = net(unseen[0]), smaller(unseen[0])
    difference = float((before - after).abs().max())
    assert difference < 1e-4 * float(before.abs().max())
    print(f"largest difference of their outputs: {difference:.1e}, of outputs up to {before.abs().max():.1f}")


if __name__ == "__main__":
    main()

"""A convolutional network on handwritten digits that loses the channels it does not need.

A channel is a filter, the scale and shift of its normalization and, at the end, the columns of the linear layer that
read it. A group lasso couples all of these in one norm: whole channels become exactly zero while the network is
trained. Then they are taken out, and a smaller, faster network gives the same outputs.

    python examples/structured_sparsity.py
    python examples/structured_sparsity.py --steps 30 --width 8
"""

import argparse
import statistics
import time

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.func import functional_call, grad
from tqdm import tqdm

import funcreg as fr

BATCH = 128


def load() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images of 8 x 8 pixels and their digits, for training and for testing."""
    pixels, digits = load_digits(return_X_y=True)
    images, labels = torch.tensor(pixels / 16, dtype=torch.float32).reshape(-1, 1, 8, 8), torch.tensor(digits)
    train, test = train_test_split(torch.arange(len(labels)), test_size=500, random_state=0, stratify=labels)
    return images[train], labels[train], images[test], labels[test]


def block(inputs: int, outputs: int) -> nn.Sequential:
    # No bias: the shift of the normalization is one.
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU())


def milliseconds(net: nn.Module, images: Tensor) -> float:
    """The median time of a forward pass over all images."""
    times = []
    with torch.no_grad():
        for _ in range(20):
            start = time.perf_counter()
            net(images)
            times.append(1000 * (time.perf_counter() - start))
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description="channels of a convolutional network that die and are removed")
    parser.add_argument("--steps", type=int, default=500, help="training steps")
    parser.add_argument("--width", type=int, default=32, help="channels of the first layer, half of those after it")
    parser.add_argument("--strength", type=float, default=2e-3, help="strength of the group lasso")
    options = parser.parse_args()

    torch.manual_seed(0)
    torch.set_num_threads(1)  # Images this small gain nothing from a second core.
    images, labels, test_images, test_labels = load()

    width = options.width
    net = nn.Sequential(
        block(1, width), block(width, 2 * width), nn.MaxPool2d(2), block(2 * width, 2 * width), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(8 * width, 10),
    )  # fmt: skip
    channels = fr.channel_groups(net)

    def loss(params, buffers, images, labels):
        # Functions write into nothing that they did not make: running statistics are copied, and returned.
        buffers = {name: x.clone() for name, x in buffers.items()}
        logits = functional_call(net, (params, buffers), (images,))
        return F.cross_entropy(logits, labels), buffers

    tx = fr.prox_adam(
        fr.cosine_decay_schedule(1e-2, options.steps),
        fr.coupled(fr.group_lasso, channels),
        strength=options.strength,
        weights="sqrt_size",
    )
    step = fr.fuse(tx, donate=True, backend="eager")  # A net this small would not earn back what compiling takes.
    params, state = step.init(dict(net.named_parameters()))
    buffers = dict(net.named_buffers())
    for _ in tqdm(range(options.steps), desc="training"):
        batch = torch.randint(len(labels), (BATCH,))
        grads, buffers = grad(loss, has_aux=True)(params, buffers, images[batch], labels[batch])
        params, state = step(params, grads, state)

    trained = {**params, **buffers}
    nets = {
        "with dead channels": fr.resized(net, trained).eval(),
        "without": fr.resized(net, fr.remove_dead(trained, channels)).eval(),
    }
    print(nets["without"])

    print(f"\n{'':20} {'channels':>14} {'parameters':>11} {'accuracy':>10} {'time':>9}")
    for name, small in nets.items():
        widths = [layer.num_features for layer in small.modules() if isinstance(layer, nn.BatchNorm2d)]
        count = sum(w.numel() for w in small.parameters())
        accuracy = (small(test_images).argmax(1) == test_labels).double().mean()
        spent = milliseconds(small, test_images)
        print(f"{name:20} {', '.join(map(str, widths)):>14} {count:11,d} {100 * accuracy:8.1f} % {spent:6.1f} ms")

    before, after = (small.double()(test_images.double()) for small in nets.values())
    difference = (before - after).abs().max()
    assert difference < 1e-6
    print(f"largest difference of their outputs: {difference:.1e}")


if __name__ == "__main__":
    main()

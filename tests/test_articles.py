"""The recipes of articles on weight regularization, trained as each is written and by funcreg.

Recipes keep the articles' names and order of calls. Their constants are raised where 25 steps would not tell a
recipe from what it is taken for. The articles:

- codemia: *L1/L2 regularization in PyTorch*
- answers: *How do I add L1/L2 regularization in PyTorch without manually computing it?*
- howto: *How to perform weight regularization in PyTorch?*
- devgex: *Efficient implementation of L1/L2 regularization in PyTorch*
- machinecurve: *How to use L1, L2 and elastic net regularization with PyTorch?*

Those on groups, pruning and constraints are what threads and the code of papers have in common.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn, optim
from torch.func import functional_call, grad, vmap
from torch.nn.utils import prune

import funcreg as fr

STEPS = 25
Batches = list[tuple[Tensor, Tensor]]
Params = dict[str, Tensor]


@pytest.fixture(autouse=True)
def _double_precision_and_one_thread() -> Iterator[None]:
    dtype, threads = torch.get_default_dtype(), torch.get_num_threads()
    torch.set_default_dtype(torch.float64)  # So that the articles' torch.tensor(0.) is in double precision too.
    torch.set_num_threads(1)  # On a busy machine two threads take milliseconds to share a layer norm of 16 rows.
    yield
    torch.set_default_dtype(dtype)
    torch.set_num_threads(threads)


# The articles' networks


class SimpleNet(nn.Module):  # codemia; Net of howto
    def __init__(self):
        super().__init__()
        self.fc1 = nn.Linear(10, 5)
        self.fc2 = nn.Linear(5, 1)

    def forward(self, x):
        x = torch.relu(self.fc1(x))
        return self.fc2(x)


class NormNet(nn.Module):  # SimpleNet with a normalization layer, whose scale is a "weight" too
    def __init__(self):
        super().__init__()
        self.fc1 = nn.Linear(10, 5)
        self.norm = nn.LayerNorm(5)
        self.fc2 = nn.Linear(5, 1)

    def forward(self, x):
        return self.fc2(torch.relu(self.norm(self.fc1(x))))


class MLP(nn.Module):  # machinecurve, with images of 4 by 4
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Flatten(), nn.Linear(4 * 4 * 1, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3)
        )

    def forward(self, x):
        return self.layers(x)

    def compute_l1_loss(self, w):
        return torch.abs(w).sum()

    def compute_l2_loss(self, w):
        return torch.square(w).sum()


class Task(NamedTuple):
    net: Callable[[], nn.Module]
    loss: Callable[[Tensor, Tensor], Tensor]
    batch: Callable[[torch.Generator], tuple[Tensor, Tensor]]

    def model(self) -> nn.Module:
        torch.manual_seed(0)
        return self.net()

    def batches(self, steps: int = STEPS) -> Batches:
        generator = torch.Generator().manual_seed(1)
        return [self.batch(generator) for _ in range(steps)]


def numbers(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    x = torch.randn(16, 10, generator=generator)
    return x, x[:, :3].sum(1, keepdim=True) + 0.1 * torch.randn(16, 1, generator=generator)


def images(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    return torch.randn(10, 1, 4, 4, generator=generator), torch.randint(3, (10,), generator=generator)


SIMPLE = Task(SimpleNet, F.mse_loss, numbers)
NORMED = Task(NormNet, F.mse_loss, numbers)
LINEAR = Task(lambda: nn.Linear(10, 1), F.mse_loss, numbers)  # devgex
IMAGES = Task(MLP, F.cross_entropy, images)
FEATURES = [[0, 1, 2], [3, 4, 5], [6, 7, 8, 9]]


# The recipes, as the articles write them: each trains a model in place


def l1_loop(model, dataloader):  # codemia
    criterion = nn.MSELoss()
    optimizer = optim.SGD(model.parameters(), lr=0.01)
    l1_lambda = 0.001
    for inputs, labels in dataloader:
        optimizer.zero_grad()
        outputs = model(inputs)
        loss = criterion(outputs, labels)
        l1_penalty = 0
        for param in model.parameters():
            l1_penalty += torch.sum(torch.abs(param))
        loss += l1_lambda * l1_penalty
        loss.backward()
        optimizer.step()


def with_loss_term(term):  # answers, which write the term and leave the loop to the reader
    def train(model, dataloader):
        loss_fn = nn.MSELoss()
        optimizer = optim.SGD(model.parameters(), lr=0.01)
        for inputs, labels in dataloader:
            optimizer.zero_grad()
            loss = loss_fn(model(inputs), labels)
            loss = loss + term(model)
            loss.backward()
            optimizer.step()

    return train


def unsquared_norms(model):
    l2_lambda = 0.01
    l2_reg = torch.tensor(0.0)
    for param in model.parameters():
        l2_reg += torch.norm(param)
    return l2_lambda * l2_reg


def norms(norm):  # answers, where norm is torch.linalg.norm; torch.linalg.vector_norm is meant
    def term(model):
        l1_lambda = 0.001
        l1_norm = sum(norm(p, 1) for p in model.parameters())
        return l1_lambda * l1_norm

    return term


def squares(model):
    l2_lambda = 0.01
    l2_reg = sum(p.pow(2).sum() for p in model.parameters())
    return l2_lambda * l2_reg


def norms_of_weights(norm):  # answers, as above
    def term(model):
        l1_reg = torch.tensor(0.0, requires_grad=True)
        for name, param in model.named_parameters():
            if "weight" in name:
                l1_reg = l1_reg + norm(param, 1)
        return 10e-4 * l1_reg

    return term


def squares_of_groups(model, dataloader):  # answers, where "weight_decay * l2" is to be what Adam's option means
    optimizer = optim.Adam(model.parameters(), lr=0.01)
    weight_decay = 0.01
    for inputs, labels in dataloader:
        optimizer.zero_grad()
        parameters = [p for g in optimizer.param_groups for p in g["params"]]  # As published, a list of lists.
        l2 = sum(p.square().sum() for p in parameters)
        loss = F.mse_loss(model(inputs), labels) + weight_decay * l2
        loss.backward()
        optimizer.step()


def with_optimizer(make):  # codemia, answers, devgex
    def train(model, dataloader):
        optimizer = make(model.parameters())
        for inputs, labels in dataloader:
            optimizer.zero_grad()
            nn.MSELoss()(model(inputs), labels).backward()
            optimizer.step()

    return train


def decoupled(momentum, decay):  # answers, in words
    def train(model, dataloader):
        optimizer = optim.SGD(model.parameters(), lr=0.01, momentum=momentum)
        for inputs, labels in dataloader:
            optimizer.zero_grad()
            nn.MSELoss()(model(inputs), labels).backward()
            with torch.no_grad():
                for param in model.parameters():
                    param.mul_(1 - decay)
            optimizer.step()

    return train


def weight_decay_and_norms(model, train_loader):  # howto
    criterion = nn.MSELoss()
    lmbda = 0.01
    optimizer = optim.SGD(model.parameters(), lr=0.01, weight_decay=lmbda)
    for data in train_loader:
        inputs, labels = data
        optimizer.zero_grad()
        outputs = model(inputs)
        loss = criterion(outputs, labels)
        l2_reg = 0
        for param in model.parameters():
            l2_reg += torch.norm(param)
        loss += lmbda * l2_reg
        loss.backward()
        optimizer.step()


def without_regularization(model, dataloader):  # howto, so called: its optimizer is the one with weight_decay
    weight_decay = 1e-4
    optimizer = optim.SGD(model.parameters(), lr=0.1, weight_decay=weight_decay)
    for inputs, targets in dataloader:
        loss = nn.MSELoss()(model(inputs), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def with_regularization(model, dataloader):  # howto
    weight_decay = 1e-4
    optimizer = optim.SGD(model.parameters(), lr=0.1, weight_decay=weight_decay)
    for inputs, targets in dataloader:
        loss = nn.MSELoss()(model(inputs), targets)
        l2_reg = torch.tensor(0.0, requires_grad=True)
        for param in model.parameters():
            l2_reg = l2_reg + torch.norm(param)  # As published, l2_reg += ..., which raises an error.
        loss += weight_decay * l2_reg
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def decay_of_one_layer(model, dataloader):  # howto, in words
    criterion = nn.MSELoss()
    optimizer = optim.SGD(
        [
            {"params": model.fc1.parameters(), "weight_decay": 0.01},
            {"params": model.fc2.parameters(), "weight_decay": 0},
        ],
        lr=0.01,
    )
    for inputs, labels in dataloader:
        optimizer.zero_grad()
        criterion(model(inputs), labels).backward()
        optimizer.step()


def train_step_with_l1(model, data, target, l1_lambda=0.001):  # devgex
    output = model(data)
    loss = nn.MSELoss()(output, target)
    l1_norm = sum(torch.abs(p).sum() for p in model.parameters())
    total_loss = loss + l1_lambda * l1_norm
    total_loss.backward()
    return total_loss


def steps_with_l1(model, dataloader):  # The loop around it, which devgex leaves to the reader
    optimizer = optim.Adam(model.parameters(), lr=0.01)
    for data, target in dataloader:
        optimizer.zero_grad()
        train_step_with_l1(model, data, target)
        optimizer.step()


def concatenated(l1_weight, l2_weight):  # machinecurve
    def train(mlp, trainloader):
        loss_function = nn.CrossEntropyLoss()
        optimizer = torch.optim.Adam(mlp.parameters(), lr=1e-4)
        for data in trainloader:
            inputs, targets = data
            optimizer.zero_grad()
            outputs = mlp(inputs)
            loss = loss_function(outputs, targets)
            parameters = []
            for parameter in mlp.parameters():
                parameters.append(parameter.view(-1))  # noqa: PERF401  # As the article writes it.
            l1 = l1_weight * mlp.compute_l1_loss(torch.cat(parameters))
            l2 = l2_weight * mlp.compute_l2_loss(torch.cat(parameters))
            loss += l1
            loss += l2
            loss.backward()
            optimizer.step()

    return train


def different_way_of_adding_l2(mlp, trainloader):  # machinecurve
    optimizer = torch.optim.Adam(mlp.parameters(), lr=1e-4, weight_decay=1.0)
    for inputs, targets in trainloader:
        optimizer.zero_grad()
        nn.CrossEntropyLoss()(mlp(inputs), targets).backward()
        optimizer.step()


class L1(torch.nn.Module):  # answers
    def __init__(self, module, weight_decay):
        super().__init__()
        self.module = module
        self.weight_decay = weight_decay
        self.hook = self.module.register_full_backward_hook(self._weight_decay_hook)

    def _weight_decay_hook(self, *_):
        for param in self.module.parameters():
            param.grad = self.regularize(param)

    def regularize(self, parameter):
        return self.weight_decay * torch.sign(parameter.data)

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)


class L1Regularizer(nn.Module):  # devgex
    def __init__(self, module, weight_decay):
        super().__init__()
        self.module = module
        self.weight_decay = weight_decay
        self.hook = module.register_full_backward_hook(self._l1_hook)

    def _l1_hook(self, module, grad_input, grad_output):
        for param in self.module.parameters():
            if param.grad is not None:
                param.grad += self.weight_decay * torch.sign(param.data)

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)


# A full backward hook fires when the gradients of the module's inputs are there, and at once, with a warning, if
# no input needs one. In a hidden layer the gradients of the parameters have been accumulated by then: L1 overwrites
# them, and L1Regularizer adds to them, as it should. In a first layer, or around a whole model, they have not: L1
# sets gradients to which backward adds, as it should, and L1Regularizer finds None, which zero_grad() leaves, and
# does nothing; with zero_grad(set_to_none=False) it finds zeros from the second step on. Each is right where the
# other is wrong.


def hooked(wrapper, layer=None, set_to_none=True):
    def train(model, dataloader):
        optimizer = optim.SGD(model.parameters(), lr=0.01)
        if layer is None:
            model = wrapper(model, weight_decay=0.01)
        else:
            setattr(model, layer, wrapper(getattr(model, layer), weight_decay=0.01))
        for inputs, labels in dataloader:
            optimizer.zero_grad(set_to_none)
            nn.MSELoss()(model(inputs), labels).backward()
            optimizer.step()

    return train


# Groups, pruning and constraints


def with_gradient(change):
    """What is done to gradients before the step."""

    def train(model, dataloader):
        optimizer = optim.SGD(model.parameters(), lr=0.01)
        for inputs, labels in dataloader:
            optimizer.zero_grad()
            F.mse_loss(model(inputs), labels).backward()
            change(model)
            optimizer.step()

    return train


def slimming(model):
    for m in model.modules():
        if isinstance(m, nn.LayerNorm):
            m.weight.grad.data.add_(0.1 * torch.sign(m.weight.data))


def with_weights(change, before=False, make=optim.SGD):
    """What is done to weights after the step, or before it."""

    def train(model, dataloader):
        optimizer = make(model.parameters(), lr=0.01)
        for inputs, labels in dataloader:
            optimizer.zero_grad()
            F.mse_loss(model(inputs), labels).backward()
            with torch.no_grad():
                if before:
                    change(model)
                optimizer.step()
                if not before:
                    change(model)

    return train


def against_signs(model):
    for p in model.parameters():
        p.data.sub_(1e-3 * p.data.sign())


def shrunk_without_rate(model):
    for p in model.parameters():
        p.data = F.softshrink(p.data, 1e-3)


def clamped(model):
    for p in model.parameters():
        p.data.clamp_(-0.04, 0.04)


def bounded(eps):
    def change(model):
        for layer in (model.fc1, model.fc2):
            norm = layer.weight.norm(2, dim=0, keepdim=True)
            layer.weight.mul_(norm.clamp(max=0.3) / (norm + eps))

    return change


def rows(model):
    return 0.1 * sum(p.flatten(1).norm(dim=1).sum() for p in (model.fc1.weight, model.fc2.weight))


def features(model):
    return 0.1 * sum(model.fc1.weight[:, g].norm() for g in FEATURES)


def far_from_orthogonal(square):
    def term(model):
        grams = [w @ w.T - torch.eye(len(w)) for w in (model.fc1.weight, model.fc2.weight)]
        return 0.1 * sum((m**2).sum() if square else torch.norm(m) for m in grams)

    return term


def from_the_start(copy):
    start = {}

    def term(model):
        if not start:
            start.update({name: w.clone() if copy else w for name, w in model.state_dict().items()})
        return 0.1 * sum((p - start[name]).pow(2).sum() for name, p in model.named_parameters())

    return term


# The recipes beside the lines of funcreg


class Line(NamedTuple):
    tx: fr.Transform
    penalty: Callable[[Params], Tensor | float] = lambda params: 0.0


class Recipe(NamedTuple):
    task: Task
    train: Callable[[nn.Module, Batches], None]
    same: dict[str, Line]  # What it is.
    other: dict[str, Line] | None = None  # What it is taken for, or would better be.


descent, adam, slow_adam = fr.sgd(0.01), fr.adam(0.01), fr.adam(1e-4)
momentum = fr.sgd(0.01, momentum=0.9)


def in_the_loss(penalty, tx=descent):
    return Line(tx, penalty)


def in_a_chain(*txs, then=descent):
    return Line(fr.chain(*txs, then))


def both_ways(penalty, *hyper, strength=1.0, then=descent, mask=None, **options):
    """A penalty in the loss, and its gradient as a transform."""
    return {
        "in the loss": in_the_loss(lambda params: strength * penalty(params, *hyper, mask=mask, **options), then),
        "in a chain": in_a_chain(fr.add_penalty(penalty, *hyper, strength=strength, mask=mask, **options), then=then),
    }


def largest_columns(params):
    """The sum of torch.linalg.norm(w, 1): for a matrix the norm induced by the 1-norm of vectors."""
    return sum(w.abs().sum(0).amax() for w in params.values())


def largest_columns_of_weights(params):
    return largest_columns({name: w for name, w in params.items() if "weight" in name})


def anchored(params):
    start = {name: p.detach() for name, p in SIMPLE.model().named_parameters()}
    return 0.1 * fr.anchored_l2(params, start)


first, last, named_weight = fr.select("fc1.*"), fr.select("fc2.*"), fr.select("*weight*")
from_the_second_step = fr.join_schedules([fr.constant_schedule(0.0), fr.constant_schedule(0.01)], [1])
sgd = partial(optim.SGD, lr=0.01)
scales = fr.select("norm.weight")
ZEROS = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in SIMPLE.model().named_parameters()}

RECIPES = {
    "l1 by a loop over parameters": Recipe(
        SIMPLE,
        l1_loop,
        same=both_ways(fr.l1, strength=0.001),
        other={"without biases": in_the_loss(lambda params: 0.001 * fr.l1(params, mask=fr.matrices))},
    ),
    "train_step_with_l1": Recipe(LINEAR, steps_with_l1, same=both_ways(fr.l1, strength=0.001, then=adam)),
    "l1 by linalg.norm(p, 1)": Recipe(
        SIMPLE,
        with_loss_term(norms(torch.linalg.norm)),
        same={"largest columns": in_the_loss(lambda params: 0.001 * largest_columns(params))},
        other=both_ways(fr.l1, strength=0.001),
    ),
    "l1 by vector_norm(p, 1)": Recipe(
        SIMPLE, with_loss_term(norms(torch.linalg.vector_norm)), same=both_ways(fr.l1, strength=0.001)
    ),
    "l1 by name and linalg.norm(p, 1)": Recipe(
        NORMED,
        with_loss_term(norms_of_weights(torch.linalg.norm)),
        same={"largest columns": in_the_loss(lambda params: 0.001 * largest_columns_of_weights(params))},
        other=both_ways(fr.l1, strength=0.001, mask=named_weight),
    ),
    "l1 by name and vector_norm(p, 1)": Recipe(
        NORMED,
        with_loss_term(norms_of_weights(torch.linalg.vector_norm)),
        same=both_ways(fr.l1, strength=0.001, mask=named_weight),
        other={"without norm layers": in_the_loss(lambda params: 0.001 * fr.l1(params, mask=fr.matrices))},
    ),
    "l1 concatenated": Recipe(
        IMAGES, concatenated(l1_weight=1.0, l2_weight=0.0), same=both_ways(fr.l1, then=slow_adam)
    ),
    "l2 concatenated": Recipe(
        IMAGES,
        concatenated(l1_weight=0.0, l2_weight=1.0),
        same=both_ways(fr.l2, then=slow_adam) | {"decay": in_a_chain(fr.add_decayed_weights(2.0), then=slow_adam)},
        other={"weight_decay=1.0": in_a_chain(fr.add_decayed_weights(1.0), then=slow_adam)},
    ),
    "l2 by weight_decay=1.0": Recipe(
        IMAGES,
        different_way_of_adding_l2,
        same=both_ways(fr.half_l2, then=slow_adam) | {"decay": in_a_chain(fr.add_decayed_weights(1.0), then=slow_adam)},
        other=both_ways(fr.l2, then=slow_adam),
    ),
    "elastic net 0.3, 0.7": Recipe(
        IMAGES,
        concatenated(l1_weight=0.3, l2_weight=0.7),
        same=both_ways(fr.elastic, *fr.elastic_from_keras(l1=0.3, l2=0.7), then=slow_adam)
        | {"a sum": in_the_loss(lambda params: 0.3 * fr.l1(params) + 0.7 * fr.l2(params), slow_adam)},
        other={"elastic(1, 0.3)": in_the_loss(lambda params: fr.elastic(params, 1.0, 0.3), slow_adam)},
    ),
    "l2 by un-squared norms": Recipe(
        SIMPLE,
        with_loss_term(unsquared_norms),
        same=both_ways(fr.group_lasso, strength=0.01, dim=None),
        other={
            "l2": in_the_loss(lambda params: 0.01 * fr.l2(params)),
            "half_l2": in_the_loss(lambda params: 0.01 * fr.half_l2(params)),
            "global norm": in_the_loss(lambda params: 0.01 * fr.global_norm(params)),
        },
    ),
    "l2 by p.pow(2).sum()": Recipe(
        SIMPLE,
        with_loss_term(squares),
        same=both_ways(fr.l2, strength=0.01) | {"decay": in_a_chain(fr.add_decayed_weights(2 * 0.01))},
        other={"weight_decay=0.01": in_a_chain(fr.add_decayed_weights(0.01))},
    ),
    "l2 by weight_decay * l2": Recipe(
        SIMPLE,
        squares_of_groups,
        same=both_ways(fr.l2, strength=0.01, then=adam)
        | {"decay": in_a_chain(fr.add_decayed_weights(2 * 0.01), then=adam)},
        other={"Adam(weight_decay)": in_a_chain(fr.add_decayed_weights(0.01), then=adam)},
    ),
    "SGD(weight_decay)": Recipe(
        SIMPLE,
        with_optimizer(partial(sgd, weight_decay=0.01)),
        same=both_ways(fr.half_l2, strength=0.01)
        | {
            "decay": in_a_chain(fr.add_decayed_weights(0.01)),
            "converted": in_the_loss(lambda params: fr.elastic(params, *fr.elastic_from_torch(weight_decay=0.01))),
        },
        other={
            "l2": in_the_loss(lambda params: 0.01 * fr.l2(params)),
            "without biases": in_a_chain(fr.add_decayed_weights(0.01, mask=fr.matrices)),
        },
    ),
    "Adam(weight_decay), as published": Recipe(
        SIMPLE,
        with_optimizer(partial(optim.Adam, lr=1e-4, weight_decay=1e-5)),
        same=both_ways(fr.half_l2, strength=1e-5, then=slow_adam)
        | {"decay": in_a_chain(fr.add_decayed_weights(1e-5), then=slow_adam)},
    ),
    "Adam(weight_decay)": Recipe(
        SIMPLE,
        with_optimizer(partial(optim.Adam, lr=0.01, weight_decay=0.01)),
        same=both_ways(fr.half_l2, strength=0.01, then=adam)
        | {"decay": in_a_chain(fr.add_decayed_weights(0.01), then=adam)},
        other={
            "l2": in_the_loss(lambda params: 0.01 * fr.l2(params), adam),
            "AdamW": Line(fr.adamw(0.01, weight_decay=0.01)),
        },
    ),
    "AdamW": Recipe(
        SIMPLE,
        with_optimizer(partial(optim.AdamW, lr=0.01)),
        same={
            "optimizer": Line(fr.adamw(0.01, weight_decay=0.01)),
            "chain": in_a_chain(fr.scale_by_adam(), fr.add_decayed_weights(0.01), then=fr.scale_by_learning_rate(0.01)),
        },
        other={
            "Adam(weight_decay)": in_a_chain(fr.add_decayed_weights(0.01), then=adam),
            "default of optax": Line(fr.adamw(0.01)),
        },
    ),
    "SGD(weight_decay, momentum)": Recipe(
        SIMPLE,
        with_optimizer(partial(sgd, momentum=0.9, weight_decay=0.1)),
        same=both_ways(fr.half_l2, strength=0.1, then=momentum)
        | {"decay": in_a_chain(fr.add_decayed_weights(0.1), then=momentum)},
        other={"decoupled": in_a_chain(fr.trace(0.9), fr.add_decayed_weights(0.1))},
    ),
    "decoupled decay": Recipe(
        SIMPLE,
        decoupled(momentum=0.0, decay=0.001),
        # Without momentum, the coupled one up to a factor: the decay of a step is learning rate times weight_decay.
        same=both_ways(fr.half_l2, strength=0.001 / 0.01) | {"decay": in_a_chain(fr.add_decayed_weights(0.001 / 0.01))},
    ),
    "decoupled decay, momentum": Recipe(
        SIMPLE,
        decoupled(momentum=0.9, decay=0.001),
        same={"decay": in_a_chain(fr.trace(0.9), fr.add_decayed_weights(0.001 / 0.01))},
        other={"coupled": in_a_chain(fr.add_decayed_weights(0.001 / 0.01), then=momentum)},
    ),
    "weight_decay and un-squared norms": Recipe(
        SIMPLE,
        weight_decay_and_norms,
        same={
            "in the loss": in_the_loss(
                lambda params: 0.01 * fr.half_l2(params) + 0.01 * fr.group_lasso(params, dim=None)
            ),
            "in a chain": in_a_chain(
                fr.add_decayed_weights(0.01), fr.add_penalty(fr.group_lasso, strength=0.01, dim=None)
            ),
        },
        other={
            "weight_decay": in_a_chain(fr.add_decayed_weights(0.01)),
            "norms": in_the_loss(lambda params: 0.01 * fr.group_lasso(params, dim=None)),
            "l2": in_the_loss(lambda params: 0.01 * fr.l2(params)),
        },
    ),
    "before regularization": Recipe(
        SIMPLE,
        without_regularization,
        same={"decay": in_a_chain(fr.add_decayed_weights(1e-4), then=fr.sgd(0.1))},
        other={"no regularization": Line(fr.sgd(0.1))},
    ),
    "after regularization": Recipe(
        SIMPLE,
        with_regularization,
        same={
            "in a chain": in_a_chain(
                fr.add_decayed_weights(1e-4),
                fr.add_penalty(fr.group_lasso, strength=1e-4, dim=None),
                then=fr.sgd(0.1),
            )
        },
    ),
    "weight_decay of one layer": Recipe(
        SIMPLE,
        decay_of_one_layer,
        same=both_ways(fr.half_l2, strength=0.01, mask=first)
        | {
            "masked": in_a_chain(fr.add_decayed_weights(0.01, mask=first)),
            "by leaf": in_a_chain(
                fr.add_decayed_weights({"fc1.weight": 0.01, "fc1.bias": 0.01, "fc2.weight": 0.0, "fc2.bias": 0.0})
            ),
        },
        other={"all layers": in_a_chain(fr.add_decayed_weights(0.01))},
    ),
    "L1Regularizer(last layer)": Recipe(
        SIMPLE, hooked(L1Regularizer, "fc2"), same=both_ways(fr.l1, strength=0.01, mask=last)
    ),
    "L1Regularizer(first layer)": Recipe(
        SIMPLE,
        hooked(L1Regularizer, "fc1"),
        same={"nothing": Line(descent)},
        other=both_ways(fr.l1, strength=0.01, mask=first),
    ),
    "L1Regularizer(first layer), zero_grad(set_to_none=False)": Recipe(
        SIMPLE,
        hooked(L1Regularizer, "fc1", set_to_none=False),
        same={"late": in_a_chain(fr.add_penalty(fr.l1, strength=from_the_second_step, mask=first))},
        other=both_ways(fr.l1, strength=0.01, mask=first),
    ),
    "L1Regularizer(model)": Recipe(
        SIMPLE,
        hooked(L1Regularizer),
        same={"nothing": Line(descent)},
        other=both_ways(fr.l1, strength=0.01),
    ),
    "L1(last layer)": Recipe(
        SIMPLE,
        hooked(L1, "fc2"),
        same={
            "without the loss": in_a_chain(
                fr.masked(fr.set_to_zero(), last), fr.add_penalty(fr.l1, strength=0.01, mask=last)
            )
        },
        other=both_ways(fr.l1, strength=0.01, mask=last),
    ),
    "L1(first layer)": Recipe(SIMPLE, hooked(L1, "fc1"), same=both_ways(fr.l1, strength=0.01, mask=first)),
    "L1(model)": Recipe(SIMPLE, hooked(L1), same=both_ways(fr.l1, strength=0.01)),
    "slimming": Recipe(NORMED, with_gradient(slimming), same=both_ways(fr.l1, strength=0.1, mask=scales)),
    "norms of rows": Recipe(
        SIMPLE, with_loss_term(rows), same=both_ways(fr.group_lasso, strength=0.1, mask=fr.matrices)
    ),
    "norms of features": Recipe(
        SIMPLE,
        with_loss_term(features),
        same=both_ways(fr.tree_lasso, strength=0.1, groups=FEATURES, axis=1, mask=fr.select("fc1.weight")),
        other=both_ways(
            fr.tree_lasso, strength=0.1, groups=FEATURES, axis=1, weights="sqrt_size", mask=fr.select("fc1.weight")
        ),
    ),
    "orthogonality": Recipe(
        SIMPLE,
        with_loss_term(far_from_orthogonal(square=True)),
        same=both_ways(fr.orthogonality, strength=0.1, mask=fr.matrices),
    ),
    "orthogonality without a square": Recipe(
        SIMPLE,
        with_loss_term(far_from_orthogonal(square=False)),
        same={},
        other=both_ways(fr.orthogonality, strength=0.1, mask=fr.matrices),
    ),
    "from the start": Recipe(
        SIMPLE, with_loss_term(from_the_start(copy=True)), same={"anchored": in_the_loss(anchored)}
    ),
    "from a state_dict": Recipe(
        SIMPLE,
        with_loss_term(from_the_start(copy=False)),
        same={"nothing": Line(descent)},
        other={"anchored": in_the_loss(anchored)},
    ),
    "against signs": Recipe(
        SIMPLE,
        with_weights(against_signs, before=True, make=optim.Adam),
        same={
            "decay": Line(
                fr.with_weight_decay(adam, "l1_anchor", 0.1, anchor=ZEROS),
            )
        },
        other={"stops at zero": Line(fr.chain(adam, fr.soft_threshold(1e-3)))},
    ),
    "softshrink without the rate": Recipe(
        SIMPLE,
        with_weights(shrunk_without_rate),
        same={"constant": Line(fr.chain(descent, fr.soft_threshold(1e-3)))},
        other={"meant": Line(fr.prox_sgd(0.01, fr.l1, strength=1e-3))},
    ),
    "clamp": Recipe(
        SIMPLE, with_weights(clamped), same={"box": Line(fr.chain(descent, fr.project(fr.box, -0.04, 0.04)))}
    ),
    "norms of columns": Recipe(
        SIMPLE,
        with_weights(bounded(eps=0.0)),
        same={"inputs": Line(fr.chain(descent, fr.project(fr.max_norm, 0.3, dim=0, mask=fr.matrices)))},
        other={"units": Line(fr.chain(descent, fr.project(fr.max_norm, 0.3, mask=fr.matrices)))},
    ),
    "norms of columns and eps": Recipe(
        SIMPLE,
        with_weights(bounded(eps=1e-3)),
        same={},
        other={"inputs": Line(fr.chain(descent, fr.project(fr.max_norm, 0.3, dim=0, mask=fr.matrices)))},
    ),
}


def by_article(task: Task, train: Callable[[nn.Module, Batches], None], batches: Batches | None = None) -> list[Tensor]:
    model = task.model()
    train(model, batches or task.batches())
    return [p.detach() for p in model.parameters()]


def by_funcreg(task: Task, line: Line, batches: Batches | None = None, params: Params | None = None) -> Params:
    model = task.model()
    params = params or {name: p.detach() for name, p in model.named_parameters()}

    def loss(params, inputs, labels):
        return task.loss(functional_call(model, params, (inputs,)), labels) + line.penalty(params)

    state = line.tx.init(params)
    for inputs, labels in batches or task.batches():
        updates, state = line.tx.update(grad(loss)(params, inputs, labels), state, params)
        params = fr.apply_updates(params, updates)
    return params


def distance(params: Params, others: list[Tensor]) -> float:
    return torch.stack([(a - b).abs().max() for a, b in zip(params.values(), others, strict=True)]).max().item()


def every_line(field: str):
    pairs = [
        pytest.param(recipe, line, id=f"{name} - {form}")
        for name, recipe in RECIPES.items()
        for form, line in (getattr(recipe, field) or {}).items()
    ]
    return pytest.mark.parametrize(("recipe", "line"), pairs)


hooks_may_warn = pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")


@hooks_may_warn
@every_line("same")
def test_a_line_of_funcreg_trains_as_the_recipe_does(recipe, line):
    assert distance(by_funcreg(recipe.task, line), by_article(recipe.task, recipe.train)) < 1e-10


def test_what_is_pruned_once_is_the_nearest_point_of_a_set():
    layer, weight = nn.Linear(10, 5), torch.randn(5, 10)
    for cut, nearest in (
        (partial(prune.l1_unstructured, amount=30), fr.top_k.project(weight, 20)),
        (partial(prune.ln_structured, amount=3, n=2, dim=0), fr.group_top_k.project(weight, 2)),
    ):
        layer.weight = nn.Parameter(weight.clone())
        cut(layer, "weight")
        prune.remove(layer, "weight")
        torch.testing.assert_close(layer.weight.detach(), nearest, rtol=0, atol=0)


def test_in_an_ordinary_loop_the_lines_take_the_parameters_of_the_module():
    def trained(model, dataloader, prox=False):
        optimizer = optim.SGD(model.parameters(), lr=0.01)
        if prox:
            fr.regularize(optimizer, fr.l1, strength=0.3, module=model)
        for inputs, labels in dataloader:
            optimizer.zero_grad()
            loss = F.mse_loss(model(inputs), labels)
            if not prox:
                loss = loss + 0.001 * fr.l1(dict(model.named_parameters()))
            loss.backward()
            optimizer.step()

    torch.testing.assert_close(by_article(SIMPLE, trained), by_article(SIMPLE, l1_loop), rtol=0, atol=1e-10)
    assert fr.sparsity(by_article(SIMPLE, partial(trained, prox=True))) > 0


@hooks_may_warn
@every_line("other")
def test_a_recipe_is_not_what_it_is_taken_for(recipe, line):
    assert distance(by_funcreg(recipe.task, line), by_article(recipe.task, recipe.train)) > 1e-5


# Recipes that raise an error as published


def add_in_place_to_a_leaf():  # howto
    l2_reg = torch.tensor(0.0, requires_grad=True)
    l2_reg += torch.norm(torch.ones(2))


def square_a_param_group():  # answers
    optimizer = optim.Adam(SimpleNet().parameters())
    parameters = [g["params"] for g in optimizer.param_groups]
    return sum(p.square().sum() for p in parameters)


def matrix_norm_of_a_convolution():  # answers
    return sum(torch.linalg.norm(p, 1) for p in nn.Conv2d(3, 32, 3).parameters())


def view_of_a_channels_last_weight():  # machinecurve
    return [p.view(-1) for p in nn.Conv2d(3, 32, 3).to(memory_format=torch.channels_last).parameters()]


@pytest.mark.parametrize(
    ("recipe", "error", "message"),
    [
        (add_in_place_to_a_leaf, RuntimeError, "leaf Variable that requires grad"),
        (square_a_param_group, AttributeError, "'list' object has no attribute 'square'"),
        (matrix_norm_of_a_convolution, RuntimeError, "1D or 2D"),
        (view_of_a_channels_last_weight, RuntimeError, "view size is not compatible"),
    ],
)
def test_a_recipe_as_published_raises_an_error(recipe, error, message):
    with pytest.raises(error, match=message):
        recipe()


def test_penalties_take_convolutions_in_any_memory_format():
    weight = nn.Conv2d(3, 32, 3).weight.detach()
    for penalty in (fr.l1, fr.l2, fr.group_lasso):
        torch.testing.assert_close(penalty(weight.to(memory_format=torch.channels_last)), penalty(weight))


# Single facts


@pytest.mark.parametrize("make", [optim.SGD, optim.Adam, optim.RMSprop])
def test_weight_decay_adds_the_weight_once_and_not_twice(make):
    weight = nn.Parameter(torch.tensor([2.0, -3.0]))
    optimizer = make([weight], lr=0.1, weight_decay=0.25)
    weight.grad = -0.25 * weight.detach()  # Of a loss that balances it; devgex adds 2 * weight_decay * weight.
    optimizer.step()
    torch.testing.assert_close(weight.detach(), torch.tensor([2.0, -3.0]), rtol=0, atol=0)


@hooks_may_warn
def test_the_hook_that_replaces_gradients_loses_those_accumulated_before():
    layer = L1(nn.Linear(3, 1, bias=False), weight_decay=0.5)
    weight = layer.module.weight
    for x in torch.eye(3):  # Three micro-batches, each with the gradient x.
        layer(x).sum().backward()
    torch.testing.assert_close(weight.grad, torch.tensor([[0.0, 0.0, 1.0]]) + 0.5 * weight.sign())


@pytest.mark.parametrize(
    ("make", "tx"),
    [
        (partial(optim.SGD, lr=0.05), fr.prox_sgd(0.05, fr.l1, strength=0.5)),
        (partial(optim.Adam, lr=0.05), fr.prox_adam(0.05, fr.l1, strength=0.5)),
    ],
    ids=["sgd", "adam"],
)
def test_l1_in_the_loss_gives_no_exact_zero_and_a_proximal_step_does(make, tx):
    def in_the_loss(model, dataloader):
        optimizer = make(model.parameters())
        for data, target in dataloader:
            optimizer.zero_grad()
            train_step_with_l1(model, data, target, l1_lambda=0.5)
            optimizer.step()

    batches = LINEAR.batches(1) * 400  # The target is the sum of the first three of ten inputs.
    published, proximal = by_article(LINEAR, in_the_loss, batches), by_funcreg(LINEAR, Line(tx), batches)
    assert distance(proximal, published) < 0.1  # Both are near the minimum.
    assert fr.sparsity(published) == 0
    assert fr.sparsity(proximal) == 8 / 11
    assert proximal["weight"].ne(0).tolist() == [[True] * 3 + [False] * 7]
    assert proximal["bias"].eq(0).all()


def test_histograms_before_and_after_are_those_of_the_article():
    model = SIMPLE.model()
    without_regularization(model, SIMPLE.batches())
    weights_before_reg = [param.data.numpy().flatten() for param in model.parameters()]
    with_regularization(model, SIMPLE.batches())
    weights_after_reg = [param.data.numpy().flatten() for param in model.parameters()]

    before = by_funcreg(SIMPLE, RECIPES["before regularization"].same["decay"])
    after = by_funcreg(SIMPLE, RECIPES["after regularization"].same["in a chain"], params=before)
    for params, weights in ((before, weights_before_reg), (after, weights_after_reg)):
        counts = [torch.histc(w, bins=50).tolist() for w in params.values()]
        assert counts == [torch.histc(torch.from_numpy(w), bins=50).tolist() for w in weights]
        assert fr.sparsity(params) == 0


@pytest.mark.parametrize(
    ("make", "transform"),
    [
        (sgd, lambda decay: fr.chain(fr.add_decayed_weights(decay), fr.sgd(0.01))),
        (partial(optim.Adam, lr=0.01), lambda decay: fr.chain(fr.add_decayed_weights(decay), fr.adam(0.01))),
        (partial(optim.AdamW, lr=0.01), lambda decay: fr.adamw(0.01, weight_decay=decay)),
    ],
    ids=["sgd", "adam", "adamw"],
)
def test_one_ensemble_trains_a_grid_of_decays_as_a_loop_over_it_does(make, transform):
    grid = [0.0, 1e-4, 1e-3, 1e-2, 1e-1, 1.0]
    one_by_one = [by_article(SIMPLE, with_optimizer(partial(make, weight_decay=decay))) for decay in grid]

    model = SIMPLE.model()
    params = {name: torch.stack([p.detach()] * len(grid)) for name, p in model.named_parameters()}

    def loss(params, inputs, labels):
        return F.mse_loss(functional_call(model, params, (inputs,)), labels)

    tx = fr.ensemble(transform, torch.tensor(grid))
    state = tx.init(params)
    for inputs, labels in SIMPLE.batches():
        grads = vmap(grad(loss), in_dims=(0, None, None))(params, inputs, labels)
        updates, state = tx.update(grads, state, params)
        params = fr.apply_updates(params, updates)

    for k, weights in enumerate(one_by_one):
        assert distance({name: w[k] for name, w in params.items()}, weights) < 1e-10

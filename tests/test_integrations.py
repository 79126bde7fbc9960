"""Penalties inside the training loops of other libraries give what a loop written by hand gives, bit for bit.

Run by `pytest -m integration` where the libraries of the extra `integrations` are installed.
"""

from __future__ import annotations

import inspect
import itertools
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import funcreg as fr

ROOT = Path(__file__).parent.parent
pytestmark = [pytest.mark.integration, pytest.mark.slow]
#: What the libraries say of their own affairs is no error; what funcreg says is.
quiet = pytest.mark.filterwarnings("default", "error:the optimizer was restored")

EPOCHS, BATCH, CLIP = 4, 16, 0.5
ENTRIES, ROWS = 8e-3, 4e-2  # Strengths that zero some of them, and not all.


def make_net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 3))


def dataset(rows=160):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(rows, 12, generator=generator)
    return TensorDataset(x, x[:, :3].argmax(1))


def batches(size=BATCH):
    return DataLoader(dataset(), batch_size=size)  # In order, so that every loop sees the same batches.


def by_regularize(net, compile=False):
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-2)
    fr.regularize(optimizer, fr.l1, strength=ENTRIES, module=net, mask=fr.matrices, compile=compile)
    return optimizer


def momentum_and_groups(net, compile=False):
    optimizer = torch.optim.SGD(net.named_parameters(), lr=0.2, momentum=0.9)
    fr.regularize(optimizer, fr.group_lasso, strength=ROWS, mask=fr.select("0.weight"), compile=compile)
    return optimizer


def penalized_adam(lr, strength=ENTRIES, weight_decay=0.0):
    return fr.prox_adam(lr, fr.l1, strength=strength, weight_decay=weight_decay, mask=fr.matrices)


def by_optimizer(net, compile=False):
    return fr.Optimizer(net.named_parameters(), penalized_adam, lr=2e-2, compile=compile)


WAYS = {"AdamW and regularize": by_regularize, "SGD and groups": momentum_and_groups, "fr.Optimizer": by_optimizer}
every_way = pytest.mark.parametrize("make", WAYS.values(), ids=WAYS)


HANDLES: list[Any] = []


def scheduled(net):
    """A strength that rises, whose place the library has to keep; the handle is the last of HANDLES."""
    optimizer = torch.optim.Adam(net.parameters(), lr=2e-2)
    strength = fr.linear_schedule(0.0, 2 * ENTRIES, 30)
    HANDLES.append(fr.regularize(optimizer, fr.l1, strength=strength, module=net, mask=fr.matrices, compile=False))
    return optimizer


def falling(optimizer):
    return torch.optim.lr_scheduler.StepLR(optimizer, 10, 0.7)


def constant(optimizer):
    return torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)


def by_hand(make, epochs=EPOCHS, accumulate=1, clip=None, scheduler=falling, size=BATCH):
    """The loop that is written in tutorials; the network that it gives."""
    net = make_net()
    optimizer = make(net)
    schedule = scheduler(optimizer)
    for _ in range(epochs):
        for i, (x, y) in enumerate(batches(size)):
            (F.cross_entropy(net(x), y) / accumulate).backward()
            if (i + 1) % accumulate:
                continue
            if clip is not None:
                nn.utils.clip_grad_norm_(net.parameters(), clip)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    return net


def assert_same(net, other, **tolerance):
    tolerance = tolerance or {"rtol": 0, "atol": 0}
    torch.testing.assert_close(dict(net.state_dict()), dict(other.state_dict()), **tolerance)


def assert_some_zeros(net):
    share = fr.sparsity({name: w.detach() for name, w in net.named_parameters()}, mask=fr.select("0.weight"))
    assert 0.1 < share < 1


# A loop written by hand


@every_way
def test_a_penalty_counts_once_a_step_however_many_batches_it_accumulates(make):
    """Two batches of half the size are one batch; a penalty in the loss of each would count as often, too."""
    whole, halves = by_hand(make, size=2 * BATCH), by_hand(make, accumulate=2)
    assert_same(whole, halves, rtol=1e-4, atol=1e-5)
    assert_some_zeros(halves)
    for a, b in zip(whole.parameters(), halves.parameters(), strict=True):
        assert torch.equal(a == 0, b == 0)


@every_way
def test_a_loop_goes_on_from_its_checkpoint_as_if_unbroken(make, tmp_path):
    unbroken = by_hand(make, epochs=4)
    net = make_net()
    optimizer = make(net)
    schedule = falling(optimizer)
    for epoch in range(4):
        if epoch == 2:
            saved = {"net": net.state_dict(), "optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()}
            torch.save(saved, tmp_path / "new.pt")
            os.replace(tmp_path / "new.pt", tmp_path / "last.pt")
            read = torch.load(tmp_path / "last.pt", weights_only=True)
            net = make_net()
            optimizer = make(net)
            schedule = falling(optimizer)
            net.load_state_dict(read["net"])
            optimizer.load_state_dict(read["optimizer"])
            schedule.load_state_dict(read["schedule"])
        for x, y in batches():
            optimizer.zero_grad()
            F.cross_entropy(net(x), y).backward()
            optimizer.step()
            schedule.step()
    assert_same(net, unbroken)


# Lightning


def lightning_module(make, scheduler=falling):
    import lightning

    class Classifier(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = make_net()

        def training_step(self, batch, index):
            x, y = batch
            return F.cross_entropy(self.net(x), y)

        def configure_optimizers(self):
            optimizer = make(self.net)
            return {
                "optimizer": optimizer,
                "lr_scheduler": {"scheduler": scheduler(optimizer), "interval": "step"},
            }

    return Classifier()


def trainer(folder, **options):
    import lightning

    silent = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    options = {"accelerator": "cpu", "devices": 1, "max_epochs": EPOCHS, **silent, **options}
    return lightning.Trainer(default_root_dir=folder, **options)


@quiet
class TestLightning:
    @pytest.fixture(autouse=True)
    def _installed(self):
        pytest.importorskip("lightning", reason="the extra integrations is not installed")

    @every_way
    @pytest.mark.parametrize(("accumulate", "clip"), [(1, None), (2, CLIP)])
    def test_it_trains_as_the_loop_by_hand(self, make, accumulate, clip, tmp_path):
        module = lightning_module(make)
        fit = trainer(tmp_path, accumulate_grad_batches=accumulate, gradient_clip_val=clip)
        fit.fit(module, batches())
        assert_same(module.net, by_hand(make, accumulate=accumulate, clip=clip))
        assert_some_zeros(module.net)
        assert fit.global_step == EPOCHS * 10 // accumulate

    @every_way
    def test_it_goes_on_from_its_checkpoint_as_if_unbroken(self, make, tmp_path):
        first = trainer(tmp_path, max_epochs=2)
        first.fit(lightning_module(make), batches())
        first.save_checkpoint(tmp_path / "last.ckpt")
        module = lightning_module(make)
        trainer(tmp_path).fit(module, batches(), ckpt_path=tmp_path / "last.ckpt", weights_only=True)
        assert_same(module.net, by_hand(make))

    @every_way
    @pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
    def test_it_trains_in_other_precisions_with_exact_zeros(self, make, precision, tmp_path):
        module = lightning_module(make)
        trainer(tmp_path, precision=precision).fit(module, batches())
        dtype = {"bf16-mixed": torch.float32, "bf16-true": torch.bfloat16, "64-true": torch.float64}[precision]
        assert module.net[0].weight.dtype == dtype
        assert_some_zeros(module.net)

    def test_a_schedule_of_the_strength_goes_on_with_the_checkpoint(self, tmp_path):
        import lightning

        class Resume(lightning.Callback):
            def on_train_start(self, trainer, module):
                HANDLES[-1].load_state_dict({"steps": trainer.global_step})

        first = trainer(tmp_path, max_epochs=2)
        first.fit(lightning_module(scheduled), batches())
        first.save_checkpoint(tmp_path / "last.ckpt")
        module = lightning_module(scheduled)
        trainer(tmp_path, callbacks=[Resume()]).fit(module, batches(), ckpt_path=tmp_path / "last.ckpt")
        assert_same(module.net, by_hand(scheduled))

    @pytest.mark.parametrize(
        "optimizer", [lambda fit, module: fit.optimizers[0], lambda fit, module: module.optimizers()]
    )
    def test_a_callback_regularizes_a_module_that_knows_nothing_of_it(self, optimizer, tmp_path):
        import lightning

        class Regularize(lightning.Callback):
            def on_fit_start(self, fit, module):
                options = {"module": module, "mask": fr.matrices, "compile": False}
                fr.regularize(optimizer(fit, module), fr.l1, strength=ENTRIES, **options)

        module = lightning_module(lambda net: torch.optim.AdamW(net.parameters(), lr=2e-2))
        trainer(tmp_path, callbacks=[Regularize()]).fit(module, batches())
        assert_same(module.net, by_hand(by_regularize))

    @every_way
    @pytest.mark.parametrize("set_up_before", [False, True])
    def test_fabric_trains_as_the_loop_by_hand(self, make, set_up_before):
        import lightning

        fabric = lightning.Fabric(accelerator="cpu", devices=1)
        net = make_net()
        if set_up_before:
            net = fabric.setup(net)  # Names of parameters begin with _forward_module.
        optimizer = make(net)
        schedule = falling(optimizer)
        net, optimizer = (net, fabric.setup_optimizers(optimizer)) if set_up_before else fabric.setup(net, optimizer)
        for x, y in itertools.chain(*[fabric.setup_dataloaders(batches())] * EPOCHS):
            fabric.backward(F.cross_entropy(net(x), y))
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        assert_same(net.module, by_hand(make))


# Accelerate


def accelerated(make, accumulate=1, clip=None, save=None, load=None, epochs=range(EPOCHS), **options):
    """The loop of Accelerate's own documentation; the network and the optimizer that it gives."""
    import accelerate

    accelerate.state.AcceleratorState._reset_state(True)
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=accumulate, **options)
    net = make_net()
    optimizer = make(net)
    net, optimizer, loader, schedule = accelerator.prepare(net, optimizer, batches(), falling(optimizer))
    if make is scheduled:
        accelerator.register_for_checkpointing(HANDLES[-1])
    if load is not None:
        accelerator.load_state(load)
    for _ in epochs:
        for x, y in loader:
            with accelerator.accumulate(net):
                accelerator.backward(F.cross_entropy(net(x), y))
                if clip is not None and accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(net.parameters(), clip)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
    if save is not None:
        accelerator.save_state(save)
    return accelerator.unwrap_model(net), optimizer


@quiet
class TestAccelerate:
    @pytest.fixture(autouse=True)
    def _installed(self):
        pytest.importorskip("accelerate", reason="the extra integrations is not installed")

    @every_way
    @pytest.mark.parametrize(("accumulate", "clip"), [(1, None), (2, CLIP)])
    def test_it_trains_as_the_loop_by_hand(self, make, accumulate, clip):
        net, _ = accelerated(make, accumulate, clip)
        assert_same(net, by_hand(make, accumulate=accumulate, clip=clip))
        assert_some_zeros(net)

    @every_way
    def test_its_state_is_saved_and_loaded_bit_for_bit(self, make, tmp_path):
        half, saved = accelerated(make, save=tmp_path, epochs=range(2))
        again, loaded = accelerated(make, load=tmp_path, epochs=())
        assert_same(half, again)
        torch.testing.assert_close(loaded.state_dict()["state"], saved.state_dict()["state"], rtol=0, atol=0)
        assert loaded.state_dict()["param_groups"] == saved.state_dict()["param_groups"]
        resumed, _ = accelerated(make, load=tmp_path, epochs=range(2, EPOCHS))
        assert_same(resumed, by_hand(make))

    def test_a_schedule_of_the_strength_goes_on_with_the_checkpoint(self, tmp_path):
        accelerated(scheduled, save=tmp_path, epochs=range(2))
        resumed, _ = accelerated(scheduled, load=tmp_path, epochs=range(2, EPOCHS))
        assert_same(resumed, by_hand(scheduled))

    @every_way
    def test_it_trains_in_mixed_precision_with_exact_zeros(self, make):
        net, _ = accelerated(make, mixed_precision="bf16")
        assert net[0].weight.dtype == torch.float32
        assert_some_zeros(net)

    def test_a_fused_step_and_its_state_are_saved_and_loaded_bit_for_bit(self, tmp_path):
        """Parameters of `step.init` have storages of their own; Accelerate drops tensors that share one."""
        import accelerate

        class Chain:
            """What `register_for_checkpointing` asks for."""

            def __init__(self, net):
                self.step = fr.fuse(fr.prox_adam(2e-2, fr.l1, strength=ENTRIES, mask=fr.matrices), donate=True)
                self.params, self.state = self.step.init(dict(net.named_parameters()))
                for name, w in net.named_parameters():
                    w.data = self.params[name]

            def __call__(self, net):
                grads = {name: w.grad for name, w in net.named_parameters()}
                self.params, self.state = self.step(self.params, grads, self.state)

            def state_dict(self):
                return fr.to_state_dict(self.state)

            def load_state_dict(self, flat):
                self.state = fr.from_state_dict(self.state, flat)

        def train(epochs, load=False, save=False):
            accelerate.state.AcceleratorState._reset_state(True)
            accelerator = accelerate.Accelerator(cpu=True)
            net, loader = accelerator.prepare(make_net(), batches())
            chain = Chain(net)
            accelerator.register_for_checkpointing(chain)
            if load:
                accelerator.load_state(tmp_path)
            for x, y in itertools.chain(*[loader] * epochs):
                net.zero_grad()
                accelerator.backward(F.cross_entropy(net(x), y))
                chain(net)
            if save:
                accelerator.save_state(tmp_path)
            return net

        saved, loaded = train(2, save=True), train(0, load=True)
        assert (tmp_path / "model.safetensors").exists()
        assert_same(loaded, saved)
        assert_same(train(2, load=True), train(4))
        assert_some_zeros(loaded)

    def test_a_prepared_optimizer_is_regularized_as_the_one_inside(self):
        import accelerate

        accelerate.state.AcceleratorState._reset_state(True)
        accelerator = accelerate.Accelerator(cpu=True)
        net = make_net()
        net, optimizer, loader = accelerator.prepare(net, torch.optim.AdamW(net.parameters(), lr=2e-2), batches())
        fr.regularize(optimizer, fr.l1, strength=ENTRIES, module=net, mask=fr.matrices, compile=False)
        for x, y in itertools.chain(*[loader] * EPOCHS):
            accelerator.backward(F.cross_entropy(net(x), y))
            optimizer.step()
            optimizer.zero_grad()
        assert_same(net, by_hand(by_regularize, scheduler=constant))


# Transformers


class ForTrainer(nn.Module):
    """What Trainer expects of a model: named inputs, and a dict with the loss."""

    def __init__(self):
        super().__init__()
        self.net = make_net()

    def forward(self, x, labels):
        return {"loss": F.cross_entropy(self.net(x), labels)}


def transformers_trainer(make, folder, **options):
    import transformers

    rows = [{"x": x, "labels": y} for x, y in dataset()]
    model = ForTrainer()
    given = {"per_device_train_batch_size": BATCH, "num_train_epochs": EPOCHS, "save_strategy": "epoch"}
    given |= {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "logging_strategy": "no"}
    arguments = transformers.TrainingArguments(str(folder), **given | options)
    return transformers.Trainer(model, arguments, train_dataset=rows, optimizers=(make(model.net), None))


@quiet
class TestTransformers:
    @pytest.fixture(autouse=True)
    def _installed(self):
        pytest.importorskip("transformers", reason="the extra integrations is not installed")

    @every_way
    def test_it_goes_on_from_its_checkpoint_as_if_unbroken(self, make, tmp_path):
        unbroken = transformers_trainer(make, tmp_path)
        unbroken.train()
        assert_some_zeros(unbroken.model.net)
        resumed = transformers_trainer(make, tmp_path)
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-20"))
        assert_same(resumed.model, unbroken.model)

    def test_a_schedule_of_the_strength_goes_on_with_the_checkpoint(self, tmp_path):
        import transformers

        class Resume(transformers.TrainerCallback):
            def on_train_begin(self, args, state, control, **kwargs):
                HANDLES[-1].load_state_dict({"steps": state.global_step})

        unbroken = transformers_trainer(scheduled, tmp_path)
        unbroken.train()
        resumed = transformers_trainer(scheduled, tmp_path)
        resumed.add_callback(Resume())
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-20"))
        assert_same(resumed.model, unbroken.model)

    @every_way
    def test_it_trains_as_the_loop_by_hand(self, make, tmp_path):
        """With its own order of the batches: one batch is all the data."""
        fit = transformers_trainer(
            make, tmp_path, per_device_train_batch_size=160, num_train_epochs=30, lr_scheduler_type="constant"
        )
        fit.train()
        expected = by_hand(make, epochs=30, size=160, clip=1.0, scheduler=constant)
        assert_same(fit.model.net, expected, rtol=1e-3, atol=1e-5)
        assert_some_zeros(expected)

    @every_way
    def test_in_the_order_of_rows_it_is_the_loop_by_hand_bit_for_bit(self, make, tmp_path):
        import transformers

        if "train_sampling_strategy" not in inspect.signature(transformers.TrainingArguments).parameters:
            pytest.skip("this version of transformers draws the order of rows")
        options = {"lr_scheduler_type": "constant", "train_sampling_strategy": "sequential"}
        fit = transformers_trainer(make, tmp_path, **options)
        fit.train()
        assert_same(fit.model.net, by_hand(make, clip=1.0, scheduler=constant))

    def test_a_callback_regularizes_the_optimizer_that_trainer_makes(self, tmp_path):
        import transformers

        class Regularize(transformers.TrainerCallback):
            def on_train_begin(self, args, state, control, model, optimizer, **kwargs):
                fr.regularize(optimizer, fr.l1, strength=ENTRIES, module=model, mask=fr.matrices, compile=False)

        def fit(checkpoint=None):
            made = transformers_trainer(lambda net: None, tmp_path, learning_rate=2e-2)
            made.add_callback(Regularize())
            made.train(resume_from_checkpoint=checkpoint)
            return made.model

        unbroken = fit()
        assert_some_zeros(unbroken.net)
        assert_same(fit(str(tmp_path / "checkpoint-20")), unbroken)

    @every_way
    def test_a_penalty_counts_once_a_step_however_many_batches_it_accumulates(self, make, tmp_path):
        whole = transformers_trainer(make, tmp_path / "whole")
        whole.train()
        sizes = {"per_device_train_batch_size": BATCH // 2, "gradient_accumulation_steps": 2}
        halves = transformers_trainer(make, tmp_path / "halves", **sizes)
        halves.train()
        assert_same(whole.model, halves.model, rtol=1e-3, atol=1e-4)
        assert_some_zeros(halves.model.net)

    def test_it_makes_an_optimizer_with_its_groups(self, tmp_path):
        import transformers

        given = {"factory": penalized_adam, "lr": 2e-2, "strength": ENTRIES, "compile": False}

        def fit(checkpoint=None):
            arguments = transformers.TrainingArguments(
                str(tmp_path), num_train_epochs=EPOCHS, per_device_train_batch_size=BATCH, save_strategy="epoch",
                weight_decay=0.1, use_cpu=True, report_to="none", disable_tqdm=True, logging_strategy="no",
            )  # fmt: skip
            rows = [{"x": x, "labels": y} for x, y in dataset()]
            made = transformers.Trainer(
                ForTrainer(), arguments, train_dataset=rows, optimizer_cls_and_kwargs=(fr.Optimizer, dict(given))
            )
            made.train(resume_from_checkpoint=checkpoint)
            assert [group["weight_decay"] for group in made.optimizer.param_groups] == [0.1, 0.0]
            return made.model

        unbroken = fit()
        assert_some_zeros(unbroken.net)
        assert_same(fit(str(tmp_path / "checkpoint-20")), unbroken)

    def test_an_optimizer_of_its_own_is_refused_by_its_full_name(self):
        from transformers.optimization import Adafactor

        with pytest.raises(ValueError, match=r"^transformers.optimization.Adafactor is not one .* Adafactor of torch"):
            fr.regularize(Adafactor(make_net().parameters()), fr.l1)

    @every_way
    def test_it_trains_in_mixed_precision_with_exact_zeros(self, make, tmp_path):
        fit = transformers_trainer(make, tmp_path, bf16=True)
        fit.train()
        assert_some_zeros(fit.model.net)


# skorch


def skorch_net(**options):
    import skorch

    class Regularized(skorch.callbacks.Callback):
        def __init__(self, strength=ENTRIES):
            self.strength = strength

        def on_train_begin(self, net, **kwargs):
            self.handle_ = fr.regularize(
                net.optimizer_, fr.l1, strength=self.strength, module=net.module_, mask=fr.matrices, compile=False
            )

        def on_train_end(self, net, **kwargs):
            self.handle_.remove()

    given = {"criterion": nn.CrossEntropyLoss, "lr": 2e-2, "max_epochs": EPOCHS, "batch_size": BATCH, "verbose": 0}
    given |= {"optimizer": torch.optim.AdamW, "train_split": None, "callbacks": [("l1", Regularized())]}
    return skorch.NeuralNetClassifier(make_net(), **given | options)


@quiet
class TestSkorch:
    @pytest.fixture(autouse=True)
    def _installed(self):
        pytest.importorskip("skorch", reason="the extra integrations is not installed")

    def test_it_trains_as_the_loop_by_hand(self):
        x, y = (t.numpy() for t in dataset().tensors)
        net = skorch_net().fit(x, y)
        assert_same(net.module_, by_hand(by_regularize, scheduler=constant))
        assert_some_zeros(net.module_)

    def test_it_goes_on_from_its_checkpoint_as_if_unbroken(self, tmp_path):
        x, y = (t.numpy() for t in dataset().tensors)
        files = {"f_params": tmp_path / "net.pt", "f_optimizer": tmp_path / "optimizer.pt"}
        skorch_net(max_epochs=2).fit(x, y).save_params(**files)
        net = skorch_net(max_epochs=2).initialize()
        net.load_params(**files)
        net.partial_fit(x, y)
        assert_same(net.module_, skorch_net().fit(x, y).module_)

    def test_a_chain_is_its_optimizer(self, tmp_path):
        x, y = (t.numpy() for t in dataset().tensors)
        given = {"optimizer": fr.Optimizer, "optimizer__factory": penalized_adam, "optimizer__compile": False}
        given |= {"optimizer__strength": ENTRIES, "callbacks": None}
        net = skorch_net(**given).fit(x, y)
        assert_same(net.module_, by_hand(by_optimizer, scheduler=constant))
        files = {"f_params": tmp_path / "net.pt", "f_optimizer": tmp_path / "optimizer.pt"}
        skorch_net(**given, max_epochs=2).fit(x, y).save_params(**files)
        again = skorch_net(**given, max_epochs=2).initialize()
        again.load_params(**files)
        assert_same(again.partial_fit(x, y).module_, net.module_)

    def test_a_grid_of_strengths_is_searched(self):
        from sklearn.model_selection import GridSearchCV

        x, y = (t.numpy() for t in dataset().tensors)
        search = GridSearchCV(skorch_net(), {"callbacks__l1__strength": [0.0, ENTRIES, 1.0]}, cv=2, refit=False)
        search.fit(x, y)
        scores = search.cv_results_["mean_test_score"]
        assert scores[2] == min(scores)


# The page


PAGE = (ROOT / "examples" / "integrations.md").read_text()
SECTIONS = dict(zip(*[iter(re.split(r"^## (.*)$", PAGE, flags=re.MULTILINE)[1:])] * 2, strict=True))
SETUP = re.findall(r"^```python\n(.*?)^```", PAGE.partition("\n## ")[0], flags=re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("section", SECTIONS)
def test_blocks_of_the_page_run_as_pasted(section, tmp_path):
    blocks = re.findall(r"^```python\n(.*?)^```", SECTIONS[section], flags=re.MULTILINE | re.DOTALL)
    for library in re.findall(r"^(?:import|from) (\w+)", "\n".join(blocks), flags=re.MULTILINE):
        pytest.importorskip(library, reason="the extra integrations is not installed")
    script = "\n".join(["import torch; torch.set_num_threads(1)", *SETUP, *blocks])
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, check=False)
    assert done.returncode == 0, done.stderr

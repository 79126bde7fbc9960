"""A character transformer, sharded by FSDP2, trained to exact zeros, saved, and resumed on another number of processes.

The loss has no penalty in it: the proximal step takes care of it, on the shards that each process has anyway, without a
collective of its own. The step writes into the parameters of the module. A checkpoint is one flat dict, which
`torch.distributed.checkpoint` writes shard by shard and reads back for any number of processes.

    torchrun --nproc-per-node 2 examples/fsdp.py --steps 100 --save /tmp/checkpoint
    torchrun --nproc-per-node 4 examples/fsdp.py --steps 200 --resume /tmp/checkpoint
"""

import argparse
import os
import shutil
import sysconfig
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from adamw_chain import CONTEXT, Transformer
from torch import Tensor
from torch.distributed.fsdp import fully_shard

import funcreg as fr

BATCH = 16  # Of all processes together, so that their number changes nothing but rounding.


def save(tree: Any, folder: Path) -> None:
    """Write a checkpoint aside, and put it in its place when it is complete: a run that dies leaves the older one."""
    aside, older = folder.with_name(folder.name + ".new"), folder.with_name(folder.name + ".old")
    first = dist.get_rank() == 0
    if first:
        shutil.rmtree(aside, ignore_errors=True)  # Of a run that died while it wrote.
    dist.barrier()
    dcp.save(fr.to_state_dict(tree), checkpoint_id=aside)  # pyright: ignore[reportPrivateImportUsage]  # It is documented.
    if first:
        if folder.exists():
            shutil.rmtree(older, ignore_errors=True)
            os.replace(folder, older)
        os.replace(aside, folder)
        shutil.rmtree(older, ignore_errors=True)
    dist.barrier()


def load(template: Any, folder: Path) -> Any:
    older = folder.with_name(folder.name + ".old")  # Of a run that died between two renames.
    flat = fr.to_state_dict(template)  # What is loaded is written into these tensors.
    place = folder if folder.exists() else older
    dcp.load(flat, checkpoint_id=place)  # pyright: ignore[reportPrivateImportUsage]  # It is documented.
    return fr.from_state_dict(template, flat)


def main() -> None:
    parser = argparse.ArgumentParser(description="FSDP2, an L1 penalty with exact zeros, and resharded checkpoints")
    parser.add_argument("--steps", type=int, default=200, help="training steps in all, those before a resume included")
    parser.add_argument("--width", type=int, default=64, help="width of the transformer, a multiple of 4")
    parser.add_argument("--layers", type=int, default=2, help="blocks of attention")
    parser.add_argument("--strength", type=float, default=1e-3, help="of the L1 penalty")
    parser.add_argument("--save", type=Path, help="folder of the checkpoint to write at the end")
    parser.add_argument("--resume", type=Path, help="folder of the checkpoint to begin with")
    parser.add_argument("--float64", action="store_true", help="compute in float64")
    options = parser.parse_args()

    warnings.filterwarnings("ignore", "FSDP2-wrapped module")  # Nothing is written into what the model returns.
    on_gpu = torch.cuda.is_available()
    dist.init_process_group("nccl" if on_gpu else "gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64 if options.float64 else torch.float32)

    library = Path(sysconfig.get_paths()["stdlib"])
    text = "".join(filter(str.isascii, (library / "argparse.py").read_text(encoding="utf-8")))
    alphabet = sorted(set(text))
    numbers = torch.tensor([alphabet.index(character) for character in text])

    torch.manual_seed(0)
    model = Transformer(len(alphabet), options.width, options.layers).to(device)
    for block in model.blocks:
        fully_shard(block)
    fully_shard(model)

    tx = fr.prox_adam(
        fr.warmup_cosine_decay_schedule(0.0, 3e-3, 20, 400), fr.l1, strength=options.strength, mask=fr.matrices
    )
    step = fr.fuse(tx, donate=True)
    params = {name: w.detach() for name, w in model.named_parameters()}  # In the memory of the module.
    state = tx.init(params)
    done = 0
    if options.resume is not None:
        loaded = load({"params": params, "state": state, "done": 0}, options.resume)
        state, done = loaded["state"], int(loaded["done"])
        for name, w in params.items():
            w.copy_(loaded["params"][name])

    def batch(n: int) -> Tensor:
        """The rows of this process of a batch that depends on the number of the step alone."""
        starts = torch.randint(len(numbers) - CONTEXT, (BATCH,), generator=torch.Generator().manual_seed(n))
        return numbers[starts[rank::world, None] + torch.arange(CONTEXT + 1)].to(device)

    for n in range(done, options.steps):
        rows = batch(n)
        loss = F.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())
        loss.backward()
        params, state = step(params, {name: w.grad for name, w in model.named_parameters()}, state)
        model.zero_grad()
        if (n + 1) % max(options.steps // 5, 1) == 0:
            mean = loss.detach() / world
            dist.all_reduce(mean)
            zeros = fr.sparsity(params, mask=fr.matrices)
            if rank == 0:
                print(f"step {n + 1:4}  loss {mean.item():.6f}  zeros {zeros.item():.3%}", flush=True)

    if options.save is not None:
        save({"params": params, "state": state, "done": options.steps}, options.save)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

"""One step of AdamW with L1 on sharded parameters, against the same step on plain tensors of the sizes of the shards.

Two processes with a thread each, as two GPUs would: each steps its own half of all tensors. Run
`python benchmarks/sharded.py --write`; it writes `benchmarks/sharded.json` and the tables of the pages.
"""

from __future__ import annotations

import datetime
import json
import pathlib
import statistics
import tempfile
import warnings
from typing import Any

import torch
import torch.distributed as dist
from common import (
    THRESHOLD,
    Leaves,
    Row,
    adamw_by_hand,
    adamw_l1,
    against,
    check,
    draw,
    fused_row,
    report,
    shapes,
    start,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.multiprocessing.spawn import spawn

import funcreg as fr

PROCESSES = 2
WORKLOADS = ("transformer", "big", "tiny")
#: Ways to call the step: whether it donates, and whether gradients lie where it reads them.
WAYS = {
    "donating, packed gradients": {"donate": True, "packed": True},
    "donating": {"donate": True, "packed": False},
    "not donating": {"donate": False, "packed": False},
}


def sharded(tree: Leaves, mesh: DeviceMesh) -> Leaves:
    return {name: distribute_tensor(w, mesh, [Shard(0)]) for name, w in tree.items()}


def local(tree: Any) -> Any:
    return fr.tree_map(lambda w: w.to_local().clone(), tree)


def sharded_row(params: Leaves, grads: Leaves, donate: bool, packed: bool) -> Row:
    """The step on sharded tensors; its results are whole, to be compared."""
    row = fused_row(adamw_l1(), params, grads, donate=donate, packed=packed)
    shards = row.results
    row.results = lambda: [w.full_tensor() for w in shards()]  # pyright: ignore[reportAttributeAccessIssue]  # DTensors.
    return row


def measure(quick: bool) -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (PROCESSES,))
    result: dict[str, Any] = {}
    for workload in WORKLOADS:
        sizes = shapes(workload, quick)
        whole, slopes = draw(sizes, 0), draw(sizes, 1)
        params, grads = sharded(whole, mesh), sharded(slopes, mesh)
        for way, options in WAYS.items():
            plain = fused_row(adamw_l1(), local(params), local(grads), **options)
            check(plain, adamw_by_hand(local(params), local(grads), THRESHOLD))

            row = sharded_row(params, grads, **options)
            check(row, adamw_by_hand(whole, slopes, THRESHOLD))
            dist.barrier()
            result.setdefault(workload, {})[way] = against(plain, lambda row=row: row, quick)
            dist.barrier()
    return result


def run(rank: int, folder: str, quick: bool) -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", "nothing was written into the gradients")
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meeting",
        rank=rank,
        world_size=PROCESSES,
        timeout=datetime.timedelta(seconds=300),
    )
    pathlib.Path(folder, f"{rank}.json").write_text(json.dumps(measure(quick)))
    dist.destroy_process_group()


def main() -> None:
    options = start(__doc__)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        spawn(run, (folder, options.quick), nprocs=PROCESSES)
        found = [json.loads(pathlib.Path(folder, f"{rank}.json").read_text()) for rank in range(PROCESSES)]
    mean = lambda *path: statistics.mean([each[path[0]][path[1]][path[2]] for each in found])
    keys = ("ratio", "seconds", "reference seconds")
    rows = {
        workload: {way: {key: mean(workload, way, key) for key in keys} for way in ways}
        for workload, ways in found[0].items()
    }
    report("sharded", {"processes": PROCESSES, "workloads": rows}, options.write)


if __name__ == "__main__":
    main()

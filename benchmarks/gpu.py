"""On a GPU: steps beside torch.optim, ensembles, penalties, first calls, launches and CUDA graphs.

Run `python benchmarks/gpu.py` on a machine with CUDA; it writes `benchmarks/gpu.json`, and with `--write` the table in
`benchmarks/README.md`. Every section stands alone: what it raises is printed and written under "failed", and the next
begins.
"""

from __future__ import annotations

import argparse
import collections
import copy
import datetime
import functools
import gc
import json
import math
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import tables
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call, grad, vmap

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))  # This checkout, installed or not.

import funcreg as fr  # noqa: E402

LIMIT = 480  # Seconds after which no section begins.
RATE, DECAY, THRESHOLD = 1e-3, 1e-2, 1e-6
Leaves = dict[str, Tensor]
lists: Any = torch  # Its types do not tell of its operations on lists.


class Machine(NamedTuple):
    device: torch.device
    quick: bool


# Workloads


def gpt(layers: int, width: int, words: int = 50257) -> list[tuple[int, ...]]:
    """Shapes of the parameters of GPT-2 of some size."""
    norm = [(width,), (width,)]
    attention = [(width, 3 * width), (3 * width,), (width, width), (width,)]
    dense = [(width, 4 * width), (4 * width,), (4 * width, width), (width,)]
    return [(words, width), (1024, width), *[*norm, *attention, *norm, *dense] * layers, *norm]


def shapes(size: str, quick: bool) -> list[tuple[int, ...]]:
    if quick:
        return gpt(2, 32, 500)
    return {"11M": gpt(12, 256, 4096), "124M": gpt(12, 768), "1B": gpt(24, 1792)}[size]


def draw(on: Machine, shapes: list[tuple[int, ...]], seed: int, dtype: torch.dtype = torch.float32) -> Leaves:
    generator = torch.Generator(on.device).manual_seed(seed)
    normal = functools.partial(torch.randn, generator=generator, device=on.device)
    return {f"w{i}": (0.02 * normal(shape)).to(dtype) for i, shape in enumerate(shapes)}


def chains(rate: float, threshold: float) -> dict[str, fr.Transform]:
    def adamw_l1(threshold: Any = threshold) -> fr.Transform:
        decay, descent = fr.add_decayed_weights(DECAY), fr.scale_by_learning_rate(rate)
        return fr.chain(fr.scale_by_adam(), decay, descent, fr.soft_threshold(threshold))

    return {
        "AdamW, L1": adamw_l1(),
        "clip_by_global_norm, AdamW, L1": fr.chain(fr.clip_by_global_norm(1.0), adamw_l1()),
        "prox_adam(l1)": fr.prox_adam(rate, fr.l1, strength=2 * threshold),
        "AdamW, L1 of a strength held as a tensor": adamw_l1(torch.tensor(threshold)),
        "sgd, momentum": fr.sgd(rate, 0.9),
        "lamb": fr.lamb(rate, weight_decay=DECAY),
        "prox_adam(group_lasso)": fr.prox_adam(rate, fr.group_lasso, strength=30 * threshold, weights="sqrt_size"),
    }


# Rows: calls that do the work once


def fused(tx: fr.Transform, params: Leaves, grads: Leaves, packed: bool = False) -> Callable[[], Leaves]:
    """A step that owns a copy of the parameters; packed gradients lie where it reads them."""
    step = fr.fuse(tx, donate=True)
    mine, state = step.init(params)
    if packed:
        given, grads = grads, step.gradients(mine)
        for name, g in given.items():
            grads[name].copy_(g)
    return lambda: step(mine, grads, state)[0]


def optimizer(make: Any, params: Leaves, grads: Leaves, before: Any = None, after: Any = None) -> Callable[[], Any]:
    """A torch optimizer, with something done to its leaves before or after a step."""
    leaves = [w.clone().requires_grad_() for w in params.values()]
    for w, g in zip(leaves, grads.values(), strict=True):
        w.grad = g.clone() if before else g  # What comes before a step writes into gradients.
    opt = make(leaves)

    def call() -> list[Tensor]:
        if before:
            before(leaves)
        opt.step()
        if after:
            with torch.no_grad():
                after(leaves)
        return leaves

    return call


adamw = functools.partial(torch.optim.AdamW, lr=RATE, weight_decay=DECAY, fused=True)
clip = functools.partial(torch.nn.utils.clip_grad_norm_, max_norm=1.0, foreach=True)


def shrink_loop(leaves: list[Tensor], threshold: float = THRESHOLD) -> None:
    for w in leaves:
        w.copy_(F.softshrink(w, threshold))


def shrink_foreach(leaves: list[Tensor]) -> None:
    lists._foreach_sub_(leaves, lists._foreach_clamp_max(lists._foreach_clamp_min(leaves, -THRESHOLD), THRESHOLD))


def ways(params: Leaves, grads: Leaves) -> dict[str, Callable[[], Any]]:
    """To take one step of AdamW with L1."""
    tx = chains(RATE, THRESHOLD)["AdamW, L1"]
    return {
        "fuse, packed gradients": fused(tx, params, grads, packed=True),
        "fuse": fused(tx, params, grads),
        "torch AdamW(fused=True), no L1": optimizer(adamw, params, grads),
        "torch AdamW(fused=True), foreach L1": optimizer(adamw, params, grads, after=shrink_foreach),
        "torch AdamW(fused=True), softshrink loop": optimizer(adamw, params, grads, after=shrink_loop),
    }


# The clock


def wait(on: Machine) -> None:
    if on.device.type == "cuda":
        torch.cuda.synchronize()


def seconds(on: Machine, call: Callable[[], Any], calls: int) -> float:
    """Of one call among some in succession, on the clock of the GPU."""
    if on.device.type != "cuda":
        begin = time.perf_counter()
        for _ in range(calls):
            call()
        return (time.perf_counter() - begin) / calls
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    for _ in range(calls):
        call()
    last.record()
    last.synchronize()
    return first.elapsed_time(last) / 1000 / calls


def turns(on: Machine, rows: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """Median seconds of rows that take turns."""
    rounds, calls = (2, 1) if on.quick else (15, 10)
    for call in rows.values():
        seconds(on, call, 3)  # To compile, and to fill caches and pools of memory.
    times = {name: [] for name in rows}
    for _ in range(rounds):
        for name, call in rows.items():
            times[name].append(seconds(on, call, calls))
    return {name: statistics.median(found) for name, found in times.items()}


def copy_rate(on: Machine) -> float:
    """Bytes read and written in a second by a copy on the device."""
    x = torch.ones(1 << (20 if on.quick else 28), device=on.device)
    y = torch.empty_like(x)
    return 2 * x.numel() * x.element_size() / turns(on, {"copy": lambda: y.copy_(x)})["copy"]


# Sections


def norm(a: Leaves, b: Leaves) -> float:
    """Of the difference between two trees."""
    return math.sqrt(sum(float((a[k].double().cpu() - b[k].double().cpu()).square().sum()) for k in a))


def missed(found: Leaves, expected: Leaves, began: Leaves) -> float:
    """By what share of the way parameters missed where they should be."""
    return norm(found, expected) / norm(expected, began)


def check(on: Machine, name: str, dtype: torch.dtype, tolerance: float) -> Any:
    """Three fused steps are those of eager code in float64 on the CPU, but for the rounding of parameters."""
    large = (70, 60) if on.quick else (2100, 2000)
    odd = [(7,), (300, 200), large, (), (8, 3, 3, 3), (1, 5), (300, 200), (2 * large[0], large[1])]
    began, slopes = draw(on, odd, 0, dtype), [draw(on, odd, n, dtype) for n in (1, 2, 3)]
    double = lambda tree: {k: w.double().cpu() for k, w in tree.items()}
    tx = chains(10 * RATE, 1e3 * THRESHOLD)[name]
    step, expected = fr.fuse(tx, donate=True), double(began)
    state = tx.init(expected)
    for grads in slopes:
        updates, state = tx.update(double(grads), state, expected)
        expected = fr.apply_updates(expected, updates)
    size = math.sqrt(sum(float(w.square().sum()) for w in expected.values()))
    tolerance += torch.finfo(dtype).eps * size / norm(expected, began)
    found = {}
    for packed in (False, True):
        params, state = step.init(began)
        into = step.gradients(params) if packed else {k: torch.empty_like(w) for k, w in began.items()}
        for grads in slopes:
            for k, g in grads.items():
                into[k].copy_(g)
            params, state = step(params, into, state)
        found["packed" if packed else "separate"] = error = missed(params, expected, began)
        assert error < tolerance, f"missed by {error:.1e} of the way, packed={packed}; expected below {tolerance:.1e}"
        zeros, other = (torch.cat([(w.cpu() == 0).view(-1) for w in t.values()]) for t in (params, expected))
        apart = float((zeros != other).double().mean())
        assert apart < (1e-4 if dtype == torch.float32 else 1e-2), f"{apart:.1e} of the entries are zero in one only"
    return found


def step(on: Machine, size: str, dtype: torch.dtype) -> Any:
    """AdamW with L1. Bytes are what one pass must move: gradients read, parameters and moments read and written."""
    chosen = shapes(size, on.quick)
    params, grads = draw(on, chosen, 0, dtype), draw(on, chosen, 1, dtype)
    count = sum(w.numel() for w in params.values())
    found: dict[str, Any] = {"parameters": count, "tensors": len(chosen)}
    for name, took in turns(on, ways(params, grads)).items():
        moment = dtype.itemsize if name.startswith("torch") else 4  # Those of torch.optim are as narrow as parameters.
        size_of = 3 * dtype.itemsize + 4 * moment
        found[name] = {"seconds": took, "bytes a parameter": size_of, "bytes a second": size_of * count / took}
    return found


def chain(on: Machine, name: str) -> Any:
    """Other chains, with packed gradients, beside what torch has."""
    params, grads = (draw(on, shapes("124M", on.quick), seed) for seed in (0, 1))
    rows = {"fuse, packed gradients": fused(chains(RATE, THRESHOLD)[name], params, grads, packed=True)}
    if name.startswith("clip"):
        rows["torch clip_grad_norm_, AdamW(fused=True), foreach L1"] = optimizer(
            adamw, params, grads, before=clip, after=shrink_foreach
        )
    if name.startswith("sgd"):
        sgd = functools.partial(torch.optim.SGD, lr=RATE, momentum=0.9, fused=True)
        rows["torch SGD(fused=True)"] = optimizer(sgd, params, grads)
    return turns(on, rows)


def ensemble(on: Machine) -> Any:
    """Whole training steps of small nets: all in one, or one after the other."""
    members, alone = (8, 4) if on.quick else (256, 16)
    torch.manual_seed(0)
    nets = [
        torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10)) for _ in range(members)
    ]
    nets = [net.to(on.device) for net in nets]
    model = copy.deepcopy(nets[0])
    x, y = torch.randn(128, 64, device=on.device), torch.randint(10, (128,), device=on.device)
    strengths = torch.logspace(-6, -4, members, device=on.device)
    stacked = {k: torch.stack([net.state_dict()[k] for net in nets]) for k in nets[0].state_dict()}

    def slopes(params: Leaves) -> Leaves:
        return vmap(grad(lambda p: F.cross_entropy(functional_call(model, p, (x,)), y)))(params)

    def one(strength: Tensor) -> fr.Transform:
        decay, descent = fr.add_decayed_weights(DECAY), fr.scale_by_learning_rate(RATE)
        return fr.chain(fr.scale_by_adam(), decay, descent, fr.soft_threshold(strength))

    def together(slopes: Callable[[Leaves], Leaves]) -> Callable[[], Leaves]:
        step = fr.fuse(fr.ensemble(one, strengths), donate=True)
        params, state = step.init(stacked)
        return lambda: step(params, slopes(params), state)[0]

    optimizers = [adamw(net.parameters()) for net in nets[:alone]]
    thresholds = strengths.tolist()

    def loop() -> None:
        for net, opt, threshold in zip(nets, optimizers, thresholds, strict=False):
            opt.zero_grad()
            F.cross_entropy(net(x), y).backward()
            opt.step()
            with torch.no_grad():
                shrink_loop(list(net.parameters()), threshold)

    rows = {"fuse(ensemble)": together(slopes), "fuse(ensemble), gradients compiled": together(torch.compile(slopes))}
    for row in [loop, *rows.values()] * 3:
        row()
    loop()
    for params in [row() for row in rows.values()]:
        mine = {f"{i} {k}": w[i] for k, w in params.items() for i in range(alone)}
        theirs = {f"{i} {k}": w.detach() for i, net in enumerate(nets[:alone]) for k, w in net.named_parameters()}
        error = missed(mine, theirs, {f"{i} {k}": w[i] for k, w in stacked.items() for i in range(alone)})
        assert error < 1e-2, f"members missed by {error:.1e} of the way where a loop goes"
    times = turns(on, {**rows, "loop": loop})
    times["loop over members"] = times.pop("loop") * members / alone
    return {"members": members, "timed in the loop": alone, **times}


def penalty(on: Machine) -> Any:
    """Value and gradient of a penalty; a pass over parameters and gradients moves 8 bytes for each."""
    params = draw(on, shapes("124M", on.quick), 0)
    leaves = [w.clone().requires_grad_() for w in params.values()]
    articles = {
        "l1": lambda w: w.abs().sum(),
        "elastic": lambda w: 0.3 * w.abs().sum() + 0.35 * w.square().sum(),
    }
    ours = {"l1": (fr.l1,), "elastic": (fr.elastic, 1.0, 0.3)}
    rows: dict[str, Callable[[], Any]] = {}
    for name, term in articles.items():
        p, *hyper = ours[name]

        def loop(term: Any = term) -> tuple[Tensor, list[Any]]:
            for w in leaves:
                w.grad = None
            value = torch.zeros((), device=on.device)
            for w in leaves:
                value = value + term(w)
            value.backward()
            return value.detach(), [w.grad for w in leaves]

        compiled = fr.value_and_grad(p, *hyper)
        mine = {
            f"{name}, eager": lambda p=p, hyper=hyper: (p(params, *hyper), p.grad(params, *hyper)),
            f"{name}, value_and_grad": lambda compiled=compiled: compiled(params),
        }
        for row in mine.values():
            (value, slopes), (theirs, expected) = row(), loop()
            torch.testing.assert_close(value, theirs, rtol=1e-4, atol=0)
            for a, b in zip(slopes.values(), expected, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
        rows.update({f"{name}, loop and backward": loop, **mine})
    return turns(on, rows)


def first_call(on: Machine) -> None:
    """In a process of its own: print the seconds of init and the first step."""
    params, grads = (draw(on, shapes("124M", on.quick), seed) for seed in (0, 1))
    wait(on)
    begin = time.perf_counter()
    fused(chains(RATE, THRESHOLD)["AdamW, L1"], params, grads)()
    wait(on)
    print(time.perf_counter() - begin)


def compilation(on: Machine) -> Any:
    """The first call of a step in a new process, with an empty cache and then with a full one."""
    with tempfile.TemporaryDirectory() as cache:
        env = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache, "TRITON_CACHE_DIR": f"{cache}/triton"}
        command = [sys.executable, __file__, "--first-call", "--device", on.device.type, *["--quick"] * on.quick]
        found = {}
        for name in ("cold", "warm"):
            done = subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=120)
            if done.returncode:
                raise RuntimeError(f"the process failed:\n{done.stderr[-2000:]}")
            found[name] = float(done.stdout.split()[-1])
    return found


def launches(on: Machine) -> Any:
    """What one step starts on the GPU: kernels, and copies and fills of memory."""
    from torch.profiler import ProfilerActivity, profile

    params, grads = (draw(on, shapes("124M", on.quick), seed) for seed in (0, 1))
    found = {}
    for name, call in ways(params, grads).items():
        for _ in range(3):
            call()
        wait(on)
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
            call()
            wait(on)
        events = [e for e in profiled.events() or [] if str(e.device_type).endswith("CUDA")]
        names = [e.name for e in events if not e.name.startswith("Optimizer.")]  # Those are only marks in time.
        copies = [n for n in names if n.startswith("Mem")]
        if not names:
            raise RuntimeError("the profiler saw nothing on the GPU")
        most = collections.Counter(names).most_common(5)
        found[name] = {"kernels": len(names) - len(copies), "copies and fills": len(copies), "most": dict(most)}
    return found


def graph(on: Machine, size: str) -> Any:
    """A step captured into a CUDA graph goes where the step goes."""
    params, grads = (draw(on, shapes(size, on.quick), seed) for seed in (0, 1))
    tx = chains(RATE, THRESHOLD)["AdamW, L1"]
    plain, captured = (fused(tx, params, grads, packed=True) for _ in range(2))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            captured()
    torch.cuda.current_stream().wait_stream(side)
    recorded = torch.cuda.CUDAGraph()
    with torch.cuda.graph(recorded):
        replayed = captured()
    for _ in range(2):
        recorded.replay()
    for _ in range(4):
        plain()
    assert missed(replayed, plain(), params) < 1e-6, "replays of the graph went elsewhere"
    return turns(on, {"fuse, packed gradients": plain, "the same, replayed": recorded.replay})


def sections(on: Machine) -> dict[str, Callable[[], Any]]:
    """The most important first, in case that time runs out."""
    kinds = {"float32": (torch.float32, 1e-4), "bfloat16": (torch.bfloat16, 1e-2)}
    first, *others = chains(RATE, THRESHOLD)
    checks = {
        f"check {name}, {dtype}": functools.partial(check, on, name, *kind)
        for name in (first, *others)
        for dtype, kind in kinds.items()
    }
    found: dict[str, Callable[[], Any]] = {"copy": lambda: copy_rate(on), **dict(list(checks.items())[:2])}
    for size in ("124M", "1B"):
        for dtype, (kind, _) in kinds.items():
            found[f"step {size}, {dtype}"] = functools.partial(step, on, size, kind)
    if on.device.type == "cuda":
        found["launches"] = lambda: launches(on)
    found.update({"compilation": lambda: compilation(on), **checks})
    found.update({"penalty": lambda: penalty(on), "ensemble": lambda: ensemble(on)})
    found.update({f"chain {name}": functools.partial(chain, on, name) for name in others})
    if on.device.type == "cuda":  # Last: a capture that fails may leave streams in disorder.
        found.update({f"graph {size}": functools.partial(graph, on, size) for size in ("11M", "124M")})
    return found


# The report


def run_all(on: Machine, chosen: str, path: pathlib.Path | None) -> dict[str, Any]:
    """Results of the sections whose names begin with a choice, and what failed; written after every section."""
    result: dict[str, Any] = {"sections": {}, "failed": {}, "seconds": {}}
    if chosen and path and path.exists():
        result = json.loads(path.read_text())  # The others stay as they were.
    result["gpu"] = torch.cuda.get_device_name() if on.device.type == "cuda" else None
    result.update({"torch": torch.__version__, "date": datetime.date.today().isoformat()})
    begin = time.perf_counter()
    for name, run in sections(on).items():
        since = time.perf_counter()
        if not name.startswith(tuple(chosen.split(","))):
            continue
        result["failed"].pop(name, None)
        try:
            if since - begin > LIMIT:
                raise TimeoutError(f"{since - begin:.0f} s are over")
            result["sections"][name] = run()
            print(name, json.dumps(result["sections"][name], indent=1))
        except Exception as error:
            traceback.print_exc()
            result["failed"][name] = f"{type(error).__name__}: {error}"[:2000]
        now = time.perf_counter()
        result["seconds"][name] = round(now - since, 1)
        print(f"-- {name}: {now - since:.1f} s, {now - begin:.0f} s in all", flush=True)
        if path:
            path.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
        gc.collect()
        if on.device.type == "cuda":
            torch.cuda.empty_cache()
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sections", default="", help="beginnings of names, with commas between; by default all")
    parser.add_argument("--quick", action="store_true", help="small sizes and no JSON: only to see that it works")
    parser.add_argument("--write", action="store_true", help="put the table into the page")
    parser.add_argument("--table", action="store_true", help="measure nothing: write the table of the JSON")
    parser.add_argument("--device", default="cuda", help=argparse.SUPPRESS)
    parser.add_argument("--first-call", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    warnings.filterwarnings("error", message="fuse ")  # A step that runs without compiled kernels is no row.
    on, path = Machine(torch.device(options.device), options.quick), HERE / "gpu.json"
    if options.table:
        tables.write()
    elif on.device.type == "cuda" and not torch.cuda.is_available():
        print("This benchmark needs a GPU with CUDA; nothing was measured or written.")
    elif options.first_call:
        first_call(on)
    else:
        result = run_all(on, options.sections, None if options.quick or on.device.type == "cpu" else path)
        print("failed:", json.dumps(result["failed"], indent=1))
        if options.write and not options.quick:
            tables.write()


if __name__ == "__main__":
    main()

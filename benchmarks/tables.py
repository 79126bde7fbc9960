"""The tables of the pages, made from the numbers in `benchmarks/*.json`: `python benchmarks/tables.py` writes them all.

A table stands between `<!-- name -->` and `<!-- end -->`. It imports nothing but the standard library, so that it runs
wherever numbers are measured.
"""

from __future__ import annotations

import json
import pathlib
import re
import statistics
from collections.abc import Callable
from typing import Any

HERE = pathlib.Path(__file__).resolve().parent
PAGES = [HERE.parent / "README.md", HERE / "README.md"]
PAGES += [HERE.parent / "examples" / name for name in ("smaller.md", "scaling.md")]
Numbers = dict[str, Any]
Rows = list[list[str]]


def saved(name: str) -> Numbers:
    """The numbers of an earlier run, or an empty dictionary."""
    path = HERE / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else {}


# From the numbers of a benchmark to the rows of its table, the first of which is the header


WORKLOADS = {"transformer": "300 tensors, 10.7M", "big": "5 tensors, 40M", "tiny": "1000 tensors, 64k"}


def step(found: Numbers) -> Rows:
    workloads = found["workloads"]
    names = dict.fromkeys(name for times in workloads.values() for name in times)
    ours = [name for name in names if name.startswith("funcreg")]
    rows = [["AdamW, one step"], *([name] for name in ours), [found["reference"]]]
    rows += [[name] for name in names if name not in ours]
    for workload, times in workloads.items():
        seconds = statistics.median([each["reference seconds"] for each in times.values()])
        for row in rows:
            row.append(f"{times[row[0]]['ratio']:.2f}" if row[0] in times else "")
        rows[0][-1] = WORKLOADS[workload]
        rows[len(ours) + 1][-1] = f"1.00 ({1e3 * seconds:.1f} ms)"
    return rows


def loops(found: Numbers) -> Rows:
    """Steps of the loops that people have, each in units of torch's fused optimizer and a softshrink loop."""
    workloads = found["workloads"]
    rows = [["one step, with L1", *(WORKLOADS[name] for name in workloads)]]
    for optimizer, ways in next(iter(workloads.values())).items():
        times = [each[optimizer] for each in workloads.values()]
        paces = [statistics.median([way["reference seconds"] for way in each.values()]) for each in times]
        rows.append([f"{optimizer} fused, softshrink loop", *(f"1.00 ({1e3 * pace:.1f} ms)" for pace in paces)])
        rows += [[way, *(f"{each[way]['ratio']:.2f}" for each in times)] for way in ways]
    return rows


def penalty(found: Numbers) -> Rows:
    names = list(next(iter(found["rows"].values())))
    rows = [["value and gradient, 300 tensors, 10.7M", *(f"`{name}`" for name in names)]]
    rows.append([found["reference"], *["1.00"] * len(names)])
    return rows + [[way, *(f"{times[name]['ratio']:.2f}" for name in names)] for way, times in found["rows"].items()]


def ensemble(found: Numbers) -> Rows:
    rows = [["training step, 32 networks", "speed"], [found["reference"], "1x"]]
    return rows + [[name, f"{1 / each['ratio']:.1f}x"] for name, each in found["rows"].items()]


def sweep(found: Numbers) -> Rows:
    reference = found["rows"][found["reference"]]["seconds"]
    rows = [[f"64 trainings of {found['epochs']} epochs", "seconds", "speed", "best accuracy", "mean over the grid"]]
    for name, each in found["rows"].items():
        cells = [f"{each['seconds']:.0f}", f"{reference / each['seconds']:.1f}x"]
        rows.append([name, *cells, *(f"{100 * each[key]:.1f} %" for key in ("best", "mean"))])
    return rows


def paths(found: Numbers) -> Rows:
    ways = list(dict.fromkeys(way for times in found["rows"].values() for way in times))
    rows = [["seconds of a path", *ways]]
    for name, times in found["rows"].items():
        rows.append([name, *(f"{times[way]:.3g}" if way in times else "—" for way in ways)])
    return rows


def chains(found: Numbers) -> Rows:
    rows = [[name, each["twin"], f"{each['ratio']:.2f}"] for name, each in found["rows"].items()]
    return [["chain, donating", "against", "ratio"], *rows]


def first_call(found: Numbers) -> Rows:
    trees = list(dict.fromkeys(tree for times in found["seconds"].values() for tree in times))
    rows = [["first call, seconds, cold / warm cache", *trees]]
    for chain, times in found["seconds"].items():
        cells = [times.get(tree) for tree in trees]
        rows.append([chain, *(f"{each['cold']:.1f} / {each['warm']:.1f}" if each else "" for each in cells)])
    return rows


def memory(found: Numbers) -> Rows:
    rows = [[name, f"{each['held']:.2f}", f"{each['passing']:.2f}"] for name, each in found["rows"].items()]
    return [["AdamW, 300 tensors, 10.7M", "held", "passing"], *rows]


def scaling(found: Numbers) -> Rows:
    rows = [["", "torch fused, no L1", "funcreg", "ratio", "with packed gradients", "ratio"]]
    for name, sweep in found["sweeps"].items():
        for count, ways in sweep.items():
            cells = [f"{1e3 * ways['packed']['reference seconds']:.2f} ms"]
            for times in (ways["gathered"], ways["packed"]):
                cells += [f"{1e3 * times['seconds']:.2f} ms", f"{times['ratio']:.2f}"]
            rows.append([f"{int(count):,} {name}", *cells])
    return rows


def sharded(found: Numbers) -> Rows:
    """Steps on sharded tensors, each in units of the same step on plain tensors of the sizes of the shards."""
    workloads = found["workloads"]
    rows = [[f"AdamW and L1, {found['processes']} processes", *(WORKLOADS[name] for name in workloads)]]
    for way in next(iter(workloads.values())):
        cells = [ways[way] for ways in workloads.values()]
        rows.append([way, *(f"{each['ratio']:.2f} ({1e3 * each['seconds']:.2f} ms)" for each in cells)])
    return rows


def training(found: Numbers) -> Rows:
    pace = sorted(each["reference seconds"] for each in found["rows"].values())
    rows = [["training a small transformer", "steps a second", "speed"]]
    rows.append([found["reference"], f"{1 / pace[len(pace) // 2]:.0f}", "1.00x"])
    for name, each in found["rows"].items():
        rows.append([name, f"{1 / each['seconds']:.0f}", f"{1 / each['ratio']:.2f}x"])
    return rows


def which_l1(found: Numbers) -> Rows:
    rows = [["way", "error against scikit-learn", f"exact zeros (of {found['zeros of the solution']})"]]
    for row in found["rows"]:
        said = "none" if not row["zeros"] else f"{row['zeros']}" + ("" if row["same zeros"] else ", not the right ones")
        rows.append([row["way"], f"{row['error']:.0e}", said])
    return rows


def support(found: Numbers) -> Rows:
    rows = [["way", "accuracy", "loss + penalty", "exact zeros", "support that changes in an epoch"]]
    for row in found["rows"]:
        zeros = f"{100 * row['zeros']:.0f} %" if row["zeros"] else "none"
        change = f"{100 * row['change']:.1f} %" if row["zeros"] else ""
        rows.append([row["way"], f"{100 * row['accuracy']:.1f} %", f"{row['objective']:.3f}", zeros, change])
    return rows


def smaller(found: Numbers) -> Rows:
    rows = [["network", "way", "accuracy", "parameters", "memory", "time", "outputs change by"]]
    for name, ways in found["networks"].items():
        for row in ways:
            time = f"{row['time']['ratio']:.2f}" if row["time"] else ""
            change = f"{row['change']:.0e}" if row["change"] else ""
            cells = [NETWORKS[name], row["way"], f"{100 * row['accuracy']:.1f} %", f"{row['parameters']:,}"]
            rows.append([*cells, f"{row['memory']:.2f}", time, change])
    return rows


NETWORKS = {"residual": "residual, 30 epochs", "linear": "three linear layers, 60 epochs"}


def gpu(found: Numbers) -> Rows:
    """Steps on a GPU, with their share of the bandwidth of a copy."""
    columns = {name[5:]: times for name, times in found["sections"].items() if name.startswith("step ")}
    rows = [["AdamW with L1", *columns]]
    for way in [way for way in next(iter(columns.values())) if way.startswith(("fuse", "torch"))]:
        rows.append([way])
        for times in columns.values():
            share = times[way]["bytes a second"] / found["sections"]["copy"]
            rows[-1].append(f"{times[way]['seconds'] * 1e3:.2f} ms ({share:.0%})")
    return rows


# A GPU beside the CPU


GPU_ROWS = {
    "funcreg, donating, packed gradients": "fuse, packed gradients",
    "funcreg, donating": "fuse",
    "torch `AdamW(fused=True)`, no L1": "torch AdamW(fused=True), no L1",
    "torch fused + softshrink loop": "torch AdamW(fused=True), softshrink loop",
}
GPU_COLUMNS = {"124M": "step 124M, float32", "1B": "step 1B, float32", "124M, bfloat16": "step 124M, bfloat16"}


def speed(found: Numbers) -> Rows:
    """The rows that were measured on both, in units of torch's AdamW."""
    on_gpu = saved("gpu")
    reference, workloads = found["reference"], {name: found["workloads"][name] for name in ("transformer", "big")}
    rows = [["AdamW and L1, one step", *(f"CPU, {WORKLOADS[name]}" for name in workloads)]]
    rows[0] += [f"{on_gpu['gpu'].removeprefix('NVIDIA ')}, {column}" for column in GPU_COLUMNS]
    units = [statistics.median([each["reference seconds"] for each in times.values()]) for times in workloads.values()]
    sections = [on_gpu["sections"][section] for section in GPU_COLUMNS.values()]
    units += [section[GPU_ROWS[reference]]["seconds"] for section in sections]
    for name, way in GPU_ROWS.items():
        ratios = [times[name]["ratio"] if name in times else None for times in workloads.values()]
        ratios += [section[way]["seconds"] / section[GPU_ROWS[reference]]["seconds"] for section in sections]
        if name == reference:
            rows.append([name, *(f"1.00 ({1e3 * unit:.1f} ms)" for unit in units)])
        else:
            rows.append([name, *("" if ratio is None else f"{ratio:.2f}" for ratio in ratios)])
    return rows


# The pages


#: From the name of a table to what makes it and the file of its numbers.
TABLES: dict[str, tuple[Callable[[Numbers], Rows], str]] = {
    **{f.__name__: (f, f.__name__) for f in (step, penalty, ensemble, chains, first_call, memory, scaling, training)},
    **{f.__name__: (f, f.__name__) for f in (sweep, paths, which_l1, support, smaller, gpu, sharded, loops)},
    "speed": (speed, "step"),
}


def machine(found: Numbers) -> str:
    """Where the numbers come from, if it matters to them."""
    if found.get("gpu"):
        return f"\nMeasured on an {found['gpu']} with torch {found['torch']}, {found['date']}.\n"
    if "cpu" not in found:
        return ""
    cores = "one core" if found["threads"] == 1 else f"{found['threads']} cores"
    return f"\nMeasured on {cores} of an {found['cpu']} with torch {found['torch']}, {found['date']}.\n"


def table(name: str) -> str:
    """A table in Markdown, and below it the machine."""
    make, source = TABLES[name]
    found = saved(source)
    header, *rows = make(found)
    lines = [f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows)]
    return "\n".join(lines) + "\n" + machine(found)


def filled(text: str) -> str:
    """A page with each of its tables made anew."""

    def made(marked: re.Match[str]) -> str:
        name = marked[1]
        return f"<!-- {name} -->\n{table(name)}<!-- end -->" if name in TABLES and saved(TABLES[name][1]) else marked[0]

    return re.sub(r"<!-- (\w+) -->\n.*?<!-- end -->", made, text, flags=re.DOTALL)


def write() -> None:
    for page in PAGES:
        page.write_text(filled(page.read_text()))


if __name__ == "__main__":
    write()

"""``python -m benchmarks.tune``: time launch configs on this GPU, write the best into the tables.

From the root of a checkout, with torch and Triton. Every candidate must agree with the reference
before it counts. The tables are ``kernels/configs/*.json``: look at the difference and commit it;
kernels then have the same bits on every GPU of that architecture. Exit codes: 0 written, 2 there is
no GPU or no such table.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.gpu_report import cases, ops
from benchmarks.gpu_report.setting import Setting, median_seconds, rotated
from pinet_fast.kernels import _configs

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from benchmarks.gpu_report.cases import Case

Config = dict[str, int]
MIN_GAIN = 0.02  # what a candidate must gain over the entry that holds, to be worth another

_PRODUCT = {"num_warps": (4, 8), "num_stages": (2, 3, 4)}
_TILE = {"TILE_ELEMENTS": (1024, 2048, 4096), "num_warps": (4, 8)}
GRIDS: dict[str, dict[str, tuple[int, ...]]] = {
    "stratified_linear_backward": {
        "BLOCK_WIDE": (64, 128), "BLOCK_DEEP": (64, 128), "ROWS": (16, 32, 64), **_PRODUCT,
        "programs": (132, 264, 528),
    },
    "routed_linear": {
        "BLOCK_ROWS": (32, 64, 128), "BLOCK_WIDE": (64, 128), "BLOCK_DEEP": (16, 32, 64),
        **_PRODUCT,
    },
    "stratified_norm_backward": {**_TILE, "TILES": (4, 8, 16)},
    "stratum_sums": {**_TILE, "ROWS": (16, 32, 64), "TILES": (4, 8, 16)},
    "stratified_embedding": {
        "TILE_ELEMENTS": (512, 1024, 2048), "LONG": (32, 64, 128), "FOLD_ROWS": (16,),
        "num_warps": (2, 4),
    },
    "stratum_gram": {"TILE_ELEMENTS": (1024, 2048), "TILES": (16, 32, 64), "num_warps": (4, 8)},
    "stratum_combine": {"TILE_BYTES": (2048, 4096), "TILES": (4, 8, 16), "num_warps": (4, 8)},
}  # fmt: skip


@dataclass(frozen=True)
class Target:
    """An entry to be filled: where it goes, and the case that stands for it."""

    table: str
    dtype: str
    bucket: str
    case: Case


def targets(setting: Setting) -> Iterator[Target]:
    """Yield every entry of every table, with a case of its bucket."""
    make = cases.Maker(setting)
    half, single = torch.bfloat16, torch.float32
    count = setting.pick(65536, 70)
    formats = (
        (half, "ieee"), (torch.float16, "ieee"), (single, "ieee"), (single, "tf32"),
        (single, "tf32x3"),
    )  # fmt: skip
    for bucket, width in (("small", setting.pick(64, 17)), ("large", setting.pick(256, 130))):
        for dtype, precision in formats:
            case = cases.linear_case(make, count, width, dtype, precision, True)
            yield Target("stratified_linear_backward", _format_name(dtype, precision), bucket, case)
    for dtype, precision in formats:
        case = cases.routed_case(make, count, setting.pick(256, 20), dtype, precision, True)
        yield Target("routed_linear", _format_name(dtype, precision), "all", case)
    for dtype in (half, single):
        name = cases.name_of(dtype)
        narrow = cases.norm_case(make, count, setting.pick(256, 20), dtype)
        yield Target("stratified_norm_backward", name, "narrow", narrow)
        wide = cases.norm_case(make, setting.pick(8192, 5), setting.pick(4096, 1100), dtype)
        yield Target("stratified_norm_backward", name, "wide", wide)
        sums = cases.sums_case(make, count, setting.pick(256, 20), dtype)
        yield Target("stratum_sums", name, "all", sums)
    size = setting.pick((1 << 20, 50_000), (300, 20))
    lookups = next(iter(cases.embedding_cases(make, *size, setting.pick(64, 5), single)))
    yield Target("stratified_embedding", "float32", "all", lookups)
    gram, combine = cases.parameter_cases(make, 8, setting.pick(10_000_000, 500))
    yield Target("stratum_gram", "float32", "all", gram)
    yield Target("stratum_combine", "float32", "all", combine)


def _format_name(dtype: torch.dtype, precision: str) -> str:
    return cases.name_of(dtype) + (f":{precision}" if dtype is torch.float32 else "")


def candidates(table: str, present: Config, limit: int | None = None) -> list[Config]:
    """Return the config that holds, then every other of the grid."""
    grid = {key: GRIDS[table][key] for key in present if key in GRIDS[table]}
    values = itertools.product(*grid.values())
    others = [present | dict(zip(grid, chosen, strict=True)) for chosen in values]
    return [present, *(config for config in others if config != present)][:limit]


def best(
    target: Target,
    tried: list[Config],
    measure: Callable[[Target], float],
    is_right: Callable[[Target], bool],
) -> tuple[Config, float, float]:
    """Return the best config, its seconds, and those of the first, which is what holds.

    A config that does not compile, does not fit the GPU, or is wrong, is passed over.
    """
    found: list[tuple[float, int]] = []
    for i, config in enumerate(tried):
        with _configs.trying(target.table, target.bucket, config):
            try:
                if is_right(target):
                    found.append((measure(target), i))
            except Exception as error:
                print(f"  {config}: {type(error).__name__}", file=sys.stderr)
    if not found:
        raise RuntimeError(f"{target.table} {target.dtype} {target.bucket}: no config serves")
    seconds, i = min(found)
    before = next((s for s, k in found if k == 0), float("inf"))
    if seconds > before * (1 - MIN_GAIN):
        seconds, i = before, 0
    return tried[i], seconds, before


def write(folder: Path, table: str, entry: dict[str, Any]) -> None:
    """Put an entry into a table in place of the one with its key, one line each."""
    path = folder / f"{table}.json"
    key = ("arch", "dtype", "bucket")
    entries = json.loads(path.read_text())
    kept = [e for e in entries if any(e[k] != entry[k] for k in key)]
    lines = [" " + json.dumps(e) for e in [entry, *kept]]
    path.write_text("[\n" + ",\n".join(lines) + "\n]\n")


def tune(setting: Setting, only: list[str], folder: Path, source: str, limit: int | None) -> None:
    """Fill the entries of the tables for this device."""
    arch = _configs.arch_of(setting.device)
    for target in targets(setting):
        if only and target.table not in only:
            continue
        present = _configs.lookup(target.table, setting.device, target.dtype, target.bucket)
        inputs = rotated(target.case.make, setting)

        def measure(target: Target, inputs: Any = inputs) -> float:
            run = target.case.run
            return median_seconds(lambda *x: run(x, setting.backend), inputs, setting)["device"]

        def is_right(target: Target) -> bool:
            return ops.check(target.case, setting).get("status", "ok") == "ok"

        tried = candidates(target.table, present, limit)
        with torch.no_grad(), ops.tf32(target.case.uses_tf32):
            config, seconds, before = best(target, tried, measure, is_right)
        print(
            f"{target.table} {target.dtype} {target.bucket}: {before * 1e6:.1f} -> "
            f"{seconds * 1e6:.1f} us {config}"
        )
        key = {"arch": arch, "dtype": target.dtype, "bucket": target.bucket}
        write(folder, target.table, {**key, "config": config, "source": source})


def main(arguments: list[str] | None = None) -> int:
    """Tune, and return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.tune", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("tables", nargs="*", help=f"of {', '.join(sorted(GRIDS))}; default all")
    given = parser.parse_args(arguments)
    if unknown := sorted(set(given.tables) - set(GRIDS)):
        print(f"tune: no table {unknown[0]!r}; there are {', '.join(sorted(GRIDS))}",
              file=sys.stderr)  # fmt: skip
        return 2
    if not torch.cuda.is_available():
        print("tune: no CUDA device", file=sys.stderr)
        return 2
    device = torch.device("cuda", torch.cuda.current_device())
    setting = Setting(device, "triton", False, float("inf"), num_repeats=3)
    today = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d")
    name = torch.cuda.get_device_name(device)
    source = f"timed on {name}, torch {torch.__version__}, {today}"
    tune(setting, given.tables, _configs.FOLDER, source, None)
    return 0


if __name__ == "__main__":
    sys.exit(main())

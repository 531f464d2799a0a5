"""Tables for the README, made from the JSON of a report."""

from __future__ import annotations

from typing import Any

Report = dict[str, Any]


def render(report: Report) -> str:
    """Return the report in Markdown: what ran where, ops, whole steps, and what is amiss."""
    limits = _limits(report)
    parts = [_heading(report, limits), _ops(report, limits), _steps(report), _amiss(report)]
    return "\n\n".join(part for part in parts if part) + "\n"


def floor_seconds(row: dict[str, Any], limits: dict[str, float]) -> float | None:
    """Return the time that arithmetic or traffic takes at the measured limits of the machine."""
    case = row["case"]
    kind = "bfloat16" if "bfloat16" in case else "float32 ieee"
    if "tf32" in case:
        kind = "float32 tf32"
    products = limits.get(f"products in {kind}")
    copy = limits.get("copy")
    if not products or not copy:
        return None
    if "tf32x3" in case:
        products /= 3
    return max(row["flop"] / products, row["bytes"] / copy)


def _limits(report: Report) -> dict[str, float]:
    rows = report["sections"].get("limits", {}).get("rows", [])
    return {r["what"]: r.get("bytes_per_second") or r["flop_per_second"] for r in rows}


def _heading(report: Report, limits: dict[str, float]) -> str:
    device, versions = report["device"], report["versions"]
    lines = [
        f"{device['name']}, torch {versions['torch']}, Triton {versions['triton']}, Python "
        f"{versions['python']}, commit {str(report['commit'])[:12]}, {report['date']}, backend "
        f"{report['backend']}, {report['seconds']:.0f} s."
    ]
    if limits:
        found = [
            f"{what} {value / 1e9:.0f} GB/s" if what == "copy" else f"{what} {value / 1e12:.1f} T/s"
            for what, value in limits.items()
        ]
        lines.append("Measured limits: " + ", ".join(found) + ".")
    if report["is_tiny"]:
        lines.append("**Tiny inputs on a CPU: a test of the report, whose times mean nothing.**")
    return "\n".join(lines)


def _ops(report: Report, limits: dict[str, float]) -> str:
    checks = {
        (r["op"], r["case"]): r
        for r in report["sections"].get("ops correct", {}).get("rows", [])
    }  # fmt: skip
    lines = [
        "| op | case | error | bits equal | us | share of floor | against, its time over ours |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in report["sections"].get("ops timed", {}).get("rows", []):
        if row["status"] != "ok":
            continue
        check = checks.get((row["op"], row["case"]), {})
        floor = floor_seconds(row, limits)
        share = "-" if floor is None else f"{floor / row['seconds']:.2f}"
        against = [
            f"{name} {found['device'] * 1e6:.1f} us ({found['device'] / row['seconds']:.2f}x)"
            for name, found in row.get("baselines", {}).items()
        ]
        lines.append(
            f"| `{row['op']}` | {row['case']} | {_number(check.get('error'))} | "
            f"{check.get('equal', '-')} of {check.get('repeats', '-')} | "
            f"{row['seconds'] * 1e6:.1f} | {share} | {'; '.join(against) or '-'} |"
        )
    return "\n".join(lines) if len(lines) > 2 else ""


def _steps(report: Report) -> str:
    lines = [
        "| model | users x length, d | S | step | over a plain step | ms | plain, ms |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in report["sections"].get("steps timed", {}).get("rows", []):
        if row["status"] != "ok":
            continue
        low, high = row["quartiles"]
        lines.append(
            f"| {row['model']}{', bf16 autocast' if row['autocast'] else ''} | "
            f"{row['users']} x {row['length']}, {row['dim']} | {row['S']} | {row['step']} | "
            f"{row['ratio']:.2f} [{low:.2f}, {high:.2f}] | {row['seconds'] * 1e3:.2f} | "
            f"{row['plain_seconds'] * 1e3:.2f} |"
        )
    return "\n".join(lines) if len(lines) > 2 else ""


def _amiss(report: Report) -> str:
    lines = []
    for name, section in report["sections"].items():
        if section["status"] != "ok":
            lines.append(f"- {name}: {section['status']}")
        for row in section.get("rows", []):
            if row.get("status", "ok") != "ok":
                what = row.get("op") or f"{row.get('model')} {row.get('rule') or row.get('step')}"
                lines.append(f"- {name}: {what} {row.get('case', '')}: {row['status']}")
    return "Not as it should be:\n\n" + "\n".join(lines) if lines else ""


def _number(x: float | None) -> str:
    return "-" if x is None else f"{x:.1e}"

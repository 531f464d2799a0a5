"""Writes a run's report: one HTML file that needs nothing beside it."""

from __future__ import annotations

from importlib.resources import files
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from pinet_fast._atomic import replacing
from pinet_fast.errors import ConfigError
from pinet_fast.report.against import Against
from pinet_fast.report.bootstrap import paired_differences
from pinet_fast.report.schema import METRICS, Interval

if TYPE_CHECKING:
    from pathlib import Path

    from pinet_fast.report.run_files import RunFiles

_MODELS = {
    "sasrec": "SASRec",
    "gru4rec": "GRU4Rec",
    "din": "DIN",
    "din-mean": "DIN without attention",
}
_LOSSES = {
    "ce": "softmax cross-entropy over the catalogue",
    "bce": "binary cross-entropy with sampled negatives",
    "ss": "softmax over sampled negatives, corrected by their probability",
    "bpr": "Bayesian personalised ranking against sampled negatives",
    "gbce": "generalised binary cross-entropy with sampled negatives",
}
_PRIORS = {
    "uniform": "every stratum counts alike",
    "users": "every stratum counts by its users",
    "events": "every stratum counts by its events",
}
_RULES = {
    "joint": "all events make one gradient, as the base model trains by itself, so that active "
    "users weigh by their many events",
    "backdoor": "each stratum has its own gradient, and their weights are a choice about the "
    "population instead of a trace of the log",
    "agreement": "each stratum has its own gradient, and they are combined, parameter by "
    "parameter, by how well they agree",
}


def write_report(run: RunFiles, path: Path, baseline: RunFiles | None = None) -> Path:
    """Write the report of a finished run.

    The same run gives the same bytes. The file is replaced whole or not at all.

    Args:
        run: The run.
        path: The HTML file to write; its folder must exist.
        baseline: A run to set it against, by stratum and by activeness; None = none.

    Returns:
        ``path``.

    Raises:
        ConfigError: The file cannot be written, or the baseline is of another log, other strata or
            another protocol.
    """
    page = render(run, baseline).encode()
    try:
        with replacing(path) as file:
            file.write(page)
    except OSError as error:
        raise ConfigError(
            f"report {path}: cannot write there ({error.strerror}); choose a file in a folder that "
            "exists and may be written"
        ) from None
    return path


def render(run: RunFiles, baseline: RunFiles | None = None) -> str:
    """Return the report's HTML; arguments as of :func:`write_report`."""
    from pinet_fast.report.plots import all_plots  # matplotlib: only who draws waits for it

    package = files("pinet_fast.report")
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(
        score=_score, interval=_interval, delta=_delta, tone=_tone, count=_count, percent=_percent,
        p_value=_p_value,
    )  # fmt: skip
    environment.globals.update(svg=Markup)
    template = environment.from_string(package.joinpath("template.html.j2").read_text("utf-8"))
    style = package.joinpath("style.css").read_text("utf-8")
    against = None if baseline is None else Against.of(run, baseline)
    drawn, groups = all_plots(run, baseline), _groups(run)
    return template.render(
        run=run,
        style=Markup(style),
        by_stratum=drawn.by_stratum,
        stratum_plots=drawn.of_strata,
        plots=drawn.others,
        metrics=METRICS,
        groups=groups,
        cards=_cards(run, groups, against),
        against=against,
        against_plot=drawn.against,
        facts=_facts(run),
        order_note=_order_note(run),
        totals={
            "users": max(sum(s.users for s in run.strata), 1),
            "events": max(sum(s.events for s in run.strata), 1),
        },
    )


def _facts(run: RunFiles) -> dict[str, str]:
    """Return the run's options in words."""
    config = run.config
    rule = str(config["rule"])
    meaning = _RULES.get(rule, "stratum gradients are combined by this rule")
    if rule == "backdoor":
        prior = str(config.get("prior"))
        meaning += f" (here: {_PRIORS.get(prior, prior)})"
    loss = str(config["loss"])
    return {
        "model": _MODELS.get(str(config["model"]), str(config["model"])),
        "loss": f"{loss}: {_LOSSES[loss]}" if loss in _LOSSES else loss,
        "rule_meaning": meaning,
        "ranked": _ranked(config),
        "final": "plugin heads on the backbone" if run.final == "heads" else "backbone",
    }


def _ranked(config: dict[str, Any]) -> str:
    """Say among which items held-out events were ranked; runs of old have no such option."""
    negatives = config.get("eval_negatives", 0)
    if not negatives:
        return "all items that the user has not had"
    how = "evenly" if config.get("eval_dist", "uniform") == "uniform" else "by popularity"
    return (
        f"{negatives} negatives drawn {how}, always the same, that the user has not had; that is "
        "much easier than ranking among all items"
    )


def _groups(run: RunFiles) -> list[dict[str, Any]]:
    """Return, for all users and each stratum, the metrics of each stage and their differences."""
    groups = []
    ranks, has_heads = run.ranks, "heads" in run.test
    for g, mask in enumerate(ranks.masks(run.num_strata)):
        stages = {stage: evaluation.groups[g] for stage, evaluation in run.test.items()}
        deltas = None
        if has_heads:
            deltas = paired_differences(
                ranks.by_stage["backbone"][mask], ranks.by_stage["heads"][mask]
            )
        groups.append(
            {
                "name": run.group_names[g],
                "stratum": run.strata[g - 1] if g else None,
                "users": stages["backbone"].users,
                "stages": {name: group.metrics for name, group in stages.items()},
                "deltas": deltas,
            }
        )
    return groups


def _cards(
    run: RunFiles, groups: list[dict[str, Any]], against: Against | None
) -> list[dict[str, Any]]:
    """Return the summary: all users, the least and the most active stratum."""
    chosen = [(0, "All users")]
    if run.num_strata > 1:
        chosen += [(1, "Tail"), (run.num_strata, "Head")]
    cards = []
    for index, title in chosen:
        group = groups[index]
        stratum = group["stratum"]
        if stratum is not None and stratum.name.lower() != title.lower():
            title = f"{title}: {stratum.name}"
        activeness = "" if stratum is None else _activeness(stratum)
        backbone = group["stages"]["backbone"]["ndcg@10"]
        cards.append(
            {
                "title": title,
                "users": group["users"],
                "activeness": activeness,
                "value": group["stages"][run.final]["ndcg@10"],
                "backbone": backbone,
                "delta": group["deltas"]["ndcg@10"] if run.final == "heads" else None,
                "before": None if against is None else against.before[index].value,
                "after": None if against is None else against.after[index],
            }
        )
    return cards


def _activeness(stratum: Any) -> str:
    low, high = stratum.min_activeness, stratum.max_activeness
    if low is None or high is None:
        return "no users"
    return f"{low:,} training events" if low == high else f"{low:,} to {high:,} training events"


def _order_note(run: RunFiles) -> str:
    """Say how far the order of time decides which event is held out."""
    ties = run.data.time_ties
    if ties is None:
        return "The log is ordered by its rows; no timestamps were used."
    return (
        f"{ties:.1%} of users have a tie in time between their last two events, so the held-out "
        "event depends on how the log breaks ties; here by row order."
    )


def _score(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _interval(value: Interval) -> str:
    if value.low is None or value.high is None:
        return ""
    return f"{value.low:.4f} to {value.high:.4f}"


def _delta(value: Interval, base: Interval) -> str:
    """Return a difference, absolute and relative."""
    if value.mean is None:
        return "-"
    relative = f" ({value.mean / base.mean:+.1%})" if base.mean else ""
    return f"{value.mean:+.4f}{relative}"


def _tone(value: Interval) -> str:
    """Return the CSS class of a difference: coloured only where its interval excludes zero."""
    if not value.excludes_zero or value.low is None:
        return "same"
    return "up" if value.low > 0 else "down"


def _p_value(value: float) -> str:
    return "< 0.0001" if value < 0.0001 else f"{value:.4f}"


def _count(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}"


def _percent(value: float) -> str:
    return f"{value:.1%}"

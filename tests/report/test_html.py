from __future__ import annotations

import json
import re
from html.parser import HTMLParser

import matplotlib as mpl
import numpy as np
import pytest

from pinet_fast.errors import ConfigError
from pinet_fast.report import Comparison, RunFiles, write_report
from pinet_fast.report.html import render

VOID = {"meta", "br", "img", "link", "input", "hr"}


class Page(HTMLParser):
    """A page's ids, text and tags; complains of tags that are not closed in order."""

    def __init__(self, text):
        super().__init__()
        self.ids, self.tags, self.words, self.open = [], [], [], []
        self.references = []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value)
            if name in ("src", "href", "xlink:href"):
                self.references.append(value)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())


@pytest.fixture
def against(make_run):
    """Return a function that makes a joint run and another, and returns the latter's page."""

    def make(joint=lambda folder: None, **fields):
        baseline = make_run(name="joint", rule="joint", heads=False, users=3000)
        joint(baseline)
        folder = make_run(name="own", users=3000, **fields)
        runs = RunFiles.load(folder), RunFiles.load(baseline)
        path = write_report(runs[0], folder / "report.html", runs[1])
        return path.read_text(encoding="utf-8"), Comparison.of(runs[::-1])

    return make


@pytest.fixture
def report(make_run):
    """Return a function that makes a run, writes its report and returns the HTML."""

    def make(change=lambda folder: None, **fields):
        folder = make_run(**fields)
        change(folder)
        path = write_report(RunFiles.load(folder), folder / "report.html")
        return path.read_text(encoding="utf-8")

    return make


def test_page_is_self_contained(report):
    text = report()
    page = Page(text)
    assert "://" not in text
    assert all(reference.startswith("#") for reference in page.references)
    assert not {"script", "link", "iframe", "img", "object"} & set(page.tags)
    assert "@import" not in text
    assert set(re.findall(r"url\((.)", text)) <= {"#"}


def test_ids_are_distinct_and_references_lead_somewhere(report):
    text = report(num_strata=3)
    page = Page(text)
    assert len(page.ids) == len(set(page.ids))
    wanted = {reference[1:] for reference in page.references}
    wanted |= set(re.findall(r"url\(#([^)]+)\)", text))
    assert wanted <= set(page.ids)


@pytest.mark.parametrize("num_strata", [2, 5])
def test_every_stratum_has_its_plot(report, num_strata):
    page = Page(report(num_strata=num_strata, users=3000))
    assert {f"stratum-{s}" for s in range(num_strata)} <= set(page.ids)
    assert {"by-stratum", "by-activeness", "gradients", "weights", "throughput"} <= set(page.ids)
    assert page.tags.count("svg") == page.tags.count("figcaption") == num_strata + 5


def test_title_says_what_ran(report):
    page = Page(report(rule="backdoor", loss="bce", seed=17, data="games.csv"))
    for text in ("SASRec on games.csv", "backdoor (uniform prior)", "bce", "seed 17"):
        assert text in page.text


@pytest.mark.parametrize("simulated", [True, False])
def test_banner_only_on_simulated_data(report, simulated):
    assert ("SIMULATED DATA" in report(simulated=simulated)) is simulated


def test_joint_run_has_no_gradient_plot_and_nothing_to_cover(report):
    page = Page(report(rule="joint", heads=False))
    assert "gradients" not in page.ids
    assert "nothing to cover" in page.text
    assert "plugin heads minus backbone" not in page.text


def test_differences_come_with_their_intervals(report):
    text = report(users=3000)
    assert 'class="up"' in text
    assert "plugin heads minus backbone" in Page(text).text


def test_a_baseline_adds_its_differences(against, report):
    text, comparison = against(quality=0.3)
    page = Page(text)
    assert "Against joint training" in page.text
    assert "this run minus run joint (rule joint, backbone)" in page.text
    assert "://" not in text
    assert len(page.ids) == len(set(page.ids))
    assert "against" in page.ids
    cells = comparison.cells["ndcg@10"]
    for name, users, (_, cell) in zip(comparison.groups, comparison.users, cells, strict=True):
        difference = f"{cell.difference.mean:+.4f} ({cell.relative:+.1%})"
        interval = f"{cell.difference.low:.4f} to {cell.difference.high:.4f}"
        assert f"{name} {users:,} users" in page.text
        assert f"against joint: {difference}" in page.text  # tail and head have a card each
        assert f"{difference} {interval}" in page.text
    assert "own differs from the baseline in: rule agreement (baseline: joint)" in page.text
    alone = Page(report(users=3000, quality=0.3))
    assert "Against" not in alone.text
    assert "against" not in alone.ids


def test_a_baseline_of_another_rule_goes_by_its_name(make_run):
    runs = [RunFiles.load(make_run(name=name, rule="mgda")) for name in ("first", "second")]
    page = Page(render(runs[1], runs[0]))
    assert "Against first" in page.text
    assert "against first: +0.0000" in page.text
    assert "p 1.0000" in page.text


def test_a_baseline_tested_on_other_users_has_no_intervals(against):
    def other_users(folder):
        arrays = dict(np.load(folder / "test_ranks.npz"))
        np.savez(folder / "test_ranks.npz", **{**arrays, "users": arrays["users"] + 1})

    page = Page(against(other_users)[0])
    assert "so its differences have no intervals" in page.text
    assert "against" not in page.ids
    assert "None" not in page.text.split()


def test_a_baseline_of_another_log_is_refused_and_nothing_written(make_run):
    run = RunFiles.load(make_run(name="own"))
    other = RunFiles.load(make_run(name="other", fingerprint="cd" * 32))
    with pytest.raises(ConfigError, match="was trained on another log"):
        write_report(run, run.path / "report.html", other)
    assert not (run.path / "report.html").exists()


@pytest.mark.parametrize(
    ("ties", "sentence"),
    [(0.437, "43.7% of users have a tie in time"), (None, "ordered by its rows")],
)
def test_time_ties_are_said(report, ties, sentence):
    assert sentence in Page(report(time_ties=ties)).text


def test_empty_stratum(report):
    page = Page(report(num_strata=3, empty_strata=(1,)))
    assert "stratum-1" in page.ids
    assert "no validation was logged for this stratum" in page.text
    assert "nan" not in page.text.lower().split()
    assert "None" not in page.text.split()


@pytest.mark.parametrize("lines", [0, 1])
def test_nearly_empty_log(report, lines):
    def shorten(folder):
        log = folder / "log.jsonl"
        log.write_text("".join(log.read_text().splitlines(keepends=True)[:lines]))

    page = Page(report(shorten))
    assert ("throughput" in page.ids) is bool(lines)
    assert "stratum-0" in page.ids


def test_nulls_in_the_log(report):
    def blank(folder):
        log = folder / "log.jsonl"
        records = [json.loads(line) for line in log.read_text().splitlines()]
        for record in records:
            if record["event"] == "step":
                record |= {"loss": None, "stratum_losses": None, "events_per_second": None}
                record["cosines"] = record["cosines"] and [[None, None], [None, None]]
            else:
                record["valid"] = None
        log.write_text("".join(json.dumps(record) + "\n" for record in records))

    page = Page(report(blank))
    assert "no training loss was logged" in page.text
    assert "no cosines were logged" in page.text


def test_names_are_text(report):
    name = '<b>&"$x$</b>'
    text = report(data=name, names=("<i>tail</i>", '--> "q" $y$'), extra_config={"k": "<u>"})
    page = Page(text)
    assert not {"i", "u"} & set(page.tags)
    assert "<b>&" not in text
    assert name in page.text
    assert "<i>tail</i>" in page.text
    assert '--> "q" $y$' in page.text


def test_same_run_gives_the_same_bytes(make_run):
    folder = make_run()
    run = RunFiles.load(folder)
    first = write_report(run, folder / "a.html").read_bytes()
    assert write_report(RunFiles.load(folder), folder / "b.html").read_bytes() == first


def test_users_matplotlib_settings_are_neither_taken_nor_changed(make_run):
    folder = make_run()
    run = RunFiles.load(folder)
    expected = write_report(run, folder / "a.html").read_bytes()
    with mpl.rc_context({"font.size": 31, "axes.facecolor": "red", "svg.fonttype": "path"}):
        got = write_report(run, folder / "b.html").read_bytes()
        assert mpl.rcParams["font.size"] == 31
    assert got == expected


def test_report_is_replaced_whole(make_run):
    folder = make_run()
    path = folder / "report.html"
    path.write_text("old")
    write_report(RunFiles.load(folder), path)
    assert path.read_text().startswith("<!DOCTYPE html>")
    assert not list(folder.glob(".*"))


def test_place_that_cannot_be_written(make_run):
    folder = make_run()
    with pytest.raises(ConfigError, match="cannot write there"):
        write_report(RunFiles.load(folder), folder / "absent" / "report.html")


def test_the_page_says_among_what_targets_were_ranked(make_run):
    full = render(RunFiles.load(make_run(name="full")))
    assert "ranked among all items that the user has not had" in full
    options = {"eval_negatives": 100, "eval_dist": "popularity"}
    sampled = render(RunFiles.load(make_run(name="sampled", extra_config=options)))
    assert "ranked among 100 negatives drawn by popularity" in sampled
    assert "much easier" in sampled

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from pinet_fast.data import Split, Strata
from pinet_fast.errors import StrataError

SPLIT = Split.leave_one_out()


@pytest.fixture(scope="session")
def strata_of(store_with_lengths):
    def build(activeness, edges):
        store = store_with_lengths([n + 2 for n in activeness])
        return Strata.by_activeness(store, split=SPLIT, edges=edges)

    return build


def test_explicit_edges_count_the_edges_below(strata_of):
    activeness = [1, 4, 5, 19, 20, 99, 100, 300]
    for edges in ([5, 20, 100], "5,20,100", " 5, 20,100", np.array([5, 20, 100])):
        strata = strata_of(activeness, edges)
        assert strata.edges == (5, 20, 100)
        assert strata.ids.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
        assert strata.names == ("1-4 events", "5-19 events", "20-99 events", "100+ events")
        assert strata.user_counts.tolist() == [2, 2, 2, 2]
        assert strata.event_counts.tolist() == [5, 24, 119, 400]
        assert strata.activeness.tolist() == activeness
        assert strata.num_strata == 4


def test_single_lengths_have_plain_names(strata_of):
    assert strata_of([1, 2, 3], [2, 3]).names == ("1 event", "2 events", "3+ events")


def test_describe_gives_shares(strata_of):
    rows = strata_of([2, 2, 2, 6], "head:0.25").describe()
    assert [row["name"] for row in rows] == ["tail", "head"]
    assert [row["user_share"] for row in rows] == [0.75, 0.25]
    assert [row["event_share"] for row in rows] == [0.5, 0.5]
    assert [row["border_ties"] for row in rows] == [3, None]


@settings(deadline=None, max_examples=60)
@given(
    activeness=st.lists(st.integers(1, 12), min_size=2, max_size=40),
    share=st.sampled_from([0.1, 0.2, 0.25, 0.3, 0.5]),
)
def test_head_is_above_the_quantile_and_ties_stay_whole(strata_of, activeness, share):
    border = np.quantile(activeness, 1 - share)
    assume(max(activeness) > border + 1e-6)
    assume(max(activeness) >= 2)
    strata = strata_of(activeness, f"head:{share}")
    assert strata.names == ("tail", "head")
    assert strata.ids.tolist() == [int(n > border + 1e-6) for n in activeness]
    by_length = {}
    for n, s in zip(activeness, strata.ids.tolist(), strict=True):
        assert by_length.setdefault(n, s) == s


@settings(deadline=None, max_examples=60)
@given(
    activeness=st.lists(st.integers(1, 40), min_size=2, max_size=60), num_strata=st.integers(2, 6)
)
def test_quantiles_keep_ties_whole_or_say_what_fits(strata_of, activeness, num_strata):
    assume(max(activeness) >= 2)
    try:
        strata = strata_of(activeness, f"quantile:{num_strata}")
    except StrataError as error:
        message = str(error)
        assert "has no user" in message
        if "use at most" in message:
            strata = strata_of(activeness, message.rsplit(" ", 1)[1])
        else:
            return
    assert (strata.user_counts > 0).all()
    pairs = sorted(set(zip(activeness, strata.ids.tolist(), strict=True)))
    assert len(pairs) == len(set(activeness))
    assert all(a[1] <= b[1] for a, b in itertools.pairwise(pairs))
    assert strata.route(activeness).tolist() == strata.ids.tolist()
    assert strata.user_counts.sum() == len(activeness)
    assert strata.event_counts.sum() == sum(activeness)


def test_strata_balance_when_lengths_are_distinct(strata_of):
    strata = strata_of(range(1, 101), "quantile:5")
    assert strata.user_counts.tolist() == [20] * 5


def test_held_out_events_do_not_change_strata(store_of):
    """Plant a leak: more held-out events must not make a user more active."""
    lengths = [3, 5, 6, 12]
    users = np.repeat(np.arange(4), lengths)
    items = np.arange(len(users))

    class LeaveFourOut(Split):
        def train_ends(self, store):
            return store.offsets[1:] - 4

    plain = store_of(users, items)
    longer = store_of(np.append(users, [0, 0, 1, 1, 2, 2, 3, 3]), np.arange(len(users) + 8))
    strata = Strata.by_activeness(plain, split=SPLIT, edges=[4])
    same = Strata.by_activeness(longer, split=LeaveFourOut("four"), edges=[4])
    assert strata.ids.tolist() == same.ids.tolist() == [0, 0, 1, 1]
    assert strata.activeness.tolist() == same.activeness.tolist()


def test_fingerprint_depends_on_data_and_edges(strata_of):
    one = strata_of([2, 3, 4], [3])
    assert one.fingerprint == strata_of([2, 3, 4], "3").fingerprint
    assert one.fingerprint != strata_of([2, 3, 4], [4]).fingerprint
    assert one.fingerprint != strata_of([2, 3, 5], [3]).fingerprint


@pytest.mark.parametrize(
    ("edges", "match"),
    [
        ("top:3", r'expected edges such as "head:0.2", "quantile:5" or "5,20,100"'),
        ("head", "expected edges such as"),
        ("head:", "expected edges such as"),
        ("head:x", "expected edges such as"),
        ("quantile:2.5", "expected edges such as"),
        ("", "expected edges such as"),
        ([], "expected edges such as"),
        ([2.5], "expected edges such as"),
        ([None], "expected edges such as"),
        ("head:0", "between 0 and 1, got 0"),
        ("head:1", "between 0 and 1, got 1"),
        ("head:-0.2", "between 0 and 1"),
        ("head:nan", "between 0 and 1"),
        ("quantile:1", "at least 2 strata"),
        ([5, 5], "expected ascending edges"),
        ("9,3", "expected ascending edges"),
        ([2], r"stratum 0 of 2 has no user .*users have 2-9 training events.* from 3 to 9"),
        ([3, 4, 30], r"stratum 3 of 4 has no user"),
        ([6, 7, 8], r"stratum 1 of 4 has no user"),
        ("quantile:5", r"stratum . of 5 has no user .*use at most quantile:"),
        ("head:0.001", r"choose ascending edges|stratum 1"),
    ],
)
def test_bad_edges_are_refused_in_one_line(strata_of, edges, match):
    activeness = [2, 2, 3, 3, 3, 4, 5, 9, 9, 9, 9]
    with pytest.raises(StrataError, match=match) as caught:
        strata_of(activeness, edges)
    assert "\n" not in str(caught.value)


def test_equally_active_users_have_no_strata(strata_of):
    with pytest.raises(StrataError, match="equally active, so this log has no strata"):
        strata_of([4, 4, 4], "head:0.2")


def test_log_without_a_trainable_user_is_refused(store_of):
    for users in ([1, 2, 3], [1, 1, 1, 2]):
        store = store_of(users, range(len(users)))
        with pytest.raises(StrataError, match=r"no user has two training events .*--user-col"):
            Strata.by_activeness(store, split=SPLIT, edges="head:0.2")


@settings(deadline=None, max_examples=40)
@given(activeness=st.lists(st.integers(1, 12), min_size=3, max_size=60), data=st.data())
def test_border_ties_are_the_users_that_a_cut_would_part(strata_of, activeness, data):
    assume(max(activeness) >= 2)
    share = data.draw(st.sampled_from([0.1, 0.2, 0.3, 0.5]))
    quantile = np.quantile(activeness, 1 - share) + 1e-6
    assume(max(activeness) > quantile)
    strata = strata_of(activeness, f"head:{share}")
    border = max(n for n in activeness if n <= quantile)
    assert strata.border_ties == (activeness.count(border),)
    # The head is smaller than asked for by no more than the tied users.
    missing = share * len(activeness) - strata.user_counts[1]
    assert missing <= strata.border_ties[0] + 1


def test_labels_make_strata(store_with_lengths):
    store = store_with_lengths([4, 5, 6, 7])
    for labels, names, ids in (
        (["nl", "de", "nl", "fr"], ("de", "fr", "nl"), [2, 0, 2, 1]),
        (np.array([7, -1, 7, 7]), ("-1", "7"), [1, 0, 1, 1]),
        (np.array(["b", "a", "a", "b"], object), ("a", "b"), [1, 0, 0, 1]),
        ([True, False, False, True], ("False", "True"), [1, 0, 0, 1]),
    ):
        strata = Strata.from_labels(store, labels, split=SPLIT)
        assert strata.names == names
        assert strata.ids.tolist() == ids
        assert strata.ids.dtype == np.int64
        assert strata.num_strata == len(names)
        assert strata.activeness.tolist() == [2, 3, 4, 5]
        assert strata.user_counts.sum() == 4
        assert strata.event_counts.sum() == 14
        assert strata.spec == "labels"
        assert strata.edges == strata.border_ties == ()
        assert [row["border_ties"] for row in strata.describe()] == [None] * len(names)
        with pytest.raises(StrataError, match="activeness does not tell the stratum"):
            strata.route([3])


def test_fingerprint_of_labels_depends_on_who_has_which(store_with_lengths):
    store = store_with_lengths([4, 5, 6])
    prints = {
        Strata.from_labels(store, labels, split=SPLIT).fingerprint
        for labels in ([0, 0, 1], [0, 1, 0], [0, 0, 2], ["0", "0", "3"])
    }
    assert len(prints) == 4


@pytest.mark.parametrize(
    ("labels", "match"),
    [
        ([1, 2], r"one for each of 3 users .*got shape \(2,\); order them like store.user_ids"),
        ([[1], [2], [3]], r"got shape \(3, 1\)"),
        ([1.0, 2.0, float("nan")], "expected integers or strings, got float64"),
        (["a", None, "b"], "expected integers or strings, got object"),
        ([3, 3, 3], "expected two or more, got only 3"),
    ],
)
def test_bad_labels_are_refused_in_one_line(store_with_lengths, labels, match):
    with pytest.raises(StrataError, match=match) as caught:
        Strata.from_labels(store_with_lengths([4, 5, 6]), labels, split=SPLIT)
    assert "\n" not in str(caught.value)

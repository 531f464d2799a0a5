from __future__ import annotations

import json

import numpy as np
import pytest

from pinet_fast.errors import ConfigError
from pinet_fast.report import RunFiles


def edit(folder, change):
    path = folder / "metrics.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def refusal(folder):
    with pytest.raises(ConfigError) as caught:
        RunFiles.load(folder)
    message = str(caught.value)
    assert "\n" not in message
    assert str(folder) in message
    return message


def test_finished_run_is_read(make_run):
    run = RunFiles.load(make_run(users=300, num_strata=3, heads=True))
    assert run.group_names[0] == "overall"
    assert run.num_strata == 3
    assert sum(group.users for group in run.test["heads"].strata) == 300
    assert run.final == "heads"
    assert run.stages["heads"].best_epochs == (2, 2, 2)
    assert run.ranks.by_stage.keys() == {"backbone", "heads"}
    assert run.steps[0].cosines[0][0] == 1


def test_run_without_heads_has_one_stage(make_run):
    run = RunFiles.load(make_run(rule="joint", heads=False))
    assert list(run.stages) == list(run.test) == list(run.ranks.by_stage) == ["backbone"]
    assert run.steps[0].norms is None


def test_steps_of_the_heads_count_on(make_run):
    run = RunFiles.load(make_run(log_steps=10))
    steps = [step.step for step in run.steps]
    assert steps == sorted(steps)
    assert len(set(steps)) == 20


def test_steps_that_already_count_on_are_kept(make_run):
    folder = make_run(log_steps=10)
    log = folder / "log.jsonl"
    records = [json.loads(line) for line in log.read_text().splitlines()]
    for record in records:
        record["step"] += 1000 * (record["stage"] == "heads")
    log.write_text("".join(json.dumps(record) + "\n" for record in records))
    steps = RunFiles.load(folder).steps
    assert next(step.step for step in steps if step.stage == "heads") == 1001


def test_missing_folder(tmp_path):
    message = refusal(tmp_path / "absent")
    assert "not found" in message
    assert "--out" in message


def test_file_in_place_of_a_folder(tmp_path):
    (tmp_path / "file").touch()
    assert "is a file" in refusal(tmp_path / "file")


def test_folder_of_something_else(tmp_path):
    assert "metrics.json, found neither" in refusal(tmp_path)


def test_unfinished_run_can_be_resumed(make_run):
    folder = make_run()
    (folder / "metrics.json").unlink()
    assert "--resume" in refusal(folder)


def test_unknown_schema(make_run):
    folder = make_run()
    edit(folder, lambda content: content.update(schema=7))
    assert "expected schema 1, got 7" in refusal(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", '"run"', '{"schema": 1, "x": NaN}', "\xff\x00"])
def test_damaged_metrics(make_run, text):
    folder = make_run()
    (folder / "metrics.json").write_bytes(text.encode("latin-1"))
    assert "metrics.json" in refusal(folder)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda m: m["data"].pop("users"), "the key 'data.users' is missing"),
        (lambda m: m["data"].update(users="many"), "data.users: expected a whole number"),
        (lambda m: m["data"].update(users=True), "data.users: expected a whole number"),
        (lambda m: m["data"].update(simulated=0), "data.simulated: expected true or false"),
        (lambda m: m["config"].pop("seed"), "the key 'config.seed' is missing"),
        (lambda m: m.update(strata=[]), "strata: expected one stratum or more"),
        (lambda m: m.update(final="third"), "final: expected one of backbone, heads"),
        (lambda m: m["test"].update(heads=None), "test.heads: expected an object"),
        (lambda m: m["test"]["heads"]["strata"].pop(), "expected 2 strata"),
        (lambda m: m["stages"]["heads"].update(best_epochs=[1]), "expected 2 epochs"),
        (lambda m: m["test"]["heads"]["overall"].pop("mrr@20"), "overall.mrr@20' is missing"),
    ],
)
def test_wrong_value_is_named(make_run, change, expected):
    folder = make_run()
    edit(folder, change)
    assert expected in refusal(folder)


def test_last_log_line_may_be_cut(make_run):
    folder = make_run()
    whole = RunFiles.load(folder)
    log = folder / "log.jsonl"
    log.write_text(log.read_text()[:-20])
    cut = RunFiles.load(folder)
    assert cut.steps == whole.steps
    assert cut.epochs == whole.epochs[:-1]


def test_other_log_lines_may_not(make_run):
    folder = make_run()
    log = folder / "log.jsonl"
    lines = log.read_text().splitlines()
    lines[3] = lines[3][:25]
    log.write_text("\n".join(lines))
    assert "log.jsonl line 4" in refusal(folder)


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("event", "stop", "expected step or epoch"),
        ("stage", "warm-up", "expected one of backbone, heads"),
        ("weights", [1.0], "weights: expected 2 numbers"),
        ("cosines", [[1.0, 0.0]], "cosines: expected 2 rows"),
        ("step", None, "step: expected a whole number"),
    ],
)
def test_wrong_log_value_is_named(make_run, key, value, expected):
    folder = make_run()
    log = folder / "log.jsonl"
    first, *rest = log.read_text().splitlines()
    log.write_text("\n".join([json.dumps({**json.loads(first), key: value}), *rest]))
    message = refusal(folder)
    assert "line 1" in message
    assert expected in message


@pytest.mark.parametrize("name", ["log.jsonl", "test_ranks.npz"])
def test_missing_part(make_run, name):
    folder = make_run()
    (folder / name).unlink()
    assert f"{name}: not found" in refusal(folder)


@pytest.mark.parametrize("damage", ["cut", "flipped", "plain array"])
def test_damaged_ranks(make_run, damage):
    folder = make_run()
    path = folder / "test_ranks.npz"
    content = bytearray(path.read_bytes())
    if damage == "cut":
        path.write_bytes(content[:200])
    elif damage == "flipped":
        content[100:400] = bytes(b ^ 255 for b in content[100:400])
        path.write_bytes(content)
    else:
        with path.open("wb") as file:
            np.save(file, np.arange(3))
    assert "cannot be read as arrays" in refusal(folder)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("heads", np.ones(3, dtype=np.int64)),
        ("backbone", np.zeros(400, dtype=np.int64)),
        ("backbone", np.ones(400)),
        ("strata", np.full(400, 2)),
        ("users", np.int64(3)),
    ],
)
def test_wrong_ranks(make_run, name, value):
    folder = make_run()
    path = folder / "test_ranks.npz"
    with np.load(path) as file:
        arrays = dict(file)
    np.savez(path, **{**arrays, name: value})
    assert "test_ranks.npz" in refusal(folder)


def test_ranks_are_never_unpickled(make_run):
    folder = make_run()
    np.savez(folder / "test_ranks.npz", users=np.array([{}], dtype=object))
    assert "cannot be read as arrays" in refusal(folder)

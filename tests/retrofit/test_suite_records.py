"""Records of the long suite: saved = loaded, joined only with their like, and refused where they are something else."""

import json
import math
from dataclasses import replace

import pytest

from octavo.cli.long_suite import read_record
from octavo.errors import ConfigError, TextFileError
from octavo.retrofit.suite import LongEvaluation, LongSettings, PolicyResult, SetResult
from octavo.retrofit.suite.results import cells, markdown, merged

NLL = SetResult("books", 2048, "nll", 3, 3, 2.0, 0.0, 0.5, None, [1.0, 2.0, 3.0], [0, 0, 0])
EXACT = SetResult("facts", 2048, "exact", 2, 4, 1.0, 0.75, 0.8, None, [1.0, 1.0], [2, 1])
DENSE = PolicyResult("dense", None, 8000.0, 800, 800, None, 1.0, [NLL, EXACT])


def gates(name="gates|8x", shift=0.5):
    nll = replace(NLL, nll=2.0 + shift, nlls=[1.0 + shift, 2.0 + shift, 3.0 + shift], kept=256.0)
    exact = replace(EXACT, exact=0.5, hits=[1, 1], kept=256.0)
    return PolicyResult(name, None, 1000.0, 100, 800, None, 2.0, [nll, exact])


def record(*policies, **settings):
    return LongEvaluation("tiny", LongSettings(**settings), ["a note"], [DENSE, *policies])


def test_saved_is_loaded(tmp_path):
    path = tmp_path / "long.json"
    path.write_text(json.dumps(record(gates()).to_json()))
    assert read_record(path) == record(gates())


def test_differences_to_dense_and_their_standard_errors():
    assert gates().sets[0].to_dense(NLL) == (0.5, 0.0)
    difference, error = gates().sets[1].to_dense(EXACT)
    assert difference == -0.25
    assert error == pytest.approx(0.25)  # per case -0.5 and 0, in shares of its two answers
    assert math.isnan(replace(NLL, nlls=[2.0]).to_dense(replace(NLL, nlls=[2.0]))[1])


def test_table_names_bytes_and_differences():
    header, *lines = cells(record(gates()))
    assert header == ["", "dense", "gates|8x"]
    assert lines == [
        ["bytes at 8,000", "1", "1/8.00"],
        ["books 2,048, NLL", "2.0000 ±0.5774", "+0.5000 ±0.0000"],
        ["facts 2,048", "75.0% ±25.0", "50.0% ±0.0"],
    ]
    text = markdown(record(gates()))
    assert "gates\\|8x" in text.splitlines()[0]
    assert text.endswith("\n- a note\n")


def test_joining_keeps_the_first_of_a_policy_measured_twice():
    both = merged([record(gates("a", 0.5)), record(gates("a", 0.7), gates("b", 0.1), baselines=False)])
    assert [row.policy for row in both.policies] == ["dense", "a", "b"]
    assert both.policies[1] == gates("a", 0.5)
    assert both.notes == ["a note"]


@pytest.mark.parametrize(
    "other",
    [
        record(seed=1),
        replace(record(), model="another"),
        replace(record(), policies=[replace(DENSE, sets=[NLL])]),
        replace(record(), policies=[replace(DENSE, sets=[replace(NLL, nll=2.1), EXACT])]),
    ],
    ids=["settings", "model", "sets", "other text"],
)
def test_joining_refuses_other_cases(other):
    with pytest.raises(ConfigError, match="cannot stand in one table"):
        merged([record(), other])


def test_joining_what_is_common_leaves_the_other_sets_out():
    press = record(gates("press"))
    theirs = replace(press, policies=[replace(row, sets=row.sets[1:]) for row in press.policies])
    both = merged([record(gates("a")), theirs], common=True)
    assert [row.policy for row in both.policies] == ["dense", "a", "press"]
    assert all([each.name for each in row.sets] == ["facts"] for row in both.policies)
    other = replace(record(), policies=[replace(DENSE, sets=[replace(EXACT, length=4096)])])
    with pytest.raises(ConfigError, match="no set of cases in common"):
        merged([record(), other], common=True)


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{}", "null", json.dumps({**record().to_json(), "policies": [1]}),
     json.dumps({**record().to_json(), "policies": []}),
     json.dumps(LongEvaluation("tiny", LongSettings(), [], [DENSE, replace(DENSE, sets=[NLL])]).to_json())],
    ids=["empty", "list", "object", "null", "no policy", "no policies", "policies of other sets"],
)  # fmt: skip
def test_other_files_are_refused(tmp_path, content):
    path = tmp_path / "long.json"
    path.write_text(content)
    with pytest.raises(TextFileError, match=r"long\.json"):
        read_record(path)


def test_impossible_settings_are_refused():
    for wrong in ({"lengths": (1000,)}, {"nll_from": 9000}, {"cases": 0}, {"seed": -1}):
        with pytest.raises(ConfigError):
            LongSettings(**wrong)

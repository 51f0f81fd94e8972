"""bench/kvpress reads a case over what a press has left. Stand-ins for presses: kvpress needs another environment."""

import importlib.util
import json
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import DynamicCache

from octavo.retrofit.suite import LongEvaluation
from tiny import tiny_model, tokens

SCRIPT = Path(__file__).parents[2] / "bench" / "kvpress" / "measure.py"
RECORD = SCRIPT.parents[1] / "results" / "adapters-h200.json"
FIRST, LENGTH = 60, 90  # of the answers, and of all


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("kvpress_measure", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def press(cut):
    """A context manager that does `cut(layer's cache, attention module)` after every layer of a prefill."""

    @contextmanager
    def pressed(model):
        def after(module, args, kwargs, out):
            cut(kwargs["past_key_values"].layers[module.layer_idx], module)

        hooks = [x.self_attn.register_forward_hook(after, with_kwargs=True) for x in model.base_model.layers]
        yield
        for hook in hooks:
            hook.remove()

    return pressed


def drop_first_ten(layer, module):
    layer.keys, layer.values = layer.keys[:, :, 10:], layer.values[:, :, 10:]


def name_ten_of_head_one(layer, module):
    module.masked_key_indices = torch.zeros(10, dtype=int), torch.ones(10, dtype=int), torch.arange(10)


@pytest.mark.parametrize(
    ("cut", "heads", "slots"), [(drop_first_ten, range(6), 80), (name_ten_of_head_one, range(3, 6), 85)]
)
def test_what_is_gone_is_not_seen_by_what_follows(script, cut, heads, slots):
    """Against a forward over all tokens with a mask that hides the same slots from the same query heads."""
    model, ids = tiny_model(), tokens(1, LENGTH)[0]
    states, held = script.read(model, press(cut), ids, FIRST)
    mask = torch.ones(1, 6, LENGTH, LENGTH, dtype=torch.bool).tril()
    mask[:, list(heads), FIRST:, :10] = False  # the prompt's last token has seen all
    with torch.no_grad():
        expected = model.base_model(ids[None], attention_mask=mask, past_key_values=DynamicCache()).last_hidden_state[0]
        plain = model.base_model(ids[None]).last_hidden_state[0]
    torch.testing.assert_close(states[FIRST - 1 :], expected[FIRST - 1 :])
    assert (plain - expected)[FIRST:].abs().max() > 0.1
    torch.testing.assert_close(states[FIRST - 1], plain[FIRST - 1])
    assert held == slots
    assert not hasattr(model.base_model.layers[0].self_attn, "masked_key_indices") or (
        model.base_model.layers[0].self_attn.masked_key_indices is None
    ), "the next case starts anew"


def test_without_a_press_a_case_is_read_as_ever(script):
    model, ids = tiny_model(), tokens(1, LENGTH)[0]
    states, held = script.read(model, None, ids, FIRST)
    with torch.no_grad():
        expected = model.base_model(ids[None]).last_hidden_state[0]
    torch.testing.assert_close(states[FIRST - 1 :], expected[FIRST - 1 :])
    assert held == LENGTH


def test_a_record_goes_on_where_it_stopped(script, tmp_path):
    """Rows of the same cases are taken over; a record of other lengths, gates or another model is no beginning."""
    ours = LongEvaluation.from_json(json.loads(RECORD.read_text()), "ours")
    sets, dense = [(each.name, each.length) for each in ours.policies[0].sets], ours.policies[0]
    assert script.begun(tmp_path / "new.json", ours, "dms-8x", sets) == []
    out = tmp_path / "theirs.json"
    press = replace(dense, policy="SnapKV", budget_of="dms-8x")
    out.write_text(json.dumps(replace(ours, policies=[dense, press]).to_json()))
    assert [row.policy for row in script.begun(out, ours, "dms-8x", sets)] == ["dense", "SnapKV"]
    for other, gates, cases in (
        (ours, "dms-8x", sets[:-1]), (replace(ours, model="another"), "dms-8x", sets), (ours, "dms-16x", sets),
    ):  # fmt: skip
        with pytest.raises(SystemExit, match="is of another run"):
            script.begun(out, other, gates, cases)


def test_other_texts_or_another_model_are_noticed(script):
    ours = LongEvaluation.from_json(json.loads(RECORD.read_text()), "ours").policies[0].sets
    script.check_same(ours[:3], ours)
    with pytest.raises(SystemExit, match="same texts"):
        script.check_same([replace(ours[3], nll=ours[3].nll + 0.02)], ours)

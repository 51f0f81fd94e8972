"""A `PeftModel` is attached at the model that its adapters are in."""

import pytest
import torch

from octavo import KVCache, attach, detach
from octavo.attachment import attachment_of
from octavo.errors import UnsupportedModelError
from tiny import tiny_model, tokens

peft = pytest.importorskip("peft")
OPTIONS = {"do_sample": False, "max_new_tokens": 8}


def test_low_rank_adapters_apply_and_can_be_switched_off():
    model, ids = tiny_model(), tokens(1, 30)
    plain = model.generate(ids, **OPTIONS)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"])).eval()
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.3)
    expected = wrapped.generate(input_ids=ids, **OPTIONS)
    assert not torch.equal(expected, plain)
    assert attach(wrapped, chunk=16) is wrapped
    cache = KVCache(wrapped)
    assert torch.equal(wrapped.generate(input_ids=ids, past_key_values=cache, **OPTIONS), expected)
    with wrapped.disable_adapter():
        assert torch.equal(wrapped.generate(input_ids=ids, **OPTIONS), plain)
    assert attachment_of(detach(wrapped)) is None


def test_learned_prefixes_are_refused_by_name():
    settings = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    wrapped = peft.get_peft_model(tiny_model(), settings)
    with pytest.raises(UnsupportedModelError, match="PREFIX_TUNING"):
        attach(wrapped)

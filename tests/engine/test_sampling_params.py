"""What a request may ask of sampling."""

import math
import pickle
from dataclasses import replace

import pytest

from octavo.engine.sampling import SamplingParams
from octavo.errors import ConfigError


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ({"temperature": -0.1}, "temperature must be a number from 0 to 1e"),
        ({"temperature": math.nan}, "temperature"),
        ({"temperature": math.inf}, "temperature"),
        ({"temperature": "hot"}, "not 'hot'"),
        ({"top_k": -1}, "top_k must be a whole number of at least 0, not -1"),
        ({"top_k": 1.5}, "top_k"),
        ({"top_p": 0}, "top_p must be a number above 0 and at most 1, not 0"),
        ({"top_p": 1.01}, "top_p"),
        ({"min_p": 1.5}, "min_p must be a number from 0 to 1"),
        ({"repetition_penalty": 0}, "repetition_penalty must be a number above 0"),
        ({"presence_penalty": 2.5}, "presence_penalty must be a number from -2 to 2"),
        ({"frequency_penalty": -2.5}, "frequency_penalty"),
        ({"seed": 2**63}, "seed must be a whole number from"),
        ({"seed": True}, "seed"),
        ({"max_tokens": 0}, "max_tokens must be a whole number of at least 1"),
        ({"max_tokens": None}, "max_tokens"),
        ({"min_tokens": -1}, "min_tokens"),
        ({"min_tokens": 5, "max_tokens": 4}, "min_tokens is 5 and max_tokens 4"),
        ({"stop": ""}, "stop must be"),
        ({"stop": ["a", 3]}, "stop must be"),
        ({"stop": 3}, "stop must be"),
        ({"stop_token_ids": 3}, "stop_token_ids must be a sequence"),
        ({"stop_token_ids": [-3]}, "stop_token_ids must be a whole number"),
        ({"ignore_eos": "no"}, "ignore_eos must be True or False"),
        ({"logprobs": -1}, "logprobs"),
        ({"logit_bias": [1]}, "logit_bias must be a mapping"),
        ({"logit_bias": {"a": 1}}, "token of logit_bias"),
        ({"logit_bias": {1: 101}}, "logit_bias of token 1 must be a number from -100 to 100"),
        ({"n": 0}, "n must be"),
    ],
    ids=str,
)
def test_impossible_settings(bad, said):
    with pytest.raises(ConfigError, match=said):
        SamplingParams(**bad)


def test_settings_are_plain_values():
    params = SamplingParams(stop="END", stop_token_ids=[3, 4], logit_bias={5: 1}, temperature=1e-6)
    assert params.stops == params.stop == ("END",)
    assert params.stop_token_ids == (3, 4)
    assert params.greedy
    assert pickle.loads(pickle.dumps(params)) == params
    assert hash(params) == hash(replace(params))
    assert SamplingParams().stops == ()
    assert not SamplingParams().penalised

"""Sampling as an obvious reference: one row, one token after another, in plain Python; and what tests of it share."""

import math

import torch
from hypothesis import settings
from hypothesis import strategies as st

from octavo.engine.sampling import GOLDEN, Sampler, SamplingParams, thresholds

quick = settings(deadline=None, max_examples=150)


def mix(x: int) -> int:
    """SplitMix64's finaliser, as published."""
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
    return x ^ x >> 31


def number(seed: int, position: int, token: int) -> int:
    golden = GOLDEN % 2**64
    start = mix((mix(seed % 2**64) + (position + 1) * golden) % 2**64)
    return mix((start + (token + 1) * golden) % 2**64)


def noise(seed: int, position: int, token: int) -> float:
    return -math.log(-math.log1p(-min(max((number(seed, position, token) >> 11) / 2**53, 2**-54), 1 - 2**-24)))


def changed(logits, params, prompt, output, eos=()):
    """Logits after bias, min_tokens and penalties."""
    scores = dict(enumerate(logits))
    for token, bias in params.logit_bias.items():
        scores[token] += bias
    if len(output) < params.min_tokens:
        for token in (*params.stop_token_ids, *(() if params.ignore_eos else eos)):
            scores[token] = -math.inf
    for token in scores:
        times = output.count(token)
        if token in prompt or times:
            positive = scores[token] > 0
            scores[token] *= 1 / params.repetition_penalty if positive else params.repetition_penalty
        scores[token] -= params.frequency_penalty * times + params.presence_penalty * (times > 0)
    return [scores[token] for token in range(len(logits))]


def kept(scores, params):
    """Tokens that min_p, top_k and top_p leave, one after the other, and those so near an edge that either will do."""
    largest, T = max(scores), params.temperature
    weights = [math.exp((s - largest) / T) for s in scores]
    stay = [t for t, w in enumerate(weights) if w >= params.min_p]
    near = {t for t, w in enumerate(weights) if abs(w - params.min_p) < 1e-5 * params.min_p}
    if 0 < params.top_k < len(scores):
        edge = sorted(scores, reverse=True)[params.top_k - 1]
        stay = [t for t in stay if scores[t] >= edge]
    total = sum(weights[t] for t in stay)
    likelier = {t: sum(weights[u] for u in stay if scores[u] > scores[t]) / total for t in stay}
    if params.top_p < 1:
        near |= {t for t in stay if likelier[t] > 0 and abs(likelier[t] - params.top_p) < 1e-5}
        stay = [t for t in stay if likelier[t] < params.top_p]
    return set(stay), near


def one(logits, params, *, seed=0, prompt=(0,), output=(), eos=(), position=None):
    """What a sampler with this request alone says: (Sampled, the sampler)."""
    sampler = Sampler(1, len(logits), "cpu", eos=eos)
    sampler.add(0, params, prompt, seed, output)
    at = len(prompt) + len(output) if position is None else position
    return sampler.sample(torch.tensor([logits]), torch.tensor([0]), torch.tensor([at])), sampler


levels = st.sampled_from([-math.inf, -3.0, -1.0, 0.0, 0.5, 0.5000001, 1.0, 2.0, 9.0])  # ties are common in bfloat16
logit_rows = st.lists(st.floats(-12, 12, width=32) | levels, min_size=1, max_size=40).filter(
    lambda row: max(row) > -math.inf
)
filters = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.01, 0.3, 1.0, 1.7, 50.0]),
    top_k=st.sampled_from([0, 1, 2, 5, 30, 100]),
    top_p=st.sampled_from([1e-9, 0.1, 0.5, 0.9, 0.999, 1.0]),
    min_p=st.sampled_from([0.0, 1e-6, 0.1, 0.7, 1.0]),
)
requests = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.5, 1.0, 3.0]),
    top_k=st.sampled_from([0, 0, 3, 100]),
    top_p=st.sampled_from([0.3, 0.9, 1.0]),
    min_p=st.sampled_from([0.0, 0.2]),
    repetition_penalty=st.sampled_from([1.0, 1.2]),
    presence_penalty=st.sampled_from([0.0, 0.4]),
    frequency_penalty=st.sampled_from([0.0, 0.3]),
    logit_bias=st.sampled_from([{}, {1: 2.0, 4: -3.0, 6: 100.0}]),
    min_tokens=st.sampled_from([0, 2]),
    logprobs=st.sampled_from([None, 0, 2]),
)


def stays(logits, params, companion=None):
    """Tokens that the sampler's threshold leaves of a row, in whose batch another request may be."""
    sampler = Sampler(2, len(logits), "cpu")
    sampler.add(0, params, [0], 0)
    if companion is not None:
        sampler.add(1, companion, [0], 0)
    if not (sampler.work.floors or sampler.work.prefix):
        return set(range(len(logits)))
    scores = torch.tensor([logits, logits[::-1]])
    bound = thresholds(scores, sampler._rows(torch.tensor([0, 1])), sampler.work)
    return set((scores >= bound)[0].nonzero()[:, 0].tolist())

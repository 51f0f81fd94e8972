"""Draws: the hash, its uniformity and independence, and the distribution of what is drawn."""

import math
import random
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from plain_sampling import kept, logit_rows, mix, noise, number, one, quick, requests

from octavo.engine.sampling import GOLDEN, Sampler, SamplingParams, Work, gumbel, thresholds, uniform


@pytest.mark.parametrize("V", [1, 63, 5003, 49_152])
def test_noise_and_thresholds_of_a_row_are_the_same_to_the_bit_in_any_batch(V):
    n, dice = 9, random.Random(V)
    scores = torch.randn(n, V, generator=torch.Generator().manual_seed(V)) * 4
    steps, seeds, position = torch.arange(1, V + 1) * GOLDEN, torch.arange(n) - 4, torch.arange(n) * 100
    together = gumbel(seeds, position, steps)
    sampler = Sampler(n, V, "cpu")
    everyone = [
        SamplingParams(
            temperature=dice.choice([0.6, 1.0]),
            top_p=dice.choice([0.8, 1.0]),
            top_k=dice.choice([0, 20]),
            min_p=dice.choice([0, 0.01]),
        )
        for _ in range(n)
    ]
    for slot, params in enumerate(everyone):
        sampler.add(slot, params, [], slot)
    bounds = thresholds(scores, sampler._rows(torch.arange(n)), sampler.work)
    for i, params in enumerate(everyone):
        row = slice(i, i + 1)
        assert torch.equal(gumbel(seeds[row], position[row], steps), together[row])
        alone = thresholds(scores[row], sampler._rows(torch.tensor([i])), Work.of([params], V))
        assert torch.equal(alone, bounds[row])


@quick
@given(logit_rows, requests, st.integers(-(2**70), 2**70), st.integers(0, 10**6))
def test_a_draw_is_the_reference(logits, params, seed, position):
    params = replace(params, logit_bias={}, min_tokens=0, temperature=max(params.temperature, 0.5))
    sampled, _ = one(logits, params, seed=seed, position=position, prompt=())
    stay, near = kept(logits, params)
    marks = [s / params.temperature + noise(seed, position, t) for t, s in enumerate(logits)]
    token = int(sampled.tokens)
    assert token in stay | near
    assert marks[token] >= max((marks[t] for t in stay - near), default=-math.inf) - 1e-3


@quick
@given(st.integers(-(2**63), 2**63 - 1), st.integers(0, 2**31 - 1), st.integers(0, 200_000))
def test_the_hash_is_splitmix64(seed, position, token):
    steps = torch.tensor([(token + 1)]) * GOLDEN
    found = uniform(torch.tensor([seed]), torch.tensor([position]), steps)
    assert float(found) == pytest.approx((number(seed, position, token) >> 11) / 2**53, rel=1e-6, abs=2**-54)
    assert float(gumbel(torch.tensor([seed]), torch.tensor([position]), steps)) == pytest.approx(
        noise(seed, position, token), rel=1e-4, abs=1e-4
    )


def test_uniform_numbers_are_uniform_and_independent():
    """Along each of seed, position and token: chi-square over 64 cells, and over 16 x 16 cells of neighbours."""
    n = 2**16
    step = torch.arange(1, n + 1) * GOLDEN
    many, zero = torch.arange(n), torch.zeros(n, dtype=torch.int64)
    lines = {
        "token": uniform(torch.tensor([5]), torch.tensor([9]), step)[0],
        "position": uniform(zero + 5, many, step[3:4])[:, 0],
        "seed": uniform(many, zero + 9, step[3:4])[:, 0],
        "seed and position": uniform(many, n - many, step[3:4])[:, 0],
    }
    lines["token of the next seed"] = uniform(torch.tensor([6]), torch.tensor([9]), step)[0]
    for name, line in lines.items():
        assert chi_square(torch.histc(line, 64, 0, 1)) < 5, name
        pairs = (line[:-1] * 16).long() * 16 + (line[1:] * 16).long()
        assert chi_square(pairs.bincount(minlength=256)) < 5, name
    for name, line in lines.items():
        others = [other for key, other in lines.items() if key != name]
        cells = [chi_square(((line * 16).long() * 16 + (o * 16).long()).bincount(minlength=256)) for o in others]
        assert max(cells) < 5, name


def chi_square(counts, expected=None):
    """How many standard deviations the statistic is above its mean."""
    counts = counts.double()
    expected = counts.sum() / len(counts) if expected is None else expected.double() * counts.sum()
    degrees = len(counts) - 1
    return float((((counts - expected) ** 2 / expected).sum() - degrees) / math.sqrt(2 * degrees))


@pytest.mark.parametrize(
    "params",
    [{}, {"temperature": 0.5}, {"temperature": 2.0, "top_k": 7}, {"top_p": 0.8}, {"min_p": 0.1}],
    ids=lambda params: "-".join(params) or "plain",
)
@pytest.mark.parametrize("along", ["position", "seed"])
def test_draws_follow_the_distribution(params, along):
    draws, V = 20_000, 20
    params = SamplingParams(**params)
    logits = torch.randn(V, generator=torch.Generator().manual_seed(3)) * 1.5
    stay = sorted(kept(logits.tolist(), params)[0])
    expected = (logits[stay].double() / params.temperature).softmax(0)
    if along == "position":
        sampler = Sampler(1, V, "cpu")
        sampler.add(0, params, [], 1)
        slots, position = torch.zeros(draws, dtype=torch.int64), torch.arange(draws)
    else:
        sampler = Sampler(draws, V, "cpu")
        sampler.add(0, params, [], 0)
        sampler._real[:] = sampler._real[0].clone()
        sampler._whole[:] = sampler._whole[0].clone()
        sampler._whole[:, 1] = torch.arange(draws + 1)
        slots, position = torch.arange(draws), torch.full((draws,), 17)
    tokens = sampler.sample(logits.expand(draws, V), slots, position).tokens
    counts = tokens.bincount(minlength=V)
    assert counts.sum() == counts[stay].sum()
    assert chi_square(counts[stay], expected) < 4


def test_unlikely_tokens_come_as_often_as_they_should():
    """A token of probability 1e-5: noise from 24 bits alone would be too coarse further down."""
    V, rows = 3, 200_000
    logits = torch.tensor([0.0, math.log(1e-5), -60.0]).expand(rows, V)
    sampler = Sampler(1, V, "cpu")
    sampler.add(0, SamplingParams(), [], 4)
    found = 0
    for start in range(0, 5 * rows, rows):
        tokens = sampler.sample(logits, torch.zeros(rows).long(), torch.arange(start, start + rows)).tokens
        found += int((tokens == 1).sum())
        assert not (tokens == 2).any()
    assert 1 <= found <= 25  # 10 on average


def test_seeds_reproduce_and_differ():
    V, steps = 1000, 50
    logits = torch.zeros(steps, V)

    def said(seed):
        sampler = Sampler(1, V, "cpu")
        sampler.add(0, SamplingParams(), [1, 2], seed)
        return sampler.sample(logits, torch.zeros(steps).long(), torch.arange(2, 2 + steps)).tokens

    assert torch.equal(said(7), said(7))
    assert torch.equal(said(7), said(7 + 2**64))
    for other in (8, -7, 7 << 32, 0):
        assert (said(7) == said(other)).sum() < 3


def test_noise_is_finite_for_the_smallest_and_the_largest_hash():
    """The hash backwards: the steps that lead to it from the start of seed 0, position 0."""
    golden, found = GOLDEN % 2**64, []
    for hashed in (0, 2**64 - 1, 2**11, 2**64 - 2**40):
        step = (unmixed(hashed) - mix(golden)) % 2**64
        steps = torch.tensor([step - 2**64 if step >= 2**63 else step])
        found.append(float(gumbel(torch.tensor([0]), torch.tensor([0]), steps)))
    assert found == pytest.approx([54 * math.log(2), -math.log(24 * math.log(2)), 53 * math.log(2), found[1]], rel=1e-5)


def unmixed(x: int) -> int:
    """What `mix` turns into x."""
    for shift, factor in ((31, 0x94D049BB133111EB), (27, 0xBF58476D1CE4E5B9), (30, 1)):
        x ^= x >> shift ^ x >> 2 * shift
        x = x * pow(factor, -1, 2**64) % 2**64
    assert x < 2**64
    return x

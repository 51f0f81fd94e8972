"""`generate` with a store answers as it does without one, and computes only what is new."""

import copy
import random
import threading
from collections import Counter

import pytest
import torch
from transformers import GenerationConfig, StoppingCriteria
from transformers.generation.streamers import BaseStreamer

import octavo
from octavo import KVCache, ReuseStore, attach, detach
from tiny import tiny_adapter, tiny_model, tokens
from tiny_swift import model_of, pair

GREEDY = {"do_sample": False, "max_new_tokens": 6}
SETTINGS = {"shortest": 8, "back": 24}


pytestmark = pytest.mark.usefixtures("one_thread")


def gated(shift=0, window=30, **options):
    model = tiny_model() if not options.get("kv_dtype") else tiny_model().double()
    return attach(model, tiny_adapter(model, window=window, shift=shift), chunk=16, **options)


def swift(evict, shift=0, before=0, **options):
    model = model_of()
    gates = {"window": 30, "shift": shift} if evict else {}
    return attach(model, pair(model, 2, evict, before=before, **gates), chunk=16, **options)


MODELS = {
    "dense": lambda **o: attach(tiny_model(), chunk=16, **o),
    "gates": lambda **o: gated(0, **o),
    "gates, shift 1": lambda **o: gated(1, **o),
    "gates, short window": lambda **o: gated(0, window=9, **o),
    "gates, short window, shift 1": lambda **o: gated(1, window=9, **o),
    "swiftkv": lambda **o: swift(False, **o),
    "swiftkv, gates, shift 1": lambda **o: swift(True, 1, **o),
    "swiftkv that hands on": lambda **o: swift(False, before=40, **o),
    "swiftkv that hands on, gates": lambda **o: swift(True, before=40, **o),
    "gates, int8": lambda **o: gated(0, kv_dtype="int8", **o),
}
EXACT = [name for name in MODELS if "int8" not in name]


class Counted:
    """How many tokens a model's decoder reads."""

    def __init__(self, model):
        self.tokens = 0
        inner = model.base_model.embed_tokens
        self.handle = inner.register_forward_hook(lambda m, args, out: self.count(args[0]))

    def count(self, ids):
        self.tokens += ids.numel()


def logits_of(out):
    return torch.stack(out.logits, 1)


def ask(model, ids, **options):
    given = {**GREEDY, "output_logits": True, "return_dict_in_generate": True, **options}
    return model.generate(ids, **given)


@pytest.mark.parametrize("name", EXACT)
def test_reused_is_recomputed_for_any_prefix_and_split(name, tmp_path, full):
    """The identity: logits within 1e-4 and the same greedy tokens, from memory, and from disk after a restart."""
    dice, plain = random.Random(1), MODELS[name]()
    store = ReuseStore("20MB", tmp_path, **SETTINGS)
    model = MODELS[name](reuse=store)
    stem, hits, worst = tokens(1, 150)[0], 0, 0.0
    for i in range(80 if full else 14):
        keep = dice.randrange(20, 150)
        ids = torch.cat([stem[:keep], tokens(1, dice.randrange(1, 60), seed=dice.randrange(4))[0]])[None]
        expected = ask(plain, ids)
        if i % 5 == 4:  # after a restart, from disk alone
            store.flush()
            store = ReuseStore(None if i % 2 else "20MB", tmp_path, **SETTINGS)
            model = MODELS[name](reuse=store)
        before = store.stats()
        got = ask(model, ids)
        assert torch.equal(got.sequences, expected.sequences)
        worst = max(worst, (logits_of(got) - logits_of(expected)).abs().max().item())
        hits += store.stats().hits - before.hits
        store.flush()
    print(f"{name}: {hits} hits, logits differ by {worst:.1e} at most")
    assert worst < 1e-4
    assert hits > 5


def test_codes_are_reused_too(tmp_path):
    """With codes in pages a chunk sees itself exactly and later ones see it rounded, so where chunks end matters: what
    was restored is compared with the cache that it was made of."""
    store = ReuseStore("20MB", tmp_path, **SETTINGS)
    model = MODELS["gates, int8"](reuse=store)
    ids = tokens(1, 96)
    ask(model, ids[:, :80])
    cache, whole = KVCache(model), KVCache(model)
    with torch.no_grad(), store.open(cache, cache.identity(), ids[0]) as reading:
        assert reading.boundary == 80
        whole.keep([56, 80])
        model(ids[:, :80], past_key_values=whole)
        a, b = cache.snapshot().to_bytes(), whole.snapshot([80]).to_bytes()
    assert a == b


def test_only_what_is_new_is_computed():
    store = ReuseStore("20MB", **SETTINGS)
    model = gated(reuse=store)
    counted, document = Counted(model), tokens(1, 120)
    for i, (question, computed) in enumerate([(10, 130), (12, 12), (7, 7)]):
        ids = torch.cat([document, tokens(1, question, seed=5 + i)], 1)
        ids[0, 120] = 50 + i  # they part right after the document
        counted.tokens = 0
        ask(model, ids)
        assert counted.tokens == computed + 5, "the rest of the prompt, and what was generated but its last token"
    stats = store.stats()
    assert (stats.requests, stats.hits, stats.reused) == (3, 2, 240)


def test_eight_turns_of_a_chat_compute_at_most_a_tenth_more_than_is_new():
    store = ReuseStore("20MB", **SETTINGS)
    model = gated(1, reuse=store)
    counted, text, new = Counted(model), tokens(1, 40), 40
    for turn in range(8):
        if turn:
            extra = tokens(1, 20, seed=turn)
            new, text = 1 + extra.shape[1], torch.cat([text, extra], 1)  # the answer's last token was not read yet
        counted.tokens = 0
        text = model.generate(text, **GREEDY)
        assert counted.tokens - 5 <= 1.1 * new


@pytest.mark.parametrize("name", ["dense", "gates", "gates, shift 1"])
@pytest.mark.parametrize("lengths", [(60, 60), (70, 33, 51)])
def test_batches_with_different_hits(name, lengths):
    plain, store = MODELS[name](), ReuseStore("20MB", **SETTINGS)
    model, document = MODELS[name](reuse=store), tokens(1, 30)[0]
    for round_ in range(3):
        rows = [torch.cat([document, tokens(1, n - 30, seed=10 * round_ * i + i)[0]]) for i, n in enumerate(lengths)]
        if round_ == 0:
            rows[0] = tokens(1, lengths[0], seed=77)[0]
        width = max(lengths)
        ids = torch.stack([torch.nn.functional.pad(row, (width - len(row), 0)) for row in rows])
        mask = torch.stack([(torch.arange(width) >= width - len(row)).long() for row in rows])
        expected, got = (ask(m, ids, attention_mask=mask) for m in (plain, model))
        assert torch.equal(got.sequences, expected.sequences)
        torch.testing.assert_close(logits_of(got), logits_of(expected), rtol=0, atol=1e-4)
    assert store.stats().hits > 2


def test_rows_that_begin_alike_are_computed_once():
    store = ReuseStore("20MB", **SETTINGS)
    model = gated(reuse=store)
    counted, document = Counted(model), tokens(1, 100)
    ids = torch.cat([document.expand(4, -1), tokens(4, 12, seed=3)], 1)
    expected = model.generate(ids, use_cache=True, past_key_values=KVCache(model), **GREEDY)
    counted.tokens = 0
    assert torch.equal(model.generate(ids, **GREEDY), expected)
    assert counted.tokens == 100 + 4 * 12 + 4 * 5


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 2}])
def test_beams_share_their_prompt(options):
    store = ReuseStore("20MB", **SETTINGS)
    plain, model, ids = gated(), gated(reuse=store), tokens(2, 60)
    for _ in range(2):
        assert torch.equal(model.generate(ids, **GREEDY, **options), plain.generate(ids, **GREEDY, **options))
    assert store.stats().hits == 2


def test_samples_are_the_same_as_without():
    plain, model, ids = gated(), gated(reuse=ReuseStore("20MB", **SETTINGS)), tokens(1, 60)
    for _ in range(2):
        answers = []
        for each in (plain, model):
            torch.manual_seed(0)
            answers.append(each.generate(ids, do_sample=True, num_return_sequences=4, max_new_tokens=8))
        assert torch.equal(*answers)


def test_what_is_not_understood_runs_as_before():
    store = ReuseStore("20MB", **SETTINGS)
    plain, model, ids = gated(), gated(reuse=store), tokens(2, 40)
    mask = torch.ones_like(ids)
    mask[0, -3:] = 0  # padding on the right
    embeds = plain.get_input_embeddings()(ids).detach()
    cases = [
        {"inputs": ids, "attention_mask": mask},
        {"inputs_embeds": embeds},
        {"inputs": ids, "use_cache": False},
        {"inputs": ids, "output_hidden_states": True},
        {"inputs": ids, "generation_config": GenerationConfig(use_cache=False, do_sample=False, max_new_tokens=3)},
        {"inputs": torch.cat([torch.zeros(2, 4, dtype=torch.long), ids], 1)},  # padding is inferred
        {
            "inputs": torch.nn.functional.pad(ids, (3, 0)),
            "attention_mask": torch.nn.functional.pad(mask * 0 + 1, (3, 0)),
        },
    ]
    for case in cases:
        options = {} if "generation_config" in case else GREEDY
        assert torch.equal(model.generate(**case, **options), plain.generate(**case, **options))
    own = KVCache(model)
    model.generate(ids[:1], past_key_values=own, **GREEDY)
    assert own.seen == 45
    assert store.stats().requests == 0


def test_a_setting_that_is_none_is_one():
    plain, ids = gated(), tokens(1, 40)
    ends = int(plain.generate(ids, **GREEDY)[0, 42])
    store = ReuseStore("20MB", answers=True, **SETTINGS)
    for model in (plain, gated(reuse=store)):
        model.generation_config.eos_token_id = ends
    asked = {**GREEDY, "streamer": None, "attention_mask": None}
    for case in (asked, {**asked, "eos_token_id": None}):
        assert torch.equal(model.generate(ids, **case), plain.generate(ids, **case))
    assert model.generate(ids, eos_token_id=None, **asked).shape == (1, 46)
    assert store.stats().hits == 1


def test_every_kind_of_drafts_runs_without_the_store():
    store = ReuseStore("20MB", **SETTINGS)
    model, ids = gated(reuse=store), tokens(1, 40)
    expected = model.generate(ids, **GREEDY)
    for drafted in ({"prompt_lookup_num_tokens": 3}, {"assistant_early_exit": 2}, {"speculation_type": "none"}):
        assert torch.equal(model.generate(ids, **drafted, **GREEDY), expected), drafted
    with pytest.raises(ValueError, match="num_mtp_layers"):  # what transformers says, unattached too
        model.generate(ids, use_mtp=True, **GREEDY)
    assert store.stats().requests == 1


def test_attaching_anew_copying_and_detaching():
    store = ReuseStore("20MB", **SETTINGS)
    model, ids = tiny_model(), tokens(1, 50)
    expected = model.generate(ids, **GREEDY)
    assert "generate" not in model.__dict__
    attach(attach(model, reuse=store), reuse=store)
    model.generate(ids, **GREEDY)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.base_model.layers[0].self_attn.v_proj.weight.mul_(2)
    assert not torch.equal(twin.generate(ids, **GREEDY), expected), "the copy runs itself"
    assert store.stats().hits == 0, "and its weights are others"
    assert torch.equal(model.generate(ids, **GREEDY), expected)
    assert store.stats().hits == 1
    detach(model)
    assert "generate" not in model.__dict__
    assert torch.equal(model.generate(ids, **GREEDY), expected)
    assert store.stats().requests == 3


def test_a_failing_store_costs_a_warning_not_an_answer(monkeypatch):
    store = ReuseStore("20MB", **SETTINGS)
    model, ids = gated(reuse=store), tokens(1, 50)
    expected = gated().generate(ids, **GREEDY)
    monkeypatch.setattr(store, "put", lambda *args: 1 / 0)
    with pytest.warns(RuntimeWarning, match="could not store: ZeroDivisionError"):
        assert torch.equal(model.generate(ids, **GREEDY), expected)
    monkeypatch.setattr(store, "peek", lambda *args: 1 / 0)
    monkeypatch.setattr(store, "open", lambda *args, **kwargs: 1 / 0)
    with pytest.warns(RuntimeWarning, match="is not used: ZeroDivisionError"):
        assert torch.equal(model.generate(ids, **GREEDY), expected)
    with pytest.warns(RuntimeWarning, match="is not used: ZeroDivisionError"):
        assert torch.equal(model.generate(ids, num_beams=2, **GREEDY), gated().generate(ids, num_beams=2, **GREEDY))


def test_an_interrupted_answer_leaves_its_prompt():
    store = ReuseStore("20MB", **SETTINGS)
    model, ids = gated(reuse=store), tokens(1, 50)

    def interrupted(*args):
        if len(args[0][0]) > 52:
            raise KeyboardInterrupt
        return args[1]

    with pytest.raises(KeyboardInterrupt):
        model.generate(ids, logits_processor=[interrupted], **GREEDY)
    model.generate(torch.cat([ids, tokens(1, 4, seed=9)], 1), **GREEDY)
    assert store.stats().reused == 50
    assert all(record.users == 0 for record in store.index.records.values())


class Streamed(BaseStreamer):
    """Notes what comes, and whether the prompt was stored by then."""

    def __init__(self, store):
        self.store, self.came, self.ended = store, [], False

    def put(self, value):
        self.came.append((value.flatten().tolist(), self.store.stats().inserted))

    def end(self):
        self.ended = True


def test_the_first_token_is_streamed_before_the_prompt_is_stored():
    store, ids = ReuseStore("10MB"), tokens(1, 90)
    model, expected = attach(tiny_model(), reuse=store), tiny_model().generate(ids, do_sample=False, max_new_tokens=4)
    streamer, asked = Streamed(store), []

    class Asked(StoppingCriteria):
        def __call__(self, input_ids, scores, **more):
            asked.append(input_ids.shape[1])
            return torch.zeros(len(input_ids), dtype=torch.bool)

    more = {"streamer": streamer, "stopping_criteria": [Asked()]}
    out = model.generate(ids, do_sample=False, max_new_tokens=4, **more)
    assert torch.equal(out, expected)
    assert [token for each, _ in streamer.came for token in each] == expected[0].tolist()
    assert streamer.ended
    assert asked == [91, 92, 93, 94]
    assert [inserted for _, inserted in streamer.came] == [0, 0, 1, 1, 1]  # the prompt, then one token after another


def test_threads_compute_a_new_prefix_once():
    store = ReuseStore("50MB", shortest=8, back=64)
    model = gated(reuse=store)
    counted, document, answers, errors = Counted(model), tokens(1, 400), {}, []
    prompts = [torch.cat([document, tokens(1, 12, seed=20 + i)], 1) for i in range(4)]
    expected = [gated().generate(ids, **GREEDY) for ids in prompts]

    def run(i):
        try:
            answers[i] = model.generate(prompts[i], **GREEDY)
        except Exception as e:
            errors.append(e)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert all(torch.equal(answers[i], expected[i]) for i in range(4))
    assert counted.tokens <= 400 + 4 * (12 + 5) + 3
    assert store.stats().waited >= 1


def test_when_the_first_of_several_threads_fails_another_one_computes():
    store = ReuseStore("50MB", **SETTINGS)
    plain_cache = octavo.KVCache
    model, ids = gated(reuse=store), tokens(1, 60)
    cache = plain_cache(model)
    first = store.open(cache, cache.identity(), ids[0])
    counts, waiting = Counter(), threading.Event()

    def second():
        other = plain_cache(model)
        waiting.set()
        with store.open(other, other.identity(), ids[0]) as reading:
            counts["restored"] = reading.boundary

    thread = threading.Thread(target=second)
    thread.start()
    waiting.wait()
    thread.join(0.2)
    assert thread.is_alive(), "it waits"
    first.close()
    thread.join(10)
    assert not thread.is_alive()
    assert counts["restored"] == 0


def test_two_tenants_share_nothing():
    store = ReuseStore("20MB", **SETTINGS)
    model, ids = gated(reuse=store), tokens(1, 60)
    with store.request(tenant="a"):
        model.generate(ids, **GREEDY)
    with store.request(tenant="b"):
        model.generate(ids, **GREEDY)
    assert store.stats().hits == 0
    with store.request(tenant="a"):
        model.generate(ids, **GREEDY)
    assert store.stats().hits == 1
    assert len({each.space for each in store.list()}) == 2


def test_pipelines_reuse_too(smollm):
    from transformers import pipeline

    plain, tokenizer = smollm
    store = ReuseStore("50MB", shortest=16)
    model = attach(copy.deepcopy(plain), reuse=store)
    text = "The quick brown fox jumps over the lazy dog, and then it goes home to its family. " * 3
    answers = [
        pipeline("text-generation", model=each, tokenizer=tokenizer)(text, **GREEDY)[0]["generated_text"]
        for each in (plain, model, model)
    ]
    assert len(set(answers)) == 1
    assert store.stats().hits == 1

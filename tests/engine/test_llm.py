"""`LLM`: texts in and out, streams, chats, grammars, and what it refuses."""

import asyncio
import json

import pytest
import torch

from octavo import attach, detach
from octavo.config import nbytes
from octavo.engine import LLM, SamplingParams
from octavo.errors import ConfigError, NotAttachedError, PromptError
from tiny import tiny_model

GREEDY = SamplingParams(temperature=0.0, max_tokens=12)


@pytest.fixture(scope="module")
def llm(smollm):
    model, tokenizer = smollm
    attach(model, "dms-8x")
    yield LLM(model, tokenizer=tokenizer)
    detach(model)


def generated(llm, prompt, count):
    ids = llm.tokenizer(prompt, return_tensors="pt")["input_ids"]
    out = llm.model.generate(ids, do_sample=False, max_new_tokens=count)
    return llm.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


def test_texts_are_those_of_generate(llm):
    prompts = ["The capital of France is", "Once upon a time", "1, 2, 3,"]
    outputs = llm.generate(prompts, GREEDY)
    assert [o.prompt for o in outputs] == prompts
    assert [o.text for o in outputs] == [generated(llm, p, 12) for p in prompts]
    assert llm.engine.unfinished == 0


def test_a_stream_is_the_text_in_pieces(llm):
    prompt = "Write about naïve café owners – and 日本語:"
    whole = llm.generate(prompt, SamplingParams(temperature=0.0, max_tokens=30))[0].text
    pieces = list(llm.stream(prompt, SamplingParams(temperature=0.0, max_tokens=30)))
    assert len(pieces) > 3
    assert "".join(pieces) == whole


def test_a_stream_that_is_closed_ends_its_request(llm):
    stream = llm.stream("Once upon a time", GREEDY)
    next(stream)
    assert llm.engine.unfinished == 1
    stream.close()
    assert llm.engine.unfinished == 0


def test_streams_run_beside_each_other(llm):
    async def collect(prompt):
        return "".join([piece async for piece in llm.astream(prompt, GREEDY)])

    async def both():
        return await asyncio.gather(collect("The capital of France is"), collect("Once upon a time"))

    assert asyncio.run(both()) == [
        o.text for o in llm.generate(["The capital of France is", "Once upon a time"], GREEDY)
    ]


def test_a_stop_string_ends_the_text_before_it(llm):
    whole = llm.generate("The capital of France is", GREEDY)[0].text
    stop = whole[6:9]
    out = llm.generate("The capital of France is", SamplingParams(temperature=0.0, max_tokens=12, stop=stop))[0]
    assert (out.text, out.finish_reason) == (whole[: whole.index(stop)], "stop")
    pieces = llm.stream("The capital of France is", SamplingParams(temperature=0.0, max_tokens=12, stop=stop))
    assert "".join(pieces) == out.text


def test_a_chat_is_its_template(llm):
    messages = [{"role": "user", "content": "Say hello."}]
    ids = llm.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    out = llm.model.generate(**ids, do_sample=False, max_new_tokens=10)
    expected = llm.tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
    assert llm.chat(messages, SamplingParams(temperature=0.0, max_tokens=10)).text == expected


def test_logprobs_are_the_models(llm):
    out = llm.generate("The capital of France is", SamplingParams(temperature=0.0, max_tokens=3, logprobs=2))[0]
    ids = torch.tensor([out.prompt_tokens + out.tokens])
    with torch.no_grad():
        logits = llm.model(ids[:, :-1], use_cache=False).logits[0, len(out.prompt_tokens) - 1 :].float()
    expected = logits.log_softmax(-1)
    for i, token in enumerate(out.tokens):
        assert out.logprobs[i] == pytest.approx(expected[i, token].item(), abs=1e-3)
        assert set(out.alternatives[i]) == set(expected[i].topk(2).indices.tolist())


def test_a_grammar_shapes_the_answer(llm):
    pytest.importorskip("xgrammar")
    schema = {"type": "object", "properties": {"city": {"type": "string", "maxLength": 12}}, "required": ["city"]}
    params = SamplingParams(temperature=0.0, max_tokens=40)
    for out in llm.generate(["A city as JSON:", "Another one:"], params, json_schema=schema):
        assert set(json.loads(out.text)) == {"city"}
    assert llm.generate("Digits:", params, regex="[0-9]{3}")[0].text.isdigit()


@pytest.mark.parametrize(("size", "expected"), [(5, 5), ("2GiB", 2**31), ("1.5 MB", 1_500_000), ("7", 7)])
def test_sizes(size, expected):
    assert nbytes(size, "kv_memory") == expected


@pytest.mark.parametrize("size", ["", "GiB", "2 parsecs", "x7", None])
def test_impossible_sizes_are_refused(size):
    with pytest.raises(ConfigError, match="2GiB"):
        nbytes(size, "kv_memory")


@pytest.mark.parametrize(
    "prompts", [5, [["a", 1]], [[1.5]], [None], torch.tensor([[1, 2], [3, 4]]), {"input_ids": [1]}]
)
def test_what_is_no_prompt_is_refused(llm, prompts):
    with pytest.raises(PromptError, match=r"list of token ids.*not (int|list|NoneType|Tensor|dict)"):
        llm.generate(prompts, GREEDY)
    assert llm.engine.unfinished == 0


def test_prompts_come_in_any_iterable(llm):
    one = llm.generate("Once", GREEDY)[0].tokens
    ids = llm.tokenizer("Once")["input_ids"]
    assert [out.tokens for out in llm.generate((each for each in (ids, torch.tensor(ids))), GREEDY)] == [one, one]
    assert [out.tokens for out in llm.generate(ids, GREEDY)] == [one]


@pytest.mark.parametrize("messages", ["Hello", [[{"role": "user", "content": "Hello"}]], [{"role": "user"}], ["Hello"]])
def test_what_is_no_conversation_is_refused(llm, messages):
    with pytest.raises(PromptError, match=r"conversation is a list of messages|chat template does not take"):
        llm.chat(messages, GREEDY)
    assert llm.engine.unfinished == 0


@pytest.mark.parametrize("token", [-1, 10**7])
def test_a_token_that_the_model_lacks_is_refused_and_others_go_on(llm, token):
    stream = llm.stream("Once upon a time", GREEDY)
    begun = next(stream)
    with pytest.raises(PromptError, match=f"the token {token};"):
        llm.generate([[1, token]], GREEDY)
    assert begun + "".join(stream) == llm.generate("Once upon a time", GREEDY)[0].text


def test_what_cannot_be_is_refused(llm):
    with pytest.raises(PromptError):
        llm.generate("")
    with pytest.raises(ConfigError, match="one for each"):
        llm.generate(["a", "b"], [GREEDY])
    with pytest.raises(ConfigError, match="only one"):
        llm.generate("a", GREEDY, json_schema={}, regex="a")
    with pytest.raises(NotAttachedError):
        LLM(tiny_model())
    with pytest.raises(ConfigError, match=r"octavo\.attach"):
        LLM(llm.model, kv_memory="1GiB")
    with pytest.raises(ConfigError, match="tokenizer"):
        LLM(attach(tiny_model())).generate("a")
    assert llm.engine.unfinished == 0

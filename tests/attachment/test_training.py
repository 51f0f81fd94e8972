"""Training an attached model as users of transformers do: documents packed into one row, and attention dropout."""

import copy

import pytest
import torch
from transformers import DataCollatorWithFlattening, GPT2Config, Trainer, TrainingArguments

from octavo import KVCache, attach
from octavo.errors import UnsupportedModelError
from tiny import tiny_adapter, tiny_model, tokens
from tiny_decoders import tiny_decoder
from tiny_pictures import picture_model
from tiny_swift import model_of, pair
from tiny_windows import windowed_model

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]
CLOSE = {"rtol": 0, "atol": 1e-4}
LENGTHS = [30, 1, 17, 24]
MODELS = {
    "llama": tiny_model,
    "qwen3": lambda: tiny_model("qwen3"),
    "windows, caps": lambda: windowed_model("gemma2"),
    "windows, sinks": lambda: windowed_model("gpt-oss"),
    "chunked windows": lambda: tiny_decoder("llama4_text"),
    "told by its call": lambda: tiny_decoder("stablelm"),
    "learned positions": lambda: tiny_decoder("gpt2"),
}


def flattened(documents):
    """What transformers' collator makes of them: one row, in which positions start anew."""
    return DataCollatorWithFlattening()([{"input_ids": d.tolist()} for d in documents])


def documents(batch=1):
    return [tokens(batch, length, seed=i) for i, length in enumerate(LENGTHS)]


@pytest.mark.parametrize("gates", [False, True])
@pytest.mark.parametrize("kind", MODELS)
def test_packed_documents_do_not_see_each_other(kind, gates):
    model, rows = MODELS[kind](), documents()
    packed = flattened([row[0] for row in rows])
    with torch.no_grad():
        unattached = model(**packed, use_cache=False)
        attach(model, tiny_adapter(model, window=6) if gates else None, chunk=16)
        alone = torch.cat([model(row, use_cache=False).logits for row in rows], 1)
        got = model(**packed, use_cache=False)
        torch.testing.assert_close(got.logits, alone, **CLOSE)
        if not gates and kind != "windows, sinks":  # whose documents see each other in transformers' masks
            torch.testing.assert_close(got.logits, unattached.logits, **CLOSE)
            torch.testing.assert_close(got.loss, unattached.loss, **CLOSE)
        else:
            assert (got.logits - unattached.logits).abs().max() > 0.01


def test_rows_are_packed_each_in_its_own_way_with_swiftkv_too():
    model = model_of()
    attach(model, pair(model, 1, True, window=6))
    lengths = [[10, 20, 9], [25, 14]]
    positions = torch.stack([torch.cat([torch.arange(n) for n in each]) for each in lengths])
    ids = tokens(2, 39)
    with torch.no_grad():
        got = model(ids, position_ids=positions, use_cache=False).logits
        for row, each in enumerate(lengths):
            parts = [model(part[None], use_cache=False).logits[0] for part in ids[row].split(each)]
            torch.testing.assert_close(got[row], torch.cat(parts), **CLOSE)


def test_text_positions_beside_those_of_pictures_part_documents_too():
    decoder = picture_model("qwen2.5").model.language_model
    rows = documents()
    positions = torch.cat([torch.arange(n) for n in LENGTHS]).expand(4, 1, -1)
    with torch.no_grad():
        expected = decoder(torch.cat(rows, 1), position_ids=positions, use_cache=False).last_hidden_state
        alone = torch.cat([decoder(row, use_cache=False).last_hidden_state for row in rows], 1)
        got = attach(decoder)(torch.cat(rows, 1), position_ids=positions, use_cache=False).last_hidden_state
    torch.testing.assert_close(got, expected, **CLOSE)
    torch.testing.assert_close(got, alone, **CLOSE)


def trained(model, folder, **changes):
    """Losses and weights after a few steps of transformers' own trainer on packed documents."""
    data = [{"input_ids": row[0].tolist()} for row in documents() * 2]
    arguments = TrainingArguments(
        output_dir=folder, per_device_train_batch_size=4, max_steps=3, learning_rate=1e-2, logging_steps=1, seed=1,
        report_to=[], use_cpu=True, disable_tqdm=True, save_strategy="no", **changes,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=data, data_collator=DataCollatorWithFlattening())
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return losses, [p.detach().clone() for p in model.parameters()]


@pytest.mark.parametrize("again", [False, True])
def test_a_trainer_learns_the_same_of_packed_documents_with_dropout(again, tmp_path):
    model = tiny_model(attention_dropout=0.2)
    twin = copy.deepcopy(model)
    losses, weights = trained(model, tmp_path, gradient_checkpointing=again)  # whose layers run again
    got, ours = trained(attach(twin), tmp_path, gradient_checkpointing=again)
    assert len(losses) == 3
    assert got == pytest.approx(losses, abs=1e-4)
    for a, b in zip(ours, weights, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-3)


DROPPING = {
    "llama": lambda: tiny_model(attention_dropout=0.3),
    "qwen3": lambda: tiny_model("qwen3", attention_dropout=0.3),
    "gpt2": lambda: tiny_model(lambda: GPT2Config(vocab_size=97, n_embd=64, n_layer=2, n_head=4, attn_pdrop=0.3)),
    "windows, caps": lambda: windowed_model("gemma2", attention_dropout=0.3),
    "windows, sinks": lambda: windowed_model("gpt-oss", attention_dropout=0.3),
}


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("kind", DROPPING)
def test_dropout_is_that_of_the_unattached_model_from_the_same_seed(kind, padded):
    model, ids, mask = DROPPING[kind](), tokens(2, 40), torch.ones(2, 40, dtype=torch.long)
    mask[0, : 7 * padded] = 0
    labels = ids.clone()
    labels[0, : 8 * padded] = -100  # padding says nothing of the first token
    inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": mask.cumsum(1).sub(1).clamp(0)}
    model.train()
    found = []
    for step in ("unattached", "attached"):
        if step == "attached":
            attach(model, chunk=16)
        torch.manual_seed(5)
        out = model(**inputs, labels=labels)
        model.zero_grad()
        out.loss.backward()
        found.append((out.logits[mask.bool()], [p.grad.clone() for p in model.parameters()]))
    (expected, theirs), (got, ours) = found
    torch.testing.assert_close(got, expected, **CLOSE)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, **CLOSE)
    model.eval()
    with torch.no_grad():
        assert (model(**inputs).logits[mask.bool()] - got).abs().max() > 0.01


def test_a_cache_is_refused_where_dropout_would_be_left_out():
    model, ids = attach(tiny_model(attention_dropout=0.3)).train(), tokens(1, 20)
    cache = KVCache(model)
    with pytest.raises(UnsupportedModelError, match=r"drops attention weights.*use_cache=False"):
        model(ids, past_key_values=cache)
    assert cache.seen == 0
    assert model(ids).past_key_values is None


def test_layers_that_read_another_layer_s_keys_run_again_under_its_gates():
    model = tiny_decoder("gemma3n_text").train()
    attach(model, tiny_adapter(model, window=5))
    embeddings = model.get_input_embeddings()
    ids, found = tokens(2, 40), []
    for again in (False, True):
        if again:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.zero_grad()
        model(ids, labels=ids, use_cache=False).loss.backward()
        found.append(embeddings.weight.grad.clone())
    torch.testing.assert_close(*found, **CLOSE)

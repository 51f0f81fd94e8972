"""`run_layers`, which training uses, is the model's own forward; packed documents do not see each other."""

import pytest
import torch

from octavo import attach
from octavo.attachment import require_attachment
from octavo.attachment.supported import fingerprint
from octavo.dms import HardGates
from octavo.retrofit.lesson import embedded_tokens
from octavo.retrofit.readout import readout
from octavo.swiftkv import SwiftKVAdapter, initial
from tiny import tokens
from tiny_swift import LAYERS, SWIFT_FAMILIES, full, gates_for, model_of, swiftkv_for


def logits_of(model, streams):
    return readout(model)(model.model.norm(streams[-1]))


@pytest.mark.parametrize("family", SWIFT_FAMILIES)
@pytest.mark.parametrize("evict", [False, True])
def test_layers_one_by_one_are_the_forward(family, evict):
    model, ids = model_of(family), tokens(2, 90)
    swift = swiftkv_for(model, group=2)
    gates = gates_for(model, swift.transform)
    attach(model, [swift, gates] if evict else swift)
    expected, positions = full(model, ids), torch.arange(90).expand(2, -1)
    attach(model)
    attachment = require_attachment(model)
    options = {"transform": swift.transform, "policy": HardGates(gates.gates) if evict else None}
    with torch.no_grad():
        streams = attachment.run_layers(embedded_tokens(model.model, ids), 0, LAYERS, positions, **options)
        assert len(streams) == LAYERS
        torch.testing.assert_close(logits_of(model, streams), expected, rtol=0, atol=1e-5)
        if not evict:
            upper = attachment.run_layers(streams[1], 2, LAYERS, positions, transform=swift.transform)
            torch.testing.assert_close(logits_of(model, upper), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", SWIFT_FAMILIES)
def test_a_transform_of_the_last_layer_starts_as_the_base_model(family):
    """Training starts from the layers' own projections, and the last one's input is what they were made for."""
    model, ids = model_of(family), tokens(2, 40)
    expected = full(model, ids)
    attach(model, SwiftKVAdapter("start", initial(model, LAYERS - 1), fingerprint(model)))
    torch.testing.assert_close(full(model, ids), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("transform", "evict"), [(False, False), (True, False), (True, True)])
def test_packed_documents_are_each_alone(transform, evict):
    model = model_of()
    swift = swiftkv_for(model, group=4)
    gates = gates_for(model, swift.transform)
    attach(model)
    sizes = [[70, 1, 40], [33, 60, 12]]  # the rest of each row is padding
    ids = tokens(2, 120)
    document = torch.full((2, 120), -1, dtype=torch.int32)
    positions = torch.zeros(2, 120, dtype=torch.int64)
    places = []
    for row, lengths in enumerate(sizes):
        at = 0
        for n, length in enumerate(lengths):
            document[row, at : at + length] = n
            positions[row, at : at + length] = torch.arange(length)
            places.append((row, slice(at, at + length)))
            at += length
    options = {"transform": swift.transform if transform else None, "policy": HardGates(gates.gates) if evict else None}
    run = require_attachment(model).run_layers
    with torch.no_grad():
        embedded = model.model.embed_tokens(ids)
        packed = run(embedded, 0, LAYERS, positions, document=document, **options)[-1]
        assert torch.isfinite(packed).all()
        for row, place in places:
            n = place.stop - place.start
            alone = run(embedded[row : row + 1, place], 0, LAYERS, torch.arange(n)[None], **options)[-1]
            torch.testing.assert_close(packed[row, place], alone[0], rtol=0, atol=1e-4)


def test_gradients_reach_the_transform_and_nothing_else():
    model, ids = model_of(), tokens(1, 40)
    model.requires_grad_(False)
    transform = swiftkv_for(model).transform
    attach(model)
    streams = require_attachment(model).run_layers(
        model.model.embed_tokens(ids), 0, LAYERS, torch.arange(40)[None], transform=transform
    )
    streams[-1].square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in transform.parameters())
    assert all(p.grad is None for p in model.parameters())

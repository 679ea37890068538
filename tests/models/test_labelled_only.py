"""Logits where a label asks for one are those of the whole row; so are loss and gradients."""

from __future__ import annotations

import pytest
import torch

from glmtune.models.load import load_base


@pytest.mark.parametrize("num_items", [None, 7])
def test_same_loss_logits_and_gradients(tiny_base, num_items: int | None) -> None:
    model = load_base(tiny_base, dtype=torch.float32).train()
    generator = torch.Generator().manual_seed(0)
    input_ids = torch.randint(3, 200, (3, 11), generator=generator)
    labels = input_ids.masked_fill(torch.rand(3, 11, generator=generator) < 0.6, -100)
    mask = torch.ones_like(input_ids)
    mask[1, 8:] = 0
    inputs = {
        "input_ids": input_ids,
        "attention_mask": mask,
        "labels": labels,
        "num_items_in_batch": num_items,
    }
    found = []
    for labelled_only in (False, True):
        model.zero_grad()
        output = model(**inputs, labelled_only=labelled_only)
        output.loss.backward()
        gradients = torch.cat([weight.grad.flatten() for weight in model.parameters()])
        found.append((output.loss.detach(), gradients, output.logits.detach()))
    torch.testing.assert_close(found[0][0], found[1][0], atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(found[0][1], found[1][1], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(found[0][2][:, :-1][labels[:, 1:] != -100], found[1][2], atol=1e-6, rtol=1e-6)


def test_without_labels_every_position_has_logits(tiny_base) -> None:
    model = load_base(tiny_base, dtype=torch.float32)
    input_ids = torch.arange(3, 9)[None]
    assert model(input_ids=input_ids, labelled_only=True).logits.shape[:2] == (1, 6)

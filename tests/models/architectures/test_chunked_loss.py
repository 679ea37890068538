"""Logits are formed where a label asks for one, some at a time: loss, gradients and best tokens are the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from glmtune.models.architectures import chunked_loss as module
from glmtune.models.architectures.chunked_loss import chunked_cross_entropy, rows_per_chunk
from glmtune.models.load import load_official

VOCAB, WIDTH = 300, 16


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three labels in a chunk."""
    monkeypatch.setattr(module, "rows_per_chunk", lambda vocab_size: 3)


def inputs(num_items: int | None) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    input_ids = torch.randint(3, 200, (3, 11), generator=generator)
    labels = input_ids.masked_fill(torch.rand(3, 11, generator=generator) < 0.6, -100)
    mask = torch.ones_like(input_ids)
    mask[1, 8:] = 0
    return {
        "input_ids": input_ids,
        "attention_mask": mask,
        "labels": labels,
        "num_items_in_batch": num_items,
    }


@pytest.mark.parametrize("num_items", [None, 7])
@pytest.mark.parametrize("chunked", [False, True])
def test_same_loss_and_gradients(
    tiny_base: Path, num_items: int | None, chunked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if chunked:
        monkeypatch.setattr(module, "rows_per_chunk", lambda vocab_size: 3)
    model = load_official(tiny_base, dtype=torch.float32).train()
    found = []
    for labelled_only in (False, True):
        model.zero_grad()
        output = model(**inputs(num_items), labelled_only=labelled_only)
        output.loss.backward()
        found.append((output.loss.detach(), [weight.grad for weight in model.parameters()]))
        assert (output.logits is None) is labelled_only
    torch.testing.assert_close(found[0][0], found[1][0], atol=1e-6, rtol=1e-6)
    for plain, sparing in zip(found[0][1], found[1][1], strict=True):
        torch.testing.assert_close(plain, sparing, atol=1e-6, rtol=1e-5)


@pytest.mark.usefixtures("small_chunks")
def test_evaluation_gives_the_most_probable_tokens(tiny_base: Path) -> None:
    model, batch = load_official(tiny_base, dtype=torch.float32), inputs(None)
    with torch.no_grad():
        plain, sparing = model(**batch), model(**batch, labelled_only=True)
    asked = batch["labels"][:, 1:] != -100
    assert torch.equal(sparing.predictions, plain.logits[:, :-1].argmax(-1)[asked])
    assert sparing.loss.item() == pytest.approx(plain.loss.item(), rel=1e-6)


def test_without_labels_every_position_has_logits(tiny_base: Path) -> None:
    model = load_official(tiny_base, dtype=torch.float32)
    input_ids = torch.arange(3, 9)[None]
    assert model(input_ids=input_ids, labelled_only=True).logits.shape[:2] == (1, 6)


def test_a_batch_without_any_label_has_loss_zero(tiny_base: Path) -> None:
    model = load_official(tiny_base, dtype=torch.float32).train()
    for num_items in (None, torch.tensor(0), 5):
        batch = {**inputs(None), "num_items_in_batch": num_items}
        batch["labels"] = torch.full_like(batch["labels"], -100)
        loss = model(**batch, labelled_only=True).loss
        loss.backward()
        assert loss.item() == 0.0
    assert all(not weight.grad.any() for weight in model.parameters() if weight.grad is not None)


class Scaled(nn.Module):
    """A head with a frozen matrix and a trained scale, and one weight that it does not use."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, VOCAB).requires_grad_(False)
        self.scale = nn.Parameter(torch.ones(()))
        self.unused = nn.Parameter(torch.ones(3))

    def forward(self, hidden: Tensor) -> Tensor:
        return self.linear(hidden) * self.scale


def heads() -> dict[str, nn.Module]:
    torch.manual_seed(1)
    gathered = nn.Linear(WIDTH, VOCAB, bias=False)
    gathered.weight.ds_id = 0  # type: ignore[attr-defined]  # as DeepSpeed marks its partitioned weights
    return {
        "trained": nn.Linear(WIDTH, VOCAB),
        "frozen": nn.Linear(WIDTH, VOCAB).requires_grad_(False),
        "partly": Scaled(),
        "gathered": gathered,
    }


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("kind", list(heads()))
@pytest.mark.parametrize("autocast", [False, True])
def test_every_kind_of_head(kind: str, autocast: bool) -> None:
    head = heads()[kind]
    hidden = torch.randn(2, 9, WIDTH, generator=torch.Generator().manual_seed(2)).requires_grad_()
    labels = torch.randint(0, VOCAB, (2, 9), generator=torch.Generator().manual_seed(3))
    labels[0, :4] = -100
    trained = [hidden, *(weight for weight in head.parameters() if weight.requires_grad)]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logits = head(hidden[:, :-1]).float().flatten(0, 1)
        plain = nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum") / 5
        ours = chunked_cross_entropy(hidden, labels, head, vocab_size=VOCAB, num_items=5).loss
        assert ours is not None
        scale = 1024.0  # as a loss scaler multiplies
        want = torch.autograd.grad(plain * scale, trained, allow_unused=True, materialize_grads=True)
        found = torch.autograd.grad(ours * scale, trained, allow_unused=True, materialize_grads=True)
    tolerance = 2e-2 if autocast else 1e-5
    assert ours.item() == pytest.approx(plain.item(), rel=tolerance)
    for a, b in zip(want, found, strict=True):
        assert (a - b).norm() <= tolerance * a.norm() + 1e-12


def test_half_precision_is_left_to_the_backward_pass() -> None:
    head, hidden = nn.Linear(WIDTH, VOCAB), torch.zeros(4, WIDTH)
    assert not module._must_recompute(head, hidden)
    assert module._must_recompute(head, hidden.half())
    with torch.autocast("cpu", torch.float16):
        assert module._must_recompute(head, hidden)
    with torch.autocast("cpu", torch.bfloat16):
        assert not module._must_recompute(head, hidden)


class Largest(TorchDispatchMode):
    """Remembers the largest tensor that any operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        sizes = [
            leaf.untyped_storage().nbytes() // 4 for leaf in tree_leaves(result) if isinstance(leaf, Tensor)
        ]
        self.numbers = max([self.numbers, *sizes])
        return result


@pytest.mark.parametrize("kind", ["trained", "frozen", "gathered"])
def test_logits_never_exist_for_the_whole_batch(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LOGITS_PER_CHUNK", 256 * VOCAB)
    head = heads()[kind]
    hidden = torch.randn(4, 513, WIDTH, requires_grad=True)
    labels = torch.randint(0, VOCAB, (4, 513))
    with Largest() as largest:
        loss = chunked_cross_entropy(hidden, labels, head, vocab_size=VOCAB).loss
        assert loss is not None
        loss.backward()
    assert largest.numbers == 256 * VOCAB  # of 2,048 labels


def test_chunks_follow_the_vocabulary() -> None:
    assert rows_per_chunk(512) >= 100_000  # a small vocabulary is done in one go
    assert rows_per_chunk(151_552) * 151_552 <= module.LOGITS_PER_CHUNK


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("kind", list(heads()))
def test_kl_to_a_base_is_the_sum_over_the_vocabulary(kind: str) -> None:
    head = heads()[kind]
    source = torch.Generator().manual_seed(2)
    hidden = torch.randn(2, 9, WIDTH, generator=source).requires_grad_()
    other = torch.randn(2, 9, WIDTH, generator=source)
    labels = torch.randint(0, VOCAB, (2, 9), generator=source)
    labels[0, :4] = -100
    asked = labels[:, 1:] != -100
    base = chunked_cross_entropy(other, labels, head, vocab_size=VOCAB, hidden_only=True)
    assert base.loss is None
    assert torch.equal(base.hidden_TD, other[:, :-1][asked])
    trained = [hidden, *(weight for weight in head.parameters() if weight.requires_grad)]
    theirs = head(other[:, :-1][asked]).log_softmax(-1).detach()
    mine = head(hidden[:, :-1][asked]).log_softmax(-1)
    plain = (theirs.exp() * (theirs - mine)).sum() / 7
    ours = chunked_cross_entropy(
        hidden, labels, head, vocab_size=VOCAB, num_items=7, base_TD=base.hidden_TD
    ).loss
    assert ours.item() == pytest.approx(plain.item(), rel=1e-5)
    want, found = (
        torch.autograd.grad(loss, trained, allow_unused=True, materialize_grads=True)
        for loss in (plain, ours)
    )
    for a, b in zip(want, found, strict=True):
        assert (a - b).norm() <= 1e-5 * a.norm() + 1e-12


def test_the_head_of_the_base_is_the_one_without_its_adapter() -> None:
    head, hidden = nn.Linear(WIDTH, VOCAB), torch.randn(1, 4, WIDTH)
    adapted = nn.Linear(WIDTH, VOCAB)
    adapted.base_layer = head  # as PEFT keeps it
    labels = torch.zeros(1, 4, dtype=torch.long)
    found = chunked_cross_entropy(hidden, labels, adapted, vocab_size=VOCAB, base_TD=hidden[0, :-1]).loss
    theirs, mine = (layer(hidden[0, :-1]).log_softmax(-1) for layer in (head, adapted))
    assert found.item() == pytest.approx((theirs.exp() * (theirs - mine)).sum().item() / 3, rel=1e-5)

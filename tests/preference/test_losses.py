"""The losses beside TRL's on the same logits, and what they say at points where the answer is known.

TRL 1.16 computes its losses inside its trainers; the methods are called here with what they read of a trainer.
"""

from __future__ import annotations

import math
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from glmtune.models.load import GlmModel, load_official
from glmtune.preference.figures import example_losses, row_rewards
from glmtune.preference.log_probs import AnswerLogProbs, answer_log_probs
from glmtune.preference.losses import dpo_losses, ipo_losses, kto_losses, orpo_losses
from glmtune.preference.settings import PreferenceSettings

B = 3
TOLERANCE = {"rtol": 1e-5, "atol": 1e-6}  # float32, other order of summation


@pytest.fixture(scope="module")
def model(tiny_base: Any) -> GlmModel:
    return load_official(tiny_base, device="cpu").eval()


@pytest.fixture(scope="module")
def batch() -> dict[str, Tensor]:
    """Three examples of two rows each: answers of 2 to 9 tokens behind prompts of 4, padded."""
    generator = torch.Generator().manual_seed(3)
    lengths = [6, 9, 13, 7, 11, 8]
    ids = torch.zeros((2 * B, max(lengths)), dtype=torch.long)
    labels = torch.full_like(ids, -100)
    for row, length in enumerate(lengths):
        ids[row, :length] = torch.randint(3, 400, (length,), generator=generator)
        labels[row, 4:length] = ids[row, 4:length]
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    return {"input_ids": ids, "labels": labels, "attention_mask": mask}


@pytest.fixture(scope="module")
def policy(model: GlmModel, batch: dict[str, Tensor]) -> AnswerLogProbs:
    with torch.no_grad():
        return answer_log_probs(model, batch)


REFERENCE = torch.tensor([-13.0, -30.5, -60.0, -18.0, -44.0, -25.0])
"""Log-probabilities of a reference that is no model's; near enough that no loss is saturated."""


def plain_log_probs(model: GlmModel, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return logits, and the log-probability of every next token where it is an answer's, by hand."""
    with torch.no_grad():
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    targets = batch["labels"][:, 1:]
    log_probs = logits[:, :-1].log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    return logits, log_probs * (targets != -100)


def test_log_probs_are_those_of_the_logits(
    model: GlmModel, batch: dict[str, Tensor], policy: AnswerLogProbs, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = plain_log_probs(model, batch)[1].sum(1)
    torch.testing.assert_close(policy.sums_R, expected, **TOLERANCE)
    assert policy.tokens_R.tolist() == [2, 5, 9, 3, 7, 4]
    # In several chunks, with gradients: the head's weights are trained, too.
    grads = []
    for rows in (4096, 4):
        monkeypatch.setattr("glmtune.models.architectures.chunked_loss.rows_per_chunk", lambda _, n=rows: n)
        model.zero_grad()
        found = answer_log_probs(model, batch).sums_R
        (found * torch.arange(2 * B)).sum().backward()
        torch.testing.assert_close(found.detach(), expected, **TOLERANCE)
        grads.append([weight.grad.clone() for weight in model.parameters() if weight.grad is not None])
    model.zero_grad()
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


# ---- beside TRL


def trainer(**values: Any) -> SimpleNamespace:
    """What TRL's methods read of a trainer of one process."""
    device = SimpleNamespace(
        device=torch.device("cpu"), gather_for_metrics=lambda value: value, gather=lambda value: value
    )
    return SimpleNamespace(
        model=SimpleNamespace(training=False),
        accelerator=device,
        aux_loss_enabled=False,
        precompute_ref_logps=True,
        ld_alpha=None,
        f_divergence_type="reverse_kl",
        loss_weights=[1.0],
        use_weighting=False,
        label_smoothing=0.0,
        _metrics=defaultdict(lambda: defaultdict(list)),
        _total_train_tokens=0,
        _tp_size=1,
        **values,
    )


def fused(model: GlmModel, batch: dict[str, Tensor]) -> Any:
    """Return a model that answers as TRL's fused head does, from plain logits."""
    logits, log_probs = plain_log_probs(model, batch)
    zeros = torch.zeros_like(log_probs)
    output = SimpleNamespace(
        log_probs=log_probs, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool(), logits=logits
    )
    return lambda **inputs: output


def ours(settings: PreferenceSettings, policy: AnswerLogProbs, **more: Any) -> tuple[Tensor, Tensor]:
    ratios, means = policy.sums_R - REFERENCE, policy.means_R()
    halves = [tuple(values.chunk(2)) for values in (ratios, means, policy.tokens_R)]
    more = {"desirable_B": torch.ones(B, dtype=torch.bool), **more}
    losses = example_losses(settings, *halves, **more)  # pyright: ignore[reportArgumentType]
    return losses.mean(), row_rewards(settings, ratios, means)


@pytest.mark.parametrize(("loss", "theirs"), [("dpo", "sigmoid"), ("ipo", "ipo")], ids=["dpo", "ipo"])
@pytest.mark.parametrize("beta", [0.05, 0.3])
def test_pairs_as_in_trl(
    loss: str, theirs: str, beta: float, model: GlmModel, batch: dict[str, Tensor], policy: AnswerLogProbs
) -> None:
    trl = pytest.importorskip("trl.trainer.dpo_trainer")
    stub = trainer(beta=beta, loss_types=[theirs])
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    inputs["completion_mask"] = (batch["labels"] != -100).long()
    inputs |= {"ref_chosen_logps": REFERENCE[:B], "ref_rejected_logps": REFERENCE[B:]}
    expected = trl.DPOTrainer._compute_loss(stub, fused(model, batch), inputs, False)
    found, rewards = ours(PreferenceSettings(loss=loss, beta=beta), policy)
    torch.testing.assert_close(found, expected, **TOLERANCE)
    logged = stub._metrics["eval"]
    better, worse = rewards.chunk(2)
    assert logged["rewards/chosen"] == [pytest.approx(float(better.mean()), rel=1e-5)]
    assert logged["rewards/margins"] == [pytest.approx(float((better - worse).mean()), rel=1e-5)]
    assert logged["rewards/accuracies"] == [pytest.approx(float((better > worse).float().mean()))]
    assert logged["logps/rejected"] == [pytest.approx(float(policy.sums_R[B:].mean()), rel=1e-5)]


@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_odds_ratio_as_in_trl(beta: float, policy: AnswerLogProbs) -> None:
    trl = pytest.importorskip("trl.experimental.orpo.orpo_trainer")
    better, worse = policy.means_R().chunk(2)
    losses, chosen_rewards, *_ = trl.ORPOTrainer.odds_ratio_loss(trainer(beta=beta), better, worse)
    torch.testing.assert_close(orpo_losses(better, worse, beta=beta), -losses, **TOLERANCE)
    rewards = ours(PreferenceSettings(loss="orpo", beta=beta), policy)[1]
    torch.testing.assert_close(rewards[:B], chosen_rewards, **TOLERANCE)


@pytest.mark.parametrize("drift", [2.0, -3.0], ids=["away", "below-zero"])
@pytest.mark.parametrize("beta", [0.1, 0.5])
def test_judged_answers_as_in_trl(
    beta: float, drift: float, model: GlmModel, batch: dict[str, Tensor], policy: AnswerLogProbs
) -> None:
    trl = pytest.importorskip("trl.trainer.kto_trainer")
    desirable = torch.tensor([True, False, True])
    mismatched = torch.tensor([-40.0, -52.0, -39.0])
    stub = trainer(
        beta=beta,
        loss_type="kto",
        calculate_KL=True,
        desirable_weight=1.0,
        undesirable_weight=1.5,
        _compute_kl_logps=lambda *_: mismatched + drift,
    )
    first = {name: values[:B] for name, values in batch.items()}
    inputs = {name: first[name] for name in ("input_ids", "attention_mask")}
    inputs |= {"completion_mask": (first["labels"] != -100).long(), "label": desirable}
    inputs |= {"ref_logps": REFERENCE[:B], "ref_KL_logps": mismatched}
    expected = trl.KTOTrainer._compute_loss(stub, fused(model, first), inputs, False)
    settings = PreferenceSettings(loss="kto", beta=beta, undesirable_weight=1.5)
    kl = torch.tensor(max(drift, 0.0))
    found = ours(settings, policy, desirable_B=desirable, kl=kl)[0]
    torch.testing.assert_close(found, expected, **TOLERANCE)
    assert stub._metrics["eval"]["kl"] == [pytest.approx(float(kl), abs=1e-5)]


# ---- at points that are known


def test_without_a_difference_nothing_is_preferred() -> None:
    zeros, tokens = torch.zeros(2), torch.full((2,), 5)
    assert dpo_losses(zeros, zeros, beta=0.1).tolist() == pytest.approx([math.log(2)] * 2)
    assert ipo_losses(zeros, zeros, tokens, tokens, beta=0.5).tolist() == pytest.approx([1.0] * 2)
    assert orpo_losses(zeros - 1, zeros - 1, beta=0.3).tolist() == pytest.approx([0.3 * math.log(2)] * 2)
    judged = kto_losses(zeros, torch.tensor([True, False]), torch.tensor(0.0), beta=0.1, undesirable_weight=2)
    assert judged.tolist() == pytest.approx([0.5, 1.0])


def test_smoothing_mixes_the_pair_with_the_one_turned_around() -> None:
    better, worse = torch.tensor([1.0, -2.0]), torch.tensor([0.5, 3.0])
    plain, turned = dpo_losses(better, worse, beta=0.7), dpo_losses(worse, better, beta=0.7)
    smoothed = dpo_losses(better, worse, beta=0.7, label_smoothing=0.2)
    torch.testing.assert_close(smoothed, 0.8 * plain + 0.2 * turned)


def test_every_loss_moves_both_answers_apart() -> None:
    better = torch.tensor([-1.0], requires_grad=True)
    worse = torch.tensor([-1.0], requires_grad=True)
    tokens = torch.ones(1, dtype=torch.long)
    for losses in (
        dpo_losses(better, worse, beta=0.1),
        ipo_losses(better, worse, tokens, tokens, beta=0.1),
        orpo_losses(better, worse, beta=0.1),
        kto_losses(torch.cat([better, worse]), torch.tensor([True, False]), torch.tensor(0.0), beta=0.1),
    ):
        up, down = torch.autograd.grad(losses.sum(), [better, worse])
        assert up.item() < 0 < down.item()


def test_odds_keep_their_digits_at_both_ends() -> None:
    values = torch.tensor([-1e-6, -80.0, 0.0, -0.5])
    found = orpo_losses(values, torch.full_like(values, -0.5), beta=1.0)
    assert found.isfinite().all()
    exact = orpo_losses(values[:2].double(), torch.full((2,), -0.5, dtype=torch.double), beta=1.0)
    torch.testing.assert_close(found[:2].double(), exact, rtol=1e-2, atol=1e-5)

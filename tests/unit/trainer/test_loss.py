"""The loss: only learned tokens count, whatever the layout, and its gradient is that of a plain cross entropy."""

import numpy as np
import torch

from finetune_trainer.data.batches import IGNORE, Row, flat, padded
from finetune_trainer.objectives.loss import _CrossEntropy, token_loss

from .test_attention import small


def row(labels_from: int, length: int = 10, seed: int = 0) -> Row:
    ids = np.random.default_rng(seed).integers(3, 300, length).astype(np.int32)
    labels = ids.copy()
    labels[:labels_from] = IGNORE
    return Row(ids, labels, np.array([length], np.int32))


def packed_row(*rows: Row) -> Row:
    return Row(*(np.concatenate([getattr(row, name) for row in rows]) for name in ("input_ids", "labels", "lengths")))


def loss_of(model: torch.nn.Module, batch: object) -> float:
    from finetune_trainer.training.attention import packed

    with packed(batch):  # type: ignore[arg-type]
        return float(token_loss(model, batch).loss)  # type: ignore[arg-type]


def test_the_gradient_is_that_of_a_plain_cross_entropy() -> None:
    torch.manual_seed(0)
    logits = torch.randn(2500, 50, dtype=torch.float32, requires_grad=True)
    targets = torch.randint(0, 50, (2500,))
    plain = torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
    plain.backward()
    own = logits.detach().clone().requires_grad_()
    loss, right = _CrossEntropy.apply(own * 1, targets)
    (loss * 0.5).backward()
    assert torch.allclose(loss, plain)
    assert torch.allclose(own.grad * 2, logits.grad, atol=1e-6)
    assert right == (logits.argmax(-1) == targets).sum()


def test_the_loss_is_the_models_own_loss_on_the_same_labels() -> None:
    model, one = small("Llama"), row(4)
    ids, labels = (
        torch.from_numpy(one.input_ids.astype(np.int64))[None],
        torch.from_numpy(one.labels.astype(np.int64))[None],
    )
    theirs = float(model(input_ids=ids, labels=labels).loss) * 6
    assert abs(loss_of(model, padded([one])) - theirs) < 1e-3


def test_both_layouts_and_any_packing_give_the_same_sum() -> None:
    from finetune_trainer.training import attention

    model, rows = small("Llama"), [row(4, 10, 1), row(0, 7, 2), row(5, 20, 3)]
    expected = loss_of(model, padded(rows))
    attention.register()
    model.set_attn_implementation(attention.NAME)
    assert abs(loss_of(model, flat(rows)) - expected) < 1e-3
    assert abs(loss_of(model, flat([packed_row(*rows)])) - expected) < 1e-3


def test_tokens_that_are_not_learned_do_not_move_the_loss() -> None:
    model, one = small("Llama"), row(9)
    batch = padded([one])
    assert token_loss(model, batch).tokens == 1
    everything = padded([one._replace(labels=one.input_ids)])
    assert token_loss(model, everything).tokens == 9


def test_the_first_token_of_a_packed_sample_is_not_predicted_from_its_neighbour() -> None:
    one = packed_row(row(0, 5, 1), row(0, 6, 2))
    batch = flat([one])
    assert batch.target_tokens == 4 + 5
    assert batch.targets[0, 4] == IGNORE
    assert batch.position_ids[0].tolist() == [*range(5), *range(6)]


def test_a_batch_without_anything_to_learn_has_no_loss() -> None:
    model = small("Llama")
    assert loss_of(model, padded([row(10)])) == 0.0

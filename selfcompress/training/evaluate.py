"""Loss and accuracy of a network on the images of a split."""

import torch
import torch.nn.functional as F
from torch import nn

from selfcompress.precision import full_precision
from selfcompress.training.augment import normalise
from selfcompress.training.data import Dataset, Split


def evaluate(
    model: nn.Module, dataset: Dataset, split: Split, batch_size: int
) -> tuple[float, float]:
    """Return mean cross-entropy and accuracy (0-1) of `model` on `split`, computed in float32.

    Leaves `model` in eval mode.
    """
    with full_precision(split.labels.device):
        return loss_and_accuracy(model, dataset, split, batch_size)


@torch.no_grad()
def loss_and_accuracy(
    model: nn.Module, dataset: Dataset, split: Split, batch_size: int
) -> tuple[float, float]:
    """Return mean cross-entropy and accuracy (0-1) of `model` on `split`.

    Computes in the precision that the caller has set, and leaves `model` in eval mode.
    """
    model.eval()
    sums = torch.zeros(2, device=split.labels.device)
    for images, labels in split.batches(batch_size):
        logits = model(normalise(images, dataset.mean, dataset.std)).float()
        loss = F.cross_entropy(logits, labels, reduction="sum")
        sums += torch.stack([loss, (logits.argmax(1) == labels).sum().to(loss)])
    loss, correct = sums.tolist()
    return loss / len(split), correct / len(split)

"""The gradient of a global batch that is larger than memory: the backbone takes it in pieces, and each twice.

    features   of one piece after the other, without gradient
    losses     heads and both losses on the features of all ranks, as ever; what they say of this rank's
    backbone   each piece again, now with gradient, which that is sent back through

Memory is that of one piece and of (b, F) features; time is one more forward pass of the backbone. The result
is that of one pass, and on several ranks the same law holds: what is random in the backbone is drawn alike
both times, and gradients are averaged over ranks at the end as DistributedDataParallel does. (Gao et al.,
"Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup", 2021.)

Not covered: BatchNorm that learns statistics, which would be those of a piece: `step` refuses it.
Legend: b images on this rank, F features.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from namr import collectives
from namr.model.losses import LossTerms


def gradients(
    images: Tensor,
    features_of: Callable[[Tensor], Tensor],
    losses_of: Callable[[Tensor], LossTerms],
    *,
    images_per_pass: int,
    seed: int,
    parameters: Iterable[nn.Parameter],
    begin: Callable[[str], None],
) -> LossTerms:
    """Leave behind the gradient of all `parameters`, which have none yet, and return the losses.

    features_of: a piece of images (n, 3, H, W) -> (n, F). losses_of: this rank's features (b, F) -> the
    losses of the global batch. seed: of what is random in the backbone. begin: is told what begins.
    Collective.
    """
    pieces = torch.split(images, images_per_pass)

    def of_piece(number: int) -> Tensor:
        torch.manual_seed(seed + number)
        return features_of(pieces[number])

    with torch.no_grad():
        features = torch.cat([of_piece(number) for number in range(len(pieces))])
    features.requires_grad_()
    terms = losses_of(features)
    begin("backward")
    terms.total.backward()  # type: ignore[no-untyped-call]
    assert features.grad is not None, "the loss depends on every image"
    for number, gradient in enumerate(torch.split(features.grad, images_per_pass)):
        of_piece(number).backward(gradient)  # type: ignore[no-untyped-call]
    begin("sync")
    _average([parameter.grad for parameter in parameters if parameter.grad is not None])
    return terms


def _average(of_all: list[Tensor]) -> None:
    """The mean over ranks in place of each; all ranks have the same ones."""
    if collectives.world_size() == 1:
        return
    mean = collectives.sum_over_ranks(torch.cat([each.flatten() for each in of_all]))
    mean /= collectives.world_size()
    for each, whole in zip(of_all, torch.split(mean, [each.numel() for each in of_all]), strict=True):
        each.copy_(whole.view_as(each))

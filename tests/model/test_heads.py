"""Twin heads on arrays: by hand, in their range, with the right gradient."""

import numpy as np
import torch

from namr.model.heads import TwinHeads


def test_heads_by_hand() -> None:
    """x = W f + b and s = 1 + r (2 sigmoid(g) - 1), g with BatchNorms that change nothing."""
    heads = TwinHeads(2, 2, hidden_dim=2, structure_range=0.5).double().eval()
    assert heads.structure is not None
    with torch.no_grad():
        for linear in (heads.sample, heads.structure[0], heads.structure[2]):
            linear.weight.copy_(torch.tensor([[2.0, 0.0], [0.0, 1.0]]))
            linear.bias.copy_(torch.tensor([0.0, 1.0]))
        found = heads(torch.tensor([[1.0, -1.0]], dtype=torch.float64))
    np.testing.assert_allclose(found.embedding.numpy(), [[2.0, 0.0]])
    g = np.array([4.0, 1.0])
    np.testing.assert_allclose(found.structure.numpy()[0], 1 + 0.5 * (2 / (1 + np.exp(-g)) - 1), rtol=1e-4)


def test_structure_lies_in_its_range_and_differs_between_images() -> None:
    heads = TwinHeads(16, 8, hidden_dim=16, structure_range=0.3)
    structure = heads(100 * torch.randn(64, 16)).structure
    assert 0.7 <= structure.min() < 0.8 and 1.2 < structure.max() <= 1.3
    assert (structure.std(dim=0) > 0.01).all()


def test_heads_compute_in_float64_when_they_are_float64() -> None:
    heads = TwinHeads(4, 3, hidden_dim=5, structure_range=0.5).double()
    features = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda f: tuple(heads(f)), (features,))

"""The memory of embeddings: what it holds, in what place, and that its state is all of it."""

import torch

from namr.model.memory import Memory


def rows(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32)[:, None].repeat(1, 2)


def test_the_last_so_many_are_held() -> None:
    memory = Memory(4, 2)
    assert len(memory.held().labels) == 0
    memory.keep(rows(1, 2, 3), torch.tensor([1, 2, 3]))
    assert memory.held().labels.tolist() == [1, 2, 3]
    memory.keep(rows(4, 5), torch.tensor([4, 5]))
    held = memory.held()
    assert sorted(held.labels.tolist()) == [2, 3, 4, 5]
    assert torch.equal(held.embeddings, held.labels[:, None].float().repeat(1, 2))


def test_a_batch_larger_than_the_memory_leaves_its_end() -> None:
    memory = Memory(2, 2)
    memory.keep(rows(1, 2, 3), torch.tensor([1, 2, 3]))
    assert sorted(memory.held().labels.tolist()) == [2, 3]


def test_what_is_held_carries_no_gradient_and_does_not_change_later() -> None:
    memory = Memory(2, 2)
    memory.keep(rows(1, 2).requires_grad_(), torch.tensor([1, 2]))
    held = memory.held()
    memory.keep(rows(3, 4), torch.tensor([3, 4]))
    assert held.labels.tolist() == [1, 2] and not held.embeddings.requires_grad


def test_its_state_is_all_of_it() -> None:
    memory, again = Memory(4, 2), Memory(4, 2)
    memory.keep(rows(1, 2, 3), torch.tensor([1, 2, 3]))
    again.load_state_dict(memory.state_dict())
    for each in (memory, again):
        each.keep(rows(7, 8), torch.tensor([7, 8]))
    assert torch.equal(memory.held().embeddings, again.held().embeddings)

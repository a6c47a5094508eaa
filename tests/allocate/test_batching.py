"""What has one shape is computed in one call, and every part comes back to its place."""

from __future__ import annotations

import torch

from pedyra.allocate.batching import PIECE, alike, in_pieces, per_matrix


def test_alike_are_grouped_in_the_order_of_their_first():
    assert alike("abacb") == [[0, 2], [1, 4], [3]]
    assert alike([]) == []


def test_a_function_of_every_matrix_is_that_of_each_alone_and_contiguous():
    torch.manual_seed(0)
    matrices = [torch.randn(*shape) for shape in ((5, 3), (4, 2), (5, 3), (3, 5))]
    calls = []

    def svd(batch: torch.Tensor) -> tuple[torch.Tensor, ...]:
        calls.append(len(batch))
        return tuple(torch.linalg.svd(batch, full_matrices=False))

    left, values, right = per_matrix(svd, matrices)
    assert calls == [2, 1, 1]
    for matrix, U, S, Vh in zip(matrices, left, values, right, strict=True):
        torch.testing.assert_close(U * S @ Vh, matrix)
        torch.testing.assert_close(S, torch.linalg.svdvals(matrix))
        assert U.is_contiguous() and Vh.is_contiguous()


def test_pieces_hold_everything_once_in_order_and_stay_small_on_a_cpu():
    cpu, size = torch.device("cpu"), PIECE // 3
    assert in_pieces(range(7), size, cpu) == [range(0, 3), range(3, 6), range(6, 7)]
    assert in_pieces([4, 2], 2 * PIECE, cpu) == [[4], [2]]  # one that is too large is a piece of its own
    assert in_pieces(range(7), size, torch.device("meta")) == [range(7)]
    assert in_pieces([], size, cpu) == []

"""Patches for given tokens: least squares under 0 <= level <= 255, batched."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

# singular values below this share of the largest count as zero (their squares are compared)
_RANK_CUT = 1e-12


@dataclass(frozen=True, eq=False)
class BoxSolver:
    """Solves A u = y for patches u in a box; one eigendecomposition of A A^T serves all.

    With A A^T = Q diag(g) Q^T and the zero eigenvalues left out, ``basis`` = Q^T A has orthogonal
    rows, and Q^T y are the coordinates in which everything below works.
    """

    A: Tensor  # (D, n) float64

    @cached_property
    def _decomposition(self) -> tuple[Tensor, Tensor, Tensor]:
        g, Q = torch.linalg.eigh(self.A @ self.A.T)
        kept = g > _RANK_CUT * g[-1].clamp_min(torch.finfo(g.dtype).tiny)
        g, Q = g[kept], Q[:, kept]
        return g, Q, Q.T @ self.A

    @property
    def rank(self) -> int:
        return self._decomposition[0].numel()

    @property
    def condition(self) -> float:
        """Largest over smallest non-zero singular value of A."""
        g = self._decomposition[0]
        return (g[-1] / g[0]).sqrt().item()

    @cached_property
    def pseudo_inverse(self) -> Tensor:
        """A^+, (n, D) float64."""
        g, Q, basis = self._decomposition
        return (basis / g[:, None]).T @ Q.T

    def unreachable(self, y: Tensor) -> Tensor:
        """The part of token differences y (..., D) that no image produces, of any amplitude."""
        Q = self._decomposition[1].to(y)
        return y - (y @ Q) @ Q.T

    def min_norm(self, y: Tensor, start: Tensor) -> Tensor:
        """The patches nearest to ``start`` (..., n) with A u = y (..., D), gamut or not."""
        g, Q, basis = (x.to(y) for x in self._decomposition)
        return start + ((y @ Q - start @ basis.T) / g) @ basis

    def in_box(
        self,
        y: Tensor,
        low: Tensor | float,
        high: Tensor | float,
        start: Tensor,
        *,
        iterations: int = 200,
        tolerance: float = 1e-7,
    ) -> Tensor:
        """Patches in the box whose tokens are as near as possible to the wanted ones.

        ADMM on  1/2 |A u - y|^2 + indicator(low <= u <= high), beginning at the min-norm patches:
        two GEMMs an iteration, no line search; where y is out of reach it ends at least
        squares. Patches whose min-norm solution is already in the box are returned as they are.

        Args:
            y: wanted token differences, (R, D), float32 or float64; the work is done in its dtype.
            low, high: bounds in levels, numbers or (n,).
            start: levels to stay near, (R, n) or (n,).
            iterations: at most that many.
            tolerance: stop a patch when |A u - y| <= tolerance * |y - A start|.

        Returns:
            Levels (R, n), inside the box exactly.
        """
        g, Q, basis = (x.to(y) for x in self._decomposition)
        low, high = (torch.as_tensor(bound).to(y) for bound in (low, high))
        coordinates = y @ Q  # (R, rank)
        start = start.to(y).expand(len(y), -1)
        # what least squares could reach at all is the scale of the stopping rule
        scale = (coordinates - start @ basis.T).norm(dim=1).clamp_min(1e-30)
        solved = start + ((coordinates - start @ basis.T) / g) @ basis
        slack = 1e-3  # of a level: nothing against rounding, and float32 needs it
        todo = ((solved < low - slack) | (solved > high + slack)).any(dim=1).nonzero()[:, 0]
        solved = solved.maximum(low).minimum(high)

        rho = 1e-2 * g[-1]
        z, w = start[todo].maximum(low).minimum(high), start.new_zeros(len(todo), start.shape[1])
        wanted, scale = coordinates[todo], scale[todo]
        for i in range(iterations):
            v = z - w
            x = v + ((wanted - v @ basis.T) / (g + rho)) @ basis
            z = (x + w).maximum(low).minimum(high)
            w = w + x - z
            if i % 20 == 19 or i == iterations - 1:
                solved[todo] = z
                open_ = (z @ basis.T - wanted).norm(dim=1) > tolerance * scale
                if not open_.any():
                    break
                todo, z, w, wanted, scale = (t[open_] for t in (todo, z, w, wanted, scale))
        return solved

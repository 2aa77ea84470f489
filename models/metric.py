"""The metric that both mixtures share (README: Metric)."""

import torch
from torch import Tensor, nn


class PCAMetric(nn.Module):
    """d(x, y) = ||z_x - z_y||_2 with z = (x V^T) / sqrt(s).

    comp_vecs: V [D, D], orthonormal rows.  singular_values: s [D], positive.
    s are the singular values of the centred data (the published code, the default), s^2/(n-1) for a Mahalanobis
    metric; for the Euclidean metric V = 1 and s = 1.
    """

    def __init__(self, comp_vecs: Tensor, singular_values: Tensor):
        super().__init__()
        D = comp_vecs.shape[0]
        if comp_vecs.shape != (D, D) or singular_values.shape != (D,):
            raise ValueError(f"comp_vecs must be [D, D] and singular_values [D], "
                             f"got {list(comp_vecs.shape)} and {list(singular_values.shape)}")
        self.register_buffer("comp_vecs", comp_vecs)
        self.register_buffer("singular_values", singular_values)

    @classmethod
    def fit(cls, X: Tensor, min_sv_factor: float = 1e6, whiten: bool = False) -> "PCAMetric":
        """The metric of the images X [n, ...] in [0, 1]; s is floored at its maximum / min_sv_factor.

        whiten=True gives the Mahalanobis metric.  The spectrum is that of the D x D scatter matrix in
        float64, so that n may be smaller than D and X is never copied in float64.
        """
        X = X.flatten(1)
        n, D = X.shape
        if n < 2:
            raise ValueError(f"a metric needs at least 2 images, got {n}")
        blocks = X.split(8192)
        mean = sum(block.double().sum(0) for block in blocks) / n
        scatter = torch.zeros(D, D, dtype=torch.float64, device=X.device)
        for block in blocks:
            centred = block.double() - mean
            scatter += centred.T @ centred
        eigenvalues, eigenvectors = torch.linalg.eigh(scatter)          # ascending
        s = eigenvalues.flip(0).clamp_min(0).sqrt()
        if s[0] == 0:
            raise ValueError("all images are equal: they define no metric")
        s = s.clamp_min(s[0] / min_sv_factor)
        if whiten:
            s = s ** 2 / (n - 1)
        return cls(eigenvectors.T.flip(0).contiguous().float(), s.float())

    @classmethod
    def euclidean(cls, D: int) -> "PCAMetric":
        """The plain Euclidean metric (`--PCA 0`)."""
        return cls(torch.eye(D), torch.ones(D))

    def equals(self, other: "PCAMetric") -> bool:
        mine, others = (self.comp_vecs, self.singular_values), (other.comp_vecs, other.singular_values)
        return all(a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)
                   for a, b in zip(mine, others, strict=True))

    @property
    def dim(self) -> int:
        return self.comp_vecs.shape[0]

    @property
    def log_det(self) -> Tensor:
        """log|det| = sum log s, the log-volume (squared) of the map z -> x."""
        return self.singular_values.log().sum()

    def transform(self, x: Tensor) -> Tensor:
        """Images or vectors x [B, ...] -> coordinates z [B, D]."""
        with torch.autocast(x.device.type, enabled=False):      # a density in bf16 would mean nothing
            return x.flatten(1) @ self.comp_vecs.T / self.singular_values.sqrt()

    def inverse(self, z: Tensor) -> Tensor:
        """Coordinates z [B, D] -> vectors x [B, D]."""
        return z * self.singular_values.sqrt() @ self.comp_vecs

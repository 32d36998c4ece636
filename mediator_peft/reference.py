"""The method in plain torch, written to be read first. No files, no tiles, no kernels, no state.

Symbols: ``base`` θ0 and experts θk are weight matrices (O, I); τk = θk - θ0 is a task vector; D is the dense backbone;
S_k is the sparse delta of expert k; w(x) are the expert weights of prompt x. A layer of the merged model computes

    (D + Σ_k w_k(x) S_k) x

Every faster path of the library is tested against these functions. The structure is that of *Mediator*
(https://arxiv.org/abs/2502.04411); its abstract gives no formulas, so the formulas are our choices unless a source is
named.
"""

from __future__ import annotations

from itertools import combinations
from math import log

import torch
from torch import Tensor


def task_vectors(base: Tensor, experts: Tensor) -> Tensor:
    """τk = θk - θ0 in float32, base and experts rounded to one storage dtype before: (K, O, I)."""
    return experts.float() - base.to(experts.dtype).float()


def keep_largest(matrix: Tensor, density: float) -> Tensor:
    """Positions of the ``round(density * numel)`` largest magnitudes, never of a zero; of equals, the first: bool."""
    order = matrix.abs().flatten().argsort(descending=True, stable=True)
    kept = torch.zeros(matrix.numel(), dtype=torch.bool)
    kept[order[: round(density * matrix.numel())]] = True
    return kept.reshape(matrix.shape) & (matrix != 0)


def conflict_score(vectors: list[Tensor], density: float = 0.2) -> float:
    """Sign conflict of one block: mean over pairs of experts of opposite / both, in [0, 1]; 0.5 is chance.

    A pair that changed entries, but none together, counts as 0.5; one that changed nothing has no say.

    Args:
        vectors: task vectors (K, O, I) of each matrix of the block; counts are pooled over the matrices.
        density: share of the largest entries of a task vector that vote.
    """
    kept = [torch.stack([keep_largest(vector, density) for vector in each]) for each in vectors]
    shares = []
    for i, j in combinations(range(len(vectors[0])), 2):
        both = [mask[i] & mask[j] for mask in kept]
        opposite = sum(int((b & (v[i].sign() != v[j].sign())).sum()) for b, v in zip(both, vectors, strict=True))
        total = sum(int(mask.sum()) for mask in both)
        if any(bool((mask[i] | mask[j]).any()) for mask in kept):
            shares.append(opposite / total if total else 0.5)
    return sum(shares) / len(shares) if shares else 0.0


def backbone(base: Tensor, experts: Tensor) -> Tensor:
    """D = θ0 + mean_k τk, computed in float32 and rounded once to the storage dtype: (O, I)."""
    return (base.to(experts.dtype).float() + task_vectors(base, experts).mean(dim=0)).to(experts.dtype)


def sparse_delta(expert: Tensor, dense: Tensor, density: float = 0.2) -> Tensor:
    """S = mask ∘ sign(Δ) ∘ scale with Δ = θk - D: what the default encoding ``"sign"`` stores, as a matrix (O, I).

    Mask + sign + scale is the form of T-Switch (https://arxiv.org/abs/2412.00054). The scale of row r is
    c ‖Δ_r‖ / √n_r with n_r kept entries; c is one number per matrix that makes ⟨S, Δ⟩ = ‖Δ‖². Stored in bfloat16.
    """
    delta = expert.float() - dense.float()
    kept = keep_largest(delta, density)
    counts = kept.sum(dim=1)
    scales = (delta.double().norm(dim=1) / counts.clamp(min=1).sqrt()) * (counts > 0)
    signs = torch.where(kept, delta.sign(), 0.0)
    inner = (signs.double() * delta.double()).sum(dim=1) @ scales
    if inner > 0:
        scales = scales * (delta.double().square().sum() / inner)
    return signs * scales.bfloat16().float().unsqueeze(1)


def prompt_features(hidden: Tensor, mask: Tensor) -> Tensor:
    """Mean of the backbone's hidden state (B, T, H) after ``router_layer`` blocks over the prompt's tokens: (B, H)."""
    return (hidden.float() * mask.unsqueeze(2)).sum(dim=1) / mask.sum(dim=1, keepdim=True)


def router_scores(features: Tensor, means: Tensor, precision: Tensor) -> Tensor:
    """Scores of Gaussians with means μk and one shared covariance, equal priors (linear discriminant analysis).

    s_k(z) = μkᵀ Σ⁻¹ z - μkᵀ Σ⁻¹ μk / 2, up to what is equal for all k.

    Args:
        features: (B, H)
        means: (K, H)
        precision: Σ⁻¹ (H, H)
    """
    return features @ precision @ means.T - 0.5 * ((means @ precision) * means).sum(dim=1)


def ood_score(features: Tensor, means: Tensor, precision: Tensor, background_means: Tensor) -> Tensor:
    """Log-odds of the nearest background mean against the most likely expert, larger is less like a known task: (B,).

    Half the difference of squared Mahalanobis distances: a relative Mahalanobis distance (compare
    https://arxiv.org/abs/2106.09022) whose background is fitted on outlier-exposure prompts
    (https://arxiv.org/abs/1812.04606).
    """

    def squared(centres: Tensor) -> Tensor:
        shifts = features.unsqueeze(1) - centres
        return ((shifts @ precision) * shifts).sum(dim=2)

    nearest = router_scores(features, means, precision).argmax(dim=1, keepdim=True)
    return 0.5 * (squared(means).gather(1, nearest).squeeze(1) - squared(background_means).amin(dim=1))


def gate(scores: Tensor, coefficient: Tensor, routing_top_p: float = 0.5) -> tuple[Tensor, Tensor]:
    """Expert weights and uncertainty of each prompt.

    w(x) = c(x) p_sel(x) on the experts, 1 - c(x) on the fallback, the last column. p_sel is the softmax of the scores
    on the fewest experts whose probability reaches ``routing_top_p``, renormalised. The uncertainty is
    1 - c (1 - H(p) / log K).

    Args:
        scores: (B, K) router scores.
        coefficient: (B,) gate coefficient c(x) in [0, 1]: 1 for a known kind of prompt, 0 for an unknown one.
        routing_top_p: in (0, 1].
    """
    probabilities = scores.softmax(dim=1)
    selected = torch.zeros_like(probabilities)
    for row, chances in enumerate(probabilities):
        mass = 0.0
        for expert in chances.argsort(descending=True, stable=True).tolist():
            if mass >= routing_top_p:
                break
            selected[row, expert] = chances[expert]
            mass += float(chances[expert])
    selected = selected / selected.sum(dim=1, keepdim=True)
    weights = torch.cat([coefficient.unsqueeze(1) * selected, 1 - coefficient.unsqueeze(1)], dim=1)
    num_experts = scores.shape[1]
    entropy = torch.special.entr(probabilities).sum(dim=1) / log(num_experts) if num_experts > 1 else 0.0
    return weights, 1 - coefficient * (1 - entropy)


def mixed_weight(dense: Tensor, deltas: Tensor, expert_weights: Tensor) -> Tensor:
    """W(x) = D + Σ_k w_k(x) S_k for one prompt, summed in float32: (O, I).

    Args:
        dense: (O, I)
        deltas: (C, O, I) with the fallback's delta θ0 - D, made sparse likewise, as the last.
        expert_weights: (C,)
    """
    return dense.float() + torch.einsum("c,coi->oi", expert_weights.float(), deltas.float())

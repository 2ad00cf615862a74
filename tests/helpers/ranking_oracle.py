"""Smooth-AP and the Recall@K surrogate in PyTorch loops, from their equations, for any classes."""


def _unit_similarities(x):
    import torch

    unit = torch.nn.functional.normalize(x)
    return unit @ unit.T


def _rank(similarity, i, others, temperature):
    """1 + sum_j sigmoid((s_j - s_i) / temperature) over the rows `others` but i."""
    others = [j for j in others if j != i]
    return 1 + ((similarity[others] - similarity[i]) / temperature).sigmoid().sum()


def smooth_ap(x, labels, temperature=0.01):
    """1 - mean AP. The query is one of its class, as in the authors' code."""
    import torch

    found, rows = [], range(len(x))
    for similarity, label in zip(_unit_similarities(x), labels, strict=True):
        own_class = [j for j in rows if labels[j] == label]
        terms = [
            _rank(similarity, i, own_class, temperature) / _rank(similarity, i, rows, temperature)
            for i in own_class
        ]
        found.append(torch.stack(terms).mean())
    return 1 - torch.stack(found).mean()


def recall_at_k(x, labels, ks=(1, 2, 4, 8, 16), widths=None, temperature=0.01, rank_query=True):
    """1 - mean over the queries with a positive, and over ks, of the smooth recall."""
    import torch

    found, n = [], len(x)
    for query, similarity in enumerate(_unit_similarities(x)):
        positives = [j for j in range(n) if labels[j] == labels[query] and j != query]
        if not positives:
            continue
        rows = [j for j in range(n) if rank_query or j != query]
        ranks = torch.stack([_rank(similarity, i, rows, temperature) for i in positives])
        for k, width in zip(ks, widths or ks, strict=True):
            k = min(k, n)
            hits = ((k - ranks) / width).sigmoid().sum()
            found.append(hits.clamp(max=k) / min(k, len(positives)))
    return 1 - torch.stack(found).mean()

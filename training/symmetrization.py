"""Word links of two directions made into one set: intersection, union, grow-diag-final-and (Koehn et al. 2005)."""

Links = set[tuple[int, int]]

METHODS = ("intersect", "union", "grow-diag-final-and", "none")
_NEIGHBOURS = ((-1, 0), (0, -1), (1, 0), (0, 1), (-1, -1), (-1, 1), (1, -1), (1, 1))


def symmetrize(forward: Links, backward: Links, method: str) -> Links:
    """Combine the links from source to target with those from target to source, both as (source, target).

    Args:
        forward: each source word's choice.
        backward: each target word's choice.
        method: `intersect`, `union`, `grow-diag-final-and`, or `none`, which is `forward` alone.

    Returns:
        The combined links.

    Raises:
        ValueError: another method.
    """
    if method == "none":
        return set(forward)
    if method == "intersect":
        return forward & backward
    if method == "union":
        return forward | backward
    if method == "grow-diag-final-and":
        return _grow_diag_final_and(forward, backward)
    raise ValueError(f"symmetrization must be one of {', '.join(METHODS)}, but was {method!r}")


def _grow_diag_final_and(forward: Links, backward: Links) -> Links:
    """From the intersection along neighbours within the union, then links between two words that are still free."""
    links, union = forward & backward, forward | backward
    sources, targets = {i for i, _ in links}, {j for _, j in links}

    def add(link: tuple[int, int]) -> None:
        links.add(link)
        sources.add(link[0])
        targets.add(link[1])

    grown = True
    while grown:
        grown = False
        for i, j in sorted(links):
            for di, dj in _NEIGHBOURS:
                near = i + di, j + dj
                if near in union and near not in links and (near[0] not in sources or near[1] not in targets):
                    add(near)
                    grown = True
    for direction in (forward, backward):
        for link in sorted(direction):
            if link[0] not in sources and link[1] not in targets:
                add(link)
    return links

"""Minimax paths on a height map: the highest cell on the path is as low as possible."""

import math
from collections.abc import Sequence

import networkx as nx

Cell = tuple[int, int]


def low_path(heights: Sequence[Sequence[float]], start: Cell, end: Cell) -> list[Cell]:
    """Return the shortest path among those with the lowest maximum height.

    Args:
        heights: (rows, columns); infinity is allowed.
        start: Row and column of the first cell.
        end: Row and column of the last cell.

    Returns:
        Adjacent cells (also diagonally), with start and end.
    """
    cells = {(row, column): height for row, line in enumerate(heights) for column, height in enumerate(line)}
    graph = nx.Graph()
    graph.add_nodes_from(cells)
    for here in cells:
        for down, right in ((0, 1), (1, -1), (1, 0), (1, 1)):
            there = here[0] + down, here[1] + right
            if there in cells:
                graph.add_edge(here, there, top=max(cells[here], cells[there]), length=math.dist(here, there))
    # The path in a minimum spanning tree has the lowest maximum of all paths.
    level = max(cells[cell] for cell in nx.shortest_path(nx.minimum_spanning_tree(graph, weight="top"), start, end))
    low = graph.subgraph(cell for cell, height in cells.items() if height <= level)
    path: list[Cell] = nx.shortest_path(low, start, end, weight="length")
    return path

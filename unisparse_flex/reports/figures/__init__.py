"""Pictures of what is kept: block maps of layers and heads, density by layer. Needs matplotlib."""

from .block_map_figure import draw_block_maps
from .block_maps import LayerBlocks, collect_blocks
from .density_figure import DensitySeries, draw_densities

__all__ = [
    "DensitySeries",
    "LayerBlocks",
    "collect_blocks",
    "draw_block_maps",
    "draw_densities",
]

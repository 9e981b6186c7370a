"""The report room: reads a run folder, writes one HTML file and the lines of a terminal.

Does: everything from artifacts on disk, so a report can be made again for an old, unfinished or
failed run. Does not: compute a result, import another room, or import MLX.
"""

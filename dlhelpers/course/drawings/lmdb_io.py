"""What does a read touch: in a folder of files, and in a B-tree of pages?"""

from __future__ import annotations

from dlhelpers.drawing.panel import BLUE, GREY, ORANGE, Panel
from dlhelpers.drawing.style import FAILING

__all__ = ["files_and_pages", "random_access"]


def files_and_pages() -> Panel:
    """A folder of files beside one file of pages with a tree on top."""
    alt = """Left: a folder, where each image is a file of its own and each read opens, reads and
    closes one. Right: one LMDB file, opened once, whose pages form a B-tree: from the root over a
    leaf that holds the sorted keys to the pages with the image's bytes."""
    p = Panel(640, 240, alt, "A file for each image, or one file with a tree of pages")
    p.text(20, 56, "folder: open, read, close each", bold=True)
    for k in range(6):
        x, y = 20 + 88 * (k % 3), 72 + 72 * (k // 3)
        p.box(x, y, 76, 54, f"{k:04d}.jpg", fill=ORANGE)
    p.text(330, 56, "LMDB: opened once", bold=True)
    p.box(430, 68, 90, 28, "root", fill=GREY)
    for k in range(3):
        x = 330 + 105 * k
        p.arrow(475, 98, x + 45, 122)
        p.box(x, 124, 90, 28, f"keys {2 * k}, {2 * k + 1}", fill=GREY)
        for half in (0, 1):
            p.arrow(x + 22 + 46 * half, 154, x + 22 + 46 * half, 178)
            p.box(x + 2 + 46 * half, 180, 40, 26, f"img {2 * k + half}", size=11)
    p.text(330, 230, "boxes are pages; a large image takes more", size=12)
    return p


def random_access() -> Panel:
    """The path of one random read through the page cache."""
    alt = """One random read from the memory map. The pages of the root and of the leaf are hot and
    lie in the page cache, in memory. The image's own pages are there only if they were read lately;
    otherwise the processor stops at a page fault until the disk has brought them."""
    p = Panel(640, 220, alt, "A random read: the tree is in memory, the image may not be")
    p.box(20, 70, 92, 44, "get key", fill=GREY)
    p.text(150, 56, "page cache (memory)", bold=True)
    p.box(140, 64, 480, 56, fill="#ffffff", dashed=True)
    for x, name, fill in ((156, "root", BLUE), (282, "leaf", BLUE), (436, "image's pages", ORANGE)):
        p.box(x, 74, 130 if fill == ORANGE else 92, 36, name, fill=fill)
    p.arrow(114, 92, 154, 92)
    p.arrow(250, 92, 280, 92)
    p.arrow(376, 92, 434, 92)
    p.box(140, 160, 480, 40, "disk: the whole file", fill=GREY)
    p.arrow(500, 158, 500, 114, colour=FAILING, wide=2.5)
    p.text(488, 145, "absent: page fault, wait", anchor="end")
    return p

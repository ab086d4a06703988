"""Images to classify that need no download: letters and digits of matplotlib's own fonts, bent a little at random.

One in ten pairs of character and font is held back. Every character and every font is in both parts.
"""

from __future__ import annotations

import math
import string
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from staleness.draws import seeded

CHARACTERS = string.ascii_lowercase + string.ascii_uppercase + string.digits
SIZE = 28  # pixels
HELD_BACK_SHARE = 10  # one tenth
FONTS = (
    *(f"DejaVuSans{style}" for style in ("", "-Bold", "-Oblique", "-BoldOblique")),
    *(f"DejaVuSansMono{style}" for style in ("", "-Bold", "-Oblique", "-BoldOblique")),
    *(f"DejaVuSerif{style}" for style in ("", "-Bold", "-Italic", "-BoldItalic")),
    *(f"STIXGeneral{style}" for style in ("", "Bol", "Italic", "BolIta")),
    *("cmr10", "cmb10", "cmss10", "cmtt10"),
)

# How far an image is bent.
SHIFT_PIXELS, SCALE, ANGLE_DEGREES, FAINTEST, NOISE = 2.5, 0.2, 15.0, 0.4, 0.25


@dataclass(frozen=True, kw_only=True)
class Glyphs:
    """One part of the glyphs.

    Attributes:
        images: float32 ``[glyphs, SIZE, SIZE]``, 0 is paper and 1 ink.
        labels: int64 ``[glyphs]``, positions in CHARACTERS.
    """

    images: Tensor
    labels: Tensor

    def draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Images ``[count, SIZE, SIZE]`` in about -1 to 1, each glyph drawn and bent at random, and labels."""
        which = torch.randint(len(self.labels), (count,), generator=generator)
        return bend(self.images[which], generator), self.labels[which]


def bend(images: Tensor, generator: torch.Generator) -> Tensor:
    """Images ``[count, SIZE, SIZE]`` shifted, scaled and turned, then with contrast and noise of their own."""
    count = len(images)
    spread = 2 * torch.rand(5, count, generator=generator) - 1  # each uniform in -1 to 1
    angle, scale = spread[0] * math.radians(ANGLE_DEGREES), 1 + SCALE * spread[1]
    shift = spread[2:4] * SHIFT_PIXELS * 2 / SIZE  # affine_grid's image reaches from -1 to 1
    cos, sin = angle.cos() / scale, angle.sin() / scale
    rows = [torch.stack((cos, -sin, shift[0]), dim=1), torch.stack((sin, cos, shift[1]), dim=1)]
    grid = F.affine_grid(torch.stack(rows, dim=1), [count, 1, SIZE, SIZE], align_corners=False)
    bent = F.grid_sample(images[:, None], grid, align_corners=False)[:, 0]
    contrast = 1 - (1 - FAINTEST) * (spread[4] + 1) / 2
    noise = NOISE * torch.randn(bent.shape, generator=generator)
    return 2 * bent * contrast[:, None, None] - 1 + noise


@cache
def parts() -> tuple[Glyphs, Glyphs]:
    """Training and held-back glyphs, rendered once per process.

    Raises:
        ValueError: matplotlib is missing.
    """
    sheets = torch.stack([_render(font) for font in FONTS])  # [fonts, characters, SIZE, SIZE]
    font, character = torch.meshgrid(torch.arange(len(FONTS)), torch.arange(len(CHARACTERS)), indexing="ij")
    held_back = (font + character) % HELD_BACK_SHARE == 0
    training, validation = (Glyphs(images=sheets[part], labels=character[part]) for part in (~held_back, held_back))
    return training, validation


def training_batch(update: int, batch_size: int, seed: int) -> tuple[Tensor, Tensor]:
    """Images and labels of one update; a pure function of its arguments."""
    return parts()[0].draw(batch_size, seeded("glyphs", seed, update))


def held_back_set(count: int) -> tuple[Tensor, Tensor]:
    """The fixed held-back images and their labels."""
    return parts()[1].draw(count, seeded("glyphs held back"))


def _render(font: str) -> Tensor:
    """All characters of one font on one baseline, centred from left to right: ``[characters, SIZE, SIZE]``."""
    try:
        import matplotlib
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.font_manager import FontProperties
    except ImportError as error:
        raise ValueError(f"the glyphs are drawn by matplotlib ({error}): pip install matplotlib") from error
    style = FontProperties(fname=str(Path(matplotlib.get_data_path(), "fonts", "ttf", f"{font}.ttf")), size=18)
    count = len(CHARACTERS)
    with matplotlib.rc_context({"text.usetex": False, "text.antialiased": True}):
        figure = Figure(figsize=(count * SIZE / 72, SIZE / 72), dpi=72, facecolor="white")  # a point is a pixel
        canvas = FigureCanvasAgg(figure)
        for at, character in enumerate(CHARACTERS):
            figure.text((at + 0.5) / count, 0.3, character, fontproperties=style, ha="center", va="baseline")
        canvas.draw()
    grey = torch.frombuffer(bytearray(canvas.buffer_rgba()), dtype=torch.uint8).view(SIZE, count * SIZE, 4)[..., 0]
    return (1 - grey.float() / 255).view(SIZE, count, SIZE).transpose(0, 1).contiguous()

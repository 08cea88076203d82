"""What covers a person: skin, hair and cloth as textures of tubes."""

import numpy as np

from model.datasets.people import Colour, Identity
from model.datasets.tubes import Floats, Texture


def flat(colour: Colour) -> Texture:
    """Return a texture of one colour."""
    paint = _ink(colour)
    return lambda position, _: np.broadcast_to(paint, (3, len(position)))


def _ink(colour: Colour) -> Floats:
    return np.array(colour, np.float32)[:, None]


def _mixed(base: Floats, colour: Colour, share: Floats) -> Floats:
    """Return (3, n) ``base`` with ``share``, (n,) in [0, 1], of it replaced by a colour."""
    return np.asarray(base + (_ink(colour) - base) * share.astype(np.float32), np.float32)


def dark(colour: Colour, factor: float) -> Colour:
    """Return a darker shade of a colour."""
    red, green, blue = colour
    return red * factor, green * factor, blue * factor


def face(who: Identity) -> Texture:
    """Return skin with eyes, brows and mouth, and the hair or hat that sits on it."""
    hat = who.hairstyle in {"cap", "beanie"}

    def texture(position: Floats, angle: Floats) -> Floats:
        side = np.abs(angle)
        colour = np.broadcast_to(_ink(who.skin), (3, len(position)))
        for place, around, height, width, depth in (
            (0.50, 0.40, 0.035, 0.17, 0.75),  # eyes
            (0.435, 0.42, 0.022, 0.24, 0.5),  # brows
            (0.795, 0.0, 0.022, 0.26, 0.5),  # mouth
            (0.665, 0.0, 0.03, 0.13, 0.3),  # below the nose
        ):
            spot = np.exp(-(((position - place) / height) ** 2) - ((side - around) / width) ** 2)
            colour = _mixed(colour, dark(who.skin, 0.22), (depth * spot).astype(np.float32))
        if who.hairstyle != "bald":
            # The hairline is high over the forehead, drops before the ear, and is low at the back.
            line = np.interp(side, (0, 0.55, 0.85, 1.25, 1.5, 1.9, 3.2),
                             (0.24, 0.27, 0.36, 0.58, 0.5, 0.82, 0.9))  # fmt: skip
            soft = ((line - position) / 0.03).clip(0, 1)
            colour = _mixed(colour, who.hair, soft.astype(np.float32))
        if hat:
            line = np.interp(side, (0, 1.2, 3.2), (0.33, 0.36, 0.5))
            colour = _mixed(colour, who.headwear, (position < line).astype(np.float32))
        return colour

    return texture


def strands(colour: Colour) -> Texture:
    """Return glossy hair."""

    def texture(position: Floats, angle: Floats) -> Floats:
        gloss = 0.05 * np.sin(angle * 9) + 0.05 * np.exp(-(((position - 0.2) / 0.1) ** 2))
        return np.asarray(_ink(colour) + gloss, np.float32)

    return texture


def pleats(colour: Colour) -> Texture:
    """Return the cloth of a skirt."""

    def texture(position: Floats, angle: Floats) -> Floats:
        fold = 1 + 0.14 * position * np.sin(angle * 11)
        return np.asarray(_ink(colour) * fold, np.float32)

    return texture


def baggage(colour: Colour) -> Texture:
    """Return a bag with a pocket."""

    def texture(position: Floats, _: Floats) -> Floats:
        seam = np.abs(position - 0.45) < 0.025
        pocket = (position > 0.45).astype(np.float32) * 0.12
        base = np.asarray(_ink(colour) * (1 + pocket) + 0.03, np.float32)
        return _mixed(base, dark(colour, 0.45), seam.astype(np.float32))

    return texture


def _patterned(who: Identity, position: Floats, angle: Floats) -> Floats:
    """Return the cloth of the upper garment; ``position`` counts in trunk lengths."""
    base = np.broadcast_to(_ink(who.top), (3, len(position)))
    if who.pattern == "stripes":
        return _mixed(base, who.accent, ((position * 6.5) % 1 < 0.42).astype(np.float32))
    if who.pattern == "blocks":
        return _mixed(base, who.accent, (position < 0.43).astype(np.float32))
    if who.pattern == "check":
        lines = 0.5 * ((position * 7) % 1 < 0.4) + 0.5 * ((angle * 2.2) % 1 < 0.4)
        return _mixed(base, who.accent, 0.85 * lines.astype(np.float32))
    return base


def garment(who: Identity) -> Texture:
    """Return the upper garment on the trunk, with its opening, collar, hem and straps."""
    trunks = 1.75 if who.garment == "coat" else 1.0

    def texture(position: Floats, angle: Floats) -> Floats:
        down = position * trunks
        colour = _patterned(who, down, angle)
        if who.garment != "shirt":
            gap = 0.05 + (0.34 * who.is_open) * (0.55 + 0.45 * down)
            opening = (np.abs(angle) < gap).astype(np.float32)
            inside = who.accent if who.is_open else dark(who.top, 0.55)
            colour = _mixed(colour, inside, opening)
        edge = ((position > 0.965) | (position < 0.045)).astype(np.float32)
        colour = _mixed(colour, dark(who.top, 0.62), 0.75 * edge)
        return _mixed(colour, dark(who.bag, 0.8), _strap(who, down, angle))

    return texture


def _strap(who: Identity, down: Floats, angle: Floats) -> Floats:
    """Return 1 where the straps of the bag lie on the trunk, else 0."""
    ahead = np.abs(angle) < np.pi / 2
    if who.carried == "backpack":
        worn = ahead & (np.abs(np.abs(angle) - 0.62) < 0.13) & (down < 0.62)
    elif who.carried == "shoulder":
        # From the other shoulder across chest and back down to the bag.
        across = np.where(ahead, angle, np.copysign(np.pi, angle) - angle) * who.bag_side
        worn = (np.abs(across - (2.1 * down - 0.75)) < 0.11) & (down < 1)
    else:
        worn = np.zeros_like(ahead)
    return worn.astype(np.float32)


def sleeve(who: Identity) -> Texture:
    """Return the upper garment on an arm."""

    def texture(position: Floats, angle: Floats) -> Floats:
        if who.pattern == "blocks":
            colour = who.accent if who.garment == "shirt" else who.top
            return np.broadcast_to(_ink(colour), (3, len(position)))
        # Shifted, so that no stripe lies over the whole round of the shoulder.
        return _patterned(who, position * 0.55 + 0.1, angle)

    return texture

"""Who is drawn: identities as attribute vectors, all from one seed."""

import colorsys
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

Colour = tuple[float, float, float]
"""Red, green and blue in [0, 1]."""

# Clothes as people wear them: dark and muted colours are common, loud ones are not.
CLOTHES: tuple[str, ...] = (
    "1c1d22", "1c1d22", "34363c", "5b5f66", "8f9398", "d9d7d0", "efeeea", "1f2a44",
    "2c4a7c", "4f7cac", "8fb4d2", "7c1f2b", "b5312f", "d9662b", "d8a531", "6b6a38",
    "2f5d43", "4e9a6b", "2c7c86", "5f4478", "b0577f", "e2a9b0", "6a4a34", "b59a78",
)  # fmt: skip
LEGWEAR: tuple[str, ...] = (
    "17181c", "17181c", "2a2c33", "4b4e55", "7d8085", "222d47", "2b3f66", "3f5f8c",
    "6f8fb0", "b8a582", "8a7858", "5a4a3a", "4d5238", "d8d5cc", "6b2a33", "2e4d45",
)  # fmt: skip
SHOES: tuple[str, ...] = ("151515", "2a2018", "5a3b22", "e6e6e4", "d8d8d8", "8a2323", "2a3d66")
SKIN: tuple[str, ...] = ("f0cdb4", "e6b996", "d3a078", "b98058", "8d5a3b", "6a4029", "4a2c1e")
HAIR: tuple[str, ...] = ("15110f", "15110f", "2b1d15", "4a3020", "7a5230", "b98d52", "8e8c8a")
BAGS: tuple[str, ...] = ("1a1a1d", "26324d", "7a2a2a", "5a4430", "3f5a45", "b0772f", "6d7076")

GARMENTS = ("shirt", "jacket", "jacket", "hoodie", "coat")
PATTERNS = ("plain", "plain", "plain", "stripes", "blocks", "check")
LEGS = ("trousers", "trousers", "trousers", "trousers", "shorts", "skirt")
HAIRSTYLES = ("short", "short", "long", "bun", "bald", "cap", "beanie")
CARRIED = ("none", "none", "backpack", "shoulder", "handbag")


@dataclass(frozen=True, slots=True)
class Identity:
    """Everything that makes one drawn person look like themselves.

    Args:
        height_m: Body height.
        girth: Widths of body and limbs, as a multiple of the usual ones.
        shoulders: Shoulder width, likewise.
        legs: Height of the hip as a share of the body height.
        skin: Colour of face, hands and bare limbs.
        hair: Colour of the hair.
        hairstyle: One of ``HAIRSTYLES``; a cap or a beanie has ``headwear`` as its colour.
        headwear: Colour of the cap or the beanie.
        garment: What the upper body wears, one of ``GARMENTS``.
        pattern: Its pattern, one of ``PATTERNS``.
        top: Its colour.
        accent: The second colour of its pattern, and of the shirt under an open jacket.
        is_open: Whether jacket, hoodie or coat is worn open.
        legwear: One of ``LEGS``.
        bottom: Colour of the legwear.
        shoes: Colour of the shoes.
        carried: What is carried, one of ``CARRIED``.
        bag: Colour of what is carried.
        bag_side: 1 for the left side of the body, -1 for the right.
        stride: Length of the steps, as a multiple of the usual one.
    """

    height_m: float
    girth: float
    shoulders: float
    legs: float
    skin: Colour
    hair: Colour
    hairstyle: str
    headwear: Colour
    garment: str
    pattern: str
    top: Colour
    accent: Colour
    is_open: bool
    legwear: str
    bottom: Colour
    shoes: Colour
    carried: str
    bag: Colour
    bag_side: int
    stride: float


# What one twin may change: each entry is one visible attribute with the fields that carry it.
_TWIN_CHANGES: tuple[tuple[str, ...], ...] = (
    ("top",),
    ("bottom",),
    ("pattern", "accent"),
    ("carried", "bag", "bag_side"),
    ("hairstyle", "headwear"),
    ("shoes",),
    ("legwear",),
    ("garment", "is_open"),
)


def draw_identity(rng: np.random.Generator) -> Identity:
    """Draw one person's attributes."""
    top = _colour(rng, CLOTHES)
    return Identity(
        height_m=float(np.clip(rng.normal(1.73, 0.07), 1.55, 1.92)),
        girth=float(np.clip(rng.normal(1.0, 0.09), 0.84, 1.28)),
        shoulders=float(np.clip(rng.normal(1.0, 0.05), 0.88, 1.12)),
        legs=float(rng.uniform(0.515, 0.55)),
        skin=_colour(rng, SKIN, spread=0.02),
        hair=_colour(rng, HAIR, spread=0.02),
        hairstyle=_pick(rng, HAIRSTYLES),
        headwear=_colour(rng, CLOTHES),
        garment=_pick(rng, GARMENTS),
        pattern=_pick(rng, PATTERNS),
        top=top,
        accent=_contrasting(rng, top),
        is_open=bool(rng.random() < 0.4),
        legwear=_pick(rng, LEGS),
        bottom=_colour(rng, LEGWEAR),
        shoes=_colour(rng, SHOES, spread=0.02),
        carried=_pick(rng, CARRIED),
        bag=_colour(rng, BAGS),
        bag_side=1 if rng.random() < 0.5 else -1,
        stride=float(np.clip(rng.normal(1.0, 0.08), 0.8, 1.2)),
    )


def draw_twin(identity: Identity, rng: np.random.Generator) -> Identity:
    """Draw a person who differs from ``identity`` in one or two visible attributes."""
    changes = rng.choice(len(_TWIN_CHANGES), size=int(rng.integers(1, 3)), replace=False)
    twin = identity
    for change in sorted(int(number) for number in changes):
        twin = _with_changed(twin, _TWIN_CHANGES[change], rng)
    return twin


def draw_identities(count: int, *, twin_share: float, seed: int) -> tuple[Identity, ...]:
    """Draw the people of a data set, in an order that says nothing about who is whose twin.

    Args:
        count: How many, at least one.
        twin_share: Share of them, in [0, 1), that are twins of another one.
        seed: Equal seeds give equal people.

    Raises:
        ValueError: A number is out of its range.
    """
    if count < 1:
        raise ValueError(f"expected at least 1 identity, got {count}")
    if not 0 <= twin_share < 1:
        raise ValueError(f"expected a twin share in [0, 1), got {twin_share}")
    rng = np.random.default_rng(seed)
    twins = min(round(count * twin_share), count - 1)
    people = [draw_identity(rng) for _ in range(count - twins)]
    for _ in range(twins):
        people.append(draw_twin(people[int(rng.integers(count - twins))], rng))
    return tuple(people[int(place)] for place in rng.permutation(count))


def _with_changed(
    identity: Identity, fields: tuple[str, ...], rng: np.random.Generator
) -> Identity:
    # The first field is the visible one: draw until it is another, and visibly so.
    while True:
        other = draw_identity(rng)
        if _differs(getattr(identity, fields[0]), getattr(other, fields[0])):
            return replace(identity, **{field: getattr(other, field) for field in fields})


def _differs(one: object, other: object) -> bool:
    if isinstance(one, tuple) and isinstance(other, tuple):
        return bool(sum(abs(a - b) for a, b in zip(one, other, strict=True)) > 0.5)
    return one != other


def _pick(rng: np.random.Generator, choices: Sequence[str]) -> str:
    return choices[int(rng.integers(len(choices)))]


def _colour(rng: np.random.Generator, palette: Sequence[str], spread: float = 0.035) -> Colour:
    red, green, blue = bytes.fromhex(_pick(rng, palette))
    hue, light, saturation = colorsys.rgb_to_hls(red / 255, green / 255, blue / 255)
    hue = (hue + rng.normal(0, spread / 4)) % 1
    light = min(max(light + rng.normal(0, spread), 0.06), 0.93)
    return colorsys.hls_to_rgb(hue, light, saturation)


def _contrasting(rng: np.random.Generator, colour: Colour) -> Colour:
    while True:
        other = _colour(rng, CLOTHES)
        if _differs(colour, other):
            return other

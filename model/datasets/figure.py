"""How one person is drawn: a walking skeleton of tubes in clothes."""

import math

from model.datasets.clothes import baggage, dark, face, flat, garment, pleats, sleeve, strands
from model.datasets.people import Identity
from model.datasets.tubes import Layer, Point, Profile, Tube, View, draw_tubes

# How thick a garment is, and how far above (or below) the hip it ends.
_CLOTH_M = {"shirt": 0.0, "hoodie": 0.006, "jacket": 0.012, "coat": 0.014}
_HEM_M = {"shirt": 0.03, "hoodie": 0.0, "jacket": -0.03, "coat": -0.4}


def draw_figure(
    identity: Identity,
    view: View,
    *,
    phase: float,
    height: int,
    width: int,
    head_turn: float = 0.0,
) -> Layer:
    """Draw one person at one moment of their walk.

    Args:
        identity: Who.
        view: From where.
        phase: Moment of the walking cycle, in radians; one cycle is two steps.
        height: Rows of the layer.
        width: Columns of the layer.
        head_turn: Where the head looks relative to the body, in radians.

    Returns:
        The person on nothing; parts outside of the layer are cut off.
    """
    tubes = _Body(identity, phase, head_turn).tubes()
    return draw_tubes(tubes, view, height=height, width=width)


class _Body:
    """One person at one moment: where each part is and what covers it."""

    def __init__(self, identity: Identity, phase: float, head_turn: float) -> None:
        self.who = identity
        self.phase = phase
        self.head_turn = head_turn
        self.size = identity.height_m
        self.legs = {side: _leg_joints(identity, phase, side) for side in (-1, 1)}
        # The lower foot stands on the ground, which lifts and lowers the hip as in a real walk.
        lowest = min(point[1] for joints in self.legs.values() for point in joints[2:])
        self.hip = -lowest
        self.shoulder = self.hip + (0.815 - identity.legs) * self.size
        self.cover = _CLOTH_M[identity.garment]

    def tubes(self) -> list[Tube]:
        parts = [*self._head(), self._torso(), *self._hips(), *self._bag()]
        for side in (-1, 1):
            parts += [*self._leg(side), *self._arm(side)]
        return parts

    def _head(self) -> list[Tube]:
        crown, chin = self.shoulder + 0.178 * self.size, self.shoulder + 0.045 * self.size
        half, deep = 0.0435 * self.size, 0.055 * self.size
        egg = [
            (place, half * wide, deep * wide)
            for place, wide in (
                (0.0, 0.05), (0.04, 0.42), (0.12, 0.74), (0.25, 0.95), (0.4, 1.0),
                (0.58, 0.95), (0.75, 0.82), (0.9, 0.6), (0.97, 0.4), (1.0, 0.22),
            )
        ]  # fmt: skip
        ahead = 0.012 * self.size
        skull = Tube(
            (0, crown, ahead), (0, chin, ahead * 1.6), egg, face(self.who), is_capped=False,
            turn=self.head_turn, halo=0.25,
        )  # fmt: skip
        neck = 0.034 * self.size
        throat = Tube(
            (0, chin + 0.03, 0.0), (0, self.shoulder - 0.01, -0.01),
            [(0, neck, neck), (1, neck * 1.15, neck)], flat(dark(self.who.skin, 0.85)),
        )  # fmt: skip
        return [skull, throat, *self._hair(crown)]

    def _hair(self, crown: float) -> list[Tube]:
        who, size = self.who, self.size
        if who.hairstyle == "long":
            profile = [(0, 0.030 * size, 0.034 * size), (0.35, 0.046 * size, 0.046 * size),
                       (1, 0.054 * size, 0.026 * size)]  # fmt: skip
            top, bottom = (0, crown - 0.035, -0.012), (0, self.shoulder - 0.05, -0.058)
            return [Tube(top, bottom, profile, strands(who.hair), halo=0.2)]
        if who.hairstyle == "bun":
            ball = _round((0, 0.021 * size), (1, 0.021 * size))
            high = crown - 0.03
            return [Tube((0, high, -0.085), (0, high - 0.015, -0.09), ball, strands(who.hair))]
        if who.hairstyle == "cap":
            brim = [(0, 0.036 * size, 0.009), (1, 0.026 * size, 0.007)]
            level = crown - 0.055
            forward = (math.sin(self.head_turn), math.cos(self.head_turn))
            near = (0.06 * forward[0], level, 0.06 * forward[1])
            far = (0.16 * forward[0], level - 0.018, 0.16 * forward[1])
            return [Tube(near, far, brim, flat(dark(who.headwear, 0.8)), halo=0.35)]
        if who.hairstyle == "beanie":
            edge = [(0, 0.047 * size, 0.058 * size), (1, 0.0475 * size, 0.0585 * size)]
            high, wool = crown - 0.055, flat(who.headwear)
            return [Tube((0, high, 0.018), (0, high - 0.03, 0.019), edge, wool, is_capped=False)]
        return []

    def _torso(self) -> Tube:
        who, size = self.who, self.size
        hem = self.hip + _HEM_M[who.garment]
        top = self.shoulder + 0.033 * size
        swing = 0.045 + 0.10 * abs(math.sin(self.phase)) if who.garment == "coat" else 0.0
        wide, girth, extra = who.shoulders * size, who.girth * size, self.cover
        # (height above the hip as a share of the trunk, half width, half depth)
        shape = [
            (1.0, 0.034 * wide, 0.034 * size),
            (0.965, 0.066 * wide, 0.045 * size),
            (0.915, 0.106 * wide, 0.053 * size + extra),
            (0.85, 0.119 * wide + extra, 0.061 * girth + extra),
            (0.62, 0.097 * girth + extra, 0.068 * girth + extra),
            (0.3, 0.083 * girth + extra, 0.061 * girth + extra),
            (0.0, 0.093 * girth + extra, 0.064 * girth + extra),
        ]
        trunk = top - self.hip
        profile = [
            ((1 - share) * trunk / (top - hem), half, deep)
            for share, half, deep in shape
            if (1 - share) * trunk <= top - hem
        ]
        flare = 0.103 * girth + extra * 1.5
        profile.append((1.0, flare, 0.068 * girth + extra + swing))
        return Tube((0, top, -0.012), (0, hem, 0.0), profile, garment(who), is_capped=False)

    def _hips(self) -> list[Tube]:
        who = self.who
        girth = who.girth * self.size
        half, deep = 0.09 * girth, 0.06 * girth
        waist = self.hip + 0.07 * self.size
        if who.legwear != "skirt":
            cloth = flat(who.bottom)
            profile = [(0.0, half * 0.9, deep), (1.0, half * 0.7, deep * 0.9)]
            return [Tube((0, waist, 0), (0, self.hip - 0.012, 0), profile, cloth, sink=0.06)]
        swing = 0.11 * abs(math.sin(self.phase))
        profile = [(0, half * 0.85, deep), (0.35, half * 1.1, deep * 1.2 + swing * 0.3),
                   (1, half * 1.35, deep * 1.4 + swing)]  # fmt: skip
        hem = self.hip - 0.235 * self.size
        # Sunk a little, so that the hem of the upper garment lies over it.
        cloth = pleats(who.bottom)
        return [Tube((0, waist, 0), (0, hem, 0), profile, cloth, is_capped=False, sink=0.06)]

    def _leg(self, side: int) -> list[Tube]:
        who, girth = self.who, self.who.girth * self.size
        hip, knee, ankle, toe = (self._raised(point) for point in self.legs[side])
        bare, cloth = flat(who.skin), flat(who.bottom)
        upper = _round((0, 0.052 * girth), (1, 0.036 * girth))
        if who.legwear == "trousers":
            lower = _round((0, 0.035 * girth), (0.5, 0.034 * girth), (1, 0.027 * girth))
        else:
            lower = _round((0, 0.028 * girth), (0.3, 0.031 * girth), (1, 0.017 * girth))
        thigh = bare if who.legwear == "skirt" else cloth
        shin = cloth if who.legwear == "trousers" else bare
        sink = 0.2 if who.legwear == "skirt" or who.garment == "coat" else 0.06
        parts = [
            Tube(hip, knee, upper, thigh, sink=sink, halo=0.3),
            Tube(knee, ankle, lower, shin, sink=sink, halo=0.25),
        ]
        if who.legwear == "shorts":
            wide = _round((0, 0.054 * girth), (1, 0.047 * girth))
            hem = _between(hip, knee, 0.82)
            parts.append(Tube(hip, hem, wide, cloth, is_capped=False, sink=sink))
        return [*parts, *self._shoe(ankle, toe)]

    def _shoe(self, ankle: Point, toe: Point) -> list[Tube]:
        size, colour = self.size, self.who.shoes
        heel = (ankle[0], ankle[1] - 0.018 * size, ankle[2] - 0.012 * size)
        upper = _round((0, 0.023 * size), (0.5, 0.025 * size), (1, 0.017 * size))
        low_heel, low_toe = ((x, y - 0.009 * size, z) for x, y, z in (heel, toe))
        sole = _round((0, 0.022 * size), (1, 0.0165 * size))
        is_light = sum(colour) > 1.8
        rubber = flat((0.16, 0.16, 0.17) if is_light else dark(colour, 0.45))
        return [
            Tube(low_heel, low_toe, sole, rubber),
            Tube(heel, toe, upper, flat(colour), halo=0.15),
        ]

    def _arm(self, side: int) -> list[Tube]:
        who = self.who
        shoulder, elbow, wrist = self._arm_joints(side)
        thick, cover = who.girth * self.size, self.cover * 0.6
        skin, cloth = flat(who.skin), sleeve(who)
        palm = _round((0, 0.0155 * self.size), (1, 0.014 * self.size))
        hand = Tube(_between(elbow, wrist, 1.08), _between(elbow, wrist, 1.27), palm, skin)
        if who.garment == "shirt":
            short = _round((0, 0.032 * thick), (1, 0.033 * thick))
            upper = _round((0, 0.0235 * thick), (1, 0.023 * thick))
            lower = _round((0, 0.0235 * thick), (1, 0.017 * thick))
            return [
                hand,
                Tube(shoulder, elbow, upper, skin, halo=0.2),
                Tube(elbow, wrist, lower, skin, halo=0.25),
                Tube(shoulder, _between(shoulder, elbow, 0.72), short, cloth, halo=0.16),
            ]
        upper = _round((0, 0.031 * thick + cover), (1, 0.025 * thick + cover))
        lower = _round((0, 0.0245 * thick + cover), (1, 0.018 * thick + cover))
        return [
            hand,
            Tube(shoulder, elbow, upper, cloth, halo=0.16),
            Tube(elbow, wrist, lower, cloth, halo=0.3),
        ]

    def _arm_joints(self, side: int) -> tuple[Point, Point, Point]:
        who, size = self.who, self.size
        holds = who.carried == "handbag" and side == who.bag_side
        # Arms swing against the legs of their side.
        angle = -(0.12 if holds else 0.42 * who.stride) * math.sin(self.phase + _lag(side))
        bend = 0.1 if holds else 0.34 + 0.22 * math.sin(-self.phase - _lag(side))
        out = 0.1 + 0.12 * max(who.girth - 1, 0)
        shoulder = (side * 0.101 * size * who.shoulders, self.shoulder - 0.018 * size, -0.012)
        elbow = _moved(shoulder, 0.176 * size, angle, side * out)
        wrist = _moved(elbow, 0.142 * size, angle + bend, side * 0.02)
        return shoulder, elbow, wrist

    def _bag(self) -> list[Tube]:
        who, size, side = self.who, self.size, self.who.bag_side
        back = -(0.062 * who.girth * size + self.cover + 0.055)
        leather = baggage(who.bag)
        if who.carried == "backpack":
            profile = [(0, 0.05, 0.03), (0.06, 0.105, 0.06), (0.5, 0.135, 0.082),
                       (0.94, 0.13, 0.075), (1, 0.1, 0.05)]  # fmt: skip
            top, low = self.shoulder + 0.015, self.shoulder - 0.43
            return [Tube((0, top, back), (0, low, back), profile, leather, is_capped=False)]
        if who.carried == "shoulder":
            out = side * (0.098 * who.girth * size + self.cover + 0.045)
            profile = [(0, 0.045, 0.12), (0.1, 0.055, 0.14), (0.9, 0.06, 0.15), (1, 0.05, 0.13)]
            top, low = self.hip + 0.13, self.hip - 0.12
            return [Tube((out, top, -0.03), (out, low, -0.03), profile, leather,
                         is_capped=False, halo=0.2)]  # fmt: skip
        if who.carried == "handbag":
            _, elbow, wrist = self._arm_joints(side)
            x, y, z = _between(elbow, wrist, 1.25)
            x += side * 0.02
            handle = [(0, 0.008, 0.06), (1, 0.008, 0.08)]
            profile = [(0, 0.04, 0.115), (0.9, 0.055, 0.135), (1, 0.045, 0.125)]
            return [
                Tube((x, y, z), (x, y - 0.09, z), handle, flat(dark(who.bag, 0.7))),
                Tube((x, y - 0.08, z), (x, y - 0.27, z), profile, leather,
                     is_capped=False, halo=0.2),
            ]  # fmt: skip
        return []

    def _raised(self, point: Point) -> Point:
        return point[0], point[1] + self.hip, point[2]


def _lag(side: int) -> float:
    return 0.0 if side > 0 else math.pi


def _leg_joints(who: Identity, phase: float, side: int) -> tuple[Point, Point, Point, Point]:
    """Return hip, knee, ankle and toe, with the hip at height 0; toe and ankle count as soles."""
    moment = phase + _lag(side)
    thigh_m = shin_m = (who.legs - 0.04) * who.height_m / 2
    reach = 0.30 if who.legwear == "skirt" or who.garment == "coat" else 0.37
    thigh = 0.05 + reach * who.stride * math.sin(moment)
    # The knee bends while the leg swings forwards and is nearly straight when it carries.
    flex = 0.09 + 0.85 * max(0.0, math.cos(moment + 0.45)) ** 2
    push = max(0.0, -math.sin(moment + 0.25))
    hip = (side * 0.047 * who.height_m * who.girth**0.5, 0.0, 0.0)
    knee = _moved(hip, thigh_m, thigh, side * -0.015)
    ankle = _moved(knee, shin_m, thigh - flex, side * -0.005)
    drop = 0.75 * push - 0.28 * max(0.0, math.sin(moment)) ** 4 + 0.3 * (flex - 0.09)
    length = 0.098 * who.height_m
    toe = (
        ankle[0] + side * 0.022,
        ankle[1] - 0.024 * who.height_m - length * math.sin(drop),
        ankle[2] + length * math.cos(drop),
    )
    return hip, knee, ankle, toe


def _moved(start: Point, length: float, swing: float, out: float) -> Point:
    """Return the end of a limb that hangs from ``start``, swung ahead and spread to the side."""
    down = length * math.cos(out)
    x, y, z = start
    return x + length * math.sin(out), y - down * math.cos(swing), z + down * math.sin(swing)


def _between(start: Point, end: Point, share: float) -> Point:
    x, y, z = (a + (b - a) * share for a, b in zip(start, end, strict=True))
    return x, y, z


def _round(*radii: tuple[float, float]) -> Profile:
    """Return a profile of circles from positions and radii."""
    return [(place, radius, radius) for place, radius in radii]

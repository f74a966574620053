"""The vocabulary: wordings for things, numbers, places and what happens to them; the first of each is the usual one.

The usual sentences are built differently for different events and the usual place names differ from cell to cell, so
that no fixed sentence shares long stretches with many captions: a score above it has to be earned by looking.
"""

NOUNS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "house": (("{c} house", "{c} villa", "{c} home"), ("{c} houses", "{c} villas", "{c} homes")),
    "building": (
        ("{c} building", "{c} factory", "large {c} building"),
        ("{c} buildings", "{c} factories", "large {c} buildings"),
    ),
    "road": (("{c} road", "{c} street"), ("{c} roads", "{c} streets")),
    "parking lot": (
        ("parking lot", "car park", "parking area"),
        ("parking lots", "car parks", "parking areas"),
    ),
    "water": (("pond", "lake", "pool"), ("ponds", "lakes", "pools")),
    "field": (
        ("{c} field", "{c} plantation", "{c} crop field"),
        ("{c} fields", "{c} plantations", "{c} crop fields"),
    ),
    "playground": (("playground", "stadium", "sports ground"), ("playgrounds", "stadiums", "sports grounds")),
    "trees": (("trees", "tall trees"), ("trees", "tall trees")),
}
"""Class name to (one, several); {c} is the colour, if it is told."""

COUNTS = {2: ("two",), 3: ("three",), **dict.fromkeys((4, 5, 6), ("some", "several")), 7: ("many", "lots of")}

GROUNDS: dict[str, tuple[tuple[str, ...], tuple[str, str]]] = {
    "grass": (("grass", "meadow"), ("on grass", "in a meadow")),
    "bareland": (("bareland", "wasteland"), ("on bareland", "on wasteland")),
    "desert": (("desert", "sand"), ("in the desert", "on sand")),
}

OLD = {"trees": ("woods", "woodlands"), "house": ("old houses", "houses"), "field": ("farmland", "cropland")}
"""What was replaced."""

PLACES: dict[str, tuple[str, ...]] = {
    "top left": ("at the top left", "at the upper left"),
    "top": ("along the upper edge", "at the top edge", "at the top"),
    "top right": ("in the upper right", "in the top right"),
    "left": ("on the left side", "on the left"),
    "middle": ("in the center", "in the middle", "in the central part"),
    "right": ("to the right", "along the right side"),
    "bottom left": ("by the lower left corner", "by the bottom left corner"),
    "bottom": ("near the bottom", "near the lower edge"),
    "bottom right": ("toward the bottom right", "toward the lower right"),
}

ROAD_WAYS: dict[str, tuple[str, ...]] = {
    "top": ("across the top", "along the upper edge"),
    "bottom": ("across the bottom", "along the lower edge"),
    "across": ("from left to right", "horizontally through the middle"),
    "left": ("down the left side", "along the left edge"),
    "right": ("down the right side", "along the right edge"),
    "down": ("from top to bottom", "vertically through the middle"),
    "rising": ("diagonally upward", "from bottom left to top right"),
    "falling": ("diagonally downward", "from top left to bottom right"),
    "curved": ("in a curve", "with a bend"),
    "rows": ("from left to right", "from side to side"),
    "columns": ("from top to bottom", "from the top edge to the bottom edge"),
}

VERB_FORMS = {
    "are": ("is", "are"),
    "have": ("has", "have"),
    "appear": ("appears", "appear"),
    "show": ("shows", "show"),
    "disappear": ("disappears", "disappear"),
    "stand": ("stands", "stand"),
    "replace": ("replaces", "replace"),
    "take": ("takes", "take"),
}

TEMPLATES: dict[tuple[str, str, str | None], tuple[str, ...]] = {
    ("appear", "house", None): (
        "{s} {are} built {c} {l}",
        "{l} {s} {have} been constructed {c}",
        "{s} {appear} {c} {l}",
    ),
    ("appear", "building", None): (
        "{l} {s} {have} been constructed {c}",
        "{s} {show} up {c} {l}",
        "{s} {are} erected {c} {l}",
    ),
    ("appear", "road", None): ("a new {n} runs {l}", "{s} is paved {l}", "{s} has been built {l}"),
    ("appear", "parking lot", None): ("the {g} {l} becomes {s}", "{s} is constructed {l}", "{l} {s} appears"),
    ("appear", "water", None): ("{s} has formed {l}", "{l} there is a new {n}", "{s} appears {l}"),
    ("appear", "field", None): (
        "the {g} {l} is turned into {s}",
        "{s} is cultivated {l}",
        "{l} {s} takes the place of {g}",
    ),
    ("appear", "playground", None): (
        "there is now {s} {l}",
        "{s} has been laid out {l}",
        "{l} {s} can be seen",
    ),
    ("appear", "trees", None): ("{s} are planted {l}", "{l} new {s} have grown", "{s} cover the {g} {l}"),
    ("disappear", "house", None): (
        "{s} {l} {are} demolished",
        "{s} {l} {have} been pulled down",
        "{l} {s} {disappear}",
    ),
    ("disappear", "building", None): (
        "{s} {l} {have} been torn down",
        "{s} {l} {are} dismantled",
        "{l} {s} {have} vanished",
    ),
    ("disappear", "road", None): (
        "the old {n} running {l} is gone",
        "the {n} {l} has been removed",
        "the {n} {l} disappears",
    ),
    ("disappear", "trees", None): (
        "the {n} {l} are cut down",
        "{l} the {n} make way for {g}",
        "{s} {l} disappear",
    ),
    ("disappear", "water", None): (
        "the {n} {l} dries up",
        "{l} the {n} has vanished",
        "the {n} {l} disappears",
    ),
    ("disappear", "field", None): (
        "the {n} {l} turns into {g}",
        "the {n} {l} is abandoned",
        "{l} the {n} is gone",
    ),
    ("disappear", "parking lot", None): (
        "the former {n} {l} is now {g}",
        "the {n} {l} has been removed",
        "{l} the {n} disappears",
    ),
    ("disappear", "playground", None): (
        "{l} the {n} is removed",
        "the {n} {l} has disappeared",
        "the {n} {l} becomes {g}",
    ),
    ("grow", "building", None): (
        "the {n} {l} is extended",
        "{l} the {n} becomes larger",
        "the {n} {l} has grown",
    ),
    ("grow", "water", None): ("the {n} {l} expands", "{l} the {n} becomes larger", "the {n} {l} has grown"),
    ("replace", "house", "trees"): (
        "{old} are removed to make room for {s} {l}",
        "{s} {replace} the {old} {l}",
        "{l} {old} give way to {s}",
    ),
    ("replace", "house", "field"): (
        "{s} {stand} on former {old} {l}",
        "{old} {l} is replaced by {s}",
        "{s} {are} built on {old} {l}",
    ),
    ("replace", "building", "trees"): (
        "{old} {l} give way to {s}",
        "{s} {replace} the {old} {l}",
        "{old} are felled for {s} {l}",
    ),
    ("replace", "building", "house"): (
        "{s} {take} the place of {old} {l}",
        "{old} {l} are pulled down for {s}",
        "{l} {s} {replace} {old}",
    ),
    ("replace", "building", "field"): (
        "{old} {l} is covered by {s}",
        "{s} {are} placed on {old} {l}",
        "{l} {s} {replace} {old}",
    ),
    ("replace", "parking lot", "trees"): (
        "{s} replaces the {old} {l}",
        "{l} {old} are cleared for {s}",
        "{old} {l} give way to {s}",
    ),
    ("replace", "playground", "field"): (
        "{old} {l} has become {s}",
        "{s} replaces {old} {l}",
        "{l} {s} is built on {old}",
    ),
}
"""(action, subject, former) to sentences. {s} the subject with its number, {n} without it, {l} the place, {c} what it
stands on or beside, {g} the ground, {old} what was replaced; verbs in the plural, see `VERB_FORMS`."""

ROADS: tuple[str, ...] = ("{s} {are} built {l}", "{l} {s} {have} been paved", "{s} {appear} {l}")
"""The same for roads that end within the scene, and for several ones."""

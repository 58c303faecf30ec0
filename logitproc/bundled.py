"""The folder `pocket/`: tiny causal LMs with one tokenizer, and a fitted prior. See its `MODEL_CARD.md`.

They exist so that the first command works offline and so that examples and tests run real text through
real models. `AutoModelForCausalLM.from_pretrained(lp.pocket("base"))` loads one.
"""

import re
from pathlib import Path

from .registry import unknown

_FOLDER = Path(__file__).parent / "pocket"


def bundled() -> dict[str, Path]:
    """Name -> folder of everything bundled."""
    return {p.name: p for p in sorted(_FOLDER.iterdir()) if p.is_dir() and not p.name.startswith("_")}


def pocket(name: str) -> str:
    """The folder of a bundled model or artifact. LookupError with the known names otherwise."""
    if name not in bundled():
        raise unknown("bundled model", name, bundled())
    return str(bundled()[name])


def find_model(name: str) -> str:
    """A folder of a model or tokenizer, a bundled model by name, or the name of a repository on the hub.

    FileNotFoundError for anything else: a path that does not exist is never looked up on the hub.
    """
    is_model = lambda folder: any((folder / f"{part}config.json").is_file() for part in ("", "tokenizer_"))
    if is_model(Path(name)):
        return name
    if name in bundled():
        return pocket(name)
    if Path(name).exists():
        raise FileNotFoundError(
            f"{Path(name)} is no model: it holds neither config.json nor tokenizer_config.json."
        )
    if re.fullmatch(r"\w[\w.-]*/[\w.-]+", name) and not Path(name).parent.exists():
        return name
    known = [key for key, folder in bundled().items() if is_model(folder)]
    raise FileNotFoundError(
        f"There is no folder {name}; bundled models are {', '.join(known) or 'missing'}, and a model on the "
        "hub is written ORG/NAME."
    )


def plainness(text: str) -> float:
    """The reward that `mini-dpo` was trained for and `mini-reverse-dpo` against: short words, not too many.

    2 (4.5 - letters of a word), a mean over the words (over 8 if they are fewer), clipped to [-3, 3], less
    0.1 for every word beyond 25. Known exactly, so nothing has to be judged. "The old church by the water" has 6
    words of 22 letters: 2 (6 x 4.5 - 22) / 8 = 1.25.
    """
    words = re.findall(r"[^\W\d_]+", text)
    surplus = sum(4.5 - len(word) for word in words) / max(8, len(words))
    return max(-3.0, min(3.0, 2 * surplus)) - 0.1 * max(0, len(words) - 25)

"""From `key=value` words to one configuration tree, through Hydra's compose API.

Hydra stops at the first fault and lets `+typo=1` pass. Here group choices are looked up first, the
tree is composed from them, then each value is put in by itself; nothing is refused because it is
unknown, so that `check.py` can report every fault at once.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deepclust.config.defaults import with_all_defaults
from deepclust.errors import ConfigError, UserError, near, show

PACKAGE = Path(__file__).resolve().parents[1]
INNER = re.compile(r"(head|stages\.[^.]+\.head)(\.inner)+")
ASIDE = "chosen_"
GRAMMAR = (
    "write key=value; lists as key=[1,2]; quote text with spaces or =,: signs, as in 'key=\"a b\"'"
)


@dataclass
class Composed:
    """tree: plain containers. choices: group (`group@place` where it is not its own) to option.

    stages: the names of stages that the recipe has. picked: groups that the command line chose.
    given: keys it set.
    """

    tree: dict[str, Any]
    choices: dict[str, str]
    stages: list[str]
    picked: dict[str, str]
    given: list[str] = field(default_factory=list)


@dataclass
class _Words:
    """Overrides sorted by what they do: `groups` choose files, `values` set keys."""

    groups: dict[str, str] = field(default_factory=dict)
    values: list[tuple[str, Any]] = field(default_factory=list)


def conf_folder() -> Path:
    """Our own conf/: inside the package in a wheel, beside it in a checkout or an editable
    install."""
    for folder in (PACKAGE / "conf", PACKAGE.parent / "conf"):
        if (folder / "config.yaml").is_file():
            return folder
    raise UserError(f"conf/ was found neither in {PACKAGE} nor beside it; install deepclust again")


def options(group: str, config_dirs: Sequence[Path] = ()) -> list[tuple[str, str]]:
    """The options of a group and the first comment line of each one's YAML, by name."""
    found: dict[str, str] = {}
    for folder in (conf_folder(), *map(Path, config_dirs)):
        for file in sorted((folder / group).glob("*.yaml")):
            lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
            comments = [
                line.lstrip("# ")
                for line in lines
                if line.startswith("#") and "@package" not in line
            ]
            found.setdefault(file.stem, comments[0] if comments else "")
    return sorted(found.items())


def groups(config_dirs: Sequence[Path] = ()) -> list[str]:
    """The names of all groups."""
    folders = (conf_folder(), *map(Path, config_dirs))
    return sorted(
        {path.name for folder in folders for path in folder.iterdir() if path.is_dir()}
        | {"experiment"}
    )


def compose(
    overrides: Sequence[str], config_dirs: Sequence[Path] = ()
) -> tuple[Composed, list[str]]:
    """The tree that the overrides ask for, and what was wrong on the way. Raises ConfigError where
    there is no tree.
    """
    for folder in config_dirs:
        if not Path(folder).is_dir():
            raise ConfigError([f"--config-dir {folder}: there is no such folder"])
    problems: list[str] = []
    words = _sort(overrides, config_dirs, problems)
    with _hydra(config_dirs) as run:
        try:
            config, choices, stages = _choose(words.groups, run)
            if (
                "experiment" in choices
            ):  # what it says of a stage that its recipe does not have is a slip
                recipe, _ = run(
                    [
                        "~experiment",
                        f"recipe={choices['recipe']}" if "recipe" in choices else "~recipe",
                    ]
                )
                stages = list(recipe.get("stages") or {})
        except Exception as error:
            raise ConfigError([*problems, _plain(error, config_dirs)]) from None
    for key, value in words.values:
        _put(config, key, value, problems)
    given = [key for key, _ in words.values]
    tree = _resolved(config, problems)
    # Only the command line may trust more than the list, so a file's `trust` opens nothing here.
    trust = next((value for key, value in words.values if key == "trust"), [])
    tree = with_all_defaults(tree, choices, trust if isinstance(trust, list) else [])
    return Composed(tree, choices, stages, words.groups, given), problems


def sweeps(overrides: Sequence[str]) -> list[list[str]]:
    """The product of all `key=a,b` overrides, as lists of plain overrides; one list where there is
    no sweep.
    """
    product: list[list[str]] = [[]]
    for word in overrides:
        override = _parse(word)
        if override is not None and override.is_sweep_override():
            each = [
                f"{override.get_key_element()}={value}"
                for value in override.sweep_string_iterator()
            ]
        else:
            each = [word]
        product = [[*words, item] for words in product for item in each]
    return product


def _parse(word: str) -> Any:
    """Hydra's parsed override, or None where the word is not one."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        return OverridesParser.create().parse_override(word)
    except HydraException:
        return None


def _sort(overrides: Sequence[str], config_dirs: Sequence[Path], problems: list[str]) -> _Words:
    """Sorts the words; `head.inner=X` is the choice of a nested head.

    `head=X` also chooses the recipe `single_X`, which holds what suits that head, or `single` where
    there is none.
    """
    names, words = groups(config_dirs), _Words()
    for word in overrides:
        override = _parse(word)
        if word.startswith("~"):
            problems.append(
                f"{show(word)}: keys cannot be removed; set the key to null where that is allowed"
            )
        elif override is None:
            problems.append(f"{show(word)}: cannot be read; {GRAMMAR}")
        elif override.is_sweep_override():
            problems.append(
                f"{show(word)}: several values need -m (--multirun); a list is written [a,b]"
            )
        elif override.key_or_group.partition(".")[0] == "hydra":
            problems.append(f"{show(word)}: Hydra's own keys are not used here; see --help")
        else:
            _sort_one(override, names, words, config_dirs, problems)
    head = words.groups.get("head", "null")
    if head != "null":
        own = f"single_{head}"
        words.groups.setdefault(
            "recipe", own if own in dict(options("recipe", config_dirs)) else "single"
        )
    return words


def _sort_one(
    override: Any,
    names: Sequence[str],
    words: _Words,
    config_dirs: Sequence[Path],
    problems: list[str],
) -> None:
    key, value = override.key_or_group, override.value()
    nested = bool(INNER.fullmatch(key)) and isinstance(value, str) and "." not in value
    group = "head" if nested else key
    if isinstance(value, dict) or group not in names:
        if override.package is None:
            words.values.append((key, value))
        else:
            problems.append(
                f"{show(override.input_line)}: there is no group {key}; groups are"
                f" {', '.join(names)}"
            )
        return
    place = key if nested else override.package
    chosen = "null" if value is None else str(value)
    known = [name for name, _ in options(group, config_dirs)]
    where = f"{group}@{place}" if place and place != group else group
    if chosen != "null" and chosen not in known:
        problems.append(f"{show(override.input_line)}: {_no_option(group, chosen, known)}")
        chosen = near(chosen, known) or ""
    if chosen:
        words.groups[where] = chosen


def _no_option(group: str, chosen: str, known: Sequence[str]) -> str:
    found = near(chosen, known)
    advice = f"did you mean {found}? " if found else ""
    return f"there is no {group} {show(chosen)}; {advice}Choices: {', '.join(known) or 'none'}"


@contextmanager
def _hydra(config_dirs: Sequence[Path]) -> Iterator[Any]:
    """A function from group choices to Hydra's configuration and its choices. Leaves Hydra's global
    state as it was.
    """
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from omegaconf import open_dict

    folders = ",".join(f"'file://{Path(folder).resolve()}'" for folder in config_dirs)
    search = [f"hydra.searchpath=[{folders}]"] if config_dirs else []

    def run(words: Sequence[str]) -> tuple[Any, dict[str, str]]:
        config = hydra_compose("config", [*search, *words], return_hydra_config=True)
        chosen = {str(key): value for key, value in config.hydra.runtime.choices.items()}
        with open_dict(config):
            del config["hydra"]
        return config, {
            key: value for key, value in chosen.items() if value and not key.startswith("hydra/")
        }

    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        yield run


def _choose(chosen: dict[str, str], run: Any) -> tuple[Any, dict[str, str], list[str]]:
    """The configuration, the choices, and the names of the stages that the files have.

    An option chosen for a place (`head@stages.scan.head=simclr`) is composed beside the tree and
    then put there: it comes as its own file says, since what a recipe tunes is meant for the option
    that the recipe names.
    """
    from omegaconf import OmegaConf, open_dict

    places = {key: value for key, value in chosen.items() if "@" in key}
    words = [
        f"~{key}" if value == "null" else f"{key}={value}"
        for key, value in chosen.items()
        if "@" not in key
    ]
    for number, (key, value) in enumerate(places.items()):
        if value != "null":
            words.append(f"+{key.partition('@')[0]}@{ASIDE}{number}={value}")
    config, choices = run(words)
    stages = list(config.get("stages") or {})
    choices = {key: value for key, value in choices.items() if f"@{ASIDE}" not in key}
    with open_dict(config):
        aside = [config.pop(f"{ASIDE}{number}", None) for number in range(len(places))]
    for key, node in zip(places, aside):
        OmegaConf.update(config, key.partition("@")[2], node, merge=False, force_add=True)
    return config, choices | places, stages


def _put(config: Any, key: str, value: Any, problems: list[str]) -> None:
    from omegaconf import OmegaConf

    try:
        OmegaConf.update(config, key, value, merge=True, force_add=True)
    except Exception as error:
        problems.append(f"{key}={show(value)}: cannot be set ({_first_line(error)})")


def _resolved(config: Any, problems: list[str]) -> dict[str, Any]:
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        return OmegaConf.to_container(config, resolve=True)  # type: ignore[return-value]
    except OmegaConfBaseException as error:
        problems.append(
            f"{getattr(error, 'full_key', None) or 'configuration'}: {_first_line(error)}"
        )
        return OmegaConf.to_container(config, resolve=False)  # type: ignore[return-value]


def _plain(error: Exception, config_dirs: Sequence[Path]) -> str:
    """One line for what Hydra or the YAML reader said."""
    missing = re.search(r"Could not find '(.+?)'", str(error))
    if missing:
        group, _, name = missing.group(1).rpartition("/")
        files = [
            file
            for folder in (conf_folder(), *config_dirs)
            for file in sorted(Path(folder).rglob("*.yaml"))
        ]
        named = re.compile(rf"{re.escape(group)}\b.*:\s*{re.escape(name)}\s*$", re.MULTILINE)
        where = [
            str(file)
            for file in files
            if named.search(file.read_text(encoding="utf-8", errors="replace"))
        ]
        known = [option for option, _ in options(group, config_dirs)]
        return f"{', '.join(where) or 'a defaults list'}: {_no_option(group, name, known)}"
    mark = getattr(error, "problem_mark", None)
    if mark is not None:
        reason = getattr(error, "problem", None) or "unreadable"
        return f"{mark.name}, line {mark.line + 1}: this is not valid YAML ({reason})"
    return f"configuration: {' '.join(str(error).split())}"


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__

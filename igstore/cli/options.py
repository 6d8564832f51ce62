"""Options that several commands share, each said once. `cli.Parser.of` gives them the defaults of a Python function."""

from __future__ import annotations

import argparse
from typing import Any

from igstore.cli.parser import Parser, choices_of, positive
from igstore.schema import Baseline, Fill, Interpolation, Keep, Order, Output, Reduce, Score, Select, Split, Target

PREPROCESSING = ("resize", "crop", "interpolation", "mean", "std")

# As `argparse.ArgumentParser.add_argument` takes them, by what Python calls the parameter.
_OPTIONS: dict[str, dict[str, Any]] = {
    # masks
    "p": {"type": float, "help": "percentages, 0 to 100"},
    "keep": {"choices": choices_of(Keep), "help": "what is shown"},
    "select": {"choices": choices_of(Select), "help": "what p is a percentage of"},
    "score": {"choices": choices_of(Score), "help": "what counts of a pixel's attribution"},
    "block": {"type": positive, "metavar": "PIXELS", "help": "side of a block"},
    "fill": {"choices": choices_of(Fill), "help": "what a hidden pixel becomes"},
    "order": {
        "choices": choices_of(Order),
        "help": "random is the control: as many blocks, in a random order",
    },
    "seed": {"type": int, "help": "of the random order and of the noise"},
    # models and images
    "weights": {"metavar": "W", "help": "as igstore build takes them"},
    "images": {"metavar": "PATH", "help": "where the pixels are, for stores without"},
    "split": {"choices": choices_of(Split), "help": "which part of ImageNet's root"},
    "labels": {"metavar": "CSV", "help": "CSV with columns file and wnid or class_index, for a flat folder"},
    "limit": {"type": positive, "metavar": "N", "help": "only the first N images"},
    "resize": {"type": positive, "metavar": "PX", "help": "length of the shorter side"},
    "crop": {"type": positive, "metavar": "PX", "help": "side of the centre crop"},
    "interpolation": {"choices": choices_of(Interpolation), "help": "of the resize"},
    "mean": {"type": float, "nargs": 3, "metavar": ("R", "G", "B"), "help": "in [0, 1]"},
    "std": {"type": float, "nargs": 3, "metavar": ("R", "G", "B"), "help": "in [0, 1]"},
    # the settings of a store that is built or imported
    "baseline": {"choices": choices_of(Baseline), "help": "where the path begins, in pixel space"},
    "target": {"choices": choices_of(Target), "help": "class that the maps explain"},
    "output": {"choices": choices_of(Output), "help": "what of that class they explain"},
    "reduce": {"choices": choices_of(Reduce), "help": "how channels become one map"},
    "shard_size": {"type": positive, "metavar": "N", "help": "images a shard"},
    "no_pixels": {
        "dest": "pixels",
        "action": "store_false",
        "help": "leave the images' pixels out: smaller, and no redistribution of the data set",
    },
    "no_rank": {"dest": "rank", "action": "store_false", "help": "do not rank the blocks at the end"},
    "overwrite": {"action": "store_true", "help": "remove the store that is there and begin anew"},
    # the machine
    "device": {"help": "auto, cpu, cuda or cuda:N"},
    "batch_size": {"type": positive, "metavar": "N", "help": "images at once"},
    "workers": {"type": positive, "metavar": "N", "help": "threads that decode images"},
}


def add_options(group: argparse._ActionsContainer, *names: str, **changes: Any) -> None:
    """Add shared options to a parser or to a group of one.

    Parameters
    ----------
    names
        What Python calls them.
    changes
        Of what `argparse.ArgumentParser.add_argument` is given, for all of `names`: ``nargs="+"``, another ``help``.
    """
    for name in names:
        group.add_argument(f"--{name.replace('_', '-')}", **_OPTIONS[name] | changes)


def add_preprocessing(parser: Parser) -> None:
    """Add the options that change the preprocessing that comes with a model's weights."""
    group = parser.add_argument_group("preprocessing, where it is not the one that comes with the weights")
    add_options(group, *PREPROCESSING)


def pop_preprocessing(options: dict[str, Any]) -> dict[str, Any]:
    """Take the fields of the preprocessing that were given out of a command's options."""
    fields = {name: options.pop(name) for name in PREPROCESSING}
    return {name: value for name, value in fields.items() if value is not None}

"""Files of learned quadrature rules: what `igstore calibrate` writes, and ``--method learned:FILE`` reads. No torch."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from igstore.errors import DataNotFoundError, UserError, option
from igstore.files import write_json
from igstore.schema import LEARNED, LearnedRule, Method

_PREFIX = f"{LEARNED}:"
_RULES = "igstore_learned_rules"  # the one key of a file, so that nothing else is taken for one
_MOST_BYTES = 1 << 24


class _OrLearned(list[str]):
    """Choices of an option, which ``--help`` lists, and any name of a file of learned rules beside them."""

    def __contains__(self, method: object) -> bool:
        return super().__contains__(method) or (isinstance(method, str) and method.startswith(_PREFIX))


METHOD_CHOICES = _OrLearned([*get_args(Method), f"{_PREFIX}FILE"])


def write_rules(path: Path, rules: Sequence[LearnedRule]) -> None:
    """Write rules with different numbers of nodes into one file."""
    write_json(path, {_RULES: [rule.to_json() for rule in rules]})


def read_rules(path: str | os.PathLike[str]) -> list[LearnedRule]:
    """The rules in a file that `write_rules` wrote.

    Raises
    ------
    DataNotFoundError
        There is no such file.
    UserError
        It is something else.
    """
    path = Path(path).expanduser()
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise UserError(f"{path} is too large for a file of learned rules")
        document = json.loads(path.read_bytes())
        return [LearnedRule.from_json(one) for one in document[_RULES]]
    except (FileNotFoundError, NotADirectoryError):
        raise DataNotFoundError(f"there is no file {path}; `igstore calibrate --out {path}` makes one") from None
    except IsADirectoryError:
        raise UserError(f"{path} is a folder; it must be a file that `igstore calibrate` made") from None
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{path} is not a file of rules that `igstore calibrate` made ({error})") from None


def with_rule(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a build with the rule itself where ``method`` names a file: ``learned:FILE``.

    The file's rule with ``n_steps`` nodes is taken.

    Raises
    ------
    UserError
        The file is missing or of another kind, or holds no rule with so many nodes.
    """
    method, n_steps = settings.get("method"), settings.get("n_steps")
    if not isinstance(method, str) or not method.startswith(_PREFIX):
        return dict(settings)
    path = method.removeprefix(_PREFIX)
    rules = {len(rule.nodes): rule for rule in read_rules(path)}
    if n_steps not in rules:
        counts = ", ".join(map(str, sorted(rules)))
        raise UserError(
            f"{option('n_steps')} is {n_steps!r:.80}, and the rules in {path} have {counts} nodes: give one of these "
            "numbers, or run `igstore calibrate` with another"
        )
    return {**settings, "method": LEARNED, "learned_rule": rules[n_steps]}

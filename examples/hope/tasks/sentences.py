"""Random sentences of the template language that the Home Assistant intents are written in."""

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from random import Random
from typing import Any

Sampler = Callable[[Random], str]
CLOSING = {"(": ")", "[": "]", "{": "}", "<": ">"}
PLAIN = re.compile(r"[^()\[\]{}<>|;]+")


class Grammar:
    """Templates with `(a|b)` one of, `(a;b)` in any order, `[a]` or nothing, `{list}`, `<rule>`.

    A list has values, which are templates, or a range of numbers. One that has neither, or is
    missing, stands for what only the user's home knows: it is filled from `words`.
    """

    def __init__(
        self, rules: Mapping[str, str], lists: Mapping[str, Any], words: Sequence[str]
    ) -> None:
        self._rules, self._lists, self._words = rules, lists, words
        self._samplers: dict[str, Sampler] = {}

    def sample(self, template: str, random: Random) -> str:
        """One sentence, with single spaces between its words."""
        return " ".join(self._expand(template, random).split())

    def _expand(self, template: str, random: Random) -> str:
        if template not in self._samplers:
            self._samplers[template], _ = self._group(template, 0, "")
        return self._samplers[template](random)

    def _group(self, text: str, at: int, close: str) -> tuple[Sampler, int]:
        """The sampler of what stands before `close`, and the place behind it."""
        branches: list[list[Sampler]] = [[]]
        mark = "|"
        while at < len(text) and text[at] != close:
            letter = text[at]
            if letter in "|;":
                mark = letter
                branches.append([])
                at += 1
            elif letter in "([":
                inner, at = self._group(text, at + 1, CLOSING[letter])
                branches[-1].append(inner if letter == "(" else partial(_perhaps, inner))
            elif letter in "{<":
                end = text.find(CLOSING[letter], at)
                if end < 0:
                    raise ValueError(f"{text!r}: {CLOSING[letter]!r} is missing")
                named = self._slot if letter == "{" else self._rule
                branches[-1].append(partial(named, text[at + 1 : end]))
                at = end + 1
            elif found := PLAIN.match(text, at):
                branches[-1].append(partial(_same, found.group()))
                at = found.end()
            else:
                raise ValueError(f"{text!r}: {letter!r} at {at} closes nothing")
        if close and at == len(text):
            raise ValueError(f"{text!r}: {close!r} is missing")
        joined = [partial(_row, branch) for branch in branches]
        return partial(_one if mark == "|" else _any_order, joined), at + 1

    def _rule(self, name: str, random: Random) -> str:
        if name not in self._rules:
            raise ValueError(f"<{name}>: there are the rules {', '.join(sorted(self._rules))}")
        return self._expand(self._rules[name], random)

    def _slot(self, name: str, random: Random) -> str:
        # What follows a colon renames the list's value, not its words.
        entry = self._lists.get(name.split(":")[0], {})
        if values := entry.get("values"):
            value = random.choice(values)
            return self._expand(str(value["in"] if isinstance(value, dict) else value), random)
        if limits := entry.get("range"):
            step = limits.get("step", 1)
            return str(random.randrange(limits["from"], limits["to"] + 1, step))
        return random.choice(self._words)


def _same(text: str, random: Random) -> str:
    return text


def _perhaps(inner: Sampler, random: Random) -> str:
    return inner(random) if random.random() < 0.5 else ""


def _row(parts: list[Sampler], random: Random) -> str:
    return "".join(part(random) for part in parts)


def _one(branches: list[Sampler], random: Random) -> str:
    return random.choice(branches)(random)


def _any_order(branches: list[Sampler], random: Random) -> str:
    return " ".join(branch(random) for branch in random.sample(branches, len(branches)))

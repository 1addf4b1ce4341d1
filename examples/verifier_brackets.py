"""A verifiable reward of one's own: a completion should close the brackets that it opens, and no others.

From this folder:

    ebft-train train --model DIR_OR_NAME --data PATH --output DIR --objective rlvr --verifier verifier_brackets:balanced

Mixed with feature matching: ``--objective ebft --verifier-coef 0.5 --verifier verifier_brackets:balanced``.
"""

from __future__ import annotations

CLOSING = {"(": ")", "[": "]", "{": "}"}


def balanced(_prompt: str, completion: str, _target: str) -> float:
    """The share of a completion's brackets that have their partner in it; 0 without brackets."""
    expected: list[str] = []
    brackets = partners = 0
    for character in completion:
        if character in CLOSING:
            brackets += 1
            expected.append(CLOSING[character])
        elif character in CLOSING.values():
            brackets += 1
            if expected and expected[-1] == character:
                partners += 2
                expected.pop()
    return partners / brackets if brackets else 0.0

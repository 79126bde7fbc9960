"""Formulas of docstrings as plain text: what terminals show of the mathematics of reStructuredText."""

from __future__ import annotations

import re

_GREEK = {
    "alpha": "α",
    "beta": "β",
    "gamma": "γ",
    "delta": "δ",
    "epsilon": "ε",
    "eta": "η",
    "theta": "θ",
    "lambda": "λ",
    "mu": "μ",
    "nu": "ν",
    "pi": "π",
    "rho": "ρ",
    "sigma": "σ",
    "tau": "τ",
    "phi": "φ",
    "xi": "ξ",
    "psi": "ψ",
    "omega": "ω",
    "zeta": "ζ",
    "kappa": "κ",
    "Omega": "Ω",
}
_SIGNS = {
    "sum": "Σ",
    "prod": "Π",
    "le": "≤",
    "ge": "≥",
    "ne": "≠",
    "cdot": "·",
    "times": "×",
    "odot": "⊙",
    "in": "∈",
    "to": "→",
    "infty": "∞",
    "nabla": "∇",
    "partial": "∂",
    "top": "ᵀ",
    "ell": "ℓ",
    "langle": "⟨",
    "rangle": "⟩",
    "lfloor": "⌊",
    "rfloor": "⌋",
    "lceil": "⌈",
    "rceil": "⌉",
    "dots": "…",
    "ldots": "…",
    "mapsto": "↦",
    "sim": "~",
    "quad": " ",
    "{": "{",
    "}": "}",
    "|": "‖",
    "_": "_",
    ",": " ",
    ";": " ",
    "!": "",
    " ": " ",
}
#: Commands that only say how their argument is set.
_STYLES = ("operatorname", "text", "mathrm", "mathcal", "mathbf", "textstyle", "left", "right", "big", "Big")
_ACCENTS = {"hat": "\u0302", "bar": "\u0304", "tilde": "\u0303"}
_RAISED = dict(zip("0123456789+-=()nipt", "⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁼⁽⁾ⁿⁱᵖᵗ", strict=True))
_LOWERED = dict(zip("0123456789+-=()aehijklmnoprstuvx", "₀₁₂₃₄₅₆₇₈₉₊₋₌₍₎ₐₑₕᵢⱼₖₗₘₙₒₚᵣₛₜᵤᵥₓ", strict=True))
_TOKENS = re.compile(r"\\([A-Za-z]+|.)|([{}^_])|(\s+)|([^\\{}^_\s])", flags=re.DOTALL)


def plain(text: str) -> str:
    r"""Documentation without markup, its formulas in letters and signs.

    Example:
        >>> plain(r"Add :math:`\frac{\lambda}{2} \|w\|_2^2` to `updates`.")
        'Add λ/2 ‖w‖₂² to updates.'
    """
    text = re.sub(r":math:`(.*?)`", lambda found: formula(found[1]), text, flags=re.DOTALL)
    text = re.sub(r"\.\. math::\s*(.*)", lambda found: formula(found[1]), text, flags=re.DOTALL)
    return " ".join(text.replace("`", "").split())


def formula(latex: str) -> str:
    r"""A formula in letters and signs.

    Example:
        >>> formula(r"w' = w - \eta \hat m_{t-1} / (\sqrt{\hat v} + \epsilon)")
        "w' = w - η m̂ₜ₋₁ / (√v̂ + ε)"
    """
    tokens = [found.group(0) for found in _TOKENS.finditer(latex)]
    return " ".join(_until(tokens, "").split())


def _until(tokens: list[str], end: str) -> str:
    """The text of all tokens up to one, which is taken away with them."""
    parts: list[str] = []
    while tokens:
        if tokens[0] == end:
            tokens.pop(0)
            break
        parts.append(_next(tokens))
    return "".join(parts)


def _next(tokens: list[str]) -> str:
    """The text of the next token and its arguments."""
    token = tokens.pop(0)
    if token == "{":
        return _until(tokens, "}")
    if token in ("^", "_"):
        return _shifted(_argument(tokens), token)
    if not token.startswith("\\"):
        return token
    name = token[1:]
    if name == "frac":
        above, below = _argument(tokens), _argument(tokens)
        return f"{_enclosed(above)}/{_enclosed(below)}"
    if name == "sqrt":
        third = tokens[:3] == ["[", "3", "]"]
        del tokens[: 3 * third]
        return f"{'∛' if third else '√'}{_enclosed(_argument(tokens))}"
    if name in _ACCENTS:
        letter = _argument(tokens)
        return letter[:1] + _ACCENTS[name] + letter[1:]
    if name in _STYLES:
        return ""
    return _GREEK.get(name) or _SIGNS.get(name, name)


def _argument(tokens: list[str]) -> str:
    while tokens and tokens[0].isspace():
        tokens.pop(0)
    return _next(tokens) if tokens else ""


def _enclosed(text: str) -> str:
    """A numerator, or what stands below a root, in parentheses unless it is one thing."""
    text = text.strip()
    whole = (text.startswith("(") and text.endswith(")")) or not re.search(r"[\s+*/-]", text)
    return text if whole else f"({text})"


def _shifted(text: str, sign: str) -> str:
    letters = _RAISED if sign == "^" else _LOWERED
    if all(letter in letters for letter in text):
        return "".join(letters[letter] for letter in text)
    return f"{sign}{text}" if len(text) == 1 or text.isalnum() else f"{sign}({text})"

"""Rewrites an answer's text into one plain form of LaTeX: decoration goes, usual spellings become
one; tables first.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import lru_cache

# What Unicode writes with one character and LaTeX with a command.
_CHARACTERS = str.maketrans(
    {
        **dict.fromkeys("−–—‐‑‒﹣－", "-"),
        **dict.fromkeys("\u00a0\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a\u202f\u205f\u3000\t\n\r", " "),
        **dict.fromkeys("\u200b\u200c\u200d\u2060\ufeff\u2061\u2062\u2063", ""),
        **dict.fromkeys("·⋅∙•∗", "\\cdot "),
        **dict.fromkeys("“”„‟\"", ""),
        **dict.fromkeys("‘’ʼ", "'"),
        **{chr(0xFF01 + i): chr(0x21 + i) for i in range(94) if chr(0xFF01 + i) != "－"},
        "×": "\\times ", "÷": "\\div ", "⁄": "/", "∕": "/", "±": "\\pm ", "∓": "\\mp ", "。": ".",
        "、": ",",
        "∞": "\\infty ", "≤": "\\le ", "⩽": "\\le ", "≥": "\\ge ", "⩾": "\\ge ", "≠": "\\ne ",
        "≈": "\\approx ",
        "≡": "\\equiv ", "∈": "\\in ", "∪": "\\cup ", "∩": "\\cap ", "∅": "\\emptyset ",
        "⌀": "\\emptyset ",
        "°": "^\\circ ", "º": "^\\circ ", "˚": "^\\circ ", "…": "\\dots ", "⋯": "\\dots ",
        "⟨": "\\langle ",
        "⟩": "\\rangle ", "〈": "\\langle ", "〉": "\\rangle ", "ℝ": "\\mathbb{R}",
        "ℤ": "\\mathbb{Z}",
        "ℚ": "\\mathbb{Q}", "ℕ": "\\mathbb{N}", "ℂ": "\\mathbb{C}", "∖": "\\setminus ", "′": "'",
        "π": "\\pi ",
        "α": "\\alpha ", "β": "\\beta ", "γ": "\\gamma ", "δ": "\\delta ", "ε": "\\epsilon ",
        "θ": "\\theta ",
        "λ": "\\lambda ", "μ": "\\mu ", "ρ": "\\rho ", "σ": "\\sigma ", "τ": "\\tau ",
        "φ": "\\phi ", "ϕ": "\\phi ",
        "ω": "\\omega ", "ψ": "\\psi ", "Δ": "\\Delta ", "Ω": "\\Omega ", "Σ": "\\Sigma ",
        "⊥": "\\perp ",
        "→": "\\to ", "⌊": "\\lfloor ", "⌋": "\\rfloor ", "⌈": "\\lceil ", "⌉": "\\rceil ", "✓": "",
        "✅": "",
    }
)  # fmt: skip
_FRACTIONS = {
    "½": "1/2", "⅓": "1/3", "⅔": "2/3", "¼": "1/4", "¾": "3/4", "⅕": "1/5", "⅖": "2/5", "⅗": "3/5",
    "⅘": "4/5",
    "⅙": "1/6", "⅚": "5/6", "⅐": "1/7", "⅛": "1/8", "⅜": "3/8", "⅝": "5/8", "⅞": "7/8", "⅑": "1/9",
    "⅒": "1/10",
}  # fmt: skip
_SUPERSCRIPTS = dict(zip("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁽⁾ⁿⁱ", "0123456789+-()ni", strict=True))
_SUBSCRIPTS = dict(zip("₀₁₂₃₄₅₆₇₈₉", "0123456789", strict=True))

# Commands whose argument stays and who say only how it looks.
_LOOKS = (
    "boxed|fbox|framebox|underline|bm|boldsymbol|pmb|mathbf|mathit|mathsf|mathtt|mathnormal|ensuremath|displaylines|"
    "huge|Huge|LARGE|Large|large|small|footnotesize|scriptsize|tiny|normalsize|bf|rm|it|mathstrut|mathop|mathrel|cancel"
)
_LOOKS_ARGUMENT = re.compile(rf"\\(?:{_LOOKS})\s*(?=\{{)")
_COLOUR = re.compile(r"\\(?:textcolor|colorbox|color)\s*(?:\[[^\]]*\]\s*)?\{[^{}]*\}\s*")
_DROPPED = re.compile(
    rf"\\(?:displaystyle|textstyle|scriptstyle|limits|nolimits|{_LOOKS}|centering|bfseries|itshape|null|strut|relax)"
    r"(?![A-Za-z])|\\(?:phantom|hphantom|vphantom|label|tag\*?|vspace\*?)\s*\{[^{}]*\}"
)
_SIZED = re.compile(r"\\(?:left|right|middle|m(?:left|right)|[bB]igg?[lrm]?)(?![A-Za-z])\s*(\.)?")
_SPACE = re.compile(
    r"(?<!\\)\\[,;:> ]|\\!\s*|~|\\(?:q?quad|thinspace|medspace|thickspace|enspace|nobreakspace|space)(?![A-Za-z])|"
    r"\\(?:hspace|hskip|kern|mspace)\*?\s*\{[^{}]*\}"
)
_TEXT = re.compile(
    r"\\(?:text(?:bf|it|rm|sf|tt|sc|up|md|normal)?|mbox|hbox|operatorname\*?|mathrm|mathup|emph)\s*\{([^{}]*)\}"
)
_WRAPPED_TWICE = re.compile(r"\\(?:text|math)[a-z]*\s*\{\s*(\\text\{[^{}]*\})\s*\}")
_DOUBLED = re.compile(r"\\\\(?=[A-Za-z]{2})")  # backslashes that were escaped once too often
_MATH_DELIMITERS = re.compile(r"(?<!\\)\\[()\[\]]")

# Spellings that mean one thing, in order.
_SPELLINGS: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"\\[dtc]frac(?![A-Za-z])", r"\\frac"),
        (r"\\[dt]binom(?![A-Za-z])", r"\\binom"),
        (r"\\(?:leqslant|leqq|leq)(?![A-Za-z])|<=|=<", r"\\le "),
        (r"\\(?:geqslant|geqq|geq)(?![A-Za-z])|>=", r"\\ge "),
        (r"\\(?:neq|not\s*=)(?![A-Za-z])|!=|<>|/=", r"\\ne "),
        (r"\\lt(?![A-Za-z])", "<"),
        (r"\\gt(?![A-Za-z])", ">"),
        (r"\\(?:simeq|approxeq|doteq)(?![A-Za-z])|~=", r"\\approx "),
        (r"\\(?:varnothing|empty)(?![A-Za-z])|\\\{\s*\\\}", r"\\emptyset "),
        (r"\\(?:backslash|smallsetminus)(?![A-Za-z])", r"\\setminus "),
        (r"\\(?:infin)(?![A-Za-z])", r"\\infty "),
        (r"\\(?:ldots|cdots|dotsc|dotsb|dotsm|dotsi|dotso|hdots)(?![A-Za-z])|\.\.\.+", r"\\dots "),
        (r"\\(?:lbrace)(?![A-Za-z])", r"\\{"),
        (r"\\(?:rbrace)(?![A-Za-z])", r"\\}"),
        (r"\\(?:lbrack)(?![A-Za-z])", "["),
        (r"\\(?:rbrack)(?![A-Za-z])", "]"),
        (r"\\(?:lparen)(?![A-Za-z])", "("),
        (r"\\(?:rparen)(?![A-Za-z])", ")"),
        (r"\\(?:[lr]?vert|mid)(?![A-Za-z])", "|"),
        (r"\\(?:colon|ratio)(?![A-Za-z])", ":"),
        (r"\\(?:ast|star)(?![A-Za-z])", "*"),
        (r"\\(?:imath|jmath)(?![A-Za-z])", "i"),
        (r"\\(?:varphi)(?![A-Za-z])", r"\\phi "),
        (r"\\(?:varepsilon)(?![A-Za-z])", r"\\epsilon "),
        (r"\\(?:land|wedge)(?![A-Za-z])", r" and "),
        (r"\\(?:lor|vee)(?![A-Za-z])", r" or "),
        (
            r"\^\s*(?:\{\s*\\circ\s*\}|\\circ(?![A-Za-z]))|\\degree(?![A-Za-z])|\\textdegree(?![A-Za-z])",
            r"\\degree ",
        ),
        (r"\\(?:euro|texteuro)(?![A-Za-z])(?:\{\})?", "€"),
        (r"\\(?:pounds|textsterling)(?![A-Za-z])(?:\{\})?", "£"),
        (r"\\(?:yen|textyen)(?![A-Za-z])(?:\{\})?", "¥"),
        (r"\\(begin|end)\{[dr]cases\}", r"\\\1{cases}"),
        (
            r"\\\{\s*\\begin\{(array|aligned)\}(?:\{[clr|\s]*\})?((?:(?!\\begin).)*?)\\end\{\1\}(?!\s*\\\})",
            r"\\begin{cases}\2\\end{cases}",
        ),
        (
            r"[\[(]?\s*\\begin\{(?:array|[bBp]?matrix|smallmatrix)\}(?:\{[clr|\s]*\})?",
            r"\\begin{pmatrix}",
        ),
        (r"\\end\{(?:array|[bBp]?matrix|smallmatrix)\}\s*[\])]?", r"\\end{pmatrix}"),
        (r"\{\s*,\s*\}", ","),
        (r"\{\s*\}", ""),
    )
)

# Calculator notation: names of functions and constants without a backslash.
_FUNCTIONS = {
    **{name: name for name in ["arcsin", "arccos", "arctan", "arccot", "sinh", "cosh", "tanh", "sin", "cos", "tan", "cot", "sec", "csc", "exp", "ln", "log"]},
    "asin": "arcsin", "acos": "arccos", "atan": "arctan", "tg": "tan", "ctg": "cot",
}  # fmt: skip
_FUNCTION = re.compile(rf"(?<![A-Za-z\\])({'|'.join(_FUNCTIONS)})(?![A-Za-z])")
_PLAIN_FUNCTION = re.compile(
    rf"(?<![A-Za-z\\])({'|'.join(_FUNCTIONS)})(?=\s*[(\d^\\]|\s+[a-z](?![A-Za-z]))"
)
_CONSTANTS = re.compile(
    r"(?<![A-Za-z\\])(pi|Pi|PI|oo|inf|infty|[Ii]nfinity|theta|alpha|beta)(?![A-Za-z])"
)
_CONSTANT = {
    "pi": "\\pi ", "Pi": "\\pi ", "PI": "\\pi ", "theta": "\\theta ", "alpha": "\\alpha ",
    "beta": "\\beta ",
}  # fmt: skip
_SQRT_CALL = re.compile(r"(?<![A-Za-z\\])(sqrt|cbrt)\s*(?=[(\d{]|\\pi)|\\sqrt\s*(?=\()")
_ROOT_SIGN = re.compile(r"[√∛]\s*")
_MIXED = re.compile(r"(?<![\d.,}/^_])(\d+)\s+(\d+)\s*/\s*(\d+)(?![\d.,/^]|\s*[A-Za-z(\\])")
_POWER = re.compile(r"\^\s*(-?\d+(?:\.\d+)?|-[A-Za-z])(?![}\d])")
_SUBSCRIPT = re.compile(r"_ ?([A-Za-z0-9])(?![A-Za-z0-9])")
_WRAPPED = re.compile(r"^(?:\*\*(?!\*)(.+)(?<!\*)\*\*|__(.+)__|`+(.+?)`+|'([^']+)'|\*([^*]+)\*)$")
_ENDING = re.compile(r"(?:(?<!\\)[.,;:?。]|\\\\?|(?<=[\d})\]])\s*\\cdot)\s*$")
_SAID = re.compile(
    r"^(?:(?:so|thus|hence|therefore)?,?\s*(?:the\s+)?(?:final\s+)?answers?\s*(?:is|are|:|=)+\s*:?|"
    r"=|:|(?:\\approx|\\sim|approximately|approx\.?|about|roughly)(?![A-Za-z]))\s*",
    re.IGNORECASE,
)


@lru_cache(maxsize=16384)
def normalise(text: str) -> str:
    """The answer `text` in the form the rest of the room reads: same meaning, no decoration."""
    if text.isascii() and text.isalnum():
        return _named(text)
    text = _announced(_characters(text.strip()))
    if "\\\\" in text and "\\begin" not in text:
        text = _DOUBLED.sub(r"\\", text)
    text = _delimiters(text)
    text = _COLOUR.sub("", text)
    text = _LOOKS_ARGUMENT.sub("", text)
    text = _SIZED.sub(lambda match: "" if match.group(1) is None else " ", text)
    text = _DROPPED.sub(" ", text)
    text = _SPACE.sub(lambda match: "" if match.group().startswith("\\!") else " ", text)
    text = text.replace("\\%", "%").replace("\\#", "#").replace("\\&", "&").replace("\\_", "_")
    for pattern, replacement in _SPELLINGS:
        text = pattern.sub(replacement, text)
    text = _texts(text)
    text = _trim(text)
    text = _calculator(text)
    text = _SUBSCRIPT.sub(r"_{\1}", text)
    text = _arguments(text, "\\frac", 2)
    text = _arguments(text, "\\sqrt", 1)
    return _trim(re.sub(r"\s+", " ", text))


def _named(text: str) -> str:
    return (
        _CONSTANTS.sub(_constant, text)
        if text.isalpha()
        else _calculator(text)
        if not text.isdigit()
        else text
    )


def _constant(match: re.Match[str]) -> str:
    return _CONSTANT.get(match.group(), "\\infty ")


def _characters(text: str) -> str:
    """Unicode's own spellings as LaTeX."""
    if text.isascii():
        return text.replace("\n", " ").replace("\t", " ").replace('"', "")
    for character, fraction in _FRACTIONS.items():
        if character in text:
            over, under = fraction.split("/")
            text = text.replace(character, f"\\frac{{{over}}}{{{under}}}")
    text = _ROOT_SIGN.sub(
        lambda match: "\\sqrt " if match.group()[0] == "√" else "\\sqrt[3] ", text
    )
    for table, mark in ((_SUPERSCRIPTS, "^"), (_SUBSCRIPTS, "_")):
        run = re.compile(f"[{''.join(map(re.escape, table))}]+")
        text = run.sub(
            lambda m, table=table, mark=mark: f"{mark}{{{''.join(table[c] for c in m.group())}}}",
            text,
        )
    return text.translate(_CHARACTERS)


def _announced(text: str) -> str:
    """The answer that a sentence gives: after its last `is`, or its last formula; other text stays
    as it is.
    """
    if not _SENTENCE.match(text):
        return text
    text = _HOPE.sub("", text)
    if (said := _IS.match(text)) and _MATHEMATICS.search(said.group(1)):
        return said.group(1)
    formulas = list(_FORMULA.finditer(text))
    if not formulas or re.search(r"\d", text[: formulas[0].start()]):
        return text
    rest = text[formulas[-1].end() :]
    return f"{formulas[-1].group()}{rest if _UNIT_LIKE.fullmatch(rest) else ''}"


_SENTENCE = re.compile(
    r"(?!(?:sin|cos|tan|log|ln|sqrt|exp)\b)[A-Za-z][a-z]+(?:[,:]| [A-Za-z']{2,}[ ,:]| [\\$])"
)
_HOPE = re.compile(r"(?:\.?\s*I hope it is correct\.?)?\s*(?:<\|[a-z_]+\|>.*)?$", re.DOTALL)
_IS = re.compile(r".*\b(?:is|are|equals|it's)\b:?\s+(?!not\b)(.+)$", re.DOTALL)
_MATHEMATICS = re.compile(r"^[-+$\\({\[.\d]")
_FORMULA = re.compile(
    r"\$\$(.+?)\$\$|(?<!\\)\$(.+?)(?<!\\)\$|\\\((.+?)\\\)|\\\[(.+?)\\\]", re.DOTALL
)
_UNIT_LIKE = re.compile(r"\s*(?:%|[A-Za-z]+)?[.\s]*")


def _delimiters(text: str) -> str:
    """Dollars in pairs and `\\( \\)` enclose mathematics; a dollar that is left over, or escaped,
    is a currency.
    """
    text = _MATH_DELIMITERS.sub(" ", text)
    dollars = len(re.findall(r"(?<!\\)\$", text))
    if dollars and dollars % 2 == 0:
        text = re.sub(r"(?<!\\)\$", " ", text)
    return text.replace("\\$", "$")


def _texts(text: str) -> str:
    """`\\mathrm{i}` is i; other letters keep one kind of wrapping, which says that they are
    words.
    """

    def one(match: re.Match[str]) -> str:
        inner = match.group(1)
        word = inner.strip()
        if word in _FUNCTIONS:
            return f"\\{_FUNCTIONS[word]} "
        if word in ("and", "or"):
            return f" {word} "
        if word in ("i", "e", "d") or not re.search(r"[A-Za-z]", word) or "\\" in word:
            return inner
        return f"\\text{{{inner}}}"

    previous = ""
    while previous != text:
        previous = text
        text = _WRAPPED_TWICE.sub(r"\1", _TEXT.sub(one, text))
    return text


def _trim(text: str) -> str:
    """Take away what encloses the whole, a sentence's full stop, and words that only announce."""
    previous = None
    while previous != text:
        previous = text
        text = text.strip()
        text = _ENDING.sub("", text)
        text = _SAID.sub("", text)
        if found := _WRAPPED.match(text):
            text = next(group for group in found.groups() if group)
        if text.startswith("{") and closing(text, 0) == len(text) - 1:
            text = text[1:-1]
        if text.startswith("\\text{") and closing(text, 5) == len(text) - 1:
            text = text[6:-1]
    return text


def closing(text: str, start: int) -> int:
    """The index of the brace that closes the one at `start`; -1 if none does."""
    depth = 0
    for index in range(start, len(text)):
        if text[index] in "{}" and text[index - 1 : index] != "\\":
            depth += 1 if text[index] == "{" else -1
            if depth == 0:
                return index
    return -1


def _calculator(text: str) -> str:
    """`sqrt(2)`, `10^-3`, `2**10`, `4*pi`, `+-3`, `2 1/2` and `sin(x)` as LaTeX."""
    text = _outside_text(text, _calculator_words)
    text = text.replace("**", "^").replace("+-", "\\pm ").replace("+/-", "\\pm ")
    text = re.sub(r"(?<=[\dA-Za-z)}\]! ])\*|(?<=[\dA-Za-z)}])\s+x\s+(?=10\s*\^)", "\\\\cdot ", text)
    text = _MIXED.sub(r"\1\\frac{\2}{\3}", text)
    text = _POWER.sub(r"^{\1}", text)
    text = _call(text, re.compile(r"\^\s*(?=\()"), lambda _: "^")
    return re.sub(r"\^\s*(\\frac)", r"^\1", text)


def _calculator_words(text: str) -> str:
    text = _CONSTANTS.sub(_constant, text)
    text = re.sub(r"(\d)(pi)(?![A-Za-z])", r"\1\\pi ", text)
    text = re.sub(rf"(\d)({'|'.join(_FUNCTIONS)}|sqrt)(?=\s*\()", r"\1 \2", text)
    text = _PLAIN_FUNCTION.sub(lambda match: f"\\{_FUNCTIONS[match.group(1)]} ", text)
    return _call(
        text, _SQRT_CALL, lambda match: "\\sqrt[3]" if match.group(1) == "cbrt" else "\\sqrt"
    )


def _outside_text(text: str, change: Callable[[str], str]) -> str:
    """Apply `change` to what is not inside `\\text{}`."""
    pieces = re.split(r"(\\text\{[^{}]*\}|\\begin\{[a-z]*\}|\\end\{[a-z]*\})", text)
    return "".join(piece if index % 2 else change(piece) for index, piece in enumerate(pieces))


def _call(text: str, head: re.Pattern[str], command: Callable[[re.Match[str]], str]) -> str:
    """`head(argument)` as `command{argument}`; a head without brackets is left with the command
    alone.
    """
    position = 0
    while found := head.search(text, position):
        start = found.end()
        name = command(found)
        end = _round_end(text, start) if text.startswith("(", start) else -1
        if end < 0:
            text = f"{text[: found.start()]}{name}{text[start:]}"
            position = found.start() + len(name)
            continue
        text = f"{text[: found.start()]}{name}{{{text[start + 1 : end]}}}{text[end + 1 :]}"
        position = found.start() + len(name)
    return text


def _round_end(text: str, start: int) -> int:
    depth = 0
    for index in range(start, len(text)):
        depth += (text[index] == "(") - (text[index] == ")")
        if depth == 0:
            return index
    return -1


_DIGITS = re.compile(r"\s*(\d+)")
_ARGUMENT = re.compile(r"\s*(\\[A-Za-z]+|[^\s{}\\])")


def _arguments(text: str, command: str, count: int) -> str:
    """`\\frac12` as `\\frac{1}{2}`: the first `count` arguments of `command` in braces."""
    position = 0
    # every place of the command; a longer word that begins so is another command
    while (found := text.find(command, position)) >= 0:
        position = end = found + len(command)
        if text[end : end + 1].isalpha():
            continue
        if text.startswith("[", end) and (close := text.find("]", end)) > 0:
            end = close + 1
        # an optional [argument] stays; then `count` arguments, each braced or one character
        head = text[found:end]
        arguments = []
        # who writes `\\sqrt12` means all of it
        if count == 1 and (whole := _DIGITS.match(text, end)):
            arguments = [whole.group(1)]
            end = whole.end()
        # as TeX reads them: a group, or the next character
        while len(arguments) < count:
            gap = len(text[end:]) - len(text[end:].lstrip())
            if text.startswith("{", end + gap):
                close = closing(text, end + gap)
                # a brace that is never closed: nobody knows what was meant
                if close < 0:
                    return text
                arguments.append(text[end + gap + 1 : close])
                end = close + 1
            elif single := _ARGUMENT.match(text, end):
                arguments.append(single.group(1))
                end = single.end()
            else:
                return text
        # the search goes on behind the command, since an argument may hold it again
        text = (
            text[:found] + head + "".join(f"{{{argument}}}" for argument in arguments) + text[end:]
        )
    return text

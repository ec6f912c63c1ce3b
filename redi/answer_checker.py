r"""Decide whether a final answer equals the gold answer. One file on sympy: copy it anywhere (pip install sympy).

    python answer_checker.py '\frac{1}{2}' 0.5       exit status 0: equal, 1: not equal
    python answer_checker.py --file rows.jsonl       rows with "gold" and "prediction" or "response"

The public functions are at the end; the parts stand in the order in which an answer passes through them. A new word or
unit belongs in a table (a unit of two words needs a cleaning rule that joins them), a new notation in a cleaning rule
(or in the grammar, if it nests), a new kind of object in the grammar (Node, times) and in the comparison. No text
reaches eval, sympify or another parser. sympy keeps sums, products and integer powers canonical; roots, functions, e, i
and pi are atoms to it, since its own rules for these can run for hours. mpmath, at 120 digits, decides whether a
difference is zero, at fixed pseudo-random points if it has variables. An answer that cannot be read equals only the
same text: sums, integrals, unknown commands, words that may change the value. Of several readings the usual one is
taken: 1/2x is x/2, log has any one base, (a, b) is a point or an open interval, several variables are positive.
"""
import collections
import dataclasses
import functools
import hashlib
import itertools
import json
import math
import re
import sys
import unicodedata
from fractions import Fraction

VERSION = "3.0"

# 1. Limits
MAX_CHARS, MAX_TOKENS, MAX_DEPTH = 2000, 800, 24  # of an answer: characters, tokens, nested groups
MAX_DIGITS, MAX_BITS = 1000, 40_000  # of a number in the text; of a number that a power or a factorial makes
MAX_EXPONENT, MAX_FACTORIAL, MAX_SIGNS = 1000, 3000, 4  # of a formula's power; of n in n!; plus-minus signs
MAX_WORK = 15_000  # steps of one verdict, each about ten microseconds
PRECISION, MAX_MAGNITUDE = 400, 10**6  # bits of a value at a point (120 digits), and of its integer part


class Refused(ArithmeticError):
    """The text is outside the grammar, exceeds a limit, or has no value at this point."""


def require(condition, reason):
    if not condition:
        raise Refused(reason)


class Budget:
    """The work that one verdict may cost, in steps and not in seconds: a verdict depends on the texts alone."""
    work = MAX_WORK

    def spend(self, work=1):
        self.work -= work
        require(self.work >= 0, "more work than one verdict may cost")


# 2. Tables
OPERATORS = {  # commands that are tokens under their own name; a cleaning rule writes \choice, for (C) 12
    "in", "notin", "cup", "cap", "setminus", "pm", "mp", "over", "choose", "mod", "pmod", "rfloor", "rceil", "choice"}
SPELLINGS = {  # a token: other commands (without their backslash) and characters that spell it
    "*": ("cdot", "times", "ast"), "/": ("div",), ",": (";",), ":": ("colon",), "|": ("mid",), "'": ("prime",),
    "=": ("==", ":=", "equiv"), "!=": ("ne", "neq"), "~": ("approx", "simeq"), "<": ("lt",), ">": ("gt",),
    "<=": ("le", "leq", "leqslant"), ">=": ("ge", "geq", "geqslant"), "->": ("to", "rightarrow"), "mod": ("bmod",),
    "and": ("land", "wedge"), "or": ("lor", "vee"), "cup": ("bigcup",), "cap": ("bigcap",), "setminus": ("backslash",),
    "(": ("langle",), ")": ("rangle",), "{{": (r"\{", "lbrace"), "}}": (r"\}", "rbrace"),  # sets; { and } only group
    "°": ("degree",), "%": (r"\%",), "newline": (r"\\",), "infty": ("infinity", "inf", "oo"),
    "frac": ("dfrac", "tfrac", "cfrac", "sfrac", "nicefrac"), "binom": ("dbinom", "tbinom"),
    "emptyset": ("varnothing",), "arcsin": ("asin",), "arccos": ("acos",), "arctan": ("atan",),
    "arcsinh": ("arsinh", "asinh"), "arccosh": ("arcosh", "acosh"), "arctanh": ("artanh", "atanh")}
TOKEN_OF = {spelling: token for token, spellings in SPELLINGS.items() for spelling in spellings}
LETTERS = {  # commands that name a variable or a constant
    "alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "kappa", "lambda", "mu", "nu", "xi", "pi",
    "rho", "sigma", "tau", "phi", "chi", "psi", "omega", "Gamma", "Delta", "Theta", "Lambda", "Xi", "Pi", "Sigma",
    "Phi", "Psi", "Omega", "ell", "hbar"}
DROPPED = {  # layout without meaning
    "$", '"', r"\(", r"\)", r"\[", r"\]", "displaystyle", "textstyle", "limits", "large", "nonumber", "boxed", "fbox",
    "text", "mathrm", "mathbf", "mathit", "mathcal", "mathbb", "boldsymbol", "bf", "rm", "underline", "vec",
    "overrightarrow", "angle", "triangle"}
MATRICES = {"matrix", "pmatrix", "bmatrix", "Bmatrix", "smallmatrix", "array"}
ENVIRONMENTS = MATRICES | {"aligned", "align", "gather", "gathered", "split", "cases", "dcases", "rcases"}
RECIPROCAL = {"sec": "cos", "csc": "sin", "cot": "tan"}  # sec x = 1 / cos x
TRIGONOMETRIC = {"sin", "cos", "tan", "cot", "sec", "csc", "arcsin", "arccos", "arctan"}
FUNCTIONS = TRIGONOMETRIC | {
    "ln", "log", "lg", "exp", "sqrt", "sinh", "cosh", "tanh", "arcsinh", "arccosh", "arctanh"}
NAMED = FUNCTIONS | {"abs", "floor", "ceil", "max", "min", "gcd", "lcm", "det", "arg", "sgn"}  # not all are computed
COMMANDS = NAMED | {"frac", "binom", "lfloor", "lceil", "infty", "emptyset"} | {"begin" + x for x in ENVIRONMENTS}

UNITS = [  # powers of the base units; names of units (metres and plurals in s are understood) and their sizes
    ({"m": 1}, {"mm": "0.001", "millimeter": "0.001", "cm": "0.01", "centimeter": "0.01", "m": "1", "meter": "1",
                "km": "1000", "kilometer": "1000", "in": "0.0254", "inch": "0.0254", "inche": "0.0254", "ft": "0.3048",
                "foot": "0.3048", "feet": "0.3048", "yard": "0.9144", "mile": "1609.344"}),
    ({"m": 3}, {"ml": "1e-6", "milliliter": "1e-6", "liter": "0.001"}),
    ({"s": 1}, {"s": "1", "sec": "1", "second": "1", "min": "60", "minute": "60", "h": "3600", "hr": "3600",
                "hour": "3600", "day": "86400", "week": "604800"}),
    ({"year": 1}, {"month": "1/12", "year": "1"}),
    ({"kg": 1}, {"mg": "1e-6", "g": "0.001", "gram": "0.001", "kg": "1", "kilogram": "1", "lb": "0.45359237",
                 "pound": "0.45359237", "oz": "0.028349523125", "ounce": "0.028349523125"}),
    ({"m": 1, "s": -1}, {"mph": "0.44704"}),
    ({"kg": 1, "m": 1, "s": -2}, {"n": "1", "newton": "1"}),
    ({"kg": 1, "m": 2, "s": -2}, {"j": "1", "joule": "1"}),
    ({"dollar": 1}, {"cent": "0.01", "dollar": "1", "usd": "1"}),
    ({"euro": 1}, {"euro": "1"}),
    ({"unit": 1}, {"unit": "1"})]  # square units
UNIT_OF = {name: (Fraction(size), powers) for powers, sizes in UNITS for name, size in sizes.items()}
POWER_WORDS = {"square": 2, "sq": 2, "squared": 2, "cubic": 3, "cubed": 3}
MULTIPLIERS = {  # numerator, denominator
    "dozen": (12, 1), "hundred": (100, 1), "thousand": (10**3, 1), "million": (10**6, 1), "billion": (10**9, 1),
    "trillion": (10**12, 1), "tenth": (1, 10), "tenths": (1, 10), "hundredth": (1, 100), "hundredths": (1, 100)}
NUMERALS = {"zero": 0, "one": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8,
            "nine": 9, "ten": 10, "eleven": 11, "twelve": 12}
CURRENCIES = {"dollar", "usd", "pound", "euro", "yen"}  # may stand before the number, and are units there
FILLERS = {  # say nothing: they may stand before a value, and are ignored behind it
    "a", "an", "the", "so", "thus", "hence", "therefore", "we", "get", "have", "has", "find", "there", "it", "is",
    "are", "was", "were", "equals", "equal", "to", "in", "our", "final", "correct", "answer", "answers", "result",
    "value", "values", "solution", "solutions", "total", "exactly", "approximately", "about", "roughly", "only"}
TITLES = {  # name the value: they may stand before it as well
    "age", "amount", "angle", "area", "average", "box", "case", "choice", "class", "cost", "day", "degree", "diameter",
    "difference", "digit", "distance", "domain", "door", "figure", "game", "group", "height", "interval", "item",
    "length", "maximum", "mean", "median", "minimum", "mode", "number", "option", "page", "part", "perimeter", "plan",
    "player", "point", "points", "price", "probability", "product", "profit", "quotient", "radius", "range", "rate",
    "ratio", "remainder", "room", "row", "slope", "speed", "statement", "statements", "step", "sum", "team",
    "temperature", "time", "type", "volume", "weight", "width"}
CHANGING = {  # change the value: an answer with one of these behind it equals only the same text
    "squared", "cubed", "square", "cubic", "factorial", "half", "halves", "third", "thirds", "quarter", "quarters",
    "fourths", "fifths", "sixths", "eighths", "double", "doubled", "twice", "triple", "tripled", "root", "power",
    "inverse", "reciprocal", "opposite", "plus", "minus", "mod", "modulo",  # operations
    "more", "less", "least", "most", "greater", "larger", "bigger", "smaller", "fewer", "higher", "lower", "above",
    "below", "over", "under", "beyond", "almost", "nearly", "between", "through", "until",  # comparisons
    "north", "south", "east", "west", "northeast", "northwest", "southeast", "southwest", "left", "right", "up", "down",
    "upward", "upwards", "downward", "downwards", "backward", "backwards", "forward", "forwards", "clockwise",
    "counterclockwise", "anticlockwise", "negative", "positive", "loss", "debt", "deficit", "deposit", "withdrawal",
    "decrease", "increase", "ago", "early", "late",  # directions and signs
    "no", "not", "cannot", "never", "neither", "nor", "none", "non", "without", "except", "excluding", "unless",
    "wrong", "incorrect", "false", "invalid", "impossible", "undefined", "unknown", "maybe", "perhaps",  # verdicts
    "odd", "even", "prime", "composite", "imaginary", "infinite", "repeating", "recurring"}  # classes of numbers
SHORT_WORDS = {  # of two or three letters, without \text: a word here, and not a product of variables
    "is", "of", "to", "if", "no", "am", "pm", "the", "are", "was", "has", "ago", "odd", "not", "one", "two", "six",
    "ten", "per", "all", "any", "yes", "for"}
UNICODE = {
    "−": "-", "–": "-", "—": "-", "‐": "-", "×": "*", "·": "*", "∙": "*", "⋅": "*", "÷": "/", "∕": "/", "⁄": "/",
    "≤": "<=", "⩽": "<=", "≥": ">=", "⩾": ">=", "≠": "!=", "≈": "\\approx ", "≡": "\\equiv ", "→": "\\to ",
    "∞": "\\infty ", "√": "\\sqrt ", "∛": "\\sqrt[3] ", "±": "\\pm ", "∓": "\\mp ", "∶": ":", "∣": "|",
    "∪": "\\cup ", "∩": "\\cap ", "∈": "\\in ", "∉": "\\notin ", "∖": "\\setminus ", "∅": "\\emptyset ",
    "∧": "\\land ", "∨": "\\lor ", "°": "\\degree ", "º": "\\degree ", "∘": "\\circ ", "∠": "", "′": "'", "’": "'",
    "“": "", "”": "", "⟨": "\\langle ", "⟩": "\\rangle ", "⌊": "\\lfloor ", "⌋": "\\rfloor ", "⌈": "\\lceil ",
    "⌉": "\\rceil ", "£": '"pound ', "€": '"euro ', "¥": '"yen ', "¢": '"cent '}
FORMATS = {"<super>": "^{%s}\0", "<sub>": "_{%s}\0", "<circle>": ",%s"}  # of characters that NFKC decomposes


# 3. Cleaning: rules that turn the many spellings of LaTeX and prose into uniform text
# In uniform text each word has a quote before it ("cm), each function a backslash, and each unknown name an @.
# With its rule an example equals the other answer, without it it does not (the tests try both). A pattern is searched
# for only in texts with the trigger, which is quicker to find ("" if there is none).
Rule = collections.namedtuple("Rule", "name example equal trigger pattern replacement")


def mark_word(word, before, behind, font=""):
    """A run of letters between two texts, marked. font: the command around it, as "text" or "mathrm", or ""."""
    low, name, after = word.lower(), TOKEN_OF.get(word, word), behind.lstrip()[:1]
    singular = low.replace("metre", "meter").replace("litre", "liter").removesuffix("s")
    low = singular if singular in UNIT_OF and len(singular) > 1 else low
    last, roman = before.rstrip(" ~\\,(")[-1:], font in ("mathrm", "operatorname")
    follows_number = last.isdigit() or last == "}"
    if low in ("and", "or"):  # but OR = 5 and \frac{AND}{B} are names of segments
        joins = last.isalnum() and behind[:1] == " " and after.isalnum()
        return word if word.isupper() and not font and not joins else r"\l%s " % low
    is_unit = low in UNIT_OF and follows_number and behind[:1] != "("
    if low == "mod" or (roman or not font) and name in NAMED and not is_unit or not font and (
            name in ("infty", "alpha", "theta") or low == "in" and after in ("[", "(", "{", "\\")):
        return "\\%s " % name
    if roman and len(word) == 1 and word not in "msghNJWVKL":  # \mathrm{m} is a metre, \mathrm{e} a number
        return word
    if roman and (behind[:1] == "(" or font == "operatorname"):
        return "@%s " % word
    if low in UNIT_OF:
        is_word = len(word) > 2 or word == low and follows_number
    else:
        is_word = low in SHORT_WORDS and (len(word) > 2 or not after or after.isalnum() or after in ".,")
        is_word = is_word or follows_number and re.match(r" [A-Za-z]{4}", behind)  # 5 red apples
        is_word = is_word or len(word) > 2 and word.istitle() and not (before + behind).strip()  # Bob is not obB
    is_word = font or is_word or len(word) > 3 and after not in ("^", "_")
    return word if not is_word else '"%s ' % (low if len(word) > 1 else word)


def mark_font(match):
    r"""Mark the words in \text{...} and the like. A lone word before a bracket is a function: \text{arsinh}(5)."""
    font, content, before, behind = match[1], match[2], match.string[: match.start()], match.string[match.end() :][:1]
    font = "operatorname" if font != "mathrm" and behind == "(" and re.fullmatch("[A-Za-z]{2,}", content) else font
    return " %s " % re.sub(r"(?<!\\)\b[A-Za-z]+", lambda word: mark_word(
        word[0], before + content[: word.start()], content[word.end() :].strip() or behind, font), content)


def repeating_decimal(match):
    """0.1\\overline{6} as a sum: what stands before the period, and the period over nines."""
    period = match[3] or match[4] + (match[5] or "") + (match[6] or "")
    return r"(%s.%s0+\frac{%s}{%s})" % (match[1] or 0, match[2], period, "9" * len(period) + "0" * len(match[2]))


LONGEST_FIRST = "|".join(sorted(FUNCTIONS | {"pi"}, key=lambda name: (-len(name), name)))
RELATION = r"(?:=|<|>|\\(?:leq?|geq?|neq?|approx|equiv)(?![A-Za-z]))"

RULES = [
    Rule("brace of a system", r"\left\{\begin{array}{l}x=1\\y=2\end{array}\right.", "x=1, y=2", r"\right",
         r"\\left\s*\\\{(?=.*\\right\s*\.)", ""),
    Rule("size and colour", r"\left.\textcolor{red}{5}\right.", "5", "\\",
         r"\\(?:text)?color\s*\{[^{}]*\}|\\(?:left|right|middle|[bB]igg?[lrm]?)(?![A-Za-z])\s*\.?", " "),
    Rule("digit groups of LaTeX", r"1{,}000\,000", "1000000", "",
         r"(?<=\d)\s*(?:,\s*\\!|\{,\}|\\[,;: !]|~)\s*(?=\d{3}(?!\d))", ""),
    Rule("spacing", r"\{x\,|\,x>1\}", "x>1", "", r"~|(?<!\\)\\(?:[,;:!> ]|q?quad(?![a-z]))", " "),
    Rule("digit groups with spaces", "1 000 000", "1000000", " ",
         r"(?<![\d.,\w}])\d{1,3}(?: \d{3})+(?![\d.])", lambda match: match[0].replace(" ", "")),
    Rule("repeating decimal", r"0.\dot{1}4285\dot{7}", r"\frac{1}{7}", ".",
         r"(\d*)\.(\d*)(?:\\(?:overline|bar)\s*\{(\d+)\}|\\dot\s*\{?(\d)\}?(?:(\d*)\\dot\s*\{?(\d)\}?)?)",
         repeating_decimal),
    Rule("number in brackets", "(1010)_2", "1010_2", "_", r"[({]\s*(\d[\dA-F]*)\s*[)}]\s*(?=_\s*[\d{])", r"\1"),
    Rule("name in braces", "{g}_{k}", "g_k", "{", r"\{\s*(\\?[A-Za-z]+)\s*\}(?=\s*_)", r" \1"),
    Rule("clock time", r"4:30\text{ p.m.}", "4:30 pm", ":",
         r"(?i)(\d[\s~]*(?:\\(?:text|mathrm|mbox)\s*\{\s*|\\[ ,])?)([ap])\.?\s?m(?![a-z^_])\.?", r"\1\2m "),
    Rule("end of a row", r"\begin{cases}x=1,\\y=2\\\end{cases}", "x=1, y=2", "\\begin",
         r"[,;]\s*(?=&|\\\\|\\end)|(?:\\\\|\.)\s*(?=\\end)", ""),
    Rule("environment", r"\begin{pmatrix}1\\2\end{pmatrix}", "(1,2)", "\\begin",
         r"\\(begin|end)\s*\{([A-Za-z]*)\*?\}(?:\s*[\[{][lcr|\s]*[\]}])?", r"\\\1\2 "),
    Rule("alignment", r"\begin{align*}x&=1\\y&=2\end{align*}", "x=1, y=2", "&",
         r"&\s*(?=%s)|(%s|\\begin(?:aligned|align|gather|split)|\\\\)\s*&" % (RELATION, RELATION), r"\1 "),
    Rule("derivative", r"\frac{dy}{dx}=2x", "2x", "d",  # one name, so that d does not cancel
         r"\\[dt]?frac\s*\{\s*d(\^\{?\d\}?)?\s*\\?([A-Za-z]*)\s*\}\s*\{\s*d\s*\\?([A-Za-z]+)(?:\^\{?\d\}?)?\s*\}"
         r"|(?<![A-Za-z\\])d([a-zA-Z])\s*/\s*d([a-z])(?![A-Za-z])", r" D_{\1\2\4 \3\5} "),
    Rule("dollar sign of an amount", "$0.50", r"50\text{ cents}", "$", r"\\?\$(?=\s*-?[\d.])|\\\$", r'"dollar '),
    Rule("fonts and names of operators", r"\mathrm{e}+\operatorname{arsinh}(0)", "e", "\\",
         r"\\(text(?:bf|it|rm|sf|tt|sc|normal)?|mbox|hbox|emph|mathrm|operatorname)\*?\s*\{((?:[^{}]|\{[^{}]*\})*)\}",
         mark_font),
    Rule("functions beside letters", "xsinx", r"x\sin x", "",
         r'(?<![\\A-Za-z"@])([a-z]?)(%s)([a-z]?)(?![A-Za-z])' % LONGEST_FIRST, r"\1\\\2 \3"),
    Rule("words without a font", "5 apples", "5", "", r'(?<![\\A-Za-z"@])[A-Za-z]{2,}',
         lambda match: mark_word(match[0], match.string[: match.start()], match.string[match.end() : match.end() + 9])),
    Rule("condition of a case", r"\begin{cases}x, \text{if }x>0\\-x, \text{if }x<0\end{cases}",
         r"\begin{cases}x & x>0\\-x & x<0\end{cases}", "\\begin", r'(?:&|,|\s)*"(?:if|for|when)\s', "&"),
    Rule("fraction of words", r"60\frac{\text{miles}}{\text{hour}}", "60 miles per hour", '"',
         r'\\frac\s*\{\s*("[^{}]*)\}\s*\{\s*("[^{}]*)\}', r'\1 "per \2'),
    Rule("choice", r"\textbf{(C)}", "C", "",
         r'^\s*(?:"(?:the|answer|is|option|choice)\s+)*[\s($]*"?([A-J])[\s).$]*$', r"\1"),
    Rule("choice with its value", r"\textbf{(C) } 12", "C", "", r'^\s*\(?\s*"?([A-J])\s*[).]\s+(?=[\w\\$.(-])',
         r"\1\\choice "),
    Rule("label with a colon", r"\text{Answer: } 5", "5", ":", r'^((?:\s*"[a-z]+ )+)\s*:', r"\1="),
    Rule("power of programming languages", "x**2", "x^2", "**", r"\*\*", "^"),
    Rule("degrees in words", r"180\text{ degrees}", r"\pi", '"degree', r'"degrees? ', r"\\degree "),
    Rule("percent in words", r"62.5\text{ percent}", "0.625", '"percent', r'"percent ', r"\\% "),
    Rule("all real numbers", r"\text{all real numbers}", r"\mathbb{R}", '"', r'"all\s+"real(?:s|\s+"numbers)', "R"),
    Rule("remark", r"5\text{ (since }x>0)", "5", "",
         r'(?<=\S)[\s,;(]*(?:"(?:where|such|given|since|because|provided|with)\s|\\forall'
         r'|"(?:if|when|for|as)\s(?!.*(?:,|\\land|\\lor|"if|"otherwise)))(?:[^()\[\]{}]|\{[^{}]*\}|\([^()]*\))*\)?$',
         lambda match: match[0] if r"\begin" in match.string else ""),
    Rule("range of a parameter", r"2k\pi, k \in \mathbb{Z}", r"2k\pi", r"\in",
         r"(?<=[^\s,;(])\s*[,;(]\s*[A-Za-z]\s*\\in\s*(?:\\math(?:bb|bf))?\s*\{?\s*[ZNQ]\s*\}?\s*\)?$", ""),
    Rule("set-builder", r"\left\{x\in\mathbb{R} \mid x\ge 1\right\}", r"[1,\infty)", r"\{",
         r"^\s*(?:[A-Za-z]\s*=)?\s*\\\{\s*\\?[A-Za-z]+\s*(?:\\in\s*(?:\\math\w+\s*)?\{?\s*R\s*\}?\s*)?"
         r'(?:\||\\mid(?![a-z])|:|"such\s+"that\s)(.*)\\\}\s*$', r"\1"),
    Rule("bars", r"\lvert x\rvert", r"\operatorname{abs}(x)", "\\", r"\\[lr]?[vV]ert(?![a-z])|\\\|", "|"),
    Rule("absolute value", "|x-1|", "|1-x|", "|", r"\|([^|]*)\|", r"\\abs(\1)"),
    Rule("empty braces", r"\{\}", r"\emptyset", r"\{", r"\\\{\s*\\\}", r"\\emptyset "),
    Rule("reversed brackets", "]0,1[", "(0,1)", "]", r"^\s*\](.*)([\[\]])\s*$",
         lambda match: "(" + match[1] + {"[": ")", "]": "]"}[match[2]]),
    Rule("variant letters", r"\varphi", r"\phi", "\\var", r"\\var(phi|epsilon|theta)(?![a-z])", r"\\\1 "),
    Rule("digits as arguments", r"\frac12", "0.5", "\\", r"(\\(?:[dtcsx]?frac|nicefrac|[dt]?binom))\s*(\d\s*\d?)",
         lambda match: match[1] + re.sub(r"(\d)\s*", r"{\1}", match[2])),
    Rule("degree sign", r"30^{\circ}", "30", "circ",
         r"\^\s*\{\s*\\circ\s*([CF]?)\s*\}|(?:\^|(?<=[\d}]))\s*\\circ(?![a-z])", r"\\degree \1"),
    Rule("temperature", r"72^\circ F", "72", r"\degree", r'(?<=\\degree)\s*"?([CF])(?![A-Za-z])',
         lambda match: {"C": ' "celsius ', "F": ' "fahrenheit '}[match[1]]),
    Rule("product as a denominator", "t/RC", "t/(RC)", "/", r"(?<=[\w})])/([A-Za-z]{2,})(?![A-Za-z(_^])", r"/(\1)"),
    Rule("prime", r"f^\prime(x)=2x", "f'(x)=2x", "prime", r"\^\s*(?:\{\s*(?:\\prime\s*)+\}|\\prime(?![A-Za-z]))",
         lambda match: "'" * match[0].count("prime")),
    Rule("inverse function", "f^{-1}(x)=x-1", "x-1", "^", r"(?<![A-Za-z\\])([fgh])\s*\^\s*\{\s*-\s*1\s*\}\s*(?=\()",
         r"\1_{-1}"),
    Rule("ordinal", r"5^{\text{th}}", "5", "",
         r'\^\s*\{\s*"?(?:th|st|nd|rd)\s*\}|(?<=\d)\s*"?(?:th|st|nd|rd)(?![A-Za-z])', ""),
    Rule("residue class", r"x\equiv 3\ (\bmod 7)", r"x\equiv 3\pmod 7", "mod",
         r"\(\s*\\b?mod(?![A-Za-z])([^()]*)\)", r"\\pmod{\1}")]
RULES = [rule._replace(pattern=re.compile(rule.pattern)) for rule in RULES]

GLUED_WORDS = re.compile(  # 72Ihopeitiscorrect: no unit, and no answer that a reward should pay for
    r"(?<=[\d}])(?!square|cubic|degrees?|[A-Z]+$)(?:[A-Za-z]{13}|[a-z]*[A-Z](?=[A-Za-z]{3}))")


def plain_character(char):
    """A character as ASCII LaTeX, or itself where it has no such spelling."""
    if char.isascii():
        return char if char >= " " else {"\f": "\\f", "\b": "\\b"}.get(char, " ")  # \frac, read as an escape
    name, plain = unicodedata.name(char, ""), unicodedata.normalize("NFKC", char)
    if greek := re.fullmatch("GREEK (SMALL|CAPITAL) LETTER ([A-Z]+)", name.replace("LAMDA", "LAMBDA")):
        return "\\%s " % (greek[2].lower() if greek[1] == "SMALL" else greek[2].capitalize())
    if char in UNICODE or unicodedata.category(char) in ("Cf", "Cc"):
        return UNICODE.get(char, "")
    if "\N{FRACTION SLASH}" in plain:
        return r"\frac{%s}{%s}" % tuple(part or "1" for part in plain.split("\N{FRACTION SLASH}"))
    return FORMATS.get(unicodedata.decomposition(char).split(" ")[0], "%s") % UNICODE.get(plain, plain)


def clean(text):
    """The uniform text of an answer: ASCII, one spelling of each notation, words quoted, remarks cut off."""
    text = text.strip(" \t\r\n").replace("@", " ")
    if not text.isascii() or not text.isprintable():
        text = "".join(map(plain_character, text)).lstrip(",")
        text = re.sub("}\0[_^]{", "", text).replace("\0", "")  # superscripts beside each other are one
    if "\\\\" in text and r"\begin" not in text.replace(r"\\begin", ""):  # escaped twice, as JSON does
        text = re.sub(r"\\\\(?=[A-Za-z{}()\[\]%$,;!|])", r"\\", text)
    require(not GLUED_WORDS.search(text), "words glued to a number")
    dollars = re.findall(r"(?<!\\)\$(\s*-?[\d.])?", text) if "$" in text else []
    if len(dollars) % 2 == 0 and not all(dollars):  # $5$ is math, but $5, and $10 and $20, are amounts
        text = re.sub(r"(?<!\\)\$", " ", text)
    for _, _, _, trigger, pattern, replacement in RULES:
        if trigger in text:
            text = pattern.sub(replacement, text)
    return re.sub(r"^(?:[\s=,:]|\\approx(?![a-z]))+", "", text).rstrip(" .,;\\")


# 4. Tokens
TOKEN = re.compile(r"""\s*(?:
    (?P<number>(?:\d[\dA-F]{,60}+(?=_(?:\{1[1-6]\}|1[1-6]))|\d+(?:\.\d+)?|\.\d+)
        (?:[eE](?:-?\d{1,3}|\+\d{2,3})(?!\d|\.\d))?(?:_(?:\{[\s"]*\w+\s*\}|\d+|[A-Za-z]))?)'*
    |(?P<words>(?:"[A-Za-z]+\s*(?:\^\s*(?:\{\s*-?\d+\s*\}|-?\d+)\s*)?(?:[/*.]\s*(?="))?)+)
    |(?P<variable>(?:\\(?:overline|hat|bar|dot|ddot|tilde|widehat|widetilde)\s*(?:\{[^{}]*\}|[A-Za-z])|[A-Za-z]
        |\\(?:%s)(?![A-Za-z]))(?:\s*_\s*(?:\{(?:[^{}]|\{[^{}]*\})*\}|\d+|\\?[A-Za-z]+)|\s*')*)
    |(?P<unknown>@[A-Za-z]+)
    |(?P<operator>\\[A-Za-z]+|\\.|<=|>=|!=|==|:=|->|\.\.\.|\S))""" % "|".join(sorted(LETTERS)), re.VERBOSE)


def tokenize(text):
    """[(kind, value)] of uniform text. Kinds: number, variable, command, unknown, words, operator."""
    tokens = []
    for match in TOKEN.finditer(text):
        kind, value = match.lastgroup, match[match.lastgroup]
        if kind == "words":
            value = " ".join(re.findall(r"[A-Za-z]+|/|\^[\s{]*-?\d+", value)).replace("{", "").replace("^ ", "^")
        elif kind != "operator":
            value = re.sub(r'[\s"{}\\]', "", value) if len(value) > 1 else value
        else:
            name = value[1:] if value[0] == "\\" and value[1:].isalpha() else value
            if name in DROPPED:
                continue
            is_unknown = name != value and name not in TOKEN_OF and name not in OPERATORS and name[:3] != "end"
            value = TOKEN_OF.get(name, name)
            kind = "command" if value in COMMANDS else "unknown" if is_unknown else kind
        tokens.append((kind, value))
    require(len(tokens) <= MAX_TOKENS, "more than %d tokens" % MAX_TOKENS)
    return tokens


# 5. Safe construction: nothing else in this file makes or combines sympy objects
# Why no text can hang it: texts and their numbers are short; powers and factorials, which make longer ones, are limited
# and charged to the budget, as is the common denominator of a sum. sympy gets rationals, symbols, Calls, their sums,
# products and integer powers, which take polynomial time, and nothing of which it would ask whether it is zero.
ENGINE = {}


def engine():
    """sympy and mpmath, loaded by the first answer that needs them: one and the same dict in every thread."""
    if "loaded" in ENGINE:
        return ENGINE["loaded"]
    import mpmath
    import sympy
    mp = mpmath.mp.clone()  # nobody else's precision, and nobody changes it: threads may share it
    mp.prec = 4 * PRECISION
    for constant in (mp.pi, mp.e, mp.ln2, mp.ln10):
        mp.mpf(constant)  # mpmath's cache of them is not safe to enlarge from two threads
    mp.prec = PRECISION

    class Call(sympy.Expr):  # a function, or a power that is not an integer: Call(name, arguments...), an atom to sympy
        is_commutative = is_Function = True

    fixed = {"pi": [+mp.pi], "e": [+mp.e], "i": [mp.j],  # and the marks, with two readings each
             "°": [mp.one, mp.pi / 180], "%": [mp.one, mp.one / 100], "log?": [+mp.e, mp.mpf(10)]}
    return ENGINE.setdefault("loaded", {**vars(sympy), "mp": mp, "fixed": fixed,
                                        "Call": lambda name, *args: Call(sympy.Symbol(name), *args)})


def build(kind, *args):
    return (ENGINE.get("loaded") or engine())[kind](*args)


number, symbol, call = (functools.partial(build, kind) for kind in ("Rational", "Symbol", "Call"))


def add(terms, budget):
    bits = sum(term.as_coeff_Mul()[0].q.bit_length() for term in terms)  # of their common denominator
    budget.spend(len(terms) * (bits // 1000) ** 2 // 8)
    return build("Add", *terms)


def multiply(*factors):
    others = [factor for factor in factors if not factor.is_Rational]
    if not others:
        return math.prod(factors, start=number(1))
    if all(factor.p for factor in factors if factor.is_Rational):
        return build("Mul", *factors)
    for constant in itertools.filterfalse(symbols, others):  # 0 times 1/0 is no answer, and sympy would ask if it is
        Point(Budget()).value(constant)
    return number(0)


def power(base, exponent, budget):
    """base ** exponent: exact if it is rational, sympy's own if the exponent is an integer, else a Call."""
    if base.is_Rational and exponent.is_Rational:
        top, bottom, whole = exact_root(base.p, exponent.q), exact_root(base.q, exponent.q), exponent.p
        top, bottom, whole = (top, bottom, whole) if whole >= 0 else (bottom, top, -whole)
        require(bottom != 0, "division by zero")
        if None not in (top, bottom):
            bits = max(top.bit_length(), bottom.bit_length())
            whole = whole if bits > 1 or not whole else 2 - whole % 2  # of 0, 1 and -1
            if bits * whole <= MAX_BITS:
                budget.spend(bits * whole // 12)
                return number(top**whole, bottom**whole)
    elif exponent.is_Integer and abs(exponent.p) <= MAX_EXPONENT:
        require(exponent.p > 0 or symbols(base) or Point(budget).value(base), "division by zero")
        coefficient, _ = base.as_coeff_Mul()
        bits = (coefficient.p.bit_length() + coefficient.q.bit_length()) * abs(exponent.p)
        if bits <= MAX_BITS:
            budget.spend(bits // 12)
            return build("Pow", base, exponent)
    return call("^", base, exponent)


def exact_root(n, degree):  # the integer of which n is the power, or None; negative for negative n and odd degrees
    if degree > 1 and (n < 0 and degree % 2 == 0 or n.bit_length() > 2000 or degree > 1000):
        return None
    root, exact = build("integer_nthroot", abs(n), degree) if degree > 1 else (abs(n), True)
    return int(-root if n < 0 else root) if exact else None


def inverse(x, budget):
    return power(x, number(-1), budget)


def combinatorial(name, args, budget):
    """n! or a binomial coefficient: exact for integers, else a Call (in factorials, n would be there twice)."""
    if not all(x.is_Integer for x in args):
        budget.spend(150)  # x!!!... is a deep expression, and the stack is not
        return call(name, *args)
    n, k = args[0].p, args[-1].p
    length = n if name == "!" else min(k, abs(n - k))
    require(n >= 0 <= k and length * n.bit_length() <= MAX_BITS, "a factorial past the limits")
    budget.spend(length * n.bit_length() // 12)
    return number(math.factorial(n) if name == "!" else math.comb(n, k))


# 6. Grammar: tokens to sympy expressions, and to Nodes for what is no expression
@dataclasses.dataclass(frozen=True)
class Node:
    """An answer that is no expression: a list, set, tuple, matrix, row, interval, relation, cup, cap, setminus, ratio,
    unit, base, congruence, rounded, choice or infinity. note: a list's joint, an interval's ends, a relation's
    operators, a unit's words, a base's digits, a sign, half a unit in the last place."""
    kind: str
    parts: tuple = ()
    note: str = ""
    is_Symbol = is_Rational = is_Function = False  # as sympy's objects say of themselves


def kind(x):
    return x.kind if isinstance(x, Node) else ""


def members_of(x):  # of a list, a set, a tuple, or a matrix of one row or column; x itself if it is none of these
    if kind(x) == "matrix":
        rows = [row.parts for row in x.parts]
        return rows[0] if len(rows) == 1 else sum(rows, ()) if all(len(row) == 1 for row in rows) else ()
    return x.parts if kind(x) in ("list", "set", "tuple") else (x,)


def scalar(x):
    """The expression that x is or holds."""
    if kind(x) in ("unit", "base") or kind(x) == "tuple" and len(x.parts) == 1:  # [x]
        return scalar(x.parts[0])
    require(not kind(x), "a list, relation or the like inside a formula")
    return x


def times(x, y):  # a product; a number times a tuple, a matrix or a quantity goes into it
    node, factor = (x, scalar(y)) if kind(x) else (y, x)
    if kind(node) in ("tuple", "matrix", "row", "unit"):
        require(len(factor.args) < 20, "a tuple or matrix times a long formula")
        return Node(node.kind, tuple(times(part, factor) for part in node.parts), node.note)
    if kind(node) == "infinity" and factor.is_Rational and factor.p:
        return Node("infinity", (), "+" if (factor.p > 0) == (node.note == "+") else "-")
    return multiply(scalar(node), factor)


def negative(x):
    return times(number(-1), x)


UNIT = re.compile(r"(?:(square|sq|cubic) )?(\S+)(?: (?:\^(-?\d)|(squared|cubed)))?(?: |$)")


@functools.lru_cache(maxsize=4096)
def read_words(note):
    """((size, powers of base units) or None, the other words) of words behind a number: 0.01, m 1, long: "cm long"."""
    size, powers, rest, sign = Fraction(1), collections.Counter(), [], 1
    for before, word, power, behind in UNIT.findall(note):
        if word in ("per", "/"):
            sign = -1
        elif rest or word not in UNIT_OF:
            rest += [other for other in (before, word, behind) if other and other not in FILLERS]
        else:
            exponent = sign * int(power or POWER_WORDS.get(before) or POWER_WORDS.get(behind) or 1)
            size *= UNIT_OF[word][0] ** exponent
            powers.update({base: count * exponent for base, count in UNIT_OF[word][1].items()})
    return (size, {base: n for base, n in powers.items() if n}) if powers else None, rest


def quantity(x, words):
    """x with words behind it: multiplied by "million", with a unit, with other words that change nothing."""
    for word in MULTIPLIERS.keys() & words:
        x = times(x, number(*MULTIPLIERS[word]))
    words = [word for word in words if word not in MULTIPLIERS]
    unit, rest = read_words(" ".join(words))
    plain = CHANGING.isdisjoint(rest if unit else words) and (unit or not is_name(x))
    require(plain, "words behind a variable, or that change the meaning")
    return Node("unit", (x,), " ".join(words)) if unit or rest else x


class Parser:
    """Recursive descent; each method reads from token i on."""
    RELATIONS = ("=", "<", ">", "<=", ">=", "!=", "~", "in", "notin", "->")
    LEVELS = {"choice": 0, "newline": 1, "&": 2, ",": 3, "and": 3, "or": 3, "mod": 4, "pmod": 4,
              **dict.fromkeys(RELATIONS, 5), "cup": 6, "cap": 6, "setminus": 6, ":": 7}
    LIST, CONGRUENCE, RELATION, SETS = 3, 4, 5, 6
    KINDS = {0: "choice", 1: "list", 2: "row", 3: "list", 4: "congruence", 5: "relation", 7: "ratio"}
    CLOSERS = {"(": (")", "]"), "[": (")", "]"), "{": ("}",), "{{": ("}}",),
               **{"begin" + name: ("end" + name,) for name in ENVIRONMENTS}}
    APPLICATION = re.compile(r"\((?:\d+\)|\w\)=|[^()]*,[^()]*\))")
    PROPER_FRACTION = re.compile(
        r"(?P<brace>\{ )?frac (?:\{ (\d+) \}|(\d+)) (?:\{ (\d+) \}|(\d+))(?(brace) \})(?= |$)|(\d+) / (\d+)(?! /)")
    DECIMAL = re.compile(r"[-+]?(\d*(?:\.(\d*))?)(?:[eE][-+]?\d+)?(?:\*10\^\{?-?\d+\}?)?")

    def __init__(self, tokens, budget):
        self.tokens, self.budget = [*tokens, ("operator", "the end"), ("operator", "the end")], budget
        self.i, self.depth, self.radians = -1, 0, False  # radians: in sin and the like, where a degree is pi/180
        self.step()

    def step(self, count=1):
        self.i += count
        self.kind, self.value = self.tokens[self.i]
        self.level = self.LEVELS.get(self.value, -1) if self.kind == "operator" else -1
        self.starts = self.kind in ("number", "variable", "command", "unknown") or self.value in ("(", "{", "{{")

    def accept(self, *values):  # the operator or command here if it is one of these, stepped over; else None
        value = self.value
        if value not in values or self.kind not in ("operator", "command"):
            return None
        self.step()
        return value

    def nested(self, rule, *closers):  # one level deeper: what a rule reads up to one of the closing tokens
        self.depth += 1
        require(self.depth <= MAX_DEPTH, "groups nested too deep")
        x = rule()
        require(not closers or self.accept(*closers), "unbalanced brackets, or something left over")
        self.depth -= 1
        return x

    def signed(self, rule):
        sign, x = self.accept("-", "+"), rule()
        return negative(x) if sign == "-" else x

    def operand(self, rule):
        return scalar(self.nested(functools.partial(self.signed, rule)))

    def members(self, level=0):
        """Sums, and what operators of at least a level make of them: lists, relations, unions, ratios."""
        x = self.sum()
        while (found := self.level) >= level:
            parts, joints = [x], []
            while self.level == found:
                joints.append(self.accept(self.value))
                while self.level == found == self.LIST:  # ", and"
                    joints[-1] = self.accept(self.value)
                start, part = self.i, self.atom() if found == self.CONGRUENCE else self.members(found + 1)
                parts.append(self.rounded(part, start) if joints[-1] == "~" else part)
            if set(joints) <= {">", ">="}:
                parts, joints = parts[::-1], ["<" + joint[1:] for joint in joints[::-1]]
            note = "or" if "or" in joints else "and" if "and" in joints else joints[0]
            note = " ".join(joints) if found == self.RELATION else note
            require(found != self.SETS or len(set(joints)) == 1, "unions and differences without brackets")
            x = Node(self.KINDS.get(found, note), tuple(parts), note)
        return x

    def rounded(self, x, start):
        """What stands behind an approximation sign; a decimal is exact to half a unit in its last place."""
        text, half = "".join([value for kind, value in self.tokens[start : self.i] if kind != "words"]), Fraction(0)
        decimal, value = self.DECIMAL.fullmatch(text), x.parts[0] if kind(x) == "unit" else x
        if decimal and not kind(value) and value.is_Rational and value.p:
            half = abs(Fraction(value.p, value.q) / Fraction(decimal[1])) / 2 / 10 ** len(decimal[2] or "")
        return Node("rounded", (x,), str(half))

    def sum(self):
        """Terms with signs between them; and TeX's infix fractions, whose sides are all of the group."""
        terms = []
        while True:
            signs = [self.accept("+", "-"), self.accept("+", "-")]
            if terms and not any(signs):
                break
            term = self.product()
            terms.append(negative(term) if signs.count("-") == 1 else term)
        x = terms[0] if len(terms) == 1 else add(list(map(scalar, terms)), self.budget)
        if infix := self.accept("over", "choose"):
            x = self.fraction(infix, x, self.nested(self.sum))
        return x

    def fraction(self, name, top, bottom):
        if name in ("frac", "over"):
            return times(top, inverse(scalar(bottom), self.budget))
        return combinatorial("binom", [scalar(top), scalar(bottom)], self.budget)

    def product(self):
        """Factors beside each other and with * and / between them; then perhaps words, also in brackets: 5 (cm)."""
        start, factors = self.i, [self.factor()]
        while True:
            value, bracketed = self.value, self.value == "(" and self.tokens[self.i + 1][0] == "words"
            if self.accept("*", "/"):
                start, factor = self.i, self.signed(self.factor)
                factors.append(inverse(scalar(factor), self.budget) if value == "/" else factor)
            elif self.kind == "words" or bracketed and self.tokens[self.i + 2][1] == ")":
                words = self.tokens[self.i + bracketed][1].split()
                self.step(3 if bracketed else 1)
                require(not self.starts, "words in a formula")
                factors = [quantity(functools.reduce(times, factors), words)]
            elif self.starts:
                after_a_name = self.i == start + 1 and self.tokens[start][0] in ("number", "variable")
                require(self.kind != "number" or not after_a_name, "a number after a number")
                start = self.i
                factors.append(self.factor())
            else:
                plain = factors[1:] and not any(map(kind, factors))
                return multiply(*factors) if plain else functools.reduce(times, factors)

    def factor(self):
        """An atom and the marks behind it. A proper fraction beside a whole number is added: 1 3/4 is 7/4."""
        mixed = self.kind == "number" and self.value.isdigit() and self.tokens[self.i - 1][1] != "/"
        x = self.atom()
        following = " ".join([value for _, value in self.tokens[self.i : self.i + 9]]) if mixed else ""
        if fraction := self.PROPER_FRACTION.match(following):
            top, bottom = [int(digits) for digits in fraction.groups()[1:] if digits]
            if 0 < top < bottom:
                self.step(fraction[0].count(" ") + 1)
                x = number(x.p * bottom + top, bottom)
        while mark := self.accept("^", "°", "%", "!"):
            if mark == "^":
                x = call("*", scalar(x)) if self.accept("*") else power(scalar(x), self.operand(self.atom), self.budget)
                require(self.value != "^", "a power of a power without braces")
            elif mark == "!":
                x = combinatorial(mark, [scalar(x)], self.budget)
            else:
                x = times(x, multiply(symbol("pi"), number(1, 180)) if mark == "°" and self.radians else symbol(mark))
        return x

    def atom(self):
        token, value = self.kind, self.value
        self.budget.spend()
        if token in ("operator", "command") and value in self.CLOSERS:
            return self.group(value)
        require(token != "operator", "an operator without an operand")
        self.step()
        return getattr(self, token)(value)

    def group(self, opener):
        """Brackets and environments: an expression, a tuple, an interval, a set, a matrix, a list."""
        self.step()
        x = self.nested(self.members, *self.CLOSERS[opener])
        ends, several = opener + self.tokens[self.i - 1][1], kind(x) == "list"
        if opener.startswith("begin"):
            rows = x.parts if several and x.note == "newline" else (x,)
            rows = tuple(row if kind(row) == "row" else Node("row", (row,)) for row in rows)
            is_matrix = opener[5:] in MATRICES and not any(kind(x) == "relation" for row in rows for x in row.parts)
            return Node("matrix", rows) if is_matrix else x
        if opener == "{{" or opener == "{" and several:
            return Node("set", x.parts if several else (x,))
        if not several:
            require(ends in ("()", "[]", "{}"), "unbalanced brackets")
            return Node("tuple", (x,)) if ends == "[]" and self.value != "^" and kind(x) != "matrix" else x
        return Node("tuple", x.parts) if ends == "()" or len(x.parts) != 2 else Node("interval", x.parts, ends)

    def words(self, text):
        """Words where a value is expected: a numeral, a label, a text, or neutral words before a value."""
        words, before_value = text.replace("total of", "total").split(), self.starts or self.value in ("-", "[")
        if words[0] in NUMERALS and not before_value:
            return quantity(number(NUMERALS[words[0]]), words[1:])
        names, i = [word for word in words if word not in FILLERS], self.i
        while self.tokens[i][0] in ("words", "variable"):
            names, i = names + self.tokens[i][1].split(), i + 1
        is_label = self.tokens[i] == ("operator", "=") and CHANGING.isdisjoint(names)  # area of ABC = 5
        if is_label or not before_value:
            self.step(i - self.i if is_label else 0)
            return symbol('"' + " ".join(names or words))
        names = [word for word in words if word not in FILLERS and word not in CURRENCIES]
        require(TITLES.issuperset(names), "words that may change the meaning")
        x = self.nested(functools.partial(self.signed, self.factor))
        return quantity(x, words[-1:]) if words[-1] in CURRENCIES else x

    def unknown(self, name):
        """A name or command that nobody defined: a function of arguments in brackets, or a label before =."""
        begins = self.i == 1 or self.tokens[self.i - 2][1] in (",", "and", "or", "newline")
        args = members_of(self.nested(self.members, ")")) if self.accept("(") else ()
        is_label = begins and self.value in self.RELATIONS
        require(is_label or args and name.startswith("@"), "%s is not supported" % name.lstrip("@"))
        return call(name, *map(scalar, args)) if args else symbol(name)

    def number(self, text):
        """A numeral: 12, 0.5, 2e-3, 204_5; int raises ValueError where a digit is no digit of the base."""
        digits, _, base = text.partition("_")
        require(len(text) <= MAX_DIGITS, "a number of too many digits")
        if base:
            base = int(base) if base.isdecimal() else NUMERALS.get(base, 0)
            require(1 < base <= 36, "a bad base")
            return Node("base", (number(int(digits, base)),), digits)
        return number(int(digits)) if digits.isdigit() else number(*Fraction(digits).as_integer_ratio())

    def variable(self, name):
        """A variable; before brackets perhaps a function: f(x), f(2), g(x, y) but not n(n+1)."""
        ahead = "".join([value for _, value in self.tokens[self.i : self.i + 14]]) if self.value == "(" else ""
        if not self.APPLICATION.match(ahead) and (not ahead or re.split("[_']", name)[0] not in set("fghFGH")):
            return symbol(name)
        self.step()
        return call(name, *map(scalar, members_of(self.nested(self.members, ")"))))

    def command(self, name):
        if name in ("frac", "binom"):
            return self.fraction(name, self.nested(self.atom), self.nested(self.atom))
        if name == "sqrt":
            degree = scalar(self.nested(self.members, "]")) if self.accept("[") else number(2)
            return power(scalar(self.nested(self.atom)), inverse(degree, self.budget), self.budget)
        if name in ("lfloor", "lceil"):
            return call(name[1:], scalar(self.nested(self.members, "rfloor", "rceil")))
        if name in ("infty", "emptyset"):
            return Node("infinity", (), "+") if name == "infty" else Node("set")
        return self.function(name)

    def function(self, name):
        exponent = base = None
        while mark := self.accept("^", "_"):
            script = self.operand(self.atom)
            exponent, base = (script, base) if mark == "^" else (exponent, script)
        if exponent == number(-1) and "arc" + name in FUNCTIONS:
            name, exponent = "arc" + name, None
        outer, self.radians = self.radians, self.radians or name in TRIGONOMETRIC
        args = [scalar(x) for x in members_of(self.nested(self.argument))]
        self.radians, budget = outer, self.budget
        require(base is None or name == "log", "a subscript on %s" % name)
        require(len(args) == 1 or args and name not in FUNCTIONS | DEFINED, "a function of several values")
        x = args[0]
        if name in ("log", "lg"):
            base = base or (symbol("log?") if name == "log" else number(10))
            x = multiply(call("ln", x), inverse(call("ln", base), budget))
        elif name in RECIPROCAL:
            x = inverse(call(RECIPROCAL[name], x), budget)
        else:
            x = power(symbol("e"), x, budget) if name == "exp" else call(name, *args)
        return x if exponent is None else power(x, exponent, budget)

    def argument(self):  # brackets, or factors before the next function, bracket or operator: sin 2x cos x
        if self.value in self.CLOSERS and self.starts:
            return self.atom()
        x = self.signed(self.factor)
        while self.starts and self.value not in NAMED and self.value not in self.CLOSERS:
            x = times(x, self.factor())
        return x


# 7. Values at a point
MARKS = {"°", "%", "log?"}  # symbols with two readings: 1 or pi/180, 1 or 1/100, base e or 10
FIXED = MARKS | {"pi", "e", "i"}
DEFINED = FUNCTIONS - {"sec", "csc", "cot", "log", "lg"} | {"^", "abs", "floor", "ceil", "!", "binom"}


def walk(*xs):  # every Node and expression in some, themselves included; not the names of Calls
    stack = list(xs)
    while stack:
        x = stack.pop()
        yield x
        stack.extend(x.parts if kind(x) else x.args[1:] if x.is_Function else x.args)


def symbols(*xs):
    """The names in expressions and Nodes that have no fixed value, functions that nobody defined included."""
    atoms = (x for x in walk(*xs) if x.is_Symbol or x.is_Function)
    return {x.name if x.is_Symbol else x.args[0].name for x in atoms} - FIXED - DEFINED


class Point:
    """Sample point number trial, with a reading (0 or 1) of each mark.

    Against false zeros: a sum is zero below 2**-300 of its largest term, and has no value if a term is above 2**150 or
    too small beside another; a number has none beyond 180 bits, a function none of extreme arguments.
    """

    def __init__(self, budget, trial=0, mode="positive", real=False, readings=()):
        self.budget, self.trial, self.mode, self.real = budget, trial, mode, real
        self.readings, self.mp = dict(readings), engine()["mp"]

    def magnitude(self, v):  # about log2 |v|, within the limit of all values
        m = self.mp.mag(v) if v else -MAX_MAGNITUDE
        require(m <= MAX_MAGNITUDE, "a value past the limits, or none")
        return int(m)

    def value(self, x):
        self.budget.spend()
        if x.is_Rational:
            require(max(x.p.bit_length(), x.q.bit_length()) <= 180, "a number of more than 180 bits in a formula")
            return self.mp.mpf(x.p) / x.q if x.q > 1 else self.mp.mpf(x.p)
        if x.is_Symbol:
            return self.variable(x.name)
        if x.is_Pow:
            v = self.value(x.base) ** x.exp.p
        elif x.is_Function:
            v = self.function(x.args[0].name, [self.value(arg) for arg in x.args[1:]], x.args[-1])
        elif x.is_Mul:
            v = math.prod(map(self.value, x.args))
        else:
            v = [self.value(arg) for arg in x.args]
            sizes = [self.magnitude(term) for term in v if term] or [0]
            require(max(sizes) <= 150 and max(sizes) - min(sizes) <= 140, "a sum of terms of very different size")
            v = sum(v, self.mp.zero)
            v = v.real if self.magnitude(v.imag) <= max(sizes) - 300 else v
            v = v if self.magnitude(v) > max(sizes) - 300 else self.mp.zero
        self.magnitude(v)
        return v

    def variable(self, name):
        require(name != "i" or not self.real, "a complex value")
        if name in FIXED:
            return engine()["fixed"][name][self.readings.get(name, 0)]
        seed = ("%s %d" % (name, self.trial)).encode("utf-8", "replace")
        n = int.from_bytes(hashlib.blake2b(seed, digest_size=8).digest(), "big")
        if self.mode == "whole":
            return self.mp.mpf(3 + n % (4 + 2 * self.trial))
        low, high = ((100, 8000), (10_000, 40_000), (40_000, 120_000))[self.trial % 3]
        return self.mp.mpf(low + n % (high - low)) / (-9973 if self.mode == "signed" and self.trial % 2 else 9973)

    def function(self, name, args, exponent):
        mp, v = self.mp, args[0]
        if name not in DEFINED:
            return self.variable("%s(%s)" % (name, ", ".join(mp.nstr(mp.mpc(arg), 30) for arg in args)))
        extreme = [arg for arg in args if arg and not -100 < self.magnitude(arg) < (6 if name == "tanh" else 60)]
        require(name == "abs" or not extreme and (v or name != "ln"), "a function of zero, or of an extreme argument")
        if name == "^":  # of negative numbers the odd roots are the real ones
            odd = isinstance(v, mp.mpf) and v < 0 and exponent.is_Rational and exponent.q % 2
            v = (-v) ** args[1] * (-1 if odd and exponent.p % 2 else 1) if odd else v ** args[1]
            require(v == 1 or self.magnitude(v - 1) > -290, "a power too close to 1")
        elif name in ("floor", "ceil", "!", "binom"):
            near = [int(mp.nint(arg.real)) for arg in args]
            whole = all(isinstance(arg, mp.mpf) and self.magnitude(arg - n) < -300 for arg, n in zip(args, near))
            if name in ("floor", "ceil"):
                v = mp.mpf(near[0]) if whole else getattr(mp, name)(v)
            else:
                require(whole and 0 <= min(near) and max(near) <= MAX_FACTORIAL, "a factorial outside its limits")
                v = mp.mpf(math.factorial(near[0]) if name == "!" else math.comb(*near))
        else:
            v = abs(v) if name == "abs" else getattr(mp, name.replace("arc", "a"))(v)
            v = v if self.magnitude(v) > -300 else mp.zero
        self.budget.spend(5 if isinstance(v, mp.mpf) else 20)
        require(isinstance(v, mp.mpf) or not self.real, "a complex value")
        return v


# 8. Comparison
EVERYTHING = [(-math.inf, False), (math.inf, False)]


def is_name(x):  # a variable, or words
    return x.is_Symbol and x.name not in FIXED


def is_label(x, simple=False):
    """May x name a value, as in x = 5: x, f(2), sin A, (x, y)? Unless simple also AB, |AB|, AB/CD; not 2x or x + y."""
    if kind(x):
        return kind(x) in (("tuple",) if simple else ("tuple", "ratio")) and all(is_label(y, simple) for y in x.parts)
    if is_name(x) or x.is_Function and x.args[0].name not in DEFINED - TRIGONOMETRIC and symbols(x):
        return True
    if simple or x.is_Add or x.is_Pow or not symbols(x) or x.as_coeff_Mul()[0] != 1:
        return False
    return all(y.p in (-1, 1) and y.q == 1 for y in walk(x) if y.is_Rational)


def unknown(x):
    """The one unknown of relations, a symbol or the likes of f(x); None if there is none or are several."""
    sides = [side for relation in walk(x) if kind(relation) == "relation" for side in relation.parts]
    found = {side for side in sides if is_label(side, simple=True)} or set(map(symbol, symbols(x)))
    return found.pop() if len(found) == 1 else None


def attempt(function, *args):  # (its result, "") or ([], why there is none)
    try:
        return function(*args), ""
    except (ArithmeticError, ValueError, RecursionError) as error:
        return [], str(error) or "refused"


@dataclasses.dataclass
class Equality:
    """Is one reading equal to another?"""
    budget: Budget

    def equal(self, a, b):
        kinds = {kind(a), kind(b)}
        self.budget.spend(1 if kinds == {""} else 8)
        if len(kinds) == 1 and a == b:
            return True
        if kinds == {""}:
            x = a if a.is_Rational and b.is_Rational else add([a, negative(b)], self.budget)
            return not x.is_Rational and self.holds(lambda v: not v, x)
        if "unit" in kinds:
            return self.same_quantity(a, b)
        forms, other_forms = self.forms(a), self.forms(b)
        if forms != [a] or other_forms != [b]:
            return any(self.equal(x, y) for x in forms for y in other_forms)
        if self.same_reals(a, b):
            return True
        if kinds <= {"list", "set"}:
            return self.same_members(a, b)
        if len(kinds) == 2:
            return any(self.equal(x, b) for x in self.views(a, b)) or any(self.equal(a, x) for x in self.views(b, a))
        if kinds == {"relation"}:
            return self.same_relation(a, b)
        if kinds == {"ratio"} and number(0) not in a.parts + b.parts:  # 1:2:3 and 2:4:6, but not the time 10:00
            a, b = (Node("ratio", tuple(times(x, y.parts[0]) for x in z.parts)) for y, z in ((a, b), (b, a)))
        same = a.note == b.note or a.kind in ("base", "congruence")
        return same and len(a.parts) == len(b.parts) and all(map(self.equal, a.parts, b.parts))

    def same_quantity(self, a, b):
        """A unit or words on one side are optional, on both sides they must agree."""
        x, y = (z.parts[0] if kind(z) == "unit" else z for z in (a, b))
        if kind(a) == kind(b):
            (unit, words), (other_unit, other_words) = read_words(a.note), read_words(b.note)
            same = [word.removesuffix("s") for word in words] == [word.removesuffix("s") for word in other_words]
            if words and other_words and not same or not (words and other_words or unit and other_unit):
                return False
            if unit and other_unit:
                x = times(number(*(unit[0] / other_unit[0]).as_integer_ratio()), x)
                return unit[1] == other_unit[1] and self.equal(x, y)
        return self.equal(x, y)

    def chain(self, relation):
        """(labels, values) of an equation: its last exact member if all agree, and the decimal rounded from it."""
        tail = list(relation.parts[-1].parts) if relation.note.endswith("~") else []
        sides = relation.parts[:-1] if tail else relation.parts
        labels, values = [x for x in sides if is_label(x)], [x for x in sides if not is_label(x)]
        if not values and not tail and all(is_label(x, simple=True) for x in labels):  # y = x
            labels, values = labels[:-1], labels[-1:]
        require(set(relation.note[:-1]) <= {"=", " "} and relation.note[-1] in "=~", "no equation")
        require(all(map(self.equal, values, values[1:])), "a chain whose members disagree")
        if values and tail:
            error = Point(self.budget).value(add([scalar(values[-1]), negative(scalar(tail[0]))], self.budget))
            half = Fraction(relation.parts[-1].note)
            require(abs(error) * half.denominator <= half.numerator and not symbols(*values), "not the rounded value")
        return sorted(labels, key=lambda label: not is_label(label, simple=True)), values[-1:] + tail

    def forms(self, x):
        """What a chain of equations or an approximation stands for; [x] if x is none."""
        if kind(x) != "relation" or x.note == "=" or not set(x.note) <= {"=", "~", " "}:
            return list(x.parts) if kind(x) == "rounded" else [x]
        labels, values = attempt(self.chain, x)[0] or ([], [])
        if len(labels) > 1 and is_label(labels[1], simple=True):  # x = y = 5
            return [x]
        return [Node("relation", (labels[0], value), "=") if labels else value for value in values]

    def views(self, x, other):  # what x may mean beside another kind of answer
        if kind(x) == "choice" or kind(x) == "set" and len(x.parts) == 1:
            return x.parts
        if kind(x) == "base" and x.note.isdigit():  # 52_8 and 52, where the question names the base
            return [number(int(x.note))]
        if kind(x) == "ratio" and len(x.parts) == 2:  # 1:2 and 1/2
            return [times(x.parts[0], inverse(scalar(x.parts[1]), self.budget))]
        if kind(x) == "congruence" and x.note == "mod" and not any(map(kind, x.parts)):  # 7 mod 3 is 1
            return [number(x.parts[0].p % x.parts[1].p)] if all(y.is_Integer and y.p > 0 for y in x.parts) else []
        if kind(x) == "relation" and x.note != "in":
            labels, values = attempt(self.chain, x)[0] or ([], [])
            return values if all(is_label(y, simple=True) for y in labels) or not symbols(*values) else []
        if kind(x) == "relation":
            return [x.parts[1]]
        return [Node("tuple", members_of(x))] if kind(x) in ("list", "matrix") and kind(other) == "tuple" else []

    def holds(self, test, *xs):
        """Does a test of values hold, in some reading of the marks, at enough of 24 points that have values?"""
        names, parts = symbols(*xs), list(walk(*xs))
        calls = {y.args[0].name for y in parts if y.is_Function}
        whole = calls & {"!", "binom"} or calls & {"floor", "ceil"} and names <= set("ijklmnNMK") or any(  # (-1)^n
            y.is_Function and "^" in calls and y.args[1].is_Rational and y.args[1].p < 0 and symbols(*y.args[2:])
            for y in parts)
        mode = "whole" if whole else "signed" if len(names) == 1 or "abs" in calls else "positive"
        real, (few, enough) = bool(names) and symbol("i") not in parts, (6, 12) if whole else (3, 4)
        marks = sorted({y.name for y in parts if y.is_Symbol} & MARKS)
        for readings in itertools.product((0, 1), repeat=len(marks)):
            agreed = 0
            for trial in range(24 if names else 1):
                point = Point(self.budget, trial, mode, real, zip(marks, readings))
                holds, why_not = attempt(lambda point: test(*map(point.value, xs)), point)
                agreed = agreed if why_not else agreed + 1 if holds else -1
                if agreed in (-1, enough):
                    break
            if agreed >= (few if names else 1):
                return True
        return False

    def same_members(self, a, b):
        """In any order, equally many; repeated members of sets and repeated points count once."""
        unique = "set" in (a.kind, b.kind) or all(kind(member) == "tuple" for member in a.parts + b.parts)
        x, y = (collections.Counter(list(dict.fromkeys(z.parts)) if unique else z.parts) for z in (a, b))
        left = list((y - x).elements())  # what is in both costs nothing
        if x.total() != y.total():
            return False
        for member in (x - y).elements():
            found = next((other for other in left if self.equal(member, other)), None)
            if found is None:
                return False
            left.remove(found)
        return True

    def same_relation(self, a, b):
        x, y = a.parts, b.parts
        if a.note != b.note or len(x) != len(y):
            return False
        if all(map(self.equal, x, y)):
            return True
        if a.note == "=" and is_label(x[0]) and is_label(y[0]) and self.equal(x[1], y[1]):
            names = {side.name.split("_")[0].lower() if is_name(side) else "" for side in (x[0], y[0])}
            words = [name for name in names if name[:1] == '"']
            return len(words) == 1 < len(names) or len(names) == 1 and names != {""} or names == {"", "y"}
        if len(x) != 2 or any(map(kind, x + y)) or not symbols(*x, *y):
            return False
        left, right = self.difference(a), self.difference(b)
        ratio = Point(self.budget).value(left) / Point(self.budget).value(right)
        return (a.note == "=" or engine()["mp"].re(ratio) > 0) and self.holds(
            lambda v, w: abs(v - ratio * w) * 2**100 < abs(v), left, right)

    def difference(self, relation):
        """Left side minus right side; of an equation times the denominators of its terms: xy - 1 for y = 1/x."""
        x = add([relation.parts[0], negative(relation.parts[1])], self.budget)
        factors = itertools.chain(*(term.args if term.is_Mul else [term] for term in (x.args if x.is_Add else [x])))
        bottoms = dict.fromkeys(y for y in factors if relation.note == "=" and y.is_Pow and y.exp.p < 0)
        return multiply(x, *(inverse(y, self.budget) for y in bottoms))

    def same_reals(self, a, b):
        """Are both sets of reals, and the same? Sets are sorted lists of cuts, the places where membership changes."""
        relations = [x for x in (a, b) if kind(x) == "relation"]
        if any(x.note in ("=", "~") for x in relations) or len(relations) == 2 and unknown(a) != unknown(b):
            return False
        cuts = attempt(self.reals, a)[0]
        return cuts != [] and cuts == attempt(self.reals, b)[0]

    def cut(self, x, above):  # (an end in units of 2**-300, does the cut lie just above it?)
        if kind(x) == "infinity":  # (-oo, 0] is not [-oo, 0]
            return (math.inf, above) if x.note == "+" else (-math.inf, not above)
        require(not symbols(scalar(x)), "an end that is no number")
        return int(engine()["mp"].nint(Point(self.budget, real=True).value(scalar(x)) * 2**300)), above

    def combine(self, joint, sets):  # union, intersection or difference of sets of reals
        found, outside = [], lambda inside: inside[0] and not any(inside[1:])
        belongs = {"cup": any, "or": any, "setminus": outside}.get(joint, all)
        for cut in sorted({cut for cuts in sets for cut in cuts}):
            self.budget.spend()
            if belongs([sum(other <= cut for other in cuts) % 2 for cuts in sets]) != len(found) % 2:
                found.append(cut)
        return found

    def reals(self, x):  # the cuts of what is a set of reals
        if kind(x) == "set":
            return self.combine("or", [[self.cut(part, False), self.cut(part, True)] for part in x.parts])
        if kind(x) == "interval" or kind(x) == "tuple" and len(x.parts) == 2:
            ends = x.note or "()"
            cuts = [self.cut(x.parts[0], ends[0] == "("), self.cut(x.parts[1], ends[1] == "]")]
            require(cuts[0] < cuts[1], "an interval without points")
            return cuts
        if kind(x) == "relation":
            steps, name = zip(x.note.split(), x.parts, x.parts[1:]), unknown(x)
            return self.combine("and", [self.reals(right) if joint == "in" and left == name else
                                        self.half_line(joint, left, right, name) for joint, left, right in steps])
        if kind(x) in ("cup", "cap", "setminus") or kind(x) == "list" and any(
                kind(part) == "relation" and part.note != "=" for part in x.parts) and unknown(x):
            sets = [self.reals(part) for part in x.parts]
            return self.combine(x.note or x.kind, sets) or (self.combine("or", sets) if x.note == "," else [])
        require(not kind(x) and x == symbol("R"), "no set of reals")
        return EVERYTHING

    def half_line(self, joint, left, right, x):
        """What solves a relation that is linear in x, or in |u|: |u| < c is u < c and -u < c, |u| > c one of these."""
        require(x and joint in ("<", ">", "<=", ">=", "=", "!="), "no linear relation")
        left, right = scalar(left), scalar(right)
        for u in (left, right):
            if u.is_Function and u.args[0].name == "abs" and joint not in ("=", "!="):
                pairs = [(v, right) if u is left else (left, v) for v in (u.args[1], negative(u.args[1]))]
                return self.combine("and" if (joint[0] == "<") == (u is left) else "or",
                                    [self.half_line(joint, *pair, x) for pair in pairs])
        constant, rest = add([left, negative(right)], self.budget).as_independent(x, as_Add=True)
        slope = multiply(rest, inverse(x, self.budget))
        sign, closed = self.cut(slope, False)[0], joint[-1] == "="
        require(sign, "a relation without its unknown")
        bound = multiply(number(-1), constant, inverse(slope, self.budget))
        if joint in ("=", "!="):
            point = [self.cut(bound, False), self.cut(bound, True)]
            return point if joint == "=" else [EVERYTHING[0], *point, EVERYTHING[1]]
        below = (joint[0] == "<") == (sign > 0)
        return [EVERYTHING[0], self.cut(bound, closed)] if below else [self.cut(bound, not closed), EVERYTHING[1]]


PLAIN_NUMBER = re.compile(r"\s*([+-]?\d{1,400}(?:\.\d{1,400})?)(?:\s*/\s*0*([1-9]\d{0,400}))?\s*")
THOUSANDS = re.compile(r"(?<![\w.,^(\[])(?<!\\\{)\d{1,3}(?:,\d{3})+(?![\d,)\]])")
LAYOUT = re.compile(r'\\(?:text\w*|mathrm|mbox|operatorname)\s*\{([^{}]*)\}|[$"]')


def variants(text):
    """The lists of tokens that a text may mean: 1,234 is a number or a list, (c) a choice or a variable."""
    text = clean(text)
    choice = re.sub(r'^\(\s*"?([a-j])\s*\)$', lambda match: match[1].upper(), text)  # (c) is a choice or a variable
    found = [THOUSANDS.sub(lambda match: match[0].replace(",", ""), text), text, choice]
    lists = [tokenize(variant) for variant in dict.fromkeys(found)]
    if definition := re.match(r"\w(?:_\{-1\})?'*\s*\(\s*([a-z])\s*\)\s*=|\w_\{?([a-z])\}?\s*=", text):
        name = re.compile("^%s$|(?<=_)%s$" % ((definition[1] or definition[2],) * 2))
        lists += [[(kind, name.sub("#", value)) for kind, value in tokens] for tokens in lists]  # f(x) is f(#)
    return lists


def meanings(tokens, budget):
    """The readings of tokens: one, or with +- a list for signs that agree and one for signs that each go their way."""
    places = [i for i, token in enumerate(tokens) if token in (("operator", "pm"), ("operator", "mp"))]
    require(len(places) <= MAX_SIGNS, "more than %d plus-minus signs" % MAX_SIGNS)
    branches, lists = [], []
    for choice in itertools.product((("+", "-"), ("-", "+")), repeat=len(places)):
        signs = {i: ("operator", sign[tokens[i][1] == "mp"]) for i, sign in zip(places, choice)}
        parser = Parser([signs.get(i, token) for i, token in enumerate(tokens)], budget)
        branches.append(parser.nested(parser.members, "the end"))
    for nodes in ([branches[0], branches[-1]], branches)[: len(places)]:
        members = dict.fromkeys(part for x in nodes for part in (x.parts if kind(x) in ("list", "set") else [x]))
        lists.append(Node("list", tuple(members), "or") if len(members) > 1 else nodes[0])
    return lists or branches


def same_text(texts, readable):
    """Are two texts the same without case, layout, articles and full stop?

    Readable ones only if they are names joined by commas, "and" or "or", and one is in \\text: ab and BA are products.
    """
    plain = [LAYOUT.sub(r" \1 ", text.lower()).strip(" .") for text in texts]
    if not readable:
        words = [re.findall(r"(?!(?:an?|the)(?!\w))[^\W_]+|[^\w\s]", text) for text in plain]
        return words[0] == words[1] != []
    names = [sorted(filter(None, re.split(r"\s*(?:[,;]|\band\b|\bor\b)\s*", text))) for text in plain]
    return names[0] == names[1] != [] and any(re.search(r"\\(?:text|mbox|mathrm)", text) for text in texts) and all(
        re.fullmatch(r"[^\W\d_]+(?:\s[^\W\d_]+)*", name) for name in names[0])


def verdict(prediction, gold):
    """(equal?, why, {text: its readings})."""
    texts = sorted((prediction, gold))  # so that the verdict is symmetric
    plain = [PLAIN_NUMBER.fullmatch(text) for text in texts]
    if all(plain):
        values = [Fraction(match[1]) / int(match[2] or 1) for match in plain]
        return values[0] == values[1], "plain numbers", {}
    if texts[0].strip() == texts[1].strip():
        return texts[0].strip() != "", "the same text", {}
    if len(max(texts, key=len)) > MAX_CHARS:
        return False, "more than %d characters" % MAX_CHARS, {}
    found = [attempt(variants, text) for text in texts]
    first = [[value for _, value in lists[0]] if lists else [] for lists, _ in found]
    if first[0] == first[1] != []:
        return True, "the same text", {}
    budget, readings, reasons = Budget(), {}, [why for _, why in found]
    for text, (lists, _) in zip(texts, found):
        results = [attempt(meanings, tokens, budget) for tokens in lists]
        readings[text] = [node for nodes, _ in results for node in nodes]
        reasons += [why for _, why in results if not readings[text]]
    for x, y in itertools.product(*readings.values()):
        equal, why = attempt(Equality(budget).equal, x, y)
        if equal:
            return True, "equal values", readings
        reasons.append(why)
    if same_text(texts, any(readings.values())):
        return True, "the same words", readings
    return False, " ".join(filter(None, reasons)) or "different values", readings


# 9. Public functions
BOX = re.compile(r"\\++(?:boxed|fbox)(?![A-Za-z])\s*+(?:(\{)|([+-]?\d[\d.,/]*+)|)"  # possessive: a run of backslashes
                 r"|(?:\\\\)*+\\.|\\++|[{}]", re.DOTALL)  # is read once, and not again from each of its backslashes
NO_CONTENT = re.compile(r"(?:\s|~|\$|\\[ ,;:!]|\\q?quad\b|\.\.\.|…|\\[lc]?dots\b|\{\s*\}|\\text\s*\{\s*\})*+")


def extract_answer(response, open_thought_counts=False):
    r"""The content of the last \boxed{...} or \fbox{...} of a response that has content (\boxed 5 has), or None.

    response: str, all that the model wrote, with or without the prefill "<think>\n".
    open_thought_counts: also read the boxes in a thought that never ends, a <think> without a </think> behind it.
    Raises TypeError if response is not a str.
    """
    if not isinstance(response, str):
        raise TypeError("expected the response as a str, found %s" % type(response).__name__)
    thought = response.rfind("<think>")
    if thought > response.rfind("</think>") and not open_thought_counts:
        response = response[:thought]
    answer, opened = None, []  # opened: for each open brace, where the content of its box starts
    for match in BOX.finditer(response):
        content = match[2] and match[2].rstrip(".,/")
        if match[1] or match[0] == "{":
            opened.append(match.end() if match[1] else None)
        elif match[0] == "}" and opened and (start := opened.pop()) is not None:
            content = response[start : match.start()]
        if content is not None and not NO_CONTENT.fullmatch(content):
            answer = content.strip()
    return answer


def answers_match(prediction, gold):
    """Is a bare answer (no box around it) equal to the gold answer? Symmetric in two texts.

    prediction: str, or None for no answer, which equals nothing.
    gold: str, int or float, or a list of these of which any will do.
    Raises TypeError if they are something else, and ImportError without sympy, unless both are plain numbers.
    """
    golds = gold if isinstance(gold, list) else [gold]
    for answer in golds:
        if isinstance(answer, bool) or not isinstance(answer, (str, int, float)):
            raise TypeError("expected gold as a str, int, float or a list of these, found %s" % type(answer).__name__)
    if not isinstance(prediction, (str, type(None))):
        raise TypeError("expected the prediction as a str or None, found %s" % type(prediction).__name__)
    return prediction is not None and any(verdict(prediction, str(answer))[0] for answer in golds)


def is_correct(response, gold, open_thought_counts=False):
    """Does the last box of a response (str, or None for none) equal the gold answer?

    gold and errors: as in answers_match, with or without a box. open_thought_counts: as in extract_answer.
    Raises what answers_match raises.
    """
    return answers_match(None if response is None else extract_answer(response, open_thought_counts), gold)


def accuracy_reward(completions, answer, **_):
    """A reward function for TRL: GRPOTrainer(model, reward_funcs=accuracy_reward, train_dataset=...).

    completions: list of str, or of conversations, whose last message is read. answer: the data set's column of gold
    answers, one for each completion. Returns a list of floats, 1.0 where the last box is correct, else 0.0.
    Raises TypeError as is_correct, and ValueError if completions and gold answers differ in number.
    """
    texts = [completion if isinstance(completion, str) else completion[-1]["content"] for completion in completions]
    return [float(is_correct(text, gold)) for text, gold in zip(texts, answer, strict=True)]


def explain(prediction, gold):
    """How two bare answers (str) were read, and why the verdict is what it is. Raises ImportError without sympy."""
    equal, why, readings = verdict(prediction, gold)
    shown = [[attempt(repr, x)[0] or "a huge number" for x in readings.get(text, ())] for text in (prediction, gold)]
    sides = [" or ".join(found) or text[:1000] for found, text in zip(shown, (prediction, gold))]
    return "prediction: %s\ngold: %s\n%s: %s" % (*sides, "equal" if equal else "not equal", why)


def main(arguments):
    """The exit status of a command line, read by hand, since an answer may well start with a minus sign."""
    if len(arguments) != 2:
        asked = arguments in (["--help"], ["-h"])
        usage = __doc__ if asked else "error: expected PREDICTION GOLD, --file ROWS.jsonl or --help"
        print(usage, file=sys.stdout if asked else sys.stderr)
        return 0 if asked else 2
    if arguments[0] != "--file":
        explanation = explain(*arguments)
        print(explanation)
        return 0 if "\nequal: " in explanation else 1
    verdicts, unread = [], 0
    for n, line in enumerate(open(arguments[1], encoding="utf-8"), 1):
        try:
            row = json.loads(line)
            answer = extract_answer(row["response"]) if "response" in row else row["prediction"]
            verdicts.append(answers_match(answer, row["gold"]))
            print(json.dumps({"line": n, "correct": verdicts[-1]}))
        except (ValueError, KeyError, TypeError) as error:
            unread += 1
            print("error: %s, line %d: %r" % (arguments[1], n, error), file=sys.stderr)
    print("%d of %d correct, %d not read" % (sum(verdicts), len(verdicts), unread))
    return 2 if unread else 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except (OSError, UnicodeDecodeError) as error:
        print("error: %s" % error, file=sys.stderr)
        sys.exit(2)
